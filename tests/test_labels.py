"""The label store's tables: questions in SQL, conditions on rows, files of predictions, the history of versions."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_tip.cli.output import write_rows
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.store import labels as module
from retrieval_tip.store.labels import (
    PREDICTIONS,
    VERSIONS_SCHEMA,
    ask,
    read_predictions,
    rows_where,
    versions_table,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
LABELS = pa.table(
    {
        "key_id": pa.array([7, 8, 9, 3, 4], pa.int64()),
        "class_id": pa.array([0, 0, 1, 1, 1], pa.int32()),
        "label": ["cat", "cat", "dog", "dog", "dog"],
        "source": ["camera-3/a.jpg", "camera-1/b.jpg", "camera-3/c.jpg", None, "x"],
        "shot": pa.array([0, 1, 0, 1, 2], pa.int32()),
        "checked": [True, None, False, True, None],
    }
)


def one_line(error: pytest.ExceptionInfo[RetrievalTipError], *parts: object) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


# --- questions in SQL


def test_ask_answers_over_every_table_and_class_counts() -> None:
    tables = {"labels": LABELS, "curve": pa.table({"epoch": [0, 1], "loss": [2.0, 1.0]})}
    assert ask(tables, "FROM labels ORDER BY class_id, shot").to_pylist() == LABELS.to_pylist()
    assert ask(tables, "FROM labels").column_names == LABELS.column_names
    assert ask(tables, "SELECT min(loss) AS best FROM curve;").to_pylist() == [{"best": 1.0}]
    assert ask(tables, "FROM class_counts").to_pylist() == [
        {"class_id": 0, "label": "cat", "keys": 2},
        {"class_id": 1, "label": "dog", "keys": 3},
    ]
    shown = [row["name"] for row in ask(tables, "SHOW TABLES").to_pylist()]
    assert shown == ["class_counts", "curve", "labels"]
    assert [row["column_name"] for row in ask(tables, "DESCRIBE labels").to_pylist()] == LABELS.column_names
    assert ask({}, "SELECT 1 AS a WHERE false").num_rows == 0
    with pytest.raises(UsageError) as error:
        ask({"curve": tables["curve"]}, "FROM class_counts")
    one_line(error, "query: Catalog Error", "class_counts")


def test_ask_keeps_columns_of_every_type() -> None:
    half = np.arange(2, dtype=np.float16)
    further = {
        "half": pa.array(half),
        "halves": pa.array([[half[0]], None], pa.list_(pa.float16())),
        "pair": pa.array([list(half)] * 2, pa.list_(pa.float16(), 2)),
        "part": pa.array([{"a": half[1]}, None], pa.struct([("a", pa.float16())])),
        "dictionary": pa.array(["x", "y"]).dictionary_encode(),
        "nothing": pa.nulls(2),
        "nested": pa.array([{"a": [1, None]}] * 2),
        "bytes": pa.array([b"\xff"] * 2),
        "wide": pa.array([1, 2], pa.decimal256(50)),
        "order": pa.array([1, 2]),  # a word of SQL
        'quo"ted': pa.array([1, 2]),
        "rowid": pa.array([5, 6]),
    }
    answer = ask({"t": pa.table(further)}, "FROM t")
    assert answer.column_names == list(further)
    assert answer.to_pylist() == pa.table(further).to_pylist()
    assert ask({"t": pa.table(further)}, 'SELECT sum("order") AS s FROM t').to_pylist() == [{"s": 3}]


def test_ask_names_a_table_that_duckdb_cannot_hold() -> None:
    offsets = pa.py_buffer(np.array([0, 1], np.int32).tobytes())
    damaged = pa.table({"a": pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff"))})
    for table in (damaged, pa.table({})):
        with pytest.raises(InputError) as error:
            ask({"curve": table}, "SELECT 1")
        one_line(error, "curve: duckdb cannot hold this table (")
    with pytest.raises(InputError) as error:
        ask({"labels": pa.table({"a": [1]})}, "SELECT 1")
    one_line(error, "labels: ", "class_id")


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";",
        "-- nothing",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP TABLE labels",
        "INSERT INTO labels SELECT * FROM labels",
        "UPDATE labels SET class_id = 0",
        "DELETE FROM labels",
        "CREATE TABLE x AS SELECT 1",
        "DROP TABLE labels",
        "ALTER TABLE labels ADD COLUMN x INT",
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE SELECT 1",
        "PRAGMA database_list",
        "CALL pragma_version()",
        "BEGIN",
        "CHECKPOINT",
        "VACUUM",
        "PREPARE p AS SELECT 1",
        "SELEC 1",
        "SELECT nothing FROM labels",
        "SELECT 'x'::INT",
        "SELECT ?",
        "SELECT \ud800",
        "SELECT " + "(" * 100_000,
        "SELECT " + "NOT " * 100_000 + "true",
    ],
)
def test_ask_takes_one_select_only(sql: str) -> None:
    with pytest.raises(UsageError) as error:
        ask({"labels": LABELS}, sql)
    one_line(error, "query: ")
    assert len(str(error.value)) > len("query: ")


REACHING = [
    "SELECT * FROM read_csv('secret.csv')",
    "SELECT * FROM read_csv_auto('secret.csv')",
    "SELECT * FROM 'secret.csv'",
    'SELECT * FROM "secret.csv"',
    "SELECT * FROM sniff_csv('secret.csv')",
    "SELECT * FROM read_json('secret.json')",
    "SELECT * FROM read_ndjson_objects('secret.json')",
    "SELECT * FROM read_text('secret.csv')",
    "SELECT * FROM read_blob('secret.csv')",
    "SELECT content FROM read_text('*.csv')",
    "SELECT content FROM read_text('.tmp/secret.csv')",  # where duckdb would keep what its memory does not hold
    "SELECT content FROM read_text('.tmp/../secret.csv')",
    "SELECT * FROM glob('.tmp/*')",
    "SELECT * FROM read_parquet('secret.parquet')",
    "SELECT * FROM parquet_metadata('secret.parquet')",
    "SELECT * FROM parquet_kv_metadata('secret.parquet')",
    "SELECT * FROM glob('*')",
    "SELECT * FROM read_duckdb('other.db')",
    "SELECT getenv('SECRET')",
    "SELECT * FROM query('SELECT * FROM read_text(''secret.csv'')')",
    "SELECT * FROM query('COPY labels TO ''out.csv''')",
    "SELECT * FROM query_table('secret.csv')",
    "SELECT (SELECT count(*) FROM read_text('secret.csv')) FROM labels",
    "WITH x AS (SELECT * FROM read_csv('secret.csv')) SELECT * FROM x",
    "COPY labels TO 'out.csv'",
    "COPY (SELECT 1) TO '.tmp/out.parquet'",
    "COPY labels FROM 'secret.csv'",
    "EXPORT DATABASE 'out'",
    "IMPORT DATABASE 'out'",
    "ATTACH 'other.db' AS other",
    "ATTACH 'other.db' AS other; SELECT * FROM other.t",
    "SELECT * FROM 'other.db'",
    "USE other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD 'secret.csv'",
    "SELECT * FROM duckdb_extensions()",
    "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM sqlite_scan('other.db', 't')",
    "SET enable_external_access = true",
    "SET memory_limit = '1TB'",
    "SET temp_directory = '.'",
    "SET GLOBAL lock_configuration = false",
    "RESET enable_external_access",
    "SET allowed_directories = ['/']",
    "PRAGMA enable_profiling",
    "SELECT * FROM enable_logging()",
    "SET VARIABLE x = 1",
    "CREATE SECRET (TYPE s3)",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM tables",  # variables of the Python program
    "SELECT * FROM table",
    "SELECT * FROM plain",
    "SELECT * FROM LABELS_OF_THE_TEST",
    'SELECT * FROM "from Arrow"',
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM pandas_scan(1)",
    "CREATE MACRO x() AS TABLE SELECT * FROM read_text('secret.csv')",
]
LABELS_OF_THE_TEST = LABELS


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files of every kind that duckdb reads."""
    import duckdb

    (tmp_path / ".tmp").mkdir()
    for name in ("secret.csv", ".tmp/secret.csv"):
        (tmp_path / name).write_text("a,b\n1,secret\n")
    (tmp_path / "secret.json").write_text('{"a": "secret"}\n')
    pq.write_table(pa.table({"a": ["secret"]}), tmp_path / "secret.parquet")
    with duckdb.connect(str(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE t AS SELECT 'secret' AS a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "secret")
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_ask_reaches_no_file_no_network_and_no_setting(secrets: Path) -> None:
    before = snapshot(secrets)
    for sql in REACHING:
        with pytest.raises(UsageError) as error:
            print(sql, ask({"labels": LABELS}, sql))
        one_line(error, "query: ")
        assert "secret\n" not in str(error.value)
    assert snapshot(secrets) == before


def test_a_condition_reaches_no_file_no_network_and_no_setting(secrets: Path) -> None:
    before = snapshot(secrets)
    for sql in REACHING:
        for condition in (sql, f"EXISTS ({sql})", f"true); {sql}; --"):
            with pytest.raises(UsageError) as error:
                print(condition, rows_where(LABELS, condition))
            one_line(error, "where: ")
    assert snapshot(secrets) == before


def test_settings_show_no_folder_and_half_of_the_memory() -> None:
    import duckdb

    rows = ask({}, "SELECT name, value FROM duckdb_settings()").to_pylist()
    shown = {row["name"]: row["value"] for row in rows}
    home = str(Path.home())
    assert [name for name, value in shown.items() if value and (home in value or str(Path.cwd()) in value)] == []
    assert (shown["allowed_directories"], shown["temp_directory"]) == ("[]", "")
    with duckdb.connect(":memory:") as database:
        most = str(database.execute("SELECT current_setting('memory_limit')").fetchall()[0][0]).split()
    limit = shown["memory_limit"].split()
    assert limit[1] == most[1]
    assert float(limit[0]) == pytest.approx(float(most[0]) / 2, abs=0.2)


def test_what_the_memory_does_not_hold_is_refused_and_not_written(secrets: Path) -> None:
    """In a process of its own, in which little memory is left to duckdb."""
    program = (
        "import duckdb; from retrieval_tip.store import labels\n"
        "labels._SETTINGS = (\"memory_limit = '100 MiB'\", *labels._SETTINGS)\n"
        "sql = 'SELECT count(*) FROM (SELECT DISTINCT i, i::VARCHAR FROM range(30000000) t(i))'\n"
        "try: print(labels.ask({}, sql))\n"
        "except labels.UsageError as error: print(error)\n"
    )
    before = snapshot(secrets)
    path = os.pathsep.join([str(Path(module.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("query: Out of Memory Error")
    assert done.stdout.count("\n") == 1
    assert snapshot(secrets) == before


def test_the_module_starts_without_duckdb() -> None:
    program = (
        "import sys; before = set(sys.modules); from retrieval_tip.store import labels; print('duckdb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")


# --- conditions


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("source LIKE 'camera-3/%'", [0, 2]),
        ("label IN ('cat') AND shot < 4", [0, 1]),
        ("checked", [0, 3]),
        ("NOT checked", [2]),
        ("checked IS NULL", [1, 4]),
        ("label = NULL", []),
        ("true", [0, 1, 2, 3, 4]),
        ("false", []),
        ("key_id > (SELECT avg(key_id) FROM labels)", [0, 1, 2]),
        ("label IN (SELECT label FROM class_counts WHERE keys > 2)", [2, 3, 4]),
        ("labels.shot = (SELECT max(l.shot) FROM labels l WHERE l.class_id = labels.class_id)", [1, 4]),
        ("label = ')' OR label = '--' OR shot = 2", [4]),
        ("shot = 2 /* a comment that ends */", [4]),
        ("(((shot))) = 2", [4]),
        ("\n shot = -- one\n 2\n", [4]),
    ],
)
def test_rows_where_a_condition_holds(condition: str, rows: list[int]) -> None:
    found = rows_where(LABELS, condition)
    assert found.dtype == np.int64
    assert found.tolist() == rows


@pytest.mark.parametrize(
    "condition",
    [
        "",
        " ",
        ";",
        "--",
        "1=1); DROP TABLE labels; --",
        "1=1); DROP TABLE labels; SELECT (1=1",
        "1=1) OR (1=1",
        "1=1) FROM labels WHERE (1=1",
        "1=1 UNION SELECT",
        "1=1 UNION SELECT true",
        "1=1) UNION (SELECT true",
        "1=1 -- comment",
        "1=1 --",
        "1=1 /*",
        "1=1;",
        "1=1; SELECT 1",
        "1=1 FROM labels",
        "true WHERE true",
        "true ORDER BY 1",
        "true LIMIT 0",
        "true AS x",
        "true x",
        "x: true",
        "DISTINCT true",
        "true, true",
        "checked, label = 'cat'",
        "()",
        "*",
        "COLUMNS(*)",
        "COLUMNS('key_id|shot') > 0",
        "COLUMNS('.*') IS NOT NULL",
        "SELECT true",
        "FROM labels",
        "VALUES (true)",
        "TABLE labels",
        "WITH x AS (SELECT true) FROM x",
        "DESCRIBE labels",
        "shot",
        "1",
        "'true'",
        "label",
        "NULL",
        "{'a': true}",
        "[true]",
        "count(*) > 1",
        "row_number() OVER () < 3",
        "unnest([true, true])",
        "?",
        "$1 = 1",
        "lable = 'cat'",
        'label = "cat"',
        "label = 'cat",
        "label == ",
        "label::INT = 3",
        "error('mine')",
        "label = '\ud800'",
        "true\x00",
        "(" * 5000 + "true" + ")" * 5000,
        "(" * 100_000,
    ],
)
def test_rows_where_takes_one_boolean_expression_only(condition: str) -> None:
    with pytest.raises(UsageError) as error:
        print(rows_where(LABELS, condition))
    one_line(error, "where: ")
    said = "not UTF-8" in str(error.value) or "not closed" in str(error.value)
    assert said or "true or false of a row, over the columns key_id, cl" in str(error.value)


def test_rows_where_says_what_is_not_a_condition() -> None:
    with pytest.raises(UsageError, match=r"^where: is INTEGER; expected one condition that is true or false of a row"):
        rows_where(LABELS, "shot")
    with pytest.raises(UsageError, match=r'^where: Binder Error: .*"lable".*; expected one condition'):
        rows_where(LABELS, "lable = 'cat'")


@pytest.mark.parametrize("names", [["position"], ["POSITION", "position_"], ["rowid", "Position", "position__"]])
def test_rows_where_whatever_the_columns_are_called(names: list[str]) -> None:
    table = LABELS
    for name in names:
        table = table.append_column(name, pa.array([4, 3, 2, 1, 0]))
    for name in names:
        assert rows_where(table, f'"{name}" < 2').tolist() == [3, 4]


def test_rows_where_of_no_rows() -> None:
    assert rows_where(LABELS.slice(0, 0), "shot = 0").tolist() == []


def test_rows_where_is_exact_over_a_million_rows() -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 1000, n))
    shots = rng.integers(0, 50, n)
    table = pa.table(
        {"key_id": rng.permutation(n), "class_id": ids, "label": pa.array([f"c{i}" for i in ids]), "shot": shots}
    )
    chunked = pa.concat_tables([table.slice(at, 70_000) for at in range(0, n, 70_000)])
    for condition, holds in [
        ("shot < 10 AND label LIKE 'c7%'", (shots < 10) & [str(i).startswith("7") for i in ids]),
        ("key_id % 2 = 0", table["key_id"].to_numpy() % 2 == 0),
        (
            "label IN (SELECT label FROM labels WHERE key_id = 5)",
            ids == ids[np.argmax(table["key_id"].to_numpy() == 5)],
        ),
    ]:
        np.testing.assert_array_equal(rows_where(chunked, condition), np.flatnonzero(holds))


@given(
    rows=st.lists(st.tuples(st.none() | TEXT, st.none() | st.integers(-5, 5)), max_size=30),
    text=TEXT,
    number=st.integers(-5, 5),
)
def test_rows_where_is_what_python_says(rows: list[tuple[str | None, int | None]], text: str, number: int) -> None:
    table = pa.table(
        {
            "class_id": pa.array([0] * len(rows), pa.int32()),
            "label": pa.array([label for label, _ in rows], pa.string()),
            "shot": pa.array([shot for _, shot in rows], pa.int32()),
        }
    )
    quoted = text.replace("'", "''")
    expected = [i for i, (label, shot) in enumerate(rows) if label == text or (shot is not None and shot < number)]
    assert rows_where(table, f"label = '{quoted}' OR shot < {number}").tolist() == expected


@given(condition=st.lists(st.sampled_from(["true", "shot", "(", ")", "--", "/*", "*/", ";", "'", '"', ",", "\n", " ",
                                           "SELECT", "UNION", "FROM labels", "WHERE", "=", "1", "OR", "NOT", "$$"]),
                          max_size=8).map(" ".join))  # fmt: skip
def test_a_condition_is_refused_or_alone(condition: str) -> None:
    """What is taken means the same between other conditions, so it closed nothing and opened nothing."""
    try:
        rows = rows_where(LABELS, condition).tolist()
    except UsageError:
        return
    assert rows_where(LABELS, f"false OR ({condition}\n) OR false").tolist() == rows
    assert rows_where(LABELS, f"NOT ({condition}\n) AND false").tolist() == []


# --- files of predictions

NEIGHBOUR = {"key_id": 3, "source": 'camera-3/a, "b"\n.jpg', "label": "cat", "affinity": 0.5, "weight": 1e-5}
ROWS: list[dict[str, Any]] = [
    {"input": "a.jpg", "label": "cat", "probability": 0.75, "labels": ["cat", "2024-01-01"],
     "probabilities": [0.75, 0.25], "logits": [1.5, -2.0], "text_logit": 1.0, "cache_logit": 0.5,
     "neighbours": [NEIGHBOUR, NEIGHBOUR | {"key_id": 4, "source": "b"}], "keys": 3},
    {"input": "b,\n\"c\".jpg", "label": None, "probability": 1.0, "labels": ["dog", "cat"],
     "probabilities": [1.0, 0.0], "logits": None, "text_logit": 0.0, "cache_logit": 0.0,
     "neighbours": [], "keys": None},
]  # fmt: skip
STYLES = ["parquet", "csv", "json"]


def written(path: Path, rows: list[dict[str, Any]], style: str, columns: list[str] | None = None) -> Path:
    columns = columns or list(PREDICTIONS)
    write_rows(rows, columns, style, path, pa.schema([(column, PREDICTIONS[column]) for column in columns]))
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["p.parquet", "p.csv", "p", "ü x=1/[a]*.json"])
def test_predictions_come_back_from_every_format(tmp_path: Path, style: str, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    table = read_predictions(written(tmp_path / name, ROWS, style))
    assert table.schema.types == list(PREDICTIONS.values())
    assert table.to_pylist() == ROWS
    joined = ask(
        {"labels": LABELS, "predictions": table},
        "SELECT p.input, l.label, n.affinity FROM predictions p, UNNEST(p.neighbours) AS u(n) "
        "JOIN labels l ON l.key_id = n.key_id ORDER BY l.key_id",
    )
    assert joined.to_pylist() == [
        {"input": "a.jpg", "label": "dog", "affinity": 0.5},
        {"input": "a.jpg", "label": "dog", "affinity": 0.5},
    ]


@pytest.mark.parametrize("style", STYLES)
def test_predictions_of_few_columns_have_no_others(tmp_path: Path, style: str) -> None:
    columns = ["input", "label", "probability"]
    rows = [
        {"input": str(i), "label": None, "probability": float(i)} for i in range(3)
    ]  # all withheld, names of digits
    table = read_predictions(written(tmp_path / "p", rows, style, columns))
    assert table.column_names == columns
    assert table.to_pylist() == rows


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
GOOD = b'{"input": "a", "label": "b"}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Empty CSV file"),
        (b"\n\n", "cannot"),
        (b"input,label\n", "no rows"),
        (b"input  label  probability\na.jpg  cat  0.5\n", "no column 'input'"),
        (b"input,probability\na,0.5\n", "no column 'label'"),
        (b'{"input": "a"}\n', "no column 'label'"),
        (b"input,label,input\na,b,c\n", "column 'input' stands twice"),
        (b'{"input": "a", "label": "b"}\n{"input": "a", "label": "b", "label": "c"}\n', "twice"),
        (b"input,label\na\n", "Expected 2 columns"),
        (b"input,label\na,\xff\n", "UTF8"),
        (b"input,la\xffbel,label\na,b,c\n", "cannot"),
        (b'{"input": "a", "label": "\xff"}\n', "utf-8"),
        (GOOD + b'{"input": "a", "label": "\xff"}\n', "UTF8"),
        (b"input,label,probability\na,b,x\n", "double"),
        (b"input,label\n,b\n", "row 0 has no input"),
        (GOOD + b'{"label": "b"}\n', "row 1 has no input"),
        (GOOD + b"null\n", "row 1 has no input"),
        (b'{"input": 1, "label": "b"}\n', "JSON parse error"),
        (GOOD + b'{"input": "a", "label": 3}\n', "JSON parse error"),
        (b'{"input": "a", "label"', "cannot"),
        (GOOD + b'{"input": "a", "label"', "JSON parse error"),
        (GOOD + b"[1]\n", "JSON parse error"),
        (b'{"input": "a", "label": "\\ud800"}\n', "surrogate"),
        (b'[{"input": "a", "label": "b"}]\n', "cannot"),
        (b'{"input": "a", "label": "b", "z": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", "recursion"),
        (GOOD + b'{"input": "a", "label": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", "JSON parse error"),
        (b'input,label,neighbours\na,b,"[{""key_id"": ' + b"[" * DEEP + b"]" * DEEP + b'}]"\n', "JSON parse error"),
        (b'input,label,labels\na,b,"[""c"""\n', "JSON parse error"),
        (b'input,label,labels\na,b,"null} {""cell"": null"\n', "column 'labels' is not JSON"),
        (b"PAR1 and nothing", "Parquet"),
        (bytes(range(256)) * 9, "cannot"),
    ],
    ids=range(31),
)  # fmt: skip
def test_a_file_that_is_no_predictions_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(reason)) as error:
        print(read_predictions(path))
    one_line(error, f"{path}: cannot be read as predictions (", "retrieval-tip classify --format")


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
        (pa.Table.from_arrays([good, good, good], ["input", "label", "label"]), "column 'label' stands twice"),
    ]:
        pq.write_table(table, path)
        if reason is None:
            assert read_predictions(path).num_rows == 1
            continue
        with pytest.raises(InputError, match=re.escape(reason)) as error:
            read_predictions(path)
        one_line(error, path)
    written(path, ROWS, "parquet")
    whole = path.read_bytes()
    for cut in (4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError) as error:
            read_predictions(path)
        one_line(error, path)


@pytest.mark.parametrize("style", STYLES)
def test_a_file_of_too_many_predictions_is_refused(tmp_path: Path, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "p", ROWS, style)
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    assert read_predictions(path).num_rows == 2
    monkeypatch.setattr(module, "MAX_ROWS", 1)
    with pytest.raises(InputError, match="2 rows, more than 1"):
        read_predictions(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path, "not a file"),
        (tmp_path / "x\ny", "no such file"),
        (Path(os.devnull), "not a file"),
    ]:
        with pytest.raises(InputError, match=reason) as error:
            read_predictions(path)
        one_line(error, "retrieval-tip classify --format")


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
def test_what_is_no_time_is_null(text: object, hour: int | None) -> None:
    (found,) = versions_table([{"version": 1, "created_at": text}])["created_at"].to_pylist()
    assert (found and found.hour) == hour


@given(when=st.datetimes(timezones=st.timezones(), min_value=datetime.datetime(1900, 1, 1)))
def test_the_time_of_a_version_is_the_instant(when: datetime.datetime) -> None:
    (found,) = versions_table([{"created_at": when.isoformat()}])["created_at"].to_pylist()
    assert found is None or found == datetime.datetime.fromisoformat(when.isoformat())
    assert found is not None or when.year in (1, 9999, 1900)


@pytest.mark.parametrize("row", [{"version": 1 << 64}, {"version": "x"}, {"change": "\ud800"}, {"current": "yes"}])
def test_a_value_that_no_version_has_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(InputError) as error:
        versions_table([row])
    one_line(error, "versions: a value cannot be kept (")
