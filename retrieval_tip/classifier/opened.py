"""An open index with its encoder, and what all methods of a classifier share."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.backbones.loading import load_backbone, load_when_needed
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.pictures import labelled_pictures
from retrieval_tip.data.sources import Source, open_source
from retrieval_tip.data.tables import check_backbone
from retrieval_tip.errors import UsageError
from retrieval_tip.index import places
from retrieval_tip.index.addresses import plug_of
from retrieval_tip.index.places import Place
from retrieval_tip.model import Index
from retrieval_tip.settings import Precision

if TYPE_CHECKING:
    Loaded = tuple[Any, Any, Any]
    """A model, its preprocessing and its tokenizer, as open_clip returns them."""


class TemporaryIndex:
    """A place for an index, which is deleted together with this object."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="retrieval-tip-")
        self.place = Path(folder) / "index"
        self.delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


class OpenIndex:
    """An index and its encoder. This is the base class of :class:`classifier.Classifier`."""

    _temporary: TemporaryIndex | None = None

    def __init__(self, cache: Index, encoder: Encoder) -> None:
        self.cache, self.encoder = cache, encoder

    @classmethod
    def load(
        cls,
        place: str | os.PathLike[str],
        model: str | Backbone | Loaded | None = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> Self:
        """Open an index folder or a LanceDB store (``lance://``, ``s3://`` or ``gs://``), and load its encoder.

        If the encoder of the index cannot be loaded by its name, pass it as ``model``, as for ``from_folder``. If the
        index was built from features of an unnamed encoder, it can only classify features.

        Raises:
            StoreError: if the index is missing or damaged.
            BackboneError: if the encoder cannot be loaded, or if ``model`` is not the encoder of the index.
        """
        cache = places.at(check_place("place", place)).load(device=device)
        own = _own_backbone(cache, device, precision) if model is None else None
        backbone = given_backbone(model, None, device, precision) if own is None and model is not None else own
        check_backbone(cache.backbone, cache.d, backbone, [])
        return cls(cache, Encoder(backbone, cache=EncodingCache.at(None)))

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return list(self.cache.class_names)

    @property
    def classes_(self) -> npt.NDArray[np.str_]:
        """The class names as an array, as in scikit-learn."""
        return np.array(self.cache.class_names)

    def __len__(self) -> int:
        """Number of keys."""
        return self.cache.n

    def __repr__(self) -> str:
        backbone = self.cache.backbone.model if self.cache.backbone else "features of an unnamed backbone"
        place = self._saved_at() or "not saved"
        return f"Classifier({self.cache.n} photos, {len(self.classes)} classes, {backbone}, {place})"

    def _repr_html_(self) -> str:
        return self.cache._repr_html_()

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return the whole index, so that a pickle needs neither its folder nor its store."""
        return {"cache": self.cache.in_memory(), "encoder": self.encoder}

    def _saved_at(self) -> str | None:
        return None if self._temporary is not None else self.cache.place

    def _place(self) -> str:
        """Return the place of the index. If it has none, write it to a temporary folder."""
        if self.cache.place is None:
            self._temporary = self._temporary or TemporaryIndex()
            self.cache.save(self._temporary.place)
        assert self.cache.place is not None
        return self.cache.place

    def _folder(self) -> Path:
        """Return the folder of the index. Raises UsageError if it is in another kind of store."""
        place = self._place()
        if plug_of(place) is not None:
            raise UsageError(f"{place}: this needs an index in a folder; copy it with save(FOLDER)")
        return Path(place)

    def _use(self, cache: Index) -> None:
        """Use another version of the index, and the encoder that belongs to it."""
        if cache.backbone != self.cache.backbone:
            self.encoder = replace(self.encoder, backbone=_own_backbone(cache, cache.device))
        self.cache = cache

    def _labelled(self, given: Any, part: str, *, strict: bool = False) -> tuple[Source, Encoder]:
        """Open labelled photos of any kind, and return them with an encoder that reads them.

        If a source has several parts, ``part`` is used. With ``strict``, photos in memory must all be readable.
        """
        if isinstance(given, Source):
            return given, self.encoder
        if isinstance(given, str | os.PathLike):
            return open_source(given, split=part), self.encoder
        own = labelled_pictures(given)
        return own.source, replace(self.encoder, read=own.read, strict=strict)


def given_backbone(
    model: str | Backbone | Loaded | None, pretrained: str | None, device: str, precision: Precision = "auto"
) -> Backbone:
    """Return the backbone that a user names or passes. Raises UsageError if ``model`` is neither."""
    if model is None or isinstance(model, str):
        return load_backbone(model, pretrained, device=device, precision=precision, lazy=True)
    if isinstance(model, tuple):
        from retrieval_tip.backbones.open_clip import OpenClipBackbone

        if len(model) != 3:
            raise UsageError(f"model: got {len(model)} objects; give (model, preprocess, tokenizer), as open_clip does")
        return OpenClipBackbone.of(*model)
    if not hasattr(model, "encode_images"):
        kind = type(model).__name__
        raise UsageError(f"model: got an object of type {kind}; give a name, a backbone, or a tuple from open_clip")
    return model


def check_place(name: str, given: object) -> Place:
    """Return a path or an address. Raises UsageError if an object is neither."""
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"{name}: got an object of type {type(given).__name__}; give a path")
    return given


def _own_backbone(cache: Index, device: str, precision: Precision = "auto") -> Backbone | None:
    identity = cache.backbone
    return None if identity is None else load_when_needed(identity, cache.d, device=device, precision=precision)
