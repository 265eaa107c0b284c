"""Read the data files of an index folder, and write them as the next version of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip import tip
from retrieval_tip.errors import StoreError
from retrieval_tip.files import real
from retrieval_tip.store.folder import Check, read_array, read_curve, read_labels
from retrieval_tip.store.manifest import DataFile, Manifest, Segment
from retrieval_tip.store.sums import Sums
from retrieval_tip.store.writer import Writer

HELD = ("text", "values", "curve", "metric", "points", "sums", "prior")
"""Kinds of data that have one file each. The file is rewritten only if the data changes."""


class SavedIndex(Protocol):
    """A FAISS index over ``indexed`` vectors, and the ``path`` of its file."""

    path: Path | None

    @property
    def indexed(self) -> int:
        """Number of vectors."""

    def save(self, path: Path) -> None:
        """Write the index to ``path``."""


@dataclass(frozen=True)
class Contents:
    """The contents of a version's data files, as arrays or tensors.

    ``segments`` are float32 or float16 arrays of keys, of shape ``[n_i, d]``. The ``index`` covers the first segment.
    ``labels`` has one row per key. ``text`` has shape ``[c, d]`` and ``values`` has shape ``[n, c]``; both are float32.
    A fitted index also has a ``metric``, the ``points`` of the first segment under that metric, and the ``sums`` of all
    keys. ``prior`` is the scatter of other photos, of shape ``[d, d]``. A fine-tuned index also has the loss
    ``curve``. :meth:`read` does not set ``index``, because the caller opens the index with FAISS.
    """

    segments: Sequence[npt.NDArray[np.floating]]
    labels: pa.Table
    text: npt.NDArray[np.floating] | torch.Tensor
    values: npt.NDArray[np.floating] | torch.Tensor | None = None
    curve: pa.Table | None = None
    index: SavedIndex | None = None
    metric: tip.Metric | None = None
    points: npt.NDArray[np.floating] | None = None
    sums: Sums | None = None
    prior: npt.NDArray[np.floating] | None = None

    @classmethod
    def read(cls, folder: Path, manifest: Manifest) -> Contents:
        """Read the data files of a version. The arrays are memory-mapped.

        Raises StoreError naming the file that cannot be read or does not match the manifest.
        """
        files, c, square = manifest.files, len(manifest.class_names), (manifest.d, manifest.d)
        segments = [read_array(folder, part.keys, (part.keys.rows, manifest.d)) for part in manifest.segments]
        if {part.dtype for part in segments} != {np.dtype(manifest.dtype)}:
            raise StoreError(f"{folder}: some keys are not {manifest.dtype}; build the index again")
        labels, metric = read_labels(folder, manifest), None
        if "metric" in files:
            metric = metric_of(read_array(folder, files["metric"], (manifest.d + 1, manifest.d), (np.float32,)))
        return cls(
            segments=segments,
            metric=metric,
            points=read_array(folder, files["points"], segments[0].shape) if "points" in files else None,
            sums=_sums(folder, manifest, labels) if "sums" in files else None,
            prior=read_array(folder, files["prior"], square, (np.float32,)) if "prior" in files else None,
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
        shared = stored if stored is not None and stored.is_before(writer) else None
        if stored is not None:
            stored.check_copied(self, shared=shared is not None)
        self._write_keys(writer, shared)
        if self.index is not None and shared is not None and shared.has_index(self.index):
            writer.keep("index")
        elif self.index is not None:
            staged = writer.stage("index")
            self.index.save(staged)
            writer.seal("index", staged, len(self.segments[0]))
        for kind in HELD:
            held = getattr(self, kind)
            if held is None:
                continue
            if shared is not None and getattr(shared.contents, kind, None) is held:
                writer.keep(kind)
            elif kind == "curve":
                writer.seal_table(kind, held)
            else:
                writer.seal_array(kind, array_of(held))

    def _write_keys(self, writer: Writer, shared: Stored | None) -> None:
        at = 0
        for number, part in enumerate(self.segments):
            segment, labels = None if shared is None else shared.segment_of(part), self.labels.slice(at, len(part))
            at += len(part)
            if number == 0:
                if segment is not None and shared is not None and segment == shared.manifest.segments[0]:
                    writer.keep("keys")
                    if shared.named:
                        writer.keep("labels")
                        continue
                if "keys" not in writer.files:
                    writer.seal_array("keys", part)
                writer.seal_table("labels", labels)
            elif segment is not None and shared is not None:
                writer.keep_later(segment, None if shared.named else labels)
            else:
                writer.seal_later(part, labels)


def array_of(held: npt.NDArray[np.floating] | torch.Tensor | tip.Metric | Sums) -> npt.NDArray[np.floating]:
    """Convert a part of the contents to the array that is stored in its file."""
    if isinstance(held, Sums):
        return held.to_array()
    whole = torch.cat([held.mean[None], held.transform]) if isinstance(held, tip.Metric) else held
    return np.asarray(whole.cpu() if isinstance(whole, torch.Tensor) else whole)


def _sums(folder: Path, manifest: Manifest, labels: pa.Table) -> Sums:
    """Read the sums of a version's keys, and check them against the labels."""
    file, c = manifest.files["sums"], len(manifest.class_names)
    array = read_array(folder, file, (c + manifest.d, 1 + manifest.d), (np.float64,))
    if not np.array_equal(array[:c, 0], np.bincount(labels["class_id"].to_numpy(), minlength=c)):
        raise StoreError(f"{folder / file.name}: does not match the keys; restore an earlier version or build again")
    return Sums.of_array(array.astype(np.float64, copy=False), c)


def metric_of(array: npt.NDArray[np.floating]) -> tip.Metric:
    """Convert a float32 array of shape ``[1 + d, d]`` to a metric. Row 0 is the mean, the rest is the transform."""
    whole = torch.from_numpy(np.array(array))
    return tip.Metric(whole[0].clone(), whole[1:])  # a pickle of a view would have the whole array


@dataclass(frozen=True)
class Stored:
    """A version of an index folder, together with the contents of its files in memory.

    ``contents`` is ``None`` if the contents are not known. ``named`` is true if the stored labels still use the current
    class names.
    """

    check: Check
    contents: Contents | None
    named: bool = True

    @classmethod
    def of(cls, check: Check, contents: Contents) -> Stored:
        """Record that the version checked by ``check`` has ``contents``, and set the path of the index."""
        if contents.index is not None:
            contents.index.path = check.folder / check.manifest.files["index"].name
        return cls(check, contents)

    @property
    def manifest(self) -> Manifest:
        """The manifest of this version."""
        return self.check.manifest

    def is_before(self, writer: Writer) -> bool:
        """Return whether this version is the parent of the version being written."""
        same = real(self.check.folder) == real(writer.folder)
        return same and writer.parent is not None and writer.parent.version == self.manifest.version

    def segment_of(self, array: npt.NDArray[np.floating]) -> Segment | None:
        """Return the segment whose keys are ``array``, or ``None`` if this version has no such segment."""
        if self.contents is None:
            return None
        pairs = zip(self.contents.segments, self.manifest.segments, strict=True)
        return next((segment for stored, segment in pairs if stored is array), None)

    def has_index(self, index: SavedIndex) -> bool:
        """Return whether a file of this version already contains ``index``."""
        file = self.manifest.files.get("index")
        return file is not None and index.path == self.check.folder / file.name

    def check_copied(self, contents: Contents, *, shared: bool) -> None:
        """Verify files before they are copied, so that damaged data does not get a valid digest.

        If ``shared`` is true, unchanged files are not copied, so they are not verified. Raises StoreError naming the
        file that is damaged.
        """
        if self.check.verify == "full":
            return
        known: set[DataFile] = set()
        if shared:
            files = self.manifest.files
            segments = [segment for part in contents.segments if (segment := self.segment_of(part)) is not None]
            known = {segment.keys for segment in segments} | {part.labels for part in segments if self.named}
            same = [kind for kind in HELD if getattr(contents, kind) is getattr(self.contents, kind, None)]
            known |= {files[kind] for kind in ("index", *same) if kind in files}
        Check(self.check.folder, self.manifest, known=known).wait()
