"""Videos: frames at exact times and upright, damaged and hostile files, and one answer for each video."""

import csv
import gc
import hashlib
import io
import time
from fractions import Fraction
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import command_line, failed, json_rows, ok
from fastapi.testclient import TestClient
from PIL import Image
from serving import app_of, caltech_photos, labelling_app
from tables import tiny

from retrieval_tip import Classifier, Index, Reader, hooks, load_backbone
from retrieval_tip.data.source import items_in, opener, read_item
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.plugins import video

av = pytest.importorskip(
    "av", reason="SKIPPED: videos need PyAV; run pip install 'retrieval-tip[video]'"
)

SIDE = 16
"""Pixels of the sides of the blocks of a :func:`marked` frame."""


def marked(number, size=(128, 96)):
    """Return a frame with a bright top left corner, whose other blocks are the bits of its number."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    pixels[:SIDE, :SIDE] = 250
    for bit in range(12):
        row, column = divmod(bit, 6)
        place = np.s_[2 * SIDE * (row + 1) :, SIDE * (column + 1) :]
        pixels[place][:SIDE, :SIDE] = 250 if number >> bit & 1 else 40
    return pixels


def number_in(picture):
    """Return the number in an upright marked frame."""
    pixels = np.asarray(picture.convert("L"))
    middle = SIDE // 2
    assert pixels[middle, middle] > 200, "the bright corner is elsewhere"
    bits = (divmod(bit, 6) for bit in range(12))
    shown = [
        pixels[2 * SIDE * (row + 1) + middle, SIDE * (column + 1) + middle] for row, column in bits
    ]
    return sum(int(value > 128) << bit for bit, value in enumerate(shown))


def write_clip(path, frames, times=None, *, rate=25, codec="libx264", turn=0, **options):
    """Write frames as a video. ``times`` are in milliseconds, by default those of a constant ``rate``."""
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "10", **options})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for place, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if times is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), times[place]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def write_numbered(path, n, **more):
    return write_clip(path, [marked(number) for number in range(n)], **more)


def read_frames(file):
    """Return the times and numbers of all readable frames, and the reasons for what cannot be read."""
    shown, reasons = {}, []
    for item in items_in(file):
        try:
            picture = Image.open(io.BytesIO(read_item(item)))
            shown[int(item.rpartition("#")[2])] = number_in(picture)
        except InputError as error:
            reasons.append(f"{item.removeprefix(file)}: {error}")
    return shown, reasons


@pytest.fixture
def every(monkeypatch):
    """Return a function that sets --frame-every."""
    (kind,) = hooks.openers()

    def set_seconds(seconds):
        monkeypatch.setitem(hooks.SETTINGS, kind, {"frame_every": seconds})

    return set_seconds


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        (".mp4", "libx264"),
        (".MOV", "libx264"),
        (".mkv", "libx264"),
        (".avi", "mjpeg"),
        (".mts", "libx264"),
        (".mpg", "mpeg2video"),
        (".webm", "libvpx"),
    ],
)
def test_a_frame_a_second_has_the_exact_time_and_content(tmp_path, every, suffix, codec):
    clip = write_numbered(tmp_path / f"clip{suffix}", 100, codec=codec, g="30")
    shown, reasons = read_frames(clip)
    assert shown == {0: 0, 1000: 25, 2000: 50, 3000: 75}
    assert not reasons
    bytes_of = {item: read_item(item) for item in items_in(clip)}
    every(0.999)  # another decoder, which passes other frames
    for item in reversed(bytes_of):
        assert read_item(item) == bytes_of[item]


def test_frames_are_upright(tmp_path):
    """Cameras store pixels as the sensor reads them, and the turn of the camera beside them."""
    for turn in (0, 90, 180, 270):
        stored = np.rot90(marked(5), -turn // 90)
        clip = write_clip(tmp_path / f"{turn}.mp4", [stored], turn=turn)
        picture = Image.open(io.BytesIO(read_item(f"{clip}#0")))
        assert picture.size == (128, 96)
        assert number_in(picture) == 5


def test_times_of_a_variable_rate_are_exact(tmp_path, every):
    times = [0, 40, 990, 1010, 1020, 2500, 2540, 7000, 7900, 8001]
    clip = write_clip(tmp_path / "phone.mp4", [marked(n) for n in range(10)], times, bf="2")
    assert read_frames(clip) == ({0: 0, 1010: 3, 2500: 5, 7000: 7, 8001: 9}, [])
    every(0.5)
    assert list(read_frames(clip)[0]) == [0, 990, 1010, 2500, 7000, 7900, 8001]
    with pytest.raises(InputError, match="no frame can be decoded"):
        read_item(f"{clip}#1011")
    assert len(read_item(f"{clip}#990")) > 500


def test_long_steps_seek(tmp_path, every):
    clip = write_numbered(tmp_path / "long.mp4", 3000, rate=25, g="250", preset="ultrafast")
    every(10)
    shown, reasons = read_frames(clip)
    assert shown == {10_000 * step: 250 * step for step in range(12)}
    assert not reasons


def test_damaged_videos_give_what_is_readable(tmp_path):
    """Frames that depend on a damaged one decode to other pictures, until the next key frame."""
    for keys, lost in (("25", (5, 6)), ("250", (5, 6, 7, 8, 9))):
        whole = Path(
            write_numbered(tmp_path / "whole.mp4", 250, g=keys, container={"movflags": "faststart"})
        )
        data = bytearray(whole.read_bytes())
        with av.open(str(whole)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
        for packet in packets:
            if 4.2 <= packet.pts * packet.time_base < 6.9:
                data[packet.pos + 8 : packet.pos + packet.size] = b"\xff" * (packet.size - 8)
        (tmp_path / f"middle-{keys}.mp4").write_bytes(data)
        shown, reasons = read_frames(str(tmp_path / f"middle-{keys}.mp4"))
        assert shown == {1000 * second: 25 * second for second in range(10) if second not in lost}
        why = "no frame can be decoded at this time; the video is damaged there"
        assert reasons == [f"#{1000 * second}: {why}" for second in lost]
    data = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    shown, (*_, reason) = read_frames(str(tmp_path / "cut.mp4"))
    assert shown == {time: time // 40 for time in shown}
    assert 1 <= len(shown) <= 7
    assert " of 10.0 s" in reason
    matroska = Path(write_numbered(tmp_path / "whole.mkv", 250, g="25"))
    (tmp_path / "cut.mkv").write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    assert len(read_frames(str(tmp_path / "cut.mkv"))[0]) >= 3


def test_other_and_hostile_files_are_one_line(tmp_path, every, monkeypatch):
    audio = tmp_path / "sound.mp4"
    with av.open(str(audio), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        silence.rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.mp4", "JPEG")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    huge = np.zeros((6000, 6000, 3), np.uint8)
    write_clip(tmp_path / "huge.avi", [huge], codec="mjpeg")
    no_video = ["is not a video, or its beginning is damaged"]
    for name, reasons in {
        "sound.mp4": ["has no video stream"],
        "photo.mp4": no_video,
        "list.mp4": no_video,
        "empty.mp4": no_video,
        "huge.avi": ["has frames of more than 33,554,432 pixels, or of none"],
    }.items():
        assert read_frames(str(tmp_path / name)) == ({}, [f": {reason}" for reason in reasons])
    far = write_numbered(tmp_path / "far.mp4", 60, g="250")
    monkeypatch.setattr(video, "WORK", 128 * 96 * 30)
    with pytest.raises(InputError, match="too far from a key frame"):
        read_item(f"{far}#2000")
    monkeypatch.undo()
    one = write_numbered(tmp_path / "one.mp4", 1)
    assert read_frames(one) == ({0: 0}, [])
    for name in ("x", "-1", "1e3", "9" * 99):
        with pytest.raises(InputError, match="MILLISECONDS"):
            read_item(f"{one}#{name}")
    for seconds in (0, -1, float("nan"), float("inf")):
        every(seconds)
        with pytest.raises(UsageError, match="frame_every"):
            opener("openers", ".mp4")


def test_closed_videos_release_their_decoders_at_once(tmp_path):
    """A decoder has threads and frames, which must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        for number in range(video.OPEN + 2):
            read_item(f"{write_numbered(tmp_path / f'{number}.mp4', 1)}#0")
        alive = [one for one in gc.get_objects() if isinstance(one, video._Video)]
    finally:
        gc.enable()
    assert len(alive) == video.OPEN


@pytest.fixture
def photos(shared, tmp_path):
    """Two class folders of three photos."""
    for path, label in caltech_photos(shared, "train", 2, 3):
        place = tmp_path / "photos" / label
        place.mkdir(parents=True, exist_ok=True)
        (place / Path(path).name).write_bytes(Path(path).read_bytes())
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path):
    tiny(tmp_path / "model")
    return "--model", f"local-dir:{tmp_path / 'model'}"


@pytest.fixture
def index(photos, model, tmp_path):
    ok("index build", photos, *model, "--out", tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def inbox(photos, tmp_path):
    """Three clips, which show photos of the first, of the second, and of both classes, and a photo."""
    (inbox := tmp_path / "inbox").mkdir()
    shots = [
        [
            np.asarray(Image.open(path).convert("RGB").resize((128, 96)))
            for path in sorted(place.iterdir())
        ]
        for place in sorted(photos.iterdir())
    ]
    first, second = shots
    for name, seconds in {
        "first": first,
        "second": second,
        "mixed": [second[0], first[0], second[1], second[2]],
    }.items():
        write_clip(inbox / f"{name}.mp4", [shot for shot in seconds for _ in range(5)], rate=5)
    (inbox / "photo.png").write_bytes(b"")
    Image.fromarray(first[0]).save(inbox / "photo.png")
    return inbox


def test_a_video_has_one_answer_from_the_mean_of_its_frames(index, inbox):
    rows = json_rows(ok("classify", index, inbox, "--format", "json"))
    frames = json_rows(ok("classify", index, inbox, "--frames", "--top", "2", "--format", "json"))
    assert sorted(Path(row["input"]).name for row in rows) == [
        "first.mp4",
        "mixed.mp4",
        "photo.png",
        "second.mp4",
    ]
    assert len(frames) == 3 + 4 + 1 + 3
    for row in rows:
        own = [frame for frame in frames if frame["input"].startswith(row["input"])]
        chances = [dict(zip(frame["labels"], frame["probabilities"], strict=True)) for frame in own]
        means = {label: np.mean([chance[label] for chance in chances]) for label in chances[0]}
        label = max(means, key=means.get)
        assert row["label"] == label
        assert row["probability"] == pytest.approx(means[label], abs=1e-4)
        if len(own) == 1:
            assert row["frame"] is None
            continue
        best = next(frame for frame in own if frame["input"] == row["frame"])
        assert row["no_match"] == best["no_match"]
    item = frames[0]["input"]
    (named,) = json_rows(ok("classify", index, item, "--format", "json"))
    assert named["input"] == item
    assert "first.mp4#" in ok("classify", index, inbox, "--format", "csv").stdout
    many = json_rows(
        ok(
            "classify",
            index,
            inbox / "first.mp4",
            "--frames",
            "--frame-every",
            "0.5",
            "--format",
            "json",
        )
    )
    assert [row["input"].rpartition("#")[2] for row in many] == [
        "0",
        "600",
        "1000",
        "1600",
        "2000",
        "2600",
    ]
    failed(
        command_line("classify", index, inbox, "--frame-every", "0"), 2, "frame_every 0: give 0.001"
    )


def test_a_video_is_sorted_by_its_answer_and_restored(index, inbox, tmp_path):
    answers = {
        row["input"]: row for row in json_rows(ok("classify", index, inbox, "--format", "json"))
    }
    before = {path: path.read_bytes() for path in inbox.iterdir()}
    out = tmp_path / "sorted"
    done = ok("sort", index, inbox, "--into", out, "--move", "--min-probability", "0")
    assert "moved 4 photos" in done.output
    assert not any(inbox.iterdir())
    with (out / "sorted.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["input"] for row in rows} == set(answers)
    for row in rows:
        answer = answers[row["input"]]
        place = "no match" if answer["no_match"] else answer["label"]
        assert row["output"] == f"{place}/{Path(row['input']).name}"
        assert float(row["probability"]) == pytest.approx(answer["probability"], abs=1e-4)
        data = (out / row["output"]).read_bytes()
        assert data == before[Path(row["input"])]
        assert row["digest"] == hashlib.sha256(data).hexdigest()
    assert "sorting of 4 photos" in ok("sort", "--undo", "--into", out).output
    assert {path: path.read_bytes() for path in inbox.iterdir()} == before


def test_frames_are_shots_of_an_index(photos, inbox, model, tmp_path):
    for place in sorted(photos.iterdir()):
        name = "first" if place == min(photos.iterdir()) else "second"
        (inbox / f"{name}.mp4").rename(place / "clip.mp4")
    ok("index build", photos, *model, "--out", tmp_path / "index")
    sources = Index.load(tmp_path / "index").labels["source"].to_pylist()
    clip = min(photos.iterdir()) / "clip.mp4"
    assert [name for name in sources if name.startswith(str(clip))] == [
        f"{clip}#{time}" for time in (0, 1000, 2000)
    ]
    classifier = Classifier.load(tmp_path / "index")
    assert classifier.predict(f"{clip}#1000").label == clip.parent.name
    ok("sort", tmp_path / "index", clip, "--into", tmp_path / "out")
    assert (tmp_path / "out" / clip.parent.name / "clip.mp4").read_bytes() == clip.read_bytes()


def test_suggestions_and_searches_name_frames(index, inbox, model):
    """The suggested frame of a clip is the one that looks least like the others."""
    odd = inbox / "odd.mp4"
    write_clip(odd, [marked(number) for number in (0, 0, 4095, 0)], rate=1)
    rows = json_rows(ok("suggest", odd, "-n", "4", *model, "--format", "json"))
    assert rows[0]["input"] == f"{odd}#2000"
    assert {row["input"] for row in rows} == {f"{odd}#{time}" for time in (0, 1000, 2000, 3000)}
    (first,) = json_rows(ok("suggest", inbox, "-n", "1", "--index", index, "--format", "json"))
    assert Path(first["input"]).is_file() or first["input"].rpartition("#")[0].endswith(".mp4")
    found = json_rows(ok("find", inbox, f"{odd}#0", "--index", index, "--format", "json"))
    names = {row["input"] for row in found}
    assert f"{odd}#2000" in names
    assert f"{odd}#0" not in names  # it is the example


@pytest.fixture
def upload(inbox):
    """Return a function that posts files of the inbox to a path."""

    def post(http, path, *names, status=200, **fields):
        sent = [("images", (name, (inbox / name).read_bytes())) for name in names]
        headers = {"Authorization": "Bearer t"}
        answer = http.post(path, files=sent, data=fields, headers=headers)
        assert answer.status_code == status, answer.text
        return answer.json()

    return post


def test_an_uploaded_video_has_the_answer_of_the_command_and_a_picture(index, inbox, upload):
    names = ["mixed.mp4", "photo.png", "mixed.mp4", "cut.mp4", "second.mp4"]
    rows = json_rows(ok("classify", index, inbox, "--format", "json"))
    wanted = {Path(row["input"]).name: row for row in rows}
    (inbox / "cut.mp4").write_bytes((inbox / "mixed.mp4").read_bytes()[:500])
    with TestClient(app_of(index, token="t")) as http:
        answer = upload(http, "/v1/classify?features=true", *names)
        assert [one["input"] for one in answer["results"]] == [*names[:3], "second.mp4"]
        for one in answer["results"]:
            row = wanted[one["input"]]
            assert (one["label"], one["no_match"]) == (row["label"], row["no_match"])
            assert one["probability"] == pytest.approx(row["probability"], abs=1e-4)
            assert one.get("frame") == (row["frame"] and Path(row["frame"]).name)
            assert ("feature" in one) == (row["frame"] is None) == ("picture" not in one)
            if row["frame"]:
                with urlopen(one["picture"]) as data:
                    assert Image.open(data).size == (128, 96)
        assert [one["source"] for one in answer["skipped"]] == ["cut.mp4"]
        refused = upload(http, "/v1/classify", "cut.mp4", status=422)
        assert refused["detail"].startswith("cut.mp4: is not a video, or its beginning is damaged")
        added = upload(http, "/v1/indexes/index/keys", "mixed.mp4", status=201, label="new")
        assert len(added["key_ids"]) == 4


def test_a_video_is_labelled_as_one_visit_and_a_dropped_one_by_its_frames(
    inbox, model, tmp_path, upload
):
    sources = list(open_inputs([str(inbox)]))
    reader = Reader(load_backbone(model[1], device="cpu"))
    with TestClient(labelling_app(tmp_path / "labelled", sources, reader)) as http:

        def settled(photos):
            for _ in range(400):
                now = http.get("/v1/label").json()
                if not now["busy"] and now["photos"] == now["encoded"] == photos:
                    return now
                time.sleep(0.05)
            raise AssertionError(now)

        state = settled(11)
        names = {photo: Path(http.app.state.labelling.path(photo)).name for photo in range(11)}
        for queued in state["queue"]:
            own = names[queued["photo"]].rpartition("#")[0]
            others = {names[photo].rpartition("#")[0] for photo in queued["similar"]}
            assert (queued["visit"] is None) == (not own)
            assert not own or others == {own}
            for what in ("image?size=160", "image?size=1024", "file"):
                picture = http.get(f"/v1/label/photos/{queued['photo']}/{what}").content
                assert Image.open(io.BytesIO(picture)).size == (128, 96)
        write_clip(inbox / "new.mp4", [marked(number) for number in range(4)], rate=1)
        kept = upload(http, "/v1/label/photos", "new.mp4", "mixed.mp4", "photo.png", status=201)
        assert len({*kept["photos"]}) == 9
        assert max(kept["photos"][4:]) < 11  # which the session already has
        settled(15)
        own = [Path(http.app.state.labelling.path(photo)) for photo in kept["photos"][:4]]
        assert [path.name for path in own] == [f"new.mp4#{1000 * time}.jpg" for time in range(4)]
        assert [path.read_bytes() for path in own] == [
            read_item(f"{inbox / 'new.mp4'}#{1000 * time}") for time in range(4)
        ]


def test_help_and_the_summary_of_other_files_depend_on_the_extra(
    index, inbox, photos, model, tmp_path, monkeypatch
):
    assert "--frame-every" in ok("classify --help -v").output
    monkeypatch.setitem(hooks.EXTRAS, "video", ("no_such_module", hooks.VIDEOS))
    assert "--frame-every" not in ok("classify --help -v").output
    for clip in inbox.glob("*.mp4"):
        (photos / "clips").mkdir(exist_ok=True)
        (photos / "clips" / clip.name).write_bytes(clip.read_bytes())
    install = "; to read .mp4, run "
    assert install in ok("classify", index, inbox).stderr
    assert install in ok("index build", photos, *model, "--out", tmp_path / "other").stderr
    done = command_line("label", photos / "clips", *model, "--out", tmp_path / "labelled")
    failed(done, 1, install)
    with TestClient(app_of(index)) as http:
        sent = [("images", ("first.mp4", (inbox / "first.mp4").read_bytes()))]
        assert install in http.post("/v1/classify", files=sent).json()["detail"]
