"""Indexes of older formats load for ever. Format N wrote ``indexes/vN``, which never changes.

``expected.json`` beside them holds queries ``features`` and the answers of each index at that time: logits over all
keys and over the 4 nearest. ``v3/plain`` is ``v2/plain`` in a LanceDB store, and ``v6/solved`` and ``v6/metric`` are
the indexes of format 4 in LanceDB stores. Format 4 added fitted metrics and values, format 5 the settings of the build,
format 6 the sums of the keys, and format 7 the discriminant, the class prior and the prior scatter.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import needs_shared
from PIL import Image

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.cache_model import CacheModel, verify
from retrieval_tip.index import changes
from retrieval_tip.index.places import at
from retrieval_tip.settings import Built, Fitted
from retrieval_tip.store.folder import history, query, read_manifest
from retrieval_tip.store.manifest import FORMAT_VERSION, TABLE_FORMAT, Manifest

INDEXES = Path(__file__).parent / "indexes"
NAMES = [(version, name) for version in ("v1", "v2") for name in ("plain", "classes")] + [("v2", "graph")]
NAMES += [("v4", "solved"), ("v4", "metric"), ("v5", "drawn"), ("v5", "fitted"), ("v6", "sums"), ("v7", "discriminant")]


def expected(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((INDEXES / version / "expected.json").read_text())
    return found


def check_answers(cache: AnsweringIndex, version: str, name: str) -> None:
    known = expected(version)
    features, answers = np.array(known["features"], dtype=np.float32), known["answers"][name]
    np.testing.assert_allclose(cache.logits(features, k="all"), answers["all"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache.logits(features, k=4), answers["k4"], rtol=1e-5, atol=1e-5)
    assert [found.label for found in cache.classify(features)] == answers["labels"]


def test_every_format_has_test_indexes() -> None:
    assert sorted(path.name for path in INDEXES.iterdir()) == [f"v{i}" for i in range(1, FORMAT_VERSION + 1)]
    for version, name in NAMES:
        body = json.loads((INDEXES / version / name / "manifest.json").read_text())
        assert f"v{body['format_version']}" == version


@pytest.mark.parametrize(("version", "name"), NAMES)
def test_an_older_index_gives_its_old_answers_and_can_be_changed(version: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(INDEXES / version / name, folder)
    old = read_manifest(folder)
    check_answers(verify(folder), version, name)
    changes.configure(folder, temperature=2.0)
    new = verify(folder)
    check_answers(new, version, name)
    written = json.loads((folder / "manifest.json").read_text())["format_version"]
    assert written == FORMAT_VERSION
    kept = folder / "manifests" / f"{old.version:06d}.json"
    assert kept.read_bytes() == (INDEXES / version / name / "manifest.json").read_bytes()
    assert history(folder)["change"].to_pylist()[-1] == "set temperature 2"
    largest = max(new.labels["key_id"].to_pylist())
    assert new.add(np.eye(8, dtype=np.float32)[:1], ["cat"])[0] > largest
    new.save(folder)
    assert verify(folder).n == old.n + 1
    changes.rollback(folder, old.version)
    check_answers(verify(folder), version, name)


def test_an_older_store_gives_its_old_answers_and_can_be_changed(tmp_path: Path) -> None:
    shutil.copytree(INDEXES / "v3" / "plain", tmp_path / "plain")
    store = at(f"lance://{tmp_path / 'plain'}")
    old = store.manifest()
    assert json.loads((tmp_path / "plain/manifests/000001.json").read_text())["format_version"] == TABLE_FORMAT
    check_answers(store.verify(), "v2", "plain")
    changes.configure(f"lance://{tmp_path / 'plain'}", temperature=2.0)
    check_answers(store.verify(), "v2", "plain")
    new = store.manifest()
    assert (new.version, new.settings.temperature) == (old.version + 1, 2.0)
    assert (old.digests, new.digests.rows) == (None, None)  # would require reading all rows
    changes.rebuild(f"lance://{tmp_path / 'plain'}")
    assert store.verify().manifest.digests.rows is not None


@pytest.mark.parametrize("name", ["solved", "metric"])
def test_an_older_store_keeps_its_fit(name: str, tmp_path: Path) -> None:
    shutil.copytree(INDEXES / "v6" / name, tmp_path / name)
    place, folder = f"lance://{tmp_path / name}", CacheModel.load(INDEXES / "v4" / name, device="cpu")
    assert json.loads((tmp_path / name / "manifests/000001.json").read_text())["format_version"] == 6
    store = at(place).verify()
    assert store.fitted == folder.fitted
    check_answers(store, "v4", name)
    changes.relabel(place, "cat", key_ids=store.labels["key_id"].to_pylist()[-1:])
    changes.rollback(place, 1)
    check_answers(at(place).verify(), "v4", name)


def test_an_index_with_trained_encoder_weights_is_refused(run: Callable[..., Result]) -> None:
    folder = INDEXES / "v7" / "trained-encoder"
    refused = run("classify", folder, "photo.jpg")
    assert refused.exit_code == 1
    expected = "the index has trained encoder weights, which are no longer read; build the index again"
    assert refused.stderr == f"Error: {folder}/manifest.json: {expected}\n"


def test_format_1_keeps_its_labels_and_settings() -> None:
    plain = CacheModel.load(INDEXES / "v1" / "plain", device="cpu")
    assert (plain.version, plain.settings.alpha, plain.settings.beta, plain.settings.k) == (2, 2.0, 4.0, 4)
    assert plain.provenance == {"alpha": "given", "beta": "given"}
    assert plain.labels["camera"].to_pylist() == ["a", "b", "a", "b", "a", "b"]
    asked = query(INDEXES / "v1" / "plain", "SELECT key_id FROM labels")
    assert asked["key_id"].to_pylist() == [1, 3, 2, 5, 0, 4]


def test_format_2_keeps_its_segments_and_versions() -> None:
    plain = CacheModel.load(INDEXES / "v2" / "plain", device="cpu")
    assert (plain.version, plain.settings.alpha, plain.settings.k, plain.segments, plain.next_key_id) == (
        5,
        2.0,
        4,
        2,
        9,
    )
    assert plain.class_names == ["cat", "dog", "fish", "owl"]
    assert plain.labels["key_id"].to_pylist() == [1, 3, 2, 5, 0, 4, 7, 6]
    assert plain.labels["camera"].to_pylist() == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert plain.labels["digest"].to_pylist()[-2:] == ["cd" * 32, "ab" * 32]
    assert history(INDEXES / "v2" / "plain")["change"].to_pylist() == [
        "build",
        "add 2 keys and 1 class",
        "add 1 key",
        "remove 1 key",
        "set alpha 2, k 4",
    ]
    assert CacheModel.load(INDEXES / "v2" / "plain", device="cpu", version=3).n == 9


def test_format_4_keeps_its_fit() -> None:
    solved, metric = (CacheModel.load(INDEXES / "v4" / name, device="cpu") for name in ("solved", "metric"))
    assert solved.fitted == Fitted("within", "solved", 0.8, 0.1, 12)
    assert metric.fitted == Fitted("within", "one-hot", 0.5, None, 12)
    assert (metric.n, metric.segments, metric.version) == (14, 2, 2)
    assert solved.metric is not None
    assert solved.values is not None
    assert metric.values is None
    assert metric.settings.least_cache is not None


@pytest.mark.parametrize("name", ["drawn", "fitted"])
def test_format_5_keeps_the_settings_of_its_build(name: str) -> None:
    cache = CacheModel.load(INDEXES / "v5" / name, device="cpu")
    assert cache.built == Built("shots.parquet", shots=5, seed=7)
    assert (cache.n, cache.version) == (18, 2)


def test_format_6_keeps_the_sums_of_its_keys() -> None:
    cache = CacheModel.load(INDEXES / "v6" / "sums", device="cpu")
    keys = np.asarray(cache.keys, dtype=np.float64)
    assert cache.sums is not None
    assert (cache.n, cache.sums.counts.tolist()) == (242, [81, 81, 80])
    np.testing.assert_allclose(cache.sums.second, keys.T @ keys, atol=1e-12)


@pytest.mark.parametrize(
    ("recorded", "built"),
    [
        ({"source": "a.csv", "shots": 4, "seed": 7, "views": 3}, Built("a.csv", 4, 7, 3)),
        (
            {"source": "a.csv", "shots": None, "seed": None, "views": 1, "index": "auto"},
            Built("a.csv", auto_index=True),
        ),
        ({"source": 5, "shots": "x", "seed": -1, "views": True, "index": "given"}, Built()),
        ({}, Built()),
    ],
)
def test_before_format_5_the_provenance_tells_how_an_index_was_built(recorded: dict[str, Any], built: Built) -> None:
    body = json.loads((INDEXES / "v2" / "plain" / "manifest.json").read_text())
    manifest = Manifest.parse(body | {"provenance": recorded})
    assert (manifest.built, manifest.provenance) == (built, recorded)


@pytest.mark.parametrize(("version", "name"), NAMES)
def test_an_older_manifest_survives_a_round_trip(version: str, name: str) -> None:
    manifest = read_manifest(INDEXES / version / name)
    assert Manifest.from_bytes(manifest.to_bytes(), "m") == manifest


@needs_shared
def test_an_index_of_a_removed_decoder_still_classifies_features(
    run: Callable[..., Result], lit_mini: Backbone, tmp_path: Path
) -> None:
    identity = replace(lit_mini.identity, preprocess={**lit_mini.identity.preprocess, "decoder": "nvjpeg"})
    keys = np.eye(lit_mini.dim, dtype=np.float32)[:2]
    cache = CacheModel.from_features(keys, [0, 1], ["cat", "dog"], device="cpu")
    cache.backbone = identity
    cache.save(tmp_path / "index")
    assert [found.label for found in verify(tmp_path / "index").classify(keys)] == ["cat", "dog"]
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.jpg")
    for model in ((), ("--model", lit_mini.identity.model)):
        failed = run("classify", tmp_path / "index", tmp_path / "photo.jpg", "--device", "cpu", "--no-cache", *model)
        assert (failed.exit_code, failed.stdout) == (1, "")
        [line] = failed.stderr.splitlines()
        assert "nvjpeg" in line
