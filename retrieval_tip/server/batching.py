"""Classes that share work between requests: turns of clients, batches, and a cache of slow results."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")


@dataclass(eq=False)
class _Turn:
    client: str
    place: float
    cost: float
    begun: asyncio.Future[None]


class Turns:
    """Turns of clients at some work. A turn begins as soon as the turns in progress cost less than ``room``.

    The place of a turn is the total cost of the client's turns up to this one, plus the place of the turn that began
    last. The waiting turn with the lowest place begins next.
    """

    def __init__(self, name: str, room: float) -> None:
        self._name = name
        self._room = room
        self._waiting: list[_Turn] = []
        self._now = 0.0

    def waiting(self, client: str) -> float:
        """Return the total cost of a client's turns that are waiting."""
        return sum(turn.cost for turn in self._waiting if turn.client == client)

    @asynccontextmanager
    async def turn(self, client: str, cost: float) -> AsyncIterator[None]:
        """Wait for a turn of a client, which ends with the context."""
        last = max(
            (turn.place for turn in self._waiting if turn.client == client), default=self._now
        )
        own = _Turn(client, last + cost, cost, asyncio.get_running_loop().create_future())
        insort(self._waiting, own, key=lambda turn: turn.place)
        self._begin()
        try:
            await own.begun
            yield
        finally:
            if own in self._waiting:
                self._waiting.remove(own)
            else:
                self._room += cost
            self._begin()

    def _begin(self) -> None:
        while self._waiting and self._room > 0:
            turn = self._waiting.pop(0)
            self._room -= turn.cost
            self._now = turn.place
            if not turn.begun.done():  # otherwise, its client has disconnected
                turn.begun.set_result(None)
        metrics.WAITING.labels(self._name).set(len(self._waiting))


@dataclass(eq=False)
class _Part(Generic[K, T, R]):
    """The items of one request. ``result`` is the future for their results."""

    key: K
    items: Sequence[T]
    result: asyncio.Future[list[R]]


class Batches(Generic[K, T, R]):
    """Batches of the items of waiting requests, which are passed to ``run(key, items)`` in a thread of ``pool``.

    Requests with the same key join, as long as there are at most ``most(key)`` items. One batch runs at a time.
    """

    def __init__(
        self,
        name: str,
        pool: Executor,
        run: Callable[[K, list[T]], list[R]],
        most: Callable[[K], int],
    ) -> None:
        self._name = name
        self._pool = pool
        self._run = run
        self._most = most
        self._waiting: list[_Part[K, T, R]] = []
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, key: K, items: Sequence[T]) -> list[R]:
        """Return the results of ``run`` for these items, in the same order."""
        part: _Part[K, T, R] = _Part(key, items, asyncio.get_running_loop().create_future())
        self._waiting.append(part)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await part.result

    async def _work(self) -> None:
        while waiting := [
            part for part in self._waiting if not part.result.done()
        ]:  # clients can disconnect
            key = waiting[0].key
            batch = waiting[:1]
            self._waiting, room = [], self._most(key) - len(waiting[0].items)
            for part in waiting[1:]:
                joins = part.key == key and len(part.items) <= room
                room -= len(part.items) if joins else 0
                (batch if joins else self._waiting).append(part)
            await self._compute(batch)

    async def _compute(self, batch: Sequence[_Part[K, T, R]]) -> None:
        """Compute a batch. If it fails, compute each part separately, so that no request gets another's error."""
        items = [item for part in batch for item in part.items]
        metrics.BATCHES.labels(self._name).observe(len(items))
        try:
            made = iter(
                await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._run, batch[0].key, items
                )
            )
        except Exception as error:
            for part in batch if len(batch) > 1 else ():
                await self._compute([part])
            if not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for part in batch:
            own = list(islice(made, len(part.items)))
            if not part.result.done():
                part.result.set_result(own)


class ResultCache(Generic[K, R]):
    """A cache of results. A thread of ``pool`` computes each result once.

    The cache keeps the most recently used results whose key is ``useful``, up to a total ``size`` of ``most``. If
    ``room`` results are already in progress or waiting, further calls are refused.
    """

    def __init__(
        self,
        pool: Executor,
        *,
        most: int,
        room: int,
        size: Callable[[R], int] = lambda _: 1,
        useful: Callable[[K], bool] = lambda _: True,
    ) -> None:
        self._pool = pool
        self._most = most
        self._room = room
        self._size_of = size
        self._useful = useful
        self._results: OrderedDict[K, R] = OrderedDict()
        self._making: dict[K, asyncio.Future[R]] = {}
        self._size = 0

    async def __call__(
        self, key: K, make: Callable[[], R], joins: Callable[[K], bool] = lambda _: False
    ) -> R:
        """Return the result of ``make``, from the cache if possible.

        If a result whose key ``joins`` is in progress, it is returned instead. Errors are not cached. If a call is
        cancelled, ``make`` continues to run.
        """
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]
        key = next(filter(joins, self._making), key)
        if key not in self._making:
            if len(self._making) >= self._room:
                raise Problem(
                    503,
                    f"{self._room} results are being computed; try again in 5 s",
                    {"Retry-After": "5"},
                )
            made = self._making[key] = asyncio.get_running_loop().run_in_executor(self._pool, make)
            made.add_done_callback(lambda future: self._keep(key, future))
        return await asyncio.shield(self._making[key])

    def _keep(self, key: K, made: asyncio.Future[R]) -> None:
        del self._making[key]
        if made.cancelled() or made.exception() is not None:
            return
        self._results[key] = made.result()
        useless = [old for old in self._results if not self._useful(old)]
        for old in useless:
            del self._results[old]
        self._size = sum(map(self._size_of, self._results.values()))
        while self._size > self._most:
            self._size -= self._size_of(self._results.popitem(last=False)[1])
