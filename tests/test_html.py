"""Tables in notebooks: headings and escaped values."""

from html_tree import Tree
from hypothesis import given
from hypothesis import strategies as st

from retrieval_tip.html import markup, table


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
