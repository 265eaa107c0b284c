"""One writer at a time: on a disk and in a bucket, with holders that are killed, stopped and cut off."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import buckets
import pytest

from retrieval_tip.errors import StoreError
from retrieval_tip.lance import lease
from retrieval_tip.lance.lease import Lease
from retrieval_tip.lance.objects import Address, Objects

pytestmark = pytest.mark.timeout(60)

bucket, place = buckets.bucket, buckets.place

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="SKIPPED: needs SIGSTOP and SIGKILL")

WORKER = """
import os, sys, time
from retrieval_tip.lance import lease
from retrieval_tip.errors import StoreError
from retrieval_tip.lance.objects import Address, Objects

address = Address.parse(sys.argv[1])
objects = Objects.at(address)
lease.LEASE = float(sys.argv[2])

def say(text):
    print(text, flush=True)

def append(times):
    for _ in range(times):
        with lease.held(objects, address, 30) as own:
            for what in ("begins", "ends"):
                before = objects.get("list") if "list" in objects.names() else b""
                time.sleep(0.005)
                own.still_held()
                objects.put("list", before + f"{os.getpid()} {what}\\n".encode())

def hold():
    with lease.held(objects, address, 10) as own:
        say("held")
        while "end" not in (order := sys.stdin.readline()) and order:
            try:
                own.still_held()
                say("still held")
            except StoreError as error:
                say(error)
    say("left")

append(int(sys.argv[3])) if len(sys.argv) > 3 else hold()
"""


class Holder:
    """A process that holds the lease until it is told to end."""

    def __init__(self, place: str, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, place, str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self.read() == "held"

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, order: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self.read()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=20)


@contextmanager
def holder(place: str, seconds: float) -> Iterator[Holder]:
    found = Holder(place, seconds)
    try:
        yield found
    finally:
        found.close()


def at(place: str) -> tuple[Objects, Address]:
    address = Address.parse(place)
    assert address is not None
    return Objects.at(address), address


def take(place: str, wait: float = 0.0) -> AbstractContextManager[Lease]:
    return lease.held(*at(place), wait)


def refused(place: str, wait: float = 0.0) -> str:
    with pytest.raises(StoreError) as caught, take(place, wait):
        pass
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(place)
    return message


# -------------------------------------------------------------------------------------------------------------- both


def test_it_is_free_again_whatever_ends_it(place: str):
    with take(place) as own:
        own.still_held()
    errors: list[type[BaseException]] = [ValueError, KeyboardInterrupt, SystemExit]
    for error in errors:
        with pytest.raises(error), take(place):
            raise error
    with take(place) as own:
        own.still_held()


def test_another_one_is_told_who_writes(place: str):
    with take(place):
        began = time.monotonic()
        message = refused(place, 0.3)
        assert 0.3 <= time.monotonic() - began < 3
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert message == f"{place}: is being written by {owner}; try later"


def test_another_one_gets_it_when_it_is_free(place: str):
    got = threading.Event()

    def second() -> None:
        with take(place, 10):
            got.set()

    thread = threading.Thread(target=second)
    with take(place):
        thread.start()
        assert not got.wait(0.3)
    thread.join(10)
    assert got.is_set()


def test_processes_that_append_to_a_list_do_not_interleave(place: str):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, place, "20", "8"]) for _ in range(2)]
    for worker in workers:
        assert worker.wait(40) == 0
    lines = at(place)[0].get("list").decode().split("\n")[:-1]
    assert len(lines) == 2 * 2 * 8
    for begins, ends in zip(lines[::2], lines[1::2], strict=True):
        assert (begins.split()[1], ends.split()[1]) == ("begins", "ends")
        assert begins.split()[0] == ends.split()[0]
    assert {line.split()[0] for line in lines} == {str(worker.pid) for worker in workers}


@needs_signals
def test_after_a_kill_the_next_one_gets_it(place: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE", 1.0)
    with holder(place, 1.0) as first:
        assert f"process {first.pid} on " in refused(place)
        first.signal(signal.SIGKILL)
        began = time.monotonic()
        with take(place, 10) as own:
            took = time.monotonic() - began
            own.still_held()
        assert took < 5 if place.startswith("lance") else 0.9 < took < 8


# -------------------------------------------------------------------------------------------------------------- disk


@needs_signals
def test_on_a_disk_a_stopped_holder_holds_it(tmp_path: Path):
    place = f"lance://{tmp_path}/x"
    with holder(place, 0.2) as first:
        first.signal(signal.SIGSTOP)
        assert f"process {first.pid} on " in refused(place, 0.6)
        first.signal(signal.SIGCONT)
        assert first.ask("look") == "still held"
        assert first.ask("end") == "left"
    with take(place):
        pass


def test_on_a_disk_errors_are_one_line(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be locked" in refused(f"lance://{tmp_path}/file/x")
    (tmp_path / "x" / "lock").mkdir(parents=True)
    assert "cannot be locked" in refused(f"lance://{tmp_path}/x")


# ------------------------------------------------------------------------------------------------------------- bucket


@needs_signals
def test_a_stopped_holder_finds_that_it_lost_it(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE", 1.0)
    with holder(bucket, 1.0) as first:
        assert first.ask("look") == "still held"
        first.signal(signal.SIGSTOP)
        with take(bucket, 10) as own:
            first.signal(signal.SIGCONT)
            said = first.ask("look")
            assert said.startswith(f"{bucket}: lost the right to write (it was taken over by process {os.getpid()} on ")
            time.sleep(0.6)  # it gives no sign of life any more
            own.still_held()
        assert "lost the right to write" in first.ask("look")
        assert first.ask("end") == "left"
    with take(bucket) as own:
        own.still_held()
        assert len(at(bucket)[0].names("lock")) == 1


def test_a_living_holder_keeps_it(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE", 1.2)
    with take(bucket) as own:
        assert "is being written by" in refused(bucket, 1.6)
        own.still_held()


def link(number: int, **what: object) -> tuple[str, bytes]:
    return f"lock/{number:08d}", json.dumps(
        {"owner": "process 1 on mars", "beat": 1, "released": False} | what
    ).encode()


def test_numbers_go_on_and_old_ones_are_removed(bucket: str):
    objects, _ = at(bucket)
    objects.put(*link(16))
    objects.put(*link(17, released=True))
    with take(bucket):
        assert objects.names("lock") == ["lock/00000018"]
        assert json.loads(objects.get("lock/00000018"))["released"] is False
    assert json.loads(objects.get("lock/00000018"))["released"] is True
    with take(bucket):
        assert objects.names("lock") == ["lock/00000019"]


@pytest.mark.parametrize("content", [b"\xff", b"[" * 10000, b'{"owner": 5, "released": "yes"}'])
def test_a_damaged_lease_ends_as_that_of_a_dead_holder(content: bytes, bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE", 0.3)
    at(bucket)[0].put("lock/00000003", content)
    assert "is being written by another process" in refused(bucket)
    with take(bucket, 5):
        pass


def test_an_owner_cannot_write_to_the_terminal(bucket: str):
    at(bucket)[0].put(*link(1, owner="\x1b[2Jä\n" * 500))
    assert len(refused(bucket)) < 1500


def test_who_was_slow_and_creates_a_removed_number_does_not_hold_it(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects, address = at(bucket)
    objects.put(*link(17, released=True))
    with take(bucket):
        pass
    with take(bucket) as other:  # holds 19, and has removed 17 and 18
        slow, _ = at(bucket)
        names, get = slow.names, slow.get
        stale = iter([["lock/00000017"]])
        monkeypatch.setattr(slow, "names", lambda folder: next(stale, None) or names(folder))
        seen = iter([link(17, released=True)[1]])
        monkeypatch.setattr(slow, "get", lambda name, most=None: next(seen, None) or get(name, most))
        with pytest.raises(StoreError, match="is being written by"), lease.held(slow, address, 0.5):
            pass
        other.still_held()
        assert names("lock") == ["lock/00000019"]


def test_what_the_server_kept_but_did_not_acknowledge_is_held(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects, address = at(bucket)
    create = objects.create
    monkeypatch.setattr(objects, "create", lambda name, data: create(name, data) and False)
    with lease.held(objects, address, 0) as own:
        own.still_held()
        assert "is being written by" in refused(bucket)

    def fail(name: str, data: bytes) -> bool:
        create(name, data)
        raise StoreError("cut off")

    monkeypatch.setattr(objects, "create", fail)
    with pytest.raises(StoreError, match="cut off"), lease.held(objects, address, 0):
        pass
    with take(bucket):  # it was released, so this one waits for nothing
        pass


def test_an_interrupt_while_it_is_taken_releases_only_what_is_its_own(bucket: str, monkeypatch: pytest.MonkeyPatch):
    for mine in (True, False):
        objects, address = at(bucket)
        create = objects.create

        def interrupted(
            name: str, data: bytes, create: Callable[[str, bytes], bool] = create, own: bool = mine
        ) -> bool:
            create(name, data if own else link(1)[1])
            raise KeyboardInterrupt

        monkeypatch.setattr(objects, "create", interrupted)
        with pytest.raises(KeyboardInterrupt), lease.held(objects, address, 0):
            pass
        if mine:
            with take(bucket):
                pass
        else:
            assert "process 1 on mars" in refused(bucket)


def test_a_holder_that_is_cut_off_lost_it(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE", 0.4)
    objects, address = at(bucket)
    put = objects.put

    def cut(name: str, data: bytes) -> None:
        raise StoreError("cannot connect to 127.0.0.1:9")

    with lease.held(objects, address, 0) as own:
        monkeypatch.setattr(objects, "put", cut)
        time.sleep(1.0)
        monkeypatch.setattr(objects, "put", put)
        for _ in range(2):  # and it stays lost, whatever comes back
            with pytest.raises(StoreError, match=r"could not be renewed: cannot connect.*nothing was changed"):
                own.still_held()


def test_a_short_cut_does_no_harm(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "LEASE", 1.2)
    objects, address = at(bucket)
    put, calls = objects.put, list[str]()

    def flaky(name: str, data: bytes) -> None:
        calls.append(name)
        if len(calls) == 1:
            raise StoreError("cannot connect to 127.0.0.1:9")
        put(name, data)

    monkeypatch.setattr(objects, "put", flaky)
    with lease.held(objects, address, 0) as own:
        until = time.monotonic() + 10
        while len(calls) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        own.still_held()
    assert len(calls) >= 3


def test_a_service_that_cannot_be_asked_is_an_error_for_all(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects, address = at(bucket)

    def cut(folder: str) -> list[str]:
        raise StoreError("cannot connect to 127.0.0.1:9")

    with lease.held(objects, address, 0) as own:
        with monkeypatch.context() as patch:
            patch.setattr(objects, "names", cut)
            with pytest.raises(StoreError, match="cannot connect"):
                own.still_held()
            with pytest.raises(StoreError, match="cannot connect"), lease.held(objects, address, 0):
                pass
        own.still_held()
    assert "no such bucket" in refused("s3://no-such-bucket/x")
