"""Change an existing index. Each function writes one new version. If a function fails, the index stays unchanged.

Slow work such as encoding is done before the index is locked, so that other writers do not have to wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.arrays import BoolArray, FloatArray
from retrieval_tip.backbones.base import Backbone, same_backbone
from retrieval_tip.backbones.prompts import check_templates
from retrieval_tip.data.feature_table import check_backbone
from retrieval_tip.data.groups import read_groups
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source, spelled_alike
from retrieval_tip.data.tables import items_of, reading, texts
from retrieval_tip.errors import InputError, StoreError, UsageError, check_count
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import FitRequest
from retrieval_tip.index import places
from retrieval_tip.index.added_photos import remove_unused
from retrieval_tip.index.build import prior_of
from retrieval_tip.index.items import (
    ItemColumns,
    draw_shots,
    ids_in,
    precision_of,
    read_text_table,
    warn_of_spelling,
)
from retrieval_tip.index.joining import joined_index
from retrieval_tip.index.places import TRIES, Changed, Place
from retrieval_tip.model import Index
from retrieval_tip.settings import ClassPrior, Dtype, MetricName, ValuesName, check_choice
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.labels import PICKED, in_words
from retrieval_tip.store.query import rows_where
from retrieval_tip.store.versions import made_now
from retrieval_tip.wording import counted, few, show

GROWN, REFITTED, DUE = 1.125, 4096, 2.0
"""Factor of growth after which a change fits the index again, and maximum number of keys for this.

A fit of that many keys takes a few seconds. The last constant is the factor of growth after which a fit is suggested,
if it is not automatic.
"""
COMPARED = 1 << 18
"""Maximum number of keys to compare with new features."""


@dataclass(frozen=True)
class Collected:
    """The result of :func:`gc`: the deleted ``versions``, the number of deleted ``photos``, and the ``freed`` bytes."""

    versions: list[int]
    photos: int
    freed: int


def add(
    folder: Place,
    source: Source,
    reader: Reader,
    *,
    text: Place | None = None,
    shots: int | None = None,
    base: Index | None = None,
) -> Changed:
    """Add the labelled images or features of a source. New classes are appended in source order.

    Items that the index already has under the same label are skipped. Images are compared by the digest of their bytes.
    Features without a digest are compared by their stored values, unless their classes have very many keys.

    Labels are compared exactly. A label with a different spelling creates a new class and causes a warning. If the
    index has text weights, the text weights of new classes are read from ``text`` or computed from the templates of the
    index with the encoder's backbone.

    Args:
        folder: the index.
        source: the labelled images or features.
        reader: sets the backbone (the same as for the index), the views and the cache. ``reader.skipped`` lists the
            images that could not be read.
        text: a table of text features, labelled by class, for the new classes.
        shots: the number of shots per class, drawn with CoOp's sampling rule and the encoder's seed. ``None`` uses
            every item.
        base: the index, if it is open. It is not loaded again unless it has changed.

    Raises InputError, UsageError or BackboneError if the input is invalid. Raises StoreError under the same conditions
    as :meth:`Versions.write`.
    """
    store = places.at(folder)
    base = base or store.load(device="cpu", verify="fast")
    reader = replace(reader, parts=base.parts)
    check_backbone(base.backbone, base.d, reader.backbone, [source], reader.parts)
    source = source.without([part.column for part in reader.parts])
    weights = _weights_of(source.class_names, base, reader, text)
    _new_classes(source.class_names, base, weights)
    if shots is not None:
        ids = ids_in(source, source.class_names)
        source = source.take(draw_shots(ids, source.class_names, shots, reader.seed))
    block = reader.encode(source)
    items = source.items.take(pa.array(block.positions))
    columns = ItemColumns.of(items, block.digests)
    views = reader.views if source.table is None else 1
    labels = np.array(items["label"].to_pylist(), dtype=object)

    def revise(index: Index) -> Changed:
        known = _known(index, labels, columns.digests, block.features)
        rows = np.flatnonzero(~known)
        new = NewKeys(
            block.features[rows],
            labels[rows].tolist(),
            views=views,
            precision=precision_of(source, reader),
            **vars(columns.take(rows)),
        )
        classes = _new_classes(source.class_names, index, weights)
        changed = _with_keys(index, Edits(classes=classes, add=new if len(rows) else None))
        return replace(changed, known=int(known.sum()))

    added = store.change(revise, base=base, tries=TRIES)
    return replace(added, alike=warn_of_spelling(folder, added.index.class_names, added.classes))


def _with_keys(before: Index, edits: Edits) -> Changed:
    """Add keys and classes, and look for images that are also in another class."""
    changed = _edited(before, edits, {})
    rows = changed.index.rows
    keys = changed.index.retrieval.keys
    found = rows.duplicates_of(changed.key_ids, keys) if changed.key_ids else None
    return replace(changed, duplicates=found)


def _edited(before: Index, edits: Edits, now: Mapping[int, str]) -> Changed:
    """Apply edits, and fit the index again if they have outdated its fit.

    ``now`` has the labels of the keys that move or leave. Read them first, because edits may change a table.
    """
    assert before.next_key_id is not None
    labels = edits.label_changes(now, before.next_key_id)
    what = in_words(labels.values(), before.backbone)
    if edits.classes and not labels:
        what = counted(len(edits.classes), "new class")
    if not what:
        return Changed(before, "")
    after, fitted = _fitted_again(before, before.edited(edits))
    return Changed(
        after, what, key_ids=[*labels], labels=labels, classes=[*edits.classes], **fitted
    )


def _fitted_again(before: Index, after: Index) -> tuple[Index, dict[str, Any]]:
    """Fit an index again if edits have outdated its fit, and return it with ``fit`` and ``fit_due``."""
    if after.fitted is None:
        return after, {}
    automatic = after.n <= REFITTED and after.fitted.automatic
    grown = after.n >= (GROWN if automatic else DUE) * after.fitted.keys
    bare_before = [name for name in before.bare if name in after.class_names]
    if not grown and (not after.has_text or after.bare == bare_before):
        return after, {}
    if not automatic:
        return after, {"fit_due": True}
    if grown:
        after, choice = closed_form.fit(after, FitRequest(class_prior=after.fitted.class_prior))
    else:
        after, choice = closed_form.refit(after, after.settings.beta)
    return after, {"fit": choice}


def _opened(store: places.Store, base: Index | None, backbone: Backbone | None) -> Index:
    """Return the current version. Raises BackboneError if it does not fit the ``backbone``."""
    base = base or store.load(device="cpu", verify="fast")
    check_backbone(base.backbone, base.d, backbone, [])
    return base


@dataclass(frozen=True)
class PhotoLabel:
    """A photo and its new label. A label of ``None`` removes the photo from the index.

    A photo is recognised by the ``digest`` of its bytes. ``feature``, a float32 array of shape ``[d]``, is only needed
    if the index does not have the photo yet. ``picked`` tells how the photo was chosen.
    """

    source: str
    digest: str
    label: str | None
    picked: str
    feature: FloatArray | None = None


def label(
    folder: Place,
    photos: Iterable[PhotoLabel],
    reader: Reader,
    unwanted: Collection[str] = (),
    last: Changed | None = None,
    base: Index | None = None,
) -> Changed:
    """Set the labels of photos in one new version: add new photos, relabel known ones, and remove some.

    If several keys have the digest of a photo, they all change.

    Args:
        folder: the index.
        photos: the photos and their labels. If a digest is repeated, the last label counts.
        reader: encodes the names of new classes, if the index has text weights. No image is read.
        unwanted: the classes to drop if they have no keys afterwards.
        last: the last change of the same labelling session. If it made the current version in this minute, the new
            version replaces that version.
        base: the index, if it is open.

    Raises InputError if the index has no key of a photo without a feature, if a class needs text weights and cannot
    have them, or if no key would remain.
    """
    store = places.at(folder)
    wanted = {photo.digest: photo for photo in photos}
    base = _opened(store, base, reader.backbone)
    names = list(dict.fromkeys(photo.label for photo in wanted.values() if photo.label is not None))
    weights = _weights_of(names, base, reader, None)

    def revise(index: Index) -> Changed:
        rows = index.having("digest", wanted).to_pylist()
        present = {row["digest"] for row in rows}
        labelled = [photo for photo in wanted.values() if photo.label is not None]
        fresh = [photo for photo in labelled if photo.digest not in present]
        now = {row["key_id"]: row["label"] for row in rows}
        new = {row["key_id"]: wanted[row["digest"]].label for row in rows}
        edits = Edits(
            classes=_new_classes(names, index, weights),
            add=_keys_of(fresh, reader) if fresh else None,
            move={key_id: name for key_id, name in new.items() if name not in (None, now[key_id])},
            remove=[key_id for key_id, name in new.items() if name is None],
            drop=set(unwanted).difference(names),
        )
        if not fresh and len(edits.remove) == index.n:
            raise InputError("it is the only label; label another photo first")
        return _continued(_edited(index, edits, now), index, last)

    return store.change(revise, base=base, tries=TRIES)


def _continued(changed: Changed, index: Index, last: Changed | None) -> Changed:
    """Join a change of an index with the ``last`` one, if that made the current version in this minute."""
    if last is None or last.version != index.version or index.manifest is None:
        return changed
    if not changed.what or not last.labels or not made_now(index.manifest):
        return changed
    labels = dict(last.labels)
    for key_id, (old, new) in changed.labels.items():
        first, _ = labels.get(key_id, (old, new))
        labels[key_id] = (first, new)
    what = in_words(labels.values(), index.backbone) or "no change"
    return replace(changed, what=what, labels=labels, replaces=True)


def _keys_of(photos: Sequence[PhotoLabel], reader: Reader) -> NewKeys:
    features = [photo.feature for photo in photos if photo.feature is not None]
    if len(features) < len(photos):
        lost = next(photo.source for photo in photos if photo.feature is None)
        raise InputError(
            f"{lost}: cannot be read, and the index does not have it; restore the file"
        )
    return NewKeys(
        np.stack(features),
        [photo.label for photo in photos],
        [photo.source for photo in photos],
        views=reader.views,
        digests=[photo.digest for photo in photos],
        extra=pa.table({PICKED: pa.array([photo.picked for photo in photos], pa.string())}),
        precision=None if reader.backbone is None else reader.backbone.precision,
    )


def merge(folder: Place, other: Place, *, base: Index | None = None) -> Changed:
    """Add the keys of another index that has the same backbone. New classes keep their text weights.

    The added keys get new ids and keep their source, digest, views and extra columns. Raises BackboneError if the
    backbones differ. Raises InputError if the other index has trained values, which are only valid for its own keys, or
    if this index has text weights and a new class has none.
    """
    target = places.at(folder)
    source = places.at(other)
    if target.resolved == source.resolved:
        raise UsageError(f"{show(other)}: an index cannot be merged with itself; give another one")
    theirs = source.load(device="cpu").in_memory()
    if theirs.values is not None and theirs.fitted is None:
        raise InputError(
            f"{show(other)}: has trained values, which cannot be merged; merge the version from before training"
        )
    base = base or target.load(device="cpu", verify="fast")
    same_backbone(theirs.backbone, base.backbone, show(other))
    weights = (
        dict(zip(theirs.class_names, theirs.text_weights.numpy(), strict=True))
        if theirs.has_text
        else {}
    )
    columns = ItemColumns.of(theirs.labels, theirs.labels["digest"].to_pylist())
    new = NewKeys(
        np.asarray(theirs.keys),
        theirs.labels["label"].to_pylist(),
        views=theirs.labels["views"].to_numpy(),
        **vars(columns),
    )

    def revise(index: Index) -> Changed:
        classes = _new_classes(theirs.class_names, index, weights)
        changed = _with_keys(index, Edits(classes=classes, add=new))
        return replace(changed, what=f"merged {show(str(source))}: {changed.what}")

    added = target.change(revise, base=base, tries=TRIES)
    return replace(added, alike=warn_of_spelling(folder, added.index.class_names, added.classes))


def remove(
    folder: Place,
    *,
    where: str | None = None,
    key_ids: Sequence[int] | None = None,
    base: Index | None = None,
) -> Changed:
    """Remove the keys that match an SQL condition over the label store, or that have the given ids.

    Classes are kept even if they become empty. The data of the keys is deleted from the folder together with the last
    version that contains them (see :meth:`Versions.collect`). Other stores only mark rows as removed, so call
    :func:`rebuild` first if the data must be deleted there. Raises UsageError unless exactly one valid argument is
    given. Raises InputError if no key matches or if a key cannot be removed (see :meth:`model.Index.edited`).
    """

    def revise(index: Index) -> Changed:
        chosen = _chosen(index, where, key_ids)
        return _edited(index, Edits(remove=chosen), _labels_of(index, chosen))

    return places.at(folder).change(revise, base=base, tries=TRIES)


def relabel(
    folder: Place,
    label: str | Mapping[int, str],
    *,
    where: str | None = None,
    key_ids: Sequence[int] | None = None,
    base: Index | None = None,
) -> Changed:
    """Move keys to other classes of the index, and return the keys that changed.

    You can give one label and select the keys as in :func:`remove`, or give a mapping from key ids to labels. Raises
    UsageError if ``where`` or ``key_ids`` is given together with a mapping. Raises InputError if a key id or a label is
    unknown.
    """
    if not isinstance(label, str | Mapping):
        raise UsageError(
            f"label: got {label!r}; give the name of a class, or a mapping from key ids to names"
        )
    if not isinstance(label, str) and (where is not None or key_ids is not None):
        raise UsageError("label: a mapping already names its keys; remove where and key_ids")

    def revise(index: Index) -> Changed:
        if isinstance(label, str):
            wanted = dict.fromkeys(_chosen(index, where, key_ids), label)
        else:
            wanted = {key_id: label[key_id] for key_id in _chosen(index, None, list(label))}
        return _moved(index, wanted, _labels_of(index, list(wanted)))

    return places.at(folder).change(revise, base=base, tries=TRIES)


def apply_audit(folder: Place, file: Place, *, base: Index | None = None) -> Changed:
    """Apply the labels that a table of :func:`audit.audit` suggests. This writes a single new version.

    ``file`` is a CSV or Parquet file that ``index audit --out`` wrote. You can edit it first. It needs
    the columns ``key_id``, ``label`` and ``suggested``. A row is skipped if its suggestion is empty or equal to the
    label.

    Raises InputError if the file cannot be read, if a key is unknown, is repeated or has been relabelled since the
    audit, or if a suggestion is not a class of the index.
    """
    name = show(file)
    place = places.at(folder)
    table, _ = items_of(Path(file), place.manifest().n)
    key_ids, labels = (texts(table, name, column) for column in ("key_id", "label"))
    with reading(f"{name}: column 'key_id'"):
        ids = key_ids.cast(pa.int64()).to_pylist()
    suggested = texts(table, name, "suggested", needed=False).to_pylist()
    old = dict(zip(ids, labels.to_pylist(), strict=True))
    if len(old) < len(ids):
        raise InputError(
            f"{name}: key {Counter(ids).most_common(1)[0][0]} is repeated; keep one row"
        )
    wanted = {
        key_id: new
        for key_id, new in zip(ids, suggested, strict=True)
        if new not in (None, old[key_id])
    }

    def revise(index: Index) -> Changed:
        now = _labels_of(index, list(wanted))
        for key_id in wanted:
            if now.get(key_id) != old[key_id]:
                found = (
                    f"is labelled {now[key_id]!r}, not {old[key_id]!r}"
                    if key_id in now
                    else "is not in this index"
                )
                raise InputError(f"{name}: key {key_id} {found}; run index audit again")
        return _moved(index, wanted, now, f"{name}: ")

    return place.change(revise, base=base, tries=TRIES)


def rename(
    folder: Place,
    old: str,
    new: str,
    backbone: Backbone | None = None,
    *,
    base: Index | None = None,
) -> Changed:
    """Rename a class, or merge it into the class that already has the new name. Return the ids of its keys.

    The class keeps its text weight. If it is merged into another class, it gets the text weight of that class. If you
    give a ``backbone``, the new name is encoded with the templates of the index instead.

    Raises InputError if there is no class ``old`` or if ``new`` is not a valid name. Raises UsageError if the name
    cannot be encoded. Raises BackboneError if the backbone differs from the backbone of the index.
    """
    text: dict[str, FloatArray] = {}
    if backbone is not None:
        base = _opened(places.at(folder), base, backbone)
        if not base.templates:
            raise UsageError(
                f"{folder}: its text weights did not come from templates; rename without a backbone"
            )
        text = {new: Reader(backbone).text_weights([new], base.templates)[0]}

    def revise(index: Index) -> Changed:
        merged = new in index.class_names
        if old == new and merged:
            return Changed(index, "")
        key_ids = index.find([old])["key_id"].to_pylist() if old in index.class_names else []
        after = index.edited(Edits(rename=(old, new), text=text))
        fitted = dict[str, Any]()
        if merged:
            after, fitted = _fitted_again(index, after)
        what = f"merged {old} into {new}" if merged else f"renamed {old} to {new}"
        what += ", with a new text weight" if text else ""
        return Changed(after, what, key_ids=sorted(key_ids), merged=merged, **fitted)

    return places.at(folder).change(revise, base=base, tries=TRIES)


def configure(
    folder: Place,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    k: int | Literal["all"] | None = None,
    tail: bool | None = None,
    temperature: float | None = None,
    templates: Sequence[str] = (),
    groups: Place | bytes | None = None,
    backbone: Backbone | None = None,
    base: Index | None = None,
) -> Changed:
    """Change settings of an index. ``None`` keeps the current value of a setting.

    If you give ``templates`` and a ``backbone``, the text weights are recomputed. ``groups`` is a table of groups of
    classes (see :class:`settings.BuildOptions`).

    If the index is fitted, a new beta also refits the parts that depend on it (see :func:`closed_form.refit`). They are
    the solved values, alpha, the temperature and the ``no_match`` threshold. An alpha or temperature that you also give
    is set after the refit.

    Raises UsageError if nothing is given, if a setting is invalid, or if templates are given but no backbone. Raises
    BackboneError if the backbone differs from the backbone of the index.
    """
    asked = {"alpha": alpha, "beta": beta, "k": k, "tail": tail, "temperature": temperature}
    settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if not (settings or templates or groups):
        raise UsageError(
            "nothing to set: give alpha, beta, k, tail, temperature, templates or groups"
        )
    prompts = list(check_templates(templates)) if templates else []
    weights: dict[str, FloatArray] = {}
    store = places.at(folder)
    if prompts:
        if backbone is None:
            raise UsageError("templates: text weights from templates need a backbone; give --model")
        base = _opened(store, base, backbone)
        names = base.class_names
        weights = dict(zip(names, Reader(backbone).text_weights(names, prompts), strict=True))

    def revise(index: Index) -> Changed:
        choice = None
        what = [_shown(name, value) for name, value in settings.items()]
        if index.fitted is not None and beta is not None and beta != index.settings.beta:
            index, choice = closed_form.refit(index, beta)
        if settings:
            chosen = not settings.keys() <= {"k", "tail"}
            index = index.with_settings(index.settings.override(**settings), chosen=chosen)
        marks = dict.fromkeys(settings, "given")
        if prompts:
            if weights.keys() != set(index.class_names):
                raise StoreError(f"{folder}: its classes have changed in the meantime; try again")
            index = index.edited(Edits(text=weights, templates=prompts))
            what.append(counted(len(prompts), "template"))
            marks["text"] = "templates"
        levels = index.groups
        if groups is not None:
            levels = read_groups(groups, index.class_names)
            what.append(f"groups by {', '.join(levels.levels[1:])}")
        index = index.altered(provenance=index.provenance | marks, groups=levels)
        return Changed(index, f"set {', '.join(what)}", fit=choice)

    return store.change(revise, base=base)


def fit_index(
    folder: Place,
    *,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    class_prior: ClassPrior | None = None,
    prior: Sequence[Place] = (),
    validation: Source | None = None,
    reader: Reader | None = None,
    base: Index | None = None,
) -> Changed:
    """Fit the metric, values and settings of an index with :func:`closed_form.fit`, and write a new version.

    For ``metric``, ``values``, ``class_prior`` and ``prior``, see :class:`settings.BuildOptions`. ``class_prior``
    defaults to the choice of the previous fit, and the scatter of a ``prior`` is kept for later fits. ``validation``
    are labelled images or features to use for the selection instead of the held-out shots. They require a ``reader``,
    which sets the backbone (the same as for the index) and the cache.

    Raises the errors of :func:`closed_form.fit`. If an error occurs, the index stays unchanged.
    """
    store = places.at(folder)
    queries = None
    version = None
    base = base or store.load(device="cpu", verify="fast")
    before = "even" if base.fitted is None else base.fitted.class_prior
    asked = FitRequest(metric, values, class_prior or before, prior_of(prior, base.backbone))
    if validation is not None and reader is not None:
        from retrieval_tip.fit.search_hp import on_validation  # other changes do not need it

        base = store.load(device="cpu")
        queries = on_validation(base, validation, reader)
        version = base.version

    def revise(index: Index) -> Changed:
        index, choice = closed_form.fit(index, asked, validation=queries)
        return Changed(index, "fit", fit=choice)

    return store.change(revise, base=base, expect=version)


def join(
    folder: Place,
    features: Mapping[str, FloatArray],
    reader: Reader,
    *,
    base: Index | None = None,
) -> Changed:
    """Join another encoder to the one of an index, and fit the index again (see :func:`joining.joined_index`).

    Every photo needs one of the ``features`` of the other encoder, by digest. The backbone of ``reader`` joins both.
    Raises InputError if a photo has no feature. If an error occurs, the index stays unchanged.
    """
    assert reader.backbone is not None
    other = reader.backbone.identity.parts[-1].model

    def revise(index: Index) -> Changed:
        made, choice = joined_index(index, features, reader)
        return Changed(made, f"join {other}", fit=choice)

    return places.at(folder).change(revise, base=base)


def rebuild(
    folder: Place,
    *,
    index: str | None = None,
    dtype: Dtype | None = None,
    base: Index | None = None,
) -> Changed:
    """Rebuild the index from its keys, optionally with another ``index`` type or ``dtype``.

    Stores other than folders rewrite every row except removed rows. Raises UsageError if the index type or the dtype is
    invalid. Raises InputError if a key overflows the dtype.
    """
    if dtype is not None:
        check_choice("dtype", dtype, Dtype)
    store = places.at(folder)

    def revise(before: Index) -> Changed:
        made = store.rebuilt(before, index, dtype)
        return Changed(made, f"rebuild as {made.index_type} of {made.dtype}")

    return store.change(revise, base=base)


def rollback(folder: Place, version: int | None = None, *, expect: int | None = None) -> Changed:
    """Copy an earlier version into a new version, which keeps the history linear.

    ``version`` defaults to the parent of the current version. If ``expect`` is given, that version must be current. Key
    ids are not reused. Raises StoreError if the earlier
    version is missing or damaged.
    """
    if version is not None:
        check_count("version", version)
    index = places.at(folder).restore(version, expect)
    return Changed(index, "rollback")


def gc(folder: Place, keep: int = 10) -> Collected:
    """Delete all versions except the last ``keep``, and the files and photos that only the deleted versions use.

    Only photos that were added over HTTP are deleted. Raises UsageError if ``keep`` is below 1.
    """
    store = places.at(folder)
    versions, freed = store.collect(keep)
    number, size = remove_unused(store)
    return Collected(versions, number, freed + size)


def clone(folder: Place, out: Place, version: int | None = None) -> Changed:
    """Copy the current version of an index, or an earlier version, to a new place. The files are verified first.

    You can copy an index to another kind of store. The keys, labels, settings and fit stay the same, but the vector
    index is rebuilt. Its type is ``Flat`` in a folder and ``auto`` in other stores.

    Raises StoreError if ``out`` already contains an index. Raises InputError if ``out`` cannot store a part of it.
    """
    source = places.at(folder)
    target = places.at(out)
    if target.exists():
        raise StoreError(f"{out}: already holds an index; give another folder")
    if target.local is not None and Path(target.resolved).is_relative_to(source.resolved):
        raise StoreError(f"{out}: is inside the index; give a folder outside it")
    manifest = source.manifest(version)
    source.check(manifest)  # otherwise damaged data would get valid digests
    index = source.load(device="cpu", version=manifest.version, verify="fast")
    what = f"clone version {index.version} of {show(str(source))}"
    return Changed(target.copy_from(index, what), what)


def _weights_of(
    class_names: Sequence[str], index: Index, reader: Reader, text: Place | None
) -> dict[str, FloatArray]:
    known = set(index.class_names)
    new = [name for name in class_names if name not in known]
    if not new:
        return {}
    if text is not None:
        names, weights = read_text_table(text, reader.norms, index.backbone, index.parts)
        if weights.shape[1] != index.d:
            raise InputError(
                f"{text}: {weights.shape[1]} values per row instead of {index.d}; use one backbone"
            )
        return {name: row for name, row in zip(names, weights, strict=True) if name in new}
    if reader.backbone is None or not index.templates:
        return {}
    return dict(zip(new, reader.text_weights(new, index.templates), strict=True))


def _new_classes(
    names: Sequence[str], index: Index, weights: Mapping[str, FloatArray]
) -> dict[str, FloatArray | None]:
    """Return the names that the index lacks, with their text weights if it has text."""
    known = set(index.class_names)
    new = [name for name in names if name not in known]
    if not index.has_text:
        return dict.fromkeys(new)
    missing = [name for name in new if name not in weights]
    if missing:
        alike = spelled_alike([*index.class_names, missing[0]])
        raise InputError(
            f"class {missing[0]!r}: is new and needs a text weight, like every class of this index; give its text "
            "features (text) or, if the index has templates, the encoder (model)"
            + (
                f"; if it is the same class as {alike[missing[0]]!r}, use that label"
                if missing[0] in alike
                else ""
            )
        )
    return {name: weights[name] for name in new}


def _known(
    index: Index,
    labels: npt.NDArray[np.object_],
    digests: Sequence[str | None],
    features: FloatArray,
) -> BoolArray:
    """Return which images the index already has under the same label. An image without a digest is known by its row."""
    by_digest = index.known([digest or None for digest in digests])
    known = np.array(
        [pair in by_digest for pair in zip(digests, labels.tolist(), strict=True)], dtype=bool
    )
    position = {name: i for i, name in enumerate(index.class_names)}
    ids = np.array([position.get(label, -1) for label in labels.tolist()])
    bare = np.flatnonzero([not digest for digest in digests] & (ids >= 0))
    classes = np.unique(ids[bare])
    if not len(bare) or sum(np.array(index.counts)[classes].tolist()) > COMPARED:
        return known
    zero = np.zeros((), index.dtype)  # converts -0 to 0
    with np.errstate(over="ignore"):  # an overflow is rejected when the keys are added
        rows = features[bare].astype(index.dtype) + zero
    asked = list(zip(ids[bare].tolist(), map(bytes, rows), strict=True))
    found = set[tuple[int, bytes]]()
    for own, keys in index.rows.blocks(["class_id"], classes):
        class_ids = own["class_id"].to_numpy()
        alike = np.flatnonzero(
            np.isin(keys[:, 0], rows[:, 0])
        )  # only a few keys remain to be compared one by one
        found |= set(
            zip(class_ids[alike].tolist(), map(bytes, keys[alike] + zero), strict=True)
        ).intersection(asked)
    known[bare] = [pair in found for pair in asked]
    return known


def _chosen(index: Index, where: str | None, key_ids: Sequence[int] | None) -> list[int]:
    if (where is None) == (key_ids is None):
        raise UsageError("where, key_ids: give exactly one of them")
    if not isinstance(where, str | None):
        raise UsageError(f"where: got {where!r}; give an SQL condition")
    if where is None:
        if not isinstance(key_ids, Iterable) or not all(
            isinstance(key_id, Integral) for key_id in key_ids
        ):
            raise UsageError(f"key ids: got {key_ids!r}; give a list of whole numbers")
        chosen = list(dict.fromkeys(key_ids or []))
        if missing := sorted(set(chosen).difference(_labels_of(index, chosen))):
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
    else:
        chosen = index.labels["key_id"].to_numpy()[rows_where(index.labels, where)].tolist()
    if not chosen:
        what = "key ids: none given" if where is None else f"where: no key matches {where}"
        raise InputError(f"{what}; nothing changed")
    return chosen


def _labels_of(index: Index, key_ids: Sequence[int]) -> dict[int, str]:
    possible = [key_id for key_id in key_ids if -(2**63) <= key_id < 2**63]
    rows = index.find(key_ids=possible) if possible else index.labels.slice(0, 0)
    return dict(zip(rows["key_id"].to_pylist(), rows["label"].to_pylist(), strict=True))


def _moved(
    index: Index, wanted: Mapping[int, str], now: Mapping[int, str], prefix: str = ""
) -> Changed:
    for label in dict.fromkeys(wanted.values()):
        if label not in index.class_names:
            raise InputError(
                f"{prefix}{label!r} is not a class of this index ({few(index.class_names)}); add new classes with "
                "index add"
            )
    moves = {key_id: label for key_id, label in wanted.items() if label != now[key_id]}
    return _edited(index, Edits(move=moves), now)


def _shown(name: str, value: object) -> str:
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
