"""The list of what is guaranteed (``tests/README.md``) names tests that are there, and every file of them."""

from __future__ import annotations

import re

from conftest import ROOT

TESTS = ROOT / "tests"


def test_what_is_named_is_there_and_no_file_is_left_out() -> None:
    lines = (TESTS / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    named = [(file, test) for _, file, test, _ in cells if file.startswith("test_")]
    assert {file for file, _ in named} == {path.name for path in TESTS.glob("test_*.py")}
    for file, test in named:
        there = re.findall(r"^(?:async )?def (test_\w+)\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert test in there or not test, f"{file}: {test}"
