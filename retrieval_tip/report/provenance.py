"""Describe the settings, the index and the machine of a report as rows of names and values."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from retrieval_tip import doctor
from retrieval_tip.errors import counted
from retrieval_tip.report.judged import JudgedIndex, portable
from retrieval_tip.store.folder import read_manifest, read_version
from retrieval_tip.store.manifest import Manifest

LISTED = 50
"""Maximum number of items of a value to list."""

KEPT = {"source": "source", "dataset": "dataset", "shots": "shots", "seed": "seed", "views": "views",
        "text": "text weights", "affinity_other_classes": "affinity_other_classes",
        "skipped": "skipped at build"}  # fmt: skip
"""Names of build records in the report."""


def provenance(judged: JudgedIndex) -> dict[str, object]:
    """Return the rows for ``settings``, ``search``, ``index`` and ``machine``, and the current time as ``when``."""
    folder, version, manifest = judged.folder, judged.cache.version, None
    if folder is not None:
        manifest = read_manifest(folder) if version is None else read_version(folder, version)
    return {
        "settings": list(_settings(judged, manifest)),
        "search": [(name, described(value)) for name, value in judged.record("search").items()],
        "index": list(_index(judged, manifest)),
        "machine": doctor.examine().facts,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _settings(judged: JudgedIndex, manifest: Manifest | None) -> Iterator[tuple[str, str, str]]:
    kept, searched = judged.cache.provenance, "search-hp" if judged.record("search") else "the index"
    known = {"alpha": kept.get("alpha"), "beta": kept.get("beta"), "k": searched, "tail": "the index"}
    known |= {"temperature": kept.get("temperature", "not fitted")}
    for name, origin in known.items():
        value = getattr(judged.evaluation.settings, name)
        own = getattr(manifest.settings, name) if manifest is not None else value
        given = f"set for this report; the index has {_setting(own)}"
        yield name, _setting(value), described(origin) if own == value else given
    yield "logit_scale", _setting(judged.cache.settings.logit_scale), "the index"


def _index(judged: JudgedIndex, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    cache = judged.cache
    if judged.folder is not None and manifest is not None:
        yield "folder", portable(judged.folder)
        yield "version", f"{manifest.version}, {manifest.created_at}, by {manifest.created_by}"
        yield "last change", manifest.change or "-"
        yield "digest of the keys", manifest.keys_digest
    yield (
        "examples",
        f"{cache.n:,} vectors of {cache.d:,} values, {cache.keys.dtype}, {counted(cache.segments, 'segment')}",
    )
    if judged.where is not None:
        yield "restricted to", judged.where
    yield "classes", f"{len(cache.class_names):,}"
    yield "FAISS index", f"{cache.index.factory} on {cache.device}"
    yield "templates", " | ".join(cache.templates) or "-"
    if cache.backbone is not None:
        yield "encoder", portable(str(cache.backbone))
        yield "digest of its weights", cache.backbone.weights
        yield "preprocessing", described(dict(cache.backbone.preprocess))
    for name, called in KEPT.items():
        if cache.provenance.get(name) not in (None, []):
            yield called, described(cache.provenance[name])


def described(value: object) -> str:
    """Return a manifest value as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {described(part)}" for name, part in value.items())
    if isinstance(value, list):
        more = f" ... ({len(value)} in all)" if len(value) > LISTED else ""
        return ", ".join(map(described, value[:LISTED])) + more
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else portable(str(value))


def _setting(value: object) -> str:
    return "all" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
