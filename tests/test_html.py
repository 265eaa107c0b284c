"""Tables in notebooks: contents and escaped names."""

import numpy as np
import pytest
from html_tree import Tree
from hypothesis import given
from hypothesis import strategies as st

from retrieval_tip import Index
from retrieval_tip.html import markup, table
from retrieval_tip.predictions import SHOWN_PREDICTIONS, Predictions
from retrieval_tip.settings import Settings

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='a()'>",
    "a\nb\x1b[31m",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "\ud800",
]


def cells(page):
    return [node.text for node in page.all() if node.name in ("td", "th")]


def test_a_value_is_escaped_once_and_on_one_line():
    found = cells(
        Tree(
            table([], [['<a href="x">&\'', markup("<b>&lt;</b>"), "1.5 %", "a\nb\u202ec\ud800"]])
        ).root
    )
    assert found == ['<a href="x">&\'', "<", "1.5 %", "a\\nb\\u202ec\\ud800"]
    assert markup("<b>{}</b>").format("<") == "<b>&lt;</b>"
    assert cells(Tree(table([], [["{{ 7 * 7 }}{% raw %}"]])).root) == ["{{ 7 * 7 }}{% raw %}"]


def test_a_table_has_headings_and_aligns_numbers():
    page = Tree(
        table(["name", "<n>"], [["<a>", 1], ["b", markup("<b>2</b>")]], "cap<tion", numbers=[1])
    ).root
    assert page.text == "cap<tion name <n> <a> 1 b 2"
    assert [head.attributes["scope"] for head in page.all("th")] == ["col", "col", "row", "row"]
    sides = [
        node.attributes["style"].partition(";")[0]
        for node in page.all()
        if node.name in ("th", "td")
    ]
    assert sides == [f"text-align:{side}" for side in ("left", "right") * 3]
    assert not list(Tree(table([], [["a", 1]])).root.all("thead"))


@given(st.text(), st.text())
def test_any_text_is_escaped(one, other):
    page = Tree(table([one], [[other, one]], other)).root
    assert {node.name for node in page.all()} <= {
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert "\n" not in table([one], [[other]])


@pytest.fixture
def cache():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(12, 8)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    names = [*HOSTILE[:2], "plain"]
    sources = [f"{HOSTILE[i % 5]}{i}" for i in range(12)]
    return Index.from_features(
        keys,
        [0, 1, 2] * 4,
        names,
        settings=Settings(alpha=2.0, beta=5.5),
        sources=sources,
    )


def check_markup(shown):
    page = Tree(shown).root
    names = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "b", "small"}
    assert {node.name for node in page.all()} <= names
    assert all(set(node.attributes) <= {"style", "scope"} for node in page.all())
    assert "color" not in shown
    assert "\u202e" not in shown
    return page


def test_a_classifier_shows_its_keys_classes_and_settings(cache, tmp_path):
    page = check_markup(cache._repr_html_())
    for expected in (
        "Index",
        "12 of 8 values, float32",
        "3: <script>alert(1)</script> 4, ",
        "plain 4",
        "alpha 2",
        "beta 5.5",
        "k all",
        "not from a folder",
        "unnamed",
        "none: only the cache is used",
    ):
        assert expected in page.text
    cache.save(tmp_path / "in<dex")
    page = check_markup(Index.load(tmp_path / "in<dex")._repr_html_())
    assert f"{tmp_path / 'in<dex'}, version 1" in page.text


def test_a_prediction_shows_its_probabilities_and_neighbours(cache):
    found = cache.classify(np.asarray(cache.keys[:1]), top=2, neighbours=3)[0]
    page = check_markup(found._repr_html_())
    figures = [f"{value:.4f}" for value in (*found.probabilities, found.neighbours[0].affinity)]
    for expected in (found.label, *figures, f"{found.cache_logit:.4g}", found.neighbours[2].label):
        assert expected in page.text
    none = cache.classify(np.asarray(cache.keys[:1]), neighbours=0)[0]
    assert "affinity" not in check_markup(none._repr_html_()).text


def test_predictions_are_a_list_shown_as_a_table(cache):
    features = np.tile(np.asarray(cache.keys), (10, 1))
    found = cache.classify(features)
    assert isinstance(found, Predictions)
    assert list(found) == found
    assert found == list(found)
    page = check_markup(found._repr_html_())
    assert len(list(page.all("tr"))) - 1 == SHOWN_PREDICTIONS < len(found)
    assert f"{len(found)} predictions; the first {SHOWN_PREDICTIONS}" in page.text
    assert found[3].neighbours[0].label in page.text
    assert check_markup(Predictions()._repr_html_()).text.startswith("0 predictions")
    bare = check_markup(cache.classify(features[:1], neighbours=0)._repr_html_())
    assert "1 prediction" in bare.text
