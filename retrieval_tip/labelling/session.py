"""The state of a labelling session as a value. Events lead to the next state, without I/O and without waiting.

The labels of an event must be in the journal before the next state counts (see :class:`server.session.Labelling`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from retrieval_tip.labelling.labels import (
    NONE,
    Label,
    LabelledPhoto,
    SessionPhotos,
    known_photos,
)
from retrieval_tip.labelling.queue import Queue, Queued
from retrieval_tip.model import Index

STEPS = 100
"""Maximum number of steps that can be undone."""

Facts = Mapping[int, tuple[list[dict[str, Any]] | None, list[int]]]
"""The guesses for each photo that is shown, if there is an index, and the photos that resemble it."""


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
    """Event: there is another version of the index, or more is known of the photos."""

    index: Index | None


@dataclass(frozen=True)
class Dropped:
    """Event: a photo was dropped on the page."""

    photo: int


@dataclass(frozen=True)
class Suggested:
    """Event: photos were suggested, each with a reason."""

    picks: Iterable[tuple[int, str]]


@dataclass(frozen=True)
class Guessed:
    """Event: the facts about the photos that are shown were computed."""

    facts: Facts


@dataclass(frozen=True)
class Saved:
    """Event: the index contains labels."""

    labels: Mapping[int, Label]


@dataclass(frozen=True)
class Refused:
    """Event: the index refused a label."""

    photo: int
    label: Label
    reason: str


Event = Change | Noticed | Dropped | Suggested | Guessed | Saved | Refused


@dataclass(frozen=True)
class Effects:
    """What must be done because of an event.

    ``journal`` are labels to write to the journal before the next state counts. ``saved`` are labels that the journal
    no longer needs. If ``wake`` is true, there may be something to save or to choose.
    """

    journal: Sequence[tuple[int, Label]] = ()
    saved: Mapping[int, Label] = field(default_factory=dict)
    wake: bool = False


@dataclass(frozen=True)
class Step:
    """What a step changed: the labels before and after it, and the photos that were in the queue.

    ``right`` tells whether the guess for a photo of the queue was right, if there was one.
    """

    before: Mapping[int, Label]
    after: Mapping[int, str | None]
    queued: Sequence[Queued]
    right: bool | None


@dataclass(frozen=True)
class Session:
    """The state of a session.

    Attributes:
        photos: the facts about the files, which the session only reads.
        queue: the unlabelled photos in order.
        classes: names of classes without labels.
        unsaved: the labels that the index does not contain yet, by photo.
        refused: the reasons why the index refused some of them, by photo.
        steps: the steps that can be undone, by name, oldest first.
        index: the index as it was last seen.
        known: the labelled photos of the index that belong to this session.
        facts: the facts about the photos that are shown.
    """

    photos: SessionPhotos
    queue: Queue
    classes: Sequence[str] = ()
    unsaved: Mapping[int, Label] = field(default_factory=dict)
    refused: Mapping[int, str] = field(default_factory=dict)
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
            case Noticed(index):
                known = dict[int, LabelledPhoto]()
                if index is not None:
                    known = known_photos(index, self.photos.unread, self.photos.same)
                # labels that the index refused before are tried again
                session = replace(session, index=index, known=known, refused={})
                return session, Effects(wake=True)
            case Dropped(photo):
                session.queue.add(photo)
            case Suggested(picks):
                chosen = sum(
                    label.picked in ("random", "suggested") for label in self.labels().values()
                )
                session.queue.suggest(picks, self.taken(), chosen)
            case Guessed(facts):
                session = replace(session, facts=facts)
            case Refused(photo, label, reason):
                if self.unsaved.get(photo) is label:
                    session = replace(session, refused={**self.refused, photo: reason})
            case Saved(labels):
                saved = {
                    photo: label
                    for photo, label in labels.items()
                    if self.unsaved.get(photo) is label  # else it has changed since
                }
                return session._without(saved), Effects(saved=saved)
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
        return {photo: label for photo, label in self.unsaved.items() if photo not in self.refused}

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
        journal = list[tuple[int, Label]]()
        if change.step is None or change.step not in self.steps:
            session, labels = self._labelled(change)
            journal += labels.items()
        steps = dict(session.steps)
        undone = None if change.undo is None else steps.pop(change.undo, None)
        if undone is not None:
            journal += undone.before.items()
            session = replace(session._with(undone.before), steps=steps)
            for queued in reversed(undone.queued):
                session.queue.put_first(queued)
        return session, Effects(journal)

    def _labelled(self, change: Change) -> tuple[Session, Mapping[int, Label]]:
        """Return the session after a change, and the labels that differ from those before."""
        labels = self.labels()
        shown = {queued.photo: queued for queued in self.shown()}
        asked = {} if change.reviewed else shown
        unlabelled = Queued(-1, "reviewed" if change.reviewed else "similar")
        last_copies = {
            self.photos.copies(photo)[0]: (photo, label) for photo, label in change.labels
        }
        wanted = dict(last_copies.values())
        before = {
            photo: labels.get(photo, Label(None, asked.get(photo, unlabelled).picked))
            for photo in wanted
        }
        changed = {photo: label for photo, label in wanted.items() if label != before[photo].label}
        new = {photo: Label(label, before[photo].picked) for photo, label in changed.items()}
        session = self._with(new)
        for photo in change.skip:
            self.queue.skip(photo)
        for photo, label in changed.items():
            if label is None:
                self.queue.put_first(Queued(photo, before[photo].picked))
        if change.step is None:
            return session, new
        gone = list(change.skip)
        if not change.reviewed:
            gone[:0] = [photo for photo, label in before.items() if label.label is None]
        queued = [shown.get(photo, Queued(photo, "similar")) for photo in gone]
        first = next((photo for photo in wanted if photo in asked), None)
        right = None if first is None else self._guess_right(first, wanted[first])
        replaced = {photo: before[photo] for photo in changed}
        steps = {**self.steps, change.step: Step(replaced, changed, queued, right)}
        if len(steps) > STEPS:
            del steps[next(iter(steps))]
        return replace(session, steps=steps), new

    def _guess_right(self, photo: int, label: str | None) -> bool | None:
        guesses, _ = self.facts.get(photo, (None, []))
        if guesses is None:
            return None
        return bool(guesses) and guesses[0]["label"] == label

    def _with(self, labels: Mapping[int, Label]) -> Session:
        """Return the session with unsaved labels, which replace those of all copies of their photos."""
        unsaved = dict(self.unsaved)
        refused = dict(self.refused)
        for photo, label in labels.items():
            for twin in self.photos.copies(photo):
                unsaved.pop(twin, None)
                refused.pop(twin, None)
            unsaved[photo] = label
        return replace(self, unsaved=unsaved, refused=refused)

    def _without(self, labels: Mapping[int, Label]) -> Session:
        unsaved = {photo: label for photo, label in self.unsaved.items() if photo not in labels}
        refused = {photo: reason for photo, reason in self.refused.items() if photo not in labels}
        return replace(self, unsaved=unsaved, refused=refused)
