"""Groups of classes: the table, where they are stored, and answers at the narrowest level that is probable enough."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import failed, json_of, ok
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sealing import refused
from serving import app_of
from stored import made, source
from tables import unit, write_table

from retrieval_tip import tip
from retrieval_tip.answers import narrowest
from retrieval_tip.data.groups import read_groups
from retrieval_tip.data.reader import Reader
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.index import changes
from retrieval_tip.index.build import build_index
from retrieval_tip.index.places import at
from retrieval_tip.levels import Levels
from retrieval_tip.model import Index
from retrieval_tip.server.guard import Limits

NAMES = ["lion", "leopard", "caracal", "wolf", "empty"]
TABLE = "species,genus,family\nlion,Panthera,Felidae\nleopard,Panthera,Felidae\ncaracal,Caracal,Felidae\n"
TABLE += "wolf,Canis,Canidae\nempty,,\n"
LEVELS, *ROWS = (line.split(",") for line in TABLE.split())


def photos(seed, each):
    """Return features of the classes, of which those of one family are alike."""
    centres = (
        np.eye(8)[[0, 0, 0, 1, 2]]
        + 0.5 * np.eye(8)[[3, 3, 4, 5, 6]]
        + 0.25 * np.eye(8)[[6, 7, 5, 4, 3]]
    )
    noise = np.random.default_rng(seed).normal(size=(each, 5, 8)) * 0.3
    return unit((centres + noise).reshape(-1, 8)), NAMES * each


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def index(tmp_path, table):
    train = write_table(tmp_path / "train.parquet", *photos(0, 6))
    ok("index build", train, "--out", tmp_path / "index", "--groups", table)
    return tmp_path / "index"


@pytest.fixture
def queries(tmp_path):
    return write_table(tmp_path / "test.parquet", *photos(1, 20))


def expected(chances, least):
    """Return the label, the level and the probability, by the definition."""
    for level, name in enumerate(LEVELS):
        sums = {row[level]: 0.0 for row in ROWS if row[level]}
        for row in ROWS:
            if row[level]:
                sums[row[level]] += chances[NAMES.index(row[0])]
        best = max(sums, key=sums.get)
        if sums[best] >= least:
            return best, name, sums[best]
    return None, None, max(chances)


@given(st.lists(st.floats(0, 9), min_size=5, max_size=5, unique=True), st.floats(0.501, 1))
def test_an_answer_is_the_narrowest_level_whose_sum_is_probable_enough(logits, least):
    chances = torch.tensor([logits], dtype=torch.float64).softmax(1)
    groups = Levels(LEVELS, {row[0]: [name or None for name in row[1:]] for row in ROWS})
    found = {
        name: column.to_pylist()[0]
        for name, column in narrowest(chances, NAMES, groups, least).items()
    }
    label, level, probability = expected(chances[0].tolist(), least)
    assert found == {"label": label, "level": level, "probability": pytest.approx(probability)}


def test_every_door_answers_by_level(run, index, queries):
    opened, (features, labels) = Index.load(index), photos(1, 20)
    chances = tip.probabilities(opened.logits(features), opened.settings.temperature)
    order = [opened.class_names.index(name) for name in NAMES]
    answers = [expected(row, 0.8) for row in chances[:, order].tolist()]
    assert {level for _, level, _ in answers} == {*LEVELS, None}
    shown = run("classify", index, queries, "--at-least", 0.8, "--format", "json").stdout
    rows = [json.loads(line) for line in shown.splitlines()]
    assert list(rows[0])[:4] == ["input", "label", "level", "probability"]
    assert [(row["label"], row["level"]) for row in rows] == [answer[:2] for answer in answers]
    np.testing.assert_allclose(
        [row["probability"] for row in rows], [answer[2] for answer in answers], rtol=1e-5
    )
    bursts = run(
        "classify", index, queries, "--at-least", 0.8, "--burst", 10, "--format", "json"
    ).stdout
    assert [json.loads(line)["level"] for line in bursts.splitlines()] == [
        row["level"] for row in rows
    ]  # no times
    found = opened.classify(features, at_least=0.8)
    assert [(one.label, one.level) for one in found] == [answer[:2] for answer in answers]
    assert repr(found)
    with TestClient(app_of(index)) as client:
        body = {"features": features.tolist()}
        results = client.post("/v1/classify?at_least=0.8", json=body).json()["results"]
        assert [(row["label"], row["level"]) for row in results] == [
            answer[:2] for answer in answers
        ]
        assert client.post("/v1/classify?at_least=2", json=body).status_code == 422
    report = json_of("evaluate", index, queries, "--at-least", 0.8)
    assert report["no_label"] == pytest.approx(np.mean([answer[0] is None for answer in answers]))
    paths = {row[0]: row for row in ROWS}
    for number, level in enumerate(LEVELS):
        right = [
            a[0] == paths[label][number]
            for a, label in zip(answers, labels, strict=True)
            if a[1] == level
        ]
        assert report["levels"][level] == pytest.approx(
            {"share": len(right) / len(labels), "right": np.mean(right)}
        )
    assert "genus" in run("evaluate", index, queries, "--at-least", 0.8).stdout
    coco = json.loads(run("classify", index, queries, "--at-least", 0.8, "--format", "coco").stdout)
    assert {"lion", "Panthera", "Felidae"} <= {category["name"] for category in coco["categories"]}
    document = json.loads(
        run("classify", index, queries, "--at-least", 0.8, "--format", "megadetector").stdout
    )
    first = [
        image["detections"][0].get("classifications", [[None]])[0][0]
        for image in document["images"]
    ]
    labels = [row["label"] if not row["no_match"] else None for row in rows]
    assert [document["classification_categories"].get(number) for number in first] == labels
    facts = json_of("index info", index)
    assert facts["groups"] == {"species": 5, "genus": 3, "family": 2}


def test_at_least_needs_groups_and_a_share_and_excludes_abstain(run, index, tmp_path, queries):
    ok("index build", tmp_path / "train.parquet", "--out", tmp_path / "bare")
    for command in ("classify", "evaluate"):
        done = run(command, tmp_path / "bare", queries, "--at-least", 0.9)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "index set --groups" in done.stderr
    done = run("classify", index, queries, "--at-least", 0.9, "--abstain", 0.9)
    failed(done, 2, "--abstain")
    for wrong in (-0.1, 1.1, float("nan"), "high"):
        with pytest.raises(UsageError, match="at_least"):
            Index.load(index).classify(photos(1, 1)[0], at_least=wrong)


BAD = {
    "class twice": ("c,g\nlion,a\nlion,a\n", "'lion' occurs twice"),
    "class in two groups": ("c,g\nlion,a\nlion,b\n", "'lion' occurs twice"),
    "genus in two families": (
        "c,g,f\nlion,Panthera,Felidae\nwolf,Panthera,Canidae\n",
        "'Panthera'",
    ),
    "genus with and without a family": (
        "c,g,f\nlion,Panthera,Felidae\nwolf,Panthera,\n",
        "'Panthera'",
    ),
    "cycle": ("c,g,f\nlion,a,b\nwolf,b,a\n", "'b'"),
    "name at two levels": ("c,g,f\nlion,a,a\n", "'a'"),
    "only classes": ("c\nlion\n", "columns of broader groups"),
    "no class of the index": ("c,g\nyak,Bos\n", "no class of this index"),
    "no class name": ("c,g\n,a\nlion,a\n", "row 0"),
    "column twice": ("c,g,g\nlion,a,b\n", "duplicate column"),
    "no name of a level": ("c,\nlion,a\n", "different names"),
    "empty": ("", "groups.csv"),
    "no rows": ("c,g\n", "no class of this index"),
    "long name": ("c,g\nlion," + "x" * 5000 + "\n", "longer than"),
    "many rows": ("c,g\n" + "".join(f"c{i},g\n" for i in range(100_001)), "at most 100,000"),
    "large": ("c,g\nlion," + "x" * (1 << 24) + "\n", "larger than"),
    "many levels": (
        "c," + ",".join(f"g{i}" for i in range(17)) + "\nlion" + ",x" * 17 + "\n",
        "keep at most 16",
    ),
    "very many levels": (
        "c," + ",".join(f"g{i}" for i in range(20_000)) + "\nlion" + ",x" * 20_000,
        "20,000 levels",
    ),
    "not a table": ("\x00" * 50, "groups.csv"),
}


def test_an_invalid_table_is_refused_in_one_line_and_changes_nothing(run, index, table, tmp_path):
    for what, (text, reason) in BAD.items():
        table.write_text(text)
        done = run("index set", index, "--groups", table)
        assert done.exit_code == 1, what
        [line] = done.stderr.splitlines()
        assert reason in line
    for column in (pa.array([0.5, 2]), pa.array([[1], [2]])):
        pq.write_table(pa.table({"c": ["lion", "wolf"], "g": column}), tmp_path / "g.parquet")
        refused(
            lambda: changes.configure(index, groups=tmp_path / "g.parquet"), "'g'", error=InputError
        )
    for path in (tmp_path / "none.csv", tmp_path):
        refused(
            lambda path=path: changes.configure(index, groups=path), path.name, error=InputError
        )
    assert Index.load(index).version == 1


def test_groups_are_read_from_the_bytes_of_a_file(table, tmp_path):
    expected = read_groups(table, ["lion"])
    pq.write_table(
        pa.table(list(zip(*ROWS, strict=True)), names=LEVELS), tmp_path / "groups.parquet"
    )
    for data in (
        TABLE.encode(),
        TABLE.encode("utf-16"),
        (tmp_path / "groups.parquet").read_bytes(),
    ):
        assert read_groups(data, ["lion"]) == expected


def test_classes_that_the_index_lacks_are_named_and_have_their_groups_later(index, table, tmp_path):
    table.write_text(TABLE + "jaguar, Panthera ,Felidae\n")
    done = ok("index set", index, "--groups", table)
    assert "1 class is not in the index: jaguar" in done.stderr
    changes.add(
        index, source(tmp_path / "more.parquet", photos(3, 1)[0][:2], ["jaguar", "hyena"]), Reader()
    )
    groups = Index.load(index).groups
    paths = {
        "jaguar": "Felidae|Panthera|jaguar",
        "Panthera": "Felidae|Panthera",
        "Felidae": "Felidae",
    }
    for label, path in (paths | {"hyena": "hyena", "empty": "empty"}).items():
        assert "|".join(groups.path(label)) == path
    assert Index.load(index).classify(photos(3, 1)[0][1:2], at_least=0)[0].level == "species"


def test_groups_are_set_over_http(index, table):
    app = app_of(index, limits=Limits(json_bytes=1000), token="open sesame")
    with TestClient(app, headers={"Authorization": "Bearer open sesame"}) as client:

        def sent(text):
            return client.post(
                "/v1/indexes/index/set", content=text, headers={"Content-Type": "text/csv"}
            )

        answer = sent("kind,sort\nlion,beast\nwolf,beast\nyak,beast\n")
        assert (answer.json()["version"], answer.json()["warnings"]) == (
            2,
            ["1 class is not in the index: yak"],
        )
        assert client.get("/v1/indexes/index").json()["levels"] == ["kind", "sort"]
        assert Index.load(index).groups.path("lion") == ("beast", "lion")
        table.write_text(TABLE)
        assert sent(table.read_bytes()).json()["warnings"] == []
        for text, reason in BAD.values():
            refusal = sent(text)
            assert refusal.headers["content-type"] == "application/problem+json"
            assert refusal.status_code == (413 if len(text) > 1000 else 422)
            if refusal.status_code == 422 and text:
                assert refusal.json()["detail"].startswith("groups")
                assert reason.removesuffix(".csv") in refusal.json()["detail"]  # it is no file
        assert client.post("/v1/indexes/index/set", json={"groups": TABLE}).status_code == 422
        assert (client.get("/v1/indexes/index").json()["levels"], Index.load(index).version) == (
            LEVELS,
            3,
        )
        client.headers["Authorization"] = "Bearer none"
        assert sent(TABLE).status_code == 401


@pytest.mark.parametrize("kind", ["folder", "lance"])
def test_groups_survive_every_change_and_copy(tmp_path, kind, table):
    place = made(tmp_path, kind)
    copy = made(tmp_path, "lance" if kind == "folder" else "folder", "copy")
    build_index(source(tmp_path / "t.parquet", *photos(0, 6)), place, Reader(), groups=table)

    def now(where=place):
        return at(where).load().groups

    groups = now()
    changes.remove(place, key_ids=[0, 1])
    changes.relabel(place, "wolf", key_ids=[2])
    changes.configure(place, temperature=2.0)
    changes.rebuild(place)
    assert now() == groups
    changes.clone(place, copy)
    assert now(copy) == groups
    assert pickle.loads(pickle.dumps(at(place).load())).groups == groups
    before = changes.rename(place, "lion", "Panthera leo").version - 1
    assert now().path("Panthera leo") == ("Felidae", "Panthera", "Panthera leo")
    assert "lion" not in now().paths
    changes.rename(place, "Panthera leo", "leopard")  # merged
    assert now().path("leopard") == ("Felidae", "Panthera", "leopard")
    changes.rollback(place, before)
    assert now() == groups
    at(place).verify()
