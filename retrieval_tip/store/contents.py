"""Read the data files of an index folder, and write them as the next version of the index."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.arrays import KeyArray
from retrieval_tip.errors import StoreError
from retrieval_tip.settings import Verify
from retrieval_tip.store.files import read_array
from retrieval_tip.store.labels import read_curve, read_labels
from retrieval_tip.store.manifest import SUFFIXES, Manifest
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.versions import Check, Origin, Versions, Writer

SEALED_AT_ONCE = 4
"""Number of files that are written and hashed at the same time."""
_HALF = (np.float32, np.float16)
_DTYPES = {"text": _HALF, "points": _HALF, "sums": (np.float64,), "scores": (np.float64,)}
"""The types of an array, by kind. The others are in float32."""

Contents = Mapping[str, Any]
"""The contents of a version's data files, by kind. Each kind has one file, which is rewritten only if the data changes.

``keys`` is a float32 or float16 array of shape ``[n, d]``, and ``labels`` has one row per key. ``text`` has shape
``[c, d]`` and ``values`` has shape ``[n, c]``; both are float32 arrays or tensors. A fitted index also has a
``metric``, the ``points`` of the keys under that metric, and the :class:`sums.Sums` of the keys. ``prior`` is the
scatter of other photos, of shape ``[d, d]``, and ``scores`` has a row for each held-out photo. A fine-tuned index also
has the loss ``curve``. ``index`` is a :class:`vector_index.VectorIndex`, unless the type is ``Flat``.
"""


def read(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Read the data files of a version, except the FAISS index. The arrays are memory-mapped."""
    files = manifest.files
    c = len(manifest.class_names)
    widths = {"values": c, "sums": 1 + manifest.d, "scores": 3}
    dtypes = _DTYPES | {"keys": (np.dtype(manifest.dtype),)}
    labels = read_labels(folder, manifest)
    contents: dict[str, Any] = {"labels": labels}
    for kind, file in files.items():
        if SUFFIXES[kind] == ".npy":
            shape = file.rows, widths.get(kind, manifest.d)
            contents[kind] = read_array(folder, file, shape, dtypes.get(kind, (np.float32,)))
    if "metric" in contents:
        contents["metric"] = metric_of(contents["metric"])
    if "sums" in contents:
        if not np.array_equal(
            contents["sums"][:c, 0], np.bincount(labels["class_id"].to_numpy(), minlength=c)
        ):
            name = folder / files["sums"].name
            raise StoreError(
                f"{name}: does not match the keys; restore an earlier version or build again"
            )
        contents["sums"] = Sums.of_array(contents["sums"], c)
    if "curve" in files:
        contents["curve"] = read_curve(folder, files["curve"])
    return contents


def write(contents: Contents, writer: Writer, stored: Stored | None) -> None:
    """Seal the files that are not shared with the parent version of the writer.

    ``stored`` is the version from which these contents were read. Raises StoreError if a file is damaged or cannot be
    written.
    """
    same = set[str]() if stored is None else stored.same(contents, writer)
    writer.keep(*same)
    check = None
    if (
        stored is not None
    ):  # files are mapped, so damage on the disk is copied, and must not get a valid digest
        verified = {stored.manifest.files[kind] for kind in same}
        verified |= {
            file
            for file in stored.manifest.data_files
            if not (stored.store.folder / file.name).exists()
        }
        check = Check(stored.store.files, stored.manifest, verified=verified)
    writer.begin()
    with ThreadPoolExecutor(SEALED_AT_ONCE, thread_name_prefix="seal") as pool:
        new = [kind for kind in contents if kind not in writer.files]
        list(pool.map(lambda kind: _seal(writer, kind, contents[kind]), new))
    if check is not None:
        check.wait()


def _seal(writer: Writer, kind: str, held: Any) -> None:
    if isinstance(held, pa.Table):
        writer.put_table(kind, held)
    elif kind == "index":
        staged = writer.stage(kind)
        held.save(staged)
        writer.seal(kind, staged, held.trained)
    else:
        writer.put_array(kind, array_of(held))


def array_of(held: KeyArray | torch.Tensor | tip.Metric | Sums) -> KeyArray:
    """Convert a part of the contents to the array that is stored in its file."""
    if isinstance(held, Sums):
        return held.to_array()
    if isinstance(held, tip.Metric):
        held = torch.cat([held.mean[None], held.transform if held.factor is None else held.factor])
    return np.asarray(held.cpu() if isinstance(held, torch.Tensor) else held)


def metric_of(array: KeyArray) -> tip.Metric:
    """Convert a float32 array to a metric. Row 0 is the mean, the rest is the transform or, if shorter, its factor."""
    whole = torch.from_numpy(np.array(array))
    mean, rest = (
        whole[0].clone(),
        whole[1:].clone(),
    )  # a pickle of a view would have the whole array
    return tip.Metric(mean, rest) if len(rest) == len(mean) else tip.Metric(mean, factor=rest)


@dataclass(frozen=True)
class Stored(Origin):
    """A version of an index folder, how it was verified, and the contents of its files in memory."""

    store: Versions
    verify: Verify
    contents: Contents

    def __post_init__(self) -> None:
        if "index" in self.contents:
            self.contents["index"].path = self.store.folder / self.manifest.files["index"].name

    def same(self, contents: Contents, writer: Writer) -> set[str]:
        """Return the kinds of ``contents`` that this version has a file of, if it is the parent of the next version."""
        parent = writer.parent
        files = self.manifest.files
        if (
            parent is None
            or parent.version != self.manifest.version
            or self.store.resolved != writer.store.resolved
        ):
            return set()
        kinds = {
            kind
            for kind in contents.keys() & files.keys()
            if contents[kind] is self.contents.get(kind)
        }
        if "index" in kinds and contents["index"].path != self.store.folder / files["index"].name:
            kinds.discard("index")
        return kinds
