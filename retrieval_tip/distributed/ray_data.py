"""Encode or classify the pieces of a source on a Ray cluster, into a folder of Parquet parts on a disk or in a bucket.

Ray Data sends each piece to an actor, which holds the encoder and the index, and writes the rows that come back:

    _run.json               digest of the work and of its source, so that no other run mixes its parts in
    part=000012/            rows of piece 12; absent if none of it could be read
    _failed/000012.json     inputs of piece 12 that could not be read, each with the reason
    _complete.json          written last

The same call again makes the parts that are missing. Ray retries what a dead worker or node leaves behind. Readers of
Parquet skip names with an underscore, so other programs read the folder as one table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data import remote, tars
from retrieval_tip.data.encoder import Encoder, encoded
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.feature_tables import check_backbone
from retrieval_tip.data.sources import Source, of_tars, open_inputs
from retrieval_tip.data.tables import COMPLETE, RUN, open_parquet, part_files
from retrieval_tip.distributed.cluster import connected, room
from retrieval_tip.errors import InputError, RetrievalTipError, Skipped, StoreError, UsageError, first_line, show
from retrieval_tip.index import places
from retrieval_tip.settings import Precision, Settings
from retrieval_tip.store.query import rows_where

IMAGES, ROWS = 256, 16_384
"""Most items of a piece: images, or rows of a feature table."""
PIECES = 64
"""Pieces of a source that is too small for as many of the largest size, down to a sixteenth of that."""
FAILED = "_failed"

Piece = Source | str
"""Items of a source, or the path or URL of a tar, which the actor opens."""


@dataclass(frozen=True)
class Question:
    """A question to the index at ``folder``, which has this manifest: what ``rows`` answers, by these settings."""

    folder: str
    manifest: bytes
    precision: Precision
    settings: Settings
    where: str | None
    schema: pa.Schema
    rows: Callable[[AnsweringIndex, Source, Encoder], Iterator[pa.Table]]


@dataclass(frozen=True)
class Work:
    """What an actor does with each piece: encode it, or answer a ``question`` about it.

    The actor completes ``encoder``: ``backbone`` loads one onto a device, ``cache`` is the encoding cache's folder.
    """

    encoder: Encoder
    backbone: Callable[..., Backbone] | None
    cache: str | None
    question: Question | None = None


def cut(source: Source) -> list[Piece]:
    """Cut a source into pieces."""
    most = ROWS if source.paths is None else IMAGES
    size = max(most // 16, min(most, len(source) // PIECES))
    unnamed = replace(source, class_names=())
    return [unnamed.take(range(start, min(start + size, len(source)))) for start in range(0, len(source), size)]


def cut_inputs(arguments: Iterable[str], stdin: Iterable[str] = ()) -> list[Piece]:
    """Cut what ``classify`` takes into pieces: each tar is one, everything else is opened by :func:`open_inputs`."""
    pieces: list[Piece] = []
    for of_tar, some in groupby(arguments, lambda one: one != "-" and bool(tars.find(one))):
        if of_tar:
            pieces += chain.from_iterable(map(tars.find, some))
        else:
            pieces += chain.from_iterable(map(cut, open_inputs(some, stdin)))
    return pieces


def write_parts(
    work: Work,
    pieces: Sequence[Piece],
    out: str | os.PathLike[str],
    *,
    address: str | None = None,
    actors: int | None = None,
    device: str = "auto",
    progress: bool = False,
) -> tuple[int, int, list[Skipped]]:
    """Do the work on every piece whose part is not in the folder ``out`` yet, which all nodes of the cluster share.

    Returns the number of rows, and of parts that were there before, and what could not be read. Raises UsageError if
    ``out`` holds something else, or as :func:`connected`; InputError if nothing could be read; what an actor raises.
    """
    folder = PartsFolder(out)
    pickled = {f"{number:06}": pickle.dumps(piece) for number, piece in enumerate(pieces)}
    rows_depend_on = replace(work, encoder=replace(work.encoder, batch_size=None, workers=1, strict=False))
    complete = folder.claim(hashlib.sha256(pickle.dumps((rows_depend_on, pickled))).hexdigest())
    kept = folder.rows()
    missing: list[dict[str, object]] = [
        {"part": part, "piece": piece} for part, piece in pickled.items() if part not in kept
    ]
    if missing and not complete:
        with connected(address):
            _stream(work, missing, folder, actors, device, progress)
    rows, failed = folder.rows(), folder.failed()
    if lost := pickled.keys() - rows.keys() - failed.keys():
        raise InputError(
            f"{show(folder.place)}: part {min(lost)} was written, and is not there; "
            "give a folder that every node of the cluster shares, or one in a bucket"
        )
    skipped = list(dict.fromkeys(chain.from_iterable(failed.values())))
    if not rows:
        raise InputError(f"none of the items could be read ({skipped[0] if skipped else 'there are none'})")
    folder.files.pipe_file(COMPLETE, b"{}")
    return sum(rows.values()), len(kept), skipped


def _stream(
    work: Work, missing: list[dict[str, object]], folder: PartsFolder, most: int | None, device: str, progress: bool
) -> None:
    """Send pieces through actors into Parquet files."""
    import ray
    from ray import data

    actors, cpus, gpus = room(ray.nodes(), device)  # type: ignore[no-untyped-call]
    actors = min(actors, most or actors)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = data.DataContext.get_current()
    context.enable_progress_bars = progress
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.target_max_block_size = None  # else a large part would become two files
    dataset = data.from_items(missing, override_num_blocks=len(missing)).map_batches(
        Worker,
        batch_size=1,
        batch_format="pyarrow",
        fn_constructor_args=(work, folder.place, "cpu" if device == "auto" and not gpus else device, Path.cwd()),
        compute=data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        dataset.write_parquet(
            folder.place,
            partition_cols=["part"],
            filesystem=PyFileSystem(FSSpecHandler(folder.system)),
            ray_remote_args={"num_cpus": 0},  # actors may have every CPU
            concurrency=actors,
            use_dictionary=False,
        )
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, RetrievalTipError):
            raise type(cause)(first_line(cause)) from None  # Ray adds lines of its own
        raise InputError(f"Ray failed ({first_line(cause)}); the same command makes what is missing") from error


class Worker:
    """An actor: it loads the encoder and the index once, and makes the rows of one piece at a time."""

    def __init__(self, work: Work, out: str, device: str, started_in: Path) -> None:
        with suppress(OSError):  # relative paths start there, if this machine has that folder
            os.chdir(started_in)
        self._work, self._folder, self._device = work, PartsFolder(out), device

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Make the rows of a piece, with the number of their part."""
        part, piece = batch["part"][0].as_py(), pickle.loads(batch["piece"][0].as_py())  # noqa: S301 - our own
        source = of_tars(show(piece), [piece], labelled=False) if isinstance(piece, str) else piece
        encoder = replace(self._encoder, skipped=[])
        if question := self._work.question:
            index = self._index
            check_backbone(index.backbone, index.d, encoder.backbone, [source])
            schema, tables = question.schema, question.rows(index, source, encoder)
        else:
            schema, tables = encoded(source, encoder)
        rows = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
        if encoder.skipped or not len(rows):
            failed = json.dumps([[skipped.source, skipped.reason] for skipped in encoder.skipped])
            self._folder.files.pipe_file(f"{FAILED}/{part}.json", failed.encode())
        return rows.append_column("part", pa.array([part] * len(rows), pa.string()))

    @cached_property
    def _encoder(self) -> Encoder:
        work = self._work
        if work.backbone is None:
            return replace(work.encoder, empty=True)
        cache = None if work.cache is None else EncodingCache(work.cache)
        return replace(work.encoder, backbone=work.backbone(device=self._device), cache=cache, empty=True)

    @cached_property
    def _index(self) -> AnsweringIndex:
        asked = self._work.question
        assert asked is not None
        index = places.at(asked.folder).load(device=self._device, precision=asked.precision, verify="fast")
        if places.at(asked.folder).manifest().to_bytes() != asked.manifest:
            raise StoreError(f"{asked.folder}: changed since this run began; start it again")
        index.settings = asked.settings
        return index if asked.where is None else index.take(rows_where(index.labels, asked.where))


class PartsFolder:
    """A folder of parts, by its path or URL; ``files`` are named from there."""

    system: AbstractFileSystem

    def __init__(self, place: str | os.PathLike[str]) -> None:
        if remote.is_remote(place):
            self.place, self.system = place.rstrip("/"), remote.system_of(place)
        else:
            self.place, self.system = str(Path(place).absolute()), LocalFileSystem(auto_mkdir=True)
        self.files = DirFileSystem(self.place.rpartition("://")[2], self.system)

    def claim(self, digest: str) -> bool:
        """Begin a run or go on with it; return whether it is complete. Raises UsageError if the folder holds others."""
        names, run = self.files.find(""), json.dumps({"run": digest}).encode()
        if names and (RUN not in names or self.files.cat_file(RUN) != run):
            raise UsageError(f"{show(self.place)}: holds other files, or parts of another run; give another folder")
        self.files.pipe_file(RUN, run)
        return COMPLETE in names

    def rows(self) -> dict[str, int]:
        """Number of rows of each part. Removes files that a killed run left unfinished, or wrote twice."""
        rows: dict[str, int] = {}
        for file in part_files(self.place):
            part = os.fspath(file).split("/")[-2].removeprefix("part=")
            try:
                number = open_parquet(file).metadata.num_rows
            except InputError:
                if remote.is_remote(self.place):  # where every file is whole: the store did not answer
                    raise
                number = None
            if number is None or part in rows:
                self.system.rm_file(os.fspath(file))
            else:
                rows[part] = number
        return rows

    def failed(self) -> dict[str, list[Skipped]]:
        """Inputs of each piece that could not be read."""
        names = sorted(self.files.find(FAILED))
        return {Path(name).stem: [Skipped(*one) for one in json.loads(self.files.cat_file(name))] for name in names}
