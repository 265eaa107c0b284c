"""Read and write manifests, which describe the versions of an index in a folder or in another store.

A manifest is a JSON file that lists every data file with its SHA-256 and ends with its own SHA-256. A manifest that is
damaged or has unknown entries is rejected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from retrieval_tip.backbones.base import Identity
from retrieval_tip.errors import BackboneError, StoreError, UsageError
from retrieval_tip.settings import Built, Dtype, Fitted, Settings

FORMAT = "retrieval-tip index"
TABLE_FORMAT, FITTED_FORMAT, BUILT_FORMAT, FORMAT_VERSION = 3, 4, 5, 7
"""Versions of the manifest format. All of these versions can be read, and new manifests use the last version.

Format 1 has a single segment, no ``change`` and no ``next_key_id``. Format 3 added ``table``, format 4 ``fitted``,
format 5 ``built``, format 6 ``sums``, which must be updated whenever the keys change, and format 7 ``gamma``,
``class_prior``, ``automatic`` and ``prior``.
"""

KINDS = {"keys": ".npy", "index": ".faiss", "labels": ".parquet", "text": ".npy"}
OPTIONAL_KINDS = {"values": ".npy", "curve": ".parquet", "text_index": ".faiss",
                  "metric": ".npy", "points": ".npy", "sums": ".npy", "prior": ".npy"}  # fmt: skip
"""Files that only fitted or fine-tuned indexes have.

- ``values`` is a float32 array of solved or trained values, of shape ``[n, c]``.
- A fitted index has ``metric``, a float32 array of shape ``[1 + d, d]`` with the mean and the transform, and
  ``points``, which is ``phi(K)`` of the first segment. If the index has many keys, it also has ``sums``, a float64
  array of shape ``[c + d, 1 + d]`` over all keys (see :class:`sums.Sums`). If it was fitted with the scatter of other
  photos, that is the ``prior``, a float32 array of shape ``[d, d]``.
- A fine-tuned index has ``curve``, the training loss.
- ``text_index`` is ignored. Up to version 0.1, indexes with more than 32,768 classes had this file.
"""
TABLE_KINDS = {"classes": ".parquet"}
"""File next to a table that contains the label, the text weight, the number of keys and the key sum of each class."""
OPTIONAL_TABLE_KINDS = {"second": ".npy", "metric": ".npy", "values": ".npy", "prior": ".npy"}
"""Optional files next to a table.

``second`` is the sum of the keys' outer products, of shape ``[d, d]``. A fitted index can also have a ``metric``, a
``prior`` and solved ``values``.
"""
SUFFIXES = KINDS | OPTIONAL_KINDS | TABLE_KINDS | OPTIONAL_TABLE_KINDS

MAX_DEPTH, MAX_KEY_ID = 64, 2**62
"""Maximum nesting depth of a provenance, and maximum value of ``next_key_id``."""

_NAMED = re.compile(rb"data/\w+-[0-9a-f]{16}\.\w+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TABLE_FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)+")


@dataclass(frozen=True)
class DataFile:
    """An immutable file of an index, described by its path in the folder, number of rows, size and SHA-256.

    ``rows`` is usually the number of keys. It is the number of classes for text weights, the number of epochs for a
    curve, ``1 + d`` for a metric and ``c + d`` for sums.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Segment:
    """A group of keys, sorted by class, and a table of their labels."""

    keys: DataFile
    labels: DataFile


@dataclass(frozen=True)
class Table:
    """A version of a database table with the keys and labels of an index."""

    name: str
    version: int
    rows: int


@dataclass(frozen=True)
class TableDigests:
    """Digests of a table version, each as 64 hexadecimal digits.

    ``rows`` is the digest of all rows (see :mod:`row_digest`), or ``None`` for an older table. ``files`` maps the names
    of the table's files to their SHA-256. It includes LanceDB's manifest and, on a local disk, its data files.
    """

    rows: str | None
    files: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """The description of a version of an index, which contains everything except the arrays.

    ``files`` maps each kind to a data file. The ``keys`` and ``labels`` in it form the first segment, which the
    ``index`` covers. ``later`` lists the segments that were added afterwards. ``change`` briefly describes how this
    version was created. ``next_key_id`` is the first unused key id; it is ``None`` in format 1. ``provenance`` is for
    information only.

    If the keys and labels are in a ``table``, there are no segments, and ``files`` contains ``classes`` and other data
    that is not in the table. ``digests`` are the digests of that table, if it has any.
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
    files: dict[str, DataFile] = field(default_factory=dict)
    later: list[Segment] = field(default_factory=list)
    next_key_id: int | None = None
    change: str = ""
    table: Table | None = None
    fitted: Fitted | None = None
    built: Built = field(default_factory=Built)
    digests: TableDigests | None = None

    @property
    def segments(self) -> list[Segment]:
        """All segments, in the order of their keys."""
        return [Segment(self.files["keys"], self.files["labels"]), *self.later]

    @property
    def data_files(self) -> list[DataFile]:
        """All data files of this version."""
        return [*self.files.values(), *(file for part in self.later for file in (part.keys, part.labels))]

    @property
    def has_points(self) -> bool:
        """Whether the table also contains the points. It does not if it has solved values, as a query uses all keys."""
        return self.table is not None and "metric" in self.files and "values" not in self.files

    @property
    def keys_digest(self) -> str:
        """Digest of the keys, as 16 hexadecimal digits."""
        digests = [part.keys.sha256 for part in self.segments]
        return (digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())[:16]

    def to_bytes(self) -> bytes:
        """Convert the manifest to JSON. The last entry is the SHA-256 of the other entries."""
        body: dict[str, object] = {"format": FORMAT, "format_version": FORMAT_VERSION} | asdict(self)
        del body["settings"]
        body |= asdict(self.settings)
        if self.digests is None:  # omitted so that older programs can read the folder
            del body["digests"]
        return _seal(body)

    @classmethod
    def from_bytes(
        cls, raw: bytes, name: str, remedy: str = "restore it, or delete the folder and build the index again"
    ) -> Manifest:
        """Invert :meth:`to_bytes`. Raises StoreError if the manifest is damaged, or if its encoder was trained."""
        damaged = f"{name}: damaged"
        try:
            body = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise StoreError(f"{damaged} (not UTF-8: byte {error.start}); {remedy}") from None
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{damaged} (not JSON: {error}); {remedy}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise StoreError(f"{name}: not the manifest of a retrieval-tip index")
        version = body.get("format_version")
        writer = ascii(body.get("created_by", "a newer version"))[:100].strip("'")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StoreError(
                f"{name}: index format {version}, but this program reads up to {FORMAT_VERSION}; install {writer}"
            )
        try:
            sealed = _seal({key: value for key, value in body.items() if key != "sha256"}) == raw
        except (ValueError, RecursionError):  # an unpaired surrogate, or JSON that is nested too deeply
            sealed = False
        if not sealed:
            raise StoreError(f"{damaged} (its checksum does not match); {remedy}")
        if unknown := body.keys() - _ENTRIES:  # an unknown entry may change every answer
            raise StoreError(f"{name}: has unknown entries ({ascii(sorted(unknown))[:100]}); install {writer}")
        if isinstance(body.get("files"), dict) and "weights" in body["files"]:
            raise StoreError(
                f"{name}: the index has trained encoder weights, which are no longer read; build the index again"
            )
        try:
            if type(version) is not int or version < 1:
                raise ValueError("format_version")
            return cls.parse(body)
        except (KeyError, TypeError, ValueError, OverflowError, BackboneError) as error:
            raise StoreError(f"{damaged} ({error!r}); {remedy}") from None

    @classmethod
    def parse(cls, stated: Mapping[str, Any]) -> Manifest:
        """Convert parsed JSON to a manifest.

        Raises KeyError, TypeError, ValueError or OverflowError if an entry is missing or invalid.
        """
        version, stated = stated["format_version"], {"digests": None} | dict(stated)
        if version == 1:
            stated |= {"later": [], "next_key_id": None, "change": ""}
        if version < TABLE_FORMAT:
            stated |= {"table": None}
        if version < FITTED_FORMAT:
            stated |= {"fitted": None}
        if version < BUILT_FORMAT:
            stated |= {"built": _built(stated["provenance"])}
        body = {field.name: stated[field.name] for field in fields(cls) if field.name != "settings"}
        needed = [field.name for field in fields(Settings) if field.name in stated or not field.metadata.get("later")]
        settings = Settings(**{name: stated[name] for name in needed})
        _need(_whole(body["version"], 1), "version")
        _need(body["parent"] is None or (_whole(body["parent"], 1) and body["parent"] < body["version"]), "parent")
        _need(all(isinstance(body[key], str) for key in ("created_at", "created_by", "dtype", "index")), "text")
        _need(_whole(body["n"], 1) and _whole(body["d"], 1), "n or d")
        _need(body["dtype"] in ("float32", "float16"), "dtype")
        for key in ("class_names", "templates"):
            _need(isinstance(body[key], list) and all(isinstance(text, str) for text in body[key]), key)
        _need(len(set(body["class_names"])) == len(body["class_names"]) > 0, "class_names")
        _need(isinstance(stated["tail"], bool), "tail")
        if body["backbone"] is not None:
            Identity.from_dict(body["backbone"])
        _need(isinstance(body["provenance"], dict) and isinstance(body["files"], dict), "provenance or files")
        _need(_shallow(body["provenance"], MAX_DEPTH), "provenance")
        _need(isinstance(body["change"], str) and isinstance(body["later"], list), "change or later")
        following = body["next_key_id"]
        _need(following is None or (_whole(following, 1) and following <= MAX_KEY_ID), "next_key_id")
        files = {kind: DataFile(**entry) for kind, entry in body["files"].items()}
        _need(all(isinstance(entry, dict) for entry in body["later"]), "later")
        later = [Segment(**{kind: DataFile(**file) for kind, file in entry.items()}) for entry in body["later"]]
        body |= {"files": files, "later": later, "built": Built(**body["built"])}
        body["table"] = None if body["table"] is None else Table(**body["table"])
        body["fitted"] = None if body["fitted"] is None else Fitted(**body["fitted"])
        body["digests"] = None if body["digests"] is None else TableDigests(**body["digests"])
        manifest = cls(settings=settings, **body)
        manifest._check_files()
        return manifest

    def _check_files(self) -> None:
        files, later, table, c = self.files, self.later, self.table, len(self.class_names)
        metric, moved = files.get("metric"), self.fitted is not None and self.fitted.metric != "none"
        if table is not None:
            kinds = TABLE_KINDS | OPTIONAL_TABLE_KINDS
            _need(TABLE_KINDS.keys() <= files.keys() <= kinds.keys() and not later, "files")
            _need(isinstance(table.name, str) and re.fullmatch(r"\w{1,64}", table.name) is not None, "table.name")
            _need(_whole(table.version, 1) and table.rows == self.n and _whole(table.rows, 1), "table")
            _need(files["classes"].rows == c, "files.classes.rows")
            solved = self.fitted is not None and self.fitted.solved
            _need(("values" in files) == solved and ("values" not in files or files["values"].rows == self.n), "values")
            _need("second" not in files or files["second"].rows == self.d, "files.second.rows")
            if self.digests is not None:
                of_files, of_rows = self.digests.files, self.digests.rows
                _need(isinstance(of_files, dict), "digests.files")
                _need(all(_TABLE_FILE.fullmatch(name) is not None for name in of_files), "digests.files")
                known = [*of_files.values(), *(() if of_rows is None else (of_rows,))]
                _need(all(_SHA256.fullmatch(digest) is not None for digest in known), "digests")
        else:
            _need(KINDS.keys() <= files.keys() <= KINDS.keys() | OPTIONAL_KINDS.keys(), "files")
            _need(self.digests is None, "digests")
        _need(not later or "values" not in files, "later")  # trained values are stored in a single array
        of_later = [(kind, file) for part in later for kind, file in vars(part).items()]
        for kind, file in [*files.items(), *of_later]:
            _need(_SHA256.fullmatch(file.sha256) is not None, f"files.{kind}.sha256")
            _need(file.name == f"data/{kind}-{file.sha256[:16]}{SUFFIXES[kind]}", f"files.{kind}.name")
            _need(_whole(file.bytes, 1), f"files.{kind}.bytes")
            _need(_whole(file.rows, 1), f"files.{kind}.rows")
        _need("prior" not in files or files["prior"].rows == self.d, "files.prior.rows")
        _need((metric is not None) == moved and (metric is None or metric.rows == self.d + 1), "files.metric")
        if table is not None:
            return
        first, points = files["keys"].rows, files.get("points")
        of_keys = [files[kind].rows for kind in ("index", "labels", "values", "points") if kind in files]
        _need(all(rows == first for rows in of_keys), "files.rows")
        _need(files["text"].rows == c, "files.text.rows")
        _need((points is not None) == moved, "points")
        _need("sums" not in files or files["sums"].rows == c + self.d, "files.sums.rows")
        _need(all(part.keys.rows == part.labels.rows for part in later), "later.rows")
        _need(first + sum(part.keys.rows for part in later) == self.n, "n")


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_ENTRIES = {"format", "format_version", "sha256"} | {
    field.name for kind in (Manifest, Settings) for field in fields(kind) if field.name != "settings"
}


def named_in(raw: bytes) -> set[str] | None:
    """Return the names of the data files in a manifest, or ``None`` if the manifest is damaged.

    The result can include names that only occur in other entries. With a thousand classes, this is a hundred times as
    fast as :meth:`Manifest.from_bytes`.
    """
    body, _, digest = raw.rpartition(b',\n "sha256": "')
    if hashlib.sha256(body + b"\n}").hexdigest().encode() + b'"\n}' != digest:
        return None
    return {name.decode() for name in _NAMED.findall(raw)}


def _built(provenance: object) -> dict[str, object]:
    """Derive ``built`` from the provenance of a format before 5."""
    stated = provenance if isinstance(provenance, dict) else {}
    said: dict[str, object] = {"auto_index": stated.get("index") == "auto"}
    for name in ("source", "shots", "seed", "views"):
        if (value := stated.get(name)) is not None:
            with suppress(UsageError):
                said[name] = getattr(Built(**{name: value}), name)
    return said


def _shallow(value: object, depth: int) -> bool:
    """Return whether JSON has at most ``depth`` nested levels."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_shallow(part, depth - 1) for part in parts)


def _seal(body: Mapping[str, object]) -> bytes:
    digest = hashlib.sha256(json.dumps(body, indent=1, ensure_ascii=False).encode()).hexdigest()
    return json.dumps(dict(body) | {"sha256": digest}, indent=1, ensure_ascii=False).encode()
