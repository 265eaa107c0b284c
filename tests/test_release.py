"""What a build requires on this machine, and what PyPI shows of it."""

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT

from retrieval_tip import doctor
from retrieval_tip.driver import has_nvidia_driver

pytest.importorskip("hatchling", reason="SKIPPED: hatchling is not installed; run make setup")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A program of NVIDIA's driver, which does nothing."""
    program = tmp_path / "driver/nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def built(place=ROOT, **choice):
    """Return the metadata of a wheel that is built in a folder."""
    environment = {name: value for name, value in os.environ.items() if "FAISS" not in name}
    command = [sys.executable, "-m", "hatchling", "metadata"]
    done = subprocess.run(
        command, cwd=place, env=environment | choice, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def faiss_of(metadata):
    """Return the requirements of distributions of FAISS."""
    return [need for need in metadata["dependencies"] if need.startswith("faiss")]


without_driver = pytest.mark.skipif(has_nvidia_driver(), reason="SKIPPED: needs no NVIDIA driver")


@without_driver
def test_a_build_requires_faiss_gpu_only_where_there_is_a_driver(request):
    assert faiss_of(built()) == ["faiss-cpu<2,>=1.15.1"]
    assert faiss_of(built(RETRIEVAL_TIP_FAISS="gpu")) == ["faiss-gpu<2,>=1.15.1"]
    request.getfixturevalue("driver")
    assert faiss_of(built()) == ["faiss-gpu<2,>=1.15.1"]
    assert faiss_of(built(RETRIEVAL_TIP_FAISS="cpu")) == ["faiss-cpu<2,>=1.15.1"]


def test_a_source_distribution_leaves_the_choice_to_the_machine_that_installs_it(tmp_path, driver):
    build = "import sys; sys.path.insert(0, '.ci'); import backend; print(backend.build_sdist(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"RETRIEVAL_TIP_FAISS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    name = made.stdout.strip()
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    place = tmp_path / name.removesuffix(".tar.gz")
    said = (place / "PKG-INFO").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert "Dynamic: Requires-Dist" in said
    assert not [line for line in said if line.startswith("Requires-Dist: faiss")]
    from_source, expected = built(place), built()
    assert faiss_of(from_source) == ["faiss-gpu<2,>=1.15.1"]
    assert from_source == expected


def test_pypi_gets_addresses_of_files_in_the_repository():
    metadata = built()
    base = re.escape(metadata["urls"]["Repository"])
    targets = re.findall(r"(!?)\[[^]]*\]\(([^)#]+)", metadata["readme"]["text"])
    files = [re.fullmatch(rf"{base}/(raw|blob)/v[\d.]+/(.*)", target) for _, target in targets]
    assert all((ROOT / file[2]).exists() for file in files if file)
    kinds = {(mark, file[1]) for (mark, _), file in zip(targets, files, strict=True) if file}
    assert kinds == {("!", "raw"), ("", "blob")}
    assert all(target.startswith("https://") for _, target in targets)


def test_doctor_prints_the_two_lines_that_let_an_idle_gpu_search(run, monkeypatch, request):
    only_cpu = {"faiss-cpu": "1.15.1", "faiss-gpu": None}
    real = doctor.version_of
    monkeypatch.setattr(
        doctor, "version_of", lambda name: only_cpu[name] if name in only_cpu else real(name)
    )
    if not has_nvidia_driver():
        assert "idle" not in run("doctor").stdout
    request.getfixturevalue("driver")
    done = run("doctor")
    assert done.exit_code == 1
    assert re.search(r"^faiss distribution +faiss-cpu 1.15.1$", done.stdout, re.MULTILINE)
    _, after = done.stdout.split("problem: faiss-cpu is installed, so the GPU is idle in searches")
    said, remove, install = after.splitlines()[:3]
    assert said == "; run"
    assert remove.endswith("pip uninstall -y faiss-cpu")
    assert install.endswith("pip install faiss-gpu")
