"""Photographs and features that were sent become shots: photographs are kept, as they came, in a folder a class.

Of what is not added, nothing is kept that was not there.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data import images
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source, open_source
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
    folder = (uploads or Path(beside or "") / f"{one.name}-shots") / _file_name(label)
    fresh: list[Path] = []
    try:
        paths = [str(path) for path in _keep(folder, datas, fresh)]
        items = pa.table({"source": [show(path) for path in paths], "label": [label] * len(paths)})
        source = Source(f"shots of {label}", items, (label,), tuple(paths))
        added = changes.add(one.folder, source, Encoder(backbone), skip_known=True)
    except BaseException as error:  # also what nobody thought of: of what is not added, nothing is kept
        _remove(folder, fresh)
        if isinstance(error, OSError):
            raise StoreError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
        raise
    if added.known:  # under another name
        kept = set(one.follow().cache.find(key_ids=added.key_ids)["source"].to_pylist())
        _remove(folder, [path for path in fresh if show(path) not in kept])
    return added


def add_features(one: Served, backbone: Backbone | None, sent: Sent) -> changes.Added:
    """Add features under names that can never be those of a file."""
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-") as folder:
        table = Path(folder) / "shots.parquet"
        assert sent.features is not None
        d = sent.features.shape[1]
        flat = pa.array(sent.features.reshape(-1), pa.float32())
        columns = {
            "id": [f"api:{name}" for name in sent.names],
            "label": sent.labels,
            "feature": pa.FixedSizeListArray.from_arrays(flat, d),
        }
        pq.write_table(pa.table(columns), table)
        return changes.add(one.folder, open_source(table), Encoder(backbone, norms="keep"))


def build(folder: Path, backbone: Backbone, labelled: Sequence[tuple[str, bytes]], uploads: Path | None) -> Path:
    """Build an index of labelled images, which are kept beside it; where that cannot be, nothing is kept."""
    shots = uploads or folder.with_name(f"{folder.name}-shots")
    labels = tuple(dict.fromkeys(label for label, _ in labelled))
    fresh: dict[str, list[Path]] = {label: [] for label in labels}
    try:
        paths, names = [], []
        for label in labels:
            own = [data for other, data in labelled if other == label]
            kept = _keep(shots / _file_name(label), own, fresh[label])
            paths += [str(path) for path in kept]
            names += [label] * len(kept)
        items = pa.table({"source": [show(path) for path in paths], "label": names})
        build_index(Source(folder.name, items, labels, tuple(paths)), folder, Encoder(backbone))
    except BaseException as error:
        for label, files in fresh.items():
            _remove(shots / _file_name(label), files)
        with suppress(OSError):
            shots.rmdir()
        if isinstance(error, OSError):
            raise StoreError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
        raise
    return folder


def _file_name(label: str) -> str:
    """A label as the name of a folder."""
    name = quote(label, safe=" ()+,-=@")[:120]
    return name if not name.startswith(".") else f"%2E{name[1:]}"


def _keep(folder: Path, datas: Sequence[bytes], fresh: list[Path]) -> list[Path]:
    """Files of images in a folder, each once, named by what they hold; those that were not there become ``fresh``."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {folder / (hashlib.sha256(data).hexdigest()[:16] + images.extension(data)): data for data in datas}
    for path, data in named.items():
        if not path.exists():
            fresh.append(path)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
    return list(named)


def _remove(folder: Path, paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()  # where nothing else is in it
