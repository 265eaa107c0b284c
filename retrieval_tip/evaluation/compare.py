"""Compare the answers of two indexes to the same photos."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip.arrays import BoolArray
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source, spelled_alike
from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.evaluation.evaluate import Evaluation, answers_of, judge
from retrieval_tip.evaluation.held_out import known_shots
from retrieval_tip.model import Index
from retrieval_tip.wording import counted, few, percent, span

SIGNIFICANT = 0.05
"""Probability below which a difference is called significant."""

UNUSUAL = ("held_out", "unknown", "known_top1", "known_no_match", "unknown_no_match", "auroc")
"""The figures of an evaluation about its own shots and unknown classes."""
DIFFERENCES = pa.schema(
    {name: pa.string() for name in ("input", "label", "answer_a", "answer_b", "right")}
)
"""The columns of the photos with different answers. ``right`` is A, B or neither, or null without labels."""


@dataclass(frozen=True)
class Side:
    """An index to compare, its name, and the encoder of its queries."""

    name: str
    index: Index
    reader: Reader


class Alone(NamedTuple):
    """The numbers of photos on which only one of two sides is right."""

    a: int
    b: int

    @classmethod
    def of(cls, right_a: BoolArray, right_b: BoolArray) -> Alone:
        """Count the photos. The arrays tell of each photo whether a side is right."""
        return cls(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()))

    @property
    def p_value(self) -> float:
        """The two-sided p-value of McNemar's test."""
        return mcnemar(self.a, self.b)

    @property
    def better(self) -> Literal["a", "b"] | None:
        """The side that is significantly better."""
        if self.p_value >= SIGNIFICANT:
            return None
        return "a" if self.a > self.b else "b"


@dataclass(frozen=True)
class Compared:
    """The answers of two sides, A and B, to the ``n`` photos that both could read.

    - ``names``: the names of A and B
    - ``evaluations``: their accuracies, or ``None`` if the photos have no labels
    - ``alone``: the numbers of photos on which only A or only B is right
    - ``differences``: the photos with different answers, with the columns of :data:`DIFFERENCES`
    """

    names: tuple[str, str]
    n: int
    evaluations: tuple[Evaluation, Evaluation] | None
    alone: Alone
    differences: pa.Table = field(compare=False)
    skipped: list[Skipped]

    @property
    def p_value(self) -> float | None:
        """The p-value of McNemar's test, or ``None`` if the photos have no labels."""
        return None if self.evaluations is None else self.alone.p_value

    def to_dict(self) -> dict[str, object]:
        """Return the figures and the differences that ``compare --json`` prints."""
        facts: dict[str, object] = {
            "a": self.names[0],
            "b": self.names[1],
            "n": self.n,
            "skipped": len(self.skipped),
        }
        for side, evaluation, alone in zip("ab", self.evaluations or (), self.alone, strict=False):
            facts |= {
                f"top1_{side}": evaluation.top1,
                f"interval_95_{side}": list(evaluation.interval),
                f"only_{side}_right": alone,
            }
            facts |= {f"{name}_{side}": getattr(evaluation, name) for name in UNUSUAL}
        return facts | {"p_value": self.p_value, "differences": self.differences.to_pylist()}

    def __str__(self) -> str:
        a, b = self.names
        photos = counted(self.n, "photo")
        differ = "They give the same answers"
        if len(self.differences):
            differ = f"They give different answers to {counted(len(self.differences), 'photo')}"
        if self.evaluations is None or self.p_value is None:
            return f"{a} and {b} classify {photos}. {differ}."
        of_a, of_b = self.evaluations
        only_a, only_b = self.alone
        right_a = f"{a} is right on {100 * of_a.top1:.1f} % of {photos}"
        right_b = f"{b} on {100 * of_b.top1:.1f} %"
        accuracy = (
            f"{right_a} (95 % interval {span(of_a.interval)}), {right_b} ({span(of_b.interval)})"
        )
        if len(self.differences):
            differ += f": only {a} is right on {only_a:,}, only {b} on {only_b:,}"
        verdict = "The difference is not significant"
        if self.alone.better is not None:
            better = {"a": a, "b": b}[self.alone.better]
            verdict = f"{better} is significantly better"
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2g}"
        sentences = [f"{accuracy}. {differ}. {verdict} ({p}, McNemar's test)."]
        return " ".join([*sentences, *_notes(a, of_a), *_notes(b, of_b)])


def _notes(name: str, evaluation: Evaluation) -> Iterator[str]:
    """Yield sentences about classes that the index lacks, and about photos that are its shots."""
    if evaluation.unknown:
        number = sum(evaluation.unknown.values())
        lost = counted(number, "photo")
        classes = counted(len(evaluation.unknown), "class")
        wrong = f"{lost} count as wrong"
        if evaluation.unknown_no_match:
            right = f"{evaluation.unknown_no_match * number:.0f} of {lost}"
            wrong = f'{right} got "no match", which is right'
        yield f"{name} does not have {classes} of the photos ({few([*evaluation.unknown])}); {wrong}."
        if evaluation.known_top1 is not None:
            right = f"On the other photos, {name} is right on {percent(evaluation.known_top1)}"
            if evaluation.known_no_match is not None:
                right += f', and {percent(evaluation.known_no_match)} got "no match"'
            yield f"{right}."
    if evaluation.held_out:
        yield f"{known_shots(evaluation.held_out, evaluation.n, name)}."


def compare(a: Side, b: Side, source: Source) -> Compared:
    """Classify a source with two indexes, and compare their answers with each other and with the labels.

    Class names that differ only in case, ``_``, ``-`` or spaces are the same class. If an index lacks the class of a
    photo, only "no match" is right. Photos that are shots of an index are classified by it without themselves (see
    :func:`held_out.answered`). If no photo has a label, the answers are only compared with each other.

    Raises InputError if the source is empty or only partly labelled, if no photo could be read, or if an index has no
    class of the source.
    """
    if not len(source):
        raise InputError(f"{source.name}: has no items")
    labelled = "label" in source.items.column_names and source.items["label"].null_count < len(
        source
    )
    first, second = (
        answers_of(side.index, source, side.reader, labelled=labelled) for side in (a, b)
    )
    rows, *places = np.intersect1d(
        first.positions, second.positions, assume_unique=True, return_indices=True
    )
    if not len(rows):
        raise InputError(f"{source.name}: no photo could be read by both sides")
    first = first.take(places[0])
    second = second.take(places[1])
    labels = source.labels if labelled else []
    alike = spelled_alike([*sorted(set(labels)), *a.index.class_names, *b.index.class_names])
    named_a = np.array([alike.get(name, name) for name in first.named()])
    named_b = np.array([alike.get(name, name) for name in second.named()])
    differ = np.flatnonzero((named_a != named_b) | (first.right != second.right))
    columns = {
        "input": source.items["source"].take(pa.array(rows[differ])),
        "label": [None] * len(differ),
        "answer_a": named_a[differ],
        "answer_b": named_b[differ],
        "right": [None] * len(differ),
    }
    evaluations = None
    if labelled:
        winner = np.where(first.right, "A", np.where(second.right, "B", "neither"))
        columns["label"] = [alike.get(labels[row], labels[row]) for row in rows[differ]]
        columns["right"] = winner[differ]
        evaluations = judge(a.index, first), judge(b.index, second)
    alone = Alone.of(first.right, second.right)
    differences = pa.table(columns, schema=DIFFERENCES)
    skipped = list(dict.fromkeys([*a.reader.skipped, *b.reader.skipped]))
    names = (a.name, b.name)
    return Compared(names, len(rows), evaluations, alone, differences, skipped)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    If both sides are equally accurate, each photo on which only one side is right is equally likely to favour A or B.
    """
    n = only_a + only_b
    fewer = torch.arange(min(only_a, only_b) + 1, dtype=torch.float64)
    # In logarithms, because 2^n overflows from 1,024 photos on.
    logs = (
        math.lgamma(n + 1) - torch.lgamma(fewer + 1) - torch.lgamma(n - fewer + 1) - n * math.log(2)
    )
    # If both numbers are equal, doubling would count the middle of the distribution twice.
    return min(1.0, 2 * float(logs.exp().sum()))
