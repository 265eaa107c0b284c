"""The classifier whose keys lie in an index folder: it is loaded, saved, and changed by what it adds and removes."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from retrieval_tip.backbones.open_clip import Identity, resolve_device
from retrieval_tip.classifier import Classifier, spread
from retrieval_tip.errors import InputError, StoreError, UsageError, first_line
from retrieval_tip.files import real
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.defaults import Statistics, measure
from retrieval_tip.retrieval.inputs import Features, Labels
from retrieval_tip.retrieval.keys import KEY_BLOCK, QUERY_BLOCK, Keys, beside, index_over, text_index_over
from retrieval_tip.retrieval.logits import SHORTLIST, IndexRetrieval, slices
from retrieval_tip.retrieval.segments import Segments, joined, segments_of
from retrieval_tip.retrieval.vector_index import VectorIndex, auto_factory
from retrieval_tip.store import folder as store
from retrieval_tip.store.labels import LABEL_SCHEMA, label_table, shots_after
from retrieval_tip.store.manifest import DataFile, Manifest, Segment

ALPHA, BETA, LOGIT_SCALE = 1.0, 5.5, 100.0
"""The paper's defaults (its code's, for ImageNet) and the temperature of OpenAI's CLIP."""

SMALL = 4096
"""Keys up to which a segment is not worth keeping apart: it is written again together with what is added."""


@dataclass
class CacheModel(Classifier):
    """Tip-Adapter's cache as a searchable index. Make one with :meth:`from_features` or :meth:`load`.

    ``keys`` ``[n, d]`` float32 or float16, grouped by class, or segments that each are (keys that were added since the
    ``index`` was built over the first of them); ``labels`` describes them, row by row; ``text_weights`` ``[c, d]``
    float32. ``alpha``, ``beta``, ``k`` (``None`` is all) and ``tail`` are the settings kept with an index;
    ``temperature`` divides the logits where they become probabilities, and nowhere else; ``precision`` is that of the
    products with all keys (:class:`keys.Keys`); ``text_index`` finds the text weights near a query, where the classes
    are so many that not even these are all met. ``class_ids`` ``[n]`` int64, on the device, repeats what ``labels``
    say.

    A fine-tuned cache may have more: ``values`` ``[n, c]`` float32, on the device, what each key gives to each class in
    place of 1 to its own (:class:`tip.Values`); ``tuned``, the safetensors file of the fine-tuned encoder that the
    features come from; ``curve``, the loss curve of the training, a row an epoch.

    ``folder`` and ``version`` say which version of which index folder this is, ``next_key_id`` from where on key ids
    were never given.

    Change ``values``, or ``keys`` and the ``index`` over them, of a copy, with :func:`dataclasses.replace`, never in
    their place. Raises InputError for values of another shape or a curve without rows.
    """

    keys: npt.NDArray[Any] | Segments
    labels: pa.Table
    class_names: list[str]
    text_weights: Tensor
    index: VectorIndex
    alpha: float = ALPHA
    beta: float = BETA
    logit_scale: float = LOGIT_SCALE
    k: int | None = None
    tail: bool = True
    temperature: float = 1.0
    templates: list[str] = field(default_factory=list)
    backbone: Identity | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    version: int | None = None
    values: Tensor | None = None
    tuned: Path | None = None
    curve: pa.Table | None = None
    precision: str = "float32"
    text_index: VectorIndex | None = None
    folder: Path | None = None
    next_key_id: int | None = None

    def __post_init__(self) -> None:
        inputs.check_settings(self.alpha, self.beta, self.k, self.logit_scale, self.temperature)
        self._check: store.Check | None = None
        self._own: dict[str, Any] = {}
        self._stored: list[tuple[npt.NDArray[Any], Segment]] = []
        self.text_weights = self.text_weights.to(self.device)
        self._follow()
        if self.values is not None:
            inputs.check_shape("values", self.values.shape, (self.n, len(self.class_names)), "one row a key")
            self.values = self.values.detach().to(self.device, torch.float32)
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; give one an epoch, or None")

    def _follow(self) -> None:
        """Bring up to date what follows from the keys, their labels, the classes and the text weights."""
        class_ids = self.labels["class_id"].to_numpy().astype(np.int64)
        c, (base, *late) = len(self.class_names), segments_of(self.keys)
        if not self.index.by_class and self.index.indexed != len(base):
            raise InputError(f"index: is over {self.index.indexed} vectors, the first segment has {len(base)} keys")
        if late or (self.index.by_class and self.index.indexed < c):
            counts = np.bincount(class_ids[: len(base)], minlength=c)
            self.index = beside(self.index, late, class_ids[len(base) :], counts)
        if self.text_index is not None and self.text_index.indexed < c:
            at, weights = self.text_index.indexed, self.text_weights
            self.text_index = self.text_index.plus(np.arange(at, c), lambda: weights[at:].cpu().numpy())
        means = self.index.vectors if self.index.by_class and self.index.exact_affinity else None
        self._keys = Keys(self.keys, class_ids, c, self.device, self.precision, means)
        self.class_ids = self._keys.class_ids
        if self.next_key_id is None:
            self.next_key_id = int(pc.max(self.labels["key_id"]).as_py()) + 1

    __repr__ = Classifier.__repr__  # not the dataclass's

    @property
    def retrieval(self) -> IndexRetrieval:
        """What finds the keys, with the settings as they are now."""
        return IndexRetrieval(
            keys=self._keys,
            index=self.index,
            text_weights=self.text_weights,
            text_index=self.text_index,
            values=self.values,
            alpha=self.alpha,
            beta=self.beta,
            logit_scale=self.logit_scale,
        )

    @property
    def n(self) -> int:
        """Number of keys."""
        return int(self.keys.shape[0])

    @property
    def d(self) -> int:
        """Length of a feature."""
        return int(self.keys.shape[1])

    @property
    def dtype(self) -> str:
        """Of the stored keys: float32 or float16."""
        return str(self.keys.dtype)

    @property
    def index_type(self) -> str:
        """Factory of the index over the keys."""
        return self.index.factory

    @property
    def exact_search(self) -> bool:
        """Whether the nearest keys are always found."""
        return self.index.exact_search

    @property
    def place(self) -> str | None:
        """Folder that this was loaded from or saved to."""
        return None if self.folder is None else str(self.folder)

    @property
    def manifest(self) -> Manifest | None:
        """That of the version that this was loaded from or saved as."""
        return None if self._check is None else self._check.manifest

    @property
    def segments(self) -> int:
        """Number of segments of the keys; the index is over the first one."""
        return len(segments_of(self.keys))

    def whole(self) -> CacheModel:
        """The same classifier with all keys in one segment; itself, where they are."""
        return self if self.segments == 1 else self.take(self._order())

    @classmethod
    def from_features(
        cls,
        keys: Features,
        labels: Labels,
        class_names: Sequence[str],
        text_weights: Features | None = None,
        *,
        alpha: float = ALPHA,
        beta: float = BETA,
        logit_scale: float = LOGIT_SCALE,
        index: str = "Flat",
        device: str = "auto",
        sources: Sequence[str] | None = None,
        values: Features | None = None,
        precision: str = "float32",
    ) -> Self:
        """A classifier from features that are already at hand.

        Args:
            keys: ``[n, d]`` floating-point features of the shots. They are not normalised here: give unit vectors,
                unless they were fine-tuned.
            labels: class of each key, as a name or as a position in ``class_names``.
            class_names: the ``c`` classes in order; a class may have no key.
            text_weights: ``[c, d]`` unit vectors; ``None`` leaves the decision to the cache alone.
            alpha: residual ratio, how much the cache counts beside the text (paper, equation 6).
            beta: sharpness of the exponential (paper, equation 4).
            logit_scale: the backbone's temperature factor.
            index: FAISS factory string: ``Flat``, ``IVF256,Flat``, ``HNSW32``, ``SQfp16`` ...; ``Classes`` for whole
                classes; ``auto`` by :func:`vector_index.auto_factory`, which sets ``k`` too.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            sources: path or id of each key, for explanations.
            values: ``[n, c]`` what each key gives to each class, trained; ``None`` is 1 to its own class.
            precision: of the products with all keys: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (measured).

        Raises:
            InputError: shapes that do not fit, values that are not finite, labels that are no class.
            UsageError: alpha, beta, device, index or precision that cannot work.
        """
        matrix = inputs.matrix(keys, "keys")
        names = inputs.names(class_names)
        ids = inputs.ids_of(labels, names, len(matrix))
        device = resolve_device(device)
        if sources is not None and len(sources) != len(ids):
            raise InputError(f"sources: {len(sources)} for {len(ids)} keys")
        order = np.argsort(ids, kind="stable")
        table = label_table(names, ids[order], None if sources is None else [sources[i] for i in order], key_ids=order)
        ordered = np.ascontiguousarray(matrix[order])
        factory, k = auto_factory(len(ids), len(names)) if index == "auto" else (index, None)
        weights = inputs.text_weights(text_weights, len(names), matrix.shape[1])
        return cls(
            keys=ordered,
            labels=table,
            class_names=names,
            text_weights=weights,
            index=index_over(ordered, ids[order], len(names), factory, device),
            text_index=text_index_over(weights.numpy(), factory, device),
            alpha=alpha,
            beta=beta,
            logit_scale=logit_scale,
            k=k,
            device=device,
            values=None if values is None else inputs.values_of(values, len(ids), len(names))[order],
            precision=precision,
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: str = "auto",
        precision: str = "auto",
        verify: str = "full",
        check: store.Check | None = None,
        version: int | None = None,
    ) -> Self:
        """Open the current version of an index folder, or an earlier ``version``; its files are checked first.

        ``precision`` is that of the products with all keys, by default the fastest that is accurate enough here
        (:meth:`keys.Keys.products`); ``float32`` answers the same everywhere. ``verify`` ``full`` compares every file
        with its digest, ``fast`` large ones with their size only; ``check`` is that check where it was begun before,
        and its version is opened. Keys and values stay on disk, memory-mapped. Where a writer gives up the version
        meanwhile, the one that is current then is opened. Raises StoreError naming the file that is missing, damaged,
        does not fit the manifest, or is of a newer format.
        """
        place, device = Path(folder), resolve_device(device)
        if version is None:
            cache, check = store.opened(
                place, lambda manifest: cls._open(place, manifest, device, precision), verify=verify, check=check
            )
        else:
            check = store.Check(place, store.read_version(place, version), verify)
            check.wait()
            cache = cls._open(place, check.manifest, device, precision)
        cache._remember(check)
        return cache

    @classmethod
    def _open(cls, place: Path, manifest: Manifest, device: str, precision: str) -> Self:
        files, classes = manifest.files, len(manifest.class_names)
        parts = [store.read_array(place, part.keys, (part.keys.rows, manifest.d)) for part in manifest.segments]
        if {part.dtype for part in parts} != {np.dtype(manifest.dtype)}:
            raise StoreError(f"{place}: keys are not all {manifest.dtype}; build the index again")
        text = store.read_array(place, files["text"], (classes, manifest.d))
        values = (
            torch.from_numpy(store.read_array(place, files["values"], (manifest.n, classes), (np.float32,)))
            if "values" in files
            else None
        )
        labels = store.read_labels(place, manifest)
        index = VectorIndex.load(
            place / files["index"].name, manifest.index, device, manifest.dtype == np.dtype(np.float16)
        )
        if index.d != manifest.d or not (
            index.indexed <= classes if index.by_class else index.indexed == files["keys"].rows
        ):
            raise StoreError(f"{place / files['index'].name}: does not fit the manifest; build the index again")
        text_index = None
        if "text_index" in files:
            text_index = VectorIndex.load(place / files["text_index"].name, manifest.index, device)
        return cls(
            keys=joined(parts),
            labels=labels,
            class_names=manifest.class_names,
            text_weights=torch.from_numpy(text),
            index=index,
            alpha=manifest.alpha,
            beta=manifest.beta,
            logit_scale=manifest.logit_scale,
            k=manifest.k,
            tail=manifest.tail,
            temperature=manifest.temperature,
            templates=manifest.templates,
            backbone=Identity.from_dict(manifest.backbone) if manifest.backbone else None,
            provenance=manifest.provenance,
            device=device,
            version=manifest.version,
            values=values,
            tuned=store.find_weights(place, files["weights"]) if "weights" in files else None,
            curve=store.read_curve(place, files["curve"]) if "curve" in files else None,
            precision=precision,
            text_index=text_index,
            folder=place,
            next_key_id=manifest.next_key_id,
        )

    def reload(self) -> CacheModel:
        """The current version of the folder that this was loaded from or saved to; itself, where this is that.

        Files that both versions share are not hashed again. Settings that were changed here, but not saved, are not
        taken over. Raises StoreError as :meth:`load`, UsageError where there is no folder.
        """
        if self.folder is None or self._check is None:
            raise UsageError("reload: this classifier was neither loaded from a folder nor saved to one")
        manifest = store.read_manifest(self.folder)
        if manifest == self._check.manifest:
            return self
        check = store.Check(self.folder, manifest, self._check.verify, set(self._check.manifest.data_files))
        return type(self).load(self.folder, device=self.device, precision=self.precision, check=check)

    def save(self, folder: str | os.PathLike[str], change: str = "save") -> None:
        """Write a new version of an index folder (the first one, where there is none). See :func:`store.write`.

        Files of the version that this was loaded from are shared, not written again. ``change`` is what its history
        says of it. Raises StoreError where the folder cannot be written, has changed since this was loaded from it, or
        ``tuned`` is no safetensors file; InputError for what a version cannot hold. After either nothing was changed.
        """
        with store.write(Path(folder)) as writer:
            if writer.parent is not None and self._same(writer.folder):
                self._check_current(writer)
            self.commit(writer, change)

    def save_settings(self, folder: str | os.PathLike[str], change: str = "change settings") -> None:
        """Write alpha, beta, k, tail, temperature and provenance as a new version of the folder this was loaded from.

        No data file is written again: all are that version's. Raises StoreError where the index has changed since it
        was loaded.
        """
        with store.write(Path(folder)) as writer:
            self._check_current(writer)
            writer.keep_all()
            self._check = self._commit(writer, change)  # what the files hold is what they held

    def _check_current(self, writer: store.Writer) -> None:
        """Raise StoreError unless the current version is the one that this was loaded from."""
        found = writer.parent.version if writer.parent else None
        if found is None or found != self.version:
            raise StoreError(
                f"{writer.folder}: is at version {found}, not at {self.version} as when it was opened; try again"
            )

    def _same(self, folder: Path) -> bool:
        return None not in (self.folder, self.version) and real(self.folder or "") == real(folder)

    def commit(self, writer: store.Writer, change: str) -> None:
        """Write what the version before does not have, and make this the current version.

        ``change`` says in a few words what it is. Keys that the writer has already are not written again; ``tuned`` is
        copied, by content, and is the copy from then on. Errors as for :meth:`save`.
        """
        parent = writer.parent if self._same(writer.folder) else None
        parent = parent if parent is not None and parent.version == self.version else None
        self._check_copied(shared=parent is not None)
        if parent is None:
            self._own, self._stored = {}, []
        self._commit_keys(writer, parent)
        for kind, index in (("index", self.index), ("text_index", self.text_index)):
            if index is None:
                continue
            if parent is not None and kind in parent.files and index.path == writer.folder / parent.files[kind].name:
                writer.keep(kind)
            else:
                self._seal_index(writer, kind, index)
        if self._own.get("text") is self.text_weights:
            writer.keep("text")
        else:
            writer.seal_array("text", self.text_weights.cpu().numpy())
        if self.values is not None and self._own.get("values") is self.values:
            writer.keep("values")
        elif self.values is not None:
            writer.seal_array("values", self.values.cpu().numpy())
        if self.tuned is not None:
            self.tuned = writer.seal_weights(self.tuned)
        if self.curve is not None and self._own.get("curve") is self.curve:
            writer.keep("curve")
        elif self.curve is not None:
            writer.seal_table("curve", self.curve)
        self._remember(self._commit(writer, change))

    def _check_copied(self, shared: bool) -> None:
        """Check in full what is copied from a version that was not: else damage gets a digest that fits it.

        ``shared`` says whether files are shared with that version. Raises StoreError naming the file that is damaged.
        """
        if self._check is None or self._check.verify == "full":
            return
        known: set[DataFile] = set()
        if shared:
            files, kept = self._check.manifest.files, set(map(id, segments_of(self.keys)))
            parts = [segment for array, segment in self._stored if id(array) in kept]
            known = {file for part in parts for file in (part.keys, part.labels)}
            same = [kind for kind, found in self._held().items() if self._own.get(kind) is found]
            known |= {files[kind] for kind in ("index", "text_index", "weights", *same) if kind in files}
        store.Check(self._check.folder, self._check.manifest, known=known).wait()

    def _held(self) -> dict[str, Any]:
        """What data files hold as it is, by kind, but for the keys and their labels."""
        return {"text": self.text_weights, "values": self.values, "curve": self.curve}

    def _commit_keys(self, writer: store.Writer, parent: Manifest | None) -> None:
        """Keys and labels, a segment at a time, but for those that are there."""
        stored = {id(array): segment for array, segment in self._stored}
        at = 0
        for number, part in enumerate(segments_of(self.keys)):
            found, labels = stored.get(id(part)), self.labels.slice(at, len(part))
            at += len(part)
            if number == 0:
                if found is not None and parent is not None and found == parent.segments[0]:
                    writer.keep("keys")
                    writer.keep("labels")
                    continue
                if "keys" not in writer.files:
                    writer.seal_array("keys", part)
                writer.seal_table("labels", labels)
            elif found is not None:
                writer.keep_later(found)
            else:
                writer.seal_later(part, labels)

    def _seal_index(self, writer: store.Writer, kind: str, index: VectorIndex) -> None:
        staged = writer.stage(kind)
        index.save(staged)
        writer.seal(kind, staged, len(segments_of(self.keys)[0]) if kind == "index" else index.indexed)

    def _commit(self, writer: store.Writer, change: str) -> store.Check:
        """Write the manifest that makes this the current version. Returns a check that has nothing left to look at.

        Raises as :meth:`classifier.Classifier.check_answers`.
        """
        self.check_answers()
        parent = writer.parent.version if writer.parent else None
        manifest = Manifest(
            version=(parent or 0) + 1,
            parent=parent,
            **store.stamp(),
            n=self.n,
            d=self.d,
            dtype=str(self.keys.dtype),
            class_names=self.class_names,
            templates=self.templates,
            logit_scale=float(self.logit_scale),
            alpha=float(self.alpha),
            beta=float(self.beta),
            k=self.k,
            tail=self.tail,
            temperature=float(self.temperature),
            index=self.index.factory,
            backbone=self.backbone.to_dict() if self.backbone else None,
            provenance=self.provenance,
            files=writer.files,
            later=writer.later,
            next_key_id=self.next_key_id,
            change=change,
        )
        writer.commit(manifest)
        self.version, self.folder = manifest.version, writer.folder
        return store.Check(writer.folder, manifest, known=manifest.data_files)

    def _remember(self, check: store.Check) -> None:
        """That the files of this version hold what is in memory now."""
        manifest = check.manifest
        self._check = check
        self._stored = list(zip(segments_of(self.keys), manifest.segments, strict=True))
        self._own = self._held()
        for kind, index in (("index", self.index), ("text_index", self.text_index)):
            if index is not None:
                index.path = check.folder / manifest.files[kind].name

    def add_classes(self, names: Sequence[str], text_weights: Features | None = None) -> None:
        """Add classes after those there are, without a key. On disk after :meth:`save`.

        ``text_weights`` ``[m, d]`` unit vectors, needed where the index has text. Raises InputError for names that are
        there, or weights that are missing or do not fit; then nothing was changed.
        """
        names, weights = inputs.new_classes(names, self.class_names, text_weights, self.d, self.has_text)
        self.class_names = [*self.class_names, *names]
        self.text_weights = torch.cat([self.text_weights, weights.to(self.text_weights)])
        if self.values is not None:
            self.values = torch.nn.functional.pad(self.values, (0, len(names)))
        self._follow()

    def add(
        self,
        keys: Features,
        labels: Labels,
        sources: Sequence[str] | pa.ChunkedArray | None = None,
        *,
        views: int | npt.NDArray[np.integer[Any]] = 1,
        digests: Sequence[str | None] | None = None,
        extra: pa.Table | None = None,
    ) -> list[int]:
        """Add keys ``[m, d]`` of known classes; returns their key ids. On disk after :meth:`save`, as a new version.

        It costs by what is added: the keys become a segment of their own, beside the index over the others. Segments
        that are not larger are joined with it, so that there are few, and where what was added since the index was
        built is as much as that, it is built anew (:meth:`compact`). Where the cache has values, a new key gives 1 to
        its own class: it was not trained; and these are all one segment. ``views``, ``digests`` (SHA-256 of the images)
        and ``extra`` columns go into the label store. Raises InputError for keys or labels that do not fit; then
        nothing was changed.
        """
        matrix, ids = inputs.keys_to_add(keys, labels, self.class_names, self.d, self.dtype)
        assert self.next_key_id is not None
        key_ids = np.arange(self.next_key_id, self.next_key_id + len(matrix))
        added = label_table(self.class_names, ids, sources, key_ids=key_ids, views=views, digests=digests, extra=extra)
        added = self._numbered(added, ids)
        try:
            table = pa.concat_tables([self.labels, added], promote_options="default")
        except pa.ArrowException as error:
            raise InputError(f"labels: their columns do not fit the index's ({first_line(error)})") from None
        values = self.values
        if values is not None:
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(ids), len(self.class_names)).to(values)
            values = torch.cat([values, one_hot])
        parts = [*segments_of(self.keys), matrix.astype(self.keys.dtype)]
        first = len(parts) - 1
        while first and (len(parts[first - 1]) <= max(SMALL, sum(map(len, parts[first:]))) or values is not None):
            first -= 1
        self._arrange(parts, table, values, first)
        self.next_key_id += len(matrix)
        return key_ids.tolist()

    def _numbered(self, added: pa.Table, ids: npt.NDArray[np.int64]) -> pa.Table:
        """Labels to be added, whose shots are counted on from those of their class."""
        next_shot = np.zeros(len(self.class_names), dtype=np.int32)
        np.maximum.at(next_shot, self.labels["class_id"].to_numpy(), self.labels["shot"].to_numpy() + 1)
        return shots_after(added, ids, next_shot)

    def remove(self, key_ids: Sequence[int]) -> None:
        """Remove keys by their id; classes stay, also those left without a key. On disk after :meth:`save`.

        Segments that hold one are written again, and with the first one everything. Raises InputError for an id that is
        not there, and where no key would be left; then nothing was changed.
        """
        gone = self._rows_of_ids(key_ids)
        if len(gone) == self.n:
            raise InputError("remove: an index needs at least one key; give up the folder instead")
        if len(gone):
            keep = np.ones(self.n, dtype=bool)
            keep[gone] = False
            self._rearrange(self.labels, ~keep, keep)

    def relabel(self, key_ids: Sequence[int], label: str) -> None:
        """Give keys to another class, as its last shots. On disk after :meth:`save`; costs as :meth:`remove`.

        A trained value that a key gives stays with it. Raises InputError for an id or a label that is not there; then
        nothing was changed.
        """
        rows = self._rows_of_ids(key_ids)
        class_id = int(inputs.ids_of([label], self.class_names, 1)[0])
        ids = self.labels["class_id"].to_numpy().copy()
        rows = rows[ids[rows] != class_id]
        if not len(rows):
            return
        names, shots = self.labels["label"].to_numpy().copy(), self.labels["shot"].to_numpy().copy()
        first = shots[ids == class_id].max(initial=-1) + 1
        shots[rows] = first + np.arange(len(rows))
        ids[rows], names[rows] = class_id, label
        table = self.labels
        for name, column in (("class_id", ids), ("label", names), ("shot", shots)):
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(column, LABEL_SCHEMA.field(name).type))
        touched = np.zeros(self.n, dtype=bool)
        touched[rows] = True
        self._rearrange(table, touched, np.ones(self.n, dtype=bool))

    def compact(self, factory: str | None = None, dtype: str | None = None) -> None:
        """Make all keys one segment, and build the index over them anew. On disk after :meth:`save`.

        ``factory`` is the type of the index (``auto`` by :func:`vector_index.auto_factory`, which sets ``k`` too) and
        ``dtype`` that of the keys, float32 or float16, where they are to become others. Raises UsageError for a factory
        that cannot work, InputError where keys are too large for the dtype; then nothing was changed.
        """
        k = self.k
        if factory == "auto":
            factory, k = auto_factory(self.n, len(self.class_names))
        order = self._order()
        keys = self.keys[order]
        if dtype is not None and keys.dtype != dtype:
            with np.errstate(over="ignore"):  # refused just below
                keys = keys.astype(dtype)
            if not np.isfinite(keys).all():
                raise InputError(f"keys: hold values too large for {keys.dtype}")
        ids = self.labels["class_id"].to_numpy()[order]
        if factory is None or factory == self.index.factory:
            index = self._index_over(keys, ids)
        else:
            index = index_over(keys, ids, len(self.class_names), factory, self.device)
        if self.text_index is not None or index.factory != self.index.factory:
            self.text_index = text_index_over(self.text_weights.cpu().numpy(), index.factory, self.device)
        self.keys, self.labels, self.index, self.k = keys, self.labels.take(pa.array(order)), index, k
        self.values = self._values_of(order)
        self._follow()

    def _rows_of_ids(self, key_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """The rows of keys, ascending. Raises InputError naming ids that are not there."""
        present = self.labels["key_id"].to_numpy()
        wanted = np.asarray(list(key_ids), dtype=np.int64)
        missing = np.setdiff1d(wanted, present)
        if missing.size:
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
        return np.flatnonzero(np.isin(present, wanted))

    def _order(self) -> npt.NDArray[np.int64]:
        """The rows by class, and within a class by key id: the order of an index that is built at once."""
        return np.lexsort((self.labels["key_id"].to_numpy(), self.labels["class_id"].to_numpy()))

    def _rearrange(self, labels: pa.Table, touched: npt.NDArray[np.bool_], keep: npt.NDArray[np.bool_]) -> None:
        """Take other labels for the same keys, and of these what to ``keep``, writing only segments that are touched.

        The first segment is what the index is over, so where it is touched everything is.
        """
        parts = segments_of(self.keys)
        spans = [slice(a, b) for a, b in itertools.pairwise(np.cumsum([0, *map(len, parts)]).tolist())]
        ids, key_ids = labels["class_id"].to_numpy(), labels["key_id"].to_numpy()
        if touched[spans[0]].any():
            rows = np.flatnonzero(keep)
            rows = rows[np.lexsort((key_ids[rows], ids[rows]))]
            self._replace(self.keys[rows], labels.take(pa.array(rows)), self._values_of(rows))
            return
        kept, orders = [parts[0]], [np.arange(len(parts[0]))]
        for part, span in zip(parts[1:], spans[1:], strict=True):
            own = np.flatnonzero(keep[span])
            if touched[span].any():
                own = own[np.lexsort((key_ids[span][own], ids[span][own]))]
            if len(own):
                kept.append(part[own] if touched[span].any() else part)
                orders.append(own + span.start)
        self.keys, self.labels = joined(kept), labels.take(pa.array(np.concatenate(orders)))
        if len(kept) == 1:
            self.index = self.index.bare()
        self._follow()

    def _arrange(self, parts: Sequence[npt.NDArray[Any]], labels: pa.Table, values: Tensor | None, first: int) -> None:
        """Take these segments, those from ``first`` on as one."""
        start = sum(map(len, parts[:first]))
        ids, key_ids = (labels[name].to_numpy()[start:] for name in ("class_id", "key_id"))
        order = np.lexsort((key_ids, ids))
        new = np.concatenate(parts[first:])[order]
        labels = pa.concat_tables([labels.slice(0, start), labels.slice(start).take(pa.array(order))])
        if not first:
            self._replace(new, labels, None if values is None else values[order])
            return
        self.keys, self.labels = joined([*parts[:first], new]), labels
        self._follow()

    def described(self, rows: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of the label store of some keys, by row ``[m]``."""
        return self.labels.select(list(columns)).take(pa.array(rows))

    def every_row(self) -> npt.NDArray[np.int64]:
        """The rows of all keys ``[n]``."""
        return np.arange(self.n)

    def some(self, m: int) -> tuple[npt.NDArray[Any], pa.Table]:
        """At most ``m`` keys, spread evenly over all, as they are stored, and their ``key_id`` and ``class_id``."""
        rows = spread(self.n, m)
        return np.asarray(self.keys[rows]), self.described(rows, ["key_id", "class_id"])

    def of_classes(self, class_ids: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
        """Class ids and keys, as they are stored, of some classes, a block at a time."""
        every = self.labels["class_id"].to_numpy().astype(np.int64)
        rows = np.flatnonzero(np.isin(every, class_ids))
        for part in slices(len(rows), KEY_BLOCK):
            yield every[rows[part]], np.asarray(self.keys[rows[part]])

    def find(self, labels: Sequence[str] = (), source: str | None = None, key_ids: Sequence[int] = ()) -> pa.Table:
        """See :meth:`classifier.Classifier.find`."""
        table = self.labels
        chosen = pa.array(np.ones(len(table), dtype=bool))
        if labels:
            chosen = pc.and_(chosen, pc.is_in(table["label"], value_set=pa.array(labels, pa.string())))
        if key_ids:
            chosen = pc.and_(chosen, pc.is_in(table["key_id"], value_set=pa.array(key_ids, pa.int64())))
        if source:
            chosen = pc.and_(chosen, pc.match_substring(table["source"], source, ignore_case=True))
        return table.filter(pc.fill_null(chosen, False))

    def every_class(self) -> CacheModel:
        """The same, without a shortlist of classes."""
        if self.text_index is None:
            return self
        found = copy.copy(self)  # the keys, and what was measured on them, are shared
        found.text_index = None
        return found

    def known(self, digests: Sequence[str | None]) -> set[tuple[str, str]]:
        """Digest and label of the keys that have one of these digests."""
        asked = pa.array(set(digests) - {None}, pa.string())
        same = self.labels.select(["digest", "label"]).filter(pc.is_in(self.labels["digest"], value_set=asked))
        return set(zip(same["digest"].to_pylist(), same["label"].to_pylist(), strict=True))

    def statistics(self) -> Statistics | None:
        """:func:`defaults.measure` of the keys."""
        return measure(self.keys, self.class_ids.cpu().numpy())

    def set_text(self, weights: npt.NDArray[np.float32], templates: Sequence[str]) -> None:
        """Take other text weights ``[c, d]``, made from these templates. On disk after :meth:`save`."""
        self.templates, self.text_weights = list(templates), torch.from_numpy(weights).to(self.device)
        self.text_index = text_index_over(weights, self.index.factory, self.device)

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """The ``k`` nearest keys of queries ``[q, d]`` on the device: affinities and rows, ``[q, k]`` each.

        Affinities are to the keys themselves, also where the index holds a compressed copy; an empty slot has row -1.
        """
        near = self.retrieval.nearest(features, k)
        return near.affinity, near.rows.cpu().numpy()

    def _answers(
        self, features: Features, top: int, k: int | None, tail: bool, certify: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Sequence[int | None]]:
        retrieval = self.retrieval
        if certify or not retrieval.has_shortlist or k is None or k >= self.n or top > SHORTLIST:
            return super()._answers(features, top, k, tail, certify)
        inputs.check_settings(self.alpha, self.beta, k, self.logit_scale)
        f = inputs.queries(features, self.d).to(self.device)
        parts = [retrieval.shortlist(part, k, tail) for part in f.split(QUERY_BLOCK)]
        classes, text, cache = (torch.cat(column) for column in zip(*parts, strict=True))
        self._check_overflow(text.nan_to_num(neginf=0.0), cache)
        return classes, text, cache, [None] * len(f)

    def take(self, rows: npt.NDArray[np.int64]) -> CacheModel:
        """A classifier over some of the keys, by row (a row may repeat); everything else is this one's.

        So few that the index's type cannot hold them are compared with every query (``Flat``).
        """
        ids = self.labels["class_id"].to_numpy()[rows]
        grouped = np.asarray(rows)[np.argsort(ids, kind="stable")]
        keys = np.asarray(self.keys[grouped])
        try:
            index = self._index_over(keys, np.sort(ids))
        except UsageError:
            index = index_over(keys, np.sort(ids), len(self.class_names), "Flat", self.device)
        labels = self.labels.take(pa.array(grouped))
        return replace(
            self, keys=keys, labels=labels, index=index, version=None, folder=None, values=self._values_of(grouped)
        )

    def _values_of(self, rows: npt.NDArray[np.int64]) -> Tensor | None:
        return None if self.values is None else self.values[rows]

    def _replace(self, keys: npt.NDArray[Any], labels: pa.Table, values: Tensor | None) -> None:
        """Take these keys, which are in order, as one segment with an index over it."""
        ids = labels["class_id"].to_numpy()
        self.index, self.keys, self.labels, self.values = self._index_over(keys, ids), keys, labels, values
        self._follow()

    def _index_over(self, keys: npt.NDArray[Any], class_ids: npt.NDArray[Any]) -> VectorIndex:
        """An index like this one, as tuned as it is, over other keys."""
        index = index_over(keys, class_ids, len(self.class_names), self.index.factory, self.device)
        index.effort = self.index.effort
        return index


def verify(folder: str | os.PathLike[str]) -> CacheModel:
    """Check an index folder thoroughly: every byte of every kept version, and that its parts fit together.

    Raises StoreError naming the file that is damaged or does not fit. Returns the opened index.
    """
    place = Path(folder)
    cache = CacheModel.load(place, device="cpu")
    store.check_earlier(place)
    if not torch.isfinite(cache.text_weights).all():
        raise StoreError(f"{place}: text weights that are not finite; build the index again")
    if cache.values is not None and not torch.isfinite(cache.values).all():
        raise StoreError(f"{place}: values that are not finite; fine-tune again, or go back to the version before")
    vectors = cache.keys
    if cache.index.by_class:  # not those that the index itself holds
        vectors = Keys(cache.keys, cache.class_ids.numpy(), len(cache.class_names)).means.numpy()
    sample = np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), 256)).astype(int))
    queries = np.ascontiguousarray(vectors[sample], dtype=np.float32)
    if not np.isfinite(queries).all():
        raise StoreError(f"{place}: keys that are not finite; build the index again")
    found, rows = cache.index.search(queries, 1)
    if cache.index.exact_affinity:
        own = np.einsum("qd,qd->q", queries, vectors[np.maximum(rows[:, 0], 0)], dtype=np.float64)
        if not np.allclose(found[:, 0], own, rtol=1e-3, atol=1e-3):
            raise StoreError(f"{place}: the FAISS index is not over these keys; build the index again")
    return cache
