"""Bounds of what is asked for: the most that each count may be, and memory, which is reckoned before it is taken."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from numbers import Integral
from pathlib import Path

from retrieval_tip.errors import UsageError

MANY = 2**31 - 1
"""The most of what is limited by what there is: keys, classes, versions, items."""
MOST = {
    "shots": 1_000_000,
    "views": 1024,
    "batch_size": 16_384,
    "workers": 1024,
    "epochs": 1_000_000,
    "batch": 1_000_000,
    "seeds": 10_000,
    "actors": 1024,
    "queue": 65_536,
    "seed": 2**63 - 1,
}
"""The most of each other count: beyond what anyone needs, and within what memory and the libraries take."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise UsageError unless a value is a whole number from ``least`` to the most of its kind."""
    most = MOST.get(name, MANY)
    if isinstance(value, Integral) and least <= int(value) <= most:
        return
    too_long = isinstance(value, Integral) and abs(int(value)) > 2**64  # Python itself refuses to write very long ones
    raise UsageError(f"{name} is {'too large' if too_long else value}: expected a whole number from {least} to {most}")


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise UsageError, with the figures, where so many bytes are more than this process can ever have."""
    there = memory()
    if there is not None and needed > there:
        raise UsageError(f"{what}: needs {_amount(needed)} of memory, and there are {_amount(there)}; {remedy}")


def memory() -> int | None:
    """Bytes of memory that this process may have: the machine's, or the least limit on it; ``None``: unknown."""
    sizes = [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    with suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _LIMITS:  # of the container
        with suppress(OSError, ValueError):
            sizes.append(int(Path(name).read_text("ascii")))
    return min((size for size in sizes if size > 0), default=None)


def _amount(size: int) -> str:
    """So many bytes, in the unit that people say."""
    power = min(max(0, (size.bit_length() - 1) // 10), len(_UNITS) - 1)
    return f"{size / 1024**power:.3g} {_UNITS[power]}"
