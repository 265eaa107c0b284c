"""Check the accuracy that a build estimates, its interval, and the calibration, against test images.

Each build has another shape: a dataset, some of its classes, 2 to 16 shots per class, even or uneven, with or without
text. The estimate comes from the shots alone. The truth is the mean accuracy over the classes of all test images of
these classes. Shapes are drawn from the datasets of ``accuracy.py`` with the given seed. The exponent of the learning
curve and the width of the interval were chosen with seeds 100 and above. The floor is the ECE that probabilities have
on as many test images if they are exactly right.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path

import click
import common
import numpy as np
import torch
from accuracy import DATASETS
from common import machine, markdown

from retrieval_tip import Index, tip
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.fit import closed_form

TABLES = ("dtd", "cars", "caltech", "caltech-text", "flowers", "food")
SHOTS = (2, 3, 4, 5, 8, 16)
FEWEST = 5
DRAWS = 100
"""Number of draws of right and wrong answers to measure the floor of an ECE."""
HEADS = (
    "builds",
    "number",
    "in the interval",
    "bias",
    "mean error",
    "mean width",
    "ECE",
    "its floor",
    "ECE above 0.06",
)


@dataclass(frozen=True)
class Build:
    """A shape, the estimate of its build with the interval, and the truth, all from 0 to 1."""

    shape: str
    few: bool
    estimate: float
    low: float
    high: float
    truth: float
    ece: float
    floor: float

    @property
    def covered(self) -> bool:
        return self.low <= self.truth <= self.high


@dataclass(frozen=True)
class Drawn:
    """An index over the shots of a ``shape``, and the ``features`` and the class ids (``truth``) of its test images."""

    shape: str
    few: bool
    index: Index
    features: np.ndarray
    truth: np.ndarray

    def balanced(self, values: np.ndarray) -> float:
        """Return the mean over the classes of a value per test image."""
        return float(np.mean([values[self.truth == i].mean() for i in np.unique(self.truth)]))


def drawn(name: str, shared: Path, draw: np.random.Generator) -> Drawn:
    """Draw a shape of a dataset."""
    dataset = DATASETS[name]
    pool, _ = dataset.pool_of(16, shared)
    items = dataset.items(pool, shared)
    c, shots = len(pool.class_names), int(draw.choice(SHOTS))
    classes = np.sort(draw.permutation(c)[: int(draw.integers(FEWEST, c + 1))])
    even, text = bool(draw.integers(2)), pool.has_text and bool(draw.integers(2))
    ids, rows = pool.class_ids.numpy(), []
    for own in classes:
        there = draw.permutation(np.flatnonzero(ids == own))
        rows.append(there[: shots if even else int(draw.integers(2, 2 * shots))])
    chosen = np.concatenate(rows)
    index = Index.from_features(
        np.asarray(pool.keys)[chosen],
        np.searchsorted(classes, ids[chosen]),
        [pool.class_names[i] for i in classes],
        pool.text_weights.numpy()[classes] if text else None,
        settings=pool.settings,
        device="cpu",
    )
    asked = np.isin(items.ids, classes)
    shape = (
        f"{DATASETS[name].title}, {len(classes)} classes, {shots} shots{'' if even else ', uneven'}"
    )
    truth = np.searchsorted(classes, items.ids[asked])
    few = shots <= 5 and not text
    return Drawn(shape + (", text" if text else ""), few, index, items.features[asked], truth)


def ece_floor(confidence: np.ndarray) -> float:
    """Return the mean ECE of answers that are right as often as their ``confidence`` says."""
    chance = np.random.default_rng(0)
    answers = (chance.random(len(confidence)) < confidence for _ in range(DRAWS))
    return statistics.mean(expected_calibration_error(confidence, right) for right in answers)


def build(made: Drawn) -> Build | None:
    """Compare the estimate of a build with its test images."""
    index, choice = closed_form.fit(made.index)
    if choice.both is None or choice.interval is None:
        return None
    confidence, found = tip.probabilities(
        index.logits(made.features), index.settings.temperature
    ).max(1)
    right = found.numpy() == made.truth
    ece = expected_calibration_error(confidence.numpy(), right)
    floor = ece_floor(confidence.numpy())
    return Build(
        made.shape, made.few, choice.both, *choice.interval, made.balanced(right), ece, floor
    )


@click.command(help=__doc__)
@common.shared_option
@click.option("--builds", default=80, show_default=True, help="Number of shapes.")
@click.option("--seed", default=1, show_default=True)
@click.option("--each", is_flag=True, help="Print every build.")
def main(shared: Path, builds: int, seed: int, each: bool) -> None:
    """Fit the shapes, and print how well the estimates hold."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(seed)
    made = [build(drawn(TABLES[i % len(TABLES)], shared, draw)) for i in range(builds)]
    done = [one for one in made if one is not None]
    click.echo(f"{machine()}; seed {seed}")
    for one in done if each else ():
        click.echo("  ".join(str(part) for part in dataclasses.astuple(one)))
    lines = []
    for name, own in (
        ("all", done),
        ("at most 5 shots, no text", [one for one in done if one.few]),
    ):
        gaps = [100 * (one.estimate - one.truth) for one in own]
        width = 100 * statistics.mean(one.high - one.low for one in own)
        eces = (
            f"{statistics.mean(values):.3f}"
            for values in zip(*((one.ece, one.floor) for one in own), strict=True)
        )
        errors = (
            f"{statistics.mean(gaps):+.1f}",
            f"{statistics.mean(map(abs, gaps)):.1f}",
            f"{width:.1f}",
        )
        covered, above = sum(one.covered for one in own), sum(one.ece > 0.06 for one in own)
        lines.append((name, len(own), covered, *errors, *eces, above))
    click.echo(f"\n{markdown(HEADS, lines)}")


if __name__ == "__main__":
    main()
