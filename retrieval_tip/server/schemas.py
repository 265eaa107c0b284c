"""Classes for requests and responses. FastAPI validates requests with them, and describes both in /openapi.json."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema

from retrieval_tip.labelling.placing import Action
from retrieval_tip.labelling.queue import Picked
from retrieval_tip.predictions import SCHEMA
from retrieval_tip.server.problems import MEDIA
from retrieval_tip.server.uploads import class_name, index_name
from retrieval_tip.settings import Norms
from retrieval_tip.store.labels import LABEL_SCHEMA, VERSIONS_SCHEMA

Row = dict[str, object]
"""Type of a table row, or of a part of /openapi.json."""

KeyId = Annotated[int, Field(ge=0, le=2**62)]
Label = Annotated[str, Field(min_length=1, max_length=1024)]
VersionNumber = Annotated[int, Field(ge=1, le=2**31)]
PhotoNumber = Annotated[int, Field(ge=0, le=2**31)]
Number = Annotated[int, Field(ge=1, lt=10**9)]
NORMS = "How to treat the norms of features: check that they are 1, scale them to 1 (unit), or keep any norm."
Override = Annotated[float | None, Field(ge=0, allow_inf_nan=False, description="Overrides the setting of the index.")]


class ClassifyOptions(BaseModel):
    """What to find out about the inputs: the fields of :class:`settings.Ask`, and what only HTTP needs."""

    index: str | None = Field(None, description="Name of the index. It is required if several indexes are served.")
    alpha: Override = None
    beta: Override = None
    k: Number | Literal["all"] | None = Field(None, description="Number of nearest keys to use, or all.")
    tail: bool | None = Field(None, description="Whether to estimate the contribution of keys that are not retrieved.")
    top: int = Field(5, ge=1, le=1000, description="Number of classes to return.")
    neighbours: int = Field(5, ge=0, le=1000, description="Number of shots to return, strongest support first.")
    logits: bool = Field(False, description="Whether to return the logits of all classes.")
    features: bool = Field(False, description="Whether to return each feature, and the most similar shots.")
    at_least: float | None = Field(None, ge=0, le=1, description="Answer with the narrowest group of this probability.")
    coverage: float | None = Field(None, ge=0, le=1, description="Share of sets that are to hold the right class.")
    without: list[KeyId] = Field([], max_length=1000, description="Leave out this key. Can be repeated.")
    norms: Norms = Field("check", description=NORMS)


class Move(BaseModel, extra="forbid"):
    """The key ids of shots and their new label, which must be a class of the index."""

    key_ids: Annotated[list[KeyId], Field(max_length=100_000)]
    label: Label


class Relabel(BaseModel, extra="forbid"):
    """The new label of the shots ``key_ids``, or of all shots of the class ``of``, or several ``moves`` instead."""

    label: Label | None = None
    key_ids: Annotated[list[KeyId], Field(max_length=100_000)] | None = None
    of: Label | None = None
    moves: Annotated[list[Move], Field(max_length=10_000)] | None = None


class Rename(BaseModel, extra="forbid"):
    """A request to rename the class ``of`` to ``label``."""

    of: Label
    label: Label


class IndexName(BaseModel, extra="forbid"):
    """The name of an index and its folder."""

    name: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(index_name)]


class Rollback(BaseModel, extra="forbid"):
    """A request to restore the version ``to``, provided that the index is still at version ``since``."""

    to: VersionNumber
    since: VersionNumber | None = None


class SetLabel(BaseModel, extra="forbid"):
    """The label of a photo. Without a label, the label of the photo is removed."""

    photo: PhotoNumber
    label: Annotated[Label, AfterValidator(class_name)] | None = None


StepName = Annotated[str, Field(min_length=1, max_length=100)]


class SetLabels(BaseModel, extra="forbid"):
    """Labels to save, and photos to show again when all others are labelled.

    ``step`` is a new name for this change, with which it can be undone. ``undo`` is the name of a step to undo.
    ``reviewed`` says that a person looked at the answers for these photos, instead of labelling the queue.
    """

    labels: Annotated[list[SetLabel], Field(max_length=1000)] = []
    reviewed: bool = False
    skip: Annotated[list[PhotoNumber], Field(max_length=1000)] = []
    step: StepName | None = None
    undo: StepName | None = None


class SortInto(BaseModel, extra="forbid"):
    """The folder on the server's machine into which photos are sorted, and the largest share of wrong answers.

    ``labelled`` leaves out the photos without a label. ``undo`` restores the state before the folder was sorted into.
    The action ``xmp`` writes the classes into sidecars instead, which ``undo`` with this action restores.
    """

    into: Annotated[str, Field(min_length=1, max_length=4096)]
    action: Action | Literal["xmp"] = "copy"
    labelled: bool = False
    at_most_wrong: Annotated[float, Field(ge=0, lt=1)] | None = None
    undo: bool = False


def _list_of(items: Row, **more: object) -> Row:
    return {"type": "array", "items": items, **more}


_NUMBERS = _list_of({"type": "number"})
_FEATURES = _list_of(_NUMBERS, minItems=1, description="Features of norm 1, as one list per input.")
_TEXTS = _list_of({"type": "string", "minLength": 1})
_KINDS = "JPEG, PNG or WebP files. HEIC files are accepted if the server has the extra heic."
_FILES = _list_of({"type": "string", "format": "binary"}, minItems=1, description=_KINDS)


def _body(form: Row, json: Row | None = None, example: Row | None = None, binary: Row | None = None) -> Row:
    """Describe a request body, which can be a form, JSON or binary. A form without fields is not accepted."""
    schema: Row = {"type": "object", "properties": form, "required": sorted(form)}
    content: Row = {"multipart/form-data": {"schema": schema}} if form else {}
    if json is not None:
        required = sorted(json.keys() & {"features", "labels"})
        schema = {"type": "object", "properties": json, "required": required, "additionalProperties": False}
        content["application/json"] = {"schema": schema, "example": example}
    if binary is not None:
        content["application/octet-stream"] = {"schema": binary}
    return {"requestBody": {"required": True, "content": content}}


_FLOATS: Row = {"type": "string", "format": "binary", "description": "Features as little-endian float32, row by row."}
_EXAMPLE = {"features": [[0.6, 0.8]], "inputs": ["camera-3/0001"]}
CLASSIFY = _body({"images": _FILES}, {"features": _FEATURES, "inputs": _TEXTS}, _EXAMPLE, _FLOATS)
GROUP = _body({}, {"features": _FEATURES}, {"features": [[0.6, 0.8], [0.8, 0.6]]}, _FLOATS)
ADD = _body(
    {"images": _FILES, "label": {"type": "string", "minLength": 1, "description": "Class of all images."}},
    {"features": _FEATURES, "labels": _TEXTS, "sources": _TEXTS},
    {"features": [[0.6, 0.8]], "labels": ["cat"], "sources": ["camera-3/0001"]},
)
MAKE = _body(
    {
        "name": {"type": "string", "description": "Name of the new index and its folder."},
        "images": _FILES,
        "label": _TEXTS | {"description": "Class of each image, in the same order."},
    }
)


class ProblemAnswer(BaseModel):
    """An error response (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


def problems(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Describe the error responses of a route, given their statuses."""
    content = {MEDIA: {"schema": ProblemAnswer.model_json_schema()}}
    return {status: {"description": "Problem (RFC 9457)", "content": content} for status in statuses}


def _schema_of(kind: pa.DataType) -> Row:
    if pa.types.is_struct(kind):
        return {"type": "object", "properties": {field.name: _schema_of(field.type) for field in kind}}
    if pa.types.is_list(kind):
        return _list_of(_schema_of(kind.value_type))
    number = "integer" if pa.types.is_integer(kind) else "number" if pa.types.is_floating(kind) else "string"
    return {"type": "boolean" if pa.types.is_boolean(kind) else number}


def _row(columns: Iterable[pa.Field], **more: Row) -> WithJsonSchema:
    """Describe a table row that has the given nullable columns and the fields in ``more``."""
    kinds = {column.name: _schema_of(column.type) for column in columns}
    own = {name: kind | {"type": [kind["type"], "null"]} for name, kind in kinds.items()}
    return WithJsonSchema({"type": "object", "properties": own | more})


HISTORY = ("version", "parent", "created_at", "change", "keys", "classes", "current")
"""Columns of :data:`VERSIONS_SCHEMA` that responses contain."""
Key = Annotated[Row, _row(LABEL_SCHEMA, image={"type": ["string", "null"], "description": "Address of the thumbnail."})]
PastVersion = Annotated[Row, _row(VERSIONS_SCHEMA.field(name) for name in HISTORY)]
Result = Annotated[
    Row,
    _row(
        SCHEMA,
        text_logits=_NUMBERS | {"description": "What the text adds to the logit of each label."},
        shot_logits=_NUMBERS | {"description": "What the shots add to the logit of each label."},
        feature=_NUMBERS | {"description": "The feature, if features is true."},
        similar=_list_of(
            {"type": "object", "properties": {"key_id": {"type": "integer"}, "affinity": {"type": "number"}}},
            description="The most similar shots, most similar first, if features is true.",
        ),
    ),
]


class Unread(BaseModel):
    """An input that cannot be read, and the reason."""

    input: str
    reason: str


class Health(BaseModel):
    """The server status, the package version and the number of served indexes."""

    status: Literal["ok"]
    version: str
    indexes: int


class UsedSettings(BaseModel):
    """The settings that were used; see :class:`settings.Settings` for details."""

    alpha: float
    beta: float
    k: int | Literal["all"]
    tail: bool
    temperature: float


class IndexFacts(UsedSettings):
    """A description of the current version of an index."""

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
    gamma: float
    metric: str
    values: str
    levels: list[str]
    changes: bool


class Indexes(BaseModel):
    """The served indexes, whether this server can create new indexes, and whether photos can be labelled here."""

    indexes: list[IndexFacts]
    makes: bool
    labels: bool


class IndexClass(BaseModel):
    """A class and the number of its keys."""

    class_id: int
    label: str
    keys: int


class WholeIndex(IndexFacts):
    """A description of an index that includes its classes, prompt templates and the source of its settings."""

    classes: list[IndexClass]
    templates: list[str]
    provenance: Row


class KeyPage(BaseModel):
    """One page of the matching keys, and the total number of matching keys."""

    version: int
    total: int
    offset: int
    limit: int
    keys: list[Key]


class Map(BaseModel):
    """Coordinates of keys in two dimensions, from -1 to 1.

    ``explained`` is the share of the variance that each axis explains. If the method is PCA, the coordinates of a
    feature f are ``axes[0] + f @ axes[1:]``.
    """

    version: int
    method: str
    methods: list[str]
    total: int
    key_ids: list[int]
    class_ids: list[int]
    x: list[float]
    y: list[float]
    explained: list[float] | None
    axes: list[list[float]] | None


class Audit(BaseModel):
    """Shots that look mislabelled, in the order and format of ``retrieval-tip index audit``."""

    version: int
    total: int
    shots: list[Row]


class Shares(BaseModel):
    """Accuracy on held-out shots with photos alone, with class names alone (``words``) and with both.

    An unknown accuracy is null.
    """

    photos: float | None
    words: float | None
    both: float | None


class WeakClass(BaseModel):
    """A class with mistakes, and the number of its held-out photos that are classified correctly."""

    label: str
    right: int
    photos: int


class Accuracy(Shares):
    """The estimated accuracy of a version of an index, with a 95 % confidence interval and the weakest classes.

    It was measured on ``tested`` of all ``classes`` with photos.
    """

    version: int
    low: float | None
    high: float | None
    tested: int | None
    classes: int | None
    weakest: list[WeakClass]


class NamedIndex(BaseModel):
    """The name and the version of an index."""

    index: str
    version: int


class ChangedShots(NamedIndex):
    """The new version of the index, and the ids of the keys that were added, removed or relabelled."""

    key_ids: list[int]


class AddedShots(ChangedShots):
    """The keys and ``classes`` that were added.

    ``known`` is the number of images that were already in the class. ``warnings`` lists new classes that are spelled
    almost like an existing class.
    """

    classes: list[str]
    known: int
    duplicates: list[str]
    warnings: list[str]
    skipped: list[Unread]


class GroupedIndex(NamedIndex):
    """An index whose classes have new groups. ``warnings`` counts classes of the table that the index does not have."""

    warnings: list[str]


class Judgement(Shares):
    """The accuracy estimated by a fit, and a sentence that summarises it."""

    summary: str | None


class FittedIndex(NamedIndex):
    """An index that has been fitted, and its estimated accuracy."""

    judged: Judgement


class MadeIndex(FittedIndex):
    """A new index. See :class:`AddedShots` for ``warnings``."""

    warnings: list[str]
    skipped: list[Unread]


class History(BaseModel):
    """All versions that are kept, starting with the oldest."""

    version: int
    versions: list[PastVersion]


class PhotoChange(BaseModel):
    """Photos that were ``added``, ``moved`` to another class or ``removed``, in words, and the first of them."""

    what: str
    change: str
    photos: list[Key]


class Exemplar(BaseModel):
    """The key that is closest to the mean of its class."""

    class_id: int
    key_id: int
    image: str | None


class Exemplars(BaseModel):
    """One exemplar per class, and mean affinities.

    ``own`` is the mean affinity of keys of the same class, and ``other`` is the mean affinity of keys of different
    classes.
    """

    version: int
    exemplars: list[Exemplar]
    own: float | None
    other: float | None


class Classified(UsedSettings):
    """Results in the order of the inputs, and the settings that were used.

    ``warnings`` contains a message if these settings make answers less accurate than the settings of the index.
    """

    index: str
    version: int
    results: list[Result]
    warnings: list[str]
    skipped: list[Unread]


class Groups(BaseModel):
    """Groups of similar inputs, largest first. Each group lists the positions of its inputs in the request."""

    version: int
    groups: list[list[int]]


class Guess(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class QueuedPhoto(BaseModel):
    """A photo to label.

    ``picked`` tells how it was chosen, and ``why`` why it was suggested. ``guesses`` lists probable classes, most
    probable first. ``similar`` lists near-identical photos.
    """

    photo: int
    name: str
    picked: Picked
    why: str | None
    guesses: list[Guess]
    similar: list[int]


class RefusedLabel(BaseModel):
    """A label that could not be saved, and the reason. A null label is a label that could not be removed."""

    photo: int
    name: str
    label: str | None
    reason: str


class LabelClass(BaseModel):
    """A class and its number of labelled photos."""

    label: str
    photos: int


class LabelStep(BaseModel):
    """A step that can be undone: the photos that it labelled or skipped, and their labels.

    A null label was removed. ``labels`` is empty if the photos were skipped.
    """

    step: str
    photos: list[int]
    labels: list[str | None]


class RightGuesses(BaseModel):
    """The number of right guesses among the last photos that were labelled from the queue, of which there are ``n``."""

    right: int
    n: int


class FolderPhoto(BaseModel):
    """A photo of the labelled folder: its label or, without one, its most probable classes.

    ``no_match`` tells whether it resembles no example. ``similar`` lists what this photo and similar photos give to
    the probability of its first class (``input``, ``gives``), and their classes alone (``label``).
    """

    photo: int
    name: str
    label: str | None
    guesses: list[Guess]
    no_match: bool
    similar: list[Row] = []


class FolderAnswers(BaseModel):
    """The labels and answers of all photos that have been read, and groups of similar photos without a match."""

    version: int | None
    photos: list[FolderPhoto]
    groups: list[list[int]]


class LabelProgress(BaseModel):
    """The estimated accuracy on unlabelled photos and number of wrong answers to them, with 95 % confidence intervals.

    ``drawn`` is the number of random photos that are labelled. If it is below ``needed``, or if the index is very
    large, the accuracy is null. ``gain`` is the expected gain from ``more`` labels. ``review`` tells whether reviewing
    the least certain answers takes less work than labelling these photos, and ``done`` whether less than 2 % of all
    photos are wrong, at the upper end of the interval.
    """

    drawn: int
    needed: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    wrong: float | None = None
    least_wrong: int | None = None
    most_wrong: int | None = None
    more: int | None = None
    gain: float | None = None
    review: bool = False
    done: bool = False


class LabellingStatus(BaseModel):
    """The state of a labelling session.

    ``version`` is null until the first label is saved. ``photos`` is the number of readable photos. ``encoded``,
    ``labelled`` and ``unsaved`` count the encoded photos, the labelled photos, and the labels that are not saved yet.
    ``steps`` lists the last 100 steps, which can be undone, oldest first. ``guessed`` counts the right guesses for the
    photos of the last 20 of these steps. ``refused`` lists the unsaved labels that the index did not accept. ``busy``
    tells whether the state will change soon. ``problem`` is an error in the background.
    """

    index: str
    version: int | None
    photos: int
    encoded: int
    labelled: int
    unsaved: int
    classes: list[LabelClass]
    queue: list[QueuedPhoto]
    steps: list[LabelStep]
    guessed: RightGuesses
    refused: list[RefusedLabel]
    progress: LabelProgress | None
    busy: bool
    problem: str | None


class SortedPhotos(BaseModel):
    """The result of sorting photos or undoing it, the command that undoes it, and the photos that were skipped."""

    summary: str
    undo: str
    skipped: list[Unread]
