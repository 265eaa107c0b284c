"""The state of a labelling session as a value. Events lead to the next state, without I/O and without waiting.

The labels of an event must be in the journal before the next state counts (see :class:`server.session.Labelling`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from retrieval_tip.labelling.journal import Entry
from retrieval_tip.labelling.labels import (
    NONE,
    Label,
    LabelledPhoto,
    SessionPhotos,
)
from retrieval_tip.labelling.queue import Queue, Queued
from retrieval_tip.model import Index

STEPS = 100
"""Maximum number of steps that can be undone."""

Facts = Mapping[int, tuple[list[dict[str, Any]], list[int]]]
"""The guesses for each photo that is shown, and the photos that resemble it."""


@dataclass(frozen=True)
class Change:
    """Event: a person set or removed labels, skipped photos, or undid a step.

    ``step`` names the change, so that it is not made twice and can be undone. ``reviewed`` tells that the photos were
    labelled because a person looked at their answers.
    """

    labels: Sequence[tuple[int, str | None]] = ()
    skip: Sequence[int] = ()
    step: str | None = None
    undo: str | None = None
    reviewed: bool = False


@dataclass(frozen=True)
class Noticed:
    """Event: there is another version of the index, or more is known of some ``photos``."""

    index: Index | None
    photos: Collection[int] | None = None


@dataclass(frozen=True)
class Dropped:
    """Event: a photo was dropped on the page."""

    photo: int


@dataclass(frozen=True)
class Suggested:
    """Event: photos were suggested, each with a reason, and the ``facts`` about the photos to show were computed."""

    picks: Iterable[tuple[int, str]]
    facts: Facts


@dataclass(frozen=True)
class Written:
    """Event: the index contains labels or, if there is a ``refusal``, has refused them."""

    labels: Mapping[int, Label]
    refusal: str | None = None


Event = Change | Noticed | Dropped | Suggested | Written


@dataclass(frozen=True)
class Effects:
    """What must be done because of an event.

    ``journal`` are labels to write to the journal before the next state counts. ``saved`` are labels that the journal
    no longer needs.
    """

    journal: Sequence[Entry] = ()
    saved: Sequence[Entry] = ()


@dataclass(frozen=True)
class Step:
    """What a step changed: the labels before and after it, and the photos that were in the queue.

    ``right`` tells whether the guess for a photo of the queue was right, if there was one.
    """

    before: Mapping[int, Label]
    after: Mapping[int, Label]
    queued: Sequence[Queued]
    right: bool | None


@dataclass(frozen=True)
class Session:
    """The state of a session.

    Attributes:
        photos: the facts about the files, which the session only reads. They are no part of the value, because copying
            the facts about 100,000 photos whenever some are read would stop the event loop.
        queue: the unlabelled photos in order.
        classes: names of classes without labels.
        unsaved: the labels that the index does not contain yet, by photo.
        steps: the steps that can be undone, by name, oldest first.
        index: the last version of the index that the session has seen.
        known: the labelled photos of the index that belong to this session.
        facts: the facts about the photos that are shown.
    """

    photos: SessionPhotos
    queue: Queue
    classes: Sequence[str] = ()
    unsaved: Mapping[int, Label] = field(default_factory=dict)
    steps: Mapping[str, Step] = field(default_factory=dict)
    index: Index | None = None
    known: Mapping[int, LabelledPhoto] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)

    def apply(self, event: Event) -> tuple[Session, Effects]:
        """Return the next state, and what must be done. This state does not change."""
        session = replace(self, queue=copy(self.queue))
        match event:
            case Change():
                return session._changed(event)
            case Noticed(index, photos):
                known = dict[int, LabelledPhoto]()
                if index is not None and photos is not None:
                    known |= {
                        photo: one for photo, one in self.known.items() if photo not in photos
                    }
                if index is not None:
                    known |= self.photos.known(index, photos)
                # labels that the index refused before are tried again
                unsaved = {
                    photo: replace(label, refusal=None) for photo, label in self.unsaved.items()
                }
                session = replace(session, index=index, known=known, unsaved=unsaved)
            case Dropped(photo):
                session.queue.add(photo)
            case Suggested(picks, facts):
                labels = self.labels().values()
                chosen = sum(label.picked in ("random", "suggested") for label in labels)
                session.queue.suggest(picks, self.taken(), chosen)
                session = replace(session, facts=facts)
            case Written(labels, refusal):
                # a label that has changed since is still to be saved
                same = dict(labels.items() & self.unsaved.items())
                if refusal is None:
                    rest = {
                        photo: label for photo, label in self.unsaved.items() if photo not in same
                    }
                    return replace(session, unsaved=rest), Effects(saved=self.entries(same))
                refused = {photo: replace(label, refusal=refusal) for photo, label in same.items()}
                session = replace(session, unsaved={**self.unsaved, **refused})
        return session, Effects()

    def labels(self) -> dict[int, Label]:
        """Return the labels of photos. Unsaved changes are included."""
        labels = {
            photo: Label(known.label, known.picked or "suggested")
            for photo, known in self.known.items()
        }
        for photo, label in self.unsaved.items():
            for twin in self.photos.copies(photo):
                if label.label is None:
                    labels.pop(twin, None)
                else:
                    labels[twin] = label
        return labels

    def taken(self) -> set[int]:
        """Return the photos that need not be shown: they have a label, or cannot be read."""
        return self.photos.unreadable.keys() | self.labels().keys()

    def shown(self) -> list[Queued]:
        """Return the next photos."""
        return self.queue.show(self.taken())

    def waiting(self) -> dict[int, Label]:
        """Return the unsaved labels that the index has not refused."""
        return {photo: label for photo, label in self.unsaved.items() if label.refusal is None}

    def entries(self, labels: Mapping[int, Label]) -> list[Entry]:
        """Return labels as lines of the journal."""
        return [
            {
                "path": self.photos.path(photo),
                "digest": self.photos.digests.get(photo),
                "label": label.label,
                "picked": label.picked,
            }
            for photo, label in labels.items()
        ]

    def class_counts(self) -> dict[str, int]:
        """Return the classes to choose from, with their numbers of photos. Unsaved changes are included."""
        counts = Counter(dict.fromkeys(self.classes, 0))
        offered = set(self.classes)
        if self.index is not None:
            names = self.index.class_names
            counts.update(dict(zip(names, self.index.counts, strict=True)))
            if self.index.has_text:
                offered.update(names)
        counts.subtract(self.known[photo].label for photo in self.unsaved if photo in self.known)
        counts.update(label.label for label in self.unsaved.values() if label.label is not None)
        del counts[NONE]
        return {name: number for name, number in counts.items() if number > 0 or name in offered}

    def _changed(self, change: Change) -> tuple[Session, Effects]:
        session = self
        labels: Mapping[int, Label] = {}
        if change.step is None or change.step not in self.steps:
            session, labels = self._labelled(change)
        steps = dict(session.steps)
        undone = None if change.undo is None else steps.pop(change.undo, None)
        if undone is not None:
            labels = {**labels, **undone.before}
            session = replace(session._with(undone.before), steps=steps)
            for queued in reversed(undone.queued):
                session.queue.put_first(queued)
        return session, Effects(journal=self.entries(labels))

    def _labelled(self, change: Change) -> tuple[Session, Mapping[int, Label]]:
        """Return the session after a change, and the labels that differ from those before."""
        labels = self.labels()
        shown = {queued.photo: queued for queued in self.shown()}
        asked = {} if change.reviewed else shown
        unasked = Queued(-1, "reviewed" if change.reviewed else "similar")
        last_copies = {
            self.photos.copies(photo)[0]: (photo, label) for photo, label in change.labels
        }
        wanted = dict(last_copies.values())
        before = dict[int, Label]()
        new = dict[int, Label]()
        gone = list[int]()
        for photo in change.skip:
            self.queue.skip(photo)
        for photo, label in wanted.items():
            old = labels.get(photo, Label(None, asked.get(photo, unasked).picked))
            if old.label is None and not change.reviewed:
                gone.append(photo)
            if old.label != label:
                before[photo] = replace(old, refusal=None)
                new[photo] = Label(label, old.picked)
                if label is None:
                    self.queue.put_first(Queued(photo, old.picked))
        session = self._with(new)
        if change.step is None:
            return session, new
        queued = [shown.get(photo, Queued(photo, "similar")) for photo in (*gone, *change.skip)]
        first = next((photo for photo in wanted if photo in asked), None)
        right = None if first is None else self._guess_right(first, wanted[first])
        steps = {**self.steps, change.step: Step(before, new, queued, right)}
        if len(steps) > STEPS:
            del steps[next(iter(steps))]
        return replace(session, steps=steps), new

    def _guess_right(self, photo: int, label: str | None) -> bool | None:
        guesses, _ = self.facts.get(photo, ([], []))
        return guesses[0]["label"] == label if guesses else None

    def _with(self, labels: Mapping[int, Label]) -> Session:
        """Return the session with unsaved labels, which replace those of all copies of their photos."""
        unsaved = dict(self.unsaved)
        for photo, label in labels.items():
            for twin in self.photos.copies(photo):
                unsaved.pop(twin, None)
            unsaved[photo] = label
        return replace(self, unsaved=unsaved)
