"""``encode``, ``classify``, ``evaluate`` and the views of ``finetune`` by shards on Ray.

Each does with a shard what the package does with a source; no figure and no formula is here.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import Identity
from retrieval_tip.data.encoder import Encoder, Views, grouped, write_encoded
from retrieval_tip.data.feature_tables import table_dim, table_identity
from retrieval_tip.data.sources import Source
from retrieval_tip.data.tables import parquet_writer, row_groups_of
from retrieval_tip.distributed.engine import Encoding, Ray, Summary, Task, through
from retrieval_tip.distributed.runs import Run, part_name
from retrieval_tip.distributed.shards import Shard, cut_source, digest
from retrieval_tip.errors import InputError, Skipped, StoreError, UsageError
from retrieval_tip.evaluation.evaluate import Evaluation, Seen, check_abstain, conclude, see
from retrieval_tip.index import places
from retrieval_tip.predictions import PREDICTIONS, Abstain
from retrieval_tip.settings import Precision, Settings
from retrieval_tip.store.query import rows_where

NOT_SAID = ("workers", "batch_size", "strict", "progress")
"""Settings of an encoder that a run may change on the way: they do not change what is made."""


@dataclass(frozen=True)
class Made:
    """The result of a run: ``rows``, ``parts``, of which ``kept`` were there, what ``failed``, shards of each node.

    ``settled``: how many rows took how many keys where answers were certified, of the parts made now.
    """

    rows: int
    parts: int
    kept: int
    failed: list[Skipped]
    nodes: dict[str, int]
    settled: dict[int, int] = field(default_factory=dict)


@dataclass
class EncodeTask(Task):
    """A part of a feature table of each shard, of features of ``dim`` values by the backbone ``identity``."""

    run: Run
    encoding: Encoding
    dim: int
    identity: Identity | None

    def work(self, shard: Shard, source: Source, encoder: Encoder) -> Summary:
        """Write the part."""
        with self.run.writing(part_name(shard.number)) as path:
            rows = write_encoded(source, path, encoder, self.dim, self.identity, self.run.metadata(shard.number))
            failed = _failed(source, encoder)
            self.run.write_failed(shard.number, failed)
        return Summary(shard.number, rows, failed)


@dataclass(frozen=True)
class Asked:
    """The way workers answer with their copy of an index: by these settings, with the keys that a condition holds for.

    Products with all keys are in float32 unless it is said otherwise: what is fastest may differ from machine to
    machine.
    """

    settings: Settings
    where: str | None = None
    precision: Precision = "float32"


@dataclass
class IndexTask(Task):
    """A question to an index: a folder whose manifest has the digest ``sealed``."""

    encoding: Encoding
    folder: str
    sealed: str
    asked: Asked

    def start(self, device: str, encoder: Encoder) -> None:
        """Open the index, and take the keys that the condition holds for."""
        cache = places.at(self.folder).load(device=device, precision=self.asked.precision, verify="fast")
        if sealed_as(self.folder) != self.sealed:
            raise StoreError(f"{self.folder}: not the version that this run began with; start it again")
        cache.settings = self.asked.settings
        where = self.asked.where
        self._cache = cache if where is None else cache.take(rows_where(cache.labels, where))


@dataclass(frozen=True)
class Rows:
    """Rows of predictions: their ``columns``, what else they report, and when an answer is withheld."""

    columns: list[str]
    top: int = 1
    neighbours: int = 0
    certify: bool = False
    abstain: Abstain = None


@dataclass
class ClassifyTask(IndexTask):
    """A part of the predictions of each shard."""

    run: Run
    rows: Rows

    def start(self, device: str, encoder: Encoder) -> None:
        """Open the index."""
        super().start(device, encoder)

    def work(self, shard: Shard, source: Source, encoder: Encoder) -> Summary:
        """Write the part."""
        asked, rows, settled = self.rows, 0, Counter[int]()
        metadata = self.run.metadata(shard.number)
        schema = pa.schema([(column, PREDICTIONS[column]) for column in asked.columns], metadata=metadata)
        answers = self._cache.classify_source(
            source, encoder, asked.top, neighbours=asked.neighbours, certify=asked.certify
        )
        with self.run.writing(part_name(shard.number)) as path:
            with parquet_writer(str(path), schema) as writer:
                for table in row_groups_of(block.written(asked.columns, asked.abstain) for block in answers):
                    writer.write_table(table)
                    rows += len(table)
                    settled.update(table["keys"].to_pylist() if "keys" in asked.columns else ())
            failed = _failed(source, encoder)
            self.run.write_failed(shard.number, failed)
        return Summary(shard.number, rows, failed, settled=settled)


@dataclass
class EvaluateTask(IndexTask):
    """The numbers of each shard that an evaluation needs."""

    def work(self, shard: Shard, source: Source, encoder: Encoder) -> Summary:
        """Classify, and keep a few numbers of each item."""
        if not len(source):
            return Summary(shard.number, 0, _failed(source, encoder))
        ids = self._cache.ids_of(source)
        seen = see(self._cache, encoder.blocks(source), ids)
        arrays = {name: value for name, value in vars(seen).items() if isinstance(value, np.ndarray)}
        return Summary(shard.number, len(seen.truth), _failed(source, encoder), arrays=arrays)


@dataclass
class ViewsTask(Task):
    """The views of each image of a shard, each with a feature of its own."""

    encoding: Encoding
    names: list[str]

    def work(self, shard: Shard, source: Source, encoder: Encoder) -> Summary:
        """Encode; an image that cannot be read is left out."""
        try:
            views = replace(encoder, empty=False).encode_views(source, self.names)
        except InputError:
            if len(encoder.skipped) < len(set(source.paths or ())):
                raise
            return Summary(shard.number, 0, _failed(source, encoder))
        return Summary(shard.number, len(views.positions), _failed(source, encoder), arrays=dict(vars(views)))


def sealed_as(folder: places.Place) -> str:
    """SHA-256 of the manifest of an index, in a folder or a store. Raises StoreError where it cannot be read."""
    return hashlib.sha256(places.at(folder).manifest().to_bytes()).hexdigest()


def encode(
    shards: Sequence[Shard],
    out: str | os.PathLike[str],
    encoding: Encoding,
    ray: Ray | None = None,
    *,
    say: Callable[[Skipped], None] | None = None,
) -> Made:
    """Encode shards into a folder of parts, which is a feature table wherever one can be used.

    What ``encode_table`` makes of the whole source stands in the parts, in order. A run that was interrupted goes on
    with the same call; ``say`` is told of each input that could not be read, of earlier runs too.

    Raises UsageError for images without a backbone, and where ``out`` holds something else; InputError where a table
    cannot be used or nothing could be read; what :func:`engine.through` raises.
    """
    of_features = [shard for shard in shards if shard.features]
    if of_features:
        if len(of_features) < len(shards):
            raise UsageError("images and feature tables together: encode each of them by itself")
        table: str | Path = of_features[0].place
        dim, identity, encoding = table_dim(table), table_identity(table), replace(encoding, backbone=None)
    elif encoding.backbone is None:
        raise UsageError("images need a backbone; give --model (and --pretrained)")
    else:
        backbone = encoding.backbone.looked_at()  # which says what is wrong with it before any worker starts
        dim, identity = backbone.dim, backbone.identity
        del backbone
    facts = {"task": "encode", "backbone": identity.fingerprint if identity else None, "dim": dim}
    run = Run.start(out, facts | _described(shards, encoding))
    return _make(run, EncodeTask(run, encoding, dim, identity), shards, ray or Ray(), say)


def classify(
    folder: places.Place,
    shards: Sequence[Shard],
    out: str | os.PathLike[str],
    encoding: Encoding,
    ray: Ray | None = None,
    *,
    asked: Asked,
    rows: Rows,
    say: Callable[[Skipped], None] | None = None,
) -> Made:
    """Classify shards with an index folder into a folder of parts, with rows that ``classify`` writes.

    It goes on and raises as :func:`encode` does; StoreError where the index is changed meanwhile.
    """
    sealed = sealed_as(folder)
    facts = {"task": "classify", "index": sealed}
    run = Run.start(out, facts | _described(shards, encoding, **asdict(asked), **asdict(rows)))
    return _make(run, ClassifyTask(encoding, str(folder), sealed, asked, run, rows), shards, ray or Ray(), say)


def evaluate(
    cache: AnsweringIndex,
    folder: places.Place,
    shards: Sequence[Shard],
    encoding: Encoding,
    ray: Ray | None = None,
    *,
    asked: Asked,
    abstain: float | None = None,
    say: Callable[[Skipped], None] | None = None,
) -> tuple[Evaluation, list[Skipped]]:
    """:func:`evaluate.evaluate` of shards: workers see them, the figures are concluded here in one place.

    ``cache`` is the index of ``folder`` with the settings that are asked for. Returns the figures, and what could not
    be read. Raises InputError where that is everything, or a label is no class of the index.
    """
    check_abstain(abstain)
    task = EvaluateTask(encoding=encoding, folder=str(folder), sealed=sealed_as(folder), asked=asked)
    summaries = sorted(through(task, shards, ray or Ray()), key=lambda summary: summary.shard)
    failed = _told((skipped for summary in summaries for skipped in summary.failed), say)
    parts = [Seen(**dict[str, Any](summary.arrays)) for summary in summaries if summary.rows]
    if not parts:
        raise InputError(f"none of the items could be read ({failed[0] if failed else 'there are none'})")
    seen = Seen.joined(parts)
    return conclude(cache, seen, len(failed), abstain=abstain), failed


@dataclass(frozen=True)
class RayEncoder(Encoder):
    """An encoder whose :meth:`encode_views` of images is done by shards on Ray; everything else is done here."""

    encoding: Encoding = field(default_factory=Encoding)
    ray: Ray = field(default_factory=Ray)

    def encode_views(self, source: Source, names: Sequence[str]) -> Views:
        """Views as of :meth:`Encoder.encode_views`; each worker encodes the views of some of the shots."""
        if source.paths is None or not names or len(set(names)) < len(names):
            return super().encode_views(source, names)
        first, _ = grouped(source.paths)
        shards = cut_source(source.take(first), self.ray.size)
        task = ViewsTask(self.encoding, list(names))
        summaries = sorted(through(task, shards, self.ray), key=lambda summary: summary.shard)
        for summary in summaries:
            for skipped in summary.failed:
                self._skip(skipped.source, skipped.reason)
        parts = [(shards[summary.shard].first, Views(**summary.arrays)) for summary in summaries if summary.rows]
        if not parts:
            raise self._none_read(source)
        counts = np.concatenate([np.diff(views.starts) for _, views in parts])
        return Views(
            first[np.concatenate([start + views.positions for start, views in parts])],
            np.concatenate([views.features for _, views in parts]),
            np.concatenate([[0], np.cumsum(counts)]),
        )


def _make(run: Run, task: Task, shards: Sequence[Shard], ray: Ray, say: Callable[[Skipped], None] | None) -> Made:
    """Do the shards whose part is not there, and say that all are."""
    rows = run.done(len(shards))
    kept = len(rows)
    nodes: Counter[str] = Counter()
    settled: Counter[int] = Counter()
    for summary in through(task, [s for s in shards if s.number not in rows], ray):
        rows[summary.shard] = summary.rows
        nodes[summary.node] += 1
        settled.update(summary.settled)
    failed = _told(run.failed(len(shards)), say)
    if not sum(rows.values()):
        raise InputError(f"none of the items could be read ({failed[0] if failed else 'there are none'})")
    run.finish(len(shards), sum(rows.values()), len(failed))
    return Made(sum(rows.values()), len(shards), kept, failed, dict(nodes), dict(settled))


def _failed(source: Source, encoder: Encoder) -> list[Skipped]:
    return list(dict.fromkeys([*source.failed, *encoder.skipped]))


def _told(failed: Any, say: Callable[[Skipped], None] | None) -> list[Skipped]:
    """Each input once, however many shards have met it."""
    once = list(dict.fromkeys(failed))
    for skipped in once:
        if say is not None:
            say(skipped)
    return once


def _described(shards: Sequence[Shard], encoding: Encoding, **settings: Any) -> dict[str, Any]:
    """The part of a run's description that every task has."""
    settings |= {name: value for name, value in encoding.settings.items() if name not in NOT_SAID}
    if encoding.backbone is not None:
        settings["encoded_in"] = encoding.backbone.precision
    return {"source": digest(shards), "shards": len(shards), "settings": settings}
