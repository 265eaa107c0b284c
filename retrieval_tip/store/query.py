"""SQL over the tables of a label store: questions, and conditions on its rows.

A duckdb answers in a process of its own, on copies in memory. It reaches no file, no network and no setting, and it has
bounds of time and memory that hold whatever it is asked: most of what takes memory or time in it, as strings and the
parsing of a statement, counts towards none of its own limits.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, first_line, one_line
from retrieval_tip.predictions import read_predictions

if TYPE_CHECKING:
    import duckdb

TIMEOUT = 60
"""Seconds that an answer may take when the tables are there, unless another limit is given."""
LONGEST = 86_400
"""The largest limit, in seconds: a day."""
MAX_TEXT = 1 << 16
"""Bytes of a statement or condition, at most."""
MAX_OPEN = 500
"""Most parentheses left open: duckdb's parser takes memory by their square, gigabytes for thousands."""
MAX_COLUMNS = 1 << 13
"""Columns of an answer, at most."""
MEMORY = 512 << 20
"""Bytes that the way to an answer may take beside the tables, and twice the tables' own."""
ANSWER = 128 << 20
"""Bytes of an answer, at most, and twice the tables' own."""
UNPACKED = 16
"""Times its size that a file of predictions may take in memory, beside :data:`MEMORY`."""
THREADS = 4
"""Threads of duckdb, at most: each takes memory of its own."""

_SETTINGS = (
    "autoinstall_known_extensions = false",
    "autoload_known_extensions = false",
    "python_enable_replacements = false",
    "temp_directory = ''",  # before access ends: a folder for temporary files stays open to read and write
    "secret_directory = ''",  # which would tell the home folder
    "enable_external_access = false",
    "enable_progress_bar = false",  # it would appear on standard output
)
_STATUS: dict[type[RetrievalTipError], int] = {UsageError: 2, InputError: 3}
"""The exit status of the process where it says why."""


def ask(
    tables: Mapping[str, pa.Table], sql: str, predictions: Path | None = None, timeout: float = TIMEOUT
) -> pa.Table:
    """The answer of one SELECT over these tables, by name, and over ``class_counts``, a view of ``labels``.

    The view has ``class_id``, ``label`` and ``keys``, a row a class that has keys. The table ``predictions`` is what a
    file of them holds (:func:`read_predictions`). Columns in half precision come as float32. A column of the
    answer whose name stood before gets another one (``label_1``).

    Raises UsageError where the statement is not one SELECT, or duckdb refuses it, or it takes longer than ``timeout``
    seconds or too much memory; InputError for a table that duckdb cannot hold and a file that is none of predictions.
    """
    if not 0 < timeout <= LONGEST:
        raise UsageError(f"timeout is {timeout}: expected seconds, at most {LONGEST}")
    answer = _answered("query", tables, sql, predictions, timeout)
    return answer.rename_columns(_apart(answer.column_names))


def rows_where(labels: pa.Table, condition: str) -> npt.NDArray[np.int64]:
    """Positions ``[m]`` int64, ascending, of the rows where a boolean SQL expression over the columns holds.

    What is NULL does not hold. Subqueries may ask ``labels`` and ``class_counts``.

    Raises UsageError where the condition is not one boolean expression, or duckdb refuses it, or it takes longer than
    :data:`TIMEOUT` or too much memory; InputError for a table that duckdb cannot hold.
    """
    position = "position"
    while position in {name.lower() for name in labels.column_names}:
        position += "_"
    numbered = labels.append_column(position, pa.array(np.arange(len(labels))))
    positions: npt.NDArray[np.int64] = _answered("where", {"labels": numbered}, condition, None, TIMEOUT)[0].to_numpy()
    return np.sort(positions)  # duckdb's threads may hand them over in any order


def _apart(names: Sequence[str]) -> list[str]:
    """Names of columns, each once: those that stand again get ``_1``, ``_2`` ..., as duckdb's tables do."""
    columns: list[str] = []
    taken, times = set(names), Counter[str]()
    for name in names:
        distinct = name
        if times[name]:
            distinct = next(new for i in itertools.count(times[name]) if (new := f"{name}_{i}") not in taken)
            times[name] = int(distinct.rpartition("_")[2])
        times[name] += 1
        taken.add(distinct)
        columns.append(distinct)
    return columns


# The process that asks


def _answered(
    what: str, tables: Mapping[str, pa.Table], text: str, predictions: Path | None, timeout: float
) -> pa.Table:
    """The answer of another process. ``what``: a ``query``, or a condition (``where``) on the rows of ``labels``."""
    _check_text(text, what)
    plain = {name: _castable(name, table) for name, table in tables.items()}
    held = 2 * sum(table.nbytes for table in plain.values())
    asked = {"what": what, "text": text, "tables": list(plain), "timeout": timeout, "memory": MEMORY + held}
    asked |= {"predictions": None if predictions is None else str(predictions)}
    # What is imported there is what was imported here, and nothing of the working folder. Arrow's own pool of memory
    # would set a gigabyte aside, whatever it needs.
    path, own = [part for part in sys.path if part], str(Path(__file__).parents[1])
    path = path if own in path else [own, *path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-P", "-c", f"from {__name__} import _answer; _answer()"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    answer = None
    with subprocess.Popen(command, env=environment, **pipes) as process:  # noqa: S603 - it is ours
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with suppress(BrokenPipeError):  # it says why
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                for table in plain.values():
                    with pa.ipc.new_stream(process.stdin, table.schema) as stream:
                        stream.write_table(table)
                process.stdin.close()
            with suppress(pa.ArrowException, OSError):
                answer = _received(process.stdout, ANSWER + held, what)
            said = process.stderr.read().decode(errors="replace").strip()
            status = process.wait()
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
    if status == 0 and answer is not None:
        return answer
    for kind, number in _STATUS.items():
        if status == number:
            raise kind(one_line(said))
    if sys.platform != "win32" and status == -signal.SIGALRM:
        longer = "; ask for less, or give it longer (--timeout)" if what == "query" else ""
        raise UsageError(f"{what}: took longer than {timeout:g} s{longer}")
    last = one_line(said.rpartition("\n")[2]) or f"status {status}"
    raise UsageError(f"{what}: cannot be answered, by the memory or the nesting that it takes ({last})")


def _received(source: Any, most: int, what: str) -> pa.Table:
    """An answer. Raises UsageError where it is too large, pa.ArrowException or OSError where it breaks off."""
    size, batches = 0, []
    with pa.ipc.open_stream(source) as stream:
        for batch in stream:
            size += max(batch.nbytes, 8 * batch.num_rows)  # rows of nothing take no bytes, and time
            if size > most:
                raise UsageError(f"{what}: its answer takes more than {most >> 20} MiB; ask for less, as with LIMIT")
            batches.append(batch)
        return pa.Table.from_batches(batches, stream.schema)


def _check_text(text: str, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{what}: not UTF-8 text") from None
    if size > MAX_TEXT:
        raise UsageError(f"{what}: {size:,} bytes of SQL, more than {MAX_TEXT:,}")
    if text.count("(") - text.count(")") > MAX_OPEN:
        raise UsageError(f"{what}: more than {MAX_OPEN} parentheses are not closed")


def _castable(name: str, table: pa.Table) -> pa.Table:
    """A table of the nearest types that duckdb takes from Arrow. Raises InputError where there is none."""
    try:
        return table.cast(pa.schema([field.with_type(_plain(field.type)) for field in table.schema]))
    except pa.ArrowException as error:
        raise _unheld(name, error) from None


def _plain(kind: pa.DataType) -> pa.DataType:
    """The nearest type that duckdb takes from Arrow."""
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_decimal256(kind):
        return pa.float64()
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_plain(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    return kind


def _unheld(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: duckdb cannot hold this table ({first_line(error)})")


# The process that answers


def _answer() -> None:
    """The work of the other process: a request and tables from standard input, an answer to standard output."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing else gets into the answer, as a bar that shows progress
    asked = json.loads(sys.stdin.buffer.readline())
    pa.set_cpu_count(THREADS)
    tables = ((name, pa.ipc.open_stream(sys.stdin.buffer)) for name in asked["tables"])
    predictions = None if asked["predictions"] is None else Path(asked["predictions"])
    try:
        with (
            _answering(asked["what"], tables, asked["text"], predictions, asked["memory"], asked["timeout"]) as answer,
            out,
            pa.ipc.new_stream(out, answer.schema) as stream,
        ):
            for batch in answer:
                stream.write_batch(batch)
    except RetrievalTipError as error:
        print(error, file=sys.stderr)
        sys.exit(_STATUS[type(error)])


@contextmanager
def _answering(
    what: str,
    tables: Iterable[tuple[str, pa.Table | pa.RecordBatchReader]],
    text: str,
    predictions: Path | None,
    memory: int,
    timeout: float,
) -> Iterator[pa.RecordBatchReader]:
    """The answer while it is made, in ``memory`` bytes and ``timeout`` seconds beside what the tables take."""
    import duckdb

    if predictions is not None:
        with suppress(OSError, ValueError):  # the reader says so
            memory += UNPACKED * predictions.stat().st_size
    with _database() as database:
        columns: list[str] = []
        for name, table in tables:
            _create(database, name, table)
            columns = table.schema.names
        used = int(database.execute("SELECT sum(memory_usage_bytes) FROM duckdb_memory()").fetchall()[0][0])
        database.execute(f"SET memory_limit = '{min(used + memory, _limit(database))} bytes'")
        database.execute("SET lock_configuration = true")
        _bound(memory, timeout)
        if predictions is not None:
            _create(database, "predictions", _castable("predictions", read_predictions(predictions)))
        hint = ""
        try:
            if what == "where":
                *own, position = columns
                over = one_line(", ".join(own))
                expected = f"expected one condition that is true or false of a row, over the columns {over}"
                hint = f"; {expected}"
                select = _condition(database, text, position, expected)
            else:
                select = _one_select(database, text, "query: expected one SELECT; the label store is read-only here")
            answer = pa.RecordBatchReader.from_stream(database.sql(select))
            if len(answer.schema) > MAX_COLUMNS:
                raise UsageError(f"{what}: its answer has {len(answer.schema):,} columns, more than {MAX_COLUMNS:,}")
            yield answer
        except BrokenPipeError:  # nobody waits for it any more
            raise
        except (duckdb.Error, OSError) as error:
            known = ""
            if isinstance(error, duckdb.CatalogException) and not hint:
                known = f"; the tables are {', '.join(row[0] for row in database.execute('SHOW TABLES').fetchall())}"
            raise UsageError(f"{what}: {first_line(error).rstrip('!')}{hint}{known}") from None
        except (pa.ArrowException, MemoryError) as error:
            raise UsageError(f"{what}: its answer cannot be kept ({first_line(error)}){hint}") from None


@contextmanager
def _database() -> Iterator[duckdb.DuckDBPyConnection]:
    """A duckdb in memory that reaches nothing else."""
    import duckdb

    threads = min(THREADS, os.cpu_count() or 1)
    with duckdb.connect(":memory:", config={"threads": threads}) as database:
        for setting in _SETTINGS:
            database.execute(f"SET {setting}")
        # Its default is most of the machine's, or of the container's; what asks needs its own beside it.
        database.execute(f"SET memory_limit = '{_limit(database) // 2} bytes'")
        yield database


def _limit(database: duckdb.DuckDBPyConnection) -> int:
    """Bytes of memory that duckdb allows itself."""
    number, unit = str(database.execute("SELECT current_setting('memory_limit')").fetchall()[0][0]).split()
    return int(float(number) * 1024 ** ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit))


def _bound(memory: int, timeout: float) -> None:
    """Let this process take so many bytes more than it has, and end after so many seconds, whatever it is doing.

    Memory is bounded on Linux; elsewhere duckdb's own limit has to do.
    """
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout)
    if sys.platform == "linux":
        import resource

        has = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = has + memory if hard == resource.RLIM_INFINITY else min(has + memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nor does it leave a core that large


def _create(database: duckdb.DuckDBPyConnection, name: str, table: pa.Table | pa.RecordBatchReader) -> None:
    """Copy a table, and make the view over ``labels``. Raises InputError where duckdb cannot hold it."""
    import duckdb

    try:
        database.register("from Arrow", table)
        database.execute(f'CREATE TABLE "{name}" AS FROM "from Arrow"')
        database.unregister("from Arrow")
        if name == "labels":
            database.execute(
                "CREATE VIEW class_counts AS SELECT class_id, label, count(*) AS keys FROM labels "
                "GROUP BY class_id, label ORDER BY class_id"
            )
    except (duckdb.Error, pa.ArrowException, MemoryError) as error:
        raise _unheld(name, error) from None


def _condition(database: duckdb.DuckDBPyConnection, condition: str, position: str, expected: str) -> duckdb.Statement:
    """The SELECT of the positions where a condition holds. Raises UsageError, duckdb.Error where it is none."""
    # Bare, it can close no parenthesis of ours; within one, it can end no SELECT and open no comment.
    _one_select(database, f"SELECT {condition}", f"where: {expected}")
    asked = f"SELECT ({condition}) FROM labels"  # noqa: S608 - one expression, as the two of them show
    types = [str(kind) for kind in database.sql(_one_select(database, asked, f"where: {expected}")).types]
    if types != ["BOOLEAN"]:
        raise UsageError(f"where: is {', '.join(types)}; {expected}")
    return _one_select(database, f"SELECT {position} FROM labels WHERE ({condition})", f"where: {expected}")  # noqa: S608


def _one_select(database: duckdb.DuckDBPyConnection, sql: str, refusal: str) -> duckdb.Statement:
    """The statement, parsed. Raises UsageError where it is not a single SELECT, duckdb.Error where it is no SQL."""
    import duckdb

    statements = database.extract_statements(sql)
    if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
        raise UsageError(refusal)
    return statements[0]
