"""What runs on a GPU, shown with stand-ins for one; each says what it stands in for. Searches: test_gpu_index.py."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from torch.nn import functional

from retrieval_tip import CacheModel, doctor, tip
from retrieval_tip.backbones.base import resolve_device
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.backbones.torch_backbone import TorchBackbone, weights_digest
from retrieval_tip.distributed import cluster
from retrieval_tip.fit import finetune, search_hp
from retrieval_tip.fit.trainer import Recipe, Trainer
from retrieval_tip.retrieval import keys as keys_module
from retrieval_tip.retrieval.keys import Keys
from retrieval_tip.retrieval.vector_index import auto_factory
from retrieval_tip.settings import Settings

CUDA = torch.device("cuda")


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU, and notes what adds up in it as threads come."""

    is_cuda = True  # type: ignore[assignment]
    unordered: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("index_add_", "scatter_add_", "scatter_add", "bincount", "mm_sparse"):
            cls.unordered.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    OnGpu.unordered.clear()
    return tensor.clone().as_subclass(OnGpu)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- drivers, builds, and what says so


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs as the driver sees them, as torch does, and as FAISS does."""

    def make(
        nodes: int, torch_sees: int, faiss_sees: int = 0, capability: Any = (9, 0), arches: Any = ("sm_90",)
    ) -> None:
        glob = Path.glob
        found = [Path(f"/dev/nvidia{i}") for i in range(nodes)]
        monkeypatch.setattr(Path, "glob", lambda p, s: iter(found) if str(p) == "/dev" else glob(p, s))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: torch_sees)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(arches))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        import faiss

        monkeypatch.setattr(faiss, "get_num_gpus", lambda: faiss_sees)

    return make


def test_a_driver_too_old_for_torch_is_explained(machine, caplog) -> None:
    machine(nodes=1, torch_sees=0, faiss_sees=1)
    report = doctor.examine()
    [problem] = [line for line in report.problems if "FAISS finds a GPU" in line]
    assert "built for CUDA 13.0" in problem
    assert "--index-url https://download.pytorch.org/whl/cu126" in problem
    for _ in range(2):
        assert resolve_device("auto") == "cpu"
    [warning] = said(caplog)
    assert "driver" in warning
    assert "doctor" in warning


def test_no_gpu_and_a_hidden_one_are_no_reason_to_warn(machine, monkeypatch, caplog) -> None:
    machine(nodes=0, torch_sees=0)
    assert resolve_device("auto") == "cpu"
    machine(nodes=2, torch_sees=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resolve_device("auto") == "cpu"
    machine(nodes=2, torch_sees=2, faiss_sees=2)
    assert resolve_device("auto") == "cuda"
    assert not [line for line in doctor.examine().problems if "GPU" in line]
    assert not said(caplog)


@pytest.mark.parametrize(
    ("capability", "arches", "device"),
    [
        ((7, 0), ("sm_75", "sm_80", "sm_90", "compute_90"), "cpu"),  # V100 and CUDA 13
        ((8, 9), ("sm_75", "sm_80", "sm_86"), "cuda"),  # one runs what is built for an older one of its generation
        ((12, 0), ("sm_90", "sm_120"), "cuda"),
        ((12, 1), ("sm_90", "compute_90"), "cuda"),  # compiled when it is first used
        ((9, 0), ("sm_90a",), "cuda"),
        ((9, 0), ("gfx90a",), "cuda"),  # of another maker: not ours to judge
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_passed_over(machine, caplog, capability, arches, device) -> None:
    machine(1, 1, 1, capability, arches)
    assert resolve_device("auto") == resolve_device("auto") == device
    assert len(said(caplog)) == (device == "cpu")


def test_an_actor_of_ray_takes_its_gpu_only_where_its_torch_can() -> None:
    for asked in ("auto", "cuda"):
        assert cluster._room([16], [2], asked, None).device == asked
    assert cluster._room([16], [0], "auto", None).device == cluster._room([16], [2], "cpu", None).device == "cpu"


def test_memory_that_a_gpu_lacks_is_one_line(run, monkeypatch) -> None:
    def examine() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(doctor, "examine", examine)
    failed = run("doctor")
    assert failed.exit_code == 1
    assert failed.stderr == "Error: out of memory on the GPU; give --device cpu, or a smaller batch\n"


# --- answers over all keys


def made(n: int, q: int, d: int, c: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Unit keys ``[n, d]`` about a common mean, class ids below ``c`` of which every second has keys, and queries."""
    rng = np.random.default_rng(n)
    common = rng.standard_normal(d)
    rows = [common + 0.7 * rng.standard_normal((m, d)) for m in (n, q)]
    keys, queries = [(r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in rows]
    return keys, np.sort(rng.choice(np.arange(0, c, 2), n)), torch.from_numpy(queries)


@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_answers_over_all_keys_stay_on_the_device_that_has_them(monkeypatch, stored: type, precision: str) -> None:
    """A device without numbers stands in for a GPU: whatever is taken to the CPU on the way raises an error."""
    monkeypatch.setattr(keys_module, "room_on", lambda _: 1 << 40)
    keys, ids, queries = made(5000, 600, 16, 8)
    over, f = Keys(keys.astype(stored), ids, 8, "meta", precision), queries.to("meta")
    values = torch.empty(5000, 8, device="meta")
    for cache_logits in (over.cache_logits(f, 7.5), over.cache_logits(f, 7.5, values)):
        assert (cache_logits.device.type, cache_logits.dtype, cache_logits.shape) == ("meta", torch.float32, (600, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "auto"])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_a_gpu_answers_over_all_keys_as_the_cpu_does(precision: str, stored: type) -> None:
    keys, ids, queries = made(20000, 3000, 512, 1000)
    keys = keys.astype(stored)
    on_cpu = Keys(keys, ids, 1000).cache_logits(queries, 7.5)
    for number in range(torch.cuda.device_count()):
        over, f = Keys(keys, ids, 1000, f"cuda:{number}", precision), queries.to(f"cuda:{number}")
        for size in (1, 16, 17, 3000):
            found = over.cache_logits(f[:size], 7.5)
            assert torch.equal(over.cache_logits(f[:size], 7.5), found)  # the same sums in the same order
            exact = precision == "float32"
            torch.testing.assert_close(found.cpu(), on_cpu[:size], rtol=1e-4 if exact else 5e-3, atol=1e-4)
        assert (found.cpu().argmax(1) == on_cpu.argmax(1)).double().mean() >= 0.9995


@pytest.mark.gpu
def test_a_gpu_answers_by_values_as_the_cpu_does() -> None:
    keys, ids, queries = made(5000, 700, 256, 120)
    values = torch.randn(5000, 120, generator=torch.Generator().manual_seed(0))
    on_cpu = Keys(keys, ids, 120).cache_logits(queries, 7.5, values)
    on_gpu_ = Keys(keys, ids, 120, "cuda").cache_logits(queries.cuda(), 7.5, values.cuda())
    torch.testing.assert_close(on_gpu_.cpu(), on_cpu, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_affinities_exist_one_block_at_a_time_on_a_gpu() -> None:
    keys, ids, queries = made(200_000, 20_000, 64, 200)
    over, f = Keys(keys, ids, 200, "cuda"), queries.cuda()
    over.cache_logits(f[:10], 7.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    over.cache_logits(f, 7.5)
    assert torch.cuda.max_memory_allocated() - before < 200_000 * 20_000 * 4 / 10


# --- the same sums every time


def test_sums_by_class_are_added_in_one_order_on_a_gpu() -> None:
    values, ids = torch.rand(7, 40), torch.randint(0, 5, (40,))
    own = torch.randint(0, 6, (7, 40))
    for class_ids in (ids, own):
        expected = tip.sum_by_class(values, class_ids, 5)
        torch.testing.assert_close(tip.sum_by_class(on_gpu(values), class_ids, 5).as_subclass(torch.Tensor), expected)
        assert not OnGpu.unordered
    out = on_gpu(torch.ones(7, 5))
    tip.sum_by_class(values.as_subclass(OnGpu), ids, 5, out=out)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), 1 + tip.sum_by_class(values, ids, 5))
    assert not OnGpu.unordered


def test_training_on_a_gpu_has_one_order_and_leaves_no_setting_behind() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cuda = torch.backends.cuda
    for warn_only in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        try:
            with finetune._repeatable("cuda"):
                assert torch.are_deterministic_algorithms_enabled()
                assert cuda.math_sdp_enabled()
                others = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled)
                assert not any(enabled() for enabled in others)
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
            assert cuda.flash_sdp_enabled()
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_the_sample_of_very_many_keys_ends_with_the_last_one() -> None:
    for n in (16_777_220, 20_000_000, 50_000_000, 100_000_000):
        some = np.lib.stride_tricks.as_strided(np.ones((1, 2), np.float32), (n, 2), (0, 4))
        keys = Keys.__new__(Keys)
        keys.n, keys.device, keys.n_classes, asked = n, "cpu", 1, []
        keys._gathered = lambda rows, asked=asked: asked.append(rows) or (_ for _ in ()).throw(KeyError)
        assert len(some) == n
        with pytest.raises(KeyError):
            keys._measured_slack(1.0)
        assert asked[0][0] == 0
        assert asked[0][-1] == n - 1


# --- precision


def test_float32_convolutions_are_not_rounded_to_tf32(lit_mini) -> None:
    conv = torch.backends.cudnn.conv if hasattr(torch.backends.cudnn, "conv") else None
    if conv is None:
        pytest.skip(f"SKIPPED: torch {torch.__version__} has the older setting only, which is read where a GPU is")
    before, within = conv.fp32_precision, []
    model = deepcopy(lit_mini)
    model._device = SimpleNamespace(type="cuda")  # only what is asked of it here
    model._forward(lambda given: within.append(conv.fp32_precision), None)
    with model.training(["visual"]):
        within.append(conv.fp32_precision)
        model._forward(lambda given: within.append(conv.fp32_precision), None)
        within.append(conv.fp32_precision)
    assert within == ["ieee"] * 4
    assert conv.fp32_precision == before == "tf32"
    lit_mini._forward(lambda given: within.append(conv.fp32_precision), None)  # on a CPU nothing is touched
    assert within[-1] == before


@pytest.mark.parametrize(
    ("precision", "capability", "trained"),
    [
        ("float16", (8, 0), "bfloat16"),
        ("float16", (7, 5), "float32"),
        ("float32", (9, 0), "float32"),
        ("bfloat16", (9, 0), "bfloat16"),
    ],
)
def test_encoders_are_not_trained_in_float16(lit_mini, monkeypatch, precision, capability, trained) -> None:
    model = deepcopy(lit_mini)
    model._precision, model._device = precision, CUDA
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert model.copy_to_train().precision == trained
    assert model.precision == precision


def test_small_gradients_of_an_encoder_survive(lit_mini) -> None:
    pixels = torch.rand(2, 3, *lit_mini.size)

    def gradients(model: Any) -> torch.Tensor:
        with model.training(["visual"]) as parameters:
            features = functional.normalize(model.forward_images(pixels), dim=1)
            features.backward(torch.full_like(features, 1e-7) * torch.arange(features.shape[1]))
            return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    half = deepcopy(lit_mini)
    half._precision = "float16"
    exact, found = gradients(deepcopy(lit_mini)), gradients(half.copy_to_train())
    assert functional.cosine_similarity(exact, found, dim=0) > 0.95


def test_pixels_reach_a_gpu_pinned_and_weights_lie_as_it_likes_them(lit_mini, monkeypatch, shared) -> None:
    done, to, plain = [], torch.Tensor.to, lit_mini

    def moved(self: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        if args and args[0] == CUDA:
            done.append(("to", how.get("non_blocking", False)))
            args = ()
        return to(self, *args, **how) if args or how.get("memory_format") else self

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append(("pinned", True)) or self)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    model = deepcopy(plain)
    model._device = CUDA
    pixels = torch.rand(3, 3, *plain.size)
    monkeypatch.setattr(TorchBackbone, "_forward", lambda self, tower, given: given)
    assert model.forward_images(pixels).is_contiguous(memory_format=torch.channels_last)
    assert done == [("pinned", True), ("to", True)]
    assert model.batch_size == 256
    monkeypatch.undo()

    digest, features = plain.identity.weights, plain.forward_images(pixels)
    model = deepcopy(plain)
    model._model.visual.to(memory_format=torch.channels_last)
    assert weights_digest(model._model) == digest  # the same backbone
    torch.testing.assert_close(model.forward_images(pixels), features, rtol=1e-3, atol=1e-4)
    assert all(tensor.is_contiguous() for tensor in model.tuned(["visual"]).values())


# --- memory


@pytest.fixture
def cache() -> CacheModel:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"class {i}" for i in range(4)]
    settings = Settings(alpha=1.0, beta=5.5)
    return CacheModel.from_features(rows, np.repeat(np.arange(4), 10), names, device="cpu", settings=settings)


def test_what_training_keeps_is_kept_on_the_cpu(cache) -> None:
    made = Trainer(cache, Recipe(train=("keys", "values"), precision="float32"), None)
    made.keys = made.keys.to("meta")  # a device that is not the CPU; it has no numbers
    with pytest.raises(NotImplementedError, match="meta"):
        made.trained()
    made = Trainer(cache, Recipe(train=("keys", "values"), precision="float32"), None)
    copies = made.trained()
    made.keys.zero_()
    assert {name: copy.device.type for name, copy in copies.items()} == {"keys": "cpu", "values": "cpu"}
    assert torch.equal(copies["keys"], torch.from_numpy(np.asarray(cache.keys)))


def test_the_search_for_settings_takes_few_queries_at_a_time_where_a_gpu_has_many_keys(cache, monkeypatch) -> None:
    queries = search_hp.Queries(
        np.asarray(cache.keys), cache.class_ids.numpy(), np.full(40, -1), np.full(40, -2), "made"
    )
    sizes = {}
    for device, least in (("cpu", 1 << 27), ("meta", 1 << 27), ("meta", 120)):
        monkeypatch.setattr(search_hp, "GPU_AFFINITIES", least)
        fake = SimpleNamespace(
            device=device, n=cache.n, retrieval=cache.retrieval, key_blocks=cache.key_blocks, settings=cache.settings,
            text_weights=cache.text_weights, class_ids=cache.class_ids, class_names=cache.class_names, values=None,
        )  # fmt: skip
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
        parts = [part for part, *_ in search_hp._blocks(fake, queries, [1.0], [None])]
        monkeypatch.undo()
        sizes[device, least] = {part.stop - part.start for part in parts}
    assert sizes == {("cpu", 1 << 27): {40}, ("meta", 1 << 27): {40}, ("meta", 120): {3, 1}}


def test_all_keys_are_what_auto_prefers_on_a_gpu_up_to_what_fits(monkeypatch) -> None:
    monkeypatch.setattr(keys_module, "room_on", lambda _: 10_000_000 * 512 * 4 * 3)
    for n, c in ((100, 10), (160_000, 1000), (1_000_000, 1000), (10_000_000, 100_000)):
        assert keys_module.auto_for((n, 512), np.dtype("float32"), c, "cuda") == ("Flat", None)
        assert keys_module.auto_for((n, 512), np.dtype("float32"), c, "cpu") == auto_factory(n, c)
    assert keys_module.auto_for((20_000_000, 512), np.dtype("float32"), 1000, "cuda") == auto_factory(20_000_000, 1000)
    assert keys_module.auto_for((20_000_000, 512), np.dtype("float16"), 1000, "cuda") == ("Flat", None)


def test_keys_are_halved_on_a_gpu_only_where_there_is_room_for_them(monkeypatch) -> None:
    keys = Keys(np.ones((5000, 1024), np.float32), np.zeros(5000, dtype=np.int64), 1, precision="auto")
    keys.device = "cuda"
    monkeypatch.setattr(keys_module, "room_on", lambda _: 4 * 5000 * 1024 - 2)
    assert keys.products(1.0) == torch.float32
    monkeypatch.setattr(keys_module, "room_on", lambda _: 4 * 5000 * 1024)
    monkeypatch.setattr(keys, "_times", lambda: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        keys.products(2.0)


def test_on_a_gpu_a_certificate_meets_all_keys_rather_than_more_than_faiss_finds_there(cache, monkeypatch) -> None:
    from retrieval_tip import answering

    met = []
    terms = type(cache.retrieval).terms
    monkeypatch.setattr(
        type(cache.retrieval), "terms", lambda self, *a, **k: met.append(self.settings.k) or terms(self, *a, **k)
    )
    monkeypatch.setattr(answering, "GPU_MAX_K", 3)
    monkeypatch.setattr(answering, "ALL_FROM", 1)
    features = functional.normalize(torch.rand(6, 8), dim=1)
    expected = cache.certified(features, k=2).cache.argmax(1)
    assert met[:2] == [2, 8]
    met.clear()
    monkeypatch.setattr(type(cache), "_queries", lambda self, f: f)
    monkeypatch.setattr(answering.torch, "arange", lambda n, device=None, own=torch.arange: own(n))
    cache.device = "cuda"
    assert torch.equal(cache.certified(features, k=2).cache.argmax(1), expected)
    assert met == [2, None]


# --- the tests themselves


def test_only_tests_marked_gpu_see_one(monkeypatch) -> None:
    for expression, hidden in (("", True), ("not gpu", True), ("gpu", False)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        conftest.pytest_configure(SimpleNamespace(getoption=lambda _, given=expression: given))  # type: ignore[arg-type]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")
    assert sys.modules["torch"]  # before FAISS: see the first test that imports both
    lines = (Path(__file__).parent / "conftest.py").read_text().splitlines()
    imports = [line for line in lines if line.startswith(("import", "from")) and "__future__" not in line]
    first = next(i for i, line in enumerate(imports) if line.startswith("import torch"))
    assert not any("retrieval_tip" in line or "faiss" in line for line in imports[:first])


# --- where there is one


@pytest.mark.gpu
def test_the_same_question_has_the_same_answer_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    keys = functional.normalize(torch.from_numpy(rng.standard_normal((9000, 64)).astype(np.float32)), dim=1)
    ids, names = np.sort(rng.integers(0, 40, 9000)), [f"class {i}" for i in range(40)]
    for index in ("Flat", "Classes", "IVF16,Flat"):
        cache = CacheModel.from_features(keys, ids, names, index=index, device="cuda")
        f = keys[::7].cuda()
        for k, tail in (("all", True), (64, True), (64, False)):
            first = cache.logits(f, k, tail)
            assert all(torch.equal(cache.logits(f, k, tail), first) for _ in range(5)), (index, k, tail)


@pytest.mark.gpu
def test_threads_that_ask_several_indexes_at_once_are_each_answered() -> None:
    rng = np.random.default_rng(0)
    rows = functional.normalize(torch.from_numpy(rng.standard_normal((4000, 32)).astype(np.float32)), dim=1)
    ids, names = np.sort(rng.integers(0, 20, 4000)), [f"class {i}" for i in range(20)]
    caches = [CacheModel.from_features(rows, ids, names, index=index, device="cuda") for index in ["IVF16,Flat"] * 4]
    expected = [cache.logits(rows[:50], 64) for cache in caches]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(caches[i % 4].logits, rows[:50], 64) for i in range(200)]
        assert all(torch.equal(one.result(), expected[i % 4]) for i, one in enumerate(asked))


@pytest.mark.gpu
def test_float32_features_are_those_of_the_cpu(shared: Path) -> None:
    place = f"local-dir:{shared / 'models' / 'lit-mini'}"
    on_cpu, on_gpu_ = (load_backbone(place, device=device, precision="float32") for device in ("cpu", "cuda"))
    pixels = torch.rand(5, 3, *on_cpu.size)
    np.testing.assert_allclose(on_gpu_.encode_images(pixels), on_cpu.encode_images(pixels), rtol=1e-3, atol=1e-4)
