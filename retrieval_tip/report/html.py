"""HTML by construction: text becomes HTML by being escaped, and only what these functions made is not escaped again.

For notebooks and reports. No scripts, and no colours but those that are there: it reads in light and in dark.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

from retrieval_tip.errors import one_line

VOID = frozenset({"br", "hr", "img", "link", "meta"})
"""Elements without content or an end."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as text of a document or an attribute; :class:`Html` stays as it is.

    On one line, and characters that are not printable, like those that turn the direction of writing, as escapes.
    """
    return value if isinstance(value, Html) else Html(html.escape(one_line(str(value)), quote=True))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element. Content and attributes that are not :class:`Html` are escaped.

    ``None`` is left out, of attributes ``False`` too; ``True`` is an attribute without a value. A name in Python is one
    in HTML with hyphens for underscores, and none at its end: ``class_``, ``aria_label``.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            shown = key.rstrip("_").replace("_", "-")
            parts.append(shown if value is True else f'{shown}="{text(value)}"')
    start = f"<{' '.join(parts)}>"
    if name in VOID:
        return Html(start)
    return Html(f"{start}{join(content)}</{name}>")


def join(content: Iterable[object], between: str = "") -> Html:
    """Text and elements one after the other; ``None`` is left out."""
    return Html(text(between).join(text(part) for part in content if part is not None))


def table(
    columns: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: object = None,
    *,
    numbers: Collection[int] = (),
) -> Html:
    """A table with a row of headings, whose first cell of a row is its heading; without ``columns`` there is none.

    ``numbers`` are the columns, from 0, that are aligned to the right.
    """

    def cell(name: str, place: int, content: object, scope: str | None) -> Html:
        side = "right" if place in numbers else "left"
        return tag(name, content, scope=scope, style=f"text-align:{side};vertical-align:top")

    head = tag("thead", tag("tr", *(cell("th", i, column, "col") for i, column in enumerate(columns))))
    body = [
        tag("tr", *(cell("td" if i else "th", i, value, None if i else "row") for i, value in enumerate(row)))
        for row in rows
    ]
    title = None if caption is None else tag("caption", caption, style="caption-side:top;text-align:left")
    return tag("table", title, head if columns else None, tag("tbody", *body))
