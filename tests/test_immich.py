"""Suggestions for an Immich server: exact, reversible, and never on the photos or in the tags of somebody else."""

import contextlib
import functools
import io
import random

import numpy as np
import pytest
import torch
from conftest import SOAK
from hypothesis import given, settings
from hypothesis import strategies as st
from immich_server import FLAT, KEY, ME, PARTNER, STRUCTURED, Library, serving
from PIL import Image

from retrieval_tip.backbones.base import Backbone, Identity
from retrieval_tip.errors import UsageError
from retrieval_tip.plugins.immich.client import Immich, ImmichError
from retrieval_tip.plugins.immich.ledger import Ledger
from retrieval_tip.plugins.immich.sync import Lessons, Sync
from retrieval_tip.plugins.immich.tagging import Tagging

CLASSES = ("dalmatian", "ketch", "sunflower")
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


def sync(url, place, encoder, *, apply=True, **lessons):
    """Run once, and return the report."""
    with connected(url, place) as tagging:
        run = Sync(tagging, place, encoder, Lessons(**lessons or {"parent": "Pets"}))
        return run.run(apply=apply)


def undo(url, place):
    """Undo everything."""
    with connected(url, place) as tagging:
        tagging.undo(None)
        assert not tagging.refusals()


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
        may_fail = contextlib.suppress(UsageError)  # there may be no example
        if step.startswith("kill"):
            pattern = self.random.choice(("PUT .*/assets", "PUT", "DELETE .*/assets", "DELETE"))
            library.faults.append((pattern, step.removeprefix("kill ")))
            may_fail = contextlib.suppress(ImmichError, UsageError)
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
