"""Fine-tuning: the loop compared with plain torch, the kept epoch, errors, views of images, and the command."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clusters import round_clusters as clusters
from conftest import cache_of, failed, ok, tries
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.random import default_rng
from numpy.testing import assert_allclose
from tables import unit, unit_rows, write_table
from torch.nn import functional

from retrieval_tip import Index, verify
from retrieval_tip.data.reader import Reader, view_names
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit import finetune
from retrieval_tip.fit.finetune import CURVE, Trainer, _Shots, shots_of
from retrieval_tip.settings import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

C, D = 5, 12
NAMES = [f"class {i}" for i in range(C)]
SHOTS = 37  # classes of 8 and 7 shots
OWN = Recipe(epochs=4)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Take several steps per epoch."""
    monkeypatch.setattr(finetune, "BATCH", 16)


def index(**changes):
    """Return an index of clusters whose sharp exponential and weak text leave room to learn."""
    keys, ids = clusters(SHOTS, C, D, 1)
    options = {"alpha": 1.0, "beta": 5.5, "logit_scale": 10.0, "device": "cpu"} | changes
    dtype = options.pop("dtype", np.float32)
    sources = [f"shot {i}" for i in range(SHOTS)]
    cache = cache_of(keys.astype(dtype), ids, NAMES, unit_rows(C, D, 5), sources=sources, **options)
    cache.provenance = {"alpha": "untouched", "temperature": {"queries": 3}, "normalize": "both"}
    return cache


def shots_table(path, counts=None, spread=0.05, order=3):
    """Write views of the shots as rows that share an id, by default ragged and interleaved."""
    keys, ids = clusters(SHOTS, C, D, 1)
    generator = default_rng(8)
    counts = counts or [1 + i % 4 for i in range(SHOTS)]
    shot = np.repeat(np.arange(SHOTS), counts)
    rows = unit(keys[shot] + spread * generator.standard_normal((len(shot), D)))
    turn = np.arange(len(shot)) if order is None else default_rng(order).permutation(len(shot))
    names = [f"shot {shot[i]}" for i in turn]
    return open_source(write_table(path, rows[turn], [NAMES[ids[shot[i]]] for i in turn], names))


def queries_table(path, n=60, seed=2):
    rows, ids = clusters(n, C, D, seed)
    return open_source(write_table(path, rows, [NAMES[i] for i in ids]))


@pytest.fixture
def shots(tmp_path):
    return shots_table(tmp_path / "shots.parquet")


@pytest.fixture
def val(tmp_path):
    return queries_table(tmp_path / "val.parquet")


def accuracy(cache, n=400, seed=9):
    rows, ids = clusters(n, C, D, seed)
    return float((cache.logits(rows).argmax(1).numpy() == ids).mean())


def losses(tuned):
    return [row["loss"] for row in tuned.index.curve.to_pylist()[1:]]


def without_seconds(curve):
    """Return a curve without its seconds as text, in which NaN equals NaN."""
    return repr(curve.drop(["seconds"]).to_pylist())


def plain(cache, shots, recipe):
    """Train Tip-Adapter-F in plain torch over the same batches.

    Return keys and values of each epoch, and loss and accuracy in training and on the validation images.
    """
    views = Reader().encode_views(shots, [])
    label = {name: i for i, name in enumerate(cache.class_names)}
    ids = torch.tensor([label[shots.labels[position]] for position in views])
    every = np.concatenate(list(views.values()))
    features, (val, truth) = torch.from_numpy(every), map(torch.from_numpy, clusters(60, C, D, 2))
    keys = torch.nn.Parameter(
        torch.from_numpy(np.array(cache.keys)), requires_grad="keys" in recipe.train
    )
    values = torch.nn.Parameter(
        functional.one_hot(cache.class_ids).float(), requires_grad="values" in recipe.train
    )
    trained = [x for x in (keys, values) if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4, weight_decay=0.01)
    steps = recipe.epochs * math.ceil(len(ids) / finetune.BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history, curve = [], []

    def logits_of(f):
        cache_logits = (
            (-1) * (cache.settings.beta - cache.settings.beta * (f @ keys.T))
        ).exp() @ values
        return (
            cache.settings.logit_scale * f @ cache.text_weights.T
            + cache_logits * cache.settings.alpha
        )

    for epoch in range(-1, recipe.epochs):
        total, right = 0.0, 0
        if epoch >= 0:
            random = default_rng((recipe.seed, epoch))
            counts = np.array([len(own) for own in views.values()])
            rows = torch.from_numpy(counts.cumsum() - counts + random.integers(0, counts))
            for batch in torch.from_numpy(random.permutation(len(rows))).split(finetune.BATCH):
                logits = logits_of(features[rows[batch]])
                loss = functional.cross_entropy(logits, ids[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(batch)
                right += int((logits.argmax(1) == ids[batch]).sum())
        held = logits_of(val).detach()
        history.append((keys.detach().clone(), values.detach().clone()))
        judged = (
            functional.cross_entropy(held, truth).item(),
            float((held.argmax(1) == truth).double().mean()),
        )
        curve.append([total / len(ids), right / len(ids), *judged])
    return history, np.array(curve)


@pytest.mark.parametrize("with_val", [False, True])
@pytest.mark.parametrize("train", [("keys",), ("values",), ("keys", "values")])
def test_twenty_epochs_match_plain_torch(shots, val, train, with_val):
    cache = index()
    recipe = replace(OWN, epochs=20, train=train, seed=4)
    tuned = finetune.finetune(cache, shots, Reader(), recipe, val=val if with_val else None)
    history, curve = plain(cache, shots, recipe)
    keys, values = history[tuned.record["epoch"]]
    found = torch.from_numpy(tuned.index.keys)
    assert float((found - keys).norm() / keys.norm()) < 1e-5
    if "keys" in train and tuned.record["epoch"]:
        moved = keys - torch.from_numpy(cache.keys)
        assert float((found - keys).norm() / moved.norm()) < 1e-4
        assert float(moved.abs().max()) > 0.01 or tuned.record["epoch"] < 20
    elif "keys" not in train:
        assert np.array_equal(tuned.index.keys, cache.keys)
    assert (tuned.index.values is not None) == ("values" in train)
    if tuned.index.values is not None and tuned.record["epoch"]:
        assert float((tuned.index.values - values).norm() / (values - values.round()).norm()) < 1e-4
    rows = tuned.index.curve.to_pylist()
    assert [row["epoch"] for row in rows] == list(range(21))
    assert math.isnan(rows[0]["loss"])
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    by_column = [
        [row[name] for row in rows] for name in ("loss", "accuracy", "val_loss", "val_accuracy")
    ]
    assert_allclose(np.array(by_column[:2]).T[1:], curve[1:, :2], rtol=1e-5)
    assert curve[-1, 0] < curve[1, 0] or train == (
        "values",
    )  # so few steps hardly change values of 1
    if with_val:
        assert_allclose(np.array(by_column[2:]).T, curve[:, 2:], rtol=1e-5)
    else:
        assert np.isnan(by_column[2:]).all()
        assert (tuned.record["epoch"], tuned.choice, tuned.record["collapsed"]) == (20, None, None)
        assert (tuned.index.settings.alpha, tuned.index.settings.beta) == (1.0, 5.5)
        assert tuned.index.provenance["alpha"] == "finetune"


def test_only_the_same_seed_gives_the_same_bits(shots, val):
    recipe = replace(OWN, train=("keys", "values"))
    one, same, other = (
        finetune.finetune(index(), shots, Reader(), replace(recipe, seed=seed), val=val)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one.index.keys, same.index.keys)
    assert torch.equal(one.index.values, same.index.values)
    assert without_seconds(one.index.curve) == without_seconds(same.index.curve)
    assert not np.array_equal(one.index.keys, other.index.keys)


@pytest.mark.parametrize("train", [("keys",), ("keys", "values")])
def test_the_result_can_be_saved_with_its_provenance(shots, val, tmp_path, train):
    cache = index()
    cache.save(tmp_path / "parent")
    cache = Index.load(tmp_path / "parent")
    cache.settings = cache.settings.override(temperature=3.0)
    keys = np.array(cache.keys)
    text = cache.text_weights.clone()
    before = cache.__dict__.copy()
    tuned = finetune.finetune(cache, shots, Reader(), Recipe(train=train), val=val)
    assert before.keys() <= cache.__dict__.keys()
    assert {name for name in before if before[name] is not cache.__dict__[name]} == set()
    assert np.array_equal(cache.keys, keys)
    assert torch.equal(cache.text_weights, text)
    tuned.save(tmp_path / "tuned")
    found = verify(tmp_path / "tuned")
    rows, _ = clusters(50, C, D, 9)
    assert torch.equal(found.logits(rows), tuned.index.logits(rows))
    assert not torch.equal(found.logits(rows), cache.logits(rows))
    assert (without_seconds(found.curve), found.curve["seconds"]) == (
        without_seconds(tuned.index.curve),
        tuned.index.curve["seconds"],
    )
    assert found.curve.schema == CURVE
    assert (found.values is not None) == ("values" in train)
    assert found.settings.temperature == 1.0
    assert "temperature" not in found.provenance
    record = found.provenance["finetune"]
    assert record == json.loads(json.dumps(tuned.record))
    expected = {
        "parent": str(tmp_path / "parent"),
        "parent_version": 1,
        "train": list(train),
        "epochs": 20,
        "seed": 1,
    }
    expected |= {"lr": 1e-3, "epoch": tuned.record["epoch"]}
    expected |= {"shots": shots.name, "val": val.name, "collapsed": None}
    assert {name: record[name] for name in expected} == expected
    assert (found.provenance["alpha"], found.provenance["normalize"]) == ("search-hp", "both")
    assert tuned.choice is not None
    assert found.settings == tuned.choice.settings(found.settings)
    assert found.labels["source"].to_pylist() == cache.labels["source"].to_pylist()
    assert accuracy(found) > accuracy(cache)


def test_a_fine_tuned_index_can_be_fine_tuned_again(shots, val):
    first = finetune.finetune(
        index(), shots, Reader(), replace(OWN, train=("keys", "values")), val=val
    )
    again = finetune.finetune(first.index, shots, Reader(), replace(OWN, seed=2, epochs=8))
    assert not np.array_equal(first.index.keys, again.index.keys)
    assert torch.equal(first.index.values, again.index.values)  # used, but not trained
    assert losses(again)[-1] < losses(first)[0]


def test_an_index_in_half_precision_is_close_to_float32(shots, tmp_path):
    recipe = replace(OWN, epochs=20)
    exact, near = (
        finetune.finetune(index(dtype=dtype), shots, Reader(), recipe)
        for dtype in (np.float32, np.float16)
    )
    near.save(tmp_path / "tuned")
    found = verify(tmp_path / "tuned")
    assert found.keys.dtype == "float16"
    assert not np.array_equal(exact.index.keys, found.keys)
    assert_allclose(found.keys.astype(np.float32), exact.index.keys, atol=2e-3)
    assert abs(accuracy(exact.index) - accuracy(found)) <= 0.01
    assert losses(near)[-1] == pytest.approx(losses(exact)[-1], rel=0.01)


def kept_by_definition(curve, n):
    """Return the latest epoch within a standard error of the best, or 0 if no epoch beats no training."""
    if not any(
        a > curve[0][0] or (a == curve[0][0] and loss < curve[0][1]) for a, loss in curve[1:]
    ):
        return 0
    best = max(a for a, _ in curve)
    return max(e for e, (a, _) in enumerate(curve) if a >= best - math.sqrt(best * (1 - best) / n))


def train_with_curve(monkeypatch, cache, material, curve):
    """Train with epochs that add 0.001 to every key, and a validation that gives this curve of accuracy and loss."""
    made = iter(curve)

    def step(trainer, queries, ids, lr):
        with torch.no_grad():
            trainer.keys += 0.001
        return 1.0, len(ids)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: next(made)[::-1])
    return finetune._trained(cache, material, replace(OWN, epochs=len(curve) - 1))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    shots = shots_table(folder / "shots.parquet")
    val = queries_table(folder / "val.parquet")
    return _Shots.of(index(), shots, Reader(), OWN, val)


def test_the_kept_epoch_follows_the_rule(material, monkeypatch):
    kept = set()
    monkeypatch.setattr(finetune, "BATCH", 1024)

    @tries(150)
    @example(
        [(30, 1.0), (30, 1.0), (24, 0.5)]
    )  # no epoch is better: a lower loss does not outweigh accuracy
    @example([(30, 1.0), (30, 0.9)])  # equal accuracy, lower loss
    @example([(30, 1.0), (48, 0.9), (46, 0.9), (42, 0.9)])  # a standard error of 0.8 on 60 is 0.052
    @given(
        st.lists(
            st.tuples(st.integers(40, 60), st.sampled_from([0.5, 0.6, 0.7])), min_size=2, max_size=9
        )
    )
    def check(made):
        curve = [(right / 60, loss) for right, loss in made]
        cache = index()
        tuned = train_with_curve(monkeypatch, cache, material, curve)
        epoch = tuned.record["epoch"]
        assert epoch == kept_by_definition(curve, 60)
        assert_allclose(tuned.index.keys - 0.001 * epoch, cache.keys, atol=1e-4)
        assert len(tuned.index.curve) == len(curve)  # all epochs ran
        kept.add(min(epoch, 2))

    check()
    assert kept == {0, 1, 2}


@pytest.mark.parametrize("train", [("keys",), ("values",)])
@pytest.mark.parametrize("with_val", [False, True])
@pytest.mark.parametrize(("lr", "epochs", "batch"), [(1e4, 4, 16), (1e37, 4, 16), (1e37, 1, 1024)])
def test_a_collapse_is_reported_and_discarded(
    shots, val, tmp_path, caplog, monkeypatch, train, with_val, lr, epochs, batch
):
    monkeypatch.setattr(finetune, "BATCH", batch)
    cache = index()
    recipe = replace(OWN, train=train, lr=lr, epochs=epochs)
    tuned = finetune.finetune(cache, shots, Reader(), recipe, val=val if with_val else None)
    fell = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if tuned.record["collapsed"] is None:  # no collapse: the kept epoch is sound
        assert not any("collapsed" in message for message in fell)
    else:
        assert fell == [
            "training collapsed: {collapsed}; kept epoch {epoch}".format(**tuned.record)
        ]
        assert tuned.record["epoch"] < len(tuned.index.curve) - 1 <= epochs
    if "keys" in train:  # an exponential overflows, but values may be of any size
        assert tuned.record["collapsed"] is not None
    tuned.save(tmp_path / "tuned")
    found = verify(tmp_path / "tuned")
    rows, _ = clusters(40, C, D, 3)
    assert torch.isfinite(found.logits(rows)).all()
    if tuned.record["epoch"] == 0:
        assert np.array_equal(found.keys, cache.keys)


def test_shots_are_the_sources_of_the_keys(shots, tmp_path):
    rows = unit_rows(3, D)
    extra = open_source(
        write_table(tmp_path / "more.parquet", rows, NAMES[:3], ["shot 3", "other", "shot 0"])
    )
    assert shots_of(index(), extra).sources == ["shot 3", "shot 0"]
    assert shots_of(index(), shots).sources == shots.sources
    none = open_source(write_table(tmp_path / "none.parquet", rows, NAMES[:3], ["a", "b", "c"]))
    with pytest.raises(
        InputError,
        match=r"none\.parquet: none of its 3 items is a shot of the index.*'shot 0'.*'a'",
    ):
        shots_of(index(), none)


def test_shots_and_validation_images_must_match_the_index(shots, tmp_path):
    foreign = open_source(
        write_table(tmp_path / "foreign.parquet", unit_rows(2, D), ["class 0", "zebra"])
    )
    longer = open_source(write_table(tmp_path / "longer.parquet", unit_rows(2, D + 1), NAMES[:2]))
    for given_, words in (
        (foreign, "foreign.parquet.*zebra"),
        (longer, f"longer.parquet.*{D + 1}.*{D}"),
    ):
        for arguments in ({"shots": given_}, {"shots": shots, "val": given_}):
            with pytest.raises(InputError, match=words) as error:
                finetune.finetune(index(), reader=Reader(), recipe=OWN, **arguments)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"train": train}, "train") for train in ((), ("keys", "keys"), ("tower",))),
        *(({name: value}, f"{name} is {value}") for name in ("epochs",) for value in (0, 2.5)),
        *(({"seed": value}, "seed") for value in (-1, 2.5)),
        *(({"lr": value}, "lr is") for value in (0.0, math.nan, math.inf)),
        ({"train": ("visual",)}, "train visual"),
    ],
)
def test_invalid_recipes_are_refused_in_one_line(changes, named):
    with pytest.raises(UsageError, match=f"^{named}") as error:
        Recipe(**changes)
    assert "\n" not in str(error.value)
    Recipe(epochs=1, seed=0, train=("keys", "values"))


def test_holding_out_shots_does_not_change_the_training(shots, tmp_path):
    cache, recipe = index(), replace(OWN, epochs=20, lr=0.03)  # so that training helps
    plain = finetune.finetune(cache, shots, Reader(), recipe)
    tuned = finetune.finetune_into(tmp_path / "tuned", cache, shots, Reader(), recipe)
    assert np.array_equal(tuned.index.keys, plain.index.keys)
    assert tuned.compared.n == SHOTS
    assert 0 <= tuned.compared.before < tuned.compared.after <= 1


@pytest.fixture
def photos(things):
    """An index of photos, eight for each class, and the photos."""
    return Index.load(things), open_source(things.with_suffix(".csv"))


def test_validation_images_have_one_view_for_any_encoder_settings(lit_mini, photos):
    cache, source = photos
    shots = source.take([0, 1, 8, 9, 16])
    val = source.take([2, 10, 18])
    recipe = replace(OWN, epochs=2)
    one, other = (
        finetune.finetune(
            cache, shots, Reader(lit_mini, views=views, seed=seed), recipe, val=val
        ).index.curve
        for views, seed in ((1, 1), (4, 7))
    )
    assert without_seconds(one) == without_seconds(other)


def test_training_draws_one_view_of_each_photo(lit_mini, photos, monkeypatch):
    monkeypatch.setattr(finetune, "VIEWS", 3)
    cache, source = photos
    recipe = Recipe()
    first = [source.labels.index(name) for name in cache.class_names[:3]]
    chosen = source.take(
        [first[0], first[0], first[0] + 1, first[1], first[1] + 1, first[2], first[0] + 1]
    )
    material = _Shots.of(cache, chosen, Reader(lit_mini), recipe, None)
    seen = set()
    every = Reader(lit_mini).encode_views(chosen.take([0, 2, 3, 4, 5]), view_names(recipe.seed, 3))
    for epoch in range(40):
        ((features, ids),) = material.batches(recipe, epoch)
        assert sorted(ids.tolist()) == [0, 0, 1, 1, 2]
        assert torch.equal(features, next(material.batches(recipe, epoch))[0])
        rows = {row.tobytes() for row in features.numpy()}
        for own in every.values():  # one view of each photo
            assert len(rows & {row.tobytes() for row in own}) == 1
        seen |= rows
    assert seen == {row.tobytes() for own in every.values() for row in own}


# -- the command --

HELPFUL = ("--epochs", 20, "--lr", 0.03)


@pytest.fixture
def place(tmp_path, run):
    """An index of the shots, a table of their views, and tables for validation and test."""
    features, ids = clusters(SHOTS, C, D, 1)
    write_table(
        tmp_path / "train.parquet",
        features,
        [NAMES[i] for i in ids],
        [f"shot {i}" for i in range(SHOTS)],
    )
    write_table(tmp_path / "text.parquet", unit_rows(C, D, 5), NAMES)
    shots_table(tmp_path / "views.parquet", [2] * SHOTS, 0.02)
    for name, n, seed in (("val", 30, 3), ("test", 60, 4)):
        queries_table(tmp_path / f"{name}.parquet", n, seed)
    fitted_index(run, tmp_path, "--fit", "none")
    return tmp_path


def fitted_index(run, place, *more):
    """Build the index of the shots, by default with a closed-form fit."""
    text = ("--text", place / "text.parquet", "--logit-scale", 10)
    ok("index build", place / "train.parquet", *text, *more, "--out", place / "index")
    return Index.load(place / "index")


def tune(run, place, *more, out=None):
    out = place / "tuned" if out is None else out
    return run(
        "finetune", place / "index", "--out", out, "--source", place / "views.parquet", *more
    )


def test_finetune_trains_on_the_source_of_the_index_by_default(run, place):
    result = ok("finetune", place / "index", "--out", place / "tuned", *HELPFUL)
    keys, tuned = (Index.load(place / name).keys for name in ("index", "tuned"))
    assert not np.array_equal(keys, tuned)
    (place / "train.parquet").unlink()
    result = run("finetune", place / "index", "--out", place / "again", "--epochs", 2)
    failed(result, 1, "shot 0: no such file, though it is a shot of the index; give --source")
    assert not (place / "again").exists()


@pytest.mark.parametrize(
    ("more", "out", "code", "message"),
    [
        (["--train", "visual"], None, 2, "--train"),
        (["--epochs", "2000000"], None, 2, "--epochs"),
        (["--val", "nowhere.parquet"], None, 1, "nowhere.parquet: no such file"),
        ([], "\udcff", 1, "UTF-8"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(run, place, more, out, code, message):
    result = tune(run, place, *more, out=out)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert not (place / "tuned").exists()


def test_training_without_gain_is_discarded(run, place):
    """The new index has the fit and the answers of the old one."""
    index = fitted_index(run, place)
    result = tune(run, place, "--epochs", 3, "--lr", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert "closed-form fit" in result.stderr.splitlines()[0]
    printed = json.loads(result.stdout)
    assert printed["kept"] == "as it was"
    assert printed["after"] <= printed["before"]
    assert printed["epoch"] is None
    kept = verify(place / "tuned")
    test = open_source(place / "test.parquet")
    assert (kept.settings, kept.fitted, kept.curve) == (index.settings, index.fitted, None)
    features = Reader().encode(test).features
    assert_allclose(kept.logits(features), index.logits(features), rtol=1e-5)


def test_the_printed_accuracy_is_of_held_out_photos(run, place):
    """Random labels can be memorised, but tell nothing about held-out shots."""
    rows = pq.read_table(place / "views.parquet")
    names = sorted(set(rows["id"].to_pylist()))
    drawn = dict(zip(names, default_rng(0).choice(NAMES, len(names)).tolist(), strict=True))
    for name in ("train", "views"):
        table = pq.read_table(place / f"{name}.parquet")
        column = pa.array([drawn[one] for one in table["id"].to_pylist()])
        pq.write_table(
            table.set_column(table.schema.get_field_index("label"), "label", column),
            place / f"{name}.parquet",
        )
    index = fitted_index(run, place)
    shots = open_source(place / "views.parquet")
    tuned = finetune.finetune(index, shots, Reader(), Recipe(epochs=40, lr=0.03))
    assert tuned.index.curve["accuracy"][-1].as_py() > 0.9
    printed = json.loads(tune(run, place, "--epochs", 40, "--lr", 0.03, "--json").stdout)
    assert max(printed["before"], printed["after"]) < 0.5
    assert printed["n"] == SHOTS


def test_validation_accuracy_is_measured_before_and_after_training(run, place):
    """Python gives the result of the command."""
    cache = Index.load(place / "index")
    shots, val = (open_source(place / f"{name}.parquet") for name in ("views", "val"))
    printed = json.loads(
        tune(run, place, "--val", place / "val.parquet", *HELPFUL, "--json").stdout
    )
    assert printed["kept"] == "trained"
    assert (printed["before"], printed["n"]) == (pytest.approx(accuracy(cache, 30, 3)), len(val))
    assert printed["after"] == pytest.approx(accuracy(Index.load(place / "tuned"), 30, 3))
    tuned = finetune.finetune_into(
        place / "again", cache, shots, Reader(), Recipe(epochs=20, lr=0.03), val=val
    )
    assert tuned.facts() | {"seconds": 0} == printed | {"seconds": 0}
    one, other = (Index.load(place / name) for name in ("tuned", "again"))
    assert np.array_equal(one.keys, other.keys)
    assert one.settings == other.settings


def test_single_shots_are_not_held_out_and_a_message_says_so(run, place):
    table = pq.read_table(place / "train.parquet")
    first = sorted({label: i for i, label in enumerate(table["label"].to_pylist())}.values())
    pq.write_table(table.take(first), place / "train.parquet")
    fitted_index(run, place)
    result = tune(run, place, "--epochs", 1, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["kept"], printed["before"], printed["after"], printed["n"]) == (
        "trained",
        None,
        None,
        None,
    )
    assert "--val" in result.stderr


# -- real features, and a GPU --


@pytest.mark.gpu
@pytest.mark.parametrize("train", [("keys",), ("keys", "values")])
def test_training_on_a_gpu_matches_the_cpu(shots, val, train):
    recipe = replace(OWN, train=train, epochs=20)
    cpu, gpu, again = (
        finetune.finetune(index(device=device), shots, Reader(), recipe, val=val)
        for device in ("cpu", "cuda", "cuda")
    )
    assert np.array_equal(gpu.index.keys, again.index.keys)
    moved_by = cpu.index.keys - index().keys
    assert cpu.record["epoch"] == gpu.record["epoch"]
    assert np.linalg.norm(gpu.index.keys - cpu.index.keys) < 1e-2 * np.linalg.norm(moved_by)
    assert_allclose(losses(gpu), losses(cpu), rtol=1e-3)
    assert abs(accuracy(gpu.index) - accuracy(cpu.index)) <= 0.01
