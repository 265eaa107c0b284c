"""Questions in SQL and conditions on rows: what they mean, what they reach, and what time and memory they may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SOAK, examples, few
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.store import query as module
from retrieval_tip.store.query import ask, rows_where

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


@pytest.mark.usefixtures("sql_apart")
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


@pytest.mark.usefixtures("sql_apart")
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
        "", ";", "-- nothing", "SELECT 1; SELECT 2", "SELECT 1; DROP TABLE labels",
        "INSERT INTO labels SELECT * FROM labels", "UPDATE labels SET class_id = 0", "DELETE FROM labels",
        "CREATE TABLE x AS SELECT 1", "DROP TABLE labels", "ALTER TABLE labels ADD COLUMN x INT", "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE SELECT 1", "PRAGMA database_list", "CALL pragma_version()", "BEGIN", "CHECKPOINT", "VACUUM",
        "PREPARE p AS SELECT 1", "SELEC 1", "SELECT nothing FROM labels", "SELECT 'x'::INT", "SELECT ?",
        "SELECT \ud800", "SELECT " + "(" * 100_000, "SELECT " + "NOT " * 100_000 + "true",
    ],
)  # fmt: skip
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
    for sql in few(REACHING, 12):
        for condition in (sql, f"EXISTS ({sql})", f"true); {sql}; --"):
            with pytest.raises(UsageError) as error:
                print(condition, rows_where(LABELS, condition))
            one_line(error, "where: ")
    assert snapshot(secrets) == before


@pytest.mark.usefixtures("sql_apart")
def test_settings_show_no_folder_and_what_memory_there_is() -> None:
    rows = ask({}, "SELECT name, value FROM duckdb_settings()").to_pylist()
    shown = {row["name"]: row["value"] for row in rows}
    home = str(Path.home())
    assert [name for name, value in shown.items() if value and (home in value or str(Path.cwd()) in value)] == []
    assert (shown["allowed_directories"], shown["temp_directory"]) == ("[]", "")
    number, unit = shown["memory_limit"].split()
    assert unit == "MiB"
    assert 512 <= float(number) < 520
    assert shown["enable_progress_bar"] == "false"  # it would appear on standard output after two seconds
    assert int(shown["threads"]) <= module.THREADS


@pytest.mark.usefixtures("sql_apart")
def test_what_the_memory_does_not_hold_is_refused_and_not_written(
    secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEMORY", 100 << 20)
    before = snapshot(secrets)
    with pytest.raises(UsageError, match="query: Out of Memory Error") as error:
        ask({}, "SELECT count(*) FROM (SELECT DISTINCT i, i::VARCHAR FROM range(30000000) t(i))")
    one_line(error)
    assert snapshot(secrets) == before


def test_the_module_starts_without_duckdb() -> None:
    program = "import sys; from retrieval_tip.store import query; print('duckdb' in sys.modules)"
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
    few([
        "", " ", ";", "--", "1=1); DROP TABLE labels; --", "1=1); DROP TABLE labels; SELECT (1=1", "1=1) OR (1=1",
        "1=1) FROM labels WHERE (1=1", "1=1 UNION SELECT", "1=1 UNION SELECT true", "1=1) UNION (SELECT true",
        "1=1 -- comment", "1=1 --", "1=1 /*", "1=1;", "1=1; SELECT 1", "1=1 FROM labels", "true WHERE true",
        "true ORDER BY 1", "true LIMIT 0", "true AS x", "true x", "x: true", "DISTINCT true", "true, true",
        "checked, label = 'cat'", "()", "*", "COLUMNS(*)", "COLUMNS('key_id|shot') > 0", "COLUMNS('.*') IS NOT NULL",
        "SELECT true", "FROM labels", "VALUES (true)", "TABLE labels", "WITH x AS (SELECT true) FROM x",
        "DESCRIBE labels", "shot", "1", "'true'", "label", "NULL", "{'a': true}", "[true]", "count(*) > 1",
        "row_number() OVER () < 3", "unnest([true, true])", "?", "$1 = 1", "lable = 'cat'", 'label = "cat"',
        "label = 'cat", "label == ", "label::INT = 3", "error('mine')", "label = '\ud800'", "true\x00",
        "(" * 5000 + "true" + ")" * 5000, "(" * 60_000,
    ], 30),
)  # fmt: skip
def test_rows_where_takes_one_boolean_expression_only(condition: str) -> None:
    with pytest.raises(UsageError) as error:
        print(rows_where(LABELS, condition))
    one_line(error, "where: ")
    said = "not UTF-8" in str(error.value) or "not closed" in str(error.value)
    assert said or "true or false of a row, over the columns key_id, cl" in str(error.value)


@pytest.mark.usefixtures("sql_apart")
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


@pytest.mark.usefixtures("sql_apart")
def test_rows_where_is_exact_over_very_many_rows() -> None:
    n = 1_000_000 if SOAK else 150_000
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


@settings(max_examples=examples(100), deadline=None)
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


@settings(max_examples=examples(100), deadline=None)
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


# --- what it may take

HOSTILE = [
    "repeat('x', 3000000000) = ''",  # a condition
    "SELECT repeat('x', 4000000000)",
    "SELECT repeat('x', 100000000 + i) FROM range(9) t(i)",
    "SELECT lpad('x', 2000000000, 'abc')",
    "SELECT list(i) FROM range(1000000000) t(i)",
    "SELECT string_agg(i::VARCHAR) FROM range(1000000000) t(i)",
    "SELECT count(*) FROM (SELECT DISTINCT i, i::VARCHAR FROM range(1000000000) t(i))",
    "SELECT i, i::VARCHAR FROM range(1000000000) t(i)",
    "SELECT a" + ".a" * 30_000,
    "SELECT *" + ", *" * 20_000 + " FROM labels",
]


def test_no_question_takes_more_than_its_time_and_its_memory() -> None:
    """In a process of its own, whose peak and that of its children are those of the questions."""
    program = (
        "import json, resource, sys, time, pyarrow as pa; from retrieval_tip.store import query as sql\n"
        "labels = pa.table({'class_id': [0, 1], 'label': ['a', 'b'], 'shot': [0, 0]})\n"
        "def peak(who): return resource.getrusage(who).ru_maxrss / 1024\n"
        "sql.ask({}, 'SELECT 1')\n"
        "idle, answers = (peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)), []\n"
        "for number, text in enumerate(json.load(sys.stdin)):\n"
        "    start, said = time.monotonic(), ''\n"
        "    try: sql.ask({'labels': labels}, text, timeout=1) if number else sql.rows_where(labels, text)\n"
        "    except sql.UsageError as error: said = str(error)\n"
        "    answers.append([said, time.monotonic() - start])\n"
        "print(json.dumps([answers, peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN), *idle]))\n"
    )
    texts = few(HOSTILE, 4)
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers, own, others, own_idle, others_idle = json.loads(done.stdout)
    for text, (said, seconds) in zip(texts, answers, strict=True):
        assert said.startswith(("query: ", "where: ")), text[:100]
        assert "\n" not in said
        assert seconds < 60, text[:100]  # where the machine is busy; without bounds some take hours
    assert own - own_idle + others - others_idle < 1024


@pytest.mark.usefixtures("sql_apart")
def test_an_answer_that_takes_too_long_is_given_up() -> None:
    for text in ("SELECT count(*) FROM range(100000000000) t(i), range(1000000)", "SELECT a" + ".a" * 30_000):
        with pytest.raises(UsageError, match="--timeout") as error:
            ask({}, text, timeout=0.5)
        one_line(error, "query: ", "0.5 s")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_limit_of_time_is_some_seconds(timeout: float) -> None:
    with pytest.raises(UsageError, match="timeout"):
        ask({}, "SELECT 1", timeout=timeout)


def test_text_and_columns_are_bounded() -> None:
    padded = "SELECT 1".ljust(module.MAX_TEXT)
    assert ask({}, padded).num_rows == 1
    for call in (lambda: ask({}, padded + " "), lambda: rows_where(LABELS, "true".ljust(module.MAX_TEXT) + " ")):
        with pytest.raises(UsageError, match="bytes of SQL"):
            call()
    most = ask({}, "SELECT 1" + ", 1" * (module.MAX_COLUMNS - 1))
    assert len(set(most.column_names)) == module.MAX_COLUMNS
    with pytest.raises(UsageError, match="columns"):
        ask({}, "SELECT 1" + ", 1" * module.MAX_COLUMNS)
    with pytest.raises(UsageError, match="parentheses"):
        ask({}, "SELECT " + "(" * (module.MAX_OPEN + 1))


@pytest.mark.usefixtures("sql_apart")
def test_an_answer_is_bounded_by_what_the_tables_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER", 1000)
    big = pa.table({"a": np.arange(100_000)})
    assert ask({"t": big}, "FROM t").num_rows == len(big)
    for many in ("FROM range(100000)", "SELECT NULL FROM range(1000000000000)"):
        with pytest.raises(UsageError, match="LIMIT"):
            ask({}, many)


@pytest.mark.usefixtures("sql_apart")
def test_a_process_that_cannot_answer_is_an_error_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY", 1)
    with pytest.raises(RetrievalTipError, match=r"^(query|labels): ") as error:
        ask({"labels": LABELS}, "FROM labels")
    one_line(error)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UsageError, match=r"^query: .*status 1"):
        ask({"labels": LABELS}, "FROM labels")


@pytest.mark.usefixtures("sql_apart")
def test_nothing_of_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("duckdb", "json", "pyarrow"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')\nraise SystemExit(9)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # of an interpreter that is talked to
    assert ask({}, "SELECT 1 AS a").to_pylist() == [{"a": 1}]
    assert not (tmp_path / "imported").exists()


@pytest.mark.usefixtures("sql_apart")
def test_errors_in_the_middle_of_an_answer_are_the_question_s() -> None:
    with pytest.raises(UsageError, match=r"^query: Invalid Input Error: mine"):
        ask({}, "SELECT CASE WHEN i > 1900000 THEN error('mine') END FROM range(2000000) t(i)")


@pytest.mark.usefixtures("sql_apart")
def test_predictions_are_read_where_their_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    bomb = pa.DictionaryArray.from_arrays(pa.array(np.zeros(200_000, np.int32)), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"input": bomb, "label": bomb}), path, store_schema=False, compression="zstd")
    with pytest.raises(InputError, match="cannot be read as predictions") as error:  # 400 GB of them
        ask({}, "SELECT count(*) FROM predictions", path)
    one_line(error, path)
    pq.write_table(pa.table({"input": ["a"], "label": ["b"]}), path)
    assert ask({}, "SELECT count(*) AS n FROM predictions", path).to_pylist() == [{"n": 1}]
    path.unlink()
    for make in (os.mkfifo, os.mkdir, lambda place: place.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(InputError) as error:
            ask({}, "SELECT 1", path)
        one_line(error, path)
        path.rmdir() if path.is_dir() else path.unlink()
