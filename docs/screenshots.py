"""Take the screenshots ``docs/page*.png`` and the film ``docs/page.webp`` of ``retrieval-tip label`` and ``serve``.

``docs/screens/*.webp`` show each screen in light and dark colours, and on a phone.

Run ``make setup browser && make demo``, and then ``python docs/screenshots.py demo/things demo/new``. The arguments are
an index, and a folder of new photos in class folders. On the Label page, the photos are labelled by their folders, and
the film shows the first of them, the review, the answers, and the examples behind one.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from PIL import Image
from playwright.sync_api import Page, ViewportSize, expect, sync_playwright

HERE = Path(__file__).parent
COLOURS = 256
"""Number of colours in a screenshot. Using a palette halves the size of the file."""
WAIT = 60_000
"""Timeout in milliseconds."""
LABELS, FILMED = 40, 10
"""Number of photos to label before the screenshot, and number of photos in the film."""
FRAMES: list[tuple[Image.Image, int]] = []
"""The frames of the film, and how long each is shown, in milliseconds."""
SEEN = """[...document.images].every((one) => {
    const { top, bottom } = one.getBoundingClientRect();
    return one.naturalWidth > 0 || top >= innerHeight || bottom <= 0 || !one.checkVisibility();
})"""
"""JavaScript expression that is true if all visible images have loaded."""
DESKTOP: ViewportSize = {"width": 1280, "height": 840}
PHONE: ViewportSize = {"width": 390, "height": 840}
SHAPE = ((0.3, 0.2), (0.62, 0.12), (0.7, 0.45), (0.5, 0.62), (0.28, 0.5))
"""A shape on the map, as fractions of its width and height."""


def take(page: Page, name: str) -> None:
    """Take a screenshot."""
    page.wait_for_load_state("networkidle")
    while not page.evaluate(SEEN):
        page.wait_for_timeout(100)
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    seen.quantize(COLOURS).save(HERE / f"{name}.png", optimize=True)


def beside(page: Page, name: str) -> None:
    """Save the visible screen in light and dark colours, and on a phone, beside each other."""
    parts = []
    for scheme, size in (("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(size)
        page.wait_for_timeout(1000)
        parts.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    page.set_viewport_size(DESKTOP)
    whole = Image.new("RGB", (sum(part.width + 16 for part in parts), DESKTOP["height"]), "gray")
    for i, part in enumerate(parts):
        whole.paste(part, (sum(one.width + 16 for one in parts[:i]), 0))
    small = whole.resize((1504, whole.height * 1504 // whole.width))
    small.save(HERE / "screens" / f"{name}.webp", quality=60, method=6)


def film(page: Page, duration: int) -> None:
    """Add the visible page to the film."""
    seen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    FRAMES.append((seen.resize((800, 525), Image.Resampling.LANCZOS), duration))


def label_page(page: Page, new: Path) -> None:
    """Label some photos, and take a screenshot."""
    labels = {path.name: path.parent.name for path in new.rglob("*") if path.is_file()}
    for number in range(LABELS):
        name = page.locator("#label-photo img").get_attribute("alt") or ""
        page.fill("#label-class", labels[name])
        if number < FILMED:
            film(page, 700)
        page.press("#label-class", "Enter")
        expect(page.locator("#label-photo img")).not_to_have_attribute("alt", name)
        page.wait_for_timeout(300)
    expect(page.locator("#label-choices .primary")).to_be_visible()
    page.wait_for_function("async () => !(await (await fetch('/v1/label')).json()).busy")
    take(page, "page-label")
    beside(page, "label")
    page.click("#label-review")
    page.wait_for_selector("#grid .tile[data-label]")
    take(page, "page-review")
    film(page, 3500)
    beside(page, "review")
    page.click("#tab-history")
    page.wait_for_selector("#history img")
    beside(page, "history")


def pictures(page: Page, new: Path) -> None:
    """Take a screenshot of each screen of the page."""

    def picture(name: str) -> None:
        take(page, name)

    page.wait_for_selector("#known button img")
    picture("page-start")
    beside(page, "start")
    files = sorted(
        path for path in new.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    page.set_input_files("#files", files)
    page.wait_for_selector("#grid .tile[data-label]")
    while "done" in (page.locator("#progress").text_content() or ""):
        page.wait_for_timeout(100)
    picture("page")
    film(page, 2500)
    page.locator("#grid .tile").nth(4).click()
    page.wait_for_selector("#decided li img")
    picture("page-drawer")
    beside(page, "drawer")
    film(page, 3500)
    page.emulate_media(color_scheme="dark")
    picture("page-dark")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size(PHONE)
    picture("page-phone")
    page.set_viewport_size(DESKTOP)
    page.click("#drawer-close")
    page.click("#index-name")
    picture("page-menu")
    page.keyboard.press("Escape")
    page.click("#tab-classes")
    page.wait_for_selector("#shots img")
    picture("page-classes")
    beside(page, "classes")
    page.click("#tab-check")
    page.check("#audit-all")
    page.wait_for_selector("#audit li")
    expect(page.locator("#check-view")).not_to_contain_text("Loading", timeout=WAIT)
    picture("page-check")
    beside(page, "check")
    page.click("#tab-map")
    expect(page.locator("#map-canvas")).to_have_attribute("data-method", "tsne", timeout=WAIT)
    expect(page.locator("#map-canvas")).to_have_attribute("data-pictures", re.compile("[1-9]"))
    page.wait_for_load_state("networkidle")
    page.locator("#map-canvas").hover()
    beside(page, "map")
    box = page.locator("#map-canvas").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in SHAPE]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    picture("page-map")
    page.mouse.up()
    page.click("#index-name")
    page.click("#to-teach")
    page.set_input_files("#teach-folder", new)
    picture("page-teach")
    beside(page, "teach")
    page.evaluate("location.hash = '#settings'")
    page.locator("#settings-view details").evaluate_all(
        "all => all.forEach((one) => (one.open = true))"
    )
    beside(page, "settings")


@click.command()
@click.argument("index", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(index: Path, new: Path) -> None:
    """Serve a copy of INDEX, and classify the photos in NEW, which is a folder of class folders."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(index, Path(folder) / index.name)
        new = shutil.copytree(new, Path(folder) / "new")  # browsers reject links
        facts = json.loads(max((copy / "manifests").iterdir()).read_text())["backbone"]
        encoder = ["--model", f"{facts['model']}@{facts['pretrained']}"]
        commands = (
            (label_page, ["label", str(new), "--out", str(Path(folder) / "labelled"), *encoder]),
            (pictures, ["serve", str(copy)]),
        )
        for pictured, command in commands:
            program = [
                sys.executable,
                "-m",
                "retrieval_tip",
                *command,
                "--port",
                "0",
                "--device",
                "cpu",
            ]
            serving = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)  # noqa: S603  # itself
            with serving, sync_playwright() as playwright:
                assert serving.stderr is not None
                address = next(
                    filter(
                        None,
                        (re.search(r"http[^\s;]+#token=[^\s;]+", line) for line in serving.stderr),
                    )
                )
                try:
                    browser = playwright.chromium.launch(
                        executable_path=chromium, args=["--no-sandbox"]
                    )
                    page = browser.new_page(viewport=DESKTOP, reduced_motion="reduce")
                    page.set_default_timeout(WAIT)
                    page.goto(address[0])
                    pictured(page, new)
                    browser.close()
                finally:
                    serving.terminate()
    first, *rest = [frame for frame, _ in FRAMES]
    durations = [duration for _, duration in FRAMES]
    first.save(
        HERE / "page.webp",
        save_all=True,
        append_images=rest,
        duration=durations,
        loop=0,
        quality=70,
        method=6,
    )


if __name__ == "__main__":
    main()
