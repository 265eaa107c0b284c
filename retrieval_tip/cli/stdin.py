"""Read paths from standard input, for commands whose input is ``-``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

from retrieval_tip.errors import InputError

PATHS_READ = 1 << 20
"""Number of bytes to read at a time, which is also the maximum length of a path."""
MAX_PATHS, MAX_PATHS_BYTES = 1 << 24, 1 << 30
"""Maximum number of paths and maximum number of bytes on standard input."""


def paths_on_stdin() -> Iterator[str]:
    """Yield the paths on standard input, one per line or separated by NUL characters (as by ``find -print0``).

    Paths can contain any bytes. Raises InputError if standard input is closed, or exceeds the limits.
    """
    if sys.stdin is None:
        raise InputError("standard input: is closed; send paths to it, or name the files instead of -")
    rest, paths, size, separator = b"", 0, 0, b""
    while block := sys.stdin.buffer.read(PATHS_READ):
        separator = separator or (b"\0" if b"\0" in block else b"\n")
        whole, ended, last = (rest + block).rpartition(separator)
        block_paths = re.findall(b"[^" + separator + b"]+", whole) if ended else []
        rest, paths, size = last, paths + len(block_paths), size + len(block)
        if paths > MAX_PATHS or size > MAX_PATHS_BYTES or len(rest) > PATHS_READ:
            raise InputError(
                f"standard input: contains more than {MAX_PATHS:,} paths or {MAX_PATHS_BYTES:,} bytes, or no paths; "
                "give a table of paths"
            )
        yield from map(os.fsdecode, block_paths)
    if rest:
        yield os.fsdecode(rest)
