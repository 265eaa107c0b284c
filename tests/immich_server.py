"""A stand-in for an Immich server: a library in memory, on loopback, as hostile as a real server can be.

It follows what clients of Immich have published. Below version 3.2 searches are flat, from then on they are structured.
It sends small pages, also has photos that nobody may touch, and ignores bodies and filters that it does not understand.
"""

import base64
import json
import re
import threading
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler

from loopback import answering

KEY = "a-key-that-nobody-may-print"
ME, PARTNER = (str(uuid.UUID(int=number, version=4)) for number in (1, 2))
ALL = ("asset.read", "asset.view", "tag.read", "tag.create", "tag.asset", "tag.delete")
ALL += ("user.read", "album.read")
START = datetime(2026, 7, 1, tzinfo=UTC)
FLAT, STRUCTURED = (2, 7, 5), (3, 2, 4)


def stamp(time):
    """Return a time as Immich writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03}Z"


TIME = stamp(START)
PHOTO = json.loads("""{"isOffline": false, "isFavorite": false, "hasMetadata": true, "checksum": "AAAA",
"duplicateId": null, "originalPath": "/data/photo.jpg", "originalMimeType": "image/jpeg", "livePhotoVideoId": null,
"duration": null, "width": 64, "height": 64}""")
USER = json.loads(
    """{"name": "Me", "email": "me@example.org", "avatarColor": "red", "profileImagePath": ""}"""
)
USER |= {"id": ME, "profileChangedAt": TIME}
ADMIN = USER | json.loads("""{"deletedAt": null, "isAdmin": false, "license": null, "oauthId": "",
"quotaSizeInBytes": null, "quotaUsageInBytes": null, "shouldChangePassword": false, "status": "active",
"storageLabel": null}""")
ADMIN |= {"clusterGroupId": ME, "createdAt": TIME, "updatedAt": TIME}
ALBUM = json.loads("""{"albumThumbnailAssetId": null, "description": "", "hasSharedLink": false, "shared": false,
"isActivityEnabled": true}""")
ALBUM |= {"albumUsers": [{"user": USER, "role": "owner"}], "createdAt": TIME, "updatedAt": TIME}
"""Fields without which strict clients refuse an answer."""


@dataclass
class Photo:
    """A photo or video. ``tags`` has the ids of its tags, and ``picture`` is ``None`` until there is a preview."""

    id: str
    picture: bytes | None
    name: str = "photo.jpg"
    owner: str = ME
    kind: str = "IMAGE"
    visibility: str = "timeline"
    trashed: bool = False
    external: bool = False
    original: bytes | None = None
    created: datetime = START
    updated: datetime = START
    look: str = "AAAA"
    tags: set = field(default_factory=set)


class Refused(Exception):
    """A request that the server refuses, with its status and its message."""


@dataclass
class Library:
    """The state of a server. ``requests`` are those it got, ``writes`` those that changed something.

    ``faults`` are (pattern, what): a status, ``html``, ``before`` or ``after`` (the connection is dropped before or
    after the request is obeyed), or a function that is called before. Each counts once, unless ``lasting`` is true.
    """

    version: tuple = STRUCTURED
    photos: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)
    albums: dict = field(default_factory=dict)
    permissions: tuple = ALL
    most: int = 7
    faults: list = field(default_factory=list)
    lasting: bool = False
    requests: list = field(default_factory=list)
    writes: list = field(default_factory=list)
    exchanges: list | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    ticks: int = 0

    def now(self):
        """Return a time later than all before."""
        self.ticks += 1
        return START + timedelta(seconds=self.ticks)

    def add(self, picture, **more):
        """Add a photo, and return its id."""
        number = str(uuid.UUID(int=(4 << 96) + self.ticks, version=4))
        now = self.now()
        more = {"created": now, "updated": now, "look": f"look-{self.ticks}"} | more
        self.photos[number] = Photo(number, picture, **more)
        return number

    def edit(self, number, picture):
        """Change the picture of a photo, as its owner can. Its original is kept."""
        photo = self.photos[number]
        photo.original = photo.original or photo.picture
        photo.picture, photo.updated = picture, self.now()
        photo.look = f"look-{self.ticks}"

    def tag(self, path):
        """Return the id of a tag, which is created with its parents if there is none."""
        names = path.split("/")
        for size in range(1, len(names) + 1):
            if (own := "/".join(names[:size])) not in self.tags.values():
                self.ticks += 1
                self.tags[str(uuid.UUID(int=(5 << 96) + self.ticks, version=4))] = own
        return next(number for number, own in self.tags.items() if own == path)

    def put(self, number, path):
        """Put a tag on a photo, as its owner does."""
        self._change(self.photos[number], self.tag(path), present=True)

    def take(self, number, path):
        """Take a tag off a photo, as its owner does."""
        self._change(self.photos[number], self.tag(path), present=False)

    def _change(self, photo, tag, *, present):
        (photo.tags.add if present else photo.tags.discard)(tag)
        photo.updated = self.now()

    def paths(self, number):
        """Return the paths of the tags of a photo."""
        return {self.tags[tag] for tag in self.photos[number].tags}

    def metadata_run(self):
        """Read the files again: a read-only library never got its tags."""
        for photo in self.photos.values():
            if photo.external and photo.tags:
                photo.tags.clear()
                photo.updated = self.now()

    def answer(self, method, path, body):
        """Return the JSON, the bytes or nothing that answers a request of the owner."""
        for pattern, permission, function in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                if (
                    permission
                    and permission not in self.permissions
                    and "all" not in self.permissions
                ):
                    raise Refused(403, f"Missing required permission: {permission}")
                return function(self, body, *match.groups())
        raise Refused(404, f"Cannot {method} {path}")

    def search(self, body):
        """Answer a search."""
        size = body.get("size", 250)
        if type(size) is not int or not 1 <= size <= 1000:
            raise Refused(400, ["size must be an integer from 1 to 1000"])
        if self.version >= (3, 2) and body.keys() & {"filter", "cursor", "orderBy"}:
            start, chosen = self._structured(body)
        elif self.version >= (4, 0):
            raise Refused(400, ["filter is required"])
        else:
            start, chosen = self._flat(body, size)
        size = min(size, self.most)
        items = chosen[start : start + size]
        end = start + size if start + size < len(chosen) else None
        structured = "filter" in body and self.version >= (3, 2)
        cursor = base64.b64encode(f"from {end}".encode()).decode()
        page = str(end // size + 1) if end is not None else None
        found = {
            "items": [self.shown(photo) for photo in items],
            "count": len(items),
            "total": len(items),
            "facets": [],
            "nextPage": None if structured else page,
            "nextCursor": cursor if structured and end is not None else None,
        }
        return {"albums": {"items": [], "count": 0, "total": 0, "facets": []}, "assets": found}

    def _flat(self, body, size):
        page = body.get("page", 1)
        if type(page) is not int or page < 1:
            raise Refused(400, ["page must be an integer number"])
        usual = ("timeline",) if self.version < (3, 0) else ("timeline", "archive", "hidden")
        wanted = (body["visibility"],) if "visibility" in body else usual
        chosen = [
            photo
            for photo in self._members(
                body.get("tagIds"), body.get("albumIds"), body.get("updatedAfter")
            )
            if photo.visibility in wanted and body.get("type") in (None, photo.kind)
        ]
        chosen = [photo for photo in chosen if body.get("withDeleted") or not photo.trashed]
        return (page - 1) * min(size, self.most), chosen

    def _structured(self, body):
        allowed = {"size", "filter", "cursor", "orderBy"}
        conditions = body.get("filter", {})
        fields = {"type", "visibility", "tagIds", "albumIds", "updatedAt", "trashedAt"}
        if body.keys() - allowed or conditions.keys() - fields:
            raise Refused(400, ["Unrecognized key"])
        if "filter" in body and not all([conditions, *conditions.values()]):
            raise Refused(400, ["filter: must not be empty"])
        if not all(
            value
            for one in conditions.values()
            for value in one.values()
            if isinstance(value, list)
        ):
            raise Refused(400, ["filter: must not be an empty list"])
        start = 0
        if "cursor" in body:
            start = int(base64.b64decode(body["cursor"]).removeprefix(b"from "))
        visibilities = conditions.get("visibility", {}).get("in", ["timeline", "archive", "hidden"])
        tags, albums = (conditions.get(name, {}).get("any") for name in ("tagIds", "albumIds"))
        chosen = [
            photo
            for photo in self._members(tags, albums, conditions.get("updatedAt", {}).get("gte"))
            if photo.visibility in visibilities
            and photo.kind in conditions.get("type", {}).get("in", [photo.kind])
        ]
        return start, [
            photo for photo in chosen if "trashedAt" not in conditions or not photo.trashed
        ]

    def _members(self, tags, albums, since):
        """Return photos that have one of the tags and are in one of the albums, newest first. Locked ones never."""
        if since is not None and not since.endswith("Z"):
            raise Refused(400, ["updatedAfter must be a valid ISO 8601 date string"])
        if not {*(tags or ())} <= self.tags.keys():
            raise Refused(400, "Not found or no tag.read access")
        after = START - timedelta(days=9999) if since is None else datetime.fromisoformat(since)
        inside = (
            None
            if albums is None
            else {number for album in albums for number in self.albums[album][1]}
        )
        return [
            photo
            for photo in reversed(self.photos.values())
            if photo.visibility != "locked"
            and photo.updated >= after
            and (tags is None or photo.tags & {*tags})
            and (inside is None or photo.id in inside)
        ]

    def shown(self, photo):
        """Return a photo as JSON."""
        time = stamp(photo.created)
        times = ("createdAt", "fileCreatedAt", "fileModifiedAt", "localDateTime")
        return (
            PHOTO
            | dict.fromkeys(times, time)
            | {
                "id": photo.id,
                "ownerId": photo.owner,
                "type": photo.kind,
                "visibility": photo.visibility,
                "isTrashed": photo.trashed,
                "isArchived": photo.visibility == "archive",
                "isEdited": photo.original is not None,
                "thumbhash": photo.look,
                "updatedAt": stamp(photo.updated),
                "originalFileName": photo.name,
                "libraryId": PARTNER if photo.external else None,
            }
        )

    def owned(self, number):
        """Return a photo of the owner that is not locked."""
        photo = self.photos.get(number)
        if photo is None or photo.owner != ME or photo.visibility == "locked":
            raise Refused(400, "Not found or no asset.read access")
        return photo

    def thumbnail(self, _, number, query):
        """Return a preview."""
        photo = self.owned(number)
        picture = photo.picture if "edited=true" in query else photo.original or photo.picture
        if picture is None or "size=preview" not in query:
            raise Refused(404, "Asset media not found")
        return picture

    def tagged(self, body, tag, *, present):
        """Put a tag on photos or take it off, and say for each what happened."""
        if tag not in self.tags:
            raise Refused(400, "Not found or no tag.read access")
        answers = []
        for number in body.get("ids", ()):
            photo = self.photos.get(number)
            error = None
            if photo is None or photo.owner != ME or photo.visibility == "locked":
                error = "no_permission"
            elif (tag in photo.tags) == present:
                error = "duplicate" if present else "not_found"
            else:
                self._change(photo, tag, present=present)
                self.writes.append((present, number, self.tags[tag]))
            answers.append(
                {"id": number, "success": error is None} | ({"error": error} if error else {})
            )
        return answers

    def delete_tag(self, _, tag):
        """Delete a tag and those below it, also from photos."""
        path = self.tags[tag]
        for number in [
            number for number, own in self.tags.items() if f"{own}/".startswith(f"{path}/")
        ]:
            self.writes.append((False, None, self.tags.pop(number)))
            for photo in self.photos.values():
                photo.tags.discard(number)

    def shown_tags(self, paths):
        """Return tags as JSON."""
        by_path = {path: number for number, path in self.tags.items()}
        shown = []
        for path in paths:
            above, slash, name = path.rpartition("/")
            tag = {"id": by_path[path], "name": name, "value": path}
            tag |= {"parentId": by_path[above]} if slash else {}
            shown.append(tag | {"createdAt": TIME, "updatedAt": TIME})
        return shown

    def make_tags(self, body):
        """Create tags that do not exist."""
        for path in body["tags"]:
            if path not in self.tags.values():
                self.writes.append((True, None, path))
            self.tag(path)
        return self.shown_tags(body["tags"])

    def shown_albums(self, _):
        """Return the albums as JSON, without their photos."""
        return [
            ALBUM | {"id": number, "albumName": name, "assetCount": len(members)}
            for number, (name, members) in self.albums.items()
        ]

    def shown_key(self, _):
        """Return the API key as JSON."""
        times = {"createdAt": TIME, "updatedAt": TIME}
        return times | {"id": PARTNER, "name": "key", "permissions": [*self.permissions]}

    def shown_version(self, _):
        """Return the version as JSON."""
        return dict(zip(("major", "minor", "patch"), self.version, strict=True)) | {
            "prerelease": None
        }


OPEN = ("GET /api/server/ping", "GET /api/server/version", "GET /.well-known/immich")
ROUTES = (
    (r"GET /\.well-known/immich", None, lambda library, _: {"api": {"endpoint": "/api"}}),
    (r"GET /api/server/ping", None, lambda library, _: {"res": "pong"}),
    (r"GET /api/server/version", None, Library.shown_version),
    (r"GET /api/api-keys/me", None, Library.shown_key),
    (r"GET /api/users/me", "user.read", lambda library, _: ADMIN),
    (
        r"GET /api/tags",
        "tag.read",
        lambda library, _: library.shown_tags(sorted(library.tags.values())),
    ),
    (r"PUT /api/tags", "tag.create", Library.make_tags),
    (r"DELETE /api/tags/([^/]+)", "tag.delete", Library.delete_tag),
    (
        r"PUT /api/tags/([^/]+)/assets",
        "tag.asset",
        lambda *asked: Library.tagged(*asked, present=True),
    ),
    (
        r"DELETE /api/tags/([^/]+)/assets",
        "tag.asset",
        lambda *asked: Library.tagged(*asked, present=False),
    ),
    (r"GET /api/albums", "album.read", Library.shown_albums),
    (r"POST /api/search/metadata", "asset.read", Library.search),
    (
        r"GET /api/assets/([^/?]+)",
        "asset.read",
        lambda library, _, number: library.shown(library.owned(number)),
    ),
    (r"GET /api/assets/([^/?]+)/thumbnail\?(.*)", "asset.view", Library.thumbnail),
)


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece

    def _obey(self):
        library = self.server.library
        asked = f"{self.command} {self.path}"
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        typed = self.headers.get("content-type", "").startswith("application/json")
        body = json.loads(content) if typed and content else {}
        with library.lock:
            library.requests.append(asked)
            fault = next(
                (fault for fault in library.faults if re.match(fault[0], asked)), (None, None)
            )
            if fault[1] is not None and not library.lasting:
                library.faults.remove(fault)
        what = fault[1]() if callable(fault[1]) else fault[1]
        if what == "before":
            self.close_connection = True
            return
        try:
            if type(what) is int:
                raise Refused(what, "Failed on purpose")
            if asked not in OPEN and self.headers.get("x-api-key") != KEY:
                raise Refused(401, "Invalid API key")
            with library.lock:
                answer = (
                    b"<html>Log in</html>"
                    if what == "html"
                    else library.answer(self.command, self.path, body)
                )
            if library.exchanges is not None and not isinstance(answer, bytes):
                library.exchanges.append((self.command, self.path, body, answer))
            if what == "after":
                self.close_connection = True
                return
            kind = "text/html" if what == "html" else "image/jpeg"
            self._send(200, answer, kind)
        except Refused as error:
            status, message = error.args
            self._send(
                status, {"message": message, "statusCode": status, "correlationId": "c0ffee"}, ""
            )

    def _send(self, status, answer, kind):
        if not isinstance(answer, bytes):
            kind = "application/json; charset=utf-8"
            answer = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status if answer else 204)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_DELETE = _obey

    def log_message(self, *_):
        """Print nothing."""


def serving(library):
    """Serve a library, and return its address as a context."""
    return answering(Handler, library=library)


def holding(shared, classes, each, tagged=0, tag="Pets/{}", **more):
    """Return a library with photos of Caltech classes, some of them tagged, and the class of each photo."""
    library, truth = Library(**more), {}
    for name in classes:
        files = sorted((shared / "data/caltech101/101_ObjectCategories" / name).glob("*.jpg"))
        for position, file in enumerate(files[:each]):
            number = library.add(file.read_bytes(), name=file.name)
            truth[number] = name
            if position < tagged:
                library.put(number, tag.format(name))
    return library, truth
