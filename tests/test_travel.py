"""Indexes travel between systems with their photos, and names that Windows lacks become names that every system has."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import LIT_MINI, failed, ok
from PIL import Image
from serving import InProcess, app_of, caltech_photos, labelling_app
from tables import tiny

from retrieval_tip import Index
from retrieval_tip.backbones.base import Identity
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.files import cache_folder
from retrieval_tip.index.places import at
from retrieval_tip.labelling.placing import MANIFEST
from retrieval_tip.store.labels import located, portable

TOKEN = "t"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
ALIKE = ["crab", "Crab", "CRAB", "cRab", "straße", "STRASSE", "É", "é"]
"""Names that are equal where case is ignored."""
RESERVED = [
    "con",
    "CON",
    "prn",
    "aux",
    "nul",
    "NUL.txt",
    "com1",
    "COM9.x.y",
    "lpt1",
    "com¹",
    "con .x",
]
RESERVED += ["CONIN$", "conout$", "aux.", "nul ", "LPT³"]
NAMES = [
    *ALIKE,
    *RESERVED,
    ".",
    "..",
    ".hidden",
    "x  y",
    "x.",
    "x ",
    " x",
    "x. .",
    "a:b",
    "a/b",
    "a\\b",
    "../up",
]
NAMES += [
    *'?*"|<>',
    "a\tb",
    "a\nb",
    "\x7f",
    "%",
    "%63on",
    "%43rab",
    "%63rab",
    "漢字",
    "🦀",
    "n\u0303",
    "ñ",
]
NAMES += [
    "no match",
    "No Match",
    "not sure",
    MANIFEST,
    "x" * 255,
    "X" * 255,
    "é" * 255,
    "tail.jpg",
    "C:",
]


def picture(number, size=48):
    """Return a picture as PNG. Each number has its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()


def files(folder):
    """Return the content of each file by its path in a folder."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def check_names(paths):
    """Check that Windows can have all these paths at once."""
    assert len({path.casefold() for path in paths}) == len(paths)
    for name in {name for path in paths for name in path.split("/")}:
        assert not PureWindowsPath(name).is_reserved()
        assert re.search(r'[\x00-\x1f:*?"<>|\\]|[. ]$', name) is None
        assert 0 < len(name.encode()) <= 255
    folders = {path.rpartition("/")[0] for path in paths}
    assert len({folder.casefold() for folder in folders}) == len(folders)


@pytest.fixture(scope="module")
def hostile(shared, tmp_path_factory):
    """An HNSW index of sixty classes below a folder outside of ASCII, and its photos by label and digest."""
    place = tmp_path_factory.mktemp("é漢字")
    labels = {}
    rows = [("path", "label")]
    for number, label in enumerate(NAMES + NAMES[:9]):
        again = number >= len(NAMES)  # names of photos that differ only in case
        path = place / "photos" / ("b" if again else "a") / f"x{number % len(NAMES)}.png"
        path = path.with_name(path.name.upper()) if again else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        labels[digest(picture(number))] = label
        rows.append((path, label))
    with (place / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    how = ["--model", LIT_MINI, "--template", "{}", "--fit", "none", "--index", "HNSW8"]
    ok("index build", place / "labels.csv", "--out", place / "index", *how)
    return place, labels


def check_sorted(out, labels):
    """Check that each photo is in the folder of its class, and return these folders by label."""
    there = files(out)
    del there[MANIFEST]
    check_names(there)
    assert {digest(data) for data in there.values()} == {*labels}
    folders = {}
    for path, data in there.items():
        assert (
            folders.setdefault(labels[digest(data)], path.partition("/")[0])
            == path.partition("/")[0]
        )
    assert len(set(folders.values())) == len(folders) == len({*labels.values()})
    return folders


def test_hostile_names_are_built_sorted_and_restored(hostile, tmp_path):
    assert len({*NAMES}) == len(NAMES) >= 60
    place, labels = hostile
    photos = Path(shutil.copytree(place / "photos", tmp_path / "photos"))
    before = files(photos)
    out = tmp_path / "sorted"
    ok("sort", place / "index", photos / "b", "--into", out, "--move")
    some = {own: label for own, label in labels.items() if label in NAMES[:9]}
    first = check_sorted(
        out, {own: some[own] for own in map(digest, files(place / "photos" / "b").values())}
    )
    ok("sort", place / "index", photos, "--into", out, "--move")
    folders = check_sorted(out, labels)
    assert first.items() <= folders.items()
    assert {label for label, name in folders.items() if label == name} > {"CRAB", "漢字", "🦀", "%"}
    assert not files(photos)
    ok("sort", "--undo", "--into", out)
    assert (files(photos), [*out.iterdir()]) == (before, [])


class Client(InProcess):
    """A client of a server or of a labelling session."""

    def __init__(self, app):
        self.app = app

    def post(self, path, **sent):
        answer = self.http.post(path, headers=AUTHORISED, **sent)
        assert answer.is_success, answer.text
        return answer.json()


def test_finish_sorts_hostile_names_and_restores_them(hostile, lit_mini, tmp_path):
    place, labels = hostile
    index = Path(shutil.copytree(place / "index", tmp_path / "index"))
    photos = Path(shutil.copytree(place / "photos", tmp_path / "photos"))
    before = files(photos)
    out = tmp_path / "finished"
    with Client(labelling_app(index, list(open_inputs([str(photos)])), Reader(lit_mini))) as client:
        asked = {"into": str(out), "action": "move"}
        assert client.post("/v1/label/sort", json=asked)["photos"] == len(labels)
        check_sorted(out, labels)
        assert client.post("/v1/label/sort", json=asked | {"undo": True})["skipped"] == []
    assert (files(photos), [*out.iterdir()]) == (before, [])


def test_teach_keeps_photos_of_hostile_classes_in_folders_that_every_system_has(own, tmp_path):
    names = [*ALIKE[:3], "con", "a:b", "x.", "é" * 255]
    with Client(app_of(own, token=TOKEN)) as client:
        for number, name in enumerate(names + names):  # each folder is found again
            sent = {
                "data": {"label": name},
                "files": {"images": ("x.png", picture(number), "image/png")},
            }
            client.post(f"/v1/indexes/{own.name}/keys", **sent)
        for name in ("con", "NUL.x"):
            answer = client.http.post(
                "/v1/indexes/own/duplicate", json={"name": name}, headers=AUTHORISED
            )
            assert (answer.status_code, "reserves" in answer.text) == (422, True)
    shots = files(tmp_path / "own-shots")
    check_names(shots)
    assert len(shots) == 2 * len(names)
    assert len({path.partition("/")[0] for path in shots}) == len(names)


WINDOWS, POSIX = (
    PureWindowsPath("C:\\me\\indexes\\things"),
    PurePosixPath("/home/me/indexes/things"),
)


@pytest.mark.parametrize(
    ("folder", "path", "stored"),
    [
        (WINDOWS, "C:/me/indexes/things-shots/é/1.png", "./../things-shots/é/1.png"),
        (WINDOWS, "c:/ME/photos/1.png", "./../../photos/1.png"),
        (WINDOWS, "C:/data/1.png", "./../../../data/1.png"),
        (WINDOWS, "D:/data/1.png", "D:/data/1.png"),
        (POSIX, "/home/me/photos/1.png", "./../../photos/1.png"),
        (POSIX, "/home/me/indexes-old/1.png", "./../../indexes-old/1.png"),
        (POSIX, "/data/1.png", "/data/1.png"),
        (POSIX, "photos/1.png", "photos/1.png"),
        (POSIX, "api:/home/me/1.png", "api:/home/me/1.png"),
        (POSIX, "./../photos/1.png", "../photos/1.png"),
        (POSIX, None, None),
    ],
)
def test_sources_are_stored_relative_to_the_index_and_read_on_the_other_system(
    folder, path, stored
):
    table = pa.table({"source": pa.chunked_array([[path, "x.png"]], pa.string())})
    kept = portable(table, folder)
    assert kept["source"].to_pylist() == [stored, "x.png"]
    here = located(kept, folder)["source"][0].as_py()
    assert here == path or here.casefold() in (path.casefold(), stored)
    other = (
        PurePosixPath("/mnt/a\\1/b/c/d") if folder is WINDOWS else PureWindowsPath("E:\\b\\c\\d")
    )
    there = located(kept, other)["source"][0].as_py()
    if stored is not None and stored.startswith("./"):
        top = other.parents[stored.count("../") - 1].as_posix().rstrip("/")
        assert there == f"{top}/{stored.rpartition('../')[2]}"
    else:
        assert there == stored


@pytest.fixture
def project(tmp_path):
    """A folder with photos, weights of an encoder, and an index that was built from their absolute paths."""
    place = tmp_path / "first" / "project"
    for number, part in enumerate(["photos/crab", "photos/ibis", "more/crab", "more/panda"]):
        (place / part).mkdir(parents=True)
        for photo in range(3):
            (place / part / f"{photo}.png").write_bytes(picture(10 * number + photo))
    (place / "models").mkdir()
    torch.manual_seed(0)
    tower = timm.create_model("test_resnet", num_classes=0)
    torch.save(tower.state_dict(), place / "models" / "w.pt")
    model = f"timm:test_resnet@{place / 'models' / 'w.pt'}"
    ok("index build", place / "photos", "--out", place / "indexes" / "things", "--model", model)
    return place


def stored_sources(index):
    """Return the sources in the file of the current version."""
    file = at(index).manifest().files["labels"].name
    return pq.read_table(index / file)["source"].to_pylist()


def test_an_index_that_moved_with_its_photos_and_encoder_is_used_and_changed(project, tmp_path):
    index = project / "indexes" / "things"
    assert stored_sources(index)[0] == "./../../photos/crab/0.png"
    before = ok("classify", index, project / "more", "--format", "json").stdout
    moved = tmp_path / "second" / "deeper" / "project"
    moved.parent.mkdir(parents=True)
    project.rename(moved)
    index = moved / "indexes" / "things"
    ok("index verify", index)
    after = ok("classify", index, moved / "more", "--format", "json").stdout
    assert after.replace(moved.as_posix(), project.as_posix()) == before
    ok("index add", index, moved / "more")
    assert stored_sources(index)[3:6] == [f"./../../more/crab/{photo}.png" for photo in range(3)]
    copy = tmp_path / "copy"
    ok("index clone", index, copy)
    assert stored_sources(copy)[3] == "./../second/deeper/project/more/crab/0.png"
    ok("index rollback", index)
    ok("index verify", index)
    here = [(moved / "photos" / "crab" / f"{photo}.png").as_posix() for photo in range(3)]
    for place, expected in ((index, here), (copy, here)):
        assert Index.load(place).labels["source"].to_pylist()[:3] == expected
        with Client(app_of(place)) as client:
            shown = client.http.get(f"/v1/indexes/{place.name}/keys/0/image")
            assert shown.status_code == 200


def test_an_encoder_is_found_by_name_next_to_the_index_or_in_the_cache_and_checked(project, run):
    index = project / "indexes" / "things"
    photo = project / "more" / "crab" / "0.png"
    weights = project / "models" / "w.pt"
    before = ok("classify", index, photo).stdout
    cache = cache_folder()
    for place in (project / "indexes", cache):
        kept = place / "w.pt"
        weights.rename(kept)
        weights.parent.rmdir()
        assert ok("classify", index, photo, "--no-cache").stdout == before
        weights.parent.mkdir()
        kept.rename(weights)
    weights.rename(project / "w")
    advice = (
        f"copy it next to the index, or into {cache.as_posix()}, or name the encoder with --model"
    )
    failed(
        run("classify", index, photo),
        2,
        f"{weights.as_posix()}: this file of the encoder is not",
        advice,
    )
    torch.manual_seed(1)
    tower = timm.create_model("test_resnet", num_classes=0)
    torch.save(tower.state_dict(), project / "indexes" / "w.pt")
    failed(run("classify", index, photo), 1, "cannot be compared")


def test_an_encoder_of_the_other_system_is_found_at_the_same_relative_place(tmp_path):
    (tmp_path / "models" / "w").mkdir(parents=True)
    (tmp_path / "w").mkdir()
    for model in ("C:\\me\\models\\w", "//server/me/models/w", "/home/me/models/w"):
        lost = Identity(f"local-dir:{model}", None, "", "", {"size": 1})
        found = lost.located([tmp_path / "indexes", tmp_path])
        assert found.model == f"local-dir:{(tmp_path / 'models' / 'w').as_posix()}"
        assert (lost.missing, found.missing) == (model, None)
        assert lost.located([tmp_path / "w"]) == lost
    assert Identity("hf-hub:me/models", "openai", "", "", {}).missing is None


def test_an_index_that_leaves_its_photos_behind_still_finds_them(tmp_path, shared):
    photos = [path for path, _ in caltech_photos(shared, "train", 2, 2)]
    place = tmp_path / "home/photos"
    for number, path in enumerate(photos):
        (place / str(number % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / str(number % 2) / f"{number}.jpg")
    model = f"local-dir:{tiny(tmp_path / 'model')}"
    ok("index build", place, "--out", tmp_path / "home/indexes/i", "--model", model)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "home/indexes/i").rename(tmp_path / "far/away/i")
    sources = Index.load(tmp_path / "far/away/i").labels["source"].to_pylist()
    assert len(sources) == 4
    assert all(Path(source).is_file() for source in sources)
    shutil.copytree(place.parent, tmp_path / "copy")
    shutil.move(tmp_path / "far/away/i", tmp_path / "copy/indexes/i")
    sources = Index.load(tmp_path / "copy/indexes/i").labels["source"].to_pylist()
    photos = f"{(tmp_path / 'copy' / 'photos').as_posix()}/"
    assert all(source.startswith(photos) for source in sources)
