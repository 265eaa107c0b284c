"""Measure edits of an index that a server holds open: the time of each, and the memory of the server.

\b
    python benchmarks/edits.py                       # 600 keys x 64, and 200,000 keys x 256
    python benchmarks/edits.py --against 485eedad    # two versions of the package, which take turns

Each size has a process of its own, which only opens the index, in a labelling session. A label is posted for a new
photo, and its time ends when the session shows that it is saved. A posted feature becomes a shot, a shot gets another
label, and a shot is removed; each answer tells of a version that is served. Before each turn, the session has nothing
to do. Times are medians after a warm-up turn. Features are synthetic (benchmarks/made.py), and a photo's feature is
drawn from its pixels. The index has text weights, and no fit. The time on a processor is that of all threads of the
process; it depends less on what else the machine does.

"resident" is the peak that Linux keeps for the process (VmHWM), which includes files that are mapped into memory.
"anonymous" is the highest of the samples that are taken during the edits every two milliseconds (RssAnon), which
excludes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import common
import numpy as np
import numpy.typing as npt
import torch
from common import SEED, against, clocked, machine, medians, record, show, sizes_option, take_turns
from made import Made
from PIL import Image

from retrieval_tip import Index, Reader
from retrieval_tip.backbones.base import Identity
from retrieval_tip.data.sources import open_inputs

SIZES = ((600, 64, 10), (200_000, 256, 1000))
IDENTITY = Identity("made", None, "sha256:00", "sha256:01", {"size": 8})
MIB, SAMPLED, PATIENCE = 1 << 10, 0.002, 120.0
"""Kilobytes in a MiB, and seconds between samples of the memory and until a label must be saved."""
EDITS = ("label a photo", "add a feature", "relabel a shot", "remove a shot")


@dataclasses.dataclass
class Drawing:
    """An image encoder without weights. The first pixels of an image seed its feature of ``dim`` values."""

    dim: int
    identity: Identity = IDENTITY
    precision: str = "float32"
    logit_scale: float = 100.0
    has_text: bool = False
    batch_size: int = 8

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Return the pixels, scaled to 8 x 8."""
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)

    def view(self, image: Image.Image, seed: str) -> torch.Tensor:
        """Return the same pixels for each seed."""
        return self.preprocess(image)

    def encode_images(self, pixels: torch.Tensor) -> npt.NDArray[np.float32]:
        """Return one feature for each image."""
        rows = [
            np.random.default_rng(each.flatten()[:8].long().tolist()).normal(size=self.dim)
            for each in pixels
        ]
        return np.stack(rows).astype(np.float32)

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Raise an error, because no class is new."""
        raise NotImplementedError


def make(folder: Path, size: tuple[int, int, int], photos: int) -> None:
    """Write an index of a size, and photos to label."""
    n, d, c = size
    made, ids = Made(c, d, SEED), np.arange(n) % c
    index = Index.from_features(made.draw(ids, 1), ids, made.names, made.text, device="cpu")
    dataclasses.replace(index, backbone=IDENTITY).save(folder / "index")
    (folder / "photos").mkdir()
    rng = np.random.default_rng(SEED)
    for number in range(photos):
        image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.save(folder / "photos" / f"{number:03}.png")


# The process that is measured


def hold(folder: Path) -> None:
    """Serve an index to edits that are named on standard input, and print the seconds that each takes."""
    from fastapi.testclient import TestClient

    from retrieval_tip.server.app import create_app
    from retrieval_tip.server.guard import Limits
    from retrieval_tip.server.served import Backbones, Maker, open_all
    from retrieval_tip.server.service import Service

    name = (
        "session" if find_spec("retrieval_tip.server.session") else "labelling"
    )  # before 2026-12-02
    session = import_module(f"retrieval_tip.server.{name}")
    session.WAIT = 0.0  # else a label waits for others
    place, dim = folder / "index", json.loads((folder / "size.json").read_text())[1]
    backbone = Drawing(dim)
    backbones = Backbones("cpu", "float32", None, backbone)
    service = Service(
        open_all([place], backbones), Limits(), maker=Maker(folder, lambda: backbone, backbones)
    )
    paths = session.paths_of([*open_inputs([str(folder / "photos")])])
    app = create_app(
        service, token="t", labelling=session.Labelling(place, paths, Reader(backbone))
    )
    with TestClient(app, headers={"Authorization": "Bearer t"}) as http:
        edit = Edit(http, place, dim, len(paths))
        edit.until(lambda state: state["encoded"] == len(paths) and not state["busy"])
        names = http.get("/v1/indexes/index").json()["class_names"]
        print("ready", flush=True)
        for line in sys.stdin:
            what, turn = json.loads(line)
            before = time.process_time()
            seconds = clocked(partial(edit.make, what, turn, names))
            processor = time.process_time() - before
            edit.until(lambda state: not state["busy"])
            print(json.dumps([seconds, processor]), flush=True)


class Edit:
    """Requests of a client to an index and its labelling session."""

    def __init__(self, http: Any, place: Path, dim: int, photos: int) -> None:
        self.http, self.manifests, self.dim, self.photos = http, place / "manifests", dim, photos

    def until(self, done: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the state of the session is as it should be."""
        end = time.monotonic() + PATIENCE
        while not done(state := self.http.get("/v1/label").json()):
            if time.monotonic() > end:
                raise click.ClickException(f"a label is not saved: {state['problem']}")
            time.sleep(0.002)

    def make(self, what: str, turn: int, names: Sequence[str]) -> None:
        """Make one edit, of another photo or shot in each turn."""
        label, keys, before = (
            names[turn % len(names)],
            "/v1/indexes/index/keys",
            max(self.manifests.iterdir()),
        )
        if what == EDITS[0]:
            body: dict[str, Any] = {"labels": [{"photo": turn % self.photos, "label": label}]}
            answer = self.http.post("/v1/label", json=body)
        elif what == EDITS[1]:
            feature = np.random.default_rng([SEED, turn]).normal(size=self.dim)
            body = {"features": [(feature / np.linalg.norm(feature)).tolist()], "labels": [label]}
            answer = self.http.post(keys, json=body)
        elif what == EDITS[2]:
            other = names[(turn + 1) % len(names)]  # keys cycle through the classes
            answer = self.http.post(
                "/v1/indexes/index/relabel", json={"labels": {str(turn): other}}
            )
        else:
            answer = self.http.delete(f"{keys}?key_id={100 + turn}")
        if answer.status_code not in (200, 201):
            raise click.ClickException(f"{what}: {answer.text}")
        if what == EDITS[0]:
            while max(self.manifests.iterdir()) == before:  # asking the server would take its time
                time.sleep(0.001)
            self.until(lambda state: not state["unsaved"])


class Holder:
    """The process that holds an index, as another process sees it.

    ``anonymous`` is its peak so far, in MiB, and ``processor`` its seconds on a processor for each edit so far.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.anonymous = process, 0.0
        self.processor: dict[str, list[float]] = {what: [] for what in EDITS}
        self._line()

    def memory(self, name: str) -> float:
        """Return a size of the process in MiB, which is 0 if it has ended."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return sum(int(size) / MIB for size in re.findall(rf"{name}:\s+(\d+)", status))

    def edit(self, turn: int, what: str) -> float:
        """Have the process make an edit, and return its seconds."""
        assert self.process.stdin is not None
        print(json.dumps([what, turn]), file=self.process.stdin, flush=True)
        seconds, processor = json.loads(self._line())
        self.processor[what].append(processor)
        return float(seconds)

    def _line(self) -> str:
        assert self.process.stdout is not None
        while not select.select([self.process.stdout], [], [], SAMPLED)[0]:
            self.anonymous = max(self.anonymous, self.memory("RssAnon"))
        if not (line := self.process.stdout.readline()):
            raise click.ClickException("the server ended: see above")
        return line


@contextmanager
def held(folder: Path) -> Iterator[Holder]:
    """Start a process that holds the index in a folder."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, __file__, "--hold", folder], stdin=pipe, stdout=pipe, text=True
    ) as process:
        try:
            yield Holder(process)
        finally:
            process.kill()


@against
@click.command(help=__doc__)
@sizes_option(SIZES)
@click.option(
    "--times", type=click.IntRange(min=1), default=10, show_default=True, help="Number of turns."
)
@common.folder_option
@click.option("--hold", "to_hold", type=click.Path(path_type=Path), hidden=True)
def main(
    sizes: Sequence[tuple[int, int, int]], times: int, folder: Path, to_hold: Path | None
) -> None:
    """Measure each size, and print the results. The hidden option runs the measured process."""
    if to_hold is not None:
        hold(to_hold)
        return
    click.echo(machine())
    for size in sizes:
        n, d, c = size
        title = f"{n:,} keys x {d}, {c:,} classes"
        if shutil.disk_usage(folder).free < 32 * n * d:  # several versions of the keys
            raise click.ClickException(
                f"{folder}: needs {32 * n * d / common.GIB:.1f} GiB of free space"
            )
        with tempfile.TemporaryDirectory(prefix="retrieval-tip-edits-", dir=folder) as name:
            make(Path(name), size, times + 1)
            (Path(name) / "size.json").write_text(json.dumps(size))
            with held(Path(name)) as server:
                taken = take_turns(
                    title, {what: partial(server.edit, what=what) for what in EDITS}, times
                )
                peaks = {"resident": server.memory("VmHWM"), "anonymous": server.anonymous}
        processor = {
            what: values[1:] for what, values in server.processor.items()
        }  # without the warm-up turn
        for name, values in (*processor.items(), *((name, [peak]) for name, peak in peaks.items())):
            record(f"{title}: {'MiB' if name in peaks else 'seconds on a processor'}", name, values)
        found, busy = medians(taken), medians(processor)
        show(
            title,
            [
                {"edit": what, "ms": 1e3 * found[what], "ms on a processor": 1e3 * busy[what]}
                for what in EDITS
            ],
        )
        show("", [{"peak": name, "MiB": peak} for name, peak in peaks.items()])


if __name__ == "__main__":
    main()
