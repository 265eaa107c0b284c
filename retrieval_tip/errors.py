"""Errors, said in one line: the file or argument, what is wrong with it, and what to do."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

MAX_LINE = 1980
"""Characters of a message: of a longer one the middle is left out, so that its line has fewer than 2,000."""
SHOWN = 5
"""Names that a message lists."""


class RetrievalTipError(Exception):
    """Base of every error that this package raises on purpose. The command line prints it and exits with 1."""


class UsageError(RetrievalTipError, ValueError):
    """An argument or option that cannot work as given. The command line exits with 2."""


class InputError(RetrievalTipError, ValueError):
    """A file or array that was given as input and cannot be used."""


class BackboneError(RetrievalTipError):
    """A backbone that cannot be loaded, or is not the one that the features came from."""


class StoreError(RetrievalTipError):
    """An index folder that is missing, damaged, of another format, or cannot be written."""


def one_line(text: str) -> str:
    """Text on one line, without characters that a terminal would obey, whatever names it holds.

    Escaped is what is not printable: ends of lines, control characters (C0 and C1), marks that turn the direction of
    text, and what is invisible.
    """
    return _escaped(text, lambda character: character.encode("unicode_escape").decode())


def json_line(value: Any) -> str:
    """A value as JSON on one line, as safe as :func:`one_line`: all that is escaped stands in strings, so none changes.

    What JSON does not have is text.
    """
    return _escaped(json.dumps(value, ensure_ascii=False, default=str), lambda character: json.dumps(character)[1:-1])


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    if text.isprintable():
        return text
    return text.translate({ord(character): escape(character) for character in set(text) if not character.isprintable()})


def message(text: str) -> str:
    """Text as standard error gets it: on one line, and no longer than :data:`MAX_LINE`, whatever it quotes."""
    return _shortened(one_line(_shortened(text)))


def _shortened(text: str) -> str:
    """Text without its middle where it is too long: what it is about stands at the start, what to do at the end."""
    rest = MAX_LINE // 3
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - rest - 5]} ... {text[-rest:]}"


def few(names: Sequence[str]) -> str:
    """The first names of many, on one line."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def first_line(error: BaseException) -> str:
    """The text of an error, on one line: its first, or its type where it says nothing."""
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__


@cache
def warn_once(text: str) -> None:
    """Say something as a warning, the first time in a process."""
    logging.getLogger(__name__).warning(text)


def counted(number: int, what: str, does: str = "", do: str = "") -> str:
    """A number of things, and what they do: ``1 key``, ``2 keys``, ``1 class has``, ``3 classes have``."""
    things = f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")
    return f"{things} {does if number == 1 else do}".rstrip()


@dataclass(frozen=True)
class Skipped:
    """One input that could not be read: its name, and the reason in a few words."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def show(path: str | os.PathLike[str]) -> str:
    """A path as text that every terminal and file format can hold, whatever bytes it is made of."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, from JSON
        return str(path).encode("utf-8", "backslashreplace").decode()
