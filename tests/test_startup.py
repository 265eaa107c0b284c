"""Start-up: imports of each command, checks before answers, and loading of models on demand."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import timm
import torch
from conftest import COMMANDS, ok
from numpy.testing import assert_array_equal
from serving import random_index
from tables import picture, tiny, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip import model as index_model
from retrieval_tip.backbones import known
from retrieval_tip.backbones import open_clip as backbone
from retrieval_tip.backbones.base import spelled
from retrieval_tip.backbones.loading import load_again, load_backbone
from retrieval_tip.errors import BackboneError, StoreError
from retrieval_tip.index import changes
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.versions import Versions

HEAVY = (
    "numpy",
    "PIL",
    "pyarrow",
    "duckdb",
    "torch",
    "faiss",
    "torchvision",
    "open_clip",
    "transformers",
    "timm",
    "jinja2",
)

ASK = """
import json, sys
from retrieval_tip.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments, standalone_mode=False)
    except SystemExit as error:
        assert not error.code, arguments
sys.stdout.flush()
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported(*calls, watched=HEAVY):
    """Run commands in a fresh process, and return the watched modules that it imported and its output."""
    script = [
        sys.executable,
        "-c",
        ASK,
        json.dumps([[str(argument) for argument in call] for call in calls]),
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])) & set(watched), done.stdout


@pytest.fixture
def index(tmp_path):
    """Six keys of two classes, without a backbone."""
    return random_index(tmp_path / "index", 6, 16, 2)


@pytest.fixture
def row(tmp_path):
    return write_table(tmp_path / "row.parquet", unit_rows(1, 16, 2), ["class 0"])


@pytest.fixture
def photos(tmp_path):
    """Two classes of two images."""
    for number, name in enumerate(("cat/0", "cat/1", "dog/0", "dog/1")):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((40 + number, 40)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def photo_index(photos, tmp_path):
    """An index of images, built with the model folder ``model`` beside it."""
    tiny(tmp_path / "model")
    ok(
        "index build",
        photos,
        "--model",
        f"local-dir:{tmp_path / 'model'}",
        "--out",
        tmp_path / "of-photos",
    )
    return tmp_path / "of-photos"


def test_help_of_each_command_imports_nothing_heavy_and_searches_no_packages():
    groups = {command[:depth] for command in COMMANDS for depth in range(len(command))}
    found, shown = imported(
        *[[*command, "--help"] for command in (*sorted(groups), *COMMANDS)],
        ["--version"],
        watched=(*HEAVY, "importlib.metadata"),
    )
    assert found == set()
    assert shown.count("Usage:") == len(groups) + len(COMMANDS)


def test_commands_without_photos_import_no_model_and_no_database(index, row, tmp_path):
    store = f"lance://{tmp_path}/store"
    changes.clone(index, store)
    found, shown = imported(["index", "info", index], ["index", "info", store])
    assert (found, shown.count("keys_per_class")) == ({"numpy", "pyarrow"}, 2)
    found, shown = imported(["classify", index, row], ["evaluate", index, row])
    assert found == {"numpy", "pyarrow", "torch", "PIL"}
    assert "label" in shown
    assert "accuracy " in shown


def test_classifying_a_cached_image_imports_no_model(photo_index, photos, tmp_path):
    question = ["classify", photo_index, photos / "cat" / "0.png", "--format", "json", "--logits"]
    found, printed = imported(question, [*question, "--no-cache"])  # the image tower is cached
    assert found == {"numpy", "pyarrow", "torch", "PIL"}
    shown, encoded = (json.loads(line)["logits"] for line in printed.splitlines())
    command = [sys.executable, "-m", "retrieval_tip", "-q", *question]
    empty = os.environ | {
        "RETRIEVAL_TIP_CACHE": str(tmp_path / "empty")
    }  # torch encodes a single image
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=True, env=empty
    )
    assert done.stderr == ""  # Triton, which torchvision installs, may print warnings at exit
    for other in (encoded, json.loads(done.stdout)["logits"]):
        assert shown == pytest.approx(other, rel=1e-3)


def test_building_from_cached_encodings_imports_no_model(photo_index, photos, tmp_path):
    model = ["--model", f"local-dir:{tmp_path / 'model'}"]
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "cat").symlink_to(photos / "cat")
    found, _ = imported(
        ["index", "build", photos, *model, "--out", tmp_path / "again"],
        ["index", "build", tmp_path / "cats", *model, "--out", tmp_path / "added"],
        ["index", "add", tmp_path / "added", photos],
        ["classify", photo_index, photos],
    )
    assert found == {"numpy", "pyarrow", "torch", "PIL"}
    first, again, added = (Index.load(tmp_path / name) for name in ("of-photos", "again", "added"))
    for cache in (again, added):
        assert_array_equal(cache.keys, first.keys)
        assert torch.equal(cache.text_weights, first.text_weights)
    assert (again.backbone, again.settings) == (first.backbone, first.settings)


def test_classify_waits_for_the_check_before_it_answers(index, row, run, monkeypatch):
    """The answer waits even if the hashing is slow."""
    path = index / Versions(index).manifest().files["keys"].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    hashed = threading.Event()
    problem = LocalFiles.problem

    def slow(*arguments, **more):
        hashed.wait(0.5)  # is never set
        return problem(*arguments, **more)

    monkeypatch.setattr(LocalFiles, "problem", slow)
    refused = run("classify", index, row)
    assert (refused.exit_code, refused.stdout) == (1, "")


@pytest.fixture
def opened_models(monkeypatch):
    """Models that open_clip has opened."""
    models = []
    real = backbone.open_model
    monkeypatch.setattr(backbone, "open_model", lambda *given: models.append(given) or real(*given))
    return models


@pytest.fixture
def known_model(compiled):
    """A model folder with a cached image tower, and its identity, which has been loaded before."""
    place, identity, *_ = compiled
    load_backbone(identity.model, device="cpu", lazy=True)
    return place / "model", identity


def test_a_known_backbone_is_loaded_once_on_the_first_text(known_model, opened_models):
    folder, identity = known_model
    plain = load_backbone(f"local-dir:{folder}", device="cpu")
    opened_models.clear()
    lazy = load_again(identity, device="cpu")
    same = (lazy.identity, lazy.dim, lazy.precision, lazy.batch_size)
    assert same == (plain.identity, plain.dim, plain.precision, plain.batch_size)
    pixels = lazy.preprocess(picture())[None]
    assert_array_equal(lazy.encode_images(pixels), plain.encode_images(pixels))
    assert not opened_models
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: lazy.encode_texts(["a cat"]), range(8)))
    assert_array_equal(texts, [plain.encode_texts(["a cat"])] * 8)
    assert (lazy.identity, lazy.logit_scale, len(opened_models)) == (identity, plain.logit_scale, 1)


def edit_config(folder, part, **change):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config[part] |= change
    path.write_text(json.dumps(config))


CHANGES = {
    "weights": lambda folder: shutil.copy(
        tiny(folder.parent / "b", seed=1) / "open_clip_model.safetensors", folder
    ),
    "activation": lambda folder: edit_config(folder, "model_cfg", quick_gelu=True),
    "preprocessing": lambda folder: edit_config(folder, "preprocess_cfg", mean=[0.5, 0.5, 0.5]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_folder_that_changed_before_loading_is_refused(known_model, change):
    folder, identity = known_model
    lazy = load_again(identity, device="cpu")
    change(folder)
    for _ in range(2):
        with pytest.raises(BackboneError, match=r"made with encoder .* is in use"):
            lazy.encode_texts(["a cat"])


@pytest.fixture(params=["folder", "file", "hub"])
def loaded(request, tmp_path, monkeypatch):
    """The arguments that load a model, one of its files, and the model."""
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    names = (f"local-dir:{tiny(tmp_path / 'model')}", None)
    file = tmp_path / "model" / "open_clip_config.json"
    if request.param == "file":
        file = tmp_path / "weights.pth"
        torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), file)
        names = "timm:resnet10t", str(file)
    if request.param == "hub":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        names = ("hf-hub:some/tiny", None)
        file = tmp_path / "models--some--tiny" / "refs" / "main"
        file.parent.mkdir(parents=True)
        file.write_text("abc")
        for revision in ("abc", "abd"):
            shutil.copytree(tmp_path / "model", file.parents[1] / "snapshots" / revision)
    return names, file, load_backbone(spelled(*names), device="cpu", lazy=True)


def test_a_model_is_remembered_until_one_of_its_files_changes(loaded, tmp_path):
    names, file, model = loaded
    lazy = load_backbone(spelled(*names), device="cpu", lazy=True)
    for name in (
        "identity",
        "dim",
        "has_text",
        "logit_scale",
        "precision",
        "batch_size",
        "text_key",
    ):
        assert getattr(lazy, name) == getattr(model, name)
    assert lazy._opened is None
    pixels = torch.zeros(1, 3, *lazy.size)
    assert_array_equal(lazy.encode_images(pixels), model.encode_images(pixels))
    data = file.read_bytes()
    facts = file.stat()
    file.write_bytes(data[:-1] + bytes([data[-1] + 1]))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert known.recall(*names) is None
    file.write_bytes(data)
    model = load_backbone(spelled(*names), device="cpu", lazy=True)
    assert known.recall(*names)[1] == model.known
    if file.name.endswith(".json"):
        (file.parent / "added").touch()
        assert known.recall(*names) is None
        (file.parent / "added").unlink()
    record = known._record(*names)
    for damage in (
        b"",
        b"{}",
        b"[1]",
        record.read_bytes().replace(b'"dim": ', b'"dim": "a", "": '),
    ):
        record.write_bytes(damage)
        assert known.recall(*names) is None


def test_weights_are_not_drawn_since_a_checkpoint_must_contain_them_all(tmp_path):
    from safetensors.torch import load_file, save_file

    before = torch.random.get_rng_state()
    with backbone._undrawn():
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Embedding(3, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
    file = tiny(tmp_path / "model") / "open_clip_model.safetensors"
    weights = load_file(file)
    for name in weights:
        save_file({other: tensor for other, tensor in weights.items() if other != name}, file)
        with pytest.raises(BackboneError, match="cannot be loaded"):
            load_backbone(f"local-dir:{file.parent}", device="cpu")


def test_a_command_sets_the_openmp_wait_policy_unless_it_is_set():
    script = "from click.testing import CliRunner; from retrieval_tip.cli import main; import os;"
    script += "CliRunner().invoke(main, ['index', 'list', '/nowhere']); print(os.environ['OMP_WAIT_POLICY'])"
    plain = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for own, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        assert subprocess.check_output(
            [sys.executable, "-c", script], text=True, env=plain | own
        ).split() == [expected]


ON_MACOS = """
import os, sys, sysconfig, threading, urllib.request
import duckdb, numpy, pyarrow.parquet
sysconfig.get_config_vars()  # as the above, needs the real name of the platform
sys.platform = "darwin"
seen = {}

class Finder:
    def find_spec(name, *_):
        if name in ("torch", "faiss"):
            seen[name] = os.environ.get("KMP_DUPLICATE_LIB_OK")

sys.meta_path.insert(0, Finder)
from retrieval_tip import Index

index = Index.load(sys.argv[1])

def ask():
    index.classify(index.keys[:2], k=2)
    import faiss
    print(*seen, *seen.values(), faiss.omp_get_max_threads())

for _ in range(2):  # a number of threads only applies to the thread that sets it
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
"""


def test_on_macos_two_openmp_runtimes_are_allowed_and_faiss_has_one_thread(index):
    changes.rebuild(index, index="SQ8")
    plain = {
        name: value for name, value in os.environ.items() if name != "KMP_DUPLICATE_LIB_OK"
    } | {"OMP_NUM_THREADS": "3"}
    for own, expected in (({}, "TRUE"), ({"KMP_DUPLICATE_LIB_OK": "0"}, "0")):
        printed = subprocess.check_output(
            [sys.executable, "-c", ON_MACOS, index], text=True, env=plain | own
        )
        assert printed.splitlines() == [f"torch faiss {expected} {expected} 1"] * 2


def test_an_interrupt_during_imports_prints_one_line(tmp_path):
    (tmp_path / "click.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "retrieval_tip", "--help"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_damaged_file_is_never_passed_to_faiss(index, monkeypatch):
    """FAISS could crash on it."""
    changes.rebuild(index, index="SQ8")
    path = index / Versions(index).manifest().files["index"].name
    data = bytearray(path.read_bytes())
    data[4] ^= 255
    path.write_bytes(data)
    monkeypatch.setattr(index_model.VectorIndex, "load", lambda *_: pytest.fail("opened"))
    with pytest.raises(StoreError, match="SHA-256"):
        Index.load(index)
