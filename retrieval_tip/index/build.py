"""Build an index from labelled images or features."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import pyarrow.compute as pc

from retrieval_tip.arrays import DoubleArray, IntArray
from retrieval_tip.backbones.base import Identity, Part, parts_of, resolve_device, same_backbone
from retrieval_tip.backbones.prompts import DEFAULT_TEMPLATES, check_templates
from retrieval_tip.data.groups import read_groups
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import UsageError
from retrieval_tip.fit.closed_form import FitRequest
from retrieval_tip.fit.scatter import pooled
from retrieval_tip.index import places
from retrieval_tip.index.items import (
    BuildInputs,
    ClassText,
    draw_shots,
    identity_of,
    ids_in,
    planned,
    read_text_table,
    warn_of_spelling,
)
from retrieval_tip.index.places import Place
from retrieval_tip.model import Index
from retrieval_tip.settings import BuildOptions
from retrieval_tip.store.sums import Sums
from retrieval_tip.wording import SHOWN, counted, few

log = logging.getLogger(__name__)


def build_index(
    source: Source,
    out: Place,
    reader: Reader,
    *,
    device: str = "auto",
    **options: Unpack[BuildOptions],
) -> Index:
    """Build an index from a labelled source. If ``out`` already contains an index, the result becomes its next version.

    Features are streamed from the encoder into the store, so a feature table can be larger than memory.

    Args:
        source: the labelled images or features (see :func:`sources.open_source`).
        out: the index folder, or the address of another store (see :mod:`store.address`).
        reader: sets the backbone, views, seed and cache. ``reader.skipped`` lists the images that cannot be read.
        device: the device of the returned classifier. With ``index="auto"``, the index type depends on the device.
        options: see :class:`settings.BuildOptions`.

    Raises InputError, UsageError or BackboneError if the input is invalid. Raises StoreError if ``out`` is not writable
    or if another process is writing to it. If an error occurs, ``out`` stays unchanged.
    """
    plan = planned(options)
    reader = replace(reader, parts=_parts(source, reader, plan))
    source = source.without([part.column for part in reader.parts])
    words = _text(source, reader, plan)
    source, ids = _shots(source.known_as(words.class_names), words.class_names, plan, reader.seed)
    backbone = identity_of(source, reader)
    fit = FitRequest(
        plan["metric"],
        plan["values"],
        plan["class_prior"] or "even",
        prior_of(plan["prior"], backbone),
    )
    asked = None if plan["fit"] == "none" else fit
    groups = None if plan["groups"] is None else read_groups(plan["groups"], words.class_names)
    material = BuildInputs(
        source, reader, ids, words, plan, backbone, asked, resolve_device(device), groups
    )
    made = places.at(out).create(material)
    warn_of_spelling(out, words.class_names, words.class_names)
    return made


def _parts(source: Source, reader: Reader, plan: BuildOptions) -> tuple[Part, ...]:
    """Return the parts of a feature, if there are several encoders, or if a column of features has its own name."""
    known = () if reader.backbone is None else parts_of(reader.backbone)
    known = known if len(known) > 1 else ()
    if source.table is None:
        if plan["features"]:
            raise UsageError(
                f"features: {source.name} is no feature table; name the encoders with model"
            )
        return known
    if len(set(plan["features"])) < len(plan["features"]):
        raise UsageError(f"features: {','.join(plan['features'])} names a column twice")
    asked = [Part(0, column) for column in plan["features"]]
    parts = source.table.parts(asked or known)
    return parts if asked or len(parts) > 1 else ()


def _shots(
    source: Source, class_names: Sequence[str], plan: BuildOptions, seed: int
) -> tuple[Source, IntArray]:
    """Return the items of a source that become keys, and their class ids."""
    ids = ids_in(source, class_names)
    _warn_of_layout(source, class_names)
    if plan["shots"] is None:
        return source, ids
    drawn = draw_shots(ids, class_names, plan["shots"], seed)
    return source.take(drawn), ids[drawn]


def _warn_of_layout(source: Source, class_names: Sequence[str]) -> None:
    counts = Counter(source.items.group_by(["label", "source"]).aggregate([])["label"].to_pylist())
    times = pc.value_counts(source.items["source"])
    repeated = times.filter(pc.greater(times.field("counts"), 1)).field("values")
    if source.table is not None and len(repeated):
        log.warning(
            "%s: %s rows have %s (%s); rows with the same id count as one photo",
            source.name,
            f"{len(source):,}",
            counted(len(times), "id"),
            few(repeated.slice(0, SHOWN).to_pylist(), len(repeated)),
        )
    if len(counts) == 1:
        log.warning(
            "%s: there is only one class, %s, so every answer will be that class",
            source.name,
            class_names[0],
        )
    single = [name for name, number in counts.items() if number == 1]
    if single and len(single) < len(counts):
        log.warning(
            "%s: there is only one photo of %s, so its accuracy cannot be estimated",
            source.name,
            few(single),
        )


def _text(source: Source, reader: Reader, plan: BuildOptions) -> ClassText:
    templates = plan["templates"]
    backbone = reader.backbone
    if plan["text"] is not None:
        class_names, weights = read_text_table(
            plan["text"], reader.norms, identity_of(source, reader), reader.parts
        )
        return ClassText(class_names, weights, [], str(plan["text"]))
    if backbone is not None and (templates or backbone.has_text):
        prompts = list(check_templates(templates or DEFAULT_TEMPLATES))
        weights = reader.text_weights(source.class_names, prompts)
        return ClassText(source.class_names, weights, prompts, "templates")
    if templates:
        raise UsageError("templates: text weights from templates need a backbone; give --model")
    if backbone is None:
        log.warning(
            "no text weights (neither --text nor --model is given): answers depend on the shots only"
        )
    return ClassText(source.class_names, None, [], None)


def prior_of(indexes: Place | Sequence[Place], backbone: Identity | None) -> DoubleArray | None:
    """Return the scatter of the photos of other indexes, or ``None`` if there are no indexes.

    Raises BackboneError if an index has another ``backbone``. Raises InputError if no class has two photos.
    """
    found = []
    for place in [indexes] if isinstance(indexes, str | os.PathLike) else indexes:
        other = places.at(place).load(device="cpu")
        same_backbone(other.backbone, backbone, f"prior {place}")
        blocks = (
            (keys, labels["class_id"].to_numpy().astype(np.int64))
            for labels, keys in other.rows.blocks()
        )
        found.append(Sums.of(blocks, len(other.class_names), other.d))
    return pooled(found) if found else None
