"""The encoding cache: features of images that were encoded before, by their content and the backbone that made them."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import InputError, UsageError, show
from retrieval_tip.files import cache_folder, make_folders

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)


class EncodingCache:
    """Raw features by backbone, image content and view, in one SQLite file: what was encoded once is never again.

    Safe to share between threads and processes. A damaged entry counts as absent; a damaged file is put aside; where
    it cannot be written, what is encoded is no more kept. Raises InputError for a folder where there can be none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "encodings.sqlite"
        self._lock = threading.Lock()
        self._keeps = True
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
        """Put a damaged file aside and start another."""
        aside = self.path.with_suffix(f".damaged-{uuid.uuid4().hex[:8]}")
        try:
            self.path.rename(aside)
            log.warning("%s: damaged, put aside as %s; encoding anew", show(self.path), aside.name)
            self._db = self._open()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def _open(self) -> sqlite3.Connection:
        if self.path.exists() and not self.path.is_file():  # of a pipe, SQLite would wait for ever
            raise self._unusable(ValueError("not a file"))
        db = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
        try:
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
        query = "SELECT feature, crc FROM encodings WHERE scope = ? AND digest = ? AND view = ?"
        try:
            with self._lock:
                row = self._db.execute(query, (scope, digest, view)).fetchone()
        except _DAMAGE:
            return None
        if row is None or not isinstance(row[0], bytes) or _crc(scope, digest, view, row[0]) != row[1]:
            return None
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
        with self._db:  # which commits, or rolls back
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO encodings VALUES (?, ?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        """Number of encodings."""
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM encodings").fetchone()[0])

    def clear(self) -> int:
        """Remove all encodings, and give their space back; how many there were."""
        number = len(self)
        with self._lock:
            self._db.execute("DELETE FROM encodings")
            self._db.execute("VACUUM")
        return number

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _crc(scope: str, digest: str, view: str, blob: bytes) -> int:
    """Over the key too: a damaged file must not give one image the feature of another."""
    return zlib.crc32(blob, zlib.crc32(f"{scope} {digest} {view}".encode()))
