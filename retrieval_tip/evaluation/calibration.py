"""Calibrate probabilities with a temperature, and measure the calibration error.

``confidence`` holds the probability of each answer, and ``right`` tells whether the answer is correct. "Guo et al."
refers to C. Guo, G. Pleiss, Y. Sun and K. Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import slices
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.evaluation.held_out import judged
from retrieval_tip.fit.blend import HeldTerms
from retrieval_tip.model import Index
from retrieval_tip.settings import Ask

log = logging.getLogger(__name__)

BINS = 15
"""Number of bins of the error, as in Guo et al."""
REACH = 9.0
"""Bound on the logarithm of ``1 / T`` for logits of unit spread."""
ROWS = 1024
"""Number of answers whose probabilities are computed at a time, because they take twice the memory of the logits."""


class Bin(NamedTuple):
    """The ``n`` answers with ``low < confidence <= high``, and the means of their confidence and accuracy."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(confidence: npt.ArrayLike, right: npt.ArrayLike, bins: int) -> list[Bin]:
    """Return the equal bins ``(m / bins, (m + 1) / bins]`` that have answers (Guo et al., eq. 2).

    Both arrays have shape ``[n]``, with n >= 1 and values in [0, 1]. The first bin includes a confidence of 0.
    """
    p = np.asarray(confidence, dtype=np.float64)
    hit = np.asarray(right, dtype=np.float64)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.searchsorted(edges[1:-1], p, side="left")
    curve = []
    for m in np.unique(bin_of).tolist():
        inside = bin_of == m
        low, high = edges[m : m + 2].tolist()
        n = int(inside.sum())
        curve.append(Bin(low, high, n, float(p[inside].mean()), float(hit[inside].mean())))
    return curve


def expected_calibration_error(confidence: npt.ArrayLike, right: npt.ArrayLike) -> float:
    """Return ``ECE = sum over bins m of (n_m / n) |accuracy_m - mean confidence_m|``, 0 to 1 (Guo et al., eq. 3).

    See :func:`reliability` for the bins. The estimate is biased upwards if the bins contain few answers.
    """
    curve = reliability(confidence, right, BINS)
    errors = sum(group.n * abs(group.accuracy - group.confidence) for group in curve)
    return float(errors / sum(group.n for group in curve))


def fit_temperature(logits: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor) -> float:
    """Return the temperature T > 0 that maximises the likelihood of ``softmax(logits / T)`` (Guo et al., section 4.2).

    ``1 / T`` is the weight that :class:`blend.HeldTerms` fits, within bounds: the best T tends to 0 if every answer is
    right, and to infinity if the logits are no better than chance. If the logits are scaled, T is scaled by the same
    factor. The temperature does not change the predictions. If all logits are equal, T is 1.

    ``logits`` are finite and have shape ``[n, c]``. ``labels`` are class ids of shape ``[n]``.
    """
    z = torch.as_tensor(logits)
    y = torch.as_tensor(labels, dtype=torch.int64)
    if not bool((z.amax(1) > z.amin(1)).any()):
        return 1.0
    return 1 / HeldTerms(None, z, None, y, smoothing=0, reach=REACH).blend().b


@dataclass(frozen=True)
class Calibration:
    """A temperature fitted on ``n`` items, and the expected calibration error (ECE) before and after."""

    temperature: float
    n: int
    top1: float
    ece_before: float
    ece_after: float


def calibrate(index: Index, source: Source, reader: Reader) -> tuple[Index, Calibration]:
    """Fit the temperature of an index on a labelled validation source (see :func:`fit_temperature`).

    Items that are shots of the index are classified without themselves (see :func:`held_out.answered`). The
    temperature is saved in a new version of the index folder, which is returned. Fit it again after you change the
    settings or the keys.
    Raises InputError if the source is empty, or if one of its labels is not a class of the index. Raises StoreError if
    the folder cannot be written.
    """
    assert index.folder is not None
    truth = torch.from_numpy(index.ids_of(source))
    asked = judged(index, source, reader, Ask(neighbours=0))
    answers = ((answer.logits.cpu(), truth[answer.block.positions]) for answer in asked)
    logits, y = (torch.cat(column) for column in zip(*answers, strict=True))
    right = logits.argmax(1) == y
    before = index.settings.temperature

    def error(temperature: float) -> float:
        confidence = [
            tip.probabilities(logits[rows], temperature).amax(1) for rows in slices(len(y), ROWS)
        ]
        return expected_calibration_error(torch.cat(confidence).numpy(), right.numpy())

    if bool(right.all()):
        log.warning(
            "%s: every answer is right, so all probabilities will be about 1; use more photos",
            source.name,
        )
    fitted = fit_temperature(logits, y)
    made = index.with_settings(replace(index.settings, temperature=fitted), chosen=True)
    provenance = index.provenance | {"temperature": f"fitted on {source.name}, n={len(y)}"}
    made = made.altered(provenance=provenance).save(index.folder, "calibrate")
    accuracy = float(right.double().mean())
    return made, Calibration(fitted, len(y), accuracy, error(before), error(fitted))
