"""The command finetune: output, messages and errors."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clusters import round_clusters as clusters
from tables import unit_rows, write_table

from retrieval_tip import Index, Reader, Recipe, open_source, verify
from retrieval_tip.fit import finetune as finetuning
from retrieval_tip.fit.finetune import finetune, finetune_into

C, D = 5, 12
NAMES = [f"class {i}" for i in range(C)]
HELPFUL = ("--epochs", 20, "--lr", 0.03)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Take several steps per epoch."""
    monkeypatch.setattr(finetuning, "BATCH", 8)


def views(n, seed, spread=0.02):
    """Return two views of each of ``n`` shots as rows that share an id, in random order."""
    features, ids = clusters(n, C, D, seed)
    noise = np.random.default_rng(seed).standard_normal((2, *features.shape)) * spread
    rows = np.concatenate([features + noise[0], features + noise[1]]).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = np.random.default_rng(seed + 1).permutation(2 * n)
    labels = np.array([NAMES[i] for i in ids] * 2)
    names = np.array([f"shot {i}" for i in range(n)] * 2)
    return rows[order], labels[order].tolist(), names[order].tolist()


@pytest.fixture
def place(tmp_path, run):
    """An index of 60 shots, a table of their views, and tables for validation and test."""
    features, ids = clusters(60, C, D, 1)
    write_table(tmp_path / "train.parquet", features, [NAMES[i] for i in ids], ids=[f"shot {i}" for i in range(60)])
    write_table(tmp_path / "text.parquet", unit_rows(C, D, 5), NAMES)
    rows, labels, names = views(60, 1)
    write_table(tmp_path / "views.parquet", rows, labels, ids=names)
    for name, n, seed in (("val", 30, 3), ("test", 60, 4)):
        features, ids = clusters(n, C, D, seed)
        write_table(tmp_path / f"{name}.parquet", features, [NAMES[i] for i in ids])
    built = run("index", "build", "--fit", "none",
                tmp_path / "train.parquet", "--text", tmp_path / "text.parquet", "--logit-scale", 10,
                "--out", tmp_path / "index")  # fmt: skip
    assert built.exit_code == 0, built.stderr
    return tmp_path


def tune(run, place, *more):
    return run("finetune", place / "index", "--out", place / "tuned", "--source", place / "views.parquet", *more)


def test_python_gives_the_result_of_the_command(run, place):
    result = tune(run, place, "--val", place / "val.parquet", "--epochs", 2, "--json")
    cache = Index.load(place / "index", device="cpu")
    shots, val = (open_source(place / f"{name}.parquet") for name in ("views", "val"))
    recipe = Recipe(epochs=2)
    tuned = finetune_into(place / "again", cache, shots, Reader(), recipe, val=val)
    assert tuned.facts() | {"seconds": 0} == json.loads(result.stdout) | {"seconds": 0}
    one, other = (Index.load(place / name, device="cpu") for name in ("tuned", "again"))
    assert np.array_equal(one.keys, other.keys)
    assert one.settings == other.settings


def test_finetune_trains_on_the_source_of_the_index_by_default(run, place):
    result = run("finetune", place / "index", "--out", place / "tuned", *HELPFUL)
    assert result.exit_code == 0, result.stderr
    keys, tuned = (Index.load(place / name, device="cpu").keys for name in ("index", "tuned"))
    assert not np.array_equal(keys, tuned)
    (place / "train.parquet").unlink()
    result = run("finetune", place / "index", "--out", place / "again", "--epochs", 2)
    assert result.exit_code == 1
    assert "shot 0: no such file, though it is a shot of the index; give --source" in result.stderr
    assert not (place / "again").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--train", "visual"], 2, "--train"),
        (["--epochs", "2000000"], 2, "--epochs"),
        (["--val", "nowhere.parquet"], 1, "nowhere.parquet: no such file"),
        (["--out", "\udcff"], 1, "UTF-8"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(run, place, more, code, message):
    result = tune(run, place, *more)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert not (place / "tuned").exists()


def fitted_index(run, place):
    """Build the index of the same shots with a closed-form fit."""
    text = ("--text", place / "text.parquet", "--logit-scale", 10)
    assert run("index", "build", place / "train.parquet", *text, "--out", place / "index").exit_code == 0
    return Index.load(place / "index", device="cpu")


def accuracy(cache, source):
    return (cache.logits(Reader().encode(source).features).argmax(1).numpy() == cache.ids_of(source)).mean()


def test_training_without_gain_is_discarded(run, place):
    """The new index has the fit and the answers of the old one."""
    index = fitted_index(run, place)
    result = tune(run, place, "--epochs", 3, "--lr", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert "closed-form fit" in result.stderr.splitlines()[0]
    printed = json.loads(result.stdout)
    assert printed["kept"] == "as it was"
    assert printed["after"] <= printed["before"]
    assert (printed["epoch"], printed["train_accuracy"]) == (None, None)
    kept, test = verify(place / "tuned"), open_source(place / "test.parquet")
    assert (kept.settings, kept.fitted, kept.curve) == (index.settings, index.fitted, None)
    features = Reader().encode(test).features
    np.testing.assert_allclose(kept.logits(features), index.logits(features), rtol=1e-5)


def test_the_printed_accuracy_is_of_held_out_photos(run, place):
    """Random labels can be memorised, but tell nothing about held-out shots."""
    rows = pq.read_table(place / "views.parquet")
    names = sorted(set(rows["id"].to_pylist()))
    drawn = dict(zip(names, np.random.default_rng(0).choice(NAMES, len(names)).tolist(), strict=True))
    for name in ("train", "views"):
        table = pq.read_table(place / f"{name}.parquet")
        column = pa.array([drawn[one] for one in table["id"].to_pylist()])
        pq.write_table(
            table.set_column(table.schema.get_field_index("label"), "label", column), place / f"{name}.parquet"
        )
    index, shots = fitted_index(run, place), open_source(place / "views.parquet")
    assert finetune(index, shots, Reader(), Recipe(epochs=20, lr=0.01)).index.curve["accuracy"][-1].as_py() > 0.9
    printed = json.loads(tune(run, place, "--epochs", 20, "--lr", 0.01, "--json").stdout)
    assert max(printed["before"], printed["after"]) < 0.5
    assert printed["n"] == 60


def test_validation_accuracy_is_printed_before_and_after_training(run, place):
    index, val = Index.load(place / "index", device="cpu"), open_source(place / "val.parquet")
    printed = json.loads(tune(run, place, "--val", place / "val.parquet", *HELPFUL, "--json").stdout)
    assert printed["kept"] == "trained"
    assert (printed["before"], printed["n"]) == (pytest.approx(accuracy(index, val)), len(val))
    assert printed["after"] == pytest.approx(accuracy(Index.load(place / "tuned", device="cpu"), val))


def test_training_that_helps_is_kept(run, place):
    printed = json.loads(tune(run, place, *HELPFUL, "--json").stdout)
    own = Index.load(place / "index", device="cpu").settings
    assert (printed["kept"], printed["alpha"]) == ("trained", own.alpha)
    assert printed["after"] > printed["before"]


def test_single_shots_are_not_held_out_and_a_message_says_so(run, place):
    table = pq.read_table(place / "train.parquet")
    first = sorted({label: i for i, label in enumerate(table["label"].to_pylist())}.values())
    pq.write_table(table.take(first), place / "train.parquet")
    fitted_index(run, place)
    result = tune(run, place, "--epochs", 1, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["kept"], printed["before"], printed["after"], printed["n"]) == ("trained", None, None, None)
    assert "--val" in result.stderr
