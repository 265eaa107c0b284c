"""The result type that all image readers share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from retrieval_tip.errors import Skipped


@dataclass
class Listing:
    """The images of a source, and the inputs that ``failed``.

    ``classes`` gives the order of the labels. If it is ``None``, the labels are sorted.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    classes: list[str] | None = None
    failed: list[Skipped] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """The distinct labels, in order."""
        return sorted({label for label in self.labels if label is not None}) if self.classes is None else self.classes

    def labelled(self) -> Listing:
        """Return the images that have a label."""
        kept = [place for place, label in enumerate(self.labels) if label is not None]
        return replace(self, paths=[self.paths[i] for i in kept], labels=[self.labels[i] for i in kept])
