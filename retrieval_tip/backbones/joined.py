"""Several encoders as one. A joined feature has the unit feature of each encoder, side by side.

The parts are scaled by ``1 / sqrt(e)`` for ``e`` encoders, so that a joined feature has norm 1. How much each encoder
counts is part of the fit (see :mod:`fit.shares`), so features and keys do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import (
    Backbone,
    Identity,
    completed,
    text_side_by_side,
    unit,
    view_size,
)
from retrieval_tip.errors import UsageError

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Joined(Backbone):
    """A :class:`base.Backbone` that joins ``parts``. A part that is not ``used`` encodes nothing and is 0.

    Pixels have shape ``[b, p]``, with the views of all used parts one after the other. The logit scale is the mean
    over the encoders with text.
    """

    def __init__(self, parts: Sequence[Backbone], used: Sequence[bool] | None = None) -> None:
        """Join backbones. Raises UsageError if one of them occurs twice."""
        self.parts = tuple(map(completed, parts))
        self.used = tuple(used or [True] * len(parts))
        self.identity = Identity.joined([part.identity for part in parts])
        if len({part.identity.fingerprint for part in parts}) < len(parts):
            packages = [part.identity.package for part in parts if part.identity.package]
            remedy = f"; or {packages[0]} gives two models one digest" if packages else ""
            raise UsageError(f"model {self.identity.model}: names an encoder twice{remedy}")
        self.dim = sum(part.dim for part in parts)
        self.has_text = any(part.has_text for part in parts)
        self.logit_scale = float(
            np.mean([part.logit_scale for part in parts if part.has_text] or [100.0])
        )
        self.precision = ", ".join(dict.fromkeys(part.precision for part in parts))

    @property
    def batch_size(self) -> int:
        return min(part.batch_size for part in self.parts)

    def encoders(self) -> list[tuple[Backbone, bool]]:
        return list(zip(self.parts, self.used, strict=True))

    def only(self, shares: Sequence[float]) -> Joined:
        """Return the same backbone, which does not use the parts whose share is 0."""
        return Joined(self.parts, [share > 0 for share in shares])

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        import torch

        return torch.cat([part.preprocess(image).flatten() for part in self._in_use()])

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        import torch

        return torch.cat([part.view(image, seed).flatten() for part in self._in_use()])

    def views(self, pixels: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the views ``[b, 3, h, w]`` for each part, or ``None`` for a part that is not used."""
        sizes = [(3, *view_size(part.identity.preprocess)) for part in self._in_use()]
        views = iter(pixels.split([int(np.prod(size)) for size in sizes], dim=1))
        shapes = iter(sizes)
        return [next(views).unflatten(1, next(shapes)) if used else None for used in self.used]

    def encode_images(self, pixels: torch.Tensor) -> FloatArray:
        raw = [
            np.zeros((len(pixels), part.dim), dtype=np.float32)
            if view is None
            else part.encode_images(view)
            for part, view in zip(self.parts, self.views(pixels), strict=True)
        ]
        return np.concatenate(raw, axis=1)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        if not self.has_text:
            raise UsageError(
                f"{self.identity.model}: has no text encoder; omit prompts and templates"
            )
        empty = [np.zeros((len(texts), part.dim), dtype=np.float32) for part in self.parts]
        pairs = zip(self.parts, empty, strict=True)
        return text_side_by_side(
            [unit(part.encode_texts(texts)) if part.has_text else zero for part, zero in pairs]
        )

    def _in_use(self) -> list[Backbone]:
        return [part for part, used in zip(self.parts, self.used, strict=True) if used]
