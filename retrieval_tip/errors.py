"""Errors, helpers for messages of one line, and checks of counts and of the memory that an operation needs."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

MAX_LINE = 1980
"""Maximum length of a message in characters. The middle of a longer message is cut."""
SHOWN = 5
"""Maximum number of names to list in a message."""
MANY = 2**31 - 1
"""Upper bound for counts that only depend on the data, such as keys, classes, versions and items."""
MOST = {
    "shots": 1_000_000,
    "views": 1024,
    "batch_size": 16_384,
    "workers": 1024,
    "epochs": 1_000_000,
    "seed": 2**63 - 1,
}
"""Upper bounds for other counts. They are higher than anyone needs, but low enough for the libraries and for memory."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class RetrievalTipError(Exception):
    """Base class for all errors of the package. The command line prints the message and exits with status 1."""


class UsageError(RetrievalTipError, ValueError):
    """Raised when an argument or option is invalid. The command line exits with status 2."""


class InputError(RetrievalTipError, ValueError):
    """Raised when an input file or array cannot be used."""


class BackboneError(RetrievalTipError):
    """Raised when a backbone cannot be loaded, or when the features were computed by a different backbone."""


class StoreError(RetrievalTipError):
    """Raised when an index folder is missing or damaged, has an unknown format, or cannot be written."""


def one_line(text: str) -> str:
    """Escape unprintable characters, such as line breaks, control characters and invisible marks."""
    return _escaped(text, lambda character: character.encode("unicode_escape").decode())


def json_line(value: Any) -> str:
    """Format a value as JSON on a single line, and escape unprintable characters as JSON escapes.

    Values that JSON does not support are converted to strings.
    """
    return _escaped(
        json.dumps(value, ensure_ascii=False, default=str),
        lambda character: json.dumps(character)[1:-1],
    )


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return text.translate(
        {
            ord(character): escape(character)
            for character in set(text)
            if not character.isprintable()
        }
    )


def message(text: str) -> str:
    """Format text for standard error, as a single line of at most :data:`MAX_LINE` characters."""
    return _shortened(one_line(_shortened(text)))


def _shortened(text: str) -> str:
    rest = MAX_LINE // 3
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - rest - 5]} ... {text[-rest:]}"


def few(names: Sequence[str], total: int | None = None) -> str:
    """Join the first few of ``total`` names, by default all given names, and add the number of remaining names."""
    if total is None:
        total = len(names)
    shown = ", ".join(names[:SHOWN])
    return shown if total <= SHOWN else f"{shown} and {total - SHOWN:,} more"


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the type of the error if the message is empty."""
    line = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
    if re.search("weights.only", line, re.IGNORECASE):  # torch and timm advise to run the code
        return "it is damaged, or contains code, which is never run; use another copy"
    return line


@cache
def warn_once(text: str) -> None:
    """Log a warning, but only once per process."""
    logging.getLogger(__name__).warning(text)


def counted(number: int, what: str, does: str = "", do: str = "") -> str:
    """Format a number with a noun and an optional verb, for example ``2 keys`` or ``1 class has``."""
    if number == 1:
        return f"1 {what} {does}".rstrip()
    ending = "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending} {do}".rstrip()


def percent(share: float) -> str:
    """Format a share, for example ``92.5 %``. A share is never rounded to 0 or 100 %."""
    shown = f"{100 * share:.1f} %"
    if shown == "100.0 %" and share < 1:
        return ">99.9 %"
    if shown == "0.0 %" and share > 0:
        return "<0.1 %"
    return shown


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


def command_line(*words: object) -> str:
    """Return a command of this program as a user can type it into a shell."""
    return shlex.join(["retrieval-tip", *map(str, words)])


def pip(arguments: str) -> str:
    """Return the shell command that runs pip with ``arguments`` in the environment of this process."""
    python = shlex.quote(sys.executable)
    if find_spec("pip") is None:  # in environments from uv
        return f"uv pip {arguments} --python {python}"
    found = shutil.which("pip")
    active = found is not None and Path(found).parent == Path(sys.executable).parent
    return f"pip {arguments}" if active else f"{python} -m pip {arguments}"


def install(extra: str) -> str:
    """Return the shell command that installs the packages of an extra.

    The command works wherever this package was installed from, and never replaces this package or its FAISS.
    """
    from importlib.metadata import PackageNotFoundError, requires  # slow

    try:
        needed = [
            one
            for one in requires("retrieval-tip") or []
            if re.search(f"extra == ['\"]{extra}['\"]", one)
        ]
    except PackageNotFoundError:  # a clone on the path
        return pip("install " + shlex.quote(f"{Path(__file__).parent.parent}[{extra}]"))
    return pip("install " + shlex.join(one.partition(";")[0].strip() for one in needed))


@dataclass(frozen=True)
class Skipped:
    """An input that could not be read, and the reason."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def show(path: str | os.PathLike[str]) -> str:
    """Return a path as valid UTF-8 text. Bytes that are not valid UTF-8 are escaped."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # the path contains half of a surrogate pair, which JSON allows
        return str(path).encode("utf-8", "backslashreplace").decode()


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise UsageError if a value is not a whole number between ``least`` and its upper bound."""
    most = MOST.get(name, MANY)
    if isinstance(value, Integral) and least <= int(value) <= most:
        return
    if isinstance(value, Integral) and abs(int(value)) > 2**64:
        value = "too large"  # Python cannot print very long integers
    raise UsageError(f"{name} is {value}: expected a whole number from {least} to {most}")


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise UsageError if ``needed`` bytes exceed the memory that is available to this process."""
    there = memory()
    if there is not None and needed > there:
        raise UsageError(
            f"{what}: needs {amount(needed)} of memory, but only {amount(there)} is available; {remedy}"
        )


def memory() -> int | None:
    """Return the memory that is available to this process, in bytes, or ``None`` if it is unknown."""
    sizes = [
        limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY
    ]
    with suppress(OSError, ValueError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in _LIMITS:  # limits of the container
        with suppress(OSError, ValueError):
            sizes.append(int(Path(name).read_text("ascii")))
    return min((size for size in sizes if size > 0), default=None)


def amount(size: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
