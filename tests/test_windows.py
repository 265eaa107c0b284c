"""Killed processes and a served photo on Windows, where the other tests of kills cannot fork."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import LIT_MINI
from serving import asked, caltech_photos, server
from tables import write_table

from retrieval_tip import Index
from retrieval_tip.index import changes, places

pytestmark = [
    pytest.mark.skipif(os.name != "nt", reason="SKIPPED: make windows runs it"),
    pytest.mark.timeout(900),
]

KILLS, SESSIONS, LABELS = 8, 4, 3


def features(n, seed):
    keys = np.random.default_rng(seed).normal(size=(n, 64)).astype(np.float32)
    return keys / np.linalg.norm(keys, axis=1, keepdims=True), np.arange(n) % 5


NAMES = [f"class {number}" for number in range(5)]


WRITER = """
import sys
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.index import changes
folder, table = sys.argv[1:]
while True:
    print(changes.add(folder, open_source(table), Reader(None)).version, flush=True)
    print(changes.remove(folder, where="key_id >= 400").version, flush=True)
"""
"""Program that adds shots and removes them again, and prints the number of each version that was committed."""


def test_an_index_is_whole_after_its_writer_is_killed(tmp_path):
    folder = tmp_path / "index"
    keys, class_ids = features(400, 0)
    Index.from_features(keys, class_ids, NAMES).save(folder)
    new, class_ids = features(20, 1)
    table = write_table(tmp_path / "more.parquet", new, [NAMES[i] for i in class_ids])
    moments = random.Random(1)
    acknowledged = 1
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, folder, table], stdout=subprocess.PIPE
        )
        for _ in range(moments.randrange(1, 4)):
            acknowledged = int(writer.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(moments.uniform(0, 0.1))
        writer.kill()
        acknowledged = int([acknowledged, *writer.stdout.read().split()][-1])
        writer.wait()
        writer.stdout.close()
        store = places.at(folder)
        manifest = store.manifest()
        assert acknowledged <= manifest.version <= acknowledged + 1
        store.check(manifest)
        assert len(Index.load(folder).logits(keys[:3])) == 3
    changes.rollback(folder)
    assert not [*folder.rglob("*.tmp")]


def test_a_photo_is_classified_over_http(things, shared):
    (photo, label), *_ = caltech_photos(shared, "train", 1, 1)
    with server(things) as (url, _):
        answer = httpx.post(f"{url}/v1/classify", files={"images": photo.read_bytes()}, timeout=60)
    assert answer.json()["results"][0]["label"] == label


def test_labels_survive_kills_and_restarts(shared, tmp_path):
    folder, index = tmp_path / "photos", tmp_path / "index"
    folder.mkdir()
    right = {}
    for number, (path, label) in enumerate(caltech_photos(shared, "train", 3, 8)):
        right[shutil.copy(path, folder / f"{number}.jpg").name] = label
    arguments = folder, "--out", index, "--model", LIT_MINI
    labelled = {}
    for _ in range(SESSIONS):
        with server(*arguments, command="label", port=None) as (url, process):
            while asked(url)["labelled"] < len(
                labelled
            ):  # the queue has photos that are not read yet
                time.sleep(0.05)
            queue = asked(url)["queue"]
            for photo in queue[:LABELS]:
                label = right[Path(photo["name"]).name]
                asked(url, {"labels": [{"photo": photo["photo"], "label": label}]})
                labelled[Path(photo["name"]).name] = label
            process.kill()
            process.wait()
    with server(*arguments, command="label", port=None) as (url, _):
        while asked(url)["unsaved"]:
            time.sleep(0.05)
    rows = places.at(index).load().labels.to_pylist()
    assert {Path(row["source"]).name: row["label"] for row in rows} == labelled
    assert len(rows) == SESSIONS * LABELS
