"""Waiting requests are processed together and in turn by client, within limits."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from conftest import tries
from hypothesis import given
from hypothesis import strategies as st

from retrieval_tip.errors import InputError
from retrieval_tip.server.batching import Batches, ResultCache, Turns
from retrieval_tip.server.problems import Problem

pytestmark = pytest.mark.anyio  # the plugin of anyio runs coroutines


@pytest.fixture
def anyio_backend():
    return "asyncio"


@contextmanager
def batches(run, most):
    with ThreadPoolExecutor(1) as pool:
        yield Batches("test", pool, run, lambda _: most)


async def test_waiting_requests_become_one_batch_unless_they_are_cancelled():
    go = threading.Event()
    seen = []

    def run(key, items):
        assert go.wait(30)
        seen.append((key, items))
        return [f"{key}{item}" for item in items]

    with batches(run, 100) as asked:
        first = asyncio.create_task(asked("a", [0]))
        await asyncio.sleep(0.05)
        gone, *others = [asyncio.create_task(asked("a", [i, -i])) for i in range(11)]
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        go.set()
        assert await first == ["a0"]
        assert await asyncio.gather(*others) == [[f"a{i}", f"a{-i}"] for i in range(1, 11)]
    assert seen == [("a", [0]), ("a", [x for i in range(1, 11) for x in (i, -i)])]


@given(
    calls=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
        max_size=30,
    ),
    most=st.integers(1, 8),
    bad=st.none() | st.integers(0, 9),
)
@tries(50)
def test_each_request_gets_its_own_answer_or_its_own_error(calls, most, bad):
    done = []

    def run(key, items):
        if bad in items:
            raise InputError("no such thing")
        done.extend(items)
        assert len(items) <= max(most, 4)
        return [f"{key}{item}" for item in items]

    async def ask():
        with batches(run, most) as asked:
            return await asyncio.gather(
                *(asked(key, items) for key, items in calls), return_exceptions=True
            )

    for (key, items), found in zip(calls, asyncio.run(ask()), strict=True):
        assert (
            isinstance(found, InputError)
            if bad in items
            else found == [f"{key}{item}" for item in items]
        )
    assert sorted(done) == sorted(item for _, items in calls if bad not in items for item in items)


class Work:
    """Work that takes turns, records the order in which they begin, and ends when it is told to."""

    def __init__(self, room):
        self.turns = Turns("test", room)
        self.begun = ""
        self.tasks = {}
        self.gates = {name: asyncio.Event() for name in "abcdefghz"}

    async def start(self, client, names, *costs):
        for name, cost in zip(names, costs, strict=True):
            self.tasks[name] = asyncio.create_task(self._turn(client, name, cost))
            await asyncio.sleep(0)

    async def _turn(self, client, name, cost):
        async with self.turns.turn(client, cost):
            self.begun += name
            await self.gates[name].wait()

    async def finish(self, names):
        for name in names:
            self.gates[name].set()
        await asyncio.gather(*(self.tasks[name] for name in names))


async def test_turns_begin_in_the_order_of_their_clients_total_cost():
    """A second request of a client comes after its first one, however small it is."""
    work = Work(1.0)
    await work.start(
        "zero", "z", 1.0
    )  # begins first, and all other costs are counted from its place
    await work.start("one", "abc", 1.5, 1.5, 1.5)
    await work.start("two", "de", 1.0, 1.0)
    await work.start("three", "f", 1.2)
    await work.start("two", "g", 1.0)
    assert (work.turns.waiting("one"), work.turns.waiting("two"), work.turns.waiting("zero")) == (
        4.5,
        3.0,
        0.0,
    )
    await work.finish("abcdefgz")
    assert work.begun == "zdfaebgc"


async def test_turns_begin_while_there_is_room_and_cancelled_ones_make_room():
    work = Work(5.0)
    await work.start("one", "abc", 3, 3, 3)
    await work.start("two", "de", 1, 1)
    assert work.begun == "ab"
    work.tasks["d"].cancel()
    work.tasks["a"].cancel()
    await asyncio.gather(work.tasks["a"], work.tasks["d"], return_exceptions=True)
    await asyncio.sleep(0)
    assert work.begun == "abec"
    await work.finish("bce")
    await work.start("two", "fgh", 4, 4, 4)
    assert work.begun[-2:] == "fg"
    await work.finish("fgh")


class Maker:
    """A maker of values that waits until it is opened, and records what it made."""

    def __init__(self):
        self.open = threading.Event()
        self.made = []

    def making(self, value):
        def make():
            assert self.open.wait(30)
            self.made.append(value)
            if value == "bad":
                raise InputError("no such thing")
            return value

        return make


async def test_a_kept_value_is_made_once():
    maker = Maker()
    with ThreadPoolExecutor(4) as pool:
        kept = ResultCache(pool, most=8, room=10, size=len)
        calls = [
            asyncio.create_task(kept(key, maker.making(key)))
            for key in ["aaaa"] * 50 + ["bbbb"] * 50
        ]
        await asyncio.sleep(0)
        gone = calls.pop(0)
        gone.cancel()  # the other calls still get the value
        maker.open.set()
        assert await asyncio.gather(*calls) == ["aaaa"] * 49 + ["bbbb"] * 50
        assert sorted(maker.made) == ["aaaa", "bbbb"]
        assert await kept("aaaa", maker.making("aaaa")) == "aaaa"
        assert (
            await kept("cc", maker.making("cc")) == "cc"
        )  # replaces the least recently used value
        assert await kept("aaaa", maker.making("aaaa")) == "aaaa"
        assert sorted(maker.made) == ["aaaa", "bbbb", "cc"]
        assert list(kept._results) == ["cc", "aaaa"]
        assert kept._size == 6
        assert await kept("too large", maker.making("too large")) == "too large"
        assert (kept._size, kept._results) == (0, {})


async def test_a_call_takes_part_in_a_result_in_progress_that_it_joins():
    maker = Maker()
    with ThreadPoolExecutor(4) as pool:
        kept = ResultCache(pool, most=8, room=10)
        calls = [
            asyncio.create_task(kept(key, maker.making(key), lambda other: other < "z"))
            for key in ("old", "new", "newer")
        ]
        await asyncio.sleep(0)
        alone = asyncio.create_task(kept("alone", maker.making("alone")))
        await asyncio.sleep(0)
        maker.open.set()
        assert await asyncio.gather(*calls) == ["old"] * 3
        assert await alone == "alone"
        assert sorted(maker.made) == ["alone", "old"]
        assert await kept("new", maker.making("new"), lambda _: True) == "new"
        assert await kept("old", maker.making("again"), lambda _: True) == "old"


async def test_requests_beyond_the_room_are_refused_and_failures_are_not_kept():
    maker = Maker()
    with ThreadPoolExecutor(1) as pool:
        kept = ResultCache(pool, most=8, room=2)
        calls = [asyncio.create_task(kept(key, maker.making(key))) for key in "abab"]
        await asyncio.sleep(0)
        with pytest.raises(Problem) as refused:
            await kept("c", maker.making("c"))
        assert refused.value.status_code == 503
        assert int(refused.value.headers["Retry-After"]) >= 1
        maker.open.set()
        assert await asyncio.gather(*calls) == list("abab")
        assert await kept("c", maker.making("c")) == "c"
        for _ in range(2):
            with pytest.raises(InputError):
                await kept("d", maker.making("bad"))
        assert maker.made[-2:] == ["bad", "bad"]


async def test_results_that_nobody_can_ask_for_are_dropped():
    maker = Maker()
    maker.open.set()
    useful = {"old"}
    with ThreadPoolExecutor(1) as pool:
        kept = ResultCache(pool, most=8, room=2, useful=useful.__contains__)
        await kept("old", maker.making("old"))
        useful.symmetric_difference_update({"old", "new"})
        assert await kept("new", maker.making("new")) == "new"
        assert list(kept._results) == ["new"]
