"""How numbers, names, paths and errors are worded in messages of one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from retrieval_tip import platforms

MAX_LINE = 1980
"""Maximum length of a message in characters. The middle of a longer message is cut."""


SHOWN = 5
"""Maximum number of names to list in a message."""


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


def counted(number: int, what: str, does: str = "", do: str = "") -> str:
    """Format a number with a noun and an optional verb, for example ``2 keys`` or ``1 class has``."""
    if number == 1:
        return f"1 {what} {does}".rstrip()
    ending = "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending} {do}".rstrip()


def span(interval: tuple[float, float]) -> str:
    """Format an interval of shares, for example ``87 to 95 %``."""
    low, high = interval
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def percent(share: float) -> str:
    """Format a share, for example ``92.5 %``. A share is never rounded to 0 or 100 %."""
    shown = f"{100 * share:.1f} %"
    if shown == "100.0 %" and share < 1:
        return ">99.9 %"
    if shown == "0.0 %" and share > 0:
        return "<0.1 %"
    return shown


def command_line(*arguments: object) -> str:
    """Return a command of this program as a user can type it into a shell."""
    return platforms.command_line(["retrieval-tip", *map(str, arguments)])


def show(path: str | os.PathLike[str]) -> str:
    """Return a path as valid UTF-8 text. Bytes that are not valid UTF-8 are escaped."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # the path contains half of a surrogate pair, which JSON allows
        return str(path).encode("utf-8", "backslashreplace").decode()


def amount(size: int) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
