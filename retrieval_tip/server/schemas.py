"""Requests and answers as values. FastAPI checks requests by them, and describes both in the OpenAPI document."""

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
"""A row of a table, or a part of the OpenAPI document."""

EXAMPLE_FEATURE = [0.6, 0.8]

KeyId = Annotated[int, Field(ge=0, le=2**62)]
Label = Annotated[str, Field(min_length=1, max_length=1024)]
VersionNumber = Annotated[int, Field(ge=1, le=2**31)]


class Move(BaseModel, extra="forbid"):
    """Shots, by their ids, and the class of the index that they are given to."""

    key_ids: Annotated[list[KeyId], Field(max_length=100_000)]
    label: Label


class Relabel(BaseModel, extra="forbid"):
    """The new ``label`` of some shots, or of the whole class ``of``; or several ``moves`` at once."""

    label: Label | None = None
    key_ids: Annotated[list[KeyId], Field(max_length=100_000)] | None = None
    of: Label | None = None
    moves: Annotated[list[Move], Field(max_length=10_000)] | None = None


class Rename(BaseModel, extra="forbid"):
    """The class ``of`` the index, and its new name."""

    of: Label
    label: Label


class Rollback(BaseModel, extra="forbid"):
    """The version ``to`` go back to, if the index is still at version ``since``."""

    to: VersionNumber
    since: VersionNumber | None = None


_FEATURES = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "number"}},
    "minItems": 1,
    "description": "Unit-norm features, a list each.",
}
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}}
_FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "minItems": 1,
    "description": "JPEG, PNG or WebP files, and HEIC if the server has the extra heic.",
}


def _body(form: Row, json: Row | None = None, example: Row | None = None) -> Row:
    """Describe a body: a form, of which all fields are needed, or JSON."""
    whole: Row = {"type": "object", "properties": form, "required": sorted(form)}
    content: Row = {"multipart/form-data": {"schema": whole}}
    if json is not None:
        needed = sorted(json.keys() & {"features", "labels"})
        whole = {"type": "object", "properties": json, "required": needed, "additionalProperties": False}
        content["application/json"] = {"schema": whole, "example": example}
    return {"requestBody": {"required": True, "content": content}}


CLASSIFY = _body(
    {"images": _FILES},
    {"features": _FEATURES, "inputs": _TEXTS},
    {"features": [EXAMPLE_FEATURE], "inputs": ["camera-3/0001"]},
)
ADD = _body(
    {"images": _FILES, "label": {"type": "string", "minLength": 1, "description": "The class of all the images."}},
    {"features": _FEATURES, "labels": _TEXTS, "sources": _TEXTS},
    {"features": [EXAMPLE_FEATURE], "labels": ["cat"], "sources": ["camera-3/0001"]},
)
MAKE = _body(
    {
        "name": {"type": "string", "description": "Name of the index and of its folder."},
        "images": _FILES,
        "label": _TEXTS | {"description": "The class of each image, in their order."},
    }
)


class ProblemAnswer(BaseModel):
    """A problem (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Describe the answers of these statuses, for a route."""
    content = {MEDIA: {"schema": ProblemAnswer.model_json_schema()}}
    return {status: {"description": "What went wrong", "content": content} for status in statuses}


def _list_of(kind: str) -> Row:
    return {"type": "array", "items": {"type": kind}}


def _same(value: object) -> object:
    return value


Floats = Annotated[npt.NDArray[np.float32], PlainValidator(_same), WithJsonSchema(_list_of("number"))]
Ints = Annotated[npt.NDArray[np.int64], PlainValidator(_same), WithJsonSchema(_list_of("integer"))]


def _described(kind: pa.DataType) -> Row:
    if pa.types.is_struct(kind):
        return {"type": "object", "properties": {field.name: _described(field.type) for field in kind}}
    if pa.types.is_list(kind):
        return {"type": "array", "items": _described(kind.value_type)}
    number = "integer" if pa.types.is_integer(kind) else "number" if pa.types.is_floating(kind) else "string"
    return {"type": "boolean" if pa.types.is_boolean(kind) else number}


def _row(columns: Iterable[pa.Field], **more: Row) -> WithJsonSchema:
    """Describe a row of a table of these columns, which may be null, with ``more`` beside them."""
    kinds = {column.name: _described(column.type) for column in columns}
    own = {name: kind | {"type": [kind["type"], "null"]} for name, kind in kinds.items()}
    return WithJsonSchema({"type": "object", "properties": own | more})


HISTORY = ("version", "parent", "created_at", "change", "keys", "classes", "current")
"""The columns of :data:`VERSIONS_SCHEMA` in an answer."""
_EVIDENCE = {field.name: {} if field.name == "complete" else _list_of("number") for field in fields(Evidence)}

Key = Annotated[Row, _row(LABEL_SCHEMA, image={"type": ["string", "null"], "description": "Address of its picture."})]
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
    """An input that could not be read, and why."""

    input: str
    reason: str


@dataclass(frozen=True)
class Health:
    """The server answers."""

    status: Literal["ok"]
    version: str
    indexes: int


@dataclass(frozen=True)
class UsedSettings:
    """The settings of an answer, as :class:`settings.Settings`; ``k`` is a number of keys, or all."""

    alpha: float
    beta: float
    k: int | Literal["all"]
    tail: bool
    temperature: float


@dataclass(frozen=True)
class IndexFacts(UsedSettings):
    """An index, at the version that answers."""

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
    """The served indexes, and whether this server makes others."""

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
    """An index with its classes, and the origin of its settings."""

    classes: list[IndexClass]
    templates: list[str]
    provenance: Row


@dataclass(frozen=True)
class KeyPage:
    """A page of the keys that match, and their total number."""

    version: int
    total: int
    offset: int
    limit: int
    keys: list[Key]


@dataclass(frozen=True)
class Map:
    """Keys in two dimensions, -1 to 1; ``explained`` is the share of the variance on each axis.

    ``axes``, of principal components, place a feature: the first row and its products with the others.
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
    """Shots that look mislabelled, worst first: rows of ``retrieval-tip index audit``."""

    version: int
    total: int
    shots: list[Row]


@dataclass(frozen=True)
class Shares:
    """Shares of right answers on the shots, each held out, by photos alone, words alone and both; null if unknown."""

    photos: float | None
    words: float | None
    both: float | None


@dataclass(frozen=True)
class Accuracy(Shares):
    """The estimated accuracy of a version."""

    version: int


@dataclass(frozen=True)
class ChangedShots:
    """The index at the version that a change made, and the keys that it added, removed or moved."""

    index: str
    version: int
    key_ids: list[int]


@dataclass(frozen=True)
class AddedShots(ChangedShots):
    """Keys that were added, and new ``classes``; ``known`` is the number of images that had this label already.

    ``warnings`` names new classes that are spelled almost as another one.
    """

    classes: list[str]
    known: int
    duplicates: list[str]
    warnings: list[str]
    skipped: list[Unread]


@dataclass(frozen=True)
class Judgement(Shares):
    """The estimate of a fit, and a sentence about it."""

    summary: str | None


@dataclass(frozen=True)
class FittedIndex:
    """An index that was fitted."""

    index: str
    version: int
    judged: Judgement


@dataclass(frozen=True)
class MadeIndex(FittedIndex):
    """A new index; ``warnings`` as of :class:`AddedShots`."""

    warnings: list[str]
    skipped: list[Unread]


@dataclass(frozen=True)
class History:
    """Versions, oldest first."""

    version: int
    versions: list[PastVersion]


@dataclass(frozen=True)
class KeyValues:
    """The values of each key for each class, if they were solved or trained: enough to weigh answers again."""

    version: int
    key_ids: Ints
    values: list[Floats]


@dataclass(frozen=True)
class Exemplar:
    """The key nearest to the mean of its class."""

    class_id: int
    key_id: int
    image: str | None


@dataclass(frozen=True)
class Exemplars:
    """An exemplar a class; mean affinities of keys of one class (``own``), and of two classes (``other``)."""

    version: int
    exemplars: list[Exemplar]
    own: float | None
    other: float | None


@dataclass(frozen=True)
class Classified(UsedSettings):
    """Results, in the order of the inputs, and the settings that they were made with.

    ``warnings`` says so if these settings make the answers worse than the index's own.
    """

    index: str
    version: int
    results: list[Result]
    warnings: list[str]
    skipped: list[Unread]
