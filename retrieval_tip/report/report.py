"""Write accuracy reports as single HTML files that contain no scripts and no external links.

The layout is in ``page.html.j2``. The test labels are never used to select a setting.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as remembered
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retrieval_tip.bounds import check_count
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, counted, few, one_line, percent, show
from retrieval_tip.evaluation.evaluate import Evaluation, answered, judge, some_known
from retrieval_tip.evaluation.held_out import QueryBlock, key_ids_of
from retrieval_tip.files import replacing
from retrieval_tip.html import markup, render
from retrieval_tip.model import Index
from retrieval_tip.report import plots
from retrieval_tip.report.curve import Curve, measure_curve
from retrieval_tip.report.mistakes import confusions, mistakes, thumbnail
from retrieval_tip.report.provenance import provenance
from retrieval_tip.report.results import Results, portable

if TYPE_CHECKING:
    from markupsafe import Markup

SHOTS = tuple(2**i for i in range(10))
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
    index: Index, test: Source, reader: Reader, out: str | os.PathLike[str], *,
    shots: Sequence[int] | None = None, seeds: int = SEEDS, curves: bool = True,
    folder: str | os.PathLike[str] | None = None, where: str | None = None, command: str | None = None,
) -> WrittenReport:  # fmt: skip
    """Evaluate an index on a labelled test source and write an accuracy report as one HTML file.

    Args:
        index: The index. Its ``settings`` are used for the answers.
        test: Labelled images or features. Photos that are shots of the index, and photos of classes that it lacks, are
            counted and left out.
        reader: The encoder that computes the features. ``reader.skipped`` lists the unreadable items.
        out: The file. An existing file is replaced once the report is complete.
        shots: The numbers of shots per class to draw for the curve. Defaults to 1, 2, 4 and so on, up to the size of
            the smallest class.
        seeds: The number of draws for each number of shots.
        curves: Whether to plot the accuracy as a function of the number of shots. A fine-tuned index has no such curve,
            because its keys were trained together.
        folder: The index folder. Required only if ``index`` does not contain it.
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
    least, rare = min((n, name) for n, name in zip(index.counts, index.class_names, strict=True) if n)
    for number in shots or ():
        if not 1 <= number <= least:
            raise UsageError(f"shots {number}: class {rare!r} has {counted(least, 'shot')}; give 1 to {least}")
    if shots is None:
        classes = np.count_nonzero(index.counts)
        shots = [number for number in SHOTS if number <= least > 1 and number * classes <= CURVE_KEYS]
    ids, names = some_known(index, test)
    every = FeatureBlock.joined(list(reader.blocks(test)))
    new = every.take(np.flatnonzero(key_ids_of(index, test, every) < 0))
    answers = answered([QueryBlock(index, new)], ids, names)
    known = np.flatnonzero(answers.of_known)
    evaluation = judge(index, answers.take(known), reader.skipped)
    place, left_out = Path(folder) if folder is not None else index.folder, len(every.positions) - len(new.positions)
    results = Results(
        index, test, reader, new.take(known), evaluation, place, where, command, answers.recognition(), left_out
    )
    page = _page(results, measure_curve(results, shots, seeds) if curves else None).encode()
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


def _page(results: Results, curve: Curve | None) -> str:
    index, evaluation = results.index, results.evaluation
    name = f'"{show(results.folder.name)}"' if results.folder is not None else "an index"
    drawn = {
        "matrix": (plots.draw_confusion, "Confusion matrix, as shares of the true class"),
        "reliability": (plots.draw_reliability, "Accuracy by probability"),
        "coverage": (plots.draw_coverage, "Accuracy if the least certain answers are withheld"),
    }
    return render(
        "report/page.html.j2", title=f'Accuracy of {name} on "{Path(results.test.name).name}"', results=results,
        index=index, evaluation=evaluation, sentences=list(results.sentences()), actions=list(results.actions()),
        pairs=list(confusions(results)), mistakes=list(mistakes(results)), curve=curve,
        plots={name: plots.svg(partial(draw, evaluation), label) for name, (draw, label) in drawn.items()},
        provenance=provenance(results), counted=counted, few=few, percent=percent, portable=portable, nobreak=_nobreak,
        thumbnail=remembered(partial(thumbnail, results.reader.read)),
    )  # fmt: skip


def _nobreak(text: str) -> Markup:
    """Escape a text, and keep each number and its per cent sign on the same line."""
    from markupsafe import escape

    return markup(str(escape(one_line(text))).replace(" %", "&nbsp;%"))
