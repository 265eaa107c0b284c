"""Stand-in for AddaxAI's worker: it runs a model on boxes in the order of calls that AddaxAI's worker makes.

It needs torch, numpy and Pillow, but not this package: ``python addaxai_worker.py MODEL_DIR IN.json OUT.json``.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REQUIRED = (
    "model_id",
    "friendly_name",
    "description",
    "developer",
    "info_url",
    "env",
    "model_fname",
)


def opened(folder):
    """Return the model in a folder, loaded, and its class names."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="cp1252"))
    assert all(isinstance(manifest[name], str) for name in REQUIRED)
    assert (manifest["model_id"], manifest["env"]) == (folder.name, "pytorch")
    spec = importlib.util.spec_from_file_location("inference", folder / "inference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.ModelInference(folder, folder / manifest["model_fname"])
    assert isinstance(model.check_gpu(), bool)
    model.load_model()
    names = model.get_class_names()
    assert list(names) == [str(number) for number in range(1, len(names) + 1)]
    return model, list(names.values())


def classified(folder, items, size):
    """Return the answer to each box of the photos, in batches of a size, or one at a time if it is ``None``."""
    model, names = opened(folder)
    crops = []
    for item in items:
        image = Image.open(item["image_path"]).convert("RGB")
        crops.append(model.get_crop(image, item["bbox"]))
    assert all(crop is not None for crop in crops)
    answers = []
    if size is None:
        answers = [model.get_classification(crop) for crop in crops]
    else:
        for start in range(0, len(crops), size):
            batch = np.stack([model.get_tensor(crop) for crop in crops[start : start + size]])
            rows = model.classify_batch(batch)
            assert len(rows) == len(batch)
            answers += rows
    for answer in answers:
        for name, probability in answer:
            assert name in names
            assert math.isfinite(probability)
            assert 0 <= probability <= 1
    return answers


if __name__ == "__main__":
    place, given, out = map(Path, sys.argv[1:])
    boxes = json.loads(given.read_text())
    results = {str(size): classified(place, boxes, size) for size in (1, 4, None)}
    assert "retrieval_tip" not in sys.modules
    out.write_text(json.dumps(results))
