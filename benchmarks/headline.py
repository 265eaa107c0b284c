"""Reproduce the accuracies in benchmarks/accuracy.md with the command line.

The shots are all 1600 images in the shared train split of Caltech101, and 16 images per class of Food-101, which are
drawn by the published rule with seeds 1 to N. Each shot has one centre view. Alpha and beta are fixed beforehand, and
are printed. No setting is selected on the test part.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import click
from common import PROGRAM, SHARED, machine, run, show


def percent(index: Path, source: Path, *settings: object) -> dict[str, float]:
    """Return the accuracies of the text (zero-shot), the blend and the cache."""
    scores = json.loads(run(*PROGRAM, "evaluate", index, source, *settings, "--json"))
    names = {"zero-shot": "zero_shot_top1", "blend": "top1", "cache alone": "cache_top1"}
    return {name: 100 * scores[own] for name, own in names.items()}


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--seeds", default=5, show_default=True, help="Number of random draws for Food-101.")
def main(shared: Path, seeds: int) -> None:
    """Build and evaluate the indexes, and print the results."""
    click.echo(machine("open_clip_torch"))
    caltech, food = shared / "data/caltech101/split_zhou_Caltech101.json", shared / "data/clip-food9"
    build, lines = (*PROGRAM, "-q", "index", "build", "--fit", "none"), []
    with tempfile.TemporaryDirectory() as folder:
        index, model = Path(folder) / "caltech", f"local-dir:{shared / 'models/lit-mini'}"
        run(*build, caltech, "--model", model, "--template", "a photo of a {}.", "--out", index)
        settings = [(), *(("--alpha", alpha, "--beta", beta) for alpha, beta in ((1, 5.5), (50, 1), (1, 10)))]
        for given in settings:
            name = " ".join(map(str, given)) or "untouched settings"
            lines.append(
                {"data": f"Caltech101, 100 classes, 16 shots, lit-mini, {name}"} | percent(index, caltech, *given)
            )
        for given in (("--alpha", 1.17, "--beta", 5.5), ()):
            found = []
            for seed in range(1, seeds + 1):
                index = Path(folder) / f"food-{seed}"
                if not index.exists():
                    drawn = ("--shots", 16, "--seed", seed, "--text", food / "text.parquet")
                    run(*build, food / "train.parquet", *drawn, "--out", index)
                found.append(percent(index, food / "test.parquet", *given))
            means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
            name = " ".join(map(str, given)) or "untouched settings"
            lines.append({"data": f"9 classes of Food-101, 16 shots, ViT-B/32, mean of {seeds}, {name}"} | means)
    show("top-1, %", lines)


if __name__ == "__main__":
    main()
