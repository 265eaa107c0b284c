"""Run a labelling session: answer requests, save the labels, and choose the next photos in the background.

The state is a :class:`labelling.session.Session`, which changes in the event loop, and only in ``Labelling._apply``.
Threads compute results from values that do not change.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.remote import absolute
from retrieval_tip.data.sources import Source, is_there
from retrieval_tip.errors import InputError, RetrievalTipError, StoreError
from retrieval_tip.index import changes, places
from retrieval_tip.index.changes import PhotoLabel
from retrieval_tip.labelling.bursts import visits_of
from retrieval_tip.labelling.dropped import dropped_in, keep
from retrieval_tip.labelling.journal import Journal
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
from retrieval_tip.labelling.progress import SCREEN, Estimate, estimate_rest, gain_of
from retrieval_tip.labelling.queue import QUEUED, Queue
from retrieval_tip.labelling.review import Review, answers_to
from retrieval_tip.labelling.session import (
    Change,
    Dropped,
    Event,
    Facts,
    Noticed,
    Session,
    Suggested,
    Written,
)
from retrieval_tip.model import Index
from retrieval_tip.server import schemas
from retrieval_tip.server.joining import Joining
from retrieval_tip.server.problems import Problem, reason_of
from retrieval_tip.server.schemas import Row
from retrieval_tip.server.served import OpenVersion, Served
from retrieval_tip.server.service import Service
from retrieval_tip.wording import counted, show

log = logging.getLogger(__name__)

BATCH, WAIT = 5, 3.0
"""Number of labels to save at once, and seconds to wait for them. Each batch is a version of the index."""
DRAWN, MORE = 9, 20
"""Minimum number of random photos for an estimate, and number of further labels whose gain is estimated."""
CONSIDERED = 1 << 13
"""Number of photos that are considered for the queue. If there are more, they are drawn at random every time."""
CHUNK = 32
"""Number of photos to encode at a time."""
RETRY = 5.0
"""Seconds after which labels that could not be saved are saved again."""
POLL = 1.0
"""Seconds after which versions that others wrote are noticed."""
TOGETHER = 999
"""Maximum number of photos to label together with another one, which is one change (see :class:`schemas.SetLabels`)."""
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
        self.name = self._store.name
        self._journal = Journal(self._store)
        self.dropped = self._journal.dropped
        kept = dropped_in(self.dropped)
        self._free = count(max(kept, default=MOST_PHOTOS - 1) + 1)
        own = {number: path for number, path in kept.items() if path}
        seen = set(own.values())
        own |= enumerate(path for path in paths if absolute(path) not in seen)
        self.photos = SessionPhotos(own, reader)
        unsaved = {}
        for photo, entry in enumerate(self._journal.entries.values(), EARLIER):
            self.photos.add(photo, str(entry["path"]), entry["digest"])
            unsaved[photo] = Label(entry["label"], picked_of(entry["picked"]))
        queue = Queue([*own])
        self.session = Session(self.photos, queue, list(classes), unsaved)
        self._unread = asyncio.Queue[Sequence[int]]()
        for start in range(0, len(own), CHUNK):
            self._unread.put_nowait(queue.order[start : start + CHUNK])
        self._in_turn = asyncio.Lock()
        self.saving = asyncio.Lock()
        self.reading = asyncio.Lock()
        self.joining = Joining(self)
        self._visits: dict[int, tuple[int, list[int]]] = {}
        self._visited = 0  # number of photos that had been read when these were found
        self._made: set[str] = set()  # classes that this session has created
        self._last: places.Changed | None = None
        self._chosen: tuple[Index | None, int] = (None, 0)  # and the number of encoded photos
        self._deciding = asyncio.Lock()
        self._progress: Progress | None = None
        self._problem: str | None = None
        self._trouble: str | None = None
        self._closing = False
        self._changed = asyncio.Event()  # the next change of the state

    @asynccontextmanager
    async def running(self, service: Service) -> AsyncIterator[None]:
        """Encode photos and choose the next ones in the background. On exit, labels are saved if possible."""
        self.service = service
        self.encoding = service.pool("read")
        self.thinking = service.pool("think")
        saving = asyncio.create_task(self._save())
        steps = (self._encode, self._think, self.joining.run)
        others = [asyncio.create_task(self._work(step)) for step in steps]
        try:
            yield
        finally:
            self._closing = True
            self._look(())
            await saving
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self._journal.close(self.session.entries(self.session.unsaved))

    def check_saved(self) -> None:
        """Raise StoreError if the session has ended and some labels could not be saved."""
        unsaved = self.session.unsaved
        if unsaved:
            refusals = [label.refusal for label in unsaved.values()]
            reasons = [*refusals, self._trouble, self._problem, "the session has ended"]
            some = next(filter(None, reasons))
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
        photos = self.photos
        labels = session.labels()
        taken = labels.keys() | photos.unreadable.keys()
        readable = len(photos) - photos.number(photos.unreadable)
        encoded = photos.number(photos.encoded)
        labelled = photos.number(labels)
        queue = list[Row]()
        for queued in session.queue.show(taken):
            guessed, alike = session.facts.get(queued.photo, ([], []))
            visit, together = self._visits.get(queued.photo, (None, alike))
            beside = (photo for photo in together if photo != queued.photo)
            similar = [photo for photo in islice(beside, TOGETHER) if photo not in taken]
            facts = {"guesses": guessed, "similar": similar, "visit": visit}
            queue.append(vars(queued) | {"name": photos.name(queued.photo)} | facts)
        refused: list[Row] = [
            {
                "photo": photo,
                "name": photos.name(photo),
                "label": label.label,
                "reason": label.refusal,
            }
            for photo, label in session.unsaved.items()
            if label.refusal is not None
        ]
        steps: list[Row] = [
            {
                "step": name,
                "photos": [*step.after] or [queued.photo for queued in step.queued],
                "labels": [label.label for label in step.after.values()],
            }
            for name, step in session.steps.items()
        ]
        guessed_right = [step.right for step in session.steps.values() if step.right is not None]
        progress = self._progress
        others = "" if progress is None else progress.estimate.of_others(readable - labelled)
        problem = self._problem or self._trouble
        if not readable:
            problem = problem or "none of the photos can be read"
        return {
            "index": self.name,
            "version": None if version is None else version.manifest.version,
            "photos": readable,
            "encoded": encoded,
            "labelled": labelled,
            "unsaved": len(session.unsaved),
            "classes": session.class_counts(),
            "queue": queue,
            "steps": steps,
            "guessed": guessed_right[-LAST:],
            "refused": refused,
            "progress": progress,
            "others": others,
            "busy": (self.works or self.joining.works) and self._problem is None,
            "problem": problem,
            "encoder": self.joining.status(),
        }

    @property
    def works(self) -> bool:
        """Whether photos are being read, labels are being saved, or the next photos are being chosen."""
        photos = self.photos
        readable = len(photos) - photos.number(photos.unreadable)
        decides = self._choice_due() or self._deciding.locked()
        reads = photos.number(photos.encoded) < readable
        return reads or decides or bool(self.session.waiting())

    async def visits(self) -> Mapping[int, tuple[int, list[int]]]:
        """Return the visits of the photos that have been read (see :func:`bursts.visits_of`)."""
        read = len(self.photos.encoded)
        if read != self._visited:
            self._visits = await asyncio.to_thread(visits_of, *self.photos.seen())
            self._visited = read
        return self._visits

    async def answers(self, version: OpenVersion) -> Review:
        """Return the answers to the photos that have been read, which are computed once per version.

        While answers are computed, these are returned, even if they are those of an earlier version or of fewer photos.
        """
        read = self.photos.own(self.photos.encoded)
        limits = self.service.limits
        smooth = (
            version.index.n <= limits.estimated
        )  # otherwise, holding out photos would take too long
        call = partial(answers_to, version.index, self.photos, read, smooth, limits.grouped)
        return await self.service.once(version, "answers", call, at=len(read))

    async def label(self, change: schemas.SetLabels) -> None:
        """Set or remove labels, skip photos, or undo a step. The labels are saved in the index in the background.

        Raises Problem 404 if there is no such photo, and StoreError if the labels cannot be written to the journal. In
        both cases, nothing changes.
        """
        labels = [(one.photo, one.label) for one in change.labels]
        for photo in (*dict(labels), *change.skip):
            self.path(photo)
        async with self._in_turn:
            # copies of a photo have the same label, so their digests must be known
            unknown = dict(labels).keys() - self.photos.digests.keys()
            if unknown:
                digests = await asyncio.to_thread(self.photos.hashed, unknown)
                for photo, digest in digests.items():
                    self.photos.recognise(photo, digest)
                self._look(digests)
            self._apply(Change(labels, change.skip, change.step, change.undo, change.reviewed))

    async def add(self, photos: Iterable[tuple[str, bytes]]) -> list[int]:
        """Keep photos that were dropped on the page in the folder of this session, and return their numbers.

        A photo that this session already has keeps its number. Raises StoreError if a photo cannot be written.
        """
        numbers = []
        async with self._in_turn:
            for name, data in photos:
                digest = hashlib.sha256(data).hexdigest()
                copies = self.photos.own(self.photos.same.get(digest, ()))
                number = next((copy for copy in copies if is_there(self.path(copy))), None)
                if number is None:
                    number = next(self._free)
                    try:
                        self._journal.hold()
                        path = await asyncio.to_thread(keep, self.dropped, number, name, data)
                    except OSError as error:
                        raise StoreError(
                            f"{show(self.dropped)}: cannot be written: {error.strerror}; the photo is not kept"
                        ) from None
                    self.photos.add(number, path, digest)
                    self._apply(Dropped(number))
                    self._unread.put_nowait([number])
                numbers.append(number)
        self._look(numbers)
        return numbers

    def _apply(self, event: Event) -> None:
        """Change the state. If the journal cannot be written, raise StoreError and keep the state."""
        session, effects = self.session.apply(event)
        if effects.journal:
            self._journal.add(effects.journal)
        self.session = session
        if effects.saved:
            self._journal.saved(effects.saved, all_saved=not session.unsaved)
        self._changed.set()  # there may be something to save or to choose
        self._changed = asyncio.Event()

    def version(self) -> OpenVersion | None:
        """Return the open version of the index, if it exists, and note which photos it contains."""
        served = self.service.served.get(self.name)
        version = None if served is None else served.now
        index = None if version is None else version.index
        if index is not self.session.index:
            self._apply(Noticed(index))
        return version

    def _look(self, photos: Collection[int]) -> None:
        """Note which of some photos the index contains, and try again to save labels that it refused before."""
        self._apply(Noticed(self.session.index, photos))

    async def _save(self) -> None:
        """Save labels in batches. If the index cannot be written, try again until the session ends."""
        while self.session.waiting() or not self._closing:
            if not self.session.waiting():
                await self._changed.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    while len(self.session.waiting()) < BATCH and not self._closing:
                        await self._changed.wait()
            closing = self._closing
            try:
                await self._write(self.session.waiting())
                self._trouble = None
            except Exception as error:  # the labels stay in the journal
                self._trouble = reason_of(error, "labels could not be saved")
                if closing:  # there may be room again since an attempt that began earlier
                    return
                await asyncio.sleep(0 if self._closing else RETRY)

    async def _write(self, labels: Mapping[int, Label]) -> None:
        """Save labels as one new version. If the index refuses a label, save the others and keep this one."""
        try:
            await self._commit(labels)
        except StoreError:
            raise
        except RetrievalTipError as error:
            photos = list(labels)
            if len(photos) > 1:
                middle = len(photos) // 2
                for half in (photos[:middle], photos[middle:]):
                    await self._write({photo: labels[photo] for photo in half})
            else:
                self._apply(Written(labels, str(error)))

    async def _commit(self, labels: Mapping[int, Label]) -> None:
        """Save labels as one new version. Raises InputError if a photo can neither be read nor is in the index."""
        async with self.saving:
            await self._read(labels, strict=False)
            await self._commit_read(labels)

    async def _commit_read(self, labels: Mapping[int, Label]) -> None:
        service = self.service
        assert service.maker is not None
        served = partial(Served, self.place, service.maker.backbones)
        if self.version() is None and self._store.exists():  # another process has just built it
            await service.open(served)
        version = self.version()
        reader = self.photos.reader_for(self.session.index)
        classes = self.session.classes
        items = [
            item
            for photo, label in labels.items()
            if (item := self._item(photo, label)) is not None
        ]
        first = [item for item in items if item.label is not None]
        if items and version is not None:
            wanted = {label.label for label in self.session.unsaved.values()}
            unwanted = self._made - {*classes, *wanted}
            self._last = await service.changed(
                service.served[self.name], changes.label, items, reader, unwanted, self._last
            )
            self._made.update(self._last.classes)
        elif first:
            opened = await service.open(
                lambda: served(build_from_labels(self.place, first, reader, classes))
            )
            self._made.update(opened.now.index.class_names)
        self.version()
        self._apply(Written(labels))

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
        return PhotoLabel(
            path, digest, label.label, label.picked, self.photos.feature(copy, self.session.index)
        )

    async def _work(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step of the background work. If it fails, keep the error for the page."""
        try:
            await step()
        except Exception as error:
            self._problem = reason_of(error, "the background work of labelling has stopped")

    async def _encode(self) -> None:
        while True:
            await self._read(await self._unread.get(), strict=self.photos.reader.strict)

    async def _read(self, photos: Iterable[int], *, strict: bool) -> None:
        async with self.reading:  # else a photo could be read twice
            photos = [photo for photo in photos if photo not in self.photos.encoded]
            if not photos:
                return
            read = await self.service.run(self.encoding, self.photos.read, photos, strict)
            self.photos.note(photos, read)
        if read:
            self._look(photos)

    async def _think(self) -> None:
        """Choose the next photos, and estimate the accuracy, whenever there is a new version or enough new photos."""
        while True:
            self.version()
            if self._choice_due():
                async with self._deciding:
                    await self._choose()
                    if not self._choice_due():  # else there is something new to choose first
                        await self._measure()
            else:
                await self.pause()

    async def pause(self) -> None:
        """Wait for a change of the state, but not long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL):
                await self._changed.wait()

    def _choice_due(self) -> bool:
        """Return whether there is a new version, twice as many photos as at the last choice, or all photos."""
        index, before = self._chosen
        encoded = len(self.photos.encoded)
        all_read = encoded == len(self.photos.paths) - len(self.photos.unreadable)
        grown = encoded >= 2 * before or (encoded > before and all_read)
        return bool(encoded) and (index is not self.session.index or grown)

    async def _choose(self) -> None:
        index = self.session.index
        encoded = len(self.photos.encoded)
        unlabelled = self.photos.encoded.keys() - self.session.taken()
        if unlabelled:
            run = partial(self.service.run, self.thinking)
            rows = sorted(unlabelled)
            drawn = np.random.default_rng(len(rows)).permutation(rows)[:CONSIDERED]
            some = sorted(drawn.tolist())
            features = await run(self.photos.rows, some, index)
            picks = await run(_suggested, some, features, self.photos.clips, index)
            ahead, _ = self.session.apply(Suggested(picks, {}))
            shown = [queued.photo for queued in ahead.shown() if queued.photo in unlabelled]
            features = await run(self.photos.rows, rows, index)
            facts = await run(_facts_of, shown, rows, features, index)
            self._apply(Suggested(picks, facts))
        await self.visits()
        self._chosen = index, encoded

    async def _measure(self) -> None:
        index = self.session.index
        picked = {
            known.key_id: known.picked
            for known in self.session.known.values()
            if known.picked not in (None, "similar")
        }
        drawn = sum(how == "random" for how in picked.values())
        rest = sorted(self.photos.encoded.keys() - self.session.taken())
        progress = None
        if (
            index is not None
            and drawn >= DRAWN
            and rest
            and index.n <= self.service.limits.estimated
        ):
            run = partial(self.service.run, self.thinking)
            features = await run(self.photos.rows, rest, index)
            progress = await run(_measured_on, features, index, list(picked))
        self._progress = progress


@dataclass(frozen=True)
class Progress:
    """What a person may do next, as :func:`routes.label_status` describes it."""

    estimate: Estimate
    more: int
    gain: float | None
    review: bool


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


def _suggested(
    rows: Sequence[int], features: FloatArray, clips: Mapping[int, str], index: Index | None
) -> list[tuple[int, str]]:
    pool = Pool([str(row) for row in rows], features, [], [clips.get(row, "") for row in rows])
    table = suggest_features(pool, QUEUED, index).table
    return [(int(row["input"]), row["why"]) for row in table.select(["input", "why"]).to_pylist()]


def _facts_of(
    shown: Sequence[int], rows: Sequence[int], features: FloatArray, index: Index | None
) -> Facts:
    """Return the guesses for each photo that is shown, and the photos among ``rows`` that resemble it."""
    places = np.searchsorted(rows, shown).tolist()
    guessed = list[dict[str, Any]]()
    if index is not None:
        answers = index.classify(features[places], "keep", **vars(ASK))
        guessed = guesses(answers, none=False)
    facts: dict[int, tuple[list[dict[str, Any]], list[int]]] = {}
    for place, (photo, near) in enumerate(zip(shown, alike(features, places), strict=True)):
        best = guessed[place]["guesses"] if guessed else []
        facts[photo] = best, [rows[row] for row in near]
    return facts


def _measured_on(rest: FloatArray, index: Index, key_ids: Sequence[int]) -> Progress:
    index = index.in_memory()
    more = min(MORE, len(rest))
    found = estimate_rest(index, key_ids, rest)
    gain = gain_of(index, rest, found, more)
    return Progress(found, more, gain, found.first_actions < min(SCREEN, len(rest)))
