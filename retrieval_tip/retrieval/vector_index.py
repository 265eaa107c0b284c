"""The FAISS inner-product index over the keys, or over the means of their classes, on a GPU where there is one."""

from __future__ import annotations

import copy
import importlib
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch  # before FAISS: on macOS each brings an OpenMP runtime, and torch's has to be the first
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.errors import StoreError, UsageError, warn_once
from retrieval_tip.retrieval.segments import KeyArray, Segments

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
T = TypeVar("T")

FaissIndex = Any
"""An index of FAISS, which ships no types."""

HEADER = 45
"""Bytes of the smallest index file, a flat one without vectors: its kind, d, n, and what is not used here."""


GPU_MAX_K = 2048
"""FAISS on a GPU retrieves no more keys, and probes no more lists; beyond that many keys the CPU copy answers."""

PRODUCTS, QUERIES = 1 << 27, 4096
"""Affinities at a time on a GPU, 512 MiB of float32, and of how many queries."""

_GPU = threading.RLock()
"""FAISS's resources are one stream and one scratch memory for all indexes of a process: one thread at a time."""

TRAINING_PER_LIST = 256
"""Keys a list that a clustered index is trained on; FAISS itself uses no more."""


BY_CLASS = "Classes"
"""Factory of an index over the means of the classes: ``Classes``, or ``Classes,`` and a FAISS factory for the means."""

MOST_LINKS = 1024
"""Of a key in a graph."""

FLAT = ("IndexFlat", "IndexFlatIP")
UNCOMPRESSED = (*FLAT, "IndexIVFFlat", "IndexHNSWFlat", "IndexNSGFlat")
"""FAISS's classes that compare with the vectors themselves."""

_SCALARS = "SQ(4|6|8|fp16|bf16)"
_FACTORY = re.compile(
    r"((PCAW?R?|RR|OPQ([0-9]{1,9}_)?)[0-9]{1,9},)?"
    rf"(HNSW[0-9]{{0,9}}([,_](Flat|{_SCALARS}))?|(IVF[0-9]{{1,9}}(_HNSW[0-9]{{0,9}})?,)?"
    rf"(Flat|{_SCALARS}|PQ[0-9]{{1,9}}(x([3-9]|1[0-2]))?(fsr?|np)?|RaBitQ[1-9]?(fs)?))"
    rf"(,RFlat|,Refine\((Flat|{_SCALARS})\))?"
)
"""Known factories. FAISS knows more, but some of that ends the process (``Refine(IVF4,Flat)``), comes to no end
(``NSG16``, where keys repeat), writes where it must not (``PCA7,OPQ60_300,Flat``), takes gigabytes (``RQ2x24``), or is
for vectors of another kind (``SQ8_direct``: of bytes)."""


def inner_factory(factory: str) -> str | None:
    """FAISS's part of a factory over class means (``Flat`` where it names none); ``None`` for one over the keys."""
    name, _, rest = factory.partition(",")
    return (rest or "Flat") if name == BY_CLASS else None


def auto_factory(n: int, c: int) -> tuple[str, int | None]:
    """The type of index, and the keys that a query meets, for ``n`` keys of ``c`` classes (``--index auto``).

    Measured by benchmarks/throughput.py (``--index``), on features like CLIP's:

    - up to 4 keys a class, or 2048 in all: every key (``Flat``, k = all). The text weights cost as much as the keys.
    - up to ``4 sqrt(n)`` keys a class: whole classes (``Classes``), 8 at most.
    - more: an inverted file over the keys, of ``4 sqrt(n)`` lists; the 256 nearest.
    """
    if n <= max(4 * c, 2048):
        return "Flat", None
    if n <= 4 * c * n**0.5:
        return BY_CLASS, round(8 * n / c)
    return lists_for(n), 256


def lists_for(n: int) -> str:
    """An inverted file for ``n`` vectors."""
    return f"IVF{round(4 * n**0.5)},Flat"


@cache
def faiss() -> Any:  # a module without types
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

    def refresh(self, keys: KeyArray, block: int = 65536) -> None:
        """Hold these keys ``[n, d]`` instead; what was trained (lists, codes) stays as it was."""
        self._gpu.drop()
        self._cpu.reset()
        self._late, self._late_rows, self.path = None, self._late_rows[:0], None
        _fill(self._cpu, keys, self.factory, block)

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

    def _beside(self) -> FaissIndex:
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
        """Read an index file, memory-mapped where its type allows; ``half`` says that its vectors are half precision.

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
        """The device that searches run on: ``cpu`` or ``cuda``."""
        return "cpu" if self._gpu.get() is None else "cuda"

    @property
    def exact_search(self) -> bool:
        """Whether the nearest keys are always found: only by ``Flat``."""
        return not self.by_class and _is_one_of(FLAT, self._cpu)

    @property
    def exact_affinity(self) -> bool:
        """Whether the affinities it returns are those of the vectors, not of a compressed copy."""
        return _is_one_of(UNCOMPRESSED, self._cpu)

    @property
    def effort(self) -> int | None:
        """Lists that a search probes, or candidates of a graph that it keeps; ``None`` where it has no such setting.

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
        self._gpu.probe(value)

    @contextmanager
    def limited(self, effort: int) -> Iterator[None]:
        """Search with at most this :attr:`effort` inside the context; what is saved stays as it is."""
        before, path = self.effort, self.path
        self.effort = None if before is None else min(before, effort)
        try:
            yield
        finally:
            self.effort = before
            self.path = path

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
        """Hits of the index without what was replaced since, and of what came since, as one."""
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
        with self._explained():
            affinity, rows = self._gpu.search(features, k) or self._cpu.search(features, k)
        if rows.size and not -1 <= rows.min() <= rows.max() < self.indexed:
            raise StoreError(f"{self._name}: finds rows that it does not have; rebuild the index")
        return affinity, rows

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What FAISS raises, as errors that name the index, or memory that a GPU lacks."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:
            if "alloc fail" in str(error):  # FAISS's scratch memory
                raise torch.OutOfMemoryError(f"{self._name}: FAISS: {_reason(error)}") from None
            raise StoreError(f"{self._name}: FAISS cannot search it ({_reason(error)}); rebuild the index") from None

    def search_tensor(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """:meth:`search` of queries on torch's device, with the answers there; on a GPU the host holds none of them."""
        k = int(min(k, self.n))
        with self._explained():
            found = None if len(self._late_rows) else self._gpu.search_tensor(features, k)
        if found is None:
            affinity, rows = self.search(features.cpu().numpy(), k)
            found = torch.from_numpy(affinity).to(features.device), torch.from_numpy(rows).to(features.device)
        return found


class GpuCopy:
    """What a GPU holds of a FAISS index, from the first search that needs it on: who never searches pays nothing.

    Of ``Flat`` the vectors alone, ``half`` precision if so said: torch multiplies them with the queries. Of what else
    has a form there, FAISS's own copy; where one GPU has no room for that, and none was named, every GPU holds a part.
    ``auto`` is the GPU that torch would use. Where a CPU searches in a GPU's place, a warning says so, once.
    """

    def __init__(self, index: FaissIndex, device: str, half: bool) -> None:
        self._index, self._half = index, half
        self._wanted, self._number = device != "cpu" and torch.cuda.is_available(), device.partition(":")[2]
        self._tried, self._held = False, None

    def get(self) -> FaissIndex | None:
        """The copy, ``None`` where searches run on the CPU."""
        if not self._wanted:
            return None
        with _GPU:
            if not self._tried:
                self._tried, self._held = True, self._made()
            return self._held

    def drop(self) -> None:
        """Give its memory back. The next search copies the index as it is then."""
        with _GPU:
            self._tried, self._held = False, None

    def probe(self, lists: int) -> None:
        """Let searches probe so many lists, or as many as FAISS does on a GPU."""
        with _GPU:
            if self._held is not None and not isinstance(self._held, Product):
                faiss().GpuParameterSpace().set_index_parameter(self._held, "nprobe", min(lists, GPU_MAX_K))

    def search(self, features: FloatArray, k: int) -> tuple[FloatArray, IntArray] | None:
        """Affinities and rows ``[q, k]`` of the nearest vectors; ``None`` where the CPU is to find them."""
        copied = self._for(k)
        if copied is None:
            return None
        if isinstance(copied, Product):
            affinity, rows = copied.search(torch.from_numpy(features), k)
            return affinity.cpu().numpy(), rows.cpu().numpy()
        with _GPU:
            found: tuple[FloatArray, IntArray] = copied.search(features, k)
        return found

    def search_tensor(self, features: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        """The same of tensors; ``None`` where arrays have to be given."""
        copied = None if features.device.type == "cpu" else self._for(k)
        if isinstance(copied, Product):
            return copied.search(features, k)
        # A transform around a copy, and parts on several GPUs, take arrays; they have no getDevice either.
        if getattr(copied, "getDevice", lambda: None)() != features.device.index or copied is None:
            return None
        importlib.import_module("faiss.contrib.torch_utils")  # from then on FAISS takes tensors too
        with _GPU, torch.cuda.device(features.device):  # whose stream FAISS then follows
            found: tuple[Tensor, Tensor] = copied.search(features.contiguous(), k)
        return found

    def _for(self, k: int) -> FaissIndex | None:
        """The copy, where it can find so many."""
        copied = self.get()
        if copied is None or isinstance(copied, Product) or k <= GPU_MAX_K:
            return copied
        warn_once(f"FAISS on a GPU finds {GPU_MAX_K:,} keys at most: more are searched for on the CPU")
        return None

    def _made(self) -> FaissIndex | None:
        try:
            return self._copied()
        except RuntimeError as error:
            warn_once(f"an index is searched on the CPU: {_reason(error)}")
            return None

    def _copied(self) -> FaissIndex:
        """Raises RuntimeError saying why there is no copy."""
        number = int(self._number or torch.cuda.current_device())
        size, room = _bytes_on_gpu(self._index, self._half), int(torch.cuda.mem_get_info(number)[0]) // 2
        if _is_one_of(FLAT, self._index) and size <= room:
            return Product.of(self._index, f"cuda:{number}", self._half)
        gpus = int(faiss().get_num_gpus())
        if not gpus:
            raise RuntimeError("FAISS finds no GPU, though torch does (see doctor)")
        if size <= room:
            return self._cloned(lambda options: faiss().index_cpu_to_gpu(resources(), number, self._index, options))
        if gpus > 1 and not self._number:
            return self._cloned(lambda options: faiss().index_cpu_to_all_gpus(self._index, options), shard=True)
        raise RuntimeError(f"it takes {size:,} bytes, and half of what is free on the GPU is {room:,}")

    def _cloned(self, clone: Callable[[object], FaissIndex], shard: bool = False) -> FaissIndex:
        """FAISS's copy, which probes as many lists as it can where the index has a larger number."""
        options = faiss().GpuMultipleClonerOptions()
        options.useFloat16 = self._half and not _is_one_of(UNCOMPRESSED, self._index)  # it rounds queries as well
        options.use_cuvs = "CUVS" in faiss().get_compile_options().upper()
        options.shard = shard
        cut = [(part, lists) for part in _inner(self._index) if (lists := getattr(part, "nprobe", 0)) > GPU_MAX_K]
        try:
            for part, _ in cut:
                warn_once(f"FAISS on a GPU probes {GPU_MAX_K:,} lists at most, where the CPU probes {part.nprobe:,}")
                part.nprobe = GPU_MAX_K
            return clone(options)
        finally:
            for part, lists in cut:
                part.nprobe = lists


class Product:
    """Vectors ``[n, d]`` float32 or float16 on a GPU, and the nearest of them by the product with all, exactly."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    @classmethod
    def of(cls, index: FaissIndex, device: str, half: bool) -> Product:
        """The vectors of a flat FAISS index."""
        n, d = int(index.ntotal), int(index.d)
        vectors = torch.empty(n, d, dtype=torch.float16 if half else torch.float32, device=device)
        for start in range(0, n, 65536):
            part = vectors[start : start + 65536]
            part.copy_(torch.as_tensor(index.reconstruct_n(start, len(part))))
        return cls(vectors)

    def search(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Affinities ``[q, k]`` float32, largest first, and rows of the ``k <= n`` nearest, on the GPU.

        Products are float32, whatever the vectors are.
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
    """FAISS's memory on GPUs: of what it would take from the start, 1.5 GiB a GPU and 256 MiB pinned, a part."""
    made = faiss().StandardGpuResources()
    made.setTempMemory(512 << 20)
    made.setPinnedMemory(32 << 20)
    return made


def _is_one_of(kinds: tuple[str, ...], index: FaissIndex) -> bool:
    return type(faiss().downcast_index(index)).__name__ in kinds


def _bytes_on_gpu(index: FaissIndex, half: bool) -> int:
    """About what an index takes there: its vectors, or their codes, and their ids."""
    if _is_one_of(FLAT, index):
        return int(index.ntotal) * int(index.d) * (2 if half else 4)
    codes = [int(part.code_size) for part in _inner(index) if hasattr(part, "code_size")]
    return int(index.ntotal) * ((codes[-1] if codes else 4 * int(index.d)) + 8)


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
    """The fault of a file's size: FAISS's mapped reader may crash on one that ends too early."""
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


def _fill(index: FaissIndex, keys: KeyArray | Segments, factory: str, block: int) -> None:
    for start in range(0, len(keys), block):
        _attempt(factory, partial(index.add, np.ascontiguousarray(keys[start : start + block], dtype=np.float32)))


def _attempt(factory: str, run: Callable[[], T], when: str = "") -> T:
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        raise UsageError(f"index {factory!r}: {_reason(error)}{when}") from None


def _reason(error: Exception) -> str:
    """The text of FAISS's error, without the place in its source."""
    text = str(error).strip()
    return text.rpartition("' failed: ")[2] if "' failed: " in text else text.rpartition(": ")[2] or text


def _inner(index: FaissIndex) -> Iterator[FaissIndex]:
    """The index and those that it wraps."""
    while index is not None:
        index = faiss().downcast_index(index)
        yield index
        index = getattr(index, "index", None) or getattr(index, "base_index", None)


def _effort_of(index: FaissIndex) -> Iterator[tuple[FaissIndex, str]]:
    """The place of an index's effort: object and name of an attribute, the outermost first."""
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
