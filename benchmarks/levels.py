"""Measure answers at the narrowest level of groups (``--at-least``) against answers that are withheld (``--abstain``).

The groups of Caltech101 are in ``caltech_groups.csv``, which was written before anything was measured. A car's group is
its make, which is the part of its name between the year and the model. An index is fitted to the published shots, and
classifies all test images with both options.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import torch
from accuracy import DATASETS
from common import SHARED, machine

from retrieval_tip.fit import closed_form
from retrieval_tip.report.report import draw
from retrieval_tip.settings import Levels

TWO_WORDS = ("AM General", "Aston Martin", "Land Rover")
"""Makes whose name has a space."""


def groups_of(name: str, class_names: Sequence[str]) -> Levels:
    """Return the groups of the classes of a dataset."""
    if name == "cars":
        models = {car: car[5:] for car in class_names}
        makes = {
            car: " ".join(model.split()[: 2 if model.startswith(TWO_WORDS) else 1]) for car, model in models.items()
        }
        return Levels(("model", "make"), {car: (make,) for car, make in makes.items()})
    with (Path(__file__).parent / "caltech_groups.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return Levels(tuple(head), {own: tuple(group or None for group in path) for own, *path in rows})


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--data", type=click.Choice(list(DATASETS)), multiple=True, default=["caltech", "photos", "cars"])
@click.option("--shots", type=int, multiple=True, default=[1, 2, 4, 16], show_default=True)
@click.option("--at-least", "least", default=0.9, show_default=True)
def main(shared: Path, data: tuple[str, ...], shots: tuple[int, ...], least: float) -> None:
    """Print the share and the accuracy of the answers at each level, and of those that are not withheld."""
    torch.set_num_threads(1)
    click.echo(f"{machine()}; at least {least:g}; share of the photos (share of right answers) in %\n")
    click.echo("| | top-1 | class | first group | second group | answers right | no answer | no answer, --abstain |")
    click.echo("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in data:
        for number in shots:
            pool, _ = DATASETS[name].pool_of(number, shared)
            index, items = draw(pool, number, 1), DATASETS[name].items(pool, shared)
            closed_form.fit(index)
            index.groups = groups = groups_of(name, index.class_names)
            table = index.classify(items.features, neighbours=0, logits=False, at_least=least).to_arrow()
            truth = pa.array(index.class_names).take(pa.array(items.ids)).to_pylist()
            labels, levels = table["label"].to_pylist(), np.array(table["level"].to_pylist(), dtype=object)
            best = np.array([own[0] for own in table["labels"].to_pylist()]) == np.array(truth)
            names = [*groups.levels, *[""] * (3 - len(groups.levels))]
            right = np.array(
                [
                    label is not None and groups.at(groups.levels.index(level), own) == label
                    for label, level, own in zip(labels, levels, truth, strict=True)
                ]
            )
            given, cells = levels != np.array(None), [f"{100 * best.mean():.1f}"]
            for level in names:
                at = levels == level
                cells.append(f"{100 * at.mean():.1f} ({100 * right[at].mean():.1f})" if at.any() else "-")
            cells += [f"{100 * right[given].mean():.1f}", f"{100 * (~given).mean():.1f}"]
            cells.append(f"{100 * (levels != names[0]).mean():.1f}")
            click.echo(f"| {DATASETS[name].title}, {number} shots | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
