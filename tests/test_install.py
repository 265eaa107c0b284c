"""Resolving and installing the requirements from the registry; only ``make soak`` runs it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import tomllib
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


CORE = ("cli", "classifier", "serve", "server", "evaluate", "closed_form", "sources", "transformers", "estimator",
        "onnx", "plots", "images", "shards", "sql")  # fmt: skip
"""What has to pass with the lowest versions: build, classify, evaluate, fit and serve, and what each extra is for."""
LEFT = ("ycbcr", "predictions_are_read_where_their_memory_is_bounded")
"""Not tried: Pillow writes such a TIFF rightly from 13 on; a bomb may abort pyarrow, which is said in other words."""
EXTRAS = "serve,plot,sklearn,onnx,heic,hf"


def asked(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run uv. The test is skipped where the registry does not answer."""
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(f"SKIPPED: the package registry does not answer: {done.stderr.strip().splitlines()[-1]}")
    return done


def resolved(place: Path, python: str, *constraints: str, lowest: bool = False) -> dict[str, str] | None:
    """Versions by name of what would be installed on Linux x86-64; ``None`` where nothing fits."""
    bounds = place / "constraints.txt"
    bounds.write_text("\n".join(constraints))
    command = ["pip", "compile", "--no-config", "--quiet", "--no-annotate", "--no-header", "-c", bounds]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--resolution", "lowest-direct", "--all-extras"] if lowest else []
    done = asked(*command, ROOT / "pyproject.toml")
    if done.returncode:
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
    command = ["pip", "compile", "--no-config", "--quiet", "--python-version", "3.12"]
    done = asked(*command, "--python-platform", "x86_64-manylinux_2_28", wanted)
    assert done.returncode
    told = " ".join(done.stderr.split())
    assert re.search(r"faiss-gpu\S* depends on nvidia-", told)
    assert "torch==2.6.0 depends on nvidia-" in told


def test_every_requirement_has_a_lower_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(one for extra in extras.values() for one in extra)]:
        assert ">=" in requirement or requirement.startswith("retrieval-tip["), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_all_lower_bounds_go_together(python: str, tmp_path: Path) -> None:
    assert resolved(tmp_path, python, lowest=True) is not None


@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="SKIPPED: the lowest versions have no wheels for this Python")
def test_the_lowest_versions_do_the_main_job() -> None:
    """Every direct requirement at its lower bound, in an environment of its own: 5 GB, which go again."""
    with tempfile.TemporaryDirectory() as place:
        python, overrides = Path(place, "venv/bin/python"), Path(place, "overrides.txt")
        overrides.write_text("triton ; sys_platform == 'never'\n")  # PyPI's torch brings it for GPUs
        into = ("pip", "install", "--no-config", "--quiet", "--python", python)
        lowest = ("--resolution", "lowest-direct", "--override", overrides, "--editable", f"{ROOT}[{EXTRAS}]")
        tools = ("pytest", "pytest-timeout", "httpx", "hypothesis", "psutil", "onnxruntime")
        for arguments in (("venv", "-q", "-p", sys.executable, f"{place}/venv"), (*into, *lowest), (*into, *tools)):
            done = asked(*arguments)
            assert done.returncode == 0, done.stderr
        sample = {name: value for name, value in os.environ.items() if name != "RETRIEVAL_TIP_SOAK"}
        files = [f"tests/test_{name}.py" for name in CORE]
        command = [
            python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            f"not {' and not '.join(LEFT)}",
            *files,
        ]
        told = subprocess.run(command, cwd=ROOT, env=sample, capture_output=True, text=True, timeout=3000)
        assert told.returncode == 0, told.stdout[-4000:]
