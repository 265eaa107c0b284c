"""The commands in README and docs run here on the demo's photos and print the documented output.

``RETRIEVAL_TIP_WRITE_DOCS=1`` writes the output into the pages.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess

import demo
import pytest
from conftest import ROOT, demo_folder, needs_real

WRITES = bool(os.environ.get("RETRIEVAL_TIP_WRITE_DOCS"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?P<skipped><!-- not run[^\n]*-->\n)?(<!-- printed with (?P<options>[^\n]*) -->\n)?"
    r"```(?P<language>console|python)\n(?P<body>.*?)```",
    re.DOTALL,
)


def blocks(page):
    """Return language, body, and options of a page's fenced blocks, except those marked ``not run``.

    A block marked ``printed with OPTIONS`` builds its index with these options, and shows standard error too.
    """
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [
        (match["language"], match["body"], match["options"])
        for match in found
        if not match["skipped"]
    ]


RUN = [page for page in PAGES if blocks(page)]
WITH_LIT_MINI = [
    page for page in RUN if any("../shared" in (options or "") for _, _, options in blocks(page))
]


BUILD = f"retrieval-tip index build photos --model {demo.LITE0}@efficientnet-lite0.pth --out indexes/things"


@pytest.fixture(scope="module")
def things(demo_photos, warm_path, tmp_path_factory):
    """The index that most pages build and all ask, built once, and what that printed."""
    place = demo_folder(tmp_path_factory.mktemp("things") / "clone", demo_photos)
    return place / "indexes/things", typed_and_printed(BUILD, place, warm_path)


def lay_out_index(place, things):
    """Copy the index that the examples use, unless the page has built it."""
    if not (place / "indexes/things").exists():
        shutil.copytree(things[0], place / "indexes/things")


def session(text):
    """Commands and what the page says they print."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        typed = re.match(r"(?:[^\n]*\\\n)*[^\n]*", part)[0]
        yield typed, part[len(typed) :].strip("\n")


def same(said, printed):
    """Whether the words agree: numbers within 1 % (processors round differently), ``...`` for any one word."""
    expected = re.findall(r"[^\s,]+", said)
    words = re.findall(r"[^\s,]+", printed)
    return len(expected) == len(words) and all(map(same_word, expected, words))


def same_word(said, printed):
    number = re.compile(r"-?\d+\.\d+(e[-+]\d+)?")
    if number.fullmatch(said) and re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", printed):
        tolerance = 0.05 * abs(float(said)) if "e" in said else 0.02 * max(1, abs(float(said)))
        return abs(float(printed) - float(said)) <= tolerance
    return said in ("...", printed)


def typed_and_printed(typed, place, path, with_messages=False):
    command = ["bash", "-c", re.sub(r"\\\n\s*", " ", typed)]
    streams = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT if with_messages else subprocess.PIPE,
    }
    done = subprocess.run(
        command, cwd=place, env=os.environ | {"PATH": path}, text=True, check=False, **streams
    )
    assert done.returncode == 0, f"{typed}\n{done.stdout if with_messages else done.stderr}"
    return re.sub(
        r"^Encoded .*\n", "", done.stdout, flags=re.MULTILINE
    )  # only printed on slow machines


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[needs_real] * (page in WITH_LIT_MINI))
        for page in RUN
    ],
)
def test_examples_print_the_documented_output(page, demo_clone, things, warm_path, monkeypatch):
    place = demo_clone
    monkeypatch.chdir(place)
    text = page.read_text(encoding="utf-8")
    for language, body, options in blocks(page):
        if language == "python":
            if 'load("indexes/things")' in body:
                lay_out_index(place, things)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(body, str(page), "exec"), {"__name__": "page"})
            said = re.findall(r"^# -> (.*)$", body, re.MULTILINE)
            assert same(" ".join(said), printed.getvalue()), (
                f"{body}\n--- printed\n{printed.getvalue()}"
            )
            continue
        written = ""
        for typed, said in session(body):
            makes = bool(options) and "index build" in typed
            if "indexes/things" in typed and not makes:
                lay_out_index(place, things)
            asked = f"{typed} {options}" if makes else typed
            printed = (
                things[1]
                if typed == BUILD
                else typed_and_printed(asked, place, warm_path, bool(options))
            )
            written += f"$ {typed}\n{printed}"
            assert WRITES or same(said, printed), f"$ {typed}\n{printed}\n--- the page says\n{said}"
        if written:  # an indented block is not run
            text = text.replace(f"```console\n{body}```", f"```console\n{written}```")
    if WRITES:
        page.write_text(text, encoding="utf-8")


def test_enough_pages_are_run():
    expected = "README choose deploy exchange features index-folder many python server sort"
    expected += " tuning tutorial wrong-labels"
    assert set(expected.split()) <= {page.stem for page in RUN}


SCRIPTS = {  # how each is run on the demo's photos and encoder
    "stamps.sh": "OUT=indexes/things sh {script}",
    "tip-adapter.sh": f"MODEL={demo.LITE0}@efficientnet-lite0.pth SHOTS=4 VIEWS=2 "
    "sh {script} photos --out indexes/things",
}


@pytest.mark.parametrize(
    "script", sorted((ROOT / "indexes").glob("*.sh")), ids=lambda script: script.name
)
def test_scripts_build_the_described_indexes(script, demo_photos, demo_clone, warm_path):
    place = demo_clone
    (place / "build").mkdir()
    (place / "build/demo").symlink_to(demo_photos)
    typed_and_printed(SCRIPTS[script.name].format(script=script), place, warm_path)
    printed = typed_and_printed("retrieval-tip evaluate indexes/things new -v", place, warm_path)
    said = re.search(r"# Expected from .*: (.*)\.\n", script.read_text(encoding="utf-8"))
    for name, value in re.findall(r"(\w+) ([\d.]+)", said[1] if said else ""):
        assert float(re.search(rf"^{name} +(\S+)$", printed, re.MULTILINE)[1]) == pytest.approx(
            float(value), abs=0.02
        )


def test_comparison_of_outputs_can_fail():
    assert same("a,0.500 ... z", "a,0.501 b z")
    assert not same("a 0.500 z", "a 0.601 z")
    assert not same("a b", "a b c")
    assert same("5.5e-06 1.855e+05", "5.6e-06 1.85e+05")
    assert not same("5.5e-06", "6.6e-06")
    assert not same("a ... z", "a b c z")


def test_the_readme_is_one_screen_and_a_half():
    assert len((ROOT / "README.md").read_bytes()) <= 6000


def test_links_are_valid():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_make_targets_match_the_documentation():
    shown = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = set(re.findall(r"make ([a-z]+)", shown))
    assert {"setup", "demo", "check", "test", "bench", "help"} <= targets
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)", page.read_text(encoding="utf-8"))) <= targets, page
    assert "make test" in (ROOT / ".ci/run").read_text()
