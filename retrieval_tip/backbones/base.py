"""The interface of backbones, which encode images (and sentences, if they have a text tower) as features."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.errors import BackboneError, InputError, UsageError, warn_once
from retrieval_tip.settings import Precision, check_choice
from retrieval_tip.wording import counted

if TYPE_CHECKING:
    import torch
    from PIL import Image

Preprocess = Mapping[str, Any]  # JSON preprocessing settings, named as in open_clip or timm
PACKAGE = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
"""A name of a distribution. A message tells the user to install it, so it must not be an option of pip."""


def digest_of(value: object, *, sort_keys: bool = False) -> str:
    """Return the SHA-256 of a value in JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """The identity of a backbone.

    ``model`` and ``pretrained`` are only used to load the backbone. The fingerprint is computed from ``weights`` (a
    digest of every tensor), ``config`` (a digest of the architecture) and ``preprocess``. If several backbones are
    joined, ``parts`` has the identity of each, and the fingerprint is computed from theirs. ``package`` is the name of
    the distribution that made the backbone, unless that is ours. It is only used in messages.
    """

    model: str
    pretrained: str | None
    weights: str
    config: str
    preprocess: Preprocess
    parts: tuple[Identity, ...] = ()
    package: str | None = None

    @classmethod
    def joined(cls, parts: Sequence[Identity]) -> Identity:
        """Return the identity of several backbones whose features are side by side (see :mod:`joined`)."""
        name = "+".join(spelled(part.model, part.pretrained) for part in parts)
        sizes = [view_size(part.preprocess) for part in parts]
        return cls(
            name,
            None,
            "",
            "",
            {"size": [max(sides) for sides in zip(*sizes, strict=True)]},
            tuple(parts),
        )

    @property
    def fingerprint(self) -> str:
        """A hash of sixteen hex digits, equal for two backbones if and only if their features are comparable."""
        what: dict[str, object] = {"parts": [part.fingerprint for part in self.parts]}
        if not self.parts:
            what = {
                "weights": self.weights,
                "config": self.config,
                "preprocess": dict(self.preprocess),
            }
        return digest_of(what, sort_keys=True)[:16]

    def __str__(self) -> str:
        name = f"{self.model}/{self.pretrained}" if self.pretrained else self.model
        return f"{name} ({self.fingerprint})"

    def to_dict(self) -> dict[str, object]:
        """Return the identity as it is stored in manifests and feature tables."""
        whole = asdict(self, dict_factory=without_package) | {
            "preprocess": dict(self.preprocess),
            "fingerprint": self.fingerprint,
        }
        return {name: value for name, value in whole.items() if name != "parts" or value}

    @classmethod
    def from_dict(cls, data: object) -> Identity:
        """Read an identity written by :meth:`to_dict`. Raises BackboneError if a key is missing or has a wrong type."""
        if not isinstance(data, Mapping):
            raise BackboneError("backbone: not an object")
        kinds = {
            "model": str,
            "pretrained": (str, type(None)),
            "weights": str,
            "config": str,
            "preprocess": Mapping,
            "package": (str, type(None)),
        }
        for key, kind in kinds.items():
            if not isinstance(data.get(key), kind):  # type: ignore[arg-type]  # a type or a tuple of types
                raise BackboneError(f"backbone: {key} is missing or has the wrong type")
        own: dict[str, Any] = {key: data.get(key) for key in kinds}
        if own["package"] is not None and not re.fullmatch(PACKAGE, own["package"]):
            raise BackboneError("backbone: package is not the name of a package")
        return cls(**own, parts=tuple(map(cls.from_dict, data.get("parts") or ())))


def without_package(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the items of a record, without the name of a package if it is not known."""
    return {name: value for name, value in items if name != "package" or value}


@dataclass(frozen=True)
class Part:
    """The part of a feature that one of several encoders makes: its number of values, and its column in tables."""

    width: int
    column: str
    identity: Identity | None = None

    @property
    def names(self) -> list[str]:
        """The names of its encoder, or of its column if the encoder is not known."""
        if (own := self.identity) is None:
            return [self.column]
        return list(dict.fromkeys([own.model, spelled(own.model, own.pretrained)]))


def width_of(parts: Sequence[Part]) -> int:
    """Return the number of values of a feature that has these parts."""
    return sum(part.width for part in parts)


def spelled(model: str | None, pretrained: str | None) -> str:
    """Return the name of an encoder as ``--model`` accepts it: ``model@pretrained``, or ``model`` alone."""
    return "@".join(filter(None, (model, pretrained)))


def equal_shares(parts: Sequence[Part]) -> tuple[float, ...]:
    """Return the shares of encoders that all count equally."""
    return (1 / max(1, len(parts)),) * len(parts)


def same_backbone(one: Identity | None, other: Identity | None, what: str) -> None:
    """Raise BackboneError if two backbones are known and their features cannot be compared."""
    if one is not None and other is not None and one.fingerprint != other.fingerprint:
        raise BackboneError(
            f"{what}: made with encoder {one}, but {other} is in use; their features cannot be compared"
        )


def view_size(preprocess: Preprocess) -> tuple[int, int]:
    """Return the height and width of a view."""
    size = preprocess["size"]
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


class Backbone(Protocol):
    """An image encoder that may also have a text encoder.

    ``scope``, ``text_key``, ``encoders``, ``only`` and ``release`` have defaults, which an object that lacks them also
    gets.

    Attributes:
        identity: the identity of the backbone.
        dim: the length ``d`` of the features.
        has_text: whether the backbone can encode text.
        logit_scale: the scale of the zero-shot logits, which is 100 for OpenAI's CLIP and without a text encoder.
        precision: ``float32``, the autocast dtype, or ``int8``.
        text_key: a digest of what the features of sentences depend on beside the identity, so that the encoding cache
            can keep them, or ``None`` if they are not cached.
    """

    identity: Identity
    dim: int
    has_text: bool
    logit_scale: float
    precision: str
    text_key: str | None = None

    @property
    def batch_size(self) -> int:
        """The batch size at which the backbone encodes views fastest on its device."""

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Return the centre view of an RGB image, as a float32 tensor of shape ``[3, h, w]``."""

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        """Return an augmented view, ``[3, h, w]`` in float32. It depends only on the image and the seed."""

    def encode_images(self, pixels: torch.Tensor) -> FloatArray:
        """Return the raw features ``[b, d]`` of views ``[b, 3, h, w]``, which are not normalised."""

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Return the raw features ``[t, d]`` of ``t`` sentences. Raises UsageError without a text encoder."""

    @property
    def scope(self) -> str:
        """What image features depend on beside the identity. The encoding cache keeps those of each scope apart."""
        return self.precision

    def encoders(self) -> list[tuple[Backbone, bool]]:
        """Return the encoders whose features are side by side, and whether each is in use."""
        return [(self, True)]

    def only(self, shares: Sequence[float]) -> Backbone:
        """Return a backbone that does not encode images with the encoders whose share is 0."""
        return self

    def release(self, idle: float) -> None:
        """Free the weights if they were not used for ``idle`` seconds. The next use loads them again."""
        return


class _Completed(Backbone):
    """A backbone of a user that is not a subclass of :class:`Backbone`, with the defaults of the members it lacks."""

    batch_size = 1  # replaces the property, which could not be set

    def __init__(self, given: Backbone) -> None:
        for name in REQUIRED:
            setattr(self, name, getattr(given, name))
        self.text_key = None


REQUIRED = (
    "identity",
    "dim",
    "has_text",
    "logit_scale",
    "precision",
    "batch_size",
    "preprocess",
    "view",
    "encode_images",
    "encode_texts",
)
"""The members of a backbone that have no default."""


def completed(backbone: Backbone) -> Backbone:
    """Return a backbone that has all members."""
    subclass = Backbone in type(backbone).__mro__  # isinstance would evaluate every property
    return backbone if subclass else _Completed(backbone)  # type: ignore[abstract]  # has the methods of its own


def unit(features: FloatArray, what: str = "feature") -> FloatArray:
    """Scale the rows of an array to length 1 in float32. Raises InputError if a row is zero or not finite."""
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if bad.size:
        raise InputError(f"{what} {int(bad[0])}: zero or not finite")
    scaled: FloatArray = (features / norms).astype(np.float32)
    return scaled


def identity_of(parts: Sequence[Part]) -> Identity | None:
    """Return the identity of the backbones of features, or ``None`` if one of them is not known."""
    known = [part.identity for part in parts if part.identity is not None]
    if not parts or len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else Identity.joined(known)


def encoders_of(backbone: Backbone) -> list[tuple[Backbone, bool]]:
    """Return the encoders of a backbone, which may be :class:`joined.Joined`, and whether each is in use."""
    return completed(backbone).encoders()


def without_unused(backbone: Backbone, shares: Sequence[float]) -> Backbone:
    """Return a backbone that does not encode images with the encoders whose share is 0."""
    return completed(backbone).only(shares) if 0 in shares else backbone


def parts_of(backbone: Backbone) -> tuple[Part, ...]:
    """Return the parts of a feature, with names for their columns in a feature table."""
    parts = []
    for number, (encoder, _) in enumerate(encoders_of(backbone), 1):
        column = "feature" if number == 1 else f"feature_{number}"
        parts.append(Part(encoder.dim, column, encoder.identity))
    return tuple(parts)


def side_by_side(parts: Sequence[FloatArray]) -> FloatArray:
    """Join the unit features of ``e`` encoders, each of shape ``[b, d_i]``, to unit features ``[b, sum d_i]``."""
    joined: FloatArray = (np.concatenate(parts, axis=1) / len(parts) ** 0.5).astype(np.float32)
    return joined


def text_side_by_side(parts: Sequence[FloatArray]) -> FloatArray:
    """Join the text weights of ``e`` encoders, which are 0 for those without text.

    ``f W^T`` is then the mean of the cosines of the encoders with text.
    """
    with_text = max(1, sum(bool(part.any()) for part in parts))
    joined: FloatArray = (np.concatenate(parts, axis=1) * (len(parts) ** 0.5 / with_text)).astype(
        np.float32
    )
    return joined


def unit_of(backbone: Backbone, raw: FloatArray, what: str = "feature") -> FloatArray:
    """Scale raw features of a backbone to length 1, and those of each of several encoders to the same length.

    The part of an encoder that is not in use stays 0. Raises InputError if another part is zero or not finite.
    """
    encoders = encoders_of(backbone)
    parts = np.split(raw, np.cumsum([encoder.dim for encoder, _ in encoders])[:-1], axis=1)
    pairs = zip(parts, encoders, strict=True)
    return side_by_side([unit(part, what) if used else part for part, (_, used) in pairs])


def resolve_device(device: str = "auto") -> str:
    """Resolve ``auto`` to ``cuda`` or ``cpu``, and check that any other device is available.

    If there is a GPU that torch cannot use, ``auto`` logs a warning. Raises UsageError if the device is unknown or not
    available.
    """
    import torch

    if device == "auto":
        problem = _unusable()
        if problem:
            warn_once(f"{problem}; using the CPU (see retrieval-tip doctor)")
        return "cpu" if problem is not None else "cuda"
    if device == "cpu":
        return device
    kind, colon, number = device.partition(":")
    if kind != "cuda":
        raise UsageError(f"device {device!r}: expected auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UsageError(
            f"device {device!r}: torch finds no CUDA GPU; use --device auto or cpu (see doctor)"
        )
    if colon and not (number.isdecimal() and int(number) < torch.cuda.device_count()):
        raise UsageError(
            f"device {device!r}: torch finds {counted(torch.cuda.device_count(), 'GPU')}"
        )
    return device


def present(device: str) -> str:
    """Return a device, or the one that ``auto`` selects if this machine lacks it."""
    try:
        return resolve_device(device)
    except UsageError:
        return resolve_device()


def _unusable() -> str | None:
    """Return why torch cannot use the GPU, ``""`` if there is no GPU, or ``None`` if torch can use it."""
    import torch

    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
            return ""
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        return f"torch (built for {build}) cannot use the GPU; its driver may be too old"
    major, minor = torch.cuda.get_device_capability()
    if runs_on((major, minor), torch.cuda.get_arch_list()):
        return None
    return f"torch was not built for this GPU (sm_{major}{minor})"


def runs_on(capability: tuple[int, int], arches: Sequence[str]) -> bool:
    """Return whether a torch build for ``arches`` (such as ``sm_86``) runs on a GPU with this compute capability."""
    matches = [re.fullmatch(r"(sm|compute)_([0-9]+)([0-9])[a-z]?", arch) for arch in arches]
    known = [match.groups() for match in matches if match]
    for kind, m, n in known:
        oldest = (int(m), int(n))
        if oldest <= capability and (kind == "compute" or oldest[0] == capability[0]):
            return True
    return not known


def resolve_execution(device: str = "auto", precision: Precision = "auto") -> tuple[str, Precision]:
    """Replace ``auto`` by an actual device and precision. Raises UsageError if a value cannot be used."""
    device = resolve_device(device)
    check_choice("precision", precision, Precision)
    if precision == "int8" and device != "cpu":
        raise UsageError("precision int8: requires a CPU; use float16 on a GPU")
    automatic: Precision = "float32" if device == "cpu" else "float16"
    if precision == "auto":
        precision = automatic
    return device, precision
