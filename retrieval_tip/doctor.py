"""Check an installation, and report versions, devices and problems."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass

from retrieval_tip import hooks
from retrieval_tip.driver import faiss_distribution, has_nvidia_driver
from retrieval_tip.errors import UsageError
from retrieval_tip.machine import install, pip, version_of

FAISS_DISTRIBUTIONS = (
    "faiss-gpu",
    "faiss-cpu",
    "faiss-gpu-cuvs",
    "faiss-gpu-cu11",
    "faiss-gpu-cu12",
    "faiss",
)
PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "numpy",
    "pillow",
    "pyarrow",
    "duckdb",
    "click",
    "transformers",
)

OLDER_TORCH = "https://download.pytorch.org/whl/cu126"
OLD_DRIVER = (
    "PyPI's torch needs CUDA 13 and driver 580 or newer (see nvidia-smi); for an older driver:"
)


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`examine`: facts by name, and a list of problems and how to fix them."""

    facts: dict[str, str]
    problems: list[str]


def examine() -> Diagnosis:
    """Check the installed versions, the devices and the FAISS build."""
    facts = {
        "retrieval-tip": version_of("retrieval-tip") or "not installed as a package",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
    }
    problems: list[str] = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        problems.append(
            f"Python {platform.python_version()} is not supported; create an environment with Python 3.11 to 3.14"
        )
    for name in PACKAGES:
        installed = version_of(name)
        facts[name] = installed or "not installed"
        if installed is None and name == "transformers":
            facts[name] += f" (only needed for text towers from Hugging Face: {install('hf')})"
        elif installed is None:
            problems.append(f"{name} is not installed; run {pip('install ' + name)}")
    for stranger in hooks.strangers():
        facts[f"plugin {stranger.name}"] = f"{stranger.package} {stranger.version}, {stranger.kind}"
        try:
            hooks.find(stranger.kind, stranger.name)
        except UsageError as error:
            problems.append(str(error))
    _torch(facts, problems)
    _faiss(facts, problems)
    return Diagnosis(facts, problems)


def _torch(facts: dict[str, str], problems: list[str]) -> None:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation can fail in many ways
        problems.append(f"torch cannot be imported ({error}); reinstall it")
        return
    facts["torch device"] = "cpu"
    facts["torch build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    facts["NVIDIA driver"] = "installed" if has_nvidia_driver() else "none"
    if torch.version.cuda is None and faiss_distribution() == "faiss-gpu":
        problems.append(
            "this torch is built for the CPU, so the GPU is idle in encoding; "
            f"run {pip('install --force-reinstall torch torchvision')}"
        )
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["torch device"] = f"cuda ({', '.join(names)})"


def _faiss(facts: dict[str, str], problems: list[str]) -> None:
    installed = {
        name: version for name in FAISS_DISTRIBUTIONS if (version := version_of(name)) is not None
    }
    facts["faiss distribution"] = (
        ", ".join(f"{name} {version}" for name, version in installed.items()) or "none"
    )
    right = faiss_distribution()
    switch = f"run\n  {pip('uninstall -y ' + ' '.join(installed))}\n  {pip('install ' + right)}"
    if len(installed) > 1:
        problems.append(
            f"{' and '.join(installed)} are both installed and overwrite each other's files; {switch}"
        )
    elif "faiss-cpu" in installed and right == "faiss-gpu":
        problems.append(f"faiss-cpu is installed, so the GPU is idle in searches; {switch}")
    try:
        faiss = importlib.import_module("faiss")
    except Exception as error:
        problems.append(
            f"faiss cannot be imported ({error}); run {pip('install --force-reinstall ' + right)}"
        )
        return
    facts["faiss"] = str(faiss.__version__)
    facts["faiss build"] = str(faiss.get_compile_options()).strip()
    facts["faiss SIMD level"] = str(faiss.SIMDConfig.get_level_name())
    gpus = int(faiss.get_num_gpus())
    facts["faiss GPUs"] = str(gpus)
    if gpus == 0 and "faiss-gpu" in installed and facts.get("torch device", "cpu") != "cpu":
        problems.append(
            "torch finds a GPU, but FAISS does not, so searches run on the CPU; "
            f"run {pip('install --force-reinstall ' + right)}, and check the driver's CUDA version (nvidia-smi)"
        )
    if gpus and facts.get("torch device") == "cpu":
        problems.append(
            f"FAISS finds a GPU, but torch (built for {facts['torch build']}) does not, so nothing runs on it; "
            f"{OLD_DRIVER} {pip('install --force-reinstall torch torchvision --index-url ' + OLDER_TORCH)}"
        )
