"""Measure answers at the narrowest level of groups (``--at-least``) against answers that are withheld (``--abstain``).

The groups of Caltech101 are in ``caltech_groups.csv``, which was written before anything was measured. A car's group is
its make, which is the part of its name between the year and the model. An index is fitted to the published shots, and
classifies all test images with both options.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import click
import common
import numpy as np
import torch
from accuracy import DATASETS
from common import machine, markdown
from methods import draw_shots

from retrieval_tip.fit import closed_form
from retrieval_tip.settings import Levels

TWO_WORDS = ("AM General", "Aston Martin", "Land Rover")
"""Makes whose name has a space."""
HEADS = ("", "top-1", "class", "first group", "second group", "answers right", "no answer", "no answer, --abstain")


def groups_of(name: str, class_names: Sequence[str]) -> Levels:
    """Return the groups of the classes of a dataset."""
    if name == "cars":
        words = {car: car.split()[1:] for car in class_names}  # the first word is the year
        makes = {car: " ".join(own[: 2 if " ".join(own[:2]) in TWO_WORDS else 1]) for car, own in words.items()}
        return Levels(("model", "make"), {car: (make,) for car, make in makes.items()})
    with (Path(__file__).parent / "caltech_groups.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return Levels(tuple(head), {own: tuple(group or None for group in path) for own, *path in rows})


@click.command(help=__doc__)
@common.shared_option
@click.option("--data", type=click.Choice(list(DATASETS)), multiple=True, default=["caltech", "photos", "cars"])
@click.option("--shots", type=int, multiple=True, default=[1, 2, 4, 16], show_default=True)
@click.option("--at-least", "least", default=0.9, show_default=True)
def main(shared: Path, data: tuple[str, ...], shots: tuple[int, ...], least: float) -> None:
    """Print the share and the accuracy of the answers at each level, and of those that are not withheld."""
    torch.set_num_threads(1)
    click.echo(f"{machine()}; at least {least:g}; share of the photos (share of right answers) in %\n")
    rows = []
    for name, number in itertools.product(data, shots):
        pool, _ = DATASETS[name].pool_of(number, shared)
        index, items = draw_shots(pool, number, 1), DATASETS[name].items(pool, shared)
        closed_form.fit(index)
        index.groups = groups = groups_of(name, index.class_names)
        table = index.classify(items.features, neighbours=0, logits=False, at_least=least).to_arrow()
        truth = np.array(index.class_names)[items.ids].tolist()
        labels, levels = table["label"].to_pylist(), np.array(table["level"].to_pylist(), dtype=object)
        best = [own[0] == true for own, true in zip(table["labels"].to_pylist(), truth, strict=True)]
        right = np.array(
            [
                label is not None and groups.at(groups.levels.index(level), own) == label
                for label, level, own in zip(labels, levels, truth, strict=True)
            ]
        )
        given, cells = levels != np.array(None), [f"{100 * np.mean(best):.1f}"]
        for level in (*groups.levels, "", "")[:3]:
            at = levels == level
            cells.append(f"{100 * at.mean():.1f} ({100 * right[at].mean():.1f})" if at.any() else "-")
        shares = right[given].mean(), (~given).mean(), (levels != groups.levels[0]).mean()
        rows.append([f"{DATASETS[name].title}, {number} shots", *cells, *(f"{100 * share:.1f}" for share in shares)])
    click.echo(markdown(HEADS, rows))


if __name__ == "__main__":
    main()
