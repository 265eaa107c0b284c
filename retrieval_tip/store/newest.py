"""Remember the highest version of an index in a second place, so that the loss of its manifest is noticed.

``newest/000003-41`` is an empty file. Its name holds the highest version that was committed, and the next key id. It is
created after the manifest, and lower ones are deleted after that. So the highest version never goes down, also if two
writers in a bucket create their files in any order. If the folder is missing, no version counts as lost.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import NamedTuple

from retrieval_tip.store.files import StoreFiles
from retrieval_tip.store.manifest import manifest_name
from retrieval_tip.wording import command_line

FOLDER = "newest"
"""Name of the folder of these files."""

_NAME = re.compile(rf"{FOLDER}/(\d{{6,12}})-(\d{{1,16}})")


class Newest(NamedTuple):
    """The highest version that a store has had, and its next key id."""

    version: int = 0
    next_key_id: int = 1

    @classmethod
    def read(cls, files: StoreFiles) -> Newest:
        """Return the highest version. Read it before the manifests, because a commit may come in between.

        A folder that cannot be read counts as missing. Raises StoreError if a bucket cannot be read.
        """
        with suppress(OSError):
            return max(_all_of(files).values(), default=cls())
        return cls()

    def loss(self, place: object, current: int) -> str | None:
        """Return what to do if this version of the store at ``place`` is lost, or ``None`` if it is not.

        ``current`` is the highest version that has a manifest, or 0.
        """
        if self.version <= current:
            return None
        accept = command_line("index", "rollback", place, current)
        other = f"accept the loss: {accept}" if current else "build in another folder"
        lost = f"{place}/{manifest_name(self.version)}: is missing, but version {self.version} was written"
        return f"{lost}; restore the file, or {other}"

    def write(self, files: StoreFiles) -> None:
        """Note that this version was committed. Raises OSError or StoreError if the store refuses it."""
        files.put(f"{FOLDER}/{self.version:06d}-{self.next_key_id}", b"")
        files.flush(FOLDER)
        files.delete(name for name, newest in _all_of(files).items() if newest < self)


def _all_of(files: StoreFiles) -> dict[str, Newest]:
    matches = map(_NAME.fullmatch, files.sizes(FOLDER))
    return {match[0]: Newest(int(match[1]), int(match[2])) for match in matches if match}
