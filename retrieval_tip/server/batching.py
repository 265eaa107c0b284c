"""Requests that wait together are answered together: one product with the keys serves them all."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from retrieval_tip.server import metrics
from retrieval_tip.server.problems import Problem

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")

SMOOTHING = 0.2
"""Share of the latest batch in the mean of the seconds that an item takes."""


@dataclass
class _Call(Generic[K, T, R]):
    key: K
    items: Sequence[T]
    answer: asyncio.Future[list[R]]


class Batcher(Generic[K, T, R]):
    """Calls ``run(key, items)`` in a thread of its own, with the items of all calls of one key that wait meanwhile.

    While one batch is computed the next one gathers, so a call that comes alone does not wait for others. Batches have
    ``most`` items, or those of one call; calls are answered in the order in which they came, but for those that join
    an earlier one of their key. At most ``room`` items wait: a further call is refused at once, with the seconds after
    which there will be room, unless nothing waits.
    """

    def __init__(self, name: str, run: Callable[[K, list[T]], list[R]], *, most: int, room: int) -> None:
        self._name, self._run, self._most, self._room = name, run, most, room
        self._waiting: deque[_Call[K, T, R]] = deque()
        self._items = 0
        self._seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, key: K, items: Sequence[T]) -> list[R]:
        """What ``run`` gives for these items, in order.

        Raises Problem 429 where too many wait, and what ``run`` raises: for all the calls that it was made for.
        """
        if self._items and self._items + len(items) > self._room:
            metrics.REFUSED.labels(self._name).inc()
            wait = math.ceil(self._items * self._seconds) or 1
            raise Problem(429, f"{self._items} items wait already; try again in {wait} s", {"Retry-After": str(wait)})
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
        """Until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            calls = self._next()
            if not calls:
                continue
            items = [item for call in calls for item in call.items]
            start = time.perf_counter()
            try:
                answers = await loop.run_in_executor(self._pool, self._run, calls[0].key, items)
            except Exception as error:
                for call in calls:
                    if not call.answer.done():
                        call.answer.set_exception(error)
                continue
            seconds = (time.perf_counter() - start) / max(1, len(items))
            self._seconds += SMOOTHING * (seconds - self._seconds) if self._seconds else seconds
            metrics.BATCHES.labels(self._name).observe(len(items))
            at = 0
            for call in calls:
                if not call.answer.done():  # else whoever asked has gone
                    call.answer.set_result(answers[at : at + len(call.items)])
                at += len(call.items)

    def _next(self) -> list[_Call[K, T, R]]:
        """The calls of the next batch: the first one that is still wanted, and those of its key that fit beside it."""
        taken: list[_Call[K, T, R]] = []
        kept: deque[_Call[K, T, R]] = deque()
        number = 0
        while self._waiting:
            call = self._waiting.popleft()
            if call.answer.done():
                self._count(-len(call.items))
            elif not taken or (call.key == taken[0].key and number + len(call.items) <= self._most):
                taken.append(call)
                number += len(call.items)
                self._count(-len(call.items))
            else:
                kept.append(call)
        self._waiting = kept
        return taken

    async def close(self) -> None:
        """Answer what waits, then end."""
        if self._worker is not None:
            await self._worker
        self._pool.shutdown()
