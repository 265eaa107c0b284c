"""Train the parts of Tip-Adapter that Table 1 of the paper trains, and print the accuracies next to the published ones.

This is plain torch, and slow: an encoder takes minutes per epoch on two cores. The photos are those of Caltech101 in
the split file, with 16 shots per class. In every row, training starts from Tip-Adapter over one centre view per shot,
and uses the same alpha and beta until the last epoch, on which the test part is classified. If the image encoder is
trained, each epoch draws a new crop of each shot. Otherwise, it draws one of 16 crops that were encoded beforehand. No
setting is selected on the test part. Published: ImageNet, RN50, 20 epochs.
"""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import open_clip
import torch
from common import SHARED, machine
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from retrieval_tip import open_source
from retrieval_tip.tip import answer

ROWS = ("", "keys", "values", "keys+values", "visual", "text", "visual+text")
ALPHA, BETA = 50.0, 1.0
"""Alpha and beta, from a coarse grid on the validation part (see lit-mini's MODEL.md)."""
EPOCHS = {"visual": 2, "visual+text": 2, "text": 5}
"""Numbers of epochs that differ from the paper's 20 epochs, so that a row takes at most an hour."""
RATE, ENCODER_RATE, EPS = 1e-3, 1e-6, 1e-4
VIEWS, BATCH = 16, 256
CHUNK = 32
"""Photos per forward pass, and per step if the image encoder is trained."""
TEMPLATE = "a photo of a {}."

Transform = Callable[[Image.Image], Tensor]


@dataclass
class Photos:
    """Photos of one part, and their class ids."""

    paths: Sequence[Path]
    ids: Tensor

    def pixels(self, rows: Sequence[int], transform: Transform) -> Tensor:
        """Read some of the photos."""
        return torch.stack([transform(Image.open(self.paths[row]).convert("RGB")) for row in rows])

    @torch.no_grad()
    def encode(self, model: Any, transform: Transform) -> Tensor:
        """Return the features of all photos."""
        parts = torch.arange(len(self.paths)).split(CHUNK)
        return torch.cat(
            [normalize(model.encode_image(self.pixels(rows.tolist(), transform))) for rows in parts]
        )


@dataclass
class Bench:
    """The shots and test photos, the model with its two transforms, the prompts as tokens, and features.

    ``keys`` and ``queries`` are features of centre views, and ``views`` ``[v, n, d]`` of crops.
    """

    shots: Photos
    test: Photos
    model: Any
    centre: Transform
    crop: Transform
    tokens: Tensor
    keys: Tensor
    queries: Tensor
    views: Tensor

    def text(self, model: Any) -> Tensor:
        """Return the text weights."""
        return normalize(model.encode_text(self.tokens))

    def train(self, row: str, epochs: int) -> tuple[int, float, float]:
        """Train the parts of a row. Return the number of parameters, the last loss, and the test accuracy in percent.

        Encoders stay in evaluation mode, because a feature must not depend on the other photos in the batch.
        """
        torch.manual_seed(1)
        parts, model, scale = (
            row.split("+"),
            copy.deepcopy(self.model),
            float(self.model.logit_scale.exp()),
        )
        keys, values = self.keys.clone(), one_hot(self.shots.ids).float()
        matrices = [
            matrix.requires_grad_()
            for name, matrix in (("keys", keys), ("values", values))
            if name in parts
        ]
        towers = {"visual": model.visual, "text": model.text}
        encoders = [
            weight
            for name, tower in towers.items()
            if name in parts
            for weight in tower.parameters()
        ]
        for weight in encoders:
            weight.requires_grad_()
        with torch.no_grad():
            weights = self.text(model)
        n, loss = len(keys), torch.nan
        size = CHUNK if "visual" in parts else BATCH
        if row:
            groups = [{"params": matrices, "lr": RATE}, {"params": encoders, "lr": ENCODER_RATE}]
            optimizer = torch.optim.AdamW([group for group in groups if group["params"]], eps=EPS)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // size))
        for _ in range(epochs if row else 0):
            for rows in torch.randperm(n).split(size):
                if "visual" in parts:
                    f = normalize(model.encode_image(self.shots.pixels(rows.tolist(), self.crop)))
                else:
                    f = self.views[torch.randint(len(self.views), (len(rows),)), rows]
                own = self.text(model) if "text" in parts else weights
                logits = answer(f, keys, values, own, alpha=ALPHA, beta=BETA, logit_scale=scale)
                optimizer.zero_grad()
                entropy = cross_entropy(logits, self.shots.ids[rows])
                entropy.backward()
                loss = entropy.item()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            f = self.test.encode(model, self.centre) if "visual" in parts else self.queries
            logits = answer(
                f, keys, values, self.text(model), alpha=ALPHA, beta=BETA, logit_scale=scale
            )
        right = 100 * float((logits.argmax(1) == self.test.ids).double().mean())
        return sum(weight.numel() for weight in (*matrices, *encoders)), loss, right


def prepare(split: Path, name: str, classes: int | None, views: int) -> Bench:
    """Read the photos of the first ``classes`` classes, and encode ``views`` crops of each shot."""
    model, _, centre = open_clip.create_model_and_transforms(name)
    model.eval().requires_grad_(False)
    size = (
        model.visual.image_size
        if isinstance(model.visual.image_size, int)
        else model.visual.image_size[0]
    )
    crop = RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=Image.Resampling.BICUBIC)
    train, unseen = (open_source(split, split=part) for part in ("train", "test"))
    names = list(train.class_names)[:classes]

    def chosen(source: Any) -> Photos:
        pairs = zip(source.paths, source.labels, strict=True)
        kept = [(path, names.index(label)) for path, label in pairs if label in names]
        return Photos([path for path, _ in kept], torch.tensor([number for _, number in kept]))

    tokens = open_clip.get_tokenizer(name)([TEMPLATE.format(label) for label in names])
    last = [
        step
        for step in centre.transforms
        if type(step).__name__ in ("ToTensor", "MaybeToTensor", "Normalize")
    ]
    shots, test, crop = (
        chosen(train),
        chosen(unseen),
        Compose([crop, RandomHorizontalFlip(), *last]),
    )
    torch.manual_seed(0)
    encoded = torch.stack([shots.encode(model, crop) for _ in range(views)])
    keys, queries = (photos.encode(model, centre) for photos in (shots, test))
    return Bench(shots, test, model, centre, crop, tokens, keys, queries, encoded)


@click.command(help=__doc__)
@click.option(
    "--split",
    type=click.Path(path_type=Path),
    show_default=True,
    default=SHARED / "data/caltech101/split_zhou_Caltech101.json",
    help="CoOp's split file.",
)
@click.option(
    "--model",
    default="local-dir:../shared/models/lit-mini",
    show_default=True,
    help="Model of open_clip.",
)
@click.option("--classes", type=int, help="Number of classes to use.  [default: all]")
@click.option(
    "--epochs", type=int, help="Number of epochs of every row.  [default: 20; 2 or 5 for encoders]"
)
@click.option(
    "--views", default=VIEWS, show_default=True, help="Number of encoded crops of each shot."
)
def main(split: Path, model: str, classes: int | None, epochs: int | None, views: int) -> None:
    """Train every row, and print the table."""
    click.echo(machine("open_clip_torch"))
    bench = prepare(split, model, classes, views)
    with (Path(__file__).parent / "published.csv").open(encoding="utf-8", newline="") as file:
        published = {
            row["trained"]: row["accuracy"] for row in csv.DictReader(file) if row["table"] == "1"
        }
    click.echo(
        f"{len(bench.shots.ids)} shots, {len(bench.test.ids)} test photos, alpha {ALPHA:g}, beta {BETA:g}"
    )
    click.echo(
        f"{'trained':<13}{'epochs':>7}{'parameters':>12}{'seconds':>9}{'loss':>8}{'test':>7}{'published':>11}"
    )
    for row in ROWS:
        number, start = 0 if not row else epochs or EPOCHS.get(row, 20), time.perf_counter()
        parameters, loss, right = bench.train(row, number)
        figures = f"{number:>7}{parameters:>12,}{time.perf_counter() - start:>9.1f}{loss:>8.3f}{right:>7.1f}"
        click.echo(f"{row or 'none':<13}{figures}{published[row]:>11}")


if __name__ == "__main__":
    main()
