"""Summarise a report in a few sentences, and recommend what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import counted
from retrieval_tip.evaluation.audit import audit
from retrieval_tip.report.judged import JudgedIndex, portable

Bools = npt.NDArray[np.bool_]

SURE = 0.9
"""Minimum probability of a confident prediction."""
WEAK, NAMED = 0.5, 5
"""Accuracy below which a class always counts as weak, and the maximum number of weak classes to list."""
AUDITED = 1 << 14
"""Maximum number of keys that a report audits."""
MISCALIBRATED = 0.05
Z = NormalDist().inv_cdf(0.975)

EXAMPLES, CLASS_NAMES = "examples only", "class names only"
"""Names of the ways of classifying that use only one part of the logits."""


class Way(NamedTuple):
    """A way of classifying, with its accuracy and the ends of the 95 % confidence interval.

    ``mean`` is the mean over classes, ``ece`` is the ECE if known, and ``right`` is a mask of the correct answers.
    """

    name: str
    what: str
    accuracy: float
    low: float
    high: float
    mean: float
    ece: float | None
    right: Bools


class Action(NamedTuple):
    """A recommendation, the reason for it, and a ``command`` that carries it out, if there is one."""

    what: str
    why: str
    command: str = ""


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95% confidence interval of the fraction ``hits / n`` (E. B. Wilson, 1927), clipped to 0 and 1."""
    p, share = hits / n, Z**2 / n
    centre, half = p + share / 2, Z * math.sqrt(p * (1 - p) / n + share / (4 * n))
    low, high = (centre - half) / (1 + share), (centre + half) / (1 + share)
    return max(0.0, low) if hits else 0.0, min(1.0, high) if hits < n else 1.0


def sentences(judged: JudgedIndex, ways: Sequence[Way]) -> Iterator[str]:
    """Yield sentences about the accuracy, the alternatives, the reliability and the most frequent mistakes."""
    evaluation, own, by = judged.evaluation, ways[-1], {way.name: way for way in ways}
    yield (
        f"{int(own.right.sum()):,} of {counted(evaluation.n, 'test photo')} were classified correctly: "
        f"{own.accuracy:.1%} (95% interval {own.low:.0%} to {own.high:.0%})."
    )
    parts = [f"The examples alone reach {by[EXAMPLES].accuracy:.1%}"]
    if CLASS_NAMES in by:
        parts.append(f"the class names alone {by[CLASS_NAMES].accuracy:.1%}")
    yield f"{', '.join(parts)}."
    rivals = [way for way in ways[:-1] if way.name not in (EXAMPLES, CLASS_NAMES)]
    if rivals:
        best = max(rivals, key=lambda way: way.accuracy)
        yield f"The best alternative with the same examples, {best.name}, reaches {best.accuracy:.1%}."
    answers = evaluation.answers
    sure = answers.confidence >= SURE
    if sure.any():
        share, accuracy = sure.mean(), answers.right[sure].mean()
        yield (
            f"When the classifier is at least {SURE:.0%} certain ({share:.0%} of photos), it is right {accuracy:.1%} "
            "of the time."
        )
    else:
        yield f"The classifier is never {SURE:.0%} certain."
    yield f"Its probabilities are off by {100 * evaluation.ece:.1f} points on average."
    if not evaluation.confusions:
        yield "No photo was misclassified."
        return
    wrong, (name, right, n, _) = int((~own.right).sum()), _weakest(judged)[0]
    yield (
        f"The weakest class is {name}: {right} of {counted(n, 'photo')} correct "
        f"({n - right} of {counted(wrong, 'mistake')})."
    )
    truth, answer, times = evaluation.confusions[0]
    if times > 1:
        yield f"The most frequent mistake is {truth} classified as {answer} ({times} times)."


def actions(judged: JudgedIndex, ways: Sequence[Way]) -> Iterator[Action]:
    """Yield recommendations, starting with the most promising one."""
    cache, evaluation, own = judged.cache, judged.evaluation, ways[-1]
    folder = None if judged.folder is None else shlex.quote(portable(judged.folder))
    fit = f"retrieval-tip fit {folder}" if folder else ""
    better = [way for way in ways[:-1] if way.accuracy > own.accuracy and differ(way.right, own.right)]
    if cache.fitted is None and not judged.is_tuned:
        why = f"{better[0].name} is significantly better" if better else "it is not fitted to its examples yet"
        yield Action("Fit the index", why, fit)
    elif cache.fitted is not None and cache.fitted.keys != cache.n:
        why = f"it was fitted to {cache.fitted.keys:,} examples and now has {cache.n:,}"
        yield Action("Fit the index again", why, fit)
    elif better:
        why = f"it is significantly better here ({better[0].accuracy:.1%}); check this on other test photos"
        yield Action(f"Compare with {better[0].name}", why)
    weak = [
        (name, f"{name}: {right} of {n} correct, {counted(keys, 'example')}")
        for name, right, n, keys in _weakest(judged)[:NAMED]
        if n > 1 and (right < WEAK * n or wilson(right, n)[1] < own.accuracy)
    ]
    if weak:
        yield Action(f"Add photos of {', '.join(name for name, _ in weak)}", "; ".join(why for _, why in weak))
    if cache.n <= AUDITED and not judged.is_tuned and (suspicious := len(audit(cache))):
        command = f"retrieval-tip index audit {folder}" if folder else ""
        yield Action("Check the labels", f"{counted(suspicious, 'example', 'looks', 'look')} mislabelled", command)
    if evaluation.ece > MISCALIBRATED:
        command = f"retrieval-tip calibrate {folder} --val SOURCE" if folder else ""
        yield Action("Calibrate the probabilities", f"they are off by {100 * evaluation.ece:.1f} points", command)


def differ(one: Bools, other: Bools) -> bool:
    """Return whether the accuracies of two ways on the same items differ significantly (McNemar's test, 95%)."""
    change = abs(int(one.sum()) - int(other.sum()))
    return bool(change > 1.96 * np.sqrt((one != other).sum()))


def _weakest(judged: JudgedIndex) -> list[tuple[str, int, int, int]]:
    """Return tuples (class, correct answers, test items, keys), weakest class first."""
    names, answers = judged.cache.class_names, judged.answers
    totals, rights = (np.bincount(ids, minlength=len(names)) for ids in (answers.truth, answers.truth[answers.right]))
    order = sorted(np.flatnonzero(totals), key=lambda i: (rights[i] / totals[i], -totals[i]))
    return [(names[i], int(rights[i]), int(totals[i]), judged.cache.counts[i]) for i in order]
