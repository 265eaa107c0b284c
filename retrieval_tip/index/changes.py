"""Changes of an index. Each function writes one new version exclusively, or fails and changes nothing.

Slow work, above all encoding, is done before other writers have to wait.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.answering import AnsweringIndex, EditableIndex
from retrieval_tip.backbones.base import Backbone, Identity, same_backbone
from retrieval_tip.backbones.prompts import check_templates, text_weights
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import check_backbone, table_identity
from retrieval_tip.data.imports import import_table
from retrieval_tip.data.sources import Source, open_source, spelled_alike
from retrieval_tip.data.tables import read_columns, reading, texts
from retrieval_tip.errors import InputError, StoreError, UsageError, counted, few, show
from retrieval_tip.index import places
from retrieval_tip.index.build import build_index, warn_of_spelling
from retrieval_tip.index.items import ItemColumns, draw_shots, ids_in, provenance_of, read_text_table
from retrieval_tip.index.photos import remove_unused
from retrieval_tip.index.places import Place
from retrieval_tip.index.stores import Change
from retrieval_tip.retrieval.defaults import plain_settings
from retrieval_tip.retrieval.duplicates import Duplicates
from retrieval_tip.settings import Dtype, Normalize, Norms, check_choice
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.query import rows_where

Folder = str | os.PathLike[str]

COMPARED = 1 << 18
"""Upper bound for keys that new features are compared with when known ones are only counted."""


@dataclass(frozen=True)
class Changed:
    """Result of a change: the current ``version``, unchanged if there was nothing to do, and the affected keys."""

    version: int
    key_ids: list[int]


@dataclass(frozen=True)
class Renamed(Changed):
    """Result of renaming: whether the class was ``merged`` into an existing one."""

    merged: bool


@dataclass(frozen=True)
class Configured(Changed):
    """Result of changing settings, with the ``summary`` of a fit if there was one."""

    summary: str | None


@dataclass(frozen=True)
class Collected:
    """Deleted ``versions``, number of deleted ``photos``, and ``freed`` bytes."""

    versions: list[int]
    photos: int
    freed: int


@dataclass(frozen=True)
class Added(Changed):
    """Result of adding: new ``classes``, number of images already ``known``, and new keys that are in two classes.

    ``alike`` maps a new class to an earlier one that differs only in case, ``_``, ``-`` or spaces.
    """

    classes: list[str]
    known: int
    duplicates: Duplicates | None
    alike: dict[str, str]


def add(
    folder: Place,
    source: Source,
    encoder: Encoder,
    *,
    text: Folder | None = None,
    shots: int | None = None,
    skip_known: bool = False,
    manifest: Manifest | None = None,
) -> Added:
    """Add the labelled images or features of a source. New classes come last, in source order.

    Labels are exact: another spelling makes another class, with a warning (:attr:`Added.alike`). If the index has text,
    the text weights of new classes come from its templates and the encoder's backbone, or from ``text``. The cost
    depends only on the size of the addition (:meth:`cache_model.KeyEdits.add`).

    Args:
        folder: the index.
        source: labelled images or features.
        encoder: backbone, views and caching, as for the index; ``encoder.skipped`` names unreadable images.
        text: a table of text features labelled by class, for the new classes.
        shots: shots to draw per class by CoOp's sampling rule and the encoder's seed; ``None`` takes every item.
        skip_known: skip items that the index has under the same label: images by the digest of their bytes, features
            without a digest by their stored values.
        manifest: the current version's manifest, if already read.

    Raises InputError, UsageError and BackboneError for wrong input; StoreError as :func:`writer.write`.
    """
    store = places.at(folder)
    manifest = manifest or store.manifest()
    check_backbone(_backbone_of(manifest), manifest.d, encoder.backbone, [source])
    weights = _weights_of(source.class_names, manifest, encoder, text)
    _new_classes(source.class_names, manifest.class_names, weights, store.has_text(manifest))
    if shots is not None:
        ids = ids_in(source, source.class_names)
        source = source.take(draw_shots(ids, source.class_names, shots, encoder.seed))
    block = encoder.encode(source)
    items = source.items.take(pa.array(block.positions))
    columns = ItemColumns.of(items, block.digests)
    with store.change() as change:
        cache = change.cache
        labels = np.array(items["label"].to_pylist(), dtype=object)
        known = _known(cache, labels, columns.digests, block.features, None if skip_known else COMPARED)
        rows = np.flatnonzero(~known) if skip_known else np.arange(len(labels))
        classes, key_ids, found = _add_classes(cache, source.class_names, weights), [], None
        if len(rows):
            views = encoder.views if source.table is None else 1
            key_ids = cache.add(block.features[rows], labels[rows].tolist(), views=views, **vars(columns.take(rows)))
            found = change.duplicates_of(key_ids)  # an error up to here changes nothing
        if len(rows) or classes:
            change.what = _with_classes(f"add {counted(len(rows), 'key')}", classes)
    alike = warn_of_spelling(folder, cache.class_names, classes)
    return Added(_version(cache), key_ids, classes, int(known.sum()), found, alike)


def merge(folder: Place, other: Place) -> Added:
    """Add the keys of another index of the same backbone; new classes bring their text weights.

    Keys get new ids, and keep their source, digest, views and extra columns. Raises BackboneError if the backbones
    differ. Raises InputError if the other index has trained values, which mean nothing among other keys, or lacks text
    that this one has. Raises StoreError as :func:`writer.write`.
    """
    target, source = places.at(folder), places.at(other)
    if target.resolved == source.resolved:
        raise UsageError(f"{other}: an index cannot be merged with itself; give another one")
    theirs = source.load(device="cpu", precision="float32").in_memory()
    if theirs.values is not None and theirs.fitted is None:
        raise InputError(f"{other}: has trained values, which cannot be merged; merge its version before the training")
    ours = _backbone_of(target.manifest())
    if ours is not None and theirs.backbone is not None:
        same_backbone(theirs.backbone, ours, str(other))
    weights = dict(zip(theirs.class_names, theirs.text_weights.numpy(), strict=True)) if theirs.has_text else {}
    columns = ItemColumns.of(theirs.labels, theirs.labels["digest"].to_pylist())
    with target.change() as change:
        cache = change.cache
        classes = _add_classes(cache, theirs.class_names, weights)
        labels, views = theirs.labels["label"].to_pylist(), theirs.labels["views"].to_numpy()
        key_ids = cache.add(np.asarray(theirs.keys), labels, views=views, **vars(columns))
        found = change.duplicates_of(key_ids)  # an error up to here changes nothing
        change.what = _with_classes(f"merge {show(str(source))}: {counted(len(key_ids), 'key')}", classes)
    return Added(_version(cache), key_ids, classes, 0, found, warn_of_spelling(folder, cache.class_names, classes))


def remove(folder: Place, *, where: str | None = None, key_ids: Sequence[int] | None = None) -> Changed:
    """Remove keys chosen by an SQL condition over the label store or by their ids; classes stay.

    Their bytes leave the folder with the last version that has them (:func:`writer.collect`). In a store that only
    marks rows as removed, :func:`rebuild` first. Raises UsageError unless exactly one of ``where`` and ``key_ids`` is
    given and valid. Raises InputError if no key matches, or as :meth:`cache_model.KeyEdits.remove`.
    """
    with places.at(folder).change() as change:
        chosen = _chosen(change.cache, where, key_ids)
        try:
            change.cache.remove(chosen)
        except UsageError as error:  # fewer keys than the lists of an inverted file
            raise InputError(f"{error}; rebuild the index first, with index=Flat") from None
        change.what = f"remove {counted(len(chosen), 'key')}"
    return Changed(_version(change.cache), chosen)


def relabel(
    folder: Place, label: str | Mapping[int, str], *, where: str | None = None, key_ids: Sequence[int] | None = None
) -> Changed:
    """Move keys to other classes of the index: chosen keys (see :func:`remove`) to one label, or a label per key id.

    Returns the keys that changed. Raises UsageError if a mapping comes with ``where`` or ``key_ids``, InputError for an
    unknown key id or label, otherwise as :func:`remove`.
    """
    with places.at(folder).change() as change:
        cache = change.cache
        if not isinstance(label, str) and (where is not None or key_ids is not None):
            raise UsageError("label: a mapping already names its keys; remove where and key_ids")
        for name in [label] if isinstance(label, str) else dict.fromkeys(label.values()):
            _check_class(cache, name)
        if isinstance(label, str):
            wanted = dict.fromkeys(_chosen(cache, where, key_ids), label)
        else:
            wanted = {key_id: label[key_id] for key_id in _chosen(cache, None, list(label))}
        moved = _relabel(change, wanted, _labels_of(cache, list(wanted)))
    return Changed(_version(change.cache), moved)


def apply_audit(folder: Place, file: Folder) -> Changed:
    """Relabel shots as a table of :func:`audit.audit` suggests, all in one new version.

    ``file`` is CSV, JSON lines or Parquet, as ``index audit --output`` writes it, possibly edited. It needs the columns
    ``key_id``, ``label``, which must still be the key's label, and ``suggested``, the new label. Rows whose suggestion
    is empty or the same label are skipped.

    Raises InputError and changes nothing for an unreadable file, a key that is unknown, repeated or relabelled since,
    and a suggestion that is not a class of the index.
    """
    name, place = show(file), places.at(folder)
    table = read_columns(Path(file), ("key_id", "label", "suggested"), place.manifest().n)
    key_ids, labels = (texts(table[column], name, column, needed=True) for column in ("key_id", "label"))
    with reading(f"{name}: column 'key_id'"):
        ids = key_ids.cast(pa.int64()).to_pylist()
    suggested = texts(table["suggested"], name, "suggested", needed=False).to_pylist()
    old = dict(zip(ids, labels.to_pylist(), strict=True))
    if len(old) < len(ids):
        raise InputError(f"{name}: key {Counter(ids).most_common(1)[0][0]} is repeated; keep one row")
    wanted = {key_id: new for key_id, new in zip(ids, suggested, strict=True) if new not in (None, old[key_id])}
    with place.change() as change:
        now = _labels_of(change.cache, list(wanted))
        for key_id in wanted:
            if now.get(key_id) != old[key_id]:
                found = f"is labelled {now[key_id]!r}, not {old[key_id]!r}" if key_id in now else "is not in this index"
                raise InputError(f"{name}: key {key_id} {found}; run index audit again")
        for label in dict.fromkeys(wanted.values()):
            _check_class(change.cache, label, f"{name}: ")
        moved = _relabel(change, wanted, now)
    return Changed(_version(change.cache), moved)


def rename(folder: Place, old: str, new: str, backbone: Backbone | None = None) -> Renamed:
    """Rename a class, or merge it into the class that already has the new name; returns the ids of its keys.

    The text weight stays; a merge keeps the target's. With a ``backbone``, the new name is encoded with the index's
    templates instead.

    Raises InputError if there is no class ``old``, or ``new`` cannot be a name. Raises UsageError for a backbone
    without a text encoder, or an index without templates; BackboneError for another backbone than the index's.
    """
    weights = None
    if backbone is not None:
        manifest = places.at(folder).manifest()
        check_backbone(_backbone_of(manifest), manifest.d, backbone, [])
        if not manifest.templates:
            raise UsageError(f"{folder}: its text weights did not come from templates; rename without a backbone")
        weights = text_weights(backbone, [new], manifest.templates)[0]
    with places.at(folder).change() as change:
        cache = change.cache
        if old == new and new in cache.class_names:
            return Renamed(_version(cache), [], merged=False)
        key_ids = cache.find([old])["key_id"].to_pylist() if old in cache.class_names else []
        merged = new in cache.class_names
        cache.rename(old, new)
        if weights is not None:
            text = cache.text_weights.cpu().numpy().copy()
            text[cache.class_names.index(new)] = weights
            cache.set_text(text, cache.templates)
        change.what = f"merge {old} into {new}" if merged else f"rename {old} to {new}"
        change.what += ", with a new text weight" if weights is not None else ""
    return Renamed(_version(cache), sorted(key_ids), merged)


def configure(
    folder: Place,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    k: int | Literal["all"] | None = None,
    tail: bool | None = None,
    temperature: float | None = None,
    normalize: Normalize | None = None,
    templates: Sequence[str] = (),
    backbone: Backbone | None = None,
) -> Configured:
    """Change settings of an index; ``None`` keeps a setting. Templates and a ``backbone`` make new text weights.

    In a fitted index another beta refits the parts that depend on it (:meth:`Change.refit`): solved values, alpha,
    temperature and the ``unlike`` threshold. A given alpha or temperature is set after that.

    With ``normalize``, alpha and beta are in units of the current shots; omitted ones get the defaults of a new build
    (:func:`defaults.plain_settings`).

    Raises UsageError if nothing is given, a setting is invalid, or templates come without a backbone; BackboneError for
    another backbone than the index's.
    """
    if not templates and all(value is None for value in (alpha, beta, k, tail, temperature, normalize)):
        raise UsageError("nothing to set: give alpha, beta, k, tail, temperature, normalize or templates")
    if normalize is not None:
        check_choice("normalize", normalize, Normalize)
    prompts = list(check_templates(templates)) if templates else []
    weights: dict[str, npt.NDArray[np.float32]] = {}
    store = places.at(folder)
    if prompts:
        if backbone is None:
            raise UsageError("templates: text weights from templates need a backbone; give --model")
        manifest = store.manifest()
        check_backbone(_backbone_of(manifest), manifest.d, backbone, [])
        names = manifest.class_names
        weights = dict(zip(names, text_weights(backbone, names, prompts), strict=True))
    with store.change() as change:
        cache, summary = change.cache, None
        given: dict[str, Any]
        own_alpha, own_beta = alpha, beta
        if normalize is not None:
            own_alpha, own_beta = plain_settings(alpha, beta, normalize, cache.statistics())
        if cache.fitted is not None and own_beta is not None and own_beta != cache.settings.beta:
            summary = str(change.refit(own_beta))
        given = {"alpha": own_alpha, "beta": own_beta, "k": k, "tail": tail, "temperature": temperature}
        given = {name: value for name, value in given.items() if value is not None}
        cache.settings = cache.settings.override(**given)
        if prompts:
            if weights.keys() != set(cache.class_names):
                raise StoreError(f"{folder}: its classes changed meanwhile; try again")
            cache.set_text(np.stack([weights[name] for name in cache.class_names]), prompts)
        marks = dict.fromkeys(given, "given") | ({"text": "templates"} if prompts else {})
        if normalize is not None:
            marks |= {"alpha": provenance_of(alpha, normalize), "beta": provenance_of(beta, normalize)}
        cache.provenance = cache.provenance | marks
        change.what = "set " + ", ".join(_shown(name, value) for name, value in given.items())
        if prompts:
            change.what += (", " if given else "") + counted(len(prompts), "template")
    return Configured(_version(cache), [], summary)


def compact(folder: Place) -> Changed:
    """Merge all keys into one segment, indexed as the first one; does nothing if there is only one.

    Answers equal a new build from the same keys. Raises StoreError as :func:`writer.write`.
    """
    with places.at(folder).change() as change:
        segments = change.cache.segments
        if segments > 1:
            change.cache.compact()
            change.what = f"compact {counted(segments, 'segment')}"
    return Changed(_version(change.cache), [])


def rebuild(folder: Place, *, index: str | None = None, dtype: Dtype | None = None) -> Changed:
    """Build the index again from its keys, with another ``index`` type or ``dtype``.

    A store other than a folder writes every row again, without removed ones. Raises UsageError for an invalid type or
    dtype, InputError if keys overflow the dtype.
    """
    if dtype is not None:
        check_choice("dtype", dtype, Dtype)
    with places.at(folder).change() as change:
        change.rebuild(index, dtype)
        change.what = f"rebuild as {change.cache.index_type} of {change.cache.dtype}"
    return Changed(_version(change.cache), [])


def rollback(folder: Place, version: int | None = None) -> Changed:
    """Copy an earlier version, by default the parent, into a new version, so that history stays linear.

    Key ids assigned since are not reused. Raises StoreError if that version is missing or damaged.
    """
    return Changed(places.at(folder).rollback(version), [])


def gc(folder: Place, keep: int = 1) -> Collected:
    """Delete all versions except the last ``keep``, with the files and photos that only they use.

    Photos are those added over HTTP (:func:`photos.remove_unused`). Raises StoreError as :func:`writer.write`,
    UsageError if ``keep`` is below 1.
    """
    store = places.at(folder)
    versions, freed = store.collect(keep)
    number, size = remove_unused(store)
    return Collected(versions, number, freed + size)


def clone(folder: Place, out: Place, version: int | None = None) -> Changed:
    """Copy the current or an earlier version of an index to a new place, and verify it on the way.

    Between kinds of store, keys, labels, settings and fit stay the same; the index over the keys is built again:
    ``Flat`` in a folder, ``auto`` elsewhere.

    Raises StoreError if ``out`` already holds an index, InputError as :meth:`Store.copy_from`.
    """
    source, target = places.at(folder), places.at(out)
    if target.exists():
        raise StoreError(f"{out}: already holds an index; give another folder")
    if target.local is not None and Path(target.resolved).is_relative_to(source.resolved):
        raise StoreError(f"{out}: is inside the index; give a folder outside it")
    manifest = source.manifest(version)
    source.check(manifest)  # or damage would get valid digests
    cache = source.load(device="cpu", version=manifest.version, verify="fast")
    what = f"clone version {cache.version} of {show(str(source))}"
    return Changed(target.copy_from(cache, what), [])


def import_index(
    source: Folder,
    out: Place,
    *,
    classes: Folder | None = None,
    text: Folder | None = None,
    norms: Norms = "check",
    index: str | None = None,
    dtype: Dtype = "float32",
    alpha: float | None = None,
    beta: float | None = None,
) -> AnsweringIndex:
    """Build an index from a cache that Tip-Adapter's code wrote (:func:`imports.import_table`).

    ``source`` and ``classes`` are that function's; ``norms`` is :class:`encoder.Encoder`'s, the others are
    :func:`build.build_index`'s. Classes are in the order of ``text``, or else alphabetical. Raises as these functions.
    """
    with tempfile.TemporaryDirectory(prefix="retrieval-tip-") as folder:
        table = Path(folder) / "keys.parquet"
        import_table(Path(source), table, None if classes is None else Path(classes))
        try:
            return build_index(
                dataclasses.replace(open_source(table), name=show(source)), out, Encoder(norms=norms), text=text,
                index=index, dtype=dtype, alpha=alpha, beta=beta, device="cpu",
            )  # fmt: skip
        except InputError as error:
            raise InputError(str(error).replace(show(table), show(source))) from None


def _backbone_of(manifest: Manifest) -> Identity | None:
    return Identity.from_dict(manifest.backbone) if manifest.backbone else None


def _weights_of(
    class_names: Sequence[str], manifest: Manifest, encoder: Encoder, text: Folder | None
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the text weights of new classes, if ``text`` or templates and a backbone can provide them."""
    known = set(manifest.class_names)
    new = [name for name in class_names if name not in known]
    if not new:
        return {}
    if text is not None:
        names, weights = read_text_table(text, encoder.norms)
        theirs = table_identity(Path(text))
        if theirs is not None and manifest.backbone is not None:
            same_backbone(theirs, Identity.from_dict(manifest.backbone), str(text))
        if weights.shape[1] != manifest.d:
            raise InputError(f"{text}: {weights.shape[1]} values per row instead of {manifest.d}; use one backbone")
        return {name: row for name, row in zip(names, weights, strict=True) if name in new}
    if encoder.backbone is None or not manifest.templates:
        return {}
    return dict(zip(new, text_weights(encoder.backbone, new, manifest.templates), strict=True))


def _add_classes(cache: EditableIndex, names: Sequence[str], weights: dict[str, npt.NDArray[np.float32]]) -> list[str]:
    new = _new_classes(names, cache.class_names, weights, cache.has_text)
    if new:
        cache.add_classes(new, np.stack([weights[name] for name in new]) if cache.has_text else None)
    return new


def _new_classes(
    names: Sequence[str], present: Sequence[str], weights: Mapping[str, npt.NDArray[np.float32]], has_text: bool
) -> list[str]:
    """Return the classes that the index lacks, in order. Raises InputError if one has no text weight."""
    known = set(present)
    new = [name for name in names if name not in known]
    missing = [name for name in new if name not in weights] if has_text else []
    if missing:
        alike = spelled_alike([*present, missing[0]])
        raise InputError(
            f"class {missing[0]!r}: is new and needs a text weight, like every class of this index; give its text "
            "features (text) or, if the index has templates, the encoder (model)"
            + (f"; if it is the same class as {alike[missing[0]]!r}, use that label" if missing[0] in alike else "")
        )
    return new


def _known(
    cache: AnsweringIndex,
    labels: npt.NDArray[np.object_],
    digests: Sequence[str | None],
    features: npt.NDArray[np.float32],
    most: int | None,
) -> npt.NDArray[np.bool_]:
    """Return which of some images ``[m]`` the index has under the same label.

    Images without a digest are compared by their ``features`` ``[m, d]``, unless their classes have more than ``most``
    keys.
    """
    by_digest = cache.known([digest or None for digest in digests])
    known = np.array([pair in by_digest for pair in zip(digests, labels.tolist(), strict=True)], dtype=bool)
    position = {name: i for i, name in enumerate(cache.class_names)}
    ids = np.array([position.get(label, -1) for label in labels.tolist()])
    bare = np.flatnonzero([not digest for digest in digests] & (ids >= 0))
    classes = np.unique(ids[bare])
    if not len(bare) or (most is not None and sum(np.array(cache.counts)[classes].tolist()) > most):
        return known
    with np.errstate(over="ignore"):  # adding refuses overflow
        rows = features[bare].astype(cache.dtype) + np.zeros((), cache.dtype)  # turns -0 into 0
    wanted = {(class_id, row.tobytes()): False for class_id, row in zip(ids[bare].tolist(), rows, strict=True)}
    first = np.unique(rows[:, 0])
    for class_ids, keys in cache.of_classes(classes):
        near = np.searchsorted(first, keys[:, 0]).clip(max=len(first) - 1)
        alike = np.flatnonzero(first[near] == keys[:, 0])  # few keys are left to compare one by one
        for class_id, key in zip(class_ids[alike].tolist(), keys[alike] + np.zeros((), cache.dtype), strict=True):
            if (class_id, key.tobytes()) in wanted:
                wanted[class_id, key.tobytes()] = True
    known[bare] = list(map(wanted.__getitem__, zip(ids[bare].tolist(), (row.tobytes() for row in rows), strict=True)))
    return known


def _chosen(cache: AnsweringIndex, where: str | None, key_ids: Sequence[int] | None) -> list[int]:
    if (where is None) == (key_ids is None):
        raise UsageError("which keys: give either a condition (--where) or ids (--key-ids)")
    if where is None:
        chosen = list(dict.fromkeys(key_ids or []))
        if missing := sorted(set(chosen).difference(_labels_of(cache, chosen))):
            raise InputError(f"key ids {', '.join(map(str, missing[:5]))}: not in this index")
    else:
        chosen = cache.labels["key_id"].to_numpy()[rows_where(cache.labels, where)].tolist()
    if not chosen:
        what = "key ids: none given" if where is None else f"where: no key matches {where}"
        raise InputError(f"{what}; nothing changed")
    return chosen


def _labels_of(cache: AnsweringIndex, key_ids: Sequence[int]) -> dict[int, str]:
    possible = [key_id for key_id in key_ids if -(2**63) <= key_id < 2**63]
    rows = cache.find(key_ids=possible) if possible else cache.labels.slice(0, 0)
    return dict(zip(rows["key_id"].to_pylist(), rows["label"].to_pylist(), strict=True))


def _check_class(cache: AnsweringIndex, label: str, prefix: str = "") -> None:
    if label not in cache.class_names:
        raise InputError(
            f"{prefix}{label!r} is not a class of this index ({few(cache.class_names)}); add new classes with index add"
        )


def _relabel(change: Change, wanted: Mapping[int, str], now: Mapping[int, str]) -> list[int]:
    """Give keys their ``wanted`` labels if these differ from ``now``; return the changed ids."""
    moved = {key_id: label for key_id, label in wanted.items() if label != now[key_id]}
    if moved:
        change.cache.relabel(list(moved), list(moved.values()))
        classes = list(dict.fromkeys(moved.values()))
        what = f"as {classes[0]}" if len(classes) == 1 else f"to {counted(len(classes), 'class')}"
        change.what = f"relabel {counted(len(moved), 'key')} {what}"
    return list(moved)


def _with_classes(what: str, classes: Sequence[str]) -> str:
    return what + (f" and {counted(len(classes), 'class')}" if classes else "")


def _shown(name: str, value: object) -> str:
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {'all' if value is None else value}"


def _version(cache: AnsweringIndex) -> int:
    assert cache.version is not None
    return cache.version
