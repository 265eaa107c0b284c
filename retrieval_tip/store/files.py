"""The files of an index in a folder on this machine. See :mod:`store.bucket` for those in a bucket."""

from __future__ import annotations

import datetime
import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retrieval_tip.errors import StoreError
from retrieval_tip.files import NotAFileError, open_regular, sha256_of, sync
from retrieval_tip.store.manifest import SUFFIXES, DataFile

FAST_BYTES = 1 << 22
"""Maximum size in bytes of the files that a fast check hashes."""

_KIND = "|".join(SUFFIXES)
FILE_NAME = re.compile(rf"({_KIND})-[0-9a-f]{{16}}\.({'|'.join(sorted({s[1:] for s in SUFFIXES.values()}))})")
TEMPORARY = re.compile(rf"\.(({_KIND})-[0-9a-f]{{32}}\.\w+|[\w-]+\.\w+\.[0-9a-f]{{32}})\.tmp")


class LocalFiles:
    """Files in a folder, which messages call ``place``. :class:`bucket.BucketFiles` has the same methods.

    Names are relative to the folder. A file is always read and written as a whole. Methods raise OSError if the disk
    refuses a request.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self.folder, self.place = folder, place

    def get(self, name: str, most: int) -> bytes:
        """Read a file.

        Raises FileNotFoundError if it is missing, and StoreError if it has more than ``most`` bytes, is not a regular
        file or leads out of the folder.
        """
        path, shown = self.folder / name, f"{self.place}/{name}"
        if not lies_in(self.folder, path):
            raise StoreError(f"{shown}: is a link that leads out of the index; replace it with the file itself")
        try:
            with open_regular(path) as file:
                raw = file.read(most + 1)
        except FileNotFoundError:
            raise
        except NotAFileError:
            raise StoreError(f"{shown}: is not a file; restore it") from None
        except OSError as error:
            raise StoreError(f"{shown}: cannot be read: {error.strerror}") from None
        if len(raw) > most:
            raise StoreError(f"{shown}: damaged (more than {most:,} bytes); restore it, or build the index again")
        return raw

    def put(self, name: str, *parts: bytes | memoryview) -> None:
        """Write or replace a file. Readers get either the complete old file or the complete new file."""
        with self._staged(name, *parts) as staged:
            staged.replace(self.folder / name)

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, or return ``False`` if it already exists. Only one of several processes succeeds.

        A server may store a file and then fail to acknowledge it. After ``False`` or a StoreError, check whether the
        file contains your data.
        """
        with self._staged(name, data) as staged:
            try:
                (self.folder / name).hardlink_to(staged)  # fails if the name exists
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                why = "the disk has no hard links, which a commit needs; use another"
                raise StoreError(f"{self.place}: {why}") from None
        return True

    @contextmanager
    def _staged(self, name: str, *parts: bytes | memoryview) -> Iterator[Path]:
        """Write and flush a temporary file next to ``name``, and remove it at the end unless it was renamed."""
        path = self.folder / name
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        path.parent.mkdir(exist_ok=True)
        try:
            with staged.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)

    def sizes(self, folder: str, age: datetime.timedelta = datetime.timedelta()) -> dict[str, int]:
        """Return the names and sizes of the files in a folder, sorted by name.

        In a bucket, files that were written less than ``age`` ago, by the clock of this machine, are left out.
        """
        try:
            entries = sorted(os.scandir(self.folder / folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {}
        for entry in entries:
            with suppress(FileNotFoundError):  # just deleted
                found[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_size
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Delete files. Missing files are ignored."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def flush(self, *folders: str) -> None:
        """Flush the entries of folders to disk. Each file is flushed before it gets its name."""
        for folder in folders:
            sync(self.folder / folder)

    def problem(self, file: DataFile, whole: bool = True) -> str | None:
        """Return how a file differs from its entry in a manifest, or ``None``.

        The digest is compared if the file is small or ``whole`` is true. A file of a table has no size in the manifest,
        and may be missing, because only earlier versions may need it.
        """
        path, shown = self.folder / file.name, f"{self.place}/{file.name}"
        try:
            if not lies_in(self.folder, path):
                return f"{shown}: is a link that leads out of the index"
            if file.bytes and path.stat().st_size != file.bytes:
                return f"{shown}: damaged ({path.stat().st_size:,} bytes instead of {file.bytes:,})"
            if (whole or file.bytes <= FAST_BYTES) and sha256_of(path) != file.sha256:
                return f"{shown}: damaged (its SHA-256 does not match the manifest)"
        except FileNotFoundError:
            return f"{shown}: missing" if file.bytes else None
        except OSError as error:
            return f"{shown}: cannot be read: {error.strerror}"
        return None


def lies_in(folder: Path, path: Path) -> bool:
    """Return whether a path is inside the folder after all links are resolved."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that points to itself
        return False
