"""Turn sources into features block by block, by encoding images or reading feature tables."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from retrieval_tip.arrays import BoolArray, FloatArray, IntArray
from retrieval_tip.backbones.base import (
    parts_of,
    same_backbone,
    unit_of,
    without_unused,
)
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.data import tables, writing
from retrieval_tip.data.cached_encoder import (
    CENTRE,
    CachedEncoder,
    Photo,
    cached_text_weights,
    chunks,
    pixels_of,
)
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.source import Source, spread
from retrieval_tip.errors import InputError, Skipped, UsageError, check_count
from retrieval_tip.machine import check_memory
from retrieval_tip.settings import Norms, check_choice
from retrieval_tip.wording import counted, show

if TYPE_CHECKING:
    import torch

    from retrieval_tip.backbones.base import Backbone, Part

log = logging.getLogger(__name__)

_Loaded = tuple[str, Photo | str]  # a path, and its photo or why it cannot be read
_Encoded = dict[
    str, tuple[FloatArray, str] | None
]  # features [v, d] and digest by path; None if unreadable

CALIBRATED, FEWEST = 300, 32  # most and fewest photos that int8 is calibrated on


@dataclass(frozen=True)
class FeatureBlock:
    """Features of a block of items from a source."""

    positions: IntArray  # [b], ascending positions in the source
    features: FloatArray  # [b, d] float32; [b, v, d] if a view has its own features
    digests: list[
        str | None
    ]  # digests of the image bytes; for a feature table, its column ``digest``, or None
    mixed: torch.Tensor | None = (
        None  # [b, c], probabilities to answer with, if other photos contribute to them
    )
    key_ids: IntArray | None = (
        None  # [b], the id of a key of each item that is a shot of an index, or -1, if known
    )

    @property
    def shots(self) -> BoolArray:
        """Whether each item is known to be a shot."""
        return (
            np.zeros(len(self.positions), dtype=bool) if self.key_ids is None else self.key_ids >= 0
        )

    @classmethod
    def of(cls, features: FloatArray, digests: list[str | None] | None = None) -> FeatureBlock:
        """Return features, perhaps of unknown origin, as a block. Their positions are the row numbers."""
        return cls(np.arange(len(features)), features, digests or [None] * len(features))

    def take(self, places: IntArray | slice) -> FeatureBlock:
        """Return some of the items."""
        if isinstance(places, slice):
            digests = self.digests[places]
        else:
            digests = [self.digests[place] for place in places.tolist()]
        mixed = None if self.mixed is None else self.mixed[places]
        key_ids = None if self.key_ids is None else self.key_ids[places]
        return FeatureBlock(self.positions[places], self.features[places], digests, mixed, key_ids)

    @classmethod
    def joined(cls, blocks: Sequence[FeatureBlock]) -> FeatureBlock:
        """Concatenate blocks of the same source. A single block is not copied."""
        import torch

        if len(blocks) == 1:
            return blocks[0]
        mixed = [block.mixed for block in blocks if block.mixed is not None]
        return cls(
            np.concatenate([block.positions for block in blocks]),
            np.concatenate([block.features for block in blocks]),
            [digest for block in blocks for digest in block.digests],
            torch.cat(mixed) if mixed else None,
            key_ids=None
            if blocks[0].key_ids is None
            else np.concatenate([block.key_ids for block in blocks]),
        )


def view_names(seed: int, number: int) -> list[str]:
    """Return the names of a shot's views: the centre view if ``number`` is 1, or views augmented with ``seed``."""
    return [CENTRE] if number == 1 else [f"crop/{seed}/{view}" for view in range(number)]


@dataclass(frozen=True)
class Reader:
    """An encoder of images and a reader of feature tables.

    Args:
        backbone: The backbone that encodes images. It is not required for feature tables.
        views: The number of views of each image: 1 for the centre view, or more for the mean of that many augmented
            views, which are drawn with ``seed``.
        norms: How to treat the rows of a feature table. ``check`` requires unit norm, ``unit`` scales the rows to unit
            norm, and ``keep`` does not change them.
        batch_size: The number of images to encode at a time, by default the best one for the backbone.
        workers: The number of threads that read and decode images.
        cache: The encoding cache, or ``None`` to encode all images.
        strict: Whether to raise an error if an image is unreadable, instead of adding it to ``skipped``.
        parts: The columns of a feature table that make up a feature, if there are several.
        empty: Whether to accept a source that has no readable items.

    ``done`` counts the encoded images (``images``), and the views that were not in the cache (``fresh``).

    For the centre view, large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size. Each side is then at least
    three times as long as that of the view. This is several times faster; the features change little.
    """

    backbone: Backbone | None = None
    views: int = 1
    seed: int = 1
    norms: Norms = "check"
    batch_size: int | None = None
    workers: int = field(default_factory=lambda: min(16, os.cpu_count() or 1))
    cache: EncodingCache | None = None
    strict: bool = False
    parts: tuple[Part, ...] = ()
    empty: bool = False
    progress: bool = False
    skipped: list[Skipped] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name, value in (
            ("views", self.views),
            ("batch_size", self.batch_size),
            ("workers", self.workers),
        ):
            if value is not None:
                check_count(name, value)
        check_choice("norms", self.norms, Norms)

    def blocks(self, source: Source) -> Iterator[FeatureBlock]:
        """Yield the features of a source in order, skipping unreadable items.

        Raises:
            InputError: if no item is readable, or if ``strict`` is set and an image is unreadable.
            InputError: if rows of a feature table are missing, have different lengths, are not finite, or do not have
                unit norm with ``norms="check"``.
            UsageError: if the source contains images and there is no backbone.
            UsageError: if a batch does not fit in memory.
            BackboneError: if a feature table was made with another backbone.
        """
        for block in self._blocks(source, view_names(self.seed, self.views), mean=True):
            yield replace(block, features=block.features[:, 0])

    def encode(self, source: Source) -> FeatureBlock:
        """Return the features of a source as one block (see :meth:`blocks`)."""
        if not len(source):
            raise InputError(f"{source.name}: has no items; give at least one")
        return FeatureBlock.joined(list(self.blocks(source)))

    def encode_views(self, source: Source, names: Sequence[str]) -> dict[int, FloatArray]:
        """Return the features of all views of each shot, ``[v, d]``, by the position of its first item in the source.

        Each distinct readable path is a shot. Its views are ``names`` (see :func:`view_names`), and their features have
        unit norm. In a feature table, rows with the same ``id`` are views of one shot, and ``names`` is ignored.

        Raises the same errors as :meth:`blocks`, UsageError if the features do not fit in memory, and InputError if the
        source is empty.
        """
        if not len(source):
            raise InputError(f"{source.name}: empty; expected at least one item")
        first: dict[str, int] = {}
        each = source.sources if source.paths is None else source.paths
        shots = [first.setdefault(name, position) for position, name in enumerate(each)]
        if source.paths is not None:
            shots = list(first.values())
            values = (
                2 * len(shots) * len(names) * self.needed_backbone(source).dim
            )  # the parts and their concatenation
            check_memory(
                4 * values, f"{len(names)} views of {len(shots)} images", "use fewer views"
            )
            source = source.take(shots)
        views = defaultdict[int, list[FloatArray]](list)
        for block in self._blocks(source, names, mean=False):
            for position, features in zip(block.positions.tolist(), block.features, strict=True):
                views[shots[position]].append(features)
        return {shot: np.concatenate(parts) for shot, parts in views.items()}

    def store_int8(self, source: Source) -> float:
        """Calibrate the backbone in int8 on at most :data:`CALIBRATED` photos, which need no labels, and store it.

        ``precision="int8"`` then loads the result. The backbone must be loaded in float32 on a CPU. Return the lowest
        cosine between the features of some photos in int8 and in float32.

        Raises InputError if fewer than :data:`FEWEST` photos can be read. Raises UsageError if NNCF is not installed,
        if the backbone is not float32 on a CPU, or if the source is a table. Raises BackboneError if the lowest cosine
        is below 0.8, or if the backbone cannot be quantised or stored.
        """
        backbone = self.needed_backbone(source)
        if not isinstance(backbone, TorchBackbone):
            raise UsageError("int8: requires a backbone from load_backbone")
        if source.paths is None:
            raise UsageError(f"{source.name}: a feature table has no pixels; give the images")
        photos: list[torch.Tensor] = []
        for path in source.take(spread(len(source), CALIBRATED)).paths or ():
            try:
                photos.append(pixels_of(source.load(path), backbone).half())
            except InputError as error:
                self._skip(source, path, str(error))
        if len(photos) < FEWEST:
            raise InputError(
                f"{source.name}: {counted(len(photos), 'photo')} could be read; int8 needs {FEWEST}"
            )
        return backbone.store_int8(
            tqdm(
                photos,
                desc="Calibrating int8",
                disable=None if self.progress else True,
                leave=False,
            )
        )

    def text_weights(self, class_names: Sequence[str], templates: Sequence[str]) -> FloatArray:
        """Return the text weights of the classes (see :func:`prompts.text_weights`), from the cache if possible."""
        assert self.backbone is not None
        return cached_text_weights(self.backbone, self.cache, class_names, templates)

    def for_queries(self, parts: tuple[Part, ...], shares: Sequence[float]) -> Reader:
        """Return a reader for queries to an index, which does not encode images with encoders that have no share."""
        if not parts or self.backbone is None:
            return replace(self, parts=parts)
        return replace(self, parts=parts, backbone=without_unused(self.backbone, shares))

    def needed_backbone(self, source: Source) -> Backbone:
        """Return the backbone. Raises UsageError if it is missing."""
        if self.backbone is None:
            raise UsageError(
                f"{source.name}: photos need an encoder; name it with --model, or in Python with model"
            )
        return self.backbone

    def _blocks(
        self, source: Source, names: Sequence[str], *, mean: bool
    ) -> Iterator[FeatureBlock]:
        """Yield features of shape ``[b, v, d]``: of each view, of the ``mean`` view, or of a row of a table."""
        done = 0
        for skipped in source.failed:
            self._skip(source, skipped.source, skipped.reason)
        blocks = (
            self._of_table(source)
            if source.paths is None
            else self._of_images(source, names, mean=mean)
        )
        what = "Encoding" if source.paths is not None else "Reading"
        hidden = None if self.progress else True
        with tqdm(total=len(source), unit="image", desc=what, disable=hidden, leave=False) as bar:
            for block in blocks:
                done += len(block.positions)
                bar.update(int(block.positions[-1]) + 1 - bar.n)
                yield block
        if not done and len(source) and not self.empty:
            own = set(source.sources)
            first = next(
                (skipped for skipped in self.skipped if skipped.source in own), source.name
            )
            none = f"{source.name}: none of {len(source):,} images could be read ({first})"
            raise InputError(str(first) if len(source) == 1 else none)

    def _skip(self, source: Source, name: str, reason: str) -> None:
        """Add an unusable input to ``skipped`` and log it once. If ``strict`` is set, raise InputError instead."""
        skipped = Skipped(show(name), reason)
        if self.strict or source.strict:
            raise InputError(str(skipped))
        if skipped not in self.skipped:
            log.warning("skipped %s", skipped)
            self.skipped.append(skipped)

    def _of_table(self, source: Source) -> Iterator[FeatureBlock]:
        assert source.table is not None
        assert source.rows is not None
        if self.backbone is not None:
            same_backbone(
                source.table.identity(self.parts), self.backbone.identity, source.table.files.name
            )
        rows, places = np.unique(source.rows, return_inverse=True)
        blocks = source.table.features(rows, self.norms, self.parts)
        if not np.array_equal(rows, source.rows):  # they are in another order, or some are repeated
            blocks = iter(
                [(slice(None), np.concatenate([features for _, features in blocks])[places])]
            )
        positions = np.arange(len(source))
        has_digests = pa.field("digest", pa.string()) in list(source.items.schema)
        digests = source.items["digest"] if has_digests else pa.nulls(len(source))
        for some, features in blocks:
            yield FeatureBlock(positions[some], features[:, None], digests[some].to_pylist())

    def _of_images(
        self, source: Source, names: Sequence[str], *, mean: bool
    ) -> Iterator[FeatureBlock]:
        encoder = CachedEncoder(self.needed_backbone(source), self.cache, self.batch_size)
        paths = source.paths or ()
        last = {path: position for position, path in enumerate(paths)}
        at_once = min(len(last), 3 * encoder.size)
        loaded = len(names) * at_once
        batch = min(len(names) * len(last), encoder.size)
        pixels = encoder.pixels * (loaded + batch)
        what = f"{counted(len(names), 'view')} of {counted(at_once, 'image')} at a time"
        check_memory(12 * pixels, what, "use fewer views or a smaller batch")
        encoded: _Encoded = {}
        start = 0
        load = partial(self._load, source, encoder, names)
        for chunk in self._ahead(load, chunks(list(last), encoder.size)):
            encoded |= self._encode_chunk(source, chunk, encoder, mean=mean)
            rows: list[tuple[int, FloatArray, str]] = []
            while start < len(paths) and paths[start] in encoded:
                path = paths[start]
                result = encoded.pop(path) if last[path] == start else encoded[path]
                rows += [] if result is None else [(start, *result)]
                start += 1
            if rows:
                positions, features, digests = zip(*rows, strict=True)
                yield FeatureBlock(np.array(positions), np.stack(features), list(digests))

    def _load(
        self, source: Source, encoder: CachedEncoder, names: Sequence[str], path: str
    ) -> _Loaded:
        """Read an image once, and decode it for the views that are not in the cache."""
        try:
            return path, encoder.load(source.load(path), names)
        except InputError as error:
            return path, str(error)  # the traceback of an error would keep the image in memory

    def _ahead(
        self, load: Callable[[str], _Loaded], batches: Sequence[Sequence[str]]
    ) -> Iterator[list[_Loaded]]:
        """Yield the loaded images of each chunk, while threads load the next two chunks."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            waiting: deque[list[Future[_Loaded]]] = deque()
            try:
                for chunk in (*batches, (), ()):
                    waiting.append([pool.submit(load, path) for path in chunk])
                    if len(waiting) > 2:
                        yield [future.result() for future in waiting.popleft()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _encode_chunk(
        self,
        source: Source,
        chunk: Sequence[_Loaded],
        encoder: CachedEncoder,
        *,
        mean: bool,
    ) -> _Encoded:
        what = "feature" if mean else "feature of view"
        fresh = encoder.encode([photo for _, photo in chunk if isinstance(photo, Photo)])
        self.done.update(images=len(chunk), fresh=fresh)
        encoded: _Encoded = {}
        for path, photo in chunk:
            encoded[path] = None
            try:
                if isinstance(photo, str):
                    raise InputError(photo)
                raw = photo.features.mean(axis=0, keepdims=True) if mean else photo.features
                encoded[path] = unit_of(encoder.backbone, raw, what), photo.digest
            except InputError as error:
                self._skip(source, path, str(error))
        return encoded


def encode_table(source: Source, out: str | os.PathLike[str], reader: Reader) -> int:
    """Write the features of a source as a feature table, which appears when complete. Return the number of rows."""
    schema, rows = encoded(source, reader)
    return writing.write_table(Path(out), schema, writing.row_groups_of(rows))


def encoded(source: Source, reader: Reader) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Return the schema and the rows of the feature table for a source. The rows are encoded lazily."""
    table = source.table
    parts = parts_of(reader.needed_backbone(source)) if table is None else table.parts(reader.parts)
    own = source.items.schema
    written = {"source", "label", tables.FEATURE, "digest", "id"}
    kept = [
        field for field in own if field.name not in written.union(part.column for part in parts)
    ]
    further = [
        pa.field("digest", pa.string()),
        *(pa.field(field.name, field.type) for field in kept),
    ]
    schema = writing.schema_of(parts, np.float32, further)

    def rows() -> Iterator[pa.Table]:
        for block in reader.blocks(source):
            items = source.items.take(pa.array(block.positions))
            labels = items["label"] if "label" in own.names else pa.nulls(len(items), pa.string())
            columns = {"digest": pa.array(block.digests, pa.string())} | {
                field.name: items[field.name] for field in kept
            }
            yield writing.table_of(schema, items["source"], labels, block.features, columns)

    return schema, rows()
