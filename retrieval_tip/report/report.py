"""Write accuracy reports as single HTML files that contain no scripts and no external links.

The layout is in ``page.html.j2``.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as remembered
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from retrieval_tip import doctor
from retrieval_tip.arrays import IntArray
from retrieval_tip.data import images
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.evaluation.audit import AUDITED, audit
from retrieval_tip.evaluation.calibration import reliability
from retrieval_tip.evaluation.evaluate import Answers, Evaluation, evaluate
from retrieval_tip.files import check_out, replacing
from retrieval_tip.fit.confidence import wilson
from retrieval_tip.html import markup, render
from retrieval_tip.index import places
from retrieval_tip.index.places import Place
from retrieval_tip.model import Index
from retrieval_tip.predictions import Neighbour
from retrieval_tip.settings import Ask
from retrieval_tip.store.manifest import Manifest
from retrieval_tip.wording import command_line, counted, few, one_line, percent, show, span

if TYPE_CHECKING:
    from markupsafe import Markup

MATRIX = 40
"""Maximum number of classes in the confusion matrix. If there are more, those with the most errors are shown."""
MARKS = (0.0, 0.5, 0.9, 0.99)
"""The accuracy is shown for answers with at least these probabilities."""
LISTED = 50
"""Maximum number of items of a value to list."""
SURE = 0.9
"""Minimum probability of a confident prediction."""
WEAK, NAMED = 0.5, 3
"""Accuracy below which a class always counts as weak, and the maximum number of weak classes to list."""
MISCALIBRATED = 0.05
"""Smallest difference between the mean probability and the accuracy at which a calibration is recommended."""
MISTAKES, PAIRS, EXAMPLES, NEIGHBOURS = 12, 8, 3, 5
"""Maximum numbers of mistakes in a list, of confused pairs, of photos per pair, and of keys per mistake."""


def write_report(
    index: Index,
    test: Source,
    reader: Reader,
    out: str | os.PathLike[str],
    *,
    abstain: float | None = None,
    ask: Ask = Ask(),
    place: Place | None = None,
    command: str | None = None,
) -> Evaluation:
    """Evaluate an index on a labelled test source, and write an accuracy report as one HTML file.

    Returns the result of :func:`evaluate.evaluate`, whose figures are shown. An existing file ``out`` is replaced once
    the report is complete. ``reader.skipped`` lists the unreadable items.

    Args:
        index: The index. Its ``settings`` are used for the answers.
        test: Labelled images or features.
        reader: The encoder that computes the features.
        out: The HTML file.
        abstain: The probability below which an answer is withheld in the returned evaluation.
        ask: The question, whose ``at_least`` and ``coverage`` also count in the returned evaluation.
        place: The folder or address of the index. Required only if ``index`` does not contain it.
        command: The command line to show in the report.

    Raises InputError as :func:`evaluate.evaluate` does, or if ``out`` cannot be written.
    """
    path = Path(out)
    check_out(path)
    every = FeatureBlock.joined(list(reader.blocks(test)))
    evaluation = evaluate(
        index,
        test,
        reader,
        abstain=abstain,
        blocks=[every],
        at_least=ask.at_least,
        coverage=ask.coverage,
    )
    block = every.take(np.flatnonzero(np.isin(every.positions, evaluation.answers.positions)))
    named = index.place if place is None else str(place)
    page = _page(Results(index, test, reader, block, evaluation, named, command)).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return evaluation


def _page(results: Results) -> str:
    index = results.index
    evaluation = results.evaluation
    name = "an index"
    if results.place is not None:
        name = f'"{show(Path(results.place).name)}"'
    return render(
        "report/page.html.j2",
        title=f'Accuracy of {name} on "{Path(results.test.name).name}"',
        results=results,
        index=index,
        evaluation=evaluation,
        sentences=list(results.sentences()),
        actions=list(results.actions()),
        pairs=list(confusions(results)),
        mistakes=list(mistakes(results)),
        matrix=confusion_matrix(evaluation.answers),
        reliability=list(by_probability(evaluation)),
        coverage=list(by_coverage(evaluation)),
        provenance=provenance(results),
        counted=counted,
        few=few,
        percent=percent,
        portable=portable,
        nobreak=_nobreak,
        thumbnail=remembered(partial(thumbnail, results.test.load)),
    )


def _nobreak(text: str) -> Markup:
    """Escape a text, and keep each number and its per cent sign on the same line."""
    from markupsafe import escape

    return markup(str(escape(one_line(text))).replace(" %", "&nbsp;%"))


class Confusion(NamedTuple):
    """A confusion matrix: ``counts[i, j]`` items of class ``names[i]`` were classified as ``names[j]``.

    ``totals[i]`` is the number of items of class ``i``. ``of`` is the number of classes that occur. If there are many,
    ``counts`` only contains the classes with the most errors. It omits items of unknown classes that got "no match".
    """

    names: list[str]
    counts: IntArray
    totals: IntArray
    of: int


def confusion_matrix(answers: Answers) -> Confusion:
    """Count the answers by true and predicted class, in the order of the index."""
    truth = answers.truth
    predicted = answers.predicted
    c = len(answers.class_names)
    wrong = ~answers.right
    totals = np.bincount(truth, minlength=c)
    chosen = occurring = np.flatnonzero(totals + np.bincount(predicted, minlength=c))
    if len(occurring) > MATRIX:
        errors = np.bincount(truth[wrong], minlength=c) + np.bincount(predicted[wrong], minlength=c)
        chosen = np.sort(np.argsort(-errors, kind="stable")[:MATRIX])
    shown = np.isin(truth, chosen) & np.isin(predicted, chosen) & (answers.of_known | wrong)
    rows = np.searchsorted(chosen, truth[shown])
    columns = np.searchsorted(chosen, predicted[shown])
    counts = np.zeros((len(chosen), len(chosen)), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    names = [answers.class_names[i] for i in chosen]
    return Confusion(names, counts, totals[chosen], len(occurring))


class Share(NamedTuple):
    """The ``n`` answers of a part of an evaluation, which is named ``of``, and how many are right.

    ``share`` is their mean probability, or their share of all answers.
    """

    of: str
    n: int
    share: float
    accuracy: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.accuracy, self.n)


def by_probability(evaluation: Evaluation) -> Iterator[Share]:
    """Yield the answers to photos of known classes by their probability, with its mean."""
    answers = evaluation.answers
    is_known = answers.of_known
    bins = reliability(answers.confidence[is_known], answers.right[is_known], 10)
    for low, high, n, mean, accuracy in bins:
        yield Share(span((low, high)), n, mean, accuracy)


def by_coverage(evaluation: Evaluation) -> Iterator[Share]:
    """Yield the answers whose probability reaches each threshold, with their share of all answers."""
    answers = evaluation.answers
    for least in sorted({*MARKS, evaluation.figures.get("abstain", MARKS[0])}):
        right = answers.right[answers.confidence >= least]
        n = len(right)
        if n:
            accuracy = float(right.mean())
            yield Share(f"at least {100 * least:g} %", n, n / evaluation.n, accuracy)


def provenance(results: Results) -> dict[str, list[tuple[str, str]]]:
    """Return the rows of each part by its title."""
    index = results.index
    skipped = results.reader.skipped
    used = results.evaluation.settings.shown()
    about = dict[str, object](folder=results.place)
    manifest = results.manifest
    if manifest is not None:
        about["version"] = f"{manifest.version}, {manifest.created_at}, by {manifest.created_by}"
        about["last change"] = manifest.change
        for name, value in manifest.settings.shown().items():
            if value != used[name]:
                reason = f"set for this report; the index has {described(value)}"
                used[name] = f"{described(used[name])} ({reason})"
    about |= {
        "examples": f"{index.n:,} of {counted(len(index.class_names), 'class')}",
        "vectors": f"{index.d:,} values, {index.dtype}",
        "FAISS index": f"{index.index_type} on {index.device}",
        "prompts": index.templates,
        "encoder": None if index.backbone is None else index.backbone.to_dict(),
    }
    test = {
        "source": results.test.name,
        "photos": f"{results.evaluation.n:,} classified, {len(skipped):,} could not be read",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": results.command,
        "skipped": [str(item) for item in skipped],
    }
    made = index.provenance | {"fit": results.record("fit").get("form")}
    parts = {
        "Test": test,
        "Settings": used,
        "Index": about,
        "How it was made": made,
        "Machine": doctor.examine().facts,
    }
    tables = {}
    for title, facts in parts.items():
        stated = {name: value for name, value in facts.items() if value not in (None, [])}
        tables[title] = [(name, described(value)) for name, value in stated.items()]
    return tables


def described(value: object) -> str:
    """Return a manifest value as text without local paths."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {described(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        more = f" ... ({len(value)} in all)" if len(value) > LISTED else ""
        return ", ".join(map(described, value[:LISTED])) + more
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return portable(str(value))


@dataclass(frozen=True)
class Results:
    """A test source with the answers of an index, and the arguments of :func:`write_report`.

    ``block`` contains the encoded items in the order of the answers in ``evaluation``.
    """

    index: Index
    test: Source
    reader: Reader
    block: FeatureBlock
    evaluation: Evaluation
    place: str | None
    command: str | None

    @cached_property
    def manifest(self) -> Manifest | None:
        """The manifest of the index, if it has a place."""
        return None if self.place is None else places.at(self.place).manifest(self.index.version)

    @property
    def answers(self) -> Answers:
        """The answers for the ``n`` items."""
        return self.evaluation.answers

    def record(self, name: str) -> dict[str, object]:
        """Return what the index records about ``fit``, ``search`` or ``finetune``, which may be nothing."""
        kept = self.index.provenance.get(name)
        return kept if isinstance(kept, dict) else {}

    def sentences(self) -> Iterator[str]:
        """Yield sentences about the accuracy and the reliability."""
        n = self.evaluation.n
        top1 = self.evaluation.top1
        sure = self.answers.confidence >= SURE
        yield (
            f"{int(self.answers.right.sum()):,} of {counted(n, 'test photo', 'was', 'were')} classified correctly: "
            f"{percent(top1)} (95 % interval {span(self.evaluation.interval)})."
        )
        if sure.any():
            certain = f"at least {100 * SURE:.0f} % certain ({100 * sure.mean():.0f} % of photos)"
            right = percent(self.answers.right[sure].mean())
            yield f"When the classifier is {certain}, it is right {right} of the time."
        else:
            yield f"The classifier is never {100 * SURE:.0f} % certain."

    def actions(self) -> Iterator[tuple[str, str, str]]:
        """Yield recommendations, weakest class first: what to do, why, and the command, if there is one."""
        index = self.index
        top1 = self.evaluation.top1
        wrong = int((~self.answers.right).sum())

        def command(name: str, rest: str = "") -> str:
            if not self.place:
                return ""
            return command_line(*name.split(), portable(self.place), *rest.split())

        missed = [score for score in self.evaluation.by_class if score.n - score.right > 1]
        weak = [
            score for score in missed if score.right < WEAK * score.n or score.interval[1] < top1
        ]
        add = command("index add", " FOLDER")
        for score in weak[:NAMED]:
            mistakes = score.n - score.right
            share = "all" if mistakes == wrong else f"{mistakes:,} of all"
            accuracy = f"{100 * score.right / score.n:.0f} %"
            what = f"{score.name}: {accuracy}, {share} {wrong:,} mistakes"
            why = f"add photos to its {counted(score.shots, 'example')}"
            if score.times > 1:
                why += f" ({score.times} times classified as {score.answer})"
            yield what, why, add
            add = ""  # once is enough
        if index.fitted is None and index.curve is None and index.values is None:
            yield "Fit the index", "it is not fitted to its examples yet", command("fit")
        elif index.fitted is not None and index.fitted.keys != index.n:
            why = f"it was fitted to {index.fitted.keys:,} examples and now has {index.n:,}"
            yield "Fit the index again", why, command("fit")
        has_all = self.manifest is None or self.manifest.n == index.n
        doubtful = len(audit(index)) if has_all and index.n <= AUDITED else 0
        if doubtful:
            them = "it" if doubtful == 1 else "them"
            why = f"the other examples contradict {them}"
            yield f"Check {counted(doubtful, 'label')}", why, command("index audit")
        confidence = self.answers.confidence
        gap = confidence.mean() - top1
        noise = (confidence * (1 - confidence)).sum() ** 0.5 / len(confidence)
        if abs(gap) > max(MISCALIBRATED, 2 * noise):
            side = "high" if gap > 0 else "low"
            why = f"they are {100 * abs(gap):.0f} points too {side} on average"
            yield "Calibrate the probabilities", why, command("fit", " --calibrate --val SOURCE")


def portable(text: str | os.PathLike[str]) -> str:
    """Shorten the absolute paths in a text, so that a report does not reveal local folders.

    A path becomes relative to the working directory. If the path is outside, only its last two parts are kept, without
    the home directory.
    """

    def shortened(path: re.Match[str]) -> str:
        full = Path(path[0])
        here = Path.cwd()
        home = Path.home()
        if full.is_relative_to(here):
            return str(full.relative_to(here))
        if full.is_relative_to(home):
            full = full.relative_to(home)
        return str(Path(*full.parts[-2:]))

    return re.sub(r"(?:^|(?<=[\s@:=(',\"])|(?<=://))/(?=[^/\s])[^:,'\"]*", shortened, show(text))


class Picture(NamedTuple):
    """The path of an image, the ``digest`` of its bytes if known, and its ``alt`` text."""

    path: str
    digest: str | None
    alt: str


def mistakes(results: Results) -> Iterator[dict[str, object]]:
    """Explain the wrong answers whose true class has the lowest probability, except for shots.

    Each has the most probable classes, and the shots that caused the answer. A shot would explain itself.
    """
    answers = results.answers
    names = results.index.class_names
    wrong = np.flatnonzero(answers.of_known & ~answers.held_out & ~answers.right)
    places = wrong[np.argsort(answers.log_truth[wrong], kind="stable")][:MISTAKES].tolist()
    predictions = results.index.classify(
        results.block.features[places], "keep", top=3, neighbours=NEIGHBOURS
    )
    for place, prediction in zip(places, predictions, strict=True):
        truth = names[answers.truth[place]]
        answer = names[answers.predicted[place]]
        likely = dict(zip(prediction.labels, prediction.probabilities, strict=True))
        likely[truth] = math.exp(answers.log_truth[place])
        likely[answer] = float(answers.confidence[place])
        keys = list(prediction.neighbours)
        if prediction.opposing is not None:
            keys.append(prediction.opposing)
        yield {
            "item": results.test.sources[int(answers.positions[place])],
            "picture": _of_item(results, place),
            "probabilities": dict(sorted(likely.items(), key=lambda pair: -pair[1])),
            "near": _with_pictures(results, keys),
            "truth": truth,
            "answer": answer,
        }


def confusions(results: Results) -> Iterator[dict[str, object]]:
    """Yield the pairs of classes that are confused most often, with mistakes and nearby keys.

    A mistake that occurred once says little about two classes, so it is left out.
    """
    answers = results.answers
    names = results.answers.class_names
    for truth, answer, times in results.evaluation.confusions[:PAIRS]:
        if times == 1:
            continue
        of_truth = answers.truth == names.index(truth)
        confused = np.flatnonzero(of_truth & (answers.predicted == names.index(answer)))
        surest_first = np.argsort(-answers.confidence[confused], kind="stable")
        shown = confused[surest_first][:EXAMPLES]
        queries = results.block.features[shown[~answers.held_out[shown]]]
        near = {}
        for prediction in results.index.classify(queries, "keep", neighbours=NEIGHBOURS):
            for key in prediction.neighbours:
                if key.label == answer:
                    near[key.key_id] = key
        yield {
            "truth": truth,
            "answer": answer,
            "times": times,
            "total": int(of_truth.sum()),
            "pictures": [_of_item(results, place) for place in shown.tolist()],
            "near": _with_pictures(results, list(near.values())[:EXAMPLES]),
        }


def _of_item(results: Results, place: int) -> Picture:
    test = results.test
    position = int(results.answers.positions[place])
    path = test.paths[position] if test.paths is not None else test.sources[position]
    label = results.answers.class_names[int(results.answers.truth[place])]
    return Picture(path, results.block.digests[place], f"test photo of {label}")


def _with_pictures(results: Results, keys: Sequence[Neighbour]) -> list[tuple[Neighbour, Picture]]:
    rows = results.index.rows.where("key_id", [key.key_id for key in keys])
    digests = dict(zip(rows["key_id"].to_pylist(), rows["digest"].to_pylist(), strict=True))
    return [
        (key, Picture(key.source, digests.get(key.key_id), f"example of {key.label}"))
        for key in keys
    ]


def thumbnail(read: Callable[[str], bytes], path: str, digest: str | None, side: int) -> str | None:
    """Return an image as a base64 JPEG whose sides have at most ``side`` pixels.

    ``read`` returns the bytes of a path. Return ``None`` if the image cannot be read or does not have this digest.
    """
    try:
        data = read(path)
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            return None
        return base64.b64encode(images.thumbnail(data, side)).decode()
    except (InputError, UsageError):
        return None
