"""Shared by all tests: test data or its stand-in, one backbone, the number of cases, common fixtures."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import datetime
import functools
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import click
import filelock
import numpy as np
import psutil
import pytest
import standin
import torch  # before FAISS, whose CUDA libraries may be older
import warm
from click.testing import CliRunner
from hypothesis import settings
from tables import read_features, some_pixels, tiny

from retrieval_tip import Index, errors
from retrieval_tip.cli import main
from retrieval_tip.cli.group import commands_of
from retrieval_tip.fit import closed_form
from retrieval_tip.settings import Settings

MEMORY = Path("/dev/shm")
ROOM = 4 << 30
if (
    MEMORY.is_dir()
    and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > ROOM
):
    os.environ.setdefault(
        "PYTEST_DEBUG_TEMPROOT", str(MEMORY)
    )  # waiting for a disk takes a tenth of the test time
gc.disable()  # until everything is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # children inherit it, so interrupting them works
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)  # runs last; a regular shutdown takes seconds
os.environ["HF_HUB_OFFLINE"] = (
    "1"  # read on import; otherwise a test would retry for a minute before it fails
)
sys.modules["openvino_telemetry"] = (
    None  # it forks this large process dozens of times for each encoder
)

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = os.environ.get("RETRIEVAL_TIP_WINDOWS")
"""``make windows``: the Python for Windows that runs the commands of the docs, from Linux."""
pytest_plugins = ["windows"] if os.name == "nt" else []
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ``PATH`` including this environment


def _shared():
    """Return the test data or its stand-in, and pass the path on to child processes."""
    beside = Path(os.environ.get("RETRIEVAL_TIP_SHARED", ROOT.parent / "shared"))
    # a stranger's folder of the same name lacks the encoder
    found = (
        beside
        if (beside / "models/lit-mini").is_dir()
        else standin.create(ROOT / "build" / "shared") or NO_DATA
    )
    os.environ["RETRIEVAL_TIP_SHARED"] = str(found)
    return found


NO_DATA = ROOT / "build" / "no-data"
"""A folder that does not exist, which stands for missing test data."""
SHARED = _shared()
REAL = (SHARED / "data" / "splits").is_dir()

LIT_MINI = f"local-dir:{SHARED / 'models' / 'lit-mini'}"
"""A small real dual encoder, as ``--model`` takes it."""

SOAK = bool(os.environ.get("RETRIEVAL_TIP_SOAK"))
"""``make soak``: every kill, every damaged file, Ray, the browser. Otherwise, the same tests use a sample."""
ATTACK = bool(os.environ.get("RETRIEVAL_TIP_ATTACK"))
"""``make attack``: many hostile inputs, different in each run. Otherwise, the same few in each run."""

NO_SHARED = "SKIPPED: neither ../shared nor its stand-in"
NO_REAL = "SKIPPED: the stand-in of ../shared has no real features, photos or published lists"
needs_real = pytest.mark.real
"""Marks tests that cannot use the stand-in (:mod:`standin`). The second run of ``.ci/run`` selects them."""

NO_GPU = "SKIPPED: torch finds no CUDA GPU; run make gpu on a machine with one"

SLOWEST = [
    f"test_{name}.py"
    for name in (
        "page",
        "ray",
        "readme",
        "stores",
        "interrupted",
        "startup",
        "server",
        "label",
        "classifier",
        "fitted_stores",
        "cli",
        "closed_form",
        "precision",
        "serve",
        "report",
        "changes",
        "hostile",
        "compare",
        "encoders",
        "estimator",
        "sort",
        "catalogue",
        "demo",
        "onnx",
        "living",
        "compatibility",
        "store",
        "sql",
    )
]
"""The slowest test files, slowest first."""


def pytest_configure(config):
    """Hide the GPU except in ``make gpu``. Other tests compare digits or fork, and ``auto`` would choose the GPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def sampled(number, most=4):
    """Return the steps to try, of ``number``: all in a soak, else at most ``most``, including first and last."""
    few = min(most, number)
    return [*range(number)] if SOAK else [i * (number - 1) // max(1, few - 1) for i in range(few)]


def few(cases, number=4):
    """Return the cases to try, of several similar ones: all in a soak, else ``number``, evenly spread."""
    cases = [*cases]
    return [cases[i] for i in sampled(len(cases), number)]


def examples(number):
    """Return the number of examples of a property: ``number`` in a soak, else a sixth, but at least eight."""
    return number if SOAK or ATTACK else min(number, max(8, number // 6))


def tries(number):
    """Run a property with :func:`examples` of this number."""
    return settings(max_examples=examples(number))


settings.register_profile("sized", max_examples=examples(100), deadline=None)
settings.load_profile("sized")


def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that two processes finish at the same time. Skip tests that cannot run here."""
    long = pytest.mark.skip(reason="a long test; make soak runs it")
    for item in items:
        if not REAL and item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason=NO_REAL if SHARED.is_dir() else NO_SHARED))
        if not SOAK and item.get_closest_marker("soak"):
            item.add_marker(long)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
    items.sort(
        key=lambda item: (
            SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST)
        )
    )


def pytest_make_parametrize_id(val):
    """Name cases after short lists, tuples and dicts, which pytest would only number."""
    with contextlib.suppress(TypeError):
        shown = json.dumps(val).replace('"', "") if isinstance(val, list | tuple | dict) else ""
        return shown if 0 < len(shown) <= 60 else None
    return None


def shared_folder(tmp_path_factory, name):
    """Return a folder shared by all processes of a run."""
    in_worker = "PYTEST_XDIST_WORKER" in os.environ  # the folders of all workers have one parent
    return (
        tmp_path_factory.getbasetemp().parent / name if in_worker else tmp_path_factory.mktemp(name)
    )


def pytest_collection_finish():
    """Keep imported objects out of garbage collection, which took a sixth of the time."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # otherwise openvino and triton print errors at exit


@pytest.fixture(scope="session", autouse=True)
def encodings(tmp_path_factory):
    """One encoding cache for the whole run, so that no photo is encoded twice."""
    folder = shared_folder(tmp_path_factory, "encodings")
    os.environ["RETRIEVAL_TIP_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Make a writer fail at once if another one holds the lock. Repeat warnings, and reset the logger of commands."""
    monkeypatch.setattr("retrieval_tip.store.files.LOCK_WAIT", 0.0)
    errors.warn_once.cache_clear()
    logger = logging.getLogger("retrieval_tip")
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared():
    """The test data."""
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def lit_mini(shared):
    """A small real dual encoder."""
    from retrieval_tip.backbones.loading import load_backbone

    return load_backbone(f"local-dir:{shared / 'models' / 'lit-mini'}", device="cpu")


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """A model folder, the cache that holds its compiled tower, and the features of three images."""
    from retrieval_tip.backbones.loading import load_backbone

    place = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRIEVAL_TIP_CACHE", str(place / "cache"))
        model = load_backbone(f"local-dir:{tiny(place / 'model')}", device="cpu")
        pixels = some_pixels(model, 3)
        return place, model.identity, pixels, model.encode_images(pixels)


@pytest.fixture
def compiled(compiled_once, tmp_path, monkeypatch):
    """A copy of ``compiled_once``, which a test may change: the folder, the identity, the images and their features."""
    place, identity, *encoded = compiled_once
    shutil.copytree(place, tmp_path / "compiled")
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "compiled" / "cache"))
    return (
        tmp_path / "compiled",
        replace(identity, model=f"local-dir:{tmp_path / 'compiled' / 'model'}"),
        *encoded,
    )


@pytest.fixture(scope="session")
def things(shared, tmp_path_factory):
    """An index of real photos, eight for each of ten classes. Change only a copy."""
    from serving import build, caltech_photos

    folder = shared_folder(tmp_path_factory, "things")
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not (folder / "things").is_dir():
            build(
                shared, folder / "things", caltech_photos(shared, "train", 10, 8), "--fit", "none"
            )
    return folder / "things"


@pytest.fixture
def own(things, tmp_path):
    """A copy of the photo index that a test may change."""
    return Path(shutil.copytree(things, tmp_path / "own"))


@pytest.fixture(scope="session")
def demo_photos():
    """The photos and the encoder of the demo, which stay in the clone."""
    import demo

    work = ROOT / "build/docs"
    work.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(work / "lock"):  # several processes may fetch them
            demo.lay_out(work, "debian", None, None)
    except (SystemExit, subprocess.SubprocessError):
        pytest.skip(
            "SKIPPED: the demo's photos cannot be fetched here (apt-get download, pip download)"
        )
    return work


@pytest.fixture
def demo_clone(demo_photos, tmp_path):
    """A folder in which an example of the docs runs: photos, an encoder, and lit-mini beside it."""
    (tmp_path / "shared").symlink_to(SHARED)
    return demo_folder(tmp_path / "clone", demo_photos)


def demo_folder(folder, photos):
    """Create a folder with links to the demo's photos and encoder."""
    folder.mkdir()
    for name in ("photos", "new", "efficientnet-lite0.pth"):
        (folder / name).symlink_to(photos / name)
    return folder


@pytest.fixture(scope="session")
def warm_path(tmp_path_factory):
    """A ``PATH`` whose ``retrieval-tip`` forks from a process that has imported everything."""
    if not sys.platform.startswith("linux"):
        yield PROGRAMS  # forking is unsafe or impossible elsewhere
        return
    if WINDOWS:
        program = tmp_path_factory.mktemp("windows") / "retrieval-tip"
        package = f"Z:{ROOT}".replace("/", "\\")
        program.write_text(
            f"#!/bin/sh\nPYTHONPATH='{package}' exec '{WINDOWS}' -m retrieval_tip \"$@\"\n"
        )
        program.chmod(0o755)
        yield f"{program.parent}{os.pathsep}{PROGRAMS}"
        return
    with warm.server(tmp_path_factory.mktemp("warm")) as folder:
        yield f"{folder}{os.pathsep}{PROGRAMS}"


@pytest.fixture(scope="module")
def server(request, warm_path, tmp_path_factory):
    """The test module as a process that runs jobs in children and kills them."""
    import killing

    server = killing.Server(request.module.__file__, tmp_path_factory.mktemp("server"), warm_path)
    yield server
    server.close()


def uninstall(package, monkeypatch):
    """Make a package look uninstalled."""
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def run():
    """The command line, run in this process."""
    return command_line


def command_line(command, *arguments, stdin=None):
    """Run a command in this process: its first words in one string, then one argument each.

    An exception that would print a traceback fails the test.
    """
    words = [*str(command).split(), *map(str, arguments)]
    result = CliRunner().invoke(main, words, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def ok(*arguments):
    """Run a command that has to succeed."""
    result = command_line(*arguments)
    assert result.exit_code == 0, result.output
    return result


def failed(result, status, *words):
    """Check that a command failed with this exit status, and that its error contains these words."""
    assert result.exit_code == status, result.output
    for word in words:
        assert str(word) in result.stderr


def json_rows(done, *statuses):
    """Return the rows that a command has printed with ``--format json``."""
    assert done.exit_code in (statuses or (0, 3)), done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def json_of(command, *arguments):
    """Return what a command has printed with ``--json``."""
    return json.loads(command_line(command, *arguments, "--json").stdout)


COMMANDS = {
    tuple(path.split()): command
    for path, command in commands_of(main)
    if not isinstance(command, click.Group)
}
"""The commands, by their words."""


def parts_of(model, *asked):
    """Return the text and cache logits of :meth:`Index.terms`."""
    terms = model.terms(*asked)
    return terms.text, terms.cache


def cache_of(*features, **options):
    """Call :meth:`Index.from_features` with settings among the options."""
    own = {
        field.name: options.pop(field.name) for field in fields(Settings) if field.name in options
    }
    return Index.from_features(*features, settings=Settings(**own), **options)


def fitted(index, *request, **options):
    """Return an index with its closed-form fit."""
    return closed_form.fit(index, *request, **options)[0]


def food_index(shared, per_class=8, **changes):
    """Return an index of some shots of each of nine foods."""
    (K, labels), (W, names) = (
        read_features(shared / f"data/clip-food9/{part}.parquet") for part in ("train", "text")
    )
    shots = np.concatenate([np.flatnonzero(labels == name)[:per_class] for name in names])
    own = {"alpha": 20.0, "beta": 5.5, "device": "cpu"} | changes
    return cache_of(K[shots], labels[shots].tolist(), names.tolist(), W, **own)


def with_code(folder, file="config.json"):
    """Create a model folder whose config names Python code, which creates a file ``ran`` if it is run."""
    folder.mkdir(exist_ok=True)
    parts = {"AutoConfig": "evil.T", "AutoModel": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"]}
    (folder / file).write_text(json.dumps({"model_type": "x", "auto_map": parts}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass T: pass\n")
    return folder


def mount(place, options):
    """Mount a file system in memory, or skip the test."""
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"SKIPPED: cannot mount a small file system here: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts an empty file system of a size in KiB, instead of the previous one."""
    if not AS_ROOT or not sys.platform.startswith("linux"):
        pytest.skip(
            "SKIPPED: only root on Linux can mount a small file system; the simulated full disk is tested"
        )
    place = tmp_path / "disk"
    place.mkdir()
    with contextlib.ExitStack() as mounted:

        def make(kibibytes):
            mounted.close()
            mount(place, f"size={kibibytes}k")
            mounted.callback(subprocess.run, ["umount", "-l", place], check=True)
            return place

        yield make


@pytest.fixture(scope="module")
def one_encoder():
    """Load each encoder that is served once for all tests, because loading and compiling are slow."""
    from retrieval_tip.server import served

    backbones = {}
    load_again = served.load_again

    def load_once(identity, **options):
        key = (identity.model, identity.pretrained, identity.fingerprint, *options.values())
        if key not in backbones:
            backbones[key] = load_again(identity, **options)
        return backbones[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "load_backbone", functools.cache(served.load_backbone))
        patch.setattr(served, "load_again", load_once)
        yield


@pytest.fixture(scope="module")
def bucket():
    """An object store on loopback, in which unfinished versions may be deleted at once."""
    import buckets

    from retrieval_tip.store import versions

    with pytest.MonkeyPatch.context() as patch:
        buckets.use(patch, buckets.endpoint())
        patch.setattr(versions, "UNFINISHED", datetime.timedelta())
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Limit torch and FAISS to one thread each."""
    import killing

    with killing.one_thread():
        yield
