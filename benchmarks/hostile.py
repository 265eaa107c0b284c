"""Hostile inputs for benchmarks/attack.py, by area: combinations of the tables in hostile.toml, drawn at random.

A :class:`Case` is drawn in the process that forks, which must stay without threads; its files are made in the child.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import tomllib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

Draw = random.Random
Array = Callable[[], Any]

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = ROOT.parent / "shared" / "models" / "lit-mini"
SCRATCH = Path(os.environ.get("RETRIEVAL_TIP_ATTACK", "/nonexistent"))
BASE, PICTURES = SCRATCH / "base", SCRATCH / "pictures"
TOKEN = "sesame"
SPEC: dict[str, dict[str, Any]] = {}
"""Operations of the server by path and method, once it runs."""
D, CLASSES = 8, ["cat", "dog", "owl", "eel"]
N = 4 * len(CLASSES)
SIZES = [(211, 307), (1, 1), (1, 3001)]
SIDES = {"cli": 13_000, "http": 7000}
"""Sides of bombs, just within what the commands and the server decode."""
HUGE = [0, 1, 0x7FFF, 0xFFFF, 20_000, *SIDES.values(), 0x7FFFFFFF, 0xFFFFFFFF, 100_000]
"""Sides that a header is made to claim."""
BOMBS = [("TIFF", "L", "tiff_deflate"), ("TIFF", "1", "group4"), ("TIFF", "L", "packbits"), ("GIF", "L", ""),
         ("JPEG", "L", "")]  # fmt: skip
"""Format, mode and compression of some bombs: of one colour, few bytes and many pixels."""
NATIVE = ("OMP_", "MKL_", "OPENBLAS_", "ARROW_", "LANCE", "RUST_", "CU")
"""What variables begin with that libraries read before anything here runs; they print a wrong value as it is."""
SQL_LIMIT = 60.0
"""Seconds after which SQL ends, unless another limit is given."""
WORK = {"epochs": 50, "seeds": 3, "views_cache": 50, "folds": 50}
"""Options that ask for work, and the most that a try asks for."""


def _expanded(text: str) -> str:
    def more(found: re.Match[str]) -> str:
        unit, times = found[1], int(found[2])
        return "".join(unit.replace("#", str(i)) for i in range(times)) if "#" in unit else unit * times

    text = re.sub("«([0-9a-f]{2})»", lambda byte: chr(0xDC00 + int(byte[1], 16)), text)
    return re.sub(r"«([^»]+)\*(\d+)»", more, text)


@cache
def table(name: str) -> list[str]:
    """A table of hostile.toml."""
    return list(map(_expanded, tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))[name]))


# --- files


def _device(minor: int, name: str) -> None:
    """A device of its own, which a command may replace; a link to the system's where none can be made."""
    try:
        os.mknod(name, 0o020666, os.makedev(1, minor))
    except PermissionError:
        Path(name).symlink_to({5: "/dev/zero", 7: "/dev/full"}[minor])


def _nested(name: str) -> None:
    here = os.open(".", os.O_RDONLY)
    for part in (name, *"d" * 1500):
        Path(part).mkdir()
        os.chdir(part)
    os.fchdir(here)


def _socket(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)


def _bytes(data: bytes, name: str) -> None:
    Path(name).write_bytes(data)


PATHS: dict[str, Callable[[str], object]] = {
    "missing": lambda _: None,
    "nowhere/x": lambda _: None,
    "x" * 255: lambda _: None,
    "x" * 250: lambda _: None,
    "fifo": os.mkfifo,
    "socket": _socket,
    "folder": os.mkdir,
    "nested": _nested,
    "dangling": partial(os.symlink, "nowhere"),
    "loop": lambda name: Path(name).symlink_to(name),
    "zero": partial(_device, 5),
    "full": partial(_device, 7),
    "kmsg": partial(os.symlink, "/proc/kmsg"),
    "mem": partial(os.symlink, "/proc/self/mem"),
    "fds": partial(os.symlink, "/proc/self/fd"),
    "maps": partial(os.symlink, "/proc/self/maps"),
    "empty": partial(_bytes, b""),
    "binary": partial(_bytes, bytes(range(256)) * 64),
    "shut": lambda name: os.close(os.open(name, os.O_CREAT, 0)),
    "sparse": lambda name: (_bytes(b"", name), os.truncate(name, 3 << 30)),
    "name \x1b[31m\n\u202e": partial(_bytes, b""),
    "name \udcff": os.mkdir,
    "up": partial(os.symlink, ".."),
    "index2": lambda name: shutil.copytree("index", name),
}
"""Names of files, and what makes them in the folder of a try; an extension may follow."""


def path(rng: Draw) -> tuple[str, Callable[[], object]]:
    """A hostile name of a file, and what makes it."""
    key = rng.choice(list(PATHS))
    name = key + rng.choice(table("extensions"))
    return name, lambda: os.path.lexists(name) or PATHS[key](name)


# --- mutations


def _flipped(raw: bytes, rng: Draw) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _overwritten(raw: bytes, rng: Draw) -> bytes:
    size = min(rng.choice([1, 2, 4, 8, 16, 100]), len(raw))
    at = rng.randrange(min(rng.choice([64, len(raw)]), len(raw) - size + 1))
    return raw[:at] + rng.choice([b"\0" * size, b"\xff" * size, b"\x7f" * size, rng.randbytes(size)]) + raw[at + size :]


def _truncated(raw: bytes, rng: Draw) -> bytes:
    return raw[: rng.randrange(len(raw))] if rng.random() < 0.7 else raw[rng.randrange(len(raw)) :]


def _extended(raw: bytes, rng: Draw) -> bytes:
    more = rng.choice([b"\0", b"\n", rng.randbytes(300), raw, b"\0" * 4096])
    return raw + more if rng.random() < 0.7 else more + raw


def _cut(raw: bytes, rng: Draw) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + raw[at + rng.randrange(1, 40) :]


def mutated(raw: bytes, rng: Draw) -> bytes:
    """Bytes with some of them changed, left out or added."""
    how = rng.choice([_flipped, _flipped, _flipped, _overwritten, _overwritten, _truncated, _extended, _cut])
    return how(raw, rng) if raw else b"x"


def _resized(raw: bytes, rng: Draw) -> bytes:
    """A picture of :data:`SIZES` 0 whose header claims other sides, in whatever form it says them."""
    for side in rng.choice([SIZES[0], SIZES[0], SIZES[0][:1], SIZES[0][1:]]):
        new = rng.choice(HUGE)
        forms = {struct.pack(pack, side): struct.pack(pack, min(new, most)) for pack, most in
                 ((">I", 2**32 - 1), ("<I", 2**32 - 1), (">H", 2**16 - 1), ("<H", 2**16 - 1))}  # fmt: skip
        forms[str(side).encode()] = str(new).encode()
        known = [form for form in forms if form in raw[:400]]
        if known:
            raw = raw.replace(form := known[0], forms[form], 1)
    if raw.startswith(b"\x89PNG"):
        raw = raw[:29] + struct.pack(">I", zlib.crc32(raw[12:29])) + raw[33:]
    return raw


def altered(node: Any, rng: Draw) -> Any:
    """JSON with one value, somewhere in it, replaced or removed."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    inner = [key for key in keys if isinstance(node[key], dict | list)]
    if inner and rng.random() < 0.6:
        node[key] = altered(node[key := rng.choice(inner)], rng)
    elif not keys or rng.random() < 0.1:
        return json.loads(rng.choice(table("json_values")))
    elif rng.random() < 0.15:
        del node[rng.choice(keys)]
    else:
        node[rng.choice(keys)] = json.loads(rng.choice(table("json_values")))
    return node


def told(body: Any, **how: Any) -> bytes:
    """JSON text, nested deeply where it says so."""
    text = json.dumps(body, **how).replace('"@nested"', "[" * 5000 + "]" * 5000)
    return text.encode("utf-8", "surrogatepass")


# --- areas


@dataclass
class Case:
    """One try: a command and what makes its files, or a request in parts; ``call`` stands in for the command line.

    ``bad``: it must not end well. ``given``: the folder of ``BASE`` that it starts with. ``limit``: seconds after
    which it ends by itself. ``user``: it may do nothing that root alone may. ``variables``: of its environment; with
    ``fresh`` a new interpreter reads them. ``signals``: what it gets, each so many seconds after the one before.
    Of a request, ``pause`` seconds follow each part, ``half`` ends what is sent, and so many ``answers`` are due.
    ``alone``: nothing else runs.
    """

    arguments: list[str] = field(default_factory=list)
    prepare: Callable[[], object] = lambda: None
    bad: bool = False
    given: str = "given"
    limit: float = 0.0
    user: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    fresh: bool = False
    signals: list[tuple[float, int]] = field(default_factory=list)
    call: Callable[[], object] | None = None
    sends: list[bytes] | None = None
    pause: float = 0.0
    half: bool = False
    answers: int = 1
    name: str = ""
    alone: bool = False


@cache
def commands() -> list[tuple[click.Command, list[str], list[str]]]:
    """Every command of the tree, with its words and what it needs."""
    from retrieval_tip.cli import main

    good = [shlex.split(line) for line in table("good")]

    def leaves(command: click.Command, words: list[str]) -> Iterator[tuple[click.Command, list[str], list[str]]]:
        if isinstance(command, click.Group):
            for name, inner in sorted(command.commands.items()):
                yield from leaves(inner, [*words, name])
            return
        needs = [line[len(words) :] for line in good if line[: len(words)] == words]
        assert needs, f"hostile.toml: good has no line for {' '.join(words)}"
        yield command, words, needs[0]

    return list(leaves(main, []))


def _wrong_number(kind: click.ParamType[Any], value: str) -> bool:
    """Whether an option of this type must refuse it: it is no number, out of range, or not finite."""
    try:
        number = float(value) if isinstance(kind, click.types.FloatParamType) else int(value)
    except ValueError:
        return True
    least, most = getattr(kind, "min", None), getattr(kind, "max", None)
    finite = isinstance(number, int) or math.isfinite(number)
    return not finite or (least is not None and number < least) or (most is not None and number > most)


LEFT_OUT = {"index_shards", "plot"}
"""Options that start Ray, or draw for a second."""
SPECIAL = {"factory": "factories", "factories": "factories", "host": "hosts", "where": "conditions"}


def _is_number(kind: click.ParamType[Any]) -> bool:
    return isinstance(kind, click.types.IntParamType | click.types.FloatParamType)


@cache
def _parameters() -> dict[str, list[tuple[int, click.Parameter]]]:
    """Which commands have a parameter of a name. Those that name files count three times."""
    found: dict[str, list[tuple[int, click.Parameter]]] = {}
    for at, (command, _, _) in enumerate(commands()):
        for param in command.params:
            if param.name not in LEFT_OUT:
                found.setdefault(str(param.name), []).append((at, param))
    files = [
        name for name, of in found.items() if isinstance(of[0][1].type, click.Path) or name in ("folder", "inputs")
    ]
    return found | {name + " " * times: found[name] for name in files for times in (1, 2)}


def _value(rng: Draw, param: click.Parameter, makers: list[Callable[[], object]]) -> str:
    """A hostile value of a parameter; where it is the name of a file, what makes that is added to ``makers``."""
    kind, name = param.type, str(param.name)
    if (_is_number(kind) or isinstance(kind, click.Tuple) or name == "k") and rng.random() < 0.8:
        return rng.choice(table("numbers"))
    if name in SPECIAL and rng.random() < 0.8:
        text = rng.choice(table(SPECIAL[name]))
        return text.replace("{e}", "1").replace("{f}", "labels").replace("\0", "")
    if isinstance(kind, click.Choice) and rng.random() < 0.4:
        return rng.choice([str(choice) for choice in kind.choices if choice != "ray"])
    if rng.random() < (0.8 if isinstance(kind, click.Path) else 0.5):
        text, maker = path(rng)
        makers.append(maker)
        return text
    return rng.choice(table("texts"))


def options(rng: Draw) -> Case:
    """every option and argument of every command"""
    at, param = rng.choice(_parameters()[rng.choice(list(_parameters()))])
    command, words, needs = commands()[at]
    arguments, makers, bad = list(needs), list[Callable[[], object]](), {}
    others = [other for other in command.params if other.name not in LEFT_OUT and rng.random() < 0.03]
    for each in (param, *others):
        if isinstance(each, click.Option) and each.is_flag:
            arguments.append(rng.choice(each.opts + each.secondary_opts))
            continue
        value, place = _value(rng, each, makers), [p for p in command.params if isinstance(p, click.Argument)]
        wrong = _is_number(each.type) and _wrong_number(each.type, value)
        if str(each.name) in WORK and not wrong and float(value[:300]) > WORK[str(each.name)]:
            value = "2"
        if isinstance(each, click.Option):
            bad[each.name] = wrong
            arguments += [rng.choice(each.opts), *[value] * each.nargs]
        else:
            arguments[place.index(each) : place.index(each) + 1] = [value]
    must_fail = any(bad.values()) and "--help" not in arguments
    limit = SQL_LIMIT if "--where" in arguments or words == ["index", "query"] else 0.0
    return Case([*words, *arguments], lambda: [maker() for maker in makers], must_fail, limit=limit)


def recipes(rng: Draw) -> Case:
    """TOML files of `index build --recipe`"""
    raw = rng.choice(table("toml_files")).encode("utf-8", "surrogateescape")
    bad = not raw.startswith(b"#")
    if rng.random() < 0.75:
        build = next(command for command, words, _ in commands() if words == ["index", "build"])
        keys = [str(param.name) for param in build.params if param.name not in ("out", "text")] + table("toml_keys")
        lines = [f"{rng.choice(keys)} = {rng.choice(table('toml_values'))}" for _ in range(rng.choice([1, 1, 2, 4]))]
        raw, bad = "\n".join(lines).encode(), False
    if rng.random() < 0.1:
        raw, bad = mutated(raw, rng), False
    line = "index build table.parquet --out new --text text.parquet --recipe recipe.toml"
    return Case(line.split(), lambda: Path("recipe.toml").write_bytes(raw), bad)


def sql(rng: Draw) -> Case:
    """`index query`, and `--where`"""

    def filled(name: str) -> str:
        text = rng.choice(table(name))
        while found := re.search(r"\{([enf])\}", text):
            values = table({"e": "expressions", "n": "sql_names", "f": "froms"}[found[1]])
            text = text.replace(found[0], rng.choice(values), 1)
        return text.replace("\0", "")

    line = rng.choice(table("asked")[:-1] * 4 + table("asked")[-1:])  # the last one, a report, takes a second
    names = {"{sql}": "statements", "{where}": "conditions"}
    words = [filled(names[word]) if word in names else word for word in line.split()]
    if words[1] != "query" or rng.random() < 0.03:
        return Case(words, limit=SQL_LIMIT)
    limit = rng.choice([1, 2, 3])
    return Case([*words, "--timeout", str(limit)], limit=limit)


def _features(rng: Draw) -> dict[str, Array]:
    """Columns of features of many types, and of values that none should have."""
    import numpy as np
    import pyarrow as pa

    rows = np.load("keys.npy").tolist()
    bit = rng.choice([math.nan, math.inf, 1e38, 1e-45, 0.0, -1e300, 7])
    return {
        "good": lambda: pa.array(rows, pa.list_(pa.float32())),
        "large": lambda: pa.array(rows, pa.large_list(pa.float64())),
        "half": lambda: pa.array([list(map(np.float16, row)) for row in rows], pa.list_(pa.float16(), D)),
        "one value": lambda: pa.array([[*rows[0][1:], bit], *rows[1:]], pa.list_(pa.float64())),
        "all values": lambda: pa.array([[bit] * D] * N),
        "ragged": lambda: pa.array([rows[0][: rng.randrange(D)], *rows[1:]]),
        "wide": lambda: pa.array([row * 3 for row in rows]),
        "empty": lambda: pa.array([[]] * N, pa.list_(pa.float32())),
        "of no width": lambda: pa.array([[]] * N, pa.list_(pa.float32(), 0)),
        "a null": lambda: pa.array([None, *rows[1:]]),
        "nulls": lambda: pa.nulls(N, pa.list_(pa.float32(), D)),
        "a null within": lambda: pa.array([[None, *rows[0][1:]], *rows[1:]]),
        "of no type": lambda: pa.nulls(N),
        "text": lambda: pa.array(["x"] * N),
        "numbers as text": lambda: pa.array([[str(value) for value in row] for row in rows]),
        "whole numbers": lambda: pa.array([[1, *[0] * (D - 1)]] * N, pa.list_(pa.uint64())),
        "decimals": lambda: pa.array([[-100, *[0] * (D - 1)]] * N, pa.list_(pa.decimal128(5, -2))),
        "truth": lambda: pa.array([[True] * D] * N),
        "nested": lambda: pa.array([[row] for row in rows]),
        "structs": lambda: pa.array([{"a": row} for row in rows]),
        "maps": lambda: pa.array([[("a", 1.0)]] * N, pa.map_(pa.string(), pa.float32())),
        "bytes": lambda: pa.array([bytes(4 * D)] * N),
        "dates": lambda: pa.array([[0] * D] * N, pa.list_(pa.date32())),
        "dictionaries": lambda: pa.array([["a"] * D] * N, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    }


def _labels(rng: Draw) -> dict[str, Array]:
    """Columns of labels, ids and whatever else, of many types."""
    import numpy as np
    import pyarrow as pa

    texts = [text.encode("utf-8", "replace").decode()[:5000] for text in table("texts")]
    off = pa.py_buffer(np.arange(N + 1, dtype=np.int32))
    return {
        "hostile": lambda: pa.array(rng.choices(texts, k=N)),
        "one class": lambda: pa.array(["cat"] * N),
        "nulls": lambda: pa.nulls(N),
        "a null": lambda: pa.array([None, *["cat"] * (N - 1)]),
        "numbers": lambda: pa.array(range(N), pa.int8()),
        "floats": lambda: pa.array([math.nan] * N),
        "half floats": lambda: pa.array([np.float16(1)] * N),
        "truth": lambda: pa.array([True, False] * (N // 2)),
        "times": lambda: pa.array(range(N), pa.timestamp("ns", rng.choice(["UTC", "Mars/X"]))),
        "times of day": lambda: pa.array([1] * N, pa.time64("ns")),
        "spans": lambda: pa.array(range(N), pa.duration("us")),
        "decimals": lambda: pa.array([-100] * N, pa.decimal128(38, -2)),
        "lists": lambda: pa.array([["cat"]] * N),
        "structs": lambda: pa.array([{"label": "cat"}] * N),
        "maps": lambda: pa.array([[("a", 1)]] * N, pa.map_(pa.string(), pa.int8())),
        "bytes": lambda: pa.array([b"\xff"] * N),
        "not UTF-8": lambda: pa.Array.from_buffers(pa.string(), N, [None, off, pa.py_buffer(b"\xff" * N)]),
        "dictionary": lambda: pa.array(CLASSES * (N // 4)).dictionary_encode(),
        "views": lambda: pa.array(CLASSES * (N // 4), pa.string_view()),
        "long": lambda: pa.array(["l" * 5000] * N),
    }


def _parquet(rng: Draw) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features, labels = _features(rng), _labels(rng)
    ids = pa.array([f"i{i}" for i in range(N)])
    columns = [("id", ids), ("label", pa.array(CLASSES * (N // 4))), ("feature", features["good"]())]
    for at in rng.choices(range(3), k=rng.choice([0, 1, 1, 1, 2])):
        columns[at] = (columns[at][0], rng.choice(list((features if at == 2 else labels).values()))())
    if rng.random() < 0.4:
        name = rng.choice(["label", "feature", "id", "path", "input", "key_id", "class_id", "\x1b[31m", "", "x" * 5000])
        columns.insert(rng.randrange(4), (name, rng.choice(list(labels.values()))()))
    if rng.random() < 0.1:
        columns.pop(rng.randrange(len(columns)))
    found = pa.Table.from_arrays([column for _, column in columns], names=[name for name, _ in columns])
    buffer = io.BytesIO()
    with contextlib.suppress(pa.ArrowException, OSError):  # what Parquet cannot hold
        pq.write_table(found.slice(0, rng.choice([N] * 5 + [0, 1])), buffer, row_group_size=rng.choice([None, 1]))
    raw = buffer.getvalue() or b"PAR1PAR1"
    if rng.random() < 0.05:
        return Path(rng.choice(["encrypted.parquet", "encrypted-columns.parquet"])).read_bytes()
    return raw[:-4] + b"PARE" if rng.random() < 0.02 else raw  # the mark of an encrypted file


def _text_table(rng: Draw, comma: str) -> bytes:
    texts = [text.encode("utf-8", "replace").decode() for text in table("texts")]
    heads = [["path", "label"]] * 3 + [
        ["path"],
        ["label", "label"],
        ["id", "label"],
        ["path", "label", rng.choice(texts)],
    ]
    rows = [[rng.choice(texts) if rng.random() < 0.1 else good for good in (f"{i}.png", "cat")] for i in range(N)]
    raw = "\n".join(comma.join(row) for row in [rng.choice(heads), *rows]).encode()
    wrong = [b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16"), raw + b'\n"open', raw + b"\xff", raw + b"\n,,,"]
    return rng.choice([raw, raw, raw.replace(b"\n", b"\r"), *wrong])


def _table(rng: Draw, suffix: str) -> bytes:
    """A table of hostile columns, in the form that a name with this suffix has."""
    if suffix == ".parquet":
        return _parquet(rng)
    if suffix in (".csv", ".tsv"):
        return _text_table(rng, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        items = [[f"{i}.png", i % 4, CLASSES[i % 4]] for i in range(N)]
        return told(altered({"train": items, "val": items[:8], "test": items[8:]}, rng))
    head = rng.choice(table("npy_heads")).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + Path("keys.npy").read_bytes()[128:]


def tables(rng: Draw) -> Case:
    """feature tables, tables of paths, splits and arrays, wherever a command takes one"""
    name = "hostile" + rng.choice([".parquet"] * 5 + [".csv", ".tsv", ".json", ".npy"])
    line = rng.choice(table("with_table")[:-1] * 4 + table("with_table")[-1:])

    def prepare() -> None:
        raw = _table(rng, Path(name).suffix)
        Path(name).write_bytes(mutated(raw, rng) if rng.random() < 0.5 else raw)

    return Case([name if word == "{}" else word for word in line.split()], prepare)


def _picture(rng: Draw, where: str) -> bytes:
    """A picture of any kind, as it is, mutated, or with sides that it has not; now and then a bomb."""
    if rng.random() < 0.06:
        return rng.choice(sorted(PICTURES.glob(f"bomb-{where}-*"))).read_bytes()
    raw, how = rng.choice(sorted(PICTURES.glob("picture-*"))).read_bytes(), rng.random()
    return raw if how < 0.1 else _resized(raw, rng) if how < 0.45 else mutated(raw, rng)


def images(rng: Draw) -> Case:
    """files of pictures, wherever a command takes one"""
    suffix = rng.choice(["", ".png", ".jpg", ".tif", ".gif", ".ico", ".webp", ".qoi", ".svg", ".bmp"])
    name, maker = path(rng) if rng.random() < 0.1 else (f"picture{suffix}", None)
    words = rng.choice(table("with_picture")).replace("{model}", f"local-dir:{BACKBONE}").split()

    def prepare() -> None:
        if "-" in words:
            names = rng.choices([*table("texts"), name, "shots/cat/0.png"], k=rng.choice([1, 5, 20]))
            raw = rng.choice(["\n", "\0", "\r\n"]).join(names).encode("utf-8", "surrogateescape")
            Path("stdin").write_bytes(raw)
        elif "{}" not in words:
            for i in range(rng.choice([1, 3])):
                Path(f"shots/dog/x{i}{suffix or '.png'}").write_bytes(_picture(rng, "cli"))
        elif maker:
            maker()
        else:
            Path(name).write_bytes(_picture(rng, "cli"))

    return Case([name if word == "{}" else word.replace("{{}}", "{}") for word in words], prepare, given="pictured")


def _seal(body: dict[str, Any]) -> bytes:
    """A manifest that ends in the digest of all that is before it."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(told(body, indent=1, ensure_ascii=False)).hexdigest()
    return told(body | {"sha256": digest}, indent=1, ensure_ascii=False)


def _harm(how: str, rng: Draw) -> None:
    index, manifest = Path("index"), Path("index/manifest.json")
    body = json.loads(manifest.read_bytes())
    if how == "manifest":
        changed = altered(body, rng)
        manifest.write_bytes(_seal(changed) if isinstance(changed, dict) else told(changed))
        return
    entries = {index / entry["name"]: entry for entry in body["files"].values()}
    files = [*entries] if how != "any file" else sorted(each for each in index.rglob("*") if each.is_file())
    if how == "sealed":  # FAISS itself is no match for that
        files = [file for file in files if file.suffix != ".faiss"]
    file = rng.choice(files)
    if how == "replaced":
        file.unlink()
        PATHS[rng.choice([key for key in PATHS if key not in ("nowhere/x", "index2")])](str(file))
        return
    raw = file.read_bytes() or b"x"
    new = mutated(raw, rng)
    file.write_bytes(new if new != raw else raw + b"\0")
    if how == "sealed":
        entry, digest = entries[file], hashlib.sha256(file.read_bytes()).hexdigest()
        entry["sha256"], entry["bytes"] = digest, file.stat().st_size
        entry["name"] = f"{entry['name'].rpartition('-')[0]}-{digest[:16]}{file.suffix}"
        file.rename(index / entry["name"])
        manifest.write_bytes(_seal(body))


def folders(rng: Draw) -> Case:
    """index folders: damaged files, and manifests that were made to fit them"""
    how = rng.choice(["damaged"] * 2 + ["sealed"] * 2 + ["manifest"] * 3 + ["any file", "replaced"])
    line = rng.choice(table("with_folder"))
    whole = line in table("with_folder")[:3]  # these read every byte
    words = ["index" if word == "{}" else word for word in line.replace("merge index {}", "merge index2 {}").split()]

    def prepare() -> None:
        PATHS["index2"]("index2")
        _harm(how, rng)

    return Case(words, prepare, bad=how == "damaged" and whole)


def _predictions(kind: str, rng: Draw) -> bytes:
    raw = Path(f"predictions.{kind}").read_bytes()
    if kind == "json" and rng.random() < 0.6:
        raw = b"\n".join(told(altered(json.loads(row), rng)) for row in raw.splitlines())
    elif kind == "csv" and rng.random() < 0.6:
        text = rng.choice(table("texts")).encode("utf-8", "surrogateescape")
        raw = raw.replace(rng.choice([b"cat", b"i1", b"label", b"\n", b",", b"["]), text, rng.choice([1, -1]))
    return mutated(raw, rng) if rng.random() < 0.7 else raw


def states(rng: Draw) -> Case:
    """predictions of `index query --predictions`"""
    kind, style = rng.choice(["csv", "json", "parquet"]), rng.choice(["table", "json", "csv"])
    asked = rng.choice(["FROM predictions", "SELECT count(*) FROM predictions JOIN labels USING (label)"])
    file = f"predictions.{kind}"
    words = ["index", "query", "index", asked, "--predictions", file, "--format", style]
    return Case(words, lambda: Path(file).write_bytes(_predictions(kind, rng)), limit=SQL_LIMIT)


# --- what is around a command


def rights(rng: Draw) -> Case:
    """files and folders that a command may not read, write or enter"""
    lines = [line.replace("{}", "index") for line in table("with_folder") if "{}" in line] + table("good")
    words = shlex.split(rng.choice([line for line in lines if "index2" not in line]))
    places = ["index", "index", "index/manifest.json", "index/*", "index/*/*", "*.parquet", ".", "new", "new.parquet"]
    place, mode = rng.choice(places), rng.choice([0, 0o100, 0o200, 0o300, 0o400, 0o500, 0o600])

    def prepare() -> None:
        if place.startswith("new"):
            (os.mkdir if place == "new" else partial(_bytes, b""))(place)
        found = sorted(Path().glob(place)) if place != "." else [Path()]
        rng.choice(found).chmod(mode)

    return Case(words, prepare, user=True)


def environments(rng: Draw) -> Case:
    """variables of the environment, every one that is read"""
    words = shlex.split(rng.choice(table("good") + table("with_variables")))
    values = table("texts") + table("numbers") + table("variable_values") * 2
    values = [value.replace("\0", "") for value in values if len(value) < 50_000]
    plain, drawn = [value for value in values if value.isprintable()], {}
    for name in rng.choices(table("variables"), k=rng.choice([1, 1, 2, 4])):
        drawn[name] = rng.choice(plain if name.startswith(NATIVE) else values)
    return Case(words, variables=drawn, fresh=rng.random() < 0.1)


def signals(rng: Draw) -> Case:
    """commands that write, stopped for a while, interrupted and ended, at any moment"""
    words = shlex.split(rng.choice(table("writers")))
    sent = [(rng.uniform(0, rng.choice([0.05, 0.3, 1.0])), signal.SIGSTOP), (rng.uniform(0, 0.3), signal.SIGCONT)]
    ends = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if rng.random() < 0.7:
        at = rng.choice([0, 1, 2])  # before it is stopped, meanwhile, or after it goes on
        sent[at:at] = [(rng.uniform(0, 0.3), rng.choice(ends)) for _ in range(rng.choice([1, 1, 1, 2]))]
    return Case(words, signals=[(delay, int(number)) for delay, number in sent])


# --- requests

FRAMES = {"plain": 12, "chunked": 2}
FRAMES |= dict.fromkeys(("bad chunk", "huge chunk", "pipelined", "half", "slow", "short", "long"), 1)
"""How a request is sent, and how often."""


def _request(rng: Draw, line: str, headers: list[str], body: bytes, frame: str = "plain") -> Case:
    """A request as bytes: told or chunked, broken, slow, several at once."""
    size = len(body)
    if "chunk" in frame:
        headers = [*headers, "Transfer-Encoding: chunked"]
        bad = rng.choice(["-1", "zz", "", "1;" + "x" * 20_000, f"{size + 9:x}"])
        told_size = {"chunked": f"{size:x}", "bad chunk": bad, "huge chunk": "f" * 16}[frame]
        body = b"%s\r\n%s\r\n0\r\n\r\n" % (told_size.encode(), body)
    elif body or line.startswith(("POST", "PUT")):
        headers = [*headers, f"Content-Length: {size + {'short': -1, 'long': 9}.get(frame, 0)}"]
    raw = "\r\n".join([line, *headers, "", ""]).encode("utf-8", "surrogateescape") + body
    if frame == "pipelined":
        return Case(sends=[raw] * 5, answers=5)
    if frame == "slow":
        cuts = sorted(rng.randrange(len(raw)) for _ in range(2))
        return Case(sends=[raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])], pause=rng.choice([0.2, 2.0]))
    return Case(sends=[raw if frame != "half" else raw[: rng.randrange(1, len(raw))]], half=frame == "half")


def _json_body(rng: Draw, *, labelled: bool) -> bytes:
    """Rows of features, one of them odd, with labels or without."""
    number, width = rng.choice([1, 1, 2, 16, 1000, 1024, 1025]), rng.choice([D] * 6 + [1, D - 1, D + 1, 5000])
    rows = ["[0.6,0.8" + ",0" * (D - 2) + "]"] * number
    cell = rng.choice(table("cells"))
    rows[rng.randrange(number)] = rng.choice([f"[{','.join([cell] + ['0'] * (width - 1))}]"] * 6 + [cell, rows[0]])
    labels = [rng.choice(table("labels")) if rng.random() < 0.3 else '"cat"'] * (number + (rng.random() < 0.1))
    body = table("bodies")[labelled] if rng.random() < 0.5 else rng.choice(table("bodies"))
    return body.replace("%r", ",".join(rows)).replace("%l", ",".join(labels)).encode("utf-8", "surrogatepass")


def _form_body(rng: Draw) -> bytes:
    """Parts of a form, and its end."""
    parts = [
        f"--B\r\nContent-Disposition: form-data; {rng.choice(table('parts'))}\r\n\r\n{rng.choice(table('texts'))[:999]}"
        for _ in range(rng.choice([0, 1, 2, 9, 500]))
    ]
    return ("\r\n".join(parts) + rng.choice(table("ends"))).encode("utf-8", "surrogateescape")


def _operation(rng: Draw) -> tuple[str, str]:
    """A method and target of the interface's own description, with hostile parameters."""
    target, parameters = rng.choice(sorted(SPEC)), []
    method = rng.choice(sorted(SPEC[target]))
    for param in SPEC[target][method].get("parameters", []):
        usual = ["1", "2", "features", "cat", "pca", "true", "all", "unit", "keep"]
        value = rng.choice(table("numbers") + table("texts") if rng.random() < 0.5 else usual)
        value = quote(value.encode("utf-8", "surrogateescape"), safe=rng.choice(["", "/.;"]))
        if param["in"] == "path":
            usual_name = param["name"] == "name" and rng.random() < 0.8
            target = target.replace(f"{{{param['name']}}}", "features" if usual_name else value)
        elif param["in"] == "query" and rng.random() < 0.5:
            parameters += [f"{param['name']}={value}"] * rng.choice([1, 1, 1, 2])
    parameters += ["index=features"] * (target == "/v1/classify" and rng.random() < 0.8)
    return method, target + ("?" + rng.choice(["&", "&", "&", ";"]).join(parameters) if parameters else "")


def requests(rng: Draw) -> Case:
    """requests: paths, parameters, headers, bodies, and how they are sent"""
    what = rng.choices(["target", "parameters", "body"], [2, 4, 4])[0]
    method, target, body, kind = "GET", rng.choice(table("targets")), b"", "application/json"
    if what == "parameters":
        method, target = _operation(rng)
    elif what == "body":
        method, target = "POST", rng.choice(["/v1/classify?index=features", "/v1/indexes/features/keys?norms=unit"])
    if rng.random() < 0.1:
        method = rng.choice(table("methods"))
    if method in ("POST", "PUT", "PATCH"):
        body = _json_body(rng, labelled="/keys" in target)
        if rng.random() < 0.3:
            body, boundary = _form_body(rng), ["; boundary=B"] * 5 + ["", "; boundary=", "; boundary=" + "B" * 5000]
            kind = f"multipart/form-data{rng.choice(boundary)}"
    headers, allowed = ["Host: 127.0.0.1", f"Content-Type: {kind}"], rng.random() < 0.7
    headers += [f"Authorization: Bearer {TOKEN}"] * allowed
    headers += [rng.choice(table("headers")).replace("{h}", "localhost") for _ in range(rng.choice([0, 0, 0, 1, 1, 2]))]
    headers = headers[1:] if rng.random() < 0.03 else headers * 500 if rng.random() < 0.01 else headers
    line = table("request_lines")[0] if rng.random() < 0.9 else rng.choice(table("request_lines"))
    line = line.replace("{m}", method).replace("{t}", target)
    case = _request(rng, line, headers, body, rng.choices(list(FRAMES), list(FRAMES.values()))[0])
    change = method in ("POST", "DELETE") and target.partition("?")[0].endswith("/keys")
    case.bad = change and not any("Bearer" in header for header in headers)
    return case


def uploads(rng: Draw) -> Case:
    """pictures that are sent to classify and add"""
    head = '--B\r\nContent-Disposition: form-data; name="{}"; filename="{}"\r\n\r\n'
    parts = [
        head.format("images", i).encode() + _picture(rng, "http") + b"\r\n" for i in range(rng.choice([1, 1, 1, 3]))
    ]
    target = "/v1/classify?index=images"
    if rng.random() < 0.35:
        target = "/v1/indexes/images/keys"
        parts.append(b'--B\r\nContent-Disposition: form-data; name="label"\r\n\r\ndog\r\n')
    kind = "Content-Type: multipart/form-data; boundary=B"
    headers = ["Host: 127.0.0.1", kind, f"Authorization: Bearer {TOKEN}"]
    return _request(rng, f"POST {target} HTTP/1.1", headers, b"".join(parts) + b"--B--\r\n")


# --- what every try starts with


def _run(line: str, *more: str) -> None:
    from retrieval_tip.cli import main

    main([*line.split(), *more], standalone_mode=False)


def make_base(*, with_images: bool) -> None:
    """``BASE/given``: features with tables, predictions; ``BASE/pictured``: images."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    (BASE / "given").mkdir(parents=True)
    os.chdir(BASE / "given")
    rng = np.random.default_rng(0)
    for name, times in (("queries", 4), ("text", 1), ("table", 4)):
        rows = rng.normal(size=(times * len(CLASSES), D)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        ids = [f"i{i}" for i in range(len(rows))]
        pq.write_table(pa.table({"id": ids, "label": CLASSES * times, "feature": rows.tolist()}), f"{name}.parquet")
    np.save("keys.npy", rows)
    _encrypted(pq.read_table("table.parquet"))
    _run("index build table.parquet --text text.parquet --out index")
    _run("index set index --alpha 2")
    for kind in ("csv", "json", "parquet"):
        _run(f"classify index queries.parquet --top 2 --explain --format {kind} --output predictions.{kind}")
    if with_images:
        _draw()
        for number, label in itertools.product(range(2), CLASSES[:2]):
            folder = BASE / "pictured" / "shots" / label
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(PICTURES / f"picture-PNG-{('L', 'RGB')[number]}-211x307", folder / f"{number}.png")
        os.chdir(BASE / "pictured")
        _run("index build shots --template {} --out images", "--model", f"local-dir:{BACKBONE}")


def _encrypted(found: Any) -> None:
    """A table as encrypted Parquet, with its footer and without, under a key that nobody is given."""
    import pyarrow.parquet as pq
    from pyarrow.parquet import encryption

    class Keys(encryption.KmsClient):  # type: ignore[misc]
        def wrap_key(self, key: bytes, _: str) -> bytes:
            return key.hex().encode()

        def unwrap_key(self, wrapped: bytes, _: str) -> bytes:
            return bytes.fromhex(wrapped.decode())

    factory, server = encryption.CryptoFactory(lambda _: Keys()), encryption.KmsConnectionConfig()
    for name, plain in (("encrypted", False), ("encrypted-columns", True)):
        how = encryption.EncryptionConfiguration("foot", column_keys={"key": ["label"]}, plaintext_footer=plain)
        with pq.ParquetWriter(
            f"{name}.parquet", found.schema, encryption_properties=factory.file_encryption_properties(server, how)
        ) as writer:
            writer.write_table(found)


def _draw() -> None:
    """Pictures of every format and mode that Pillow writes; and bombs: of one colour, few bytes and many pixels."""
    from PIL import Image

    Image.init()
    PICTURES.mkdir()
    for kind, mode, size in itertools.product(sorted(Image.SAVE), table("picture_modes"), SIZES):
        buffer = io.BytesIO()
        with contextlib.suppress(Exception):  # most formats hold few modes
            Image.effect_noise(size, 80).convert(mode).save(buffer, kind)
            (PICTURES / f"picture-{kind}-{mode}-{size[0]}x{size[1]}").write_bytes(buffer.getvalue())
    for where, side in SIDES.items():
        for colour, depth in ((0, 1), (2, 8), (6, 16), (4, 8), (3, 1)):
            (PICTURES / f"bomb-{where}-PNG-{colour}").write_bytes(_png(side, colour, depth))
        for channels in (3, 4):
            runs = b"\xfd" * (side * side // 62 + 1) + bytes(7) + b"\1"
            raw = b"qoif" + struct.pack(">IIBB", side, side, channels, 0) + runs
            (PICTURES / f"bomb-{where}-QOI-{channels}").write_bytes(raw)
        for kind, mode, how in BOMBS:
            place = PICTURES / f"bomb-{where}-{kind}-{mode}-{how}"
            Image.new(mode, (side, side)).save(place, kind, **({"compression": how} if how else {}))


def _png(side: int, colour: int, depth: int) -> bytes:
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    packer, row = zlib.compressobj(1), bytes(1 + (side * bits + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = {b"IHDR": struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)}
    chunks |= ({b"PLTE": bytes(6)} if colour == 3 else {}) | {b"IDAT": data, b"IEND": b""}
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks.items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@dataclass(frozen=True)
class Area:
    """Tries of one kind: how many, how many at once, and whether they need a backbone or the server."""

    case: Callable[[Draw], Case]
    tries: int
    images: bool = False
    served: bool = False
    at_once: int = 2


AREAS = {
    "options": Area(options, 1000),
    "recipes": Area(recipes, 300),
    "sql": Area(sql, 700),
    "tables": Area(tables, 800),
    "images": Area(images, 400, images=True),
    "folders": Area(folders, 600),
    "states": Area(states, 300),
    "rights": Area(rights, 300),
    "environments": Area(environments, 300, at_once=4),  # most of their time they wait for servers that are not there
    "signals": Area(signals, 300),
    "http": Area(requests, 800, served=True, at_once=4),
    "http images": Area(uploads, 300, images=True, served=True, at_once=4),
}
