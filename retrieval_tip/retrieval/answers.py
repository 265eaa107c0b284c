"""Turn the logits of a block of queries into predictions with their evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.predictions import PREDICTIONS, SCHEMA, Predictions, lists
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.logits import AnswerTerms, Retrieval, first_two
from retrieval_tip.retrieval.rows import Rows
from retrieval_tip.retrieval.sets import Sets
from retrieval_tip.settings import Ask, Levels, Settings


@dataclass(frozen=True, eq=False)
class AnswerBlock:
    """The answers to a block of queries.

    Attributes:
        rows: the labelled keys of the index.
        class_names: the names of the classes.
        retrieval: the retrieval that gave the answers, with the settings of the question.
        ask: the question.
        sets: the rule for sets of classes, if the question has a coverage.
        block: the queries.
        groups: the groups of the classes, if there are any.
        features: the features of the queries, of shape ``[q, d]``, as a float32 tensor on the device.
        terms: the terms of the logits.
        logits: the logits of all classes, of shape ``[q, c]``.
    """

    rows: Rows
    class_names: Sequence[str]
    groups: Levels | None
    retrieval: Retrieval
    ask: Ask
    sets: Sets | None
    block: FeatureBlock
    features: Tensor
    terms: AnswerTerms
    logits: Tensor

    @property
    def settings(self) -> Settings:
        """The settings of the question."""
        return self.retrieval.settings

    @cached_property
    def ranked(self) -> Tensor:
        """The class ids of the most probable classes, of shape ``[q, m]``, most probable first."""
        return self.logits.topk(min(self.ask.top, self.logits.shape[1]), dim=1).indices

    @cached_property
    def probabilities(self) -> Tensor:
        """The probabilities of all classes, of shape ``[q, c]``."""
        return tip.probabilities(self.logits, self.settings.temperature)

    def predictions(self) -> Predictions:
        """Return one prediction per query. The queries are named by their positions."""
        settings, terms, logits = self.settings, self.terms, self.logits
        ranked = self.ranked  # at any temperature
        chances = _doubles(self.probabilities.gather(1, ranked))
        winner, m, names = ranked[:, :1], ranked.shape[1], pa.array(self.class_names, pa.string())
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
        if self.ask.at_least is not None and self.groups is not None:
            columns |= narrowest(self.probabilities, self.class_names, self.groups, self.ask.at_least)
        if self.sets is not None:
            columns["set"] = self.sets.column(self.probabilities, self.class_names)
        shots, retrieval = terms.shots, self.retrieval
        if shots is None and self.ask.neighbours:
            points = retrieval.points(self.features)
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
        there, every = near.rows >= 0, self.retrieval.values
        weight = tip.weight(near.affinity, self.settings.beta)
        if every is None:
            values = (near.class_ids[:, :, None] == classes[:, None]).float()
        else:
            values = every[near.rows.clamp_min(0)[:, :, None], classes[:, None]]
        used, places = np.unique(near.rows[there].cpu().numpy(), return_inverse=True)
        described = self.rows.described(used, ["key_id", "source", "label"]).take(pa.array(places))
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
