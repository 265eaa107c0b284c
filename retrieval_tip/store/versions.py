"""Keep the versions of an index in a folder or in a bucket. :mod:`lance.lance_store` lists what differs in LanceDB.

An index is a set of immutable data files, whose names carry their digests, and a manifest that lists them. Readers see
either the old version or the new version, never a mixture of the two.

manifests/000003.json          the manifest of a version; the version with the highest number is current. Creating this
                               file commits the version, and only one of two writers can create it
data/KIND-<digest>.SUFFIX      a data file, which several versions may share (see :data:`manifest.SUFFIXES`)
newest/000003-41               the highest version and the next key id, in case a manifest is lost (see :mod:`newest`)
lock                           locked by the process that is writing, unless the store is in a bucket

Data files are written and flushed before the manifest. If the process is killed, the old version stays current, and the
next writer removes the leftover files before it writes. A change that is refused deletes and renames nothing. In a
bucket, leftover files may belong to a version that is being written, so they are only deleted after
:data:`UNFINISHED`.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip import __version__
from retrieval_tip.arrays import IntArray, KeyArray
from retrieval_tip.errors import InputError, StoreError, UsageError, warn_once
from retrieval_tip.files import (
    TEMPORARY,
    cache_folder,
    delete,
    real,
    remove_leftovers,
    replace,
    sha256_of,
)
from retrieval_tip.platforms import open_shared
from retrieval_tip.settings import Verify, check_choice
from retrieval_tip.store.files import (
    FILE_NAME,
    LocalFiles,
    StoreFiles,
    check_name,
    lies_in,
    locked,
    read_array,
)
from retrieval_tip.store.labels import VERSIONS_SCHEMA, read_curve, read_labels
from retrieval_tip.store.manifest import (
    SUFFIXES,
    DataFile,
    EarlierFormatError,
    Manifest,
    manifest_name,
    named_in,
)
from retrieval_tip.store.newest import FOLDER as NEWEST
from retrieval_tip.store.newest import Newest
from retrieval_tip.store.query import TIMEOUT, ask
from retrieval_tip.wording import first_line

T = TypeVar("T")
KEPT_VERSIONS = 32
"""Number of versions, including the current one, that a commit keeps."""
VERSIONS_TRIED = 16
"""Number of attempts to open an index if each version is deleted while it is being read."""
MANIFEST_BYTES = 1 << 28
"""Maximum size of a manifest in bytes, about ten times the size of a manifest with a million classes."""
UNREAD = "in an earlier format, which is no longer read"
"""Description of such a version in the history."""
UNFINISHED = datetime.timedelta(hours=24)
"""Age after which a file in a bucket to which no manifest refers is considered left over by a killed writer."""

_ZEROS = bytes(1 << 20)
_MANIFEST = re.compile(r"manifests/(\d{6,12})\.json")


class ConflictError(StoreError):
    """Another process has written a version meanwhile, so that this one has changed nothing."""


class Writer:
    """The writer of the next version, which can also write files that do not fit in memory.

    Use :meth:`Versions.write` to get one.

    ``parent`` is the manifest of the version before it, and ``files`` are the data files written or kept so far.
    ``restored`` is the earlier version that a rollback copies, and ``newest`` the highest version that the store has
    had. ``sent`` are the contents of the files that were put into a bucket, which may have to be put again. If
    ``replaces`` is set, the parent is deleted after the commit. Readers that have opened it can finish, because rows of
    a table are kept until later. If ``prunes`` is set, earlier versions of the table are pruned after the commit.
    """

    replaces = prunes = False

    def __init__(self, store: Versions, parent: Manifest | None) -> None:
        self.store = store
        self.parent = parent
        self.files: dict[str, DataFile] = {}  # files are sealed in several threads
        self.restored: Manifest | None = None
        self.newest = Newest()
        self.sent: dict[str, Sequence[bytes | memoryview]] = {}
        self._staged = list[Path]()
        self._begun = False

    @property
    def number(self) -> int:
        """Number of the version that is being written."""
        parent = 0 if self.parent is None else self.parent.version
        return 1 + max(self.newest.version, parent)

    @property
    def before(self) -> int | None:
        """Number of the last version that is kept before this one."""
        if self.parent is None:
            return None
        return self.parent.parent if self.replaces else self.parent.version

    def begin(self) -> None:
        """Remove what killed writers have left. Call this when the change is accepted, before the first write.

        Later calls do nothing.
        """
        if self._begun:
            return
        self._begun = True
        self.store.tidy([file.name for file in self.files.values()])

    def undo(self) -> None:
        """Remove the files of a change that failed, unless it was committed."""
        # A signal hides a thread from its pool while it is started, so wait until none is left.
        while any(thread.name.startswith("seal") for thread in threading.enumerate()):
            time.sleep(0.001)
        with suppress(OSError, StoreError):
            for path in self._staged:
                delete(path)
            self.store.remove_unnamed({file.name for file in self.files.values()})

    def put(self, kind: str, rows: int, *chunks: bytes | memoryview) -> None:
        """Write the data file of this kind. In a bucket, a file that the parent version has is not sent again."""
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        data_file = entry(
            kind, rows, sum(memoryview(chunk).nbytes for chunk in chunks), digest.hexdigest()
        )
        self.files[kind] = data_file
        if self.store.local is None:
            self.sent[data_file.name] = chunks
        if (
            self.store.local is not None
            or self.parent is None
            or self.parent.files.get(kind) != data_file
        ):
            self.store.files.put(data_file.name, *chunks)

    def put_array(self, kind: str, array: KeyArray) -> None:
        """Write a two-dimensional array as the data file of this kind."""
        array = np.ascontiguousarray(array)
        header = BytesIO()
        np.lib.format.write_array_header_1_0(
            header, np.lib.format.header_data_from_array_1_0(array)
        )
        self.put(kind, len(array), header.getvalue(), array.reshape(-1).view(np.uint8).data)

    def put_table(self, kind: str, table: pa.Table) -> None:
        """Write a table as the data file of this kind. Raises InputError if Parquet cannot store a column."""
        sink = BytesIO()
        try:
            pq.write_table(table, sink)
        except pa.ArrowException as error:
            raise InputError(f"{kind}: cannot store a column ({first_line(error)})") from None
        self.put(kind, len(table), sink.getbuffer())

    def stage(self, kind: str) -> Path:
        """Return a temporary path for a data file of this kind. Write the file there before you call :meth:`seal`."""
        self._staged.append(
            self.store.folder / "data" / f".{kind}{SUFFIXES[kind]}.{uuid.uuid4().hex[:8]}.tmp"
        )
        return self._staged[-1]

    def stage_array(
        self, kind: str, shape: tuple[int, int], dtype: npt.DTypeLike
    ) -> np.memmap[Any, Any]:
        """Stage a writable memory-mapped array.

        The disk space is reserved in advance, because a full disk would otherwise cause a SIGBUS. A large array is
        staged before the change is accepted, so leftovers are only removed if they may be what fills the disk.
        """
        try:
            return _reserved(self.stage(kind), shape, dtype)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        self.begin()
        return _reserved(self.stage(kind), shape, dtype)

    def seal(self, kind: str, staged: Path, rows: int) -> None:
        """Flush a staged file to disk, and rename it by its digest."""
        with staged.open("rb+") as file:
            os.fsync(file.fileno())
        data_file = self.files[kind] = entry(kind, rows, staged.stat().st_size, sha256_of(staged))
        replace(staged, self.store.folder / data_file.name)

    def seal_array(self, kind: str, array: np.memmap[Any, Any]) -> KeyArray:
        """Seal a staged array, and map its file again."""
        array.flush()
        self.seal(kind, Path(str(array.filename)), len(array))
        return read_array(self.store.folder, self.files[kind], array.shape)

    def send_again(self, names: Collection[str]) -> None:
        """Put files into a bucket again. Raises StoreError if this writer has not put them."""
        for name in names:
            if name not in self.sent:
                raise changed_meanwhile(self.store)
            self.store.files.put(name, *self.sent[name])

    def complete(self, manifest: Manifest) -> None:
        """Replace what another process has deleted from a bucket in the meantime. Raises StoreError if it is lost."""
        self.send_again(sizes_of(manifest).keys() - self.store.files.sizes("data").keys())

    def keep(self, *kinds: str) -> None:
        """Share the data files of these kinds with the parent version."""
        for kind in kinds:
            assert self.parent is not None
            self.files[kind] = self.parent.files[kind]

    def commit(self, manifest: Manifest) -> None:
        """Make this the current version. The old version stays current until the new manifest is written.

        Raises InputError if the manifest contains a value that cannot be stored, and StoreError if another process has
        changed the store meanwhile.
        """
        try:
            raw = manifest.to_bytes()
            Manifest.parse(json.loads(raw))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{self.store}: the manifest cannot be stored ({error}); nothing was changed"
            ) from None
        self.begin()
        self.store.publish(self, manifest, raw)
        # The new version is committed, so nothing below may raise an error. The next writer completes the rest.
        with suppress(OSError, StoreError):
            self.store.files.flush("manifests", "", "..")
            Newest(manifest.version, manifest.next_key_id).write(self.store.files)
            if self.replaces and self.parent is not None:
                self.store.files.delete([manifest_name(self.parent.version)])
                self.store.tidy()
            self.store.forget(KEPT_VERSIONS, manifest, self.prunes)


class Versions:
    """The versions of one index. Readers see complete versions, and writers wait for each other.

    ``files`` are the files of the store, ``place`` is its folder or address, and ``local`` is its folder on this
    machine (``None`` for a bucket). Methods raise StoreError if the store is missing, damaged, locked or not writable.
    If an error occurs, the current version stays unchanged.
    """

    files: StoreFiles
    local: Path | None
    writer: type[Writer] = Writer
    """The class of the writer."""
    own: tuple[str, ...] = ("data", "manifests", NEWEST, "lock")
    """Names in the folder of a store, without the names of temporary files."""
    in_table = False
    """Whether keys and labels are rows of a table, which a manifest names."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = self.local = Path(folder)
        self.place = self.folder.as_posix()
        self.files: StoreFiles = LocalFiles(self.folder, self.place)

    def __str__(self) -> str:
        return self.place

    @property
    def resolved(self) -> str:
        """The folder or address in a canonical form, which is the same for every spelling."""
        return str(self) if self.local is None else str(real(self.local))

    @property
    def name(self) -> str:
        """Last component of the folder or address."""
        return Path(self.resolved).name

    # Reading

    def exists(self) -> bool:
        """Return whether the store contains an index, even a damaged one.

        An unreadable folder counts as an index, so that it is not overwritten.
        """
        try:
            return bool(self.names())
        except StoreError:
            if self.local is None:
                raise
            return True

    def stamp(self) -> Hashable | None:
        """Return a value that changes with the current version, or ``None`` if there is no index.

        This never sends a request. If the store needs a request to detect changes, every call returns a new value.
        """
        if self.local is None:
            return time.monotonic_ns()
        manifests = self.local / "manifests"
        with suppress(OSError):
            status = manifests.stat()
            return status.st_ino, status.st_mtime_ns, *manifests.iterdir()
        return None

    def names(self) -> dict[int, str]:
        """Return the names of the manifests by version, oldest first."""
        try:
            sizes = self.files.sizes("manifests")
        except OSError as error:
            raise StoreError(f"{self}: cannot be read: {error.strerror}") from None
        numbered = {int(match[1]): name for name in sizes if (match := _MANIFEST.fullmatch(name))}
        return dict(sorted(numbered.items()))

    def read_labels(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the label store of a version, or some of its columns."""
        labels = read_labels(self.folder, manifest)
        return labels if columns is None else labels.select(list(columns))

    def tables(self, manifest: Manifest) -> dict[str, pa.Table]:
        """Return the tables of a version that :meth:`query` can read, by name."""
        if not self.in_table:
            self.check_files(manifest)
        curve = (
            {"curve": read_curve(self.folder, manifest.files["curve"])}
            if "curve" in manifest.files
            else {}
        )
        return {"labels": self.read_labels(manifest)} | curve

    def facts(
        self, manifest: Manifest, earlier: list[Manifest]
    ) -> tuple[IntArray, dict[str, object]]:
        """Return the number of keys per class, and further facts for :meth:`describe`."""
        Check(self.files, manifest, "fast").wait()
        labels = self.read_labels(manifest)
        file_sizes = sizes_of(manifest)
        before = {name: size for old in earlier for name, size in sizes_of(old).items()}
        sizes: dict[str, object] = {
            "bytes": sum(file_sizes.values()),
            "bytes_of_earlier": sum(
                size for name, size in before.items() if name not in file_sizes
            ),
        }
        return np.bincount(
            labels["class_id"].to_numpy(), minlength=len(manifest.class_names)
        ), sizes

    def manifest(self, version: int | None = None) -> Manifest:
        """Return the manifest of the current version, or of an earlier one. Warns if the newest version is lost."""
        if self.local is not None:
            check_name(self.local)

        def read() -> Manifest:
            newest = Newest.read(
                self.files
            )  # before the manifests, because a commit may come in between
            names = self.names()
            loss = newest.loss(self, max(names, default=0))
            if loss:
                warn_once(loss)
            if not names:
                what = (
                    "no such folder"
                    if self.local is not None and not self.local.exists()
                    else "not an index"
                )
                raise StoreError(
                    f"{self}: {what}; make one with retrieval-tip index build SOURCE --out INDEX"
                )
            if version is not None and version not in names:
                there = ", ".join(map(str, names))
                raise StoreError(f"{self}: has no version {version}; use one of {there}")
            return self.parse(names[version or max(names)])

        return self._steady(read)

    def parse(self, name: str) -> Manifest:
        """Read a manifest. Raises FileNotFoundError if it is missing."""
        manifest = Manifest.from_bytes(self.files.get(name, MANIFEST_BYTES), f"{self}/{name}")
        if (manifest.table is not None) != self.in_table:
            raise StoreError(
                f"{self}/{name}: is the manifest of another kind of store; restore the right one"
            )
        if name != manifest_name(manifest.version):
            raise StoreError(f"{self}/{name}: is the manifest of another version; restore it")
        folders = [] if self.local is None else [*real(self.local).parents]
        if (cache := cache_folder()) is not None:
            folders.append(cache)
        return manifest.located(folders)

    def _steady(self, read: Callable[[], T]) -> T:
        """Call ``read`` again if a version is deleted in the meantime."""
        for _ in range(VERSIONS_TRIED):
            with suppress(FileNotFoundError):
                return read()
        raise StoreError(f"{self}: keeps changing while it is opened; try again")

    def opened(
        self,
        read: Callable[[Manifest], T],
        version: int | None = None,
        first: Manifest | None = None,
    ) -> T:
        """Call ``read`` with the manifest of the current or an earlier version, and return the result.

        If a writer deletes the version in the meantime, the call is repeated. Pass the manifest as ``first`` if it has
        been read before.
        """

        def attempt() -> T:
            nonlocal first
            manifest = first or self.manifest(version)
            first = None
            try:
                return read(manifest)
            except StoreError:
                if self.keeps(manifest):
                    raise
                raise FileNotFoundError from None

        return self._steady(attempt)

    def keeps(self, manifest: Manifest) -> bool:
        """Return whether a version still exists. Writers delete the manifest of a version first."""
        try:
            return self.manifest(manifest.version) == manifest
        except StoreError:
            return False

    def earlier(self, current: Manifest) -> list[Manifest]:
        """Return the manifests of the versions before the current version, oldest first.

        Versions in an earlier format are left out.
        """

        def read() -> list[Manifest]:
            manifests = []
            for number, name in self.names().items():
                if number < current.version:
                    with suppress(EarlierFormatError):
                        manifests.append(self.parse(name))
            return manifests

        return self._steady(read)

    def check_earlier(self, current: Manifest) -> None:
        """Verify the files of earlier versions, except those of the current version, which are known to be intact."""
        verified = set(current.digested)
        for manifest in self.earlier(current):
            try:
                self.check_files(manifest, verified)
            except StoreError:
                if self.keeps(manifest):
                    raise
            verified.update(manifest.digested)

    def check(self, manifest: Manifest) -> None:
        """Raise StoreError if a version is damaged and therefore cannot be restored."""
        self.check_files(manifest)

    def check_files(self, manifest: Manifest, verified: Collection[DataFile] = ()) -> None:
        """Raise StoreError if a file of a version is missing or damaged. Files in ``verified`` are skipped."""
        Check(self.files, manifest, verified=verified).wait()

    def history(self) -> pa.Table:
        """Return the kept versions as a table with the columns of :data:`labels.VERSIONS_SCHEMA`, oldest first.

        In LanceDB, the column ``bytes`` does not include the table. Of a version in an earlier format, only its number
        is known.
        """
        current = self.manifest()
        manifests = [*self.earlier(current), current]
        rows: list[dict[str, Any]] = [
            {"version": number, "change": UNREAD}
            for number in self.names()
            if number < manifests[0].version
        ]
        for manifest in manifests:
            row: dict[str, Any] = {
                "version": manifest.version,
                "parent": manifest.parent,
                "created_at": datetime.datetime.fromisoformat(manifest.created_at),
                "created_by": manifest.created_by,
                "change": manifest.change,
                "keys": manifest.n,
                "classes": len(manifest.class_names),
                "bytes": sum(sizes_of(manifest).values()),
                "current": manifest is current,
            }
            rows.append(row)
        return pa.Table.from_pylist(rows, schema=VERSIONS_SCHEMA)

    def describe(self) -> dict[str, Any]:
        """Return the facts that ``index info`` prints."""
        manifest, earlier, (counts, more) = self.opened(
            lambda manifest: (
                manifest,
                earlier := self.earlier(manifest),
                self.facts(manifest, earlier),
            )
        )
        per_class = {
            "least": int(counts.min()),
            "median": float(np.median(counts)),
            "most": int(counts.max()),
        }
        return {
            "folder": str(self),
            **manifest.described(),
            "keys_per_class": per_class,
            "precision": manifest.provenance.get("precision"),
            **more,
            "files": {kind: file.name for kind, file in manifest.files.items()},
            "earlier_versions": [old.version for old in earlier],
        }

    def query(self, sql: str, timeout: float = TIMEOUT) -> pa.Table:
        """Run a SELECT query over the :meth:`tables` of the current version and its :meth:`history` as ``versions``."""
        tables = self.opened(lambda manifest: self.tables(manifest) | {"versions": self.history()})
        return ask(tables, sql, timeout)

    # Writing

    def publish(self, writer: Any, manifest: Manifest, raw: bytes) -> None:
        """Create the manifest of the next version, which is encoded as ``raw``."""
        self.files.flush("data", "")
        name = manifest_name(manifest.version)
        if self.local is None:  # a slow upload would otherwise look like one that was left over
            writer.send_again(self.files.old("data", UNFINISHED / 2) & writer.sent.keys())
        created = self.files.create(name, raw)
        with suppress(
            FileNotFoundError
        ):  # it may exist because the server's answer was lost; its content shows whose
            created = created or self.files.get(name, MANIFEST_BYTES) == raw
        if not created:
            raise changed_meanwhile(self)
        try:
            if writer.restored is not None and not self.keeps(writer.restored):
                raise changed_meanwhile(
                    self
                )  # another process has deleted the version, and maybe also its rows
            if self.local is None:
                writer.complete(manifest)
        except StoreError:
            self.files.delete([name])
            raise

    @contextmanager
    def write(self, *, accepts: int | None = None) -> Iterator[Any]:
        """Yield a writer of the next version. A store on this machine is locked in the meantime.

        Waits up to :data:`files.LOCK_WAIT` seconds for other writers. If an exception is raised or the process is
        killed, the current version stays in place. Raises StoreError if the folder contains other files, stays locked
        or cannot be written, or if the disk is full. Also raises StoreError if the newest version is lost, unless the
        caller ``accepts`` that the highest remaining version becomes current.
        """
        folder = self.local
        made = list[Path]()
        if folder is None:
            yield self._writer(accepts)
            return
        check_name(folder)
        for name in self.own:
            if not lies_in(folder, folder / name):
                raise StoreError(
                    f"{folder / name}: is a link that leads out of the index; nothing was changed"
                )
        try:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            if folder.is_file():
                raise StoreError(f"{self}: is a file, not a folder; give another --out")
            # Another writer may create an index between these two lines, but not remove one.
            others = {path.name for path in paths_in(folder)} - set(self.own)
            if not all(map(TEMPORARY.fullmatch, others)) and not self.exists():
                raise StoreError(
                    f"{self}: is not an index and not empty; give an empty or new folder"
                )
            with locked(folder, self):
                yield from self._exclusively(folder, accepts)
        except OSError as error:
            raise StoreError(
                f"{error.filename2 or error.filename or self}: cannot be written: {error.strerror or error}; "
                "nothing was changed"
            ) from error
        finally:
            with suppress(OSError):  # a folder that contains files of another writer is kept
                if not self.exists():
                    for path in made:
                        path.rmdir()

    def _exclusively(self, folder: Path, accepts: int | None) -> Iterator[Writer]:
        """Yield a writer to the owner of the lock, and remove its files if it fails."""
        writer = None
        try:
            writer = self._writer(accepts)
            yield writer
        except BaseException:
            if writer is not None:
                writer.undo()
            raise
        finally:
            if not self.exists():
                _remove_own(folder)

    def _writer(self, accepts: int | None) -> Writer:
        newest = Newest.read(self.files)
        parent = self.manifest() if self.exists() else None
        current = parent.version if parent else 0
        loss = newest.loss(self, current)
        if loss and accepts != current:
            raise StoreError(f"{loss}; nothing was changed")
        writer = self.writer(self, parent)
        writer.newest = newest
        return writer

    def rollback(self, version: int | None = None, expect: int | None = None) -> int:
        """Copy an earlier version, by default the parent, into a new version, and return the new number.

        ``expect`` is the version that must be current. If the newest version is lost, ``version`` must be the highest
        remaining one. This accepts the loss.
        """
        self.manifest()  # before a writer creates a folder
        with self.write(accepts=version) as writer:
            current = writer.parent or self.manifest()
            if expect not in (None, current.version):
                raise changed_meanwhile(self)
            wanted = version if version is not None else current.parent
            if wanted is None:
                raise StoreError(
                    f"{self}: no version before {current.version}; there is nothing to go back to"
                )
            if wanted == current.version >= writer.newest.version:
                return current.version
            old = writer.restored = self.manifest(wanted)
            self.check(old)
            new = dataclasses.replace(
                old,
                version=writer.number,
                parent=current.version,
                next_key_id=max(
                    old.next_key_id, current.next_key_id, writer.newest.next_key_id
                ),  # never used again
                change=f"restored version {old.version}",
                **created(),
            )
            writer.commit(new)
            return new.version

    def collect(self, keep: int) -> tuple[list[int], int]:
        """Delete all versions except the last ``keep``, and the data that only the deleted versions use.

        Return the deleted version numbers and the number of freed bytes, which does not include rows of a table. A
        reader that still has a deleted version open can finish if it has memory-mapped its files. Raises UsageError if
        ``keep`` is below 1.
        """
        if keep < 1:
            raise UsageError(
                f"keep is {keep}: give at least 1, because the current version is always kept"
            )
        self.manifest()  # before a writer creates a folder
        with self.write() as writer:
            before = self._bytes()
            gone = self.forget(keep, writer.parent or self.manifest())
            return gone, before - self._bytes()

    def _bytes(self) -> int:
        return sum(
            size for folder in ("data", "manifests") for size in self.files.sizes(folder).values()
        )

    def forget(self, keep: int, current: Manifest, prune: bool = True) -> list[int]:
        """Delete all but the last ``keep`` versions, with their rows if ``prune`` is set, and return their numbers."""
        earlier = [number for number in self.names() if number < current.version]
        gone = earlier[: max(0, len(earlier) + 1 - keep)]
        if gone or prune:
            self.files.delete(map(manifest_name, gone))
            self.tidy()
        return gone

    def tidy(self, kept: Collection[str] = ()) -> None:
        """Remove unfinished files, and data files to which no manifest refers, except those in ``kept``.

        In a folder, the caller must hold its lock.
        """
        if self.local is not None:
            for name in ("", "data", "manifests", NEWEST):
                remove_leftovers(self.folder / name)
        with suppress(OSError, StoreError):
            # List files before manifests, which may name them in the meantime.
            old = self.files.old("data", UNFINISHED).difference(kept)
            names = {name for name in old if FILE_NAME.fullmatch(name.partition("/")[2])}
            self.remove_unnamed(names)

    def remove_unnamed(self, files: set[str]) -> None:
        """Remove those of the given data files to which no manifest refers, if all manifests can be read."""
        if not files:
            return
        for name in self.names().values():
            named = named_in(self.files.get(name, MANIFEST_BYTES))
            if named is None:
                return  # a damaged manifest may refer to any of the files
            files = files - named
        self.files.delete(files)


@dataclasses.dataclass(frozen=True)
class Origin:
    """A version that an index was opened from or saved as. ``store`` is a :class:`places.Store` or a folder."""

    store: Any
    manifest: Manifest


class Check:
    """A check of a version's data files against its manifest, which runs in background threads."""

    def __init__(
        self,
        files: StoreFiles,
        manifest: Manifest,
        verify: Verify = "full",
        verified: Collection[DataFile] = (),
    ) -> None:
        """Start the check.

        With ``verify="full"``, the size and SHA-256 of every file are compared with the manifest. With ``"fast"``, the
        SHA-256 is only compared for files of up to 4 MiB, so a change that keeps the size of a larger file is not
        detected. Files in ``verified`` are skipped. Raises UsageError if ``verify`` has another value.
        """
        check_choice("verify", verify, Verify)
        self.manifest = manifest
        self.verify = verify
        wanted = [file for file in manifest.digested if file not in verified]
        pool = ThreadPoolExecutor(min(len(wanted), 16) or 1, thread_name_prefix="check")
        self._problems = [pool.submit(files.problem, file, verify == "full") for file in wanted]
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until all files are verified. Raises StoreError naming the first file that differs from the manifest."""
        for future in self._problems:
            if problem := future.result():
                raise StoreError(
                    f"{problem}; restore the file or an earlier version, or build the index again"
                )


def created() -> dict[str, Any]:
    """Return the entries of a new manifest that contain the time and the program version."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created_at": now, "created_by": f"retrieval-tip {__version__}"}


def made_now(manifest: Manifest) -> bool:
    """Return whether a version was made in the current minute."""
    minute = slice(len("2026-11-30T12:00"))
    return bool(manifest.created_at[minute] == created()["created_at"][minute])


def changed_meanwhile(place: object) -> ConflictError:
    """Return the error for a store that another process has changed since this process has read it."""
    return ConflictError(f"{place}: changed meanwhile; run again")


def entry(kind: str, rows: int, size: int, digest: str) -> DataFile:
    """Return the entry of a data file in a manifest."""
    return DataFile(f"data/{kind}-{digest[:16]}{SUFFIXES[kind]}", rows, size, digest)


def sizes_of(manifest: Manifest) -> dict[str, int]:
    """Return the sizes of the data files of a version in bytes, by name."""
    return {file.name: file.bytes for file in manifest.data_files}


def paths_in(folder: Path) -> list[Path]:
    """List a folder. The list is empty if the folder is missing."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _reserved(path: Path, shape: tuple[int, int], dtype: npt.DTypeLike) -> np.memmap[Any, Any]:
    path.touch()
    with open(
        path, "rb+", opener=open_shared
    ) as file:  # so that it can be renamed while it is mapped
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        array = np.memmap(file, dtype, "r+", file.tell(), shape)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), array.offset, array.nbytes)
        else:  # on macOS, space is only reserved by writing
            file.seek(array.offset)
            for at in range(0, array.nbytes, len(_ZEROS)):
                file.write(_ZEROS[: array.nbytes - at])
    return array


def _remove_own(folder: Path) -> None:
    """Remove the files that a failed first version left behind. Only call this while you hold the lock."""
    with suppress(OSError):
        for empty in (folder / "manifests", folder / "data"):
            if empty.exists():
                empty.rmdir()
        (folder / "lock").unlink()
