"""Measure the time and peak memory of a fit, and the time of answers that use solved values.

Features and text weights are synthetic, and their cosines are similar to those of CLIP (benchmarks/made.py). Answers
that use all keys are timed in turn with the two matrix products that they cannot avoid, ``phi(f) phi(K)^T`` and ``w
V``.
"""

from __future__ import annotations

import resource
import time

import click
import numpy as np
import torch
from common import GIB, SEED, against, clocked, machine, medians, show, take_turns
from made import Made

from retrieval_tip import Index
from retrieval_tip.fit import closed_form

QUERIES, ROUNDS = 1024, 5


def peak() -> float:
    """Return the peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


@against
@click.command(help=__doc__)
@click.option("--keys", default=16_000, show_default=True)
@click.option("--classes", default=1000, show_default=True)
@click.option("--dim", default=1024, show_default=True)
def main(keys: int, classes: int, dim: int) -> None:
    """Fit an index, classify the queries, and print the results."""
    click.echo(machine())
    made, ids, test = (
        Made(classes, dim, SEED),
        np.sort(np.arange(keys) % classes),
        np.arange(QUERIES) % classes,
    )
    names = made.names
    cache = Index.from_features(made.draw(ids, 1), ids, names, made.text, device="cpu")
    before, queries = peak(), made.draw(test, 2)

    def right(cache: Index) -> float:
        return 100 * float((cache.logits(queries).argmax(1).numpy() == test).mean())

    plain, fitted = right(cache), list[Index]()
    begun = time.process_time()

    def fit() -> None:
        made, choice = closed_form.fit(cache)
        click.echo(choice)
        fitted.append(made)

    seconds = take_turns("fit", {"fit": lambda _: clocked(fit)}, 1, warm=0)
    cache = fitted.pop()
    row: dict[str, object] = {
        "fit, s": seconds["fit"][0],
        "processor s": time.process_time() - begun,
    }
    row |= {"GiB more than the keys": peak() - before}
    row |= {"top-1, Tip-Adapter (1, 5.5)": plain, "top-1, fitted": right(cache)}
    if cache.values is not None and cache.metric is not None:
        points, values = cache.metric(torch.from_numpy(queries)), cache.values
        met = cache.metric(torch.from_numpy(np.array(cache.keys)))
        weights = points @ met.T
        sides = {
            "answers": lambda _: clocked(lambda: cache.logits(queries)),
            "two products": lambda _: clocked(lambda: (points @ met.T, weights @ values)),
        }
        taken = medians(take_turns("answers over all keys", sides, ROUNDS))
        row["answers, x the two products"] = taken["answers"] / taken["two products"]
    show(f"{keys} keys x {dim}, {classes} classes, {QUERIES} queries", [row])


if __name__ == "__main__":
    main()
