"""Seal, describe and restore the versions of an index in any kind of store."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval_tip.errors import InputError
from retrieval_tip.store.labels import versions_table
from retrieval_tip.store.manifest import Manifest

KEPT_VERSIONS = 32
"""Number of versions, including the current one, that a commit keeps."""


def stamp() -> dict[str, Any]:
    """Return the entries of a new manifest that contain the time and the program version."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created_at": now, "created_by": f"retrieval-tip {version('retrieval-tip')}"}


def sealed(manifest: Manifest, place: object) -> bytes:
    """Convert a manifest to bytes, and check that the bytes can be read back.

    Raises InputError if the manifest contains a value that cannot be stored.
    """
    try:
        raw = manifest.to_bytes()
        Manifest.parse(json.loads(raw))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{place}: the manifest cannot be stored ({error}); nothing was changed") from None
    return raw


def renewed(old: Manifest, current: Manifest, next_key_id: int, stamp: dict[str, Any]) -> Manifest:
    """Return a manifest that restores an ``old`` version after the ``current`` version, without reusing key ids."""
    return dataclasses.replace(
        old,
        version=current.version + 1,
        parent=current.version,
        next_key_id=next_key_id,
        change=f"rollback to version {old.version}",
        **stamp,
    )


def history_table(earlier: Sequence[Manifest], current: Manifest) -> pa.Table:
    """Return a table of versions, oldest first, with the columns of :data:`labels.VERSIONS_SCHEMA`."""
    names = ("version", "parent", "created_at", "created_by", "change")
    return versions_table(
        [
            {name: getattr(manifest, name) for name in names}
            | {
                "keys": manifest.n,
                "classes": len(manifest.class_names),
                "bytes": sum({file.name: file.bytes for file in manifest.data_files}.values()),
                "current": manifest is current,
            }
            for manifest in [*earlier, current]
        ]
    )


def described(
    place: object, manifest: Manifest, earlier: Sequence[Manifest], counts: npt.NDArray[np.int64], **more: object
) -> dict[str, Any]:
    """Return the facts that ``index info`` prints. ``counts`` is the number of keys per class."""
    facts = dataclasses.asdict(manifest)
    for name in ("files", "later", "digests"):
        del facts[name]
    facts |= facts.pop("settings")
    per_class = {"least": int(counts.min()), "median": float(np.median(counts)), "most": int(counts.max())}
    return (
        {"folder": str(place)}
        | facts
        | {"k": manifest.settings.k or "all", "classes": len(manifest.class_names), "keys_per_class": per_class}
        | {"precision": manifest.provenance.get("precision")}
        | more
        | {
            "files": {kind: file.name for kind, file in manifest.files.items()},
            "earlier_versions": [old.version for old in earlier],
        }
    )
