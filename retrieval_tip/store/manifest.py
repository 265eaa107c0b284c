"""Read and write manifests, which describe the versions of an index in a folder or in another store.

A manifest is a JSON file that lists every data file with its SHA-256 and ends with its own SHA-256. A manifest that is
damaged or has unknown entries is rejected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from retrieval_tip.backbones.base import (
    Identity,
    Part,
    equal_shares,
    identity_of,
    width_of,
    without_package,
)
from retrieval_tip.errors import BackboneError, StoreError
from retrieval_tip.levels import Levels
from retrieval_tip.records import Built, Fitted
from retrieval_tip.settings import Dtype, Settings

FORMAT = "retrieval-tip index"
FORMAT_VERSION = 11
"""Version of the manifest format. No other version is read."""

SUFFIXES = {
    "keys": ".npy",
    "index": ".faiss",
    "labels": ".parquet",
    "text": ".npy",
    "values": ".npy",
    "curve": ".parquet",
    "metric": ".npy",
    "points": ".npy",
    "sums": ".npy",
    "prior": ".npy",
    "scores": ".npy",
    "classes": ".parquet",
    "second": ".npy",
}
"""Kinds of data files. :meth:`Manifest.expected` says which of them a version has.

- ``text`` are the text weights, of shape ``[c, d]``. ``index`` is a FAISS index over the keys, the points or the class
  means.
- ``values`` is a float32 array of solved or trained values, of shape ``[n, c]``.
- A fitted index has ``metric``, a float32 array of shape ``[1 + d, d]`` with the mean and the transform, and
  ``points``, which is ``phi(K)``. If it was fitted to few keys, ``metric`` has the factor of the transform instead
  (see :class:`tip.Metric`), so it has fewer rows, and there are no ``points``. If the index has many keys, it
  also has ``sums``, a float64 array of shape ``[c + d, 1 + d]`` over all keys (see :class:`sums.Sums`). If it was
  fitted with the scatter of other photos, that is the ``prior``, a float32 array of shape ``[d, d]``. Until it changes,
  it also has ``scores``, a float64 array of shape ``[m, 3]`` of its held-out photos (see :class:`conformal.Scores`).
- A fine-tuned index has ``curve``, the training loss.
- ``classes`` contains the label, the text weight, the number of keys and the key sum of each class of a table.
  ``second`` is the sum of the outer products of its keys, of shape ``[d, d]``.
"""

FLAT = "Flat"
"""Type of an exact index, which needs no file."""

MAX_DEPTH, MOST = 64, 1 << 53
"""Maximum nesting depth of a provenance, and maximum value of a whole number."""

_NAMED = re.compile(rb"data/\w+-[0-9a-f]{16}\.\w+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TABLE_FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")


@dataclass(frozen=True)
class DataFile:
    """An immutable file of an index, described by its path in the folder, number of rows, size and SHA-256.

    ``rows`` is the number of rows of an array or a table, or the number of vectors that an index was trained on.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


class EarlierFormatError(StoreError):
    """Raised when a manifest is in an earlier format, which is no longer read."""


@dataclass(frozen=True)
class Table:
    """A version of a database table with the keys and labels of an index."""

    name: str
    version: int
    rows: int


@dataclass(frozen=True)
class Manifest:
    """The description of a version of an index, which contains everything except the arrays.

    ``files`` maps each kind to a data file. ``change`` briefly describes how this version was created. ``next_key_id``
    is the first unused key id. ``provenance`` is for information only. If a feature joins several ``parts``, each part
    names its own backbone, and ``backbone`` is ``None``.

    If the keys and labels are in a ``table``, ``files`` contains ``classes`` and other data that is not in the table.
    ``digests`` maps the names of the table's files to their SHA-256. It includes LanceDB's manifest and, on a local
    disk, its data files.
    """

    version: int
    parent: int | None
    created_at: str
    created_by: str
    n: int
    d: int
    dtype: Dtype
    class_names: list[str]
    templates: list[str]
    settings: Settings
    index: str
    backbone: dict[str, Any] | None
    provenance: dict[str, Any]
    files: dict[str, DataFile]
    next_key_id: int
    change: str
    parts: list[Part] = field(default_factory=list)
    table: Table | None = None
    fitted: Fitted | None = None
    built: Built = field(default_factory=Built)
    digests: dict[str, str] = field(default_factory=dict)
    groups: Levels | None = None

    @property
    def identity(self) -> Identity | None:
        """The backbone that made the features, or several joined ones, if they are known."""
        identity = identity_of(self.parts)
        if identity is None and self.backbone:
            return Identity.from_dict(self.backbone)
        return identity

    def located(self, folders: Sequence[Path]) -> Manifest:
        """Return the manifest with encoders that are in one of the ``folders`` (see :meth:`Identity.located`)."""
        parts = [
            replace(part, identity=part.identity.located(folders)) if part.identity else part
            for part in self.parts
        ]
        backbone = self.backbone and Identity.from_dict(self.backbone).located(folders).to_dict()
        return replace(self, parts=parts, backbone=backbone)

    @property
    def data_files(self) -> list[DataFile]:
        """All data files of this version."""
        return list(self.files.values())

    @property
    def digested(self) -> list[DataFile]:
        """All files with a digest, including those of a table, whose size is not known and given as 0."""
        return [
            *self.data_files,
            *(DataFile(name, 0, 0, digest) for name, digest in self.digests.items()),
        ]

    @property
    def has_points(self) -> bool:
        """Whether the table also contains the points. It does not if it has solved values, as a query uses all keys."""
        return self.table is not None and "metric" in self.files and "values" not in self.files

    def described(self) -> dict[str, Any]:
        """Return the facts about this version that ``index info`` and the server tell."""
        hidden = ("files", "digests", "parts", "settings")
        facts = {name: value for name, value in asdict(self).items() if name not in hidden}
        if len(self.parts) > 1:
            shares = (self.fitted and self.fitted.shares) or equal_shares(self.parts)
            del facts["backbone"]
            facts["encoders"] = {
                part.names[-1]: share for part, share in zip(self.parts, shares, strict=True)
            }
        if self.groups is not None:
            groups = self.groups.of(self.class_names)
            facts["groups"] = {level: len(set(names) - {None}) for level, names in groups.items()}
        return (
            facts
            | asdict(self.settings)
            | {"k": self.settings.k or "all", "classes": len(self.class_names)}
        )

    def to_bytes(self) -> bytes:
        """Convert the manifest to JSON. The last entry is the SHA-256 of the other entries."""
        body: dict[str, object] = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(
            self, dict_factory=without_package
        )
        del body["settings"]
        body |= asdict(self.settings)
        return _seal(body)

    @classmethod
    def from_bytes(cls, raw: bytes, name: str) -> Manifest:
        """Invert :meth:`to_bytes`. Raises StoreError if the manifest is damaged or in another format."""
        damaged = f"{name}: damaged"
        remedy = "restore it, or delete it, which drops this version"
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{damaged} (not JSON: {error}); {remedy}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise StoreError(f"{name}: not the manifest of a retrieval-tip index")
        version = body.get("format_version")
        writer = ascii(body.get("created_by", "a newer version"))[:100].strip("'")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StoreError(
                f"{name}: index format {version}, but this program reads {FORMAT_VERSION}; install {writer}"
            )
        try:
            sealed = _seal({key: value for key, value in body.items() if key != "sha256"}) == raw
        except (
            ValueError,
            RecursionError,
        ):  # an unpaired surrogate, or JSON that is nested too deeply
            sealed = False
        if not sealed:
            raise StoreError(f"{damaged} (its checksum does not match); {remedy}")
        if type(version) is int and 0 < version < FORMAT_VERSION:
            raise EarlierFormatError(
                f"{name}: index format {version}, which is no longer read; build the index again"
            )
        if unknown := body.keys() - _ENTRIES:  # an unknown entry may change every answer
            raise StoreError(
                f"{name}: has unknown entries ({ascii(sorted(unknown))[:100]}); install {writer}"
            )
        try:
            _need(_whole(version, FORMAT_VERSION), "format_version")
            return cls.parse(body)
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            BackboneError,
        ) as error:
            raise StoreError(f"{damaged} ({error!r}); {remedy}") from None

    @classmethod
    def parse(cls, stated: Mapping[str, Any]) -> Manifest:
        """Convert parsed JSON to a manifest.

        Raises AttributeError, KeyError, TypeError, ValueError or OverflowError if an entry is missing or invalid.
        """
        body = {name: stated[name] for name in _FIELDS - {"settings", "parts"}}
        settings = Settings(**{field.name: stated[field.name] for field in fields(Settings)})
        _need(isinstance(stated["tail"], bool), "tail")
        files = {kind: DataFile(**entry) for kind, entry in body["files"].items()}
        records = {"table": Table, "fitted": Fitted, "built": Built, "groups": Levels}
        for name, kind in records.items():
            if body[name] is not None:
                body[name] = kind(**body[name])
        body |= {"settings": settings, "files": files}
        parts = []
        for part in stated["parts"]:
            identity = part["identity"] and Identity.from_dict(part["identity"])
            parts.append(Part(**{**part, "identity": identity or None}))
        manifest = cls(**body, parts=parts)
        manifest._check()
        manifest._check_files()
        return manifest

    def _check(self) -> None:
        texts = (self.created_by, self.dtype, self.index, self.change)
        made = datetime.fromisoformat(self.created_at).astimezone(
            UTC
        )  # fails for the first and last hours of time
        lists = (self.class_names, self.templates)
        table = self.table
        if self.backbone is not None:
            Identity.from_dict(self.backbone)
        for name, valid in {
            "version": _whole(self.version, 1),
            "parent": self.parent is None
            or (_whole(self.parent, 1) and self.parent < self.version),
            "created_at": made.isoformat(timespec="seconds") == self.created_at,
            "text": all(isinstance(text, str) for text in texts),
            "n or d": _whole(self.n, 1) and _whole(self.d, 1),
            "dtype": self.dtype in ("float32", "float16"),
            "names": all(
                isinstance(names, list) and all(isinstance(name, str) for name in names)
                for names in lists
            ),
            "class_names": len(set(self.class_names)) == len(self.class_names) > 0,
            "provenance": isinstance(self.provenance, dict)
            and _shallow(self.provenance, MAX_DEPTH),
            "parts": all(
                _whole(part.width, 1) and isinstance(part.column, str) for part in self.parts
            )
            and (not self.parts or width_of(self.parts) == self.d),
            "shares": self.fitted is None or len(self.fitted.shares) in (0, len(self.parts)),
            "next_key_id": _whole(self.next_key_id, 1),
            "built": isinstance(self.built, Built),
            "table.name": table is None or re.fullmatch(r"\w{1,64}", table.name) is not None,
            "table": table is None
            or (_whole(table.version, 1) and _whole(table.rows, 1) and table.rows == self.n),
            "digests": isinstance(self.digests, dict)
            and all(
                _TABLE_FILE.fullmatch(name) is not None and _SHA256.fullmatch(digest) is not None
                for name, digest in self.digests.items()
            ),
        }.items():
            _need(valid, name)

    def expected(self) -> dict[str, tuple[int | None, bool | None]]:
        """Return, for each kind of file, its number of rows and whether it must exist.

        A file whose number of rows is ``None`` may have any. A file is optional if the second entry is ``None``.
        """
        c = len(self.class_names)
        d = self.d
        n = self.n
        moved = self.fitted is not None and self.fitted.has_metric
        if self.table is not None:
            solved = self.fitted is not None and self.fitted.solved
            return {
                "classes": (c, True),
                "second": (d, None),
                "metric": (None, moved),
                "values": (n, solved),
                "prior": (d, None),
                "scores": (None, None),
            }
        return {
            "keys": (n, True),
            "labels": (n, True),
            "text": (c, True),
            "index": (None, self.index != FLAT or None),
            "values": (n, None),
            "curve": (None, None),
            "metric": (None, moved),
            "points": (n, moved and None),
            "sums": (c + d, None),
            "prior": (d, None),
            "scores": (None, None),
        }

    def _check_files(self) -> None:
        expected = self.expected()
        _need(self.files.keys() <= expected.keys(), "files")
        for kind, (rows, needed) in expected.items():
            _need(needed is None or (kind in self.files) == needed, f"files.{kind}")
            _need(
                rows is None or kind not in self.files or self.files[kind].rows == rows,
                f"files.{kind}.rows",
            )
        _need(
            "metric" not in self.files or 1 < self.files["metric"].rows <= 1 + self.d,
            "files.metric.rows",
        )
        _need(self.table is not None or not self.digests, "digests")
        for kind, file in self.files.items():
            _need(_SHA256.fullmatch(file.sha256) is not None, f"files.{kind}.sha256")
            _need(
                file.name == f"data/{kind}-{file.sha256[:16]}{SUFFIXES[kind]}", f"files.{kind}.name"
            )
            _need(_whole(file.bytes, 1), f"files.{kind}.bytes")
            _need(_whole(file.rows, 0 if kind == "scores" else 1), f"files.{kind}.rows")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


_FIELDS = {field.name for field in fields(Manifest)}
_ENTRIES = {
    "format",
    "format_version",
    "sha256",
    *_FIELDS,
    *(field.name for field in fields(Settings)),
} - {"settings"}


def manifest_name(version: int) -> str:
    """Return the name of a version's manifest in the folder ``manifests``."""
    return f"manifests/{version:06d}.json"


def named_in(raw: bytes) -> set[str] | None:
    """Return the names of the data files in a manifest, or ``None`` if the manifest is damaged.

    The result can include names that only occur in other entries. With a thousand classes, this is a hundred times as
    fast as :meth:`Manifest.from_bytes`.
    """
    body, _, digest = raw.rpartition(b',\n "sha256": "')
    if hashlib.sha256(body + b"\n}").hexdigest().encode() + b'"\n}' != digest:
        return None
    return {name.decode() for name in _NAMED.findall(raw)}


def _shallow(value: object, depth: int) -> bool:
    """Return whether JSON has at most ``depth`` nested levels."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return depth > 0
    return depth > 0 and all(_shallow(nested, depth - 1) for nested in value)


def _seal(body: Mapping[str, object]) -> bytes:
    digest = hashlib.sha256(json.dumps(body, indent=1, ensure_ascii=False).encode()).hexdigest()
    return json.dumps(dict(body) | {"sha256": digest}, indent=1, ensure_ascii=False).encode()
