"""Run the README's examples with the package of this Python, on the demo's photos and encoder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "release"


def run(command: str) -> str:
    """Print a command, and return its output. Raises CalledProcessError if it fails."""
    print(f"$ {command}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(  # noqa: S602
        command,
        shell=True,
        cwd=WORK,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


WORK.mkdir(parents=True, exist_ok=True)
shutil.rmtree(WORK / "indexes", ignore_errors=True)
demo = ROOT / "benchmarks" / "demo.py"
model = re.search("--model .*", run(f"python '{demo}' --source debian --only-fetch --work ."))
assert model is not None
for kind, body in re.findall(
    r"```(console|python)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
):
    if kind == "python":
        Path(WORK, "example.py").write_text(body, encoding="utf-8")
        print(run("python example.py"), end="")
        continue
    for command in re.findall(r"^\$ (.*)", body, re.MULTILINE):
        print(run(f"{command} {model[0]}" if "index build" in command else command), end="")
