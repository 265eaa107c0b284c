"""One index is one folder: immutable data files and a manifest that names them.

Readers see the old version or the new one, never half of one.

manifest.json             the current version, replaced by one rename
manifests/000003.json     earlier versions, until they are collected
data/keys-<digest>.npy    data/index-<digest>.faiss    data/labels-<digest>.parquet    data/text-<digest>.npy
data/keys-<digest>.npy    data/labels-<digest>.parquet                                   of each segment that was added
data/values-<digest>.npy  data/weights-<digest>.safetensors  data/curve-<digest>.parquet       where it was fine-tuned
data/metric-<digest>.npy  data/points-<digest>.npy  data/sums-<digest>.npy                     where it was fitted
lock                      held by the process that writes
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
"""Times that opening an index starts anew because its version was given up meanwhile."""
FAST_BYTES = 1 << 22
"""Files up to this size are hashed whatever is asked for; a fast check takes larger ones by their size."""
MANIFEST_BYTES = 1 << 28
"""A manifest that is larger was not written here: a million classes take a tenth."""


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index (in whatever state)."""
    try:
        return (folder / "manifest.json").is_file()
    except OSError as error:  # else it is one, as far as can be told: nobody is to write a first version over it
        return error.errno != errno.ENAMETOOLONG


def read_manifest(folder: Path) -> Manifest:
    """The current version of an index. Raises StoreError where the folder is not one, or the manifest is damaged."""
    check_name(folder)
    path = folder / "manifest.json"
    try:
        manifest = Manifest.from_bytes(manifest_bytes(folder, path), str(path))
        if manifest.table is not None:
            raise StoreError(f"{path}: is the manifest of another kind of store; restore the folder's own")
        return manifest
    except FileNotFoundError:
        raise _missing(folder) from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def check_there(folder: Path) -> None:
    """Raise StoreError where there is no index, which is then not read."""
    if not is_index(folder):
        raise _missing(folder)


def _missing(folder: Path) -> StoreError:
    what = "no such folder" if not folder.exists() else "not an index (no manifest.json)"
    return StoreError(f"{folder}: {what}; retrieval-tip index build SOURCE --out INDEX makes one")


def read_version(folder: Path, version: int) -> Manifest:
    """The current or an earlier version of an index. Raises StoreError where it is not there or damaged."""
    current = read_manifest(folder)
    if version == current.version:
        return current
    path = folder / "manifests" / f"{version:06d}.json"
    manifest = _read_earlier(folder, path)
    if manifest is None:
        stems = [path.stem for path in earlier_paths(folder) if path.name != manifest_name(current)]
        there = [*(int(stem) for stem in stems if stem.isdecimal()), current.version]
        raise StoreError(f"{folder}: has no version {version}; there are {', '.join(map(str, there))}")
    return manifest


def manifest_bytes(folder: Path, path: Path) -> bytes:
    """A manifest's bytes. Raises StoreError where it is a link that leads out of the folder, or cannot be one."""
    if not lies_in(folder, path):
        raise StoreError(f"{path}: is a link that leads out of the index; put the file itself there")
    if not stat.S_ISREG(path.stat().st_mode):  # one look: between two it may be given up
        raise StoreError(f"{path}: is not a file; restore it")  # a pipe would wait for ever
    with path.open("rb") as file:
        raw = file.read(MANIFEST_BYTES + 1)
    if len(raw) > MANIFEST_BYTES:
        raise StoreError(f"{path}: damaged (too large for a manifest); restore it, or build the index again")
    return raw


def lies_in(folder: Path, path: Path) -> bool:
    """Whether a path is in the folder also when all links are followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link to itself leads nowhere
        return False


class Check:
    """The comparison of every data file of one version of an index with its manifest, begun in threads of its own.

    What takes long meanwhile, like an import, costs no time: hashing holds no lock of the interpreter.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest | None = None,
        verify: Verify = "full",
        known: Collection[DataFile] = (),
    ) -> None:
        """Begin, with the current version where none is given.

        ``verify`` ``full`` compares the size and SHA-256 of every file; ``fast`` the SHA-256 of small files only, up to
        4 MiB: what changed in a large one without changing its size is then not seen. Files that are ``known`` were
        compared before. Raises StoreError as :func:`read_manifest`, UsageError for another ``verify``.
        """
        check_choice("verify", verify, Verify)
        self.folder, self.verify = folder, verify
        self.manifest = read_manifest(folder) if manifest is None else manifest
        files = [file for file in self.manifest.data_files if file not in known]
        pool = ThreadPoolExecutor(min(len(files), 16) or 1, thread_name_prefix="check")
        self._problems = [pool.submit(_problem, folder, file, verify) for file in files]
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Return when every file is as the manifest says. Raises StoreError naming the first that is not."""
        for future in self._problems:
            if problem := future.result():
                raise StoreError(f"{problem}; restore it, go back to a version before it, or build the index again")


def opened(
    folder: Path, read: Callable[[Manifest], T], *, verify: Verify = "full", check: Check | None = None
) -> tuple[T, Check]:
    """The result of ``read`` for the current version once its files are checked, and that check.

    Where a writer gives that version up meanwhile, it is done again with the one that is current then. ``check`` is one
    that was begun before. Raises StoreError as :class:`Check`, and what ``read`` raises.
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
    raise StoreError(f"{folder}: changes faster than it can be opened; try again")


def _problem(folder: Path, file: DataFile, verify: Verify) -> str | None:
    """The fault of a data file, if it has one."""
    path = folder / file.name
    try:
        if not lies_in(folder, path):
            return f"{path}: is a link that leads out of the index"
        if path.stat().st_size != file.bytes:
            return f"{path}: damaged (has {path.stat().st_size:,} bytes, the manifest says {file.bytes:,})"
        if (verify == "full" or file.bytes <= FAST_BYTES) and sha256_of(path) != file.sha256:
            return f"{path}: damaged (its SHA-256 is not the manifest's)"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None


def read_array(
    folder: Path, file: DataFile, shape: tuple[int, int], dtypes: Sequence[npt.DTypeLike] = (np.float32, np.float16)
) -> npt.NDArray[np.floating]:
    """A ``.npy`` file of an index, memory-mapped (copy on write, so that torch takes it without a copy).

    Raises StoreError where it cannot be read, or is not of this shape and one of these dtypes.
    """
    path = folder / file.name
    try:
        array: npt.NDArray[np.floating] = np.lib.format.open_memmap(path, mode="c")  # what it maps it does not unpickle
    except Exception as error:  # damaged headers fail anywhere in numpy's parser
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None
    if array.shape != shape or array.dtype not in dtypes:
        raise StoreError(f"{path}: {array.dtype} {array.shape} does not fit the manifest ({shape})")
    return array


def has_text(folder: Path, manifest: Manifest) -> bool:
    """Whether a version has text weights that are not all zero. Raises StoreError as :func:`read_array`."""
    return bool(read_array(folder, manifest.files["text"], (len(manifest.class_names), manifest.d)).any())


def read_labels(folder: Path, manifest: Manifest) -> pa.Table:
    """The label store as a table, the segments one after the other; columns that one lacks are null there.

    Raises StoreError where it does not describe the manifest's keys and classes.
    """
    tables = [_read_labels(folder / part.labels.name, part.labels.rows, manifest) for part in manifest.segments]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise StoreError(f"{folder}: labels of its segments differ ({first_line(error)})") from None
    ranges = [pc.min_max(part["key_id"]).as_py() for part in tables]
    if manifest.next_key_id is not None and ranges[-1]["max"] >= manifest.next_key_id:
        raise StoreError(
            f"{folder / 'manifest.json'}: its next_key_id was given to a key; restore it, or build the index again"
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
        raise StoreError(f"{path}: does not describe the {rows} keys of the manifest")
    ids = table["class_id"].to_numpy()
    if ids.min() < 0 or ids.max() >= len(manifest.class_names) or (ids[1:] < ids[:-1]).any():
        raise StoreError(f"{path}: class ids are out of range or not grouped by class")
    return table


def read_curve(folder: Path, file: DataFile) -> pa.Table:
    """The loss curve of a fine-tuning, a row an epoch. Raises StoreError where it is not what the manifest says."""
    table = _read_table(folder / file.name)
    if len(table) != file.rows:
        raise StoreError(f"{folder / file.name}: has {len(table)} rows, the manifest says {file.rows}")
    return table


def find_weights(folder: Path, file: DataFile) -> Path:
    """The safetensors file of a fine-tuned encoder. Raises StoreError where it is not what the manifest says."""
    path = folder / file.name
    number = count_tensors(path)
    if number != file.rows:
        raise StoreError(f"{path}: holds {number} tensors, the manifest says {file.rows}")
    return path


def count_tensors(path: Path) -> int:
    """The number of tensors in a safetensors file; only its header is read. Raises StoreError where it is none."""
    try:
        with safe_open(path, framework="np") as file:
            return len(file.keys())
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read as safetensors ({first_line(error)})") from None


def _read_table(path: Path) -> pa.Table:
    try:
        # A file of Arrow's: buffers of a Python file are freed by its threads, even while the interpreter ends. And not
        # just the path: then a folder named x=1 would become a column x.
        with pa.OSFile(os.fsencode(path)) as file:
            table = pq.ParquetFile(file).read()
            table.validate(full=True)
            table.schema.names  # noqa: B018 - which are decoded when they are asked for
            return table
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({first_line(error)})") from None


def describe(folder: Path) -> dict[str, Any]:
    """The facts that ``index info`` prints: the manifest, the keys a class, and the space on disk."""
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
    """The versions of an index that are kept, oldest first: a table of :data:`labels.VERSIONS_SCHEMA`.

    Raises StoreError where one of them is damaged.
    """
    current = read_manifest(folder)
    return history_table(_before(folder, current), current)


def query(folder: Path, sql: str, predictions: Path | None = None, timeout: float = TIMEOUT) -> pa.Table:
    """The answer of a SELECT over the label store (:func:`query.ask`): table ``labels`` and view ``class_counts``.

    Further tables: ``versions`` (:func:`history`), ``curve`` of a fine-tuned index that has the loss curve of its
    training, a row an epoch, and ``predictions``, where a file of them is given (:func:`read_predictions`).

    Raises UsageError where the statement is not one SELECT, duckdb refuses it, or it takes longer than ``timeout``
    seconds or too much memory; StoreError where the index is damaged; InputError where the file is none of predictions.
    """

    def read(manifest: Manifest) -> dict[str, pa.Table]:
        curve = {"curve": read_curve(folder, manifest.files["curve"])} if "curve" in manifest.files else {}
        return {"labels": read_labels(folder, manifest), "versions": history(folder)} | curve

    tables, _ = opened(folder, read)
    return ask(tables, sql, predictions, timeout)


def next_key_id(folder: Path, manifest: Manifest) -> int:
    """The first key id that was never given up to a version, as far as it says. Raises StoreError as read_labels."""
    if manifest.next_key_id is not None:
        return manifest.next_key_id
    return int(pc.max(read_labels(folder, manifest)["key_id"]).as_py()) + 1


def earlier_manifests(folder: Path) -> list[Manifest]:
    """The earlier versions that are kept, oldest first. Raises StoreError where one is damaged."""
    for _ in range(VERSIONS_TRIED):
        manifests = [_read_earlier(folder, path) for path in earlier_paths(folder)]
        if None not in manifests:  # else some were given up meanwhile, and those that were read may have gaps
            break
    return [manifest for manifest in manifests if manifest is not None]


def _before(folder: Path, current: Manifest) -> list[Manifest]:
    """The same without the current one, which a writer at work, or one that was killed, has put there too."""
    return [manifest for manifest in earlier_manifests(folder) if manifest.version < current.version]


def check_earlier(folder: Path) -> None:
    """Compare the files of every earlier version with its manifest. Raises StoreError as :class:`Check`."""
    known: set[DataFile] = set()
    for manifest in earlier_manifests(folder):
        try:
            Check(folder, manifest, known=known).wait()
        except StoreError:
            if (folder / "manifests" / manifest_name(manifest)).exists():  # else it was given up meanwhile
                raise
        known |= set(manifest.data_files)


def earlier_paths(folder: Path) -> list[Path]:
    """The manifests of earlier versions, oldest first. Raises StoreError where they cannot be listed."""
    place = folder / "manifests"
    try:
        paths = [path for path in place.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]
    except FileNotFoundError:  # it goes with the last of them
        return []
    except OSError as error:
        raise StoreError(f"{place}: cannot be read: {error.strerror}") from None
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def _read_earlier(folder: Path, path: Path) -> Manifest | None:
    """The manifest of an earlier version; ``None`` where it was given up, even just now."""
    try:
        return Manifest.from_bytes(manifest_bytes(folder, path), str(path), "index gc gives earlier versions up")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def manifest_name(manifest: Manifest) -> str:
    """The file of a version's manifest, once there is a later one."""
    return f"{manifest.version:06d}.json"


def check_name(folder: Path) -> None:
    """Raise StoreError for a name that no index folder can have."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode("utf-8", "backslashreplace").decode()
        raise StoreError(f"{shown}: the folder's name is not UTF-8, which FAISS needs; give another one") from None
