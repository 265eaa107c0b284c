"""A prediction, what an index answers to one query: as an object, as a row, and in files of rows."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.errors import InputError, counted, first_line, one_line
from retrieval_tip.files import NotAFileError, open_regular
from retrieval_tip.html import table

if TYPE_CHECKING:
    pass

_NEIGHBOUR = {"key_id": pa.int64(), "source": pa.string(), "label": pa.string()}
_NEIGHBOUR |= {"affinity": pa.float64(), "weight": pa.float64(), "gives": pa.list_(pa.float64())}
PREDICTIONS = {
    "input": pa.string(),
    "label": pa.string(),
    "probability": pa.float64(),
    "labels": pa.list_(pa.string()),
    "probabilities": pa.list_(pa.float64()),
    "logits": pa.list_(pa.float32()),
    "text_logit": pa.float64(),
    "cache_logit": pa.float64(),
    "neighbours": pa.list_(pa.struct(list(_NEIGHBOUR.items()))),
    "opposing": pa.struct(list(_NEIGHBOUR.items())),
    "keys": pa.int64(),
    "unlike": pa.bool_(),
}
"""The columns that ``classify`` can write, with their types."""
SCHEMA = pa.schema(list(PREDICTIONS.items()))
ROWS = 1024
"""Rows that are made objects of at a time."""

MAX_ROWS = 100_000_000
"""Most predictions that one file may hold."""
MAX_LINE = 1 << 26
"""Bytes: the longest line of a text file of predictions; a thousand classes with their logits take 20 thousand."""
_SCALARS = {bool: pa.bool_(), int: pa.float64(), float: pa.float64(), str: pa.string()}
_REMEDY = "expected what retrieval-tip classify --format parquet, csv or json --output FILE writes"

SHOWN_PREDICTIONS = 50
"""Predictions that a notebook shows."""
SHOWN_LABELS = 8


Abstain = float | Literal["auto"] | None
"""The probability below which an answer is withheld."""
MORE_LIKELY_WRONG = 0.5


def shown_probability(probability: float) -> str:
    """A probability for eyes: 1 is never said of what only rounds to it, nor 0."""
    if probability > 0.99995:  # float32 also rounds to 1 what is less
        return ">0.9999"
    return f"{probability:.1e}" if 0 < probability < 5e-4 else f"{probability:.4f}"


@dataclass(frozen=True)
class Neighbour:
    """A shot behind an answer: its ``affinity`` to the query, and its ``weight`` ``w = exp(-beta (1 - affinity))``.

    ``gives``: its contribution ``w V`` to the cache ``C`` of each class in the prediction's ``labels``. With one-hot
    values this is its weight for its own class and 0 for others; fitted values may be larger, smaller or negative.
    """

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float
    gives: list[float]

    @property
    def contribution(self) -> float:
        """What it adds to the cache of the winner: positive for the answer, negative against it."""
        return self.gives[0]


@dataclass(frozen=True)
class Prediction:
    """The answer to one query, a row of :class:`Predictions`.

    ``label`` and ``probability`` (softmax of the blended logits / temperature) of the winner; ``labels`` and
    ``probabilities`` of the ``top`` classes; ``text_logit`` and ``cache_logit`` are the two parts of the winner's logit
    (the latter with alpha, so that they add up to it); ``logits`` ``[c]`` float32 in the index's order.
    ``neighbours``: the shots that contributed most to the answer, largest contribution first. ``opposing``: the shot
    with the lowest contribution; if none is negative, the one that adds most to the runner-up; ``None`` if there is no
    such shot. ``keys``: how many of the keys settled the answer, where it was certified. ``unlike``: whether the
    largest cache logit is smaller than the index's ``least_cache``, so that the query is unlike any shot; ``None``
    where the index has none.
    """

    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]
    text_logit: float
    cache_logit: float
    logits: npt.NDArray[np.float32] | None = field(compare=False)
    neighbours: list[Neighbour]
    keys: int | None = None
    unlike: bool | None = None
    opposing: Neighbour | None = None

    def _repr_html_(self) -> str:
        """Show the classes, the two parts of the winner's logit, and the shots behind it, for notebooks."""
        classes = zip(self.labels, map(shown_probability, self.probabilities), strict=True)
        caption = f"text {self.text_logit:.4g} + cache {self.cache_logit:.4g}"
        shown = table(("class", "probability"), classes, caption, numbers=(1,))
        against = [self.opposing] if self.opposing else []
        for keys, what in ((self.neighbours, f"shots for {self.label}"), (against, "strongest shot against it")):
            near = (
                (f"{key.contribution:.1e}", f"{key.affinity:.4f}", key.label, key.source, key.key_id) for key in keys
            )
            columns = ("contribution", "affinity", "label", "source", "key")
            shown += table(columns, near, what, numbers=(0, 1, 4)) if keys else ""
        return f"<div>{shown}</div>"


class Predictions:
    """Predictions as columns, in the order of their queries: a table, ``polars.DataFrame(predictions)``, and a list.

    ``columns`` have the names, the order and the types of :data:`PREDICTIONS`, those that are known; ``input`` is the
    name of a query, by default its number. A :class:`Prediction` is a view of a row, made where one is looked at. It is
    no list by its type, for libraries that take tables of Arrow would look at each prediction then.
    """

    def __init__(self, columns: pa.Table | None = None) -> None:
        self._columns = SCHEMA.empty_table() if columns is None else columns

    @classmethod
    def joined(cls, parts: Iterable[Predictions]) -> Predictions:
        """Those of consecutive queries to one index as one."""
        tables = [part.to_arrow() for part in parts]
        return cls(pa.concat_tables(tables) if tables else None)

    def named(self, inputs: pa.Array | pa.ChunkedArray) -> Predictions:
        """The same, with names of the queries."""
        return Predictions(self._columns.set_column(0, "input", inputs))

    @property
    def inputs(self) -> list[str]:
        """Names of the queries."""
        names: list[str] = self._columns["input"].to_pylist()
        return names

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    def __iter__(self) -> Iterator[Prediction]:
        for row in self.rows(self._columns.column_names[1:]):
            row["neighbours"] = [Neighbour(**neighbour) for neighbour in row["neighbours"]]
            row["opposing"] = Neighbour(**row["opposing"]) if row.get("opposing") else None
            yield Prediction(**{"logits": None} | row)

    @overload
    def __getitem__(self, place: int) -> Prediction: ...
    @overload
    def __getitem__(self, place: slice) -> Predictions: ...
    def __getitem__(self, place: int | slice) -> Prediction | Predictions:
        places = range(len(self))[place]
        if isinstance(places, int):
            return next(iter(Predictions(self._columns.slice(places, 1))))
        return Predictions(self._columns.take(pa.array(places, pa.int64())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Predictions | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        few = ", ".join(self._columns["label"][:SHOWN_LABELS].to_pylist())
        return f"Predictions({counted(len(self), 'prediction')}: {few}{' ...' if len(self) > SHOWN_LABELS else ''})"

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A dictionary of these columns a prediction; ``logits`` are an array ``[c]`` float32."""
        rows = rows_of(self._columns.select([column for column in columns if column != "logits"]))
        if "logits" not in columns or "logits" not in self._columns.column_names:
            yield from rows
            return
        logits = (row for chunk in self._columns["logits"].chunks if len(chunk) for row in _matrix(chunk))
        for row, own in zip(rows, logits, strict=True):
            yield row | {"logits": own}

    def withheld(self, abstain: Abstain) -> pa.ChunkedArray:
        """Whether each label is withheld ``[q]``: of a probability below ``abstain``, or by ``auto``.

        That is where it is unlike any shot, or more likely wrong than right.
        """
        low = pc.less(self._columns["probability"], MORE_LIKELY_WRONG if abstain == "auto" else abstain or 0.0)
        return (
            pc.or_(low, self._columns["unlike"])
            if abstain == "auto" and "unlike" in self._columns.column_names
            else low
        )

    def written(self, columns: Sequence[str], abstain: Abstain = None) -> pa.Table:
        """These columns as ``classify`` writes them: null where they are not known, and a label that is withheld."""
        table = self._columns
        if abstain is not None:
            label = pc.if_else(self.withheld(abstain), pa.scalar(None, pa.string()), table["label"])
            table = table.set_column(1, "label", label)
        for missing in set(columns) - set(table.column_names):
            table = table.append_column(missing, pa.nulls(len(table), PREDICTIONS[missing]))
        return table.select(list(columns))

    def to_arrow(self) -> pa.Table:
        """A row a prediction, with the columns and types of :data:`PREDICTIONS` that are known of them."""
        return self._columns

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Arrow's PyCapsule interface, which pandas, polars and duckdb read."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """A pandas data frame of :meth:`to_arrow`. Raises ImportError where pandas is not installed."""
        return self.to_arrow().to_pandas()

    def _repr_html_(self) -> str:
        """For notebooks: a row a prediction, the first :data:`SHOWN_PREDICTIONS`."""
        cut = f"; the first {SHOWN_PREDICTIONS}" if len(self) > SHOWN_PREDICTIONS else ""
        columns = ("query", "label", "probability", "text logit", "cache logit", "affinity", "strongest shot")
        rows = []
        for place, prediction in enumerate(self[:SHOWN_PREDICTIONS]):
            key = prediction.neighbours[0] if prediction.neighbours else None
            near = (f"{key.affinity:.4f}", f"{key.label} ({key.source})") if key else ("-", "-")
            figures = (
                shown_probability(prediction.probability),
                f"{prediction.text_logit:.4g}",
                f"{prediction.cache_logit:.4g}",
            )
            rows.append((place, prediction.label, *figures, *near))
        return table(columns, rows, counted(len(self), "prediction") + cut, numbers=(0, 2, 3, 4, 5))


@dataclass(frozen=True)
class Evidence:
    """The parts of the answer to one query: enough to weigh it anew, with another alpha, beta or k.

    ``feature`` ``[d]`` and ``text`` ``[c]``, its text logits, float32; of the ``m`` nearest keys, nearest first,
    ``key_ids``, ``class_ids`` int64 and ``affinities`` float32; ``counts`` ``[c]`` int64 and ``sums`` ``[c]`` float32:
    how many keys a class has, and the sum of the affinities to all of them. ``complete``: these are all keys.
    """

    feature: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]
    key_ids: npt.NDArray[np.int64]
    class_ids: npt.NDArray[np.int64]
    affinities: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]
    sums: npt.NDArray[np.float32]
    complete: bool


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of a table as dictionaries: as of its ``to_pylist``, which looks at each number of a list by itself."""
    for batch in table.to_batches(ROWS):
        for row in zip(*map(_values, batch.columns), strict=True):
            yield dict(zip(table.column_names, row, strict=True))


def _values(column: pa.Array) -> list[Any]:
    kind = column.type
    if column.null_count:
        return list(column.to_pylist())
    if pa.types.is_struct(kind) and kind.num_fields:
        names = [field.name for field in kind]
        return [dict(zip(names, row, strict=True)) for row in zip(*map(_values, column.flatten()), strict=True)]
    if pa.types.is_list(kind):
        values, ends = _values(column.flatten()), np.cumsum(column.value_lengths()).tolist()
        return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return list(column.to_numpy(zero_copy_only=False).tolist())
    return list(column.to_pylist())


def lists(values: npt.NDArray[Any] | pa.Array, m: int) -> pa.ListArray:
    """Values ``[q * m]``, or ``[q, m]``, as ``q`` lists of ``m``; of an array without a copy."""
    flat = values if isinstance(values, pa.Array) else pa.array(values.reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, m, dtype=np.int32)), flat)


def _matrix(column: pa.ListArray) -> npt.NDArray[np.float32]:
    """Lists of one length as an array ``[q, m]``, without a copy."""
    rows: npt.NDArray[np.float32] = column.flatten().to_numpy().reshape(len(column), -1)
    return rows


def read_predictions(path: Path) -> pa.Table:
    """Predictions that ``classify`` wrote, a row an input: Parquet, CSV or JSON lines, told apart by what is in them.

    The columns have the types of ``PREDICTIONS``; ``input`` and ``label`` are there, ``label`` may be null. Further
    columns stay; of JSON lines, those that are text, a number or a truth value in the first one.

    Raises InputError naming the file and what is wrong with it, also where it has more than ``MAX_ROWS`` rows.
    """
    name = one_line(str(path))
    try:
        with open_regular(path) as file:
            head = file.readline(MAX_LINE).removeprefix(b"\xef\xbb\xbf").lstrip()
            read = _parquet if head.startswith(b"PAR1") else _json if head.startswith(b"{") else _csv
            file.seek(0)
            table = read(pa.PythonFile(file), head)
        _check_columns(table.column_names, len(table))
        for column in ("input", "label"):
            if table.schema.field(column).type not in (pa.string(), pa.large_string(), pa.string_view()):
                raise ValueError(f"column {column!r} is {table.schema.field(column).type}, not text")
        table.validate(full=True)  # that text is UTF-8
        if table["input"].null_count:
            raise ValueError(f"row {np.flatnonzero(table['input'].is_null().to_numpy())[0]} has no input")
    except NotAFileError as error:
        raise InputError(f"{error}; {_REMEDY}") from None
    except FileNotFoundError:
        raise InputError(f"{name}: no such file; {_REMEDY}") from None
    except (OSError, ValueError, RecursionError, MemoryError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InputError(f"{name}: cannot be read as predictions ({reason}); {_REMEDY}") from None
    return table


def _check_columns(columns: Sequence[str], rows: int) -> None:
    if twice := [column for column, times in Counter(columns).items() if times > 1]:
        raise ValueError(f"column {twice[0]!r} stands twice")
    if missing := [column for column in ("input", "label") if column not in columns]:
        raise ValueError(f"no column {missing[0]!r}")
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{rows:,} rows, more than {MAX_ROWS:,}" if rows else "no rows")


def _parquet(raw: pa.NativeFile, _: bytes) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(raw) as file:
        _check_columns(file.schema_arrow.names, file.metadata.num_rows)  # before it takes the memory
        return file.read()


def _json(raw: pa.NativeFile, head: bytes) -> pa.Table:
    first: dict[str, Any] = json.loads(head)
    kinds = {key: PREDICTIONS.get(key, _SCALARS.get(type(value))) for key, value in first.items()}
    return _read_json(raw, {key: kind for key, kind in kinds.items() if kind is not None})


def _read_json(raw: pa.NativeFile | io.BytesIO, kinds: Mapping[str, pa.DataType]) -> pa.Table:
    """These columns of JSON lines; everything else is skipped, for Arrow overflows its stack on types nested deeply."""
    import pyarrow.json

    schema = pa.schema(list(kinds.items()))
    return pyarrow.json.read_json(
        raw,
        pyarrow.json.ReadOptions(block_size=MAX_LINE),
        pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )


def _csv(raw: pa.NativeFile, _: bytes) -> pa.Table:
    """A CSV file, in which lists are JSON."""
    import pyarrow.csv

    nested = {column: kind for column, kind in PREDICTIONS.items() if pa.types.is_nested(kind)}
    table = pyarrow.csv.read_csv(
        raw,
        pyarrow.csv.ReadOptions(block_size=MAX_LINE),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(
            column_types=PREDICTIONS | dict.fromkeys(nested, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
    _check_columns(table.column_names, len(table))
    for column in nested.keys() & set(table.column_names):
        cells = table[column].to_pylist()
        lines = "".join(f'{{"cell": {"null" if cell is None else cell}}}\n' for cell in cells)
        parsed = _read_json(io.BytesIO(lines.encode()), {"cell": nested[column]})
        if len(parsed) != len(table):  # a cell that closes its line and opens another
            raise ValueError(f"column {column!r} is not JSON")
        table = table.set_column(table.column_names.index(column), column, parsed["cell"])
    return table
