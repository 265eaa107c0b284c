"""Compare the answers of two indexes to the same photos."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source, spelled_alike
from retrieval_tip.errors import InputError, Skipped, counted, few, percent
from retrieval_tip.evaluation.evaluate import HELD_OUT, Answers, Recognition, answers_of
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.model import Index

SIGNIFICANT = 0.05
"""Probability below which a difference is called significant."""

DIFFERENCES = pa.schema({name: pa.string() for name in ("input", "label", "answer_a", "answer_b", "right")})
"""The columns of the photos with different answers. ``right`` is A, B or neither, or null without labels."""


@dataclass(frozen=True)
class Side:
    """An index to compare, its name, and the encoder of its queries."""

    name: str
    index: Index
    reader: Reader


@dataclass(frozen=True)
class Score(Recognition):
    """The answers of one side to ``n`` photos.

    - ``right``: the number of right answers
    - ``alone``: the number of photos to which only this side gives the right answer
    """

    name: str
    n: int
    right: int
    alone: int

    @property
    def lacking(self) -> list[str]:
        """The classes of the photos that the index does not have. Only "no match" is right for their photos."""
        return list(self.unknown)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.accuracy, self.n)

    def notes(self) -> Iterator[str]:
        """Yield sentences about classes that the index lacks, and about photos that are its shots."""
        if self.unknown:
            lost = counted(sum(self.unknown.values()), "photo")
            wrong = f"{lost} count as wrong"
            if self.unknown_no_match:
                found = self.unknown_no_match * sum(self.unknown.values())
                wrong = f'{found:.0f} of {lost} got "no match", which is right'
            classes = f"{counted(len(self.unknown), 'class')} of the photos ({few(self.lacking)})"
            yield f"{self.name} does not have {classes}; {wrong}."
            if self.known_top1 is not None:
                no_match = self.known_no_match
                more = "" if no_match is None else f', and {percent(no_match)} got "no match"'
                yield f"On the other photos, {self.name} is right on {percent(self.known_top1)}{more}."
        if self.held_out:
            yield f"{self.held_out:,} of {counted(self.n, 'photo')} are shots of {self.name}; {HELD_OUT}."


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
            facts |= {f"{field_.name}_{side}": getattr(score, field_.name) for field_ in fields(Recognition)}
        return facts | {"p_value": self.p_value, "differences": self.differences.to_pylist()}

    def __str__(self) -> str:
        m, photos = len(self.differences), counted(self.n, "photo")
        differ = f"They give different answers to {counted(m, 'photo')}" if m else "They give the same answers"
        if self.scores is None or self.p_value is None:
            return f"{self.names[0]} and {self.names[1]} classify {photos}. {differ}."
        a, b = self.scores
        first, second = (f"{100 * low:.0f} to {100 * high:.0f} %)" for low, high in (a.interval, b.interval))
        text = f"{a.name} is right on {100 * a.accuracy:.1f} % of {photos} (95 % interval {first}, "
        text += f"{b.name} on {100 * b.accuracy:.1f} % ({second}. {differ}"
        text += f": only {a.name} is right on {a.alone:,}, only {b.name} on {b.alone:,}" if m else ""
        better = f"{max(self.scores, key=lambda score: score.alone).name} is significantly better"
        verdict = better if self.p_value < SIGNIFICANT else "The difference is not significant"
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.2g}"
        return " ".join([f"{text}. {verdict} ({p}, McNemar's test).", *a.notes(), *b.notes()])


def compare(a: Side, b: Side, source: Source) -> Compared:
    """Classify a source with two indexes, and compare their answers with each other and with the labels.

    Class names that differ only in case, ``_``, ``-`` or spaces are the same class. If an index lacks the class of a
    photo, only "no match" is right. Photos that are shots of an index are classified by it without themselves (see
    :func:`held_out.without_themselves`). If no photo has a label, the answers are only compared with each other.

    Raises InputError if the source is empty or only partly labelled, if no photo could be read, or if neither index has
    any class of the source.
    """
    if not len(source):
        raise InputError(f"{source.name}: has no items")
    labelled = "label" in source.items.column_names and source.items["label"].null_count < len(source)
    unknown = np.full(len(source), -1)
    classes = {tuple(side.index.class_names) for side in (a, b)}
    truths = {names: source.truth(names) if labelled else (unknown, list(names)) for names in classes}
    if all(ids.min() >= len(names) for names, (ids, _) in truths.items()):
        raise InputError(f"{source.name}: neither {a.name} nor {b.name} has a class of these photos; compare others")
    first, second = (
        answers_of(side.index, source, side.reader, truths[tuple(side.index.class_names)]) for side in (a, b)
    )
    rows, *places = np.intersect1d(first.positions, second.positions, assume_unique=True, return_indices=True)
    if not len(rows):
        raise InputError(f"{source.name}: no photo could be read by both sides")
    first, second = first.take(places[0]), second.take(places[1])
    labels = source.labels if labelled else []
    alike = spelled_alike([*sorted(set(labels)), *a.index.class_names, *b.index.class_names])
    named_a, named_b = (np.array([alike.get(name, name) for name in one.named()]) for one in (first, second))
    differ = np.flatnonzero((named_a != named_b) | (first.right != second.right))
    winner, none = np.where(first.right, "A", np.where(second.right, "B", "neither")), [None] * len(differ)
    columns = {
        "input": source.items["source"].take(pa.array(rows[differ])),
        "label": [alike.get(labels[row], labels[row]) for row in rows[differ]] if labelled else none,
        "answer_a": named_a[differ],
        "answer_b": named_b[differ],
        "right": winner[differ] if labelled else none,
    }
    skipped = list(dict.fromkeys([*a.reader.skipped, *b.reader.skipped]))
    scores = (_score(a, first, second), _score(b, second, first)) if labelled else None
    return Compared((a.name, b.name), len(rows), scores, pa.table(columns, schema=DIFFERENCES), skipped)


def _score(side: Side, own: Answers, other: Answers) -> Score:
    alone = int((own.right & ~other.right).sum())
    return Score(side.name, len(own.truth), int(own.right.sum()), alone, **vars(own.recognition()))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    If both sides are equally accurate, each photo on which only one side is right is equally likely to favour A or B.
    """
    n, fewer = only_a + only_b, torch.arange(min(only_a, only_b) + 1, dtype=torch.float64)
    logs = math.lgamma(n + 1) - torch.lgamma(fewer + 1) - torch.lgamma(n - fewer + 1) - n * math.log(2)
    return min(1.0, 2 * float(logs.exp().sum()))
