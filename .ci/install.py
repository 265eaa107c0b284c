"""Run ``pip install`` with the given arguments and show progress in one line, or pip's last lines if it fails."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from pathlib import Path

LAST = 20
"""Lines of pip's output shown if it fails."""


def main(arguments: list[str]) -> int:
    """Install, and return the exit status of pip."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
