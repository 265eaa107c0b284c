"""HTML from Jinja2 templates, which lie beside the modules that fill them.

Values are escaped and put on one line, with unprintable characters (control characters, marks that reverse the
direction of text) as escapes. Only the templates and :func:`markup` produce markup.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from retrieval_tip.errors import one_line

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # takes 0.1 s, so only on demand

    return Environment(
        loader=PackageLoader("retrieval_tip", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if hasattr(value, "__html__") else one_line(str(value)),
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )


def markup(text: str) -> Markup:
    """Mark text of our own as HTML; never a name or any other input."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


def render(template: str, **values: object) -> str:
    """Fill a template, given by its path within this package."""
    return _templates().get_template(template).render(values)


def table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], caption: object = "", numbers: Collection[int] = ()
) -> str:
    """Return an HTML table for a notebook (``table.html.j2``), legible on light and dark backgrounds."""
    return str(_templates().get_template("table.html.j2").module.table(columns, rows, caption, numbers))  # type: ignore[attr-defined]
