"""Encoders in int8: calibration on photos, the stored encoder, and its use."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import warm
from conftest import failed, json_of, ok
from numpy.testing import assert_array_equal
from PIL import Image
from safetensors.torch import load_file, save_file
from tables import tiny

from retrieval_tip.backbones import tower
from retrieval_tip.backbones.base import unit
from retrieval_tip.backbones.loading import load_again, load_backbone
from retrieval_tip.classifier import Classifier
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import FEWEST, Reader
from retrieval_tip.data.sources import open_items, read_item
from retrieval_tip.errors import BackboneError, InputError, UsageError
from retrieval_tip.index.places import at
from retrieval_tip.pictures import open_images
from retrieval_tip.server.served import Backbones

CALIBRATE = (
    "import socket, sys, torch\n"
    "def no(*_): raise SystemExit('a connection')\n"
    "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
    "from retrieval_tip.backbones.loading import load_backbone\n"
    "model = load_backbone(sys.argv[1], device='cpu')\n"
    "torch.manual_seed(int(sys.argv[2]))\n"
    "model.store_int8(torch.randn(40, 3, *model.size))\n"
)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return f"local-dir:{tiny(tmp_path_factory.mktemp('models') / 'model')}"


@pytest.fixture(scope="module")
def towers(name, tmp_path_factory):
    """The stored towers of the encoder ``name`` (only float32, and float32 and int8), and their lowest cosine."""
    place = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRIEVAL_TIP_CACHE", str(place / "float32"))
        model = load_backbone(name, device="cpu")
        model.encode_images(torch.zeros(2, 3, *model.size))
        shutil.copytree(place / "float32", place / "int8")
        patch.setenv("RETRIEVAL_TIP_CACHE", str(place / "int8"))
        return place, model.store_int8(random_pixels())


def random_pixels():
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def place(towers, tmp_path, monkeypatch):
    """A cache folder of the test's own, with the tower in float32."""
    shutil.copytree(towers[0] / "float32", tmp_path / "cache")
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "towers"


@pytest.fixture
def calibrated(towers, tmp_path, monkeypatch):
    """A cache folder of the test's own, with the towers in float32 and int8."""
    shutil.copytree(towers[0] / "int8", tmp_path / "cache")
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes, of reddish and bluish noise."""
    draw = np.random.default_rng(0)
    for label, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            noise = draw.integers(0, 128, (40, 40, 3), dtype=np.uint8)
            noise[..., channel] += 100
            Image.fromarray(noise).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


def int8(name):
    return load_backbone(name, device="cpu", precision="int8")


def cosines(one, other):
    return (unit(one).astype(np.float64) * unit(other)).sum(1)


def test_stored_features_are_near_float32(name, towers, calibrated):
    exact = load_backbone(name, device="cpu")
    quick = int8(name)
    pixels = random_pixels()
    lowest = towers[1]
    near = cosines(quick.encode_images(pixels), exact.encode_images(pixels))
    assert 0.95 < near.min() <= lowest < near.max() < 1 - 1e-7
    assert (quick.precision, exact.precision, exact.scope) == ("int8", "float32", "float32")
    again = int8(name)
    assert_array_equal(again.encode_images(pixels), quick.encode_images(pixels))
    assert again.scope == quick.scope
    assert quick.scope.startswith("int8-")
    assert_array_equal(quick.encode_texts(["a cat"]), exact.encode_texts(["a cat"]))


def test_another_calibration_replaces_the_stored_encoder(name, calibrated):
    before = int8(name)
    load_backbone(name, device="cpu").store_int8(3 * random_pixels())
    after = int8(name)
    assert after.scope != before.scope  # and so do the keys of the encoding cache
    pixels = torch.randn(2, 3, *before.size)
    assert not np.array_equal(after.encode_images(pixels), before.encode_images(pixels))


@pytest.mark.soak
def test_large_channels_of_a_transformer_keep_int8_accurate(tmp_path, monkeypatch):
    """Trained transformers have such channels, and 8 bits for all channels together would be too few."""
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    file = tiny(tmp_path / "model") / "open_clip_model.safetensors"
    weights = load_file(file)
    for name in [name for name in weights if name.startswith("visual.transformer.resblocks")]:
        if name.endswith(("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")):
            weights[name][0] *= 300
        elif name.endswith(("attn.in_proj_weight", "mlp.c_fc.weight")):
            weights[name][:, 0] /= 300
    save_file(weights, file)
    exact = load_backbone(f"local-dir:{tmp_path}/model", device="cpu")
    pixels = torch.randn(40, 3, *exact.size)
    exact.store_int8(pixels)
    quick = int8(f"local-dir:{tmp_path}/model")
    assert cosines(quick.encode_images(pixels), exact.encode_images(pixels)).min() > 0.95


def test_a_calibration_far_from_float32_is_refused(name, place, monkeypatch):
    monkeypatch.setitem(tower.LEAST_COSINE, "int8", 1.1)
    exact = load_backbone(name, device="cpu")
    with pytest.raises(
        BackboneError, match=r"cosine to the float32 features is 0\.9\d+, below 1\.1$"
    ):
        exact.store_int8(random_pixels())
    with pytest.raises(BackboneError, match="not stored"):
        int8(name)


@pytest.mark.parametrize(
    "damage", ["bytes", "digests", "endless", "truncated", "onnx", "foreign", "versions"]
)
def test_a_damaged_or_foreign_tower_is_not_used(name, calibrated, damage, monkeypatch):
    first = int8(name)
    folder = tower.folder_of(first.identity, "int8")
    if damage == "bytes":
        data = bytearray((folder / "tower.bin").read_bytes())
        data[len(data) // 2] ^= 255
        (folder / "tower.bin").write_bytes(data)
    elif damage == "truncated":
        (folder / "tower.xml").write_bytes((folder / "tower.xml").read_bytes()[:-100])
    elif damage == "digests":
        (folder / "digests.json").write_text("[" * 100_000)
    elif damage == "endless":
        (folder / "tower.bin").unlink()
        (folder / "tower.bin").symlink_to("/dev/zero")
    elif damage == "onnx":
        (folder / "tower.onnx").write_bytes(b"")
    elif damage == "foreign":  # intact, but of another encoder
        shutil.rmtree(folder)
        shutil.copytree(tower.folder_of(first.identity, "float32"), folder)
    else:
        monkeypatch.setattr(tower, "version", lambda package: f"newer {package}")
    with pytest.raises(BackboneError, match="not stored"):
        int8(name)


@pytest.mark.soak
def test_two_processes_store_an_encoder_at_once_without_a_connection(
    name, place, tmp_path, warm_path
):
    (tmp_path / "home").mkdir()
    own = os.environ | {"HOME": str(tmp_path / "home")}
    both = [
        subprocess.Popen([warm.python(warm_path), "-c", CALIBRATE, name, seed], env=own)
        for seed in "12"
    ]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(entry.name for entry in place.iterdir()) == sorted(
        tower.folder_of(int8(name).identity, kind).name for kind in ("float32", "int8")
    )
    assert not list((tmp_path / "home").iterdir())


def test_without_nncf_nothing_is_stored(name, monkeypatch):
    monkeypatch.setattr(tower, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"NNCF is not installed; run .*pip install"):
        load_backbone(name, device="cpu").store_int8(torch.zeros(40, 3, 32, 32))


def test_an_encoder_that_is_not_stored_names_the_command(name, place, run, photos, tmp_path):
    command = f"retrieval-tip models --int8 PHOTOS --model {name}$"
    identity = load_backbone(name, device="cpu").identity
    for load in (lambda: int8(name), lambda: load_again(identity, device="cpu", precision="int8")):
        with pytest.raises(BackboneError, match=command):
            load()
    with pytest.raises(BackboneError, match=command):
        Classifier.from_folder(photos, name, precision="int8")
    done = run(
        "index build",
        photos,
        "--model",
        name,
        "--out",
        tmp_path / "index",
        "--precision",
        "int8",
    )
    failed(done, 1, command[:-1])
    assert len(done.stderr.strip().splitlines()) == 1


def test_only_an_encoder_in_float32_can_be_stored(name, place):
    with pytest.raises(UsageError, match="in float32 with OpenVINO on a CPU"):
        load_backbone(name, device="cpu", precision="bfloat16").store_int8(
            torch.zeros(40, 3, 32, 32)
        )


def test_the_command_stores_an_encoder_that_other_commands_load(run, name, place, photos, tmp_path):
    done = ok("models --int8", photos, "--model", name)
    assert f"{name}: stored in int8 (lowest cosine to the features in float32: " in done.stderr
    cache = EncodingCache(tmp_path / "encodings")
    source = open_items(photos)
    exact, quick = (
        Reader(load_backbone(name, device="cpu", precision=p), cache=cache)
        for p in ("float32", "int8")
    )
    first = exact.encode(source).features
    second = quick.encode(source).features
    assert 0.9 < cosines(first, second).min() < 1 - 1e-7
    assert len(cache) == 2 * len(source)
    index = tmp_path / "index"
    query = photos / "red" / "0.png"
    build = ("index", "build", photos, "--model", name, "--out", index)
    ok(*build, "--precision", "int8")
    assert json_of("index info", index)["precision"] == {"keys": "int8"}
    answers = {
        asked: json.loads(
            run("classify", index, query, "--precision", asked, "--format", "json").stdout
        )["label"]
        for asked in ("float32", "int8")
    }
    assert answers == {"float32": "red", "int8": "red"}
    (tmp_path / "more" / "red").mkdir(parents=True)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "more" / "red" / "new.png")
    ok("index add", index, tmp_path / "more", "--precision", "float32")
    assert json_of("index info", index)["precision"]["keys"] == "float32, int8"
    assert Backbones("cpu", "int8", None).of(at(index).load(), "things").precision == "int8"
    assert Classifier.load(index, precision="int8").predict(query).label == "red"


def test_the_model_is_not_loaded_to_encode_in_int8(name, calibrated, monkeypatch):
    exact = load_backbone(name, device="cpu", lazy=True)
    waiting = load_again(exact.identity, device="cpu", precision="int8")
    monkeypatch.setattr(waiting, "_open", lambda _: pytest.fail("loaded"))
    pixels = torch.randn(2, 3, *exact.size)
    assert_array_equal(waiting.encode_images(pixels), int8(name).encode_images(pixels))


def test_too_few_photos_are_refused(run, name, place, photos):
    few = open_items(photos).take(range(FEWEST - 1))
    for source in (few, open_images(map(read_item, few.paths))):
        with pytest.raises(
            InputError, match=f"{FEWEST - 1} photos could be read; int8 needs {FEWEST}"
        ):
            Reader(load_backbone(name, device="cpu")).store_int8(source)
    reader = Reader(load_backbone(name, device="cpu"))
    with pytest.raises(InputError, match=" 0 photos could be read"):
        reader.store_int8(replace(few, load=lambda _: b""))
    assert len(reader.skipped) == FEWEST - 1
    with pytest.raises(UsageError, match="a feature table has no pixels"):
        reader.store_int8(replace(few, paths=None))
    assert run("models", "--int8", photos).exit_code == 2  # which encoder?
    assert run("models --model", name).exit_code == 2


def test_an_exported_graph_contains_the_stored_encoder(name, calibrated, photos, tmp_path):
    index = tmp_path / "index"
    files = [tmp_path / f"{kind}.onnx" for kind in ("float32", "int8")]
    ok("index build", photos, "--model", name, "--out", index)
    for file in files:
        done = ok("index export", index, "--onnx", file, "--precision", file.stem)
        assert "10 of 10 photos classified as by the package" in done.stdout
    assert [b"QuantizeLinear" in file.read_bytes() for file in files] == [False, True]
    pixels = np.stack(
        [
            np.moveaxis(np.asarray(Image.open(p).resize((32, 32)), np.float32), 2, 0)
            for p in sorted((photos / "red").iterdir())
        ]
    )
    exact, quick = (
        onnxruntime.InferenceSession(file).run(["probabilities"], {"pixels": pixels})[0]
        for file in files
    )
    assert 0 < np.abs(exact - quick).max() < 0.2
    onnx.checker.check_model(str(files[1]), full_check=True)
    for path in (photos / "red").iterdir():  # the stored encoder needs no photos
        path.unlink()
    ok("index export", index, "--onnx", files[0], "--precision", "int8")
    assert files[0].stat().st_size == files[1].stat().st_size
