"""The classifier: keys in a FAISS index, their labels in a store, text weights, and the method over them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import store, tip
from retrieval_tip.backbone import Identity, resolve_device
from retrieval_tip.errors import InputError, StoreError, UsageError
from retrieval_tip.features import Encoder
from retrieval_tip.sources import Source
from retrieval_tip.vector_index import VectorIndex

ALPHA, BETA, LOGIT_SCALE = 1.0, 5.5, 100.0
"""The paper's defaults (its code's, for ImageNet) and the temperature of OpenAI's CLIP."""

QUERY_BLOCK, KEY_BLOCK = 512, 16384
"""The largest affinity block that exists at a time is [512, 16384] float32, 32 MiB, whatever the sizes."""

Labels = Sequence[str] | Sequence[int] | npt.NDArray[np.integer[Any]]
Features = npt.NDArray[np.floating[Any]] | Tensor


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
    (the latter with alpha, so that they add up to it); ``logits`` ``[c]`` float32 in the index's order; the nearest
    ``neighbours``.
    """

    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]
    text_logit: float
    cache_logit: float
    logits: npt.NDArray[np.float32] = field(compare=False)
    neighbours: list[Neighbour]


@dataclass
class CacheModel:
    """Tip-Adapter's cache as a searchable index. Make one with :meth:`from_features` or :meth:`load`.

    ``keys`` ``[n, d]`` float32 or float16, grouped by class; ``labels`` describes them, row by row; ``text_weights``
    ``[c, d]`` float32. ``alpha``, ``beta``, ``k`` (``None`` is all) and ``tail`` are the settings kept with an index;
    ``temperature`` divides the logits where they become probabilities, and nowhere else. ``class_ids`` ``[n]`` int64,
    on the device, repeats what ``labels`` say.

    A fine-tuned cache may have more: ``values`` ``[n, c]`` float32, on the device, what each key gives to each class in
    place of 1 to its own (:class:`tip.Values`); ``tuned``, the safetensors file of the fine-tuned encoder that the
    features come from; ``curve``, the loss curve of the training, a row an epoch. Change ``keys`` or ``values`` of a
    copy, with :func:`dataclasses.replace`. Raises InputError for values of another shape or a curve without rows.
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

    def __post_init__(self) -> None:
        check_settings(self.alpha, self.beta, self.k, self.logit_scale, self.temperature)
        self.class_ids = torch.from_numpy(self.labels["class_id"].to_numpy().astype(np.int64)).to(self.device)
        self.text_weights = self.text_weights.to(self.device)
        if self.values is not None:
            _check_shape("values", self.values.shape, (self.n, len(self.class_names)), "one row a key")
            self.values = self.values.detach().to(self.device, torch.float32)
        if self.curve is not None and not len(self.curve):
            raise InputError("curve: has no rows; give one an epoch, or None")
        self._key_sums: Tensor | None = None
        self._value_sums: Tensor | None = None
        self._on_device: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"CacheModel({self.n} keys of {self.d}, {len(self.class_names)} classes, index={self.index.factory!r}, "
            f"alpha={self.alpha:g}, beta={self.beta:g}, k={self.k or 'all'}, device={self.device!r})"
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
            index: FAISS factory string: ``Flat``, ``IVF256,Flat``, ``HNSW32``, ``SQfp16`` ...
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            sources: path or id of each key, for explanations.
            values: ``[n, c]`` what each key gives to each class, trained; ``None`` is 1 to its own class.

        Raises:
            InputError: shapes that do not fit, values that are not finite, labels that are no class.
            UsageError: alpha, beta, device or index that cannot work.
        """
        matrix = _matrix(keys, "keys")
        names = _class_names(class_names)
        ids = _class_ids(labels, names, len(matrix))
        device = resolve_device(device)
        if sources is not None and len(sources) != len(ids):
            raise InputError(f"sources: {len(sources)} for {len(ids)} keys")
        order = np.argsort(ids, kind="stable")
        table = label_table(names, ids[order], None if sources is None else [sources[i] for i in order], key_ids=order)
        ordered = np.ascontiguousarray(matrix[order])
        return cls(
            keys=ordered,
            labels=table,
            class_names=names,
            text_weights=_text_weights(text_weights, len(names), matrix.shape[1]),
            index=VectorIndex.build(ordered, index, device),
            alpha=alpha,
            beta=beta,
            logit_scale=logit_scale,
            device=device,
            values=None if values is None else _values(values, len(ids), len(names))[order],
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str = "auto") -> Self:
        """Open the current version of an index folder; every file is checked against its digest first.

        Keys and values stay on disk, memory-mapped. Raises StoreError naming the file that is missing, damaged, does
        not fit the manifest, or is of a newer format.
        """
        place = Path(folder)
        device = resolve_device(device)
        manifest = store.read_manifest(place)
        store.check_files(place, manifest)
        files, classes = manifest.files, len(manifest.class_names)
        keys = store.read_array(place, files["keys"], (manifest.n, manifest.d))
        text = store.read_array(place, files["text"], (classes, manifest.d))
        values = (
            torch.from_numpy(store.read_array(place, files["values"], (manifest.n, classes), (np.float32,)))
            if "values" in files
            else None
        )
        index = VectorIndex.load(place / files["index"].name, manifest.index, device)
        if (index.n, index.d) != (manifest.n, manifest.d) or keys.dtype != manifest.dtype:
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
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a new version of an index folder (the first one, where there is none). See :func:`store.write`.

        Raises StoreError where the folder cannot be written, or ``tuned`` is no safetensors file; InputError for what
        a version cannot hold. After either nothing was changed.
        """
        with store.write(Path(folder)) as writer:
            writer.seal_array("keys", self.keys)
            self.commit(writer)

    def save_settings(self, folder: str | os.PathLike[str]) -> None:
        """Write alpha, beta, k, tail, temperature and provenance as a new version of the folder this was loaded from.

        No data file is written again: all are that version's. Raises StoreError where the index has changed since it
        was loaded.
        """
        with store.write(Path(folder)) as writer:
            found = writer.parent.version if writer.parent else None
            if found is None or found != self.version:
                raise StoreError(
                    f"{folder}: is at version {found}, not at {self.version} as when it was opened; try again"
                )
            writer.keep_all()
            self._commit(writer)

    def commit(self, writer: store.Writer) -> None:
        """Write everything but the keys, which the writer already has, and make it the current version.

        ``tuned`` is copied, by content, and is the copy from then on. Errors as for :meth:`save`.
        """
        staged = writer.stage("index")
        self.index.save(staged)
        writer.seal("index", staged, self.n)
        staged = writer.stage("labels")
        store.write_table(staged, self.labels, "labels")
        writer.seal("labels", staged, self.n)
        staged = writer.stage("text")
        store.write_array(staged, self.text_weights.cpu().numpy())
        writer.seal("text", staged, len(self.class_names))
        if self.values is not None:
            writer.seal_array("values", self.values.cpu().numpy())
        tuned = None if self.tuned is None else writer.seal_weights(self.tuned)
        if self.curve is not None:
            staged = writer.stage("curve")
            store.write_table(staged, self.curve, "curve")
            writer.seal("curve", staged, len(self.curve))
        self._commit(writer)
        self.tuned = tuned

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
        check_settings(self.alpha, self.beta, k, self.logit_scale)
        f = _tensor(features, self.d).to(self.device)
        text = torch.empty(len(f), len(self.class_names), device=self.device)
        cache = torch.empty_like(text)
        for start in range(0, len(f), QUERY_BLOCK):
            block = f[start : start + QUERY_BLOCK]
            part = slice(start, start + len(block))
            text[part] = tip.text_logits(block, self.text_weights, self.logit_scale)
            cache[part] = self._all(block) if k is None or k >= self.n else self._retrieved(block, k, tail)
        largest = (text.abs().max(), cache.abs().max()) if len(f) else (text.new_zeros(()), cache.new_zeros(()))
        if not torch.isfinite(largest[1]):
            raise InputError(
                f"beta {self.beta:g}: exp(beta (affinity - 1)) overflows for these keys; use a smaller one"
            )
        if not torch.isfinite(tip.blend(*largest, self.alpha)):
            raise InputError(
                f"alpha {self.alpha:g} or logit_scale {self.logit_scale:g}: too large, the logits overflow; "
                "use smaller ones"
            )
        return text, cache

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
        self, features: Features, top: int = 1, k: int | None = None, tail: bool = True, neighbours: int = 5
    ) -> list[Prediction]:
        """One :class:`Prediction` a query: label, probability, and the ``neighbours`` nearest keys that made it.

        Arguments as for :meth:`logits`; ``top`` classes are reported, most probable first.
        """
        if top < 1:
            raise UsageError(f"top is {top}: at least 1 class has to be reported")
        text, cache = self.terms(features, k, tail)
        logits = tip.blend(text, cache, self.alpha)
        ranked = logits.topk(min(top, len(self.class_names)), dim=1).indices  # no temperature can change it
        chances = tip.probabilities(logits, self.temperature).gather(1, ranked)
        near = self._neighbours(features, min(neighbours, k or neighbours)) if neighbours > 0 else [[]] * len(logits)
        winner = ranked[:, :1]
        parts = torch.cat([text.gather(1, winner), self.alpha * cache.gather(1, winner)], dim=1).tolist()
        by_query = zip(chances.tolist(), ranked.tolist(), parts, logits.cpu().numpy(), near, strict=True)
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
            )
            for probabilities, ids, part, row, nearest in by_query
        ]

    def classify_source(
        self,
        source: Source,
        encoder: Encoder,
        top: int = 1,
        k: int | None = None,
        tail: bool = True,
        neighbours: int = 5,
    ) -> Iterator[tuple[str, Prediction]]:
        """Classify images or a feature table: name and prediction of each item that could be read, in order.

        ``encoder`` needs the backbone of this index for images; ``encoder.skipped`` names what could not be read. The
        other arguments as for :meth:`classify`.
        """
        names = source.sources
        for block in encoder.blocks(source):
            found = self.classify(block.features, top, k, tail, neighbours)
            yield from zip((names[i] for i in block.positions), found, strict=True)

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
        matrix = _matrix(keys, "keys")
        if matrix.shape[1] != self.d:
            raise InputError(f"keys: have {matrix.shape[1]} values, the index has {self.d}")
        if np.abs(matrix).max() > np.finfo(self.keys.dtype).max:
            raise InputError(f"keys: hold values too large for the {self.keys.dtype} of the index")
        ids = _class_ids(labels, self.class_names, len(matrix))
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
        index = VectorIndex.build(keys, self.index.factory, self.device)
        labels = self.labels.take(pa.array(grouped))
        return replace(self, keys=keys, labels=labels, index=index, version=None, values=self._values_of(grouped))

    def _values_of(self, rows: npt.NDArray[np.int64]) -> Tensor | None:
        return None if self.values is None else self.values[rows]

    def _replace(self, keys: npt.NDArray[Any], labels: pa.Table, values: Tensor | None) -> None:
        self.index = VectorIndex.build(keys, self.index.factory, self.device)
        self.keys, self.labels, self.values = keys, labels, values
        self.__post_init__()

    def _all(self, features: Tensor) -> Tensor:
        """Cache logits over every key, a block at a time; keys are grouped, so a block meets few classes."""
        cache = torch.zeros(len(features), len(self.class_names), device=self.device)
        start = 0
        for keys, ids in self.key_blocks():
            affinity = tip.affinity(features, keys)
            if self.values is None:
                low, high = int(ids[0]), int(ids[-1]) + 1
                cache[:, low:high] += tip.cache_logits(affinity, ids - low, high - low, self.beta)
            else:
                values = tip.Values(self.values[start : start + len(keys)])
                cache += tip.cache_logits(affinity, ids, len(self.class_names), self.beta, values=values)
            start += len(keys)
        return cache

    def _retrieved(self, features: Tensor, k: int, tail: bool) -> Tensor:
        """Cache logits over the nearest keys; empty slots have affinity 0, row 0 and class id ``c``."""
        c = len(self.class_names)
        affinity, found = self.nearest(features, k)
        rows = torch.from_numpy(found).to(self.device)
        empty = rows < 0
        rows = rows.clamp_min(0)
        ids = self.class_ids[rows].masked_fill(empty, c)
        totals = tip.Totals.of(features, self._sums(), self._counts()) if tail else None
        values = None
        if self.values is not None:
            values = tip.Values(self.values, rows, self._sums_of_values() if tail else None)
        return tip.cache_logits(affinity.masked_fill(empty, 0), ids, c, self.beta, totals, values)

    def nearest(self, features: Tensor, k: int) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """The ``k`` nearest keys of queries ``[q, d]`` on the device: affinities and rows, ``[q, k]`` each.

        Affinities are to the keys themselves, also where the index holds a compressed copy; an empty slot has row -1.
        """
        found, rows = self.index.search(features.cpu().numpy(), k)
        affinity = torch.from_numpy(found).to(self.device)
        if not self.index.exact_affinity:
            step = max(1, QUERY_BLOCK * KEY_BLOCK // (k * self.d))
            for start in range(0, len(rows), step):
                keys = torch.from_numpy(self.keys[np.maximum(rows[start : start + step], 0)]).to(self.device)
                part = torch.einsum("qd,qkd->qk", features[start : start + step], keys.float())
                affinity[start : start + step] = part
        return affinity, rows

    def _neighbours(self, features: Features, number: int) -> list[list[Neighbour]]:
        """The nearest keys of each query, described."""
        f = _tensor(features, self.d).to(self.device)
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
        """The keys ``[b, d]`` float32 and their class ids ``[b]``, a block at a time, on the device.

        On a GPU all keys stay there, where half of its free memory holds them.
        """
        if self._on_device is None and self.device != "cpu":
            free, _ = torch.cuda.mem_get_info(torch.device(self.device))
            if self.keys.nbytes < free // 2:
                self._on_device = torch.from_numpy(self.keys).to(self.device)
        for start in range(0, self.n, KEY_BLOCK):
            part = slice(start, start + KEY_BLOCK)
            keys = torch.from_numpy(self.keys[part]) if self._on_device is None else self._on_device[part]
            yield keys.to(self.device).float(), self.class_ids[part]

    def _counts(self) -> Tensor:
        return torch.bincount(self.class_ids, minlength=len(self.class_names))

    def _sums(self) -> Tensor:
        """Sum of the keys of each class ``[c, d]``: what the tail needs of the keys that are not retrieved."""
        if self._key_sums is None:
            self._key_sums = self._by_class(self.key_blocks(), self.d)
        return self._key_sums

    def _sums_of_values(self) -> Tensor:
        """Sum of the values of the keys of each class ``[c, c]``: what the tail needs with values."""
        assert self.values is not None
        if self._value_sums is None:
            parts = [slice(start, start + KEY_BLOCK) for start in range(0, self.n, KEY_BLOCK)]
            blocks = ((self.values[part], self.class_ids[part]) for part in parts)
            self._value_sums = self._by_class(blocks, len(self.class_names))
        return self._value_sums

    def _by_class(self, blocks: Iterable[tuple[Tensor, Tensor]], columns: int) -> Tensor:
        """Sums ``[c, columns]`` over blocks of rows and their class ids; no rounding adds up, however many rows."""
        sums = torch.zeros(len(self.class_names), columns, dtype=torch.float64, device=self.device)
        for rows, ids in blocks:
            sums.index_add_(0, ids, rows.double())
        return sums.float()


def verify(folder: str | os.PathLike[str]) -> CacheModel:
    """Check an index folder thoroughly: every byte of every kept version, and that its parts fit together.

    Raises StoreError naming the file that is damaged or does not fit. Returns the opened index.
    """
    place = Path(folder)
    cache = CacheModel.load(place, device="cpu")
    for manifest in store.earlier_manifests(place):
        store.check_files(place, manifest)
    sample = np.unique(np.linspace(0, cache.n - 1, min(cache.n, 256)).astype(int))
    queries = np.ascontiguousarray(cache.keys[sample], dtype=np.float32)
    if not np.isfinite(queries).all() or not torch.isfinite(cache.text_weights).all():
        raise StoreError(f"{place}: keys or text weights that are not finite; build the index again")
    if cache.values is not None and not torch.isfinite(cache.values).all():
        raise StoreError(f"{place}: values that are not finite; fine-tune again, or go back to the version before")
    found, rows = cache.index.search(queries, 1)
    if cache.index.exact_affinity:
        own = np.einsum("qd,qd->q", queries, cache.keys[np.maximum(rows[:, 0], 0)], dtype=np.float64)
        if not np.allclose(found[:, 0], own, rtol=1e-3, atol=1e-3):
            raise StoreError(f"{place}: the FAISS index is not over these keys; build the index again")
    return cache


def check_settings(alpha: float, beta: float, k: int | None, logit_scale: float, temperature: float = 1.0) -> None:
    """Raise UsageError unless alpha and beta are finite, at least 0, k at least 1, scale and temperature positive."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (np.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is {value}: expected a finite number, 0 or more")
    if k is not None and not (isinstance(k, int | np.integer) and k >= 1):
        raise UsageError(f"k is {k}: expected a whole number of keys, at least 1, or None for all")
    for name, value in (("logit_scale", logit_scale), ("temperature", temperature)):
        if not (np.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value}: expected a finite number above 0")


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
    seen = np.zeros(len(class_names), dtype=np.int32)
    shots = np.empty(n, dtype=np.int32)
    for row, class_id in enumerate(class_ids):
        shots[row] = seen[class_id]
        seen[class_id] += 1
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


def _matrix(features: Features, what: str) -> npt.NDArray[Any]:
    """Features as a finite ``[n, d]`` array of float32 (float16 stays)."""
    array = features.detach().cpu().float().numpy() if isinstance(features, Tensor) else _array(features, what)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{what}: shape {array.shape}; expected [n, d] with n and d at least 1")
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{what}: {array.dtype}; expected floating-point numbers")
    with np.errstate(over="ignore"):  # refused just below
        array = array if array.dtype == np.float16 else array.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise InputError(f"{what}: row {int(bad[0])} holds NaN or infinity")
    return array


def _array(values: Any, what: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{what}: rows of unequal length; expected an array") from None
    if what != "labels" and array.dtype.kind not in "fiu":
        raise InputError(f"{what}: {array.dtype}; expected floating-point numbers")
    return array


def _tensor(features: Features, d: int) -> Tensor:
    if isinstance(features, Tensor):
        f = features.detach().float()
    else:
        with np.errstate(over="ignore"):  # refused just below
            f = torch.from_numpy(np.require(_array(features, "features"), np.float32, ["C", "W"]))
    if f.ndim != 2 or f.shape[1] != d:
        raise InputError(f"features: shape {tuple(f.shape)}; expected [q, {d}]")
    if not torch.isfinite(f).all():
        row = int((~torch.isfinite(f).all(dim=1)).nonzero()[0])
        raise InputError(f"features: row {row} holds NaN or infinity")
    return f


def _class_names(names: Sequence[str]) -> list[str]:
    result = list(names)
    if not result or not all(isinstance(name, str) and name for name in result):
        raise InputError("class_names: expected at least one name, each a non-empty string")
    if len(set(result)) < len(result):
        raise InputError(f"class_names: {next(n for n in result if result.count(n) > 1)!r} stands twice")
    return result


def _class_ids(labels: Labels, class_names: Sequence[str], n: int) -> npt.NDArray[np.int64]:
    array = _array(labels, "labels")
    if array.shape != (n,):
        raise InputError(f"labels: shape {array.shape} for {n} keys; expected one a key")
    if np.issubdtype(array.dtype, np.integer):
        bad = np.flatnonzero((array < 0) | (array >= len(class_names)))
        ids = array.astype(np.int64)
    else:
        position = {name: i for i, name in enumerate(class_names)}
        ids = np.array([position.get(label, -1) for label in array.tolist()], dtype=np.int64)
        bad = np.flatnonzero(ids < 0)
    if bad.size:
        raise InputError(
            f"labels: row {int(bad[0])} is {array[bad].tolist()[0]!r}, which is none of the {len(class_names)} classes"
        )
    return ids


def _text_weights(weights: Features | None, c: int, d: int) -> Tensor:
    if weights is None:
        return torch.zeros(c, d)
    matrix = _matrix(weights, "text_weights")
    _check_shape("text_weights", matrix.shape, (c, d), "one a class")
    return torch.from_numpy(np.array(matrix, dtype=np.float32))  # a copy: what the caller does to theirs is theirs


def _values(values: Features, n: int, c: int) -> Tensor:
    matrix = _matrix(values, "values")
    _check_shape("values", matrix.shape, (n, c), "one row a key")
    return torch.from_numpy(np.require(matrix, np.float32, ["C", "W"]))


def _check_shape(what: str, shape: Sequence[int], expected: tuple[int, int], meaning: str) -> None:
    if tuple(shape) != expected:
        raise InputError(f"{what}: shape {tuple(shape)}; expected [{expected[0]}, {expected[1]}], {meaning}")
