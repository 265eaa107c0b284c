"""After any sequence of changes and fits, an index in a folder or in LanceDB answers like a fresh build."""

import shutil
import tempfile
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SOAK, few
from dense import affinity, cache_logits
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.testing import assert_allclose, assert_array_equal
from stored import everything, made, rows_of
from tables import unit, unit_rows, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.fit import closed_form
from retrieval_tip.index import changes
from retrieval_tip.index import places as stores
from retrieval_tip.index.build import build_index
from retrieval_tip.index.places import Changed
from retrieval_tip.records import Fitted
from retrieval_tip.settings import Settings
from retrieval_tip.store.edits import Edits, NewKeys
from retrieval_tip.store.labels import with_column

D, ALPHA, BETA, SCALE = 6, 1.5, 4.0, 10.0
SETTINGS = Settings(ALPHA, BETA, SCALE)
LEAST, MOST, CLASSES = 6, 60, 6  # an inverted file of 4 lists needs 4 keys
K = 5
KEPT = 4
QUERIES = unit_rows(4, D, 99)
TABLE = ["Flat", "Classes"]
FACTORIES = {"folder": ["Flat", "Classes", "IVF4,Flat"], "lance": TABLE, "s3": TABLE}
FOLDERS = [
    ("folder", "Flat", "float16"),
    ("folder", "Flat", "float32"),
    ("folder", "Classes", "float32"),
    ("folder", "IVF4,Flat", "float32"),
    ("folder", "Classes", "float16"),
]
TABLES = [("lance", "Flat", "float32"), ("s3", "Flat", "float16")]
HOW = ["command", "merge", "program"]
SOLVED = [{"values": "solved"}, {"metric": "none", "values": "solved"}]
FITS = [{}, {}, *SOLVED, {"metric": "within"}, {"values": "one-hot"}]


class Key(NamedTuple):
    label: str
    vector: np.ndarray
    source: str
    camera: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class State:
    """Expected contents of an index: the keys by key id, the text weights of the classes in order, and the fit."""

    keys: dict[int, Key]
    text: dict[str, np.ndarray]
    factory: str
    dtype: str
    settings: Settings = SETTINGS
    metric: object = None
    fitted: Fitted | None = None

    @property
    def bare(self):
        """The classes that have no keys."""
        return set(self.text) - {key.label for key in self.keys.values()}

    def fresh(self, order=None, kind="Flat"):
        """Return a classifier that is built from these contents at once, with the keys in the given order of ids."""
        keys = [self.keys[key_id] for key_id in order or self.keys]
        index = Index.from_features(
            np.stack([key.vector for key in keys]),
            [key.label for key in keys],
            list(self.text),
            np.stack(list(self.text.values())),
            settings=self.settings,
            index=kind,
            sources=[str(key_id) for key_id in order or self.keys],
        )
        digests = pa.array(
            [self.keys[int(key_id)].digest for key_id in index.labels["source"].to_pylist()],
            pa.string(),
        )
        index.rows = replace(index.rows, labels=with_column(index.labels, "digest", digests))
        if self.fitted is not None:
            index = index.with_fit(self.metric, None, self.fitted)
            index = index.solved()
        return index


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
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr("retrieval_tip.store.versions.KEPT_VERSIONS", KEPT)
        self.patches.setattr("retrieval_tip.model.SUMS_FROM", 0)
        self.drawn = self.copies = 0
        self.born = {}

    def teardown(self):
        self.patches.undo()
        shutil.rmtree(self.tables)

    def vectors(self, names, spread=0.6):
        """Draw a unit vector near the mean of each class, which its first name determines."""
        self.drawn += 1
        means = np.stack([unit_rows(1, D, int(self.born[name][-2:]))[0] for name in names])
        return unit(means + spread * unit_rows(len(names), D, 1000 + self.drawn))

    def new_names(self, n):
        names = [f"it's {len(self.born) + i:02}" for i in range(n)]
        self.born |= {name: name for name in names}
        return names

    @initialize(
        n=st.integers(LEAST, 30),
        c=st.integers(1, 3),
        piece=st.sampled_from([5, 20, 1000]),
        fit=st.booleans(),
    )
    def build(self, n, c, piece, fit):
        """A table is read in pieces of at most ``piece`` keys: all keys, some classes, or a part of a class."""
        self.patches.setattr("retrieval_tip.plugins.lance.rows.PIECE", piece * 4 * D)
        names = self.new_names(c)
        vectors = self.vectors([names[i % c] for i in range(n)]).astype(self.dtype)
        text = self.vectors(names)
        index = Index.from_features(
            vectors,
            np.arange(n) % c,
            names,
            text,
            settings=SETTINGS,
            index=self.factory,
            sources=[f"built {i}" for i in range(n)],
        )
        self.store.copy_from(index, "build")
        keys = {i: Key(names[i % c], vector, f"built {i}") for i, vector in enumerate(vectors)}
        self.state = State(keys, dict(zip(names, text, strict=True)), self.factory, self.dtype)
        self.next_key_id = n
        self.start()
        if fit:
            self.fit({}, None)

    def start(self):
        """Open the first version of the index."""
        self.kept = {1: self.state}
        self.version = 1
        self.read(self.store.load())
        self.program = self.store.load()

    def read(self, index):
        """Have a reader keep the current version open. Its keys and logits should stay the same."""
        self.reader = index
        self.read_keys = sorted(self.state.keys)
        self.read_logits = self.state.fresh().logits(QUERIES, "all")

    def commit(self, state, change=None):
        """Record a new version. A ``change`` fits the index again if its fit is outdated and was automatic.

        A fit is outdated if the index has grown, or if other classes than before have no keys.
        """
        fitted = self.state.fitted if change is not None else None
        if fitted is not None:
            grown = len(state.keys) >= (1.125 if fitted.automatic else 2) * fitted.keys
            outdated = grown or self.state.bare.intersection(state.text) != state.bare
            automatic = fitted.automatic
            beta = state.settings.beta
            assert (change.fit is not None, change.fit_due) == (
                outdated and automatic,
                outdated and not automatic,
            )
            if change.fit is not None:
                state = self.with_fit(
                    state, closed_form.fit if grown else partial(closed_form.refit, beta=beta)
                )
        elif change is not None:
            assert (change.fit, change.fit_due) == (None, False)
        self.state = state
        self.version = self.version + 1
        self.kept[self.version] = state
        self.kept = dict(list(self.kept.items())[-KEPT:])

    def with_fit(self, state, fit_again):
        """Return the state with the fit of the index. A fresh build that is fitted in the same way has the same."""
        index = self.store.load()
        kind = "Classes" if state.factory.startswith("Classes") else "Flat"
        fresh = state.fresh(index.in_memory().labels["key_id"].to_pylist(), kind)
        fresh, _ = fit_again(fresh)
        assert (
            replace(fresh.fitted, automatic=index.fitted.automatic, bonus=index.fitted.bonus)
            == index.fitted
        )
        found = (
            [
                np.nan if part is None else part
                for part in (*astuple(own.settings), own.fitted.bonus)
            ]
            for own in (fresh, index)
        )
        assert_allclose(*found, rtol=1e-2)  # the optimum is flat
        return replace(state, settings=index.settings, metric=index.metric, fitted=index.fitted)

    def save_once(self, *edits):
        """Apply edits in a program, and save them as one version. The program goes on with its own index."""

        def revise(index):
            for one in edits:
                index = index.edited(one)
            return Changed(index, "by a program")

        if self.kind == "folder":
            self.program = revise(self.program.reload()).index.save(self.place)
        else:
            self.program = self.store.change(revise).index

    @precondition(lambda self: len(self.state.keys) < MOST)
    @rule(n=st.integers(1, 6), new=st.integers(0, 2), how=st.sampled_from(HOW), data=st.data())
    def add(self, n, new, how, data):
        """Add keys of old and new classes: from a table, from another index, or in a program."""
        new = min(new, n, CLASSES - len(self.state.text))
        names = self.new_names(new)
        drawn = data.draw(
            st.lists(
                st.sampled_from([*self.state.text, *names]), min_size=n - new, max_size=n - new
            )
        )
        labels = [*names, *drawn]
        added = None
        vectors = self.vectors(labels)
        sources = [f"{how} {self.drawn} {i}" for i in range(n)]
        text = dict(zip(names, self.vectors(names), strict=True)) if new else {}
        both = self.state.text | text
        more = {"camera": [f"it's {i}" for i in range(n)], "digest": sources}
        table = open_source(
            write_table(self.tables / "new.parquet", vectors, labels, sources, **more)
        )
        weights = write_table(self.tables / "text.parquet", list(both.values()), list(both))
        if how == "command":
            added = changes.add(self.place, table, Reader(), text=weights)
            assert added.classes == names
        elif how == "merge":
            other = self.tables / f"other {self.drawn}"
            build_index(table, other, Reader(), text=weights, fit="none")
            added = changes.merge(self.place, other)
            order = np.argsort([list(both).index(label) for label in labels], kind="stable")
            labels = [labels[i] for i in order]
            vectors = vectors[order]
            sources = [sources[i] for i in order]
            more = {name: [column[i] for i in order] for name, column in more.items()}
        else:
            more = {"camera": [None] * n, "digest": sources}
            self.save_once(
                Edits(classes=text, add=NewKeys(vectors, labels, sources, digests=sources))
            )
            key_ids = list(range(self.program.next_key_id - n, self.program.next_key_id))
        key_ids = key_ids if added is None else added.key_ids
        assert key_ids == list(range(self.next_key_id, self.next_key_id + n))
        self.next_key_id += n
        rows = zip(
            key_ids, labels, vectors.astype(self.state.dtype), sources, *more.values(), strict=True
        )
        keys = self.state.keys | {key_id: Key(*row) for key_id, *row in rows}
        self.commit(replace(self.state, keys=keys, text=self.state.text | text), added)
        if how == "program":
            self.check_answers_match_a_fresh_index(self.program)

    def draw_key_ids(self, data, most):
        """Draw key ids, more often from the end."""
        ids = list(self.state.keys)
        from_end = data.draw(st.sampled_from([True, True, True, False]))
        return data.draw(
            st.lists(st.sampled_from(ids[-6:] if from_end else ids), max_size=most, unique=True)
        )

    def relabelled(self, labels):
        """Return the expected keys after the keys with these ids got these labels."""
        return self.state.keys | {
            key_id: self.state.keys[key_id]._replace(label=new) for key_id, new in labels.items()
        }

    @rule(data=st.data())
    def remove(self, data):
        gone = self.draw_key_ids(data, min(5, len(self.state.keys) - LEAST))
        if gone:
            removed = changes.remove(self.place, key_ids=gone)
            assert removed.key_ids == gone
            keys = {key_id: key for key_id, key in self.state.keys.items() if key_id not in gone}
            self.commit(replace(self.state, keys=keys), removed)

    @rule(data=st.data())
    def change_in_a_program(self, data):
        """Make several changes in memory and save them as one version."""
        gone = self.draw_key_ids(data, min(5, len(self.state.keys) - LEAST))
        moved = [key_id for key_id in self.state.keys if key_id not in gone][-3:-1]
        label = data.draw(st.sampled_from(list(self.state.text)))
        self.save_once(Edits(remove=gone), Edits(move=dict.fromkeys(moved, label)))
        keys = self.relabelled(dict.fromkeys(moved, label))
        self.commit(
            replace(
                self.state, keys={key_id: key for key_id, key in keys.items() if key_id not in gone}
            )
        )
        self.check_keys_and_labels(self.program)
        self.check_answers_match_a_fresh_index(self.program)

    @rule(data=st.data())
    def relabel(self, data):
        chosen = self.draw_key_ids(data, 4)
        label = data.draw(st.sampled_from(list(self.state.text)))
        if not chosen:
            return
        moved = [key_id for key_id in chosen if self.state.keys[key_id].label != label]
        relabelled = changes.relabel(self.place, label, key_ids=chosen)
        assert relabelled.key_ids == moved
        if moved:
            self.commit(
                replace(self.state, keys=self.relabelled(dict.fromkeys(moved, label))), relabelled
            )

    @rule(data=st.data())
    def rename(self, data):
        """Give a class a new name, or merge it into another class."""
        old = data.draw(st.sampled_from(list(self.state.text)))
        others = [name for name in self.state.text if name != old]
        new = data.draw(st.sampled_from([*others, *self.new_names(1)]))
        own = [key_id for key_id, key in self.state.keys.items() if key.label == old]
        self.born[new] = self.born[old] if new not in others else self.born[new]
        renamed = changes.rename(self.place, old, new)
        assert (renamed.key_ids, renamed.merged) == (sorted(own), new in others)
        text = {
            name: row for name, row in self.state.text.items() if name != old or new not in others
        }
        text = {new if name == old else name: row for name, row in text.items()}
        state = replace(self.state, keys=self.relabelled(dict.fromkeys(own, new)), text=text)
        self.commit(state, renamed if renamed.merged else None)

    @rule(alpha=st.none() | st.floats(0.5, 3), k=st.sampled_from([3, 8, "all"]))
    def configure(self, alpha, k):
        given = (
            {} if alpha is None else {"alpha": alpha, "beta": self.state.settings.beta}
        )  # the same beta fits nothing
        changes.configure(self.place, k=k, **given)
        fitted = self.state.fitted and replace(
            self.state.fitted, automatic=self.state.fitted.automatic and not given
        )
        self.commit(
            replace(self.state, settings=self.state.settings.override(k=k, **given), fitted=fitted)
        )

    @rule(form=st.sampled_from(FITS), beta=st.none() | st.floats(1, 8))
    def fit(self, form, beta):
        if form.get("values") == "solved" and (
            self.state.settings.k or self.state.factory.startswith("Classes")
        ):
            form = form | {"values": "one-hot"}  # solved values need all keys
        changes.fit_index(self.place, **form)
        self.commit(
            self.with_fit(
                self.state, partial(closed_form.fit, asked=closed_form.FitRequest(**form))
            )
        )
        assert self.state.fitted.automatic == (form == {})
        if beta is not None:
            changes.configure(self.place, beta=beta)
            self.commit(self.with_fit(self.state, partial(closed_form.refit, beta=beta)))
            assert not self.state.fitted.automatic

    @rule(dtype=st.sampled_from([None, "float16", "float32"]), data=st.data())
    def rebuild(self, dtype, data):
        solved = self.state.fitted is not None and self.state.fitted.ridge is not None
        factory = data.draw(
            st.none() | st.sampled_from(["Flat"] if solved else FACTORIES[self.kind])
        )
        before = self.store.load().labels.sort_by("key_id")
        changes.rebuild(self.place, index=factory, dtype=dtype)
        after = self.store.load().labels.sort_by("key_id")
        assert after.select(before.column_names).drop_columns("shot") == before.drop_columns("shot")
        dtype = dtype or self.state.dtype
        keys = {
            key_id: key._replace(vector=key.vector.astype(dtype))
            for key_id, key in self.state.keys.items()
        }
        self.commit(
            replace(self.state, keys=keys, dtype=dtype, factory=factory or self.state.factory)
        )

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

    @rule(data=st.data())
    def clone(self, data):
        """Go on with a copy of some version in the same or another kind of store."""
        version = data.draw(st.sampled_from(list(self.kept)))
        kind = data.draw(st.sampled_from(self.kinds))
        self.copies += 1
        place = made(self.tables, kind, f"copy {self.copies}")
        changes.clone(self.place, place, version)
        factory = self.kept[version].factory if kind == self.kind == "folder" else "Flat"
        old = self.store.load(version=version)
        copy = stores.at(place).load()
        assert copy.provenance | {"index": None} == old.provenance | {"index": None}
        self.next_key_id = self.store.manifest(version).next_key_id
        self.place = place
        self.store = stores.at(place)
        self.kind = kind
        self.state = replace(self.kept[version], factory=factory)
        self.start()

    @rule()
    def reload(self):
        found = self.reader.reload()
        assert (found is self.reader) == (self.reader.version == self.version)
        self.read(found)

    @invariant()
    def the_index_is_intact_and_answers_correctly(self):
        index = self.store.verify()
        self.check_keys_and_labels(index)
        self.check_answers_match_a_fresh_index(index)
        self.check_values_and_sums(index)

    def check_keys_and_labels(self, index):
        assert index.version == self.version
        assert index.class_names == list(self.state.text)
        assert (index.index_type, index.dtype) == (self.state.factory, self.state.dtype)
        assert (index.settings, index.fitted) == (self.state.settings, self.state.fitted)
        assert index.next_key_id == self.next_key_id
        rows = rows_of(index.labels)
        named = ("label", "source", "camera", "digest")
        found = {key_id: [row.get(name) for name in named] for key_id, row in rows.items()}
        assert found == {
            key_id: [getattr(key, name) for name in named]
            for key_id, key in self.state.keys.items()
        }
        labels = [row["label"] for row in rows.values()]
        assert index.counts == [labels.count(name) for name in index.class_names]
        assert [index.class_names[i] for i in index.class_ids.tolist()] == labels
        expected = np.stack([self.state.keys[i].vector for i in rows])
        assert_array_equal(np.asarray(index.rows.in_memory().keys), expected)
        assert len({(row["class_id"], row["shot"]) for row in rows.values()}) == len(rows)

    def check_answers_match_a_fresh_index(self, index):
        fresh = self.state.fresh()
        self.check_close(index.logits(QUERIES, "all"), fresh.logits(QUERIES, "all"))
        predicted, expected = (
            own.classify(QUERIES, k="all", neighbours=K) for own in (index, fresh)
        )
        assert [found.label for found in predicted] == [found.label for found in expected]
        rows = {int(source): row for row, source in enumerate(fresh.labels["source"].to_pylist())}
        A = affinity(fresh.retrieval.keys.phi(torch.from_numpy(QUERIES)), fresh.vectors)
        for q, (one, other) in enumerate(zip(predicted, expected, strict=True)):
            near = [rows[key.key_id] for key in one.neighbours]
            assert_allclose([key.affinity for key in one.neighbours], A[q, near], atol=1e-4)
            own, same = ([key.contribution for key in shown.neighbours] for shown in (one, other))
            assert_allclose(own, same, rtol=1e-2, atol=1e-3 * max(1, *np.abs(same)))
        winners = [index.class_names[i] for i in index.logits(QUERIES, K).argmax(1).tolist()]
        assert [
            found.label for found in index.classify(QUERIES, k=K)
        ] == winners  # also with a shortlist of classes
        for tail in (False, True):
            if not index.index_type.startswith("Classes"):
                self.check_close(index.logits(QUERIES, K, tail), fresh.logits(QUERIES, K, tail))
            else:
                self.check_each_class_counts_exactly_or_at_its_mean(index, fresh, A, tail)

    def check_close(self, found, expected):
        """The contributions of solved values partly cancel in float32, so their equation is checked more sharply."""
        tolerance = 1e-4 if self.state.fitted is None else 1e-2
        assert_allclose(
            found, expected, rtol=0, atol=tolerance * max(1, expected.abs().max().item())
        )

    def check_each_class_counts_exactly_or_at_its_mean(self, index, fresh, A, tail):
        """A sample of the keys determines which classes count exactly, so the test accepts either sum."""
        ids = fresh.class_ids.numpy()
        c = len(fresh.class_names)
        beta = fresh.settings.beta
        none = np.zeros((1, len(ids)), dtype=bool)
        whole, mean = (cache_logits(A, ids, c, beta, met=met, tail=tail) for met in (None, none))
        found = index.terms(QUERIES, K, tail).cache.numpy()
        is_whole = np.isclose(found, whole, atol=1e-4)
        is_mean = np.isclose(found, mean, atol=1e-4)
        assert (is_whole | is_mean).all()
        assert is_whole.any()

    def check_values_and_sums(self, index):
        """Solved values solve their system, and the sums are those of the keys."""
        ids = index.class_ids.numpy()
        c = len(index.class_names)
        counts = np.array(index.counts)
        if index.values is not None:
            ridges = (index.fitted.ridge * counts / counts[counts > 0].mean())[ids]
            gram = np.exp(
                -index.settings.beta * (1 - affinity(index.vectors, index.vectors))
            ) + np.diag(ridges)
            values, targets = (
                part[:, counts > 0] for part in (index.values.numpy(), np.eye(c)[ids])
            )
            tolerance = (
                1e-2 if index.dtype == "float16" else 1e-3
            )  # a fit does not round the points
            assert_allclose(
                gram @ values, targets, rtol=0, atol=tolerance * max(1, np.abs(values).max())
            )
        if index.rows.sums is not None:
            wide = np.asarray(index.rows.in_memory().keys).astype(np.float64)
            one_hot = np.eye(c)[ids]
            assert_array_equal(index.rows.sums.counts, one_hot.sum(0))
            assert_allclose(index.rows.sums.sums, one_hot.T @ wide, atol=1e-9)
            assert_allclose(index.rows.sums.second, wide.T @ wide, atol=1e-9)

    @invariant()
    def versions_form_one_line_and_name_every_file(self):
        rows = self.store.history().to_pylist()
        assert [row["version"] for row in rows] == list(self.kept)
        assert [row["keys"] for row in rows] == [len(state.keys) for state in self.kept.values()]
        assert all(row["parent"] == row["version"] - 1 for row in rows if row["version"] > 1)
        assert [row["current"] for row in rows] == [False] * (len(rows) - 1) + [True]
        named = {
            file.name for version in self.kept for file in self.store.manifest(version).data_files
        }
        found = {
            name for name in everything(self.place) if "data/" in name and "keys.lance" not in name
        }
        assert named == {name[name.index("data/") :] for name in found}

    @invariant()
    def the_reader_still_answers(self):
        self.check_close(self.reader.logits(QUERIES, "all"), self.read_logits)
        assert sorted(self.reader.labels["key_id"].to_pylist()) == self.read_keys


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("kind", "factory", "dtype"), [*few(FOLDERS, 3), *few(TABLES, 1)])
def test_a_changed_index_answers_like_a_fresh_build(kind, factory, dtype, request):
    if kind == "s3":
        request.getfixturevalue("bucket")
    kinds = ["folder", "lance", *(["s3"] if kind == "s3" else [])]
    machine = type(
        "LivingIndex", (Living,), {"kind": kind, "factory": factory, "dtype": dtype, "kinds": kinds}
    )
    quick = settings(
        max_examples=8 if SOAK else 3,
        stateful_step_count=16,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[
            phase for phase in Phase if SOAK or phase is not Phase.shrink
        ],  # shrinking takes minutes
    )
    run_state_machine_as_test(machine, settings=quick)
