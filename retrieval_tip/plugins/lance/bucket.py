"""Objects in a bucket (S3 or GCS, with obstore), and the settings of a connection.

If several processes *create* the same object, exactly one process succeeds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.machine import install
from retrieval_tip.store.address import Address, set_credentials
from retrieval_tip.store.manifest import DataFile
from retrieval_tip.wording import one_line

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

CONNECT, ANSWER, RETRY, RETRIES = 4, 8, 10, 4
"""Timeouts of requests to a server in seconds, and number of retries.

A request to an unreachable server fails after ``RETRY + ANSWER`` seconds.
"""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
PATIENT_BYTES, PATIENT = 1 << 20, "120s"
"""Size in bytes above which an upload has a longer timeout, and this timeout."""
OBJECT_BYTES = 1 << 34
"""Maximum size of an object in bytes. A million classes with 1024 values each take less."""

CLOCK = "clock"
"""Name of an empty object, which is written to ask a service for the time."""

_first_process = functools.cache(
    os.getpid
)  # runs the threads of obstore, which a forked process does not have


class BucketFiles:
    """Objects in a bucket. See :class:`files.StoreFiles` for the methods.

    No request is sent until a method is called. Raises UsageError if obstore is not installed. Methods raise StoreError
    if the service rejects the request or cannot be reached.
    """

    def __init__(self, place: Address) -> None:
        self.address = place
        try:
            import obstore  # noqa: F401 - only checks that obstore is installed
        except ImportError:
            raise UsageError(
                f"{one_line(str(place))}: obstore is not installed; run {install('lance')}"
            ) from None
        self._client = self._connected()

    def get(self, name: str, most: int = OBJECT_BYTES) -> bytes:
        import obstore

        with self._asking(name, FileNotFoundError):
            result = obstore.get(self._client, name)
            if result.meta["size"] > most:
                shown = one_line(f"{self.address}/{name}")
                size = result.meta["size"]
                raise StoreError(
                    f"{shown}: has {size:,} bytes, but at most {most:,} are expected; is it another file?"
                )
            return bytes(result.bytes())

    def put(self, name: str, *chunks: bytes | memoryview) -> None:
        self._put(name, b"".join(chunks), "overwrite")

    def create(self, name: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            self._put(name, data, "create", AlreadyExistsError, PreconditionError)
        except (AlreadyExistsError, PreconditionError):
            return False
        return True

    def _put(
        self,
        name: str,
        data: bytes,
        mode: Literal["create", "overwrite"],
        *expected: type[Exception],
    ) -> None:
        import obstore

        client = self._client if len(data) <= PATIENT_BYTES else self._connected(PATIENT)
        with self._asking(name, *expected):
            obstore.put(client, name, data, mode=mode)

    def sizes(self, folder: str) -> dict[str, int]:
        found = {entry["path"]: entry["size"] for entry in self._listed(folder)}
        return {name: found[name] for name in sorted(found)}

    def old(self, folder: str, age: timedelta) -> set[str]:
        import obstore

        self.put(CLOCK, b"")
        with self._asking(CLOCK):
            last = obstore.head(self._client, CLOCK)["last_modified"] - age
        return {entry["path"] for entry in self._listed(folder) if entry["last_modified"] <= last}

    def _listed(self, folder: str) -> Sequence[ObjectMeta]:
        import obstore

        with self._asking(folder):
            return obstore.list_with_delimiter(self._client, folder)["objects"]

    def delete(self, names: Iterable[str]) -> None:
        import obstore

        every = list(names)
        batches = [[name] for name in every]
        if every and self.address.scheme == "s3":
            batches = [every]  # in GCS, deletion stops at the first missing object
        for batch in batches:
            with suppress(FileNotFoundError), self._asking(batch[0], FileNotFoundError):
                obstore.delete(self._client, batch)

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
            "allow_http": options["allow_http"]
            == "true",  # set here, because options override the environment
        }
        retry: RetryConfig = {
            "max_retries": int(options["client_max_retries"]),
            "retry_timeout": timedelta(seconds=int(options["client_retry_timeout"])),
        }
        config = cast(
            "S3Config", {name: value for name, value in options.items() if name.startswith("aws_")}
        )
        try:
            return from_url(
                str(self.address), config=config, client_options=client, retry_config=retry
            )
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
        text = str(error)
        scheme = self.address.scheme
        code = _code(error)
        status = _found(r"status code: (\d{3})", text)
        url = _found(r"Error performing [A-Z]+ (\S+)", text)
        said = code or f"status {status}"
        account = set_credentials(scheme)
        if code == "NoSuchBucket":
            why = f"no such bucket; create {self.address.bucket}, or give another address"
        elif re.search(
            r"^https?://[^/]+/(latest/(api/token|meta-data)|computeMetadata)\b", url
        ) or (
            not url
            and re.search(
                r"Missing ?(AccessKeyId|SecretAccessKey)|service account|credential", text, re.I
            )
        ):
            why = f"no credentials; {account}"
        elif (
            "Redirect" in code
            or code == "AuthorizationHeaderMalformed"
            or "redirect without LOCATION" in text
        ):
            why = "the bucket is in another region; set AWS_REGION to its own"
        elif status in (
            "401",
            "403",
        ):  # the client has an exception for this, but does not raise it when it lists
            why = f"access denied ({said}); {account}, for an account with access"
        elif status:
            why = f"the service answered {said}; try later, or ask its operator"
        elif url:
            silent = "kind: Timeout" in text or "TimedOut" in text
            why = "no answer from" if silent else "cannot connect to"
            host = urlsplit(url).netloc.rpartition("@")[2]
            why += f" {host}; is it the right server (AWS_ENDPOINT_URL), and running?"
        else:
            line = text.partition("\n")[0].partition("<")[0].strip() or type(error).__name__
            why = re.sub(r"//[^/\s]*@", "//", line)[:200]
        place = f"{self.address}/{name}" if name else self.address
        return StoreError(one_line(f"{place}: {why}"))


def storage_options(address: Address) -> dict[str, str]:
    """Return the options for ``lancedb.connect``, which :class:`BucketFiles` also uses.

    The options contain no credentials, because the clients read credentials from the environment. Raises StoreError if
    the endpoint is invalid.
    """
    if address.local is not None:
        return {}
    options = {
        "connect_timeout": f"{CONNECT}s",
        "read_timeout": f"{ANSWER}s",
        "client_max_retries": str(RETRIES),
        "client_retry_timeout": str(RETRY),
        "allow_http": str(_allow_http()).lower(),
    }
    if address.scheme == "s3":  # obstore and LanceDB prefer different variables
        if variable := _first_set(_ENDPOINTS):
            options["aws_endpoint"] = _endpoint(address, variable)
        if variable := _first_set(_REGIONS):
            options["aws_region"] = os.environ[variable]
    return options


def check_process(address: Address) -> None:
    """Raise StoreError in a forked process."""
    if os.getpid() != _first_process():
        raise StoreError(
            f"{one_line(str(address))}: this process was forked after using a store; use spawn"
        )


def _found(pattern: str, text: str) -> str:
    return (re.search(pattern, text) or ("", ""))[1]


def _code(error: Exception) -> str:
    """Return the code in the answer of a service, which says more than the type of the exception."""
    return _found(r"<Code>(\w{1,64})</Code>", str(error))


def _endpoint(address: Address, variable: str) -> str:
    endpoint = os.environ[variable]
    place = one_line(str(address))
    if not re.fullmatch(r"https?://[^\s/@\[\]]+/*", endpoint):
        raise StoreError(
            f"{place}: {variable} is not a server address; set it to https://HOST, without a user"
        )
    if endpoint.startswith("http:") and not _allow_http():
        raise StoreError(
            f"{place}: {variable} names a server without TLS; set AWS_ALLOW_HTTP=true to allow that"
        )
    return endpoint.rstrip("/")


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((name for name in names if os.environ.get(name)), None)


def _allow_http() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "on", "yes", "y")
