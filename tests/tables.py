"""Tables and features for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(
    path: Path,
    features: npt.ArrayLike,
    labels: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    **extra: object,
) -> Path:
    """Write a feature table."""
    rows = np.asarray(features, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    columns = {"id": ids or [f"item-{i}" for i in range(len(rows))]}
    columns |= ({} if labels is None else {"label": labels}) | {"feature": column} | extra
    pq.write_table(pa.table(columns), path)
    return path


def unit_rows(n: int, d: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return random features of norm 1."""
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return unit(rows)


def unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return the rows with norm 1."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def touch(folder: Path, *paths: str) -> None:
    """Make empty files, and the folders that they are in."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
