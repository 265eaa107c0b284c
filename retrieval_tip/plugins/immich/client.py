"""Requests to an Immich server, for its versions from 2.0.

Only photos and videos of the user's own timeline are read: never those of partners, in the trash, archived, hidden or
locked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypeVar
from uuid import UUID

import httpx2

from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, warn_once
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
"""The oldest supported version, the first with structured searches, and the first that did not exist in 2026."""
KINDS = ("IMAGE", "VIDEO")
VISIBILITIES = ("timeline", "archive", "hidden")
PAGE = 1000  # photos per answer, the most that Immich sends
AT_ONCE = 500  # photos per request that writes
SECONDS = 30  # until a request fails
TRIES = 3  # of a request that writes nothing
PAUSE = 0.5  # seconds before the second try, then twice as long
LARGEST = 1 << 26  # bytes of an answer

T = TypeVar("T")


class Asset(NamedTuple):
    """A photo or video.

    ``look`` changes when its picture does, but not when its tags do. ``external`` is 1 in an external library, which
    may be read-only, so that Immich loses its tags.
    """

    id: str
    look: str
    created: str
    updated: str
    external: int
    name: str


class ImmichError(RetrievalTipError):
    """Raised when a server cannot be reached or refuses a request. ``status`` is that of its answer, or 0."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Immich:
    """A connection to a server."""

    def __init__(self, url: str, key: str) -> None:
        """Use an address with or without ``/api``. Nothing is sent yet. Raises UsageError if it is no address."""
        self.url = url.rstrip("/").removesuffix("/api")
        try:
            address = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            address = httpx2.URL("")
        if address.scheme not in ("http", "https") or not address.host or address.userinfo:
            raise UsageError(
                f"{one_line(url)}: is not the address of a server, such as http://photos:2283"
            )
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
        """Ask for the version and the user. Raises ImmichError if it is too old or the key lacks permissions.

        ``more`` are permissions beside :data:`PERMISSIONS`.
        """
        parts = ("major", "minor", "patch")
        self.version = self._ask(
            "GET", "/server/version", lambda answer: tuple(int(answer[part]) for part in parts)
        )
        shown = ".".join(map(str, self.version))
        if self.version < OLDEST:
            raise ImmichError(f"{self.url}: has Immich {shown}; update it to 2.0 or later")
        if self.version >= UNTRIED:
            warn_once(
                f"{self.url}: has Immich {shown}, which is newer than this program; do a dry run first"
            )
        granted = self._ask("GET", "/api-keys/me", lambda answer: set(answer["permissions"]))
        missing = [name for name in (*PERMISSIONS, *more) if name not in granted]
        if missing and "all" not in granted:
            raise ImmichError(
                f"{self.url}: the key lacks {few(missing)}; add them in Immich under API Keys"
            )
        self.owner = self._ask("GET", "/users/me", lambda answer: str(answer["id"]))

    def tags(self) -> dict[str, str]:
        """Return the ids of all tags by their path, such as ``Pets/Rex``."""
        return self._ask("GET", "/tags", _ids_by_path)

    def albums(self) -> dict[str, str]:
        """Return the ids of albums by their name. Of albums with the same name, it has the first."""
        return self._ask(
            "GET",
            "/albums",
            lambda answer: {album["albumName"]: str(album["id"]) for album in reversed(answer)},
        )

    def assets(
        self,
        ids: Mapping[str, str] = MappingProxyType({}),
        *,
        updated_after: str | None = None,
        anywhere: bool = False,
    ) -> Iterator[Asset]:
        """Yield the photos and videos in the timeline of the user.

        ``ids`` restricts them to a tag (``tagIds``) or an album (``albumIds``), ``updated_after`` to those that have
        changed. With ``anywhere``, they also may be archived, hidden or in the trash.
        """
        visibilities = VISIBILITIES if anywhere else VISIBILITIES[:1]
        for visibility in visibilities:
            if self.version >= STRUCTURED:
                conditions: dict[str, Any] = {name: {"any": [id_]} for name, id_ in ids.items()}
                conditions |= {"type": {"in": KINDS}, "visibility": {"in": [visibility]}}
                if not anywhere:
                    conditions["trashedAt"] = {"eq": None}
                if updated_after is not None:
                    conditions["updatedAt"] = {"gte": updated_after}
                search: dict[str, Any] = {"filter": conditions}
            else:
                search = {name: [id_] for name, id_ in ids.items()}
                search |= {"visibility": visibility, "withDeleted": anywhere}
                if updated_after is not None:
                    search["updatedAfter"] = updated_after
            for item in self._pages(search):
                # A server that does not understand a condition ignores it.
                is_allowed = item["ownerId"] == self.owner if anywhere else self._is_shown(item)
                if is_allowed and item["type"] in KINDS:
                    yield _asset(item)

    def _pages(self, search: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Yield all that a search finds, once each."""
        seen: set[str] = set()
        position: dict[str, Any] = {}
        while True:
            body = {"size": PAGE, **search, **position}
            answer = self._ask("POST", "/search/metadata", _page, body)
            new = {item["id"]: item for item in answer["items"] if item["id"] not in seen}
            seen.update(new)
            yield from new.values()
            if self.version >= STRUCTURED:
                position = {"cursor": answer["nextCursor"]}
            else:  # a page is a number in a request, but a text in an answer
                position = {"page": int(answer["nextPage"] or 0)}
            if not new or not any(position.values()):
                return

    def shows(self, asset: str) -> bool:
        """Return whether a photo still is in the timeline of the user, rather than in the trash or archived."""
        try:
            return self._ask("GET", f"/assets/{asset}", self._is_shown)
        except ImmichError as error:
            if error.status in (400, 404):  # the photo was deleted
                return False
            raise

    def _is_shown(self, item: Mapping[str, Any]) -> bool:
        place = (item["ownerId"], item["visibility"], item["isTrashed"])
        return place == (self.owner, VISIBILITIES[0], False)

    def preview(self, asset: Asset) -> bytes:
        """Return the preview picture, which is a frame of a video. Raises InputError if there is none yet."""
        place = f"/assets/{asset.id}/thumbnail?size=preview&edited=true"
        try:
            answer = self._send("GET", place, None)
        except ImmichError as error:
            if error.status in (400, 404) or error.status >= 500:
                raise InputError(f"{one_line(asset.name)} has no preview yet") from None
            raise
        if not answer.headers.get("content-type", "").startswith("image/"):
            raise self._strange(place, answer)
        return answer.content

    def make_tag(self, path: str) -> str:
        """Return the id of a tag, and create the tag if it does not exist."""
        ids = self._ask("PUT", "/tags", _ids_by_path, {"tags": [path]})
        if path not in ids:
            raise ImmichError(
                f"{self.url}: tag {one_line(path)} was not created; enable tags in the account settings"
            )
        return ids[path]

    def put_on(self, tag: str, assets: Sequence[str]) -> dict[str, str]:
        """Put a tag on photos, and return ``success`` or the error of each, which is ``duplicate`` if it was there."""
        return self._ask("PUT", f"/tags/{tag}/assets", _results, {"ids": assets})

    def take_off(self, tag: str, assets: Sequence[str]) -> None:
        """Take a tag off photos. As the answer for a deleted photo is that for a locked one, it is not read."""
        self._send("DELETE", f"/tags/{tag}/assets", {"ids": assets})

    def delete_tag(self, tag: str) -> None:
        """Delete a tag."""
        self._send("DELETE", f"/tags/{tag}", None)

    def _ask(self, method: str, path: str, read: Callable[[Any], T], body: object = None) -> T:
        """Send a request, and return what ``read`` finds in the JSON of its answer."""
        answer = self._send(method, path, body)
        try:
            return read(answer.json())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._strange(path, answer) from None

    def _strange(self, path: str, answer: httpx2.Response) -> ImmichError:
        kind = one_line(answer.headers.get("content-type", "no type"))
        return ImmichError(
            f"{self.url}: {_plain(path)}: the answer ({kind}) is not that of Immich; "
            "give the address of Immich, not that of a proxy that asks for a password"
        )

    def _send(self, method: str, path: str, body: object) -> httpx2.Response:
        """Send a request. Raises ImmichError unless it succeeds.

        If the server fails, reading is tried again. Writing is not, because a second answer would not tell what the
        first request has changed.
        """
        content, headers = None, {}
        if body is not None:  # without its type, Immich would ignore it, and find the whole library
            content = json.dumps(body).encode()
            headers = {"content-type": "application/json"}
        tries = TRIES if method in ("GET", "POST") else 1  # the only POST is a search
        for attempt in range(tries):
            time.sleep(PAUSE * attempt)
            try:
                answer = self._bounded(method, path, content, headers)
            except httpx2.HTTPError as error:
                reason = one_line(str(error)) or type(error).__name__
                failure = ImmichError(f"{self.url}: cannot be reached ({reason}); try again later")
                continue
            if answer.is_success:
                return answer
            failure = self._refusal(path, answer)
            if answer.status_code < 500:
                break
        raise failure

    def _refusal(self, path: str, answer: httpx2.Response) -> ImmichError:
        """Return the error for an answer that is no success."""
        status = answer.status_code
        words = f"answers with status {status} {_reason(answer)}".rstrip()
        if status == 401:
            words = f"{words}; create a key in Immich under API Keys"
        return ImmichError(f"{self.url}: {_plain(path)}: {words}", status)

    def _bounded(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str]
    ) -> httpx2.Response:
        """Send a request once, and read its answer. Raises ImmichError if it is too large."""
        read = bytearray()
        place = f"{self.url}/api{path}"
        with self._client.stream(method, place, content=content, headers=headers) as answer:
            for chunk in answer.iter_bytes():
                read += chunk
                if len(read) > LARGEST:
                    raise ImmichError(f"{self.url}: {_plain(path)}: the answer is too large")
        answer.headers.pop("content-encoding", None)  # it was decoded
        return httpx2.Response(answer.status_code, headers=answer.headers, content=bytes(read))


def _plain(path: str) -> str:
    return path.partition("?")[0]


def _asset(item: Mapping[str, Any]) -> Asset:
    return Asset(
        item["id"],
        f"{item['thumbhash']}|{item.get('isEdited')}",
        str(item["createdAt"]),
        item["updatedAt"],
        int(item.get("libraryId") is not None),
        item["originalFileName"],
    )


def _page(answer: Any) -> Any:
    """Return the photos of an answer to a search. Raises an error if something is missing."""
    page = dict(answer["assets"])
    for item in page["items"]:
        UUID(item["id"])  # it becomes the name of a file
        datetime.fromisoformat(item["updatedAt"])
        _asset(item)
    return page


def _ids_by_path(answer: Any) -> dict[str, str]:
    return {str(tag["value"]): str(tag["id"]) for tag in answer}


def _results(answer: Any) -> dict[str, str]:
    return {
        item["id"]: "success" if item["success"] else str(item.get("error", "unknown"))
        for item in answer
    }


def _reason(answer: httpx2.Response) -> str:
    """Return the message in an error, in the format of any version."""
    number = answer.headers.get("x-correlation-id")
    try:
        said = {"correlationId": number} | answer.json()
    except (ValueError, TypeError):
        return ""
    texts = [str(said[name]) for name in ("message", "errors", "correlationId") if said.get(name)]
    return f"({one_line(', '.join(texts))[:300]})"
