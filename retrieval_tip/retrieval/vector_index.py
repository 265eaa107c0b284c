"""The FAISS inner-product index over the keys, or over the means of their classes, on a GPU where there is one."""

from __future__ import annotations

import copy
import importlib
import logging
import re
import struct
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch  # before FAISS: on macOS each brings an OpenMP runtime, and torch's has to be the first
from torch import Tensor

from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.retrieval.segments import Segments

log = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

HEADER = 45
"""Bytes of the smallest index file, a flat one without vectors: its kind, d, n, and what is not used here."""


GPU_MAX_K = 2048
"""FAISS on a GPU retrieves no more keys, and probes no more lists; beyond it the CPU copy answers."""

TRAINING_PER_LIST = 256
"""Keys a list that a clustered index is trained on; FAISS itself uses no more."""


BY_CLASS = "Classes"
"""Factory of an index over the means of the classes: ``Classes``, or ``Classes,`` and a FAISS factory for the means."""

MANY_CLASSES = 32768
"""Classes from which even their means and text weights are searched by an index."""

MOST_LINKS = 1024
"""Of a key in a graph."""

_SCALARS = "SQ(4|6|8|fp16|bf16)"
_FACTORY = re.compile(
    r"((PCAW?R?|RR|OPQ([0-9]{1,9}_)?)[0-9]{1,9},)?"
    rf"(HNSW[0-9]{{0,9}}([,_](Flat|{_SCALARS}))?|(IVF[0-9]{{1,9}}(_HNSW[0-9]{{0,9}})?,)?"
    rf"(Flat|{_SCALARS}|PQ[0-9]{{1,9}}(x([3-9]|1[0-2]))?(fsr?|np)?|RaBitQ[1-9]?(fs)?))"
    rf"(,RFlat|,Refine\((Flat|{_SCALARS})\))?"
)
"""What a factory may be. FAISS knows more, but some of that ends the process (``Refine(IVF4,Flat)``), comes to no end
(``NSG16``, where keys repeat), writes where it must not (``PCA7,OPQ60_300,Flat``), takes gigabytes (``RQ2x24``), or is
for vectors of another kind (``SQ8_direct``: of bytes)."""


def inner_factory(factory: str) -> str | None:
    """FAISS's part of a factory over class means (``Flat`` where it names none); ``None`` for one over the keys."""
    name, _, rest = factory.partition(",")
    return (rest or "Flat") if name == BY_CLASS else None


def auto_factory(n: int, c: int) -> tuple[str, int | None]:
    """The type of index, and the keys that a query meets, for ``n`` keys of ``c`` classes (``--index auto``).

    Measured by benchmarks/throughput.py, on features like CLIP's:

    - up to 4 keys a class, or 2048 in all: every key (``Flat``, k = all). The text weights cost as much as the keys.
    - up to ``4 sqrt(n)`` keys a class: whole classes (``Classes``), 8 at most. From 32,768 classes on, these too are
      found by an index, a graph: what is common to all text weights leaves no clusters for an inverted file.
    - more: an inverted file over the keys, of ``4 sqrt(n)`` lists; the 256 nearest.
    """
    if n <= max(4 * c, 2048):
        return "Flat", None
    if n <= 4 * c * n**0.5:
        return f"{BY_CLASS},HNSW32" if c >= MANY_CLASSES else BY_CLASS, round(8 * n / c)
    return lists_for(n), 256


def lists_for(n: int) -> str:
    """An inverted file for ``n`` vectors."""
    return f"IVF{round(4 * n**0.5)},Flat"


@cache
def faiss() -> Any:
    """The FAISS module, imported when it is first needed. Raises StoreError saying how to repair an installation."""
    try:
        module = importlib.import_module("faiss")
    except ImportError as error:
        raise StoreError(f"faiss cannot be imported ({error}); run retrieval-tip doctor") from error
    module.cvar.distance_compute_blas_threshold = 1  # untouched, a few dozen queries would be searched one by one
    return module


class VectorIndex:
    """Maximum inner product search over vectors ``[n, d]``; row i is id i. It never normalises.

    The vectors are the keys, or the means of their classes where the factory is ``Classes`` (``by_class``). ``path``
    is the file that it was read from, as long as it holds what that does. Vectors beside it (:meth:`plus`) are compared
    with every query, and are not saved.
    """

    def __init__(
        self, index: Any, factory: str, device: str = "auto", half: bool = False, path: Path | None = None
    ) -> None:
        self._cpu, self._half, self.path = index, half, path
        self._late: Any | None = None
        self._late_rows: IntArray = np.empty(0, dtype=np.int64)
        self._late_vectors: Callable[[], FloatArray] = lambda: np.empty((0, self.d), dtype=np.float32)
        self.factory = factory
        self.by_class = inner_factory(factory) is not None
        self._wanted = device
        self._gpu = _on_gpu(index, device, half)
        self._lock = threading.Lock()

    @classmethod
    def build(
        cls, keys: npt.NDArray[Any] | Segments, factory: str = "Flat", device: str = "auto", block: int = 65536
    ) -> VectorIndex:
        """Train (where the type needs it) and fill an index over ``keys`` ``[n, d]`` float32 or float16.

        Keys are read in blocks, so they may be memory-mapped. Raises UsageError for a factory string that FAISS does
        not know or is not to be asked for, that would normalise, or that cannot be trained on so few keys.
        """
        n, d = keys.shape
        inner = inner_factory(factory) or factory
        if problem := _factory_problem(inner, n, d):
            raise UsageError(f"index {_shown(factory)}: {problem}")
        index = _attempt(factory, lambda: faiss().index_factory(d, inner, faiss().METRIC_INNER_PRODUCT))
        _set_search_effort(index)
        if not index.is_trained:
            sample = np.arange(n)
            lists = _lists(index)
            if lists and n > lists * TRAINING_PER_LIST:
                sample = np.sort(np.random.default_rng(0).choice(n, lists * TRAINING_PER_LIST, replace=False))
            training = np.ascontiguousarray(keys[sample], dtype=np.float32)
            _attempt(factory, lambda: index.train(training), f" (training it on {len(sample)} keys of {d} values)")
        _fill(index, keys, factory, block)
        return cls(index, factory, device, keys.dtype == np.float16)

    def refresh(self, keys: npt.NDArray[Any], block: int = 65536) -> None:
        """Hold these keys ``[n, d]`` instead; what was trained (lists, codes) stays as it was."""
        self._cpu.reset()
        self._late, self._late_rows, self.path = None, self._late_rows[:0], None
        _fill(self._cpu, keys, self.factory, block)
        if self._gpu is not None:
            self._gpu = _on_gpu(self._cpu, self._wanted, self._half)

    def plus(self, rows: IntArray, vectors: Callable[[], FloatArray]) -> VectorIndex:
        """The same index with other vectors ``[m, d]`` beside it, as ascending rows ``[m]``: further ones, or in place.

        Further ones leave no gap. It takes no training, every search compares with all of them, and they are asked for
        when the first one does.
        """
        longer = copy.copy(self)
        longer._late, longer._late_rows, longer._late_vectors = None, rows, vectors
        return longer

    def bare(self) -> VectorIndex:
        """The same index without what is beside it."""
        return self.plus(np.empty(0, dtype=np.int64), lambda: np.empty((0, self.d), dtype=np.float32))

    def _beside(self) -> Any:
        """FAISS's index over the vectors beside this one."""
        with self._lock:
            if self._late is None:
                late = faiss().IndexFlatIP(self.d)
                late.add(np.ascontiguousarray(self._late_vectors(), dtype=np.float32))
                self._late = late
            return self._late

    @property
    def indexed(self) -> int:
        """Vectors that the index itself holds, without those that were put beside it."""
        return int(self._cpu.ntotal)

    @classmethod
    def load(cls, path: Path, factory: str, device: str = "auto", half: bool = False) -> VectorIndex:
        """Read an index file, memory-mapped where its type allows; on a GPU, vectors are ``half`` precision if so said.

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
        """Number of vectors."""
        return max(self.indexed, int(self._late_rows[-1]) + 1 if len(self._late_rows) else 0)

    @property
    def d(self) -> int:
        """Length of a vector."""
        return int(self._cpu.d)

    @property
    def device(self) -> str:
        """Where searches run: ``cpu`` or ``cuda``."""
        return "cpu" if self._gpu is None else "cuda"

    @property
    def exact_search(self) -> bool:
        """Whether the nearest keys are always found: only by ``Flat``."""
        return not self.by_class and self._kind() in ("IndexFlat", "IndexFlatIP")

    @property
    def exact_affinity(self) -> bool:
        """Whether the affinities it returns are those of the vectors, not of a compressed copy."""
        return self._kind() in ("IndexFlat", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat", "IndexNSGFlat")

    @property
    def effort(self) -> int | None:
        """How many lists a search probes, or candidates of a graph it keeps; ``None`` where it has no such setting.

        Higher finds more of the nearest vectors and takes longer; it is saved with the index.
        """
        return next((int(getattr(*place)) for place in _effort_of(self._cpu)), None)

    @effort.setter
    def effort(self, value: int | None) -> None:
        if value is None or value == self.effort:
            return
        self.path = None
        for place in _effort_of(self._cpu):
            setattr(*place, value)
        if self._gpu is not None:
            faiss().GpuParameterSpace().set_index_parameter(self._gpu, "nprobe", min(value, GPU_MAX_K))

    @property
    def effort_limit(self) -> int | None:
        """The largest effort that makes a difference, ``None`` where there is no such setting."""
        lists = _lists(self._cpu)
        return lists or (self.n if self.effort is not None else None)

    def vectors(self) -> FloatArray:
        """The vectors ``[n, d]`` float32 that it holds, exactly so where :attr:`exact_affinity`."""
        for part in _inner(self._cpu):
            if hasattr(part, "make_direct_map"):
                part.make_direct_map()
        vectors = np.empty((self.n, self.d), dtype=np.float32)
        vectors[: self.indexed] = self._cpu.reconstruct_n(0, self.indexed)
        if len(self._late_rows):
            vectors[self._late_rows] = self._beside().reconstruct_n(0, len(self._late_rows))
        return vectors

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Affinities ``[q, k]`` float32, largest first, and rows ``[q, k]`` int64 of the k nearest vectors.

        Where an approximate index finds fewer, the rest has row -1. ``k`` is cut to the number of vectors.
        """
        k = int(min(k, self.n))
        features = np.ascontiguousarray(features, dtype=np.float32)
        if len(self._late_rows):
            return self._search_both(features, k)
        return self._search_indexed(features, k)

    def _search_both(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """What the index finds, without what was replaced since, and what came since, as one."""
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
        try:
            if self._gpu is not None and k <= GPU_MAX_K:
                with self._lock:  # the resources are one stream and one scratch memory
                    affinity, rows = self._gpu.search(features, k)
            else:
                affinity, rows = self._cpu.search(features, k)
        except (AssertionError, IndexError, RuntimeError) as error:
            raise StoreError(f"{self._name}: FAISS cannot search it ({_reason(error)}); rebuild the index") from None
        if rows.size and not -1 <= rows.min() <= rows.max() < self.indexed:
            raise StoreError(f"{self._name}: finds rows that it does not have; rebuild the index")
        return affinity, rows

    def search_tensor(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """:meth:`search` of queries on torch's device, with the answers there; on a GPU the host holds none of them."""
        k = int(min(k, self.n))
        if self._gpu is None or len(self._late_rows) or features.device.type == "cpu" or k > GPU_MAX_K:
            affinity, rows = self.search(features.cpu().numpy(), k)
            return torch.from_numpy(affinity).to(features.device), torch.from_numpy(rows).to(features.device)
        importlib.import_module("faiss.contrib.torch_utils")  # from then on FAISS takes tensors too
        with self._lock:
            nearest: tuple[Tensor, Tensor] = self._gpu.search(features.contiguous(), k)
        return nearest

    def _kind(self) -> str:
        return type(faiss().downcast_index(self._cpu)).__name__


@cache
def _gpu_resources() -> Any:
    return faiss().StandardGpuResources()


def _on_gpu(index: Any, device: str, half: bool) -> Any | None:
    """A copy on the GPU, or None: the CPU was asked for, there is no GPU, or the type has no GPU form.

    Where one GPU has no room for it, and none was named, every GPU holds a part.
    """
    if device == "cpu" or faiss().get_num_gpus() < 1:
        return None
    number = device.partition(":")[2]
    options = faiss().GpuMultipleClonerOptions()
    options.useFloat16 = half
    options.use_cuvs = "CUVS" in faiss().get_compile_options().upper()
    try:
        if not number and faiss().get_num_gpus() > 1 and _bytes_on_gpu(index, half) > _free_on_gpu():
            options.shard = True
            return faiss().index_cpu_to_all_gpus(index, options)
        return faiss().index_cpu_to_gpu(_gpu_resources(), int(number or 0), index, options)
    except RuntimeError as error:
        log.info("the index stays on the CPU: %s", _reason(error))
        return None


def _bytes_on_gpu(index: Any, half: bool) -> int:
    """About what an index takes there: its vectors and ids."""
    return int(index.ntotal) * (int(index.d) * (2 if half else 4) + 8)


def _free_on_gpu() -> int:
    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else 0


def _factory_problem(factory: str, n: int, d: int) -> str | None:
    """Why FAISS is not to be asked for an index of this factory over ``n`` vectors of ``d`` values, if it is not."""
    if "norm" in factory.lower():
        return "normalises, which an index must not: fine-tuned keys are not unit vectors"
    if not _FACTORY.fullmatch(factory):
        return (
            "no type that can be used here; give Flat, IVF256,Flat, HNSW32, SQ8, PQ16, RaBitQ4 or what is made of "
            "these, as PCA64,IVF256,PQ16,RFlat"
        )
    for name, count in re.findall(r"(IVF|HNSW|PQ|PCAW?R?|RR|_)([0-9]+)", factory):  # OPQ ends in PQ
        least, most = {"IVF": (1, n), "HNSW": (2, MOST_LINKS)}.get(name, (1, d))
        if not least <= int(count) <= most:
            return f"{count} in it is not from {least} to {most:,}, as it has to be for {n:,} vectors of {d:,} values"
    return None


def _shown(factory: str) -> str:
    return repr(factory if len(factory) <= 80 else f"{factory[:80]}...")


def _size_problem(path: Path) -> str | None:
    """What is wrong with a file's size: FAISS's mapped reader may crash on one that ends too early."""
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


def _fill(index: Any, keys: npt.NDArray[Any] | Segments, factory: str, block: int) -> None:
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


def _effort_of(index: Any) -> Iterator[tuple[Any, str]]:
    """Where an index keeps its effort: object and name of an attribute, the outermost first."""
    for part in _inner(index):
        if hasattr(part, "nprobe"):
            yield part, "nprobe"
            return
        if hasattr(part, "hnsw"):
            yield part.hnsw, "efSearch"
            return


def _lists(index: Any) -> int:
    return next((int(part.nlist) for part in _inner(index) if hasattr(part, "nlist")), 0)


def _set_search_effort(index: Any) -> None:
    """FAISS probes one list and keeps 16 candidates by default: far too few for a cache, whose keys all count."""
    for part in _inner(index):
        if hasattr(part, "cp"):
            part.cp.min_points_per_centroid = 1  # FAISS prints a warning where there are fewer than 39
        if hasattr(part, "nprobe"):
            part.nprobe = min(int(part.nlist), max(8, round(2 * int(part.nlist) ** 0.5)), GPU_MAX_K)
        if hasattr(part, "k_factor"):
            part.k_factor = 4  # of a compressed index, so many times the candidates are compared exactly
        if hasattr(part, "hnsw"):
            part.hnsw.efSearch = 128
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False  # seconds a subquantizer, for a search by Hamming distance
