"""Objects below one address: on a local disk, in an S3 bucket or in a GCS bucket.

lance://indexes/pets  lance:///data/pets     a local folder, relative or absolute
s3://bucket/prefix    gs://bucket/prefix     what lies below a prefix of a bucket

What several processes need to agree on a store is small: an object is written whole, read whole, and *created*, which
exactly one of those that try it at once can do. Credentials come from the environment and are in no address, message
or option; tables themselves are LanceDB's, which :func:`storage_options` makes agree with this.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from retrieval_tip.errors import StoreError, UsageError, one_line
from retrieval_tip.files import make_folders, real

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, RetryConfig, S3Config, S3Store

T = TypeVar("T")

CONNECT_SECONDS, ANSWER_SECONDS, RETRY_SECONDS, RETRIES = 4, 8, 10, 4
"""How long a server may take to be connected to and to answer; no request is tried again later than that or more often.
One that cannot be reached has failed after ``RETRY_SECONDS + ANSWER_SECONDS``."""
PATIENT_BYTES, PATIENT_SECONDS = 1 << 20, 120
"""An object above this size is sent with that much time for an answer, for sending it takes some of it."""

S3_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
GCS_CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS to the file of a service account"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")

_SCHEME = re.compile(r"(lance|s3|gs)://", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_UNLIKE = re.compile(r'[\\%#*\[\]{}^"<>|`]')
"""What obstore and LanceDB would not both take for the same key."""
_NAME = re.compile(r"[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]*(/[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]*)*")


@dataclass(frozen=True)
class Address:
    """Where a store is. ``str`` gives the one text of it that :meth:`parse` reads, and holds no credential.

    ``scheme`` is ``lance``, ``s3`` or ``gs``; ``bucket`` is empty where it is a local folder; ``path`` is the folder or
    the prefix.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Address | None:
        """The address that a text is; ``None`` where it is none, but may be a folder's path.

        Raises UsageError: it begins as an address, but has no bucket or no path, holds a password, a query, control
        characters or what is no UTF-8, leads out of its bucket by ``..``, or has characters that clients of buckets
        do not agree about.
        """
        found = _SCHEME.match(text)
        if found is None:
            return None
        scheme, rest = found[1].lower(), text[found.end() :]
        first = rest.partition("/")[0]
        local = scheme == "lance"
        if ("@" in first) if not local else (":" in first and "@" in first) or re.search(r"^[^/@]*:[^@]*@", rest):
            raise UsageError(f"{scheme}://...: an address holds no user and password; {_set_credentials(scheme)}")
        if not local and ":" in first:  # a port, or a password with a slash in it: nothing of it is repeated
            raise UsageError(f"{scheme}://...: an address begins with a bucket's name; a server is AWS_ENDPOINT_URL")
        rest, query, _ = rest.partition("?")
        shown = one_line(f"{scheme}://{rest}")
        if query:
            raise UsageError(f"{shown}?...: an address has no query; settings come from the environment")
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in rest):
            raise UsageError(f"{shown}: control characters, or not UTF-8, in an address")
        return cls._folder(rest, shown) if local else cls._prefix(scheme, rest, shown)

    @classmethod
    def _folder(cls, rest: str, shown: str) -> Address:
        path = Path(re.sub(r"^/+", "/", rest)).as_posix()
        if not rest or Path(path).name in ("", ".."):
            raise UsageError(f"{shown}: no path; an address is lance://indexes/NAME, or lance:///NAME from the root")
        return cls("lance", "", path)

    @classmethod
    def _prefix(cls, scheme: str, rest: str, shown: str) -> Address:
        bucket, _, prefix = rest.partition("/")
        parts = [part for part in prefix.split("/") if part]
        form = f"an address is {scheme}://BUCKET/NAME"
        if not bucket:
            raise UsageError(f"{shown}: no bucket; {form}")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"{shown}: {one_line(bucket)!r} is no bucket's name; {form}")
        if not parts:
            raise UsageError(f"{shown}: no path, and a store is no whole bucket; {form}")
        if "." in parts or ".." in parts:
            raise UsageError(f"{shown}: '.' or '..' in an address of a bucket; give the path itself")
        if unlike := _UNLIKE.search(prefix):
            raise UsageError(f"{shown}: {unlike[0]!r} in an address, which not all programs read alike; leave it out")
        return cls(scheme, bucket, "/".join(parts))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{'/' if self.bucket else ''}{self.path}"

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def local(self) -> Path | None:
        """The folder; ``None`` for a bucket."""
        return None if self.bucket else Path(self.path)

    @property
    def uri(self) -> str:
        """What ``lancedb.connect`` takes: a local path, which is absolute, or the address itself."""
        if self.local is None:
            return str(self)
        return str(real(self.local) if ".." in self.local.parts else self.local.absolute())


class Objects(ABC):
    """The objects below one address. A name is relative, with ``/`` between its parts, none of which begins with a dot.

    Every method raises StoreError where the disk or the service refuses, cannot be reached or cannot be understood, and
    for a name that no object can have.
    """

    def __init__(self, address: Address) -> None:
        self.address = address

    @staticmethod
    def at(address: Address) -> Objects:
        """The objects below an address; nothing is read yet, and it need not exist.

        Raises UsageError where obstore is needed and not installed, StoreError for an environment that cannot be used.
        """
        return _Folder(address) if address.local is not None else _Bucket(address)

    @abstractmethod
    def get(self, name: str, most: int | None = None) -> bytes:
        """All of an object. Raises FileNotFoundError; StoreError too where it has more than ``most`` bytes."""

    @abstractmethod
    def put(self, name: str, data: bytes) -> None:
        """Write an object in place of the one that is there; a reader gets one of them whole."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write an object that is not there; ``False`` where it is. Of many who try at once one is told ``True``.

        At most one: a server may have kept what it then failed to acknowledge, so one that is told ``False``, or gets
        a StoreError, and can tell its own data from those of all others, should look whether it lies there.
        """

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of the objects in a folder, sorted, without those in its folders; none where it is not there."""

    @abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are gone already do not matter."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of an object. Raises FileNotFoundError."""

    def _checked(self, name: str) -> str:
        """A name may come from a file that somebody else wrote, and must not lead out of the address."""
        if not _NAME.fullmatch(name):
            raise StoreError(f"{one_line(str(self.address))}: {one_line(name[:200])!r} can be no object's name")
        return name

    def _too_large(self, name: str, size: int, most: int) -> StoreError:
        shown = one_line(f"{self.address}/{name}")
        return StoreError(f"{shown}: {size:,} bytes, which nothing here writes (at most {most:,}); is it another file?")

    def _missing(self, name: str) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.address}/{name}")


class _Folder(Objects):
    """Files, flushed to disk before they get their name, and so does the name before it is told."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        assert address.local is not None
        self._root = address.local

    def get(self, name: str, most: int | None = None) -> bytes:
        with self._reading(name) as path:
            size = self._size(path)
            if most is None:
                return path.read_bytes()
            with path.open("rb") as file:
                data = file.read(most + 1)
        if len(data) > most:
            raise self._too_large(name, max(size, len(data)), most)
        return data

    def size(self, name: str) -> int:
        with self._reading(name) as path:
            return self._size(path)

    def put(self, name: str, data: bytes) -> None:
        with self._written(name, data) as (temporary, path):
            temporary.replace(path)

    def create(self, name: str, data: bytes) -> bool:
        try:
            with self._written(name, data) as (temporary, path):
                os.link(temporary, path)  # unlike a rename it fails where there is one
        except FileExistsError:
            return False
        return True

    def names(self, folder: str = "") -> list[str]:
        before = f"{self._checked(folder)}/" if folder else ""
        try:
            with os.scandir(self._root / folder) as entries:
                found = [before + entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failed(folder, "listed", error) from None
        return sorted(name for name in found if _NAME.fullmatch(name))

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                (self._root / self._checked(name)).unlink(missing_ok=True)
            except NotADirectoryError:
                pass
            except OSError as error:
                raise self._failed(name, "removed", error) from None

    @staticmethod
    def _size(path: Path) -> int:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a folder is no object, and a pipe would be waited for
            raise FileNotFoundError
        return found.st_size

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        try:
            yield self._root / self._checked(name)
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None
        except OSError as error:
            raise self._failed(name, "read", error) from None

    @contextmanager
    def _written(self, name: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """A temporary file with the data, and the path that it is to get. FileExistsError is let through."""
        path = self._root / self._checked(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            made = [folder for folder in path.parents if not folder.exists()]
            try:
                make_folders(path.parent)
            except FileExistsError as error:
                raise NotADirectoryError(
                    error.errno, "a file lies where a folder has to be", str(path.parent)
                ) from None
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary, path
            finally:
                temporary.unlink(missing_ok=True)
            for folder in (path.parent, *(folder.parent for folder in made)):
                sync(folder)
        except FileExistsError:
            raise
        except OSError as error:
            raise self._failed(name, "written", error) from None

    def _failed(self, name: str, what: str, error: OSError) -> StoreError:
        reason = error.strerror or type(error).__name__
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP) and error.filename2 is not None:
            reason = "the file system has no hard links, which a commit needs; use another disk"
        return StoreError(f"{one_line(f'{self.address}/{name}')}: cannot be {what}: {reason}")


def sync(folder: Path) -> None:
    """Flush a folder's entries, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Bucket(Objects):
    """Objects of a service, by obstore."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        try:
            import obstore  # noqa: F401 - only whether it is there
        except ImportError:
            raise UsageError(f"{one_line(str(address))}: needs pip install 'retrieval-tip[distributed]'") from None
        self._store = self._connected(ANSWER_SECONDS)

    def get(self, name: str, most: int | None = None) -> bytes:
        import obstore

        def read() -> bytes:
            found = obstore.get(self._store, name)
            size = found.meta["size"]
            if most is not None and size > most:
                raise self._too_large(name, size, most)
            return bytes(found.bytes())

        return self._asked(self._checked(name), read)

    def size(self, name: str) -> int:
        import obstore

        def head() -> int:
            with suppress(FileNotFoundError):
                return obstore.head(self._store, name)["size"]
            return obstore.get(self._store, name).meta["size"]  # a head's answer does not say whether it is the bucket

        return self._asked(self._checked(name), head)

    def put(self, name: str, data: bytes) -> None:
        import obstore

        self._asked(self._checked(name), lambda: obstore.put(self._for(data), name, data), missing=False)

    def create(self, name: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        def create() -> bool:
            try:
                obstore.put(self._for(data), name, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return self._asked(self._checked(name), create, missing=False)

    def names(self, folder: str = "") -> list[str]:
        import obstore

        before = f"{self._checked(folder)}/" if folder else ""

        def listed() -> list[str]:
            found = obstore.list_with_delimiter(self._store, folder or None)["objects"]
            return sorted(entry["path"] for entry in found)

        names = self._asked(folder, listed, missing=False)
        return [name for name in names if name.startswith(before) and _NAME.fullmatch(name)]

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        checked = [self._checked(name) for name in names]

        def delete() -> None:
            try:
                obstore.delete(self._store, checked)
            except FileNotFoundError as error:  # S3 says nothing of it, GCS does, and leaves the rest
                if _is_bucket_missing(str(error)):
                    raise
                for name in checked:
                    with suppress(FileNotFoundError):
                        obstore.delete(self._store, name)

        if checked:
            self._asked(checked[0], delete, missing=False)

    def _for(self, data: bytes) -> S3Store | GCSStore:
        return self._store if len(data) <= PATIENT_BYTES else self._connected(PATIENT_SECONDS)

    def _connected(self, seconds: int) -> S3Store | GCSStore:
        """A client; that costs no request. What is given here and what LanceDB is given come from one place."""
        from obstore.store import GCSStore, S3Store

        address = self.address
        endpoint, region = _endpoint(address), _first_of(_REGIONS)
        client: ClientConfig = {
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=seconds),
            "timeout": timedelta(minutes=10),
            "allow_http": _allow_http(),  # the environment's is not read where options of the client are given
        }
        retry: RetryConfig = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}

        config: S3Config = {"bucket": address.bucket}
        if endpoint:
            config["endpoint"] = endpoint
        if region:
            config["region"] = region

        def connect() -> S3Store | GCSStore:
            if address.scheme == "gs":
                return GCSStore(address.bucket, prefix=address.path, client_options=client, retry_config=retry)
            return S3Store(config=config, prefix=address.path, client_options=client, retry_config=retry)

        return self._asked("", connect, missing=False)

    def _asked(self, name: str, ask: Callable[[], T], missing: bool = True) -> T:
        """What ``ask`` gives; its errors as ours. ``missing``: whether an object that is not there is the caller's."""
        from obstore.exceptions import BaseError

        try:
            return ask()
        except StoreError:
            raise
        except FileNotFoundError as error:
            if missing and not _is_bucket_missing(str(error)):
                raise self._missing(name) from None
            raise self._explained(name, error) from None
        except (BaseError, ValueError, OSError) as error:
            raise self._explained(name, error) from None

    def _explained(self, name: str, error: Exception) -> StoreError:
        """One line of an error whose text has many, among them what the server said, which may repeat a key's id."""
        text, scheme = str(error), self.address.scheme
        code = (re.search(r"<Code>(\w{1,64})</Code>", text) or ("", ""))[1]
        status = (re.search(r"status code: (\d{3})", text) or ("", ""))[1]
        url = (re.search(r"Error performing [A-Z]+ (\S+)", text) or ("", ""))[1]
        said = code or f"status {status}"
        denied = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or status in ("401", "403")
        unasked = not url and re.search(
            r"Missing ?(AccessKeyId|SecretAccessKey)|service account|credential", text, re.I
        )
        if _is_bucket_missing(text):
            what = f"no such bucket; make {self.address.bucket}, or give another address"
        elif unasked or re.search(r"^https?://[^/]+/(latest/(api/token|meta-data)|computeMetadata)\b", url):
            what = f"no credentials; {_set_credentials(scheme)}"
        elif code in ("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed") or (
            status[:1] == "3" or "BareRedirect" in text
        ):
            what = "the bucket is in another region; set AWS_REGION to its own"
        elif denied:
            what = f"access denied ({said}); {_set_credentials(scheme)}, of an account that may"
        elif url and not status:
            host = urlsplit(url).netloc.rpartition("@")[2]
            if re.search("InvalidCertificate|UnknownIssuer|invalid peer certificate", text):
                what = f"the certificate of {host} is not trusted"
            elif "kind: Timeout" in text or "TimedOut" in text:
                what = f"no answer from {host}"
            else:
                what = f"cannot connect to {host}"
            what += "; is it the right server, and running? " + (
                "It is set by AWS_ENDPOINT_URL, with AWS_ALLOW_HTTP=true for one without TLS"
                if scheme == "s3"
                else "Is there a network?"
            )
        elif status:
            what = f"the service answers {said}; try later, or ask who runs it"
        else:
            line = text.partition("\n")[0].partition("<")[0].strip() or type(error).__name__
            what = re.sub(r"//[^/\s]*@", "//", line)[:200]
        place = f"{self.address}/{name}" if name else str(self.address)
        return StoreError(one_line(f"{place}: {what}"))


def storage_options(address: Address) -> dict[str, str]:
    """What ``lancedb.connect`` has to be given so that it asks the same server as :class:`Objects`, as patiently.

    No credential is among it: those are read from the environment. Empty for a local folder. Raises StoreError where
    the environment's endpoint is none.
    """
    if address.local is not None:
        return {}
    options = {
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "read_timeout": f"{ANSWER_SECONDS}s",
        "client_max_retries": str(RETRIES),
        "client_retry_timeout": str(RETRY_SECONDS),
        "allow_http": str(_allow_http()).lower(),
    }
    if endpoint := _endpoint(address):
        options["aws_endpoint"] = endpoint
    if address.scheme == "s3" and (region := _first_of(_REGIONS)):
        options["aws_region"] = region
    return options


def _endpoint(address: Address) -> str | None:
    """The server that the environment names: both clients know the three variables, but not in one order.

    Raises StoreError where it is no address of one, holds a password, or has no TLS and that is not allowed.
    """
    endpoint = _first_of(_ENDPOINTS) if address.scheme == "s3" else None
    if endpoint is None:
        return None
    variable = next(name for name in _ENDPOINTS if os.environ.get(name))
    place = one_line(str(address))
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc:
        raise StoreError(f"{place}: {variable} is not the address of a server; set it to https://HOST, without a user")
    if parts.scheme == "http" and not _allow_http():
        host = one_line(parts.netloc)
        raise StoreError(f"{place}: {variable} names {host} without TLS; set AWS_ALLOW_HTTP=true if that is meant")
    return endpoint.rstrip("/")


def _first_of(names: Iterable[str]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _allow_http() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "on", "yes", "y")


def _set_credentials(scheme: str) -> str:
    return f"set {GCS_CREDENTIALS if scheme == 'gs' else S3_CREDENTIALS} in the environment"


def _is_bucket_missing(text: str) -> bool:
    return "<Code>NoSuchBucket</Code>" in text or "bucket does not exist" in text
