"""Summarise a report in a few sentences, and recommend what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import counted, percent
from retrieval_tip.evaluation.audit import AUDITED, audit
from retrieval_tip.evaluation.compare import differ
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.report.judged import JudgedIndex, portable

SURE = 0.9
"""Minimum probability of a confident prediction."""
WEAK, NAMED = 0.5, 3
"""Accuracy below which a class always counts as weak, and the maximum number of weak classes to list."""
MISCALIBRATED = 0.05
"""Difference between the mean probability and the accuracy from which a calibration is recommended."""

EXAMPLES, CLASS_NAMES = "examples only", "class names only"
"""Names of the ways of classifying that use only one part of the logits."""


@dataclass(frozen=True, eq=False)
class Way:
    """A way of classifying. ``truth`` and ``predicted`` are the class ids of ``n`` photos."""

    name: str
    what: str
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each answer is right, as an array of shape ``[n]``."""
        right: npt.NDArray[np.bool_] = self.truth == self.predicted
        return right

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return float(self.right.mean())

    @property
    def mean(self) -> float:
        """The mean accuracy over classes."""
        return float(np.mean([self.right[self.truth == i].mean() for i in np.unique(self.truth)]))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.accuracy, len(self.truth))


class Action(NamedTuple):
    """A recommendation, the reason for it, and a ``command`` that carries it out, if there is one."""

    what: str
    why: str
    command: str = ""


def sentences(judged: JudgedIndex, ways: Sequence[Way]) -> Iterator[str]:
    """Yield sentences about the accuracy, the alternatives, and the reliability."""
    own, n, (low, high) = ways[-1], judged.evaluation.n, ways[-1].interval
    yield (
        f"{int(own.right.sum()):,} of {counted(n, 'test photo', 'was', 'were')} classified correctly: "
        f"{percent(own.accuracy)} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)."
    )
    rivals = [way for way in ways[:-1] if way.name not in (EXAMPLES, CLASS_NAMES)]
    if rivals:
        best = max(rivals, key=lambda way: way.accuracy)
        yield f"The best alternative, {best.name} with the same examples, reaches {percent(best.accuracy)}."
    sure = judged.answers.confidence >= SURE
    if sure.any():
        share, accuracy = 100 * sure.mean(), percent(judged.answers.right[sure].mean())
        certain = f"at least {100 * SURE:.0f} % certain ({share:.0f} % of photos)"
        yield f"When the classifier is {certain}, it is right {accuracy} of the time."
    else:
        yield f"The classifier is never {100 * SURE:.0f} % certain."


def actions(judged: JudgedIndex, ways: Sequence[Way]) -> Iterator[Action]:
    """Yield recommendations, weakest class first."""
    cache, own, wrong = judged.cache, ways[-1], int((~ways[-1].right).sum())
    folder = None if judged.folder is None else shlex.quote(portable(judged.folder))

    def command(name: str, rest: str = "") -> str:
        return f"retrieval-tip {name} {folder}{rest}" if folder else ""

    weak = [
        one
        for one in judged.by_class
        if one.n - one.right > 1 and (one.right < WEAK * one.n or one.interval[1] < own.accuracy)
    ]
    for place, one in enumerate(weak[:NAMED]):
        mistakes = f"{one.n - one.right:,} of all" if one.n - one.right < wrong else "all"
        often = f" ({one.times} times classified as {one.answer})" if one.times > 1 else ""
        yield Action(
            f"{one.name}: {100 * one.right / one.n:.0f} %, {mistakes} {wrong:,} mistakes",
            f"add photos to its {counted(one.shots, 'example')}{often}",
            "" if place else command("index add", " FOLDER"),
        )
    better = [way for way in ways[:-1] if way.accuracy > own.accuracy and differ(way.right, own.right)]
    if cache.fitted is None and not judged.is_tuned:
        why = f"{better[0].name} is significantly better" if better else "it is not fitted to its examples yet"
        yield Action("Fit the index", why, command("fit"))
    elif cache.fitted is not None and cache.fitted.keys != cache.n:
        why = f"it was fitted to {cache.fitted.keys:,} examples and now has {cache.n:,}"
        yield Action("Fit the index again", why, command("fit"))
    elif better:
        why = f"it is significantly better here ({percent(better[0].accuracy)}); check this on other test photos"
        yield Action(f"Compare with {better[0].name}", why)
    if judged.where is None and cache.n <= AUDITED and (doubtful := len(audit(cache))):
        why = "the other examples contradict " + ("it" if doubtful == 1 else "them")
        yield Action(f"Check {counted(doubtful, 'label')}", why, command("index audit"))
    confidence = judged.answers.confidence
    gap, noise = confidence.mean() - own.accuracy, (confidence * (1 - confidence)).sum() ** 0.5 / len(confidence)
    if abs(gap) > max(MISCALIBRATED, 2 * noise):
        why = f"they are {100 * abs(gap):.0f} points too {'high' if gap > 0 else 'low'} on average"
        yield Action("Calibrate the probabilities", why, command("calibrate", " --val SOURCE"))
