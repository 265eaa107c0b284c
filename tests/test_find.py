"""Photos found by text or by example, and near-identical photos, compared with their definitions."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import cache_of, failed, json_rows, ok
from serving import caltech_photos
from tables import unit, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.labelling import find
from retrieval_tip.labelling.find import find_duplicates, find_photos
from retrieval_tip.tip import Metric


@pytest.fixture
def inbox(shared, tmp_path):
    """Photos of three classes, one of them twice, and a damaged file."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for place, (path, _) in enumerate(caltech_photos(shared, "test", 3, 2)):
        shutil.copy(path, inbox / f"{place}.jpg")
    shutil.copy(inbox / "0.jpg", inbox / "copy.jpg")
    (inbox / "broken.jpg").write_bytes(b"no image")
    return inbox


def test_an_example_finds_similar_photos(things, lit_mini, inbox, run):
    cache = Index.load(things)
    features = {}
    for path in sorted(inbox.glob("[0-9c]*.jpg")):
        features[str(path)] = Reader(lit_mini).encode(next(open_inputs([str(path)]))).features[0]
    example = features[str(inbox / "0.jpg")]
    others = {str(inbox / f"{place}.jpg") for place in range(1, 6)}
    expected = {
        name: float(feature @ example) for name, feature in features.items() if name in others
    }
    done = run("find", inbox, inbox / "0.jpg", "--index", things, "--format", "json")
    failed(done, 3, "searched 7 photos")
    rows = json_rows(done)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]  # without the copies of the example
    assert [row["input"] for row in rows] == sorted(expected, key=expected.get, reverse=True)
    assert [row["similarity"] for row in rows] == pytest.approx(
        sorted(expected.values(), reverse=True), abs=1e-3
    )
    assert (
        json_rows(
            run("find", inbox, inbox / "0.jpg", "-n", 2, "--index", things, "--format", "json")
        )
        == rows[:2]
    )
    assert cache.metric is None


def test_a_text_is_encoded_with_the_templates_of_the_index(things, lit_mini, inbox):
    cache = Index.load(things)
    photos = (inbox / "1.jpg", inbox / "2.jpg")
    done = ok("find", *photos, "a big aeroplane", "--index", things, "--format", "json")
    weight = Reader(lit_mini).text_weights(["a big aeroplane"], cache.templates)[0]
    for row in json_rows(done):
        feature = Reader(lit_mini).encode(next(open_inputs([row["input"]]))).features[0]
        assert row["similarity"] == pytest.approx(float(feature @ weight), abs=1e-3)
    assert len(json_rows(done)) == 2


def test_without_an_index_the_options_or_the_table_name_the_encoder(lit_mini, inbox, run, tmp_path):
    model = ("--model", lit_mini.identity.model)
    table = tmp_path / "inbox.parquet"
    assert run("encode", inbox, *model, "--out", table).exit_code == 3
    expected = json_rows(run("find", inbox, "an aeroplane", *model, "--format", "json"))
    found = json_rows(run("find", table, "an aeroplane", "--format", "json"))
    assert len(expected) == 7
    assert [Path(row["input"]).name for row in found] == [
        Path(row["input"]).name for row in expected
    ]
    features = {
        Path(row["id"]).name: np.array(row["feature"]) for row in pq.read_table(table).to_pylist()
    }
    nearest = max(
        (f"{place}.jpg" for place in range(1, 6)),
        key=lambda name: features[name] @ features["0.jpg"],
    )
    alike = json_rows(run("find", table, inbox / "0.jpg", "--format", "json"))
    assert Path(alike[0]["input"]).name == nearest
    pairs = json_rows(run("find", table, "--duplicates", "--format", "json"))
    assert [Path(row["other"]).name for row in pairs] == ["copy.jpg"]


def test_near_identical_photos_are_listed(things, inbox, run):
    rows = json_rows(run("find", inbox, "--duplicates", "--index", things, "--format", "json"))
    assert [(row["input"], row["other"]) for row in rows] == [
        (str(inbox / "0.jpg"), str(inbox / "copy.jpg"))
    ]
    assert rows[0]["kind"] == "identical image"


def index_of(metric=False):
    cache = cache_of(unit_rows(6, 8), [0, 0, 1, 1, 2, 2], ["a", "b", "c"], device="cpu")
    if metric:
        cache.metric = Metric(
            torch.from_numpy(unit_rows(1, 8, 1)[0]), torch.from_numpy(unit_rows(8, 8, 2))
        )
    return cache


class Fixed(Reader):
    """An encoder without text, for image files that contain the number of a feature."""

    def blocks(self, source):
        if source.table is not None:
            yield from super().blocks(source)
            return
        numbers = [int(Path(path).read_text()) for path in source.paths]
        yield FeatureBlock(
            np.arange(len(numbers)),
            unit_rows(40, 8, 3)[numbers],
            [str(number) for number in numbers],
        )


@pytest.mark.parametrize("metric", [True, False])
def test_the_best_photos_of_many_blocks_match_the_definition(metric, tmp_path):
    features = unit_rows(40, 8, 3)
    index = index_of(metric)
    ids = np.arange(40).astype(str)
    tables = [
        write_table(tmp_path / f"{i}.parquet", features[i::4], ids=ids[i::4].tolist())
        for i in range(4)
    ]
    (tmp_path / "x.jpg").write_text("7")
    found, total = find_photos(
        list(open_inputs(map(str, tables))), Fixed(), str(tmp_path / "x.jpg"), 9, index
    )
    points = features.astype(float)
    if metric:
        points = unit((points - index.metric.mean.numpy()) @ index.metric.transform.numpy())
    cosines = points @ points[7]
    order = np.argsort(-cosines)[:9]
    assert total == 40
    assert found["input"].to_pylist() == [str(row) for row in order]
    assert found["similarity"].to_numpy() == pytest.approx(cosines[order], abs=1e-5)


def test_all_pairs_are_compared_up_to_a_limit(tmp_path, monkeypatch):
    features = unit_rows(60, 8)
    features[30:40] = unit(features[:10] + 0.01 * unit_rows(10, 8, 1))
    features[50] = features[51]
    source = list(
        open_inputs(
            [str(write_table(tmp_path / "t.parquet", features, ids=[str(i) for i in range(60)]))]
        )
    )
    table, found = find_duplicates(source, Reader(), 5)
    a, b = np.triu_indices(60, 1)
    near = (features[a] * features[b]).sum(axis=1) >= 0.98
    assert (found.total, table.num_rows, found.compared) == (near.sum(), 5, "all")
    assert table["kind"].to_pylist()[0] == "identical feature"
    monkeypatch.setattr(find, "MOST_PHOTOS", 10)
    table, found = find_duplicates(source, Reader(), 5)
    assert (found.compared, table["input"].to_pylist(), table["other"].to_pylist()) == (
        "digests",
        ["50"],
        ["51"],
    )


def test_invalid_queries_are_refused(tmp_path, run):
    index = index_of()
    index.save(tmp_path / "index")
    table = write_table(tmp_path / "t.parquet", unit_rows(3, 8))
    for query in ("x.jpg", "missing.PNG"):
        failed(run("find", table, query, "--index", tmp_path / "index"), 1, query)
    for query in (["a cat"], ["a " * 3000], []):
        assert run("find", table, *query, "--index", tmp_path / "index").exit_code == 2
    source = list(open_inputs([str(table)]))
    with pytest.raises(UsageError, match="n is 0"):
        find_photos(source, Reader(), "x", 0)
    with pytest.raises(InputError):
        find_photos(source, Reader(), "x.jpg")
