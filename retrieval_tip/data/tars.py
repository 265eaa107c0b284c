"""Read images from webdataset tars. The label of ``key.jpg`` is in ``key.cls``, ``key.txt`` or ``key.json``.

Images are named ``TAR/MEMBER``. A local ``.tar`` file is read in place. A compressed tar (``.tar.gz`` or ``.tgz``) or a
remote tar is first copied to an unnamed temporary file.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import gzip
import json
import os
import re
import tarfile
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from retrieval_tip.data import images, remote
from retrieval_tip.data.source import Source, of_images
from retrieval_tip.errors import InputError, Skipped, UsageError, first_line, show
from retrieval_tip.files import open_regular

TARS = (".tar", ".tar.gz", ".tgz")
LABELS = ("cls", "json", "txt")  # suffixes of label files; the first one that exists is used
MAX_LABEL = 4096  # longest label, in characters
MAX_LABEL_BYTES = 1 << 20  # largest label file, in bytes
MOST_NAMED = 100_000  # largest number of tars in a range such as ``{000..999}``
HELD = 16  # number of tars that stay open
CHUNK = 1 << 20
IMAGE = "/"  # key of the image in a sample

_IN_TAR = re.compile(r"\.(tar|tar\.gz|tgz)/", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_opening = threading.Lock()
_Sample = dict[str, tuple[str, int, int]]  # name, position and size of an image and its label files, by suffix


class Tar:
    """The images in a tar.

    ``places`` and ``labels`` contain the position and the label of each image. ``failed`` lists the members that cannot
    be read. If the tar is damaged, it also states where reading stopped. Raises InputError if nothing can be read.
    """

    def __init__(self, place: str) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.labels: dict[str, str | None] = {}
        self.failed: list[Skipped] = []
        name = show(place)
        try:
            self._file = _plain_tar(place)
            weakref.finalize(self, self._file.close)
            total = os.fstat(self._file.fileno()).st_size
            samples: dict[str, _Sample] = {}  # by key, which is the name up to the first dot
            for member in self._members(name):
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                kind = IMAGE if f".{kind.lower()}" in images.extensions() else kind.lower()
                sample = samples.setdefault(show(f"{folder}/{stem}" if folder else stem), {})
                file = show(member.name), member.offset_data, member.size
                if kind in LABELS and member.size <= MAX_LABEL_BYTES:
                    sample[kind] = file
                elif kind == IMAGE and (first := sample.setdefault(IMAGE, file)) is not file:
                    problem = "duplicate name" if first[0] == file[0] else f"{first[0]} has the same key"
                    self.failed.append(Skipped(f"{name}/{file[0]}", problem))
        except (OSError, EOFError, tarfile.TarError, InputError) as error:
            raise InputError(f"cannot be read as a tar: {first_line(error)}") from None
        for key, sample in samples.items():
            image, start, size = sample.get(IMAGE, (key, 0, 0))
            path = f"{place}/{image}"
            try:
                if IMAGE not in sample:
                    raise InputError("no image with this key")
                if start + size > total:
                    raise InputError("cut off at the end of the tar")
                self.labels[path] = self._label(sample)
                self.places[path] = start, size
            except InputError as error:
                self.failed.append(Skipped(show(path), str(error)))

    def _members(self, name: str) -> Iterator[tarfile.TarInfo]:
        number = 0
        with tarfile.open(fileobj=self._file, mode="r:", errors="surrogateescape", ignore_zeros=False) as tar:
            while True:
                try:
                    member = tar.next()
                except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                    self.failed.append(Skipped(name, f"damaged after {number} members: {first_line(error)}"))
                    return
                if member is None:
                    break
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps all members in memory
                if member.isreg() and not member.issparse():
                    number += 1
                    yield member
            if os.pread(self._file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                self.failed.append(Skipped(name, f"damaged or cut off after {number} members: no end mark"))

    def _label(self, sample: _Sample) -> str | None:
        """Return the text in ``.cls`` or ``.txt``, or the value of ``label``, ``class`` or ``cls`` in ``.json``."""
        kind = next((kind for kind in LABELS if kind in sample), None)
        if kind is None:
            return None
        _, start, size = sample[kind]
        try:
            text = os.pread(self._file.fileno(), size, start).decode()
            facts = json.loads(text) if kind == "json" else {"label": text}
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"its .{kind} cannot be read as a label ({first_line(error)})") from None
        if not isinstance(facts, dict):
            raise InputError("its .json is not an object")
        label = next((facts[key] for key in ("label", "class", "cls") if facts.get(key) is not None), "")
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise InputError(f"the label in its .json has type {type(label).__name__}; expected text")
        if len(text := show(str(label)).strip()) > MAX_LABEL:
            raise InputError(f"its label has more than {MAX_LABEL} characters")
        return text or None

    def read(self, path: str) -> bytes:
        """Return the bytes of an image. Raises InputError if it is missing or too large."""
        if path not in self.places:
            raise InputError("no such image in the tar")
        start, size = self.places[path]
        images.check_size(size)
        return os.pread(self._file.fileno(), size, start)  # thread-safe, unlike seek and read


def opened(place: str) -> Tar:
    """Open a tar by its path or URL, or return it if it is one of the last :data:`HELD` and has not changed."""
    try:
        status = None if remote.is_remote(place) else os.stat(place)
    except OSError as error:
        raise InputError(str(error.strerror)) from None
    with _opening:  # otherwise each decoding thread would open the tar
        return _opened(place, None if status is None else (status.st_size, status.st_mtime_ns))


@functools.lru_cache(HELD)
def _opened(place: str, stamp: tuple[int, int] | None) -> Tar:
    del stamp  # only used as part of the cache key
    return Tar(place)


def tar_of(path: str) -> str | None:
    """Return the tar that contains an image, or ``None`` if the image is not in a tar."""
    for match in _IN_TAR.finditer(path):
        place = path[: match.end() - 1]
        if remote.is_remote(place) or os.path.isfile(place):
            return place
    return None


def of_tars(name: str, places: Sequence[str], *, labelled: bool) -> Source:
    """Open the images in tars, in order. Unreadable images, or without a needed label, are added to ``failed``."""
    labels: dict[str, str | None] = {}
    failed: list[Skipped] = []
    for place in places:
        try:
            tar = opened(place)
        except InputError as error:
            failed.append(Skipped(show(place), str(error)))
            continue
        failed += tar.failed
        labels |= tar.labels
    if labelled:
        kinds = ", ".join(f".{kind}" for kind in LABELS)
        failed += [Skipped(show(path), f"no label; add one of {kinds}") for path, label in labels.items() if not label]
        labels = {path: label for path, label in labels.items() if label}
    return of_images(list(labels), name, list(labels.values()), failed=failed)


def find(where: str) -> list[str]:
    """List the tars that a path, URL, folder or pattern stands for, sorted by name.

    Patterns have the form ``s-*.tar`` or ``s-{000..099}.tar``. The list is empty for anything else, such as a folder
    with images or other folders. Raises InputError if a tar in a range is missing, and UsageError for a long range.
    """
    if not where.lower().endswith(TARS) or os.path.isdir(where):
        return _in_folder(where)
    if remote.is_remote(where):
        if not glob.has_magic(where):
            return list(_named(where))
        return [name for name in _in_folder(where.rpartition("/")[0]) if fnmatch.fnmatchcase(name, where)]
    if os.path.isfile(where):
        return [where]
    if _RANGE.search(where):
        tars = list(_named(where))
        if missing := next((tar for tar in tars if not os.path.isfile(tar)), None):
            raise InputError(f"{show(missing)}: no such file")
        return tars
    return sorted(place for place in glob.glob(where) if os.path.isfile(place))


def _in_folder(where: str) -> list[str]:
    if remote.is_remote(where):
        return [name for name in remote.find(where, 1) if name.lower().endswith(TARS)]
    try:
        seen = images.entries(where) if os.path.isdir(where) else []
    except OSError:  # the folder reader reports this error
        return []
    if any(images.is_folder(entry) or Path(entry.name).suffix.lower() in images.extensions() for entry in seen):
        return []
    return [entry.path for entry in seen if entry.name.lower().endswith(TARS) and entry.is_file()]


def _named(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if last - first >= MOST_NAMED:
        raise UsageError(f"{show(pattern)}: more than {MOST_NAMED:,} tars; give a folder, or * instead of the range")
    for number in range(first, last + 1):
        yield from _named(f"{pattern[: match.start()]}{number:0{len(match[1])}d}{pattern[match.end() :]}")


def _plain_tar(place: str) -> BinaryIO:
    """Open a tar itself, or an unnamed copy if it is remote or compressed. It is unpacked up to the first damage."""
    packed = not place.lower().endswith(".tar")
    if not packed and not remote.is_remote(place):
        return open_regular(place)
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - stays open with the tar
    try:
        with remote.opened(place) if remote.is_remote(place) else open_regular(place) as raw:
            read = gzip.GzipFile(fileobj=raw).read1 if packed else raw.read
            while block := read(CHUNK):
                file.write(block)
    except (OSError, EOFError, zlib.error, InputError):
        if not packed or not file.tell():
            file.close()
            raise
    file.flush()
    file.seek(0)
    return file
