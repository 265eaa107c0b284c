"""The server's routes, with an index of real photos and an index of CLIP features."""

import functools
import hashlib
import io
import itertools
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from numpy.testing import assert_allclose
from PIL import Image
from serving import app_of, caltech_photos, random_index
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from retrieval_tip import Index
from retrieval_tip.data import images
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import of_images, open_source
from retrieval_tip.evaluation.audit import audit
from retrieval_tip.evaluation.projection import projected
from retrieval_tip.index import added_photos, changes
from retrieval_tip.index.changes import fit_index
from retrieval_tip.labelling.groups import group, group_similarity
from retrieval_tip.platforms import quote
from retrieval_tip.server import routes as routes_module
from retrieval_tip.server import served as served_module
from retrieval_tip.server import service as service_module
from retrieval_tip.server import shots as shots_module
from retrieval_tip.server.app import create_app
from retrieval_tip.server.guard import Limits
from retrieval_tip.server.served import Backbones, Maker, Served, open_all
from retrieval_tip.server.service import Service
from retrieval_tip.settings import Ask

from conftest import SHARED, json_rows, ok, with_code  # isort: skip

TOKEN = "open sesame"
pytestmark = pytest.mark.usefixtures("one_encoder")
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def food(shared, tmp_path_factory):
    """An index of CLIP features without a backbone."""
    data = shared / "data" / "clip-food9"
    out = tmp_path_factory.mktemp("food") / "food"
    text = ("--text", data / "text.parquet")
    ok("index build --fit none --shots 16", data / "train.parquet", *text, "--out", out)
    return out


@pytest.fixture(scope="module")
def both(things, food):
    """A client of a read-only server with both indexes."""
    with serving(things, food) as client:
        yield client


def serving(*folders, limits=None, token=None, **more):
    """Return a client of a server that accepts changes if it has a token, which the client sends."""
    return TestClient(
        app_of(*folders, limits=limits, token=token, **more), headers=AUTHORISED if token else None
    )


@pytest.fixture(scope="module")
def photo(shared):
    """A photo of class ``truth`` that is not in the index."""
    return caltech_photos(shared, "test", 1, 1)[0][0].read_bytes()


@pytest.fixture(scope="module")
def truth(shared):
    """The first class of the index."""
    return caltech_photos(shared, "test", 1, 1)[0][1]


def changed(client, what, **body):
    """Change the index ``own``, and return the status and the body of the answer."""
    answer = client.post(f"/v1/indexes/own/{what}", json=body)
    return answer.status_code, answer.json()


def named(answer):
    """Return the index and the version that an answer names."""
    return answer.json()["index"], answer.json()["version"]


def added(client, data, label):
    """Add an image as a shot, and return the body of the answer."""
    answer = client.post(
        "/v1/indexes/own/keys", files={"images": ("photo", data)}, data={"label": label}
    )
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def test_the_server_gives_the_same_answers_as_the_command(own, run):
    """The index is fitted. Numbers may differ in the last digits, because the command has other batches."""
    fitted = fit_index(own, metric="within", values="one-hot").index
    items = caltech_photos(SHARED, "test", 10, 1)
    files = [("images", (path.name, path.read_bytes())) for path, _ in items]
    with serving(own) as client:
        described = client.get("/v1/indexes/own").json()
        asked = "alpha=20&k=40&top=3&neighbours=4&logits=true"
        answer = client.post(f"/v1/classify?{asked}", files=files).json()
    assert (described["fitted"]["metric"], described["values"]) == ("within", "one-hot")
    assert described["least_cache"] == pytest.approx(fitted.settings.least_cache)
    options = ("--alpha", 20, "-k", 40, "--top", 3, "--explain", "--neighbours", 4, "--logits")
    paths = [path for path, _ in items]
    rows = json_rows(run("classify", own, *paths, *options, "--format", "json"))
    settings = ("index", "alpha", "beta", "k", "tail", "skipped")
    assert [answer[name] for name in settings] == ["own", 20, fitted.settings.beta, 40, True, []]
    for (path, _), found, expected in zip(items, answer["results"], rows, strict=True):
        assert found["input"] == path.name
        for name in expected.keys() - {"input", "shot"}:
            same(found[name], expected[name])
    right = [one["label"] == name for one, (_, name) in zip(answer["results"], items, strict=True)]
    assert sum(right) > 5


def same(found, expected):
    """Check that two values of JSON are equal, except for the last digits of numbers."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            same(found[name], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    else:
        assert found == expected


def test_features_come_with_the_most_similar_shots_and_can_be_sent_again(both, food, photo):
    asked = "index=things&features=true&top=3"
    [first] = both.post(f"/v1/classify?{asked}", files={"images": photo}).json()["results"]
    body = np.array(first["feature"], "<f4").tobytes()
    sent = {"content": body, "headers": {"Content-Type": "application/octet-stream"}}
    [again] = both.post(f"/v1/classify?{asked}", **sent).json()["results"]
    assert (again.pop("input"), first.pop("input")) == ("row 0", "upload")
    assert again == first
    queries = pq.read_table(SHARED / "data" / "clip-food9" / "test.parquet")["feature"].to_pylist()[
        :5
    ]
    cache = Index.load(food)
    found = both.post(
        "/v1/classify?index=food&features=true&logits=true", json={"features": queries}
    ).json()["results"]
    for result, query in zip(found, queries, strict=True):
        assert_allclose(result["feature"], query, atol=1e-6)
        affinities = np.asarray(cache.keys, dtype=np.float64) @ query
        near = np.argsort(-affinities)[: served_module.SIMILAR]
        assert [one["key_id"] for one in result["similar"]] == cache.labels["key_id"].take(
            near
        ).to_pylist()
        assert_allclose([one["affinity"] for one in result["similar"]], affinities[near], atol=1e-5)
        ids = [cache.class_names.index(label) for label in result["labels"]]
        parts = np.add(result["text_logits"], result["shot_logits"])
        assert_allclose(parts, np.array(result["logits"])[ids], rtol=1e-5)
        assert result["text_logits"][0] == pytest.approx(result["text_logit"])


def test_shots_can_be_left_out(both, things):
    cache = Index.load(things)
    query = np.asarray(cache.keys[:1], dtype=np.float64).tolist()
    out = cache.labels["key_id"].to_pylist()[:3]
    asked = "&".join(f"without={key_id}" for key_id in out)
    [found] = both.post(
        f"/v1/classify?index=things&logits=true&{asked}", json={"features": query}
    ).json()["results"]
    (expected,) = next(
        iter(cache.answers([FeatureBlock.of(np.array(query))], Ask(without=tuple(out))))
    ).predictions()
    assert_allclose(found["logits"], expected.logits, rtol=1e-4, atol=1e-4)
    assert not {shot["key_id"] for shot in found["neighbours"]} & {*out}
    every = "&".join(f"without={key_id}" for key_id in cache.labels["key_id"].to_pylist())
    assert (
        both.post(f"/v1/classify?index=things&{every}", json={"features": query}).status_code == 422
    )


def test_indexes_are_described(both, things, food):
    allowed = {"changes": False, "makes": False, "labels": False}
    assert both.get("/v1/indexes").json() == {"indexes": ["things", "food"], **allowed}
    cache = Index.load(things)
    whole = both.get("/v1/indexes/things").json()
    assert (whole["name"], whole["version"], whole["n"], whole["d"]) == (
        "things",
        1,
        cache.n,
        cache.d,
    )
    assert (whole["images"], both.get("/v1/indexes/food").json()["images"]) == (True, False)
    assert (whole["alpha"], whole["beta"], whole["k"]) == (
        cache.settings.alpha,
        cache.settings.beta,
        "all",
    )
    assert not whole["changes"]
    assert (whole["class_names"], whole["counts"]) == (cache.class_names, [8] * 10)
    assert whole["provenance"] == cache.provenance


def test_keys_come_in_pages_and_can_be_filtered(both, things):
    labels = Index.load(things).labels.to_pylist()
    pages = [
        both.get(f"/v1/indexes/things/keys?offset={at}&limit=30").json() for at in (0, 30, 60, 90)
    ]
    assert [page["total"] for page in pages] == [80] * 4
    seen = [key for page in pages for key in page["keys"]]
    assert [key["key_id"] for key in seen] == [row["key_id"] for row in labels]
    assert all(key["image"] == f"/v1/indexes/things/keys/{key['key_id']}/image" for key in seen)
    two = both.get(
        "/v1/indexes/things/keys", params={"label": [labels[0]["label"], labels[79]["label"]]}
    ).json()
    assert two["total"] == 16
    one = both.get(
        "/v1/indexes/things/keys", params={"source": Path(labels[5]["source"]).name.upper()}
    ).json()
    assert labels[5]["key_id"] in [key["key_id"] for key in one["keys"]]
    assert all(Path(labels[5]["source"]).name in key["source"] for key in one["keys"])
    some = both.get("/v1/indexes/things/keys", params={"key_id": [3, 4, 999]}).json()
    assert sorted(key["key_id"] for key in some["keys"]) == [3, 4]
    assert both.get("/v1/indexes/things/keys", params={"label": "nothing"}).json()["total"] == 0
    assert all(key["image"] is None for key in both.get("/v1/indexes/food/keys").json()["keys"])


def test_images_of_shots_are_resized(both, things, tmp_path):
    answer = both.get("/v1/indexes/things/keys/7/image?size=48")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    (tmp_path / "small.jpg").write_bytes(answer.content)
    with Image.open(tmp_path / "small.jpg") as image:
        assert max(image.size) == 48
    for name, key in (("things", 999), ("food", 3), ("nothing", 3)):
        missing = both.get(f"/v1/indexes/{name}/keys/{key}/image")
        assert (missing.status_code, missing.headers["content-type"]) == (
            404,
            "application/problem+json",
        )


def test_similar_features_are_grouped(food):
    index = Index.load(food)
    rows = [
        row
        for key in np.asarray(index.keys)[::9].tolist()
        for row in (key, [-value for value in key])
    ]
    expected = group(np.array(rows, np.float32), group_similarity(index), index.metric)
    with serving(food) as client:
        answer = client.post("/v1/indexes/food/groups", json={"features": rows})
        assert answer.json() == [own.tolist() for own in expected]
        assert len(answer.json()) > 1
        refused = client.post("/v1/indexes/food/groups", files={"images": b"x"})
        assert refused.status_code == 422
    floats = {"Content-Type": "application/octet-stream"}
    sent = np.array(rows, "<f4")
    with serving(food, limits=Limits(json_bytes=2000, grouped=len(rows))) as client:
        assert client.post("/v1/indexes/food/groups", json={"features": rows}).status_code == 413
        answer = client.post("/v1/indexes/food/groups", content=sent.tobytes(), headers=floats)
        assert answer.json() == [own.tolist() for own in expected]
        for content, status, reason in (
            (b"", 422, "0 bytes"),
            (sent.tobytes()[:-1], 422, "float32"),
            ((2 * sent).tobytes(), 422, "instead of 1"),
            (np.full_like(sent, np.nan).tobytes(), 422, "NaN"),
            (np.vstack([sent, sent]).tobytes(), 413, f"at most {len(rows)} rows"),
        ):
            refused = client.post("/v1/indexes/food/groups", content=content, headers=floats)
            assert (refused.status_code, reason in refused.json()["detail"]) == (status, True), (
                refused.text
            )


def test_relative_image_paths_start_at_the_root(own, tmp_path):
    cache = Index.load(own)
    first = Path(cache.labels["source"][0].as_py())
    names = [f"{i}/{first.name}" for i in range(cache.n)]
    moved = Index.from_features(
        np.asarray(cache.keys), cache.class_ids.numpy(), cache.class_names, sources=names
    )
    moved.save(tmp_path / "moved")
    (tmp_path / "pictures" / "0").mkdir(parents=True)
    shutil.copy(first, tmp_path / "pictures" / "0" / first.name)
    with serving(tmp_path / "moved", root=tmp_path / "pictures") as client:
        keys = client.get("/v1/indexes/moved/keys").json()["keys"]
        assert [key["image"] is not None for key in keys[:3]] == [True, False, False]
        assert client.get(keys[0]["image"]).status_code == 200


def test_map_and_audit_equal_those_of_the_library(both, things):
    found = both.get("/v1/indexes/things/map").json()
    cache = Index.load(things)
    expected = projected(cache)
    assert_allclose(found["places"], expected.places, atol=1e-4)
    assert found["method"] == expected.method
    assert (found["key_ids"], found["class_ids"]) == (
        expected.key_ids.tolist(),
        expected.class_ids.tolist(),
    )
    assert len(both.get("/v1/indexes/things/map?limit=7").json()["places"]) == 7
    assert both.get("/v1/indexes/things/map?method=umap").status_code == 422
    shots = both.get("/v1/indexes/things/audit").json()
    doubted = audit(cache)
    assert [shot["key_id"] for shot in shots] == doubted["key_id"].to_pylist()[:100]
    assert len(both.get("/v1/indexes/things/audit?limit=1").json()) == min(1, len(doubted))


def test_maps_and_audits_are_limited_in_size_and_number(own, monkeypatch):
    """All limits above the number of keys show the same map, which is computed once."""
    go = threading.Event()
    limits = []
    real = routes_module.projected

    def slow(cache, method, limit):
        assert go.wait(30)
        limits.append(limit)
        return real(cache, method, limit)

    monkeypatch.setattr(routes_module, "projected", slow)
    with serving(own, limits=Limits(patience=0.05)) as client:
        for limit in range(1, 30):
            answer = client.get(f"/v1/indexes/own/map?limit={limit}")
            computed = limit <= service_module.SLOW_AT_ONCE  # the others are refused
            expected = (202, "0") if computed else (503, "5")
            assert (answer.status_code, answer.headers["retry-after"]) == expected
        assert client.get("/v1/indexes/own/audit").status_code == 503
        go.set()
        for limit in (1, 29, 80, 81, 5000, 100_000):
            while client.get(f"/v1/indexes/own/map?limit={limit}").status_code in (202, 503):
                pass
    assert sorted(limits) == [*range(1, service_module.SLOW_AT_ONCE + 1), 29, 80]
    with serving(own, limits=Limits(mapped=1280 * 50)) as client:  # each feature has 1280 values
        assert len(client.get("/v1/indexes/own/map").json()["places"]) == 50


def test_changes_need_the_token(own, both):
    with TestClient(app_of(own, token=TOKEN)) as client:
        bearer = f"Bearer {TOKEN}"
        said = (
            "",
            "Bearer wrong",
            TOKEN[:-1],
            TOKEN,
            f"Basic {TOKEN}",
            f"Bearer{TOKEN}",
            f"{bearer} x",
            "Bearer é",
        )
        two = [("Authorization", bearer), ("Authorization", bearer)]
        for headers in ({}, *({"Authorization": one.encode("latin-1")} for one in said), two):
            answer = client.delete("/v1/indexes/own/keys?key_id=1", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (
                401,
                'Bearer realm="retrieval-tip serve"',
            )
            assert TOKEN not in answer.text
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            for method in (
                methods.keys() - {"get"}
                if path.rpartition("/")[2] not in ("classify", "groups")
                else ()
            ):
                refused = client.request(method, path.replace("{name}", "own"))
                assert (path, method, refused.status_code) == (path, method, 401)
        assert client.get("/v1/indexes/own").json()["version"] == 1
        for right in (bearer, bearer.lower().replace(TOKEN.lower(), TOKEN), f"Bearer  {TOKEN}"):
            missing = client.delete(
                "/v1/indexes/own/keys?key_id=999", headers={"Authorization": right}
            )
            assert missing.status_code == 422
    refused = both.delete("/v1/indexes/things/keys?key_id=1", headers=AUTHORISED)
    assert refused.status_code == 403
    assert "--token" in refused.json()["detail"]


def test_adding_a_shot_changes_the_answer_and_removing_it_undoes_that(own, photo, truth):
    with serving(own, token=TOKEN) as client:

        def asked(data=photo + b"\0"):  # the same picture in another file, which is not a shot
            return client.post("/v1/classify", files={"images": data}).json()

        before = asked()
        assert before["results"][0]["label"] == truth
        body = added(client, photo, "squeeze box")
        assert (asked(photo)["results"][0]["shot"], asked(photo)["results"][0]["label"]) == (
            True,
            truth,
        )
        assert (body["version"], body["classes"], body["known"], body["key_ids"]) == (
            2,
            ["squeeze box"],
            0,
            [80],
        )
        after = asked()
        assert (after["version"], after["results"][0]["label"]) == (2, "squeeze box")
        assert after["results"][0]["neighbours"][0]["key_id"] == 80
        assert after["results"][0]["neighbours"][0]["affinity"] == pytest.approx(1, abs=1e-4)
        assert client.get("/v1/indexes/own/keys/80/image").status_code == 200
        again = added(client, photo, "squeeze box")
        assert (again["known"], again["key_ids"], again["version"]) == (1, [], 2)
        shot, label = caltech_photos(SHARED, "train", 10, 8)[0]
        assert added(client, shot.read_bytes(), label)["known"] == 1
        kept = (own.parent / "own-shots").rglob("*.jpg")
        assert [(path.parent.name, path.read_bytes()) for path in kept] == [("squeeze box", photo)]
        twice = added(client, photo, truth)
        assert len(twice["duplicates"]) == 1
        assert "identical image" in twice["duplicates"][0]
        gone = client.delete(f"/v1/indexes/own/keys?key_id=80&key_id={twice['key_ids'][0]}")
        assert (gone.status_code, gone.json()["version"]) == (200, 4)
        end = asked()
        assert (end["version"], end["results"][0]["label"]) == (4, truth)
        assert client.delete("/v1/indexes/own/keys?key_id=80").status_code == 422
    assert Index.load(own).n == 80


def test_indexes_are_renamed_duplicated_and_deleted(own, photo):
    """Added photos are kept until no index in the folder uses them."""
    with serving(own, token=TOKEN) as client:
        key = added(client, photo, "new")["key_ids"][0]
        (picture,) = (own.parent / "own-shots" / "new").iterdir()
        stays = client.post("/v1/indexes/own/duplicate", json={"name": "copy"})
        assert (stays.status_code, named(stays)) == (201, ("copy", 1))
        moved = client.patch("/v1/indexes/own", json={"name": "tiere 2"})
        assert (moved.status_code, named(moved)) == (200, ("tiere 2", 2))
        assert client.get("/v1/indexes").json()["indexes"] == ["tiere 2", "copy"]
        assert {path.name for path in own.parent.iterdir()} == {"tiere 2", "copy", "own-shots"}
        for name in ("tiere 2", "copy"):
            asked = client.post(
                f"/v1/classify?index={name}", files={"images": photo + b"\0"}
            ).json()
            assert asked["results"][0]["neighbours"][0]["source"] == str(picture)
            assert client.get(f"/v1/indexes/{name}/keys/{key}/image").status_code == 200
        assert 'retrieval_tip_index_keys{index="own"}' not in client.get("/metrics").text

        back = client.patch("/v1/indexes/tiere 2", json={"name": "own"})
        assert named(back) == ("own", 2)
        assert named(client.delete("/v1/indexes/own")) == ("own", 2)
        assert picture.exists()  # the copy still uses it
        assert client.get("/v1/indexes/own").status_code == 404
        for name, undo in (("copy", "own"), ("own", None)):
            if undo:
                client.patch(f"/v1/indexes/{name}", json={"name": undo})
            else:
                assert client.delete(f"/v1/indexes/{name}").status_code == 200
        assert client.get("/v1/indexes").json()["indexes"] == []
    assert [path.name for path in own.parent.iterdir()] == ["own-shots"]
    assert not picture.exists()


def test_names_and_numbers_of_indexes_are_checked(own, food, tmp_path, photo):
    """A linked index, or one that is being labelled, cannot be renamed or deleted."""
    (tmp_path / "link").symlink_to(food)
    served = open_all([own, tmp_path / "link"], Backbones("cpu", "float32", "full"))
    app = create_app(Service(served, Limits(indexes=2)), token=TOKEN)
    (tmp_path / "taken").mkdir()

    def status(method, path, name=None):
        return client.request(
            method, f"/v1/indexes/{path}", json=name and {"name": name}
        ).status_code

    with TestClient(app, headers=AUTHORISED) as client:
        names = {
            "taken": 409,
            "food": 409,
            "../x": 422,
            ".x": 422,
            "a" * 65: 422,
            "own-shots": 422,
            "Food-SHOTS": 422,
        }
        for name, expected in names.items():
            assert (name, status("PATCH", "own", name)) == (name, expected)
            assert (name, status("POST", "own/duplicate", name)) == (name, expected)
        made = client.post(
            "/v1/indexes", files={"images": photo}, data={"name": "new", "label": "a"}
        )
        assert (made.status_code, "limit" in made.json()["detail"]) == (409, True)
        assert status("POST", "own/duplicate", "new") == 409
        for method in ("PATCH", "DELETE"):
            assert status(method, "food", "new") == 422  # a link
        app.state.labelling = SimpleNamespace(name="own")
        assert (status("PATCH", "own", "new"), status("DELETE", "own")) == (409, 409)
        assert client.get("/v1/indexes").json()["indexes"] == ["own", "food"]
    assert {path.name for path in tmp_path.iterdir()} == {"own", "link", "taken"}


def test_an_index_that_holds_photos_of_another_is_neither_renamed_nor_deleted(own, photo):
    """Photos that are added to ``own`` are stored in ``own-shots``, which may be an index that was built earlier."""
    other = Path(shutil.copytree(own, own.with_name("own-shots")))
    with serving(own, other, token=TOKEN) as client:
        key = added(client, photo, "new")["key_ids"][0]
        for method in ("PATCH", "DELETE"):
            refused = client.request(method, "/v1/indexes/own-shots", json={"name": "new"})
            assert (refused.status_code, "photos of another index" in refused.json()["detail"]) == (
                422,
                True,
            )
        copied = client.post("/v1/indexes/own-shots/duplicate", json={"name": "copy"})
        assert copied.status_code == 201
        assert client.get(f"/v1/indexes/own/keys/{key}/image").status_code == 200
        assert client.delete(f"/v1/indexes/own/keys?key_id={key}").status_code == 200
        changes.gc(own, keep=1)
        assert client.delete("/v1/indexes/own-shots").status_code == 200
    assert {path.name for path in own.parent.iterdir()} == {"own", "copy"}


def test_two_versions_are_compared_in_words_and_with_photos_that_are_gone(
    own, photo, truth, monkeypatch
):
    with serving(own, token=TOKEN) as client:

        def compared(version, since):
            answer = client.get(f"/v1/indexes/own/history/{version}?since={since}")
            assert answer.status_code == 200, answer.text
            return [
                " ".join([one["what"], one["change"], *(row["image"] for row in one["photos"])])
                for one in answer.json()
            ]

        image = f"/v1/indexes/own/keys/{(key := added(client, photo, 'new')['key_ids'][0])}/image"
        changed(client, "relabel", labels={key: truth})
        assert client.delete(f"/v1/indexes/own/keys?key_id={key}").status_code == 200
        build, *rest = client.get("/v1/indexes/own/history").json()
        said = ["1 photo: 1 new", f"1 photo: new became {truth}", f"removed 1 photo: 1 {truth}"]
        assert [one["change"] for one in rest] == said
        assert compared(2, 1) == [f"added {said[0]} {image}?version=2"]
        assert compared(3, 2) == [f"moved {said[1]} {image}?version=3"]
        assert compared(4, 3) == [f"removed 1 photo: 1 {truth} {image}?version=3"]
        assert compared(1, 4) == []
        [first] = client.get("/v1/indexes/own/history/1").json()
        assert (first["what"], len(first["photos"])) == ("added", routes_module.LISTED)
        there = [
            client.get(f"{image}?version={version}&size=32").status_code
            for version in (1, 2, 3, 4, 9)
        ]
        assert there == [404, 200, 200, 404, 404]
        assert client.get(f"{image}?size=32").status_code == 404
        assert client.get("/v1/indexes/own/history/9").status_code == 404
        monkeypatch.setattr(routes_module, "COMPARED", build["keys"])
        assert "at most" in client.get("/v1/indexes/own/history/3").json()["detail"]


def test_shots_are_relabelled_classes_renamed_and_versions_rolled_back(own):
    with serving(own, token=TOKEN) as client:

        def keys(label):
            rows = client.get(f"/v1/indexes/own/keys?label={label}").json()["keys"]
            return [row["key_id"] for row in rows]

        first, other, third = client.get("/v1/indexes/own").json()["class_names"][:3]
        shots, others, ids = map(keys, (first, other, third))
        moves = dict.fromkeys(shots[:2], other) | {others[0]: first}
        status, answer = changed(client, "relabel", labels=moves)
        assert (status, answer["version"], answer["key_ids"]) == (200, 2, [*moves])
        assert sorted(keys(first)) == sorted([*shots[2:], others[0]])
        assert sorted(keys(other)) == sorted([*shots[:2], *others[1:]])
        status, answer = changed(client, "rename", of=third, label="squeeze <box>")
        assert (status, answer["version"], answer["key_ids"]) == (200, 3, ids)
        assert keys("squeeze <box>") == ids
        assert changed(client, "rollback", to=1, since=2)[0] == 409
        assert "version 3, not 2" in changed(client, "rollback", to=1, since=2)[1]["detail"]
        assert changed(client, "rollback", to=1, since=3)[1]["version"] == 4
        assert [*map(keys, (first, other, third))] == [shots, others, ids]
        history = client.get("/v1/indexes/own/history").json()
        assert [one["version"] for one in history] == [1, 2, 3, 4]
        assert (history[-1]["change"], history[-1]["current"]) == ("restored version 1", True)
        wrong = [
            ("relabel", {"label": other}, 422),
            ("relabel", {"labels": {}}, 422),
            ("relabel", {"labels": {"a": other}}, 422),
            ("relabel", {"labels": {-1: other}}, 422),
            ("relabel", {"labels": {2**63: other}}, 422),
            ("relabel", {"labels": moves | {999: other}}, 422),
            ("rename", {"of": "no such class", "label": "x"}, 422),
            ("rename", {"of": other, "label": ""}, 422),
            ("rollback", {"to": 99}, 404),
        ]
        for what, body, refused in wrong:
            assert changed(client, what, **body)[0] == refused, (what, body)
        assert client.get("/v1/indexes/own").json()["version"] == 4


def test_the_accuracy_follows_label_changes(own):
    names = Index.load(own).class_names
    fitted = fit_index(own).fit
    with serving(own, token=TOKEN) as client:
        before = client.get("/v1/indexes/own/accuracy").json()
        assert fitted.interval is not None
        expected = {"photos": fitted.photos, "words": fitted.text, "both": fitted.both}
        assert {name: before[name] for name in expected} == pytest.approx(expected)
        assert before["interval"] == pytest.approx(fitted.interval)
        assert (before["version"], before["weakest"]) == (2, [[*one] for one in fitted.weakest])
        assert (before["tested"], before["classes"]) == (10, 10)
        wrong = {"labels": dict.fromkeys(range(0, 80, 4), names[0])}
        client.post("/v1/indexes/own/relabel", json=wrong)
        after = client.get("/v1/indexes/own/accuracy").json()
        assert (after["version"], after["both"] < before["both"] - 0.1) == (3, True)
        client.post("/v1/indexes/own/rollback", json={"to": 2})
        assert client.get("/v1/indexes/own/accuracy").json() == before | {"version": 4}
    with serving(own, limits=Limits(estimated=79)) as client:
        unknown = dict.fromkeys(before) | {"version": 4, "weakest": []}
        assert client.get("/v1/indexes/own/accuracy").json() == unknown


def test_exemplars_are_the_shots_nearest_to_their_class_mean(both, things):
    cache = Index.load(things)
    keys = np.asarray(cache.keys, dtype=np.float64)
    ids = cache.class_ids.numpy()
    found = both.get("/v1/indexes/things/exemplars").json()
    assert {one["class_id"] for one in found} == set(ids.tolist())
    for one in found:
        nearness = np.where(
            ids == one["class_id"], keys @ keys[ids == one["class_id"]].mean(0), -np.inf
        )
        assert one["key_id"] == cache.labels["key_id"].to_pylist()[nearness.argmax()]
    assert both.get(f"{found[0]['image']}?size=32").status_code == 200


def test_uploaded_photos_become_a_new_index(own, tmp_path, lit_mini):
    some = caltech_photos(SHARED, "train", 3, 5)
    other = caltech_photos(SHARED, "test", 3, 1)

    def sent(name, *more):
        files = [("images", (path.name, path.read_bytes())) for path, _ in some] + [
            ("images", one) for one in more
        ]
        return {
            "files": files,
            "data": {"name": name, "label": [label for _, label in some] + ["x"] * len(more)},
        }

    with serving(own, token=TOKEN) as client:
        assert client.get("/v1/indexes").json()["makes"]
        made = client.post("/v1/indexes", **sent("my things", ("a.txt", b"text")))
        assert made.status_code == 201
        body = made.json()
        assert (body["index"], body["version"]) == ("my things", 1)
        assert [one["source"] for one in body["skipped"]] == ["a.txt"]
        assert body["fit"]["both"] > 0.4
        alone = Index.load(tmp_path / "my things")
        assert sorted(set(alone.labels["label"].to_pylist())) == sorted(
            {label for _, label in some}
        )
        assert body["fit"]["both"] == alone.provenance["fit"]["both"]
        more = {"files": {"images": other[0][0].read_bytes()}, "data": {"label": other[0][1]}}
        added = client.post("/v1/indexes/my things/keys", **more)
        assert added.json()["version"] == 2
        fitted = client.post("/v1/indexes/my things/fit").json()
        assert (fitted["version"], fitted["fit"]["summary"][:9]) == (3, "Estimated")
        assert client.post("/v1/indexes", **sent("my things")).status_code == 409
        for name in ("own-shots/..", "own-shots"):
            assert client.post("/v1/indexes", **sent(name)).status_code == 422
        wrong = sent("other")
        wrong["data"]["label"] = wrong["data"]["label"][1:]
        assert "for 15 images" in client.post("/v1/indexes", **wrong).json()["detail"]
        assert not (tmp_path / "other").exists()

    loads = []

    def load():
        loads.append(lit_mini)
        return lit_mini

    maker = Maker(tmp_path / "shelf", load, Backbones("cpu", "float32", "full", lit_mini))
    with TestClient(
        create_app(Service({}, maker=maker), token=TOKEN), headers=AUTHORISED
    ) as client:
        assert client.get("/v1/indexes").json() == {
            "indexes": [],
            "changes": True,
            "makes": True,
            "labels": False,
        }
        assert client.post("/v1/classify", files={"images": b"x"}).status_code == 404
        assert not loads  # an encoder may have to be downloaded
        assert client.post("/v1/indexes", **sent("first")).status_code == 201
        assert Index.load(tmp_path / "shelf" / "first").n == 15


def test_a_photo_that_becomes_a_shot_is_decoded_once(
    own, tmp_path, lit_mini, photo, truth, monkeypatch
):
    """Its key is the feature that the encoder makes, and its file and digest are those of the photo."""
    decoded = []
    decode = images.decode

    def counted(data, *arguments, **options):
        decoded.append(hashlib.sha256(data).hexdigest())
        return decode(data, *arguments, **options)

    monkeypatch.setattr(images, "decode", counted)
    some = [photo, *(path.read_bytes() for path, _ in caltech_photos(SHARED, "test", 3, 1)[1:])]
    digests = [hashlib.sha256(data).hexdigest() for data in some]
    [expected] = (
        Reader(lit_mini)
        .encode(of_images([str(caltech_photos(SHARED, "test", 1, 1)[0][0])]))
        .features
    )
    decoded.clear()
    with serving(own, token=TOKEN) as client:
        assert added(client, photo, truth)["known"] == 0
        assert decoded == digests[:1]
        assert added(client, photo, truth)["known"] == 1
        decoded.clear()
        data = {"name": "new", "label": ["b", "a", "b"]}
        assert (
            client.post(
                "/v1/indexes", files=[("images", one) for one in some], data=data
            ).status_code
            == 201
        )
        assert sorted(decoded) == sorted(digests)
    for folder, label, asked in ((own, truth, digests[:1]), (tmp_path / "new", "b", digests)):
        index = Index.load(folder)
        rows = index.having("digest", asked).to_pylist()
        assert len(rows) == len(asked)
        assert index.provenance["precision"] == {"keys": "float32"}
        for row in rows:
            assert hashlib.sha256(Path(row["source"]).read_bytes()).hexdigest() == row["digest"]
        [row] = index.having("digest", digests[:1]).to_pylist()
        assert (row["label"], row["views"]) == (label, 1)
        key = index.keys[index.labels["key_id"].to_pylist().index(row["key_id"])]
        assert_allclose(key, expected, atol=1e-5)


def test_added_features_get_sources_that_are_not_files(own, truth):
    """A class in another spelling is a new one, with a warning."""
    features = Index.load(own).keys[[-1, 0]].tolist()  # of another class, and of the first
    other = truth.upper()
    with serving(own, token=TOKEN) as client:
        sent = {"features": features, "labels": [truth, other], "inputs": ["a.jpg", "b"]}
        refused = client.post("/v1/indexes/own/keys", json={**sent, "labels": [truth]})
        assert refused.status_code == 422
        body = client.post("/v1/indexes/own/keys", json=sent).json()
        assert (len(body["key_ids"]), body["classes"], len(body["duplicates"])) == (
            2,
            [other],
            2,
        )
        assert body["warnings"] == [
            f"{other!r} is spelled almost like {truth!r}; rename one to merge them"
        ]
        rows = client.get("/v1/indexes/own/keys", params={"key_id": body["key_ids"]}).json()["keys"]
        assert sorted(row["source"] for row in rows) == ["api:a.jpg", "api:b"]
        assert [row["image"] for row in rows] == [None, None]


def test_labels_become_safe_folder_names_or_are_refused(own, photo):
    safe = ["../../evil", "..", "a/b\\c", ".hidden", "naïve é 💥", "<b>x</b>", "x" * 600]
    with serving(own, token=TOKEN) as client:
        for label in ("", "   ", "two\nlines", "x" * 1025, *safe):
            sent = {"files": {"images": photo}, "data": {"label": label}}
            answer = client.post("/v1/indexes/own/keys", **sent)
            assert answer.status_code == (201 if label in safe else 422), label
            assert label not in safe or answer.json()["classes"] == [label]
    folders = list((own.parent / "own-shots").iterdir())
    assert [len(list(folder.iterdir())) for folder in folders] == [1] * len(safe)
    assert not [folder for folder in folders if folder.name.startswith(".")]
    assert sorted(path.name for path in own.parent.iterdir()) == ["own", "own-shots"]


def test_every_upload_format_is_classified_and_added(own, photo):
    with (
        serving(own, token=TOKEN) as client,
        Image.open(io.BytesIO(photo)) as image,
    ):
        for number, style in enumerate((*images.uploads(), "MPO")):
            sent = io.BytesIO()
            image.save(sent, style)
            files = {"images": ("photo", sent.getvalue())}
            answer = client.post("/v1/classify", files=files)
            assert answer.status_code == 200, answer.text
            added = client.post("/v1/indexes/own/keys", files=files, data={"label": style})
            assert (added.status_code, added.json()["key_ids"]) == (201, [80 + number])
            (kept,) = (own.parent / "own-shots" / style).iterdir()
            assert kept.read_bytes() == sent.getvalue()
            assert kept.suffix in images.extensions()
            assert client.get(f"/v1/indexes/own/keys/{80 + number}/image").status_code == 200


def test_other_formats_are_refused_and_not_kept(own):
    with serving(own, token=TOKEN) as client:
        for style in ("ICO", "GIF", "TIFF", "BMP", "PPM"):
            sent = io.BytesIO()
            Image.new("RGB", (64, 64)).save(sent, style)
            files = {"images": ("icon", sent.getvalue())}
            for path, more in (
                ("/v1/classify", {}),
                ("/v1/indexes/own/keys", {"data": {"label": "new"}}),
            ):
                answer = client.post(path, files=files, **more)
                assert (
                    answer.status_code,
                    "icon: not a readable image" in answer.json()["detail"],
                ) == (422, True)
    assert not (own.parent / "own-shots").exists()


FULL = OSError(28, "No space left on device", "keys.npy")


@pytest.mark.parametrize("error", [RuntimeError("nobody thought of this"), FULL])
@pytest.mark.parametrize("what", ["index", "shot"])
def test_no_image_or_folder_is_kept_after_an_error(own, monkeypatch, photo, error, what):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(
        *((shots_module, "build_index") if what == "index" else (changes, "add")), broken
    )
    app = app_of(own, token=TOKEN)
    with TestClient(app, headers=AUTHORISED, raise_server_exceptions=False) as client:
        path = "/v1/indexes" if what == "index" else "/v1/indexes/own/keys"
        more = {"name": "new"} if what == "index" else {}
        answer = client.post(path, files={"images": photo}, data={"label": "new"} | more)
        assert answer.status_code == (503 if error is FULL else 500)
        assert ("No space left" in answer.text) == (error is FULL)
        assert len(client.get("/v1/indexes").json()["indexes"]) == 1
    assert {path.name for path in own.parent.iterdir()} == {"own"}


def test_an_image_replaced_by_another_photo_a_pipe_a_link_or_a_folder_is_not_found(own, photo):
    with serving(own, token=TOKEN) as client:
        added(client, photo, "new")
        (kept,) = (own.parent / "own-shots" / "new").iterdir()
        assert client.get("/v1/indexes/own/keys/80/image").status_code == 200
        kept.unlink()
        for make in (
            lambda path: Image.new("RGB", (40, 30)).save(path, "JPEG"),
            os.mkfifo,
            lambda path: path.symlink_to("/proc/self/pagemap"),
            lambda path: path.mkdir(),
        ):
            make(kept)
            assert client.get("/v1/indexes/own/keys/80/image").status_code == 404
            kept.rmdir() if kept.is_dir() else kept.unlink()


def test_the_server_loads_new_versions_but_not_damaged_ones(own):
    served = open_all([own], Backbones("cpu", "float32", "full"))
    one = served["own"]
    with TestClient(create_app(Service(served))) as client:
        assert not one.changed()
        changes.remove(own, key_ids=[0])
        assert one.changed()
        one.follow()
        assert one.now.index.n == 79
        assert client.get("/v1/indexes/own").json()["n"] == 79
        changes.remove(own, key_ids=[1])
        file = next(
            file for file in one.now.manifest.data_files if file.name.startswith("data/text")
        )
        shutil.copy(own / file.name, (own / file.name).parent / "whole")
        (own / file.name).unlink()  # not overwritten: the open version maps this file
        (own / file.name).write_bytes(b"damaged")
        whole = (own / file.name).parent / "whole"
        one.follow()
        assert one.now.index.n == 79
        assert not one.changed()
        (own / file.name).unlink()
        whole.rename(own / file.name)
        assert not one.changed()
        one._retry_at = 0.0  # instead of half a minute
        assert one.changed()
        one.follow()
        assert one.now.index.n == 78
        (next_one := own / "manifests" / "000099.json").write_text("{")
        assert one.changed()
        before = one.now
        one.follow()
        assert one.now is before
        assert not one.changed()
        feature = np.asarray(one.now.index.keys[:1]).tolist()
        assert client.post("/v1/classify", json={"features": feature}).status_code == 200
        counted = client.get("/metrics").text
        assert 'retrieval_tip_reloads_total{index="own",outcome="failed"}' in counted
        next_one.parent.rename(own / "gone")
        assert not one.changed()
        assert client.post("/v1/classify", json={"features": feature}).status_code == 200


def test_a_change_opens_what_it_has_written_unless_a_later_version_is_open(own):
    backbones = Backbones("cpu", "float32", "full")
    one = Served(own, backbones)

    def change(key_id, *later, follow=False):
        """Remove a key, and some more in another process before the server has opened the new version."""

        def call(place, *, base):
            done = changes.remove(place, key_ids=[key_id], base=base)
            for other in later:
                changes.remove(place, key_ids=[other])
            if follow:
                one.follow()
            return done

        one.change(call)
        return one.now.manifest.version

    assert change(0) == 2
    written = one.now.index
    one.follow()
    assert one.now.index is written  # it was not read again
    assert not one.changed()
    assert change(1, 2) == 3
    assert one.changed()
    one.follow()
    assert (one.now.manifest.version, one.now.index.n) == (4, 77)
    assert change(3, 4, follow=True) == 6
    assert (one.now.index.n, Index.load(own).version) == (75, 6)
    index = changes.remove(own, key_ids=[5]).index
    new = Served(own, backbones, index)
    changes.remove(own, key_ids=[6])
    assert new.now.index is index
    assert new.changed()
    new.follow()
    assert new.now.index.n == 73


def test_another_index_can_replace_the_folder(own, food):
    """Its features may have another length. A version that is already open keeps its data."""
    served = open_all([own], Backbones("cpu", "float32", "full"))
    before = served["own"].now
    shutil.rmtree(own)
    shutil.copytree(food, own)
    served["own"].follow()
    after = served["own"].now
    assert (after.index.d, after.backbone) == (512, None)
    with TestClient(create_app(Service(served))) as client:
        feature = np.asarray(after.index.keys[:1]).tolist()
        assert client.post("/v1/classify", json={"features": feature}).status_code == 200
        assert client.post("/v1/classify", files={"images": b"x"}).status_code == 422
    assert before.index.d == 1280


UNUSABLE = {
    "not JSON": (422, b"{"),
    "wrong length": (422, b'{"features": [[1, 2]]}'),
    "nested": (422, b'{"features": [[%s]]}' % b",".join([b"[1]"] * 512)),
    "norm above 1": (422, b'{"features": [[%s]]}' % b",".join([b"1"] * 512)),
    "overflow": (422, b'{"features": [[%s]]}' % b",".join([b"1e300"] * 512)),
    "NaN": (422, b'{"features": [[%s]]}' % b",".join([b"NaN"] * 512)),
    "deeply nested": (422, b"[" * 60_000),
    "millions of lists": (413, b'{"features": [%s]}' % b",".join([b"[]"] * 2_500_000)),
    "millions of fields": (413, b"{%s}" % b",".join(b'"%x":0' % i for i in range(700_000))),
    "millions of numbers": (413, b'{"features": [%s]}' % b",".join([b"0"] * 4_000_000)),
    "one string": (422, b'{"features": [[%s, "1"]]}' % b",".join([b"0.0441941738"] * 511)),
    "one row of the wrong length": (
        422,
        b'{"features": [[%s], [1]]}' % b",".join([b"0.0441941738"] * 512),
    ),
    "unknown field": (422, b'{"features": [], "feature": 1}'),
    "wrong number of inputs": (422, b'{"features": [], "inputs": ["a"]}'),
    "too many rows": (413, b'{"features": [%s]}' % b",".join([b"[]"] * 1025)),
    "too many bytes": (413, b" " * (8 << 20) + b"{}"),
}


def test_bad_features_are_refused_but_not_integers_and_tiny_numbers(both):
    kind = {"Content-Type": "application/json"}
    for what, (status, body) in UNUSABLE.items():
        answer = both.post("/v1/classify?index=food", content=body, headers=kind)
        assert answer.status_code == status, (what, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == status
        assert "\n" not in problem["detail"]
    rows = [[1] + [0] * 511, [1.0, -0.0] + [0] * 510, [0, 1] + [1e-300] * 510]
    answer = both.post("/v1/classify?index=food", json={"features": rows})
    assert (answer.status_code, len(answer.json()["results"])) == (200, 3)


BODIES = [
    ("relabel", "application/json", 1000),
    ("keys", "application/json", 1000),
    ("set", "text/csv", 1000),
    ("keys", "multipart/form-data; boundary=x", 5000),
    ("groups", "application/octet-stream", 5000),
]


def test_the_size_of_each_kind_of_body_is_limited(own):
    """Whether the size is announced or not."""
    with serving(own, token=TOKEN, limits=Limits(bytes=5000, json_bytes=1000)) as client:
        for (path, kind, limit), announced in itertools.product(BODIES, [True, False]):
            for size in (900, limit + 1):
                body = b" " * size
                content = body if announced else iter([body[:500], body[500:]])
                headers = {"Content-Type": kind}
                answer = client.post(f"/v1/indexes/own/{path}", content=content, headers=headers)
                assert (answer.status_code == 413) == (size > limit), (path, kind, announced)
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["status"] == answer.status_code
            assert "send" in answer.json()["detail"]


@pytest.fixture(scope="module")
def random_things(tmp_path_factory):
    return random_index(tmp_path_factory.mktemp("random") / "random", 2000, 16, 50)


@pytest.mark.parametrize(
    ("query", "cells"),
    [
        ("features=true", 20 + 80 + 16 + 200),
        ("logits=true", 20 + 80 + 50),
        ("top=1000", 200 + 80),
        ("neighbours=1000", 20 + 16_000),
        ("neighbours=0&k=1500", 20 + 1500),
        ("neighbours=0&k=all", 20),
    ],
)
def test_the_size_of_an_answer_is_checked_before_it_is_computed(
    random_things, query, cells, monkeypatch
):
    row = [0.25] * 16
    with serving(random_things, limits=Limits(cells=7 * cells)) as client:
        assert client.post(f"/v1/classify?{query}", json={"features": [row] * 7}).status_code == 200
        monkeypatch.setattr(Index, "classify", None)  # calling it would fail
        answer = client.post(f"/v1/classify?{query}", json={"features": [row] * 8})
        assert answer.status_code == 422
        assert f"{7 * cells:,}" in answer.json()["detail"]
        assert "at most 7 at once" in answer.json()["detail"]
    monkeypatch.undo()
    with serving(
        random_things, limits=Limits(cells=1)
    ) as client:  # a single query is always answered
        assert client.post(f"/v1/classify?{query}", json={"features": [row]}).status_code == 200


def test_answers_do_not_depend_on_the_batch_size(random_things, monkeypatch):
    rows = np.asarray(Index.load(random_things).keys[:40], dtype=np.float64).tolist()
    ask = "/v1/classify?features=true&logits=true&neighbours=1000"
    with serving(random_things) as client:
        expected = client.post(ask, json={"features": rows}).json()["results"]
        monkeypatch.setattr(served_module, "VALUES", 50_000)
        found = client.post(ask, json={"features": rows}).json()["results"]
    version = open_all([random_things], Backbones("cpu", "float32", "full"))["random"].now
    assert version.at_once(Ask(top=5, neighbours=1000)) == 3
    assert version.at_once(Ask(k=1500, neighbours=0)) == 32
    for one, other in zip(found, expected, strict=True):
        assert one["label"] == other["label"]
        assert [shot["key_id"] for shot in one["similar"][:3]] == [
            shot["key_id"] for shot in other["similar"][:3]
        ]
        assert_allclose(one["logits"], other["logits"], rtol=1e-4, atol=1e-5)


def test_invalid_requests_are_refused(both, things, photo):
    feature = {"features": [[512**-0.5] * 512]}

    def status(path, **sent):
        answer = both.post(path, **sent)
        assert answer.headers["content-type"] == "application/problem+json", answer.text
        return int(answer.status_code)

    assert status("/v1/classify", json=feature) == 422  # which index?
    assert status("/v1/classify?index=none", json=feature) == 404
    assert (
        status("/v1/classify?index=food", files={"images": photo}) == 422
    )  # this index only accepts features
    assert (
        status("/v1/classify?index=things", content=photo, headers={"Content-Type": "image/jpeg"})
        == 415
    )
    assert status("/v1/classify?index=things", content=b"") == 415
    assert status("/v1/classify?index=things", files={"image": photo}) == 422
    assert status("/v1/classify?index=things", data={"images": "x"}, files={"images": photo}) == 422
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert status("/v1/classify?index=things", content=b"--y\r\n", headers=form) in (400, 422)
    assert (
        status(
            "/v1/classify?index=things",
            content=b"x",
            headers={"Content-Type": "multipart/form-data"},
        )
        == 400
    )
    assert status("/v1/classify?index=things", files=[("images", photo)] * 65) == 400
    for charset in ("undefined", "punycode", "utf-16"):
        form = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
        body = b'--x\r\nContent-Disposition: form-data; name="images"\r\n\r\nx\r\n--x--\r\n'
        assert status("/v1/classify?index=things", content=body, headers=form) == 415
    for query in (
        "alpha=-1",
        "beta=nan",
        "beta=inf",
        "k=0",
        "k=some",
        "top=0",
        "neighbours=-1",
        "tail=perhaps",
    ):
        assert status(f"/v1/classify?index=food&{query}", json=feature) == 422
    assert (
        status("/v1/classify?index=food&alpha=1e308&beta=0", json=feature) == 422
    )  # the logits overflow
    assert both.put("/v1/classify").status_code == 405
    assert both.get("/v1/nothing").json()["title"] == "Not Found"
    assert both.get("/v1/indexes/things/keys?limit=0").status_code == 422


def test_readable_images_are_classified_and_the_others_are_reported(both, photo, truth):
    files = [
        ("images", ("a.txt", b"text")),
        ("images", ("b.jpg", photo)),
        ("images", ("c.jpg", b"")),
    ]
    answer = both.post("/v1/classify?index=things", files=files)
    body = answer.json()
    assert answer.status_code == 200
    assert [(one["input"], one["label"]) for one in body["results"]] == [("b.jpg", truth)]
    assert [one["source"] for one in body["skipped"]] == ["a.txt", "c.jpg"]


@pytest.fixture
def busy(own, monkeypatch):
    """Return a function that yields a client while its large photos wait to be decoded."""
    go = threading.Event()
    real = service_module.pixels_of

    def pixels(data, *arguments, **options):
        assert images.area(data) < 1_000_000 or go.wait(30)
        return real(data, *arguments, **options)

    @contextmanager
    def waiting(number, size):
        picture = io.BytesIO()
        Image.new("RGB", size).save(picture, "PNG")
        app = ProxyHeadersMiddleware(app_of(own, limits=Limits(queue=40)), "*")
        with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                client.post, "/v1/classify", files=[("images", picture.getvalue())] * number
            )
            while not re.search(
                r'waiting{lane="(large )?images"} [1-9]', client.get("/metrics").text
            ):
                assert not asked.done()
            yield client
            assert not asked.done()
            go.set()
            assert asked.result().status_code == 200

    monkeypatch.setattr(service_module, "pixels_of", pixels)
    return waiting


LARGE = (2200, 2300)


def test_a_small_photo_does_not_wait_for_large_photos_of_other_clients(busy, photo):
    with busy(10, LARGE) as client:
        answer = client.post(
            "/v1/classify", files={"images": photo}, headers={"X-Forwarded-For": "10.0.0.1"}
        )
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("number", "size"), [(20, (1000, 1000)), (10, LARGE)], ids=["number", "pixels"]
)
def test_a_client_is_refused_while_many_or_large_photos_of_it_wait(busy, photo, number, size):
    with busy(number, size) as client:
        refused = client.post("/v1/classify", files={"images": photo})
        assert (refused.status_code, int(refused.headers["retry-after"]) >= 1) == (429, True)


def test_an_incomplete_form_is_refused(both, photo):
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    form = head + photo + b"\r\n" + head + photo + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for left_out in (len(photo) // 2, 5):
        answer = both.post("/v1/classify?index=things", content=form[:-left_out], headers=kind)
        assert (answer.status_code, "last boundary" in answer.json()["detail"]) == (400, True)
    whole = both.post("/v1/classify?index=things", content=form, headers=kind)
    assert (whole.status_code, len(whole.json()["results"])) == (200, 2)


def test_requests_from_other_sites_need_the_token(own, photo):
    with TestClient(app_of(own, token=TOKEN)) as client:

        def statuses(site, **headers):
            sent = {"headers": {"Sec-Fetch-Site": site, **headers}}
            classified = client.post("/v1/classify", files={"images": photo}, **sent)
            return (classified.status_code, client.get("/v1/indexes", **sent).status_code)

        assert statuses("cross-site") == (403, 403)
        assert statuses("cross-site", Authorization="Bearer wrong") == (403, 403)
        for site in ("none", "same-origin", "same-site"):
            assert statuses(site) == (200, 200)
        assert statuses("cross-site", **AUTHORISED) == (200, 200)
        assert (
            client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
        )  # a link to the page


def test_a_private_server_answers_only_with_the_token(own, photo, truth):
    """The page itself and the health check stay open. GET requests, as of images, may send a cookie instead."""
    app = app_of(own, token=TOKEN, private=TOKEN)
    picture = "/v1/indexes/own/keys/7/image"
    with TestClient(app) as client:
        for path, methods in client.get("/openapi.json").json()["paths"].items():
            for method in methods if path != "/healthz" else ():
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    refused = client.request(method, path.replace("{name}", "own"), headers=headers)
                    assert (path, method, refused.status_code) == (path, method, 401)
        for path in ("/", "/openapi.json", "/page/app.js", "/healthz"):
            assert client.get(path).status_code == 200
        assert client.get("/metrics", headers=AUTHORISED).status_code == 200
        assert not client.cookies
        listed = client.get("/v1/indexes", headers=AUTHORISED)
        assert listed.json()["indexes"] == ["own"]
        cookie = listed.headers["set-cookie"]
        assert {"HttpOnly", "Path=/v1", "SameSite=strict"} <= set(cookie.split("; "))
        assert TOKEN not in cookie
        assert client.get(picture).status_code == 200
        assert client.post("/v1/classify", files={"images": photo}).status_code == 401
        assert client.delete("/v1/indexes/own/keys?key_id=1").status_code == 401
        asked = client.post("/v1/classify", files={"images": photo}, headers=AUTHORISED)
        assert asked.json()["results"][0]["label"] == truth
        assert client.delete("/v1/indexes/own/keys?key_id=1", headers=AUTHORISED).status_code == 200
        client.cookies.clear()
        assert (
            client.get(picture, headers={"Cookie": f"{cookie.partition(';')[0]}0"}).status_code
            == 401
        )
    with TestClient(app, base_url="https://testserver") as client:
        assert "; Secure" in client.get("/v1/indexes", headers=AUTHORISED).headers["set-cookie"]


def test_errors_name_request_fields_instead_of_command_options(both, own, tmp_path):
    long = {"features": [[1.0] * 512]}
    refused = both.post("/v1/classify?index=food", json=long).json()["detail"]
    assert "norms=unit" in refused
    assert "--" not in refused
    for norms in ("unit", "keep"):
        assert both.post(f"/v1/classify?index=food&norms={norms}", json=long).status_code == 200
    cache = Index.load(own)
    keys = np.asarray(cache.keys)
    names = cache.class_names[:2]
    Index.from_features(keys[:2], names, names, keys[:2]).save(tmp_path / "text")
    with serving(tmp_path / "text", token=TOKEN) as client:
        sent = {"features": [keys[2].tolist()], "labels": ["new"]}
        answer = client.post("/v1/indexes/text/keys", json=sent)
        assert (answer.status_code, "--" in answer.json()["detail"]) == (422, False)


def test_the_page_loads_nothing_from_other_sites(both):
    page = both.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text
    assert both.get("/page/photo.js").headers["content-type"].startswith("text/javascript")


def test_health_and_metrics(both):
    assert both.get("/healthz").json()["status"] == "ok"
    text = both.get("/metrics").text
    assert 'retrieval_tip_requests_total{method="GET",route="/healthz",status="200"}' in text
    assert 'retrieval_tip_index_keys{index="things"} 80.0' in text
    assert "process_resident_memory_bytes" in text


def test_two_indexes_with_the_same_name_are_refused(own, tmp_path):
    other = shutil.copytree(own, tmp_path / "elsewhere" / "own")
    with pytest.raises(ValueError, match="own"):
        open_all([own, other], Backbones("cpu", "float32", "full"))


@pytest.mark.parametrize("code", [False, True], ids=["missing", "needs code"])
def test_an_index_without_its_backbone_only_accepts_features(
    own, tmp_path, caplog, monkeypatch, code
):
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    cache = Index.load(own)
    model = f"hf:{with_code(tmp_path / 'model')}" if code else "local-dir:/gone"
    cache.backbone = replace(cache.backbone, model=model)
    cache.save(own)
    with serving(own) as client:
        assert not client.get("/v1/indexes/own").json()["images"]
        answer = client.post("/v1/classify", files={"images": b"x"})
        assert (answer.status_code, "only accepts features" in answer.json()["detail"]) == (
            422,
            True,
        )
    assert "only features are accepted" in caplog.text
    assert answers.tell() == 0
    assert not (tmp_path / "model" / "ran").exists()


def test_the_server_and_the_encoder_compute_the_same_features(both, lit_mini, tmp_path, photo):
    """The large photo is decoded at a reduced size. Two images are not RGB."""
    with Image.open(io.BytesIO(photo)) as image:
        image.save(tmp_path / "small.png")
        image.resize((2000, 1500)).save(tmp_path / "large.jpg")
        image.convert("L").save(tmp_path / "grey.png")
        image.convert("P").save(tmp_path / "palette.png")
    paths = [tmp_path / name for name in ("small.png", "grey.png", "large.jpg", "palette.png")]
    (tmp_path / "all.csv").write_text("path,label\n" + "".join(f"{path},x\n" for path in paths))
    expected = Reader(lit_mini).encode(open_source(tmp_path / "all.csv")).features
    files = [("images", path.read_bytes()) for path in paths]
    found = both.post("/v1/classify?index=things&features=true", files=files).json()["results"]
    assert_allclose([one["feature"] for one in found], expected, atol=2e-6)


def test_a_command_names_the_common_folder_of_the_photos_unless_it_contains_the_index(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    paths = ["my photos/a/1.png", "my photos/b/2.png", "ix-shots/a/3.png", "gone/4.png"]
    for path in paths[:3]:
        Path(path).parent.mkdir(parents=True)
    command = functools.partial(added_photos.command, "sort")
    both, *each = (quote(f"{tmp_path}/my photos{part}") for part in ("", "/a", "/b"))
    assert command("ix", paths[:2]) == f"retrieval-tip sort {tmp_path}/ix {both}"
    every = f"{tmp_path}/ix-shots/a {' '.join(each)}"
    assert (
        command("ix", paths, "--into", "fixed")
        == f"retrieval-tip sort {tmp_path}/ix {every} --into fixed"
    )
    assert command("s3://bucket/ix", paths[:1]) == f"retrieval-tip sort s3://bucket/ix {each[0]}"
    assert command("ix", ["gone/4.png", "https://example.org/5.png"]) is None
