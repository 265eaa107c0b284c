"""Files named in the Dockerfile exist, checked without building a container."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import click
from conftest import ROOT

from retrieval_tip import cli

STEPS = re.findall(
    r"^([A-Z]+) (.*)$",
    (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " "),
    re.MULTILINE,
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lines_of(kind):
    return [text for step, text in STEPS if step == kind]


def test_copied_files_exist_and_are_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = {
        name
        for text in lines_of("COPY")
        if not text.startswith("--from")
        for name in text.split()[:-1]
    }
    assert {"pyproject.toml", "retrieval_tip"} <= copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name
    needed = {
        "README.md",
        *PROJECT["license-files"],
    }  # the package cannot be built without these
    assert all(any(Path(name).is_relative_to(part) for part in copied) for name in needed)


def test_the_installed_packages_are_those_of_the_project():
    assert any("RETRIEVAL_TIP_FAISS=cpu pip install" in run for run in lines_of("RUN"))
    for image in lines_of("FROM"):
        python = re.match(r"python:(3\.\d+)", image)[1]
        assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_the_container_starts_an_existing_command_without_privileges():
    (entry,), (typed,) = lines_of("ENTRYPOINT"), lines_of("CMD")
    assert json.loads(entry) == list(PROJECT["scripts"])
    name, *rest = json.loads(typed)
    command = cli.main.commands[name]
    ctx = command.make_context(name, rest, parent=click.Context(cli.main, obj=True))
    assert ctx.params["port"] == int(lines_of("EXPOSE")[0])
    assert lines_of("USER") == ["tip"]
