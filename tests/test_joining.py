"""Another encoder is offered to a labelling session if it helps, joined in the background, and loses no label."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import few
from serving import InProcess, asked, caltech_photos, labelling_app, server
from tables import tiny, write_cnn

from retrieval_tip.backbones.base import side_by_side
from retrieval_tip.backbones.loading import load_again, load_backbone
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import of_images, open_inputs
from retrieval_tip.index import changes, places
from retrieval_tip.labelling import joining
from retrieval_tip.server import session as module

AUTHORISED = {"Authorization": "Bearer t"}
CLASSES, EACH = 8, 9
ENCODER = "timm:tf_efficientnet_lite0@efficientnet-lite0.pth"


@pytest.fixture(scope="module")
def weights(shared, tmp_path_factory):
    """Files of weights of one CNN: trained on ImageNet, and random."""
    folder = tmp_path_factory.mktemp("weights")
    write_cnn(folder / "random.pth")
    write_cnn(folder / "trained.pth", shared / "models/lit-mini")
    return folder


@pytest.fixture(scope="module")
def photos(shared, tmp_path_factory):
    """Labels of photos of eight classes, by path."""
    folder = tmp_path_factory.mktemp("photos")
    found = caltech_photos(shared, "train", CLASSES, EACH)
    copied = (shutil.copy(path, folder / f"{i:02}.jpg") for i, (path, _) in enumerate(found))
    return dict(zip(map(str, copied), (label for _, label in found), strict=True))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An index in an empty folder, which is the current one, on a machine without downloaded encoders."""
    monkeypatch.setattr(module, "WAIT", 0.05)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "idx"


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """An encoder with random weights."""
    folder = tiny(tmp_path_factory.mktemp("weak") / "model")
    return load_backbone(f"local-dir:{folder}", device="cpu")


class Client(InProcess):
    """A client of a labelling session that knows the right labels."""

    def __init__(self, photos, place, backbone):
        self.labels = [*photos.values()]
        self.cache = EncodingCache.default()
        self.sources = list(open_inputs([str(Path(next(iter(photos))).parent)]))
        self.app = labelling_app(place, self.sources, Reader(backbone, cache=self.cache))

    def __exit__(self, *error):
        super().__exit__(*error)
        self.cache.close()

    def status(self):
        return self.http.get("/v1/label").json()

    def post(self, what, body, status=200):
        answer = self.http.post(f"/v1/label{what}", json=body, headers=AUTHORISED)
        assert answer.status_code == status, answer.text
        return answer.json()

    def label(self, numbers):
        labels = [{"photo": number, "label": self.labels[number]} for number in numbers]
        return self.post("", {"labels": labels})

    def until(self, done):
        for _ in range(2400):
            if done(state := self.status()):
                return state
            time.sleep(0.05)
        raise AssertionError(state)

    def settled(self):
        return self.until(lambda state: not state["busy"])

    def join(self):
        return self.post("/encoder", {"join": True})


def labels_of(place):
    return {
        Path(row["source"]).name: row["label"] for row in places.at(place).load().labels.to_pylist()
    }


def wanted(photos, numbers):
    every = [(Path(path).name, label) for path, label in photos.items()]
    return dict(every[number] for number in numbers)


NUMBERS = [EACH * (i % CLASSES) + i // CLASSES for i in range(CLASSES * EACH)]
"""The numbers of the photos, such that each class comes in turn."""


def test_an_encoder_that_helps_is_offered_joined_and_used_for_new_photos(
    photos, place, weak, weights, tmp_path
):
    shutil.copy(weights / "trained.pth", tmp_path / "efficientnet-lite0.pth")
    with Client(photos, place, weak) as client:
        client.label(NUMBERS[:59])
        assert client.settled()["encoder"] is None
        client.post("/encoder", {"join": True}, 404)
        client.label(NUMBERS[59:60])
        offer = client.settled()["encoder"]
        assert offer["name"] == ENCODER
        assert offer["tried"] == 60
        assert offer["after"] > offer["before"]
        before = client.status()["version"]
        alone = places.at(place).load()
        assert alone.parts == ()  # nothing has happened yet
        alone_ids = alone.labels["key_id"].to_numpy()
        client.join()
        client.label(NUMBERS[60:62])
        state = client.settled()
        assert (state["encoder"], state["problem"], state["labelled"]) == (None, None, 62)
        assert state["version"] > before
        index = places.at(place).load()
        assert len(index.parts) == 2
        assert index.shares[1] >= joining.SHARE
        assert labels_of(place) == wanted(photos, NUMBERS[:62])
        again = index.take(np.flatnonzero(np.isin(index.labels["key_id"].to_numpy(), alone_ids)))
        assert again.labels.equals(alone.labels)
        other = Reader(load_backbone(ENCODER, device="cpu"))
        features = other.encode(of_images(alone.labels["source"].to_pylist())).features
        assert np.allclose(again.keys, side_by_side([alone.keys, features]), atol=1e-6)
        answers = client.http.get("/v1/label/answers").json()["photos"]
        rest = [one for one in answers if one["label"] is None]
        right = sum(one["guesses"][0]["label"] == client.labels[one["photo"]] for one in rest)
        assert right >= len(rest) - 3
        image = {"images": ("new.jpg", Path([*photos][-1]).read_bytes() + b"0", "image/jpeg")}
        added = client.http.post("/v1/label/photos", files=image, headers=AUTHORISED).json()
        [number] = added["photos"]
        client.settled()
        client.post("", {"labels": [{"photo": number, "label": client.labels[-1]}]})
        assert client.settled()["problem"] is None
    index = places.at(place).load()
    assert (index.n, index.d) == (63, weak.dim + 1280)
    with Client(photos, place, load_again(index.backbone, device="cpu")) as client:
        state = client.settled()
        assert (state["labelled"], state["encoder"], state["problem"]) == (62 + 1, None, None)


def test_a_useless_encoder_is_not_offered(photos, place, lit_mini, weights, tmp_path):
    shutil.copy(weights / "random.pth", tmp_path / "efficientnet-lite0.pth")
    with Client(photos, place, lit_mini) as client:
        client.label(NUMBERS[:60])
        state = client.settled()
    assert (state["encoder"], state["problem"]) == (None, None)


def test_a_declined_encoder_stays_away_and_a_damaged_one_is_passed_over(
    photos, place, weak, weights, tmp_path
):
    file = tmp_path / "efficientnet-lite0.pth"
    file.write_bytes(b"no weights")
    with Client(photos, place, weak) as client:
        client.label(NUMBERS[:60])
        state = client.settled()
        assert (state["encoder"], state["problem"]) == (None, None)
    shutil.copy(weights / "trained.pth", file)
    with Client(photos, place, weak) as client:
        assert client.settled()["encoder"]["name"] == ENCODER
        assert client.post("/encoder", {"join": False})["encoder"] is None
        client.label(NUMBERS[60:])
        assert client.settled()["encoder"] is None
        client.post("/encoder", {"join": True}, 404)
    assert places.at(place).load().parts == ()


def test_a_session_goes_on_if_joining_fails(photos, place, weak, weights, tmp_path):
    """A labelled photo whose file is gone cannot be encoded."""
    shutil.copy(weights / "trained.pth", tmp_path / "efficientnet-lite0.pth")
    own = {
        shutil.copy(path, tmp_path / f"{i:02}.jpg"): label
        for i, (path, label) in enumerate(photos.items())
    }
    with Client(own, place, weak) as client:
        client.label(NUMBERS[:61])
        assert client.settled()["encoder"]["problem"] is None
        version = client.status()["version"]
        lost = Path([*own][NUMBERS[0]])
        data = lost.read_bytes()
        lost.unlink()
        client.join()
        client.label(NUMBERS[61:63])
        offer = client.settled()["encoder"]
        assert offer["problem"].startswith(f"{lost}: cannot be read")
        assert offer["encoded"] is None
        assert places.at(place).load().parts == ()
        assert labels_of(place) == wanted(own, NUMBERS[:63])
        lost.write_bytes(data)
        client.join()
        assert client.settled()["encoder"] is None
        index = places.at(place).load()
        assert len(index.parts) == 2
        assert labels_of(place) == wanted(own, NUMBERS[:63])
        changes.rollback(place, version)  # before it was joined
        client.until(lambda state: state["version"] == index.version + 1 and not state["busy"])
        client.label(NUMBERS[63:65])
        state = client.settled()
        assert (state["problem"], state["refused"], state["unsaved"]) == (None, [], 0)
    assert places.at(place).load().parts == ()


@pytest.mark.parametrize("seconds", few([0.5, 0, 1, 2, 3, 4], 2))
def test_a_kill_while_an_encoder_is_joined_loses_no_label(
    photos, place, weights, tmp_path, monkeypatch, seconds
):
    """The printed command continues with one encoder, or with both."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path / "cache"))
    shutil.copy(weights / "trained.pth", tmp_path / "efficientnet-lite0.pth")
    model = f"local-dir:{tiny(tmp_path / 'weak')}"
    folder = Path(next(iter(photos))).parent
    command = (folder, "--out", place, "--model", model)
    labels = [*photos.values()]

    def until(url, done):
        for _ in range(1200):
            if done(state := asked(url)):
                return state
            time.sleep(0.1)
        raise AssertionError(state)

    def label(url, numbers):
        asked(url, {"labels": [{"photo": n, "label": labels[n]} for n in numbers]})

    with server(*command, command="label") as (url, process):
        label(url, NUMBERS[:60])
        assert until(url, lambda state: not state["busy"])["encoder"]["name"] == ENCODER
        asked(url, {"join": True}, "/encoder")
        time.sleep(seconds)
        label(url, NUMBERS[60:62])
        process.kill()
        process.wait()
    with server(*command, command="label") as (url, _):
        state = until(url, lambda state: not state["busy"])
        assert (state["labelled"], state["unsaved"], state["problem"]) == (62, 0, None)
        assert labels_of(place) == wanted(photos, NUMBERS[:62])
        if state["encoder"] is not None:
            asked(url, {"join": True}, "/encoder")
            until(url, lambda state: state["encoder"] is None and not state["busy"])
    with server(*command, command="label") as (url, _):
        label(url, NUMBERS[62:64])
        state = until(url, lambda state: not state["busy"])
        assert (state["encoder"], state["problem"]) == (None, None)
    assert len(places.at(place).load().parts) == 2
    assert labels_of(place) == wanted(photos, NUMBERS[:64])
