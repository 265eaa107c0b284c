"""What is fine-tuned, and one step of it: keys, values and encoders with their optimisers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.backbones.base import PARTS, Trainable
from retrieval_tip.backbones.prompts import prompts_of
from retrieval_tip.bounds import check_count
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import UsageError
from retrieval_tip.fit.adamw import AdamW, BlockAdamW, RowAdamW
from retrieval_tip.fit.gradient import BLOCK, GPU_BLOCK, AllKeys, RetrievedKeys
from retrieval_tip.retrieval.terms import Terms
from retrieval_tip.retrieval.vector_index import VectorIndex

TRAIN = ("keys", "values", *PARTS)
"""What can be trained: the keys (Tip-Adapter-F), what each gives to each class (``[n, c]``), and the two encoders."""

ENCODER_RATE = 1e-3
"""The learning rate of an encoder, as a part of the keys'."""

VIEWS = 16
"""Cached views a shot, where nothing else is asked for."""

SETTINGS = ("tried", "own")
PRECISIONS = ("auto", "float32", "bfloat16")
WORTH = 1.5
"""``auto`` takes bfloat16 where the products are so many times as fast in it."""
SMALL = 1 << 22
"""Up to so many values of keys ``auto`` stays with float32: there is no time to gain."""

TEXTS = 256
"""Prompts that are encoded at a time."""

QUERIES = 256
"""Queries that are evaluated at a time."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune; what is left out is the paper's.

    - ``train``: which of :data:`TRAIN`
    - ``epochs``; ``batch``: queries a step
    - ``lr``: falls to 0 along a cosine, step by step; encoders learn at a thousandth of it; ``eps`` and
      ``weight_decay`` are AdamW's
    - ``views``: so many augmented views of each shot are encoded once and drawn from; ``None`` encodes a fresh one
      every epoch as the paper's code does, which the image encoder needs where it is trained
    - ``train_k``: only so many nearest keys of each query are trained, the others count as a tail
    - ``precision``: of the matrix products; ``auto`` is bfloat16 where that is measured to be worth it
    - ``seed``: of batches and views
    - ``settings``: alpha and beta to train with. ``own``: the index's. ``tried``: the best on the validation
      images, where there are some, of the index's and a few flatter ones, each tried for a quarter of the epochs: what
      classifies well need not teach well, as a sharp exponential leaves little gradient. Encoders always take ``own``.
    - ``alpha``, ``beta``: to train with, in place of the index's; either implies ``own``

    Raises UsageError naming what cannot be.
    """

    train: tuple[str, ...] = ("keys",)
    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    eps: float = 1e-4
    weight_decay: float = 0.01
    views: int | None = VIEWS
    train_k: int | None = None
    precision: str = "auto"
    seed: int = 1
    settings: str = "tried"
    alpha: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        if not self.train or len(set(self.train)) < len(self.train) or not set(self.train) <= set(TRAIN):
            raise UsageError(f"train {', '.join(self.train) or '(nothing)'}: expected some of {', '.join(TRAIN)}")
        for name, fewest in (("epochs", 1), ("batch", 1), ("views", 1), ("train_k", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None:
                check_count(name, value, fewest)
        for name, least in (("lr", 0.0), ("eps", 0.0), ("weight_decay", -1e-300)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > least):
                raise UsageError(f"{name} is {value}: expected a finite number {'above' if least == 0 else 'from'} 0")
        if self.settings not in SETTINGS:
            raise UsageError(f"settings {self.settings!r}: expected one of {', '.join(SETTINGS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if self.train_k is not None and self.train != ("keys",):
            raise UsageError("train_k: goes with keys alone; leave out what else is trained")
        if "visual" in self.train and self.views is not None:
            raise UsageError("views: cached ones are the untrained encoder's; where visual is trained they are fresh")


class Trainer:
    """The trained parts of an index, their optimisers, and a step of them.

    ``keys`` ``[n, d]`` float32 and ``values`` ``[n, c]`` (``None``: one-hot) are copies of the index's;
    ``text_weights`` ``[c, d]`` follow the text encoder where that is trained. ``backbone`` is changed in place.
    """

    def __init__(self, cache: CacheModel, recipe: Recipe, backbone: Trainable | None) -> None:
        self.cache, self.recipe, self.backbone = cache, recipe, backbone
        self.keys = torch.from_numpy(np.array(cache.keys, dtype=np.float32)).to(cache.device)
        self.values = None if cache.values is None else cache.values.clone()
        if self.values is None and "values" in recipe.train:  # they begin as one-hot rows
            self.values = functional.one_hot(cache.class_ids, len(cache.class_names)).float()
        self.text_weights = cache.text_weights.clone()
        options = {"eps": recipe.eps, "weight_decay": recipe.weight_decay}
        self._over: Any  # _All or _Nearest
        if recipe.train_k is None:
            self._over = _All(self, options)
        else:
            self._over = _Nearest(self, recipe.train_k, options)
        self._towers: dict[str, _Tower] = {}
        for part in PARTS:
            if part in recipe.train:
                assert backbone is not None
                self._towers[part] = _Tower(backbone, part, options)
        self._prompts = prompts_of(cache.class_names, cache.templates) if "text" in recipe.train else []

    def step(self, queries: Tensor, ids: Tensor, lr: float) -> tuple[float, int]:
        """One step on features ``[b, d]`` (pixels ``[b, 3, h, w]`` where visual is trained) of classes ``ids`` ``[b]``.

        Returns the mean cross-entropy before the step, and how many queries were right. Where the former is not finite
        nothing is changed.
        """
        visual, text = self._towers.get("visual"), self._towers.get("text")
        features, ids = self._features(queries), ids.to(self.cache.device)
        prompts = None if text is None else text.features(self._prompts)
        cache_logits, met = self._over.forward(features)
        for tensor in (cache_logits, *([features] if visual else []), *([] if prompts is None else [prompts])):
            tensor.requires_grad_()
        logits = self._blend(features, cache_logits, self.text_weights if prompts is None else self._of(prompts))
        loss = functional.cross_entropy(logits, ids)
        hits = (logits.argmax(dim=1) == ids).sum()
        value, right = torch.stack([loss.detach(), hits.to(loss)]).tolist()  # a GPU is waited for once
        if math.isfinite(value):
            loss.backward()
            assert cache_logits.grad is not None
            self._over.step(cache_logits.grad, features.detach(), met, lr, features.grad)
            if visual is not None and features.grad is not None:
                visual.step(queries, features.grad, lr)
            if text is not None and prompts is not None and prompts.grad is not None:
                text.step(self._prompts, prompts.grad, lr)
        return value, int(right)

    def loss(self, queries: Tensor, ids: Tensor) -> float:
        """Mean cross-entropy of queries as :meth:`step` takes them, as things stand."""
        return self.evaluate(self._features(queries), ids.to(self.cache.device))[0]

    @torch.no_grad()
    def evaluate(self, features: Tensor, ids: Tensor) -> tuple[float, float]:
        """Mean cross-entropy and accuracy of queries ``[q, d]`` of classes ``ids`` ``[q]``, as things stand."""
        loss, right = 0.0, 0
        for f, y in zip(features.split(QUERIES), ids.split(QUERIES), strict=True):
            logits = self._blend(f, self._over.forward(f)[0], self.text_weights)
            loss += float(functional.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(dim=1) == y).sum())
        return loss / len(ids), right / len(ids)

    def refresh(self) -> None:
        """Follow what was trained: the text weights their encoder, the index that keys are retrieved from the keys."""
        if "text" in self._towers:
            self.text_weights = self._of(self._towers["text"].features(self._prompts))
        self._over.refresh()

    def trained(self) -> dict[str, Tensor]:
        """Copies on the CPU of what is trained, by name; encoders' tensors as ``encoder.NAME``."""
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in self._in_training().items()}
        return copies | {f"encoder.{name}": tensor for name, tensor in self.encoders().items()}

    def _in_training(self) -> dict[str, Tensor]:
        """What is trained beside encoders."""
        parameters = {part: tensor for part, tensor in self._matrices() if part in self.recipe.train}
        return parameters | ({"text_weights": self.text_weights} if "text" in self.recipe.train else {})

    def check(self, trained: Mapping[str, Tensor]) -> None:
        """Raise ValueError naming the tensor that :meth:`trained` does not have like this."""
        own = self._in_training() | {f"encoder.{name}": tensor for name, tensor in self.encoders().items()}
        if odd := sorted(own.keys() ^ trained.keys()):
            raise ValueError(f"tensor {odd[0]!r} is missing, or of another run")
        for name, tensor in trained.items():
            if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype):
                raise ValueError(f"tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}")

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`trained`. Raises as :meth:`check`; then nothing was changed."""
        self.check(trained)
        for part, tensor in self._matrices():
            if part in trained:
                tensor.copy_(trained[part])
        if "text_weights" in trained:
            self.text_weights = trained["text_weights"].to(self.cache.device)
        encoders = {name.partition(".")[2]: part for name, part in trained.items() if name.startswith("encoder.")}
        if encoders:
            assert self.backbone is not None
            self.backbone.adopt(encoders)
        self._over.refresh()

    def encoders(self) -> dict[str, Tensor]:
        """Copies of the tensors of the encoders that are trained; of both, where the backbone was tuned before."""
        if self.backbone is None or not self._towers:
            return {}
        return self.backbone.tuned(list(self._towers) if self.cache.tuned is None else PARTS)

    def moments(self) -> dict[str, Tensor]:
        """State of the optimisers, by name."""
        return {f"{part}.{name}": t for part, own in self._optimizers().items() for name, t in own.state().items()}

    def restore_moments(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`moments`. Raises ValueError naming what does not fit."""
        for part, optimizer in self._optimizers().items():
            start = f"{part}."
            optimizer.restore({name[len(start) :]: t for name, t in state.items() if name.startswith(start)})

    def _matrices(self) -> list[tuple[str, Tensor]]:
        return [(part, matrix) for part, matrix in (("keys", self.keys), ("values", self.values)) if matrix is not None]

    def _optimizers(self) -> dict[str, AdamW | RowAdamW]:
        return {**self._over.optimizers, **{part: tower.optimizer for part, tower in self._towers.items()}}

    def _features(self, queries: Tensor) -> Tensor:
        visual = self._towers.get("visual")
        return (queries if visual is None else visual.features(queries)).to(self.cache.device)

    def _of(self, prompts: Tensor) -> Tensor:
        """Text weights ``[c, d]`` of unit features of prompts ``[c t, d]``, class by class: as in :mod:`prompts`."""
        means = prompts.reshape(len(self.cache.class_names), -1, prompts.shape[1]).mean(dim=1)
        return functional.normalize(means, dim=1).to(self.cache.device)

    def _blend(self, features: Tensor, cache_logits: Tensor, text_weights: Tensor) -> Tensor:
        text = tip.text_logits(features, text_weights, self.cache.settings.logit_scale)
        return Terms(text, cache_logits).logits(self.cache.settings)


class _All:
    """Every query meets every key; keys, values or neither are trained."""

    def __init__(self, trainer: Trainer, options: dict[str, float]) -> None:
        cache, train = trainer.cache, trainer.recipe.train
        block = BLOCK if cache.device == "cpu" else GPU_BLOCK
        products = getattr(torch, trainer.recipe.precision)
        c = len(cache.class_names)
        self._memory = trainer.keys.new_empty(0)
        self._keys = AllKeys(trainer.keys, cache.class_ids, c, cache.settings.beta, trainer.values, products, block)
        self.optimizers = {
            part: BlockAdamW(matrix, block, **options)
            for part, matrix in (("keys", trainer.keys), ("values", trainer.values))
            if part in train and matrix is not None
        }

    @torch.no_grad()
    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cache logits, and the weights of the keys, until the next forward."""
        size = len(self._keys.keys) * len(features)
        if len(self._memory) < size:
            self._memory = features.new_empty(size)
        return self._keys.forward(features, self._memory)

    @torch.no_grad()
    def step(self, d_cache: Tensor, features: Tensor, weights: Tensor, lr: float, d_features: Tensor | None) -> None:
        """Train by the gradient of the cache logits; that of the queries is added to ``d_features``."""
        wanted = {"keys": "keys" in self.optimizers, "values": "values" in self.optimizers}
        for block in self._keys.backward(d_cache, features, weights, d_features=d_features, **wanted):
            if block.keys is not None:
                self.optimizers["keys"].step_block(block.part, block.keys, lr)
            if block.values is not None:
                self.optimizers["values"].step_block(block.part, block.values, lr)

    def refresh(self) -> None:
        """Nothing is kept beside the keys."""


class _Nearest:
    """Every query meets its ``k`` nearest keys, found by an index that follows them; only these keys are trained."""

    def __init__(self, trainer: Trainer, k: int, options: dict[str, float]) -> None:
        cache = trainer.cache
        self._matrix, self._k = trainer.keys, k
        factory = "Flat" if cache.index.by_class else cache.index.factory
        self._index = VectorIndex.build(trainer.keys.cpu().numpy(), factory, cache.device)
        counts = torch.bincount(cache.class_ids, minlength=len(cache.class_names))
        self._sums = torch.zeros(len(counts), cache.d, device=cache.device)
        self._keys = RetrievedKeys(trainer.keys, cache.class_ids, self._sums, counts, cache.settings.beta)
        self.optimizers = {"keys": RowAdamW(trainer.keys, **options)}
        self._sum()

    @torch.no_grad()
    def forward(self, features: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Cache logits, and the retrieved rows with their weights."""
        _, rows = self._index.search_tensor(features, self._k)
        cache_logits, weights = self._keys.forward(features, rows)
        return cache_logits, (rows, weights)

    @torch.no_grad()
    def step(
        self, d_cache: Tensor, features: Tensor, met: tuple[Tensor, Tensor], lr: float, d_features: Tensor | None
    ) -> None:
        """Train the retrieved keys."""
        assert d_features is None
        rows, gradient = self._keys.backward(d_cache, features, *met)
        change = self.optimizers["keys"].step_rows(rows, gradient, lr)
        self._sums.index_add_(0, self._keys.class_ids[rows], change)

    def refresh(self) -> None:
        """Put the keys as they are now into the index."""
        self._index.refresh(self._matrix.cpu().numpy())
        self._sum()

    def _sum(self) -> None:
        self._sums.zero_().index_add_(0, self._keys.class_ids, self._matrix)


class _Tower:
    """An encoder in training.

    Features are made without a graph, and once more with one when their gradient is known, some inputs at a time: so
    memory does not grow with the batch.
    """

    def __init__(self, backbone: Trainable, part: str, options: dict[str, float]) -> None:
        self._backbone, self._part = backbone, part
        self._forward: Callable[[Any], Tensor] = backbone.forward_images if part == "visual" else backbone.forward_texts
        self._size = backbone.batch_size if part == "visual" else TEXTS
        self.optimizer = AdamW(backbone.parameters(part), **options)

    @torch.no_grad()
    def features(self, inputs: Any) -> Tensor:
        """Unit features ``[m, d]`` of pixels or prompts."""
        return torch.cat([self._unit(part) for part in self._parts(inputs)])

    def step(self, inputs: Any, gradient: Tensor, lr: float) -> None:
        """Train by the gradient ``[m, d]`` of the unit features of these inputs."""
        with self._backbone.training([self._part]):
            for part, wanted in zip(self._parts(inputs), gradient.split(self._size), strict=True):
                features = self._unit(part)
                features.backward(wanted.to(features.device))
            self.optimizer.step(ENCODER_RATE * lr)

    def _unit(self, inputs: Any) -> Tensor:
        return functional.normalize(self._forward(inputs).float(), dim=1)

    def _parts(self, inputs: Any) -> list[Any]:
        return [inputs[start : start + self._size] for start in range(0, len(inputs), self._size)]


def faster_precision(cache: CacheModel, batch: int, rounds: int = 5) -> str:
    """``bfloat16`` where products of keys with ``batch`` queries are :data:`WORTH` times as fast in it, or more.

    Measured on a block of ones. Small caches stay with ``float32``, so that machines agree on them.
    """
    if cache.n * cache.d <= SMALL:
        return "float32"
    keys = torch.ones(BLOCK if cache.device == "cpu" else GPU_BLOCK, cache.d, device=cache.device)
    seconds: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for turn in range(rounds + 1):
        for name, lasted in seconds.items():
            block, queries = keys.to(getattr(torch, name)), keys[:batch].to(getattr(torch, name))
            start = time.perf_counter()
            tip.affinity(block, queries)[0, 0].item()
            if turn:  # the first round warms up
                lasted.append(time.perf_counter() - start)
    ratio = statistics.median(seconds["float32"]) / statistics.median(seconds["bfloat16"])
    return "bfloat16" if ratio >= WORTH else "float32"
