"""Backbones: loading, identity, errors and views."""

import copy
import io
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from conftest import with_code
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from safetensors.torch import save_file
from tables import TINY, picture, some_pixels, tiny

from retrieval_tip.backbones import catalogue, torch_backbone
from retrieval_tip.backbones.base import Identity, unit
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.data.sources import read_item
from retrieval_tip.errors import BackboneError, InputError, UsageError


def test_features_match_plain_open_clip(lit_mini, shared):
    name = f"local-dir:{shared / 'models/lit-mini'}"
    path = next((shared / "data/caltech101/101_ObjectCategories/panda").iterdir())
    from retrieval_tip.data import images

    config = json.loads((shared / "models/lit-mini/open_clip_config.json").read_text())[
        "model_cfg"
    ]["text_cfg"]
    own = {"hf_model_name": str(shared / "models/lit-mini"), "hf_model_pretrained": False}
    text_cfg = config | (own if "hf_model_name" in config else {})
    model, _, preprocess = open_clip.create_model_and_transforms(name, text_cfg=text_cfg)
    model.eval()
    tokens = open_clip.get_tokenizer(name)(["a photo of a panda."])
    with torch.inference_mode():
        image = model.encode_image(preprocess(Image.open(path).convert("RGB"))[None]).numpy()
        text = model.encode_text(tokens).numpy()
    ours = lit_mini.encode_images(lit_mini.preprocess(images.decode(read_item(path)))[None])
    assert_allclose(ours, image, rtol=1e-4, atol=1e-5)
    assert_allclose(lit_mini.encode_texts(["a photo of a panda."]), text, rtol=1e-4, atol=1e-5)
    assert lit_mini.dim == 1280
    assert lit_mini.logit_scale == pytest.approx(100, rel=1e-3)


def test_the_identity_depends_on_weights_architecture_and_preprocessing(tmp_path):
    one = load_backbone(f"local-dir:{tiny(tmp_path / 'one')}", device="cpu").identity
    same = load_backbone(f"local-dir:{tiny(tmp_path / 'same')}", device="cpu").identity
    other = load_backbone(f"local-dir:{tiny(tmp_path / 'other', seed=1)}", device="cpu").identity
    gelu = load_backbone(
        f"local-dir:{tiny(tmp_path / 'gelu', quick_gelu=True)}", device="cpu"
    ).identity
    assert one.fingerprint == same.fingerprint  # the same weights in another place
    assert len({one.fingerprint, other.fingerprint, gelu.fingerprint}) == 3
    assert one.preprocess["mean"] == [0.1, 0.2, 0.3]
    assert Identity.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Identity(
        one.model, None, one.weights, one.config, one.preprocess | {"mean": [0, 0, 0]}
    ).fingerprint != (one.fingerprint)


@pytest.mark.parametrize(
    "broken", [None, [], {}, {"model": 3}, {"model": "a", "pretrained": None, "weights": 1}]
)
def test_a_damaged_identity_is_refused(broken):
    with pytest.raises(BackboneError, match="backbone"):
        Identity.from_dict(broken)


def test_a_checkpoint_of_a_tag_gets_its_preprocessing_and_activation(tmp_path, monkeypatch):
    """RN50/openai needs QuickGELU, and open_clip only warns if it is missing."""
    wanted = {}

    def create(name, pretrained, **arguments):
        wanted.update(arguments, name=name, pretrained=pretrained)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = (
        open_clip.get_pretrained_cfg("RN50", "openai")["hf_hub"].strip("/").replace("/", "--")
    )
    file = tmp_path / f"models--{repository}/snapshots/abc/rn50.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    for pretrained, path in ((f"openai={file}", str(file)), ("openai", "openai")):
        with pytest.raises(BackboneError):
            load_backbone(f"RN50@{pretrained}", device="cpu")
        assert wanted["pretrained"] == path
        assert wanted["force_quick_gelu"] is True
        assert wanted["image_interpolation"] == "bicubic"
        assert wanted["image_resize_mode"] == "shortest"
        wanted.clear()


def test_a_checkpoint_without_a_tag_loads_with_a_warning(tmp_path, caplog):
    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-S-32-alt")  # a small one
    file = tmp_path / "small.pt"
    torch.save(open_clip.CLIP(**config).state_dict(), file)
    model = load_backbone(f"ViT-S-32-alt@{file}", device="cpu")
    assert "no tag given" in caplog.text
    assert model.identity.pretrained == str(file)
    assert model.encode_texts(["a cat", "a dog"]).shape == (2, 256)


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("RN50x@openai", UsageError, ["RN50x", "RN50x4"]),
        ("RN50@nonsense", UsageError, ["nonsense", "openai"]),
        (
            "ViT-B-32",
            BackboneError,
            ["laion/CLIP-ViT-B-32-DataComp", "--model ViT-B-32@datacomp_xl"],
        ),
        ("ViT-S-32", UsageError, ["--model ViT-S-32@FILE"]),
        ("RN5O", UsageError, ["RN50"]),
        ("timm:dinov2_small", UsageError, ["timm:vit_small_patch14_dinov2"]),
        ("timm:tf_efficientnet_lite0.nonsense", UsageError, ["nonsense", "in1k"]),
        ("timm:tf_efficientnet_lite0", BackboneError, ["tf_efficientnet_lite0.in1k", "@FILE"]),
        ("timm:tf_efficientnet_lite0@/no/file", BackboneError, ["/no/file"]),
        ("RN50@openai=/no/such/file", BackboneError, ["/no/such/file", "RN50/openai"]),
        ("RN50@openai", BackboneError, ["timm/resnet50_clip.openai", "--model RN50@openai=FILE"]),
        ("hf-hub:some/repository", BackboneError, ["some/repository", "local-dir:"]),
        ("local-dir:/no/such/folder", BackboneError, ["/no/such/folder"]),
    ],
)
def test_a_loading_error_names_the_model_and_a_remedy(model, kind, words):
    with pytest.raises(kind) as error:
        load_backbone(model, device="cpu")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_damaged_model_folders_are_named(tmp_path):
    with pytest.raises(BackboneError, match=r"open_clip_config\.json"):
        load_backbone(f"local-dir:{tmp_path}", device="cpu")
    folder = tiny(tmp_path / "model")
    (folder / "open_clip_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(f"local-dir:{folder}", device="cpu")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no weights"):  # random weights are not used instead
        load_backbone(f"local-dir:{folder}", device="cpu")
    for text in ("{", "[]", '{"model_cfg": 3}'):
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(BackboneError, match=r"open_clip_config\.json"):
            load_backbone(f"local-dir:{folder}", device="cpu")


@pytest.mark.parametrize("data", [b"garbage", pickle.dumps(Path("x"), 2)], ids=["garbage", "code"])
def test_damaged_weights_and_code_are_refused_without_advice_to_run_them(data, tmp_path):
    folder = tiny(tmp_path / "model")
    file = tmp_path / "weights.bin"
    (folder / "open_clip_model.safetensors").unlink()
    for place, model in (
        (folder / "open_clip_pytorch_model.bin", f"local-dir:{folder}"),
        (file, f"timm:test_vit@{file}"),
    ):
        place.write_bytes(data)
        with pytest.raises(
            BackboneError, match="damaged, or contains code, which is never run"
        ) as error:
            load_backbone(model, device="cpu")
        assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("scheme", "claimant", "text_cfg"),
    [
        ("hf", "config.json", {}),
        ("local-dir", "config.json", {"hf_model_name": "its own", "hf_model_pretrained": False}),
        ("local-dir", "tokenizer_config.json", {"tokenizer_kwargs": {"trust_remote_code": True}}),
    ],
)
def test_a_models_own_code_is_never_run(scheme, claimant, text_cfg, tmp_path, monkeypatch):
    """Neither a "y" on standard input nor the model's own configuration allows it."""
    folder = with_code(tiny(tmp_path / "model"), claimant)
    text = TINY["text_cfg"] | {"hf_tokenizer_name": "its own"} | text_cfg
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY | {"text_cfg": text}})
    )
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    with pytest.raises(BackboneError, match=f"{scheme}:{folder}: .* custom code"):
        load_backbone(f"{scheme}:{folder}", device="cpu").encode_texts(["a cat"])
    assert answers.tell() == 0
    assert not (folder / "ran").exists()


@pytest.mark.soak
def test_the_first_build_prints_no_messages_from_transformers(shared, tmp_path):
    """OpenVINO traces the image encoder once, which reads every attribute of the model."""
    for number, name in enumerate(("cat", "dog"), 50):
        (tmp_path / "photos" / name).mkdir(parents=True)
        picture((number, number)).save(tmp_path / "photos" / name / "a.png")
    build = [
        "index",
        "build",
        str(tmp_path / "photos"),
        "--model",
        f"local-dir:{shared}/models/lit-mini",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "retrieval_tip", *build, "--out", str(tmp_path / "index")],
        env=os.environ | {"RETRIEVAL_TIP_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "transformers" not in done.stderr


def test_loading_a_model_quietly_keeps_messages_of_other_threads(caplog):
    """Warnings about unreadable images appear even while another thread loads the model."""
    inside = threading.Event()
    said = threading.Event()

    def opening():
        with catalogue.quiet():
            inside.set()
            assert said.wait(30)
            logging.getLogger().warning("a step")
            logging.getLogger("huggingface_hub.file_download").warning("a hint")

    thread = threading.Thread(target=opening)
    thread.start()
    assert inside.wait(30)
    logging.getLogger("retrieval_tip.data.reader").warning("skipped a.jpg")
    said.set()
    thread.join()
    logging.getLogger().warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["skipped a.jpg", "afterwards"]


def test_devices_and_precisions_are_checked():
    for device in ("gpu", "cuda:x", "cuda:99", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UsageError, match="device"):
            load_backbone("RN50@openai", device=device)
    with pytest.raises(UsageError, match="precision"):
        load_backbone("RN50@openai", device="cpu", precision="int4")


def test_autocast_features_are_close_to_float32(tmp_path):
    folder = tiny(tmp_path / "model")
    exact = load_backbone(f"local-dir:{folder}", device="cpu")
    half = load_backbone(f"local-dir:{folder}", device="cpu", precision="bfloat16")
    assert (exact.precision, half.precision) == ("float32", "bfloat16")
    pixels = exact.preprocess(picture())[None]
    a = unit(exact.encode_images(pixels))
    b = unit(half.encode_images(pixels))
    assert b.dtype == np.float32
    assert 0.98 < float((a * b).sum()) < 1 - 1e-9


def test_views_are_cropped_and_flipped_as_in_the_paper(tmp_path):
    """Crops have area 0.5 to 1 and aspect 3/4 to 4/3. Half are flipped. The same seed gives the same view."""
    model = load_backbone(f"local-dir:{tiny(tmp_path / 'model')}", device="cpu")
    image = picture((120, 80))
    one = model.view(image, "a")
    again = model.view(image, "a")
    other = model.view(image, "b")
    assert one.shape == (3, 32, 32)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    boxes = [torch_backbone._crop(120, 80, random.Random(seed)) for seed in range(500)]
    assert len(set(boxes)) > 400
    assert all(
        0.49 < height * width / 9600 <= 1 and 0.73 < width / height < 1.37
        for *_, height, width in boxes
    )
    for size in ((120, 80), (1, 1), (1, 500), (500, 1), (2, 3)):
        for seed in range(100):
            top, left, height, width = torch_backbone._crop(*size, random.Random(seed))
            assert 0 <= top < top + height <= size[1]
            assert 0 <= left < left + width <= size[0]
    half = Image.fromarray(
        np.repeat(np.arange(120, dtype=np.uint8)[None, :, None], 3, 2).repeat(80, 0)
    )
    views = torch.stack(
        [model.view(half, str(seed)) for seed in range(200)]
    )  # brighter on the right, unless flipped
    assert 70 < (views[..., 0] > views[..., -1]).all(dim=(1, 2)).sum() < 130


def test_unit_names_the_row_that_cannot_be_normalised():
    assert_allclose(unit(np.array([[3.0, 4.0]], dtype=np.float32)), [[0.6, 0.8]], rtol=1e-6)
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(InputError, match="feature 1"):
            unit(np.array([[1.0, 0.0], [bad, 0.0]], dtype=np.float32))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def image_weights(tmp_path_factory):
    """A file of timm weights with the tensor names of another program, and the model. The classifier comes last."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0")
    file = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(
        {f"_other.{number}": tensor for number, tensor in enumerate(model.state_dict().values())},
        file,
    )
    return file, model.eval()


def test_an_image_encoder_gives_the_same_features_as_plain_timm(image_weights, tmp_path):
    from timm.data import create_transform, resolve_model_data_config

    file, model = image_weights
    ours = load_backbone(f"timm:tf_efficientnet_lite0@{file}", device="cpu")
    view = create_transform(**resolve_model_data_config(model))(picture())
    torch.testing.assert_close(ours.preprocess(picture()), view)
    with torch.inference_mode():
        plain = model.forward_head(model.forward_features(view[None]), pre_logits=True).numpy()
    assert_allclose(ours.encode_images(view[None]), plain, rtol=1e-4, atol=1e-5)
    assert (ours.dim, ours.has_text) == (1280, False)
    own = tmp_path / "own.safetensors"
    save_file(
        model.state_dict(), own
    )  # with timm's names, the order of the tensors does not matter
    again = load_backbone(f"timm:tf_efficientnet_lite0@in1k={own}", device="cpu")
    assert again.identity.fingerprint == ours.identity.fingerprint
    assert (again.identity.model, again.identity.pretrained) == (
        "timm:tf_efficientnet_lite0.in1k",
        str(own),
    )


def test_an_image_encoder_refuses_text(image_weights):
    model = load_backbone(f"timm:tf_efficientnet_lite0@{image_weights[0]}", device="cpu")
    with pytest.raises(UsageError, match=r"timm:tf_efficientnet_lite0.*no text encoder"):
        model.encode_texts(["a cat"])


def test_weights_of_another_model_are_refused(image_weights, tmp_path):
    with pytest.raises(
        BackboneError, match=r"lite0\.pth: not weights of timm:resnet18: tensor 'conv1"
    ):
        load_backbone(f"timm:resnet18@{image_weights[0]}", device="cpu")
    (tmp_path / "text.pth").write_text("none")
    with pytest.raises(BackboneError, match=r"text\.pth: cannot be read"):
        load_backbone(f"timm:resnet18@{tmp_path / 'text.pth'}", device="cpu")


def test_a_model_in_memory_gives_the_same_backbone_and_is_pickled_with_its_weights(tmp_path):
    from retrieval_tip.backbones.open_clip import wrapped

    name = f"local-dir:{tiny(tmp_path / 'model')}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    given = wrapped(model, preprocess, open_clip.get_tokenizer(name))
    named = load_backbone(name, device="cpu")
    pixels = named.preprocess(picture())[None]
    text = named.encode_texts(["a cat"])
    expected = named.encode_images(pixels)
    assert (given.identity.model, given.identity.weights) == ("loaded", named.identity.weights)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    shutil.rmtree(tmp_path / "model")
    for there in (given, carried(given), copy.deepcopy(given)):
        torch.testing.assert_close(there.preprocess(picture())[None], pixels)
        assert_allclose(there.encode_images(pixels), expected, rtol=1e-4, atol=1e-5)
        assert_array_equal(there.encode_texts(["a cat"]), text)
        assert (there.dim, there.logit_scale, there.identity) == (
            named.dim,
            named.logit_scale,
            given.identity,
        )


def carried(model):
    return pickle.loads(pickle.dumps(model))


def test_a_pickled_backbone_opens_its_model_again_on_first_use(
    image_weights, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(image_weights[0].parent)
    model = load_backbone("timm:tf_efficientnet_lite0@lite0.pth", device="cpu")
    data = pickle.dumps(model)
    assert len(data) < 10_000
    monkeypatch.chdir(tiny_folder.parent)
    there = pickle.loads(data)
    pixels = some_pixels(model, 1)
    assert (there._opened, there.identity, there.dim, there.has_text) == (
        None,
        model.identity,
        1280,
        False,
    )
    assert_array_equal(there.encode_images(pixels), model.encode_images(pixels))
    assert pickle.loads(data)._opened is there._opened  # tasks of joblib share one model
    dual = load_backbone(f"local-dir:{tiny_folder.name}", device="cpu")
    data = pickle.dumps(dual)
    monkeypatch.chdir(tmp_path)
    there = pickle.loads(pickle.dumps(pickle.loads(data)))
    assert (there.logit_scale, there._opened) == (dual.logit_scale, None)
    assert_array_equal(there.encode_texts(["a cat"]), dual.encode_texts(["a cat"]))
    assert_array_equal(
        there.encode_images(some_pixels(dual, 1)), dual.encode_images(some_pixels(dual, 1))
    )


@pytest.mark.parametrize("replaced", [False, True])
def test_a_pickled_backbone_names_a_model_that_is_gone_or_replaced(tmp_path, replaced):
    data = pickle.dumps(
        load_backbone(f"local-dir:{tiny(tmp_path / 'model', seed=7)}", device="cpu")
    )
    shutil.rmtree(tmp_path / "model")
    words = r"open_clip_config\.json: cannot be loaded as local-dir:.*model"
    if replaced:
        tiny(tmp_path / "model", seed=8)
        words = "made with encoder local-dir:.*model .* but .* is in use"
    there = pickle.loads(data)
    for _ in range(2):
        with pytest.raises(BackboneError, match=words) as error:
            there.encode_images(torch.zeros(2, 3, 32, 32))
        assert "\n" not in str(error.value)


def test_a_backbone_pickled_on_a_gpu_runs_on_the_cpu_of_another_machine(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = load_backbone(f"local-dir:{tiny_folder}", device="cpu")
    expected = model.encode_texts(["a cat"])
    model._device = torch.device("cuda")
    model.precision = "float16"
    there = carried(model)
    assert (there._device.type, there.precision) == ("cpu", "float32")
    assert_array_equal(there.encode_texts(["a cat"]), expected)
