"""The names that files for camera traps give to photos, relative to the folder that contains them all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from retrieval_tip.data import remote
from retrieval_tip.errors import UsageError
from retrieval_tip.files import common_folders
from retrieval_tip.wording import show

if TYPE_CHECKING:
    from retrieval_tip.data.source import Source

ANIMAL = "animal"
"""The category of boxes that programs for camera traps classify."""


def root_of(inputs: Iterable[str], sources: Iterable[Source]) -> str:
    """Return the lowest folder that contains all folders among the inputs and all photos of the sources.

    Raises UsageError if they lie on several drives of Windows.
    """
    paths = (
        path for source in sources for path in source.paths or () if not remote.is_address(path)
    )
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    folders |= {os.path.abspath(one) for one in inputs if os.path.isdir(one)}
    root, *others = map(show, common_folders(folders or {os.getcwd()}))
    if others:
        raise UsageError(f"{others[0]}: not on the drive of {root}; classify one drive at a time")
    return root


def within(root: str, name: str) -> str:
    """Return the path of a photo relative to the root, or the address of a remote photo."""
    return name if remote.is_address(name) else show(os.path.relpath(name, root))
