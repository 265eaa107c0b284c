"""FAISS inner-product indexes over keys or over class means, on a GPU if there is one."""

from __future__ import annotations

import copy
import importlib
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # before FAISS: on macOS each brings an OpenMP runtime, and torch's must load first
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.errors import StoreError, UsageError, warn_once
from retrieval_tip.retrieval.segments import KeyArray, Segments

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
FaissIndex = Any
"""A FAISS index. FAISS ships no types."""

HEADER = 45
"""Bytes of the smallest index file: the header of a flat index without vectors."""

GPU_MAX_K = 2048
"""Maximum number of keys that FAISS retrieves, and of lists that it probes, on a GPU. The CPU answers a larger k."""

PRODUCTS, QUERIES = 1 << 27, 4096
"""Maximum number of affinities (512 MiB of float32) and of queries per block on a GPU."""

_GPU = threading.RLock()
"""Lock of FAISS's GPU resources: a process has one stream and one scratch memory for all its indexes."""

TRAINING_PER_LIST = 256
"""Training keys per list of a clustered index. FAISS itself uses no more."""

BY_CLASS = "Classes"
"""Factory of an index over class means: ``Classes``, optionally followed by ``,`` and a FAISS factory for the means."""

MOST_LINKS = 1024
"""Maximum number of links per key of a graph index."""

FLAT = ("IndexFlat", "IndexFlatIP")
UNCOMPRESSED = (*FLAT, "IndexIVFFlat", "IndexHNSWFlat", "IndexNSGFlat")
"""FAISS classes that store the vectors uncompressed."""

_SCALARS = "SQ(4|6|8|fp16|bf16)"
_FACTORY = re.compile(
    r"((PCAW?R?|RR|OPQ([0-9]{1,9}_)?)[0-9]{1,9},)?"
    rf"(HNSW[0-9]{{0,9}}([,_](Flat|{_SCALARS}))?|(IVF[0-9]{{1,9}}(_HNSW[0-9]{{0,9}})?,)?"
    rf"(Flat|{_SCALARS}|PQ[0-9]{{1,9}}(x([3-9]|1[0-2]))?(fsr?|np)?|RaBitQ[1-9]?(fs)?))"
    rf"(,RFlat|,Refine\((Flat|{_SCALARS})\))?"
)
"""Accepted factories. Others that FAISS knows may crash the process (``Refine(IVF4,Flat)``), never end (``NSG16`` with
repeated keys), write out of bounds (``PCA7,OPQ60_300,Flat``), take gigabytes (``RQ2x24``), or expect other vectors
(``SQ8_direct``: bytes)."""


def inner_factory(factory: str) -> str | None:
    """Return FAISS's part of a factory over class means (default ``Flat``); ``None`` for one over the keys."""
    name, _, rest = factory.partition(",")
    return (rest or "Flat") if name == BY_CLASS else None


def auto_factory(n: int, c: int) -> tuple[str, int | None]:
    """Choose the factory and k for ``n`` keys of ``c`` classes (``--index auto``).

    The limits come from benchmarks/throughput.py (``--index``), on features like CLIP's:

    - up to 4 keys per class, or 2048 in all: every key (``Flat``, k = all). The text weights cost as much as the keys.
    - up to ``4 sqrt(n)`` keys per class: whole classes (``Classes``), at most 8.
    - more: the 256 nearest keys, by an inverted file of ``4 sqrt(n)`` lists.
    """
    if n <= max(4 * c, 2048):
        return "Flat", None
    if n <= 4 * c * n**0.5:
        return BY_CLASS, round(8 * n / c)
    return lists_for(n), 256


def lists_for(n: int) -> str:
    """Return the factory of an inverted file for ``n`` vectors."""
    return f"IVF{round(4 * n**0.5)},Flat"


@cache
def faiss() -> Any:  # a module without types
    """Import FAISS when first needed. Raises StoreError if that fails."""
    try:
        module = importlib.import_module("faiss")
    except ImportError as error:
        raise StoreError(f"faiss cannot be imported ({error}); run retrieval-tip doctor") from error
    module.cvar.distance_compute_blas_threshold = 1  # by default, FAISS searches a few dozen queries one by one
    return module


class VectorIndex:
    """Maximum inner product search over vectors ``[n, d]``, without normalisation; the id of row i is i.

    The vectors are the keys, or class means if the factory is ``Classes`` (``by_class``). ``path`` is the file that the
    index was read from, until it changes. Vectors added by :meth:`plus` are compared with every query and not saved.
    """

    def __init__(
        self, index: FaissIndex, factory: str, device: str = "auto", half: bool = False, path: Path | None = None
    ) -> None:
        self._cpu, self.path = index, path
        self._late: FaissIndex | None = None
        self._late_rows: IntArray = np.empty(0, dtype=np.int64)
        self._late_vectors: Callable[[], FloatArray] = lambda: np.empty((0, self.d), dtype=np.float32)
        self.factory = factory
        self.by_class = inner_factory(factory) is not None
        self._gpu = GpuCopy(index, device, half)
        self._lock = threading.Lock()

    @classmethod
    def build(
        cls, keys: KeyArray | Segments, factory: str = "Flat", device: str = "auto", block: int = 65536
    ) -> VectorIndex:
        """Build an index over ``keys`` ``[n, d]`` float32 or float16, with training if its type needs it.

        Keys may be memory-mapped; they are read in blocks. Raises UsageError for a factory that is unknown, unsafe or
        normalises, or if there are too few keys to train it.
        """
        n, d = keys.shape
        inner = inner_factory(factory) or factory
        if problem := _factory_problem(inner, n, d):
            raise UsageError(f"index {factory if len(factory) <= 80 else factory[:80] + '...'!r}: {problem}")
        with _usage_errors(factory):
            index = faiss().index_factory(d, inner, faiss().METRIC_INNER_PRODUCT)
        _set_search_effort(index)
        if not index.is_trained:
            sample = np.arange(n)
            lists = _lists(index)
            if lists and n > lists * TRAINING_PER_LIST:
                sample = np.sort(np.random.default_rng(0).choice(n, lists * TRAINING_PER_LIST, replace=False))
            training = np.ascontiguousarray(keys[sample], dtype=np.float32)
            with _usage_errors(factory, f" (training it on {len(sample)} keys of {d} values)"):
                index.train(training)
        with _usage_errors(factory):
            for start in range(0, n, block):
                index.add(np.ascontiguousarray(keys[start : start + block], dtype=np.float32))
        return cls(index, factory, device, keys.dtype == np.float16)

    def plus(self, rows: IntArray, vectors: Callable[[], FloatArray]) -> VectorIndex:
        """Return this index with other ``vectors`` ``[m, d]`` at ascending ``rows`` ``[m]``, without training.

        They replace vectors of these rows, or follow the last row without a gap. The first search calls ``vectors``;
        every search compares its queries with all of them.
        """
        longer = copy.copy(self)
        longer._late, longer._late_rows, longer._late_vectors = None, rows, vectors
        return longer

    def bare(self) -> VectorIndex:
        """Return this index without the vectors of :meth:`plus`."""
        return self.plus(np.empty(0, dtype=np.int64), lambda: np.empty((0, self.d), dtype=np.float32))

    def _beside(self) -> FaissIndex:
        """Return the flat index over the vectors of :meth:`plus`, built on first use."""
        with self._lock:
            if self._late is None:
                late = faiss().IndexFlatIP(self.d)
                late.add(np.ascontiguousarray(self._late_vectors(), dtype=np.float32))
                self._late = late
            return self._late

    @property
    def indexed(self) -> int:
        """Number of vectors in the index itself, without :meth:`plus`."""
        return int(self._cpu.ntotal)

    @classmethod
    def load(cls, path: Path, factory: str, device: str = "auto", half: bool = False) -> VectorIndex:
        """Read an index file, memory-mapped if its type allows; with ``half``, a GPU holds it in half precision.

        Raises StoreError naming the file.
        """
        if problem := _size_problem(path):
            raise StoreError(f"{path}: {problem}; rebuild the index")
        try:
            try:
                index = faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC)
            except RuntimeError:
                index = faiss().read_index(str(path))
        except RuntimeError as error:
            raise StoreError(f"{path}: FAISS cannot read it ({_reason(error)}); rebuild the index") from None
        return cls(index, factory, device, half, path)

    def save(self, path: Path) -> None:
        """Write the index, as it is on the CPU, to ``path``."""
        try:
            with path.open("wb") as file:  # given a name, FAISS ignores a full disk
                faiss().write_index(self._cpu, faiss().PyCallbackIOWriter(file.write))
        except RuntimeError as error:
            raise StoreError(f"{path}: FAISS cannot write it ({_reason(error)})") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from None

    @property
    def n(self) -> int:
        """Number of vectors."""
        return max(self.indexed, int(self._late_rows[-1]) + 1 if len(self._late_rows) else 0)

    @property
    def d(self) -> int:
        """Length of a vector."""
        return int(self._cpu.d)

    @property
    def device(self) -> str:
        """Device of searches: ``cpu`` or ``cuda``."""
        return "cpu" if self._gpu.get() is None else "cuda"

    @property
    def exact_search(self) -> bool:
        """Whether a search always finds the nearest keys (``Flat`` only)."""
        return not self.by_class and _is_one_of(FLAT, self._cpu)

    @property
    def exact_affinity(self) -> bool:
        """Whether returned affinities are exact, because the vectors are not compressed."""
        return _is_one_of(UNCOMPRESSED, self._cpu)

    @property
    def effort(self) -> int | None:
        """Number of lists that a search probes, or of graph candidates; ``None`` for types without such a setting.

        A higher effort finds more of the nearest vectors and takes longer. It is saved with the index.
        """
        return next((int(getattr(*place)) for place in _effort_of(self._cpu)), None)

    @effort.setter
    def effort(self, value: int | None) -> None:
        if value is None or value == self.effort:
            return
        self.path = None
        for place in _effort_of(self._cpu):
            setattr(*place, value)
        self._gpu.probe(value)

    @contextmanager
    def limited(self, effort: int) -> Iterator[None]:
        """Limit :attr:`effort` inside the context, without a change to the saved index."""
        before, path = self.effort, self.path
        self.effort = None if before is None else min(before, effort)
        try:
            yield
        finally:
            self.effort = before
            self.path = path

    @property
    def effort_limit(self) -> int | None:
        """Largest useful :attr:`effort`, or ``None``."""
        lists = _lists(self._cpu)
        return lists or (self.n if self.effort is not None else None)

    def vectors(self) -> FloatArray:
        """Return the vectors ``[n, d]`` float32, approximate unless :attr:`exact_affinity`."""
        for part in _inner(self._cpu):
            if hasattr(part, "make_direct_map"):
                part.make_direct_map()
        vectors = np.empty((self.n, self.d), dtype=np.float32)
        vectors[: self.indexed] = self._cpu.reconstruct_n(0, self.indexed)
        if len(self._late_rows):
            vectors[self._late_rows] = self._beside().reconstruct_n(0, len(self._late_rows))
        return vectors

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Return affinities ``[q, k]`` float32, largest first, and rows ``[q, k]`` int64 of the k nearest vectors.

        ``k`` is limited to the number of vectors. Row -1 fills up what an approximate index does not find.
        """
        k = int(min(k, self.n))
        features = np.ascontiguousarray(features, dtype=np.float32)
        if len(self._late_rows):
            return self._search_both(features, k)
        return self._search_indexed(features, k)

    def _search_both(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Merge the index's hits, without replaced vectors, and hits among the vectors of :meth:`plus`."""
        replaced = int(np.searchsorted(self._late_rows, self.indexed))
        asked = min(k + min(replaced, k), self.indexed)
        while True:
            affinity, rows = self._search_indexed(features, asked)
            gone = np.isin(rows, self._late_rows[:replaced]) if replaced else rows < 0
            lacking = (gone.sum(axis=1) > asked - k).any() and asked < min(k + replaced, self.indexed)
            if not lacking:
                break
            asked = min(4 * asked, k + replaced, self.indexed)
        affinity, rows = np.where(gone, -np.inf, affinity), np.where(gone, -1, rows)
        late, places = self._beside().search(features, min(k, len(self._late_rows)))
        affinity, rows = np.hstack([affinity, late]), np.hstack([rows, self._late_rows[places]])
        affinity[rows < 0] = -np.inf
        order = np.argsort(-affinity, axis=1, kind="stable")[:, :k]
        affinity, rows = np.take_along_axis(affinity, order, 1), np.take_along_axis(rows, order, 1)
        return np.where(rows < 0, np.finfo(np.float32).min, affinity), rows

    @property
    def _name(self) -> str:
        return str(self.path) if self.path else f"index {self.factory!r}"

    def _search_indexed(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        with self._errors_named():
            affinity, rows = self._gpu.search(features, k) or self._cpu.search(features, k)
        if rows.size and not -1 <= rows.min() <= rows.max() < self.indexed:
            raise StoreError(f"{self._name}: damaged (finds rows out of range); rebuild the index")
        return affinity, rows

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Raise FAISS's errors as StoreError naming the index, or as torch's OutOfMemoryError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            if "alloc fail" in str(error):  # FAISS's scratch memory
                raise torch.OutOfMemoryError(f"{self._name}: FAISS: {_reason(error)}") from None
            raise StoreError(f"{self._name}: FAISS cannot search it ({_reason(error)}); rebuild the index") from None

    def search_tensor(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Run :meth:`search` on a tensor, with results on its device; on a GPU, nothing passes through the host."""
        k = int(min(k, self.n))
        with self._errors_named():
            found = None if len(self._late_rows) else self._gpu.search_tensor(features, k)
        if found is None:
            affinity, rows = self.search(features.cpu().numpy(), k)
            found = torch.from_numpy(affinity).to(features.device), torch.from_numpy(rows).to(features.device)
        return found


class GpuCopy:
    """GPU copy of a FAISS index, made by the first search.

    For ``Flat``, the GPU holds only the vectors (in half precision if ``half``), and torch computes their products.
    Other supported types are cloned by FAISS, over all GPUs if one is too small and the device names none. ``auto`` is
    torch's current GPU. If the CPU has to search instead, a warning says so once.
    """

    def __init__(self, index: FaissIndex, device: str, half: bool) -> None:
        self._index, self._half = index, half
        self._wanted, self._number = device != "cpu" and torch.cuda.is_available(), device.partition(":")[2]
        self._tried, self._held = False, None

    def get(self) -> FaissIndex | None:
        """Return the copy, made if necessary; ``None`` if searches run on the CPU."""
        if not self._wanted:
            return None
        with _GPU:
            if not self._tried:
                try:
                    self._held = self._copy()
                except RuntimeError as error:
                    warn_once(f"searching an index on the CPU: {_reason(error)}")
                self._tried = True
            return self._held

    def probe(self, lists: int) -> None:
        """Set the number of lists to probe, limited to :data:`GPU_MAX_K`."""
        with _GPU:
            if self._held is not None and not isinstance(self._held, Product):
                faiss().GpuParameterSpace().set_index_parameter(self._held, "nprobe", min(lists, GPU_MAX_K))

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray] | None:
        """Return affinities and rows ``[q, k]`` of the nearest vectors; ``None`` if the CPU must search."""
        copied = self._copy_for(k)
        if copied is None:
            return None
        if isinstance(copied, Product):
            affinity, rows = copied.search(torch.from_numpy(features), k)
            return affinity.cpu().numpy(), rows.cpu().numpy()
        with _GPU:
            found: tuple[FloatArray, IntArray] = copied.search(features, k)
        return found

    def search_tensor(self, features: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """Run :meth:`search` on a tensor; ``None`` if this copy only takes arrays."""
        copied = None if features.device.type == "cpu" else self._copy_for(k)
        if isinstance(copied, Product):
            return copied.search(features, k)
        # Transforms around a copy, and copies on several GPUs, only take arrays; they have no getDevice.
        if getattr(copied, "getDevice", lambda: None)() != features.device.index or copied is None:
            return None
        importlib.import_module("faiss.contrib.torch_utils")  # lets FAISS take tensors
        with _GPU, torch.cuda.device(features.device):  # FAISS uses its stream
            found: tuple[Tensor, Tensor] = copied.search(features.contiguous(), k)
        return found

    def _copy_for(self, k: int) -> FaissIndex | None:
        """Return the copy if it can retrieve ``k`` vectors."""
        copied = self.get()
        if copied is None or isinstance(copied, Product) or k <= GPU_MAX_K:
            return copied
        warn_once(f"FAISS finds at most {GPU_MAX_K:,} keys on a GPU; searching on the CPU for more")
        return None

    def _copy(self) -> FaissIndex:
        """Make the copy. Raises RuntimeError with the reason if that is impossible."""
        number = int(self._number or torch.cuda.current_device())
        size, room = _bytes_on_gpu(self._index, self._half), int(torch.cuda.mem_get_info(number)[0]) // 2
        if _is_one_of(FLAT, self._index) and size <= room:
            return Product.of(self._index, f"cuda:{number}", self._half)
        gpus = int(faiss().get_num_gpus())
        if not gpus:
            raise RuntimeError("FAISS finds no GPU, but torch does (see retrieval-tip doctor)")
        if size <= room:
            return self._clone(lambda options: faiss().index_cpu_to_gpu(resources(), number, self._index, options))
        if gpus > 1 and not self._number:
            return self._clone(lambda options: faiss().index_cpu_to_all_gpus(self._index, options), shard=True)
        raise RuntimeError(f"it takes {size:,} bytes, more than half of the GPU's free memory ({room:,} bytes)")

    def _clone(self, clone: Callable[[object], FaissIndex], shard: bool = False) -> FaissIndex:
        """Clone the index by FAISS, with at most :data:`GPU_MAX_K` lists to probe."""
        options = faiss().GpuMultipleClonerOptions()
        options.useFloat16 = self._half and not _is_one_of(UNCOMPRESSED, self._index)  # would round queries, too
        options.use_cuvs = "CUVS" in faiss().get_compile_options().upper()
        options.shard = shard
        cut = [(part, lists) for part in _inner(self._index) if (lists := getattr(part, "nprobe", 0)) > GPU_MAX_K]
        try:
            for part, _ in cut:
                warn_once(f"FAISS probes at most {GPU_MAX_K:,} lists on a GPU; the CPU would probe {part.nprobe:,}")
                part.nprobe = GPU_MAX_K
            return clone(options)
        finally:
            for part, lists in cut:
                part.nprobe = lists


class Product:
    """Exact search on a GPU, by products of the queries with all vectors ``[n, d]`` float32 or float16."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    @classmethod
    def of(cls, index: FaissIndex, device: str, half: bool) -> Product:
        """Copy the vectors of a flat FAISS index to ``device``."""
        n, d = int(index.ntotal), int(index.d)
        vectors = torch.empty(n, d, dtype=torch.float16 if half else torch.float32, device=device)
        for start in range(0, n, 65536):
            part = vectors[start : start + 65536]
            part.copy_(torch.as_tensor(index.reconstruct_n(start, len(part))))
        return cls(vectors)

    def search(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return affinities ``[q, k]``, largest first, and rows of the ``k <= n`` nearest, on the GPU.

        Products are float32, also of float16 vectors.
        """
        features = features.to(self.vectors.device)
        affinity = features.new_empty(len(features), k)
        rows = torch.empty(affinity.shape, dtype=torch.int64, device=features.device)
        for start in range(0, len(features), QUERIES):
            part = slice(start, start + QUERIES)
            affinity[part], rows[part] = self._nearest(features[part], k)
        return affinity, rows

    def _nearest(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        affinity, rows = features.new_empty(len(features), 0), features.new_empty(len(features), 0, dtype=torch.int64)
        step = max(1, PRODUCTS // max(features.shape))
        for start in range(0, len(self.vectors), step):
            block = self.vectors[start : start + step]
            near, place = tip.affinity(features, block.float()).topk(min(k, len(block)), dim=1)
            affinity, rows = torch.cat([affinity, near], dim=1), torch.cat([rows, place + start], dim=1)
            if affinity.shape[1] > k:
                affinity, place = affinity.topk(k, dim=1)
                rows = rows.gather(1, place)
        return affinity, rows


@cache
def resources() -> object:
    """Return FAISS's GPU resources, with less memory than by default (1.5 GiB per GPU, 256 MiB pinned)."""
    made = faiss().StandardGpuResources()
    made.setTempMemory(512 << 20)
    made.setPinnedMemory(32 << 20)
    return made


def _is_one_of(kinds: tuple[str, ...], index: FaissIndex) -> bool:
    return type(faiss().downcast_index(index)).__name__ in kinds


def _bytes_on_gpu(index: FaissIndex, half: bool) -> int:
    """Estimate the GPU memory of an index: vectors or codes, and ids."""
    if _is_one_of(FLAT, index):
        return int(index.ntotal) * int(index.d) * (2 if half else 4)
    codes = [int(part.code_size) for part in _inner(index) if hasattr(part, "code_size")]
    return int(index.ntotal) * ((codes[-1] if codes else 4 * int(index.d)) + 8)


def _factory_problem(factory: str, n: int, d: int) -> str | None:
    """Return the fault of a factory for ``n`` vectors of ``d`` values, or ``None``."""
    if "norm" in factory.lower():
        return "normalises, but fine-tuned keys are not unit vectors; use a factory without normalisation"
    if not _FACTORY.fullmatch(factory):
        return (
            "unsupported factory; use Flat, IVF256,Flat, HNSW32, SQ8, PQ16, RaBitQ4 or a combination such as "
            "PCA64,IVF256,PQ16,RFlat"
        )
    for name, count in re.findall(r"(IVF|HNSW|PQ|PCAW?R?|RR|_)([0-9]+)", factory):  # OPQ ends in PQ
        least, most = {"IVF": (1, n), "HNSW": (2, MOST_LINKS)}.get(name, (1, d))
        if not least <= int(count) <= most:
            return f"{count} is out of range; use {least} to {most:,} for {n:,} vectors of {d:,} values"
    return None


def _size_problem(path: Path) -> str | None:
    """Return the fault of a file's size, or ``None``: FAISS may crash when it maps a truncated file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if len(head) < HEADER:
        return "damaged (too short for an index)"
    fourcc, d, ntotal = struct.unpack("<4siq", head[:16])
    if fourcc in (b"IxFI", b"IxFl", b"IxF2") and size != HEADER + 4 * d * ntotal:
        return f"damaged (has {size:,} bytes for {ntotal:,} vectors of {d:,} values)"
    return None


@contextmanager
def _usage_errors(factory: str, when: str = "") -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"index {factory!r}: {_reason(error)}{when}") from None


def _reason(error: Exception) -> str:
    """Return the text of FAISS's error, without the location in its source."""
    text = str(error).strip()
    return text.rpartition("' failed: ")[2] if "' failed: " in text else text.rpartition(": ")[2] or text


def _inner(index: FaissIndex) -> Iterator[FaissIndex]:
    """Yield the index, then those that it wraps."""
    while index is not None:
        index = faiss().downcast_index(index)
        yield index
        index = getattr(index, "index", None) or getattr(index, "base_index", None)


def _effort_of(index: FaissIndex) -> Iterator[tuple[FaissIndex, str]]:
    """Yield the object and attribute that hold the effort, if there is one."""
    for part in _inner(index):
        if hasattr(part, "nprobe"):
            yield part, "nprobe"
            return
        if hasattr(part, "hnsw"):
            yield part.hnsw, "efSearch"
            return


def _lists(index: FaissIndex) -> int:
    return next((int(part.nlist) for part in _inner(index) if hasattr(part, "nlist")), 0)


def _set_search_effort(index: FaissIndex) -> None:
    """Raise FAISS's defaults, 1 list and 16 candidates: too few for a cache, where all keys count."""
    for part in _inner(index):
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1  # below 39, FAISS prints a warning
        if hasattr(part, "nprobe"):
            part.nprobe = min(int(part.nlist), max(8, round(2 * int(part.nlist) ** 0.5)), GPU_MAX_K)
        if hasattr(part, "k_factor"):
            part.k_factor = 4  # a compressed index compares 4 k candidates exactly
        if hasattr(part, "hnsw"):
            part.hnsw.efSearch = 128
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # takes seconds, only for Hamming distances
