"""The service behind the routes.

It batches images and queries, makes changes one at a time, and computes each slow result and thumbnail only once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import stat
import weakref
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Backbone, encoders_of, unit_of
from retrieval_tip.data import images
from retrieval_tip.data.cached_encoder import pixels_of
from retrieval_tip.data.reader import FeatureBlock
from retrieval_tip.data.remote import scheme_of
from retrieval_tip.data.source import file_of, joins, read_item
from retrieval_tip.data.sources import how_to_read
from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.files import suffix_of
from retrieval_tip.html import data_url
from retrieval_tip.index.places import Changed
from retrieval_tip.labelling.clips import best_of_groups, frames_in
from retrieval_tip.server import metrics, schemas, shots
from retrieval_tip.server.batching import Batches, ResultCache, Turns
from retrieval_tip.server.guard import CLIENT, ROWS_PER_IMAGE, Limits, give_time
from retrieval_tip.server.problems import NAMED, Problem
from retrieval_tip.server.schemas import Row
from retrieval_tip.server.served import NEIGHBOUR_CELLS, SIMILAR, Maker, OpenVersion, Result, Served
from retrieval_tip.server.uploads import LabelStudioPhotos, Upload
from retrieval_tip.settings import Ask

log = logging.getLogger(__name__)

ROWS_AT_A_TIME = 256
PIXELS = 4_000_000
"""Number of pixels that count as one additional image in the queue. A larger image is decoded alone."""
CLIP = 16
"""Number of images that a video counts as in the queue."""
SLOW_AT_ONCE, SLOW_KEPT = 8, 32
"""Maximum numbers of slow results in progress, and of slow results in the cache.

Slow results are maps, audits and accuracies.
"""
KEPT_BYTES, OVERHEAD = 64 << 20, 1 << 10
"""Memory for thumbnails, and the overhead of each thumbnail, in bytes."""
AT_ONCE = 256
"""Maximum number of thumbnails in progress."""
T = TypeVar("T")


class Service:
    """Service that queries, changes and follows indexes while it is ``running`` in the event loop of its callers.

    Added images are saved in ``uploads``, with one folder per class. The default is ``NAME-shots`` next to the index.
    Relative paths of shots are resolved against ``root``, to show thumbnails.
    """

    def __init__(
        self,
        served: dict[str, Served],
        limits: Limits = Limits(),
        uploads: Path | None = None,
        root: Path | None = None,
        maker: Maker | None = None,
    ) -> None:
        self.served = served
        self.limits = limits
        self.maker = maker
        self.uploads = uploads
        self.annotating = asyncio.Lock()
        threads = min(4, os.cpu_count() or 1)
        self._images, self._large, self._features = self._turns = [
            Turns(name, limits.queue / 8) for name in ("images", "large images", "features")
        ]
        self._pools: list[ThreadPoolExecutor] = []
        self._decoding = {
            turns: self.pool("decode", threads) for turns in (self._images, self._large)
        }
        self._encode: Batches[Backbone, torch.Tensor, FloatArray] = Batches(
            "encode",
            self.pool("encode"),
            lambda backbone, pixels: list(
                unit_of(backbone, backbone.encode_images(torch.stack(pixels)))
            ),
            most=lambda backbone: backbone.batch_size,
        )
        self._answer: Batches[tuple[OpenVersion, Ask], FloatArray, Row] = Batches(
            "features",
            self.pool("answer"),
            lambda key, rows: key[0].answer(key[1], FeatureBlock.of(np.stack(rows))),
            most=lambda key: min(ROWS_AT_A_TIME, key[0].at_once(key[1])),
        )
        self._weighing, self._finding, self._following, self._changing = map(
            self.pool, ("weigh", "find", "follow", "change")
        )
        self._drawn: ResultCache[Hashable, bytes] = ResultCache(
            self.pool("draw", threads),
            most=KEPT_BYTES,
            room=AT_ONCE,
            size=lambda data: len(data) + OVERHEAD,
        )
        self._slow = self.pool("slow", 2)
        self._made: ResultCache[tuple[weakref.ref[OpenVersion], Hashable, Hashable], Any] = (
            ResultCache(
                self._slow,
                most=SLOW_KEPT,
                room=SLOW_AT_ONCE,
                useful=lambda key: key[0]() is not None,
            )
        )
        self.photos = LabelStudioPhotos(root, limits.bytes, os.environ)
        self.root = root or Path()

    def pool(self, name: str, threads: int = 1) -> ThreadPoolExecutor:
        """Return a new pool of threads, which stop with the service."""
        self._pools.append(ThreadPoolExecutor(threads, thread_name_prefix=name))
        return self._pools[-1]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the index folders inside the context, and release idle encoders.

        On exit, finish the queued work and stop the threads.
        """
        follower = asyncio.create_task(self._follow())
        yield
        follower.cancel()
        with suppress(asyncio.CancelledError):
            await follower
        for pool in self._pools:
            pool.shutdown(cancel_futures=pool is self._slow)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.limits.poll)
            for one in list(self.served.values()):
                if one.changed():
                    try:
                        await self.run(self._following, one.follow)
                    except Exception:
                        log.exception("%s: cannot look for new versions", one.name)
            await self.run(self._following, self._release)

    def _release(self) -> None:
        for one in list(self.served.values()):
            if one.now.backbone is not None:
                for encoder, _ in encoders_of(one.now.backbone):
                    encoder.release(self.limits.idle)

    @staticmethod
    async def run(pool: Executor, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call in a thread of ``pool``."""
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)

    async def change(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a change of an index, which takes as long as it needs. Only one change runs at a time."""
        give_time()
        return await self.run(self._changing, call, *arguments)

    async def find(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a short query of an index. Queries do not wait for changes."""
        return await self.run(self._finding, call, *arguments)

    async def changed(
        self, one: Served, call: Callable[..., Result], *arguments: Any, **options: Any
    ) -> Result:
        """Run a change of an index, and open the new version. See :meth:`served.Served.change`."""
        return await self.change(partial(one.change, call, *arguments, **options))

    async def open(self, make: Callable[[], Served], instead: Served | None = None) -> Served:
        """Make an index, and serve it in place of another index or after all others."""
        made = await self.change(make)
        self.replace(instead, made)
        return made

    def replace(self, old: Served | None, *new: Served) -> None:
        """Serve new indexes in place of an old one, or after all others."""
        served = [one for each in self.served.values() for one in (new if each is old else (each,))]
        served += () if old else new
        self.served.clear()
        self.served.update((one.name, one) for one in served)
        if old is not None:
            for gauge in (metrics.VERSION, metrics.KEYS):
                gauge.remove(old.name)

    def index(self, name: str | None) -> Served:
        """Return the index with this name, or the only index if ``name`` is ``None``.

        Raises Problem 404 if no index is found, and InputError if there are several.
        """
        if name is None:
            if not self.served:
                raise Problem(404, "no index is served yet; create one first")
            if len(self.served) > 1:
                raise InputError(
                    f"index: the name is missing; give one of {', '.join(self.served)}"
                )
            return next(iter(self.served.values()))
        if name not in self.served:
            raise Problem(
                404,
                f"index {name!r} not found; the served indexes are {', '.join(self.served) or 'none'}",
            )
        return self.served[name]

    async def classify(
        self,
        version: OpenVersion,
        ask: Ask,
        sent: Upload,
        *,
        features: bool = False,
        looks: bool = False,
    ) -> schemas.Classified:
        """Classify uploaded inputs. With ``features``, return their features and the most similar shots as well.

        With ``looks``, images that are shots of the index are classified without themselves, unless it is large. A
        video has one answer, with its best frame instead of features.
        """
        cells = version.cells(ask) + (
            version.index.d + 2 * min(SIMILAR, version.index.n) if features else 0
        )
        rows = len(sent.names)
        if rows > 1 and rows * cells > self.limits.cells:
            size = f"{rows * cells:,} numbers (a neighbour counts as {NEIGHBOUR_CELLS}), above {self.limits.cells:,}"
            most = f"{self.limits.cells // cells or 1} at once, or reduce features, logits, neighbours, top or k"
            raise InputError(
                f"{rows} inputs: the answers would contain {size}; send at most {most}"
            )
        skipped: list[Skipped] = []
        names = sent.names
        if sent.features is None:
            sent, skipped = await self.read(sent, backbone_of(version))
            names = [names[file] for file in sent.files]
        else:
            self._admit()
        assert sent.features is not None
        queries = list(sent.features)
        block = FeatureBlock.of(sent.features)
        async with self._features.turn(CLIENT.get(), len(queries) / ROWS_PER_IMAGE):
            if looks and sent.images and version.index.n <= self.limits.estimated:
                block = await self.find(version.recognised, block, sent.images)
            if sent.names != names:  # some are frames
                _, groups = np.unique(sent.files, return_inverse=True)
                block = await self.run(
                    self._slow, best_of_groups, version.index, block, groups, ask
                )
            if block.mixed is not None or block.shots.any():  # which takes longer
                results = await self.run(self._slow, version.answer, ask, block)
            else:
                results = await self._answer((version, ask), queries)
        located = (
            await self.find(version.located, block.features) if features else [{}] * len(results)
        )
        for place, result, more in zip(block.positions, results, located, strict=True):
            name = sent.names[place]
            if name != names[place]:
                picture = await self.find(images.thumbnail, sent.images[place], 640)  # pixels
                more = {"frame": name, "picture": data_url(picture)}
            result |= {"input": names[place]} | more
        metrics.CLASSIFIED.labels(version.name).inc(len(results))
        return schemas.Classified(
            **ask.settings(version.index.settings).shown(),
            index=version.name,
            version=version.manifest.version,
            results=results,
            warnings=[*version.index.cautions(ask)],
            skipped=skipped,
        )

    async def add(
        self, one: Served, sent: Upload, annotation: str | None = None
    ) -> tuple[Changed, list[Skipped]]:
        """Add images of one class, or features, as shots. Return what was added and the unreadable images."""
        give_time()
        skipped = list[Skipped]()
        backbone = one.now.backbone
        if sent.features is None:
            backbone = backbone_of(one.now)
            sent, skipped = await self.read(sent, backbone)
        return await self.changed(one, shots.add, backbone, sent, self.uploads, annotation), skipped

    async def read(
        self, sent: Upload, backbone: Backbone, *, encode: bool = True
    ) -> tuple[Upload, list[Skipped]]:
        """Return the images that can be decoded, with their features unless ``encode`` is false, and the others.

        The frames of a video take its place.
        """

        async def found(data: bytes, area: int) -> FloatArray | torch.Tensor | InputError:
            turns = self._large if area >= PIXELS else self._images
            async with turns.turn(CLIENT.get(), 1 + area / PIXELS):
                pixels = await self.run(self._decoding[turns], self._pixels, backbone, data)
                if isinstance(pixels, InputError) or not encode:
                    return pixels
                try:
                    return (await self._encode(backbone, [pixels])).pop()
                except InputError as error:
                    return InputError(str(error))

        sent, skipped = await self._unpacked(sent)
        # Read the headers one at a time, so that requests take turns here as well.
        area = partial(images.area, most=self.limits.pixels, only=images.uploads())
        areas = [await self.run(self._weighing, area, data) for data in sent.images]
        self._admit()
        made: list[Any] = await asyncio.gather(*map(found, sent.images, areas))
        good = list[int]()
        for place, one in enumerate(made):
            if isinstance(one, InputError):
                name = sent.names[place]
                skipped.append(Skipped(name, f"{one}{how_to_read([suffix_of(name)])}"))
            else:
                good.append(place)
        if not good:
            more = f"; and {len(skipped) - NAMED} more" if skipped[NAMED:] else ""
            raise InputError("; ".join(map(str, skipped[:NAMED])) + more)
        kept = {name: [own[place] for place in good] for name, own in vars(sent).items() if own}
        return Upload(
            **kept, features=np.stack([made[place] for place in good]) if encode else None
        ), skipped

    async def _unpacked(self, sent: Upload) -> tuple[Upload, list[Skipped]]:
        """Return images, with frames in place of videos, and the videos that cannot be read."""
        photos = list[tuple[int, str, bytes]]()
        skipped = list[Skipped]()
        share = len(sent.images)
        for file, name in enumerate(sent.names):
            data = sent.images[file]
            if not joins(suffix_of(name)):
                photos.append((file, name, data))
                continue
            self._admit()
            frames = frames_in(name, data, self.limits.images // share, self.limits.bytes // share)
            async with self._large.turn(CLIENT.get(), CLIP):
                try:  # frame by frame, so that the work stops if the client leaves
                    while frame := await self.run(self._decoding[self._large], next, frames, None):
                        photos.append((file, *frame))
                except InputError as error:
                    skipped.append(Skipped(name, str(error)))
        files = [file for file, _, _ in photos]
        labels = sent.labels and [sent.labels[file] for file in files]
        names = [name for _, name, _ in photos]
        return Upload(names, labels, [data for _, _, data in photos], files=files), skipped

    def _admit(self) -> None:
        """Raise Problem 429 if the waiting turns of the client fill more than a quarter of the queue."""
        if sum(turns.waiting(CLIENT.get()) for turns in self._turns) > self.limits.queue / 4:
            metrics.REFUSED.inc()
            text = "too many of your images or features are waiting; try again in 2 s"
            raise Problem(429, text, {"Retry-After": "2"})

    def _pixels(self, backbone: Backbone, data: bytes) -> torch.Tensor | InputError:
        try:
            return pixels_of(data, backbone, most=self.limits.pixels, only=images.uploads())
        except InputError as error:
            return InputError(str(error))  # drops the traceback, which keeps the image in memory

    async def once(
        self, version: OpenVersion, what: Hashable, call: Callable[[], T], at: Hashable = None
    ) -> T:
        """Return the result of ``call``, run once per version. Raises Problem 202 after ``limits.patience``.

        With ``at``, it is run once per version and ``at``. If such a result is in progress, it is returned instead,
        even if it belongs to an earlier version or another ``at``.
        """
        try:
            async with asyncio.timeout(self.limits.patience):
                answer: T = await self._made(
                    (weakref.ref(version), what, at),  # does not keep the version alive
                    call,
                    lambda other: at is not None and other[1] == what,
                )
                return answer
        except TimeoutError:
            raise Problem(
                202, "the result is still being computed; try again", {"Retry-After": "0"}
            ) from None  # the next request waits, too

    def image_of(self, source: str) -> tuple[Path | str, int, int] | None:
        """Return the path of the image that the source of a shot names, and the time and the size of its file."""
        if scheme_of(source) is not None:
            return source, 0, 0
        path = self.root / source
        file = Path(file_of(str(path)))
        try:
            if images.is_photo(file) and stat.S_ISREG((found := file.stat()).st_mode):
                return path, found.st_mtime_ns, found.st_size
        except (OSError, ValueError):  # the source is not a valid file name
            pass
        return None

    async def thumbnail(self, name: Hashable, read: Callable[[], bytes], size: int) -> bytes:
        """Return a thumbnail of the image that ``read`` returns as JPEG data. It is kept under its ``name``.

        Raises Problem 404 if the image cannot be read.
        """
        try:
            return await self._drawn(
                (name, size), lambda: images.thumbnail(read(), size, most=self.limits.pixels)
            )
        except (OSError, InputError) as error:
            raise Problem(404, f"the photo cannot be read: {error}") from None


def read_image(path: Path | str, digest: str | None) -> bytes:
    """Read an image file. Raises OSError or InputError, also if the file has another ``digest``."""
    data = read_item(path)
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise InputError("the file now contains another photo")
    return data


def backbone_of(version: OpenVersion) -> Backbone:
    """Return the encoder of a version. Raises InputError if this server does not have it."""
    if version.asked is None:
        raise InputError(
            f"index {version.name!r} only accepts features: this server does not have its encoder"
        )
    return version.asked
