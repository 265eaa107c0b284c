"""What a report says first: a verdict in a few sentences, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import counted, show
from retrieval_tip.evaluation.audit import audit
from retrieval_tip.report.judged import Judged

Bools = npt.NDArray[np.bool_]

SURE = 0.9
"""An answer of such a probability says that it is sure."""
WEAK, NAMED = 0.5, 5
"""A class is weak where fewer than this share of its items are right; so many classes are named."""
AUDITED = 1 << 14
"""Largest number of keys that a report audits."""
MISCALIBRATED = 0.05


class Way(NamedTuple):
    """One way of answering: its accuracy, the interval, the mean over classes, its ECE where known, what was right."""

    name: str
    what: str
    accuracy: float
    low: float
    high: float
    mean: float
    ece: float | None
    right: Bools


class Action(NamedTuple):
    """What to do, and why; and the ``command`` that does it, where one does."""

    what: str
    why: str
    command: str = ""


def sentences(judged: Judged, ways: Sequence[Way]) -> Iterator[str]:
    """How good the answers are, beside what else there is; how much to believe their probabilities; what goes wrong."""
    evaluation, own, by = judged.evaluation, ways[-1], {way.name: way for way in ways}
    yield (
        f"{int(own.right.sum()):,} of {counted(evaluation.n, 'test item')} are named right, {own.accuracy:.1%}; other "
        f"items of the same kind would give {own.low:.0%} to {own.high:.0%}."
    )
    parts = [f"Photographs alone give {by['cache alone'].accuracy:.1%}"]
    if "zero-shot" in by:
        parts.append(f"words alone {by['zero-shot'].accuracy:.1%}")
    rivals = [way for way in ways[:-1] if way.name not in ("cache alone", "zero-shot")]
    if rivals:
        best = max(rivals, key=lambda way: way.accuracy)
        parts.append(f"of what else the same photographs allow, {best.name} is best with {best.accuracy:.1%}")
    yield f"{'; '.join(parts)}."
    answers = evaluation.answers
    sure = answers.confidence >= SURE
    said = f"It is never {SURE:.0%} sure"
    if sure.any():
        said = f"Where it is {SURE:.0%} sure or more, which is {sure.mean():.0%} of the items, it is right in "
        said += f"{answers.right[sure].mean():.1%}"
    yield f"{said}; its probabilities are off by {100 * evaluation.ece:.1f} points on average."
    if evaluation.confusions:
        truth, answer, times = evaluation.confusions[0]
        yield f"Most often, {truth} is taken for {answer} ({times} of {int((~own.right).sum())} mistakes)."
    else:
        yield "No answer is wrong."


def actions(judged: Judged, ways: Sequence[Way]) -> Iterator[Action]:
    """What is likely to help, the most likely first."""
    cache, evaluation, own = judged.cache, judged.evaluation, ways[-1]
    folder = None if judged.folder is None else shlex.quote(show(judged.folder))
    fit = f"retrieval-tip fit {folder}" if folder else ""
    better = [way for way in ways[:-1] if way.accuracy > own.accuracy and differ(way.right, own.right)]
    if cache.fitted is None and not judged.is_tuned:
        why = f"{better[0].name} is better by more than chance" if better else "nothing was fitted to its shots yet"
        yield Action("Fit the index", why, fit)
    elif cache.fitted is not None and cache.fitted.keys != cache.n:
        yield Action("Fit the index again", f"it was fitted to {cache.fitted.keys:,} keys, and has {cache.n:,}", fit)
    elif better:
        yield Action(
            f"Compare with {better[0].name}",
            f"here it is better by more than chance, {better[0].accuracy:.1%}; further test items tell if it stays",
        )
    if weak := _weak(judged):
        yield Action(f"Add photographs of {', '.join(name for name, _ in weak)}", "; ".join(what for _, what in weak))
    if cache.n <= AUDITED and not judged.is_tuned and (suspicious := len(audit(cache))):
        command = f"retrieval-tip index audit {folder}" if folder else ""
        yield Action(
            "Check the labels of shots", f"{counted(suspicious, 'shot', 'looks', 'look')} mislabelled", command
        )
    if evaluation.ece > MISCALIBRATED:
        command = f"retrieval-tip calibrate {folder} --val SOURCE" if folder else ""
        yield Action("Calibrate the probabilities", f"they are off by {100 * evaluation.ece:.1f} points", command)


def differ(one: Bools, other: Bools) -> bool:
    """Whether two ways of answering the same items differ by more than chance (McNemar, 95 %)."""
    change = abs(int(one.sum()) - int(other.sum()))
    return bool(change > 1.96 * np.sqrt((one != other).sum()))


def _weak(judged: Judged) -> list[tuple[str, str]]:
    """The weakest classes by name, and what is known of each."""
    cache, truth, right = judged.cache, judged.answers.truth, judged.answers.right
    weak = []
    for name, accuracy in sorted(judged.evaluation.per_class.items(), key=lambda pair: pair[1])[:NAMED]:
        own = truth == cache.class_names.index(name)
        if accuracy < WEAK and own.sum() > 1:
            keys = cache.counts[cache.class_names.index(name)]
            weak.append((name, f"{name}: {int(right[own].sum())} of {int(own.sum())} right, {counted(keys, 'shot')}"))
    return weak
