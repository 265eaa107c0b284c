"""What a backbone is: something that turns pictures, and where it can sentences, into features."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import BackboneError, InputError, UsageError, warn_once
from retrieval_tip.settings import Precision, Runtime, check_choice

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from PIL import Image

PARTS = ("visual", "text")

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Identity:
    """Which backbone made a feature, enough to refuse another one.

    ``model`` and ``pretrained`` say how to load it; ``weights`` (digest over every tensor), ``config`` (digest of the
    architecture) and ``preprocess`` say what it is. The same weights from a tag and from a file are the same backbone.
    """

    model: str
    pretrained: str | None
    weights: str
    config: str
    preprocess: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that agree exactly where features can be compared."""
        what = {"weights": self.weights, "config": self.config, "preprocess": dict(self.preprocess)}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.model}{f'/{self.pretrained}' if self.pretrained else ''} ({self.fingerprint})"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in manifests and feature tables."""
        return asdict(self) | {"preprocess": dict(self.preprocess), "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, data: object) -> Identity:
        """The inverse of :meth:`to_dict`. Raises BackboneError where a part is missing or of the wrong type."""
        if not isinstance(data, Mapping):
            raise BackboneError("backbone: not an object")
        kinds = {"model": str, "pretrained": (str, type(None)), "weights": str, "config": str, "preprocess": Mapping}
        for key, kind in kinds.items():
            if not isinstance(data.get(key), kind):  # type: ignore[arg-type]  # a type or a tuple of types
                raise BackboneError(f"backbone: {key} is missing or of the wrong type")
        return cls(**{key: data[key] for key in kinds})


def view_size(preprocess: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a view, of what an identity says of how pictures are prepared."""
    size = preprocess["size"]
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


class Backbone(Protocol):
    """An image encoder, with a text encoder beside it or without, as who only needs its features sees it."""

    @property
    def identity(self) -> Identity:
        """Which one it is."""

    @property
    def dim(self) -> int:
        """Length ``d`` of its features."""

    @property
    def has_text(self) -> bool:
        """Whether it encodes sentences too; without, the photographs alone tell the classes apart."""

    @property
    def logit_scale(self) -> float:
        """Factor of the zero-shot logits (100 for OpenAI's CLIP)."""

    @property
    def precision(self) -> str:
        """``float32``, or the autocast dtype: part of what an encoding is cached under."""

    @property
    def batch_size(self) -> int:
        """How many views it encodes best at a time, on the device that it is on."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """An RGB picture as the model's own centre view, ``[3, h, w]`` float32."""

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        """An augmented view, ``[3, h, w]`` float32; the same picture and seed give the same view."""

    def encode_images(self, pixels: torch.Tensor) -> FloatArray:
        """Raw features ``[b, d]`` of views ``[b, 3, h, w]``: not normalised, so that views can be averaged first."""

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Raw features ``[t, d]`` of sentences. Raises UsageError where there is no text encoder."""


class Trainable(Backbone, Protocol):
    """A backbone whose towers, ``visual`` and ``text``, can be trained and stored apart from their base.

    Every method that takes parts raises UsageError for another name.
    """

    def copy_to_train(self) -> Trainable:
        """A copy, in a precision in which small gradients do not vanish."""

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        """The parameters of one tower, in the model's order; the logit scale and bias belong to neither."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a view."""

    @property
    def image_encoder(self) -> torch.nn.Module:
        """Its image tower as a module, ``[b, 3, h, w]`` to raw features ``[b, d]``, on the backbone's device."""

    def training(self, parts: Sequence[str]) -> AbstractContextManager[list[torch.nn.Parameter]]:
        """Within it, the parameters of ``parts``, which it gives, take gradients; behind it, none does."""

    def forward_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw features ``[b, d]`` float32 of views ``[b, 3, h, w]``, on the backbone's device, with gradient."""

    def forward_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Raw features ``[t, d]`` float32 of sentences, on the backbone's device, with gradient."""

    def tuned(self, parts: Sequence[str]) -> dict[str, torch.Tensor]:
        """A copy of every tensor of ``parts`` by its name in the model, contiguous and on the CPU."""

    def adopt(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors of whole towers, as :meth:`tuned` gives them, in place of the model's own.

        The backbone is then another one: its identity follows its weights. Raises BackboneError naming the tensor
        that is unknown, missing, or of another shape or type; then nothing was changed.
        """


def unit(features: FloatArray, what: str = "feature") -> FloatArray:
    """Rows scaled to length 1, ``[m, d]`` float32: the one place where features are normalised.

    Raises InputError naming the row where a feature is zero or not finite.
    """
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if bad.size:
        raise InputError(f"{what} {int(bad[0])}: zero or not finite, so it has no direction")
    scaled: FloatArray = (features / norms).astype(np.float32)
    return scaled


def resolve_device(device: str = "auto") -> str:
    """``auto`` to ``cuda`` where there is a GPU that torch can use, else ``cpu``.

    A GPU that ``auto`` passes over is told of in a warning, once. Raises UsageError for a device that is not here.
    """
    import torch

    if device == "auto":
        problem = _unusable()
        if problem:
            warn_once(f"{problem}; the CPU is used in its place (see doctor)")
        return "cpu" if problem is not None else "cuda"
    if device == "cpu":
        return device
    if device == "cuda" or device.startswith("cuda:"):
        if not torch.cuda.is_available():
            raise UsageError(f"device {device!r}: torch finds no CUDA GPU; use --device auto or cpu (see doctor)")
        number = device[5:]
        if device != "cuda" and not (number.isdecimal() and int(number) < torch.cuda.device_count()):
            raise UsageError(f"device {device!r}: there are {torch.cuda.device_count()} GPUs")
        return device
    raise UsageError(f"device {device!r}: expected auto, cpu or cuda")


def _unusable() -> str | None:
    """Why torch cannot use a GPU: empty where there is none, ``None`` where it can."""
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
            return ""
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        return f"there is a GPU, but torch, built for {build}, does not find it: its driver may be too old"
    major, minor = torch.cuda.get_device_capability()
    built = [re.fullmatch(r"(sm|compute)_([0-9]+)([0-9])[a-z]?", arch) for arch in torch.cuda.get_arch_list()]
    known = [(kind, int(m), int(n)) for kind, m, n in (match.groups() for match in built if match)]
    runs = any((major == m and minor >= n) if kind == "sm" else (major, minor) >= (m, n) for kind, m, n in known)
    if known and not runs:
        return f"there is a GPU (sm_{major}{minor}), but torch was not built for it"
    return None


@dataclass(frozen=True)
class Execution:
    """How a backbone runs: its ``device``, its ``precision``, and the ``runtime`` that encodes images on a CPU."""

    device: str = "auto"
    precision: Precision = "auto"
    runtime: Runtime = "auto"

    def resolved(self) -> Execution:
        """With device and precision as what ``auto`` stands for. Raises UsageError for what there is not."""
        device = resolve_device(self.device)
        check_choice("precision", self.precision, Precision)
        check_choice("runtime", self.runtime, Runtime)
        automatic: Precision = "float32" if device == "cpu" else "float16"
        return replace(self, device=device, precision=automatic if self.precision == "auto" else self.precision)
