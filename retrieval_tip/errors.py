"""What can go wrong, said in one line: the file or argument, what is wrong with it, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Text on one line, without control characters that a terminal would obey, whatever names it holds."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error says, on one line: its first, or its type where it says nothing."""
    return one_line(str(error).strip().partition("\n")[0]) or type(error).__name__


def counted(number: int, what: str) -> str:
    """A number of things: ``1 key``, ``2 keys``, ``3 classes``."""
    return f"{number:,} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


@dataclass(frozen=True)
class Skipped:
    """One input that could not be read: its name, and the reason in a few words."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"
