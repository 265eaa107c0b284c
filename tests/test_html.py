"""Tables in notebooks: contents and escaped names."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_tip import Index
from retrieval_tip.html import markup, table
from retrieval_tip.predictions import SHOWN_PREDICTIONS, Predictions
from retrieval_tip.settings import Settings

VOID = frozenset({"br", "hr", "img", "link", "meta"})
"""Elements without an end tag."""

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='a()'>",
    "a\nb\x1b[31m",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "\ud800",
]


class Page(HTMLParser):
    """The elements and the text of a page. Fails if an end tag is missing or misplaced."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def tags(self) -> set[str]:
        return {name for name, _ in self.elements}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_a_value_is_escaped_once_and_on_one_line():
    (head, *cells) = Page(table([], [['<a href="x">&\'', markup("<b>&lt;</b>"), "1.5 %", "a\nb\u202ec\ud800"]])).words
    assert (head, *cells) == ('<a href="x">&\'', "<", "1.5 %", "a\\nb\\u202ec\\ud800")
    assert markup("<b>{}</b>").format("<") == "<b>&lt;</b>"
    assert Page(table([], [["{{ 7 * 7 }}{% raw %}"]])).words == ["{{ 7 * 7 }}{% raw %}"]


def test_a_table_has_headings_and_aligns_numbers():
    page = Page(table(["name", "<n>"], [["<a>", 1], ["b", markup("<b>2</b>")]], "cap<tion", numbers=[1]))
    assert page.text == "cap<tion name <n> <a> 1 b 2"
    heads = [attributes for name, attributes in page.elements if name == "th"]
    assert [attributes["scope"] for attributes in heads] == ["col", "col", "row", "row"]
    sides = [attributes["style"].partition(";")[0] for name, attributes in page.elements if name in ("th", "td")]
    assert sides == [f"text-align:{side}" for side in ("left", "right") * 3]
    assert "thead" not in Page(table([], [["a", 1]])).tags


@given(st.text(), st.text())
def test_any_text_is_escaped(one, other):
    page = Page(table([one], [[other, one]], other))
    assert page.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert "\n" not in table([one], [[other]])


# --------------------------------------------------------------------------------------------------------- notebooks


@pytest.fixture
def cache():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(12, 8)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    names = [*HOSTILE[:2], "plain"]
    sources = [f"{HOSTILE[i % 5]}{i}" for i in range(12)]
    return Index.from_features(
        keys, [0, 1, 2] * 4, names, settings=Settings(alpha=2.0, beta=5.5), device="cpu", sources=sources
    )


def check_markup(shown: str) -> Page:
    page = Page(shown)
    assert page.tags <= {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "b", "small"}
    assert all(set(attributes) <= {"style", "scope"} for _, attributes in page.elements)
    assert "color" not in shown
    assert "\u202e" not in shown
    return page


def test_a_classifier_shows_its_keys_classes_and_settings(cache, tmp_path):
    page = check_markup(cache._repr_html_())
    for expected in ("Index", "12 of 8 values, float32", "3: <script>alert(1)</script> 4, ", "plain 4", "alpha 2",
                     "beta 5.5", "k all", "not from a folder", "unnamed", "none: only the cache is used"):  # fmt: skip
        assert expected in page.text
    cache.save(tmp_path / "in<dex")
    page = check_markup(Index.load(tmp_path / "in<dex", device="cpu")._repr_html_())
    assert f"{tmp_path / 'in<dex'}, version 1" in page.text


def test_only_the_first_of_many_classes_are_shown():
    names = [f"c{i}" for i in range(30)]
    cache = Index.from_features(np.eye(30, dtype=np.float32), names, names, np.eye(30), device="cpu")
    shown = check_markup(cache._repr_html_()).text
    assert "30: c0 1, c1 1," in shown
    assert "and 22 more" in shown
    assert "c8" not in shown


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
    rows = [name for name, _ in page.elements].count("tr") - 1
    assert rows == SHOWN_PREDICTIONS < len(found)
    assert f"{len(found)} predictions; the first {SHOWN_PREDICTIONS}" in page.text
    assert found[3].neighbours[0].label in page.text
    assert check_markup(Predictions()._repr_html_()).text.startswith("0 predictions")
    bare = check_markup(cache.classify(features[:1], neighbours=0)._repr_html_())
    assert "1 prediction" in bare.text
