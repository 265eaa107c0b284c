"""Measure the encoding of photos in images per second, and compare it with a plain open_clip loop.

The plain loop opens all files in one thread, applies the transform from open_clip, and calls encode_image on batches of
64 under no_grad, with the default number of torch threads. A second plain loop uses small batches, which shows the
effect of the batch size. Our side uses Encoder without a cache. All sides are measured in turn, and the ratios compare
their medians. The printed cosine is the smallest cosine between our feature and the first side's feature of the same
photo. The first table only encodes pixels in memory. int8 is calibrated on up to 300 photos of the folder.

Large photos are synthetic. They are enlarged real photos, and mosaics of real photos at full size, which have finer
detail than any camera can record. They show the gain and the error of decoding JPEGs at a reduced size.

With ``--accuracy``, indexes of 4 and 16 shots per class are built from Caltech101, with keys and queries in several
precisions. The shots are drawn from the train and val photos, on which int8 is calibrated.

With ``--recommended``, each recommended encoder is measured with random weights, so nothing is downloaded.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import common
import numpy as np
import numpy.typing as npt
import open_clip
import pyarrow as pa
import timm
import torch
from common import SHARED, Side, against, clocked, machine, medians, show, take_turns
from PIL import Image

from retrieval_tip import EncodingCache, Reader, build_index, load_backbone, open_source
from retrieval_tip.backbones import catalogue
from retrieval_tip.backbones.base import Backbone, resolve_device, unit
from retrieval_tip.backbones.loading import split_weights
from retrieval_tip.data import images
from retrieval_tip.data.reader import CALIBRATED
from retrieval_tip.data.sources import Source, of_images, read_item
from retrieval_tip.evaluation.evaluate import evaluate
from retrieval_tip.settings import Precision

PLAIN_BATCHES = 64, 4
"""The usual batch size, and a batch size that is better for small towers on a CPU."""
QUALITY = 90
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
SPLIT = "split_zhou_Caltech101.json"

Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


def plain(model: str, device: str, batch: int) -> Encode:
    """Return the loop from the open_clip documentation."""
    network, _, transform = open_clip.create_model_and_transforms(
        *split_weights(model), device=device
    )
    network.eval()

    def encode(paths: Sequence[str]) -> npt.NDArray[np.float32]:
        features = []
        for start in range(0, len(paths), batch):
            pixels = torch.stack(
                [transform(Image.open(path)) for path in paths[start : start + batch]]
            )
            with torch.no_grad():
                features.append(network.encode_image(pixels.to(device)).cpu().numpy())
        return unit(np.concatenate(features))

    return encode


def ours(backbone: Backbone) -> Encode:
    """Return a function that encodes with a new Encoder."""
    return lambda paths: Reader(backbone).encode(of_images(list(paths))).features


def chosen(folder: Path, number: int) -> list[str]:
    """Draw ``number`` photos from a folder. The same photos are drawn each time."""
    found = [str(path) for path in images.find(folder)]
    if len(found) < number:
        raise click.UsageError(f"{folder}: {len(found)} photos; expected at least {number}")
    return random.Random(0).sample(found, number)


def make_large(paths: Sequence[str], number: int, size: tuple[int, int], folder: Path) -> list[str]:
    """Make large JPEGs from small photos. Every other JPEG is an enlarged photo, and the others are mosaics."""
    made = []
    for turn in range(number):
        own = [Image.open(paths[(turn + place) % len(paths)]).convert("RGB") for place in range(64)]
        large = own[0].resize(size, Image.Resampling.LANCZOS)
        if turn % 2:
            left, top, height, place = 0, 0, 0, 0
            while top < size[1]:
                piece = own[place % len(own)]
                large.paste(piece, (left, top))
                left, height, place = left + piece.width, max(height, piece.height), place + 1
                if left >= size[0]:
                    left, top, height = 0, top + height, 0
        made.append(str(folder / f"{turn:03}.jpg"))
        large.save(made[-1], quality=QUALITY)
    return made


def compare(name: str, paths: list[str], sides: dict[str, Encode], rounds: int) -> None:
    """Measure the sides in turn on the same photos, and compare them with the first side."""
    features: dict[str, npt.NDArray[np.float32]] = {}

    def encode(side: str, turn: int) -> float:
        seconds = clocked(
            lambda: features.update({side: sides[side](paths if turn else paths[:4])})
        )
        return seconds / len(paths)

    turns: dict[str, Side] = {side: lambda turn, side=side: encode(side, turn) for side in sides}
    found = medians(take_turns(name, turns, rounds))
    first = next(iter(sides))
    lines = [
        {
            "side": side,
            "images/s": 1 / seconds,
            "x first": found[first] / seconds,
            "lowest cosine": float((features[side] * features[first]).sum(axis=1).min()),
        }
        for side, seconds in found.items()
    ]
    show(f"{len(paths)} {name}, medians of {rounds} rounds", lines)


def alone(backbone: Backbone, held: dict[str, torch.Tensor]) -> Encode:
    """Return a function that encodes the pixels of photos in memory."""

    def encode(paths: Sequence[str]) -> npt.NDArray[np.float32]:
        size = backbone.batch_size
        parts = [paths[start : start + size] for start in range(0, len(paths), size)]
        return unit(
            np.concatenate(
                [backbone.encode_images(torch.stack([held[p] for p in part])) for part in parts]
            )
        )

    return encode


def store_int8(model: str, photos: Source) -> None:
    """Calibrate an encoder in int8 on photos, and print how long that takes."""
    reader, found = Reader(load_backbone(model, device="cpu")), list[float]()
    seconds = clocked(lambda: found.append(reader.store_int8(photos)))
    click.echo(f"int8: stored in {seconds:.1f} s, lowest cosine {found[0]:.4f}")


def accuracy(model: str, split: Path, draws: int) -> None:
    """Print the accuracy on the test photos by the precisions of the keys and of the queries."""
    train, val, test = (open_source(split, split=part) for part in ("train", "val", "test"))
    items = pa.concat_tables([train.items, val.items])
    train = replace(train, items=items, paths=(*(train.paths or ()), *(val.paths or ())))
    store_int8(model, train)
    cache, rows = EncodingCache.default(), []
    encoders = {p: Reader(load_backbone(model, precision=p), cache=cache) for p in PRECISIONS}
    for shots, seed in ((shots, 1 + draw) for shots in (4, 16) for draw in range(draws)):
        row: dict[str, object] = {"shots": shots, "seed": seed}
        with tempfile.TemporaryDirectory() as scratch:
            for keys, reader in encoders.items():
                index = build_index(
                    train, Path(scratch) / keys, replace(reader, seed=seed), shots=shots
                )
                for queries in dict.fromkeys((keys, *(("int8",) if keys == "float32" else ()))):
                    right = evaluate(index, test, encoders[queries]).top1
                    row[f"{keys} keys, {queries}"] = 100 * right
        rows.append(row)
    show(f"Accuracy in %, {len(test)} test photos", rows)


def recommended(paths: list[str], precisions: Sequence[Precision], rounds: int) -> None:
    """Print the photos per second of each recommended encoder, after a first batch that compiles it."""
    rows = []
    for one in catalogue.search():
        row: dict[str, object] = {"encoder": one.model, "size": f"{(one.bytes or 0) / 1e6:,.0f} MB"}
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/weights.pt"
            if one.model.startswith("timm:"):
                network = timm.create_model(one.model.removeprefix("timm:").partition(".")[0])
                name = f"{one.model}@{file}"
            else:
                name = catalogue.architecture(one.model)
                network = open_clip.create_model(name, load_weights=False)
                name = f"{name}@{catalogue.recommended(name)}={file}"
            torch.save(network.state_dict(), file)
            for precision in precisions:
                encode = ours(load_backbone(name, device="cpu", precision=precision))
                encode(paths[:16])
                seconds = [clocked(partial(encode, paths)) for _ in range(rounds)]
                row[precision] = len(paths) / statistics.median(seconds)
        rows.append(row)
    show(f"{len(paths)} photos, medians of {rounds} rounds, photos per second", rows)


@against
@click.command(help=__doc__)
@click.option("--model", default=f"local-dir:{SHARED}/models/lit-mini", show_default=True)
@common.device_option
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=SHARED / "data/caltech101",
    show_default=True,
)
@click.option("--number", default=64, show_default=True, help="Number of photos from the folder.")
@click.option(
    "--large",
    default=32,
    show_default=True,
    help="Number of large synthetic photos. Use 0 for no photos.",
)
@click.option(
    "--size",
    type=(int, int),
    default=(4000, 3000),
    show_default=True,
    help="Size of the large photos.",
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--precision", "precisions", multiple=True, default=PRECISIONS, show_default=True)
@click.option(
    "--accuracy",
    "draws",
    type=int,
    help="Number of draws to measure the accuracy on, instead of the speed.",
)
@click.option(
    "--recommended",
    "of_each",
    is_flag=True,
    help="Measure the recommended encoders, instead of one.",
)
def main(
    model: str,
    device: str,
    folder: Path,
    number: int,
    large: int,
    size: tuple[int, int],
    rounds: int,
    precisions: tuple[Precision, ...],
    draws: int | None,
    of_each: bool,
) -> None:
    """Measure all sides, and print the results."""
    device = resolve_device(device)
    click.echo(machine("open_clip_torch", "openvino", "nncf", "pillow"))
    if of_each:
        recommended(chosen(folder, number), [one for one in precisions if one != "int8"], rounds)
        return
    if draws is not None:
        with (
            tempfile.TemporaryDirectory() as own
        ):  # no earlier calibration, which may be on test photos
            os.environ["RETRIEVAL_TIP_CACHE"] = own
            accuracy(model, folder / SPLIT, draws)
        return
    if "int8" in precisions:
        store_int8(model, of_images(chosen(folder, CALIBRATED)))
    backbones = {p: load_backbone(model, device=device, precision=p) for p in precisions}
    whole, photos = next(iter(backbones.values())), chosen(folder, number)
    click.echo(f"{whole.identity} on {device}")
    held = {path: whole.preprocess(images.decode(read_item(path))) for path in photos}
    compare(
        "photos in memory",
        photos,
        {name: alone(each, held) for name, each in backbones.items()},
        rounds,
    )
    sides = {
        f"plain loop, batches of {batch}": plain(model, device, batch) for batch in PLAIN_BATCHES
    }
    looped = next(iter(sides.values()))
    sides |= {f"ours, {name}": ours(backbone) for name, backbone in backbones.items()}
    compare("photos", photos, sides, rounds)
    if large:
        with tempfile.TemporaryDirectory() as scratch:
            made = make_large(photos, large, size, Path(scratch))
            sides = {"plain loop": looped}
            sides |= {f"ours, {name}": ours(backbone) for name, backbone in backbones.items()}
            compare(f"photos of {size[0]} x {size[1]}", made, sides, rounds)


if __name__ == "__main__":
    main()
