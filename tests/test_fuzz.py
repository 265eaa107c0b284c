"""Hostile bytes, manifests, tables and questions by the thousand: one line of error, or what is right."""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm
from click.testing import Result
from conftest import SOAK, cache_of, few, sampled
from PIL import Image
from safetensors.torch import save_file
from sealing import body_of, one_line, sealed, snapshot

from retrieval_tip import CacheModel, predictions, verify
from retrieval_tip.cli.output import write_table
from retrieval_tip.data import images, tables
from retrieval_tip.data import imports as exchange
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import MOST_KEPT, NORM_TOLERANCE
from retrieval_tip.data.sources import open_inputs, open_source
from retrieval_tip.errors import RetrievalTipError, StoreError, UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.index import changes, export
from retrieval_tip.index.build import build_index
from retrieval_tip.retrieval import labelled_keys
from retrieval_tip.retrieval.vector_index import faiss
from retrieval_tip.settings import Settings
from retrieval_tip.store import folder as store
from retrieval_tip.store import labels
from retrieval_tip.store import query as asked_in_sql
from retrieval_tip.store.manifest import FORMAT_VERSION, SUFFIXES, TABLE_KINDS
from retrieval_tip.store.writer import collect

Array = npt.NDArray[Any]
Run = Callable[..., Result]

CLASSES = ["cat", "dog", "owl", "eel"]
N, D, ADDED = 40, 8, 3
KINDS = ["flat", "ivf", "hnsw", "classes", "graph", "tuned", "fitted"]
FACTORIES = {"ivf": "IVF4,Flat", "hnsw": "HNSW8", "classes": "Classes", "graph": "Classes,HNSW8"}
DAMAGED, RESEALED = (1100, 96) if SOAK else (70, 10)
"""Damages in all, and those under a manifest that was made to fit them."""
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""When all is made, so that every run damages the same bytes."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The sums here are tiny: on a busy machine, threads would wait for each other far longer than they compute."""
    torch_threads, faiss_threads = torch.get_num_threads(), faiss().omp_get_max_threads()
    torch.set_num_threads(1)
    faiss().omp_set_num_threads(1)
    yield
    torch.set_num_threads(torch_threads)
    faiss().omp_set_num_threads(faiss_threads)


def unit(rows: Array) -> npt.NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


QUERIES = unit(np.random.default_rng(9).normal(size=(6, D)))


def answer(cache: CacheModel) -> tuple[bytes, str]:
    """All that a reader of an index is told about some queries, but for settings that the caller gives."""
    found = cache.classify(QUERIES, top=3, k=7, neighbours=4)
    told = [(each.labels, [(near.key_id, near.source, near.label) for near in each.neighbours]) for each in found]
    return cache.logits(QUERIES).numpy().tobytes(), repr(told)


def opened(folder: Path, **given: Any) -> CacheModel:
    return CacheModel.load(folder, device="cpu", precision="float32", **given)


def made(folder: Path, kind: str, place: Path) -> None:
    """An index of three versions, the last one with a further segment where there can be one."""
    rng = np.random.default_rng(KINDS.index(kind))
    keys, ids = unit(rng.normal(size=(N, D))), np.arange(N) % len(CLASSES)
    more: dict[str, Any] = {}
    if kind == "tuned":
        more["values"] = rng.normal(size=(N, len(CLASSES))).astype(np.float32)
    text = unit(rng.normal(size=(len(CLASSES), D)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = cache_of(keys, ids, CLASSES, text, device="cpu", index=FACTORIES.get(kind, "Flat"), **more)
    if kind == "tuned":
        save_file({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, place / "encoder.safetensors")
        cache = replace(
            cache, tuned=place / "encoder.safetensors", curve=pa.table({"epoch": [1, 2], "loss": [0.5, 0.2]})
        )
    if kind == "fitted":
        closed_form.fit(cache, values="one-hot")
    cache.save(folder)
    cache.settings = cache.settings.override(alpha=1.25)
    cache.save_settings(folder)
    if kind != "tuned":
        cache.add(unit(rng.normal(size=(ADDED, D))), ["cat", "owl", "eel"], ["a", "b", "c"])
    cache.settings = cache.settings.override(beta=4.5)
    cache.save(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An index of each kind; nothing may change here."""
    place = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled_keys, "SMALL", 0)  # what is added stays a segment of its own
        patch.setattr("retrieval_tip.cache_model.SUMS_FROM", 0)  # sums are kept of however few
        patch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 10.0)
        patch.setattr(
            "retrieval_tip.store.history.stamp",
            lambda: {"created_at": "2026-01-01T00:00:00+00:00", "created_by": "retrieval-tip"},
        )
        patch.setattr(
            labels, "datetime", SimpleNamespace(datetime=SimpleNamespace(now=lambda _: NOW), UTC=datetime.UTC)
        )
        for kind in KINDS:
            made(place / kind, kind, place)
    kinds = {kind for name in KINDS for kind in store.read_manifest(place / name).files}
    assert kinds == {*SUFFIXES} - {*TABLE_KINDS, "second"}  # which only a store keeps
    assert [len(store.read_manifest(place / name).later) for name in KINDS] == [1, 1, 1, 1, 1, 0, 1]
    return {kind: place / kind for kind in KINDS}


def copied(index: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(index, place)
    return place


def refused(call: Callable[[], object], *parts: object) -> bool:
    """Whether it ends with an error of ours, of one line that has these parts. Any other exception is a failure."""
    try:
        call()
    except RetrievalTipError as error:
        one_line(error, *parts)
        return True
    return False


def problem_of(call: Callable[[], object], said: str) -> RetrievalTipError | None:
    """The error of ours that it ends with, if any. Any other exception is a failure, of which ``said`` is said."""
    try:
        call()
    except RetrievalTipError as error:
        return error
    except Exception as error:
        raise AssertionError(said) from error
    return None


# --- damage that nobody sealed


class Pipe:
    """A named pipe in place of a file, which tells whether anyone opened it: that would wait for ever."""

    def __init__(self, path: Path) -> None:
        self.path, self.was_opened = path, True
        os.mkfifo(path)
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        os.close(os.open(self.path, os.O_WRONLY))  # until someone reads, who then finds nothing in it

    def close(self) -> None:
        self._thread.join(0.02)
        if self._thread.is_alive():
            self.was_opened = False
            reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            self._thread.join()
            os.close(reader)
        self.path.unlink()


def flipped(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def overwritten(raw: bytes, rng: random.Random) -> bytes:
    size = min(rng.choice([1, 2, 4, 8, 16, 100]), len(raw))
    at = rng.randrange(len(raw) - size + 1)
    run = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size), b"\x7f" * size])
    return raw[:at] + run + raw[at + size :]


def truncated(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(1, len(raw))] if rng.random() < 0.7 else raw[rng.randrange(1, len(raw)) :]


def extended(raw: bytes, rng: random.Random) -> bytes:
    more = rng.choice([b"\0", b"\n", rng.randbytes(rng.randrange(1, 300)), raw, b"\0" * 4096])
    return raw + more if rng.random() < 0.7 else more + raw


def removed_within(raw: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(raw)), rng.randrange(1, 40)
    return raw[:at] + raw[at + size :]


BYTES = [flipped, flipped, flipped, overwritten, overwritten, truncated, extended, removed_within]


def every_file(index: Path) -> list[Path]:
    """Relative: the data files of every version, the manifests, the lock."""
    return sorted(path.relative_to(index) for path in index.rglob("*") if path.is_file())


def harmed(path: Path, raw: bytes, others: list[bytes], rng: random.Random, outside: Path) -> tuple[str, Pipe | None]:
    """Put something else where a file was; what, and the pipe where it is one."""
    kind = rng.choice(["bytes"] * 12 + ["empty", "missing", "swap", "folder", "pipe", "loop", "link", "device"])
    path.unlink()
    raw = raw or b"process 1 on elsewhere"  # a lock that nobody holds is empty
    if kind == "bytes":
        change = rng.choice(BYTES)
        data = change(raw, rng)
        if data == raw:  # 0 written over 0
            data = bytes([raw[0] ^ 1]) + raw[1:]
        path.write_bytes(data)
        return change.__name__, None
    if kind == "empty":
        path.touch()
    elif kind == "swap":
        path.write_bytes(rng.choice([other for other in others if other != raw]))
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        return kind, Pipe(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return kind, None


def test_damage_is_named_and_never_changes_an_answer(world: dict[str, Path], tmp_path: Path) -> None:
    """Of every file of indexes of every kind, however the files are checked."""
    rng, done = random.Random(1), Counter[str]()
    files = {kind: every_file(index) for kind, index in world.items()}
    answers = {kind: answer(opened(index)) for kind, index in world.items()}
    copies = {kind: copied(index, tmp_path / kind) for kind, index in world.items()}
    contents = {kind: {name: (world[kind] / name).read_bytes() for name in names} for kind, names in files.items()}
    current = {kind: {file.name for file in store.read_manifest(index).data_files} for kind, index in world.items()}
    for number in range(DAMAGED):
        kind = KINDS[number % len(KINDS)]
        index, name = copies[kind], files[kind][number // len(KINDS) % len(files[kind])]
        path, raw = index / name, contents[kind][name]
        others = [data for other, data in contents[kind].items() if other.suffix != ".json"]
        outside = tmp_path / "outside"
        outside.write_bytes(raw)  # the right bytes, in the wrong place
        what, pipe = harmed(path, raw, others, rng, outside)
        if what == "loop" or (pipe is not None and name.suffix == ".json"):  # have tests of their own, below
            pipe.close() if pipe is not None else path.unlink()
            path.write_bytes(raw)
            continue
        said = f"{number}: {kind}/{name}: {what}"
        try:
            needed = name.name == "manifest.json" or str(name) in current[kind]
            for verified in ("full", "fast") if needed else ("full", "fast")[number % 2 :][:1]:
                if needed:
                    where = index if what == "missing" and name.name == "manifest.json" else path
                    assert refused(partial(opened, index, verify=verified), where), said
                else:
                    assert answer(opened(index, verify=verified)) == answers[kind], said
            if name.name != "lock" and what != "missing" and not needed:
                assert refused(partial(verify, index)), said
        finally:
            if pipe is not None:
                pipe.close()
                assert not pipe.was_opened, said
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            path.write_bytes(raw)
        done[what] += 1
    assert done.total() > 0.9 * DAMAGED
    assert len(done) > 10
    for kind, index in copies.items():  # and all of it was put back
        assert snapshot(index) == snapshot(world[kind])


def test_a_writer_changes_nothing_in_a_damaged_index(world: dict[str, Path], tmp_path: Path) -> None:
    rng = random.Random(2)
    for number in range(72 if SOAK else 14):
        kind = KINDS[number % len(KINDS)]
        index = copied(world[kind], tmp_path / "x")
        names = sorted(store.read_manifest(index).data_files, key=lambda file: file.name)
        path = index / names[number // len(KINDS) % len(names)].name
        path.write_bytes(rng.choice(BYTES)(path.read_bytes(), rng) + rng.choice([b"", b"x"]))
        if path.read_bytes() == (world[kind] / path.relative_to(index)).read_bytes():
            continue
        before = snapshot(index)
        for change in (
            partial(changes.relabel, index, "dog", key_ids=[0]),
            partial(changes.remove, index, key_ids=[1]),
            partial(changes.configure, index, alpha=2.0),
            partial(changes.compact, index),
            partial(changes.clone, index, tmp_path / "y"),
            partial(store.query, index, "SELECT 1"),
        ):
            assert refused(change, path.name), (kind, path.name)
        assert snapshot(index) == before
        assert not (tmp_path / "y").exists()


def test_links_within_the_folder_are_followed(world: dict[str, Path], tmp_path: Path) -> None:
    for kind, index in world.items():
        place = copied(index, tmp_path / kind)
        (place / "kept").mkdir()
        for name in every_file(index):
            if name.name != "lock":
                (place / name).replace(place / "kept" / name.name)
                (place / name).symlink_to(place / "kept" / name.name)
        assert answer(opened(place)) == answer(opened(index))
        assert answer(verify(place)) == answer(opened(index))


@pytest.mark.parametrize("name", ["manifest.json", "manifests/000001.json", "data", "data/keys", "lock"])
def test_a_link_to_itself_is_an_error_of_one_line(world: dict[str, Path], tmp_path: Path, name: str) -> None:
    index = copied(world["flat"], tmp_path / "x")
    path = next(index.glob(f"{name}*"))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)
    call = partial(changes.configure, index, alpha=2.0) if name == "lock" else partial(verify, index)
    assert refused(call, path)


@pytest.mark.parametrize("name", ["manifest.json", "manifests/000001.json"])
def test_a_pipe_in_place_of_a_manifest_is_not_opened(world: dict[str, Path], tmp_path: Path, name: str) -> None:
    index = copied(world["flat"], tmp_path / "x")
    (index / name).unlink()
    pipe = Pipe(index / name)
    try:
        assert refused(lambda: verify(index), name)
    finally:
        pipe.close()
    assert not pipe.was_opened


def test_damaged_labels_are_never_described(world: dict[str, Path], tmp_path: Path) -> None:
    rng, index = random.Random(3), copied(world["flat"], tmp_path / "x")
    path = index / store.read_manifest(index).files["labels"].name
    raw = path.read_bytes()
    for _ in range(150 if SOAK else 40):
        path.write_bytes(flipped(raw, rng))
        if path.read_bytes() != raw:
            assert refused(lambda: store.describe(index), path)


# --- damage under a manifest that was made to fit it: by someone who knows the format

ATTACKED = """
import json, os, resource, signal, sys
import warm
warm.import_now(images=False)
import faiss, torch
from click.testing import CliRunner
from retrieval_tip.cli import main
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)

def told(arguments):
    result = CliRunner().invoke(main, arguments)
    known = result.exception is None or isinstance(result.exception, SystemExit)
    return {"status": result.exit_code, "stderr": result.stderr, "stdout": result.stdout,
            "foreign": None if known else repr(result.exception)[:300]}

for line in sys.stdin:
    commands = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        size = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), size + (4 << 30)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with os.fdopen(writer, "w") as file:
            for arguments in commands:
                file.write(json.dumps(told(arguments)) + "\\n")
                file.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        results = [json.loads(line) for line in file]
    signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) else 0
    print(json.dumps({"results": results, "signal": signal_number}), flush=True)
"""
"""Runs commands of the command line, each list in a process of its own, that may crash and has few GiB of memory."""


class Victims:
    """Two programs that run commands, a list at a time."""

    def __init__(self, path: str) -> None:
        self.found: dict[int, dict[str, Any]] = {}
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | warm.ALONE
        self._programs = [
            subprocess.Popen(
                [warm.python(path), "-c", ATTACKED],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for _ in range(2)
        ]

    def run(self, commands: list[list[list[str]]]) -> list[dict[str, Any]]:
        """What each list of commands came to: results as far as it came, and the signal that ended it, or 0."""

        def share(number: int) -> None:
            program = self._programs[number]
            assert program.stdin is not None
            assert program.stdout is not None
            for at in range(number, len(commands), len(self._programs)):
                program.stdin.write(json.dumps(commands[at]) + "\n")
                program.stdin.flush()
                self.found[at] = json.loads(program.stdout.readline())

        self.found = {}
        threads = [threading.Thread(target=share, args=(number,)) for number in range(len(self._programs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [self.found[at] for at in range(len(commands))]

    def close(self) -> None:
        for program in self._programs:
            program.communicate()


@pytest.fixture(scope="module")
def victims(warm_path: str) -> Iterator[Victims]:
    found = Victims(warm_path)
    yield found
    found.close()


def resealed(index: Path, name: str, data: bytes) -> Path:
    """Put these bytes in place of a data file, and make file name and manifest fit; the file."""
    body, digest = body_of(index), hashlib.sha256(data).hexdigest()
    entries = [*body["files"].values(), *(file for part in body["later"] for file in part.values())]
    entry = next(entry for entry in entries if entry["name"] == name)
    (index / name).unlink()
    entry["name"] = f"{name[: name.rindex('-') + 1]}{digest[:16]}{Path(name).suffix}"
    entry["sha256"], entry["bytes"] = digest, len(data)
    (index / entry["name"]).write_bytes(data)
    (index / "manifest.json").write_bytes(sealed(body))
    return index / str(entry["name"])


def questions(index: Path, table: Path) -> list[list[str]]:
    return [
        [
            "classify", str(index), str(table), "--explain", "--top", "3", "-k", "7", "--format", "json", "--device",
            "cpu",
        ],
        ["index", "verify", str(index)],
        ["index", "query", str(index), "SELECT * FROM labels", "--format", "json"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature table to be classified."""
    path = tmp_path_factory.mktemp("table") / "queries.parquet"
    pq.write_table(pa.table({"id": [f"q{i}" for i in range(len(QUERIES))], "feature": QUERIES.tolist()}), path)
    return path


def check_told(result: dict[str, Any]) -> None:
    """An answer, or one line of error; never a traceback."""
    assert result["foreign"] is None
    assert "Traceback" not in result["stderr"]
    assert result["status"] in (0, 1, 2), result
    if result["status"]:
        lines = [
            line for line in result["stderr"].splitlines() if not line.startswith(("warning: ", "Usage: ", "Try "))
        ]
        assert len([line for line in lines if line]) == 1, result
        assert lines[-1].startswith("Error: ")


def test_sealed_damage_ends_in_an_error_an_answer_or_within_faiss(
    world: dict[str, Path], table: Path, victims: Victims, tmp_path: Path
) -> None:
    """Of 1800 damages of FAISS files alone, 1 crashed in FAISS; a crash elsewhere is none of these."""
    rng, commands, done = random.Random(4), [], []
    for number in range(RESEALED):
        kind = KINDS[number % len(KINDS)]
        files = sorted(store.read_manifest(world[kind]).data_files, key=lambda file: file.name)
        name = files[number // len(KINDS) % len(files)].name
        index = copied(world[kind], tmp_path / str(number))
        raw = (index / name).read_bytes()
        done.append(resealed(index, name, rng.choice(BYTES)(raw, rng) or b"x"))
        commands.append(questions(index, table))
    for path, found in zip(done, victims.run(commands), strict=True):
        if path.suffix != ".faiss":
            assert found["signal"] == 0, path
        for result in found["results"]:
            check_told(result)


@pytest.mark.parametrize("kind", ["keys", "text", "values"])
def test_a_header_of_an_array_that_does_not_end_is_refused(world: dict[str, Path], tmp_path: Path, kind: str) -> None:
    index = copied(world["tuned"], tmp_path / "x")
    name = store.read_manifest(index).files[kind].name
    path = resealed(index, name, (index / name).read_bytes().replace(b"(", b"[[", 1))
    assert refused(lambda: opened(index), path)


@pytest.mark.parametrize("wrong", ["the name of a column", "a text"])
def test_labels_that_are_not_utf8_are_refused(world: dict[str, Path], tmp_path: Path, wrong: str) -> None:
    index = copied(world["flat"], tmp_path / "x")
    name = store.read_manifest(index).files["labels"].name
    if wrong == "a text":
        table = pq.read_table(index / name)
        place = table.column_names.index("source")
        pq.write_table(table.set_column(place, "source", not_text(N)), index / name)
    data = (index / name).read_bytes()
    path = resealed(index, name, data if wrong == "a text" else data.replace(b"key_id", b"key\xdfid"))
    assert refused(lambda: answer(opened(index)), path)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_that_finds_rows_that_are_not_there_is_refused(
    world: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    index = copied(world[kind], tmp_path / "x")
    entry, keys = store.read_manifest(index).files["index"], np.array(opened(index).keys[:N], dtype=np.float32)
    if kind == "ivf":
        stored = faiss().index_factory(D, "IVF4,Flat", faiss().METRIC_INNER_PRODUCT)
        stored.cp.min_points_per_centroid = 1
        stored.train(keys)
        stored.nprobe = 4
    else:
        stored = faiss().IndexIDMap(faiss().IndexFlatIP(D))
    stored.add_with_ids(keys, np.arange(N, dtype=np.int64) + 10**6)
    raw = io.BytesIO()
    faiss().write_index(stored, faiss().PyCallbackIOWriter(raw.write))
    resealed(index, entry.name, raw.getvalue())
    assert refused(lambda: answer(opened(index)), index)


def test_the_first_bytes_of_an_index_do_not_crash(
    world: dict[str, Path], table: Path, victims: Victims, tmp_path: Path
) -> None:
    commands = []
    sizes = [1 + size for size in sampled(47, 12)]
    for size in sizes:
        index = copied(world["flat"], tmp_path / str(size))
        name = store.read_manifest(index).files["index"].name
        resealed(index, name, (index / name).read_bytes()[:size])
        commands.append([["index", "verify", str(index)]])
    assert [found["signal"] for found in victims.run(commands)] == [0] * len(sizes)


# --- manifests of wrong types

HUGE = 10**400
LOOKALIKE = "data/kеys-0123456789abcdef.npy"  # with a Cyrillic letter
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**18, 2**63, 10**30, HUGE, -HUGE, 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", "x", "1", "\0", "a\nb", "\ud800", "ｎ", "x" * 100_000,
    [], [None], [[]], [1], ["x"], [{}], {}, {"": None}, {"x": {"y": []}}, "../x", "/etc/passwd",
    "data\\x", "data/../x", "file:///x", LOOKALIKE,
]  # fmt: skip
SETTINGS = ("alpha", "beta", "k", "tail", "temperature", "logit_scale", "least_cache", "log_offset", "class_names")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a body there is a value, at any depth."""
    if at:
        yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def with_value(body: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    part = dict(body) if isinstance(body, dict) else list(body)
    part[at[0]] = with_value(body[at[0]], at[1:], value)
    return part


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


BACKBONE = {"model": "m", "pretrained": None, "weights": "ab", "config": "cd", "preprocess": {"mean": [0.5]}}


def plain(cache: CacheModel, body: dict[str, Any]) -> CacheModel:
    """With the settings and the names of the classes that there were."""
    own = {field.name: body[field.name] for field in fields(Settings) if field.name in body}
    return replace(cache, class_names=body["class_names"], settings=Settings(**own))


def test_a_manifest_of_any_values_is_refused_or_answers_as_it_says(world: dict[str, Path], tmp_path: Path) -> None:
    index = copied(world["ivf"], tmp_path / "x")
    body = {key: value for key, value in body_of(index).items() if key != "sha256"}
    body |= {"backbone": BACKBONE, "provenance": {"seed": 1, "views": 1, "x": [1, {"y": None}]}}
    (index / "manifest.json").write_bytes(sealed(body))
    before, done, kept, rng = answer(opened(index)), 0, set(), random.Random(7)
    for at in places(body):
        whole, part = (len(HOSTILE), 16) if SOAK else (18, 2)
        for value in rng.sample(HOSTILE, whole if len(at) == 1 else part):
            if (at == ("later",) and value not in ({}, [], [{}])) or (at == ("later", 0) and type(value) is not dict):
                continue  # has a test of its own, below
            (index / "manifest.json").write_bytes(sealed(with_value(body, at, value)))
            done += 1
            try:
                cache = opened(index)
            except UsageError as error:
                one_line(error, at[0])
                assert at[0] in SETTINGS
                continue
            except StoreError as error:
                one_line(error, index)
                continue
            kept.add(at[0])
            assert answer(plain(cache, body)) == before, (at, value)
            if at[0] in SETTINGS and len(at) == 1:
                read = getattr(cache if at[0] == "class_names" else cache.settings, at[0])
                assert read == (float(value) if isinstance(read, float) else value)
                refused(partial(cache.classify, QUERIES))
            refused(lambda: store.describe(index))
            refused(lambda: store.history(index))
    assert done > (1500 if SOAK else 350)
    assert kept <= {*SETTINGS, "format_version", "version", "parent", "created_at", "created_by", "templates", "index",
                    "backbone", "provenance", "built", "fitted", "table", "change", "next_key_id"}  # fmt: skip


@pytest.mark.parametrize("value", [None, 5, "x", [], [[]]], ids=str)
def test_a_later_segment_that_is_no_object_is_refused(world: dict[str, Path], tmp_path: Path, value: Any) -> None:
    index = copied(world["flat"], tmp_path / "x")
    (index / "manifest.json").write_bytes(sealed(body_of(index) | {"later": [value]}))
    assert refused(lambda: opened(index), index / "manifest.json", "damaged")


def test_segments_of_wrong_entries_are_refused(world: dict[str, Path], tmp_path: Path) -> None:
    index = copied(world["flat"], tmp_path / "x")
    body = body_of(index)
    [segment] = body["later"]
    keys, labelled = segment["keys"], segment["labels"]
    wrong: list[Any] = [
        [segment, segment],  # n does not fit
        [{"keys": keys}],
        [{"labels": labelled}],
        [{"keys": labelled, "labels": keys}],
        [segment | {"index": body["files"]["index"]}],
        [segment | {"values": keys}],
        [{"keys": keys | {"rows": ADDED + 1}, "labels": labelled}],
        [{"keys": keys | {"rows": ADDED + 1}, "labels": labelled | {"rows": ADDED + 1}}],
        [{"keys": keys | {"name": body["files"]["keys"]["name"]}, "labels": labelled}],
        [{"keys": keys | {"name": "../" + keys["name"]}, "labels": labelled}],
        [{"keys": keys | {"name": LOOKALIKE}, "labels": labelled}],
        [{"keys": keys | {"name": keys["name"].upper()}, "labels": labelled}],
        [],
    ]
    for later in wrong:
        (index / "manifest.json").write_bytes(sealed(body | {"later": later}))
        assert refused(lambda: opened(index), index / "manifest.json", "damaged"), later
    twice = body | {"later": [segment, segment], "n": body["n"] + ADDED}
    (index / "manifest.json").write_bytes(sealed(twice))
    assert refused(lambda: opened(index), "key ids")
    swapped = [{"keys": body["files"]["keys"], "labels": body["files"]["labels"]}]
    first = body["files"] | {"keys": keys, "labels": labelled}
    (index / "manifest.json").write_bytes(sealed(body | {"later": swapped, "files": first}))
    assert refused(lambda: opened(index), index / "manifest.json")  # the index is not over as many


def test_an_object_with_a_key_twice_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    index = copied(world["flat"], tmp_path / "x")
    body = {key: value for key, value in body_of(index).items() if key != "sha256"}
    for key, value in body.items():
        text = json.dumps(body, indent=1, ensure_ascii=False)
        for more in (value, None, 10**6):
            twice = text[:-2] + f',\n "{key}": {json.dumps(more)}\n}}'
            digest = hashlib.sha256(twice.encode()).hexdigest()
            (index / "manifest.json").write_bytes((twice[:-2] + f',\n "sha256": "{digest}"\n}}').encode())
            assert refused(lambda: opened(index), index / "manifest.json"), key


@pytest.mark.parametrize("depth", [50, 200, 990, 10_000, 200_000])
@pytest.mark.parametrize("field", ["provenance", "backbone", "templates", "later", "files", "class_names", "n"])
def test_values_nested_deeply_are_refused_or_loaded(
    world: dict[str, Path], tmp_path: Path, field: str, depth: int
) -> None:
    index = copied(world["flat"], tmp_path / "x")
    body, before = body_of(index), answer(opened(index))
    value = "@" if depth > 900 else nested(depth)
    raw = sealed(body | {field: {"deep": value} if field == "provenance" else value})
    (index / "manifest.json").write_bytes(raw.replace(b'"@"', b"[" * depth + b"]" * depth))
    if not refused(lambda: opened(index), index / "manifest.json"):
        assert field == "provenance"
        assert answer(opened(index)) == before
        assert store.describe(index)["provenance"] == {"deep": value}


def test_what_can_be_loaded_can_be_described(world: dict[str, Path], tmp_path: Path) -> None:
    index = copied(world["flat"], tmp_path / "x")
    (index / "manifest.json").write_bytes(sealed(body_of(index) | {"provenance": {"x": nested(800)}}))
    assert refused(lambda: opened(index)) or not refused(lambda: store.describe(index))


@pytest.mark.parametrize("value", [1, N - 1, 2**63 - 1, 10**30], ids=lambda value: f"{value:.0e}")
def test_key_ids_are_never_given_twice_whatever_the_manifest_says(
    world: dict[str, Path], tmp_path: Path, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labelled_keys, "SMALL", 0)
    index = copied(world["flat"], tmp_path / "x")
    (index / "manifest.json").write_bytes(sealed(body_of(index) | {"next_key_id": value}))

    def add() -> None:
        cache = opened(index)
        cache.add(QUERIES[:2], ["cat", "dog"])
        cache.save(index)

    if not refused(lambda: opened(index), index / "manifest.json"):
        refused(add)
        ids = opened(index).labels["key_id"].to_pylist()
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("newer", [FORMAT_VERSION + 1, 10**6, 10**18])
def test_a_newer_format_is_refused_whatever_else_it_says(world: dict[str, Path], tmp_path: Path, newer: int) -> None:
    index = copied(world["flat"], tmp_path / "x")
    body = body_of(index) | {"format_version": newer, "created_by": "retrieval-tip 77.1"}
    before = None
    for raw in [
        sealed(body),
        json.dumps(body | {"later": "elsewhere", "files": 5, "sha256": None}).encode(),
        json.dumps({"format": body["format"], "format_version": newer, "created_by": "retrieval-tip 77.1"}).encode(),
    ]:
        (index / "manifest.json").write_bytes(raw)
        before = snapshot(index)
        for call in (
            lambda: opened(index),
            lambda: verify(index),
            lambda: store.query(index, "SELECT 1"),
            lambda: collect(index),
            lambda: changes.relabel(index, "dog", key_ids=[0]),
            lambda: changes.rollback(index),
            lambda: changes.clone(index, tmp_path / "y"),
        ):
            assert refused(
                call, f"index format {newer}", f"reads up to {FORMAT_VERSION}", "retrieval-tip 77.1: install that"
            )
        assert snapshot(index) == before
    for value in (None, [], {"a": 1}, 5, "a\n\x1b[31m\u202e" + "b" * 10):
        (index / "manifest.json").write_bytes(json.dumps(body | {"created_by": value}).encode())
        assert refused(lambda: opened(index), f"index format {newer}")


def test_format_1_takes_nothing_of_format_2(world: dict[str, Path], tmp_path: Path) -> None:
    index = copied(world["flat"], tmp_path / "x")
    body = body_of(index)
    (index / "manifest.json").write_bytes(sealed(body | {"format_version": 1}))  # one segment: n does not fit
    assert refused(lambda: opened(index), index / "manifest.json", "damaged")
    one = {"later": [5], "next_key_id": "x", "change": None, "n": N, "format_version": 1}
    (index / "manifest.json").write_bytes(sealed(body | one))
    cache = opened(index)
    assert (cache.n, cache.segments) == (N, 1)
    assert cache.next_key_id == max(cache.labels["key_id"].to_pylist()) + 1
    bare = {key: value for key, value in body.items() if key not in ("later", "next_key_id", "change")}
    (index / "manifest.json").write_bytes(sealed(bare | {"n": N, "format_version": 1}))
    assert answer(opened(index)) == answer(cache)
    (index / "manifest.json").write_bytes(sealed(bare | {"n": N, "format_version": 2}))
    assert refused(lambda: opened(index), index / "manifest.json", "damaged")


# --- tables

TEXTS = [
    "cat", "dog", "owl", "ü 猫", "a,b", 'say "x"', "tab\there", "a\nb", " cat ", "0", "null", "NaN", "\x1b[31m",
    "=1+1", "\u202e",
]  # fmt: skip
BLANKS = [None, "", "  ", "\t"]
TABLES, TEXT_TABLES = (600, 400) if SOAK else (60, 40)


class Wrong(Exception):
    """What an independent reading of a table finds wrong, and the row, where it is one."""

    def __init__(self, row: int | None = None) -> None:
        super().__init__(row)
        self.row = row


def some_texts(n: int, rng: random.Random, blanks: float) -> list[str | None]:
    return [rng.choice(BLANKS) if rng.random() < blanks else rng.choice(TEXTS) for _ in range(n)]


def text_column(n: int, rng: random.Random) -> pa.Array:
    """Labels or ids of some type, mostly text."""
    texts = some_texts(n, rng, rng.choice([0, 0, 0, 0, 0, 0, 0.1]))
    kind = rng.randrange(50)
    if kind < 10:
        return pa.array(texts, pa.string())
    if kind == 10 and n:
        return pa.array(["x" * (tables.MAX_TEXT + rng.choice([0, 1])), *texts[1:]], pa.string())
    other: dict[int, Callable[[], pa.Array]] = {
        11: lambda: pa.array(texts, pa.large_string()),
        12: lambda: pa.array(texts, pa.string_view()),
        13: lambda: pa.array(texts, pa.string()).dictionary_encode(),
        14: lambda: pa.array([rng.randrange(4) for _ in range(n)], pa.int64()),
        15: lambda: pa.array([rng.choice([0, 255]) for _ in range(n)], pa.uint8()),
        16: lambda: pa.array([rng.choice([None, 2**63 - 1, -(2**63)]) for _ in range(n)], pa.int64()),
        17: lambda: pa.nulls(n),
        18: lambda: pa.array([1.5] * n),
        19: lambda: pa.array([b"\xff"] * n, pa.binary()),
        20: lambda: pa.array([True] * n),
        21: lambda: pa.array([["cat"]] * n, pa.list_(pa.string())),
        22: lambda: pa.array([0] * n, pa.timestamp("us")),
        23: lambda: not_text(n),
    }
    return other.get(kind, lambda: pa.array(texts, pa.string()))()


def not_text(n: int) -> pa.Array:
    """Text that is not UTF-8."""
    places = np.arange(n + 1, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(places), pa.py_buffer(b"\xff" * n)])


def feature_column(n: int, d: int, rng: random.Random) -> pa.Array:
    """Features of some type; about a half can be used, and most of the others are wrong in one row or two."""
    rows: list[Any] = unit(np.random.default_rng(rng.randrange(2**32)).normal(size=(n, d))).tolist()
    for _ in range(rng.choice([0, 0, 0, 0, 1, 2]) if n else 0):
        row, at = rng.randrange(n), rng.randrange(d)
        if isinstance(rows[row], list) and len(rows[row]) == d:
            value = rng.choice(
                [
                    "scale", "scale", float("nan"), float("inf"), float("-inf"), None, "null", "zero", "short",
                    "long", "none", 1e300,
                ]
            )  # fmt: skip
            if value == "scale":
                rows[row] = [(x or 0) * rng.choice([0.5, 1e-3, 3.0]) for x in rows[row]]
            elif isinstance(value, str):
                rows[row] = {
                    "null": None,
                    "zero": [0.0] * d,
                    "short": rows[row][1:],
                    "long": [*rows[row], 0.0],
                    "none": [],
                }[value]
            else:
                rows[row][at] = value
    floats = [
        [float("inf") if x is not None and abs(x) > 1e38 else x for x in r] if r is not None else None for r in rows
    ]
    even = all(r is None or len(r) == d for r in rows)
    kind = rng.randrange(22)
    odd: dict[int, Callable[[], pa.Array]] = {
        0: lambda: pa.array([None if r is None else str(r) for r in rows], pa.string()),
        1: lambda: pa.array(range(n), pa.int64()),
        2: lambda: pa.nulls(n),
        3: lambda: pa.array([b"\0" * 4 * d] * n, pa.binary()),
        4: lambda: pa.array([{"x": 1.0}] * n, pa.struct([("x", pa.float32())])),
        5: lambda: pa.array([[1, 0]] * n, pa.list_(pa.int32())),
        6: lambda: pa.array([[decimal.Decimal("1.0")]] * n, pa.list_(pa.decimal128(5, 1))),
        7: lambda: pa.array([["1.0"]] * n, pa.list_(pa.string())),
        8: lambda: pa.array([[[1.0]]] * n, pa.list_(pa.list_(pa.float32()))),
        9: lambda: pa.array([1.0] * n, pa.float32()),
        10: lambda: pa.array([True] * n).dictionary_encode(),
    }  # fmt: skip
    if kind in odd and rng.random() < 0.3:
        return odd[kind]()
    number = rng.choice([pa.float32(), pa.float32(), pa.float64(), pa.float16()])
    values = rows if number == pa.float64() else floats
    if number == pa.float16():
        values = [None if r is None else [None if x is None else np.float16(x) for x in r] for r in floats]
    makes = [pa.list_(number), pa.large_list(number), *([pa.list_(number, d)] * 2 if even else [])]
    return pa.array(values, rng.choice(makes))


def further_column(n: int, rng: random.Random) -> pa.Array:
    big = rng.choice([2**62, -(2**62), 0, 10**15])
    return rng.choice(
        [
            lambda: pa.array(some_texts(n, rng, 0.3), pa.string()),
            lambda: pa.array(some_texts(n, rng, 0.3), pa.string_view()),
            lambda: pa.array([["a"]] * n, pa.list_(pa.string_view())),
            lambda: pa.array([big] * n, pa.timestamp(rng.choice(["us", "ns"]), rng.choice([None, "UTC", "No/Where"]))),
            lambda: pa.array([2**30] * n, pa.date32()),
            lambda: pa.array([big] * n, pa.duration("us")),
            lambda: pa.array([decimal.Decimal("1.5")] * n, pa.decimal256(50, 2)),
            lambda: pa.array([[{"a": [None, 1]}, None]] * n),
            lambda: pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
            lambda: pa.array([2**64 - 1] * n, pa.uint64()),
            lambda: pa.array(np.full(n, np.nan, np.float16)),
            lambda: pa.array([b"\xff\0"] * n, pa.binary()),
            lambda: pa.nulls(n),
            lambda: pa.array(["y" * 100_000] * n, pa.string()),
            lambda: not_text(n),
        ]
    )()


FURTHER = ["split", "digest", "key_id", "source", "views", "added_at", "KEY_ID", "feature.x", "id.x",
           "", "a\nb", 'a"b', "position", "shot", "class_id", "path", "\x1b"]  # fmt: skip


def any_table(rng: random.Random, d: int) -> pa.Table:
    n = rng.choice([0, 1, 2, 3, 5, 8, 8, 8, 12, 30])
    columns: dict[str, pa.Array] = {}
    for name, make, missing in (
        ("id", lambda: text_column(n, rng), 0.2),
        ("label", lambda: text_column(n, rng), 0.05),
        ("feature", lambda: feature_column(n, d, rng), 0.04),
    ):
        if rng.random() >= missing:
            columns[name] = make()
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        columns.setdefault(rng.choice(FURTHER), further_column(n, rng))
    found = pa.table(dict(rng.sample(sorted(columns.items()), len(columns))))
    if rng.random() < 0.03 and found.num_columns:
        found = found.append_column(found.column_names[0], found.column(0))
    return found


def whole(path: Path) -> pa.Table:
    """All columns, also where two have one name."""
    with pq.ParquetFile(path) as file:
        return file.read()


def told_features(path: Path, norms: str) -> npt.NDArray[np.float32]:
    """The features of a table, value by value. Raises Wrong for what has to be refused."""
    column = whole(path)["feature"]
    if not hasattr(column.type, "value_type") or pa.types.is_dictionary(column.type):
        raise Wrong
    if not pa.types.is_floating(column.type.value_type):
        raise Wrong
    rows = column.to_pylist()
    if not rows:
        raise Wrong
    for wrong in (
        lambda row: row is None,
        lambda row: len(row) != len(rows[0]) or not row,
        lambda row: any(x is None for x in row),
    ):
        for number, row in enumerate(rows):
            if wrong(row):
                raise Wrong(number)
    with np.errstate(over="ignore"):
        found = np.array(rows, dtype=np.float64).astype(np.float32)
    wide = found.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1))
    checks = [~np.isfinite(wide).all(axis=1)]
    checks += [lengths == 0] if norms != "keep" else []
    checks += [abs(lengths - 1) > NORM_TOLERANCE] if norms == "check" else []
    checks += [lengths > MOST_KEPT] if norms == "keep" else []
    for bad in checks:
        if bad.any():
            raise Wrong(int(np.flatnonzero(bad)[0]))
    return (wide / lengths[:, None]).astype(np.float32) if norms == "unit" else found


def told_texts(path: Path, name: str) -> list[str | None] | None:
    """A column of text, blanks as None; None where there is no such column. Raises Wrong where it is no text."""
    schema = pq.read_schema(path)
    if name not in schema.names:
        return None
    column = whole(path)[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()) and not pa.types.is_integer(kind):
        raise Wrong
    try:
        found = [None if value is None or not str(value).strip() else str(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        raise Wrong from None
    for value in found:
        if value is not None and len(value) > tables.MAX_TEXT:
            raise Wrong
    return found


def told(path: Path, norms: str) -> tuple[list[str], list[str], npt.NDArray[np.float32]]:
    """Ids, labels and features of a feature table. Raises Wrong for what has to be refused."""
    labelled = told_texts(path, "label")
    ids = told_texts(path, "id")
    if labelled is None or None in labelled or (ids is not None and None in ids) or not labelled:
        raise Wrong
    features = told_features(path, norms)
    names = [str(row) for row in range(len(labelled))] if ids is None else ids
    return [str(name) for name in names], [str(label) for label in labelled], features


def readable(path: Path) -> bool:
    """Whether a table is one at all: each column once, text in UTF-8, of types that rows can be taken of."""
    schema = pq.read_schema(path)
    if len(set(schema.names)) < len(schema.names) or "feature" not in schema.names or "label" not in schema.names:
        return False
    try:
        plain = whole(path)
        plain.validate(full=True)
    except (pa.ArrowException, OSError):
        return False
    return pa.list_(pa.string_view()) not in plain.schema.types


BASE_D = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small index and a table to build others from; nothing may change here."""
    place = tmp_path_factory.mktemp("base")
    rows = unit(np.random.default_rng(3).normal(size=(8, BASE_D)))
    columns = {"id": [f"b{i}" for i in range(8)], "label": TEXTS[:4] * 2, "feature": rows.tolist()}
    pq.write_table(pa.table(columns), place / "train.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 10.0)
        build_index(open_source(place / "train.parquet"), place / "index", Encoder(), device="cpu")
    pq.write_table(pa.table(columns | {"label": TEXTS[:1] * 8}), place / "cats.parquet")
    return place


def rows_of(cache: CacheModel) -> dict[int, tuple[str, str, Array]]:
    """Source, label and key of each key id."""
    described = cache.labels.select(["key_id", "source", "label"]).to_pylist()
    keys = np.asarray(cache.keys)
    return {row["key_id"]: (row["source"], row["label"], keys[at]) for at, row in enumerate(described)}


def same(found: list[tuple[str, str, Array]], path: Path, norms: str) -> None:
    """The rows as they are told."""
    ids, labelled, features = told(path, norms)
    assert [each[:2] for each in found] == list(zip(ids, labelled, strict=True))
    np.testing.assert_allclose(
        np.stack([each[2] for each in found]), features, rtol=2e-6 if norms == "unit" else 0, atol=0
    )


class Consumers:
    """What reads a table; each returns what it made of it, checked against the independent reading."""

    def __init__(self, base: Path, place: Path) -> None:
        self.base, self.out, self.index = base, place / "out", place / "index"

    def source(self, path: Path, norms: str) -> None:
        source = open_source(path)
        block = Encoder(norms=norms).encode(source)
        same(list(zip(source.sources, source.labels, block.features, strict=True)), path, norms)

    def build(self, path: Path, norms: str) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        try:
            cache = build_index(open_source(path), self.out, Encoder(norms=norms), device="cpu", alpha=1.0, beta=1.0)
        finally:
            assert not self.out.exists() or store.is_index(self.out)
        found = rows_of(verify(self.out))
        same([found[key_id] for key_id in range(len(found))], path, norms)
        assert sorted(set(told(path, norms)[1])) == cache.class_names

    def add(self, path: Path, norms: str) -> None:
        index = copied(self.base / "index", self.index)
        try:
            added = changes.add(index, open_source(path), Encoder(norms=norms))
        except RetrievalTipError:
            assert snapshot(index) == snapshot(self.base / "index")
            raise
        found = rows_of(verify(index))
        same([found[key_id] for key_id in added.key_ids], path, norms)
        assert len(found) == 8 + len(added.key_ids)

    def classify(self, path: Path, norms: str) -> None:
        cache = opened(self.base / "index")
        found = [
            (name, each.logits)
            for source in open_inputs([str(path)])
            for block in cache.classify_source(source, Encoder(norms=norms))
            for name, each in zip(block.inputs, block, strict=True)
        ]
        ids = told_texts(path, "id") or [str(row) for row in range(len(found))]
        expected = cache.logits(told_features(path, norms)).numpy()
        assert [name for name, _ in found] == ids
        np.testing.assert_allclose(np.stack([row for _, row in found]), expected, rtol=1e-5, atol=1e-5)

    def text(self, path: Path, norms: str) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        encoder = Encoder(norms=norms)
        cache = build_index(
            open_source(self.base / "cats.parquet"), self.out, encoder, text=path, device="cpu", alpha=1.0, beta=1.0
        )
        _, labelled, features = told(path, "check" if norms == "check" else "unit")
        assert cache.class_names == list(dict.fromkeys(labelled))
        for name, weights in zip(cache.class_names, cache.text_weights.numpy(), strict=True):
            own = features[[label == name for label in labelled]].astype(np.float64)
            own = own if norms == "check" else unit(own)
            np.testing.assert_allclose(weights, unit(own.mean(axis=0)), atol=1e-5)

    def predictions(self, path: Path, norms: str) -> None:
        """Under the names of columns that predictions have."""
        renamed = whole(path)
        names = [{"id": "input", "feature": "logits"}.get(name, name) for name in renamed.column_names]
        pq.write_table(renamed.rename_columns(names), self.out.with_suffix(".parquet"))
        answer = store.query(
            self.base / "index", "SELECT input, label FROM predictions", self.out.with_suffix(".parquet")
        )
        found = sorted(map(repr, zip(*answer.to_pydict().values(), strict=True)))
        plain = renamed.select(["id", "label"]).to_pydict()
        assert found == sorted(map(repr, zip(plain["id"], plain["label"], strict=True)))


def test_any_table_is_refused_in_one_line_or_read_value_by_value(base: Path, tmp_path: Path) -> None:
    """600 tables, by each way in."""
    rng, consumers = random.Random(5), Consumers(base, tmp_path)
    path, outcomes = tmp_path / "table.parquet", Counter[str]()
    ways = [consumers.build, consumers.add, consumers.classify, consumers.text, consumers.predictions]
    for number in range(TABLES):
        found = any_table(rng, rng.choice([BASE_D] * 7 + [3]))
        norms = rng.choice(["check", "unit", "keep"])
        try:
            pq.write_table(found, path)
        except pa.ArrowException:  # a type that Parquet has not
            continue
        right = None if readable(path) else Wrong()
        if right is None:
            try:
                told(path, norms)
            except Wrong as wrong:
                right = wrong
        for way in (consumers.source, ways[number % len(ways)]):
            said = f"{number}: {way.__name__} {norms}: {found.schema}"
            error = problem_of(partial(way, path, norms), said)
            outcomes[f"{way.__name__} refused" if error else way.__name__] += 1
            if error is None:
                assert right is None or way.__name__ not in ("source", "build", "add"), said
                continue
            one_line(error)
            assert len(str(error)) < 1000, said
            if way.__name__ == "source":
                assert right is not None, (said, error)
                if right.row is not None:
                    assert f"row {right.row}" in str(error) or f"rows {right.row}," in str(error), (said, error)
    assert outcomes.total() > 1.5 * TABLES
    if SOAK:  # then every way is gone often enough
        assert min(outcomes[way.__name__] for way in [consumers.source, *ways]) > 2, outcomes
        assert min(outcomes[f"{way.__name__} refused"] for way in [consumers.source, *ways]) > 5, outcomes


def any_text(rng: random.Random) -> tuple[bytes, str, list[list[str]] | None]:
    """A text table with its delimiter, and its cells where nothing is wrong with it."""
    n, delimiter = rng.choice([0, 1, 2, 5, 8, 8, 8, 20]), rng.choice([",", ",", "\t"])
    names = rng.sample(
        ["path", "label", "id", "input", "class", "image_path", "x", "a\nb", "", "ü"], rng.choice([1, 2, 2, 3, 4])
    )
    names += [needed for needed in ("path", "label", "input") if needed not in names]
    rng.shuffle(names)
    cells = [*TEXTS, "y" * 50, '"', "a\r\nb", "\u2028", "\ufeff"]
    rows = [[rng.choice(cells) for _ in names] for _ in range(n)]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=rng.choice(["\n", "\r\n"]), quoting=csv.QUOTE_ALL)
    writer.writerows([names, *rows])
    raw = rng.choice([b"", b"", b"\xef\xbb\xbf"]) + text.getvalue().encode()
    if rng.random() < 0.4:
        return raw, delimiter, [names, *rows]
    tail = delimiter.encode() * (len(names) - 1)
    other: list[Callable[[], bytes]] = [
        lambda: text.getvalue().encode("utf-16"),
        lambda: text.getvalue().encode("latin-1", "replace").replace(b"?", b"\xe9"),
        lambda: raw[: rng.randrange(1, len(raw))],
        lambda: flipped(raw, rng),
        lambda: overwritten(raw, rng),
        lambda: removed_within(raw, rng),
        lambda: raw + b'"unclosed\n' * rng.choice([1, 50]),
        lambda: raw + b"one cell\n",
        lambda: raw.replace(b'"', b""),
        lambda: raw.replace(b"\n", b"\r"),
        lambda: raw + raw,
        lambda: b"\n\n" + raw,
        lambda: b"",
        lambda: b"\0" * 100,
        lambda: raw.partition(b"\n")[0] + b"\n" + b"z" * (tables.MAX_TEXT + 1) + tail + b"\n",
        lambda: b",".join(b"c%d" % i for i in range(3000)) + b"\n",
        lambda: rng.randbytes(200),
    ]  # fmt: skip
    return rng.choice(other)(), delimiter, None


@dataclass(frozen=True)
class TextTable:
    """A text table, the ways to read it, and its cells by column where nothing is wrong with it."""

    base: Path
    path: Path
    column: dict[str, list[str]] | None

    def images(self) -> list[str]:
        assert self.column is not None
        return [f"{self.path.parent}/{cell}" for cell in self.column["path"]]

    def source(self) -> None:
        found = open_source(self.path)
        if self.column is not None:
            assert found.labels == self.column["label"]
            assert list(found.paths or ()) == self.images()

    def inputs(self) -> None:
        for items in open_inputs([str(self.path)]):
            if self.column is not None:
                assert list(items.paths or ()) == self.images()
            list(opened(self.base / "index").classify_source(items, Encoder()))
        pytest.fail("images without a backbone were classified")

    def predictions(self) -> None:
        found = predictions.read_predictions(self.path)
        if self.column is not None:
            assert found["input"].to_pylist() == self.column["input"]
            assert found["label"].to_pylist() == [cell or None for cell in self.column["label"]]


def test_any_text_table_is_refused_in_one_line_or_read_cell_by_cell(base: Path, tmp_path: Path) -> None:
    """400 tables, as a source, as inputs and as predictions."""
    rng, outcomes = random.Random(6), Counter[str]()
    for number in range(TEXT_TABLES):
        raw, delimiter, cells = any_text(rng)
        path = tmp_path / ("table.tsv" if delimiter == "\t" else "table.csv")
        path.write_bytes(raw)
        column = None if cells is None else {name: [r[at] for r in cells[1:]] for at, name in enumerate(cells[0])}
        table = TextTable(base, path, column)
        for way in (table.source, table.inputs, table.predictions):
            said = f"{number}: {way.__name__}: {raw[:300]!r}"
            error = problem_of(way, said)
            outcomes[f"{way.__name__} refused" if error else way.__name__] += 1
            if error is not None:
                one_line(error)
                assert len(str(error)) < 8000, said
                if way.__name__ == "source" and column and column["path"]:
                    assert not all(cell.strip() for cell in column["path"] + column["label"]), (said, error)
    assert outcomes.total() == 3 * TEXT_TABLES
    assert min(outcomes[way] for way in ("source", "predictions")) > 2, outcomes
    assert outcomes["inputs refused"] == TEXT_TABLES


@pytest.mark.parametrize("name", ["ä,path,label\xff", "ä,path,\xfflabel,label"])
def test_names_of_columns_that_are_not_utf8_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(name.encode().replace("ÿ".encode(), b"\xff") + b"\na,b,c\n")
    for call in (
        lambda: open_source(path),
        lambda: predictions.read_predictions(path),
    ):
        assert refused(call, path)


@pytest.mark.parametrize("norms", ["check", "unit", "keep"])
def test_norms_are_checked_made_or_kept(tmp_path: Path, norms: str) -> None:
    rows = unit(np.random.default_rng(1).normal(size=(9, 5)))
    rows[4] *= 1 + 2 * NORM_TOLERANCE
    rows[7] *= 1e-20
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"label": ["a"] * 9, "feature": rows.tolist()}), path)
    if norms == "check":
        assert refused(lambda: Encoder(norms=norms).encode(open_source(path)), "rows 4, 7: norm 1.02")
        return
    found = Encoder(norms=norms).encode(open_source(path)).features
    if norms == "keep":
        assert np.array_equal(found, rows)
    else:
        np.testing.assert_allclose(found, unit(rows.astype(np.float64)), rtol=1e-6)
    rows[2] = 0
    pq.write_table(pa.table({"label": ["a"] * 9, "feature": rows.tolist()}), path)
    assert refused(lambda: Encoder(norms=norms).encode(open_source(path)), "row 2") is (norms == "unit")


ODD_ANSWERS: dict[str, str] = {
    "a time after the year 9999": "SELECT TIMESTAMP '290000-01-01' AS x",
    "a date after the year 9999": "SELECT DATE '5000000-01-01' AS x",
    "a time before the year 1": "SELECT TIMESTAMP '0044-03-15 (BC)' AS x",
    "lists of bytes": "SELECT ['\\xFF'::BLOB] AS x",
    "lists of times": "SELECT [now()] AS x",
    "an interval": "SELECT INTERVAL 3 MONTH AS x",
    "lists of intervals": "SELECT [INTERVAL 3 MONTH] AS x",
    "a long interval": "SELECT INTERVAL 2000000000 DAY AS x",
    "a map": "SELECT MAP {'a': 1} AS x",
    "an object": "SELECT {'a': [1, NULL]} AS x",
    "a number of 128 bits": "SELECT 170141183460469231731687303715884105727::HUGEINT AS x",
    "bits": "SELECT '0101'::BIT AS x",
    "a union": "SELECT union_value(a := 1) AS x",
    "nothing": "SELECT NULL AS x",
    "an enumeration": "SELECT 'a'::ENUM('a', 'b') AS x",
    "a column without a name": 'SELECT 1 AS " "',
    "a column twice": "SELECT 1 AS x, 2 AS x",
    "a name of two lines": 'SELECT 1 AS "a\nb"',
    "not a number": "SELECT 'nan'::DOUBLE AS x, 'inf'::FLOAT AS y",
    "no rows": "SELECT * FROM labels WHERE false",
    "text with a zero": "SELECT 'a' || chr(0) || 'b' AS x",
    "a time of a zone": "SELECT TIMETZ '12:00:00+05' AS x",
    "a uuid": "SELECT uuid() AS x",
}
DATES = ["a time after the year 9999", "a date after the year 9999", "a time before the year 1"]
UNSHOWN = {(what, style) for what in DATES for style in ("table", "json", "csv", "parquet")}
UNSHOWN |= {(what, "csv") for what in ("lists of bytes", "lists of times")}
UNSHOWN |= {
    (what, "parquet")
    for what in ("an interval", "lists of intervals", "a long interval", "a number of 128 bits", "a union")
}


@pytest.fixture(scope="module")
def odd_answers(base: Path) -> dict[str, pa.Table]:
    return {what: store.query(base / "index", sql) for what, sql in ODD_ANSWERS.items()}


@pytest.mark.parametrize("style", ["table", "json", "csv", "parquet"])
def test_answers_of_any_type_are_written_or_refused(
    odd_answers: dict[str, pa.Table], tmp_path: Path, style: str
) -> None:
    for what, answer in odd_answers.items():
        if (what, style) not in UNSHOWN:
            if not refused(lambda found=answer: write_table(found, style, tmp_path / "out")):
                assert (tmp_path / "out").is_file(), what
                (tmp_path / "out").unlink()
            assert not [path.name for path in tmp_path.iterdir()], what


@pytest.mark.parametrize(("what", "style"), few(sorted(UNSHOWN), 8))
def test_answers_that_cannot_be_written_are_refused(
    odd_answers: dict[str, pa.Table], tmp_path: Path, what: str, style: str
) -> None:
    refused(lambda: write_table(odd_answers[what], style, tmp_path / "out"))


@pytest.mark.parametrize("style", ["json", "csv", "parquet"])
def test_columns_of_one_name_are_told_apart(base: Path, tmp_path: Path, style: str) -> None:
    sql = "SELECT a.label, b.label, 1 AS label_1, b.key_id FROM labels a JOIN labels b ON a.key_id = b.key_id - 1"
    answer, path = store.query(base / "index", sql + " ORDER BY b.key_id LIMIT 1"), tmp_path / "out"
    expected = {"label": "cat", "label_2": "dog", "label_1": 1, "key_id": 1}
    assert answer.to_pylist() == [expected]
    write_table(answer, style, path)
    if style == "json":
        assert json.loads(path.read_text()) == expected
    elif style == "csv":
        assert path.read_text() == "label,label_2,label_1,key_id\ncat,dog,1,1\n"
    else:
        assert pq.read_table(path).to_pylist() == [expected]


# --- nothing is run, reached or written that was not asked for


class Evil:
    """Pickled, it makes a folder where it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def evil_bytes(mark: Path) -> dict[str, bytes]:
    """Pickles in every wrapping that numpy and torch know."""
    array = np.empty(1, dtype=object)
    array[0] = Evil(mark)
    files: dict[str, bytes] = {"pickle": pickle.dumps(Evil(mark))}
    for name, write in (
        ("npy", lambda file: np.save(file, array, allow_pickle=True)),
        ("npz", lambda file: np.savez(file, keys=array)),
        ("torch", lambda file: torch.save(Evil(mark), file)),
        ("legacy torch", lambda file: torch.save(Evil(mark), file, _use_new_zipfile_serialization=False)),
    ):
        file = io.BytesIO()
        write(file)
        files[name] = file.getvalue()
    return files


WRAPPINGS = ["pickle", "npy", "npz", "torch", "legacy torch"]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("kind", ["keys", "text", "values", "weights", "labels", "curve", "index"])
def test_a_pickle_is_never_read_from_an_index(world: dict[str, Path], tmp_path: Path, kind: str, wrapping: str) -> None:
    mark, index = tmp_path / "mark", copied(world["tuned"], tmp_path / "x")
    path = resealed(index, store.read_manifest(index).files[kind].name, evil_bytes(mark)[wrapping])
    try:
        assert refused(lambda: opened(index), path)
    finally:
        assert not mark.exists()


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil-of-a-test", "a/../../evil", "..\\evil", "C:\\evil"])
def test_names_within_a_torch_file_lead_nowhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    for file, tensor in (("keys_2shots.pt", torch.eye(3, 4)), ("values_2shots.pt", torch.eye(4))):
        raw = io.BytesIO()
        torch.save(tensor, raw)
        with zipfile.ZipFile(raw) as old, zipfile.ZipFile(folder / file, "w", zipfile.ZIP_STORED) as new:
            for entry in old.infolist():
                new.writestr(f"{name}/{entry.filename.partition('/')[2]}", old.read(entry))
            new.writestr(name, b"evil")
    before = snapshot(tmp_path)
    if not refused(lambda: exchange.import_table(folder, tmp_path / "out.parquet"), "shots.pt"):
        assert pq.read_table(tmp_path / "out.parquet")["feature"].to_pylist() == torch.eye(4, 3).tolist()
        (tmp_path / "out.parquet").unlink()
    assert snapshot(tmp_path) == before
    assert not Path("/tmp/evil-of-a-test").exists()


SQL = [
    "SELECT * FROM read_csv('secret.csv')", "SELECT * FROM 'secret.csv'",
    "SELECT content FROM read_text('secret.csv')", "SELECT content FROM read_text('.tmp/secret.csv')",
    "SELECT content FROM read_blob('/etc/passwd')", "SELECT * FROM glob('*')",
    "SELECT * FROM read_parquet('index/data/*.parquet')", "SELECT getenv('SECRET')", "COPY labels TO 'out.csv'",
    "COPY (SELECT 1) TO '.tmp/out.csv'", "EXPORT DATABASE 'out'", "ATTACH 'out.db' AS other", "INSTALL httpfs",
    "LOAD httpfs", "PRAGMA database_list", "SET enable_external_access = true", "SET temp_directory = '.'",
    "SELECT 1; COPY labels TO 'out.csv'", "CREATE TABLE x AS SELECT 1",
    "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
]  # fmt: skip
CONDITIONS = [
    *(f"key_id IN ({sql})" for sql in SQL), "label = (SELECT content FROM read_text('secret.csv'))",
    "exists (SELECT * FROM glob('*'))", "getenv('SECRET') = 'secret'", "true; COPY labels TO 'out.csv'",
    "true) ; COPY labels TO 'out.csv'; SELECT (true", "true) UNION SELECT content FROM read_text('secret.csv') --",
    "true --", "(SELECT count(*) FROM 'secret.csv') > 0", "query('SELECT 1')",
]  # fmt: skip


@pytest.fixture
def secrets(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with an index and files to be found."""
    (tmp_path / ".tmp").mkdir()
    for name in ("secret.csv", ".tmp/secret.csv"):
        (tmp_path / name).write_text("a,b\n1,secret\n")
    copied(base / "index", tmp_path / "index")
    shutil.copy(base / "train.parquet", tmp_path / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "secret")
    return tmp_path


def test_a_question_on_the_command_line_reaches_no_file(run: Run, secrets: Path) -> None:
    before = snapshot(secrets)
    for sql in few(SQL, 8):
        result = run("index", "query", "index", sql)
        assert (result.exit_code, result.stdout) == (2, ""), sql
        assert "root:" not in result.stderr, sql
        assert len(result.stderr.strip().splitlines()[-1]) > 20, sql
    assert snapshot(secrets) == before


@pytest.mark.parametrize(
    "command",
    [
        ["classify", "index", "train.parquet", "--device", "cpu"],
        ["evaluate", "index", "train.parquet", "--device", "cpu"],
        ["index", "remove", "index"],
        ["index", "relabel", "index", "cat"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_condition_on_the_command_line_reaches_no_file(run: Run, secrets: Path, command: list[str]) -> None:
    before = snapshot(secrets)
    for condition in few(CONDITIONS, 6):
        result = run(*command, "--where", condition)
        if condition == "true --" and result.exit_code == 0:
            pytest.fail("a comment was taken")
        assert (result.exit_code, result.stdout) == (2, ""), condition
        assert "root:" not in result.stderr, condition
        assert list(snapshot(secrets)) == [*before], condition
    assert snapshot(secrets) == before


PLANTED = "import os\nos.mkdir({mark!r})\nraise SystemExit('run from the index folder')\n"


def test_nothing_in_an_index_folder_is_imported(world: dict[str, Path], table: Path, tmp_path: Path) -> None:
    """With the folder as the working folder."""
    index, mark = copied(world["tuned"], tmp_path / "x"), tmp_path / "mark"
    names = ["retrieval_tip", "conftest", "sitecustomize", "usercustomize", "__init__", "__main__", "setup", "faiss",
             "numpy", "torch", "duckdb", "click", "json", "safetensors", "pyarrow"]  # fmt: skip
    for folder in (index, index / "data", index / "manifests"):
        for name in names:
            (folder / f"{name}.py").write_text(PLANTED.format(mark=str(mark)))
        (folder / "faiss.so").write_bytes(b"\x7fELF")
        (folder / "x.pth").write_text(f"import os; os.mkdir({str(mark)!r})\n")
        (folder / "pyproject.toml").write_text("[")
        (folder / ".duckdbrc").write_text("SELECT 1;")
    program = Path(sys.executable).with_name("retrieval-tip")
    script = (
        "import sys; from retrieval_tip.cli import main; [main(a.split(), standalone_mode=False) for a in sys.argv[1:]]"
    )
    start = [str(program)] if program.exists() else [sys.executable, "-P", "-m", "retrieval_tip"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in (
        [*start, "classify", ".", str(table), "--explain", "--device", "cpu"],
        [sys.executable, "-P", "-c", script, "index#info#.", "index verify .", "index set . --alpha 2", "index gc ."],
    ):
        arguments = [part.replace("#", " ") for part in command]
        done = subprocess.run(arguments, cwd=index, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not mark.exists()
    assert (index / "retrieval_tip.py").is_file()
    assert verify(index).settings.alpha == 2


@pytest.mark.parametrize("name", ["manifest.json", "manifests", "data", "lock"])
def test_links_out_of_the_folder_are_neither_read_nor_written(
    world: dict[str, Path], tmp_path: Path, name: str
) -> None:
    index, other = copied(world["flat"], tmp_path / "x"), copied(world["flat"], tmp_path / "other")
    path = index / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(other / name)
    before = snapshot(tmp_path), (other / "lock").read_bytes()
    reads: list[Callable[[], object]] = [lambda: opened(index), lambda: store.query(index, "SELECT 1")]
    if name == "manifests":
        reads = [lambda: verify(index), lambda: store.history(index), lambda: opened(index, version=1)]
    if name == "lock":
        assert answer(opened(index)) == answer(opened(other))  # a reader has no use for it
    for call in () if name == "lock" else reads:
        assert refused(call, index / name, "leads out")
    for call in (
        lambda: changes.configure(index, alpha=2.0),
        lambda: changes.relabel(index, "dog", key_ids=[0]),
        lambda: changes.rollback(index),
        lambda: collect(index),
        lambda: opened(other).save(index),
    ):
        assert refused(call, index / name, "leads out")
    assert (snapshot(tmp_path), (other / "lock").read_bytes()) == before


@pytest.mark.parametrize("name", ["a\nb", "x=1", "-x", "ü 猫", "a'b\"c", "%s{}", "x" * 200, "$(touch y)", "a;b"])
def test_copies_and_tables_go_to_names_of_any_kind(base: Path, tmp_path: Path, name: str) -> None:
    changes.clone(base / "index", tmp_path / name)
    assert answer_of(tmp_path / name) == answer_of(base / "index")
    assert export.export_table(opened(tmp_path / name), tmp_path / f"{name}.parquet") == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}.parquet"])


def answer_of(folder: Path) -> bytes:
    return opened(folder).logits(np.eye(BASE_D, dtype=np.float32)).numpy().tobytes()


def test_copies_and_tables_never_take_the_place_of_something_else(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "deep")
    os.mkfifo(tmp_path / "pipe")
    index = copied(base / "index", tmp_path / "index")
    before, cache = sorted(tmp_path.rglob("*")), opened(index)
    for place in ("file", "full", "pipe", "index", "file/x", "bad\udcff"):
        assert refused(lambda to=tmp_path / place: changes.clone(index, to)), place
    for place in ("full", "pipe", "index", "file/x.parquet", "x" * 300, "nowhere/x.parquet"):
        assert refused(lambda to=tmp_path / place: export.export_table(cache, to)), place
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "thesis").read_text() == "kept"
    assert answer_of(index) == answer_of(base / "index")


def test_a_copy_to_a_name_that_is_too_long_is_refused(base: Path, tmp_path: Path) -> None:
    assert refused(lambda: changes.clone(base / "index", tmp_path / ("x" * 300)))


@pytest.mark.parametrize("style", images.FORMATS)
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, style: str
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 48 * 48 - 1)
    for side, fits in ((47, True), (48, False)):
        raw = io.BytesIO()
        try:
            Image.effect_noise((side, side), 50).convert("RGB").save(raw, style)
        except (OSError, KeyError):
            pytest.skip(f"this Pillow writes no {style}")
        with monkeypatch.context() as patch:
            if not fits:
                patch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
            for least in (None, 8):
                call = partial(images.decode, raw.getvalue(), least)
                assert refused(call, "48 x 48 pixels are more than 2,303") is not fits
    path = tmp_path / "picture"
    path.write_bytes(raw.getvalue())
    monkeypatch.setattr(images, "MAX_BYTES", len(raw.getvalue()) - 1)
    assert refused(lambda: images.read(path), "bytes are more than an image file may have")


def test_more_than_the_limits_is_refused_in_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: dict[str, Path]
) -> None:
    path, out = tmp_path / "table.csv", tmp_path / "out"
    path.write_text("path,label,input\n" + "abcdef,ghijkl,mnopqr\n" * 8)

    def limited(module: Any, name: str, value: int, call: Callable[[], object], *parts: object) -> None:
        with contextlib.suppress(RetrievalTipError):
            call()  # as it is without the limit, it fails for nothing that these parts say
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert refused(call, *parts), name
        assert not out.exists() or shutil.rmtree(out) is None

    limited(tables, "MAX_TEXT", 5, lambda: open_source(path), path, "rows 0, 1, 2", "source longer than 5 characters")
    limited(tables, "MAX_ROWS", 7, lambda: open_source(path), path, "8 rows, more than 7")
    limited(predictions, "MAX_ROWS", 7, lambda: predictions.read_predictions(path), path, "8 rows, more than 7")
    limited(predictions, "MAX_LINE", 12, lambda: predictions.read_predictions(path), path)
    limited(asked_in_sql, "MAX_OPEN", 3, lambda: store.query(base / "index", "SELECT ((((1))))"[:12]), "parentheses")
    limited(store, "MANIFEST_BYTES", 500, lambda: store.read_manifest(world["flat"]), "too large for a manifest")
