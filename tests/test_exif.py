"""Time and place of photos, and one answer for all photos of a burst."""

import csv
import io
import json
import math
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
from cameras import GPS, encoded, gps_of
from conftest import json_rows, ok
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import IFDRational
from serving import caltech_photos

from retrieval_tip.data import images
from retrieval_tip.data.boxes import cut_boxes
from retrieval_tip.data.exif import UNKNOWN, ExifRecorder, Taken, taken
from retrieval_tip.labelling.bursts import bursts
from retrieval_tip.pictures import open_images

START = datetime(2026, 3, 1, 23, 59, 55)
LATITUDE = st.floats(-89.9, 89.9)
LONGITUDE = st.floats(-179.9, 179.9)
PHOTOS = st.lists(
    st.tuples(st.sampled_from(["a/", "b/", ""]), st.none() | st.integers(0, 60)), max_size=12
)


@example(datetime(2000, 1, 1), 0.0, 1.9, "JPEG")  # 53.99... minutes
@given(st.datetimes(datetime(1900, 1, 1)), LATITUDE, LONGITUDE, st.sampled_from(["JPEG", "WEBP"]))
def test_time_and_place_are_read_from_exif(time, latitude, longitude, style):
    found = taken(encoded(f"{time:%Y:%m:%d %H:%M:%S}", gps_of(latitude, longitude), style))
    assert found.taken_at == time.replace(microsecond=0)
    assert (found.latitude, found.longitude) == pytest.approx((latitude, longitude), abs=1e-6)


NAN = IFDRational(0, 0)
HUGE = 2**32 - 1
LATITUDES = [(NAN, 0, 0), (HUGE, HUGE, HUGE), (IFDRational(1, 0), 0, 0), (1, 2), (1, 2, 3, 4)]
WRONG = [
    *({GPS.GPSLatitude: latitude} for latitude in LATITUDES),
    *({GPS.GPSLatitudeRef: side} for side in ("E", "", 7)),
    {GPS.GPSLongitude: (180, 0, 1)},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_invalid_places_are_unknown(wrong):
    good = gps_of(48.5, 2.25)
    assert taken(encoded(gps=good))[1:] == (48.5, 2.25)
    assert taken(encoded("2026:01:02 03:04:05", good | wrong)) == Taken(
        datetime(2026, 1, 2, 3, 4, 5)
    )


@pytest.mark.parametrize(
    "text",
    ["0000:00:00 00:00:00", "    :  :     :  :  ", "2026:02:30 00:00:00", "x" * 60_000, b"\xff", 7],
)
def test_invalid_times_are_unknown(text):
    assert taken(encoded(text)) == UNKNOWN


@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=40), st.integers(0))
def test_damaged_metadata_never_fails(changes, length):
    data = bytearray(encoded("2026:01:02 03:04:05", gps_of(48.5, 2.25)))
    for place, value in changes:
        data[place % 300] = value  # the header of this JPEG ends later
    found = taken(bytes(data[: length % len(data)]) if length % 2 else bytes(data))
    assert found.taken_at is None or isinstance(found.taken_at, datetime)
    assert all(one is None or (math.isfinite(one) and abs(one) <= 180) for one in found[1:])


@given(PHOTOS, st.integers(0, 12))
def test_bursts_are_chains_of_photos_in_one_folder(photos, gap):
    names = [f"{folder}{row}" for row, (folder, _) in enumerate(photos)]
    times = [None if second is None else START + timedelta(seconds=second) for _, second in photos]
    n = len(photos)
    linked = np.eye(n, dtype=bool)
    for i, (folder, second) in enumerate(photos):
        for j, (other, later) in enumerate(photos):
            linked[i, j] |= (
                folder == other and None not in (second, later) and abs(second - later) <= gap
            )
    for _ in range(n):
        linked = linked @ linked
    found = bursts(names, times, gap)
    np.testing.assert_array_equal(found[:, None] == found, linked)
    firsts = [number for row, number in enumerate(found) if number not in found[:row]]
    assert firsts == list(range(1, len(firsts) + 1))


@pytest.fixture
def traps(shared, tmp_path):
    """Photos in two folders: a burst of three, one photo later, one without a time, and one elsewhere."""
    seconds = {
        "a/1.jpg": 0,
        "a/2.jpg": 8,
        "a/3.jpg": 16,
        "a/4.jpg": 60,
        "a/5.jpg": None,
        "b/1.jpg": 0,
    }
    for (name, second), (path, _) in zip(
        seconds.items(), caltech_photos(shared, "test", 6, 1), strict=True
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        time = None if second is None else f"{START + timedelta(seconds=second):%Y:%m:%d %H:%M:%S}"
        gps = gps_of(-1.5, 36.75) if name == "b/1.jpg" else None
        file.write_bytes(encoded(time, gps, image=Image.open(path).convert("RGB")))
    return tmp_path


def test_classify_reports_exif_and_bursts(run, things, traps):
    plain = json_rows(run("classify", things, traps, "--top", 10, "--format", "json", "--exif"), 0)
    assert [row["taken_at"] for row in plain[1:3]] == ["2026-03-02 00:00:03", "2026-03-02 00:00:11"]
    assert [(row["latitude"], row["longitude"]) for row in plain[4:]] == [
        (None, None),
        (-1.5, 36.75),
    ]
    assert plain[4]["taken_at"] is None
    chances = [dict(zip(row["labels"], row["probabilities"], strict=True)) for row in plain]

    gaps = {10: [1, 1, 1, 2, 3, 4], 7.5: [1, 2, 3, 4, 5, 6], 44: [1, 1, 1, 1, 2, 3]}
    for gap, expected in gaps.items():
        found = json_rows(
            run("classify", things, traps, "--burst", gap, "--top", 3, "--format", "json"), 0
        )
        assert [row["input"] for row in found] == [row["input"] for row in plain]
        assert [row["burst"] for row in found] == expected
        for row in found:
            own = [
                chance
                for chance, number in zip(chances, expected, strict=True)
                if number == row["burst"]
            ]
            mean = {label: np.mean([chance[label] for chance in own]) for label in own[0]}
            assert row["label"] == row["labels"][0]
            assert row["probabilities"] == pytest.approx([mean[label] for label in row["labels"]])
            assert row["probabilities"] == pytest.approx(sorted(mean.values(), reverse=True)[:3])
            assert row["probability"] == row["probabilities"][0]


def test_a_burst_has_no_match_if_no_photo_of_it_has_one(run, things, traps, tmp_path_factory):
    index = tmp_path_factory.mktemp("index") / "fitted"
    ok("index clone", things, index)
    ok("fit", index)
    Image.effect_noise((300, 300), 200).convert("RGB").save(traps / "noise.jpg")
    (traps / "c").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (traps / "c" / name).write_bytes(
            encoded("2026:01:01 00:00:00", image=Image.open(traps / "noise.jpg"))
        )
    (traps / "a/6.jpg").write_bytes(
        encoded("2026:03:01 23:59:59", image=Image.open(traps / "noise.jpg"))
    )
    alone = json_rows(run("classify", index, traps, "--format", "json"), 0)
    done = run(
        "classify", index, traps, "--burst", 10, "--abstain", "auto", "--exif", "--format", "csv"
    )
    found = list(csv.DictReader(io.StringIO(done.stdout)))
    expected = [row["no_match"] for row in alone]
    assert expected[5:6] + expected[7:] == [True] * 4
    expected[:3], expected[5] = [False] * 3, False
    assert [row["no_match"] for row in found] == list(map(str, expected))
    assert [row["label"] for row in found[7:]] == ["", "", ""]
    assert [row["burst"] for row in found] == ["1", "1", "1", "2", "3", "1", "4", "5", "5", "6"]


def test_exif_is_read_from_photos_as_their_source_reads_them(tmp_path):
    """Photos in memory have no path, so only their source can read them."""
    photo = encoded("2026:01:02 03:04:05", gps_of(48.5, 2.25))
    source = replace(open_images([photo]), strict=False)
    (tmp_path / "boxes.json").write_text(
        json.dumps(
            {
                "images": [
                    {
                        "file": "photo 0",
                        "detections": [{"category": "1", "conf": 0.9, "bbox": [0, 0, 0.5, 0.5]}],
                    }
                ],
                "detection_categories": {"1": "animal"},
            }
        )
    )
    cut = cut_boxes(tmp_path / "boxes.json", [source])
    for sources, boxes in (([source], {}), (cut.sources, cut.boxes)):
        recorder = ExifRecorder(boxes)
        (noted,) = recorder.over(sources)
        assert images.decode(noted.load(noted.paths[0])).width <= 8
        assert [found.taken_at for found in recorder.taken.values()] == [
            datetime(2026, 1, 2, 3, 4, 5)
        ]
