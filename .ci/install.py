"""Run ``pip install`` with the given arguments and show progress in one line, or pip's last lines if it fails.

Without an NVIDIA driver, pip takes builds of torch and FAISS without CUDA, which are 5.7 GB smaller.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections import deque
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LAST = 20
"""Lines of pip's output shown if it fails."""
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
PATIENCE = 3
"""Seconds in which this index must answer. pip would ask an index that does not answer six times for each package."""


def main(arguments: list[str]) -> int:
    """Install, and return the exit status of pip."""
    driver = runpy.run_path(str(Path(__file__).parent.parent / "retrieval_tip" / "driver.py"))
    faiss = driver["faiss_distribution"](os.environ.get("RETRIEVAL_TIP_FAISS"))
    if "--target" not in arguments:
        replace_faiss(faiss)
    if sys.platform == "linux" and faiss == "faiss-cpu" and answers(f"{CPU_TORCH}/torch/"):
        arguments = [*arguments, "--extra-index-url", CPU_TORCH]
    live, start, end = sys.stdout.isatty(), time.monotonic(), threading.Event()
    collected, step, lines = 0, "starting", deque[str](maxlen=LAST)
    folder = Path(sysconfig.get_path("purelib"))
    before = len(list(folder.glob("*.dist-info")))

    def show() -> None:
        while not end.wait(0.5 if live else 10):
            done = len(list(folder.glob("*.dist-info"))) - before
            line = (
                f"pip: {time.monotonic() - start:.0f} s, {done} of {collected} installed, {step}"[
                    :78
                ]
            )
            print(f"\r{line}\x1b[K" if live else line, end="" if live else "\n", flush=True)

    threading.Thread(target=show, daemon=True).start()
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *arguments]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            lines.append(line)
            word, _, rest = line.strip().partition(" ")
            collected += word == "Collecting"
            if word in ("Collecting", "Downloading", "Building", "Preparing"):
                step = f"{word.lower()} {rest}"
            elif word == "Installing":
                step = "installing"
            elif line.startswith(
                "Successfully installed"
            ):  # lists name-version; "Successfully built" comes earlier
                collected = len(rest.split()) - 1
    end.set()
    print("\r\x1b[K" if live else "", end="")
    if pip.returncode:
        print("".join(lines), end="", file=sys.stderr)
    else:
        print(f"pip: {collected} installed in {time.monotonic() - start:.0f} s")
    return pip.returncode


def replace_faiss(wanted: str) -> None:
    """Remove the other distribution of FAISS, whose files ``wanted`` would overwrite."""
    for name in {"faiss-cpu", "faiss-gpu"} - {wanted}:
        with suppress(PackageNotFoundError):
            print(f"pip: {wanted} replaces {name} {version(name)}")
            remove = [sys.executable, "-m", "pip", "uninstall", "-qq", "--yes", name, wanted]
            subprocess.run(remove, check=True)  # noqa: S603


def answers(url: str) -> bool:
    """Return whether a page is available within ``PATIENCE`` seconds, including the DNS lookup."""
    found = threading.Event()

    def ask() -> None:
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=PATIENCE).close()  # noqa: S310
            found.set()

    threading.Thread(target=ask, daemon=True).start()  # DNS lookups have no timeout
    return found.wait(PATIENCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
