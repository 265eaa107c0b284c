"""Files of predictions, and the history of versions as a table."""

import csv
import io
import json

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from retrieval_tip.cli.output import write_tables
from retrieval_tip.predictions import PREDICTIONS
from retrieval_tip.store.labels import in_words

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
KEYS = pa.table(
    {"key_id": pa.array([7, 8, 9, 3, 4], pa.int64()), "label": ["cat", "cat", "dog", "dog", "dog"]}
)


# --- files of predictions

NEIGHBOUR = {
    "key_id": 3,
    "source": 'camera-3/a, "b"\n.jpg',
    "label": "cat",
    "affinity": 0.5,
    "weight": 1e-5,
    "gives": [1e-5, -2e-7],
}
ROWS = [
    {
        "input": "a.jpg",
        "label": "cat",
        "probability": 0.75,
        "labels": ["cat", "2024-01-01"],
        "probabilities": [0.75, 0.25],
        "logits": [1.5, -2.0],
        "text_logit": 1.0,
        "cache_logit": 0.5,
        "discriminant_logit": 0.25,
        "neighbours": [NEIGHBOUR, NEIGHBOUR | {"key_id": 4, "source": "b"}],
        "opposing": NEIGHBOUR,
        "no_match": False,
        "shot": True,
        "group": 2,
        "level": "class",
        "set": ["cat", "dog"],
        "similar": [
            {"input": "a.jpg", "label": "dog", "gives": 0.25},
            {"input": "b,\n", "label": "cat", "gives": 0.5},
        ],
    },
    {
        "input": 'b,\n"c".jpg',
        "label": None,
        "probability": 1.0,
        "labels": ["dog", "cat"],
        "probabilities": [1.0, 0.0],
        "logits": None,
        "text_logit": 0.0,
        "cache_logit": 0.0,
        "discriminant_logit": None,
        "neighbours": [],
        "opposing": None,
        "no_match": None,
        "shot": None,
        "group": None,
        "level": None,
        "set": [],
        "similar": None,
    },
]
STYLES = ["parquet", "csv", "json"]


def written(path, rows, style):
    schema = pa.schema(list(PREDICTIONS.items()))
    write_tables([pa.Table.from_pylist(rows, schema)], schema, style, path)
    return path


def read_back(path, style):
    """Read predictions without this package."""
    if style == "parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_bytes().decode()
    if style == "json":
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    heading, *rows = csv.reader(io.StringIO(text, newline=""))
    assert heading == list(PREDICTIONS)
    return [dict(zip(heading, map(cell_value, heading, row), strict=True)) for row in rows]


def cell_value(column, cell):
    kind = PREDICTIONS[column]
    if not cell:
        return None
    return (
        cell
        if pa.types.is_string(kind)
        else cell == "True"
        if pa.types.is_boolean(kind)
        else json.loads(cell)
    )


def test_duckdb_joins_predictions_with_keys(tmp_path):
    pq.write_table(KEYS, tmp_path / "keys.parquet")
    path = written(tmp_path / "p.parquet", ROWS, "parquet")
    found = duckdb.sql(f"SELECT input, label, probability, no_match FROM '{path}'").fetchall()
    assert found == [
        (row["input"], row["label"], row["probability"], row["no_match"]) for row in ROWS
    ]
    joined = duckdb.sql(
        f"SELECT p.input, l.label, n.affinity FROM '{path}' p, UNNEST(p.neighbours) AS u(n) "
        f"JOIN '{tmp_path / 'keys.parquet'}' l ON l.key_id = n.key_id ORDER BY l.key_id"
    )
    assert joined.fetchall() == [("a.jpg", "dog", 0.5), ("a.jpg", "dog", 0.5)]


ANY = st.builds(
    lambda row, text, more: (
        row | text | {"neighbours": [NEIGHBOUR | {"source": source} for source in more]}
    ),
    st.sampled_from(ROWS),
    st.fixed_dictionaries(
        {
            "input": TEXT.filter(bool),
            "label": st.none() | TEXT.filter(bool),
            "labels": st.lists(TEXT, max_size=3),
            "probability": st.floats(0, 1),
        }
    ),
    st.lists(TEXT, max_size=2),
)


@pytest.mark.parametrize("style", STYLES)
@given(rows=st.lists(ANY, min_size=1, max_size=5))
@example(rows=ROWS)
def test_predictions_come_back_from_every_format(tmp_path_factory, rows, style):
    path = written(tmp_path_factory.getbasetemp() / "any-predictions", rows, style)
    assert read_back(path, style) == rows


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([(None, "ibis"), (None, "crab"), (None, "crab")], "3 photos: 2 crab, 1 ibis"),
        ([("crab", "ibis")] * 2, "2 photos: crab became ibis"),
        (
            [("crab", "ibis")] * 2 + [("ibis", "owl")],
            "3 photos: 2 crab became ibis, 1 ibis became owl",
        ),
        ([("crab", None)] * 3, "removed 3 photos: 3 crab"),
        (
            [(None, "owl"), ("owl", "crab"), ("crab", None)],
            "1 photo: 1 owl; 1 photo: owl became crab; removed 1 photo: 1 crab",
        ),
        ([("crab", "crab"), (None, None)], ""),
        ([(None, str(name)) for name in range(9)], "9 photos: 1 0, 1 1, 1 2, 1 3, 1 4 and 4 more"),
    ],
)
def test_a_change_of_labels_is_told_in_words(edits, words):
    assert in_words(edits, "an encoder") == words
