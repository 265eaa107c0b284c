"""Backbones: what turns pictures and sentences into features. open_clip stands behind the protocol."""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import json
import logging
import os
import random
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from retrieval_tip.errors import BackboneError, InputError, UsageError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch
    from PIL import Image

log = logging.getLogger(__name__)

DEFAULT_MODEL, DEFAULT_PRETRAINED = "RN50", "openai"
PRECISIONS = ("auto", "float32", "float16", "bfloat16")
PARTS = ("visual", "text")

VIEW_SCALE = (0.5, 1.0)
VIEW_RATIO = (3 / 4, 4 / 3)

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


class Backbone(Protocol):
    """A dual encoder, as who only needs its features sees it."""

    @property
    def identity(self) -> Identity:
        """Which one it is."""

    @property
    def dim(self) -> int:
        """Length ``d`` of its features."""

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
        """Raw features ``[t, d]`` of sentences."""


class Trainable(Backbone, Protocol):
    """A backbone whose towers, ``visual`` and ``text``, can be trained and stored apart from their base.

    Every method that takes parts raises UsageError for another name.
    """

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        """The parameters of one tower, in the model's order; the logit scale and bias belong to neither."""

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
    """``auto`` to ``cuda`` where there is a GPU, else ``cpu``. Raises UsageError for a device that is not here."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
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


def load_backbone(
    model: str = DEFAULT_MODEL,
    pretrained: str | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    tuned: str | os.PathLike[str] | None = None,
) -> Trainable:
    """An open_clip model, in evaluation mode.

    Args:
        model: an open_clip architecture (``RN50``, ``ViT-B-32``), ``local-dir:PATH`` (a folder with
            ``open_clip_config.json`` and weights) or ``hf-hub:ORG/REPO``.
        pretrained: with an architecture: a tag (``openai``, ``laion2b_s34b_b79k``), a checkpoint file, or ``TAG=FILE``
            (a local copy of that tag's weights, with the preprocessing and activation that belong to the tag).
            ``None`` means ``openai`` for the default model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``float32``; ``float16`` or ``bfloat16`` autocast; ``auto`` is float32 on a CPU, float16 on a GPU.
        tuned: a file by :func:`write_tuned`, whose tensors take the place of the model's.

    Raises:
        UsageError: an unknown architecture, tag, device or precision.
        BackboneError: weights that are missing, damaged, or cannot be fetched (the message names the file wanted);
            ``tuned`` is missing, damaged, or holds tensors that do not fit the model.
    """
    device, precision = _resolved(device, precision)
    state = None if tuned is None else _read_tuned(Path(tuned))
    with _uncollected():
        backbone = OpenClipBackbone(model, pretrained, device, precision)
    if state is not None:
        try:
            backbone.adopt(state)
        except BackboneError as error:
            raise BackboneError(f"{tuned}: {error}") from None
    return backbone


def load_when_needed(identity: Identity, dim: int, *, device: str = "auto", precision: str = "auto") -> Trainable:
    """The backbone ``identity`` of features ``[m, dim]``, loaded when first something is encoded, where that can wait.

    It can for a ``local-dir:`` model whose files are, byte by byte, the ones that ``identity`` names; any other is
    loaded now, whichever it is by now. Raises as :func:`load_backbone`; one that waited raises BackboneError when it is
    loaded and is another one after all.
    """
    device, precision = _resolved(device, precision)
    model = identity.model
    if model.startswith("local-dir:") and _lies_in(Path(model.removeprefix("local-dir:")), identity):
        return OpenClipBackbone(model, None, device, precision, (identity, dim))
    return load_backbone(model, identity.pretrained, device=device, precision=precision)


def _resolved(device: str, precision: str) -> tuple[str, str]:
    """Device and precision, each as what ``auto`` stands for. Raises UsageError for others than there are."""
    device = resolve_device(device)
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        precision = "float32" if device == "cpu" else "float16"
    return device, precision


def write_tuned(path: str | os.PathLike[str], state: Mapping[str, torch.Tensor]) -> None:
    """Write the tensors of :meth:`Trainable.tuned` as a safetensors file, for ``load_backbone(..., tuned=path)``.

    The same tensors give the same bytes. Raises BackboneError naming the file where it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path}: cannot be written: {first_line(error)}") from None


def _read_tuned(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        if not file.is_file():  # a pipe would wait for ever
            raise FileNotFoundError("no such file")
        state: dict[str, torch.Tensor] = load(file.read_bytes())  # load_file refuses names that are not UTF-8
    except OSError as error:
        reason = error.strerror or error
        raise BackboneError(f"{file}: tuned weights cannot be read: {reason}; restore it or fine-tune again") from None
    except Exception as error:  # safetensors raises its own error, KeyError or torch's
        reason = first_line(error)
        raise BackboneError(f"{file}: damaged, or not tuned weights: {reason}; restore it or fine-tune again") from None
    return state


@dataclass(frozen=True)
class _Plan:
    """How open_clip is asked for a model."""

    model: str
    pretrained: str | None
    checkpoint: str | None
    arguments: dict[str, Any]
    wanted: str


def _plan(model: str, pretrained: str | None) -> _Plan:
    import open_clip

    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        config = _local_config(folder)
        arguments = {}
        text: dict[str, Any] = config["text_cfg"] if isinstance(config.get("text_cfg"), dict) else {}
        tower = text.get("hf_model_name")
        if tower and not Path(tower).is_dir() and (folder / "config.json").is_file():
            # the text tower lies in this very folder, wherever we run from
            arguments["text_cfg"] = text | {"hf_model_name": str(folder), "hf_model_pretrained": False}
        return _Plan(f"local-dir:{folder.resolve()}", None, None, arguments, str(folder))
    if model.startswith("hf-hub:"):
        return _Plan(model, None, None, {}, f"open_clip_config.json and the weights of {model[7:]} on huggingface.co")
    if open_clip.get_model_config(model) is None:
        near = [name for name in open_clip.list_models() if name.lower().startswith(model.lower()[:4])]
        raise UsageError(
            f"model {model!r}: not an open_clip architecture, local-dir:PATH or hf-hub:ORG/REPO"
            + (f"; near it are {', '.join(near[:8])}" if near else "")
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None and model == DEFAULT_MODEL:
        pretrained = DEFAULT_PRETRAINED
    if pretrained is None:
        raise UsageError(f"model {model!r}: --pretrained is missing; a checkpoint file or one of {', '.join(tags)}")
    tag, _, file = pretrained.rpartition("=")
    facts = open_clip.get_pretrained_cfg(model, tag or pretrained)
    if tag and facts:
        if not Path(file).is_file():
            raise BackboneError(f"{file}: no such checkpoint (wanted as the weights of {model}/{tag})")
        return _Plan(model, tag, file, _tag_arguments(facts), file)
    if facts:
        return _Plan(
            model, pretrained, None, _tag_arguments(facts), f"{_remote(facts)} as weights of {model}/{pretrained}"
        )
    if Path(pretrained).is_file():
        log.warning(
            "%s: no tag is named, so open_clip's default preprocessing and activation are used with these weights; "
            "if they belong to a tag, give --pretrained TAG=%s (tags: %s)",
            pretrained,
            pretrained,
            ", ".join(tags) or "none",
        )
        return _Plan(model, str(Path(pretrained).resolve()), pretrained, {}, pretrained)
    raise UsageError(
        f"pretrained {pretrained!r}: neither a checkpoint file nor a tag of {model}; its tags are {', '.join(tags)}"
    )


def _remote(facts: Mapping[str, Any]) -> str:
    """Where open_clip fetches a tag's weights from."""
    repository, _, file = facts.get("hf_hub", "").rpartition("/")
    return f"{file or 'open_clip_model.safetensors'} of huggingface.co/{repository}" if repository else facts["url"]


def _local_config(folder: Path) -> dict[str, Any]:
    path = folder / "open_clip_config.json"
    if not folder.is_dir():
        raise BackboneError(f"{folder}: no such model folder; give its place with --model local-dir:PATH")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        if not isinstance(config, dict):
            raise TypeError("model_cfg is not an object")
    except FileNotFoundError:
        raise BackboneError(f"{path}: missing; a local-dir: model is a folder with this file and weights") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BackboneError(f"{path}: not an open_clip configuration ({error})") from None
    return config


def _tag_arguments(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Activation and preprocessing of a pretrained tag: open_clip only warns where the activation differs."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    arguments: dict[str, Any] = {f"image_{key}": facts[key] for key in keys if facts.get(key) is not None}
    if facts.get("quick_gelu"):
        arguments["force_quick_gelu"] = True
    return arguments


@dataclass(frozen=True)
class _Opened:
    """What open_clip made of a plan, and which one it is, but for its weights."""

    plan: _Plan
    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    identity: Identity


def _open(plan: _Plan, device: torch.device) -> _Opened:
    """Raises BackboneError for weights that are missing, damaged, or cannot be fetched."""
    import open_clip

    name = plan.model
    try:
        with _quiet():
            config = open_clip.get_model_config(name)
            model, _, preprocess = _filled_once(
                lambda: open_clip.create_model_and_transforms(
                    name, plan.checkpoint or plan.pretrained, device=device, **plan.arguments
                )
            )
            has_weights = name.startswith("local-dir:") is False or _has_weights(Path(name[10:]))
    except Exception as error:  # open_clip, the hub, torch and safetensors each raise their own
        raise _load_error(plan, error) from error
    if not has_weights:
        raise BackboneError(f"{plan.wanted}: holds no weights (*.safetensors, *.bin or *.pth)")
    # Also while it is trained: batch statistics and dropout would give a picture another feature in each batch, and
    # other features than the ones that it is compared with.
    model.eval().requires_grad_(False)
    identity = Identity(
        model=name,
        pretrained=plan.pretrained,
        weights="",
        config=_config_digest(config, quick_gelu=bool(plan.arguments.get("force_quick_gelu"))),
        preprocess={
            key: list(value) if isinstance(value, tuple) else value
            for key, value in model.visual.preprocess_cfg.items()
        },
    )
    return _Opened(plan, model, preprocess, identity)


def _lies_in(folder: Path, identity: Identity) -> bool:
    """Whether a folder's safetensors file and configuration are what ``identity`` names, as far as they tell.

    Then it need not be loaded to know that. False where only open_clip could tell.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        settings = config.get("preprocess_cfg", {})
        same = _config_digest(config["model_cfg"], quick_gelu=False) == identity.config and all(
            identity.preprocess.get(key) == value for key, value in settings.items() if key != "size"
        )  # the size is the model's own
        state = load_file(folder / "open_clip_model.safetensors") if same else {}  # the first that open_clip looks for
    except Exception:  # whatever it is, loading the model will say it
        return False
    whole = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    return same and _state_digest(whole) == identity.weights


_OPENING = threading.Lock()
_QUIET = threading.RLock()


class OpenClipBackbone:
    """A :class:`Trainable` backbone by open_clip. Make one with :func:`load_backbone`."""

    _folded: tuple[list[int], Any] | None = None
    """By the versions of the image tower's tensors that it was made of: see :attr:`_folded_model`."""

    def __init__(
        self,
        model: str,
        pretrained: str | None,
        device: str,
        precision: str,
        awaited: tuple[Identity, int] | None = None,
    ) -> None:
        """``awaited``: its identity and ``d`` where they are known; then it is loaded when something is encoded."""
        import torch

        self._names = (model, pretrained)
        self._device = torch.device(device)
        self._precision = precision
        self._opened: _Opened | None = None
        self._digested: list[int] | None = None
        if awaited is None:
            self._opened = _open(_plan(model, pretrained), self._device)
            self._identity = self._opened.identity
        else:
            self._identity = awaited[0]
        size = self._identity.preprocess["size"]
        self._size: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        if awaited is None:
            self._dim = _text_dim(self._model) or int(self.encode_texts(["a"]).shape[1])
        else:
            self._dim = awaited[1]

    def _open_model(self) -> _Opened:
        with _OPENING:  # threads that decode images ask for it at the same time
            if self._opened is None:
                with _uncollected():
                    opened = _open(_plan(*self._names), self._device)
                identity = replace(opened.identity, weights=_weights_digest(opened.model))
                if identity.fingerprint != self._identity.fingerprint:
                    raise BackboneError(
                        f"backbone {self._identity} is needed, but {identity} is in use; "
                        "their features cannot be compared"
                    )
                self._opened, self._digested = opened, _versions(opened.model)
            return self._opened

    @property
    def _model(self) -> Any:
        return self._open_model().model

    @property
    def _preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        return self._open_model().preprocess

    @cached_property
    def _tokenizer(self) -> Callable[[list[str]], torch.Tensor]:
        """Made when there is a text: images need none."""
        import open_clip

        plan = self._open_model().plan
        try:
            with _quiet():
                tokenizer: Callable[[list[str]], torch.Tensor] = open_clip.get_tokenizer(plan.model)
        except Exception as error:  # as those of the model
            raise _load_error(plan, error) from error
        return tokenizer

    @property
    def identity(self) -> Identity:
        """Which one it is: the digest is of the weights as they are now, so that no cache takes old for new."""
        if self._opened is None:
            return self._identity
        versions = _versions(self._model)
        if versions != self._digested:
            self._identity = replace(self._identity, weights=_weights_digest(self._model))
            self._digested = versions
        return self._identity

    @property
    def dim(self) -> int:
        """Length ``d`` of its features."""
        return self._dim

    @property
    def logit_scale(self) -> float:
        """The model's own temperature, ``exp`` of its stored logarithm."""
        return float(self._model.logit_scale.exp())

    @property
    def precision(self) -> str:
        """``float32``, or the autocast dtype."""
        return self._precision

    @property
    def batch_size(self) -> int:
        """64 on a GPU. 4 on a CPU, where larger batches spend their time on fresh memory (benchmarks/encoding.py)."""
        return 4 if self._device.type == "cpu" else 64

    @property
    def _folded_model(self) -> Any:
        """The model to encode with, as its weights are now: on a CPU without batch norms, where that can be."""
        if self._device.type != "cpu":
            return self._model
        versions = _versions(self._model.visual)
        if self._folded is None or self._folded[0] != versions:
            self._folded = versions, _fold_batch_norms(self._model, self._size)
        return self._folded[1]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """The model's own centre view, ``[3, h, w]`` float32."""
        # Not in numpy: while threads that decode have OpenMP threads of their own, the model's spin little at their
        # barriers. Where they spin on cores that others use too, encoding takes several times as long.
        tensor: torch.Tensor = self._preprocess(image)
        return tensor

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        """The paper's augmented view: random resized crop (area 0.5 to 1, bicubic), flipped half the time."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as vision

        generator = random.Random(seed)  # noqa: S311
        top, left, height, width = _crop(image.width, image.height, generator)
        crop = vision.resized_crop(image, top, left, height, width, list(self._size), InterpolationMode.BICUBIC)
        if generator.random() < 0.5:
            crop = vision.hflip(crop)
        config = self._identity.preprocess
        tensor: torch.Tensor = vision.normalize(vision.to_tensor(crop), config["mean"], config["std"])
        return tensor

    def encode_images(self, pixels: torch.Tensor) -> FloatArray:
        """Raw features ``[b, d]`` float32 of views ``[b, 3, h, w]``."""
        model = self._folded_model if len(pixels) > 1 else self._model  # folding takes longer than it gains for one
        return _without_gradient(lambda given: self._forward_pixels(model, given), pixels)

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Raw features ``[t, d]`` float32 of sentences."""
        return _without_gradient(self.forward_texts, texts)

    def forward_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Raw features ``[b, d]`` float32 of views ``[b, 3, h, w]``, with gradient."""
        return self._forward_pixels(self._model, pixels)

    def _forward_pixels(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        channels_last = pixels.to(self._device, memory_format=torch.channels_last)  # convolutions prefer it
        return self._forward(model.encode_image, channels_last)

    def forward_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Raw features ``[t, d]`` float32 of sentences, with gradient."""
        return self._forward(self._model.encode_text, self._tokenizer(list(texts)).to(self._device))

    def _forward(self, tower: Callable[[torch.Tensor], torch.Tensor], given: torch.Tensor) -> torch.Tensor:
        import torch

        if self._precision == "float32":
            return tower(given)
        with torch.autocast(self._device.type, dtype=getattr(torch, self._precision)):
            return tower(given).float()

    def parameters(self, part: str) -> list[torch.nn.Parameter]:
        """The parameters of one tower, in the model's order."""
        return [parameter for name, parameter in self._model.named_parameters() if self._is_of(part, name)]

    @contextmanager
    def training(self, parts: Sequence[str]) -> Iterator[list[torch.nn.Parameter]]:
        """Within it, the parameters of ``parts``, which it gives, take gradients; behind it, none does."""
        parameters = [parameter for part in parts for parameter in self.parameters(part)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield parameters
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def tuned(self, parts: Sequence[str]) -> dict[str, torch.Tensor]:
        """A copy of every tensor of ``parts`` by its name in the model, contiguous and on the CPU."""
        return {name: _copied(tensor) for part in parts for name, tensor in self._tensors(part).items()}

    def adopt(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the tensors of whole towers in place of the model's own; the identity follows."""
        towers = [self._tensors(part) for part in PARTS]
        _check_fit(state, towers, self._identity.model)
        self._model.load_state_dict(dict(state), strict=False)

    def _tensors(self, part: str) -> dict[str, torch.Tensor]:
        """What the state of one tower holds: parameters and buffers."""
        return {name: tensor for name, tensor in self._model.state_dict().items() if self._is_of(part, name)}

    def _is_of(self, part: str, name: str) -> bool:
        if part not in PARTS:
            raise UsageError(f"part {part!r}: expected one of {', '.join(PARTS)}")
        if part == "visual":
            return name.startswith("visual.")
        if hasattr(self._model, "text"):
            return name.startswith("text.")
        # OpenAI's CLIP: the modules of the text tower lie on the model itself
        return not name.startswith(("visual.", "logit_scale", "logit_bias"))


def _filled_once(create: Callable[[], Any]) -> Any:
    """What ``create`` returns, a model first, without drawing the random weights that its checkpoint overwrites.

    Where it did not write every parameter, all is made again in the plain way.
    """
    import torch
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    draws = {init.normal_, init.uniform_, init.kaiming_uniform_, torch.Tensor.normal_, torch.Tensor.uniform_}
    written: dict[int, torch.Tensor] = {}  # by id, and held, so that no other one gets it

    class Undrawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in draws:
                tensor = args[0] if args else kwargs["tensor"]
                if isinstance(tensor, torch.nn.Parameter):
                    return tensor
            elif func is torch.Tensor.copy_:
                written[id(args[0])] = args[0]
            return func(*args, **kwargs)

    with Undrawn():
        made = create()
    return made if all(id(parameter) in written for parameter in made[0].parameters()) else create()


def _text_dim(model: Any) -> int | None:
    """Length of the features of a text, from the tower's last projection; None where it has none."""
    import torch

    tower = getattr(model, "text", model)
    projection = getattr(tower, "text_projection", getattr(tower, "proj", None))  # open_clip's own, a Hugging Face one
    if isinstance(projection, torch.nn.Sequential):
        projection = projection[-1]
    if isinstance(projection, torch.nn.Linear):
        return projection.out_features
    return int(projection.shape[1]) if isinstance(projection, torch.Tensor) else None


def _without_gradient(forward: Callable[[Any], torch.Tensor], given: Any) -> FloatArray:
    import torch

    with torch.no_grad():  # not inference_mode: what a tower keeps from then could not take part in training later
        array: FloatArray = forward(given).float().cpu().numpy()
    return array


def _fold_batch_norms(model: Any, size: tuple[int, int]) -> Any:
    """``model``, or one that shares its tensors and gives its features of images up to float rounding, but faster.

    A convolution takes the scale and the shift of the batch norm that follows it: one pass over the activations less,
    and one that would be written to fresh memory. Modules tell what follows them by their order only, so ``model``
    itself is returned where the two disagree on a picture.
    """
    import torch

    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.visual.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.visual.parameters(), *model.visual.buffers())}
    folded = copy.copy(model)
    probe = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.no_grad():
        try:
            visual = copy.deepcopy(model.visual, shared)
            folded._modules = model._modules | {"visual": visual}
            for module in list(visual.modules()):
                _fold_children(module)
            expected, folded_features = model.encode_image(probe), folded.encode_image(probe)
        except RuntimeError:  # what cannot be copied, or takes other pictures
            return model
    return folded if float((folded_features - expected).abs().max()) <= 1e-4 * float(expected.abs().max()) else model


def _fold_children(module: Any) -> None:
    """Fold each batch norm that stands right behind a convolution among a module's children into it."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    for (_, conv), (name, norm) in itertools.pairwise(list(module.named_children())):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(module, name, nn.Sequential(*norm.children()))  # timm's norms hold the activation


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_fit(state: Mapping[str, torch.Tensor], towers: Sequence[Mapping[str, torch.Tensor]], model: str) -> None:
    """Raise BackboneError naming the tensor, unless ``state`` holds one or more of the towers, each whole."""
    own = {name: tensor for tower in towers for name, tensor in tower.items()}
    for name, tensor in state.items():
        if name not in own:
            raise BackboneError(f"tensor {name!r} is in neither tower of {model}; they were tuned from another model")
        stated, wanted = (f"{t.dtype} {list(t.shape)}".removeprefix("torch.") for t in (tensor, own[name]))
        if stated != wanted:
            raise BackboneError(f"tensor {name!r} is {stated}, in {model} {wanted}; they were tuned from another model")
    missing = [name for tower in towers if not state.keys().isdisjoint(tower) for name in tower if name not in state]
    if missing or not state:
        what = f"tensor {missing[0]!r} is missing" if missing else "holds no tensors"
        raise BackboneError(f"{what}; a tuned tower of {model} is stored whole")


def _crop(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of random area and aspect; the largest allowed centre after ten misses."""
    for _ in range(10):
        area = width * height * generator.uniform(*VIEW_SCALE)
        ratio = float(np.exp(generator.uniform(*np.log(VIEW_RATIO))))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return generator.randint(0, height - h), generator.randint(0, width - w), h, w
    ratio = min(max(width / height, VIEW_RATIO[0]), VIEW_RATIO[1])
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "*.bin", "*.pth"))


def _versions(model: Any) -> list[int]:
    """How often each tensor was changed in place, as torch counts it: whoever trains it, and however."""
    tensors = (*model.parameters(), *model.buffers())
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _weights_digest(model: Any) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor: the same from a tag, a hub and a file."""
    return _state_digest(model.state_dict())


def _state_digest(state: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.reshape(-1).numpy())
    return f"sha256:{digest.hexdigest()}"


def _config_digest(config: Mapping[str, Any], *, quick_gelu: bool) -> str:
    """Digest of the architecture: names of files and hubs are left out, what they held is in the weights."""

    def plain(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        names = ("hf_model_name", "hf_tokenizer_name", "hf_model_pretrained", "timm_model_pretrained")
        return {key: plain(value) for key, value in part.items() if key not in names}

    what = plain(config) | {"quick_gelu": quick_gelu or bool(config.get("quick_gelu"))}
    return f"sha256:{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()}"


def _load_error(plan: _Plan, error: Exception) -> BackboneError:
    reason = (str(error).strip() or type(error).__name__).rpartition("Last error: ")[2].splitlines()[0]
    if "pip install transformers" in str(error):
        return BackboneError(f"{plan.model}: its text tower needs transformers; pip install 'retrieval-tip[hf]'")
    if plan.checkpoint or plan.model.startswith("local-dir:"):
        return BackboneError(f"{plan.wanted}: cannot be loaded as {plan.model}: {reason}")
    way_out = (
        "--model local-dir:FOLDER with that repository's files"
        if plan.model.startswith("hf-hub:")
        else f"--pretrained {plan.pretrained}=FILE"
    )
    return BackboneError(f"wanted {plan.wanted}, which is not cached and cannot be fetched ({reason}); give {way_out}")


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: open_clip's imports make a million objects that stay, and walking them took a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip and the hub log each step through the root logger, and warn where we have already chosen.

    What this package says meanwhile, in another thread, is still said.
    """
    ours = logging.getLogger("retrieval_tip")
    with _QUIET:
        loggers = [ours, *map(logging.getLogger, (None, "huggingface_hub", "transformers"))]
        before = [logger.level for logger in loggers]
        ours.setLevel(ours.getEffectiveLevel())
        for logger in loggers[1:]:
            logger.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
