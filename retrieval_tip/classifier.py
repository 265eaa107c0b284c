"""Answers: what an index says of a query, wherever its keys are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.backbones.open_clip import Identity
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, counted
from retrieval_tip.html import markup, table
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.retrieval.logits import LOGITS, Nearest, Retrieval, slices
from retrieval_tip.store.manifest import Manifest

SHOWN_CLASSES, SHOWN_PREDICTIONS = 8, 50
"""How many of each a notebook shows."""

GROWTH, ALL_FROM = 4, 8
"""A query that is not settled meets so many times the keys; where these are more than an eighth of all, all."""


@dataclass(frozen=True)
class Neighbour:
    """A key near a query: what it is, its ``affinity`` and its ``weight`` ``exp(-beta (1 - affinity))``."""

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    ``label`` and ``probability`` (softmax of the blended logits / temperature) of the winner; ``labels`` and
    ``probabilities`` of the ``top`` classes; ``text_logit`` and ``cache_logit`` are the two parts of the winner's logit
    (the latter with alpha, so that they add up to it); ``logits`` ``[c]`` float32 in the index's order, ``None`` where
    the classes are so many that only a shortlist was compared, which the probabilities are then over; the nearest
    ``neighbours``. ``keys``: how many of the keys settled the answer, where it was certified.
    """

    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]
    text_logit: float
    cache_logit: float
    logits: npt.NDArray[np.float32] | None = field(compare=False)
    neighbours: list[Neighbour]
    keys: int | None = None

    def _repr_html_(self) -> str:
        """For notebooks: the classes, the two parts of the winner's logit, and the neighbours."""
        classes = zip(self.labels, (f"{probability:.4f}" for probability in self.probabilities), strict=True)
        caption = f"text {self.text_logit:.4g} + cache {self.cache_logit:.4g}"
        near = (
            (f"{key.affinity:.4f}", f"{key.weight:.1e}", key.label, key.source, key.key_id) for key in self.neighbours
        )
        columns = ("affinity", "weight", "label", "source", "key")
        neighbours = table(columns, near, "nearest keys", numbers=(0, 1, 4)) if self.neighbours else ""
        return f"<div>{table(('class', 'probability'), classes, caption, numbers=(1,))}{neighbours}</div>"


class Predictions(list[Prediction]):
    """Predictions in the order of their queries: a list that notebooks show as a table."""

    def _repr_html_(self) -> str:
        """For notebooks: a row a prediction, the first :data:`SHOWN_PREDICTIONS`."""
        cut = f"; the first {SHOWN_PREDICTIONS}" if len(self) > SHOWN_PREDICTIONS else ""
        columns = ("query", "label", "probability", "text logit", "cache logit", "affinity", "nearest key")
        rows = []
        for place, found in enumerate(self[:SHOWN_PREDICTIONS]):
            key = found.neighbours[0] if found.neighbours else None
            near = (f"{key.affinity:.4f}", f"{key.label} ({key.source})") if key else ("-", "-")
            figures = (f"{found.probability:.4f}", f"{found.text_logit:.4g}", f"{found.cache_logit:.4g}")
            rows.append((place, found.label, *figures, *near))
        return table(columns, rows, counted(len(self), "prediction") + cut, numbers=(0, 2, 3, 4, 5))


@dataclass(frozen=True)
class Evidence:
    """What the answer to one query is made of: enough to weigh it anew, with another alpha, beta or k.

    ``feature`` ``[d]`` and ``text`` ``[c]``, its text logits, float32; of the ``m`` nearest keys, nearest first,
    ``key_ids``, ``class_ids`` int64 and ``affinities`` float32; ``counts`` ``[c]`` int64 and ``sums`` ``[c]`` float32:
    how many keys a class has, and the sum of the affinities to all of them. ``complete``: these are all keys.
    """

    feature: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]
    key_ids: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int64]
    affinities: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float32]
    complete: bool


@dataclass(frozen=True)
class Certified:
    """Logits whose winners are those over all keys, by :meth:`CacheModel.certified`.

    ``text`` and ``cache`` ``[q, c]`` as :meth:`CacheModel.terms` gives them; ``keys`` ``[q]`` int64, how many of the
    nearest keys settled each query, ``n`` where it took all; ``proved``, whether that is proof: after exact search it
    is, after approximate search it is evidence, and the winners agree with those over all keys as far as was looked.
    """

    text: Tensor
    cache: Tensor
    keys: Tensor
    proved: bool


class Classifier(ABC):
    """An index that answers: keys, wherever they are kept, and ``text_weights`` ``[c, d]`` float32 of the classes.

    ``alpha``, ``beta``, ``k`` (``None`` is all) and ``tail`` are the settings kept with an index; ``temperature``
    divides the logits where they become probabilities, and nowhere else. ``values`` are those of a fine-tuned cache,
    ``tuned`` the weights of a fine-tuned encoder. ``folder`` and ``version`` say which version of what this is.
    """

    class_names: list[str]
    text_weights: Tensor
    alpha: float
    beta: float
    logit_scale: float
    k: int | None
    tail: bool
    temperature: float
    templates: list[str]
    backbone: Identity | None
    provenance: dict[str, Any]
    device: str
    version: int | None
    values: Tensor | None
    tuned: Path | None

    @property
    @abstractmethod
    def n(self) -> int:
        """Number of keys."""

    @property
    @abstractmethod
    def d(self) -> int:
        """Length of a feature."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Of the stored keys: float32 or float16."""

    @property
    @abstractmethod
    def retrieval(self) -> Retrieval:
        """What finds the keys, with the settings as they are now."""

    @property
    @abstractmethod
    def index_type(self) -> str:
        """Factory of the index over the keys."""

    @property
    @abstractmethod
    def exact_search(self) -> bool:
        """Whether the nearest keys are always found."""

    @property
    @abstractmethod
    def manifest(self) -> Manifest | None:
        """That of the version that this was loaded from or saved as."""

    @property
    @abstractmethod
    def place(self) -> str | None:
        """Folder or address that this was loaded from or saved to."""

    @abstractmethod
    def reload(self) -> Classifier:
        """The current version of what this was loaded from or saved to; itself, where this is that."""

    @abstractmethod
    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of the label store of the keys that :class:`retrieval.Nearest` knows as ``rows`` ``[m]``."""

    @abstractmethod
    def every_row(self) -> npt.NDArray[np.int64]:
        """What :meth:`described` knows each key by ``[n]``, in the order of :meth:`key_blocks`."""

    @abstractmethod
    def some(self, m: int) -> tuple[npt.NDArray[Any], pa.Table]:
        """At most ``m`` keys, spread evenly over all, as they are stored, and their ``key_id`` and ``class_id``."""

    @abstractmethod
    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """The label store's rows of these classes and key ids (all, where none is named) whose source has that text.

        Case does not matter in ``source``.
        """

    def every_class(self) -> Self:
        """Itself, as it answers with the logits of every class, however many there are."""
        return self

    @property
    def counts(self) -> list[int]:
        """Keys of each class ``[c]``."""
        found: list[int] = self.retrieval.keys.counts.long().tolist()
        return found

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n} keys of {self.d}, {len(self.class_names)} classes, "
            f"index={self.index_type!r}, alpha={self.alpha:g}, beta={self.beta:g}, k={self.k or 'all'}, "
            f"device={self.device!r})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: what this index holds, its settings, and where it comes from."""
        few = ", ".join(
            f"{name} {number}" for name, number in zip(self.class_names[:SHOWN_CLASSES], self.counts, strict=False)
        )
        more = f" and {len(self.class_names) - SHOWN_CLASSES:,} more" if len(self.class_names) > SHOWN_CLASSES else ""
        settings = f"alpha {self.alpha:.4g}, beta {self.beta:.4g}, k {self.k or 'all'}, "
        settings += f"{'with' if self.tail else 'without'} tail, temperature {self.temperature:.4g}"
        rows: list[tuple[str, object]] = [
            ("keys", f"{self.n:,} of {self.d:,} values, {self.dtype}"),
            ("classes and their keys", f"{len(self.class_names):,}: {few}{more}"),
            ("settings", settings),
            ("text", f"logit scale {self.logit_scale:.4g}" if self.has_text else "none: the cache alone decides"),
            ("index", f"{self.index_type} on {self.device}"),
            ("backbone", self.backbone or "unnamed"),
            ("folder", f"{self.place}, version {self.version}" if self.place else "not from a folder"),
        ]
        return table((), rows, markup(f"<b>{type(self).__name__}</b>"))

    @property
    def has_text(self) -> bool:
        """Whether there are text weights; without them zero-shot logits are 0 and the cache alone decides."""
        return bool(self.text_weights.any())

    def terms(self, features: Features, k: int | None = None, tail: bool = True) -> tuple[Tensor, Tensor]:
        """The two parts of the logits: text ``logit_scale * f W^T`` and cache ``C`` (without alpha), ``[q, c]`` each.

        Arguments and errors as for :meth:`logits`.
        """
        inputs.check_settings(self.alpha, self.beta, k, self.logit_scale)
        text, cache, _ = self.retrieval.terms(inputs.queries(features, self.d).to(self.device), k, tail, certify=False)
        self._check_overflow(text, cache)
        return text, cache

    def _check_overflow(self, text: Tensor, cache: Tensor) -> None:
        largest = (_largest(text), _largest(cache)) if len(text) else (text.new_zeros(()), cache.new_zeros(()))
        if not torch.isfinite(largest[1]):
            raise InputError(
                f"beta {self.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller one"
            )
        if not torch.isfinite(tip.blend(*largest, self.alpha)):
            raise InputError(
                f"alpha {self.alpha:g} or logit_scale {self.logit_scale:g}: too large, the logits overflow; "
                "use smaller ones"
            )

    def certified(self, features: Features, k: int | None = None, tail: bool = True) -> Certified:
        """Text and cache logits from as few keys as settle each query: ``k``, then four times as many, at last all.

        A query is settled where no key that it has not met can change its winner (:func:`tip.certificate`; with an
        index over classes :func:`tip.settled`). A fine-tuned cache with values always takes all keys: what these
        give may be negative. Arguments and errors as for :meth:`logits`.
        """
        inputs.check_settings(self.alpha, self.beta, k, self.logit_scale)
        f = inputs.queries(features, self.d).to(self.device)
        text = f.new_empty(len(f), len(self.class_names))
        cache, keys = torch.empty_like(text), torch.full((len(f),), self.n)
        left = torch.arange(len(f), device=self.device)
        while len(left):
            if k is not None and (k > self.n // ALL_FROM or self.values is not None):
                k = None
            text[left], cache[left], settled = self.retrieval.terms(f[left], k, tail, certify=True)
            keys[left.cpu()] = self.n if k is None else k
            left, k = left[~settled], None if k is None else k * GROWTH
        self._check_overflow(text, cache)
        return Certified(text, cache, keys, proved=self.exact_search)

    def logits(self, features: Features, k: int | None = None, tail: bool = True) -> Tensor:
        """Blended logits ``logit_scale * f W^T + alpha * C`` ``[q, c]`` float32, classes in the index's order.

        Args:
            features: ``[q, d]`` unit-norm features, array or tensor.
            k: how many of the nearest keys a query uses; ``None`` is all of them, Tip-Adapter exactly.
            tail: with ``k``, estimate what the keys that were not retrieved add (see :func:`tip.cache_logits`).

        Raises InputError where features are not finite or not ``[q, d]``, or logits overflow; UsageError where ``k``
        is below 1.
        """
        text, cache = self.terms(features, k, tail)
        return tip.blend(text, cache, self.alpha)

    def classify(
        self,
        features: Features,
        top: int = 1,
        k: int | None = None,
        tail: bool = True,
        neighbours: int = 5,
        certify: bool = False,
    ) -> Predictions:
        """One :class:`Prediction` a query: label, probability, and the ``neighbours`` nearest keys that made it.

        Arguments as for :meth:`logits`; ``top`` classes are reported, most probable first; with ``certify`` each query
        meets as many keys as settle its label (:meth:`certified`).
        """
        if top < 1:
            raise UsageError(f"top is {top}: at least 1 class has to be reported")
        classes, text, cache, keys = self._answers(features, top, k, tail, certify)
        logits = tip.blend(text, cache, self.alpha)
        places = logits.topk(min(top, logits.shape[1]), dim=1).indices  # no temperature can change it
        ranked = places if classes is None else classes.gather(1, places)
        chances = tip.probabilities(logits, self.temperature).gather(1, places)
        near = self._neighbours(features, min(neighbours, k or neighbours)) if neighbours > 0 else [[]] * len(logits)
        winner = places[:, :1]
        own_text, own_cache = text.gather(1, winner), cache.gather(1, winner)
        weighted = tip.blend(torch.zeros_like(own_cache), own_cache, self.alpha)
        parts = torch.cat([own_text, weighted], dim=1).tolist()
        rows = logits.cpu().numpy() if classes is None else [None] * len(logits)
        by_query = zip(chances.tolist(), ranked.tolist(), parts, rows, near, keys, strict=True)
        return Predictions(
            Prediction(
                label=self.class_names[ids[0]],
                probability=probabilities[0],
                labels=[self.class_names[i] for i in ids],
                probabilities=probabilities,
                text_logit=part[0],
                cache_logit=part[1],
                logits=row,
                neighbours=nearest,
                keys=number,
            )
            for probabilities, ids, part, row, nearest, number in by_query
        )

    def _answers(
        self, features: Features, top: int, k: int | None, tail: bool, certify: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Sequence[int | None]]:
        """The classes that logits are of, ``None`` for all; text and cache logits; the keys that settled each query.

        ``top`` classes at least.
        """
        if certify:
            found = self.certified(features, k, tail)
            return None, found.text, found.cache, found.keys.tolist()
        text, cache = self.terms(features, k, tail)
        return None, text, cache, [None] * len(text)

    def classify_source(
        self,
        source: Source,
        encoder: Encoder,
        top: int = 1,
        k: int | None = None,
        tail: bool = True,
        neighbours: int = 5,
        certify: bool = False,
    ) -> Iterator[tuple[str, Prediction]]:
        """Classify images or a feature table: name and prediction of each item that could be read, in order.

        ``encoder`` needs the backbone of this index for images; ``encoder.skipped`` names what could not be read. The
        other arguments as for :meth:`classify`.
        """
        column = source.items["source"]
        for block in encoder.blocks(source):
            for part in self.parts(len(block.positions)):
                found = self.classify(block.features[part], top, k, tail, neighbours, certify)
                names = column.take(pa.array(block.positions[part])).to_pylist()  # all at once would be many
                yield from zip(names, found, strict=True)

    def evidence(self, features: Features, complete: int = 1 << 14, nearest: int = 2048) -> list[Evidence]:
        """:class:`Evidence` of queries ``[q, d]``: all keys, where these are ``complete`` at most, else ``nearest``.

        Raises InputError where features are not finite or not ``[q, d]``.
        """
        f = inputs.queries(features, self.d).to(self.device)
        retrieval, keys = self.retrieval, self.retrieval.keys
        near = self._every(f) if self.n <= complete else retrieval.nearest(f, nearest)
        used, where = np.unique(near.rows.clamp_min(0).cpu().numpy(), return_inverse=True)
        key_ids = self.described(used, ["key_id"])["key_id"].to_numpy()[where].reshape(near.rows.shape)
        text = tip.text_logits(f, self.text_weights, self.logit_scale).cpu().numpy()
        sums = tip.Totals.of(f, keys.sums, keys.counts).affinities.cpu().numpy()
        counts, class_ids = keys.counts.long().cpu().numpy(), near.class_ids.cpu().numpy()
        affinity, there = near.affinity.cpu().numpy(), (near.rows >= 0).cpu().numpy()
        return [
            Evidence(
                feature=feature,
                text=own_text,
                key_ids=key_ids[q][there[q]],
                class_ids=class_ids[q][there[q]],
                affinities=affinity[q][there[q]],
                counts=counts,
                sums=own_sums,
                complete=self.n <= complete,
            )
            for q, (feature, own_text, own_sums) in enumerate(zip(f.cpu().numpy(), text, sums, strict=True))
        ]

    def _every(self, features: Tensor) -> Nearest:
        """All keys, nearest first."""
        blocks = [(tip.affinity(features, keys), ids.clone()) for keys, ids in self.key_blocks()]
        affinity, order = torch.cat([found for found, _ in blocks], dim=1).sort(dim=1, descending=True, stable=True)
        rows, ids = torch.from_numpy(self.every_row()).to(order.device), torch.cat([ids for _, ids in blocks])
        return Nearest(affinity, rows[order], ids[order])

    def parts(self, q: int) -> Iterator[slice]:
        """Slices of ``q`` queries that have :data:`LOGITS` logits at most."""
        return slices(q, max(1, LOGITS // len(self.class_names)))

    def ids_of(self, source: Source) -> npt.NDArray[np.int64]:
        """Class ids of the items of a labelled source.

        Raises InputError where it has no items, or labels that are no class of the index.
        """
        position = {name: i for i, name in enumerate(self.class_names)}
        labels = source.labels
        if not labels:
            raise InputError(f"{source.name}: has no items")
        unknown = sorted(set(labels) - position.keys())
        if unknown:
            raise InputError(
                f"{source.name}: {len(unknown)} labels are no class of the index: {', '.join(unknown[:5])}; "
                f"its classes are {', '.join(self.class_names[:5])}{' ...' if len(self.class_names) > 5 else ''}"
            )
        return np.array([position[label] for label in labels], dtype=np.int64)

    def _neighbours(self, features: Features, number: int) -> list[list[Neighbour]]:
        """The nearest keys of each query, described."""
        f = inputs.queries(features, self.d).to(self.device)
        near = self.retrieval.nearest(f, number)
        rows = near.rows.cpu().numpy()
        weights = tip.weight(near.affinity, self.beta).tolist()
        used, where = np.unique(rows[rows >= 0], return_inverse=True)
        described = self.described(used, ["key_id", "source", "label"]).to_pylist()
        place = np.full(rows.shape, -1)
        place[rows >= 0] = where
        return [
            [
                Neighbour(**described[place[q, j]], affinity=value, weight=weights[q][j])
                for j, value in sorted(enumerate(values), key=lambda pair: -pair[1])
                if place[q, j] >= 0
            ]
            for q, values in enumerate(near.affinity.tolist())
        ]

    def key_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys ``[b, d]`` float32 and their class ids ``[b]``, a block at a time, on the device."""
        return self.retrieval.keys.blocks()


def _largest(logits: Tensor) -> Tensor:
    """The largest absolute value, NaN where there is one; without a copy of the logits."""
    return torch.stack(logits.aminmax()).abs().amax()


def spread(n: int, m: int) -> npt.NDArray[np.int64]:
    """At most ``m`` of ``n`` places, ascending and evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, m)).round().astype(np.int64))
