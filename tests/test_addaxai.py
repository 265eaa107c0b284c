"""An index exported to AddaxAI answers like this package, in a process that lacks it."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import addaxai_worker
import demo
import pytest
from conftest import LIT_MINI, SOAK, command_line, failed, json_rows, ok
from numpy.random import default_rng
from PIL import Image
from serving import caltech_photos
from tables import tiny

from retrieval_tip.levels import Levels
from retrieval_tip.plugins.addaxai import ranks

EXIF_ORIENTATION = 0x0112
SMALL, REAL = "4", "4000"
"""Temperatures of indexes of small encoders with random weights, and of real ones."""


@pytest.fixture(scope="module")
def boxes(shared, tmp_path_factory):
    """Twenty photos with thirty boxes: the folder, a file of boxes, and the boxes as AddaxAI passes them on.

    Two photos are rotated by their EXIF metadata, and one is grey.
    """
    folder = tmp_path_factory.mktemp("trap")
    random = default_rng(0)
    entries = []
    items = []
    for number, (path, _) in enumerate(caltech_photos(shared, "test", 10, 2)):
        image = Image.open(path).convert("RGB")
        exif = Image.Exif()
        if number in (3, 4):
            exif[EXIF_ORIENTATION] = 6
        if number == 5:
            image = image.convert("L")
        name = folder / f"{number:02}.png"
        image.save(name, exif=exif)
        detections = []
        for _ in range(1 + number % 2):
            left, top = random.uniform(0, 0.4, 2)
            width, height = random.uniform(0.3, 0.6, 2)
            box = [float(edge) for edge in (left, top, width, height)]
            detections.append({"category": "1", "conf": 0.9, "bbox": box})
            items.append({"image_path": str(name), "bbox": box})
        entries.append({"file": name.name, "detections": detections})
    file = folder / "boxes.json"
    document = {"detection_categories": {"1": "animal"}, "images": entries}
    file.write_text(json.dumps(document))
    assert len(items) == 30
    return folder, file, items


@pytest.fixture(scope="module")
def build_index(shared, tmp_path_factory):
    """Build a fitted index of ten classes. At its temperature, few probabilities are near 0, 0.1 or 1."""
    folder = tmp_path_factory.mktemp("indexes")

    def build(name, model, temperature):
        table = folder / f"{name}.csv"
        with table.open("w", newline="") as file:
            rows = caltech_photos(shared, "train", 10, 6)
            csv.writer(file).writerows([("path", "label"), *rows])
        ok("index build", table, "--out", folder / name, "--model", model)
        ok("index set", folder / name, "--temperature", temperature)
        return folder / name

    return build


@pytest.fixture(scope="module")
def animals(build_index, tmp_path_factory):
    """An index of a small encoder."""
    encoder = tiny(tmp_path_factory.mktemp("encoders") / "small")
    return build_index("animals", f"local-dir:{encoder}", SMALL)


@pytest.fixture(scope="module")
def model(animals):
    """The index as a model of AddaxAI."""
    folder = animals.with_name("model")
    ok("index export", animals, "--addaxai", folder)
    return folder


def expected(index, boxes):
    """Return the answers of this package in the form of AddaxAI's, with classes in the order of the index."""
    folder, file, _ = boxes
    command = ("classify", index, folder, "--boxes", file, "--categories", "animal")
    answers = []
    for row in json_rows(ok(*command, "--top", "10", "--format", "json")):
        pairs = zip(row["labels"], row["probabilities"], strict=True)
        answers.append({} if row["no_match"] else {name.lower(): p for name, p in pairs})
    return answers


def difference(answers, right):
    """Return the largest difference of a probability, which is 1 if one has a match and the other has none."""
    differences = [0.0]
    for answer, other in zip(map(dict, answers), right, strict=True):
        differences += [abs(answer.get(name, 0) - other.get(name, 0)) for name in answer | other]
        differences.append(float(answer.keys() != other.keys()))
    return max(differences)


@pytest.mark.parametrize("encoders", ["small", *(["joined", "lite0", "lit-mini"] if SOAK else [])])
def test_a_process_without_this_package_gives_the_same_answers(
    encoders, request, build_index, boxes, tmp_path
):
    temperature = REAL
    if encoders == "small":
        temperature = SMALL
        models = [f"local-dir:{tiny(tmp_path / str(seed), seed=seed)}" for seed in (0, 1)]
    else:
        file = request.getfixturevalue("demo_photos") / "efficientnet-lite0.pth"
        lite0 = f"{demo.LITE0}@{file}"
        models = {"joined": [lite0, LIT_MINI], "lite0": [lite0], "lit-mini": [LIT_MINI]}[encoders]
    index = build_index(encoders, "+".join(models), temperature)
    done = ok("index export", index, "--addaxai", tmp_path / "model")
    assert "10 photos answered alike within 0.0000" in done.stdout
    (tmp_path / "in.json").write_text(json.dumps(boxes[2]))
    worker = [sys.executable, "-I", addaxai_worker.__file__]
    files = [str(tmp_path / name) for name in ("model", "in.json", "out.json")]
    subprocess.run([*worker, *files], check=True, cwd=tmp_path)
    results = json.loads((tmp_path / "out.json").read_text())
    right = expected(index, boxes)
    assert any(right)
    for size in ("1", "4", "None"):
        assert difference(results[size], right) < 1e-4


def replaced(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


SABOTAGE = {
    "no rotation": ("image = ImageOps.exif_transpose(image)", "pass"),
    "another resampling": ('Image.Resampling[view["interpolation"].upper()]', "0"),
    "blue before red": ("pixels.transpose(2, 0, 1)", "pixels[..., ::-1].transpose(2, 0, 1)"),
}


def test_the_comparison_notices_sabotage(animals, model, boxes, tmp_path):
    right = expected(animals, boxes)
    assert {} in right  # no match
    assert difference(addaxai_worker.classified(model, boxes[2], 4), right) < 1e-4
    for old, new in SABOTAGE.values():
        folder = copied(model, tmp_path)
        replaced(folder / "inference.py", old, new)
        assert difference(addaxai_worker.classified(folder, boxes[2], 4), right) > 1e-4
    folder = copied(model, tmp_path)
    replaced(folder / "inference.py", "        return answers\n", "        return answers[1:]\n")
    with pytest.raises(AssertionError):
        addaxai_worker.classified(folder, boxes[2], 4)
    folder = copied(model, tmp_path)
    content = bytearray((folder / "model.pt").read_bytes())
    middle = slice(len(content) // 4, len(content) // 2)
    content[middle] = bytes(len(content[middle]))
    (folder / "model.pt").write_bytes(content)
    with pytest.raises(RuntimeError):
        addaxai_worker.opened(folder)


def copied(model, tmp_path):
    folder = tmp_path / str(len(list(tmp_path.iterdir()))) / model.name
    return Path(shutil.copytree(model, folder))


def test_a_second_export_replaces_the_first(animals, model, shared, tmp_path):
    index = tmp_path / "taught"
    ok("index clone", animals, index)
    folder = copied(model, tmp_path)
    photos = tmp_path / "new" / "Red Fox"
    photos.mkdir(parents=True)
    for path, _ in caltech_photos(shared, "train", 11, 4)[-4:]:
        shutil.copy(path, photos)
    ok("index add", index, photos.parent)
    table = tmp_path / "ranks.csv"
    table.write_text(
        "model_class,class,order,family,genus,species\n"
        "red fox,Mammalia,Carnivora,Canidae,Vulpes,Vulpes vulpes\n"
    )
    done = ok("index export", index, "--addaxai", folder, "--taxonomy", table, "--whole")
    assert "no class has ranks" not in done.stderr
    _, names = addaxai_worker.opened(folder)
    assert names[-1] == "red fox"
    rows = list(csv.reader((folder / "taxonomy.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0] == ["model_class", *ranks.RANKS]
    assert [row[0] for row in rows[1:]] == names
    assert rows[-1] == ["red fox", "mammalia", "carnivora", "canidae", "vulpes", "vulpes"]
    assert json.loads((folder / "manifest.json").read_text())["full_image_cls"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "inference.py",
        "manifest.json",
        "model.pt",
        "taxonomy.csv",
    ]


def test_what_cannot_be_exported_changes_nothing(animals, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"developer": "someone"}')
    export = ("index export", animals)
    failed(command_line(*export, "--addaxai", other), 1, "has the model of another program")
    assert [file.name for file in other.iterdir()] == ["manifest.json"]
    failed(command_line(*export, "--addaxai", tmp_path / "a b"), 2, "only accepts letters")
    failed(command_line(*export, "--taxonomy", "x.csv"), 2, "--taxonomy: only applies to --addaxai")
    int8 = command_line(*export, "--addaxai", tmp_path / "m", "--precision", "int8")
    failed(int8, 2, "--precision int8: only applies to --onnx")
    assert not (tmp_path / "m").exists()


def test_names_and_ranks_that_addaxai_treats_differently_are_named():
    labels = ranks.lower_case(["Empty", "Other", "Čáp", "deer", "Vulpes vulpes"])
    levels = Levels(
        ("species name", "Genus", "family"),
        {"Vulpes vulpes": ("Vulpes", "Canidae"), "deer": (None, "Cervidae")},
    )
    given = ranks.ranks_of(labels, None, levels)
    assert given == {
        "vulpes vulpes": ["", "", "canidae", "vulpes", ""],
        "deer": ["", "", "cervidae", "", ""],
    }
    said = "\n".join(ranks.cautions(labels, given))
    for words in ("deletes boxes of empty", "replaces other", "čáp on Windows", "2 classes have"):
        assert words in said
    assert "no class has ranks" in "\n".join(ranks.cautions(labels, {}))
