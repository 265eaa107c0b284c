"""Plot diagrams as SVG elements for a report.

Plotting requires matplotlib (the extra ``plot``). The Okabe-Ito palette and the colour map cividis
are suitable for colour-blind readers.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import UsageError, counted, install, one_line, percent
from retrieval_tip.evaluation.calibration import accuracy_coverage, reliability
from retrieval_tip.evaluation.evaluate import Answers, Evaluation
from retrieval_tip.html import markup

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, ORANGE, GREY, BLACK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"
MOST_CLASSES, FEWER_CLASSES = 100, 40
"""Number of classes above which a plot is shortened, and number of worst classes that are then shown."""
WRITTEN = 20
"""Maximum size of a confusion matrix with numbers in its cells."""
ENOUGH = 20
"""Bars that stand for fewer answers than this have a lighter colour."""
LONGEST_NAME = 26
LOOKS = Path(__file__).with_name("plots.mplstyle")
MARKS = (0.5, 0.9, 0.99)
"""Thresholds that are marked on the accuracy-coverage curve."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Confusion(NamedTuple):
    """A confusion matrix: ``counts[i, j]`` items of class ``names[i]`` were classified as ``names[j]``.

    ``totals[i]`` is the number of items of class ``i``. ``of`` is the number of classes that occur. If there are many,
    ``counts`` only contains the classes with the most errors. It omits items of unknown classes that got "no match".
    """

    names: list[str]
    counts: Ints
    totals: Ints
    of: int


def confusion(answers: Answers) -> Confusion:
    """Count the answers by true and predicted class, in the order of the index."""
    truth, predicted, c, wrong = answers.truth, answers.predicted, len(answers.class_names), ~answers.right
    totals = np.bincount(truth, minlength=c)
    chosen = occurring = np.flatnonzero(totals + np.bincount(predicted, minlength=c))
    if len(occurring) > MOST_CLASSES:
        errors = np.bincount(truth[wrong], minlength=c) + np.bincount(predicted[wrong], minlength=c)
        chosen = np.sort(np.argsort(-errors, kind="stable")[:FEWER_CLASSES])
    both = np.isin(truth, chosen) & np.isin(predicted, chosen) & (answers.of_known | wrong)
    counts = np.zeros((len(chosen), len(chosen)), dtype=np.int64)
    np.add.at(counts, tuple(np.searchsorted(chosen, ids[both]) for ids in (truth, predicted)), 1)
    return Confusion([answers.class_names[i] for i in chosen], counts, totals[chosen], len(occurring))


def needs_matplotlib() -> None:
    """Raise UsageError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(f"a report needs matplotlib; run {install('plot')}") from None


def draw_confusion(evaluation: Evaluation) -> Figure:
    """Plot the confusion matrix. Rows are true classes, columns are predicted classes, and cells are row shares."""
    from matplotlib.colors import PowerNorm

    matrix = confusion(evaluation.answers)
    m = len(matrix.names)
    cell = 0.42 if m <= WRITTEN else 0.2 if m <= FEWER_CLASSES else 0.15
    side = max(3.0, cell * m)
    figure, axes = _figure(side + 3.4, side + 2.2)
    shares = 100 * matrix.counts / np.maximum(matrix.totals, 1)[:, None]
    image = axes.imshow(shares, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if m <= WRITTEN:
        for i, j in zip(*np.nonzero(matrix.counts), strict=True):
            colour = "white" if shares[i, j] < 45 else "black"
            axes.text(j, i, str(matrix.counts[i, j]), ha="center", va="center", color=colour, fontsize=8)
    names, size = list(map(_name, matrix.names)), 8 if m <= FEWER_CLASSES else 6.5
    axes.set_xticks(range(m), names, rotation=90, fontsize=size)
    axes.set_yticks(range(m), names, fontsize=size)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set_visible(False)
    label = "share of the true class, %"
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100], label=label)
    some = f"the {m} of {matrix.of} classes with most errors" if m < matrix.of else counted(m, "class")
    _title(axes, "Confusion matrix", f"{some}; {counted(evaluation.n, 'photo')}, top-1 {percent(evaluation.top1)}")
    return figure


def draw_reliability(evaluation: Evaluation) -> Figure:
    """Plot the accuracy per confidence bin, and below it the number of answers per bin."""
    answers = evaluation.answers
    known = answers.of_known
    bins = reliability(answers.confidence[known], answers.right[known])
    low, high, counts, confidence, accuracy = (column[bins.counts > 0] for column in bins)
    figure, (axes, below) = _figure(5.4, 6.2, nrows=2, sharex=True, height_ratios=[3.2, 1])
    centres, width = (low + high) / 2, high[0] - low[0]
    shades = [(BLUE, min(1.0, 0.25 + 0.75 * count / ENOUGH)) for count in counts]  # few answers are unreliable
    axes.bar(centres, 100 * accuracy, width * 0.92, color=shades)
    axes.bar([0], [0], 0, color=BLUE, label="accuracy of the answers")
    axes.hlines(100 * confidence, centres - width * 0.46, centres + width * 0.46, color=ORANGE, linewidth=2.5,
                label="mean probability of the answers")  # fmt: skip
    axes.plot([0, 1], [0, 100], color=GREY, linestyle="--", linewidth=1.2, label="perfect calibration")
    axes.set(ylim=(0, 101), yticks=range(0, 101, 20), ylabel="accuracy, %")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.02), ncols=2, fontsize=7, borderpad=0)
    below.bar(centres, counts, width * 0.92, color=GREY)
    below.set(xlabel="probability of the answer", xlim=(0, 1), ylabel="answers", yscale="log")
    below.set_ylim(0.7, counts.max() * 3)
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.yaxis.set_minor_formatter("")
    facts = f"expected calibration error {evaluation.ece:.3f}; temperature {evaluation.settings.temperature:.4g}"
    _title(axes, "Reliability", f"{facts}; {counted(int(known.sum()), 'photo')}")
    return figure


def draw_coverage(evaluation: Evaluation) -> Figure:
    """Plot the accuracy as a function of the coverage if the least confident answers are withheld."""
    answers = evaluation.answers
    curve = accuracy_coverage(answers.confidence, answers.right)
    figure, axes = _figure(6, 4.4)
    axes.step(100 * curve.coverage, 100 * curve.accuracy, where="post", color=BLUE, linewidth=1.8)
    marks = {*MARKS, *(() if evaluation.abstain is None else (evaluation.abstain,))}
    left = 100.0
    for threshold in sorted(marks):
        if answered := int((curve.threshold >= threshold).sum()):
            colour, x = ORANGE if threshold == evaluation.abstain else GREY, 100 * curve.coverage[answered - 1]
            axes.axvline(x, color=colour, linewidth=1, linestyle=":")
            axes.plot(x, 100 * curve.accuracy[answered - 1], "o", color=colour, markersize=6)
            axes.text(x, 0.02, f"P ≥ {threshold:g} ", rotation=90, ha="right", fontsize=8, color=BLACK,
                      transform=axes.get_xaxis_transform())  # fmt: skip
            left = min(left, x)
    first = min([*(100 * curve.coverage[curve.accuracy < curve.accuracy.max()]), left])  # the curve is flat below
    axes.set(xlim=(max(0.0, 0.9 * first - 5), 101), xlabel="coverage: share of photos answered, %")
    axes.set_ylabel("accuracy of the answers, %")
    said = f"all photos: {percent(evaluation.top1)}"
    share, accuracy = evaluation.coverage, evaluation.selective_top1
    if share is not None and accuracy is not None:
        said += f"; P ≥ {evaluation.abstain:g}: {percent(accuracy)} at {percent(share)} coverage"
    _title(axes, "Accuracy against coverage", f"{said}; {counted(evaluation.n, 'photo')}")
    return figure


def svg(draw: Callable[[], Figure], label: str) -> Markup:
    """Return a diagram as an ``<img>`` element with an SVG image and an accessible ``label``."""
    buffer = io.BytesIO()
    with _style({"svg.hashsalt": label}):
        figure = draw()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    start = markup('<img src="data:image/svg+xml;base64,{}" width="{:g}" alt="{}">')
    width = 96 * figure.get_figwidth()  # pixels per inch
    return start.format(base64.b64encode(buffer.getvalue()).decode(), width, one_line(label))


@contextmanager
def _style(settings: dict[str, str] | None = None) -> Iterator[None]:
    """Plot with :data:`LOOKS` and ``settings`` inside the context, ignoring the user's matplotlib settings."""
    from matplotlib import style

    fonts = logging.getLogger("matplotlib.font_manager")
    level, date = fonts.level, os.environ.pop("SOURCE_DATE_EPOCH", None)  # an invalid date would raise an error
    with style.context([LOOKS, settings or {}], after_reset=True), warnings.catch_warnings():
        fonts.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # fonts may lack the script of a class name
        try:
            yield
        finally:
            fonts.setLevel(level)
            os.environ |= {} if date is None else {"SOURCE_DATE_EPOCH": date}


def _figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """Return a new figure and its axes. This does not use pyplot, which could open windows."""
    from matplotlib.figure import Figure as New

    figure = New(figsize=(width, height))
    return figure, figure.subplots(**subplots)


def _title(axes: Axes, title: str, facts: str) -> None:
    axes.set_title(title, pad=20)
    axes.annotate(facts, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8.5, color=BLACK, va="bottom")


def _name(name: str) -> str:
    text = one_line(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"
