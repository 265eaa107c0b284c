"""The search for alpha, beta and k against the published loop, which computes the affinity again at every grid point.

Made features (n keys, q queries, c classes, CLIP-like cosines), both sides in one run, taking turns, medians. The
published loop is timed over a sample of its 4000 points and scaled up: one affinity, one exponential and one one-hot
product a point. The search covers 31 betas and all k, and solves alpha exactly.
"""

from __future__ import annotations

import datetime
import platform
import statistics
import time

import click
import numpy as np
import torch

from retrieval_tip import CacheModel
from retrieval_tip.fit.search_hp import PAPER_STEPS, search, search_paper, unseen

POINTS = PAPER_STEPS[0] * PAPER_STEPS[1]


def features(n: int, c: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows: a part common to all, one of the class, and noise."""
    centres = np.random.default_rng(0).standard_normal((c + 1, d), dtype=np.float32)
    noise = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    ids = np.arange(n) % c
    rows = centres[0] + 0.65 * centres[1 + ids] + 0.75 * noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), ids


def published(f: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, text: torch.Tensor, y: torch.Tensor) -> None:
    """One point of the published loop."""
    affinity = f @ keys.T
    logits = text + 1.17 * ((-1) * (5.5 - 5.5 * affinity)).exp() @ values
    (logits.argmax(1) == y).float().mean()


@click.command(help=__doc__)
@click.option("--classes", default=100, show_default=True)
@click.option("--shots", default=16, show_default=True)
@click.option("--queries", default=400, show_default=True)
@click.option("--dim", default=512, show_default=True)
@click.option("--points", default=40, show_default=True, help="Points of the published loop that are timed.")
@click.option("--rounds", default=5, show_default=True)
def main(classes: int, shots: int, queries: int, dim: int, points: int, rounds: int) -> None:
    """Time both, print the ratio."""
    keys, ids = features(classes * shots, classes, dim, 1)
    text, _ = features(classes, classes, dim, 2)
    cache = CacheModel.from_features(keys, ids, [str(i) for i in range(classes)], text, device="cpu")
    asked = unseen(cache, *features(queries, classes, dim, 3), "made")
    f, y = torch.from_numpy(asked.features), torch.from_numpy(asked.ids)
    k = torch.from_numpy(keys)
    values = torch.nn.functional.one_hot(torch.from_numpy(ids), classes).float()
    seconds: dict[str, list[float]] = {"published loop": [], "search, all k": [], "search, k = all": [], "grid": []}
    sides = {
        "search, all k": lambda: search(cache, asked),
        "search, k = all": lambda: search(cache, asked, ks=[None]),
        "grid": lambda: search_paper(cache, asked),
    }
    for turn in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(points):
            published(f, k, values, 100 * f @ cache.text_weights.T, y)
        lasted = {"published loop": (time.perf_counter() - start) * POINTS / points}
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            lasted[name] = time.perf_counter() - start
        for name, value in lasted.items() if turn else ():  # the first round warms up
            seconds[name].append(value)
    click.echo(
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads: "
        f"{len(keys)} keys x {dim}, {classes} classes, {queries} queries"
    )
    loop = statistics.median(seconds["published loop"])
    for name, values_ in seconds.items():
        median = statistics.median(values_)
        click.echo(f"{name:<16} {median:9.3f} s   {loop / median:7.1f} times as fast as the published loop")


if __name__ == "__main__":
    main()
