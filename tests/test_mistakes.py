"""Each common mistake on the command line prints one line that explains what to do."""

import csv
import io
import json
import logging
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from unittest.mock import Mock

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import COMMANDS, PROGRAMS, ROOT, json_of, json_rows, ok
from PIL import Image
from tables import unit_rows, write_table
from wcwidth import wcswidth

from retrieval_tip import cli, machine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an index of features, features to classify, and photos."""
    place = tmp_path_factory.mktemp("mistakes")
    write_table(place / "train.parquet", unit_rows(6, 8), ["a", "b"] * 3)
    write_table(place / "new.parquet", unit_rows(4, 8, seed=2), ["a", "b"] * 2)
    ok("index build", place / "train.parquet", "--out", place / "i" / "x", "--fit", "none")
    for name in ("cat", "dog"):
        (place / "my photos" / name).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(place / "my photos" / name / "1.png")
    return place


MISTAKES = {
    # command: exit status, and words of the last line that explain what to do
    "clasify {w}/i/x {w}/new.parquet": (2, "Did you mean 'classify'"),
    "build photos": (2, "index build"),
    "train {w}/i/x": (2, "index build or fit or finetune"),
    "test {w}/i/x new": (2, "evaluate"),
    "undo {w}/i/x": (2, "index rollback or sort --undo"),
    "index undo {w}/i/x": (2, "index rollback"),
    "check {w}/i/x": (2, "index audit"),
    "export onnx {w}/i/x": (2, "index export"),
    "report {w}/i/x": (2, "evaluate --report"),
    "calibrate {w}/i/x": (2, "fit --calibrate"),
    "index rebuild {w}/i/x": (2, "index set --index"),
    "duplicates {w}/my*photos": (2, "find --duplicates"),
    "search {w}/my*photos cat": (2, "find"),
    "predict {w}/i/x a.jpg": (2, "classify"),
    "info {w}/i/x": (2, "index info"),
    "add {w}/i/x more": (2, "index add"),
    "ls": (2, "index list"),
    "index ls": (2, "index list"),
    "index delete {w}/i/x": (2, "index remove or index gc"),
    "version": (2, "--version"),
    "help": (2, "--help"),
    "classify {w}/i/x {w}/new.parquet --topk 3": (2, "--top"),
    "classify {w}/i/x {w}/new.parquet --formt csv": (2, "--format"),
    "classify {w}/new.parquet {w}/new.parquet": (2, "index list"),
    "classify {w}/my*photos/cat/1.png": (2, "index list"),
    "classify {w}/my*photos {w}/new.parquet": (1, "index build SOURCE --out INDEX"),
    "classify {w}/gone {w}/new.parquet": (1, "no such folder"),
    "classify {w}/i/x https://x.org/a.jpg": (1, "download it first"),
    "index build https://x.org/a.zip --out {w}/o": (1, "download it first"),
    "classify {w}/i/x {w}/*.jpg": (1, "no file matches"),
    "classify {w}/i/x {w}/my*photos": (2, "--model"),
    "classify {w}/i/x {w}/new.parquet --alpha much": (2, "--alpha"),
    "classify {w}/i/x {w}/new.parquet --device gpu": (2, "expected auto, cpu or cuda"),
    "encode {w}/my*photos --out {w}/out.parquet --model google/siglip-base-patch16-224": (
        2,
        "hf:google/siglip-base",
    ),
    "encode {w}/my*photos --out {w}/out.parquet --model resnet50": (2, "timm:resnet50"),
    "encode {w}/my*photos --out {w}/out.parquet --model hf:{w}/my*photos": (1, "--model hf:FOLDER"),
    "classify {w}/i/x {w}/new.parquet --top 0": (2, "--top"),
    "classify {w}/i/x a.jpg --burst 10 --explain": (2, "leave out --explain"),
    "classify {w}/i/x a.jpg --burst 10 --logits": (2, "leave out --logits"),
    "classify {w}/i/x {w}/new.parquet --out {w}/answers.xlsx": (2, ".xlsx; use .csv"),
    "classify {w}/i/x {w}/new.parquet --out {w}/none/answers.csv": (1, "there is no folder"),
    "index add {w}/i/x {w}/my*photos/cat/1.png": (
        1,
        "expected a folder with one folder of images per class",
    ),
    "index remove {w}/i/x": (2, "where, key_ids"),
    "index remove {w}/i/x --where labl='a'": (2, "over the columns key_id, class_id, label"),
    "index rollback {w}/i/x": (1, "no version before 1"),
    "index export {w}/i/x": (2, "give --out, --text or --onnx FILE"),
    "serve {w}/i/x --port 99999": (2, "0<=x<=65535"),
    "index build": (2, "Missing argument 'SOURCE'"),
    "index build {w}/my*photos/cat --out {w}/o --model RN5O": (1, "perhaps {w}/my photos"),
    "index build {w}/nothing --out {w}/o": (1, "no such file or folder"),
    "index build {w}/train.parquet --out {w}/my*photos": (1, "empty or new folder"),
    "index query {w}/i/x SELECT*n*FROM*keys": (2, "class_counts, labels, versions"),
    "evaluate {w}/i/x": (2, "Missing argument"),
    "fit {w}/i/x --calibrate": (2, "--val"),
    "models nosuchmodel": (2, "no encoder has this in its name"),
    "index list {w}/nowhere": (1, "no such folder"),
    "search-hp lance://x/y --val x.csv": (2, "retrieval-tip index clone lance://x/y DIR"),
    "finetune lance://x/y --out out": (2, "retrieval-tip index clone lance://x/y DIR"),
    "fit lance://x/y --calibrate --val x.csv": (2, "retrieval-tip index clone lance://x/y DIR"),
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_prints_one_line_that_explains_what_to_do(run, world, typed):
    status, words = MISTAKES[typed]
    parts = (
        typed.replace("{w}/*.jpg", f"{world}/%.jpg")
        .replace("{w}", str(world))
        .replace(" ", "\0")
        .replace("*", " ")
    )
    result = run(*parts.replace("%", "*").split("\0"))
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    line = result.stderr.rstrip("\n").split("\n")[-1]
    assert line.startswith("Error: ")
    assert words.replace("{w}", str(world)) in line


def test_the_output_suffix_selects_the_format(run, world, tmp_path):
    classify = ("classify", world / "i/x", world / "new.parquet")
    labels = [
        json.loads(line)["label"] for line in run(*classify, "--format", "json").stdout.splitlines()
    ]
    for name in ("a.csv", "a.json", "a.jsonl", "a.txt", "a.parquet"):
        ok(*classify, "--out", tmp_path / name)
    text = {name: (tmp_path / f"a.{name}").read_text() for name in ("csv", "json", "jsonl", "txt")}
    assert [row["label"] for row in csv.DictReader(io.StringIO(text["csv"]))] == labels
    assert text["json"] == text["jsonl"]
    assert [json.loads(line)["label"] for line in text["json"].splitlines()] == labels
    assert [line.split()[1] for line in text["txt"].splitlines()[1:]] == labels
    assert pq.read_table(tmp_path / "a.parquet")["label"].to_pylist() == labels
    run(*classify, "--out", tmp_path / "b.csv", "--format", "json")
    assert json.loads((tmp_path / "b.csv").read_text().splitlines()[0])["label"] == labels[0]


def test_quiet_and_verbose_work_in_any_position(run, world):
    table = world / "one class.parquet"
    write_table(table, unit_rows(2, 8), ["a", "a"])
    loud = run("index build", table, "--out", world / "o1", "--fit", "none")
    assert "only one class" in loud.stderr
    for typed in (["-q", "index", "build", table], ["index", "build", table, "-q"]):
        assert run(*typed, "--out", world / "o1", "--fit", "none").stderr == ""
    run("index info", world / "i/x", "-v")
    assert logging.getLogger("retrieval_tip").level == logging.INFO
    run("index info", world / "i/x", "-vv")
    assert logging.getLogger("retrieval_tip").level == logging.DEBUG


def test_index_list_shows_version_keys_and_classes(run, world):
    rows = json_rows(run("index list", world / "i", "--format", "json"))
    (row,) = rows
    assert (row["index"], row["version"], row["keys"], row["classes"]) == (
        str(world / "i/x"),
        1,
        6,
        2,
    )


def test_the_cache_command_shows_prunes_and_limits_the_cache(run, tmp_path, monkeypatch):
    from retrieval_tip import EncodingCache

    cache = EncodingCache(tmp_path)
    cache.put("s", {("d", "v"): np.zeros(3, np.float32), ("e", "v"): np.zeros(3, np.float32)})
    cache.close()
    monkeypatch.setenv("RETRIEVAL_TIP_CACHE", str(tmp_path))
    assert json_of("cache")["encodings"] == 2
    pruned = run("cache --prune --json")
    assert json.loads(pruned.stdout)["encodings"] == 0
    assert "Removed 2 encodings" in pruned.stderr
    bounded = run("cache --max-size 0.02 --json")
    assert json.loads(bounded.stdout)["max_bytes"] == 20_000_000
    assert json_of("cache")["max_bytes"] == 20_000_000
    assert "of at most 20 MB" in json_of("doctor")["facts"]["encoding cache"]
    assert run("cache --max-size 20mb").exit_code == 2


def test_every_command_has_help_for_each_option_and_two_valid_examples():
    """An example is valid if its command accepts the options and arguments."""
    for path, found in COMMANDS.items():
        name = " ".join(path)
        assert found.help, name
        assert not found.get_short_help_str(60).endswith("..."), name
        assert all(option.help for option in found.params if isinstance(option, click.Option)), name
        assert len(found.examples) == 2, name
        for example in found.examples:
            words = shlex.split(example.partition(" > ")[0])
            assert words[: len(path)] == list(path)
            ctx = found.make_context(
                found.name, words[len(path) :], parent=click.Context(cli.main, obj=True)
            )
            assert ctx.args == []


def test_wide_characters_align(run, world, tmp_path):
    write_table(tmp_path / "t.parquet", unit_rows(4, 8), ["猫", "dog"] * 2)
    ok("index build", tmp_path / "t.parquet", "--out", tmp_path / "i", "--fit", "none")
    lines = run(
        "index query", tmp_path / "i", "SELECT label, keys FROM class_counts"
    ).stdout.splitlines()
    assert len({wcswidth(line) for line in lines}) == 1


def test_colour_is_used_only_in_terminals_without_no_color(world, capsys, monkeypatch):
    write_table(world / "one.parquet", unit_rows(2, 8), ["a", "a"])
    command = [
        "index",
        "build",
        str(world / "one.parquet"),
        "--out",
        str(world / "o2"),
        "--fit",
        "none",
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for variable, warning in (("NO_COLOR", "warning: "), ("OTHER", "\x1b[33mwarning\x1b[0m: ")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            cli.main(command, standalone_mode=False)
        shown = capsys.readouterr().err
        assert warning in shown
        assert ("\x1b[" in shown) == (variable != "NO_COLOR")


@pytest.mark.parametrize("active", [True, False])
def test_install_commands_work_where_this_package_is_installed(active, monkeypatch):
    monkeypatch.setenv("PATH", PROGRAMS if active else "/usr/bin:/bin")
    command = machine.install("heic")
    assert command.startswith("pip install ") == active
    tried = ["bash", "-c", f"{command} --dry-run --no-index"]  # everything is installed here
    done = subprocess.run(tried, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_install_commands_suit_uv_and_clones_on_the_path(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda _: None)  # environments from uv have no pip
    assert re.fullmatch(
        rf"uv pip install 'pillow-heif>=[0-9.]+' --python {sys.executable}", machine.install("heic")
    )
    monkeypatch.setattr("importlib.metadata.requires", Mock(side_effect=PackageNotFoundError))
    assert f"install {shlex.quote(f'{ROOT}[heic]')} " in machine.install("heic")
