"""The demo works in a bare clone, without the shared data."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.soak


def test_demo_without_shared_data(tmp_path):
    command = [
        sys.executable,
        "benchmarks/demo.py",
        "--work",
        str(tmp_path / "demo"),
        "--shared",
        str(tmp_path / "none"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stdout  # it says what it is
    assert "64 keys of 256, 8 classes" in done.stdout
    assert done.stdout.count("affinity") >= 8
    top1 = next(line for line in done.stdout.splitlines() if line.startswith("top1"))
    assert float(top1.split()[1]) > 0.5  # one in eight by chance
