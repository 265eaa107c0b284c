"""Names of backbones: spellings, recommendations and the list."""

import http.server
import json
import logging
import re
import socket
import threading
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from conftest import failed
from PIL import Image

from retrieval_tip.backbones import catalogue
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.errors import BackboneError, UsageError


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Let the hub's library send requests, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("spelling", "name", "tag"),
    [
        ("ViT-B/32", "ViT-B-32", None),
        ("vit-b-32", "ViT-B-32", None),
        ("rn50", "RN50", None),
        ("ViT-L/14@336px", "ViT-L-14-336", None),
        ("clip", "ViT-B-32", None),
        ("RemoteCLIP", "ViT-B-32", "RemoteCLIP-ViT-B-32.pt"),
        ("timm/vit_small_patch14_dinov2.lvd142m", "timm:vit_small_patch14_dinov2.lvd142m", None),
        ("local-dir:Some/Folder", "local-dir:Some/Folder", None),
        ("nobody-knows", "nobody-knows", None),
    ],
)
def test_common_spellings_of_a_model_are_understood(spelling, name, tag):
    assert catalogue.named(spelling) == (name, tag)
    assert catalogue.named(spelling, "file.pt") == (name, "file.pt")


def test_every_short_name_can_be_loaded():
    for name in catalogue.SHORT.values():
        if name.startswith("timm:"):
            assert name.removeprefix("timm:") in timm.list_pretrained()
        else:
            assert open_clip.list_pretrained_tags_by_model(catalogue.architecture(name))


def test_every_architecture_with_weights_has_a_recommended_tag():
    for model in open_clip.list_models():
        tags = open_clip.list_pretrained_tags_by_model(model)
        assert (catalogue.recommended(model) in tags) == bool(tags)
    assert catalogue.recommended("ViT-B-32") == "datacomp_xl_s13b_b90k"
    assert catalogue.recommended("RN50") == "openai"


def test_search_finds_models_by_a_part_of_their_name(online, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    found = {model.model: model for model in catalogue.search("vit-b-32")}
    assert asked == []  # a search needs no network
    assert "ViT-B-32" in found
    assert "xlm-roberta-base-ViT-B-32" in found
    model = found["ViT-B-32"]
    assert model.weights[0] == "datacomp_xl_s13b_b90k"
    assert set(model.weights) == set(open_clip.list_pretrained_tags_by_model("ViT-B-32"))
    with torch.device("meta"):
        made = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
    parameters = sum(parameter.numel() for parameter in made.parameters())
    assert model.bytes == 4 * parameters
    assert all(model.model.startswith("timm:") for model in catalogue.search("timm:vit_small_plus"))
    with pytest.raises(UsageError, match=r"'RN5O'.*RN50"):
        catalogue.search("RN5O")


def test_the_command_models_lists_short_names(run):
    few = [json.loads(line) for line in run("models --format json").stdout.splitlines()]
    assert {row["model"] for row in few} == set(catalogue.SHORT.values())
    assert next(row for row in few if row["model"].startswith("timm:"))["words"] is False
    table = run("models dinov2").stdout
    assert "timm:vit_small_patch14_dinov2.lvd142m" in table
    failed(run("models RN5O"), 2, "RN50")


def test_the_size_is_printed_before_weights_are_downloaded(online, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "retrieval_tip")
    files = [
        SimpleNamespace(rfilename=name, size=size)
        for name, size in (("a", 1), (catalogue.WEIGHTS[0], 605 * 10**6))
    ]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files)
    )
    catalogue.ask_hub("some/model")
    assert "605 MB" in caplog.text
    assert "some/model" in caplog.text


@pytest.mark.parametrize("mute", [False, True])
def test_an_unresponsive_hub_is_asked_once(mute, online, monkeypatch):
    asked = []
    over = threading.Event()

    class Hub(http.server.BaseHTTPRequestHandler):
        """A hub that closes connections, or keeps them open, without an answer."""

        def do_GET(self):
            if "/some/" in self.path:  # the hub's library sends other requests too
                asked.append(self.path)
            if mute:
                over.wait(20)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{host}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        for model in ("hf:some/clip", "hf-hub:some/model"):
            del asked[:]
            with pytest.raises(BackboneError, match=f"{model}.*{host}"):
                load_backbone(model, device="cpu")
            assert len(asked) == 1
        weights = online / "models--some--model/snapshots/abc/of-another-name.bin"
        weights.parent.mkdir(parents=True)
        weights.touch()
        catalogue.ask_hub("some/model")  # the weights are in the cache
        assert len(asked) == 1
        over.set()
        server.shutdown()


def test_without_a_network_the_error_names_models_that_work_offline(
    run, online, tmp_path, monkeypatch
):
    """The options in the error load a model."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (20, 20), (99 * i, 50, 200 if name == "cat" else 0)).save(
                tmp_path / f"photos/{name}/{i}.png"
            )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "DEMO", catalogue.DEMO[:2])  # independent of the demo's files
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), "efficientnet-lite0.pth")
    command = ("index", "build", "photos", "--out", "index")
    with socket.socket() as port:  # bound, but not listening
        port.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port.getsockname()[1]}"
        )
        done = run(*command)
    failed(done, 1, "ViT-B-32 (605 MB)", "--model ViT-B-32@datacomp_xl_s13b_b90k=FILE")
    offline = re.search(r"or --model (\S+) \(on this machine\)", done.stderr)
    assert load_backbone(offline[1], device="cpu").dim == 1280
    cached = online / "models--timm--tf_efficientnet_lite0.in1k"
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "snapshots/abc/model.safetensors").touch()
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    assert "or --model timm:tf_efficientnet_lite0.in1k (on this machine)" in run(*command).stderr
    repository = open_clip.get_pretrained_cfg("RN50", "openai")["hf_hub"].rpartition("/")[0]
    for name in (repository, "timm/resnet18.a1_in1k", "some/other"):
        folder = online / f"models--{name.replace('/', '--')}/snapshots/abc"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    assert list(catalogue.cached()) == [
        "timm:tf_efficientnet_lite0.in1k",
        "RN50@openai",
        "timm:resnet18.a1_in1k",
        "timm:tf_efficientnet_lite0@efficientnet-lite0.pth",
    ]
