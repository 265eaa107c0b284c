"""Commands that test indexes on labelled images: ``evaluate`` and ``compare``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import command, grouped
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import finish, note, print_result
from retrieval_tip.cli.opening import index_with, reader_for, source_of
from retrieval_tip.cli.options import OpeningOptions, SourceOptions
from retrieval_tip.hooks import argument, option
from retrieval_tip.settings import Ask
from retrieval_tip.wording import command_line, counted, few, json_line, percent, show

if TYPE_CHECKING:
    from retrieval_tip.evaluation.evaluate import Evaluation


@command()
def evaluate_command(
    folder: Place = options.INDEX_ARGUMENT,
    source: Place = argument(kinds.SOURCE),
    ask: Ask = grouped(Ask, options.ASKING | options.LEVELS),
    opening: OpeningOptions = options.OPENING,
    abstain: float | None = option(kinds.SHARE, metavar="P", **options.ANSWERS),
    report: Path | None = option(kinds.OUTPUT, **options.OUTPUTS),
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

    Options:
        abstain: Withhold answers whose probability is below P.
        report: HTML file for a report that opens offline in any browser. It also shows the worst mistakes and what to
            do next.

    Examples:
        evaluate indexes/things new
        evaluate indexes/things new --report things.html
    """
    loaded = index_with(folder, encoding, opening, ask)
    test = source_of(source, encoding, "test")
    with reader_for(loaded, [test], encoding) as reader:
        if report is None:
            from retrieval_tip.evaluation.evaluate import evaluate

            evaluation = evaluate(
                loaded, test, reader, abstain=abstain, at_least=ask.at_least, coverage=ask.coverage
            )
        else:
            from retrieval_tip.report.report import portable, write_report

            evaluation = write_report(
                loaded.in_memory(),
                test,
                reader,
                report,
                abstain=abstain,
                ask=ask,
                place=folder,
                command=command_line(*map(portable, sys.argv[1:])),
            )
    if as_json:
        click.echo(json_line(evaluation.to_dict()))
    else:
        _print_evaluation(evaluation)
    if report is not None:
        note(f"Report: {show(report)}")
    finish(reader.skipped)


WEAKEST = 5
"""Number of classes to print."""


def _print_evaluation(evaluation: Evaluation) -> None:
    """Print the accuracy first, then the weakest classes, and with -v all figures."""
    low, high = evaluation.interval
    within = f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
    weakest = [score for score in evaluation.by_class[:WEAKEST] if score.right < score.n]
    weak = (f"{score.name} {percent(score.accuracy)} of {score.n:,}" for score in weakest)
    confused = (f"{a} as {b} ({times})" for a, b, times in evaluation.confusions[:WEAKEST])
    facts: dict[str, object] = {
        "accuracy": f"{percent(evaluation.top1)} of {counted(evaluation.n, 'photo')} {within}",
        "weakest classes": ", ".join(weak) or "none",
        "confusions": ", ".join(confused) or "none",
    }
    result = evaluation.to_dict()
    del result["per_class"], result["confusions"]
    asked = [*evaluation.figures]
    if evaluation.unknown:
        facts["unknown"] = few([f"{name} {number}" for name, number in evaluation.unknown.items()])
        asked += ["known_top1", "known_no_match", "unknown_no_match", "auroc"]
    facts |= {name: result[name] for name in asked if name in result}
    if logging.getLogger("retrieval_tip").isEnabledFor(logging.INFO):
        facts |= {name: value for name, value in result.items() if name not in facts}
    print_result(facts)


@command()
def compare_command(
    folder: Place = options.INDEX_ARGUMENT,
    other: Place = argument(kinds.INDEX, metavar="INDEX2"),
    source: Place = argument(kinds.SOURCE),
    as_json: bool = options.JSON,
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """Compare two indexes on the same photos.

    Prints both accuracies with 95 % confidence intervals, McNemar's exact test, and the photos with different answers.
    If an index does not have the class of a photo, only "no match" is right. A photo that is a shot of an index is
    classified without itself. If SOURCE has no labels, only the different answers are listed. To compare encoders, use
    models --try.

    Examples:
        compare indexes/things indexes/others new
        compare indexes/things indexes/others new --json
    """
    from retrieval_tip.cli.output import write_table
    from retrieval_tip.evaluation.compare import Side, compare

    items = source_of(source, encoding, "test", labelled=False)
    a, b = (index_with(place, encoding) for place in (folder, other))
    with reader_for(a, [items], encoding) as first, reader_for(b, [items], encoding) as second:
        comparison = compare(
            Side(show(str(folder)), a, first), Side(show(str(other)), b, second), items
        )
    if as_json:
        click.echo(json_line(comparison.to_dict()))
    else:
        click.echo(str(comparison))
        write_table(comparison.differences, "table", None)
    finish(comparison.skipped)
