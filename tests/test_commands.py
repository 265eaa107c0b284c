"""Every command that the program prints can be copied into the shell, and runs there."""

import ast
import csv
import functools
import html
import re
import shlex
import shutil
import signal
import subprocess
import sys

import click
import pytest
from conftest import COMMANDS, ROOT
from serving import caltech_photos
from tables import tiny

from retrieval_tip.cli import main
from retrieval_tip.cli.group import PluginGroup
from retrieval_tip.wording import command_line

COMMAND = re.compile(r"retrieval-tip(?: (?:'[^']*'|\"[^\"]*\"|[^\s'\"();,])+)+")
"""A command in a message. It ends before a bracket, a comma, a semicolon or the end of the line."""
PROSE = {"retrieval-tip never runs", "retrieval-tip index"}
"""Words in messages that look like a command."""
DYNAMIC = {
    "report/report.py",
    "server/edits.py",
    "cli/evaluate.py",
    "cli/group.py",
    "errors.py",
    "cli/classify.py",
    "server/access.py",
    "store/versions.py",
    "index/added_photos.py",
}
"""Files that put commands together from words, which tests of reports, of the page and of the help run, or that name
the program with its version or its realm."""


def printed(text):
    """Return the commands in a text."""
    return [found for found in COMMAND.findall(text) if found not in PROSE]


def rendered(node):
    """Return the text of a message, with VALUE for each value that is not known before it is printed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            rendered(part.value if isinstance(part, ast.FormattedValue) else part)
            for part in node.values
        )
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "command_line":
        return command_line(*map(rendered, node.args))
    return "VALUE"


def in_source():
    """Yield the path of each file and each command in its messages."""
    for path in sorted((ROOT / "retrieval_tip").rglob("*.py")):
        name = str(path.relative_to(ROOT / "retrieval_tip"))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inner = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if id(node) in docs | inner or not isinstance(
                node, ast.Constant | ast.JoinedStr | ast.Call
            ):
                continue
            for found in printed(rendered(node)):
                if name not in DYNAMIC or not found.startswith("retrieval-tip VALUE"):
                    yield name, found


@functools.cache
def with_plugins():
    """Return all commands by their words, with those of plugins, which are imported on first use."""
    plugins = [group for group in main.commands.values() if isinstance(group, PluginGroup)]
    for group in plugins:
        group.list_commands(click.Context(group))
    return COMMANDS | {
        (group.name, name): command for group in plugins for name, command in group.commands.items()
    }


def words_of(command):
    """Return the words that name a command, and its arguments."""
    words = shlex.split(command)[1:]
    name = next(known for known in with_plugins() if tuple(words[: len(known)]) == known)
    return name, words[len(name) :]


def test_every_command_in_a_message_is_complete():
    """An argument that the program cannot know is a word in capitals. The command accepts all others."""
    found = list(in_source())
    assert len({name for name, _ in found}) > 12
    for name, command in found:
        words, arguments = words_of(command)
        values = ["1" if re.fullmatch("[A-Z]+", one) else one for one in arguments]
        try:
            with_plugins()[words].make_context(" ".join(words), values)
        except click.UsageError as error:
            raise AssertionError(f"{name}: {command}: {error.format_message()}") from None


PLACE = "it's $HOME (here)"
"""A folder whose name has to be quoted."""
PHOTOS = {"crab": 6, "okapi": 6, "pizza": 6}


@pytest.fixture
def shell(shared, tmp_path, warm_path, monkeypatch):
    """A function that runs a command in a folder with photos, and returns the commands that it has printed."""
    monkeypatch.setenv("PATH", warm_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / PLACE).mkdir()
    photos = [path for path, _ in caltech_photos(shared, "train", len(PHOTOS), 12)]
    for name, number in PHOTOS.items():
        files = photos[:12]
        photos = photos[12:]
        for at, file in enumerate(files):
            place = tmp_path / PLACE / ("my photos" if at < number else "more") / name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place / f"image_{at + 1:04}.jpg")
    ran = []

    def run(command, status=0, **placeholders):
        for name, value in placeholders.items():
            command = re.sub(rf"\b{name}\b", shlex.quote(value), command)
        ran.append(command)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path / PLACE, capture_output=True, text=True
        )
        assert done.returncode == status, (command, done.stderr)
        return printed(done.stdout + done.stderr)

    run.place = tmp_path / PLACE
    run.ran = ran
    return run


def only(found, start):
    """Return the one command that starts like this."""
    [command] = [one for one in found if one.startswith(f"retrieval-tip {start}")]
    return command


INDEX = "'indexes/my things'"


def test_the_commands_of_builds_and_changes_run_as_printed(shell, shared):
    model = shlex.quote(f"local-dir:{shared / 'models/lit-mini'}")
    build = f"retrieval-tip index build 'my photos' --out {INDEX} --model {model}"
    [opens] = shell(build)
    if (
        "models --try" in opens
    ):  # the encoder that a stranger has is weak, so the build advises another one
        shell(opens)
        opens = f"retrieval-tip serve {INDEX}"
    with subprocess.Popen(
        ["bash", "-c", f"exec {opens}"], cwd=shell.place, stderr=subprocess.PIPE, text=True
    ) as served:
        assert "Serving my things (18 shots)" in next(
            line for line in served.stderr if "Serving" in line
        )
        served.send_signal(signal.SIGINT)
    assert served.returncode == 0
    shell(only(shell(build), "index rollback"))
    sort = only(
        shell(
            f"retrieval-tip index relabel {INDEX} pizza --where \"source LIKE '%crab/image_0001%'\""
        ),
        "sort",
    )
    place = shlex.quote(f"{shell.place}/indexes/my things")
    assert (
        sort == f"retrieval-tip sort {place} {shlex.quote(f'{shell.place}/my photos')} --into fixed"
    )
    shell(sort)
    assert (shell.place / "fixed/pizza/image_0001.jpg").exists()
    with (shell.place / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("key_id", "label", "suggested"), (17, "pizza", "okapi")])
    sort = only(shell(f"retrieval-tip index audit {INDEX} --apply list.csv"), "sort")
    shell(sort, FOLDER="fixed again")  # the folder of the first command exists
    assert (shell.place / "fixed again/okapi").is_dir()
    (shell.place / "more/crab").rename(shell.place / "more/Crab")
    merge = only(shell(f"retrieval-tip index add {INDEX} more"), "index rename")
    shell(merge)
    shell(f"retrieval-tip index set {INDEX} --alpha 2")
    files = [*(shell.place / "more").rglob("*.jpg")]
    for number in range(2):
        for file in files:
            shutil.copy(file, file.with_name(f"{number} {file.name}"))
            with file.with_name(f"{number} {file.name}").open("ab") as copy:
                copy.write(bytes([number]))
    fit = only(shell(f"retrieval-tip index add {INDEX} more"), "fit")
    shell(fit)


def test_the_folders_of_the_photos_are_named(shell, shared):
    model = shlex.quote(f"local-dir:{shared / 'models/lit-mini'}")
    (shell.place / "flat").mkdir()
    for name in PHOTOS:
        for i, file in enumerate(sorted((shell.place / "my photos" / name).iterdir())[:2]):
            shutil.copy(file, shell.place / "flat" / f"{name}{i}.jpg")
    every = sorted(shell.place.glob("*/*/*.jpg"))
    tables = {
        ("flat",): [(f"flat/{name}{i}.jpg", name) for name in PHOTOS for i in range(2)],
        tuple(sorted({str(file.parent.relative_to(shell.place)) for file in every})): [
            (str(file.relative_to(shell.place)), file.parent.name) for file in every
        ],
    }
    for expected, rows in tables.items():
        with (shell.place / "table.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *rows])
        shell(f"retrieval-tip index build table.csv --out {INDEX} --model {model}")
        found = shell(f"retrieval-tip index relabel {INDEX} pizza --where \"label = 'crab'\"")
        paths = [
            f"{shell.place}/indexes/my things",
            *(f"{shell.place}/{folder}" for folder in expected),
        ]
        assert only(found, "sort") == f"retrieval-tip sort {shlex.join(paths)} --into fixed"


def test_the_commands_after_a_poor_build_run_as_printed(shell, shared):
    """The photos have wrong labels, so the build advises what to do."""
    for number, file in enumerate(sorted(shell.place.glob("my photos/*/*.jpg"))):
        file.rename(shell.place / "my photos" / [*PHOTOS][number % 3] / f"{number}.jpg")
    model = shlex.quote(f"local-dir:{shared / 'models/lit-mini'}")
    build = f"retrieval-tip index build 'my photos' --out {INDEX} --model"
    trial = only(shell(f"{build} {model}"), "models --try 'my photos'")
    shell(trial)
    other = shlex.quote(f"local-dir:{tiny(shell.place / 'tiny')}")
    [_, add, audit] = shell(f"{build} {model}+{other}")
    assert add == f"retrieval-tip index add {INDEX} FOLDER"
    shell(add, FOLDER="more")
    assert audit == f"retrieval-tip index audit {INDEX}"
    shell(audit)
    report = f"retrieval-tip evaluate {INDEX} more --report report.html"
    shell(report)
    text = html.unescape((shell.place / "report.html").read_text())
    found = re.findall(r"<code>(retrieval-tip.*?)</code>", text)
    assert found
    for command in found:
        shell(command, FOLDER="more", SOURCE="more")


def test_the_commands_in_errors_run_as_printed(shell, shared):
    model = shlex.quote(f"local-dir:{shared / 'models/lit-mini'}")
    [build] = shell("retrieval-tip classify gone 'my photos'", 1)
    shell(f"{build} --model {model}", SOURCE="my photos", INDEX="gone")
    shell(
        only(shell("retrieval-tip classify gone more --alpha 2 --coverage 0.9", 2), "fit"),
        INDEX="gone",
    )
    shell(only(shell("retrieval-tip search-hp gone", 2), "fit"), INDEX="gone")
    shell(
        only(shell("retrieval-tip encode more --out x.parquet --model nosuch", 2), "models"),
        WORD="clip",
    )
    shell(only(shell("retrieval-tip models"), "models"), WORD="clip")
    # The installed package knows whether make demo has brought an encoder. It may not be the one under test.
    demo = "from retrieval_tip.backbones.catalogue import DEMO; print(any(file.is_file() for file in DEMO))"
    brought = subprocess.run(
        [sys.executable, "-P", "-c", demo], cwd=shell.place, capture_output=True, text=True
    )
    shell(
        only(
            shell("retrieval-tip doctor", {"True": 0, "False": 1}[brought.stdout.strip()]), "cache"
        ),
        GB="1",
    )
    store = shlex.quote(f"lance://{shell.place}/store/own")
    shell(f"retrieval-tip index clone gone {store}")
    shell(only(shell(f"retrieval-tip finetune {store} --out x", 2), "index clone"), DIR="copy")


@pytest.mark.soak
def test_the_command_that_stores_an_encoder_runs_as_printed(shell, shared):
    model = shlex.quote(f"local-dir:{shared / 'models/lit-mini'}")
    int8 = only(
        shell(f"retrieval-tip encode more --out x.parquet --model {model} --precision int8", 1),
        "models --int8",
    )
    shell(int8, PHOTOS=".")  # it needs 32 photos
