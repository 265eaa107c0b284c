"""Arguments have bounds, and memory is estimated before it is allocated."""

import subprocess
import sys

import numpy as np
import pytest

from retrieval_tip import machine
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import few_shot
from retrieval_tip.errors import MANY, MOST, UsageError, check_count
from retrieval_tip.machine import check_memory, memory
from retrieval_tip.settings import Recipe


@pytest.mark.parametrize("name", [*MOST, "anything"])
def test_a_count_is_a_whole_number_within_its_bounds(name):
    most = MOST.get(name, MANY)
    for good in (1, most, np.int32(1)):
        check_count(name, good)
    for bad in (0, -1, most + 1, 2**63, 10**5000, 1.5, float("nan"), float("inf"), "1", None):
        with pytest.raises(UsageError, match=f"^{name} is "):
            check_count(name, bad)
    with pytest.raises(UsageError, match=f"^{name} is 1: .* from 2 "):
        check_count(name, 1, 2)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(
            (name, lambda value, name=name: Reader(**{name: value}))
            for name in ("views", "batch_size", "workers")
        ),
        ("epochs", lambda value: Recipe(epochs=value)),
        ("seed", lambda value: Recipe(seed=value)),
        ("shots", lambda value: few_shot(["a"], value)),
    ],
)
def test_counts_that_use_memory_are_bounded_in_python(name, make):
    for value in (2**31, 2**63) if name != "seed" else (2**63, 2**64):
        with pytest.raises(UsageError, match=f"^{name} is "):
            make(value)


def test_an_allocation_beyond_the_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 24 << 30)
    check_memory(24 << 30, "this", "ask for less")
    with pytest.raises(
        UsageError, match=r"^this: needs 10,000\.0 GB .* 25\.8 GB .*; ask for less$"
    ):
        check_memory(10**13, "this", "ask for less")
    check_memory(0, "this", "ask for less")
    monkeypatch.setattr(machine, "memory", lambda: None)
    check_memory(10**30, "this", "ask for less")  # the size of the memory is unknown


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SKIPPED: needs Linux")
def test_the_smallest_memory_limit_applies(monkeypatch, tmp_path):
    whole = memory()
    assert whole > 1 << 26
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 41)); r.setrlimit(r.RLIMIT_AS, (1 << 29, 1 << 40))"  # noqa: E501
    code += "; from retrieval_tip.machine import memory; print(memory())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) == 1 << 29
    (tmp_path / "memory.max").write_text(f"{1 << 25}\n")
    (tmp_path / "no limit").write_text("max\n")
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "gone"), str(tmp_path / "no limit")))
    assert memory() == whole or memory() > whole
    monkeypatch.setattr(machine, "_LIMITS", (str(tmp_path / "memory.max"),))
    assert memory() == 1 << 25


def test_shots_beyond_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: 1 << 20)
    assert len(few_shot(["a", "b"], 1000)) == 2000
    with pytest.raises(UsageError, match=r"^1000000 shots of 2 classes: "):
        few_shot(["a", "b"], 1_000_000)
