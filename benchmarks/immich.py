"""Suggestions for a library of 300 photos, beside logistic regression with a threshold, which similar programs use.

Ten classes of Caltech101 are drawn. Six are tagged, with five photos each; the photos of the other four are foreign. A
stand-in for an Immich server has all of them. "accuracy" is the share of suggestions that are right, "withheld" the
share of photos without a suggestion, and "reached" the share of the photos of the six classes with the right one.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from immich_server import KEY, holding, serving

from retrieval_tip.backbones.base import unit
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.plugins.immich.client import Immich
from retrieval_tip.plugins.immich.ledger import Ledger
from retrieval_tip.plugins.immich.sync import Sync
from retrieval_tip.plugins.immich.tagging import Tagging

TAGGED, FOREIGN, EACH, SHOTS = 6, 4, 30, 5


def features_of(backbone, pictures):
    """Return the unit features of pictures, ``[n, d]``."""
    import torch

    views = [backbone.preprocess(Image.open(io.BytesIO(one)).convert("RGB")) for one in pictures]
    return unit(np.concatenate([backbone.encode_images(torch.stack([view])) for view in views]))


def suggest(library, backbone):
    """Return the suggestions of a dry run, by photo, and its estimate."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(library) as url,
        Immich(url, KEY) as immich,
        Ledger(Path(folder) / "index") as ledger,
    ):
        immich.connect()
        run = Sync(Tagging(immich, ledger), Path(folder) / "index", backbone, "Pets")
        report = run.run(apply=False)
    return {one.asset: one.label for one in report.new}, report.estimate


def regression(library, truth, backbone, threshold):
    """Return the suggestions of a logistic regression whose probability is at least ``threshold``."""
    tagged = [number for number in truth if library.photos[number].tags]
    others = [number for number in truth if not library.photos[number].tags]
    pictures = [library.photos[number].picture for number in (*tagged, *others)]
    features = features_of(backbone, pictures)
    model = LogisticRegression(C=10, max_iter=5000)
    model.fit(features[: len(tagged)], [truth[number] for number in tagged])
    probabilities = model.predict_proba(features[len(tagged) :])
    labels = model.classes_[probabilities.argmax(axis=1)]
    sure = probabilities.max(axis=1) >= threshold
    return {
        number: label
        for number, label, is_sure in zip(others, labels, sure, strict=True)
        if is_sure
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    options = parser.parse_args()
    backbone = load_backbone(f"local-dir:{options.shared / 'models/lit-mini'}", device="cpu")
    photos = options.shared / "data/caltech101/101_ObjectCategories"
    names = sorted(place.name for place in photos.iterdir() if len([*place.iterdir()]) >= EACH)
    methods = ["immich sync", *(f"regression {value}" for value in options.thresholds)]
    counts = {method: np.zeros(4) for method in methods}
    for seed in range(1, options.draws + 1):
        drawn = random.Random(seed).sample(names, TAGGED + FOREIGN)
        library, truth = holding(options.shared, drawn, EACH, SHOTS, most=1000)
        foreign = set(drawn[TAGGED:])
        for number, name in truth.items():
            if name in foreign:
                library.photos[number].tags.clear()
        for name in foreign:
            library.delete_tag(None, library.tag(f"Pets/{name}"))
        asked = [number for number in truth if not library.photos[number].tags]
        found, estimate = suggest(library, backbone)
        print(f"draw {seed}: {estimate}")
        answers = [found]
        answers += [regression(library, truth, backbone, value) for value in options.thresholds]
        for method, answer in zip(methods, answers, strict=True):
            right = sum(truth[number] == label for number, label in answer.items())
            own = sum(truth[number] not in foreign for number in asked)
            counts[method] += (len(answer), right, len(asked), own)
    print("| method | accuracy | withheld | reached | wrong suggestions |")
    print("|---|---|---|---|---|")
    for method, (given, right, asked, own) in counts.items():
        shares = f"{right / given:.1%} | {1 - given / asked:.1%} | {right / own:.1%}"
        print(f"| {method} | {shares} | {int(given - right)} of {int(asked)} photos |")


if __name__ == "__main__":
    main()
