"""The accuracies that the README quotes, through the command line, with the commands that gave them.

Protocol: keys are the shots (Caltech101: all 1600 of the shared part's train split; Food-101: 16 a class, drawn by the
published rule with seeds 1 to 5), one centre view each; alpha and beta are fixed beforehand and printed; nothing is
chosen on the test part that is scored.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

import click
from click.testing import CliRunner

from retrieval_tip.cli import main as command

PACKAGES = ("retrieval-tip", "torch", "open_clip_torch", "numpy", "faiss-gpu")


def tip(*arguments: object) -> str:
    """Standard output of a command; its failure is ours."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exit_code:
        raise click.ClickException(result.stderr or repr(result.exception))
    return result.stdout


def percent(index: Path, source: Path, *settings: object) -> list[float | None]:
    """Zero-shot, blend and cache alone."""
    scores = json.loads(tip("evaluate", index, source, *settings, "--json"))
    values = [scores[name] for name in ("zero_shot_top1", "top1", "cache_top1")]
    return [None if value is None else 100 * value for value in values]


def show(name: str, values: list[float | None]) -> None:
    """One line of the table."""
    click.echo(f"{name:<64}" + "".join(f"{'-' if value is None else f'{value:.1f}':>11}" for value in values))


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=Path("../shared"), show_default=True)
def main(shared: Path) -> None:
    """Build, evaluate, print."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    click.echo(f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, {versions}")
    click.echo(f"{'':<64}{'zero-shot':>11}{'blend':>11}{'cache':>11}")
    with tempfile.TemporaryDirectory() as folder:
        caltech, food = shared / "data/caltech101/split_zhou_Caltech101.json", shared / "data/clip-food9"
        index = Path(folder) / "caltech"
        template = ("--template", "a photo of a {}.")
        tip(
            "index",
            "build",
            "--fit",
            "none",
            caltech,
            "--model",
            f"local-dir:{shared / 'models/lit-mini'}",
            *template,
            "--out",
            index,
        )
        show("Caltech101, 100 classes, 16 shots, lit-mini, untouched settings", percent(index, caltech))
        for alpha, beta in ((1, 5.5), (50, 1), (1, 10)):
            scores = percent(index, caltech, "--alpha", alpha, "--beta", beta)
            show(f"Caltech101, 100 classes, 16 shots, lit-mini, alpha {alpha}, beta {beta}", scores)
        runs, untouched = [], []
        for seed in range(1, 6):
            index = Path(folder) / f"food-{seed}"
            shots = ("--shots", 16, "--seed", seed, "--text", food / "text.parquet")
            tip("index", "build", "--fit", "none", food / "train.parquet", *shots, "--out", index)
            runs.append(percent(index, food / "test.parquet", "--alpha", 1.17, "--beta", 5.5))
            untouched.append(percent(index, food / "test.parquet"))
        means = [statistics.mean(values) for values in zip(*runs, strict=True)]
        show("Food-101, 9 classes, 16 shots, ViT-B/32, alpha 1.17, beta 5.5, mean", means)
        means = [statistics.mean(values) for values in zip(*untouched, strict=True)]
        show("Food-101, 9 classes, 16 shots, ViT-B/32, untouched settings, mean", means)
        spread = [statistics.stdev(values) for values in zip(*runs, strict=True)]
        show("  standard deviation over seeds 1 to 5", spread)


if __name__ == "__main__":
    main()
