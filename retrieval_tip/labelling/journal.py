"""Keep the labels of a session on disk until the index contains them.

A label is written to the journal before it is acknowledged. If the session is killed, or if the index cannot be
written, the next session saves the labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from retrieval_tip.errors import InputError, StoreError
from retrieval_tip.files import (
    cache_folder,
    lock,
    make_folders,
    read_regular,
    real,
    replacing,
    sync,
)
from retrieval_tip.index.added_photos import DROPPED
from retrieval_tip.index.places import Store
from retrieval_tip.wording import show

MOST_BYTES = 1 << 28
"""Maximum size of a journal in bytes."""

Entry = Mapping[str, str | None]
"""A line of a journal: the ``path`` and the ``digest`` of a photo, its ``label``, and how it was ``picked``.

A null label removes the label of the photo. A line without a label says that the last label of the photo is saved. The
digest is null if the photo cannot be read.
"""


class Journal:
    """The journal of one session: JSON lines in ``NAME-unsaved.jsonl`` next to the index, or in the cache folder.

    While the session runs, it holds a lock on the file, so that an index has one session at a time on a machine. The
    folder ``dropped`` beside it holds photos that were dropped on the session.
    """

    def __init__(self, store: Store) -> None:
        """Take over the journal of a session that has ended. ``entries`` are its labels by digest or path.

        Raises InputError if it is damaged, and StoreError if it cannot be read or its session still runs.
        """
        if store.local is not None:
            folder = real(store.local).parent
            name = store.name
        else:
            folder = (cache_folder() or Path(tempfile.gettempdir()) / "retrieval-tip") / "unsaved"
            name = f"{store.name}-{hashlib.sha256(store.resolved.encode()).hexdigest()[:8]}"
        self.path = folder / f"{name}-unsaved.jsonl"
        self._file = -1
        self.dropped = folder / f"{name}{DROPPED}"
        self.entries: dict[str, Entry] = {}
        if os.path.lexists(self.path):
            self._file = _locked(self.path)
            try:
                self.entries = _read(self.path, self._file)
            except BaseException:
                os.close(self._file)
                raise

    def hold(self) -> None:
        """Create and lock the file. Raises OSError if this fails, and StoreError if another session holds it."""
        if self._file < 0:
            make_folders(self.path.parent)
            self._file = _locked(self.path)
            sync(self.path.parent)

    def add(self, entries: Iterable[Entry]) -> None:
        """Append labels and flush them to the disk. Raises StoreError if this fails; the file is then unchanged."""
        raw = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        try:
            self.hold()
            before = os.fstat(self._file).st_size
            try:
                if os.write(self._file, raw) < len(raw):
                    raise OSError(0, "no space left on device")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, before)
                raise
        except OSError as error:
            raise StoreError(
                f"{show(self.path)}: cannot be written: {error.strerror}; the label is not saved"
            ) from None

    def saved(self, entries: Iterable[Entry], *, all_saved: bool) -> None:
        """Note that the index contains the labels of ``entries``."""
        if self._file >= 0:
            with suppress(
                OSError, StoreError
            ):  # on a full disk, the labels are saved again, which changes nothing
                if all_saved:
                    os.ftruncate(self._file, 0)
                else:
                    self.add(
                        {"path": entry["path"], "digest": entry["digest"]} for entry in entries
                    )

    def close(self, entries: Iterable[Entry]) -> None:
        """Remove the journal, unless there are ``entries`` that could not be saved."""
        if self._file < 0:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        with suppress(
            OSError, InputError
        ):  # otherwise, the journal keeps labels that the index already contains
            if lines:
                with replacing(self.path) as new:
                    new.write_bytes(lines.encode())
            else:
                self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1


def _locked(path: Path) -> int:
    """Open or create a journal, and lock it."""
    try:
        file = lock(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise StoreError(
            f"{show(path)}: cannot be opened: {error.strerror}; remove or rename it"
        ) from None
    if file is None:
        raise StoreError(
            f"{show(path)}: another session labels this index; use its page, or stop it first"
        )
    return file


def _read(path: Path, file: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    try:
        lines = (raw := read_regular(path, MOST_BYTES)).split(b"\n")
        os.ftruncate(
            file, len(raw) - len(lines[-1])
        )  # a line without an end was never acknowledged
    except OSError as error:
        raise StoreError(
            f"{show(path)}: cannot be read: {error.strerror}; restore its permissions"
        ) from None
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = json.loads(line)
            values = {name: entry.get(name) for name in ("path", "digest", "label", "picked")}
            if not isinstance(values["path"], str) or not all(
                isinstance(one, str | None) for one in values.values()
            ):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(
                f"{show(path)}: line {number} is not a label; remove the line"
            ) from None
        photo = values["digest"] or values["path"]
        entries.pop(photo, None)  # the last label decides the place
        if "label" in entry:
            entries[photo] = values
    return entries
