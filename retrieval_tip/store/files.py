"""The files of an index in a folder or in a bucket (S3 or GCS, with obstore), and the lock of a folder.

If several processes *create* the same object in a bucket, exactly one process succeeds.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from retrieval_tip.arrays import KeyArray
from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.files import (
    NotAFileError,
    lock,
    make_folders,
    open_regular,
    sha256_of,
    sync,
    temporary,
)
from retrieval_tip.machine import install
from retrieval_tip.store.address import Address, set_credentials, storage_options
from retrieval_tip.store.manifest import SUFFIXES, DataFile
from retrieval_tip.wording import first_line, one_line

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

FAST_BYTES = 1 << 22
"""Maximum size in bytes of the files that a fast check hashes."""
LOCK_WAIT = 30.0
"""Number of seconds to wait for another writer."""
TRIES = 16
"""Number of attempts to acquire the lock if another writer keeps removing the folder."""
PATIENT_BYTES, PATIENT = 1 << 20, "120s"
"""Size in bytes above which an upload has a longer timeout, and this timeout."""
OBJECT_BYTES = 1 << 34
"""Maximum size of an object in bytes. A million classes with 1024 values each take less."""

CLOCK = "clock"
"""Name of an empty object, which is written to ask a service for the time."""

_first_process = functools.cache(
    os.getpid
)  # runs the threads of obstore, which a forked process does not have
FILE_NAME = re.compile(rf"({'|'.join(SUFFIXES)})-[0-9a-f]{{16}}\.(npy|parquet|faiss)")


class LocalFiles:
    """Files in a folder, which messages call ``place``. :class:`BucketFiles` has the same methods.

    Names are relative to the folder. A file is always read and written as a whole. Methods raise OSError if the disk
    refuses a request.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self.folder = folder
        self.place = place

    def get(self, name: str, most: int) -> bytes:
        """Read a file.

        Raises FileNotFoundError if it is missing, and StoreError if it has more than ``most`` bytes, is not a regular
        file or leads out of the folder.
        """
        path = self.folder / name
        shown = f"{self.place}/{name}"
        if not lies_in(self.folder, path):
            raise StoreError(
                f"{shown}: is a link that leads out of the index; replace it with the file itself"
            )
        try:
            with open_regular(path) as file:
                raw = file.read(most + 1)
        except FileNotFoundError:
            raise
        except NotAFileError:
            raise StoreError(f"{shown}: is not a file; restore it") from None
        except OSError as error:
            raise StoreError(f"{shown}: cannot be read: {error.strerror}") from None
        if len(raw) > most:
            raise StoreError(
                f"{shown}: damaged (more than {most:,} bytes); restore it, or build the index again"
            )
        return raw

    def put(self, name: str, *chunks: bytes | memoryview) -> None:
        """Write or replace a file. Readers get either the complete old file or the complete new file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with temporary(path, clean=False) as new:
            with new.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, or return ``False`` if it already exists. Only one of several processes succeeds.

        In a folder, the caller must hold its lock. A server may store a file and then fail to acknowledge it. After
        ``False`` or a StoreError, check whether the file contains your data.
        """
        if os.path.lexists(self.folder / name):
            return False
        self.put(name, data)
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the names and sizes of the files in a folder, sorted by name."""
        try:
            entries = sorted(os.scandir(self.folder / folder), key=lambda entry: entry.name)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                return {}
            raise
        sizes = {}
        for entry in entries:
            with suppress(FileNotFoundError):  # just deleted
                sizes[f"{folder}/{entry.name}"] = entry.stat(follow_symlinks=False).st_size
        return sizes

    def old(self, folder: str, age: timedelta) -> set[str]:
        """Return the names of the files in a folder that no running process has written.

        In a bucket, these are the files that were written at least ``age`` ago by the clock of the service. The clock
        of this machine may be wrong. In a folder, the caller must hold its lock, and these are all files.
        """
        return set(self.sizes(folder))

    def delete(self, names: Iterable[str]) -> None:
        """Delete files. Missing files are ignored."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def flush(self, *folders: str) -> None:
        """Flush the entries of folders to disk. Each file is flushed before it gets its name."""
        for folder in folders:
            sync(self.folder / folder)

    def problem(self, file: DataFile, whole: bool = True) -> str | None:
        """Return how a file differs from its entry in a manifest, or ``None``.

        The digest is compared if the file is small or ``whole`` is true. A file of a table has no size in the manifest,
        and may be missing, because only earlier versions may need it.
        """
        path = self.folder / file.name
        shown = f"{self.place}/{file.name}"
        try:
            if not lies_in(self.folder, path):
                return f"{shown}: is a link that leads out of the index"
            if file.bytes and path.stat().st_size != file.bytes:
                return f"{shown}: damaged ({path.stat().st_size:,} bytes instead of {file.bytes:,})"
            if (whole or file.bytes <= FAST_BYTES) and sha256_of(path) != file.sha256:
                return f"{shown}: damaged (its SHA-256 does not match the manifest)"
        except FileNotFoundError:
            return f"{shown}: missing" if file.bytes else None
        except OSError as error:
            return f"{shown}: cannot be read: {error.strerror}"
        return None


class BucketFiles:
    """Objects in a bucket. See :class:`LocalFiles` for the methods.

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

    def put(self, name: str, *parts: bytes | memoryview) -> None:
        self._put(name, b"".join(parts), "overwrite")

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
        sizes = {entry["path"]: entry["size"] for entry in self._listed(folder)}
        return {name: sizes[name] for name in sorted(sizes)}

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


def lies_in(folder: Path, path: Path) -> bool:
    """Return whether a path is inside the folder after all links are resolved."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that points to itself
        return False


def read_array(
    folder: Path,
    file: DataFile,
    shape: tuple[int, int],
    dtypes: Sequence[npt.DTypeLike] = (np.float32, np.float16),
) -> KeyArray:
    """Memory-map a ``.npy`` file in copy-on-write mode, so that torch can share the memory."""
    path = folder / file.name
    try:
        array: KeyArray = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # a damaged header can make numpy raise any error
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(
            f"{path}: an array of {array.dtype} {array.shape} does not match {shape} in the manifest"
        )
    return array


def check_name(folder: Path) -> None:
    """Raise StoreError if the name of a folder is not valid UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(
            f"{shown}: the folder's name is not UTF-8, which FAISS needs; use another name"
        ) from None


@contextmanager
def locked(folder: Path, place: object) -> Iterator[None]:
    """Lock ``folder`` for writing inside the context, so that only one process can write to it at a time.

    The operating system locks a file in the folder, which contains the name of the owner, and releases the lock when
    the process ends.

    Waits up to :data:`LOCK_WAIT` seconds for another writer. The folder and its ``data`` folder are created first.
    Raises StoreError naming ``place`` if the lock is still held or cannot be acquired.
    """
    path = folder / "lock"
    data = folder / "data"
    held = None
    for left in reversed(range(TRIES)):
        try:
            make_folders(data)
            held = lock(path, os.O_RDWR | os.O_CREAT, wait=LOCK_WAIT)
            break
        except OSError as error:
            if not left or not isinstance(
                error, FileNotFoundError | FileExistsError
            ):  # else it was just removed
                reason = error.strerror or type(error).__name__
                raise StoreError(
                    one_line(f"{place}: cannot be written: {reason}; nothing was changed")
                ) from None
    if held is None:
        owner = _owner(path) or "another process"
        raise StoreError(one_line(f"{place}: is being written by {owner}; try later"))
    try:
        data.mkdir(exist_ok=True)
        with suppress(OSError):  # if the disk is full, the owner cannot write its name
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        with suppress(OSError):  # the file stays empty until the next owner writes its name
            os.truncate(path, 0)
        os.close(held)


def _owner(path: Path) -> str:
    with suppress(OSError):
        return ascii(path.read_text("utf-8", "replace")[:200].strip()).strip("'")
    return ""
