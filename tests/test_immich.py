"""Suggestions for an Immich server: exact, reversible, and never on the photos or in the tags of somebody else."""

import contextlib
import functools
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime

import numpy as np
import psutil
import pytest
import torch
from conftest import LIT_MINI, ROOT, SOAK, command_line, failed, few, json_of, ok
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from immich_server import ALL, FLAT, KEY, ME, PARTNER, STRUCTURED, Library, holding, serving
from PIL import Image
from referees import referee
from serving import app_of

from retrieval_tip import errors
from retrieval_tip.backbones.base import Backbone, Identity
from retrieval_tip.errors import InputError
from retrieval_tip.plugins.immich import client
from retrieval_tip.plugins.immich.client import Immich, ImmichError
from retrieval_tip.plugins.immich.ledger import Ledger
from retrieval_tip.plugins.immich.sync import Sync
from retrieval_tip.plugins.immich.tagging import Tagging

CLASSES = ("panda", "pigeon", "sunflower")
BOTH = pytest.mark.parametrize("version", [FLAT, STRUCTURED], ids=["flat", "structured"])


class Colours(Backbone):
    """An encoder that knows colours. ``encoded`` counts the pictures."""

    identity = Identity("colours", None, "c0", "c0", {"size": 1})
    dim, has_text, logit_scale, precision, batch_size = 4, False, 100.0, "float32", 64

    def __init__(self):
        self.encoded = 0

    def preprocess(self, image):
        """Return the mean colour."""
        pixels = np.asarray(image, dtype=np.float32).reshape(-1, 3).mean(axis=0) / 255
        return torch.tensor(pixels).reshape(3, 1, 1)

    def view(self, image, seed):
        """Return the mean colour."""
        return self.preprocess(image)

    def encode_images(self, pixels):
        """Return colours and a constant."""
        self.encoded += len(pixels)
        colours = pixels.numpy().reshape(-1, 3)
        return np.concatenate([colours, np.full((len(colours), 1), 0.2, np.float32)], axis=1)

    def encode_texts(self, texts):
        """Refuse."""
        raise NotImplementedError


@functools.cache
def picture(colour, shade):
    """Return a picture of one colour: red, green, blue, or grey, which is of no class."""
    low, high = shade % 37, 255 - shade % 41
    pixel = [low] * 3 if colour == 3 else [high if part == colour else low for part in range(3)]
    data = io.BytesIO()
    Image.new("RGB", (4, 4), tuple(pixel)).save(data, "PNG")
    return data.getvalue()


@contextlib.contextmanager
def connected(url, place):
    """Yield a connection and its ledger."""
    with Immich(url, KEY) as immich:
        immich.connect()
        with Ledger(place) as ledger:
            yield Tagging(immich, ledger)


def sync(url, place, encoder, *, apply=True):
    """Run once, and return the report."""
    with connected(url, place) as tagging:
        return Sync(tagging, place, encoder, "Pets").run(apply=apply)


def undo(url, place):
    """Undo everything."""
    with connected(url, place) as tagging:
        tagging.undo()
        assert not any(tagging.failed.values())


PROGRAM = ("sync", "dry run", "kill before", "kill after", "undo")
USER = (
    "tag",
    "untag",
    "accept",
    "reject",
    "suggest",
    "new",
    "edit",
    "delete",
    "hide",
    "show",
    "metadata run",
)
PETS = ("Pets/red", "Pets/green", "Pets/none")


class World:
    """A server and its user. ``theirs`` has the suggestions that the user has put on photos."""

    def __init__(self, url, library, place, seed):
        self.url, self.library, self.place = url, library, place
        self.random = random.Random(seed)
        self.encoder = Colours()
        self.theirs, self.made = set(), set()
        for number in range(12):
            self.new(number % 4, number)
        self.own = list(library.photos)
        for number in (0, 1, 4, 5):
            library.put(self.own[number], PETS[number % 2])
        for more in (
            {"owner": PARTNER},
            {"visibility": "locked"},
            {"visibility": "hidden"},
            {"visibility": "archive"},
            {"trashed": True},
        ):
            library.add(picture(0, 5), **more)

    def new(self, colour, shade):
        """Add a photo or video, sometimes of an external library."""
        kind = "VIDEO" if shade % 5 == 0 else "IMAGE"
        return self.library.add(picture(colour, shade), kind=kind, external=shade % 6 == 0)

    def pairs(self, start):
        """Return the photos with their tags that begin so."""
        return {
            (number, path)
            for number in self.library.photos
            for path in self.library.paths(number)
            if path.startswith(start)
        }

    def use(self, step):
        """Do what a user does."""
        library, chance = self.library, self.random
        number = chance.choice(self.own)
        photo = library.photos[number]
        suggested = sorted(pair for pair in self.pairs("Suggested/") if pair[0] in self.own)
        look = picture(chance.randrange(4), chance.randrange(99))
        if step == "tag":
            library.put(number, chance.choice(PETS))
        elif step == "untag":
            for path in PETS:
                library.take(number, path)
        elif step == "accept" and suggested:
            number, path = chance.choice(suggested)
            library.put(number, path.replace("Suggested", "Pets"))
        elif step == "reject" and suggested:
            pair = chance.choice(suggested)
            library.take(*pair)
            self.theirs.discard(pair)
        elif step == "suggest":
            self.suggest(number, chance.choice(("Suggested/red", "Suggested/green")))
        elif step == "new":
            self.own.append(self.new(chance.randrange(4), chance.randrange(99)))
        elif step == "edit":
            library.edit(number, look)
        elif step == "delete" and len(self.own) > 8:
            self.own.remove(number)
            del library.photos[number]
        elif step == "hide":
            photo.visibility, photo.trashed = chance.choice(
                (("archive", False), ("timeline", True))
            )
            photo.updated = library.now()
        elif step == "show":
            photo.visibility, photo.trashed, photo.updated = "timeline", False, library.now()
        elif step == "metadata run":
            library.metadata_run()
        self.theirs &= self.pairs("Suggested/")

    def suggest(self, number, path):
        """Put a suggestion on a photo, as the user can, unless the program has tried to."""
        with Ledger(self.place) as ledger:
            known = ledger.suggestions("sent", "written", "lost", "hidden", "accepted", "rejected")
        if number not in {suggestion.asset for suggestion in known}:
            self.made |= {"Suggested", path} - set(self.library.tags.values())
            self.library.put(number, path)
            self.theirs.add((number, path))

    def run(self, step):
        """Run the program, and check what it has changed."""
        library = self.library
        classes, start = self.pairs("Pets/"), len(library.writes)
        may_fail = contextlib.suppress(InputError)  # there may be no example
        if step.startswith("kill"):
            pattern = self.random.choice(("PUT .*/assets", "PUT", "DELETE .*/assets", "DELETE"))
            library.faults.append((pattern, step.removeprefix("kill ")))
            may_fail = contextlib.suppress(ImmichError, InputError)
        with may_fail:
            if step == "undo" or (step[:4] == "kill" and self.random.random() < 0.3):
                undo(self.url, self.place)
            else:
                sync(self.url, self.place, self.encoder, apply=step != "dry run")
        library.faults.clear()
        assert self.pairs("Pets/") == classes
        assert self.theirs <= self.pairs("Suggested/")
        for is_added, number, _ in library.writes[start:]:
            if is_added and number is not None:
                photo = library.photos[number]
                assert (photo.owner, photo.visibility, photo.trashed) == (ME, "timeline", False)
        if step == "dry run":
            assert len(library.writes) == start

    def check(self):
        """Check that a run after another writes nothing and encodes nothing, and that an undo is exact."""
        self.run("sync")
        start, encoded = len(self.library.writes), self.encoder.encoded
        self.run("sync")
        assert (len(self.library.writes), self.encoder.encoded) == (start, encoded)
        self.run("undo")
        assert self.pairs("Suggested/") == self.theirs
        left = {path for path in self.library.tags.values() if path.startswith("Suggested")}
        needed = {path for _, path in self.theirs} | ({"Suggested"} if self.theirs else set())
        assert left <= self.made | needed


@given(
    st.lists(st.sampled_from((*PROGRAM, *USER)), min_size=6, max_size=14),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=200 if SOAK else 15, deadline=None)
def test_no_sequence_changes_more_than_suggestions(tmp_path_factory, steps, is_flat, seed):
    library = Library(FLAT if is_flat else STRUCTURED)
    with serving(library) as url:
        world = World(url, library, tmp_path_factory.mktemp("world") / "index", seed)
        world.run("sync")
        for step in steps:
            (world.run if step in PROGRAM else world.use)(step)
        world.check()


@pytest.fixture
def immich(monkeypatch, tmp_path):
    """Serve libraries. A library becomes a function that runs a command, whose output never has the key."""
    monkeypatch.setenv("IMMICH_API_KEY", KEY)
    monkeypatch.setattr(client, "PAUSE", 0)
    out = tmp_path / "index"
    with contextlib.ExitStack() as served:

        def serve(library):
            url = served.enter_context(serving(library))

            def call(command, *options):
                first = url if command == "sync" else out
                more = ("--out", out, "--model", LIT_MINI) if command == "sync" else ()
                errors.warn_once.cache_clear()
                done = command_line("-vv immich", command, first, *more, *options)
                assert KEY not in done.output + done.stderr
                return done

            return call

        yield serve


def learned(done):
    """Return the output of a command that succeeded."""
    assert done.exit_code == 0, done.output
    return done.stdout


def suggested(library):
    """Return the suggestions of photos."""
    return {
        number: path.removeprefix("Suggested/")
        for number in library.photos
        for path in library.paths(number)
        if path.startswith("Suggested/")
    }


@pytest.mark.parametrize("version", few([STRUCTURED, FLAT], 1))
def test_a_library_is_taught_answered_and_restored(immich, shared, tmp_path, version, monkeypatch):
    library, truth = holding(shared, [*CLASSES, "umbrella"], 12, version=version, most=50)
    own = list(library.photos)
    for number in [own[place] for place in (0, 1, 2, 12, 13, 14, 24, 25, 26, 36, 37, 38)]:
        name = "none" if truth[number] == "umbrella" else truth[number]
        library.put(number, f"Things/{name}")
    before = {number: library.paths(number) for number in own}
    call = immich(library)
    assert "Estimated accuracy" in learned(call("sync", "--classes", "Things"))
    assert not library.writes

    learned(call("sync", "--classes", "Things", "--apply"))
    first = suggested(library)
    assert len(first) >= 18
    assert np.mean([truth[number] == name for number, name in first.items()]) > 0.6

    def refuse(*_):
        raise AssertionError("an encoder was loaded")

    start = len(library.writes)
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_tip.backbones.open_clip.open_model", refuse)
        learned(call("sync", "--classes", "Things", "--apply"))
    assert len(library.writes) == start

    accepted, rejected, edited, deleted = list(first)[:4]
    library.put(accepted, f"Things/{first[accepted]}")
    library.take(rejected, f"Suggested/{first[rejected]}")
    library.edit(edited, picture(0, 0))
    del library.photos[deleted]
    learned(call("sync", "--classes", "Things", "--apply"))
    assert {accepted, rejected}.isdisjoint(suggested(library))
    assert library.paths(accepted) == {f"Things/{first[accepted]}"}
    assert " 1 accepted" in learned(call("status"))
    assert " 1 rejected" in learned(call("status"))

    index = tmp_path / "index"
    assert json_of("index info", index)["n"] == 14
    ok("index audit", index)
    pictures = tmp_path / "pictures"
    for name in CLASSES:
        (pictures / name).mkdir(parents=True)
        for number in own:
            if truth[number] == name and number in library.photos:
                (pictures / name / f"{number}.jpg").write_bytes(library.photos[number].picture)
    assert json_of("evaluate", index, pictures)["top1"] > 0.6
    app = TestClient(app_of(index), base_url="http://localhost")
    with app as page:
        shot = page.get("/indexes/index/keys").json()
        assert shot

    learned(call("undo"))
    assert not suggested(library)
    before[accepted] = {f"Things/{first[accepted]}"}
    assert {number: library.paths(number) for number in library.photos} == {
        number: before[number] for number in library.photos
    }
    assert not [path for path in library.tags.values() if path.startswith("Suggested")]


def test_albums_are_classes_and_new_photos_wait(immich, shared):
    library, truth = holding(shared, CLASSES, 6, version=FLAT)
    own = list(library.photos)
    for name in CLASSES:
        members = [photo for photo in own if truth[photo] == name][:3]
        library.albums[str(uuid.uuid4())] = (name, members)
    library.photos[own[3]].created = datetime.now(UTC)
    call = immich(library)
    albums = [word for name in CLASSES for word in ("--album", name)]
    learned(call("sync", *albums, "--apply"))
    given = suggested(library)
    assert given
    assert own[3] not in given
    assert np.mean([truth[number] == name for number, name in given.items()]) > 0.6
    failed(call("sync", "--album", "Nowhere"), 1, "no album Nowhere")
    library.permissions = ALL[:-1]
    failed(call("sync", "--album", "pigeon"), 1, "album.read")


FAULTS = {
    401: "status 401 (Failed on purpose, c0ffee); create a key",
    403: "status 403 (Failed on purpose",
    400: "status 400 (Failed on purpose",
    503: "status 503",
    "html": "not that of Immich",
    "before": "cannot be reached",
    "after": "cannot be reached",
}
REQUESTS = ("GET /api/server", "GET /api/tags", "POST", "GET /api/assets", "PUT", "PUT .*/assets")


@BOTH
def test_a_fault_is_one_line_and_does_no_harm(tmp_path, version, monkeypatch):
    monkeypatch.setattr(client, "PAUSE", 0)
    library = Library(version, lasting=True)
    for number in range(12):
        library.add(picture(number % 4, number))
    for number, photo in enumerate([*library.photos][:4]):
        library.put(photo, PETS[number % 2])
    with serving(library) as url:
        requests = REQUESTS if SOAK else REQUESTS[version == FLAT :: 2]
        for request, (fault, words) in itertools.product(requests, few(FAULTS.items())):
            if request == "GET /api/assets" and fault in (400, 503):
                continue  # this photo has no preview
            place = tmp_path / f"{REQUESTS.index(request)} {fault}"
            library.faults = [(request, fault)]
            with pytest.raises(ImmichError) as raised:
                sync(url, place, Colours())
            assert words in str(raised.value)
            assert len(str(raised.value).splitlines()) == 1
            library.faults = []
            sync(url, place, Colours())
            assert suggested(library)
            undo(url, place)
            assert not [path for path in library.tags.values() if path.startswith("Suggested")]


def test_a_command_names_a_fault_in_one_line(immich, shared):
    library, _ = holding(shared, CLASSES[:2], 3, 2)
    library.faults = [("GET /api/tags", 401)]
    done = immich(library)("sync", "--classes", "Pets")
    failed(done, 1, FAULTS[401])
    assert len(done.stderr.splitlines()) == 1


def test_old_servers_and_small_keys_are_refused(immich, shared):
    library, _ = holding(shared, CLASSES[:2], 3, 2, version=(1, 144, 1))
    call = immich(library)
    failed(call("sync", "--classes", "Pets"), 1, "has Immich 1.144.1; update it to 2.0")
    library.version = (4, 0, 0)
    done = call("sync", "--classes", "Pets")
    learned(done)
    assert "has Immich 4.0.0, which is newer" in done.stderr
    library.permissions = ("asset.read", "user.read")
    failed(call("sync", "--classes", "Pets"), 1, "the key lacks asset.view")
    failed(call("sync", "--classes", "Suggested"), 1, "the key lacks")
    library.permissions = ("all",)
    failed(call("sync", "--classes", "Suggested"), 2, "has suggestions")
    failed(call("sync"), 2, "give --classes TAG, or --album NAME")
    failed(call("sync", "--classes", "Pets", "--every", "soon"), 2, "such as 1h")


@pytest.mark.parametrize("when", few(["before", "after"], 1))
def test_a_killed_run_is_completed_by_the_next(immich, shared, when, warm_path, tmp_path):
    library, _ = holding(shared, CLASSES[:2], 5, 2, most=1000)
    call = immich(library)
    learned(call("sync", "--classes", "Pets"))
    with serving(library) as url:
        command = ["retrieval-tip", "immich", "sync", url, "--classes", "Pets", "--apply"]
        command += ["--out", tmp_path / "index"]
        run = subprocess.Popen(command, env=os.environ | {"PATH": warm_path})

        def kill():
            run.kill()
            return when

        library.faults = [("PUT .*/assets", kill)]
        assert run.wait(60) == -signal.SIGKILL
    learned(call("sync", "--classes", "Pets", "--apply"))
    number = len(suggested(library))
    assert number >= 4
    assert f"{number} photos" in learned(call("undo"))
    assert not suggested(library)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_repeated_run_outlives_faults_until_it_is_stopped(immich, number, tmp_path):
    library = Library(faults=[("GET /api/users", 503)], lasting=True)
    with serving(library) as url:
        command = [sys.executable, "-m", "retrieval_tip", "immich", "sync", url]
        command += ["--classes", "Pets", "--every", "1s", "--out", tmp_path / "index"]
        start = {"start_new_session": True, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **start) as loop:
            while library.requests.count("GET /api/server/version") < 2 and loop.poll() is None:
                time.sleep(0.05)
            loop.send_signal(number)
            assert loop.wait(60) == 128 + number
            assert "status 503" in loop.stderr.read()
    done = subprocess.run([*command[:5], "nowhere", *command[6:]], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not the address of a server" in done.stderr


@pytest.mark.parametrize("version", few([STRUCTURED, FLAT], 1))
def test_immichpy_accepts_requests_and_answers(immich, shared, version, tmp_path):
    """A client that checks every field knows all that is sent and all that the stand-in answers."""
    python = referee(("immichpy==9.2.4",))
    library, truth = holding(shared, CLASSES[:2], 5, 2, version=version, exchanges=[])
    library.albums[str(uuid.uuid4())] = ("pigeon", [n for n in truth if truth[n] == "pigeon"])
    call = immich(library)
    learned(call("sync", "--classes", "Pets", "--apply"))
    learned(call("undo"))
    call("sync", "--album", "pigeon")
    kept = tmp_path / "exchanges.json"
    kept.write_text(json.dumps(library.exchanges))
    check = [python, ROOT / "tests/check_immich.py", kept]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(library.exchanges) > 20


@pytest.mark.soak
def test_a_run_without_news_makes_few_requests(immich, tmp_path):
    """Of 50,000 photos, 30 are tagged."""
    library = Library(most=1000)
    for number in range(50_000):
        library.add(picture(number % 4, number % 1500))
    for number, photo in enumerate([*library.photos][:30]):
        library.put(photo, ("Pets/red", "Pets/green", "Pets/blue", "Pets/none")[number % 4])
    encoder = Colours()
    with serving(library) as url:
        sync(url, tmp_path / "index", encoder)
        sync(url, tmp_path / "index", encoder)  # this run sees that tags were written
        start, encoded = time.monotonic(), encoder.encoded
        requests, writes = len(library.requests), len(library.writes)
        sync(url, tmp_path / "index", encoder)
        seconds = time.monotonic() - start
    requests = len(library.requests) - requests
    peak = psutil.Process().memory_info().rss >> 20
    print(f"{requests} requests, {seconds:.1f} s, {peak} MiB; {writes} writes before")
    assert requests <= 60
    assert (len(library.writes), encoder.encoded) == (writes, encoded)
