"""Image files to upright 8-bit RGB, as hostile input: nothing here trusts a header, a size or a name.

What a file can make us spend is bounded: its bytes, its pixels, the memory of decoding it and of all that are decoded
at once, and the work before its first pixel.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import FOLDER, NotAFileError, open_regular

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. JPEG is also MPO.

Those of photographs, without the ones whose decoders take what they like, whatever size the file's header says: AVIF
(1 KB that says 64 x 64 pixels: 240 MB and more) and JPEG 2000 (213 bytes: 770 MB).
"""

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded (Pillow's own limit for a decompression bomb, width x height)."""

MAX_BYTES = 256 << 20
"""Larger files are refused before they are read."""

MAX_MEMORY = 416 << 20
"""Bytes for all images that are read and decoded at once, but for those that take ``SMALL`` or less.

One that would take more is refused before it is decoded."""

SMALL = 8 << 20
"""An image that takes no more bytes is not counted, and does not wait for large ones: one a thread is little."""

LARGE_FILE = 16 << 20
"""A file of more bytes is read and decoded while no other image is."""

WHOLE_PIXELS = 1 << 25
"""Larger pictures come at a half, a third ... of their size, the largest that has no more pixels than this."""

MAX_ASPECT = 64
"""Longer images are cut to their middle: a centre crop sees no more, and resizing them would fill memory."""

HEADER_EFFORT = 8 << 20
"""Bytes that are read before the first pixel, where each single read counts as ``READ_EFFORT`` more."""
READ_EFFORT = 256

MAX_PARTS = 1 << 17
"""Segments of a JPEG, strips of a TIFF: each of them costs time, however short it is."""
MAX_TAGS, MAX_BANDS = 4096, 64
"""Of a TIFF."""
MAX_SCANNED = 1 << 31
"""Scans of a progressive JPEG x its samples: a scan of a few bytes goes over all of them. About five seconds."""
MAX_TEXTS = 8
"""Compressed texts of a PNG: each may become megabytes."""
MAX_EXIF = 1 << 20
"""Bytes of an EXIF block that is looked at; a JPEG's are at most 64 KB."""

PART_PIXELS = 1 << 18
"""Of a picture, converted at a time."""
GIVEN_BACK = 64 << 20
"""Before and after an image that takes so many bytes or more, the C library is asked to give freed memory back."""

THUMBNAIL_QUALITY = 80
"""Of the JPEG files that :func:`thumbnail` makes, of 100."""


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here: ``FORMATS``, and HEIF where the extra ``heic`` is installed.

    HEIF is what telephones take; its decoder, like that of AVIF, takes the memory that the coded picture asks for.
    """
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


@cache
def extensions() -> frozenset[str]:
    """File extensions (lower case, with the dot) of the formats that can be read."""
    read = (*formats(), "MPO")
    return frozenset(ext for ext, name in Image.registered_extensions().items() if name in read)


def extension(data: bytes) -> str:
    """The usual file extension (with the dot) of an encoded image. Raises InputError as :func:`decode`, undecoded."""
    with _failures(), _open(data) as image:
        kind = image.format or ""
        return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")


def find(folder: Path, others: Counter[str] | None = None) -> Iterator[Path]:
    """Image files below a folder, depth first in name order. Hidden files and folders are left out.

    The files that are no images are counted in ``others`` by their suffix.
    """
    waiting = entries(folder)[::-1]
    while waiting:
        entry = waiting.pop()
        if is_folder(entry):
            if not entry.is_symlink():  # a link may lead back up
                waiting += entries(entry.path)[::-1]
        elif (suffix := Path(entry.name).suffix.lower()) in extensions():
            yield Path(entry.path)
        elif others is not None:
            others[suffix] += 1


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, in name order."""
    with os.scandir(folder) as found:
        seen = [entry for entry in found if not entry.name.startswith(".")]
    return sorted(seen, key=lambda entry: entry.name)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


# ------------------------------------------------------------------------------------- memory, shared by all threads


class _Room:
    """Bytes that threads share. Who asks for more than are free waits, and is not passed by those who come later."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._door, self._changed = threading.Lock(), threading.Condition()

    def take(self, size: int) -> None:
        with self._door, self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size

    def give(self, size: int) -> None:
        with self._changed:
            self._free += size
            self._changed.notify_all()


class _Thread(threading.local):
    held: int | None = None
    """Bytes that this thread has of the room; ``None`` outside of a turn."""


_room, _thread = _Room(MAX_MEMORY), _Thread()


@contextmanager
def turn() -> Iterator[None]:
    """A block, or as a decorator a function, in which one image is read and decoded.

    The memory that this takes counts until the end of the block, where it is given back. Without one, the memory of a
    file that was read is not counted, and that of a picture only until :func:`decode` returns.
    """
    if _thread.held is not None:
        yield
        return
    _thread.held = 0
    try:
        yield
    finally:
        held, _thread.held = _thread.held, None
        _room.give(held)
        if held >= GIVEN_BACK:
            _give_memory_back()


def _claim(size: int) -> None:
    """Wait until this turn may take ``size`` bytes in all.

    What it has is given up meanwhile: two that each wait for what the other has would wait for ever.
    """
    if _thread.held is not None and size > max(_thread.held, SMALL):
        _room.give(_thread.held)
        _thread.held = 0
        _room.take(size)
        _thread.held = size
        if size >= GIVEN_BACK:
            _give_memory_back()


def _give_memory_back() -> None:
    """Freed memory to the system, where the C library is glibc: that keeps what a thread has freed for its next use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def admit(size: int) -> None:
    """See to it, before an image file is read, that one of so many bytes may be; a large one waits for its turn.

    Raises InputError where it is too large.
    """
    if size > MAX_BYTES:
        raise InputError(f"{size:,} bytes are more than an image file may have ({MAX_BYTES:,})")
    if size > LARGE_FILE:
        _claim(MAX_MEMORY)


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises InputError: no such file, not a regular file (a pipe would wait for ever), empty, too large, unreadable.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size  # of a file of /proc, which may have no end, 0
            admit(size)
            data = file.read(size)
    except NotAFileError as error:
        raise InputError("a folder, not an image" if error.kind == FOLDER else f"{error.kind}, not a file") from None
    except FileNotFoundError:
        raise InputError("no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(getattr(error, "strerror", None) or str(error)) from error
    if not data:
        raise InputError("empty file")
    return data


# ------------------------------------------------------------------------------------------------- what a header says


class _Bounded(io.BytesIO):
    """An image file that ends the work of a reader who takes it byte by byte, or takes very much of it."""

    effort = HEADER_EFFORT

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file, but of many bytes no more at once than Pillow's own readers take."""
        data = super().read(-1 if size is None else min(size, 1 << 20))
        if size is not None and size >= 0:  # all at once is what WEBP asks for, once
            self.effort -= len(data) + READ_EFFORT
        if self.effort < 0:
            raise InputError("more of it is metadata, or in small pieces, than is read: save it anew without that")
        return data


def _open(data: bytes) -> Image.Image:
    """An image of which the header has been read, with bounded work.

    Raises InputError for what would take long and what Pillow decodes in Python, and whatever Pillow raises.
    """
    if data.startswith(b"\xff\xd8"):
        data = _Jpeg(data).lean
    elif data[:2] in (b"II", b"MM") and len(data) > 8:
        _check_directory(data)
    elif data.startswith(b"\x89PNG") and data.count(b"iTXt") + data.count(b"zTXt") > MAX_TEXTS:
        raise InputError(f"more than {MAX_TEXTS} compressed texts: save it anew without them")
    file = _Bounded(data)
    image = Image.open(file, formats=formats())
    if slow := [tile[0] for tile in image.tile if tile[0] in Image.DECODERS]:
        raise InputError(f"a kind of {image.format} that is not read ({slow[0]}): save it as PNG")
    file.effort += 2 * len(data)
    return image


_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""A segment of a JPEG; in the data of a scan, 255 is followed by 0 or by a restart marker (208 to 215)."""
_SCAN, _END, _EXIF = 0xDA, 0xD9, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xCA}
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}
"""APP1 to APP13, APP15 and comments: neither JFIF's segment nor Adobe's, which say what the colours mean."""
_MUCH_METADATA = 1 << 18


class _Jpeg:
    """A JPEG's segments, as its decoder will meet them.

    - ``lean``: its bytes, without metadata where there is much: no photograph is refused for an embedded film
    - ``held``: bytes that the decoder keeps beside the picture, where the picture comes in several scans
    - ``scanned``: samples that all scans together go over, where there are several

    Raises InputError: too many segments or scans.
    """

    def __init__(self, data: bytes) -> None:
        self.lean, self.held, self.scanned = data, 0, 0
        kept, dropped, exif, frame, progressive = [data[:2]], 0, False, b"", False
        for marker, start, end in self._segments(data, 2):
            segment = data[start:end]
            if marker == _SCAN:
                if frame and (progressive or segment[4] < frame[9]):
                    self._several_scans(data, start, frame)
                if dropped > _MUCH_METADATA:
                    self.lean = b"".join((*kept, data[start:]))
                return
            if marker in _FRAMES:
                frame, progressive = segment, marker in _PROGRESSIVE
            first = marker == _EXIF and not exif and segment[4:].startswith(b"Exif\0\0")
            if marker in _METADATA and not first:
                dropped += len(segment)
            else:
                kept.append(segment)
            exif = exif or first

    def _several_scans(self, data: bytes, start: int, frame: bytes) -> None:
        height, width = struct.unpack_from(">HH", frame, 5)
        across, down = [value >> 4 for value in frame[11::3]], [value & 15 for value in frame[11::3]]
        shares = sum(x * y for x, y in zip(across, down, strict=True)) / (max(across) * max(down))
        samples = math.ceil(width * height * shares)
        scans = sum(marker == _SCAN for marker, _, _ in self._segments(data, start))
        if scans * samples > MAX_SCANNED:
            raise InputError(f"{width} x {height} pixels in {scans} scans would take too long: save it as PNG")
        self.held, self.scanned = 2 * samples, scans * samples

    @staticmethod
    def _segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
        """Marker, start and end of each segment from a place on, to the end of the picture."""
        for _ in range(MAX_PARTS):
            marker = _MARKER.search(data, at)
            if marker is None or data[marker.end() - 1] == _END:
                return
            at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
            yield data[marker.end() - 1], marker.start(), at
        raise InputError(f"a JPEG of more than {MAX_PARTS:,} segments")


_SIZES = {256, 257, 258, 277, 278, 322, 323}
"""Tags of a TIFF from which libtiff knows how large its strips and tiles are."""
_RESOLUTIONS = {282, 283}
_STRIPS = {273, 279, 324, 325}
"""Tags that have a number for each strip or tile."""


def _check_directory(data: bytes) -> None:
    """Raise InputError where a TIFF's first directory is long, or Pillow and libtiff may read it differently.

    What Pillow has read is what :func:`_strip` goes by.
    """
    order, large = "<" if data.startswith(b"II") else ">", data[2] == 43
    entry = struct.Struct(order + ("HHQ8x" if large else "HHL4x"))
    seen = set()
    with suppress(struct.error):  # it is cut off; Pillow says so
        (at,) = struct.unpack_from(order + ("Q" if large else "L"), data, 8 if large else 4)
        (number,) = struct.unpack_from(order + ("Q" if large else "H"), data, at)
        if number > MAX_TAGS or data.startswith(b"MM\0+"):
            raise InputError("a kind of TIFF that is not read: save it as PNG")
        for place in range(number):
            tag, kind, count = entry.unpack_from(data, at + (8 if large else 2) + place * entry.size)
            if tag in _STRIPS and count > MAX_PARTS:
                raise InputError(f"{count:,} strips are more than a TIFF may have ({MAX_PARTS:,})")
            if tag in _SIZES and (kind not in (3, 4) or count > MAX_BANDS or tag in seen):
                raise InputError(f"damaged image: tag {tag} is no size")
            if tag in _RESOLUTIONS and count > 1:  # Pillow makes a fraction of each
                raise InputError(f"damaged image: tag {tag} is no resolution")
            seen.add(tag)


def _strip(image: TiffImagePlugin.TiffImageFile, size: int) -> int:
    """Bytes of a strip or tile that libtiff decodes at a time, of a file of ``size`` bytes; 0 where it has no part.

    Raises InputError where all of them together have more bytes than the file: it would read the same ones for ever.
    """
    if all(tile[0] != "libtiff" for tile in image.tile):
        return 0
    tags = image.tag_v2
    width, height = int(tags[256]), int(tags[257])
    pixels = width * min(int(tags.get(278, height)), height)
    if 322 in tags or 323 in tags:
        pixels = max(pixels, int(tags[322]) * int(tags[323]))
    deep: int = math.ceil(max(tags.get(258, (1,))) / 8) * int(tags.get(277, 1))
    if sum(tags.get(279, ())) + sum(tags.get(325, ())) > 2 * size + 8 * width * height:
        raise InputError("damaged image: its strips are larger than the file")
    return pixels * max(4, deep)


def reducible(data: bytes, least: int) -> bool:
    """Whether :func:`decode` with ``least`` gives another picture than without: a JPEG that is twice as large, or more.

    Only the header is read. False for what is no image.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        with _open(data) as image:
            return _may_be_reduced(image) and min(image.size) >= 2 * least
    except Exception:  # as in decode, which says what is wrong
        return False


def work(data: bytes, most: int) -> int:
    """Estimate from its header the work of decoding an image, as a number of pixels.

    That is width x height or, for a JPEG of several scans, an eighth of the samples that these go over, if that is
    more. 0 for what is refused undecoded, as no image or as one of more than ``most`` pixels.
    """
    try:
        with _failures(), _open(data) as image:
            area = image.width * image.height
            scanned = _Jpeg(data).scanned if image.format in ("JPEG", "MPO") else 0
            return max(area, scanned // 8) if area <= most else 0
    except InputError:  # which decode raises again
        return 0


def _may_be_reduced(image: Image.Image) -> bool:
    return image.format == "JPEG"  # and not MPO: its further frames are not this size


# ---------------------------------------------------------------------------------------------------------- decoding


@turn()
def decode(data: bytes, least: int | None = None, *, most: int | None = None) -> Image.Image:
    """An encoded image to an upright RGB picture of 8 bits a channel.

    EXIF orientation is applied; an animation gives its first frame; transparency is laid on white; 16-bit, 32-bit and
    floating-point greys are scaled to 8 bits rather than clipped. A picture of more than ``WHOLE_PIXELS`` comes at a
    half of its size, or less.

    With ``least``, a JPEG is decoded at a half, a quarter or an eighth of its size, the smallest of which both sides
    have ``least`` pixels, which is several times as fast. ``most`` is the limit of width x height (``None``:
    ``MAX_PIXELS``).

    Raises InputError: not an image of ``FORMATS``, truncated, damaged, more than ``most`` pixels (of the full size), or
    decoding it would take more than ``MAX_MEMORY``, or long.
    """
    with _failures():
        return _decoded(data, least, MAX_PIXELS if most is None else most)


@contextmanager
def _failures() -> Iterator[None]:
    """A block that raises InputError for whatever reading an image raises."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"not an image of a format that is read ({', '.join(formats())}), or damaged") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"refused before decoding: {error}") from error
    except MemoryError:
        raise InputError("does not fit in memory") from None
    except Exception as error:  # decoders raise anything on damaged data: SyntaxError, struct.error, IndexError ...
        raise InputError(f"damaged image: {str(error).strip() or type(error).__name__}") from error


def _decoded(data: bytes, least: int | None, most: int) -> Image.Image:
    with _open(data) as image:
        width, height = image.size
        if width * height > most:
            raise InputError(f"{width} x {height} pixels are more than {most:,}: refused before decoding")
        if _may_be_reduced(image):
            scale = max(1, min(image.size) // least if least else 1)
            while (width // scale) * (height // scale) > WHOLE_PIXELS:
                scale *= 2
            image.draft(None, (max(1, width // scale), max(1, height // scale)))
        needed = _needed(image, data)
        if needed > MAX_MEMORY:
            raise InputError(
                f"{width} x {height} pixels as {image.format} would take {needed / 1e6:,.0f} MB of memory, more than "
                f"{MAX_MEMORY / 1e6:,.0f}: refused before decoding; make it smaller, or save it as JPEG"
            )
        _claim(needed)
        image.load()
        picture, turned = _rgb(_middle(image), _conversion(image)), _turned(image)
    del image  # the picture may be turned where it was
    return _within_aspect(picture if turned is None else picture.transpose(turned))


def _needed(image: Image.Image, data: bytes) -> int:
    """Bytes of an image file, of what its decoder makes of it, and of the upright RGB picture that is made of that."""
    pixels = image.width * image.height
    file, meanwhile = len(data), 0
    decoded = pixels * _pixel(image) + 16 * sum(image.size)  # each row has its place, and decoders hold two
    if image.format in ("JPEG", "MPO"):
        jpeg = _Jpeg(data)
        file, meanwhile = file if jpeg.lean is data else 2 * file, jpeg.held
    elif image.format == "WEBP":  # two copies of the file; the canvas, the one before it, and the frame
        file, decoded, meanwhile = 3 * file, decoded + 8 * pixels, 5 * pixels
    elif image.format == "HEIF":  # the coded picture, and it in colours
        file, meanwhile = 2 * file, 8 * pixels
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        meanwhile = 2 * _strip(image, file)
        if image.tag_v2.get(ExifTags.Base.Orientation, 1) != 1:  # Pillow turns it as soon as it is decoded
            meanwhile = max(meanwhile, decoded)
    if max(image.size) > MAX_ASPECT * min(image.size):
        decoded *= 2  # its middle is a copy
    factor = _factor(image)
    as_it_is = image.format == "JPEG" and image.mode == "RGB" and factor == 1 and _turned(image) is None
    return file + decoded + max(meanwhile, 0 if as_it_is else 4 * pixels // factor**2)


def _pixel(image: Image.Image) -> int:
    """Bytes of a pixel in Pillow's memory."""
    return 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turned(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, by its EXIF orientation; ``None`` where it is, or its EXIF block is damaged."""
    try:
        if len(image.info.get("exif") or b"") > MAX_EXIF:
            return None
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the picture unreadable
        return None


def _middle(image: Image.Image) -> Image.Image:
    """An image without as much at either end as makes it too long, but for one pixel of an odd number of them."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, width - left, height - top)) if left or top else image


def _within_aspect(image: Image.Image) -> Image.Image:
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) <= longest:
        return image
    return image.crop((0, 0, min(image.width, longest), min(image.height, longest)))


def _rgb(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """An image as RGB, made part by part: a copy of all of it in between may be larger than it is."""
    factor = _factor(image)
    if image.mode == "RGB" and "transparency" not in image.info and factor == 1:
        return image
    picture = Image.new("RGB", (math.ceil(image.width / factor), math.ceil(image.height / factor)))
    for left, top, part in _parts(image, factor):
        rgb = convert(part)
        picture.paste(rgb.reduce(factor) if factor > 1 else rgb, (left // factor, top // factor))
    return picture


def _factor(image: Image.Image) -> int:
    """The whole number by which both sides are divided, of a picture that is too large to come whole; 1 of all else."""
    return max(1, math.ceil(math.sqrt(image.width * image.height / WHOLE_PIXELS)))


def _parts(image: Image.Image, factor: int = 1) -> Iterator[tuple[int, int, Image.Image]]:
    """Parts of an image, and where each begins: at multiples of ``factor``."""
    columns = factor * (PART_PIXELS // factor)
    rows = factor * max(1, PART_PIXELS // (factor * min(columns, image.width)))
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            right, bottom = min(left + columns, image.width), min(top + rows, image.height)
            yield left, top, image.crop((left, top, right, bottom))


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of each part of an image."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        full = _full(image)
        return lambda part: Image.fromarray(
            np.clip(_values(part) * (255.0 / full), 0, 255).round().astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white
    return lambda part: part.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _values(image: Image.Image) -> npt.NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _full(image: Image.Image) -> float:
    """White of a deep grey: 0..1, 0..255 and 0..65535 are taken at their scale, wider ranges by their largest value."""
    if image.mode.startswith("I;16"):
        return 65535.0
    largest = max(float(_values(part).max()) for _, _, part in _parts(image))
    if image.mode == "F" and largest <= 1:
        return 1.0
    return next((limit for limit in (255.0, 65535.0) if largest <= limit), largest)


def thumbnail(data: bytes, size: int, *, most: int | None = None) -> bytes:
    """An encoded image as a small JPEG file: upright, RGB, at most ``size`` pixels a side, never enlarged.

    Nothing of the file but its picture is kept: no comment, no EXIF, no profile. ``most`` as for :func:`decode`. Raises
    InputError as :func:`decode`; UsageError where ``size`` is below 1.
    """
    if size < 1:
        raise UsageError(f"size is {size}: a picture has at least 1 pixel a side")
    picture = decode(data, size, most=most)
    picture.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    picture.info = {}
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return buffer.getvalue()
