"""Accept photos as Python objects, such as paths, PIL images, arrays, files, bytes and datasets.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

from retrieval_tip.data.sources import Source, is_web, of_images, read_item, refusal
from retrieval_tip.errors import InputError, UsageError, counted, few, first_line

if TYPE_CHECKING:
    import torch
    from _typeshed import SupportsRead

Array = npt.NDArray[Any]

Picture: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | SupportsRead[bytes] | Image.Image | Array | torch.Tensor | "
    "Mapping[str, object]"
)
"""A photo. This can be a path, an encoded image, an open file, a PIL image, an array or tensor (see above), a row of a
Hugging Face dataset, or a mapping with ``bytes`` and ``path``."""

UNNAMED = "^photo [0-9]+$"
"""Pattern of the names of photos in memory. Two photos with the same name may be different."""


@dataclass(frozen=True)
class Pictures:
    """A source of photos, and a function ``read`` that returns the encoded bytes of a path in it."""

    source: Source
    read: Callable[[str], bytes]

    def labelled(self, label: str | Sequence[str]) -> Pictures:
        """Label the photos, either with one label for all photos or with one label per photo."""
        given = label if isinstance(label, Iterable) else [label]
        labels: list[str] = [given] * len(self.source) if isinstance(given, str) else list(given)
        if wrong := [one for one in labels if not isinstance(one, str)]:
            raise UsageError(f"label: got {wrong[0]!r}; give the name of a class, or one name per photo")
        if len(labels) != len(self.source):
            raise InputError(
                f"labels: got {len(labels)} for {len(self.source)} photos; give one per photo, or one for all"
            )
        items = self.source.items.append_column("label", pa.array(labels, pa.string()))
        return replace(self, source=replace(self.source, items=items, class_names=tuple(dict.fromkeys(labels))))


@dataclass(frozen=True)
class Columns:
    """The columns of a Hugging Face dataset, and the ``names`` of its numeric labels."""

    image: str
    label: str | None
    names: Sequence[object] | None

    @classmethod
    def of(cls, given: Any) -> Columns | None:
        """Find the columns of a dataset by their type, or return ``None`` if ``given`` is not a dataset."""
        if isinstance(given, Mapping) and (parts := [name for name, part in given.items() if _is_hugging_face(part)]):
            raise UsageError(f"dataset: it has several splits; choose one, for example dataset[{parts[0]!r}]")
        if not _is_hugging_face(given):
            return None
        features = given.features
        image, label = _column(features, "Image", "image"), _column(features, "ClassLabel", "label")
        if image is None:
            found = few(list(map(repr, features)))
            raise UsageError(f"dataset: expected one image column, or one called 'image', among {found}")
        return cls(image, label, None if label is None else getattr(features[label], "names", None))


def _is_hugging_face(given: object) -> bool:
    return isinstance(getattr(given, "features", None), Mapping) and hasattr(given, "cast_column")


def _column(features: Mapping[str, object], kind: str, name: str) -> str | None:
    """Return the only column of a type, or else the column called ``name``, if any."""
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    return found[0] if len(found) == 1 else name if name in (found or features) else None


def is_one(given: object) -> bool:
    """Return whether an object is a single photo."""
    if (array := _array(given)) is not None:
        return array.ndim in (2, 3)
    return _is_file(given) or isinstance(given, str | os.PathLike | bytes | bytearray | Image.Image | Mapping)


def features_of(given: object) -> npt.NDArray[np.floating[Any]] | None:
    """Return features as an array of shape ``[q, d]``, or ``None`` if an object is something else, such as a photo."""
    array = _array(given)
    return np.atleast_2d(array) if array is not None and array.dtype.kind == "f" and array.ndim in (1, 2) else None


def _is_file(given: object) -> bool:
    return hasattr(given, "read") and not hasattr(given, "__getitem__")  # as a dataset might have


def _array(given: object) -> Array | None:
    """Return numbers in an array or a torch tensor as an array, and ``None`` for other objects, such as lists."""
    import torch

    if isinstance(given, torch.Tensor):
        tensor = given.detach().cpu()
        given = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return given if isinstance(given, np.ndarray) and given.dtype.kind not in "OSU" else None


def pictures(given: Picture | Iterable[Picture]) -> Pictures:
    """Accept one or several photos in order.

    Photos that have no path are called ``photo 0``, ``photo 1`` and so on. A Hugging Face dataset is read lazily. The
    labels of pairs ``(photo, label)``, such as the items of a torch dataset, are ignored.

    Raises InputError if an object is not a photo. Raises UsageError if ``given`` is neither a photo nor a collection,
    or a dict of splits.
    """
    columns = Columns.of(given)
    if columns is not None and hasattr(given, "__len__"):
        return _stored(given, columns.image)
    held: dict[str, bytes] = {}
    paths: list[str] = []
    for place, picture in enumerate(_each(given)):
        data: object = picture[0] if isinstance(picture, tuple) and len(picture) == 2 else picture
        if isinstance(data, Mapping):  # a row of a Hugging Face dataset
            data = data.get("image" if columns is None else columns.image, data)
        if isinstance(data, Mapping):  # the image in that row, as bytes or a path
            data = data.get("bytes") or data.get("path")
        if data is None:
            raise InputError(f"photo {place}: has no image")
        if isinstance(data, str | os.PathLike):
            paths.append(os.fspath(data))
            if is_web(paths[-1]):
                raise refusal(paths[-1])
            continue
        name = f"photo {place}"
        held[name] = bytes(data) if isinstance(data, bytes | bytearray) else _encoded(data, name)
        paths.append(name)
    return Pictures(of_images(paths), lambda path: held[path] if path in held else read_item(path))


def _each(given: Any) -> Iterable[Any]:
    """Return the items of a collection, such as a torch dataset, which may have no end for ``iter``."""
    if (array := _array(given)) is not None:
        return _uint8(array, "photos") if array.ndim == 4 else [array]
    if is_one(given):
        return [given]
    if (files := _files(given)) is not None:
        return files
    if isinstance(given, Iterable):
        return given
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return (given[place] for place in range(len(given)))
    raise UsageError(
        f"photos: got an object of type {type(given).__name__}; give a path, a PIL image, an array, bytes, or a list "
        "of photos"
    )


def _files(given: Any) -> Sequence[tuple[str, int]] | None:
    """Return the paths and labels of an ImageFolder, unless it has a transform that makes pictures, not tensors."""
    files: Sequence[tuple[str, int]] | None = getattr(given, "samples", None)
    if files and getattr(given, "transform", None) is not None and isinstance(given[0][0], Image.Image):
        return None
    return files


def _stored(dataset: Any, image: str) -> Pictures:
    kind: Any = type(dataset.features[image])
    rows = dataset.with_format(None).cast_column(image, kind(decode=False))
    names = [f"photo {place}" for place in range(len(rows))]
    if names and not (rows[0][image] or {}).get("bytes"):  # a dataset of files, so its photos have paths
        own = [row["path"] if row and not row["bytes"] else None for row in rows[image]]
        names = [path or name for path, name in zip(own, names, strict=True)]
    places = {name: place for place, name in enumerate(names)}

    def read(name: str) -> bytes:
        if name not in places:  # a photo from elsewhere
            return read_item(name)
        row = rows[places[name]][image] or {}
        if row.get("bytes"):
            return bytes(row["bytes"])
        if row.get("path"):
            return read_item(row["path"])
        raise InputError("this row has no image")

    return Pictures(of_images(names), read)


def labelled_pictures(given: Any, labels: Iterable[object] | None = None) -> Pictures:
    """Accept labelled photos, given with separate ``labels``, as pairs ``(photo, label)``, or as a dataset.

    A torch dataset is a sequence of such pairs. A Hugging Face dataset has an image column and a label column. Numeric
    labels are replaced by the ``classes`` or ``ClassLabel`` names of the dataset.

    Raises UsageError if there are no labels. Raises InputError if an object is not a photo, or if a label is missing or
    has no name.
    """
    whole = _whole(given)
    columns = Columns.of(whole)
    names = getattr(whole, "classes", None) if columns is None else columns.names
    if labels is None:
        given, labels = _apart(given, columns)
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise UsageError(f"labels: got {labels!r}; give a list that has the class name of each photo")
    made = pictures(given).labelled([_name(label, names, place) for place, label in enumerate(labels)])
    own = made.source.class_names
    ordered = tuple(name for name in map(str, names or ()) if name in own)
    return made if len(ordered) < len(own) else replace(made, source=replace(made.source, class_names=ordered))


def _whole(given: Any) -> Any:
    """Return the dataset that is behind a ``Subset`` or a ``ConcatDataset`` of torch, and knows the class names."""
    parts = [given.dataset] if hasattr(given, "dataset") else getattr(given, "datasets", [])
    if hasattr(given, "classes") or not parts:
        return given
    found = [_whole(part) for part in parts]
    if len({tuple(getattr(one, "classes", ())) for one in found}) > 1:
        raise UsageError("dataset: its parts have different classes; give one part at a time")
    return found[0]


def _apart(given: Any, columns: Columns | None) -> tuple[Any, Iterable[object]]:
    items = _each(given)
    if columns is not None:
        if columns.label is None:
            raise UsageError("label: missing; give a dataset with one column of class labels, or one called 'label'")
        if hasattr(given, "__len__") and Columns.of(given) == columns:
            return given, given.with_format(None)[columns.label]
        items = ((row[columns.image], row[columns.label]) for row in items)
    items = list(items)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in items):
        raise UsageError("label: missing; give one for all photos, one per photo, or pairs (photo, label)")
    return [pair[0] for pair in items], [pair[1] for pair in items]


def _name(label: object, names: Sequence[object] | None, place: int) -> str:
    if label is None:
        raise InputError(f"photo {place}: it has no label")
    label = label.item() if hasattr(label, "item") else label  # of torch or NumPy
    if names is None or not isinstance(label, Integral):
        return str(label)
    number = int(label)
    if not 0 <= number < len(names):  # Hugging Face uses -1 for "unknown"
        raise InputError(f"photo {place}: label {number} is out of range for {counted(len(names), 'class')}")
    return str(names[number])


def _encoded(picture: object, name: str) -> bytes:
    if _is_file(picture):
        return _read(picture, name)
    if (array := _array(picture)) is not None:
        picture = Image.fromarray(_uint8(_channels_last(array, name), name))
    if not isinstance(picture, Image.Image):
        raise InputError(f"{name}: got a {type(picture).__name__}; expected a path, a PIL image, an array or bytes")
    upright = ImageOps.exif_transpose(picture)
    deep = upright.mode in ("I", "F")  # scaled to 8 bits when decoded
    plain = upright if deep or upright.mode in ("L", "LA", "P", "RGB", "RGBA", "I;16") else upright.convert("RGB")
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
        raise InputError(f"{name}: cannot be read ({first_line(error)}); open the file in binary mode") from None
    return data


def _channels_last(array: Array, name: str) -> Array:
    """Return a photo of shape ``[h, w, c]``, or ``[h, w]`` if it is grey. Raises InputError if it has another shape."""
    shape = array.shape
    axes = [axis for axis, numbers in ((0, (1, 3)), (2, (1, 3, 4))) if array.ndim == 3 and shape[axis] in numbers]
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
    low, high = float(array.min()), float(array.max())
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
