"""Sorting photos into folders never overwrites or loses a photo, even if it is killed. Also runs as a script."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import signal
import subprocess
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import buckets
import killing
import numpy as np
import pytest
from conftest import AS_ROOT, examples, failed, few, fitted, json_rows, ok, sampled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import caltech_photos
from tables import unit, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.data import remote
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import open_inputs, read_item
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.evaluation.held_out import held_out_probabilities, threshold_of
from retrieval_tip.files import locked_folder
from retrieval_tip.fit.forms import FORMS
from retrieval_tip.labelling.placing import (
    MANIFEST,
    Placed,
    read_manifest,
    safe_name,
    write_manifest,
)
from retrieval_tip.labelling.sort import class_folders, sort_photos, undo_sort

CLASSES = ["../up", "no match", "c"]
FOLDERS = ["%2E.%2Fup", "%6Eo match", "c"]
POINTS = {"0": np.eye(16)[0], "1": np.eye(16)[1], "2": np.eye(16)[2], "9": np.eye(16)[9]}
POINTS["?"] = POINTS["0"] + POINTS["1"] / 2 + POINTS["2"] / 2
SURE = 0.97


class Decoder(Reader):
    """An encoder for text files. The first character of a file selects its feature."""

    def blocks(self, source):
        for start in range(0, len(source), 3):
            found = []
            for position in range(start, min(start + 3, len(source))):
                try:
                    data = read_item(source.paths[position])
                    feature = unit(POINTS[chr(data[0])][None])[0]
                    found.append((position, feature, hashlib.sha256(data).hexdigest()))
                except InputError as error:
                    self._skip(source.sources[position], str(error))
            if found:
                positions, features, digests = zip(*found, strict=True)
                yield FeatureBlock(
                    np.array(positions), np.stack(features).astype(np.float32), list(digests)
                )


def make_index():
    ids = np.arange(60) % 3
    cache = fitted(
        Index.from_features(unit(4 * np.eye(16)[ids] + unit_rows(60, 16)), ids, CLASSES),
        forms=FORMS[:1],
    )
    cache.settings = replace(cache.settings, least_cache=0.3)
    return cache


def folder_of(label):
    return class_folders([], [label])[label]


def sort(index, inbox, out, **options):
    options = {"min_probability": SURE} | options
    return sort_photos(index, list(open_inputs([str(inbox)])), Decoder(), out, **options)


def work(job, steps):
    """Sort or undo in a process that the test kills."""
    steps.writes()
    steps.events("os.symlink", "os.link", "os.chmod", "os.utime")
    if job["action"] == "undo":
        undo_sort(job["out"])
    else:
        sort(INDEX, job["inbox"], job["out"], action=job["action"])


if __name__ == "__main__":
    with killing.one_thread():
        INDEX = make_index()  # once, before forking, to save time
    killing.serve(work)
    raise SystemExit


@pytest.fixture(scope="module")
def index():
    return make_index()


def test_at_most_wrong_chooses_the_lowest_probability_that_holds_on_held_out_photos(tmp_path, run):
    ids = np.arange(90) % 3
    noisy = fitted(
        Index.from_features(unit(1.5 * np.eye(16)[ids] + unit_rows(90, 16)), ids, CLASSES)
    )
    held = held_out_probabilities(noisy)
    sure = held.pred_probs.max(1)
    for most in (0.0, 0.03, 0.1, 0.9):
        found = threshold_of(held_out_probabilities(noisy), most)
        shares = {p: (~held.right[sure >= p]).mean() for p in sure}
        assert found.probability == min(p for p, share in shares.items() if share <= most)
        assert (found.kept, found.n) == ((sure >= found.probability).sum(), 90)
        assert found.wrong == shares[found.probability] <= found.highest
    worst = replace(
        noisy, settings=noisy.settings.override(alpha=0.0)
    )  # all answers are the first class
    with pytest.raises(InputError, match="label more"):
        threshold_of(held_out_probabilities(worst), 0.1)
    write_table(tmp_path / "new.parquet", unit_rows(20, 16, 5), ids=[f"{i}.jpg" for i in range(20)])
    noisy.save(tmp_path / "own")
    out = ("--into", tmp_path / "out", "--dry-run")
    chosen = run("sort", tmp_path / "own", tmp_path / "new.parquet", *out, "--at-most-wrong", "3%")
    least = threshold_of(held_out_probabilities(noisy), 0.03)
    assert f"{least}\n" in chosen.stderr
    of = f"Of 90 examples, each classified by the others, {least.kept} reach the limit of "
    assert (
        f"{of}{100 * least.probability:.0f} %, {round(least.wrong * least.kept)} of these wrong. If "
        in chosen.stderr
    )
    with pytest.raises(UsageError, match="no min_probability"):
        sort_photos(noisy, [], Reader(), tmp_path, min_probability=0.5, at_most_wrong=0.1)


ODD, ODD_SORTED = ("odd", "odd") if os.name == "nt" else ("odd\udcff\n", "odd\udcff%0A")
PHOTOS = {
    "a/x.jpg": "0 first",
    "b/x.jpg": "0 second",
    "c/x.jpg": "0 first",
    "a/y.jpg": "1",
    "a/z.jpg": "2",
    f"b/{ODD}.jpg": "9 odd",
    "b/unsure.jpg": "?",
}


@pytest.fixture
def inbox(tmp_path):
    return make_inbox(tmp_path / "inbox")


def make_inbox(inbox):
    for name, text in PHOTOS.items():
        (inbox / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox / name).write_text(text)
    return inbox


def files(folder, hidden=False):
    """Return the text of each file below a folder, except links and the manifest."""
    every = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {
        path.relative_to(folder).as_posix(): path.read_text(errors="surrogateescape")
        for path in every
        if not path.is_symlink()
        and path.name != MANIFEST
        and (hidden or not path.name.startswith("."))
    }


SORTED = {
    f"{FOLDERS[0]}/x.jpg": "0 first",
    f"{FOLDERS[0]}/x-2.jpg": "0 second",
    f"{FOLDERS[1]}/y.jpg": "1",
    "c/z.jpg": "2",
    f"no match/{ODD_SORTED}.jpg": "9 odd",
    "not sure/unsure.jpg": "?",
}


@pytest.mark.parametrize("action", ["copy", "move", "link"])
def test_photos_are_sorted_and_undo_restores_them(index, inbox, tmp_path, action):
    out = tmp_path / "out"
    before = files(inbox)
    planned = sort(index, inbox, out, action=action, dry_run=True)
    assert (out.exists(), files(inbox)) == (False, before)
    result = sort(index, inbox, out, action=action)
    assert result.rows == planned.rows == read_manifest(out)
    assert (result.done, Counter(row.action for row in result.rows)) == (6, {action: 6, "kept": 1})
    assert files(inbox) == ({"c/x.jpg": "0 first"} if action == "move" else before)
    if action == "link":
        assert {name: (out / name).read_text() for name in SORTED} == SORTED
        assert all((out / name).is_symlink() for name in SORTED)
    else:
        assert files(out, hidden=True) == SORTED
    for row in result.rows:
        assert hashlib.sha256((out / row.output).read_bytes()).hexdigest() == row.digest
    again = sort(index, inbox, out, action=action)
    assert (again.done, len(read_manifest(out))) == (0, 7)
    undone = undo_sort(out)
    assert (undone.done, undone.skipped) == (6, [])  # the seventh was there before
    assert (files(inbox), list(out.iterdir())) == (before, [])
    with pytest.raises(InputError, match=MANIFEST):
        undo_sort(out)


def test_undo_restores_and_counts_only_unchanged_photos(index, inbox, tmp_path):
    out = tmp_path / "out"
    sort(index, inbox, out, action="move")
    sort(index, inbox, out)  # c/x.jpg, which was kept
    (out / FOLDERS[1] / "y.jpg").write_text("edited")
    (out / "c" / "z.jpg").rename(inbox / "a" / "z.jpg")  # restored by hand
    (inbox / "b" / "x.jpg").write_text("another photo")
    (out / "not sure" / "unsure.jpg").unlink()
    result = undo_sort(out)
    assert (result.done, str(result)) == (2, "undid the sorting of 2 photos (1 no match)")
    for left in (
        [one.source for one in result.skipped],
        [row.output for row in read_manifest(out)],
    ):
        assert {path.rpartition("/")[2] for path in left} == {"y.jpg", "x-2.jpg", "unsure.jpg"}
    assert files(out) == {f"{FOLDERS[1]}/y.jpg": "edited", f"{FOLDERS[0]}/x-2.jpg": "0 second"}
    assert files(inbox)["b/x.jpg"] == "another photo"


def test_paths_with_any_characters_can_be_sorted_again_and_undone(index, tmp_path):
    inbox = tmp_path / "inbox"
    out = tmp_path / "out"
    names = ["a\rb.jpg", "\r.jpg", "c\r\rd,.jpg", "e\r\n.jpg", 'f\r".jpg', "g\r,\n", "h.jpg"]
    photos = {name: f"0 {name!r}" for name in names}
    inbox.mkdir()
    for name, text in photos.items():
        (inbox / name).write_text(text)
    sort(index, inbox, out, action="move")
    assert {row.input for row in read_manifest(out)} == {
        str(inbox / name) for name in names if name.endswith("jpg")
    }
    assert sort(index, inbox / "g\r,\n", out).done == 1
    assert (undo_sort(out).skipped, files(inbox)) == ([], photos)


def test_sorting_links_or_into_the_same_folder_loses_nothing(index, inbox, tmp_path):
    (inbox / "link.jpg").symlink_to(inbox / "a" / "z.jpg")
    (tmp_path / "same").symlink_to(inbox)
    sort(index, inbox / "link.jpg", tmp_path / "out", action="move")
    assert files(tmp_path / "out") == {"c/link.jpg": "2"}
    assert not (inbox / "link.jpg").is_symlink()
    assert files(inbox) == PHOTOS
    for _ in range(2):
        sort(
            index, inbox, tmp_path / "same", action="move"
        )  # the output folder is the input folder
        assert Counter(files(inbox).values()) == Counter(PHOTOS.values())
    for name in SORTED:
        assert files(inbox)[name] == SORTED[name]
    undo_sort(tmp_path / "same")
    assert files(inbox) == PHOTOS


def test_a_class_folder_that_is_a_link_is_refused(index, inbox, tmp_path):
    out = tmp_path / "out"
    home = tmp_path / "home"
    sort(index, inbox, out)
    (out / "c").rename(home)
    (out / "c").symlink_to(home)
    (home / "empty.jpg").touch()
    before = files(tmp_path, hidden=True)
    for call in (
        lambda: undo_sort(out),
        lambda: sort(index, inbox, out),
        lambda: sort(index, inbox, out, action="move"),
    ):
        with pytest.raises(InputError, match=f"{out}/c: is a link"):
            call()
        assert files(tmp_path, hidden=True) == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "c").symlink_to(home)
    with pytest.raises(InputError, match="is a link"):
        sort(index, inbox, tmp_path / "new")
    assert files(tmp_path, hidden=True) == before
    (out / "c").unlink()
    home.rename(out / "c")
    assert undo_sort(out).skipped == []
    assert files(tmp_path) == {f"inbox/{name}": text for name, text in PHOTOS.items()} | {
        "out/c/empty.jpg": ""
    }


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["copy", "move", "link", "undo", "delete", "edit", "take"]),
        st.sampled_from([0.0, SURE, 1.0]),
        st.integers(0, 50),
    ),
    max_size=6,
)


@given(operations=OPERATIONS)
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_sequence_of_actions_loses_a_photo(index, tmp_path, operations):
    inbox = make_inbox(tmp_path / "inbox")
    out = tmp_path / "out"
    alive = set(PHOTOS.values())
    for operation, least, place in operations:
        if operation in ("copy", "move", "link") and files(inbox):
            sort(index, inbox, out, action=operation, min_probability=least)
        elif operation == "undo" and (out / MANIFEST).exists():
            undo_sort(out)
        elif operation in ("delete", "edit") and files(out):
            path = out / sorted(files(out))[place % len(files(out))]
            text = path.read_text(errors="surrogateescape")
            path.unlink()
            if operation == "edit":
                path.write_text(f"2 edited {place}")
                alive.add(f"2 edited {place}")
            alive -= {text} - {*files(inbox).values(), *files(out).values()}
        elif operation == "take":
            (out / FOLDERS[0]).mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path := out / FOLDERS[0] / "x.jpg"):
                path.write_text(f"0 taken {place}")
                alive.add(f"0 taken {place}")
        assert alive <= {*files(inbox).values(), *files(out).values()}, operation
        assert "" not in files(out).values()
    shutil.rmtree(inbox)
    shutil.rmtree(out, ignore_errors=True)


class Killed(killing.Server):
    def sort(self, action, inbox, out, **when):
        return self.run({"action": action, "inbox": str(inbox), "out": str(out)}, **when)


@pytest.fixture(scope="module")
def process(tmp_path_factory, warm_path):
    process = Killed(__file__, tmp_path_factory.mktemp("process"), warm_path)
    yield process
    process.close()


@killing.needs_fork
@pytest.mark.parametrize("action", ["copy", "move", "link", "undo"])
def test_a_run_killed_at_any_step_loses_nothing_and_the_next_one_completes_it(
    process, index, tmp_path, action
):
    def start(name):
        inbox = make_inbox(tmp_path / name / "inbox")
        out = tmp_path / name / "out"
        if action == "undo":
            sort(index, inbox, out, action="move")
        return inbox, out

    def state(inbox, out):
        return (
            files(inbox, hidden=True),
            files(out, hidden=True),
            sorted(p.name for p in out.rglob("*") if p.is_symlink()),
        )

    inbox, out = start("whole")
    assert process.sort(action, inbox, out) == 0
    expected = state(inbox, out)
    number = len(process.steps)
    assert number > 20
    for step in sampled(number, 6):
        inbox, out = start(str(step))
        assert process.sort(action, inbox, out, step=step) == -signal.SIGKILL
        there = [*files(inbox).values(), *files(out).values()]
        assert set(PHOTOS.values()) <= set(there)
        assert set(there) <= {*PHOTOS.values(), ""}
        if files(inbox) and (action != "undo" or (out / MANIFEST).exists()):
            assert process.sort(action, inbox, out) == 0
        assert state(inbox, out) == expected
        if action != "undo":
            undo_sort(out)
        assert (files(inbox), files(out)) == (PHOTOS, {})


@killing.needs_fork
@pytest.mark.parametrize("action", ["copy", "undo"])
def test_the_next_run_removes_the_hidden_copy_of_a_killed_one(
    process, index, inbox, tmp_path, request, action
):
    out = (
        tmp_path / "out" if action == "copy" else request.getfixturevalue("small_disk")(256) / "out"
    )

    def start(step):
        if action == "undo":  # restoring photos from another disk copies them
            sort(index, inbox, out, action="move")
        return process.sort(action, inbox, out, step=step)

    assert start(None) == 0
    last = max(step for step, name in enumerate(process.steps) if name == "os.rename")
    shutil.rmtree(out)
    assert start(last) == -signal.SIGKILL
    assert len([*tmp_path.rglob(".*.tmp")]) == 1
    undo_sort(out)
    assert [*tmp_path.rglob(".*.tmp")] == []


def test_a_full_disk_leaves_only_complete_photos_and_the_next_run_continues(
    index, inbox, tmp_path, monkeypatch
):
    disk = killing.FullDisk(monkeypatch)
    sort(index, inbox, tmp_path / "whole")
    for stop in few(range(1, disk.calls + 1), 8):
        disk.calls = 0
        disk.stop = stop
        out = tmp_path / str(stop)
        with pytest.raises(InputError, match=r"No space left[^\n]*$"):
            sort(index, inbox, out)
        assert set(files(out, hidden=True).items()) <= set(SORTED.items())
        assert files(inbox) == PHOTOS
        disk.stop = 0
        sort(index, inbox, out)
        assert files(out, hidden=True) == SORTED


def test_moving_to_a_full_disk_loses_nothing(index, inbox, small_disk):
    disk = small_disk(256)
    (inbox / "a" / "large.jpg").write_text("0" * 400_000)
    before = files(inbox)
    with pytest.raises(InputError, match="No space left"):
        sort(index, inbox, disk / "out", action="move")
    there = files(inbox) | files(disk / "out")
    assert set(there.values()) == set(before.values())
    (inbox / "a" / "large.jpg").unlink()
    sort(index, inbox, disk / "out", action="move")
    assert files(disk / "out", hidden=True) == SORTED
    undo_sort(disk / "out")
    assert files(inbox) == PHOTOS


@given(st.text(min_size=1, max_size=300), st.text(min_size=1, max_size=300))
def test_folder_names_are_safe_and_distinct(one, other):
    for name in (one, other):
        safe = folder_of(name)
        assert 0 < len(safe.encode("utf-8", "surrogatepass")) <= 203
        assert not set(safe) & set('/\\:*?"<>|\0\n')
        assert safe[0] not in ". "
        assert safe[-1] not in ". "
        assert safe.casefold() not in ("no match", "not sure", MANIFEST)
    assert (folder_of(one) == folder_of(other)) == (one == other)
    both = class_folders([], [one, other])
    assert len({name.casefold() for name in both.values()}) == len({one, other})


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("..", "%2E%2E"),
        ("a/b", "a%2Fb"),
        ("a%2Fb", "a%252Fb"),
        ("100%", "100%"),
        ("con", "%63on"),
        ("NUL.x", "%4EUL.x"),
        ("", "%00"),
        ("Äpfel 1.5", "Äpfel 1.5"),
        ("x. ", "x.%20"),
    ],
)
def test_unsafe_names_are_escaped(name, safe):
    assert safe_name(name) == safe


def test_a_damaged_manifest_is_refused(index, inbox, tmp_path):
    out = tmp_path / "out"
    sort(index, inbox, out)
    text = (out / MANIFEST).read_bytes()
    for wrong in (
        text[:-9],
        b"",
        b"a,b\n1,2\n",
        text.replace(b",c/z.jpg", b",../z.jpg"),
        text.replace(b",0.", b",x."),
        b"\xff\0",
    ):
        (out / MANIFEST).write_bytes(wrong)
        for call in (lambda: sort(index, inbox, out), lambda: undo_sort(out)):
            with pytest.raises(InputError, match=MANIFEST):
                call()
        assert (out / MANIFEST).read_bytes() == wrong


def test_a_locked_folder_a_file_and_an_unknown_action_are_refused(index, inbox, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        locked_folder(tmp_path / "out", alone=True, wait=0),
        pytest.raises(InputError, match="another process"),
    ):
        sort(index, inbox, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        sort(index, inbox, tmp_path / "file")
    with pytest.raises(UsageError, match="action"):
        sort(index, inbox, tmp_path / "out", action="burn")


def test_the_command_sorts_real_photos(shared, things, run, tmp_path):
    inbox = tmp_path / "inbox"
    out = tmp_path / "out"
    inbox.mkdir()
    for place, (path, _) in enumerate(caltech_photos(shared, "test", 3, 2)):
        shutil.copy(path, inbox / f"{place}.jpg")
    (inbox / "broken.jpg").write_bytes(b"no image")
    before = {path.name: path.read_bytes() for path in inbox.iterdir()}
    shown = run("sort", things, inbox, "--into", out, "--dry-run")
    assert (shown.exit_code, out.exists()) == (3, False)
    done = run("sort", things, inbox, "--into", out, "--move")
    assert (done.exit_code, "moved 6 photos" in done.stdout, "broken.jpg" in done.stderr) == (
        3,
        True,
        True,
    )
    rows = list(csv.DictReader((out / MANIFEST).read_text().splitlines()))
    assert [{**row, "action": "copy"} for row in rows] == list(
        csv.DictReader(shown.stdout.splitlines())
    )
    assert [path.name for path in inbox.iterdir()] == ["broken.jpg"]
    found = json_rows(run("classify", things, out, "--format", "json"))
    answers = {Path(row["input"]).name: row["label"] for row in found}
    for row in rows:
        assert row["label"] == answers[Path(row["output"]).name]
        assert row["output"].split("/")[0] == (
            row["label"] if float(row["probability"]) >= 0.5 else "not sure"
        )
    done = run("sort --undo --into", out)
    assert (done.exit_code, "undid the sorting of 6 photos" in done.stdout) == (0, True)
    assert {path.name: path.read_bytes() for path in inbox.iterdir()} == before
    for wrong in (["--undo", things], ["--undo", "--move"], ["--undo", "--dry-run"], [things], []):
        assert run("sort", *wrong, "--into", out).exit_code == 2


@contextmanager
def read_only(folder):
    """Refuse changes of a folder, also by root."""
    if not AS_ROOT:
        folder.chmod(0o555)
    elif subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("SKIPPED: chattr cannot protect a folder from root here")
    try:
        yield
    finally:
        folder.chmod(0o755) if not AS_ROOT else subprocess.run(["chattr", "-i", folder], check=True)


def test_photos_that_cannot_be_moved_or_restored_are_skipped(shared, things, run, tmp_path):
    inbox = tmp_path / "inbox"
    out = tmp_path / "out"
    for place, (path, _) in enumerate(caltech_photos(shared, "test", 3, 1)):
        (inbox / str(place)).mkdir(parents=True)
        shutil.copy(path, inbox / str(place) / "x.jpg")
    shutil.copytree(inbox / "0", inbox / "same")
    photos = {path: path.read_bytes() for path in inbox.glob("*/*")}
    with read_only(inbox / "0"):
        for moved in ("moved 2 photos", "moved 0 photos"):
            done = run("sort", things, inbox, "--into", out, "--move")
            assert (done.exit_code, moved in done.stdout) == (3, True), done.output
            assert f"{inbox / '0' / 'x.jpg'}: cannot be moved: " in done.stderr
            assert f"{inbox / 'same' / 'x.jpg'}: has the same name" in done.stderr
            assert "2 inputs could not be sorted" in done.stderr
        assert sorted(inbox.glob("*/*")) == [inbox / "0" / "x.jpg", inbox / "same" / "x.jpg"]
    with read_only(inbox / "1"):
        done = run("sort --undo --into", out)
        assert (done.exit_code, "of 1 photo" in done.stdout) == (3, True), done.output
        assert f"cannot be restored: {inbox / '1' / 'x.jpg'}: " in done.stderr
    ok("sort --undo --into", out)
    assert ({path: path.read_bytes() for path in inbox.glob("*/*")}, [*out.iterdir()]) == (
        photos,
        [],
    )


def test_photos_on_a_read_only_disk_are_skipped_and_not_copied(index, tmp_path, small_disk):
    disk = small_disk(256)
    out = tmp_path / "out"
    make_inbox(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    result = sort(index, disk, out, action="move")
    assert (result.done, len(result.skipped), files(disk), files(out, hidden=True)) == (
        0,
        7,
        PHOTOS,
        {},
    )


def test_undo_of_a_manifest_by_somebody_else_creates_nothing_but_photos(run, tmp_path):
    out = tmp_path / "out"
    home = tmp_path / "home"
    (out / "bird").mkdir(parents=True)
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "mine.jpg").write_text("my photo")
    rows = []
    for place, name in enumerate(
        ("photos/x.jpg", "run/evil.desktop", ".bashrc", "photos/mine.jpg")
    ):
        (out / "bird" / f"{place}.jpg").write_text(name)
        rows.append(
            Placed(
                str(home / name),
                "bird",
                1.0,
                f"bird/{place}.jpg",
                "move",
                hashlib.sha256(name.encode()).hexdigest(),
            )
        )
    write_manifest(out, rows)
    done = run("sort --undo --into", out)
    assert (done.exit_code, done.stderr.count("is not called like an image")) == (3, 2)
    assert files(home) == {"photos/x.jpg": "photos/x.jpg", "photos/mine.jpg": "my photo"}
    assert files(out) == {
        "bird/1.jpg": "run/evil.desktop",
        "bird/2.jpg": ".bashrc",
        "bird/3.jpg": "photos/mine.jpg",
    }
    write_manifest(out, [replace(rows[0], action="burn")])
    done = run("sort --undo --into", out)
    failed(done, 1, MANIFEST)


@pytest.mark.parametrize(
    "item", ["http://127.0.0.1:9/x.jpg", "home/x.jpg", "/a/b/../../x.jpg", "/a//x.jpg", "/a\0.jpg"]
)
def test_undo_only_moves_photos_to_paths_that_sort_could_have_listed(
    run, tmp_path, monkeypatch, item
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "bird").mkdir(parents=True)
    (tmp_path / "out" / "bird" / "1.jpg").write_text("photo")
    write_manifest(
        tmp_path / "out",
        [Placed(item, "bird", 1.0, "bird/1.jpg", "move", hashlib.sha256(b"photo").hexdigest())],
    )
    before = files(tmp_path)
    done = run("sort --undo --into out")
    assert (done.exit_code, "was not written by sort" in done.stderr, files(tmp_path)) == (
        1,
        True,
        before,
    )


@pytest.mark.parametrize("original", [None, "", "another photo"])
def test_undo_deletes_no_hidden_file_beside_a_photo(index, run, tmp_path, original):
    """A hidden file that a killed undo has left is named after its photo."""
    out = tmp_path / "out"
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / ".photo.0123abcd.tmp").write_text("mine")
    (home / "photos" / f".{hashlib.sha256(b'another').hexdigest()}.0123abcd.tmp").write_text("mine")
    if original is not None:
        (home / "photos" / "x.jpg").write_text(original)
    (out / "bird").mkdir(parents=True)
    (out / "bird" / "1.jpg").write_text("photo")
    digest = hashlib.sha256(b"photo").hexdigest()
    write_manifest(out, [Placed(f"{home}/photos/x.jpg", "bird", 1.0, "bird/1.jpg", "move", digest)])
    run("sort --undo --into", out)
    assert [path.read_text() for path in home.glob("*/.*")] == ["mine", "mine"]


@pytest.mark.parametrize("wrong", ["damaged", "missing"])
def test_a_failed_sort_leaves_nothing(things, run, tmp_path, wrong):
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    before = sorted(tmp_path.rglob("*"))
    done = run("sort", things, tmp_path / f"{wrong}.jpg", "--into", tmp_path / "new" / "sorted")
    assert (done.exit_code, sorted(tmp_path.rglob("*"))) == (1, before)


def test_photos_from_buckets_and_tables_can_only_be_copied(
    shared, things, run, tmp_path, monkeypatch
):
    path = caltech_photos(shared, "test", 1, 1)[0][0]
    buckets.use(monkeypatch, buckets.endpoint())
    photos = f"s3://{buckets.fresh_bucket()}/a.jpg"
    remote.system_of(photos).pipe_file(photos, path.read_bytes())
    cache = Index.load(things)
    table = write_table(
        tmp_path / "t.parquet", unit(np.asarray(cache.keys[:2])), ids=[str(path), "gone"]
    )
    for place, (source, status) in enumerate(((photos, 0), (table, 3))):
        out = tmp_path / str(place)
        for action in ("--move", "--link"):
            done = run("sort", things, source, "--into", out, action)
            assert (done.exit_code, f"{action[2:]}: " in done.stderr, out.exists()) == (
                2,
                True,
                False,
            )
        assert run("sort", things, source, "--into", out).exit_code == status
        assert [found.read_bytes() for found in out.glob("*/*.jpg")] == [path.read_bytes()]
        ok("sort --undo --into", out)
        assert not list(out.iterdir())
