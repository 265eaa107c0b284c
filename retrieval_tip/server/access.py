"""What requests may do, and the objects that routes depend on."""

from __future__ import annotations

import base64
import binascii
import hmac
from contextlib import suppress
from typing import Annotated

from fastapi import Depends, Header, Request

from retrieval_tip.server.problems import Problem
from retrieval_tip.server.served import OpenVersion, Served
from retrieval_tip.server.service import Service
from retrieval_tip.server.session import Labelling

Token = Annotated[
    str | None, Header(description='"Bearer TOKEN", where TOKEN is the server\'s token.')
]


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]


async def _labelling(request: Request) -> Labelling:
    labelling: Labelling | None = request.app.state.labelling
    if labelling is None:
        raise Problem(
            404,
            "there are no photos to label; start the server with retrieval-tip label PHOTOS --out INDEX",
        )
    return labelling


TheLabelling = Annotated[Labelling, Depends(_labelling)]


async def _index(service: TheService, name: str) -> Served:
    return service.index(name)


Named = Annotated[Served, Depends(_index)]


async def _not_labelled(request: Request, one: Named) -> Served:
    """Refuse to take an index away from a labelling session."""
    labelling: Labelling | None = request.app.state.labelling
    if labelling is not None and labelling.name == one.name:
        raise Problem(
            409, f"index {one.name!r} is being labelled; stop the labelling session first"
        )
    return one


NotLabelled = Annotated[Served, Depends(_not_labelled)]


async def _version(one: Named) -> OpenVersion:
    return one.now


Now = Annotated[OpenVersion, Depends(_version)]


def _sends(request: Request, token: str | None) -> bool:
    headers = request.headers.getlist("authorization")
    scheme, _, text = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    sent = text.strip(" ").encode("latin-1")
    accepted = scheme.lower() == "bearer"
    is_browser = "sec-fetch-site" in request.headers  # browsers repeat the password unasked
    if (
        scheme.lower() == "basic"
        and request.url.path.startswith("/label-studio/")
        and not is_browser
    ):
        with suppress(binascii.Error):
            sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            accepted = True
    return accepted and token is not None and hmac.compare_digest(sent, token.strip(" ").encode())


def cookie(token: str) -> tuple[str, str]:
    """Return the name and value of the cookie of a private server.

    Servers on other ports of this machine get the cookie as well. Each has its own name, and does not reveal the token.
    """
    mark = hmac.new(token.encode(), b"cookie", "sha256").hexdigest()
    return f"retrieval-tip-{mark[:8]}", mark[8:]


def _refusal(request: Request) -> Problem:
    command = "serve" if request.app.state.labelling is None else "label"
    realm = f'Bearer realm="retrieval-tip {command}"'
    text = f"the token is missing or wrong; send Authorization: Bearer TOKEN, with the token that {command} printed"
    return Problem(401, text, {"WWW-Authenticate": realm})


async def may_read(request: Request) -> None:
    """Refuse requests without the token to a private server, or from pages of other sites.

    Images in the page of a private server only send the cookie.
    """
    token = request.app.state.private
    if _sends(request, token or request.app.state.token):
        return
    if "cross-site" in request.headers.getlist("sec-fetch-site"):
        raise Problem(
            403, "request from another site; send the server's token (Authorization: Bearer TOKEN)"
        )
    if token is not None:
        name, value = cookie(token)
        sent = request.cookies.get(name, "") if request.method == "GET" else ""
        if not hmac.compare_digest(sent.encode(), value.encode()):
            raise _refusal(request)


async def _allowed(request: Request, authorization: Token = None) -> None:
    if request.app.state.token is None:
        raise Problem(
            403, "this server is read-only; restart it with --token TOKEN and send that token"
        )
    if not _sends(request, request.app.state.token):
        raise _refusal(request)


READS = [Depends(may_read)]
CHANGES = [Depends(_allowed)]
