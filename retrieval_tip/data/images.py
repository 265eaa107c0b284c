"""Decode image files to upright 8-bit RGB images.

Images are decoded by Pillow, which detects decompression bombs by reading their headers. This module also limits bytes,
pixels, the data before the first pixel, and the number of large images decoded at the same time.
"""

from __future__ import annotations

import io
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from retrieval_tip import hooks
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import suffix_of

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow names of the accepted formats. JPEG includes MPO.

AVIF and JPEG 2000 are not accepted, because their decoders allocate far more memory than the header suggests. A 1 KB
AVIF file took 240 MB, and a 213-byte JPEG 2000 file took 770 MB.
"""

MAX_PIXELS = 178_956_970  # largest width x height; Pillow's own limit for decompression bombs
LARGE_PIXELS = 1 << 24  # images with more pixels are decoded one at a time
WHOLE_PIXELS = (
    1 << 25
)  # images with more pixels are reduced by the smallest integer factor that suffices
MAX_ASPECT = (
    64  # longer images are cropped to their middle, because a centre crop discards the rest anyway
)
HEADER_EFFORT = 16 << 20  # largest number of bytes that a decoder may read before the first pixel
READ_EFFORT = 256  # bytes that are counted for each read in addition to its size
MAX_SCANNED = (
    1 << 31
)  # largest scans x pixels of a progressive JPEG, which take about five seconds to decode
MAX_EXIF = 1 << 20  # largest EXIF block that is parsed, in bytes; JPEG allows at most 64 KB

Box = tuple[float, float, float, float]
"""The left edge, the top edge, the width and the height of a part, as fractions of the upright image."""

ORIENTATION = ExifTags.Base.Orientation

_large = threading.Lock()


@cache
def formats() -> tuple[str, ...]:
    """Return the Pillow names of the accepted formats, which include HEIF if the extra ``heic`` is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def uploads() -> tuple[str, ...]:
    """Return the Pillow names of the formats that the server accepts."""
    return tuple(name for name in formats() if name in ("JPEG", "PNG", "WEBP", "HEIF"))


@cache
def extensions() -> frozenset[str]:
    """Return the file extensions of the accepted formats in lower case, such as ``.jpg``."""
    read = (*formats(), "MPO")
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in read)


def extension(data: bytes) -> str:
    """Return the usual file extension of an encoded image, such as ``.jpg``, or raise InputError."""
    with opened(data) as image:
        kind = image.format or ""
        return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")


def is_photo(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image or a file of photos, by its suffix."""
    suffix = suffix_of(path)
    return suffix in extensions() or hooks.opens(suffix)


def find(folder: Path, others: Counter[str] | None = None) -> Iterator[Path]:
    """Yield the visible images and files of photos below a folder, depth first and by name.

    Other files are counted in ``others``.
    """
    waiting = entries(folder)[::-1]
    while waiting:
        entry = waiting.pop()
        if is_folder(entry):
            if not entry.is_symlink():  # a link may point to a parent folder
                waiting += entries(entry.path)[::-1]
        elif is_photo(entry.name):
            yield Path(entry.path)
        elif others is not None:
            others[suffix_of(entry.name)] += 1


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """List the entries of a folder that are not hidden, sorted by name."""
    with os.scandir(folder) as found:
        seen = [entry for entry in found if not entry.name.startswith(".")]
    return sorted(seen, key=lambda entry: entry.name)


def subfolders(folder: Path) -> list[os.DirEntry[str]]:
    """List the visible folders in a folder, sorted by name."""
    return [entry for entry in entries(folder) if is_folder(entry)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to a folder. A link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class _Bounded(io.BytesIO):
    """An image file that stops decoders that read byte by byte, or too much before the first pixel."""

    effort = HEADER_EFFORT

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most ``size`` bytes and at most 1 MiB, which Pillow's readers never exceed, or everything."""
        data = super().read(-1 if size is None else min(size, 1 << 20))
        if size is not None and size >= 0:  # the WEBP decoder reads everything at once
            self.effort -= len(data) + READ_EFFORT
        if self.effort < 0:
            raise InputError("too much metadata; save the image again without it")
        return data


@contextmanager
def opened(data: bytes, only: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Open an encoded image and read its header. All Pillow errors are raised as InputError."""
    file = _Bounded(data)
    known = only or formats()
    try:
        with Image.open(file, formats=known) as image:
            if (
                "progressive" in image.info
                and data.count(b"\xff\xda") * image.width * image.height > MAX_SCANNED
            ):
                raise InputError(
                    f"{image.width} x {image.height} pixels in too many scans; save it as PNG"
                )
            file.effort += 2 * len(data)
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"not a readable image: damaged, or not one of {', '.join(known)}"
        ) from None
    except Image.DecompressionBombError as error:
        raise InputError(f"too large to decode: {error}") from error
    except MemoryError:
        raise InputError("does not fit in memory") from None
    except (
        Exception
    ) as error:  # decoders can raise any error on damaged data, for example SyntaxError
        raise InputError(f"damaged image: {str(error).strip() or type(error).__name__}") from error


def area(data: bytes, *, most: int = MAX_PIXELS, only: tuple[str, ...] | None = None) -> int:
    """Return width x height from the header of an encoded image, or 0 if it cannot be opened or exceeds the limits."""
    try:
        with opened(data, only) as image:
            pixels = image.width * image.height
            return pixels if pixels <= most else 0
    except InputError:  # decode reports the reason
        return 0


def decode(
    data: bytes,
    least: int | None = None,
    *,
    most: int = MAX_PIXELS,
    only: tuple[str, ...] | None = None,
) -> Image.Image:
    """Decode an image to upright RGB with 8 bits per channel.

    Only the first frame of an animation is used. Transparent areas are placed on white. 16-bit, 32-bit and
    floating-point grey values are scaled to 8 bits. Images of more than ``WHOLE_PIXELS`` pixels are reduced.

    If ``least`` is given, a JPEG is decoded at the smallest of 1/2, 1/4 or 1/8 of its size at which both sides still
    have ``least`` pixels. ``most`` limits width x height of the full image, and ``only`` limits the accepted formats.

    Raises InputError if the image has another format, is truncated or damaged, or has more than ``most`` pixels.
    """
    with opened(data, only) as image:
        width, height = image.size
        if width * height > most:
            raise InputError(f"too large: {width} x {height} pixels; the limit is {most:,}")
        if image.format == "JPEG":  # excludes MPO, whose other frames have a different size
            scale = max(1, min(image.size) // least if least else 1)
            while (width // scale) * (height // scale) > WHOLE_PIXELS:
                scale *= 2
            image.draft(None, (max(1, width // scale), max(1, height // scale)))
        held = width * height if "progressive" in image.info else image.width * image.height
        with _large if held > LARGE_PIXELS else nullcontext():
            image.load()
            width, height = (min(side, MAX_ASPECT * min(image.size)) for side in image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            whole = image.size == (width, height)
            picture = _rgb(image if whole else image.crop((left, top, left + width, top + height)))
        with suppress(Exception):  # a damaged EXIF block does not make the image unreadable
            if len(image.info.get("exif") or b"") <= MAX_EXIF:
                picture.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
                ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with at most ``WHOLE_PIXELS`` pixels. Transparent areas are placed on white."""
    factor = max(1, math.ceil(math.sqrt(image.width * image.height / WHOLE_PIXELS)))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = _grey(image)
        return (grey.reduce(factor) if factor > 1 else grey).convert("RGB")
    is_clear = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    mode = "RGBA" if is_clear else "RGB"
    picture = image if image.mode == mode else image.convert(mode)
    picture = picture.reduce(factor) if factor > 1 else picture
    if is_clear:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture


def _grey(image: Image.Image) -> Image.Image:
    """Scale a deep grey image to 8 bits. White is 1, 255 or 65535, or the largest value if that is larger."""
    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(values.max())
    limits = {"F": (1.0, 255.0), "I": (255.0,)}.get(image.mode, ())
    values /= next((limit for limit in (*limits, 65535.0) if largest <= limit), largest)
    values *= 255
    return Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8))


def crop(data: bytes, box: Box) -> bytes:
    """Return a part of an encoded image as an upright RGB image in PPM format.

    What lies outside the image is cut off, and at least one pixel remains. See :func:`decode` for InputError.
    """
    picture = decode(data)
    edges = []
    for start, length, pixels in zip(box[:2], box[2:], picture.size, strict=True):
        low = min(max(int(start * pixels), 0), pixels - 1)
        edges.append((low, min(max(math.ceil((start + length) * pixels), low + 1), pixels)))
    (left, right), (top, bottom) = edges
    buffer = io.BytesIO()
    picture.crop((left, top, right, bottom)).save(buffer, "PPM")
    return buffer.getvalue()


def thumbnail(data: bytes, size: int, *, most: int = MAX_PIXELS) -> bytes:
    """Return a thumbnail of an encoded image as an upright RGB JPEG with sides of at most ``size`` pixels.

    The image is never enlarged, and its metadata is removed. See :func:`decode` for ``most`` and for InputError. Raises
    UsageError if ``size`` is below 1.
    """
    if size < 1:
        raise UsageError(f"size {size}: expected at least 1 pixel")
    picture = decode(data, size, most=most)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    picture.info = {}
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()
