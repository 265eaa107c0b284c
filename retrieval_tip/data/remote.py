"""Read files on object stores (``s3://``, ``gs://``, ``az://``) through fsspec and obstore.

obstore reads the credentials, the region and the endpoint from variables such as ``AWS_ACCESS_KEY_ID``. This module
never stores them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeGuard, TypeVar

from retrieval_tip.data.listing import Listing
from retrieval_tip.errors import InputError, UsageError, first_line, install, show

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = ("s3://", "gs://", "az://")

_T = TypeVar("_T")


def is_remote(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Return whether a path is the URL of an object store."""
    return isinstance(path, str) and path.startswith(SCHEMES)


@functools.cache
def filesystem(scheme: str) -> AbstractFileSystem:
    """Return the file system for ``s3``, ``gs`` or ``az``. Raises UsageError if its packages are not installed."""
    try:
        from obstore.fsspec import FsspecStore
    except ImportError:
        raise UsageError(f"{scheme}://: support is not installed; run {install('distributed')}") from None
    local = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")  # a private object store without TLS
    options = {"client_options": {"allow_http": True}} if local else {}
    system: AbstractFileSystem = FsspecStore(scheme, **options)  # type: ignore[call-overload]  # Ray can pickle it
    return system


def system_of(url: str) -> AbstractFileSystem:
    """Return the file system that can read a URL."""
    return filesystem(url.partition("://")[0])


def opened(url: str) -> BinaryIO:
    """Open a URL as a seekable binary file. Raises InputError if it cannot be read."""
    system = system_of(url)
    attempt(url, lambda: system.info(url))  # obstore would report a missing object later, outside any handler
    file: BinaryIO = attempt(url, lambda: system.open(url, "rb"))
    return file


def children(folder: str) -> list[str]:
    """List the URLs in a folder, sorted by name, or none if it is missing. Raises InputError if it cannot be read."""
    place, system = folder.rstrip("/"), system_of(folder)

    def names() -> list[str]:
        with suppress(FileNotFoundError):
            return list(system.ls(place, detail=False))
        return []

    return sorted(f"{place}/{name.rpartition('/')[2]}" for name in attempt(folder, names))


def attempt(url: str, call: Callable[[], _T]) -> _T:
    """Return the result of a call. Errors from the object store are raised as InputError."""
    try:
        return call()
    except FileNotFoundError:
        raise InputError(f"{url}: no such object") from None
    except (UsageError, InputError):
        raise
    except Exception as error:  # the errors of obstore and fsspec have no common base class
        raise InputError(f"{url}: cannot be read: {first_line(error)}") from None


def read(path: str) -> bytes | None:
    """Return the bytes of a remote image, or ``None`` if the path is not remote.

    Raises InputError if the image cannot be read.
    """
    from retrieval_tip.data import images  # imported here because every --help imports this module

    if not is_remote(path):
        return None
    system = system_of(path)

    def fetch() -> bytes:
        images.check_size(system.size(path))
        return bytes(system.cat_file(path))

    try:
        data = attempt(path, fetch)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ")) from None
    if not data:
        raise InputError("empty file")
    return data


def listing(folder: str, *, labelled: bool) -> Listing:
    """List the images below a folder, labelled by their class folders.

    Raises InputError if there are no images, or if ``labelled`` is set and an image has no label.
    """
    from retrieval_tip.data import images

    system, scheme = system_of(folder), folder.partition("://")[0]
    base = f"{scheme}://{folder.partition('://')[2].strip('/')}/"
    urls = [f"{scheme}://{name}" for name in sorted(attempt(folder, lambda: system.find(folder)))]
    paths = [path for path in urls if Path(path).suffix.lower() in images.extensions() and path.startswith(base)]
    if not paths:
        raise InputError(f"{show(folder)}: no images, tars or Parquet file found")
    labels = [path.removeprefix(base).rpartition("/")[0].partition("/")[0] or None for path in paths]
    if labelled and None in labels:
        raise InputError(f"{show(paths[labels.index(None)])}: not in a class folder of {show(folder)}")
    return Listing(paths, labels)
