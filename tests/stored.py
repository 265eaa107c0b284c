"""Indexes in folders, in LanceDB and in buckets: their addresses, files, copies and rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import buckets
import obstore
from tables import write_table

from retrieval_tip.data.sources import open_source
from retrieval_tip.index import places as stores
from retrieval_tip.plugins.lance.bucket import BucketFiles
from retrieval_tip.store.address import Address


def made(tmp_path, kind, name="own"):
    """Return the address of a store that does not exist yet."""
    if kind == "s3":
        return f"s3://{buckets.fresh_bucket()}/indexes/{name}"
    return f"{'lance://' if kind == 'lance' else ''}{(tmp_path / name).as_posix()}"


def path_of(place):
    return Path(place.removeprefix("lance://"))


def everything(place):
    """Return all files or objects of a store with their bytes."""
    if not place.startswith("s3://"):
        return {
            p.relative_to(path_of(place)).as_posix(): p.read_bytes()
            for p in path_of(place).rglob("*")
            if p.is_file()
        }
    client = BucketFiles(Address.parse(place))._client
    names = [entry["path"] for batch in obstore.list(client) for entry in batch]
    return {name: bytes(obstore.get(client, name).bytes()) for name in names}


def put(place, name, data):
    """Write a file or object, or delete it if ``data`` is None."""
    if place.startswith("s3://"):
        client = BucketFiles(Address.parse(place))._client
        obstore.put(client, name, data) if data is not None else obstore.delete(client, name)
    elif data is None:
        (path_of(place) / name).unlink()
    else:
        (path_of(place) / name).write_bytes(data)


def copied(tmp_path, kind, place, name="own"):
    """Copy a store byte for byte, and return the address of the copy."""
    out = made(tmp_path, kind, name)
    if kind == "s3":
        for path, data in everything(place).items():
            put(out, path, data)
    else:
        shutil.copytree(path_of(place), path_of(out))
    return out


def labels_of(place):
    """Return the rows of the label store by key id, without times and versions."""
    return rows_of(stores.at(place).load().labels)


def rows_of(table):
    assert len(set(table["key_id"].to_pylist())) == len(table)
    rows = table.drop_columns(
        [name for name in ("version", "added_at") if name in table.column_names]
    ).to_pylist()
    return {row["key_id"]: row for row in rows}


def source(path, features, labels, ids=None, **more):
    return open_source(write_table(path, features, labels, ids, **more))


def done(result):
    assert result.exit_code == 0, result.output
    return result.stdout
