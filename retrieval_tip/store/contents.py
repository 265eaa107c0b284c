"""Read the data files of an index folder, and write them as the next version of the index."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.errors import StoreError
from retrieval_tip.store.files import read_array
from retrieval_tip.store.labels import read_curve, read_labels
from retrieval_tip.store.manifest import DataFile, Manifest
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.versions import Check, Origin, Versions, Writer

HELD = ("keys", "labels", "index", "text", "values", "curve", "metric", "points", "sums", "prior", "scores")
"""Kinds of data that have one file each. The file is rewritten only if the data changes."""
SEALED_AT_ONCE = 4
"""Number of files that are written and hashed at the same time."""


@dataclass(frozen=True)
class Contents:
    """The contents of a version's data files, as arrays or tensors.

    ``keys`` is a float32 or float16 array of shape ``[n, d]``, and ``labels`` has one row per key. ``text`` has shape
    ``[c, d]`` and ``values`` has shape ``[n, c]``; both are float32. A fitted index also has a ``metric``, the
    ``points`` of the keys under that metric, and the ``sums`` of the keys. ``prior`` is the scatter of other photos, of
    shape ``[d, d]``, and ``scores`` has a row for each held-out photo. A fine-tuned index also has the loss ``curve``.
    ``index`` is ``None`` for the type ``Flat``.
    :meth:`read` does not set it, because the caller opens the index with FAISS.
    """

    keys: npt.NDArray[np.floating]
    labels: pa.Table
    text: npt.NDArray[np.floating] | torch.Tensor
    values: npt.NDArray[np.floating] | torch.Tensor | None = None
    curve: pa.Table | None = None
    index: Any = None  # a :class:`vector_index.VectorIndex`, whose module is in a layer above
    metric: tip.Metric | None = None
    points: npt.NDArray[np.floating] | None = None
    sums: Sums | None = None
    prior: npt.NDArray[np.floating] | None = None
    scores: npt.NDArray[np.float64] | None = None

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Contents:
        """Read the data files of a version. The arrays are memory-mapped.

        Raises StoreError naming the file that cannot be read or does not match the manifest.
        """
        files, c, square = manifest.files, len(manifest.class_names), (manifest.d, manifest.d)
        keys, labels = _keys(folder, manifest)
        metric, points = None, None
        if "metric" in files:
            metric = metric_of(read_array(folder, files["metric"], (files["metric"].rows, manifest.d), (np.float32,)))
        if "points" in files and not manifest.later:
            points = read_array(folder, files["points"], (manifest.n, manifest.d))
        return cls(
            keys=keys,
            metric=metric,
            points=points,
            sums=_sums(folder, manifest, labels) if "sums" in files else None,
            prior=read_array(folder, files["prior"], square, (np.float32,)) if "prior" in files else None,
            scores=_scores(folder, files["scores"]) if "scores" in files else None,
            labels=labels,
            text=read_array(folder, files["text"], (c, manifest.d)),
            values=read_array(folder, files["values"], (manifest.n, c), (np.float32,)) if "values" in files else None,
            curve=read_curve(folder, files["curve"]) if "curve" in files else None,
        )

    def write(self, writer: Writer, stored: Stored | None) -> None:
        """Seal the files that are not shared with the parent version of the writer.

        ``stored`` is the version from which these contents were read. Raises StoreError if a file is damaged or cannot
        be written.
        """
        same = set[str]() if stored is None else stored.same(self, writer)
        writer.keep(*same)
        new = [kind for kind in HELD if kind not in writer.files and getattr(self, kind) is not None]
        check = None
        if stored is not None and stored.check.verify == "fast":  # copied damage must not get a valid digest
            known = {stored.manifest.files[kind] for kind in same}
            check = Check(stored.store.files, stored.manifest, known=known)
        with ThreadPoolExecutor(SEALED_AT_ONCE, thread_name_prefix="seal") as pool:
            list(pool.map(functools.partial(self._seal, writer), new))
        if check is not None:
            check.wait()

    def _seal(self, writer: Writer, kind: str) -> None:
        held = getattr(self, kind)
        if isinstance(held, pa.Table):
            writer.put_table(kind, held)
        elif kind == "index":
            staged = writer.stage(kind)
            held.save(staged)
            writer.seal(kind, staged, held.trained)
        else:
            writer.put_array(kind, array_of(held))


def array_of(held: npt.NDArray[np.floating] | torch.Tensor | tip.Metric | Sums) -> npt.NDArray[np.floating]:
    """Convert a part of the contents to the array that is stored in its file."""
    if isinstance(held, Sums):
        return held.to_array()
    if isinstance(held, tip.Metric):
        held = torch.cat([held.mean[None], held.transform if held.factor is None else held.factor])
    return np.asarray(held.cpu() if isinstance(held, torch.Tensor) else held)


def _scores(folder: Path, file: DataFile) -> npt.NDArray[np.float64]:
    return read_array(folder, file, (file.rows, 3), (np.float64,)).astype(np.float64, copy=False)


def _sums(folder: Path, manifest: Manifest, labels: pa.Table) -> Sums:
    """Read the sums of a version's keys, and check them against the labels."""
    file, c = manifest.files["sums"], len(manifest.class_names)
    array = read_array(folder, file, (c + manifest.d, 1 + manifest.d), (np.float64,))
    if not np.array_equal(array[:c, 0], np.bincount(labels["class_id"].to_numpy(), minlength=c)):
        raise StoreError(f"{folder / file.name}: does not match the keys; restore an earlier version or build again")
    return Sums.of_array(array.astype(np.float64, copy=False), c)


def metric_of(array: npt.NDArray[np.floating]) -> tip.Metric:
    """Convert a float32 array to a metric. Row 0 is the mean, the rest is the transform or, if shorter, its factor."""
    whole = torch.from_numpy(np.array(array))
    mean, rest = whole[0].clone(), whole[1:].clone()  # a pickle of a view would have the whole array
    return tip.Metric(mean, rest) if len(rest) == len(mean) else tip.Metric.of_factor(mean, rest)


@dataclass(frozen=True)
class Stored(Origin):
    """A version of an index folder, its check, and the contents of its files in memory."""

    store: Versions
    check: Check
    contents: Contents

    @classmethod
    def of(cls, store: Versions, check: Check, contents: Contents) -> Stored:
        """Record that the version checked by ``check`` has ``contents``, and set the path of the index."""
        if contents.index is not None:
            contents.index.path = store.folder / check.manifest.files["index"].name
        return cls(store, check.manifest, check, contents)

    def same(self, contents: Contents, writer: Writer) -> set[str]:
        """Return the kinds of ``contents`` that this version has a file of, if it is the parent of the next version."""
        parent, files = writer.parent, self.manifest.files
        if parent is None or parent.version != self.manifest.version or self.store.resolved != writer.store.resolved:
            return set()
        kinds = {kind for kind in HELD if kind in files and getattr(contents, kind) is not None}
        kinds = {kind for kind in kinds if getattr(contents, kind) is getattr(self.contents, kind)}
        index = contents.index
        if "index" in kinds and index is not None and index.path != self.store.folder / files["index"].name:
            kinds.discard("index")
        if self.manifest.later:
            kinds -= {"keys", "labels", "points", "index"}
        return kinds


def _keys(folder: Path, manifest: Manifest) -> tuple[npt.NDArray[np.floating], pa.Table]:
    """Read the keys and the labels. Format 7 may have several segments, which are sorted by class again."""
    labels = read_labels(folder, manifest)
    keys = [read_array(folder, part.keys, (part.keys.rows, manifest.d)) for part in manifest.segments]
    if {part.dtype for part in keys} != {np.dtype(manifest.dtype)}:
        raise StoreError(f"{folder}: some keys are not {manifest.dtype}; build the index again")
    if len(keys) == 1:
        return keys[0], labels
    order = np.argsort(labels["class_id"].to_numpy(), kind="stable")
    return np.concatenate(keys)[order], labels.take(pa.array(order))
