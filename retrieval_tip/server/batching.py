"""Classes that share work between requests: a batcher, a fair thread pool, and a cache of slow results."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Generic, TypeVar

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")

SMOOTHING = 0.2
"""Weight of the latest batch in the moving average of the seconds per item."""


@dataclass
class _Call(Generic[K, T, R]):
    key: K
    items: Sequence[T]
    answer: asyncio.Future[list[R]]


class Batcher(Generic[K, T, R]):
    """Combine the items of all waiting calls that have the same key, and pass them to ``run(key, items)``.

    ``run`` is called in a separate thread. While one batch is being computed, the next one is collected, so a single
    call never waits for others to arrive. A batch has at most ``most(key)`` items, unless a single call has more items.
    Calls are answered in order, except that a call can join the batch of an earlier call with the same key. A call is
    refused if other items are waiting and the total would exceed ``room``.
    """

    def __init__(self, name: str, run: Callable[[K, list[T]], list[R]], *, most: Callable[[K], int], room: int) -> None:
        self._name, self._run, self._most, self._room = name, run, most, room
        self._waiting: deque[_Call[K, T, R]] = deque()
        self._items = 0
        self._seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, key: K, items: Sequence[T]) -> list[R]:
        """Return the results of ``run`` for these items, in the same order.

        Raises Problem 429 if too many items are waiting.
        """
        if self._items and self._items + len(items) > self._room:
            metrics.REFUSED.labels(self._name).inc()
            wait = math.ceil(self._items * self._seconds) or 1
            raise Problem(429, f"{self._items} items are waiting; try again in {wait} s", {"Retry-After": str(wait)})
        call: _Call[K, T, R] = _Call(key, items, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._count(len(items))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await call.answer

    def _count(self, change: int) -> None:
        self._items += change
        metrics.WAITING.labels(self._name).set(self._items)

    async def _work(self) -> None:
        while self._waiting:
            if calls := self._next():
                await self._answer(calls)

    async def _answer(self, calls: list[_Call[K, T, R]]) -> None:
        """Answer a batch. If it fails, answer its halves separately, so that no call gets another call's error."""
        items = [item for call in calls for item in call.items]
        start = time.perf_counter()
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._pool, self._run, calls[0].key, items)
        except Exception as error:
            if half := len(calls) // 2:
                await self._answer(calls[:half])
                await self._answer(calls[half:])
            elif not calls[0].answer.done():
                calls[0].answer.set_exception(error)
            return
        seconds = (time.perf_counter() - start) / max(1, len(items))
        self._seconds += SMOOTHING * (seconds - self._seconds) if self._seconds else seconds
        metrics.BATCHES.labels(self._name).observe(len(items))
        at = 0
        for call in calls:
            if not call.answer.done():  # it is done if the client has disconnected
                call.answer.set_result(answers[at : at + len(call.items)])
            at += len(call.items)

    def _next(self) -> list[_Call[K, T, R]]:
        """Take the first call that is still needed and all calls of its key that fit."""
        taken: list[_Call[K, T, R]] = []
        kept: deque[_Call[K, T, R]] = deque()
        number = 0
        while self._waiting:
            call = self._waiting.popleft()
            if call.answer.done():
                self._count(-len(call.items))
            elif not taken or (call.key == taken[0].key and number + len(call.items) <= self._most(call.key)):
                taken.append(call)
                number += len(call.items)
                self._count(-len(call.items))
            else:
                kept.append(call)
        self._waiting = kept
        return taken

    async def close(self) -> None:
        """Answer all waiting calls, and then stop the thread."""
        if self._worker is not None:
            await self._worker
        self._pool.shutdown()


@dataclass(eq=False)
class Turn(Generic[R]):
    """A call in a :class:`FairPool`. ``result`` is the future for its result."""

    place: float
    cost: float
    call: Callable[[], R]
    result: asyncio.Future[R]


LARGE = 2.0
"""Minimum cost of a large call in a :class:`FairPool`. An ordinary call costs 1."""


class FairPool(Generic[R]):
    """A thread pool that shares its threads fairly, so that small requests do not wait for large ones.

    Each call is assigned a place, and the waiting call with the lowest place is started next. The place is the sum of
    the costs of the request's calls up to this one, plus the place of the last call that was started before the
    request. At most ``threads`` large calls run at once, and one additional thread is reserved for others. At most
    ``held`` results are being computed or in use.
    """

    def __init__(self, lane: str, *, threads: int, room: int, held: int) -> None:
        self._lane, self._threads, self._room, self._most_held = lane, threads, room, held
        self._pool = ThreadPoolExecutor(threads + 1, thread_name_prefix=lane)
        self._waiting: list[Turn[R]] = []
        self._running: list[Turn[R]] = []
        self._held: list[Turn[R]] = []
        self._now = 0.0

    @contextmanager
    def turns(self, calls: Sequence[Callable[[], R]], costs: Sequence[float]) -> Iterator[list[Turn[R]]]:
        """Queue the calls of a request. On exit, calls that have not been started are cancelled.

        Raises Problem 429 if they must wait for other requests and their total cost exceeds ``room``.
        """
        places = [self._now + cost for cost in accumulate(costs)]
        before = sum(one.cost for one in self._waiting if one.place <= places[-1])
        if before and before + sum(costs) > self._room:
            metrics.REFUSED.labels(self._lane).inc()
            text = f"{len(self._waiting)} {self._lane} are waiting; try again in 2 s"
            raise Problem(429, text, {"Retry-After": "2"})
        loop = asyncio.get_running_loop()
        own = [Turn(*one, loop.create_future()) for one in zip(places, costs, calls, strict=True)]
        self._waiting += own
        self._begin()
        try:
            yield own
        finally:
            for one in own:
                one.result.cancel()
            self.release(*own)

    def release(self, *turns: Turn[R]) -> None:
        """Cancel calls that are still waiting, and free the space of their results."""
        self._waiting = [one for one in self._waiting if one not in turns]
        self._held = [one for one in self._held if one not in turns]
        self._begin()

    def _begin(self) -> None:
        while len(self._held) < self._most_held and len(self._running) <= self._threads:
            full = sum(one.cost >= LARGE for one in self._running) == self._threads
            ready = (one for one in self._waiting if one.cost < LARGE or not full)
            first = min(ready, key=lambda one: one.place, default=None)
            if first is None:
                break
            self._now = max(self._now, first.place)
            self._waiting.remove(first)
            self._running.append(first)
            self._held.append(first)
            made = asyncio.get_running_loop().run_in_executor(self._pool, first.call)
            made.add_done_callback(partial(self._end, first))
        metrics.WAITING.labels(self._lane).set(len(self._waiting))

    def _end(self, one: Turn[R], made: asyncio.Future[R]) -> None:
        self._running.remove(one)
        error = made.exception()
        if one.result.done():  # the client has disconnected
            pass
        elif error is not None:
            one.result.set_exception(error)
        else:
            one.result.set_result(made.result())
        self._begin()

    def close(self) -> None:
        """Stop the threads as soon as they are idle."""
        self._pool.shutdown()


class Kept(Generic[K, R]):
    """A cache of results, each of which is computed once in a thread of ``pool``.

    The cache keeps the most recently used results, up to a total ``size`` of ``most``. If ``room`` results are already
    in progress or waiting, further calls are refused.
    """

    def __init__(self, pool: Executor, *, most: int, room: int, size: Callable[[R], int] = lambda _: 1) -> None:
        self._pool, self._most, self._room, self._size_of = pool, most, room, size
        self._results: OrderedDict[K, R] = OrderedDict()
        self._making: dict[K, asyncio.Future[R]] = {}
        self._size = 0

    async def __call__(self, key: K, make: Callable[[], R]) -> R:
        """Return the result of ``make``, from the cache if possible.

        Errors are not cached. If a call is cancelled, ``make`` continues to run. Raises Problem 503 if too many results
        are in progress.
        """
        if key in self._results:
            self._results.move_to_end(key)
            return self._results[key]
        if key not in self._making:
            if len(self._making) >= self._room:
                raise Problem(503, f"{self._room} results are being computed; try again in 5 s", {"Retry-After": "5"})
            made = self._making[key] = asyncio.get_running_loop().run_in_executor(self._pool, make)
            made.add_done_callback(lambda future: self._keep(key, future))
        return await asyncio.shield(self._making[key])

    def _keep(self, key: K, made: asyncio.Future[R]) -> None:
        del self._making[key]
        if made.cancelled() or made.exception() is not None:
            return
        self._results[key] = made.result()
        self._size += self._size_of(made.result())
        while self._size > self._most:
            self._size -= self._size_of(self._results.popitem(last=False)[1])
