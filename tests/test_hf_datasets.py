"""Hugging Face datasets: one address opens them, and an index shows their photos again without the library."""

import io
import os
import subprocess
import sys

import datasets
import pyarrow.parquet as pq
import pytest
from conftest import command_line, failed, json_rows, ok
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as Picture
from fastapi.testclient import TestClient
from PIL import Image
from serving import app_of
from tables import tiny

from retrieval_tip import Classifier, Index
from retrieval_tip.data.sources import open_source, read_item
from retrieval_tip.errors import InputError

datasets.disable_progress_bars()
COLOURS = ("red", "green", "blue", "white")
NAMED = Features({"image": Picture(), "label": ClassLabel(names=["zebra", "cat"])})


def png(colour):
    """Return a photo in one colour."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(data, "PNG")
    return data.getvalue()


def rows(colours=COLOURS, features=NAMED, **columns):
    """Return a dataset with one photo for each colour, and labels that alternate."""
    photos = [{"bytes": png(colour), "path": None} for colour in colours]
    labels = [number % 2 for number in range(len(photos))]
    return Dataset.from_dict({"image": photos, "label": labels, **columns}, features=features)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Keep what the library prepares in the folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def model(tmp_path):
    return "--model", f"local-dir:{tiny(tmp_path / 'model')}"


def saved(place, data=None):
    """Save a dataset in the format of the library, and return its address."""
    (rows() if data is None else data).save_to_disk(place)
    return f"hf-dataset:{place}"


def test_an_index_of_a_saved_dataset_has_its_labels_and_shows_its_photos(model, tmp_path):
    address, index = saved(tmp_path / "data"), tmp_path / "index"
    ok("index build", address, *model, "--out", index)
    stored = Index.load(index)
    assert stored.labels["source"].to_pylist() == [f"{address}#{row}" for row in (1, 3, 0, 2)]
    assert dict(zip(stored.class_names, stored.counts, strict=True)) == {"cat": 2, "zebra": 2}
    answers = json_rows(ok("classify", index, address, f"{address}#3", "--format", "json"))
    assert [answer["input"] for answer in answers] == [
        f"{address}#{row}" for row in (0, 1, 2, 3, 3)
    ]
    ok("index audit", index)
    shown = Classifier.load(index, device="cpu").explain(f"{address}#2")
    assert png("red") in shown.shots
    row = stored.labels.to_pylist()[0]
    with TestClient(app_of(index)) as client:
        shown = client.get(f"/v1/indexes/{index.name}/keys/{row['key_id']}/image")
    assert Image.open(io.BytesIO(shown.content)).size == (40, 40), shown.text


def test_reading_again_needs_no_library_and_downloads_nothing(tmp_path):
    address = saved(tmp_path / "data")
    open_source(address)
    read = """
import sys
from retrieval_tip.data.sources import read_item
sys.stdout.buffer.write(read_item(sys.argv[1]))
assert not {"datasets", "huggingface_hub"} & {*sys.modules}
"""
    command = [sys.executable, "-c", read, f"{address}#1"]
    assert subprocess.check_output(command) == png("green")
    unopened = saved(tmp_path / "other")
    for item in (f"{unopened}#1", "hf-dataset:some/photos@train#0"):
        with pytest.raises(InputError, match="not on this machine; classify the dataset first"):
            read_item(item)
    for row in ("4", "x", "-9", "9" * 5000):
        with pytest.raises(InputError):
            read_item(f"{address}#{row}")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_splits_are_chosen_like_the_parts_of_a_folder(kind, model, tmp_path):
    splits = {"train": rows(), "validation": rows(COLOURS[:3]), "test": rows(COLOURS[:2])}
    address = f"hf-dataset:{tmp_path / 'data'}"
    if kind == "saved":
        saved(tmp_path / "data", DatasetDict(splits))
    else:
        for name, data in splits.items():
            data.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    for wanted, photos in (("train", 4), ("val", 3), ("validation", 3), ("test", 2)):
        assert len(open_source(address, split=wanted)) == photos
        assert len(open_source(f"{address}@{wanted}")) == photos
    built = ok("index build", address, *model, "--split", "val", "--out", tmp_path / "index")
    assert "using its part validation, ignoring train, test" in built.stderr
    answers = json_rows(ok("classify", tmp_path / "index", f"{address}@test", "--format", "json"))
    assert [answer["input"] for answer in answers] == [f"{address}@test#{row}" for row in (0, 1)]
    for done in (
        command_line("index build", address, *model, "--split", "no", "--out", tmp_path / "b"),
        command_line("classify", tmp_path / "index", f"{address}@no"),
    ):
        failed(done, 1, "no part 'no'; choose one with --split: train, validation, test")


def test_the_items_of_an_image_folder_are_its_files(tmp_path):
    for name in ("cat/0.png", "dog/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        (tmp_path / "photos" / name).write_bytes(png("red"))
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    source = open_source(f"hf-dataset:{tmp_path / 'link'}")
    assert source.paths == tuple(
        str(tmp_path / "photos" / name) for name in ("cat/0.png", "dog/1.png")
    )
    assert source.labels == ["cat", "dog"]


def test_a_row_cannot_name_a_file_outside_of_its_dataset(tmp_path):
    (tmp_path / "secret.png").write_bytes(png("red"))
    paths = [
        str(tmp_path / "secret.png"),
        "https://example.org/x.png",
        "hf-dataset:a/b#0",
        "x.png",
        f"{tmp_path}/data/../secret.png",
    ]
    images = {"image": [{"bytes": None, "path": path} for path in paths]}
    data = Dataset.from_dict(images, features=Features({"image": Picture()}))
    (tmp_path / "data").mkdir()
    pq.write_table(
        data.data.table, tmp_path / "data" / "train.parquet"
    )  # to_parquet would read them
    address = f"hf-dataset:{tmp_path / 'data'}"
    source = open_source(address, labelled=False)
    assert source.paths == tuple(f"{address}@train#{row}" for row in range(len(paths)))
    for path in source.paths:
        with pytest.raises(InputError, match="neither an image nor"):
            read_item(path)


def test_rows_without_a_readable_photo_are_named_and_skipped(model, tmp_path):
    photos = [png("red"), png("blue"), None, b"", b"\x89PNG no", png("red")[:40]]
    images = [data and {"bytes": data, "path": None} for data in photos]
    data = Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 0, 1]}, features=NAMED)
    address = saved(tmp_path / "data", data)
    done = command_line("index build", address, *model, "--out", tmp_path / "index")
    assert done.exit_code == 3
    assert done.stderr.count("warning: skipped ") == 4
    assert f"skipped {address}#2: the row has neither" in done.stderr
    assert Index.load(tmp_path / "index").n == 2


TEXT, NUMBER, LISTS = Value("string"), Value("float64"), Sequence(Value("int64"))


@pytest.mark.parametrize(
    ("columns", "labelled", "words"),
    [
        ({"label": TEXT}, False, "expected one image column, found 0 of label"),
        (
            {"image": Picture(), "other": Picture(), "label": TEXT},
            False,
            "one image column, found 2",
        ),
        ({"image": Picture(), "size": NUMBER}, True, "one label column, found 0 of image, size"),
        (
            {"image": Picture(), "fine": NAMED["label"], "coarse": NAMED["label"]},
            True,
            "one label column, found 2",
        ),
        ({"image": Picture(), "label": LISTS}, True, "type list<item: int64>; expected text"),
        ({"image": Picture(), "label": TEXT}, True, "rows 0, 1 without a label"),
        ({"image": Picture(), "kind": NAMED["label"]}, True, "rows 0, 1 without a label"),
    ],
)
def test_a_dataset_without_the_columns_is_one_line(columns, labelled, words, tmp_path):
    features = Features(columns)
    data = Dataset.from_dict({name: [None, None] for name in columns}, features=features)
    address = saved(tmp_path / "data", data)
    with pytest.raises(InputError, match=words) as refused:
        open_source(address, labelled=labelled)
    assert str(refused.value).startswith(address)
    assert "\n" not in str(refused.value)


def test_photos_without_labels_are_classified(model, tmp_path):
    ok("index build", saved(tmp_path / "data"), *model, "--out", tmp_path / "index")
    for name, data in (
        ("none", rows().remove_columns("label")),
        ("hidden", rows(label=[-1] * 4)),
    ):
        address = saved(tmp_path / name, data)
        assert len(json_rows(ok("classify", tmp_path / "index", address, "--format", "json"))) == 4


def test_text_labels_and_class_labels_of_any_name_are_labels(tmp_path):
    for name, column, kind, values, expected in (
        ("a", "class", TEXT, ["cat", " dog"], ["cat", " dog"]),
        ("b", "species", NAMED["label"], [1, 0], ["cat", "zebra"]),
    ):
        features = Features({"image": Picture(), column: kind})
        photos = [{"bytes": png("red"), "path": None}] * 2
        data = Dataset.from_dict({"image": photos, column: values}, features=features)
        assert open_source(saved(tmp_path / name, data)).labels == expected


@pytest.mark.parametrize("rest", ["", "no", "./no", "/no", "a/b/c/d", "a b/c", "\0", "x@"])
def test_a_name_of_no_dataset_is_one_line(rest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be read") as refused:
        open_source(f"hf-dataset:{rest}")
    assert "\n" not in str(refused.value)


def test_the_library_prints_nothing_without_a_terminal(tmp_path):
    rows().to_parquet(tmp_path / "data" / "train.parquet")
    opened = "import sys; from retrieval_tip.data.sources import open_source as o; o(sys.argv[1])"
    command = [sys.executable, "-c", opened, f"hf-dataset:{tmp_path / 'data'}"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout + done.stderr == ""
