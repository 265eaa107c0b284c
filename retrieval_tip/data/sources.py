"""Open folders, tables and split files of labelled images or features, on disk or on an object store."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip import hooks
from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Part
from retrieval_tip.data import exchange, images, remote, tables, writing
from retrieval_tip.data.feature_table import FeatureTable
from retrieval_tip.data.source import Source as Source
from retrieval_tip.data.source import file_of, items_in, opener, split_item
from retrieval_tip.data.source import of_images as of_images
from retrieval_tip.data.source import read_item as read_item
from retrieval_tip.data.source import spelled_alike as spelled_alike
from retrieval_tip.data.tables import (
    FEATURE,
    SUFFIXES,
    InMemory,
    is_frame,
    items_of,
    renamed,
    texts,
)
from retrieval_tip.errors import InputError
from retrieval_tip.files import suffix_of
from retrieval_tip.machine import install
from retrieval_tip.wording import counted, few, show

log = logging.getLogger(__name__)

Kind = Literal["image", "photos", "table", "bucket", "folder", "split file", "pattern", "scheme"]
"""Kinds of paths. ``photos`` is a file of photos, and ``image`` any other path, even a missing one."""
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Folder names for each part of a dataset."""
PART_OF = {name: part for part, names in PARTS.items() for name in names}

TABLES = ("metadata.csv", "metadata.parquet")  # label tables in Hugging Face image folders


def is_web(where: str) -> bool:
    """Return whether a path is the address of a web page. On Windows, its slashes can be backslashes."""
    return where.replace(os.sep, "/").startswith(("http:/", "https:/"))


def is_there(path: str) -> bool:
    """Return whether an image exists. Those without a path on this machine are assumed to exist."""
    return remote.is_address(path) or os.path.isfile(file_of(path))


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Return the kind of a path, pattern or URL. Raises InputError for web addresses and unreachable object stores."""
    where = os.fspath(path)
    if remote.scheme_of(where) is not None:
        return "image" if "#" in where else "scheme"
    if remote.is_remote(where) and suffix_of(where) in images.extensions():
        return "image"
    if tables.is_table(where):
        return "table"
    if remote.is_remote(where):
        return "bucket"
    if os.path.isdir(where):
        return "folder"
    if where.lower().endswith(".json") and os.path.isfile(where):
        return "split file"
    if is_web(where):
        raise refusal(where)
    if glob.has_magic(where) and not os.path.exists(file_of(where)):
        return "pattern"
    return "photos" if split_item(where) == (where, "") else "image"


def open_source(
    path: Any,
    *,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    labelled: bool = True,
) -> Source:
    """Open a source of any kind. If ``labelled`` is true, every item must have a label.

    ``path`` is a path, a URL or a table in memory:

    - A folder of class folders, which are searched recursively. The classes are sorted by name. If the folder has parts
      (``train``, ``val``, ``test``), ``split`` selects one of them. If it contains ``metadata.csv`` or
      ``metadata.parquet``, this file is read as a table.
    - A file of labels (``.json``) in COCO's format or Label Studio's export format (see :func:`exchange.read`).
    - A CoOp split file (``.json``). ``split`` selects the part, which defaults to ``train``. ``root`` is the image
      folder. It defaults to the folder of the split file, or to the folder inside it that contains the images.
    - A table (``.csv``, ``.tsv`` or ``.parquet``) with the columns ``path`` and ``label``. See
      :data:`NAMES` for other column names. Paths are relative to ``root``, which defaults to the folder of the table.
    - A table of pandas, polars or Arrow with the columns of such a file. Paths are relative to the current folder.
    - A feature table, which is a ``.parquet`` file with the columns ``id``, ``label`` and ``feature``, or a folder of
      parts written by ``encode --ray``.
    - A folder of class folders or a Parquet table on an object store (``s3://``, ``gs://``, ``az://``).
    - A file of photos, if ``labelled`` is false and its suffix has an opener (see :class:`source.FileOpener`).
    - ``SCHEME:REST``, if the scheme is installed (see :class:`source.Opener`).
    - Any folder of images, if ``labelled`` is false.

    Raises InputError if the source cannot be read.
    """
    if is_frame(path):
        return _open_table(InMemory.of(path), root, labelled=labelled)
    where = os.fspath(path)
    match kind_of(where):
        case "table":
            return _open_table(
                where if remote.is_remote(where) else Path(where), root, labelled=labelled
            )
        case "scheme":
            scheme, _, rest = where.partition(":")
            with remote.reaching(show(where)):
                opened = opener("sources", scheme).open(rest, split=split, labelled=labelled)
                return cast("Source", opened)
        case "bucket":
            return _open_bucket(where, labelled=labelled)
        case "folder":
            return _open_folder(Path(where), split, labelled=labelled)
        case "photos" if not labelled:
            return of_images(items_in(where), show(where))
        case "split file":
            return exchange.read(Path(where), split or "train", root, labelled=labelled)
    raise refusal(where)


open_items = partial(open_source, labelled=False)
"""Open a source whose items need no labels."""


def of_features(
    sources: Sequence[str], labels: Sequence[str], features: FloatArray, parts: Sequence[Part] = ()
) -> Source:
    """Create a source from labelled features in memory, ``[m, d]`` in float32, as if they were in a feature table.

    If several encoders made them, ``parts`` says how each feature is divided. Raises InputError if there are no
    features, or if a source or a label is empty or too long.
    """
    schema = writing.schema_of(parts or [Part(features.shape[1], FEATURE)], features.dtype)
    return _open_table(
        InMemory.of(writing.table_of(schema, sources, labels, features), "features"), labelled=True
    )


def open_inputs(arguments: Iterable[str], stdin: Iterable[str] = ()) -> Iterator[Source]:
    """Open the inputs to classify, which can be images, folders, glob patterns, tables or object store URLs.

    Folders are searched recursively. ``-`` stands for the paths in ``stdin``. Consecutive images are combined into one
    source. A path that does not exist is treated as an image.
    """
    paths: list[str] = []
    waiting = list(arguments)[::-1]
    while waiting:
        argument = waiting.pop()
        if argument == "-":
            paths += [line for line in (line.rstrip("\r\n\0") for line in stdin) if line]
            continue
        kind = kind_of(argument)
        if kind in ("table", "bucket", "scheme"):
            if paths:
                yield of_images(paths)
                paths = []
            yield open_items(argument)
        elif kind == "folder":
            paths += _images_in(Path(argument))
        elif kind == "pattern":
            files = [
                match
                for match in sorted(glob.glob(argument, recursive=True))
                if not os.path.isdir(match)
            ]
            if not files:
                raise InputError(f"{show(argument)}: no file matches")
            waiting += files[::-1]
        else:
            paths += items_in(argument)
    if paths:
        yield of_images(paths)


def check_exists(path: str | os.PathLike[str] | None) -> None:
    """Raise InputError if a local path is given and does not exist."""
    if path is not None and "://" not in os.fspath(path) and not os.path.exists(path):
        raise refusal(os.fspath(path))


def check_images(sources: Iterable[Source]) -> None:
    """Raise InputError if no image file of a source exists, before an encoder is loaded or downloaded for it."""
    for source in sources:
        if source.paths and source.load is read_item and not any(map(is_there, source.paths)):
            raise refusal(source.paths[0])


def refusal(where: str) -> InputError:
    """Return the error for a path or an address that cannot be opened."""
    suffix = suffix_of(where)
    if is_web(where):
        why = "a web address; download it first"
    elif not os.path.exists(where):
        why = "no such file or folder" + remote.no_scheme(where)
    elif not os.path.isfile(where):
        why = "not a file"  # a pipe would block
    elif suffix in images.extensions():
        why = "a single image; expected a folder with one folder of images per class"
    elif suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        why = "an archive; unpack it first"
    else:
        why = f"unknown file type; expected class folders, a table ({', '.join(SUFFIXES)}) or a split file (.json)"
    return InputError(f"{show(where)}: {why}")


def _open_folder(folder: Path, split: str | None, *, labelled: bool) -> Source:
    if not labelled and not any(
        next(images.find(Path(i.path)), None) for i in images.subfolders(folder)
    ):
        return of_images(_images_in(folder), show(folder))
    folder = _part_of(folder, split)
    if (table := _table_in(folder)) is not None:
        return _open_table(table, labelled=True)
    return _read_folder(folder)


def _table_in(folder: Path) -> Path | None:
    """Return the first of ``TABLES`` that exists in a folder, or ``None``."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def _part_of(folder: Path, part: str | None) -> Path:
    """Return the folder of a part (see :func:`choose_part`), or ``folder`` itself if it has no parts.

    A folder has parts if each folder in it is named like a part, and one of them contains folders or a label table.
    """
    there = {entry.name: Path(entry.path) for entry in images.subfolders(folder)}
    if not all(name.lower() in PART_OF for name in there) or not any(
        images.subfolders(path) or _table_in(path) for path in there.values()
    ):
        return folder
    return there[choose_part(show(folder), list(there), part or "train")]


def choose_part(where: str, names: Sequence[str], part: str | None) -> str:
    """Return the name of a part, which defaults to the only one, or else to ``train``. Warn about the other parts.

    Raises InputError if the part is missing.
    """
    there = {PART_OF.get(name.lower(), name): name for name in names}
    wanted = part or ("train" if len(names) > 1 else names[0])
    used = there.get(PART_OF.get(wanted.lower(), wanted))
    if used is None:
        listed = ", ".join(map(show, names))
        raise InputError(f"{where}: there is no part {wanted!r}; choose one with --split: {listed}")
    if others := [show(name) for name in names if name != used]:
        log.warning("%s: using its part %s, ignoring %s", where, show(used), ", ".join(others))
    return used


def _read_folder(folder: Path) -> Source:
    """Open the photos in class folders, and warn about other files. Raises InputError if there are no photos."""
    others: Counter[str] = Counter()
    photos: dict[str, list[str]] = {}
    for entry in images.subfolders(folder):
        if (name := show(entry.name)) in photos:
            raise InputError(
                f"{show(folder)}: two class folders are called {name}; rename the one that is not UTF-8"
            )
        photos[name] = _photos_in(Path(entry.path), others)
    empty = [name for name, paths in photos.items() if not paths]
    stray = [entry.name for entry in images.entries(folder) if os.path.isfile(entry.path)]
    if len(empty) == len(photos):
        raise _none_found(folder, stray, others)
    if empty:
        log.warning("%s: ignored folders without images: %s", show(folder), few(empty))
    if stray:
        log.warning(
            "%s: ignored %s outside the class folders", show(folder), counted(len(stray), "file")
        )
    if others:
        log.warning("%s: ignored files that are not images: %s", show(folder), kinds(others))
    labels = [name for name, paths in photos.items() for _ in paths]
    return of_images(
        list(chain.from_iterable(photos.values())),
        show(folder),
        labels,
        tuple(dict.fromkeys(labels)),
    )


def kinds(others: Counter[str]) -> str:
    """Describe the numbers of files by suffix, starting with the most frequent suffix."""
    text = few(
        [f"{number:,} {suffix or 'without a suffix'}" for suffix, number in others.most_common()]
    )
    return text + how_to_read(others)


def how_to_read(others: Iterable[str]) -> str:
    """Return which extras to install to read files with these suffixes, as the end of a message."""
    text = ""
    for extra, (module, suffixes) in hooks.EXTRAS.items():
        if find_spec(module) is not None:
            continue
        if seen := ", ".join(suffix for suffix in suffixes if suffix in others):
            text += f"; to read {seen}, run {install(extra)}"
    return text


def _none_found(folder: Path, stray: list[str], others: Counter[str]) -> InputError:
    direct = sum(suffix_of(name) in images.extensions() for name in stray)
    if direct:
        return InputError(
            f"{show(folder)}: there are no class folders, but {counted(direct, 'image')} directly in it; give the "
            f"folder that contains one folder of images per class (perhaps {show(folder.absolute().parent)})"
        )
    others = others + Counter(suffix_of(name) for name in stray)
    here = f" (found {kinds(others)})" if others else ""
    return InputError(f"{show(folder)}: no images; expected one folder of images per class{here}")


def _photos_in(folder: Path, others: Counter[str]) -> list[str]:
    return [item for file in images.find(folder, others) for item in items_in(str(file))]


def _images_in(folder: Path) -> list[str]:
    others: Counter[str] = Counter()
    paths = _photos_in(folder, others)
    unread = how_to_read(others)
    if not paths:
        raise InputError(f"{show(folder)}: no images in this folder{unread}")
    if unread:
        log.warning("%s: ignored files that are not images%s", show(folder), unread)
    return paths


def _open_bucket(where: str, *, labelled: bool) -> Source:
    """Open the images below a folder on an object store, labelled by their class folders."""
    scheme, _, name = where.partition("://")
    base = f"{scheme}://{name.strip('/')}/"
    known = images.extensions()
    paths = [url for url in remote.find(where) if suffix_of(url) in known and url.startswith(base)]
    if not paths:
        raise InputError(f"{show(where)}: no images or Parquet file found")
    labels = [
        path.removeprefix(base).rpartition("/")[0].partition("/")[0] or None for path in paths
    ]
    if labelled and None in labels:
        raise InputError(
            f"{show(paths[labels.index(None)])}: not in a class folder of {show(where)}"
        )
    return of_images(paths, show(where), labels)


def _open_table(
    file: tables.Place, root: str | os.PathLike[str] | None = None, *, labelled: bool
) -> Source:
    name = show(file)
    items, files = items_of(file)
    if not len(items):
        raise InputError(f"{name}: has no rows")
    key = "path" if files is None else "id"
    items = renamed(items, key, "label")
    hint = (
        "; an image table has path (image, image_path, file_name) and label; a feature table has id, label and "
        "feature (embedding, vector)"
    )
    front = {"source": texts(items, name, key, hint=hint)}
    if labelled or "label" in items.column_names:
        front["label"] = texts(items, name, "label", needed=labelled, hint=hint)
    items = pa.table(front | {c: items[c] for c in items.column_names if c not in (key, *front)})
    names = (
        tuple(sorted(pc.unique(items["label"]).drop_null().to_pylist())) if "label" in front else ()
    )
    if files is not None:
        return Source(name, items, names, table=FeatureTable(files), rows=np.arange(len(items)))
    folder = root or (file.parent if isinstance(file, Path) else os.fspath(file).rpartition("/")[0])
    paths = [
        path if remote.is_address(path) else os.path.join(folder, path).replace(os.sep, "/")
        for path in items["source"].to_pylist()
    ]
    items = items.set_column(0, "source", pa.array([show(path) for path in paths], pa.string()))
    return Source(name, items, names, tuple(paths))
