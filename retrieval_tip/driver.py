"""The distribution of FAISS that fits this machine. A build runs this file alone, so it needs no other package."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path


def has_nvidia_driver() -> bool:
    """Return whether this machine has an NVIDIA driver."""
    return (
        Path("/proc/driver/nvidia").exists()
        or shutil.which("nvidia-smi") is not None  # in Windows' Linux, the only trace
        or shutil.which("nvcuda.dll", mode=os.F_OK) is not None
    )


def faiss_distribution(build: str | None = None) -> str:
    """Return ``faiss-gpu`` for a machine with an NVIDIA driver, and ``faiss-cpu`` for any other.

    ``build``, ``gpu`` or ``cpu``, overrides the search for a driver. Raises ValueError for other values.
    """
    if not build:
        has_wheels = sys.platform == "linux" and platform.machine() == "x86_64"
        build = "gpu" if has_wheels and has_nvidia_driver() else "cpu"
    if build not in ("gpu", "cpu"):
        raise ValueError(f"RETRIEVAL_TIP_FAISS is {build!r}; use gpu or cpu")
    return f"faiss-{build}"
