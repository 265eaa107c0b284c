"""The documentation site: ``make site`` builds it from these pages, with Sphinx and MyST."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrieval_tip import __version__

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project, author, release = "retrieval-tip", "the authors of retrieval-tip", __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"retrieval-tip {release}"
suppress_warnings = ["myst.header", "myst.xref_missing"]  # files of the repository that are no pages
nitpicky = True  # a reference that leads nowhere is a warning


def setup(app: Sphinx) -> None:
    """Let references name their target by its end: ``sources.open_source``."""
    app.connect("missing-reference", by_end)


def by_end(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element) -> Element | None:
    """Resolve a reference to the only object whose full name ends with the given one."""
    if node.get("refdomain") != "py":
        return None
    node["refspecific"] = True
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, contnode
    )
