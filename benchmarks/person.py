"""Count what a person does on the real page, from a folder of unlabelled photos to a sorted one.

A script that knows the true classes labels single photos, reviews the other answers, least certain first, and finishes,
in Chromium. One action is one key, one click or one typed name. Before each check, it waits until all labels are saved,
as a person does who reads the page. A photo is right if its label or, without one, its answer is its true class.

The photos are drawn from 17 classes of Caltech101 (``--photos``, in the layout of CoOp) with a seed. With ``--pool``,
they are all photos of its 15 classes that look alike most (benchmarks/label_progress.py says how they are found), or
of the 6 classes of Tux Paint stamps of benchmarks/demo.py. Between the two steps, the page is reloaded and the server
is started again. ``--by keyboard`` uses no mouse, and ``--by mouse`` types only names of classes that the page does
not list yet, as does ``--by phone`` on a small touch screen. A person corrects an answer by another class on its
tile, shows the new answers that corrections have taught if this saves actions, and else selects all photos of a
class. With ``--traps``, the photos are made ones of camera traps in visits of 1 to 12, and with ``--visits`` the
person also selects whole visits. Run ``make setup browser`` first, and for the stamps ``python benchmarks/demo.py
--source debian --only-fetch``.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import demo
from common import SHARED, machine
from label_progress import alike_of, pool_of
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from playwright.sync_api import TimeoutError as Timeout

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import PATIENCE, chromium
from cameras import encoded
from serving import server

SPLIT = "split_zhou_Caltech101.json"


WAYS = ("both", "keyboard", "mouse", "phone")
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 840}}
POOLS = ("caltech", "alike", "stamps")
WORK = Path("build/demo")
"""The folder of the stamps."""
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "has_touch": True,
    "is_mobile": True,
}
PACE = 2.0
"""Seconds for which a person looks before each correction. Meanwhile, the page learns."""
LONGEST, CAMERAS = 12, 4
"""Most photos of a visit, and number of cameras, each of which has a folder."""
SHORT = 3
"""Most neighbours of a class that are corrected singly: first and last photo and the class are three clicks."""
CHECKED = 10
"""Number of single labels between two checks."""
DONE = 0.02
"""Share of all photos below which the largest expected number of wrong answers is good enough."""
GOALS = (0.95, 0.98)
Row = tuple[str, int, float, float | None, bool]
"""A check: after which step, the actions so far, the share of right photos, and what the page said."""


@dataclass
class Person:
    """Somebody who knows the true class of each photo, by file name, and counts actions."""

    page: Page
    truth: dict[str, str]
    by: str
    visits: bool = False
    actions: int = 0

    def act(self, action: Any, *arguments: Any, **options: Any) -> None:
        action(*arguments, **options)
        self.actions += 1

    def press(self, target: Locator, **options: Any) -> None:
        """Click on something, or tap on it."""
        self.act(target.tap if self.by == "phone" else target.click, **options)

    @property
    def points(self) -> bool:
        """Whether this person types only new names."""
        return self.by in ("mouse", "phone")

    def saved(self) -> float:
        """Wait until all labels are saved and learned. Return the share of all photos that are right."""
        while True:
            state = self.page.evaluate("async () => (await fetch('/v1/label')).json()")
            if not state["busy"] and not state["unsaved"] and state["encoded"] == state["photos"]:
                break
            time.sleep(0.1)
        answers = self.page.evaluate("async () => (await fetch('/v1/label/answers')).json()")[
            "photos"
        ]
        right = sum(
            (one["label"] or one["guesses"][0]["label"]) == self.truth[Path(one["name"]).name]
            for one in answers
        )
        return right / len(self.truth)

    def said(self) -> dict[str, Any]:
        """Return what the page says: how many answers are wrong, and whether to review or to stop."""
        state = self.page.evaluate("async () => (await fetch('/v1/label')).json()")
        estimate = (state["progress"] or {}).get("estimate", {})
        most = estimate["most_wrong"] if estimate else state["photos"] - state["labelled"]
        advised = self.page.evaluate(
            "document.getElementById('label-review').classList.contains('primary')"
        )
        return {
            "wrong": estimate.get("wrong"),
            "done": most < DONE * state["photos"],
            "ready": advised and bool(state["guessed"]),
        }

    def label(self) -> None:
        """Label the photo that is shown."""
        photo = self.page.locator("#label-photo img")
        name = photo.get_attribute("alt") or ""
        truth = self.truth[name]
        guesses = self.page.locator("#label-choices .name").all_text_contents()
        if not self.points and truth in guesses:
            self.act(self.page.keyboard.press, ["Enter", "2", "3"][guesses.index(truth)])
        elif (
            self.points
            and (known := self.page.locator(f'#label-stage button[data-label="{truth}"]')).count()
        ):
            self.press(known.first)
        else:  # a typed name is one action
            if self.by == "phone":
                self.page.locator("#label-class").focus()  # part of typing a name
            self.page.keyboard.type(truth)
            self.act(self.page.keyboard.press, "Enter")
        if self.page.locator("#alike-dialog").count():
            self.act(
                self.page.keyboard.press, "Shift+Enter"
            )  # a new class that resembles another one
        expect(photo).not_to_have_attribute("alt", name)

    def tiles(self) -> list[dict[str, Any]]:
        """Return the tiles without a label near the window, in order."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll("#grid .tile:not(.taught)")].map((one) => {
                const { top, bottom, left } = one.getBoundingClientRect();
                const line = document.getElementById("bar").getBoundingClientRect().bottom;
                const active = one.classList.contains("active");
                const visible = top >= line && bottom <= innerHeight;
                const others = [...one.querySelectorAll(".others span")].map(({ dataset }) => dataset.label);
                const [visit, same] = [one.querySelector(".visit").textContent !== "", one.classList.contains("same")];
                const [label, said] = [one.dataset.label, one.querySelector(".said").textContent];
                const now = one.querySelector(".chip-of").title;
                const tile = { id: one.id, name: one.title, label, said, new: now };
                return { ...tile, top, left, active, visible, others, visit, same };
            })"""
        )

    def review_screen(self) -> int:
        """Correct the wrong answers on the screen, and confirm the others. Return how many were wrong."""
        wrong = 0
        while True:
            time.sleep(PACE)
            tiles = self.tiles()
            found = [
                one for one in tiles if one["visible"] and one["label"] != self.truth[one["name"]]
            ]
            if not found:
                break
            if (taught := self.taught(tiles)) is not None:
                wrong += taught
                continue
            if self.by == "keyboard":
                active = next((at for at, one in enumerate(tiles) if one["active"]), 0)
                keys = keys_to(tiles, active)
                found.sort(key=lambda one: len(keys[tiles.index(one)]))
            label = self.truth[found[0]["name"]]
            same = [one for one in found if self.truth[one["name"]] == label]
            done = (
                self.step_to(same[0], label)
                if self.by == "keyboard"
                else self.point(same, label, tiles)
            )
            for one in done:
                expect(self.page.locator(f"#{one['id']}")).to_have_count(0)
            wrong += len(done)
        if self.by == "keyboard":
            self.act(self.page.keyboard.press, "Shift+Enter")
        else:
            self.press(self.page.get_by_role("button", name="All on this screen are right"))
        return wrong

    def taught(self, tiles: list[dict[str, Any]]) -> int | None:
        """Show what the corrections have taught, if it saves actions. Return how many more photos are right."""
        offer = self.page.locator("#notice").get_by_role("button", name="new answer")
        new = [one for one in tiles if one["same"]]
        if not new or not offer.is_visible():
            return None
        truths = [self.truth[one["name"]] for one in new]
        after = sum(one["new"] == f"{truth}?" for one, truth in zip(new, truths, strict=True))
        gain = after - sum(one["label"] == truth for one, truth in zip(new, truths, strict=True))
        if gain < (1 if self.by == "keyboard" else 2):
            return None
        if self.by == "keyboard":
            self.act(self.page.keyboard.press, "+")
        else:
            self.press(offer)
        for one in new:
            tile = self.page.locator(f"#{one['id']}")
            expect(tile).to_have_attribute("data-label", one["new"].removesuffix("?"))
        return gain

    def step_to(self, one: dict[str, Any], label: str) -> list[dict[str, Any]]:
        """Correct a photo, or its visit, by the keyboard. Return the corrected photos."""
        if not self.walk(one["id"]):
            return []
        if self.visits and one["visit"]:
            self.act(self.page.keyboard.press, "Shift+ ")
            self.give(label)
        elif label in one["others"]:
            self.act(self.page.keyboard.press, str(1 + one["others"].index(label)))
        else:
            self.give(label)
        return [one]

    def point(
        self, same: list[dict[str, Any]], label: str, tiles: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Correct photos of a class, or their visits, by pointing. Return the corrected photos."""
        one = same[0]
        start = tiles.index(one)
        row = [a for a, b in zip(same, tiles[start:], strict=False) if a is b]
        if self.by != "phone" and len(row) > SHORT:
            self.press(self.page.locator(f"#{one['id']} .tick"))
            self.press(self.page.locator(f"#{row[-1]['id']}"), modifiers=["Shift"])
            self.give(label)
            return row
        if label in one["others"] and not (self.visits and one["visit"] and len(same) > 1):
            tile = self.page.locator(f"#{one['id']}")
            if self.by != "phone":
                tile.hover()
            self.press(tile.locator(f'.others [data-label="{label}"]'))
            return [one]
        rest = [other for other in same if self.visits or label not in other["others"]]
        for other in rest:
            tile = self.page.locator(f"#{other['id']}")
            if tile.get_attribute("aria-selected") != "true":  # by its visit
                self.press(tile.locator(".visit" if self.visits and other["visit"] else ".tick"))
        self.give(label)
        return rest

    def walk(self, tile: str) -> bool:
        """Move to a tile with the fewest keys. Return whether it is still there."""
        for _ in range(100):
            tiles = self.tiles()
            ids = [one["id"] for one in tiles]
            active = next((at for at, one in enumerate(tiles) if one["active"]), None)
            if tile not in ids:
                return False
            if active is None:
                self.act(self.page.keyboard.press, "Home")
                continue
            keys = keys_to(tiles, active)[ids.index(tile)]
            if not keys:
                return True
            self.act(self.page.keyboard.press, keys[0])
        raise RuntimeError(f"no way to {tile}")

    def give(self, label: str) -> None:
        """Give the selected photos a class."""
        chip = self.page.locator(f'#selection-chips button[title="{label}"]')
        if self.points and chip.count():
            try:
                self.press(chip, timeout=1000)
            except Timeout:  # new answers have just replaced it
                self.give(label)
        else:
            if self.by == "phone":
                self.page.locator("#selection-form input").focus()
            self.page.keyboard.type(label)
            self.act(self.page.keyboard.press, "Enter")
            if self.page.locator("#alike-dialog").count():
                self.act(self.page.keyboard.press, "Shift+Enter")


def keys_to(tiles: list[dict[str, Any]], active: int) -> dict[int, list[str]]:
    """Return the fewest keys that move from the active tile to each tile, by their places."""
    number = len(tiles)
    columns = sum(one["top"] == tiles[0]["top"] for one in tiles)
    starts = [at for at in range(number) if at == 0 or tiles[at]["said"] != tiles[at - 1]["said"]]
    found: dict[int, list[str]] = {active: []}
    for at in (queue := [active]):
        steps = {
            "ArrowRight": at + 1,
            "ArrowLeft": at - 1,
            "ArrowDown": at + columns,
            "ArrowUp": at - columns,
            "Control+ArrowRight": min((one for one in starts if one > at), default=number),
            "Control+ArrowLeft": max((one for one in starts if one < at), default=number),
        }
        for key, place in steps.items():
            if 0 <= place < number and place not in found:
                found[place] = [*found[at], key]
                queue.append(place)
    return found


def trapped(
    pool: str, photos: Path, into: Path, classes: int, number: int, seed: int
) -> dict[str, str]:
    """Make photos of camera traps: each visit is one photo, shifted for each frame. Return their classes by name."""
    with tempfile.TemporaryDirectory() as folder:
        truth = drawn(pool, photos, Path(folder), classes, number, seed)
        draw = random.Random(seed)
        found: dict[str, str] = {}
        now = datetime(2026, 1, 1)
        for visit, name in truth.items():
            camera = into / f"camera {draw.randrange(CAMERAS)}"
            camera.mkdir(exist_ok=True)
            now += timedelta(seconds=draw.randint(60, 7200))
            with Image.open(Path(folder) / visit) as opened:
                image = opened.convert("RGB")
            sides = [round(0.8 * side) for side in image.size]
            for _ in range(min(draw.randint(1, LONGEST), number - len(found))):
                left, top = (draw.randint(0, side // 5) for side in image.size)
                frame = image.crop((left, top, left + sides[0], top + sides[1]))
                (camera / f"{len(found):04}.jpg").write_bytes(
                    encoded(f"{now:%Y:%m:%d %H:%M:%S}", image=frame)
                )
                found[f"{len(found):04}.jpg"] = name
                now += timedelta(seconds=draw.randint(1, 3))
            if len(found) == number:
                return found
    raise ValueError(f"{photos}: too few photos")


def classes_of(pool: str, photos: Path) -> dict[str, list[Path]]:
    """Return the photos of each class of a pool."""
    if pool == "stamps":
        return demo.stamps_of(WORK)
    parts = json.loads((photos / SPLIT).read_text())
    paths: dict[str, list[Path]] = {}
    for path, _, name in (row for part in ("train", "val", "test") for row in parts[part]):
        paths.setdefault(name, []).append(photos / "101_ObjectCategories" / path)
    if pool == "alike":
        names = pool_of("photos", SHARED)[2]
        return {names[one]: paths[names[one]] for one in alike_of("photos", SHARED)}
    return paths


def drawn(
    pool: str, photos: Path, into: Path, classes: int, number: int, seed: int
) -> dict[str, str]:
    """Copy photos of a pool into a folder, and return their classes by their new names."""
    paths = classes_of(pool, photos)
    draw = random.Random(seed)
    names = draw.sample(sorted(paths), classes if pool == "caltech" else len(paths))
    rows = [(path, name) for name in names for path in paths[name]]
    truth = {}
    for i, (path, name) in enumerate(draw.sample(rows, min(number, len(rows)))):
        truth[f"{i:04}{path.suffix}"] = name
        shutil.copy(path, into / f"{i:04}{path.suffix}")
    return truth


@contextmanager
def opened(photos: Path, index: Path, model: tuple[str, ...], by: str) -> Iterator[Page]:
    with (
        server(photos, "--out", index, *model, "--device", "cpu", command="label") as (url, _),
        chromium() as browser,
    ):
        page = browser.new_page(**(PHONE if by == "phone" else DESKTOP), reduced_motion="reduce")
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.wait_for_selector("#label-photo img")
        yield page


def run(
    truth: dict[str, str],
    photos: Path,
    index: Path,
    model: tuple[str, ...],
    by: str,
    checks: int,
    visits: bool = False,
) -> list[Row]:
    """Label and review until nothing is left to do by the page's own advice. Return what it said and what was true."""
    rows: list[Row] = []

    def check(step: str) -> bool:
        right, said = person.saved(), person.said()
        rows.append((step, person.actions, right, said["wrong"], said["done"]))
        return bool(said["ready"] or said["done"])

    with opened(photos, index, model, by) as page:
        person, number = Person(page, truth, by, visits), 0
        while number < len(truth):
            person.label()
            number += 1
            page.wait_for_timeout(100)
            if number % CHECKED == 0 and check(f"{number} labels"):
                break
        page.reload()
        page.wait_for_selector("#label-photo img")
    with opened(photos, index, model, by) as page:
        person.page = page
        person.saved()
        if by == "keyboard":
            person.act(page.keyboard.press, "Shift+Enter")
        else:
            person.press(page.locator("#label-review"))
        for screen in range(1, checks + 1):
            expect(page.locator("#grid .tile[data-label]").first).to_be_visible()
            wrong = person.review_screen()
            if check(f"screen {screen}, {wrong} wrong") and rows[-1][-1]:
                break
            page.wait_for_timeout(500)
        person.press(page.locator("#finish-open"))
        page.fill("#finish-into", str(index.parent / "sorted"))
        person.press(page.locator("#finish").get_by_role("button", name="Finish"))
        expect(page.locator("#finish-said")).to_contain_text("copied", timeout=PATIENCE)
    placed = [*(index.parent / "sorted").glob("*/*.*")]
    right = sum(path.parent.name == truth[path.name] for path in placed) / len(truth)
    rows.append(("sorted", person.actions, right, None, True))
    return rows


@click.command(help=__doc__)
@click.option("--pool", type=click.Choice(POOLS), default=POOLS[0], show_default=True)
@click.option("--photos", type=Path, default=SHARED / "data" / "caltech101", show_default=True)
@click.option("--model", default="timm:tf_efficientnet_lite0", show_default=True)
@click.option("--classes", default=17, show_default=True)
@click.option("--number", default=500, show_default=True, help="Number of photos.")
@click.option("--screens", default=12, show_default=True, help="Most screens to review.")
@click.option("--by", type=click.Choice(WAYS), multiple=True, default=WAYS)
@click.option("--traps", is_flag=True, help="Make photos of camera traps.")
@click.option("--visits", is_flag=True, help="Select whole visits.")
@click.option("--seed", multiple=True, default=(0, 1, 2), show_default=True)
def main(
    pool: str,
    photos: Path,
    model: str,
    classes: int,
    number: int,
    screens: int,
    by: tuple[str, ...],
    seed: tuple[int, ...],
    traps: bool,
    visits: bool,
) -> None:
    click.echo(machine())
    options = ("--model", model)
    for way in by:
        for draw in seed:
            with tempfile.TemporaryDirectory() as folder:
                (unlabelled := Path(folder) / "photos").mkdir()
                made = trapped if traps else drawn
                truth, start = (
                    made(pool, photos, unlabelled, classes, number, draw),
                    time.monotonic(),
                )
                place = Path(folder) / "things"
                rows = run(truth, unlabelled, place, options, way, screens, visits)
            click.echo(f"\n{way}, seed {draw}, {time.monotonic() - start:.0f} s")
            for step, actions, right, wrong, done in rows:
                told = "" if wrong is None else f", about {wrong:.0f} wrong"
                click.echo(
                    f"{step:22} {actions:4} actions {100 * right:6.1f} % right{told}{', done' if done else ''}"
                )
            for goal in GOALS:
                reached = next((actions for _, actions, right, _, _ in rows if right >= goal), None)
                click.echo(f"{goal:.0%} right after {reached} actions")


if __name__ == "__main__":
    main()
