"""Test the page in Chromium, with a server started from the command line."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import PATIENCE, Opened, chromium
from cameras import encoded
from conftest import LIT_MINI, NO_SHARED, SHARED, SOAK, needs_real, ok
from PIL import Image
from playwright.sync_api import Error, expect
from serving import build, server
from tables import tiny, write_cnn

pytestmark = [pytest.mark.soak, *([needs_real] if SOAK else [])]

CLASSES = [
    "accordion",
    "butterfly",
    "camera",
    "crab",
    "crayfish",
    "dalmatian",
    "lobster",
    "panda",
    "pizza",
    "starfish",
]
HOSTILE = '<img src=x onerror="document.title=1">'
TOKEN = "a token"
REFUSED = "Failed to load resource: the server responded with a status of "
IMAGES = SHARED / "data" / "caltech101" / "101_ObjectCategories"
MODEL = ("--model", LIT_MINI)
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

if not SHARED.is_dir():
    pytest.skip(NO_SHARED, allow_module_level=True)

expect.set_options(PATIENCE)
SPLIT = json.loads((IMAGES.parent / "split_zhou_Caltech101.json").read_text())


def caltech_photos(part, label, number):
    return [IMAGES / path for path, _, name in SPLIT[part] if name == label][:number]


def class_folders(place, *labels, each):
    """Create a folder of photos for each class."""
    for label in labels:
        (place / label).mkdir(parents=True)
        for path in caltech_photos("train", label, each):
            shutil.copy(path, place / label)
    return place


@pytest.fixture(scope="module")
def served(tmp_path_factory, encodings, warm_path):
    """Serve an index of photos and an index of features.

    The photos are ten classes of eight shots, with one wrong label, and a class whose name is markup.
    """
    place = tmp_path_factory.mktemp("page")
    rows = [
        (path, label)
        for label in CLASSES
        for path in caltech_photos("train", label, 7 if label == "panda" else 8)
    ]
    rows.append(
        (caltech_photos("test", "pizza", 9)[-1], "panda")
    )  # a wrong label that the page should find
    for number, path in enumerate(caltech_photos("train", "anchor", 2)):
        link = place / f"{number}{HOSTILE}.jpg"
        link.symlink_to(path)
        rows.append((link, HOSTILE))
    folder = place / "things"
    food = place / "food <b>1"
    features = SHARED / "data" / "clip-food9"
    build(SHARED, folder, rows)
    options = ("--text", features / "text.parquet", "--shots", 4, "--out", food)
    ok("index build", features / "train.parquet", *options)
    options = ("--uploads", place / "uploads", "--device", "cpu")
    with server(folder, food, *options, token=TOKEN, path=warm_path) as (address, _):
        yield SimpleNamespace(folder=folder, address=address)


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def serving(browser, warm_path):
    """Return a context manager that starts a server, and yields its page, which may change indexes, and the process."""

    @contextlib.contextmanager
    def start(*arguments, command="serve", printed=None, **options):
        started = server(
            *arguments,
            "--device",
            "cpu",
            token=TOKEN,
            path=warm_path,
            command=command,
            printed=printed,
        )
        with started as (url, process):
            address, _, token = url.partition("/#")
            one = Opened(browser, address, f"/#{token or f'token={TOKEN}'}", **options)
            try:
                yield one.page, process
            finally:
                one.close()

    return start


@pytest.fixture
def labelling(serving):
    """Return a context manager that starts a labelling session of photos, as ``serving`` does."""

    def start(photos, into, *arguments, **options):
        given = (photos[""], "--out", into, *MODEL, *arguments)
        return serving(*given, command="label", ready="#label-progress", **options)

    return start


@pytest.fixture
def opened(browser, served):
    """Return a function that opens pages, by default with the token. They are closed after the test."""
    pages = []

    def start(at=f"/#token={TOKEN}", **options):
        pages.append(Opened(browser, served.address, at, **options))
        return pages[-1].page

    yield start
    for one in pages:
        one.close()


@pytest.fixture
def page(opened):
    """Return a page that may change indexes."""
    return opened()


def choose_photos(page, *images, names=None):
    """Choose files on the screen of photos, under their own or other names."""
    named = zip(names or [image.name for image in images], images, strict=True)
    files = [
        {"name": name, "mimeType": "image/jpeg", "buffer": image.read_bytes()}
        for name, image in named
    ]
    page.set_input_files("#files", files)


def drop(page, *files, at=(600, 400)):
    """Drop folders or files on the page as the browser itself does."""
    drag_files(page, *files, at=at, kinds=("dragEnter", "dragOver", "drop"))


def drag_files(page, *files, at, kinds=("dragEnter", "dragOver")):
    """Drag folders or files over the page as the browser itself does."""
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
    for kind in kinds:
        session.send(
            "Input.dispatchDragEvent", {"type": kind, "x": at[0], "y": at[1], "data": data}
        )
    session.detach()


def violations(page):
    """Return the accessibility violations that axe finds on the page."""
    axe = pytest.importorskip(
        "axe_playwright_python", reason="SKIPPED: no axe; pip install -e '.[dev]'"
    )
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    found = page.evaluate("async () => (await axe.run()).violations")
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


def refuse(route, status, detail, **headers):
    """Answer a request with a problem."""
    problem = {"type": "about:blank", "title": "Refused", "status": status, "detail": detail}
    route.fulfill(status=status, headers=headers, json=problem)


def hold(page, pattern):
    """Return the list of the requests that the page sends from now on. They wait until they are continued."""
    held = []
    page.route(pattern, lambda route: held.append(route))
    return held


def wait_for(page, held, number):
    """Wait for the given number of held requests, and return the last one."""
    while len(held) < number:
        page.wait_for_timeout(50)
    return held[number - 1]


def tab_to(page, wanted):
    """Press Tab until ``wanted`` has the focus."""
    for _ in range(60):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"{wanted} is not reached")


def get(page, path):
    """Return an answer of the server."""
    return page.request.get(f"{page.evaluate('location.origin')}{path}").json()


def submit(page, field, text):
    """Fill in a field, and press Enter."""
    page.fill(field, text)
    page.keyboard.press("Enter")


def classified(page, number=1):
    """Wait until the page shows ``number`` photos and has classified all of them."""
    expect(page.locator("#grid .tile")).to_have_count(number)
    expect(page.locator("#grid .tile.busy")).to_have_count(0)
    expect(page.locator("#grid .tile[data-label]")).to_have_count(number)


def ask(page, *images, names=None, number=None):
    """Add photos to the page, and wait for ``number`` answers, by default one per photo."""
    choose_photos(page, *images, names=names)
    classified(page, len(images) if number is None else number)


def answer(page):
    """Return the answer that the page shows for the open photo."""
    rows, neighbours = page.locator("#drawer").evaluate(
        """async drawer => {
            const still = () => new Promise(requestAnimationFrame);
            while (drawer.ariaBusy === "true") await still();
            const cells = (row) => [...row.cells].slice(1).map(({ dataset }) => Number(dataset.value));
            const shots = (id) => [...drawer.querySelectorAll(`#${id} li`)].map((item) => ({
                key_id: Number(item.dataset.keyId), affinity: Number(item.dataset.affinity),
                weight: Number(item.dataset.weight), label: item.querySelector(".name").title,
            }));
            const rows = [...drawer.querySelectorAll("#logits tr")].map((row) => [row.dataset.label, ...cells(row)]);
            return [rows, ["decided", "decided-others", "opposed"].flatMap(shots)];
        }"""
    )
    labels, probabilities, text, cache = map(list, zip(*rows, strict=True))
    columns = {
        "labels": labels,
        "probabilities": probabilities,
        "logits": [*map(sum, zip(text, cache, strict=True))],
    }
    first = {
        "label": labels[0],
        "probability": probabilities[0],
        "text_logit": text[0],
        "cache_logit": cache[0],
    }
    return first | columns | {"neighbours": neighbours}


def things(page):
    """Return the description of the index of photos."""
    return dict(get(page, "/v1/indexes/things"))


def change(page, route, **sent):
    """Change the index of photos as another user does."""
    address = f"{page.evaluate('location.origin')}/v1/indexes/things/{route}"
    assert page.request.post(address, headers={"Authorization": f"Bearer {TOKEN}"}, data=sent).ok


def undo(page):
    """Undo a change from its notice."""
    expect(page.locator("#notice")).to_be_in_viewport(ratio=1)
    page.locator("#notice").get_by_role("button", name="Undo").press("Enter")
    expect(page.locator("#notice")).to_contain_text("Undone")


def undone(page, *said, facts="82 photos, 11 classes"):
    """Wait for a notice that contains the texts, undo the change, and wait until the index is as described."""
    for text in said:
        expect(page.locator("#notice")).to_contain_text(text)
    undo(page)
    expect(page.locator("#index-facts")).to_contain_text(facts)


def choose(page, name):
    """Switch to another classifier."""
    page.click("#index-name")
    page.locator("#index-list").get_by_role("button", name=name, exact=True).click()
    expect(page.locator("#index-name")).to_have_text(name)


def release(page, held, **answer):
    """Continue the held requests, or answer them, except those that the page has cancelled."""
    page.unroute_all()
    for route in held:
        with contextlib.suppress(Error):
            route.fulfill(**answer) if answer else route.continue_()


def show_calculation(page):
    """Show the calculation of the open photo."""
    page.get_by_text("How this was calculated").click()


def go(page, screen):
    """Open a screen from the classifier's menu."""
    page.click("#index-name")
    page.click(f"#to-{screen}")
    expect(page.locator(f"#{screen}-view")).to_be_visible()


def download(page, kind):
    """Return the file with all photos or answers, which the dialog for the end offers."""
    if not page.locator("#finish").is_visible():
        page.click("#finish-open")
    with page.expect_download() as waiting:
        page.click(f"#finish-{kind}")
    return waiting.value.path()


def assert_same(page, run, folder, image):
    """Compare the answer for the open photo with the command line's answer for ``image``."""
    told = ok("classify", folder, image, "--top", 8, "--explain", "--logits", "--format", "json")
    right = json.loads(told.stdout)
    right["cache_logit"] += right.get("discriminant_logit", 0)  # the page shows the sum
    shown = answer(page)
    shots = [*right["neighbours"], *([right["opposing"]] if right["opposing"] else [])]
    close = {"rel": 1e-3, "abs": 1e-6}
    assert shown["label"] == right["label"]
    for name in ("probability", "text_logit", "cache_logit"):
        assert shown[name] == pytest.approx(right[name], **close), name
    assert shown["labels"] == right["labels"]
    assert shown["probabilities"] == pytest.approx(right["probabilities"], **close)
    assert shown["logits"] == pytest.approx(
        sorted(right["logits"], reverse=True)[:8], rel=1e-3, abs=1e-3
    )
    for mine, other in zip(shown["neighbours"], shots, strict=True):
        assert (mine["key_id"], mine["label"]) == (other["key_id"], other["label"])
        assert [mine["affinity"], mine["weight"]] == pytest.approx(
            [other["affinity"], other["weight"]], rel=1e-3
        )


def test_answers_agree_with_the_command_line(page, served, run):
    [image] = caltech_photos("test", "crayfish", 1)
    ask(page, image)
    assert answer(page)["label"] == "crayfish"
    assert_same(page, run, served.folder, image)

    page.click("#drawer-close")
    page.click("#clear")
    with page.expect_request(
        "**/v1/classify**without=*"
    ) as example:  # the other examples classify it
        page.locator("#known button").first.click()
    expect(page.locator("#drawer-notes")).to_contain_text("only the other examples count")
    itself = int(re.findall(r"without=(\d+)", example.value.url)[0])
    assert itself not in [shot["key_id"] for shot in answer(page)["neighbours"]]


def test_correcting_an_answer_adds_a_shot_and_can_be_undone(opened, served, run):
    page = opened("", expected=[f"{REFUSED}401"])
    crabs = caltech_photos("test", "crab", 10)
    told = run("classify", served.folder, *crabs, "--format", "json").stdout.splitlines()
    image = next(
        (Path(row["input"]) for row in map(json.loads, told) if row["label"] != "crab"), None
    )
    assert image is not None, "all are right"
    ask(page, image)
    before = answer(page)
    version = things(page)["version"]
    assert before["label"] != "crab"

    page.click("#drawer-wrong")
    submit(page, "#drawer-form input", "crab")
    submit(page, "#token", "not the token €")
    expect(page.locator("#token-refused")).to_contain_text("not the server’s token")
    submit(page, "#token", TOKEN)
    expect(page.locator("#grid .tile.taught .said")).to_have_text("crab")
    expect(page.locator("#drawer-notes")).to_contain_text("one of the examples")
    expect(page.locator("#index-facts")).to_have_attribute("title", f"version {version + 1}")
    classified(page)
    own = get(page, "/v1/indexes/things/keys?label=crab&limit=50")["keys"][-1]["key_id"]
    assert own not in [key["key_id"] for key in answer(page)["neighbours"]]
    undone(page, "Added 1 example photo to crab.")
    expect(page.locator("#drawer-title")).to_have_text(before["label"])
    classified(page)
    assert answer(page)["probability"] == pytest.approx(before["probability"], rel=1e-3)

    submit(page, "#drawer-form input", "sea spider")  # a new class; the page already has the token
    undone(page, "to the new class sea spider.")


def test_answers_are_confirmed_or_corrected_one_by_one_or_together(opened):
    """The printed address allows changes without asking for the token."""
    page = opened(f"/#token={TOKEN.replace(' ', '%20')}")
    assert "token" not in page.url
    ask(page, *caltech_photos("test", "pizza", 3))
    taught, matched = page.locator("#grid .tile.taught"), page.locator("#grid .tile:not(.no_match)")
    matched.first.click()
    label = answer(page)["label"]
    page.press("#drawer", "Enter")
    expect(taught).to_have_count(1)
    expect(page.locator("#drawer-right")).to_be_hidden()  # already confirmed
    undone(page, f"Added 1 example photo to {label}.")
    expect(taught).to_have_count(0)
    classified(page, 3)
    page.press("#drawer", "w")
    expect(page.locator("#drawer-form input")).to_be_focused()
    page.keyboard.press("Escape")
    number = matched.count()
    page.press("#grid", "Control+a")
    page.keyboard.press("Enter")
    expect(taught).to_have_count(number)
    undone(page, f"Added {number} example photo")

    classified(page, 3)
    page.press("#grid", "Home")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#selection-count")).to_have_text("2 selected")
    label = (page.locator("#selection-chips button").nth(1).text_content() or "")[2:]
    page.keyboard.press("2")
    expect(taught).to_have_count(2)
    assert taught.locator(".said").all_text_contents() == [label, label]
    undone(page, f"Added 2 example photos to {label}.")
    classified(page, 3)
    page.locator("#grid .tile .tick").first.click()
    page.click("#selection-away")
    classified(page, 2)


def test_markup_in_names_is_shown_as_text(page):
    [anchor] = caltech_photos(
        "train", "anchor", 1
    )  # one of the two shots whose class name is markup
    ask(page, anchor, names=[f"{HOSTILE}.jpg"])
    assert HOSTILE in answer(page)["labels"]
    expect(page.locator("#drawer-file")).to_have_attribute("title", f"{HOSTILE}.jpg")
    page.click("#drawer-close")
    page.fill("#filter", HOSTILE)
    expect(page.locator("#grid .tile")).to_have_count(1)
    page.click("#tab-classes")
    page.fill("#shots-class", HOSTILE)
    expect(page.locator("#shots .tile")).to_have_count(2)
    expect(page.locator("#shots .said").first).to_have_attribute("title", HOSTILE)
    expect(page.locator("#shots .said").first).to_have_text(f"{HOSTILE[:10]}…{HOSTILE[-9:]}")
    page.locator("#shots .tile").first.click()
    assert (page.locator("img[src=x]").count(), page.title() == "1") == (0, False)


def test_photos_are_classified_and_classes_added_with_the_keyboard_alone(page):
    focused = page.locator(":focus")
    key = page.keyboard.press

    def at(place, pressed):
        tab_to(page, place)
        key(pressed)

    page.on("filechooser", lambda _: None)  # register early: the browser is told asynchronously
    key("Tab")
    expect(focused).to_have_class("skip")
    key("Enter")
    expect(focused).to_have_id("main")
    key("Tab")
    expect(focused).to_have_id("choose")
    assert (
        focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    )  # the focus is visible
    with page.expect_file_chooser() as chooser:
        key("Enter")
    chooser.value.set_files(caltech_photos("test", "panda", 1))
    classified(page)
    expect(page.locator("#live")).to_contain_text("panda")  # announced by screen readers
    page.press("#grid", "Enter")
    expect(focused).to_have_id("drawer")
    page.locator("#drawer summary").last.press("Enter")
    expect(page.locator("#logits")).to_be_visible()
    page.press("#drawer", "Escape")
    expect(page.locator("#drawer")).to_be_hidden()
    expect(focused).to_have_id("grid")
    for screen in ("classes", "check", "map", "history", "classify"):
        at(page.locator(f"#tab-{screen}"), "Enter")
        expect(page.locator(f"#{screen}-view")).to_be_visible()
        expect(page.locator("[aria-current=page]")).to_have_id(f"tab-{screen}")
        assert page.url.endswith(f"#{screen}")
    page.press("#grid", "Delete")
    expect(page.locator("#grid .tile")).to_have_count(0)
    expect(focused).to_have_id("choose")

    at(page.locator("#index-name"), "Enter")
    at(page.locator("#to-teach"), "Enter")
    at(page.locator("#teach-new"), "ArrowDown")
    expect(page.locator("#teach-old")).to_be_checked()
    card = page.locator(".class-card").first
    tab_to(page, card.get_by_placeholder("class name"))
    page.keyboard.type("anchor")
    with page.expect_file_chooser() as chooser:
        at(card.get_by_role("button", name="Choose"), "Enter")
    chooser.value.set_files(caltech_photos("train", "anchor", 3))
    expect(page.locator("#teach-go")).to_have_text("Add 3 photos in 1 class")
    at(page.locator("#teach-go"), "Enter")
    expect(page.locator("#teach-ask")).to_be_focused()
    expect(page.locator("#index-facts")).to_contain_text("12 classes")
    at(page.locator("#notice").get_by_role("button", name="Undo"), "Enter")
    expect(page.locator("#index-facts")).to_contain_text("82 photos, 11 classes")


def test_many_images_are_classified_sorted_and_downloaded(page):
    page.evaluate(
        """() => {
            const [make, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
            window.urls = 0;
            URL.createObjectURL = (file) => (window.urls++, make(file));
            URL.revokeObjectURL = (url) => (window.urls--, revoke(url));
        }"""
    )
    images = [path for label in CLASSES for path in caltech_photos("test", label, 2)]
    names = [
        "a/../..jpg",
        "same.jpg",
        "same.jpg",
        "größe.jpg",
        *(f"{number}.jpg" for number in range(16)),
    ]
    ask(page, *images, names=names)
    page.select_option("#sort", "new")
    right = page.locator("#grid .tile").evaluate_all(
        "tiles => tiles.map((tile) => tile.dataset.label)"
    )
    assert (
        sum(a == b for a, b in zip(right, np.repeat(CLASSES, 2), strict=True)) >= 16
    )  # in order of arrival
    page.select_option("#sort", "doubt")
    doubts = page.locator("#grid .tile:not(.no_match)").evaluate_all(
        "tiles => tiles.map((tile) => +tile.dataset.probability)"
    )
    assert doubts == sorted(doubts)
    page.select_option("#sort", "class")
    answers = page.locator("#grid .tile:not(.no_match) .said").all_inner_texts()
    assert answers == sorted(answers)
    page.fill("#filter", "panda")
    expect(page.locator("#grid .tile")).to_have_count(2)
    page.fill("#filter", "")
    expect(page.locator("#grid .tile")).to_have_count(20)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("() => window.urls") == 0  # every object URL was revoked
    page.fill("#filter", "panda")
    rows = list(csv.DictReader(download(page, "csv").read_text().splitlines()))
    assert sorted(row["input"] for row in rows) == sorted(names)
    packed = zipfile.ZipFile(download(page, "zip"))
    assert packed.testzip() is None
    paths = [Path(name) for name in packed.namelist()]
    assert len({*paths}) == 20
    assert all(len(path.parts) == 2 and ".." not in path.parts for path in paths)
    assert sorted(packed.read(name) for name in packed.namelist()) == sorted(
        image.read_bytes() for image in images
    )
    page.click("#finish-close")
    page.click("#clear")
    expect(page.locator("#grid .tile")).to_have_count(0)
    expect(page.locator("#start")).to_be_visible()


def test_only_photos_near_the_viewport_are_in_the_document(page):
    """Add 5,000 photos, which wait for their answers. ``benchmarks/page.py`` measures frame times."""
    held = hold(page, "**/v1/classify**")
    page.evaluate(
        """async (bytes) => {
            const { addFiles } = await import("/page/classify.js");
            const photo = (_, i) => new File([Uint8Array.from(bytes)], `${i}.jpg`, { type: "image/jpeg" });
            addFiles(Array.from({ length: 5000 }, photo));
        }""",
        list(caltech_photos("test", "panda", 1)[0].read_bytes()),
    )
    expect(page.locator("#progress")).to_have_text(re.compile(r"^0 of 5\s000 photos done$"))
    tiles = page.locator("#grid .tile")
    for _ in range(5):
        page.mouse.wheel(0, 3000)
        page.wait_for_timeout(100)
        assert 0 < tiles.count() < 200
    page.press("#grid", "End")
    expect(page.locator("#grid .tile.active")).to_have_attribute("aria-posinset", "5000")
    expect(page.locator("#grid .tile.active")).to_be_in_viewport()
    for key in ("End", "Home"):
        page.press("#grid", key)
        page.evaluate("scrollTo(0, 40_000)")
        page.wait_for_timeout(100)
        shown = tiles.evaluate_all("all => all.map((one) => +one.getAttribute('aria-posinset'))")
        assert shown == sorted(shown)  # screen readers read them in this order
    assert len(held) == 4  # the page sends no more photos at a time


def test_an_empty_server_classifies_a_photo_after_five_actions(serving, tmp_path, run):
    """A second classifier gets more photos than fit into a request, which has at most 64 photos and 32 MiB."""
    class_folders(tmp_path / "photos", "crab", "panda", "pizza", each=5)
    colours = np.random.default_rng(0).integers(0, 256, (66, 3), np.uint8)
    for number, colour in enumerate(colours):
        path = tmp_path / "colours" / f"class {number:02}" / "0.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), colour)).save(path)
        if number < 3:
            with path.open("ab") as file:  # decoders ignore what follows the image
                file.write(bytes(12 << 20))
    with serving(*MODEL, "--out", tmp_path / "made") as (page, _):  # 1
        expect(page.locator("#teach-missing")).to_contain_text("at least two classes")
        page.set_input_files("#teach-folder", tmp_path / "photos")  # 2
        expect(page.locator("#teach-go")).to_have_text(
            "Create classifier from 15 photos in 3 classes"
        )
        page.click("#teach-go")  # 3
        expect(page.locator("#teach-result")).to_contain_text("“my photos” is ready.")
        expect(page.locator("#teach-result")).to_contain_text("class names alone")
        page.keyboard.press("Enter")  # 4: the button for classifying photos has the focus
        ask(page, *caltech_photos("test", "crab", 1))  # 5
        assert answer(page)["label"] == "crab"
        assert "15" in run("index info", tmp_path / "made" / "my photos").stdout

        go(page, "teach")
        page.set_input_files("#teach-folder", tmp_path / "colours")
        page.fill("#teach-name", "colours")
        expect(page.locator("#teach-go")).to_have_text(
            "Create classifier from 66 photos in 66 classes"
        )
        page.press("#teach-go", "Enter")
        expect(page.locator("#teach-result")).to_contain_text(
            "“colours” is ready.", timeout=4 * PATIENCE
        )
        expect(page.locator("#index-facts")).to_contain_text("66 photos, 66 classes")


def test_dropped_folders_become_classes_and_adding_can_be_cancelled(opened, tmp_path):
    """Loose photos go to the highlighted card. One undo reverts all changes."""
    page = opened(expected=[f"{REFUSED}4"])
    place = class_folders(tmp_path / "photos", "butterfly", "crab", each=16)
    (place / "crab" / "notes.txt").write_text("not a photo")
    (place / "crab" / ".hidden.jpg").write_text("none either")
    drop(page, place / "crab")  # the Classify screen classifies them
    classified(page, 16)
    expect(page.locator("#troubles p")).to_contain_text("notes.txt")
    page.click("#clear")

    go(page, "teach")
    loose = caltech_photos("train", "starfish", 2)
    cards = page.locator(".class-card")
    names = page.locator(".class-card input[type=text]")
    marked = page.locator(".class-card.target")

    def middle(card):
        box = card.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    drag_files(page, *loose, at=middle(cards.last))
    expect(cards.last).to_have_class(re.compile("target"))
    drag_files(
        page, *loose, at=(600, 20)
    )  # not on a card: the first card without photos is the target
    expect(cards.first).to_have_class(re.compile("target"))
    drag_files(page, place / "crab", at=middle(cards.last))
    expect(marked).to_have_count(0)
    names.last.fill("starfish")
    drop(page, place / "crab", place / "butterfly", *loose, at=middle(cards.last))
    expect(page.locator("#notice")).to_contain_text("Added 34 photos to 3 classes.")
    expect(page.locator("#teach-go")).to_have_text("Create classifier from 34 photos in 3 classes")
    assert sorted(name.input_value() for name in names.all()) == ["butterfly", "crab", "starfish"]
    undo(page)
    expect(cards).to_have_count(2)
    assert sorted(name.input_value() for name in names.all()) == ["", "starfish"]
    expect(page.locator(".class-card img")).to_have_count(0)

    page.check("#teach-old")
    names.last.fill("")
    drop(page, place / "crab", place / "butterfly")
    expect(page.locator("#notice")).to_contain_text("Skipped 1 file")
    expect(page.locator("#teach-go")).to_have_text("Add 32 photos in 2 classes")
    held = hold(page, "**/v1/indexes/things/keys")
    page.click("#teach-go")
    expect(page.locator("#teach-said")).to_contain_text("Uploading")
    wait_for(page, held, 1).continue_()
    wait_for(page, held, 2)
    expect(page.locator("#teach-progress")).to_have_js_property("value", 0.5)
    page.click("#teach-cancel")
    expect(page.locator("#teach-said")).to_contain_text("Stopping")
    held[1].continue_()
    expect(page.locator("#teach-result")).to_contain_text("Cancelled. 32 photos were already added")
    expect(page.locator("#teach-go")).to_be_enabled()
    undone(page)


def test_pasted_photos_are_classified(page):
    page.click("#tab-classes")
    page.evaluate(
        """bytes => {
            const clipboardData = new DataTransfer();
            const paste = { clipboardData, bubbles: true, cancelable: true };
            clipboardData.items.add(new File([Uint8Array.from(bytes)], "pasted.jpg", { type: "image/jpeg" }));
            document.body.dispatchEvent(new ClipboardEvent("paste", paste));
        }""",
        list(caltech_photos("test", "accordion", 1)[0].read_bytes()),
    )
    classified(page)
    assert answer(page)["label"] == "accordion"
    expect(page.locator("#camera")).to_be_hidden()


def test_a_phone_takes_photos_and_swipes_confirm_or_correct_answers(opened):
    """The browser opens its camera for a file input with the attribute ``capture``."""
    page, [image] = opened(**PHONE), caltech_photos("test", "pizza", 1)

    def take(button):
        with page.expect_file_chooser() as chooser:
            button.tap()
        assert chooser.value.element.get_attribute("capture") == "environment"
        chooser.value.set_files(image)

    take(page.locator("#camera"))
    classified(page)
    box = page.locator("#drawer-right").bounding_box()
    assert box["y"] + box["height"] > 844 - 32  # the buttons are at the bottom of the window
    session = page.context.new_cdp_session(page)

    def swipe(across, down=0):
        points = [{"x": 195 + share * across, "y": 300 + share * down} for share in (0, 0.5, 1)]
        for kind, at in zip(("touchStart", "touchMove", "touchMove"), points, strict=True):
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [at]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    for across, down in ((20, 0), (80, 120)):  # a swipe that is too short, and a scroll
        swipe(across, down)
    expect(page.locator("#drawer-right")).to_be_visible()
    swipe(-120)
    expect(page.locator("#drawer-form input")).to_be_focused()
    page.locator("#drawer-form input").blur()
    swipe(120)
    undone(page, "Added 1 example photo to pizza.")
    page.click("#drawer-close")
    assert (
        page.locator("#grid").evaluate(
            "grid => Math.round(grid.clientWidth / grid.firstChild.clientWidth)"
        )
        == 3
    )
    go(page, "teach")
    card = page.locator(".class-card").first
    for number in ("1 photo", "2 photos"):
        take(card.get_by_role("button", name="Camera"))
        expect(card).to_contain_text(number)


def test_unreadable_photos_and_an_unreachable_or_slow_server_are_reported_once(opened, tmp_path):
    page = opened(expected=["Failed to load resource"])
    wrong = [tmp_path / name for name in ("notes.jpg", "more.jpg", "IMG_1.HEIC")]
    for path in wrong:
        path.write_bytes(b"no image")
    ask(page, *wrong, *caltech_photos("test", "panda", 1), number=1)
    lines = page.locator("#troubles p")
    expect(lines).to_have_count(1)
    expect(lines).to_contain_text("Skipped 3 files")
    expect(lines).to_contain_text("notes.jpg")
    lines.get_by_role("button", name="Dismiss").click()
    expect(lines).to_have_count(0)

    page.route("**/v1/classify**", lambda route: route.abort())
    choose_photos(page, *caltech_photos("test", "panda", 6))
    expect(lines).to_have_count(1)
    expect(lines).to_contain_text("cannot be reached. Is it still running? 6 photos have")
    page.unroute("**/v1/classify**")
    held = hold(page, "**/v1/classify**")
    page.click("#again")  # waiting photos are marked, can be opened, and can be removed
    expect(page.locator("#progress")).to_contain_text("1 of 7 photos done")
    expect(page.locator("#grid .tile.busy .chip-of").first).to_have_text("classifying…")
    assert violations(page) == []
    page.locator("#grid .tile.busy").first.click()
    expect(page.locator("#drawer-state")).not_to_be_empty()
    page.click("#drawer-close")
    page.locator("#grid .tile.busy .tick").first.click()
    page.click("#selection-away")
    expect(page.locator("#progress")).to_contain_text("1 of 6 photos done")
    release(page, held)
    classified(page, 6)
    expect(lines).to_have_count(0)


def test_every_request_is_repeated_while_the_server_refuses_it_as_busy(opened):
    """The first refusal has no Retry-After, as that of a proxy. Other refusals are shown."""
    page = opened(expected=[f"{REFUSED}429", f"{REFUSED}413"])
    refused = []

    def busy(route):
        what = f"{route.request.method} {route.request.url.partition('/v1/')[2].partition('?')[0]}"
        if what in refused or what.endswith("/image"):
            route.continue_()
            return
        refuse(
            route,
            429,
            "9 images are waiting; try again",
            **({"Retry-After": "0"} if refused else {}),
        )
        refused.append(what)

    page.route("**/v1/**", busy)
    page.reload()
    expect(page.locator("#index-facts")).not_to_be_empty()
    page.route("**/groups", lambda route: refuse(route, 413, "too large"), times=1)
    ask(page, *caltech_photos("train", "yin_yang", 5), *caltech_photos("train", "stop_sign", 4))
    groups = page.locator("#unknown-list > li")
    expect(groups).to_have_text("Photos without a match could not be grouped: too large Try again")
    groups.get_by_role("button", name="Try again").click()
    expect(groups.first).to_contain_text("4 similar photos without a match")
    groups.first.get_by_role("button").first.click()  # one of them does not belong to the others
    expect(groups.first).to_contain_text("3 similar photos without a match")
    groups.first.get_by_label("Class").fill("signs")
    groups.first.get_by_role("button", name="Name this class").click()
    undone(page, "Added 3 example photos to the new class signs")
    for screen, shown in (
        ("classes", "#shots .tile"),
        ("check", "#audit li"),
        ("history", "#history li"),
    ):
        page.click(f"#tab-{screen}")
        expect(page.locator(shown).first).to_be_visible()
    whole = {
        "indexes",
        "accuracy",
        "audit",
        "classify",
        "exemplars",
        "groups",
        "history",
        "keys",
        "rollback",
    }
    assert {what.rpartition("/")[2].rpartition(" ")[2] for what in refused} >= whole


def test_each_screen_reports_a_stopped_server(serving, served, tmp_path):
    folder = shutil.copytree(served.folder, tmp_path / "things")
    with serving(folder, expected=["Failed to load resource: net::ERR_"]) as (page, process):
        ask(page, *caltech_photos("test", "panda", 2))
        page.click("#tab-classes")
        expect(page.locator("#shots .tile").first).to_be_visible()
        process.terminate()
        process.wait(30)

        def gone(where):
            said = "The server cannot be reached. Is it still running?"
            expect(page.locator(where)).to_contain_text(said)

        page.fill("#shots-source", "image")
        gone("#shots-state")
        expect(page.locator("#shots-state button")).to_have_text("Try again")
        page.click("#tab-map")
        gone("#map-state")
        page.click("#tab-classes")
        page.locator("#classes-list").get_by_role("button", name="Rename").first.press("Enter")
        page.keyboard.type("another name")
        page.keyboard.press("Enter")
        gone("#notice")
        assert violations(page) == []
        page.click("#tab-classify")
        page.locator("#grid .tile .tick").first.click()
        submit(page, "#selection-form input", "crab")
        gone("#notice")
        expect(page.locator("#grid .tile[data-label]")).to_have_count(2)  # the answers remain
        go(page, "teach")
        page.set_input_files(
            "#teach-folder", class_folders(tmp_path / "photos", "crab", "panda", each=2)
        )
        page.click("#teach-go")
        gone("#teach-result")


def test_classes_and_example_photos_are_listed_and_filtered(page):
    computing = "still being computed; try again in 1 s"  # as a large audit is
    page.route(
        "**/audit*", lambda route: refuse(route, 202, computing, **{"Retry-After": "1"}), times=1
    )
    page.click("#tab-check")
    expect(page.locator("#audit-state")).to_contain_text("Still being computed. Trying again…")
    go(page, "settings")
    expect(page.locator("#about")).to_contain_text("lit-mini")
    page.click("#tab-classes")
    cards, number = page.locator("#classes-list li"), page.locator("#shots-count")
    expect(cards).to_have_count(len(things(page)["class_names"]))
    page.fill("#classes-filter", "cra")
    expect(cards).to_have_count(2)

    expect(number).to_have_text("82")
    page.wait_for_function("() => document.querySelector('#shots .tile img').naturalWidth")
    page.locator("#classes-list button[data-label=crab]").click()
    expect(number).to_have_text("8")
    expect(page.locator("#shots .said").first).to_have_text("crab")
    page.fill("#shots-source", "no such file")
    expect(page.locator("#shots-state")).to_have_text("No example photos match this filter.")
    page.fill("#shots-source", "")
    page.fill("#shots-class", "")
    expect(number).to_have_text("82")

    whole = things(
        page
    )  # only cards near the viewport are drawn, and the search finds classes beyond the first ones
    whole["class_names"] += [f"class {i}" for i in range(3000)]
    whole["counts"] += [4] * 3000
    page.route("**/v1/indexes/things", lambda route: route.fulfill(json=whole | {"text": None}))
    page.reload()
    expect(page.locator("#classes-count")).to_have_text("3 011")
    expect(cards).to_have_count(300)
    expect(page.locator("#classes-list-state")).to_contain_text("Search for the others.")
    assert page.locator("#classes-list").evaluate("one => one.scrollHeight <= one.clientHeight")
    last = cards.last
    assert not last.locator(".name").evaluate(
        "one => one.checkVisibility({ contentVisibilityAuto: true })"
    )
    last.scroll_into_view_if_needed()
    expect(last).to_be_in_viewport()
    page.fill("#classes-filter", "class 2999")
    expect(cards).to_have_count(1)
    go(page, "settings")
    expect(page.locator("#about")).to_contain_text("Version ")
    expect(page.locator("#settings-view")).not_to_contain_text(
        re.compile(r'[\[{]["\[\]{]')
    )  # no JSON
    page.unroute_all(behavior="wait")


def test_wrong_labels_are_listed_first_and_corrected(page, served, run):
    worst, title = page.locator("#audit li"), page.locator("#audit-title")
    page.click("#tab-check")
    expect(worst).to_have_count(1)  # the only clear mistake
    expect(worst.get_by_role("button").last).to_be_in_viewport(ratio=1)
    for image in worst.locator("img").all():
        box = image.bounding_box()
        assert min(box["width"], box["height"]) > 400  # of 900 px
    expect(worst).to_contain_text("This photo is labelled panda")
    expect(worst).to_contain_text("All other examples together suggest pizza.")
    key_id = worst.get_attribute("data-key-id")
    listed = run("index audit", served.folder, "--format", "json").stdout.splitlines()
    assert [json.loads(line)["key_id"] for line in listed] == [
        int(key_id)
    ]  # the command line lists the same
    page.click("#tab-classes")
    expect(page.locator('#classes-list button[data-label="panda"]')).to_contain_text("1 to check")
    worst, number = open_audit(page)
    margins = worst.evaluate_all("all => all.map((one) => +one.dataset.margin)")
    assert margins == sorted(margins, reverse=True)
    worst.last.get_by_role("button", name="Keep").click()
    expect(worst).to_have_count(number - 1)
    page.reload()
    page.click("#tab-check")
    expect(worst).to_have_count(1)
    page.check("#audit-all")
    expect(worst).to_have_count(number - 1)  # the page remembers which labels were kept
    page.uncheck("#audit-all")
    expect(page.locator("#audit-next")).to_be_hidden()
    title.press("Enter")
    command = f"retrieval-tip sort {served.folder} {served.folder.parent} {IMAGES / 'accordion'} "
    expect(page.locator("#audit-next code")).to_have_text(
        re.compile(rf"^{re.escape(command)}.* --into fixed$")
    )
    undone(page, "Moved 1 example photo to pizza.")
    worst.get_by_role("button", name="Change to pizza").press("Enter")
    expect(page.locator("#audit-state")).to_contain_text("No clear mistakes")
    assert get(page, f"/v1/indexes/things/keys?key_id={key_id}")["keys"][0]["label"] == "pizza"

    page.click("#tab-history")
    rows, restore = page.locator("#history li"), page.get_by_role("button", name="Restore")
    expect(rows.first).to_contain_text("1 photo: panda became pizza")
    expect(page.locator("#history h3")).to_have_count(1)  # one day
    page.wait_for_function("() => document.querySelector('#history img').naturalWidth")
    version = things(page)["version"] - 1
    restore.first.click()
    expect(page.locator("#restore-dialog")).to_contain_text("Change: 1 photo: pizza became panda")
    page.wait_for_function("() => document.querySelector('#restore-dialog img').naturalWidth")
    assert violations(page) == []
    page.click("#restore-cancel")
    expect(rows.first).to_contain_text("current")
    for restored in (version, version + 2):
        restore.first.click()
        page.click("#restore-ok")
        expect(rows.first).to_contain_text(f"restored version {restored}")
        if restored == version:
            undo(page)
            expect(rows.first).to_contain_text(f"restored version {version + 1}")
    page.click("#tab-check")
    expect(worst).to_have_count(1)


def test_classes_are_renamed_and_merged(page):
    """This also works with the keyboard.

    Renaming a class to an existing name merges the two. The changes can be undone.
    """
    page.click("#tab-classes")

    def card(label):
        return page.locator(f'#classes-list li[data-label="{label}"]')

    entry, field = card("crayfish"), page.locator("#rename-label")
    entry.hover()
    entry.get_by_role("button", name="Rename crayfish").click()
    expect(field).to_have_value("crayfish")
    page.keyboard.press("Escape")
    expect(field).to_be_hidden()
    expect(entry.get_by_role("button", name="Rename crayfish")).to_be_focused()
    page.keyboard.press("Enter")
    expect(field).to_be_focused()
    page.keyboard.type("<i>yabby")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("Renamed crayfish to <i>yabby.")
    expect(page.locator("#classes-title")).to_be_focused()
    page.click("#tab-history")
    expect(page.locator("#history li").first).to_contain_text("renamed crayfish to <i>yabby")
    expect(page.locator("#notice")).to_be_hidden()
    page.click("#tab-classes")
    expect(card("<i>yabby")).to_contain_text("8 photos")
    undone(page)
    expect(entry).to_contain_text("8 photos")

    entry.get_by_role("button", name="Rename").press("Enter")
    page.keyboard.type("lobster")
    expect(page.locator("#rename-merge")).to_contain_text("will be merged")
    page.keyboard.press("Enter")
    expect(card("lobster")).to_contain_text("16 photos")
    undone(page, "Merged crayfish into lobster.")
    expect(entry).to_contain_text("8 photos")


def test_suspicious_labels_are_corrected_removed_or_kept_together(opened):
    """All corrections form one version, and the message shows their effect on accuracy. Changes can be undone."""
    page = opened(expected=["Failed to load resource: net::ERR_FAILED"])

    def accuracy():
        """Return the accuracy, which the screen of the classes shows."""
        shown = f"{int(100 * get(page, '/v1/indexes/things/accuracy')['both'] + 0.5)} %"
        page.click("#tab-classes")
        expect(page.locator("#index-judged")).to_contain_text(f"Accuracy on the examples: {shown}")
        page.click("#tab-check")
        return shown

    before = accuracy()
    listed, number = open_audit(page)
    wanted = listed.evaluate_all(
        "all => all.map((one) => [one.dataset.keyId, one.querySelector('strong.name')?.textContent])"
    )
    movable = {int(key_id): label for key_id, label in wanted if label}
    assert len(set(movable.values())) > 1
    version = things(page)["version"]
    page.click("#audit-move-all")
    expect(page.locator("#notice")).to_contain_text(f"Corrected {len(movable)} labels.")
    assert things(page)["version"] == version + 1
    after = accuracy()
    query = "&".join(f"key_id={key_id}" for key_id in movable)
    keys = get(page, f"/v1/indexes/things/keys?{query}&limit=1000")["keys"]
    assert {row["key_id"]: row["label"] for row in keys} == movable
    undone(page, f"from {before} to {after}." if after != before else f"still {after}.")
    expect(listed).to_have_count(number)
    assert accuracy() == before
    page.route(
        "**/accuracy", lambda route: route.abort()
    )  # the old accuracy stays, and the message omits it
    page.press("#audit-title", "x")
    expect(page.locator("#index-facts")).to_contain_text("81 photos")
    expect(page.locator("#notice")).not_to_contain_text("accuracy")
    undone(page)
    for left in range(number, 0, -1):
        expect(listed).to_have_count(left)
        page.press("#audit-title", "k")
    expect(page.locator("#audit-state")).to_contain_text("No suspicious labels")
    page.evaluate("() => localStorage.clear()")


def open_audit(page):
    """Show all suspicious labels. Return their entries and the number of entries."""
    page.click("#tab-check")
    page.check("#audit-all")
    listed = page.locator("#audit li")
    expect(listed.nth(1)).to_be_visible()
    return listed, listed.count()


def open_map(page):
    page.click("#tab-map")
    expect(page.locator("#map-canvas")).to_have_attribute("data-method", "tsne")


def move_on_map(page, x, y, steps=1):
    """Move the mouse to a place of the map."""
    box = page.locator("#map-canvas").bounding_box()
    across = (x + 1) / 2 * (box["width"] - 50)
    down = (1 - y) / 2 * (box["height"] - 50)
    page.mouse.move(box["x"] + 25 + across, box["y"] + 25 + down, steps=steps)


def test_photos_are_found_and_selected_on_the_map(page, served):
    """Photos inside a drawn shape are listed and can be moved together. A ring marks a new photo."""
    [image] = caltech_photos("test", "panda", 1)
    ask(page, image)
    open_map(page)
    sent = {"images": {"name": "x.jpg", "mimeType": "image/jpeg", "buffer": image.read_bytes()}}
    address = f"{served.address}/v1/classify?index=things&features=true"
    answered = page.request.post(address, multipart=sent).json()
    similar = answered["results"][0]["similar"][:8]
    tsne = get(page, "/v1/indexes/things/map?method=tsne&limit=10000")
    places = np.array(tsne["places"])[[tsne["key_ids"].index(one["key_id"]) for one in similar]]
    weights = np.exp(answered["beta"] * np.array([one["affinity"] for one in similar]))
    ring = page.locator("#map-canvas").get_attribute("data-rings").split(",")
    assert [*map(float, ring)] == pytest.approx(weights @ places / weights.sum(), abs=2e-4)

    page.route(
        "**/map?*", lambda route: route.fulfill(json=route.fetch().json() | {"methods": ["pca"]})
    )
    page.reload()  # a server without scikit-learn shows the same map each time
    canvas = page.locator("#map-canvas")
    expect(canvas).to_have_attribute("data-method", "pca")
    canvas.scroll_into_view_if_needed()
    painted = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB").getcolors(1 << 24)
    assert len(painted) >= len(CLASSES)
    found = get(page, "/v1/indexes/things/map")
    lonely = int(np.argmax(found["places"], axis=0)[0])
    move_on_map(page, *found["places"][lonely])
    expect(page.locator("#map-shot .hint")).to_have_text(f"photo {found['key_ids'][lonely]}")
    expect(page.locator("#map-shot .name")).not_to_be_empty()
    expect(page.locator("#map-shot img")).to_have_js_property("complete", True)
    page.mouse.wheel(0, -100)
    expect(canvas).to_have_attribute("data-scale", "1.25")
    page.click("#map-closer")
    expect(canvas).to_have_attribute("data-scale", "1.875")
    page.click("#map-whole")
    expect(canvas).to_have_attribute("data-scale", "1")

    inside = {
        id_
        for id_, (x, y) in zip(found["key_ids"], found["places"], strict=True)
        if x > 0.1 and y > 0
    }
    assert 3 < len(inside) < 60
    move_on_map(page, 0.1, 0)
    page.mouse.down()
    for x, y in ((1.02, 0), (1.02, 1.02), (0.1, 1.02), (0.1, 0)):
        move_on_map(page, x, y, steps=4)
    page.mouse.up()
    expect(page.locator("#shots-mapped strong")).to_have_text(f"{len(inside)} photos from the map")
    expect(page.locator("#shots-count")).to_have_text(str(len(inside)))
    expect(page.locator("#shots-selected")).to_have_text(f"{len(inside)} selected")
    expect(page.locator("#classes-list")).to_be_hidden()
    ids = page.locator("#shots .tile").evaluate_all(
        "tiles => tiles.map((tile) => +tile.dataset.keyId)"
    )
    assert set(ids) <= inside
    submit(page, "#shots-form input", "starfish")
    expect(page.locator("#shots .tile .said").first).to_have_text("starfish")
    undone(page, "to starfish.")
    page.click("#shots-all")
    expect(page.locator("#shots-count")).to_have_text("82")
    expect(page.locator("#classes-list")).to_be_visible()

    page.click("#tab-map")
    expect(canvas).to_have_attribute(
        "data-pictures", re.compile("[1-9]")
    )  # thumbnails appear where they fit
    expect(canvas).to_have_attribute(
        "data-names", re.compile(r"^([5-9]|1[01])$")
    )  # at least 5 of 11 names fit
    for _ in range(4):
        page.click("#map-closer")
    before = canvas.screenshot()
    canvas.hover()
    page.keyboard.down("Shift")
    page.mouse.down()
    move_on_map(page, 0, 0.9, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    assert canvas.screenshot() != before  # the map has moved


def test_removing_a_shot_can_be_undone(page):
    """A selection survives changes by another user, and shows the new labels."""
    page.click("#tab-classes")
    page.fill("#shots-class", "starfish")
    expect(page.locator("#shots-count")).to_have_text("8")
    for remove in (lambda: page.click("#shots-remove"), lambda: page.press("#shots", "Delete")):
        page.locator("#shots .tile").first.click()
        remove()
        expect(page.locator("#shots-count")).to_have_text("7")
        expect(page.locator("#shots-title")).to_be_focused()
        undone(page, "Removed 1 example photo.")
        expect(page.locator("#shots-count")).to_have_text("8")
    page.locator("#shots .tile").first.click()
    page.click("#shots-remove")
    expect(page.locator("#index-facts")).to_contain_text("81 photos")
    change(page, "rollback", to=things(page)["version"] - 1)
    page.click("#tab-classify")
    ask(
        page, *caltech_photos("test", "starfish", 1)
    )  # the answer is from a newer version than the page's
    expect(page.locator("#index-facts")).to_contain_text("82 photos")

    page.click("#tab-classes")
    page.fill("#shots-class", "")
    page.fill("#shots-source", ".jpg")
    expect(page.locator("#shots-count")).to_have_text("82")
    page.press("#shots", "Control+a")
    first = page.locator("#shots .tile .said").first
    before = first.get_attribute("title") or ""
    for of, label in ((before, "squeeze box"), ("squeeze box", before)):
        expect(page.locator("#shots-selected")).to_have_text("82 selected")
        change(page, "rename", of=of, label=label)
        page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        expect(first).to_have_attribute("title", label)
    expect(page.locator("#shots-selected")).to_have_text("82 selected")


def test_the_page_offers_no_changes_on_a_read_only_server(page):

    def closed(route):
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | {"changes": False})

    page.route("**/v1/indexes/*", closed)
    page.reload()
    ask(page, *caltech_photos("test", "panda", 1))
    expect(page.locator("#drawer-refused")).to_contain_text("read-only")
    expect(page.locator("#drawer-form")).to_be_hidden()
    expect(page.locator("#drawer-chips button")).to_have_count(0)
    page.click("#tab-classes")
    page.locator("#shots .tile").first.click()
    expect(page.locator("#shots-selection")).to_be_hidden()
    page.click("#tab-check")
    expect(page.locator("#audit li").first).to_be_visible()
    assert page.locator("#audit").get_by_role("button", name="Change").count() == 0
    go(page, "settings")
    expect(page.locator("#about")).to_be_visible()
    page.unroute_all(behavior="wait")  # no request may outlive the page


def test_an_index_of_features_opens_and_refuses_photos(page):
    ask(page, *caltech_photos("test", "panda", 1))
    choose(page, "food <b>1")
    expect(page.locator("#index-facts")).to_contain_text("36 photos, 9 classes")
    expect(page.locator("#drop-hint")).to_contain_text("accepts features")
    expect(page.locator("#choose")).to_be_disabled()
    expect(page.locator("#troubles")).to_contain_text("features, not photos")
    page.click("#clear")
    expect(page.locator("#known li")).to_have_count(9)
    page.click("#tab-classes")
    expect(page.locator("#shots-count")).to_have_text("36")
    expect(page.locator("#shots .none").first).to_be_visible()  # there are no pictures
    open_map(page)
    page.click("#tab-check")
    expect(page.locator("#audit-state")).not_to_contain_text("Loading")
    page.reload()
    expect(page.locator("#index-name")).to_have_text(
        "food <b>1"
    )  # the page remembers the classifier
    choose(page, "things")
    page.click("#tab-classes")
    expect(page.locator("#shots-count")).to_have_text("82")
    expect(page.locator("#shots .none")).to_have_count(0)


WRAPS = """bar => {
    const middles = [...bar.children].filter((one) => one.checkVisibility() && !one.matches(".menu"))
        .map((one) => one.getBoundingClientRect()).map(({ top, height }) => top + height / 2);
    return Math.max(...middles) - Math.min(...middles);
}"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (2560, "light")])
def test_every_screen_fits_and_is_accessible(opened, tmp_path, width, scheme):
    """On a phone and a large monitor, no screen scrolls sideways, and axe finds no violations."""
    size = {"width": width, "height": 844 if width < 500 else 1440}
    page = opened("", viewport=size, has_touch=width < 500, color_scheme=scheme)

    def fits(name):
        for place in ("html", "#drawer"):
            assert page.locator(place).evaluate("one => one.scrollWidth <= one.clientWidth"), (
                name,
                place,
            )
        assert violations(page) == [], name

    expect(page.locator("#known button img").first).to_be_visible()
    assert page.evaluate(
        "async () => (await document.fonts.ready, document.fonts.check('600 14px Inter'))"
    )
    fits("start")
    page.click("#help")
    for word in ("No match", "accuracy on the examples", "accuracy on the other photos"):
        expect(page.locator("#glossary dt").filter(has_text=word)).to_be_visible()
    fits("glossary")
    page.keyboard.press("Escape")
    page.locator("#known button").nth(1).click()
    classified(page)
    page.click("#drawer-close")
    some = [*caltech_photos("test", "crab", 3), *caltech_photos("test", "car_side", 2)]
    ask(
        page,
        *some,
        names=[f"{number}{'a-very-long-name' * 10}.jpg" for number in range(5)],
        number=6,
    )
    if width < 500:
        page.click("#filters")  # the filters are collapsed on phones
    else:
        page.set_viewport_size({"width": 1280, "height": 840})
        page.press("#grid", "Control+a")
        for bar in ("header", "#bar", "#selection"):
            assert page.locator(bar).evaluate(WRAPS) < 12, bar
        page.click("#selection-none")
        page.set_viewport_size(size)
    page.locator("#grid .tile .tick").first.click()
    page.evaluate(
        "async () => (await import('/page/dialogs.js')).notice('Packed 6 photos', () => true)"
    )
    boxes = [page.locator(one).bounding_box() or {} for one in ("#notice", "#selection")]
    assert (
        boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    )  # the notice does not cover the buttons
    fits("grid")
    page.select_option("#filter-state", "no_match")
    expect(page.locator("#grid .tile.no_match").first).to_be_visible()
    fits("no_match")
    page.select_option("#filter-state", "all")
    page.click("#selection-none")
    page.locator("#grid .tile").first.click()
    expect(page.locator("#decided li img").first).to_be_visible()
    name = f"{'a-very-long-name' * 10}.jpg"
    expect(page.locator("#drawer-file")).to_have_attribute("title", re.compile(rf"^\d{name}$"))
    expect(page.locator("#drawer-file")).to_have_text(re.compile(r"^\da-very.{0,20}….{0,20}\.jpg$"))
    expect(page.locator("#decided .gives").first).to_have_text(
        re.compile(r"^[\d.]+ points for \w+$")
    )
    show_calculation(page)
    fits("drawer")
    submit(page, "#drawer-form input", "crab")
    expect(page.locator("#token-dialog")).to_contain_text(
        "the address that retrieval-tip serve printed"
    )
    fits("token")
    page.click("#token-cancel")
    page.click("#drawer-close")
    height = page.locator("header").evaluate("one => one.clientHeight")
    page.click("#tab-check")
    expect(page.locator("#audit li").first).to_be_visible()
    expect(page.locator("#audit li").first.get_by_role("button").last).to_be_in_viewport(ratio=1)
    assert (
        page.locator("header").evaluate("one => one.clientHeight") == height
    )  # the late number makes nothing jump
    open_map(page)
    page.click("#tab-classes")
    page.locator("#shots .tile").first.click()
    fits("index")
    rename = page.locator("#classes-list").get_by_role("button", name="Rename")
    if width < 500:
        expect(rename).to_have_count(0)  # until a card is tapped
        page.locator("#classes-list button[data-label]").first.tap()
    rename.first.press("Enter")
    fits("rename")
    page.keyboard.press("Escape")
    open_map(page)
    page.locator("#map-canvas").scroll_into_view_if_needed()
    found = get(page, "/v1/indexes/things/map?method=tsne&limit=10000")
    move_on_map(page, *found["places"][0])
    expect(page.locator("#map-shot img")).to_be_visible()
    page.locator("#map-title").scroll_into_view_if_needed()
    fits("map")
    sizes = "() => [...document.querySelectorAll('body *')].map((one) => getComputedStyle(one).fontSize)"
    assert {*page.evaluate(sizes)} <= {"12px", "14px", "16px", "20px", "28px"}
    go(page, "teach")
    page.set_input_files(
        "#teach-folder", class_folders(tmp_path / "photos", "crab", "panda", each=3)
    )
    page.locator(".class-card input[type=text]").last.fill("a-very-long-name" * 8)
    fits("teach")


LABELS = CLASSES[:6]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Return the true labels of unlabelled photos by file name. The empty name stands for their folder."""
    folder = tmp_path_factory.mktemp("pool")
    found = {}
    for label in LABELS:
        for number, path in enumerate(caltech_photos("train", label, 14)):
            name = f"{len(found):03}.jpg"
            shutil.copy(path, folder / name)
            found[name] = label
            if number == 0:
                with Image.open(
                    path
                ) as image:  # a near-identical photo, to label together with the original
                    image.save(folder / f"{len(found):03}.jpg", quality=70)
                found[f"{len(found):03}.jpg"] = label
    found[""] = str(folder)
    return found


def shown_photo(page):
    return page.locator("#label-photo img").get_attribute("alt") or ""


def label_by_key(page, label):
    """Label the photo with the keyboard as a person would. Return the key used, or "typed"."""
    name, choices = shown_photo(page), page.locator("#label-choices .name").all_text_contents()
    if label in choices:
        how = ("Enter", "2", "3")[choices.index(label)]
    else:
        page.keyboard.type(label)
        how = "typed"
    page.keyboard.press("Enter" if how == "typed" else how)
    expect(page.locator("#label-photo img")).not_to_have_attribute("alt", name)
    return how


def test_photos_are_labelled_by_keyboard_and_the_rest_is_finished(labelling, pool, tmp_path, run):
    """The page and the terminal say how many of the others are wrong. The interval comes first."""
    folder = tmp_path / "things"
    sorted_ = tmp_path / "sorted"
    hows = []
    printed = []
    with labelling(pool, folder, printed=printed) as (page, _):
        assert violations(page) == []
        expect(page.locator("#label-class")).to_be_focused()
        for _ in range(50):  # the fifth ones are random, and nine of these make an estimate
            following = page.locator("#label-next img").first.get_attribute("src")
            hows.append(label_by_key(page, pool[shown_photo(page)]))
            expect(page.locator("#label-photo img")).to_have_attribute(
                "src", following
            )  # which has been loaded before
            page.wait_for_timeout(200)
        assert hows.count("Enter") > 8
        assert "typed" in hows
        expect(page.locator("#label-progress")).to_contain_text("50 of 90 photos labelled.")
        all_saved(page)
        wait_until(page, "!state.busy")  # each photo that is read later changes the estimate
        page.reload()
        found = status(page)["progress"]["estimate"]
        least, most, wrong = (round(40 * (1 - found[name])) for name in ("high", "low", "accuracy"))
        assert least < most < 40
        others = f"{least} to {most} of the other 40 photos are wrong (about {wrong})"
        expect(page.locator("#label-progress")).to_have_text(
            re.compile(rf" of the last 20\. {re.escape(others)}\.$")
        )
        expect(page.locator("#label-stop")).to_contain_text(
            re.compile(r"less than 1 % of the answers|about \d+ fewer wrong")
        )
        expect(page.locator("#index-facts")).to_contain_text("6 classes")
        page.click("#label-review")
        expect(page.locator("#progress")).to_have_text(
            re.compile(rf"^{re.escape(others)}( · \d+ with no match)?$")
        )
        expect(page.locator("#grid")).to_be_focused()
        page.click("#finish-open")
        assert violations(page) == []

        done = page.locator("#finish").get_by_role("button", name="Finish")

        def finish(said):
            done.click()
            expect(page.locator("#finish-said")).to_contain_text(said)
            expect(done).not_to_have_class("primary")

        default = Path(f"{folder.name}-sorted").absolute()
        expect(page.locator("#finish-said")).to_contain_text(
            f"90 photos go to {default}."
        )  # before it is written
        expect(page.locator("#finish-said")).to_contain_text(f" {others}")
        assert not default.exists()
        page.fill("#finish-into", "~/" + os.path.relpath(sorted_, Path.home()))
        expect(done).to_be_disabled()
        expect(page.locator("#finish-said")).to_contain_text(f"90 photos go to {Path.home()}/")
        page.fill("#finish-into", str(sorted_))
        for wrong in (50, 1):
            page.fill("#finish-wrong", str(wrong))
            expect(page.locator("#finish-said")).to_contain_text(f"90 photos go to {sorted_}. ")
            expect(page.locator("#finish-said")).to_contain_text(
                "Of 50 examples, each classified by the others, "
            )
            finish("copied 90 photos")
            expect(page.locator("#finish-said")).to_contain_text(
                "If the other photos are like them, at most "
            )
            page.click("#finish-undo")
            expect(page.locator("#finish-said")).to_contain_text("undid the sorting of 90 photos")
        page.check("#finish-xmp")
        expect(page.locator("#finish-into")).to_be_hidden()
        page.locator("#finish [value=copy]").check()
        finish("copied 90 photos")
        with zipfile.ZipFile(download(page, "zip")) as file:
            assert {Path(name).name: file.read(name) for name in file.namelist()} == {
                name: (Path(pool[""]) / name).read_bytes() for name in pool if name
            }
        page.click("#finish-close")
        expect(page.locator("#index-accuracy")).to_be_hidden()  # this page has its own estimate
        page.click("#tab-classes")
        expect(page.locator("#index-accuracy")).to_contain_text("accurate on the examples")
    assert printed[-1] == f"Labelled photos: 50 of 90; {others}\n"


def give(page, labels, until="!state.busy"):
    """Label photos of the session as the page does, and wait for a state, by default until the labels are saved."""
    sent = {"labels": [{"photo": photo, "label": label} for photo, label in labels.items()]}
    token = page.evaluate("sessionStorage.getItem('retrieval-tip token')")
    address = f"{page.evaluate('location.origin')}/v1/label"
    assert page.request.post(address, data=sent, headers={"Authorization": f"Bearer {token}"}).ok
    wait_until(page, until)


def wait_until(page, condition):
    """Wait for a state of the session on the server."""
    page.wait_for_function(
        f"async () => {{ const state = await (await fetch('/v1/label')).json(); return {condition} }}"
    )


def test_the_answers_of_the_folder_are_reviewed(labelling, pool, tmp_path):
    tiles, counted = ".tile:not(.taught)", "#progress"
    names = sorted(name for name in pool if name)
    with labelling(pool, tmp_path / "things") as (page, _):
        wait_until(page, "state.encoded === 90")
        page.click("#tab-classify")
        expect(page.locator("#start-label")).to_be_visible()  # there are no answers yet
        give(page, {number: pool[names[number]] for number in range(0, 90, 4)})
        page.click("#tab-label")
        page.click("#tab-classify")
        expect(page.locator(counted)).to_contain_text("67 photos without a label")
        shown = page.locator("#grid .tile").evaluate_all(
            "all => all.map((one) => [one.title, one.dataset.label])"
        )
        assert sum(pool[name] == label for name, label in shown) > 0.8 * len(shown)

        page.press("#grid", "Home")
        page.keyboard.type("acorn")  # the first letter does not accept the answer
        expect(page.locator("#selection-form input")).to_have_value("acorn")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text("Labelled 1 photo as acorn.")
        expect(page.locator(counted)).to_contain_text("66 photos without a label")
        undo(page)
        expect(page.locator(counted)).to_contain_text("67 photos without a label")

        first, last = (page.locator(f"#grid {tiles}").nth(at).bounding_box() for at in (0, 2))
        known = page.locator("#selection-chips .chip")

        def selected():
            page.keyboard.press("Escape")
            page.mouse.move(first["x"] + 10, first["y"] + 20)
            page.mouse.down()
            page.mouse.move(last["x"] + 20, last["y"] + 30, steps=4)
            page.mouse.up()
            expect(page.locator("#selection-count")).to_have_text("3 selected")
            return sorted(one.get_attribute("title") for one in known.all())

        wait_until(page, "!state.busy")
        for _ in range(
            20
        ):  # the page learns later that the class of the label that was undone is gone
            if (classes := selected()) == sorted(LABELS):
                break
            page.wait_for_timeout(500)
        assert classes == sorted(LABELS)
        assert violations(page) == []
        known.and_(page.get_by_title("crab")).click()
        expect(page.locator(counted)).to_contain_text("64 photos without a label")
        visible = page.locator(f"#grid {tiles}").evaluate_all(
            """all => all.map((one) => one.getBoundingClientRect())
                .filter(({ top, bottom }) => top >= document.getElementById("bar").getBoundingClientRect().bottom
                    && bottom <= innerHeight).length"""
        )
        page.press("#grid", "Shift+Enter")
        expect(page.locator("#notice")).to_contain_text(f"Labelled {visible} photos as")
        expect(page.locator(counted)).to_contain_text(f"{64 - visible} photos without a label")

        page.locator(f"#grid {tiles}").first.click()
        expect(
            page.locator("#decided li img").first
        ).to_be_visible()  # the drawer explains the answer
        expect(page.locator("#drawer-notes")).to_contain_text(
            "of the probability. Similar photos give the rest: "
        )
        label = page.locator("#drawer-title").get_attribute("title")
        assert page.locator("#grid .tile.active").get_attribute("data-label") == label
        page.press("#drawer", "Enter")
        expect(page.locator("#notice")).to_contain_text(f"Labelled 1 photo as {label}.")
        page.click("#drawer-close")
        page.select_option("#filter-state", "taught")
        expect(page.locator("#grid .tile.taught").first).to_be_visible()
        number = 63 - visible
        wait_until(page, "!state.busy")
        page.reload()
        expect(page.locator(counted)).to_contain_text(f"{number} photos without a label")


def test_a_tile_is_corrected_by_one_action_and_teaches_others(labelling, pool, tmp_path):
    """A tile has its best other classes, what a correction teaches is offered, and a class can be painted."""
    names = sorted(name for name in pool if name)
    with labelling(pool, tmp_path / "things") as (page, _):
        wait_until(page, "state.encoded === 90")
        given = {n: pool[name] for n, name in enumerate(names) if n % 3 == 0}
        give(page, {n: label for n, label in given.items() if label != "camera"})
        page.click("#tab-classify")
        grid, notice = page.locator("#grid"), page.locator("#notice")
        expect(grid.locator(".tile").nth(20)).to_be_visible()

        def wrong(label):
            return [name for name in page.evaluate(WHOLE) if pool[name] == label]

        def tile(name):
            return grid.locator(f'.tile[title="{name}"]')

        def offers(name):
            return (
                tile(name)
                .locator(".others span")
                .evaluate_all("all => all.map((one) => one.dataset.label)")
            )

        wait_until(page, "!state.busy")
        name = next(iter(page.evaluate(WHOLE)))
        label = offers(name)[0]
        assert label != tile(name).get_attribute("data-label")
        tile(name).hover()
        tile(name).locator(".others span").first.click()
        expect(notice).to_contain_text(f"Labelled 1 photo as {label}.")
        expect(page.locator("#drawer")).to_be_hidden()
        undo(page)
        expect(tile(name)).to_be_visible()

        page.press("#grid", "Home")
        active = grid.locator(".tile.active")
        name = active.get_attribute("title")
        second = offers(name)[1]
        expect(active.locator(".others")).to_be_visible()
        page.keyboard.press("2")
        expect(notice).to_contain_text(f"Labelled 1 photo as {second}.")
        undo(page)

        offer = notice.get_by_role("button", name="new answer")
        for name in wrong("camera"):
            correct(page, name, "camera")
            wait_until(page, "!state.busy && !state.unsaved")
            page.wait_for_timeout(1000)  # the answers are fetched
            if offer.is_visible():
                break
        expect(offer).to_contain_text("Show ")
        renewed = grid.locator(".tile.same")
        answers = renewed.evaluate_all(
            "all => all.map((one) => [one.title, one.querySelector('.chip-of').textContent])"
        )
        assert "camera?" in dict(answers).values()
        assert violations(page) == []
        page.press("#grid", "+")
        expect(renewed).to_have_count(0)
        for name, answer in answers:
            expect(tile(name)).to_have_attribute("data-label", answer.removesuffix("?"))

        page.press("#grid", "*")
        expect(notice).to_contain_text("Each click on a photo gives camera.")
        first = grid.locator(".tile:not(.taught)").first
        name = first.get_attribute("title")
        first.click()
        expect(notice).to_contain_text("Labelled 1 photo as camera.")
        expect(tile(name)).to_have_count(0)
        page.press("#grid", "Escape")
        grid.locator(".tile:not(.taught)").first.click()
        expect(page.locator("#drawer")).to_be_visible()


def test_answers_without_a_match_are_confirmed(labelling, pool, tmp_path):
    """They come first, so a screen may have no other answers."""
    names = sorted(name for name in pool if name)
    with labelling(pool, tmp_path / "things") as (page, _):
        wait_until(page, "state.encoded === 90")
        given = {n: pool[name] for n, name in enumerate(names) if n % 3 == 0}
        give(page, {n: label for n, label in given.items() if label != "camera"})
        wait_until(page, "!state.busy && !state.unsaved")
        page.click("#tab-classify")
        expect(page.locator("#grid .tile").nth(20)).to_be_visible()
        expect(page.locator("#grid")).to_have_attribute("aria-busy", "false")
        name, label = next(iter(page.evaluate(WHOLE).items()))
        first = page.locator(f'#grid .tile[title="{name}"]')
        expect(first).to_have_class(re.compile("no_match"))
        expect(first.locator(".chip-of")).to_have_text("no match")
        page.click("#screen-right")
        expect(first).to_have_count(0)
        all_saved(page)
        photos = dict(get(page, "/v1/label/answers"))["photos"]
        assert {Path(one["name"]).name: one["label"] for one in photos}[name] == label


@pytest.mark.parametrize("by", ["mouse", "keyboard", "phone"])
def test_a_visit_is_selected_and_labelled_at_once(labelling, tmp_path, by):
    """Frames of a visit differ by a shift, as those of a camera trap. Photos without a date have no visit."""
    folder = tmp_path / "traps"
    folder.mkdir()
    for at, label in enumerate(("crab", "pizza", "panda")):
        image = Image.open(caltech_photos("train", label, 1)[0]).convert("RGB")
        for frame in range(6):
            moved = image.crop((frame, 0, image.width - 6 + frame, image.height))
            time = None if label == "panda" else f"2026:01:02 0{at}:00:{frame:02}"
            (folder / f"{label} {frame}.jpg").write_bytes(encoded(time, image=moved))
    pool = {"": str(folder)} | {path.name: path.name.split()[0] for path in folder.iterdir()}
    names = sorted(name for name in pool if name)
    options = PHONE if by == "phone" else {}
    with labelling(pool, tmp_path / "things", **options) as (page, _):
        wait_until(page, "state.encoded === 18")
        give(page, {0: "crab", 6: "panda", 12: "pizza"})
        page.click("#tab-label")
        expect(page.locator("#label-photo img")).to_be_visible()
        page.click("#tab-classify")
        tiles = page.locator("#grid .tile[title^=crab]")
        expect(tiles).to_have_count(5)
        expect(tiles.first.locator(".visit")).to_have_text("× 6")
        expect(page.locator("#grid .tile[title^=panda] .visit").first).to_have_text("")
        if by == "keyboard":
            page.locator("#grid").focus()
            page.keyboard.press("Home")
            while not page.locator("#grid .tile.active").get_attribute("title").startswith("crab"):
                page.keyboard.press("ArrowRight")
            page.keyboard.press("Shift+ ")
        else:
            press = tiles.first.locator(".visit")
            press.tap() if by == "phone" else press.click()
        expect(page.locator("#selection-count")).to_have_text("5 selected")
        assert violations(page) == []
        if by == "keyboard":
            page.keyboard.type("lobster")
            page.keyboard.press("Enter")
        else:  # another class of a selected tile is for all of them
            other = tiles.last.locator(".others span").first
            label = other.get_attribute("data-label")
            if by == "mouse":
                tiles.last.hover()
            other.tap() if by == "phone" else other.click()
        expect(page.locator("#notice")).to_contain_text("Labelled 5 photos as ")
        wait_until(page, "!state.busy")
        answers = dict(get(page, "/v1/label/answers"))["photos"]
        found = {names[one["photo"]]: one["label"] for one in answers}
        wanted = "lobster" if by == "keyboard" else label
        assert {found[name] for name in names[1:6]} == {wanted}
        if by == "phone":  # a finger that begins at a mark selects all tiles on its way
            first, third = (page.locator("#grid .tile").nth(at).bounding_box() for at in (0, 2))
            tick = page.locator("#grid .tile .tick").first.bounding_box()
            session = page.context.new_cdp_session(page)

            def touch(kind, *points):
                points = [{"x": x, "y": y} for x, y in points]
                session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

            touch("touchStart", (tick["x"] + 12, tick["y"] + 12))
            for step in range(1, 5):
                x = first["x"] + (third["x"] - first["x"]) * step / 4
                touch("touchMove", (x + 12, third["y"] + 40))
            touch("touchEnd")
            session.detach()
            expect(page.locator("#selection-count")).to_have_text("3 selected")


def test_the_visit_of_a_photo_is_labelled_with_it(labelling, tmp_path):
    folder = tmp_path / "traps"
    folder.mkdir()
    for frame, path in enumerate(caltech_photos("train", "crab", 4)):
        image = Image.open(path).convert("RGB")
        data = encoded(f"2026:01:02 03:04:{frame:02}", image=image)
        (folder / f"{frame}.jpg").write_bytes(data)
    with labelling({"": str(folder)}, tmp_path / "things") as (page, _):
        wait_until(page, "!state.busy")
        page.reload()
        said = "Also label the 3 other photos of this visit"
        expect(page.locator("#label-too-text")).to_have_text(said)
        page.keyboard.press("+")
        page.keyboard.type("crab")
        page.keyboard.press("Enter")
        expect(page.locator("#label-progress")).to_contain_text("4 of 4 photos labelled.")


def test_a_dropped_video_has_one_answer_and_a_picture(page, labelling, tmp_path):
    pytest.importorskip("av", reason="SKIPPED: videos need PyAV; pip install '.[video]'")
    from test_video import write_clip

    shots = [
        np.asarray(Image.open(path).convert("RGB").resize((160, 120)))
        for path in (*caltech_photos("test", "panda", 1), *caltech_photos("test", "pizza", 3))
    ]
    clip = tmp_path / "clip.mp4"
    write_clip(clip, shots, rate=1)
    loaded = "image => image.src.startsWith('data:image/jpeg') && image.naturalWidth === 160"
    drop(page, clip)
    tile = page.locator("#grid .tile")
    expect(tile).to_contain_text("pizza")
    for place in ("#grid .tile img", "#drawer-picture img"):
        page.wait_for_function(f"({loaded})(document.querySelector({place!r}))")
    page.locator("#drawer-right").click()  # a new version, for which the video is asked again
    expect(page.locator("#notice")).to_contain_text("Added 4 example photos to pizza.")
    expect(tile).to_have_attribute("data-busy", "false")
    with labelling({"": str(clip)}, tmp_path / "things") as (page, _):
        wait_until(page, "!state.busy")
        page.reload()
        said = "Also label the 3 other photos of this visit"
        expect(page.locator("#label-too-text")).to_have_text(said)
        shown = "image => image.complete && image.naturalWidth === 160"
        for place in ("#label-photo img", "#label-similar-list img"):
            page.wait_for_function(f"({shown})(document.querySelector({place!r}))")
        write_clip(clip, shots[::-1] * 2, rate=1)
        drop(page, clip)
        expect(page.locator("#notice")).to_contain_text("Added 8 photos to the session.")


def test_dropped_photos_belong_to_the_session(labelling, pool, tmp_path):
    names, counted = sorted(name for name in pool if name), "#progress"
    more = {f"more {label}.jpg": caltech_photos("test", label, 1)[0] for label in LABELS}
    (tmp_path / "more").mkdir()
    for name, path in more.items():
        shutil.copy(path, tmp_path / "more" / name)
    dropped = sorted((tmp_path / "more").iterdir())
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    with labelling(pool, tmp_path / "things", expected=[f"{REFUSED}422"]) as (page, _):
        wait_until(page, "state.encoded === 90")
        drop(page, *dropped[:4])
        expect(page.locator("#notice")).to_contain_text("Added 4 photos to the session.")
        wait_until(page, "state.encoded === 94")
        give(page, {number: pool[names[number]] for number in range(0, 90, 4)})
        page.reload()
        expect(page.locator(counted)).to_contain_text("71 photos without a label")
        drop(page, *dropped, tmp_path / "damaged.jpg")
        expect(page.locator("#notice")).to_contain_text(
            "Added 6 photos to the session."
        )  # four for the second time
        expect(page.locator("#troubles")).to_contain_text("Skipped 1 file (not a readable image")
        expect(page.locator(counted)).to_contain_text("73 photos without a label")

        page.fill("#filter", "more crab")
        tile = page.locator("#grid .tile")
        expect(tile).to_have_count(1)
        expect(tile).to_have_attribute("title", "more crab.jpg")
        tile.click(modifiers=["Control"])
        page.locator("#selection-form input").fill("crab")
        page.keyboard.press("Enter")
        expect(page.locator(counted)).to_contain_text("72 photos without a label")
        wait_until(page, "!state.busy && !state.unsaved")
        page.reload()
        expect(page.locator(counted)).to_contain_text("72 photos without a label")
        answers = {
            Path(one["name"]).name: one for one in dict(get(page, "/v1/label/answers"))["photos"]
        }
        assert {*answers} == {*names, *more}
        assert answers["more crab.jpg"]["label"] == "crab"

        with zipfile.ZipFile(download(page, "zip")) as file:
            packed = {Path(name).name: file.read(name) for name in file.namelist()}
        assert packed == {name: (Path(pool[""]) / name).read_bytes() for name in names} | {
            name: path.read_bytes() for name, path in more.items()
        }
        rows = list(csv.DictReader(download(page, "csv").read_text().splitlines()))
        assert {Path(row["input"]).name: row["taught"] for row in rows}["more crab.jpg"] == "crab"
        assert len(rows) == 96

        page.fill("#finish-into", str(tmp_path / "sorted"))
        page.click("#finish-go")
        expect(page.locator("#finish-said")).to_contain_text("copied 96 photos")


WHOLE = """() => {
    const line = document.getElementById("bar").getBoundingClientRect().bottom;
    const isWhole = ({ top, bottom }) => top >= line && bottom <= innerHeight;
    const tiles = [...document.querySelectorAll("#grid .tile")].filter((one) => isWhole(one.getBoundingClientRect()));
    const open = tiles.filter(({ classList }) => !classList.contains("taught"));
    return Object.fromEntries(open.map((one) => [one.title, one.querySelector(".said").title]));
}"""
"""The answers on the screen that can be confirmed, by photo: those of photos that are whole in the window."""


def answers_of(page):
    """Return a dictionary that holds the latest answers that the page has received, by photo."""
    newest = {}

    def keep(route):
        response = route.fetch()
        photos = [one for one in response.json()["photos"] if one["guesses"]]
        newest.update({Path(one["name"]).name: one["guesses"][0]["label"] for one in photos})
        route.fulfill(response=response)

    page.route("**/v1/label/answers", keep)
    return newest


def correct(page, name, label):
    """Select a photo, and type its class."""
    page.locator(f'#grid .tile[title="{name}"] .tick').click()
    submit(page, "#selection-form input", label)
    expect(page.locator("#notice")).to_contain_text(f"Labelled 1 photo as {label}.")


def two_frames(page):
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


def test_answers_on_the_screen_stay_and_are_confirmed_as_they_were_shown(labelling, pool, tmp_path):
    """A person corrects some answers on a laptop, while the others on the screen are answered in another way."""
    names = sorted(name for name in pool if name)
    merged = {"camera": "accordion", "crayfish": "crab"}
    laptop = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "no-preference"}
    with labelling(pool, tmp_path / "things", **laptop) as (page, _):
        wait_until(page, "state.encoded === 90")
        give(
            page,
            {n: merged.get(pool[name], pool[name]) for n, name in enumerate(names) if n % 5 == 0},
        )
        newest = answers_of(page)
        page.click("#tab-classify")
        expect(page.locator("#grid .tile").nth(20)).to_be_visible()
        for label in merged:
            wrong = [name for name in page.evaluate(WHOLE) if pool[name] == label]
            for name in wrong[:2]:
                correct(page, name, label)
        first = page.evaluate(WHOLE)
        while sum(newest[name] != label for name, label in first.items()) < 3:
            page.wait_for_timeout(50)
        two_frames(page)
        assert page.evaluate(WHOLE) == first

        page.mouse.wheel(0, 60)
        page.wait_for_function("() => scrollY === 60")
        shown, box = page.evaluate(WHOLE), page.locator("#screen-right").bounding_box()
        sent = []
        page.on(
            "request", lambda request: sent.append(request) if request.method == "POST" else None
        )
        page.mouse.dblclick(
            box["x"] + 20, box["y"] + 10
        )  # the second click is not about the next screen
        expect(page.locator("#notice")).to_contain_text(f"Labelled {len(shown)} photos as")
        page.evaluate("() => Promise.all(document.getAnimations().map(({ finished }) => finished))")
        two_frames(page)
        assert page.evaluate("scrollY") == 60
        [change] = [request.post_data_json["labels"] for request in sent]
        assert {names[one["photo"]]: one["label"] for one in change} == shown
        following = page.evaluate(WHOLE)
        assert not following.keys() & shown.keys()
        assert {
            name: newest[name] for name in following
        } == following  # the next screen has the newest answers
        page.unroute_all(behavior="wait")


def test_new_answers_come_with_the_next_screen(labelling, pool, tmp_path):
    """The next screen comes by scrolling, with another order, or after a look at another page."""
    names = sorted(name for name in pool if name)
    merged = {"camera": "accordion", "crayfish": "crab"}
    with labelling(pool, tmp_path / "things", viewport={"width": 1280, "height": 560}) as (page, _):
        wait_until(page, "state.encoded === 90")
        give(
            page,
            {n: merged.get(pool[name], pool[name]) for n, name in enumerate(names) if n % 5 == 0},
        )
        newest = answers_of(page)
        page.click("#tab-classify")
        expect(page.locator("#grid .tile").nth(20)).to_be_visible()

        def learned(*wrong):
            """Correct photos, and return a photo on the screen that the server now answers in another way."""
            for name in wrong:
                correct(page, name, pool[name])
            shown = page.evaluate(WHOLE)
            while not (changed := [name for name, label in shown.items() if newest[name] != label]):
                page.wait_for_timeout(50)
            two_frames(page)
            assert page.evaluate(WHOLE) == shown
            return page.locator(f'#grid .tile[title="{changed[0]}"]'), newest[changed[0]]

        tile, label = learned(
            *(name for name, said in page.evaluate(WHOLE).items() if said != pool[name])
        )
        page.mouse.wheel(0, 560)
        expect(tile).to_have_attribute("data-label", label)
        page.mouse.wheel(0, -560)
        expect(tile).to_have_attribute("data-label", label)
        page.select_option("#filter-state", "all")
        all_new = page.locator("#grid .tile:not(.taught)").evaluate_all(
            "all => all.map((one) => [one.title, one.dataset.label])"
        )
        assert {name: newest[name] for name, _ in all_new} == dict(all_new)

        wait_until(page, "!state.busy")
        page.click("#tab-label")
        expect(page.locator("#label-class")).to_be_focused()
        label_by_key(page, pool[shown_photo(page)])
        wait_until(page, "!state.busy")
        held = hold(page, "**/v1/label/answers")
        page.click("#tab-classify")
        wait_for(page, held, 1)
        before = page.locator("#progress").text_content()
        page.press("#grid", "Shift+Enter")  # the answers on the screen are old
        two_frames(page)
        assert page.locator("#progress").text_content() == before
        expect(page.locator("#grid")).to_have_attribute("aria-busy", "true")
        assert violations(page) == []
        release(page, held)
        expect(page.locator("#grid")).to_have_attribute("aria-busy", "false")
        page.press("#grid", "Shift+Enter")
        expect(page.locator("#progress")).not_to_have_text(before)

        wait_until(page, "!state.busy && !state.unsaved")
        late = []
        page.route("**/v1/label/answers", lambda route: late.append((route, route.fetch())))
        tile = page.locator("#grid .tile:not(.taught)").first
        page.select_option("#filter-state", "rest")
        correct(page, name := tile.get_attribute("title"), pool[name])
        route, answer = wait_for(page, late, 1)  # of a moment before the next label
        correct(page, name := tile.get_attribute("title"), pool[name])
        held = hold(page, "**/v1/label/answers")
        route.fulfill(response=answer)
        wait_for(page, held, 1)
        expect(page.locator(f'#grid .tile[title="{name}"]')).to_have_count(0)
        release(page, held)


def earlier_first(page, field, less):
    """Send earlier answers first: subtract ``less`` from a field. Return a list that grows with each request."""
    asked = []

    def earlier(route):
        response = route.fetch()
        answer = response.json()
        if not asked:
            answer[field] -= less
        asked.append(route)
        route.fulfill(response=response, json=answer)
        if len(asked) == 1:
            expect(page.locator("#grid .tile").first).to_be_visible()

    page.route("**/v1/label/answers", earlier)
    return asked


def test_answers_of_an_earlier_version_are_shown_and_the_newest_are_asked_for(
    labelling, pool, tmp_path
):
    """The server sends earlier answers while it computes them. The page then asks once more."""
    names = sorted(name for name in pool if name)
    with labelling(pool, tmp_path / "things") as (page, _):
        wait_until(page, "state.encoded === 90")
        give(page, {n: pool[name] for n, name in enumerate(names) if n % 5 == 0})
        wait_until(page, "!state.busy && !state.unsaved")
        for field, less in (("version", 1), ("read", 9)):
            asked = earlier_first(page, field, less)
            page.click("#tab-classify")
            wait_for(page, asked, 2)
            expect(page.locator("#grid")).to_have_attribute("aria-busy", "false")
            page.wait_for_timeout(1500)  # the state is asked for again
            assert len(asked) == 2
            page.unroute_all(behavior="wait")
            page.click("#tab-label")


def status(page):
    """Return the state of the labelling session."""
    return dict(get(page, "/v1/label"))


def all_saved(page):
    """Wait until all labels are saved."""
    expect(page.locator("#label-saved")).to_have_text("All labels are saved in “things”.")


def test_another_encoder_is_offered_and_joined(serving, pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cnn(tmp_path / "efficientnet-lite0.pth", SHARED / "models/lit-mini")
    names = sorted(name for name in pool if name)
    command = (
        pool[""],
        "--out",
        tmp_path / "things",
        "--model",
        f"local-dir:{tiny(tmp_path / 'weak')}",
    )
    with serving(*command, command="label", ready="#label-progress") as (page, _):
        wait_until(page, "state.encoded === 90")
        offer = page.locator("#label-encoder")
        expect(offer).to_be_hidden()
        give(page, {number: pool[names[number]] for number in range(0, 90, 3)})
        give(page, {number: pool[names[number]] for number in range(1, 90, 3)})
        page.reload()
        expect(offer).to_contain_text("of 60 labelled photos are right")
        expect(page.get_by_role("button", name="Not now")).to_be_visible()
        assert violations(page) == []
        page.get_by_role("button", name="Use both encoders").click()
        expect(offer).to_be_hidden()
        all_saved(page)
        assert status(page)["labelled"] == 60
        label_by_key(page, "starfish")
        expect(page.locator("#label-progress")).to_contain_text("61 of 90 photos labelled.")
        all_saved(page)
        expect(page.locator("#label-problem")).to_be_empty()
        go(page, "settings")
        expect(page.locator("#about")).to_contain_text("efficientnet_lite0")


def test_letters_of_a_class_name_are_not_shortcuts(labelling, pool, tmp_path):
    with labelling(pool, tmp_path / "things") as (page, _):
        expect(page.locator("#label-saved")).to_have_text(
            ""
        )  # all photos are read, as on a second start
        unlabelled = status(page)
        sent = []

        def keep(route):
            if route.request.method == "POST":
                sent.append(route.request.post_data_json)
            route.fulfill(json=unlabelled)

        page.route("**/v1/label", keep)
        names = ["newt", "snake", "zebra", "ant"]
        for name in names:
            page.reload()
            expect(page.locator("#label-photo img")).to_be_visible()
            page.keyboard.type(name)
            with page.expect_response(lambda answer: answer.request.method == "POST"):
                page.keyboard.press("Enter")
        assert [[one["label"] for one in change["labels"]] for change in sent] == [
            [name] for name in names
        ]
        sent.clear()
        many = """async () => {
            const { session } = await import("/page/session.js");
            const steps = session.label(Array.from({ length: 1001 }, (_, photo) => [photo, "ant"]));
            for (const step of steps) session.undo(step);
        }"""
        page.evaluate(many)  # more photos than one request may label
        wait_for(page, sent, 4)
        assert [len(change.get("labels", [])) for change in sent] == [1000, 1, 0, 0]
        assert [change.get("undo") for change in sent[2:]] == [
            change["step"] for change in sent[:2]
        ]
        page.unroute("**/v1/label")
        page.reload()
        page.locator("#label-photo img").click()
        expect(page.locator("#label-class")).to_be_focused()
        page.keyboard.type("nobody")
        expect(page.locator("#label-meant")).to_have_text("Enter: new class “nobody”")
        page.keyboard.press("Escape")
        expect(page.locator("#label-class")).to_have_value("")
        for key in ("ArrowRight", "0"):
            first = shown_photo(page)
            page.locator("#label-stage").press(key)
            expect(page.locator("#label-photo img")).not_to_have_attribute("alt", first)
            expect(page.locator("#label-class")).to_be_focused()
        page.locator("#label-stage").focus()
        page.keyboard.type("crab")  # the field gets all letters
        page.keyboard.press("Enter")
        page.keyboard.type("sna")
        expect(
            page.locator("#label-choices .primary")
        ).to_be_visible()  # a guess appears while the name is typed
        page.keyboard.type("ke")
        page.keyboard.press("Enter")
        expect(page.locator("#label-progress")).to_contain_text("3 of 90")
        wait_until(page, "state.labelled === 3")
        assert status(page)["classes"] == {"crab": 1, "snake": 1}


def test_typed_text_means_an_existing_class_or_is_asked_about(labelling, pool, tmp_path):
    classes = "--classes", "crab,caterpillar,Sea_Horse,Panda,type 1"
    with labelling(pool, tmp_path / "things", *classes) as (page, _):

        def enter(text, *keys, number=None):
            """Type a text and press keys. Wait until ``number`` photos are labelled."""
            page.fill("#label-class", text)
            for key in keys:
                page.keyboard.press(key)
            if number is not None:
                expect(page.locator("#label-progress")).to_contain_text(f"{number} of 90")

        for number, text in enumerate(
            ("pan", "panda", "sea horse", "Sea-Ho", "type 2", "NONE OF THESE"), 1
        ):
            enter(text, "Enter", number=number)
        enter("cat", "Enter", number=7)
        enter("ca", "Shift+Enter", number=8)
        for text in ("crabs", "carb", "Crab"):
            enter(text, "Enter")
            expect(page.locator("#alike-dialog")).to_contain_text(f"New class “{text}”, or crab?")
            page.keyboard.type("nsz1")  # does nothing
            page.keyboard.press("Escape")
            expect(page.locator("#label-class")).to_have_value(text)
            expect(page.locator("#label-class")).to_be_focused()
        enter("Crab", "Enter", "2", number=9)
        page.fill("#label-class", "carb")
        for _ in range(3):  # a key that is held does not answer the question that it opened
            page.keyboard.down("Enter")
        page.keyboard.up("Enter")
        expect(page.get_by_role("button", name="New class “carb”")).to_be_focused()
        assert violations(page) == []
        page.keyboard.press("Enter")
        expect(page.locator("#label-progress")).to_contain_text("10 of 90")
        enter("crabs", "Enter", "Enter", number=11)  # the typed name is the default
        wait_until(page, "state.labelled === 11")
        assert {label: photos for label, photos in status(page)["classes"].items() if photos} == {
            "Panda": 2,
            "Sea_Horse": 2,
            "type 2": 1,
            "caterpillar": 1,
            "ca": 1,
            "crab": 1,
            "carb": 1,
            "crabs": 1,
        }


def test_steps_are_undone_in_order_and_after_a_reload(labelling, pool, tmp_path):
    with labelling(pool, tmp_path / "things") as (page, _):

        def shown(*, not_=None, name="", labelled):
            photo = expect(page.locator("#label-photo img"))
            photo.to_have_attribute("alt", name) if name else photo.not_to_have_attribute(
                "alt", not_ or ""
            )
            expect(page.locator("#label-progress")).to_contain_text(f"{labelled} of 90")
            return shown_photo(page)

        first = shown_photo(page)
        page.click("#label-skip")
        second = shown(not_=first, labelled=0)
        page.keyboard.type("crab")
        page.keyboard.press("Enter")
        third = shown(not_=second, labelled=1)
        page.keyboard.press("ArrowRight")
        shown(not_=third, labelled=1)
        assert page.locator("#label-last .name").all_text_contents() == [
            "skipped",
            "crab",
            "skipped",
        ]
        page.keyboard.press("ArrowLeft")
        shown(name=third, labelled=1)
        page.keyboard.press("ArrowLeft")
        shown(name=second, labelled=0)
        page.click("#label-undo")
        shown(name=first, labelled=0)
        expect(page.locator("#label-undo")).to_be_disabled()
        assert (status(page)["labelled"], status(page)["steps"]) == (0, [])
        submit(page, "#label-class", "crab")
        shown(not_=first, labelled=1)
        wait_until(page, "state.labelled === 1")
        page.reload()
        shown(not_=first, labelled=1)
        page.get_by_role(
            "button", name="Undo crab"
        ).click()  # not only the last answer can be undone
        shown(name=first, labelled=0)
        assert status(page)["queue"][0]["name"].endswith(first)


def test_refused_labels_are_named_and_can_be_corrected(labelling, pool, tmp_path):
    folder = shutil.copytree(pool[""], tmp_path / "photos")
    (folder / "damaged.jpg").write_bytes(b"no image")
    with labelling({"": str(folder)}, tmp_path / "things", expected=[REFUSED]) as (page, _):
        damaged = sorted(path.name for path in folder.iterdir()).index("damaged.jpg")
        give(page, {damaged: "crab"}, until="state.refused.length")
        page.reload()
        refused = page.locator("#label-refused")
        expect(refused).to_contain_text("damaged.jpg: The label “crab” could not be saved: ")
        expect(page.locator("#label-saved")).not_to_contain_text("All labels are saved")
        assert violations(page) == []
        refused.get_by_role("button", name="Drop it and show the photo").click()
        expect(refused).to_be_empty()
        wait_until(page, "!state.unsaved")
        state = status(page)
        photo = state["queue"][2]["photo"]
        name = Path(state["queue"][2]["name"]).name
        state["refused"] = [{"photo": photo, "name": name, "label": "crab", "reason": "full disk"}]
        page.route("**/v1/label", lambda route: route.fulfill(json=state), times=1)
        page.reload()
        expect(refused).to_contain_text(f"{name}: The label “crab” could not be saved: full disk")
        refused.get_by_role("button", name="Drop it and show the photo").click()
        expect(page.locator("#label-photo img")).to_have_attribute("alt", name)
        expect(refused).to_be_empty()
        page.route(
            "**/v1/label",
            lambda route: route.fulfill(status=422, json={"detail": "not a label"}),
            times=1,
        )
        submit(page, "#label-class", "crab")
        expect(page.locator("#label-problem")).to_contain_text("not a label")


def test_labels_are_kept_until_the_server_can_be_reached(labelling, browser, pool, tmp_path):
    """Photos are labelled and undone with their copies, also on a phone, whose page asks for the token first."""
    progress = "#label-progress"
    with labelling(pool, tmp_path / "things", expected=["Failed to load resource"]) as (page, _):
        page.route(
            "**/v1/label",
            lambda route: route.abort() if route.request.method == "POST" else route.continue_(),
        )
        for _ in range(3):
            label_by_key(page, "cat")
        last = shown_photo(page)
        label_by_key(page, "cat")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#label-photo img")).to_have_attribute("alt", last)
        expect(page.locator("#notice")).to_contain_text("5 changes are waiting. Trying again…")
        expect(page.locator(progress)).to_contain_text("3 of 90")
        page.unroute("**/v1/label")
        all_saved(page)
        expect(page.locator("#notice")).to_be_hidden()
        page.route("**/v1/label", lambda route: (time.sleep(1), route.continue_()))  # a slow server
        for _ in range(3):
            label_by_key(page, "cat")
        page.unroute("**/v1/label")
        expect(page.locator(progress)).to_contain_text("6 of 90")

        page.click("#label-none")
        expect(page.locator(progress)).to_contain_text("7 of 90")
        for _ in range(90):  # until a photo with a copy is shown
            if page.locator("#label-similar").is_visible():
                break
            label_by_key(page, pool[shown_photo(page)])
            page.wait_for_timeout(300)
        done = int((page.locator(progress).text_content() or "").split()[0])
        number = page.locator("#label-similar-list li").count()
        expect(page.locator("#label-similar label")).to_have_text(
            re.compile(r"^\s*\+\s+Also label")
        )
        page.keyboard.press("+")
        expect(page.locator("#label-too")).to_be_checked()
        page.locator("#label-choices button").first.click()
        expect(page.locator(progress)).to_contain_text(f"{done + 1 + number} of 90")
        page.keyboard.press("ArrowLeft")
        expect(page.locator(progress)).to_contain_text(f"{done} of 90")
        all_saved(page)

        token, address = (
            page.evaluate("sessionStorage.getItem('retrieval-tip token')"),
            page.url.partition("/#")[0],
        )
        options = PHONE | {"reduced_motion": "no-preference"}
        one = Opened(browser, address, ready="#token-title", expected=[f"{REFUSED}401"], **options)
        page = one.page
        expect(page.locator("#token-dialog")).to_contain_text("retrieval-tip label printed")
        submit(page, "#token", "wrong")
        expect(page.locator("#token-refused")).to_be_visible()
        submit(page, "#token", token)
        page.wait_for_function("() => document.querySelector('#label-photo img')?.naturalWidth")
        page.evaluate(
            """() => new MutationObserver((all) => {
                const added = all.flatMap(({ addedNodes }) => [...addedNodes]);
                window.slid ||= added.some(({ className }) => className === "sliding");
            }).observe(document.body, { childList: true })"""
        )
        page.fill("#label-class", "crab")
        page.get_by_role("button", name="Label", exact=True).tap()
        expect(page.locator(progress)).to_contain_text(f"{done + 1} of 90")
        page.locator("#label-choices button").first.tap()
        expect(page.locator(progress)).to_contain_text(f"{done + 2} of 90")
        page.wait_for_function(
            "() => window.slid && !document.querySelector('.sliding')"
        )  # the slide has ended
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert violations(page) == []
        one.close()


SCREENS = ("classify", "label", "classes", "check", "map", "history", "settings", "teach")


def printed(page, *screens):
    """Return the commands on screens of the page, by default on the one that is shown."""
    found = set()
    for screen in screens or [""]:
        if screen:
            page.evaluate("screen => (location.hash = screen)", screen)
            expect(page.locator(f"#{screen}-view")).to_be_visible()
        found |= {
            text
            for text in page.locator("code:visible").all_text_contents()
            if text.startswith("retrieval-tip ")
        }
    return found


def test_every_command_on_the_page_runs_as_it_is_printed(
    labelling, serving, tmp_path, monkeypatch, warm_path
):
    """The index and the photos have other names than in examples, and the terminal is in another folder."""
    photos = tmp_path / "my photos"
    elsewhere = tmp_path / "elsewhere"
    class_folders(photos, "crab", "panda", "pizza", each=6)
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PATH": f"{warm_path}:{os.environ['PATH']}"}

    def execute(*commands):
        for command in commands:
            done = subprocess.run(
                command, shell=True, cwd=elsewhere, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, (command, done.stderr)

    index = Path("indexes", "it's clothes")
    wrong = photos / "panda" / "a pizza.jpg"
    shutil.copy(caltech_photos("test", "pizza", 9)[-1], wrong)
    ok("index build", "my photos", "--out", index, *MODEL)
    with serving(index) as (page, _):
        assert not printed(page, *(name for name in SCREENS if name != "label"))
        page.evaluate("location.hash = 'check'")
        page.check("#audit-all")
        page.locator("#audit").get_by_role("button", name="Change to").first.click()
        expect(page.locator("#audit-next")).to_be_visible()
        [command] = printed(page, *(name for name in SCREENS if name != "label"))
        execute(command)
        assert sum(1 for _ in elsewhere.glob("fixed/*/*.jpg")) == 19

    with labelling({"": "my photos"}, Path("indexes", "other")) as (page, _):
        wait_until(page, "state.encoded === 19")
        give(
            page,
            {n: path.parent.name for n, path in enumerate(sorted(photos.glob("*/*.jpg"))) if n % 2},
        )
        assert not printed(page, *SCREENS)
        page.evaluate("location.hash = 'classify'")
        page.click("#finish-open")
        page.fill("#finish-into", "in folders")
        page.click("#finish-go")
        expect(page.locator("#finish-said")).to_contain_text("copied 19 photos")
        [undo_copies] = printed(page)
        page.check("#finish-xmp")
        page.click("#finish-go")
        expect(page.locator("#finish-said")).to_contain_text("changed the keywords of")
        [undo_keywords] = printed(page)
        written = [*tmp_path.glob("in folders/*/*.jpg"), *photos.glob("*/*.xmp")]
        execute(undo_copies, undo_keywords)
        assert len(written) > 20
        assert not any(path.exists() for path in written)


@pytest.mark.parametrize("size", [(390, 844), (360, 640)])
def test_a_phone_shows_the_photo_with_all_its_buttons_and_the_whole_estimate(
    labelling, pool, tmp_path, size
):
    names = sorted(name for name in pool if name)
    phone = PHONE | {"viewport": dict(zip(("width", "height"), size, strict=True))}
    with labelling(pool, tmp_path / "things", **phone) as (page, _):
        wait_until(page, "state.encoded === 90")
        give(page, {n: pool[name] for n, name in enumerate(names) if n % 4 == 0})
        page.reload()
        expect(page.locator("#label-choices button")).to_have_count(3)
        buttons = "#label-choices button, #label-class, #label-form button, #label-skip, #label-none, #label-undo"
        for one in [*page.locator(buttons).all(), page.locator("#label-classes button").first]:
            expect(one).to_be_in_viewport(ratio=1)
        photo = page.locator("#label-photo img").bounding_box()
        assert photo["height"] >= 144
        assert photo["y"] + photo["height"] <= page.locator(".label-side").bounding_box()["y"]
        page.locator("#label-classes button").last.tap()
        expect(page.locator("#label-progress")).to_contain_text("24 of 90")
        others = {"others": "1,010 to 1,259 of the other 4,240 photos are wrong (about 1,130)"}
        page.route("**/v1/label", lambda route: route.fulfill(json=route.fetch().json() | others))
        page.reload()

        def shows_it_all(place):
            expect(page.locator(place)).to_contain_text(
                "1 010 to 1 259 of the other 4 240 photos are wrong (about 1 130)"
            )
            assert page.locator(place).evaluate(
                """one => {
                    const lines = document.createRange();
                    lines.selectNodeContents(one);
                    const [inner, outer] = [lines, one].map((place) => place.getBoundingClientRect());
                    return inner.right <= Math.min(outer.right, innerWidth) + 1 && inner.bottom <= outer.bottom + 1;
                }"""
            )

        shows_it_all("#label-progress")
        page.click("#tab-classify")
        shows_it_all("#progress")
        page.locator("#finish-open").tap()
        shows_it_all("#finish-said")
        page.click("#finish-close")
        page.locator("#screen-right").tap()
        box, bar = page.locator("#notice").bounding_box(), page.locator("#bar").bounding_box()
        assert box["y"] + box["height"] <= bar["y"] + bar["height"]  # it covers no photo
        assert violations(page) == []
        page.click("#tab-classes")
        expect(page.locator("#index-accuracy")).to_contain_text("on the examples (")
        name, link = (
            page.locator(one).bounding_box() for one in ("#index-name", "#index-accuracy")
        )
        assert 64 < name["width"] <= link["x"] - name["x"]
        page.unroute_all(behavior="wait")


def test_the_keys_of_a_screen_are_shown_by_a_button(labelling, pool, tmp_path):
    with labelling(pool, tmp_path / "things") as (page, _):
        wait_until(page, "state.encoded === 90")
        give(page, {0: pool["000.jpg"], 20: pool["020.jpg"]})
        page.reload()
        expect(page.locator("#label-choices button").first).to_be_visible()
        for screen, keys in (
            ("label", "none of these"),
            ("classify", "Shift Enter"),
            ("classes", "Delete"),
        ):
            page.click(f"#tab-{screen}")
            page.click("#keys")
            expect(page.locator("#key-list dl:visible")).to_have_count(1)
            expect(page.locator("#key-list")).to_contain_text(keys)
            assert violations(page) == []
            page.keyboard.press("Escape")
            expect(page.locator("#key-list")).to_be_hidden()
        page.click("#tab-check")  # whose buttons have their keys
        expect(page.locator("#keys")).to_be_hidden()


def test_the_zip_has_the_folders_of_sort(serving, tmp_path):
    classes = {"pizza": "a/b", "panda": "a:b", "crab": "No match"}
    names = ["con.jpg", "a?.jpg", "100%41 .jpg"]
    rows = [
        (path, label)
        for name, label in classes.items()
        for path in caltech_photos("train", name, 8)
    ]
    build(SHARED, tmp_path / "index", rows)
    (tmp_path / "inbox").mkdir()
    images = [
        tmp_path / "inbox" / name for name in [*names, *(f"{number}.jpg" for number in range(4))]
    ]
    sources = [
        *(caltech_photos("test", name, 1)[0] for name in classes),
        *caltech_photos("train", "stop_sign", 4),
    ]
    for source, image in zip(sources, images, strict=True):
        shutil.copy(source, image)
    ok("sort", tmp_path / "index", tmp_path / "inbox", "--into", tmp_path / "sorted")
    expected = {
        str(path.relative_to(tmp_path / "sorted")) for path in (tmp_path / "sorted").glob("*/*")
    }
    assert {name.partition("/")[0] for name in expected} >= {
        "a%2Fb",
        "a%3Ab",
        "%4Eo match",
        "no match",
    }
    with serving(tmp_path / "index") as (page, _):
        ask(page, *images)
        assert {*zipfile.ZipFile(download(page, "zip")).namelist()} == expected


def test_the_accuracy_links_to_the_weakest_class(page):
    found = get(page, "/v1/indexes/things/accuracy")
    low, high = found["interval"]
    shown = (
        f"{100 * found['both']:.0f} % accurate on the examples ({100 * low:.0f}–{100 * high:.0f})"
    )
    expect(page.locator("#index-accuracy")).to_have_text(shown)
    page.click("#index-accuracy")
    weakest, (label, right, photos) = page.locator("#classes-list li").first, found["weakest"][0]
    expect(weakest).to_contain_text(f"{right} of {photos} right")
    weakest.hover()
    weakest.get_by_role("button", name=f"Add photos of {label}").click()
    expect(page.locator(".class-card input[type=text]").first).to_have_value(label)
    expect(page.locator("#teach-old")).to_be_checked()
    page.go_back()
    expect(page.locator("#classes-view")).to_be_visible()
    page.route(
        "**/accuracy", lambda route: route.fulfill(json=found | {"tested": 3, "classes": 10})
    )
    page.reload()
    said = re.compile(r"^Only 3 of 10 classes could be tested\. Accuracy on the examples: ")
    expect(page.locator("#index-judged")).to_have_text(said)
    page.unroute_all(behavior="wait")


def test_classifiers_are_renamed_duplicated_and_deleted(serving, served, tmp_path):
    """This works in the classifier's menu, with mouse and keyboard. Refused names are reported in one message."""
    folder = shutil.copytree(served.folder, tmp_path / "things")
    with serving(folder, expected=[f"{REFUSED}409", f"{REFUSED}422"]) as (page, _):
        name, notice = page.locator("#index-name"), page.locator("#notice")

        def rename(to, said):
            name.click()
            page.click("#index-rename")
            page.fill("#rename-label", to)
            if to == "animals":
                assert violations(page) == []
            page.keyboard.press("Enter")
            expect(notice).to_contain_text(said)

        suspects, number = open_audit(page)
        suspects.last.get_by_role("button", name="Keep").click()
        expect(suspects).to_have_count(number - 1)
        rename("<b>animals", "is not valid")
        rename("things-shots", "ends like a folder of photos")
        rename("animals", "Renamed “things” to “animals”.")
        page.reload()
        expect(name).to_have_text("animals")
        page.click("#tab-check")
        page.check("#audit-all")
        expect(suspects).to_have_count(number - 1)

        tab_to(page, name)
        page.keyboard.press("Enter")
        expect(page.locator("#index-menu")).to_contain_text("11 classes")
        assert violations(page) == []
        tab_to(page, page.locator("#index-duplicate"))
        page.keyboard.press("Enter")
        expect(page.locator("#rename-label")).to_have_value("animals copy")
        page.keyboard.press("Enter")
        expect(notice).to_contain_text("Duplicated “animals” as “animals copy”.")
        expect(name).to_have_text("animals copy")
        assert {path.name for path in tmp_path.iterdir()} == {"animals", "animals copy"}
        rename("animals", "already exists")
        choose(page, "animals")

        name.click()
        page.click("#index-delete")
        expect(page.locator("#confirm-dialog")).to_contain_text("You cannot undo this.")
        assert violations(page) == []
        page.click("#confirm-cancel")
        for left in ("animals", "animals copy"):
            expect(name).to_have_text(left)
            name.press("Enter")
            page.locator("#index-delete").press("Enter")
            tab_to(page, page.locator("#confirm-ok"))
            page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text(
            "no classifier"
        )  # nor an encoder to create one
        assert list(tmp_path.iterdir()) == []


def test_the_accuracy_counts_up_unless_motion_is_reduced(opened):
    for motion, steps in (("no-preference", [94, 95, 96]), ("reduce", [])):
        page = opened(reduced_motion=motion)
        version = things(page)["version"]

        def estimate(before, route):
            now = route.fetch().json()
            both = 0.93 if now["version"] == before else 0.97
            route.fulfill(json=now | {"both": both, "interval": [both - 0.02, both + 0.02]})

        page.route("**/accuracy", functools.partial(estimate, version))
        page.reload()
        accuracy = page.locator("#index-accuracy")
        expect(accuracy).to_have_text("93 % accurate on the examples (91–95)")
        page.evaluate(
            """() => {
                const element = document.getElementById("index-accuracy"), seen = (window.seen = []);
                const see = () => seen.push(parseInt(element.textContent));
                new MutationObserver(see).observe(element, { childList: true });
            }"""
        )
        ask(page, *caltech_photos("test", "pizza", 1))
        page.press("#drawer", "Enter")
        expect(accuracy).to_have_text("97 % accurate on the examples (95–99)")
        assert [
            number for number in page.evaluate("window.seen") if number not in (93, 97)
        ] == steps
        undo(page)
        page.unroute_all(behavior="wait")


def test_an_uncertain_photo_shows_the_group_that_is_sure(opened, served, tmp_path):
    page = opened()
    groups = tmp_path / "groups.csv"
    version = things(page)["version"]
    groups.write_text(
        "class,kind\n" + "".join(f"{label},photographed thing\n" for label in CLASSES)
    )
    ok("index set", served.folder, "--groups", groups)
    while things(page)["version"] == version:
        time.sleep(0.1)
    go(page, "settings")
    expect(page.locator("#about")).to_contain_text("Groups: kind.")
    page.click("#tab-classify")
    ask(page, *(photo for label in CLASSES for photo in caltech_photos("test", label, 2)))
    tiles = page.locator("#grid .tile:not(.no_match)")
    shown = tiles.evaluate_all(
        "all => all.map(({ dataset, children }) => [dataset.label, +dataset.probability, children[1].title])"
    )
    assert all(said == (label if p >= 0.9 else "photographed thing") for label, p, said in shown)
    assert len({said == label for label, _, said in shown}) == 2
    tiles.filter(has_text="photographed").first.click()
    expect(page.locator("#drawer-notes")).to_contain_text("The kind is photographed thing, ")
    change(page, "rollback", to=version)
