"""Webdataset tars: images with the labels beside them, ``key.jpg`` and ``key.cls``, ``key.txt`` or ``key.json``.

An image is called ``TAR/MEMBER``, and by that name its bytes are read: of a ``.tar`` where it lies, of one that is
packed (``.tar.gz``, ``.tgz``) or on an object store from a copy without a name, which goes with the process. Names in
a tar are names only: nothing is unpacked by them.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import json
import os
import re
import shutil
import tarfile
import tempfile
import threading
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from retrieval_tip.data import images, remote
from retrieval_tip.errors import InputError, Skipped, UsageError, first_line, show
from retrieval_tip.files import open_regular

TARS = (".tar", ".tar.gz", ".tgz")
LABELS = ("cls", "json", "txt")
"""Members that label an image, the one that counts first."""
MAX_LABEL = 4096
"""Longest label, in characters."""
MAX_LABEL_BYTES = 1 << 20
"""Of a member that holds a label: a larger one is something else."""
MOST_NAMED = 100_000
"""Tars that ``{000..999}`` may stand for."""
HELD = 16
"""Tars whose members are known at a time; what is read again after so many others is opened again."""
CHUNK = 1 << 20

_IN_TAR = re.compile(r"\.(tar|tar\.gz|tgz)/", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_opening = threading.Lock()


class Tar:
    """The images of one tar: where the bytes of each lie, by its name; its label, or ``None``; and what ``failed``.

    Damage is no error: it ends the tar, and is named in ``failed``. Raises InputError, which says why and not which,
    where nothing of it can be read.
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
            for sample in _samples(self._file, name, self.failed):
                self._add(sample, place, total)
        except (OSError, EOFError, tarfile.TarError, InputError) as error:
            why = f"cannot be read as a tar: {first_line(error)}"
            if not self.places:
                raise InputError(why) from None
            self.failed.append(Skipped(name, why))

    def _add(self, sample: _Sample, place: str, total: int) -> None:
        if not sample.name:
            self.failed.append(Skipped(f"{show(place)}/{sample.key}", "no image among the members of this key"))
            return
        path = f"{place}/{sample.name}"
        try:
            label = _label(sample)
            if path in self.places:
                raise InputError("this name stands twice in the tar")
            if sample.start + sample.size > total:
                raise InputError("cut off: the tar ends within it")
        except InputError as error:
            self.failed.append(Skipped(show(path), str(error)))
            return
        self.places[path], self.labels[path] = (sample.start, sample.size), label

    def read(self, path: str) -> bytes:
        """The bytes of an image. Raises InputError where it is not there, too large or empty."""
        if path not in self.places:
            raise InputError("no such image in the tar")
        start, size = self.places[path]
        images.admit(size)
        data = os.pread(self._file.fileno(), size, start)  # several threads read at once
        if not data:
            raise InputError("empty file")
        return data


def opened(place: str) -> Tar:
    """A tar, by its path or URL. The last :data:`HELD` are kept, until another file is in that place.

    Raises as :class:`Tar`.
    """
    try:
        status = None if remote.is_remote(place) else os.stat(place)
    except OSError as error:
        raise InputError(str(error.strerror)) from None
    with _opening:  # else each of the threads that read its images would open it
        return _opened(place, None if status is None else (status.st_size, status.st_mtime_ns))


@functools.lru_cache(HELD)
def _opened(place: str, stamp: tuple[int, int] | None) -> Tar:
    del stamp  # a part of the key
    return Tar(place)


def tar_of(path: str) -> str | None:
    """The tar that an image's name says it lies in; ``None`` where it says none."""
    for match in _IN_TAR.finditer(path):
        place = path[: match.end() - 1]
        if remote.is_remote(place) or os.path.isfile(place):
            return place
    return None


def find(where: str) -> list[str]:
    """The tars that a path, a URL, a folder or a pattern stands for, in name order; none where it is something else.

    A pattern is ``s-*.tar``, or ``s-{000..099}.tar`` as webdataset has it. A folder is one of tars where it holds no
    folders and no images beside them. Raises InputError for one of a range that is not there, UsageError for too many.
    """
    if not where.lower().endswith(TARS):
        return _in_folder(where)
    if remote.is_remote(where):
        if not glob.has_magic(where):
            return list(_named(where))
        return [name for name in _listed(where.rpartition("/")[0]) if fnmatch.fnmatchcase(name, where)]
    if os.path.isfile(where):
        return [where]
    if os.path.exists(where):
        return _in_folder(where)
    if _RANGE.search(where):
        tars = list(_named(where))
        missing = next((tar for tar in tars if not os.path.isfile(tar)), None)
        if missing is not None:
            raise InputError(f"{show(missing)}: no such file")
        return tars
    return sorted(place for place in glob.glob(where) if os.path.isfile(place))


def _in_folder(where: str) -> list[str]:
    if remote.is_remote(where):
        return _listed(where.rstrip("/"))
    try:
        seen = images.entries(where) if os.path.isdir(where) else []
    except OSError:  # whoever reads the folder says so
        return []
    if any(images.is_folder(entry) or Path(entry.name).suffix.lower() in images.extensions() for entry in seen):
        return []
    return sorted(entry.path for entry in seen if entry.name.lower().endswith(TARS) and entry.is_file())


def _named(pattern: str) -> Iterator[str]:
    """The names that ``{000..099}`` stands for, each as wide as the first number; a name without is itself."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if last - first >= MOST_NAMED:
        raise UsageError(f"{show(pattern)}: more than {MOST_NAMED:,} tars; give a folder or a * in place of a range")
    for number in range(first, last + 1):
        yield from _named(f"{pattern[: match.start()]}{number:0{len(match[1])}d}{pattern[match.end() :]}")


def _listed(folder: str) -> list[str]:
    """The tars in a folder of an object store, in name order."""
    system = remote.system_of(folder)
    try:
        names = [f"{folder}/{str(name).rpartition('/')[2]}" for name in system.ls(folder, detail=False)]
    except FileNotFoundError:
        return []
    except Exception as error:
        raise InputError(f"{folder}: cannot be read: {first_line(error)}") from None
    return sorted(name for name in names if name.lower().endswith(TARS))


@dataclass
class _Sample:
    """Members of one key: where the image's bytes are, and the label as far as there is one."""

    key: str
    name: str = ""
    start: int = 0
    size: int = 0
    labels: dict[str, bytes] = field(default_factory=dict)


def _plain_tar(place: str) -> BinaryIO:
    """The tar as a local file that is not compressed: itself, or a nameless copy of it."""
    packed = not place.lower().endswith(".tar")
    if not packed and not remote.is_remote(place):
        return open_regular(place)
    file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the tar is
    try:
        with remote.opened(place) if remote.is_remote(place) else open_regular(place) as raw:
            _unpack(raw, file) if packed else shutil.copyfileobj(raw, file, CHUNK)
        file.flush()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _unpack(raw: BinaryIO, file: BinaryIO) -> None:
    """Copy what was gzipped, as far as it is sound: where it ends too early, so does the tar, and that is said."""
    inflate = zlib.decompressobj(31)
    while data := raw.read(CHUNK):
        while data:
            try:
                file.write(inflate.decompress(data, CHUNK))
            except zlib.error as error:
                if not file.tell():
                    raise InputError(f"not gzip ({error})") from None
                return
            data = inflate.unconsumed_tail
            if inflate.eof:  # another one may follow, and zeros to fill a block
                data = inflate.unused_data.lstrip(b"\0")
                inflate = zlib.decompressobj(31)


def _samples(file: BinaryIO, name: str, failed: list[Skipped]) -> Iterator[_Sample]:
    """Neighbouring members of one key together, which is, as webdataset has it, what comes before a name's first dot.

    Damage ends the tar: what is after it is lost, and said.
    """
    sample: _Sample | None = None
    members = 0
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", ignore_zeros=False) as tar:
        while True:
            try:
                member = tar.next()
            except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                failed.append(Skipped(name, f"damaged after {members} members: {first_line(error)}"))
                break
            if member is None:
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                    failed.append(Skipped(name, f"damaged or cut off after {members} members: no end mark there"))
                break
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps each of them, which adds up
            if not member.isreg() or member.issparse():
                continue
            members += 1
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key, kind = show(f"{folder}/{stem}" if folder else stem), kind.lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            if f".{kind}" in images.extensions():
                if sample.name:
                    failed.append(Skipped(f"{name}/{show(member.name)}", f"{sample.name} is the image of this key"))
                    continue
                sample.name, sample.start, sample.size = show(member.name), member.offset_data, member.size
            elif kind in LABELS and member.size <= MAX_LABEL_BYTES:
                sample.labels[kind] = os.pread(file.fileno(), member.size, member.offset_data)
    if sample is not None:
        yield sample


def _label(sample: _Sample) -> str | None:
    """The label of a sample: text of ``.cls`` or ``.txt``, or ``label``, ``class`` or ``cls`` of ``.json``.

    Raises InputError where it is not UTF-8, too long, or no text.
    """
    kind = next((kind for kind in LABELS if kind in sample.labels), None)
    if kind is None:
        return None
    try:
        text: Any = sample.labels[kind].decode()
        if kind == "json":
            facts = json.loads(text)
            named = [facts[key] for key in ("label", "class", "cls") if facts.get(key) is not None]
            text = named[0] if named else ""
            if isinstance(text, bool) or not isinstance(text, str | int):
                raise InputError(f"the label in its .json is {type(text).__name__}; expected text")
            str(text).encode()
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"its .{kind} cannot be read as a label ({first_line(error)})") from None
    text = str(text).strip()
    if len(text) > MAX_LABEL:
        raise InputError(f"its label has more than {MAX_LABEL} characters")
    return text or None
