"""The photos of a labelling session: the known facts about their files, what the index knows, and their labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn.functional import normalize

from retrieval_tip.arrays import FloatArray, slices
from retrieval_tip.backbones.base import side_by_side
from retrieval_tip.data.exif import UNKNOWN, ExifRecorder
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.remote import absolute
from retrieval_tip.data.source import clip_of
from retrieval_tip.data.sources import Source, of_images, read_item
from retrieval_tip.errors import InputError
from retrieval_tip.index import places
from retrieval_tip.index.build import build_index
from retrieval_tip.index.changes import PhotoLabel
from retrieval_tip.labelling.queue import Picked
from retrieval_tip.labelling.suggest import BLOCK
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.predictions import Predictions
from retrieval_tip.settings import Ask
from retrieval_tip.store.labels import PICKED
from retrieval_tip.wording import show

EARLIER = 1 << 30
"""Number of the first photo of earlier sessions."""
NONE = "none of these"
"""Class of photos that belong to no other class."""
ALIKE, MOST_ALIKE = 0.8, 12
"""Lowest cosine of near-identical photos after subtracting the mean of all photos, and their maximum number."""
GUESSES = 3
"""Maximum number of guesses per photo."""
ASK = Ask(top=GUESSES + 1, neighbours=0, logits=False)
"""The question whose answers are guesses."""

Read = Mapping[int, tuple[str, FloatArray, datetime | None]]
"""The digest and the feature ``[d]`` of each photo that was read, and when it was taken, if known, by number."""


@dataclass(frozen=True)
class LabelledPhoto:
    """A labelled photo: its key in the index, its label, how it was chosen, if known, and the digest of its bytes."""

    key_id: int
    label: str
    picked: Picked | None
    digest: str | None


@dataclass(frozen=True)
class Label:
    """The label of a photo, and how the photo was chosen. A label of ``None`` removes the label of the photo.

    ``refusal`` is the reason why the index refused the label, if it did.
    """

    label: str | None
    picked: Picked
    refusal: str | None = None


def picked_of(text: str | None) -> Picked:
    """Return how a photo was chosen, given the text in a journal."""
    return next((picked for picked in get_args(Picked) if picked == text), "suggested")


@dataclass(frozen=True)
class Remembered(Reader):
    """A reader of one source whose features are ``known`` already. It reads no file."""

    known: tuple[FeatureBlock, ...] = ()

    def blocks(self, source: Source) -> Iterator[FeatureBlock]:
        """Return the blocks."""
        return iter(self.known)


class SessionPhotos:
    """Numbered photos. Those below ``EARLIER``, of which there are ``len``, are labelled in this session.

    The others were labelled in an earlier one.

    Attributes:
        paths: the paths of the photos, as they were given.
        clips: the files of the photos that are frames of videos.
        encoded: the photos that have been encoded, with the rows of their features.
        earlier: the photos that were labelled in an earlier session.
        digests: the digests of the photos that have been read.
        same: the photos by digest.
        times: when the photos were taken that have been read and have a date.
        unread: the photos of this session that have not been read, by their absolute path as text.
        unreadable: the reasons why photos cannot be read.
        joined: the reader of two encoders, if another one has been joined to the first.
        others: the features of the other encoder, by digest.
    """

    def __init__(self, paths: Mapping[int, str], reader: Reader) -> None:
        self.reader = replace(reader, progress=False, done=Counter())
        self.paths = dict(paths)
        files = {photo: clip_of(path) for photo, path in paths.items()}
        self.clips = {photo: file for photo, file in files.items() if file}
        self.encoded: dict[int, int] = {}
        self.earlier: list[int] = []
        self._rows = {photo: row for row, photo in enumerate(sorted(paths))}
        self._features: FloatArray = np.empty((0, 0), np.float32)
        self.digests: dict[int, str] = {}
        self.same: dict[str, list[int]] = {}
        self.times: dict[int, datetime] = {}
        self.unread = {show(absolute(path)): photo for photo, path in paths.items()}
        self.unreadable: dict[int, str] = {}
        self.joined: Reader | None = None
        self.others: dict[str, FloatArray] = {}

    def __len__(self) -> int:
        return self.number(self.paths)

    def number(self, photos: Collection[int]) -> int:
        """Return the number of those photos that are labelled in this session."""
        return len(photos) - sum(photo in photos for photo in self.earlier)

    @staticmethod
    def own(photos: Iterable[int]) -> list[int]:
        """Return those photos that are labelled in this session, in order."""
        return sorted(photo for photo in photos if photo < EARLIER)

    def path(self, photo: int) -> str:
        """Return the absolute path of a photo."""
        return absolute(self.paths[photo])

    def name(self, photo: int) -> str:
        """Return the path of a photo as text."""
        return show(self.paths[photo])

    def chosen(self, photos: Iterable[int]) -> Source:
        """Return some photos as a source."""
        return of_images([self.paths[photo] for photo in photos], "photos")

    def copies(self, photo: int) -> Sequence[int]:
        """Return the photos that are known to have the same bytes as a photo, including the photo itself."""
        return self.same[self.digests[photo]] if photo in self.digests else [photo]

    def readable(self, photo: int) -> int:
        """Return a photo or, if it could not be encoded, a copy that could."""
        return next((copy for copy in self.copies(photo) if copy in self.encoded), photo)

    def rows(self, photos: Sequence[int], index: Index | None) -> FloatArray:
        """Return the features of encoded photos for an index, of shape ``[m, d]``: of one encoder, or of both.

        Those of one encoder and of consecutive photos are not copied.
        """
        places = [self.encoded[photo] for photo in photos]
        rows: FloatArray
        if places and places == [*range(places[0], places[0] + len(places))]:
            rows = self._features[places[0] : places[0] + len(places)]
        else:
            rows = self._features[places]
        if not photos or not self._needs_both(index):
            return rows
        others = [self.others[self.digests[photo]] for photo in photos]
        return side_by_side([rows, np.concatenate(others).reshape(len(photos), -1)])

    def feature(self, photo: int, index: Index | None) -> FloatArray | None:
        """Return the feature ``[d]`` of a photo for an index, or ``None`` if it has not been encoded."""
        return self.rows([photo], index)[0] if photo in self.encoded else None

    def reader_for(self, index: Index | None) -> Reader:
        """Return the reader whose features an index has."""
        both = self.joined is not None and self._needs_both(index)
        return self.joined if both and self.joined is not None else self.reader

    def _needs_both(self, index: Index | None) -> bool:
        """Return whether an index was joined in this session. If that version is rolled back, it is no longer."""
        return index is not None and bool(self.others) and index.d > self._features.shape[1]

    def seen(self) -> tuple[dict[int, str], dict[int, datetime], dict[int, str]]:
        """Return copies of the paths, of the times, and of the files of encoded frames."""
        frames = self.clips.keys() & self.encoded.keys()
        return (
            dict(self.paths),
            dict(self.times),
            {photo: self.clips[photo] for photo in sorted(frames)},
        )

    def remembered(self, photos: Sequence[int], index: Index | None) -> Reader:
        """Return a reader of encoded photos for an index, which reads no file."""
        digests = [self.digests.get(photo) for photo in photos]
        return Remembered(known=(FeatureBlock.of(self.rows(photos, index), digests),))

    def hashed(self, photos: Iterable[int]) -> dict[int, str]:
        """Return the digests of the photos whose files can be read. The object does not change."""
        digests = {}
        for photo in photos:
            with suppress(InputError):
                digests[photo] = hashlib.sha256(read_item(self.path(photo))).hexdigest()
        return digests

    def read(self, photos: Sequence[int], strict: bool) -> Read:
        """Encode photos, and leave out those that are unreadable or have changed since they were labelled earlier.

        The object does not change.
        """
        reader = replace(self.joined or self.reader, empty=True, strict=strict)
        noting = ExifRecorder()
        [source] = noting.over([self.chosen(photos)])
        found = {}
        for block in reader.blocks(source):
            rows = zip(block.positions, block.digests, block.features, strict=True)
            for position, digest, feature in rows:
                photo = photos[position]
                if photo < EARLIER or digest == self.digests.get(photo):
                    taken = noting.taken.get(self.name(photo), UNKNOWN)
                    found[photo] = str(digest), feature, taken.taken_at
        return found

    def note(self, photos: Sequence[int], read: Read) -> None:
        """Store the features of the photos that were read, and note why the others are unreadable."""
        reasons = {skipped.source: skipped.reason for skipped in self.reader.skipped}
        for photo in photos:
            if photo not in read:
                reason = reasons.get(self.name(photo), "has changed since it was labelled")
                self.unreadable[photo] = reason
                continue
            digest, feature, time = read[photo]
            if time is not None:
                self.times[photo] = time
            if self.joined is not None:
                feature, other = np.split(feature * 2**0.5, [self._features.shape[1]])
                self.others[digest] = other
            self._store(photo, feature)
            self.unreadable.pop(photo, None)
            self.recognise(photo, digest)

    def _store(self, photo: int, feature: FloatArray) -> None:
        row = self._rows.setdefault(photo, len(self._rows))
        room = len(self._features)
        if row >= room:  # there is room for all photos, unless some were dropped later
            size = max(len(self._rows), 2 * room)
            # the features, and copies of them for the choice of photos and for the answers
            check_memory(16 * size * len(feature), f"{size:,} photos", "label fewer photos")
            larger = np.empty((size, len(feature)), np.float32)
            larger[:room] = self._features.reshape(-1, len(feature))
            self._features = larger
        self._features[row] = feature
        self.encoded[photo] = row

    def add(self, photo: int, path: str, digest: str | None) -> None:
        """Add a photo. Its digest is ``None`` if it could not be read."""
        self.paths[photo] = path
        if photo >= EARLIER:
            self.earlier.append(photo)
        if digest is not None:
            self.recognise(photo, digest)

    def recognise(self, photo: int, digest: str) -> None:
        """Note the digest of a photo."""
        before = self.digests.get(photo)
        if before == digest:
            return
        if before is not None:  # the file has changed
            self.same[before].remove(photo)
        self.digests[photo] = digest
        self.same.setdefault(digest, []).append(photo)
        self.unread.pop(show(self.path(photo)), None)

    def known(self, index: Index, photos: Collection[int] | None) -> dict[int, LabelledPhoto]:
        """Return those labelled photos of an index that are among some photos, or among all photos of the session."""
        if photos is None:
            return known_photos(index, self.unread, self.same)
        unread = {show(self.path(photo)): photo for photo in photos if photo not in self.digests}
        digests = [self.digests[photo] for photo in photos if photo in self.digests]
        return known_photos(index, unread, {digest: self.same[digest] for digest in digests})


def known_photos(
    index: Index, numbers: Mapping[str, int], digests: Mapping[str, Sequence[int]]
) -> dict[int, LabelledPhoto]:
    """Return the labelled photos by number.

    A photo that has been read is recognised by its digest, and any other photo by its path until it is read.
    ``digests`` maps the digests of the photos that have been read to their numbers. ``numbers`` maps the absolute paths
    of the other photos, as text, to their numbers.
    """
    columns = [
        name
        for name in ("key_id", "label", "digest", "source", PICKED)
        if name in index.labels.column_names
    ]
    labels = index.labels.select(columns)
    known = dict[int, LabelledPhoto]()
    paths = {path: [photo] for path, photo in numbers.items()}
    for column, photos in (("source", paths), ("digest", digests)):
        for row in labels.filter(
            pc.is_in(labels[column], value_set=pa.array(photos, pa.string()))
        ).to_pylist():
            one = LabelledPhoto(row["key_id"], row["label"], row.get(PICKED), row["digest"])
            known |= {photo: one for photo in photos[row[column]] if photo not in known}
    return known


def build_from_labels(
    place: places.Place, photos: Sequence[PhotoLabel], reader: Reader, classes: Sequence[str] = ()
) -> Index:
    """Build a new index from labelled photos that have features, and return it. No photo is read again.

    An index of an encoder with text also knows the names of ``classes``. Raises the errors of
    :func:`build.build_index`.
    """
    names = [str(photo.label) for photo in photos]
    has_text = reader.backbone is not None and reader.backbone.has_text
    own = dict.fromkeys([*(classes if has_text else ()), *names])
    source = of_images([photo.source for photo in photos], "photos", names, list(own))
    picked = pa.array([photo.picked for photo in photos], pa.string())
    features = np.stack([photo.feature for photo in photos if photo.feature is not None])
    block = FeatureBlock.of(features, [photo.digest for photo in photos])
    source = replace(source, items=source.items.append_column(PICKED, picked))
    return build_index(source, place, Remembered(**vars(reader), known=(block,)))


def alike(features: FloatArray, rows: Sequence[int]) -> list[list[int]]:
    """Return the rows of the photos that are near-identical to the photos at ``rows``, most similar first."""
    every = torch.from_numpy(features)
    mean = every.mean(0)
    points = normalize(every[rows] - mean)
    parts = (normalize(every[part] - mean) for part in slices(len(every), BLOCK))
    cosines = torch.cat([points @ part.T for part in parts], dim=1)
    cosines[range(len(rows)), rows] = -1
    found = cosines.topk(min(MOST_ALIKE, len(every)))
    return [
        near[own >= ALIKE].tolist() for near, own in zip(found.indices, found.values, strict=True)
    ]


def guesses(answers: Predictions, *, none: bool = True) -> list[dict[str, Any]]:
    """Return the ``guesses`` for each photo, most probable first, and ``no_match``.

    If ``none`` is false, the class ``NONE`` is left out, which has a key of its own while single photos are labelled.
    """
    found = []
    for row in answers.written(["labels", "probabilities", "no_match"]).to_pylist():
        pairs = [
            pair
            for pair in zip(row["labels"], row["probabilities"], strict=True)
            if none or pair[0] != NONE
        ]
        named = [
            {"label": label, "probability": probability} for label, probability in pairs[:GUESSES]
        ]
        found.append({"guesses": named, "no_match": bool(row["no_match"])})
    return found
