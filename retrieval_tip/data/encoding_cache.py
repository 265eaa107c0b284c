"""The encoding cache: features of images that were encoded before, by their content and the backbone that made them."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import InputError, UsageError, show
from retrieval_tip.files import cache_folder, make_folders

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

NAME = "encodings.sqlite"
DEFAULT_BYTES = 8_000_000_000
"""Largest size of a cache for which nobody chose one: two million photos of 512 values."""
LEFT = 0.9
"""Share of the largest size down to which old encodings are removed, so that each removal lasts for a while."""
REMOVED, ROW_BYTES, USED = 1024, 8192, 1024
"""Encodings that are removed in one transaction; bytes that each is taken to free; uses that are noted at a time."""

_UNIT = 1_000_000
"""Bytes: SQLite's ``user_version``, a number of 32 bits, keeps the largest size in megabytes. 0 is the default."""
_USES = (
    "CREATE TABLE uses (id INTEGER PRIMARY KEY, used REAL NOT NULL)",
    "CREATE INDEX uses_used ON uses (used)",
    "INSERT INTO uses SELECT rowid, 0 FROM encodings",
    "CREATE TRIGGER encodings_used AFTER INSERT ON encodings BEGIN "
    "INSERT OR REPLACE INTO uses VALUES (new.rowid, julianday('now')); END",
)
"""When each encoding was last used, by its row. A table beside the encodings, so that a use does not rewrite one."""
_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)


class EncodingCache:
    """Raw features by backbone, image content and view, in one SQLite file of at most :attr:`most` bytes.

    Where it grows beyond, the encodings that were not used for the longest time are removed. Safe to share between
    threads and processes. A damaged entry counts as absent; a damaged file is put aside; where it cannot be written,
    what is encoded is no more kept. Raises InputError for a folder where there can be none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / NAME
        self._lock = threading.Lock()
        self._keeps = True
        self._used: set[int] = set()
        try:
            make_folders(self.path.parent)
            self._db = self._open()
        except (OSError, sqlite3.OperationalError) as error:
            raise self._unusable(error) from None
        except _DAMAGE:
            self._renew()

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None) -> EncodingCache | None:
        """The cache in a folder, by default the default one; ``None`` where that cannot be, which is said.

        Raises InputError for a given folder where there can be none.
        """
        try:
            return cls(folder or cls.default_folder())
        except (InputError, UsageError) as error:
            if folder:
                raise
            log.warning("%s; encoding without it", error)
            return None

    @staticmethod
    def default_folder() -> Path:
        """:func:`files.cache_folder`. Raises UsageError for a user without a home."""
        folder = cache_folder()
        if folder is None:
            raise UsageError("the encoding cache has no place: no home folder; give --cache or --no-cache")
        return folder

    def _unusable(self, error: Exception) -> InputError:
        return InputError(
            f"{self.path}: the encoding cache cannot be used ({error}); give --cache FOLDER or --no-cache"
        )

    def _renew(self) -> None:
        """Put a damaged file aside, in place of one that was put aside before, and start another."""
        self._remove_damaged()
        self._used.clear()
        aside = self.path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
        try:
            self.path.rename(aside)
            log.warning("%s: damaged, put aside as %s; encoding anew", show(self.path), aside.name)
            self._db = self._open()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def _remove_damaged(self) -> None:
        """Remove files that were put aside."""
        for path in self.path.parent.glob(f"{self.path.stem}.damaged-*"):
            with suppress(OSError):
                path.unlink()

    def _open(self) -> sqlite3.Connection:
        if self.path.exists() and not self.path.is_file():  # of a pipe, SQLite would wait for ever
            raise self._unusable(ValueError("not a file"))
        db = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA auto_vacuum = 2")  # incremental: of a file that is new
            db.execute(
                "CREATE TABLE IF NOT EXISTS encodings (scope TEXT NOT NULL, digest TEXT NOT NULL, view TEXT NOT NULL, "
                "feature BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (scope, digest, view))"
            )
            db.execute("SELECT count(*) FROM (SELECT 1 FROM encodings LIMIT 1)").fetchone()
        except BaseException:
            db.close()
            raise
        return db

    def get(self, scope: str, digest: str, view: str) -> FloatArray | None:
        """The raw feature ``[d]`` of a view, or ``None``."""
        query = "SELECT feature, crc, rowid FROM encodings WHERE scope = ? AND digest = ? AND view = ?"
        with self._lock:
            try:
                row = self._db.execute(query, (scope, digest, view)).fetchone()
            except _DAMAGE:
                return None
            if row is None or not isinstance(row[0], bytes) or _crc(scope, digest, view, row[0]) != row[1]:
                return None
            self._used.add(row[2])
            if len(self._used) >= USED:
                self._note_uses()
        return np.frombuffer(row[0], dtype="<f4")

    def put(self, scope: str, features: dict[tuple[str, str], FloatArray]) -> None:
        """Keep raw features by (digest, view), while that can be done."""
        rows = []
        for (digest, view), feature in features.items():
            blob = feature.astype("<f4").tobytes()
            rows.append((scope, digest, view, blob, _crc(scope, digest, view, blob)))
        with self._lock:
            if not self._keeps:
                return
            try:
                try:
                    self._insert(rows)
                    self._shrink()
                except sqlite3.OperationalError as error:
                    raise self._unusable(error) from None
                except _DAMAGE:
                    self._db.close()
                    self._renew()
                    self._insert(rows)
            except (sqlite3.Error, InputError) as error:
                self._keeps = False
                log.warning("%s; encoding goes on without keeping more", error)

    def _insert(self, rows: Sequence[tuple[str, str, str, bytes, int]]) -> None:
        with self._writing():
            self._db.executemany("INSERT OR REPLACE INTO encodings VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, in which the table of uses is there."""
        with self._db:  # which commits, or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'encodings_used'").fetchone():
                for statement in _USES:
                    self._db.execute(statement)
            yield

    def _note_uses(self) -> None:
        """Note the encodings that were read as used now, where that can be done."""
        used = [(row,) for row in self._used]
        self._used.clear()
        if used and self._keeps:
            with suppress(sqlite3.Error), self._writing():
                self._db.executemany("UPDATE uses SET used = julianday('now') WHERE id = ?", used)

    @property
    def most(self) -> int:
        """The largest size of the file, in bytes."""
        return _most(self._db)

    def limit(self, most: int) -> None:
        """Set the largest size, in bytes, for every later run, and remove what is beyond it.

        It is kept in whole megabytes, one at least. Raises InputError where the file cannot be written.
        """
        with self._lock:
            try:
                self._db.execute(f"PRAGMA user_version = {max(1, most // _UNIT)}")
                self._shrink()
            except sqlite3.Error as error:
                raise self._unusable(error) from None

    def _shrink(self) -> None:
        """Remove the encodings that were not used for the longest time, where the file is too large."""
        page, most = self._number("page_size"), self.most
        if self._number("page_count") * page <= most:
            return
        while beyond := max(0, (self._number("page_count") - self._number("freelist_count")) * page - int(LEFT * most)):
            number = min(REMOVED, 1 + beyond // ROW_BYTES)
            with self._writing():
                rows = self._db.execute("SELECT id FROM uses ORDER BY used, id LIMIT ?", (number,)).fetchall()
                self._db.executemany("DELETE FROM encodings WHERE rowid = ?", rows)
                self._db.executemany("DELETE FROM uses WHERE id = ?", rows)
            if not rows:
                break
        if self._number("auto_vacuum"):
            self._db.executescript("PRAGMA incremental_vacuum")  # by execute it takes one step, which frees one page
        else:  # a file of an older program: from now on it shrinks by the line above
            self._db.execute("PRAGMA auto_vacuum = 2")
            self._db.execute("VACUUM")

    def _number(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def __len__(self) -> int:
        """Number of encodings."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM encodings").fetchone()[0])

    def clear(self) -> int:
        """Remove all encodings, and give their space back; how many there were."""
        number = len(self)
        with self._lock:
            with self._writing():
                self._db.execute("DELETE FROM encodings")
                self._db.execute("DELETE FROM uses")
            self._db.execute("VACUUM")
            self._remove_damaged()
        return number

    def close(self) -> None:
        """Note what was used, remove what is too much, and close the file."""
        with self._lock:
            self._note_uses()
            with suppress(sqlite3.Error):
                self._shrink()
            self._db.close()


def size_of(folder: Path) -> tuple[Path, int, int]:
    """Return the file of the cache in a folder, its bytes, and the most that it may have. Nothing is made."""
    file, most = folder / NAME, DEFAULT_BYTES
    if not file.is_file():
        return file, 0, most
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as db:
        most = _most(db)
    return file, file.stat().st_size, most


def _most(db: sqlite3.Connection) -> int:
    chosen = int(db.execute("PRAGMA user_version").fetchone()[0])
    return chosen * _UNIT if chosen > 0 else DEFAULT_BYTES


def _crc(scope: str, digest: str, view: str, blob: bytes) -> int:
    """Over the key too: a damaged file must not give one image the feature of another."""
    return zlib.crc32(blob, zlib.crc32(f"{scope} {digest} {view}".encode()))
