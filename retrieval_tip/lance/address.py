"""Addresses of stores, and the connection settings in the environment.

lance://indexes/pets  lance:///data/pets     a local folder, relative or absolute
s3://bucket/prefix    gs://bucket/prefix     a prefix of a bucket

Credentials come from the environment and never appear in an address, a message or an option.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from retrieval_tip.errors import StoreError, UsageError, one_line
from retrieval_tip.files import real

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_UNLIKE = re.compile(r'[\\%#*\[\]{}^"<>|`]')
"""Characters that obstore and LanceDB read differently in a name."""


@dataclass(frozen=True)
class Patience:
    """Timeouts of a server in seconds, and the number of retries of a request.

    An unreachable server fails after ``retry + answer`` seconds.
    """

    connect: float = 4
    answer: float = 8
    retry: float = 10
    retries: int = 4


PATIENCE = Patience()


@dataclass(frozen=True)
class Address:
    """The place of a store. ``str`` gives its canonical text, which :meth:`parse` reads and which has no credentials.

    ``scheme`` is ``lance``, ``s3`` or ``gs``; ``bucket`` is empty for a local folder; ``path`` is the folder or prefix.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address.

        Raises UsageError if it lacks a bucket or a path, holds a password, a query, control characters or invalid
        UTF-8, leaves its bucket by ``..``, or has characters that clients of buckets read differently.
        """
        scheme, _, rest = text.partition("://")
        scheme = scheme.lower()
        local, first = scheme == "lance", rest.partition("/")[0]
        if re.search(r"^[^/@]*:[^@]*@", rest) or ("@" in first and not local):
            raise UsageError(f"{scheme}://...: remove the user and password; {set_credentials(scheme)}")
        if ":" in first and not local:
            raise UsageError(f"{scheme}://...: an address has no server; set AWS_ENDPOINT_URL to it")
        rest, query, _ = rest.partition("?")
        shown = one_line(f"{scheme}://{rest}")
        if query:
            raise UsageError(f"{shown}?...: remove the query from the address; set options in the environment")
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in rest):
            raise UsageError(f"{shown}: control characters or invalid UTF-8; remove them")
        if local:
            path = Path(re.sub(r"^/+", "/", rest)).as_posix()
            if not rest or Path(path).name in ("", ".."):
                raise UsageError(f"{shown}: no path; give lance://PATH, or lance:///PATH from the root")
            return cls("lance", "", path)
        bucket, _, prefix = rest.partition("/")
        parts = [part for part in prefix.split("/") if part]
        if not _BUCKET.fullmatch(bucket) or not parts:
            what = "no path in the bucket" if bucket and not parts else "no bucket"
            raise UsageError(f"{shown}: {what}; give {scheme}://BUCKET/NAME")
        if {".", ".."} & set(parts):
            raise UsageError(f"{shown}: '.' or '..' in a path; give the path without it")
        if unlike := _UNLIKE.search(prefix):
            raise UsageError(f"{shown}: {unlike[0]!r} is ambiguous in an address; remove it")
        return cls(scheme, bucket, "/".join(parts))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{'/' if self.bucket else ''}{self.path}"

    @property
    def local(self) -> Path | None:
        """The folder; ``None`` for a bucket."""
        return None if self.bucket else Path(self.path)

    @property
    def uri(self) -> str:
        """Argument of ``lancedb.connect``: an absolute local path, or the address."""
        if self.local is None:
            return str(self)
        return str(real(self.local) if ".." in self.local.parts else self.local.absolute())


def storage_options(address: Address, patience: Patience = PATIENCE) -> dict[str, str]:
    """Return the options of ``lancedb.connect``, which :class:`objects.Objects` uses too; none for a local folder.

    They hold no credentials; clients read these from the environment. Raises StoreError for a wrong endpoint.
    """
    if address.local is not None:
        return {}
    options = {
        "connect_timeout": f"{patience.connect}s",
        "read_timeout": f"{patience.answer}s",
        "client_max_retries": str(patience.retries),
        "client_retry_timeout": f"{patience.retry:.0f}",
        "allow_http": str(_allow_http()).lower(),
    }
    if address.scheme == "s3":  # the two clients prefer different ones of these variables
        if variable := _first_set(_ENDPOINTS):
            options["aws_endpoint"] = _endpoint(address, variable)
        if variable := _first_set(_REGIONS):
            options["aws_region"] = os.environ[variable]
    return options


def set_credentials(scheme: str) -> str:
    """Return advice on giving credentials."""
    if scheme == "gs":
        return "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account in the environment"
    return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"


def _endpoint(address: Address, variable: str) -> str:
    endpoint, place = os.environ[variable], one_line(str(address))
    if not re.fullmatch(r"https?://[^\s/@\[\]]+/*", endpoint):
        raise StoreError(f"{place}: {variable} is not a server address; set it to https://HOST, without a user")
    if endpoint.startswith("http:") and not _allow_http():
        raise StoreError(f"{place}: {variable} names a server without TLS; set AWS_ALLOW_HTTP=true to allow that")
    return endpoint.rstrip("/")


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((name for name in names if os.environ.get(name)), None)


def _allow_http() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "on", "yes", "y")
