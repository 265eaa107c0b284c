"""Photos cropped to the boxes of a detector."""

import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import failed, json_rows
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image
from serving import caltech_photos

from retrieval_tip.data import images
from retrieval_tip.data.boxes import cut_boxes
from retrieval_tip.data.sources import of_images
from retrieval_tip.errors import InputError, UsageError

NOISE = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
EDGE = st.floats(-0.01, 1.01)
LENGTH = st.floats(0, 1.01)


def found(bbox, conf=0.9, category="1"):
    return {"category": category, "conf": conf, "bbox": bbox}


@given(EDGE, EDGE, LENGTH, LENGTH)
def test_a_crop_has_the_pixels_that_a_box_touches(left, top, width, height):
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "PNG")
    part = np.asarray(
        Image.open(io.BytesIO(images.crop(file.getvalue(), (left, top, width, height))))
    )
    rows = [y for y in range(7) if y + 1 > top * 7 and y < (top + height) * 7]
    columns = [x for x in range(11) if x + 1 > left * 11 and x < (left + width) * 11]
    if rows and columns and width * height > 0:
        assert_array_equal(part, NOISE[rows][:, columns])
    else:  # at least one pixel is left
        assert part.size


@pytest.fixture
def trap(shared, tmp_path):
    """Rotated photos that each show two photos side by side, and the boxes of both."""
    paths = [path for path, _ in caltech_photos(shared, "test", 4, 1)]
    halves = [Image.open(path).convert("RGB").resize((256, 256)) for path in paths]
    (tmp_path / "halves").mkdir()
    for number, half in enumerate(halves):
        half.save(tmp_path / "halves" / f"{number}.png")
    (tmp_path / "photos" / "site").mkdir(parents=True)
    entries = []
    for number in range(2):
        both = Image.new("RGB", (512, 256))
        both.paste(halves[2 * number], (0, 0))
        both.paste(halves[2 * number + 1], (256, 0))
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated by 90 degrees
        both.transpose(Image.Transpose.ROTATE_90).save(
            tmp_path / f"photos/site/{number}.png", exif=exif
        )
        boxes = [
            found([0, 0, 0.5, 1]),
            found([0.2, 0.2, 0.2, 0.2], 0.59),
            found([0.5, 0, 0.5, 1], 0.6, "2"),
        ]
        entries.append({"file": f"site\\{number}.png", "detections": boxes})
    for name in ("empty", "faint", "failed", "unknown"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"photos/{name}.png")
    entries += [
        {"file": "empty.png", "detections": []},
        {"file": "faint.png", "detections": [found([0, 0, 1, 1], 0.3)]},
        {"file": "failed.png", "failure": "Failure image access", "detections": None},
        {"file": "elsewhere.png", "detections": []},
    ]
    info = {"detector_metadata": {"typical_detection_threshold": 0.6}}
    write(tmp_path, images=entries, detection_categories={"1": "animal", "2": "person"}, info=info)
    return tmp_path


def write(folder, **parts):
    (folder / "boxes.json").write_text(json.dumps(parts))
    return folder / "boxes.json"


def test_each_box_is_classified_as_its_own_photo(run, things, trap):
    done = run(
        "classify",
        things,
        trap / "photos",
        "--boxes",
        trap / "boxes.json",
        "--logits",
        "--format",
        "json",
    )
    failed(
        done, 3, "failed.png: the detector failed: Failure image access", "unknown.png: no entry"
    )
    rows = json_rows(done)
    photos = trap / "photos"
    names = [f"{photos}/site/{photo}.png#{box}" for photo in range(2) for box in (1, 2)]
    assert [row["input"] for row in rows] == [*names, f"{photos}/empty.png", f"{photos}/faint.png"]
    assert [row["detected"] for row in rows] == ["animal", "person"] * 2 + ["empty"] * 2
    assert [(row["label"], row["probability"], row["logits"]) for row in rows[4:]] == [
        (None, None, None)
    ] * 2
    alone = json_rows(run("classify", things, trap / "halves", "--logits", "--format", "json"))
    assert_array_equal([row["logits"] for row in rows[:4]], [row["logits"] for row in alone])


def test_boxes_belong_to_the_burst_of_their_photo(run, things, trap):
    for name in ("0", "1"):
        file = trap / f"photos/site/{name}.png"
        with Image.open(file) as photo:
            exif = photo.getexif()
            exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
            photo.convert("RGB").save(file.with_suffix(".jpg"), exif=exif)
        file.unlink()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:06"
    Image.new("RGB", (9, 9)).save(trap / "photos/empty.jpg", exif=exif)
    text = (trap / "boxes.json").read_text().replace(".png", ".jpg")
    (trap / "boxes.json").write_text(text)
    options = ["--burst", 10, "--exif", "--format", "json"]
    rows = json_rows(
        run("classify", things, trap / "photos", "--boxes", trap / "boxes.json", *options)
    )
    assert [row["burst"] for row in rows] == [1, 1, 1, 1, None]
    assert [row["taken_at"] for row in rows] == ["2026-01-02 03:04:05"] * 4 + [
        "2026-01-02 03:04:06"
    ]
    assert len({row["label"] for row in rows[:4]}) == 1


def test_photos_are_matched_by_the_end_of_their_path(tmp_path):
    entries = [
        {"file": file, "detections": [found([0, 0, 1, 1])] * n}
        for n, file in enumerate(["./b/1.jpg", "1.jpg"])
    ]
    file = write(tmp_path, images=entries)
    cut = cut_boxes(file, [of_images(["/a/b/1.jpg", "s3://x/c/1.jpg", "/a/b/1.jpg"])])
    assert (cut.empty, cut.sources[0].paths) == (
        ["/a/b/1.jpg", "/a/b/1.jpg"],
        ("s3://x/c/1.jpg#1",),
    )
    assert cut.detected == {"s3://x/c/1.jpg#1": "1"}
    with pytest.raises(InputError, match=r"c/1.jpg and /d/1.jpg both match its file '1.jpg'"):
        cut_boxes(file, [of_images(["/c/1.jpg", "/d/1.jpg"])])
    with pytest.raises(InputError, match="no photo has an entry"):
        cut_boxes(file, [of_images(["/c/2.jpg"])])


def test_boxes_without_an_area_are_left_out(tmp_path):
    flat = [0.5, 0.5, 0, 0.2]
    thin = [0.5, 0.5, 0.2, -0.001]
    whole = [0, 0, 1, 1]
    photos = {"0.jpg": [flat, thin], "1.jpg": [flat, whole]}
    entries = [
        {"file": name, "detections": list(map(found, edges))} for name, edges in photos.items()
    ]
    cut = cut_boxes(write(tmp_path, images=entries), [of_images(list(photos))])
    assert (cut.empty, cut.boxes) == (["0.jpg"], {"1.jpg#1": ("1.jpg", (0, 0, 1, 1))})


ONE = {"file": "a.jpg", "detections": [found([0, 0, 1, 1])]}
WRONG = [
    ("", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "no list 'images'"),
    ('{"images": {}}', "no list 'images'"),
    ('{"images": [1]}', "image 0 has no 'file'"),
    ('{"images": [{"file": 1, "detections": []}]}', "image 0 has no 'file'"),
    ('{"images": [{"file": "a", "detections": null}]}', "image 0 has no 'file'"),
    (json.dumps({"images": [ONE, ONE]}), "'a.jpg' occurs twice"),
    *(
        (
            json.dumps({"images": [ONE | {"detections": [ONE["detections"][0] | wrong]}]}),
            "a detection is not",
        )
        for wrong in (
            {"bbox": [0, 0, 1]},
            {"bbox": "0011"},
            {"bbox": [0, 0, 1, math.nan]},
            {"bbox": [0, 0, 1, math.inf]},
            {"bbox": [0, 0, 1, 10**400]},
            {"bbox": [0, 0, 100, 100]},
            {"bbox": [0, 0, 1, None]},
            {"conf": math.nan},
            {"conf": "0.9"},
            {"conf": 7},
            {"category": 1},
            {"category": None},
        )
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_malformed_box_files_are_refused(text, message, tmp_path):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        cut_boxes(tmp_path / "boxes.json", [of_images(["a.jpg"])])


@pytest.mark.parametrize("info", [None, [], {}, math.nan, "0.9", 7], ids=str)
def test_a_file_without_a_valid_threshold_uses_the_default(info, tmp_path):
    about = {"detector_metadata": {"typical_detection_threshold": info}}
    entry = ONE | {"detections": [found([0, 0, 1, 1], conf, "\ud800") for conf in (0.19, 0.2, 1)]}
    file = write(tmp_path, images=[entry], info=about, detection_categories=[1])
    cut = cut_boxes(file, [of_images(["a.jpg"])])
    assert list(cut.detected) == ["a.jpg#1", "a.jpg#2"]
    assert all(name.encode() for name in cut.detected.values())


def test_boxes_are_refused_for_features(tmp_path):
    file = write(tmp_path, images=[ONE])
    with pytest.raises(UsageError, match="features cannot be cropped"):
        cut_boxes(file, [replace(of_images(["a.jpg"]), paths=None)])


@pytest.mark.parametrize(("options", "more"), [([], ""), (["--burst", 10, "--exif"], ",,,,")])
def test_only_empty_photos_are_a_valid_result(options, more, run, things, trap):
    out = trap / "answers.csv"
    done = run(
        "classify",
        things,
        trap / "photos/empty.png",
        "--boxes",
        trap / "boxes.json",
        "--out",
        out,
        *options,
    )
    assert (done.exit_code, done.stderr) == (0, f"{out}: classified 0 inputs, 1 empty\n")
    assert out.read_text().splitlines()[1:] == [f"{trap}/photos/empty.png,,,,empty{more}"]


def test_classify_fails_if_the_detector_failed_on_all_photos(run, things, trap):
    done = run(
        "classify",
        things,
        trap / "photos/failed.png",
        "--boxes",
        trap / "boxes.json",
        "--burst",
        10,
    )
    assert (done.exit_code, done.stdout) == (1, "")
    assert "failed.png: the detector failed: Failure image access" in done.stderr
