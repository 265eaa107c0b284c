"""Predictions as objects, and as Arrow columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.arrays import FloatArray
from retrieval_tip.wording import counted, one_line

_NEIGHBOUR = {
    "key_id": pa.int64(),
    "source": pa.string(),
    "label": pa.string(),
    "affinity": pa.float64(),
    "weight": pa.float64(),
    "gives": pa.list_(pa.float64()),
}
SIMILAR = pa.struct([("input", pa.string()), ("label", pa.string()), ("gives", pa.float64())])
PREDICTIONS = {
    "input": pa.string(),
    "label": pa.string(),
    "level": pa.string(),
    "probability": pa.float64(),
    "labels": pa.list_(pa.string()),
    "probabilities": pa.list_(pa.float64()),
    "set": pa.list_(pa.string()),
    "logits": pa.list_(pa.float32()),
    "text_logit": pa.float64(),
    "cache_logit": pa.float64(),
    "discriminant_logit": pa.float64(),
    "neighbours": pa.list_(pa.struct(list(_NEIGHBOUR.items()))),
    "opposing": pa.struct(list(_NEIGHBOUR.items())),
    "no_match": pa.bool_(),
    "shot": pa.bool_(),
    "group": pa.int64(),
    "similar": pa.list_(SIMILAR),
}
"""The columns that ``classify`` can write, and their types."""
SCHEMA = pa.schema(list(PREDICTIONS.items()))
ROWS = 1024
"""Number of rows that are converted to objects at a time."""

SHOWN_LABELS = 8

Abstain = float | Literal["auto"] | None
"""Probability below which an answer is withheld. ``auto`` means 0.5, and also withholds answers without a match."""
MORE_LIKELY_WRONG = 0.5


def shown_probability(probability: float) -> str:
    """Format a probability. The result is never rounded to 0 or 1."""
    if probability > 0.99995:  # larger values would be rounded to 1
        return ">0.9999"
    return f"{probability:.1e}" if 0 < probability < 5e-4 else f"{probability:.4f}"


@dataclass(frozen=True)
class Neighbour:
    """A shot that contributed to an answer.

    ``affinity`` is its similarity to the query. ``weight`` is ``w = exp(-beta (1 - affinity))``. ``gives`` holds its
    contribution ``w V`` to the cache logit of each class in the ``labels`` of the prediction. Contributions may be
    negative if the values were fitted.
    """

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float
    gives: list[float]

    @property
    def contribution(self) -> float:
        """The contribution to the winning class. It is negative if the shot counts against the answer."""
        return self.gives[0]


class SimilarShot(NamedTuple):
    """A shot that is similar to a query. ``affinity`` is their similarity in the metric of the index."""

    key_id: int
    source: str
    label: str
    affinity: float


@dataclass(frozen=True, repr=False)
class Prediction:
    """The answer to a single query. Each row of :class:`Predictions` is a prediction.

    Attributes:
        label: the most probable class.
        probability: the probability of that class, ``softmax(logits / temperature)``.
        labels: the ``top`` classes, most probable first.
        probabilities: the probabilities of ``labels``.
        text_logit: the text term of the winning logit.
        cache_logit: the cache term of the winning logit, multiplied by alpha.
        discriminant_logit: the discriminant of the winning class, multiplied by alpha and gamma. ``None`` if gamma
            is 0. The three terms add up to the logit.
        logits: the logits of all classes, as a float32 array of shape ``[c]``.
        neighbours: the shots that contributed most to the answer, largest contribution first.
        no_match: whether the query does not resemble any shot: its largest cache logit for a class with shots is below
            the ``least_cache`` of the index. ``None`` if the index has no such setting.
        shot: whether the query is a shot of the index, which was then classified without itself (see
            :func:`held_out.answered`). ``None`` if this is not known, for example of an array of features.
        opposing: the shot with the most negative contribution. If no contribution is negative, it is the shot that
            contributes most to the runner-up. ``None`` if no shot counts against the answer.
        group: the number of the group of similar photos without a match (see :func:`groups.group_no_match`).
        level: the level of ``label`` if the question had ``at_least``. The label is then a class or a group of classes,
            whose ``probability`` is the sum of theirs, or ``None``.
        set: the classes in the set if the question had ``coverage``, most probable first. It can be empty, and is
            ``None`` without a match. The coverage is a mean over many queries, and promises nothing for this one.
        similar: if the answer was smoothed (see :mod:`labelling.smoothing`), what the photo itself and then similar
            photos give to the probability of the first of ``labels``, and the label that each photo has alone.
    """

    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]
    text_logit: float
    cache_logit: float
    logits: FloatArray | None = field(compare=False)
    neighbours: list[Neighbour]
    no_match: bool | None = None
    shot: bool | None = None
    opposing: Neighbour | None = None
    discriminant_logit: float | None = None
    group: int | None = None
    level: str | None = None
    set: list[str] | None = None
    similar: list[dict[str, Any]] | None = None

    def __repr__(self) -> str:
        chances = list(map(shown_probability, self.probabilities))
        others = zip(self.labels[1:SHOWN_LABELS], chances[1:], strict=False)
        parts = [f"{self.label}, {shown_probability(self.probability)}"]
        parts.append(", ".join(f"{label} {chance}" for label, chance in others))
        if self.no_match:
            parts.append("no match")
        if self.neighbours:
            parts.append(f"strongest shot {self.neighbours[0].source}")
        return one_line(f"Prediction({'; '.join(filter(None, parts))})")


class Predictions:
    """A table of predictions, in the order of the queries. You can also index and iterate over it like a list.

    You can pass it to any library that reads Arrow, for example ``polars.DataFrame(predictions)``. The columns are
    listed in :data:`PREDICTIONS`. Columns that do not apply to the index are omitted. The column ``input`` holds the
    query names, which default to the row numbers.
    """

    def __init__(self, columns: pa.Table | None = None) -> None:
        self._columns = SCHEMA.empty_table() if columns is None else columns

    @classmethod
    def joined(cls, parts: Iterable[Predictions]) -> Predictions:
        """Concatenate the predictions for consecutive queries."""
        tables = [part.to_arrow() for part in parts]
        return cls(pa.concat_tables(tables) if tables else None)

    def named(self, inputs: pa.Array | pa.ChunkedArray) -> Predictions:
        """Return the same predictions with new query names."""
        return Predictions(self._columns.set_column(0, "input", inputs))

    @property
    def positions(self) -> pa.ChunkedArray:
        """The positions of the queries, before they were ``named``."""
        return self._columns["input"].cast(pa.int64())

    def in_order(self) -> Predictions:
        """Return the predictions in the order of their positions."""
        return Predictions(self._columns.take(pc.sort_indices(self.positions)))

    @property
    def inputs(self) -> list[str]:
        """The names of the queries."""
        names: list[str] = self._columns["input"].to_pylist()
        return names

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    def __iter__(self) -> Iterator[Prediction]:
        for row in self.rows():
            del row["input"]
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

    __hash__ = None  # type: ignore[assignment]  # a list is not hashable either

    def __repr__(self) -> str:
        shown = counted(len(self), "prediction")
        if len(self):
            labels = self._columns["label"][:SHOWN_LABELS].to_pylist()
            shown += f": {', '.join(map(str, labels))}"
        if len(self) > SHOWN_LABELS:
            shown += " ..."
        return one_line(f"Predictions({shown})")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the columns of each prediction as a dictionary. The value of ``logits`` is a float32 array."""
        plain = [name for name in self._columns.column_names if name != "logits"]
        for batch in self._columns.to_batches(ROWS):
            rows: list[dict[str, Any]] = batch.select(plain).to_pylist()
            if "logits" in batch.schema.names and rows:
                logits = batch["logits"].flatten().to_numpy().reshape(len(rows), -1)
                rows = [row | {"logits": values} for row, values in zip(rows, logits, strict=True)]
            yield from rows

    def withheld(self, abstain: Abstain) -> pa.ChunkedArray:
        """Return whether each label is withheld because its probability is below ``abstain``.

        See :data:`Abstain` for ``auto``.
        """
        auto = abstain == "auto"
        low = pc.less(self._columns["probability"], MORE_LIKELY_WRONG if auto else abstain or 0.0)
        return pc.or_(low, self._columns["no_match"].fill_null(False)) if auto else low

    def written(self, columns: Sequence[str], abstain: Abstain = None) -> pa.Table:
        """Return the given columns as ``classify`` writes them. Unknown values and withheld labels are null."""
        table = self._columns
        if abstain is not None:
            label = pc.if_else(self.withheld(abstain), pa.scalar(None, pa.string()), table["label"])
            table = table.set_column(1, "label", label)
        for missing in set(columns) - set(table.column_names):
            table = table.append_column(missing, pa.nulls(len(table), PREDICTIONS[missing]))
        return table.select(list(columns))

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table that has one row per prediction. Its columns are described in :data:`PREDICTIONS`."""
        return self._columns

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Export the table to pandas, polars or duckdb through the Arrow PyCapsule interface."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """Return the predictions as a pandas DataFrame. Raises ImportError if pandas is not installed."""
        return self.to_arrow().to_pandas()


def lists(values: npt.NDArray[Any] | pa.Array, m: int) -> pa.ListArray:
    """Convert values to an Arrow column of lists that have ``m`` items each. An array is not copied."""
    flat = values if isinstance(values, pa.Array) else pa.array(values.reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, m, dtype=np.int32)), flat)
