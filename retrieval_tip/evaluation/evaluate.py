"""Measure the accuracy and the calibration of an index on labelled images or features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.data.encoder import Encoder, FeatureBlock
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import Skipped, UsageError
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.settings import KeysMet, Settings

CONFUSIONS = 10

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Details:
    """Details of each item, as arrays of shape ``[n]``.

    ``positions`` are the item positions in the source. ``log_truth`` is the natural logarithm of the probability of the
    true class, which can be used to rank items whose probabilities round to 0. ``text`` and ``cache`` hold the class
    ids with the largest text logit and cache logit.
    """

    positions: Ints
    log_truth: Floats
    text: Ints
    cache: Ints


@dataclass(frozen=True)
class Answers:
    """The answers in an evaluation, in the order of the items.

    ``truth`` and ``predicted`` are class ids and ``confidence`` is a probability, of shape ``[n]``.
    """

    truth: Ints
    predicted: Ints
    confidence: Floats
    class_names: list[str]
    details: Details | None = None

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each answer is right, as an array of shape ``[n]``."""
        right: npt.NDArray[np.bool_] = self.truth == self.predicted
        return right


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of an index on the ``n`` readable items of a source. All accuracies are fractions.

    - ``top1``, ``top5``: the accuracies of the blended logits
    - ``zero_shot_top1``: the accuracy of the text logits, or ``None`` if the index has no text weights
    - ``cache_top1``: the accuracy of the cache logits
    - ``per_class``: the top-1 accuracy of each class that occurs in the source
    - ``mean_per_class``: the mean of ``per_class``
    - ``ece``: the expected calibration error of ``softmax(blended logits / temperature)`` in 15 bins
    - ``confusions``: the most frequent errors, as tuples (label, predicted, count)
    - ``coverage``: the fraction of answers whose probability is at least ``abstain``, if ``abstain`` is given
    - ``selective_top1``: the accuracy of these answers, or ``None`` if there are none
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
    per_class: dict[str, float]
    confusions: list[tuple[str, str, int]]
    answers: Answers = field(compare=False, repr=False)
    abstain: float | None = None
    coverage: float | None = None
    selective_top1: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the figures that ``evaluate --json`` prints. ``k`` is ``"all"`` if every key is used."""
        left_out = {"answers"} | ({"abstain", "coverage", "selective_top1"} if self.abstain is None else set())
        facts: dict[str, object] = {}
        for field_ in fields(self):
            if field_.name == "settings":
                facts |= self.settings.shown()
            elif field_.name not in left_out:
                facts[field_.name] = getattr(self, field_.name)
        return facts


def evaluate(
    cache: AnsweringIndex, source: Source, encoder: Encoder, *, k: KeysMet = None, tail: bool | None = None,
    abstain: float | None = None,
) -> Evaluation:  # fmt: skip
    """Classify a labelled source and compare the answers with its labels.

    ``k`` and ``tail`` default to the settings of the index. ``abstain`` is the probability below which an answer is
    withheld.

    Raises InputError if the source is empty, or if one of its labels is not a class of the index. Raises UsageError if
    ``abstain`` is not between 0 and 1.
    """
    cache = cache.with_settings(cache.settings.override(k=k, tail=tail))
    truth = cache.ids_of(source)
    return judge(cache, encoder.blocks(source), truth, encoder.skipped, abstain=abstain)


def judge(
    cache: AnsweringIndex, blocks: Iterable[FeatureBlock], ids: Ints, skipped: Sequence[Skipped] = (), *,
    abstain: float | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate ``blocks`` of encoded items against the class ids ``ids`` of their source.

    ``skipped`` is read after the last block. See :func:`evaluate` for the other arguments.
    """
    if abstain is not None and not 0 <= abstain <= 1:
        raise UsageError(f"abstain is {abstain}: give a probability, 0 to 1")
    places, parts = [], []
    for block in blocks:
        places.append(block.positions)
        for part in cache.parts(len(block.positions)):
            features, own = block.features[part], ids[block.positions[part]]
            parts.append(_answer(cache, features, own))
    positions = np.concatenate(places)
    ranked, confidence, log_truth = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    truth, predicted = ids[positions], ranked[:, 0]
    hits = ranked == truth[:, None]
    right = hits[:, 0]
    per_class = {cache.class_names[i]: float(right[truth == i].mean()) for i in np.unique(truth)}
    wrong = Counter(zip(truth[~right].tolist(), predicted[~right].tolist(), strict=True))
    confusions = [(cache.class_names[a], cache.class_names[b], n) for (a, b), n in wrong.most_common(CONFUSIONS)]
    answered = None if abstain is None else confidence >= abstain
    return Evaluation(
        top1=float(right.mean()),
        top5=float(hits[:, :-2].any(axis=1).mean()),
        zero_shot_top1=float(hits[:, -2].mean()) if cache.has_text else None,
        cache_top1=float(hits[:, -1].mean()),
        mean_per_class=float(np.mean(list(per_class.values()))),
        ece=expected_calibration_error(confidence, right),
        n=len(truth),
        skipped=len(skipped),
        settings=cache.settings,
        per_class=per_class,
        confusions=confusions,
        answers=Answers(
            truth,
            predicted,
            confidence,
            cache.class_names,
            Details(positions, log_truth, ranked[:, -2], ranked[:, -1]),
        ),
        abstain=abstain,
        coverage=None if answered is None else float(answered.mean()),
        selective_top1=None if answered is None or not answered.any() else float(right[answered].mean()),
    )


def _answer(cache: AnsweringIndex, features: npt.NDArray[np.float32], truth: Ints) -> tuple[Tensor, Tensor, Tensor]:
    """Classify ``q`` features whose classes are ``truth``, and return ``ranked``, ``confidence`` and ``log_truth``.

    ``ranked`` has shape ``[q, m + 2]``. It holds the class ids of the ``m`` largest blended logits (at most 5), the
    largest text logit and the largest cache logit. ``log_truth`` is as in :class:`Details`.
    """
    terms, settings = cache.terms(features), cache.settings
    text, alone, logits = terms.text, terms.photos(settings), terms.logits(settings)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    ranked = torch.cat([best, text.argmax(1, keepdim=True), alone.argmax(1, keepdim=True)], dim=1)
    confidence = tip.probabilities(logits, settings.temperature).gather(1, best[:, :1])[:, 0].double()
    scaled = logits / settings.temperature
    log_truth = scaled.gather(1, torch.from_numpy(truth)[:, None].to(scaled.device))[:, 0] - scaled.logsumexp(dim=1)
    return ranked.cpu(), confidence.cpu(), log_truth.double().cpu()
