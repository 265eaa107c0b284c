"""Stand-in for the ``../shared`` test data: the demo's offline photos and encoder, in the same layout.

- ``data/caltech101``: images of Debian's tuxpaint-stamps-default on white, with similar class names of Caltech101
- ``models/lit-mini``: the image tower of EfficientNet-Lite0 with ImageNet weights, and a random text tower
- ``data/clip-food9``: random features around a mean for each class; tests of real CLIP features are ``needs_real``
"""

import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import demo  # noqa: E402

SIMILAR = {  # Caltech101 class: images of the package
    "Motorbikes": ["vehicles/**"],
    "butterfly": ["animals/insects/**"],
    "camera": ["household", "household/dishes/**", "household/arttools"],
    "okapi": ["animals/mammals/bovines"],
    "panda": [
        f"animals/mammals/{kind}"
        for kind in ("bears", "apes", "cats", "dogs", "rodents", "aquatic")
    ],
    "pigeon": ["animals/birds"],
    "pizza": ["food/vegetables"],
    "stop_sign": ["town/roadsigns"],
    "strawberry": ["food/fruit"],
    "sunflower": ["plants/flowers"],
    "umbrella": ["clothes"],
    "wrench": ["household/tools"],
    "yin_yang": ["sports"],
}
DISHES = [
    "apple_pie",
    "french_fries",
    "garlic_bread",
    "hamburger",
    "ice_cream",
    "omelette",
    "pizza",
    "ramen",
    "sushi",
]
D = 512


def create(place):
    """Return the folder ``place``, created if needed, or ``None`` if its parts cannot be downloaded."""
    if place.is_dir():
        return place
    work = place.with_name("docs")  # shared with the examples of the docs
    work.mkdir(parents=True, exist_ok=True)
    try:
        stamps = demo.stamps(work)
        encoder = demo.weights(work)
    except (demo.CannotBeHadError, OSError):
        return None
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / "made"
        write_photos(stamps, made / "data/caltech101")
        write_features(made / "data/clip-food9")
        write_encoder(Path(encoder.partition("@")[2]), made / "models/lit-mini")
        shutil.move(made, place)
    return place


def write_photos(stamps, out):
    """Write one folder of JPEG files per class, and the split into training, validation and test."""
    from PIL import Image, ImageOps

    parts = {"train": [], "val": [], "test": []}
    for label, (name, folders) in enumerate(SIMILAR.items()):
        files = [file for folder in folders for file in sorted(stamps.glob(f"{folder}/*.png"))]
        files = [file for file in files if not file.with_suffix(".svg").exists()]
        random.Random(1).shuffle(files)
        (out / "101_ObjectCategories" / name).mkdir(parents=True)
        for number, file in enumerate(files):
            with Image.open(file) as stamp:
                cut = stamp.convert("RGBA")
                picture = Image.new("RGB", cut.size, "white")
                picture.paste(cut, mask=cut.getchannel("A"))
            path = f"{name}/image_{number + 1:04}.jpg"
            ImageOps.contain(picture, (300, 300)).save(
                out / "101_ObjectCategories" / path, quality=90
            )
            test = max(4, len(files) // 4)
            val = max(1, len(files) // 8)
            part = "test" if number < test else "val" if number < test + val else "train"
            parts[part].append((path, label, name))
    (out / "split_zhou_Caltech101.json").write_text(json.dumps(parts))


def write_features(out):
    """Write tables of unit vectors around a common mean and a class mean, with outliers, and one text per class."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir(parents=True)
    rng = np.random.default_rng(1)
    common = rng.normal(size=D)
    own = rng.normal(size=(len(DISHES), D))
    for part, each, spread in (("train", 200, 0.8), ("test", 50, 0.8), ("text", 1, 0.1)):
        ids = np.repeat(np.arange(len(DISHES)), each)
        rows = (
            common
            + 0.4 * own[ids]
            + spread * rng.uniform(0.5, 4, (len(ids), 1)) * rng.normal(size=(len(ids), D))
        )
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        names = [DISHES[i] for i in ids]
        numbered = (
            names if part == "text" else [f"{name}-{i % each:04}" for i, name in enumerate(names)]
        )
        feature = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
        pq.write_table(
            pa.table({"id": numbered, "label": names, "feature": feature}), out / f"{part}.parquet"
        )


def write_encoder(weights, out):
    """Write a dual encoder in open_clip's folder format."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "none"}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    config = {"embed_dim": 1280, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    half = [0.5, 0.5, 0.5]
    torch.manual_seed(1)
    model = open_clip.CustomTextCLIP(1280, dict(vision), dict(text)).eval()
    trunk = model.visual.trunk.state_dict()
    given = [
        tensor
        for name, tensor in torch.load(weights, weights_only=True).items()
        if not name.startswith("_fc")
    ]
    model.visual.trunk.load_state_dict(dict(zip(trunk, given, strict=True)))
    model.logit_scale.data.fill_(4.6052)
    out.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        out / "open_clip_model.safetensors",
    )
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "shortest"}
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )


if __name__ == "__main__":
    sys.exit(create(ROOT / "build" / "shared") is None)
