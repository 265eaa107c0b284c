"""What the tests share: the data beside the repository or what stands in for it, one backbone, how much is tried."""

from __future__ import annotations

import atexit
import builtins
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import filelock
import numpy as np
import psutil
import pytest
import standin
import torch  # before FAISS, of which a build for an older CUDA may be in the way
import warm
from click.testing import CliRunner, Result
from hypothesis import settings

from retrieval_tip import CacheModel, errors
from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.cli import main
from retrieval_tip.settings import Settings

MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # on a disk, waiting for it takes a tenth of the time
gc.disable()  # until all is imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that processes which are interrupted here notice
if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)  # last of all: it has said what it has to say, and taking it down takes seconds
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub is imported; without it a test would try for a minute, then fail

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
PROGRAMS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a ``PATH`` with what is installed here


def _shared() -> Path:
    """The data beside the repository, else what stands in for it; a process that this one starts need not look."""
    beside = Path(os.environ.get("RETRIEVAL_TIP_SHARED", ROOT.parent / "shared"))
    found = beside if beside.is_dir() else standin.laid_out(ROOT / "build" / "shared") or beside
    os.environ["RETRIEVAL_TIP_SHARED"] = str(found)
    return found


SHARED = _shared()

SOAK = bool(os.environ.get("RETRIEVAL_TIP_SOAK"))
"""``make soak``: every kill, every damaged file, Ray, the browser. Without it the same tests take a sample."""
ATTACK = bool(os.environ.get("RETRIEVAL_TIP_ATTACK"))
"""``make attack``: many hostile inputs, others each time. Without it the same few each time."""

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"SKIPPED: no shared data at {SHARED}")
needs_real = pytest.mark.skipif(
    not (SHARED / "data" / "splits").is_dir(),
    reason=f"SKIPPED: needs real CLIP features, whole Caltech101 or published lists, which {SHARED} lacks",
)
"""What photographs, features and an encoder of another kind cannot stand in for (:mod:`standin`)."""


NO_GPU = "SKIPPED: torch sees no CUDA GPU, so nothing that needs one was tried; where there is one: make gpu"

LONG = [
    f"test_{name}.py"
    for name in (
        "page", "ray", "stores", "serve", "readme", "report", "changes", "server", "hostile",
        "finetune", "startup", "backbone", "tower", "concurrent", "cli", "tip", "kill", "stores_kill", "tars",
        "finetune_kill", "kill_changes", "plots", "living", "full_disk",
    )
]  # fmt: skip
"""Files that take longest, the longest first."""


def pytest_configure(config: pytest.Config) -> None:
    """Only the tests marked gpu see one (``make gpu``): others compare digits, or fork, and ``auto`` would take it."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def sampled(number: int, most: int = 4) -> list[int]:
    """Which of so many steps are tried: every one in a soak, else a few, the first and the last among them."""
    few = min(most, number)
    return [*range(number)] if SOAK else [i * (number - 1) // max(1, few - 1) for i in range(few)]


def few(cases: Iterable[T], number: int = 4) -> list[T]:
    """Which of the cases of a test that take the same road are tried: all in a soak, else so many, evenly spread."""
    cases = [*cases]
    return [cases[i] for i in sampled(len(cases), number)]


def examples(number: int) -> int:
    """Return how many examples of a property are tried: all in a soak, else a quarter, and ten at least."""
    return number if SOAK or ATTACK else min(number, max(10, number // 4))


settings.register_profile("sized", max_examples=examples(100), deadline=None)
settings.load_profile("sized")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first: where two processes share the work, none then waits for the last one."""
    long = pytest.mark.skip(reason="a long test: make soak runs it")
    for item in items:
        if not SOAK and item.get_closest_marker("soak"):
            item.add_marker(long)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def for_all(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that the processes of one run share."""
    shared_by_workers = "PYTEST_XDIST_WORKER" in os.environ  # whose folders lie side by side
    return tmp_path_factory.getbasetemp().parent / name if shared_by_workers else tmp_path_factory.mktemp(name)


def pytest_collection_finish() -> None:
    """What was imported stays for good: to look through it for garbage, time and again, took a sixth of the time."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # at the end it is taken down: some of it says else that it was not (openvino, triton)


@pytest.fixture(scope="session", autouse=True)
def encodings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One encoding cache for the whole run, so that no test encodes what another has."""
    folder = for_all(tmp_path_factory, "encodings")
    os.environ["RETRIEVAL_TIP_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that finds another one at work gives up at once: tests that make it wait say so."""
    monkeypatch.setattr("retrieval_tip.store.lock.LOCK_WAIT", 0.0)


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """What is said once a process is said once a test."""
    errors.warn_once.cache_clear()


@pytest.fixture(autouse=True)
def log() -> None:
    """What the command line sets up for its messages ends with the test, or the fixture, that ran it."""
    logger = logging.getLogger("retrieval_tip")
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def lit_mini() -> Backbone:
    """A small real dual encoder."""
    from retrieval_tip.backbones.loading import load_backbone

    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return load_backbone(f"local-dir:{SHARED / 'models' / 'lit-mini'}", device="cpu")


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of real photographs, eight of each of ten classes; whoever changes it changes a copy."""
    from serving import build, photographs

    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    folder = for_all(tmp_path_factory, "things")
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not (folder / "things").is_dir():
            build(SHARED, folder / "things", photographs(SHARED, "train", 10, 8))
    return folder / "things"


@pytest.fixture(scope="session")
def warm_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A ``PATH`` whose ``retrieval-tip`` runs in a process that has imported everything, one for the whole run."""
    if not sys.platform.startswith("linux"):
        yield PROGRAMS  # elsewhere forking is not sound, or cannot be
        return
    place = for_all(tmp_path_factory, "warm")
    place.mkdir(exist_ok=True)
    with warm.server(place) as folder:
        yield f"{folder}{os.pathsep}{PROGRAMS}"


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def run() -> Callable[..., Result]:
    """The command line, in this process. An exception that would be a traceback fails the test."""

    def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def nearest_keys(model: AnsweringIndex, queries: Any, k: int = 1) -> list[list[dict[str, Any]]]:
    """Return the ``k`` nearest keys of each query, nearest first: key_id, source, label and affinity of each."""
    retrieval = model.retrieval
    near = retrieval.nearest(retrieval.points(torch.from_numpy(np.asarray(queries))), k)
    used, places = np.unique(near.rows.reshape(-1).numpy(), return_inverse=True)
    described = model.described(used, ["key_id", "source", "label"]).take(places).to_pylist()
    rows = [row | {"affinity": a} for row, a in zip(described, near.affinity.reshape(-1).tolist(), strict=True)]
    return [rows[start : start + k] for start in range(0, len(rows), k)]


def parts_of(model: AnsweringIndex, *asked: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and cache logits of :meth:`AnsweringIndex.terms`."""
    terms = model.terms(*asked)
    return terms.text, terms.cache


def cache_of(*features: Any, **options: Any) -> CacheModel:
    """:meth:`CacheModel.from_features`, with settings among the options."""
    own = {field.name: options.pop(field.name) for field in fields(Settings) if field.name in options}
    return CacheModel.from_features(*features, settings=Settings(**own), **options)


def with_code(folder: Path, file: str = "config.json") -> Path:
    """A model folder one of whose files names Python code beside it, which leaves a file ``ran`` where it runs."""
    folder.mkdir(exist_ok=True)
    parts: dict[str, Any] = {"AutoConfig": "evil.T", "AutoModel": "evil.T", "AutoTokenizer": ["evil.T", "evil.T"]}
    (folder / file).write_text(json.dumps({"model_type": "x", "auto_map": parts}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass T: pass\n")
    return folder


def mount(place: Path, options: str) -> None:
    """Put a file system in memory there; the test is skipped where that cannot be."""
    result = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"SKIPPED: cannot mount a small file system here: {result.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes an empty file system of so many KiB, in place of the one before."""
    if not AS_ROOT or not sys.platform.startswith("linux"):
        pytest.skip("SKIPPED: only root on Linux can mount a small file system; the simulated full disk is tested")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def make(kibibytes: int) -> Path:
        while mounted:
            subprocess.run(["umount", "-l", mounted.pop()], check=True)
        mount(place, f"size={kibibytes}k")
        mounted.append(place)
        return place

    yield make
    while mounted:
        subprocess.run(["umount", "-l", mounted.pop()], check=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch and FAISS with one thread each."""
    import killing

    with killing.one_thread():
        yield
