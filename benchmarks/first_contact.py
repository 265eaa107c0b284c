"""Take the first steps of a stranger, and print the seconds and the disk space of each.

A new clone is installed into a new environment with one command, without CUDA libraries and without pip's cache. Then
the README's commands run in order, as copied from it, on the demo's photos and encoder, which are fetched before. No
feature is cached. The time of ``pip`` includes its downloads, which depend on the package mirror.

With ``--root FOLDER``, all of this happens inside another system, for example one with Python and git alone::

    debootstrap --variant=minbase --include=python3,python3-venv,git,ca-certificates bookworm FOLDER
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
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
@click.option("--root", type=click.Path(exists=True, file_okay=False, path_type=Path), default=Path("/"),
              help="Folder of another system, which chroot enters.")  # fmt: skip
@click.option("--uv", default="", metavar="PROGRAM", help="Install with this uv instead of pip.")
def main(python: str, fetched: Path, root: Path, uv: str) -> None:
    """Run the steps, and print a line for each."""
    click.echo(machine())
    demo = [sys.executable, ROOT / "benchmarks/demo.py", "--work", fetched, "--source", "debian", "--only-fetch"]
    subprocess.run(demo, check=True, capture_output=True)
    with tempfile.TemporaryDirectory(dir=root / "tmp") as place:
        outside, inside, total = Path(place), "/" / Path(place).relative_to(root), 0.0
        given, clone, stranger = inside / "given", inside / "stranger/clone", outside / "stranger"
        subprocess.run(["git", "clone", "-q", "--bare", ROOT, outside / "given/origin"], check=True)
        for name in ("photos", "new"):
            shutil.copytree(fetched / name, outside / "given" / name)
        shutil.copy(fetched / "efficientnet-lite0.pth", outside / "given")
        path = f"{clone}/.venv/bin:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "RETRIEVAL_TIP_FAISS": "cpu", "RETRIEVAL_TIP_CACHE": f"{clone.parent}/cache",
                            "VIRTUAL_ENV": f"{clone}/.venv"}  # fmt: skip
        lite0 = f"--model timm:tf_efficientnet_lite0 --pretrained {given}/efficientnet-lite0.pth"
        steps = [f"git clone -q --depth 1 file://{given}/origin {clone}", f"cd {clone} && {python} -m venv .venv",
                 f"cd {clone} && {uv} pip install -q --no-cache-dir .",
                 *(f"cd {clone} && {typed}" for typed in commands())]  # fmt: skip
        for step in steps:
            if "index build" in step:  # the README's own encoder is a download of 0.6 GB
                step += f" {lite0}"
                for name in ("photos", "new"):
                    (stranger / "clone" / name).symlink_to(given / name)
            start = time.perf_counter()
            enter = [] if root == Path("/") else ["chroot", root]  # chroot needs root
            done = subprocess.run([*enter, "bash", "-c", step], env=env, capture_output=True, text=True)
            took = time.perf_counter() - start
            if done.returncode:
                raise click.ClickException(f"{step}: {done.stderr}")
            total += took
            shown = step.removeprefix(f"cd {clone} && ").replace(str(inside), "").replace(f" {lite0}", "")
            click.echo(f"{took:7.1f} s  {megabytes(stranger):6,} MB  {shown}")
        click.echo(f"{total:7.1f} s in all")


if __name__ == "__main__":
    main()
