"""The README stays true: its commands run here, and print what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAMS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLASSES = ("butterfly", "camera", "dalmatian", "panda", "pizza")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder that the README's examples are run in: photographs, a model, and features from elsewhere."""
    from conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    folder = tmp_path_factory.mktemp("readme")
    caltech = SHARED / "data/caltech101"
    split = json.loads((caltech / "split_zhou_Caltech101.json").read_text())
    for part, target in (("train", "photos"), ("test", "new")):
        for file, _, name in split[part]:
            if name in CLASSES:
                to = folder / target / name / Path(file).name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(caltech / "101_ObjectCategories" / file, to)
    (folder / "models").mkdir()
    (folder / "models/lit-mini").symlink_to(SHARED / "models/lit-mini")
    (folder / "caltech101").symlink_to(caltech)
    for name in ("train", "test", "text"):
        shutil.copy(SHARED / f"data/clip-food9/{name}.parquet", folder / f"food-{name}.parquet")
    return folder


def blocks(language):
    """Fenced blocks of a language, but those that a comment before them says are not run."""
    pattern = rf"(<!-- not run[^\n]*-->\n)?```{language}\n(.*?)```"
    return [body for skipped, body in re.findall(pattern, README, re.DOTALL) if not skipped]


def session(text):
    """Commands and what the README says they print."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = re.sub(r"\\\n\s*", " ", part).partition("\n")
        yield command, output.strip()


def same(said, printed):
    """Whether the words agree: numbers within 1 % (processors round differently), ``...`` for any one word."""
    expected, words = re.findall(r"[^\s,]+", said), re.findall(r"[^\s,]+", printed)
    return len(expected) == len(words) and all(map(same_word, expected, words))


def same_word(said, printed):
    number = re.compile(r"-?\d+\.\d+(e[-+]\d+)?")
    if number.fullmatch(said) and re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", printed):
        tolerance = 0.05 * abs(float(said)) if "e" in said else 0.01 * max(1, abs(float(said)))
        return abs(float(printed) - float(said)) <= tolerance
    return said in ("...", printed)


@pytest.mark.timeout(900)  # a session of forty commands
def test_console_examples_print_what_the_readme_says(place, warm_path):
    checked = 0
    for number, block in enumerate(blocks("console")):
        for command, said in session(block):
            installed = number == 0 or "serve" in command  # the others need not show that the program starts
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=place,
                env=os.environ | {"PATH": PROGRAMS if installed else warm_path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            assert same(said, done.stdout), f"$ {command}\n{done.stdout}\n--- the README says\n{said}"
            checked += 1
    assert checked >= 8


def test_python_examples_run(place, monkeypatch, capsys):
    # after the console examples, whose indexes they open
    monkeypatch.chdir(place)
    examples = blocks("python")
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
        said = re.findall(r"^# -> (.*)$", example, re.MULTILINE)
        assert same(" ".join(said), capsys.readouterr().out), example


def test_comparison_of_outputs_can_fail():
    assert same("a,0.500 ... z", "a,0.501 b z")
    assert not same("a 0.500 z", "a 0.601 z")
    assert not same("a b", "a b c")
    assert same("5.5e-06 1.855e+05", "5.6e-06 1.85e+05")
    assert not same("5.5e-06", "6.6e-06")
    assert not same("a ... z", "a b c z")


def test_make_targets_are_those_that_the_readme_names():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"make ([a-z]+)", shown))
    assert {"setup", "demo", "check", "test", "bench", "help"} <= targets
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets
    assert "make test" in (ROOT / ".ci/run").read_text()
