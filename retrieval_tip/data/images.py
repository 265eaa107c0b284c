"""Image files of any kind to upright 8-bit RGB, as hostile input: nothing here trusts a header."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import (
    BmpImagePlugin,
    IcnsImagePlugin,
    IcoImagePlugin,
    Image,
    ImageOps,
    Jpeg2KImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
)

from retrieval_tip.errors import InputError, UsageError

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded (Pillow's own limit for a decompression bomb, width x height)."""

MAX_BYTES = 1 << 30
"""Larger files are refused before they are read."""

MAX_ASPECT = 64
"""Longer images are cut to their middle: a centre crop sees no more, and resizing them would fill memory."""

THUMBNAIL_QUALITY = 80
"""Of the JPEG files that :func:`thumbnail` makes, of 100."""

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


def decode(
    data: bytes, least: int | None = None, *, most: int | None = None, formats: Sequence[str] | None = None
) -> Image.Image:
    """An encoded image to an upright RGB picture of 8 bits a channel.

    EXIF orientation is applied; an animation gives its first frame; transparency is laid on white; 16-bit, 32-bit and
    floating-point greys are scaled to 8 bits rather than clipped.

    With ``least``, a JPEG is decoded at a half, a quarter or an eighth of its size, the smallest of which both sides
    have ``least`` pixels, which is several times as fast. ``most`` is the limit of width x height (``None``:
    ``MAX_PIXELS``), ``formats`` are the names (Pillow's: JPEG, PNG ...) of those that are tried, by default all safe;
    EPS never is.

    Raises InputError: not an image, truncated, damaged, or more than ``most`` pixels (of the full size).
    """
    most = MAX_PIXELS if most is None else most
    tried = [name for name in _formats() if formats is None or name in formats]
    try:
        for width, height in _held(data, tried):
            _check_size(width, height, most)
        with Image.open(io.BytesIO(data), formats=tried) as image:
            _check_size(*image.size, most)
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


def thumbnail(data: bytes, size: int, *, most: int | None = None, formats: Sequence[str] | None = None) -> bytes:
    """An encoded image as a small JPEG file: upright, RGB, at most ``size`` pixels a side, never enlarged.

    Nothing of the file but its picture is kept: no comment, no EXIF, no profile. ``most`` and ``formats`` as for
    :func:`decode`. Raises InputError as :func:`decode`; UsageError where ``size`` is below 1.
    """
    if size < 1:
        raise UsageError(f"size is {size}: a picture has at least 1 pixel a side")
    picture = decode(data, size, most=most, formats=formats)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    picture.info = {}
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return buffer.getvalue()


def _check_size(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise InputError(f"{width} x {height} pixels are more than {most:,}: refused before decoding")


def _held(data: bytes, formats: Sequence[str]) -> list[tuple[int, int]]:
    """Sizes of the pictures within an icon file that would be decoded, by their own headers.

    An icon is said to be 256 or 1024 pixels wide, whatever the PNG within it says, and Pillow decodes an ICO file when
    it opens it. Empty for all other files, and for what Pillow will find to be damaged.
    """
    buffer = io.BytesIO(data)
    try:
        if "ICO" in formats and data.startswith(b"\0\0\1\0"):
            starts = [IcoImagePlugin.IcoFile(buffer).entry[0].offset]
        elif "ICNS" in formats and data.startswith(b"icns"):
            icon = IcnsImagePlugin.IcnsFile(buffer)
            starts = [icon.dct[code][0] for code, _ in icon.SIZES[icon.bestsize()] if code in icon.dct]
        else:
            return []
        return [_size_at(buffer, start) for start in starts]
    except Exception:  # as in decode, which says what is wrong
        return []


def _size_at(buffer: io.BytesIO, start: int) -> tuple[int, int]:
    """Size of the PNG, JPEG 2000 or bitmap that begins there, within an icon; raw data has no size of its own."""
    buffer.seek(start)
    head = buffer.read(12)
    buffer.seek(start)
    if head.startswith(b"\x89PNG"):
        return PngImagePlugin.PngImageFile(buffer).size
    if head.startswith((b"\xff\x4f\xff\x51", b"\x0d\x0a\x87\x0a", b"\0\0\0\x0cjP")):
        return Jpeg2KImagePlugin.Jpeg2KImageFile(buffer).size
    if buffer.getvalue().startswith(b"icns"):
        return 0, 0
    width, height = BmpImagePlugin.DibImageFile(buffer).size
    return width, height // 2  # the picture, and its mask below it


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
