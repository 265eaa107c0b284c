"""Build an index on Windows, change it on Linux, and restore it on Windows: answers stay equal, and photos are found.

Run with the two Pythons and the folder of the demo: check_travel.py LINUX WINDOWS DEMO. Both run this checkout.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINUX, WINDOWS, PHOTOS = sys.argv[1:]
INDEX = "indexes/things"


def run(python: str, project: Path, *arguments: str, status: int = 0) -> str:
    """Run a command in the project, and return what it prints."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    if python == WINDOWS:
        environment["PYTHONPATH"] = f"Z:{ROOT}".replace("/", "\\")
    command = [python, "-m", "retrieval_tip", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, check=False)
    output = done.stdout.decode().replace("\r\n", "\n")
    name = "Windows" if python == WINDOWS else "Linux"
    print(f"{name:8} {time.monotonic() - began:5.1f} s  {' '.join(arguments)}", flush=True)
    assert done.returncode == status, (done.returncode, output, done.stderr.decode()[-3000:])
    return output


def answers(python: str, project: Path) -> list[dict[str, object]]:
    """Verify the index, and return its answers with three decimals of each probability."""
    run(python, project, "index", "verify", INDEX)
    found = run(python, project, "classify", INDEX, "new", "--format", "json")
    rows = [json.loads(line) for line in found.splitlines()]
    return [row | {"probability": round(row["probability"], 3)} for row in rows]


def audit(python: str, project: Path) -> list[dict[str, str]]:
    """Return the suspicious labels, and check that their photos are found. Windows calls the disk of Linux Z."""
    found = run(python, project, "index", "audit", INDEX, "--all", "--format", "csv")
    rows = list(csv.DictReader(found.splitlines()))
    assert all(Path(row["source"].removeprefix("Z:")).is_file() for row in rows), rows
    return [{name: row[name] for name in ("key_id", "label", "suggested")} for row in rows]


def both(project: Path) -> list[dict[str, object]]:
    """Check that both systems give the same answers, and return them."""
    first, second = (answers(python, project) for python in (WINDOWS, LINUX))
    assert first == second
    assert len(first) > 10
    return first


def check_sorted(python: str, project: Path) -> list[str]:
    """Sort the photos, undo it, and return their outputs."""
    before = sorted(path.name for path in (project / "new").rglob("*"))
    run(python, project, "sort", INDEX, "new", "--into", "sorted", "--move")
    with (project / "sorted" / "sorted.csv").open(encoding="utf-8", newline="") as file:
        outputs = [row["output"] for row in csv.DictReader(file)]
    assert all((project / "sorted" / output).is_file() for output in outputs)
    run(python, project, "sort", "--undo", "--into", "sorted")
    assert sorted(path.name for path in (project / "new").rglob("*")) == before
    return outputs


def check_page(python: str, project: Path, port: int) -> None:
    """Serve the index, and look at the photo of each shot."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if python == WINDOWS:
        environment["PYTHONPATH"] = f"Z:{ROOT}".replace("/", "\\")
    command = [python, "-m", "retrieval_tip", "serve", INDEX, "--port", str(port)]
    server = subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            if b" at http" in line:
                break
        keys = f"http://127.0.0.1:{port}/v1/indexes/things/keys"
        with urllib.request.urlopen(f"{keys}?limit=1000", timeout=60) as answer:
            shots = json.load(answer)["keys"]
        assert len(shots) > 10
        assert all(shot["image"] for shot in shots)
        for shot in shots[::7]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{shot['image']}") as answer:
                assert answer.read(2) == b"\xff\xd8"
    finally:
        server.kill()
        server.wait()
    print(f"         {len(shots)} photos on the page", flush=True)


def main() -> None:
    """Run the scenario in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="travel-") as folder:
        project = Path(folder) / "project"
        for part in ("photos", "new"):
            shutil.copytree(Path(PHOTOS) / part, project / part)
        (project / "models").mkdir()
        shutil.copy(Path(PHOTOS) / "efficientnet-lite0.pth", project / "models")
        shutil.copytree(project / "new" / "tool", project / "more" / "new tool")
        absolute = f"Z:{project}/photos".replace("/", "\\")
        model = f"timm:tf_efficientnet_lite0@Z:{project}/models/efficientnet-lite0.pth"
        build = ["--out", INDEX, "--model", model.replace("/", "\\")]
        run(WINDOWS, project, "index", "build", absolute, *build)
        sources = run(LINUX, project, "index", "query", INDEX, "SELECT source FROM labels")
        assert f"{project}/photos/" in sources, sources
        first = both(project)
        assert audit(WINDOWS, project) == audit(LINUX, project) != []
        run(LINUX, project, "index", "add", INDEX, "more")
        assert both(project) != []
        run(WINDOWS, project, "index", "rollback", INDEX)
        assert both(project) == first
        assert check_sorted(WINDOWS, project) == check_sorted(LINUX, project)
        for port, python in enumerate((WINDOWS, LINUX), 8411):
            check_page(python, project, port)
    print("The index travelled.")


if __name__ == "__main__":
    main()
