"""Files of photos: packages open them by suffix, and their photos work wherever photos can be named."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import command_line, failed, json_rows, ok
from fastapi.testclient import TestClient
from numpy.testing import assert_array_equal
from PIL import Image
from serving import app_of, caltech_photos, labelling_app
from tables import tiny
from test_plugins import on_path

from retrieval_tip import Classifier, Index, Reader, hooks, load_backbone
from retrieval_tip.data.sources import open_inputs, read_item
from retrieval_tip.errors import InputError

STACKS = """
import io
import numpy as np
from PIL import Image

def items(file):
    with np.load(file) as arrays:
        for name in arrays.files:
            if name == "lost":
                raise ValueError("the rest is lost")
            yield name

def read(file, name):
    with np.load(file) as arrays:
        buffer = io.BytesIO()
        Image.fromarray(arrays[name]).save(buffer, "PNG")
    return buffer.getvalue()
"""


@pytest.fixture
def stacks(tmp_path, monkeypatch):
    """Install a package that opens files called ``.npz``, and return the folder with its description."""
    info = tmp_path / "site" / "stacks-0.1.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "stacks.py").write_text(STACKS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stacks\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[retrieval_tip.openers]\n.npz = stacks\n")
    with pytest.MonkeyPatch.context() as patch:
        on_path(tmp_path / "site", patch)
        yield patch


@pytest.fixture
def folder(shared, tmp_path, stacks):
    """Class folders of three photos: one is a file, and two are in a file of photos."""
    for path, label in caltech_photos(shared, "train", 2, 3):
        place = tmp_path / "photos" / label
        place.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB").resize((60, 60))
        number = sum(1 for _ in place.iterdir())
        if number < 2:
            image.save(place / f"{number}.png")
        else:
            frames = {name: np.asarray(Image.open(place / f"{name}.png")) for name in "01"}
            np.savez(place / "clip.npz", **(frames | {"2": np.asarray(image)}))
            (place / "1.png").unlink()
            (place / "0.png").rename(place / "a.png")
    return tmp_path / "photos"


@pytest.fixture
def index(folder, tmp_path):
    tiny(tmp_path / "model")
    ok("index build", folder, "--model", f"local-dir:{tmp_path / 'model'}", "--out", tmp_path / "i")
    return tmp_path / "i"


def names_in(*places):
    return [path for source in open_inputs(map(str, places)) for path in source.paths]


def test_photos_of_a_file_work_wherever_photos_can_be_named(index, folder, tmp_path):
    model = ("--model", f"local-dir:{tmp_path / 'model'}")
    first, second = sorted(folder.iterdir())
    clips = [first / "clip.npz", second / "clip.npz"]
    items = [f"{clip}#{name}" for clip in clips for name in "012"]
    loaded = Index.load(index)
    shots = dict(zip(*loaded.labels.select(["source", "label"]).to_pydict().values(), strict=True))
    assert [shots[item] for item in items] == [first.name] * 3 + [second.name] * 3
    assert names_in(clips[0]) == names_in(f"{first}/*.npz") == items[:3]
    assert names_in(first, items[4]) == [str(first / "a.png"), *items[:3], items[4]]
    for given in (clips[0], first, f"{first}/cl*"):
        answers = json_rows(ok("classify", index, given, "--format", "json"))
        assert [row["input"] for row in answers[-3:]] == items[:3]
    table = tmp_path / "table.csv"
    table.write_text(f"path,label\n{items[0]},x\n{items[5]},y\n")
    ok("index build", table, *model, "--out", tmp_path / "two")
    assert Index.load(tmp_path / "two").class_names == ["x", "y"]
    ok(
        "encode",
        clips[0],
        "--model",
        f"local-dir:{tmp_path / 'model'}",
        "--out",
        tmp_path / "t.parquet",
    )
    failed(
        command_line("index build", clips[0], *model, "--out", tmp_path / "n"),
        1,
        "expected class folders",
    )
    other = tmp_path / "more" / first.name
    other.mkdir(parents=True)
    np.savez(other / "new.npz", x=np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8))
    ok("index add", index, tmp_path / "more")
    assert str(other / "new.npz#x") in Index.load(index).labels["source"].to_pylist()
    ok("index audit", index)
    found = json_rows(ok("find", folder, items[0], "--index", index, "-n", "9", "--format", "json"))
    assert items[0] not in [row["input"] for row in found]
    classifier = Classifier.load(index)
    assert len(classifier.predict(clips[0])) == 3
    assert classifier.predict(items[0]).label in loaded.class_names
    with pytest.raises(InputError, match=r"contains several photos; name one, such as .*#0"):
        classifier.predict([clips[0]])
    assert len(classifier.add(clips[1], "third").key_ids) == 3


def test_a_damaged_file_is_skipped_like_a_broken_photo(index, folder, tmp_path, stacks):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    whole = next(folder.rglob("clip.npz"))
    good = dict(np.load(whole))
    for name, arrays in (("good", good), ("empty", {}), ("cut", good | {"lost": good["0"]})):
        np.savez(inbox / f"{name}.npz", **arrays)
    np.savez(inbox / "odd.npz", text=np.array("no pixels"), fine=good["1"])
    (inbox / "junk.npz").write_bytes(b"junk")
    (inbox / "photo.png").write_bytes(next(folder.rglob("a.png")).read_bytes())
    done = command_line("classify", index, inbox, "--format", "json")
    rows = [Path(row["input"]).name for row in json_rows(done, 3)]
    clips = [f"{name}.npz#{number}" for name in ("cut", "good") for number in range(3)]
    assert rows == [*clips, "odd.npz#fine", "photo.png"]
    for file, reason in (
        ("cut.npz", "cannot be read: the rest is lost"),
        ("empty.npz", "contains no photos"),
        ("junk.npz", "cannot be read: "),
        ("odd.npz#text", "cannot be read: "),
    ):
        assert f"skipped {inbox / file}: {reason}" in done.stderr
        failed(
            command_line("classify", index, inbox / file),
            *((3, reason) if file == "cut.npz" else (1, reason)),
        )
    failed(command_line("classify", index, inbox, "--strict"), 1, "cut.npz: cannot be read")
    os.mkfifo(inbox / "pipe.npz")
    failed(command_line("classify", index, inbox / "pipe.npz"), 1, "pipe.npz: not a file")
    failed(command_line("classify", index, inbox / "gone.npz#1"), 1, "gone.npz#1: no such file")


def test_a_package_that_cannot_be_imported_ends_no_run(index, folder, tmp_path, stacks):
    info = tmp_path / "site" / "bad-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[retrieval_tip.openers]\n.bad = no_such_module\n")
    on_path(tmp_path / "site", stacks)
    (folder / "x.bad").write_bytes(b"x")
    done = command_line("classify", index, folder, "--format", "json")
    assert len(json_rows(done, 3)) == 8
    assert "x.bad: opener .bad (of bad 0.1): cannot be imported" in done.stderr
    assert "opener .bad (of bad 0.1): cannot be imported" in command_line("doctor").output


def test_an_existing_file_is_no_item(index, folder, tmp_path):
    clip = next(folder.rglob("clip.npz"))
    own = clip.with_name("clip.npz#0")
    own.write_bytes(next(folder.rglob("a.png")).read_bytes())
    assert read_item(own) == own.read_bytes()
    with np.load(clip) as arrays:
        assert_array_equal(Image.open(io.BytesIO(read_item(f"{clip}#1"))), arrays["1"])


def test_a_file_of_photos_is_sorted_once_and_restored(index, folder, tmp_path):
    """It goes where the photo goes that matches a class with the highest probability."""
    second = max(folder.iterdir())
    clip = tmp_path / "inbox" / "mixed.npz"
    clip.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    shot = np.load(second / "clip.npz")["1"]
    np.savez(clip, noise=noise, shot=shot, lost=noise)
    data = clip.read_bytes()
    for action in ("copy", "link", "move"):
        out = tmp_path / action
        options = ["--into", out, *([] if action == "copy" else [f"--{action}"])]
        rows = list(
            csv.DictReader(
                ok_or_3("sort", index, clip.parent, *options, "--dry-run").stdout.splitlines()
            )
        )
        assert [(row["input"], row["output"]) for row in rows] == [
            (str(clip), f"{second.name}/mixed.npz")
        ]
        assert "1 photo" in ok_or_3("sort", index, clip.parent, *options).output
        placed = out / second.name / "mixed.npz"
        assert placed.read_bytes() == data
        assert placed.is_symlink() == (action == "link")
        assert clip.exists() == (action != "move")
        ok("sort", "--undo", "--into", out)
        assert clip.read_bytes() == data
        assert not out.exists() or not any(out.iterdir())


def ok_or_3(*arguments):
    done = command_line(*arguments)
    assert done.exit_code == 3, done.output  # one photo is lost
    return done


def test_the_page_shows_and_labels_photos_of_a_file(index, folder, tmp_path):
    clip = next(folder.rglob("clip.npz"))
    key = Index.load(index).labels["source"].to_pylist().index(f"{clip}#1")
    with TestClient(app_of(index)) as client:
        shown = client.get(f"/v1/indexes/i/keys/{key}/image")
        assert Image.open(io.BytesIO(shown.content)).size == (60, 60)
    backbone = load_backbone(f"local-dir:{tmp_path / 'model'}", device="cpu")
    app = labelling_app(tmp_path / "new", list(open_inputs([str(folder)])), Reader(backbone))
    with TestClient(app, headers={"Authorization": "Bearer t"}) as client:
        while (state := client.get("/v1/label").json())["busy"]:
            pass
        (photo, *_) = [one for one in state["queue"] if "#" in one["name"]]
        for what in ("image", "file"):
            done = client.get(f"/v1/label/photos/{photo['photo']}/{what}")
            assert Image.open(io.BytesIO(done.content)).size == (60, 60)
        client.post("/v1/label", json={"labels": [{"photo": photo["photo"], "label": "x"}]})
    assert Index.load(tmp_path / "new").labels["source"].to_pylist() == [photo["name"]]


def test_all_labels_of_a_file_are_in_one_sidecar(index, folder, tmp_path):
    clip = next(folder.rglob("clip.npz"))
    ok("classify", index, clip, "--format", "xmp")
    (sidecar,) = clip.parent.glob("*.xmp")
    assert sidecar.name == "clip.npz.xmp"
    assert clip.parent.name in sidecar.read_text()
    ok("classify", index, clip, "--format", "xmp", "--undo")
    assert not list(clip.parent.glob("*.xmp"))


ASKED = """
import json, sys
asked = []
sys.addaudithook(lambda event, what: event == "open" and "stacks-0.1" in str(what[0]) and asked.append(what[0]))
from retrieval_tip.data.sources import open_inputs, read_item
for given in sys.argv[1:]:
    for source in open_inputs([given]):
        for path in source.paths:
            read_item(path)
    print(len([name for name in asked if str(name).endswith("entry_points.txt")]))
"""


def test_packages_are_asked_once_and_only_about_suffixes_that_are_not_ours(folder, tmp_path):
    (plain := tmp_path / "plain").mkdir()
    (plain / "a #1.png").write_bytes(next(folder.rglob("a.png")).read_bytes())
    for name in ("notes", "table.csv", "labels.json"):
        (plain / name).write_text("")
    command = [sys.executable, "-c", ASKED, plain, *[folder] * 2]
    asked = subprocess.check_output(command, text=True).split()
    assert asked == ["0", "1", "1"]


def test_the_summary_of_other_files_says_how_to_read_them(index, folder, monkeypatch, stacks):
    """As if our own opener of ``.mp4`` needed a package that is not installed."""
    monkeypatch.setitem(hooks.TABLE["openers"], ".mp4", "no.such:opener")
    monkeypatch.setitem(hooks.EXTRAS, "heic", ("no_such_module", (".mp4",)))
    (next(folder.iterdir()) / "clip.mp4").write_bytes(b"x")
    hint = "; to read .mp4, run "
    for command in ("classify", "index add"):
        done = ok(command, index, folder)
        assert "ignored files that are not images" in done.stderr
        assert hint in done.stderr
    stacks.undo()
    done = ok("classify", index, folder)
    assert hint in done.stderr
    assert "npz" not in done.output
