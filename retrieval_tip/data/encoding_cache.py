"""An on-disk cache for raw image features, whose keys consist of the image content and the backbone."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import weakref
import zlib
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import cache_folder, make_folders
from retrieval_tip.wording import show

log = logging.getLogger(__name__)

NAME = "encodings-2.sqlite"  # the number changes with the schema
DEFAULT_BYTES = (
    8_000_000_000  # default size limit, enough for two million photos with 512 values each
)
LEFT = 0.9  # each removal of old encodings frees a tenth of the limit, so that removals are rare
REMOVED, ROW_BYTES, USED = (
    1024,
    8192,
    1024,
)  # encodings removed per transaction, bytes per encoding, uses per update

_UNIT = (
    1_000_000  # SQLite's 32-bit ``user_version`` stores the limit in megabytes; 0 means the default
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS encodings (scope TEXT NOT NULL, digest TEXT NOT NULL, view TEXT NOT NULL,
    crc INTEGER NOT NULL, used REAL NOT NULL DEFAULT (julianday('now')), feature BLOB NOT NULL,
    PRIMARY KEY (scope, digest, view));
CREATE INDEX IF NOT EXISTS encodings_used ON encodings (used);
"""
_INSERT = (
    "INSERT OR REPLACE INTO encodings (scope, digest, view, feature, crc) VALUES (?, ?, ?, ?, ?)"
)
_REMOVE = "DELETE FROM encodings WHERE rowid IN (SELECT rowid FROM encodings ORDER BY used, rowid LIMIT ?)"
_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)


class EncodingCache:
    """A store of raw features by backbone, image content and view, in one SQLite file of limited size.

    If the file exceeds this limit, the least recently used encodings are removed. Threads and processes can share the
    file. Damaged entries count as missing. If the file cannot be written, new encodings are not stored. Raises
    InputError if the file is damaged, or cannot be created in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / NAME
        self._lock = threading.Lock()
        self._keeps = True
        self._used = set[int]()
        try:
            make_folders(self.path.parent)
            if self.path.exists() and not self.path.is_file():  # SQLite would block on a pipe
                raise OSError("not a file")
            self._db = sqlite3.connect(
                self.path, timeout=60, check_same_thread=False, isolation_level="IMMEDIATE"
            )
            weakref.finalize(
                self, self._db.close
            )  # Python warns about a connection that only the collector closes
            self._db.execute("PRAGMA auto_vacuum = 2")  # incremental; only affects new files
            self._db.executescript(_SCHEMA)
            self._db.execute("SELECT count(*) FROM (SELECT 1 FROM encodings LIMIT 1)").fetchone()
        except (OSError, *_DAMAGE) as error:
            raise self._unusable(error) from None

    @classmethod
    def default(cls) -> EncodingCache | None:
        """Open the cache in the default folder. If it cannot be used, log a warning and return ``None``."""
        try:
            return cls(cls.default_folder())
        except (InputError, UsageError) as error:
            log.warning("%s; continuing without the cache", error)
            return None

    @staticmethod
    def default_folder() -> Path:
        """Return :func:`files.cache_folder`. Raises UsageError if the user has no home folder."""
        folder = cache_folder()
        if folder is None:
            raise UsageError(
                "encoding cache: there is no home folder to store it; set RETRIEVAL_TIP_CACHE, or give --no-cache"
            )
        return folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path of the folder. In place of the default folder, each process opens its own."""
        folder = self.path.parent
        return (type(self).default, ()) if folder == cache_folder() else (type(self), (folder,))

    def _unusable(self, error: Exception) -> InputError:
        remedy = "remove it, or give --no-cache"
        return InputError(
            f"{show(self.path)}: the encoding cache cannot be used ({error}); {remedy}"
        )

    def get(self, scope: str, digest: str, view: str) -> FloatArray | None:
        """Return the raw feature of a view (shape ``[d]``), or ``None`` if it is not in the cache."""
        query = (
            "SELECT feature, crc, rowid FROM encodings WHERE scope = ? AND digest = ? AND view = ?"
        )
        with self._lock:
            try:
                row = self._db.execute(query, (scope, digest, view)).fetchone()
            except _DAMAGE:
                return None
            if (
                row is None
                or not isinstance(row[0], bytes)
                or _crc(scope, digest, view, row[0]) != row[1]
            ):
                return None
            self._used.add(row[2])
            if len(self._used) >= USED:
                self._note_uses()
        return np.frombuffer(row[0], dtype="<f4")

    def put(self, scope: str, features: dict[tuple[str, str], FloatArray]) -> None:
        """Store raw features by (digest, view). If the file cannot be written, log a warning and do nothing."""
        rows = []
        for (digest, view), feature in features.items():
            blob = feature.astype("<f4").tobytes()
            rows.append((scope, digest, view, blob, _crc(scope, digest, view, blob)))
        with self._lock:
            if not self._keeps:
                return
            try:
                self._write(_INSERT, rows)
                self._shrink()
            except _DAMAGE as error:
                self._keeps = False
                log.warning("%s; continuing without storing new encodings", self._unusable(error))

    def _write(
        self, statement: str, rows: list[tuple[str, str, str, bytes, int]] | list[tuple[int]]
    ) -> None:
        with self._db:  # commits or rolls back
            self._db.executemany(statement, rows)

    def _note_uses(self) -> None:
        used = [(row,) for row in self._used]
        self._used.clear()
        if used and self._keeps:
            with suppress(sqlite3.Error):
                self._write("UPDATE encodings SET used = julianday('now') WHERE rowid = ?", used)

    def limit(self, most: int) -> None:
        """Set the size limit for this run and later runs, rounded down to megabytes, but not below one."""
        with self._lock:
            try:
                self._db.execute(f"PRAGMA user_version = {max(1, most // _UNIT)}")
                self._shrink()
            except sqlite3.Error as error:
                raise self._unusable(error) from None

    def _shrink(self) -> None:
        db = self._db
        most = _most(self._db)
        page = _pragma(db, "page_size")
        if _pragma(db, "page_count") * page <= most:
            return
        while beyond := max(
            0, (_pragma(db, "page_count") - _pragma(db, "freelist_count")) * page - int(LEFT * most)
        ):
            with db:
                removed = db.execute(_REMOVE, (min(REMOVED, 1 + beyond // ROW_BYTES),)).rowcount
            if not removed:
                break
        self._db.executescript("PRAGMA incremental_vacuum")  # execute would only free one page

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM encodings").fetchone()[0])

    def clear(self) -> int:
        """Remove all encodings, free their disk space, and return their number."""
        with self._lock:
            with self._db:
                number = self._db.execute("DELETE FROM encodings").rowcount
            self._db.execute("VACUUM")
        return number

    def close(self) -> None:
        """Record the times of last use, shrink the file to its limit, and close it."""
        with self._lock:
            self._note_uses()
            with suppress(sqlite3.Error):
                self._shrink()
            self._db.close()


def size_of(folder: Path) -> tuple[Path, int, int]:
    """Return the cache file in a folder, its size and its limit in bytes, without creating the file."""
    file = folder / NAME
    most = DEFAULT_BYTES
    if not file.is_file():
        return file, 0, most
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as db,
    ):
        most = _most(db)
    return file, file.stat().st_size, most


def _most(db: sqlite3.Connection) -> int:
    return max(0, _pragma(db, "user_version")) * _UNIT or DEFAULT_BYTES


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _crc(scope: str, digest: str, view: str, blob: bytes) -> int:
    """Compute a checksum of the key and the feature, to detect damage that would swap the features of two images."""
    return zlib.crc32(blob, zlib.crc32(f"{scope} {digest} {view}".encode()))
