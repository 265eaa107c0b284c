"""The questions that an index answers, and the keys, values and settings that it answers with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.backbones.base import Identity, Part, equal_shares
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, check_count, warn_once
from retrieval_tip.predictions import PREDICTIONS, SCHEMA, Predictions, SimilarShot, lists
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.inputs import Features, KeyArray, KeysInPlace
from retrieval_tip.retrieval.keys import Keys, points_of
from retrieval_tip.retrieval.logits import LOGITS, AnswerTerms, Retrieval, finite_logits, first_two, slices
from retrieval_tip.retrieval.rows import ArrayRows, Rows
from retrieval_tip.retrieval.sets import Scores, Sets
from retrieval_tip.retrieval.vector_index import FLAT_FACTORY, VectorIndex
from retrieval_tip.settings import Ask, AskOptions, Built, Dtype, Fitted, KeysMet, Levels, Norms, Precision, Settings
from retrieval_tip.store.labels import rows_with
from retrieval_tip.store.sums import Sums

PREDICTED = 1 << 16
"""Maximum number of queries that are classified at a time."""


@dataclass(repr=False)
class Answering:
    """Labelled keys, and what was fitted to them. See :class:`Index` for the attributes."""

    rows: Rows
    class_names: list[str]
    text_weights: Tensor
    settings: Settings = field(default_factory=Settings)
    templates: list[str] = field(default_factory=list)
    backbone: Identity | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    curve: pa.Table | None = None
    precision: Precision = "float32"
    next_key_id: int | None = None
    metric: tip.Metric | None = None
    fitted: Fitted | None = None
    built: Built = field(default_factory=Built)
    parts: tuple[Part, ...] = ()
    groups: Levels | None = None
    factory: InitVar[str] = FLAT_FACTORY
    prior: npt.NDArray[np.float32] | None = field(default=None, init=False)
    scores: Scores | None = field(default=None, init=False)

    def __post_init__(self, factory: str) -> None:
        self.text_weights = self.text_weights.to(self.device)
        self.metric = None if self.metric is None else self.metric.to(self.device)
        if isinstance(self.rows, ArrayRows):
            self.rows = self._on_device(self.rows)
            if self.rows.index is None:
                self.rows = self.rows.indexed(len(self.class_names), factory, self.device)
        if self.next_key_id is None:
            self.next_key_id = int(self.rows.columns("key_id")["key_id"].to_numpy().max()) + 1
        self._follow()
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; pass one row per epoch, or None")

    def _on_device(self, rows: ArrayRows) -> ArrayRows:
        points, values = rows.points, rows.values
        if self.metric is None:
            points = None
        elif points is None:
            points = points_of(self.metric, rows.keys, self.device)
        if values is not None:
            inputs.check_shape("values", values.shape, (rows.n, len(self.class_names)), "one row per key")
            values = values.detach().to(self.device, torch.float32)
        return replace(rows, points=points, values=values)

    def _follow(self) -> None:
        rows, c = self.rows, len(self.class_names)
        if isinstance(rows, ArrayRows) and rows.index is not None and rows.index.by_class and rows.index.n != c:
            self.rows = rows.indexed(c, device=self.device)
        self._keys = self.rows.stream(c, self.device, self.precision, self.metric)

    @property
    def index(self) -> VectorIndex | None:
        """The FAISS index over the keys or, if there is a metric, over the points. A table has an index of its own."""
        return self._keys.index if isinstance(self._keys, Keys) else None

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
    def sums(self) -> Sums | None:
        """The sums that are needed to fit a metric, if known."""
        return self.rows.sums

    @sums.setter
    def sums(self, sums: Sums | None) -> None:
        self.rows = self.rows.with_sums(sums)

    @property
    def class_ids(self) -> Tensor:
        """The class ids as an int64 tensor of shape ``[n]`` on the device."""
        return self._keys.class_ids if isinstance(self._keys, Keys) else torch.from_numpy(self.rows.class_ids)

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
        return list(self._keys.counts.long().tolist())

    @property
    def bare(self) -> list[str]:
        """The classes that have no keys."""
        return [name for name, number in zip(self.class_names, self.counts, strict=True) if not number]

    @property
    def index_type(self) -> str:
        """The type of the index, which is a FAISS factory string or the type of a table's index."""
        return self._keys.index_type

    @property
    def exact_search(self) -> bool:
        """Whether a search is guaranteed to find the nearest keys."""
        return self._keys.exact_search

    @property
    def has_text(self) -> bool:
        """Whether the index has text weights. If not, zero-shot logits are 0 and only the cache is used."""
        return bool(self.text_weights.any())

    @property
    def shares(self) -> tuple[float, ...]:
        """How much each encoder counts, if there are several. The shares sum to 1."""
        own = () if self.fitted is None else self.fitted.shares
        return own or equal_shares(self.parts)

    @property
    def text(self) -> Tensor:
        """The text weights as queries meet them, in which each encoder has its share."""
        scale = inputs.scale_of(self.parts, self.shares)
        return self.text_weights if scale is None else self.text_weights * scale.square().to(self.text_weights)

    @property
    def retrieval(self) -> Retrieval:
        """The object that retrieves keys, using the current settings."""
        text = self.text if self.parts else self.text_weights
        return Retrieval(keys=self._keys, text_weights=text, settings=self.settings)

    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """Return the rows of the label store that match all of the given filters.

        By default, all classes and key ids match. ``source`` matches any source that contains it, ignoring case.
        """
        if key_ids:
            return rows_with(self.rows.where("key_id", list(dict.fromkeys(key_ids))), labels, source)
        return rows_with(self.rows.where("label", list(dict.fromkeys(labels))) if labels else self.labels, (), source)

    def having(self, column: Literal["digest", "source"], values: Iterable[str | None]) -> pa.Table:
        """Return the rows of the label store that have one of the given digests or sources."""
        return self.rows.where(column, list(dict.fromkeys(value for value in values if value is not None)))

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
        return inputs.queries(features, self.text_weights.shape[1], self.parts).to(self.device)

    def terms(self, features: Features, k: KeysMet = None, tail: bool | None = None) -> AnswerTerms:
        """Return the terms of the logits: the text term ``logit_scale * f W^T``, the cache ``C`` and the discriminant.

        They are not multiplied by alpha and gamma. The arguments are the same as for :meth:`logits`.
        """
        retrieval = replace(self.retrieval, settings=self.settings.override(k=k, tail=tail))
        terms = retrieval.terms(self._queries(features))
        finite_logits(terms, self.settings)
        return terms

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
        retrieval = self.retrieval
        if k is not None or tail is not None:
            retrieval = replace(retrieval, settings=self.settings.override(k=k, tail=tail))
        return finite_logits(retrieval.terms(self._queries(features)), self.settings)

    def exact_logits(self, features: Features) -> Tensor:
        """Return logits over all keys, computed in float64. This is useful for solved or trained values.

        The contributions of such values partly cancel, so in float32 the rounding error depends on the batch.
        """
        return finite_logits(self.retrieval.terms(self._queries(features).double()), self.settings)

    def answers(self, blocks: Iterable[FeatureBlock], ask: Ask = Ask()) -> Iterator[AnswerBlock]:
        """Classify blocks of features, and yield their answers in order. Everything that classifies uses this loop.

        Large blocks are split, so that the answers do not take much memory. The norms of the features are not checked.
        Raises the same errors as :meth:`logits`.
        """
        sets = self.sets(ask)
        index = self.with_settings(ask.settings(self.settings))
        retrieval = index._without(ask.without) if ask.without else index.retrieval
        shown = min(ask.neighbours, index.settings.k or ask.neighbours)
        ask = replace(ask, neighbours=shown)
        for block in blocks:
            f = index._queries(block.features)
            for part in slices(len(f), max(1, min(PREDICTED, LOGITS // len(index.class_names)))):
                own = f[part]
                terms = retrieval.terms(own, neighbours=shown)
                logits = finite_logits(terms, index.settings)
                yield AnswerBlock(index, retrieval, ask, sets, block.take(part), own, terms, logits)

    @property
    def current_scores(self) -> Scores | None:
        """The scores of the last fit, or ``None`` if keys, labels, text or settings have changed since."""
        return self.scores if self.scores is not None and self.scores.settings == self.settings else None

    def sets(self, ask: Ask) -> Sets | None:
        """Return the rule for the sets of classes that a question asks for.

        Raises UsageError if the index has no groups for ``at_least``, or if ``coverage`` was measured for other keys or
        settings.
        """
        if ask.at_least is not None and self.groups is None:
            raise UsageError("at_least: the index has no groups; set them first (index set --groups TABLE)")
        if ask.coverage is None:
            return None
        scores = self.current_scores
        if scores is None or ask.without or ask.settings(self.settings) != self.settings:
            raise UsageError(
                "coverage: needs a fit to exactly these keys and settings; leave out options that change them, or fit "
                "again (retrieval-tip fit INDEX)"
            )
        return scores.sets(ask.coverage, self.text_weights.any(1).cpu().numpy())

    def _without(self, key_ids: Sequence[int]) -> Retrieval:
        rows, class_ids = (torch.from_numpy(found).to(self.device) for found in self.rows.numbered(key_ids))
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
        f = self._queries(features)
        if norms == "check":
            inputs.check_unit(f)
        blocks = self.answers([FeatureBlock.of(f.cpu().numpy())], Ask(**asked))
        return Predictions.joined(block.predictions() for block in blocks)

    def classify_source(self, source: Source, reader: Reader, ask: Ask = Ask()) -> Iterator[Predictions]:
        """Classify images or a feature table while reading them, and yield the predictions in order.

        To classify images, pass a ``reader``. Unreadable items are skipped and listed in ``reader.skipped``.
        """
        column, reader = source.items["source"], reader.for_queries(self.parts, self.shares) if self.parts else reader
        for answers in self.answers(reader.blocks(source), ask):
            yield answers.predictions().named(column.take(pa.array(answers.block.positions)))

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Return the affinities and rows of the ``k`` nearest keys of each query, both of shape ``[q, k]``.

        The affinities are exact even if the index is compressed. Empty slots have row -1.
        """
        near = self._keys.nearest(self._keys.points(features), k)
        return near.affinity, near.rows.cpu().numpy()

    def similar(self, features: Features, n: int = 5, *, norms: Norms = "check") -> list[list[SimilarShot]]:
        """Return the ``n`` shots that are nearest to each query in the metric of the index, nearest first.

        ``features`` has the shape ``[q, d]``. If the index searches approximately, a shot may be missed. See
        :meth:`classify` for ``norms``. Raises UsageError if ``n`` is below 1, and InputError if the features are not
        valid.
        """
        check_count("n", n)
        f = self._queries(features)
        if norms == "check":
            inputs.check_unit(f)
        affinity, rows = self.nearest(f, min(n, self.n))
        used, places = np.unique(rows.clip(min=0), return_inverse=True)
        described = self.rows.described(used, ["key_id", "source", "label"]).to_pylist()
        return [
            [SimilarShot(**described[i], affinity=float(x)) for row, i, x in zip(*one, strict=True) if row >= 0]
            for one in zip(rows, places.reshape(rows.shape), affinity.double().cpu().numpy(), strict=True)
        ]

    def ids_of(self, source: Source) -> npt.NDArray[np.int64]:
        """Return the class id of each item in a labelled source. Raises InputError if a label is not a class."""
        ids, names = source.truth(self.class_names)
        if unknown := names[len(self.class_names) :]:
            raise source.unknown(unknown, self.class_names)
        return ids


@dataclass(frozen=True, eq=False)
class AnswerBlock:
    """The answers to a block of queries.

    Attributes:
        index: the index, with the settings of the question.
        retrieval: the retrieval that gave the answers.
        ask: the question.
        sets: the rule for sets of classes, if the question has a coverage.
        block: the queries.
        features: the features of the queries, of shape ``[q, d]``, as a float32 tensor on the device.
        terms: the terms of the logits.
        logits: the logits of all classes, of shape ``[q, c]``.
    """

    index: Answering
    retrieval: Retrieval
    ask: Ask
    sets: Sets | None
    block: FeatureBlock
    features: Tensor
    terms: AnswerTerms
    logits: Tensor

    @cached_property
    def ranked(self) -> Tensor:
        """The class ids of the most probable classes, of shape ``[q, m]``, most probable first."""
        return self.logits.topk(min(self.ask.top, self.logits.shape[1]), dim=1).indices

    @cached_property
    def probabilities(self) -> Tensor:
        """The probabilities of all classes, of shape ``[q, c]``."""
        return tip.probabilities(self.logits, self.index.settings.temperature)

    def predictions(self) -> Predictions:
        """Return one prediction per query. The queries are named by their positions."""
        settings, terms, logits = self.index.settings, self.terms, self.logits
        ranked = self.ranked  # at any temperature
        chances = _doubles(self.probabilities.gather(1, ranked))
        winner, m, names = ranked[:, :1], ranked.shape[1], pa.array(self.index.class_names, pa.string())
        labels = names.take(pa.array(ranked.cpu().numpy().reshape(-1)))
        columns = {
            "input": pa.array(self.block.positions).cast(pa.string()),
            "label": labels if m == 1 else names.take(pa.array(ranked[:, 0].cpu().numpy())),
            "probability": chances[:, 0],
            "labels": lists(labels, m),
            "probabilities": lists(chances, m),
            "text_logit": _doubles(terms.text.gather(1, winner))[:, 0],
            "cache_logit": settings.alpha * _doubles(terms.cache.gather(1, winner))[:, 0],
            "neighbours": pa.array([[]] * len(ranked), PREDICTIONS["neighbours"]),
            "opposing": pa.nulls(len(ranked), PREDICTIONS["opposing"]),
        }
        if self.ask.at_least is not None and self.index.groups is not None:
            columns |= narrowest(self.probabilities, self.index.class_names, self.index.groups, self.ask.at_least)
        if self.sets is not None:
            columns["set"] = self.sets.column(self.probabilities, self.index.class_names)
        shots, retrieval = terms.shots, self.retrieval
        if shots is None and self.ask.neighbours:
            points = retrieval.keys.points(self.features)
            shots = retrieval.contributors(points, *first_two(logits), self.ask.neighbours)
        if shots is not None:
            there = shots.supporting.rows >= 0
            ends = np.concatenate([[0], there.sum(dim=1).cumsum(dim=0).cpu().numpy()]).astype(np.int32)
            supporting = self._described(shots.supporting, ranked)
            columns["neighbours"] = pa.ListArray.from_arrays(pa.array(ends), supporting)
            against = (shots.opposing.rows[:, 0] >= 0).cpu().numpy()
            places = pa.array(against.cumsum() - 1, mask=~against)
            columns["opposing"] = self._described(shots.opposing, ranked).take(places)
        if self.ask.logits:
            columns["logits"] = lists(logits.cpu().numpy(), logits.shape[1])
        if terms.discriminant is not None:
            factor = settings.alpha * settings.gamma
            columns["discriminant_logit"] = factor * _doubles(terms.discriminant.gather(1, winner))[:, 0]
        if settings.least_cache is not None:
            strongest = terms.strongest(retrieval.keys.counts)
            columns["no_match"] = (strongest < settings.least_cache).cpu().numpy()
        known = [column for column in PREDICTIONS if column in columns]
        schema = pa.schema([SCHEMA.field(column) for column in known])
        return Predictions(pa.table([columns[column] for column in known], schema=schema))

    def _described(self, near: Nearest, classes: Tensor) -> pa.StructArray:
        there, every = near.rows >= 0, self.retrieval.keys.values
        weight = tip.weight(near.affinity, self.index.settings.beta)
        if every is None:
            values = (near.class_ids[:, :, None] == classes[:, None]).float()
        else:
            values = every[near.rows.clamp_min(0)[:, :, None], classes[:, None]]
        used, places = np.unique(near.rows[there].cpu().numpy(), return_inverse=True)
        described = self.index.rows.described(used, ["key_id", "source", "label"]).take(pa.array(places))
        named = [column.combine_chunks() for column in described.columns]
        figures = [pa.array(_doubles(figure[there])) for figure in (near.affinity, weight)]
        gives = lists(_doubles((weight[:, :, None] * values)[there]), classes.shape[1])
        return pa.StructArray.from_arrays([*named, *figures, gives], fields=list(PREDICTIONS["opposing"]))


def narrowest(probabilities: Tensor, class_names: Sequence[str], groups: Levels, least: float) -> dict[str, pa.Array]:
    """Return the columns of answers that name the class, or else the narrowest group, whose probability is ``least``.

    The probability of a group is the sum over its classes (``[q, c]``). If no level reaches ``least``, the label is
    null, and the most probable class gives the probability.
    """
    every = probabilities.double()
    found = np.full((2, len(every)), None, dtype=object)
    chances, open_ = _doubles(every.amax(1)), np.ones(len(every), dtype=bool)
    for level, own in groups.of(class_names).items():
        if names := list(dict.fromkeys(filter(None, own))):
            position = {name: place for place, name in enumerate(names)}
            at = torch.tensor([position.get(name or "", len(names)) for name in own]).to(every.device)
            sums = every.new_zeros(len(every), len(names) + 1).index_add_(1, at, every)[:, :-1]
            best, places = (part.cpu().numpy() for part in sums.max(1))
            now = open_ & (best >= least)
            found[0, now], found[1, now] = np.array(names, dtype=object)[places[now]], level
            chances[now], open_ = best[now].clip(max=1), open_ & ~now
    label, level_ = (pa.array(part, pa.string()) for part in found)
    return {"label": label, "level": level_, "probability": pa.array(chances)}


def _doubles(values: Tensor) -> npt.NDArray[np.float64]:
    return np.asarray(values.double().cpu())
