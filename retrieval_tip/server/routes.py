"""The routes: each reads what was sent, asks the service once, and answers.

Those ``about`` the server and those that are ``reads`` are open to all; ``changes`` to who sends the server's token.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response

from retrieval_tip import __version__
from retrieval_tip.evaluation.projection import Method
from retrieval_tip.server import metrics, schemas
from retrieval_tip.server.limits import DEADLINE
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.served import Ask, Served, Version
from retrieval_tip.server.service import Service
from retrieval_tip.server.uploads import read, read_index
from retrieval_tip.settings import KeysMet, Norms

TEXT = "text/plain; version=0.0.4; charset=utf-8"
MOST = 1_000_000_000
"""Largest whole number that a parameter may be."""

Token = Annotated[str | None, Header(description="Bearer and the server's token, in one field.")]
Positive = Annotated[float | None, Query(ge=0, allow_inf_nan=False, description="In place of the index's.")]
NormsAsked = Annotated[Norms, Query(description="Features must have norm 1, are scaled, or kept.")]


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]


async def _index(service: TheService, name: str) -> Served:
    return service.index(name)


Named = Annotated[Served, Depends(_index)]


async def _version(one: Named) -> Version:
    return one.now


Now = Annotated[Version, Depends(_version)]


async def _changed(request: Request) -> bool:
    """Whether the server takes changes."""
    return request.app.state.token is not None


Changed = Annotated[bool, Depends(_changed)]


def _has_token(request: Request) -> bool:
    """Tell whether a request has the server's token."""
    token = request.app.state.token
    said = request.headers.getlist("authorization")
    scheme, _, sent = said[0].partition(" ") if len(said) == 1 else ("", "", "")
    right = token is not None and hmac.compare_digest(sent.strip(" ").encode("latin-1"), token.strip(" ").encode())
    return bool(right and scheme.lower() == "bearer")


async def _from_here(request: Request) -> None:
    """Refuse requests that a browser sends for a page of another site, unless they have the token."""
    if "cross-site" in request.headers.getlist("sec-fetch-site") and not _has_token(request):
        raise Problem(403, "pages of other sites may not ask this server; send its token (Authorization: Bearer TOKEN)")


async def _allowed(request: Request, authorization: Token = None) -> None:
    """Refuse who does not send the server's token."""
    if request.app.state.token is None:
        raise Problem(
            403, "this server takes no changes; start it with --token TOKEN, which who may change indexes sends"
        )
    if not _has_token(request):
        raise Problem(
            401,
            "this is not the server's token (Authorization: Bearer TOKEN); the address that serve printed has it",
            {"WWW-Authenticate": "Bearer"},
        )


about = APIRouter()
reads = APIRouter(prefix="/v1", dependencies=[Depends(_from_here)], responses=schemas.problems(403))
changes = APIRouter(prefix="/v1", dependencies=[Depends(_allowed)])


@about.get("/healthz", response_model=schemas.Health)
async def health(service: TheService) -> Response:
    """Whether the server answers."""
    return _json({"status": "ok", "version": __version__, "indexes": len(service.served)})


@about.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def prometheus() -> Response:
    """Counts and times, in the text format of Prometheus."""
    return Response(metrics.page(), media_type=TEXT)


@reads.get("/indexes", response_model=schemas.Indexes)
async def indexes(service: TheService, changed: Changed) -> Response:
    """The indexes that are served."""
    described = [one.now.describe(changes=changed) for one in service.served.values()]
    makes = changed and (service.maker is not None or any(one["images"] for one in described))
    return _json({"indexes": described, "makes": makes})


@changes.post(
    "/indexes",
    status_code=201,
    response_model=schemas.Made,
    responses=schemas.problems(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503),
    openapi_extra=schemas.MAKE,
)
async def create(
    request: Request,
    service: TheService,
    like: Annotated[str | None, Query(description="The index whose backbone to take, and beside which.")] = None,
) -> Response:
    """Make an index of labelled images, fit it to them, and serve it."""
    sent = await read_index(request, service.limits)
    _finish(request)
    return _json(await service.create(sent, like), 201)


@changes.post("/indexes/{name}/fit", response_model=schemas.Fitted, responses=schemas.problems(401, 403, 404, 422, 503))
async def fit(request: Request, service: TheService, one: Named) -> Response:
    """Fit an index to its shots anew: what photographs and words are worth, judged on shots that are left out."""
    _finish(request)
    return _json(await service.fit(one))


@reads.get("/indexes/{name}", response_model=schemas.WholeIndex, responses=schemas.problems(404, 422))
async def index(version: Now, changed: Changed) -> Response:
    """One index with its classes and where its settings come from."""
    return _json(version.describe(changes=changed, whole=True))


@reads.get("/indexes/{name}/keys", response_model=schemas.Keys, responses=schemas.problems(404, 422))
async def keys(
    service: TheService,
    version: Now,
    label: Annotated[list[str], Query(description="Keys of this class; may be repeated.")] = [],  # noqa: B006
    source: Annotated[str | None, Query(description="Keys whose source holds this text, in any case.")] = None,
    key_id: Annotated[list[schemas.KeyId], Query(description="These keys.")] = [],  # noqa: B006
    offset: Annotated[int, Query(ge=0, le=MOST)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Response:
    """The label store, a page at a time, in its order."""
    total, rows = await service.keys(version, label, source, key_id, slice(offset, offset + limit))
    facts = {"version": version.manifest.version, "total": total, "offset": offset, "limit": limit}
    return _json(facts | {"keys": _pictured(version, rows)})


@reads.get(
    "/indexes/{name}/keys/{key_id}/image",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, **schemas.problems(404, 422, 503)},
)
async def image(
    service: TheService,
    version: Now,
    key_id: schemas.KeyId,
    size: Annotated[int, Query(ge=16, le=1024, description="Longest side, in pixels.")] = 160,
    if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> Response:
    """A shot's picture, small."""
    data = await service.thumbnail(version, key_id, size)
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "private, max-age=60"}
    if if_none_match == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type="image/jpeg")


@reads.get("/indexes/{name}/map", response_model=schemas.Map, responses=schemas.problems(404, 422, 503))
async def map_of(
    service: TheService,
    version: Now,
    method: Annotated[Method, Query(description="pca; tsne where scikit-learn is installed.")] = "pca",
    limit: Annotated[int, Query(ge=1, le=100_000, description="Keys at most; long features: fewer.")] = 5000,
) -> Response:
    """The keys in two dimensions."""
    return _json(await service.map(version, method, limit))


@reads.get("/indexes/{name}/audit", response_model=schemas.Audit, responses=schemas.problems(404, 422, 503))
async def audit(
    service: TheService,
    version: Now,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    borderline: Annotated[bool, Query(description="List borderline cases too.")] = False,
) -> Response:
    """List shots that look mislabelled, worst first."""
    return _json(await service.audit(version, limit, borderline))


@reads.get("/indexes/{name}/accuracy", response_model=schemas.Accuracy, responses=schemas.problems(404, 422, 503))
async def accuracy(service: TheService, version: Now) -> Response:
    """Estimate the accuracy on the shots of now, each fold of which is answered by the others."""
    return _json(await service.accuracy(version))


@changes.post(
    "/indexes/{name}/keys",
    status_code=201,
    response_model=schemas.Added,
    responses=schemas.answered(201, "What was added", schemas.ADDED_EXAMPLE)
    | schemas.problems(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
    openapi_extra=schemas.ADD,
)
async def add(
    request: Request,
    service: TheService,
    one: Named,
    norms: NormsAsked = "check",
) -> Response:
    """Add labelled images or features as shots, as a new version of the index. A new label makes a new class."""
    sent = await read(request, service.limits, norms, one.now.cache.d, labelled=True)
    _finish(request)
    return _json(await service.add(one, sent), 201)


@changes.delete(
    "/indexes/{name}/keys",
    response_model=schemas.Removed,
    responses=schemas.problems(401, 403, 404, 422, 503),
)
async def remove(
    request: Request,
    service: TheService,
    one: Named,
    key_id: Annotated[list[schemas.KeyId], Query(min_length=1, max_length=1000)],
) -> Response:
    """Remove shots, as a new version of the index."""
    _finish(request)
    return _json(await service.remove(one, key_id))


@changes.post(
    "/indexes/{name}/relabel",
    response_model=schemas.Removed,
    responses=schemas.problems(401, 403, 404, 422, 503),
)
async def relabel(request: Request, service: TheService, one: Named, change: schemas.Relabel) -> Response:
    """Give shots, or all of a class, to other classes, as one new version of the index."""
    chosen = sum(field is not None for field in (change.key_ids, change.of, change.moves))
    if chosen != 1 or (change.label is None) != (change.moves is not None):
        raise Problem(422, "give label with key_ids, label with of, or moves alone")
    _finish(request)
    if change.of is not None:
        return _json(await service.merge(one, change.of, str(change.label)))
    moves = [(move.key_ids, move.label) for move in change.moves or ()]
    return _json(await service.relabel(one, moves or [(change.key_ids or [], str(change.label))]))


@changes.post(
    "/indexes/{name}/rename",
    response_model=schemas.Removed,
    responses=schemas.problems(401, 403, 404, 422, 503),
)
async def rename(request: Request, service: TheService, one: Named, change: schemas.Rename) -> Response:
    """Give a class another name, as a new version, or merge it into the class that has that name.

    The name is encoded as words if the server has their encoder.
    """
    _finish(request)
    return _json(await service.rename(one, change.of, change.label))


@reads.get("/indexes/{name}/history", response_model=schemas.History, responses=schemas.problems(404, 422, 503))
async def history(service: TheService, one: Named) -> Response:
    """The versions that are kept."""
    return _json({"version": one.now.manifest.version, "versions": await service.history(one)})


@changes.post(
    "/indexes/{name}/rollback",
    response_model=schemas.Removed,
    responses=schemas.problems(401, 403, 404, 409, 422, 503),
)
async def rollback(request: Request, service: TheService, one: Named, change: schemas.Rollback) -> Response:
    """Make the content of an earlier version that of a new one: nothing is lost by it."""
    _finish(request)
    return _json(await service.rollback(one, change.to, change.since))


@reads.get("/indexes/{name}/values", response_model=schemas.Values, responses=schemas.problems(404, 422))
async def values(service: TheService, version: Now) -> Response:
    """What each key gives to each class, where values were solved or trained and are not too many."""
    return _json(service.values(version))


@reads.get("/indexes/{name}/exemplars", response_model=schemas.Exemplars, responses=schemas.problems(404, 422, 503))
async def exemplars(service: TheService, version: Now) -> Response:
    """A shot that shows each class, and how like shots are."""
    found = await service.exemplars(version)
    shown = {"exemplars": _pictured(version, found["exemplars"])}
    return _json({"version": version.manifest.version} | found | shown)


@reads.post(
    "/classify",
    response_model=schemas.Classified,
    responses=schemas.answered(200, "The answers", schemas.CLASSIFIED_EXAMPLE)
    | schemas.problems(400, 404, 408, 413, 415, 422, 429, 503),
    openapi_extra=schemas.CLASSIFY,
)
async def classify(
    request: Request,
    service: TheService,
    index: Annotated[str | None, Query(description="Which index; needed where several are served.")] = None,
    alpha: Positive = None,
    beta: Positive = None,
    k: Annotated[str | None, Query(pattern="^(all|[1-9][0-9]{0,8})$", description="Nearest keys, or all.")] = None,
    tail: Annotated[bool | None, Query(description="Estimate the keys that were not retrieved.")] = None,
    top: Annotated[int, Query(ge=1, le=1000, description="Classes to report.")] = 5,
    neighbours: Annotated[int, Query(ge=0, le=1000, description="Shots to report: those that contributed most.")] = 5,
    logits: Annotated[bool, Query(description="Logits of every class.")] = False,
    evidence: Annotated[bool, Query(description="What the answer is made of.")] = False,
    norms: NormsAsked = "check",
) -> Response:
    """Classify images or features. Inputs that cannot be read are named in `skipped`, unless none can."""
    version = service.index(index).now
    sent = await read(request, service.limits, norms, version.cache.d)
    met: KeysMet = int(k) if k not in (None, "all") else "all" if k else None
    ask = Ask(alpha, beta, met, tail, top, neighbours, logits, evidence)
    results, skipped = await service.classify(version, ask, sent)
    facts = {"index": version.name, "version": version.manifest.version} | version.settings(ask).shown()
    caution = version.cache.caution(version.settings(ask))
    return _json(facts | {"results": results, "warnings": [caution] if caution else [], "skipped": skipped})


def _pictured(version: Version, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of keys, with the address of the picture where there is one."""
    place = f"/v1/indexes/{quote(version.name, safe='')}/keys"
    return [row | {"image": f"{place}/{row['key_id']}/image" if row["image"] else None} for row in rows]


def _finish(request: Request) -> None:
    """From here on the request takes its time: a change that was begun is not given up half-way."""
    request.scope[DEADLINE].reschedule(None)


def _json(what: Any, status: int = 200) -> Response:
    data = orjson.dumps(what, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, media_type="application/json")
