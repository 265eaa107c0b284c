"""Read when and where photos were taken, from their EXIF metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
from PIL import ExifTags, Image

from retrieval_tip.data import images
from retrieval_tip.data.source import Source, read_item
from retrieval_tip.wording import show


class Taken(NamedTuple):
    """When and where a photo was taken. Unknown values are ``None``.

    ``taken_at`` is the local time of the camera, without a time zone. ``latitude`` and ``longitude`` are in degrees.
    """

    taken_at: datetime | None = None
    latitude: float | None = None
    longitude: float | None = None


EXIF = {"taken_at": pa.timestamp("s"), "latitude": pa.float64(), "longitude": pa.float64()}
"""The columns with the fields of :class:`Taken`."""
UNKNOWN = Taken()


def taken(data: bytes) -> Taken:
    """Return when and where a photo was taken.

    The time is ``DateTimeOriginal``. Damaged or implausible metadata count as unknown, as do metadata that follow the
    pixels (in PNG) or are not in an EXIF block (in TIFF).
    """
    try:
        with images.opened(data) as image:
            block = image.info.get("exif")
        if not isinstance(block, bytes) or len(block) > images.MAX_EXIF:
            return UNKNOWN
        exif = Image.Exif()
        exif.load(block)
        at = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
    except Exception:  # Pillow raises many types of errors on damaged metadata
        return UNKNOWN
    latitude = _degrees(
        gps.get(ExifTags.GPS.GPSLatitude), gps.get(ExifTags.GPS.GPSLatitudeRef), "NS", 90
    )
    longitude = _degrees(
        gps.get(ExifTags.GPS.GPSLongitude), gps.get(ExifTags.GPS.GPSLongitudeRef), "EW", 180
    )
    place = (None, None) if latitude is None or longitude is None else (latitude, longitude)
    with suppress(ValueError):
        return Taken(datetime.strptime(str(at).strip("\0 "), "%Y:%m:%d %H:%M:%S"), *place)
    return Taken(None, *place)


def _degrees(parts: object, side: object, sides: str, most: int) -> float | None:
    """Convert degrees, minutes and seconds. ``sides`` contains the letters of the positive and the negative side."""
    if not isinstance(parts, tuple):
        return None
    try:
        degrees = sum(
            float(part) / scale for scale, part in zip((1.0, 60.0, 3600.0), parts, strict=True)
        )
    except (TypeError, ValueError, ArithmeticError):
        return None
    letter = str(side).strip("\0 ").upper()
    if not math.isfinite(degrees) or not 0 <= degrees <= most or letter not in tuple(sides):
        return None
    return -degrees if letter == sides[1] else degrees


@dataclass
class ExifRecorder:
    """A function that reads a photo, and notes in ``taken`` when and where it was taken, by its name.

    If a name is one of ``boxes``, it returns this part of a photo, which is given by its path and by the edges of the
    box (see :func:`images.crop`). Photos are read with ``load``, which is that of their source.
    """

    boxes: Mapping[str, tuple[str, images.Box]] = field(default_factory=dict)
    taken: dict[str, Taken] = field(default_factory=dict)
    load: Callable[[str], bytes] = read_item

    def over(self, sources: Sequence[Source]) -> list[Source]:
        """Return the sources with recorders around their ``load``, which share ``boxes`` and ``taken``."""
        return [replace(source, load=replace(self, load=source.load)) for source in sources]

    def __call__(self, path: str) -> bytes:
        """Return the bytes of a photo or its part."""
        data = self.note(path)
        (_, box) = self.boxes.get(path, (path, None))
        return data if box is None else images.crop(data, box)

    def note(self, path: str) -> bytes:
        """Return the bytes of the whole photo."""
        data = self.load(self.boxes.get(path, (path, None))[0])
        self.taken[show(path)] = taken(data)
        return data

    def columns(self, names: Sequence[str]) -> dict[str, pa.Array]:
        """Return the columns of :data:`EXIF` for photos. Other names, such as the ids of features, get nulls."""
        fields = zip(*(self.taken.get(name, UNKNOWN) for name in names), strict=True)
        return {
            name: pa.array(values, kind)
            for (name, kind), values in zip(EXIF.items(), fields, strict=True)
        }
