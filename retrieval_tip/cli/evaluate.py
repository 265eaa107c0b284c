"""Commands that test indexes on labelled images: ``evaluate`` and ``compare``."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import argument, command, flag, grouped, option
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import command_line, finish, note, print_result
from retrieval_tip.cli.opening import index_with, reader_for, source_of
from retrieval_tip.cli.options import ComparedOptions, OpeningOptions, SourceOptions
from retrieval_tip.errors import UsageError, counted, few, json_line, percent, show
from retrieval_tip.settings import Ask

if TYPE_CHECKING:
    from retrieval_tip.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class ReportOptions:
    """The report of an evaluation, and its accuracy curve.

    Options:
        report: HTML file for a report that opens offline in any browser (requires matplotlib). It also shows the worst
            mistakes and what to do next.
        shots: Number of shots per class in the accuracy curve of the report. [default: 1, 2, 4 ...]
        seeds: Number of random draws for each point of the curve, which use the seeds 1 to N.
        no_curves: Leave out the accuracy curve, which takes the longest to compute.
    """

    report: Path | None = option(kinds.FILE, **options.OUTPUTS)
    shots: tuple[int, ...] = option(kinds.SHOTS, multiple=True, **options.OUTPUTS)
    seeds: int | None = option(kinds.SEEDS, help="[default: 3]", **options.OUTPUTS)
    no_curves: bool = flag(**options.OUTPUTS)

    def check(self) -> None:
        """Raise UsageError if options exclude each other or matplotlib is missing, and InputError for a bad file."""
        curve = {"--shots": self.shots, "--seeds": self.seeds, "--no-curves": self.no_curves}
        given = [name for name, value in curve.items() if value]
        if given and self.report is None:
            raise UsageError(f"{given[0]}: needs --report FILE")
        if self.no_curves and len(given) > 1:
            raise UsageError(f"{given[0]} and --no-curves: give only one")
        if self.report is not None:
            from retrieval_tip.report import report

            report.check(self.report)


@command()
def evaluate_command(
    folder: Place = options.INDEX_ARGUMENT,
    source: Place = argument(kinds.SOURCE),
    ask: Ask = grouped(Ask, options.ASKING | options.LEVELS),
    opening: OpeningOptions = options.OPENING,
    abstain: float | None = option(
        kinds.SHARE, metavar="P", **options.ANSWERS, help="Withhold answers whose probability is below P."
    ),
    report: ReportOptions = grouped(ReportOptions),
    as_json: bool = options.JSON,
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """Measure the accuracy of an index on labelled photos.

    Prints the accuracy with its 95 % confidence interval, the weakest classes, and the most frequent confusions. With
    -v, it also prints the accuracy of the text alone (zero_shot_top1) and of the shots alone (cache_top1), and the
    expected calibration error of the probabilities in 15 bins (ece). With --abstain, coverage is the share of photos
    that are answered, and selective_top1 is the accuracy on these photos. With --at-least, levels are the shares of the
    answers at each level and their accuracy. With --coverage, set_coverage is the share of sets with the right class,
    and set_size their mean number of classes. If SOURCE is a split .json, its test part is used.

    A photo of a class that the index lacks is right if it matches no class. known_top1 is the accuracy on the other
    photos, and known_no_match and unknown_no_match are the shares without a match. A photo that is a shot of the index
    is classified without itself.
    """
    report.check()
    loaded = index_with(folder, encoding, opening, ask)
    test = source_of(source, encoding, "test")
    with reader_for(loaded, [test], encoding) as reader:
        if report.report is None:
            from retrieval_tip.evaluation.evaluate import evaluate

            evaluation = evaluate(loaded, test, reader, abstain=abstain, at_least=ask.at_least, coverage=ask.coverage)
        else:
            from retrieval_tip.report.report import SEEDS, write_report
            from retrieval_tip.report.results import portable

            evaluation = write_report(
                loaded.in_memory(), test, reader, report.report, abstain=abstain, ask=ask, shots=report.shots or None,
                seeds=report.seeds or SEEDS, curves=not report.no_curves, place=folder, where=opening.where,
                command=command_line(*map(portable, sys.argv[1:])),
            ).evaluation  # fmt: skip
    if as_json:
        click.echo(json_line(evaluation.to_dict()))
    else:
        _print_evaluation(evaluation)
    if report.report is not None:
        note(f"Report: {show(report.report)}")
    finish(reader.skipped)


WEAKEST = 5
"""Number of classes to print."""


def _print_evaluation(evaluation: Evaluation) -> None:
    """Print the accuracy first, then the weakest classes, and with -v all figures."""
    answers, (low, high) = evaluation.answers, evaluation.interval
    within = f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    photos = Counter(answers.class_names[i] for i in answers.truth.tolist())
    weakest = sorted(evaluation.per_class.items(), key=lambda pair: pair[1])[:WEAKEST]
    weak = (f"{name} {percent(right)} of {photos[name]:,}" for name, right in weakest if right < 1)
    confused = (f"{a} as {b} ({times})" for a, b, times in evaluation.confusions[:WEAKEST])
    facts: dict[str, object] = {
        "accuracy": f"{percent(evaluation.top1)} of {counted(evaluation.n, 'photo')} {within}",
        "weakest classes": ", ".join(weak) or "none",
        "confusions": ", ".join(confused) or "none",
    }
    result = evaluation.to_dict()
    del result["per_class"], result["confusions"]
    asked = ["coverage", "selective_top1", *evaluation.figures]
    if evaluation.unknown:
        facts["unknown"] = few([f"{name} {number}" for name, number in evaluation.unknown.items()])
        asked += ["known_top1", "known_no_match", "unknown_no_match", "auroc"]
    facts |= {name: result[name] for name in asked if name in result}
    if logging.getLogger("retrieval_tip").isEnabledFor(logging.INFO):
        facts |= {name: value for name, value in result.items() if name not in facts}
    print_result(facts)


@command()
def compare_command(
    indexes: tuple[Place, ...] = argument(kinds.INDEX, nargs=-1),
    source: Place = argument(kinds.SOURCE),
    fitted_to: Place | None = option(
        kinds.SOURCE, help="Labelled photos to fit both encoders to, to compare encoders."
    ),
    as_json: bool = options.JSON,
    encoding: ComparedOptions = options.COMPARED,
) -> None:
    """Compare two indexes, or two encoders, on the same photos.

    Give two INDEXES, or --fitted-to and two encoders (--model twice). Prints both accuracies with 95 % confidence
    intervals, McNemar's exact test, and the photos with different answers. If an index does not have the class of a
    photo, only "no match" is right. A photo that is a shot of an index is classified without itself. If SOURCE has no
    labels, only the different answers are listed.
    """
    from retrieval_tip.cli.output import table_lines
    from retrieval_tip.evaluation.compare import Side, compare
    from retrieval_tip.index.encoders import compare_encoders

    asked = encoding.named()
    if (len(indexes), len(asked), fitted_to is None) not in ((2, 0, True), (0, 2, False)):
        raise UsageError("compare: give two indexes, or --fitted-to SHOTS and --model twice")
    items = source_of(source, encoding, "test", labelled=False)
    if fitted_to is None:
        a, b = (index_with(folder, encoding) for folder in indexes)
        name_a, name_b = (show(str(folder)) for folder in indexes)
        with reader_for(a, [items], encoding) as first, reader_for(b, [items], encoding) as second:
            comparison = compare(Side(name_a, a, first), Side(name_b, b, second), items)
    else:
        shots = source_of(fitted_to, replace(encoding, split=None), "train")
        (name_a, own_a), (name_b, own_b) = asked
        with reader_for(None, [], own_a) as first, reader_for(None, [], own_b) as second:
            comparison = compare_encoders((name_a, first), (name_b, second), shots, items, encoding.device)
    if as_json:
        click.echo(json_line(comparison.to_dict()))
    else:
        click.echo(str(comparison))
        rows = comparison.differences.to_pylist()
        if rows:
            click.echo("\n".join(table_lines(rows, comparison.differences.column_names)))
    finish(comparison.skipped)
