"""Functions that convert errors into ``application/problem+json`` responses (RFC 9457)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import cast

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.wording import one_line

log = logging.getLogger(__name__)

MEDIA = "application/problem+json"
BUSY = 5
"""Value of ``Retry-After``, in seconds, while an index is being written or the disk is full."""
NAMED = 3
"""Maximum number of errors to describe in one response."""


class Problem(HTTPException):
    """An error response, with an HTTP status and a ``detail`` line that tells the client what to do.

    InputError and UsageError become responses with the status 422.
    """


def answer(problem: HTTPException) -> Response:
    """Convert a problem into a response."""
    status = problem.status_code
    detail = one_line(problem.detail)
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    return Response(orjson.dumps(body), status, problem.headers, MEDIA)


def _problem(error: Exception) -> HTTPException:
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, RequestValidationError):
        return Problem(
            422,
            "; ".join(map(_line, error.errors()[:NAMED]))
            or "the request does not match /openapi.json",
        )
    if isinstance(error, InputError | UsageError):
        return Problem(422, str(error))
    if isinstance(error, RetrievalTipError):  # the index cannot be read or written at the moment
        return Problem(503, str(error), {"Retry-After": str(BUSY)})
    return Problem(500, f"internal error ({type(error).__name__}); see the server log")


def _line(error: Mapping[str, object]) -> str:
    place = cast(tuple[object, ...], error["loc"])
    parts = [part for part in place if part not in ("query", "path", "body")] or place or ["body"]
    return f"{'.'.join(map(str, parts))}: {str(error['msg']).removeprefix('Value error, ')}"


async def handle(_: Request, error: Exception) -> Response:
    """Handle an exception of one of the types in :data:`HANDLED` by returning a problem response."""
    return answer(_problem(error))


HANDLED = (HTTPException, RequestValidationError, RetrievalTipError, Exception)


def reason_of(error: Exception, what: str) -> str:
    """Return the text of an error for the page. An error that nobody foresaw is logged."""
    if not isinstance(error, RetrievalTipError):
        log.exception(what)
    return str(error)
