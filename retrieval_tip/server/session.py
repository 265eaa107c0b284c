"""Run a labelling session: answer requests, save the labels, and choose the next photos in the background.

The state is a :class:`labelling.session.Session`, which changes in the event loop, and only in ``Labelling._apply``.
Threads compute results from values that do not change.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.remote import absolute
from retrieval_tip.data.sources import Source, is_there
from retrieval_tip.errors import InputError, RetrievalTipError, StoreError
from retrieval_tip.index import changes, places
from retrieval_tip.index.changes import PhotoLabel
from retrieval_tip.labelling.dropped import dropped_in, keep
from retrieval_tip.labelling.journal import Entry, Journal
from retrieval_tip.labelling.labels import (
    ASK,
    EARLIER,
    Label,
    SessionPhotos,
    alike,
    build_from_labels,
    guesses,
    picked_of,
)
from retrieval_tip.labelling.pool import MOST_PHOTOS, Pool, suggest_features
from retrieval_tip.labelling.progress import Estimate, estimate_rest, gain_of
from retrieval_tip.labelling.queue import QUEUED, Queue
from retrieval_tip.labelling.session import (
    Change,
    Dropped,
    Event,
    Facts,
    Guessed,
    Noticed,
    Refused,
    Saved,
    Session,
    Suggested,
)
from retrieval_tip.model import Index
from retrieval_tip.server import schemas
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.schemas import Row
from retrieval_tip.server.served import OpenVersion, Served
from retrieval_tip.server.service import Service
from retrieval_tip.wording import counted, show

log = logging.getLogger(__name__)

BATCH, WAIT = 5, 3.0
"""Number of labels to save at once, and seconds to wait for them. Each batch is a version of the index."""
DRAWN, MORE = 9, 20
"""Minimum number of random photos for an estimate, and number of further labels whose gain is estimated."""
REVIEWED = 11.5
"""Number of wrong answers on a screen below which reviewing takes fewer actions than labelling each of its 24 photos.

Correcting ``w`` answers and accepting the others takes ``1 + 2 w`` actions (benchmarks/person.py counts them).
"""
CHUNK = 32
"""Number of photos to encode at a time."""
RETRY = 5.0
"""Seconds after which labels that could not be saved are saved again."""
POLL = 1.0
"""Seconds after which versions that others wrote are noticed."""
LAST = 20
"""Number of photos whose guesses are counted as right or wrong."""


class Labelling:
    """A labelling session, which saves labels in the index at ``place`` while it is ``running``.

    Labels are written to a :class:`journal.Journal` before they are acknowledged. Photos that are in the index are
    labelled already, so a session can be continued at any time.
    """

    def __init__(
        self, place: places.Place, paths: Sequence[str], reader: Reader, classes: Sequence[str] = ()
    ) -> None:
        """Prepare a session for the photos of :func:`paths_of`. ``classes`` are names of classes without labels.

        Photos that were dropped on earlier sessions belong to this one. Labels that earlier sessions could not save are
        saved by this one. Their photos have the last numbers, and are not shown.

        Raises the errors of :class:`journal.Journal`.
        """
        self.place = place
        self._store = places.at(place)
        self.name, self._journal = self._store.name, Journal(self._store)
        self.dropped, kept = self._journal.dropped, dropped_in(self._journal.dropped)
        self._free = count(max(kept, default=MOST_PHOTOS - 1) + 1)
        own = {number: path for number, path in kept.items() if path}
        seen = set(own.values())
        own |= enumerate(path for path in paths if absolute(path) not in seen)
        unsaved = dict(enumerate(self._journal.entries.values(), EARLIER))
        self.photos = SessionPhotos(
            own | {photo: str(one["path"]) for photo, one in unsaved.items()}, reader
        )
        self.photos.recognise(
            {photo: digest for photo, one in unsaved.items() if (digest := one["digest"])}
        )
        queue = Queue([*own])
        labels = {
            photo: Label(one["label"], picked_of(one["picked"])) for photo, one in unsaved.items()
        }
        self.session = Session(self.photos, queue, list(classes), labels)
        self._unread = asyncio.Queue[Sequence[int]]()
        for start in range(0, len(own), CHUNK):
            self._unread.put_nowait(queue.order[start : start + CHUNK])
        self._in_turn = asyncio.Lock()
        self._seen: OpenVersion | None = None
        self._made: set[str] = set()  # classes that this session has created
        self._last: places.Changed | None = None
        self._chosen: tuple[OpenVersion | None, int] = (None, 0)
        self._measured: tuple[OpenVersion | None, int] = self._chosen
        self._progress: Row | None = None
        self._problem: str | None = None
        self._trouble: str | None = None
        self._closing = False
        self._wake = asyncio.Event()
        self._due = asyncio.Event()

    @asynccontextmanager
    async def running(self, service: Service) -> AsyncIterator[None]:
        """Encode photos and choose the next ones in the background. On exit, labels are saved if possible."""
        self.service = service
        self.encoding = service.pool("read")
        self._thinking = service.pool("think")
        saving = asyncio.create_task(self._save())
        others = [asyncio.create_task(self._work(step)) for step in (self._encode, self._think)]
        try:
            yield
        finally:
            self._closing = True
            self._look()
            await saving
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._journal.close(
                _entry(self.photos, photo, label) for photo, label in self.session.unsaved.items()
            )

    def check_saved(self) -> None:
        """Raise StoreError if the session has ended and some labels could not be saved."""
        unsaved = self.session.unsaved
        if unsaved:
            reasons = (*self.session.refused.values(), self._trouble, self._problem)
            some = next(filter(None, reasons), "the session has ended")
            raise StoreError(
                f"{show(self._journal.path)}: has {counted(len(unsaved), 'label')} that could not be saved "
                f"({some}); to save them, label these photos again with the same command"
            )

    def path(self, photo: int) -> str:
        """Return the absolute path of a photo. Raises Problem 404 if there is no such photo."""
        if photo not in self.photos.paths:
            raise Problem(404, f"photo {photo}: not found; this session has other photos")
        return self.photos.path(photo)

    def status(self) -> Row:
        """Return the state of the session and the next photos (see :func:`routes.label_status`)."""
        version = self.version()
        session = self.session
        taken = session.taken()
        own = self.photos.own
        shown = list[Row]()
        readable = len(self.photos) - len(own(self.photos.unreadable))
        labelled = len(own(session.labels()))
        found = (self._progress or {}).get("estimate")
        for one in session.queue.show(taken):
            guessed, others = session.facts.get(one.photo, (None, []))
            similar = [photo for photo in others if photo not in taken]
            more = {
                "name": self.photos.name(one.photo),
                "guesses": guessed or [],
                "similar": similar,
            }
            shown.append(vars(one) | more)
        unmeasured = version is not None and self._measured != self._chosen
        busy = self._choice_due() or unmeasured or session.waiting()
        refused: list[Row] = [
            {
                "photo": photo,
                "name": self.photos.name(photo),
                "label": session.unsaved[photo].label,
                "reason": reason,
            }
            for photo, reason in session.refused.items()
        ]
        steps: list[Row] = [
            {
                "step": name,
                "photos": [*one.after] or [x.photo for x in one.queued],
                "labels": [*one.after.values()],
            }
            for name, one in session.steps.items()
        ]
        right = [one.right for one in session.steps.values() if one.right is not None][-LAST:]
        return {
            "index": self.name,
            "version": None if version is None else version.manifest.version,
            "photos": readable,
            "encoded": len(own(self.photos.encoded)),
            "labelled": labelled,
            "unsaved": len(session.unsaved),
            "classes": session.class_counts(),
            "queue": shown,
            "steps": steps,
            "guessed": right,
            "refused": refused,
            "progress": self._progress,
            "others": found.of_others(readable - labelled) if isinstance(found, Estimate) else "",
            "busy": bool(busy) and self._problem is None,
            "problem": self._problem
            or self._trouble
            or (None if readable else "none of the photos can be read"),
        }

    async def label(self, change: schemas.SetLabels) -> None:
        """Set or remove labels, skip photos, or undo a step. The labels are saved in the index in the background.

        Raises Problem 404 if there is no such photo, and StoreError if the labels cannot be written to the journal. In
        both cases, nothing changes.
        """
        photos = [one.photo for one in change.labels]
        for photo in (*photos, *change.skip):
            self.path(photo)
        async with (
            self._in_turn
        ):  # copies of a photo have the same label, so their digests must be known
            unknown = [photo for photo in photos if photo not in self.photos.digests]
            if unknown:
                self.photos.recognise(await asyncio.to_thread(self.photos.hashed, unknown))
                self._look()
            labels = [(one.photo, one.label) for one in change.labels]
            self._apply(Change(labels, change.skip, change.step, change.undo, change.reviewed))

    async def add(self, photos: Iterable[tuple[str, bytes]]) -> list[int]:
        """Keep photos that were dropped on the page in the folder of this session, and return their numbers.

        A photo that this session already has keeps its number. Raises StoreError if a photo cannot be written.
        """
        numbers = []
        async with self._in_turn:
            for name, data in photos:
                digest = hashlib.sha256(data).hexdigest()
                same = self.photos.own(self.photos.same.get(digest, ()))
                number = next((one for one in same if is_there(self.path(one))), None)
                if number is None:
                    number = next(self._free)
                    try:
                        self._journal.hold()
                        path = await asyncio.to_thread(keep, self.dropped, number, name, data)
                    except OSError as error:
                        raise StoreError(
                            f"{show(self.dropped)}: cannot be written: {error.strerror}; the photo is not kept"
                        ) from None
                    self.photos.paths[number] = path
                    self.photos.recognise({number: digest})
                    self._apply(Dropped(number))
                    self._unread.put_nowait([number])
                numbers.append(number)
        self._look()
        return numbers

    def labels(self) -> dict[int, Label]:
        """Return the labels of photos. Unsaved changes are included."""
        return self.session.labels()

    def _apply(self, event: Event) -> None:
        """Change the state. If the journal cannot be written, raise StoreError and keep the state."""
        session, effects = self.session.apply(event)
        if effects.journal:
            self._journal.add(_entry(self.photos, *labelled) for labelled in effects.journal)
        self.session = session
        if effects.saved:
            self._journal.saved(
                [_entry(self.photos, *labelled) for labelled in effects.saved.items()],
                all_saved=not session.unsaved,
            )
        if effects.journal or effects.wake:
            self._due.set()
        if effects.wake:
            self._wake.set()

    def version(self) -> OpenVersion | None:
        """Return the open version of the index, if it exists, and note which photos it contains."""
        served = self.service.served.get(self.name)
        version = None if served is None else served.now
        if version is not self._seen:
            self._seen = version
            self._look()
        return version

    def _look(self) -> None:
        """Note which photos the index contains, and try again to save labels that it refused before."""
        self._apply(Noticed(None if self._seen is None else self._seen.index))

    async def _save(self) -> None:
        """Save labels in batches. If the index cannot be written, try again until the session ends."""
        while self.session.waiting() or not self._closing:
            if not self.session.waiting():
                await self._changed()
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    while len(self.session.waiting()) < BATCH and not self._closing:
                        await self._changed()
            closing = self._closing
            try:
                await self._write(self.session.waiting())
                self._trouble = None
            except Exception as error:  # the labels stay in the journal
                self._trouble = str(error)
                if not isinstance(error, RetrievalTipError):
                    log.exception("labels could not be saved")
                if closing:  # there may be room again since an attempt that began earlier
                    return
                await asyncio.sleep(0 if self._closing else RETRY)

    async def _changed(self) -> None:
        await self._due.wait()
        self._due.clear()

    async def _write(self, labels: Mapping[int, Label]) -> None:
        """Save labels as one new version. If the index refuses a label, save the others and keep this one."""
        try:
            await self._commit(labels)
        except StoreError:
            raise
        except RetrievalTipError as error:
            photos = list(labels)
            if len(photos) > 1:
                for half in (photos[: len(photos) // 2], photos[len(photos) // 2 :]):
                    await self._write({photo: labels[photo] for photo in half})
            else:
                self._apply(Refused(photos[0], labels[photos[0]], str(error)))

    async def _commit(self, labels: Mapping[int, Label]) -> None:
        """Save labels as one new version. Raises InputError if a photo can neither be read nor is in the index."""
        await self._read(labels, strict=False)
        service = self.service
        place = self.place
        reader = self.photos.reader
        assert service.maker is not None
        backbones = service.maker.backbones
        if self.version() is None and self._store.exists():  # another process has just built it
            await service.open(lambda: Served(place, backbones))
        version = self.version()
        items = [
            item
            for photo, label in labels.items()
            if (item := self._item(photo, label)) is not None
        ]
        first = [item for item in items if item.label is not None]
        if items and version is not None:
            unwanted = self._made - {
                *self.session.classes,
                *(label.label for label in self.session.unsaved.values()),
            }
            one = service.served[self.name]
            self._last = await service.changed(
                one, changes.label, items, reader, unwanted, self._last
            )
            self._made.update(self._last.classes)
        elif first:
            own = self.session.classes
            one = await service.open(
                lambda: Served(place, backbones, build_from_labels(place, first, reader, own))
            )
            self._made.update(one.now.index.class_names)
        self.version()
        self._apply(Saved(labels))

    def _item(self, photo: int, label: Label) -> PhotoLabel | None:
        """Return what the index needs to know. The result is ``None`` if it lacks a photo whose label is removed."""
        copy = self.photos.readable(photo)
        known = self.session.known.get(photo)
        if known is None and copy not in self.photos.encoded:
            if label.label is None:
                return None
            raise InputError(self.photos.unreadable[photo])
        digest = self.photos.digests.get(photo) or str(known and known.digest)
        path = show(self.photos.path(copy))
        return PhotoLabel(path, digest, label.label, label.picked, self.photos.features.get(copy))

    async def _work(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step of the background work. If it fails, keep the error for the page."""
        try:
            await step()
        except Exception as error:
            self._problem = str(error)
            if not isinstance(error, RetrievalTipError):
                log.exception("the background work of labelling has stopped")

    async def _encode(self) -> None:
        while True:
            await self._read(await self._unread.get(), strict=self.photos.reader.strict)

    async def _read(self, photos: Iterable[int], *, strict: bool) -> None:
        if photos := [photo for photo in photos if photo not in self.photos.encoded]:
            read = await self.service.run(self.encoding, self.photos.read, photos, strict)
            self.photos.note(photos, read)
            if read:
                self._look()

    async def _think(self) -> None:
        """Choose the next photos, and estimate the accuracy, whenever there is a new version or enough new photos."""
        while True:
            self._wake.clear()
            version = self.version()
            if self._choice_due():
                await self._choose(version)
            elif version is not None and self._measured != self._chosen:
                await self._measure(version)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._wake.wait()

    def _choice_due(self) -> bool:
        """Return whether there is a new version, twice as many photos as at the last choice, or all photos."""
        (version, before) = self._chosen
        encoded = len(self.photos.encoded)
        all_read = encoded == len(self.photos.paths) - len(self.photos.unreadable)
        grown = encoded >= 2 * before or (encoded > before and all_read)
        return bool(encoded) and (version is not self._seen or grown)

    async def _choose(self, version: OpenVersion | None) -> None:
        index = None if version is None else version.index
        encoded = len(self.photos.encoded)
        rows = sorted(self.photos.encoded - self.session.taken())
        if rows:
            picks = await self.service.run(self._thinking, _suggested, self.photos, rows, index)
            self._apply(Suggested(picks))
            shown = [
                queued.photo
                for queued in self.session.shown()
                if queued.photo in self.photos.encoded
            ]
            facts = await self.service.run(
                self._thinking, _facts_of, self.photos, shown, rows, index
            )
            self._apply(Guessed(facts))
        self._chosen = version, encoded

    async def _measure(self, version: OpenVersion) -> None:
        picked = {
            one.key_id: one.picked
            for one in self.session.known.values()
            if one.picked not in (None, "similar")
        }
        drawn = sum(how == "random" for how in picked.values())
        measured = self._chosen
        rest = sorted(self.photos.encoded - self.session.taken())
        progress = None
        if drawn >= DRAWN and rest and version.index.n <= self.service.limits.estimated:
            features = self.photos.rows(rest)
            progress = await self.service.run(
                self._thinking, _measured_on, features, version.index, list(picked)
            )
        self._progress = progress
        self._measured = measured


def paths_of(sources: Sequence[Source]) -> list[str]:
    """Return the paths of the photos to label. If there are more than ``MOST_PHOTOS``, a random sample is returned.

    Raises InputError if a source has features instead of photos.
    """
    for source in sources:
        if source.paths is None:
            raise InputError(
                f"{source.name}: has features, but labelling needs photos; give a folder of photos"
            )
    paths = list(dict.fromkeys(path for source in sources for path in source.paths or ()))
    if len(paths) > MOST_PHOTOS:
        log.warning(
            "using %s photos, which were drawn at random from %s",
            f"{MOST_PHOTOS:,}",
            f"{len(paths):,}",
        )
        paths = [
            paths[row] for row in np.random.default_rng(0).permutation(len(paths))[:MOST_PHOTOS]
        ]
    return paths


def _entry(photos: SessionPhotos, photo: int, label: Label) -> Entry:
    return {"path": photos.path(photo), "digest": photos.digests.get(photo), **vars(label)}


def _suggested(
    photos: SessionPhotos, rows: Sequence[int], index: Index | None
) -> list[tuple[int, str]]:
    pool = Pool([str(row) for row in rows], photos.rows(rows), [None] * len(rows))
    table = suggest_features(pool, QUEUED, index).table
    return [(int(row["input"]), row["why"]) for row in table.select(["input", "why"]).to_pylist()]


def _facts_of(
    photos: SessionPhotos, shown: Sequence[int], rows: Sequence[int], index: Index | None
) -> Facts:
    """Return the guesses for each photo that is shown, and the photos among ``rows`` that resemble it."""
    places = {photo: place for place, photo in enumerate(rows)}
    shown = [photo for photo in shown if photo in places]
    features = photos.rows(rows)
    own = [places[photo] for photo in shown]
    near = alike(features, own)
    found = (
        []
        if index is None
        else guesses(index.classify(features[own], "keep", **vars(ASK)), none=False)
    )
    probable = [one["guesses"] for one in found] or [None] * len(shown)
    similar = ([rows[place] for place in one] for one in near)
    return dict(zip(shown, zip(probable, similar, strict=True), strict=True))


def _measured_on(rest: FloatArray, index: Index, key_ids: Sequence[int]) -> Row:
    index = index.in_memory()
    more = min(MORE, len(rest))
    found = estimate_rest(index, key_ids, rest)
    gain = gain_of(index, rest, found, more)
    review = found.first_wrong < REVIEWED
    return {"estimate": found, "more": more, "gain": gain, "review": review}
