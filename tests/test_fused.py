"""The kernels for a GPU, by Triton's interpreter on a CPU: the same programs, without the compiler; and compiled."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import few

from retrieval_tip.retrieval.keys import Keys

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="SKIPPED: there is no Triton here, so its kernels are neither run nor compiled; pip install triton",
)

SUMS = """
import sys
from pathlib import Path
import numpy as np, torch
from retrieval_tip.retrieval import fused

for given in map(np.load, sorted(map(str, Path(sys.argv[1]).glob("*.given.npz")))):
    f, K, ids, V = (torch.from_numpy(given[name]) for name in ("queries", "keys", "ids", "values"))
    runs, single = fused.Runs.of(ids, int(given["classes"])), fused.Runs.single(len(K), K.device)
    m = K.mean(0)
    found = {
        "float32": fused.cache_logits(f, K, runs, 7.5),
        "stored half": fused.cache_logits(f, K.half(), runs, 7.5),
        "float16": fused.cache_logits(f.half(), (K - m).half(), runs, 7.5, f @ m),
        "values": fused.cache_logits(f, K, single, 7.5, values=V),
        "one by one": torch.cat([fused.cache_logits(row[None], K, runs, 7.5) for row in f[:3]]),
    }
    fused.WRITTEN = 5 * runs.number
    found["in parts"] = fused.cache_logits(f, K, runs, 7.5)
    fused.WRITTEN = 1 << 28
    np.savez(given.fid.name.replace("given", "found"), size=runs.size, **found)
"""

BEYOND = """
import sys
import numpy as np, torch
from retrieval_tip.retrieval import fused

def holes(name, shape, dtype):  # a file of holes takes no disk
    return torch.from_numpy(np.memmap(f"{sys.argv[1]}/{name}", dtype, "w+", shape=shape))

d, n, q = 2048, (1 << 20) + 9, 5
keys, rng = holes("keys", (n, d), np.float16), np.random.default_rng(0)
f, own = (torch.from_numpy(rng.standard_normal((m, d)) / d**0.5).half() for m in (q, 6))
rows = torch.tensor([n - 1, n - 2, 3, n - 7, -1, -1], dtype=torch.int32)
keys[rows[:4].long()] = own[:4]
assert int(rows[0]) * d > 2**31
runs = fused.Runs(rows, torch.tensor([0, 1, 3], dtype=torch.int32), 2)
found = fused.cache_logits(f, keys, runs, 2.0)
weights = (2 * (f.double() @ own[:4].double().T - 1)).exp()
expected = torch.stack([weights[:, :2].sum(1), weights[:, 2:].sum(1)], dim=1)
torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

q, r = 9, (1 << 31) // 9 + 20
sums = holes("sums", (r, q), np.float32)
sums[r - 5 :] = torch.arange(5 * q, dtype=torch.float32).view(5, q)
out = torch.empty(q, 2)
fused.class_sums(sums, fused.Runs(torch.empty(0), torch.tensor([r - 5, r - 3, r], dtype=torch.int32), 1), out)
torch.testing.assert_close(out, torch.stack([sums[r - 5 : r - 3].sum(0), sums[r - 3 :].sum(0)], dim=1))
"""

FITTED = """
import sys
import numpy as np, torch
from retrieval_tip import CacheModel, tip
from retrieval_tip.retrieval import fused
from retrieval_tip.retrieval.keys import Keys

plain = Keys.cache_logits
def on_gpu(self, features, beta, values=None, products=None):  # as on one that has the keys
    self._on_device = torch.from_numpy(np.asarray(self.array))
    return self.fused(features, beta, values, products or torch.float32, fused)

given = np.load(f"{sys.argv[1]}/fitted.npz")
metric = tip.Metric(torch.from_numpy(given["m"]), torch.from_numpy(given["t"]))
names = [f"class {i}" for i in range(11)]
for with_metric in (False, True):
    for values in (None, given["values"]):
        cache = CacheModel.from_features(given["keys"], given["ids"], names, values=values, device="cpu")
        if with_metric:
            cache.set_fitted(metric, cache.values, None)
        if values is None:
            cache.add(given["queries"][:7], given["ids"][::40][:7])  # a segment of its own
        Keys.cache_logits = plain
        expected = cache.logits(given["queries"], "all")
        Keys.cache_logits = on_gpu
        torch.testing.assert_close(cache.logits(given["queries"], "all"), expected, rtol=1e-5, atol=1e-4)
"""

RUN = """
import sys, traceback
from pathlib import Path
for name, code in zip(sys.argv[2::2], sys.argv[3::2]):
    said = ""
    try:
        exec(compile(code, name, "exec"), {})
    except Exception:
        said = traceback.format_exc()
    Path(sys.argv[1], f"{name}.txt").write_text(said)
"""
"""Each of these programs, in one process: to import what they need takes longer than they do."""

CASES = {
    "gaps": (300, 70, 100, [0, 1, 3, 4, 8]),
    "many classes a tile": (200, 3, 64, list(range(150))),
    "one class": (700, 33, 20, [5]),
    "one of each": (1, 1, 1, [2]),
    "few shots": (90, 131, 65, list(range(30))),
}


def dense(queries: np.ndarray, keys: np.ndarray, beta: float) -> np.ndarray:
    return np.exp(-beta * (1 - queries.astype(np.float64) @ keys.astype(np.float64).T))


def made(n: int, q: int, d: int, classes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    common = rng.standard_normal(d)
    rows = [common + 0.7 * rng.standard_normal((m, d)) for m in (n, q)]
    keys, queries = [(r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in rows]
    return keys, np.sort(rng.choice(classes, n)), queries


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What came of the programs, by Triton's interpreter, which it asks for when it is imported."""
    folder = tmp_path_factory.mktemp("fused")
    for name, (n, q, d, classes) in CASES.items():
        keys, ids, queries = made(n, q, d, classes)
        number = max(classes) + 2  # the last has no key
        values = np.random.default_rng(1).standard_normal((n, number)).astype(np.float32)
        given = {"keys": keys, "ids": ids, "queries": queries, "values": values, "classes": number}
        np.savez(folder / f"{name}.given.npz", **given)
    keys, ids, queries = made(300, 40, 24, list(range(11)))
    rng = np.random.default_rng(5)
    given = {"keys": keys, "ids": ids, "queries": queries, "m": keys.mean(0)}
    given |= {"values": rng.standard_normal((300, 11)).astype(np.float32)}
    given |= {"t": rng.standard_normal((24, 24)).astype(np.float32)}
    np.savez(folder / "fitted.npz", **given)
    programs = [part for pair in (("sums", SUMS), ("beyond", BEYOND), ("fitted", FITTED)) for part in pair]
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(folder), *programs]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=240)
    return folder


def went_well(found: Path, program: str) -> bool:
    said = (found / f"{program}.txt").read_text()
    assert not said, said
    return True


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_sum_by_class(found: Path, case: str) -> None:
    assert went_well(found, "sums")
    given, answers = np.load(found / f"{case}.given.npz"), np.load(found / f"{case}.found.npz")
    weights = dense(given["queries"], given["keys"], 7.5)
    expected = weights @ np.eye(int(given["classes"]))[given["ids"]]
    np.testing.assert_allclose(answers["float32"], expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(answers["one by one"], expected[:3], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(answers["values"], weights @ given["values"], rtol=2e-5, atol=1e-4)
    np.testing.assert_allclose(answers["float16"], expected, rtol=1e-2, atol=1e-3)
    rounded = (
        dense(given["queries"], given["keys"].astype(np.float16), 7.5) @ np.eye(int(given["classes"]))[given["ids"]]
    )
    np.testing.assert_allclose(answers["stored half"], rounded, rtol=2e-6, atol=1e-6)
    assert np.array_equal(answers["in parts"], answers["float32"])  # bit for bit


@needs_triton
def test_runs_are_as_long_as_costs_least(found: Path) -> None:
    sizes = {case: int(np.load(found / f"{case}.found.npz")["size"]) for case in CASES}
    assert sizes["gaps"] == sizes["one class"] == 16
    assert sizes["many classes a tile"] == sizes["one of each"] == 1
    fused = pytest.importorskip("retrieval_tip.retrieval.fused")
    for shots, size in ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (160, 16)):
        runs = fused.Runs.of(torch.arange(40).repeat_interleave(shots), 40)
        assert (runs.size, len(runs.rows)) == (size, 40 * shots)


@needs_triton
def test_runs_hold_each_key_once_in_its_class_wherever_it_lies() -> None:
    fused = pytest.importorskip("retrieval_tip.retrieval.fused")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids = torch.from_numpy(rng.integers(0, 12, rng.integers(1, 300)))  # not in order: as of several segments
        runs = fused.Runs.of(ids, 13)
        assert sorted(runs.rows[runs.rows >= 0].tolist()) == list(range(len(ids)))
        for c in range(13):
            rows = runs.rows[runs.first[c] * runs.size : runs.first[c + 1] * runs.size]
            assert torch.equal(rows[rows >= 0].long(), (ids == c).nonzero()[:, 0])


@needs_triton
def test_keys_and_sums_beyond_the_numbers_of_32_bits_are_found(found: Path) -> None:
    assert went_well(found, "beyond")


@needs_triton
def test_an_index_with_a_metric_and_solved_values_answers_by_the_kernels_too(found: Path) -> None:
    assert went_well(found, "fitted")


COMPILE = """
import itertools, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from retrieval_tip.retrieval import fused

def compiled(kernel, target, kinds, constants, aligned, **options):
    names = [parameter.name for parameter in kernel.params]
    signature = {name: kinds.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)

target, folder = int(sys.argv[1]), Path(sys.argv[2])
for (dtype, few), tiles in fused.TILES.items():
    for run, half in ((16, False), (1, False), (4, True)):
        kind = "*fp32" if dtype == torch.float32 else "*fp16"
        kinds = {"features": kind, "keys": "*fp16" if half else kind, "rows": "*i32", "common": "*fp32",
                 "sums": "*fp32", "n_queries": "i32", "n_places": "i32", "d": "i32", "beta": "fp32"}
        made = compiled(
            fused.add_within_runs, target, kinds,
            {"exact": dtype == torch.float32, "run": run, "alike": fused.ALIKE,
             "tile_q": tiles.queries, "tile_k": tiles.keys, "tile_d": tiles.values},
            [name for name, kind in kinds.items() if kind.startswith("*")] + ["d"],
            num_warps=tiles.warps, num_stages=tiles.stages,
        )
        name = f"{kind[1:]} {'few' if few else 'many'} {run} {half} {made.metadata.shared}"
        (folder / f"{name}.cubin").write_bytes(made.asm["cubin"])
        (folder / f"{name}.ptx").write_text(made.asm["ptx"])
kinds = {"sums": "*fp32", "first": "*i32", "cache": "*fp32", "n_queries": "i32", "n_classes": "i32"}
made = compiled(fused.add_runs, target, kinds, dict(zip(("tile_q", "tile_c"), fused.ADDED)), [])
(folder / f"add 0 0 0 {made.metadata.shared}.cubin").write_bytes(made.asm["cubin"])
(folder / f"add 0 0 0 {made.metadata.shared}.ptx").write_text(made.asm["ptx"])
"""

SHARED = {80: 163, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory that a block may have, by the GPU's capability."""


@needs_triton
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", few([90, 80, 89, 120], 1))
def test_compiled_for_a_gpu_the_kernels_spill_nothing(target: int, tmp_path: Path) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip(f"SKIPPED: this Triton has no {tool.name}, so what a compiled kernel takes cannot be read")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(target), str(tmp_path)]
    subprocess.run(command, check=True, timeout=500)
    kernels = sorted(tmp_path.glob("*.cubin"))
    assert len(kernels) == 13
    for kernel in kernels:
        told = subprocess.run(
            [tool, "--dump-resource-usage", kernel], capture_output=True, text=True, check=True
        ).stdout
        used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
        assert used["STACK"] == used["LOCAL"] == 0, kernel.stem
        assert used["REG"] <= 255
        assert int(kernel.stem.split()[-1]) <= SHARED[target] << 10
        text = kernel.with_suffix(".ptx").read_text()
        assert not re.search(r"\b(atom|red)\.", text)  # no atomics: the order of sums is the program's
        assert kernel.stem.startswith("add") or "mma" in text  # on tensor cores


def test_where_the_kernels_cannot_run_it_is_said_once_and_the_plain_form_answers(monkeypatch, caplog) -> None:
    from retrieval_tip.retrieval import keys as module

    module.fused_on.cache_clear()
    keys, ids, queries = made(300, 5, 16, [0, 2])
    over = Keys(keys, ids, 4)
    expected = over.cache_logits(torch.from_numpy(queries), 7.5)
    for capability, error, told in (
        ((7, 5), None, "too old"),
        ((9, 0), RuntimeError("Failed to find C compiler.\nPlease specify one"), "Failed to find C compiler."),
        ((9, 0), ModuleNotFoundError("No module named 'triton'"), "No module named 'triton'"),
        ((9, 0), PermissionError(13, "Permission denied: '/root/.triton'"), "Permission denied"),
    ):
        caplog.clear()
        module.fused_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        monkeypatch.setattr(module.importlib, "import_module", lambda _, error=error: (_ for _ in ()).throw(error))
        asked = Keys(keys, ids, 4)
        asked._on_device = torch.from_numpy(keys)  # and the rest of a GPU that there is not
        monkeypatch.setattr(asked, "_times", lambda: 1)
        for _ in range(2):
            assert module.fused_on("cuda") is None
        asked.device = "cpu"
        assert torch.equal(asked.cache_logits(torch.from_numpy(queries), 7.5), expected)
        [record] = caplog.records
        assert told in record.getMessage()
        assert "no fused kernel" in record.getMessage()
    module.fused_on.cache_clear()


# --- where there is a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "auto"])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_the_compiled_kernels_answer_as_the_cpu_does(precision: str, stored: type) -> None:
    keys, ids, queries = made(20000, 3000, 512, list(range(0, 1000, 2)))
    keys = keys.astype(stored)
    on_cpu = Keys(keys, ids, 1000).cache_logits(torch.from_numpy(queries), 7.5)
    for number in range(torch.cuda.device_count()):
        device = f"cuda:{number}"
        over, asked = Keys(keys, ids, 1000, device, precision), torch.from_numpy(queries).to(device)
        on_gpu = over.cache_logits(asked, 7.5)
        for size in (1, 16, 17, 3000):
            assert torch.equal(over.cache_logits(asked[:size], 7.5), over.cache_logits(asked[:size], 7.5))
            part = over.cache_logits(asked[:size], 7.5).cpu()
            torch.testing.assert_close(part, on_cpu[:size], rtol=1e-4 if precision == "float32" else 5e-3, atol=1e-4)
        assert (on_gpu.cpu().argmax(1) == on_cpu.argmax(1)).double().mean() >= 0.9995


@pytest.mark.gpu
def test_values_are_given_by_the_compiled_kernel_as_on_the_cpu() -> None:
    keys, ids, queries = made(5000, 700, 256, list(range(60)))
    values = torch.randn(5000, 60, generator=torch.Generator().manual_seed(0))
    on_cpu = Keys(keys, ids, 60).cache_logits(torch.from_numpy(queries), 7.5, values)
    over, f = Keys(keys, ids, 60, "cuda"), torch.from_numpy(queries).cuda()
    on_gpu = over.cache_logits(f, 7.5, values.cuda())
    assert torch.equal(over.cache_logits(f, 7.5, values.cuda()), on_gpu)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_the_affinity_is_never_written_out() -> None:
    keys, ids, queries = made(60000, 4000, 64, list(range(100)))
    over, f = Keys(keys, ids, 100, "cuda"), torch.from_numpy(queries).cuda()
    over.cache_logits(f[:10], 7.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    over.cache_logits(f, 7.5)
    assert torch.cuda.max_memory_allocated() - before < 60000 * 4000 * 4 / 10
