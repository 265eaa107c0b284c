"""The notebooks run from top to bottom on the demo's photos and reach their results: ``make soak``."""

import json

import demo
import pytest
from conftest import ROOT

NOTEBOOKS = ROOT / "docs/notebooks"

REACHED = {
    # what each comes to, by the names that it leaves
    "first-index": lambda names: (
        names["found"].n == 80
        and names["found"].top1 > 0.75
        and names["answer"].label == "bird"
        and names["learned"].label == "fruit"
        and len(names["clf"]) == 44
    ),
    "features-from-elsewhere": lambda names: (
        names["same"] and 0.2 < names["by_colour"] == names["by_table"] < 0.6
    ),
    "label-less": lambda names: (
        [n for n, _ in names["curve"]] == [10, 20, 30, 40]
        and len(set(names["first"].inputs)) == 10
        and names["curve"][-1][1] > 0.75
        and len(names["clf"]) == 40
    ),
    "wrong-labels": lambda names: (
        len(names["found"]) >= 10
        and len(names["suspects"]) <= 25
        and len(names["moves"]) == len(names["found"])
    ),
    "unknown-classes": lambda names: (
        len(names["marked"]) > 15
        and names["unknown"] < set(names["clf"].classes)
        and 2 * names["right"] > len(names["rest"])
    ),
    "compare-encoders": lambda names: (
        names["compared"].n == 80
        and min(own.top1 for own in names["compared"].evaluations) > 0.75
        and [one.name for one in names["tried"].trials][:2] == names["names"]
        and len(names["tried"].trials) == 3  # with both encoders together
    ),
}


def code_of(name):
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def test_notebooks_are_listed_and_contain_no_outputs():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(REACHED)
    for name in REACHED:
        book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
        ids = [cell["id"] for cell in book["cells"]]
        assert len(set(ids)) == len(ids)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book["cells"])


@pytest.mark.soak
@pytest.mark.parametrize("name", REACHED)
def test_a_notebook_runs(name, demo_clone, monkeypatch):
    monkeypatch.chdir(demo_clone)
    monkeypatch.syspath_prepend(NOTEBOOKS)
    names = {"__name__": "notebook"}
    try:
        for cell in code_of(name):
            exec(compile(cell, name, "exec"), names)
    except demo.CannotBeHadError as error:
        pytest.skip(f"SKIPPED: {error}")
    assert REACHED[name](names)
