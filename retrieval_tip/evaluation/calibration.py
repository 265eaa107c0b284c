"""Calibrate probabilities with a temperature, and measure calibration error and accuracy against coverage.

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
from torch.nn.functional import cross_entropy

from retrieval_tip import tip
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.fit.folds import blend
from retrieval_tip.model import Index
from retrieval_tip.retrieval.logits import slices

log = logging.getLogger(__name__)

BINS = 15
"""Number of bins, as in Guo et al."""
LOWEST, HIGHEST = 1e-4, 1e4
"""Bounds of a fitted temperature, as multiples of the largest spread within a row of logits."""
ITSELF = 1e-4
"""Squared distance to a key below which a validation item counts as a shot."""
REACH = 16.0
"""Bound on the logarithm of ``1 / T`` for logits of unit spread, beyond the bounds of a temperature."""
ROWS = 1024
"""Number of answers whose probabilities are computed at a time, because they take twice the memory of the logits."""

Floats = npt.NDArray[np.float64]


class Bins(NamedTuple):
    """The answers with ``low < confidence <= high`` in each of ``m`` bins. The first bin includes a confidence of 0.

    All arrays have shape ``[m]``. ``confidence`` and ``accuracy`` are means, which are NaN in an empty bin.
    """

    low: Floats
    high: Floats
    counts: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


class Coverage(NamedTuple):
    """Coverage and accuracy at the ``m`` distinct thresholds, in descending order. All arrays have shape ``[m]``.

    ``coverage`` is the fraction of answers with ``confidence >= threshold``, and ``accuracy`` is their accuracy.
    """

    threshold: Floats
    coverage: Floats
    accuracy: Floats


def reliability(confidence: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS) -> Bins:
    """Return the confidence and accuracy in equal bins ``(m / bins, (m + 1) / bins]`` (Guo et al., eq. 2).

    Both arrays have shape ``[n]``, with n >= 1 and values in [0, 1].
    """
    p, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    edges = np.linspace(0, 1, bins + 1)
    of = np.searchsorted(edges[1:-1], p, side="left")
    counts = np.bincount(of, minlength=bins)
    shares = np.where(counts > 0, counts, np.nan)
    means = [np.bincount(of, weights=values, minlength=bins) / shares for values in (p, hit)]
    return Bins(edges[:-1], edges[1:], counts, *means)


def expected_calibration_error(confidence: npt.ArrayLike, right: npt.ArrayLike, bins: int = BINS) -> float:
    """Return ``ECE = sum over bins m of (n_m / n) |accuracy_m - mean confidence_m|``, 0 to 1 (Guo et al., eq. 3).

    See :func:`reliability` for the bins. The estimate is biased upwards if the bins contain few answers.
    """
    curve = reliability(confidence, right, bins)
    gaps = curve.counts * np.abs(curve.accuracy - curve.confidence)
    return float(np.nansum(gaps) / curve.counts.sum())


def accuracy_coverage(confidence: npt.ArrayLike, right: npt.ArrayLike) -> Coverage:
    """Return the accuracy and coverage at each distinct confidence. The last entry covers all answers."""
    p, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    order = np.argsort(-p, kind="stable")
    p, hit = p[order], hit[order]
    last = np.flatnonzero(np.append(p[1:] < p[:-1], True))
    answered = last + 1.0
    return Coverage(p[last], answered / len(p), np.cumsum(hit)[last] / answered)


def fit_temperature(logits: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor) -> float:
    """Return the temperature T > 0 that maximises the likelihood of ``softmax(logits / T)`` (Guo et al., section 4.2).

    The convex ``NLL(u) = mean over i of [log sum_c exp(u z_ic) - u z_i,label]`` is minimised over ``u = 1 / T`` by
    :func:`folds.blend`. If the logits are scaled, T is scaled by the same factor. The temperature does not change the
    predictions.

    The best T tends to 0 if every answer is right, and to infinity if the logits are no better than chance. T is
    therefore bounded (see :func:`temperature_bounds`). If all logits are equal, T is 1.

    ``logits`` are finite and have shape ``[n, c]``. ``labels`` are class ids of shape ``[n]``.
    """
    z, y = torch.as_tensor(logits), torch.as_tensor(labels, dtype=torch.int64)
    low, high = temperature_bounds(z)
    own = z.gather(1, y[:, None])[:, 0]
    if low == high or bool((own == z.amax(dim=1)).all()):
        return low
    if float((own - z.mean(dim=1, dtype=torch.float64)).mean()) <= 0:
        return high
    return min(max(1 / blend(None, z, None, y, smoothing=0, reach=REACH).b, low), high)


def temperature_bounds(logits: npt.ArrayLike | Tensor) -> tuple[float, float]:
    """Return the bounds that :func:`fit_temperature` uses for these logits, or (1, 1) if all logits are equal."""
    z = torch.as_tensor(logits)
    spread = float((z.amax(dim=1).double() - z.amin(dim=1).double()).max())
    return (LOWEST * spread, HIGHEST * spread) if spread > 0 else (1.0, 1.0)


def negative_log_likelihood(
    logits: npt.ArrayLike | Tensor, labels: npt.ArrayLike | Tensor, temperature: float
) -> float:
    """Return the mean of ``-log softmax(logits / T)[label]`` in nats. See :func:`fit_temperature` for the arguments."""
    z, y = torch.as_tensor(logits), torch.as_tensor(labels, dtype=torch.int64)
    sums = (cross_entropy(z[part].double() / temperature, y[part], reduction="sum") for part in slices(len(z), ROWS))
    return float(sum(sums)) / len(z)


@dataclass(frozen=True)
class Calibration:
    """A temperature fitted on ``n`` items, with the ECE and the negative log-likelihood (in nats) before and after.

    ``at_bound`` is true if the best temperature would be 0 or infinite.
    """

    temperature: float
    n: int
    top1: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    at_bound: bool


def calibrate(index: Index, source: Source, reader: Reader) -> Calibration:
    """Fit the temperature of an index on a labelled validation source (see :func:`fit_temperature`).

    The temperature is saved in a new version of the index folder. Fit it again after you change the settings or the
    keys. Raises InputError if the source is empty, or if one of its labels is not a class of the index. Raises
    StoreError if the folder cannot be written.
    """
    assert index.folder is not None
    truth, shots = torch.from_numpy(index.ids_of(source)), 0
    parts: list[Tensor] = []
    true: list[Tensor] = []
    for block in reader.blocks(source):
        parts.append(index.logits(block.features).cpu())
        true.append(truth[torch.from_numpy(block.positions)])
        _, rows = index.nearest(torch.from_numpy(block.features).to(index.device), 1)
        nearest = index.keys[np.maximum(rows[:, 0], 0)].astype(np.float32)
        shots += int((((block.features - nearest) ** 2).sum(axis=1) <= ITSELF).sum())
    logits, y = torch.cat(parts), torch.cat(true)
    before, fitted, right = index.settings.temperature, fit_temperature(logits, y), logits.argmax(dim=1) == y

    def errors(temperature: float) -> tuple[float, float]:
        confidence = [tip.probabilities(logits[part], temperature).amax(dim=1) for part in slices(len(y), ROWS)]
        ece = expected_calibration_error(torch.cat(confidence).numpy(), right.numpy())
        return ece, negative_log_likelihood(logits, y, temperature)

    at_bound = any(np.isclose(fitted, bound, rtol=1e-9) for bound in temperature_bounds(logits))
    if at_bound:
        what = "every answer is right" if bool(right.all()) else "the answers are no better than chance"
        bound = f"so the temperature is at its bound ({fitted:.4g})"
        log.warning("%s: %s, %s; use more validation photos", source.name, what, bound)
    if shots:
        known = f"{shots} of {len(y)} photos are in the index"
        log.warning("%s: %s, so its probabilities will be too high; use other photos", source.name, known)
    index.choose(replace(index.settings, temperature=fitted))
    index.provenance = index.provenance | {"temperature": f"fitted on {source.name}, n={len(y)}"}
    index.save(index.folder, "calibrate")
    (ece_before, nll_before), (ece_after, nll_after) = errors(before), errors(fitted)
    top1 = float(right.double().mean())
    return Calibration(fitted, len(y), top1, ece_before, ece_after, nll_before, nll_after, at_bound)
