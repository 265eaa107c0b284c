"""Count a person's actions on the way from a folder of photos to right answers for (nearly) all of them.

One action is one key, click or typed name. The result is the share of all photos of the folder that are right: by their
label, or else by the answer to them. A simulated person knows the true classes and works in one of these ways:

- "random", "singles": labels one photo after the other, for one action each. The photos are drawn at random, or come
  from the queue of ``retrieval-tip label``. "Singles, similar too" also labels all near-identical photos that are
  shown, if they have the same class, for one more action.
- "review": labels singles first, and then looks at screens of 24 answers, least certain first. Each wrong answer costs
  two actions, one to select the photo and one for its class. One more action accepts the rest of the screen as labels.
- "correct": the same, but this action only turns the page, so that right answers are not learned.
- "confirm": the same, but a screen has at most 12 photos with the same answer. The class with most wrong answers among
  these is next, as expected from the probabilities.

An index learns all labels after each five single photos and after each screen, as the labelling page does. A person can
switch to reviewing after 0.5 to 4 single labels per class, or by a rule that does not use the truth: when at least half
of the last 20 guesses were right, and the probabilities imply less than a certain number of wrong answers on the next
screen. To label all 24 photos of a screen singly takes 24 actions, and to correct w of them and accept the others
1 + 2 w, so reviewing is cheaper if w is below 11.5.

A run ends when 98 % are right. Each run is added to the file ``--results``, and runs that it already contains are not
repeated. The tables show all runs in this file. With ``--weights``, a file of EfficientNet-Lite0, the folder of 17
classes also has photos that are encoded here, and so 500 instead of 442.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from common import SHARED, machine
from encoders import LITE0, of_photos, of_table
from label_less import POOLS, IntArray, read_runs

from retrieval_tip import Index, tip
from retrieval_tip.fit import closed_form
from retrieval_tip.index.changes import GROWN
from retrieval_tip.labelling.labels import alike
from retrieval_tip.labelling.photos import Pool, suggest_features
from retrieval_tip.labelling.queue import QUEUED, Queue

BATCH, SCREEN, GROUP, LAST = 5, 24, 12, 20
SWITCHES, COMPARED = (0.5, 1, 1.5, 2, 3, 4), (1, 2, 4)
"""Single labels per class after which reviewing begins, and those for which all ways of reviewing are compared."""
LIMITS = (14, 11.5, 8)
"""Limits of the rule: numbers of wrong answers on a screen."""
PHOTOS, GOAL, MOST = 800, 0.98, 0.75
"""Most photos of a folder, share of right photos at which a run ends, and most actions per photo for single labels."""
SHOWN, GOALS = (0.1, 0.2, 0.3, 0.4, 0.5), (0.9, 0.95, 0.98)
RANDOM, SINGLES, SIMILAR, BEST = "random", "singles", "singles, similar too", "review, best switch"
WAYS = ("review", "correct", "confirm")
FOLDERS = {name: POOLS[name].title for name in ("dtd", "flowers", "caltech")}
FOLDERS |= {"photos": f"Caltech101 photos, {LITE0}", "17": f"17 classes of Caltech101 photos, {LITE0}"}


def folder_of(
    name: str, draw: int, shared: Path, weights: Path | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.str_]]:
    """Return the features and the true classes of the photos of a folder, in random order."""
    chance = np.random.default_rng(draw)
    if name in POOLS and name != "photos":
        pool, _ = POOLS[name].pool_of(0, shared)
        features, truth = np.asarray(pool.keys, dtype=np.float32), np.array(pool.class_names)[pool.class_ids.numpy()]
        rows = chance.permutation(len(truth))[:PHOTOS]
        return features[rows], truth[rows]
    parts = [of_table(shared / f"data/two-encoders/photos_{part}.parquet") for part in ("16", "test")]
    parts = parts[:1] if name == "photos" else parts
    if name == "17" and weights is not None:
        parts.append(of_photos(shared, "val", weights))
    features, truth = np.concatenate([one.features[LITE0] for one in parts]), np.concatenate([o.labels for o in parts])
    if name == "photos":
        rows = chance.permutation(len(truth))[:PHOTOS]
    else:
        chosen = chance.permutation(np.unique(truth))[:17]
        rows = chance.permutation(np.flatnonzero(np.isin(truth, chosen)))[:500]
    return features[rows], truth[rows]


@dataclass
class Person:
    """A person, the labels so far, and what an index has learned from them.

    ``guessed`` says for each single label whether the guess was right. ``curve`` holds the number of actions and the
    share of right photos after each fit.
    """

    features: npt.NDArray[np.float32]
    truth: npt.NDArray[np.str_]
    labelled: list[int] = field(default_factory=list)
    actions: int = 0
    looked: int = 0
    guessed: list[bool] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    index: Index | None = None
    learned: int = 0

    def __post_init__(self) -> None:
        self.answers, self.chances = np.full(len(self.truth), "", self.truth.dtype), np.zeros(len(self.truth))

    def copy(self) -> Person:
        other = copy.copy(self)
        other.labelled, other.guessed, other.curve = [*self.labelled], [*self.guessed], [*self.curve]
        return other

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        right = self.answers == self.truth
        right[self.labelled] = True
        return right

    def learn(self) -> None:
        """Add the new labels to the index, and fit it again if it has grown enough."""
        new, labels = self.labelled[self.learned :], self.truth[self.labelled]
        fitted = None if self.index is None else self.index.fitted
        if self.index is None or fitted is None or len(labels) >= GROWN * fitted.keys:
            names = np.unique(labels).tolist()
            self.index = Index.from_features(self.features[self.labelled], labels.tolist(), names, device="cpu")
            closed_form.fit(self.index)
        elif new:
            self.index = copy.copy(self.index)
            if unknown := {*self.truth[new].tolist()} - {*self.index.class_names}:
                self.index.add_classes(sorted(unknown))
            self.index.add(self.features[new], self.truth[new].tolist())
        self.learned = len(self.labelled)
        chances = tip.probabilities(self.index.logits(self.features), self.index.settings.temperature).numpy()
        self.answers, self.chances = np.array(self.index.class_names)[chances.argmax(1)], chances.max(1)
        self.curve.append((self.actions, float(self.right.mean())))

    def singles(self, suggested: bool = True, similar: bool = False) -> Iterator[None]:
        """Label single photos, and yield after each fit."""
        queue, queued = Queue(len(self.truth)), 0
        while len(self.labelled) < len(self.truth):
            rest = np.setdiff1d(np.arange(len(self.truth)), self.labelled)
            if suggested:
                pool = Pool([str(row) for row in rest], self.features[rest], [None] * len(rest))
                picks = suggest_features(pool, QUEUED, self.index).inputs
                queue.suggest([(int(name), "") for name in picks], {*self.labelled}, queued)
            shown = [one.photo for one in queue.show({*self.labelled})[:BATCH]]
            near = alike(self.features[rest], np.searchsorted(rest, shown).tolist())
            for photo, places in zip(shown, near, strict=True):
                if photo in self.labelled:
                    continue
                self.guessed.append(bool(self.answers[photo] == self.truth[photo]))
                self.labelled.append(photo)
                self.actions, queued = self.actions + 1, queued + 1
                others = [row for row in rest[places].tolist() if row not in self.labelled] if similar else []
                if others and (self.truth[others] == self.truth[photo]).all():
                    self.labelled += others
                    self.actions += 1
            self.learn()
            yield

    def review(self, way: str) -> None:
        """Look at the photos that are not labelled, one screen after the other, and correct wrong answers."""
        seen = np.zeros(len(self.truth), dtype=bool)
        seen[self.labelled] = True
        while not seen.all() and self.curve[-1][1] < GOAL:
            screen = self.screen(np.flatnonzero(~seen), way)
            wrong = screen[self.answers[screen] != self.truth[screen]]
            self.actions += 1 + 2 * len(wrong)
            self.looked += len(screen)
            seen[screen] = True
            self.labelled += (wrong if way == "correct" else screen).tolist()
            self.learn()

    def screen(self, rest: IntArray, way: str = "review") -> IntArray:
        """Return the photos of the next screen."""
        rest = rest[np.argsort(self.chances[rest], kind="stable")]
        if way != "confirm":
            return rest[:SCREEN]
        groups = [rest[self.answers[rest] == answer][:GROUP] for answer in np.unique(self.answers[rest])]
        return max(groups, key=lambda own: float((1 - self.chances[own]).sum()))

    @property
    def expected(self) -> float:
        """The number of wrong answers on the next screen that the probabilities imply."""
        screen = self.screen(np.setdiff1d(np.arange(len(self.truth)), self.labelled))
        return float((1 - self.chances[screen]).sum())


def done(person: Person) -> bool:
    return person.curve[-1][1] >= GOAL or person.actions > MOST * len(person.truth)


def sessions(features: npt.NDArray[np.float32], truth: npt.NDArray[np.str_]) -> Iterator[dict[str, Any]]:
    """Yield the runs of all ways in a folder."""
    classes = len(np.unique(truth))

    def run(way: str, person: Person, switch: float | None = None) -> dict[str, Any]:
        facts = {"photos": len(truth), "classes": classes, "labels": len(person.guessed), "looked": person.looked}
        return {"way": way, "switch": switch, "curve": person.curve} | facts

    def reviewed(way: str, person: Person, switch: float | None = None) -> dict[str, Any]:
        other = person.copy()
        other.review(way)
        return run(way, other, switch)

    for way, options in {RANDOM: {"suggested": False}, SIMILAR: {"similar": True}}.items():
        person = Person(features, truth)
        for _ in person.singles(**options):
            if done(person):
                break
        yield run(way, person)
    person, switches, limits = Person(features, truth), [*SWITCHES], [*LIMITS]
    for _ in person.singles():
        if done(person):
            break
        if len(person.guessed) < LAST:
            continue
        while limits and person.expected < limits[0] and sum(person.guessed[-LAST:]) >= LAST / 2:
            yield reviewed(f"review below {limits.pop(0):g}", person)
        if switches and len(person.guessed) >= switches[0] * classes:
            switch = switches.pop(0)
            for way in WAYS if switch in COMPARED else WAYS[:1]:
                yield reviewed(way, person, switch)
    yield run(SINGLES, person)


def needed(run: dict[str, Any], goal: float) -> float:
    """Return the number of actions per 100 photos until a share of the photos is right."""
    return next((100 * actions / run["photos"] for actions, right in run["curve"] if right >= goal), float("inf"))


def right_after(run: dict[str, Any], actions: float) -> float:
    """Return the share of the photos in % that are right after a number of actions per photo."""
    return 100 * [right for own, right in [(0, 0.0), *run["curve"]] if own <= actions * run["photos"]][-1]


def measures(runs: Sequence[dict[str, Any]]) -> list[float]:
    """Return the measures of a run, or the best of several for each measure."""
    shares = [max(right_after(run, actions) for run in runs) for actions in SHOWN]
    return shares + [min(needed(run, goal) for run in runs) for goal in GOALS]


def mean_of(values: Iterable[float]) -> str:
    mean = statistics.mean(values)
    return "-" if mean == float("inf") else f"{mean:.1f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    click.echo("\n".join(["", f"| {' | '.join(heads)} |", f"|---{'|--:' * (len(heads) - 1)}|", *lines]))


def show(runs: Sequence[dict[str, Any]], title: str) -> None:
    """Print the tables of a folder."""
    draws = [[run for run in runs if run["draw"] == draw] for draw in sorted({run["draw"] for run in runs})]
    click.echo(f"\n**{title}** ({runs[0]['photos']} photos, {runs[0]['classes']} classes, {len(draws)} draws)")
    rows = []
    for way in (RANDOM, SIMILAR, SINGLES, *(f"review below {limit:g}" for limit in LIMITS), BEST):
        few = (SINGLES,) if way.startswith("review below") else ()  # the rule never switched
        own = [[one for one in some if one["way"] == way] for some in draws]
        own = [found or [one for one in some if one["way"] in few] for found, some in zip(own, draws, strict=True)]
        if way == BEST:
            own = [[one for one in some if one["way"].startswith((WAYS[0], SINGLES))] for some in draws]
        labels = "" if way == BEST else " / ".join(str(one[0]["labels"]) for one in own)
        rows.append([way, *map(mean_of, zip(*map(measures, own), strict=True)), labels])
    heads = [f"right after {100 * one:.0f} %" for one in SHOWN] + [f"until {100 * goal:.0f} %" for goal in GOALS]
    table(["", *heads, "single labels"], rows)
    rows = []
    for switch in COMPARED:
        own = [[run for run in runs if (run["way"], run["switch"]) == (way, switch)] for way in WAYS]
        if all(own):
            until = [[mean_of(needed(run, goal) for run in some) for goal in GOALS[1:]] for some in own]
            rows.append([f"{switch}", *(" / ".join(cells) for cells in until)])
    table(["single labels per class", *(f"{way}, until 95 / 98 %" for way in WAYS)], rows)


@click.command(help=__doc__)
@click.option("--shared", type=click.Path(path_type=Path, exists=True), default=SHARED, show_default=True)
@click.option("--folder", "folders", type=click.Choice(list(FOLDERS)), multiple=True, default=list(FOLDERS))
@click.option("--draws", default=2, show_default=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), help="File of EfficientNet-Lite0.")
@click.option("--results", type=click.Path(path_type=Path), required=True, help="File of runs, one per line.")
def main(shared: Path, folders: tuple[str, ...], draws: int, weights: Path | None, results: Path) -> None:
    """Work through the folders, and print the numbers of actions."""
    click.echo(f"{machine()}. Right photos in %, and actions per 100 photos.")
    for name in folders:
        known = {run["draw"] for run in read_runs(results) if run["folder"] == name}
        for draw in range(draws):
            if draw not in known:
                runs = sessions(*folder_of(name, draw, shared, weights))
                lines = [json.dumps({"folder": name, "draw": draw} | run) + "\n" for run in runs]
                with results.open("a") as file:
                    file.writelines(lines)
        show([run for run in read_runs(results) if run["folder"] == name], FOLDERS[name])


if __name__ == "__main__":
    main()
