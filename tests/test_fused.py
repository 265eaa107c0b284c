"""The kernel for a GPU, by Triton's interpreter on a CPU: the same program, without the compiler."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from retrieval_tip.retrieval.keys import Keys

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton here, so its kernel is not run"
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch finds no CUDA GPU, so the compiled kernel is not run"
)

RUN = """
import sys
import numpy as np, torch
from retrieval_tip.retrieval.fused import add_by_class
from retrieval_tip.retrieval.keys import Keys

given = np.load(sys.argv[1])
keys = Keys(given["keys"], given["ids"], int(given["classes"]))
found = {
    str(dtype).removeprefix("torch."): keys.fused(torch.from_numpy(given["queries"]), 7.5, dtype, add_by_class).numpy()
    for dtype in (torch.float32, torch.float16)
}
np.savez(sys.argv[2], **found)
"""


def dense(queries: np.ndarray, keys: np.ndarray, ids: np.ndarray, n_classes: int, beta: float) -> np.ndarray:
    weights = np.exp(-beta * (1 - queries.astype(np.float64) @ keys.astype(np.float64).T))
    return weights @ np.eye(n_classes)[ids]


def made(n: int, q: int, d: int, classes: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    common = rng.standard_normal(d)
    rows = [common + 0.7 * rng.standard_normal((m, d)) for m in (n, q)]
    keys, queries = [(r / np.linalg.norm(r, axis=1, keepdims=True)).astype(np.float32) for r in rows]
    return keys, np.sort(rng.choice(classes, n)), queries


@needs_triton
@pytest.mark.parametrize(
    ("n", "q", "d", "classes"),
    [(300, 70, 100, [0, 1, 3, 4, 8]), (200, 3, 64, list(range(150))), (2500, 65, 20, [5]), (1, 1, 1, [2])],
    ids=["gaps", "many classes a tile", "one class, several blocks", "one of each"],
)
def test_the_kernel_sums_by_class(n: int, q: int, d: int, classes: list[int], tmp_path) -> None:
    keys, ids, queries = made(n, q, d, classes)
    number = max(classes) + 2  # the last has no key
    np.savez(tmp_path / "given.npz", keys=keys, ids=ids, queries=queries, classes=number)
    command = [sys.executable, "-c", RUN, str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=120)
    found, expected = np.load(tmp_path / "found.npz"), dense(queries, keys, ids, number, 7.5)
    np.testing.assert_allclose(found["float32"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["float16"], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "auto"])
def test_the_compiled_kernel_answers_as_the_cpu_does(precision: str) -> None:
    keys, ids, queries = made(20000, 3000, 512, list(range(0, 1000, 2)))
    on_cpu = Keys(keys, ids, 1000).cache_logits(torch.from_numpy(queries), 7.5)
    on_gpu = Keys(keys, ids, 1000, "cuda", precision).cache_logits(torch.from_numpy(queries).cuda(), 7.5).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4 if precision == "float32" else 5e-3, atol=1e-4)
    assert (on_gpu.argmax(1) == on_cpu.argmax(1)).double().mean() >= 0.9995


@pytest.mark.gpu
@needs_gpu
def test_the_affinity_is_never_written_out() -> None:
    keys, ids, queries = made(60000, 4000, 64, list(range(100)))
    over, f = Keys(keys, ids, 100, "cuda"), torch.from_numpy(queries).cuda()
    over.cache_logits(f[:10], 7.5)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    over.cache_logits(f, 7.5)
    assert torch.cuda.max_memory_allocated() - before < 60000 * 4000 * 4 / 10
