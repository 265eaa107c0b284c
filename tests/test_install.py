"""What an installer makes of the project's requirements, by asking the registry: only ``make soak`` does."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("uv") is None,
        reason="SKIPPED: uv is not installed, so nothing is resolved: pip install uv",
    ),
]

PYTHONS = ("3.11", "3.12", "3.13")
UNREACHABLE = re.compile("error sending request|Failed to fetch|dns error|Connection refused|timed out")


def resolved(place: Path, python: str, *constraints: str) -> dict[str, str] | None:
    """Versions by name of what would be installed on Linux x86-64; ``None`` where nothing fits."""
    bounds = place / "constraints.txt"
    bounds.write_text("\n".join(constraints))
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--no-annotate", "--no-header"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "-c", str(bounds)]
    done = subprocess.run([*command, str(ROOT / "pyproject.toml")], capture_output=True, text=True, timeout=200)
    if done.returncode:
        if UNREACHABLE.search(done.stderr):
            pytest.skip(f"SKIPPED: the package registry does not answer: {done.stderr.strip().splitlines()[-1]}")
        assert "No solution found" in done.stderr
        return None
    return dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)


def minor(version: str) -> tuple[int, int]:
    return tuple(map(int, version.split(".")[:2]))  # type: ignore[return-value]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_torch_that_is_allowed_goes_with_faiss_on_a_gpu(python: str, tmp_path: Path) -> None:
    newest = resolved(tmp_path, python)
    assert newest is not None
    found = []
    for number in range(7, minor(newest["torch"])[1] + 1):
        versions = resolved(tmp_path, python, f"torch==2.{number}.*")
        assert versions is not None, f"torch 2.{number} on Python {python}"
        assert minor(versions["faiss-gpu"]) >= (1, 15)
        assert minor(versions["torchvision"]) >= (0, 22)
        found.append(minor(versions["torch"]))
    assert found[0] == (2, 7)
    assert found[-1] == minor(newest["torch"])


def test_an_older_torch_does_not(tmp_path: Path) -> None:
    """Which is why the bound is where it is: both pin CUDA's libraries."""
    assert resolved(tmp_path, "3.12", "torch==2.6.*") is None
    text = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.7"' in text
    wanted = tmp_path / "wanted.txt"
    wanted.write_text("torch==2.6.*\nfaiss-gpu>=1.15.1,<2\n")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--python-version", "3.12"]
    command += ["--python-platform", "x86_64-manylinux_2_28", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode
    told = " ".join(done.stderr.split())
    assert re.search(r"faiss-gpu\S* depends on nvidia-", told)
    assert "torch==2.6.0 depends on nvidia-" in told
