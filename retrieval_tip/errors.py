"""Errors, and helpers that keep messages on one line."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

MAX_LINE = 1980
"""Largest length of a message; a longer one loses its middle, so that a line stays below 2,000 characters."""
SHOWN = 5
"""Number of names in a message."""


class RetrievalTipError(Exception):
    """Base of the package's errors. The command line prints them and exits with 1."""


class UsageError(RetrievalTipError, ValueError):
    """An argument or option is invalid. The command line exits with 2."""


class InputError(RetrievalTipError, ValueError):
    """An input file or array cannot be used."""


class BackboneError(RetrievalTipError):
    """A backbone cannot be loaded, or is not the one that made the features."""


class StoreError(RetrievalTipError):
    """An index folder is missing, damaged, of another format, or cannot be written."""


def one_line(text: str) -> str:
    """Escape unprintable characters: line ends, control characters (C0 and C1), bidirectional and invisible marks."""
    return _escaped(text, lambda character: character.encode("unicode_escape").decode())


def json_line(value: Any) -> str:
    """Format a value as JSON on one line, escaped like :func:`one_line` without changing any value.

    Values that JSON cannot express become strings.
    """
    return _escaped(json.dumps(value, ensure_ascii=False, default=str), lambda character: json.dumps(character)[1:-1])


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return text.translate({ord(character): escape(character) for character in set(text) if not character.isprintable()})


def message(text: str) -> str:
    """Return text for standard error: on one line of at most :data:`MAX_LINE` characters."""
    return _shortened(one_line(_shortened(text)))


def _shortened(text: str) -> str:
    """Cut the middle of a long text, since it starts with its subject and ends with what to do."""
    rest = MAX_LINE // 3
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - rest - 5]} ... {text[-rest:]}"


def few(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its type if it has no text."""
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__


@cache
def warn_once(text: str) -> None:
    """Log a warning once per process."""
    logging.getLogger(__name__).warning(text)


def counted(number: int, what: str, does: str = "", do: str = "") -> str:
    """Return a number with its noun and verb: ``1 key``, ``2 keys``, ``1 class has``, ``3 classes have``."""
    things = f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")
    return f"{things} {does if number == 1 else do}".rstrip()


@dataclass(frozen=True)
class Skipped:
    """An input that could not be read, and a short reason."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def show(path: str | os.PathLike[str]) -> str:
    """Return a path of any bytes as valid UTF-8 text."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, from JSON
        return str(path).encode("utf-8", "backslashreplace").decode()
