"""A report on an index and a test source as one HTML file, which needs nothing else to be read, script or network.

Test labels are looked at to judge answers, never to choose a setting: those of the curves over shots, and the surface
of alpha and beta, come from the shots themselves, each left out, or from validation images.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from retrieval_tip import doctor
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data import images
from retrieval_tip.data.encoder import Block, Encoder
from retrieval_tip.data.feature_tables import check_backbone
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, RetrievalTipError, Skipped, UsageError, counted, show
from retrieval_tip.evaluation import sweep
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.evaluation.evaluate import Answers, Evaluation, judge
from retrieval_tip.files import replacing
from retrieval_tip.fit import search_hp
from retrieval_tip.fit.finetune import CURVE
from retrieval_tip.predictions import Neighbour, Prediction
from retrieval_tip.report import plots
from retrieval_tip.report.html import Html, join, table, tag
from retrieval_tip.store import folder as store
from retrieval_tip.store.manifest import Manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISTAKES, PAIRS, EXAMPLES, NEIGHBOURS = 12, 8, 3, 5
"""Mistakes of each list, confused pairs, pictures of each pair, and keys that are shown beside a mistake."""
QUERY_SIDE, SMALL_SIDE = 180, 110
"""Pixels of the longer side of pictures."""
WORST, CLASSES, LISTED = 10, 1000, 50
"""Classes that are shown at once, the worst first, and unfolded; skipped items that are listed."""
NAME = 44
"""Characters of the name of an item that are shown."""
AFFINITY_PAIRS = 2_000_000_000
"""Of more pairs of an item and a key, affinities are not counted."""
SHOTS = tuple(2**i for i in range(10))
CURVE_KEYS = 4096
"""Draws of more keys are left out of the curves unless they are asked for: a search costs by the square of the keys."""
SURFACE_KEYS, SURFACE_QUERIES = 20_000, 2_000
"""Of more keys there is no surface of alpha and beta; of more queries, so many are drawn."""
AROUND = np.geomspace(1 / 8, 4, 26)
"""Multiples of the index's beta that the surface shows: far beyond, only the scale of alpha changes."""
SEEDS = 3
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Report:
    """What was written: the file, its size in ``bytes``, the evaluation in it, and why parts were ``left_out``."""

    path: Path
    bytes: int
    evaluation: Evaluation
    left_out: dict[str, str]


def write_report(
    cache: CacheModel,
    test: Source,
    encoder: Encoder,
    out: str | os.PathLike[str],
    *,
    val: Source | None = None,
    shots: Sequence[int] | None = None,
    seeds: int = SEEDS,
    curves: bool = True,
    folder: str | os.PathLike[str] | None = None,
    where: str | None = None,
    command: str | None = None,
) -> Report:
    """Judge an index by a labelled test source, and write what is known about both as one HTML file.

    Args:
        cache: the index, answering by its ``settings``.
        test: labelled images or features; the figures are those of :func:`evaluate.evaluate`.
        encoder: makes features of them; ``encoder.skipped`` names what could not be read.
        out: the file, replaced in one step when the report is whole.
        val: labelled validation source, which settings of the curves are chosen on and the surface of alpha and beta is
            drawn from; without it both are from the shots themselves, each left out.
        shots: draws of the curves, keys a class; by default 1, 2, 4 ... as far as every class has keys.
        seeds: draws of each number of shots.
        curves: whether accuracy over shots is to be drawn.
        folder: the index folder, where ``cache`` no longer knows it.
        where: the condition that the keys were restricted by, for the record.
        command: the command line, for the record.

    The interval of an accuracy of ``h`` hits of ``n`` is Wilson's (:func:`wilson`), 95 %.

    Raises UsageError without matplotlib, for ``shots`` that classes do not have, or where ``val`` is ``test``;
    InputError as :func:`evaluate.evaluate`, and where ``out`` cannot be written. After any of them nothing was written.
    """
    path = Path(out)
    check(path)
    if seeds < 1:
        raise UsageError(f"seeds is {seeds}: at least 1 is needed")
    if val is not None and val.name == test.name:
        raise UsageError(f"val: {val.name} is the test source; settings are never chosen on it")
    _check_shots(cache, shots)
    ids = cache.ids_of(test)
    blocks = list(encoder.blocks(test))
    skipped = list(encoder.skipped)
    pairs = sum(len(block.positions) for block in blocks) * cache.n
    made = _Making(
        cache=cache,
        test=test,
        encoder=encoder,
        blocks=blocks,
        ids=ids,
        evaluation=judge(cache, blocks, ids, skipped, affinities=pairs <= AFFINITY_PAIRS, details=True),
        skipped=skipped,
        val=None if val is None else sweep.encode(cache, val, encoder),
        shots=shots,
        seeds=seeds,
        curves=curves,
        folder=Path(folder) if folder is not None else cache.folder,
        where=where,
        command=command,
    )
    page = made.page().encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return Report(path, len(page), made.evaluation, made.left_out)


def check(out: Path) -> None:
    """Raise before any work is done: UsageError without matplotlib, InputError where no file can be written."""
    plots.needs_matplotlib("a report")
    if out.is_dir():
        raise InputError(f"{show(out)}: is a folder; give a file")
    if not out.parent.is_dir():
        raise InputError(f"{show(out)}: cannot be written: there is no folder {show(out.parent)}")


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a fraction, ``hits`` of ``n`` (E. B. Wilson, 1927), with ``p = hits / n`` and ``z = 1.96``.

    ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)``; within 0 to 1, also at 0 and n hits.
    """
    p, share = hits / n, Z**2 / n
    centre, half = p + share / 2, Z * math.sqrt(p * (1 - p) / n + share / (4 * n))
    low, high = (centre - half) / (1 + share), (centre + half) / (1 + share)
    return max(0.0, low) if hits else 0.0, min(1.0, high) if hits < n else 1.0


def worst_mistakes(answers: Answers, most: int = MISTAKES) -> list[int]:
    """Wrong answers whose true class is least probable, as places in ``answers``; ties in the order of the source."""
    assert answers.details is not None
    wrong = np.flatnonzero(~answers.right)
    order: list[int] = wrong[np.argsort(answers.details.log_truth[wrong], kind="stable")][:most].tolist()
    return order


def certain_mistakes(answers: Answers, most: int = MISTAKES) -> list[int]:
    """Wrong answers of the highest probability, as places in ``answers``; ties in the order of the source."""
    assert answers.details is not None
    wrong = np.flatnonzero(~answers.right)
    order: list[int] = wrong[np.argsort(answers.details.log_doubt[wrong], kind="stable")][:most].tolist()
    return order


def _check_shots(cache: CacheModel, shots: Sequence[int] | None) -> None:
    counts = cache.class_ids.bincount(minlength=len(cache.class_names))
    least = int(counts[counts > 0].min())
    for number in shots or ():
        if number > least or number < 1:
            name = cache.class_names[int((counts == least).nonzero()[0])]
            raise UsageError(f"shots {number}: class {name!r} has {counted(least, 'key')}, and draws are from these")


class _LeftOutError(Exception):
    """A part that cannot be made, with the reason as the reader gets it."""


@dataclass(frozen=True)
class _Line:
    """One way of answering, as the headline tells it: ``right`` ``[n]``, ``truth`` ``[n]``, its ECE where known."""

    name: str
    what: str
    right: npt.NDArray[np.bool_]
    truth: Ints
    ece: float | None

    def cells(self) -> tuple[object, ...]:
        """A row of the table of accuracies."""
        hits, n = int(self.right.sum()), len(self.right)
        low, high = wilson(hits, n)
        mean = float(np.mean([self.right[self.truth == i].mean() for i in np.unique(self.truth)]))
        name = join([tag("b", self.name), tag("br"), tag("span", self.what, class_="note")])
        interval = f"{_percent(low)} to {_percent(high)}"
        figures = (_figure(hits / n), join([interval, _interval(hits / n, low, high)]), _figure(mean))
        return (name, *figures, "-" if self.ece is None else _data(self.ece, f"{self.ece:.3f}"), f"{n:,}")


@dataclass
class _Making:
    """A report in the making."""

    cache: CacheModel
    test: Source
    encoder: Encoder
    blocks: list[Block]
    ids: Ints
    evaluation: Evaluation
    skipped: list[Skipped]
    val: sweep.Items | None
    shots: Sequence[int] | None
    seeds: int
    curves: bool
    folder: Path | None
    where: str | None
    command: str | None
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        answers = self.evaluation.answers
        assert answers.details is not None
        self.answers, self.details = answers, answers.details
        self.features = np.concatenate([block.features for block in self.blocks])
        self.digests = [digest for block in self.blocks for digest in block.digests]
        if self.test.table is not None and pa.field("digest", pa.string()) in list(self.test.items.schema):
            self.digests = self.test.items["digest"].take(pa.array(self.details.positions)).to_pylist()
        self.sources = self.test.sources
        tuning = self.cache.provenance.get("finetune")
        self.finetune: dict[str, Any] | None = tuning if isinstance(tuning, dict) else None
        self.is_tuned = self.finetune is not None or self.cache.curve is not None or self.cache.values is not None
        self.pictures = _Pictures()
        self.manifest = self._manifest()

    def page(self) -> Html:
        """The whole file."""
        sections = [
            ("accuracy", "Accuracy", self._accuracy),
            ("shots", "Accuracy over shots", self._over_shots),
            ("settings", "Alpha and beta", self._surface),
            *([("training", "Fine-tuning", self._training)] if self.is_tuned else []),
            ("mistakes", "Mistakes", self._mistakes),
            ("confusions", "Confusions", self._confusions),
            ("classes", "Classes", self._classes),
            ("probabilities", "Probabilities", self._probabilities),
            ("affinities", "Affinities", self._affinities),
            ("provenance", "Settings and provenance", self._provenance),
        ]
        made = [self._section(*section) for section in sections]
        links = (tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in sections)
        name = show(self.folder) if self.folder is not None else "an index"
        title = f"{name} on {Path(self.test.name).name}"
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
        head = tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("link", rel="icon", href="data:,"),
            tag("title", title),
            tag(
                "style",
                Html(resources.files("retrieval_tip.report").joinpath("report.css").read_text(encoding="utf-8")),
            ),
        )
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        header = tag(
            "header",
            tag("h1", title),
            tag("p", self._lead(), class_="lead"),
            self._numbers(),
            self._cautions(),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        )
        footer = tag("footer", f"Written by retrieval-tip {doctor.examine().facts['retrieval-tip']}, {when}.")
        body = tag("body", header, tag("main", *made), footer)
        return Html("<!DOCTYPE html>\n" + tag("html", head, Html("\n"), body, lang="en") + "\n")

    def _section(self, name: str, title: str, make: Callable[[], object]) -> Html:
        try:
            body = make()
        except _LeftOutError as reason:
            self.left_out[name] = str(reason)
            body = tag("p", f"Left out: {reason}.", class_="left")
        return join([tag("section", tag("h2", title), body, id=name), Html("\n")])

    # ------------------------------------------------------------------------------------------------------- headline

    def _lead(self) -> str:
        cache = self.cache
        given = f"{counted(cache.n, 'key')} of {counted(len(cache.class_names), 'class')}"
        return (
            f"{counted(self.evaluation.n, 'test item')}, classified by {given}; {cache.backbone or 'unnamed features'}."
        )

    def _numbers(self) -> Html:
        found = self.evaluation
        low, high = wilson(int(self.answers.right.sum()), found.n)
        rows: list[tuple[object, object]] = [
            (_figure(found.top1), f"right, {self._blend_name()}: {_percent(low)} to {_percent(high)} (95%)")
        ]
        if found.zero_shot_top1 is not None:
            rows.append((_figure(found.zero_shot_top1), "right by the text alone (zero-shot)"))
        rows.append((_figure(found.cache_top1), "right by the cache alone"))
        rows.append((_figure(found.top5), "with the true class among the first five"))
        return tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for value, what in rows), class_="numbers")

    def _blend_name(self) -> str:
        return "Tip-Adapter-F" if self.is_tuned else "Tip-Adapter"

    def _cautions(self) -> Html | None:
        """What a reader should know before believing the figures."""
        lines = []
        chosen_on = self._search().get("chosen_on")
        if chosen_on == self.test.name:
            lines.append("The settings of this index were chosen on this very source: its accuracy is too high.")
        known = pa.array([digest for digest in self.digests if digest is not None], pa.string())
        shared = pc.sum(pc.is_in(known, value_set=self.cache.labels["digest"])).as_py() or 0
        if shared:
            lines.append(
                f"{counted(shared, 'test item')} of {self.evaluation.n:,} are images that are keys of the index."
            )
        if self.skipped:
            lines.append(f"{counted(len(self.skipped), 'item')} could not be read; see the end of this report.")
        absent = len(self.cache.class_names) - len(self.evaluation.per_class)
        if absent:
            lines.append(f"{absent:,} of the {len(self.cache.class_names):,} classes of the index have no test item.")
        return tag("div", *(tag("p", line) for line in lines), class_="caution", role="note") if lines else None

    def _accuracy(self) -> Html:
        found, truth = self.evaluation, self.answers.truth
        lines = []
        if found.zero_shot_top1 is not None:
            text = self.details.text
            right = text.predicted == truth
            lines.append(_Line("zero-shot", "text weights alone", right, truth, _ece(text.confidence, right)))
        alone = self.details.cache
        right = alone.predicted == truth
        ece = _ece(alone.confidence, right) if found.settings.alpha else None
        lines.append(
            _Line("cache alone", "fine-tuned keys alone" if self.is_tuned else "keys alone", right, truth, ece)
        )
        notes = []
        if self.is_tuned:
            try:
                lines.append(self._parent())
            except _LeftOutError as reason:
                notes.append(f"Tip-Adapter before fine-tuning is not in this table: {reason}.")
        what = "text and fine-tuned cache" if self.is_tuned else "text and cache, blended"
        lines.append(_Line(self._blend_name(), what, self.answers.right, truth, found.ece))
        if found.zero_shot_top1 is None:
            notes.append(
                "The index has no text weights: there is no zero-shot answer, and the blend is the cache alone."
            )
        said = (
            "Accuracy is the share of the test items whose most probable class is the true one, with Wilson's 95% "
            "interval; the mean is over classes. ECE is the expected calibration error in 15 bins, of the blend at the "
            f"index's temperature ({found.settings.temperature:.4g}), of the others at 1."
        )
        columns = ("answers by", "accuracy", "95% interval", "mean of classes", "ECE", "items")
        rows = [line.cells() for line in lines]
        every = _scroll(table(columns, rows, "Accuracy of each way of answering.", numbers=(1, 3, 4, 5)))
        return join([tag("p", said, class_="note"), every, *(tag("p", note, class_="note") for note in notes)])

    def _parent(self) -> _Line:
        """The index that this one was fine-tuned from, answering the same items."""
        facts = self.finetune or {}
        name, version = facts.get("parent"), facts.get("parent_version")
        if not isinstance(name, str) or not name:
            raise _LeftOutError("the record does not say what the index was made from")
        try:
            number = version if isinstance(version, int) else None
            parent = CacheModel.load(name, device=self.cache.device, precision=self.cache.precision, version=number)
            check_backbone(parent.backbone, parent.d, self.encoder.backbone, [self.test])
            if parent.class_names != self.cache.class_names:
                raise InputError(f"{name}: has other classes")
            found = judge(parent, self.blocks, self.ids)
        except (RetrievalTipError, OSError, ValueError) as error:
            raise _LeftOutError(f"it was made from {name}, which cannot be asked ({error})") from None
        what = f"{name}, version {parent.version}, before fine-tuning"
        return _Line("Tip-Adapter", what, found.answers.right, found.answers.truth, found.ece)

    # ------------------------------------------------------------------------------------------------ shots, settings

    def _drawn(self) -> tuple[list[int], str]:
        """How many shots are drawn, and what is said about those that are not."""
        if not self.curves:
            raise _LeftOutError("not asked for")
        if self.is_tuned:
            raise _LeftOutError("the keys are fine-tuned together: a draw of them is no index of fewer shots")
        counts = self.cache.class_ids.bincount(minlength=len(self.cache.class_names))
        classes, least = int((counts > 0).sum()), int(counts[counts > 0].min())
        if self.shots is not None:
            return list(dict.fromkeys(self.shots)), ""
        if least < 2:
            name = self.cache.class_names[int((counts == 1).nonzero()[0])]
            raise _LeftOutError(f"class {name!r} has one key; draws need 2 keys a class or more")
        possible = [number for number in SHOTS if number <= least]
        few = [number for number in possible if number * classes <= CURVE_KEYS]
        if not few:
            raise _LeftOutError(
                f"one key of each of {classes:,} classes are more than {CURVE_KEYS:,}; --shots N draws them anyway"
            )
        more = f" Draws of more than {CURVE_KEYS:,} keys are left out." if len(few) < len(possible) else ""
        return few, more

    def _over_shots(self) -> Html:
        drawn, more = self._drawn()
        counts = self.cache.class_ids.bincount()
        test = sweep.Items(self.features, self.answers.truth, self.test.name)
        methods = sweep.METHODS[:3] if self.cache.has_text else ("cache-alone",)
        rows: list[dict[str, Any]] = []
        try:
            with tempfile.TemporaryDirectory() as place, self._bar(len(drawn) * self.seeds * len(methods)) as bar:
                for number in drawn:
                    every = bool((counts[counts > 0] == number).all())  # each draw is of the same keys
                    runs = sweep.sweep(
                        self.cache, "", test, Path(place) / "runs.parquet",
                        shots=[number], seeds=range(1, 2 if every else self.seeds + 1), methods=methods, val=self.val,
                    )  # fmt: skip
                    for row in runs:
                        rows.append(row)
                        bar.update()
        except RetrievalTipError as error:
            raise _LeftOutError(str(error)) from None
        lines = sweep.summary(rows)
        chosen_on: dict[str, list[int]] = {}
        for row in rows:
            if row["method"] == methods[-1] and row["seed"] == 1:
                chosen_on.setdefault(row["chosen_on"], []).append(row["shots"])
        chosen = "; ".join(f"{', '.join(map(str, of))}: {Path(what).name}" for what, of in chosen_on.items())
        caption = (
            f"Draws by the published rule from the index's own keys, seeds 1 to {self.seeds}, one where a draw is all "
            f"keys. Alpha, beta and k are chosen without the test items (shots {chosen}). Bars are 95% intervals of "
            f"the mean over draws, dots single draws.{more}"
        )
        shown = [
            (line["method"], line["shots"], line["seeds"], _figure(line["top1"]),
             "-" if line["half"] is None else f"{100 * line['half']:.1f}",
             _spread([row["top1"] for row in rows if (row["method"], row["shots"]) == (line["method"], line["shots"])]))
            for line in sorted(lines, key=lambda line: methods.index(line["method"]))
        ]  # fmt: skip
        columns = ("method", "shots", "draws", "mean accuracy", "half of 95%, points", "lowest to highest")
        label = "Accuracy over shots: " + "; ".join(
            f"{line['method']} {line['shots']} shots {_percent(line['top1'])}" for line in lines
        )
        figure = _plot(lambda: plots.draw_shots(lines, rows), label, caption)
        return join([figure, _folded("The figures", _scroll(table(columns, shown, numbers=(1, 2, 3, 4, 5))))])

    def _surface(self) -> Html:
        cache = self.cache
        if self.is_tuned:
            raise _LeftOutError(
                "fine-tuned keys know their own shots, and belong to the alpha and beta that they were trained with"
            )
        if cache.n > SURFACE_KEYS:
            raise _LeftOutError(f"{cache.n:,} keys are more than {SURFACE_KEYS:,}; search-hp --surface draws it")
        try:
            if self.val is None:
                queries = search_hp.leave_one_out(cache)
            else:
                queries = search_hp.unseen(cache, self.val.features, self.val.ids, self.val.name)
            queries = _some(queries)
            settings = cache.settings
            k = None if cache.index.by_class or settings.k is None or settings.k >= cache.n else settings.k
            betas = sorted({*(settings.beta * AROUND if settings.beta else search_hp.BETAS).tolist(), settings.beta})
            choice = search_hp.search(cache, queries, betas=betas, ks=[k])
        except RetrievalTipError as error:
            raise _LeftOutError(str(error)) from None
        (panel,) = plots.surface_panels(choice.surface)
        own = float(panel.accuracy[panel.nearest(settings.alpha, settings.beta)])
        best = float(panel.accuracy.max())
        beyond = not panel.alphas[0] <= settings.alpha <= panel.alphas[-1]
        said = (
            f"On {Path(queries.name).name}, {counted(len(queries.ids), 'item')}, k = {k or 'all'}; not on test. "
            f"Cross: this report's alpha {settings.alpha:.4g} and beta {settings.beta:.4g}, {_percent(own)}"
            f"{' (alpha is beyond the edge)' if beyond else ''}. Circle: the highest, {_percent(best)}. "
            f"Cells more than {plots.POINTS} points below it share one colour."
        )
        return _plot(
            lambda: plots.draw_heat(panel, settings.alpha, settings.beta), f"Accuracy over alpha and beta. {said}", said
        )

    def _training(self) -> Html:
        facts, curve = self.finetune or {}, self.cache.curve
        rows = [(name, _shown(value)) for name, value in facts.items()]
        body = [_scroll(table((), rows, "What the index says of its training."), "facts")] if rows else []
        if curve is not None:
            try:
                curve = curve.select(CURVE.names).cast(CURVE)
            except (KeyError, pa.ArrowException):
                raise _LeftOutError("the index has a curve of another kind") from None
            kept = facts.get("epoch")
            epoch = kept if isinstance(kept, int) else int(curve["epoch"].to_numpy()[-1])
            loss, accuracy = (float(curve[name].to_numpy()[-1]) for name in ("loss", "accuracy"))
            said = (
                f"Cross-entropy and accuracy on the shots by epoch, as they were met; epoch {epoch} was kept. "
                f"In the last one the loss was {loss:.4g}, the accuracy {_percent(accuracy)}."
            )
            body.insert(0, _plot(lambda: plots.draw_training(curve, epoch), said, said))
        return join(body)

    # ------------------------------------------------------------------------------------------------------- mistakes

    def _mistakes(self) -> Html:
        worst, certain = worst_mistakes(self.answers), certain_mistakes(self.answers)
        wrong = int((~self.answers.right).sum())
        if not wrong:
            return tag("p", f"None: all {counted(self.evaluation.n, 'answer')} are right.")
        explained = self._explained([*worst, *(place for place in certain if place not in worst)])
        number = {place: i for i, place in enumerate(explained, 1)}
        first = (self._card(number[place], place, explained[place]) for place in worst)
        again = (
            self._card(number[place], place, explained[place])
            if place not in worst
            else self._again(number[place], place)
            for place in certain
        )
        few = f"{counted(wrong, 'mistake')} in {counted(self.evaluation.n, 'answer')}."
        legend = "Beneath each: the nearest keys, with their affinity A and their weight w = exp(-beta (1 - A))."
        return join(
            [
                tag("p", few),
                tag("h3", "The true class least probable"),
                tag("p", legend, class_="note"),
                tag("ol", *first, class_="cards", id="worst"),
                tag("h3", "The most certain mistakes"),
                tag("ol", *again, class_="cards", id="certain"),
            ]
        )

    def _explained(self, places: Sequence[int]) -> dict[int, tuple[Prediction, Html]]:
        """Of answers, their predictions with neighbours, and a table of their classes with both parts of the logits."""
        if not places:
            return {}
        some = self.features[np.asarray(places)]
        found = self.cache.classify(some, 3, neighbours=NEIGHBOURS)
        text, alone = self.cache.terms(some)
        names = self.cache.class_names
        explained = {}
        for row, (place, prediction) in enumerate(zip(places, found, strict=True)):
            truth, answer = int(self.answers.truth[place]), int(self.answers.predicted[place])
            chances = {
                names.index(label): p for label, p in zip(prediction.labels, prediction.probabilities, strict=True)
            }
            chances |= {answer: self.answers.confidence[place], truth: math.exp(self.details.log_truth[place])}
            rows = []
            for i, chance in sorted(chances.items(), key=lambda pair: -pair[1]):
                kind, what = ("answer", "answered") if i == answer else ("true", "true") if i == truth else (None, None)
                mark = [] if kind is None else [" ", tag("span", f"({what})", class_=kind)]
                parts = (f"{float(text[row, i]):.2f}", f"{float(self.cache.settings.alpha * alone[row, i]):.2f}")
                rows.append((join([names[i], *mark]), _data(float(chance), _chance(float(chance))), *parts))
            columns = ("class", "probability", "text", "cache")
            explained[place] = prediction, table(columns, rows, numbers=(1, 2, 3))
        return explained

    def _card(self, number: int, place: int, explained: tuple[Prediction, Html]) -> Html:
        """One mistake: its picture, its classes, and the keys that made it."""
        prediction, classes = explained
        digests = self._digests_of(prediction.neighbours)
        truth, answer = (
            self.cache.class_names[int(ids[place])] for ids in (self.answers.truth, self.answers.predicted)
        )
        keys = [
            tag(
                "li",
                self.pictures.of(key.source, digests.get(key.key_id), f"key of {key.label}", SMALL_SIDE, "key"),
                tag("b", key.label, class_="true" if key.label == truth else "answer" if key.label == answer else None),
                f" A {key.affinity:.3f}",
                tag("br"),
                f"w {key.weight:.1e}",
            )
            for key in prediction.neighbours
        ]
        name = self._name(place)
        top = tag(
            "div", self._picture(place, "query", QUERY_SIDE), tag("div", _title(truth, answer), classes), class_="top"
        )
        ids = tag("p", _short(name), class_="id")
        near = [tag("h4", "Nearest keys"), tag("ol", *keys, class_="keys")] if keys else []
        return tag("li", top, ids, *near, class_="card", id=f"mistake-{number}", data_item=name)

    def _again(self, number: int, place: int) -> Html:
        """A mistake that is shown above."""
        truth, answer = (
            self.cache.class_names[int(ids[place])] for ids in (self.answers.truth, self.answers.predicted)
        )
        chance = float(self.answers.confidence[place])
        link = tag("a", "shown above", href=f"#mistake-{number}")
        said = tag("p", "probability ", _data(chance, _chance(chance)), ", ", link, class_="note")
        name = self._name(place)
        body = tag("div", _title(truth, answer), said, tag("p", _short(name), class_="id"))
        return tag(
            "li",
            tag("div", self._picture(place, "query", SMALL_SIDE), body, class_="top"),
            class_="card",
            data_item=name,
        )

    def _name(self, place: int) -> str:
        return self.sources[int(self.details.positions[place])]

    def _picture(self, place: int, kind: str, side: int) -> Html:
        position = int(self.details.positions[place])
        path = self.test.paths[position] if self.test.paths is not None else self.sources[position]
        label = self.cache.class_names[int(self.answers.truth[place])]
        return self.pictures.of(path, self.digests[place], f"test item of {label}", side, kind)

    def _digests_of(self, neighbours: Sequence[Neighbour]) -> dict[int, str | None]:
        wanted = pa.array([key.key_id for key in neighbours], pa.int64())
        labels = self.cache.labels.select(["key_id", "digest"])
        rows = labels.filter(pc.is_in(labels["key_id"], value_set=wanted)).to_pylist()
        return {row["key_id"]: row["digest"] for row in rows}

    def _confusions(self) -> Html:
        found = self.evaluation.confusions[:PAIRS]
        if not found:
            return tag("p", "None.")
        names, answers = self.cache.class_names, self.answers
        examples: list[tuple[str, str, int, list[int]]] = []
        for true, answer, times in found:
            of = np.flatnonzero((answers.truth == names.index(true)) & (answers.predicted == names.index(answer)))
            first = of[np.argsort(-answers.confidence[of], kind="stable")][:EXAMPLES].tolist()
            examples.append((true, answer, times, first))
        explained = self._explained([place for *_, places in examples for place in places])
        items = []
        for true, answer, times, places in examples:
            near = [key for place in places for key in explained[place][0].neighbours if key.label == answer]
            keys = list({key.key_id: key for key in near}.values())[:EXAMPLES]
            digests = self._digests_of(keys)
            shown = [self._picture(place, "small", SMALL_SIDE) for place in places]
            drawn = [
                self.pictures.of(key.source, digests.get(key.key_id), f"key of {answer}", SMALL_SIDE, "small")
                for key in keys
            ]
            total = int((answers.truth == names.index(true)).sum())
            items.append(
                tag(
                    "li",
                    tag("div", _title(true, answer), tag("p", f"{times} of {counted(total, 'item')}", class_="note")),
                    tag("div", tag("h4", "test items"), tag("div", *shown, class_="small")),
                    tag("div", tag("h4", "keys near them"), tag("div", *drawn, class_="small")) if drawn else None,
                    class_="pair",
                )
            )
        label = f"Confusion matrix of {counted(len(self.evaluation.per_class), 'class')}, as shares of the true class"
        matrix = _plot(lambda: plots.draw_confusion(self.evaluation), label, None, wide=True)
        return join([tag("ol", *items, class_="pairs"), _folded("The confusion matrix", matrix)])

    # --------------------------------------------------------------------------------------------- classes and figures

    def _classes(self) -> Html:
        answers, names = self.answers, self.cache.class_names
        keys = self.cache.class_ids.bincount(minlength=len(names)).tolist()
        rows = []
        for name, accuracy in sorted(self.evaluation.per_class.items(), key=lambda pair: pair[1])[:CLASSES]:
            i = names.index(name)
            own = answers.truth == i
            wrong = Counter(answers.predicted[own & ~answers.right].tolist()).most_common(1)
            most = f"{names[wrong[0][0]]} ({wrong[0][1]})" if wrong else "-"
            low, high = wilson(int(answers.right[own].sum()), int(own.sum()))
            figures = (_figure(accuracy), f"{_percent(low)} to {_percent(high)}")
            rows.append((name, *figures, int(own.sum()), keys[i], most))
        columns = ("class", "accuracy", "95% interval", "items", "keys", "most often taken for")
        worst = f"the lowest, {rows[0][0]}, {_percent(min(self.evaluation.per_class.values()))}"
        said = f"Mean over classes {_percent(self.evaluation.mean_per_class)}; {worst}."
        figure = _plot(lambda: plots.draw_per_class(self.evaluation), f"Accuracy by class. {said}", None)

        def shown(number: int) -> Html:
            few = "" if len(self.evaluation.per_class) <= number else f", the worst {number:,}"
            return _scroll(
                table(columns, rows[:number], f"Accuracy by class, lowest first{few}.", numbers=(1, 2, 3, 4))
            )

        more = [_folded("More classes", shown(CLASSES))] if len(rows) > WORST else []
        return join([tag("p", said), shown(WORST), *more, _folded("As a diagram", figure)])

    def _probabilities(self) -> Html:
        found = self.evaluation
        mean = float(self.answers.confidence.mean())
        said = f"Mean probability of an answer {_percent(mean)}, accuracy {_percent(found.top1)}"
        said += f", expected calibration error {found.ece:.3f}."
        covered = "Accuracy of the answers that are given, as those of the lowest probability are withheld."
        return join(
            [
                _plot(lambda: plots.draw_reliability(found), f"Reliability. {said}", said),
                _plot(lambda: plots.draw_coverage(found), covered, covered),
            ]
        )

    def _affinities(self) -> Html:
        seen = self.answers.affinities
        if seen is None:
            raise _LeftOutError(f"more than {AFFINITY_PAIRS:,} pairs of an item and a key; evaluate --plot counts them")
        same, other = (plots.mean_affinity(seen, counts) for counts in (seen.same, seen.other))
        said = "Affinities of test items to keys: mean to the same class "
        said += (
            f"{'-' if same is None else f'{same:.3f}'}, to other classes {'-' if other is None else f'{other:.3f}'}."
        )
        return _plot(lambda: plots.draw_affinity(self.evaluation), said, said)

    # ------------------------------------------------------------------------------------------------------ provenance

    def _manifest(self) -> Manifest | None:
        """What the folder says, of this version where it is known."""
        if self.folder is None:
            return None
        version = self.cache.version
        return store.read_manifest(self.folder) if version is None else store.read_version(self.folder, version)

    def _search(self) -> dict[str, Any]:
        found = self.cache.provenance.get("search")
        return found if isinstance(found, dict) else {}

    def _provenance(self) -> Html:
        parts = [
            _scroll(
                table(("setting", "value", "where it comes from"), self._settings(), "Settings of the answers."),
                "facts",
            ),
            tag("h3", "How they were chosen"),
            self._chosen(),
            tag("h3", "The index"),
            _scroll(table((), self._index_facts()), "facts"),
            tag("h3", "The test"),
            _scroll(table((), self._test_facts()), "facts"),
            tag("h3", "The machine"),
            _scroll(table((), list(doctor.examine().facts.items())), "facts"),
        ]
        return join(parts)

    def _settings(self) -> Iterator[tuple[str, str, str]]:
        found, manifest, kept = self.evaluation, self.manifest, self.cache.provenance
        searched = "search-hp" if self._search() else "the index"
        known = {"alpha": kept.get("alpha"), "beta": kept.get("beta"), "k": searched, "tail": "the index"}
        known |= {"temperature": kept.get("temperature", "not fitted")}
        for name, source in known.items():
            value = getattr(found.settings, name)
            own = getattr(manifest.settings, name) if manifest is not None else value
            given = f"given for this report; the index has {_setting(own)}"
            yield name, _setting(value), _shown(source) if own == value else given
        yield "logit_scale", _setting(self.cache.settings.logit_scale), "the index"

    def _chosen(self) -> Html:
        search = self._search()
        if not search:
            said = "Not by a search: alpha and beta are as the table says, and no validation images were looked at."
            return tag("p", said)
        return _scroll(table((), [(name, _shown(value)) for name, value in search.items()], "By search-hp."), "facts")

    def _index_facts(self) -> Iterator[tuple[str, object]]:
        cache, manifest = self.cache, self.manifest
        if self.folder is not None and manifest is not None:
            yield "folder", show(self.folder)
            yield "version", f"{manifest.version}, {manifest.created_at}, by {manifest.created_by}"
            yield "last change", manifest.change or "-"
            yield "keys' digest", manifest.keys_digest
        yield "keys", f"{cache.n:,} of {cache.d:,} values, {cache.keys.dtype}, {counted(cache.segments, 'segment')}"
        if self.where is not None:
            yield "restricted by", self.where
        yield "classes", f"{len(cache.class_names):,}"
        yield "FAISS index", f"{cache.index.factory} on {cache.device}"
        yield "templates", " | ".join(cache.templates) or "-"
        if cache.backbone is not None:
            yield "backbone", str(cache.backbone)
            yield "backbone's weights", cache.backbone.weights
            yield "preprocessing", _shown(dict(cache.backbone.preprocess))
        for name in ("source", "dataset", "shots", "seed", "views", "text", "affinity_other_classes", "skipped"):
            if cache.provenance.get(name) not in (None, []):
                yield (
                    {"skipped": "skipped at build", "text": "text weights"}.get(name, name),
                    _shown(cache.provenance[name]),
                )

    def _test_facts(self) -> Iterator[tuple[str, object]]:
        yield "source", self.test.name
        yield "items", f"{self.evaluation.n:,} answered, {len(self.skipped):,} could not be read"
        if self.val is not None:
            yield "validation", f"{self.val.name}, {counted(len(self.val.ids), 'item')}"
        if "shots" not in self.left_out:
            yield "seeds of the draws", f"1 to {self.seeds}"
        yield "date", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if self.command is not None:
            yield "command", tag("code", self.command)
        skipped = self.encoder.skipped  # of the validation source too
        for item in skipped[:LISTED]:
            yield "skipped", str(item)
        if len(skipped) > LISTED:
            yield "skipped", f"and {len(skipped) - LISTED:,} more"

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, unit="draw", disable=None if self.encoder.progress else True, leave=False)


class _Pictures:
    """Thumbnails as parts of the page, and something quiet where there is none."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], str | None] = {}

    def of(self, path: str, digest: str | None, alt: str, side: int, kind: str) -> Html:
        """The picture at a path, unless its bytes are no longer those of ``digest``; ``alt`` says what it should be."""
        if (path, side) not in self._made:
            self._made[path, side] = self._encoded(path, digest, side)
        found = self._made[path, side]
        if found is not None:
            return tag("img", src=f"data:image/jpeg;base64,{found}", alt=alt, class_=kind, title=show(path))
        name = show(path)
        return tag("span", _short(name), class_=f"none {kind}", role="img",
                   aria_label=f"{alt}, no picture: {name}")  # fmt: skip

    @staticmethod
    @images.turn()
    def _encoded(path: str, digest: str | None, side: int) -> str | None:
        try:
            data = images.read(path)
            if digest is not None and hashlib.sha256(data).hexdigest() != digest:
                return None
            return base64.b64encode(images.thumbnail(data, side)).decode()
        except InputError:
            return None


def _some(queries: search_hp.Queries) -> search_hp.Queries:
    """No more queries than :data:`SURFACE_QUERIES`, drawn by seed 0."""
    if len(queries.ids) <= SURFACE_QUERIES:
        return queries
    rows = np.sort(np.random.default_rng(0).choice(len(queries.ids), SURFACE_QUERIES, replace=False))
    return replace(queries, features=queries.features[rows], ids=queries.ids[rows], hidden=queries.hidden[rows])


def _plot(draw: Callable[[], Figure], label: str, caption: str | None, wide: bool = False) -> Html:
    drawn = Html(plots.svg(draw, label))
    kind = "plot wide" if wide else "plot"
    said = tag("figcaption", caption) if caption is not None else None
    return tag("figure", tag("div", drawn, class_="scroll", tabindex=0), said, class_=kind)


def _scroll(content: Html, kind: str = "figures") -> Html:
    """What scrolls sideways on a narrow page."""
    return tag("div", content, class_=f"scroll {kind}", tabindex=0)


def _folded(title: str, content: Html) -> Html:
    return tag("details", tag("summary", title), content)


def _title(truth: str, answer: str) -> Html:
    return tag("h3", tag("span", truth, class_="true"), " taken for ", tag("span", answer, class_="answer"))


def _interval(value: float, low: float, high: float) -> Html:
    """An interval as a line from 0 to 100 %, for the eye; the figures are beside it."""
    line = tag("line", x1=f"{100 * low:.2f}%", x2=f"{100 * high:.2f}%", y1="50%", y2="50%")
    axis = tag("line", x1="0%", x2="100%", y1="50%", y2="50%", class_="axis")
    return tag(
        "svg", axis, line, tag("circle", cx=f"{100 * value:.2f}%", cy="50%", r=3), class_="interval", aria_hidden="true"
    )


def _data(value: float, shown: str) -> Html:
    """A figure as it is shown, and as it is."""
    return tag("data", shown, value=repr(value))


def _figure(value: float) -> Html:
    return _data(value, _percent(value))


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _short(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= NAME else f"…{name[1 - NAME :]}"


def _chance(value: float) -> str:
    return "< 1e-9" if value < 1e-9 else f"{value:.1e}" if value < 5e-5 else f"{value:.4f}"


def _spread(values: Sequence[float]) -> str:
    return f"{_percent(min(values))} to {_percent(max(values))}"


def _ece(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    return expected_calibration_error(confidence, right)


def _setting(value: object) -> str:
    return "all" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _shown(value: object) -> str:
    """A value of a manifest, of whatever kind."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value[:LISTED])) + (f" ... ({len(value)} in all)" if len(value) > LISTED else "")
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
