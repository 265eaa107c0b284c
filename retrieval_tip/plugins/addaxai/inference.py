"""Answer as a classifier of AddaxAI. ``retrieval-tip index export --addaxai`` wrote this file and ``model.pt``.

It needs torch, numpy and Pillow. ``python inference.py PHOTO ...`` prints the answers to whole photos, and the median
time for one.
"""

from __future__ import annotations

import io
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # busy waiting makes shared cores 100 times slower

import numpy as np
import torch
from PIL import Image, ImageOps

ORIENTATION = 0x0112
LONGEST = 64  # sides; longer crops are cut to their middle, which is all that their view shows


class ModelInference:
    """The interface of AddaxAI. An answer has all classes, or none if the crop resembles no shot."""

    def __init__(self, model_dir: Path, model_path: Path) -> None:
        self.path = Path(model_path)
        self.device = "cpu"
        self.labels: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.model: Any = None

    def check_gpu(self) -> bool:
        """Return whether there is a GPU."""
        return _best_device() != "cpu"

    def load_model(self) -> None:
        """Load the model on the GPU if it runs there, or else on the CPU."""
        extra = {"facts.json": ""}
        content = io.BytesIO(self.path.read_bytes())  # torch cannot open every path on Windows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of torch call TorchScript deprecated
            self.model = torch.jit.load(content, map_location="cpu", _extra_files=extra).eval()
        facts = json.loads(extra["facts.json"])
        self.labels = facts["labels"]
        self.views = facts["views"]
        self.device = _best_device()
        if self.device != "cpu":  # a batch that fails there moves the model to the CPU
            self.classify_batch(self.get_tensor(Image.new("RGB", (8, 8)))[None])

    def get_class_names(self) -> dict[str, str]:
        """Return the names of the classes by their number, from 1."""
        return {str(number): label for number, label in enumerate(self.labels, 1)}

    def get_crop(self, image: Image.Image, bbox: Sequence[float]) -> Image.Image | None:
        """Return all pixels that a box of the upright photo touches, or ``None`` if this is not possible."""
        try:
            if image.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            edges = []
            for start, length, pixels in zip(bbox[:2], bbox[2:], image.size, strict=True):
                low = min(max(int(start * pixels), 0), pixels - 1)
                edges.append((low, min(max(math.ceil((start + length) * pixels), low + 1), pixels)))
            (left, right), (top, bottom) = edges
            return _shortened(image.crop((left, top, right, bottom)).convert("RGB"))
        except Exception as error:
            print(f"box {bbox}: {error}", file=sys.stderr)
            return None

    def get_tensor(self, crop: Image.Image) -> np.ndarray:
        """Return the views of a crop for all encoders, one after the other."""
        return np.concatenate([_view(crop, view) for view in self.views])

    def classify_batch(self, tensors: np.ndarray) -> list[list[list[Any]]]:
        """Return the answer to each crop. Of a batch that fails on the CPU, no crop has one."""
        try:
            return self._answers(tensors)
        except Exception as error:  # AddaxAI would repeat a failed batch with every further crop
            print(f"{self.device}: {error}", file=sys.stderr)
            if self.device == "cpu":
                return [[] for _ in tensors]
        self.device = "cpu"
        return self.classify_batch(tensors)

    def get_classification(self, crop: Image.Image) -> list[list[Any]]:
        """Return the answer to a crop."""
        return self._answers(self.get_tensor(crop)[None])[0]

    def _answers(self, tensors: np.ndarray) -> list[list[list[Any]]]:
        # Optimising would repeat itself for each size of a batch.
        jit: Any = torch.jit
        with torch.no_grad(), jit.optimized_execution(False):
            model = self.model.to(self.device)
            outputs = model(torch.from_numpy(tensors).to(self.device))
        probabilities, no_match = (output.cpu() for output in outputs)
        found = ~no_match & probabilities.isfinite().all(1)
        answers: list[list[list[Any]]] = []
        for row, is_found in zip(probabilities.tolist(), found.tolist(), strict=True):
            pairs = zip(self.labels, row, strict=True) if is_found else ()
            answers.append([[label, p] for label, p in pairs])
        return answers


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _shortened(crop: Image.Image) -> Image.Image:
    width, height = (min(side, LONGEST * min(crop.size)) for side in crop.size)
    left, top = (crop.width - width) // 2, (crop.height - height) // 2
    return crop.crop((left, top, left + width, top + height))


def _view(image: Image.Image, view: dict[str, Any]) -> np.ndarray:
    """Resize and crop an image for an encoder, and return its bytes, colour by colour."""
    short = view["shorter_side"]
    size = short, short
    if view["resize_mode"] != "squash":
        long = int(short * max(image.size) / min(image.size))
        size = (short, long) if image.width <= image.height else (long, short)
    if image.size != size:
        image = image.resize(size, Image.Resampling[view["interpolation"].upper()])
    height, width = view["size"]
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.transpose(2, 0, 1).reshape(-1)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    inference = ModelInference(here, here / "model.pt")
    inference.load_model()
    times = []
    for photo in sys.argv[1:]:
        start = time.perf_counter()
        whole = inference.get_crop(Image.open(photo).convert("RGB"), (0, 0, 1, 1))
        print(json.dumps(None if whole is None else inference.get_classification(whole)))
        times.append(time.perf_counter() - start)
    print(json.dumps({"milliseconds": 1000 * statistics.median(times or [0])}))
