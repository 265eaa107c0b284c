"""Shards through a pool of actors: Ray Data streams them, each actor holds its backbone or index, summaries come back.

An actor that dies is started again and its shard with it. What a worker refuses with one of the package's errors comes
back as that error; nothing of Ray's own messages is shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt
from tqdm import tqdm

from retrieval_tip import errors
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.sources import Source
from retrieval_tip.distributed.cluster import Room, connected, room
from retrieval_tip.distributed.shards import Shard, open_shard
from retrieval_tip.errors import InputError, RetrievalTipError, Skipped, first_line
from retrieval_tip.settings import Precision

RETRIES = 3
"""Times that a shard is begun again after its actor died: one that ends every process must not do so for ever."""
AHEAD = 2
"""Shards given to an actor at a time, so that it never waits for the next."""


@dataclass(frozen=True)
class Ray:
    """The cluster to use: its ``address`` (``None``: one that is started here), ``actors`` at most.

    ``device`` as :func:`cluster.room` takes it; ``size`` items a shard; ``progress``: a bar counts the shards.
    """

    address: str | None = None
    actors: int | None = None
    device: str = "auto"
    size: int | None = None
    progress: bool = False


@dataclass(frozen=True)
class BackboneName:
    """A backbone by its name, which every actor loads for itself: :func:`load_backbone`'s arguments."""

    model: str
    pretrained: str | None = None
    precision: Precision = "auto"
    tuned: str | None = None

    def looked_at(self) -> Backbone:
        """The backbone on the CPU, to see whether it is there and what it is; nothing is encoded with it."""
        return replace(self, precision="auto").load("cpu")

    def load(self, device: str) -> Backbone:
        """The backbone on this device."""
        from retrieval_tip.backbones.loading import load_backbone

        return load_backbone(self.model, self.pretrained, device=device, precision=self.precision, tuned=self.tuned)


@dataclass(frozen=True)
class Encoding:
    """A backbone by its name, the settings of :class:`Encoder`, and the folder of the encoding cache, for actors."""

    backbone: BackboneName | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None


@dataclass(frozen=True)
class Summary:
    """A worker's report of a shard: rows that it made, what failed, the node it ran on, and what its task adds.

    ``settled``: how many rows took how many keys, where answers were certified.
    """

    shard: int
    rows: int = 0
    failed: list[Skipped] = field(default_factory=list)
    node: str = ""
    settled: dict[int, int] = field(default_factory=dict)
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    error: tuple[str, str] | None = None

    def to_row(self) -> dict[str, bytes]:
        """A row of a Ray dataset."""
        return {"summary": pickle.dumps(self)}

    @staticmethod
    def from_row(row: dict[str, bytes]) -> Summary:
        """The inverse of :meth:`to_row`."""
        summary: Summary = pickle.loads(row["summary"])  # noqa: S301 - as Ray itself does with what its workers return
        return summary


class Task(ABC):
    """The work on each shard. It is sent to the actors, so it holds names and settings, and opens things there."""

    encoding: Encoding

    def start(self, device: str, encoder: Encoder) -> None:  # noqa: B027 - most need nothing
        """Open what all shards need, once an actor; ``encoder`` is that of ``encoding``, with its backbone."""

    @abstractmethod
    def work(self, shard: Shard, source: Source, encoder: Encoder) -> Summary:
        """Do one shard; ``encoder`` reads it, and names in ``skipped`` what cannot be read."""


class Worker:
    """An actor of the pool."""

    def __init__(self, task: Task, place: Room, folder: str) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it, before torch is imported
        logging.getLogger("retrieval_tip").setLevel(logging.ERROR)  # what was skipped is said where it is summed up
        with contextlib.suppress(OSError):  # where relative paths start from, if this machine has it
            os.chdir(folder)
        self._task, self._problem = task, None
        try:
            import torch

            torch.set_num_threads(place.threads)
            self._encoder = _encoder(task.encoding, place)
            task.start(place.device, self._encoder)
        except RetrievalTipError as error:
            self._problem = error  # said for each shard: an actor that does not start would be started again

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        """The summary of a shard."""
        import ray

        shard = Shard.from_json(zlib.decompress(row["shard"]).decode())
        return replace(self._done(shard), node=ray.get_runtime_context().get_node_id()).to_row()

    def _done(self, shard: Shard) -> Summary:
        try:
            if self._problem is not None:
                raise self._problem
            source, encoder = open_shard(shard), replace(self._encoder, skipped=[])
            if source.failed and encoder.strict:
                raise InputError(f"{source.failed[0]}; leave out --strict to go on without it")
            return self._task.work(shard, source, encoder)
        except RetrievalTipError as error:
            return Summary(shard.number, error=(type(error).__name__, str(error)))
        except OSError as error:  # a full disk, a file that went away
            name = f"{error.filename}: " if error.filename else ""
            text = f"{name}{error.strerror or error}, on {socket.gethostname()}"
            return Summary(shard.number, error=("InputError", text))
        except Exception as error:  # which Ray would wrap in its own, and print
            text = f"{shard}: a worker failed: {type(error).__name__}: {first_line(error)}"
            return Summary(shard.number, error=("RetrievalTipError", text))


def _encoder(encoding: Encoding, place: Room) -> Encoder:
    backbone = None if encoding.backbone is None else encoding.backbone.load(place.device)
    cache = None if encoding.cache is None or backbone is None else EncodingCache(encoding.cache)
    settings = dict(encoding.settings)
    settings["workers"] = min(settings.get("workers", place.threads + 1), place.threads + 1)
    return Encoder(backbone=backbone, cache=cache, empty=True, **settings)


def through(task: Task, shards: Sequence[Shard], ray: Ray) -> Iterator[Summary]:
    """Summaries of shards as they are done, in any order.

    Raises the first error of the package's that a worker meets; InputError where a shard ends its process again and
    again, or Ray fails otherwise; UsageError as :func:`cluster.connected` and :func:`cluster.room` do.
    """
    if not shards:
        return
    with (
        connected(ray.address) as module,
        tqdm(total=len(shards), unit="shard", disable=None if ray.progress else True, leave=False) as bar,
    ):
        for summary in _stream(module, task, shards, room(ray.device, min(ray.actors or len(shards), len(shards)))):
            if summary.error is not None:
                kind, text = summary.error
                raise getattr(errors, kind, InputError)(text)
            bar.update()
            yield summary


def _stream(module: Any, task: Task, shards: Sequence[Shard], place: Room) -> Iterator[Summary]:
    from ray import data

    for handler in logging.getLogger("ray.data").handlers:  # its own are set up when it is imported
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.CRITICAL + 1)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [{"shard": zlib.compress(shard.to_json().encode())} for shard in shards]  # paths are much alike
    limits: dict[str, Any] = {"max_task_retries": RETRIES, **place.limits()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_task_retries will get another place in Ray 2.64, and has none before
        packed: Any = data.from_items(items, override_num_blocks=len(items))
        dataset = packed.map(
            Worker,
            fn_constructor_args=(task, place, os.getcwd()),  # noqa: PTH109
            compute=data.ActorPoolStrategy(size=place.actors, max_tasks_in_flight_per_actor=AHEAD),
            **limits,
        )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in batch.to_pylist():
                yield Summary.from_row(row)
    except module.exceptions.RayError as error:
        raise InputError(
            f"a shard ended its worker {RETRIES + 1} times, or Ray failed ({first_line(error)}); "
            "give a smaller --shard-size or --batch-size where memory ran out, and go on with the same command"
        ) from error
