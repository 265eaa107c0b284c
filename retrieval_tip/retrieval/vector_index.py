"""FAISS inner-product indexes over keys or over class means. If there is a GPU, searches run on it."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # must be imported before FAISS: on macOS, the OpenMP runtime of torch has to be loaded first
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import FloatArray, IntArray, KeyArray, slices
from retrieval_tip.errors import StoreError, UsageError, warn_once

FaissIndex = Any
"""A FAISS index. FAISS does not provide types."""

GPU_MAX_K = 2048
"""Maximum number of keys that FAISS can retrieve, and of lists that it can probe, on a GPU."""

PRODUCTS, QUERIES = {"cpu": 1 << 23, "cuda": 1 << 27}, {"cpu": 512, "cuda": 4096}
"""Maximum number of affinities and of queries per block of an exact search. The affinities take 32 or 512 MiB."""

_GPU = threading.RLock()
"""Lock for the GPU resources of FAISS, which all indexes in a process share."""

TRAINING_PER_LIST = 256
"""Number of training keys per list of a clustered index. FAISS does not use more."""

BY_CLASS = "Classes"
"""Factory of an index over class means."""

MOST_LINKS = 1024
"""Maximum number of links per key of a graph index."""

ADDED = 65536
"""Number of vectors that are added to a FAISS index at a time."""

AUTO_CLASSES = 8
"""Maximum number of whole classes per query that ``auto`` uses."""

FLAT_FACTORY = "Flat"
"""Factory of an exact index, which has no file, since it searches the keys themselves."""

UNCOMPRESSED = ("IndexFlat", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat", "IndexNSGFlat")
"""FAISS classes that store vectors without compression."""

_SCALARS = "SQ(4|6|8|fp16|bf16)"
_FACTORY = re.compile(
    r"((PCAW?R?|RR|OPQ([0-9]{1,9}_)?)[0-9]{1,9},)?"
    rf"(HNSW[0-9]{{0,9}}([,_](Flat|{_SCALARS}))?|(IVF[0-9]{{1,9}}(_HNSW[0-9]{{0,9}})?,)?"
    rf"(Flat|{_SCALARS}|PQ[0-9]{{1,9}}(x([3-9]|1[0-2]))?(fsr?|np)?|RaBitQ[1-9]?(fs)?))"
    rf"(,RFlat|,Refine\((Flat|{_SCALARS})\))?"
)
"""The factories that are accepted. FAISS supports more factories, but some are not safe. For example,
``Refine(IVF4,Flat)`` crashes the process, ``NSG16`` never finishes if keys are repeated, ``PCA7,OPQ60_300,Flat``
writes out of bounds, ``RQ2x24`` takes gigabytes, and ``SQ8_direct`` expects vectors of bytes.
"""


def auto_factory(n: int, c: int) -> tuple[str, int | None]:
    """Select the factory and k for ``n`` keys of ``c`` classes. This is used for ``--index auto``.

    The limits were measured with ``benchmarks/throughput.py --index`` on CLIP-like features:

    - If there are at most 4 keys per class, or at most 2048 keys in total, use all keys (``Flat``, k = all).
    - Otherwise, use the keys of at most 8 classes, and at most half of the keys (``Classes``). An inverted file takes
      longer, even for a few classes with many keys, and more of its answers differ from a search over all keys.
    """
    return (FLAT_FACTORY, None) if n <= max(4 * c, 2048) else (BY_CLASS, auto_k(n, c))


def auto_k(n: int, c: int) -> int:
    """Return the number of keys per query that goes with an automatic index over ``c`` classes."""
    return round(n * min(AUTO_CLASSES / c, 0.5))


def faiss() -> Any:  # FAISS has no types
    """Import FAISS when it is first needed. Raises StoreError if the import fails.

    On macOS, FAISS uses one thread, because its OpenMP runtime can crash next to the one of torch.
    """
    module = _imported()
    if sys.platform == "darwin":
        module.omp_set_num_threads(1)  # only applies to the calling thread
    return module


@cache
def _imported() -> Any:
    try:
        module = importlib.import_module("faiss")
    except ImportError as error:
        raise StoreError(f"faiss cannot be imported ({error}); run retrieval-tip doctor") from error
    # Otherwise a few queries are searched one by one.
    module.cvar.distance_compute_blas_threshold = 1
    return module


class VectorIndex:
    """A maximum inner product search over vectors. The vectors are not normalised, and the id of row i is i.

    The vectors are the keys. If the factory is ``Classes``, they are the class means, and ``by_class`` is true.
    ``trained`` is the number of vectors that the index was built from. ``path`` is the file that the index was read
    from, or ``None`` if the index has changed since then.

    The first search copies the index to a GPU, in half precision if ``half`` is true. If it is too large for a single
    GPU and ``device`` does not select one, it is spread over all GPUs. If the search has to run on the CPU, a warning
    is logged once.
    """

    def __init__(
        self,
        index: FaissIndex,
        factory: str,
        device: str = "auto",
        half: bool = False,
        path: Path | None = None,
        trained: int | None = None,
    ) -> None:
        self._index = index
        self.n = int(index.ntotal)
        self.d = int(index.d)
        self.trained = self.n if trained is None else trained
        self.factory = factory
        self.path = path
        self.by_class = factory == BY_CLASS
        self._device = device
        self._half = half

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.to_array(), self.factory, self._device, self._half, self.trained)

    @classmethod
    def build(cls, keys: KeyArray, factory: str, device: str = "auto") -> VectorIndex:
        """Build an index over keys, and train it if its type requires training.

        Raises UsageError if the factory is unknown, is not safe or normalises the keys, or if there are too few keys to
        train the index.
        """
        n, d = keys.shape
        inner = FLAT_FACTORY if factory == BY_CLASS else factory
        problem = _factory_problem(inner, n, d)
        if problem:
            shown = factory if len(factory) <= 80 else f"{factory[:80]}..."
            raise UsageError(f"index {shown!r}: {problem}")
        with _usage_errors(factory):
            index = faiss().index_factory(d, inner, faiss().METRIC_INNER_PRODUCT)
        _set_search_effort(index)
        if not index.is_trained:
            sample = np.arange(n)
            most = _lists(index) * TRAINING_PER_LIST
            if 0 < most < n:
                sample = np.sort(np.random.default_rng(0).choice(n, most, replace=False))
            training = np.ascontiguousarray(keys[sample], dtype=np.float32)
            with _usage_errors(
                factory, f" (while it was trained on {len(sample)} keys of {d} values)"
            ):
                index.train(training)
        with _usage_errors(factory):
            return cls(_filled(index, keys), factory, device, keys.dtype == np.float16)

    def refilled(self, keys: KeyArray) -> VectorIndex:
        """Return an index of the same type over other keys. The index is not trained again."""
        index = faiss().deserialize_index(self.to_array())  # a copy that is not memory-mapped
        index.reset()
        return VectorIndex(
            _filled(index, keys), self.factory, self._device, self._half, trained=self.trained
        )

    @classmethod
    def load(
        cls,
        path: Path,
        factory: str,
        device: str = "auto",
        half: bool = False,
        trained: int | None = None,
    ) -> VectorIndex:
        """Read an index file, and memory-map it if its type supports this.

        Raises StoreError if the file cannot be read.
        """
        try:
            try:
                index = faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC)
            except RuntimeError:
                with path.open("rb") as file:  # FAISS cannot open every name on Windows
                    index = faiss().read_index(faiss().PyCallbackIOReader(file.read))
        except (RuntimeError, OSError) as error:
            raise StoreError(
                f"{path}: FAISS cannot read it ({_reason(error)}); rebuild the index"
            ) from None
        return cls(index, factory, device, half, path, trained)

    def save(self, path: Path) -> None:
        """Write the CPU version of the index to ``path``. Raises StoreError if the file cannot be written."""
        try:
            # FAISS would not report a full disk if it opened the file itself.
            with path.open("wb") as file:
                faiss().write_index(self._cpu, faiss().PyCallbackIOWriter(file.write))
        except RuntimeError as error:
            raise StoreError(f"{path}: FAISS cannot write it ({_reason(error)})") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from None

    def to_array(self) -> npt.NDArray[np.uint8]:
        """Return the contents of the file that :meth:`save` would write."""
        array: npt.NDArray[np.uint8] = faiss().serialize_index(self._cpu)
        return array

    @property
    def _cpu(self) -> FaissIndex:
        faiss()  # for its number of threads
        return self._index

    @property
    def device(self) -> str:
        """The device on which searches run, ``cpu`` or ``cuda``."""
        return "cpu" if self._on_gpu is None else "cuda"

    @property
    def exact_affinity(self) -> bool:
        """Whether a search returns exact affinities. This is the case if the vectors are not compressed."""
        return _is_uncompressed(self._cpu)

    def vectors(self) -> FloatArray:
        """Return all vectors of an index over class means in float32."""
        vectors: FloatArray = self._cpu.reconstruct_n(0, self.n)
        return vectors

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Run :meth:`search_tensor` on an array, and return arrays."""
        affinity, rows = self.search_tensor(
            torch.from_numpy(np.asarray(features, dtype=np.float32)), k
        )
        return affinity.numpy(), rows.numpy()

    def search_tensor(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the affinities of the k nearest vectors of each query, largest first, and their rows, on its device.

        If an approximate search finds fewer than ``k`` vectors, the remaining rows are -1.
        """
        k = int(min(k, self.n))
        try:
            on_gpu = self._search_on_gpu(features, k)
            affinity, rows = _search(self._cpu, features, k) if on_gpu is None else on_gpu
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            if "alloc fail" in str(error):  # FAISS has run out of scratch memory
                raise torch.OutOfMemoryError(f"{self._name}: FAISS: {_reason(error)}") from None
            raise StoreError(
                f"{self._name}: FAISS cannot search it ({_reason(error)}); rebuild the index"
            ) from None
        if rows.is_cpu and rows.numel() and not -1 <= rows.min() <= rows.max() < self.n:
            raise StoreError(
                f"{self._name}: damaged (a search returned invalid rows); rebuild the index"
            )
        return affinity.to(features.device), rows.to(features.device)

    @property
    def _name(self) -> str:
        return str(self.path) if self.path else f"index {self.factory!r}"

    @property
    def _on_gpu(self) -> FaissIndex | None:
        """The copy on a GPU, which is created if necessary, or ``None`` if searches run on the CPU."""
        if self._device == "cpu" or not torch.cuda.is_available():
            return None
        with _GPU:
            return self._copied

    @cached_property
    def _copied(self) -> FaissIndex | None:
        try:
            return self._copy()
        except RuntimeError as error:
            warn_once(f"the index is searched on the CPU: {_reason(error)}")
            return None

    def _search_on_gpu(self, features: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Return the affinities and rows of the nearest vectors, or ``None`` if the search must run on the CPU."""
        copied = self._on_gpu
        if copied is None:
            return None
        if k > GPU_MAX_K:
            warn_once(
                f"FAISS finds at most {GPU_MAX_K:,} keys on a GPU; larger searches run on the CPU"
            )
            return None
        # A copy that has transforms or is spread over several GPUs only accepts arrays. Such a copy has no getDevice.
        if features.is_cpu or getattr(copied, "getDevice", lambda: None)() != features.device.index:
            with _GPU:
                return _search(copied, features, k)
        # After this import, FAISS accepts tensors. It uses the stream of the current device.
        importlib.import_module("faiss.contrib.torch_utils")
        with _GPU, torch.cuda.device(features.device):
            nearest: tuple[Tensor, Tensor] = copied.search(features.contiguous(), k)
        return nearest

    def _copy(self) -> FaissIndex:
        """Create the copy. Raises RuntimeError if this is not possible."""
        asked = self._device.partition(":")[2]
        index = self._cpu
        number = int(asked or torch.cuda.current_device())
        size = _bytes_on_gpu(index)
        room = int(torch.cuda.mem_get_info(number)[0]) // 2
        gpus = int(faiss().get_num_gpus())
        if not gpus:
            raise RuntimeError("FAISS finds no GPU, but torch does (see retrieval-tip doctor)")
        options = faiss().GpuMultipleClonerOptions()
        # float16 also rounds the queries.
        options.useFloat16 = self._half and not _is_uncompressed(index)
        options.use_cuvs = "CUVS" in faiss().get_compile_options().upper()
        options.shard = size > room
        if size <= room:
            return faiss().index_cpu_to_gpu(resources(), number, index, options)
        if gpus > 1 and not asked:
            return faiss().index_cpu_to_all_gpus(index, options)
        raise RuntimeError(
            f"it takes {size:,} bytes, but half of the free GPU memory is {room:,} bytes"
        )


def flat_search(keys: FloatArray, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the affinities of the ``k`` nearest keys of each query, largest first, and their rows.

    FAISS reads the keys in place, so they need neither an index nor a copy.
    """
    wanted = np.ascontiguousarray(features.numpy(), dtype=np.float32)
    affinity, rows = faiss().knn(wanted, keys, int(k), metric=faiss().METRIC_INNER_PRODUCT)
    return torch.from_numpy(affinity), torch.from_numpy(rows)


def exact_search(vectors: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the affinities of the ``k`` nearest vectors of each query, largest first, and their rows, by torch.

    The products are computed in float32, even if the vectors are float16.
    """
    parts = [
        _nearest(vectors, queries, k) for queries in features.split(QUERIES[features.device.type])
    ]
    affinity, rows = zip(*parts, strict=True)
    return torch.cat(affinity), torch.cat(rows)


def _nearest(vectors: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    affinity = features.new_empty(len(features), 0)
    rows = features.new_empty(len(features), 0, dtype=torch.int64)
    step = max(1, PRODUCTS[features.device.type] // max(features.shape))
    for rows_read in slices(len(vectors), step):
        block = vectors[rows_read].to(features.device)
        near, place = tip.affinity(features, block.float()).topk(min(k, len(block)), dim=1)
        affinity = torch.cat([affinity, near], dim=1)
        rows = torch.cat([rows, place + rows_read.start], dim=1)
        if rows_read.start:
            affinity, place = affinity.topk(min(k, affinity.shape[1]), dim=1)
            rows = rows.gather(1, place)
    return affinity, rows


@cache
def resources() -> object:
    """Return GPU resources that reserve less memory than the FAISS defaults of 1.5 GiB per GPU and 256 MiB pinned."""
    made = faiss().StandardGpuResources()
    made.setTempMemory(512 << 20)
    made.setPinnedMemory(32 << 20)
    return made


def _restored(
    array: npt.NDArray[np.uint8], factory: str, device: str, half: bool, trained: int
) -> VectorIndex:
    return VectorIndex(faiss().deserialize_index(array), factory, device, half, trained=trained)


def _filled(index: FaissIndex, keys: KeyArray) -> FaissIndex:
    """Add keys to a trained FAISS index, and return it."""
    for rows in slices(len(keys), ADDED):
        index.add(np.ascontiguousarray(keys[rows], dtype=np.float32))
    return index


def _search(index: FaissIndex, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search an index with arrays."""
    affinity, rows = index.search(np.ascontiguousarray(features.cpu().numpy(), dtype=np.float32), k)
    return torch.from_numpy(affinity), torch.from_numpy(rows)


def _is_uncompressed(index: FaissIndex) -> bool:
    return type(faiss().downcast_index(index)).__name__ in UNCOMPRESSED


def _bytes_on_gpu(index: FaissIndex) -> int:
    size = 4 * int(index.d)
    for inner in _inner(index):
        size = int(getattr(inner, "code_size", size))  # the innermost counts
    return int(index.ntotal) * (size + 8)


def _factory_problem(factory: str, n: int, d: int) -> str | None:
    """Return what is wrong with a factory for ``n`` vectors of length ``d``, or ``None``."""
    if "norm" in factory.lower():
        return (
            "it normalises vectors, but fine-tuned keys are not unit vectors; use another factory"
        )
    if not _FACTORY.fullmatch(factory):
        return (
            "this factory is not supported; use Flat, IVF256,Flat, HNSW32, SQ8, PQ16, RaBitQ4 or a combination such as "
            "PCA64,IVF256,PQ16,RFlat"
        )
    for name, count in re.findall(
        r"(IVF|HNSW|PQ|PCAW?R?|RR|_)([0-9]+)", factory
    ):  # PQ also matches OPQ
        least, most = {"IVF": (1, n), "HNSW": (2, MOST_LINKS)}.get(name, (1, d))
        if not least <= int(count) <= most:
            return f"{count} is out of range; use {least} to {most:,} for {n:,} vectors of {d:,} values"
    return None


@contextmanager
def _usage_errors(factory: str, when: str = "") -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"index {factory!r}: {_reason(error)}{when}") from None


def _reason(error: Exception) -> str:
    """Return the message of a FAISS error without its location in the FAISS source."""
    text = str(error).strip()
    _, failed, reason = text.rpartition("' failed: ")
    if failed:
        return reason
    return text.rpartition(": ")[2] or text


def _inner(index: FaissIndex) -> Iterator[FaissIndex]:
    """Yield the index and each index that it wraps."""
    while index is not None:
        index = faiss().downcast_index(index)
        yield index
        index = getattr(index, "index", None) or getattr(index, "base_index", None)


def _lists(index: FaissIndex) -> int:
    return next((int(inner.nlist) for inner in _inner(index) if hasattr(inner, "nlist")), 0)


def _set_search_effort(index: FaissIndex) -> None:
    """Increase the FAISS defaults of 1 list and 16 candidates, which are too low for a cache."""
    for inner in _inner(index):
        if hasattr(inner, "cp"):
            # By default, FAISS prints a warning if there are fewer than 39.
            inner.cp.min_points_per_centroid = 1
        if hasattr(inner, "nprobe"):
            inner.nprobe = min(
                int(inner.nlist), max(8, round(2 * int(inner.nlist) ** 0.5)), GPU_MAX_K
            )
        if hasattr(inner, "k_factor"):
            inner.k_factor = 4  # recompute the affinities of 4 k candidates exactly
        if hasattr(inner, "hnsw"):
            inner.hnsw.efSearch = 128
        if hasattr(inner, "do_polysemous_training"):
            # It takes seconds and is only used for Hamming distances.
            inner.do_polysemous_training = False
