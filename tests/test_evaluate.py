"""Evaluation compared with counts in plain NumPy."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import cache_of, fitted, json_of, json_rows, ok
from dense import affinity, nearest, parts
from numpy.random import default_rng
from tables import read_features, unit, write_table

from retrieval_tip import Index
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import open_source
from retrieval_tip.errors import InputError
from retrieval_tip.evaluation import held_out
from retrieval_tip.evaluation.evaluate import CONFUSIONS, evaluate
from retrieval_tip.fit.forms import Form
from retrieval_tip.index.places import at

C, D, SHOTS, Q = 8, 16, 4, 300
NAMES = [f"class {i}" for i in range(C)]


_rng = default_rng(0)
_means = unit(_rng.standard_normal((C, D)))
Y = np.repeat(np.arange(C), SHOTS)
KEYS = unit(_means[Y] + 0.4 * _rng.standard_normal((len(Y), D)))
TEXT = unit(_means + 0.4 * _rng.standard_normal((C, D)))
TRUTH = _rng.choice(
    C - 1, size=Q, p=np.arange(1, C) / np.arange(1, C).sum()
)  # unbalanced; the last never occurs
QUERIES = unit(_means[TRUTH] + 0.5 * _rng.standard_normal((Q, D)))


def model(c=C, **changes):
    few = c * SHOTS  # keys are in class order
    arguments = {"text_weights": TEXT[:c], "alpha": 2.0, "beta": 3.0, "logit_scale": 10.0} | changes
    return cache_of(KEYS[:few], Y[:few], NAMES[:c], device="cpu", **arguments)


def labelled(folder, labels, features):
    ids = [f"q{i}" for i in range(len(labels))]
    return open_source(write_table(folder / "features.parquet", features, labels, ids))


def labelled_table(path, ids, features, name="photo"):
    return write_table(
        path, features, [NAMES[i] for i in ids], [f"{name} {i}" for i in range(len(ids))]
    )


@pytest.fixture
def source(tmp_path):
    return labelled(tmp_path, [NAMES[i] for i in TRUTH], QUERIES)


def expected(k=None):
    text, cache = parts(model(), QUERIES, nearest(affinity(QUERIES, KEYS), k))
    return text + 2 * cache, text, cache


@pytest.mark.parametrize("k", [None, 5])
def test_accuracies_match_plain_numpy(source, k):
    logits, text, cache = expected(k)
    found = evaluate(model(), source, Reader(), k=k, tail=False)
    predicted = logits.argmax(1)
    right = predicted == TRUTH
    assert 0.3 < right.mean() < 0.98  # neither trivial nor hopeless
    assert found.top1 == pytest.approx(right.mean())
    best = np.argsort(-logits, axis=1)[:, :5]
    assert found.top5 == pytest.approx((best == TRUTH[:, None]).any(1).mean())
    assert found.top1 < found.top5 < 1
    assert found.zero_shot_top1 == pytest.approx((text.argmax(1) == TRUTH).mean())
    assert found.cache_top1 == pytest.approx((cache.argmax(1) == TRUTH).mean())
    per_class = {NAMES[i]: right[np.equal(TRUTH, i)].mean() for i in range(C - 1)}
    assert found.per_class == pytest.approx(per_class)  # without the class that never occurs
    assert found.mean_per_class == pytest.approx(np.mean(list(per_class.values())))
    assert found.mean_per_class != pytest.approx(found.top1)
    assert (found.n, found.skipped, found.settings.k, found.settings.tail) == (Q, 0, k, False)
    assert (found.settings.alpha, found.settings.beta) == (2.0, 3.0)


def test_confusions_are_the_most_frequent_mistakes(source):
    predicted = expected()[0].argmax(1)
    wrong = Counter((NAMES[a], NAMES[b]) for a, b in zip(TRUTH, predicted, strict=True) if a != b)
    found = evaluate(model(), source, Reader()).confusions
    assert len(found) == CONFUSIONS < len(wrong)
    assert all(wrong[a, b] == times for a, b, times in found)
    assert [times for _, _, times in found] == [times for _, times in wrong.most_common(CONFUSIONS)]


def test_a_source_without_any_known_class_is_refused_by_name(tmp_path):
    labels = [f"odd {i}" for i in range(7)]
    with pytest.raises(InputError) as caught:
        evaluate(model(), labelled(tmp_path, labels, QUERIES[:7]), Reader())
    message = str(caught.value)
    assert (
        "features.parquet: 7 unknown labels: odd 0, odd 1, odd 2, odd 3, odd 4 and 2 more; "
        in message
    )
    assert message.endswith("class 0, class 1, class 2, class 3, class 4 and 3 more")


@pytest.fixture
def mixed(tmp_path):
    """A fitted index of five classes and a name without shots, and photos of all eight classes."""
    shots = labelled_table(tmp_path / "shots.parquet", Y[:20], KEYS[:20])
    text = tmp_path / "text.parquet"
    write_table(text, TEXT[:6], NAMES[:6])
    ok("-q index build", shots, "--text", text, "--out", tmp_path / "index")
    rng = default_rng(7)
    truth = rng.integers(0, C, 160)
    return tmp_path / "index", labelled_table(
        tmp_path / "mixed.parquet", truth, unit(_means[truth] + 0.4 * rng.standard_normal((160, D)))
    )


def test_unknown_classes_are_right_if_they_match_no_class(mixed, run):
    metrics = pytest.importorskip("sklearn.metrics")
    index, test = mixed
    done = run("evaluate", index, test, "--json", "--abstain", 0.5)
    found = json.loads(done.stdout)
    answers = json_rows(run("classify", index, test, "--format", "json"))
    truth = np.array(pq.read_table(test)["label"].to_pylist())
    label, no_match = (
        np.array([answer[name] for answer in answers]) for name in ("label", "no_match")
    )
    confidence = np.array([answer["probability"] for answer in answers])
    known = np.isin(truth, NAMES[:6])
    right = np.where(known, label == truth, no_match)
    assert 0 < no_match[~known].mean() < 1
    assert found["top1"] == pytest.approx(right.mean())
    assert found["known_top1"] == pytest.approx(right[known].mean())
    assert found["known_no_match"] == pytest.approx(no_match[known].mean())
    assert found["unknown_no_match"] == pytest.approx(no_match[~known].mean())
    assert found["unknown"] == {name: int((truth == name).sum()) for name in NAMES[6:]}
    assert found["per_class"] == pytest.approx(
        {name: right[truth == name].mean() for name in NAMES[:6]}
    )
    assert found["mean_per_class"] == pytest.approx(np.mean(list(found["per_class"].values())))
    assert (found["n"], found["held_out"]) == (160, 0)
    sure = confidence >= 0.5
    assert (found["coverage"], found["selective_top1"]) == pytest.approx(
        (sure.mean(), right[sure].mean())
    )
    cache = Index.load(index)
    features, _ = read_features(test)
    terms = cache.terms(features)
    strength = terms.cache[:, np.array(cache.counts) > 0].amax(1).numpy()
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(known, strength))
    own = evaluate(cache, open_source(test).take(np.flatnonzero(known)), Reader())
    for name in ("zero_shot_top1", "cache_top1", "ece", "mean_per_class"):
        assert found[name] == pytest.approx(getattr(own, name))  # of the known classes alone
    assert (own.top1, own.known_top1, own.unknown_no_match, own.auroc) == (
        found["known_top1"],
    ) * 2 + (None, None)
    shown = run("evaluate", index, test).stdout
    assert f"unknown           {NAMES[6]} {found['unknown'][NAMES[6]]}, {NAMES[7]} " in shown
    assert "auroc" not in run("evaluate", index, labelled_table(test, [1], KEYS[4:5])).stdout


def test_without_a_threshold_every_unknown_photo_is_wrong(mixed):
    shots = mixed[0].parent / "shots.parquet"
    ok("-q index build", shots, "--fit", "none", "--out", mixed[0].parent / "plain")
    found = json_of("evaluate", mixed[0].parent / "plain", mixed[1])
    assert (found["known_no_match"], found["unknown_no_match"], found["auroc"]) == (
        None,
        None,
        None,
    )
    assert found["top1"] == pytest.approx(
        found["known_top1"] * (160 - sum(found["unknown"].values())) / 160
    )


def shots_of(n):
    """Return features, class ids and digests of shots of four unequal classes. Shots 0 and 1 are copies."""
    ids = default_rng(1).choice(4, n, p=[0.5, 0.25, 0.2, 0.05])
    features = unit(_means[ids] + 0.4 * default_rng(2).standard_normal((n, D)))
    return features, ids, [f"digest {max(i, 1)}" for i in range(n)]


@pytest.mark.parametrize("store", ["folder", "lance"])
@pytest.mark.parametrize("kind", ["with text", "without text", "nearest keys"])
def test_shots_are_classified_as_by_an_index_without_them(tmp_path, run, kind, store):
    features, ids, digests = shots_of(40)
    table = write_table(
        tmp_path / "shots.parquet", features, [NAMES[i] for i in ids], digest=digests
    )
    text = write_table(tmp_path / "text.parquet", TEXT[:4], NAMES[:4])
    place = tmp_path / "index" if store == "folder" else f"lance://{tmp_path}/index"
    options = {"with text": ["--text", text], "nearest keys": ["--fit", "none"]}.get(kind, [])
    k = kind == "nearest keys"
    ok("-q index build", table, "--out", place, *options)
    asked = [1, 7, 12, 20, 28, 33, 38]
    test = write_table(
        tmp_path / "test.parquet",
        np.concatenate([features[asked], QUERIES[:5]]),
        [*(NAMES[i] for i in ids[asked]), *(NAMES[i % 4] for i in TRUTH[:5])],
        digest=[*(digests[i] for i in asked), *("new",) * 5],
    )
    index = at(place).load()
    index = index.with_settings(index.settings.override(**({"k": 3, "tail": False} if k else {})))
    found = evaluate(index, open_source(test), Reader())
    expected = []
    for photo in asked:
        others = [i for i in range(40) if digests[i] != digests[photo]]
        own = Index.from_features(
            features[others],
            ids[others],
            NAMES[:4],
            TEXT[:4] if index.has_text else None,
        )
        if index.fitted is not None:
            own = fitted(own, forms=[Form.of(index.fitted, index.settings.beta)])
        own.settings = index.settings
        expected.append(own.classify(features[[photo]])[0])
    expected += list(index.classify(QUERIES[:5]))
    assert [NAMES[i] for i in found.answers.predicted] == [one.label for one in expected]
    np.testing.assert_allclose(
        found.answers.confidence, [one.probability for one in expected], atol=1e-4
    )
    if index.fitted is not None:
        assert found.answers.no_match is not None
        assert found.answers.no_match.tolist() == [one.no_match for one in expected]
    done = run("evaluate", place, test, "--json", *(["-k", 3, "--no-tail"] if k else []))
    assert (
        "7 of 12 photos are shots of this index; each was classified without itself" in done.stderr
    )
    facts = json.loads(done.stdout)
    assert (facts["held_out"], facts["top1"]) == (7, pytest.approx(found.top1))


def test_rows_without_a_digest_are_shots_if_id_and_feature_are_equal(tmp_path):
    shots = labelled_table(tmp_path / "shots.parquet", Y, KEYS)
    ok("-q index build", shots, "--fit", "none", "--out", tmp_path / "index")
    other = labelled_table(tmp_path / "other.parquet", Y, -KEYS)  # numbered in the same way
    for table, expected in ((shots, len(Y)), (other, 0)):
        assert json_of("evaluate", tmp_path / "index", table)["held_out"] == expected


def test_trained_values_of_the_other_keys_are_kept(tmp_path):
    values = np.eye(C, dtype=np.float32)[Y] + 0.1 * default_rng(4).standard_normal((len(Y), C))
    cache = model(values=values.astype(np.float32))
    test = labelled(tmp_path, [NAMES[i] for i in Y[:2]], KEYS[:2])
    test = replace(test, items=test.items.set_column(0, "source", pa.array(["key 0", "key 1"])))
    answers = evaluate(cache, test, Reader()).answers
    for row in (0, 1):
        others = np.delete(np.arange(len(Y)), row)
        own = cache_of(
            KEYS[others],
            Y[others],
            NAMES,
            text_weights=TEXT,
            alpha=2.0,
            beta=3.0,
            logit_scale=10.0,
            values=values[others].astype(np.float32),
            device="cpu",
        )
        assert answers.confidence[row] == pytest.approx(
            own.classify(KEYS[[row]])[0].probability, abs=1e-5
        )


def test_shots_of_an_index_that_is_too_large_to_copy_are_left_out(source, monkeypatch, caplog):
    monkeypatch.setattr(held_out, "MOST_COPIED", 1)
    cache = model(sources=[f"q{i}" for i in range(len(Y))])
    cache.keys[:3] = QUERIES[:3]
    found = evaluate(cache, source, Reader())
    assert (found.n, found.held_out) == (Q - 3, 0)
    assert (
        "left out 3 photos that are shots of this index, which is too large to hide them"
        in caplog.text
    )
    with pytest.raises(InputError, match="all photos are shots"):
        evaluate(cache, source.take([0, 1, 2]), Reader())


def test_the_only_photo_of_an_index_is_refused(tmp_path):
    cache = Index.from_features(KEYS[:1], [0], NAMES, TEXT, sources=["q0"])
    with pytest.raises(InputError, match="or has no other photo"):
        evaluate(cache, labelled(tmp_path, NAMES[:1], KEYS[:1]), Reader())


def test_a_source_without_items_is_refused(source):
    with pytest.raises(InputError, match="has no items"):
        evaluate(model(), source.take([]), Reader())
