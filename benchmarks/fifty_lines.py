"""Compare this package with the fifty lines that an engineer would write instead, on your own photos.

The rival is the function ``rival`` below: timm or open_clip encodes the photos, and scikit-learn fits a logistic
regression, whose C is chosen by cross-validation. Both sides use the same encoder, train on the same photos and are
tested on the same ones. PHOTOS and TEST are folders of class folders, or anything else that ``index build`` and
``evaluate`` accept. ``--shots N`` draws N photos per class with the
seeds 1 to ``--seeds``; otherwise, all photos are used. A file of weights must use the names of timm or open_clip:
the rival does not notice if it does not.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from common import machine
from PIL import Image

from retrieval_tip import Classifier
from retrieval_tip.data.sources import open_source

Photos = list[tuple[str, str]]
GRID = np.logspace(-2, 4, 13)
BATCH = 16


def rival(model: str, pretrained: str | None, train: Photos, test: Photos) -> list[str]:
    """Return the answers for the test photos."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    if model.startswith("timm:"):
        import timm
        from timm.data import create_transform, resolve_model_data_config

        file = {} if pretrained is None else {"pretrained_cfg_overlay": {"file": pretrained}}
        network = timm.create_model(model.removeprefix("timm:"), pretrained=True, num_classes=0, **file).eval()
        transform, encode = create_transform(**resolve_model_data_config(network), is_training=False), network
    else:
        import open_clip

        network, _, transform = open_clip.create_model_and_transforms(model, pretrained)
        encode = network.eval().encode_image

    def features(photos: Photos) -> np.ndarray:
        parts = []
        for start in range(0, len(photos), BATCH):
            images = [Image.open(path).convert("RGB") for path, _ in photos[start : start + BATCH]]
            with torch.inference_mode():
                parts.append(encode(torch.stack([transform(image) for image in images])).numpy())
        every = np.concatenate(parts)
        return every / np.linalg.norm(every, axis=1, keepdims=True)

    labels = [label for _, label in train]
    folds = min(5, *(labels.count(label) for label in set(labels)))
    if folds < 2:  # a single photo cannot be held out
        chosen: Any = LogisticRegression(C=10, max_iter=2000)
    else:
        more = {"l1_ratios": (0,), "use_legacy_attributes": False}  # as all versions from 1.10 on
        chosen = LogisticRegressionCV(Cs=GRID, cv=folds, max_iter=2000, scoring="accuracy", **more)
    answers: list[str] = chosen.fit(features(train), labels).predict(features(test)).tolist()
    return answers


def ours(model: str, pretrained: str | None, train: Photos, test: Photos) -> list[str]:
    """Return the answers for the test photos."""
    paths, labels = zip(*train, strict=True)
    made = Classifier.from_images(list(paths), list(labels), model=model, pretrained=pretrained)
    return [one.label for one in made.predict([path for path, _ in test])]


def listed(place: Path, part: str) -> Photos:
    """Return the photos of a source and their classes."""
    source = open_source(place, split=part if place.suffix == ".json" else None)
    return list(zip(source.paths or (), source.labels, strict=True))


def drawn(photos: Photos, shots: int, seed: int) -> Photos:
    """Return ``shots`` photos of each class, drawn at random."""
    random, order = np.random.default_rng(seed), sorted({label for _, label in photos})
    own = {name: [photo for photo in photos if photo[1] == name] for name in order}
    return [own[name][i] for name in order for i in sorted(random.permutation(len(own[name]))[:shots])]


@click.command(help=__doc__)
@click.argument("photos", type=click.Path(exists=True, path_type=Path))
@click.argument("test", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default="ViT-B-32", show_default=True)
@click.option("--pretrained", default=None, help="Tag or file of the weights.")
@click.option("--shots", type=int, default=None)
@click.option("--seeds", type=int, default=3, show_default=True)
def main(photos: Path, test: Path, model: str, pretrained: str | None, shots: int | None, seeds: int) -> None:
    """Print the accuracy and the time of both sides."""
    click.echo(machine("torch", "timm", "scikit-learn"))
    every, asked = listed(photos, "train"), listed(test, "test")
    classes = len({label for _, label in every})
    click.echo(f"{model}: {len(every)} photos of {classes} classes, {len(asked)} test photos")
    for seed in range(1, 1 + (seeds if shots else 1)):
        train = drawn(every, shots, seed) if shots else every
        for name, side in (("rival", rival), ("ours", ours))[:: 1 if seed % 2 else -1]:
            with tempfile.TemporaryDirectory() as cache:  # features are not kept for the next run
                os.environ["RETRIEVAL_TIP_CACHE"], start = cache, time.perf_counter()
                answers = side(model, pretrained, train, asked)
            took = time.perf_counter() - start
            right = np.mean([answer == label for answer, (_, label) in zip(answers, asked, strict=True)])
            click.echo(f"seed {seed}  {len(train):5} photos  {name:6} {100 * right:5.1f} %  {took:6.1f} s")


if __name__ == "__main__":
    main()
