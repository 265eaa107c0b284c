"""Results in the formats of programs for camera traps, as their own validators read them."""

import copy
import csv
import json
import os
import re
import subprocess
from datetime import datetime, timedelta
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
from cameras import encoded, gps_of
from click.testing import CliRunner
from conftest import json_rows, needs_real, ok
from PIL import Image
from referees import referee
from serving import caltech_photos

from retrieval_tip import Index, __version__
from retrieval_tip.cli import main

MEGADETECTOR, FRICTIONLESS, TRAP_SCHEMA = "10.0.28", "5.21.0", "0.2.2"
EMPTY = "102/empty.jpg"
START = datetime(2026, 3, 1, 23, 59, 55)


def detection(box, conf=0.9, category="1", **more):
    return {"category": category, "conf": conf, "bbox": box} | more


@pytest.fixture(scope="module")
def animals(things, tmp_path_factory):
    """A fitted index, which knows what matches no class, with probabilities that are not all 0 or 1."""
    folder = tmp_path_factory.mktemp("fitted") / "animals"
    for command in (
        f"index clone {things} {folder}",
        f"fit {folder}",
        f"index set {folder} --temperature 4000",
    ):
        assert CliRunner().invoke(main, command.split()).exit_code == 0
    return folder


@pytest.fixture
def card(shared, tmp_path):
    """A memory card with two folders: a burst of three photos, one without a date, an unreadable one, an empty one."""
    names = ["101/a.jpg", "101/b.jpg", "101/c.jpg", "101/d.jpg", "102/a.jpg", "102/empty.jpg"]
    folder = tmp_path / "card"
    for row, (name, (path, _)) in enumerate(
        zip(names, caltech_photos(shared, "test", 6, 1), strict=True)
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        time = (
            None
            if name.endswith("d.jpg")
            else f"{START + timedelta(seconds=row):%Y:%m:%d %H:%M:%S}"
        )
        gps = gps_of(-1.5, 36.75) if name == "102/a.jpg" else None
        image = Image.new("RGB", (64, 64)) if name == EMPTY else Image.open(path).convert("RGB")
        (folder / name).write_bytes(encoded(time, gps, image=image))
    (folder / "102/broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


@pytest.fixture
def boxes(card):
    """Detections in these photos with unknown fields, an image that is not on the card, and a failure."""
    images = [
        {
            "file": "102/a.jpg",
            "detections": [detection([0, 0, 1, 1], 0.95, x=[1]), detection([0, 0, 0.1, 1], 0.1)],
        },
        {"file": "elsewhere.jpg", "detections": [detection([0, 0, 1, 1])], "width": 7},
        {
            "file": "101\\a.jpg",
            "detections": [detection([0, 0, 0.5, 1], 0.5, "2"), detection([0.25, 0, 0.5, 1])],
        },
        {"file": "101/b.jpg", "detections": [detection([0, 0, 1, 1], 0.8, "2")]},
        {"file": "102/empty.jpg", "detections": [], "failure": None},
        {"file": "102/broken.jpg", "failure": "Failure image access", "detections": None},
        {"file": "101/c.jpg", "detections": [detection([-0.001, 0, 1.001, 1])]},
    ]
    info = {
        "format_version": "1.5",
        "detector": "md_v5a.0.0.pt",
        "mine": "\ud800",
        "detector_metadata": {"typical_detection_threshold": 0.2},
    }
    document = {
        "images": images,
        "detection_categories": {"1": "animal", "2": "person"},
        "info": info,
        "extra": 1e300,
    }
    (card.parent / "boxes.json").write_text(json.dumps(document))
    return card.parent / "boxes.json"


def written(run, *arguments, status=0):
    """Return the document that ``classify`` prints."""
    done = run("classify", *arguments, "--format", "megadetector")
    assert done.exit_code == status, done.stderr
    return json.loads(done.stdout)


def ranked(row, names):
    """Return the classifications of a row of ``classify --top 5 --format json``."""
    answers = zip(row["labels"], row["probabilities"], strict=True)
    return [[str(names.index(label) + 1), round(p, 4)] for label, p in answers if p >= 0.01]


def rows_of(run, *arguments):
    return json_rows(run("classify", *arguments, "--top", 5, "--format", "json"))


@pytest.mark.parametrize("options", [[], ["--burst", 10]], ids=str)
def test_each_photo_is_a_detection_with_its_best_classes(options, run, animals, card):
    document = written(run, animals, card, *options, status=3)
    names = Index.load(animals).class_names
    photos = {photo["file"]: photo for photo in document["images"]}
    assert list(photos) == [
        "101/a.jpg",
        "101/b.jpg",
        "101/c.jpg",
        "101/d.jpg",
        "102/a.jpg",
        EMPTY,
        "102/broken.jpg",
    ]
    broken = photos.pop("102/broken.jpg")
    assert broken["detections"] is None
    assert broken["failure"].startswith("not a readable image")
    rows = rows_of(run, animals, card, *options)
    assert (
        max(len(photo["detections"][0].get("classifications", ())) for photo in photos.values()) > 1
    )
    assert list(photos) == [Path(row["input"]).relative_to(card).as_posix() for row in rows]
    for photo, row in zip(photos.values(), rows, strict=True):
        (found,) = photo["detections"]
        assert found.pop("classifications", []) == (
            ranked(row, names) if not row["no_match"] else []
        )
        assert found == {"category": "1", "conf": 1.0, "bbox": [0, 0, 1, 1]}
    assert document["classification_categories"] == {
        str(number): name for number, name in enumerate(names, 1)
    }
    info = document["info"]
    assert (
        info["classifier"] == f"animals@{Index.load(animals).version} (retrieval-tip {__version__})"
    )
    assert abs(
        datetime.fromisoformat(info["classification_completion_time"]) - datetime.now()
    ) < timedelta(hours=1)
    assert "whole photo" in info["detector"]


def test_detections_pass_through_and_animals_get_classes(run, animals, card, boxes):
    before = json.loads(boxes.read_text())
    names = Index.load(animals).class_names
    document = written(run, animals, card, "--boxes", boxes, status=3)
    rows = rows_of(run, animals, card, "--boxes", boxes, "--categories", "animal")
    at = {
        "102/a.jpg#1": (0, 0),
        "101/a.jpg#2": (2, 1),
        "101/c.jpg#1": (6, 0),
    }  # the image and its detection
    found = {
        at[Path(row["input"]).relative_to(card).as_posix()]: row
        for row in rows
        if row["label"] is not None
    }
    assert sorted(found) == sorted(at.values())
    expected = copy.deepcopy(before)
    for (image, number), row in found.items():
        expected["images"][image]["detections"][number]["classifications"] = ranked(row, names)
    assert [row["detected"] for row in rows if row["label"] is None] == [
        "person",
        "person",
        "empty",
    ]
    for key in ("classifier", "classification_completion_time", "classifier_metadata"):
        expected["info"][key] = document["info"][key]
    expected["classification_categories"] = document["classification_categories"]
    assert document == expected
    assert [list(one) for one in document["images"][:2]] == [
        list(one) for one in before["images"][:2]
    ]


def test_earlier_classifications_are_replaced_with_a_warning(run, animals, card, boxes):
    boxes.write_text(json.dumps(written(run, animals, card, "--boxes", boxes, status=3)))
    earlier = json.loads(boxes.read_text())
    earlier["images"][1]["detections"][0]["classifications"] = [["7", 0.9]]
    earlier["classification_category_descriptions"] = {"7": "x"}
    boxes.write_text(json.dumps(earlier))
    done = run(
        "classify",
        animals,
        card,
        "--boxes",
        boxes,
        "--format",
        "megadetector",
        "--categories",
        "PERSON",
    )
    assert "boxes.json: replaced the earlier classifications of" in done.stderr
    people = json.loads(done.stdout)
    got = [
        ["classifications" in one for one in image["detections"] or ()]
        for image in people["images"]
    ]
    assert got == [[False, False], [False], [True, False], [True], [], [], [False]]
    assert "classification_category_descriptions" not in people


@needs_real
def test_uncertain_and_unmatched_photos_get_no_classes(run, animals, card):
    def classified(document):
        images = (image for image in document["images"] if image["detections"])
        return {image["file"]: "classifications" in image["detections"][0] for image in images}

    rows = {
        Path(row["input"]).relative_to(card).as_posix(): row["probability"]
        for row in rows_of(run, animals, card)
    }
    least = sorted(rows.values())[3]
    got = classified(written(run, animals, card, "--abstain", least, status=3))
    assert got == {name: probability >= least for name, probability in rows.items()}
    assert list(got.values()).count(False) == 3
    no_match = {
        Path(row["input"]).relative_to(card).as_posix(): row["no_match"]
        for row in rows_of(run, animals, card)
    }
    assert classified(written(run, animals, card, status=3)) == {
        name: not own for name, own in no_match.items()
    }
    assert set(no_match.values()) == {True, False}


def test_exif_adds_the_time_and_the_place(run, animals, card, boxes):
    photos = {one["file"]: one for one in written(run, animals, card, "--exif", status=3)["images"]}
    assert photos["102/a.jpg"]["datetime"] == "2026:03:01 23:59:59"
    assert (photos["102/a.jpg"]["latitude"], photos["102/a.jpg"]["longitude"]) == (-1.5, 36.75)
    assert {"datetime", "latitude"}.isdisjoint(photos["101/d.jpg"])
    photos = written(run, animals, card, "--exif", "--boxes", boxes, status=3)["images"]
    assert [one.get("datetime", "")[-2:] for one in photos] == [
        "59",
        "",
        "55",
        "56",
        "00",
        "",
        "57",
    ]


def test_files_are_relative_to_the_folder_that_contains_all(run, animals, card, monkeypatch):
    monkeypatch.chdir(card / "101")
    for given, files in (
        (["."], ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]),
        (["a.jpg", "../102/a.jpg"], ["101/a.jpg", "102/a.jpg"]),
        (["../102/*a*.jpg"], ["a.jpg"]),
        ([card / "102/a.jpg", card / "101/../102/a.jpg", "../102/a.jpg"], ["a.jpg"] * 3),
    ):
        assert [one["file"] for one in written(run, animals, *given)["images"]] == files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--boxes boxes.json --categories bear",
            "no category 'bear'; choose with --categories from: animal, person",
        ),
        ("--categories animal", "--categories: selects boxes; add --boxes"),
        ("--timezone UTC", "only applies to --format camtrap-dp"),
        (
            "--format camtrap-dp --out x",
            "needs --out FOLDER and --timezone ZONE, such as Europe/Berlin",
        ),
        ("--format camtrap-dp --timezone UTC", "needs --out FOLDER and --timezone ZONE"),
        (
            "--format camtrap-dp --out x --timezone Europe/Nowhere",
            "Europe/Nowhere: unknown; give a name",
        ),
        (
            "--format camtrap-dp --out boxes.json --timezone UTC",
            "exists already; choose another --out",
        ),
        ("--format camtrap-dp --out no/x --timezone UTC", "there is no folder no; create it first"),
        (
            "card/101/d.jpg --format camtrap-dp --out x --timezone UTC",
            "card/101: no photo has a date",
        ),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    options, message, run, animals, boxes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    photos = [] if options.startswith("card") else ["card"]
    style = [] if "--format" in options else ["--format", "megadetector"]
    done = run("classify", animals, *photos, *style, *options.split())
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert message in done.stderr.splitlines()[-1]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["boxes.json", "card"]


def packed(run, tmp_path, *arguments, status=3):
    """Return the rows of the tables of a Camtrap DP by their first column, its metadata, and what was printed."""
    out = tmp_path / f"package {len(list(tmp_path.glob('package*')))}"
    done = run("classify", *arguments, "--format", "camtrap-dp", "--out", out)
    assert done.exit_code == status, done.stderr
    made = SimpleNamespace(
        out=out, said=done.stderr, about=json.loads((out / "datapackage.json").read_text())
    )
    for name in ("deployments", "media", "observations"):
        with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            setattr(made, name, {next(iter(row.values())): row for row in csv.DictReader(file)})
    return made


BERLIN = ["--timezone", "Europe/Berlin"]


def test_a_package_has_an_observation_for_each_photo(run, animals, card, tmp_path):
    made = packed(run, tmp_path, animals, card, *BERLIN)
    rows = {
        Path(row["input"]).relative_to(card).as_posix(): row for row in rows_of(run, animals, card)
    }
    rows.pop("101/d.jpg")  # it has no date
    assert "left out 1 photo: " in made.said
    assert "1 deployment lacks coordinates or dates: 101; Camtrap DP requires them" in made.said
    assert list(made.media) == list(made.observations) == list(rows)
    for name, row in rows.items():
        own = made.observations[name]
        assert own["mediaID"] == own["eventID"] == made.media[name]["filePath"] == name
        assert own["observationType"] == ("unknown" if row["no_match"] else "animal")
        assert own["scientificName"] == ("" if row["no_match"] else row["label"])
        assert own["classificationProbability"] == (
            "" if row["no_match"] else str(round(row["probability"], 4))
        )
        assert own["deploymentID"] == made.media[name]["deploymentID"] == name[:3]
        assert own["eventStart"] == own["eventEnd"] == made.media[name]["timestamp"]
    assert made.media["102/a.jpg"]["timestamp"] == "2026-03-01T23:59:59+01:00"
    place = {name: (row["latitude"], row["longitude"]) for name, row in made.deployments.items()}
    assert place == {"101": ("", ""), "102": ("-1.5", "36.75")}
    assert made.deployments["101"]["deploymentEnd"] == "2026-03-01T23:59:57+01:00"
    assert made.about["temporal"] == {"start": "2026-03-01", "end": "2026-03-02"}
    found = {row["label"] for row in rows.values() if not row["no_match"]}
    assert {one["scientificName"] for one in made.about["taxonomic"]} == found


def test_times_before_standard_time_have_offsets_of_whole_minutes(run, animals, card, tmp_path):
    """RFC 3339 allows no seconds in an offset; that of Berlin was +00:53:28 until 1893."""
    for file, year in (("a.jpg", "0001"), ("b.jpg", "1890")):
        (card / "101" / file).write_bytes(
            encoded(f"{year}:01:02 03:04:05", image=Image.open(card / "101" / file))
        )
    known = tmp_path / "deployments.csv"
    known.write_text(
        "deploymentID,latitude,longitude,deploymentStart,deploymentEnd\n101,1,2,1880-05-06,1891-01-01\n"
    )
    made = packed(run, tmp_path, animals, card, *BERLIN, "--deployments", known)
    assert made.media["101/a.jpg"]["timestamp"] == "0001-01-02T03:04:05+00:53"
    assert made.deployments["101"]["deploymentStart"] == "1880-05-06T00:00:00+00:53"
    rows = [
        row for part in (made.deployments, made.media, made.observations) for row in part.values()
    ]
    columns = re.compile("timestamp$|Timestamp$|Start$|End$")
    times = [value for row in rows for name, value in row.items() if value and columns.search(name)]
    assert len(times) > 10
    for time in [*times, made.about["created"]]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", time), time


def test_boxes_and_bursts_in_a_package(run, animals, card, boxes, tmp_path):
    made = packed(
        run, tmp_path, animals, card, *BERLIN, "--boxes", boxes, "--burst", 10, "--abstain", 1
    )
    kinds = {name: own["observationType"] for name, own in made.observations.items()}
    people = {"101/a.jpg#1": "human", "101/b.jpg#1": "human", EMPTY: "blank"}
    assert (
        kinds
        == {"101/a.jpg#2": "unknown", "101/c.jpg#1": "unknown", "102/a.jpg#1": "unknown"} | people
    )
    of_box = itemgetter("bboxX", "bboxY", "bboxWidth", "bboxHeight")
    edges = {name: of_box(own) for name, own in made.observations.items()}
    assert edges["101/a.jpg#2"] == ("0.25", "0.0", "0.5", "1.0")
    assert list(map(float, edges["101/c.jpg#1"])) == pytest.approx([0, 0, 1, 1])
    assert edges[EMPTY] == ("", "", "", "")
    for name in ("101/a.jpg#1", "101/a.jpg#2", "101/c.jpg#1"):
        own = made.observations[name]
        assert (own["eventID"], own["eventStart"][17:19], own["eventEnd"][17:19]) == (
            "burst 1",
            "55",
            "57",
        )


@needs_real
def test_classes_can_be_empty_people_or_vehicles(run, animals, card, tmp_path):
    own = tmp_path / "own"
    ok("index clone", animals, own)
    for old, new in (("accordion", "Empty"), ("airplane", "person"), ("anchor", "Vehicle")):
        ok("index rename", own, old, new)
    made = packed(run, tmp_path, own, card, *BERLIN)
    kinds = [row["observationType"] for row in made.observations.values()]
    assert kinds == ["blank", "human", "vehicle", "animal", "unknown"]
    assert made.about["taxonomic"] == [{"scientificName": "barrel"}]


def test_deployments_come_from_a_table(run, animals, card, tmp_path):
    table = tmp_path / "deployments.csv"
    table.write_text(
        "deploymentID;latitude;longitude;deploymentStart;cameraID\n"
        "card;52.5;13.4;2026-07-01 12:00;K1\nelse;1;2;2026-01-01T00:00:00Z;\n"
    )
    made = packed(run, tmp_path, animals, card, *BERLIN, "--deployments", table)
    assert list(made.deployments) == ["card", "else"]
    assert {row["deploymentID"] for row in made.media.values()} == {"card"}
    card_row, other = made.deployments.values()
    assert [card_row[name] for name in ("latitude", "cameraID")] == ["52.5", "K1"]
    assert card_row["deploymentStart"] == "2026-07-01T12:00:00+02:00"
    assert card_row["deploymentEnd"] == "2026-03-02T00:00:00+01:00"
    assert (other["deploymentStart"], other["deploymentEnd"]) == ("2026-01-01T00:00:00+00:00", "")
    assert "1 deployment lacks coordinates or dates" in made.said
    for text, message in (
        (
            "deploymentID,lat\na,1\n",
            "expected deploymentID and other columns of Camtrap DP: deploymentID, loc",
        ),
        ("deploymentID,latitude\na,91\n", "a: latitude '91' is not valid"),
        ("deploymentID,deploymentEnd\na,soon\n", "a: deploymentEnd 'soon' is not valid"),
        ("deploymentID,latitude\na,1\na,2\n", "each row needs a deploymentID of its own"),
    ):
        table.write_text(text)
        options = [
            "--format",
            "camtrap-dp",
            "--out",
            tmp_path / "x",
            *BERLIN,
            "--deployments",
            table,
        ]
        done = run("classify", animals, card, *options)
        assert (done.exit_code, message in done.stderr, (tmp_path / "x").exists()) == (
            1,
            True,
            False,
        )


@pytest.mark.parametrize("options", [["megadetector"], ["camtrap-dp", *BERLIN]], ids=itemgetter(0))
def test_a_full_disk_leaves_no_output(options, run, animals, card, small_disk):
    disk = small_disk(4)
    (disk / "filled").write_bytes(bytes(4096))
    done = run("classify", animals, card, "--out", disk / "out", "--format", *options)
    assert done.exit_code == 1
    assert "No space left" in done.stderr.splitlines()[-1]
    assert [path.name for path in disk.iterdir()] == ["filled"]


@pytest.mark.soak
def test_megadetectors_validator_accepts_a_thousand_images(run, animals, card, boxes, tmp_path):
    python = referee(
        (f"megadetector-utils=={MEGADETECTOR}",), ("--no-deps", f"megadetector=={MEGADETECTOR}")
    )
    many = tmp_path / "many"
    for number in range(167):
        (many / f"{number}").mkdir(parents=True)
        for file in card.rglob("[a-e]*.jpg"):
            os.link(file, many / f"{number}" / f"{file.parent.name}-{file.name}")
    for name, inputs in (("whole", [many]), ("boxes", [card, "--boxes", boxes])):
        out = tmp_path / f"{name}.json"
        assert (
            run(
                "classify", animals, *inputs, "--format", "megadetector", "--out", out, "--exif"
            ).exit_code
            == 3
        )
        if name == "boxes":  # the validator warns about unknown fields, which are ours
            out.write_text(
                json.dumps({k: v for k, v in json.loads(out.read_text()).items() if k != "extra"})
            )
        code = "from megadetector.postprocessing.validate_batch_results import validate_batch_results as check; "
        code += f"import json; print(json.dumps(check({str(out)!r})['validation_results']))"
        found = json.loads(
            subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
        )
        assert (found["errors"], found["warnings"]) == ([], [])
        counted = len(re.findall('"file"', out.read_text()))
        assert counted == (1169 if name == "whole" else 7)
        assert sum(found["classification_category_id_to_count"].values()) > 0


@pytest.mark.soak
def test_frictionless_accepts_a_package(run, animals, card, boxes, tmp_path):
    python = referee(
        (f"trap-schema=={TRAP_SCHEMA}", f"frictionless=={FRICTIONLESS}"), python="python3.13"
    )
    table = tmp_path / "deployments.csv"
    table.write_text("deploymentID,latitude,longitude\n101,1e-7,-180\n")
    check = [python, Path(__file__).with_name("check_camtrap_dp.py")]
    for more in ([], ["--boxes", boxes, "--burst", 10], ["--boxes", boxes, "--abstain", "auto"]):
        made = packed(run, tmp_path, animals, card, *BERLIN, "--deployments", table, *more)
        assert (
            subprocess.run([*check, made.out], check=True, capture_output=True, text=True).stdout
            == ""
        )
    made = packed(run, tmp_path, animals, card, *BERLIN)  # one deployment has no coordinates
    found = subprocess.run(
        [*check, made.out], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert [line.split()[:2] for line in found[:2]] == [["2", "latitude"], ["2", "longitude"]]
