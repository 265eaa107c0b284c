"""Keys in shards answer as one index does, also while a shard dies."""

from __future__ import annotations

import builtins
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import Result
from conftest import ROOT, SHARED, needs_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip import CacheModel
from retrieval_tip.distributed import faiss_shards
from retrieval_tip.distributed.cluster import connected
from retrieval_tip.distributed.faiss_shards import Shard, ShardedCache, check_room, merged, plan, sharded
from retrieval_tip.errors import StoreError, UsageError
from retrieval_tip.retrieval.vector_index import faiss
from retrieval_tip.store.manifest import DataFile

pytestmark = pytest.mark.timeout(120)

WAYS = [(64, True), (64, False), (None, True)]
LEAST = np.finfo(np.float32).min


def units(x: Any) -> Any:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Predictions are the same, but for the last bits of figures."""
    assert [x.labels for x in found] == [x.labels for x in expected]
    assert [[key.key_id for key in x.neighbours] for x in found] == [
        [key.key_id for key in x.neighbours] for x in expected
    ]
    for name in ("logits", "probabilities"):
        a, b = (np.array([getattr(x, name) for x in rows]) for rows in (found, expected))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# What is ours: the merge, and who holds what.


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_merging_the_answers_of_any_split_is_faiss_s_answer_over_all(data: st.DataObject) -> None:
    n, d, q = (data.draw(st.integers(1, most)) for most in (60, 4, 5))
    k = data.draw(st.integers(1, 80))  # also more than a part holds, or all of them
    values = np.random.default_rng(data.draw(st.integers(0, 1 << 30))).integers(-2, 3, (n + q, d)).astype(np.float32)
    keys, queries = values[:n], values[n:]  # whole numbers: products are exact, and many are equal
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))

    def search(part: Any, first: int) -> tuple[Any, Any]:
        index = faiss().IndexFlatIP(d)
        index.add(part)
        affinity, rows = index.search(queries, k)  # beyond the part: empty slots
        return affinity, np.where(rows < 0, -1, rows + first)

    bounds = [0, *cuts, n]
    parts = [search(keys[a:b], a) for a, b in itertools.pairwise(bounds)]
    affinity, rows = merged(parts, k)
    whole, whole_rows = search(keys, 0)

    np.testing.assert_array_equal(affinity, whole)
    np.testing.assert_array_equal(rows < 0, whole_rows < 0)
    every = queries @ keys.T
    for own, expected, near, exact in zip(rows, whole_rows, affinity, every, strict=True):
        own, near = own[own >= 0], near[own >= 0]
        assert len(set(own)) == len(own)
        np.testing.assert_array_equal(exact[own], near)
        assert [*zip(-near, own, strict=True)] == sorted(zip(-near, own, strict=True))  # of equal ones the first row
        above = near > near[-1]  # which of those at the cut are in it, FAISS leaves open
        assert set(own[above]) == set(expected[: above.sum()])


def test_empty_slots_come_last() -> None:
    one = np.array([[3.0, LEAST]], np.float32), np.array([[7, -1]])
    two = np.array([[4.0, 3.0, LEAST]], np.float32), np.array([[9, 2, -1]])
    affinity, rows = merged([one, two], 4)
    assert rows.tolist() == [[9, 2, 7, -1]]
    assert affinity.tolist() == [[4.0, 3.0, 3.0, LEAST]]
    assert merged([one], 5)[1].tolist() == [[7, -1]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 1 << 30))
def test_every_key_is_in_one_shard_with_its_class(sizes: list[int], shards: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.sort(rng.integers(0, 9, size)) for size in sizes])
    files = [DataFile(f"keys-{i}", size, 1, "0" * 64) for i, size in enumerate(sizes)]
    starts = dict(zip(files, np.cumsum([0, *sizes]), strict=False))
    plans = plan(files, ids, shards)
    held = [[starts[piece.file] + row for piece in own for row in range(piece.start, piece.stop)] for own in plans]
    assert list(itertools.chain(*held)) == list(range(len(ids)))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert len(held) == min(shards, len(ids))
    told = [np.repeat(piece.classes, piece.counts) for own in plans for piece in own]
    np.testing.assert_array_equal(np.concatenate(told), ids)


def test_shards_that_no_machine_has_room_for_are_refused() -> None:
    check_room([6, 6], [8, 8])
    check_room([6, 6], [5, 20])
    for memories in ([5, 5, 5], [8], []):  # none large enough, all together too small, no machine
        with pytest.raises(UsageError, match="give more shards, or add machines"):
            check_room([6, 6], memories)


# Without Ray: shards in this process.


class Here:
    """As much of Ray as is asked of it, in this process; an actor that was killed is made anew when it is called."""

    def __init__(self) -> None:
        from ray import exceptions

        self.exceptions, self.late = exceptions, 0

    def nodes(self) -> list[Any]:
        return [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 1e12}}]

    def put(self, array: Any) -> Any:
        array.setflags(write=False)
        return array

    def wait(self, calls: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return calls[self.late :], calls[: self.late]

    def get(self, calls: list[Any]) -> list[Any]:
        try:
            return [call() for call in calls]
        except StoreError as error:
            raise self.exceptions.RayTaskError("search", "a traceback\nof lines", error) from None

    def kill(self, actor: Any, no_restart: bool) -> None:
        actor.ended = True

    def remote(self, **_: Any) -> Any:
        return lambda kind: SimpleNamespace(options=lambda memory: SimpleNamespace(remote=partial(Actor, kind)))


class Actor:
    def __init__(self, kind: type[Shard], *arguments: Any) -> None:
        self.make = partial(kind, *arguments)
        self.made, self.ended = self.make(), False

    def die(self) -> None:
        self.made = self.make()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: partial(self.call, name, *arguments))

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.made, name)(*arguments)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(faiss_shards, "connected", lambda address: nullcontext(Here()))
    threads = torch.get_num_threads(), faiss().omp_get_max_threads()
    yield
    torch.set_num_threads(threads[0])
    faiss().omp_set_num_threads(threads[1])


Made = tuple[Path, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Folders of made data, of two segments and one class without a key, and queries; the first file is large."""
    rng = np.random.default_rng(7)
    c, n, d = 23, 9000, 256
    centres = units(rng.normal(size=(c, d)))
    ids = np.sort(rng.integers(0, c - 1, n + 500))
    keys = units(centres[ids] + rng.normal(size=(n + 500, d)) * 0.08)
    late = np.isin(np.arange(n + 500), rng.choice(n + 500, 500, replace=False))
    queries = units(centres[rng.integers(0, c, 150)] + rng.normal(size=(150, d)) * 0.08)
    folders: dict[str, Path] = {}

    def make(dtype: str) -> Made:
        if dtype not in folders:
            folder = tmp_path_factory.mktemp(dtype) / "index"
            names = [f"c{i}" for i in range(c)]
            cache = CacheModel.from_features(keys[~late].astype(dtype), ids[~late], names, centres, device="cpu")
            cache.add(keys[late], ids[late])
            cache.save(folder)
            folders[dtype] = folder
        return folders[dtype], queries

    return make


@pytest.fixture(scope="module")
def food(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Folders of real CLIP features, and queries."""

    def table(part: str) -> tuple[Any, list[str]]:
        rows = pq.read_table(SHARED / "data" / "clip-food9" / f"{part}.parquet")
        return np.stack(rows["feature"].to_numpy()), rows["label"].to_pylist()

    def make(dtype: str) -> Made:
        (keys, labels), (weights, names), folder = table("train"), table("text"), tmp_path_factory.mktemp("food") / "i"
        CacheModel.from_features(keys.astype(dtype), labels, names, weights, device="cpu").save(folder)
        return folder, table("test")[0]

    return make


def opened(folder: Path) -> CacheModel:
    return CacheModel.load(folder, device="cpu", precision="float32")


def the_same_every_way(found: ShardedCache, cache: CacheModel, queries: Any) -> None:
    for k, tail in WAYS:
        same(found.classify(queries, 3, k, tail), cache.classify(queries, 3, k, tail))


@needs_shared
@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("float16", 3)])
def test_real_features_in_shards_answer_the_same(
    here: None, food: Callable[[str], Made], dtype: str, shards: int
) -> None:
    folder, queries = food(dtype)
    cache = opened(folder)
    with sharded(cache, shards) as found:
        the_same_every_way(found, cache, queries)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_made_data_of_two_segments_in_shards_answers_the_same(
    here: None, made: Callable[[str], Made], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, queries = made(dtype)
    cache = opened(folder)
    assert cache.segments == 2
    monkeypatch.setattr(faiss_shards, "BLOCK_BYTES", 40 * 4 * cache.d)  # several blocks of queries
    with sharded(cache, 4) as found:
        the_same_every_way(found, cache, queries)
        torch.testing.assert_close(found.retrieval.keys.sums, cache.retrieval.keys.sums, rtol=1e-6, atol=1e-6)
        one, other = found.certified(queries, 16), cache.certified(queries, 16)
        assert one.proved
        torch.testing.assert_close(one.keys, other.keys)
        assert found.find(["c3"]).equals(cache.find(["c3"]))
        assert (found.n, found.d, found.dtype, found.index_type) == (9500, 256, dtype, "Flat")
        assert found.reload() is found
        assert found.classify(queries[:0]) == []
        found.settings = found.settings.but(alpha=0.0)  # settings are its own
        assert not torch.equal(found.logits(queries), cache.logits(queries))


def test_the_benchmark_measures_one_process_and_shards(
    here: None, made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("shards")
    monkeypatch.setattr(benchmark, "connected", nullcontext)
    folder, queries = made("float16")
    found = {(shards, what): value for shards, what, value, _ in benchmark.measure(folder, queries[:5], 2, "a cluster")}
    names = ["opening", *(name for name, _, _ in benchmark.WAYS)]
    assert {(number, name) for number in (0, 2) for name in names} < found.keys()
    assert {value for (_, what), value in found.items() if "same answers" in what} == {100.0}


def test_more_shards_than_keys(here: None, tmp_path: Path) -> None:
    cache = CacheModel.from_features(
        np.eye(5, 4) + np.eye(5, 4, 1) / 8, [0, 0, 1, 1, 2], ["a", "b", "c", "d"], device="cpu"
    )
    cache.save(tmp_path / "small")
    cache = opened(tmp_path / "small")
    with sharded(cache, 9) as found:
        assert len(found.index.processes()) == 5
        the_same_every_way(found, cache, units(np.array([[4.0, 3, 2, 1], [1, -2, 3, 4]])))


def test_a_shard_that_comes_back_with_other_keys_is_refused(
    here: None, made: Callable[[str], Made], tmp_path: Path
) -> None:
    """What a check of sizes does not see; every other damage it does."""
    folder, queries = made("float32")
    folder = Path(shutil.copytree(folder, tmp_path / "copy"))
    with sharded(opened(folder), 2) as found:
        expected = found.classify(queries[:9], k=8)
        file = max(folder.glob("data/keys-*.npy"), key=lambda path: path.stat().st_size)
        raw = file.read_bytes()
        assert len(raw) > 1 << 22
        flipped = bytearray(raw)
        flipped[len(raw) // 8] ^= 1
        for damaged, said in ((flipped, "keys of shard 0 are not those"), (raw[:-4], "damaged"), (None, "missing")):
            replaced(file, damaged)
            found.index._shards[0].die()
            for _ in range(2):
                with pytest.raises(StoreError, match=said) as error:
                    found.classify(queries[:9], k=8)
                assert "\n" not in str(error.value)
        replaced(file, raw)
        assert found.classify(queries[:9], k=8) == expected  # without another start


def replaced(file: Path, content: bytes | bytearray | None) -> None:
    """Another file in its place: who has mapped the one before keeps it."""
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content)


def test_shards_that_keep_one_waiting_are_said(
    here: None, made: Callable[[str], Made], caplog: pytest.LogCaptureFixture
) -> None:
    folder, queries = made("float16")
    with sharded(opened(folder), 3) as found:
        assert not caplog.messages
        found.index._ray.late = 2
        found.classify(queries[:3], k=1, neighbours=0)
    assert "2 of 3 shards did not answer in 120 s" in caplog.messages[0]


def test_what_shards_cannot_hold_is_refused(here: None, made: Callable[[str], Made], tmp_path: Path) -> None:
    folder, _ = made("float32")
    cache = opened(folder)
    values = CacheModel.from_features(np.eye(3), [0, 1, 2], ["a", "b", "c"], values=np.eye(3), device="cpu")
    values.save(tmp_path / "values")
    changed = opened(folder)
    changed.remove([0])
    for model, shards, said in (
        (cache, 0, "at least 1"),
        (values, 2, "fine-tuned with values"),
        (opened(tmp_path / "values"), 2, "fine-tuned with values"),
        (cache.take(np.arange(100)), 2, "load it from its folder"),
        (changed, 2, "load it from its folder"),
    ):
        with pytest.raises(UsageError, match=said) as error, sharded(model, shards):
            pass
        assert "\n" not in str(error.value)


def test_shards_that_hold_an_old_version_say_so(here: None, made: Callable[[str], Made], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("float32")[0], tmp_path / "copy"))
    with sharded(opened(folder), 2) as found:
        other = opened(folder)
        other.settings = other.settings.but(alpha=2.0)
        other.save_settings(folder)
        with pytest.raises(UsageError, match="newer version"):
            found.reload()


# With Ray, started once.


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with connected(cpus=2) as ray:
        yield ray


@pytest.fixture(scope="module")
def shards(ray: Any, made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Made data in float16, in two shards, of a folder that may be damaged; the queries and what is to be answered."""
    folder, queries = made("float16")
    folder = Path(shutil.copytree(folder, tmp_path_factory.mktemp("shards") / "index"))
    cache = opened(folder)
    with sharded(cache, 2) as found:
        yield SimpleNamespace(cache=cache, found=found, folder=folder, queries=queries)


def test_actors_answer_the_same(shards: Any) -> None:
    the_same_every_way(shards.found, shards.cache, shards.queries)
    assert len({os.getpid(), *shards.found.index.processes()}) == 3


def test_a_shard_killed_between_blocks_changes_no_answer(
    shards: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    index, answers = shards.found.index, shards.found.index._answers
    victim, blocks = index.processes()[0], []
    monkeypatch.setattr(faiss_shards, "BLOCK_BYTES", 20 * 4 * shards.cache.d)

    def killing(calls: list[Any]) -> Any:
        found = answers(calls)
        blocks.append(len(calls))
        if len(blocks) == 3:
            os.kill(victim, signal.SIGKILL)
        return found

    monkeypatch.setattr(index, "_answers", killing)
    found = shards.found.classify(shards.queries, 3, 64)
    assert len(blocks) > 6
    assert index.processes()[0] != victim
    same(found, shards.cache.classify(shards.queries, 3, 64))
    assert f"shard 0 was started again: its process {victim} had ended" in caplog.messages
    assert capfd.readouterr().out == ""  # where the command line writes its results


def test_a_shard_killed_in_a_call_changes_no_answer(shards: Any) -> None:
    victim = shards.found.index.processes()[1]
    answered: list[Any] = []
    asking = threading.Thread(target=lambda: answered.append(shards.found.classify(shards.queries, 3)))
    os.kill(victim, signal.SIGSTOP)  # so that it has the call, and has not answered
    asking.start()
    asking.join(0.5)
    assert asking.is_alive()
    os.kill(victim, signal.SIGKILL)
    asking.join(90)
    same(answered[0], shards.cache.classify(shards.queries, 3))


def test_a_killed_shard_whose_file_was_damaged_ends_in_one_line(shards: Any) -> None:
    file = max(shards.folder.glob("data/keys-*.npy"), key=lambda path: path.stat().st_size)
    raw = file.read_bytes()
    replaced(file, raw[: len(raw) // 2])
    os.kill(shards.found.index.processes()[1], signal.SIGKILL)
    with pytest.raises(StoreError, match=rf"^{re.escape(str(file))}: damaged \(has [^\n]*$"):
        shards.found.classify(shards.queries, 3, 64)
    replaced(file, raw)
    same(shards.found.classify(shards.queries, 3, 64), shards.cache.classify(shards.queries, 3, 64))


Run = Callable[..., Result]


@needs_shared
def test_through_the_command_line(ray: Any, run: Run, tmp_path: Path) -> None:
    data, folder = SHARED / "data" / "clip-food9", tmp_path / "food"
    built = run("index", "build", data / "train.parquet", "--text", data / "text.parquet", "--out", folder)
    assert built.exit_code == 0, built.output

    def rows(*options: object) -> list[Any]:
        result = run("classify", folder, data / "test.parquet", "-k", 64, "--top", 3, "--format", "json", *options)
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]

    found, expected = rows("--index-shards", 2), rows()
    assert len(found) == 450
    assert [[row["input"], *row["labels"]] for row in found] == [[row["input"], *row["labels"]] for row in expected]
    np.testing.assert_allclose(*([row["probability"] for row in part] for part in (found, expected)), rtol=1e-4)


@pytest.fixture(scope="module")
def questions(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature table of the queries of made data, with the labels that are answered."""
    folder, queries = made("float32")
    column = pa.FixedSizeListArray.from_arrays(pa.array(queries.reshape(-1)), queries.shape[1])
    labels = [found.label for found in opened(folder).classify(queries, k=64)]
    file: Path = tmp_path_factory.mktemp("questions") / "test.parquet"
    pq.write_table(pa.table({"id": [f"q{i}" for i in range(len(labels))], "label": labels, "feature": column}), file)
    return file


def test_evaluate_through_the_command_line(here: None, made: Callable[[str], Made], run: Run, questions: Path) -> None:
    given = ("evaluate", made("float32")[0], questions, "-k", 64, "--json")
    found, expected = (json.loads(run(*given, *more).stdout) for more in (("--index-shards", 3), ()))
    assert found["top1"] == 1
    assert found == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    result = run(*given, "--index-shards", 3, "--shots", 1)
    assert result.exit_code == 2
    assert "--index-shards does not go with --shots" in result.stderr
    assert "or --index-shards too" in run(*given, "--ray-address", "auto").stderr
    assert "give one of them" in run(*given, "--index-shards", 3, "--engine", "ray").stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--where", "shot < 3"), "--where does not go with --index-shards"),
        (("--device", "cpu"), "--model"),  # images, and a backbone without a name: said before Ray is started
    ],
)
def test_what_does_not_go_with_shards_is_refused_in_one_line(
    made: Callable[[str], Made], run: Run, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    result = run("classify", made("float32")[0], tmp_path / "none.parquet", "--index-shards", 2, *options)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]


def test_without_ray_the_way_out_is_named(
    made: Callable[[str], Made], run: Run, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    result = run("classify", made("float32")[0], questions, "--index-shards", 2)
    assert result.exit_code == 2
    assert "pip install 'retrieval-tip[distributed]'" in result.stderr.splitlines()[-1]
