"""Backbones: loading, identity, what is refused, and the views."""

from __future__ import annotations

import json
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from retrieval_tip import backbone
from retrieval_tip.backbone import Identity, load_backbone, unit
from retrieval_tip.errors import BackboneError, InputError, UsageError

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny(folder, seed=0, **config):
    """A model folder with random weights."""
    torch.manual_seed(seed)
    config = TINY | config
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": config, "preprocess_cfg": {"size": 32, "mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def picture(size=(50, 40)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def test_features_are_those_of_plain_open_clip(lit_mini, shared):
    name = f"local-dir:{shared / 'models/lit-mini'}"
    path = next((shared / "data/caltech101/101_ObjectCategories/panda").iterdir())
    from retrieval_tip import images

    config = json.loads((shared / "models/lit-mini/open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    text_cfg = config | {"hf_model_name": str(shared / "models/lit-mini"), "hf_model_pretrained": False}
    model, _, preprocess = open_clip.create_model_and_transforms(name, text_cfg=text_cfg)
    model.eval()
    tokens = open_clip.get_tokenizer(name)(["a photo of a panda."])
    with torch.inference_mode():
        image = model.encode_image(preprocess(Image.open(path).convert("RGB"))[None]).numpy()
        text = model.encode_text(tokens).numpy()
    ours = lit_mini.encode_images(lit_mini.preprocess(images.decode(images.read(path)))[None])
    np.testing.assert_allclose(ours, image, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lit_mini.encode_texts(["a photo of a panda."]), text, rtol=1e-4, atol=1e-5)
    assert lit_mini.dim == 1280
    assert lit_mini.logit_scale == pytest.approx(100, rel=1e-3)


def test_a_local_model_works_from_any_folder(shared, tmp_path, monkeypatch, lit_mini):
    # its configuration names the text tower relative to the project's root
    monkeypatch.chdir(tmp_path)
    again = load_backbone(f"local-dir:{shared / 'models/lit-mini'}", device="cpu")
    assert again.identity == lit_mini.identity


def test_identity_tells_weights_architecture_and_preprocessing(tmp_path):
    one = load_backbone(f"local-dir:{tiny(tmp_path / 'one')}", device="cpu").identity
    same = load_backbone(f"local-dir:{tiny(tmp_path / 'same')}", device="cpu").identity
    other = load_backbone(f"local-dir:{tiny(tmp_path / 'other', seed=1)}", device="cpu").identity
    gelu = load_backbone(f"local-dir:{tiny(tmp_path / 'gelu', quick_gelu=True)}", device="cpu").identity
    assert one.fingerprint == same.fingerprint  # the same weights in another place
    assert len({one.fingerprint, other.fingerprint, gelu.fingerprint}) == 3
    assert one.preprocess["mean"] == [0.1, 0.2, 0.3]
    assert Identity.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Identity(one.model, None, one.weights, one.config, one.preprocess | {"mean": [0, 0, 0]}).fingerprint != (
        one.fingerprint
    )


@pytest.mark.parametrize("broken", [None, [], {}, {"model": 3}, {"model": "a", "pretrained": None, "weights": 1}])
def test_a_damaged_identity_is_refused(broken):
    with pytest.raises(BackboneError, match="backbone"):
        Identity.from_dict(broken)


def test_a_checkpoint_of_a_tag_gets_its_preprocessing_and_activation(tmp_path, monkeypatch):
    """RN50/openai needs QuickGELU: open_clip only warns where it is missing."""
    wanted = {}

    def create(name, pretrained, **arguments):
        wanted.update(arguments, name=name, pretrained=pretrained)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    file = tmp_path / "rn50.safetensors"
    file.write_bytes(b"")
    for pretrained, path in ((f"openai={file}", str(file)), ("openai", "openai")):
        with pytest.raises(BackboneError):
            load_backbone("RN50", pretrained, device="cpu")
        assert wanted["pretrained"] == path
        assert wanted["force_quick_gelu"] is True
        assert wanted["image_interpolation"] == "bicubic"
        assert wanted["image_resize_mode"] == "shortest"
        wanted.clear()


def test_a_bare_checkpoint_loads_and_says_what_it_assumes(tmp_path, caplog):
    torch.manual_seed(0)
    config = open_clip.get_model_config("RN50")
    file = tmp_path / "rn50.pt"
    torch.save(open_clip.CLIP(**config).state_dict(), file)
    model = load_backbone("RN50", str(file), device="cpu")
    assert "no tag is named" in caplog.text
    assert model.identity.pretrained == str(file)
    assert model.encode_texts(["a cat", "a dog"]).shape == (2, 1024)


@pytest.mark.parametrize(
    ("model", "pretrained", "kind", "words"),
    [
        ("RN50x", "openai", UsageError, ["RN50x", "RN50x4"]),
        ("RN50", "nonsense", UsageError, ["nonsense", "openai"]),
        ("ViT-B-32", None, UsageError, ["--pretrained", "laion2b_s34b_b79k"]),
        ("RN50", "openai=/no/such/file", BackboneError, ["/no/such/file", "RN50/openai"]),
        ("RN50", "openai", BackboneError, ["timm/resnet50_clip.openai", "--pretrained openai=FILE"]),
        ("hf-hub:some/repository", None, BackboneError, ["some/repository", "local-dir:"]),
        ("local-dir:/no/such/folder", None, BackboneError, ["/no/such/folder"]),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_way_out(model, pretrained, kind, words):
    with pytest.raises(kind) as error:
        load_backbone(model, pretrained, device="cpu")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_damaged_model_folders_are_named(tmp_path):
    with pytest.raises(BackboneError, match=r"open_clip_config\.json: missing"):
        load_backbone(f"local-dir:{tmp_path}", device="cpu")
    folder = tiny(tmp_path / "model")
    (folder / "open_clip_model.safetensors").write_bytes(b"garbage")
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(f"local-dir:{folder}", device="cpu")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no weights"):  # not random ones in silence
        load_backbone(f"local-dir:{folder}", device="cpu")
    for text in ("{", "[]", '{"model_cfg": 3}'):
        (folder / "open_clip_config.json").write_text(text)
        with pytest.raises(BackboneError, match=r"open_clip_config\.json"):
            load_backbone(f"local-dir:{folder}", device="cpu")


def test_devices_and_precisions_are_checked():
    for device in ("gpu", "cuda:x", "cuda:99", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UsageError, match="device"):
            load_backbone("RN50", "openai", device=device)
    with pytest.raises(UsageError, match="precision"):
        load_backbone("RN50", "openai", device="cpu", precision="int8")


def test_autocast_stays_near_float32(tmp_path):
    folder = tiny(tmp_path / "model")
    exact = load_backbone(f"local-dir:{folder}", device="cpu")
    half = load_backbone(f"local-dir:{folder}", device="cpu", precision="bfloat16")
    assert (exact.precision, half.precision) == ("float32", "bfloat16")
    pixels = exact.preprocess(picture())[None]
    a, b = unit(exact.encode_images(pixels)), unit(half.encode_images(pixels))
    assert b.dtype == np.float32
    assert 0.98 < float((a * b).sum()) < 1 - 1e-9


def test_views_are_the_papers(tmp_path, monkeypatch):
    """Area 0.5 to 1, aspect 3/4 to 4/3, inside the picture, flipped half the time, the same for the same seed."""
    model = load_backbone(f"local-dir:{tiny(tmp_path / 'model')}", device="cpu")
    image = picture((120, 80))
    one, again, other = model.view(image, "a"), model.view(image, "a"), model.view(image, "b")
    assert one.shape == (3, 32, 32)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    boxes = [backbone._crop(120, 80, random.Random(seed)) for seed in range(500)]
    for top, left, height, width in boxes:
        assert 0 <= top <= 80 - height
        assert 0 <= left <= 120 - width
        assert 0.49 < height * width / 9600 <= 1
        assert 0.73 < width / height < 1.37
    assert len(set(boxes)) > 400
    flips = 0
    from torchvision.transforms import functional as vision

    flip = vision.hflip

    def count(image):
        nonlocal flips
        flips += 1
        return flip(image)

    monkeypatch.setattr(vision, "hflip", count)
    for seed in range(200):
        model.view(image, str(seed))
    assert 70 < flips < 130


def test_crops_of_extreme_pictures_stay_inside():
    for width, height in ((1, 1), (1, 500), (500, 1), (2, 3)):
        top, left, h, w = backbone._crop(width, height, random.Random(0))
        assert 0 < h <= height
        assert 0 < w <= width
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w


def test_unit_names_the_row_without_direction():
    np.testing.assert_allclose(unit(np.array([[3.0, 4.0]], dtype=np.float32)), [[0.6, 0.8]], rtol=1e-6)
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(InputError, match="feature 1"):
            unit(np.array([[1.0, 0.0], [bad, 0.0]], dtype=np.float32))
