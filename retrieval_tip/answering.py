"""Turn logits into predictions, for an index in a folder or in another store."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.backbones.base import Identity
from retrieval_tip.bounds import check_count
from retrieval_tip.data.encoder import Encoder, FeatureBlock
from retrieval_tip.data.shots import spread
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, warn_once
from retrieval_tip.html import markup, table
from retrieval_tip.predictions import PREDICTIONS, SCHEMA, Predictions, SimilarShot, lists
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.defaults import Statistics
from retrieval_tip.retrieval.evidence import Contributors, Nearest
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.logits import LOGITS, AnswerTerms, Retrieval, first_two, slices
from retrieval_tip.retrieval.vector_index import GPU_MAX_K
from retrieval_tip.settings import Ask, AskOptions, Built, Dtype, Fitted, KeysMet, Norms, Settings
from retrieval_tip.store import history
from retrieval_tip.store.manifest import DataFile, Manifest, Table

if TYPE_CHECKING:
    from retrieval_tip.cache_model import CacheModel

SHOWN_CLASSES = 8
"""Number of classes shown in a notebook."""

ASKED = 16
"""Number of keys that are used as queries to check the logits before a version is written."""

MOST_EXPONENT = 80.0
"""Maximum exponent in the weight of a key. In float32, the exponential overflows just above 88."""

PREDICTED = 1 << 16
"""Maximum number of queries that are classified at a time."""

GROWTH, ALL_FROM = 4, 8
"""Limits of the retries of :meth:`AnsweringIndex.certified`.

Each retry uses 4 times as many keys. If that is more than an eighth of the index (or ``GPU_MAX_K`` on a GPU), it uses
all keys, because comparing a query with every key is then faster than a search.
"""


class AnsweringIndex(ABC):
    """Base class of the indexes that classify.

    Attributes:
        text_weights: the text weights of the classes, as a float32 tensor of shape ``[c, d]``.
        settings: the defaults for every call.
        labels: the label store, which has one row per key.
        next_key_id: the smallest key id that has never been used.
        metric: the fitted metric (see :mod:`tip`), or ``None``.
        values: the solved or trained values (see :mod:`tip`), or ``None`` if values are one-hot.
        fitted: a description of how the metric and the values were fitted.
        place: the folder or LanceDB store (``lance://...``) that the index was loaded from.
        version: the version number of the loaded index.
    """

    labels: pa.Table
    class_names: list[str]
    text_weights: Tensor
    settings: Settings
    templates: list[str]
    backbone: Identity | None
    provenance: dict[str, Any]
    built: Built
    device: str
    version: int | None
    next_key_id: int | None
    values: Tensor | None
    metric: tip.Metric | None = None
    fitted: Fitted | None = None

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
    def dtype(self) -> Dtype:
        """Type of the stored keys: float32 or float16."""

    @property
    @abstractmethod
    def retrieval(self) -> Retrieval:
        """The object that retrieves keys, using the current settings."""

    @property
    @abstractmethod
    def index_type(self) -> str:
        """The FAISS factory string of the index."""

    @property
    @abstractmethod
    def exact_search(self) -> bool:
        """Whether a search is guaranteed to find the nearest keys."""

    @property
    @abstractmethod
    def manifest(self) -> Manifest | None:
        """The manifest of the version that this index was loaded from or saved as."""

    @property
    @abstractmethod
    def place(self) -> str | None:
        """The folder or LanceDB store that this index was loaded from or saved to."""

    @abstractmethod
    def reload(self) -> AnsweringIndex:
        """Return the current version of the index, or the index itself if it is up to date."""

    @abstractmethod
    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store for the given ``rows``."""

    @abstractmethod
    def every_row(self) -> npt.NDArray[np.int64]:
        """Return the row numbers of all keys in the order of :meth:`key_blocks`."""

    @abstractmethod
    def rows_of(self, key_ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the row numbers and the class ids of keys. Unknown ids are ignored."""

    @abstractmethod
    def some(self, m: int) -> tuple[npt.NDArray[Any], pa.Table]:
        """Return at most ``m`` evenly spaced stored keys, and their ``key_id`` and ``class_id``."""

    @abstractmethod
    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """Return the rows of the label store that match all of the given filters.

        By default, all classes and key ids match. ``source`` matches any source that contains it, ignoring case.
        """

    @abstractmethod
    def having(self, column: Literal["digest", "source"], values: Iterable[str | None]) -> pa.Table:
        """Return the rows of the label store that have one of the given digests or sources."""

    def known(self, digests: Sequence[str | None]) -> set[tuple[str, str]]:
        """Return the digest and the label of every key that has one of the given digests."""
        same = self.having("digest", digests)
        return set(zip(same["digest"].to_pylist(), same["label"].to_pylist(), strict=True))

    @abstractmethod
    def keys_of(self, key_ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the stored keys with the given ids, of shape ``[m, d]``. All ids must exist."""

    @abstractmethod
    def of_classes(self, class_ids: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Yield the class ids and the stored keys of the given classes, one block at a time."""

    @abstractmethod
    def stored_blocks(self) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        """Yield the labels and the stored keys of the whole index, one block at a time."""

    @abstractmethod
    def statistics(self) -> Statistics | None:
        """Measure the affinities between the transformed keys (see :func:`defaults.measure`)."""

    @abstractmethod
    def take(self, rows: npt.NDArray[np.int64]) -> CacheModel:
        """Return an index in memory over the keys at the given rows. Raises UsageError if there are too many."""

    @abstractmethod
    def in_memory(self) -> CacheModel:
        """Return this index with all keys in memory. Raises UsageError if there are too many."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """Write the next version of an index folder. ``change`` describes it in the history."""

    @property
    def counts(self) -> list[int]:
        """Number of keys in each class."""
        return list(self.retrieval.keys.counts.long().tolist())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n} keys of {self.d}, {len(self.class_names)} classes, "
            f"index={self.index_type!r}, alpha={self.settings.alpha:g}, beta={self.settings.beta:g}, "
            f"k={self.settings.k or 'all'}, device={self.device!r})"
        )

    def _repr_html_(self) -> str:
        shown = zip(self.class_names[:SHOWN_CLASSES], self.counts, strict=False)
        few = ", ".join(f"{name} {number}" for name, number in shown)
        more = f" and {len(self.class_names) - SHOWN_CLASSES:,} more" if len(self.class_names) > SHOWN_CLASSES else ""
        own = self.settings
        settings = f"alpha {own.alpha:.4g}, beta {own.beta:.4g}, k {own.k or 'all'}, "
        settings += f"{'with' if own.tail else 'without'} tail, temperature {own.temperature:.4g}"
        rows: list[tuple[str, object]] = [
            ("keys", f"{self.n:,} of {self.d:,} values, {self.dtype}"),
            ("classes and their keys", f"{len(self.class_names):,}: {few}{more}"),
            ("settings", settings),
            ("text", f"logit scale {own.logit_scale:.4g}" if self.has_text else "none: only the cache is used"),
            ("index", f"{self.index_type} on {self.device}"),
            ("backbone", self.backbone or "unnamed"),
            ("folder", f"{self.place}, version {self.version}" if self.place else "not from a folder"),
        ]
        return table((), rows, markup(f"<b>{type(self).__name__}</b>"))

    @property
    def has_text(self) -> bool:
        """Whether the index has text weights. If not, zero-shot logits are 0 and only the cache is used."""
        return bool(self.text_weights.any())

    def caution(self, settings: Settings) -> str | None:
        """Return a warning if the beta in ``settings`` differs from the beta of the fit."""
        if self.fitted is None or settings.beta == self.settings.beta:
            return None
        return (
            f"beta: the index was fitted for {self.settings.beta:g}; any other beta makes answers and probabilities "
            "worse; refit with index set --beta"
        )

    def with_settings(self, settings: Settings) -> Self:
        """Return an index that has other settings and shares the keys. Warns once if beta differs from the fit."""
        if settings == self.settings:
            return self
        if (caution := self.caution(settings)) is not None:
            warn_once(caution)
        other = copy.copy(self)
        other.settings = settings
        return other

    def _queries(self, features: Features) -> Tensor:
        return inputs.queries(features, self.d).to(self.device)

    def _retrieval(self, k: KeysMet, tail: bool | None) -> Retrieval:
        if k is None and tail is None:
            return self.retrieval
        return replace(self.retrieval, settings=self.settings.override(k=k, tail=tail))

    def terms(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return the terms of the logits: the text term ``logit_scale * f W^T``, the cache ``C`` and the discriminant.

        They are not multiplied by alpha and gamma. The arguments are the same as for :meth:`logits`.
        """
        terms = self._retrieval(k, tail).terms(self._queries(features))
        self._blended(terms)
        return terms

    def check_answers(self) -> None:
        """Classify a few keys as if they were queries, and raise InputError if their logits overflow."""
        settings, (keys, described) = self.settings, self.some(ASKED)
        own = torch.from_numpy(keys.astype(np.float32)).to(self.device)
        ids = torch.from_numpy(described["class_id"].to_numpy().astype(np.int64)).to(self.device)
        values = None if self.values is None else tip.Values(self.values[torch.from_numpy(spread(self.n, ASKED))])
        queries, retrieval = functional.normalize(own), self.retrieval
        points = retrieval.points(queries)
        affinity = tip.affinity(points, retrieval.points(own))
        cache = tip.cache_logits(affinity, ids, len(self.class_names), settings.beta, values=values)
        tip.log_cache(cache, settings.log_offset)
        text = tip.text_logits(queries, self.text_weights, settings.logit_scale)
        self._blended(tip.Terms(text, cache, retrieval.discriminant(points)))

    def check_lengths(self, keys: npt.NDArray[Any]) -> None:
        """Raise InputError if the weight of one of these keys could overflow for a query of unit norm.

        If the index has a metric, pass the transformed keys.
        """
        longest = float(np.sqrt(np.einsum("ij,ij->i", keys, keys, dtype=np.float64).max()))
        if self.settings.beta * (longest - 1) > MOST_EXPONENT:
            raise InputError(
                f"beta {self.settings.beta:g}: exp(beta (affinity - 1)) overflows for a key of norm {longest:.4g}; "
                "scale the keys to norm 1 (norms unit)"
            )

    def _blended(self, terms: tip.Terms) -> Tensor:
        """Return the logits. Raises InputError if they overflow."""
        settings, logits = self.settings, terms.logits(self.settings)
        if not torch.isfinite(logits).all():
            if not torch.isfinite(terms.cache).all():
                raise InputError(
                    f"beta {settings.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller beta"
                )
            raise InputError(
                f"alpha {settings.alpha:g}, logit_scale {settings.logit_scale:g}: logits overflow; use smaller values"
            )
        return logits

    def certified(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return terms that give the same winners as a search over all keys, while retrieving as few keys as possible.

        Each query starts with ``k`` keys. If another key could still change the winner, the query is repeated with four
        times as many keys, and finally with all keys. See :func:`certify.certificate` for details, or
        :func:`certify.settled` for an index over classes.

        If the search is exact, the winners are proven. An approximate search may miss keys, and the proof does not
        account for those. If values are solved or trained, they can be negative, so every query needs all keys. The
        arguments are the same as for :meth:`logits`.
        """
        return self._certified(self._queries(features), self._retrieval(k, tail))

    def _certified(self, f: Tensor, retrieval: Retrieval) -> AnswerTerms:
        n, found = retrieval.keys.n, None
        keys = torch.full((len(f),), n)
        left, met = torch.arange(len(f), device=self.device), retrieval.settings.k
        most = n // ALL_FROM if self.device == "cpu" else min(n // ALL_FROM, GPU_MAX_K)
        while found is None or len(left):
            if met is not None and (met > most or self.values is not None):
                met = None
            asked = replace(retrieval, settings=retrieval.settings.override(k=met or "all"))
            terms = asked.terms(f[left], certify=True)
            if found is None:  # the first terms are those of all queries
                found = terms
            else:
                found.cache[left] = terms.cache
            keys[left.cpu()] = n if met is None else met
            left, met = left[:0] if terms.settled is None else left[~terms.settled], met and met * GROWTH
        answers = replace(found, settled=None, keys=keys)
        self._blended(answers)
        return answers

    def logits(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> Tensor:
        """Return the logits ``logit_scale * f W^T + alpha * (C + gamma * B)``, in the order of the classes.

        Args:
            features: the features, which should have unit norm, as an array or tensor of shape ``[q, d]``.
            k: the number of nearest keys to use per query, or ``"all"`` for exact Tip-Adapter. Defaults to the setting
                of the index.
            tail: whether to estimate the contribution of keys that are not retrieved, if ``k`` is a number (see
                :func:`tip.cache_logits`). Defaults to the setting of the index.

        Returns a float32 tensor of shape ``[q, c]``.

        Raises:
            InputError: if the features are not finite or do not have the shape ``[q, d]``, or if the logits overflow.
            UsageError: if ``k`` is less than 1.
        """
        return self._blended(self._retrieval(k, tail).terms(self._queries(features)))

    def answers(self, blocks: Iterable[FeatureBlock], ask: Ask = Ask()) -> Iterator[AnswerBlock]:
        """Classify blocks of features, and yield their answers in order. Everything that classifies uses this loop.

        Large blocks are split, so that the answers do not take much memory. The norms of the features are not checked.
        Raises the same errors as :meth:`logits`.
        """
        index = self.with_settings(ask.settings(self.settings))
        retrieval = index._without(ask.without) if ask.without else index.retrieval
        shown = min(ask.neighbours, index.settings.k or ask.neighbours)
        ask = replace(ask, neighbours=shown)
        for block in blocks:
            f = index._queries(block.features)
            for part in slices(len(f), max(1, min(PREDICTED, LOGITS // len(index.class_names)))):
                own = f[part]
                terms = index._certified(own, retrieval) if ask.certify else retrieval.terms(own, neighbours=shown)
                yield AnswerBlock(index, retrieval, ask, block.take(part), own, terms, index._blended(terms))

    def _without(self, key_ids: Sequence[int]) -> Retrieval:
        rows, class_ids = (torch.from_numpy(found).to(self.device) for found in self.rows_of(key_ids))
        if len(rows) == self.n:
            raise InputError("without: these are all keys; leave at least one key for the answer")
        return self.retrieval.without(rows, class_ids) if len(rows) else self.retrieval

    def classify(self, features: Features, norms: Norms = "check", **asked: Unpack[AskOptions]) -> Predictions:
        """Classify features, and return labels, probabilities and the shots that contributed most to each answer.

        Args:
            features: the features, which should have unit norm, as an array or tensor of shape ``[q, d]``.
            norms: ``"check"`` to check that all features have norm 1, or ``"keep"`` to accept any norm.
            asked: see :class:`settings.Ask`.

        Raises InputError if the norm of a feature is not 1, and the errors of :meth:`logits`.
        """
        f = inputs.queries(features, self.d)
        if norms == "check":
            inputs.check_unit(f)
        blocks = self.answers([FeatureBlock.of(f.cpu().numpy())], Ask(**asked))
        return Predictions.joined(block.predictions() for block in blocks)

    def classify_source(self, source: Source, encoder: Encoder, ask: Ask = Ask()) -> Iterator[Predictions]:
        """Classify images or a feature table while reading them, and yield the predictions in order.

        To classify images, pass an ``encoder``. Unreadable items are skipped and listed in ``encoder.skipped``.
        """
        column = source.items["source"]
        for answers in self.answers(encoder.blocks(source), ask):
            yield answers.predictions().named(column.take(pa.array(answers.block.positions)))

    def ids_of(self, source: Source) -> npt.NDArray[np.int64]:
        """Return the class id of each item in a labelled source. Raises InputError if a label is not a class."""
        ids, names = source.truth(self.class_names)
        if unknown := names[len(self.class_names) :]:
            raise source.unknown(unknown, self.class_names)
        return ids

    def key_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of transformed keys and their class ids, as tensors on the device."""
        return self.retrieval.keys.blocks()


class EditableIndex(AnsweringIndex):
    """An index that you can edit. The edits become the next version of its folder or store.

    If an edit raises an error, the index does not change.
    """

    @abstractmethod
    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        """Append classes that have no keys yet.

        If the index has text weights, pass ``text_weights`` of shape ``[m, d]`` for the new classes. Raises InputError
        if a class already exists, or if the weights are missing or have the wrong shape.
        """

    @abstractmethod
    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        """Replace the text weights of all classes, and the templates that the weights were made from."""

    @abstractmethod
    def add(
        self,
        keys: Features,
        labels: Labels,
        sources: Sequence[str] | pa.ChunkedArray | None = None,
        *,
        views: int | npt.NDArray[np.integer[Any]] = 1,
        digests: Sequence[str | None] | None = None,
        extra: pa.Table | None = None,
    ) -> list[int]:
        """Add keys to existing classes, and return their key ids.

        ``keys`` has the shape ``[m, d]``. ``views``, the SHA-256 ``digests`` of the images and the columns of ``extra``
        are written to the label store. Raises InputError if the keys have the wrong shape or a label is unknown.
        """

    @abstractmethod
    def remove(self, key_ids: Sequence[int]) -> None:
        """Remove keys by id. Classes that become empty are kept.

        Raises InputError if an id is unknown, or if no key would remain.
        """

    @abstractmethod
    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
        """Move keys to other classes, given one label for all keys or one label per key.

        The keys become the last shots of their new class. Raises InputError if an id or a label is unknown, or if an id
        is repeated.
        """

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Rename a class. The class keeps its keys and its text weight.

        If ``new`` already exists, the keys are merged into ``new``, which keeps its own text weight. The ids of all
        classes after ``old`` then decrease by one. Raises InputError if ``old`` does not exist, or if ``new`` is not a
        valid name.
        """


def similar_shots(
    index: AnsweringIndex, features: Features, n: int = 5, *, norms: Norms = "check"
) -> list[list[SimilarShot]]:
    """Return the ``n`` shots that are nearest to each query in the metric of an index, nearest first.

    ``features`` has the shape ``[q, d]``. If the index searches approximately, a shot may be missed. See
    :meth:`AnsweringIndex.classify` for ``norms``. Raises UsageError if ``n`` is below 1, and InputError if the features
    are not valid.
    """
    check_count("n", n)
    f = inputs.queries(features, index.d).to(index.device)
    if norms == "check":
        inputs.check_unit(f)
    near = index.retrieval.keys.nearest(index.retrieval.points(f), min(n, index.n))
    rows, affinities = near.rows.cpu().numpy(), near.affinity.double().cpu().numpy()
    used, places = np.unique(rows.clip(min=0), return_inverse=True)
    described = index.described(used, ["key_id", "source", "label"]).to_pylist()
    return [
        [SimilarShot(**described[i], affinity=float(x)) for row, i, x in zip(*one, strict=True) if row >= 0]
        for one in zip(rows, places.reshape(rows.shape), affinities, strict=True)
    ]


def manifest_of(
    index: AnsweringIndex,
    number: int,
    parent: Manifest | None,
    change: str,
    files: dict[str, DataFile],
    *,
    table: Table | None = None,
    digests: dict[str, str] | None = None,
) -> Manifest:
    """Create the manifest of version ``number``. ``change`` describes how it differs from ``parent``."""
    assert index.next_key_id is not None
    return Manifest(
        version=number, parent=None if parent is None else parent.version, **history.stamp(),
        n=index.n, d=index.d, dtype=index.dtype, class_names=index.class_names, templates=index.templates,
        settings=index.settings, index=index.index_type,
        backbone=index.backbone.to_dict() if index.backbone else None, provenance=index.provenance, files=files,
        next_key_id=index.next_key_id, change=change, table=table, fitted=index.fitted, built=index.built,
        digests=digests or {},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class AnswerBlock:
    """The answers to a block of queries.

    Attributes:
        index: the index, with the settings of the question.
        retrieval: the retrieval that gave the answers.
        ask: the question.
        block: the queries.
        features: the features of the queries, of shape ``[q, d]``, as a float32 tensor on the device.
        terms: the terms of the logits.
        logits: the logits of all classes, of shape ``[q, c]``.
    """

    index: AnsweringIndex
    retrieval: Retrieval
    ask: Ask
    block: FeatureBlock
    features: Tensor
    terms: AnswerTerms
    logits: Tensor

    @cached_property
    def ranked(self) -> Tensor:
        """The class ids of the most probable classes, of shape ``[q, m]``, most probable first."""
        return self.logits.topk(min(self.ask.top, self.logits.shape[1]), dim=1).indices

    def predictions(self) -> Predictions:
        """Return one prediction per query. The queries are named by their positions."""
        index, settings, terms, logits = self.index, self.index.settings, self.terms, self.logits
        ranked = self.ranked  # at any temperature
        chances = _doubles(tip.probabilities(logits, settings.temperature).gather(1, ranked))
        winner, m, names = ranked[:, :1], ranked.shape[1], pa.array(index.class_names, pa.string())
        labels = names.take(pa.array(ranked.cpu().numpy().reshape(-1)))
        shots = self._shots()
        columns = {
            "input": pa.array(self.block.positions).cast(pa.string()),
            "label": labels if m == 1 else names.take(pa.array(ranked[:, 0].cpu().numpy())),
            "probability": chances[:, 0],
            "labels": lists(labels, m),
            "probabilities": lists(chances, m),
            "text_logit": _doubles(terms.text.gather(1, winner))[:, 0],
            "cache_logit": settings.alpha * _doubles(terms.cache.gather(1, winner))[:, 0],
            "neighbours": self._neighbours(None if shots is None else shots.supporting, ranked),
            "opposing": self._opposing(None if shots is None else shots.opposing, ranked),
        }
        if self.ask.logits:
            columns["logits"] = lists(logits.cpu().numpy(), logits.shape[1])
        if terms.discriminant is not None:
            factor = settings.alpha * settings.gamma
            columns["discriminant_logit"] = factor * _doubles(terms.discriminant.gather(1, winner))[:, 0]
        if terms.keys is not None:
            columns["keys"] = terms.keys.cpu().numpy()
        if settings.least_cache is not None:
            strongest = terms.strongest(self.retrieval.keys.counts)
            columns["unlike"] = (strongest < settings.least_cache).cpu().numpy()
        known = [column for column in PREDICTIONS if column in columns]
        schema = pa.schema([SCHEMA.field(column) for column in known])
        return Predictions(pa.table([columns[column] for column in known], schema=schema))

    def _shots(self) -> Contributors | None:
        if self.terms.shots is not None or not self.ask.neighbours:
            return self.terms.shots
        retrieval = self.retrieval
        return retrieval.contributors(retrieval.points(self.features), *first_two(self.logits), self.ask.neighbours)

    def _neighbours(self, near: Nearest | None, classes: Tensor) -> pa.ListArray:
        kind = PREDICTIONS["neighbours"]
        if near is None:
            ends = np.zeros(len(classes) + 1, np.int32)
            return pa.ListArray.from_arrays(pa.array(ends), pa.array([], kind.value_type))
        there = near.rows >= 0
        ends = np.concatenate([[0], there.sum(dim=1).cumsum(dim=0).cpu().numpy()]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), self._described(near, classes))

    def _opposing(self, near: Nearest | None, classes: Tensor) -> pa.StructArray:
        if near is None:
            return pa.nulls(len(classes), PREDICTIONS["opposing"])
        there = (near.rows[:, 0] >= 0).cpu().numpy()
        return self._described(near, classes).take(pa.array(there.cumsum() - 1, mask=~there))

    def _described(self, near: Nearest, classes: Tensor) -> pa.StructArray:
        index, there = self.index, near.rows >= 0
        weight = tip.weight(near.affinity, index.settings.beta)
        if index.values is None:
            values = (near.class_ids[:, :, None] == classes[:, None]).float()
        else:
            values = index.values[near.rows.clamp_min(0)[:, :, None], classes[:, None]]
        used, places = np.unique(near.rows[there].cpu().numpy(), return_inverse=True)
        described = index.described(used, ["key_id", "source", "label"]).take(pa.array(places))
        named = [column.combine_chunks() for column in described.columns]
        figures = [pa.array(_doubles(figure[there])) for figure in (near.affinity, weight)]
        gives = lists(_doubles((weight[:, :, None] * values)[there]), classes.shape[1])
        return pa.StructArray.from_arrays([*named, *figures, gives], fields=list(PREDICTIONS["opposing"]))


def _doubles(values: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(values.double().cpu())
