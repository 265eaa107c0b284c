"""Measure the accuracy of an index with fewer shots per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from retrieval_tip.data.source import few_shot
from retrieval_tip.errors import percent
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.folds import Queries
from retrieval_tip.model import Index
from retrieval_tip.report import plots
from retrieval_tip.report.results import Results
from retrieval_tip.retrieval.defaults import untouched_settings

if TYPE_CHECKING:
    from markupsafe import Markup

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom. Beyond that, it is 1.96."""


class Curve(NamedTuple):
    """The accuracy by number of shots: a diagram, and rows (shots, draws, mean accuracy, range)."""

    svg: Markup
    rows: list[tuple[int, int, str, str]]


def measure_curve(results: Results, numbers: Sequence[int], seeds: int) -> Curve | None:
    """Measure the accuracy for each number of shots, or return ``None`` if there is nothing to draw."""
    if not numbers or results.is_tuned or not len(results.new):
        return None
    pool, runs = closed_form.unfitted(results.index), dict[int, list[float]]()
    for number in tqdm(numbers, unit="draw", disable=None if results.reader.progress else True, leave=False):
        draws = range(1, 2 if set(pool.counts) <= {0, number} else seeds + 1)  # otherwise all draws are the same
        runs[number] = [_accuracy(results, draw(pool, number, seed)) for seed in draws]
    rows = []
    for number, own in runs.items():
        ends = f"{percent(min(own))} to {percent(max(own))}"
        rows.append((number, len(own), percent(float(np.mean(own))), ends))
    label = "; ".join(f"{shots}: {mean}" for shots, _, mean, _ in rows)
    figure = partial(plots.draw_shots, runs, list(map(half_width, runs.values())), results.evaluation.zero_shot_top1)
    return Curve(plots.svg(figure, f"Accuracy by number of examples per class. {label}"), rows)


def draw(pool: Index, shots: int, seed: int) -> Index:
    """Return an index of ``shots`` keys per class, drawn from an unfitted ``pool`` by the published rule."""
    order = np.argsort(pool.labels["key_id"].to_numpy(), kind="stable")
    labels = pool.class_ids.cpu().numpy()[order].tolist()
    drawn = pool.take(np.sort(order[few_shot(labels, shots, seed)]))
    alpha, beta = untouched_settings(drawn.keys, drawn.class_ids.cpu().numpy())
    return drawn.with_settings(drawn.settings.override(alpha=alpha, beta=beta))


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % confidence interval of the mean, or ``None`` for one value."""
    n = len(values)
    if n == 1:
        return None
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def _accuracy(results: Results, drawn: Index) -> float:
    """Fit drawn shots as the whole index was fitted, and return the accuracy. A single shot cannot be held out."""
    if results.index.fitted is not None:
        closed_form.fit(drawn)
    elif max(drawn.counts) > 1:
        choice = search_hp.search(drawn, Queries.leave_one_out(drawn), cautious=True)
        drawn = drawn.with_settings(choice.settings(drawn.settings))
    answers = drawn.logits(results.block.features[results.new]).argmax(dim=1).cpu().numpy()
    return float((answers == results.answers.truth[results.new]).mean())
