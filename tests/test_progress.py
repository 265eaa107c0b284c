"""Estimated numbers of wrong answers, checked against classifiers that are fitted without labels, and the truth."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.special
from conftest import fitted
from numpy.random import default_rng
from tables import unit, unit_rows

from retrieval_tip import Index
from retrieval_tip.errors import UsageError
from retrieval_tip.evaluation.held_out import held_out_probabilities
from retrieval_tip.fit.forms import Form
from retrieval_tip.labelling import progress
from retrieval_tip.labelling.progress import Estimate, estimate_rest, gain_of

NAMES = list("abcd")
CENTRES = unit_rows(4, 10, 5)
TEXT = unit(unit_rows(4, 10, 5) + 0.8 * unit_rows(4, 10, 6))


def index_of(n, text, seed=0):
    """Return a fitted index of unequal classes, its features and its class ids. Photos 0 and 1 have the same source."""
    ids = default_rng(seed).choice(4, n, p=[0.5, 0.25, 0.2, 0.05])
    features = unit(CENTRES[ids] + 1.5 * unit_rows(n, 10, seed + 1))
    sources = [f"photo-{max(i, 1)}" for i in range(n)]
    index = fitted(
        Index.from_features(features, ids, NAMES, TEXT if text else None, sources=sources)
    )
    return index, features, ids


def answers_of(index, features, ids, kept, photos):
    """Return the logits of photos from a new index of the kept photos, with the settings of ``index``."""
    kept = list(kept)
    text = TEXT if index.has_text else None
    other = fitted(
        Index.from_features(features[kept], ids[kept], NAMES, text),
        forms=[Form.of(index.fitted, index.settings.beta)],
    )
    other.settings = replace(index.settings)
    logits = other.logits(photos).numpy()
    logits[:, [text is None and i not in ids[kept] for i in range(4)]] = -np.inf
    return logits


def answers_without(index, features, ids, asked, kept):
    """Return the logits of each photo from a new index of the other kept photos."""
    others = ([i for i in kept if i != photo and not {i, photo} <= {0, 1}] for photo in asked)
    return np.concatenate(
        [
            answers_of(index, features, ids, own, features[photo : photo + 1])
            for photo, own in zip(asked, others, strict=True)
        ]
    )


def probabilities(logits, temperature):
    return scipy.special.softmax(logits / temperature, axis=1)


def wrong_of(probabilities, labels, rest):
    """Return how probably each answer to the rest is wrong, at the temperature that suits the held-out answers best."""
    possible = probabilities[np.arange(len(labels)), labels] > 0
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities[possible])
        answers = np.log(rest)
        own = labels[possible]

    def loss(log_factor):
        p = scipy.special.softmax(np.exp(log_factor) * logs, axis=1)[np.arange(len(own)), own]
        return (
            progress.DOUBT * log_factor**2
            - np.log((1 - progress.WRONG) * p + progress.WRONG / np.isfinite(logs[0]).sum()).sum()
        )

    factor = np.exp(min(np.linspace(-3, 3, 601), key=loss))
    best = np.sort(scipy.special.softmax(factor * answers, axis=1), axis=1)[:, ::-1]
    return 1 - best[:, 0], 1 - best[:, :3].sum(axis=1)


@pytest.mark.parametrize("text", [True, False])
def test_labelled_photos_tell_how_often_an_answer_is_right(text):
    index, features, ids = index_of(40, text)
    rest = unit(CENTRES[np.arange(60) % 4] + 1.5 * unit_rows(60, 10, 9))
    temperature = index.settings.temperature
    before = index.logits(rest).numpy()
    asked = [1, 7, 12, 20, 28, 33, 38]  # at most FOLDS, so that each is held out alone
    logits = answers_without(index, features, ids, asked, range(40))
    right = logits.argmax(axis=1) == ids[asked]
    assert 0 < right.sum() < 7
    found = estimate_rest(
        index, [*asked, 0, 999], rest
    )  # 0 has the same source as 1; 999 is unknown
    held, answers = (probabilities(one, temperature) for one in (logits, before))
    wrong, missed = wrong_of(held, ids[asked], answers)
    screen = np.argsort(wrong)[-24:]
    assert found.first_actions == pytest.approx(1 + (wrong + missed)[screen].sum(), rel=0.05)
    assert found.wrong == pytest.approx(wrong.sum(), rel=0.05)
    spread = np.sqrt(progress.SPREAD**2 + progress.EVIDENCE / (1 + (~right).sum()))
    chance = default_rng(4)
    shares = scipy.special.expit(
        scipy.special.logit(found.wrong / 60) + spread * chance.standard_normal(50_000)
    )
    numbers = np.minimum(chance.poisson(60 * shares), 60)
    assert (found.least_wrong, found.most_wrong) == pytest.approx(
        np.quantile(numbers, (0.025, 0.975)), abs=3
    )
    shares = np.array([found.wrong, found.most_wrong, found.least_wrong]) / 60
    assert (found.accuracy, found.low, found.high) == pytest.approx(tuple(1 - shares))
    assert (index.logits(rest).numpy() == before).all()


def test_the_estimate_is_a_mean_of_classifiers_that_lack_the_last_labels():
    index, features, ids = index_of(40, False)
    rest = unit(CENTRES[np.arange(60) % 4] + 1.5 * unit_rows(60, 10, 9))
    asked = range(10, 40)
    wrong = []
    for kept in (40, 35, 30):  # at least 20 of the photos that are held out
        sources = [f"photo-{max(i, 1)}" for i in range(kept)]
        other = fitted(Index.from_features(features[:kept], ids[:kept], NAMES, sources=sources))
        held = held_out_probabilities(
            other, np.flatnonzero(other.labels["key_id"].to_numpy() >= 10)
        )
        answers = probabilities(other.logits(rest).numpy(), other.settings.temperature)
        wrong.append(wrong_of(held.pred_probs, held.labels, answers)[0].mean())
    assert np.ptp(wrong) > 0.02
    assert estimate_rest(index, asked, rest).accuracy == pytest.approx(
        1 - np.average(wrong, weights=[1, 0.75, 0.5]), abs=0.003
    )


@pytest.mark.parametrize("text", [True, False])
def test_the_gain_counts_the_answers_that_half_of_the_labels_would_lose(text):
    index, features, ids = index_of(40, text)
    rest = unit(CENTRES[np.arange(60) % 4] + 1.5 * unit_rows(60, 10, 9))
    found = estimate_rest(index, [1, 7], rest)
    now = index.logits(rest).numpy()
    half = answers_of(index, features, ids, range(20), rest).argmax(axis=1)
    p = probabilities(now, index.settings.temperature)
    wrong = found.wrong / 60
    lost = (p.max(axis=1) - p[np.arange(60), half]).mean()
    assert lost > 0.01
    falls = wrong / (wrong + lost)  # with 40 labels instead of 20, and again with 80 labels
    assert gain_of(index, rest, found, 40) == pytest.approx(wrong - wrong * falls, rel=1e-3)
    assert gain_of(index, rest, found, 120) == pytest.approx(wrong - wrong * falls**2, rel=1e-3)


def test_the_estimate_is_empty_without_labels_or_photos():
    index, features, _ = index_of(30, False)
    none = estimate_rest(index, [99], features)
    assert none == Estimate(0.0, 0.0, 1.0, 30, 0, 30, 49)
    assert gain_of(index, features[:0], none, 20) is None
    assert estimate_rest(index, [1], features[:0]) == Estimate(0.0, 0.0, 1.0, 0, 0, 0, 1)
    with pytest.raises(UsageError, match="more"):
        gain_of(index, features, none, 0)
    single = fitted(Index.from_features(features[:2], [0, 1], NAMES))
    found = estimate_rest(single, [0, 1], features)
    assert not held_out_probabilities(
        single, np.arange(2)
    ).right.any()  # without its only photo, a class is unknown
    assert gain_of(single, features, found, 2) is None
    copies = Index.from_features(features[:4], [0] * 4, NAMES, sources=["one"] * 4)
    assert gain_of(copies, features, found, 2) is None


def test_an_answer_is_never_certain_if_all_held_out_answers_are_right():
    ids = np.arange(120) % 4
    features = unit(CENTRES[ids] + 1e-3 * unit_rows(120, 10, 5))
    index = fitted(Index.from_features(features[:40], ids[:40], NAMES))
    found = estimate_rest(index, range(40), features[40:])
    assert 0 < found.wrong < 1
    assert found.least_wrong == 0 < found.most_wrong
    assert gain_of(index, features[40:], found, 20) == pytest.approx(0, abs=1e-3)


def test_the_number_of_wrong_answers_stays_in_its_interval_while_the_least_certain_are_reviewed():
    inside = []
    for seed in range(4):
        ids = default_rng(seed).integers(0, 4, 300)
        features = unit(CENTRES[ids] + 1.5 * unit_rows(300, 10, seed + 20))
        labelled = list(range(30))
        for _ in range(3):
            index = fitted(Index.from_features(features[labelled], ids[labelled], NAMES))
            rest = np.setdiff1d(np.arange(300), labelled)
            found = estimate_rest(index, range(len(labelled)), features[rest])
            p = probabilities(index.logits(features[rest]).numpy(), index.settings.temperature)
            inside.append(
                found.least_wrong <= (p.argmax(axis=1) != ids[rest]).sum() <= found.most_wrong
            )
            labelled += rest[p.max(axis=1).argsort()[:40]].tolist()
    assert sum(inside) >= 11
    assert found.most_wrong < 150


@pytest.mark.parametrize(
    ("least", "most", "wrong", "then", "now", "said"),
    [
        (12, 60, 30, 240, 240, "12 to 60 of the other 240 photos are wrong (about 30)"),
        (
            12,
            60,
            30,
            240,
            120,
            "6 to 30 of the other 120 photos are wrong (about 15)",
        ),  # some were labelled since
        (
            0,
            2345,
            1500.4,
            10_000,
            10_000,
            "0 to 2,345 of the other 10,000 photos are wrong (about 1,500)",
        ),
        (3, 3, 2.9, 12, 12, "Probably 3 of the other 12 photos are wrong"),
        (0, 0, 0.2, 1, 1, "The other photo is probably right"),
        (1, 1, 0.9, 1, 1, "The other photo is probably wrong"),
        (0, 1, 0.5, 1, 1, ""),
        (0, 240, 240, 240, 240, ""),
        (12, 60, 30, 240, 0, ""),
    ],
)
def test_the_interval_of_wrong_answers_is_said_first(least, most, wrong, then, now, said):
    found = Estimate(1 - wrong / then, 1 - most / then, 1 - least / then, wrong, least, most, 0)
    assert found.of_others(now) == said
