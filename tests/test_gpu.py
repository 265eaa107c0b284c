"""Code on a GPU (marked ``gpu``), and decisions about GPUs that need none. Searches are in test_gpu_index.py."""

import logging
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from retrieval_tip import Index, doctor
from retrieval_tip.backbones.base import resolve_device, runs_on
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.backbones.torch_backbone import weights_digest
from retrieval_tip.fit import folds, search_hp
from retrieval_tip.fit.folds import Queries
from retrieval_tip.retrieval import keys as keys_module
from retrieval_tip.retrieval.keys import Keys
from retrieval_tip.retrieval.vector_index import auto_factory
from retrieval_tip.settings import Settings


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- drivers and builds


@pytest.fixture
def machine(monkeypatch):
    """A function that simulates GPUs as the driver, torch and FAISS see them."""
    import faiss

    glob = Path.glob

    def make(nodes: int, torch_sees: int, faiss_sees: int) -> None:
        found = [Path(f"/dev/nvidia{i}") for i in range(nodes)]
        monkeypatch.setattr(Path, "glob", lambda p, s: iter(found) if str(p) == "/dev" else glob(p, s))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in (("is_available", torch_sees > 0), ("get_device_capability", (9, 0)), ("get_arch_list", [])):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: faiss_sees)

    return make


def test_a_driver_too_old_for_torch_is_explained(machine, caplog) -> None:
    machine(nodes=1, torch_sees=0, faiss_sees=1)
    [problem] = [line for line in doctor.examine().problems if "FAISS finds a GPU" in line]
    assert "--index-url https://download.pytorch.org/whl/cu126" in problem
    for _ in range(2):
        assert resolve_device("auto") == "cpu"
    [warning] = warnings_of(caplog)
    assert "driver" in warning
    assert "doctor" in warning


def test_a_missing_or_hidden_gpu_causes_no_warning(machine, monkeypatch, caplog) -> None:
    machine(nodes=0, torch_sees=0, faiss_sees=0)
    assert resolve_device("auto") == "cpu"
    machine(nodes=2, torch_sees=0, faiss_sees=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"
    machine(nodes=2, torch_sees=2, faiss_sees=2)
    assert resolve_device("auto") == "cuda"
    assert not warnings_of(caplog)


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
def test_torch_builds_are_matched_with_gpu_generations(capability, arches, runs) -> None:
    assert runs_on(capability, arches) == runs


# --- answers over all keys


def random_keys(n: int, q: int, d: int, c: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Return unit keys ``[n, d]`` around a common mean, class ids (every second class has keys), and queries."""
    rng = np.random.default_rng(n)
    common = rng.standard_normal(d)
    rows = [common + 0.7 * rng.standard_normal((m, d)) for m in (n, q)]
    keys, queries = [(r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in rows]
    return keys, np.sort(rng.choice(np.arange(0, c, 2), n)), torch.from_numpy(queries)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "auto"])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_gpu_answers_over_all_keys_match_the_cpu(precision: str, stored: type) -> None:
    keys, ids, queries = random_keys(20000, 3000, 512, 1000)
    keys = keys.astype(stored)
    on_cpu = Keys(keys, ids, 1000).cache_logits(queries, 7.5)
    for number in range(torch.cuda.device_count()):
        over, f = Keys(keys, ids, 1000, f"cuda:{number}", precision), queries.to(f"cuda:{number}")
        for size in (1, 16, 17, 3000):
            found = over.cache_logits(f[:size], 7.5)
            assert torch.equal(over.cache_logits(f[:size], 7.5), found)  # the same sums in the same order
            exact = precision != "float16"
            torch.testing.assert_close(found.cpu(), on_cpu[:size], rtol=1e-4 if exact else 5e-3, atol=1e-4)
        assert (found.cpu().argmax(1) == on_cpu.argmax(1)).double().mean() >= 0.9995


@pytest.mark.gpu
def test_a_gpu_holds_one_block_of_affinities_at_a_time() -> None:
    keys, ids, queries = random_keys(200_000, 20_000, 64, 200)
    over, f = Keys(keys, ids, 200, "cuda"), queries.cuda()
    over.cache_logits(f[:10], 7.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    over.cache_logits(f, 7.5)
    assert torch.cuda.max_memory_allocated() - before < 200_000 * 20_000 * 4 / 10


# --- determinism


# --- precision


def test_float32_convolutions_are_not_rounded_to_tf32(lit_mini) -> None:
    conv = torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else None
    if conv is None:
        pytest.skip(f"SKIPPED: torch {torch.__version__} has only the older setting, which needs a GPU")
    before, within = conv.fp32_precision, []
    model = deepcopy(lit_mini)
    model._device = SimpleNamespace(type="cuda")  # the only attribute that is read
    model._forward(lambda given: within.append(conv.fp32_precision) or given, torch.zeros(1))
    assert within == ["ieee"]
    assert conv.fp32_precision == before == "tf32"
    lit_mini._forward(lambda given: within.append(conv.fp32_precision) or given, torch.zeros(1))  # unchanged on a CPU
    assert within[-1] == before


def test_weights_with_channels_last_are_the_same_backbone(lit_mini) -> None:
    pixels, model = torch.rand(3, 3, *lit_mini.size), deepcopy(lit_mini)
    model._model.visual.to(memory_format=torch.channels_last)
    assert weights_digest(model._model) == lit_mini.identity.weights
    found, expected = (one._forward(one._model.encode_image, pixels) for one in (model, lit_mini))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# --- memory


@pytest.fixture
def cache() -> Index:
    return Index.from_features(*labelled(40, 8, 4), device="cpu", settings=Settings(alpha=1.0, beta=5.5))


def test_auto_uses_all_keys_on_a_gpu_if_they_fit(monkeypatch) -> None:
    monkeypatch.setattr(keys_module, "room_on", lambda _: 10_000_000 * 512 * 4 * 3)
    for n, c in ((100, 10), (160_000, 1000), (1_000_000, 1000), (10_000_000, 100_000)):
        assert keys_module.auto_for((n, 512), np.dtype("float32"), c, "cuda") == ("Flat", None)
        assert keys_module.auto_for((n, 512), np.dtype("float32"), c, "cpu") == auto_factory(n, c)
    assert keys_module.auto_for((20_000_000, 512), np.dtype("float32"), 1000, "cuda") == auto_factory(20_000_000, 1000)
    assert keys_module.auto_for((20_000_000, 512), np.dtype("float16"), 1000, "cuda") == ("Flat", None)


# --- on a GPU


def labelled(n: int, d: int, c: int) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """Return unit keys ``[n, d]``, their class ids and the class names."""
    rng = np.random.default_rng(0)
    rows = functional.normalize(torch.from_numpy(rng.standard_normal((n, d)).astype(np.float32)), dim=1)
    return rows, np.sort(rng.integers(0, c, n)), [f"class {i}" for i in range(c)]


@pytest.mark.gpu
def test_answers_on_a_gpu_repeat_bit_for_bit() -> None:
    keys, *classes = labelled(9000, 64, 40)
    for index in ("Flat", "Classes", "IVF16,Flat"):
        cache = Index.from_features(keys, *classes, index=index, device="cuda")
        f = keys[::7].cuda()
        for k, tail in (("all", True), (64, True), (64, False)):
            first = cache.logits(f, k, tail)
            assert all(torch.equal(cache.logits(f, k, tail), first) for _ in range(5)), (index, k, tail)


@pytest.mark.gpu
def test_search_hp_holds_few_affinities_on_a_gpu() -> None:
    rows, ids, names = labelled(400_000, 16, 20)
    cache, some = Index.from_features(rows, ids, names, device="cuda"), slice(0, 2000)
    queries = Queries(rows[some].numpy(), ids[some], "made")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    search_hp.search(cache, queries, betas=[1.0])
    assert torch.cuda.max_memory_allocated() - before < 8 * 4 * folds.VALUES + (1 << 28)


@pytest.mark.gpu
def test_a_gpu_encodes_in_large_batches(shared: Path) -> None:
    model = load_backbone(f"local-dir:{shared / 'models' / 'lit-mini'}", device="cuda")
    assert model.batch_size == 256
    assert model.encode_images(torch.rand(5, 3, *model.size)).shape == (5, model.dim)


@pytest.mark.gpu
def test_threads_can_search_several_indexes_on_a_gpu_at_once() -> None:
    rows, *classes = labelled(4000, 32, 20)
    caches = [Index.from_features(rows, *classes, index="IVF16,Flat", device="cuda") for _ in range(4)]
    expected = [cache.logits(rows[:50], 64) for cache in caches]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(caches[i % 4].logits, rows[:50], 64) for i in range(200)]
        assert all(torch.equal(one.result(), expected[i % 4]) for i, one in enumerate(asked))


@pytest.mark.gpu
def test_float32_features_on_a_gpu_match_the_cpu(shared: Path) -> None:
    place = f"local-dir:{shared / 'models' / 'lit-mini'}"
    on_cpu, on_gpu_ = (load_backbone(place, device=device, precision="float32") for device in ("cpu", "cuda"))
    pixels = torch.rand(5, 3, *on_cpu.size)
    np.testing.assert_allclose(on_gpu_.encode_images(pixels), on_cpu.encode_images(pixels), rtol=1e-3, atol=1e-4)
