"""Image files of any kind to upright 8-bit RGB, as hostile input: nothing here trusts a header."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from retrieval_tip.errors import InputError

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded (Pillow's own limit for a decompression bomb, width x height)."""

MAX_BYTES = 1 << 30
"""Larger files are refused before they are read."""

MAX_ASPECT = 64
"""Longer images are cut to their middle: a centre crop sees no more, and resizing them would fill memory."""

_EXTERNAL = {"EPS"}  # opening one would start Ghostscript


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in _EXTERNAL]


@cache
def extensions() -> frozenset[str]:
    """File extensions (lower case, with the dot) of the formats that can be read."""
    formats = set(_formats())
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in formats)


def find(folder: Path) -> Iterator[Path]:
    """Image files below a folder, depth first in name order. Hidden files and folders are left out."""
    waiting = _entries(folder)
    while waiting:
        entry = waiting.pop()
        if is_folder(entry):
            if not entry.is_symlink():  # a link may lead back up
                waiting += _entries(entry.path)
        elif Path(entry.name).suffix.lower() in extensions():
            yield Path(entry.path)


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, last name first."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(seen, key=lambda entry: entry.name, reverse=True)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises InputError: no such file, not a regular file (a pipe would wait for ever), empty, too large, unreadable.
    """
    file = Path(path)
    try:
        if not file.exists():
            raise InputError("no such file")
        if not file.is_file():
            raise InputError("not a file" if not file.is_dir() else "a folder, not an image")
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"{size:,} bytes are more than an image file may have ({MAX_BYTES:,})")
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(getattr(error, "strerror", None) or str(error)) from error
    if not data:
        raise InputError("empty file")
    return data


def reducible(data: bytes, least: int) -> bool:
    """Whether :func:`decode` with ``least`` gives another picture than without: a JPEG that is twice as large, or more.

    Only the header is read. False for what is no image.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return _may_be_reduced(image) and min(image.size) >= 2 * least
    except Exception:  # as in decode, which says what is wrong
        return False


def _may_be_reduced(image: Image.Image) -> bool:
    return image.format == "JPEG"  # and not MPO: its further frames are not this size


def decode(data: bytes, least: int | None = None) -> Image.Image:
    """An encoded image to an upright RGB picture of 8 bits a channel.

    EXIF orientation is applied; an animation gives its first frame; transparency is laid on white; 16-bit, 32-bit and
    floating-point greys are scaled to 8 bits rather than clipped.

    With ``least``, a JPEG is decoded at a half, a quarter or an eighth of its size, the smallest of which both sides
    have ``least`` pixels, which is several times as fast.

    Raises InputError: not an image, truncated, damaged, or more than ``MAX_PIXELS`` pixels (of the full size).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise InputError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}: refused before decoding")
            if least is not None and _may_be_reduced(image):
                image.draft(None, (least, least))
            image.load()
            return _within_aspect(_rgb(_upright(image)))
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError("not an image that Pillow can open") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"refused before decoding: {error}") from error
    except MemoryError:
        raise InputError("does not fit in memory") from None
    except Exception as error:  # decoders raise anything on damaged data: SyntaxError, struct.error, IndexError ...
        raise InputError(f"damaged image: {str(error).strip() or type(error).__name__}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block does not make the picture unreadable
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image if "transparency" not in image.info else _on_white(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Deep greys to 8 bits: 0..1, 0..255 and 0..65535 are taken at their scale, wider ranges by their largest value."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(values.max())
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F" and largest <= 1:
        full = 1.0
    else:
        full = next((limit for limit in (255.0, 65535.0) if largest <= limit), largest)
    return Image.fromarray(np.clip(values * (255.0 / full), 0, 255).round().astype(np.uint8))


def _within_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
