"""One writer at a time, on a disk and in a bucket, with killed, stopped and disconnected holders."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import buckets
import pytest
from conftest import SOAK

from retrieval_tip.errors import StoreError
from retrieval_tip.lance import lease
from retrieval_tip.lance.address import Address
from retrieval_tip.lance.objects import Objects

if TYPE_CHECKING:
    from obstore import UpdateVersion

pytestmark = pytest.mark.timeout(60)

bucket, place = buckets.bucket, buckets.place

needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="SKIPPED: needs SIGSTOP and SIGKILL")

APPENDS = 8 if SOAK else 5
"""Number of times that each of two processes appends to a list."""

WORKER = """
import os, sys, time
from retrieval_tip.lance import lease
from retrieval_tip.errors import StoreError
from retrieval_tip.lance.address import Address
from retrieval_tip.lance.objects import Objects

objects = Objects(Address.parse(sys.argv[1]))
seconds = float(sys.argv[2])

def say(text):
    print(text, flush=True)

def append(times):
    for _ in range(times):
        with lease.held(objects, 30, seconds) as own:
            for what in ("begins", "ends"):
                before = objects.get("list") if "list" in objects.names() else b""
                time.sleep(0.005)
                own()
                objects.put("list", before + f"{os.getpid()} {what}\\n".encode())

def hold():
    with lease.held(objects, 10, seconds) as own:
        say("held")
        while "end" not in (order := sys.stdin.readline()) and order:
            try:
                own()
                say("still held")
            except StoreError as error:
                say(error)
    say("left")

append(int(sys.argv[3])) if len(sys.argv) > 3 else hold()
"""


class Holder:
    """A process that holds the lease until it reads ``end``."""

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


def at(place: str) -> Objects:
    address = Address.parse(place)
    assert address is not None
    return Objects(address)


def take(place: str, wait: float = 0.0, seconds: float | None = None) -> AbstractContextManager[Callable[[], None]]:
    return lease.held(at(place), wait, seconds)


def refused(place: str, wait: float = 0.0, seconds: float | None = None) -> str:
    with pytest.raises(StoreError) as caught, take(place, wait, seconds):
        pass
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(place)
    return message


# ---------------------------------------------------------------------------------------------------- disk and bucket


def test_the_lease_is_released_after_success_and_any_exception(place: str):
    with take(place) as own:
        own()
    errors: list[type[BaseException]] = [ValueError, KeyboardInterrupt, SystemExit]
    for error in errors:
        with pytest.raises(error), take(place):
            raise error
    with take(place) as own:
        own()


def test_the_error_names_the_current_holder(place: str):
    with take(place):
        began = time.monotonic()
        message = refused(place, 0.3)
        assert 0.3 <= time.monotonic() - began < 3
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    assert message == f"{place}: is being written by {owner}; try later"


def test_processes_that_append_to_a_list_do_not_interleave(place: str):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, place, "20", str(APPENDS)]) for _ in range(2)]
    for worker in workers:
        assert worker.wait(40) == 0
    lines = at(place).get("list").decode().split("\n")[:-1]
    assert len(lines) == 2 * 2 * APPENDS
    for begins, ends in zip(lines[::2], lines[1::2], strict=True):
        assert (begins.split()[1], ends.split()[1]) == ("begins", "ends")
        assert begins.split()[0] == ends.split()[0]
    assert {line.split()[0] for line in lines} == {str(worker.pid) for worker in workers}


@needs_signals
def test_after_a_kill_the_next_writer_gets_the_lease(place: str):
    with holder(place, 1.0) as first:
        assert f"process {first.pid} on " in refused(place)
        first.signal(signal.SIGKILL)
        began = time.monotonic()
        with take(place, 10, 1.0) as own:
            took = time.monotonic() - began
            own()
        assert took < 5 if place.startswith("lance") else 0.9 < took < 8


# -------------------------------------------------------------------------------------------------------------- disk


@needs_signals
def test_a_stopped_process_keeps_its_lease_on_a_disk(tmp_path: Path):
    place = f"lance://{tmp_path}/x"
    with holder(place, 0.2) as first:
        first.signal(signal.SIGSTOP)
        assert f"process {first.pid} on " in refused(place, 0.6)
        first.signal(signal.SIGCONT)
        assert first.ask("look") == "still held"
        assert first.ask("end") == "left"
    with take(place):
        pass


def test_disk_errors_are_one_line(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be written" in refused(f"lance://{tmp_path}/file/x")
    (tmp_path / "x" / "lock").mkdir(parents=True)
    assert "cannot be written" in refused(f"lance://{tmp_path}/x")


# ------------------------------------------------------------------------------------------------------------- bucket


@needs_signals
def test_a_stopped_process_loses_its_lease_in_a_bucket(bucket: str):
    with holder(bucket, 1.0) as first:
        assert first.ask("look") == "still held"
        first.signal(signal.SIGSTOP)
        with take(bucket, 10, 1.0) as own:
            first.signal(signal.SIGCONT)
            answer = first.ask("look")
            assert answer.startswith(
                f"{bucket}: lost the right to write (it was taken over by process {os.getpid()} on "
            )
            time.sleep(0.6)  # the first holder no longer renews the lease
            own()
        assert "lost the right to write" in first.ask("look")
        assert first.ask("end") == "left"
    with take(bucket, 0.0, 1.0) as own:
        own()
        assert at(bucket).names() == [lease.NAME]


def test_a_running_process_keeps_its_lease(bucket: str):
    with take(bucket, 0.0, 1.2) as own:
        assert "is being written by" in refused(bucket, 1.6, 1.2)
        own()


def content(**what: object) -> bytes:
    return json.dumps({"owner": "process 1 on mars", "beat": 1, "released": False} | what).encode()


def test_the_lease_is_one_object_that_names_its_holder(bucket: str):
    objects = at(bucket)
    objects.put(lease.NAME, content(released=True))
    for _ in range(2):
        with take(bucket):
            assert objects.names() == [lease.NAME]
            held = json.loads(objects.get(lease.NAME))
            assert held["owner"] == f"process {os.getpid()} on {socket.gethostname()}"
            assert held["released"] is False
        assert json.loads(objects.get(lease.NAME))["released"] is True


@pytest.mark.parametrize("damaged", [b"\xff", b"[" * 10000, b'{"owner": 5, "released": "yes"}'])
def test_a_damaged_lease_expires_like_that_of_a_dead_process(damaged: bytes, bucket: str):
    at(bucket).put(lease.NAME, damaged)
    assert "is being written by another process" in refused(bucket, 0.0, 0.3)
    with take(bucket, 5, 0.3):
        pass


def test_a_slow_writer_does_not_take_a_lease_that_another_holds(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects = at(bucket)
    objects.put(lease.NAME, content(released=True))
    slow = at(bucket)
    read, stale = slow.read, iter([slow.read(lease.NAME)])
    with take(bucket) as other:
        monkeypatch.setattr(slow, "read", lambda name, most=None: next(stale, None) or read(name, most))
        with pytest.raises(StoreError, match="is being written by"), lease.held(slow, 0.5):
            pass
        other()


def test_an_unacknowledged_write_of_the_lease_counts(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects = at(bucket)
    replace, calls = objects.replace, list[bytes]()

    def unsaid(name: str, data: bytes, version: UpdateVersion | None) -> None:
        calls.append(data)
        replace(name, data, version)

    monkeypatch.setattr(objects, "replace", unsaid)
    with lease.held(objects, 0, 0.8) as own:
        own()
        assert "is being written by" in refused(bucket, 0.0, 0.8)
        until = time.monotonic() + 10
        while len(calls) < 3 and time.monotonic() < until:  # renewals are not acknowledged either
            time.sleep(0.02)
        own()
    assert len(calls) >= 3


def test_a_disconnected_holder_loses_its_lease_for_good(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects = at(bucket)
    replace = objects.replace

    def cut(name: str, data: bytes, version: UpdateVersion | None) -> None:
        raise StoreError("cannot connect to 127.0.0.1:9")

    with lease.held(objects, 0, 0.2) as own:
        monkeypatch.setattr(objects, "replace", cut)
        time.sleep(0.5)
        monkeypatch.setattr(objects, "replace", replace)
        for _ in range(2):  # it stays lost after the connection returns
            with pytest.raises(StoreError, match=r"could not be renewed: cannot connect.*nothing changed"):
                own()


def test_an_unreachable_service_is_an_error_for_holders_and_others(bucket: str, monkeypatch: pytest.MonkeyPatch):
    objects = at(bucket)

    def cut(name: str, most: int | None = None) -> tuple[bytes, UpdateVersion]:
        raise StoreError("cannot connect to 127.0.0.1:9")

    with lease.held(objects, 0) as own:
        with monkeypatch.context() as patch:
            patch.setattr(objects, "read", cut)
            with pytest.raises(StoreError, match="cannot connect"):
                own()
            with pytest.raises(StoreError, match="cannot connect"), lease.held(objects, 0):
                pass
        own()
    assert "no such bucket" in refused("s3://no-such-bucket/x")
