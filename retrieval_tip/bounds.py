"""Checks of counts, and of the memory that an operation needs."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from numbers import Integral
from pathlib import Path

from retrieval_tip.errors import UsageError

MANY = 2**31 - 1
"""Upper bound for counts that only depend on the data, such as keys, classes, versions and items."""
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
"""Upper bounds for other counts. They are higher than anyone needs, but low enough for the libraries and for memory."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise UsageError if a value is not a whole number between ``least`` and its upper bound."""
    most = MOST.get(name, MANY)
    if isinstance(value, Integral) and least <= int(value) <= most:
        return
    too_long = isinstance(value, Integral) and abs(int(value)) > 2**64  # Python cannot print very long integers
    raise UsageError(f"{name} is {'too large' if too_long else value}: expected a whole number from {least} to {most}")


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise UsageError if ``needed`` bytes exceed the memory that is available to this process."""
    there = memory()
    if there is not None and needed > there:
        raise UsageError(f"{what}: needs {_amount(needed)} of memory, but only {_amount(there)} is available; {remedy}")


def memory() -> int | None:
    """Return the memory that is available to this process, in bytes, or ``None`` if it is unknown."""
    sizes = [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    with suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _LIMITS:  # limits of the container
        with suppress(OSError, ValueError):
            sizes.append(int(Path(name).read_text("ascii")))
    return min((size for size in sizes if size > 0), default=None)


def _amount(size: int) -> str:
    power = min(max(0, (size.bit_length() - 1) // 10), len(_UNITS) - 1)
    return f"{size / 1024**power:.3g} {_UNITS[power]}"
