"""The items of a source, as all readers return them, and how some are drawn."""

from __future__ import annotations

import logging
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip import hooks
from retrieval_tip.arrays import IntArray
from retrieval_tip.data import remote
from retrieval_tip.errors import InputError, Skipped, UsageError, check_count
from retrieval_tip.files import FOLDER, NotAFileError, open_regular, suffix_of
from retrieval_tip.machine import check_memory
from retrieval_tip.wording import SHOWN, counted, few, show

if TYPE_CHECKING:
    from retrieval_tip.data.feature_table import FeatureTable

log = logging.getLogger(__name__)

MAX_TEXT = 4096  # longest label or id, in characters; a longer one suggests a misread table
MAX_BYTES = 256 << 20  # largest image file, in bytes
ITEM_BYTES = 256  # estimated bytes per drawn item, for its position, path, label and digest


class FileOpener(Protocol):
    """Opens files of photos, such as videos, by their suffix.

    Other packages add one as an entry point in ``retrieval_tip.openers`` whose name is a suffix in lower case, such as
    ``.npz``. Photo NAME of a file is the item ``FILE#NAME`` of a source. An index stores this name, and a later process
    reads the photo by it. An error of any type is the reason why a file or a photo is skipped. An opener runs with the
    user's rights, in several threads at a time.

    It is a module, an object, or a class that is called without arguments. If it has an attribute ``joins`` that is
    true, the photos of a file show the same thing, and ``classify`` gives them one answer.
    """

    def items(self, file: str) -> Iterable[str]:
        """Return the names of the photos of a file. If it is damaged, raise an error after those that are readable.

        Names have no ``#`` and no slash. Their number and the memory are bounded, also for hostile files.
        """

    def read(self, file: str, name: str) -> bytes:
        """Return the encoded image of a photo."""


class Opener(Protocol):
    """Opens the sources of a scheme, which are called ``SCHEME:REST``.

    Other packages add one as an entry point in ``retrieval_tip.sources`` whose name is the scheme. It runs with the
    user's rights. The paths of its items begin with ``SCHEME:``, unless they are those of files, and contain a ``#``.
    An index stores them, and later asks for their bytes to show its photos.
    """

    def open(self, rest: str, *, split: str | None, labelled: bool) -> Source:
        """Open a source. Every item has a label if ``labelled`` is true. Raises InputError if it cannot be read."""

    def read(self, path: str) -> bytes:
        """Return the encoded image of an item. Raises InputError if it cannot be read."""


_found = cache(hooks.find)


def opener(kind: str, name: str) -> Any:
    """Return the opener of a kind (``sources`` or ``openers``) and a name that :mod:`hooks` knows."""
    found = _found(kind, name)
    return found(**hooks.SETTINGS.get(found, {})) if isinstance(found, type) else found


def split_item(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Return FILE and NAME of the item ``FILE#NAME``, FILE and ``""`` for a file of photos, or ``None``.

    An existing file is never an item, whatever its name is.
    """
    from retrieval_tip.data import images  # imports Pillow

    where = os.fspath(path)
    file, mark, name = where.rpartition("#")
    if not mark or os.path.lexists(where):
        file, name = where, ""
    suffix = suffix_of(file)
    is_image = suffix in images.extensions()
    if is_image or not os.path.isfile(file) or not hooks.opens(suffix):  # noqa: PTH113 - any text
        return None
    return file, name


def file_of(path: str) -> str:
    """Return FILE for the item ``FILE#NAME``, and any other path unchanged."""
    return (split_item(path) or (path, ""))[0]


def clip_of(path: str) -> str:
    """Return FILE for the item ``FILE#NAME`` if all photos of this file show the same thing, and otherwise ``""``."""
    file = whole_file(path)
    return file if file and joins(suffix_of(file)) else ""


def joins(suffix: str) -> bool:
    """Return whether files with a suffix can be opened, and all photos of a file show the same thing."""
    return hooks.opens(suffix) and getattr(opener("openers", suffix), "joins", False)


def whole_file(path: str) -> str:
    """Return FILE for the item ``FILE#NAME``, and ``""`` for any other path."""
    file, name = split_item(path) or ("", "")
    return file if name else ""


def items_in(path: str) -> list[str]:
    """Return the items of a file of photos, or the path itself if it is another file.

    If a file is damaged, the file itself is its last item, and reading it raises the error.
    """
    if split_item(path) != (path, ""):
        return [path]
    items, reason = _opened(path)
    return [*items, path] if reason else items


def _opened(file: str) -> tuple[list[str], str]:
    """Return the items of a file of photos, and the reason why it has no more of them."""
    items: list[str] = []
    try:
        with remote.reaching():
            names = opener("openers", suffix_of(file)).items(file)
            items.extend(f"{file}#{name}" for name in names)
    except (InputError, UsageError) as error:
        return items, str(error)
    return items, "" if items else "contains no photos"


def read_item(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file, an object, or an item of an opener.

    Raises InputError without its path if it is empty or too large, or a file of several photos.
    """
    file, name = split_item(path) or ("", "")
    if name:
        with remote.reaching():
            data = bytes(opener("openers", suffix_of(file)).read(file, name))
    elif file:
        items, reason = _opened(file)
        raise InputError(reason or f"contains several photos; name one, such as {show(items[0])}")
    elif (scheme := remote.scheme_of(path)) is not None:
        with remote.reaching():
            data = opener("sources", scheme).read(os.fspath(path))
    elif remote.is_remote(path):
        with remote.reaching():
            check_size(remote.system_of(path).size(path))
            data = bytes(remote.system_of(path).cat_file(path))
    else:
        data = _read_file(path)
    check_size(len(data))
    if not data:
        raise InputError("empty file")
    return data


def _read_file(path: str | os.PathLike[str]) -> bytes:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size  # 0 for files in /proc, which may be endless
            check_size(size)
            return file.read(size)
    except NotAFileError as error:
        raise InputError(
            "a folder, not an image" if error.kind == FOLDER else f"{error.kind}, not a file"
        ) from None
    except FileNotFoundError:
        raise InputError("no such file") from None
    except (OSError, ValueError) as error:  # a ValueError has no strerror
        raise InputError(getattr(error, "strerror", None) or str(error)) from None


def check_size(size: int) -> None:
    """Raise InputError if an image has more than :data:`MAX_BYTES`."""
    if size > MAX_BYTES:
        raise InputError(f"file too large: {size:,} bytes; the limit is {MAX_BYTES:,}")


@dataclass(frozen=True)
class Source:
    """Items to encode or classify, in order.

    ``items`` is a table with the column ``source`` (a printable path or id), the column ``label`` if the labels are
    known, and all other columns if the source is a table. Each item is either the image ``paths[i]``, or row
    ``rows[i]`` of the feature table ``table``. ``class_names`` lists the labels in order. ``failed`` lists the inputs
    that could not be read. ``load`` returns the bytes of an image. If ``strict`` is set, all images must be readable.
    """

    name: str
    items: pa.Table
    class_names: tuple[str, ...] = ()
    paths: tuple[str, ...] | None = None
    table: FeatureTable | None = None
    rows: IntArray | None = None
    failed: tuple[Skipped, ...] = ()
    load: Callable[[str], bytes] = read_item
    strict: bool = False

    def __len__(self) -> int:
        return int(self.items.num_rows)

    @property
    def labels(self) -> list[str]:
        """The label of each item. Raises InputError if an item has no label."""
        if "label" not in self.items.column_names:
            raise InputError(
                f"{self.name}: it has no labels; give class folders or a table with a column 'label'"
            )
        refuse_rows(self.items["label"].is_null(), self.name, " without a label; label every item")
        labels: list[str] = self.items["label"].to_pylist()
        return labels

    @property
    def sources(self) -> list[str]:
        """The path or id of each item."""
        names: list[str] = self.items["source"].to_pylist()
        return names

    def known_as(self, class_names: Sequence[str]) -> Source:
        """Rename labels that match exactly one of ``class_names`` except for case, ``_``, ``-`` and spaces."""
        known = set(class_names)
        times = Counter(map(_plain, class_names))
        alone = {_plain(name): name for name in class_names if times[_plain(name)] == 1}
        taken = {
            name: alone[_plain(name)]
            for name in self.class_names
            if name not in known and _plain(name) in alone
        }
        if not taken:
            return self
        log.warning(
            "%s: labels renamed: %s", self.name, few([f"{a} to {b}" for a, b in taken.items()])
        )
        labels = pa.array(
            [taken.get(label, label) for label in self.items["label"].to_pylist()], pa.string()
        )
        items = self.items.set_column(self.items.column_names.index("label"), "label", labels)
        return replace(
            self,
            items=items,
            class_names=tuple(dict.fromkeys(taken.get(n, n) for n in self.class_names)),
        )

    def truth(self, class_names: Sequence[str]) -> tuple[IntArray, list[str]]:
        """Return the class id of each item, and the class names.

        The names of classes that are not among the ``c`` given names follow these, so their ids are at least ``c``.
        Names that differ only in case, ``_``, ``-`` or spaces are the same class. Raises InputError if there are no
        items, or if an item has no label.
        """
        source = self.known_as(class_names)
        labels = source.labels
        if not labels:
            raise InputError(f"{source.name}: has no items")
        others = sorted(set(labels) - set(class_names))
        alike = spelled_alike(others)
        names = [*class_names, *(name for name in others if name not in alike)]
        position = {name: i for i, name in enumerate(names)}
        position |= {name: position[first] for name, first in alike.items()}
        return np.array([position[label] for label in labels], dtype=np.int64), names

    def unknown(self, labels: Sequence[str], class_names: Sequence[str]) -> InputError:
        """Return the error for labels that are not among the class names of an index."""
        unknown = f"{counted(len(labels), 'unknown label')}: {few(labels)}"
        return InputError(f"{self.name}: {unknown}; the classes are {few(class_names)}")

    def without(self, columns: Sequence[str]) -> Source:
        """Return the items without some of their further columns."""
        return replace(
            self,
            items=self.items.drop_columns([c for c in columns if c in self.items.column_names]),
        )

    def take(self, positions: Sequence[int] | IntArray) -> Source:
        """Return the items at ``positions``, in this order. The class names do not change."""
        index = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            items=self.items.take(pa.array(index)),
            paths=None if self.paths is None else tuple(self.paths[i] for i in index),
            rows=None if self.rows is None else self.rows[index],
        )


def _plain(label: str) -> str:
    return re.sub(r"(?!^-\d)[\s_-]+", " ", label).strip().casefold()  # keeps -1 different from 1


def spelled_alike(names: Iterable[str]) -> dict[str, str]:
    """Map each name to an earlier name that differs only in case, ``_``, ``-`` or spaces, if there is one."""
    first: dict[str, str] = {}
    return {
        name: known for name in names if (known := first.setdefault(_plain(name), name)) != name
    }


def of_images(
    paths: Sequence[str],
    name: str = "images",
    labels: Sequence[str | None] | None = None,
    class_names: Sequence[str] | None = None,
    failed: Sequence[Skipped] = (),
) -> Source:
    """Create a source from images and, if known, their labels.

    ``class_names`` gives the order of the labels, which are otherwise sorted. If no image has a label, the source has
    no labels. Raises InputError if a label is too long.
    """
    places = tuple(path.replace(os.sep, "/") for path in paths)
    items = {"source": pa.array([show(path) for path in places], pa.string())}
    if class_names is None:
        class_names = sorted({label for label in labels or () if label is not None})
    if labels is not None and (class_names or not labels):
        items["label"] = pa.array(labels, pa.string())
        check_lengths(items["label"], name, "label")
    return Source(name, pa.table(items), tuple(class_names), places, failed=tuple(failed))


def check_lengths(texts: pa.Array | pa.ChunkedArray, name: str, what: str) -> None:
    """Raise InputError if a text is longer than :data:`MAX_TEXT`."""
    is_long = pc.greater(pc.utf8_length(texts), MAX_TEXT).fill_null(False)
    refuse_rows(is_long, name, f": {what} longer than {MAX_TEXT} characters")


def refuse_rows(
    wrong: npt.ArrayLike, name: str, why: str | Callable[[int], str], start: int = 0
) -> None:
    """Raise InputError if any row is ``wrong``, with the numbers of these rows, counted from ``start``, and the reason.

    ``why`` can be a function of the position of the first wrong row.
    """
    if (rows := np.flatnonzero(wrong)).size:
        shown = few([str(row + start) for row in rows[:SHOWN].tolist()], len(rows))
        reason = why if isinstance(why, str) else why(int(rows[0]))
        raise InputError(f"{name}: row{'s' if len(rows) > 1 else ''} {shown}{reason}")


def few_shot(labels: Sequence[Hashable], shots: int, seed: int | random.Random = 1) -> list[int]:
    """Draw ``shots`` items per class by the published rule, and return their positions in the order of the draw.

    Python's random generator is seeded with ``seed``, or is given. Items are grouped by label, in order of first
    appearance, and stay in file order within each group. From each group, items are drawn with ``random.sample(group,
    shots)``, or with ``random.choices`` (with replacement) if the group has fewer than ``shots`` items.

    Raises UsageError if ``shots`` is not positive or is too large, or if there is not enough memory.
    """
    generator = seed if isinstance(seed, random.Random) else random.Random(seed)  # noqa: S311 - a published draw
    check_count("shots", shots)
    groups: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(label, []).append(position)
    check_memory(
        ITEM_BYTES * shots * len(groups),
        f"{shots} shots of {len(groups)} classes",
        "draw fewer shots",
    )
    drawn: list[int] = []
    for group in groups.values():
        drawn += (
            generator.sample(group, shots)
            if len(group) >= shots
            else generator.choices(group, k=shots)
        )
    return drawn


def spread(n: int, m: int) -> IntArray:
    """Return at most ``m`` evenly spaced positions out of ``n``, in ascending order."""
    return np.unique(np.linspace(0, n - 1, min(n, m)).round().astype(np.int64))
