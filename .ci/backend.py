"""Build the package with hatchling. The machine that builds a wheel decides which FAISS it requires.

An extra cannot remove a requirement, and the two distributions of FAISS overwrite each other's files.
"""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path
from typing import Any

from hatchling.build import *  # noqa: F403  (the functions that pip, uv and build call)
from hatchling.build import build_sdist as _build_sdist
from hatchling.metadata.plugin.interface import MetadataHookInterface

CHOICE = "RETRIEVAL_TIP_FAISS"
UNDECIDED = "undecided"
"""Value of ``CHOICE`` while a source distribution is built: it must leave the choice to the machine it reaches."""


def build_sdist(directory: str, settings: dict[str, Any] | None = None) -> str:
    """Build a source distribution whose requirements are dynamic."""
    os.environ[CHOICE] = UNDECIDED
    return _build_sdist(directory, settings)


class Metadata(MetadataHookInterface):
    """Add the text for PyPI, the addresses and the requirements."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the dynamic fields of the package.

        hatchling skips this hook in an unpacked source distribution that states every dynamic field, so the addresses
        are dynamic too.
        """
        urls = self.config["urls"]
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute(
                Path(self.root, "README.md").read_text(encoding="utf-8"),
                urls["Repository"],
                f"v{metadata['version']}",
            ),
        }
        choice = os.environ.get(CHOICE)
        if choice == UNDECIDED:
            return
        driver = runpy.run_path(str(Path(self.root, "retrieval_tip", "driver.py")))
        faiss = driver["faiss_distribution"](choice) + self.config["faiss"]
        metadata["urls"] = urls
        metadata["dependencies"] = [faiss, *self.config["dependencies"]]


def absolute(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose pictures and links to files of the repository also work elsewhere."""
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{repository}/raw/{tag}/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{repository}/blob/{tag}/", text)
