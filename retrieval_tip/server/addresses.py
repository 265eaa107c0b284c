"""The photos that other programs name by an address. No other address is ever read or fetched."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import httpx2

from retrieval_tip.data.exchange import LOCAL, below_document_root
from retrieval_tip.errors import InputError, UsageError, show
from retrieval_tip.files import read_regular, real

SECONDS = 20.0
"""Maximum time to fetch a photo."""


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
