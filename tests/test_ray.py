"""Ray: pieces, actors and folders of parts in this process, and two nodes against one process (soak)."""

import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import buckets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import failed, json_rows, ok, tries
from hypothesis import given
from hypothesis import strategies as st
from serving import caltech_photos
from tables import tiny, unit_rows, write_table

from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.data import remote
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import of_images, open_items
from retrieval_tip.data.tables import open_parquet, table_files
from retrieval_tip.distributed.ray_data import PartsFolder, Work, Worker, cut, room
from retrieval_tip.errors import InputError, UsageError


@tries(20)
@given(n=st.integers(1, 3000), group=st.integers(1, 3000))
def test_pieces_of_a_table_contain_each_row_once_and_in_order(tmp_path_factory, n, group):
    rows = unit_rows(n, 4)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 4)
    path = tmp_path_factory.mktemp("t") / "t.parquet"
    pq.write_table(
        pa.table({"id": [f"q{i}" for i in range(n)], "feature": column}), path, row_group_size=group
    )
    found = [pickle.loads(pickle.dumps(piece)) for piece in cut(open_items(path))]
    assert [name for piece in found for name in piece.sources] == [f"q{i}" for i in range(n)]
    assert np.array_equal(
        np.concatenate([Reader().encode(piece).features for piece in found]), rows
    )


@pytest.mark.parametrize(
    ("nodes", "device", "expected"),
    [
        ([(1, 0)], "auto", (1, 1, 0)),
        ([(64, 0), (16, 0)], "auto", (10, 8, 0)),
        ([(16, 2), (8, 0)], "auto", (2, 1, 1)),
        ([(16, 2)], "cpu", (8, 2, 0)),
    ],
)
def test_actors_share_the_cpus_or_use_one_gpu_each(nodes, device, expected):
    assert (
        room(
            [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes],
            device,
        )
        == expected
    )
    with pytest.raises(UsageError, match="--num-cpus"):
        room([{"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"CPU": 4}}], device)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--out", "s3://b/x"), "encode --ray"),
        (("--out", "x", "--ray", "127.0.0.1:9"), "127.0.0.1:9"),
        (("--out", "x", "--ray", "nowhere"), "nowhere"),
        (("--out", "x", "--ray", "local"), "pip install"),
    ],
)
def test_bad_options_are_refused(run, monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    if named == "pip install":
        monkeypatch.setitem(sys.modules, "ray", None)
    failed(
        run("encode", write_table(tmp_path / "t.parquet", unit_rows(4, 4)), *arguments), 2, named
    )


def test_a_folder_contains_each_intact_part_of_a_run_once(tmp_path):
    folder = PartsFolder(f"{tmp_path}/parts/")
    assert not folder.claim("a")
    for part, name, rows in (
        ("000000", "a", 3),
        ("000000", "b", 3),
        ("000001", "a", 2),
        ("000002", "a", 1),
    ):
        path = tmp_path / f"parts/part={part}/{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_table(path, unit_rows(rows, 4), ids=[f"{part}-{row}" for row in range(rows)])
    path.write_bytes(path.read_bytes()[:-9])
    assert folder.rows() == {"000000": 3, "000001": 2}
    assert len(list(tmp_path.rglob("*.parquet"))) == 2
    with pytest.raises(InputError, match="parts"):
        open_items(tmp_path / "parts")
    folder.files.pipe_file("_complete.json", b"{}")
    assert folder.claim("a")
    table = open_items(tmp_path / "parts")
    assert table.sources == ["000000-0", "000000-1", "000000-2", "000001-0", "000001-1"]
    assert np.array_equal(Reader().encode(table.take([4])).features, unit_rows(2, 4)[1:])
    for other in (folder, PartsFolder(tmp_path)):
        with pytest.raises(UsageError, match=other.place):
            other.claim("b")


def test_an_actor_encodes_a_piece_and_reports_unreadable_photos(tmp_path, shared):
    work = Work(Reader(), partial(load_backbone, f"local-dir:{tiny(tmp_path / 'model')}"))
    worker = Worker(work, f"{tmp_path}/out", "cpu", Path.cwd())
    paths = [str(path) for path, _ in caltech_photos(shared, "test", 2, 1)]
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    gone = str(tmp_path / "gone.jpg")
    pieces = {
        "000000": of_images([paths[0], str(tmp_path / "bad.jpg"), paths[1]]),
        "000001": of_images([gone]),
    }
    found = [
        worker(pa.table({"part": [part], "piece": [pickle.dumps(piece)]}))
        for part, piece in pieces.items()
    ]
    assert [(rows["id"].to_pylist(), rows["part"].to_pylist()) for rows in found] == [
        (paths, ["000000"] * 2),
        ([], []),
    ]
    unread = {
        part: [skipped.source for skipped in some]
        for part, some in PartsFolder(tmp_path / "out").failed().items()
    }
    assert unread == {"000000": [str(tmp_path / "bad.jpg")], "000001": [gone]}


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes with one CPU each, which can reach the object store of the tests."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"{Path(sys.executable).with_name('ray')} start --block --num-cpus=1 --object-store-memory=100000000"
    with pytest.MonkeyPatch.context() as patch:
        buckets.use(patch, buckets.endpoint(), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
        remote.filesystem.cache_clear()
        started = []
        for which in (
            f"--head --port={port} --include-dashboard=false",
            f"--address=127.0.0.1:{port}",
        ):
            started.append(
                subprocess.Popen(
                    f"{command} {which}".split(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.STDOUT,
                )
            )
            time.sleep(15)
        yield f"127.0.0.1:{port}"
        for process in reversed(started):
            process.terminate()
            process.wait(60)


def in_own_process(*words):
    """Run a command in its own process, because Ray remembers the last connection and token."""
    command = [sys.executable, "-m", "retrieval_tip", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_and_numbers(place):
    """Return the rows of a feature table without the features, and the features."""
    rows = pa.concat_tables(
        [open_parquet(file).read() for file in table_files(place)]
    ).replace_schema_metadata(None)
    return rows.drop("feature"), np.array(rows["feature"].to_pylist())


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_two_nodes_give_the_same_results_as_one_process(run, cluster, shared, tmp_path, kind):
    for number, (path, label) in enumerate(caltech_photos(shared, "test", 6, 8)):
        place = tmp_path / "photos" / label / f"{number:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    model = ("--no-cache", "--model", f"local-dir:{shared / 'models/lit-mini'}")
    ok("index build", tmp_path / "photos", *model, "--fit", "none", "--out", tmp_path / "i")
    place.write_bytes(b"no image")
    files = sorted((tmp_path / "photos").rglob("*.jpg"))
    source = tmp_path / "photos"
    out = str(tmp_path)
    if kind == "bucket":
        out = f"s3://{buckets.fresh_bucket()}"
        source = f"{out}/photos"
        for file in files:
            remote.system_of(source).pipe_file(
                f"{source}/{file.parent.name}/{file.name}", file.read_bytes()
            )
    nodes = set()
    ended = threading.Event()

    def watch():
        while not ended.wait(0.2):
            every = list(psutil.process_iter(["ppid", "cmdline"]))
            nodes.update(
                p.info["ppid"]
                for p in every
                if "ray::MapWorker" in " ".join(p.info["cmdline"] or ())
            )

    threading.Thread(target=watch, daemon=True).start()
    command = ("encode", source, *model, "--out")
    places = (tmp_path / "here.parquet", f"{out}/parts")
    failed(run(*command, places[0]), 3, place.name)
    ray = (*command, places[1], "--ray", cluster)
    done = in_own_process(*ray)
    assert (done.returncode, place.name in done.stderr) == (3, True), done.stderr
    (one, figures), (other, others) = map(rows_and_numbers, places)
    assert one.equals(other)
    np.testing.assert_allclose(figures, others, rtol=1e-5, atol=1e-5)
    answers = [
        json_rows(run("classify", tmp_path / "i", table, "--format", "json"), 0) for table in places
    ]
    assert [row["label"] for row in answers[0]] == [row["label"] for row in answers[1]]
    ended.set()
    raylets = [
        " ".join(psutil.Process(node).cmdline()) for node in nodes if psutil.pid_exists(node)
    ]
    assert sum(cluster.partition(":")[2] in raylet for raylet in raylets) == 2
    if kind == "folder":  # if a part is missing, the same command computes only this part
        parts = tmp_path / "parts"
        shutil.rmtree(parts / "part=000001")
        (parts / "_complete.json").unlink()
        before = {file: file.stat().st_mtime_ns for file in parts.rglob("*.parquet")}
        assert in_own_process(*ray).returncode == 3
        assert {file: file.stat().st_mtime_ns for file in before} == before
        assert rows_and_numbers(parts)[0].equals(one)
