"""The ASGI application, which combines the routes, the page and the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from retrieval_tip import __version__
from retrieval_tip.server import edits, partners, routes
from retrieval_tip.server.guard import Guard
from retrieval_tip.server.problems import HANDLED, handle
from retrieval_tip.server.schemas import PROBLEM
from retrieval_tip.server.service import Service
from retrieval_tip.server.session import Labelling

PAGE = Path(__file__).parent / "page"


def create_app(
    service: Service,
    *,
    token: str | None = None,
    private: str | None = None,
    labelling: Labelling | None = None,
    ready: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Return the application that answers requests with a service.

    Requests that send the ``token`` can change indexes. If there is a token ``private``, requests for data must send
    it. If there is a ``labelling`` session, photos can be labelled in the page. ``ready`` is called when the
    application can answer requests.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with (
            service.running(),
            nullcontext() if labelling is None else labelling.running(service),
        ):
            ready()
            yield

    app = FastAPI(
        title="retrieval-tip",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"default": PROBLEM},
        description="Few-shot image classification by retrieval. Errors are returned as application/problem+json "
        "(RFC 9457).",
    )
    app.state.service = service
    app.state.labelling = labelling
    app.state.token = token
    app.state.private = private
    app.add_middleware(Guard, limits=service.limits)
    for kind in HANDLED:
        app.add_exception_handler(kind, handle)
    for router in (
        routes.reads,
        routes.about,
        edits.changes,
        partners.label_studio,
        partners.photoprism,
    ):
        app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    app.get("/", include_in_schema=False)(_page)
    return app


async def _page() -> Response:
    return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})
