"""Classes that share work between requests: a fair queue with its threads, and a cache of slow results."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import Any, Generic, TypeVar

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")

LARGE = 2.0
"""Minimum cost of a large turn. A photo of ordinary size costs 1."""


@dataclass(eq=False)
class Turn(Generic[K, T, R]):
    """Items with one key that wait together in a :class:`Lane`. ``result`` is the future for their results."""

    client: str
    place: float
    cost: float
    key: K
    items: Sequence[T]
    result: asyncio.Future[list[R]]

    @property
    def large(self) -> bool:
        """Whether the turn may use only the threads that are not reserved for others."""
        return self.cost >= LARGE


class Lane(Generic[K, T, R]):
    """Threads that take the turns that are waiting, and pass their items to ``run(key, items)``.

    Clients are served in turn. The place of a turn is the total cost of the client's turns up to this one, plus the
    place of the turn that was started last, and the waiting turn with the lowest place is started next. Waiting turns
    that have the same key join it, as long as there are at most ``most(key)`` items.

    At most ``threads`` batches run at once. While large turns run, one additional thread serves the others. At most
    ``held`` results are being computed or in use.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[K, list[T]], list[R]],
        *,
        threads: int = 1,
        most: Callable[[K], int] = lambda _: 1,
        held: float = math.inf,
    ) -> None:
        self._name, self._run = name, run
        self._threads, self._most, self._most_held = threads, most, held
        self._pool = ThreadPoolExecutor(threads + 1, thread_name_prefix=name)
        self.waiting: list[Turn[K, T, R]] = []
        self._running: list[list[Turn[K, T, R]]] = []
        self._held: set[Turn[K, T, R]] = set()
        self._now = 0.0

    async def __call__(self, client: str, key: K, items: Sequence[T], cost: float = 1.0) -> list[R]:
        """Return the results of ``run`` for these items, in the same order."""
        with self.turns(client, key, [items], [cost]) as (turn,):
            return await turn.result

    @contextmanager
    def turns(
        self, client: str, key: K, parts: Sequence[Sequence[T]], costs: Sequence[float]
    ) -> Iterator[list[Turn[K, T, R]]]:
        """Queue one turn for each part of a request. On exit, turns that have not been started are cancelled."""
        last = max((turn.place for turn in self.waiting if turn.client == client), default=0.0)
        places = [*accumulate(costs, initial=max(last, self._now))][1:]
        loop = asyncio.get_running_loop()
        own: list[Turn[K, T, R]] = [
            Turn(client, place, cost, key, part, loop.create_future())
            for place, cost, part in zip(places, costs, parts, strict=True)
        ]
        self.waiting = sorted([*self.waiting, *own], key=lambda turn: turn.place)
        self._begin()
        try:
            yield own
        finally:
            for turn in own:
                turn.result.cancel()
            self.release(*own)

    def release(self, *turns: Turn[K, T, R]) -> None:
        """Cancel turns that are still waiting, and free the space of their results."""
        self._take(turns)
        self._held.difference_update(turns)
        self._begin()

    def _take(self, turns: Sequence[Turn[K, T, R]]) -> None:
        taken = set(turns)
        self.waiting = [turn for turn in self.waiting if turn not in taken]

    def _begin(self) -> None:
        while len(self._held) < self._most_held and (batch := self._next()):
            self._take(batch)
            self._held.update(batch)
            self._now = max(self._now, batch[0].place)
            self._start(batch)
        metrics.WAITING.labels(self._name).set(sum(len(turn.items) for turn in self.waiting))

    def _next(self) -> list[Turn[K, T, R]]:
        """Return the first turn that can start and the turns that join it, or an empty list."""
        large = sum(batch[0].large for batch in self._running)
        able = [turn for turn in self.waiting if not turn.large or large < self._threads]
        if not able or len(self._running) >= self._threads + bool(large):
            return []
        first, *others = able
        batch, number, most = [first], len(first.items), self._most(first.key)
        for turn in others:
            if (turn.key, turn.large) == (first.key, first.large) and number + len(turn.items) <= most:
                batch.append(turn)
                number += len(turn.items)
        return batch

    def _start(self, batch: list[Turn[K, T, R]]) -> None:
        items = [item for turn in batch for item in turn.items]
        metrics.BATCHES.labels(self._name).observe(len(items))
        self._running.append(batch)
        made = asyncio.get_running_loop().run_in_executor(self._pool, self._run, batch[0].key, items)
        made.add_done_callback(partial(self._end, batch))

    def _end(self, batch: list[Turn[K, T, R]], made: asyncio.Future[list[R]]) -> None:
        """Pass on the results. If a batch fails, run its halves separately, so that no turn gets another's error."""
        self._running.remove(batch)
        error = made.exception()
        if error is not None and len(batch) > 1:
            half = len(batch) // 2
            self._start(batch[:half])
            self._start(batch[half:])
            return
        results = iter(made.result() if error is None else ())
        for turn in batch:
            own = list(islice(results, len(turn.items)))
            if turn.result.done():  # the client has disconnected
                continue
            if error is None:
                turn.result.set_result(own)
            else:
                turn.result.set_exception(error)
        self._begin()

    def close(self) -> None:
        """Stop each thread once it is idle."""
        self._pool.shutdown()


def admit(client: str, room: float, *lanes: Lane[Any, Any, Any]) -> None:
    """Raise Problem 429 if a client fills more than a quarter of ``room``, a total cost of turns that wait in lanes."""
    waiting = (turn for lane in lanes for turn in lane.waiting)
    if sum(turn.cost for turn in waiting if turn.client == client) > room / 4:
        metrics.REFUSED.inc()
        text = "too many of your images or features are waiting; try again in 2 s"
        raise Problem(429, text, {"Retry-After": "2"})


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

        Errors are not cached. If a call is cancelled, ``make`` continues to run.
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
