"""Versions of an index, for all stores: seal, describe and restore them."""

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
"""Number of versions that a commit keeps, including the current one; ``index gc`` can keep fewer."""


def stamp() -> dict[str, Any]:
    """Return the time and program for a new manifest."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created_at": now, "created_by": f"retrieval-tip {version('retrieval-tip')}"}


def sealed(manifest: Manifest, place: object) -> bytes:
    """Return the bytes of a manifest to commit, after a check that they can be read back.

    Raises InputError for a setting or name that a manifest cannot hold.
    """
    try:
        raw = manifest.to_bytes()
        Manifest.parse(json.loads(raw))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{place}: a manifest cannot hold this ({error}); nothing was changed") from None
    return raw


def renewed(old: Manifest, current: Manifest, next_key_id: int, stamp: dict[str, Any]) -> Manifest:
    """Make a manifest with the content of an ``old`` version to follow the current one; no key id is reused."""
    return dataclasses.replace(
        old,
        version=current.version + 1,
        parent=current.version,
        next_key_id=next_key_id,
        change=f"rollback to version {old.version}",
        **stamp,
    )


def history_table(earlier: Sequence[Manifest], current: Manifest) -> pa.Table:
    """Return the versions, oldest first, as a table of :data:`labels.VERSIONS_SCHEMA`."""
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
    """Return what ``index info`` prints: the manifest, statistics of the keys per class ``[c]``, and ``more``."""
    facts = dataclasses.asdict(manifest)
    for name in ("files", "later", "digests"):
        del facts[name]
    facts |= facts.pop("settings")
    per_class = {"least": int(counts.min()), "median": float(np.median(counts)), "most": int(counts.max())}
    return (
        {"folder": str(place)}
        | facts
        | {"k": manifest.settings.k or "all", "classes": len(manifest.class_names), "keys_per_class": per_class}
        | more
        | {
            "files": {kind: file.name for kind, file in manifest.files.items()},
            "earlier_versions": [old.version for old in earlier],
        }
    )
