"""HTML from Jinja2 templates, which lie beside the modules that fill them.

A value is escaped and on one line, characters that do not print, like those that turn the direction of writing, as
escapes; only what a template says itself is markup, and :func:`markup` of our own.
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
    from jinja2 import Environment, PackageLoader, StrictUndefined  # 0.1 s, so not before something is shown

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
    """Text that is HTML already: ours, never that of a name."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


def render(template: str, **values: object) -> str:
    """Fill a template of this package, given by its path within."""
    return _templates().get_template(template).render(values)


def table(
    columns: Sequence[object], rows: Iterable[Sequence[object]], caption: object = "", numbers: Collection[int] = ()
) -> str:
    """A table for a notebook, as ``table.html.j2`` says; it reads in light and in dark."""
    return str(_templates().get_template("table.html.j2").module.table(columns, rows, caption, numbers))  # type: ignore[attr-defined]
