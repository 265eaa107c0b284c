"""Resolving and installing the requirements from the registry; only ``make soak`` runs it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from tables import tiny

pytestmark = pytest.mark.soak
pytest.importorskip("uv", reason="SKIPPED: uv is not installed; run pip install uv")

PYTHONS = {"3.11": 7, "3.12": 7, "3.13": 7, "3.14": 9}
"""Lowest torch 2 that has wheels, by Python."""
UNREACHABLE = re.compile(
    "error sending request|Failed to fetch|dns error|Connection refused|timed out"
)


CORE = (
    "cli",
    "classifier",
    "serve",
    "server",
    "evaluate",
    "closed_form",
    "sources",
    "transformers",
    "estimator",
    "onnx",
    "images",
    "sql",
)
"""Test files that have to pass with the lowest versions: build, classify, evaluate, fit, serve and each extra."""
EXTRAS = "sklearn,onnx,heic,hf"
LARGEST = 1.5e9
"""Largest environment with the CPU builds of torch and FAISS, in bytes."""


def uv(*arguments):
    """Run uv, or skip the test if the registry does not answer."""
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip(
            f"SKIPPED: the package registry does not answer: {done.stderr.strip().splitlines()[-1]}"
        )
    return done


@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="SKIPPED: only Python 3.11 has a CPU build of torch here",
)
def test_the_command_of_the_image_installs_label_and_serve_without_cuda():
    """The Dockerfile runs this command. PyTorch's own index, which it adds, may not be reachable here."""
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (install,) = re.findall(
        r"^RUN (RETRIEVAL_TIP_FAISS=cpu pip install .*) --extra-index-url \S+$", image, re.MULTILINE
    )
    (healthy,) = re.findall(r"^HEALTHCHECK CMD (.*)$", image, re.MULTILINE)
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", f"{place}/venv"], check=True)
        path = f"{place}/venv/bin:{os.environ['PATH']}"
        subprocess.run(["sh", "-c", install], cwd=ROOT, env=os.environ | {"PATH": path}, check=True)
        found = set(subprocess.check_output([f"{place}/venv/bin/pip", "list"], text=True).split())
        assert "faiss-cpu" in found
        assert not [name for name in found if name.startswith(("faiss-gpu", "nvidia"))]
        size = sum(path.lstat().st_size for path in Path(place).rglob("*") if path.is_file())
        print(f"{size / 1e9:.2f} GB")
        assert size <= LARGEST
        model = f"local-dir:{tiny(Path(place) / 'model')}"
        label = ("label", ROOT / "docs/screens", "--out", f"{place}/index", "--model", model)
        for port, command in (
            (9731, label),
            (9732, ("serve",)),
        ):  # without an index, serve needs no encoder
            arguments = [f"{place}/venv/bin/retrieval-tip", *map(str, command), "--port", str(port)]
            server = subprocess.Popen(
                arguments, cwd=place, env=os.environ | {"HF_HUB_OFFLINE": "1"}
            )
            try:
                assert answers(f"http://127.0.0.1:{port}/healthz")
                python, *code = json.loads(healthy.replace("8000", f"{port}"))
                subprocess.run([f"{place}/venv/bin/{python}", *code], check=True)
            finally:
                server.terminate()
                assert server.wait(30) == 0


@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="SKIPPED: only Python 3.11 has a CPU build of torch here",
)
def test_uvx_and_pipx_run_a_built_wheel(monkeypatch):
    with tempfile.TemporaryDirectory() as place:
        for name, value in (
            ("RETRIEVAL_TIP_FAISS", "cpu"),
            ("UV_CACHE_DIR", f"{place}/cache"),
            ("PIPX_HOME", place),
            ("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", "")),
        ):
            monkeypatch.setenv(name, value)
        assert uv("build", "-q", "--wheel", "-o", place, ROOT).returncode == 0
        (wheel,) = Path(place).glob("*.whl")
        torch, vision = (
            f"{name}<={version(name).partition('+')[0]}" for name in ("torch", "torchvision")
        )
        uvx = ("--from", wheel, "--with", torch, "--with", vision)
        for command in (uvx, ("pipx", "run", "--python", sys.executable, "--spec", wheel)):
            done = uv(
                "tool",
                "run",
                "-q",
                "--python",
                sys.executable,
                *command,
                "retrieval-tip",
                "--version",
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("retrieval-tip, version")


def answers(url):
    """Return whether a server answers within two minutes."""
    for _ in range(240):
        with contextlib.suppress(OSError), urllib.request.urlopen(url) as answer:
            return bool(answer.status == 200)
        time.sleep(0.5)
    return False


def resolved(place, python, *constraints, lowest=False):
    """Return the version of each package that uv would install on Linux x86-64, or None if no set is compatible."""
    bounds = place / "constraints.txt"
    bounds.write_text("\n".join(constraints))
    command = [
        "pip",
        "compile",
        "--no-config",
        "--quiet",
        "--no-annotate",
        "--no-header",
        "-c",
        bounds,
    ]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--resolution", "lowest-direct", "--all-extras"] if lowest else []
    done = uv(*command, ROOT / "pyproject.toml")
    if done.returncode:
        assert "No solution found" in done.stderr
        return None
    return dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)


def minor(version):
    return tuple(map(int, version.split(".")[:2]))


@pytest.mark.parametrize("python", PYTHONS)
def test_every_allowed_torch_is_compatible_with_faiss_gpu(python, tmp_path, monkeypatch):
    monkeypatch.setenv("RETRIEVAL_TIP_FAISS", "gpu")
    newest = resolved(tmp_path, python)
    assert newest is not None
    found = []
    for number in range(PYTHONS[python], minor(newest["torch"])[1] + 1):
        versions = resolved(tmp_path, python, f"torch==2.{number}.*")
        assert versions is not None, f"torch 2.{number} on Python {python}"
        assert minor(versions["faiss-gpu"]) >= (1, 15)
        assert minor(versions["torchvision"]) >= (0, 22)
        found.append(minor(versions["torch"]))
    assert found[0] == (2, PYTHONS[python])
    assert found[-1] == minor(newest["torch"])


def test_every_requirement_has_a_lower_bound():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    always = pyproject["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    required = ["faiss" + always["faiss"], *always["dependencies"]]
    for requirement in [*required, *(one for extra in extras.values() for one in extra)]:
        assert ">=" in requirement or requirement.startswith("retrieval-tip["), requirement


@pytest.mark.parametrize("python", PYTHONS)
def test_all_lower_bounds_can_be_installed_together(python, tmp_path):
    assert resolved(tmp_path, python, lowest=True) is not None


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    sys.version_info >= (3, 13),
    reason="SKIPPED: the lowest versions have no wheels for this Python",
)
def test_the_main_tests_pass_with_the_lowest_versions():
    """Install every direct requirement at its lower bound in a temporary environment of 5 GB."""
    with tempfile.TemporaryDirectory() as place:
        python = Path(place, "venv/bin/python")
        overrides = Path(place, "overrides.txt")
        overrides.write_text(
            "triton ; sys_platform == 'never'\n"
        )  # PyPI's torch brings it for GPUs
        into = ("pip", "install", "--no-config", "--quiet", "--python", python)
        lowest = (
            "--resolution",
            "lowest-direct",
            "--override",
            overrides,
            "--editable",
            f"{ROOT}[{EXTRAS}]",
        )
        tools = ("pytest", "pytest-timeout", "httpx", "hypothesis", "psutil", "onnxruntime")
        for arguments in (
            ("venv", "-q", "-p", sys.executable, f"{place}/venv"),
            (*into, *lowest),
            (*into, *tools),
        ):
            done = uv(*arguments)
            assert done.returncode == 0, done.stderr
        sample = {name: value for name, value in os.environ.items() if name != "RETRIEVAL_TIP_SOAK"}
        files = [f"tests/test_{name}.py" for name in CORE]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-k", "not ycbcr", *files]  # older Pillow writes such a TIFF wrongly
        done = subprocess.run(
            command, cwd=ROOT, env=sample, capture_output=True, text=True, timeout=3000
        )
        assert done.returncode == 0, done.stdout[-4000:]
