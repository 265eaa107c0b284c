"""Encode photos and class names with one encoder, and keep the results in the encoding cache.

The encoder may join several. They share the picture of each photo. Each of them batches the views that its own scope of
the cache lacks, so a photo that one of them has already encoded costs only the time of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from retrieval_tip.arrays import FloatArray, slices
from retrieval_tip.backbones.base import Backbone, encoders_of, text_side_by_side, view_size
from retrieval_tip.backbones.prompts import prompts_of, text_weights
from retrieval_tip.data import images
from retrieval_tip.data.encoding_cache import EncodingCache

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

CENTRE = "centre/reduced"  # large JPEGs are decoded at a reduced size
TEXT = "text"
REDUCED_SIDES = 3
"""A reduced JPEG's sides are at least this many times the view's. With 2, some cosines were below 0.999."""


@dataclass(frozen=True)
class _Member:
    """One of the encoders in use, the columns of a feature that it makes, and its scope in the encoding cache."""

    backbone: Backbone
    columns: slice
    scope: str


@dataclass
class _Missing:
    """A view that an encoder has to encode.

    ``key`` has the digest of the image and the name of the view, as in the cache. ``feature`` is a view into the
    features of the photo, where the result belongs.
    """

    member: _Member
    key: tuple[str, str]
    feature: FloatArray
    pixels: torch.Tensor = field(init=False)


@dataclass(frozen=True)
class Photo:
    """The digest of a photo, and the raw features of its views, ``[v, d]``, without those of ``missing``."""

    digest: str
    features: FloatArray
    missing: Sequence[_Missing]


class CachedEncoder:
    """An encoder of photos that looks up each view in the encoding cache first, if there is a cache.

    ``size`` is the number of views to encode at a time, by default the best one for the backbone.
    """

    def __init__(self, backbone: Backbone, cache: EncodingCache | None, size: int | None) -> None:
        self.backbone = backbone
        self.size = size or backbone.batch_size
        self._cache = cache
        self._members: list[_Member] = []
        start = 0
        for encoder, in_use in encoders_of(backbone):
            columns = slice(start, start + encoder.dim)
            start = columns.stop
            if in_use:
                scope = f"{encoder.identity.fingerprint}/{encoder.scope}"
                self._members.append(_Member(encoder, columns, scope))

    @property
    def pixels(self) -> int:
        """The number of pixels of one view."""
        sizes = [view_size(member.backbone.identity.preprocess) for member in self._members]
        return sum(height * width for height, width in sizes)

    def load(self, data: bytes, names: Sequence[str]) -> Photo:
        """Look up the views of an image, and decode it for those that are missing. Raises InputError if it cannot."""
        digest = hashlib.sha256(data).hexdigest()
        features = np.zeros((len(names), self.backbone.dim), dtype=np.float32)
        missing = []
        for member in self._members:
            for name, feature in zip(names, features[:, member.columns], strict=True):
                view = _Missing(member, (digest, name), feature)
                cached = None if self._cache is None else self._cache.get(member.scope, *view.key)
                if cached is None:
                    missing.append(view)
                else:
                    feature[:] = cached
        _decode(data, missing)
        return Photo(digest, features, missing)

    def encode(self, photos: Sequence[Photo]) -> int:
        """Fill in the missing features. Return how many the busiest encoder encoded."""
        import torch

        most = 0
        for member in self._members:
            missing = [view for photo in photos for view in photo.missing if view.member is member]
            pixels = {view.key: view.pixels for view in missing}  # equal photos are encoded once
            encoded: dict[tuple[str, str], FloatArray] = {}
            for keys in chunks(list(pixels), self.size):
                batch = torch.stack([pixels[key] for key in keys])
                encoded.update(zip(keys, member.backbone.encode_images(batch), strict=True))
            if self._cache is not None and encoded:
                self._cache.put(member.scope, encoded)
            for view in missing:
                view.feature[:] = encoded[view.key]
            most = max(most, len(encoded))
        return most


def chunks(things: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Cut a sequence into pieces of at most ``size`` items."""
    return [things[part] for part in slices(len(things), size)]


def _decode(data: bytes, views: Sequence[_Missing]) -> None:
    """Set the pixels of views. Only the centre view may be of a reduced image, so the others need another picture."""
    centres = [view for view in views if view.key[1] == CENTRE]
    if centres:
        picture = images.decode(data, max(least_side(view.member.backbone) for view in centres))
        for view in centres:
            view.pixels = view.member.backbone.preprocess(picture)
    crops = [view for view in views if view.key[1] != CENTRE]
    if crops:
        picture = images.decode(data)
        for view in crops:
            view.pixels = view.member.backbone.view(picture, "/".join(view.key))


def least_side(backbone: Backbone) -> int:
    """Return the shortest side of a reduced JPEG for the centre view of a backbone."""
    return REDUCED_SIDES * max(view_size(backbone.identity.preprocess))


def pixels_of(
    data: bytes,
    backbone: Backbone,
    *,
    most: int = images.MAX_PIXELS,
    only: tuple[str, ...] | None = None,
) -> torch.Tensor:
    """Return the centre view of an image as a float32 tensor of shape ``[3, h, w]``. See :func:`images.decode`."""
    return backbone.preprocess(images.decode(data, least_side(backbone), most=most, only=only))


def cached_text_weights(
    backbone: Backbone,
    cache: EncodingCache | None,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> FloatArray:
    """Return the text weights of classes (see :func:`prompts.text_weights`), from the cache if possible.

    Of several encoders, those without text have weights of 0 (see :func:`base.text_side_by_side`).
    """
    weights = []
    for encoder, _ in encoders_of(backbone):
        if encoder.has_text or not backbone.has_text:
            weights.append(_text_weights(encoder, cache, class_names, templates))
        else:
            weights.append(np.zeros((len(class_names), encoder.dim), np.float32))
    return text_side_by_side(weights)


def _text_weights(
    encoder: Backbone,
    cache: EncodingCache | None,
    class_names: Sequence[str],
    templates: Sequence[str],
) -> FloatArray:
    files = encoder.text_key
    if cache is None or files is None:
        return text_weights(encoder, class_names, templates)
    precision = "float32" if encoder.precision == "int8" else encoder.precision
    scope = f"{encoder.identity.fingerprint}/{precision}/{files}"
    keys = {}
    weights = {}
    for name in class_names:
        prompts = json.dumps(prompts_of([name], templates))
        keys[name] = (hashlib.sha256(prompts.encode()).hexdigest(), TEXT)
        cached = cache.get(scope, *keys[name])
        if cached is not None:
            weights[name] = cached
    if missing := [name for name in keys if name not in weights]:
        fresh = dict(zip(missing, text_weights(encoder, missing, templates), strict=True))
        cache.put(scope, {keys[name]: weight for name, weight in fresh.items()})
        weights |= fresh
    return np.stack([weights[name] for name in class_names])
