"""Other packages: they work wherever our own parts do, fail in one line, and are named when they are gone."""

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command_line, failed, json_rows, ok
from serving import random_index
from tables import unit_rows, write_table

PACKAGE = Path(__file__).parent / "plugin"


def on_path(folder, patch):
    """Install the packages of a folder for this process and for those that it starts."""
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def plugin(monkeypatch):
    """The package of ``tests/plugin``, installed. ``undo`` removes it."""
    with pytest.MonkeyPatch.context() as patch:
        on_path(PACKAGE, patch)
        yield patch


def test_the_package_in_the_docs_is_the_one_that_is_tested():
    page = (ROOT / "docs/plugins.md").read_text()
    assert f"```python\n{(PACKAGE / 'tip_plugin.py').read_text()}```" in page
    assert len(page.splitlines()) <= 120


# Formats


@pytest.fixture
def asked(tmp_path):
    """An index and two rows to classify with it."""
    rows = write_table(tmp_path / "rows.parquet", unit_rows(2, 16, 2), ["class 0", "class 1"])
    return random_index(tmp_path / "index", 6, 16, 2), rows


def test_a_format_of_another_package_writes_answers_and_shows_its_options(plugin, asked, tmp_path):
    out = tmp_path / "answers.txt"
    ok("classify", *asked, "--format", "lines", "--between", " is ", "--out", out)
    answers = json_rows(ok("classify", *asked, "--format", "json"))
    expected = [f"{answer['input']} is {answer['label']}" for answer in answers]
    assert out.read_text().splitlines() == expected
    assert "--between TEXT" in ok("classify --format lines --help").stdout
    assert "--between" not in ok("classify --help").stdout
    refused = command_line("classify", *asked, "--format", "lines", "--between", "a\nb")
    failed(refused, 2, "--between: contains a new line")
    assert "tip-plugin 0.1, writers" in command_line("doctor").output
    plugin.undo()
    failed(
        command_line("classify", *asked, "--format", "lines"), 2, "'lines' is not one of 'table'"
    )


def test_a_format_that_cannot_be_used_is_one_line_and_harms_no_other_command(
    asked, monkeypatch, tmp_path
):
    for name, code, expected in (
        ("broken", "import no_such_module", "writer lines (of broken 0.1): cannot be imported (No"),
        (
            "taking",
            PACKAGE.joinpath("tip_plugin.py").read_text().replace("between", "top"),
            "its option --top has another meaning here",
        ),
    ):
        with monkeypatch.context() as patch:
            info = tmp_path / name / f"{name}-0.1.dist-info"
            info.mkdir(parents=True)
            (tmp_path / name / f"{name}.py").write_text(code)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
            (info / "entry_points.txt").write_text(
                f"[retrieval_tip.writers]\nlines = {name}:Lines\n"
            )
            on_path(tmp_path / name, patch)
            failed(command_line("classify", *asked, "--format", "lines"), 2, expected)
            ok("classify", *asked)
            ok("--help")
            if name == "broken":
                assert expected in command_line("doctor").output
            sys.modules.pop(name, None)


def test_two_packages_with_the_same_format_are_named(asked, plugin, tmp_path):
    twin = tmp_path / "twin-0.2.dist-info"
    twin.mkdir()
    (twin / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 0.2\n")
    (twin / "entry_points.txt").write_text("[retrieval_tip.writers]\nlines = tip_plugin:Lines\n")
    on_path(tmp_path, plugin)
    failed(
        command_line("classify", *asked, "--format", "lines"),
        2,
        "writer lines: is in",
        "tip-plugin 0.1",
        "twin 0.2",
    )
