"""Run SQL queries and conditions over the tables of a label store.

duckdb works on copies in memory and cannot access files or the network. The time and memory limits protect against
mistakes but not against attacks. For example, long strings can exceed the memory limit. The server does not accept SQL.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from retrieval_tip.arrays import IntArray
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.wording import first_line, one_line

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, Statement

TIMEOUT, LONGEST, LAST_WAIT = 60, 86_400, 2.0
"""Default timeout, maximum timeout, and time to wait for an interrupted query to end, in seconds."""
MAX_TEXT, MAX_OPEN = 1 << 16, 500
"""Maximum length of a statement, and maximum number of open parentheses. Both limit the parser's memory."""
MEMORY, ANSWER = 512 << 20, 128 << 20
"""Memory limits of duckdb and of an answer, in bytes. Twice the size of the tables is added to each limit."""


def ask(tables: Mapping[str, pa.Table], sql: str, timeout: float = TIMEOUT) -> pa.Table:
    """Run a SELECT query over the named ``tables`` and the view ``class_counts`` of the table ``labels``.

    The view has the columns ``class_id``, ``label`` and ``keys``, and one row for each class that has keys.
    Half-precision columns are converted to float32. If a column name is repeated, a number is appended to the name, for
    example ``label_1``.

    Raises UsageError if ``sql`` is not a single SELECT, if duckdb rejects it, if it runs for more than ``timeout``
    seconds or if it needs too much memory. Raises InputError if duckdb cannot store a table.
    """
    if not 0 < timeout <= LONGEST:
        raise UsageError(
            f"timeout is {timeout}: expected more than 0 and at most {LONGEST} seconds"
        )
    refusal = "query: expected a single SELECT; a query cannot change the label store"
    return _run("query", tables, sql, lambda database: _one_select(database, sql, refusal), timeout)


def rows_where(labels: pa.Table, condition: str) -> IntArray:
    """Return the positions of the rows for which an SQL condition is true, as an ascending int64 array.

    You can use ``labels`` and ``class_counts`` in subqueries. Raises UsageError if the condition is not a single
    boolean expression. Other errors are the same as for :func:`ask`.
    """
    position = "position"
    while position in {name.lower() for name in labels.column_names}:
        position += "_"
    numbered = labels.append_column(position, pa.array(np.arange(len(labels))))
    columns = one_line(", ".join(labels.column_names))
    expected = f"expected a boolean condition over the columns {columns}"

    def select(database: DuckDBPyConnection) -> Statement:
        # The condition must parse both bare and in parentheses, so that it cannot close them or open a comment.
        asked = (
            condition,
            f"({condition}) FROM labels",
            f"{position} FROM labels WHERE ({condition})",
        )
        _, value, rows = (
            _one_select(database, f"SELECT {clause}", f"where: {expected}") for clause in asked
        )
        types = [str(kind) for kind in database.sql(value).types]
        if types != ["BOOLEAN"]:
            raise UsageError(f"where: the condition is {', '.join(types)}; {expected}")
        return rows

    answer = _run("where", {"labels": numbered}, condition, select, TIMEOUT, hint=f"; {expected}")
    return np.sort(answer[0].to_numpy())  # duckdb's threads can return rows in any order


def _run(
    what: str,
    tables: Mapping[str, pa.Table],
    text: str,
    select: Callable[[DuckDBPyConnection], Statement],
    timeout: float,
    hint: str = "",
) -> pa.Table:
    """Run ``select`` over ``tables`` in a thread, so that a timeout or Ctrl+C can interrupt it."""
    import duckdb

    if text != text.encode(errors="replace").decode():
        raise UsageError(f"{what}: the text is not UTF-8")
    if len(text) > MAX_TEXT or text.count("(") - text.count(")") > MAX_OPEN:
        raise UsageError(
            f"{what}: has more than {MAX_TEXT:,} characters or {MAX_OPEN} open parentheses; shorten it"
        )
    threads = min(4, os.cpu_count() or 1)
    held = 2 * sum(table.nbytes for table in tables.values())
    closed = {
        "enable_external_access": "false",
        "python_enable_replacements": "false",
        "temp_directory": "",
    }
    limits = {"threads": str(threads), "memory_limit": f"{MEMORY + held} bytes"}
    database = duckdb.connect(":memory:", config={**closed, **limits})
    for name, table in tables.items():
        _create(database, name, table)
    database.execute("SET lock_configuration = true")
    answer = Future[pa.Table]()

    def work() -> None:
        try:
            answer.set_result(_fetch(database, what, select, ANSWER + held, hint))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(timeout)
    except TimeoutError:
        longer = ", or raise --timeout" if what == "query" else ""
        raise UsageError(f"{what}: took longer than {timeout:g} s; simplify it{longer}") from None
    finally:
        until = time.monotonic() + LAST_WAIT
        while not answer.done() and time.monotonic() < until:
            database.interrupt()  # repeated, because an interrupt between two statements has no effect
            wait([answer], 0.02)
        database.interrupt()  # otherwise, a query whose answer is too large would go on


def _fetch(
    database: DuckDBPyConnection,
    what: str,
    select: Callable[[DuckDBPyConnection], Statement],
    most: int,
    hint: str,
) -> pa.Table:
    import duckdb

    size = 0
    batches = []
    try:
        answer = pa.RecordBatchReader.from_stream(
            database.sql(select(database)).select("*")
        )  # renames repeats
        for batch in answer:
            size += max(
                batch.nbytes, 8 * batch.num_rows
            )  # rows without columns take time but no memory
            if size > most:
                raise UsageError(
                    f"{what}: the answer exceeds {most >> 20} MiB; add a LIMIT or select less"
                )
            batches.append(batch)
        return pa.Table.from_batches(batches, answer.schema)
    except (duckdb.Error, OSError, MemoryError, pa.ArrowException) as error:
        if isinstance(error, duckdb.CatalogException) and not hint:
            hint = f"; the tables are {', '.join(row[0] for row in database.execute('SHOW TABLES').fetchall())}"
        raise UsageError(f"{what}: {first_line(error).rstrip('!')}{hint}") from None


def _create(database: DuckDBPyConnection, name: str, table: pa.Table) -> None:
    import duckdb

    try:
        database.register(
            "from Arrow",
            table.cast(pa.schema([f.with_type(_duckdb_type(f.type)) for f in table.schema])),
        )
        database.execute(f'CREATE TABLE "{name}" AS FROM "from Arrow"')
        database.unregister("from Arrow")
        if name == "labels":
            counts = "SELECT class_id, label, count(*) AS keys FROM labels GROUP BY class_id, label ORDER BY class_id"
            database.execute(f"CREATE VIEW class_counts AS {counts}")
    except (duckdb.Error, pa.ArrowException, MemoryError) as error:
        raise InputError(f"{name}: duckdb cannot hold this table ({first_line(error)})") from None


def _duckdb_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_struct(kind):
        return pa.struct(
            [
                kind.field(i).with_type(_duckdb_type(kind.field(i).type))
                for i in range(kind.num_fields)
            ]
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_duckdb_type(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_duckdb_type(kind.value_type), kind.list_size)
    return kind


def _one_select(database: DuckDBPyConnection, sql: str, refusal: str) -> Statement:
    statements = database.extract_statements(sql)
    if [statement.type.name for statement in statements] != ["SELECT"]:
        raise UsageError(refusal)
    return statements[0]
