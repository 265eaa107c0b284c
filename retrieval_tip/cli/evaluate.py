"""Commands that test indexes on labelled images: ``evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import argument, command, flag, option
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import about, command_line, finish, print_facts, say, shown
from retrieval_tip.cli.opening import index_with, named_encoder, reader_for, source_of
from retrieval_tip.cli.options import ComparedOptions, EncodingOptions, OpeningOptions, ReadingOptions
from retrieval_tip.errors import UsageError, counted, few, json_line, percent, show

if TYPE_CHECKING:
    from retrieval_tip.evaluation.evaluate import Evaluation
    from retrieval_tip.settings import Ask


@command()
def evaluate_command(
    folder: Place = options.INDEX_ARGUMENT,
    source: Place = argument(kinds.SOURCE),
    ask: Ask = options.ASK,
    opening: OpeningOptions = options.OPENING,
    abstain: float | None = option(
        kinds.SHARE, metavar="P", **options.ANSWERS, help="Withhold answers whose probability is below P."
    ),
    plot: Path | None = option(kinds.FOLDER, help="Folder for PNG diagrams of confusions, classes and calibration."),
    as_json: bool = options.JSON,
    reading: ReadingOptions = options.READING,
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Measure the accuracy of an index on labelled photos.

    Prints the accuracy of the index (top1), the accuracy of the text alone (zero-shot) and the accuracy of the cache
    alone. The figure ece is the expected calibration error of the probabilities in 15 bins. With --abstain, coverage is
    the share of images that are answered, and selective_top1 is the accuracy on these images. If SOURCE is a split
    .json, its test part is used.

    A photo of a class that the index lacks is right in top1 if it matches no class. known_top1 is the accuracy on the
    other photos, and known_no_match and unknown_no_match are the shares without a match. A photo that is a shot of the
    index is classified without itself.
    """
    from retrieval_tip.evaluation.evaluate import evaluate
    from retrieval_tip.report import plots

    if plot:
        plots.check(plot)
    loaded = index_with(folder, encoding, opening, ask)
    test = source_of(source, reading, "test")
    with reader_for(loaded, [test], encoding) as reader:
        evaluation = evaluate(loaded, test, reader, abstain=abstain)
    if plot:
        files = plots.write_plots(evaluation, plot, f"{show(Path(str(folder)).name)} on {show(Path(str(source)).name)}")
        say(f"{show(plot)}: {', '.join(file.name for file in files)}")
    _print_evaluation(evaluation, as_json)
    finish(reader.skipped)


def _print_evaluation(evaluation: Evaluation, as_json: bool) -> None:
    result = evaluation.to_dict()
    if as_json:
        click.echo(json_line(result))
        return
    del result["per_class"], result["confusions"]
    result["unknown"] = few([f"{name} {number}" for name, number in evaluation.unknown.items()])
    if not evaluation.unknown:
        for name in ("unknown", "known_top1", "known_no_match", "unknown_no_match", "auroc"):
            del result[name]
    if not evaluation.held_out:
        del result["held_out"]
    worst = sorted(evaluation.per_class.items(), key=lambda pair: pair[1])[:5]
    result["worst classes"] = ", ".join(f"{name} {shown(value)}" for name, value in worst)
    result["confusions"] = ", ".join(f"{a} as {b} ({times})" for a, b, times in evaluation.confusions) or "none"
    print_facts(result, 15)


@command()
def compare_command(
    indexes: tuple[Place, ...] = argument(kinds.INDEX, nargs=-1),
    source: Place = argument(kinds.SOURCE),
    fitted_to: Place | None = option(
        kinds.SOURCE, help="Labelled photos to fit both encoders to, to compare encoders."
    ),
    as_json: bool = options.JSON,
    reading: ReadingOptions = options.READING,
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
    items = source_of(source, reading, "test", labelled=False)
    if fitted_to is None:
        a, b = (index_with(folder, encoding) for folder in indexes)
        name_a, name_b = (show(str(folder)) for folder in indexes)
        with reader_for(a, [items], encoding) as first, reader_for(b, [items], encoding) as second:
            comparison = compare(Side(name_a, a, first), Side(name_b, b, second), items)
    else:
        shots = source_of(fitted_to, replace(reading, split=None), "train")
        (name_a, own_a), (name_b, own_b) = asked
        with named_encoder(own_a) as first, named_encoder(own_b) as second:
            comparison = compare_encoders((name_a, first), (name_b, second), shots, items, encoding.device)
    if as_json:
        click.echo(json_line(comparison.to_dict()))
    else:
        click.echo(str(comparison))
        rows = comparison.differences.to_pylist()
        if rows:
            click.echo("\n".join(table_lines(rows, comparison.differences.column_names)))
    finish(comparison.skipped)


@command()
def report_command(
    folder: Path = options.FOLDER_ARGUMENT,
    test: Place = option(
        kinds.SOURCE, required=True, help="Labelled test source. The test part of a split .json is used."
    ),
    out: Path = option(kinds.FILE, default="report.html", help="HTML file to write."),
    shots: tuple[int, ...] = option(
        kinds.SHOTS, multiple=True, help="Number of shots per class in the accuracy curve. [default: 1, 2, 4 ...]"
    ),
    seeds: int = option(kinds.SEEDS, default=3, help="Number of random draws, which use the seeds 1 to N."),
    no_curves: bool = flag(help="Skip the accuracy curve, which takes the longest to compute."),
    ask: Ask = options.ASK,
    opening: OpeningOptions = options.OPENING,
    reading: ReadingOptions = options.READING,
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Write an accuracy report as a single HTML file.

    You can open the file offline in any browser, and send it to others. It names the weakest classes, recommends what
    to do next, and shows the worst mistakes. Photos that are shots of the index, and photos of classes that it lacks,
    are left out. The command evaluate prints the same other figures. This command requires matplotlib.
    """
    from retrieval_tip.report.report import check, write_report
    from retrieval_tip.report.results import portable

    if shots and no_curves:
        raise UsageError("--shots and --no-curves: give only one")
    check(out)
    index = index_with(folder, encoding, opening, ask).in_memory()
    source = source_of(test, reading, "test")
    with reader_for(index, [source], encoding) as reader:
        curve: dict[str, Any] = {"shots": shots or None, "seeds": seeds, "curves": not no_curves}
        typed = command_line(*map(portable, sys.argv[1:]))
        written = write_report(index, source, reader, out, **curve, folder=folder, where=opening.where, command=typed)
    right = percent(written.evaluation.top1)
    about(out, f"{written.bytes / 1e6:.1f} MB, {right} of {counted(written.evaluation.n, 'photo')} correct")
    finish(reader.skipped)
