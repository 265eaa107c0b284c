"""Read and write the files of a store in an S3 bucket or in a GCS bucket with obstore.

If several processes *create* the same object, exactly one process succeeds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

from retrieval_tip.errors import StoreError, UsageError, install, one_line
from retrieval_tip.store.address import Address, set_credentials, storage_options
from retrieval_tip.store.manifest import DataFile

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

PATIENT_BYTES, PATIENT = 1 << 20, "120s"
"""Size in bytes above which an upload has a longer timeout, and this timeout."""
OBJECT_BYTES = 1 << 34
"""Maximum size of an object in bytes. A million classes with 1024 values each take less."""


class BucketFiles:
    """Objects in a bucket. See :class:`files.LocalFiles` for the methods.

    No request is sent until a method is called. Raises UsageError if obstore is not installed. Methods raise StoreError
    if the service rejects the request or cannot be reached.
    """

    def __init__(self, place: Address) -> None:
        self.address = place
        try:
            import obstore  # noqa: F401 - only checks that obstore is installed
        except ImportError:
            raise UsageError(f"{one_line(str(place))}: obstore is not installed; run {install('lance')}") from None
        self._client = self._connected()

    def get(self, name: str, most: int = OBJECT_BYTES) -> bytes:
        import obstore

        with self._asking(name, FileNotFoundError):
            result = obstore.get(self._client, name)
            if result.meta["size"] > most:
                shown, size = one_line(f"{self.address}/{name}"), result.meta["size"]
                raise StoreError(f"{shown}: has {size:,} bytes, but at most {most:,} are expected; is it another file?")
            return bytes(result.bytes())

    def put(self, name: str, *parts: bytes | memoryview) -> None:
        self._put(name, b"".join(parts), "overwrite")

    def create(self, name: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            self._put(name, data, "create", AlreadyExistsError, PreconditionError)
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def _put(self, name: str, data: bytes, mode: Literal["create", "overwrite"], *expected: type[Exception]) -> None:
        import obstore

        client = self._client if len(data) <= PATIENT_BYTES else self._connected(PATIENT)
        with self._asking(name, *expected):
            obstore.put(client, name, data, mode=mode)

    def sizes(self, folder: str, age: timedelta = timedelta()) -> dict[str, int]:
        import obstore

        with self._asking(folder):
            listed = obstore.list_with_delimiter(self._client, folder)["objects"]
        last = datetime.now(UTC) - age
        found = {entry["path"]: entry["size"] for entry in listed if not age or entry["last_modified"] <= last}
        return {name: found[name] for name in sorted(found)}

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        names = list(names)
        # In GCS, deletion stops at the first missing object. S3 ignores missing objects.
        for part in [names] if names and self.address.scheme == "s3" else [[name] for name in names]:
            with suppress(FileNotFoundError), self._asking(part[0], FileNotFoundError):
                obstore.delete(self._client, part)

    def flush(self, *folders: str) -> None:
        """Do nothing, because a service keeps what it has acknowledged."""

    def problem(self, file: DataFile, whole: bool = True) -> str | None:
        """The object is read."""
        shown = f"{self.address}/{file.name}"
        try:
            if hashlib.sha256(self.get(file.name)).hexdigest() != file.sha256:
                return f"{shown}: damaged (its SHA-256 does not match the manifest)"
        except FileNotFoundError:
            return f"{shown}: missing" if file.bytes else None
        return None

    def _connected(self, timeout: str | None = None) -> ObjectStore:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        options = storage_options(self.address)
        client: ClientConfig = {
            "connect_timeout": options["connect_timeout"],
            "read_timeout": timeout or options["read_timeout"],
            "timeout": "600s",
            "allow_http": options["allow_http"] == "true",  # set here, because options override the environment
        }
        retry: RetryConfig = {
            "max_retries": int(options["client_max_retries"]),
            "retry_timeout": timedelta(seconds=int(options["client_retry_timeout"])),
        }
        config = cast("S3Config", {name: value for name, value in options.items() if name.startswith("aws_")})
        try:
            return from_url(str(self.address), config=config, client_options=client, retry_config=retry)
        except (BaseError, ValueError, OSError) as error:  # for example, a damaged credentials file
            raise self._explained("", error) from None

    @contextmanager
    def _asking(self, name: str, *expected: type[Exception]) -> Iterator[None]:
        """Convert errors of the client to StoreError, except ``expected`` ones about the object."""
        from obstore.exceptions import BaseError

        check_process(self.address)
        try:
            yield
        except (BaseError, ValueError, OSError) as error:
            if isinstance(error, expected) and _code(error) != "NoSuchBucket":
                raise
            raise self._explained(name, error) from None

    def _explained(self, name: str, error: Exception) -> StoreError:
        """Convert an error to a one-line StoreError that cannot contain an access key, unlike the original text."""
        text, scheme, code = str(error), self.address.scheme, _code(error)
        status, url = _found(r"status code: (\d{3})", text), _found(r"Error performing [A-Z]+ (\S+)", text)
        said, account = code or f"status {status}", set_credentials(scheme)
        if code == "NoSuchBucket":
            why = f"no such bucket; create {self.address.bucket}, or give another address"
        elif re.search(r"^https?://[^/]+/(latest/(api/token|meta-data)|computeMetadata)\b", url) or (
            not url and re.search(r"Missing ?(AccessKeyId|SecretAccessKey)|service account|credential", text, re.I)
        ):
            why = f"no credentials; {account}"
        elif "Redirect" in code or code == "AuthorizationHeaderMalformed" or "redirect without LOCATION" in text:
            why = "the bucket is in another region; set AWS_REGION to its own"
        elif status in ("401", "403"):  # the client has an exception for this, but does not raise it when it lists
            why = f"access denied ({said}); {account}, for an account with access"
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


def check_process(address: Address) -> None:
    """Raise StoreError in a forked process."""
    if os.getpid() != _first_process():
        raise StoreError(f"{one_line(str(address))}: this process was forked after using a store; use spawn")


def _found(pattern: str, text: str) -> str:
    return (re.search(pattern, text) or ("", ""))[1]


def _code(error: Exception) -> str:
    """Return the code in the answer of a service, which says more than the type of the exception."""
    return _found(r"<Code>(\w{1,64})</Code>", str(error))
