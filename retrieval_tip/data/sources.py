"""Where labelled images and features come from: folders, tables and split files; and the inputs of a classification."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.data import folders, images, remote, tars
from retrieval_tip.data.tables import (
    FEATURE,
    NAMES,
    SUFFIXES,
    check_texts,
    few_names,
    is_parquet,
    is_parts,
    items_of,
    renamed,
    row_list,
    texts,
)
from retrieval_tip.errors import InputError, Skipped, counted, few, show
from retrieval_tip.files import read_regular

log = logging.getLogger(__name__)

MAX_SPLIT = 1 << 27
"""Largest split file, in bytes: one of ImageNet takes as much."""


@dataclass(frozen=True)
class Source:
    """Items to encode or classify, in order.

    ``items`` has the columns ``source`` (the item's path or id, printable) and, where known, ``label``, then any
    further columns of a table. An item is either an image (``paths[i]``) or row ``rows[i]`` of the feature table
    ``table``, a file or a folder of parts. ``class_names`` are the labels in order; empty where items carry none.
    ``dataset`` is the name of a dataset that was opened by its name. ``failed`` is what could not be read already while
    it was opened, of tars.
    """

    name: str
    items: pa.Table
    class_names: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
    table: Path | str | None = None
    rows: npt.NDArray[np.int64] | None = None
    dataset: str | None = None
    failed: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return int(self.items.num_rows)

    @property
    def labels(self) -> list[str]:
        """Label of each item. Raises InputError naming items that have none."""
        if "label" not in self.items.column_names:
            raise InputError(f"{self.name}: has no labels; a column 'label' is needed here")
        column = self.items["label"]
        if column.null_count:
            rows = np.flatnonzero(column.is_null().to_numpy())
            raise InputError(f"{self.name}: {row_list(rows)} without a label; every item needs one here")
        labels: list[str] = column.to_pylist()
        return labels

    @property
    def sources(self) -> list[str]:
        """Path or id of each item."""
        names: list[str] = self.items["source"].to_pylist()
        return names

    def known_as(self, class_names: Sequence[str]) -> Source:
        """The source with the labels of an index, where one of its own differs by case, ``_``, ``-`` or spaces alone.

        What was taken for what is said. Labels that are like two classes, or like none, stay.
        """
        plain: dict[str, list[str]] = {}
        for name in class_names:
            plain.setdefault(_plain(name), []).append(name)
        known = set(class_names)
        alike = {name: plain.get(_plain(name), []) for name in self.class_names if name not in known}
        taken = {name: names[0] for name, names in alike.items() if len(names) == 1}
        if not taken:
            return self
        log.warning("%s: labels taken as classes: %s", self.name, few([f"{a} as {b}" for a, b in taken.items()]))
        labels = pa.array([taken.get(label, label) for label in self.items["label"].to_pylist()], pa.string())
        items = self.items.set_column(self.items.column_names.index("label"), "label", labels)
        return replace(self, items=items, class_names=tuple(dict.fromkeys(taken.get(n, n) for n in self.class_names)))

    def take(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Source:
        """The items at ``positions``, in that order; the class names stay."""
        index = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            items=self.items.take(pa.array(index)),
            paths=None if self.paths is None else tuple(self.paths[i] for i in index),
            rows=None if self.rows is None else self.rows[index],
        )


def _plain(label: str) -> str:
    return re.sub(r"(?!^-\d)[\s_-]+", " ", label).strip().casefold()  # -1 is not 1


def spelled_alike(names: Iterable[str]) -> dict[str, str]:
    """Map each name to the first one before it that differs only in case, ``_``, ``-`` or spaces, if there is one."""
    first: dict[str, str] = {}
    return {name: known for name in names if (known := first.setdefault(_plain(name), name)) != name}


def read_item(path: str) -> bytes:
    """The bytes of an image: a file here, an object on a store, or a member of a tar, as its path says.

    Raises InputError, which says why and not which, where it cannot be read or is too large.
    """
    if (tar := tars.tar_of(path)) is not None:
        return tars.opened(tar).read(path)
    if not remote.is_remote(path):
        return images.read(path)
    system = remote.system_of(path)

    def fetch() -> bytes:
        images.admit(system.size(path))
        return bytes(system.cat_file(path))

    try:
        data: bytes = remote.attempt(path, fetch)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ")) from None
    if not data:
        raise InputError("empty file")
    return data


def is_there(path: str) -> bool:
    """Whether an image is there, as far as it can be told without asking an object store."""
    if (tar := tars.tar_of(path)) is not None:
        with suppress(InputError):
            return path in tars.opened(tar).places
        return False
    return remote.is_remote(path) or os.path.isfile(path)


def open_source(
    path: str | os.PathLike[str], *, split: str | None = None, root: str | os.PathLike[str] | None = None
) -> Source:
    """A labelled source, told apart by what it is.

    - a folder of class folders: classes are the folders in name order, images are searched below each; where these
      lie in parts (``train``, ``val``, ``test``), ``split`` names the part; a ``metadata.csv`` (``.jsonl``,
      ``.parquet``) in the folder is a table
    - ``.json``: a CoOp split file; ``split`` names the part (default ``train``), ``root`` the image folder (default:
      the split file's folder or the folder in it that holds the images)
    - ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` with the columns ``path`` and ``label``, or what others call them
      (:data:`NAMES`); paths are relative to ``root`` (default: the table's folder)
    - ``.parquet`` with a column ``feature``: a feature table (``id``, ``label``, ``feature``), or a folder of such
      parts, as ``encode --engine ray`` writes it
    - webdataset tars (:mod:`tars`): one, a folder of them, or a pattern
    - the address of a folder of class folders, a Parquet table or tars on an object store: ``s3://``, ``gs://``, ``az://``

    Raises InputError naming the file, what is wrong with it, and the row where there is one.
    """
    if (streamed := _streamed(os.fspath(path), root, labelled=True)) is not None:
        return streamed
    file = Path(path)
    suffix = file.suffix.lower()
    if os.path.isdir(file):
        return _table(file, root, labelled=True) if is_parts(file) else _folder(file, split)
    if _is_url(path):
        raise InputError(f"{show(path)}: web addresses are not read; download it first")
    if not os.path.exists(file):
        raise InputError(f"{show(file)}: no such file or folder")
    if not file.is_file():
        raise InputError(f"{show(file)}: not a file")  # a pipe would wait for ever
    if suffix == ".json":
        return _split_file(file, split or "train", root)
    if suffix in SUFFIXES:
        return _table(file, root, labelled=True)
    if suffix in images.extensions():
        raise InputError(f"{show(file)}: one image; expected a folder with a folder of images a class in it")
    if suffix in _ARCHIVES:
        raise InputError(f"{show(file)}: an archive; unpack it first")
    raise InputError(
        f"{show(file)}: not a source; expected a folder of classes, a table ({', '.join(SUFFIXES)}), a split .json"
    )


def open_items(
    path: str | os.PathLike[str], *, split: str | None = None, root: str | os.PathLike[str] | None = None
) -> Source:
    """A source whose labels may be missing: as :func:`open_source`, or a folder of images without class folders."""
    if (streamed := _streamed(os.fspath(path), root, labelled=False)) is not None:
        return streamed
    file = Path(path)
    if _is_table(file):
        return _table(file, root, labelled=False)
    inside = folders.subfolders(file) if os.path.isdir(file) else None
    if inside is not None and not any(next(images.find(Path(folder.path)), None) for folder in inside):
        paths = [str(image) for image in images.find(file)]
        if not paths:
            raise InputError(f"{show(file)}: no images in this folder")
        return of_images(paths, show(file))
    return open_source(path, split=split, root=root)


def open_inputs(arguments: Iterable[str], stdin: Iterable[str] = ()) -> Iterator[Source]:
    """Things to classify: images, folders (searched for images), globs, tables, tars, addresses on an object store.

    And ``-`` for paths from ``stdin``. Neighbouring images come as one source. A path that does not exist is an image
    that cannot be read: whoever reads it reports it.
    """
    paths: list[str] = []
    waiting = list(arguments)[::-1]
    while waiting:
        argument = waiting.pop()
        file = Path(argument)
        if argument == "-":
            paths += [line for line in (line.rstrip("\r\n\0") for line in stdin) if line]
        elif is_image(argument):
            paths.append(argument)
        elif _is_url(argument):
            raise InputError(f"{show(argument)}: web addresses are not read; download it first")
        elif (streamed := _streamed(argument, None, labelled=False)) is not None or _is_table(file):
            if paths:
                yield of_images(paths)
                paths = []
            yield _table(file, None, labelled=False) if streamed is None else streamed
        elif os.path.isdir(file):
            inside = [str(image) for image in images.find(file)]
            if not inside:
                raise InputError(f"{show(file)}: no images in this folder")
            paths += inside
        else:
            matches = sorted(glob.glob(argument, recursive=True))
            files = [match for match in matches if not os.path.isdir(match)]
            if not files:
                raise InputError(f"{show(argument)}: no file matches")
            waiting += files[::-1]
    if paths:
        yield of_images(paths)


def is_image(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path names one image, even a missing one, rather than a folder, table, tar, pattern or URL."""
    where = os.fspath(path)
    if remote.is_remote(where):
        return Path(where).suffix.lower() in images.extensions()
    if os.path.exists(where):
        return not (os.path.isdir(where) or _is_table(Path(where)) or tars.find(where))
    return not (_is_url(where) or glob.has_magic(where) or tars.find(where))


_ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".7z", ".rar"})


def _is_url(path: str | os.PathLike[str]) -> bool:
    return str(path).startswith(("http://", "https://"))


def _streamed(where: str, root: str | os.PathLike[str] | None, *, labelled: bool) -> Source | None:
    """The source that tars, or an address on an object store, stand for; ``None`` for anything else."""
    is_table = is_parquet(where)
    if places := [] if is_table else tars.find(where):
        source = of_tars(show(where), places, labelled=labelled)
        if not len(source):
            why = f" ({source.failed[0]})" if source.failed else ""
            raise InputError(f"{source.name}: no images in {counted(len(places), 'tar')}{why}")
        return source
    if not remote.is_remote(where):
        return None
    return _table(where, root, labelled=labelled) if is_table else _remote_images(where, labelled)


def of_tars(name: str, places: Sequence[str], *, labelled: bool) -> Source:
    """The images of webdataset tars, in order; what cannot be read, or lacks a label that is needed, is ``failed``."""
    paths: list[str] = []
    labels: list[str | None] = []
    failed: list[Skipped] = []
    for place in places:
        try:
            tar = tars.opened(place)
        except InputError as error:
            failed.append(Skipped(show(place), str(error)))
            continue
        failed += tar.failed
        for path, label in tar.labels.items():
            if labelled and label is None:
                kinds = ", ".join(f".{kind}" for kind in tars.LABELS)
                failed.append(Skipped(show(path), f"no label: none of {kinds} beside it"))
            else:
                paths.append(path)
                labels.append(label)
    return replace(_labelled_images(name, paths, labels), failed=tuple(failed))


def _labelled_images(name: str, paths: Sequence[str], labels: Sequence[str | None]) -> Source:
    known = sorted({label for label in labels if label is not None})
    return of_images(paths, name, labels if known else None, known)


def _remote_images(folder: str, labelled: bool) -> Source:
    """The images below a folder of an object store; where they lie in folders of it, these are their labels."""
    system, scheme = remote.system_of(folder), folder.partition("://")[0]
    base = f"{scheme}://{folder.partition('://')[2].strip('/')}/"
    urls = [f"{scheme}://{name}" for name in sorted(remote.attempt(folder, lambda: system.find(folder)))]
    paths = [path for path in urls if Path(path).suffix.lower() in images.extensions() and path.startswith(base)]
    if not paths:
        raise InputError(f"{show(folder)}: no images, tars or Parquet file there")
    labels = [path.removeprefix(base).rpartition("/")[0].partition("/")[0] or None for path in paths]
    if labelled and None in labels:
        raise InputError(f"{show(paths[labels.index(None)])}: lies in no class folder of {show(folder)}")
    return _labelled_images(show(folder), paths, labels)


def _is_table(file: Path) -> bool:
    return is_parts(file) or (file.suffix.lower() in SUFFIXES and os.path.isfile(file))


def of_images(
    paths: Sequence[str],
    name: str = "images",
    labels: Sequence[str | None] | None = None,
    class_names: Sequence[str] = (),
) -> Source:
    """Images, with their labels where these are known."""
    items = {"source": pa.array([show(path) for path in paths], pa.string())}
    if labels is not None:
        items["label"] = pa.array(labels, pa.string())
    return Source(name, pa.table(items), tuple(class_names), tuple(paths))


def _folder(folder: Path, part: str | None) -> Source:
    """A folder of class folders, or of images whose labels stand in a table beside them, or of parts of either."""
    folder = folders.part_of(folder, part)
    if (table := folders.table_in(folder)) is not None:
        return _table(table, None, labelled=True)
    found = folders.read(folder)
    return of_images(found.paths, show(folder), found.labels, found.classes)


def _split_file(file: Path, split: str, root: str | os.PathLike[str] | None) -> Source:
    name = f"{show(file)} ({split})"
    try:
        data = json.loads(read_regular(file, MAX_SPLIT))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{show(file)}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{show(file)}: not JSON ({error})") from None
    if not isinstance(data, dict) or split not in data:
        has = few(list(map(repr, data))) if isinstance(data, dict) else "no parts at all"
        raise InputError(f"{show(file)}: no part {split!r}; a split file has train, val and test, this one {has}")
    entries: list[tuple[str, int, str]] = []
    for row, entry in enumerate(data[split] if isinstance(data[split], list) else [None]):
        match entry:
            case [str() as path, int() as label, str() as class_name] if type(label) is int and class_name.strip():
                entries.append((path, label, class_name))
            case _:
                raise InputError(f"{name}: entry {row} is not [path, label, class name]")
    if not entries:
        raise InputError(f"{name}: empty")
    names: dict[int, str] = {}
    for row, (_, label, class_name) in enumerate(entries):
        if names.setdefault(label, class_name) != class_name:
            raise InputError(f"{name}: entry {row} calls label {label} {class_name!r}, before it was {names[label]!r}")
    ordered = [show(names[label]) for label in sorted(names)]
    twice = [class_name for class_name, times in Counter(ordered).items() if times > 1]
    if twice:
        raise InputError(f"{name}: class name {twice[0]!r} stands for several labels")
    folder = Path(root) if root else _image_root(file, [path for path, _, _ in entries])
    paths = [os.path.join(folder, path) for path, _, _ in entries]
    source = of_images(paths, name, [show(class_name) for _, _, class_name in entries], ordered)
    check_texts(source.items, name)
    return source


def _image_root(file: Path, paths: Sequence[str]) -> Path:
    """The split file's own folder, or the one in it that holds most of a sample of the images."""
    sample = paths[:: max(1, len(paths) // 16)]

    def held(folder: Path) -> int:
        return sum(os.path.isfile(folder / path) for path in sample)

    best = max([file.parent, *(Path(entry.path) for entry in folders.subfolders(file.parent))], key=held)
    if not held(best):
        raise InputError(
            f"{show(file)}: its images, {show(sample[0])[:200]} first, are not beside it; give --root FOLDER"
        )
    return best


def _table(
    file: Path | str,
    root: str | os.PathLike[str] | None,
    *,
    labelled: bool,
    first: int = 0,
    last: int | None = None,
    whole: bool = True,
) -> Source:
    name = show(file)
    items, has_features = items_of(file, first, last, whole=whole)
    key = "id" if has_features else "path"
    items = renamed(items, *(["label"] if has_features else ["path", "label"]))
    missing = [column for column in (key, "label")[: 1 + labelled] if column not in items.column_names]
    if missing:
        kind = (
            "a feature table has id, label and feature"
            if has_features
            else (
                f"a table of images has path ({', '.join(NAMES['path'][1:4])}) and label, one of features has feature "
                f"({', '.join(NAMES[FEATURE][1:])})"
            )
        )
        raise InputError(f"{name}: no column {missing[0]!r} among {few_names(items.column_names)}; {kind}")
    front = {"source": texts(items[key], name, key, needed=True, first=first)}
    if "label" in items.column_names:
        front["label"] = texts(items["label"], name, "label", needed=labelled, first=first)
    items = pa.table(front | {c: items[c] for c in items.column_names if c not in (key, *front)})
    check_texts(items, name, first)
    labels = pc.unique(items["label"]).drop_null().to_pylist() if "label" in items.column_names else []
    names = tuple(sorted(labels))
    if has_features:
        return Source(name, items, names, table=file, rows=np.arange(first, first + len(items), dtype=np.int64))
    folder = root or (file.rpartition("/")[0] if isinstance(file, str) else file.parent)
    paths = [path if remote.is_remote(path) else os.path.join(folder, path) for path in items["source"].to_pylist()]
    items = items.set_column(0, "source", pa.array([show(path) for path in paths], pa.string()))
    return Source(name, items, names, tuple(paths))


def open_rows(file: Path | str, first: int, last: int, *, root: str | None = None, labelled: bool = False) -> Source:
    """Rows ``first`` to ``last`` of one Parquet file, a feature table or one of paths, as :func:`open_source` has all.

    Only the row groups that hold them are read. Raises as that does, with the rows' numbers in the file.
    """
    return _table(file, root, labelled=labelled, first=first, last=last, whole=False)
