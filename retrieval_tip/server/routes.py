"""HTTP routes. The router ``changes`` requires the server's token, as does ``reads`` if the server is private."""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from prometheus_client import generate_latest

from retrieval_tip import __version__
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation.projection import Method
from retrieval_tip.server import indexes as managed
from retrieval_tip.server import metrics, schemas
from retrieval_tip.server.guard import DEADLINE
from retrieval_tip.server.labelling import Labelling
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.served import Served, Version
from retrieval_tip.server.service import Service
from retrieval_tip.server.uploads import index_name, read, read_features, read_index
from retrieval_tip.settings import Ask, KeysMet

TEXT = "text/plain; version=0.0.4; charset=utf-8"
MOST = 1_000_000_000
"""Maximum offset of a page of keys."""
PICTURE: dict[int | str, dict[str, object]] = {200: {"content": {"image/jpeg": {}}}}
SLOW = schemas.problems(202)
"""Response of routes whose result is still being computed."""
SENT = schemas.problems(400, 408, 413, 415, 429)
"""Problem responses of routes that accept images or features."""

Token = Annotated[str | None, Header(description='"Bearer TOKEN", where TOKEN is the server\'s token.')]
Positive = Annotated[
    float | None, Query(ge=0, allow_inf_nan=False, description="Overrides the index's setting for this request.")
]
Norms = Annotated[
    Literal["check", "unit", "keep"],
    Query(
        description="How to treat the norms of features. With check, they must be 1. With unit, they are scaled to 1. "
        "With keep, any norm is accepted."
    ),
]


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]


async def _labelling(request: Request) -> Labelling:
    labelling: Labelling | None = request.app.state.labelling
    if labelling is None:
        raise Problem(404, "there are no photos to label; start the server with retrieval-tip label PHOTOS")
    return labelling


TheLabelling = Annotated[Labelling, Depends(_labelling)]
Size = Annotated[int, Query(ge=16, le=1024, description="Length of the longer side, in pixels.")]


async def _index(service: TheService, name: str) -> Served:
    return service.index(name)


Named = Annotated[Served, Depends(_index)]


async def _not_labelled(request: Request, one: Named) -> Served:
    """Refuse to take an index away from a labelling session."""
    labelling: Labelling | None = request.app.state.labelling
    if labelling is not None and labelling.name == one.name:
        raise Problem(409, f"index {one.name!r} is being labelled; stop retrieval-tip label first")
    return one


NotLabelled = Annotated[Served, Depends(_not_labelled)]


async def _version(one: Named) -> Version:
    return one.now


Now = Annotated[Version, Depends(_version)]


async def _accepts_changes(request: Request) -> bool:
    return request.app.state.token is not None


AcceptsChanges = Annotated[bool, Depends(_accepts_changes)]


def _sends(request: Request, token: str | None) -> bool:
    headers = request.headers.getlist("authorization")
    scheme, _, sent = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    right = token is not None and hmac.compare_digest(sent.strip(" ").encode("latin-1"), token.strip(" ").encode())
    return right and scheme.lower() == "bearer"


def _cookie(token: str) -> tuple[str, str]:
    """Return the name and value of the cookie of a private server.

    Servers on other ports of this machine get the cookie as well. Each has its own name, and does not reveal the token.
    """
    mark = hmac.new(token.encode(), b"cookie", "sha256").hexdigest()
    return f"retrieval-tip-{mark[:8]}", mark[8:]


def _has_cookie(request: Request, token: str) -> bool:
    name, value = _cookie(token)
    return hmac.compare_digest(request.cookies.get(name, "").encode(), value.encode())


def _refusal(request: Request) -> Problem:
    command = "serve" if request.app.state.labelling is None else "label"
    text = f"the token is missing or wrong; send Authorization: Bearer TOKEN, with the token that {command} printed"
    return Problem(401, text, {"WWW-Authenticate": "Bearer"})


async def _may_read(request: Request) -> None:
    """Refuse requests to a private server that do not have its token. Images in the page only send the cookie."""
    token = request.app.state.private
    if token is None or _sends(request, token) or (request.method == "GET" and _has_cookie(request, token)):
        return
    raise _refusal(request)


async def _from_here(request: Request) -> None:
    """Refuse requests that come from pages of other sites and do not have the token."""
    state = request.app.state
    if "cross-site" in request.headers.getlist("sec-fetch-site") and not _sends(request, state.token or state.private):
        raise Problem(403, "request from another site; send the server's token (Authorization: Bearer TOKEN)")


async def _allowed(request: Request, authorization: Token = None) -> None:
    """Refuse requests that do not have the token."""
    if request.app.state.token is None:
        raise Problem(403, "this server is read-only; restart it with --token TOKEN and send that token")
    if not _sends(request, request.app.state.token):
        raise _refusal(request)


async def _lift_deadline(request: Request) -> None:
    """Remove the time limit of a request, so that a change is not interrupted halfway."""
    request.scope[DEADLINE].reschedule(None)


about = APIRouter()
reads = APIRouter(
    prefix="/v1",
    dependencies=[Depends(_from_here), Depends(_may_read)],
    responses=schemas.problems(401, 403, 404, 422, 503),
)
changes = APIRouter(prefix="/v1", dependencies=[Depends(_allowed)], responses=schemas.problems(401, 403, 404, 422, 503))
UNHURRIED = [Depends(_lift_deadline)]


# Routes are matched in order, so the most frequent one comes first.
@reads.post("/classify", response_model=schemas.Classified, openapi_extra=schemas.CLASSIFY, responses=SENT)
async def classify(
    request: Request,
    service: TheService,
    without: Annotated[
        list[schemas.KeyId],
        Query(default_factory=list, max_length=1000, description="Leave out this key. Can be repeated."),
    ],
    index: Annotated[
        str | None, Query(description="Name of the index. It is required if several indexes are served.")
    ] = None,
    alpha: Positive = None,
    beta: Positive = None,
    k: Annotated[
        str | None, Query(pattern="^(all|[1-9][0-9]{0,8})$", description="Number of nearest keys to use, or all.")
    ] = None,
    tail: Annotated[
        bool | None, Query(description="Whether to estimate the contribution of keys that are not retrieved.")
    ] = None,
    top: Annotated[int, Query(ge=1, le=1000, description="Number of classes to return.")] = 5,
    neighbours: Annotated[
        int,
        Query(ge=0, le=1000, description="Number of shots to return, starting with the strongest support."),
    ] = 5,
    logits: Annotated[bool, Query(description="Whether to return the logits of all classes.")] = False,
    features: Annotated[
        bool, Query(description="Whether to return the feature of each input, and the most similar shots.")
    ] = False,
    norms: Norms = "check",
) -> Response:
    """Classify images or features.

    The response lists unreadable inputs as `skipped`. If all inputs are unreadable, the response is an error.
    """
    version = service.index(index).now
    sent = await read(request, service.limits, norms, version.cache.d)
    met: KeysMet = int(k) if k not in (None, "all") else "all" if k else None
    ask = Ask(met, tail, alpha, beta, top, neighbours, logits=logits, without=tuple(without))
    return _json(await service.classify(version, ask, sent, features=features))


@about.get("/healthz")
async def health(service: TheService) -> schemas.Health:
    """Check that the server is running."""
    return schemas.Health("ok", __version__, len(service.served))


@about.get(
    "/metrics",
    response_class=Response,
    dependencies=[Depends(_may_read)],
    responses={200: {"content": {"text/plain": {}}}, **schemas.problems(401)},
)
async def prometheus() -> Response:
    """Return metrics in the Prometheus text format."""
    return Response(generate_latest(metrics.REGISTRY), media_type=TEXT)


@reads.get("/indexes")
async def indexes(
    request: Request, response: Response, service: TheService, changes: AcceptsChanges
) -> schemas.Indexes:
    """List the served indexes. A private server also sets a cookie that the page needs for images."""
    if token := request.app.state.private:
        secure = request.url.scheme == "https"
        response.set_cookie(*_cookie(token), path="/v1", secure=secure, httponly=True, samesite="strict")
    described = [one.now.describe(changes=changes) for one in service.served.values()]
    makes = changes and (service.maker is not None or any(one.images for one in described))
    return schemas.Indexes(described, makes, request.app.state.labelling is not None)


@changes.post("/indexes", status_code=201, openapi_extra=schemas.MAKE, responses=SENT | schemas.problems(409))
async def create(
    request: Request,
    service: TheService,
    like: Annotated[
        str | None, Query(description="Name of an index whose encoder and parent folder are used for the new index.")
    ] = None,
) -> schemas.MadeIndex:
    """Create an index from labelled images, fit it and serve it."""
    sent = await read_index(request, service.limits)
    await _lift_deadline(request)
    return await managed.create(service, sent, like)


@changes.post("/indexes/{name}/fit", dependencies=UNHURRIED)
async def fit(service: TheService, one: Named) -> schemas.FittedIndex:
    """Fit an index to its shots again, and estimate its accuracy."""
    return await service.fit(one)


@changes.patch("/indexes/{name}", dependencies=UNHURRIED, responses=schemas.problems(409))
async def rename_index(service: TheService, one: NotLabelled, new: schemas.IndexName) -> schemas.NamedIndex:
    """Rename an index and its folder."""
    return await managed.rename(service, one, index_name(new.name))


@changes.post("/indexes/{name}/duplicate", status_code=201, dependencies=UNHURRIED, responses=schemas.problems(409))
async def duplicate_index(service: TheService, one: Named, new: schemas.IndexName) -> schemas.NamedIndex:
    """Copy the current version of an index to a new index next to it."""
    return await managed.duplicate(service, one, index_name(new.name))


@changes.delete("/indexes/{name}", dependencies=UNHURRIED, responses=schemas.problems(409))
async def delete_index(service: TheService, one: NotLabelled) -> schemas.NamedIndex:
    """Delete an index, its versions, and the images that were added to it here. This cannot be undone."""
    return await managed.delete(service, one)


@reads.get("/indexes/{name}")
async def index(version: Now, changes: AcceptsChanges) -> schemas.WholeIndex:
    """Describe an index, its classes and the source of its settings."""
    return version.describe_whole(changes=changes)


@reads.get("/indexes/{name}/keys", response_model=schemas.KeyPage)
async def keys(
    service: TheService,
    version: Now,
    label: Annotated[
        list[str], Query(default_factory=list, description="Only list keys of this class. Can be repeated.")
    ],
    key_id: Annotated[
        list[schemas.KeyId], Query(default_factory=list, description="Only list this key. Can be repeated.")
    ],
    source: Annotated[
        str | None, Query(description="Only list keys whose source contains this text. The case is ignored.")
    ] = None,
    offset: Annotated[int, Query(ge=0, le=MOST)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """List one page of the keys, with their labels and sources."""
    total, rows = await service.keys(version, label, source, key_id, slice(offset, offset + limit))
    return _json(schemas.KeyPage(version.manifest.version, total, offset, limit, rows))


@reads.get("/indexes/{name}/keys/{key_id}/image", response_class=Response, responses=PICTURE)
async def image(
    service: TheService,
    version: Now,
    key_id: schemas.KeyId,
    size: Size = 160,
    if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    """Return a thumbnail of a shot as a JPEG image."""
    data = await service.thumbnail(version, key_id, size)
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "private, max-age=60"}
    if if_none_match == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type="image/jpeg")


@reads.get("/indexes/{name}/map", response_model=schemas.Map, responses=SLOW)
async def map_of(
    service: TheService,
    version: Now,
    method: Annotated[
        Method, Query(description="Projection method: pca, or tsne if scikit-learn is installed on the server.")
    ] = "pca",
    limit: Annotated[
        int,
        Query(ge=1, le=100_000, description="Maximum number of keys. Fewer keys may be returned if features are long."),
    ] = 5000,
) -> Response:
    """Project the keys to two dimensions."""
    return _json(await service.map(version, method, limit))


@reads.post("/indexes/{name}/groups", openapi_extra=schemas.GROUP, responses=SENT)
async def groups(request: Request, service: TheService, version: Now, norms: Norms = "check") -> schemas.Groups:
    """Group similar features, for example of images without a match, so that each group can be named at once."""
    features = await read_features(request, service.limits, norms, version.cache.d)
    return schemas.Groups(version.manifest.version, await service.find(version.groups, features))


@reads.get("/indexes/{name}/audit", response_model=schemas.Audit, responses=SLOW)
async def audit(
    service: TheService,
    version: Now,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    borderline: Annotated[bool, Query(description="Whether to include borderline cases.")] = False,
) -> Response:
    """List shots that look mislabelled, starting with the most suspicious ones."""
    return _json(await service.audit(version, limit, borderline))


@reads.get("/indexes/{name}/accuracy", responses=SLOW)
async def accuracy(service: TheService, version: Now) -> schemas.Accuracy:
    """Estimate the accuracy by cross-validation on the shots.

    Each fold of the shots is classified with the shots of the other folds.
    """
    return await service.accuracy(version)


@changes.post("/indexes/{name}/keys", status_code=201, openapi_extra=schemas.ADD, responses=SENT)
async def add(request: Request, service: TheService, one: Named, norms: Norms = "check") -> schemas.AddedShots:
    """Add labelled images or features as shots, in a new version of the index.

    If a label is new, a new class is added for it.
    """
    sent = await read(request, service.limits, norms, one.now.cache.d, labelled=True)
    await _lift_deadline(request)
    return await service.add(one, sent)


@changes.delete("/indexes/{name}/keys", dependencies=UNHURRIED)
async def remove(
    service: TheService, one: Named, key_id: Annotated[list[schemas.KeyId], Query(min_length=1, max_length=1000)]
) -> schemas.ChangedShots:
    """Remove shots, in a new version of the index."""
    return await service.remove(one, key_id)


@changes.post("/indexes/{name}/relabel", dependencies=UNHURRIED)
async def relabel(service: TheService, one: Named, change: schemas.Relabel) -> schemas.ChangedShots:
    """Move shots or a whole class to other classes, in one new version of the index."""
    chosen = sum(field is not None for field in (change.key_ids, change.of, change.moves))
    if chosen != 1 or (change.label is None) != (change.moves is not None):
        raise Problem(422, "relabel: give either label and key_ids, or label and of, or only moves")
    if change.of is not None:
        return await service.merge(one, change.of, str(change.label))
    moves = [(move.key_ids, move.label) for move in change.moves or ()]
    return await service.relabel(one, moves or [(change.key_ids or [], str(change.label))])


@changes.post("/indexes/{name}/rename", dependencies=UNHURRIED)
async def rename(service: TheService, one: Named, change: schemas.Rename) -> schemas.ChangedShots:
    """Rename a class, in a new version of the index.

    If a class with the new name already exists, the two classes are merged. Otherwise, the new name is encoded if the
    server has the text encoder.
    """
    return await service.rename(one, change.of, change.label)


@reads.get("/indexes/{name}/history", response_model=schemas.History)
async def history(service: TheService, one: Named) -> Response:
    """List all versions that are kept, starting with the oldest."""
    return _json(schemas.History(one.now.manifest.version, await service.history(one)))


@changes.post("/indexes/{name}/rollback", dependencies=UNHURRIED, responses=schemas.problems(409))
async def rollback(service: TheService, one: Named, change: schemas.Rollback) -> schemas.ChangedShots:
    """Restore an earlier version, as a new version. The current version is kept."""
    return await service.rollback(one, change.to, change.since)


@reads.get("/indexes/{name}/exemplars", responses=SLOW)
async def exemplars(service: TheService, version: Now) -> schemas.Exemplars:
    """Return a typical shot of each class, and the mean similarity of shots."""
    return await service.exemplars(version)


@reads.get("/label")
async def label_status(labelling: TheLabelling) -> schemas.LabellingStatus:
    """Return the next photos to label, and the progress."""
    return labelling.status()


@changes.post("/label", dependencies=UNHURRIED)
async def label(labelling: TheLabelling, change: schemas.SetLabels) -> schemas.LabellingStatus:
    """Set or remove labels, and return the new state. The labels are saved within seconds, as a new version."""
    await labelling.label(change)
    return labelling.status()


@changes.post("/label/sort", dependencies=UNHURRIED)
async def label_sort(labelling: TheLabelling, change: schemas.SortInto) -> schemas.SortedPhotos:
    """Copy all photos of the labelling session into folders by class, as `retrieval-tip sort` does."""
    return await labelling.sort(change.into)


@reads.get("/label/photos/{photo}/image", response_class=Response, responses=PICTURE)
async def label_image(
    service: TheService, labelling: TheLabelling, photo: schemas.PhotoNumber, size: Size = 160
) -> Response:
    """Return a photo of the labelling session as a JPEG image of a reduced size."""
    path = labelling.path(photo)
    try:
        data = await service.thumbnails.of(path, lambda: labelling.photos.encoder.read(path), size)
    except InputError as error:
        raise Problem(404, f"photo {photo}: cannot be read ({error})") from None
    return Response(data, headers={"cache-control": "private, max-age=3600"}, media_type="image/jpeg")


def _json(answer: object) -> Response:
    return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
