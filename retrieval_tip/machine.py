"""What this machine has: memory, installed packages, and the commands that install more."""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from retrieval_tip import platforms
from retrieval_tip.errors import UsageError
from retrieval_tip.wording import amount

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, or ``None`` if it is not installed."""
    from importlib.metadata import (
        PackageNotFoundError,
        version,
    )  # takes 20 ms, which --help does not need

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip(arguments: str) -> str:
    """Return the shell command that runs pip with ``arguments`` in the environment of this process."""
    python = platforms.quote(sys.executable)
    if find_spec("pip") is None:  # in environments from uv
        return f"uv pip {arguments} --python {python}"
    path = shutil.which("pip")
    active = path is not None and Path(path).parent == Path(sys.executable).parent
    return f"pip {arguments}" if active else f"{python} -m pip {arguments}"


def install(extra: str) -> str:
    """Return the shell command that installs the packages of an extra.

    The command works wherever this package was installed from, and never replaces this package or its FAISS.
    """
    from importlib.metadata import PackageNotFoundError, requires  # slow

    try:
        needed = [
            requirement
            for requirement in requires("retrieval-tip") or []
            if re.search(f"extra == ['\"]{extra}['\"]", requirement)
        ]
    except PackageNotFoundError:  # a clone on the path
        return pip("install " + platforms.quote(f"{Path(__file__).parent.parent}[{extra}]"))
    return pip(
        "install "
        + platforms.command_line([requirement.partition(";")[0].strip() for requirement in needed])
    )


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise UsageError if ``needed`` bytes exceed the memory that is available to this process."""
    there = memory()
    if there is not None and needed > there:
        raise UsageError(
            f"{what}: needs {amount(needed)} of memory, but only {amount(there)} is available; {remedy}"
        )


def memory() -> int | None:
    """Return the memory that is available to this process, in bytes, or ``None`` if it is unknown."""
    sizes = platforms.memory_limits()
    for name in _LIMITS:  # limits of the container
        with suppress(OSError, ValueError):
            sizes.append(int(Path(name).read_text("ascii")))
    return min((size for size in sizes if size > 0), default=None)
