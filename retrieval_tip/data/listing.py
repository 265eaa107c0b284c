"""The common result of every image reader."""

from __future__ import annotations

from dataclasses import dataclass, field

from retrieval_tip.errors import Skipped


@dataclass
class Listing:
    """Images of a source, and inputs that ``failed``. ``classes`` orders the labels; ``None`` sorts them."""

    paths: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    classes: list[str] | None = None
    failed: list[Skipped] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Distinct labels in order."""
        return sorted({label for label in self.labels if label is not None}) if self.classes is None else self.classes
