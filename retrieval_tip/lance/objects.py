"""Read and write objects on a local disk, in an S3 bucket or in a GCS bucket with obstore.

Processes that share a store rely on two guarantees. An object is always read and written as a whole. If several
processes *create* the same object, exactly one process succeeds.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import urlsplit

from retrieval_tip.errors import StoreError, UsageError, install, one_line
from retrieval_tip.files import make_folders, sync
from retrieval_tip.lance.address import PATIENCE, Address, Patience, set_credentials, storage_options

if TYPE_CHECKING:
    from obstore.store import ClientConfig, GCSStore, LocalStore, RetryConfig, S3Config, S3Store

    Client = GCSStore | LocalStore | S3Store

T = TypeVar("T")

PATIENT_BYTES, PATIENT_SECONDS = 1 << 20, 120
"""Size in bytes above which an upload has a longer timeout, and this timeout in seconds."""

_NAME = re.compile(r"[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]*(/[A-Za-z0-9_=+@-][A-Za-z0-9._=+@-]*)*")


class Objects:
    """The objects of a store. Names are relative to its address, and no part of a name may begin with a dot.

    No request is sent until a method is called. Raises UsageError if obstore is not installed. Methods raise
    StoreError if a name is invalid, if the disk or the service rejects the request, or if the service is unreachable.
    """

    def __init__(self, place: Address, patience: Patience = PATIENCE) -> None:
        self.address, self._root, self._patience = place, place.local, patience
        try:
            import obstore  # noqa: F401 - only checks that obstore is installed
        except ImportError:
            raise UsageError(
                f"{one_line(str(place))}: obstore is not installed; run {install('distributed')}"
            ) from None
        self._bucket = None if self._root is not None else self._connected(patience.answer)

    def get(self, name: str, most: int | None = None) -> bytes:
        """Read an object.

        Raises FileNotFoundError if the object is missing, and StoreError if it has more than ``most`` bytes.
        """
        import obstore

        def read(client: Client) -> bytes:
            if self._root is not None and not (self._root / name).is_file():  # reading from a pipe would block
                raise FileNotFoundError(name)
            result = obstore.get(client, name)
            if most is not None and result.meta["size"] > most:
                shown, size = one_line(f"{self.address}/{name}"), result.meta["size"]
                raise StoreError(f"{shown}: has {size:,} bytes, but at most {most:,} are expected; is it another file?")
            return bytes(result.bytes())

        return self._asked("read", self._checked(name), read)

    def put(self, name: str, data: bytes) -> None:
        """Write or overwrite an object. Readers get either the complete old object or the complete new object."""
        self._put(name, data, "overwrite")

    def create(self, name: str, data: bytes) -> bool:
        """Write a new object, or return ``False`` if the object already exists.

        If several processes create the same object, at most one process gets ``True``. A server may store an object and
        then fail to acknowledge it. After ``False`` or a StoreError, check whether the object contains your data.
        """
        return self._put(name, data, "create")

    def names(self, folder: str = "") -> list[str]:
        """Return the sorted names of the objects in a folder, excluding subfolders."""
        return list(self.sizes(folder))

    def sizes(self, folder: str = "", age: timedelta = timedelta()) -> dict[str, int]:
        """Return a mapping from the names of the objects in a folder to their sizes in bytes. See :meth:`names`.

        Objects that were written less than ``age`` ago, by the clock of this machine, are left out.
        """
        import obstore

        def listed(client: Client) -> dict[str, int]:
            objects, last = obstore.list_with_delimiter(client, folder or None)["objects"], datetime.now(UTC) - age
            return {entry["path"]: entry["size"] for entry in objects if not age or entry["last_modified"] <= last}

        before = f"{self._checked(folder)}/" if folder else ""
        try:
            sizes = self._asked("listed", folder, listed)
        except FileNotFoundError:
            return {}
        return {name: sizes[name] for name in sorted(sizes) if name.startswith(before) and _NAME.fullmatch(name)}

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. Missing objects are ignored."""
        import obstore

        checked = [self._checked(name) for name in names]
        # On a local disk and in GCS, deletion stops at the first missing object. S3 ignores missing objects.
        for part in ([checked] if self.address.scheme == "s3" else [[name] for name in checked]) if checked else ():
            with suppress(FileNotFoundError):
                self._asked("removed", part[0], functools.partial(obstore.delete, paths=part))

    def _put(self, name: str, data: bytes, mode: Literal["create", "overwrite"]) -> bool:
        """Write an object. Return ``False`` if it should be created but already exists."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put(client: Client) -> bool:
            try:
                if self._root is not None:
                    self._flushed(client, self._root, name, data, mode == "create")
                else:
                    client = client if len(data) <= PATIENT_BYTES else self._connected(PATIENT_SECONDS)
                    obstore.put(client, name, data, mode=mode)
            except (AlreadyExistsError, PreconditionError) as error:
                if _is_bucket_missing(str(error)):
                    raise
                return False
            return True

        return self._asked("written", self._checked(name), put)

    def _flushed(self, client: Client, root: Path, name: str, data: bytes, create: bool) -> None:
        """Write a file on disk. The data is flushed before the file gets its name, and the folders afterwards."""
        import obstore

        path = root / name
        staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp").relative_to(root).as_posix()
        try:
            obstore.put(client, staged, data)
            flush(root / staged)
            if create:
                obstore.copy(client, staged, name, overwrite=False)  # a hard link, which fails if the name exists
            else:
                obstore.rename(client, staged, name)
        finally:
            (root / staged).unlink(missing_ok=True)
        for folder in (path.parent, root, root.parent):
            sync(folder)

    def _checked(self, name: str) -> str:
        """Return ``name`` if it is valid. A name from an untrusted file must not lead out of the store."""
        if not _NAME.fullmatch(name):
            raise StoreError(f"{one_line(str(self.address))}: {one_line(name[:200])!r} is not a valid object name")
        return name

    def _connected(self, seconds: float) -> S3Store | GCSStore:
        from obstore.exceptions import BaseError
        from obstore.store import GCSStore, S3Store

        own, options = self.address, storage_options(self.address, self._patience)
        client: ClientConfig = {
            "connect_timeout": timedelta(seconds=self._patience.connect),
            "read_timeout": timedelta(seconds=seconds),
            "timeout": timedelta(minutes=10),
            "allow_http": options["allow_http"] == "true",  # set here, because options override the environment
        }
        retry: RetryConfig = {
            "max_retries": self._patience.retries,
            "retry_timeout": timedelta(seconds=self._patience.retry),
        }
        config: S3Config = {}
        if "aws_endpoint" in options:
            config["endpoint"] = options["aws_endpoint"]
        if "aws_region" in options:
            config["region"] = options["aws_region"]
        try:
            if own.scheme == "gs":
                return GCSStore(own.bucket, prefix=own.path, client_options=client, retry_config=retry)
            return S3Store(own.bucket, prefix=own.path, config=config, client_options=client, retry_config=retry)
        except (BaseError, ValueError, OSError) as error:  # for example, a damaged credentials file
            raise self._explained("connected to", "", error) from None

    def _asked(self, what: str, name: str, ask: Callable[[Client], T]) -> T:
        """Call ``ask`` with a client, and convert client errors to StoreError or FileNotFoundError."""
        from obstore.exceptions import BaseError
        from obstore.store import LocalStore

        if os.getpid() != _first_process():
            place = one_line(str(self.address))
            raise StoreError(f"{place}: this process was forked after using a store; use spawn")
        try:
            if self._root is not None and what == "written":
                make_folders(self._root)
            return ask(LocalStore(self._root) if self._bucket is None else self._bucket)
        except StoreError:
            raise
        except (BaseError, ValueError, OSError) as error:
            asked = what in ("read", "removed") or (what == "listed" and self._root is not None)
            if asked and self._is_missing(error):
                missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.address}/{name}")
                raise missing from None
            raise self._explained(what, name, error) from None

    def _is_missing(self, error: Exception) -> bool:
        if self._root is not None:
            return isinstance(error, FileNotFoundError) or _errno(error) in (errno.ENOENT, errno.ENOTDIR)
        return isinstance(error, FileNotFoundError) and not _is_bucket_missing(str(error))

    def _explained(self, what: str, name: str, error: Exception) -> StoreError:
        """Convert an error to a one-line StoreError that cannot contain an access key, unlike the original text."""
        text, scheme = str(error), self.address.scheme

        def found(pattern: str) -> str:
            return (re.search(pattern, text) or ("", ""))[1]

        code, status = found(r"<Code>(\w{1,64})</Code>"), found(r"status code: (\d{3})")
        said, url = code or f"status {status}", found(r"Error performing [A-Z]+ (\S+)")
        if self._root is not None and (number := _errno(error)):
            why = f"cannot be {what}: {os.strerror(number)}"
            if "UnableToCopyFile" in text and number in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
                why = f"cannot be {what}: the file system has no hard links, which a commit needs; use another disk"
        elif _is_bucket_missing(text):
            why = f"no such bucket; create {self.address.bucket}, or give another address"
        elif re.search(r"^https?://[^/]+/(latest/(api/token|meta-data)|computeMetadata)\b", url) or (
            not url and re.search(r"Missing ?(AccessKeyId|SecretAccessKey)|service account|credential", text, re.I)
        ):
            why = f"no credentials; {set_credentials(scheme)}"
        elif (
            "Redirect" in code or code == "AuthorizationHeaderMalformed" or status[:1] == "3" or "BareRedirect" in text
        ):
            why = "the bucket is in another region; set AWS_REGION to its own"
        elif status in ("401", "403") or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            why = f"access denied ({said}); {set_credentials(scheme)}, for an account with access"
        elif status:
            why = f"the service answered {said}; try later, or ask its operator"
        elif url:
            silent = "kind: Timeout" in text or "TimedOut" in text
            why = "no answer from" if silent else "cannot connect to"
            why += (
                f" {urlsplit(url).netloc.rpartition('@')[2]}; is it the right server (AWS_ENDPOINT_URL), and running?"
            )
        else:
            line = text.partition("\n")[0].partition("<")[0].strip() or type(error).__name__
            why = re.sub(r"//[^/\s]*@", "//", line)[:200]
        return StoreError(one_line(f"{self.address}{'/' if name else ''}{name}: {why}"))


@functools.cache
def _first_process() -> int:
    """Return the id of the process that runs obstore's threads, which a forked process does not have."""
    return os.getpid()


def flush(file: Path) -> None:
    """Flush a file to disk. Raises OSError if this fails."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = re.search(r"\bcode: (\d+)", str(error))
    return int(match[1]) if match else None


def _is_bucket_missing(text: str) -> bool:
    return "<Code>NoSuchBucket</Code>" in text or "bucket does not exist" in text
