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

from retrieval_tip.errors import InputError, counted, first_line, one_line
from retrieval_tip.files import NotAFileError, open_regular
from retrieval_tip.html import table

if TYPE_CHECKING:
    from torch import Tensor

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
    "keys": pa.int64(),
    "unlike": pa.bool_(),
}
"""The columns that ``classify`` can write, with their types."""

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
EVEN = 0.5


def shown_probability(probability: float) -> str:
    """A probability for eyes: 1 is never said of what only rounds to it, nor 0."""
    if probability > 0.99995:  # float32 also rounds to 1 what is less
        return ">0.9999"
    return f"{probability:.1e}" if 0 < probability < 5e-4 else f"{probability:.4f}"


@dataclass(frozen=True)
class Neighbour:
    """A key near a query: what it is, its ``affinity``, and its ``weight`` ``w = exp(-beta (1 - affinity))``.

    ``gives``: what it adds to the cache ``C`` of each class in the prediction's ``labels``, ``w V``: its weight to its
    own class and 0 to others, or, where values were solved or trained, more or less to each, also below 0.
    """

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float
    gives: list[float]


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    ``label`` and ``probability`` (softmax of the blended logits / temperature) of the winner; ``labels`` and
    ``probabilities`` of the ``top`` classes; ``text_logit`` and ``cache_logit`` are the two parts of the winner's logit
    (the latter with alpha, so that they add up to it); ``logits`` ``[c]`` float32 in the index's order, ``None`` where
    the classes are so many that only a shortlist was compared, which the probabilities are then over; the nearest
    ``neighbours``. ``keys``: how many of the keys settled the answer, where it was certified. ``unlike``: whether the
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

    def withheld(self, abstain: Abstain) -> bool:
        """Whether the label is withheld: of a probability below ``abstain``, or by ``auto``.

        That is where it is unlike any shot, or more likely wrong than right.
        """
        if abstain == "auto":
            return bool(self.unlike) or self.probability < EVEN
        return abstain is not None and self.probability < abstain

    def _repr_html_(self) -> str:
        """For notebooks: the classes, the two parts of the winner's logit, and the neighbours."""
        classes = zip(self.labels, map(shown_probability, self.probabilities), strict=True)
        caption = f"text {self.text_logit:.4g} + cache {self.cache_logit:.4g}"
        near = (
            (f"{key.affinity:.4f}", f"{key.weight:.1e}", f"{key.gives[0]:.1e}", key.label, key.source, key.key_id)
            for key in self.neighbours
        )
        columns = ("affinity", "weight", f"gives to {self.label}", "label", "source", "key")
        neighbours = table(columns, near, "nearest keys", numbers=(0, 1, 2, 5)) if self.neighbours else ""
        return f"<div>{table(('class', 'probability'), classes, caption, numbers=(1,))}{neighbours}</div>"


class Predictions:
    """Predictions in the order of their queries, as of a list, and a table: ``polars.DataFrame(predictions)``.

    ``inputs`` are the names of the queries, by default their numbers. It is no list by its type, for libraries that
    take tables of Arrow would look at each prediction then.
    """

    def __init__(self, predictions: Iterable[Prediction] = (), inputs: Iterable[str] | None = None) -> None:
        self._all = list(predictions)
        self.inputs = [str(place) for place in range(len(self._all))] if inputs is None else list(inputs)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self._all)

    @overload
    def __getitem__(self, place: int) -> Prediction: ...
    @overload
    def __getitem__(self, place: slice) -> Predictions: ...
    def __getitem__(self, place: int | slice) -> Prediction | Predictions:
        return Predictions(self._all[place], self.inputs[place]) if isinstance(place, slice) else self._all[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Predictions | list) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        few = ", ".join(one.label for one in self._all[:SHOWN_LABELS])
        return f"Predictions({counted(len(self), 'prediction')}: {few}{' ...' if len(self) > SHOWN_LABELS else ''})"

    def to_arrow(self) -> pa.Table:
        """A row a prediction, with the columns and types of :data:`PREDICTIONS` that are known of them."""
        rows = [prediction_row(name, one, list(PREDICTIONS)) for name, one in zip(self.inputs, self, strict=True)]
        known = {"input", "label"} | {column for row in rows for column, value in row.items() if value is not None}
        schema = pa.schema([(column, kind) for column, kind in PREDICTIONS.items() if column in known])
        return pa.Table.from_pylist(rows, schema)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Arrow's PyCapsule interface, which pandas, polars and duckdb read."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """A pandas data frame of :meth:`to_arrow`. Raises ImportError where pandas is not installed."""
        return self.to_arrow().to_pandas()

    def _repr_html_(self) -> str:
        """For notebooks: a row a prediction, the first :data:`SHOWN_PREDICTIONS`."""
        cut = f"; the first {SHOWN_PREDICTIONS}" if len(self) > SHOWN_PREDICTIONS else ""
        columns = ("query", "label", "probability", "text logit", "cache logit", "affinity", "nearest key")
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


@dataclass(frozen=True)
class Certified:
    """Logits whose winners are those over all keys, by :meth:`CacheModel.certified`.

    ``text`` and ``cache`` ``[q, c]`` as :meth:`CacheModel.terms` gives them; ``keys`` ``[q]`` int64, how many of the
    nearest keys settled each query, ``n`` where it took all. After exact search that is proof; after approximate search
    it is evidence, and the winners agree with those over all keys as far as was looked.
    """

    text: Tensor
    cache: Tensor
    keys: Tensor


def prediction_row(
    name: str, prediction: Prediction, columns: Sequence[str], abstain: Abstain = None
) -> dict[str, Any]:
    """A prediction as ``classify`` writes it, of these columns; withheld, it has no label."""
    row = vars(prediction) | {
        "input": name,
        "label": None if prediction.withheld(abstain) else prediction.label,
        "logits": prediction.logits.tolist() if "logits" in columns and prediction.logits is not None else None,
        "neighbours": [vars(neighbour) for neighbour in prediction.neighbours],
    }
    return {column: row[column] for column in columns}


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
