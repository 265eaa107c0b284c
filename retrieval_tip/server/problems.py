"""Problems as ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, one_line

MEDIA = "application/problem+json"
BUSY = 5
"""Seconds after which to ask again where the index is being written, or the disk is full."""
NAMED = 3
"""Errors of one request that are said."""


class Problem(Exception):  # noqa: N818  # the name of the format
    """An answer that is not the one asked for: an HTTP ``status`` and what to do, in one line."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def body_of(status: int, detail: str) -> bytes:
    """The JSON object."""
    what = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": one_line(detail)}
    return orjson.dumps(what)


def answer(problem: Problem) -> Response:
    """A problem as a response."""
    return Response(body_of(problem.status, problem.detail), problem.status, problem.headers, MEDIA)


def of(error: Exception) -> Problem:
    """An error of this package, of the framework, or a problem itself, as a problem."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return Problem(
            422, "; ".join(map(_said, error.errors()[:NAMED])) or "not as the description of the interface says"
        )
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), error.headers)
    if isinstance(error, InputError | UsageError):
        return Problem(422, str(error))
    return Problem(503, str(error), {"Retry-After": str(BUSY)})  # an index that cannot be read or written now


def _said(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("query", "path", "body"))
    return f"{where}: {error['msg']}" if where else str(error["msg"])


async def handle(_: Request, error: Exception) -> Response:
    """The exception handler for all of :data:`HANDLED`."""
    return answer(of(error))


HANDLED = (Problem, RequestValidationError, HTTPException, RetrievalTipError)
