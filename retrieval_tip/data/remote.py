"""Files on object stores: what is named ``s3://``, ``gs://`` or ``az://``, through fsspec and obstore.

Credentials, region and endpoint come from the environment of the process that reads, as obstore looks them up
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` ...); nothing here holds or writes them.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from retrieval_tip.errors import InputError, UsageError, first_line

SCHEMES = ("s3://", "gs://", "az://")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the URL of an object."""
    return isinstance(path, str) and path.startswith(SCHEMES)


@functools.cache
def filesystem(scheme: str) -> Any:
    """The fsspec file system of ``s3``, ``gs`` or ``az``. Raises UsageError where what it needs is not installed."""
    try:
        import fsspec
        from obstore.fsspec import FsspecStore, register
    except ImportError:
        raise UsageError(f"{scheme}:// needs pip install 'retrieval-tip[distributed]'") from None
    register(scheme)
    local = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")  # an object store of one's own
    options = {"client_options": {"allow_http": True}} if local else {}
    system = fsspec.filesystem(scheme, **options)
    assert isinstance(system, FsspecStore)
    return system


def system_of(url: str) -> Any:
    """The fsspec file system of a URL."""
    return filesystem(url.partition("://")[0])


def opened(url: str) -> Any:
    """A URL as a binary file that can be sought in. Raises InputError where it cannot be read."""

    def look() -> Any:
        system = system_of(url)
        system.info(url)  # obstore's file complains once more, past all handlers, when it was never open
        return system.open(url, "rb")

    return attempt(url, look)


def attempt(url: str, what: Any) -> Any:
    """The result of a call; an object store's errors become an InputError that names the URL."""
    try:
        return what()
    except FileNotFoundError:
        raise InputError(f"{url}: no such object") from None
    except (UsageError, InputError):
        raise
    except Exception as error:  # obstore has a class for each kind of refusal, and none in common with fsspec's
        raise InputError(f"{url}: cannot be read: {first_line(error)}") from None
