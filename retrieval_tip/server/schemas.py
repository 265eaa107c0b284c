"""Classes for requests and responses. FastAPI validates requests with them, and describes both in /openapi.json."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import pyarrow as pa
from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, WithJsonSchema

from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.index import added_photos
from retrieval_tip.labelling.placing import Action, safe_name
from retrieval_tip.predictions import SCHEMA
from retrieval_tip.server.guard import FLOATS, FORM, JSON
from retrieval_tip.server.problems import MEDIA
from retrieval_tip.settings import Norms
from retrieval_tip.store.labels import LABEL_SCHEMA, VERSIONS_SCHEMA

Row = dict[str, object]
"""Type of a table row, or of a part of /openapi.json."""

NAME = re.compile(r"[^\W\d_][\w .-]{0,62}(?<![ .])")
"""Pattern for the name of a new index, which is also the name of its folder."""


def index_name(value: str) -> str:
    """Return a name for an index and its folder. Raises InputError if the name is not valid."""
    name = value.strip()
    if not NAME.fullmatch(name) or safe_name(name) != name:
        expected = (
            "1 to 64 letters, digits, spaces, dots, hyphens or underscores, starting with a letter, and no name that "
            "Windows reserves"
        )
        raise InputError(f"{name[:64]!r} is not valid; use {expected}")
    if added_photos.is_reserved(name):  # deleting this index would delete the photos of another
        raise InputError(f"{name!r} ends like a folder of photos; choose another name")
    return name


def class_name(value: str) -> str:
    """Return the name of a class. Raises InputError if it is not valid."""
    label = value.strip()
    if not label or not label.isprintable():
        raise InputError("must be a class name without control characters")
    return label


Text = Annotated[str, Field(min_length=1, max_length=1024)]
ClassName = Annotated[Text, AfterValidator(class_name)]
KeyId = Annotated[int, Field(ge=0, le=2**62)]
VersionNumber = Annotated[int, Field(ge=1, le=2**31)]
PhotoNumber = Annotated[int, Field(ge=0, le=2**31)]
Number = Annotated[int, Field(ge=1, lt=10**9)]
NORMS = "How to treat the norms of features: check that they are 1, scale them to 1 (unit), or keep any norm."
Override = Annotated[
    float | None,
    Field(ge=0, allow_inf_nan=False, description="Overrides the setting of the index."),
]


class ClassifyOptions(BaseModel):
    """What to find out about the inputs: the fields of :class:`settings.Ask`, and what only HTTP needs."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    index: str | None = None
    """Name of the index. It is required if several indexes are served."""
    alpha: Override = None
    beta: Override = None
    k: Number | Literal["all"] | None = None
    """Number of nearest keys to use, or all."""
    tail: bool | None = None
    """Whether to estimate the contribution of keys that are not retrieved."""
    top: int = Field(5, ge=1, le=1000)
    """Number of classes to return."""
    neighbours: int = Field(5, ge=0, le=1000)
    """Number of shots to return, strongest support first."""
    logits: bool = False
    """Whether to return the logits of all classes."""
    features: bool = False
    """Whether to return each feature, and the most similar shots."""
    at_least: float | None = Field(None, ge=0, le=1)
    """Answer with the narrowest group of this probability."""
    coverage: float | None = Field(None, ge=0, le=1)
    """Share of many sets that are to hold the right class."""
    without: list[KeyId] = Field([], max_length=1000)
    """Leave out this key. Can be repeated."""
    norms: Norms = Field("check", description=NORMS)


class Relabel(BaseModel, extra="forbid"):
    """The new labels of shots, by key id. Each label must be a class of the index."""

    labels: Annotated[dict[KeyId, Text], Field(min_length=1, max_length=100_000)]


class Rename(BaseModel, extra="forbid"):
    """A request to rename the class ``of`` to ``label``."""

    of: Text
    label: Text


class IndexName(BaseModel, extra="forbid"):
    """The name of an index and its folder."""

    name: Annotated[Text, AfterValidator(index_name)]


class Rollback(BaseModel, extra="forbid"):
    """A request to restore the version ``to``, provided that the index is still at version ``since``."""

    to: VersionNumber
    since: VersionNumber | None = None


class SetLabel(BaseModel, extra="forbid"):
    """The label of a photo. Without a label, the label of the photo is removed."""

    photo: PhotoNumber
    label: ClassName | None = None


StepName = Annotated[str, Field(min_length=1, max_length=100)]


class SetLabels(BaseModel, extra="forbid"):
    """Labels to save, and photos to show again when all others are labelled.

    ``step`` is a new name for this change. ``undo`` is the name of a step to undo.
    ``reviewed`` says that a person looked at the answers for these photos, instead of labelling the queue.
    """

    labels: Annotated[list[SetLabel], Field(max_length=1000)] = []
    reviewed: bool = False
    skip: Annotated[list[PhotoNumber], Field(max_length=1000)] = []
    step: StepName | None = None
    undo: StepName | None = None


class JoinEncoder(BaseModel, extra="forbid"):
    """Whether to ``join`` the encoder that is offered. If not, it is not offered again in this session."""

    join: bool


class SortInto(BaseModel, extra="forbid"):
    """The folder on the server's machine into which photos are sorted, and the largest share of wrong answers.

    ``labelled`` leaves out the photos without a label. ``undo`` restores the state before the folder was sorted into.
    The action ``xmp`` writes the classes into sidecars instead, which ``undo`` with this action restores. ``dry_run``
    changes nothing.
    """

    into: Annotated[str, Field(min_length=1, max_length=4096)]
    action: Action | Literal["xmp"] = "copy"
    labelled: bool = False
    at_most_wrong: Annotated[float, Field(ge=0, lt=1)] | None = None
    undo: bool = False
    dry_run: bool = False


class Images(BaseModel, extra="forbid"):
    """JPEG, PNG or WebP files, HEIC files with the extra heic, and videos with the extra video."""

    images: Annotated[list[UploadFile], Field(min_length=1)]


class Shots(Images):
    """Images, and one label, which is the class of every image."""

    label: Annotated[list[ClassName], Field(min_length=1, max_length=1)]


class NewIndex(Images):
    """Images, the class of each image in the same order, and the name of the new index and its folder."""

    name: Annotated[
        list[Annotated[Text, AfterValidator(index_name)]], Field(min_length=1, max_length=1)
    ]
    label: list[ClassName]


Numbers = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], FailFast()]


class Features(BaseModel, extra="forbid", strict=True):
    """Features of norm 1, as one list per input, and the names of the inputs."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"features": [[0.6, 0.8]], "inputs": ["camera-3/0001"]}}
    )
    features: Annotated[list[Numbers], Field(min_length=1), FailFast()]
    inputs: list[Text] | None = None


class LabelledFeatures(Features):
    """Features of norm 1, as one list per shot, their labels, and the names of the shots."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"features": [[0.6, 0.8]], "labels": ["cat"]}}
    )
    labels: list[ClassName]


def _body(*kinds: type[BaseModel], floats: bool = False) -> Row:
    """Describe a request body, which can be a form, JSON or binary."""
    content = {
        FORM if issubclass(kind, Images) else JSON: {"schema": kind.model_json_schema()}
        for kind in kinds
    }
    if floats:
        text = "Features as little-endian float32, row by row."
        content[FLOATS] = {"schema": {"type": "string", "format": "binary", "description": text}}
    return {"requestBody": {"required": True, "content": content}}


CLASSIFY = _body(Images, Features, floats=True)
GROUP = _body(Features, floats=True)
ADD = _body(Shots, LabelledFeatures)
MAKE = _body(NewIndex)
KEEP = _body(Images)


def _list_of(items: Row, **more: object) -> Row:
    return {"type": "array", "items": items, **more}


_NUMBERS = _list_of({"type": "number"})


class ProblemAnswer(BaseModel):
    """An error response (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


PROBLEM = {
    "description": "Problem (RFC 9457)",
    "content": {MEDIA: {"schema": ProblemAnswer.model_json_schema()}},
}
"""Description of every response that is not described otherwise."""


def _schema_of(kind: pa.DataType) -> Row:
    if pa.types.is_struct(kind):
        return {
            "type": "object",
            "properties": {field.name: _schema_of(field.type) for field in kind},
        }
    if pa.types.is_list(kind):
        return _list_of(_schema_of(kind.value_type))
    number = (
        "integer"
        if pa.types.is_integer(kind)
        else "number"
        if pa.types.is_floating(kind)
        else "string"
    )
    return {"type": "boolean" if pa.types.is_boolean(kind) else number}


def _row(columns: Iterable[pa.Field], **more: Row) -> WithJsonSchema:
    """Describe a table row that has the given nullable columns and the fields in ``more``."""
    kinds = {column.name: _schema_of(column.type) for column in columns}
    own = {name: kind | {"type": [kind["type"], "null"]} for name, kind in kinds.items()}
    return WithJsonSchema({"type": "object", "properties": own | more})


HISTORY = ("version", "parent", "created_at", "change", "keys", "classes", "current")
"""Columns of :data:`VERSIONS_SCHEMA` that responses contain."""
Key = Annotated[
    Row,
    _row(
        LABEL_SCHEMA, image={"type": ["string", "null"], "description": "Address of the thumbnail."}
    ),
]
PastVersion = Annotated[Row, _row(VERSIONS_SCHEMA.field(name) for name in HISTORY)]
Result = Annotated[
    Row,
    _row(
        SCHEMA,
        text_logits=_NUMBERS | {"description": "What the text adds to the logit of each label."},
        shot_logits=_NUMBERS | {"description": "What the shots add to the logit of each label."},
        feature=_NUMBERS | {"description": "The feature, if features is true, but not of a video."},
        picture={
            "type": "string",
            "description": "The frame of a video that matches best (data URL).",
        },
        similar=_list_of(
            {
                "type": "object",
                "properties": {"key_id": {"type": "integer"}, "affinity": {"type": "number"}},
            },
            description="The most similar shots, most similar first, if features is true.",
        ),
    ),
]


class Indexes(BaseModel):
    """The names of the served indexes, and what this server allows.

    ``changes`` tells whether it accepts changes, ``makes`` whether it can create indexes, and ``labels`` whether photos
    can be labelled here.
    """

    indexes: list[str]
    changes: bool
    makes: bool
    labels: bool


class KeyPage(BaseModel):
    """One page of the matching keys, and the total number of matching keys."""

    total: int
    keys: list[Key]


class Accuracy(BaseModel):
    """The accuracy on the examples, estimated on held-out shots, as fields of :class:`closed_form.FormChoice`.

    An unknown accuracy is null. ``weakest`` lists classes with their numbers of right answers and of held-out shots.
    """

    version: int | None = None
    photos: float | None = None
    words: float | None = None
    both: float | None = None
    interval: Sequence[float] | None = None
    names_hurt: bool | None = None
    weakest: Sequence[Sequence[str | int]] = ()
    tested: int | None = None
    classes: int | None = None
    summary: str | None = None


class ChangedIndex(BaseModel):
    """The index and the version that a change has made, and the fields of :class:`places.Changed` that it has.

    ``fit`` is the accuracy of the last fit. ``skipped`` lists the images that could not be read. ``sort`` is the
    command that copies the photos of the index into folders by class, if they are on the machine of the server.
    """

    index: str
    version: int
    key_ids: list[int] = []
    classes: list[str] = []
    known: int = 0
    duplicates: list[str] = []
    warnings: list[str] = []
    skipped: list[Skipped] = []
    sort: str | None = None
    fit: Accuracy


class Classified(BaseModel):
    """Results in the order of the inputs, and the settings that were used; see :class:`settings.Settings`.

    ``warnings`` contains a message if these settings make answers less accurate than the settings of the index.
    """

    index: str
    version: int
    results: list[Result]
    warnings: list[str]
    skipped: list[Skipped]
    alpha: float
    beta: float
    k: int | Literal["all"]
    tail: bool
    temperature: float
