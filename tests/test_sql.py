"""SQL queries and conditions on rows: results, access, and limits of time and memory."""

import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import few
from hypothesis import given
from hypothesis import strategies as st
from sealing import refused, snapshot
from tables import odd_columns

from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.store import query as module
from retrieval_tip.store.query import ask, rows_where

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


def test_ask_queries_every_table_and_class_counts():
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
    assert [
        row["column_name"] for row in ask(tables, "DESCRIBE labels").to_pylist()
    ] == LABELS.column_names
    assert ask({}, "SELECT 1 AS a WHERE false").num_rows == 0
    wrong = partial(ask, {"curve": tables["curve"]}, "FROM class_counts")
    refused(wrong, "query: Catalog Error", "class_counts", error=UsageError)


def test_ask_keeps_columns_of_every_type():
    further = odd_columns() | dict.fromkeys(["order", 'quo"ted', "rowid"], pa.array([1, 2]))
    answer = ask({"t": pa.table(further)}, "FROM t")
    assert answer.column_names == list(further)
    assert answer.to_pylist() == pa.table(further).to_pylist()
    assert ask({"t": pa.table(further)}, 'SELECT sum("order") AS s FROM t').to_pylist() == [
        {"s": 3}
    ]


def test_ask_reports_a_table_that_duckdb_cannot_read():
    offsets = pa.py_buffer(np.array([0, 1], np.int32).tobytes())
    damaged = pa.table({"a": pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff"))})
    for table in (damaged, pa.table({})):
        refused(
            partial(ask, {"curve": table}, "SELECT 1"),
            "curve: duckdb cannot hold this table (",
            error=InputError,
        )
    refused(
        lambda: ask({"labels": pa.table({"a": [1]})}, "SELECT 1"),
        "labels: ",
        "class_id",
        error=InputError,
    )


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
def test_ask_accepts_only_one_select(sql):
    text = refused(lambda: ask({"labels": LABELS}, sql), "query: ", error=UsageError)
    assert len(text) > len("query: ")


FORBIDDEN = [
    "SELECT * FROM read_csv('secret.csv')",
    "SELECT * FROM 'secret.csv'",
    'SELECT * FROM "secret.csv"',
    "SELECT * FROM sniff_csv('secret.csv')",
    "SELECT * FROM read_json('secret.json')",
    "SELECT content FROM read_text('*.csv')",
    "SELECT * FROM read_blob('secret.csv')",
    "SELECT * FROM glob('*')",
    "SELECT * FROM read_parquet('secret.parquet')",
    "SELECT * FROM parquet_metadata('secret.parquet')",
    "SELECT * FROM read_duckdb('other.db')",
    "SELECT getenv('SECRET')",
    "SELECT * FROM query_table('secret.csv')",
    "SELECT * FROM query('COPY labels TO ''out.csv''')",
    "WITH x AS (FROM read_csv('secret.csv')) FROM x",
    "COPY labels TO 'out.csv'",
    "COPY labels FROM 'secret.csv'",
    "EXPORT DATABASE 'out'",
    "ATTACH 'other.db' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
    "SET enable_external_access = true",
    "SET memory_limit = '1TB'",
    "SET temp_directory = '.'",
    "SET GLOBAL lock_configuration = false",
    "SELECT * FROM tables",
    "SELECT * FROM LABELS_OF_THE_TEST",
    'SELECT * FROM "from Arrow"',
    "SELECT * FROM arrow_scan(1, 2, 3)",
]
LABELS_OF_THE_TEST = LABELS  # SQL cannot access variables of Python


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """A working folder with files of every kind that duckdb reads."""
    import duckdb

    (tmp_path / "secret.csv").write_text("a,b\n1,secret\n")
    (tmp_path / "secret.json").write_text('{"a": "secret"}\n')
    pq.write_table(pa.table({"a": ["secret"]}), tmp_path / "secret.parquet")
    with duckdb.connect(str(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE t AS SELECT 'secret' AS a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "secret")
    return tmp_path


@pytest.mark.parametrize("sql", FORBIDDEN)
def test_sql_cannot_access_files_the_network_or_settings(secrets, sql):
    before = snapshot(secrets)
    for what, call in (
        ("query: ", lambda: ask({"labels": LABELS}, sql)),
        ("where: ", lambda: rows_where(LABELS, f"EXISTS ({sql})")),
    ):
        text = refused(call, what, error=UsageError)
        assert "secret\n" not in text
    assert snapshot(secrets) == before


def test_a_query_beyond_the_memory_limit_fails_and_writes_no_file(secrets, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", 64 << 20)
    before = snapshot(secrets)
    large = "SELECT count(*) FROM (SELECT DISTINCT i, i::VARCHAR FROM range(3000000) t(i))"
    refused(partial(ask, {}, large), "Out of Memory", error=UsageError)
    assert snapshot(secrets) == before


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
        (
            "labels.shot = (SELECT max(l.shot) FROM labels l WHERE l.class_id = labels.class_id)",
            [1, 4],
        ),
        ("label = ')' OR label = '--' OR shot = 2", [4]),
        ("shot = 2 /* a comment that ends */", [4]),
        ("(((shot))) = 2", [4]),
        ("\n shot = -- one\n 2\n", [4]),
    ],
)
def test_rows_where_returns_the_rows_of_a_condition(condition, rows):
    found = rows_where(LABELS, condition)
    assert found.dtype == np.int64
    assert found.tolist() == rows


@pytest.mark.parametrize(
    "condition",
    [
        "",
        ";",
        "--",
        "1=1); DROP TABLE labels; SELECT (1=1",
        "1=1) OR (1=1",
        "1=1) FROM labels WHERE (1=1",
        "1=1 UNION SELECT true",
        "1=1) UNION (SELECT true",
        "1=1 -- comment",
        "1=1 /*",
        "1=1; SELECT 1",
        "true WHERE true",
        "true ORDER BY 1",
        "true AS x",
        "DISTINCT true",
        "true, true",
        "*",
        "COLUMNS(*)",
        "SELECT true",
        "FROM labels",
        "shot",
        "'true'",
        "NULL",
        "[true]",
        "count(*) > 1",
        "row_number() OVER () < 3",
        "unnest([true, true])",
        "?",
        "lable = 'cat'",
        'label = "cat"',
        "label = 'cat",
        "error('mine')",
        "label = '\ud800'",
        "true\x00",
        "(" * 5000 + "true" + ")" * 5000,
        "(" * 60_000,
    ],
)
def test_rows_where_accepts_only_one_boolean_expression(condition):
    text = refused(lambda: rows_where(LABELS, condition), "where: ", error=UsageError)
    explained = "not UTF-8" in text or "open parentheses" in text
    assert explained or "over the columns key_id, cl" in text


@pytest.mark.parametrize(
    "names", [["position"], ["POSITION", "position_"], ["rowid", "Position", "position__"]]
)
def test_rows_where_works_with_any_column_names(names):
    table = LABELS
    for name in names:
        table = table.append_column(name, pa.array([4, 3, 2, 1, 0]))
    for name in names:
        assert rows_where(table, f'"{name}" < 2').tolist() == [3, 4]


def test_rows_where_is_exact_over_many_rows():
    n = 150_000
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 1000, n))
    shots = rng.integers(0, 50, n)
    table = pa.table({"class_id": ids, "label": pa.array([f"c{i}" for i in ids]), "shot": shots})
    chunked = pa.concat_tables([table.slice(at, 70_000) for at in range(0, n, 70_000)])
    holds = (shots < 10) & [str(i).startswith("7") for i in ids]
    np.testing.assert_array_equal(
        rows_where(chunked, "shot < 10 AND label LIKE 'c7%'"), np.flatnonzero(holds)
    )


@given(
    condition=st.lists(
        st.sampled_from(
            [
                "true",
                "shot",
                "(",
                ")",
                "--",
                "/*",
                "*/",
                ";",
                "'",
                '"',
                ",",
                "\n",
                " ",
                "SELECT",
                "UNION",
                "FROM labels",
                "WHERE",
                "=",
                "1",
                "OR",
                "NOT",
                "$$",
            ]
        ),
        max_size=8,
    ).map(" ".join)
)
def test_an_accepted_condition_cannot_change_the_surrounding_query(condition):
    """The condition gives the same rows inside other conditions, so it closes no parenthesis and opens no comment."""
    try:
        rows = rows_where(LABELS, condition).tolist()
    except UsageError:
        return
    assert rows_where(LABELS, f"false OR ({condition}\n) OR false").tolist() == rows
    assert rows_where(LABELS, f"NOT ({condition}\n) AND false").tolist() == []


LONG = "SELECT count(*) FROM range(100000000000) t(i), range(1000000)"


def test_a_query_beyond_its_timeout_is_cancelled():
    """Without a limit, the query takes years."""
    threads = threading.active_count()
    refused(lambda: ask({}, LONG, timeout=0.5), "query: ", "0.5 s", "--timeout", error=UsageError)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "long", few([LONG, "SELECT i FROM range(100000000000) t(i) WHERE sqrt(i) = 0.5"], 1)
)
def test_ctrl_c_interrupts_a_query(long):
    program = "import sys, duckdb; from retrieval_tip.store.query import ask; print(flush=True); ask({}, sys.argv[1])"
    with subprocess.Popen(
        [sys.executable, "-c", program, long], stdout=-1, stderr=-1, text=True
    ) as process:
        process.stdout.readline()
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.strip().endswith("KeyboardInterrupt")


def test_timeouts_queries_and_answers_are_limited():
    padded = "SELECT 1".ljust(module.MAX_TEXT)
    assert ask({}, padded).num_rows == 1
    wide = pa.table({"a": np.zeros(module.ANSWER // 8 + 1)})
    assert ask({"t": wide}, "FROM t").num_rows == len(wide)
    for timeout in (0, -1, float("nan"), float("inf"), 1e9):
        refused(partial(ask, {}, "SELECT 1", timeout=timeout), "timeout", error=UsageError)
    for long in (padded + " ", "SELECT " + "(" * (module.MAX_OPEN + 1)):
        refused(partial(ask, {}, long), "characters or", error=UsageError)
    refused(
        partial(rows_where, LABELS, "true".ljust(module.MAX_TEXT) + " "),
        "characters or",
        error=UsageError,
    )
    for many in ("FROM range(30000000)", "SELECT NULL FROM range(1000000000000)"):
        refused(partial(ask, {}, many), "LIMIT", error=UsageError)
    late = "SELECT CASE WHEN i > 1900000 THEN error('mine') END FROM range(2000000) t(i)"  # in a later row
    refused(partial(ask, {}, late), "query: Invalid Input Error: mine", error=UsageError)


@pytest.mark.soak
def test_a_query_with_too_large_an_answer_ends_with_its_error():
    """Otherwise, DuckDB would go on, and the process would not end."""
    script = (
        "import time\n"
        "from retrieval_tip.store.query import ask\n"
        "try: ask({}, 'SELECT NULL FROM range(1000000000000)')\n"
        "except ValueError as error: print(error)\n"
        "time.sleep(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("query: the answer exceeds 128 MiB")
