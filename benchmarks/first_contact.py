"""Take the first steps of a stranger, and print the seconds and the disk space of each.

A new clone is installed into a new environment with one command, without CUDA libraries and without pip's cache. Then
the README's commands run in order, as copied from it, on the demo's photos and encoder, which are fetched before. No
feature is cached. The time of ``pip`` includes its downloads, which depend on the package mirror.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import click
from common import machine

ROOT = Path(__file__).parents[1]
CONSOLE = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands() -> list[str]:
    """Return the commands that the README prints with their output."""
    return [line.removeprefix("$ ") for body in CONSOLE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
            for line in body.splitlines() if line.startswith("$ ")]  # fmt: skip


def megabytes(folder: Path) -> int:
    """Return the size of the files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir()) // 1_000_000


@click.command(help=__doc__)
@click.option("--python", default="python3.11", show_default=True)
@click.option("--fetched", type=click.Path(path_type=Path), default=Path("build/docs"), show_default=True,
              help="Folder for the photos and the weights of the demo.")  # fmt: skip
def main(python: str, fetched: Path) -> None:
    """Run the steps, and print a line for each."""
    click.echo(machine())
    demo = [python, ROOT / "benchmarks/demo.py", "--work", fetched, "--source", "debian", "--only-fetch"]
    subprocess.run(demo, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as place:
        clone, total = Path(place) / "clone", 0.0
        path = f"{clone}/.venv/bin:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "RETRIEVAL_TIP_FAISS": "cpu", "RETRIEVAL_TIP_CACHE": f"{place}/cache"}
        lite0 = f"--model timm:tf_efficientnet_lite0 --pretrained {fetched.resolve()}/efficientnet-lite0.pth"
        steps = [f"git clone -q --depth 1 file://{ROOT} {clone}", f"cd {clone} && {python} -m venv .venv",
                 f"cd {clone} && pip install -q --no-cache-dir .",
                 *(f"cd {clone} && {typed}" for typed in commands())]  # fmt: skip
        for step in steps:
            if "index build" in step:  # the README's own encoder is a download of 0.6 GB
                step += f" {lite0}"
                for name in ("photos", "new"):
                    (clone / name).symlink_to(fetched.resolve() / name)
            start = time.perf_counter()
            subprocess.run(["bash", "-c", step], env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            took = time.perf_counter() - start
            total += took
            shown = step.removeprefix(f"cd {clone} && ").replace(place, "").replace(f" {lite0}", "")
            click.echo(f"{took:7.1f} s  {megabytes(Path(place)):6,} MB  {shown}")
        click.echo(f"{total:7.1f} s in all")


if __name__ == "__main__":
    main()
