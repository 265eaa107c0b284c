"""Waiting requests are processed together and in order, within limits."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip.errors import InputError
from retrieval_tip.server.batching import Batcher, FairPool, Kept
from retrieval_tip.server.problems import Problem


class Gate:
    """A batch function that waits until the gate opens, and records its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[tuple[str, list[int]]] = []

    def __call__(self, key: str, items: list[int]) -> list[str]:
        assert self.open.wait(30)
        self.batches.append((key, items))
        return [f"{key}{item}" for item in items]


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


async def wait_until(ready: Callable[[], bool]) -> None:
    for _ in range(1000):
        if ready():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not ready within 10 s")


@asynccontextmanager
async def occupied(gate: Gate, most: int, room: int) -> AsyncIterator[tuple[Batcher, asyncio.Task]]:
    """Yield a batcher that is busy with a first call until the gate opens."""
    batcher = Batcher("test", gate, most=lambda _: most, room=room)
    first = asyncio.create_task(batcher("a", [0]))
    await wait_until(lambda: not batcher._waiting and batcher._worker is not None)
    yield batcher, first
    await batcher.close()


@in_a_loop
async def test_waiting_requests_become_one_batch() -> None:
    gate = Gate()
    async with occupied(gate, 100, 100) as (batcher, first):
        others = [asyncio.create_task(batcher("a", [i, -i])) for i in range(1, 11)]
        await asyncio.sleep(0)
        gate.open.set()
        assert await first == ["a0"]
        assert await asyncio.gather(*others) == [[f"a{i}", f"a{-i}"] for i in range(1, 11)]
    assert gate.batches == [("a", [0]), ("a", [x for i in range(1, 11) for x in (i, -i)])]


@given(
    calls=st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=4)), max_size=30),
    most=st.integers(1, 8),
)
@settings(max_examples=examples(50), deadline=None)
def test_each_call_gets_its_own_answer(calls: list[tuple[str, list[int]]], most: int) -> None:
    seen: list[tuple[str, int]] = []

    def run(key: str, items: list[int]) -> list[str]:
        seen.append((key, len(items)))
        return [f"{key}{item}" for item in items]

    async def ask() -> list[list[str]]:
        batcher = Batcher("test", run, most=lambda _: most, room=10_000)
        answers = await asyncio.gather(*(batcher(key, items) for key, items in calls))
        await batcher.close()
        return answers

    assert asyncio.run(ask()) == [[f"{key}{item}" for item in items] for key, items in calls]
    assert sum(size for _, size in seen) == sum(len(items) for _, items in calls)
    assert all(size <= max(most, 4) for _, size in seen)


@in_a_loop
async def test_a_full_queue_refuses_requests_with_a_retry_time() -> None:
    gate = Gate()
    async with occupied(gate, 1, 3) as (batcher, first):
        waiting = [asyncio.create_task(batcher("a", [i])) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="3 items") as refused:
            await batcher("a", [4])
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        gate.open.set()
        await asyncio.gather(first, *waiting)
        assert await batcher("a", list(range(10))) == [f"a{i}" for i in range(10)]  # beyond the room, but alone


@in_a_loop
async def test_an_error_only_reaches_calls_with_the_same_key() -> None:
    def run(key: str, items: list[int]) -> list[int]:
        if key == "bad":
            raise InputError("no such thing")
        return items

    batcher = Batcher("test", run, most=lambda _: 10, room=10)
    calls = [batcher("bad", [1]), batcher("good", [2]), batcher("bad", [3])]
    one, two, three = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(one, InputError)
    assert two == [2]
    assert isinstance(three, InputError)
    await batcher.close()


@in_a_loop
async def test_an_invalid_item_only_fails_its_own_call() -> None:
    def run(_: str, items: list[int]) -> list[int]:
        if 13 in items:
            raise InputError("no such thing")
        return items

    batcher = Batcher("test", run, most=lambda _: 100, room=100)
    found = await asyncio.gather(*(batcher("a", [i, i]) for i in range(20)), return_exceptions=True)
    assert isinstance(found.pop(13), InputError)
    assert found == [[i, i] for i in range(20) if i != 13]
    await batcher.close()


@in_a_loop
async def test_a_cancelled_call_is_not_processed() -> None:
    gate = Gate()
    async with occupied(gate, 10, 10) as (batcher, first):
        gone, stays = asyncio.create_task(batcher("a", [1])), asyncio.create_task(batcher("a", [2]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert await stays == ["a2"]
        assert await first == ["a0"]
    assert batcher._items == 0
    assert gate.batches == [("a", [0]), ("a", [2])]


@in_a_loop
async def test_closing_answers_accepted_requests() -> None:
    gate = Gate()
    batcher = Batcher("test", gate, most=lambda _: 1, room=10)
    calls = [asyncio.create_task(batcher("a", [i])) for i in range(3)]
    await asyncio.sleep(0)
    gate.open.set()
    await batcher.close()
    assert [call.result()[0] for call in calls] == ["a0", "a1", "a2"]


class Calls:
    """Calls that record the order in which they start, and wait until they may finish."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.gates: dict[str, threading.Event] = {}

    def named(self, *names: str) -> list[Callable[[], str]]:
        def call(name: str) -> str:
            self.began.append(name)
            assert self.gates[name].wait(30)
            return name

        self.gates |= {name: threading.Event() for name in names}
        return [functools.partial(call, name) for name in names]

    def finish(self, *names: str) -> None:
        for name in names or self.gates:
            self.gates[name].set()


@in_a_loop
async def test_a_small_call_does_not_wait_for_large_ones() -> None:
    calls = Calls()
    pool: FairPool[str] = FairPool("test", threads=2, room=100, held=10)
    large = calls.named("a0", "a1", "a2")
    with pool.turns(large, [9, 9, 9]) as first, pool.turns(calls.named("b"), [1]) as second:
        calls.finish("b")
        assert await second[0].result == "b"
        assert set(calls.began) == {"a0", "a1", "b"}
        calls.finish()
        assert [await turn.result for turn in first] == ["a0", "a1", "a2"]
    pool.close()


@in_a_loop
async def test_calls_start_in_the_order_of_their_requests_cumulative_cost() -> None:
    calls = Calls()
    pool: FairPool[str] = FairPool("test", threads=1, room=100, held=10)
    with ExitStack() as stack:

        def line(names: str, *costs: float) -> None:
            turns.extend(stack.enter_context(pool.turns(calls.named(*names), costs)))

        turns: list[Any] = []
        line("xy", 1, 1)  # these start first; until y starts, all other costs count from there
        line("abc", 1.5, 1.5, 1.5)
        line("de", 1, 1)
        line("f", 1.2)
        calls.finish()
        await asyncio.gather(*(turn.result for turn in turns))
    pool.close()
    assert "".join(calls.began) in ("xydfaebc", "yxdfaebc")


@in_a_loop
async def test_a_request_is_refused_only_if_too_much_work_is_ahead_of_it() -> None:
    calls = Calls()
    pool: FairPool[str] = FairPool("test", threads=1, room=10, held=10)
    with pool.turns(calls.named(*"abcd"), [50, 5, 5, 5]) as first:  # beyond the room, but alone
        for costs in ([56], [1] * 56):
            with pytest.raises(Problem) as refused, pool.turns(calls.named(*map(str, range(len(costs)))), costs):
                pass
            assert refused.value.status == 429
            assert int(refused.value.headers["Retry-After"]) >= 1
        with pool.turns(calls.named("e"), [4]) as second:
            calls.finish()
            assert await second[0].result == "e"
        assert [await turn.result for turn in first] == list("abcd")
    pool.close()


@in_a_loop
async def test_results_are_held_until_released_and_the_rest_is_cancelled() -> None:
    calls = Calls()
    pool: FairPool[str] = FairPool("test", threads=4, room=100, held=2)
    with pool.turns(calls.named(*"abcd"), [1] * 4) as turns:
        calls.finish()
        assert [await turn.result for turn in turns[:2]] == ["a", "b"]
        await asyncio.sleep(0.05)
        assert sorted(calls.began) == ["a", "b"]  # the pool holds two results
        pool.release(turns[0])
        assert await turns[2].result == "c"
    assert turns[3].result.cancelled()
    with pool.turns(calls.named("e"), [1]) as later:
        calls.finish()
        assert await later[0].result == "e"
    pool.close()
    assert "d" not in calls.began


class Maker:
    """A maker of values that waits until it is opened, and records what it made."""

    def __init__(self) -> None:
        self.open, self.made = threading.Event(), []

    def making(self, value: str) -> Callable[[], str]:
        def make() -> str:
            assert self.open.wait(30)
            self.made.append(value)
            if value == "bad":
                raise InputError("no such thing")
            return value

        return make


@in_a_loop
async def test_a_kept_value_is_made_once() -> None:
    maker = Maker()
    with ThreadPoolExecutor(4) as pool:
        kept: Kept[str, str] = Kept(pool, most=8, room=10, size=len)
        calls = [asyncio.create_task(kept(key, maker.making(key))) for key in ["aaaa"] * 50 + ["bbbb"] * 50]
        await asyncio.sleep(0)
        gone = calls.pop(0)
        gone.cancel()  # the other calls still get the value
        maker.open.set()
        assert await asyncio.gather(*calls) == ["aaaa"] * 49 + ["bbbb"] * 50
        assert sorted(maker.made) == ["aaaa", "bbbb"]
        assert await kept("aaaa", maker.making("aaaa")) == "aaaa"
        assert await kept("cc", maker.making("cc")) == "cc"  # replaces the least recently used value
        assert await kept("aaaa", maker.making("aaaa")) == "aaaa"
        assert sorted(maker.made) == ["aaaa", "bbbb", "cc"]
        assert list(kept._results) == ["cc", "aaaa"]
        assert kept._size == 6
        assert await kept("too large", maker.making("too large")) == "too large"
        assert (kept._size, kept._results) == (0, {})


@in_a_loop
async def test_a_failure_is_not_kept() -> None:
    maker = Maker()
    maker.open.set()
    with ThreadPoolExecutor(1) as pool:
        kept: Kept[str, str] = Kept(pool, most=8, room=1)
        for number in (1, 2):
            with pytest.raises(InputError):
                await kept("a", maker.making("bad"))
            assert len(maker.made) == number


@in_a_loop
async def test_requests_beyond_the_room_are_refused() -> None:
    maker = Maker()
    with ThreadPoolExecutor(1) as pool:
        kept: Kept[str, str] = Kept(pool, most=8, room=2)
        calls = [asyncio.create_task(kept(key, maker.making(key))) for key in "abab"]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as refused:
            await kept("c", maker.making("c"))
        assert refused.value.status == 503
        assert int(refused.value.headers["Retry-After"]) >= 1
        maker.open.set()
        assert await asyncio.gather(*calls) == list("abab")
        assert await kept("c", maker.making("c")) == "c"
