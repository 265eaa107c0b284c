"""The classifier: keys in a FAISS index, their labels in a store, text weights, and the method over them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import inputs, store, tip
from retrieval_tip.backbone import Identity, resolve_device
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.features import Encoder
from retrieval_tip.inputs import Features, Labels
from retrieval_tip.keys import QUERY_BLOCK, Keys, index_over, text_index_over
from retrieval_tip.retrieval import LOGITS, SHORTLIST, Retrieval, slices
from retrieval_tip.sources import Source
from retrieval_tip.vector_index import VectorIndex, auto_factory

ALPHA, BETA, LOGIT_SCALE = 1.0, 5.5, 100.0
"""The paper's defaults (its code's, for ImageNet) and the temperature of OpenAI's CLIP."""

GROWTH, ALL_FROM = 4, 8
"""A query that is not settled meets so many times the keys; where these are more than an eighth of all, all."""


@dataclass(frozen=True)
class Neighbour:
    """A key near a query: what it is, its ``affinity`` and its ``weight`` ``exp(-beta (1 - affinity))``."""

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    ``label`` and ``probability`` (softmax of the blended logits / temperature) of the winner; ``labels`` and
    ``probabilities`` of the ``top`` classes; ``text_logit`` and ``cache_logit`` are the two parts of the winner's logit
    (the latter with alpha, so that they add up to it); ``logits`` ``[c]`` float32 in the index's order, ``None`` where
    the classes are so many that only a shortlist was compared, which the probabilities are then over; the nearest
    ``neighbours``. ``keys``: how many of the keys settled the answer, where it was certified.
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


@dataclass(frozen=True)
class Certified:
    """Logits whose winners are those over all keys, by :meth:`CacheModel.certified`.

    ``text`` and ``cache`` ``[q, c]`` as :meth:`CacheModel.terms` gives them; ``keys`` ``[q]`` int64, how many of the
    nearest keys settled each query, ``n`` where it took all; ``proved``, whether that is proof: after exact search it
    is, after approximate search it is evidence, and the winners agree with those over all keys as far as was looked.
    """

    text: Tensor
    cache: Tensor
    keys: Tensor
    proved: bool


@dataclass
class CacheModel:
    """Tip-Adapter's cache as a searchable index. Make one with :meth:`from_features` or :meth:`load`.

    ``keys`` ``[n, d]`` float32 or float16, grouped by class; ``labels`` describes them, row by row; ``text_weights``
    ``[c, d]`` float32. ``alpha``, ``beta``, ``k`` (``None`` is all) and ``tail`` are the settings kept with an index;
    ``temperature`` divides the logits where they become probabilities, and nowhere else; ``precision`` is that of the
    products with all keys (:class:`keys.Keys`); ``text_index`` finds the text weights near a query, where the classes
    are so many that not even these are all met. ``class_ids`` ``[n]`` int64, on the device, repeats what ``labels``
    say.

    A fine-tuned cache may have more: ``values`` ``[n, c]`` float32, on the device, what each key gives to each class in
    place of 1 to its own (:class:`tip.Values`); ``tuned``, the safetensors file of the fine-tuned encoder that the
    features come from; ``curve``, the loss curve of the training, a row an epoch.

    Change ``values``, or ``keys`` and the ``index`` over them, of a copy, with :func:`dataclasses.replace`. Raises
    InputError for values of another shape or a curve without rows.
    """

    keys: npt.NDArray[Any]
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

    def __post_init__(self) -> None:
        inputs.check_settings(self.alpha, self.beta, self.k, self.logit_scale, self.temperature)
        class_ids = self.labels["class_id"].to_numpy().astype(np.int64)
        means = self.index.vectors if self.index.by_class and self.index.exact_affinity else None
        self._keys = Keys(self.keys, class_ids, len(self.class_names), self.device, self.precision, means)
        self.class_ids = self._keys.class_ids
        self.text_weights = self.text_weights.to(self.device)
        if self.values is not None:
            inputs.check_shape("values", self.values.shape, (self.n, len(self.class_names)), "one row a key")
            self.values = self.values.detach().to(self.device, torch.float32)
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; give one an epoch, or None")

    def __repr__(self) -> str:
        return (
            f"CacheModel({self.n} keys of {self.d}, {len(self.class_names)} classes, index={self.index.factory!r}, "
            f"alpha={self.alpha:g}, beta={self.beta:g}, k={self.k or 'all'}, device={self.device!r})"
        )

    @property
    def _retrieval(self) -> Retrieval:
        """With the settings as they are now."""
        settings = (self.alpha, self.beta, self.logit_scale)
        return Retrieval(self._keys, self.index, self.text_weights, self.text_index, self.values, *settings)

    @property
    def n(self) -> int:
        """Number of keys."""
        return int(self.keys.shape[0])

    @property
    def d(self) -> int:
        """Length of a feature."""
        return int(self.keys.shape[1])

    @property
    def has_text(self) -> bool:
        """Whether there are text weights; without them zero-shot logits are 0 and the cache alone decides."""
        return bool(self.text_weights.any())

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
        check: store.Check | None = None,
    ) -> Self:
        """Open the current version of an index folder; every file is checked against its digest first.

        ``precision`` is that of the products with all keys, by default the fastest that is accurate enough here
        (:meth:`keys.Keys.products`); ``float32`` answers the same everywhere. ``check`` is that check where it was
        begun before, and its version is opened. Keys and values stay on disk, memory-mapped. Raises StoreError naming
        the file that is missing, damaged, does not fit the manifest, or is of a newer format.
        """
        place = Path(folder)
        device = resolve_device(device)
        check = check or store.Check(place)
        manifest = check.manifest
        check.wait()
        files, classes = manifest.files, len(manifest.class_names)
        keys = store.read_array(place, files["keys"], (manifest.n, manifest.d))
        text = store.read_array(place, files["text"], (classes, manifest.d))
        values = (
            torch.from_numpy(store.read_array(place, files["values"], (manifest.n, classes), (np.float32,)))
            if "values" in files
            else None
        )
        index = VectorIndex.load(place / files["index"].name, manifest.index, device, keys.dtype == np.float16)
        expected = (classes if index.by_class else manifest.n, manifest.d)
        if (index.n, index.d) != expected or keys.dtype != manifest.dtype:
            raise StoreError(f"{place / files['index'].name}: does not fit the manifest; build the index again")
        return cls(
            keys=keys,
            labels=store.read_labels(place, manifest),
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
            text_index=VectorIndex.load(place / files["text_index"].name, manifest.index, device)
            if "text_index" in files
            else None,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new version of an index folder (the first one, where there is none). See :func:`store.write`.

        Raises StoreError where the folder cannot be written, or ``tuned`` is no safetensors file; InputError for what
        a version cannot hold. After either nothing was changed.
        """
        with store.write(Path(folder)) as writer:
            writer.seal_array("keys", self.keys)
            self.commit(writer)

    def save_settings(self, folder: str | os.PathLike[str], *, index: bool = False) -> None:
        """Write alpha, beta, k, tail, temperature and provenance as a new version of the folder this was loaded from.

        No data file is written again, but the FAISS one with ``index``: all are that version's. Raises StoreError where
        the index has changed since it was loaded.
        """
        with store.write(Path(folder)) as writer:
            found = writer.parent.version if writer.parent else None
            if found is None or found != self.version:
                raise StoreError(
                    f"{folder}: is at version {found}, not at {self.version} as when it was opened; try again"
                )
            writer.keep_all()
            if index:
                self._seal_index(writer, "index", self.index)
            self._commit(writer)

    def commit(self, writer: store.Writer) -> None:
        """Write everything but the keys, which the writer already has, and make it the current version.

        ``tuned`` is copied, by content, and is the copy from then on. Errors as for :meth:`save`.
        """
        self._seal_index(writer, "index", self.index)
        staged = writer.stage("labels")
        store.write_table(staged, self.labels, "labels")
        writer.seal("labels", staged, self.n)
        staged = writer.stage("text")
        store.write_array(staged, self.text_weights.cpu().numpy())
        writer.seal("text", staged, len(self.class_names))
        if self.text_index is not None:
            self._seal_index(writer, "text_index", self.text_index)
        if self.values is not None:
            writer.seal_array("values", self.values.cpu().numpy())
        tuned = None if self.tuned is None else writer.seal_weights(self.tuned)
        if self.curve is not None:
            staged = writer.stage("curve")
            store.write_table(staged, self.curve, "curve")
            writer.seal("curve", staged, len(self.curve))
        self._commit(writer)
        self.tuned = tuned

    def _seal_index(self, writer: store.Writer, kind: str, index: VectorIndex) -> None:
        staged = writer.stage(kind)
        index.save(staged)
        writer.seal(kind, staged, self.n if kind == "index" else len(self.class_names))

    def _commit(self, writer: store.Writer) -> None:
        parent = writer.parent.version if writer.parent else None
        writer.commit(
            store.Manifest(
                version=(parent or 0) + 1,
                parent=parent,
                created_at=now().isoformat(timespec="seconds"),
                created_by=f"retrieval-tip {version('retrieval-tip')}",
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
            )
        )
        self.version = (parent or 0) + 1

    def terms(self, features: Features, k: int | None = None, tail: bool = True) -> tuple[Tensor, Tensor]:
        """The two parts of the logits: text ``logit_scale * f W^T`` and cache ``C`` (without alpha), ``[q, c]`` each.

        Arguments and errors as for :meth:`logits`.
        """
        inputs.check_settings(self.alpha, self.beta, k, self.logit_scale)
        text, cache, _ = self._retrieval.terms(inputs.queries(features, self.d).to(self.device), k, tail, certify=False)
        self._check_overflow(text, cache)
        return text, cache

    def _check_overflow(self, text: Tensor, cache: Tensor) -> None:
        largest = (_largest(text), _largest(cache)) if len(text) else (text.new_zeros(()), cache.new_zeros(()))
        if not torch.isfinite(largest[1]):
            raise InputError(
                f"beta {self.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller one"
            )
        if not torch.isfinite(tip.blend(*largest, self.alpha)):
            raise InputError(
                f"alpha {self.alpha:g} or logit_scale {self.logit_scale:g}: too large, the logits overflow; "
                "use smaller ones"
            )

    def certified(self, features: Features, k: int | None = None, tail: bool = True) -> Certified:
        """Text and cache logits from as few keys as settle each query: ``k``, then four times as many, at last all.

        A query is settled where no key that it has not met can change its winner (:func:`tip.certificate`; with an
        index over classes :func:`tip.settled`). A fine-tuned cache with values always takes all keys: what these
        give may be negative. Arguments and errors as for :meth:`logits`.
        """
        inputs.check_settings(self.alpha, self.beta, k, self.logit_scale)
        f = inputs.queries(features, self.d).to(self.device)
        text = f.new_empty(len(f), len(self.class_names))
        cache, keys = torch.empty_like(text), torch.full((len(f),), self.n)
        left = torch.arange(len(f), device=self.device)
        while len(left):
            if k is not None and (k > self.n // ALL_FROM or self.values is not None):
                k = None
            text[left], cache[left], settled = self._retrieval.terms(f[left], k, tail, certify=True)
            keys[left.cpu()] = self.n if k is None else k
            left, k = left[~settled], None if k is None else k * GROWTH
        self._check_overflow(text, cache)
        return Certified(text, cache, keys, proved=self.index.exact_search)

    def logits(self, features: Features, k: int | None = None, tail: bool = True) -> Tensor:
        """Blended logits ``logit_scale * f W^T + alpha * C`` ``[q, c]`` float32, classes in the index's order.

        Args:
            features: ``[q, d]`` unit-norm features, array or tensor.
            k: how many of the nearest keys a query uses; ``None`` is all of them, Tip-Adapter exactly.
            tail: with ``k``, estimate what the keys that were not retrieved add (see :func:`tip.cache_logits`).

        Raises InputError where features are not finite or not ``[q, d]``, or logits overflow; UsageError where ``k``
        is below 1.
        """
        text, cache = self.terms(features, k, tail)
        return tip.blend(text, cache, self.alpha)

    def classify(
        self,
        features: Features,
        top: int = 1,
        k: int | None = None,
        tail: bool = True,
        neighbours: int = 5,
        certify: bool = False,
    ) -> list[Prediction]:
        """One :class:`Prediction` a query: label, probability, and the ``neighbours`` nearest keys that made it.

        Arguments as for :meth:`logits`; ``top`` classes are reported, most probable first; with ``certify`` each query
        meets as many keys as settle its label (:meth:`certified`).
        """
        if top < 1:
            raise UsageError(f"top is {top}: at least 1 class has to be reported")
        classes, text, cache, keys = self._answers(features, top, k, tail, certify)
        logits = tip.blend(text, cache, self.alpha)
        places = logits.topk(min(top, logits.shape[1]), dim=1).indices  # no temperature can change it
        ranked = places if classes is None else classes.gather(1, places)
        chances = tip.probabilities(logits, self.temperature).gather(1, places)
        near = self._neighbours(features, min(neighbours, k or neighbours)) if neighbours > 0 else [[]] * len(logits)
        winner = places[:, :1]
        parts = torch.cat([text.gather(1, winner), self.alpha * cache.gather(1, winner)], dim=1).tolist()
        rows = logits.cpu().numpy() if classes is None else [None] * len(logits)
        by_query = zip(chances.tolist(), ranked.tolist(), parts, rows, near, keys, strict=True)
        return [
            Prediction(
                label=self.class_names[ids[0]],
                probability=probabilities[0],
                labels=[self.class_names[i] for i in ids],
                probabilities=probabilities,
                text_logit=part[0],
                cache_logit=part[1],
                logits=row,
                neighbours=nearest,
                keys=number,
            )
            for probabilities, ids, part, row, nearest, number in by_query
        ]

    def _answers(
        self, features: Features, top: int, k: int | None, tail: bool, certify: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Sequence[int | None]]:
        """The classes that logits are of, ``None`` for all; text and cache logits; the keys that settled each query."""
        if certify:
            found = self.certified(features, k, tail)
            return None, found.text, found.cache, found.keys.tolist()
        if self._retrieval.has_shortlist and k is not None and k < self.n and top <= SHORTLIST:
            inputs.check_settings(self.alpha, self.beta, k, self.logit_scale)
            f = inputs.queries(features, self.d).to(self.device)
            parts = [self._retrieval.shortlist(part, k, tail) for part in f.split(QUERY_BLOCK)]
            classes, text, cache = (torch.cat(column) for column in zip(*parts, strict=True))
            self._check_overflow(text.nan_to_num(neginf=0.0), cache)
            return classes, text, cache, [None] * len(f)
        text, cache = self.terms(features, k, tail)
        return None, text, cache, [None] * len(text)

    def classify_source(
        self,
        source: Source,
        encoder: Encoder,
        top: int = 1,
        k: int | None = None,
        tail: bool = True,
        neighbours: int = 5,
        certify: bool = False,
    ) -> Iterator[tuple[str, Prediction]]:
        """Classify images or a feature table: name and prediction of each item that could be read, in order.

        ``encoder`` needs the backbone of this index for images; ``encoder.skipped`` names what could not be read. The
        other arguments as for :meth:`classify`.
        """
        names = source.sources
        for block in encoder.blocks(source):
            for part in self.parts(len(block.positions)):
                found = self.classify(block.features[part], top, k, tail, neighbours, certify)
                yield from zip((names[i] for i in block.positions[part]), found, strict=True)

    def parts(self, q: int) -> Iterator[slice]:
        """Slices of ``q`` queries that have :data:`LOGITS` logits at most."""
        return slices(q, max(1, LOGITS // len(self.class_names)))

    def ids_of(self, source: Source) -> npt.NDArray[np.int64]:
        """Class ids of the items of a labelled source.

        Raises InputError where it has no items, or labels that are no class of the index.
        """
        position = {name: i for i, name in enumerate(self.class_names)}
        labels = source.labels
        if not labels:
            raise InputError(f"{source.name}: has no items")
        unknown = sorted(set(labels) - position.keys())
        if unknown:
            raise InputError(
                f"{source.name}: {len(unknown)} labels are no class of the index: {', '.join(unknown[:5])}; "
                f"its classes are {', '.join(self.class_names[:5])}{' ...' if len(self.class_names) > 5 else ''}"
            )
        return np.array([position[label] for label in labels], dtype=np.int64)

    def add(self, keys: Features, labels: Labels, sources: Sequence[str] | None = None) -> list[int]:
        """Add keys ``[m, d]`` of known classes; returns their key ids. On disk after :meth:`save`, as a new version.

        Where the cache has values, a new key gives 1 to its own class: it was not trained. Raises InputError for keys
        or labels that do not fit; then nothing was changed.
        """
        matrix = inputs.matrix(keys, "keys")
        if matrix.shape[1] != self.d:
            raise InputError(f"keys: have {matrix.shape[1]} values, the index has {self.d}")
        if np.abs(matrix).max() > np.finfo(self.keys.dtype).max:
            raise InputError(f"keys: hold values too large for the {self.keys.dtype} of the index")
        ids = inputs.ids_of(labels, self.class_names, len(matrix))
        first = int(np.max(self.labels["key_id"].to_numpy())) + 1
        added = label_table(self.class_names, ids, sources, key_ids=np.arange(first, first + len(matrix)))
        next_shot = np.zeros(len(self.class_names), dtype=np.int32)
        np.maximum.at(next_shot, self.labels["class_id"].to_numpy(), self.labels["shot"].to_numpy() + 1)
        shots = pa.array(added["shot"].to_numpy() + next_shot[ids], pa.int32())
        added = added.set_column(added.column_names.index("shot"), "shot", shots)
        table = pa.concat_tables([self.labels, added], promote_options="default")
        order = np.argsort(table["class_id"].to_numpy(), kind="stable")
        values = None
        if self.values is not None:
            one_hot = torch.nn.functional.one_hot(torch.from_numpy(ids), len(self.class_names)).to(self.values)
            values = torch.cat([self.values, one_hot])[order]
        every = np.concatenate([self.keys, matrix.astype(self.keys.dtype)])
        self._replace(every[order], table.take(pa.array(order)), values)
        return list(range(first, first + len(matrix)))

    def remove(self, key_ids: Sequence[int]) -> None:
        """Remove keys by their id; classes stay, also those left without a key. On disk after :meth:`save`.

        Raises InputError for an id that is not there, and where no key would be left.
        """
        present = self.labels["key_id"].to_numpy()
        missing = sorted(set(key_ids) - set(present.tolist()))
        if missing:
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
        keep = np.flatnonzero(~np.isin(present, np.asarray(list(key_ids), dtype=np.int64)))
        if not keep.size:
            raise InputError("remove: an index needs at least one key")
        self._replace(self.keys[keep], self.labels.take(pa.array(keep)), self._values_of(keep))

    def take(self, rows: npt.NDArray[np.int64]) -> CacheModel:
        """A classifier over some of the keys, by row (a row may repeat); everything else is this one's."""
        ids = self.labels["class_id"].to_numpy()[rows]
        grouped = np.asarray(rows)[np.argsort(ids, kind="stable")]
        keys = np.asarray(self.keys[grouped])
        index = self._index_over(keys, np.sort(ids))
        labels = self.labels.take(pa.array(grouped))
        return replace(self, keys=keys, labels=labels, index=index, version=None, values=self._values_of(grouped))

    def _values_of(self, rows: npt.NDArray[np.int64]) -> Tensor | None:
        return None if self.values is None else self.values[rows]

    def _replace(self, keys: npt.NDArray[Any], labels: pa.Table, values: Tensor | None) -> None:
        ids = labels["class_id"].to_numpy()
        self.index, self.keys, self.labels, self.values = self._index_over(keys, ids), keys, labels, values
        self.__post_init__()

    def _index_over(self, keys: npt.NDArray[Any], class_ids: npt.NDArray[Any]) -> VectorIndex:
        """An index like this one, as tuned as it is, over other keys."""
        index = index_over(keys, class_ids, len(self.class_names), self.index.factory, self.device)
        index.effort = self.index.effort
        return index

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """The ``k`` nearest keys of queries ``[q, d]`` on the device: affinities and rows, ``[q, k]`` each.

        Affinities are to the keys themselves, also where the index holds a compressed copy; an empty slot has row -1.
        """
        affinity, rows = self._retrieval.nearest(features, k)
        return affinity, rows.cpu().numpy()

    def _neighbours(self, features: Features, number: int) -> list[list[Neighbour]]:
        """The nearest keys of each query, described."""
        f = inputs.queries(features, self.d).to(self.device)
        affinity, rows = self.nearest(f, number)
        weights = tip.weight(affinity, self.beta).tolist()
        used, where = np.unique(rows, return_inverse=True)
        used = np.maximum(used, 0)
        described = self.labels.select(["key_id", "source", "label"]).take(pa.array(used)).to_pylist()
        where = where.reshape(rows.shape)
        return [
            [
                Neighbour(**described[where[q, j]], affinity=value, weight=weights[q][j])
                for j, value in sorted(enumerate(values), key=lambda pair: -pair[1])
                if rows[q, j] >= 0
            ]
            for q, values in enumerate(affinity.tolist())
        ]

    def key_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys ``[b, d]`` float32 and their class ids ``[b]``, a block at a time, on the device."""
        return self._keys.blocks()


def verify(folder: str | os.PathLike[str]) -> CacheModel:
    """Check an index folder thoroughly: every byte of every kept version, and that its parts fit together.

    Raises StoreError naming the file that is damaged or does not fit. Returns the opened index.
    """
    place = Path(folder)
    cache = CacheModel.load(place, device="cpu")
    for manifest in store.earlier_manifests(place):
        store.check_files(place, manifest)
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


def label_table(
    class_names: Sequence[str],
    class_ids: npt.NDArray[np.int64],
    sources: Sequence[str] | pa.ChunkedArray | None = None,
    *,
    key_ids: npt.NDArray[np.int64] | None = None,
    views: int = 1,
    digests: Sequence[str | None] | None = None,
    extra: pa.Table | None = None,
) -> pa.Table:
    """The label store of keys with these class ids; ``shot`` counts the keys of a class. ``extra`` columns follow."""
    n = len(class_ids)
    if sources is not None and len(sources) != n:
        raise InputError(f"sources: {len(sources)} for {n} keys")
    ids = np.arange(n) if key_ids is None else key_ids
    order = np.argsort(class_ids, kind="stable")
    counts = np.bincount(class_ids, minlength=len(class_names))
    shots = np.empty(n, dtype=np.int32)
    shots[order] = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = {
        "key_id": pa.array(ids, pa.int64()),
        "class_id": pa.array(class_ids, pa.int32()),
        "label": pa.array(class_names, pa.string()).take(pa.array(class_ids)),
        "source": pa.array([f"key {i}" for i in ids], pa.string()) if sources is None else _string(sources),
        "shot": pa.array(shots),
        "views": pa.array(np.full(n, views, dtype=np.int32)),
        "digest": pa.array(digests if digests is not None else [None] * n, pa.string()),
        "added_at": pa.array([now()] * n, pa.timestamp("us", "UTC")),
    }
    table = pa.table(columns, schema=store.LABEL_SCHEMA)
    if extra is not None:
        for name in extra.column_names:
            table = table.append_column(name, extra[name])
    return table


def now() -> datetime.datetime:
    """The time that goes into manifests and label stores."""
    return datetime.datetime.now(datetime.UTC)


def _string(values: Sequence[str] | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.array(list(values), pa.string())


def _largest(logits: Tensor) -> Tensor:
    """The largest absolute value, NaN where there is one; without a copy of the logits."""
    return torch.stack(logits.aminmax()).abs().amax()
