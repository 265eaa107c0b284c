"""A labelling session: it shows which photo to label next, saves the labels, and works in the background.

All state changes in the event loop. Threads compute results from values that do not change.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shlex
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.bounds import check_memory
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source, of_images
from retrieval_tip.errors import InputError, RetrievalTipError, counted
from retrieval_tip.index import changes, places
from retrieval_tip.labelling.labels import NONE, Label, LabelledPhoto, alike, guesses, known_photos, save_labels
from retrieval_tip.labelling.photos import MOST_PHOTOS, Pool, suggest_features
from retrieval_tip.labelling.progress import estimate_rest, gain_of
from retrieval_tip.labelling.queue import QUEUED, Picked, Queue, Queued
from retrieval_tip.labelling.sort import sort_photos
from retrieval_tip.server import schemas
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.served import Version
from retrieval_tip.server.service import Service

log = logging.getLogger(__name__)

BATCH, WAIT = 5, 3.0
"""Number of labels to save at once, and seconds to wait for them. Each batch is a version of the index."""
DRAWN, MORE = 20, 20
"""Minimum number of random photos for an estimate, and number of further labels whose gain is estimated."""
CHUNK = 32
"""Number of photos to encode at a time."""
RETRY = 5.0
"""Seconds after which labels that could not be saved are saved again."""
POLL = 1.0
"""Seconds after which versions that others wrote are noticed."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Saved:
    """The labels that were saved last, and the versions before and after."""

    labels: Mapping[int, Label]
    before: int
    after: int


class Labelling:
    """A labelling session, which saves labels in the index at ``place`` while it is ``running``.

    Photos whose path is in the index are labelled already, so a session can be continued at any time.
    """

    def __init__(
        self, place: places.Place, sources: Sequence[Source], encoder: Encoder, classes: Sequence[str] = ()
    ) -> None:
        """Prepare a session. ``classes`` are the names of classes that have no labels yet.

        If there are more than ``MOST_PHOTOS`` photos, a random sample is used. Raises InputError if a source has
        features instead of photos.
        """
        for source in sources:
            if source.paths is None:
                raise InputError(f"{source.name}: has features, but labelling needs photos; give a folder of photos")
        paths = list(dict.fromkeys(path for source in sources for path in source.paths or ()))
        if len(paths) > MOST_PHOTOS:
            log.warning("using %s photos, which were drawn at random from %s", f"{MOST_PHOTOS:,}", f"{len(paths):,}")
            paths = [paths[row] for row in np.random.default_rng(0).permutation(len(paths))[:MOST_PHOTOS]]
        self.place, self.name = place, places.at(place).name
        self.encoder = replace(encoder, progress=False, done=Counter())
        self.photos = of_images(paths, "photos")
        self._names, self._classes = self.photos.sources, list(classes)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._queue = Queue(len(paths))
        self._features: FloatArray | None = None  # [photos, d]
        self._encoded: set[int] = set()
        self._unreadable: set[int] = set()
        self._seen: Version | None = None
        self._known: dict[int, LabelledPhoto] = {}
        self._withdrawn: set[int] = set()
        self._unsaved: dict[int, Label | None] = {}  # None removes a label
        self._last: _Saved | None = None
        self._facts: dict[int, tuple[dict[str, float], list[int]]] = {}
        self._chosen: tuple[Version | None, int] = (None, 0)
        self._measured_at: Version | None = None
        self._progress: schemas.LabelProgress | None = None
        self._problem: str | None = None
        self._trouble: str | None = None
        self._closing = False
        self._wake, self._due = asyncio.Event(), asyncio.Event()

    @asynccontextmanager
    async def running(self, service: Service) -> AsyncIterator[None]:
        """Encode photos and choose the next ones in the background. On exit, all labels have been saved."""
        self._service = service
        self._encoding, self._thinking = (ThreadPoolExecutor(1, thread_name_prefix=f"label-{n}") for n in (0, 1))
        saving, *others = (asyncio.create_task(self._work(step)) for step in (self._save, self._encode, self._think))
        try:
            yield
        finally:
            self._closing = True
            self._due.set()
            await saving
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for pool in (self._encoding, self._thinking):
                pool.shutdown(cancel_futures=True)

    def path(self, photo: int) -> str:
        """Return the path of a photo. Raises Problem 404 if there is no such photo."""
        if not 0 <= photo < len(self._names):
            raise Problem(404, f"photo {photo}: not found; there are {len(self._names):,} photos")
        assert self.photos.paths is not None
        return self.photos.paths[photo]

    def status(self) -> schemas.LabellingStatus:
        """Return the state of the session and the next photos."""
        version, taken = self._version(), self._taken()
        counts = dict.fromkeys(self._classes, 0)
        if version is not None:
            own = zip(version.cache.class_names, version.cache.counts, strict=True)
            counts |= {name: number for name, number in own if number or version.cache.has_text}
        for label in self._unsaved.values():
            if label is not None:
                counts[label.label] = counts.get(label.label, 0) + 1
        shown = []
        for one in self._queue.show(taken):
            probable, others = self._facts.get(one.photo, ({}, []))
            similar = [photo for photo in others if photo not in taken]
            chances = [schemas.Guess(label, chance) for label, chance in probable.items() if label != NONE]
            shown.append(schemas.QueuedPhoto(one.photo, self._names[one.photo], one.picked, one.why, chances, similar))
        busy = self._choice_due() or version is not self._measured_at or bool(self._unsaved)
        return schemas.LabellingStatus(
            self.name, None if version is None else version.manifest.version,
            photos=len(self._names) - len(self._unreadable), encoded=len(self._encoded), labelled=len(self._labels()),
            unsaved=len(self._unsaved),
            classes=[schemas.LabelClass(name, number) for name, number in counts.items() if name != NONE],
            queue=shown, progress=self._progress, busy=busy and self._problem is None,
            problem=self._problem or self._trouble,
        )  # fmt: skip

    def label(self, change: schemas.SetLabels) -> None:
        """Set or remove labels, which are saved in the background. Raises Problem 404 if there is no such photo."""
        for photo in (*(one.photo for one in change.labels), *change.skip):
            self.path(photo)
        for photo in change.skip:
            self._queue.skip(photo)
        labels = self._labels()
        picked = {one.photo: one.picked for one in self._queue.show(self._taken())}
        for one in change.labels:
            if one.label is not None:
                self._unsaved[one.photo] = Label(one.label, picked.get(one.photo, "similar"))
            elif one.photo in labels:
                self._unsaved[one.photo] = None
                self._queue.put_first(Queued(one.photo, labels[one.photo]))
        self._due.set()

    async def sort(self, into: str) -> schemas.SortedPhotos:
        """Copy all photos into folders by class. Raises Problem 404 without an index, and InputError if this fails."""
        version = self._version()
        if version is None:
            raise Problem(404, "there are no labels yet; label some photos first")
        encoder, folder = replace(self.encoder, skipped=[]), Path(into).expanduser()
        done = await self._service.run(self._encoding, sort_photos, version.cache, [self.photos], encoder, folder)
        undo = shlex.join(["retrieval-tip", "sort", "--undo", "--into", str(folder.absolute())])
        skipped = [schemas.Unread(one.source, one.reason) for one in done.skipped]
        return schemas.SortedPhotos(str(done), undo, skipped)

    def _version(self) -> Version | None:
        """Return the open version of the index, if it exists, and note which photos it contains."""
        served = self._service.served.get(self.name)
        version = None if served is None else served.now
        if version is not self._seen:
            self._seen = version
            self._known = {} if version is None else known_photos(version.cache, self._numbers)
            self._withdrawn &= self._known.keys()
            self._wake.set()
        return version

    def _labels(self) -> dict[int, Picked]:
        """Return the labelled photos, and how each was chosen. Unsaved changes are included."""
        saved = {photo: known.picked or "suggested" for photo, known in self._known.items()}
        fresh = {photo: label.picked for photo, label in self._unsaved.items() if label is not None}
        removed = (self._withdrawn | self._unsaved.keys()) - fresh.keys()
        return {photo: picked for photo, picked in (saved | fresh).items() if photo not in removed}

    def _taken(self) -> set[int]:
        """Return the photos that cannot be shown, because they are labelled or unreadable."""
        return self._unreadable | self._labels().keys()

    async def _save(self) -> None:
        """Save labels in batches. If the index cannot be written, try again until the session ends."""
        while self._unsaved or not self._closing:
            if not self._unsaved:
                await self._changed()
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    while len(self._unsaved) < BATCH and not self._closing:
                        await self._changed()
            if not (labels := dict(self._unsaved)):
                continue
            try:
                await self._write(labels)
                self._trouble = None
            except RetrievalTipError as error:
                self._trouble = str(error)
                if not isinstance(error, InputError):
                    if self._closing:
                        log.error("%s not saved: %s", counted(len(labels), "label was", "labels were"), error)
                        return
                    await asyncio.sleep(RETRY)
                    continue
            skipped = {one.source for one in self.encoder.skipped}
            self._unreadable |= {photo for photo in labels if self._names[photo] in skipped}
            for photo, label in labels.items():
                if self._unsaved.get(photo) is label:
                    del self._unsaved[photo]

    async def _changed(self) -> None:
        """Wait for labels, or for the end of the session."""
        await self._due.wait()
        self._due.clear()

    async def _write(self, labels: Mapping[int, Label | None]) -> None:
        """Write labels as a new version.

        To undo some of the last labels, restore the version before them, which does not have the classes that they
        created. An index needs a key, so its only label is kept until another one replaces it.
        """
        version = self._version()
        before = base = 0 if version is None else version.manifest.version
        new = {photo: label for photo, label in labels.items() if label is not None}
        old = {photo: self._known[photo].key_id for photo in labels if photo in self._known}
        only = version is not None and len(old) == version.cache.n
        remove = partial(changes.remove, self.place, key_ids=list(old.values()))
        last, self._last = self._last, None
        if last is not None and last.after == before and old and old.keys() <= last.labels.keys():
            base = (await self._service.change(changes.rollback, self.place, last.before)).version
            new = {photo: label for photo, label in last.labels.items() if photo not in old} | new
            only = False
        elif old and not only:
            base = (await self._service.change(remove)).version
        if new:
            await self._service.change(save_labels, self.place, self.photos, self.encoder, new, self._classes)
        if new and only:
            await self._service.change(remove)
        if version is not None:
            await self._service.follow(self._service.served[self.name])
        elif new:
            await self._service.open(self.place)
        version = self._version()
        self._withdrawn = (self._withdrawn | old.keys()) & self._known.keys() - new.keys()
        if version is not None and new and base and not only:
            self._last = _Saved(new, base, version.manifest.version)

    async def _work(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step of the background work. If it fails, keep the error for the page."""
        try:
            await step()
        except Exception as error:
            self._problem = str(error)
            if not isinstance(error, RetrievalTipError):
                log.exception("the background work of labelling has stopped")

    async def _encode(self) -> None:
        for start in range(0, len(self._queue.order), CHUNK):
            photos = self._queue.order[start : start + CHUNK]
            read, features = await self._service.run(self._encoding, self._encoded_photos, photos)
            if read:
                if self._features is None:
                    shape = len(self._names), features.shape[1]
                    check_memory(16 * math.prod(shape), f"{shape[0]:,} photos", "label fewer photos")
                    self._features = np.zeros(shape, np.float32)
                self._features[read] = features
            self._encoded.update(read)
            self._unreadable.update(set(photos) - set(read))
            self._wake.set()

    def _encoded_photos(self, photos: Sequence[int]) -> tuple[list[int], FloatArray]:
        """Return the readable photos and their features."""
        blocks = list(replace(self.encoder, empty=True).blocks(self.photos.take(photos)))
        read = [photos[position] for block in blocks for position in block.positions]
        return read, np.concatenate([block.features for block in blocks]) if blocks else np.empty((0, 0), np.float32)

    async def _think(self) -> None:
        """Choose the next photos, and estimate the accuracy, whenever there is a new version or enough new photos."""
        while True:
            self._wake.clear()
            version = self._version()
            if self._choice_due():
                await self._choose(version)
            elif version is not None and version is not self._measured_at:
                await self._measure(version)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._wake.wait()

    def _choice_due(self) -> bool:
        """Return whether there is a new version, twice as many photos as at the last choice, or all photos."""
        version, encoded = self._chosen
        total = len(self._names) - len(self._unreadable)
        grown = len(self._encoded) >= 2 * encoded or len(self._encoded) == total > encoded
        return bool(self._encoded) and (version is not self._seen or grown)

    async def _choose(self, version: Version | None) -> None:
        index, encoded = None if version is None else version.cache, len(self._encoded)
        rows = sorted(self._encoded - self._taken())
        if rows:
            picks = await self._service.run(self._thinking, self._suggested, rows, index)
            queued = sum(picked != "similar" for picked in self._labels().values())
            self._queue.suggest(picks, self._taken(), queued)
            shown = [one.photo for one in self._queue.show(self._taken()) if one.photo in self._encoded]
            self._facts = await self._service.run(self._thinking, self._facts_of, shown, rows, index)
        self._chosen = version, encoded

    def _suggested(self, rows: Sequence[int], index: AnsweringIndex | None) -> list[tuple[int, str]]:
        assert self._features is not None
        pool = Pool([str(row) for row in rows], self._features[rows], [None] * len(rows))
        table = suggest_features(pool, QUEUED, index).table
        return [(int(row["input"]), row["why"]) for row in table.select(["input", "why"]).to_pylist()]

    def _facts_of(
        self, shown: Sequence[int], rows: Sequence[int], index: AnsweringIndex | None
    ) -> dict[int, tuple[dict[str, float], list[int]]]:
        """Return the guesses for each photo that is shown, and the photos among ``rows`` that resemble it."""
        assert self._features is not None
        places = {photo: place for place, photo in enumerate(rows)}
        shown = [photo for photo in shown if photo in places]
        near = alike(self._features[rows], [places[photo] for photo in shown])
        probable = [{}] * len(shown) if index is None else guesses(index, self._features[shown])
        similar = ([rows[place] for place in own] for own in near)
        return dict(zip(shown, zip(probable, similar, strict=True), strict=True))

    async def _measure(self, version: Version) -> None:
        """Estimate the accuracy on the unlabelled photos from the photos that were drawn at random."""
        known = [self._known[photo] for photo in self._known.keys() - self._withdrawn]
        drawn = [one.key_id for one in known if one.picked == "random"]
        self._progress = schemas.LabelProgress(len(drawn), DRAWN)
        rest = sorted(self._encoded - self._taken())
        if len(drawn) >= DRAWN and rest and version.cache.n <= self._service.limits.estimated:
            self._progress = await self._service.run(self._thinking, self._measured_on, rest, version.cache, drawn)
        self._measured_at = version

    def _measured_on(self, rest: Sequence[int], index: AnsweringIndex, drawn: Sequence[int]) -> schemas.LabelProgress:
        assert self._features is not None
        cache = index.in_memory()
        found = estimate_rest(cache, drawn, self._features[rest])
        more = min(MORE, len(rest))
        gain = gain_of(cache, drawn, found, more)
        gain = None if gain is None else min(gain, 1 - found.accuracy)
        return schemas.LabelProgress(len(drawn), DRAWN, found.accuracy, found.low, found.high, more, gain)
