"""An index: labelled keys, and what was fitted to them. You can classify with it, edit it, and save it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, Unpack, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.answers import AnswerBlock
from retrieval_tip.arrays import FloatArray, IntArray, KeyArray, slices
from retrieval_tip.backbones.base import (
    Identity,
    Part,
    equal_shares,
    present,
    resolve_device,
    text_side_by_side,
)
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import spread
from retrieval_tip.data.sources import Source, open_items
from retrieval_tip.data.tables import is_frame
from retrieval_tip.editing import apply
from retrieval_tip.errors import InputError, StoreError, UsageError, check_count, warn_once
from retrieval_tip.levels import Levels
from retrieval_tip.predictions import Predictions, SimilarShot
from retrieval_tip.records import Built, Fitted
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.conformal import Scores, Sets
from retrieval_tip.retrieval.inputs import Features, KeysInPlace, Labels
from retrieval_tip.retrieval.keys import KEY_BLOCK, Keys, auto_for, transformed
from retrieval_tip.retrieval.logits import LOGITS, AnswerTerms, Retrieval
from retrieval_tip.retrieval.ridge import MOST_SOLVED, Ridge
from retrieval_tip.retrieval.rows import ArrayRows, Rows
from retrieval_tip.retrieval.vector_index import FLAT_FACTORY, VectorIndex
from retrieval_tip.settings import Ask, AskOptions, Dtype, KeysMet, Norms, Settings, Verify
from retrieval_tip.store.contents import Stored, read, write
from retrieval_tip.store.edits import Edits
from retrieval_tip.store.files import read_array
from retrieval_tip.store.labels import label_table, rows_with
from retrieval_tip.store.manifest import SUFFIXES, Manifest, Table
from retrieval_tip.store.versions import Check, Origin, Versions, Writer, created

SUMS_FROM = 8
"""The sums are only saved if they are at most an eighth of the size of the keys. Otherwise, a fit recomputes them."""
ASKED = 16
"""Number of keys that are used as queries to check the logits before a version is written."""

PREDICTED, QUERY_VALUES = 1 << 16, 1 << 24
"""Maximum number of queries that are classified at a time, and of the values of their features, which take 64 MiB."""
MOST_COPIED = 1 << 29
"""Maximum size in bytes of the keys of an index from which keys can be left out, because this copies the others."""


@dataclass(repr=False)
class Index:
    """The cache of Tip-Adapter as an index that you can search and edit.

    Create an index with :meth:`from_features` or :meth:`load`. An index is a value: :meth:`edited` and the other
    methods that change something return a new index, which shares the arrays. Do not modify the arrays in place.

    Attributes:
        rows: the keys and their labels, grouped by class, and the FAISS index over the keys. They are in memory or in a
            table. If the rows have no FAISS index, one of the type ``factory`` is built.
        class_names: the names of the ``c`` classes, in order.
        text_weights: the text weights as a float32 tensor of shape ``[c, d]``. If the index has no text, they are zero.
        settings: the defaults for every call.
        curve: the loss curve of the training, which has one row per epoch.
        next_key_id: the smallest key id that has never been used.
        metric: the fitted metric (see :mod:`tip`), or ``None``.
        fitted: a description of how the metric and the values were fitted (see :mod:`fit.closed_form`), or ``None``.
        built: the options that the index was built with.
        groups: the broader groups of the classes, or ``None``.
        prior: the scatter of other photos, of shape ``[d, d]``, if the index was fitted with one.
        scores: the held-out photos of the last fit, if the keys, labels and text are still the same.
        stored: the version of a folder or of another store that the index was loaded from or saved as.

    Raises InputError if the values have the wrong shape, or if the curve has no rows.
    """

    rows: Rows
    class_names: list[str]
    text_weights: Tensor
    settings: Settings = field(default_factory=Settings)
    templates: list[str] = field(default_factory=list)
    backbone: Identity | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    curve: pa.Table | None = None
    next_key_id: int | None = None
    metric: tip.Metric | None = None
    fitted: Fitted | None = None
    built: Built = field(default_factory=Built)
    parts: tuple[Part, ...] = ()
    groups: Levels | None = None
    factory: InitVar[str] = FLAT_FACTORY
    prior: FloatArray | None = field(default=None, init=False)
    scores: Scores | None = field(default=None, init=False)
    stored: Origin | None = field(default=None, init=False)

    def __post_init__(self, factory: str) -> None:
        self.text_weights = self.text_weights.to(self.device)
        self.metric = None if self.metric is None else self.metric.to(self.device)
        if isinstance(self.rows, ArrayRows):
            self.rows = self._on_device(self.rows)
            if self.rows.index is None:
                self.rows = self.rows.indexed(len(self.class_names), factory, self.device)
        if self.next_key_id is None:
            self.next_key_id = int(self.rows.columns("key_id")["key_id"].to_numpy().max()) + 1
        self.follow()
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; pass one row per epoch, or None")

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return the arrays without the folder, and without the sums, which the next fit computes again."""
        rows = self.rows.in_memory()
        values = None if rows.values is None else rows.values.cpu()
        rows = replace(
            rows,
            keys=_not_mapped(rows.keys),
            points=_not_mapped(rows.points),
            values=values,
            sums=None,
            kept_in=None,
            pending=(),
        )
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init} | {
            "rows": rows,
            "text_weights": self.text_weights.cpu(),
            "prior": _not_mapped(self.prior),
            "metric": None if self.metric is None else replace(self.metric.to("cpu")),
            "scores": self.scores,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        prior = state.pop("prior")
        scores = state.pop("scores")
        rows = state.pop("rows")
        rows = replace(
            rows,
            keys=_writable(rows.keys),
            points=None if rows.points is None else _writable(rows.points),
        )
        # The state has no retrieval, which follows from the rows.
        self.__init__(rows=rows, device=present(state.pop("device")), **state)  # type: ignore[misc]
        self.prior = prior
        self.scores = scores

    def _on_device(self, rows: ArrayRows) -> ArrayRows:
        points = rows.points
        values = rows.values
        if self.metric is None:
            points = None
        elif points is None:
            points = transformed(self.metric, rows.keys, self.device)
        if values is not None:
            inputs.check_shape(
                "values", values.shape, (rows.n, len(self.class_names)), "one row per key"
            )
            values = values.detach().to(self.device, torch.float32)
        return replace(rows, points=points, values=values)

    def follow(self) -> None:
        """Compute again what follows from the rows, the classes and the text."""
        c = len(self.class_names)
        index = self.rows.index
        if index is not None and index.by_class and index.n != c:
            self.rows = self.rows.in_memory().indexed(c, device=self.device)
        text = self.text_weights
        if self.parts:
            scale = inputs.scale_of(self.parts, self.shares)
            # Queries are not scaled here, so the text takes the scale of both.
            text = text if scale is None else text * scale.square().to(text)
        self.retrieval = Retrieval(self.rows.stream(c, self.device, self.metric), text)

    @property
    def index(self) -> VectorIndex | None:
        """The FAISS index over the keys or, if there is a metric, over the points. ``Flat`` and tables have none."""
        return self.rows.index

    @property
    def keys(self) -> KeyArray | KeysInPlace:
        """The keys as a float32 or float16 array of shape ``[n, d]``, grouped by class."""
        return self.rows.keys

    @property
    def labels(self) -> pa.Table:
        """The label store, which has one row per key."""
        return self.rows.labels

    @property
    def values(self) -> Tensor | None:
        """The solved or trained values (see :class:`tip.Values`), or ``None`` if values are one-hot."""
        return self.rows.values

    @property
    def vectors(self) -> KeyArray | KeysInPlace:
        """The transformed keys if there is a metric, or the keys themselves."""
        return self.rows.vectors

    @property
    def class_ids(self) -> Tensor:
        """The class ids as an int64 tensor of shape ``[n]`` on the device."""
        keys = self.retrieval.keys
        return keys.class_ids if isinstance(keys, Keys) else torch.from_numpy(self.rows.class_ids)

    @property
    def n(self) -> int:
        """Number of keys."""
        return self.rows.n

    @property
    def d(self) -> int:
        """Length of a feature."""
        return self.rows.d

    @property
    def dtype(self) -> Dtype:
        """Type of the stored keys: float32 or float16."""
        return self.rows.dtype

    @property
    def counts(self) -> list[int]:
        """Number of keys in each class."""
        return list(self.retrieval.keys.counts.long().tolist())

    @property
    def bare(self) -> list[str]:
        """The classes that have no keys."""
        return [
            name for name, number in zip(self.class_names, self.counts, strict=True) if not number
        ]

    @property
    def index_type(self) -> str:
        """The type of the index, which is a FAISS factory string or the type of a table's index."""
        return self.retrieval.keys.index_type

    @cached_property
    def has_text(self) -> bool:
        """Whether the index has text weights. If not, zero-shot logits are 0 and only the cache is used."""
        return bool(self.text_weights.any())

    @property
    def shares(self) -> tuple[float, ...]:
        """How much each encoder counts, if there are several. The shares sum to 1."""
        fitted_shares = () if self.fitted is None else self.fitted.shares
        return fitted_shares or equal_shares(self.parts)

    def find(
        self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()
    ) -> pa.Table:
        """Return the rows of the label store that match all of the given filters.

        By default, all classes and key ids match. ``source`` matches any source that contains it, ignoring case.
        """
        if key_ids:
            rows = self.rows.where("key_id", list(dict.fromkeys(key_ids)))
        elif labels:
            rows = self.rows.where("label", list(dict.fromkeys(labels)))
        else:
            rows = self.labels
        return rows_with(rows, labels, source)

    def having(self, column: Literal["digest", "source"], values: Iterable[str | None]) -> pa.Table:
        """Return the rows of the label store that have one of the given digests or sources."""
        return self.rows.where(
            column, list(dict.fromkeys(value for value in values if value is not None))
        )

    def known(self, digests: Sequence[str | None]) -> set[tuple[str, str]]:
        """Return the digest and the label of every key that has one of the given digests."""
        same = self.having("digest", digests)
        return set(zip(same["digest"].to_pylist(), same["label"].to_pylist(), strict=True))

    def caution(self, settings: Settings) -> str | None:
        """Return a warning if the beta in ``settings`` differs from the beta of the fit."""
        if self.fitted is None or settings.beta == self.settings.beta:
            return None
        return (
            f"beta: the index was fitted for {self.settings.beta:g}; any other beta makes answers and probabilities "
            "worse; refit with index set --beta"
        )

    def cautions(self, ask: Ask) -> Iterator[str]:
        """Yield warnings about the answers to a question. Raises the errors of :meth:`sets`."""
        if len(self.class_names) == 1:
            yield f"the index has one class, so every answer is {self.class_names[0]}; add photos of other classes"
        if (caution := self.caution(ask.settings(self.settings))) is not None:
            yield caution
        if (sets := self.sets(ask)) is not None:
            yield from sets.cautions(self.class_names)

    def with_settings(self, settings: Settings, *, chosen: bool = False) -> Self:
        """Return an index that has other settings and shares the keys.

        If they are ``chosen``, later changes of the keys keep them (see :class:`records.Fitted`). Otherwise, they are
        only for some questions, and this warns once if beta differs from the fit.
        """
        if chosen:
            fitted = None if self.fitted is None else replace(self.fitted, automatic=False)
            return self.altered(settings=settings, fitted=fitted)
        if settings == self.settings:
            return self
        if (caution := self.caution(settings)) is not None:
            warn_once(caution)
        return self.altered(settings=settings)

    def altered(self, **fields: Any) -> Self:
        """Return a copy with other fields, whose lengths must still match."""
        made = copy.copy(self)
        made.__dict__ |= fields
        if fields.keys() & {"rows", "metric", "fitted"}:
            made.follow()
        return made

    def queries(self, features: Features | Sequence[Features], norms: Norms = "keep") -> Tensor:
        """Convert features to a finite float32 tensor of shape ``[q, d]`` on the device.

        Raises InputError if they are not valid, or if ``norms`` is ``"check"`` and the norm of a feature is not 1.
        """
        if is_frame(features):
            features = Reader(norms=norms, parts=self.parts).encode(open_items(features)).features
        if isinstance(features, list | tuple) and inputs.are_several(features):
            features = inputs.joined(features, self.parts, "features")
        if isinstance(features, Tensor):
            f = features.detach().float()
        else:
            with np.errstate(
                over="ignore"
            ):  # overflow becomes infinity, which raises an error below
                array = np.require(inputs.numbers(features, "features"), np.float32, ["C", "W"])
            f = torch.from_numpy(array)
        d = self.text_weights.shape[1]
        if f.ndim != 2 or f.shape[1] != d:
            raise InputError(f"features: shape {tuple(f.shape)}; expected [q, {d}]")
        # The sum is much faster to check, and finite only if all features are. It may also overflow.
        if not torch.isfinite(f.sum()) and not torch.isfinite(f).all():
            row = int((~torch.isfinite(f).all(dim=1)).nonzero()[0])
            raise InputError(f"features: row {row} contains NaN or infinity")
        if norms == "check":
            inputs.check_unit(f)
        return f.to(self.device)

    def terms(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return the terms of the logits: the text term ``logit_scale * f W^T``, the cache ``C`` and the discriminant.

        They are not multiplied by alpha and gamma. The arguments are the same as for :meth:`logits`.
        """
        return self.retrieval.answer(
            self.queries(features), self.settings.override(k=k, tail=tail)
        )[0]

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
        return self.retrieval.answer(
            self.queries(features), self.settings.override(k=k, tail=tail)
        )[1]

    def answers(self, blocks: Iterable[FeatureBlock], ask: Ask = Ask()) -> Iterator[AnswerBlock]:
        """Classify blocks of features, and yield their answers in order. Everything that classifies uses this loop.

        Large blocks are split, so that the answers do not take much memory. The norms of the features are not checked.
        Warns once of each of the :meth:`cautions`. Raises the same errors as :meth:`logits`.
        """
        sets = self.sets(ask)
        for caution in self.cautions(ask):
            warn_once(caution)
        index = self.with_settings(ask.settings(self.settings))
        index = index._without(ask.without) if ask.without else index
        shown = min(ask.neighbours, index.settings.k or ask.neighbours)
        ask = replace(ask, neighbours=shown)
        for block in blocks:
            f = index.queries(block.features)
            size = min(PREDICTED, QUERY_VALUES // index.d, LOGITS // len(index.class_names))
            for rows in slices(len(f), max(1, size)):
                queries = f[rows]
                terms, logits = index.retrieval.answer(queries, index.settings, shown)
                yield AnswerBlock(index, ask, sets, block.take(rows), queries, terms, logits)

    @property
    def current_scores(self) -> Scores | None:
        """The scores of the last fit, or ``None`` if keys, labels, text or settings have changed since."""
        if self.scores is None or self.scores.settings != self.settings:
            return None
        return self.scores

    def sets(self, ask: Ask) -> Sets | None:
        """Return the rule for the sets of classes that a question asks for.

        Raises UsageError if the index has no groups for ``at_least``, or if ``coverage`` was measured for other keys or
        settings.
        """
        if ask.at_least is not None and self.groups is None:
            raise UsageError(
                "at_least: the index has no groups; set them first (index set --groups TABLE)"
            )
        if ask.coverage is None:
            return None
        scores = self.current_scores
        if scores is None or ask.without or ask.settings(self.settings) != self.settings:
            raise UsageError(
                "coverage: needs a fit to exactly these keys and settings; leave out options that change them, or fit "
                "again (retrieval-tip fit INDEX)"
            )
        return scores.sets(ask.coverage, self.text_weights.any(1).cpu().numpy())

    def _without(self, key_ids: Sequence[int]) -> Self:
        """Return an index that lacks some keys, and searches the others exactly. Their values stay."""
        gone = np.isin(self.rows.columns("key_id")["key_id"].to_numpy(), key_ids)
        if gone.all():
            raise InputError("without: these are all keys; leave at least one key for the answer")
        if not gone.any():
            return self
        if 4 * self.n * self.d > MOST_COPIED:
            raise UsageError(f"without: {self.n:,} keys are too many to copy; leave it out")
        k = None if self.retrieval.keys.by_class else self.settings.k
        return replace(
            self, rows=self.rows.take(np.flatnonzero(~gone)), settings=replace(self.settings, k=k)
        )

    def classify(
        self, features: Features, norms: Norms = "check", **asked: Unpack[AskOptions]
    ) -> Predictions:
        """Classify features, and return labels, probabilities and the shots that contributed most to each answer.

        Args:
            features: the features, which should have unit norm, as an array or tensor of shape ``[q, d]``, or as a
                table of pandas, polars or Arrow with the column ``feature``.
            norms: ``"check"`` to check that all features have norm 1, or ``"keep"`` to accept any norm.
            asked: see :class:`settings.Ask`.

        Raises InputError if the norm of a feature is not 1, and the errors of :meth:`logits`.
        """
        f = self.queries(features, norms)
        blocks = self.answers([FeatureBlock.of(f.cpu().numpy())], Ask(**asked))
        return Predictions.joined(block.predictions() for block in blocks)

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, IntArray]:
        """Return the affinities and rows of the ``k`` nearest keys of each query, both of shape ``[q, k]``.

        The affinities are exact even if the index is compressed. Empty slots have row -1.
        """
        near = self.retrieval.keys.nearest(self.retrieval.keys.phi(features), k)
        return near.affinity, near.rows.cpu().numpy()

    def similar(
        self, features: Features, n: int = 5, *, norms: Norms = "check"
    ) -> list[list[SimilarShot]]:
        """Return the ``n`` shots that are nearest to each query in the metric of the index, nearest first.

        ``features`` has the shape ``[q, d]``. If the index searches approximately, a shot may be missed. See
        :meth:`classify` for ``norms``. Raises UsageError if ``n`` is below 1, and InputError if the features are not
        valid.
        """
        check_count("n", n)
        f = self.queries(features, norms)
        affinity, rows = self.nearest(f, min(n, self.n))
        used, places = np.unique(rows.clip(min=0), return_inverse=True)
        described = self.rows.described(used, ["key_id", "source", "label"]).to_pylist()
        places = places.reshape(rows.shape)
        affinities = affinity.double().cpu().numpy()  # at once, because each copy from a GPU waits
        similar: list[list[SimilarShot]] = [[] for _ in rows]
        for query, rank in np.argwhere(rows >= 0):
            shot = described[places[query, rank]]
            similar[query].append(SimilarShot(**shot, affinity=float(affinities[query, rank])))
        return similar

    def ids_of(self, source: Source) -> IntArray:
        """Return the class id of each item in a labelled source. Raises InputError if a label is not a class."""
        ids, names = source.truth(self.class_names)
        if unknown := names[len(self.class_names) :]:
            raise source.unknown(unknown, self.class_names)
        return ids

    def edited(self, edits: Edits) -> Self:
        """Apply edits, and return the new index. This index does not change.

        Keys in a table are the exception: they are written at once, but without a manifest they are not a version.

        Raises InputError if features have the wrong shape, if a class or a key id is unknown, if a new class lacks a
        text weight, if the name of a class is not valid, or if no key would remain.
        """
        made = copy.copy(self)
        apply(made, edits)
        return made

    def on(self, device: str) -> Index:
        """Return the same version on ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Another device reads it again."""
        device = resolve_device(device)
        if device == self.device or self.stored is None:
            return self
        return self._opened_again(device, self.stored.manifest)

    def check_answers(self) -> None:
        """Classify a few keys as if they were queries, and raise InputError if their logits overflow."""
        keys, labels = self.rows.some(ASKED)
        order = np.argsort(
            labels["class_id"].to_numpy(), kind="stable"
        )  # a table is not grouped by class
        values = None if self.values is None else self.values[spread(self.n, ASKED)]
        few = replace(self, rows=ArrayRows(keys[order], labels.take(pa.array(order)), values))
        # Among queries of norm 1, a key gets the largest affinity from the one in its own direction.
        few.logits(functional.normalize(torch.from_numpy(keys.astype(np.float32))), "all")

    @property
    def ridge(self) -> Ridge | None:
        """The solver of the values, or ``None`` if they were not solved."""
        fitted = self.fitted
        if fitted is None or fitted.ridge is None:
            return None
        c = len(self.class_names)
        beta = self.settings.beta
        bonus = fitted.bonus
        return Ridge(c, beta, fitted.ridge, self.device, fitted.class_prior, bonus)

    def without_unanswerable(self) -> Self:
        """Return the index without classes that have neither keys nor text, because no query resembles them."""
        return self if self.has_text else self.edited(Edits(drop=self.bare))

    def solved(self) -> Self:
        """Return an index whose solved values belong to its keys and beta. Other values stay.

        Raises InputError if there are more than :data:`MOST_SOLVED` keys.
        """
        if self.ridge is None or not isinstance(self.rows, ArrayRows):
            return self
        if self.n > MOST_SOLVED:
            raise InputError(
                f"values: cannot be solved for {self.n:,} keys, because the limit is {MOST_SOLVED:,}; "
                "fit the index instead (retrieval-tip fit INDEX)"
            )
        points = np.asarray(self.rows.vectors, dtype=np.float32)
        values = self.ridge.values(torch.from_numpy(points).to(self.device), self.class_ids)
        return self.altered(rows=replace(self.rows, values=values))

    def rebuilt(self, factory: str | None = None, dtype: Dtype | None = None) -> Self:
        """Sort the keys, and recompute the points, the solved values and the FAISS index. The keys must be in memory.

        Args:
            factory: the new type of the index. If it is ``auto``, :func:`keys.auto_for` selects the type and ``k``.
                Defaults to the current type.
            dtype: the new type of the keys, float32 or float16. Defaults to the current type.

        Raises:
            UsageError: if the factory is invalid.
            InputError: if the keys are too large for the dtype.
        """
        rows = self.rows.in_memory()
        settings = self.settings
        if factory == "auto":
            factory, k = auto_for(
                rows.keys.shape, dtype or self.dtype, len(self.class_names), self.device
            )
            settings = replace(settings, k=k)
        ordered = rows.take(rows.order())
        with np.errstate(over="ignore"):  # overflow becomes infinity, which raises an error below
            keys = ordered.keys.astype(dtype or self.dtype)
        if not np.isfinite(keys).all():
            raise InputError(f"keys: values too large for {keys.dtype}; use float32")
        points = transformed(self.metric, keys, self.device)
        ordered = replace(ordered, keys=keys, points=points, index=rows.index)
        ordered = ordered.indexed(len(self.class_names), factory, self.device)
        made = self.altered(rows=ordered, settings=settings)
        return made.solved() if made.n <= MOST_SOLVED else made

    def with_fit(
        self,
        metric: tip.Metric | None,
        values: Tensor | None,
        fitted: Fitted | None,
        factory: str | None = None,
    ) -> Self:
        """Return an index with another metric and values, whose FAISS index has the transformed keys.

        ``factory`` defaults to the current type. Raises UsageError if the factory is invalid.
        """
        rows = self.rows.fitted(metric, values, factory, self.device)
        changed = (
            self.metric is not None or metric is not None or factory not in (None, self.index_type)
        )
        if isinstance(rows, ArrayRows) and changed:
            rows = rows.indexed(len(self.class_names), factory, self.device)
        return self.altered(rows=rows, metric=metric, fitted=fitted, scores=None)

    def take(self, rows: IntArray) -> Self:
        """Return an index in memory that consists of the keys at the given rows of the labels. Rows may repeat.

        If there are too few keys for the type of the index, the new index is ``Flat``. Raises UsageError if there are
        too many keys.
        """
        class_ids = self.rows.class_ids[rows]
        taken = self._on_device(
            self.rows.take(np.asarray(rows)[np.argsort(class_ids, kind="stable")])
        )
        taken = taken if self.ridge is None else self.ridge.solved(taken)
        with suppress(UsageError):
            taken = replace(taken, index=self.rows.index).indexed(
                len(self.class_names), device=self.device
            )
        return replace(self, rows=taken)

    def in_memory(self) -> Self:
        """Return this index with all keys in memory. Raises UsageError if there are too many."""
        if isinstance(self.rows, ArrayRows):
            return self
        made = copy.copy(self)
        made.rows = self.rows.in_memory()
        made.__post_init__(FLAT_FACTORY)
        return made

    @classmethod
    def from_features(
        cls,
        keys: Features,
        labels: Labels,
        class_names: Sequence[str],
        text_weights: Features | None = None,
        *,
        settings: Settings | None = None,
        index: str = "Flat",
        device: str = "auto",
        sources: Sequence[str] | None = None,
        values: Features | None = None,
        blocks: Sequence[int] = (),
    ) -> Self:
        """Create an index from precomputed features.

        Args:
            keys: the features of the shots, as a floating-point array of shape ``[n, d]``. They are not normalised, so
                make sure that they are unit vectors. If they come from several encoders, pass a list of arrays.
            labels: the class of each key, given by its name or by its position in ``class_names``.
            class_names: the names of the ``c`` classes, in order. A class may have no keys.
            text_weights: the text weights, as unit vectors of shape ``[c, d]``. If ``None``, only the cache is used.
            settings: the defaults for every call. By default, these are the settings of the paper.
            index: the FAISS factory string, for example ``Flat``, ``IVF256,Flat``, ``HNSW32`` or ``SQfp16``. You can
                also pass ``Classes`` for an index over class means, or ``auto`` to let :func:`keys.auto_for` select the
                type and ``k``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            sources: the path or id of each key, which is shown with predictions.
            values: the trained values, of shape ``[n, c]``. Defaults to one-hot labels.
            blocks: the number of values of each encoder, if ``keys`` has the features of several side by side. Queries
                and text weights have the same layout, and each part is scaled to the same length.

        Raises:
            InputError: if shapes do not match, if values are not finite, or if a label is not a class.
            UsageError: if alpha, beta, the device or the index is invalid.
        """
        parts = inputs.parts_of(keys, blocks)
        matrix = inputs.matrix(inputs.joined(keys, parts, "keys"), "keys")
        names = inputs.names(class_names)
        if text_weights is not None:
            text_weights = inputs.joined(text_weights, parts, "text_weights", text_side_by_side)
        ids = inputs.ids_of(labels, names, len(matrix))
        device = resolve_device(device)
        if sources is not None and len(sources) != len(ids):
            raise InputError(
                f"sources: there are {len(sources)} sources for {len(ids)} keys; pass one source per key"
            )
        order = np.argsort(ids, kind="stable")
        if sources is not None:
            sources = [sources[i] for i in order]
        table = label_table(names, ids[order], sources, key_ids=order)
        ordered = np.ascontiguousarray(matrix[order])
        settings = Settings() if settings is None else settings
        if index == "auto":
            index, k = auto_for(matrix.shape, matrix.dtype, len(names), device)
            settings = replace(settings, k=k)
        trained = None
        if values is not None:
            shape = len(ids), len(names)
            trained = inputs.shaped(values, "values", shape, "one row per key")[order]
        return cls(
            ArrayRows(ordered, table, trained),
            names,
            inputs.text_weights(text_weights, len(names), matrix.shape[1]),
            settings=settings,
            device=device,
            parts=parts,
            factory=index,
        )

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the version that this index was loaded from or saved as."""
        return None if self.stored is None else self.stored.manifest

    @property
    def version(self) -> int | None:
        """The number of this version."""
        return None if self.stored is None else self.stored.manifest.version

    @property
    def place(self) -> str | None:
        """The folder or the store that this index was loaded from or saved to."""
        return None if self.stored is None else str(self.stored.store)

    @property
    def folder(self) -> Path | None:
        """The index folder that this index was loaded from or saved to."""
        return self.stored.store.folder if isinstance(self.stored, Stored) else None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n} keys of {self.d}, {len(self.class_names)} classes, "
            f"index={self.index_type!r}, alpha={self.settings.alpha:g}, beta={self.settings.beta:g}, "
            f"k={self.settings.k or 'all'}, device={self.device!r})"
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        verify: Verify = "full",
        check: Check | None = None,
        version: int | None = None,
    ) -> Self:
        """Open the current version of an index folder, or an earlier version.

        Keys and values are memory-mapped.

        Args:
            folder: the index folder.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            verify: ``full`` to compare every file with its digest, or ``fast`` to compare only the size of large files.
            check: a check that has already been started. If it is given, the version under check is opened.
            version: the version number to open. Defaults to the current version.

        Raises StoreError if a file is missing or damaged, has a newer format, or does not match the manifest.
        """
        store = Versions(folder)
        device = resolve_device(device)

        def checked(manifest: Manifest) -> Check:
            if check is not None and check.manifest is manifest:
                return check
            return Check(store.files, manifest, verify)

        first = None if check is None else check.manifest
        return store.opened(
            lambda manifest: cls._opened(store, checked(manifest), device), version, first
        )

    @classmethod
    def _opened(cls, store: Versions, check: Check, device: str) -> Self:
        # Files are only parsed after they were checked.
        check.wait()
        place = store.folder
        manifest = check.manifest
        held = read(place, manifest)
        keys = held["keys"]
        values = held.get("values")
        metric = held.get("metric")
        points = held["points"] if "points" in held else transformed(metric, keys, device)
        values = None if values is None else torch.from_numpy(values)
        rows = ArrayRows(keys, held["labels"], values, points, held.get("sums"))
        rows = replace(rows, index=_read_index(place, manifest, device))
        index = cls.of_version(
            rows, manifest, device, held, curve=held.get("curve"), factory=manifest.index
        )
        index.stored = Stored(store, manifest, check.verify, index._contents())
        return index

    @classmethod
    def of_version(
        cls, rows: Rows, manifest: Manifest, device: str, held: Mapping[str, Any], **more: Any
    ) -> Self:
        """Return the index of a version with these rows. The other arrays and ``text`` are ``held`` by kind."""
        index = cls(
            rows,
            text_weights=torch.from_numpy(held["text"]),
            metric=held.get("metric"),
            device=device,
            class_names=manifest.class_names,
            settings=manifest.settings,
            templates=manifest.templates,
            backbone=manifest.identity,
            parts=tuple(manifest.parts),
            provenance=manifest.provenance,
            next_key_id=manifest.next_key_id,
            fitted=manifest.fitted,
            built=manifest.built,
            groups=manifest.groups,
            **more,
        )
        index.prior = held.get("prior")
        index.scores = (
            Scores(held["scores"], index.settings) if held.get("scores") is not None else None
        )
        return index

    def reload(self) -> Index:
        """Return the current version of the index, or the index itself if it is up to date.

        Unsaved changes to the settings are lost. Raises UsageError if the index has no folder.
        """
        if self.stored is None:
            raise UsageError("reload: the index has no folder; save it first")
        manifest = self.stored.store.manifest()
        if manifest == self.stored.manifest:
            return self
        return self._opened_again(self.device, manifest)

    def _opened_again(self, device: str, manifest: Manifest) -> Index:
        """Open a version of the same store. Files that this index has open are not checked again."""
        assert self.stored is not None
        store = self.stored.store
        if not isinstance(self.stored, Stored):
            return cast("Index", store.load(device=device, version=manifest.version))
        verified = set(self.stored.manifest.data_files)
        check = Check(store.files, manifest, self.stored.verify, verified)
        return type(self).load(store.folder, device=device, check=check)

    def save(self, folder: str | os.PathLike[str], change: str = "save") -> Self:
        """Write the next version of an index folder, or the first version of a new folder (see :meth:`Versions.write`).

        Unchanged files are shared with the previous version. ``change`` describes the new version in the history.
        Returns this index, which is now the one in the folder. If the keys are in a table, returns another index, whose
        type is ``Flat``.

        Raises:
            StoreError: if the folder cannot be written, or if it has changed since it was loaded.
            InputError: if the contents cannot be stored.
        """
        with Versions(folder).write() as writer:
            same_store = (
                isinstance(self.stored, Stored)
                and self.stored.store.resolved == writer.store.resolved
            )
            if writer.parent is not None and same_store:
                self._check_current(writer)
            if not isinstance(self.rows, ArrayRows):
                return replace(self, rows=self.rows.written(writer)).committed(writer, change)
            self.__dict__ |= self.committed(writer, change).__dict__
            return self

    def committed(self, writer: Writer, change: str) -> Self:
        """Write the files that have changed, make this index the current version, and return it, mapped from its files.

        Raises the errors of :meth:`save`.
        """
        stored = self.stored if isinstance(self.stored, Stored) else None
        write(self._contents(), writer, stored)
        # Before the commit, so that an index whose logits overflow never becomes current.
        self.check_answers()
        made = self.altered(rows=self._mapped(writer))
        manifest = made.manifest_of(writer, change)
        writer.commit(manifest)
        made.stored = Stored(writer.store, manifest, "full", made._contents())
        return made

    def _mapped(self, writer: Writer) -> ArrayRows:
        """Return the rows with the arrays of the files that were written, so that their memory is free."""
        rows = self.rows.in_memory()
        held: dict[str, Any] = {"keys": rows.keys, "points": rows.points, "values": rows.values}
        for kind, array in held.items():
            on_gpu = isinstance(array, Tensor) and array.is_cuda
            if array is None or on_gpu or kind not in writer.files:
                continue
            mapped = read_array(writer.store.folder, writer.files[kind], array.shape)
            held[kind] = torch.from_numpy(mapped) if isinstance(array, Tensor) else mapped
        return replace(rows, **held, kept_in=None, pending=())

    def _check_current(self, writer: Writer) -> None:
        current = writer.parent.version if writer.parent else None
        if current is None or current != self.version:
            raise StoreError(
                f"{writer.store}: changed from version {self.version} to {current} since it was opened; try again"
            )

    def _contents(self) -> dict[str, Any]:
        rows = self.rows.in_memory()
        contents = self.fit_contents() | {
            "keys": rows.keys,
            "labels": rows.labels,
            "text": self.text_weights,
            "values": rows.values,
            "curve": self.curve,
            "index": rows.index,
        }
        if self.metric is None or self.metric.factor is None:  # else points are computed again
            contents["points"] = rows.points
        if rows.sums is not None and rows.sums.nbytes * SUMS_FROM <= rows.keys.nbytes:
            contents["sums"] = rows.sums
        return {kind: held for kind, held in contents.items() if held is not None}

    def fit_contents(self) -> dict[str, Any]:
        """Return what a fit found, by kind of file, apart from the values. It is ``None`` if it does not exist."""
        scores = self.current_scores
        return {
            "metric": self.metric,
            "prior": self.prior,
            "scores": None if scores is None else scores.rows,
        }

    def manifest_of(
        self,
        writer: Writer,
        change: str,
        table: Table | None = None,
        digests: dict[str, str] | None = None,
    ) -> Manifest:
        """Create the manifest of the next version, whose files are written. ``change`` tells what has changed."""
        assert self.next_key_id is not None
        files = {kind: writer.files[kind] for kind in SUFFIXES if kind in writer.files}
        return Manifest(
            version=writer.number,
            parent=writer.before,
            **created(),
            n=self.n,
            d=self.d,
            dtype=self.dtype,
            class_names=self.class_names,
            templates=self.templates,
            settings=self.settings,
            index=self.index_type,
            backbone=self.backbone.to_dict() if self.backbone and not self.parts else None,
            provenance=self.provenance,
            files=files,
            next_key_id=self.next_key_id,
            change=change,
            table=table,
            fitted=self.fitted,
            built=self.built,
            parts=list(self.parts),
            digests=digests or {},
            groups=self.groups,
        )


def _not_mapped(array: Any) -> Any:
    """Return an array that is not memory-mapped."""
    return np.array(array) if isinstance(array, np.memmap) else array


def _writable(array: KeyArray) -> KeyArray:
    """Return an array that torch accepts. In a process of joblib, it is mapped from a file that is read-only."""
    return np.require(array, requirements="W")


def _read_index(place: Path, manifest: Manifest, device: str) -> VectorIndex | None:
    """Return the stored index, or ``None`` if it has to be built."""
    if manifest.index == FLAT_FACTORY:
        return None
    file = manifest.files["index"]
    c = len(manifest.class_names)
    path = place / file.name
    half = manifest.dtype == "float16"
    index = VectorIndex.load(path, manifest.index, device, half, file.rows)
    matches = index.n <= c if index.by_class else index.n == manifest.files["keys"].rows
    if index.d != manifest.d or not matches:
        raise StoreError(f"{path}: does not match the manifest; build the index again")
    return index


def verify(folder: str | os.PathLike[str]) -> Index:
    """Verify every byte in all versions of an index folder, and check that the files are consistent.

    Returns the opened index. Raises StoreError if a file is damaged or does not match the others.
    """
    place = Versions(folder)
    index = Index.load(place.folder, device="cpu")
    rows = index.rows.in_memory()
    assert index.manifest is not None
    place.check_earlier(index.manifest)
    if not torch.isfinite(index.text_weights).all():
        raise StoreError(f"{place}: text weights are not finite; build the index again")
    if rows.values is not None and not torch.isfinite(rows.values).all():
        raise StoreError(
            f"{place}: values are not finite; fit again, or roll back to the previous version"
        )
    class_ids = rows.class_ids
    blocks = ((rows.keys[block], class_ids[block]) for block in slices(rows.n, KEY_BLOCK))
    if rows.sums is not None and not rows.sums.are_of(blocks):
        raise StoreError(
            f"{place}: sums do not match the keys; run index set --index auto, then fit"
        )
    vectors = rows.vectors
    faiss_index = rows.index
    if (
        faiss_index is not None and faiss_index.by_class
    ):  # the means are recomputed, because those in the index may be damaged
        vectors = Keys(rows.vectors, class_ids, len(index.class_names)).means.numpy()
    sample = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), 256)).astype(int))
    queries = np.ascontiguousarray(vectors[sample], dtype=np.float32)
    if not np.isfinite(queries).all():
        raise StoreError(f"{place}: keys are not finite; build the index again")
    if faiss_index is None:
        return index
    affinity, nearest = faiss_index.search(queries, 1)
    if faiss_index.exact_affinity:
        expected = np.einsum(
            "qd,qd->q", queries, vectors[np.maximum(nearest[:, 0], 0)], dtype=np.float64
        )
        if not np.allclose(affinity[:, 0], expected, rtol=1e-3, atol=1e-3):
            raise StoreError(
                f"{place}: the FAISS index does not match the keys; build the index again"
            )
    return index
