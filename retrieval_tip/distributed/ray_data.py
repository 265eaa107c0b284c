"""Encode the pieces of a source on a Ray cluster, and write the features to a folder of Parquet files.

The folder can be stored on disk or in a bucket. Ray Data sends each piece to an actor, which holds the encoder, and
writes the resulting rows:

    _run.json               a digest of the work and its source, which prevents mixing the parts of two runs
    part=000012/            the rows of piece 12, unless none of its items could be read
    _failed/000012.json     the inputs of piece 12 that could not be read, with the reason for each
    _complete.json          an empty JSON object, which is written when the run is complete

If a run was interrupted, repeat the call to process the missing parts. If a worker or a node dies, Ray retries its
pieces. You can read the folder as one table, because Parquet readers skip names that begin with an underscore.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data import remote
from retrieval_tip.data.reader import Reader, encoded
from retrieval_tip.data.sources import Source
from retrieval_tip.data.tables import COMPLETE, RUN, open_parquet, part_files
from retrieval_tip.errors import InputError, RetrievalTipError, Skipped, UsageError
from retrieval_tip.machine import install
from retrieval_tip.wording import first_line, show

IMAGES, ROWS = 256, 16_384
"""Maximum size of a piece, in images or in rows of a feature table."""
PIECES = 64
"""Number of pieces for a small source, unless a piece would be smaller than a sixteenth of the maximum size."""
FAILED = "_failed"
ACTORS_A_NODE = 8
"""Maximum number of actors on a node that has no GPU. Each actor uses a share of the CPUs."""
PATIENCE = 5.0
"""Number of seconds to wait for a connection to the head of a cluster. Ray itself would wait for minutes."""


@dataclass(frozen=True)
class Work:
    """The work of an actor, which encodes each piece.

    ``backbone`` is a function that loads the backbone of the ``reader`` onto a device.
    """

    reader: Reader
    backbone: Callable[..., Backbone] | None


def cut(source: Source) -> list[Source]:
    """Split a source into pieces of similar size."""
    most = ROWS if source.paths is None else IMAGES
    size = max(most // 16, min(most, len(source) // PIECES))
    unnamed = replace(source, class_names=())
    return [
        unnamed.take(range(start, min(start + size, len(source))))
        for start in range(0, len(source), size)
    ]


def write_parts(
    work: Work,
    pieces: Sequence[Source],
    out: str | os.PathLike[str],
    *,
    address: str = "local",
    device: str = "auto",
    progress: bool = False,
) -> tuple[int, int, list[Skipped]]:
    """Process every piece whose part is missing in the folder ``out``. All nodes of the cluster must have access to it.

    Returns the number of rows, the number of parts that already existed, and the inputs that could not be read. Raises
    UsageError if ``out`` contains other files or if no cluster answers. Raises InputError if no input could be read.
    """
    folder = PartsFolder(out)
    pickled = {f"{number:06}": pickle.dumps(piece) for number, piece in enumerate(pieces)}
    rows_depend_on = replace(
        work, reader=replace(work.reader, batch_size=None, workers=1, strict=False)
    )
    complete = folder.claim(hashlib.sha256(pickle.dumps((rows_depend_on, pickled))).hexdigest())
    kept = folder.rows()
    missing: list[dict[str, object]] = [
        {"part": part, "piece": piece} for part, piece in pickled.items() if part not in kept
    ]
    if missing and not complete:
        with connected(address):
            _stream(work, missing, folder, device, progress)
    rows = folder.rows()
    failed = folder.failed()
    if lost := pickled.keys() - rows.keys() - failed.keys():
        raise InputError(
            f"{show(folder.place)}: part {min(lost)} was written but is missing; "
            "give a folder that all nodes of the cluster share, or one in a bucket"
        )
    skipped = list(dict.fromkeys(chain.from_iterable(failed.values())))
    if not rows:
        raise InputError(
            f"no item could be read ({skipped[0] if skipped else 'the source is empty'})"
        )
    folder.files.pipe_file(COMPLETE, b"{}")
    return sum(rows.values()), len(kept), skipped


def _stream(
    work: Work, missing: list[dict[str, object]], folder: PartsFolder, device: str, progress: bool
) -> None:
    import ray
    from ray import data

    actors, cpus, gpus = room(ray.nodes(), device)  # type: ignore[no-untyped-call]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = progress
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = None  # otherwise a large part would be split into two files
    dataset = data.from_items(missing, override_num_blocks=len(missing)).map_batches(
        Worker,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=(
            work,
            folder.place,
            "cpu" if device == "auto" and not gpus else device,
            Path.cwd(),
        ),
        compute=data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        dataset.write_parquet(
            folder.place,
            partition_cols=["part"],
            filesystem=PyFileSystem(FSSpecHandler(folder.system)),
            ray_remote_args={"num_cpus": 0},  # the actors may use all CPUs
            concurrency=actors,
            use_dictionary=False,
        )
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, RetrievalTipError):
            raise type(cause)(first_line(cause)) from None  # omits the lines that Ray adds
        raise InputError(
            f"Ray failed ({first_line(cause)}); run the command again for the missing parts"
        ) from error


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the cluster at ``address``, or start a cluster on this machine (``local``), until the context ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # otherwise, messages bypass the Python loggers
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # silences a warning of old Ray releases
    try:
        import ray
    except ImportError:
        raise UsageError(f"Ray is not installed; run {install('ray')}") from None
    try:
        if address not in ("local", "auto"):
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (RuntimeError, ValueError, OverflowError, OSError) as error:
        remedy = (
            "reinstall Ray" if address == "local" else "give HOST:PORT of the head of a Ray cluster"
        )
        raise UsageError(
            f"--ray {address}: cannot be used ({first_line(error)}); {remedy}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def room(nodes: Iterable[Mapping[str, Any]], device: str) -> tuple[int, int, int]:
    """Return the number of actors that ``nodes`` can run, and the number of CPUs and GPUs per actor.

    ``nodes`` is the result of ``ray.nodes()``. One actor runs on each GPU.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(resources.get("CPU", 0)) for resources in alive]
    gpus = 0 if device == "cpu" else sum(int(resources.get("GPU", 0)) for resources in alive)
    each = 1 if gpus else max(1, max(cpus) // ACTORS_A_NODE)
    actors = min(gpus, sum(cpus)) or sum(number // each for number in cpus)
    if not actors:
        raise UsageError("the Ray cluster has no CPU for actors; start its nodes with --num-cpus")
    return actors, each, min(gpus, 1)


class Worker:
    """An actor that loads the encoder once, and computes the rows of one piece at a time."""

    def __init__(self, work: Work, out: str, device: str, started_in: Path) -> None:
        with suppress(OSError):  # resolves relative paths if the folder exists on this node
            os.chdir(started_in)
        self._work = work
        self._folder = PartsFolder(out)
        self._device = device

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Compute the rows of a piece, and add a column with its part number."""
        part, source = batch["part"][0].as_py(), pickle.loads(batch["piece"][0].as_py())  # noqa: S301 - our own data
        reader = replace(self._reader, skipped=[])
        schema, tables = encoded(source, reader)
        rows = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
        if reader.skipped or not len(rows):
            failed = json.dumps([[skipped.source, skipped.reason] for skipped in reader.skipped])
            self._folder.files.pipe_file(f"{FAILED}/{part}.json", failed.encode())
        return rows.append_column("part", pa.array([part] * len(rows), pa.string()))

    @cached_property
    def _reader(self) -> Reader:
        load = self._work.backbone
        backbone = None if load is None else load(device=self._device)
        return replace(self._work.reader, backbone=backbone, empty=True)


class PartsFolder:
    """A folder of parts, given by its path or URL. Names in ``files`` are relative to the folder."""

    system: AbstractFileSystem

    def __init__(self, place: str | os.PathLike[str]) -> None:
        if remote.is_remote(place):
            self.place = place.rstrip("/")
            self.system = remote.system_of(place)
        else:
            self.place = str(Path(place).absolute())
            self.system = LocalFileSystem(auto_mkdir=True)
        self.files = DirFileSystem(self.place.rpartition("://")[2], self.system)

    def claim(self, digest: str) -> bool:
        """Reserve the folder for a run, and return whether the run is complete. Raises UsageError on other files."""
        names = self.files.find("")
        run = json.dumps({"run": digest}).encode()
        if names and (RUN not in names or self.files.cat_file(RUN) != run):
            raise UsageError(
                f"{show(self.place)}: holds other files, or parts of another run; give another folder"
            )
        self.files.pipe_file(RUN, run)
        return COMPLETE in names

    def rows(self) -> dict[str, int]:
        """Return the number of rows in each part, and remove incomplete and duplicate files of a killed run."""
        rows: dict[str, int] = {}
        for file in part_files(self.place):
            part = os.fspath(file).split("/")[-2].removeprefix("part=")
            try:
                number = open_parquet(file).metadata.num_rows
            except InputError:
                if remote.is_remote(
                    self.place
                ):  # remote files are never incomplete, so the service did not answer
                    raise
                number = None
            if number is None or part in rows:
                self.system.rm_file(os.fspath(file))
            else:
                rows[part] = number
        return rows

    def failed(self) -> dict[str, list[Skipped]]:
        """Return the inputs of each piece that could not be read."""
        names = sorted(self.files.find(FAILED))
        return {
            Path(name).stem: [Skipped(*row) for row in json.loads(self.files.cat_file(name))]
            for name in names
        }
