"""Write accuracy reports as single HTML files that contain no scripts and no external links.

The layout is in ``page.html.j2``. The test labels are never used to select a setting.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache as remembered
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from retrieval_tip import doctor
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import few_shot
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, UsageError, check_count, counted, few, one_line, percent, show
from retrieval_tip.evaluation.evaluate import Evaluation, answered, judge, some_known
from retrieval_tip.evaluation.held_out import without_themselves
from retrieval_tip.files import replacing
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.folds import Queries
from retrieval_tip.html import markup, render
from retrieval_tip.index import places
from retrieval_tip.index.places import Place
from retrieval_tip.model import Index
from retrieval_tip.report import plots
from retrieval_tip.report.results import Results, confusions, mistakes, portable, thumbnail
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.settings import Ask
from retrieval_tip.store.manifest import Manifest

if TYPE_CHECKING:
    from markupsafe import Markup

SHOTS = tuple(2**i for i in range(10))
CURVE_KEYS = 4096
"""Default maximum number of keys to draw for the curve. The search time grows with its square."""
SEEDS = 3
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1 to 9 degrees of freedom. Beyond that, it is 1.96."""
LISTED = 50
"""Maximum number of items of a value to list."""
KEPT = {"source": "source", "shots": "examples per class", "seed": "seed", "views": "views",
        "text": "class names from", "skipped": "skipped at build"}  # fmt: skip
"""Names of build records in the report."""

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class WrittenReport:
    """A report that has been written."""

    path: Path
    bytes: int
    evaluation: Evaluation


def write_report(
    index: Index, test: Source, reader: Reader, out: str | os.PathLike[str], *,
    shots: Sequence[int] | None = None, seeds: int = SEEDS, curves: bool = True, abstain: float | None = None,
    ask: Ask = Ask(), place: Place | None = None, where: str | None = None, command: str | None = None,
) -> WrittenReport:  # fmt: skip
    """Evaluate an index on a labelled test source and write an accuracy report as one HTML file.

    The figures come from :func:`evaluate.evaluate`. An existing file ``out`` is replaced once the report is
    complete. ``reader.skipped`` lists the unreadable items.

    Args:
        index: The index. Its ``settings`` are used for the answers.
        test: Labelled images or features.
        reader: The encoder that computes the features.
        out: The HTML file.
        shots: The numbers of shots per class to draw for the curve. Defaults to 1, 2, 4 and so on, up to the size of
            the smallest class.
        seeds: The number of draws for each number of shots.
        curves: Whether to plot the accuracy as a function of the number of shots. A fine-tuned index has no such curve,
            because its keys were trained together.
        abstain: The probability below which an answer is withheld in the returned evaluation.
        ask: The question, whose ``at_least`` and ``coverage`` also count in the returned evaluation.
        place: The folder or address of the index. Required only if ``index`` does not contain it.
        where: The condition that selected the keys, to show in the report.
        command: The command line to show in the report.

    Raises UsageError if matplotlib is not installed, or if ``shots`` exceeds the size of the smallest class. Raises
    InputError as :func:`evaluate.evaluate` does, or if ``out`` cannot be written.
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
    answers = answered(index, without_themselves(index, test, [every]), ids, names, ask)
    evaluation = judge(index, answers, reader.skipped, abstain=abstain)
    block = every.take(np.flatnonzero(np.isin(every.positions, answers.positions)))
    named = index.place if place is None else str(place)
    results = Results(index, test, reader, block, evaluation, named, where, command)
    page = _page(results, measure_curve(results, shots, seeds) if curves else None).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(page)
    return WrittenReport(path, len(page), evaluation)


def check(out: Path) -> None:
    """Raise UsageError if matplotlib is not installed, and InputError if the file cannot be written."""
    plots.needs_matplotlib()
    if out.is_dir():
        raise InputError(f"{show(out)}: is a folder; give a file name")
    if not out.parent.is_dir():
        raise InputError(f"{show(out)}: there is no folder {show(out.parent)}; create it first")


def _page(results: Results, curve: dict[str, object] | None) -> str:
    index, evaluation = results.index, results.evaluation
    name = "an index" if results.place is None else f'"{show(Path(results.place).name)}"'
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
        thumbnail=remembered(partial(thumbnail, results.test.load)),
    )  # fmt: skip


def _nobreak(text: str) -> Markup:
    """Escape a text, and keep each number and its per cent sign on the same line."""
    from markupsafe import escape

    return markup(str(escape(one_line(text))).replace(" %", "&nbsp;%"))


def provenance(results: Results) -> dict[str, Rows]:
    """Return the rows of each part by its title. Parts without rows are left out."""
    manifest = None if results.place is None else places.at(results.place).manifest(results.index.version)
    parts = {
        "Test": list(_test(results)),
        "Settings": list(_settings(results, manifest)),
        "Search": [(name, described(value)) for name, value in results.record("search").items()],
        "Fine-tuning": [(name, described(value)) for name, value in results.record("finetune").items()],
        "Index": list(_index(results, manifest)),
        "Machine": [(name, portable(value)) for name, value in doctor.examine().facts.items()],
    }
    return {title: rows for title, rows in parts.items() if rows}


def _test(results: Results) -> Iterator[tuple[str, str]]:
    skipped = results.reader.skipped
    yield "source", portable(results.test.name)
    yield "photos", f"{results.evaluation.n:,} classified, {len(skipped):,} could not be read"
    yield "date", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if results.command:
        yield "command", results.command
    for item in skipped[:LISTED]:
        yield "skipped", portable(str(item))
    if len(skipped) > LISTED:
        yield "skipped", f"{len(skipped) - LISTED:,} more"


def _settings(results: Results, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    kept, searched = results.index.provenance, "search-hp" if results.record("search") else "the index"
    known = {"alpha": kept.get("alpha"), "beta": kept.get("beta"), "k": searched, "tail": "the index"}
    known |= {"temperature": kept.get("temperature", "not fitted"), "logit_scale": "the index"}
    for name, origin in known.items():
        value = getattr(results.evaluation.settings, name)
        own = getattr(manifest.settings, name) if manifest is not None else value
        given = described(origin) if own == value else f"set for this report; the index has {described(own, 'all')}"
        yield name, f"{described(value, 'all')} ({given})"


def _index(results: Results, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    index = results.index
    if results.place is not None and manifest is not None:
        yield "folder", portable(results.place)
        yield "version", f"{manifest.version}, {manifest.created_at}, by {manifest.created_by}"
        yield "last change", portable(manifest.change or "-")
        if manifest.segments:  # a table has no digest of its keys
            yield "digest", manifest.keys_digest
    yield "examples", f"{index.n:,} of {counted(len(index.class_names), 'class')}"
    if results.where is not None:
        yield "restricted to", portable(results.where)
    yield "vectors", f"{index.d:,} values, {index.dtype}"
    yield "FAISS index", f"{index.index_type} on {index.device}"
    yield "prompts", " | ".join(index.templates) or "-"
    if index.backbone is not None:
        yield "encoder", portable(str(index.backbone))
        yield "digest of its weights", index.backbone.weights
        yield "preprocessing", described(dict(index.backbone.preprocess))
    for name, called in KEPT.items():
        if index.provenance.get(name) not in (None, []):
            yield called, described(index.provenance[name])


def described(value: object, none: str = "-") -> str:
    """Return a manifest value as text. ``none`` stands for ``None``."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {described(part)}" for name, part in value.items())
    if isinstance(value, list):
        more = f" ... ({len(value)} in all)" if len(value) > LISTED else ""
        return ", ".join(map(described, value[:LISTED])) + more
    return none if value is None else f"{value:.4g}" if isinstance(value, float) else portable(str(value))


def measure_curve(results: Results, numbers: Sequence[int], seeds: int) -> dict[str, object] | None:
    """Measure the accuracy for each number of shots, or return ``None`` if there is nothing to draw.

    Return a diagram (``svg``) and ``rows`` of the shots, draws, mean accuracy and range.
    """
    if not numbers or results.is_tuned or not len(results.new):
        return None
    pool, runs = closed_form.unfitted(results.index), dict[int, list[float]]()
    for number in tqdm(numbers, unit="draw", disable=None if results.reader.progress else True, leave=False):
        draws = range(1, 2 if set(pool.counts) <= {0, number} else seeds + 1)  # otherwise all draws are the same
        runs[number] = [_accuracy(results, draw(pool, number, seed)) for seed in draws]
    rows = []
    for number, own in runs.items():
        ends = f"{percent(min(own))} to {percent(max(own))}"
        rows.append((number, len(own), percent(float(np.mean(own))), ends))
    label = "; ".join(f"{shots}: {mean}" for shots, _, mean, _ in rows)
    figure = partial(plots.draw_shots, runs, list(map(half_width, runs.values())), results.evaluation.zero_shot_top1)
    return {"svg": plots.svg(figure, f"Accuracy by number of examples per class. {label}"), "rows": rows}


def draw(pool: Index, shots: int, seed: int) -> Index:
    """Return an index of ``shots`` keys per class, drawn from an unfitted ``pool`` by the published rule."""
    order = np.argsort(pool.labels["key_id"].to_numpy(), kind="stable")
    labels = pool.class_ids.cpu().numpy()[order].tolist()
    drawn = pool.take(np.sort(order[few_shot(labels, shots, seed)]))
    alpha, beta = untouched_settings(drawn.keys, drawn.class_ids.cpu().numpy())
    return drawn.with_settings(drawn.settings.override(alpha=alpha, beta=beta))


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % confidence interval of the mean, or ``None`` for one value."""
    n = len(values)
    if n == 1:
        return None
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(n)


def _accuracy(results: Results, drawn: Index) -> float:
    """Fit drawn shots as the whole index was fitted, and return the accuracy. A single shot cannot be held out."""
    if results.index.fitted is not None:
        closed_form.fit(drawn)
    elif max(drawn.counts) > 1:
        choice = search_hp.search(drawn, Queries.leave_one_out(drawn))
        drawn = drawn.with_settings(choice.settings(drawn.settings))
    answers = drawn.logits(results.block.features[results.new]).argmax(dim=1).cpu().numpy()
    return float((answers == results.answers.truth[results.new]).mean())
