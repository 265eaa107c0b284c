"""Make the prior of OpenAI's CLIP ViT-B/32: how photos of one class differ, measured on five datasets.

The result is the pooled within-class scatter of the published keys (16 shots per class, 4 for ImageNet) and of DTD's
validation images. benchmarks/accuracy.py --shape prior measures its effect with the target dataset left out.
"""

from __future__ import annotations

from pathlib import Path

import click
import common
import numpy as np
import pyarrow.parquet as pq
from common import features_of

from retrieval_tip.fit.scatter import PRIOR_SCALE, PRIORS, pooled
from retrieval_tip.store.sums import Sums

TABLES = (
    "stanford_cars/shots_16",
    "oxford_flowers/shots_16",
    "caltech101/shots_16",
    "dtd/val",
    "imagenet/shots_4",
)


def sums_of(table: Path) -> Sums:
    """Return the sums of the keys in a feature table."""
    rows = pq.read_table(table)
    names, ids = np.unique(rows["label"].to_pylist(), return_inverse=True)
    keys = features_of(rows)
    return Sums.of([(keys, ids)], len(names), keys.shape[1])


@click.command(help=__doc__)
@common.shared_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=PRIORS / "ViT-B-32-openai.npy",
    show_default=True,
)
def main(shared: Path, out: Path) -> None:
    found = [sums_of(shared / "data/clip-vitb32" / f"{name}.parquet") for name in TABLES]
    prior = pooled(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, (PRIOR_SCALE * prior).astype(np.float16))
    click.echo(
        f"{out}: {sum(part.n for part in found):,} keys of {sum(len(part.counts) for part in found):,} classes"
    )


if __name__ == "__main__":
    main()
