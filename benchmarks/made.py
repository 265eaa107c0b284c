"""Synthetic features for the benchmarks, whose cosines are similar to those of CLIP features.

The same seed always gives the same features. A feature is the sum of a part that all features have in common, a part
for each of the nested groups that contain its class (100 classes, 10 classes, and the class itself), and noise. Two
features have a cosine of about 0.75 if they belong to the same class, about 0.69 if they belong to neighbouring
classes, and 0.52 otherwise. The variance of a direction is inversely proportional to its rank. As a result, cosines
have a similar spread to those of real features, with a standard deviation of 0.07 within a class. Equal variances would
not achieve this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

COMMON, GROUP, SUBGROUP, CLASS, OWN = 0.52, 0.05, 0.12, 0.06, 0.25
BRANCH = 10
TEXT, TEXT_OWN = 0.3, 0.2
"""Cosines of the text weight of a class with the direction of the class from the mean of all classes, and with noise.

The rest of a text weight is common to all text weights.
"""

ROWS = 8192

Array = npt.NDArray[np.float32]


@dataclass
class Made:
    """Generator of features with norm 1, of shape ``[m, d]``, for ``c`` classes. Each class has a text weight."""

    c: int
    d: int
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        variance = 1 / np.arange(1, self.d + 1)
        self._scale = np.sqrt(variance / variance.sum()).astype(np.float32)

        def directions(number: int) -> Array:
            return rng.standard_normal((number, self.d), dtype=np.float32) * self._scale

        common = directions(1)
        ids = np.arange(self.c)
        self._centres = (COMMON**0.5 / np.linalg.norm(common)) * common
        for share, size in ((GROUP, BRANCH * BRANCH), (SUBGROUP, BRANCH), (CLASS, 1)):
            self._centres = self._centres + share**0.5 * directions(-(-self.c // size))[ids // size]
        apart = self._centres - self._centres.mean(axis=0)
        noise = rng.standard_normal((self.c + 1, self.d), dtype=np.float32)
        shared = (1 - TEXT**2 - TEXT_OWN**2) ** 0.5 * _unit(noise[:1])
        self.text = _unit(TEXT * _unit(apart) + shared + TEXT_OWN * _unit(noise[1:])).astype(
            np.float32
        )
        self._centres = self._centres.astype(np.float32)
        self.names = [f"class {i:06d}" for i in range(self.c)]  # in sorted order

    def draw(
        self, ids: npt.NDArray[np.int64], seed: int, dtype: npt.DTypeLike = np.float32
    ) -> npt.NDArray:
        """Draw one feature for each class id. The result has shape ``[m, d]``."""
        rng = np.random.default_rng([self.seed, seed])
        found = np.empty((len(ids), self.d), dtype=dtype)
        for start in range(0, len(ids), ROWS):
            part = ids[start : start + ROWS]
            rows = rng.standard_normal((len(part), self.d), dtype=np.float32)
            rows *= OWN**0.5 * self._scale
            rows += self._centres[part]
            found[start : start + ROWS] = _unit(rows)
        return found

    def classes(self, m: int, seed: int) -> npt.NDArray[np.int64]:
        """Draw the classes of ``m`` queries."""
        return np.random.default_rng([self.seed, seed]).integers(0, self.c, m)


def write_tables(folder: Path, made: Made, n: int, dtype: str = "float32") -> None:
    """Write ``n`` keys in blocks to ``table.parquet``, and the text weights to ``text.parquet``.

    The labels cycle through the classes, so that the keys of a class are not contiguous.
    """
    path = folder / "table.parquet"
    with pq.ParquetWriter(
        path, _schema(made.d, dtype), use_dictionary=["label"], compression="none"
    ) as writer:
        for start in range(0, n, ROWS):
            ids = np.arange(start, min(start + ROWS, n)) % made.c
            features = made.draw(ids, 10 + start // ROWS, dtype)
            writer.write_table(rows(features, [made.names[i] for i in ids], f"image {start} "))
    pq.write_table(rows(made.text.astype(dtype), made.names, "text "), folder / "text.parquet")


def rows(features: npt.NDArray, labels: Sequence[str], name: str = "row ") -> pa.Table:
    """Return a feature table whose ids start with ``name``."""
    schema = _schema(features.shape[1], str(features.dtype))
    values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    return pa.table([[f"{name}{i}" for i in range(len(labels))], labels, values], schema=schema)


def _schema(d: int, dtype: str) -> pa.Schema:
    value = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema([("id", pa.string()), ("label", pa.string()), ("feature", pa.list_(value, d))])


def _unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
