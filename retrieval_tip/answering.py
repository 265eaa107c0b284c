"""Answers: what an index says of a query, wherever its keys are kept."""

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
"""Classes that a notebook shows."""

ASKED = 16
"""Keys that are asked about, before they become a version."""

MOST_EXPONENT = 80.0
"""Largest exponent of a key's weight; from 88 on, float32 overflows."""

PREDICTED, ARROW_LENGTH = 1 << 16, (1 << 31) - 1
"""Predictions that are made columns of at a time, and the largest length of an Arrow list or text column."""

GROWTH, ALL_FROM = 4, 8
"""A query that is not settled meets so many times the keys; where these are more than an eighth of all, all.

A GPU meets all keys faster than it retrieves more than FAISS does there."""


class AnsweringIndex(ABC):
    """An index that answers: keys, wherever they are kept, and ``text_weights`` ``[c, d]`` float32 of the classes.

    ``settings`` are those kept with an index: calls answer by them unless told otherwise. ``values`` are what each key
    gives to each class, where they were solved or trained, ``tuned`` the weights of a fine-tuned encoder. ``metric``
    and ``fitted`` are what was fitted. ``labels`` is the label store, a row a key; ids from ``next_key_id`` on were
    never given to a key.
    ``folder`` and ``version`` say which version of what this is.
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
        """Of the stored keys: float32 or float16."""

    @property
    @abstractmethod
    def retrieval(self) -> Retrieval:
        """The retrieval of keys, with the settings as they are now."""

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
    def reload(self) -> AnsweringIndex:
        """The current version of what this was loaded from or saved to; itself, where this is that."""

    @abstractmethod
    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Return columns of the label store for ``rows`` ``[m]`` of :class:`evidence.Nearest`."""

    @abstractmethod
    def every_row(self) -> npt.NDArray[np.int64]:
        """The rows that :meth:`described` knows the keys by ``[n]``, in the order of :meth:`key_blocks`."""

    @abstractmethod
    def some(self, m: int) -> tuple[npt.NDArray[Any], pa.Table]:
        """At most ``m`` keys, spread evenly over all, as they are stored, and their ``key_id`` and ``class_id``."""

    @abstractmethod
    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """The label store's rows of these classes and key ids (all, where none is named) whose source has that text.

        Case does not matter in ``source``.
        """

    @property
    @abstractmethod
    def segments(self) -> int:
        """Number of pieces that the keys are in."""

    @abstractmethod
    def known(self, digests: Sequence[str | None]) -> set[tuple[str, str]]:
        """Return digest and label of the keys that have one of these digests."""

    @abstractmethod
    def of_classes(self, class_ids: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Yield class ids and keys, as they are stored, of some classes, a block at a time."""

    @abstractmethod
    def stored_blocks(self) -> Iterator[tuple[pa.Table, npt.NDArray[Any]]]:
        """Yield labels and keys, as they are stored, a block at a time."""

    @abstractmethod
    def statistics(self) -> Statistics | None:
        """Return :func:`defaults.measure` of what queries meet; ``None`` if nothing spreads."""

    @abstractmethod
    def take(self, rows: npt.NDArray[np.int64]) -> CacheModel:
        """Return an index in memory over some of the keys, by their places in ``labels``.

        Raises UsageError if they are too many.
        """

    @abstractmethod
    def in_memory(self) -> CacheModel:
        """Return the same index with all keys in memory; itself, if they are. Raises UsageError for too many."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """Write the next version of an index folder; ``change`` is what its history says of it."""

    @property
    def counts(self) -> list[int]:
        """Keys of each class ``[c]``."""
        return list(self.retrieval.keys.counts.long().tolist())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n} keys of {self.d}, {len(self.class_names)} classes, "
            f"index={self.index_type!r}, alpha={self.settings.alpha:g}, beta={self.settings.beta:g}, "
            f"k={self.settings.k or 'all'}, device={self.device!r})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: what this index holds, its settings, and where it comes from."""
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
        """Whether there are text weights; without them zero-shot logits are 0 and the cache alone decides."""
        return bool(self.text_weights.any())

    def caution(self, settings: Settings) -> str | None:
        """Return a warning if answers by these settings are worse than they need be: a fit holds for one beta."""
        if self.fitted is None or settings.beta == self.settings.beta:
            return None
        return (
            f"beta: this index was fitted for {self.settings.beta:g}, and another one gives worse answers and "
            "probabilities; index set --beta fits it again"
        )

    def with_settings(self, settings: Settings) -> Self:
        """Return the same keys, answering by other settings; what was measured on the keys is shared.

        Warns once about another beta than the one that the index was fitted for.
        """
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
        """Return the retrieval of keys, with ``k`` and ``tail`` overridden where given."""
        if k is None and tail is None:
            return self.retrieval
        return replace(self.retrieval, settings=self.settings.override(k=k, tail=tail))

    def terms(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return the terms of the logits, text ``logit_scale * f W^T`` and cache ``C`` (without alpha).

        Arguments and errors as for :meth:`logits`.
        """
        terms = self._retrieval(k, tail).terms(self._queries(features))
        self._check(terms)
        return terms

    def check_answers(self) -> None:
        """Raise unless this can answer: of a few of its own keys, as unit queries, the logits over these keys.

        So it costs the same however many keys there are. UsageError and InputError as :meth:`logits`.
        """
        settings = self.settings
        keys, described = self.some(ASKED)
        own = torch.from_numpy(keys.astype(np.float32)).to(self.device)
        ids = torch.from_numpy(described["class_id"].to_numpy().astype(np.int64)).to(self.device)
        values = None if self.values is None else tip.Values(self.values[torch.from_numpy(spread(self.n, ASKED))])
        queries, retrieval = functional.normalize(own), self.retrieval
        affinity = tip.affinity(retrieval.points(queries), retrieval.points(own))
        cache = tip.cache_logits(affinity, ids, len(self.class_names), settings.beta, values=values)
        tip.log_cache(cache, settings.log_offset)
        self._check(tip.Terms(tip.text_logits(queries, self.text_weights, settings.logit_scale), cache))

    def check_lengths(self, keys: npt.NDArray[Any]) -> None:
        """Raise InputError if a unit query could overflow at one of these keys ``[m, d]``, as queries meet them."""
        longest = float(np.sqrt(np.einsum("ij,ij->i", keys, keys, dtype=np.float64).max()))
        if self.settings.beta * (longest - 1) > MOST_EXPONENT:
            raise InputError(
                f"beta {self.settings.beta:g}: exp(beta (affinity - 1)) overflows for a key of norm {longest:.4g}; "
                "scale keys to norm 1 (norms unit)"
            )

    def _check(self, terms: tip.Terms) -> None:
        """Raise InputError, naming the setting, if the logits are not finite."""
        if not len(terms.text):
            return
        settings, largest = self.settings, tip.Terms(_largest(terms.text), _largest(terms.cache))
        if not torch.isfinite(largest.cache):
            raise InputError(
                f"beta {settings.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller one"
            )
        if not torch.isfinite(largest.logits(settings)):
            raise InputError(
                f"alpha {settings.alpha:g} or logit_scale {settings.logit_scale:g}: too large, the logits overflow; "
                "use smaller ones"
            )

    def certified(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return terms whose winners are those over all keys, from as few keys as settle each query.

        A query meets ``k`` keys, then four times as many, at last all, until no key that it has not met can change its
        winner (:func:`certify.certificate`; with an index over classes :func:`certify.settled`). ``keys`` of the terms
        says how many. After exact search the winners are proven; after approximate search they agree with those over
        all keys as far as it looked. Solved or trained values always take all keys: they may be negative. Arguments
        and errors as for :meth:`logits`.
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
        """Blended logits ``logit_scale * f W^T + alpha * C`` ``[q, c]`` float32, classes in the index's order.

        Args:
            features: ``[q, d]`` unit-norm features, array or tensor.
            k: how many of the nearest keys a query uses, or ``all``, Tip-Adapter exactly; by default the index's own.
            tail: with ``k``, estimate what the keys that were not retrieved add (see :func:`tip.cache_logits`); by
                default as the index has it.

        Raises InputError where features are not finite or not ``[q, d]``, or logits overflow; UsageError where ``k``
        is below 1.
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
        """Answer queries: label, probability, and the ``neighbours`` shots that contributed most to each answer.

        :class:`retrieval.evidence.Contributors` defines contributions. With ``k``, only keys that a query meets count.

        Arguments as for :meth:`logits`; ``top`` classes are reported, most probable first; with ``certify`` each query
        meets as many keys as settle its label (:meth:`certified`). ``norms``: ``check`` that features have norm 1, as
        their keys had, or ``keep`` them. Raises InputError naming the row that has not, which raw features have not.
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
        """Classify images or a feature table, as it is read: answers to the items that could be, in order, by name.

        ``encoder`` needs the backbone of this index for images; ``encoder.skipped`` names what could not be read. The
        other arguments as for :meth:`classify`.
        """
        column = source.items["source"]
        for block in encoder.blocks(source):
            for part in self.parts(len(block.positions)):
                answers = self.classify(
                    block.features[part], top, k, tail, neighbours, certify, norms="keep"
                )  # checked
                yield answers.named(column.take(pa.array(block.positions[part])))

    def evidence(self, features: Features, complete: int = 1 << 14, nearest: int = 2048) -> list[Evidence]:
        """Return :class:`predictions.Evidence` of queries ``[q, d]``: all of up to ``complete`` keys, else ``nearest``.

        Raises InputError where features are not finite or not ``[q, d]``.
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

    def _every(self, points: Tensor) -> Nearest:
        """All keys, nearest first."""
        blocks = [(tip.affinity(points, keys), ids.clone()) for keys, ids in self.key_blocks()]
        affinity, order = torch.cat([block_affinity for block_affinity, _ in blocks], dim=1).sort(
            dim=1, descending=True, stable=True
        )
        rows, ids = torch.from_numpy(self.every_row()).to(order.device), torch.cat([ids for _, ids in blocks])
        return Nearest(affinity, rows[order], ids[order])

    def parts(self, q: int) -> Iterator[slice]:
        """Slices of ``q`` queries that have :data:`LOGITS` logits at most."""
        return slices(q, max(1, LOGITS // len(self.class_names)))

    def ids_of(self, source: Source) -> npt.NDArray[np.int64]:
        """Class ids of the items of a labelled source, whose labels may be spelled otherwise (:meth:`Source.known_as`).

        Raises InputError where it has no items, or labels that are no class of the index.
        """
        position = {name: i for i, name in enumerate(self.class_names)}
        labels = source.known_as(self.class_names).labels
        if not labels:
            raise InputError(f"{source.name}: has no items")
        unknown = sorted(set(labels) - position.keys())
        if unknown:
            are = counted(len(unknown), "label", "is", "are")
            raise InputError(
                f"{source.name}: {are} no class of the index: {', '.join(unknown[:5])}; "
                f"its classes are {', '.join(self.class_names[:5])}{' ...' if len(self.class_names) > 5 else ''}"
            )
        return np.array([position[label] for label in labels], dtype=np.int64)

    def key_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys, in the metric, ``[b, d]`` float32 and their class ids ``[b]``, a block at a time, on the device."""
        return self.retrieval.keys.blocks()


class EditableIndex(AnsweringIndex):
    """An index that is to become the next version of its store. An edit that raises changes nothing."""

    @abstractmethod
    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        """Add classes after those there are, without a key; an index with text needs their ``text_weights`` ``[m, d]``.

        Raises InputError for names that are there, or weights that are missing or do not fit.
        """

    @abstractmethod
    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        """Take other text weights ``[c, d]``, made from these templates."""

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
        """Add keys ``[m, d]`` of known classes, and return their key ids.

        ``views``, ``digests`` (SHA-256 of the images) and ``extra`` columns go into the label store. Raises InputError
        for keys or labels that do not fit.
        """

    @abstractmethod
    def remove(self, key_ids: Sequence[int]) -> None:
        """Remove keys by id; classes stay. Raises InputError for an unknown id, and if no key would be left."""

    @abstractmethod
    def relabel(self, key_ids: Sequence[int], labels: str | Sequence[str]) -> None:
        """Give keys to another class each, or all to one, as its last shots.

        Raises InputError for an unknown id or label, or an id that occurs twice.
        """

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a class another name; its keys and text weight stay.

        If ``new`` is a class already, the two become one: the keys join those of ``new``, whose text weight stays, and
        the ids of later classes move down by one. Raises InputError if there is no class ``old`` or ``new`` cannot be
        a name.
        """

    @abstractmethod
    def compact(self) -> None:
        """Make all keys one piece, indexed as the first one is."""


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
    """Return the manifest of an index as the version ``number`` after its ``parent``; ``change`` is what made it."""
    return Manifest(
        version=number,
        parent=None if parent is None else parent.version,
        **history.stamp(),
        n=index.n,
        d=index.d,
        dtype=index.dtype,
        class_names=index.class_names,
        templates=index.templates,
        settings=index.settings,
        index=index.index_type,
        backbone=index.backbone.to_dict() if index.backbone else None,
        provenance=index.provenance,
        files=files,
        later=list(later),
        next_key_id=index.next_key_id,
        change=change,
        table=table,
        fitted=index.fitted,
        built=index.built,
        digests=digests,
    )


def _columns(
    index: AnsweringIndex, f: Tensor, terms: AnswerTerms, retrieval: Retrieval, top: int, neighbours: int
) -> pa.Table:
    """Return the columns of :class:`Predictions`; ``input`` is empty."""
    logits, shots = terms.logits(index.settings), terms.shots
    ranked = logits.topk(min(top, logits.shape[1]), dim=1).indices  # no temperature can change it
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
    """Return the keys of each query with what they contribute to its ``classes`` ``[q, m]``, most to the first."""
    kind = PREDICTIONS["neighbours"]
    if near is None:
        ends = np.zeros(len(classes) + 1, np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array([], kind.value_type))
    there = near.rows >= 0
    ends = np.concatenate([[0], there.sum(dim=1).cumsum(dim=0).cpu().numpy()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), _described(index, near, classes))


def _opposing(index: AnsweringIndex, near: Nearest | None, classes: Tensor) -> pa.StructArray:
    """Return the key that counts most against each answer, null where there is none."""
    if near is None:
        return pa.nulls(len(classes), PREDICTIONS["opposing"])
    there = (near.rows[:, 0] >= 0).cpu().numpy()
    return _described(index, near, classes).take(pa.array(there.cumsum() - 1, mask=~there))


def _described(index: AnsweringIndex, near: Nearest, classes: Tensor) -> pa.StructArray:
    """Return all keys of ``near`` that are there as one column, query by query."""
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
    """Figures as they are written."""
    doubles: npt.NDArray[np.float64] = values.double().cpu().numpy()
    return doubles


def _largest(logits: Tensor) -> Tensor:
    """The largest absolute value, NaN where there is one; without a copy of the logits."""
    return torch.stack(logits.aminmax()).abs().amax()


def spread(n: int, m: int) -> npt.NDArray[np.int64]:
    """At most ``m`` of ``n`` places, ascending and evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, m)).round().astype(np.int64))
