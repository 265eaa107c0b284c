"""Measure videos: frames per second, peak memory, and the accuracy of one answer per clip.

Clips are made from test photos of Caltech101. A window wanders over the enlarged photo, and each frame is blurred by a
random amount, as by a moving animal or camera.

Speed: a frame a second is read and encoded, from H.264 clips of 30 frames a second, and from the same frames as JPEGs.
Many cameras write a key frame each second. x264 writes one each 250 frames if the scene does not change.
Memory: a new process reads all frames of a clip of 3840 x 2160 pixels in 16 threads. Accuracy: an index of 4 shots per
class answers each clip by the mean of its frames, and by its middle frame alone.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import av
import click
import numpy as np
from common import SEED, SHARED, clocked, machine, medians, run, show, take_turns
from PIL import Image, ImageFilter

from retrieval_tip import Reader, build_index, load_backbone, open_source
from retrieval_tip.data.source import items_in, of_images, read_item

SPLIT = SHARED / "data/caltech101/split_zhou_Caltech101.json"
KEYS = (30, 250)
"""Numbers of frames from one key frame to the next."""
SECONDS = 10
"""Length of the clips for the speed."""
ROUNDS = 3
CLIPS, SEEDS = 40, (1, 2, 3)
"""Number of clips for the accuracy, and the seeds of their draws."""
BLUR = 6.0
"""Largest radius of the blur, in pixels of a frame of 240 x 180."""
MEMORY = r"""
import re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from retrieval_tip.data.source import items_in, read_item
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
items = items_in(sys.argv[1])
listed = peak()
with ThreadPoolExecutor(16) as pool:
    sizes = list(pool.map(lambda item: len(read_item(item)), items))
print(len(items), before, listed, peak())
"""


def wandering(
    photo: str, size: tuple[int, int], number: int, draw: random.Random
) -> Iterator[Image.Image]:
    """Yield frames that show about half of a photo each, blurred by a random amount."""
    whole = 7 * np.array(size) // 5
    picture = Image.open(photo).convert("RGB").resize(whole.tolist(), Image.Resampling.BICUBIC)
    phases = np.array((draw.random(), draw.random()))
    for step in range(number):
        place = 0.5 + 0.5 * np.sin(2 * np.pi * (phases + step / number))
        corner = (place * (whole - size)).astype(int)
        shot = picture.crop((*corner, *(corner + size)))
        radius = BLUR * draw.random() ** 2 * size[0] / 240
        yield shot.filter(ImageFilter.BoxBlur(radius))


def write_clip(
    path: Path, frames: Iterable[Image.Image], size: tuple[int, int], rate: int, keys: int = 250
) -> str:
    """Write frames as H.264, of which one in ``keys`` is a key frame."""
    options = {"preset": "veryfast", "g": str(keys), "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return str(path)


def speed(photo: str, reader: Reader, folder: Path) -> None:
    """Print frames per second from clips and from JPEGs."""
    rows = []
    for size in ((1280, 720), (1920, 1080), (3840, 2160)):
        shots = list(wandering(photo, size, 30, random.Random(SEED)))
        clips = [
            write_clip(folder / f"{size[1]}-{keys}.mp4", SECONDS * shots, size, 30, keys)
            for keys in KEYS
        ]
        clip = clips[-1]
        items = items_in(clip)
        stills = [str(folder / f"{size[1]}-{place}.jpg") for place in range(len(items))]
        for item, still in zip(items, stills, strict=True):
            Path(still).write_bytes(read_item(item))

        def encode(turn: int, paths: list[str], clips: list[str] = clips) -> float:
            for clip in clips:
                Path(clip).touch()  # forgets the frames of the last round
            return clocked(partial(reader.encode, of_images(paths)))

        names = [f"a key frame in {keys}" for keys in KEYS]
        sides = {
            name: partial(encode, paths=items_in(clip))
            for name, clip in zip(names, clips, strict=True)
        }
        sides["JPEG"] = partial(encode, paths=stills)
        found = medians(take_turns(f"{size[1]}", sides, ROUNDS))
        speeds = {f"{name}, frames/s": len(items) / found[name] for name in sides}
        rows.append({"pixels": f"{size[0]} x {size[1]}"} | speeds)
    show(f"Read and encoded, medians of {ROUNDS} rounds", rows)
    read, *peaks = run(sys.executable, "-c", MEMORY, clip).split()
    click.echo(f"MiB before, after listing and after reading {read} frames: {', '.join(peaks)}")


def accuracy(reader: Reader, folder: Path) -> None:
    """Print the accuracy of clips by their mean and by their middle frame."""
    train, test = (open_source(SPLIT, split=part) for part in ("train", "test"))
    rows = []
    for seed in SEEDS:
        draw = random.Random(seed)
        index = build_index(train, folder / f"index-{seed}", reader, shots=4)
        chosen = test.take(draw.sample(range(len(test)), CLIPS))
        size = (240, 180)
        clips = [
            write_clip(folder / f"{seed}-{place}.mp4", wandering(path, size, 50, draw), size, 5)
            for place, path in enumerate(chosen.paths or ())
        ]
        frames = of_images([item for clip in clips for item in items_in(clip)])
        photos, shown = (
            np.concatenate([found.probabilities for found in index.answers(reader.blocks(source))])
            for source in (chosen, frames)
        )
        of_clips = shown.reshape(CLIPS, -1, len(index.class_names))
        truth = np.array([index.class_names.index(label) for label in chosen.labels])
        each = of_clips.argmax(axis=2) == truth[:, None]
        rows.append(
            {
                "seed": seed,
                "the photo": 100 * (photos.argmax(axis=1) == truth).mean(),
                "the middle frame": 100 * each[:, each.shape[1] // 2].mean(),
                "the mean of frames": 100 * (of_clips.mean(axis=1).argmax(axis=1) == truth).mean(),
            }
        )
    show(f"Accuracy in %, {CLIPS} clips of 10 frames per draw", rows)


@click.command(help=__doc__)
@click.option("--model", default=f"local-dir:{SHARED}/models/lit-mini", show_default=True)
def main(model: str) -> None:
    """Measure videos, and print the results."""
    click.echo(machine("av", "openvino", "pillow"))
    reader = Reader(load_backbone(model, device="cpu"))
    photo = (open_source(SPLIT, split="test").paths or ())[0]
    with tempfile.TemporaryDirectory() as scratch:
        accuracy(reader, Path(scratch))
        speed(photo, reader, Path(scratch))


if __name__ == "__main__":
    main()
