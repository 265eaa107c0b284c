"""Read an index folder, which contains immutable data files and a manifest that lists them.

Readers see either the old version or the new version, never a mixture of the two.

manifest.json             the current version, which is replaced with a single rename
manifests/000003.json     an earlier version, which is kept until it is deleted
data/keys-<digest>.npy    data/labels-<digest>.parquet    data/text-<digest>.npy    data/index-<digest>.faiss
data/values-<digest>.npy  data/curve-<digest>.parquet                                  in a fine-tuned index
data/metric-<digest>.npy  data/points-<digest>.npy  data/sums-<digest>.npy                     in a fitted index
lock                      locked by the process that is writing
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval_tip.errors import StoreError, first_line
from retrieval_tip.files import sha256_of
from retrieval_tip.settings import Verify, check_choice
from retrieval_tip.store.history import described, history_table
from retrieval_tip.store.labels import LABEL_SCHEMA
from retrieval_tip.store.manifest import DataFile, Manifest
from retrieval_tip.store.query import TIMEOUT, ask

T = TypeVar("T")

VERSIONS_TRIED = 16
"""Number of attempts to open an index if each version is deleted while it is being read."""
FAST_BYTES = 1 << 22
"""Maximum size in bytes of the files that a fast check hashes."""
MANIFEST_BYTES = 1 << 28
"""Maximum size of a manifest in bytes, about ten times the size of a manifest with a million classes."""


def is_index(folder: Path) -> bool:
    """Return whether a folder contains an index, even a damaged one."""
    try:
        return (folder / "manifest.json").is_file()
    except OSError as error:  # treat an unreadable folder as an index, so that it is not overwritten
        return error.errno != errno.ENAMETOOLONG


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the current version. Raises StoreError if the manifest is missing or damaged."""
    check_name(folder)
    path = folder / "manifest.json"
    try:
        manifest = Manifest.from_bytes(manifest_bytes(folder, path), str(path))
        if manifest.table is not None:
            raise StoreError(f"{path}: is the manifest of another kind of store; restore the manifest of the folder")
        return manifest
    except FileNotFoundError:
        raise _missing(folder) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def check_there(folder: Path) -> None:
    """Raise StoreError if a folder does not contain an index."""
    if not is_index(folder):
        raise _missing(folder)


def _missing(folder: Path) -> StoreError:
    what = "no such folder" if not folder.exists() else "not an index (no manifest.json)"
    return StoreError(f"{folder}: {what}; make one with retrieval-tip index build SOURCE --out INDEX")


def read_version(folder: Path, version: int) -> Manifest:
    """Read the manifest of a version. Raises StoreError if it is missing or damaged."""
    current = read_manifest(folder)
    if version == current.version:
        return current
    path = folder / "manifests" / f"{version:06d}.json"
    manifest = _read_earlier(folder, path)
    if manifest is None:
        stems = [path.stem for path in earlier_paths(folder) if path.name != manifest_name(current)]
        there = [*(int(stem) for stem in stems if stem.isdecimal()), current.version]
        raise StoreError(f"{folder}: has no version {version}; use one of {', '.join(map(str, there))}")
    return manifest


def manifest_bytes(folder: Path, path: Path) -> bytes:
    """Read a manifest as bytes.

    Raises StoreError if the path is not a regular file, leads out of the folder, or is too large.
    """
    if not lies_in(folder, path):
        raise StoreError(f"{path}: is a link that leads out of the index; replace it with the file itself")
    if not stat.S_ISREG(path.stat().st_mode):  # a single call, because the file may be deleted between two calls
        raise StoreError(f"{path}: is not a file; restore it")  # reading from a pipe would block
    with path.open("rb") as file:
        raw = file.read(MANIFEST_BYTES + 1)
    if len(raw) > MANIFEST_BYTES:
        raise StoreError(f"{path}: damaged (too large for a manifest); restore it, or build the index again")
    return raw


def lies_in(folder: Path, path: Path) -> bool:
    """Return whether a path is inside the folder after all links are resolved."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that points to itself
        return False


class Check:
    """A check of a version's data files against its manifest, which runs in background threads."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | None = None,
        verify: Verify = "full",
        known: Collection[DataFile] = (),
    ) -> None:
        """Start the check. ``manifest`` defaults to the manifest of the current version.

        With ``verify="full"``, the size and SHA-256 of every file are compared with the manifest. With ``"fast"``, the
        SHA-256 is only compared for files of up to 4 MiB, so a change that keeps the size of a larger file is not
        detected. Files in ``known`` are skipped. Raises UsageError if ``verify`` has another value, and StoreError if
        the manifest cannot be read.
        """
        check_choice("verify", verify, Verify)
        self.folder, self.verify = folder, verify
        self.manifest = read_manifest(folder) if manifest is None else manifest
        files = [file for file in self.manifest.data_files if file not in known]
        pool = ThreadPoolExecutor(min(len(files), 16) or 1, thread_name_prefix="check")
        self._problems = [pool.submit(_problem, folder, file, verify) for file in files]
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until all files are verified. Raises StoreError naming the first file that differs from the manifest."""
        for future in self._problems:
            if problem := future.result():
                raise StoreError(f"{problem}; restore the file or an earlier version, or build the index again")


def opened(
    folder: Path, read: Callable[[Manifest], T], *, verify: Verify = "full", check: Check | None = None
) -> tuple[T, Check]:
    """Verify the current version, call ``read`` with its manifest, and return the result together with the check.

    If a writer deletes the version in the meantime, the function is repeated with the new version. Pass ``check`` to
    use a check that is already running. Raises StoreError if a file is damaged.
    """
    for _ in range(VERSIONS_TRIED):
        check = check or Check(folder, verify=verify)
        try:
            check.wait()
            return read(check.manifest), check
        except StoreError:
            if read_manifest(folder) == check.manifest:
                raise
        verify, check = check.verify, None
    raise StoreError(f"{folder}: keeps changing while it is opened; try again")


def _problem(folder: Path, file: DataFile, verify: Verify) -> str | None:
    path = folder / file.name
    try:
        if not lies_in(folder, path):
            return f"{path}: is a link that leads out of the index"
        if path.stat().st_size != file.bytes:
            return f"{path}: damaged ({path.stat().st_size:,} bytes instead of {file.bytes:,})"
        if (verify == "full" or file.bytes <= FAST_BYTES) and sha256_of(path) != file.sha256:
            return f"{path}: damaged (its SHA-256 does not match the manifest)"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None


def read_array(
    folder: Path, file: DataFile, shape: tuple[int, int], dtypes: Sequence[npt.DTypeLike] = (np.float32, np.float16)
) -> npt.NDArray[np.floating]:
    """Memory-map a ``.npy`` file in copy-on-write mode, so that torch can share the memory.

    Raises StoreError if the file cannot be read or if its shape or dtype is wrong.
    """
    path = folder / file.name
    try:
        array: npt.NDArray[np.floating] = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # a damaged header can make numpy raise any error
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(f"{path}: an array of {array.dtype} {array.shape} does not match {shape} in the manifest")
    return array


def has_text(folder: Path, manifest: Manifest) -> bool:
    """Return whether a version has any text weight that is not zero."""
    return bool(read_array(folder, manifest.files["text"], (len(manifest.class_names), manifest.d)).any())


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """Read the label store. Format 7 may have several segments. If one of them lacks a column, its values are null.

    Raises StoreError if the labels do not match the manifest.
    """
    tables = [_read_labels(folder / part.labels.name, part.labels.rows, manifest) for part in manifest.segments]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise StoreError(f"{folder}: label columns of its segments differ ({first_line(error)})") from None
    ranges = [pc.min_max(part["key_id"]).as_py() for part in tables]
    if ranges[-1]["max"] >= manifest.next_key_id:
        raise StoreError(
            f"{folder / 'manifest.json'}: its next_key_id is already in use; restore it, or build the index again"
        )
    if any(one["max"] >= next_one["min"] for one, next_one in itertools.pairwise(ranges)):
        raise StoreError(f"{folder}: key ids of its segments do not ascend; restore it, or build the index again")
    return table


def _read_labels(path: Path, rows: int, manifest: Manifest) -> pa.Table:
    table = _read_table(path)
    own = table.schema.names[: len(LABEL_SCHEMA)] == LABEL_SCHEMA.names and all(
        table.schema.field(i).type == LABEL_SCHEMA.field(i).type for i in range(len(LABEL_SCHEMA))
    )
    if not own or len(table) != rows or any(table[name].null_count for name in ("key_id", "class_id", "label")):
        raise StoreError(f"{path}: does not match the manifest's {rows} keys")
    ids = table["class_id"].to_numpy()
    if ids.min() < 0 or ids.max() >= len(manifest.class_names) or (ids[1:] < ids[:-1]).any():
        raise StoreError(f"{path}: class ids are out of range or not grouped by class")
    return table


def read_curve(folder: Path, file: DataFile) -> pa.Table:
    """Read the loss curve of a fine-tuned index, which has one row per epoch.

    Raises StoreError if it does not match the manifest.
    """
    table = _read_table(folder / file.name)
    if len(table) != file.rows:
        raise StoreError(f"{folder / file.name}: has {len(table)} rows instead of {file.rows}")
    return table


def _read_table(path: Path) -> pa.Table:
    try:
        # Do not pass a Python file: Arrow's threads may free its buffers after the interpreter has shut down.
        # Do not pass a path: a folder named x=1 would become a column x.
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file).read()
            table.validate(full=True)
            table.schema.names  # noqa: B018 - decodes the names, which may fail
            return table
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None


def describe(folder: Path) -> dict[str, Any]:
    """Return the facts that ``index info`` prints, including the disk usage."""
    (manifest, labels), _ = opened(folder, lambda manifest: (manifest, read_labels(folder, manifest)), verify="fast")
    counts = np.bincount(labels["class_id"].to_numpy(), minlength=len(manifest.class_names))
    earlier = _before(folder, manifest)
    own = {file.name: file.bytes for file in manifest.data_files}
    held = {file.name: file.bytes for old in earlier for file in old.data_files}
    return described(folder, manifest, earlier, counts, bytes=sum(own.values())) | {
        "bytes_of_earlier": sum(size for name, size in held.items() if name not in own)
    }


def history(folder: Path) -> pa.Table:
    """Return the kept versions as a table with the columns of :data:`labels.VERSIONS_SCHEMA`, oldest version first.

    Raises StoreError if a manifest is damaged.
    """
    current = read_manifest(folder)
    return history_table(_before(folder, current), current)


def query(folder: Path, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
    """Run a SELECT query over the label store. See :func:`query.ask` for details and errors.

    You can query the table ``labels``, its view ``class_counts`` and the table ``versions`` (see :func:`history`). A
    fine-tuned index also has the table ``curve``, which contains the loss of each epoch. If you give a file of
    predictions, it becomes the table ``predictions``.

    Raises StoreError if the index is damaged.
    """

    def read(manifest: Manifest) -> dict[str, pa.Table]:
        curve = {"curve": read_curve(folder, manifest.files["curve"])} if "curve" in manifest.files else {}
        return {"labels": read_labels(folder, manifest), "versions": history(folder)} | curve

    tables, _ = opened(folder, read)
    return ask(tables, sql, predictions, timeout)


def earlier_manifests(folder: Path) -> list[Manifest]:
    """Read the manifests of earlier versions, oldest first. Raises StoreError if a manifest is damaged."""
    for _ in range(VERSIONS_TRIED):
        manifests = [_read_earlier(folder, path) for path in earlier_paths(folder)]
        if None not in manifests:  # otherwise some were deleted in the meantime, and versions may be missing
            break
    return [manifest for manifest in manifests if manifest is not None]


def _before(folder: Path, current: Manifest) -> list[Manifest]:
    return [manifest for manifest in earlier_manifests(folder) if manifest.version < current.version]


def check_earlier(folder: Path) -> None:
    """Verify the files of every earlier version. Raises StoreError if a file is missing or damaged."""
    known: set[DataFile] = set()
    for manifest in earlier_manifests(folder):
        try:
            Check(folder, manifest, known=known).wait()
        except StoreError:
            if (folder / "manifests" / manifest_name(manifest)).exists():  # otherwise it was deleted in the meantime
                raise
        known |= set(manifest.data_files)


def earlier_paths(folder: Path) -> list[Path]:
    """List the manifest files of earlier versions, oldest first."""
    place = folder / "manifests"
    try:
        paths = [path for path in place.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]
    except FileNotFoundError:  # there is no earlier version
        return []
    except OSError as error:
        raise StoreError(f"{place}: cannot be read: {error.strerror}") from None
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _read_earlier(folder: Path, path: Path) -> Manifest | None:
    try:
        remedy = "delete earlier versions with index gc"
        return Manifest.from_bytes(manifest_bytes(folder, path), str(path), remedy, remedy)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def manifest_name(manifest: Manifest) -> str:
    """Return the file name of a version's manifest in the folder ``manifests``."""
    return f"{manifest.version:06d}.json"


def check_name(folder: Path) -> None:
    """Raise StoreError if the name of a folder is not valid UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(f"{shown}: the folder's name is not UTF-8, which FAISS needs; use another name") from None
