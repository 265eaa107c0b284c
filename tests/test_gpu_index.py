"""Placement of indexes on GPUs and their searches, with stand-ins for FAISS and the GPU."""

import logging
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from retrieval_tip.errors import StoreError
from retrieval_tip.retrieval import vector_index
from retrieval_tip.retrieval.vector_index import GPU_MAX_K, Product, VectorIndex

RNG = np.random.default_rng(0)
KEYS = RNG.standard_normal((300, 16)).astype(np.float32)
QUERIES = RNG.standard_normal((5, 16)).astype(np.float32)
SIZE = 300 * (16 * 4 + 8)


class Faiss:
    """FAISS with simulated GPUs. It records each copy, and returns the given index as its copy."""

    def __init__(self, real: Any, gpus: int) -> None:
        self._real, self.gpus = real, gpus
        self.copies: list[tuple[str, int | None, SimpleNamespace, int]] = []
        self.probes: list[int] = []
        self.fails = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_num_gpus(self) -> int:
        return self.gpus

    def get_compile_options(self) -> str:
        return "OPTIMIZE GPU NVIDIA_CUVS "

    def GpuMultipleClonerOptions(self) -> SimpleNamespace:
        return SimpleNamespace(useFloat16=False, use_cuvs=False, shard=False)

    def index_cpu_to_gpu(self, _resources: object, number: int, index: Any, options: SimpleNamespace) -> Any:
        return self._copy("one", number, index, options)

    def index_cpu_to_all_gpus(self, index: Any, options: SimpleNamespace) -> Any:
        return self._copy("all", None, index, options)

    def _copy(self, where: str, number: int | None, index: Any, options: SimpleNamespace) -> Any:
        if self.fails:
            raise RuntimeError(f"Error in somewhere: {self.fails}")
        self.copies.append((where, number, options, getattr(index, "nprobe", 0)))
        return index

    def GpuParameterSpace(self) -> SimpleNamespace:
        return SimpleNamespace(set_index_parameter=lambda _index, name, value: self.probes.append(value))


@pytest.fixture
def gpus():
    """A function that simulates GPUs with a number of free bytes each. Copies of flat indexes stay on the CPU."""
    with ExitStack() as stack:

        def make(number: int = 1, free: int = 1 << 30, current: int = 0, torch_sees: bool = True) -> Faiss:
            fake, made = Faiss(vector_index.faiss(), number), Product.of

            def of(index: Any, device: str, half: bool) -> Product:
                fake.copies.append((device, half))
                return made(index, "cpu", half)

            seen = {"is_available": lambda: torch_sees, "current_device": lambda: current}
            stack.enter_context(mock.patch.multiple(vector_index, faiss=lambda: fake, resources=object))
            stack.enter_context(mock.patch.multiple(torch.cuda, **seen, mem_get_info=lambda *_: (free, 1 << 40)))
            stack.enter_context(mock.patch.object(Product, "of", of))
            return fake

        yield make


# --- placement


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_flat_on_a_gpu_is_exact_for_any_k(gpus, dtype: type) -> None:
    fake, keys = gpus(), np.resize(KEYS, (2500, 16)) + RNG.standard_normal((2500, 16)) / 9
    keys = keys.astype(dtype)
    index = VectorIndex.build(keys, "Flat", "cuda")
    dense = QUERIES.astype(np.float64) @ keys.astype(np.float64).T
    for k in (1, 7, GPU_MAX_K + 1, 2500):
        affinity, rows = index.search(QUERIES, k)
        np.testing.assert_allclose(affinity, -np.sort(-dense, axis=1)[:, :k], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(dense, rows, 1), affinity, rtol=0, atol=1e-5)
    assert fake.copies == [("cuda:0", dtype == np.float16)]
    assert index.exact_search
    assert index.exact_affinity


def test_a_product_in_parts_equals_the_whole() -> None:
    whole = Product(torch.from_numpy(KEYS)).search(torch.from_numpy(QUERIES), 40)
    with mock.patch.multiple(vector_index, PRODUCTS=16 * 37, QUERIES=2):
        parts = Product(torch.from_numpy(KEYS)).search(torch.from_numpy(QUERIES), 40)
    torch.testing.assert_close(parts, whole)
    assert parts[1].dtype == torch.int64
    assert Product(torch.from_numpy(KEYS)).search(torch.empty(0, 16), 4)[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("machine", "device", "factory", "dtype", "expected"),
    [
        ({"free": 2 * SIZE}, "auto", "IVF4,Flat", np.float32, ("one", 0, False)),  # it fits in half the free memory
        ({"free": 2 * SIZE - 2}, "auto", "IVF4,Flat", np.float32, ("all", None, False)),
        ({}, "cuda", "IVF4,Flat", np.float16, ("one", 0, False)),  # queries are never rounded
        ({}, "cuda", "IVF4,PQ4x4", np.float16, ("one", 0, True)),
        ({"free": 100}, "cuda", "Flat", np.float16, ("all", None, False)),
        ({"current": 1}, "cuda:0", "IVF4,Flat", np.float32, ("one", 0, False)),
        ({"current": 1}, "cuda", "IVF4,Flat", np.float32, ("one", 1, False)),
        ({"current": 1}, "auto", "IVF4,Flat", np.float32, ("one", 1, False)),
    ],
)
def test_an_index_is_placed_on_the_right_gpus(gpus, machine, device, factory, dtype, expected) -> None:
    fake = gpus(2, **machine)
    VectorIndex.build(KEYS.astype(dtype), factory, device).search(QUERIES, 1)
    [(where, number, options, _)] = fake.copies
    assert (where, number, options.useFloat16) == expected
    assert options.shard == (where == "all")
    assert options.use_cuvs or factory != "IVF4,Flat" or where == "all" or dtype == np.float16


def test_flat_is_copied_to_the_named_or_the_current_gpu_or_to_none(gpus) -> None:
    fake = gpus(4, current=2)
    for device, number in (("cuda:3", 3), ("cuda", 2), ("auto", 2)):
        VectorIndex.build(KEYS, "Flat", device).search(QUERIES, 1)
        assert fake.copies.pop()[0] == f"cuda:{number}"
    VectorIndex.build(KEYS, "Flat", "cpu").search(QUERIES, 1)
    gpus(0, torch_sees=False)
    VectorIndex.build(KEYS, "Flat", "auto").search(QUERIES, 1)
    assert not fake.copies


@mock.patch.object(vector_index, "GPU_MAX_K", 3)
def test_too_many_probes_are_reduced_on_the_gpu_only(gpus, caplog) -> None:
    fake, index = gpus(), VectorIndex.build(KEYS, "IVF8,Flat", "cuda")
    index.effort = 7
    index.search(QUERIES, 1)
    assert fake.copies[0][3] == 3
    assert index.effort == 7
    assert "at most 3 lists on a GPU; the CPU would probe 7" in caplog.text
    index.effort = 8
    index.effort = 2
    assert fake.probes == [3, 2]


# --- fallbacks to the CPU


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("free", "number", "device", "fails", "message"),
    [
        (100, 1, "cuda", "", f"{SIZE:,} bytes, but half of the free GPU memory is 50 bytes"),
        (100, 4, "cuda:1", "", "half of the free GPU memory"),
        (1 << 30, 1, "cuda", "this index is not implemented on GPU", "this index is not implemented on GPU"),
        (1 << 30, 0, "cuda", "", "FAISS finds no GPU"),
    ],
)
def test_a_fallback_to_the_cpu_warns_once(
    gpus, caplog, free: int, number: int, device: str, fails: str, message: str
) -> None:
    gpus(number, free).fails = fails
    expected = VectorIndex.build(KEYS, "IVF4,Flat", "cpu").search(QUERIES, 4)
    for _ in range(2):
        index = VectorIndex.build(KEYS, "IVF4,Flat", device)
        for _ in range(2):
            np.testing.assert_array_equal(index.search(QUERIES, 4)[1], expected[1])
        assert index.device == "cpu"
    assert len(warnings_of(caplog)) == 1
    assert message in warnings_of(caplog)[0]


def test_missing_gpu_memory_is_reported(gpus) -> None:
    gpus()
    index = VectorIndex.build(KEYS, "IVF4,Flat", "cuda")

    def search(*_: Any) -> None:
        raise RuntimeError("Error in allocMemory: StandardGpuResources: alloc fail type TemporaryMemory dev 0")

    index._gpu.get()
    index._gpu._held = SimpleNamespace(search=search)
    with pytest.raises(torch.OutOfMemoryError, match="alloc fail"):
        index.search(QUERIES, 1)
    index._gpu._held = SimpleNamespace(search=lambda *_: (_ for _ in ()).throw(RuntimeError("damaged")))
    with pytest.raises(StoreError, match="rebuild the index"):
        index.search(QUERIES, 1)


# --- tensors


def test_one_thread_at_a_time_searches_on_gpus(gpus) -> None:
    gpus()
    indexes = [VectorIndex.build(KEYS, "IVF4,Flat", "cuda") for _ in range(4)]
    inside, most, together = [], [], threading.Barrier(4)

    def search(features: Any, k: int) -> Any:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        return np.zeros((5, k), np.float32), np.zeros((5, k), np.int64)

    for index in indexes:
        index._gpu.get()
        index._gpu._held = SimpleNamespace(search=search)

    def ask(index: VectorIndex) -> None:
        together.wait()
        index.search(QUERIES, 2)

    threads = [threading.Thread(target=ask, args=(index,)) for index in indexes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


# --- keys on a GPU


# --- on a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "PCA8,IVF4,Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_results_stay_on_the_gpu_of_the_queries(factory: str, dtype: type) -> None:
    keys = np.random.default_rng(0).standard_normal((500, 32)).astype(dtype)
    for number in range(torch.cuda.device_count()):
        index = VectorIndex.build(keys, factory, f"cuda:{number}")
        queries = torch.from_numpy(keys[:9].astype(np.float32)).to(f"cuda:{number}")
        affinity, rows = index.search_tensor(queries, 5)
        assert affinity.device == rows.device == queries.device
        expected, expected_rows = VectorIndex.build(keys, factory, "cpu").search(queries.cpu().numpy(), 5)
        np.testing.assert_allclose(affinity.cpu().numpy(), expected, rtol=1e-2)
        assert (rows.cpu().numpy()[:, 0] == expected_rows[:, 0]).all()
