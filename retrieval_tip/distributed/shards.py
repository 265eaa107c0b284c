"""Input shards of a source, the unit of work and of resuming: the same source gives the same shards.

- images, by path: so many of them, with their labels
- a Parquet table, of features or of paths: so many rows, read by the row groups that hold them
- a webdataset tar (``.tar``, ``.tar.gz``, ``.tgz``): one shard each; members ``key.jpg`` with ``key.cls`` and so on

All of them also on an object store, ``s3://``, ``gs://`` or ``az://``.
"""

from __future__ import annotations

import base64
import fnmatch
import glob
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from retrieval_tip.data import images, remote
from retrieval_tip.data.sources import (
    MAX_TEXT,
    Source,
    feature_column,
    is_parts,
    open_inputs,
    open_items,
    open_parquet,
    open_rows,
    open_source,
    table_files,
)
from retrieval_tip.errors import InputError, Skipped, UsageError, first_line, show

IMAGES, ROWS = 256, 16_384
"""Items of a shard by default: images, and rows of a feature table."""
TARS = (".tar", ".tar.gz", ".tgz")
LABELS = ("cls", "json", "txt")
"""Members that label an image, the one that counts first."""
MAX_LABEL_BYTES = 1 << 20
"""Of a member that holds a label: a larger one is something else."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A part of a source, as small as its description: what a worker opens by itself.

    ``kind``: ``images`` (``paths``, and ``items`` as base64 of an Arrow stream), ``rows`` ``first`` to ``last`` of the
    Parquet file ``place``, or the tar ``place``. ``stamp`` says which file it was: size, and time or tag.
    """

    number: int
    kind: str
    place: str
    first: int = 0
    last: int = 0
    features: bool = False
    paths: list[str] = field(default_factory=list, repr=False)
    items: str = field(default="", repr=False)
    root: str | None = None
    labelled: bool = False
    stamp: str = ""

    def to_json(self) -> str:
        """Text of ASCII, whatever bytes its names are made of."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """The inverse of :meth:`to_json`."""
        return cls(**json.loads(text))

    def __str__(self) -> str:
        rows = f" rows {self.first} to {self.last}" if self.kind == "rows" else f" ({len(self.paths)} images)"
        return f"{show(self.place)}{'' if self.kind == 'tar' else rows}"


@dataclass(frozen=True)
class OpenShard:
    """A shard that can be read: its items, how to get an image's bytes, and what of it is lost already."""

    source: Source
    read: Callable[[str], bytes]
    failed: list[Skipped]


def digest(shards: Sequence[Shard]) -> str:
    """SHA-256 of what the shards are: another source, other files in it or another cut give another."""
    sha256 = hashlib.sha256()
    for shard in shards:
        sha256.update(shard.to_json().encode() + b"\n")
    return sha256.hexdigest()


def cut(
    path: str | os.PathLike[str],
    *,
    labelled: bool = False,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
) -> list[Shard]:
    """Input shards of a source, which is anything that :func:`open_items` takes, tars, or the URL of any of them.

    Of a folder with tars, and of a pattern like ``shards-*.tar``, each tar is a shard, in name order. ``size`` items
    are in a shard otherwise (the last one has fewer), by default ``IMAGES`` images or ``ROWS`` rows of features.
    ``labelled``: every item needs a label.

    Raises as :func:`open_source`; InputError where there is nothing; UsageError for ``size`` below 1.
    """
    if size is not None and size < 1:
        raise UsageError(f"--shard-size {size}: at least 1 is needed")
    where = os.fspath(path)
    base = None if root is None else os.fspath(root)
    tars = _tars(where)
    if tars:
        return numbered(Shard(0, "tar", tar, labelled=labelled, stamp=_stamp(tar)) for tar in tars)
    if _is_parquet(where):
        files = table_files(where)
        return numbered(shard for file in files for shard in _cut_rows(os.fspath(file), base, labelled, size))
    if remote.is_remote(where):
        return cut_source(_remote_images(where, labelled), size)
    return cut_source((open_source if labelled else open_items)(where, split=split, root=base), size)


def cut_source(source: Source, size: int | None = None) -> list[Shard]:
    """Input shards of a source that is open already: its images, or the rows of its table where it takes all of them.

    Raises UsageError for some rows of a feature table.
    """
    if source.paths is None:
        assert source.table is not None
        shards = numbered(
            s for file in table_files(source.table) for s in _cut_rows(os.fspath(file), None, False, size)
        )
        if sum(shard.last - shard.first for shard in shards) != len(source):
            raise UsageError(f"{source.name}: only all rows of a feature table can be cut into shards")
        return shards
    size = size or IMAGES
    shards = []
    for first in range(0, len(source), size):
        part = source.items.slice(first, size)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part.combine_chunks())
        items = base64.b64encode(sink.getvalue()).decode()
        paths = list(source.paths[first : first + size])
        shards.append(Shard(0, "images", source.name, first, first + len(part), paths=paths, items=items))
    return numbered(shards)


def cut_inputs(arguments: Iterable[str], stdin: Iterable[str] = (), size: int | None = None) -> list[Shard]:
    """Input shards of the things that ``classify`` takes, as :func:`open_inputs` has them, of tars and of URLs.

    Raises as that and as :func:`cut`.
    """
    shards: list[Shard] = []
    waiting: list[str] = []

    def flush() -> None:
        for source in open_inputs(waiting, stdin):
            shards.extend(cut_source(source, size))
        waiting.clear()

    for argument in arguments:
        if argument != "-" and (remote.is_remote(argument) or _tars(argument) or _is_parquet(argument)):
            flush()
            shards += cut(argument, size=size)
        else:
            waiting.append(argument)
    flush()
    return numbered(shards)


def numbered(shards: Any) -> list[Shard]:
    """Shards with their numbers from 0 on."""
    return [replace(shard, number=number) for number, shard in enumerate(shards)]


@contextmanager
def open_shard(shard: Shard) -> Iterator[OpenShard]:
    """A shard to read. Raises InputError where a table cannot be read; what is wrong with a tar is in ``failed``."""
    with ExitStack() as stack:
        if shard.kind == "tar":
            yield _open_tar(shard, stack)
        elif shard.kind == "rows":
            place = shard.place if remote.is_remote(shard.place) else Path(shard.place)
            source = open_rows(place, shard.first, shard.last, root=shard.root, labelled=shard.labelled)
            yield OpenShard(source, read, [])
        else:
            with pa.ipc.open_stream(base64.b64decode(shard.items)) as stream:
                items = stream.read_all()
            yield OpenShard(Source(shard.place, items, (), tuple(shard.paths)), read, [])


def read(path: str) -> bytes:
    """The bytes of an image, here or on an object store. Raises InputError as :func:`images.read`."""
    if not remote.is_remote(path):
        return images.read(path)
    system = remote.system_of(path)

    def fetch() -> bytes:
        images.admit(system.size(path))
        return bytes(system.cat_file(path))

    try:
        data = remote.attempt(path, fetch)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ")) from None
    if not data:
        raise InputError("empty file")
    return bytes(data)


def _cut_rows(file: str, root: str | None, labelled: bool, size: int | None) -> Iterator[Shard]:
    parquet = open_parquet(file if remote.is_remote(file) else Path(file))
    features = feature_column(parquet.schema_arrow) is not None
    step = size or (ROWS if features else IMAGES)
    stamp, number = _stamp(file), parquet.metadata.num_rows
    for first in range(0, number, step):
        last = min(first + step, number)
        yield Shard(0, "rows", file, first, last, features, root=root, labelled=labelled, stamp=stamp)


def _is_parquet(where: str) -> bool:
    if where.lower().endswith(".parquet"):
        return remote.is_remote(where) or os.path.isfile(where)
    if remote.is_remote(where):
        run = f"{where.rstrip('/')}/run.json"
        return bool(remote.attempt(where, lambda: remote.system_of(where).exists(run)))
    return is_parts(where)


def _tars(where: str) -> list[str]:
    """The tars that a path, a pattern or a folder stands for, in name order; none where it is something else."""
    if remote.is_remote(where):
        if where.lower().endswith(TARS) and not glob.has_magic(where):
            return [where]
        below = where.rpartition("/")[0] if glob.has_magic(where) else where.rstrip("/")
        names = [f"{below}/{name.rpartition('/')[2]}" for name in _listed(below)]
        pattern = where if glob.has_magic(where) else f"{glob.escape(below)}/*"
        return sorted(name for name in names if name.lower().endswith(TARS) and fnmatch.fnmatchcase(name, pattern))
    if os.path.isdir(where):
        with os.scandir(where) as entries:
            return sorted(e.path for e in entries if e.name.lower().endswith(TARS) and e.is_file())
    if not os.path.exists(where) and glob.has_magic(where):
        return sorted(place for place in glob.glob(where) if place.lower().endswith(TARS) and os.path.isfile(place))
    return [where] if where.lower().endswith(TARS) and os.path.isfile(where) else []


def _listed(folder: str) -> list[str]:
    system = remote.system_of(folder)
    try:
        return [str(name) for name in system.ls(folder, detail=False)]
    except FileNotFoundError:
        return []
    except Exception as error:
        raise InputError(f"{folder}: cannot be read: {first_line(error)}") from None


def _remote_images(folder: str, labelled: bool) -> Source:
    """The images below a folder of an object store; where they lie in folders of it, these are their labels."""
    system, scheme = remote.system_of(folder), folder.partition("://")[0]
    base = f"{scheme}://{folder.partition('://')[2].strip('/')}/"
    urls = [f"{scheme}://{name}" for name in sorted(remote.attempt(folder, lambda: system.find(folder)))]
    paths = [path for path in urls if Path(path).suffix.lower() in images.extensions() and path.startswith(base)]
    if not paths:
        raise InputError(f"{show(folder)}: no images, tars or Parquet file there")
    labels = [path.removeprefix(base).rpartition("/")[0].partition("/")[0] or None for path in paths]
    if labelled and None in labels:
        raise InputError(f"{show(paths[labels.index(None)])}: lies in no class folder of {show(folder)}")
    items: dict[str, Any] = {"source": [show(path) for path in paths]}
    if any(labels):
        items["label"] = pa.array(labels, pa.string())
    return Source(show(folder), pa.table(items), (), tuple(paths))


def _stamp(place: str) -> str:
    """The mark of a file: its size, and its tag or the time of its last change."""
    if remote.is_remote(place):
        facts = remote.attempt(place, lambda: remote.system_of(place).info(place))
        return f"{facts.get('size')} {facts.get('e_tag') or facts.get('last_modified')}"
    try:
        status = os.stat(place)
    except OSError as error:
        raise InputError(f"{show(place)}: {error.strerror}") from None
    return f"{status.st_size} {status.st_mtime_ns}"


@dataclass
class _Sample:
    """Members of one key: where the image's bytes are, and the label as far as there is one."""

    key: str
    name: str = ""
    start: int = 0
    size: int = 0
    labels: dict[str, bytes] = field(default_factory=dict)


def _open_tar(shard: Shard, stack: ExitStack) -> OpenShard:
    """The images of a tar as a source; names in it are names only, nothing is unpacked by them."""
    failed: list[Skipped] = []
    places: dict[str, tuple[int, int]] = {}
    labels: list[str | None] = []
    name = show(shard.place)
    try:
        file = _plain_tar(shard.place, stack)
        total = os.fstat(file.fileno()).st_size
        for sample in _samples(file, name, failed):
            if not sample.name:
                failed.append(Skipped(f"{name}/{sample.key}", "no image among the members of this key"))
                continue
            path = f"{name}/{sample.name}"
            try:
                label = _label(sample)
                if shard.labelled and label is None:
                    raise InputError(f"no label: none of {', '.join(f'.{kind}' for kind in LABELS)} beside it")
                if path in places:
                    raise InputError("this name stands twice in the tar")
                if sample.start + sample.size > total:
                    raise InputError("cut off: the tar ends within it")
            except InputError as error:
                failed.append(Skipped(path, str(error)))
                continue
            places[path] = sample.start, sample.size
            labels.append(label)
    except (OSError, EOFError, tarfile.TarError, InputError) as error:
        failed.append(Skipped(name, f"cannot be read as a tar: {first_line(error)}"))
        file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it

    def read_member(path: str) -> bytes:
        start, size = places[path]
        images.admit(size)
        data = os.pread(file.fileno(), size, start)  # several threads read at once
        if not data:
            raise InputError("empty file")
        return data

    items = {"source": pa.array(list(places), pa.string())}
    if any(label is not None for label in labels):
        items["label"] = pa.array(labels, pa.string())
    return OpenShard(Source(name, pa.table(items), (), tuple(places)), read_member, failed)


def _plain_tar(place: str, stack: ExitStack) -> BinaryIO:
    """The tar as a local file that is not compressed: itself, or a nameless copy of it."""
    packed = not place.lower().endswith(".tar")
    if not packed and not remote.is_remote(place):
        return stack.enter_context(Path(place).open("rb"))
    raw: Any = remote.opened(place) if remote.is_remote(place) else Path(place).open("rb")  # noqa: SIM115 - the stack closes it
    stack.enter_context(raw)
    file: BinaryIO = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    if packed:
        _unpack(raw, file)
    else:
        shutil.copyfileobj(raw, file, CHUNK)
    file.flush()
    file.seek(0)
    return file


def _unpack(raw: BinaryIO, file: BinaryIO) -> None:
    """Copy what was gzipped, as far as it is sound: where it ends too early, so does the tar, and that is said."""
    inflate = zlib.decompressobj(31)
    while data := raw.read(CHUNK):
        while data:
            try:
                file.write(inflate.decompress(data, CHUNK))
            except zlib.error as error:
                if not file.tell():
                    raise InputError(f"not gzip ({error})") from None
                return
            data = inflate.unconsumed_tail
            if inflate.eof:  # another one may follow, and zeros to fill a block
                data = inflate.unused_data.lstrip(b"\0")
                inflate = zlib.decompressobj(31)


def _samples(file: BinaryIO, name: str, failed: list[Skipped]) -> Iterator[_Sample]:
    """Neighbouring members of one key together, which is, as webdataset has it, what comes before a name's first dot.

    Damage ends the tar: what is after it is lost, and said.
    """
    sample: _Sample | None = None
    members = 0
    with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", ignore_zeros=False) as tar:
        while True:
            try:
                member = tar.next()
            except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
                failed.append(Skipped(name, f"damaged after {members} members: {first_line(error)}"))
                break
            if member is None:
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                    failed.append(Skipped(name, f"damaged or cut off after {members} members: no end mark there"))
                break
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps each of them, which adds up
            if not member.isreg() or member.issparse():
                continue
            members += 1
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key, kind = show(f"{folder}/{stem}" if folder else stem), kind.lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            if f".{kind}" in images.extensions():
                if sample.name:
                    failed.append(Skipped(f"{name}/{show(member.name)}", f"{sample.name} is the image of this key"))
                    continue
                sample.name, sample.start, sample.size = show(member.name), member.offset_data, member.size
            elif kind in LABELS and member.size <= MAX_LABEL_BYTES:
                sample.labels[kind] = os.pread(file.fileno(), member.size, member.offset_data)
    if sample is not None:
        yield sample


def _label(sample: _Sample) -> str | None:
    """The label of a sample: text of ``.cls`` or ``.txt``, or ``label``, ``class`` or ``cls`` of ``.json``.

    Raises InputError where it is not UTF-8, too long, or no text.
    """
    kind = next((kind for kind in LABELS if kind in sample.labels), None)
    if kind is None:
        return None
    try:
        text: Any = sample.labels[kind].decode()
        if kind == "json":
            facts = json.loads(text)
            named = [facts[key] for key in ("label", "class", "cls") if facts.get(key) is not None]
            text = named[0] if named else ""
            if isinstance(text, bool) or not isinstance(text, str | int):
                raise InputError(f"the label in its .json is {type(text).__name__}; expected text")
            str(text).encode()
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"its .{kind} cannot be read as a label ({first_line(error)})") from None
    text = str(text).strip()
    if len(text) > MAX_TEXT:
        raise InputError(f"its label has more than {MAX_TEXT} characters")
    return text or None
