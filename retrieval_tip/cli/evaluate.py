"""Commands that test indexes on labelled images: ``evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.messages import about, finish, print_facts, say, shown
from retrieval_tip.cli.opening import (
    encoder_for,
    encoder_of,
    index_with,
    load,
    named_models,
    source_of,
)
from retrieval_tip.cli.options import EncodingOptions, OpeningOptions, ReadingOptions
from retrieval_tip.cli.parameters import FILE, FOLDER, INDEX, SEEDS, SHARE, SHOTS, SOURCE
from retrieval_tip.errors import UsageError, counted, few, json_line, percent, show

if TYPE_CHECKING:
    from retrieval_tip.evaluation.evaluate import Evaluation
    from retrieval_tip.index.places import Place
    from retrieval_tip.settings import Ask


@command("evaluate")
@options.INDEX_ARGUMENT
@click.argument("source", type=SOURCE)
@options.ANSWER
@options.ANSWER_OPTION("--abstain", type=SHARE, metavar="P", help="Withhold answers whose probability is below P.")
@click.option("--plot", type=FOLDER,
              help="Folder for PNG diagrams of confusions, classes and calibration.")  # fmt: skip
@options.JSON
@options.BACKBONE
@options.READING
@options.ENCODING
@click.pass_context
def evaluate_command(
    ctx: click.Context,
    folder: Place,
    source: Path | str,
    ask: Ask,
    opening: OpeningOptions,
    abstain: float | None,
    plot: Path | None,
    as_json: bool,
    reading: ReadingOptions,
    encoding: EncodingOptions,
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
    with encoder_for(ctx, loaded, [test], encoding) as encoder:
        evaluation = evaluate(loaded, test, encoder, abstain=abstain)
    if plot:
        files = plots.write_plots(evaluation, plot, f"{show(Path(str(folder)).name)} on {show(Path(str(source)).name)}")
        say(f"{show(plot)}: {', '.join(file.name for file in files)}")
    _print_evaluation(evaluation, as_json)
    finish(ctx, encoder.skipped)


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


@command("compare")
@click.argument("indexes", nargs=-1, type=INDEX)
@click.argument("source", type=SOURCE)
@click.option("--fitted-to", "shots", type=SOURCE,
              help="Labelled photos to fit both encoders to, to compare encoders.")  # fmt: skip
@options.JSON
@options.MODELS
@options.READING
@options.ENCODING
@click.pass_context
def compare_command(
    ctx: click.Context,
    indexes: tuple[Place, ...],
    source: Path | str,
    shots: Path | str | None,
    as_json: bool,
    models: tuple[str, ...],
    weights: tuple[str, ...],
    reading: ReadingOptions,
    encoding: EncodingOptions,
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

    asked = named_models(encoding, models, weights)
    if (len(indexes), len(asked), shots is None) not in ((2, 0, True), (0, 2, False)):
        raise UsageError("compare: give two indexes, or --fitted-to SHOTS and --model twice")
    items = source_of(source, reading, "test", labelled=False)
    if shots is None:
        a, b = (index_with(folder, encoding) for folder in indexes)
        name_a, name_b = (show(str(folder)) for folder in indexes)
        with encoder_for(ctx, a, [items], encoding) as first, encoder_for(ctx, b, [items], encoding) as second:
            comparison = compare(Side(name_a, a, first), Side(name_b, b, second), items)
    else:
        fitted_to = source_of(shots, reading.without_split(), "train")
        (name_a, own_a), (name_b, own_b) = asked
        with encoder_of(ctx, load(own_a), own_a) as first, encoder_of(ctx, load(own_b), own_b) as second:
            comparison = compare_encoders((name_a, first), (name_b, second), fitted_to, items, encoding.device)
    if as_json:
        click.echo(json_line(comparison.to_dict()))
    else:
        click.echo(str(comparison))
        rows = comparison.differences.to_pylist()
        for line in table_lines(rows, comparison.differences.column_names) if rows else ():
            click.echo(line)
    finish(ctx, comparison.skipped)


@command("report")
@options.FOLDER_ARGUMENT
@click.option("--test", "source", type=SOURCE, required=True,
              help="Labelled test source. The test part of a split .json is used.")  # fmt: skip
@click.option("--out", type=FILE, default="report.html", show_default=True, help="HTML file to write.")
@click.option("--shots", type=SHOTS, multiple=True,
              help="Number of shots per class in the accuracy curve. Can be repeated.  "
                   "[default: 1, 2, 4 ...]")  # fmt: skip
@click.option("--seeds", type=SEEDS, default=3, show_default=True,
              help="Number of random draws, which use the seeds 1 to N.")  # fmt: skip
@click.option("--no-curves", is_flag=True, help="Skip the accuracy curve, which takes the longest to compute.")
@options.ANSWER
@options.BACKBONE
@options.READING
@options.ENCODING
@click.pass_context
def report_command(
    ctx: click.Context,
    folder: Path,
    source: Path | str,
    out: Path,
    shots: tuple[int, ...],
    seeds: int,
    no_curves: bool,
    ask: Ask,
    opening: OpeningOptions,
    reading: ReadingOptions,
    encoding: EncodingOptions,
) -> None:
    """Write an accuracy report as a single HTML file.

    You can open the file offline in any browser, and send it to others. It names the weakest classes, recommends what
    to do next, and shows the worst mistakes. Photos that are shots of the index, and photos of classes that it lacks,
    are left out. The other figures are the same as those of the command evaluate. This command requires matplotlib.
    """
    from retrieval_tip.report.judged import portable
    from retrieval_tip.report.report import check, write_report

    if shots and no_curves:
        raise UsageError("--shots and --no-curves: give only one")
    check(out)
    cache = index_with(folder, encoding, opening, ask).in_memory()
    test = source_of(source, reading, "test")
    with encoder_for(ctx, cache, [test], encoding) as encoder:
        written = write_report(
            cache, test, encoder, out, shots=shots or None, seeds=seeds, curves=not no_curves, folder=folder,
            where=opening.where, command=shlex.join(["retrieval-tip", *map(portable, sys.argv[1:])]),
        )  # fmt: skip
    right = percent(written.evaluation.top1)
    about(out, f"{written.bytes / 1e6:.1f} MB, {right} of {counted(written.evaluation.n, 'photo')} correct")
    finish(ctx, encoder.skipped)
