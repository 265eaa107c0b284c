"""Which form of untouched settings serves best, over the data at hand and never on a test part.

Caltech101 (lit-mini) is scored on its val part, Food-101 (CLIP ViT-B/32 features) on the training rows that were not
drawn. Each figure is the mean top-1 over the seeds, in percent, for the defaults of each form of --normalize.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from retrieval_tip import CacheModel, Encoder, EncodingCache, load_backbone, open_source
from retrieval_tip.backbones.prompts import text_weights
from retrieval_tip.data.shots import few_shot
from retrieval_tip.index.items import read_text_table
from retrieval_tip.retrieval.defaults import NORMALIZE, measure, plain_settings

Split = tuple[np.ndarray, np.ndarray]


def splits(shared: Path) -> Iterator[tuple[str, Split, Split | None, list[str], np.ndarray]]:
    """Name, pool, validation (``None``: the rest of the pool), classes and text weights."""
    backbone = load_backbone(f"local-dir:{shared / 'models/lit-mini'}")
    encoder = Encoder(backbone, cache=EncodingCache(EncodingCache.default_folder()))
    caltech = shared / "data/caltech101/split_zhou_Caltech101.json"
    parts = [open_source(caltech, split=split) for split in ("train", "val")]
    names = list(parts[0].class_names)
    pool, val = ((encoder.encode(p).features, np.array([names.index(x) for x in p.labels])) for p in parts)
    yield "Caltech101 val", pool, val, names, text_weights(backbone, names)
    names, weights = read_text_table(shared / "data/clip-food9/text.parquet")
    train = open_source(shared / "data/clip-food9/train.parquet")
    rows = (Encoder().encode(train).features, np.array([names.index(label) for label in train.labels]))
    yield "Food-101 train, rest", rows, None, list(names), weights


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=Path("../shared"), show_default=True)
@click.option("--seeds", default=5, show_default=True)
def main(shared: Path, seeds: int) -> None:
    """One line for each data set and number of shots."""
    click.echo(f"{'':<32}{'zero-shot':>11}" + "".join(f"{form:>11}" for form in NORMALIZE))
    for name, (pool, pool_ids), val, names, weights in splits(shared):
        for shots in (1, 2, 4, 8, 16):
            right: dict[str, list[float]] = {form: [] for form in ("zero-shot", *NORMALIZE)}
            for seed in range(1, seeds + 1):
                drawn = np.array(few_shot(pool_ids.tolist(), shots, seed))
                rest = np.setdiff1d(np.arange(len(pool)), drawn)
                features, ids = val if val is not None else (pool[rest], pool_ids[rest])
                cache = CacheModel.from_features(pool[drawn], pool_ids[drawn], names, weights, device="cpu")
                statistics = measure(cache.keys, cache.labels["class_id"].to_numpy())
                for form, values in right.items():
                    settings = (0.0, 1.0) if form == "zero-shot" else plain_settings(None, None, form, statistics)
                    cache.settings = cache.settings.override(**dict(zip(("alpha", "beta"), settings, strict=True)))
                    values.append(float((cache.logits(features).argmax(1).numpy() == ids).mean()))
            figures = "".join(f"{100 * np.mean(values):>11.1f}" for values in right.values())
            click.echo(f"{f'{name}, {shots} shots':<32}{figures}")


if __name__ == "__main__":
    main()
