"""Code on a GPU (marked ``gpu``), and decisions about GPUs and their searches with stand-ins that need none."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import LIT_MINI
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn import functional

from retrieval_tip import Index, doctor
from retrieval_tip.backbones.base import resolve_device, runs_on
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.backbones.torch_backbone import weights_digest
from retrieval_tip.errors import StoreError
from retrieval_tip.fit import search_hp, visible
from retrieval_tip.fit.visible import Queries
from retrieval_tip.retrieval import keys as keys_module
from retrieval_tip.retrieval import vector_index
from retrieval_tip.retrieval.keys import Keys
from retrieval_tip.retrieval.vector_index import VectorIndex, auto_factory, exact_search


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_driver_too_old_for_torch_is_explained_once_and_a_missing_or_hidden_gpu_is_not(
    monkeypatch, caplog
):
    import faiss

    glob = Path.glob

    def machine(nodes, torch_sees, faiss_sees):
        """Simulate GPUs as the driver, torch and FAISS see them."""
        found = [Path(f"/dev/nvidia{i}") for i in range(nodes)]
        monkeypatch.setattr(
            Path, "glob", lambda p, s: iter(found) if str(p) == "/dev" else glob(p, s)
        )
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in (
            ("is_available", torch_sees > 0),
            ("get_device_capability", (9, 0)),
            ("get_arch_list", []),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: faiss_sees)

    machine(nodes=0, torch_sees=0, faiss_sees=0)
    assert resolve_device("auto") == "cpu"
    machine(nodes=2, torch_sees=0, faiss_sees=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"
    machine(nodes=2, torch_sees=2, faiss_sees=2)
    assert resolve_device("auto") == "cuda"
    assert not warnings_of(caplog)
    machine(nodes=1, torch_sees=0, faiss_sees=1)
    [problem] = [line for line in doctor.examine().problems if "FAISS finds a GPU" in line]
    assert "--index-url https://download.pytorch.org/whl/cu126" in problem
    assert [resolve_device("auto") for _ in range(2)] == ["cpu"] * 2
    [warning] = warnings_of(caplog)
    assert "driver" in warning
    assert "doctor" in warning


@pytest.mark.parametrize(
    ("capability", "arches", "runs"),
    [
        ((7, 0), ("sm_75", "sm_80", "sm_90", "compute_90"), False),  # V100 and CUDA 13
        ((8, 9), ("sm_75", "sm_80", "sm_86"), True),  # runs code for an older GPU of its generation
        ((12, 0), ("sm_90", "sm_120"), True),
        ((12, 1), ("sm_90", "compute_90"), True),  # compiled at first use
        ((9, 0), ("sm_90a",), True),
        ((9, 0), ("gfx90a",), True),  # of another vendor
    ],
)
def test_torch_builds_are_matched_with_gpu_generations(capability, arches, runs):
    assert runs_on(capability, arches) == runs


def random_keys(n, q, d, c):
    """Return unit keys ``[n, d]`` around a common mean, class ids (every second class has keys), and queries."""
    rng = default_rng(n)
    common = rng.standard_normal(d)
    rows = [common + 0.7 * rng.standard_normal((m, d)) for m in (n, q)]
    keys, queries = [
        (r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in rows
    ]
    return keys, np.sort(rng.choice(np.arange(0, c, 2), n)), torch.from_numpy(queries)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_gpu_answers_over_all_keys_match_the_cpu(stored):
    keys, ids, queries = random_keys(20000, 3000, 512, 1000)
    keys = keys.astype(stored)
    on_cpu = Keys(keys, ids, 1000).cache_logits(queries, 7.5)
    for number in range(torch.cuda.device_count()):
        over = Keys(keys, ids, 1000, f"cuda:{number}")
        f = queries.to(f"cuda:{number}")
        for size in (1, 16, 17, 3000):
            found = over.cache_logits(f[:size], 7.5)
            assert torch.equal(
                over.cache_logits(f[:size], 7.5), found
            )  # the same sums in the same order
            torch.testing.assert_close(found.cpu(), on_cpu[:size], rtol=1e-4, atol=1e-4)
        assert (found.cpu().argmax(1) == on_cpu.argmax(1)).double().mean() >= 0.9995


@pytest.mark.gpu
def test_a_gpu_holds_one_block_of_affinities_at_a_time():
    keys, ids, queries = random_keys(200_000, 20_000, 64, 200)
    over = Keys(keys, ids, 200, "cuda")
    f = queries.cuda()
    over.cache_logits(f[:10], 7.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    over.cache_logits(f, 7.5)
    assert torch.cuda.max_memory_allocated() - before < 200_000 * 20_000 * 4 / 10


def test_float32_convolutions_are_not_rounded_to_tf32(lit_mini):
    conv = torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else None
    if conv is None:
        pytest.skip(
            f"SKIPPED: torch {torch.__version__} has only the older setting, which needs a GPU"
        )
    before = conv.fp32_precision
    within = []
    model = object.__new__(type(lit_mini))
    model.__dict__ |= lit_mini.__dict__ | {
        "_device": SimpleNamespace(type="cuda")
    }  # the only attribute that is read
    model._forward(lambda given: within.append(conv.fp32_precision) or given, torch.zeros(1))
    assert within == ["ieee"]
    assert conv.fp32_precision == before == "tf32"
    lit_mini._forward(
        lambda given: within.append(conv.fp32_precision) or given, torch.zeros(1)
    )  # unchanged on a CPU
    assert within[-1] == before


def test_weights_with_channels_last_are_the_same_backbone(lit_mini):
    pixels = torch.rand(3, 3, *lit_mini.size)
    model = deepcopy(lit_mini._model)
    model.visual.to(memory_format=torch.channels_last)
    assert weights_digest(model) == lit_mini.identity.weights
    found, expected = (
        lit_mini._forward(one.encode_image, pixels) for one in (model, lit_mini._model)
    )
    assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_auto_uses_all_keys_on_a_gpu_if_they_fit(monkeypatch):
    monkeypatch.setattr(keys_module, "room_on", lambda _: 10_000_000 * 512 * 4 * 3)
    for n, c in ((100, 10), (160_000, 1000), (1_000_000, 1000), (10_000_000, 100_000)):
        assert keys_module.auto_for((n, 512), np.dtype("float32"), c, "cuda") == ("Flat", None)
        assert keys_module.auto_for((n, 512), np.dtype("float32"), c, "cpu") == auto_factory(n, c)
    assert keys_module.auto_for(
        (20_000_000, 512), np.dtype("float32"), 1000, "cuda"
    ) == auto_factory(20_000_000, 1000)
    assert keys_module.auto_for((20_000_000, 512), np.dtype("float16"), 1000, "cuda") == (
        "Flat",
        None,
    )


def labelled(n, d, c):
    """Return unit keys ``[n, d]``, their class ids and the class names."""
    rng = default_rng(0)
    rows = functional.normalize(
        torch.from_numpy(rng.standard_normal((n, d)).astype(np.float32)), dim=1
    )
    return rows, np.sort(rng.integers(0, c, n)), [f"class {i}" for i in range(c)]


@pytest.mark.gpu
def test_answers_on_a_gpu_repeat_bit_for_bit():
    keys, *classes = labelled(9000, 64, 40)
    for index in ("Flat", "Classes", "IVF16,Flat"):
        cache = Index.from_features(keys, *classes, index=index, device="cuda")
        f = keys[::7].cuda()
        for k, tail in (("all", True), (64, True), (64, False)):
            first = cache.logits(f, k, tail)
            assert all(torch.equal(cache.logits(f, k, tail), first) for _ in range(5)), (
                index,
                k,
                tail,
            )


@pytest.mark.gpu
def test_search_hp_holds_few_affinities_on_a_gpu():
    rows, ids, names = labelled(400_000, 16, 20)
    cache = Index.from_features(rows, ids, names, device="cuda")
    some = slice(0, 2000)
    queries = Queries(rows[some].numpy(), ids[some], "made")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    search_hp.search(cache, queries)
    assert torch.cuda.max_memory_allocated() - before < 8 * 4 * visible.VALUES + (1 << 28)


@pytest.mark.gpu
def test_threads_can_search_several_indexes_on_a_gpu_at_once():
    rows, *classes = labelled(4000, 32, 20)
    caches = [
        Index.from_features(rows, *classes, index="IVF16,Flat", device="cuda") for _ in range(4)
    ]
    expected = [cache.logits(rows[:50], 64) for cache in caches]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(caches[i % 4].logits, rows[:50], 64) for i in range(200)]
        assert all(torch.equal(one.result(), expected[i % 4]) for i, one in enumerate(asked))


@pytest.mark.gpu
def test_float32_features_on_a_gpu_match_the_cpu_and_other_features_are_made_in_large_batches(
    shared,
):
    place = LIT_MINI
    on_cpu, on_gpu_ = (
        load_backbone(place, device=device, precision="float32") for device in ("cpu", "cuda")
    )
    pixels = torch.rand(5, 3, *on_cpu.size)
    assert_allclose(
        on_gpu_.encode_images(pixels), on_cpu.encode_images(pixels), rtol=1e-3, atol=1e-4
    )
    model = load_backbone(place, device="cuda")
    assert model.batch_size == 256
    assert model.encode_images(pixels).shape == (5, model.dim)


RNG = default_rng(0)
KEYS = RNG.standard_normal((300, 16)).astype(np.float32)
QUERIES = RNG.standard_normal((5, 16)).astype(np.float32)
SIZE = 300 * (16 * 4 + 8)


@pytest.fixture
def gpus():
    """A function that simulates GPUs with a number of free bytes each, and returns FAISS with a record of its copies.

    Copies of indexes stay on the CPU.
    """
    with ExitStack() as stack:

        def make(number=1, free=1 << 30, current=0, torch_sees=True, fails=""):
            real = vector_index.faiss()
            copies = []

            def copy(where, number, index, options):
                if fails:
                    raise RuntimeError(f"Error in somewhere: {fails}")
                copies.append((where, number, options))
                return index

            own = {
                "get_num_gpus": lambda: number,
                "get_compile_options": lambda: "OPTIMIZE GPU NVIDIA_CUVS ",
                "GpuMultipleClonerOptions": lambda: SimpleNamespace(
                    useFloat16=False, use_cuvs=False, shard=False
                ),
                "index_cpu_to_gpu": lambda _, number, index, options: copy(
                    "one", number, index, options
                ),
                "index_cpu_to_all_gpus": lambda index, options: copy("all", None, index, options),
                "copies": copies,
            }
            fake = SimpleNamespace(**vars(real) | own)
            seen = {"is_available": lambda: torch_sees, "current_device": lambda: current}
            stack.enter_context(
                mock.patch.multiple(vector_index, faiss=lambda: fake, resources=object)
            )
            stack.enter_context(
                mock.patch.multiple(torch.cuda, **seen, mem_get_info=lambda *_: (free, 1 << 40))
            )
            return fake

        yield make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_search_by_torch_is_exact_for_any_k_and_blocks(dtype):
    keys = torch.from_numpy(KEYS).to(dtype)
    queries = torch.from_numpy(QUERIES)
    dense = queries.double() @ keys.double().T
    for k in (1, 40, 300):
        with mock.patch.multiple(vector_index, PRODUCTS={"cpu": 16 * 37}, QUERIES={"cpu": 2}):
            affinity, rows = exact_search(keys, queries, k)
        assert_allclose(affinity, dense.topk(k).values, rtol=0, atol=1e-5)
        assert_allclose(dense.gather(1, rows), affinity, rtol=0, atol=1e-5)
        torch.testing.assert_close(exact_search(keys, queries, k)[0], affinity)
    assert exact_search(keys, queries[:0], 4)[1].shape == (0, 4)


@pytest.mark.parametrize(
    ("machine", "device", "factory", "dtype", "expected"),
    [
        (
            {"free": 2 * SIZE},
            "auto",
            "IVF4,Flat",
            np.float32,
            ("one", 0, False),
        ),  # it fits in half the free memory
        ({"free": 2 * SIZE - 2}, "auto", "IVF4,Flat", np.float32, ("all", None, False)),
        ({}, "cuda", "IVF4,Flat", np.float16, ("one", 0, False)),  # queries are never rounded
        ({}, "cuda", "IVF4,PQ4x4", np.float16, ("one", 0, True)),
        ({"free": 100}, "cuda", "Flat", np.float16, ("all", None, False)),
        ({"current": 1}, "cuda:0", "IVF4,Flat", np.float32, ("one", 0, False)),
        ({"current": 1}, "cuda", "IVF4,Flat", np.float32, ("one", 1, False)),
        ({"current": 1}, "auto", "IVF4,Flat", np.float32, ("one", 1, False)),
        ({"current": 1}, "cuda:3", "IVF4,Flat", np.float32, ("one", 3, False)),
    ],
)
def test_an_index_is_placed_on_the_right_gpus(gpus, machine, device, factory, dtype, expected):
    fake = gpus(2, **machine)
    VectorIndex.build(KEYS.astype(dtype), factory, device).search(QUERIES, 1)
    [(where, number, options)] = fake.copies
    assert (where, number, options.useFloat16) == expected
    assert options.shard == (where == "all")
    assert options.use_cuvs or factory != "IVF4,Flat" or where == "all" or dtype == np.float16


@pytest.mark.parametrize(
    ("free", "number", "device", "fails", "message"),
    [
        (100, 1, "cuda", "", f"{SIZE:,} bytes, but half of the free GPU memory is 50 bytes"),
        (100, 4, "cuda:1", "", "half of the free GPU memory"),
        (
            1 << 30,
            1,
            "cuda",
            "this index is not implemented on GPU",
            "this index is not implemented on GPU",
        ),
        (1 << 30, 0, "cuda", "", "FAISS finds no GPU"),
    ],
)
def test_a_fallback_to_the_cpu_warns_once(gpus, caplog, free, number, device, fails, message):
    fake = gpus(number, free, fails=fails)
    expected = VectorIndex.build(KEYS, "IVF4,Flat", "cpu").search(QUERIES, 4)
    assert not fake.copies
    for _ in range(2):
        index = VectorIndex.build(KEYS, "IVF4,Flat", device)
        for _ in range(2):
            assert_array_equal(index.search(QUERIES, 4)[1], expected[1])
        assert index.device == "cpu"
    assert len(warnings_of(caplog)) == 1
    assert message in warnings_of(caplog)[0]


def on_gpu(search):
    """Return an index whose searches on a GPU are those of a function."""
    index = VectorIndex.build(KEYS, "IVF4,Flat", "cuda")
    index._copied = SimpleNamespace(search=search)
    return index


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            "Error in allocMemory: StandardGpuResources: alloc fail type TemporaryMemory dev 0",
            pytest.raises(torch.OutOfMemoryError, match="alloc fail"),
        ),
        ("damaged", pytest.raises(StoreError, match="rebuild the index")),
    ],
)
def test_missing_gpu_memory_is_reported(gpus, error, shown):
    gpus()
    with shown:
        on_gpu(mock.Mock(side_effect=RuntimeError(error))).search(QUERIES, 1)


def test_one_thread_at_a_time_searches_on_gpus(gpus):
    gpus()
    inside = []
    most = []
    together = threading.Barrier(4)

    def search(features, k):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        return np.zeros((5, k), np.float32), np.zeros((5, k), np.int64)

    def ask(index):
        together.wait()
        index.search(QUERIES, 2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, [on_gpu(search) for _ in range(4)]))
    assert most == [1, 1, 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "PCA8,IVF4,Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_results_stay_on_the_gpu_of_the_queries(factory, dtype):
    keys = default_rng(0).standard_normal((500, 32)).astype(dtype)
    for number in range(torch.cuda.device_count()):
        index = VectorIndex.build(keys, factory, f"cuda:{number}")
        queries = torch.from_numpy(keys[:9].astype(np.float32)).to(f"cuda:{number}")
        affinity, rows = index.search_tensor(queries, 5)
        assert affinity.device == rows.device == queries.device
        expected, expected_rows = VectorIndex.build(keys, factory, "cpu").search(
            queries.cpu().numpy(), 5
        )
        assert_allclose(affinity.cpu().numpy(), expected, rtol=1e-2)
        assert (rows.cpu().numpy()[:, 0] == expected_rows[:, 0]).all()
