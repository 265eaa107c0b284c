"""Small random CLIP and SigLIP models in transformers' format, against the features of transformers."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from retrieval_tip import Classifier, load_backbone
from retrieval_tip.backbones import catalogue
from retrieval_tip.errors import BackboneError, UsageError

transformers = pytest.importorskip("transformers")

VOCABULARY = ["<pad>", "<end>", "<unknown>", "a", "photo", "of", "cat", "dog", "."]
SIDE, LENGTH = 32, 8
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = TOWER | {
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": LENGTH,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = TOWER | {"image_size": SIDE, "patch_size": 16}


def saved(kind, folder):
    """Save a model folder with transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
        model = transformers.CLIPModel(config)
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        processor = transformers.CLIPImageProcessor(**size)
    else:
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
        )
        processor = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unknown>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unknown>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param) / "model")


def photo(seed, size=(60, 44)):
    noise = np.random.default_rng(seed).integers(
        0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8
    )
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def features(given):
    """Return the features that ``get_image_features`` or ``get_text_features`` of any version returned."""
    return getattr(given, "pooler_output", given).detach().numpy()


def test_features_match_transformers(folder):
    backbone = load_backbone(f"hf:{folder}", device="cpu")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    photos = [photo(seed, size) for seed, size in enumerate([(64, 44), (33, 91), (32, 32)])]
    pixels = processor(images=photos, return_tensors="pt")["pixel_values"]
    views = torch.stack([backbone.preprocess(image) for image in photos])
    assert_allclose(
        views.numpy(), pixels.numpy(), atol=0.05
    )  # the crop removes an even number of pixels
    expected = features(model.get_image_features(pixel_values=views))
    assert_allclose(backbone.encode_images(views), expected, rtol=1e-4, atol=1e-5)
    sentences = ["a photo of a cat.", "dog"]
    tokens = tokenizer(sentences, padding="max_length", max_length=LENGTH, return_tensors="pt")[
        "input_ids"
    ]
    expected = features(model.get_text_features(input_ids=tokens))
    assert_allclose(backbone.encode_texts(sentences), expected, rtol=1e-4, atol=1e-5)
    assert len(backbone.encode_texts(["cat " * 20])) == 1  # truncated to the tower's length
    assert backbone.dim == expected.shape[1]
    assert backbone.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_an_index_loads_its_model_again_and_the_towers_can_be_trained(folder, tmp_path, caplog):
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for seed in range(3):
            photo(seed + 10 * (label == "dog")).save(tmp_path / "photos" / label / f"{seed}.png")
    with caplog.at_level(logging.WARNING):
        Classifier.from_folder(tmp_path / "photos", f"hf:{folder}", out=tmp_path / "i", fit="none")
    assert "encoded by torch" not in caplog.text  # OpenVINO runs its image tower
    clf = Classifier.load(tmp_path / "i")
    assert clf.predict(photo(11)).neighbours[0].affinity == pytest.approx(1, abs=1e-4)
    backbone, lazy = (load_backbone(f"hf:{folder}", device="cpu", lazy=True) for _ in range(2))
    assert (lazy._opened, lazy.identity, lazy.text_key) == (
        None,
        backbone.identity,
        backbone.text_key,
    )
    for one in (backbone, lazy):
        assert_array_equal(
            pickle.loads(pickle.dumps(one)).encode_texts(["a cat"]),
            backbone.encode_texts(["a cat"]),
        )


def test_a_model_without_two_towers_is_refused(tmp_path, folder):
    def changed(name, file, **values):
        place = tmp_path / name
        place.mkdir()
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        if file:
            content = json.loads((place / file).read_text())
            (place / file).write_text(json.dumps(content | values))
        return place

    with pytest.raises(BackboneError, match="'vit'"):
        load_backbone(f"hf:{changed('vit', 'config.json', model_type='vit')}", device="cpu")
    bare = changed("bare", None)
    (bare / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="Could not load hf:"):
        load_backbone(f"hf:{bare}", device="cpu")
    if json.loads((folder / "config.json").read_text())["model_type"] == "clip":
        place = changed("crop", "preprocessor_config.json", size={"shortest_edge": 40})
        with pytest.raises(BackboneError, match="unsupported image preprocessing"):
            load_backbone(f"hf:{place}", device="cpu")
    from safetensors.torch import load_file, save_file

    place = changed("less", None)
    state = load_file(place / "model.safetensors")
    save_file(dict(list(state.items())[1:]), place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="is missing in its weights"):
        load_backbone(f"hf:{place}", device="cpu")
    with pytest.raises(UsageError, match="omit @openai"):
        load_backbone(f"hf:{folder}@openai", device="cpu")


def test_errors_explain_how_to_name_a_model():
    with pytest.raises(UsageError, match="give hf:google/siglip-base-patch16-224"):
        load_backbone("google/siglip-base-patch16-224")
    with pytest.raises(UsageError, match="give timm:resnet50"):
        load_backbone("resnet50")
    assert catalogue.named("hf:org/name") == ("hf:org/name", None)
    with pytest.raises(BackboneError, match="hf:nobody/nothing: HF_HUB_OFFLINE is set"):
        load_backbone("hf:nobody/nothing", device="cpu")
