"""The engine on Ray: the same rows as here, on two nodes, through deaths of workers and of the driver, to S3 and back.

One cluster of two nodes serves the whole file, and one connection most of it: starting either takes seconds.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time

import buckets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT
from serving import photographs
from tables import unit_rows, write_table
from test_backbone import tiny
from test_shards import jpeg, tar

from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.data import remote
from retrieval_tip.data.encoder import Encoder, encode_table, view_names
from retrieval_tip.data.sources import open_items, open_source
from retrieval_tip.distributed import cluster as clusters
from retrieval_tip.distributed import engine, runs, shards, tasks
from retrieval_tip.distributed.engine import BackboneName, Encoding, Ray
from retrieval_tip.errors import InputError, Skipped, StoreError, UsageError
from retrieval_tip.settings import Settings

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of two CPUs each, that find the object store of the tests; what is done here is connected to them."""
    from ray.cluster_utils import Cluster

    clusters.needed_ray()
    with pytest.MonkeyPatch.context() as patch:
        buckets.use(patch, buckets.endpoint())
        node = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
        with clusters._loopback(), clusters._silently():
            two = Cluster(initialize_head=True, head_node_args=node)
            two.add_node(num_cpus=2, object_store_memory=100 << 20)
            two.wait_for_nodes()
        try:
            with clusters.connected(two.address):
                yield two.address
        finally:
            two.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A backbone of the smallest kind."""
    return f"local-dir:{tiny(tmp_path_factory.mktemp('model') / 'tiny')}"


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """A worker that is made in this process goes to another folder and takes its own number of threads."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path):
    """Forty small pictures in two class folders, one of them broken."""
    for i in range(40):
        place = tmp_path / "pictures" / ("cat" if i % 2 else "dog") / f"{i:02}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg(6 * i))
    (tmp_path / "pictures/cat/07.jpg").write_bytes(b"broken")
    return tmp_path / "pictures"


def parts(folder):
    """The rows of a folder's parts, in order, without metadata."""
    files = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).replace_schema_metadata(None)


def same_rows(one, other):
    """Features to the last digits that the size of a batch may change, everything else to the letter."""
    assert one.drop(["feature"]).equals(other.drop(["feature"]))
    a, b = (np.array(table["feature"].to_pylist(), np.float32) for table in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert a.shape == b.shape


def here(source, tmp_path, model):
    """What this process alone makes of a source."""
    encode_table(open_items(source), tmp_path / "here.parquet", Encoder(load_backbone(model, device="cpu")))
    return pq.read_table(tmp_path / "here.parquet").replace_schema_metadata(None)


def worker_processes():
    """Processes that are actors of the pool."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if any("MapWorker" in part for part in process.info["cmdline"] or ())]


def ours(pids):
    """Those of :func:`worker_processes` that were not there before: other tests may run beside this one."""
    return [process for process in worker_processes() if process.pid not in pids]


def when_there(there, act, seconds=90):
    """A thread that acts as soon as ``there()`` holds."""

    def wait():
        end = time.monotonic() + seconds
        while time.monotonic() < end and not there():
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def has_parts(folder):
    """Whether the first part is there."""
    return lambda: next(folder.glob("part-*.parquet"), None) is not None


@pytest.mark.parametrize(
    ("cpus", "gpus", "device", "expected"),
    [
        ([2], [0], "auto", (1, 1.0, 0.0)),
        ([1], [0], "auto", (1, 0.5, 0.0)),
        ([1, 1], [0, 0], "auto", (2, 0.5, 0.0)),
        ([2, 2], [0, 0], "cpu", (3, 1.0, 0.0)),
        ([64], [0], "auto", (7, 8.0, 0.0)),
        ([16], [2], "auto", (2, 7.0, 1.0)),
        ([16], [2], "cpu", (7, 2.0, 0.0)),
        ([1], [1], "cuda", (1, 0.75, 1.0)),
    ],
)
def test_there_is_always_room_for_reading(cpus, gpus, device, expected):
    room = clusters._room(cpus, gpus, device, None)
    assert (room.actors, room.cpus, room.gpus) == expected
    assert room.actors * room.cpus < sum(cpus)
    assert clusters._room(cpus, gpus, device, 1).actors == 1


def test_devices_that_a_cluster_does_not_have():
    with pytest.raises(UsageError, match="no GPU"):
        clusters._room([4], [0], "cuda", None)
    with pytest.raises(UsageError, match="Ray hands out the GPUs"):
        clusters._room([4], [1], "cuda:1", None)
    with pytest.raises(UsageError, match="no CPU"):
        clusters._room([0], [0], "auto", None)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "127.0.0.1:99999"])
def test_no_cluster_at_an_address_is_said_at_once(address):
    code = f"""
from retrieval_tip.distributed.cluster import connected
from retrieval_tip.errors import UsageError
try:
    with connected({address!r}): pass
except UsageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"--ray-address {address}: no Ray cluster that can be used")
    assert done.stdout.count("\n") == 1


def test_without_ray_it_is_said_how_to_get_it(run, monkeypatch, pictures, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run("encode", pictures, "--engine", "ray", "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "pip install 'retrieval-tip[distributed]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", "x", "--out", "s3://b/x"), "object stores are written with --engine ray"),
        (("encode", "x", "--out", "x", "--actors", 2), "--actors needs --engine ray"),
        (("encode", "x", "--out", "x", "--shard-size", 2), "--shard-size needs --engine ray"),
        (("encode", "x", "--out", "x", "--ray-address", "a:1"), "give --engine ray too"),
        (("evaluate", "x", "x", "--engine", "ray", "--plot", "p"), "does not go with --plot"),
        (("finetune", "x", "--out", "y", "--engine", "ray", "--views", "fresh"), "give --views-cache M"),
    ],
)
def test_options_that_do_not_go_together(run, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_folder_is_of_one_run(tmp_path):
    facts = {"task": "encode", "source": "a", "settings": {"views": 1}}
    run = runs.Run.start(tmp_path / "r", facts)
    assert runs.Run.start(tmp_path / "r", facts) == run
    with pytest.raises(UsageError, match=r"r: holds another run \(of another source\); give another folder"):
        runs.Run.start(tmp_path / "r", facts | {"source": "b"})
    with pytest.raises(UsageError, match="with another views"):
        runs.Run.start(tmp_path / "r", facts | {"settings": {"views": 2}})
    (tmp_path / "r/run.json").write_bytes(b"{")
    with pytest.raises(UsageError, match="damaged"):
        runs.Run.start(tmp_path / "r", facts)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files already"):
        runs.Run.start(tmp_path / "other", facts)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        runs.Run.start(tmp_path / "file", facts)


def test_only_parts_that_are_whole_and_of_this_run_count(tmp_path):
    run = runs.Run.start(tmp_path, {"task": "encode", "source": "a", "settings": {}})
    for shard, metadata in ((0, run.metadata(0)), (1, run.metadata(0)), (2, {}), (4, {runs.PART_KEY: b"[" * 10})):
        pq.write_table(pa.table({"a": [1, 2]}).replace_schema_metadata(metadata), tmp_path / runs.part_name(shard))
    (tmp_path / runs.part_name(3)).write_bytes(b"PAR1 cut off")
    assert run.done(6) == {0: 2}
    run.write_failed(1, [Skipped("x", "why")])
    run.write_failed(2, [])
    assert run.failed(3) == [Skipped("x", "why")]
    with pytest.raises(InputError, match=r"part-000005\.parquet: written by a worker, and not there"):
        run.finish(6, 2, 1)


def test_two_nodes_encode_photographs_as_one_process_does(cluster, shared, tmp_path):
    model = f"local-dir:{shared / 'models' / 'lit-mini'}"
    items = photographs(shared, "test", 12, 4)
    pq.write_table(
        pa.table({"path": [str(path) for path, _ in items], "label": [name for _, name in items]}),
        tmp_path / "photographs.parquet",
    )
    cut = shards.cut(tmp_path / "photographs.parquet", size=4)
    made = tasks.encode(cut, tmp_path / "out", Encoding(BackboneName(model)), Ray(cluster, actors=2))
    assert (made.rows, made.parts, made.kept, made.failed) == (len(items), len(cut), 0, [])
    assert len(made.nodes) == 2, made.nodes
    assert sum(made.nodes.values()) == len(cut)
    same_rows(parts(tmp_path / "out"), here(tmp_path / "photographs.parquet", tmp_path, model))
    kind = pq.read_schema(tmp_path / "out" / "part-000000.parquet").field("feature").type
    assert kind == pa.list_(pa.float32(), 1280)


def test_the_driver_then_a_worker_is_killed_and_the_table_is_the_same(cluster, run, pictures, model, tmp_path):
    out = tmp_path / "out"
    command = ["encode", str(pictures), "--model", model, "--out", str(out), "--no-cache", "--engine", "ray",
               "--ray-address", cluster, "--actors", "1", "--shard-size", "2"]  # fmt: skip
    before = {process.pid for process in worker_processes()}
    process = subprocess.Popen([sys.executable, "-m", "retrieval_tip", *command], stderr=subprocess.DEVNULL, cwd=ROOT)
    when_there(has_parts(out), process.kill).join()
    assert process.wait(60) == -signal.SIGKILL
    end = time.monotonic() + 30
    while ours(before) and time.monotonic() < end:  # its actors end, too
        time.sleep(0.05)
    first = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert 1 <= len(first) < 20
    incomplete = run("encode", out, "--out", tmp_path / "e.parquet")
    assert incomplete.exit_code == 1
    assert "some of its parts are missing" in incomplete.stderr
    killed = []

    def kill():
        killed.append(ours(before)[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    thread = when_there(lambda: len(list(out.glob("part-*.parquet"))) > len(first), kill)
    done = run(*command)
    thread.join(5)
    assert killed
    assert done.exit_code == 3, done.stderr
    assert done.stdout == f"{out}: 39 rows in 20 parts, {len(first)} of them kept from before\n"
    assert done.stderr.count("skipped") == 1
    assert f"skipped {pictures / 'cat/07.jpg'}: " in done.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first
    same_rows(parts(out), here(pictures, tmp_path, model))
    failed = pq.read_table(out / "failed/part-000001.parquet").to_pylist()
    assert [row["input"] for row in failed] == [str(pictures / "cat/07.jpg")]
    assert json.loads((out / "complete.json").read_text())["failed"] == 1
    # all is there: nothing runs, and it says the same
    again = run(*command)
    assert (again.exit_code, again.stderr) == (3, done.stderr)
    assert "20 of them kept" in again.stdout
    other = run(*command, "--views", 2)
    assert other.exit_code == 2
    assert f"{out}: holds another run (with another views)" in other.stderr
    # and the folder is a feature table
    source, one = open_source(out), open_source(tmp_path / "here.parquet")
    assert source.items.equals(one.items)
    assert source.class_names == ("cat", "dog")
    np.testing.assert_allclose(Encoder().encode(source).features, Encoder().encode(one).features, atol=1e-6)
    built = run("index", "build", "--fit", "none", out, "--shots", 4, "--out", tmp_path / "index")
    assert built.exit_code == 0, built.stderr
    assert run("classify", tmp_path / "index", out, "--format", "csv").stdout.count("\n") == 40
    assert json.loads(run("evaluate", tmp_path / "index", out, "--json").stdout)["n"] == 39


@pytest.fixture
def asked(tmp_path, run):
    """A small index, and a table of labelled queries."""
    labels = [f"class {i % 3}" for i in range(30)]
    write_table(tmp_path / "train.parquet", unit_rows(30, 8), labels)
    write_table(tmp_path / "text.parquet", unit_rows(3, 8, 1), sorted(set(labels)))
    write_table(tmp_path / "test.parquet", unit_rows(50, 8, 2), [f"class {i % 3}" for i in range(50)])
    built = run("index", "build", "--fit", "none",
                tmp_path / "train.parquet", "--text", tmp_path / "text.parquet", "--out",
                tmp_path / "index")  # fmt: skip
    assert built.exit_code == 0, built.output
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "lance", "fitted"])
def test_evaluating_gives_the_same_figures(cluster, run, asked, kind):
    place = asked / "index"
    if kind != "folder":
        place = f"lance://{asked / 'store'}"
        assert run("index", "clone", asked / "index", place).exit_code == 0
    if kind == "fitted":
        assert run("fit", place, "--values", "solved").exit_code == 0
    options = ("-k", 5, "--alpha", 2, "--abstain", 0.5, "--where", "key_id > 3")
    local = run(
        "evaluate",
        place if kind == "fitted" else asked / "index",
        asked / "test.parquet",
        *options,
        "--precision",
        "float32",
    )
    ray = ("--engine", "ray", "--ray-address", cluster, "--actors", 1, "--shard-size", 7)
    handler, logger = logging.StreamHandler(), logging.getLogger("ray.data")
    logger.addHandler(handler)
    try:
        done = run("evaluate", place, asked / "test.parquet", *options, *ray)
    finally:
        logger.removeHandler(handler)
    assert done.exit_code == 0, done.stderr
    assert (done.stdout, done.stderr) == (local.stdout, local.stderr)
    assert handler.level == logging.NOTSET  # only Ray's own are silenced


def test_a_ray_of_its_own_classifies_the_same_and_says_nothing_of_itself(run, asked):
    """From the outside: what it prints, where it listens, what it leaves."""
    out = asked / "out"
    options = ["--top", "2", "--explain", "--logits", "--certify", "--format", "parquet", "--output"]
    command = [sys.executable, "-m", "retrieval_tip", "classify", str(asked / "index"), str(asked / "test.parquet"),
               *options, str(out), "--engine", "ray", "--shard-size", "20"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    listening = set()

    def look():
        for one in psutil.Process(process.pid).children(recursive=True):
            try:
                listening.update(c.laddr.ip for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
            except psutil.Error:
                continue

    when_there(has_parts(out), look).join()
    stdout, stderr = process.communicate(timeout=60)
    local = run("classify", asked / "index", asked / "test.parquet", *options, asked / "here.parquet",
                "--precision", "float32")  # fmt: skip
    assert process.returncode == 0, stderr
    assert stdout == ""
    assert stderr == f"{out}: 50 rows in 3 parts\n{local.stderr}"
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    one, other = parts(out).to_pylist(), pq.read_table(asked / "here.parquet").to_pylist()
    assert [row["input"] for row in one] == [row["input"] for row in other]
    assert [row["label"] for row in one] == [row["label"] for row in other]
    for a, b in zip(one, other, strict=True):
        assert a["logits"] == pytest.approx(b["logits"], rel=1e-5)
        assert [key["key_id"] for key in a["neighbours"]] == [key["key_id"] for key in b["neighbours"]]


def test_from_tars_on_s3_to_a_table_on_s3(cluster, run, model, tmp_path, monkeypatch):
    buckets.use(monkeypatch, buckets.endpoint())
    remote.filesystem.cache_clear()
    bucket = f"s3://{buckets.fresh_bucket()}"
    system = remote.system_of(bucket)
    tar(tmp_path / "a.tar", [(f"{i}.{kind}", data) for i in range(3) for kind, data in
                             (("jpg", jpeg(40 * i)), ("cls", b"cat" if i else b"dog"))])  # fmt: skip
    tar(tmp_path / "b.tar", [("x.jpg", jpeg(7)), ("y.jpg", b"broken"), ("z.json", b"{}")])
    (tmp_path / "c.tar").write_bytes(b"no tar")
    for name in ("a", "b", "c"):
        system.pipe_file(f"{bucket}/in/{name}.tar", (tmp_path / f"{name}.tar").read_bytes())
    command = ("encode", f"{bucket}/in", "--model", model, "--no-cache", "--engine", "ray", "--ray-address", cluster,
               "--actors", 1, "--out", f"{bucket}/out")  # fmt: skip
    done = run(*command)
    assert done.exit_code == 3, done.stderr
    assert done.stdout == f"{bucket}/out: 4 rows in 3 parts\n"
    assert sum(line.startswith("warning: skipped") for line in done.stderr.splitlines()) == 3
    assert "3 of them kept" in run(*command).stdout
    local = tmp_path / "out"
    for name in system.find(f"{bucket}/out"):
        place = local / name.partition("/out/")[2]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(system.cat_file(f"s3://{name}"))
        assert buckets.SECRET.encode() not in place.read_bytes()
    table = parts(local)
    assert table["id"].to_pylist() == [
        f"{bucket}/in/{name}.jpg" for name in ("a.tar/0", "a.tar/1", "a.tar/2", "b.tar/x")
    ]
    assert table["label"].to_pylist() == ["dog", "cat", "cat", None]
    failed = pa.concat_tables([pq.read_table(file) for file in sorted((local / "failed").iterdir())])
    assert failed["input"].to_pylist() == [f"{bucket}/in/{name}" for name in ("b.tar/z", "b.tar/y.jpg", "c.tar")]
    # the table there is a source, read by ranges
    cut = shards.cut(f"{bucket}/out", size=2)
    assert [(shard.first, shard.last) for shard in cut] == [(0, 2), (2, 3), (0, 1)]
    np.testing.assert_array_equal(
        Encoder().encode(shards.open_shard(cut[1])).features, np.array(table["feature"].to_pylist(), np.float32)[2:3]
    )
    with pytest.raises(InputError, match="no images, tars or Parquet file there"):
        shards.cut(f"{bucket}/nothing")
    with pytest.raises(InputError, match=r"none\.parquet: no such object"):
        shards.cut(f"{bucket}/none.parquet")


def test_the_views_of_finetuning_are_those_of_one_process(pictures, model, monkeypatch):
    """Shard by shard as a worker does them, in this process."""

    def through(task, cut, ray, *, progress=False):
        worker = engine.Worker(task, clusters.Room(1, 1.0), str(pictures))
        for shard in reversed(cut):
            yield engine.Summary.from_row(worker._done(shard).to_row())

    monkeypatch.setattr(tasks, "through", through)
    source = open_items(pictures)
    source = source.take([*range(10), 3, 1])  # an image that stands twice is one shot
    names = view_names(1, 3)
    backbone = load_backbone(model, device="cpu")
    expected = Encoder(backbone).encode_views(source, names)
    encoder = tasks.RayEncoder(backbone, encoding=Encoding(BackboneName(model)), ray=Ray(size=4))
    found = encoder.encode_views(source, names)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.starts, expected.starts)
    np.testing.assert_allclose(found.features, expected.features, atol=1e-6)
    assert [skipped.source for skipped in encoder.skipped] == [str(pictures / "cat/07.jpg")]
    broken = source.take([3])
    with pytest.raises(InputError, match="none of its 1 item could be read"):
        tasks.RayEncoder(backbone, encoding=Encoding(BackboneName(model))).encode_views(broken, names)


def test_a_worker_says_what_is_wrong_in_one_line(asked, tmp_path):
    write_table(asked / "bad.parquet", unit_rows(4, 8, 2), ["class 0", "class 0", "class 0", "dog"])
    plain = tasks.Asked(Settings(alpha=1.0, beta=1.0))
    sealed = tasks.sealed_as(asked / "index")
    task = tasks.EvaluateTask(encoding=Encoding(), folder=str(asked / "index"), sealed=sealed, asked=plain)
    worker = engine.Worker(task, clusters.Room(1, 1.0), str(tmp_path))
    (shard,) = shards.cut(asked / "bad.parquet", labelled=True)
    kind, text = worker._done(shard).error
    assert kind == "InputError"
    assert "dog" in text
    task._cache = None
    kind, text = worker._done(shard).error
    assert kind == "RetrievalTipError"
    assert text.startswith(f"{asked / 'bad.parquet'} rows 0 to 4: a worker failed: AttributeError: ")
    (asked / "bad.parquet").unlink()
    assert worker._done(shard).error[0] == "InputError"
    task = tasks.EvaluateTask(encoding=Encoding(BackboneName("local-dir:nowhere")), folder="x", sealed="", asked=plain)
    assert "nowhere" in engine.Worker(task, clusters.Room(1, 1.0), str(tmp_path))._done(shard).error[1]


def test_what_a_worker_refuses_is_said_as_here(cluster, asked):
    rows = unit_rows(6, 8, 3)
    rows[4] = np.nan
    write_table(asked / "nan.parquet", rows)
    cut = shards.cut(asked / "nan.parquet", size=3)
    with pytest.raises(InputError, match=r"nan\.parquet: row 4: the feature holds NaN"):
        tasks.encode(cut, asked / "out", Encoding(), Ray(cluster, actors=1))
    sealed = tasks.sealed_as(asked / "index")
    with pytest.raises(StoreError, match="no such folder"):
        tasks.sealed_as(asked / "nothing")
    plain = tasks.Asked(Settings(alpha=1.0, beta=1.0))
    task = tasks.EvaluateTask(encoding=Encoding(), folder=str(asked / "index"), sealed=sealed[::-1], asked=plain)
    with pytest.raises(StoreError, match="not the version that this run began with"):
        task.start("cpu", Encoder())
    with pytest.raises(UsageError, match="images need a backbone"):
        tasks.encode([shards.Shard(0, "tar", "x.tar")], asked / "o", Encoding())


def test_a_shard_that_ends_every_worker_is_given_up(cluster, asked, monkeypatch):
    monkeypatch.setattr(engine, "RETRIES", 1)
    cut = shards.cut(asked / "test.parquet", size=50)
    with pytest.raises(InputError, match=r"ended its worker 2 times, or Ray failed \("):
        list(engine.through(Deadly(), cut, Ray(cluster, actors=1)))


class Deadly(engine.Task):
    """Ends its process."""

    encoding = Encoding()

    def work(self, shard, found, encoder):
        os.kill(os.getpid(), signal.SIGKILL)
