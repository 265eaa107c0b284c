"""The answers to a block of queries, and the columns that describe them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import DoubleArray
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.levels import Levels
from retrieval_tip.predictions import PREDICTIONS, SCHEMA, Predictions, lists
from retrieval_tip.retrieval.conformal import Sets
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.retrieval.logits import AnswerTerms, first_two
from retrieval_tip.settings import Ask

if TYPE_CHECKING:
    from retrieval_tip.model import Index


@dataclass(frozen=True, eq=False)
class AnswerBlock:
    """The answers to a block of queries.

    Attributes:
        index: the index, with the settings of the question.
        ask: the question.
        sets: the rule for sets of classes, if the question has a coverage.
        block: the queries.
        features: the features of the queries, of shape ``[q, d]``, as a float32 tensor on the device.
        terms: the terms of the logits.
        logits: the logits of all classes, of shape ``[q, c]``.
    """

    index: Index
    ask: Ask
    sets: Sets | None
    block: FeatureBlock
    features: Tensor
    terms: AnswerTerms
    logits: Tensor

    @cached_property
    def ranked(self) -> Tensor:
        """The class ids of the most probable classes, of shape ``[q, m]``, most probable first."""
        return self._scores.topk(min(self.ask.top, self.logits.shape[1]), dim=1).indices

    @cached_property
    def probabilities(self) -> Tensor:
        """The probabilities of all classes, of shape ``[q, c]``."""
        if self.block.mixed is not None:
            return self.block.mixed.to(self.logits.device)
        return tip.probabilities(self.logits, self.index.settings.temperature)

    @property
    def _scores(self) -> Tensor:
        return self.logits if self.block.mixed is None else self.probabilities

    def predictions(self) -> Predictions:
        """Return one prediction per query. The queries are named by their positions."""
        settings = self.index.settings
        terms = self.terms
        logits = self.logits
        ranked = self.ranked  # at any temperature
        chances = _doubles(self.probabilities.gather(1, ranked))
        winner = ranked[:, :1]
        m = ranked.shape[1]
        names = pa.array(self.index.class_names, pa.string())
        labels = names.take(pa.array(ranked.cpu().numpy().reshape(-1)))
        shots = pa.array(self.block.shots, pa.bool_())
        if self.block.key_ids is None:
            shots = pa.nulls(len(ranked), pa.bool_())
        columns = {
            "input": pa.array(self.block.positions).cast(pa.string()),
            "label": labels[::m],
            "probability": chances[:, 0],
            "labels": lists(labels, m),
            "probabilities": lists(chances, m),
            "text_logit": _doubles(terms.text.gather(1, winner))[:, 0],
            "cache_logit": settings.alpha * _doubles(terms.cache.gather(1, winner))[:, 0],
            "shot": shots,
        }
        if self.ask.at_least is not None and self.index.groups is not None:
            columns |= narrowest(
                self.probabilities, self.index.class_names, self.index.groups, self.ask.at_least
            )
        columns |= self._evidence(ranked)
        if self.ask.logits:
            columns["logits"] = lists(logits.cpu().numpy(), logits.shape[1])
        if terms.discriminant is not None:
            factor = settings.alpha * settings.gamma
            columns["discriminant_logit"] = (
                factor * _doubles(terms.discriminant.gather(1, winner))[:, 0]
            )
        columns["no_match"] = pa.nulls(len(ranked), pa.bool_())
        if settings.least_cache is not None:
            strongest = terms.strongest(self.index.retrieval.keys.counts)
            columns["no_match"] = pa.array((strongest < settings.least_cache).cpu().numpy())
        if self.sets is not None:
            sets = self.sets.column(self.probabilities, self.index.class_names)
            matched = columns["no_match"]
            columns["set"] = pc.if_else(matched.fill_null(False), None, sets)
        known = [column for column in PREDICTIONS if column in columns]
        schema = pa.schema([SCHEMA.field(column) for column in known])
        return Predictions(pa.table([columns[column] for column in known], schema=schema))

    def _evidence(self, classes: Tensor) -> dict[str, pa.Array]:
        """Return the shots that speak most for the first class, and the one that speaks most for the second."""
        keys = self.index.retrieval.keys
        shots = self.terms.shots
        if shots is None and self.ask.neighbours:
            shots = self.index.retrieval.contributors(
                keys.phi(self.features),
                *first_two(self._scores),
                self.ask.neighbours,
                self.index.settings.beta,
            )
        if shots is None:
            return {
                "neighbours": pa.array([[]] * len(classes), PREDICTIONS["neighbours"]),
                "opposing": pa.nulls(len(classes), PREDICTIONS["opposing"]),
            }
        there = shots.supporting.rows >= 0
        ends = np.zeros(len(classes) + 1, dtype=np.int32)
        ends[1:] = there.sum(dim=1).cumsum(dim=0).cpu()
        supporting = self._described(shots.supporting, classes)
        against = (shots.opposing.rows[:, 0] >= 0).cpu().numpy()
        places = pa.array(against.cumsum() - 1, mask=~against)
        return {
            "neighbours": pa.ListArray.from_arrays(pa.array(ends), supporting),
            "opposing": self._described(shots.opposing, classes).take(places),
        }

    def _described(self, near: Nearest, classes: Tensor) -> pa.StructArray:
        there = near.rows >= 0
        every = self.index.retrieval.keys.values
        weight = tip.weight(near.affinity, self.index.settings.beta)
        if every is None:
            values = (near.class_ids[:, :, None] == classes[:, None]).float()
        else:
            values = every[near.rows.clamp_min(0)[:, :, None], classes[:, None]]
        used, places = np.unique(near.rows[there].cpu().numpy(), return_inverse=True)
        described = self.index.rows.described(used, ["key_id", "source", "label"]).take(
            pa.array(places)
        )
        named = [column.combine_chunks() for column in described.columns]
        figures = [pa.array(_doubles(figure[there])) for figure in (near.affinity, weight)]
        gives = lists(_doubles((weight[:, :, None] * values)[there]), classes.shape[1])
        return pa.StructArray.from_arrays(
            [*named, *figures, gives], fields=list(PREDICTIONS["opposing"])
        )


def narrowest(
    probabilities: Tensor, class_names: Sequence[str], groups: Levels, least: float
) -> dict[str, pa.Array]:
    """Return the columns of answers that name the class, or else the narrowest group, whose probability is ``least``.

    The probability of a group is the sum over its classes (``[q, c]``). If no level reaches ``least``, the label is
    null, and the most probable class gives the probability.
    """
    every = probabilities.double()
    labels = np.full(len(every), None, dtype=object)
    levels = np.full(len(every), None, dtype=object)
    chances = _doubles(every.amax(1))
    unnamed = np.ones(len(every), dtype=bool)
    for level, groups_of_classes in groups.of(class_names).items():
        names = list(dict.fromkeys(filter(None, groups_of_classes)))
        if not names:
            continue
        place = {name: at for at, name in enumerate(names)}
        no_group = len(names)
        column = torch.tensor([place.get(name or "", no_group) for name in groups_of_classes])
        sums = every.new_zeros(len(every), len(names) + 1)
        sums.index_add_(1, column.to(every.device), every)
        best, places = (values.cpu().numpy() for values in sums[:, :no_group].max(1))
        sure = unnamed & (best >= least)
        labels[sure] = np.array(names, dtype=object)[places[sure]]
        levels[sure] = level
        chances[sure] = best[sure].clip(max=1)
        unnamed &= ~sure
    return {
        "label": pa.array(labels, pa.string()),
        "level": pa.array(levels, pa.string()),
        "probability": pa.array(chances),
    }


def _doubles(values: Tensor) -> DoubleArray:
    return np.asarray(values.double().cpu())
