"""Photographs as people hold them: paths, PIL pictures, arrays, bytes, datasets of torch and of Hugging Face."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from retrieval_tip.data.sources import Source, of_images, read_item
from retrieval_tip.errors import InputError, UsageError

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, Any] | Mapping[str, Any]
"""A path; an encoded image; a PIL picture; an array ``[h, w]`` or ``[h, w, 3]`` uint8; Hugging Face's ``bytes`` and
``path``."""


@dataclass(frozen=True)
class Pictures:
    """Photographs as a source, and ``read``, which gives the encoded bytes of each by its path in the source."""

    source: Source
    read: Callable[[str], bytes]

    def labelled(self, label: str | Sequence[str]) -> Pictures:
        """The same photographs, all of one class, or each of its own. Raises InputError where these are not as many."""
        labels = [label] * len(self.source) if isinstance(label, str) else list(label)
        if len(labels) != len(self.source):
            raise InputError(f"labels: {len(labels)} for {len(self.source)} pictures; give one each, or one for all")
        items = self.source.items.append_column("label", pa.array(labels, pa.string()))
        return replace(self, source=replace(self.source, items=items, class_names=tuple(dict.fromkeys(labels))))


def is_one(given: object) -> bool:
    """Whether something is a picture, and not several."""
    if isinstance(given, np.ndarray):
        return given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))
    return isinstance(given, str | os.PathLike | bytes | Image.Image | Mapping)


def pictures(given: Picture | Iterable[Picture]) -> Pictures:
    """Photographs, one or several, in their order. What has no path is called ``picture 0``, ``picture 1`` ...

    Raises InputError for what is none.
    """
    held: dict[str, bytes] = {}
    paths: list[str] = []
    for place, picture in enumerate([given] if is_one(given) else given):  # type: ignore[arg-type]
        data: object = picture
        if isinstance(picture, Mapping):  # Hugging Face's; without bytes it stayed on disk
            data = picture.get("bytes") or picture.get("path")
        if isinstance(data, str | os.PathLike):
            paths.append(os.fspath(data))
            continue
        name = f"picture {place}"
        held[name] = data if isinstance(data, bytes) else _encoded(data, name)
        paths.append(name)
    return Pictures(of_images(paths), lambda path: held[path] if path in held else read_item(path))


def labelled_pictures(given: Any, labels: Iterable[Any] | None = None) -> Pictures:
    """Photographs with a label each, in their order: with ``labels`` beside them, or as pairs ``(picture, label)``.

    A dataset of torch is a sequence of such pairs; a label that is a number is the name that its ``classes`` has there
    (or those of the dataset that it is a part of), else the number's digits. Raises UsageError where labels are
    missing, InputError for what is no picture.
    """
    whole = given
    while not hasattr(whole, "classes") and hasattr(whole, "dataset"):
        whole = whole.dataset
    names = getattr(whole, "classes", None)
    if labels is None:
        items: Any = [given] if is_one(given) else getattr(given, "samples", given)  # of an ImageFolder: paths
        items = [items[i] for i in range(len(items))] if hasattr(items, "__getitem__") else list(items)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in items):
            raise UsageError("label: missing; give one for all photographs, one each, or pairs of photograph and label")
        given, labels = [pair[0] for pair in items], [pair[1] for pair in items]
    own = [str(names[i] if names is not None and isinstance(i, Integral) else i) for i in labels]
    made = pictures(given).labelled(own)
    ordered = tuple(name for name in map(str, names or ()) if name in made.source.class_names)
    return (
        made
        if len(ordered) < len(made.source.class_names)
        else replace(made, source=replace(made.source, class_names=ordered))
    )


def _encoded(picture: object, name: str) -> bytes:
    """A picture as an image file, without loss."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not is_one(picture):
            raise InputError(f"{name}: {picture.dtype} of shape {picture.shape}; a picture is [h, w, 3] uint8")
        picture = Image.fromarray(picture.squeeze())
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        way_out = "; a dataset gives pictures where it has no transform" if kind == "Tensor" else ""
        raise InputError(f"{name}: {kind}; expected a path, a PIL picture, an array or bytes{way_out}")
    upright = ImageOps.exif_transpose(picture)
    plain = upright if upright.mode in ("L", "LA", "P", "RGB", "RGBA", "I;16") else upright.convert("RGB")
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
