"""The data of a report, its summary, recommendations, and the mistakes with their photos and nearby keys."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retrieval_tip.data import images
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, counted, percent, show
from retrieval_tip.evaluation.audit import AUDITED, audit
from retrieval_tip.evaluation.evaluate import Answers, Evaluation
from retrieval_tip.fit.closed_form import wilson
from retrieval_tip.model import Index
from retrieval_tip.predictions import Neighbour

SURE = 0.9
"""Minimum probability of a confident prediction."""
WEAK, NAMED = 0.5, 3
"""Accuracy below which a class always counts as weak, and the maximum number of weak classes to list."""
MISCALIBRATED = 0.05
"""Smallest difference between the mean probability and the accuracy at which a calibration is recommended."""
MISTAKES, PAIRS, EXAMPLES, NEIGHBOURS = 12, 8, 3, 5
"""Maximum numbers of mistakes in a list, of confused pairs, of photos per pair, and of keys per mistake."""


class ClassScore(NamedTuple):
    """The answers to the ``n`` test photos of a class.

    ``right`` counts the right answers, and ``shots`` the examples in the index. ``answer`` is the most frequent wrong
    answer, which was given ``times`` times.
    """

    name: str
    right: int
    n: int
    shots: int
    answer: str
    times: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy."""
        return wilson(self.right / self.n, self.n)


@dataclass(frozen=True)
class Results:
    """A test source with the answers of an index, and the arguments of :func:`report.write_report`.

    ``block`` contains the encoded items in the order of the answers in ``evaluation``.
    """

    index: Index
    test: Source
    reader: Reader
    block: FeatureBlock
    evaluation: Evaluation
    place: str | None
    where: str | None
    command: str | None

    @property
    def answers(self) -> Answers:
        """The answers for the ``n`` items."""
        return self.evaluation.answers

    @cached_property
    def new(self) -> npt.NDArray[np.int64]:
        """The places of the items that are not shots, and whose class the index has."""
        return np.flatnonzero(self.answers.of_known & ~self.answers.held_out)

    @cached_property
    def by_class(self) -> list[ClassScore]:
        """The classes of the index that have test photos, weakest class first."""
        names, truth, predicted = self.index.class_names, self.answers.truth, self.answers.predicted
        scores = []
        for i in np.unique(truth[self.answers.of_known]).tolist():
            given = Counter(predicted[truth == i].tolist())
            n, right = given.total(), given.pop(i, 0)
            answer, times = given.most_common(1)[0] if given else (i, 0)
            scores.append(ClassScore(names[i], right, n, self.index.counts[i], names[answer], times))
        return sorted(scores, key=lambda score: (score.right / score.n, -score.n))

    def record(self, name: str) -> dict[str, object]:
        """Return what the index records about ``search`` or ``finetune``, or an empty dict if it records nothing."""
        kept = self.index.provenance.get(name)
        return kept if isinstance(kept, dict) else {}

    @property
    def is_tuned(self) -> bool:
        """Whether the keys are fine-tuned."""
        trained = self.index.values is not None and self.index.fitted is None
        return bool(self.record("finetune")) or self.index.curve is not None or trained

    def sentences(self) -> Iterator[str]:
        """Yield sentences about the accuracy and the reliability."""
        n, top1, sure = self.evaluation.n, self.evaluation.top1, self.answers.confidence >= SURE
        low, high = self.evaluation.interval
        yield (
            f"{int(self.answers.right.sum()):,} of {counted(n, 'test photo', 'was', 'were')} classified correctly: "
            f"{percent(top1)} (95 % interval {100 * low:.0f} to {100 * high:.0f} %)."
        )
        if sure.any():
            certain = f"at least {100 * SURE:.0f} % certain ({100 * sure.mean():.0f} % of photos)"
            right = percent(self.answers.right[sure].mean())
            yield f"When the classifier is {certain}, it is right {right} of the time."
        else:
            yield f"The classifier is never {100 * SURE:.0f} % certain."

    def actions(self) -> Iterator[tuple[str, str, str]]:
        """Yield recommendations, weakest class first: what to do, why, and the command, if there is one."""
        index, top1, wrong = self.index, self.evaluation.top1, int((~self.answers.right).sum())

        def command(name: str, rest: str = "") -> str:
            return f"retrieval-tip {name} {shlex.quote(portable(self.place))}{rest}" if self.place else ""

        missed = [one for one in self.by_class if one.n - one.right > 1]
        weak = [one for one in missed if one.right < WEAK * one.n or one.interval[1] < top1]
        for place, one in enumerate(weak[:NAMED]):
            mistakes = f"{one.n - one.right:,} of all" if one.n - one.right < wrong else "all"
            what = f"{one.name}: {100 * one.right / one.n:.0f} %, {mistakes} {wrong:,} mistakes"
            often = f" ({one.times} times classified as {one.answer})" if one.times > 1 else ""
            why = f"add photos to its {counted(one.shots, 'example')}{often}"
            yield what, why, "" if place else command("index add", " FOLDER")
        if index.fitted is None and not self.is_tuned:
            yield "Fit the index", "it is not fitted to its examples yet", command("fit")
        elif index.fitted is not None and index.fitted.keys != index.n:
            why = f"it was fitted to {index.fitted.keys:,} examples and now has {index.n:,}"
            yield "Fit the index again", why, command("fit")
        if self.where is None and index.n <= AUDITED and (doubtful := len(audit(index))):
            why = "the other examples contradict " + ("it" if doubtful == 1 else "them")
            yield f"Check {counted(doubtful, 'label')}", why, command("index audit")
        confidence = self.answers.confidence
        gap, noise = confidence.mean() - top1, (confidence * (1 - confidence)).sum() ** 0.5 / len(confidence)
        if abs(gap) > max(MISCALIBRATED, 2 * noise):
            why = f"they are {100 * abs(gap):.0f} points too {'high' if gap > 0 else 'low'} on average"
            yield "Calibrate the probabilities", why, command("fit", " --calibrate --val SOURCE")


def portable(text: str | os.PathLike[str]) -> str:
    """Shorten the absolute paths in a text, so that a report does not reveal local folders.

    A path becomes relative to the working directory. If the path is outside, only its last two parts are kept, without
    the home directory.
    """

    def shortened(path: re.Match[str]) -> str:
        full, here, home = Path(path[0]), Path.cwd(), Path.home()
        if full.is_relative_to(here):
            return str(full.relative_to(here))
        return str(Path(*(full.relative_to(home) if full.is_relative_to(home) else full).parts[-2:]))

    return re.sub(r"(?:^|(?<=[\s:=(',\"])|(?<=://))/(?=[^/\s])[^:,'\"]*", shortened, show(text))


class Picture(NamedTuple):
    """The path of an image, the ``digest`` of its bytes if known, and its ``alt`` text."""

    path: str
    digest: str | None
    alt: str


def mistakes(results: Results) -> Iterator[dict[str, object]]:
    """Explain the wrong answers whose true class has the lowest probability, except for shots.

    Each has the most probable classes, and the shots that caused the answer. A shot would explain itself.
    """
    answers, names = results.answers, results.index.class_names
    wrong = results.new[~answers.right[results.new]]
    places = wrong[np.argsort(answers.log_truth[wrong], kind="stable")][:MISTAKES].tolist()
    predictions = results.index.classify(results.block.features[places], "keep", top=3, neighbours=NEIGHBOURS)
    for place, prediction in zip(places, predictions, strict=True):
        truth, answer = names[answers.truth[place]], names[answers.predicted[place]]
        likely = dict(zip(prediction.labels, prediction.probabilities, strict=True))
        likely |= {truth: math.exp(answers.log_truth[place]), answer: float(answers.confidence[place])}
        ranked = dict(sorted(likely.items(), key=lambda pair: -pair[1]))
        keys = _with_pictures(results, [*prediction.neighbours, *filter(None, [prediction.opposing])])
        item = results.test.sources[int(answers.positions[place])]
        own = {"item": item, "picture": _of_item(results, place), "probabilities": ranked, "near": keys}
        yield own | {"truth": truth, "answer": answer}


def confusions(results: Results) -> Iterator[dict[str, object]]:
    """Yield the pairs of classes that are confused most often, with mistakes and nearby keys.

    A mistake that occurred once says little about two classes, so it is left out.
    """
    answers, names = results.answers, results.answers.class_names
    for truth, answer, times in results.evaluation.confusions[:PAIRS]:
        if times > 1:
            asked = answers.truth == names.index(truth)
            own = np.flatnonzero(asked & (answers.predicted == names.index(answer)))
            own = own[np.argsort(-answers.confidence[own], kind="stable")][:EXAMPLES]
            asking = results.block.features[own[~answers.held_out[own]]]
            predictions = results.index.classify(asking, "keep", neighbours=NEIGHBOURS)
            near = {key.key_id: key for one in predictions for key in one.neighbours if key.label == answer}
            keys = _with_pictures(results, list(near.values())[:EXAMPLES])
            pictures = [_of_item(results, place) for place in own.tolist()]
            yield {"truth": truth, "answer": answer, "times": times, "total": int(asked.sum()),
                   "pictures": pictures, "near": keys}  # fmt: skip


def _of_item(results: Results, place: int) -> Picture:
    test, position = results.test, int(results.answers.positions[place])
    path = test.paths[position] if test.paths is not None else test.sources[position]
    label = results.answers.class_names[int(results.answers.truth[place])]
    return Picture(path, results.block.digests[place], f"test photo of {label}")


def _with_pictures(results: Results, keys: Sequence[Neighbour]) -> list[tuple[Neighbour, Picture]]:
    rows = results.index.rows.where("key_id", [key.key_id for key in keys])
    digests = dict(zip(rows["key_id"].to_pylist(), rows["digest"].to_pylist(), strict=True))
    return [(key, Picture(key.source, digests.get(key.key_id), f"example of {key.label}")) for key in keys]


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
