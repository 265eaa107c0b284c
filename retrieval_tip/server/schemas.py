"""Requests and responses. FastAPI validates requests with these classes, and describes both in /openapi.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from retrieval_tip.predictions import SCHEMA, Evidence
from retrieval_tip.server.problems import MEDIA
from retrieval_tip.store.labels import LABEL_SCHEMA, VERSIONS_SCHEMA

Row = dict[str, object]
"""A row of a table, or a part of /openapi.json."""

KeyId = Annotated[int, Field(ge=0, le=2**62)]
Label = Annotated[str, Field(min_length=1, max_length=1024)]
VersionNumber = Annotated[int, Field(ge=1, le=2**31)]


class Move(BaseModel, extra="forbid"):
    """Shots, by key id, and their new label, a class of the index."""

    key_ids: Annotated[list[KeyId], Field(max_length=100_000)]
    label: Label


class Relabel(BaseModel, extra="forbid"):
    """The new ``label`` of the shots ``key_ids`` or of all shots of the class ``of``; or several ``moves``."""

    label: Label | None = None
    key_ids: Annotated[list[KeyId], Field(max_length=100_000)] | None = None
    of: Label | None = None
    moves: Annotated[list[Move], Field(max_length=10_000)] | None = None


class Rename(BaseModel, extra="forbid"):
    """The class ``of``, and its new name ``label``."""

    of: Label
    label: Label


class Rollback(BaseModel, extra="forbid"):
    """The version ``to`` restore, if the index is still at version ``since``."""

    to: VersionNumber
    since: VersionNumber | None = None


def _list_of(items: Row, **more: object) -> Row:
    return {"type": "array", "items": items, **more}


_NUMBERS, _INTEGERS = _list_of({"type": "number"}), _list_of({"type": "integer"})
_FEATURES = _list_of(_NUMBERS, minItems=1, description="Features of norm 1, one list per input.")
_TEXTS = _list_of({"type": "string", "minLength": 1})
_KINDS = "JPEG, PNG or WebP files; also HEIC if retrieval-tip[heic] is installed on the server."
_FILES = _list_of({"type": "string", "format": "binary"}, minItems=1, description=_KINDS)


def _body(form: Row, json: Row | None = None, example: Row | None = None) -> Row:
    """Describe a body: a form, whose fields are all required, or JSON."""
    schema: Row = {"type": "object", "properties": form, "required": sorted(form)}
    content: Row = {"multipart/form-data": {"schema": schema}}
    if json is not None:
        required = sorted(json.keys() & {"features", "labels"})
        schema = {"type": "object", "properties": json, "required": required, "additionalProperties": False}
        content["application/json"] = {"schema": schema, "example": example}
    return {"requestBody": {"required": True, "content": content}}


CLASSIFY = _body(
    {"images": _FILES},
    {"features": _FEATURES, "inputs": _TEXTS},
    {"features": [[0.6, 0.8]], "inputs": ["camera-3/0001"]},
)
ADD = _body(
    {"images": _FILES, "label": {"type": "string", "minLength": 1, "description": "Class of all images."}},
    {"features": _FEATURES, "labels": _TEXTS, "sources": _TEXTS},
    {"features": [[0.6, 0.8]], "labels": ["cat"], "sources": ["camera-3/0001"]},
)
MAKE = _body(
    {
        "name": {"type": "string", "description": "Name of the index and of its folder."},
        "images": _FILES,
        "label": _TEXTS | {"description": "Class of each image, in the same order."},
    }
)


class ProblemAnswer(BaseModel):
    """A problem (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Describe error responses with these statuses, for a route."""
    content = {MEDIA: {"schema": ProblemAnswer.model_json_schema()}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}


_UNCHECKED = PlainValidator(lambda value: value)
Floats = Annotated[npt.NDArray[np.float32], _UNCHECKED, WithJsonSchema(_NUMBERS)]
Ints = Annotated[npt.NDArray[np.int64], _UNCHECKED, WithJsonSchema(_INTEGERS)]


def _schema_of(kind: pa.DataType) -> Row:
    if pa.types.is_struct(kind):
        return {"type": "object", "properties": {field.name: _schema_of(field.type) for field in kind}}
    if pa.types.is_list(kind):
        return _list_of(_schema_of(kind.value_type))
    number = "integer" if pa.types.is_integer(kind) else "number" if pa.types.is_floating(kind) else "string"
    return {"type": "boolean" if pa.types.is_boolean(kind) else number}


def _row(columns: Iterable[pa.Field], **more: Row) -> WithJsonSchema:
    """Describe a table row with these nullable columns, and ``more`` fields."""
    kinds = {column.name: _schema_of(column.type) for column in columns}
    own = {name: kind | {"type": [kind["type"], "null"]} for name, kind in kinds.items()}
    return WithJsonSchema({"type": "object", "properties": own | more})


HISTORY = ("version", "parent", "created_at", "change", "keys", "classes", "current")
"""Columns of :data:`VERSIONS_SCHEMA` in a response."""
_EVIDENCE = {field.name: {} if field.name == "complete" else _NUMBERS for field in fields(Evidence)}

Key = Annotated[Row, _row(LABEL_SCHEMA, image={"type": ["string", "null"], "description": "Address of the thumbnail."})]
PastVersion = Annotated[Row, _row(VERSIONS_SCHEMA.field(name) for name in HISTORY)]
Result = Annotated[
    Row,
    _row(
        (column for column in SCHEMA if column.name != "keys"),
        evidence={"type": "object", "properties": _EVIDENCE, "description": str(Evidence.__doc__)},
    ),
]


@dataclass(frozen=True)
class Unread:
    """An unreadable input, and the reason."""

    input: str
    reason: str


@dataclass(frozen=True)
class Health:
    """The state of the server."""

    status: Literal["ok"]
    version: str
    indexes: int


@dataclass(frozen=True)
class UsedSettings:
    """The settings used, as in :class:`settings.Settings`."""

    alpha: float
    beta: float
    k: int | Literal["all"]
    tail: bool
    temperature: float


@dataclass(frozen=True)
class IndexFacts(UsedSettings):
    """An index, at its current version."""

    name: str
    version: int
    created_at: str
    change: str
    n_keys: int
    n_classes: int
    d: int
    logit_scale: float
    index: str
    exact_search: bool
    backbone: str | None
    images: bool
    text: bool
    least_cache: float | None
    log_offset: float | None
    metric: str
    values: str
    changes: bool


@dataclass(frozen=True)
class Indexes:
    """The served indexes, and whether this server can make new ones."""

    indexes: list[IndexFacts]
    makes: bool


@dataclass(frozen=True)
class IndexClass:
    """A class and its number of keys."""

    class_id: int
    label: str
    keys: int


@dataclass(frozen=True)
class WholeIndex(IndexFacts):
    """An index with its classes, prompt templates, and the origin of its settings."""

    classes: list[IndexClass]
    templates: list[str]
    provenance: Row


@dataclass(frozen=True)
class KeyPage:
    """A page of the matching keys, and their total number."""

    version: int
    total: int
    offset: int
    limit: int
    keys: list[Key]


@dataclass(frozen=True)
class Map:
    """Keys in two dimensions, from -1 to 1; ``explained`` is the share of the variance on each axis.

    ``axes`` of principal components place a feature f: ``axes[0] + f @ axes[1:]``.
    """

    version: int
    method: str
    methods: list[str]
    total: int
    key_ids: Ints
    class_ids: Ints
    x: Floats
    y: Floats
    explained: list[float] | None
    axes: list[Floats] | None


@dataclass(frozen=True)
class Audit:
    """Shots that look mislabelled, worst first, as in ``retrieval-tip index audit``."""

    version: int
    total: int
    shots: list[Row]


@dataclass(frozen=True)
class Shares:
    """Accuracy on held-out shots by photos alone, class names alone (``words``) and both; null if unknown."""

    photos: float | None
    words: float | None
    both: float | None


@dataclass(frozen=True)
class Accuracy(Shares):
    """The estimated accuracy of a version."""

    version: int


@dataclass(frozen=True)
class ChangedShots:
    """The new version of the index, and the keys that were added, removed or moved."""

    index: str
    version: int
    key_ids: list[int]


@dataclass(frozen=True)
class AddedShots(ChangedShots):
    """The added keys and new ``classes``; ``known`` counts images that the class had already.

    ``warnings`` names new classes spelled almost like an existing one.
    """

    classes: list[str]
    known: int
    duplicates: list[str]
    warnings: list[str]
    skipped: list[Unread]


@dataclass(frozen=True)
class Judgement(Shares):
    """The accuracy that a fit estimated, and a sentence about it."""

    summary: str | None


@dataclass(frozen=True)
class FittedIndex:
    """An index after a fit."""

    index: str
    version: int
    judged: Judgement


@dataclass(frozen=True)
class MadeIndex(FittedIndex):
    """A new index; ``warnings`` as in :class:`AddedShots`."""

    warnings: list[str]
    skipped: list[Unread]


@dataclass(frozen=True)
class History:
    """The kept versions, oldest first."""

    version: int
    versions: list[PastVersion]


@dataclass(frozen=True)
class KeyValues:
    """The value of each key for each class, solved or trained: enough to compute answers in the browser."""

    version: int
    key_ids: Ints
    values: list[Floats]


@dataclass(frozen=True)
class Exemplar:
    """The key closest to the mean of its class."""

    class_id: int
    key_id: int
    image: str | None


@dataclass(frozen=True)
class Exemplars:
    """One exemplar per class, and the mean affinity of keys of the same class (``own``) and of others (``other``)."""

    version: int
    exemplars: list[Exemplar]
    own: float | None
    other: float | None


@dataclass(frozen=True)
class Classified(UsedSettings):
    """Results in the order of the inputs, and the settings used.

    ``warnings`` tells if these settings make answers worse than the index's own.
    """

    index: str
    version: int
    results: list[Result]
    warnings: list[str]
    skipped: list[Unread]
