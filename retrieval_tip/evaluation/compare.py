"""Compare the answers of two indexes to the same photos."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source, spelled_alike
from retrieval_tip.errors import InputError, Skipped, counted, few
from retrieval_tip.fit.closed_form import wilson

SIGNIFICANT = 0.05
"""Probability below which a difference is called significant."""

DIFFERENCES = pa.schema({name: pa.string() for name in ("input", "label", "answer_a", "answer_b", "right")})
"""The columns of the photos with different answers. ``right`` is A, B or neither, or null without labels."""


@dataclass(frozen=True)
class Side:
    """An index to compare, its name, and the encoder of its queries."""

    name: str
    index: AnsweringIndex
    encoder: Encoder


@dataclass(frozen=True)
class Score:
    """The answers of one side to ``n`` photos.

    - ``right``: the number of right answers
    - ``alone``: the number of photos to which only this side gives the right answer
    - ``lacking``: the classes of the photos that the index does not have
    - ``lost``: the number of photos of these classes, which all count as wrong
    """

    name: str
    n: int
    right: int
    alone: int
    lacking: list[str]
    lost: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.accuracy, self.n)


@dataclass(frozen=True)
class Compared:
    """The answers of two sides, A and B, to the ``n`` photos that both could read.

    - ``names``: the names of A and B
    - ``scores``: their right answers, or ``None`` if the photos have no labels
    - ``differences``: the photos with different answers, with the columns of :data:`DIFFERENCES`
    """

    names: tuple[str, str]
    n: int
    scores: tuple[Score, Score] | None
    differences: pa.Table = field(compare=False)
    skipped: list[Skipped]

    @property
    def p_value(self) -> float | None:
        """The p-value of McNemar's test, or ``None`` if the photos have no labels."""
        return None if self.scores is None else mcnemar(self.scores[0].alone, self.scores[1].alone)

    def to_dict(self) -> dict[str, object]:
        """Return the figures and the differences that ``compare --json`` prints."""
        facts: dict[str, object] = {"a": self.names[0], "b": self.names[1], "n": self.n, "skipped": len(self.skipped)}
        for side, score in zip("ab", self.scores or (), strict=False):
            facts |= {f"top1_{side}": score.accuracy, f"interval_95_{side}": list(score.interval)}
            facts |= {f"only_{side}_right": score.alone, f"lacking_{side}": score.lacking}
        return facts | {"p_value": self.p_value, "differences": self.differences.to_pylist()}

    def __str__(self) -> str:
        m = len(self.differences)
        differ = f"They give different answers to {counted(m, 'photo')}" if m else "They give the same answers"
        if self.scores is None or self.p_value is None:
            return f"{self.names[0]} and {self.names[1]} classify {counted(self.n, 'photo')}. {differ}."
        a, b = self.scores
        (low_a, high_a), (low_b, high_b) = a.interval, b.interval
        text = (
            f"{a.name} is right on {100 * a.accuracy:.1f} % of {counted(self.n, 'photo')} "
            f"(95 % interval {100 * low_a:.0f} to {100 * high_a:.0f} %), "
            f"{b.name} on {100 * b.accuracy:.1f} % ({100 * low_b:.0f} to {100 * high_b:.0f} %). {differ}"
        )
        if m:
            text += f": only {a.name} is right on {a.alone:,}, only {b.name} on {b.alone:,}"
        tested = f"({_shown(self.p_value)}, McNemar's test)"
        if self.p_value < SIGNIFICANT:
            text += f". {max(self.scores, key=lambda score: score.alone).name} is significantly better {tested}."
        else:
            text += f". The difference is not significant {tested}."
        for score in (score for score in self.scores if score.lacking):
            classes = f"{counted(len(score.lacking), 'class')} of the photos ({few(score.lacking)})"
            text += f" {score.name} does not have {classes}; {counted(score.lost, 'photo')} count as wrong."
        return text


def compare(a: Side, b: Side, source: Source) -> Compared:
    """Classify a source with two indexes, and compare their answers with each other and with the labels.

    The classes are those of the source. An index that lacks a class is wrong on all photos of the class. Class names
    that differ only in case, ``_``, ``-`` or spaces are the same class. If no photo has a label, the answers are only
    compared with each other.

    Raises InputError if the source is empty or only partly labelled, if no photo could be read, or if neither index has
    any class of the source.
    """
    if not len(source):
        raise InputError(f"{source.name}: has no items")
    known = "label" in source.items.column_names and source.items["label"].null_count < len(source)
    labels = np.array(source.labels if known else [None] * len(source), dtype=object)
    own = set(labels) if known else set()
    alike = spelled_alike([*sorted(own), *a.index.class_names, *b.index.class_names])
    spelled = {name: first for name, first in alike.items() if name not in own}
    classes = [{spelled.get(name, name) for name in side.index.class_names} for side in (a, b)]
    if known and not own & (classes[0] | classes[1]):
        raise InputError(f"{source.name}: neither {a.name} nor {b.name} has a class of these photos; compare others")
    given = [_answers(side, source, spelled) for side in (a, b)]
    rows = np.flatnonzero((given[0] != None) & (given[1] != None))  # noqa: E711 - compares element by element
    if not len(rows):
        raise InputError(f"{source.name}: no photo could be read by both sides")
    truth, first, second = labels[rows], given[0][rows], given[1][rows]
    right = first == truth, second == truth
    differ = np.flatnonzero(first != second)
    winner = np.where(right[0], "A", np.where(right[1], "B", "neither"))[differ] if known else [None] * len(differ)
    inputs = source.items["source"].take(pa.array(rows[differ]))
    columns = [truth[differ], first[differ], second[differ], winner]
    table = pa.table([inputs, *(pa.array(column, pa.string()) for column in columns)], schema=DIFFERENCES)
    skipped = list(dict.fromkeys([*a.encoder.skipped, *b.encoder.skipped]))
    scores = None
    if known:
        lacking = [sorted(own - names) for names in classes]
        lost = [int(np.isin(truth.astype(str), names).sum()) for names in lacking]
        alone = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        scores = (
            Score(a.name, len(rows), int(right[0].sum()), alone[0], lacking[0], lost[0]),
            Score(b.name, len(rows), int(right[1].sum()), alone[1], lacking[1], lost[1]),
        )
    return Compared((a.name, b.name), len(rows), scores, table, skipped)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    If both sides are equally accurate, each photo on which only one side is right is equally likely to favour A or B.
    """
    n, fewer = only_a + only_b, torch.arange(min(only_a, only_b) + 1, dtype=torch.float64)
    logs = math.lgamma(n + 1) - torch.lgamma(fewer + 1) - torch.lgamma(n - fewer + 1) - n * math.log(2)
    return min(1.0, 2 * float(logs.exp().sum()))


def differ(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> bool:
    """Return whether two masks of right answers to the same photos differ significantly (:func:`mcnemar`)."""
    return mcnemar(int((one & ~other).sum()), int((other & ~one).sum())) < SIGNIFICANT


def _answers(side: Side, source: Source, spelled: dict[str, str]) -> npt.NDArray[np.object_]:
    """Return the answer to each photo, or ``None`` if it could not be read."""
    answers = np.full(len(source), None, dtype=object)
    for block in side.encoder.blocks(source):
        table = side.index.classify(block.features, neighbours=0, norms="keep").to_arrow()
        answers[block.positions] = [spelled.get(name, name) for name in table["label"].to_pylist()]
    return answers


def _shown(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
