"""Accept photos as Python objects, such as paths, PIL images, arrays, files and encoded bytes.

The shape and the dtype of a NumPy array or torch tensor decide what it is:

- Floats of shape ``[d]`` or ``[q, d]`` are features, and never photos.
- ``[h, w, c]`` or ``[c, h, w]`` is one photo. It has three channels, or one if it is grey. ``[h, w, 4]`` has alpha.
- ``[b, h, w, c]`` or ``[b, c, h, w]`` is a batch of ``b`` photos.
- ``[h, w]`` of type uint8 is one grey photo.

Pixels are uint8, floats from 0 to 1, or whole floats from 0 to 255. Everything else is refused, including a shape that
fits two ways.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from retrieval_tip.data.sources import Source, is_web, of_images, read_item, refusal
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.wording import first_line

if TYPE_CHECKING:
    import torch
    from _typeshed import SupportsRead

Array = npt.NDArray[Any]

Picture: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | SupportsRead[bytes]"
    "| Image.Image | Array | torch.Tensor"
)
"""A photo. This can be a path, an encoded image, an open file, a PIL image, or an array or tensor (see above)."""

UNNAMED = "^photo [0-9]+$"
"""Pattern of the names of photos in memory. Two photos with the same name may be different."""


def is_one(given: object) -> bool:
    """Return whether an object is a single photo."""
    if (array := _array(given)) is not None:
        return array.ndim in (2, 3)
    return hasattr(given, "read") or isinstance(
        given, str | os.PathLike | bytes | bytearray | Image.Image
    )


def features_of(given: object) -> npt.NDArray[np.floating[Any]] | None:
    """Return features as an array of shape ``[q, d]``, or ``None`` if an object is something else, such as a photo."""
    array = _array(given)
    return (
        np.atleast_2d(array)
        if array is not None and array.dtype.kind == "f" and array.ndim in (1, 2)
        else None
    )


def _array(given: object) -> Array | None:
    """Return numbers in an array or a torch tensor as an array, and ``None`` for other objects, such as lists."""
    import torch

    if isinstance(given, torch.Tensor):
        tensor = given.detach().cpu()
        given = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return given if isinstance(given, np.ndarray) and given.dtype.kind not in "OSU" else None


def open_images(
    images: Picture | Iterable[Picture], labels: str | Iterable[str] | None = None
) -> Source:
    """Open one or several photos as a source, which all functions accept. All of them must be readable.

    Photos that have no path are called ``photo 0``, ``photo 1`` and so on, and are held in memory. ``labels`` is one
    class name for all photos, or an iterable with the class name of each.

    Raises InputError if an object is not a photo, or if the numbers of photos and labels differ. Raises UsageError if
    ``images`` is neither a photo nor a collection of photos, or if a label is not text.
    """
    held: dict[str, bytes] = {}
    paths: list[str] = []
    for place, picture in enumerate(_each(images)):
        if isinstance(picture, str | os.PathLike):
            path = os.fspath(picture)
            if is_web(path):
                raise refusal(path)
        else:
            path = f"photo {place}"
            held[path] = (
                bytes(picture)
                if isinstance(picture, bytes | bytearray)
                else _encoded(picture, path)
            )
        paths.append(path)
    source = of_images(paths, labels=None if labels is None else _names(labels, len(paths)))
    return replace(
        source, load=lambda path: held[path] if path in held else read_item(path), strict=True
    )


def _each(given: Any) -> Iterable[Any]:
    if (array := _array(given)) is not None:
        return _uint8(array, "photos") if array.ndim == 4 else [array]
    if is_one(given):
        return [given]
    if isinstance(given, Iterable) and not isinstance(given, Mapping):
        return given
    raise UsageError(
        f"photos: got an object of type {type(given).__name__}; give a path, a PIL image, an array, bytes, or a list "
        "of photos"
    )


def _names(labels: str | Iterable[str], number: int) -> list[str]:
    """Return the labels of ``number`` photos."""
    given = (
        list(labels)
        if isinstance(labels, Iterable) and not isinstance(labels, str)
        else [labels] * number
    )
    if wrong := [label for label in given if not isinstance(label, str)]:
        raise UsageError(
            f"labels: got {wrong[0]!r}; give the name of a class, or one name per photo"
        )
    if len(given) != number:
        raise InputError(
            f"labels: got {len(given)} for {number} photos; give one per photo, or one for all"
        )
    return given


def _encoded(picture: object, name: str) -> bytes:
    if hasattr(picture, "read"):
        return _read(picture, name)
    if (array := _array(picture)) is not None:
        picture = Image.fromarray(_uint8(_channels_last(array, name), name))
    if not isinstance(picture, Image.Image):
        raise InputError(
            f"{name}: got a {type(picture).__name__}; expected a path, a PIL image, an array or bytes"
        )
    upright = ImageOps.exif_transpose(picture)
    deep = upright.mode in ("I", "F")  # scaled to 8 bits when decoded
    plain = (
        upright
        if deep or upright.mode in ("L", "LA", "P", "RGB", "RGBA", "I;16")
        else upright.convert("RGB")
    )
    buffer = io.BytesIO()
    plain.save(buffer, "TIFF" if deep else "PNG", compress_level=0)
    return buffer.getvalue()


def _read(file: Any, name: str) -> bytes:
    """Return the whole contents of an open file, from its start if it has one, as Pillow does."""
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        data = file.read()
        if not isinstance(data, bytes):
            raise TypeError(f"read() returned a {type(data).__name__}")
    except Exception as error:  # any object can have a method ``read``
        raise InputError(
            f"{name}: cannot be read ({first_line(error)}); open the file in binary mode"
        ) from None
    return data


def _channels_last(array: Array, name: str) -> Array:
    """Return a photo of shape ``[h, w, c]``, or ``[h, w]`` if it is grey. Raises InputError if it has another shape."""
    shape = array.shape
    axes = [
        axis
        for axis, numbers in ((0, (1, 3)), (2, (1, 3, 4)))
        if array.ndim == 3 and shape[axis] in numbers
    ]
    grey = array.ndim == 2 and array.dtype.kind != "f"
    if not array.size or not (grey or len(axes) == 1):
        raise InputError(
            f"{name}: {array.dtype} of shape {shape}; expected [h, w, 3] or [3, h, w], with 1 instead of 3 for grey; "
            "a batch is [b, h, w, 3] or [b, 3, h, w]"
        )
    last = array if grey else np.moveaxis(array, axes[0], 2)
    return last[..., 0] if last.shape[2:] == (1,) else last


def _uint8(array: Array, name: str) -> npt.NDArray[np.uint8]:
    """Return pixels as uint8. Raises InputError if they are not uint8, floats from 0 to 1, or whole floats to 255."""
    if array.dtype == np.uint8 or not array.size:
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind != "f":
        raise InputError(f"{name}: {array.dtype} pixels; give uint8, or floats from 0 to 1")
    low = float(array.min())
    high = float(array.max())
    if not np.isfinite([low, high]).all():
        raise InputError(f"{name}: contains NaN or infinity")
    scaled = round(255 * low) >= 0 and round(255 * high) <= 255
    if not scaled and not (low >= 0 and high <= 255 and (array == np.rint(array)).all()):
        raise InputError(
            f"{name}: values from {low:.3g} to {high:.4g}; give the pixels before normalisation, as uint8 or as floats "
            "from 0 to 1"
        )
    pixels: npt.NDArray[np.uint8] = np.rint(255 * array if scaled else array).astype(np.uint8)
    return pixels
