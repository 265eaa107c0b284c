"""The image tower alone: torch's features, the model's own views, and the file kept between processes."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import open_clip
import pytest
import timm
import torch
import warm
from conftest import few, tries
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tables import by_torch, picture, some_pixels, tiny

from retrieval_tip.backbones import tower
from retrieval_tip.backbones.base import Identity, unit
from retrieval_tip.backbones.loading import load_again, load_backbone


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "towers"


@pytest.fixture
def folder(tmp_path):
    return tiny(tmp_path / "model")


def cosines(one, other):
    return (unit(one).astype(np.float64) * unit(other)).sum(1)


def test_features_match_torch_for_any_number_of_images(compiled):
    place, identity, *_ = compiled
    model = load_backbone(identity.model, device="cpu")
    plain = by_torch(identity.model)
    for number in (1, 2, 5):
        pixels = some_pixels(plain, number)
        assert_allclose(
            unit(model.encode_images(pixels)), unit(plain.encode_images(pixels)), atol=1e-5
        )
    assert len(list((place / "cache" / "towers").iterdir())) == 1
    assert model.identity == plain.identity
    assert_array_equal(deepcopy(model).encode_images(pixels), model.encode_images(pixels))


def test_threads_that_encode_at_the_same_time_get_their_own_features(compiled):
    model = load_backbone(compiled[1].model, device="cpu")
    pixels = [some_pixels(model, 8) + at for at in range(8)]
    expected = [model.encode_images(own) for own in pixels]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(model.encode_images, pixels * 25))
    assert_allclose(np.stack(found), np.stack(expected * 25), atol=1e-6)


def test_a_real_encoder_matches_torch(lit_mini, shared):
    plain = by_torch(lit_mini.identity.model)
    files = sorted((shared / "data/caltech101/101_ObjectCategories/panda").iterdir())[:6]
    pixels = torch.stack([plain.preprocess(Image.open(file).convert("RGB")) for file in files])
    expected = plain.encode_images(pixels)
    compiled = load_backbone(lit_mini.identity.model, device="cpu")
    assert_allclose(unit(compiled.encode_images(pixels)), unit(expected), atol=1e-5)
    half = load_backbone(lit_mini.identity.model, device="cpu", precision="bfloat16")
    worst = cosines(half.encode_images(pixels), expected).min()
    assert worst > 0.995
    if "BF16" in tower.runtime().Core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):  # others compute in float32
        assert worst < 0.9999999


@pytest.mark.parametrize(
    "name", few(["ViT-B-32-quickgelu", "RN50", "timm:tf_efficientnet_lite0"], 1)
)
def test_common_architectures_can_be_converted(name, place):
    """Random weights of a ResNet with attention, a transformer, and a model of timm."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        visual = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    else:
        config = open_clip.get_model_config(name)
        small = (
            {"layers": [1, 1, 1, 1], "width": 16} if name == "RN50" else {"layers": 2, "width": 128}
        )
        config["vision_cfg"] |= small
        config["text_cfg"] |= {
            "vocab_size": 64,
            "width": 64,
            "heads": 1,
            "layers": 1,
        }  # which is not converted
        visual = open_clip.CLIP(**config).visual
    model = torch.nn.Module()
    model.visual = visual.eval()
    model.encode_image = visual.forward
    identity = identity_of(name)
    compiled = tower.converted(model, identity, (224, 224), "float32")
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = visual(pixels).numpy()
    assert cosines(compiled(pixels), expected).min() > 0.99999
    again = tower.kept(identity, "float32")
    assert_array_equal(again(pixels), compiled(pixels))


def identity_of(name):
    return Identity(
        model=name,
        pretrained=None,
        weights=f"sha256:{name}",
        config="sha256:0",
        preprocess={"size": 224},
    )


def test_a_stored_tower_needs_no_model(compiled):
    _, identity, pixels, expected = compiled
    view = load_backbone(identity.model, device="cpu", lazy=True).preprocess(picture())
    waiting = load_again(identity, device="cpu")
    assert_allclose(waiting.encode_images(pixels), expected, rtol=1e-6)
    assert_array_equal(waiting.preprocess(picture()), view)
    assert waiting._opened is None


def test_a_damaged_tower_is_compiled_again(compiled):
    place, identity, pixels, expected = compiled
    (stored,) = (place / "cache" / "towers").iterdir()
    (stored / "tower.xml").unlink()
    assert tower.kept(identity, "float32") is None
    again = load_backbone(identity.model, device="cpu")
    assert_allclose(again.encode_images(pixels), expected, rtol=1e-6)
    assert tower.kept(identity, "float32") is not None


def test_a_tower_that_differs_from_torch_is_not_used(folder, place, caplog, monkeypatch):
    plain = by_torch(f"local-dir:{folder}")
    monkeypatch.setitem(tower.LEAST_COSINE, "float32", 1.1)
    assert tower.converted(plain._model, plain.identity, plain.size, "float32") is None
    assert [record.message.count("encoded by torch") for record in caplog.records] == [1]
    assert not place.exists()


def test_without_a_cache_the_tower_is_compiled_each_time(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "file"))
    compiled = load_backbone(f"local-dir:{folder}", device="cpu")
    plain = by_torch(f"local-dir:{folder}")
    pixels = some_pixels(plain, 3)
    assert_allclose(
        unit(compiled.encode_images(pixels)), unit(plain.encode_images(pixels)), atol=1e-5
    )


def test_other_weights_have_their_own_tower(compiled):
    place, _, pixels, before = compiled
    name = f"local-dir:{tiny(place / 'other', seed=1)}"
    after = load_backbone(name, device="cpu").encode_images(pixels)
    assert not np.allclose(before, after)
    assert len(list((place / "cache" / "towers").iterdir())) == 2
    assert_allclose(unit(after), unit(by_torch(name).encode_images(pixels)), atol=1e-5)


def test_the_conversion_opens_no_connection(folder, tmp_path, warm_path):
    """No connection is opened, and nothing is written outside of the cache."""
    script = (
        "import socket, sys, torch\n"
        "assert 'openvino' not in sys.modules\n"
        "def no(*_): raise SystemExit('a connection')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "from retrieval_tip.backbones.loading import load_backbone\n"
        "model = load_backbone(sys.argv[1], device='cpu')\n"
        "model.encode_images(torch.zeros(2, 3, *model.size))"
    )
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [warm.python(warm_path), "-c", script, f"local-dir:{folder}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"HOME": str(tmp_path / "home"), "RETRIEVAL_TIP_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache" / "towers").iterdir())) == 1
    assert not list((tmp_path / "home").iterdir())


SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))
TIMM = {
    "input_size": (3, 96, 96),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.3, 0.25),
    "crop_mode": "center",
}


@tries(60)
@given(
    size=SIZES,
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    mode=st.sampled_from(["shortest", "squash"]),
)
def test_views_match_open_clip(size, interpolation, mode):
    config = {"size": 64, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
    config |= {"interpolation": interpolation, "resize_mode": mode}
    image = noise(size)
    assert tower.shorter_side(config)
    expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(image)
    assert torch.equal(tower.view(image, config), expected)


@tries(60)
@given(size=SIZES, crop_pct=st.sampled_from([0.875, 0.9, 0.95, 1.0]))
def test_views_match_timm(size, crop_pct):
    from timm.data.transforms_factory import create_transform

    config = TIMM | {"interpolation": "bicubic", "crop_pct": crop_pct}
    image = noise(size)
    plain = {key: value for key, value in config.items() if key != "input_size"} | {
        "size": [96, 96]
    }
    assert tower.shorter_side(plain)
    assert torch.equal(
        tower.view(image, plain), create_transform(**config, is_training=False)(image)
    )


def noise(size):
    draw = np.random.default_rng(size)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "change",
    [
        {"interpolation": "lanczos"},
        {"size": [64, 32]},
        {"resize_mode": "longest"},
        {"mean": 0.5},
        {"size": "a"},
    ],
)
def test_the_model_makes_unsupported_views(change):
    config = {
        "size": 64,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    assert tower.shorter_side(config)
    assert not tower.shorter_side(config | change)
    assert not tower.shorter_side({})
