"""The documentation site: ``make site`` builds it from these pages, with Sphinx and MyST."""

from retrieval_tip import __version__

project, author, release = "retrieval-tip", "the authors of retrieval-tip", __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"retrieval-tip {release}"
suppress_warnings = ["myst.header", "myst.xref_missing"]  # files of the repository that are no pages
