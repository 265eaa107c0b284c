"""Helpers for tests of index folders: their bytes, and forged manifests with valid digests."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from retrieval_tip.errors import StoreError


def snapshot(folder):
    """Return all files below a folder with their bytes, except the lock, which names the last writer."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != "lock"]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def one_line(error, *parts):
    """Check that an error has one line that contains the parts, and return the line."""
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert str(part).replace(os.sep, "/") in text.replace(os.sep, "/"), text
    return text


def refused(call, *parts, error=StoreError):
    """Check that a call is refused with one line that contains the parts, and return the line."""
    with pytest.raises(error) as caught:
        call()
    return one_line(caught.value, *parts)


def sealed(body):
    """Return a forged manifest whose digest is valid."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(body, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")
    entry = {"sha256": hashlib.sha256(text).hexdigest()}
    return json.dumps(body | entry, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")


def manifest_of(folder):
    """Return the file of the current manifest."""
    return max((Path(folder) / "manifests").glob("*.json"))


def body_of(folder):
    return json.loads(manifest_of(folder).read_bytes())


def resealed(index, kind, data, **entry):
    """Replace a data file of the first segment, adapt name and manifest, and return the new file."""
    body = body_of(index)
    digest = hashlib.sha256(data).hexdigest()
    file = body["files"][kind]
    (index / file["name"]).unlink()
    name = f"data/{kind}-{digest[:16]}{Path(file['name']).suffix}"
    body["files"][kind] = file | {"name": name, "sha256": digest, "bytes": len(data)} | entry
    (index / name).write_bytes(data)
    manifest_of(index).write_bytes(sealed(body))
    return index / name


def altered(draw, body, values):
    """Change one value somewhere in a body of JSON, remove it, or add one, and return the body."""
    node = body
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key]) or draw(st.booleans()):
            break
        node = node[key]
    how = draw(st.sampled_from(["value", "value", "value", "gone", "more"]))
    if how == "gone":
        del node[key]
    elif how == "more" and isinstance(node, list):
        node.append(draw(values))
    else:
        node[key if how == "value" else draw(st.text(max_size=5))] = draw(values)
    return body


def npy(array):
    """Return the bytes of an array in a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
