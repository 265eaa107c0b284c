"""Import caches that were written by Tip-Adapter's code.

A cache consists of ``keys_{K}shots.pt`` or ``best_F_{K}shots.pt``, together with ``values_{K}shots.pt``. For the
features of other programs, see docs/features.md.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip.data.feature_tables import NORM_TOLERANCE, schema_of, table_of, write_table
from retrieval_tip.data.tables import row_list
from retrieval_tip.errors import InputError, UsageError, first_line, show
from retrieval_tip.files import open_regular, read_regular

Array = npt.NDArray[Any]

MAX_NAMES = 1 << 27  # largest size of a file of class names, in bytes

_KEYS = re.compile(r"(keys|best_F)_(\d+)shots\.pt")
_EXPECTED = "expected keys_{K}shots.pt or best_F_{K}shots.pt beside values_{K}shots.pt"


def import_table(source: Path, out: Path, classes: Path | None = None) -> int:
    """Convert a cache written by Tip-Adapter's code to a feature table, and return the number of rows.

    ``source`` is a key file or a folder that contains exactly one such file. ``keys_{K}shots.pt`` holds a tensor of
    shape ``[d, n]``. ``best_F_{K}shots.pt`` is written by Tip-Adapter-F and holds a tensor of shape ``[n, d]``. It is
    read only if ``source`` names the file itself. ``values_{K}shots.pt`` in the same folder holds the classes as
    one-hot rows (shape ``[n, c]``). ``classes`` is a file with one class name per line. If it is not given, the names
    are ``class 0``, ``class 1`` and so on.

    No code in the files is executed. The keys are not normalised. Float16 and float32 keys keep their dtype, whereas
    float64 and bfloat16 keys are converted to float32. The ids are row numbers.

    Raises UsageError if the source is not exactly one cache, and InputError if a file does not fit.
    """
    try:
        keys, ids, c = _read(_keys_in(source))
        names = [f"class {i:0{len(str(c - 1))}}" for i in range(c)] if classes is None else _class_names(classes, c)
    except OSError as error:
        raise InputError(f"{show(error.filename or source)}: cannot be read: {error.strerror or error}") from None
    dtype = np.float16 if keys.dtype == np.float16 else np.float32
    schema = schema_of(keys.shape[1], dtype, [])
    with np.errstate(over="ignore"):  # infinite values are rejected when an index is built
        rows = np.ascontiguousarray(keys, dtype=dtype)
    labels = pa.array(names).take(pa.array(ids))
    return write_table(out, schema, [table_of(schema, pa.array(map(str, range(len(ids)))), labels, rows, {})])


def _keys_in(source: Path) -> Path:
    if not source.is_dir():
        if _KEYS.fullmatch(source.name) is None and source.exists():
            raise UsageError(f"{show(source)}: cannot be imported; {_EXPECTED}")
        return source
    found = sorted(file for file in source.glob("keys_*.pt") if _KEYS.fullmatch(file.name))
    if len(found) != 1:
        several = f"several caches ({', '.join(show(file.name) for file in found[:4])}); choose one"
        raise UsageError(f"{show(source)}: {several if found else f'no cache; {_EXPECTED}'}")
    return found[0]


def _read(file: Path) -> tuple[Array, npt.NDArray[np.int64], int]:
    """Return the keys (shape ``[n, d]``), their class ids and the number of classes."""
    match = _KEYS.fullmatch(file.name)
    if match is None:
        raise InputError(f"{show(file)}: no such file or folder")
    other = file.with_name(f"values_{match[2]}shots.pt")
    keys, values = _read_tensor(file), _read_tensor(other)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{show(other)}: shape {values.shape}; expected one-hot [n, c]")
    n, c = values.shape
    if keys.dtype.kind != "f":
        raise InputError(f"{show(file)}: {keys.dtype} cannot be used; save it as float32")
    if keys.ndim != 2 or n not in keys.shape or 0 in keys.shape:
        raise InputError(f"{show(file)}: shape {keys.shape} does not fit {show(other.name)}, which has {n} rows")
    wrong = (np.count_nonzero(values, axis=1) != 1) | ~(values == 1).any(axis=1)
    if wrong.any():
        raise InputError(
            f"{show(other)}: {row_list(np.flatnonzero(wrong))} not one-hot; a feature table cannot store trained "
            "values, so give the one-hot values of the same keys"
        )
    transposed = keys.shape[1] == n
    if match[1] == "best_F":  # these are trained weights with arbitrary norms
        transposed = keys.shape[0] != n
    elif transposed and keys.shape[0] == n:
        norms = [np.linalg.norm(keys.astype(np.float64), axis=axis) for axis in (1, 0)]
        rows, columns = (bool((np.abs(each - 1) <= NORM_TOLERANCE).all()) for each in norms)
        if rows == columns:
            raise InputError(
                f"{show(file)}: cannot decide whether rows or columns are keys in shape {keys.shape}; write a feature "
                "table instead (docs/features.md)"
            )
        transposed = columns
    return keys.T if transposed else keys, (values == 1).argmax(axis=1), c


def _read_tensor(file: Path) -> Array:
    """Read a tensor that was written by ``torch.save``, memory-mapped if possible."""
    name, load = show(file), partial(torch.load, map_location="cpu", weights_only=True)
    try:
        with open_regular(file) as raw, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zipfile.is_zipfile(raw) and any(entry.compress_type for entry in zipfile.ZipFile(raw).infolist()):
                raise ValueError("it is compressed, which torch.save never does")  # a small file could become huge
            raw.seek(0)
            try:
                tensor = load(str(file), mmap=True)
            except (RuntimeError, ValueError):  # written before torch 1.6, or the file name is not UTF-8
                tensor = load(raw)
    except OSError:
        raise
    except Exception as error:  # torch can raise any error on a damaged file, and rejects code in a pickle
        raise InputError(f"{name}: not a tensor saved by torch.save, or damaged ({first_line(error)})") from None
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise InputError(f"{name}: contains a {type(tensor).__name__}, not a plain tensor; save only the tensor")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise InputError(f"{name}: too small for its shape {tuple(tensor.shape)}; save a contiguous tensor")
    try:
        array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
    except (RuntimeError, TypeError):
        raise InputError(f"{name}: {tensor.dtype} cannot be used; save it as float32") from None
    return array


def _class_names(file: Path, c: int) -> list[str]:
    try:
        lines = read_regular(file, MAX_NAMES).decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{show(file)}: not UTF-8: {error}") from None
    names = [show(line.strip()) for line in lines]
    if "" in names or not names:
        raise InputError(f"{show(file)}: line {names.index('') + 1 if names else 1} is empty; give one name per line")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise InputError(f"{show(file)}: duplicate class name {twice[0]!r}; give each class its own name")
    if len(names) != c:
        raise InputError(f"{show(file)}: has {len(names)} names for {c} classes; give one name per class")
    return names
