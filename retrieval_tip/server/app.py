"""The routes: each reads what was sent, asks the service once, and answers."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import Field

from retrieval_tip import __version__
from retrieval_tip.server import metrics, schemas
from retrieval_tip.server.limits import DEADLINE, Guard, Limits
from retrieval_tip.server.problems import HANDLED, Problem, answer, handle
from retrieval_tip.server.served import Ask, Maker, Served, Version
from retrieval_tip.server.service import Service
from retrieval_tip.server.uploads import read, read_index
from retrieval_tip.settings import KeysMet

PAGE = Path(__file__).parent / "page"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
MOST = 1_000_000_000
"""Largest whole number that a parameter may be."""

Name = Annotated[str | None, Query(alias="index", description="Which index; needed where several are served.")]
Norms = Annotated[
    str, Query(pattern="^(check|unit|keep)$", description="Features must have norm 1, are scaled, or kept.")
]
Token = Annotated[str | None, Header(description="Bearer and the server's token, in one field.")]
KeyId = Annotated[int, Field(ge=0, le=2**62)]
Positive = Annotated[float | None, Query(ge=0, allow_inf_nan=False, description="In place of the index's.")]


def create_app(
    served: dict[str, Served],
    limits: Limits | None = None,
    *,
    token: str | None = None,
    uploads: Path | None = None,
    root: Path | None = None,
    maker: Maker | None = None,
) -> FastAPI:
    """The application over indexes by name (:func:`served.open_all`).

    With a ``token``, shots can be added and removed by who sends it. ``uploads``, ``root`` and
    ``maker`` as for :class:`service.Service`.
    """
    limits = limits or Limits()
    service = Service(served, limits, uploads, root, maker)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="retrieval-tip", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Few-shot image classification as retrieval. Errors are application/problem+json.",
    )  # fmt: skip
    app.add_middleware(Guard, limits=limits)
    for kind in HANDLED:
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, _unexpected)

    def allowed(request: Request) -> None:
        if token is None:
            raise Problem(
                403, "this server takes no changes; start it with --token TOKEN, which who may change indexes sends"
            )
        said = request.headers.getlist("authorization")
        scheme, _, sent = said[0].partition(" ") if len(said) == 1 else ("", "", "")
        right = hmac.compare_digest(sent.strip(" ").encode("latin-1"), token.strip(" ").encode())
        if scheme.lower() != "bearer" or not right:
            raise Problem(
                401,
                "this is not the server's token (Authorization: Bearer TOKEN); the address that serve printed has it",
                {"WWW-Authenticate": "Bearer"},
            )

    @app.get("/healthz", response_model=schemas.Health)
    async def health() -> Response:
        """Whether the server answers."""
        return _json({"status": "ok", "version": __version__, "indexes": len(served)})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Counts and times, in the text format of Prometheus."""
        return Response(metrics.page(), media_type=TEXT)

    @app.get("/v1/indexes", response_model=schemas.Indexes)
    async def indexes() -> Response:
        """The indexes that are served."""
        described = [one.now.describe(changes=token is not None) for one in served.values()]
        makes = token is not None and (maker is not None or any(one["images"] for one in described))
        return _json({"indexes": described, "makes": makes})

    @app.post(
        "/v1/indexes",
        status_code=201,
        response_model=schemas.Made,
        responses=schemas.problems(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503),
        openapi_extra=schemas.MAKE,
    )
    async def create(
        request: Request,
        like: Annotated[str | None, Query(description="The index whose backbone to take, and beside which.")] = None,
        authorization: Token = None,
    ) -> Response:
        """Make an index of labelled images, fit it to them, and serve it."""
        allowed(request)
        sent = await read_index(request, limits)
        _finish(request)
        return _json(await service.create(sent, like), 201)

    @app.post(
        "/v1/indexes/{name}/fit", response_model=schemas.Fitted, responses=schemas.problems(401, 403, 404, 422, 503)
    )
    async def fit(request: Request, name: str, authorization: Token = None) -> Response:
        """Fit an index to its shots anew: what photographs and words are worth, judged on shots that are left out."""
        allowed(request)
        one = service.index(name)
        _finish(request)
        return _json(await service.fit(one))

    @app.get("/v1/indexes/{name}", response_model=schemas.WholeIndex, responses=schemas.problems(404, 422))
    async def index(name: str) -> Response:
        """One index with its classes and where its settings come from."""
        return _json(service.index(name).now.describe(changes=token is not None, whole=True))

    @app.get("/v1/indexes/{name}/keys", response_model=schemas.Keys, responses=schemas.problems(404, 422))
    async def keys(
        name: str,
        label: Annotated[list[str], Query(description="Keys of this class; may be repeated.")] = [],  # noqa: B006
        source: Annotated[str | None, Query(description="Keys whose source holds this text, in any case.")] = None,
        key_id: Annotated[list[KeyId], Query(description="These keys.")] = [],  # noqa: B006
        offset: Annotated[int, Query(ge=0, le=MOST)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    ) -> Response:
        """The label store, a page at a time, in its order."""
        version = service.index(name).now
        total, rows = await service.keys(version, label, source, key_id, slice(offset, offset + limit))
        for row in rows:
            row["image"] = _image(name, row["key_id"]) if row["image"] else None
        facts = {"version": version.manifest.version, "total": total, "offset": offset, "limit": limit}
        return _json(facts | {"keys": rows})

    @app.get(
        "/v1/indexes/{name}/keys/{key_id}/image",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}, **schemas.problems(404, 422, 503)},
    )
    async def image(
        name: str,
        key_id: KeyId,
        size: Annotated[int, Query(ge=16, le=1024, description="Longest side, in pixels.")] = 160,
        if_none_match: Annotated[str | None, Header(include_in_schema=False)] = None,
    ) -> Response:
        """A shot's picture, small."""
        data = await service.thumbnail(service.index(name).now, key_id, size)
        tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "private, max-age=60"}
        if if_none_match == tag:
            return Response(status_code=304, headers=headers)
        return Response(data, headers=headers, media_type="image/jpeg")

    @app.get("/v1/indexes/{name}/map", response_model=schemas.Map, responses=schemas.problems(404, 422, 503))
    async def map_of(
        name: str,
        method: Annotated[
            str, Query(pattern="^(pca|tsne|umap)$", description="pca; tsne and umap where they are installed.")
        ] = "pca",
        limit: Annotated[int, Query(ge=1, le=100_000, description="Keys at most; long features: fewer.")] = 5000,
    ) -> Response:
        """The keys in two dimensions."""
        return _json(await service.map(service.index(name).now, method, limit))

    @app.get("/v1/indexes/{name}/audit", response_model=schemas.Audit, responses=schemas.problems(404, 422, 503))
    async def audit(name: str, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        """The shots whose labels the others contradict, worst first."""
        return _json(await service.audit(service.index(name).now, limit))

    @app.post(
        "/v1/indexes/{name}/keys",
        status_code=201,
        response_model=schemas.Added,
        responses=schemas.answered(201, "What was added", schemas.ADDED_EXAMPLE)
        | schemas.problems(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra=schemas.ADD,
    )
    async def add(
        request: Request,
        name: str,
        norms: Norms = "check",
        authorization: Token = None,
    ) -> Response:
        """Add labelled images or features as shots, as a new version of the index. A new label makes a new class."""
        allowed(request)
        one = service.index(name)
        sent = await read(request, limits, norms, one.now.cache.d, labelled=True)
        _finish(request)
        return _json(await service.add(one, sent), 201)

    @app.delete(
        "/v1/indexes/{name}/keys",
        response_model=schemas.Removed,
        responses=schemas.problems(401, 403, 404, 422, 503),
    )
    async def remove(
        request: Request,
        name: str,
        key_id: Annotated[list[KeyId], Query(min_length=1, max_length=1000)],
        authorization: Token = None,
    ) -> Response:
        """Remove shots, as a new version of the index."""
        allowed(request)
        one = service.index(name)
        _finish(request)
        return _json(await service.remove(one, key_id))

    @app.post(
        "/v1/indexes/{name}/relabel",
        response_model=schemas.Removed,
        responses=schemas.problems(401, 403, 404, 422, 503),
    )
    async def relabel(request: Request, name: str, change: schemas.Relabel, authorization: Token = None) -> Response:
        """Give shots, or all of a class, to another class, as a new version of the index."""
        allowed(request)
        one = service.index(name)
        if (change.key_ids is None) == (change.of is None):
            raise Problem(422, "give key_ids, or of, the class whose shots they are")
        _finish(request)
        return _json(await service.relabel(one, change.label, change.key_ids, change.of))

    @app.get("/v1/indexes/{name}/history", response_model=schemas.History, responses=schemas.problems(404, 422, 503))
    async def history(name: str) -> Response:
        """The versions that are kept."""
        one = service.index(name)
        return _json({"version": one.now.manifest.version, "versions": await service.history(one)})

    @app.post(
        "/v1/indexes/{name}/rollback",
        response_model=schemas.Removed,
        responses=schemas.problems(401, 403, 404, 409, 422, 503),
    )
    async def rollback(request: Request, name: str, change: schemas.Rollback, authorization: Token = None) -> Response:
        """Make the content of an earlier version that of a new one: nothing is lost by it."""
        allowed(request)
        one = service.index(name)
        _finish(request)
        return _json(await service.rollback(one, change.to, change.since))

    @app.get("/v1/indexes/{name}/values", response_model=schemas.Values, responses=schemas.problems(404, 422))
    async def values(name: str) -> Response:
        """What each key gives to each class, where values were solved or trained and are not too many."""
        return _json(service.values(service.index(name).now))

    @app.get(
        "/v1/indexes/{name}/exemplars", response_model=schemas.Exemplars, responses=schemas.problems(404, 422, 503)
    )
    async def exemplars(name: str) -> Response:
        """A shot that shows each class, and how like shots are."""
        version = service.index(name).now
        found = await service.exemplars(version)
        for one in found["exemplars"]:
            one["image"] = _image(name, one["key_id"]) if one["image"] else None
        return _json({"version": version.manifest.version} | found)

    @app.post(
        "/v1/classify",
        response_model=schemas.Classified,
        responses=schemas.answered(200, "The answers", schemas.CLASSIFIED_EXAMPLE)
        | schemas.problems(400, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra=schemas.CLASSIFY,
    )
    async def classify(
        request: Request,
        index: Name = None,
        alpha: Positive = None,
        beta: Positive = None,
        k: Annotated[str | None, Query(pattern="^(all|[1-9][0-9]{0,8})$", description="Nearest keys, or all.")] = None,
        tail: Annotated[bool | None, Query(description="Estimate the keys that were not retrieved.")] = None,
        top: Annotated[int, Query(ge=1, le=1000, description="Classes to report.")] = 5,
        neighbours: Annotated[int, Query(ge=0, le=1000, description="Nearest keys to report.")] = 5,
        logits: Annotated[bool, Query(description="Logits of every class.")] = False,
        evidence: Annotated[bool, Query(description="What the answer is made of.")] = False,
        norms: Norms = "check",
    ) -> Response:
        """Classify images or features. Inputs that cannot be read are named in `skipped`, unless none can."""
        version = service.index(index).now
        sent = await read(request, limits, norms, version.cache.d)
        met: KeysMet = int(k) if k not in (None, "all") else "all" if k else None
        ask = Ask(alpha, beta, met, tail, top, neighbours, logits, evidence)
        results, skipped = await service.classify(version, ask, sent)
        return _json(_settings(version, ask) | {"results": results, "skipped": skipped})

    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", headers={"cache-control": "no-cache"})

    return app


def _settings(version: Version, ask: Ask) -> dict[str, Any]:
    return {"index": version.name, "version": version.manifest.version} | version.settings(ask).shown()


def _image(name: str, key_id: int) -> str:
    """The address of a shot's picture."""
    return f"/v1/indexes/{quote(name, safe='')}/keys/{key_id}/image"


def _finish(request: Request) -> None:
    """From here on the request takes its time: a change that was begun is not given up half-way."""
    request.scope[DEADLINE].reschedule(None)


def _json(what: Any, status: int = 200) -> Response:
    data = orjson.dumps(what, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, media_type="application/json")


async def _unexpected(_: Request, error: Exception) -> Response:
    return answer(Problem(500, f"an error in the server ({type(error).__name__}); its log says more"))
