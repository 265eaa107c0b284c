"""Diagrams show the counts that plain Python computes, and can be drawn for any answers."""

import base64
from collections import Counter
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import few
from html_tree import Tree

from retrieval_tip.errors import one_line
from retrieval_tip.evaluation.evaluate import Answers, Evaluation
from retrieval_tip.report import plots
from retrieval_tip.settings import Settings

pytest.importorskip("matplotlib")

DIAGRAMS = [plots.draw_confusion, plots.draw_reliability, plots.draw_coverage]


def made_up(truth, predicted, names, confidence=None, **changes):
    """Return an evaluation with these answers."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    right = truth == predicted
    confidence = np.linspace(0.05, 1, len(truth)) if confidence is None else np.asarray(confidence)
    facts = {
        "top1": float(right.mean()), "top5": 1.0, "zero_shot_top1": None, "cache_top1": 0.5,
        "mean_per_class": 0.5, "ece": 0.1, "n": len(truth), "skipped": 0, "settings": Settings(),
        "confusions": [], "by_class": [],
        "answers": Answers(
            truth, predicted[:, None], confidence, np.arange(len(truth)), np.log(confidence), names, len(names), ~right
        ),
    }  # fmt: skip
    return Evaluation(**(facts | changes))


def picture_of(element):
    """Return the SVG file in an ``<img>`` element."""
    return base64.b64decode(element.attributes["src"].removeprefix("data:image/svg+xml;base64,"))


def test_confusion_counts_every_pair():
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(7)]
    truth, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)  # the last class does not occur
    found = plots.confusion(made_up(truth, predicted, names).answers)
    pairs = Counter(zip(truth.tolist(), predicted.tolist(), strict=True))
    assert (found.names, found.of) == (names[:6], 6)
    assert found.counts.tolist() == [[pairs[i, j] for j in range(6)] for i in range(6)]
    assert found.totals.tolist() == found.counts.sum(axis=1).tolist()


def test_unknown_photos_without_a_match_are_no_confusion():
    truth, predicted = np.array([0, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 0])
    no_match = np.array([False, True, True, False, False])
    answers = made_up(truth, predicted, ["a", "b", "new"]).answers
    answers = replace(answers, known=2, no_match=no_match)
    assert answers.right.tolist() == [True, False, True, False, False]
    found = plots.confusion(answers)
    assert (found.counts.tolist(), found.totals.tolist()) == ([[1, 0, 0], [1, 0, 0], [1, 1, 0]], [1, 1, 3])


def test_only_the_most_confused_of_many_classes_are_shown():
    c = plots.MOST_CLASSES + 50
    names = [f"class {i}" for i in range(c)]
    truth = np.repeat(np.arange(c), 3)
    predicted = truth.copy()
    confused = np.arange(5, 5 + 3 * 30, 3)  # thirty pairs of neighbours, each confused twice
    for i in confused:
        predicted[3 * i : 3 * i + 2] = i + 1
    found = plots.confusion(made_up(truth, predicted, names).answers)
    assert found.of == c
    assert len(found.names) == plots.FEWER_CLASSES
    errors = Counter(np.concatenate([truth[truth != predicted], predicted[truth != predicted]]).tolist())
    assert min(errors[names.index(n)] for n in found.names) == 2
    assert found.names == sorted(found.names, key=names.index)
    i = found.names.index("class 5")
    assert found.counts[i, found.names.index("class 6")] == 2
    assert (found.totals == 3).all()
    at_most = made_up(truth[:300], truth[:300], names).answers
    assert len(plots.confusion(at_most).names) == plots.MOST_CLASSES


ODD = ["$a$_^{", "$", "n\new\x1b[31m", "猫 \u200f", "long " * 40, "\\frac", "%", "x", "y", "z"]


DEGENERATE = {
    "odd names": made_up(range(10), range(10), ODD, [0.2] * 10, abstain=0.9, coverage=0.0),
    "one item": made_up([0], [0], ["only"], [1.0], abstain=1.0, coverage=1.0, selective_top1=1.0),
    "all wrong": made_up([0], [1], ["a", "b"], [0.5], abstain=1.0, coverage=0.0, mean_per_class=0.0),
    "many classes": made_up(
        np.arange(600) % 150, np.arange(600) % 149, [f"class {i}" for i in range(150)], mean_per_class=0.2
    ),
}


@pytest.mark.parametrize("name", few(DEGENERATE, 2))
def test_degenerate_evaluations_are_drawn(name, recwarn):
    for draw in DIAGRAMS:
        (drawn,) = Tree(plots.svg(lambda draw=draw: draw(DEGENERATE[name]), name)).root.all("img")
        root = ElementTree.fromstring(picture_of(drawn))
        assert all(float(root.get(side).removesuffix("pt")) > 150 for side in ("width", "height"))
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) >= 3
    assert not [str(w.message) for w in recwarn]


@pytest.mark.parametrize("date", [None, "-", "9" * 30])
def test_diagrams_accept_any_class_name_and_date_of_the_build(date, monkeypatch, recwarn):
    if date:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
    names = ["font: 1px '", "<!--", "--><style>", "#222222", '"><g id="', "</svg>", "$x^{", "a\x00\nb", "\ud800"]
    evaluation = made_up(np.arange(18) % 9, np.arange(18) // 2, names)
    (drawn,) = Tree(plots.svg(lambda: plots.draw_confusion(evaluation), "'\"<b>")).root.all("img")
    assert drawn.attributes["alt"] == "'\"<b>"
    texts = ElementTree.fromstring(picture_of(drawn)).iter("{http://www.w3.org/2000/svg}text")
    assert {one_line(name) for name in names} <= {"".join(node.itertext()) for node in texts}
    assert not recwarn.list
