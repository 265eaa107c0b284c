"""Training steps that fine-tune keys, values and encoders."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.backbones.base import PARTS
from retrieval_tip.backbones.prompts import prompts_of
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.bounds import check_count
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import UsageError
from retrieval_tip.fit.gradient import BLOCK, GPU_BLOCK, AllKeys
from retrieval_tip.settings import TRAINED, TrainedPart, TrainingPrecision, TrainingSettings, check_choice

ENCODER_RATE = 1e-3
"""Learning rate of encoders, relative to the learning rate of keys."""
VIEWS = 16
"""Default number of cached views per shot."""
WORTH = 1.5
"""Minimum speed-up of matrix products for which ``auto`` selects bfloat16."""
SMALL = 1 << 22
"""Maximum number of key values for which ``auto`` keeps float32, because bfloat16 would not save time."""
TEXTS = 256
"""Number of prompts per batch of the text encoder."""
QUERIES = 256
"""Number of queries per batch in an evaluation."""


@dataclass(frozen=True)
class Recipe:
    """Options for fine-tuning. The defaults follow the paper.

    - ``train``: the parts to train, from :data:`settings.TRAINED`
    - ``epochs``: the number of epochs
    - ``batch``: the number of queries per step
    - ``lr``: the learning rate, which falls to 0 along a cosine. Encoders use a thousandth of it.
    - ``eps``, ``weight_decay``: parameters of AdamW
    - ``views``: the number of augmented views of each shot. All views are encoded once, and each epoch samples one view
      per shot. If ``None``, every epoch encodes a new view, as in the paper's code. This is required to train the image
      encoder.
    - ``precision``: the dtype of matrix products. ``auto`` uses bfloat16 if it is measurably faster.
    - ``seed``: the seed for batches and views
    - ``settings``: the source of the alpha and beta used in training. ``own`` takes them from the index. ``tried`` also
      trains with a few flatter settings for a quarter of the epochs, and selects on the validation images. Flatter
      settings can help because a sharp exponential has a small gradient. Encoders always use ``own``.
    - ``alpha``, ``beta``: values to use in training instead. If you give either value, ``settings`` is ignored, and a
      value that you do not give is taken from the index.

    Raises UsageError if an option is invalid.
    """

    train: tuple[TrainedPart, ...] = ("keys",)
    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    eps: float = 1e-4
    weight_decay: float = 0.01
    views: int | None = VIEWS
    precision: TrainingPrecision = "auto"
    seed: int = 1
    settings: TrainingSettings = "tried"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if not self.train or len(set(self.train)) < len(self.train) or not set(self.train) <= set(TRAINED):
            raise UsageError(f"train {', '.join(self.train) or '(nothing)'}: expected some of {', '.join(TRAINED)}")
        for name, fewest in (("epochs", 1), ("batch", 1), ("views", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, fewest)
        for name, least in (("lr", 0.0), ("eps", 0.0), ("weight_decay", -1e-300)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > least):
                raise UsageError(f"{name} is {value}: expected a finite number {'above' if least == 0 else 'from'} 0")
        check_choice("settings", self.settings, TrainingSettings)
        check_choice("precision", self.precision, TrainingPrecision)
        if "visual" in self.train and self.views is not None:
            raise UsageError("views: an image encoder in training needs fresh views; give no number of cached views")

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders to train."""
        return tuple(part for part in PARTS if part in self.train)


class Trainer:
    """The trained parts of an index, together with their optimiser.

    ``keys`` is a float32 copy of the keys (shape ``[n, d]``). ``values`` is a copy of the values (shape ``[n, c]``), or
    ``None`` if they are one-hot. ``text_weights`` (shape ``[c, d]``) is updated if the text encoder is trained.
    ``backbone`` is changed in place.
    """

    def __init__(self, cache: CacheModel, recipe: Recipe, backbone: TorchBackbone | None) -> None:
        self.cache, self.recipe, self.backbone = cache, recipe, backbone
        self.keys = torch.from_numpy(np.array(cache.keys, dtype=np.float32)).to(cache.device)
        self.values = None if cache.values is None else cache.values.clone()
        if self.values is None and "values" in recipe.train:
            self.values = functional.one_hot(cache.class_ids, len(cache.class_names)).float()
        self.text_weights = cache.text_weights.clone()
        block = BLOCK if cache.device == "cpu" else GPU_BLOCK
        products = getattr(torch, recipe.precision)
        c, beta = len(cache.class_names), cache.settings.beta
        self._all = AllKeys(self.keys, cache.class_ids, c, beta, self.values, products, block)
        self._visual = self._text = None
        if backbone is not None and "visual" in recipe.train:
            self._visual = _Tower(backbone.parameters("visual"), backbone.forward_images, backbone.batch_size)
        if backbone is not None and "text" in recipe.train:
            self._text = _Tower(backbone.parameters("text"), backbone.forward_texts, TEXTS)
        self._prompts = prompts_of(cache.class_names, cache.templates) if self._text else []
        matrices = {"keys": self.keys, "values": self.values}
        self._trained = {
            part: matrix for part, matrix in matrices.items() if matrix is not None and part in recipe.train
        }
        for matrix in self._trained.values():
            matrix.grad = torch.empty_like(matrix)
        encoders = [parameter for tower in (self._visual, self._text) if tower for parameter in tower.parameters]
        groups = [{"params": [*self._trained.values()], "rate": 1.0}, {"params": encoders, "rate": ENCODER_RATE}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.lr, eps=recipe.eps,
            weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip

    def step(self, queries: Tensor, ids: Tensor, lr: float) -> tuple[float, int]:
        """Take one training step, and return the mean cross-entropy before the step and the number of right answers.

        ``queries`` are features of shape ``[b, d]``, or pixels of shape ``[b, 3, h, w]`` if the image encoder is
        trained. ``ids`` are the class ids of the queries. If the cross-entropy is not finite, the step changes nothing.
        """
        features, ids = self._features(queries), ids.to(self.cache.device)
        prompts = None if self._text is None else self._text.features(self._prompts)
        cache_logits = self._all.forward(features).requires_grad_()
        if self._visual is not None:
            features.requires_grad_()
        if prompts is not None:
            prompts.requires_grad_()
        logits = self._blend(features, cache_logits, self.text_weights if prompts is None else self._of(prompts))
        loss = functional.cross_entropy(logits, ids)
        hits = (logits.argmax(dim=1) == ids).sum()
        value, right = torch.stack([loss.detach(), hits.to(loss)]).tolist()  # synchronises with the GPU only once
        if math.isfinite(value):
            loss.backward()
            assert cache_logits.grad is not None
            self._all.backward(cache_logits.grad, features.detach(), features.grad)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            with self._encoders_in_training():
                if self._visual is not None and features.grad is not None:
                    self._visual.backward(queries, features.grad)
                if self._text is not None and prompts is not None and prompts.grad is not None:
                    self._text.backward(self._prompts, prompts.grad)
                self.optimizer.step()
        return value, int(right)

    def loss(self, queries: Tensor, ids: Tensor) -> float:
        """Return the mean cross-entropy on queries. See :meth:`step` for the arguments."""
        return self.evaluate(self._features(queries), ids.to(self.cache.device))[0]

    @torch.no_grad()
    def evaluate(self, features: Tensor, ids: Tensor) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy on queries."""
        loss, right = 0.0, 0
        for f, y in zip(features.split(QUERIES), ids.split(QUERIES), strict=True):
            logits = self._blend(f, self._all.forward(f), self.text_weights)
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(dim=1) == y).sum())
        return loss / len(ids), right / len(ids)

    def refresh(self) -> None:
        """Recompute the text weights if the text encoder is trained."""
        if self._text is not None:
            self.text_weights = self._of(self._text.features(self._prompts))

    def trained(self) -> dict[str, Tensor]:
        """Return CPU copies of all trained tensors by name. Encoder tensors are named ``encoder.NAME``."""
        weights = {} if self._text is None else {"text_weights": self.text_weights}
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in (self._trained | weights).items()}
        return copies | {f"encoder.{name}": tensor for name, tensor in self.encoders().items()}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Restore the tensors that :meth:`trained` returned."""
        for part, matrix in self._trained.items():
            matrix.copy_(trained[part])
        if self._text is not None:
            self.text_weights = trained["text_weights"].to(self.cache.device)
        encoders = {name.partition(".")[2]: part for name, part in trained.items() if name.startswith("encoder.")}
        if encoders:
            assert self.backbone is not None
            self.backbone.adopt(encoders)

    def encoders(self) -> dict[str, Tensor]:
        """Return copies of the trained encoder tensors. If the backbone was already tuned, include both encoders."""
        if self.backbone is None or not self.recipe.encoders:
            return {}
        return self.backbone.tuned(self.recipe.encoders if self.cache.tuned is None else PARTS)

    def _encoders_in_training(self) -> AbstractContextManager[object]:
        if self.backbone is None:
            return nullcontext()
        return self.backbone.training(self.recipe.encoders)

    def _features(self, queries: Tensor) -> Tensor:
        return (queries if self._visual is None else self._visual.features(queries)).to(self.cache.device)

    def _of(self, prompts: Tensor) -> Tensor:
        """Compute text weights of shape ``[c, d]`` from prompt features of shape ``[c t, d]``, for ``t`` templates."""
        means = prompts.reshape(len(self.cache.class_names), -1, prompts.shape[1]).mean(dim=1)
        return functional.normalize(means, dim=1).to(self.cache.device)

    def _blend(self, features: Tensor, cache_logits: Tensor, text_weights: Tensor) -> Tensor:
        text = tip.text_logits(features, text_weights, self.cache.settings.logit_scale)
        return tip.Terms(text, cache_logits).logits(self.cache.settings)


Inputs = TypeVar("Inputs", Tensor, Sequence[str])


@dataclass(frozen=True)
class _Tower(Generic[Inputs]):
    """An encoder in training. Features are computed twice, so that memory use does not grow with the batch size."""

    parameters: list[torch.nn.Parameter]
    forward: Callable[[Inputs], Tensor]
    size: int

    @torch.no_grad()
    def features(self, inputs: Inputs) -> Tensor:
        return torch.cat([self._unit(part) for part in self._parts(inputs)])

    def backward(self, inputs: Inputs, gradient: Tensor) -> None:
        for part, wanted in zip(self._parts(inputs), gradient.split(self.size), strict=True):
            features = self._unit(part)
            features.backward(wanted.to(features.device))

    def _unit(self, inputs: Inputs) -> Tensor:
        return functional.normalize(self.forward(inputs).float(), dim=1)

    def _parts(self, inputs: Inputs) -> list[Inputs]:
        return [inputs[start : start + self.size] for start in range(0, len(inputs), self.size)]


def cosine(step: int, steps: int, lr: float) -> float:
    """Return the learning rate of a step. It falls from ``lr`` to 0 as ``lr (1 + cos(pi step / steps)) / 2``."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


def faster_precision(cache: CacheModel, batch: int) -> Literal["float32", "bfloat16"]:
    """Return ``bfloat16`` if it multiplies keys and ``batch`` queries at least :data:`WORTH` times as fast.

    A small index always uses ``float32``, so that its result is the same on all machines.
    """
    if cache.n * cache.d <= SMALL:
        return "float32"
    keys = torch.ones(BLOCK if cache.device == "cpu" else GPU_BLOCK, cache.d, device=cache.device)
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for turn in range(6):
        for name, lasted in seconds.items():
            block, queries = keys.to(getattr(torch, name)), keys[:batch].to(getattr(torch, name))
            start = time.perf_counter()
            tip.affinity(block, queries)[0, 0].item()
            if turn:  # the first round warms up
                lasted.append(time.perf_counter() - start)
    ratio = statistics.median(seconds["float32"]) / statistics.median(seconds["bfloat16"])
    return "bfloat16" if ratio >= WORTH else "float32"
