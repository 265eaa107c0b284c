"""What this program has written to an Immich server, and what it knows about the photos there.

A suggestion is written down before it is sent, and its answer afterwards, so that a kill between both loses nothing.
The database is in a folder beside an index, and belongs to one user of one server.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.errors import InputError
from retrieval_tip.files import make_folders
from retrieval_tip.plugins.immich.client import Asset
from retrieval_tip.wording import show

SENT, WRITTEN, THEIRS = "sent", "written", "theirs"
"""States of a suggestion: no answer yet; Immich has written it; the user had put the tag on already."""
ACCEPTED, REJECTED, LOST, HIDDEN = "accepted", "rejected", "lost", "hidden"
"""Later states: the user gave the photo the class; the user took the suggestion off; Immich lost it, or the user
deleted the tag; the photo is archived or in the trash."""
OURS = (SENT, WRITTEN, LOST, HIDDEN)
"""States in which a photo may have a tag that this program has written."""
STATES = (*OURS, THEIRS, ACCEPTED, REJECTED)
"""All states. A photo that has one gets no other suggestion, unless that is undone."""

_CREATE = """
CREATE TABLE IF NOT EXISTS facts (name PRIMARY KEY, value);
CREATE TABLE IF NOT EXISTS photos (
    asset PRIMARY KEY, look, created, updated, external, name, encoder, feature BLOB
);
CREATE TABLE IF NOT EXISTS tags (path PRIMARY KEY);
CREATE TABLE IF NOT EXISTS suggestions (
    asset, class, tag, state, probability, PRIMARY KEY (asset, class)
);
"""


_ASSET = ", ".join(Asset._fields).replace("id", "asset", 1)


class Suggestion(NamedTuple):
    """A class that this program suggests for a photo, and what became of it."""

    asset: str
    label: str
    tag: str
    state: str
    probability: float


def place_of(index: Path) -> Path:
    """Return the file of the ledger of an index. A new index needs an empty folder, so it is in another one."""
    return Path(f"{index.absolute()}-immich") / "ledger.sqlite"


class Ledger:
    """An open database."""

    def __init__(self, index: Path) -> None:
        """Open the database of an index, or create one. Raises InputError if it cannot be used."""
        self.path = place_of(index)
        make_folders(self.path.parent)
        try:
            self._db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._db.executescript(_CREATE)
        except sqlite3.Error as error:
            raise InputError(f"{show(self.path)}: cannot be used ({error})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def _at_once(self) -> Iterator[sqlite3.Connection]:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db

    def fact(self, name: str) -> str | None:
        """Return a fact about the server or the last run."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def remember(self, **facts: str) -> None:
        """Keep facts in place of earlier ones."""
        with self._at_once() as db:
            db.executemany("REPLACE INTO facts VALUES (?, ?)", facts.items())

    def belongs_to(self, url: str, owner: str) -> None:
        """Keep whose photos these are. Raises InputError if they are those of another user or server."""
        if self.fact("owner") not in (None, owner):
            raise InputError(
                f"{show(self.path)}: belongs to another user at {self.fact('url')}; choose another --out"
            )
        self.remember(url=url, owner=owner)

    def see(self, assets: Iterable[Asset]) -> None:
        """Keep photos. The feature of a photo whose picture has changed is forgotten."""
        with self._at_once() as db:
            db.executemany(
                """
                INSERT INTO photos (asset, look, created, updated, external, name)
                VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (asset) DO UPDATE SET
                    feature = iif(look = excluded.look, feature, NULL), look = excluded.look,
                    updated = excluded.updated, name = excluded.name
                """,
                assets,
            )

    def forget(self, assets: Iterable[str]) -> None:
        """Forget photos that the server no longer shows."""
        with self._at_once() as db:
            db.executemany("DELETE FROM photos WHERE asset = ?", [(asset,) for asset in assets])

    def photos(self) -> dict[str, Asset]:
        """Return all photos by their id."""
        rows = self._db.execute(f"SELECT {_ASSET} FROM photos")  # noqa: S608 - a constant
        return {row[0]: Asset(*row) for row in rows}

    def without_feature(self, encoder: str) -> list[Asset]:
        """Return the photos that an encoder has not encoded."""
        missing = f"SELECT {_ASSET} FROM photos WHERE feature IS NULL OR encoder != ?"  # noqa: S608
        rows = self._db.execute(missing, (encoder,))
        return [Asset(*row) for row in rows]

    def keep_features(self, encoder: str, features: Mapping[str, FloatArray]) -> None:
        """Keep the features that an encoder made of photos."""
        rows = [(encoder, feature.tobytes(), asset) for asset, feature in features.items()]
        with self._at_once() as db:
            db.executemany("UPDATE photos SET encoder = ?, feature = ? WHERE asset = ?", rows)

    def features(self, encoder: str) -> Iterator[tuple[str, FloatArray]]:
        """Yield the features of an encoder with the ids of their photos."""
        rows = self._db.execute(
            "SELECT asset, feature FROM photos WHERE encoder = ? AND feature IS NOT NULL",
            (encoder,),
        )
        for asset, feature in rows:
            yield asset, np.frombuffer(feature, np.float32)

    def suggestions(self, *states: str) -> list[Suggestion]:
        """Return the suggestions in some states."""
        marks = ", ".join("?" * len(states))
        query = f"SELECT * FROM suggestions WHERE state IN ({marks}) ORDER BY rowid"  # noqa: S608
        return [Suggestion(*row) for row in self._db.execute(query, states)]

    def add(self, suggestions: Iterable[Suggestion]) -> None:
        """Write down suggestions, before they are sent."""
        with self._at_once() as db:
            db.executemany("INSERT INTO suggestions VALUES (?, ?, ?, ?, ?)", suggestions)

    def settle(self, suggestions: Iterable[Suggestion], state: str | None) -> None:
        """Set the state of suggestions, or forget them if it is ``None``."""
        keys = [(suggestion.asset, suggestion.label) for suggestion in suggestions]
        with self._at_once() as db:
            if state is None:
                db.executemany("DELETE FROM suggestions WHERE asset = ? AND class = ?", keys)
            else:
                change = "UPDATE suggestions SET state = ? WHERE asset = ? AND class = ?"
                db.executemany(change, [(state, *key) for key in keys])

    def made_tags(self) -> list[str]:
        """Return the paths of the tags that this program has created, or was about to create."""
        return [path for (path,) in self._db.execute("SELECT path FROM tags ORDER BY path")]

    def begin_tag(self, path: str) -> None:
        """Write down that a tag does not exist, before it is created."""
        with self._at_once() as db:
            db.execute("REPLACE INTO tags VALUES (?)", (path,))

    def forget_tag(self, path: str) -> None:
        """Forget a tag that was deleted."""
        with self._at_once() as db:
            db.execute("DELETE FROM tags WHERE path = ?", (path,))
