"""Measure the accuracy and the calibration of an index on labelled images or features."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from retrieval_tip.answers import AnswerBlock, narrowest
from retrieval_tip.arrays import BoolArray, DoubleArray, IntArray, KeyArray
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, Skipped, UsageError
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.evaluation.held_out import judged, known_shots
from retrieval_tip.fit.confidence import wilson
from retrieval_tip.levels import Levels
from retrieval_tip.model import Index
from retrieval_tip.settings import Ask, AskOptions, Settings

log = logging.getLogger(__name__)

CONFUSIONS = 10
NO_MATCH = "no match"


@dataclass(frozen=True)
class Answers:
    """The answers in an evaluation, in the order of the items. Arrays have shape ``[n]`` unless noted.

    ``truth`` holds class ids, or -1 for items without a label. ``ranked`` holds the best classes ``[n, m + 2]``: those
    of the ``m`` largest blended logits (at most 5), of the largest text logit and of the largest cache logit.
    ``confidence`` is the probability of the first. ``positions`` are the item positions in the source. ``log_truth`` is
    the natural logarithm of the probability of the true class, which can be used to rank items whose probabilities
    round to 0. ``class_names`` starts with the ``n_classes`` classes of the index. If an item belongs to another class,
    its ``truth`` is at least ``n_classes``. ``held_out`` is true for shots of the index, which were
    classified without themselves. ``strength`` is the largest cache logit of a class with keys. ``no_match`` is true if
    it is below the threshold of the index. Both are ``None`` if the index has no threshold. For a question with
    ``at_least``, ``levels`` holds the level of each answer, or -1 if it has no label, and ``right_at_level`` tells
    whether it is right there. For a question with ``coverage``, ``set_sizes`` holds the number of classes in each set,
    and ``in_set`` tells whether the true class is in it.
    """

    truth: IntArray
    ranked: IntArray
    confidence: DoubleArray
    positions: IntArray
    log_truth: DoubleArray
    class_names: list[str]
    n_classes: int
    held_out: BoolArray
    strength: DoubleArray | None = None
    no_match: BoolArray | None = None
    levels: IntArray | None = None
    right_at_level: BoolArray | None = None
    set_sizes: IntArray | None = None
    in_set: BoolArray | None = None

    @property
    def predicted(self) -> IntArray:
        """The class id of each answer."""
        return self.ranked[:, 0]

    @property
    def of_known(self) -> BoolArray:
        """Whether each item belongs to a class of the index."""
        return np.asarray(self.truth < self.n_classes)

    @property
    def right(self) -> BoolArray:
        """Whether each answer is right. For an item of an unknown class, only "no match" is right."""
        right: BoolArray = self.truth == self.predicted
        return right if self.no_match is None else right | (self.no_match & ~self.of_known)

    def take(self, places: IntArray) -> Answers:
        """Return some of the answers."""
        arrays: dict[str, Any] = {
            name: x[places] for name, x in vars(self).items() if isinstance(x, np.ndarray)
        }
        return replace(self, **arrays)

    def named(self) -> list[str]:
        """Return the name of each answer, or :data:`NO_MATCH` if this is right."""
        none = self.right & ~self.of_known
        return [
            NO_MATCH if new else self.class_names[i]
            for i, new in zip(self.predicted, none, strict=True)
        ]

    def figures(self, groups: Levels | None, abstain: float | None) -> dict[str, Any]:
        """Return the figures that ``abstain``, ``at_least`` and ``coverage`` add to an :class:`Evaluation`."""
        figures: dict[str, Any] = {}
        if abstain is not None:
            sure = self.confidence >= abstain
            figures |= {
                "abstain": abstain,
                "coverage": sure.mean(),
                "selective_top1": _mean(self.right[sure]),
            }
        if groups is not None and self.levels is not None and self.right_at_level is not None:
            at = {level: self.levels == number for number, level in enumerate(groups.levels)}
            shares = {
                name: {"share": at_level.mean(), "right": _mean(self.right_at_level[at_level])}
                for name, at_level in at.items()
            }
            figures |= {"levels": shares, "no_label": (self.levels < 0).mean()}
        if self.set_sizes is not None and self.in_set is not None:
            is_known = self.of_known
            if self.no_match is not None:
                is_known = is_known & ~self.no_match
            figures |= {
                "set_coverage": _mean(self.in_set[is_known]),
                "set_size": _mean(self.set_sizes[is_known]),
            }
        return figures


class ClassScore(NamedTuple):
    """The answers to the ``n`` items of a class.

    ``right`` counts the right answers, and ``shots`` the keys of the class. ``answer`` is the most frequent wrong
    answer, which was given ``times`` times.
    """

    name: str
    right: int
    n: int
    shots: int
    answer: str
    times: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.accuracy, self.n)


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of an index on the ``n`` readable items of a source. All accuracies are fractions.

    - ``top1``, ``top5``: the accuracies of the blended logits. An item of a class that the index lacks counts as right
      if it has no match.
    - ``zero_shot_top1``: the accuracy of the text logits, or ``None`` if the index has no text weights
    - ``cache_top1``: the accuracy of the cache logits
    - ``by_class``: the answers to each class of the index that occurs in the source, weakest class first
    - ``mean_per_class``: the mean of their accuracies
    - ``ece``: the expected calibration error of ``softmax(blended logits / temperature)`` in 15 bins
    - ``confusions``: the most frequent errors, as tuples (label, predicted, count)
    - ``figures``: with ``abstain``, the share of answers whose probability is at least that (``coverage``), and their
      accuracy (``selective_top1``); with ``at_least``, the share and the accuracy of answers at each of the ``levels``,
      and the share with ``no_label``; with ``coverage``, the share of sets with the right class, and their mean number
      of classes (an item without a match has no set)
    - ``held_out``: the number of items that are shots of the index, each of which was classified without itself
    - ``unknown``: the number of items of each class that the index lacks
    - ``known_top1``: the accuracy on items of the other classes
    - ``known_no_match``, ``unknown_no_match``: the share of items of known and of unknown classes without a match
    - ``auroc``: the area under the ROC curve of the score behind ``no_match``, which is the probability that an item of
      a known class has a higher score than one of an unknown class

    ``zero_shot_top1``, ``cache_top1``, ``by_class``, ``mean_per_class`` and ``ece`` refer to the items of known
    classes. A share of no items is ``None``, and so are the last three if the index has no threshold for ``no_match``.
    """

    top1: float
    top5: float
    zero_shot_top1: float | None
    cache_top1: float
    mean_per_class: float
    ece: float
    n: int
    skipped: int
    settings: Settings
    by_class: list[ClassScore]
    confusions: list[tuple[str, str, int]]
    figures: dict[str, Any]
    held_out: int
    unknown: dict[str, int]
    known_top1: float | None
    known_no_match: float | None
    unknown_no_match: float | None
    auroc: float | None
    answers: Answers = field(compare=False, repr=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of ``top1``."""
        return wilson(self.top1, self.n)

    @property
    def per_class(self) -> dict[str, float]:
        """The accuracy of each class, weakest class first."""
        return {score.name: score.accuracy for score in self.by_class}

    def to_dict(self) -> dict[str, object]:
        """Return the figures that ``evaluate --json`` prints. ``k`` is ``"all"`` if every key is used."""
        left_out = ("answers", "by_class", "figures", "settings")
        facts = {name: value for name, value in vars(self).items() if name not in left_out}
        return facts | self.settings.shown() | {"per_class": self.per_class} | self.figures


def evaluate(
    index: Index,
    source: Source,
    reader: Reader,
    *,
    abstain: float | None = None,
    blocks: Iterable[FeatureBlock] | None = None,
    **asked: Unpack[AskOptions],
) -> Evaluation:
    """Classify a labelled source and compare the answers with its labels.

    Items that are shots of the index are classified without themselves (see :func:`held_out.answered`).
    ``abstain`` is the probability below which an answer is withheld. ``asked`` may change ``k``, ``tail``, ``alpha``
    and ``beta``, and may give ``at_least`` or ``coverage`` (see :class:`settings.Ask`). If the items are encoded
    already, give them as ``blocks``.

    Raises InputError if the source is empty, or if no readable item belongs to a class of the index. Raises UsageError
    if ``abstain`` is not between 0 and 1.
    """
    if abstain is not None and not 0 <= abstain <= 1:
        raise UsageError(f"abstain is {abstain}: give a probability, 0 to 1")
    ask = Ask(**asked)
    index = index.with_settings(ask.settings(index.settings))
    evaluation = judge(
        index, answers_of(index, source, reader, ask, blocks), reader.skipped, abstain=abstain
    )
    if evaluation.held_out:
        log.warning(known_shots(evaluation.held_out, evaluation.n))
    return evaluation


def judge(
    index: Index, answers: Answers, skipped: Sequence[Skipped] = (), *, abstain: float | None = None
) -> Evaluation:
    """Evaluate answers of an index. See :func:`evaluate` for ``abstain`` and the errors."""
    is_known = answers.of_known
    right = answers.right
    truth = answers.truth
    class_names = answers.class_names
    if not is_known.any():
        raise InputError("photos: none of a class of the index could be read; add such photos")
    if abstain is not None and answers.in_set is not None:
        raise UsageError("abstain and coverage: give only one")
    hits = answers.ranked == truth[:, None]
    by_class = _by_class(index, answers)
    wrong = Counter(zip(truth[~right].tolist(), answers.predicted[~right].tolist(), strict=True))
    confusions = [
        (class_names[a], class_names[b], n) for (a, b), n in wrong.most_common(CONFUSIONS)
    ]
    unknown = Counter(class_names[i] for i in truth[~is_known].tolist())
    known_no_match = unknown_no_match = auroc = None
    if answers.no_match is not None:
        known_no_match = _mean(answers.no_match[is_known])
        unknown_no_match = _mean(answers.no_match[~is_known])
    if answers.strength is not None:
        auroc = _area_under_roc(answers.strength[is_known], answers.strength[~is_known])
    return Evaluation(
        top1=float(right.mean()),
        top5=float((right | hits[:, :-2].any(axis=1)).mean()),
        zero_shot_top1=float(hits[is_known, -2].mean()) if index.has_text else None,
        cache_top1=float(hits[is_known, -1].mean()),
        mean_per_class=float(np.mean([score.accuracy for score in by_class])),
        ece=expected_calibration_error(answers.confidence[is_known], right[is_known]),
        n=len(truth),
        skipped=len(skipped),
        settings=index.settings,
        by_class=by_class,
        confusions=confusions,
        answers=answers,
        figures=answers.figures(index.groups, abstain),
        held_out=int(answers.held_out.sum()),
        unknown=dict(sorted(unknown.items())),
        known_top1=_mean(right[is_known]),
        known_no_match=known_no_match,
        unknown_no_match=unknown_no_match,
        auroc=auroc,
    )


def _by_class(index: Index, answers: Answers) -> list[ClassScore]:
    names = index.class_names
    scores = []
    for i in np.unique(answers.truth[answers.of_known]).tolist():
        predicted = Counter(answers.predicted[answers.truth == i].tolist())
        n = predicted.total()
        right = predicted.pop(i, 0)
        answer, times = predicted.most_common(1)[0] if predicted else (i, 0)
        scores.append(ClassScore(names[i], right, n, index.counts[i], names[answer], times))
    return sorted(scores, key=lambda score: (score.accuracy, -score.n))


def answers_of(
    index: Index,
    source: Source,
    reader: Reader,
    ask: Ask = Ask(),
    blocks: Iterable[FeatureBlock] | None = None,
    *,
    labelled: bool = True,
) -> Answers:
    """Classify a source, each shot without itself. If it is not ``labelled``, its items have no class.

    ``ask`` may have ``at_least`` or a ``coverage``. Raises InputError if the index has no class of the source.
    """
    truth = np.full(len(source), -1)
    names = [*index.class_names]
    if labelled:
        truth, names = source.truth(index.class_names)
    if not (truth < len(index.class_names)).any():
        raise source.unknown(names[len(index.class_names) :], index.class_names)
    ask = Ask(top=5, neighbours=0, at_least=ask.at_least, coverage=ask.coverage)
    parts = [
        _answers(answer, truth, names) for answer in judged(index, source, reader, ask, blocks)
    ]
    columns = [name for name, x in vars(parts[0]).items() if isinstance(x, np.ndarray)]
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(answers, name) for answers in parts]) for name in columns
    }
    return replace(parts[0], **arrays).take(np.argsort(arrays["positions"]))


def _answers(answer: AnswerBlock, every: IntArray, class_names: list[str]) -> Answers:
    terms = answer.terms
    logits = answer.logits
    settings = answer.index.settings
    positions = answer.block.positions
    text = terms.text
    alone = terms.photos(settings)
    truth = every[positions]
    c = logits.shape[1]
    ranked = torch.cat(
        [answer.ranked, text.argmax(1, keepdim=True), alone.argmax(1, keepdim=True)], dim=1
    )
    confidence = answer.probabilities.gather(1, ranked[:, :1])[:, 0].double()
    ids = torch.from_numpy(truth).to(logits.device)
    scaled = logits / settings.temperature
    log_truth = scaled.gather(1, ids.clamp(0, c - 1)[:, None])[:, 0] - scaled.logsumexp(dim=1)
    log_truth = log_truth.double().masked_fill((ids < 0) | (ids >= c), -torch.inf)
    ranks, chances, logs = (column.cpu().numpy() for column in (ranked, confidence, log_truth))
    answers = Answers(
        truth,
        ranks,
        chances,
        positions,
        logs,
        class_names,
        n_classes=c,
        held_out=answer.block.shots,
    )
    if answer.ask.at_least is not None and (groups := answer.index.groups) is not None:
        narrowed = narrowest(
            answer.probabilities, answer.index.class_names, groups, answer.ask.at_least
        )
        levels = pc.index_in(narrowed["level"], pa.array(groups.levels)).fill_null(-1).to_numpy()
        hits = np.zeros(len(truth), dtype=bool)
        for place, label in enumerate(narrowed["label"].to_pylist()):
            if label is not None:
                true_label = groups.at(int(levels[place]), class_names[truth[place]])
                hits[place] = true_label == label
        answers = replace(answers, levels=levels, right_at_level=hits)
    if answer.sets is not None:
        members = answer.sets.members(answer.probabilities).cpu().numpy()
        is_known = (truth >= 0) & (truth < c)
        in_set = members[np.arange(len(truth)), np.where(is_known, truth, 0)] & is_known
        answers = replace(answers, set_sizes=members.sum(1), in_set=in_set)
    if settings.least_cache is None:
        return answers
    strength = terms.strongest(answer.index.retrieval.keys.counts).double().cpu().numpy()
    return replace(answers, strength=strength, no_match=strength < settings.least_cache)


def _area_under_roc(high: KeyArray, low: KeyArray) -> float | None:
    """Return the probability that a ``high`` score exceeds a ``low`` score. Equal scores count as half."""
    if not len(high) or not len(low):
        return None
    ordered = np.sort(low)
    # The mean of both sides counts ties as half (Mann and Whitney, 1947).
    below = np.searchsorted(ordered, high, "left") + np.searchsorted(ordered, high, "right")
    return float(below.mean() / (2 * len(low)))


def _mean(values: BoolArray | IntArray) -> float | None:
    return float(values.mean()) if len(values) else None
