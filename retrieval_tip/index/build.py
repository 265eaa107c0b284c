"""From labelled images or features to an index folder."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip.backbones.base import Identity, resolve_device
from retrieval_tip.backbones.prompts import DEFAULT_TEMPLATES, check_templates, mean_by_class, text_weights
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import read_features, same_backbone, table_identity
from retrieval_tip.data.shots import few_shot
from retrieval_tip.data.sources import Source, open_source, spelled_alike
from retrieval_tip.errors import SHOWN, InputError, UsageError, counted, few
from retrieval_tip.fit import closed_form
from retrieval_tip.index import places
from retrieval_tip.index.fit import fit_table
from retrieval_tip.index.places import Place
from retrieval_tip.lance.draft import LanceDraft, index_kind
from retrieval_tip.lance.key_table import FLAT
from retrieval_tip.retrieval.defaults import Statistics, measure, plain_settings
from retrieval_tip.retrieval.duplicates import Duplicates, describe_duplicates, duplicates
from retrieval_tip.retrieval.keys import KEY_BLOCK, auto_for, index_over
from retrieval_tip.retrieval.vector_index import BY_CLASS
from retrieval_tip.settings import (
    Built,
    Dtype,
    FitName,
    KeysMet,
    MetricName,
    Normalize,
    Norms,
    Settings,
    ValuesName,
    check_choice,
)
from retrieval_tip.store.labels import LABEL_SCHEMA, label_table, shots_after
from retrieval_tip.store.writer import Writer, write

if TYPE_CHECKING:
    from retrieval_tip.index.places import Model

log = logging.getLogger(__name__)

FEW_KEYS = 8192
"""Keys of a LanceDB store up to which they are all compared, for images that are in two classes."""


def build_index(
    source: Source,
    out: Place,
    encoder: Encoder,
    *,
    shots: int | None = None,
    templates: Sequence[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    index: str | None = None,
    dtype: Dtype = "float32",
    alpha: float | None = None,
    beta: float | None = None,
    normalize: Normalize | None = None,
    fit: FitName | None = None,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    k: KeysMet = None,
    logit_scale: float | None = None,
    device: str = "auto",
) -> Model:
    """Build an index from a labelled source, as a new version where there is one already.

    Features stream from the encoder into a memory-mapped file, or into a LanceDB table, so a feature table may be
    larger than memory.

    Args:
        source: labelled images or features (see :func:`sources.open_source`).
        out: the index folder, or the address of a LanceDB store (``lance://PATH``, ``s3://BUCKET/PATH``).
        encoder: backbone, views, seed and caching; ``encoder.skipped`` names the images that could not be read.
        shots: draw so many a class by the published rule with the encoder's seed; ``None`` takes every item.
        templates: prompts for the text weights, with ``{}`` for the class name (needs a backbone).
        text: a feature table of text features instead, labelled by class: one or more prompts a class. Its classes, in
            its order, are the index's; a class without an image is allowed, an unknown label is not.
        index: FAISS factory string, ``Classes``, or ``auto`` (:func:`keys.auto_for`), by default ``Flat``;
            of a LanceDB store as :func:`draft.index_kind` has it, by default ``auto``.
        dtype: of the stored keys, ``float32`` or ``float16``.
        alpha: residual ratio.
        beta: sharpness.
        normalize: the units of alpha and beta (see :func:`defaults.plain_settings`), by default the paper's where one
            of them is given: the other is then 1.0 or 5.5. Else they follow from the shots' own affinities (``both``).
        fit: ``auto`` fits metric, values and settings to the shots (:func:`closed_form.fit`); ``none`` is Tip-Adapter,
            and the default where alpha, beta or normalize is given.
        metric: ``none`` or ``within``, where the fit is not to choose.
        values: ``one-hot`` or ``solved``, where the fit is not to choose.
        k: how many keys a query uses by default, or ``all``; ``None`` is what goes with the choice of ``index="auto"``,
            all with any other.
        logit_scale: the backbone's own by default, 100 where there is none.
        device: of the classifier that is returned, for which ``auto`` chooses an index.

    Raises:
        InputError, UsageError, BackboneError: as their messages say; nothing was changed.
        StoreError: the folder cannot be written, or is being written by another process.
    """
    check_choice("dtype", dtype, Dtype)
    if logit_scale is None and encoder.backbone is not None:
        logit_scale = encoder.backbone.logit_scale
    settings = Settings().override(alpha=alpha, beta=beta, logit_scale=logit_scale, k=k)
    form = normalize or ("both" if alpha is None and beta is None else "none")
    check_choice("normalize", form, Normalize)
    place = places.at(out)
    fitted = {"metric": metric, "values": values} if _fitting(fit, (metric, values), (alpha, beta, normalize)) else None
    words = _text(source, encoder, templates, text)
    source, ids = _drawn(source, words.class_names, text, shots, encoder.seed)
    made = _Made(source, encoder, ids, words, _Asked(settings, alpha, beta, form, k is not None), shots)
    if isinstance(place, places.LanceStore):
        _build_table(place, made, dtype, "auto" if index is None else index, fitted)
    else:
        _build_folder(place.folder, made, dtype, "Flat" if index is None else index, resolve_device(device), fitted)
    warn_of_spelling(out, words.class_names, words.class_names)
    return place.load(device=device)


class _Words(NamedTuple):
    """The classes in order, their text weights ``[c, d]``, the templates of the prompts, and where this comes from."""

    class_names: Sequence[str]
    weights: npt.NDArray[np.float32] | None
    templates: list[str]
    origin: str | None


@dataclass(frozen=True)
class _Asked:
    """Settings as they were asked for: ``alpha`` and ``beta`` in units of ``form``, or neither."""

    settings: Settings
    alpha: float | None
    beta: float | None
    form: Normalize
    keeps_k: bool

    def plain(self, statistics: Statistics | None, met: int | None) -> Settings:
        """The settings, with alpha and beta in plain units, and ``met`` keys where nothing was said of these."""
        alpha, beta = plain_settings(self.alpha, self.beta, self.form, statistics)
        return self.settings.override(alpha=alpha, beta=beta, k=None if self.keeps_k else met)


@dataclass(frozen=True)
class _Made:
    """The material of an index, wherever it is kept: items and their class ids ``[m]``, words, and what was asked."""

    source: Source
    encoder: Encoder
    ids: npt.NDArray[np.int64]
    words: _Words
    asked: _Asked
    shots: int | None

    @property
    def built(self) -> Built:
        """The way it is built, for the manifest."""
        drawn = self.shots is not None or self.encoder.views > 1
        return Built(self.source.name, self.shots, self.encoder.seed if drawn else 1, self.encoder.views)

    def described(self, statistics: Statistics | None) -> dict[str, Any]:
        """The provenance, with what is known when all items are read."""
        views, asked = self.encoder.views, self.asked
        return {
            "source": self.source.name,
            "dataset": self.source.dataset,
            "shots": self.shots,
            "seed": self.encoder.seed if self.shots is not None or views > 1 else None,
            "views": views,
            "text": self.words.origin,
            "alpha": provenance_of(asked.alpha, asked.form),
            "beta": provenance_of(asked.beta, asked.form),
            "affinity_other_classes": None if statistics is None else [statistics.mean, statistics.std],
            "skipped": [str(skipped) for skipped in self.encoder.skipped],
        }


def _drawn(
    source: Source, class_names: Sequence[str], text: str | os.PathLike[str] | None, shots: int | None, seed: int
) -> tuple[Source, npt.NDArray[np.int64]]:
    """The items that become keys, and their class ids ``[m]``."""
    source = source.known_as(class_names)
    ids = ids_in(source, class_names)
    _warn_of_layout(source, class_names, text)
    if shots is None:
        return source, ids
    drawn = draw_shots(ids, class_names, shots, seed)
    return source.take(drawn), ids[drawn]


def _build_table(
    place: places.LanceStore, made: _Made, dtype: Dtype, index: str, fitted: dict[str, Any] | None
) -> None:
    """Keys stream into the table as they come; a fit of these letters may write it again, with their points."""
    index_kind(index)
    with place.write() as writer:
        names, weights, templates, _ = made.words
        rows = _labelled_blocks(made, dtype)
        table = LanceDraft.create(writer, rows, names, weights, dtype, index if fitted is None else FLAT)
        statistics = table.statistics()
        table.settings = made.asked.plain(statistics, index_kind(index, table.n, len(names))[1])
        table.templates = templates
        table.backbone = _identity(made.source, made.encoder)
        table.provenance = made.described(statistics)
        table.built = replace(made.built, auto_index=table.built.auto_index)
        _warn_of_table(table)
        if fitted is not None:
            _warn_of_choice(fit_table(table, **fitted, factory=index))
        table.commit("build")


def _build_folder(
    folder: Path,
    made: _Made,
    dtype: Dtype,
    index: str,
    device: str,
    fitted: dict[str, Any] | None,
) -> None:
    """Keys are sorted by class in a file; then the index over them, or over what a fit of these letters makes."""
    source, encoder, names, weights = made.source, made.encoder, list(made.words.class_names), made.words.weights
    order = np.argsort(made.ids, kind="stable")  # keys are grouped by class: row r of the index is item order[r]
    with write(folder) as writer:
        keys, kept, digests = _write_keys(writer, source, encoder, order, dtype)
        order = order[kept]
        ids, d = made.ids[order], keys.shape[1]
        if weights is not None and weights.shape[1] != d:
            raise InputError(
                f"{source.name}: features of {d} values, but text weights of {weights.shape[1]}; "
                "they have to come from the same backbone"
            )
        _warn_of_bare(sorted(set(range(len(names))) - set(ids.tolist())), names)
        statistics = measure(keys, ids)
        factory, met = auto_for((len(keys), d), dtype, len(names), device) if index == "auto" else (index, None)
        columns = item_columns(source.items.take(pa.array(order)), digests)
        labels = label_table(names, ids, key_ids=order, views=encoder.views if source.table is None else 1, **columns)
        warn_of(duplicates(keys, labels))
        cache = CacheModel(
            keys=keys,
            labels=labels,
            class_names=names,
            text_weights=torch.zeros(len(names), d) if weights is None else torch.from_numpy(weights),
            index=index_over(keys, ids, len(names), BY_CLASS if fitted else factory, device="cpu"),
            settings=made.asked.plain(statistics, met),
            templates=made.words.templates,
            backbone=_identity(source, encoder),
            provenance=made.described(statistics),
            built=made.built,
        )
        if fitted is not None:
            _warn_of_choice(closed_form.fit(cache, **fitted, factory=factory))
        cache.commit(writer, "build")


def _warn_of_choice(choice: closed_form.Choice) -> None:
    for warning in choice.warnings:
        log.warning("%s", warning)


def _fitting(fit: FitName | None, letters: Sequence[str | None], settings: Sequence[float | str | None]) -> bool:
    """Whether a build fits. Raises UsageError for what does not go together."""
    if fit is not None:
        check_choice("fit", fit, FitName)
    given, wanted = any(setting is not None for setting in settings), any(letter is not None for letter in letters)
    if given and (fit == "auto" or wanted):
        raise UsageError("fit: finds alpha and beta itself; leave out alpha, beta and normalize, or the fit")
    if fit == "none" and wanted:
        raise UsageError("fit none: has neither metric nor values to choose")
    return not given and fit != "none"


def _warn_of_table(table: LanceDraft) -> None:
    """Warnings of a table that was just made."""
    _warn_of_bare(np.flatnonzero(table.classes.counts == 0).tolist(), table.class_names)
    if table.n <= FEW_KEYS:
        kept = table.in_memory()
        warn_of(duplicates(kept.keys, kept.labels))


def _warn_of_bare(classes: Sequence[int], class_names: Sequence[str]) -> None:
    if classes:
        log.warning(
            "%s no key: %s", counted(len(classes), "class", "has", "have"), few([class_names[i] for i in classes])
        )


def _warn_of_layout(source: Source, class_names: Sequence[str], text: str | os.PathLike[str] | None) -> None:
    """Say what a source probably should not be: of one class, of one photograph here and there, or the text."""
    counts = Counter(source.labels)
    if len(counts) == 1:
        log.warning("%s: holds one class only, %s: every answer will be that", source.name, class_names[0])
    single = [name for name, number in counts.items() if number == 1]
    if single and len(single) < len(counts):
        log.warning("%s: one photograph only of %s: nothing tells how well it is known", source.name, few(single))
    if text is not None and source.table is not None and len(single) == len(counts):
        rows = len(open_source(text))
        if rows > len(source):
            log.warning("%s has a row a class, and --text %s rows: have they been swapped?", source.name, f"{rows:,}")


def _labelled_blocks(made: _Made, dtype: Dtype) -> Iterator[tuple[pa.Table, npt.NDArray[np.float32]]]:
    """Labels and keys of what is read, a block at a time; shots are counted from block to block."""
    source, encoder, names = made.source, made.encoder, made.words.class_names
    following = np.zeros(len(names), dtype=np.int32)
    for block in encoder.blocks(source):
        _check_fits(block.features, dtype, source)
        ids, views = made.ids[block.positions], encoder.views if source.table is None else 1
        columns = item_columns(source.items.take(pa.array(block.positions)), block.digests)
        labels = label_table(names, ids, key_ids=block.positions, views=views, **columns)
        yield shots_after(labels, ids, following), block.features
        following += np.bincount(ids, minlength=len(names)).astype(np.int32)


def _check_fits(features: npt.NDArray[np.float32], dtype: Dtype, source: Source) -> None:
    if np.abs(features).max() > np.finfo(dtype).max:
        raise InputError(f"{source.name}: features hold values too large for {dtype}; use --dtype float32")


def read_text_table(
    path: str | os.PathLike[str], norms: Norms = "check"
) -> tuple[tuple[str, ...], npt.NDArray[np.float32]]:
    """Class names and text weights ``[c, d]`` of a table of text features, classes in order of first appearance.

    Rows of one class are prompts of norm 1 (or scaled to it, unless ``norms`` is ``check``): averaged, then normalised.
    Raises InputError where the table is none.
    """
    table = open_source(path)
    if table.table is None:
        raise InputError(f"{table.name}: has no column 'feature'; text weights are a feature table labelled by class")
    features = np.concatenate(list(read_features(table.table, "check" if norms == "check" else "unit")))
    rows: dict[str, list[int]] = {}
    for row, label in enumerate(table.labels):
        rows.setdefault(label, []).append(row)
    means = [mean_by_class(features[None, own], [name])[0] for name, own in rows.items()]
    return tuple(rows), np.stack(means)


def _text(
    source: Source, encoder: Encoder, templates: Sequence[str] | None, text: str | os.PathLike[str] | None
) -> _Words:
    """The classes and their text weights: from a table, from prompts, or none."""
    if text is not None:
        if templates:
            raise UsageError("text and templates: give one of them; a text table already holds the prompts' features")
        class_names, weights = read_text_table(text, encoder.norms)
        theirs, ours = table_identity(Path(text)), _identity(source, encoder)
        if theirs is not None and ours is not None:
            same_backbone(theirs, ours, str(text))
        return _Words(class_names, weights, [], str(text))
    if encoder.backbone is not None and (templates or encoder.backbone.has_text):
        prompts = list(check_templates(templates or DEFAULT_TEMPLATES))
        weights = text_weights(encoder.backbone, source.class_names, prompts)
        return _Words(source.class_names, weights, prompts, "templates")
    if templates:
        raise UsageError("templates: text weights from templates need a backbone; give --model")
    if encoder.backbone is not None:  # an image encoder alone was asked for
        return _Words(source.class_names, None, [], None)
    log.warning("no text weights (neither --text nor --model): the classes are told apart by the cache alone")
    return _Words(source.class_names, None, [], None)


def warn_of_spelling(place: Place, class_names: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Warn of ``new`` classes that are spelled almost as one before them is, and return these pairs."""
    pairs = spelled_alike(class_names)
    alike = {name: pairs[name] for name in new if name in pairs}
    for name, known in itertools.islice(alike.items(), SHOWN):
        rename = shlex.join(["retrieval-tip", "index", "rename", str(place), name, known])
        log.warning("%r is a new class beside %r; if they are one: %s", name, known, rename)
    if len(alike) > SHOWN:
        log.warning("%d more new classes are spelled almost as others are", len(alike) - SHOWN)
    return alike


def warn_of(duplicates: Duplicates) -> None:
    """Say which images are in two classes: one of the labels is wrong, or both are."""
    for line in describe_duplicates(duplicates):
        log.warning("in two classes: %s", line)


def draw_shots(ids: npt.NDArray[np.int64], class_names: Sequence[str], shots: int, seed: int) -> npt.NDArray[np.int64]:
    """Positions of the published draw of so many a class (:func:`shots.few_shot`), in the order of the source."""
    rare = [class_names[i] for i, times in Counter(ids.tolist()).items() if times < shots]
    if rare:
        have = counted(len(rare), "class", "has", "have")
        log.warning("%s fewer than %d images, so some repeat: %s", have, shots, few(rare))
    return np.sort(np.asarray(few_shot(ids.tolist(), shots, seed), dtype=np.int64))


def item_columns(items: pa.Table, digests: Sequence[str | None]) -> dict[str, Any]:
    """Columns that a source has of its items, as :func:`labels.label_table` takes them: sources, digests, further ones.

    Digests of the images that were read come after those that a table has.
    """
    if "digest" in items.column_names and pa.types.is_string(items["digest"].type):
        digests = items["digest"].to_pylist()
    extra = items.select([c for c in items.column_names if c not in (*LABEL_SCHEMA.names, "id")])
    return {"sources": items["source"], "digests": list(digests), "extra": extra}


def ids_in(source: Source, class_names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Class ids of the items of a source. Raises InputError for labels that are no class."""
    position = {name: i for i, name in enumerate(class_names)}
    labels = source.labels
    unknown = sorted(set(labels) - position.keys())
    if unknown:
        raise InputError(f"{source.name}: labels without text weights: {few(unknown)}; add them to the text table")
    return np.array([position[label] for label in labels], dtype=np.int64)


def _write_keys(
    writer: Writer, source: Source, encoder: Encoder, order: npt.NDArray[np.int64], dtype: Dtype
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], list[str | None]]:
    """Stream features into the keys' file; the keys, which of ``order`` they are, and their images' digests."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    blocks = encoder.blocks(source)
    first = next(blocks)
    shape = (len(order), first.features.shape[1])
    staged, array = writer.stage_array("keys", shape, dtype)
    present = np.zeros(len(order), dtype=bool)
    digests: list[str | None] = [None] * len(order)
    for block in itertools.chain([first], blocks):
        rows = place[block.positions]
        _check_fits(block.features, dtype, source)
        array[rows] = block.features
        present[rows] = True
        for row, digest in zip(rows.tolist(), block.digests, strict=True):
            digests[row] = digest
    kept = np.flatnonzero(present)
    if len(kept) < len(order):  # images that could not be read leave no hole
        whole, old = writer.stage_array("keys", (len(kept), shape[1]), dtype)
        for start in range(0, len(kept), KEY_BLOCK):
            old[start : start + KEY_BLOCK] = array[kept[start : start + KEY_BLOCK]]
        writer.discard(staged)
        staged, array = whole, old
    array.flush()  # type: ignore[attr-defined]  # a memmap
    del array
    sealed = writer.seal("keys", staged, len(kept))
    return np.load(sealed, mmap_mode="c"), kept, [digests[row] for row in kept]


def _identity(source: Source, encoder: Encoder) -> Identity | None:
    """The backbone that the features came from: the one in use, or the one that the table names."""
    if encoder.backbone is not None:
        return encoder.backbone.identity
    return table_identity(source.table) if source.table is not None else None


def provenance_of(given: float | None, form: str) -> str:
    """The origin of a setting, in words."""
    if given is not None:
        return "given" if form == "none" else f"given as {given:g}, normalize {form}"
    return "the paper's default" if form == "none" else f"default, normalize {form}"
