"""Write accuracy reports as single HTML files that contain no scripts and no external links.

The layout is in ``page.html.j2``. The test labels are never used to select a setting.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as remembered
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from retrieval_tip.bounds import check_count
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import check_backbone
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, counted, few, one_line, percent, show
from retrieval_tip.evaluation import sweep
from retrieval_tip.evaluation.evaluate import Evaluation, judge, some_known
from retrieval_tip.evaluation.held_out import QueryBlock, key_ids_of
from retrieval_tip.files import replacing
from retrieval_tip.fit import closed_form
from retrieval_tip.html import markup, render
from retrieval_tip.report import plots
from retrieval_tip.report.judged import JudgedIndex, portable
from retrieval_tip.report.mistakes import confusions, mistakes, thumbnail
from retrieval_tip.report.provenance import provenance
from retrieval_tip.report.verdict import CLASS_NAMES, EXAMPLES, Way, actions, sentences

if TYPE_CHECKING:
    from markupsafe import Markup

SHOTS = tuple(2**i for i in range(10))
RIVAL_KEYS = 1 << 14
"""Maximum number of keys for a comparison with rivals. With more keys, a linear probe takes minutes."""
CURVE_KEYS = 4096
"""Default maximum number of keys to draw for the curve. The search time grows with its square."""
SEEDS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenReport:
    """A report that has been written."""

    path: Path
    bytes: int
    evaluation: Evaluation


def write_report(
    cache: CacheModel, test: Source, encoder: Encoder, out: str | os.PathLike[str], *,
    shots: Sequence[int] | None = None, seeds: int = SEEDS, curves: bool = True,
    folder: str | os.PathLike[str] | None = None, where: str | None = None, command: str | None = None,
) -> WrittenReport:  # fmt: skip
    """Evaluate an index on a labelled test source and write an accuracy report as one HTML file.

    Args:
        cache: The index. Its ``settings`` are used for the answers.
        test: Labelled images or features. Photos that are shots of the index, and photos of classes that it lacks, are
            counted and left out.
        encoder: The encoder that computes the features. ``encoder.skipped`` lists the unreadable items.
        out: The file. An existing file is replaced once the report is complete.
        shots: The numbers of shots per class to draw for the curve. Defaults to 1, 2, 4 and so on, up to the size of
            the smallest class.
        seeds: The number of draws for each number of shots.
        curves: Whether to plot the accuracy as a function of the number of shots. A fine-tuned index has no such curve,
            because its keys were trained together.
        folder: The index folder. Required only if ``cache`` does not contain it.
        where: The condition by which the keys were selected, to show in the report.
        command: The command line to show in the report.

    Raises:
        UsageError: if matplotlib is not installed, or if ``shots`` exceeds the size of the smallest class.
        InputError: in the same cases as :func:`evaluate.evaluate`, if every test photo is a shot, or if ``out`` cannot
            be written.
    """
    path = Path(out)
    check(path)
    check_count("seeds", seeds)
    least, rare = min((n, name) for n, name in zip(cache.counts, cache.class_names, strict=True) if n)
    for number in shots or ():
        if not 1 <= number <= least:
            raise UsageError(f"shots {number}: class {rare!r} has {counted(least, 'shot')}; give 1 to {least}")
    if shots is None:
        classes = np.count_nonzero(cache.counts)
        shots = [number for number in SHOTS if number <= least > 1 and number * classes <= CURVE_KEYS]
    ids, names = some_known(cache, test)
    every = list(encoder.blocks(test))
    new = [block.take(np.flatnonzero(key_ids_of(cache, test, block) < 0)) for block in every]
    whole = judge(cache, (QueryBlock(cache, block) for block in new), ids, names, encoder.skipped)
    blocks = [block.take(np.flatnonzero(ids[block.positions] < len(cache.class_names))) for block in new]
    evaluation = whole
    if whole.unknown:
        evaluation = judge(cache, (QueryBlock(cache, block) for block in blocks), ids, names, encoder.skipped)
    place = Path(folder) if folder is not None else cache.folder
    left_out = sum(len(block.positions) for block in every) - whole.n
    judged = JudgedIndex(cache, test, encoder, blocks, ids, evaluation, place, where, command, whole, left_out)
    page = _page(judged, _curve(judged, shots, seeds) if curves else None).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return WrittenReport(path, len(page), evaluation)


def check(out: Path) -> None:
    """Raise UsageError if matplotlib is not installed, and InputError if the file cannot be written."""
    plots.needs_matplotlib("a report")
    if out.is_dir():
        raise InputError(f"{show(out)}: is a folder; give a file name")
    if not out.parent.is_dir():
        raise InputError(f"{show(out)}: there is no folder {show(out.parent)}; create it first")


class Curve(NamedTuple):
    """The accuracy by number of shots: a diagram, and rows (shots, draws, mean accuracy, range)."""

    svg: Markup
    rows: list[tuple[int, int, str, str]]


def _page(judged: JudgedIndex, curve: Curve | None) -> str:
    cache, evaluation, ways, pairs = judged.cache, judged.evaluation, _ways(judged), confusions(judged)
    index = f'"{show(judged.folder.name)}"' if judged.folder is not None else "an index"
    drawn = {
        "matrix": (plots.draw_confusion, "Confusion matrix, as shares of the true class"),
        "reliability": (plots.draw_reliability, "Accuracy by probability"),
        "coverage": (plots.draw_coverage, "Accuracy if the least certain answers are withheld"),
    }
    return render(
        "report/page.html.j2", title=f'Accuracy of {index} on "{Path(judged.test.name).name}"', judged=judged,
        cache=cache, evaluation=evaluation, ways=ways, sentences=list(sentences(judged, ways)),
        actions=list(actions(judged, ways)), pairs=pairs, mistakes=mistakes(judged), curve=curve,
        plots={name: plots.svg(partial(draw, evaluation), label) for name, (draw, label) in drawn.items()},
        provenance=provenance(judged), counted=counted, few=few, percent=percent, portable=portable, nobreak=_nobreak,
        thumbnail=remembered(partial(thumbnail, judged.encoder.read)),
    )  # fmt: skip


def _nobreak(text: str) -> Markup:
    """Escape a text, and keep each number and its per cent sign on the same line."""
    from markupsafe import escape

    return markup(str(escape(one_line(text))).replace(" %", "&nbsp;%"))


def _ways(judged: JudgedIndex) -> list[Way]:
    """Return the ways of classifying. The last way is the index itself."""
    details, truth, cache = judged.details, judged.answers.truth, judged.cache
    ways = [Way(CLASS_NAMES, "zero-shot", truth, details.text)] if judged.evaluation.zero_shot_top1 is not None else []
    ways.append(Way(EXAMPLES, "without class names", truth, details.cache))
    shots = _parent(judged) if judged.is_tuned else cache
    if shots is not None and shots.n <= RIVAL_KEYS:
        for name, rival in sweep.LINEAR.items():
            predicted = rival(shots).logits(judged.features).argmax(1).cpu().numpy()
            ways.append(Way(name.replace("-", " "), "same examples, without class names", truth, predicted))
        if shots.fitted is not None:
            plain = judged.by(closed_form.unfitted(shots))
            ways.append(Way("Tip-Adapter", "same examples, not fitted", truth, plain.answers.predicted))
    if shots is not None and judged.is_tuned:
        before = judged.by(shots)
        ways.append(Way(_name(shots), "before fine-tuning", truth, before.answers.predicted))
    name = "Tip-Adapter-F" if judged.is_tuned else _name(cache)
    return [*ways, Way(name, "this index", truth, judged.answers.predicted)]


def _name(cache: CacheModel) -> str:
    return "Tip-Adapter" if cache.fitted is None else "fitted"


def _parent(judged: JudgedIndex) -> CacheModel | None:
    """Return the index before fine-tuning. If it cannot be used, log the reason and return ``None``."""
    cache, facts = judged.cache, judged.record("finetune")
    name, version = facts.get("parent"), facts.get("parent_version")
    try:
        if not isinstance(name, str) or not name:
            raise InputError("its place is not recorded")
        number = version if isinstance(version, int) else None
        parent = CacheModel.load(name, device=cache.device, precision=cache.precision, version=number)
        check_backbone(parent.backbone, parent.d, judged.encoder.backbone, [judged.test])
        if parent.class_names != cache.class_names:
            raise InputError(f"{name}: its classes are different")
    except (RetrievalTipError, OSError, ValueError) as error:
        log.warning("the report does not compare the index with the one before fine-tuning: %s", error)
        return None
    return parent


def _curve(judged: JudgedIndex, numbers: Sequence[int], seeds: int) -> Curve | None:
    """Measure the accuracy for each number of shots, or return ``None`` if there is nothing to draw."""
    if not numbers or judged.is_tuned:
        return None
    cache, counts, runs = judged.cache, set(judged.cache.counts) - {0}, list[sweep.Run]()
    own: sweep.Method = "tip-adapter" if cache.has_text else "cache-alone"
    method = own if cache.fitted is None else "closed-form"
    test = sweep.Items(judged.features, judged.answers.truth, judged.test.name)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "runs.parquet"
        for number in tqdm(numbers, unit="draw", disable=None if judged.encoder.progress else True, leave=False):
            draws = range(1, 2 if counts == {number} else seeds + 1)  # otherwise all draws are the same
            runs += sweep.sweep(cache, "", test, file, shots=[number], seeds=draws, methods=[method])
    lines, rows = sweep.summary(runs), []
    for line in lines:
        single = [run["top1"] for run in runs if run["shots"] == line["shots"]]
        ends = f"{percent(min(single))} to {percent(max(single))}"
        rows.append((line["shots"], line["seeds"], percent(line["top1"]), ends))
    draw = partial(plots.draw_shots, lines, runs, judged.evaluation.zero_shot_top1)
    label = "; ".join(f"{shots}: {mean}" for shots, _, mean, _ in rows)
    return Curve(plots.svg(draw, f"Accuracy by number of examples per class. {label}"), rows)
