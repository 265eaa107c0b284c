"""Write accuracy reports as single HTML files that contain no scripts and no external links.

The layout is in ``page.html.j2``. The test labels are never used to select a setting. The accuracy curves and the
alpha-beta surface are measured on validation images or, if there are none, on the shots, each of which is held out in
turn.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache as remembered
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from retrieval_tip import tip
from retrieval_tip.bounds import check_count
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import check_backbone
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, counted, show
from retrieval_tip.evaluation import sweep
from retrieval_tip.evaluation.calibration import expected_calibration_error
from retrieval_tip.evaluation.evaluate import Evaluation, Part, judge
from retrieval_tip.files import replacing
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.finetune import CURVE
from retrieval_tip.html import render
from retrieval_tip.predictions import shown_probability
from retrieval_tip.report import plots
from retrieval_tip.report.judged import JudgedIndex, portable
from retrieval_tip.report.mistakes import confusions, mistakes, thumbnail
from retrieval_tip.report.provenance import described, provenance
from retrieval_tip.report.verdict import CLASS_NAMES, EXAMPLES, Way, actions, sentences, wilson

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

CLASSES = 1000
"""Maximum number of classes in the table. If there are more, only the weakest classes are shown."""
AFFINITY_PAIRS = 2_000_000_000
"""Maximum number of (item, key) pairs for which affinities are counted."""
SHOTS = tuple(2**i for i in range(10))
RIVAL_KEYS = 1 << 14
"""Maximum number of keys for a comparison with rivals. With more keys, a linear probe takes minutes."""
CURVE_KEYS = 4096
"""Default maximum number of keys to draw for the curves. The search time grows with its square."""
SURFACE_KEYS, SURFACE_QUERIES = 20_000, 2_000
"""Maximum number of keys for which the alpha-beta surface is computed, and maximum number of queries."""
AROUND = np.geomspace(1 / 8, 4, 26)
"""Betas on the surface, as multiples of the beta of the index."""
SEEDS = 3

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class WrittenReport:
    """A report that has been written. ``left_out`` maps each missing section to the reason."""

    path: Path
    bytes: int
    evaluation: Evaluation
    left_out: dict[str, str]


def write_report(
    cache: CacheModel, test: Source, encoder: Encoder, out: str | os.PathLike[str], *, val: Source | None = None,
    shots: Sequence[int] | None = None, seeds: int = SEEDS, curves: bool = True,
    folder: str | os.PathLike[str] | None = None, where: str | None = None, command: str | None = None,
) -> WrittenReport:  # fmt: skip
    """Evaluate an index on a labelled test source and write an accuracy report as one HTML file.

    Args:
        cache: The index. Its ``settings`` are used for the answers.
        test: Labelled images or features. See :func:`evaluate.evaluate`.
        encoder: The encoder that computes the features. ``encoder.skipped`` lists the unreadable items.
        out: The file. An existing file is replaced once the report is complete.
        val: The validation source for the curves and the alpha-beta surface. Defaults to the shots, each of which is
            held out in turn.
        shots: The numbers of keys per class to draw for the curves. Defaults to 1, 2, 4 and so on, up to the size of
            the smallest class.
        seeds: The number of draws for each number of shots.
        curves: Whether to plot the accuracy as a function of the number of shots.
        folder: The index folder. Required only if ``cache`` does not contain it.
        where: The condition by which the keys were selected, to show in the report.
        command: The command line to show in the report.

    Raises:
        UsageError: if matplotlib is not installed.
        UsageError: if ``shots`` exceeds the size of the smallest class, or if ``val`` and ``test`` are the same source.
        InputError: in the same cases as :func:`evaluate.evaluate`, or if ``out`` cannot be written.
    """
    path = Path(out)
    check(path)
    check_count("seeds", seeds)
    if val is not None and val.name == test.name:
        raise UsageError(f"val: {val.name} is the test source; give other photos to select settings on")
    least, rare = _fewest(cache)
    for number in shots or ():
        if number > least or number < 1:
            raise UsageError(f"shots {number}: class {rare!r} has {counted(least, 'key')}; give 1 to {least}")
    ids, blocks = cache.ids_of(test), list(encoder.blocks(test))
    few = sum(len(block.positions) for block in blocks) * cache.n <= AFFINITY_PAIRS
    evaluation = judge(cache, blocks, ids, list(encoder.skipped), affinities=few, details=True)
    items = None if val is None else sweep.encode(cache, val, encoder)
    place = Path(folder) if folder is not None else cache.folder
    judged = JudgedIndex(
        cache, test, encoder, blocks, ids, evaluation,
        val=items, shots=shots, seeds=seeds, curves=curves, folder=place, where=where, command=command,
    )  # fmt: skip
    page, left_out = _page(judged)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded := page.encode())
    return WrittenReport(path, len(encoded), evaluation, left_out)


def check(out: Path) -> None:
    """Raise UsageError if matplotlib is not installed, and InputError if the file cannot be written."""
    plots.needs_matplotlib("a report")
    if out.is_dir():
        raise InputError(f"{show(out)}: is a folder; give a file name")
    if not out.parent.is_dir():
        raise InputError(f"{show(out)}: there is no folder {show(out.parent)}; create it first")


def _fewest(cache: CacheModel) -> tuple[int, str]:
    return min((n, name) for n, name in zip(cache.counts, cache.class_names, strict=True) if n)


class _LeftOutError(Exception):
    """Raised if a section cannot be created. The message is the reason that the report shows."""


class Plot(NamedTuple):
    """A diagram with its caption."""

    svg: Markup
    caption: str

    @classmethod
    def of(cls, draw: Callable[[], Figure], caption: str, before: str = "") -> Plot:
        """Plot a diagram. Its accessible label consists of ``before`` and the caption."""
        return cls(plots.svg(draw, before + caption), caption)


def _page(judged: JudgedIndex) -> tuple[str, dict[str, str]]:
    """Return the page, and the reason for each missing section by its name."""
    makers: dict[str, Callable[[JudgedIndex], object]] = {
        "shots": _over_shots, "settings": _surface, "training": _training, "mistakes": mistakes,
        "confusions": _confusions, "classes": _classes, "probabilities": _probabilities, "affinities": _affinities,
        "provenance": provenance,
    }  # fmt: skip
    if not judged.is_tuned:
        del makers["training"]
    if judged.cache.fitted is not None and judged.cache.fitted.solved and judged.val is None:
        del makers["settings"]  # solved values depend on all shots, so none can be held out
    ways, missing = _accuracy(judged)
    parts: dict[str, object] = {"accuracy": {"ways": ways, "missing": missing}}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            parts[name] = make(judged)
        except _LeftOutError as reason:
            left_out[name] = portable(str(reason))
    cache, digests = judged.cache, [digest for digest in judged.digests if digest is not None]
    shared = pc.sum(pc.is_in(pa.array(digests, pa.string()), value_set=cache.labels["digest"])).as_py() or 0
    named, evaluation = f'"{show(judged.folder.name)}"' if judged.folder is not None else "an index", judged.evaluation
    page = render(
        "report/page.html.j2", title=f'Accuracy of {named} on "{Path(judged.test.name).name}"', judged=judged,
        sentences=list(sentences(judged, ways)), actions=list(actions(judged, ways)), cache=cache,
        evaluation=evaluation, blend=_blend(judged), shared=shared, parts=parts, left_out=left_out, counted=counted,
        interval=wilson(int(judged.answers.right.sum()), evaluation.n), portable=portable,
        thumbnail=remembered(thumbnail), shown_probability=shown_probability,
    )  # fmt: skip
    return page, left_out


# ----------------------------------------------------------------------------------------------------------- accuracy


def _accuracy(judged: JudgedIndex) -> tuple[list[Way], str]:
    """Return the ways of classifying, and the reason why some are missing."""
    evaluation, details, truth, tuned = judged.evaluation, judged.details, judged.answers.truth, judged.is_tuned
    ways, missing = [], ""
    if evaluation.zero_shot_top1 is not None:
        ways.append(_part(CLASS_NAMES, "zero-shot: text weights alone", details.text, truth))
    what = "cache logits alone, fine-tuned" if tuned else "cache logits alone"
    alone = _part(EXAMPLES, what, details.cache, truth)
    ways.append(alone if evaluation.settings.alpha else alone._replace(ece=None))
    try:
        ways += _rivals(judged, _parent(judged) if tuned else judged.cache)
    except _LeftOutError as reason:
        missing = portable(str(reason))
    what = "fine-tuned examples and class names" if tuned else "examples and class names"
    return [*ways, _way(_blend(judged), what, judged.answers.right, truth, evaluation.ece)], missing


def _rivals(judged: JudgedIndex, shots: CacheModel) -> list[Way]:
    ways = []
    if shots.n <= RIVAL_KEYS:
        for name, rival in sweep.LINEAR.items():
            confidence, predicted = tip.probabilities(rival(shots).logits(judged.features)).max(1)
            part = Part(predicted.numpy(), confidence.numpy())
            ways.append(_part(name.replace("-", " "), "same examples, no class names", part, judged.answers.truth))
        if shots.fitted is not None:
            ways.append(_answering(judged, closed_form.unfitted(shots), "same examples, not fitted"))
    if judged.is_tuned:
        ways.append(
            _answering(judged, shots, f"{portable(str(shots.place))}, version {shots.version}, before fine-tuning")
        )
    return ways


def _answering(judged: JudgedIndex, shots: CacheModel, what: str) -> Way:
    other = judge(shots, judged.blocks, judged.ids)
    name = "Tip-Adapter" if shots.fitted is None else "fitted"
    return _way(name, what, other.answers.right, other.answers.truth, other.ece)


def _blend(judged: JudgedIndex) -> str:
    return "Tip-Adapter-F" if judged.is_tuned else "Tip-Adapter" if judged.cache.fitted is None else "fitted"


def _part(name: str, what: str, part: Part, truth: Ints) -> Way:
    right = part.predicted == truth
    return _way(name, what, right, truth, expected_calibration_error(part.confidence, right))


def _way(name: str, what: str, right: Bools, truth: Ints, ece: float | None) -> Way:
    hits, n = int(right.sum()), len(right)
    mean = float(np.mean([right[truth == i].mean() for i in np.unique(truth)]))
    return Way(name, what, hits / n, *wilson(hits, n), mean, ece, right)


def _parent(judged: JudgedIndex) -> CacheModel:
    cache, facts = judged.cache, judged.record("finetune")
    name, version = facts.get("parent"), facts.get("parent_version")
    if not isinstance(name, str) or not name:
        raise _LeftOutError("the index does not record which index it was trained from")
    try:
        number = version if isinstance(version, int) else None
        parent = CacheModel.load(name, device=cache.device, precision=cache.precision, version=number)
        check_backbone(parent.backbone, parent.d, judged.encoder.backbone, [judged.test])
        if parent.class_names != cache.class_names:
            raise InputError("its classes are different")
    except (RetrievalTipError, OSError, ValueError) as error:
        raise _LeftOutError(f"the index before fine-tuning, {name}, cannot be used ({error})") from None
    return parent


# --------------------------------------------------------------------------------------------------- shots, settings


def _drawn(judged: JudgedIndex) -> tuple[list[int], str]:
    """Return the numbers of shots to draw, and a sentence about skipped numbers."""
    if not judged.curves:
        raise _LeftOutError("switched off for this report")
    if judged.is_tuned:
        raise _LeftOutError("the keys were fine-tuned together, so a draw does not show the accuracy of fewer examples")
    if judged.shots is not None:
        return list(dict.fromkeys(judged.shots)), ""
    least, rare = _fewest(judged.cache)
    if least < 2:
        raise _LeftOutError(f"class {rare!r} has one example; at least 2 per class are needed")
    classes = np.count_nonzero(judged.cache.counts)
    possible = [number for number in SHOTS if number <= least]
    few = [number for number in possible if number * classes <= CURVE_KEYS]
    if not few:
        raise _LeftOutError(f"{classes:,} classes are more than {CURVE_KEYS:,}; give --shots N to draw them anyway")
    return few, f" Draws of more than {CURVE_KEYS:,} examples are skipped." if len(few) < len(possible) else ""


def _over_shots(judged: JudgedIndex) -> dict[str, object]:
    """Return a diagram of the accuracy over shots, and rows for a table.

    Each row contains the method, the shots, the number of draws, the mean, half the width of the interval, and the
    range.
    """
    numbers, more = _drawn(judged)
    last: sweep.Method = "cache-alone" if judged.cache.fitted is None else "closed-form"
    methods: tuple[sweep.Method, ...] = ("zero-shot", "tip-adapter", last) if judged.cache.has_text else (last,)
    try:
        runs = _runs(judged, numbers, methods)
    except RetrievalTipError as error:
        raise _LeftOutError(str(error)) from None
    lines = sweep.summary(runs)
    chosen_on: dict[str, list[str]] = {}
    for run in runs:
        if run["method"] == methods[-1] and run["seed"] == 1:
            chosen_on.setdefault(Path(run["chosen_on"]).name, []).append(str(run["shots"]))
    chosen = "; ".join(f"{', '.join(of)}: {name}" for name, of in chosen_on.items())
    caption = (
        f"Examples are drawn from the index by the published rule, with seeds 1 to {judged.seeds}, or once if a draw "
        f"takes all examples. Alpha, beta and k are selected without the test photos (shots {chosen}). Bars show 95% "
        f"intervals of the mean over draws. Dots show single draws.{more}"
    )
    rows = []
    for line in sorted(lines, key=lambda line: methods.index(line["method"])):
        method, number, half = line["method"], line["shots"], line["half"]
        single = [run["top1"] for run in runs if (run["method"], run["shots"]) == (method, number)]
        shown = "-" if half is None else f"{100 * half:.1f}"
        rows.append((method, number, line["seeds"], line["top1"], shown, f"{min(single):.1%} to {max(single):.1%}"))
    label = "; ".join(f"{line['method']} {line['shots']} shots {line['top1']:.1%}" for line in lines)
    svg = plots.svg(lambda: plots.draw_shots(lines, runs), f"Accuracy over shots: {label}")
    return {"plot": Plot(svg, caption), "rows": rows}


def _runs(judged: JudgedIndex, numbers: Sequence[int], methods: Sequence[sweep.Method]) -> list[sweep.Run]:
    counts = {number for number in judged.cache.counts if number}
    test = sweep.Items(judged.features, judged.answers.truth, judged.test.name)
    runs: list[sweep.Run] = []
    pool = closed_form.unfitted(judged.cache)
    with tempfile.TemporaryDirectory() as place:
        for number in tqdm(numbers, unit="draw", disable=None if judged.encoder.progress else True, leave=False):
            seeds = range(1, 2 if counts == {number} else judged.seeds + 1)  # otherwise all draws are the same
            file, val = Path(place) / "runs.parquet", judged.val
            runs += sweep.sweep(pool, "", test, file, shots=[number], seeds=seeds, methods=methods, val=val)
    return runs


def _surface(judged: JudgedIndex) -> Plot:
    cache, val = judged.cache, judged.val
    if judged.is_tuned:
        raise _LeftOutError("fine-tuned keys depend on their own photos and are only valid for one alpha and beta")
    if cache.n > SURFACE_KEYS:
        raise _LeftOutError(f"{cache.n:,} examples are more than {SURFACE_KEYS:,}; use search-hp --surface")
    settings = cache.settings
    try:
        unseen = None if val is None else search_hp.unseen(cache, val.features, val.ids, val.name)
        queries = _some(unseen or search_hp.leave_one_out(cache))
        k = None if cache.index.by_class or settings.k is None or settings.k >= cache.n else settings.k
        betas = sorted({*(settings.beta * AROUND if settings.beta else search_hp.BETAS).tolist(), settings.beta})
        choice = search_hp.search(cache, queries, betas=betas, ks=[k])
    except RetrievalTipError as error:
        raise _LeftOutError(str(error)) from None
    (panel,) = plots.surface_panels(choice.surface)
    own = panel.nearest(settings.alpha, settings.beta)
    beyond = not panel.alphas[0] <= settings.alpha <= panel.alphas[-1]
    said = (
        f"Measured on {Path(queries.name).name} ({counted(len(queries.ids), 'photo')}, k = {k or 'all'}), not on the "
        f"test photos. The cross marks alpha {settings.alpha:.4g} and beta {settings.beta:.4g} of this report, "
        f"{panel.accuracy[own]:.1%}{' (alpha is beyond the edge)' if beyond else ''}. The circle marks the best, "
        f"{panel.accuracy.max():.1%}. Cells more than {plots.POINTS} points below the best share one colour."
    )
    draw = partial(plots.draw_heat, panel, settings.alpha, settings.beta)
    return Plot.of(draw, said, "Accuracy over alpha and beta. ")


def _some(queries: search_hp.Queries) -> search_hp.Queries:
    if len(queries.ids) <= SURFACE_QUERIES:
        return queries
    rows = np.sort(np.random.default_rng(0).choice(len(queries.ids), SURFACE_QUERIES, replace=False))
    return replace(queries, features=queries.features[rows], ids=queries.ids[rows], hidden=queries.hidden[rows])


def _training(judged: JudgedIndex) -> dict[str, object]:
    facts, curve = judged.record("finetune"), judged.cache.curve
    rows = [(name, described(value)) for name, value in facts.items()]
    if curve is None:
        return {"plot": None, "rows": rows}
    try:
        curve = curve.select(CURVE.names).cast(CURVE)
    except (KeyError, pa.ArrowException):
        raise _LeftOutError("the training curve of the index has an unknown format") from None
    epoch, loss, accuracy = (curve[name].to_pylist()[-1] for name in ("epoch", "loss", "accuracy"))
    recorded = facts.get("epoch")
    kept = recorded if isinstance(recorded, int) else epoch
    said = (
        f"Cross-entropy and accuracy on the examples during each epoch; epoch {kept} was kept. "
        f"The last epoch had loss {loss:.4g} and accuracy {accuracy:.1%}."
    )
    return {"plot": Plot.of(partial(plots.draw_training, curve, kept), said), "rows": rows}


# ------------------------------------------------------------------------------------------------ classes and figures


def _confusions(judged: JudgedIndex) -> dict[str, object]:
    pairs, classes = confusions(judged), counted(len(judged.evaluation.per_class), "class")
    label = f"Confusion matrix of {classes}, as shares of the true class"
    draw = partial(plots.draw_confusion, judged.evaluation)
    return {"pairs": pairs, "matrix": plots.svg(draw, label) if pairs else ""}


def _classes(judged: JudgedIndex) -> dict[str, object]:
    """Return rows of classes, sorted by accuracy, with a diagram and a sentence about them.

    Each row contains the name, the accuracy and its interval, the numbers of items and keys, and the most frequent
    mistake.
    """
    answers, names, evaluation = judged.answers, judged.cache.class_names, judged.evaluation
    rows, keys = [], judged.cache.counts
    for name, accuracy in sorted(evaluation.per_class.items(), key=lambda pair: pair[1])[:CLASSES]:
        i = names.index(name)
        own = answers.truth == i
        wrong = Counter(answers.predicted[own & ~answers.right].tolist()).most_common(1)
        most = f"{names[wrong[0][0]]} ({wrong[0][1]})" if wrong else "-"
        low, high = wilson(int(answers.right[own].sum()), int(own.sum()))
        rows.append((name, accuracy, f"{low:.1%} to {high:.1%}", int(own.sum()), keys[i], most))
    said = (
        f"The mean accuracy over classes is {evaluation.mean_per_class:.1%}. The weakest class is {rows[0][0]}, with "
        f"{rows[0][1]:.1%}."
    )
    return {
        "said": said,
        "rows": rows,
        "svg": Plot.of(partial(plots.draw_per_class, evaluation), said, "Accuracy by class. ").svg,
    }


def _probabilities(judged: JudgedIndex) -> tuple[Plot, Plot]:
    evaluation = judged.evaluation
    said = (
        f"The mean probability of the answers is {evaluation.answers.confidence.mean():.1%}, the accuracy is "
        f"{evaluation.top1:.1%}, and the expected calibration error is {evaluation.ece:.3f}."
    )
    covered = "The curve shows the accuracy of the remaining answers if the least probable ones are withheld."
    reliability = Plot.of(partial(plots.draw_reliability, evaluation), said, "Reliability. ")
    return reliability, Plot.of(partial(plots.draw_coverage, evaluation), covered)


def _affinities(judged: JudgedIndex) -> Plot:
    seen = judged.answers.affinities
    if seen is None:
        raise _LeftOutError(f"there are more than {AFFINITY_PAIRS:,} pairs of photo and example; use evaluate --plot")
    means = (plots.mean_affinity(seen, counts) for counts in (seen.same, seen.other))
    same, other = ("-" if mean is None else f"{mean:.3f}" for mean in means)
    said = f"The mean affinity of test photos to examples is {same} within a class and {other} between classes."
    return Plot.of(partial(plots.draw_affinity, judged.evaluation), said)
