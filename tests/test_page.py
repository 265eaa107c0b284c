"""The page, in a real Chromium, against a real server that the real command line started."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from browser import PATIENCE, chromium, contrast, drop
from click.testing import CliRunner
from conftest import ROOT, SHARED
from playwright.sync_api import Browser, Page, Route, expect
from serving import server

from retrieval_tip.cli import main

pytestmark = pytest.mark.soak

CLASSES = ["accordion", "butterfly", "camera", "crab", "crayfish", "dalmatian", "lobster", "panda", "pizza", "starfish"]
HOSTILE = '<img src=x onerror="document.title=1">'
TOKEN = "a token"
SCREENSHOTS = ROOT / "build" / "screenshots"
IMAGES = SHARED / "data" / "caltech101" / "101_ObjectCategories"

if not SHARED.is_dir():
    pytest.skip(f"SKIPPED: no shared data at {SHARED}", allow_module_level=True)

SPLIT = json.loads((IMAGES.parent / "split_zhou_Caltech101.json").read_text())


def photographs(part: str, label: str, number: int) -> list[Path]:
    return [IMAGES / path for path, _, name in SPLIT[part] if name == label][:number]


def build(*arguments: object) -> None:
    built = CliRunner().invoke(main, ["index", "build", *map(str, arguments)])
    assert built.exit_code == 0, built.output


class Served(NamedTuple):
    folder: Path
    address: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, encodings: Path) -> Iterator[Served]:
    """A server of an index of ten classes of eight shots, and one that is markup; and of an index of features alone."""
    place = tmp_path_factory.mktemp("page")
    rows = [(path, label) for label in CLASSES for path in photographs("train", label, 8)]
    for number, path in enumerate(photographs("train", "anchor", 2)):
        link = place / f"{number}{HOSTILE}.jpg"
        link.symlink_to(path)
        rows.append((link, HOSTILE))
    with (place / "shots.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    folder = place / "things"
    food, features = place / "food <b>1", SHARED / "data" / "clip-food9"
    model = SHARED / "models" / "lit-mini"
    build(place / "shots.csv", "--model", f"local-dir:{model}", "--out", folder)
    build(features / "train.parquet", "--text", features / "text.parquet", "--shots", 4, "--out", food)
    with server(folder, food, "--uploads", place / "uploads", "--device", "cpu", token=TOKEN) as (address, _):
        yield Served(folder, address)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


class Opened:
    """A page that was opened, and what it should not have done. ``expected`` starts console errors that it may show."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        options = {"viewport": {"width": 1200, "height": 900}, "reduced_motion": "reduce"} | options
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.expected: list[str] = []
        self.wrong: list[str] = []
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda message: message.type == "error" and self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(f"uncaught: {error}"))
        self.page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "blob:")) or self.wrong.append(f"request to {request.url}")
            ),
        )
        self.page.goto(address)
        expect(self.page.locator("#index-facts")).to_contain_text("keys")


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Browser, served: Served) -> Iterator[Open]:
    """Opens pages. Nothing that they did was wrong: no error on the console, no request elsewhere."""
    expect.set_options(PATIENCE)
    pages = []

    def start(**options: Any) -> Opened:
        pages.append(Opened(browser, served.address, **options))
        return pages[-1]

    yield start
    for one in pages:
        one.context.close()
        assert [text for text in one.wrong if not text.startswith(tuple(one.expected))] == []


def classified(page: Page, number: int = 1) -> dict[str, Any]:
    """What the first card says, once so many are there and none is at work."""
    expect(page.locator(".card")).to_have_count(number)
    expect(page.locator('.card[aria-busy="false"]')).to_have_count(number)
    return answer(page)


def answer(page: Page) -> dict[str, Any]:
    return page.locator(".card").first.evaluate(
        """async card => {
            await new Promise(requestAnimationFrame);  // settings that were moved are shown with the next frame
            const value = (cell) => Number(cell.dataset.value);
            const part = (row, name) => value(row.querySelector(`td.${name}-part`));
            const rows = [...card.querySelectorAll("tbody tr")];
            return {
                label: card.dataset.label, how: card.dataset.how,
                probability: Number(card.dataset.probability),
                text_logit: Number(card.dataset.textLogit), cache_logit: Number(card.dataset.cacheLogit),
                labels: rows.map((row) => row.dataset.label),
                probabilities: rows.map((row) => value(row.querySelector(".p"))),
                logits: rows.map((row) => part(row, "text") + part(row, "cache")),
                neighbours: [...card.querySelectorAll(".neighbours li")].map((item) => ({
                    key_id: Number(item.dataset.keyId), affinity: value(item.querySelector(".affinity")),
                    weight: value(item.querySelector(".weight")), label: item.querySelector(".name").textContent,
                    beyond: item.classList.contains("beyond"),
                })),
            };
        }"""
    )


def setting(page: Page, name: str) -> str:
    return page.locator(f"#{name}").get_attribute("data-value") or ""


def assert_same(page: Page, run: Callable[..., Any], folder: Path, image: Path, *options: object) -> None:
    """The first card says what the command line does of the image with these options."""
    told = run("classify", folder, image, *options, "--top", 8, "--explain", "--logits", "--format", "json")
    assert told.exit_code == 0, told.output
    right = json.loads(told.stdout)
    shown = answer(page)
    close = {"rel": 1e-3, "abs": 1e-6}
    assert shown["how"] == "page"  # computed there, not asked
    assert shown["label"] == right["label"]
    for name in ("probability", "text_logit", "cache_logit"):
        assert shown[name] == pytest.approx(right[name], **close), name
    assert shown["labels"] == right["labels"]
    assert shown["probabilities"] == pytest.approx(right["probabilities"], **close)
    assert shown["logits"] == pytest.approx(sorted(right["logits"], reverse=True)[:8], rel=1e-3, abs=1e-3)
    counted = [key for key in shown["neighbours"] if not key["beyond"]]
    for mine, other in zip(counted, right["neighbours"], strict=True):
        assert (mine["key_id"], mine["label"]) == (other["key_id"], other["label"])
        assert [mine["affinity"], mine["weight"]] == pytest.approx([other["affinity"], other["weight"]], rel=1e-3)


def screenshot(page: Page, name: str, *, full: bool = False) -> None:
    page.wait_for_load_state("networkidle")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full)


def test_dropped_photograph_and_settings_agree_with_the_command_line(
    opened: Open, served: Served, run: Callable[..., Any]
) -> None:
    page = opened().page
    [image] = photographs("test", "crayfish", 1)
    drop(page, image)
    shown = classified(page)
    assert shown["label"] == "crayfish"
    assert_same(page, run, served.folder, image)
    screenshot(page, "classify-light")

    page.fill("#beta", "5.5")
    assert_same(page, run, served.folder, image, "--beta", 5.5)
    page.focus("#beta-slider")
    page.keyboard.press("PageUp")
    assert float(setting(page, "beta")) > 5.5
    expect(page.locator("#beta")).not_to_have_value("5.5")
    assert_same(page, run, served.folder, image, "--beta", setting(page, "beta"))
    screenshot(page, "classify-settings")

    page.click("#reset")
    assert_same(page, run, served.folder, image)
    page.fill("#alpha", "1234.5")
    assert_same(page, run, served.folder, image, "--alpha", 1234.5)
    page.focus("#alpha-slider")
    page.keyboard.press("Home")
    assert setting(page, "alpha") == "0"
    assert_same(page, run, served.folder, image, "--alpha", 0)  # the text alone

    page.click("#reset")
    page.fill("#k", "5")
    assert_same(page, run, served.folder, image, "-k", 5, "--tail")
    page.uncheck("#tail")
    assert_same(page, run, served.folder, image, "-k", 5, "--no-tail")
    page.fill("#k", "2")
    expect(page.locator(".neighbours .beyond")).to_have_count(3)
    page.focus("#k-slider")
    page.keyboard.press("ArrowRight")
    assert setting(page, "k") == "3"
    assert_same(page, run, served.folder, image, "-k", 3, "--no-tail")
    page.keyboard.press("End")
    assert setting(page, "k") == "all"
    expect(page.locator("#tail")).to_be_disabled()
    assert_same(page, run, served.folder, image, "-k", "all")


def test_settings_that_are_no_numbers_change_nothing(opened: Open) -> None:
    page = opened().page
    own = setting(page, "beta")
    for wrong in ("-1", ""):
        page.fill("#beta", wrong)
        expect(page.locator("#beta")).to_have_attribute("aria-invalid", "true")
        assert setting(page, "beta") == own
    page.keyboard.press("Tab")
    expect(page.locator("#beta")).not_to_have_value("")
    page.fill("#k", "1.5")
    assert setting(page, "k") == "all"


def test_method_agrees_with_a_dense_reference(opened: Open) -> None:
    page = opened().page
    random = np.random.default_rng(0)
    cases, expected = [], []
    for _ in range(200):
        n, c = int(random.integers(1, 60)), int(random.integers(1, 12))
        affinities = np.sort(np.round(random.uniform(-0.2, 1, n), int(random.integers(1, 17))))[::-1]  # rounded: ties
        class_ids = random.integers(0, c, n)
        one_hot = np.eye(c)[class_ids]
        text = random.normal(0, 10, c) * int(random.integers(0, 2))
        k = "all" if random.random() < 0.3 else int(random.integers(1, n + 3))
        alpha = float(random.choice([0, 1, 10 ** random.uniform(-2, 5)]))
        settings = {
            "alpha": alpha,
            "beta": float(random.choice([0, 5.5, 40])),
            "k": k,
            "tail": bool(random.random() < 0.5),
        }
        temperature = float(random.choice([1, 0.3]))
        counted = n if k == "all" else min(k, n)
        cache = np.exp(-settings["beta"] * (1 - affinities[:counted])) @ one_hot[:counted]
        left = one_hot[counted:].sum(0)
        if settings["tail"] and k != "all":
            mean = (affinities[counted:] @ one_hot[counted:]) / np.maximum(left, 1)
            cache += left * np.exp(-settings["beta"] * (1 - mean))
        logits = text + alpha * cache
        powers = np.exp((logits - logits.max()) / temperature)
        order = np.argsort(-logits, kind="stable")
        expected.append((logits, powers / powers.sum(), text, alpha * cache, order[:3]))
        evidence = {
            "feature": [], "text": text.tolist(),
            "key_ids": [], "class_ids": class_ids.tolist(), "affinities": affinities.tolist(),
            "counts": one_hot.sum(0).tolist(), "sums": (affinities @ one_hot).tolist(), "complete": True,
        }  # fmt: skip
        cases.append([evidence, settings, temperature])
    found = page.evaluate(
        """async cases => {
            const { classify, evidenceOf } = await import("/page/method.js");
            return cases.map(([evidence, ...rest]) => classify(evidenceOf(evidence), ...rest, 3));
        }""",
        cases,
    )
    for rows, (logits, probabilities, text, cache, order) in zip(found, expected, strict=True):
        ids = [row["classId"] for row in rows]
        assert len(ids) == len(order)
        assert logits[ids] == pytest.approx(logits[order], rel=1e-9, abs=1e-9)  # sums in another order may swap ties
        assert [row["probability"] for row in rows] == pytest.approx(probabilities[ids], rel=1e-6, abs=1e-12)
        assert [row["text"] for row in rows] == pytest.approx(text[ids])
        assert [row["cache"] for row in rows] == pytest.approx(cache[ids], rel=1e-9, abs=1e-9)


def test_wrong_answer_becomes_a_shot_and_back(opened: Open, served: Served, run: Callable[..., Any]) -> None:
    one = opened()
    page = one.page
    one.expected = ["Failed to load resource: the server responded with a status of 401"]
    crabs = photographs("test", "crab", 10)
    told = run("classify", served.folder, *crabs, "--format", "json").stdout.splitlines()
    image = next((Path(row["input"]) for row in map(json.loads, told) if row["label"] != "crab"), None)
    assert image is not None, "all are right"
    [pizza] = photographs("test", "pizza", 1)
    drop(page, image, pizza)
    before = classified(page, 2)
    assert before["label"] != "crab"
    version = page.request.get(f"{served.address}/v1/indexes/things").json()["version"]

    card = page.locator(".card").first
    card.get_by_text("This is wrong").click()
    card.get_by_label("It is").fill("crab")
    card.get_by_role("button", name="Add as shot of crab").click()
    page.fill("#token", "not the token")
    page.keyboard.press("Enter")
    expect(page.locator("#token-refused")).to_be_visible()
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    expect(card.locator(".notice")).to_contain_text("Added as shot of crab")
    expect(card.locator("h2")).to_have_text("crab")
    expect(card.locator(".was")).to_contain_text(f"was {before['label']}")
    expect(card.locator(".neighbours li").first.locator(".affinity")).to_contain_text("1.000")
    classified(page, 2)
    assert_same(page, run, served.folder, image)
    expect(page.locator("#index-facts")).to_contain_text(f"version {version + 1}")
    screenshot(page, "classify-added")

    card.get_by_role("button", name="Undo").click()
    expect(card.locator(".notice")).to_contain_text("Undone")
    expect(card.locator("h2")).to_have_text(before["label"])
    assert classified(page, 2)["probability"] == pytest.approx(before["probability"], rel=1e-3)
    expect(card.locator(".was")).to_contain_text("was crab")

    card.get_by_label("It is").fill("sea spider")  # a new class, and the token is known by now
    expect(card.get_by_text("A new class")).to_be_visible()
    card.get_by_role("button", name="Add as shot of sea spider").click()
    expect(card.locator("h2")).to_have_text("sea spider")
    card.get_by_role("button", name="Undo").click()
    expect(card.locator("h2")).to_have_text(before["label"])


def test_hostile_names_are_text(opened: Open) -> None:
    page = opened().page
    [anchor] = photographs("train", "anchor", 1)  # one of the two shots of the hostile class
    drop(page, anchor, names=[f"{HOSTILE}.jpg"])
    assert classified(page)["label"] == HOSTILE
    expect(page.locator(".card h2")).to_have_text(HOSTILE)
    expect(page.locator(".card .file")).to_have_text(f"{HOSTILE}.jpg")
    page.locator(".card").get_by_text("This is wrong").click()
    page.locator(".card").get_by_label("It is").fill(HOSTILE)
    expect(page.get_by_role("button", name=f"Add as shot of {HOSTILE}")).to_be_enabled()
    page.click("#tab-index")
    page.fill("#shots-class", HOSTILE)
    expect(page.locator("#shots li")).to_have_count(2)
    expect(page.locator("#shots .name").first).to_have_text(HOSTILE)
    expect(page.locator("#shots .source").first).to_contain_text(HOSTILE)
    page.locator("#shots button").first.click()
    expect(page.locator("#confirm-shot .name")).to_have_text(HOSTILE)
    page.click("#confirm-cancel")
    assert page.locator("img[src=x]").count() == 0
    assert page.title() != "1"


def test_classifying_with_the_keyboard_alone(opened: Open) -> None:
    page = opened().page
    focused = page.locator(":focus")
    page.on("filechooser", lambda _: None)  # from now on: the browser is told in its own time
    page.keyboard.press("Tab")
    expect(focused).to_have_class("skip")
    page.keyboard.press("Enter")
    expect(focused).to_have_id("main")
    page.keyboard.press("Tab")
    expect(focused).to_have_id("choose")
    assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"  # the focus can be seen
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photographs("test", "panda", 1))
    before = classified(page)
    assert before["label"] == "panda"
    expect(page.locator("#live")).to_contain_text("panda")  # said aloud
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(focused).to_have_id("alpha-slider")
    page.keyboard.press("ArrowLeft")
    assert answer(page)["cache_logit"] < before["cache_logit"]
    page.focus("#tab-classify")
    page.keyboard.press("ArrowRight")
    expect(focused).to_have_id("tab-index")
    expect(page.locator("#index-view")).to_be_visible()
    expect(page.locator("#tab-index")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#classify-view")).to_be_visible()
    page.get_by_role("button", name="Take image_").press("Enter")
    expect(page.locator(".card")).to_have_count(0)
    expect(focused).to_have_id("choose")


def test_pasted_image(opened: Open) -> None:
    page = opened().page
    page.click("#tab-index")
    [image] = photographs("test", "accordion", 1)
    page.evaluate(
        """bytes => {
            const clipboardData = new DataTransfer();
            const paste = { clipboardData, bubbles: true, cancelable: true };
            clipboardData.items.add(new File([Uint8Array.from(bytes)], "pasted.jpg", { type: "image/jpeg" }));
            document.body.dispatchEvent(new ClipboardEvent("paste", paste));
        }""",
        list(image.read_bytes()),
    )
    assert classified(page)["label"] == "accordion"
    expect(page.locator("#classify-view")).to_be_visible()


def test_many_images_at_once(opened: Open) -> None:
    one = opened()
    page = one.page
    page.evaluate(
        """() => {
            const [make, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
            window.urls = 0;
            URL.createObjectURL = (file) => (window.urls++, make(file));
            URL.revokeObjectURL = (url) => (window.urls--, revoke(url));
        }"""
    )
    uploads = {"now": 0, "most": 0}

    def count(by: int) -> Callable[[Any], None]:
        def counted(request: Any) -> None:
            if "/v1/classify" in request.url:
                uploads["now"] += by
                uploads["most"] = max(uploads["most"], uploads["now"])

        return counted

    page.on("request", count(1))
    page.on("requestfinished", count(-1))
    images = [path for label in CLASSES for path in photographs("test", label, 2)]
    drop(page, *images)
    classified(page, len(images))
    assert 1 <= uploads["most"] <= 4
    right = page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.label)")
    assert sum(a == b for a, b in zip(right, np.repeat(CLASSES, 2), strict=True)) >= 16  # in the order they came
    page.locator(".card").last.scroll_into_view_if_needed()
    expect(page.locator("#progress")).to_have_text("20 images")
    for card in page.locator(".card .preview").all():
        card.scroll_into_view_if_needed()
    assert page.evaluate("() => window.urls") == 0  # every object URL was given back
    page.fill("#alpha", "0")
    expect(page.locator('.card[data-cache-logit="0"]')).to_have_count(20)
    page.click("#clear")
    expect(page.locator(".card")).to_have_count(0)


def test_files_that_are_no_images_are_said(opened: Open, tmp_path: Path) -> None:
    one = opened()
    one.expected = ["Failed to load resource: the server responded with a status of 4"]
    wrong = tmp_path / "wrong.jpg"
    wrong.write_bytes(b"no image")
    drop(one.page, wrong)
    classified(one.page)
    expect(one.page.locator(".card .failure")).to_contain_text("wrong.jpg")
    expect(one.page.get_by_role("button", name="Try again")).to_be_visible()


def test_what_the_page_cannot_compute_is_asked(opened: Open, served: Served, run: Callable[..., Any]) -> None:
    """As with trained values: an estimate at once, then the server's answer."""
    one = opened()
    page = one.page

    def trained(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | {"values": "trained"})

    page.route("**/v1/indexes/*", trained)
    page.reload()
    [image] = photographs("test", "lobster", 1)
    drop(page, image)
    assert classified(page)["how"] == "server"
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "classify" in request.url else None)
    page.route("**/v1/classify**", lambda route: (page.wait_for_timeout(50), route.continue_()))
    page.fill("#beta", "7")
    expect(page.locator(".how")).to_have_text("estimate")
    expect(page.locator(".card")).to_have_attribute("data-how", "server")
    expect(page.locator(".how")).to_have_text("")
    told = json.loads(run("classify", served.folder, image, "--beta", 7, "--explain", "--format", "json").stdout)
    shown = answer(page)
    for name in ("probability", "text_logit", "cache_logit"):
        assert shown[name] == pytest.approx(told[name], rel=1e-3)
    assert len(asked) == 1


def test_index_view(opened: Open, served: Served) -> None:
    one = opened()
    page = one.page
    one.expected = ["Failed to load resource: the server responded with a status of 503"]
    busy = [503]  # a large audit is computed before it answers

    def audit(route: Route) -> None:
        if busy:
            detail = {"type": "about:blank", "title": "Busy", "status": busy.pop(), "detail": "It is being computed."}
            route.fulfill(status=503, headers={"Retry-After": "1"}, json=detail)
        else:
            route.continue_()

    page.route("**/audit*", audit)
    page.click("#tab-index")
    expect(page.locator("#audit-state")).to_contain_text("It is being computed.")
    known = page.request.get(f"{served.address}/v1/indexes/things").json()["classes"]
    expect(page.locator("#classes-list li")).to_have_count(len(known))
    expect(page.locator("#about")).to_contain_text("lit-mini")
    page.fill("#classes-filter", "cra")
    expect(page.locator("#classes-list li")).to_have_count(2)

    expect(page.locator("#shots-count")).to_have_text("82")
    first = page.locator("#shots li").first
    expect(first.locator("img")).to_have_js_property("complete", True)
    assert first.locator("img").evaluate("image => image.naturalWidth") > 0
    shown = first.get_attribute("data-key-id")
    page.click("#shots-next")
    expect(page.locator("#shots-range")).to_have_text("49 to 82 of 82")
    assert page.locator("#shots li").first.get_attribute("data-key-id") != shown
    page.locator("#classes-list button").first.click()  # crab
    expect(page.locator("#shots-count")).to_have_text("8")
    expect(page.locator("#shots .name").first).to_have_text("crab")
    page.fill("#shots-source", "no such file")
    expect(page.locator("#shots-state")).to_have_text("No shots like that.")
    page.fill("#shots-source", "")
    page.fill("#shots-class", "")
    page.fill("#classes-filter", "")

    expect(page.locator("#audit li").first).to_be_visible()
    expect(page.locator("#audit li").first).to_contain_text("rather")
    screenshot(page, "index-light", full=True)


def test_map_shows_keys_that_are_pointed_at(opened: Open, served: Served) -> None:
    page = opened().page
    page.click("#tab-index")
    expect(page.locator("#map-facts")).to_contain_text("variance")
    canvas = page.locator("#map-canvas")
    painted = canvas.evaluate(
        """canvas => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            const colours = new Set();
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) colours.add(data.slice(i, i + 3).join());
            return colours.size;
        }"""
    )
    assert painted >= len(CLASSES)
    canvas.focus()
    page.keyboard.press("Home")
    expect(page.locator("#map-shot .name")).not_to_be_empty()
    first = page.locator("#map-shot").text_content()
    for arrow in ("ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown"):
        page.keyboard.press(arrow)
    expect(page.locator("#map-shot")).not_to_have_text(first or "")
    expect(page.locator("#map-shot img")).to_have_js_property("complete", True)

    found = page.evaluate("async () => (await fetch('/v1/indexes/things/map')).json()")
    lonely = int(np.argmax(found["x"]))
    box = canvas.bounding_box()
    assert box is not None
    x = 14 + (found["x"][lonely] + 1) / 2 * (box["width"] - 30)
    y = 14 + (1 - found["y"][lonely]) / 2 * (box["height"] - 30)
    page.mouse.move(box["x"] + x + 1, box["y"] + y + 1)
    expect(page.locator("#map-shot .hint")).to_have_text(f"key {found['key_ids'][lonely]}")


def test_removing_a_shot_is_asked_first(opened: Open, served: Served, run: Callable[..., Any]) -> None:
    page = opened().page
    page.evaluate("token => sessionStorage.setItem('retrieval-tip token', token)", TOKEN)
    page.click("#tab-index")
    page.fill("#shots-class", "starfish")
    expect(page.locator("#shots-count")).to_have_text("8")
    button = page.locator("#shots button").first
    button.click()
    page.click("#confirm-cancel")
    expect(button).to_be_focused()
    button.click()
    page.click("#confirm-ok")
    expect(page.locator("#shots-count")).to_have_text("7")
    expect(page.locator("#shots-title")).to_be_focused()
    expect(page.locator("#index-facts")).to_contain_text("81 keys")
    history = run("index", "history", served.folder, "--format", "csv").stdout
    assert "remove 1 key" in history
    assert run("index", "rollback", served.folder).exit_code == 0
    while page.request.get(f"{served.address}/v1/indexes/things").json()["n_keys"] != 82:
        page.wait_for_timeout(100)  # until the server has followed
    page.click("#tab-classify")
    drop(page, *photographs("test", "starfish", 1))  # whose answer is of another version than the page knows
    classified(page)
    expect(page.locator("#index-facts")).to_contain_text("82 keys")


def test_without_a_token_nothing_can_be_changed(opened: Open) -> None:
    page = opened().page

    def closed(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | {"changes": False})

    page.route("**/v1/indexes/*", closed)
    page.reload()
    drop(page, *photographs("test", "panda", 1))
    classified(page)
    page.locator(".card").get_by_text("This is wrong").click()
    expect(page.locator(".card").get_by_text("without --token")).to_be_visible()
    expect(page.locator(".card form")).to_be_hidden()
    page.click("#tab-index")
    expect(page.locator("#shots li").first).to_be_visible()
    assert page.locator("#shots button").count() == 0


def test_other_index_of_features_alone(opened: Open) -> None:
    page = opened().page
    drop(page, *photographs("test", "panda", 1))
    classified(page)
    page.get_by_role("combobox", name="Index").select_option("food <b>1")
    expect(page.locator("#index-facts")).to_contain_text("36 keys, 9 classes")
    expect(page.locator("#drop-hint")).to_contain_text("takes features")
    expect(page.locator("#choose")).to_be_disabled()
    expect(page.locator(".card .failure")).to_contain_text("features, not images")
    page.click("#tab-index")
    expect(page.locator("#shots .none")).to_have_count(36)  # no pictures
    expect(page.locator("#map-facts")).to_contain_text("variance")
    expect(page.locator("#audit-state")).not_to_contain_text("Loading")
    page.reload()
    expect(page.locator("#index-select")).to_have_value("food <b>1")  # it is remembered
    page.get_by_role("combobox", name="Index").select_option("things")
    expect(page.locator("#index-facts")).to_contain_text("82 keys")
    expect(page.locator("#shots .none")).to_have_count(0)


def test_narrow_and_dark(opened: Open) -> None:
    one = opened(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = one.page
    fits = "() => document.documentElement.scrollWidth <= window.innerWidth"
    assert page.evaluate(fits)
    drop(page, *photographs("test", "crab", 1), names=[f"{'a-very-long-name' * 10}.jpg"])
    classified(page)
    page.locator("#settings-title").click()
    page.locator(".card").get_by_text("This is wrong").click()
    assert page.evaluate(fits)
    page.locator("#settings-title").click()
    screenshot(page, "classify-dark-narrow")
    page.click("#tab-index")
    expect(page.locator("#audit li").first).to_be_visible()
    expect(page.locator("#shots li").first).to_be_visible()
    expect(page.locator("#map-facts")).to_contain_text("variance")
    assert page.evaluate(fits)
    screenshot(page, "index-dark-narrow", full=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_texts(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme).page
    texts = [
        "h1",
        "#tab-classify",
        "#tab-index",
        "#index-facts",
        "#choose",
        ".hint",
        ".setting p",
        "#command",
        "#reset",
    ]
    texts += [".formula .text-part", ".formula .cache-part"]
    ratios = {text: contrast(page.locator(text).first) for text in texts}
    drop(page, *photographs("test", "panda", 1))
    classified(page)
    page.fill("#k", "2")
    texts = [
        ".card h2",
        ".card .probability",
        ".card th",
        ".card td.text-part",
        ".card td.cache-part",
        ".card .affinity",
    ]
    ratios |= {text: contrast(page.locator(text).first) for text in [*texts, ".card summary", ".card .file"]}
    screenshot(page, f"classify-{scheme}-k")
    page.click("#tab-index")
    expect(page.locator("#audit li").first).to_be_visible()
    texts = ["#about dt", "#about dd", "#classes-list .count", "#shots .source", "#audit .hint", "#audit button"]
    ratios |= {text: contrast(page.locator(text).first) for text in texts}
    assert {text: ratio for text, ratio in ratios.items() if ratio < 4.5} == {}
    screenshot(page, f"index-{scheme}-top")


def test_chromium_is_demanded_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="SKIPPED: no Chromium"), chromium():
        pass
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no Chromium"), chromium():
        pass
