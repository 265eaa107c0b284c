"""After any sequence of changes, an index folder answers like a fresh build."""

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import SOAK, few
from dense import affinity, cache_logits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tables import unit_rows, write_table

from retrieval_tip import Index, verify
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.index import changes
from retrieval_tip.settings import Settings
from retrieval_tip.store.versions import Versions

Array = npt.NDArray[Any]
D, ALPHA, BETA, SCALE = 6, 1.5, 4.0, 10.0
SETTINGS = Settings(ALPHA, BETA, SCALE)
LEAST, MOST, CLASSES = 6, 60, 6  # an inverted file of 4 lists needs 4 keys
K = 5
KEPT = 4
QUERIES = unit_rows(4, D, 99)
FACTORIES = ["Flat", "Classes", "Classes,HNSW8", "IVF4,Flat"]


@dataclass(frozen=True)
class State:
    """Expected contents of an index: class and vector by key id, and the text weights of the classes in order."""

    keys: dict[int, tuple[str, Array]]
    text: dict[str, Array]
    factory: str
    dtype: str

    def fresh(self):
        """Return a classifier that is built from these contents at once."""
        labels = [label for label, _ in self.keys.values()]
        vectors = np.stack([vector for _, vector in self.keys.values()])
        return Index.from_features(
            vectors, labels, list(self.text), np.stack(list(self.text.values())), settings=SETTINGS, device="cpu",
            sources=[str(key_id) for key_id in self.keys],
        )  # fmt: skip


@dataclass
class OpenVersion:
    """A reader that has a version open, and the logits it should keep returning."""

    index: Index
    state: State
    logits: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.logits = self.state.fresh().logits(QUERIES)


class Living(RuleBasedStateMachine):
    """An index folder, its expected contents, and a reader of one version."""

    factory: str
    dtype: str

    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="retrieval-tip-living-"))
        self.folder = self.place / "index"
        self.patch = mock.patch("retrieval_tip.store.versions.KEPT_VERSIONS", KEPT)
        self.patch.start()
        self.drawn = self.named = 0

    def teardown(self):
        self.patch.stop()
        shutil.rmtree(self.place)

    def vectors(self, n):
        self.drawn += 1
        return unit_rows(n, D, self.drawn)

    def new_names(self, n):
        self.named += n
        return [f"class {i:02}" for i in range(self.named - n, self.named)]

    @initialize(n=st.integers(LEAST, 30), c=st.integers(1, 3))
    def build(self, n, c):
        names, vectors, text = self.new_names(c), self.vectors(n).astype(self.dtype), self.vectors(c)
        cache = Index.from_features(
            vectors, np.arange(n) % c, names, text, settings=SETTINGS, index=self.factory, device="cpu"
        )  # fmt: skip
        cache.save(self.folder)
        keys = {i: (names[i % c], vector) for i, vector in enumerate(vectors)}
        self.state = State(keys, dict(zip(names, text, strict=True)), self.factory, self.dtype)
        self.kept, self.version, self.next_key_id = {1: self.state}, 1, n
        self.reader = OpenVersion(Index.load(self.folder, device="cpu"), self.state)
        self.program = Index.load(self.folder, device="cpu")

    def commit(self, state):
        """Record a new version."""
        self.state, self.version = state, self.version + 1
        self.kept[self.version] = state
        self.kept = dict(list(self.kept.items())[-KEPT:])

    @precondition(lambda self: len(self.state.keys) < MOST)
    @rule(n=st.integers(1, 4), new=st.integers(0, 2), data=st.data())
    def add_by_command(self, n, new, data):
        self.add(n, new, data, by_command=True)

    @precondition(lambda self: len(self.state.keys) < MOST)
    @rule(n=st.integers(1, 6), new=st.integers(0, 2), data=st.data())
    def add_in_a_program(self, n, new, data):
        self.add(n, new, data, by_command=False)

    def add(self, n, new, data, by_command):
        new = min(new, n, CLASSES - len(self.state.text))
        names = self.new_names(new)
        drawn = data.draw(st.lists(st.sampled_from([*self.state.text, *names]), min_size=n - new, max_size=n - new))
        labels, vectors = [*names, *drawn], self.vectors(n)
        text = dict(zip(names, self.vectors(new), strict=True)) if new else {}
        if by_command:
            table = write_table(self.place / "new.parquet", vectors, labels)
            weights = write_table(self.place / "text.parquet", list(text.values()), names) if new else None
            added = changes.add(self.folder, open_source(table), Reader(), text=weights)
            key_ids = added.key_ids
            assert added.classes == names
        else:
            self.program = cache = self.program.reload()
            if new:
                cache.add_classes(names, np.stack(list(text.values())))
            key_ids = cache.add(vectors, labels)
            cache.save(self.folder)
        assert key_ids == list(range(self.next_key_id, self.next_key_id + n))
        self.next_key_id += n
        rows = zip(key_ids, labels, vectors.astype(self.state.dtype), strict=True)
        keys = self.state.keys | {key_id: (label, vector) for key_id, label, vector in rows}
        self.commit(replace(self.state, keys=keys, text=self.state.text | text))
        if not by_command:
            self.check_answers_match_a_fresh_index(self.program)

    def draw_key_ids(self, data, most):
        """Draw key ids, more often from the end."""
        ids = list(self.state.keys)
        from_end = data.draw(st.sampled_from([True, True, True, False]))
        return data.draw(st.lists(st.sampled_from(ids[-6:] if from_end else ids), max_size=most, unique=True))

    @rule(data=st.data())
    def remove(self, data):
        gone = self.draw_key_ids(data, min(5, len(self.state.keys) - LEAST))
        if gone:
            assert changes.remove(self.folder, key_ids=gone).key_ids == gone
            keys = {key_id: key for key_id, key in self.state.keys.items() if key_id not in gone}
            self.commit(replace(self.state, keys=keys))

    @rule(data=st.data())
    def change_in_a_program(self, data):
        """Make several changes in memory and save them as one version."""
        gone = self.draw_key_ids(data, min(5, len(self.state.keys) - LEAST))
        left = [key_id for key_id in self.state.keys if key_id not in gone]
        moved, label = left[-3:-1], data.draw(st.sampled_from(list(self.state.text)))
        self.program = cache = self.program.reload()
        cache.remove(gone)
        cache.relabel(moved, label)
        cache.save(self.folder)
        keys = {key_id: self.state.keys[key_id] for key_id in left}
        keys |= {key_id: (label, self.state.keys[key_id][1]) for key_id in moved}
        self.commit(replace(self.state, keys=keys))
        self.check_keys_and_labels(cache)
        self.check_answers_match_a_fresh_index(cache)

    @rule(data=st.data())
    def relabel(self, data):
        chosen, label = self.draw_key_ids(data, 4), data.draw(st.sampled_from(list(self.state.text)))
        if not chosen:
            return
        moved = [key_id for key_id in chosen if self.state.keys[key_id][0] != label]
        assert changes.relabel(self.folder, label, key_ids=chosen).key_ids == moved
        if moved:
            keys = self.state.keys | {key_id: (label, self.state.keys[key_id][1]) for key_id in moved}
            self.commit(replace(self.state, keys=keys))

    @rule(data=st.data())
    def rename(self, data):
        """Give a class a new name, or merge it into another class."""
        old = data.draw(st.sampled_from(list(self.state.text)))
        others = [name for name in self.state.text if name != old]
        new = data.draw(st.sampled_from([*others, *self.new_names(1)]))
        own = [key_id for key_id, (label, _) in self.state.keys.items() if label == old]
        renamed = changes.rename(self.folder, old, new)
        assert (sorted(renamed.key_ids), renamed.merged) == (sorted(own), new in others)
        keys = {i: (new if label == old else label, vector) for i, (label, vector) in self.state.keys.items()}
        text = {
            new if name == old else name: row
            for name, row in self.state.text.items()
            if name != old or new not in others
        }
        self.commit(replace(self.state, keys=keys, text=text))

    @rule(factory=st.none() | st.sampled_from(FACTORIES), dtype=st.sampled_from([None, "float16", "float32"]))
    def rebuild(self, factory, dtype):
        changes.rebuild(self.folder, index=factory, dtype=dtype)
        dtype = dtype or self.state.dtype
        keys = {key_id: (label, vector.astype(dtype)) for key_id, (label, vector) in self.state.keys.items()}
        self.commit(State(keys, self.state.text, factory or self.state.factory, dtype))

    @rule(data=st.data())
    def rollback(self, data):
        wanted = data.draw(st.sampled_from(list(self.kept)))
        changes.rollback(self.folder, wanted)
        if wanted != self.version:
            self.commit(self.kept[wanted])

    @rule(keep=st.integers(1, KEPT))
    def collect(self, keep):
        gone, freed = Versions(self.folder).collect(keep)
        assert gone == list(self.kept)[: max(0, len(self.kept) - keep)]
        assert freed > 0 or not gone
        self.kept = dict(list(self.kept.items())[-keep:])

    @rule()
    def reload(self):
        found = self.reader.index.reload()
        assert (found is self.reader.index) == (self.reader.index.version == self.version)
        self.reader = OpenVersion(found, self.state)

    @invariant()
    def the_folder_is_intact_and_answers_correctly(self):
        cache = verify(self.folder)
        self.check_keys_and_labels(cache)
        self.check_answers_match_a_fresh_index(cache)

    def check_keys_and_labels(self, cache):
        assert cache.version == self.version
        assert cache.class_names == list(self.state.text)
        assert (cache.index.factory, str(cache.keys.dtype)) == (self.state.factory, self.state.dtype)
        assert cache.next_key_id == self.next_key_id
        key_ids, labels = (cache.labels[name].to_pylist() for name in ("key_id", "label"))
        found = dict(zip(key_ids, labels, strict=True))
        assert len(found) == len(key_ids)
        assert found == {key_id: label for key_id, (label, _) in self.state.keys.items()}
        assert [cache.class_names[i] for i in cache.class_ids.tolist()] == labels
        np.testing.assert_array_equal(np.asarray(cache.keys), np.stack([self.state.keys[i][1] for i in key_ids]))
        pairs = list(zip(cache.labels["class_id"].to_pylist(), cache.labels["shot"].to_pylist(), strict=True))
        assert len(set(pairs)) == len(pairs)

    def check_answers_match_a_fresh_index(self, cache):
        fresh = self.state.fresh()
        np.testing.assert_allclose(cache.logits(QUERIES), fresh.logits(QUERIES), atol=1e-4)
        near = [[int(key.source) for key in found.neighbours] for found in fresh.classify(QUERIES, neighbours=K)]
        predicted = cache.classify(QUERIES, neighbours=K)
        assert [[key.key_id for key in found.neighbours] for found in predicted] == near
        assert [found.label for found in predicted] == [found.label for found in fresh.classify(QUERIES)]
        winners = [cache.class_names[i] for i in cache.logits(QUERIES, K).argmax(1).tolist()]
        assert [found.label for found in cache.classify(QUERIES, k=K)] == winners  # also with a shortlist of classes
        for tail in (False, True):
            if not cache.index.by_class:
                np.testing.assert_allclose(cache.logits(QUERIES, K, tail), fresh.logits(QUERIES, K, tail), atol=1e-4)
            else:
                self.check_each_class_counts_exactly_or_at_its_mean(cache, tail)

    def check_each_class_counts_exactly_or_at_its_mean(self, cache, tail):
        """A sample of the keys determines which classes count exactly, so the test accepts either sum."""
        vectors, names = np.stack([vector for _, vector in self.state.keys.values()]), list(self.state.text)
        ids = np.array([names.index(label) for label, _ in self.state.keys.values()])
        A, none = affinity(QUERIES, vectors), np.zeros((1, len(ids)), dtype=bool)
        whole, mean = (cache_logits(A, ids, len(names), BETA, met=met, tail=tail) for met in (None, none))
        found = cache.terms(QUERIES, K, tail).cache.numpy()
        is_whole, is_mean = np.isclose(found, whole, atol=1e-4), np.isclose(found, mean, atol=1e-4)
        assert (is_whole | is_mean).all()
        assert is_whole.any()

    @invariant()
    def versions_form_one_line_and_name_every_file(self):
        rows = Versions(self.folder).history().to_pylist()
        assert [row["version"] for row in rows] == list(self.kept)
        assert [row["keys"] for row in rows] == [len(state.keys) for state in self.kept.values()]
        assert all(row["parent"] == row["version"] - 1 for row in rows if row["version"] > 1)
        assert [row["current"] for row in rows] == [False] * (len(rows) - 1) + [True]
        manifests = [
            *Versions(self.folder).earlier(Versions(self.folder).current()),
            Versions(self.folder).current(),
        ]
        named = {file.name for manifest in manifests for file in manifest.data_files}
        assert named == {f"data/{path.name}" for path in (self.folder / "data").iterdir()}

    @invariant()
    def the_reader_still_answers(self):
        cache = self.reader.index
        np.testing.assert_allclose(cache.logits(QUERIES), self.reader.logits, atol=1e-4)
        assert sorted(cache.labels["key_id"].to_pylist()) == sorted(self.reader.state.keys)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("factory", "dtype"),
    few(
        [
            ("Flat", "float16"),
            ("Flat", "float32"),
            ("Classes", "float32"),
            ("IVF4,Flat", "float32"),
            ("Classes,HNSW8", "float16"),
        ],
        3,
    ),
)
def test_a_changed_index_answers_like_a_fresh_build(factory, dtype):
    kind = type("LivingIndex", (Living,), {"factory": factory, "dtype": dtype})
    quick = settings(
        max_examples=6 if SOAK else 2, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(kind, settings=quick)
