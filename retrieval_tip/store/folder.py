"""Read an index folder: immutable data files and a manifest that names them.

Readers see the old version or the new one, never a mixture.

manifest.json             current version, replaced by one rename
manifests/000003.json     earlier versions, until they are deleted
data/keys-<digest>.npy    data/index-<digest>.faiss    data/labels-<digest>.parquet    data/text-<digest>.npy
data/keys-<digest>.npy    data/labels-<digest>.parquet                                          for each added segment
data/values-<digest>.npy  data/weights-<digest>.safetensors  data/curve-<digest>.parquet       in a fine-tuned index
data/metric-<digest>.npy  data/points-<digest>.npy  data/sums-<digest>.npy                     in a fitted index
lock                      held by the writing process
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
from safetensors import SafetensorError, safe_open

from retrieval_tip.errors import StoreError, first_line
from retrieval_tip.files import sha256_of
from retrieval_tip.settings import Verify, check_choice
from retrieval_tip.store.history import described, history_table
from retrieval_tip.store.labels import LABEL_SCHEMA
from retrieval_tip.store.manifest import DataFile, Manifest
from retrieval_tip.store.query import TIMEOUT, ask

T = TypeVar("T")

VERSIONS_TRIED = 16
"""Attempts to open an index whose version is deleted meanwhile."""
FAST_BYTES = 1 << 22
"""Maximum size in bytes of files that a fast check hashes; of larger files, it only compares the size."""
MANIFEST_BYTES = 1 << 28
"""Maximum size of a manifest in bytes; one with a million classes takes a tenth."""


def is_index(folder: Path) -> bool:
    """Return whether a folder holds an index, valid or damaged."""
    try:
        return (folder / "manifest.json").is_file()
    except OSError as error:  # an unreadable folder counts as an index, so that no first version overwrites it
        return error.errno != errno.ENAMETOOLONG


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the current version. Raises StoreError if there is none or it is damaged."""
    check_name(folder)
    path = folder / "manifest.json"
    try:
        manifest = Manifest.from_bytes(manifest_bytes(folder, path), str(path))
        if manifest.table is not None:
            raise StoreError(f"{path}: is the manifest of a LanceDB store; restore the folder's own")
        return manifest
    except FileNotFoundError:
        raise _missing(folder) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def check_there(folder: Path) -> None:
    """Raise StoreError if a folder holds no index, without reading it."""
    if not is_index(folder):
        raise _missing(folder)


def _missing(folder: Path) -> StoreError:
    what = "no such folder" if not folder.exists() else "not an index (no manifest.json)"
    return StoreError(f"{folder}: {what}; make one with retrieval-tip index build SOURCE --out INDEX")


def read_version(folder: Path, version: int) -> Manifest:
    """Read the manifest of the current or an earlier version. Raises StoreError if it is missing or damaged."""
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
    """Read a manifest's bytes. Raises StoreError if it is a link out of the folder, not a file, or too large."""
    if not lies_in(folder, path):
        raise StoreError(f"{path}: is a link that leads out of the index; replace it by the file itself")
    if not stat.S_ISREG(path.stat().st_mode):  # a single call, because it may be deleted between two
        raise StoreError(f"{path}: is not a file; restore it")  # a pipe would block
    with path.open("rb") as file:
        raw = file.read(MANIFEST_BYTES + 1)
    if len(raw) > MANIFEST_BYTES:
        raise StoreError(f"{path}: damaged (too large for a manifest); restore it, or build the index again")
    return raw


def lies_in(folder: Path, path: Path) -> bool:
    """Return whether a path stays in the folder when all links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return False


class Check:
    """Comparison of a version's data files with its manifest, in background threads.

    Imports and other work can proceed meanwhile, because hashing releases the interpreter's lock.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | None = None,
        verify: Verify = "full",
        known: Collection[DataFile] = (),
    ) -> None:
        """Start the check, of the current version by default.

        ``verify`` ``full`` compares the size and SHA-256 of every file. ``fast`` compares the SHA-256 of files up to 4
        MiB only, so it misses changes in large files that keep their size. ``known`` files are skipped. Raises
        StoreError as :func:`read_manifest`, UsageError for another ``verify``.
        """
        check_choice("verify", verify, Verify)
        self.folder, self.verify = folder, verify
        self.manifest = read_manifest(folder) if manifest is None else manifest
        files = [file for file in self.manifest.data_files if file not in known]
        pool = ThreadPoolExecutor(min(len(files), 16) or 1, thread_name_prefix="check")
        self._problems = [pool.submit(_problem, folder, file, verify) for file in files]
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until all files are verified. Raises StoreError naming the first one that differs."""
        for future in self._problems:
            if problem := future.result():
                raise StoreError(f"{problem}; restore the file or an earlier version, or build the index again")


def opened(
    folder: Path, read: Callable[[Manifest], T], *, verify: Verify = "full", check: Check | None = None
) -> tuple[T, Check]:
    """Verify the current version, and return the result of ``read`` for it and the check.

    If a writer deletes that version meanwhile, this starts again with the new one. ``check`` is a check that is already
    running. Raises StoreError as :class:`Check`, and whatever ``read`` raises.
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
    """Memory-map a ``.npy`` file, copy-on-write so that torch can share it.

    Raises StoreError if it cannot be read, or has another shape or dtype.
    """
    path = folder / file.name
    try:
        array: npt.NDArray[np.floating] = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # damaged headers fail anywhere in numpy's parser
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(f"{path}: {array.dtype} {array.shape} does not match {shape} in the manifest")
    return array


def has_text(folder: Path, manifest: Manifest) -> bool:
    """Return whether a version has text weights other than zeros. Raises StoreError as :func:`read_array`."""
    return bool(read_array(folder, manifest.files["text"], (len(manifest.class_names), manifest.d)).any())


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """Read the label store of all segments as one table; a column that a segment lacks is null there.

    Raises StoreError if it does not match the manifest's keys and classes.
    """
    tables = [_read_labels(folder / part.labels.name, part.labels.rows, manifest) for part in manifest.segments]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise StoreError(f"{folder}: label columns of its segments differ ({first_line(error)})") from None
    ranges = [pc.min_max(part["key_id"]).as_py() for part in tables]
    if manifest.next_key_id is not None and ranges[-1]["max"] >= manifest.next_key_id:
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
    """Read the loss curve of a fine-tuning, one row per epoch. Raises StoreError if it does not match the manifest."""
    table = _read_table(folder / file.name)
    if len(table) != file.rows:
        raise StoreError(f"{folder / file.name}: has {len(table)} rows instead of {file.rows}")
    return table


def find_weights(folder: Path, file: DataFile) -> Path:
    """Find the safetensors file of a fine-tuned encoder. Raises StoreError if it does not match the manifest."""
    path = folder / file.name
    number = count_tensors(path)
    if number != file.rows:
        raise StoreError(f"{path}: has {number} tensors instead of {file.rows}")
    return path


def count_tensors(path: Path) -> int:
    """Count the tensors of a safetensors file by its header. Raises StoreError if it is not one."""
    try:
        with safe_open(path, framework="np") as file:
            return len(file.keys())
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read as safetensors ({first_line(error)})") from None


def _read_table(path: Path) -> pa.Table:
    try:
        # Not a Python file, whose buffers Arrow's threads may free after the interpreter ends. Not a path, because a
        # folder named x=1 would become a column x.
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file).read()
            table.validate(full=True)
            table.schema.names  # noqa: B018 - decodes them, which may fail
            return table
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None


def describe(folder: Path) -> dict[str, Any]:
    """Return what ``index info`` prints: the manifest, the keys per class, and the space on disk."""
    (manifest, labels), _ = opened(folder, lambda manifest: (manifest, read_labels(folder, manifest)), verify="fast")
    counts = np.bincount(labels["class_id"].to_numpy(), minlength=len(manifest.class_names))
    earlier = _before(folder, manifest)
    own = {file.name: file.bytes for file in manifest.data_files}
    held = {file.name: file.bytes for old in earlier for file in old.data_files}
    more = {
        "segments": len(manifest.segments),
        "not_indexed": manifest.n - manifest.files["keys"].rows,
        "bytes": sum(own.values()),
    }
    return described(folder, manifest, earlier, counts, **more) | {
        "bytes_of_earlier": sum(size for name, size in held.items() if name not in own)
    }


def history(folder: Path) -> pa.Table:
    """Return the kept versions, oldest first, as a table of :data:`labels.VERSIONS_SCHEMA`.

    Raises StoreError if a manifest is damaged.
    """
    current = read_manifest(folder)
    return history_table(_before(folder, current), current)


def query(folder: Path, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
    """Run a SELECT over the label store (:func:`query.ask`).

    Its tables are ``labels``, with the view ``class_counts``; ``versions`` (:func:`history`); ``curve``, the loss curve
    of a fine-tuned index, one row per epoch; and ``predictions``, if a file is given (:func:`read_predictions`).

    Raises UsageError if ``sql`` is not one SELECT, duckdb refuses it, or it takes more than ``timeout`` seconds or too
    much memory; StoreError if the index is damaged; InputError if the file does not hold predictions.
    """

    def read(manifest: Manifest) -> dict[str, pa.Table]:
        curve = {"curve": read_curve(folder, manifest.files["curve"])} if "curve" in manifest.files else {}
        return {"labels": read_labels(folder, manifest), "versions": history(folder)} | curve

    tables, _ = opened(folder, read)
    return ask(tables, sql, predictions, timeout)


def next_key_id(folder: Path, manifest: Manifest) -> int:
    """Return the first key id that no version up to ``manifest`` has used. Raises StoreError as read_labels."""
    if manifest.next_key_id is not None:
        return manifest.next_key_id
    return int(pc.max(read_labels(folder, manifest)["key_id"]).as_py()) + 1


def earlier_manifests(folder: Path) -> list[Manifest]:
    """Read the manifests of earlier versions, oldest first. Raises StoreError if one is damaged."""
    for _ in range(VERSIONS_TRIED):
        manifests = [_read_earlier(folder, path) for path in earlier_paths(folder)]
        if None not in manifests:  # else some were deleted meanwhile, and the others may have gaps
            break
    return [manifest for manifest in manifests if manifest is not None]


def _before(folder: Path, current: Manifest) -> list[Manifest]:
    """Read earlier manifests without a copy of the current one, which a writer may have put there."""
    return [manifest for manifest in earlier_manifests(folder) if manifest.version < current.version]


def check_earlier(folder: Path) -> None:
    """Verify the files of every earlier version. Raises StoreError as :class:`Check`."""
    known: set[DataFile] = set()
    for manifest in earlier_manifests(folder):
        try:
            Check(folder, manifest, known=known).wait()
        except StoreError:
            if (folder / "manifests" / manifest_name(manifest)).exists():  # else it was deleted meanwhile
                raise
        known |= set(manifest.data_files)


def earlier_paths(folder: Path) -> list[Path]:
    """List the manifest files of earlier versions, oldest first. Raises StoreError if they cannot be listed."""
    place = folder / "manifests"
    try:
        paths = [path for path in place.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]
    except FileNotFoundError:  # no earlier version
        return []
    except OSError as error:
        raise StoreError(f"{place}: cannot be read: {error.strerror}") from None
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _read_earlier(folder: Path, path: Path) -> Manifest | None:
    """Read the manifest of an earlier version; ``None`` if it was deleted."""
    try:
        return Manifest.from_bytes(manifest_bytes(folder, path), str(path), "delete earlier versions with index gc")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def manifest_name(manifest: Manifest) -> str:
    """Return the file name of a version's manifest in ``manifests``."""
    return f"{manifest.version:06d}.json"


def check_name(folder: Path) -> None:
    """Raise StoreError for a folder name that is not UTF-8."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(f"{shown}: the folder's name is not UTF-8, which FAISS needs; use another name") from None
