"""From logits to predictions, for an index in a folder or in a LanceDB store."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from retrieval_tip import tip
from retrieval_tip.backbones.base import Identity
from retrieval_tip.bounds import check_count
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, counted, warn_once
from retrieval_tip.html import markup, table
from retrieval_tip.predictions import PREDICTIONS, SCHEMA, Evidence, Predictions, lists
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.defaults import Statistics
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.logits import LOGITS, AnswerTerms, Retrieval, first_two, slices
from retrieval_tip.retrieval.vector_index import GPU_MAX_K
from retrieval_tip.settings import Built, Dtype, Fitted, KeysMet, Norms, Settings
from retrieval_tip.store import history
from retrieval_tip.store.manifest import DataFile, Manifest, Segment, Table, TableDigests

if TYPE_CHECKING:
    from retrieval_tip.cache_model import CacheModel

SHOWN_CLASSES = 8
"""Classes shown in a notebook."""

ASKED = 16
"""Keys whose logits are checked before they become a version."""

MOST_EXPONENT = 80.0
"""Largest exponent of a key's weight. float32 overflows from 88 on."""

PREDICTED, ARROW_LENGTH = 1 << 16, (1 << 31) - 1
"""Predictions turned into columns at a time, and the maximum length of an Arrow list or text column."""

GROWTH, ALL_FROM = 4, 8
"""An unsettled query is retried with 4 times as many keys, and with all of them beyond an eighth.

A GPU computes all keys faster than it retrieves more than ``GPU_MAX_K``."""


class AnsweringIndex(ABC):
    """An index that classifies: keys in memory or in a table, and ``text_weights`` ``[c, d]`` float32 of the classes.

    - ``settings``: defaults of every call
    - ``labels``: the label store, one row per key; key ids from ``next_key_id`` on have never been used
    - ``metric`` and ``values``: fitted or trained parts of the method (:mod:`tip`), described by ``fitted``
    - ``tuned``: weights file of a fine-tuned encoder
    - ``place`` and ``version``: where this was loaded from
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
    tuned: Path | None
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
        """Retrieval of the keys with the current settings."""

    @property
    @abstractmethod
    def index_type(self) -> str:
        """FAISS factory string of the index over the keys."""

    @property
    @abstractmethod
    def exact_search(self) -> bool:
        """Whether a search always finds the nearest keys."""

    @property
    @abstractmethod
    def manifest(self) -> Manifest | None:
        """Manifest of the version that this was loaded from or saved as."""

    @property
    @abstractmethod
    def place(self) -> str | None:
        """Folder or address that this was loaded from or saved to."""

    @abstractmethod
    def reload(self) -> AnsweringIndex:
        """Return the current version of the folder or store, or this index if it is current."""

    @abstractmethod
    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store for ``rows`` ``[m]`` of :class:`evidence.Nearest`."""

    @abstractmethod
    def every_row(self) -> npt.NDArray[np.int64]:
        """Return the row numbers ``[n]`` of all keys for :meth:`described`, in the order of :meth:`key_blocks`."""

    @abstractmethod
    def some(self, m: int) -> tuple[npt.NDArray[Any], pa.Table]:
        """Return at most ``m`` stored keys, spread evenly over all, with their ``key_id`` and ``class_id``."""

    @abstractmethod
    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """Return the label store's rows of these classes and key ids (default: all) whose source contains ``source``.

        ``source`` ignores case.
        """

    @property
    @abstractmethod
    def segments(self) -> int:
        """Number of segments of the keys."""

    @abstractmethod
    def known(self, digests: Sequence[str | None]) -> set[tuple[str, str]]:
        """Return the digest and label of each key that has one of these digests."""

    @abstractmethod
    def of_classes(self, class_ids: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Yield the class ids and stored keys of some classes, one block at a time."""

    @abstractmethod
    def stored_blocks(self) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        """Yield the labels and stored keys, one block at a time."""

    @abstractmethod
    def statistics(self) -> Statistics | None:
        """Return :func:`defaults.measure` of the keys in the metric, ``None`` if they have no spread."""

    @abstractmethod
    def take(self, rows: npt.NDArray[np.int64]) -> CacheModel:
        """Return an index in memory over some of the keys, by row of ``labels``. Raises UsageError for too many."""

    @abstractmethod
    def in_memory(self) -> CacheModel:
        """Return this index with all keys in memory. Raises UsageError for too many."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """Write the next version of an index folder; ``change`` is its entry in the history."""

    @property
    def counts(self) -> list[int]:
        """Number of keys of each class ``[c]``."""
        return list(self.retrieval.keys.counts.long().tolist())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n} keys of {self.d}, {len(self.class_names)} classes, "
            f"index={self.index_type!r}, alpha={self.settings.alpha:g}, beta={self.settings.beta:g}, "
            f"k={self.settings.k or 'all'}, device={self.device!r})"
        )

    def _repr_html_(self) -> str:
        """Show contents, settings and origin in a notebook."""
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
            ("text", f"logit scale {own.logit_scale:.4g}" if self.has_text else "none: the cache alone decides"),
            ("index", f"{self.index_type} on {self.device}"),
            ("backbone", self.backbone or "unnamed"),
            ("folder", f"{self.place}, version {self.version}" if self.place else "not from a folder"),
        ]
        return table((), rows, markup(f"<b>{type(self).__name__}</b>"))

    @property
    def has_text(self) -> bool:
        """Whether there are text weights. Without them, zero-shot logits are 0 and the cache alone decides."""
        return bool(self.text_weights.any())

    def caution(self, settings: Settings) -> str | None:
        """Return a warning if ``settings`` have another beta than the fit."""
        if self.fitted is None or settings.beta == self.settings.beta:
            return None
        return (
            f"beta: the index was fitted for {self.settings.beta:g}; any other beta makes answers and probabilities "
            "worse; refit with index set --beta"
        )

    def with_settings(self, settings: Settings) -> Self:
        """Return an index with other settings that shares these keys. Warns once if beta is not the fitted one."""
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
        return replace(self.retrieval, settings=self.settings.override(k=k, tail=tail))

    def terms(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return the terms of the logits: text ``logit_scale * f W^T``, and cache ``C`` without alpha.

        Takes and raises the same as :meth:`logits`.
        """
        terms = self._retrieval(k, tail).terms(self._queries(features))
        self._check(terms)
        return terms

    def check_answers(self) -> None:
        """Raise InputError if logits overflow, using a few of the index's own keys as queries."""
        settings, (keys, described) = self.settings, self.some(ASKED)
        own = torch.from_numpy(keys.astype(np.float32)).to(self.device)
        ids = torch.from_numpy(described["class_id"].to_numpy().astype(np.int64)).to(self.device)
        values = None if self.values is None else tip.Values(self.values[torch.from_numpy(spread(self.n, ASKED))])
        queries, retrieval = functional.normalize(own), self.retrieval
        affinity = tip.affinity(retrieval.points(queries), retrieval.points(own))
        cache = tip.cache_logits(affinity, ids, len(self.class_names), settings.beta, values=values)
        tip.log_cache(cache, settings.log_offset)
        self._check(tip.Terms(tip.text_logits(queries, self.text_weights, settings.logit_scale), cache))

    def check_lengths(self, keys: npt.NDArray[Any]) -> None:
        """Raise InputError if a unit query could overflow at one of these keys ``[m, d]``, given in the metric."""
        longest = float(np.sqrt(np.einsum("ij,ij->i", keys, keys, dtype=np.float64).max()))
        if self.settings.beta * (longest - 1) > MOST_EXPONENT:
            raise InputError(
                f"beta {self.settings.beta:g}: exp(beta (affinity - 1)) overflows for a key of norm {longest:.4g}; "
                "scale the keys to norm 1 (norms unit)"
            )

    def _check(self, terms: tip.Terms) -> None:
        if not len(terms.text):
            return
        settings, largest = self.settings, tip.Terms(_largest(terms.text), _largest(terms.cache))
        if not torch.isfinite(largest.cache):
            raise InputError(
                f"beta {settings.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller beta"
            )
        if not torch.isfinite(largest.logits(settings)):
            raise InputError(
                f"alpha {settings.alpha:g}, logit_scale {settings.logit_scale:g}: logits overflow; use smaller values"
            )

    def certified(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return terms with the same winners as over all keys, retrieving as few keys as each query needs.

        A query starts with ``k`` keys, then takes four times as many, and finally all, until no other key can change
        its winner (:func:`certify.certificate`; for an index over classes, :func:`certify.settled`). ``keys`` of the
        result is the number used. With exact search the winners are proven. With approximate search, keys that it
        misses are not considered. Solved or trained values can be negative, so they always need all keys. Takes and
        raises the same as :meth:`logits`.
        """
        f, retrieval = self._queries(features), self._retrieval(k, tail)
        text = f.new_empty(len(f), len(self.class_names))
        cache, keys = torch.empty_like(text), torch.full((len(f),), self.n)
        left, met = torch.arange(len(f), device=self.device), retrieval.settings.k
        most = self.n // ALL_FROM if self.device == "cpu" else min(self.n // ALL_FROM, GPU_MAX_K)
        while len(left):
            if met is not None and (met > most or self.values is not None):
                met = None
            asked = replace(retrieval, settings=retrieval.settings.override(k=met or "all"))
            terms = asked.terms(f[left], certify=True)
            text[left], cache[left] = terms.text, terms.cache
            keys[left.cpu()] = self.n if met is None else met
            left, met = left[:0] if terms.settled is None else left[~terms.settled], met and met * GROWTH
        answers = AnswerTerms(text, cache, keys=keys)
        self._check(answers)
        return answers

    def logits(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> Tensor:
        """Return the logits ``logit_scale * f W^T + alpha * C`` ``[q, c]`` float32, in the order of the classes.

        Args:
            features: ``[q, d]`` unit-norm features, array or tensor.
            k: number of nearest keys per query, or ``"all"``, which is exact Tip-Adapter. [default: from settings]
            tail: with ``k``, estimate the contribution of keys that were not retrieved (:func:`tip.cache_logits`).
                [default: from settings]

        Raises InputError if features are not finite or not ``[q, d]``, or if logits overflow; UsageError if ``k`` < 1.
        """
        return self.terms(features, k, tail).logits(self.settings)

    def classify(
        self,
        features: Features,
        top: int = 1,
        k: KeysMet = None,
        tail: bool | None = None,
        neighbours: int = 5,
        certify: bool = False,
        norms: Norms = "check",
    ) -> Predictions:
        """Classify features ``[q, d]``: label, probability, and the shots that contributed most to each answer.

        Args:
            features: ``[q, d]`` unit-norm features, array or tensor.
            top: number of classes to report, most probable first.
            k: as for :meth:`logits`.
            tail: as for :meth:`logits`.
            neighbours: number of shots to report (:class:`retrieval.evidence.Contributors`). With ``k``, only retrieved
                keys count.
            certify: retrieve as many keys as it takes to settle each label (:meth:`certified`).
            norms: ``"check"`` that features have norm 1, or ``"keep"`` them unchecked.

        Raises the same as :meth:`logits`, and InputError naming the first row whose norm is not 1.
        """
        check_count("top", top)
        retrieval, f = self._retrieval(k, tail), self._queries(features)
        if norms == "check":
            inputs.check_unit(f)
        shown = min(neighbours, retrieval.settings.k or neighbours)
        if certify:
            terms = self.certified(f, retrieval.settings.k or "all", retrieval.settings.tail)
        else:
            terms = retrieval.terms(f, neighbours=max(shown, 0))
            self._check(terms)
        size = min(PREDICTED, max(1, ARROW_LENGTH // len(self.class_names)))
        parts = slices(len(f), size) if len(f) else [slice(0)]
        columns = [_columns(self, f[part], terms.queries(part), retrieval, top, shown) for part in parts]
        return Predictions(pa.concat_tables(columns)).named(pa.array(np.arange(len(f))).cast(pa.string()))

    def classify_source(
        self,
        source: Source,
        encoder: Encoder,
        top: int = 1,
        k: KeysMet = None,
        tail: bool | None = None,
        neighbours: int = 5,
        certify: bool = False,
    ) -> Iterator[Predictions]:
        """Classify images or a feature table while reading it, and yield the predictions in order, with item names.

        Images need an ``encoder`` with this index's backbone. Unreadable items are left out and listed in
        ``encoder.skipped``. The other arguments are those of :meth:`classify`.
        """
        column = source.items["source"]
        for block in encoder.blocks(source):
            for part in self.parts(len(block.positions)):
                answers = self.classify(block.features[part], top, k, tail, neighbours, certify, "keep")
                yield answers.named(column.take(pa.array(block.positions[part])))

    def evidence(self, features: Features, complete: int = 1 << 14, nearest: int = 2048) -> list[Evidence]:
        """Return the evidence for queries ``[q, d]``: all keys if there are at most ``complete``, else ``nearest``.

        Raises InputError if features are not finite or not ``[q, d]``.
        """
        f, retrieval = self._queries(features), self.retrieval
        keys = retrieval.keys
        points = retrieval.points(f)
        near = self._every(points) if self.n <= complete else retrieval.nearest(points, nearest)
        used, where = np.unique(near.rows.clamp_min(0).cpu().numpy(), return_inverse=True)
        key_ids = self.described(used, ["key_id"])["key_id"].to_numpy()[where].reshape(near.rows.shape)
        text = tip.text_logits(f, self.text_weights, self.settings.logit_scale).cpu().numpy()
        sums = tip.Totals.of(points, keys.sums, keys.counts).affinities.cpu().numpy()
        counts, class_ids = keys.counts.long().cpu().numpy(), near.class_ids.cpu().numpy()
        affinity, there = near.affinity.cpu().numpy(), (near.rows >= 0).cpu().numpy()
        queries = zip(f.cpu().numpy(), text, key_ids, class_ids, affinity, sums, there, strict=True)
        return [
            Evidence(feature, own_text, ids[met], classes[met], own[met], counts, own_sums, self.n <= complete)
            for feature, own_text, ids, classes, own, own_sums, met in queries
        ]

    def _every(self, points: Tensor) -> Nearest:
        """Return all keys, nearest first."""
        blocks = [(tip.affinity(points, keys), ids.clone()) for keys, ids in self.key_blocks()]
        affinity, order = torch.cat([block_affinity for block_affinity, _ in blocks], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        rows, ids = torch.from_numpy(self.every_row()).to(order.device), torch.cat([ids for _, ids in blocks])
        return Nearest(affinity, rows[order], ids[order])

    def parts(self, q: int) -> Iterator[slice]:
        """Split ``q`` queries into slices of at most :data:`LOGITS` logits."""
        return slices(q, max(1, LOGITS // len(self.class_names)))

    def ids_of(self, source: Source) -> npt.NDArray[np.int64]:
        """Return the class ids of a labelled source's items. :meth:`Source.known_as` matches other spellings.

        Raises InputError if it has no items, or a label that is not a class of the index.
        """
        position = {name: i for i, name in enumerate(self.class_names)}
        labels = source.known_as(self.class_names).labels
        if not labels:
            raise InputError(f"{source.name}: has no items")
        unknown = sorted(set(labels) - position.keys())
        if unknown:
            raise InputError(
                f"{source.name}: {counted(len(unknown), 'unknown label')}: {', '.join(unknown[:5])}; "
                f"the classes are {', '.join(self.class_names[:5])}{' ...' if len(self.class_names) > 5 else ''}"
            )
        return np.array([position[label] for label in labels], dtype=np.int64)

    def key_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys in the metric ``[b, d]`` float32 and their class ids ``[b]``, on the device, in blocks."""
        return self.retrieval.keys.blocks()


class EditableIndex(AnsweringIndex):
    """An index whose edits become the next version of its folder or store. An edit that raises changes nothing."""

    @abstractmethod
    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        """Append classes without keys. An index with text needs their ``text_weights`` ``[m, d]``.

        Raises InputError if a name exists, or weights are missing or of the wrong shape.
        """

    @abstractmethod
    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        """Replace the text weights ``[c, d]`` and the templates that they were made from."""

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
        """Add keys ``[m, d]`` of existing classes, and return their key ids.

        ``views``, ``digests`` (SHA-256 of the images) and ``extra`` columns go into the label store. Raises InputError
        for keys of the wrong shape and unknown labels.
        """

    @abstractmethod
    def remove(self, key_ids: Sequence[int]) -> None:
        """Remove keys by id; classes stay. Raises InputError for an unknown id, or if no key would remain."""

    @abstractmethod
    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
        """Move keys to other classes: one label for each, or one for all. They become the last shots of their class.

        Raises InputError for an unknown id or label, or a repeated id.
        """

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Rename a class; its keys and text weight stay.

        If ``new`` exists, merge the two: the keys move to ``new``, which keeps its text weight, and the ids of later
        classes decrease by one. Raises InputError if ``old`` does not exist or ``new`` is not a valid name.
        """

    @abstractmethod
    def compact(self) -> None:
        """Merge all segments into one, with an index of the same type."""


def manifest_of(
    index: AnsweringIndex,
    number: int,
    parent: Manifest | None,
    change: str,
    files: dict[str, DataFile],
    *,
    later: Sequence[Segment] = (),
    table: Table | None = None,
    digests: TableDigests | None = None,
) -> Manifest:
    """Return the manifest of version ``number``, made from ``parent`` by ``change``."""
    return Manifest(
        version=number, parent=None if parent is None else parent.version, **history.stamp(),
        n=index.n, d=index.d, dtype=index.dtype, class_names=index.class_names, templates=index.templates,
        settings=index.settings, index=index.index_type,
        backbone=index.backbone.to_dict() if index.backbone else None, provenance=index.provenance, files=files,
        later=list(later), next_key_id=index.next_key_id, change=change, table=table, fitted=index.fitted,
        built=index.built, digests=digests,
    )  # fmt: skip


def _columns(
    index: AnsweringIndex, f: Tensor, terms: AnswerTerms, retrieval: Retrieval, top: int, neighbours: int
) -> pa.Table:
    logits, shots = terms.logits(index.settings), terms.shots
    ranked = logits.topk(min(top, logits.shape[1]), dim=1).indices  # the same at any temperature
    chances = _doubles(tip.probabilities(logits, index.settings.temperature).gather(1, ranked))
    winner = ranked[:, :1]
    if shots is None and neighbours > 0:
        shots = retrieval.contributors(retrieval.points(f), *first_two(logits), neighbours)
    m, names = ranked.shape[1], pa.array(index.class_names, pa.string())
    labels = names.take(pa.array(ranked.cpu().numpy().reshape(-1)))
    columns = {
        "input": pa.nulls(len(f), pa.string()),
        "label": labels if m == 1 else names.take(pa.array(ranked[:, 0].cpu().numpy())),
        "probability": chances[:, 0],
        "labels": lists(labels, m),
        "probabilities": lists(chances, m),
        "text_logit": _doubles(terms.text.gather(1, winner))[:, 0],
        "cache_logit": index.settings.alpha * _doubles(terms.cache.gather(1, winner))[:, 0],
        "neighbours": _neighbours(index, None if shots is None else shots.supporting, ranked),
        "opposing": _opposing(index, None if shots is None else shots.opposing, ranked),
        "logits": lists(logits.cpu().numpy(), logits.shape[1]),
    }
    if terms.keys is not None:
        columns["keys"] = terms.keys.cpu().numpy()
    if index.settings.least_cache is not None:
        columns["unlike"] = (terms.cache.amax(dim=1) < index.settings.least_cache).cpu().numpy()
    known = [column for column in PREDICTIONS if column in columns]
    return pa.table([columns[column] for column in known], schema=pa.schema([SCHEMA.field(c) for c in known]))


def _neighbours(index: AnsweringIndex, near: Nearest | None, classes: Tensor) -> pa.ListArray:
    """Return the supporting keys of each query, with their contributions to its ``classes`` ``[q, m]``."""
    kind = PREDICTIONS["neighbours"]
    if near is None:
        ends = np.zeros(len(classes) + 1, np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array([], kind.value_type))
    there = near.rows >= 0
    ends = np.concatenate([[0], there.sum(dim=1).cumsum(dim=0).cpu().numpy()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), _described(index, near, classes))


def _opposing(index: AnsweringIndex, near: Nearest | None, classes: Tensor) -> pa.StructArray:
    """Return the strongest key against each answer, or null."""
    if near is None:
        return pa.nulls(len(classes), PREDICTIONS["opposing"])
    there = (near.rows[:, 0] >= 0).cpu().numpy()
    return _described(index, near, classes).take(pa.array(there.cumsum() - 1, mask=~there))


def _described(index: AnsweringIndex, near: Nearest, classes: Tensor) -> pa.StructArray:
    """Return the keys of ``near``, without empty slots, as one column, query by query."""
    there = near.rows >= 0
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


def _largest(logits: Tensor) -> Tensor:
    """Return the largest absolute value, or NaN if there is one, without copying the logits."""
    return torch.stack(logits.aminmax()).abs().amax()


def spread(n: int, m: int) -> npt.NDArray[np.int64]:
    """Return at most ``m`` of ``n`` positions, ascending and evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, m)).round().astype(np.int64))
