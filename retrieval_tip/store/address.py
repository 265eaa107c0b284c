"""Parse the addresses of stores.

lance://indexes/pets  lance:///data/pets     a local folder with a relative or an absolute path
s3://bucket/prefix    gs://bucket/prefix     a prefix in a bucket

Credentials are read from the environment. They never appear in an address, a message or an option.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from retrieval_tip.errors import UsageError
from retrieval_tip.files import real
from retrieval_tip.wording import one_line

SCHEMES = ("lance", "s3", "gs")
KIND, FORMS = "LanceDB store", "lance://PATH, s3://BUCKET/PATH, gs://BUCKET/PATH"
"""Name of these stores and the forms of their addresses, as shown in help texts and messages."""
METAVAR = "DIR|ADDRESS"
"""Placeholder for a place in the help."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_UNLIKE = re.compile(r'[\\%#*\[\]{}^"<>|`]')
"""Characters in a name that obstore and LanceDB interpret differently."""


@dataclass(frozen=True)
class Address:
    """The address of a store. ``str`` returns its canonical text, which :meth:`parse` can read.

    ``scheme`` is ``lance``, ``s3`` or ``gs``. ``bucket`` is empty for a local folder. ``path`` is the folder or the
    prefix.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse the text of an address.

        Raises UsageError if the address has no bucket or no path. It must not contain a password, a query, control
        characters, invalid UTF-8, ``..`` in a bucket, or characters that storage clients interpret differently.
        """
        scheme, _, rest = text.partition("://")
        scheme = scheme.lower()
        local = scheme == "lance"
        first = rest.partition("/")[0]
        if re.search(r"^[^/@]*:[^@]*@", rest) or ("@" in first and not local):
            raise UsageError(
                f"{scheme}://...: remove the user and password; {set_credentials(scheme)}"
            )
        if ":" in first and not local:
            raise UsageError(
                f"{scheme}://...: an address cannot name a server; set AWS_ENDPOINT_URL instead"
            )
        rest, query, _ = rest.partition("?")
        shown = one_line(f"{scheme}://{rest}")
        if query:
            raise UsageError(
                f"{shown}?...: remove the query from the address; set options in the environment"
            )
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in rest):
            raise UsageError(
                f"{shown}: the address contains control characters or invalid UTF-8; remove them"
            )
        if local:
            path = Path(re.sub(r"^/+", "/", rest)).as_posix()
            if not rest or Path(path).name in ("", ".."):
                raise UsageError(
                    f"{shown}: the address has no path; give lance://PATH, or lance:///PATH from the root"
                )
            return cls("lance", "", path)
        bucket, _, prefix = rest.partition("/")
        parts = [part for part in prefix.split("/") if part]
        if not _BUCKET.fullmatch(bucket) or not parts:
            what = "no path in the bucket" if bucket and not parts else "no bucket"
            raise UsageError(f"{shown}: {what}; give {scheme}://BUCKET/NAME")
        if {".", ".."} & set(parts):
            raise UsageError(f"{shown}: the path contains '.' or '..'; remove it")
        if unlike := _UNLIKE.search(prefix):
            raise UsageError(f"{shown}: {unlike[0]!r} is ambiguous in an address; remove it")
        return cls(scheme, bucket, "/".join(parts))

    def __str__(self) -> str:
        place = f"{self.bucket}/{self.path}" if self.bucket else self.path
        return f"{self.scheme}://{place}"

    @property
    def local(self) -> Path | None:
        """The local folder, or ``None`` if the address is in a bucket."""
        return None if self.bucket else Path(self.path)

    @property
    def uri(self) -> str:
        """The argument for ``lancedb.connect``, which is an absolute local path or the address."""
        if self.local is None:
            return str(self)
        return str(real(self.local) if ".." in self.local.parts else self.local.absolute())


def parse(text: str) -> Address | None:
    """Parse the text of an address, or return ``None`` for a folder. Raises UsageError if the address is invalid."""
    scheme, separator, _ = text.partition("://")
    return Address.parse(text) if separator and scheme.lower() in SCHEMES else None


def set_credentials(scheme: str) -> str:
    """Return a hint that tells the user how to provide credentials."""
    if scheme == "gs":
        return (
            "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account in the environment"
        )
    return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
