"""The format for programs that manage photos: an XMP sidecar with keywords beside each photo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from retrieval_tip.errors import UsageError
from retrieval_tip.hooks import option
from retrieval_tip.wording import show
from retrieval_tip.writers import Answered, Outcome, Wants

if TYPE_CHECKING:
    from retrieval_tip.data.source import Source


@dataclass(frozen=True)
class XMP:
    """The label of each photo and of its boxes as keywords in its XMP sidecar.

    The sidecar is photo.jpg.xmp, or an existing photo.xmp.

    Options:
        uncertain: Keyword for photos without a label or a match. [default: none]
    """

    wants: ClassVar[Wants] = Wants()
    uncertain: str | None = option(metavar="KEYWORD")

    def check(self, out: Path | None) -> None:
        """Raise UsageError if there is a file to write."""
        if out is not None:
            raise UsageError("--format xmp: writes a sidecar beside each photo; leave out --out")

    def write(self, answers: Answered, out: Path | None) -> Outcome:
        """Write the keywords. Sidecars that cannot be changed are skipped. Raises UsageError for other than files."""
        from retrieval_tip.labelling.sort import check_files
        from retrieval_tip.plugins.xmp.sidecars import write_labels

        check_files(answers.photos, "--format xmp", "they have no sidecars")
        paths = {show(path): path for source in answers.photos for path in source.paths or ()}
        paths |= {show(name): path for name, (path, _) in answers.boxes.boxes.items()}
        keywords = (
            (paths.get(row["input"]) or row["input"], self._keyword(row)) for row in answers.rows
        )
        return write_labels(keywords, answers.groups)

    def _keyword(self, row: Mapping[str, Any]) -> str | None:
        from retrieval_tip.labelling.labels import NONE

        if row["probability"] is None:  # it was not classified
            return None
        label: str | None = row["label"]
        return self.uncertain if label in (None, NONE) or row["no_match"] else label

    def undo(self, photos: Sequence[Source]) -> Outcome:
        """Restore the sidecars as they were before the first keyword was written."""
        from retrieval_tip.plugins.xmp.sidecars import undo_sidecars

        return undo_sidecars(path for source in photos for path in source.paths or ())
