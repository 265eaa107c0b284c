"""What an edit of a served index reads: no version, its own files once, and no temporary file.

The index is in memory, so an edit only reads which version is current, and the files whose content it copies into new
files, because damage must not be copied. The counts are taken at the functions that read.
"""

import functools
import inspect
import shutil
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from serving import app_of, build, caltech_photos, labelling_app
from tables import unit_rows

from retrieval_tip import Index
from retrieval_tip.data import images
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_inputs
from retrieval_tip.index import places
from retrieval_tip.server import session as module
from retrieval_tip.server.guard import Limits
from retrieval_tip.store.files import LocalFiles
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.store.versions import Writer

pytestmark = pytest.mark.usefixtures("one_encoder")

TOKEN = "open sesame"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
ALONE = Limits(poll=3600.0)
"""Nobody looks for versions of other writers, which would have to be opened."""
MOST_MANIFESTS = 2


class Seen(SimpleNamespace):
    """The places opened, manifests read, files checked, kinds of files written and photos decoded, each in order."""

    @contextmanager
    def edit(self, folder):
        """Check what is read inside the context, in which one edit of the index is made."""
        before = places.at(folder).manifest()
        assert all((self.opened, self.manifests, self.checked)), (
            "the test no longer sees how an index is opened"
        )
        read = {name: len(found) for name, found in vars(self).items()}
        yield
        found = SimpleNamespace(**{name: found[read[name] :] for name, found in vars(self).items()})
        after = places.at(folder).manifest()
        assert after.version > before.version
        assert len(found.opened) == 0, found
        assert len(found.manifests) <= MOST_MANIFESTS, found
        shared = after.files.keys() - set(found.written)
        assert Counter(found.checked) <= Counter(
            before.files[kind].name for kind in before.files.keys() - shared
        )
        assert (before.files["keys"].name in found.checked) == (
            "keys" in found.written
        )  # damage is not copied


@pytest.fixture
def seen(monkeypatch):
    """Note what is read from here on. Each function still does its work."""
    seen = Seen(opened=[], manifests=[], checked=[], written=[], decoded=[])

    def note(owner, name, found, what):
        static = inspect.getattr_static(owner, name)
        real = static.__func__ if isinstance(static, classmethod) else static

        @functools.wraps(real)
        def noted(*arguments, **named):
            found.append(what(*arguments))
            return real(*arguments, **named)

        monkeypatch.setattr(
            owner, name, classmethod(noted) if isinstance(static, classmethod) else noted
        )

    note(Index, "_opened", seen.opened, lambda _, store, *rest: str(store))
    note(Manifest, "from_bytes", seen.manifests, lambda _, raw, name: name)
    note(LocalFiles, "problem", seen.checked, lambda _, file, *rest: file.name)
    note(Writer, "put", seen.written, lambda _, kind, *rest: kind)
    note(Writer, "seal", seen.written, lambda _, kind, *rest: kind)
    note(images, "decode", seen.decoded, lambda data, *rest: len(data))
    return seen


@pytest.fixture(scope="module")
def fitted(shared, tmp_path_factory):
    """An index of photos that is fitted. Change only a copy."""
    return build(
        shared, tmp_path_factory.mktemp("fitted") / "fitted", caltech_photos(shared, "train", 10, 8)
    )


@pytest.fixture(params=["plain", "fitted"])
def folder(request, things, fitted, tmp_path):
    """A copy of an index of eighty photos of ten classes."""
    return Path(shutil.copytree(things if request.param == "plain" else fitted, tmp_path / "own"))


@pytest.fixture
def photos(shared, tmp_path):
    """Photos that the index does not have, with their labels by path."""
    (tmp_path / "photos").mkdir()
    found = caltech_photos(shared, "test", 4, 1)
    return {
        shutil.copy(path, tmp_path / f"photos/{i}.jpg").as_posix(): label
        for i, (path, label) in enumerate(found)
    }


def serving(folder):
    """Return a client of a server that accepts changes."""
    return TestClient(app_of(folder, limits=ALONE, token=TOKEN), headers=AUTHORISED)


class Session:
    """A labelling session for photos, which saves soon."""

    def __init__(self, folder, photos, backbone):
        self.folder = folder
        self.photos = [*photos]
        self.cache = EncodingCache.default()
        sources = list(open_inputs([str(folder.parent / "photos")]))
        reader = Reader(backbone, cache=self.cache)
        self.app = labelling_app(folder, sources, reader, limits=ALONE, token=TOKEN)

    def __enter__(self):
        self.http = TestClient(self.app, headers=AUTHORISED)
        self.http.__enter__()
        self.until(lambda state: state["encoded"] == len(self.photos) and settled(state))
        return self

    def __exit__(self, *error):
        self.http.__exit__(*error)
        self.cache.close()

    def label(self, photo, label):
        answer = self.http.post("/v1/label", json={"labels": [{"photo": photo, "label": label}]})
        assert answer.status_code == 200, answer.text

    def until(self, done):
        for _ in range(2400):
            if done(state := self.http.get("/v1/label").json()):
                return state
            time.sleep(0.025)
        raise AssertionError(state)

    def labels(self):
        """Return the labels of the photos by number, after every byte of the index has been checked."""
        rows = places.at(self.folder).verify().labels.to_pylist()
        return {
            int(Path(row["source"]).stem): row["label"]
            for row in rows
            if row["source"] in self.photos
        }


def settled(state):
    return not state["unsaved"] and not state["busy"]


@pytest.fixture
def session(seen, folder, photos, lit_mini, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.02)
    monkeypatch.setattr(module, "RETRY", 0.05)
    with Session(folder, photos, lit_mini) as session:
        yield session


def test_a_label_of_a_session_reads_no_version(seen, folder, photos, session):
    """New photos are labelled, one with a new class, one label is corrected, and one is taken back."""
    one, other, *_ = sorted({*photos.values()})
    for photo, label in ((0, one), (1, other), (1, one), (2, "something new"), (0, None)):
        with seen.edit(folder):
            session.label(photo, label)
            state = session.until(settled)
        assert (
            state["version"] == places.at(folder).manifest().version
        )  # it shows what it has saved
    assert session.labels() == {1: one, 2: "something new"}


def test_a_session_saves_nothing_on_damage_and_everything_when_it_is_mended(
    folder, photos, session
):
    """The keys are damaged while the session has them open."""
    label = photos[session.photos[0]]
    before = places.at(folder).manifest()
    keys = folder / before.files["keys"].name
    whole = keys.read_bytes()
    with keys.open("rb+") as file:  # in place, so that the open index sees it
        file.seek(-1, 2)
        file.write(bytes([whole[-1] ^ 64]))
    session.label(0, label)
    state = session.until(lambda state: state["problem"])
    assert keys.name in state["problem"]
    assert (state["unsaved"], places.at(folder).manifest()) == (1, before)
    with keys.open("rb+") as file:
        file.write(whole)
    assert session.until(settled)["problem"] is None
    assert session.labels() == {0: label}


def features(index, *labels):
    return {"features": unit_rows(len(labels), index.d, 9).tolist(), "labels": labels}


EDITS = {
    "features": lambda http, index: http.post(
        "/keys", json=features(index, *index.class_names[:2])
    ),
    "features of a new class": lambda http, index: http.post(
        "/keys", json=features(index, "something new")
    ),
    "relabel": lambda http, index: http.post(
        "/relabel", json={"labels": {"0": index.class_names[-1]}}
    ),
    "remove": lambda http, _: http.delete("/keys?key_id=0&key_id=9"),
    "rename": lambda http, index: http.post(
        "/rename", json={"of": index.class_names[0], "label": "something else"}
    ),
    "merge two classes": lambda http, index: http.post(
        "/rename", json=dict(zip(("of", "label"), index.class_names, strict=False))
    ),
    "fit": lambda http, _: http.post("/fit"),
    "groups": lambda http, index: http.post("/set", content=groups(index)),
}
"""Requests that change an index, by what they do. Their client has the address of the index."""


def groups(index):
    return "class,group\n" + "".join(
        f'"{name}",{i % 3}\n' for i, name in enumerate(index.class_names)
    )


@pytest.fixture
def http(folder):
    """A client whose addresses begin at the index."""
    with serving(folder) as client:
        client.base_url = client.base_url.join("/v1/indexes/own")
        yield client


@pytest.mark.parametrize("edit", EDITS)
def test_a_change_over_http_reads_no_version(seen, folder, http, edit):
    index = Index.load(folder)
    with seen.edit(folder):
        answer = EDITS[edit](http, index)
        assert answer.status_code in (200, 201), answer.text
    assert answer.json()["version"] == 2
    shown = http.get("").json()
    kept = places.at(folder).verify()
    assert (shown["version"], shown["n"], shown["class_names"]) == (2, kept.n, kept.class_names)


def test_features_and_groups_need_no_temporary_file(folder, http, monkeypatch):
    index = Index.load(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    for edit in ("features", "features of a new class", "groups"):
        answer = EDITS[edit](http, index)
        assert answer.status_code in (200, 201), answer.text
    bad = http.post("/set", content="class,group\nnobody\n")
    assert (bad.status_code, "groups" in bad.json()["detail"]) == (422, True), bad.text
