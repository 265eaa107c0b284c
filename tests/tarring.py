"""Small tars and images for tests of tars and Ray."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def jpeg(shade: int = 0) -> bytes:
    """Return a small image of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(data, "JPEG")
    return data.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes]], kind: str = "w") -> Path:
    """Write a tar with these members."""
    with tarfile.open(path, kind, format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
