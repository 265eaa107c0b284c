"""Render HTML from Jinja2 templates, which are stored next to the modules that use them.

All values are written on one line and escaped, including unprintable characters. Only templates and :func:`markup` can
add markup.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from retrieval_tip.wording import one_line

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@cache
def _templates() -> Environment:
    from jinja2 import (
        Environment,
        PackageLoader,
        StrictUndefined,
    )  # this import takes 0.1 s, so it is done on demand

    return Environment(
        loader=PackageLoader("retrieval_tip", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else one_line(str(value)),
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )


def data_url(jpeg: bytes) -> str:
    """Return the address of a JPEG image that contains the image itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def markup(text: str) -> Markup:
    """Mark trusted text as HTML. Never use this for names or other user input."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


def render(template: str, **values: object) -> str:
    """Render a template. ``template`` is its path within this package."""
    return _templates().get_template(template).render(values)


def table(
    columns: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: object = "",
    numbers: Collection[int] = (),
) -> str:
    """Render an HTML table for a notebook, legible on light and dark backgrounds."""
    macros = _templates().get_template("table.html.j2").module
    return str(macros.table(columns, rows, caption, numbers))  # type: ignore[attr-defined]
