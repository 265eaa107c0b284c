"""tip.py against the dense method in float64 with one-hot products, and against the formula in the docs."""

import re
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.special
import torch
from conftest import ROOT, tries
from dense import Case, Largest, betas, cases, nearest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sealing import body_of
from tables import unit, write_table

from retrieval_tip import tip
from retrieval_tip.model import Index
from retrieval_tip.settings import Settings

some_cases = cases(off_sphere=st.booleans(), shuffled=st.just(True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-4)])
@tries(250)
@given(
    case=some_cases,
    beta=betas,
    k=st.none() | st.integers(1, 40),
    slots=st.integers(0, 3),
    tail=st.booleans(),
    valued=st.booleans(),
)
def test_cache_logits_equal_the_dense_sum(case, beta, k, slots, tail, valued, dtype, tolerance):
    """Over all keys, some of them masked, or over the ``k`` nearest and empty slots of any affinity and row."""
    f, K, y = case.tensors(dtype)
    if k is None:
        met = case.rng.random(len(y)) < 0.8
        near = tip.affinity(f, K)
        rows = None
        ids = torch.where(torch.from_numpy(met), y, case.c)
    else:
        met = nearest(case.A, k)
        near, ids, rows = case.retrieved(k, dtype)
        order = torch.from_numpy(case.rng.permutation(near.shape[1] + slots))
        empty = (len(f), slots)
        near = torch.cat([near, torch.full(empty, 0.9, dtype=dtype)], dim=1)[:, order]
        ids = torch.cat([ids, torch.full(empty, case.c)], dim=1)[:, order]
        rows = torch.cat([rows, torch.from_numpy(case.rng.integers(len(y), size=empty))], dim=1)[
            :, order
        ]
    V = torch.from_numpy(case.V).to(dtype)
    sums = torch.from_numpy(np.eye(case.c)[case.y].T @ case.V).to(dtype)
    totals = case.totals(dtype) if tail else None
    found = tip.cache_logits(
        near, ids, case.c, beta, totals, tip.Values(V, rows, sums) if valued else None
    )
    scale = case.logits(beta, abs(case.V) if valued else None).max()
    expected = case.logits(beta, case.V if valued else None, met, tail=tail)
    assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)
    if not valued:
        assert (found[:, np.bincount(case.y, minlength=case.c) == 0] == 0).all()


@pytest.mark.parametrize("tail", [False, True])
def test_no_tensor_of_queries_by_keys_by_classes_is_allocated(tail):
    case = Case(2, [20] * 10, q=30)
    near, ids, rows = case.retrieved(55)
    values = tip.Values(torch.from_numpy(case.V).double(), rows, torch.zeros(10, 10).double())
    totals = case.totals() if tail else None
    with Largest() as largest:
        tip.cache_logits(near, ids, case.c, 2.0, totals, values)
    assert largest.most == 30 * 55


def test_a_tail_without_value_sums_is_refused():
    case = Case(1, [3, 2], q=1)
    near, ids, rows = case.retrieved(2)
    with pytest.raises(ValueError, match=r"^values: "):
        tip.cache_logits(
            near, ids, 2, 1.0, case.totals(), tip.Values(torch.from_numpy(case.V), rows)
        )


@tries(50)
@given(
    some_cases,
    st.floats(0, 20),
    st.floats(0, 20),
    st.floats(0.5, 200),
    betas,
    st.none() | st.floats(1e-3, 10),
)
def test_answer_equals_the_combination_of_its_terms(case, alpha, gamma, scale, beta, offset):
    f, K, y = case.tensors()
    d = K.shape[1]
    W = torch.from_numpy(case.W).double()
    phi = tip.Metric(K.mean(0) / 2, torch.eye(d, dtype=K.dtype) + 0.1)
    V = torch.eye(case.c, dtype=K.dtype)[y]
    scales = {"alpha": alpha, "beta": beta, "gamma": gamma, "logit_scale": scale}
    averages = tip.Discriminant.of(V.T @ phi(K), V.sum(0))
    whole = tip.answer(
        f, K, V, W, **scales, phi=phi, offset=offset, M=averages.means, b=averages.offsets
    )
    cache = tip.cache_logits(tip.affinity(phi(f), phi(K)), y, case.c, beta)
    terms = tip.Terms(tip.text_logits(f, W, scale), tip.log_cache(cache, offset), averages(phi(f)))
    parts = terms.logits(Settings(alpha=alpha, gamma=gamma))
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


FUNCTIONS = {"exp": np.exp, "log": np.log, "max": np.maximum, "unit": unit}
FUNCTIONS["softmax"] = partial(scipy.special.softmax, axis=1)


def evaluated(formula, letters):
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


@pytest.mark.parametrize("options", [(), ("--fit", "none"), ("--alpha", 1)])
def test_the_formula_in_the_docs_gives_the_logits_of_an_exported_index(tmp_path, options, run):
    """The test only reads files: the tables that ``index export`` writes, and the fitted arrays of the index."""
    rng = np.random.default_rng(10)
    names = list("abcde")
    index = tmp_path / "index"
    means = unit(rng.standard_normal((5, 32)))
    shots, test = (
        unit(means[np.arange(m) % 5] + 0.7 * rng.standard_normal((m, 32))) for m in (80, 40)
    )
    words = write_table(
        tmp_path / "words.parquet", unit(means + 0.09 * rng.standard_normal((5, 32))), names
    )
    source = write_table(tmp_path / "shots.parquet", shots, [names[i % 5] for i in range(80)])
    run("index build", source, "--text", words, *options, "--out", index)
    run(
        "index export",
        index,
        "--out",
        tmp_path / "keys.parquet",
        "--text",
        tmp_path / "text.parquet",
    )
    run("index clone", index, f"lance://{tmp_path}/store")
    run("index export", f"lance://{tmp_path}/store", "--out", tmp_path / "stored.parquet")
    assert pq.read_table(tmp_path / "stored.parquet").equals(
        pq.read_table(tmp_path / "keys.parquet")
    )
    manifest = body_of(index)
    K, W = (
        np.stack(pq.read_table(tmp_path / name)["feature"].to_numpy())
        for name in ("keys.parquet", "text.parquet")
    )
    labels = pq.read_table(tmp_path / "keys.parquet")["label"].to_pylist()

    def array(kind):
        return np.load(index / manifest["files"][kind]["name"]).astype(np.float64)

    letters = {name: manifest[name] for name in ("alpha", "beta", "logit_scale", "temperature")}
    letters |= {"f": test.astype(np.float32), "K": K, "W": W}
    lines = re.search(r"```\n(metric .*?)\n```", (ROOT / "docs/method.md").read_text(), re.DOTALL)[
        1
    ]
    if options:  # as the page describes: no metric, no link, one-hot values
        fitted = ("metric", "link", "discriminant")
        kept = [line for line in lines.splitlines() if not line.startswith(fitted)]
        lines = "\n".join(kept).replace(" + gamma B", "")
        letters |= {"phi": lambda x: x, "V": np.eye(5)[[names.index(label) for label in labels]]}
    else:
        metric = array("metric")
        letters |= {
            "m": metric[:1],
            "T": metric[1:],
            "V": array("values"),
            "o": manifest["log_offset"],
        }
        letters |= {"gamma": manifest["gamma"]}
        points = unit((K.astype(np.float64) - metric[:1]) @ metric[1:])
        letters["M"] = np.stack([points[np.array(labels) == name].mean(0) for name in names])
        squares = (letters["M"] ** 2).sum(1)
        n = 16
        letters["b"] = -(squares - (1 - squares).sum() * n / (80 - 5) / n) / 2
    result = evaluated(lines, letters)
    cache = Index.load(index)
    found = cache.retrieval.answer(cache.queries(letters["f"]).double(), cache.settings)[1]
    assert_allclose(found, result["L"], rtol=1e-6, atol=1e-4)
    chances = [prediction.probability for prediction in cache.classify(letters["f"])]
    assert_allclose(chances, result["P"].max(axis=1), rtol=1e-3)
