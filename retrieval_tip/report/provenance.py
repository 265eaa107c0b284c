"""Describe the test, the settings, the index and the machine of a report as rows of names and values."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from retrieval_tip import doctor
from retrieval_tip.errors import counted
from retrieval_tip.report.results import Results, portable
from retrieval_tip.store.folder import read_manifest, read_version
from retrieval_tip.store.manifest import Manifest

LISTED = 50
"""Maximum number of items of a value to list."""

KEPT = {"source": "source", "dataset": "dataset", "shots": "examples per class", "seed": "seed", "views": "views",
        "text": "class names from", "skipped": "skipped at build"}  # fmt: skip
"""Names of build records in the report."""

Rows = list[tuple[str, str]]


def provenance(results: Results) -> dict[str, Rows]:
    """Return the rows of each part by its title. Parts without rows are left out."""
    folder, version, manifest = results.folder, results.index.version, None
    if folder is not None:
        manifest = read_manifest(folder) if version is None else read_version(folder, version)
    parts = {
        "Test": list(_test(results)),
        "Settings": list(_settings(results, manifest)),
        "Search": [(name, described(value)) for name, value in results.record("search").items()],
        "Fine-tuning": [(name, described(value)) for name, value in results.record("finetune").items()],
        "Index": list(_index(results, manifest)),
        "Machine": [(name, portable(value)) for name, value in doctor.examine().facts.items()],
    }
    return {title: rows for title, rows in parts.items() if rows}


def _test(results: Results) -> Iterator[tuple[str, str]]:
    skipped = results.reader.skipped
    yield "source", portable(results.test.name)
    yield "photos", f"{results.evaluation.n:,} classified, {len(skipped):,} could not be read"
    yield "date", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if results.command:
        yield "command", results.command
    for item in skipped[:LISTED]:
        yield "skipped", portable(str(item))
    if len(skipped) > LISTED:
        yield "skipped", f"{len(skipped) - LISTED:,} more"


def _settings(results: Results, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    kept, searched = results.index.provenance, "search-hp" if results.record("search") else "the index"
    known = {"alpha": kept.get("alpha"), "beta": kept.get("beta"), "k": searched, "tail": "the index"}
    known |= {"temperature": kept.get("temperature", "not fitted"), "logit_scale": "the index"}
    for name, origin in known.items():
        value = getattr(results.evaluation.settings, name)
        own = getattr(manifest.settings, name) if manifest is not None else value
        given = described(origin) if own == value else f"set for this report; the index has {described(own, 'all')}"
        yield name, f"{described(value, 'all')} ({given})"


def _index(results: Results, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    index = results.index
    if results.folder is not None and manifest is not None:
        yield "folder", portable(results.folder)
        yield "version", f"{manifest.version}, {manifest.created_at}, by {manifest.created_by}"
        yield "last change", portable(manifest.change or "-")
        yield "digest", manifest.keys_digest
    yield "examples", f"{index.n:,} of {counted(len(index.class_names), 'class')}"
    if results.where is not None:
        yield "restricted to", portable(results.where)
    yield "vectors", f"{index.d:,} values, {index.dtype}"
    yield "FAISS index", f"{index.index_type} on {index.device}"
    yield "prompts", " | ".join(index.templates) or "-"
    if index.backbone is not None:
        yield "encoder", portable(str(index.backbone))
        yield "digest of its weights", index.backbone.weights
        yield "preprocessing", described(dict(index.backbone.preprocess))
    for name, called in KEPT.items():
        if index.provenance.get(name) not in (None, []):
            yield called, described(index.provenance[name])


def described(value: object, none: str = "-") -> str:
    """Return a manifest value as text. ``none`` stands for ``None``."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {described(part)}" for name, part in value.items())
    if isinstance(value, list):
        more = f" ... ({len(value)} in all)" if len(value) > LISTED else ""
        return ", ".join(map(described, value[:LISTED])) + more
    return none if value is None else f"{value:.4g}" if isinstance(value, float) else portable(str(value))
