"""Tables of the label store: files of predictions, and the history of versions."""

from __future__ import annotations

import datetime
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealing import refused

from retrieval_tip import predictions
from retrieval_tip.cli.output import write_tables
from retrieval_tip.errors import InputError
from retrieval_tip.predictions import PREDICTIONS, read_predictions
from retrieval_tip.store.labels import VERSIONS_SCHEMA, in_words, versions_table
from retrieval_tip.store.query import ask

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
KEYS = pa.table({"key_id": pa.array([7, 8, 9, 3, 4], pa.int64()), "label": ["cat", "cat", "dog", "dog", "dog"]})


# --- files of predictions

NEIGHBOUR = {"key_id": 3, "source": 'camera-3/a, "b"\n.jpg', "label": "cat", "affinity": 0.5, "weight": 1e-5,
             "gives": [1e-5, -2e-7]}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"input": "a.jpg", "label": "cat", "probability": 0.75, "labels": ["cat", "2024-01-01"],
     "probabilities": [0.75, 0.25], "logits": [1.5, -2.0], "text_logit": 1.0, "cache_logit": 0.5,
     "discriminant_logit": 0.25,
     "neighbours": [NEIGHBOUR, NEIGHBOUR | {"key_id": 4, "source": "b"}], "opposing": NEIGHBOUR,
     "no_match": False, "group": 2, "level": "class", "set": ["cat", "dog"],
     "similar": [{"input": "a.jpg", "label": "dog", "gives": 0.25}, {"input": "b,\n", "label": "cat", "gives": 0.5}]},
    {"input": "b,\n\"c\".jpg", "label": None, "probability": 1.0, "labels": ["dog", "cat"],
     "probabilities": [1.0, 0.0], "logits": None, "text_logit": 0.0, "cache_logit": 0.0,
     "discriminant_logit": None,
     "neighbours": [], "opposing": None, "no_match": None, "group": None, "level": None, "set": [],
     "similar": None},
]  # fmt: skip
STYLES = ["parquet", "csv", "json"]


def written(path: Path, rows: list[dict[str, Any]], style: str, columns: list[str] | None = None) -> Path:
    columns = columns or list(PREDICTIONS)
    schema = pa.schema([(column, PREDICTIONS[column]) for column in columns])
    write_tables([pa.Table.from_pylist(rows, schema)], schema, style, path)
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p", "ü x=1/[a]*.json"])
def test_predictions_come_back_from_every_format(tmp_path: Path, style: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    table = read_predictions(written(tmp_path / name, ROWS, style))
    assert table.schema.types == list(PREDICTIONS.values())
    assert table.to_pylist() == ROWS
    joined = ask(
        {"keys": KEYS, "predictions": table},
        "SELECT p.input, l.label, n.affinity FROM predictions p, UNNEST(p.neighbours) AS u(n) "
        "JOIN keys l ON l.key_id = n.key_id ORDER BY l.key_id",
    )
    assert joined.to_pylist() == [
        {"input": "a.jpg", "label": "dog", "affinity": 0.5},
        {"input": "a.jpg", "label": "dog", "affinity": 0.5},
    ]


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "input": TEXT.filter(bool),
                "label": st.none() | TEXT.filter(bool),
                "probability": st.floats(0, 1),
                "labels": st.lists(TEXT, max_size=3),
                "neighbours": st.lists(st.builds(lambda text: NEIGHBOUR | {"source": text}, TEXT), max_size=2),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    style=st.sampled_from(STYLES),
)
def test_any_predictions_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], style: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any-predictions"
    assert read_predictions(written(path, rows, style, list(rows[0]))).to_pylist() == rows


def test_further_columns_of_predictions_stay(tmp_path: Path) -> None:
    rows = [
        {"input": "a", "label": "b", "truth": "c", "fold": 1.0},
        {"input": "d", "label": "b", "truth": "b", "fold": 2.5},
    ]
    (tmp_path / "p.json").write_text("".join(json.dumps(row | {"list": [1]}) + "\n" for row in rows))
    (tmp_path / "p.csv").write_text("input,label,truth,fold\na,b,c,1\nd,b,b,2.5\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for name in ("p.json", "p.csv", "p.parquet"):
        assert read_predictions(tmp_path / name).to_pylist() == rows


DEEP = 1_000_000
TOO_DEEP = "recursion" if sys.version_info < (3, 14) else "Stack overflow"
GOOD = b'{"input": "a", "label": "b"}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Empty CSV file"),
        (b"input,label\n", "no rows"),
        (b"input,probability\na,0.5\n", "no column 'label'"),
        (b"input,label,input\na,b,c\n", "column 'input' occurs twice"),
        (b"input,label\na\n", "Expected 2 columns"),
        (b"input,label\na,\xff\n", "UTF8"),
        (b"input,label,probability\na,b,x\n", "double"),
        (b"input,label\n,b\n", "row 0 has no input"),
        (GOOD + b"null\n", "row 1 has no input"),
        (GOOD + b'{"input": "a", "label": 3}\n', "JSON parse error"),
        (b'{"input": "a", "label": "\\ud800"}\n', "surrogate"),
        (b'{"input": "a", "label": "b", "z": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", TOO_DEEP),
        (b'input,label,neighbours\na,b,"[{""key_id"": ' + b"[" * DEEP + b"]" * DEEP + b'}]"\n', "JSON parse error"),
        (b'input,label,labels\na,b,"null} {""cell"": null"\n', "column 'labels' is not JSON"),
        (b"PAR1 and nothing", "Parquet"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_file_that_is_no_predictions_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    said = (f"{path}: cannot be read as predictions (", reason, "retrieval-tip classify --format")
    refused(lambda: print(read_predictions(path)), *said, error=InputError)


def test_deeply_nested_json_beside_the_columns_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    nested = b"[" * DEEP + b"]" * DEEP
    first = b'{"input": "a", "label": "b", "neighbours": []}\n'
    path.write_bytes(first + b'{"input": "a", "label": "b", "neighbours": [{"key_id": 3, "z": ' + nested + b"}]}\n")
    assert [row["key_id"] for row in read_predictions(path)["neighbours"][1].as_py()] == [3]


def test_parquet_that_is_no_predictions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    offsets = pa.py_buffer(np.array([0, 1], np.int32).tobytes())
    bad = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff"))
    good = pa.array(["a"])
    for table, reason in [
        (pa.table({"input": good, "label": [1]}), "column 'label' is int64, not text"),
        (pa.table({"input": [1], "label": good}), "column 'input' is int64, not text"),
        (pa.table({"input": good}), "no column 'label'"),
        (pa.table({"input": good, "label": bad}), "UTF8"),
        (pa.table({"input": good, "label": good, "labels": pa.array([[None]]).cast(pa.list_(pa.string()))}), None),
        (pa.table({"input": good, "label": good}).slice(0, 0), "no rows"),
        (pa.Table.from_arrays([good, good, good], ["input", "label", "label"]), "column 'label' occurs twice"),
    ]:
        pq.write_table(table, path)
        if reason is None:
            assert read_predictions(path).num_rows == 1
            continue
        refused(lambda: read_predictions(path), path, reason, error=InputError)


@pytest.mark.parametrize("style", STYLES)
def test_a_file_of_too_many_predictions_is_refused(tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "p", ROWS, style)
    monkeypatch.setattr(predictions, "MAX_ROWS", 2)
    assert read_predictions(path).num_rows == 2
    monkeypatch.setattr(predictions, "MAX_ROWS", 1)
    with pytest.raises(InputError, match="2 rows, more than 1"):
        read_predictions(path)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path, "not a file"),
        (tmp_path / "x\ny", "no such file"),
        (Path(os.devnull), "not a file"),
    ]:
        refused(partial(read_predictions, path), reason, "retrieval-tip classify --format", error=InputError)


# --- versions


def test_versions_as_a_table() -> None:
    row = {"version": 2, "parent": 1, "created_at": "2026-01-02T03:04:05+02:00", "created_by": "retrieval-tip 1.0",
           "change": "add", "keys": 80, "classes": 5, "bytes": 1 << 40, "current": True}  # fmt: skip
    table = versions_table([row | {"version": 1, "parent": None, "current": False}, row])
    assert table.schema == VERSIONS_SCHEMA
    when = datetime.datetime(2026, 1, 2, 1, 4, 5, tzinfo=datetime.UTC)
    assert table.to_pylist()[1] == row | {"created_at": when}
    assert table["parent"].to_pylist() == [None, 1]
    answer = ask({"versions": table}, "SELECT version FROM versions WHERE current AND created_at < '2026-01-03'")
    assert answer.to_pylist() == [{"version": 2}]
    assert versions_table([]).schema == VERSIONS_SCHEMA


@pytest.mark.parametrize(
    ("text", "hour"),
    [("2026-01-02T03:00:00", 3), ("2026-01-02T03:00:00Z", 3), ("2026-01-02T03:00:00.000001-01:00", 4),
     ("2026-01-02", 0), ("", None), ("yesterday", None), ("0001-01-01T00:00:00+23:00", None),
     ("9999-12-31T23:59:59-23:00", None), (None, None), ("\x00", None), (5, None)],
)  # fmt: skip
def test_an_invalid_time_is_null(text: object, hour: int | None) -> None:
    (found,) = versions_table([{"version": 1, "created_at": text}])["created_at"].to_pylist()
    assert (found and found.hour) == hour


@pytest.mark.parametrize("row", [{"version": 1 << 64}, {"version": "x"}, {"change": "\ud800"}, {"current": "yes"}])
def test_a_value_that_no_version_has_is_refused(row: dict[str, object]) -> None:
    refused(lambda: versions_table([row]), "versions: cannot store a value (", error=InputError)


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([(None, "ibis"), (None, "crab"), (None, "crab")], "3 photos: 2 crab, 1 ibis"),
        ([("crab", "ibis")] * 2, "2 photos: crab became ibis"),
        ([("crab", "ibis")] * 2 + [("ibis", "owl")], "3 photos: 2 crab became ibis, 1 ibis became owl"),
        ([("crab", None)] * 3, "removed 3 photos: 3 crab"),
        (
            [(None, "owl"), ("owl", "crab"), ("crab", None)],
            "1 photo: 1 owl; 1 photo: owl became crab; removed 1 photo: 1 crab",
        ),
        ([("crab", "crab"), (None, None)], ""),
        ([(None, str(name)) for name in range(9)], "9 photos: 1 0, 1 1, 1 2, 1 3, 1 4 and 4 more"),
    ],
)
def test_a_change_of_labels_is_told_in_words(edits: list[tuple[str | None, str | None]], words: str) -> None:
    assert in_words(edits, "an encoder") == words
