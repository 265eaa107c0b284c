"""Every path of every command is checked before an encoder is loaded or downloaded.

No encoder can be loaded here: the default is not on this machine, and the folder of the other one is gone.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import time
import urllib.request

import pytest
from conftest import COMMANDS, LIT_MINI, ok
from PIL import Image
from serving import caltech_photos, server

from retrieval_tip import Classifier
from retrieval_tip.errors import BackboneError, InputError


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """A folder with photos, an index of them whose encoder is gone, and inputs without readable photos."""
    folder = tmp_path_factory.mktemp("paths")
    shutil.copytree(shared / "models" / "lit-mini", folder / "encoder")
    for number, (path, label) in enumerate(caltech_photos(shared, "train", 2, 4)):
        (folder / "photos" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "photos" / label / f"{number}.jpg")
    ok(
        "index build",
        folder / "photos",
        "--out",
        folder / "ix",
        "--model",
        f"local-dir:{folder}/encoder",
    )
    shutil.copytree(folder / "ix", folder / "ix2")
    shutil.rmtree(folder / "encoder")
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("no photo")
    Image.new("RGB", (32, 32), "red").save(folder / "other.png")
    with (folder / "rooted.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), ("gone/1.jpg", "a"), ("gone/2.jpg", "b")])
    (folder / "unlabelled.csv").write_text("path\ngone/1.jpg\ngone/2.jpg\n")
    return folder


LINES = {
    "label": [
        "gone --out new",
        "gone.jpg also-gone.jpg --out new",
        "empty --out new",
        "texts --out new",
        "unlabelled.csv --out new",
        "gone/*.jpg --out new",
        "gone --out ix",
        "- --out new",
    ],
    "suggest": [
        "gone",
        "gone --index ix",
        "photos --index gone",
        "unlabelled.csv",
        "-",
        "photos --out gone/new.csv",
    ],
    "find": [
        "gone other.png",
        "gone flower",
        "photos gone.jpg",
        "photos flower --index gone",
        "gone other.png --index ix",
        "gone --duplicates",
        "- flower",
        "- other.png",
        "- --duplicates",
        "photos flower --out gone/new.csv",
    ],
    "sort": [
        "ix gone --into out",
        "gone photos --into out",
        "--undo --into gone",
        "ix unlabelled.csv --into out",
    ],
    "classify": [
        "ix gone",
        "ix gone.jpg also-gone.jpg",
        "gone photos",
        "ix photos --boxes gone.json",
        "ix empty",
        "ix unlabelled.csv",
        "ix photos --out gone/new.csv",
        "ix photos --format camtrap-dp --timezone UTC --out out --deployments gone.csv",
    ],
    "evaluate": ["ix gone", "gone photos", "ix rooted.csv", "ix rooted.csv --root gone"],
    "compare": ["ix ix2 gone", "ix gone photos", "gone ix photos", "ix ix2 rooted.csv"],
    "models": [
        "--try gone",
        "--try rooted.csv --model ViT-B-32",
        "--int8 gone --model ViT-B-32",
        "--int8 unlabelled.csv --model ViT-B-32",
    ],
    "encode": [
        "gone --out new.parquet",
        "rooted.csv --out new.parquet",
        "gone --out new --ray local",
        "rooted.csv --out new --ray local",
        "photos --out gone/new.parquet",
    ],
    "serve": ["gone --port 0", "ix gone --port 0", "gone --model ViT-B-32 --port 0"],
    "fit": [
        "gone",
        "ix --val gone",
        "ix --val rooted.csv",
        "ix --calibrate --val gone",
        "ix --prior gone",
    ],
    "search-hp": ["gone", "ix --val gone", "ix --val rooted.csv"],
    "finetune": [
        "gone --out new",
        "ix --out new --source gone",
        "ix --out new --val gone",
        "ix --out new --val rooted.csv",
        "ix --out new --source rooted.csv",
    ],
    "index build": [
        "gone --out new",
        "rooted.csv --out new",
        "photos --out new --text gone.parquet",
        "photos --out new --groups gone.csv",
        "photos --out new --prior gone",
        "empty --out new",
        "rooted.csv --out new --root gone",
    ],
    "index add": ["gone photos", "ix gone", "ix rooted.csv", "ix photos --text gone.parquet"],
    "index merge": ["gone ix", "ix gone"],
    "index rename": ["gone a b --encode"],
    "index set": ["gone --template x", "ix --template {} --groups gone.csv"],
    "index audit": ["gone", "ix --apply gone.csv"],
    "index export": ["gone --out new.parquet", "gone --onnx new.onnx"],
    "index query": ["gone 'SELECT 1'"],
    "index clone": ["gone new"],
    "index gc": ["gone"],
    "index history": ["gone"],
    "index info": ["gone"],
    "index list": ["gone"],
    "index relabel": ["gone a --key-ids 1"],
    "index remove": ["gone --key-ids 1"],
    "index rollback": ["gone"],
    "index verify": ["gone"],
    "cache": [],
    "doctor": [],
}


@pytest.mark.parametrize(
    "line", [f"{name} {more}" for name, several in LINES.items() for more in several]
)
def test_a_wrong_path_is_named_before_an_encoder_is_loaded(folder, run, monkeypatch, line):
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run(*shlex.split(line))
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("Error: ")]
    assert done.exit_code == 1, done.output
    assert re.search("gone|empty|texts|standard input", said), said
    assert not re.search("ViT-B-32|encoder", done.output), done.output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_every_command_is_tried():
    assert {*LINES} == {" ".join(words) for words in COMMANDS}


def test_python_names_a_wrong_path_before_it_loads_an_encoder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for photos, options in (
        ("gone", {}),
        ("rooted.csv", {}),
        ("photos", {"text": "gone.parquet"}),
        ("photos", {"groups": "gone.csv"}),
        ("photos", {"prior": ["gone"]}),
        ("photos", {"prior": "gone"}),
    ):
        with pytest.raises(InputError, match=r"gone.*no such file or folder"):
            Classifier.from_folder(photos, **options)
    with pytest.raises(BackboneError, match="ViT-B-32"):  # otherwise, this test proves nothing
        Classifier.from_folder("photos")


def test_a_session_whose_photos_are_all_damaged_says_so(shared, tmp_path, warm_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    given = (tmp_path / "photos", "--out", tmp_path / "ix", "--model", LIT_MINI)
    with server(*given, path=warm_path, command="label") as (url, _):
        address, _, token = url.partition("/#token=")
        sent = urllib.request.Request(
            f"{address}/v1/label", headers={"Authorization": f"Bearer {token}"}
        )
        for _ in range(600):
            with urllib.request.urlopen(sent) as answer:
                if problem := json.load(answer)["problem"]:
                    break
            time.sleep(0.05)
        assert problem == "none of the photos can be read"
