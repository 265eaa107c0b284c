"""Measure a labelling session of a large folder: waiting times over HTTP and in Chromium, and memory.

The photos are made: crops of 96 pixels of photos of Caltech101, at random places and with random colours, in folders of
500, in visits of 1 to 12. A script that knows the true classes labels single photos over HTTP, at first while photos
are encoded, and then with all of them. Then it labels and reviews in Chromium, scrolls, and finishes with links.
Figures of the server are read from ``/proc``: the highest resident memory (VmHWM), which includes mapped files of the
libraries. The page's memory is that of Chromium's largest renderer process. ``blocked`` is the longest time for which
the page could not react. Run ``make setup browser`` first.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import httpx
import psutil
from common import SHARED, clocked, machine
from memory import peak, server
from page import scrolled
from PIL import Image, ImageEnhance
from playwright.sync_api import Page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import chromium
from cameras import encoded

SIDE, FOLDER, LONGEST = 96, 500, 12
"""Pixels of a side of a photo, number of photos of a folder, and most photos of a visit."""
PACE, SINGLE, SCREENS, SPEED = 0.3, 60, 6, 4000
"""Seconds between two labels, number of labels in each step, screens to review, and px/s to scroll."""
ACCEPTED = 202
WAIT = 3000
"""Maximum number of seconds to wait for something."""

OBSERVE = """() => {
    window.longest = 0;
    const note = (list) => { for (const { duration } of list.getEntries()) longest = Math.max(longest, duration); };
    new PerformanceObserver(note).observe({ entryTypes: ["longtask"] });
}"""
PRESSED = """async ([key, before]) => {
    const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    const image = () => document.querySelector("#label-photo img");
    const start = performance.now();
    document.getElementById("label-class").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    while (image()?.alt === before) await painted();
    await image().decode();
    await painted();
    return (performance.now() - start) / 1000;
}"""
GIVEN = """async () => {
    const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    document.getElementById("grid").scrollIntoView();
    scrollBy(0, -200);
    await painted();
    const line = document.getElementById("bar").getBoundingClientRect().bottom;
    const whole = ({ top, bottom }) => top >= line && bottom <= innerHeight;
    const tiles = [...document.querySelectorAll("#grid .tile")].filter((one) => whole(one.getBoundingClientRect()));
    const press = (tile, shiftKey) =>
        tile.querySelector(".tick").dispatchEvent(new MouseEvent("click", { bubbles: true, shiftKey }));
    press(tiles[0], false);
    press(tiles.at(-1), true);
    await painted();
    const start = performance.now();
    document.querySelector("#selection-form input").value = tiles[0].dataset.label;
    document.getElementById("selection-form").requestSubmit();
    while (tiles.some((tile) => tile.isConnected)) await painted();
    await painted();
    return (performance.now() - start) / 1000;
}"""


def write_photos(source: Path, folder: Path, number: int) -> dict[str, str]:
    """Write photos, and return the class of each by its path. Photos that exist are kept."""
    draw = random.Random(0)
    originals = sorted((source / "101_ObjectCategories").glob("*/*.jpg"))

    @lru_cache(1)
    def opened(path: Path) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    truth: dict[str, str] = {}
    now = datetime(2026, 1, 1)
    left = 0
    for i in range(number):
        if not left:
            original, left = draw.choice(originals), draw.randint(1, LONGEST)
            now += timedelta(seconds=draw.randint(60, 600))
        left -= 1
        now += timedelta(seconds=draw.randint(1, 3))
        share, colour, x, y = (
            draw.uniform(*ends) for ends in ((0.7, 1), (0.5, 1.5), (0, 1), (0, 1))
        )
        path = folder / f"camera {i // FOLDER}" / f"{i:06}.jpg"
        truth[str(path)] = original.parent.name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        image = opened(original)
        sides = [int(share * side) for side in image.size]
        left_edge, top = int(x * (image.width - sides[0])), int(y * (image.height - sides[1]))
        box = (left_edge, top, left_edge + sides[0], top + sides[1])
        small = ImageEnhance.Color(image.resize((SIDE, SIDE), box=box)).enhance(colour)
        path.write_bytes(encoded(f"{now:%Y:%m:%d %H:%M:%S}", image=small))
    return truth


class Person:
    """Somebody who labels over HTTP and knows the true classes. Waiting times are in ``waits``, in seconds."""

    def __init__(self, client: httpx.Client, truth: dict[str, str]) -> None:
        self.client, self.truth = client, truth
        self.waits: dict[str, list[float]] = {}

    def timed(self, what: str, call: Callable[[], httpx.Response]) -> Any:
        start = time.perf_counter()
        answer = call()
        self.waits.setdefault(what, []).append(time.perf_counter() - start)
        answer.raise_for_status()
        return answer.json()

    def answers(self) -> httpx.Response:
        """Return the answers, which are asked for again until they have been computed."""
        while (answer := self.client.get("/v1/label/answers")).status_code == ACCEPTED:
            time.sleep(0.5)
        return answer

    def state(self, what: str = "state") -> Any:
        return self.timed(what, lambda: self.client.get("/v1/label"))

    def until(self, done: Callable[[Any], bool]) -> float:
        """Wait, and return for how long."""
        start = time.perf_counter()
        while not done(self.state("state while waiting")):
            if time.perf_counter() - start > WAIT:
                raise click.ClickException(f"waited longer than {WAIT} s")
            time.sleep(0.1)
        return time.perf_counter() - start

    def label(self, what: str, number: int) -> None:
        """Label single photos."""
        state = self.state(what + ", state")
        for i in range(number):
            photo = state["queue"][0]
            one = {"photo": photo["photo"], "label": self.truth[photo["name"]]}
            body = {"labels": [one], "step": f"{what} {i}"}
            state = self.timed(what, lambda body=body: self.client.post("/v1/label", json=body))
            time.sleep(PACE)
            self.state(what + ", state")

    def review(self, what: str, number: int) -> None:
        """Confirm or correct ``number`` photos in one request, least certain first."""
        answers = self.timed("answers", self.answers)["photos"]
        rest = [one for one in answers if one["label"] is None][:number]
        labels = [{"photo": one["photo"], "label": self.truth[one["name"]]} for one in rest]
        body = {"labels": labels, "step": what, "reviewed": True}
        self.timed(what, lambda: self.client.post("/v1/label", json=body))


def settled(state: Any) -> bool:
    """Return whether all labels are saved and learned."""
    return not state["busy"] and not state["unsaved"]


def reviewed(page: Page, address: str) -> Iterator[tuple[str, float]]:
    """Label and review in Chromium, and yield what was measured."""
    page.goto(address)
    page.wait_for_selector("#label-photo img")
    page.evaluate(OBSERVE)
    waits = []
    for _ in range(10):
        page.wait_for_selector("#label-choices button")
        before = page.locator("#label-photo img").get_attribute("alt")
        waits.append(page.evaluate(PRESSED, ["Enter", before]))
        page.wait_for_timeout(1000 * PACE)
    yield "page: from a label to the next photo, longest", max(waits)

    def opened() -> None:
        page.click("#label-review")
        page.wait_for_selector("#grid .tile[data-label]")

    yield "page: first answers of all photos", clocked(opened)
    page.evaluate("longest = 0")
    waits = []
    for _ in range(SCREENS):
        page.wait_for_function("document.getElementById('grid').ariaBusy !== 'true'")
        waits.append(page.evaluate(GIVEN))
        page.wait_for_timeout(4000)
    yield "page: from the label of a screen to the next, longest", max(waits)
    yield "page: blocked while reviewing, longest", page.evaluate("longest / 1000")
    frames, _ = scrolled(page, SPEED)
    yield f"page: frames/s at {SPEED} px/s", frames
    yield "page: tiles", page.locator("#grid .tile").count()
    renderers = [
        one.memory_full_info().pss / 2**20
        for one in psutil.Process().children(recursive=True)
        if "--type=renderer" in " ".join(one.cmdline())
    ]
    yield "page: memory of the renderer, MiB", max(renderers)


def measured(
    photos: Path, place: Path, model: str, truth: dict[str, str]
) -> Iterator[tuple[str, float]]:
    start = time.perf_counter()
    arguments = ("label", photos, "--out", place, "--model", model, "--device", "cpu")
    with server(*arguments) as (client, process):
        yield "s until the server answers", time.perf_counter() - start
        person = Person(client, truth)
        person.until(lambda state: state["queue"][-2]["why"] is not None)
        yield "s until the first suggestion", time.perf_counter() - start
        person.label("label while encoding", SINGLE)
        seconds = person.until(lambda state: bool(state["queue"][0]["guesses"]))
        yield "s until a guess, after the first labels", seconds
        person.until(lambda state: state["encoded"] == state["photos"])
        yield "s until all are encoded", time.perf_counter() - start
        yield "GiB of the server, encoded", peak(process)
        person.label("label, all encoded", SINGLE)
        seconds = person.until(settled)
        yield "s from the last label until it is idle", seconds
        for i in range(3):
            person.review(f"review 24 photos, {i}", 24)
        seconds = person.until(settled)
        yield "s from a review until it is idle", seconds
        person.review("review 1000 photos", 1000)
        seconds = person.until(settled)
        yield "s from a review of 1,000 until it is idle", seconds
        answers = person.answers()
        yield "MiB of all answers", len(answers.content) / 2**20
        for what, waits in person.waits.items():
            yield f"ms: {what}, median", 1000 * statistics.median(waits)
            yield f"ms: {what}, longest", 1000 * max(waits)
        yield "GiB of the server, labelled", peak(process)
        token = client.headers["authorization"].removeprefix("Bearer ")
        with chromium() as browser:
            page = browser.new_page(
                viewport={"width": 1280, "height": 840}, reduced_motion="reduce"
            )
            page.set_default_timeout(1000 * WAIT)
            yield from reviewed(page, f"{client.base_url}#token={token}")
        into = {"into": str(place.parent / "sorted"), "action": "link"}

        def finish(**more: Any) -> None:
            client.post("/v1/label/sort", json=into | more, timeout=WAIT).raise_for_status()

        yield "s: Finish, preview", clocked(lambda: finish(dry_run=True))
        yield "s: Finish, links", clocked(finish)
        yield "GiB of the server, finished", peak(process)


@click.command(help=__doc__)
@click.option("--model", default="timm:tf_efficientnet_lite0", show_default=True)
@click.option("--number", "numbers", multiple=True, default=(5_000, 50_000), show_default=True)
@click.option("--folder", type=Path, default=Path(tempfile.gettempdir()) / "retrieval-tip-large")
def main(model: str, numbers: Sequence[int], folder: Path) -> None:
    """Measure a session for each number of photos. They are kept in FOLDER, with the cache of the encoder."""
    os.environ["RETRIEVAL_TIP_CACHE"] = str(folder / "cache")
    for number in numbers:
        truth = write_photos(SHARED / "data" / "caltech101", folder / f"{number}", number)
        click.echo(f"{number:,} photos, {machine('openvino')}")
        with tempfile.TemporaryDirectory(dir=folder) as made:
            for what, value in measured(folder / f"{number}", Path(made) / "things", model, truth):
                click.echo(f"{what:60} {value:10.3f}")


if __name__ == "__main__":
    main()
