"""The precisions ``int8`` and ``fast``: calibration, its storage, and the check on labelled photos."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import warm
from PIL import Image
from safetensors.torch import load_file, save_file
from tables import tiny

from retrieval_tip.backbones import base, tower
from retrieval_tip.backbones.base import unit
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.classifier.classifier import Classifier
from retrieval_tip.data.encoder import FEWEST, Encoder
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.sources import open_items
from retrieval_tip.errors import UsageError
from retrieval_tip.index import precision
from retrieval_tip.index.places import at
from retrieval_tip.index.precision import PrecisionCheck
from retrieval_tip.server.served import Backbones

CALIBRATE = (
    "import socket, sys, torch\n"
    "def no(*_): raise SystemExit('a connection')\n"
    "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
    "from retrieval_tip.backbones.loading import load_backbone\n"
    "model = load_backbone(sys.argv[1], device='cpu', precision='int8')\n"
    "torch.manual_seed(int(sys.argv[2]))\n"
    "model.calibrate(torch.randn(40, 3, *model.size))\n"
    "print(model.scope)"
)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return f"local-dir:{tiny(tmp_path_factory.mktemp('models') / 'model')}"


@pytest.fixture(scope="module")
def towers(name, tmp_path_factory):
    """The stored towers of the encoder ``name``: only float32, and float32 and int8."""
    place = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETRIEVAL_TIP_CACHE", str(place / "float32"))
        model = load_backbone(name, device="cpu")
        model.encode_images(torch.zeros(2, 3, *model.size))
        shutil.copytree(place / "float32", place / "int8")
        patch.setenv("RETRIEVAL_TIP_CACHE", str(place / "int8"))
        int8(name).calibrate(torch.randn(40, 3, *model.size))
    return place


@pytest.fixture
def place(towers, tmp_path, monkeypatch):
    """A cache folder of the test's own, with the tower in float32."""
    shutil.copytree(towers / "float32", tmp_path / "cache")
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "towers"


@pytest.fixture
def calibrated(towers, tmp_path, monkeypatch):
    """A cache folder of the test's own, with the towers in float32 and int8."""
    shutil.copytree(towers / "int8", tmp_path / "cache")
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


def test_calibrated_features_are_near_float32_and_come_back_from_the_cache(name, place):
    exact, quick = load_backbone(name, device="cpu"), int8(name)
    assert quick.needs_photos
    pixels = torch.randn(40, 3, *quick.size)
    quick.calibrate(pixels)
    assert (quick.precision, quick.needs_photos) == ("int8", False)
    near = cosines(quick.encode_images(pixels), exact.encode_images(pixels))
    assert 0.95 < near.min() < near.max() < 1 - 1e-7
    again = int8(name)
    np.testing.assert_array_equal(again.encode_images(pixels), quick.encode_images(pixels))
    assert again.scope == quick.scope != exact.scope == "float32"
    np.testing.assert_array_equal(quick.encode_texts(["a cat"]), exact.encode_texts(["a cat"]))


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
    exact, quick = load_backbone(f"local-dir:{tmp_path}/model", device="cpu"), int8(f"local-dir:{tmp_path}/model")
    pixels = torch.randn(40, 3, *quick.size)
    quick.calibrate(pixels)
    assert quick.precision == "int8"
    assert cosines(quick.encode_images(pixels), exact.encode_images(pixels)).min() > 0.95


def test_a_calibration_far_from_float32_is_not_used(name, place, monkeypatch, caplog):
    monkeypatch.setitem(tower.LEAST_COSINE, "int8", 1.1)
    quick = int8(name)
    quick.calibrate(torch.randn(40, 3, *quick.size))
    assert quick.precision == "float32"
    assert "the cosine to the float32 features is 0.9" in caplog.text
    assert int8(name).needs_photos


@pytest.mark.parametrize("damage", ["bytes", "truncated", "foreign", "versions"])
def test_a_damaged_or_foreign_tower_is_not_used(name, calibrated, damage, monkeypatch):
    first = int8(name)
    assert not first.needs_photos
    folder = tower.folder_of(first.identity, "int8")
    if damage == "bytes":
        data = bytearray((folder / "tower.bin").read_bytes())
        data[len(data) // 2] ^= 255
        (folder / "tower.bin").write_bytes(data)
    elif damage == "truncated":
        (folder / "tower.xml").write_bytes((folder / "tower.xml").read_bytes()[:-100])
    elif damage == "foreign":  # intact, but of another encoder
        shutil.rmtree(folder)
        shutil.copytree(tower.folder_of(first.identity, "float32"), folder)
    else:
        monkeypatch.setattr(tower, "version", lambda package: f"newer {package}")
    assert int8(name).needs_photos


def test_a_damaged_tower_is_calibrated_again(name, calibrated):
    folder = tower.folder_of(int8(name).identity, "int8")
    (folder / "tower.xml").unlink()
    again = int8(name)
    assert again.needs_photos
    again.calibrate(torch.randn(40, 3, *again.size))
    assert not int8(name).needs_photos


def test_two_processes_calibrate_at_once_and_agree_without_a_connection(name, place, tmp_path, warm_path):
    (tmp_path / "home").mkdir()
    own = os.environ | {"HOME": str(tmp_path / "home")}
    both = [
        subprocess.Popen(
            [warm.python(warm_path), "-c", CALIBRATE, name, seed], stdout=subprocess.PIPE, text=True, env=own
        )
        for seed in "12"
    ]
    scopes = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert scopes == {int8(name).scope}
    assert sorted(entry.name for entry in place.iterdir()) == sorted(
        tower.folder_of(int8(name).identity, kind).name for kind in ("float32", "int8")
    )
    assert not list((tmp_path / "home").iterdir())


def test_without_nncf_the_error_names_the_command(name, monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda _: None)
    for asked in ("int8", "fast"):
        with pytest.raises(UsageError, match="pip install 'nncf>="):
            load_backbone(name, device="cpu", precision=asked)


def test_torch_cannot_use_int8(name):
    with pytest.raises(UsageError, match="requires OpenVINO on a CPU"):
        load_backbone(name, device="cpu", precision="int8", runtime="torch")


def test_encoded_photos_calibrate_int8_and_the_cache_separates_precisions(name, place, photos, tmp_path):
    cache, source = EncodingCache(tmp_path / "encodings"), open_items(photos)
    exact, quick = (Encoder(load_backbone(name, device="cpu", precision=p), cache=cache) for p in ("float32", "int8"))
    first, second = exact.encode(source).features, quick.encode(source).features
    assert quick.backbone.precision == "int8"
    assert 0.9 < cosines(first, second).min() < 1 - 1e-7
    assert len(cache) == 2 * len(source)
    np.testing.assert_array_equal(replace(quick, backbone=int8(name)).encode(source).features, second)


def test_too_few_photos_are_encoded_in_float32_with_a_warning(name, place, photos, caplog):
    few = open_items(photos).take(range(FEWEST - 1))
    for asked, used in (("int8", "float32"), ("fast", tower.fastest())):
        encoder = Encoder(load_backbone(name, device="cpu", precision=asked))
        encoder.encode(few)
        assert encoder.backbone.precision == used
    assert [record.message.partition(":")[0] for record in caplog.records] == ["precision int8", "precision fast"]


def test_photos_in_memory_are_never_encoded_in_an_unchecked_precision(name, place, caplog):
    pixels = torch.randn(2, 3, 32, 32)
    expected = load_backbone(name, device="cpu").encode_images(pixels)
    for asked in ("int8", "fast"):
        backbone = load_backbone(name, device="cpu", precision=asked)
        np.testing.assert_array_equal(backbone.encode_images(pixels), expected)
        assert backbone.precision == "float32"
    assert len(caplog.records) == 2


def test_a_copy_for_training_is_float32(name, place):
    assert int8(name).copy_to_train().precision == "float32"


@pytest.mark.parametrize(
    ("check", "accepts"),
    [
        (PrecisionCheck(400, 0.90, 0.90, 0.03), True),
        (PrecisionCheck(400, 0.90, 0.886, 0.02), True),  # the standard error is 0.015
        (PrecisionCheck(400, 0.90, 0.884, 0.02), False),
        (PrecisionCheck(400, 0.90, 0.95, 0.031), False),
        (PrecisionCheck(40, 1.0, 1.0, 0.0), True),
        (PrecisionCheck(40, 1.0, 0.975, 0.025), False),
    ],
)
def test_a_check_accepts_one_standard_error_and_three_percent(check, accepts):
    assert check.accepts is accepts


@pytest.mark.soak
def test_fast_is_int8_for_an_index_that_answers_alike(things, place, caplog, monkeypatch):
    monkeypatch.setattr(precision, "DIFFERENT", 0.1)  # of 80 photos, some lie between two classes
    clf = Classifier.load(things, precision="fast")
    assert clf.encoder.backbone.precision == "int8", caplog.text
    folder = tower.folder_of(clf.encoder.backbone.identity, "int8")
    (stored,) = folder.glob("check-*.json")
    photos, exact, quick, different = json.loads(stored.read_bytes())
    assert photos == len(clf)
    assert PrecisionCheck(photos, exact, quick, different).accepts
    stored.write_text(json.dumps([photos, exact, quick, 0.5]))  # read the next time
    assert Classifier.load(things, precision="fast").encoder.backbone.precision == tower.fastest()


def test_a_calibration_on_noise_is_refused(things, place, monkeypatch, caplog):
    """It is planted in the cache, as if another program had calibrated the encoder."""
    quick = load_backbone(at(things).manifest().backbone["model"], device="cpu", precision="int8")
    quick.calibrate(torch.randn(FEWEST, 3, *quick.size) * 0.01)
    clf = Classifier.load(things, precision="fast")
    assert clf.encoder.backbone.precision == tower.fastest()
    assert "other answers" in caplog.text


def test_an_index_records_the_precision_of_its_keys_and_accepts_others(run, name, place, photos, tmp_path, monkeypatch):
    index, first = tmp_path / "index", photos / "red" / "0.png"
    build = ("index", "build", photos, "--model", name, "--out", index)
    assert run(*build, "--precision", "int8").exit_code == 0
    assert json.loads(run("index", "info", index, "--json").stdout)["precision"] == {"keys": "int8", "fast": None}
    answers = {
        asked: json.loads(run("classify", index, first, "--precision", asked, "--format", "json").stdout)["label"]
        for asked in ("float32", "int8")
    }
    assert answers == {"float32": "red", "int8": "red"}
    added = run("index", "add", index, photos, "--precision", "float32")
    assert added.exit_code == 0, added.output
    assert json.loads(run("index", "info", index, "--json").stdout)["precision"]["keys"] == "float32, int8"
    monkeypatch.setattr(PrecisionCheck, "accepts", True)
    assert run(*build, "--precision", "fast").exit_code == 0
    facts = json.loads(run("index", "info", index, "--json").stdout)["precision"]
    assert facts["keys"] == "float32"
    assert facts["fast"].startswith("int8 (")
    for asked in ("int8", "fast"):
        served = Backbones("cpu", asked, None).of(at(index).load(device="cpu"), "things")
        assert served.precision == "int8"
    monkeypatch.setattr(precision, "KEPT", len(open_items(photos)) - 1)
    assert run(*build, "--precision", "fast").exit_code == 0
    assert json.loads(run("index", "info", index, "--json").stdout)["precision"]["keys"] == "int8"


def test_without_its_photos_an_index_uses_a_precision_without_calibration(
    run, name, place, photos, tmp_path, monkeypatch
):
    index = tmp_path / "index"
    assert run("index", "build", photos, "--model", name, "--out", index).exit_code == 0
    queries = photos.rename(tmp_path / "elsewhere")
    answered = run("classify", index, queries, "--precision", "fast", "--format", "json")
    assert answered.exit_code == 0
    assert f"precision fast uses {tower.fastest()} (fewer than {FEWEST} photos" in answered.stderr
    answered = run("classify", index, queries, "--precision", "int8", "--format", "json")
    assert answered.exit_code == 0
    assert not int8(name).needs_photos  # calibrated on the queries
    assert len(answered.stdout.splitlines()) == 40


def test_ray_is_refused(run, name, photos, tmp_path):
    done = run("encode", photos, "--model", name, "--out", tmp_path / "out", "--engine", "ray", "--precision", "int8")
    assert done.exit_code != 0
    assert "--engine ray needs" in done.stderr


def test_an_exported_int8_graph_reports_its_agreement(run, name, place, photos, tmp_path):
    index, files = tmp_path / "index", [tmp_path / f"{kind}.onnx" for kind in ("float32", "int8")]
    assert run("index", "build", photos, "--model", name, "--out", index).exit_code == 0
    for file in files:
        done = run("index", "export", index, "--onnx", file, "--precision", file.stem)
        assert done.exit_code == 0, done.output
        assert "10 of 10 photos classified as by the package" in done.stdout
    assert [b"QuantizeLinear" in file.read_bytes() for file in files] == [False, True]
    pixels = np.stack([np.moveaxis(np.asarray(Image.open(p).resize((32, 32)), np.float32), 2, 0) for p in
                       sorted((photos / "red").iterdir())])  # fmt: skip
    exact, quick = (onnxruntime.InferenceSession(file).run(["probabilities"], {"pixels": pixels})[0] for file in files)
    assert 0 < np.abs(exact - quick).max() < 0.2
    for path in list((photos / "red").iterdir())[:10]:
        path.unlink()
    done = run("index", "export", index, "--onnx", files[0], "--precision", "int8")
    assert done.exit_code == 1
    assert f"30 photos of the index could be read; {FEWEST} are needed" in done.stderr
