"""Sphinx configuration of the documentation site, which ``make site`` builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrieval_tip import __version__

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project, author, release = "retrieval-tip", "the authors of retrieval-tip", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"retrieval-tip {release}"
suppress_warnings = [
    "myst.header",
    "myst.xref_missing",
]  # pages link to repository files that are not pages


def setup(app: Sphinx) -> None:
    """Resolve short references such as ``sources.open_source`` or, on the site, ``open_source``."""
    app.connect("missing-reference", by_end)


def by_end(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element
) -> Element | None:
    """Resolve a reference to the only object whose full name ends with the given name."""
    if node.get("refdomain") != "py":
        return None
    node["refspecific"] = True
    targets = [node["reftarget"]]
    if not app.config.nitpicky:  # the site documents public names that do not include their modules
        targets.append(targets[0].rpartition(".")[2])
    for target in targets:
        found = env.domains["py"].resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], target, node, contnode
        )
        if found is not None:
            return found
    return None
