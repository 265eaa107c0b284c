"""Read what clients send: images as multipart form data, and features as JSON or as float32 numbers.

Other programs name photos by an address. No address is read or fetched that :class:`Photos` does not allow.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import orjson
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.types import Message

from retrieval_tip.data.exchange import LOCAL, below_document_root
from retrieval_tip.data.reader import FloatArray
from retrieval_tip.data.tables import check_norms
from retrieval_tip.errors import InputError, UsageError, show
from retrieval_tip.files import read_regular, real
from retrieval_tip.index import photos
from retrieval_tip.retrieval.inputs import matrix
from retrieval_tip.server.limits import Limits
from retrieval_tip.server.problems import Problem
from retrieval_tip.settings import Norms

FORM, JSON, FLOATS = "multipart/form-data", "application/json", "application/octet-stream"
LONGEST_FIELD = 1 << 16
"""Maximum size of a text field, in bytes."""
LONGEST_NAME = 1024
"""Maximum length of an input name or a label, in characters."""
PARTS_A_ROW = 64
"""Maximum number of commas, lists and strings per JSON row, since parsing millions would block the server."""
SHORT = 1 << 16
"""Maximum bytes of JSON to parse directly. Longer JSON is parsed in a thread, one request at a time."""
SECONDS = 20.0
"""Maximum time to fetch a photo."""

NAME = re.compile(r"[^\W\d_][\w .-]{0,62}(?<![ .])")
"""Pattern for the name of a new index, which is also the name of its folder."""

_PARSING = ThreadPoolExecutor(1, thread_name_prefix="parse")


@dataclass(frozen=True)
class Sent:
    """Uploaded ``images``, or ``features`` of shape ``[q, d]``, with one name and, for shots, one label each.

    ``client`` is the address of the sender.
    """

    names: list[str]
    labels: list[str]
    images: Sequence[bytes] = ()
    features: FloatArray | None = None
    client: str = ""


async def read(request: Request, limits: Limits, norms: Norms, d: int, *, labelled: bool = False) -> Sent:
    """Read the images or features in a request to an index whose features have ``d`` values.

    The problems have status 400 if the body is malformed, 413 if it is too large, 415 if its content type is not
    supported, or 422 if a field is missing, unknown or invalid.
    """
    kind = _kind(request)
    if kind == JSON:
        body = await request.body()
        if len(body) > limits.json_bytes:
            raise Problem(413, f"JSON: is longer than {limits.json_bytes:,} bytes; send fewer features at once")
        parse = partial(_json, body, limits, norms, d, labelled=labelled)
        thread = asyncio.get_running_loop().run_in_executor
        sent = parse() if len(body) <= SHORT else await thread(_PARSING, parse)
    elif kind == FLOATS and not labelled:
        sent = _floats(await request.body(), limits, norms, d)
    elif kind != FORM:
        raise Problem(415, f"content type {kind!r}: send images as {FORM}, or features as {JSON}")
    else:
        sent, _ = await _form(request, limits, ["label"] if labelled else [])
        if labelled and len(sent.labels) != 1:
            raise InputError(f"label: {len(sent.labels)} labels given; send one label for all images")
        sent = replace(sent, labels=sent.labels * len(sent.images))
    return replace(sent, client=client_of(request))


async def read_index(request: Request, limits: Limits) -> tuple[str, Sent]:
    """Read the name of a new index, and its images with one label each. Raises the same errors as :func:`read`."""
    if (kind := _kind(request)) != FORM:
        raise Problem(415, f"content type {kind!r}: send {FORM} with a name, images, and a label for each image")
    sent, names = await _form(request, limits, ["label", "name"])
    if len(names) != 1:
        raise InputError(f"name: {len(names)} names given; send one name for the new index")
    labels, images = len(sent.labels), len(sent.images)
    if labels != images:
        raise InputError(f"label: {labels} labels given for {images} images; send one label for each image, in order")
    return index_name(names[0]), replace(sent, client=client_of(request))


def index_name(value: object) -> str:
    """Return a name for an index and its folder. Raises InputError if the name is not valid."""
    name = _text("name", value).strip()
    if not NAME.fullmatch(name):
        expected = "1 to 64 letters, digits, spaces, dots, hyphens or underscores, starting with a letter"
        raise InputError(f"name: {name[:64]!r} is not valid; use {expected}")
    if photos.is_reserved(name):  # deleting this index would delete the photos of another
        raise InputError(f"name: {name!r} ends with {photos.SUFFIX}, like a folder of photos; choose another name")
    return name


def client_of(request: Request) -> str:
    """Return the address of the sender."""
    return request.client.host if request.client else ""


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _form(request: Request, limits: Limits, fields: list[str]) -> tuple[Sent, list[object]]:
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
            raise Problem(400, f"content type {FORM}: the form ends before its last boundary; send the whole form")
        return message

    names: list[str] = []
    images: list[bytes] = []
    texts: defaultdict[str, list[object]] = defaultdict(list)
    most = {"max_files": limits.images, "max_fields": limits.images + 8, "max_part_size": LONGEST_FIELD}
    async with Request(request.scope, receive).form(**most) as form:
        for field, value in form.multi_items():
            if field not in ("images", *fields):
                raise InputError(f"field {field!r}: is unknown; the fields are {' and '.join(['images', *fields])}")
            if isinstance(value, UploadFile) != (field == "images"):
                raise InputError(f"field {field!r}: must be {'files' if field == 'images' else 'text'}")
            if isinstance(value, UploadFile):
                names.append(_text("images", value.filename or f"image {len(names)}"))
                images.append(await value.read())
            else:
                texts[field].append(value)
    if not images:
        raise InputError("images: missing; send at least one file in the field 'images'")
    return Sent(names, [class_name(text) for text in texts["label"]], images), texts["name"]


def _floats(body: bytes, limits: Limits, norms: Norms, d: int) -> Sent:
    rows, rest = divmod(len(body), 4 * d)
    if rest or not rows:
        raise InputError(f"features: {len(body):,} bytes given; send {d} float32 numbers for each feature")
    if rows > limits.rows:
        raise Problem(413, f"features: {rows:,} rows given; send at most {limits.rows:,} rows at once")
    features = matrix(np.frombuffer(body, "<f4").reshape(rows, d).copy(), "features")
    names = [f"row {row}" for row in range(rows)]
    return Sent(names, [], features=check_norms(features, 0, norms, "features"))


def _json(body: bytes, limits: Limits, norms: Norms, d: int, *, labelled: bool) -> Sent:
    _check_parts(body, limits.rows, d)
    try:
        sent = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, f"invalid JSON: {error}") from None
    names_field = "sources" if labelled else "inputs"
    known = ["features", "labels", names_field] if labelled else ["features", names_field]
    if not isinstance(sent, dict) or not isinstance(sent.get("features"), list):
        raise InputError("features: missing; send an object with 'features', a list of lists of numbers")
    if unknown := sorted(sent.keys() - set(known)):
        raise InputError(f"field {unknown[0][:LONGEST_NAME]!r}: is unknown; the fields are {', '.join(known)}")
    rows = len(sent["features"])
    if not 1 <= rows <= limits.rows:
        raise Problem(413 if rows else 422, f"features: {rows} rows given; send 1 to {limits.rows} rows at once")
    features = _features(sent["features"], d, norms)
    names = _texts(sent.get(names_field, [f"row {row}" for row in range(rows)]), names_field, rows)
    labels = [class_name(label) for label in _texts(sent.get("labels"), "labels", rows)] if labelled else []
    return Sent(names, labels, features=features)


def _check_parts(body: bytes, rows: int, d: int) -> None:
    """Raise Problem 413 if JSON contains more parts than ``rows`` features of ``d`` values need."""
    read = np.frombuffer(body, np.uint8)
    commas, others = (sum(int(np.count_nonzero(read == ord(part))) for part in parts) for parts in (",", '[{"'))
    if commas > rows * (d + PARTS_A_ROW) or others > rows * PARTS_A_ROW:
        raise Problem(413, f"JSON: contains more parts than {rows} features of {d} values need; send fewer at once")


def _features(sent: list[object], d: int, norms: Norms) -> FloatArray:
    rows = np.empty((len(sent), d))
    for i, row in enumerate(sent):
        if not isinstance(row, list) or len(row) != d:
            raise InputError(f"features: row {i} is not a list of {d} numbers, which this index needs")
        if not {float, int}.issuperset(map(type, row)):  # bool is excluded; NumPy would pad strings to the longest
            raise InputError(f"features: row {i} contains values that are not numbers")
        rows[i] = row
    return check_norms(matrix(rows, "features"), 0, norms, "features")


def _texts(sent: object, field: str, rows: int) -> list[str]:
    if not isinstance(sent, list) or len(sent) != rows:
        raise InputError(f"{field}: must be a list of length {rows}, with one entry for each row of features")
    return [_text(field, value) for value in sent]


def _text(field: str, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
        raise InputError(f"{field}: must be a text of 1 to {LONGEST_NAME} characters")
    return value.encode("utf-8", "backslashreplace").decode()


def class_name(value: object) -> str:
    """Return the name of a class. Raises InputError if it is not valid."""
    label = _text("label", value).strip()
    if not label or not label.isprintable():
        raise InputError("label: must be a class name without control characters")
    return label


class Photos:
    """Photos below the folder ``root``, and those that were uploaded to a Label Studio.

    Environment variables name the Label Studio and the key of one of its users. A photo has at most ``most`` bytes.
    """

    def __init__(self, root: Path | None, most: int, environment: Mapping[str, str]) -> None:
        """Raises UsageError if the environment variables do not contain the address of a web server and a key."""
        self._root, self._most, self._key = root, most, environment.get("LABEL_STUDIO_API_KEY", "")
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
                return await asyncio.to_thread(_file, below_document_root(address), self._root, self._most)
            if self._key:
                return await self._fetch(address)
            raise InputError("needs serve --root FOLDER (a local file), or LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
        except InputError as error:
            raise InputError(f"{show(address[:80])}: {error}") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, LookupError, TimeoutError, TypeError, ValueError) as error:
            raise InputError(f"{show(address[:80])}: cannot be fetched ({type(error).__name__})") from None

    async def _fetch(self, address: str) -> bytes:
        own, url, data = self._url, self._url.join(address), bytearray()
        if url.copy_with(raw_path=own.raw_path) != own or not url.path.startswith(f"{own.path}data/"):
            raise InputError("is not an upload of LABEL_STUDIO_URL (/data/...), and nothing else is fetched")
        # Redirects are not followed, and neither a proxy nor a password of this machine is used.
        async with asyncio.timeout(SECONDS), httpx2.AsyncClient(trust_env=False, timeout=SECONDS) as client:
            permission = f"Token {self._key}"
            if self._key.count(".") == 2:  # a personal access token, which is exchanged for one that expires
                exchanged = await client.post(own.join("api/token/refresh/"), json={"refresh": self._key})
                permission = f"Bearer {exchanged.json()['access']}" if exchanged.status_code == 200 else ""
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
