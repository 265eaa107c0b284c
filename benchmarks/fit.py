"""What a fit costs, the first and a later one, and answers with solved values: seconds here, and peak memory.

Made features with cosines like CLIP's (seed 0), with text. Beside the fit, a batch of queries over all keys is timed
against the two products that it cannot do without, ``phi(f) phi(K)^T`` and ``w V``, turn by turn, medians of five.
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import statistics
import time

import click
import made
import numpy as np
import torch

from retrieval_tip import CacheModel, tip
from retrieval_tip.fit import closed_form

QUERIES, ROUNDS, ADDED = 1024, 5, 1000


def clocked(run) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak() -> float:
    """Peak resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


@click.command(help=__doc__)
@click.option("--keys", default=16_000, show_default=True)
@click.option("--classes", default=1000, show_default=True)
@click.option("--dimensions", default=1024, show_default=True)
def main(keys: int, classes: int, dimensions: int) -> None:
    """One run."""
    click.echo(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, torch {torch.__version__}, seed 0"
    )
    source = made.Made(classes, dimensions)
    ids = np.sort(np.arange(keys) % classes)
    features = source.draw(ids, 1)
    names = [f"class {i}" for i in range(classes)]
    cache = CacheModel.from_features(features, ids, names, source.text, precision="float32")
    before, test = peak(), np.arange(QUERIES) % classes
    queries = source.draw(test, 2)
    plain = float((cache.logits(queries).argmax(1).numpy() == test).mean())
    seconds = clocked(lambda: click.echo(closed_form.fit(cache)))
    fitted = float((cache.logits(queries).argmax(1).numpy() == test).mean())
    click.echo(
        f"{keys} keys x {dimensions}, {classes} classes: fitted in {seconds:.1f} s, {peak() - before:.2f} GiB more"
    )
    click.echo(f"top-1 of {QUERIES} queries: Tip-Adapter (1, 5.5) {plain:.3f}, fitted {fitted:.3f}")
    again = clocked(lambda: closed_form.fit(cache))
    click.echo(f"fitted again, by the sums that are known, in {again:.1f} s")
    if cache.values is None or cache.metric is None:
        more = np.sort(np.arange(ADDED) % classes)
        further, known = source.draw(more, 3), cache.sums
        adding = clocked(lambda: cache.add(further, more))
        if known is not None:
            summing = clocked(lambda: known.added(further, more))
            click.echo(
                f"{ADDED} keys more in {adding:.2f} s, {summing:.2f} s of it for {known.nbytes / 2**20:.1f} MiB of sums"
            )
        return
    points, met = cache.metric(torch.from_numpy(queries)), torch.from_numpy(np.asarray(cache.met))
    values, rounds = cache.values, []
    for _ in range(ROUNDS):
        answers = clocked(lambda: cache.logits(queries))
        weights = tip.affinity(points, met)
        products = clocked(lambda: torch.mm(points, met.T)) + clocked(lambda weights=weights: torch.mm(weights, values))
        rounds.append(answers / products)
    click.echo(f"answers over all keys take {statistics.median(rounds):.2f} x the two products")


if __name__ == "__main__":
    main()
