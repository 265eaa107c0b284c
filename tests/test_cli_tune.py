"""The commands index tune, index build --index auto and --precision."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import json_rows
from dense import shots_like_clip
from sealing import snapshot
from tables import write_table

from retrieval_tip import Index, verify

C, SHOTS, Q = 20, 16, 120
NAMES = [f"class {i}" for i in range(C)]
COLUMNS = ["index", "effort", "k", "agreement", "microseconds", "chosen"]


@pytest.fixture(scope="module")
def features():
    return dict(zip(("keys", "ids", "text", "queries"), shots_like_clip(C, SHOTS, 32, Q), strict=True))


@pytest.fixture
def place(tmp_path, run, features):
    """A Flat index of version 1, and unlabelled queries."""
    write_table(tmp_path / "train.parquet", features["keys"], [NAMES[i] for i in features["ids"]])
    write_table(tmp_path / "text.parquet", features["text"], NAMES)
    write_table(tmp_path / "queries.parquet", features["queries"])
    build(run, tmp_path, "index", "--alpha", 1, "--beta", 5.5)
    return tmp_path


def build(run, place, out, *more, train="train.parquet"):
    built = run(
        "index", "build", "--fit", "none", place / train, "--text", place / "text.parquet", "--out", place / out, *more
    )
    assert built.exit_code == 0, built.stderr


def tune(run, place, *more, val="queries.parquet"):
    return run("index", "tune", place / "index", "--val", place / val, *more)


def labels(cache, features, k):
    return cache.logits(features["queries"], k, cache.settings.tail).argmax(1).tolist()


@pytest.mark.parametrize("more", [(), ("--agreement", 0.8, "--index", "IVF8,Flat", "--index", "HNSW8")])
def test_the_new_version_has_the_printed_settings(run, place, features, more):
    data, before = set((place / "index" / "data").iterdir()), Index.load(place / "index", device="cpu")
    result = tune(run, place, *more, "--format", "json")
    assert result.exit_code == 0, result.stderr
    rows = json_rows(result)
    assert all(list(row) == COLUMNS for row in rows)
    assert [row["microseconds"] for row in rows] == sorted(row["microseconds"] for row in rows)
    agreements = [row["agreement"] for row in rows]
    assert all(less < higher for less, higher in pairwise(agreements))  # each further trial improves the agreement
    assert agreements[-1] == 1
    wanted = 0.8 if more else 0.999
    chosen = [row for row in rows if row["chosen"]]
    assert chosen == [next(row for row in rows if row["agreement"] >= wanted)]
    cache = verify(place / "index")
    assert cache.version == 2
    assert (cache.index.factory, cache.index.effort, str(cache.settings.k or "all")) == tuple(
        chosen[0][x] for x in COLUMNS[:3]
    )
    assert cache.settings == before.settings.override(k=cache.settings.k or "all", tail=True)
    record = f"tuned on {place / 'queries.parquet'}, n={Q}, agreement {chosen[0]['agreement']:.4g}"
    assert cache.provenance == before.provenance | {"index": record, "k": record}
    assert result.stderr.strip() == (
        f"{place / 'index'}: version 2, {cache.index.factory}, k {cache.settings.k or 'all'}"
    )
    added = set((place / "index" / "data").iterdir()) - data
    assert {path.name.partition("-")[0] for path in added} <= {"index"}  # no other file is rewritten
    cache = Index.load(place / "index", device="cpu")
    same = np.mean(np.equal(labels(cache, features, cache.settings.k), labels(cache, features, "all")))
    assert same == pytest.approx(chosen[0]["agreement"], abs=0.5 / Q)
    asked = json_rows(run("classify", place / "index", place / "queries.parquet", "--format", "json"))
    assert [row["label"] for row in asked] == [NAMES[i] for i in labels(cache, features, cache.settings.k)]


def test_a_dry_run_prints_its_choice_and_changes_nothing(run, place):
    before = snapshot(place / "index")
    result = tune(run, place, "--dry-run", "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert sum(row["chosen"] for row in json_rows(result)) == 1
    assert "version" not in result.stderr
    assert snapshot(place / "index") == before


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--agreement", "0"), 2, "--agreement"),
        (("--index", "Nope"), 2, "index 'Nope': "),
        (("--val", "few.parquet"), 1, "99 queries"),
        (("--format", "json", "--out", "nowhere/out.json"), 1, "nowhere"),
    ],
)
def test_wrong_usage_is_one_line_and_changes_nothing(run, place, features, more, code, message, monkeypatch):
    monkeypatch.chdir(place)
    write_table(place / "few.parquet", features["queries"][:99])
    before = (place / "index" / "manifest.json").read_bytes()
    result = tune(run, place, *more)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert (place / "index" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), ("Classes", 8 * 7 * SHOTS)),  # 2240 keys, too many to search all
        (("-k", "50"), ("Classes", 50)),
        (("-k", "all"), ("Classes", None)),
    ],
)
def test_build_chooses_index_and_k_unless_k_is_given(run, place, features, more, expected):
    rng = np.random.default_rng(0)
    rows = np.tile(features["keys"], (7, 1))
    rows = rows + 0.02 * rng.standard_normal(rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    write_table(place / "many.parquet", rows, [NAMES[i] for i in features["ids"]] * 7)
    build(run, place, "auto", "--index", "auto", *more, train="many.parquet")
    cache = verify(place / "auto")
    assert (cache.index.factory, cache.settings.k) == expected
