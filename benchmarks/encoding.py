"""Images a second of a backbone by batch size: why small batches are the default on a CPU.

Activations of a large batch exceed what malloc keeps, so every layer faults in fresh pages. Batch sizes take turns, the
figure is the median over the rounds.
"""

from __future__ import annotations

import platform
import statistics
import time

import click
import torch

from retrieval_tip import load_backbone


@click.command(help=__doc__)
@click.option("--model", default="local-dir:../shared/models/lit-mini", show_default=True)
@click.option("--pretrained")
@click.option("--device", default="auto", show_default=True)
@click.option("--images", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(model: str, pretrained: str | None, device: str, images: int, rounds: int) -> None:
    """Print one line a batch size."""
    backbone = load_backbone(model, pretrained, device=device)
    config = backbone.identity.preprocess
    pixels = torch.randn(images, 3, *([config["size"]] * 2 if isinstance(config["size"], int) else config["size"]))
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size <= images]
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(rounds + 1):
        for size in sizes:
            start = time.perf_counter()
            for first in range(0, images, size):
                backbone.encode_images(pixels[first : first + size])
            if turn:  # the first round warms up
                seconds[size].append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    click.echo(f"{backbone.identity}, torch {torch.__version__}, {threads} threads, {platform.machine()}")
    for size in sizes:
        click.echo(f"batch {size:4d}  {images / statistics.median(seconds[size]):8.1f} images/s")


if __name__ == "__main__":
    main()
