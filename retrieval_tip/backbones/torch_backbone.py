"""Backbones implemented as torch modules, which encode images and text."""

from __future__ import annotations

import copy
import hashlib
import random
import shlex
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from retrieval_tip.backbones import tower
from retrieval_tip.backbones.base import Execution, FloatArray, Identity, present, same_backbone, view_size
from retrieval_tip.backbones.known import Files, Known
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.settings import Precision

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from retrieval_tip.backbones.tower import Model

    Tokenizer = Callable[[list[str]], torch.Tensor]
    Open = Callable[[torch.device], "Opened"]

VIEW_SCALE = (0.5, 1.0)
VIEW_RATIO = (3 / 4, 4 / 3)
SAMPLED = 64  # number of values per parameter that are compared to detect a change of the weights

_SHARED = ("_opened", "_original", "_digested", "_tower")  # attributes that equal backbones can share

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
    dim: int | None
    tokenizer: Callable[[], Tokenizer] | None
    files: Files | None = None

    def __call__(self, _: torch.device) -> Opened:
        return self  # stays on its device


class TorchBackbone:
    """A :class:`base.Backbone`. Create one with :func:`loading.load_backbone`.

    A pickle has the names of the model, which is loaded again on first use. It has no weights, unless they were changed
    after the model was loaded, or the model was given in memory.
    """

    # the last backbone that was unpickled shares its model with the next, since joblib unpickles one per task
    _last: ClassVar[TorchBackbone | None] = None

    def __init__(self, open_model: Open, how: Execution, known: Known | None = None) -> None:
        """Open the model on its device, or on first use if it is already ``known``."""
        import torch

        self._open, self._device = open_model, torch.device(how.device)
        self.precision: Precision = how.precision
        self._runtime = how.runtime
        self._tower: tuple[str, tower.Tower | None] | None = None  # fingerprint of the weights, and their tower
        self._original = torch.empty(0)  # sample of the weights when the model was opened
        self._digested: torch.Tensor | None = None  # sample of the weights that were digested
        self._known = known
        found = self._open_here() if known is None else known
        self._opened = found if isinstance(found, Opened) else None
        self._identity = found.identity
        self.dim = found.dim or int(self.encode_texts(["a"]).shape[1])
        if how.precision == "int8":
            self._compiled(1)

    def _open_here(self) -> Opened:
        import torch

        opened = self._open(self._device)
        opened.model.eval().requires_grad_(False)
        if self._device.type == "cuda":
            # the pixels have the same format; on a CPU, weights are packed anyway
            opened.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._original = torch.cat(_sampled(opened.model))
        return opened

    def _open_model(self) -> Opened:
        import torch

        with _OPENING:  # several decoding threads may need the model at the same time
            if self._opened is None:
                opened = self._open_here()
                identity = replace(opened.identity, weights=weights_digest(opened.model))
                same_backbone(self._identity, identity, "index")
                self._opened, self._digested = opened, torch.cat(_sampled(opened.model))
            return self._opened

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return other

    def __getstate__(self) -> dict[str, Any]:
        import torch

        derived = (*_SHARED, "_samples", "_tokenizer", "text_key")
        state = {name: value for name, value in self.__dict__.items() if name not in derived}
        state |= dict.fromkeys(_SHARED) | {"_identity": self.identity}
        opened = self._opened
        if opened is None or opened is self._open:
            return state | {"_opened": opened}
        if not torch.cat(self._samples).equal(self._original):
            return state | {"_opened": opened, "_open": opened}
        names, key = (self._identity.model, self._identity.pretrained), self.__dict__.get("text_key")
        return state | {"_known": Known(names, self._identity, self.dim, self.logit_scale, key)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        import torch

        self.__dict__ |= state
        was, self._device = self._device, torch.device(present(str(self._device)))
        self.precision = self.precision if was.type == self._device.type else "float32"
        last, TorchBackbone._last = TorchBackbone._last, self
        same = ("identity", "_device", "precision", "_runtime")  # equal models that encode in the same way
        if self._opened is None and last is not None and all(getattr(last, n) == getattr(self, n) for n in same):
            self.__dict__ |= {name: getattr(last, name) for name in _SHARED}

    @property
    def _model(self) -> Model:
        return self._open_model().model

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        make = self._open_model().tokenizer
        if make is None:
            raise UsageError(f"{self._identity.model}: it has no text encoder; omit prompts and templates")
        return make()

    @cached_property
    def _samples(self) -> list[torch.Tensor]:
        return _sampled(self._model)

    @property
    def identity(self) -> Identity:
        """The identity of the backbone, including the digest of its current weights."""
        if self._opened is None:
            return self._identity
        import torch

        sample = torch.cat(self._samples)
        if self._digested is None or not sample.equal(self._digested):
            self._identity = replace(self._identity, weights=weights_digest(self._model))
            self._digested = sample
        return self._identity

    @property
    def has_text(self) -> bool:
        if self._opened is None:
            return not self._identity.model.startswith("timm:")
        return self._opened.tokenizer is not None

    @property
    def logit_scale(self) -> float:
        """The scale of the zero-shot logits, or 100 if the backbone has no text tower."""
        if self._opened is None and self._known is not None and self._known.logit_scale is not None:
            return self._known.logit_scale
        return float(self._model.logit_scale.exp()) if self.has_text else 100.0

    @cached_property
    def text_key(self) -> str | None:
        """A digest of the files of the tokenizer and the model, or ``None`` if they are unknown."""
        if self._known is not None:
            return self._known.digest
        return None if self.files is None else self.files.digest()

    @property
    def files(self) -> Files | None:
        """The files that the model was loaded from, or ``None`` if they are unknown or the model is not loaded."""
        return None if self._opened is None else self._opened.files

    @property
    def scope(self) -> str:
        """The precision and, for int8, a digest of the calibrated tower, since each calibration changes features."""
        compiled = self._compiled(2) if self.precision == "int8" else None
        return self.precision if compiled is None else f"int8-{compiled.digest[:16]}"

    def store_int8(self, photos: Collection[torch.Tensor]) -> float:
        """Store the image tower in int8, calibrated on views of shape ``[3, h, w]``. See :func:`tower.store_int8`."""
        exact = self._compiled(2) if self.precision == "float32" else None
        if exact is None:
            raise UsageError(f"int8: requires {self._identity.model} in float32 with OpenVINO on a CPU")
        return tower.store_int8(self._model, self.identity, photos, exact)

    @property
    def batch_size(self) -> int:
        """256 on a GPU, 16 with OpenVINO, 4 with torch on a CPU, where more is slower (benchmarks/encoding.py)."""
        if self._device.type != "cpu":
            return 256
        return 16 if self._may_compile else 4

    @property
    def size(self) -> tuple[int, int]:
        return view_size(self._identity.preprocess)

    @property
    def image_encoder(self) -> torch.nn.Module:
        """The image tower as a module on the device. It maps shape ``[b, 3, h, w]`` to ``[b, d]``."""
        return tower.image_encoder(self._model)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        given = self._opened is not None and self.files is None  # with a transform of its own
        if not given and tower.shorter_side(self._identity.preprocess):  # the same view in 0.7 times the time
            return tower.view(image, self._identity.preprocess)
        # torch, not numpy: the OpenMP threads of decoding threads keep the model's from spinning on shared cores
        return self._open_model().preprocess(image)

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        """Return a random resized crop as in the paper (area 0.5 to 1, bicubic), flipped half the time."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as vision

        generator = random.Random(seed)  # noqa: S311
        top, left, height, width = _crop(image.width, image.height, generator)
        crop = vision.resized_crop(image, top, left, height, width, list(self.size), InterpolationMode.BICUBIC)
        if generator.random() < 0.5:
            crop = vision.hflip(crop)
        config = self._identity.preprocess
        tensor: torch.Tensor = vision.normalize(vision.to_tensor(crop), config["mean"], config["std"])
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

    @property
    def _may_compile(self) -> bool:
        on_cpu = self._device.type == "cpu" and self.precision != "float16"
        return on_cpu and self._runtime != "torch"

    def _compiled(self, number: int) -> tower.Tower | None:
        """Return the OpenVINO image tower, or ``None`` if torch should encode ``number`` images."""
        if not self._may_compile:
            return None
        identity = self.identity
        if self._tower is None or self._tower[0] != identity.fingerprint:
            compiled = tower.kept(identity, self.precision)
            if compiled is None:
                if self.precision == "int8":
                    weights = () if identity.pretrained is None else ("--pretrained", identity.pretrained)
                    run = "retrieval-tip models --int8 PHOTOS " + shlex.join(("--model", identity.model, *weights))
                    raise BackboneError(f"precision int8: not stored for this encoder; run {run}")
                if number < 2:  # for one image, conversion takes longer than it saves
                    return None
                compiled = tower.converted(self._model, identity, self.size, self.precision)
            self._tower = identity.fingerprint, compiled
        return self._tower[1]

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        tokens = self._tokenizer(list(texts)).to(self._device)
        return self._forward(self._model.encode_text, tokens)

    def _forward(self, tower: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> FloatArray:
        import torch

        half = None if self.precision in ("float32", "int8") else getattr(torch, self.precision)
        exactly = _whole_convolutions(self._device) if half is None else torch.autocast(self._device.type, half)
        with torch.no_grad(), exactly:
            features = tower(given)
        array: FloatArray = features.float().cpu().numpy()
        return array


@contextmanager
def _whole_convolutions(device: torch.device) -> Iterator[None]:
    """Compute convolutions in full float32. With TF32 in cuDNN, features would differ from those on a CPU by 1e-3."""
    import torch

    if device.type == "cpu":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    new = hasattr(cudnn, "conv")  # since torch 2.9; once it is used, the older setting cannot be read
    place, name, exact = (cudnn.conv, "fp32_precision", "ieee") if new else (cudnn, "allow_tf32", False)
    with _CONVOLUTIONS, ExitStack() as restored:
        restored.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, exact)
        yield


def _crop(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Return the top, left, height and width of a random crop, or of the largest centre crop if ten attempts fail."""
    for _ in range(10):
        area = width * height * generator.uniform(*VIEW_SCALE)
        ratio = float(np.exp(generator.uniform(*np.log(VIEW_RATIO))))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return generator.randint(0, height - h), generator.randint(0, width - w), h, w
    ratio = min(max(width / height, VIEW_RATIO[0]), VIEW_RATIO[1])
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def _sampled(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return views of up to ``SAMPLED`` values of each parameter, which is enough to detect a training step."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    return [p.as_strided((min(SAMPLED, p.numel()),), (max(1, p.numel() // SAMPLED),)) for p in parameters]


def weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).numpy())
    return f"sha256:{digest.hexdigest()}"
