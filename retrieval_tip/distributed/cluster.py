"""Connect to a Ray cluster or start one on this machine, and compute how many actors it can run."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from retrieval_tip.errors import UsageError, first_line, install

ACTORS_A_NODE = 8
"""Maximum number of actors on a node that has no GPU. Each actor uses a share of the CPUs."""
PATIENCE = 5.0
"""Number of seconds to wait for a connection to the head of a cluster. Ray itself would wait for minutes."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the cluster at ``address``, or start a cluster on this machine, until the context ends.

    Raises UsageError if Ray is not installed or if the cluster does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # otherwise, messages bypass the Python loggers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning of old Ray releases
    try:
        import ray
    except ImportError:
        raise UsageError(f"Ray is not installed; run {install('ray')}") from None
    try:
        if address not in (None, "auto"):
            host, _, port = str(address).rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.CRITICAL)
    except (RuntimeError, ValueError, OverflowError, OSError) as error:
        where = (
            f"--ray-address {address}: give HOST:PORT of the head of a Ray cluster" if address else "cannot start Ray"
        )
        raise UsageError(f"{where} ({first_line(error)})") from None
    try:
        yield
    finally:
        ray.shutdown()


def room(nodes: Iterable[Mapping[str, Any]], device: str) -> tuple[int, int, int]:
    """Return the number of actors that ``nodes`` can run, and the number of CPUs and GPUs per actor.

    ``nodes`` is the result of ``ray.nodes()``. One actor runs on each GPU. Raises UsageError if no node has a whole
    CPU.
    """
    found = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in found]
    gpus = 0 if device == "cpu" else sum(int(node.get("GPU", 0)) for node in found)
    each = 1 if gpus else max(1, max(cpus) // ACTORS_A_NODE)
    actors = min(gpus, sum(cpus)) or sum(number // each for number in cpus)
    if not actors:
        raise UsageError("the Ray cluster has no CPU for actors; start its nodes with --num-cpus")
    return actors, each, min(gpus, 1)
