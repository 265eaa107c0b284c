"""Offer to join another encoder of this machine to the index of a labelling session, and join it if a person wants it.

Nothing is loaded before there are :data:`joining.LEAST` labels. One other encoder is in memory at a time. Photos are
encoded in small parts, between which photos that are needed sooner are read.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from retrieval_tip.arrays import FloatArray, slices
from retrieval_tip.backbones.catalogue import cached
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.data.reader import Reader
from retrieval_tip.errors import InputError
from retrieval_tip.index import changes
from retrieval_tip.index.joining import LOST, can_join
from retrieval_tip.labelling import joining
from retrieval_tip.labelling.joining import LEAST, Offer
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.server.problems import Problem, reason_of
from retrieval_tip.server.schemas import Row
from retrieval_tip.wording import first_line

if TYPE_CHECKING:
    from retrieval_tip.server.session import Labelling

log = logging.getLogger(__name__)

PART = 8
"""Number of photos to encode at a time."""


class Joining:
    """The offer to join an encoder to the index of a session.

    It is made at most until a person declines it, and never once the index has several encoders.
    """

    def __init__(self, session: Labelling) -> None:
        self._session = session
        self._tried = 0  # number of labels at the last trial
        self._trying = False
        self._offer: Offer | None = None
        self._answer: bool | None = None
        self._encoded: tuple[int, int] | None = None  # number of encoded photos, and of all photos
        self._problem: str | None = None

    def status(self) -> Row | None:
        """Return the offer, as :func:`routes.label_status` describes it, or ``None`` if there is none."""
        if self._offer is None or self._answer is False:
            return None
        return vars(self._offer) | {"encoded": self._encoded, "problem": self._problem}

    @property
    def works(self) -> bool:
        """Whether encoders are being tried, or will be soon, or one is being joined."""
        return self._trying or self._encoded is not None or self._is_due()

    def answer(self, join: bool) -> None:
        """Join the encoder, or decline the offer. Raises Problem 404 if there is no offer."""
        if self.status() is None:
            raise Problem(404, "no encoder is offered; label more photos")
        self._answer = join
        self._problem = None
        if join and self._encoded is None:
            self._encoded = 0, len(self._session.photos.encoded)

    def _is_due(self) -> bool:
        index = self._session.session.index
        if self._offer is not None or self._answer is False or index is None:
            return False
        return index.n >= max(LEAST, 2 * self._tried) and can_join(index)

    async def run(self) -> None:
        """Try the other encoders when there are enough labels, and again whenever these have doubled."""
        session = self._session
        while True:
            if self._answer:
                await self._join()
            elif self._is_due() and not session.works:
                await self._try_all()
            else:
                await session.pause()

    async def _try_all(self) -> None:
        """Try all other encoders on this machine, and offer the best of those that help."""
        session = self._session
        index = session.session.index
        assert index is not None
        self._trying = True
        run = partial(session.service.run, session.encoding)
        sample = await run(joining.sample_of, index)
        offers = list[Offer]()
        for name in await run(lambda: list(cached())):
            try:
                found = await self._try(name, sample)
                offers += [found] if found is not None else []
            except Exception as error:  # the weights of an encoder can be damaged in any way
                log.debug("%s: cannot be tried: %s", name, first_line(error))
        self._tried = index.n
        self._offer = max(offers, key=lambda one: one.after, default=None)
        self._trying = False

    async def _try(self, name: str, sample: Index) -> Offer | None:
        session = self._session
        service = session.service
        paths = list(joining.paths_in(sample, session.photos).items())
        features = dict[str, FloatArray]()
        async with self._opened(name) as (own, both):
            for part in slices(len(paths), PART):
                while session.works:
                    await session.pause()
                some = dict(paths[part])
                features |= await service.run(session.encoding, joining.encoded, some, own)
            call = partial(joining.offer_of, name, sample, features, both)
            return await service.run(session.thinking, call)

    @asynccontextmanager
    async def _opened(self, name: str) -> AsyncIterator[tuple[Reader, Reader]]:
        """Load another encoder, and yield its reader and one that joins it. Free its weights if it was not joined."""
        session = self._session
        maker = session.service.maker
        assert maker is not None
        backbones = maker.backbones
        load = partial(load_backbone, device=backbones.device, precision=backbones.precision)
        other = await session.service.run(session.encoding, partial(load, name, lazy=True))
        try:
            reader = session.photos.reader
            yield replace(reader, backbone=other), joining.with_both(reader, other)
        finally:
            if session.photos.joined is None:
                other.release(0)

    async def _join(self) -> None:
        """Encode all photos, and write the joined index. If this fails, the session goes on as before."""
        session = self._session
        photos = session.photos
        offer = self._offer
        assert offer is not None
        try:
            async with self._opened(offer.name) as (own, both):
                if await self._encode(own):
                    async with session.saving, session.reading:
                        if await self._encode(own):
                            await self._write(both)
        except Exception as error:
            self._problem = reason_of(error, "an encoder could not be joined")
        self._encoded = None
        self._answer = None if self._answer else False
        if photos.joined is None:
            photos.others = {}
        else:
            self._offer = None
        session.version()

    async def _encode(self, own: Reader) -> bool:
        """Encode the photos of the index and of the session. Return false if a person declines meanwhile."""
        session = self._session
        photos = session.photos
        assert session.session.index is not None
        assert own.backbone is not None
        d = own.backbone.dim
        while True:
            keys = joining.paths_in(session.session.index, photos)
            every = keys | joining.paths_of(photos)
            todo = [one for one in every.items() if one[0] not in photos.others]
            if not todo:
                return True
            check_memory(16 * len(todo) * d, f"{len(todo):,} photos", "label fewer photos")
            for part in slices(len(todo), PART):
                self._encoded = len(every) - len(todo) + part.start, len(every)
                some = dict(todo[part])
                found = await session.service.run(session.encoding, joining.encoded, some, own)
                lost = {digest: path for digest, path in some.items() if digest not in found}
                if gone := [path for digest, path in lost.items() if digest in keys]:
                    raise InputError(f"{gone[0]}: {LOST}")
                # an unlabelled photo that is gone is only answered by the first encoder
                photos.others |= found | dict.fromkeys(lost, np.zeros(d, np.float32))
                if not self._answer:
                    return False

    async def _write(self, both: Reader) -> None:
        session = self._session
        service = session.service
        photos = session.photos
        maker = service.maker
        assert maker is not None
        assert both.backbone is not None
        await service.run(session.encoding, maker.backbones.warm, both.backbone)
        photos.joined = both
        try:
            await service.changed(service.served[session.name], changes.join, photos.others, both)
        except BaseException:
            photos.joined = None
            raise
