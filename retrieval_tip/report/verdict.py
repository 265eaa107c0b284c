"""Summarise a report in a few sentences, and recommend what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import NamedTuple

from retrieval_tip.errors import counted, percent
from retrieval_tip.evaluation.audit import AUDITED, audit
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.report.results import Results, portable

SURE = 0.9
"""Minimum probability of a confident prediction."""
WEAK, NAMED = 0.5, 3
"""Accuracy below which a class always counts as weak, and the maximum number of weak classes to list."""
MISCALIBRATED = 0.05
"""Difference between the mean probability and the accuracy from which a calibration is recommended."""


class Action(NamedTuple):
    """A recommendation, the reason for it, and a ``command`` that carries it out, if there is one."""

    what: str
    why: str
    command: str = ""


def sentences(results: Results) -> Iterator[str]:
    """Yield sentences about the accuracy and the reliability."""
    n, top1 = results.evaluation.n, results.evaluation.top1
    low, high = wilson(top1, n)
    yield (
        f"{int(results.answers.right.sum()):,} of {counted(n, 'test photo', 'was', 'were')} classified correctly: "
        f"{percent(top1)} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)."
    )
    sure = results.answers.confidence >= SURE
    if sure.any():
        share, accuracy = 100 * sure.mean(), percent(results.answers.right[sure].mean())
        certain = f"at least {100 * SURE:.0f} % certain ({share:.0f} % of photos)"
        yield f"When the classifier is {certain}, it is right {accuracy} of the time."
    else:
        yield f"The classifier is never {100 * SURE:.0f} % certain."


def actions(results: Results) -> Iterator[Action]:
    """Yield recommendations, weakest class first."""
    index, top1, wrong = results.index, results.evaluation.top1, int((~results.answers.right).sum())
    folder = None if results.folder is None else shlex.quote(portable(results.folder))

    def command(name: str, rest: str = "") -> str:
        return f"retrieval-tip {name} {folder}{rest}" if folder else ""

    weak = [
        one
        for one in results.by_class
        if one.n - one.right > 1 and (one.right < WEAK * one.n or one.interval[1] < top1)
    ]
    for place, one in enumerate(weak[:NAMED]):
        mistakes = f"{one.n - one.right:,} of all" if one.n - one.right < wrong else "all"
        often = f" ({one.times} times classified as {one.answer})" if one.times > 1 else ""
        yield Action(
            f"{one.name}: {100 * one.right / one.n:.0f} %, {mistakes} {wrong:,} mistakes",
            f"add photos to its {counted(one.shots, 'example')}{often}",
            "" if place else command("index add", " FOLDER"),
        )
    if index.fitted is None and not results.is_tuned:
        yield Action("Fit the index", "it is not fitted to its examples yet", command("fit"))
    elif index.fitted is not None and index.fitted.keys != index.n:
        why = f"it was fitted to {index.fitted.keys:,} examples and now has {index.n:,}"
        yield Action("Fit the index again", why, command("fit"))
    if results.where is None and index.n <= AUDITED and (doubtful := len(audit(index))):
        why = "the other examples contradict " + ("it" if doubtful == 1 else "them")
        yield Action(f"Check {counted(doubtful, 'label')}", why, command("index audit"))
    confidence = results.answers.confidence
    gap, noise = confidence.mean() - top1, (confidence * (1 - confidence)).sum() ** 0.5 / len(confidence)
    if abs(gap) > max(MISCALIBRATED, 2 * noise):
        why = f"they are {100 * abs(gap):.0f} points too {'high' if gap > 0 else 'low'} on average"
        yield Action("Calibrate the probabilities", why, command("calibrate", " --val SOURCE"))
