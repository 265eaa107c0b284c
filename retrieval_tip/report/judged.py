"""What a report is about: test items as an index answered them, and what was asked to be shown beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder, FeatureBlock
from retrieval_tip.data.sources import Source
from retrieval_tip.evaluation.evaluate import Answers, Details, Evaluation
from retrieval_tip.evaluation.sweep import Items


@dataclass(frozen=True)
class Judged:
    """A test source judged by an index, and what :func:`report.write_report` was asked beside.

    ``ids`` ``[m]`` are the classes of all its items, ``blocks`` and ``evaluation`` are of the ``n`` that could be read.
    """

    cache: CacheModel
    test: Source
    encoder: Encoder
    blocks: list[FeatureBlock]
    ids: npt.NDArray[np.int64]
    evaluation: Evaluation
    val: Items | None
    shots: Sequence[int] | None
    seeds: int
    curves: bool
    folder: Path | None
    where: str | None
    command: str | None

    @property
    def answers(self) -> Answers:
        """Item by item ``[n]``."""
        return self.evaluation.answers

    @property
    def details(self) -> Details:
        """More of each item ``[n]``."""
        assert self.answers.details is not None
        return self.answers.details

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """The items' features ``[n, d]``."""
        return np.concatenate([block.features for block in self.blocks])

    @cached_property
    def digests(self) -> list[str | None]:
        """The content digests of the items' images ``[n]``, also where a table of features has kept them."""
        if self.test.table is not None and pa.field("digest", pa.string()) in list(self.test.items.schema):
            kept: list[str | None] = self.test.items["digest"].take(pa.array(self.details.positions)).to_pylist()
            return kept
        return [digest for block in self.blocks for digest in block.digests]

    def record(self, name: str) -> dict[str, object]:
        """Return the index's record of its ``search`` for settings or its ``finetune``, empty if there is none."""
        kept = self.cache.provenance.get(name)
        return kept if isinstance(kept, dict) else {}

    @property
    def is_tuned(self) -> bool:
        """Whether the keys are fine-tuned ones."""
        trained = self.cache.values is not None and self.cache.fitted is None
        return bool(self.record("finetune")) or self.cache.curve is not None or trained
