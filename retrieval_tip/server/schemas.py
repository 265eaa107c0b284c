"""Forms of requests and answers: for the description of the interface (OpenAPI), not for checking."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from retrieval_tip.server.problems import MEDIA
from retrieval_tip.settings import MetricName, ValuesName

EXAMPLE_FEATURE = [0.6, 0.8]

KeyId = Annotated[int, Field(ge=0, le=2**62)]
Label = Annotated[str, Field(min_length=1, max_length=1024)]
VersionNumber = Annotated[int, Field(ge=1, le=2**31)]


class ProblemAnswer(BaseModel):
    """A problem (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Health(BaseModel):
    """That the server answers."""

    status: Literal["ok"]
    version: str
    indexes: int


class Index(BaseModel):
    """An index, at the version that is answered with."""

    name: str
    version: int
    created_at: str
    change: str
    n_keys: int
    n_classes: int
    d: int
    alpha: float
    beta: float
    k: int | Literal["all"]
    tail: bool
    temperature: float
    logit_scale: float
    index: str
    exact_search: bool
    backbone: str | None
    images: bool
    text: bool
    least_cache: float | None
    log_offset: float | None
    metric: MetricName
    values: Literal[ValuesName, "trained"]
    changes: bool


class Indexes(BaseModel):
    """All that are served, and whether others can be made here."""

    indexes: list[Index]
    makes: bool


class IndexClass(BaseModel):
    """A class and how many keys it has."""

    class_id: int
    label: str
    keys: int


class WholeIndex(Index):
    """An index with its classes, and where its settings come from."""

    classes: list[IndexClass]
    templates: list[str]
    provenance: dict[str, Any]


class Key(BaseModel, extra="allow"):
    """A row of the label store; columns of its own may follow. ``image`` is the address of its picture, if any."""

    key_id: int
    class_id: int
    label: str
    source: str
    shot: int
    views: int
    digest: str | None
    added_at: datetime.datetime
    image: str | None


class Keys(BaseModel):
    """Some of the keys that were asked for, and how many there are."""

    version: int
    total: int
    offset: int
    limit: int
    keys: list[Key]


class Map(BaseModel):
    """Keys in two dimensions, -1 to 1; ``explained`` is the share of the variance on each axis.

    ``axes``, of principal components, place a feature: the first row and its products with the others.
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


class Suspicious(BaseModel):
    """A shot that the others contradict; see ``retrieval-tip index audit``."""

    key_id: int
    source: str
    label: str
    suggested: str | None
    own_score: float | None
    suggested_score: float | None
    margin: float | None
    rank: int | None
    nearest_key_id: int | None
    nearest_source: str | None
    nearest_label: str | None
    nearest_affinity: float | None
    duplicate_of: int | None


class Audit(BaseModel):
    """Suspicious shots, worst first."""

    version: int
    total: int
    shots: list[Suspicious]


class Accuracy(BaseModel):
    """Estimated shares of right answers by photos alone, words alone and both; null if unknown."""

    version: int
    photos: float | None
    words: float | None
    both: float | None


class Skipped(BaseModel):
    """An input that could not be read, and why."""

    input: str
    reason: str


class Added(BaseModel):
    """Keys that were added, and ``classes`` that were made. ``known``: images that the index had under that label.

    ``warnings`` names new classes that are spelled almost as another one.
    """

    index: str
    version: int
    key_ids: list[int]
    classes: list[str]
    known: int
    duplicates: list[str]
    warnings: list[str]
    skipped: list[Skipped]


class Judged(BaseModel):
    """How an index does on its own shots, each left out: shares of right answers, and a sentence."""

    photos: float | None
    words: float | None
    both: float | None
    summary: str | None


class Fitted(BaseModel):
    """An index that was fitted."""

    index: str
    version: int
    judged: Judged


class Made(Fitted):
    """An index that was made; ``warnings`` as of :class:`Added`."""

    warnings: list[str]
    skipped: list[Skipped]


class Removed(BaseModel):
    """Keys that were removed."""

    index: str
    version: int
    key_ids: list[int]


class Move(BaseModel, extra="forbid"):
    """Shots, by their ids, and the class of the index that they are given to."""

    key_ids: Annotated[list[KeyId], Field(max_length=100_000)]
    label: Label


class Relabel(BaseModel, extra="forbid"):
    """The ``label`` of some shots, or of all of the class ``of``; or several ``moves`` in one."""

    label: Label | None = None
    key_ids: Annotated[list[KeyId], Field(max_length=100_000)] | None = None
    of: Label | None = None
    moves: Annotated[list[Move], Field(max_length=10_000)] | None = None


class Rename(BaseModel, extra="forbid"):
    """The class ``of`` the index and the name that it gets."""

    of: Label
    label: Label


class Rollback(BaseModel, extra="forbid"):
    """The version ``to`` go back to; ``since``: only where the index is still at that one."""

    to: VersionNumber
    since: VersionNumber | None = None


class PastVersion(BaseModel):
    """A version that is kept, and what was changed to get there."""

    version: int
    parent: int | None
    created_at: datetime.datetime
    change: str
    keys: int
    classes: int
    current: bool


class History(BaseModel):
    """Versions, oldest first."""

    version: int
    versions: list[PastVersion]


class Values(BaseModel):
    """What each key gives to each class, where values were solved or trained: enough to weigh answers anew."""

    version: int
    key_ids: list[int]
    values: list[list[float]]


class Exemplar(BaseModel):
    """The key nearest to the mean of its class."""

    class_id: int
    key_id: int
    image: str | None


class Exemplars(BaseModel):
    """An exemplar a class; how like shots are to others of their ``own`` class, and to those of ``other`` classes."""

    version: int
    exemplars: list[Exemplar]
    own: float | None
    other: float | None


class Neighbour(BaseModel):
    """A shot behind an answer: ``weight`` is exp(-beta (1 - affinity)), ``gives`` what it adds to ``labels``."""

    key_id: int
    source: str
    label: str
    affinity: float
    weight: float
    gives: list[float]


class Evidence(BaseModel):
    """Enough to weigh the answer anew with other alpha, beta and k: see the documentation of the page."""

    feature: list[float]
    text: list[float]
    key_ids: list[int]
    class_ids: list[int]
    affinities: list[float]
    counts: list[int]
    sums: list[float]
    complete: bool


class Result(BaseModel):
    """The answer to one input. ``text_logit`` and ``cache_logit`` are the parts of the winner's logit.

    ``neighbours`` are the shots that contributed most to it, largest first; ``opposing`` counted most against it.
    """

    input: str
    label: str
    probability: float
    labels: list[str]
    probabilities: list[float]
    text_logit: float
    cache_logit: float
    neighbours: list[Neighbour]
    opposing: Neighbour | None = None
    unlike: bool | None = None
    logits: list[float] | None = None
    evidence: Evidence | None = None


class Classified(BaseModel):
    """Answers, in the order of the inputs, and the settings that they were made with.

    ``warnings`` says so if these settings make the answers worse than the index's own.
    """

    index: str
    version: int
    alpha: float
    beta: float
    k: int | Literal["all"]
    tail: bool
    temperature: float
    results: list[Result]
    warnings: list[str]
    skipped: list[Skipped]


_NUMBERS = {"type": "array", "items": {"type": "number"}}
_FEATURES = {"type": "array", "items": _NUMBERS, "minItems": 1, "description": "Unit-norm features, a list each."}
_TEXTS = {"type": "array", "items": {"type": "string", "minLength": 1}}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}


def _body(
    form: dict[str, Any], needs: list[str], json: dict[str, Any] | None = None, example: dict[str, Any] | None = None
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": needs}}
    }
    if json is not None:
        required = sorted(json.keys() & {"features", "labels"})
        schema = {"type": "object", "properties": json, "required": required, "additionalProperties": False}
        content["application/json"] = {"schema": schema, "example": example}
    return {"requestBody": {"required": True, "content": content}}


CLASSIFY = _body(
    {"images": _FILES},
    ["images"],
    {"features": _FEATURES, "inputs": _TEXTS},
    {"features": [EXAMPLE_FEATURE], "inputs": ["camera-3/0001"]},
)
ADD = _body(
    {"images": _FILES, "label": {"type": "string", "minLength": 1, "description": "The class of all the images."}},
    ["images", "label"],
    {"features": _FEATURES, "labels": _TEXTS, "sources": _TEXTS},
    {"features": [EXAMPLE_FEATURE], "labels": ["cat"], "sources": ["camera-3/0001"]},
)

MAKE = _body(
    {
        "name": {"type": "string", "description": "Of the index, and of its folder."},
        "images": _FILES,
        "label": _TEXTS | {"description": "The class of each image, in their order."},
    },
    ["images", "label", "name"],
)


CLASSIFIED_EXAMPLE = {
    "index": "pets",
    "version": 3,
    "alpha": 1.0,
    "beta": 5.5,
    "k": "all",
    "tail": True,
    "temperature": 1.0,
    "results": [
        {
            "input": "camera-3/0001",
            "label": "cat",
            "probability": 0.93,
            "labels": ["cat", "dog"],
            "probabilities": [0.93, 0.07],
            "text_logit": 24.1,
            "cache_logit": 3.2,
            "neighbours": [
                {
                    "key_id": 7,
                    "source": "photos/cat/7.jpg",
                    "label": "cat",
                    "affinity": 0.81,
                    "weight": 0.352,
                    "gives": [0.352, 0.0],
                },
            ],
        }
    ],
    "warnings": [],
    "skipped": [],
}
ADDED_EXAMPLE = {
    "index": "pets",
    "version": 4,
    "key_ids": [80],
    "classes": [],
    "known": 0,
    "duplicates": [],
    "warnings": [],
    "skipped": [],
}


def answered(status: int, what: str, example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The answer of a route with an example."""
    return {status: {"description": what, "content": {"application/json": {"example": example}}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of these statuses, as routes describe them."""
    return {
        status: {"description": "What went wrong", "content": {MEDIA: {"schema": ProblemAnswer.model_json_schema()}}}
        for status in statuses
    }
