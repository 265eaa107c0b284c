"""Functions that add uploaded images and features as shots.

Image files are stored unchanged in one folder per class. Files that do not become shots are removed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from retrieval_tip.backbones.base import Backbone, Part
from retrieval_tip.data.reader import FloatArray, Reader
from retrieval_tip.data.sources import Source, of_images, open_source
from retrieval_tip.data.tables import FEATURE, schema_of, table_of, write_table
from retrieval_tip.errors import InputError, StoreError, show
from retrieval_tip.files import replacing
from retrieval_tip.index import changes, photos
from retrieval_tip.index.build import build_index
from retrieval_tip.index.places import Changed
from retrieval_tip.server.annotations import COLUMN
from retrieval_tip.server.served import Served


def add_images(
    one: Served, backbone: Backbone, labelled: Sequence[tuple[str, bytes]], uploads: Path | None,
    annotation: str | None = None,
) -> Changed:  # fmt: skip
    """Save images of one class, and add them as shots. A single image may belong to an ``annotation``."""
    folder = uploads or photos.folder_of(one.place)
    if folder is None:
        raise InputError(f"index {one.name!r} is in a bucket; to add images, start the server with --uploads FOLDER")
    label = labelled[0][0]
    with _removed_on_error(folder, photos.class_folder(folder, label)) as fresh:
        source = _source(f"shots of {label}", folder, labelled, fresh)
        if annotation is not None:
            source = replace(source, items=source.items.append_column(COLUMN, [[annotation]]))
        added = changes.add(one.folder, source, Reader(backbone))
    if added.known:  # the index already has these images under other names
        kept = set(one.follow().index.find(key_ids=added.key_ids)["source"].to_pylist())
        _remove([path for path in fresh if show(path) not in kept])
    return added


def add_features(one: Served, names: Sequence[str], labels: Sequence[str], features: FloatArray) -> Changed:
    """Add features as shots. Their sources start with ``api:``, so that they are not mistaken for file names."""
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-") as folder:
        table = Path(folder) / "shots.parquet"
        schema = schema_of(one.now.index.parts or [Part(features.shape[1], FEATURE)], np.float32)
        sources = [f"api:{name}" for name in names]
        write_table(table, schema, [table_of(schema, sources, labels, features)])
        return changes.add(one.folder, open_source(table), Reader(one.now.backbone, norms="keep"))


def build(folder: Path, backbone: Backbone, labelled: Sequence[tuple[str, bytes]], uploads: Path | None) -> Path:
    """Save labelled images, and build an index from them."""
    shots = uploads or folder.with_name(folder.name + photos.SUFFIX)
    with _removed_on_error(shots, shots) as fresh:
        build_index(_source(folder.name, shots, labelled, fresh), folder, Reader(backbone))
    return folder


@contextmanager
def _removed_on_error(folder: Path, own: Path) -> Iterator[list[Path]]:
    """Yield a list for new files in ``folder``. On error, remove them and the folders created for them."""
    fresh: list[Path] = []
    folders = [own] if folder.exists() else [own, folder]
    try:
        with photos.adding(folder):
            yield fresh
    except BaseException as error:
        _remove(fresh)
        for place in folders:
            with suppress(OSError):
                place.rmdir()
        if isinstance(error, OSError):
            raise StoreError(f"{error.filename or folder}: cannot write: {error.strerror or error}") from error
        raise


def _source(name: str, folder: Path, labelled: Sequence[tuple[str, bytes]], fresh: list[Path]) -> Source:
    """Save labelled images by class under their hashes, and append new files to ``fresh``."""
    labels = tuple(dict.fromkeys(label for label, _ in labelled))
    kept: dict[tuple[str, Path], None] = {}
    for label, data in sorted(labelled, key=lambda pair: labels.index(pair[0])):
        path = photos.file_of(folder, label, data)
        kept[label, path] = None  # keeps one entry even if the image was sent twice
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            fresh.append(path)
            with replacing(path) as temporary:
                temporary.write_bytes(data)
    return of_images([str(path) for _, path in kept], name, [label for label, _ in kept], labels)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()
