"""Input shards of a source, the unit of work and of resuming: the same source gives the same shards.

- images, by path: so many of them, with their labels
- a Parquet table, of features or of paths: so many rows, read by the row groups that hold them
- a webdataset tar (``.tar``, ``.tar.gz``, ``.tgz``): one shard each; members ``key.jpg`` with ``key.cls`` and so on

All of them also on an object store, ``s3://``, ``gs://`` or ``az://``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from retrieval_tip.data import remote, tars
from retrieval_tip.data.sources import Source, of_tars, open_inputs, open_items, open_rows, open_source
from retrieval_tip.data.tables import feature_column, is_parquet, open_parquet, table_files
from retrieval_tip.errors import InputError, UsageError, show

IMAGES, ROWS = 256, 16_384
"""Items of a shard by default: images, and rows of a feature table."""


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
    if is_parquet(where):
        return _cut_table(where, base, labelled, size)
    if places := tars.find(where):
        return numbered(Shard(0, "tar", tar, labelled=labelled, stamp=_stamp(tar)) for tar in places)
    return cut_source((open_source if labelled else open_items)(where, split=split, root=base), size)


def cut_source(source: Source, size: int | None = None) -> list[Shard]:
    """Input shards of a source that is open already: its images, or the rows of its table where it takes all of them.

    Raises UsageError for some rows of a feature table.
    """
    if source.paths is None:
        assert source.table is not None
        shards = _cut_table(source.table, None, False, size)
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
    for apart, some in groupby(arguments, lambda one: one != "-" and bool(is_parquet(one) or tars.find(one))):
        if apart:
            shards += [shard for argument in some for shard in cut(argument, size=size)]
        else:
            shards += [shard for source in open_inputs(some, stdin) for shard in cut_source(source, size)]
    return numbered(shards)


def numbered(shards: Any) -> list[Shard]:
    """Shards with their numbers from 0 on."""
    return [replace(shard, number=number) for number, shard in enumerate(shards)]


def open_shard(shard: Shard) -> Source:
    """The items of a shard. Raises InputError where a table cannot be read; what is wrong with a tar is ``failed``."""
    if shard.kind == "tar":
        return of_tars(show(shard.place), [shard.place], labelled=shard.labelled)
    if shard.kind == "rows":
        place = shard.place if remote.is_remote(shard.place) else Path(shard.place)
        return open_rows(place, shard.first, shard.last, root=shard.root, labelled=shard.labelled)
    with pa.ipc.open_stream(base64.b64decode(shard.items)) as stream:
        return Source(shard.place, stream.read_all(), (), tuple(shard.paths))


def _cut_table(table: Path | str, root: str | None, labelled: bool, size: int | None) -> list[Shard]:
    shards = []
    for file in [os.fspath(one) for one in table_files(table)]:
        parquet = open_parquet(file)
        features = feature_column(parquet.schema_arrow) is not None
        step = size or (ROWS if features else IMAGES)
        stamp, number = _stamp(file), parquet.metadata.num_rows
        for first in range(0, number, step):
            last = min(first + step, number)
            shards.append(Shard(0, "rows", file, first, last, features, root=root, labelled=labelled, stamp=stamp))
    return numbered(shards)


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
