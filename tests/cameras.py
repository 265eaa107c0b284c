"""Photos with the metadata of a camera."""

from __future__ import annotations

import io

from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

AT = ExifTags.Base.DateTimeOriginal
GPS = ExifTags.GPS


def encoded(times=None, gps=None, style="JPEG", image=None):
    """Return a photo with these EXIF values."""
    exif = Image.Exif()
    if times is not None:
        exif.get_ifd(ExifTags.IFD.Exif)[AT] = times
    if gps is not None:
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps)
    file = io.BytesIO()
    (image or Image.new("RGB", (8, 8))).save(file, style, exif=exif)
    return file.getvalue()


def gps_of(latitude, longitude):
    def parts(degrees):
        minutes, seconds = divmod(round(degrees * 3600 * 10**4), 60 * 10**4)
        return *divmod(minutes, 60), IFDRational(seconds, 10**4)

    return {
        GPS.GPSLatitudeRef: "NS"[latitude < 0],
        GPS.GPSLatitude: parts(abs(latitude)),
        GPS.GPSLongitudeRef: "EW"[longitude < 0],
        GPS.GPSLongitude: parts(abs(longitude)),
    }
