"""Suspicious shots: compared with a dense reference, planted in features and real photos, left out of builds."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from clusters import round_clusters as clusters
from conftest import few, fitted, needs_real, ok, tries
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng
from serving import app_of
from tables import read_features, unit, unit_rows, write_table

from retrieval_tip.evaluation import audit as audits
from retrieval_tip.evaluation.audit import CLEAR, audit
from retrieval_tip.fit import closed_form
from retrieval_tip.model import Index
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.duplicates import NEAR
from retrieval_tip.settings import Settings


def reference(cache, k=None):
    """Return the suspicious shots as ``{key_id: row}``, computed shot by shot in float64."""
    keys = np.asarray(cache.keys, dtype=np.float64)
    affinity = keys @ keys.T
    ids = cache.labels["class_id"].to_numpy()
    _, beta = untouched_settings(np.asarray(cache.keys), ids)
    key_ids = cache.labels["key_id"].to_pylist()
    digests = cache.labels["digest"].to_pylist()
    sources = cache.labels["source"].to_pylist()
    images = [("digest", d) if d else ("source", s) for d, s in zip(digests, sources, strict=True)]
    c = len(cache.class_names)
    found = {}
    for i in range(cache.n):
        shown = np.array([image != images[i] for image in images])
        met = np.argsort(-affinity[i], kind="stable")[: k or cache.n]
        scores = np.full(c, np.nan)
        for y in range(c):
            if (shown & (ids == y)).any():
                own = [j for j in met if shown[j] and ids[j] == y]
                scores[y] = (
                    np.exp(-beta * (1 - affinity[i, own])).sum() / (shown & (ids == y)).sum()
                )
        norms = np.linalg.norm(keys, axis=1)
        twins = [
            (
                digests[j] == digests[i] and bool(digests[i]),
                affinity[i, j] / norms[i] / norms[j],
                -j,
            )
            for j in met
            if ids[j] != ids[i]
        ]
        twins = [twin for twin in twins if twin[0] or twin[1] >= NEAR]
        seen = [j for j in met if shown[j]]
        nearest = max(seen, key=lambda j: affinity[i, j], default=None)
        judged = not np.isnan(scores[ids[i]])
        lowest = (
            0
            if nearest is None
            else np.finfo(np.float32).tiny * np.exp(-beta * (1 - affinity[i, nearest]))
        )
        suggested = (
            int(np.nanargmax(scores))
            if judged and scores[ids[i]] < np.nanmax(scores)
            else int(ids[i])
        )
        if twins or suggested != ids[i]:
            found[key_ids[i]] = {
                "suggested": cache.class_names[suggested] if judged else None,
                "margin": np.log(scores[suggested] / max(scores[ids[i]], lowest))
                if judged
                else None,
                "nearest_key_id": None if nearest is None else key_ids[nearest],
                "nearest_affinity": None if nearest is None else affinity[i, nearest],
                "duplicate_of": {key_ids[-j] for digest, cosine, j in twins} or None,
            }
    return found


def audited(cache, k, **more):
    """Audit an index by the ``k`` nearest keys, as if it had too many keys to compare them all."""
    with mock.patch.multiple(audits, ALL_PAIRS=0 if k else audits.ALL_PAIRS, MET=k):
        return audit(cache, **more)


def check(cache, k=None):
    table = audited(cache, k, borderline=True)
    expected = reference(cache, k)
    described = {row["key_id"]: row for row in cache.labels.to_pylist()}
    rows = table.to_pylist()
    assert {row["key_id"] for row in rows} == set(expected)
    for row in rows:
        wanted = expected[row["key_id"]]
        for name in ("suggested", "nearest_key_id"):
            assert row[name] == wanted[name], name
        for name in ("margin", "nearest_affinity"):
            assert row[name] == (
                wanted[name]
                if wanted[name] is None
                else pytest.approx(wanted[name], rel=2e-3, abs=1e-5)
            )
        assert (
            row["duplicate_of"] == wanted["duplicate_of"]
            or row["duplicate_of"] in wanted["duplicate_of"]
        )
        assert (row["source"], row["label"]) == tuple(
            described[row["key_id"]][x] for x in ("source", "label")
        )
        if row["nearest_key_id"] is not None:
            near = described[row["nearest_key_id"]]
            assert (row["nearest_source"], row["nearest_label"]) == (near["source"], near["label"])
    order = [(-(row["margin"] or 0), row["key_id"]) for row in rows]
    assert order == sorted(order)
    for row in rows:
        if row["margin"] is not None and row["margin"] <= CLEAR:  # no clear suggestion
            row |= {"suggested": row["label"], "margin": 0}
    clear = [row for row in rows if row["margin"] or row["duplicate_of"] is not None]
    clear.sort(key=lambda row: (-(row["margin"] or 0), row["key_id"]))
    assert audited(cache, k).to_pylist() == clear
    return table


def random_index(
    seed, n=30, c=4, d=8, dtype=np.float32, digests=None, beta=5.5, norms=True, values=False
):
    """Return an index of random keys; some classes have one key, or none."""
    generator = default_rng(seed)
    keys = generator.normal(size=(n, d))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True) if norms else 2
    ids = np.minimum(generator.integers(0, c * 2, n), c - 1)
    cache = Index.from_features(
        keys.astype(dtype),
        ids,
        [f"class {i}" for i in range(c)],
        settings=Settings(beta=beta),
        sources=[f"{i}" for i in range(n)],
        values=unit_rows(n, c) if values else None,
    )
    if digests is not None:
        column = pa.array([digests[i] for i in cache.labels["key_id"].to_pylist()], pa.string())
        labels = cache.labels.set_column(
            cache.labels.column_names.index("digest"), "digest", column
        )
        cache.rows = replace(cache.rows, labels=labels)
    return cache


@tries(60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 5, 30]),
    st.sampled_from([np.float32, np.float16]),
    st.booleans(),
)
def test_an_audit_matches_the_dense_reference(seed, n, dtype, valued):
    """It ignores the settings and the trained values of the index, so that a margin means the same in every index."""
    generator = default_rng(seed)
    digests = [[None, "", "a", "b", "c"][i] for i in generator.integers(0, 5, n)]
    beta = float(generator.choice([0, 0.5, 5.5, 30, 1e30]))
    check(
        random_index(seed, n, dtype=dtype, digests=digests, beta=beta, norms=n != 5, values=valued)
    )


@tries(20)
@given(st.integers(0, 10**6), st.integers(3, 30))
def test_an_audit_of_the_nearest_keys_matches_the_dense_reference(seed, k):
    check(random_index(seed), k)


def test_an_audit_of_a_fitted_index_matches_the_dense_reference():
    """The metric was fitted with the wrong labels, and moved these shots towards the wrong classes."""
    request = closed_form.FitRequest(metric="within", values="solved")
    check(fitted(random_index(0), request))


def test_every_interface_lists_the_same_shots(run, tmp_path):
    """Compare the command line, Python, HTTP and the report. ``test_page.py`` compares the page with HTTP."""
    keys, ids = clusters(120, 4, 32, 2, 0.65)
    names = [f"class {i}" for i in range(4)]
    wrong = ids.copy()
    wrong[:8] = (ids[:8] + 1) % 4
    rows = write_table(tmp_path / "rows.parquet", keys, [names[i] for i in wrong])
    test = write_table(
        tmp_path / "test.parquet", clusters(40, 4, 32, 1)[0], [names[i % 4] for i in range(40)]
    )
    index = tmp_path / "index"
    store = f"lance://{tmp_path}/store"
    for arguments in (
        ("index", "build", rows, "--out", index),
        ("index", "clone", index, store),
        ("evaluate", index, test, "--report", tmp_path / "r.html"),
    ):
        ok("-q", *arguments)
    cache = Index.load(index)
    assert cache.fitted is not None
    clear, everything = (
        audit(cache, borderline=more)["key_id"].to_pylist() for more in (False, True)
    )
    assert 5 < len(clear) < len(everything)
    assert f"Check {len(clear)} labels" in (tmp_path / "r.html").read_text()
    with TestClient(app_of(index)) as client:
        for asked, flags, listed in (("", (), clear), ("?borderline=true", ("--all",), everything)):
            found = client.get(f"/v1/indexes/index/audit{asked}").json()
            assert [shot["key_id"] for shot in found] == listed
            for place in (index, store):
                printed = run("index audit", place, *flags, "--format", "json").stdout.splitlines()
                assert [json.loads(line)["key_id"] for line in printed] == listed


def mislabelled(ids, share, seed):
    """Move a share of the shots to other classes. Return the class ids, and a mask of the wrong ones."""
    draw = default_rng(seed)
    c = ids.max() + 1
    wrong = draw.permutation(len(ids)) < round(share * len(ids))
    return np.where(wrong, (ids + draw.integers(1, c, len(ids))) % c, ids), wrong


@needs_real
@pytest.mark.parametrize("seed", few([1, 2, 3]))
@pytest.mark.parametrize(
    ("file", "precise"), [("dtd/val", 0.65), ("oxford_flowers/shots_16", 0.95)]
)
def test_an_audit_of_real_photos_lists_most_wrong_and_few_right_labels(shared, file, precise, seed):
    keys, labels = read_features(shared / f"data/clip-vitb32/{file}.parquet")
    names, ids = np.unique(labels, return_inverse=True)
    order = default_rng(seed).permutation(len(ids))
    rows = np.concatenate([order[ids[order] == i][:16] for i in range(len(names))])
    for share in (0, 0.1, 0.2):
        given, wrong = mislabelled(ids[rows], share, seed)
        cache = Index.from_features(unit(keys[rows]), given, names.tolist())
        listed = np.zeros(len(rows), dtype=bool)
        listed[[row["key_id"] for row in audit(cache).to_pylist() if row["margin"]]] = True
        assert (listed & ~wrong).sum() <= 0.035 * (~wrong).sum()
        if share:
            assert (listed & wrong).sum() >= max(precise * listed.sum(), 0.5 * wrong.sum())
