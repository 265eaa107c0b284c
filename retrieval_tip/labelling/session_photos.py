"""The photos of a labelling session, and what is known about their files."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from retrieval_tip.bounds import check_memory
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import of_images
from retrieval_tip.errors import InputError, show
from retrieval_tip.labelling.labels import absolute

FloatArray = npt.NDArray[np.float32]

Read = Mapping[int, tuple[str, FloatArray]]
"""The digest and the feature ``[d]`` of each photo that was read, by number."""


class SessionPhotos:
    """Numbered photos. The first ``len`` of them are labelled in this session, the others were in an earlier one.

    Attributes:
        source: the photos.
        features: their features, of shape ``[photos, d]``, or ``None`` until a photo is encoded.
        encoded: the photos whose features are known.
        digests: the digests of the photos that have been read.
        same: the photos by digest.
        unread: the photos of this session that have not been read, by their absolute path as text.
        unreadable: the reasons why photos cannot be read.
    """

    def __init__(self, paths: Sequence[str], earlier: Sequence[str], reader: Reader) -> None:
        """Number the photos. ``earlier`` are the paths of photos that are not labelled in this session."""
        self.reader = replace(reader, progress=False, done=Counter())
        self.source = of_images([*paths, *earlier], "photos")
        self.names = self.source.sources
        self.features: FloatArray | None = None
        self.encoded: set[int] = set()
        self.digests: dict[int, str] = {}
        self.same: dict[str, list[int]] = {}
        self.unread = {show(absolute(path)): number for number, path in enumerate(paths)}
        self.unreadable: dict[int, str] = {}
        self._number = len(paths)

    def __len__(self) -> int:
        return self._number

    def number(self, photos: Iterable[int]) -> int:
        """Return how many of some photos are labelled in this session."""
        return sum(photo < len(self) for photo in photos)

    def path(self, photo: int) -> str:
        """Return the absolute path of a photo."""
        assert self.source.paths is not None
        return absolute(self.source.paths[photo])

    def copies(self, photo: int) -> Sequence[int]:
        """Return the photos that are known to have the same bytes as a photo, including the photo itself."""
        return self.same[self.digests[photo]] if photo in self.digests else [photo]

    def readable(self, photo: int) -> int:
        """Return a photo or, if it could not be encoded, a copy that could."""
        return next((copy for copy in self.copies(photo) if copy in self.encoded), photo)

    def feature(self, photo: int) -> FloatArray | None:
        """Return the feature of a photo, or ``None`` if it is not known."""
        return self.rows([photo])[0] if photo in self.encoded else None

    def rows(self, photos: Sequence[int]) -> FloatArray:
        """Return the features of encoded photos, of shape ``[m, d]``."""
        assert self.features is not None
        rows: FloatArray = self.features[photos]
        return rows

    def hashed(self, photos: Sequence[int]) -> dict[int, str]:
        """Return the digests of the photos whose files can be read. The object does not change."""
        digests = {}
        for photo in photos:
            with suppress(InputError):
                digests[photo] = hashlib.sha256(self.reader.read(self.path(photo))).hexdigest()
        return digests

    def read(self, photos: Sequence[int], strict: bool) -> Read:
        """Encode photos, and leave out unreadable ones. The object does not change."""
        reader = replace(self.reader, empty=True, strict=strict)
        return {
            photos[position]: (str(digest), feature)
            for block in reader.blocks(self.source.take(photos))
            for position, digest, feature in zip(block.positions, block.digests, block.features, strict=True)
        }

    def note(self, photos: Sequence[int], read: Read) -> None:
        """Note what was read of some photos. A photo of an earlier session must still have the same bytes."""
        known = {n: one for n, one in read.items() if n < len(self) or one[0] == self.digests.get(n)}
        for photo, (_, feature) in known.items():
            if self.features is None:
                shape = len(self.names), len(feature)
                check_memory(16 * math.prod(shape), f"{shape[0]:,} photos", "label fewer photos")
                self.features = np.zeros(shape, np.float32)
            self.features[photo] = feature
            self.encoded.add(photo)
            self.unreadable.pop(photo, None)
        self.recognise({photo: digest for photo, (digest, _) in known.items()})
        reasons = {one.source: one.reason for one in self.reader.skipped}
        for photo in [photo for photo in photos if photo not in known]:
            self.unreadable[photo] = reasons.get(self.names[photo], "has changed since it was labelled")

    def recognise(self, digests: Mapping[int, str]) -> None:
        """Note the digests of photos."""
        for photo, digest in digests.items():
            if (before := self.digests.get(photo)) != digest:
                if before is not None:  # the file has changed
                    self.same[before].remove(photo)
                self.digests[photo] = digest
                self.same.setdefault(digest, []).append(photo)
                self.unread.pop(show(self.path(photo)), None)
