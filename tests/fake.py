"""A backbone that computes trivial features and counts its calls, twelve pictures, and readers of both."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tables import unit_rows

from retrieval_tip.backbones.base import Identity
from retrieval_tip.data import images
from retrieval_tip.data.sources import of_images, read_item
from retrieval_tip.data.tables import IDENTITY_KEY

IDENTITY = Identity("fake", "tag", "sha256:00", "sha256:01", {"size": 4, "mean": [0, 0, 0]})


@dataclass
class Fake:
    """A backbone whose features are the mean colour and the corner of a view (``d = 6``). It counts its calls."""

    identity: Identity = IDENTITY
    precision: str = "float32"
    dim: int = 6
    logit_scale: float = 100.0
    batch_size: int = 4
    prepared: int = 0
    batches: list[int] = field(default_factory=list)

    def preprocess(self, image):
        self.prepared += 1
        return torch.from_numpy(np.asarray(image.resize((4, 4))).astype(np.float32)).permute(
            2, 0, 1
        )

    def view(self, image, seed):
        generator = torch.Generator().manual_seed(hash_of(seed))
        return self.preprocess(image) * torch.rand(3, 1, 1, generator=generator)

    def release(self, idle):
        """Keep everything: there is nothing to free."""

    def encode_images(self, pixels):
        self.batches.append(len(pixels))
        means = pixels.double().mean(dim=(2, 3)).float()
        return torch.cat([means, pixels[:, :, 0, 0] + 1], dim=1).numpy()

    has_text = True

    def encode_texts(self, texts):
        raise AssertionError("no text is encoded here")

    def expected(self, image):
        raw = self.encode_images(self.preprocess(image)[None])[0]
        return raw / np.linalg.norm(raw)


def hash_of(text):
    return int.from_bytes(text.encode()[-6:], "big")


def picture(number):
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (9, 7, 3), dtype=np.uint8))


def pictures(folder):
    """Write twelve pictures into a new folder."""
    folder.mkdir()
    for number in range(12):
        picture(number).save(folder / f"{number:02}.png")
    return folder


class Reads(Counter[str]):
    """Reads images, and counts how often each file was read."""

    def __call__(self, path):
        self[Path(path).name] += 1
        return read_item(path)


def source_of(folder):
    return of_images([str(path) for path in images.find(folder)])


def with_identity(path, raw, rows=None):
    table = pa.table({"id": ["a", "b"], "feature": list(unit_rows(2, 6) if rows is None else rows)})
    pq.write_table(
        table.replace_schema_metadata(None if raw is None else {IDENTITY_KEY: raw}), path
    )
    return path
