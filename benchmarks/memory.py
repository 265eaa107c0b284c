"""Measure the peak memory of commands and servers, and the memory of a server whose encoder was released.

Each encoder builds an index of synthetic 12-megapixel photos. Then ``classify`` reads other photos, ``label`` encodes
them, and ``serve`` answers two requests with eight photos each. Each of them runs in its own process on the CPU, and
the build runs twice, because the first one also converts the encoder for OpenVINO, and the second one is measured.
Figures are the highest resident memory that Linux has recorded (VmHWM), which includes mapped files of the libraries.
``before`` and ``after`` are the resident memory of a served index, before and after its encoder is released, and
``reload s`` is the number of seconds until it has encoded the next photos.

If the weights of an encoder are not on this machine, random weights replace them, which take the same memory. The first
column of the table then says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import click
import httpx
import numpy as np
import psutil
from common import GIB, PROGRAM, SEED, clocked, launch, machine, show
from demo import LITE0
from PIL import Image

CLASSES = 4
SIZE = (4000, 3000)
SENT = 8
"""Number of photos per request."""
SECONDS = 300
"""Maximum number of seconds to wait for a server."""


def write_photos(folder: Path, number: int) -> list[Path]:
    """Write ``number`` photos, evenly divided over folders of ``CLASSES`` classes."""
    draw = np.random.default_rng(SEED)
    photos = []
    for i in range(number):
        photo = folder / f"class {i % CLASSES}" / f"{i}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        small = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8) // (1 + i % CLASSES)
        Image.fromarray(small).resize(SIZE).save(photo, quality=90)
        photos.append(photo)
    return photos


def available(model: str, folder: Path) -> tuple[str, bool]:
    """Return the encoder to use, and whether its weights are random."""
    import open_clip
    from safetensors.torch import save_file

    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.errors import BackboneError

    try:
        load_backbone(model, device="cpu", lazy=True)
        return model, False
    except BackboneError as error:
        if (config := open_clip.get_model_config(model)) is None:
            raise click.ClickException(str(error)) from None
    made = folder / model
    made.mkdir()
    weights = open_clip.create_model(model, pretrained=None).state_dict()
    save_file(weights, made / "open_clip_model.safetensors")
    size = config["vision_cfg"]["image_size"]
    described = {"model_cfg": config, "preprocess_cfg": {"size": size}}
    (made / "open_clip_config.json").write_text(json.dumps(described))
    return f"local-dir:{made}", True


@contextmanager
def server(*arguments: object) -> Iterator[tuple[httpx.Client, int]]:
    """Run a server inside the context. Yield a client that sends the token, and the process id."""
    command = [*PROGRAM, *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        shown = ""
        while (found := re.search(r"(http://\S+)/#token=([\w-]+)", shown)) is None:
            if not (line := process.stderr.readline()):
                raise click.ClickException(shown)
            shown += line
        headers = {"Authorization": f"Bearer {found[2]}"}
        with httpx.Client(base_url=found[1], headers=headers, timeout=SECONDS) as client:
            yield client, process.pid
    finally:
        process.terminate()
        process.communicate()


def peak(process: int) -> float:
    """Return the highest resident memory of a process in GiB."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / GIB  # type: ignore[index]  # is always there


def label(place: Path, model: str, photos: Path) -> float:
    """Return the peak memory of ``label`` when it has encoded all photos."""
    with server("label", photos, "--model", model, "--no-cache", "--out", place) as (
        client,
        process,
    ):
        limit = time.monotonic() + SECONDS
        while client.get("/v1/label").json()["busy"]:
            if time.monotonic() > limit:
                raise click.ClickException(f"label: still busy after {SECONDS} s")
            time.sleep(0.1)
        return peak(process)


def serve(index: Path, photos: list[Path]) -> float:
    """Return the peak memory of ``serve`` when it has answered two requests."""
    with server("serve", index) as (client, process):
        for start in range(0, 2 * SENT, SENT):
            sent = [("images", photo.read_bytes()) for photo in photos[start : start + SENT]]
            client.post("/v1/classify", files=sent).raise_for_status()
        return peak(process)


def idle(index: Path, photo: Path) -> dict[str, float]:
    """Return the resident memory of this process before and after the encoder of a served index is released.

    ``reload s`` is the time in seconds until the encoder has encoded the next photos.
    """
    import torch

    from retrieval_tip.server.served import Backbones, open_all

    backbone = next(iter(open_all([index], Backbones("cpu", "auto", None)).values())).now.backbone
    assert backbone is not None
    pixels = torch.stack([backbone.preprocess(Image.open(photo))] * SENT)
    backbone.encode_images(pixels)
    before = psutil.Process().memory_info().rss / GIB
    backbone.release(0)
    after = psutil.Process().memory_info().rss / GIB
    seconds = clocked(lambda: backbone.encode_images(pixels))
    return {"before": before, "after": after, "reload s": seconds}


@click.command(help=__doc__)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=(f"{LITE0}@build/demo/efficientnet-lite0.pth", "ViT-B-32"),
    show_default=True,
    help="Encoder, as for retrieval-tip index build.",
)
@click.option("--number", default=32, show_default=True, help="Number of photos to classify.")
def main(models: tuple[str, ...], number: int) -> None:
    """Measure each command with each encoder, and print a table in GiB."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-memory-") as name:
        folder = Path(name)
        os.environ["RETRIEVAL_TIP_CACHE"] = str(folder / "cache")
        write_photos(folder / "photos", 4 * CLASSES)
        new = write_photos(folder / "new", max(number, 2 * SENT))
        for i, model in enumerate(models):
            used, untrained = available(model, folder)
            index = folder / f"index {i}"
            build = (
                *PROGRAM,
                "-q",
                "index",
                "build",
                folder / "photos",
                "--no-cache",
                "--model",
                used,
            )
            launch(*build, "--out", folder / f"first {i}")
            classify = (*PROGRAM, "-q", "classify", index, folder / "new", "--no-cache")
            row = {"encoder": model + " (random weights)" * untrained}
            row["index build"] = launch(*build, "--out", index).peak
            row["classify"] = launch(*classify).peak
            row["label"] = label(folder / f"labels {i}", used, folder / "new")
            row["serve"] = serve(index, new)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                rows.append(row | pool.submit(idle, index, new[0]).result())
    click.echo(machine("openvino", "open_clip_torch"))
    show(f"resident memory in GiB, {number} photos of 12 megapixels", rows)


if __name__ == "__main__":
    main()
