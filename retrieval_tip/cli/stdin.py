"""Paths on standard input, where ``-`` is given."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

from retrieval_tip.errors import InputError

PATHS_READ = 1 << 20
"""Bytes of standard input that are read at a time."""
MAX_PATHS, MAX_PATHS_BYTES = 1 << 24, 1 << 30
"""Most paths on standard input, and most bytes."""


def paths_on_stdin() -> Iterator[str]:
    """One path a line, or separated by NUL (``find -print0``), whatever bytes they are made of.

    Raises InputError where standard input is closed, or has more than any list of images.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed; it has the paths where - is given")
    rest, paths, size, separator = b"", 0, 0, b""
    while block := sys.stdin.buffer.read(PATHS_READ):
        separator = separator or (b"\0" if b"\0" in block else b"\n")
        whole, ended, last = (rest + block).rpartition(separator)
        block_paths = re.findall(b"[^" + separator + b"]+", whole) if ended else []
        rest, paths, size = last, paths + len(block_paths), size + len(block)
        if paths > MAX_PATHS or size > MAX_PATHS_BYTES or len(rest) > PATHS_READ:
            raise InputError(
                f"standard input: more than {MAX_PATHS:,} paths or {MAX_PATHS_BYTES:,} bytes, or no paths at all; "
                "give a table of them"
            )
        yield from map(os.fsdecode, block_paths)
    if rest:
        yield os.fsdecode(rest)
