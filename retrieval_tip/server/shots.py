"""Photographs and features that were sent become shots: photographs are kept, as they came, in a folder a class.

Of what is not added, nothing is kept that was not there.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data import images
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import schema_of, table_of, write_table
from retrieval_tip.data.sources import Source, of_images, open_source
from retrieval_tip.errors import StoreError, show
from retrieval_tip.files import replacing
from retrieval_tip.index import changes
from retrieval_tip.index.build import build_index
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.served import Served
from retrieval_tip.server.uploads import Sent


def add_images(
    one: Served, backbone: Backbone, label: str, datas: Sequence[bytes], uploads: Path | None
) -> changes.Added:
    """Keep the images and add them; of those that are not added, none is kept that was not there."""
    beside = one.beside
    if uploads is None and beside is None:
        raise Problem(422, f"index {one.name!r} is in a bucket; images are added where serve has --uploads FOLDER")
    folder = uploads or Path(beside or "") / f"{one.name}-shots"
    with _kept_where_done(folder / _file_name(label)) as fresh:
        source = _source(f"shots of {label}", folder, [(label, data) for data in datas], fresh)
        added = changes.add(one.folder, source, Encoder(backbone), skip_known=True)
    if added.known:  # under another name
        kept = set(one.follow().cache.find(key_ids=added.key_ids)["source"].to_pylist())
        _remove([path for path in fresh if show(path) not in kept])
    return added


def add_features(one: Served, backbone: Backbone | None, sent: Sent) -> changes.Added:
    """Add features under names that can never be those of a file."""
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-") as folder:
        table = Path(folder) / "shots.parquet"
        assert sent.features is not None
        schema = schema_of(sent.features.shape[1], np.float32, [])
        names = [f"api:{name}" for name in sent.names]
        write_table(table, schema, [table_of(schema, names, sent.labels, sent.features, {})])
        return changes.add(one.folder, open_source(table), Encoder(backbone, norms="keep"))


def build(folder: Path, backbone: Backbone, labelled: Sequence[tuple[str, bytes]], uploads: Path | None) -> Path:
    """Build an index of labelled images, which are kept beside it; where that cannot be, nothing is kept."""
    shots = uploads or folder.with_name(f"{folder.name}-shots")
    with _kept_where_done(shots) as fresh:
        build_index(_source(folder.name, shots, labelled, fresh), folder, Encoder(backbone))
    return folder


@contextmanager
def _kept_where_done(folder: Path) -> Iterator[list[Path]]:
    """The files that are new; where what is done with them fails, in whatever way, they go, and ``folder`` if empty."""
    fresh: list[Path] = []
    try:
        yield fresh
    except BaseException as error:
        _remove(fresh)
        with suppress(OSError):
            folder.rmdir()
        if isinstance(error, OSError):
            raise StoreError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
        raise


def _file_name(label: str) -> str:
    """A label as the name of a folder."""
    name = quote(label, safe=" ()+,-=@")[:120]
    return name if not name.startswith(".") else f"%2E{name[1:]}"


def _source(name: str, folder: Path, labelled: Sequence[tuple[str, bytes]], fresh: list[Path]) -> Source:
    """Labelled images, class by class, as files named by what they hold; those that were not there become ``fresh``."""
    labels = tuple(dict.fromkeys(label for label, _ in labelled))
    kept: dict[tuple[str, Path], None] = {}
    for label, data in sorted(labelled, key=lambda pair: labels.index(pair[0])):
        path = folder / _file_name(label) / (hashlib.sha256(data).hexdigest()[:16] + images.extension(data))
        kept[label, path] = None  # once, however often it was sent
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            fresh.append(path)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
    return of_images([str(path) for _, path in kept], name, [label for label, _ in kept], labels)


def _remove(paths: Sequence[Path]) -> None:
    """Remove files, and their folders where nothing else is in them."""
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()
