"""The service behind the routes.

It batches images and queries, makes changes one at a time, and computes each slow result only once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip.backbones.base import Backbone, unit
from retrieval_tip.data import images
from retrieval_tip.data.encoder import FloatArray, pixels_of
from retrieval_tip.errors import InputError, json_line
from retrieval_tip.evaluation.audit import AUDITED, audit
from retrieval_tip.evaluation.exemplars import exemplars
from retrieval_tip.evaluation.projection import Method, Projection, methods, projected
from retrieval_tip.fit.closed_form import ShotEstimate, estimate
from retrieval_tip.index import changes
from retrieval_tip.index.fit import fit_index
from retrieval_tip.index.places import Place
from retrieval_tip.retrieval.duplicates import describe_duplicates
from retrieval_tip.server import metrics, schemas, shots
from retrieval_tip.server.batching import Kept, Lane, Turn, TurnQueue
from retrieval_tip.server.limits import ROWS_PER_IMAGE, Limits
from retrieval_tip.server.problems import NAMED, Problem
from retrieval_tip.server.schemas import Row, Unread
from retrieval_tip.server.served import NEIGHBOUR_CELLS, SIMILAR, Maker, Served, Version, encoded
from retrieval_tip.server.thumbnails import Thumbnails
from retrieval_tip.server.uploads import Sent
from retrieval_tip.settings import Ask

log = logging.getLogger(__name__)

ROWS_AT_A_TIME = 256
PIXELS = 4_000_000
"""Number of pixels that count as one additional image towards ``--queue``."""
DECODED = 32
"""Maximum number of images that have been decoded but not yet encoded."""
SLOW_AT_ONCE, SLOW_KEPT = 8, 32
"""Maximum numbers of slow results in progress, and of slow results in the cache.

Slow results are maps, audits and accuracies.
"""
SUSPICIOUS = 1000
"""Maximum number of suspicious shots to keep."""

T = TypeVar("T")


class Service:
    """Service that queries, changes and follows indexes while it is ``running`` in the event loop of its callers.

    Added images are saved in ``uploads``, with one folder per class. The default is ``NAME-shots`` next to the index.
    Relative paths of shots are resolved against ``root``.
    """

    def __init__(
        self,
        served: dict[str, Served],
        limits: Limits,
        uploads: Path | None = None,
        root: Path | None = None,
        maker: Maker | None = None,
    ) -> None:
        self.served, self.limits, self.maker = served, limits, maker
        self.uploads, self.creating = uploads, 0
        threads = min(4, os.cpu_count() or 1)
        self._queue = TurnQueue(limits.queue)
        self._decoding: Lane[Backbone, bytes, torch.Tensor | InputError] = Lane(
            "images", self._queue, self._pixels, threads=threads, held=DECODED
        )
        self._encode: Lane[Backbone, torch.Tensor, FloatArray] = Lane(
            "encode", TurnQueue(math.inf), encoded, most=lambda backbone: backbone.batch_size
        )
        self._answer: Lane[tuple[Version, Ask], FloatArray, Row] = Lane(
            "features",
            self._queue,
            lambda key, rows: key[0].answer(key[1], np.stack(rows)),
            most=lambda key: min(ROWS_AT_A_TIME, key[0].at_once(key[1])),
        )
        self.thumbnails = Thumbnails(root, limits.pixels, threads)
        self._weighing, self._finding, self._following, self._changing, self._slow, self._slower = (
            ThreadPoolExecutor(1, thread_name_prefix=name)
            for name in ("weigh", "find", "follow", "change", "slow", "slower")
        )
        self._made: Kept[Hashable, Any] = Kept(self._slow, most=SLOW_KEPT, room=SLOW_AT_ONCE)
        self._mapped: Kept[Hashable, Any] = Kept(self._slower, most=SLOW_KEPT, room=SLOW_AT_ONCE)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the index folders inside the context. On exit, finish the queued work and stop the threads."""
        follower = asyncio.create_task(self._follow())
        yield
        follower.cancel()
        with suppress(asyncio.CancelledError):
            await follower
        for lane in (self._decoding, self._encode, self._answer):
            lane.close()
        self.thumbnails.close()
        for pool in (self._weighing, self._finding, self._following, self._changing):
            pool.shutdown()
        for pool in (self._slow, self._slower):
            pool.shutdown(cancel_futures=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.limits.poll)
            for one in list(self.served.values()):
                if one.changed():
                    try:
                        await self.follow(one)
                    except Exception:
                        log.exception("%s: cannot look for new versions", one.name)

    @staticmethod
    async def run(pool: Executor, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call in a thread of ``pool``."""
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)

    async def change(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a change of an index. Only one change runs at a time."""
        return await self.run(self._changing, call, *arguments)

    async def find(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a short query of an index. Queries do not wait for changes."""
        return await self.run(self._finding, call, *arguments)

    async def open(self, place: Place) -> None:
        """Serve an index that has been created with the backbone of the ``maker``."""
        assert self.maker is not None
        one = await self.change(Served, place, self.maker.backbones)
        self.served[one.name] = one

    async def follow(self, one: Served) -> None:
        """Open the current version of an index if it is new."""
        await self.run(self._following, one.follow)

    def index(self, name: str | None) -> Served:
        """Return the index with this name, or the only index if ``name`` is ``None``. Raises Problem 404 or 422."""
        if name is None:
            if not self.served:
                raise Problem(404, "no index is served yet; create one first")
            if len(self.served) > 1:
                raise Problem(422, f"index: the name is missing; give one of {', '.join(self.served)}")
            return next(iter(self.served.values()))
        if name not in self.served:
            raise Problem(404, f"index {name!r} not found; the served indexes are {', '.join(self.served) or 'none'}")
        return self.served[name]

    async def classify(self, version: Version, ask: Ask, sent: Sent, *, features: bool) -> schemas.Classified:
        """Classify uploaded inputs. If ``features`` is true, return their features and the most similar shots as well.

        Raises Problem 422 if no input can be read or the answers are too large, and the same errors as
        :meth:`TurnQueue.admit`.
        """
        cells = version.cells(ask) + (version.cache.d + 2 * min(SIMILAR, version.cache.n) if features else 0)
        rows = len(sent.names)
        if rows > 1 and rows * cells > self.limits.cells:
            raise Problem(
                422,
                f"{rows} inputs: the answers would contain {rows * cells:,} numbers (a neighbour counts as "
                f"{NEIGHBOUR_CELLS}), but only {self.limits.cells:,} are allowed; send at most "
                f"{max(1, self.limits.cells // cells)} at once, or reduce features, logits, neighbours, top or k",
            )
        skipped: list[Unread] = []
        names, queries = sent.names, list(sent.features) if sent.features is not None else []
        if sent.images is None:
            self._queue.admit(sent.client)
        else:
            backbone = backbone_of(version)

            async def feature(pixels: torch.Tensor) -> FloatArray | InputError:
                return _unit((await self._encode(sent.client, backbone, [pixels]))[0])

            encoded, skipped = await self.decoded(sent, sent.images, backbone, feature)
            names, queries = [names[place] for place in encoded], list(encoded.values())
        results = await self._answer(sent.client, (version, ask), queries, len(queries) / ROWS_PER_IMAGE)
        located = await self.find(version.located, np.stack(queries)) if features else [{}] * len(queries)
        for name, result, more in zip(names, results, located, strict=True):
            result |= {"input": name} | more
        metrics.CLASSIFIED.labels(version.name).inc(len(results))
        used = ask.settings(version.cache.settings)
        caution = version.cache.caution(used)
        return schemas.Classified(
            used.alpha, used.beta, used.k or "all", used.tail, used.temperature, version.name, version.manifest.version,
            results, [caution] if caution else [], skipped,
        )  # fmt: skip

    async def decoded(
        self,
        sent: Sent,
        datas: Sequence[bytes],
        backbone: Backbone,
        use: Callable[[torch.Tensor], Awaitable[T | InputError]],
    ) -> tuple[dict[int, T], list[Unread]]:
        """Decode images and pass each to ``use``. Return the results by position, and the unreadable images.

        Raises Problem 422 if no image can be read, and the same errors as :meth:`TurnQueue.admit`.
        """

        async def used(turn: Turn[Backbone, bytes, torch.Tensor | InputError]) -> T | InputError:
            pixels = (await turn.result).pop()  # otherwise the turn would keep it in memory
            try:
                return pixels if isinstance(pixels, InputError) else await use(pixels)
            finally:
                self._decoding.release(turn)

        # Read the headers one at a time, so that requests take turns here as well.
        area = partial(images.area, most=self.limits.pixels, only=images.uploads())
        areas = [await self.run(self._weighing, area, data) for data in datas]
        self._queue.admit(sent.client)
        costs = [1 + area / PIXELS for area in areas]
        with self._decoding.turns(sent.client, backbone, [[data] for data in datas], costs) as turns:
            made = await asyncio.gather(*map(used, turns))
        pairs = zip(sent.names, made, strict=True)
        skipped = [Unread(name, str(one)) for name, one in pairs if isinstance(one, InputError)]
        if len(skipped) == len(made):
            lines = [f"{one.input}: {one.reason}" for one in skipped]
            raise Problem(422, "; ".join(lines[:NAMED]) + (f"; and {len(lines) - NAMED} more" if lines[NAMED:] else ""))
        return {place: one for place, one in enumerate(made) if not isinstance(one, InputError)}, skipped

    def _pixels(self, backbone: Backbone, datas: Sequence[bytes]) -> list[torch.Tensor | InputError]:
        (data,) = datas
        try:
            return [pixels_of(data, backbone, most=self.limits.pixels, only=images.uploads())]
        except InputError as error:
            return [InputError(str(error))]  # drops the traceback, which keeps the image in memory

    async def add(self, one: Served, sent: Sent) -> schemas.AddedShots:
        """Add shots, and open the new version of the index. Raises the same errors as :func:`changes.add`."""
        skipped: list[Unread] = []
        if sent.images is None:
            added = await self.change(shots.add_features, one, one.now.backbone, sent)
        else:
            backbone = backbone_of(one.now)
            good, skipped = await self.decoded(sent, sent.images, backbone, nothing)
            datas = [sent.images[place] for place in good]
            added = await self.change(shots.add_images, one, backbone, sent.labels[0], datas, self.uploads)
        await self.follow(one)
        duplicates = describe_duplicates(added.duplicates) if added.duplicates is not None else []
        warnings = of_spelling(one.name, added.alike)
        return schemas.AddedShots(
            one.name, added.version, added.key_ids, added.classes, added.known, duplicates, warnings, skipped
        )

    async def fit(self, one: Served) -> schemas.FittedIndex:
        """Refit an index to its shots, and open the new version."""
        await self.change(fit_index, one.folder)
        await self.follow(one)
        return schemas.FittedIndex(one.name, one.now.manifest.version, judged(one))

    async def remove(self, one: Served, key_ids: Sequence[int]) -> schemas.ChangedShots:
        """Remove shots, and open the new version. Raises Problem 404 if a key does not exist."""
        await self._found(one, (), key_ids)
        return await self._changed(one, lambda: changes.remove(one.folder, key_ids=key_ids))

    async def relabel(self, one: Served, moves: Sequence[tuple[Sequence[int], str]]) -> schemas.ChangedShots:
        """Relabel shots in one new version. Each of the ``moves`` consists of key ids and their new label.

        Raises Problem 422 if there are no shots or a shot has two labels, and the same errors as :meth:`remove`.
        """
        labels: dict[int, str] = {}
        for key_ids, label in moves:
            for key_id in key_ids:
                if labels.setdefault(key_id, label) != label:
                    raise Problem(422, f"key_ids: key {key_id} has two labels; give only one label")
        if not labels:
            raise Problem(422, "key_ids: the list is empty; give at least one key id")
        await self._found(one, (), list(labels))
        return await self._changed(one, lambda: changes.relabel(one.folder, labels))

    async def merge(self, one: Served, of: str, label: str) -> schemas.ChangedShots:
        """Relabel a whole class (see :meth:`relabel`)."""
        found = await self._found(one, (of,), ())
        if not found:
            raise Problem(422, f"of: class {of!r} has no shots")
        return await self._changed(one, lambda: changes.relabel(one.folder, label, key_ids=found))

    async def _found(self, one: Served, labels: Sequence[str], key_ids: Sequence[int]) -> list[int]:
        """Return the ids of the matching keys. Raises Problem 404 if a key does not exist."""
        keys = await self.find(one.now.cache.find, labels, None, key_ids)
        found: list[int] = keys["key_id"].to_pylist()
        if missing := set(key_ids) - set(found):
            raise Problem(404, f"index {one.name!r} has no key {min(missing)}")
        return found

    async def rename(self, one: Served, of: str, label: str) -> schemas.ChangedShots:
        """Rename a class, or merge it into the class that already has the new name.

        A new name is encoded if the server has the text encoder. Raises Problem 404 if the class ``of`` does not exist.
        """
        cache, backbone = one.now.cache, one.now.backbone
        if of not in cache.class_names:
            raise Problem(404, f"index {one.name!r} has no class {of!r}")
        if backbone is None or not backbone.has_text or not cache.templates or label in cache.class_names:
            backbone = None
        return await self._changed(one, lambda: changes.rename(one.folder, of, label, backbone))

    async def rollback(self, one: Served, to: int, since: int | None) -> schemas.ChangedShots:
        """Restore a version. Raises Problem 404 if it is missing, and 409 if the current one is not ``since``."""
        return await self._changed(one, lambda: _rolled_back(one, to, since))

    async def history(self, one: Served) -> list[Row]:
        """Return all versions that are kept, starting with the oldest."""
        versions = await self.find(one.place.history)
        return list(versions.select(schemas.HISTORY).to_pylist())

    async def _changed(self, one: Served, call: Callable[[], changes.Changed]) -> schemas.ChangedShots:
        changed = await self.change(call)
        await self.follow(one)
        return schemas.ChangedShots(one.name, changed.version, changed.key_ids)

    async def exemplars(self, version: Version) -> schemas.Exemplars:
        """Return a typical key of each class, and mean affinities. Raises Problem 202 if this takes too long."""

        def call() -> schemas.Exemplars:
            found = exemplars(version.cache)
            keys = version.cache.find(key_ids=found.key_ids).select(["key_id", "class_id", "source"])
            shown = [
                schemas.Exemplar(row["class_id"], row["key_id"], row["image"]) for row in self._pictured(version, keys)
            ]
            return schemas.Exemplars(version.manifest.version, shown, found.own, found.other)

        return await self._once(version, "exemplars", call)

    async def keys(
        self, version: Version, labels: Sequence[str], source: str | None, key_ids: Sequence[int], page: slice
    ) -> tuple[int, list[Row]]:
        """Return the total number of keys that :meth:`AnsweringIndex.find` finds, and one page of them."""

        def call() -> tuple[int, list[Row]]:
            keys = version.cache.find(labels, source, key_ids)
            return len(keys), self._pictured(version, keys.slice(page.start, page.stop - page.start))

        return await self.find(call)

    def _pictured(self, version: Version, keys: pa.Table) -> list[dict[str, Any]]:
        address = f"/v1/indexes/{quote(version.name, safe='')}/keys"
        return [
            row | {"image": f"{address}/{row['key_id']}/image" if self.thumbnails.path(row["source"]) else None}
            for row in keys.to_pylist()
        ]

    async def map(self, version: Version, method: Method, limit: int) -> schemas.Map:
        """Project keys to two dimensions. Raises Problem 422 if the method is missing, and 202 if this is slow."""
        if method not in methods():
            raise Problem(422, f"method {method!r} is not installed; choose one of {', '.join(methods())}")
        cache = version.cache
        limit = min(limit, cache.n, max(1, self.limits.mapped // cache.d))

        def call() -> Projection:
            if method != "pca" and self.served[version.name].now is not version:  # while waiting
                raise Problem(202, "the index has changed; try again in 1 s", {"Retry-After": "1"})
            return projected(cache, method, limit)

        kept = self._made if method == "pca" else self._mapped  # a separate thread, so that t-SNE does not delay audits
        found = await self._once(version, ("map", method, limit), call, kept)
        x, y = found.places.T.copy()
        explained, axes = (None if one is None else list(one) for one in (found.explained, found.axes))
        return schemas.Map(
            version.manifest.version, method, list(methods()), cache.n, found.key_ids, found.class_ids, x, y,
            explained, axes,
        )  # fmt: skip

    async def audit(self, version: Version, limit: int, borderline: bool) -> schemas.Audit:
        """List suspicious shots in order. Raises Problem 422 if there are too many keys, and 202 if this is slow."""
        if version.cache.n > AUDITED:
            many = f"the index has {version.cache.n:,} keys, but at most {AUDITED:,} can be audited here"
            raise Problem(422, f"{many}; run retrieval-tip index audit {version.name}")
        cache = version.cache

        def call() -> tuple[int, list[Row]]:
            table = audit(cache.in_memory(), borderline=borderline)
            return len(table), table.slice(0, SUSPICIOUS).to_pylist()

        total, suspicious = await self._once(version, ("audit", borderline), call)
        return schemas.Audit(version.manifest.version, total, suspicious[:limit])

    async def accuracy(self, version: Version) -> schemas.Accuracy:
        """Estimate the accuracy with :func:`closed_form.estimate`. Raises Problem 202 if this takes too long.

        If the index has more than ``limits.estimated`` keys, the accuracy is ``None``.
        """
        cache = version.cache
        known: ShotEstimate = {"photos": None, "words": None, "both": None}
        if cache.n <= self.limits.estimated:
            known = await self._once(version, "accuracy", lambda: estimate(cache.in_memory()))
        return schemas.Accuracy.of(known, version.manifest.version)

    async def _once(
        self, version: Version, what: Hashable, call: Callable[[], T], kept: Kept[Hashable, Any] | None = None
    ) -> T:
        """Return the result of ``call``, run once per version. Raises Problem 202 after ``limits.patience``."""
        try:
            async with asyncio.timeout(self.limits.patience):
                key = (weakref.ref(version), what)  # does not keep the version alive
                answer: T = await (kept or self._made)(key, call)
                return answer
        except TimeoutError:
            raise Problem(202, "the result is still being computed; try again in 5 s", {"Retry-After": "5"}) from None

    async def thumbnail(self, version: Version, key_id: int, size: int) -> bytes:
        """Return a thumbnail of a shot as JPEG data. Raises Problem 404 if the shot has no readable image."""
        keys = await self.find(version.cache.find, (), None, [key_id])
        if not len(keys):
            raise Problem(404, f"index {version.name!r} has no key {key_id}")
        path = self.thumbnails.path(keys["source"][0].as_py())
        if path is None:
            raise Problem(404, f"key {key_id}: its source is not an image on this machine")
        try:
            return await self.thumbnails.of_file(path, size, keys["digest"][0].as_py())
        except (OSError, InputError) as error:
            raise Problem(404, f"key {key_id}: its image cannot be read ({error})") from None


async def nothing(_: torch.Tensor) -> None:
    """Ignore an image that only had to be decoded."""


def _rolled_back(one: Served, to: int, since: int | None) -> changes.Changed:
    kept = [row["version"] for row in one.place.history().to_pylist()]
    if since is not None and kept[-1] != since:
        raise Problem(409, f"the index has changed: it is at version {kept[-1]}, not {since}; reload it and try again")
    if to not in kept:
        raise Problem(404, f"index {one.name!r} has no version {to}; its versions are {', '.join(map(str, kept))}")
    return changes.rollback(one.folder, to)


def judged(one: Served) -> schemas.Judgement:
    """Return the accuracy that the last fit of an index estimated."""
    fit = one.now.cache.provenance.get("fit", {})
    return schemas.Judgement(fit.get("photos"), fit.get("words"), fit.get("both"), fit.get("summary"))


def backbone_of(version: Version) -> Backbone:
    """Return the encoder of a version. Raises Problem 422 if this server does not have it."""
    if version.backbone is None:
        raise Problem(422, f"index {version.name!r} only accepts features: this server does not have its encoder")
    return version.backbone


def _unit(raw: FloatArray) -> FloatArray | InputError:
    try:
        row: FloatArray = unit(raw[None])[0]
        return row
    except InputError as error:
        return error


def of_spelling(name: str, alike: Mapping[str, str]) -> list[str]:
    """Return a warning for each new class that is spelled almost like another."""
    route = f"POST /v1/indexes/{quote(name, safe='')}/rename"
    return [
        f"{new!r} is spelled almost like {known!r}; to merge them: {route} {json_line({'of': new, 'label': known})}"
        for new, known in alike.items()
    ]
