"""The table of guarantees (``tests/README.md``) names existing tests and every test file."""

import re

from conftest import ROOT

TESTS = ROOT / "tests"


def test_the_table_lists_existing_tests_and_every_file():
    lines = (TESTS / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")
    ]
    named = [(file, test) for _, file, test, _ in cells if file.startswith("test_")]
    assert {file for file, _ in named} == {path.name for path in TESTS.glob("test_*.py")}
    for file, test in named:
        there = re.findall(
            r"^(?:async )?def (test_\w+)\(",
            (TESTS / file).read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        assert test in there or not test, f"{file}: {test}"
