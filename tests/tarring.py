"""Small tars and images for tests of tars and Ray."""

import io
import tarfile

from PIL import Image


def jpeg(shade=0):
    """Return a small image of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(data, "JPEG")
    return data.getvalue()


def tar(path, members, kind="w"):
    """Write a tar with these members."""
    with tarfile.open(path, kind, format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
