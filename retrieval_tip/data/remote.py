"""Read files on object stores (``s3://``, ``gs://``, ``az://``) through fsspec and obstore.

obstore reads the credentials, the region and the endpoint from variables such as ``AWS_ACCESS_KEY_ID``. This module
never stores them.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

from retrieval_tip import hooks
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.machine import install
from retrieval_tip.wording import first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = ("s3://", "gs://", "az://")
_PREFIX = re.compile(r"([a-z][a-z0-9.+-]+):(?!//)")


def is_remote(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Return whether a path is the URL of an object store."""
    return isinstance(path, str) and path.startswith(SCHEMES)


def scheme_of(path: str | os.PathLike[str]) -> str | None:
    """Return the scheme of ``SCHEME:REST`` if an opener of this name is installed (see :class:`source.Opener`)."""
    prefix = _PREFIX.match(path) if isinstance(path, str) else None
    return prefix[1] if prefix and hooks.exists("sources", prefix[1]) else None


def no_scheme(path: str) -> str:
    """Return which sources are installed, as the end of a message, if a path looks like ``SCHEME:REST``."""
    if _PREFIX.match(path) is None:
        return ""
    return f", and no such source; installed: {', '.join(hooks.names('sources')) or 'none'}"


def is_address(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Return whether a path is the URL of an object store, or has a scheme, and so is no path on this machine."""
    return is_remote(path) or scheme_of(path) is not None


def absolute(path: str) -> str:
    """Return the absolute path of a file. Links are kept, and addresses do not change."""
    return path if is_address(path) else os.path.abspath(path)  # noqa: PTH100 - resolve() follows links


@functools.cache
def filesystem(scheme: str) -> AbstractFileSystem:
    """Return the file system for ``s3``, ``gs`` or ``az``. Raises UsageError if its packages are not installed."""
    try:
        from obstore.fsspec import FsspecStore
    except ImportError:
        raise UsageError(f"{scheme}://: support is not installed; run {install('lance')}") from None
    local = os.environ.get("AWS_ENDPOINT_URL", "").startswith(
        "http://"
    )  # a private object store without TLS
    options = {"client_options": {"allow_http": True}} if local else {}
    return FsspecStore(scheme, **options)  # type: ignore[call-overload]  # Ray can pickle it


def system_of(url: str) -> AbstractFileSystem:
    """Return the file system that can read a URL."""
    return filesystem(url.partition("://")[0])


@contextmanager
def reaching(url: str = "") -> Iterator[None]:
    """Convert errors from the object store to InputError. The message names ``url`` if it is given."""
    name = f"{url}: " if url else ""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{name}no such object") from None
    except (UsageError, InputError):
        raise
    except Exception as error:  # the errors of obstore and fsspec have no common base class
        raise InputError(f"{name}cannot be read: {first_line(error)}") from None


def find(folder: str) -> list[str]:
    """List the URLs of the objects below a folder, sorted by name. Raises InputError if it cannot be read."""
    with reaching(folder):
        return [f"{folder.partition('://')[0]}://{name}" for name in system_of(folder).find(folder)]
