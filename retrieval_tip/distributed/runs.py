"""The folder of a run: sealed parts, what failed, and the description that another run must share to go on.

    run.json                      what is made of what; written first
    part-000012.parquet           the rows of input shard 12; its metadata names run and shard
    failed/part-000012.parquet    inputs of shard 12 that could not be read: input, reason; only where there are some
    complete.json                 written last

A part is renamed in when it is whole, after what failed of it; on an object store a put does the same. So whatever is
there is whole, and a run that was ended at any moment goes on with the shards whose part is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval_tip.data import remote
from retrieval_tip.data.tables import COMPLETE, RUN, open_parquet
from retrieval_tip.errors import InputError, Skipped, UsageError, first_line, show
from retrieval_tip.files import make_folders, replacing

RUN_FORMAT = 1
PART_KEY = b"retrieval_tip.part"
FAILED_SCHEMA = pa.schema([("input", pa.string()), ("reason", pa.string())])


def part_name(number: int) -> str:
    """File of an input shard's rows."""
    return f"part-{number:06d}.parquet"


@dataclass(frozen=True)
class Run:
    """A run in its folder ``place``, which may be a URL; ``digest`` is that of its description."""

    place: str
    digest: str

    @classmethod
    def start(cls, place: str | os.PathLike[str], facts: dict[str, Any]) -> Run:
        """The run that ``facts`` describe: a new one in an empty folder or none, or the same one to go on with.

        Raises UsageError for a folder that holds anything else, InputError where it cannot be written or read.
        """
        text = json.dumps({"format": RUN_FORMAT, **facts}, sort_keys=True)
        run = cls(os.fspath(place).rstrip("/") or "/", hashlib.sha256(text.encode()).hexdigest())
        sealed = json.dumps({"digest": run.digest, **json.loads(text)}, indent=1).encode()
        earlier = run.read(RUN)
        if earlier is None:
            if run.names():
                raise UsageError(
                    f"{show(run.place)}: holds files already and no run of --engine ray; give another folder"
                )
            run.write(RUN, sealed)
        elif earlier != sealed:
            raise UsageError(
                f"{show(run.place)}: holds another run ({_difference(earlier, sealed)}); "
                "give another folder, or remove this one to start anew"
            )
        return run

    def at(self, name: str) -> str:
        """Path or URL of a file of the folder."""
        return f"{self.place}/{name}" if remote.is_remote(self.place) else os.path.join(self.place, name)  # noqa: PTH118

    def names(self, below: str = "") -> set[str]:
        """Names in the folder, or in one below it."""
        place = self.at(below).rstrip("/")
        if remote.is_remote(place):
            system = remote.system_of(place)
            try:
                return {str(name).rpartition("/")[2] for name in system.ls(place, detail=False)}
            except FileNotFoundError:
                return set()
            except Exception as error:
                raise InputError(f"{place}: cannot be read: {first_line(error)}") from None
        try:
            return set(os.listdir(place))  # noqa: PTH208 - Path.iterdir makes a Path of each
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise InputError(f"{show(place)}: cannot be used as a folder: {error.strerror}") from None

    def read(self, name: str) -> bytes | None:
        """A file's bytes, ``None`` where there is none."""
        place = self.at(name)
        try:
            if remote.is_remote(place):
                return bytes(remote.system_of(place).cat_file(place))
            return Path(place).read_bytes()
        except FileNotFoundError:
            return None
        except UsageError:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"{show(place)}: cannot be read: {reason}") from None

    def write(self, name: str, data: bytes) -> None:
        """Write a file at once."""
        with self.writing(name) as path:
            path.write_bytes(data)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A place to write a file that is there when it is whole. Raises InputError where it cannot be written."""
        place = self.at(name)
        if not remote.is_remote(place):
            try:
                make_folders(Path(place).parent)
            except OSError as error:
                raise InputError(f"{show(place)}: cannot be written: {error.strerror}") from None
            with replacing(Path(place)) as temporary:
                yield temporary
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            return
        with tempfile.TemporaryDirectory(prefix="retrieval-tip-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "part"
            yield path
            try:
                remote.system_of(place).put_file(str(path), place)
            except Exception as error:
                raise InputError(f"{place}: cannot be written: {first_line(error)}") from None

    def metadata(self, number: int) -> dict[bytes, bytes]:
        """Metadata of the file of shard ``number``."""
        return {PART_KEY: json.dumps({"run": self.digest, "shard": number}).encode()}

    def write_failed(self, number: int, failed: Sequence[Skipped]) -> None:
        """Write what of shard ``number`` could not be read, where there is anything; before its part."""
        if failed:
            rows = [{"input": skipped.source, "reason": skipped.reason} for skipped in failed]
            with self.writing(f"failed/{part_name(number)}") as path:
                pq.write_table(pa.Table.from_pylist(rows, schema=FAILED_SCHEMA), str(path))

    def done(self, number: int) -> dict[int, int]:
        """Shards below ``number`` whose part is there and whole, with its rows."""
        there = self.names()
        rows_by_shard = {shard: self._rows(shard) for shard in range(number) if part_name(shard) in there}
        return {shard: rows for shard, rows in rows_by_shard.items() if rows is not None}

    def _rows(self, number: int) -> int | None:
        try:
            parquet = open_parquet(self.at(part_name(number)))
            said = json.loads((parquet.schema_arrow.metadata or {}).get(PART_KEY, b"null"))
        except (InputError, ValueError):
            return None
        return int(parquet.metadata.num_rows) if said == {"run": self.digest, "shard": number} else None

    def failed(self, number: int) -> list[Skipped]:
        """Inputs of all shards below ``number`` that could not be read."""
        there = self.names("failed")
        places = [self.at(f"failed/{part_name(shard)}") for shard in range(number) if part_name(shard) in there]
        rows = (row for place in places for row in open_parquet(place).read().to_pylist())
        return [Skipped(row["input"], row["reason"]) for row in rows]

    def finish(self, parts: int, rows: int, failed: int) -> None:
        """Say that all is there. Raises InputError where a part is not: workers on other machines wrote elsewhere."""
        there = self.names()
        missing = [shard for shard in range(parts) if part_name(shard) not in there]
        if missing:
            raise InputError(
                f"{self.at(part_name(missing[0]))}: written by a worker, and not there; "
                "give a folder that every node of the cluster sees, or one on an object store"
            )
        self.write(COMPLETE, json.dumps({"run": self.digest, "parts": parts, "rows": rows, "failed": failed}).encode())


def _difference(earlier: bytes, sealed: bytes) -> str:
    """The first setting in which two descriptions differ."""
    try:
        one, other = json.loads(earlier), json.loads(sealed)
        for name in sorted(one.keys() | other.keys()):
            if name not in ("digest", "settings") and one.get(name) != other.get(name):
                return f"of another {name}"
        settings = (one["settings"], other["settings"])
        names = sorted(settings[0].keys() | settings[1].keys())
        return f"with another {next(n for n in names if settings[0].get(n) != settings[1].get(n))}"
    except (ValueError, AttributeError, KeyError, TypeError, StopIteration):
        return f"or {RUN} is damaged"
