"""The list of guarantees (``tests/README.md``) names every test file once."""

import re

from conftest import ROOT

TESTS = ROOT / "tests"


def test_the_list_names_every_file_once():
    text = (TESTS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- `(test_\w+\.py)`: \S", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in TESTS.glob("test_*.py"))
