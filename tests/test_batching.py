"""Waiting requests are processed together and in turn by client, within limits."""

import asyncio
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager

import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip.errors import InputError
from retrieval_tip.server.batching import Kept, Lane, admit
from retrieval_tip.server.problems import Problem

pytestmark = pytest.mark.anyio  # the plugin of anyio runs coroutines


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Gate:
    """A batch function that waits until the gate opens, and records its batches."""

    def __init__(self):
        self.open = threading.Event()
        self.batches = []

    def __call__(self, key, items):
        assert self.open.wait(30)
        self.batches.append((key, items))
        return [f"{key}{item}" for item in items]


@asynccontextmanager
async def occupied(gate, most):
    """Yield a lane that is busy with a first request until the gate opens."""
    lane = Lane("test", gate, most=lambda _: most)
    yield lane, await asked(lane, "a", [0])
    lane.close()


async def asked(lane, key, items, client=""):
    """Send a request to a lane, and return the task that waits for its answer."""
    task = asyncio.create_task(lane(client, key, items))
    await asyncio.sleep(0)
    return task


async def test_waiting_requests_become_one_batch_unless_they_are_cancelled():
    gate = Gate()
    async with occupied(gate, 100) as (lane, first):
        gone, *others = [await asked(lane, "a", [i, -i], f"client {i}") for i in range(11)]
        gone.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        assert await first == ["a0"]
        assert await asyncio.gather(*others) == [[f"a{i}", f"a{-i}"] for i in range(1, 11)]
        assert not lane.waiting
    assert gate.batches == [("a", [0]), ("a", [x for i in range(1, 11) for x in (i, -i)])]


@given(
    calls=st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=4)), max_size=30),
    most=st.integers(1, 8),
)
@settings(max_examples=examples(50), deadline=None)
def test_each_request_gets_its_own_answer(calls, most):
    seen = []

    def run(key, items):
        seen.append((key, len(items)))
        return [f"{key}{item}" for item in items]

    async def ask():
        lane = Lane("test", run, most=lambda _: most)
        answers = await asyncio.gather(
            *(lane(f"client {i % 3}", key, items, len(items)) for i, (key, items) in enumerate(calls))
        )
        lane.close()
        return answers

    assert asyncio.run(ask()) == [[f"{key}{item}" for item in items] for key, items in calls]
    assert sum(size for _, size in seen) == sum(len(items) for _, items in calls)
    assert all(size <= max(most, 4) for _, size in seen)


async def test_an_error_only_reaches_its_own_request():
    def run(_, items):
        if 13 in items:
            raise InputError("no such thing")
        return items

    lane = Lane("test", run, most=lambda _: 100)
    calls = [lane("", key, [i, i]) for i in range(20) for key in "ab" if (i, key) != (13, "b")]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(found.pop(26), InputError)
    assert found == [[i, i] for i in range(20) if i != 13 for _ in "ab"]
    lane.close()


class Calls:
    """Calls that record the order in which they start, and wait until they may finish."""

    def __init__(self):
        self.began = []
        self.gates = defaultdict(threading.Event)

    def __call__(self, _, names):
        self.began += names
        for name in names:
            assert self.gates[name].wait(30)
        return names

    def finish(self, names):
        for name in names:
            self.gates[name].set()


def turns(lane, client, names, *costs):
    """Queue turns of one item each, named by one letter."""
    return lane.turns(client, "", [[name] for name in names], costs)


async def test_a_small_turn_does_not_wait_for_large_ones():
    calls = Calls()
    lane = Lane("test", calls, threads=2)
    with turns(lane, "one", "abc", 9, 9, 9) as large, turns(lane, "two", "d", 1) as small:
        calls.finish("d")
        assert await small[0].result == ["d"]
        assert set(calls.began) == set("abd")
        calls.finish("abc")
        assert [await turn.result for turn in large] == [["a"], ["b"], ["c"]]
    lane.close()


async def test_turns_start_in_the_order_of_their_clients_total_cost():
    """A second request of a client comes after its first one, however small it is."""
    calls = Calls()
    lane = Lane("test", calls)
    with ExitStack() as stack:
        own = []
        for client, names, *costs in (
            ("zero", "z", 1.0),  # starts first, and all other costs are counted from its place
            ("one", "abc", 1.5, 1.5, 1.5),
            ("two", "de", 1.0, 1.0),
            ("three", "f", 1.2),
            ("two", "g", 0.1),
        ):
            own += stack.enter_context(turns(lane, client, names, *costs))
        calls.finish("abcdefgz")
        await asyncio.gather(*(turn.result for turn in own))
    lane.close()
    assert "".join(calls.began) == "zdfaegbc"


async def test_a_client_is_refused_only_if_it_fills_more_than_a_quarter_of_the_queue():
    calls = Calls()
    lanes = [Lane("test", calls) for _ in range(2)]
    with ExitStack() as stack:

        def wait(client, names, *costs):
            admit(client, 40, *lanes)
            stack.enter_context(turns(lanes[len(names) % 2], client, names, *costs))

        wait("first", "a", 50)  # this turn starts, so it does not wait
        wait("first", "bcd", 2, 3, 5)
        wait("first", "ef", 90, 90)  # this is more than a quarter, but it began with less
        with pytest.raises(Problem) as refused:
            wait("first", "g", 0.1)
        assert refused.value.status_code == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        for number in range(100):
            wait(f"client {number}", "hi", 20, 20)
        calls.finish("abcdefghi")
    admit("first", 40, *lanes)
    for lane in lanes:
        lane.close()


async def test_results_are_held_until_released_and_the_rest_is_cancelled():
    calls = Calls()
    lane = Lane("test", calls, threads=4, held=2)
    with turns(lane, "", "abcd", 1, 1, 1, 1) as own:
        calls.finish("abcde")
        assert [await turn.result for turn in own[:2]] == [["a"], ["b"]]
        await asyncio.sleep(0.05)
        assert sorted(calls.began) == ["a", "b"]  # the lane holds two results
        lane.release(own[0])
        assert await own[2].result == ["c"]
    assert own[3].result.cancelled()
    with turns(lane, "", "e", 1) as later:
        assert await later[0].result == ["e"]
    lane.close()
    assert "d" not in calls.began


class Maker:
    """A maker of values that waits until it is opened, and records what it made."""

    def __init__(self):
        self.open, self.made = threading.Event(), []

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
        kept = Kept(pool, most=8, room=10, size=len)
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


async def test_requests_beyond_the_room_are_refused_and_failures_are_not_kept():
    maker = Maker()
    with ThreadPoolExecutor(1) as pool:
        kept = Kept(pool, most=8, room=2)
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
