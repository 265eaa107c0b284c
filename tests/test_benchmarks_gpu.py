"""The GPU benchmark at a toy size on a CPU: every side is there, and the table lands in its place of the page."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, needs_shared

pytestmark = [pytest.mark.soak, needs_shared]


def test_every_side_is_measured_and_the_page_keeps_what_else_it_says(tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text("# How fast\n\nBefore.\n")
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--rounds", 1, "--out", page]
    command += ["--size", 320, 32, 16, "--queries", 1, "--queries", 20]
    command += ["--training", 20, 8, 32, "--epochs", 1, "--photographs", 4]
    for _ in range(2):
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("# How fast\n\nBefore.\n")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert done.stdout.strip() in text
    assert len({len(line) for line in lines}) == 1
    sides = [(line[0].removeprefix("| "), line[1]) for line in lines[2:]]
    assert len(set(sides)) == len(sides) == 2 * 5 + 5 + 4 + 2
    assert all(float(line[2]) > 0 for line in lines[2:])
