"""Tables, features, images, PNG files and models for tests."""

import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.random import default_rng
from PIL import Image

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def read_features(path):
    """Return the features and the labels of a feature table."""
    table = pq.read_table(path)
    return np.stack(table["feature"].to_numpy()).astype(np.float32), np.array(
        table["label"].to_pylist()
    )


def write_table(path, features, labels=None, ids=None, **extra):
    """Write a feature table."""
    rows = np.asarray(features, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    columns = {"id": ids or [f"item-{i}" for i in range(len(rows))]}
    columns |= ({} if labels is None else {"label": labels}) | {"feature": column} | extra
    pq.write_table(pa.table(columns), path)
    return path


def odd_columns():
    """Return two rows of columns of every type, some with odd names."""
    half = np.arange(2, dtype=np.float16)
    return {
        "my col": pa.array(["a", None]),
        "x'y\"z": pa.array([1, 2], pa.uint64()),
        "Ünï-1": pa.array([True, None]),
        "select": pa.array([[1], []], pa.list_(pa.int64())),
        "when": pa.array([1, None], pa.timestamp("us", "UTC")),
        "raw": pa.array([b"a", b"\xff"]),
        "dictionary": pa.array(["a", "b"]).dictionary_encode(),
        "none": pa.nulls(2),
        "large": pa.array(["a", "b"], pa.large_string()),
        "nested": pa.array([{"a": [1, None]}] * 2),
        "struct": pa.array([{"x": half[1]}, None], pa.struct([("x", pa.float16())])),
        "half": pa.array([None, half[1]], pa.float16()),
        "halves": pa.array([[half[0]], None], pa.list_(pa.float16())),
        "pair": pa.array([list(half)] * 2, pa.list_(pa.float16(), 2)),
        "view": pa.array(["a", None], pa.string_view()),
    }


def write_parts(folder, *tables):
    """Write tables as the parts of a complete folder, as ``encode --ray`` does, and return their paths."""
    places = [folder / f"part={number:06}/part-{number}.parquet" for number in range(len(tables))]
    for place, table in zip(places, tables, strict=True):
        place.parent.mkdir(parents=True)
        pq.write_table(table, place)
    for name in ("_run.json", "_complete.json"):
        (folder / name).write_text("{}")
    return places


def unit_rows(n, d, seed=0):
    """Return random features of norm 1."""
    rows = default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return unit(rows)


def unit(rows):
    """Scale the rows to norm 1."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def touch(folder, *paths):
    """Create empty files and their folders."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def tiny(folder, seed=0, **config):
    """Create a model folder with random weights."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    config = TINY | config
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"size": 32, "mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def write_cnn(file, encoder=None):
    """Write weights of an EfficientNet-Lite0: random ones, or those of the image tower of ``encoder``, a folder."""
    import timm
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(0)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    if encoder is not None:
        trunk = "visual.trunk."
        known = load_file(encoder / "open_clip_model.safetensors").items()
        weights |= {name[len(trunk) :]: one.float() for name, one in known if trunk in name}
    torch.save(weights, file)


def picture(size=(50, 40)):
    """Return an image of random pixels."""
    return Image.fromarray(default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def some_pixels(model, number=2):
    """Return the pixels of several views of one image."""
    import torch

    return torch.stack([model.view(picture(), str(seed)) for seed in range(number)])


def by_torch(name):
    """Return a backbone that encodes images with torch on a CPU, without OpenVINO."""
    from retrieval_tip.backbones.loading import load_backbone

    model = load_backbone(name, device="cpu")
    model._compiles = False
    return model


def png_chunk(kind, body):
    """Return a chunk of a PNG file with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, data, depth=8, colour=2):
    """Return a PNG file whose header declares this size; its compressed rows may differ."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )
