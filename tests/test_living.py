"""After any sequence of changes, an index in a folder or in LanceDB answers like a fresh build."""

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
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
from stored import everything, made
from tables import unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.settings import Settings

D, ALPHA, BETA, SCALE = 6, 1.5, 4.0, 10.0
SETTINGS = Settings(ALPHA, BETA, SCALE)
LEAST, MOST, CLASSES = 6, 60, 6  # an inverted file of 4 lists needs 4 keys
K = 5
KEPT = 4
QUERIES = unit_rows(4, D, 99)
TABLE = ["Flat", "Classes"]
FACTORIES = {"folder": ["Flat", "Classes", "IVF4,Flat"], "lance": TABLE, "s3": TABLE}
FOLDERS = [("folder", "Flat", "float16"), ("folder", "Flat", "float32"), ("folder", "Classes", "float32"),
           ("folder", "IVF4,Flat", "float32"), ("folder", "Classes", "float16")]  # fmt: skip
TABLES = [("lance", "Flat", "float32"), ("s3", "Flat", "float16")]


@dataclass(frozen=True)
class State:
    """Expected contents of an index: class and vector by key id, and the text weights of the classes in order."""

    keys: dict
    text: dict
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
    """An index, its expected contents, and a reader of one version."""

    kind: str
    factory: str
    dtype: str

    def __init__(self):
        super().__init__()
        self.tables = Path(tempfile.mkdtemp(prefix="retrieval-tip-living-"))
        self.place = made(self.tables, self.kind)
        self.store = stores.at(self.place)
        self.patch = mock.patch("retrieval_tip.store.versions.KEPT_VERSIONS", KEPT)
        self.patch.start()
        self.drawn = self.named = 0

    def teardown(self):
        self.patch.stop()
        shutil.rmtree(self.tables)

    def vectors(self, n):
        self.drawn += 1
        return unit_rows(n, D, self.drawn)

    def new_names(self, n):
        self.named += n
        return [f"it's {i:02}" for i in range(self.named - n, self.named)]

    @initialize(n=st.integers(LEAST, 30), c=st.integers(1, 3))
    def build(self, n, c):
        names, vectors, text = self.new_names(c), self.vectors(n).astype(self.dtype), self.vectors(c)
        index = Index.from_features(
            vectors, np.arange(n) % c, names, text, settings=SETTINGS, index=self.factory, device="cpu"
        )  # fmt: skip
        self.store.copy_from(index, "build")
        keys = {i: (names[i % c], vector) for i, vector in enumerate(vectors)}
        self.state = State(keys, dict(zip(names, text, strict=True)), self.factory, self.dtype)
        self.kept, self.version, self.next_key_id = {1: self.state}, 1, n
        self.reader = OpenVersion(self.store.load(device="cpu"), self.state)
        self.program = self.store.load(device="cpu")

    def commit(self, state):
        """Record a new version."""
        self.state, self.version = state, self.version + 1
        self.kept[self.version] = state
        self.kept = dict(list(self.kept.items())[-KEPT:])

    @contextmanager
    def saved_once(self):
        """Yield an index to change in memory, and save it as one version. A program goes on with its own index."""
        if self.kind == "folder":
            self.program = self.program.reload()
            yield self.program
            self.program.save(self.place)
        else:
            with self.store.change() as change:
                change.what = "by a program"
                yield change.index
            self.program = self.store.load(device="cpu")

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
            table = write_table(self.tables / "new.parquet", vectors, labels)
            weights = write_table(self.tables / "text.parquet", list(text.values()), names) if new else None
            added = changes.add(self.place, open_source(table), Reader(), text=weights)
            key_ids = added.key_ids
            assert added.classes == names
        else:
            with self.saved_once() as index:
                if new:
                    index.add_classes(names, np.stack(list(text.values())))
                key_ids = index.add(vectors, labels)
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
            assert changes.remove(self.place, key_ids=gone).key_ids == gone
            keys = {key_id: key for key_id, key in self.state.keys.items() if key_id not in gone}
            self.commit(replace(self.state, keys=keys))

    @rule(data=st.data())
    def change_in_a_program(self, data):
        """Make several changes in memory and save them as one version."""
        gone = self.draw_key_ids(data, min(5, len(self.state.keys) - LEAST))
        left = [key_id for key_id in self.state.keys if key_id not in gone]
        moved, label = left[-3:-1], data.draw(st.sampled_from(list(self.state.text)))
        with self.saved_once() as index:
            index.remove(gone)
            index.relabel(moved, label)
        keys = {key_id: self.state.keys[key_id] for key_id in left}
        keys |= {key_id: (label, self.state.keys[key_id][1]) for key_id in moved}
        self.commit(replace(self.state, keys=keys))
        self.check_keys_and_labels(self.program)
        self.check_answers_match_a_fresh_index(self.program)

    @rule(data=st.data())
    def relabel(self, data):
        chosen, label = self.draw_key_ids(data, 4), data.draw(st.sampled_from(list(self.state.text)))
        if not chosen:
            return
        moved = [key_id for key_id in chosen if self.state.keys[key_id][0] != label]
        assert changes.relabel(self.place, label, key_ids=chosen).key_ids == moved
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
        renamed = changes.rename(self.place, old, new)
        assert (sorted(renamed.key_ids), renamed.merged) == (sorted(own), new in others)
        keys = {i: (new if label == old else label, vector) for i, (label, vector) in self.state.keys.items()}
        text = {
            new if name == old else name: row
            for name, row in self.state.text.items()
            if name != old or new not in others
        }
        self.commit(replace(self.state, keys=keys, text=text))

    @rule(dtype=st.sampled_from([None, "float16", "float32"]), data=st.data())
    def rebuild(self, dtype, data):
        factory = data.draw(st.none() | st.sampled_from(FACTORIES[self.kind]))
        changes.rebuild(self.place, index=factory, dtype=dtype)
        dtype = dtype or self.state.dtype
        keys = {key_id: (label, vector.astype(dtype)) for key_id, (label, vector) in self.state.keys.items()}
        self.commit(State(keys, self.state.text, factory or self.state.factory, dtype))

    @rule(data=st.data())
    def rollback(self, data):
        wanted = data.draw(st.sampled_from(list(self.kept)))
        changes.rollback(self.place, wanted)
        if wanted != self.version:
            self.commit(self.kept[wanted])

    @rule(keep=st.integers(1, KEPT))
    def collect(self, keep):
        gone, freed = self.store.collect(keep)
        assert gone == list(self.kept)[: max(0, len(self.kept) - keep)]
        assert freed > 0 or not gone
        self.kept = dict(list(self.kept.items())[-keep:])

    @rule()
    def reload(self):
        found = self.reader.index.reload()
        assert (found is self.reader.index) == (self.reader.index.version == self.version)
        self.reader = OpenVersion(found, self.state)

    @invariant()
    def the_index_is_intact_and_answers_correctly(self):
        index = self.store.verify()
        self.check_keys_and_labels(index)
        self.check_answers_match_a_fresh_index(index)

    def check_keys_and_labels(self, index):
        assert index.version == self.version
        assert index.class_names == list(self.state.text)
        assert (index.index_type, index.dtype) == (self.state.factory, self.state.dtype)
        assert index.next_key_id == self.next_key_id
        key_ids, labels = (index.labels[name].to_pylist() for name in ("key_id", "label"))
        found = dict(zip(key_ids, labels, strict=True))
        assert len(found) == len(key_ids)
        assert found == {key_id: label for key_id, (label, _) in self.state.keys.items()}
        assert index.counts == [labels.count(name) for name in index.class_names]
        assert [index.class_names[i] for i in index.class_ids.tolist()] == labels
        expected = np.stack([self.state.keys[i][1] for i in key_ids])
        np.testing.assert_array_equal(np.asarray(index.rows.in_memory().keys), expected)
        pairs = list(zip(index.labels["class_id"].to_pylist(), index.labels["shot"].to_pylist(), strict=True))
        assert len(set(pairs)) == len(pairs)

    def check_answers_match_a_fresh_index(self, index):
        fresh = self.state.fresh()
        np.testing.assert_allclose(index.logits(QUERIES), fresh.logits(QUERIES), atol=1e-4)
        near = [[int(key.source) for key in found.neighbours] for found in fresh.classify(QUERIES, neighbours=K)]
        predicted = index.classify(QUERIES, neighbours=K)
        assert [[key.key_id for key in found.neighbours] for found in predicted] == near
        assert [found.label for found in predicted] == [found.label for found in fresh.classify(QUERIES)]
        winners = [index.class_names[i] for i in index.logits(QUERIES, K).argmax(1).tolist()]
        assert [found.label for found in index.classify(QUERIES, k=K)] == winners  # also with a shortlist of classes
        for tail in (False, True):
            if not index.index_type.startswith("Classes"):
                np.testing.assert_allclose(index.logits(QUERIES, K, tail), fresh.logits(QUERIES, K, tail), atol=1e-4)
            else:
                self.check_each_class_counts_exactly_or_at_its_mean(index, tail)

    def check_each_class_counts_exactly_or_at_its_mean(self, index, tail):
        """A sample of the keys determines which classes count exactly, so the test accepts either sum."""
        vectors, names = np.stack([vector for _, vector in self.state.keys.values()]), list(self.state.text)
        ids = np.array([names.index(label) for label, _ in self.state.keys.values()])
        A, none = affinity(QUERIES, vectors), np.zeros((1, len(ids)), dtype=bool)
        whole, mean = (cache_logits(A, ids, len(names), BETA, met=met, tail=tail) for met in (None, none))
        found = index.terms(QUERIES, K, tail).cache.numpy()
        is_whole, is_mean = np.isclose(found, whole, atol=1e-4), np.isclose(found, mean, atol=1e-4)
        assert (is_whole | is_mean).all()
        assert is_whole.any()

    @invariant()
    def versions_form_one_line_and_name_every_file(self):
        rows = self.store.history().to_pylist()
        assert [row["version"] for row in rows] == list(self.kept)
        assert [row["keys"] for row in rows] == [len(state.keys) for state in self.kept.values()]
        assert all(row["parent"] == row["version"] - 1 for row in rows if row["version"] > 1)
        assert [row["current"] for row in rows] == [False] * (len(rows) - 1) + [True]
        named = {file.name for version in self.kept for file in self.store.manifest(version).data_files}
        found = {name for name in everything(self.place) if "data/" in name and "keys.lance" not in name}
        assert named == {name[name.index("data/") :] for name in found}

    @invariant()
    def the_reader_still_answers(self):
        index = self.reader.index
        np.testing.assert_allclose(index.logits(QUERIES), self.reader.logits, atol=1e-4)
        assert sorted(index.labels["key_id"].to_pylist()) == sorted(self.reader.state.keys)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "factory", "dtype"), [*few(FOLDERS, 3), *few(TABLES, 1)])
def test_a_changed_index_answers_like_a_fresh_build(kind, factory, dtype, request):
    if kind == "s3":
        request.getfixturevalue("bucket")
    machine = type("LivingIndex", (Living,), {"kind": kind, "factory": factory, "dtype": dtype})
    quick = settings(
        max_examples=6 if SOAK else 2, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=quick)
