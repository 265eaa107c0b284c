"""tip.py against the dense method in float64 with one-hot products, and against the formula in the README."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import scipy.special
import torch
from conftest import ROOT, examples, needs_real
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tables import write_table

from retrieval_tip import tip
from retrieval_tip.model import CacheModel
from retrieval_tip.settings import Settings

Array = npt.NDArray[np.float64]
BETAS = (0.1, 1.0, 5.5, 20.0, 50.0)


@dataclass(frozen=True)
class Case:
    """Queries ``f``, keys ``K`` of classes ``y`` out of ``c``, text weights ``W``."""

    f: Array
    K: Array
    y: npt.NDArray[np.int64]
    W: Array

    @property
    def c(self) -> int:
        return len(self.W)

    @property
    def A(self) -> Array:
        return self.f @ self.K.T

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.from_numpy(self.f).to(dtype),
            torch.from_numpy(self.K).to(dtype),
            torch.from_numpy(self.y),
        )

    def totals(self, dtype: torch.dtype = torch.float64) -> tip.Totals:
        f, K, y = self.tensors(dtype)
        sums = torch.from_numpy(np.eye(self.c)[self.y].T).to(dtype) @ K
        return tip.Totals.of(f, sums, torch.bincount(y, minlength=self.c))

    def retrieved(self, k: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """Return affinities and class ids of the k nearest keys of each query."""
        f, K, y = self.tensors(dtype)
        near, rows = tip.affinity(f, K).topk(min(k, len(y)), dim=1)
        return near, y[rows]


def dense(A: Array, y: npt.NDArray[np.int64], c: int, beta: float, keep: npt.NDArray[np.bool_] | None = None) -> Array:
    """Return exp(-beta (1 - A)) times the one-hot labels, over all keys or only those in ``keep``."""
    weights = np.exp(-beta * (1 - A))
    if keep is not None:
        weights = weights * keep
    one_hot: Array = np.eye(c)[y]
    return weights @ one_hot


def top_mask(A: Array, k: int) -> npt.NDArray[np.bool_]:
    rank = np.argsort(np.argsort(-A, axis=1, kind="stable"), axis=1)
    return rank < k


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_case(seed: int, counts: tuple[int, ...], q: int = 7, d: int = 12, off_sphere: bool = False) -> Case:
    """Return classes of ``counts`` keys around one mean per class, with the keys in random order."""
    rng = np.random.default_rng(seed)
    means = unit(rng.standard_normal((len(counts), d)))
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    K = unit(means[y] + rng.standard_normal((len(y), d)) * rng.uniform(0.05, 0.5))
    if off_sphere:
        K = K * rng.uniform(0.5, 1.6, size=(len(y), 1))
    f = unit(means[rng.integers(len(counts), size=q)] + rng.standard_normal((q, d)) * 0.3)
    return Case(f, K, y, unit(means + rng.standard_normal(means.shape) * 0.3))


def food(shared: Path, shots: int) -> Case:
    def features(part: str) -> tuple[Array, list[str]]:
        table = pq.read_table(shared / "data" / "clip-food9" / f"{part}.parquet")
        return np.stack(table["feature"].to_numpy()).astype(np.float64), table["label"].to_pylist()

    W, names = features("text")
    K, labels = features("train")
    f, _ = features("test")
    y = np.array([names.index(label) for label in labels])
    chosen = np.concatenate([np.flatnonzero(y == i)[: shots - i % 3] for i in range(len(names))])  # unbalanced
    return Case(f[::5], K[chosen], y[chosen], W)


@st.composite
def cases(draw: st.DrawFn, least_d: int = 2) -> Case:
    counts = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)))
    assume(sum(counts) > 0)
    seed = draw(st.integers(0, 2**32 - 1))
    return random_case(
        seed, counts, q=draw(st.integers(1, 5)), d=draw(st.integers(least_d, 10)), off_sphere=draw(st.booleans())
    )


betas = st.floats(0.1, 50)


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas)
def test_all_keys_give_the_dense_sum(case: Case, beta: float) -> None:
    f, K, y = case.tensors()
    cache = tip.cache_logits(tip.affinity(f, K), y, case.c, beta)
    np.testing.assert_allclose(cache, dense(case.A, case.y, case.c, beta), rtol=1e-11)
    assert (cache[:, np.bincount(case.y, minlength=case.c) == 0] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shots", [3, 16])
def test_real_features_give_the_dense_sum_in_float32(shared: Path, shots: int, beta: float) -> None:
    case = food(shared, shots)
    f, K, y = case.tensors(torch.float32)
    expected = dense(case.A, case.y, case.c, beta)
    np.testing.assert_allclose(tip.cache_logits(tip.affinity(f, K), y, case.c, beta), expected, rtol=1e-4)
    near, ids = case.retrieved(20, torch.float32)
    mask = top_mask(case.A, 20)
    np.testing.assert_allclose(
        tip.cache_logits(near, ids, case.c, beta), dense(case.A, case.y, case.c, beta, mask), rtol=1e-4
    )


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas, st.integers(1, 40))
def test_top_k_gives_the_dense_sum_over_the_top_k(case: Case, beta: float, k: int) -> None:
    near, ids = case.retrieved(k)  # k may exceed n
    expected = dense(case.A, case.y, case.c, beta, top_mask(case.A, k))
    np.testing.assert_allclose(tip.cache_logits(near, ids, case.c, beta), expected, rtol=1e-11)


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas, st.integers(1, 40))
def test_the_tail_counts_other_keys_at_their_mean_affinity(case: Case, beta: float, k: int) -> None:
    near, ids = case.retrieved(k)
    left = ~top_mask(case.A, k)
    expected = dense(case.A, case.y, case.c, beta, ~left)
    for q in range(len(case.f)):
        for c in range(case.c):
            rest = case.A[q, left[q] & (case.y == c)]
            if rest.size:
                expected[q, c] += rest.size * np.exp(-beta * (1 - rest.mean()))
    np.testing.assert_allclose(tip.cache_logits(near, ids, case.c, beta, case.totals()), expected, rtol=1e-9)


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas, st.integers(1, 40))
def test_logits_with_a_tail_lie_between_those_of_top_k_and_all_keys(case: Case, beta: float, k: int) -> None:
    """The exponential is convex (Jensen)."""
    near, ids = case.retrieved(k)
    plain = tip.cache_logits(near, ids, case.c, beta).numpy()
    tail = tip.cache_logits(near, ids, case.c, beta, case.totals()).numpy()
    exact = dense(case.A, case.y, case.c, beta)
    assert (plain <= tail).all()
    assert (tail <= exact * (1 + 1e-10)).all()


@needs_real
def test_the_tail_reduces_the_error_of_top_k_on_real_features(shared: Path) -> None:
    case = food(shared, 16)
    near, ids = case.retrieved(16)
    exact = dense(case.A, case.y, case.c, 5.5)
    plain = np.abs(tip.cache_logits(near, ids, case.c, 5.5).numpy() - exact).max()
    tail = np.abs(tip.cache_logits(near, ids, case.c, 5.5, case.totals()).numpy() - exact).max()
    assert tail < plain / 10


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tail_adds_nothing_if_every_key_is_retrieved(dtype: torch.dtype, beta: float) -> None:
    case = random_case(3, (1, 9, 3, 30), off_sphere=True)
    near, ids = case.retrieved(len(case.y), dtype)
    with_tail = tip.cache_logits(near, ids, case.c, beta, case.totals(dtype))
    assert torch.equal(with_tail, tip.cache_logits(near, ids, case.c, beta))


@settings(max_examples=examples(100), deadline=None)
@given(cases(), betas, st.integers(1, 10), st.integers(1, 4), st.booleans())
def test_empty_slots_are_ignored(case: Case, beta: float, k: int, slots: int, tail: bool) -> None:
    near, ids = case.retrieved(k)
    totals = case.totals() if tail else None
    shape = (len(near), slots)
    padded = torch.cat([near, torch.full(shape, 0.9, dtype=near.dtype)], dim=1)  # an affinity that would matter
    padded_ids = torch.cat([ids, torch.full(shape, case.c)], dim=1)
    torch.testing.assert_close(
        tip.cache_logits(padded, padded_ids, case.c, beta, totals), tip.cache_logits(near, ids, case.c, beta, totals)
    )


@settings(max_examples=examples(100), deadline=None)
@given(cases(), betas, st.lists(st.integers(0, 36), max_size=4))
def test_blocks_of_keys_add_up(case: Case, beta: float, cuts: list[int]) -> None:
    f, K, y = case.tensors()
    whole = tip.cache_logits(tip.affinity(f, K), y, case.c, beta)
    edges = [0, *sorted(min(cut, len(y)) for cut in cuts), len(y)]
    parts = [
        tip.cache_logits(tip.affinity(f, K[a:b]), y[a:b], case.c, beta)
        for a, b in pairwise(edges)  # some blocks are empty
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=0)


def test_rest_returns_number_and_mean_affinity_of_other_keys() -> None:
    case = Case(np.eye(2)[:1], np.array([[0.9, 0], [0.5, 0], [0.1, 0], [0.7, 0]]), np.array([0, 0, 0, 1]), np.eye(2))
    number, mean = case.totals().rest(*case.retrieved(2))  # 0.9 of class 0 and 0.7 of class 1
    assert number.tolist() == [[2, 0]]
    np.testing.assert_allclose(mean, [[0.3, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_class_sums_keep_the_dtype_and_ignore_empty_slots(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2, 4], [8, 16, 32]], dtype=dtype)
    one = tip.sum_by_class(values, torch.tensor([1, 3, 1]), 3)
    each = tip.sum_by_class(values, torch.tensor([[1, 3, 1], [0, 0, 2]]), 3)
    assert one.dtype == each.dtype == dtype
    assert one.tolist() == [[0, 5, 0], [0, 40, 0]]
    assert each.tolist() == [[0, 5, 0], [24, 0, 32]]


@pytest.mark.parametrize("beta", BETAS)
def test_the_weight_of_a_key_is_exponential_in_its_affinity(beta: float) -> None:
    weights = tip.weight(torch.tensor([1.0, 0.5, 1.2], dtype=torch.float64), beta)
    np.testing.assert_allclose(weights, [1, np.exp(-beta / 2), np.exp(beta * 0.2)])
    assert (tip.weight(torch.rand(5), 0) == 1).all()


# ---------------------------------------------------------------------------------------------------- the whole method


@settings(max_examples=examples(50), deadline=None)
@given(cases(), st.integers(0, 2))
def test_the_discriminant_matches_its_definition(case: Case, empty: int) -> None:
    """The definition is computed in NumPy. Classes without keys get the mean of the others."""
    f, K, y = (part.numpy().astype(np.float64) for part in case.tensors())
    y, c = y.astype(int), case.c + empty
    sums, counts = np.zeros((c, K.shape[1])), np.bincount(y, minlength=c)
    np.add.at(sums, y, K)
    some = counts > 0
    means = sums[some] / counts[some, None]
    squares = (means**2).sum(1)
    variance = max(0.0, (counts[some] * (1 - squares)).sum() / max(len(y) - some.sum(), 1))
    expected = np.empty((len(f), c))
    expected[:, some] = f @ means.T - (squares - variance / counts[some]) / 2
    expected[:, ~some] = expected[:, some].mean(1, keepdims=True)
    found = tip.Discriminant.of(torch.from_numpy(sums), torch.from_numpy(counts).double())(torch.from_numpy(f))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=examples(50), deadline=None)
@given(
    cases(), st.floats(0, 20), st.floats(0, 20), st.floats(0.5, 200), betas, st.one_of(st.none(), st.floats(1e-3, 10))
)
def test_answer_equals_the_combination_of_its_terms(
    case: Case, alpha: float, gamma: float, scale: float, beta: float, offset: float | None
) -> None:
    f, K, y = case.tensors()
    d = K.shape[1]
    W, phi = torch.from_numpy(case.W), tip.Metric(K.mean(0) / 2, torch.eye(d, dtype=K.dtype) + 0.1)
    V = torch.eye(case.c, dtype=K.dtype)[y]
    scales = {"alpha": alpha, "beta": beta, "gamma": gamma, "logit_scale": scale}
    averages = tip.Discriminant.of(V.T @ phi(K), V.sum(0))
    whole = tip.answer(f, K, V, W, **scales, phi=phi, offset=offset, M=averages.means, b=averages.offsets)
    cache = tip.cache_logits(tip.affinity(phi(f), phi(K)), y, case.c, beta)
    terms = tip.Terms(tip.text_logits(f, W, scale), tip.log_cache(cache, offset), averages(phi(f)))
    parts = terms.logits(Settings(alpha=alpha, gamma=gamma))
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


FUNCTIONS = {
    "exp": np.exp,
    "log": np.log,
    "max": np.maximum,
    "softmax": lambda z: scipy.special.softmax(z, axis=1),
    "unit": lambda x: x / np.linalg.norm(x, axis=1, keepdims=True),
}


def evaluated(formula: str, letters: dict[str, Any]) -> dict[str, Any]:
    """Evaluate a formula line by line as Python. Adjacent letters are multiplied, as scalars or as matrices."""
    names = FUNCTIONS | letters
    for line in formula.splitlines():
        left, right = re.split(r" = | <- ", line.split(None, 1)[1].strip())
        scaled = re.sub(r"\b(alpha|beta|gamma|logit_scale) ", r"\1 * ", right.replace("^T", ".T"))
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " @ ", scaled)
        if left == "phi(x)":
            names["phi"] = eval(f"lambda x: {product}", names)
        else:
            names[left] = eval(product, names)
    return names


@pytest.mark.parametrize("fit", ["auto", "none"])
def test_the_formula_in_the_readme_gives_the_logits_of_an_exported_index(
    tmp_path: Path, fit: str, run: Callable[..., Any]
) -> None:
    """The test only reads files: the tables that ``index export`` writes, and the fitted arrays of the index."""
    rng, names, index = np.random.default_rng(6), list("abcde"), tmp_path / "index"
    means = unit(rng.standard_normal((5, 32)))
    shots, test = (unit(means[np.arange(m) % 5] + 0.53 * rng.standard_normal((m, 32))) for m in (80, 40))
    words = write_table(tmp_path / "words.parquet", unit(means + 0.09 * rng.standard_normal((5, 32))), names)
    source = write_table(tmp_path / "shots.parquet", shots, [names[i % 5] for i in range(80)])
    run("index", "build", source, "--text", words, "--fit", fit, "--out", index)
    run("index", "export", index, "--out", tmp_path / "keys.parquet", "--text", tmp_path / "text.parquet")
    manifest = json.loads((index / "manifest.json").read_text())
    K, W = (np.stack(pq.read_table(tmp_path / name)["feature"].to_numpy()) for name in ("keys.parquet", "text.parquet"))
    labels = pq.read_table(tmp_path / "keys.parquet")["label"].to_pylist()

    def array(kind: str) -> Array:
        stored: Array = np.load(index / manifest["files"][kind]["name"]).astype(np.float64)
        return stored

    letters = {name: manifest[name] for name in ("alpha", "beta", "logit_scale", "temperature")}
    letters |= {"f": test.astype(np.float32), "K": K, "W": W}
    lines = re.search(r"```\n(metric .*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    if fit == "none":  # as described in the README: no metric, no link, one-hot values
        lines = "\n".join(
            line for line in lines.splitlines() if line.split()[0] not in ("metric", "link", "discriminant")
        )
        lines = lines.replace(" + gamma B", "")
        letters |= {"phi": lambda x: x, "V": np.eye(5)[[names.index(label) for label in labels]]}
    else:
        metric = array("metric")
        letters |= {"m": metric[:1], "T": metric[1:], "V": array("values"), "o": manifest["log_offset"]}
        letters |= {"gamma": manifest["gamma"]}
        points = unit((K.astype(np.float64) - metric[:1]) @ metric[1:])
        letters["M"] = np.stack([points[np.array(labels) == name].mean(0) for name in names])
        squares, n = (letters["M"] ** 2).sum(1), 16
        letters["b"] = -(squares - (1 - squares).sum() * n / (80 - 5) / n) / 2
    result = evaluated(lines, letters)
    cache = CacheModel.load(index, device="cpu", precision="float32")
    np.testing.assert_allclose(cache.exact_logits(letters["f"]), result["L"], rtol=1e-6, atol=1e-4)
    chances = [prediction.probability for prediction in cache.classify(letters["f"])]
    np.testing.assert_allclose(chances, result["P"].max(axis=1), rtol=1e-3)
