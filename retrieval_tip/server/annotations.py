"""A database of what each annotation in Label Studio says, beside the versions of an index.

An event tells about one annotation, but the label of a photo depends on all of them, even while they disagree and the
photo is no shot. The database belongs to no version, because a rollback does not change what annotations say.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import make_folders
from retrieval_tip.index.places import Store
from retrieval_tip.model import Index
from retrieval_tip.wording import show

COLUMN = "label_studio"
"""Optional column with the Label Studio project and annotation that made a shot, such as ``1/42``."""
NAME = "label-studio.sqlite"
"""Name of the database in the folder of an index."""

# A row without an annotation only says that a photo is due.
_CREATE = """
CREATE TABLE said (annotation UNIQUE, task, updated DEFAULT '', digest, address, choices, due,
                   UNIQUE (task, annotation), UNIQUE (digest, annotation))
"""
_SHOTS = "INSERT OR IGNORE INTO said (annotation, digest, choices) VALUES (:label_studio, :digest, json_array(:label))"
_GONE = """
UPDATE said SET annotation = NULL, choices = '[]', due = 1 WHERE rowid IN (
    SELECT said.rowid FROM (SELECT ? AS name, ? AS until) JOIN said
    ON (annotation = name OR task = name) AND updated <= until
)
"""
# A photo that cannot be read is the one that was last at its address.
_SAY = """
WITH new (name, task, time, photo, place, chosen) AS (VALUES (?, ?, ?, ?, ?, ?))
INSERT INTO said
SELECT name, task, time,
       coalesce(photo, (SELECT digest FROM said WHERE address = place AND digest NOT NULL ORDER BY rowid DESC)),
       place, chosen, 1
FROM new WHERE NOT EXISTS (SELECT 1 FROM said WHERE annotation = name)
"""
_DUE = """
SELECT digest, json_group_array(value) FILTER (WHERE value NOT NULL), max(annotation) FILTER (WHERE value NOT NULL),
       ifnull((SELECT address FROM said AS own WHERE own.digest = said.digest AND address NOT NULL
               ORDER BY annotation IS NULL, rowid DESC), 'null')
FROM said LEFT JOIN json_each(choices) WHERE digest IN (SELECT digest FROM said WHERE due)
GROUP BY digest ORDER BY count(DISTINCT value) = 1 DESC
"""
_DONE = "UPDATE said SET due = 0 WHERE due; DELETE FROM said WHERE annotation IS NULL"


def database(store: Store, uploads: Path | None) -> Path:
    """Return the path of the database, which is in ``uploads`` if the index is in a bucket.

    Raises InputError if there is no such folder.
    """
    if store.local is not None:
        return store.local / NAME
    if uploads is None:
        raise InputError(
            f"index {store.name!r} is in a bucket; start the server with --uploads FOLDER"
        )
    make_folders(uploads)
    return uploads / f"{quote(store.resolved, safe='')}.{NAME}"


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as db, db:
            db.execute("BEGIN IMMEDIATE")
            yield db
    except sqlite3.Error as error:
        raise StoreError(f"{show(path)}: cannot be used ({error}); restore or remove it") from None


def note(path: Path, gone: list[Any], said: list[Any], index: Index) -> list[Any]:
    """Forget annotations or tasks that have not changed after a time, and note what other annotations say.

    ``gone`` are their names and times. ``said`` are annotations, each with its task, the time of its change, the digest
    and the address of its photo, and a list of its choices in JSON. If a later change is known, nothing changes. A new
    database starts with the annotations that made shots of the ``index``.

    Return the photos whose shots may have to change, until :func:`done` is called: the digest, all choices as a list in
    JSON, an annotation, and an address. Raises StoreError if the database cannot be used.
    """
    with _opened(path) as db:
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            db.execute(_CREATE)
            if COLUMN in index.labels.column_names:
                db.executemany(
                    _SHOTS, index.labels.select([COLUMN, "digest", "label"]).drop_null().to_pylist()
                )
        db.executemany(_GONE, gone)
        db.executemany(_SAY, said)
        return db.execute(_DUE).fetchall()


def done(path: Path) -> None:
    """Note that the shots of all photos are what the annotations say. Raises StoreError as :func:`note` does."""
    with _opened(path) as db:
        db.executescript(_DONE)
