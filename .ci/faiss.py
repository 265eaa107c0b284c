"""Choose the distribution of FAISS while the package is built: RETRIEVAL_TIP_FAISS=cpu leaves out CUDA's libraries.

An extra cannot remove a requirement, and the two distributions overwrite each other's files.
"""

from __future__ import annotations

import os
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Requirements(MetadataHookInterface):
    """Add FAISS to the requirements."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the requirements in the metadata of the package."""
        asked = os.environ.get("RETRIEVAL_TIP_FAISS") or "gpu"
        if asked not in ("gpu", "cpu"):
            raise ValueError(f"RETRIEVAL_TIP_FAISS is {asked!r}; use gpu or cpu")
        metadata["dependencies"] = [*self.config[asked], *self.config["dependencies"]]
