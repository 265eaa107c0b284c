"""Requests to an Immich server, for its versions from 2.0.

Only photos and videos of the user's own library are read: never those of partners, in the trash, archived, hidden or
locked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import httpx2

from retrieval_tip.errors import InputError, UsageError, warn_once
from retrieval_tip.wording import few, one_line

PERMISSIONS = (
    "asset.read",
    "asset.view",
    "tag.read",
    "tag.create",
    "tag.asset",
    "tag.delete",
    "user.read",
)
"""The permissions that a key needs. To learn from albums, it also needs ``album.read``."""
OLDEST, STRUCTURED, UNTRIED = (2, 0, 0), (3, 2, 0), (4, 0, 0)
"""The oldest version that is supported, the first with structured searches, and the first that is not known."""
KINDS = ("IMAGE", "VIDEO")
PAGE = 1000  # photos per answer, the most that Immich sends
WRITTEN = 500  # photos per request that writes
SECONDS = 30  # until a request fails
TRIES = 3
PAUSE = 0.5  # seconds before a second try, then twice as long
LARGEST = 1 << 26  # bytes of an answer


class Asset(NamedTuple):
    """A photo or video.

    ``look`` changes when its picture does, but not when its tags do. ``external`` is 1 in an external library, which
    may be read-only, so that Immich loses its tags.
    """

    id: str
    kind: str
    look: str
    created: str
    updated: str
    external: int
    name: str


class Tag(NamedTuple):
    """A tag. ``path`` has the names of its parents, as in ``Pets/Rex``."""

    id: str
    path: str


class ImmichError(InputError):
    """Raised when a server cannot be reached, or does not do what it is asked. ``status`` is that of its answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Immich:
    """A connection to a server."""

    def __init__(self, url: str, key: str) -> None:
        """Use an address with or without ``/api``. Nothing is sent yet. Raises UsageError if it is no address."""
        address = url.rstrip("/").removesuffix("/api")
        try:
            parsed = httpx2.URL(address)
        except httpx2.InvalidURL:
            parsed = httpx2.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
            raise UsageError(
                f"{one_line(url)}: is not the address of a server, such as http://photos:2283"
            )
        self.url = address
        self.version: tuple[int, ...] = OLDEST
        self.owner = ""
        self._client = httpx2.Client(
            headers={"x-api-key": key, "accept": "application/json"},
            timeout=SECONDS,
            trust_env=False,  # a proxy would see the key
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def connect(self, *more: str) -> None:
        """Find out the version and the user. Raises ImmichError if either is unsuitable or the key lacks permissions.

        ``more`` are permissions beside :data:`PERMISSIONS`.
        """
        version = self._ask("GET", "/server/version")
        self.version = tuple(int(version[name]) for name in ("major", "minor", "patch"))
        shown = ".".join(map(str, self.version))
        if self.version < OLDEST:
            raise ImmichError(f"{self.url}: has Immich {shown}; update it to 2.0 or later")
        if self.version >= UNTRIED:
            warn_once(
                f"{self.url}: has Immich {shown}, which this program does not know; look at a dry run first"
            )
        granted = self._ask("GET", "/api-keys/me")["permissions"]
        missing = [name for name in (*PERMISSIONS, *more) if name not in granted]
        if missing and "all" not in granted:
            raise ImmichError(
                f"{self.url}: the key lacks {few(missing)}; add them in Immich under API Keys"
            )
        self.owner = self._ask("GET", "/users/me")["id"]

    def tags(self) -> list[Tag]:
        """Return all tags of the user."""
        return [Tag(tag["id"], tag["value"]) for tag in self._ask("GET", "/tags")]

    def albums(self) -> dict[str, str]:
        """Return the ids of albums by their name. Of albums with one name, it has the first."""
        albums: dict[str, str] = {}
        for album in self._ask("GET", "/albums"):
            albums.setdefault(album["albumName"], album["id"])
        return albums

    def assets(
        self,
        *,
        tag: str | None = None,
        album: str | None = None,
        updated_after: str | None = None,
        visibility: str = "timeline",
    ) -> Iterator[Asset]:
        """Yield the photos and videos of a tag or an album, or those that were changed since a time, or all."""
        for kind in KINDS:
            yield from self._assets(kind, tag, album, updated_after, visibility)

    def _assets(
        self,
        kind: str,
        tag: str | None,
        album: str | None,
        updated_after: str | None,
        visibility: str,
    ) -> Iterator[Asset]:
        structured = self.version >= STRUCTURED
        search: dict[str, Any] = {"size": PAGE}
        if structured:
            conditions: dict[str, Any] = {
                "type": {"eq": kind},
                "visibility": {"in": [visibility]},
                "trashedAt": {"eq": None},
            }
            given = {"tagIds": tag, "albumIds": album}
            conditions |= {name: {"any": [one]} for name, one in given.items() if one is not None}
            if updated_after is not None:
                conditions["updatedAt"] = {"gte": updated_after}
            search["filter"] = conditions
        else:
            search |= {"type": kind, "visibility": visibility, "page": 1}
            given = {"tagIds": tag, "albumIds": album}
            search |= {name: [one] for name, one in given.items() if one is not None}
            if updated_after is not None:
                search["updatedAfter"] = updated_after
        seen: set[str] = set()
        while True:
            found = self._ask("POST", "/search/metadata", search)["assets"]
            for item in found["items"]:
                if self._is_ours(item, kind, visibility) and item["id"] not in seen:
                    seen.add(item["id"])
                    yield _asset(item)
            following = found["nextCursor"] if structured else found["nextPage"]
            if following is None:
                return
            # Pages are numbers in a request, but text in an answer.
            search |= {"cursor": following} if structured else {"page": int(following)}

    def _is_ours(self, item: Mapping[str, Any], kind: str, visibility: str) -> bool:
        """Return whether the user owns a photo and sees it where it was asked for, as a server may ignore filters."""
        return (
            item["ownerId"] == self.owner
            and item["type"] == kind
            and item["visibility"] == visibility
            and not item["isTrashed"]
        )

    def shows(self, asset: str) -> bool:
        """Return whether a photo still is in the timeline of the user. Others may be in the trash, or archived."""
        try:
            item = self._ask("GET", f"/assets/{asset}")
        except ImmichError as error:
            if error.status in (400, 404):  # Immich answers so for a photo that was deleted
                return False
            raise
        return self._is_ours(item, item["type"], "timeline")

    def preview(self, asset: Asset) -> bytes:
        """Return the preview picture, which is a frame of a video. Raises ImmichError if there is none yet."""
        place = f"/assets/{asset.id}/thumbnail"
        answer = self._send("GET", f"{place}?size=preview&edited=true", None)
        if not answer.headers.get("content-type", "").startswith("image/"):
            raise ImmichError(f"{self.url}: {asset.name}: has no picture yet")
        return answer.content

    def make_tag(self, path: str) -> Tag:
        """Return a tag, which is created if there is none."""
        for tag in self._ask("PUT", "/tags", {"tags": [path]}):
            if tag["value"] == path:
                return Tag(tag["id"], path)
        raise ImmichError(
            f"{self.url}: tag {path}: was not created; look whether tags are enabled in the account settings"
        )

    def put_on(self, tag: str, assets: Sequence[str]) -> dict[str, str]:
        """Put a tag on photos, and return ``success`` or the error of each, which is ``duplicate`` if it was there."""
        return self._written("PUT", tag, assets)

    def take_off(self, tag: str, assets: Sequence[str]) -> dict[str, str]:
        """Take a tag off photos, and return ``success`` or the error of each, which is ``not_found`` if it was gone."""
        return self._written("DELETE", tag, assets)

    def _written(self, method: str, tag: str, assets: Sequence[str]) -> dict[str, str]:
        answers = self._ask(method, f"/tags/{tag}/assets", {"ids": list(assets)})
        return {
            answer["id"]: "success" if answer["success"] else str(answer.get("error", "unknown"))
            for answer in answers
        }

    def delete_tag(self, tag: str) -> None:
        """Delete a tag."""
        self._send("DELETE", f"/tags/{tag}", None)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        """Send a request, and return the JSON of its answer."""
        answer = self._send(method, path, body)
        try:
            return answer.json()
        except ValueError:
            kind = one_line(answer.headers.get("content-type", "no type"))
            raise ImmichError(
                f"{self.url}: answers {path} with {kind} instead of JSON; is this the address of Immich, "
                "and not of a proxy that asks for a password?"
            ) from None

    def _send(self, method: str, path: str, body: object) -> httpx2.Response:
        """Send a request, again if the server fails. Raises ImmichError unless it succeeds."""
        content, headers = None, {}
        if body is not None:  # without its type, Immich would ignore it, and find the whole library
            content = json.dumps(body).encode()
            headers = {"content-type": "application/json"}
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2**attempt)
            try:
                answer = self._bounded(method, path, content, headers)
            except httpx2.HTTPError as error:
                problem = f"cannot be reached ({one_line(str(error)) or type(error).__name__})"
                continue
            if answer.status_code < 500:
                break
            problem = f"fails with status {answer.status_code} {_reason(answer)}".rstrip()
        else:
            raise ImmichError(f"{self.url}: {problem}; try again later")
        if answer.is_success:
            return answer
        meaning = {
            401: "does not accept the key; create one in Immich under API Keys",
            403: "refuses",
        }.get(answer.status_code, f"answers with status {answer.status_code}")
        raise ImmichError(
            f"{self.url}: {path.partition('?')[0]}: {meaning} {_reason(answer)}".rstrip(),
            answer.status_code,
        )

    def _bounded(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str]
    ) -> httpx2.Response:
        """Send a request once, and read its answer. Raises ImmichError if it is too large."""
        request = self._client.stream(
            method, f"{self.url}/api{path}", content=content, headers=headers
        )
        with request as answer:
            read = bytearray()
            for chunk in answer.iter_bytes():
                read += chunk
                if len(read) > LARGEST:
                    raise ImmichError(
                        f"{self.url}: {path.partition('?')[0]}: answers with too much data"
                    )
        plain = {
            name: value for name, value in answer.headers.items() if name != "content-encoding"
        }
        return httpx2.Response(answer.status_code, headers=plain, content=bytes(read))


def _asset(item: Mapping[str, Any]) -> Asset:
    look = f"{item['thumbhash']}|{item.get('isEdited', False)}"
    return Asset(
        item["id"],
        item["type"],
        look,
        item["createdAt"],
        item["updatedAt"],
        int(item.get("libraryId") is not None),
        item["originalFileName"],
    )


def _reason(answer: httpx2.Response) -> str:
    """Return what a server says about an error, in the format of any version."""
    try:
        said = answer.json()
        messages = said.get("message") or ""
        details = [str(one.get("message", "")) for one in said.get("errors") or ()]
    except (ValueError, AttributeError):
        return ""
    texts = [*messages, *details] if isinstance(messages, list) else [str(messages), *details]
    number = said.get("correlationId") or answer.headers.get("x-correlation-id")
    words = one_line(", ".join(filter(None, map(str, texts))))[:300]
    return f"({words}, correlation {number})" if number else f"({words})"
