"""The indexes that are served: the version that each is at, what answers with it, and how it follows the folder."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip.backbones.base import Backbone, Identity
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.data.feature_tables import check_backbone
from retrieval_tip.errors import BackboneError, RetrievalTipError, UsageError
from retrieval_tip.files import real
from retrieval_tip.index import places
from retrieval_tip.retrieval.logits import LOGITS, slices
from retrieval_tip.server import metrics, schemas
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.schemas import Row
from retrieval_tip.settings import KeysMet, Precision, Settings, Verify
from retrieval_tip.store.manifest import Manifest

if TYPE_CHECKING:
    from retrieval_tip.answering import AnsweringIndex

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

RETRY_SECONDS = 30.0
"""A version that could not be opened is tried again after so long: a file may be restored."""

COMPLETE, NEAREST = 1 << 14, 2048
"""Keys up to which evidence holds them all; of more, it holds so many nearest ones."""

NEIGHBOUR_CELLS = 16
"""The cost of a neighbour in an answer, which is an object with names: its memory is that of so many numbers."""

VALUES = 1 << 22
"""Numbers of answers, or keys that are retrieved for them, at a time."""


@dataclass(frozen=True)
class Ask:
    """Settings that queries are to be answered by; ``None`` is the index's own setting."""

    alpha: float | None = None
    beta: float | None = None
    k: KeysMet = None
    tail: bool | None = None
    top: int = 5
    neighbours: int = 5
    logits: bool = False
    evidence: bool = False


@dataclass(frozen=True, eq=False)
class Version:
    """One version of an index, opened: what a request has taken it keeps, whatever the folder becomes meanwhile."""

    name: str
    cache: AnsweringIndex
    manifest: Manifest
    backbone: Backbone | None

    def settings(self, ask: Ask) -> Settings:
        """The settings that are asked for, the index's own where nothing is said."""
        return self.cache.settings.override(alpha=ask.alpha, beta=ask.beta, k=ask.k, tail=ask.tail)

    def cells(self, ask: Ask) -> int:
        """Numbers in the answer to one query, or keys to be retrieved for it, where that is asked for."""
        cache, c = self.cache, len(self.cache.class_names)
        near = cache.n if cache.n <= COMPLETE else NEAREST
        evidence = cache.d + 3 * c + 3 * near if ask.evidence else 0
        neighbours = NEIGHBOUR_CELLS * min(ask.neighbours, cache.n)
        met = 0 if ask.k is None or ask.k == "all" else min(ask.k, cache.n)
        return 2 * min(ask.top, c) + neighbours + (c if ask.logits else 0) + evidence + met

    def at_once(self, ask: Ask) -> int:
        """Queries that are answered at a time: their answers, and the keys that they retrieve, are limited."""
        met = min(self.settings(ask).k or 0, self.cache.n)
        return max(1, min(VALUES // max(self.cells(ask), met), LOGITS // len(self.cache.class_names)))

    def answer(self, ask: Ask, features: FloatArray) -> list[Row]:
        """Return a result for each query ``[q, d]``. Raises as :meth:`AnsweringIndex.classify`."""
        cache = self.cache.with_settings(self.settings(ask))
        hidden = {"keys"} if ask.logits else {"keys", "logits"}
        results: list[Row] = []
        for part in slices(len(features), self.at_once(ask)):
            predictions = cache.classify(features[part], ask.top, neighbours=ask.neighbours, norms="keep")  # as read
            answers = list(predictions.rows([c for c in predictions.to_arrow().column_names if c not in hidden]))
            if ask.evidence:
                for answer, own in zip(answers, cache.evidence(features[part], COMPLETE, NEAREST), strict=True):
                    answer["evidence"] = own
            results += answers
        return results

    def describe(self, *, changes: bool) -> schemas.IndexFacts:
        """Describe the index; ``changes`` tells whether the server accepts them."""
        cache, settings, fitted = self.cache, self.cache.settings, self.cache.fitted
        return schemas.IndexFacts(
            alpha=settings.alpha,
            beta=settings.beta,
            k=settings.k or "all",
            tail=settings.tail,
            temperature=settings.temperature,
            name=self.name,
            version=self.manifest.version,
            created_at=self.manifest.created_at,
            change=self.manifest.change,
            n_keys=cache.n,
            n_classes=len(cache.class_names),
            d=cache.d,
            logit_scale=settings.logit_scale,
            index=cache.index_type,
            exact_search=cache.exact_search,
            backbone=str(cache.backbone) if cache.backbone else None,
            images=self.backbone is not None,
            text=cache.has_text,
            least_cache=settings.least_cache,
            log_offset=settings.log_offset,
            metric=fitted.metric if fitted else "none",
            values=fitted.values if fitted else "one-hot" if cache.values is None else "trained",
            changes=changes,
        )

    def describe_whole(self, *, changes: bool) -> schemas.WholeIndex:
        """Describe the index with its classes, templates and provenance."""
        cache, facts = self.cache, vars(self.describe(changes=changes))
        pairs = enumerate(zip(cache.class_names, cache.counts, strict=True))
        classes = [schemas.IndexClass(class_id, label, keys) for class_id, (label, keys) in pairs]
        return schemas.WholeIndex(**facts, classes=classes, templates=cache.templates, provenance=cache.provenance)

    def address_of(self, key_id: int) -> str:
        """The address of a shot's picture."""
        return f"/v1/indexes/{quote(self.name, safe='')}/keys/{key_id}/image"

    def source_of(self, key_id: int) -> str:
        """The source of a key. Raises Problem 404 where there is no such key."""
        keys = self.cache.find(key_ids=[key_id])
        if not len(keys):
            raise Problem(404, f"index {self.name!r} has no key {key_id}")
        return str(keys["source"][0].as_py())


class Backbones:
    """Backbones by what they are, so that indexes of one share it; each lives as long as an index that is open.

    The indexes are opened on the same ``device``, with the same ``precision``, and checked as ``verify`` says.
    """

    def __init__(self, device: str, precision: Precision, verify: Verify | None) -> None:
        self.device, self.precision, self.verify = device, precision, verify
        self._open: weakref.WeakValueDictionary[tuple[str, Path | None], Any] = weakref.WeakValueDictionary()

    def know(self, backbone: Backbone) -> None:
        """Take one that is open already."""
        self._open[(backbone.identity.fingerprint, None)] = backbone

    def of(self, cache: AnsweringIndex, name: str) -> Backbone | None:
        """That of an index; ``None``, with a warning, where it names none or that cannot be had: features only."""
        identity = cache.backbone
        if identity is None:
            return None
        key = (identity.fingerprint, cache.tuned)
        backbone: Backbone | None = self._open.get(key)
        if backbone is None:
            try:
                backbone = self._loaded(identity, cache)
            except (BackboneError, UsageError) as error:
                log.warning("%s: takes features only, for its backbone cannot be had: %s", name, error)
                return None
            self._open[key] = backbone
        return backbone

    def _loaded(self, identity: Identity, cache: AnsweringIndex) -> Backbone:
        backbone = load_backbone(
            identity.model,
            identity.pretrained,
            device=self.device,
            precision=self.precision,
            tuned=cache.tuned,
        )
        check_backbone(identity, cache.d, backbone, [])
        backbone.encode_images(torch.zeros(1, 3, *backbone.size))  # what is set up by the first one
        return backbone


class Served:
    """An index that is served under its ``name``: ``now`` is the version that is answered with."""

    def __init__(self, folder: places.Place, backbones: Backbones) -> None:
        """Open an index. Raises StoreError where that cannot be."""
        self.folder = folder
        self.place = places.at(folder)
        self.name = self.place.name
        self.backbones = backbones
        self._changing = threading.Lock()
        self._seen = self.place.stamp()
        self._failed_at, self._looked_at = -math.inf, time.monotonic()
        cache = self.place.load(device=backbones.device, precision=backbones.precision, verify=backbones.verify)
        self.now = self._opened(cache)

    @property
    def beside(self) -> Path | None:
        """The folder that the index lies in; ``None`` for one in a bucket."""
        return None if self.place.local is None else real(self.place.local).parent

    def _opened(self, cache: AnsweringIndex) -> Version:
        manifest = cache.manifest
        assert manifest is not None
        version = Version(self.name, cache, manifest, self.backbones.of(cache, self.name))
        version.answer(Ask(), cache.some(1)[0].astype(np.float32))  # what is set up by the first query
        metrics.VERSION.labels(self.name).set(manifest.version)
        metrics.KEYS.labels(self.name).set(cache.n)
        return version

    def changed(self) -> bool:
        """Whether there may be another version that can be opened: a look at a file; of a store, whether to ask it."""
        return time.monotonic() - self._looked_at >= self.place.look_every and self._is_other(self.place.stamp())

    def _is_other(self, stamp: Hashable | None) -> bool:
        again = RETRY_SECONDS <= time.monotonic() - self._failed_at < math.inf
        return stamp is not None and (again or stamp != self._seen)

    def follow(self) -> Version:
        """Take the folder's current version, where there is another; where it cannot be opened, stay at this one."""
        with self._changing:
            stamp = self.place.stamp()
            if not self._is_other(stamp):
                return self.now
            self._looked_at = time.monotonic()
            self._failed_at = -math.inf
            try:
                cache = self.now.cache.reload()
                if cache is not self.now.cache:
                    self.now = self._opened(cache)
                    metrics.RELOADS.labels(self.name, "taken").inc()
            except RetrievalTipError as error:
                log.warning("%s: stays at version %s: %s", self.name, self.now.manifest.version, error)
                metrics.RELOADS.labels(self.name, "failed").inc()
                self._failed_at = time.monotonic()
            self._seen = stamp
            return self.now


@dataclass(frozen=True)
class Maker:
    """What new indexes are made with, where none is served that would say: a ``backbone``, and the folder ``into``."""

    into: Path
    backbone: Backbone
    device: str
    precision: Precision
    verify: Verify | None

    def backbones(self) -> Backbones:
        """The backbone, as indexes that are opened have it."""
        backbones = Backbones(self.device, self.precision, self.verify)
        backbones.know(self.backbone)
        return backbones


def open_all(
    folders: Sequence[places.Place], device: str, precision: Precision, verify: Verify | None
) -> dict[str, Served]:
    """Indexes by name. Raises UsageError where two have one name, StoreError where one cannot be opened."""
    backbones = Backbones(device, precision, verify)
    served: dict[str, Served] = {}
    for folder in folders:
        one = Served(folder, backbones)
        if one.name in served:
            raise UsageError(f"{folder}: another index of the name {one.name!r} is served; rename one of the folders")
        served[one.name] = one
    return served


def encoded(backbone: Backbone, pixels: Sequence[torch.Tensor]) -> list[FloatArray]:
    """Raw features ``[d]`` of pictures, so many at a time as the backbone does best."""
    size = backbone.batch_size
    parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
    return [row for part in parts for row in backbone.encode_images(torch.stack(list(part)))]
