"""The FAISS inner-product index over the keys, on a GPU where there is one."""

from __future__ import annotations

import importlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401 - before FAISS: on macOS each brings an OpenMP runtime, and torch's has to be the first

from retrieval_tip.errors import StoreError, UsageError

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

GPU_MAX_K = 2048
"""FAISS on a GPU retrieves no more keys, and probes no more lists; beyond it the CPU copy answers."""

TRAINING_PER_LIST = 256
"""Keys a list that a clustered index is trained on; FAISS itself uses no more."""


@cache
def faiss() -> Any:
    """The FAISS module, imported when it is first needed. Raises StoreError saying how to repair an installation."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise StoreError(f"faiss cannot be imported ({error}); run retrieval-tip doctor") from error


class VectorIndex:
    """Maximum inner product search over keys ``[n, d]``; row i of the keys is id i. It never normalises."""

    def __init__(self, index: Any, factory: str, device: str = "auto") -> None:
        self._cpu = index
        self.factory = factory
        self._wanted = device
        self._gpu = _on_gpu(index, device)
        self._lock = threading.Lock()

    @classmethod
    def build(
        cls, keys: npt.NDArray[Any], factory: str = "Flat", device: str = "auto", block: int = 65536
    ) -> VectorIndex:
        """Train (where the type needs it) and fill an index over ``keys`` ``[n, d]`` float32 or float16.

        Keys are read in blocks, so they may be memory-mapped. Raises UsageError for a factory string that FAISS does
        not know, that would normalise, or that cannot be trained on so few keys.
        """
        n, d = keys.shape
        if re.search(r"(?<!\d)0+(?!\d)|(HNSW|NSG)0*1(?!\d)", factory):  # FAISS takes some of these, then crashes
            raise UsageError(f"index {factory!r}: a count in it is 0, or its graph has 1 link a key, which is too few")
        if "norm" in factory.lower():
            raise UsageError(
                f"index {factory!r}: normalises, which an index must not: fine-tuned keys are not unit vectors"
            )
        index = _attempt(factory, lambda: faiss().index_factory(d, factory, faiss().METRIC_INNER_PRODUCT))
        _set_search_effort(index)
        if not index.is_trained:
            sample = np.arange(n)
            lists = _lists(index)
            if lists and n > lists * TRAINING_PER_LIST:
                sample = np.sort(np.random.default_rng(0).choice(n, lists * TRAINING_PER_LIST, replace=False))
            training = np.ascontiguousarray(keys[sample], dtype=np.float32)
            _attempt(factory, lambda: index.train(training), f" (training it on {len(sample)} keys of {d} values)")
        _fill(index, keys, factory, block)
        return cls(index, factory, device)

    def refresh(self, keys: npt.NDArray[Any], block: int = 65536) -> None:
        """Hold these keys ``[n, d]`` instead; what was trained (lists, codes) stays as it was."""
        self._cpu.reset()
        _fill(self._cpu, keys, self.factory, block)
        if self._gpu is not None:
            self._gpu = _on_gpu(self._cpu, self._wanted)

    @classmethod
    def load(cls, path: Path, factory: str, device: str = "auto") -> VectorIndex:
        """Read an index file, memory-mapped where its type allows. Raises StoreError naming the file."""
        try:
            try:
                index = faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC)
            except RuntimeError:
                index = faiss().read_index(str(path))
        except RuntimeError as error:
            raise StoreError(f"{path}: FAISS cannot read it ({_reason(error)}); rebuild the index") from None
        return cls(index, factory, device)

    def save(self, path: Path) -> None:
        """Write the index file, from the CPU copy."""
        try:
            with path.open("wb") as file:  # by its name FAISS would take a full disk for success
                faiss().write_index(self._cpu, faiss().PyCallbackIOWriter(file.write))
        except RuntimeError as error:
            raise StoreError(f"{path}: FAISS cannot write it ({_reason(error)})") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from None

    @property
    def n(self) -> int:
        """Number of keys."""
        return int(self._cpu.ntotal)

    @property
    def d(self) -> int:
        """Length of a key."""
        return int(self._cpu.d)

    @property
    def device(self) -> str:
        """Where searches run: ``cpu`` or ``cuda``."""
        return "cpu" if self._gpu is None else "cuda"

    @property
    def exact_search(self) -> bool:
        """Whether the nearest keys are always found: only by ``Flat``."""
        return self._kind() == "IndexFlat" or self._kind() == "IndexFlatIP"

    @property
    def exact_affinity(self) -> bool:
        """Whether the affinities it returns are those of the keys, not of a compressed copy."""
        return self.exact_search or self._kind() in ("IndexIVFFlat", "IndexHNSWFlat", "IndexNSGFlat")

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Affinities ``[q, k]`` float32, largest first, and rows ``[q, k]`` int64 of the k nearest keys.

        Where an approximate index finds fewer, the rest has row -1. ``k`` is cut to the number of keys.
        """
        k = int(min(k, self.n))
        features = np.ascontiguousarray(features, dtype=np.float32)
        if self._gpu is not None and k <= GPU_MAX_K:
            with self._lock:  # the resources are one stream and one scratch memory
                affinity, rows = self._gpu.search(features, k)
        else:
            affinity, rows = self._cpu.search(features, k)
        return affinity, rows

    def _kind(self) -> str:
        return type(faiss().downcast_index(self._cpu)).__name__


@cache
def _gpu_resources() -> Any:
    return faiss().StandardGpuResources()


def _on_gpu(index: Any, device: str) -> Any | None:
    """A copy on the GPU, or None: the CPU was asked for, there is no GPU, or the type has no GPU form."""
    if device == "cpu" or faiss().get_num_gpus() < 1:
        return None
    number = int(device.partition(":")[2] or 0)
    try:
        return faiss().index_cpu_to_gpu(_gpu_resources(), number, index)
    except RuntimeError as error:
        log.info("the index stays on the CPU: %s", _reason(error))
        return None


def _fill(index: Any, keys: npt.NDArray[Any], factory: str, block: int) -> None:
    for start in range(0, len(keys), block):
        _attempt(factory, partial(index.add, np.ascontiguousarray(keys[start : start + block], dtype=np.float32)))


def _attempt(factory: str, run: Callable[[], Any], when: str = "") -> Any:
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"index {factory!r}: {_reason(error)}{when}") from None


def _reason(error: Exception) -> str:
    """What FAISS says, without the place in its source."""
    text = str(error).strip()
    return text.rpartition("' failed: ")[2] if "' failed: " in text else text.rpartition(": ")[2] or text


def _inner(index: Any) -> Iterator[Any]:
    """The index and those that it wraps."""
    while index is not None:
        index = faiss().downcast_index(index)
        yield index
        index = getattr(index, "index", None) or getattr(index, "base_index", None)


def _lists(index: Any) -> int:
    return next((int(part.nlist) for part in _inner(index) if hasattr(part, "nlist")), 0)


def _set_search_effort(index: Any) -> None:
    """FAISS probes one list and keeps 16 candidates by default: far too few for a cache, whose keys all count."""
    for part in _inner(index):
        if hasattr(part, "nprobe"):
            part.nprobe = min(int(part.nlist), max(8, int(part.nlist) // 8), GPU_MAX_K)
        if hasattr(part, "hnsw"):
            part.hnsw.efSearch = 128
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # seconds a subquantizer, for a search by Hamming distance
