"""Collect the inputs of a build, which are a labelled source, text weights and settings, and write them to a folder."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from retrieval_tip.arrays import FloatArray, IntArray, KeyArray, slices
from retrieval_tip.backbones.base import (
    Backbone,
    Identity,
    Part,
    same_backbone,
    text_side_by_side,
    width_of,
)
from retrieval_tip.backbones.prompts import mean_by_class
from retrieval_tip.data.feature_table import FeatureTable
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import few_shot
from retrieval_tip.data.sources import Source, check_exists, open_source, spelled_alike
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import FitRequest
from retrieval_tip.levels import Levels
from retrieval_tip.model import Index
from retrieval_tip.records import Built
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.defaults import Statistics, default_settings
from retrieval_tip.retrieval.duplicates import Duplicates, describe_duplicates, duplicates
from retrieval_tip.retrieval.keys import KEY_BLOCK, auto_for
from retrieval_tip.retrieval.rows import ArrayRows, Rows
from retrieval_tip.retrieval.vector_index import BY_CLASS, FLAT_FACTORY
from retrieval_tip.settings import (
    OVERRIDES,
    BuildOptions,
    Dtype,
    FitName,
    Norms,
    Settings,
    check_choice,
)
from retrieval_tip.store.labels import LABEL_SCHEMA, label_table, shots_after
from retrieval_tip.store.versions import Versions, Writer
from retrieval_tip.wording import SHOWN, command_line, counted, few

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemColumns:
    """Columns of the items in a source, named as in the label store."""

    sources: pa.ChunkedArray
    digests: list[str | None]
    extra: pa.Table

    @classmethod
    def of(cls, items: pa.Table, digests: Sequence[str | None]) -> ItemColumns:
        """Return the columns of a table of items. If the table has a column ``digest``, it overrides ``digests``."""
        if "digest" in items.column_names and pa.types.is_string(items["digest"].type):
            digests = items["digest"].to_pylist()
        extra = items.select(
            [c for c in items.column_names if c not in (*LABEL_SCHEMA.names, "id")]
        )
        return cls(items["source"], list(digests), extra)

    def take(self, rows: IntArray) -> ItemColumns:
        """Return the columns of the items at the given positions."""
        places = pa.array(rows)
        return ItemColumns(
            self.sources.take(places), [self.digests[row] for row in rows], self.extra.take(places)
        )


class ClassText(NamedTuple):
    """The classes in order, their text weights, the prompt templates, and the source of the text weights."""

    class_names: Sequence[str]
    weights: FloatArray | None
    templates: list[str]
    origin: str | None


def planned(options: BuildOptions) -> BuildOptions:
    """Return all options of a build, with their defaults.

    Raises UsageError if an option is invalid, or if options exclude each other, TypeError if one is unknown, and
    InputError if a path does not exist.
    """
    if unknown := sorted(options.keys() - BuildOptions.__annotations__.keys()):
        raise TypeError(f"{unknown[0]!r} is not an option of a build")
    plan: BuildOptions = {**_DEFAULTS, **options}
    check_choice("dtype", plan["dtype"], Dtype)
    fit = plan["fit"]
    if fit is not None:
        check_choice("fit", fit, FitName)
    ways = [plan["metric"], plan["values"], plan["class_prior"]]
    wanted = ways != [None, None, None] or bool(plan["prior"])
    plain = plan["alpha"] is not None or plan["beta"] is not None
    if plain and (fit == "auto" or wanted):
        raise UsageError("fit: sets alpha and beta itself; remove alpha and beta, or give fit none")
    if fit == "none" and wanted:
        raise UsageError(
            "fit none: uses neither metric, values nor a prior; remove them, or give fit auto"
        )
    if plan["text"] is not None and plan["templates"]:
        raise UsageError(
            "text and templates: give only one; a text table already contains features of prompts"
        )
    settings_of(plan, None)
    if plan["values"] == "solved" and plan["index"] == BY_CLASS:
        raise UsageError(
            "values solved: need a search over all keys, and Classes searches some; give values one-hot"
        )
    prior = [plan["prior"]] if isinstance(plan["prior"], str | os.PathLike) else plan["prior"]
    for path in (plan["text"], plan["groups"], *prior):
        check_exists(path)
    plan["fit"] = fit or ("none" if plain else "auto")
    return plan


_DEFAULTS = cast("BuildOptions", dict.fromkeys(BuildOptions.__annotations__))
_DEFAULTS |= {"templates": (), "dtype": "float32", "prior": (), "features": ()}


def settings_of(plan: BuildOptions, backbone: Backbone | None) -> Settings:
    """Return the settings before a fit. The logit scale defaults to the one of the backbone."""
    given: dict[str, Any] = {
        name: value for name, value in plan.items() if name in (*OVERRIDES, "logit_scale")
    }
    if given["logit_scale"] is None and backbone is not None:
        given["logit_scale"] = backbone.logit_scale
    return Settings().override(**given)


@dataclass(frozen=True)
class BuildInputs:
    """The inputs of a build, which are the same for every kind of store.

    ``ids`` has one class id per item of the source. ``fit`` is ``None`` for plain Tip-Adapter.
    """

    source: Source
    reader: Reader
    ids: IntArray
    words: ClassText
    plan: BuildOptions
    backbone: Identity | None
    fit: FitRequest | None
    device: str
    groups: Levels | None = None

    @property
    def is_random(self) -> bool:
        """Whether the index depends on the seed."""
        return self.plan["shots"] is not None or self.reader.views > 1

    def settings(self, statistics: Statistics | None, k: int | None) -> Settings:
        """Return the settings before a fit. ``k`` is used as k if no k was given."""
        plan = self.plan
        settings = settings_of(plan, self.reader.backbone)
        alpha, beta = default_settings(statistics, plan["alpha"], plan["beta"])
        return settings.override(alpha=alpha, beta=beta, k=k if plan["k"] is None else None)

    def blocks(self) -> Iterator[FeatureBlock]:
        """Yield the items in blocks of features.

        Raises InputError if a feature overflows the dtype, or if the text weights do not match the features.
        """
        weights = self.words.weights
        for block in self.reader.blocks(self.source):
            if weights is not None and weights.shape[1] != block.features.shape[1]:
                widths = f"features have {block.features.shape[1]} values, text weights {weights.shape[1]}"
                raise InputError(f"{self.source.name}: {widths}; use one backbone")
            if np.abs(block.features).max() > np.finfo(self.plan["dtype"]).max:
                dtype = self.plan["dtype"]
                raise InputError(
                    f"{self.source.name}: feature values overflow {dtype}; use --dtype float32"
                )
            yield block

    def labelled_blocks(self) -> Iterator[tuple[pa.Table, FloatArray]]:
        """Yield the labels and the keys in blocks. Shot numbers continue from block to block."""
        following = np.zeros(len(self.words.class_names), dtype=np.int32)
        for block in self.blocks():
            ids = self.ids[block.positions]
            labels = self.labels(block.positions, block.digests)
            yield shots_after(labels, ids, following), block.features
            following += np.bincount(ids, minlength=len(following)).astype(np.int32)

    def labels(self, rows: IntArray, digests: Sequence[str | None]) -> pa.Table:
        """Return the label store of the items at ``rows``, in that order."""
        columns = ItemColumns.of(self.source.items.take(pa.array(rows)), digests)
        views = self.reader.views if self.source.table is None else 1
        return label_table(
            self.words.class_names, self.ids[rows], key_ids=rows, views=views, **vars(columns)
        )

    def described(self, statistics: Statistics | None) -> dict[str, object]:
        """Return the provenance. Call this only after all items have been read."""
        plan = self.plan
        return {
            "source": self.source.name,
            "shots": plan["shots"],
            "seed": self.reader.seed if self.is_random else None,
            "views": self.reader.views,
            "precision": {"keys": precision_of(self.source, self.reader)},
            "text": self.words.origin,
            "alpha": "default" if plan["alpha"] is None else "given",
            "beta": "default" if plan["beta"] is None else "given",
            "affinity_other_classes": None
            if statistics is None
            else [statistics.mean, statistics.std],
            "skipped": [str(skipped) for skipped in self.reader.skipped],
        }

    def index(self, rows: Rows, statistics: Statistics | None, k: int | None) -> Index:
        """Return the index of all items, before it is fitted, and warn about classes without keys.

        ``k`` is used as k if no k was given.
        """
        names, weights, templates, _ = self.words
        reader = self.reader
        seed = reader.seed if self.is_random else 1
        built = Built(self.source.name, self.plan["shots"], seed, reader.views)
        index = Index(
            rows,
            list(names),
            inputs.text_weights(weights, len(names), rows.d),
            settings=self.settings(statistics, k),
            templates=templates,
            backbone=self.backbone,
            provenance=self.described(statistics),
            built=built,
            parts=reader.parts,
            groups=self.groups,
        )
        if bare := index.bare:
            log.warning("%s no key: %s", counted(len(bare), "class", "has", "have"), few(bare))
        return index


def draw_shots(ids: IntArray, class_names: Sequence[str], shots: int, seed: int) -> IntArray:
    """Draw shots for each class with :func:`source.few_shot`, and return their positions in source order."""
    rare = [class_names[i] for i, times in Counter(ids.tolist()).items() if times < shots]
    if rare:
        have = counted(len(rare), "class", "has", "have")
        log.warning(
            "%s fewer than %d images, so some images are repeated: %s", have, shots, few(rare)
        )
    return np.sort(np.asarray(few_shot(ids.tolist(), shots, seed), dtype=np.int64))


def ids_in(source: Source, class_names: Sequence[str]) -> IntArray:
    """Return the class id of each item in a source. Raises InputError if a label is unknown."""
    position = {name: i for i, name in enumerate(class_names)}
    labels = source.labels
    unknown = sorted(set(labels) - position.keys())
    if unknown:
        raise InputError(
            f"{source.name}: some labels have no text weights: {few(unknown)}; add them to the text table"
        )
    return np.array([position[label] for label in labels], dtype=np.int64)


def identity_of(source: Source, reader: Reader) -> Identity | None:
    """Return the identity of the encoder's backbone or, if it has none, of the backbone named in the table."""
    if reader.backbone is not None:
        return reader.backbone.identity
    return source.table.identity(reader.parts) if source.table is not None else None


def precision_of(source: Source, reader: Reader) -> str | None:
    """Return the precision in which the photos of a source were encoded, or ``None`` for a feature table."""
    return None if source.paths is None or reader.backbone is None else reader.backbone.precision


def read_text_table(
    path: str | os.PathLike[str],
    norms: Norms = "check",
    backbone: Identity | None = None,
    parts: Sequence[Part] = (),
) -> tuple[tuple[str, ...], FloatArray]:
    """Read the class names and text weights from a table of text features, in order of first appearance.

    Each row is the feature of a prompt. The rows of each class are averaged and then normalised. If ``norms`` is
    ``check``, the rows must have unit norm. Otherwise, they are normalised. If features have several ``parts``, the
    table can have a column for some of them, and the others have no text. Raises InputError if the file is invalid.
    Raises BackboneError if the table names another backbone than ``backbone``.
    """
    source = open_source(path)
    if (table := source.table) is None:
        raise InputError(
            f"{source.name}: no column 'feature'; give a feature table labelled by class"
        )
    prompts: dict[str, list[int]] = {}
    for row, label in enumerate(source.labels):
        prompts.setdefault(label, []).append(row)

    def weights(*columns: Part) -> FloatArray:
        reader = Reader(norms="check" if norms == "check" else "unit", parts=columns)
        features = reader.encode(source).features
        means = [mean_by_class(features[None, rows], [name]) for name, rows in prompts.items()]
        return np.concatenate(means)

    if len(parts) < 2 or width_of(table.parts()) == width_of(parts):
        same_backbone(table.identity(), backbone, str(path))
        return tuple(prompts), weights()
    with_text = [part for part in parts if _has_column(table, part)]
    if not with_text:
        raise InputError(
            f"{source.name}: has no column of text features of an encoder of this index"
        )
    joined = []
    for part in parts:
        empty = np.zeros((len(prompts), part.width), np.float32)
        joined.append(weights(part) if part in with_text else empty)
    return tuple(prompts), text_side_by_side(joined)


def _has_column(table: FeatureTable, part: Part) -> bool:
    try:
        return table.parts([part])[0].width == part.width
    except InputError:
        return False


def warn_of(duplicates: Duplicates) -> None:
    """Warn about images that are in two classes, because at least one of their labels is wrong."""
    warn(f"in two classes: {line}" for line in describe_duplicates(duplicates))


def warn_of_spelling(
    place: str | os.PathLike[str], class_names: Sequence[str], new: Sequence[str]
) -> dict[str, str]:
    """Warn about ``new`` classes whose name is almost the name of an earlier class, and return these pairs."""
    pairs = spelled_alike(class_names)
    alike = {name: pairs[name] for name in new if name in pairs}
    for name, earlier in itertools.islice(alike.items(), SHOWN):
        rename = command_line("index", "rename", place, name, earlier)
        log.warning(
            "%r is a new class, spelled almost like %r; to merge them: %s", name, earlier, rename
        )
    if len(alike) > SHOWN:
        log.warning("%d more new classes are spelled almost like others", len(alike) - SHOWN)
    return alike


def warn(lines: Iterable[str]) -> None:
    """Log each line as a warning."""
    for line in lines:
        log.warning("%s", line)


def create(folder: Versions, made: BuildInputs) -> Index:
    """Build the next version of a folder. The keys are sorted by class."""
    # group the keys by class, so that row r of the index is item order[r]
    order = np.argsort(made.ids, kind="stable")
    with folder.write() as writer:
        keys, kept, digests = _write_keys(writer, made, order)
        order = order[kept]
        c = len(made.words.class_names)
        factory = made.plan["index"] or "Flat"
        k = None
        if factory == "auto":
            factory, k = auto_for(keys.shape, made.plan["dtype"], c, made.device)
        # a fit indexes the transformed keys instead
        early = factory if made.fit is None else FLAT_FACTORY
        rows = ArrayRows(keys, made.labels(order, digests)).indexed(c, early)
        index = made.index(rows, rows.statistics(), k)
        warn_of(duplicates(keys, rows.labels))
        if made.fit is not None:
            index, choice = closed_form.fit(index, made.fit, factory=factory)
            warn(choice.warnings)
        return index.committed(writer, "build").on(made.device)


def _write_keys(
    writer: Writer, made: BuildInputs, order: IntArray
) -> tuple[KeyArray, IntArray, list[str | None]]:
    """Stream features into the file of keys. Return the keys, their positions in ``order`` and the image digests."""
    place = np.argsort(order)
    blocks = made.blocks()
    first = next(blocks)
    shape = (len(order), first.features.shape[1])
    array = writer.stage_array("keys", shape, made.plan["dtype"])
    present = np.zeros(len(order), dtype=bool)
    digests = np.full(len(order), None)
    for block in itertools.chain([first], blocks):
        rows = place[block.positions]
        array[rows] = block.features
        present[rows] = True
        digests[rows] = block.digests
    kept = np.flatnonzero(present)
    if len(kept) < len(order):  # close the gaps that unreadable images left
        whole = writer.stage_array("keys", (len(kept), shape[1]), made.plan["dtype"])
        for block_of_rows in slices(len(kept), KEY_BLOCK):
            whole[block_of_rows] = array[kept[block_of_rows]]
        gaps = Path(str(array.filename))
        array = whole  # Windows does not delete a file that is mapped
        gaps.unlink(missing_ok=True)  # a full disk may have removed it
    return writer.seal_array("keys", array), kept, digests[kept].tolist()
