"""The demo uses the best photos and encoder it can download, reports which, and works without a network."""

import http.server
import re
import shlex
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, ok
from loopback import answering
from PIL import Image

from retrieval_tip import open_source

sys.path.insert(0, str(ROOT / "benchmarks"))
import demo


def test_the_demo_does_not_wait_for_unresponsive_servers():
    class Files(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path == "/there" else 404)
            self.end_headers()

    with answering(Files) as url:
        assert demo.answers(f"{url}/there")
        assert not demo.answers(f"{url}/gone")
    assert not demo.answers(f"{url}/there")
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts connections, but never answers
        assert not demo.answers(f"http://127.0.0.1:{mute.getsockname()[1]}/", seconds=0.3)


def make_photos(folder, classes=3, number=8):
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for i in range(number):
            colour = [40 * i, 40 * i, 40 * i]
            colour[label] = 255
            Image.new("RGB", (40, 30), tuple(colour)).save(folder / f"class {label}/{i}.png")
    return folder


def test_your_own_photos_are_all_used_with_the_same_split_each_time(tmp_path):
    folder = make_photos(tmp_path / "own")
    (folder / "class 0/deeper").mkdir()
    (folder / "class 0/0.png").rename(folder / "class 0/deeper/0.png")
    drawn = []
    for _ in range(2):
        demo.lay_out(tmp_path / "work", "auto", folder, "some-model")
        drawn.append([open_source(tmp_path / "work" / table) for table in demo.OWN])
    shots, new = drawn[0]
    assert [source.items for source in drawn[1]] == [shots.items, new.items]
    assert Counter(shots.labels) == {f"class {i}": 6 for i in range(3)}
    assert Counter(new.labels) == {f"class {i}": 2 for i in range(3)}
    assert {Path(path) for path in shots.paths + new.paths} == set(folder.rglob("*.png"))
    with pytest.raises(SystemExit, match="no class has two"):
        demo.lay_out(
            tmp_path / "work", "auto", make_photos(tmp_path / "few", number=1), "some-model"
        )


def test_a_class_with_too_few_photos_is_left_out_of_the_demo(tmp_path):
    make_photos(tmp_path / "many", 1, demo.FEWEST)
    make_photos(tmp_path / "few", 1, demo.FEWEST - 1)
    demo.split(tmp_path, {name: [*(tmp_path / name).rglob("*.png")] for name in ("many", "few")})
    for folder in demo.LAID_OUT:
        photos = open_source(tmp_path / folder)
        assert (photos.class_names, len(photos)) == (("many",), demo.FEWEST // 2)


def test_the_demo_never_replaces_foreign_photos(tmp_path):
    make_photos(tmp_path / "work/photos")
    (tmp_path / "work/photos.csv").write_text("mine")
    with pytest.raises(SystemExit, match="not from a demo"):
        demo.split(tmp_path / "work", {})
    with pytest.raises(SystemExit, match="not from a demo"):
        demo.lay_out(tmp_path / "work", "auto", make_photos(tmp_path / "own"), "some-model")
    assert len(list((tmp_path / "work/photos").glob("*/*"))) == 24
    assert (tmp_path / "work/photos.csv").read_text() == "mine"


RESULT = r"of 6 new photos, (\d) right, (\d) wrong, (\d) set aside"


def test_the_demo_and_its_next_commands_run_on_your_own_photos(tmp_path, monkeypatch):
    import timm

    torch.manual_seed(0)
    torch.save(
        timm.create_model(demo.LITE0.partition(":")[2]).state_dict(), tmp_path / "weights.pth"
    )
    make_photos(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")  # no environment is active
    monkeypatch.setenv("MAKELEVEL", "1")
    options = ["--work", "work", "--out", "indexes/demo", "--photos", "own"]
    options += ["--model", f"{demo.LITE0}@weights.pth"]
    taught = tmp_path / "indexes/demo/taught"
    taught.parent.mkdir(parents=True)
    taught.touch()
    done = CliRunner().invoke(demo.main, options)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(demo.ABOUT)
    assert "18 shots, 3 classes" in done.stdout
    assert "version 2, added 6 shots" in done.stdout
    right, wrong, aside = map(int, re.search(RESULT, done.stdout).groups())
    assert right + wrong + aside == 6
    [accuracy] = re.findall(r"^accuracy +([\d.]+) % of 6 photos", done.stdout, re.MULTILINE)
    assert right <= round(6 * float(accuracy) / 100) <= right + aside
    explained = re.findall(r"This photo is labelled (.*), and the shots", done.stdout)
    assert len(explained) == done.stdout.count("affinity") == min(1, wrong)
    assert taught.exists()
    shown = [
        line.strip()
        for line in done.stdout.partition("Next:\n")[2].splitlines()
        if line.startswith("    ")
    ]
    program = Path(sys.executable).with_name("retrieval-tip")
    own = ("serve indexes/demo-2", "index audit indexes/demo-2", "models")
    assert shown == [*(f"{program} {command}" for command in own), "make demo PHOTOS=FOLDER"]
    for command in (f"{shown[0]} --help", shown[1]):
        ok(*shlex.split(command)[1:])


def test_the_installer_prints_progress_and_failures(tmp_path):
    wheel = tmp_path / "nothing-1.0-py3-none-any.whl"
    facts = {
        "METADATA": "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0\n",
        "RECORD": "",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in facts.items():
            archive.writestr(f"nothing-1.0.dist-info/{name}", text)
    command = [sys.executable, ROOT / ".ci/install.py", "--no-index", "--find-links", tmp_path]
    command += ["--target", tmp_path / "t"]
    done = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"pip: 1 installed in \d+ s", done.stdout.splitlines()[-1])
    wrong = subprocess.run(
        [*command, "never-heard-of"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert "No matching distribution found for never-heard-of" in wrong.stderr
