"""Measure how long a user has to wait for the page of ``retrieval-tip serve`` in Chromium.

Run ``make setup browser && make demo``, and then ``python benchmarks/page.py demo/things demo/new``. The arguments are
an index, and a folder of new photos in class folders. The waiting times are those from dropped photos to their answers,
and from a moved slider to the new answer. Chromium's trace tells how many frames per second are shown while
10,000 photos are scrolled; their answers are copies of the server's answers to the photos in NEW. Finally, a map of
10,000 synthetic keys with 512 values each (benchmarks/made.py) is opened: by axes, by neighbours, and again.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from common import clocked, machine, show
from made import Made
from playwright.sync_api import Page, expect

from retrieval_tip import Index

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import chromium
from serving import server

KEYS, D, CLASSES = 10_000, 512, 100
ANSWERS, MANY, ROUNDS = 10_000, 48, 5
SCROLLED, SPEEDS = 4, (1500, 4000, 10_000)
"""Seconds of scrolling, and speeds in px/s. At 1,500 px/s, a row of photos passes about eight times a second."""
WAIT = 600_000
"""Maximum time to wait, in milliseconds."""

MOVE = """async () => {
    const [beta, drawer] = ["beta", "drawer"].map((id) => document.getElementById(id));
    const times = [];
    for (let round = 0; round < 5; round++) {
        const start = performance.now();
        beta.stepUp(10);
        beta.dispatchEvent(new Event("input", { bubbles: true }));
        while (drawer.ariaBusy === "true") await new Promise((resolve) => setTimeout(resolve, 1));
        times.push((performance.now() - start) / 1000);
    }
    return times;
}"""

FILL = """async ([number, files]) => {
    const real = window.fetch;
    const answers = [];
    for (const [name, bytes] of files) {
        const body = new FormData();
        body.append("images", new File([Uint8Array.from(bytes)], name));
        const index = document.getElementById("index-name").textContent;
        const path = "/v1/classify?features=true&top=8&index=" + index;
        answers.push(await (await real(path, { method: "POST", body })).text());
    }
    let asked = 0;
    window.fetch = async (path, options) => String(path).startsWith("/v1/classify")
        ? new Response(answers[asked++ % answers.length]) : real(path, options);
    const { addFiles } = await import("/page/classify.js");
    const [name, bytes] = files[0];
    addFiles(Array.from({ length: number }, (_, i) => new File([Uint8Array.from(bytes)], `${i} ${name}`)));
    while (document.getElementById("progress").textContent.includes("done"))
        await new Promise((resolve) => setTimeout(resolve, 50));
}"""


def scrolled(page: Page, speed: int) -> tuple[float, float]:
    """Scroll the page as a mouse does, and return the frames per second in Chromium's trace.

    The first number counts the frames that were shown, and the second the frames that the page itself has updated.
    """
    page.evaluate("scrollTo(0, 0)")
    events: list[dict[str, object]] = []
    done: list[object] = []
    session = page.context.new_cdp_session(page)
    session.on("Tracing.dataCollected", lambda part: events.extend(part["value"]))
    session.on("Tracing.tracingComplete", lambda end: done.append(end))
    traced = {"includedCategories": ["disabled-by-default-devtools.timeline.frame"]}
    session.send("Tracing.start", {"traceConfig": traced, "transferMode": "ReportEvents"})
    gesture = {
        "x": 640,
        "y": 420,
        "yDistance": -SCROLLED * speed,
        "speed": speed,
        "gestureSourceType": "mouse",
    }
    session.send("Input.synthesizeScrollGesture", gesture)
    session.send("Tracing.end")
    while not done:
        page.wait_for_timeout(50)
    session.detach()
    times = [
        sorted(float(str(event["ts"])) / 1e6 for event in events if event["name"] == name)
        for name in ("DrawFrame", "BeginMainThreadFrame")
    ]
    shown, updated = ((len(one) - 1) / (times[0][-1] - times[0][0]) for one in times)
    return shown, updated


def measured(page: Page, address: str, index: str, new: list[Path]) -> dict[str, float]:
    """Return the measured waiting times, in seconds."""
    found: dict[str, float] = {}

    def opened(name: str) -> None:
        page.goto("about:blank")
        page.goto(address)
        page.click("#index-name")
        page.locator("#index-list").get_by_role("button", name=name, exact=True).click()
        page.wait_for_selector("#known li")

    def answered(photos: list[Path]) -> None:
        page.set_input_files("#files", photos)
        expect(page.locator("#progress")).to_have_text(re.compile(r"^\d+ photos?( ·.*)?$"))
        expect(page.locator("#grid .tile[data-label]").first).to_be_visible()

    def clear() -> None:
        if page.locator("#drawer-close").is_visible():  # a single photo opens it
            page.click("#drawer-close")
        page.click("#clear")

    opened(index)
    times = []
    for path in new[: ROUNDS + 1]:  # the first photo warms up the encoder
        times.append(clocked(lambda path=path: answered([path])))
        clear()
    found["first answer after a drop"] = statistics.median(times[1:])
    answered(new[:1])
    found["answer to a photo after a slider moved"] = statistics.median(page.evaluate(MOVE))
    clear()
    photos = f"answers to {min(MANY, len(new))} photos"
    found[photos] = clocked(lambda: answered(new[:MANY]))
    clear()
    page.evaluate(FILL, [ANSWERS, [[path.name, list(path.read_bytes())] for path in new[:20]]])

    for speed in SPEEDS:
        frames, updated = scrolled(page, speed)
        click.echo(
            f"scrolling {ANSWERS:,} photos at {speed:,} px/s: {frames:.0f} frames/s, {updated:.0f} of the page"
        )

    opened("made")
    shown = expect(page.locator("#map-canvas"))
    began = time.perf_counter()
    page.click("#tab-map")
    shown.to_have_attribute("data-method", "pca")
    found[f"map of {KEYS:,} keys, by axes"] = time.perf_counter() - began
    shown.to_have_attribute("data-method", "tsne")
    found[f"map of {KEYS:,} keys, by neighbours"] = time.perf_counter() - began
    opened("made")
    found["the same map, opened again"] = clocked(
        lambda: (page.click("#tab-map"), shown.to_have_attribute("data-method", "tsne"))
    )
    return found


@click.command(help=__doc__)
@click.argument("index", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(index: Path, new: Path) -> None:
    """Serve INDEX, and drop photos from NEW, a folder of class folders, on its page."""
    files = sorted(
        path.resolve()
        for path in new.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    with tempfile.TemporaryDirectory() as folder:
        made, ids = Made(CLASSES, D), np.arange(KEYS) % CLASSES
        keys = Index.from_features(
            made.draw(ids, 1), ids, made.names, text_weights=made.text, device="cpu"
        )
        keys.save(Path(folder) / "made")
        with (
            server(index, f"{folder}/made", "--device", "cpu") as (address, _),
            chromium() as browser,
        ):
            page = browser.new_page(
                viewport={"width": 1280, "height": 840}, reduced_motion="reduce"
            )
            page.set_default_timeout(WAIT)
            expect.set_options(WAIT)
            found = measured(page, address, index.name, files)
            click.echo(f"Chromium {browser.version}, {machine()}")
    show("", [{"waited for": what, "seconds": seconds} for what, seconds in found.items()])


if __name__ == "__main__":
    main()
