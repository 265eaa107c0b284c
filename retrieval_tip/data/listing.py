"""What every reader of images returns: paths, labels, and the files that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field

from retrieval_tip.errors import Skipped


@dataclass
class Listing:
    """Images of a source in order: the path and the label of each, and inputs that ``failed``.

    ``classes`` are the labels in their own order; ``None`` sorts those that occur.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    classes: list[str] | None = None
    failed: list[Skipped] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Labels in order, each once."""
        return sorted({label for label in self.labels if label is not None}) if self.classes is None else self.classes
