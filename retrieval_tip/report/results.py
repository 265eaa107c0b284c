"""The data from which a report is made."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import show
from retrieval_tip.evaluation.evaluate import Answers, Evaluation, Recognition
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.model import Index


class ClassScore(NamedTuple):
    """The answers to the ``n`` test photos of a class.

    ``right`` counts the right answers, and ``shots`` the examples in the index. ``answer`` is the most frequent wrong
    answer, which was given ``times`` times.
    """

    name: str
    right: int
    n: int
    shots: int
    answer: str
    times: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.right / self.n, self.n)


@dataclass(frozen=True)
class Results:
    """A test source with the answers of an index, and the arguments of :func:`report.write_report`.

    ``block`` and ``evaluation`` only cover the ``n`` readable items of known classes that are not shots of the index,
    and ``recognition`` also covers unknown classes. ``shots`` items were left out because they are shots.
    """

    index: Index
    test: Source
    reader: Reader
    block: FeatureBlock
    evaluation: Evaluation
    folder: Path | None
    where: str | None
    command: str | None
    recognition: Recognition
    shots: int

    @property
    def answers(self) -> Answers:
        """The answers for the ``n`` items."""
        return self.evaluation.answers

    @cached_property
    def by_class(self) -> list[ClassScore]:
        """The classes of the test photos, weakest class first."""
        names, truth, predicted = self.index.class_names, self.answers.truth, self.answers.predicted
        scores = []
        for i in np.unique(truth).tolist():
            given = Counter(predicted[truth == i].tolist())
            right, n = given.pop(i, 0), int((truth == i).sum())
            answer, times = given.most_common(1)[0] if given else (i, 0)
            scores.append(ClassScore(names[i], right, n, self.index.counts[i], names[answer], times))
        return sorted(scores, key=lambda score: (score.right / score.n, -score.n))

    def record(self, name: str) -> dict[str, object]:
        """Return what the index records about ``search`` or ``finetune``, or an empty dict if it records nothing."""
        kept = self.index.provenance.get(name)
        return kept if isinstance(kept, dict) else {}

    @property
    def is_tuned(self) -> bool:
        """Whether the keys are fine-tuned."""
        trained = self.index.values is not None and self.index.fitted is None
        return bool(self.record("finetune")) or self.index.curve is not None or trained


def portable(text: str | os.PathLike[str]) -> str:
    """Shorten the absolute paths in a text, so that a report does not reveal local folders.

    A path becomes relative to the working directory. If the path is outside, only its last two parts are kept, without
    the home directory.
    """
    return re.sub(r"(?:^|(?<=[\s:=(',\"])|(?<=://))/(?=[^/\s])[^:,'\"]*", _shortened, show(text))


def _shortened(path: re.Match[str]) -> str:
    full, here, home = Path(path[0]), Path.cwd(), Path.home()
    if full.is_relative_to(here):
        return str(full.relative_to(here))
    return str(Path(*(full.relative_to(home) if full.is_relative_to(home) else full).parts[-2:]))
