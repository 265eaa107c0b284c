"""Backbones implemented as torch modules, which encode images and text."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones import tower
from retrieval_tip.backbones.base import (
    Backbone,
    Identity,
    present,
    same_backbone,
    spelled,
    view_size,
)
from retrieval_tip.backbones.known import Files, Known
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.settings import Precision
from retrieval_tip.wording import command_line

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from retrieval_tip.backbones.tower import Model

    Tokenizer = Callable[[list[str]], torch.Tensor]
    Open = Callable[[torch.device], "Opened"]

VIEW_SCALE = (0.5, 1.0)
VIEW_RATIO = (3 / 4, 4 / 3)

_OPENING = threading.Lock()
_CONVOLUTIONS = threading.Lock()  # the precision of convolutions is a process-wide setting


@dataclass(frozen=True)
class Opened:
    """A model, its identity without the digest of the weights, and a factory for its tokenizer, if any.

    ``files`` are the files that the model was loaded from, if they are known. If the model was not loaded by a name,
    this object takes the place of the function that opens it.
    """

    model: Model
    preprocess: Callable[[Image.Image], torch.Tensor]
    identity: Identity
    tokenizer: Callable[[], Tokenizer] | None
    files: Files | None = None

    def __call__(self, _: torch.device) -> Opened:
        return self  # stays on its device


class TorchBackbone(Backbone):
    """A :class:`base.Backbone`. Create one with :func:`loading.load_backbone`. Its weights must not change.

    A pickle has the names of the model, which is loaded again on first use, or a model that was given in memory.
    ``text_key`` is a digest of the files of the tokenizer and the model, or ``None`` if they are unknown.
    """

    # the last backbone that was unpickled, since joblib unpickles one per task
    _last: ClassVar[TorchBackbone | None] = None
    _used_at = 0.0

    def __init__(
        self, open_model: Open, device: str, precision: Precision, known: Known | None = None
    ) -> None:
        """Open the model on its device, or on first use if it is already ``known``."""
        import torch

        self._open = open_model
        self._device = torch.device(device)
        self.precision: str = precision
        self._compiles = device == "cpu" and precision != "float16"
        self._tower: tower.Tower | None = None
        self._opened = None if known is not None else self._open_here()
        self.known = known = known or self._described()
        self.identity = known.identity
        self.dim = known.dim
        self.logit_scale = known.logit_scale
        self.has_text = known.has_text
        self.text_key = None if known.files is None else known.files.digest
        if precision == "int8":
            self._compiled(1)

    def _open_here(self) -> Opened:
        opened = self._open(self._device)
        opened.model.eval().requires_grad_(False)
        if self._device.type == "cuda":
            import torch

            # the pixels have the same format; on a CPU, weights are packed anyway
            opened.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        preprocess = json.loads(
            json.dumps(dict(opened.identity.preprocess))
        )  # as in a manifest, without tuples
        identity = replace(
            opened.identity, weights=weights_digest(opened.model), preprocess=preprocess
        )
        return replace(opened, identity=identity)

    def _described(self) -> Known:
        import torch

        opened = self._open_model()
        has_text = opened.tokenizer is not None
        scale = float(opened.model.logit_scale.exp()) if has_text else 100.0
        blank = torch.zeros(1, 3, *view_size(opened.identity.preprocess), device=self._device)
        dim = self._forward(opened.model.encode_image, blank).shape[1]
        return Known(opened.identity, dim, scale, has_text, opened.files)

    def _open_model(self) -> Opened:
        with _OPENING:  # several decoding threads may need the model at the same time
            self._used_at = time.monotonic()
            if self._opened is None:
                opened = self._open_here()
                same_backbone(self.identity, opened.identity, "index")
                self._opened = opened
            return self._opened

    def __deepcopy__(self, _: object) -> Self:
        return self  # immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, (self._open, str(self._device), self.precision, self.known)

    @classmethod
    def _again(
        cls, open_model: Open, was: str, precision: Precision, known: Known
    ) -> TorchBackbone:
        """Return the backbone of a pickle, on a device that this machine has."""
        device = present(was)
        precision = precision if device.partition(":")[0] == was.partition(":")[0] else "float32"
        last = TorchBackbone._last
        if last is None or (str(last._device), last.precision, last.known) != (
            device,
            precision,
            known,
        ):
            last = TorchBackbone._last = cls(open_model, device, precision, known)
        return last

    def release(self, idle: float) -> None:
        if isinstance(self._open, Opened):  # cannot be loaded again
            return
        if self._device.type != "cpu" or time.monotonic() - self._used_at < idle:
            return
        with _OPENING:
            self._opened = self._tower = None
            self.__dict__.pop("_tokenizer", None)

    @property
    def _model(self) -> Model:
        return self._open_model().model

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        make = self._open_model().tokenizer
        if make is None:
            raise UsageError(
                f"{self.identity.model}: it has no text encoder; omit prompts and templates"
            )
        return make()

    @property
    def scope(self) -> str:
        """The precision and, for int8, a digest of the calibrated tower, since each calibration changes features."""
        compiled = self._compiled(2) if self.precision == "int8" else None
        return self.precision if compiled is None else f"int8-{compiled.digest[:16]}"

    def store_int8(self, photos: Collection[torch.Tensor]) -> float:
        """Store the image tower in int8, calibrated on views of shape ``[3, h, w]``. See :func:`tower.store_int8`."""
        exact = self._compiled(2) if self.precision == "float32" else None
        if exact is None:
            raise UsageError(
                f"int8: requires {self.identity.model} in float32 with OpenVINO on a CPU"
            )
        return tower.store_int8(self._model, self.identity, photos, exact)

    @property
    def batch_size(self) -> int:
        """256 on a GPU, 16 with OpenVINO, 4 with torch on a CPU, where more is slower (benchmarks/encoding.py)."""
        if self._device.type != "cpu":
            return 256
        return 16 if self._compiles else 4

    @property
    def size(self) -> tuple[int, int]:
        return view_size(self.identity.preprocess)

    @property
    def image_encoder(self) -> torch.nn.Module:
        """The image tower as a module on the device. It maps shape ``[b, 3, h, w]`` to ``[b, d]``."""
        return tower.image_encoder(self._model)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        given = isinstance(self._open, Opened)  # with a transform of its own
        if not given and tower.shorter_side(
            self.identity.preprocess
        ):  # the same view in 0.7 times the time
            return tower.view(image, self.identity.preprocess)
        # torch, not numpy: the OpenMP threads of decoding threads keep the model's from spinning on shared cores
        return self._open_model().preprocess(image)

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        """Return a random resized crop as in the paper (area 0.5 to 1, bicubic), flipped half the time."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as vision

        generator = random.Random(seed)  # noqa: S311
        top, left, height, width = _crop(image.width, image.height, generator)
        crop = vision.resized_crop(
            image, top, left, height, width, list(self.size), InterpolationMode.BICUBIC
        )
        if generator.random() < 0.5:
            crop = vision.hflip(crop)
        config = self.identity.preprocess
        tensor: torch.Tensor = vision.normalize(
            vision.to_tensor(crop), config["mean"], config["std"]
        )
        return tensor

    def encode_images(self, pixels: torch.Tensor) -> FloatArray:
        compiled = self._compiled(len(pixels))
        if compiled is not None:
            return compiled(pixels)
        import torch

        if self._device.type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory()  # makes the copy asynchronous
        given = pixels.to(self._device, non_blocking=True)
        channels_last = given.to(memory_format=torch.channels_last)  # faster for convolutions
        return self._forward(self._model.encode_image, channels_last)

    def _compiled(self, number: int) -> tower.Tower | None:
        """Return the OpenVINO image tower, or ``None`` if torch should encode ``number`` images."""
        self._used_at = time.monotonic()
        if self._compiles and self._tower is None:
            self._tower = tower.kept(self.identity, self.precision)
            if self._tower is None and self.precision == "int8":
                given = spelled(self.identity.model, self.identity.pretrained)
                run = command_line("models", "--int8", "PHOTOS", "--model", given)
                raise BackboneError(f"precision int8: not stored for this encoder; run {run}")
            if (
                self._tower is None and number > 1
            ):  # for one image, conversion takes longer than it saves
                self._tower = tower.converted(self._model, self.identity, self.size, self.precision)
                self._compiles = self._tower is not None
        return self._tower

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        tokens = self._tokenizer(list(texts)).to(self._device)
        return self._forward(self._model.encode_text, tokens)

    def _forward(
        self, tower: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor
    ) -> FloatArray:
        import torch

        half = None if self.precision in ("float32", "int8") else getattr(torch, self.precision)
        exactly = (
            _whole_convolutions(self._device)
            if half is None
            else torch.autocast(self._device.type, half)
        )
        with torch.no_grad(), exactly:
            features = tower(given)
        return features.float().cpu().numpy()


@contextmanager
def _whole_convolutions(device: torch.device) -> Iterator[None]:
    """Compute convolutions in full float32. With TF32 in cuDNN, features would differ from those on a CPU by 1e-3."""
    import torch

    if device.type == "cpu":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    new = hasattr(
        cudnn, "conv"
    )  # since torch 2.9; once it is used, the older setting cannot be read
    place, name, exact = (
        (cudnn.conv, "fp32_precision", "ieee") if new else (cudnn, "allow_tf32", False)
    )
    with _CONVOLUTIONS, ExitStack() as restored:
        restored.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, exact)
        yield


def _crop(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Return the top, left, height and width of a random crop, or of the largest centre crop if ten attempts fail."""
    for _ in range(10):
        area = width * height * generator.uniform(*VIEW_SCALE)
        ratio = float(np.exp(generator.uniform(*np.log(VIEW_RATIO))))
        w = round((area * ratio) ** 0.5)
        h = round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return generator.randint(0, height - h), generator.randint(0, width - w), h, w
    ratio = min(max(width / height, VIEW_RATIO[0]), VIEW_RATIO[1])
    w = max(1, min(width, round(height * ratio)))
    h = max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).numpy())
    return f"sha256:{digest.hexdigest()}"
