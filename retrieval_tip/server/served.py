"""Served indexes. Each holds an open version and its encoder, and opens new versions of its folder."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from retrieval_tip.arrays import FloatArray, slices
from retrieval_tip.backbones.base import Backbone, without_unused
from retrieval_tip.backbones.loading import load_again, load_backbone
from retrieval_tip.data.feature_table import check_backbone
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.errors import BackboneError, RetrievalTipError, UsageError
from retrieval_tip.evaluation.held_out import answered, recognised
from retrieval_tip.files import real
from retrieval_tip.index import places
from retrieval_tip.index.places import Changed
from retrieval_tip.model import Index
from retrieval_tip.retrieval.logits import LOGITS
from retrieval_tip.server import metrics
from retrieval_tip.server.schemas import Row
from retrieval_tip.settings import Ask, Precision, Verify
from retrieval_tip.store.manifest import Manifest

log = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
"""Number of seconds after which a version that failed to open is tried again."""

SIMILAR = 100
"""Number of the most similar shots that an answer with features contains."""

NEIGHBOUR_CELLS = 16
"""Cost of a neighbour in an answer. A neighbour takes as much memory as 16 numbers."""

Result = TypeVar("Result", bound=Changed)

VALUES = 1 << 22
"""Maximum count of numbers, or of retrieved keys, in answers that are computed at once."""


@dataclass(eq=False)
class OpenVersion:
    """An open version of an index. A request uses the same version throughout."""

    name: str
    index: Index
    manifest: Manifest
    backbone: Backbone | None

    @cached_property
    def asked(self) -> Backbone | None:
        """The backbone without the encoders that no answer depends on."""
        backbone = self.backbone
        return None if backbone is None else without_unused(backbone, self.index.shares)

    def cells(self, ask: Ask) -> int:
        """Return the count of numbers in one answer. If the request sets ``k``, add the number of keys to retrieve."""
        index = self.index
        c = len(self.index.class_names)
        neighbours = NEIGHBOUR_CELLS * min(ask.neighbours, index.n)
        number = 0 if ask.k is None or ask.k == "all" else min(ask.k, index.n)
        return (
            4 * min(ask.top, c)
            + neighbours
            + c * (ask.logits + (ask.coverage is not None))
            + number
        )

    def at_once(self, ask: Ask) -> int:
        """Return the number of queries that can be answered at once within the memory limits."""
        number = min(ask.settings(self.index.settings).k or 0, self.index.n)
        return max(
            1, min(VALUES // max(self.cells(ask), number), LOGITS // len(self.index.class_names))
        )

    def recognised(self, block: FeatureBlock, images: Sequence[bytes]) -> FeatureBlock:
        """Return queries with the key ids of those whose images are shots."""
        block = replace(block, digests=[hashlib.sha256(image).hexdigest() for image in images])
        return recognised(self.index, pa.nulls(len(images)), block)

    def answer(self, ask: Ask, block: FeatureBlock) -> list[Row]:
        """Return one result per query, in order."""
        results: dict[int, Row] = {}
        for part in slices(len(block.positions), self.at_once(ask)):
            for answers in answered(self.index, block.take(part), ask):
                own = answers.index.settings
                terms = answers.terms
                logits = terms.text, own.alpha * terms.photos(own).double()
                texts, shots = (part.gather(1, answers.ranked).tolist() for part in logits)
                for row, text, shot in zip(answers.predictions().rows(), texts, shots, strict=True):
                    results[int(row["input"])] = row | {"text_logits": text, "shot_logits": shot}
        return [results[place] for place in block.positions.tolist()]

    def located(self, features: FloatArray) -> list[Row]:
        """Return each feature with the shots that are most similar to it, most similar first."""
        near = self.index.similar(features, SIMILAR, norms="keep")
        similar = (
            [{"key_id": shot.key_id, "affinity": shot.affinity} for shot in own] for own in near
        )
        return [
            {"feature": feature, "similar": own}
            for feature, own in zip(features, similar, strict=True)
        ]


class Backbones:
    """Open backbones, each of which is shared by all indexes that use it.

    A backbone stays in memory as long as an open index uses it. ``device``, ``precision`` and ``verify`` apply to all
    indexes.
    """

    def __init__(
        self, device: str, precision: Precision, verify: Verify | None, *known: Backbone
    ) -> None:
        self.device = device
        self.precision = precision
        self.verify = verify
        self._open: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        for backbone in known:
            self._open[backbone.identity.fingerprint] = backbone

    def of(self, index: Index, name: str) -> Backbone | None:
        """Return an index's backbone, or ``None`` if the index names none or loading fails. Failures are logged."""
        identity = index.backbone
        if identity is None:
            return None
        backbone: Backbone | None = self._open.get(identity.fingerprint)
        if backbone is not None:
            return backbone
        try:
            backbone = self.warm(
                load_again(identity, device=self.device, precision=self.precision, lazy=False)
            )
            check_backbone(identity, index.d, backbone, [])
        except (BackboneError, UsageError) as error:
            log.warning(
                "%s: cannot load the encoder, so only features are accepted: %s", name, error
            )
            return None
        return backbone

    def load(self, model: str | None) -> Backbone:
        """Load a backbone, which is then open. Raises the errors of :func:`loading.load_backbone`."""
        return self.warm(load_backbone(model, device=self.device, precision=self.precision))

    def warm(self, backbone: Backbone) -> Backbone:
        """Encode an empty image, which warms up a backbone. It is open afterwards."""
        backbone.encode_images(backbone.preprocess(Image.new("RGB", (8, 8)))[None])
        self._open[backbone.identity.fingerprint] = backbone
        return backbone


class Served:
    """An index that is served under its ``name``. ``now`` is the version that is open."""

    def __init__(
        self, folder: places.Place, backbones: Backbones, index: Index | None = None
    ) -> None:
        """Open an index, unless it was just built. Raises StoreError if the index cannot be opened."""
        self.folder = folder
        self.place = places.at(folder)
        self.name = self.place.name
        self.backbones = backbones
        self._changing = threading.Lock()
        # another process may have changed an index that was just built, so the first look is still due
        self._seen = None if index else self.place.stamp()
        self._looked_at = time.monotonic()
        self._retry_at = math.inf
        self.now = self._opened(
            index or self.place.load(device=backbones.device, verify=backbones.verify)
        )

    @property
    def beside(self) -> Path | None:
        """The parent of the index folder, or ``None`` if the index is in a bucket."""
        return None if self.place.local is None else real(self.place.local).parent

    def _opened(self, index: Index) -> OpenVersion:
        index = index.on(self.backbones.device)
        manifest = index.manifest
        assert manifest is not None
        version = OpenVersion(self.name, index, manifest, self.backbones.of(index, self.name))
        version.answer(
            Ask(), FeatureBlock.of(index.rows.some(1)[0].astype(np.float32))
        )  # warms up the index
        metrics.VERSION.labels(self.name).set(manifest.version)
        metrics.KEYS.labels(self.name).set(index.n)
        return version

    def changed(self) -> bool:
        """Return whether there may be a new version. This check is cheap, and queries a remote store only rarely."""
        if (now := time.monotonic()) - self._looked_at < self.place.look_every:
            return False
        stamp = self.place.stamp()
        return stamp is not None and (stamp != self._seen or now >= self._retry_at)

    def follow(self) -> None:
        """Open the current version of the folder if it is new.

        If opening fails, keep the version that is already open.
        """
        with self._changing:
            self._seen = self.place.stamp()
            self._looked_at = time.monotonic()
            self._retry_at = math.inf
            try:
                index = self.now.index.reload()
                if index is not self.now.index:
                    self.now = self._opened(index)
                    metrics.RELOADS.labels(self.name, "taken").inc()
            except RetrievalTipError as error:
                version = self.now.manifest.version
                log.warning(
                    "%s: cannot open the new version; still serving version %s: %s",
                    self.name,
                    version,
                    error,
                )
                metrics.RELOADS.labels(self.name, "failed").inc()
                self._retry_at = time.monotonic() + RETRY_SECONDS

    def change(self, call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Change the open version, and open the version that this has written, unless a later one is open by now.

        It is not read again. The next :meth:`follow` only finds that it is current.
        """
        result = call(self.folder, *arguments, base=self.now.index, **options)
        with self._changing:
            if result.version > self.now.manifest.version:
                self.now = self._opened(result.index)
        return result


@dataclass(frozen=True)
class Maker:
    """The backbone and the folder ``into`` to use for new indexes, unless a request names another index.

    ``load`` returns the backbone. It is only called to make an index, so that a server without one downloads nothing.
    """

    into: Path
    load: Callable[[], Backbone]
    backbones: Backbones


def open_all(folders: Sequence[places.Place], backbones: Backbones) -> dict[str, Served]:
    """Open several indexes, and return them by name."""
    served: dict[str, Served] = {}
    for folder in folders:
        places.at(folder).manifest()  # raises an error before an encoder is loaded
    for folder in folders:
        one = Served(folder, backbones)
        if one.name in served:
            raise UsageError(
                f"{folder}: another index is also named {one.name!r}; rename one of the folders"
            )
        served[one.name] = one
    return served
