"""A connection to Ray: one started here for as long as it is needed, or a cluster that runs already; and its room."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrieval_tip.errors import UsageError, first_line

OBJECT_STORE = 256 << 20
"""Bytes of the object store of a Ray that is started here: what passes through it is small, features go to files."""
ACTORS_A_NODE = 8
"""Actors on a node by default, where none has a GPU: each holds a backbone or an index, and more than one CPU then."""
MAX_FOLDER = 40
"""Longest name of a temporary folder for Ray, whose sockets lie deep below it: theirs have 107 bytes at most."""
PATIENCE = 5.0
"""Seconds until the head of a cluster accepts a connection."""
SHARE = 0.5
"""Of a CPU for an actor where a node has only one, so that there is room for reading."""


@dataclass(frozen=True)
class Room:
    """Actors that a cluster has room for, what each of them gets, and the device that was ``asked`` for."""

    actors: int
    cpus: float
    gpus: float = 0.0
    asked: str = "auto"

    @property
    def device(self) -> str:
        """``cpu``, or where an actor has a GPU, of which Ray shows it only its own, what was asked for.

        ``auto`` stays that: a worker whose torch cannot use its GPU then takes its CPUs.
        """
        return self.asked if self.gpus else "cpu"

    @property
    def threads(self) -> int:
        """Threads of an actor that compute: one for each of its CPUs."""
        return max(1, int(self.cpus))

    def limits(self) -> dict[str, float]:
        """Arguments of ``ray.remote``."""
        return {"num_cpus": self.cpus} | ({"num_gpus": self.gpus} if self.gpus else {})


def needed_ray() -> Any:
    """The module ``ray``, imported with usage statistics off. Raises UsageError where it is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray starts, by its processes too
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a change to come
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # which it writes to standard error, past all loggers
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed: pip install 'retrieval-tip[distributed]'") from None
    return ray


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """The module ``ray``, connected to the cluster at ``address``, or else to a Ray that is started here.

    A Ray that is started here has no dashboard, listens on loopback, sends no usage statistics and has
    :data:`OBJECT_STORE` bytes of shared memory; it ends with the block and leaves no files.
    Within another such block, and where the process is connected already, that connection is used and stays.

    Raises UsageError where Ray is not installed or none answers at ``address``.
    """
    ray = needed_ray()
    if ray.is_initialized():
        with _quietly():
            yield ray
        return
    with ExitStack() as stack:
        stack.enter_context(_quietly())
        if address is None:
            folder = stack.enter_context(_folder())
            stack.enter_context(_loopback())
            stack.callback(ray.shutdown)  # before the folder goes
            _start(ray, folder)
        else:
            _join(ray, address, stack)
        yield ray


def _start(ray: Any, folder: str | None) -> None:
    try:
        with _silently():
            ray.init(
                address="local",  # whatever RAY_ADDRESS says
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"Ray cannot be started here ({first_line(error)})") from None


def _join(ray: Any, address: str, stack: ExitStack) -> None:
    try:
        host, _, port = address.rpartition(":")
        if address != "auto":
            _answers(host.strip("[]"), int(port))  # Ray would try for two minutes
            if host in ("127.0.0.1", "localhost", "[::1]"):
                try:
                    _answers(ray.util.get_node_ip_address(), int(port))
                except OSError:  # this cluster listens on loopback only, and Ray would look for it elsewhere
                    stack.enter_context(_loopback())
        stack.callback(ray.shutdown)
        with _silently():
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (RuntimeError, ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f"--ray-address {address}: no Ray cluster that can be used ({first_line(error)}); "
            "give HOST:PORT of its head, or leave the option out to start one here"
        ) from None


def _answers(host: str, port: int) -> None:
    """Raise OSError unless something there accepts a connection."""
    with socket.create_connection((host, port), PATIENCE):
        pass


@contextmanager
def _folder() -> Iterator[str | None]:
    """A temporary folder for Ray's files, or ``None`` for its own choice where the name would be too long."""
    folder = tempfile.mkdtemp(prefix="ray-")
    try:
        yield folder if len(folder) <= MAX_FOLDER else None
    finally:
        for _ in range(20):  # processes that are about to end make folders anew
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)
            if not Path(folder).exists():
                break


@contextmanager
def _loopback() -> Iterator[None]:
    """Let a Ray that is started meanwhile listen on loopback only.

    On Linux it would put the machine's address in the place of any that is loopback, and listen on all of them; what
    keeps it from that elsewhere is this setting, which it reads when it is imported, and so do its processes.
    """
    from ray._private import ray_constants as constants

    name, key = "ENABLE_RAY_CLUSTER", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, environment = getattr(constants, name, True), os.environ.get(key)
    setattr(constants, name, False)
    os.environ[key] = "0"
    try:
        yield
    finally:
        setattr(constants, name, before)
        os.environ.pop(key)
        if environment is not None:
            os.environ[key] = environment


def room(device: str = "auto", actors: int | None = None) -> Room:
    """Actors that the connected cluster has room for, ``actors`` at most; at least a part of a CPU stays free.

    With an actor on every CPU nothing could be read, and the work would wait for ever. Where there are GPUs and
    ``device`` is ``auto`` or ``cuda``, each actor gets one. Raises UsageError for ``cuda`` without any GPU, for one by
    number, and where the cluster has no CPU.
    """
    ray = needed_ray()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return _room([node.get("CPU", 0.0) for node in nodes], [node.get("GPU", 0.0) for node in nodes], device, actors)


def _room(cpus: list[float], gpus: list[float], device: str, actors: int | None) -> Room:
    """:func:`room` of nodes with so many CPUs and GPUs."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device}: Ray hands out the GPUs; give auto, cpu or cuda")
    if max(cpus, default=0) <= 0:
        raise UsageError("the Ray cluster has no CPU left for actors; start its nodes with --num-cpus")
    number = int(sum(map(int, gpus)))
    if device == "cuda" and not number:
        raise UsageError("--device cuda: the Ray cluster has no GPU; give --device cpu")
    if device != "cpu" and number:
        # Decoding takes CPUs too: a node's share for each of its GPUs, less than all of them.
        shares = [c * (1 - SHARE / max(2.0, c)) / int(g) for c, g in zip(cpus, gpus, strict=True) if int(g) and c > 0]
        if shares:
            share = min(shares)
            return Room(min(number, actors or number), float(int(share)) if share >= 1 else share, 1.0, device)
        raise UsageError("the nodes of the Ray cluster that have GPUs have no CPU; start them with --num-cpus")
    largest = max(cpus)
    if largest < 2:
        each = SHARE * min(c for c in cpus if c > 0)
        most = sum(c > 0 for c in cpus)
    else:
        each = float(max(1, int(largest) // ACTORS_A_NODE))
        most = sum(int(c // each) for c in cpus)
        if most * each > sum(cpus) - 1:
            most -= 1
    if actors is not None:
        most = min(most, actors)
    return Room(max(1, most), each)


@contextmanager
def _silently() -> Iterator[None]:
    """Silence of standard error past Python, and of the processes that are started meanwhile.

    Ray says there at which level it logs. What is wrong it raises.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence of Ray's loggers and of those of its parts below an error of theirs meanwhile.

    Nor does Ray write that a process ended to standard output, between results; what matters of it is said by us.
    """
    names = ("ray", "ray.data", "ray.serve", "ray.train")
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    for logger, _ in before:
        logger.setLevel(logging.CRITICAL)
    from ray._private import worker  # no public setting leads to this one

    printed = getattr(worker, "_worker_logs_enabled", True)  # another release of Ray may not know it
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = printed
        for logger, level in before:
            logger.setLevel(level)
