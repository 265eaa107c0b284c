"""Functions that add uploaded images and features as shots.

Image files are stored unchanged in one folder per class. Files that do not become shots are removed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data import images
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source, of_features, of_images
from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import replacing
from retrieval_tip.index import added_photos, changes, places
from retrieval_tip.index.build import build_index
from retrieval_tip.index.places import Changed, Place
from retrieval_tip.labelling.labels import Remembered
from retrieval_tip.labelling.placing import distinct, safe_name
from retrieval_tip.model import Index
from retrieval_tip.server.annotations import COLUMN
from retrieval_tip.server.uploads import Upload
from retrieval_tip.wording import show


def add(
    place: Place,
    backbone: Backbone | None,
    sent: Upload,
    uploads: Path | None,
    annotation: str | None,
    *,
    base: Index,
) -> Changed:
    """Add encoded images of one class, or features, as shots. A single image may belong to an ``annotation``.

    The sources of features start with ``api:``, so that they are not mistaken for file names.
    """
    assert sent.features is not None
    if not sent.images:
        source = of_features(
            [f"api:{name}" for name in sent.names], sent.labels, sent.features, base.parts
        )
        return changes.add(place, source, Reader(backbone, norms="keep"), base=base)
    store = places.at(place)
    folder = uploads or added_photos.folder_of(store)
    if folder is None:
        raise InputError(
            f"index {store.name!r} is in a bucket; to add images, start the server with --uploads FOLDER"
        )
    with _saved(f"shots of {sent.labels[0]}", folder, sent, backbone) as (source, reader, fresh):
        if annotation is not None:
            source = replace(source, items=source.items.append_column(COLUMN, [[annotation]]))
        added = changes.add(place, source, reader, base=base)
    if added.known:  # the index already has these images under other names
        kept = set(added.index.find(key_ids=added.key_ids)["source"].to_pylist())
        _remove([path for path in fresh if show(path) not in kept])
    return added


def build(folder: Path, backbone: Backbone, sent: Upload, uploads: Path | None) -> Index:
    """Save encoded images with their labels, and build an index from them."""
    shots = uploads or folder.with_name(folder.name + added_photos.SUFFIX)
    with _saved(folder.name, shots, sent, backbone) as (source, reader, _):
        return build_index(source, folder, reader)


@contextmanager
def _saved(
    name: str, folder: Path, sent: Upload, backbone: Backbone | None
) -> Iterator[tuple[Source, Reader, list[Path]]]:
    """Save images by class under their hashes. Yield them, a reader of their features, and the new files.

    On error, remove the new files and the folders created for them.
    """
    labels = tuple(dict.fromkeys(sent.labels))
    features = sent.features
    fresh = list[Path]()
    above = [] if folder.exists() else [folder]
    folders = dict[str, Path]()
    assert features is not None
    kept: dict[tuple[str, Path], int] = {}
    try:
        with added_photos.adding(folder):
            there = [place.name for place in folder.iterdir()]
            for label in labels:
                there.append(distinct(safe_name(label), there))
                folders[label] = folder / there[-1]
            for place, label in sorted(
                enumerate(sent.labels), key=lambda pair: labels.index(pair[1])
            ):
                path = folders[label] / _file_name(sent.images[place])
                kept[label, path] = place  # keeps one entry even if the image was sent twice
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    fresh.append(path)
                    with replacing(path) as temporary:
                        temporary.write_bytes(sent.images[place])
            rows = [*kept.values()]
            digests: list[str | None] = [
                hashlib.sha256(sent.images[row]).hexdigest() for row in rows
            ]
            block = FeatureBlock.of(features[rows], digests)
            source = of_images(
                [str(path) for _, path in kept], name, [label for label, _ in kept], labels
            )
            yield source, Remembered(backbone, known=(block,)), fresh
    except BaseException as error:
        _remove(fresh)
        for own in (*folders.values(), *above):
            with suppress(OSError):
                own.rmdir()
        if isinstance(error, OSError):
            raise StoreError(
                f"{error.filename or folder}: cannot write: {error.strerror or error}"
            ) from error
        raise


def _file_name(data: bytes) -> str:
    """Return the name under which to store a photo. Raises InputError if the data is not an image."""
    return hashlib.sha256(data).hexdigest()[: added_photos.HEX] + images.extension(data)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()
