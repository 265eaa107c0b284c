"""The campaign of hostile inputs: that it counts every kind of failure, and tries every area."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from attack import DAMAGED, LONGEST, judged
from hostile import AREAS, Case

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SKIPPED: it needs forks and /proc"),
]

TRACEBACK = "Traceback (most recent call last):\n  File x\nValueError: y\n"
REQUEST = Case(sends=[b"GET / HTTP/1.1\r\n\r\n"])
TERMINATED = Case(signals=[(0.1, 15)])
FEW = """
import sys
sys.path.insert(0, "benchmarks")
from dataclasses import replace
import attack
attack.AREAS = {name: replace(area, tries=3) for name, area in attack.AREAS.items() if not area.images}
attack.main()
"""
PLANTED = """
import os, signal, sys, time
sys.path.insert(0, "benchmarks")
import attack
from hostile import Area, Case

def fails(): raise ValueError("planted")
def ends_otherwise(): sys.exit(7)
def crashes(): os.kill(os.getpid(), signal.SIGSEGV)
def hangs(): time.sleep(60)
def grows(): time.sleep(len(bytearray(os.urandom(1)) * (200 << 20)) and 0.3)
def shouts(): sys.stderr.write("\\x1b[31m"); sys.exit(1)
def refuses(): sys.stderr.write("Error: no\\n"); sys.exit(1)
def waits(): time.sleep(3)
def ends_by_signal(): signal.raise_signal(signal.SIGTERM)
def bursts(): time.sleep(len(bytearray(os.urandom(1)) * (400 << 20)) and 60)

calls = [fails, ends_otherwise, crashes, hangs, grows, shouts, refuses, bursts, waits, ends_by_signal]
more = {waits: {"limit": 3.0}, ends_by_signal: {"signals": [(0, signal.SIGTERM)]}}
cases = iter([Case(call=call, **more.get(call, {})) for call in calls])
attack.HANG, attack.MOST, attack.KILLED, attack.make_world = 2.0, 100 << 20, 300 << 20, lambda chosen: None
attack.AREAS = {"planted": Area(lambda rng: next(cases), len(calls))}
attack.main()
"""


def run(script: str, place: Path) -> tuple[int, str]:
    environment = os.environ | {"TMPDIR": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def rows(report: str) -> dict[str, list[int]]:
    """Numbers of the table, by area: tried, tracebacks, wrong exit status, hangs, peak memory."""
    found = re.findall(r"^\| ([a-z ]+) \|((?: [\d,]+ \|){5})$", report, re.M)
    return {name: [int(cell.replace(",", "")) for cell in cells.split("|")[:-1]] for name, cells in found}


def test_every_kind_of_failure_is_counted_and_named(tmp_path: Path) -> None:
    status, report = run(PLANTED, tmp_path)
    assert status == 1
    *counts, peak = rows(report)["planted"]
    assert counts == [10, 1, 3, 1]
    assert 300 < peak < 400  # it was ended in time
    failed = dict(re.findall(r"^(planted-\d): ([a-z ]+):", report, re.M))
    assert failed == {
        "planted-0": "tracebacks", "planted-1": "wrong exit status", "planted-2": "wrong exit status",
        "planted-3": "hangs", "planted-4": "memory", "planted-5": "wrong exit status", "planted-7": "memory",
    }  # fmt: skip


def test_areas_that_need_no_backbone_are_tried(tmp_path: Path) -> None:
    status, report = run(FEW, tmp_path)
    found = rows(report)
    assert found.keys() == {name for name, area in AREAS.items() if not area.images}
    assert all(tried == 3 for tried, *_ in found.values())
    assert status == any(any(counts) for _, *counts, _ in found.values()) or "memory:" in report
    assert len(re.findall(r"^    bash /\S+/again.sh  # ", report, re.M)) == report.count("/again.sh")


@pytest.mark.parametrize(
    ("case", "status", "said", "column"),
    [
        (Case(), 0, ("", "warning: x\n"), None),
        (Case(), 3, ("", ""), None),
        (Case(), 1, ("", TRACEBACK), "tracebacks"),
        (Case(), 0, ("", "Exception ignored in: <x>\nValueError: y\n"), "tracebacks"),
        (Case(), 4, ("", ""), "wrong exit status"),
        (Case(), -11, ("", ""), "wrong exit status"),
        (Case(), 143, ("", ""), "wrong exit status"),
        (TERMINATED, 143, ("", ""), None),
        (Case(["serve", "x"]), 143, ("", ""), None),
        (Case(["serve", "x"]), 130, ("", ""), "wrong exit status"),
        (TERMINATED, -15, ("", ""), None),
        (TERMINATED, 130, ("", ""), "wrong exit status"),
        (TERMINATED, DAMAGED, ("", ""), "wrong exit status"),
        (Case(bad=True), 0, ("", ""), "wrong exit status"),
        (Case(bad=True), 2, ("", ""), None),
        (Case(), 1, ("", "Error: " + "x" * LONGEST), "wrong exit status"),
        (Case(), 1, ("", "Error: \u202e"), "wrong exit status"),
        (Case(), 1, ("", "Error: \x9b"), "wrong exit status"),
        (REQUEST, 0, ("answer 404 b''\nhealth 200\n", ""), None),
        (REQUEST, 0, ("closed OSError\nhealth 200\n", ""), None),
        (REQUEST, 0, ("answer 503 b''\nhealth 200\n", ""), None),
        (REQUEST, 0, ("answer 500 b''\nhealth 200\n", ""), "wrong exit status"),
        (REQUEST, 0, ("answer 200 b''\n", ""), "wrong exit status"),
        (Case(sends=[b"x"], bad=True), 0, ("answer 201 b''\nhealth 200\n", ""), "wrong exit status"),
    ],
)
def test_how_a_try_ended_is_judged(case: Case, status: int, said: tuple[str, str], column: str | None) -> None:
    assert [*judged(case, status, *said, changed=False)] == ([column] if column else [])


@pytest.mark.parametrize(("status", "wrong"), [(0, False), (1, True), (2, True), (3, False)])
def test_a_failure_that_changes_the_index_is_one(status: int, wrong: bool) -> None:
    assert bool(judged(Case(), status, "", "", changed=True)) == wrong
