"""Read what clients send: images as multipart form data, and features as JSON or as float32 numbers.

Other programs name photos by an address. No address is read or fetched that :class:`LabelStudioPhotos` does not allow.
"""

from __future__ import annotations

import asyncio
import base64
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.types import Message

from retrieval_tip.arrays import FloatArray
from retrieval_tip.data.exchange import LOCAL, below_document_root
from retrieval_tip.data.feature_table import check_norms
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import read_regular, real
from retrieval_tip.retrieval.inputs import matrix
from retrieval_tip.server.guard import FLOATS, FORM, JSON, Limits, kind_of
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.schemas import Features, Images, LabelledFeatures, Shots
from retrieval_tip.settings import Norms
from retrieval_tip.wording import show

LONGEST_FIELD = 1 << 16
"""Maximum size of a text field, in bytes."""
PARTS_A_ROW = 64
"""Maximum number of lists and fields per JSON row, since parsing millions would block the server."""
SECONDS = 20.0
"""Maximum time to fetch a photo."""


@dataclass(frozen=True)
class Upload:
    """Uploaded ``images``, or ``features`` of shape ``[q, d]``, with one name and, for shots, one label each.

    ``files`` has the number of the uploaded file of each image, since frames of a video are in the same file.
    """

    names: list[str]
    labels: Sequence[str] = ()
    images: Sequence[bytes] = ()
    features: FloatArray | None = None
    files: Sequence[int] = ()


F = TypeVar("F", bound=Images)
T = TypeVar("T", bound=BaseModel)


async def read(
    request: Request, limits: Limits, norms: Norms, d: int, *, labelled: bool = False
) -> Upload:
    """Read the images or features in a request to an index whose features have ``d`` values.

    The problems have status 400 if a form is malformed, 413 if the body is too large, 415 if its content type is not
    supported, or 422 if a field is missing, unknown or invalid.
    """
    kind = kind_of(request.headers)
    if kind == FORM:
        return (await read_form(request, limits, Shots if labelled else Images))[1]
    features: FloatArray | list[list[float]]
    if kind == JSON:
        asked = _json(await request.body(), limits, d, LabelledFeatures if labelled else Features)
        features = asked.features
        names = asked.inputs
        labels = getattr(asked, "labels", None)
    elif kind == FLOATS and not labelled:
        features = _floats(await request.body(), d)
        names = None
        labels = None
    else:
        raise Problem(415, f"content type {kind!r}: send images as {FORM}, or features as {JSON}")
    rows = len(features)
    if rows > limits.rows:
        raise Problem(
            413, f"features: {rows:,} rows given; send at most {limits.rows:,} rows at once"
        )
    if {*map(len, features)} != {d}:
        raise InputError(f"features: each must be a list of {d} numbers, which this index needs")
    if any(texts is not None and len(texts) != rows for texts in (names, labels)):
        raise InputError(f"inputs and labels: must have one entry for each of the {rows} features")
    checked = check_norms(matrix(np.array(features), "features"), 0, norms, "features")
    return Upload(names or [f"row {row}" for row in range(rows)], labels or (), features=checked)


async def read_form(request: Request, limits: Limits, fields: type[F]) -> tuple[F, Upload]:
    """Read a form with images, and return its fields and its images. Raises the same errors as :func:`read`."""
    if (kind := kind_of(request.headers)) != FORM:
        raise Problem(415, f"content type {kind!r}: send {FORM}")
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # some Python codecs are slow or fail
        raise Problem(415, f"content type {FORM}: its charset must be UTF-8")
    last = b"--%s--" % options.get(b"boundary", b"")
    end = b""

    async def receive() -> Message:
        nonlocal end
        message = await request.receive()
        end = (end + message.get("body", b""))[-len(last) - 4 :]
        if message["type"] == "http.request" and not message.get("more_body") and last not in end:
            raise Problem(
                400,
                f"content type {FORM}: the form ends before its last boundary; send the whole form",
            )
        return message

    sent = defaultdict[str, list[str | UploadFile]](list)
    most = {
        "max_files": limits.images,
        "max_fields": limits.images + 8,
        "max_part_size": LONGEST_FIELD,
    }
    async with Request(request.scope, receive).form(**most) as form:
        for field, value in form.multi_items():
            sent[field].append(value)
        found = _checked(fields.model_validate, sent)
        images = [await one.read() for one in found.images]
    names = [one.filename or f"image {number}" for number, one in enumerate(found.images)]
    labels: list[str] = getattr(found, "label", [])
    if len(labels) > 1 and len(labels) != len(images):
        many = f"{len(labels)} labels given for {len(images)} images"
        raise InputError(f"label: {many}; send one label for each image, in order")
    return found, Upload(names, labels * len(images) if len(labels) == 1 else labels, images)


def _checked(check: Callable[[Any], T], sent: object) -> T:
    try:
        return check(sent)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None


def _floats(body: bytes, d: int) -> FloatArray:
    rows, rest = divmod(len(body), 4 * d)
    if rest or not rows:
        raise InputError(
            f"features: {len(body):,} bytes given; send {d} float32 numbers for each feature"
        )
    return np.frombuffer(body, "<f4").reshape(rows, d)


def _json(body: bytes, limits: Limits, d: int, kind: type[Features]) -> Features:
    commas = body.count(b",")
    others = body.count(b"[") + body.count(b":")
    if commas > limits.rows * (d + PARTS_A_ROW) or others > limits.rows * PARTS_A_ROW:
        most = f"more than {limits.rows} features of {d} values"
        raise Problem(413, f"JSON: contains {most}; send fewer features at once")
    return _checked(kind.model_validate_json, body)


class LabelStudioPhotos:
    """Photos below the folder ``root``, and those that were uploaded to a Label Studio.

    Environment variables name the Label Studio and the key of one of its users. A photo has at most ``most`` bytes.
    """

    def __init__(self, root: Path | None, most: int, environment: Mapping[str, str]) -> None:
        """Raises UsageError if the environment variables do not contain the address of a web server and a key."""
        self._root = root
        self._most = most
        self._key = environment.get("LABEL_STUDIO_API_KEY", "")
        try:
            self._url = httpx2.URL(environment.get("LABEL_STUDIO_URL", "").rstrip("/") + "/")
        except httpx2.InvalidURL:
            self._url = httpx2.URL("invalid:")
        usable = self._key and self._url.scheme in ("http", "https") and self._url.host
        if not usable and (self._key or self._url != "/"):
            raise UsageError(
                "LABEL_STUDIO_URL, LABEL_STUDIO_API_KEY: set both, for example http://HOST:8080 and a token"
            )

    async def read(self, address: object) -> bytes:
        """Return the bytes at an address. Raises InputError if they cannot be read."""
        if not isinstance(address, str):
            raise InputError("the task has no text with the address of its photo")
        try:
            if address.startswith("data:"):
                return of_data_url(address)
            if address.startswith(LOCAL) and self._root is not None:
                return await asyncio.to_thread(
                    _file, below_document_root(address), self._root, self._most
                )
            if self._key:
                return await self._fetch(address)
            raise InputError(
                "needs serve --root FOLDER (a local file), or LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY"
            )
        except InputError as error:
            raise InputError(f"{show(address[:80])}: {error}") from None
        except (
            httpx2.HTTPError,
            httpx2.InvalidURL,
            LookupError,
            TimeoutError,
            TypeError,
            ValueError,
        ) as error:
            raise InputError(
                f"{show(address[:80])}: cannot be fetched ({type(error).__name__})"
            ) from None

    async def _fetch(self, address: str) -> bytes:
        own = self._url
        url = self._url.join(address)
        data = bytearray()
        inside = url.path.startswith(f"{own.path}data/") and ".." not in url.path.split(
            "/"
        )  # also if it was encoded
        if url.copy_with(raw_path=own.raw_path) != own or not inside:
            raise InputError(
                "is not an upload of LABEL_STUDIO_URL (/data/...), and nothing else is fetched"
            )
        # Redirects are not followed, and neither a proxy nor a password of this machine is used.
        async with (
            asyncio.timeout(SECONDS),
            httpx2.AsyncClient(trust_env=False, timeout=SECONDS) as client,
        ):
            permission = f"Token {self._key}"
            if (
                self._key.count(".") == 2
            ):  # a personal access token, which is exchanged for one that expires
                exchanged = await client.post(
                    own.join("api/token/refresh/"), json={"refresh": self._key}
                )
                permission = (
                    f"Bearer {exchanged.json()['access']}" if exchanged.status_code == 200 else ""
                )
            headers = {"authorization": permission, "accept-encoding": "identity"}
            async with client.stream("GET", url, headers=headers) as answer:
                if answer.status_code != 200:
                    raise InputError(f"Label Studio answers with status {answer.status_code}")
                async for part in answer.aiter_raw():
                    data += part
                    if len(data) > self._most:
                        raise InputError(f"has more than {self._most:,} bytes")
        return bytes(data)


def of_data_url(address: str) -> bytes:
    """Return the bytes of a data URL. Raises InputError if they are not in Base64."""
    head, _, text = address.partition(",")
    with suppress(ValueError):
        if head.startswith("data:") and head.endswith(";base64"):
            return base64.b64decode(text, validate=True)
    raise InputError("is not a whole data URL in Base64 (data:image/jpeg;base64,...)")


def _file(path: str, root: Path, most: int) -> bytes:
    """Read a file below ``root``. The path starts at ``root``, or else at the document root ``/``."""
    with suppress(OSError, ValueError):  # not a valid file name, or not readable
        for place in (real(root / path), real(Path("/", path))):
            if place.is_relative_to(real(root)) and place.is_file():
                return read_regular(place, most)
    raise InputError(f"no such file below {show(root)}, the folder of --root")
