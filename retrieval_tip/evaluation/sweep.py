"""Measure the accuracy of several methods, numbers of shots and seeds.

The shots are drawn from one index of all images. The result is a table with one row per run.
"""

from __future__ import annotations

import copy
import datetime
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from retrieval_tip.backbones.base import Identity
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.shots import few_shot, few_shot_split
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, first_line
from retrieval_tip.evaluation.baselines import Linear, class_means, linear_probe
from retrieval_tip.files import check_regular, replacing
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.finetune import finetune, own_shots
from retrieval_tip.fit.search_hp import PAPER_SCALES, leave_one_out, search, search_paper, unseen
from retrieval_tip.fit.trainer import Recipe
from retrieval_tip.retrieval.defaults import plain_settings, untouched_settings
from retrieval_tip.settings import Protocol, check_choice

Method = Literal[
    "zero-shot", "tip-adapter", "cache-alone", "untouched", "paper-constants", "closed-form", "class-means",
    "linear-probe", "tip-adapter-f",
]  # fmt: skip
"""Methods of a sweep.

- zero-shot: only the text logits
- tip-adapter: Tip-Adapter, with alpha, beta and k selected by the protocol
- cache-alone: only the cache logits, with beta and k selected by the protocol
- untouched: Tip-Adapter, with alpha and beta derived from the affinities between shots
- paper-constants: Tip-Adapter, with alpha 1 and beta 5.5
- closed-form: the metric, the values and the settings are fitted to the shots, as in a new index
- class-means: the nearest class mean, which does not use text
- linear-probe: logistic regression, which does not use text; C is selected on folds of the shots
- tip-adapter-f: the keys are fine-tuned on views of the shots; the settings and the epoch are selected on validation
  images
"""
METHODS: tuple[Method, ...] = get_args(Method)
PLAIN = METHODS[:-2]
"""Default methods, which do not require training by gradient descent."""
LINEAR = {"class-means": class_means, "linear-probe": linear_probe}


class Told(TypedDict):
    """The identity of a run. ``keys`` is the digest of the keys that the shots are drawn from."""

    keys: str
    test: str
    method: Method
    protocol: Protocol
    shots: int
    seed: int


class Run(Told):
    """A row in the table of runs.

    A ``k`` of 0 means all keys. ``alpha``, ``beta`` and ``k`` are ``None`` if the method does not use them. ``seconds``
    is the time for selecting settings and classifying the test items, excluding the time for encoding. ``peak_memory``
    is the peak memory of the process so far, in bytes.
    """

    top1: float
    top5: float
    n: int
    alpha: float | None
    beta: float | None
    k: int | None
    chosen_on: str
    seconds: float
    parameters_trained: int
    peak_memory: int
    backbone: str | None
    at: str


def _arrow(kind: object) -> pa.DataType:
    kinds = (kind, *get_args(kind))  # include the members of a union
    return pa.int64() if int in kinds else pa.float64() if float in kinds else pa.string()


SCHEMA = pa.schema((name, _arrow(kind)) for name, kind in get_type_hints(Run).items())


class Summary(TypedDict):
    """The mean top-1 accuracy of a method over ``seeds``.

    ``half`` is half the width of the 95 % confidence interval, or ``None`` if there is one seed.
    """

    method: Method
    shots: int
    seeds: int
    top1: float
    half: float | None


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom. Beyond that, it is 1.96."""


@dataclass(frozen=True)
class Items:
    """The labelled features of a split.

    ``features`` has shape ``[m, d]``, and the class ``ids`` have shape ``[m]``. ``name`` is the name of the split.
    """

    features: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    name: str


def sweep(
    pool: CacheModel, keys_digest: str, test: Items, results: str | os.PathLike[str], *, shots: Sequence[int],
    seeds: Sequence[int], methods: Sequence[Method] | None = None, val: Items | None = None,
    protocol: Protocol = "honest", scales: tuple[float, float] = PAPER_SCALES,
    views: tuple[Source, Encoder] | None = None,
) -> Iterator[Run]:  # fmt: skip
    """Add the missing runs to the table ``results``, and yield all requested rows, including existing ones.

    The table is saved after every run. Shots are drawn from the keys of ``pool`` by the published rule, in the order of
    the images. The ``honest`` protocol selects settings on the published validation draw from ``val``, which has
    ``min(shots, 4)`` images per class. Without ``val``, it uses leave-one-out, except that it keeps the untouched
    settings if there is only 1 shot per class. The ``paper`` protocol searches the published grid on all of ``val``. No
    setting depends on ``test``. ``tip-adapter-f`` requires ``views``: the images of the pool or a table of their views,
    and an encoder. ``methods`` defaults to :data:`PLAIN`.

    Raises:
        UsageError: if a method or the protocol is unknown.
        UsageError: if the protocol is ``paper`` and ``val`` is not given.
        InputError: if ``results`` is not a table of runs or cannot be written.
    """
    if methods is None:
        # fine-tuned keys cannot be fitted
        methods = [method for method in PLAIN if pool.curve is None or method != "closed-form"]
    for method in methods:
        check_choice("method", method, Method)
    check_choice("protocol", protocol, Protocol)
    if protocol == "paper" and val is None:
        raise UsageError("protocol paper: it requires a validation source; give --val")
    if "tip-adapter-f" in methods and views is None:
        raise UsageError("method tip-adapter-f: it requires the images of the pool; give them or a table of views")
    pool, path = closed_form.unfitted(pool), Path(results)
    rows = read_results(path) if path.exists() else []
    done = {tuple(row.values())[: len(Told.__annotations__)]: row for row in rows}
    for number in shots:
        for seed in seeds:
            drawn: CacheModel | None = None
            seen: Items | None = None
            answering: CacheModel | Linear
            for method in methods:
                told: Told = {"keys": keys_digest, "test": test.name, "method": method, "protocol": protocol,
                              "shots": number, "seed": seed}  # fmt: skip
                run = tuple(told.values())
                if run not in done:
                    if drawn is None:
                        drawn, seen = draw(pool, number, seed), _validation(pool, val, number, seed, protocol)
                    start = time.perf_counter()
                    if method == "tip-adapter-f" and views is not None:
                        answering, chosen_on = _fine_tune(drawn, *views, seen, seed)
                    else:
                        answering, chosen_on = _set(drawn, method, protocol, scales, seen)
                    done[run] = _row(told, answering, chosen_on, test, start, pool.backbone)
                    rows.append(done[run])
                    with replacing(path) as temporary, temporary.open("wb") as file:
                        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
                yield done[run]


def encode(pool: CacheModel, source: Source, encoder: Encoder) -> Items:
    """Encode a labelled source, using the class ids of the pool. Raises InputError if a label is unknown."""
    ids = pool.ids_of(source)
    encoded = encoder.encode(source)
    return Items(encoded.features, ids[encoded.positions], source.name)


def draw(pool: CacheModel, shots: int, seed: int) -> CacheModel:
    """Return an unfitted index of ``shots`` keys per class, drawn from the pool by the published rule."""
    order, labels = _in_file_order(pool)
    drawn = closed_form.unfitted(pool.take(np.sort(order[few_shot(labels, shots, seed)])))
    alpha, beta = untouched_settings(drawn.keys, drawn.class_ids.cpu().numpy())
    return drawn.with_settings(drawn.settings.override(alpha=alpha, beta=beta))


def read_results(path: Path) -> list[Run]:
    """Read a table of runs. Raises InputError if the file is not a table of runs."""
    try:
        check_regular(path)
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file).read()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    if table.schema.names != SCHEMA.names:
        raise InputError(f"{path}: not a table of runs; give another --results")
    rows: list[Run] = table.to_pylist()
    return rows


def summary(rows: Sequence[Run]) -> list[Summary]:
    """Return the mean over the seeds, with a 95 % interval, for each method and number of shots."""
    groups: dict[tuple[Method, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["shots"]), []).append(row["top1"])
    lines: list[Summary] = []
    for (method, shots), values in groups.items():
        seeds, half = len(values), None
        if seeds > 1:
            quantile = STUDENT[seeds - 2] if seeds - 2 < len(STUDENT) else 1.96
            half = quantile * float(np.std(values, ddof=1)) / math.sqrt(seeds)
        lines.append({"method": method, "shots": shots, "seeds": seeds, "top1": float(np.mean(values)), "half": half})
    return lines


def _in_file_order(pool: CacheModel) -> tuple[npt.NDArray[np.int64], list[int]]:
    order = np.argsort(pool.labels["key_id"].to_numpy(), kind="stable")
    labels: list[int] = pool.class_ids.cpu().numpy()[order].tolist()
    return order, labels


def _validation(pool: CacheModel, val: Items | None, shots: int, seed: int, protocol: Protocol) -> Items | None:
    if val is None or protocol == "paper":
        return val
    _, labels = _in_file_order(pool)
    seen = few_shot_split(labels, val.ids.tolist(), shots, seed)[1]
    return replace(val, features=val.features[seen], ids=val.ids[seen], name=f"{val.name}, {min(shots, 4)} a class")


def _set(
    cache: CacheModel, method: Method, protocol: Protocol, scales: tuple[float, float], val: Items | None
) -> tuple[CacheModel | Linear, str]:
    """Fit a method to a drawn index. Return the classifier and the name of the data used to select its settings."""
    if method in LINEAR:
        return LINEAR[method](cache), "nothing" if method == "class-means" else "folds of the shots"
    if method == "closed-form":
        cache = copy.copy(cache)
        return cache, "folds of the shots" if closed_form.fit(cache).n else "nothing"
    if method == "zero-shot":
        return cache.with_settings(cache.settings.override(alpha=0.0)), "nothing"
    if method == "paper-constants":
        alpha, beta = plain_settings(None, None, "none", None)
        return cache.with_settings(cache.settings.override(alpha=alpha, beta=beta)), "nothing"
    if method == "cache-alone":
        cache = replace(cache, text_weights=torch.zeros_like(cache.text_weights))
    counts = np.bincount(cache.class_ids.cpu().numpy())
    if method == "untouched" or (val is None and counts[counts > 0].min() < 2):
        return cache, "the shots' affinities"
    queries = leave_one_out(cache) if val is None else unseen(cache, val.features, val.ids, val.name)
    choice = search_paper(cache, queries, scales) if protocol == "paper" else search(cache, queries, cautious=True)
    return cache.with_settings(choice.settings(cache.settings)), choice.source


def _fine_tune(
    cache: CacheModel, images: Source, encoder: Encoder, val: Items | None, seed: int
) -> tuple[CacheModel, str]:
    """Return a drawn index with fine-tuned keys, and the name of the data used to select its epoch and settings."""
    queries = None if val is None else unseen(cache, val.features, val.ids, val.name)
    tuned = finetune(cache, own_shots(cache, images), encoder, Recipe(seed=seed), val=queries)
    return tuned.cache, "nothing" if val is None else val.name


def _row(
    told: Told, answering: CacheModel | Linear, chosen_on: str, test: Items, start: float, backbone: Identity | None
) -> Run:
    top1, top5 = _answer(answering, test)
    alpha = beta = k = None
    if isinstance(answering, CacheModel):
        alpha, beta, k = answering.settings.alpha, answering.settings.beta, answering.settings.k or 0
    return {
        **told,
        "top1": top1,
        "top5": top5,
        "n": len(test.ids),
        "alpha": alpha,
        "beta": beta,
        "k": k,
        "chosen_on": chosen_on,
        "seconds": time.perf_counter() - start,
        "parameters_trained": _trained(answering, told["method"]),
        # Linux reports KiB, macOS bytes
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "backbone": str(backbone) if backbone else None,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _trained(answering: CacheModel | Linear, method: Method) -> int:
    if method == "linear-probe" and isinstance(answering, Linear):
        return answering.weights.numel() + answering.bias.numel()
    return answering.keys.size if method == "tip-adapter-f" and isinstance(answering, CacheModel) else 0


def _answer(answering: CacheModel | Linear, test: Items) -> tuple[float, float]:
    logits = answering.logits(test.features)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()
    hits = ranked == torch.from_numpy(test.ids)[:, None]
    return float(hits[:, 0].double().mean()), float(hits.any(dim=1).double().mean())
