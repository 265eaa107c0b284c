"""The errors of the package, and what is reported instead of an error."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from numbers import Integral

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


@cache
def warn_once(text: str) -> None:
    """Log a warning, but only once per process."""
    logging.getLogger(__name__).warning(text)


@dataclass(frozen=True)
class Skipped:
    """An input that could not be read, and the reason."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise UsageError if a value is not a whole number between ``least`` and its upper bound."""
    most = MOST.get(name, MANY)
    if isinstance(value, Integral) and least <= int(value) <= most:
        return
    if isinstance(value, Integral) and abs(int(value)) > 2**64:
        value = "too large"  # Python cannot print very long integers
    raise UsageError(f"{name} is {value}: expected a whole number from {least} to {most}")
