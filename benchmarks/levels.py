"""Measure answers at the narrowest level of groups (``--at-least``) against answers that are withheld (``--abstain``).

The groups of Caltech101 are in ``caltech_groups.csv``, which was written before anything was measured. A car's group is
its make, which is the part of its name between the year and the model. The textures of DTD have no groups, so their
first letters are used. For each draw, an index is fitted to some of the published shots (DTD: of the validation
images), and classifies all test images with both options.
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
from accuracy import DATASETS, SHOTS
from common import machine, markdown
from methods import Items, draw_shots

from retrieval_tip import Index
from retrieval_tip.fit import closed_form
from retrieval_tip.levels import Levels

TWO_WORDS = ("AM General", "Aston Martin", "Land Rover")
"""Makes whose name has a space."""
HEADS = (
    "",
    "top-1",
    "class",
    "first group",
    "second group",
    "answers right",
    "draws below",
    "levels below",
    "right without a match (answers)",
    "no answer",
    "no answer, --abstain",
)


def groups_of(name: str, class_names: Sequence[str]) -> Levels:
    """Return the groups of the classes of a dataset."""
    if name == "cars":
        words = {car: car.split()[1:] for car in class_names}  # the first word is the year
        makes = {
            car: " ".join(own[: 2 if " ".join(own[:2]) in TWO_WORDS else 1])
            for car, own in words.items()
        }
        return Levels(("model", "make"), {car: (make,) for car, make in makes.items()})
    if name == "dtd":
        return Levels(("texture", "letter"), {own: (own[0].upper(),) for own in class_names})
    with (Path(__file__).parent / "caltech_groups.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    return Levels(tuple(head), {own: tuple(group or None for group in path) for own, *path in rows})


def answers_of(index: Index, items: Items, least: float) -> list[np.ndarray]:
    """Return whether the answers are right: of all photos without ``least``, at each level, together, without a match.

    The last array tells which photos have no answer.
    """
    assert index.groups is not None
    table = index.classify(items.features, neighbours=0, logits=False, at_least=least).to_arrow()
    names, levels = index.groups.levels, np.array(table["level"].to_pylist(), dtype=object)
    truth = np.array(index.class_names)[items.ids].tolist()
    best = [own[0] == true for own, true in zip(table["labels"].to_pylist(), truth, strict=True)]
    rows = zip(table["label"].to_pylist(), levels, truth, strict=True)
    right = np.array(
        [level and index.groups.at(names.index(level), own) == label for label, level, own in rows]
    )
    given, without = levels != np.array(None), np.array(table["no_match"].fill_null(False))
    parts = [*(levels == level for level in (*names, "")[:3]), given, given & without]
    return [np.array(best), *(right[part].astype(bool) for part in parts), ~given]


@click.command(help=__doc__)
@common.shared_option
@click.option(
    "--data",
    type=click.Choice(list(DATASETS)),
    multiple=True,
    default=["caltech", "photos", "cars", "dtd"],
)
@click.option("--shots", type=int, multiple=True, default=[4], show_default=True)
@click.option("--draws", default=20, show_default=True)
@click.option("--at-least", "least", default=0.9, show_default=True)
def main(
    shared: Path, data: tuple[str, ...], shots: tuple[int, ...], draws: int, least: float
) -> None:
    """Print the share and the accuracy of the answers at each level, and of those that are not withheld."""
    torch.set_num_threads(1)
    click.echo(
        f"{machine()}; at least {least:g}, {draws} draws; share of the photos (share of right answers) in %\n"
    )
    rows = []
    for name, number in itertools.product(data, shots):
        pool, _ = DATASETS[name].pool_of(max(SHOTS), shared)
        items, found = DATASETS[name].items(pool, shared), []
        for seed in range(1, draws + 1):
            index = draw_shots(pool, number, seed)
            index, _ = closed_form.fit(index)
            index.groups = groups_of(name, index.class_names)
            found.append(answers_of(index, items, least))
        best, *levels, given, unmatched, none = map(np.concatenate, zip(*found, strict=True))
        below = [sum(own[i].mean() < least for own in found if own[i].size) for i in range(1, 5)]
        right = [
            f"{100 * own.mean():.1f}" if own.size else "-"
            for own in (best, given, unmatched, none, *levels)
        ]
        cells = [
            f"{100 * own.size / best.size:.1f} ({share})"
            for own, share in zip(levels, right[4:], strict=True)
        ]
        counts, withheld = (
            (below[3], sum(below[:3])),
            f"{100 - 100 * levels[0].size / best.size:.1f}",
        )
        title, without = f"{DATASETS[name].title}, {number} shots", f"{right[2]} ({unmatched.size})"
        rows.append([title, right[0], *cells, right[1], *counts, without, right[3], withheld])
    click.echo(markdown(HEADS, rows))


if __name__ == "__main__":
    main()
