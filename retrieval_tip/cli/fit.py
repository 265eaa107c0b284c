"""Commands that fit and train an index: ``fit``, ``search-hp``, ``finetune`` and ``calibrate``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.messages import finish, print_facts, say_fit, warn
from retrieval_tip.cli.opening import Origin, checked, encoder_for, source_of, validation
from retrieval_tip.cli.options import EncodingOptions, ReadingOptions
from retrieval_tip.cli.parameters import FILE, FOLDER, INDEX, NUMBER, POSITIVE, SEED, SOURCE, VIEWS_COUNT, K, count
from retrieval_tip.errors import Skipped, UsageError, show

if TYPE_CHECKING:
    from retrieval_tip.fit.search_hp import HyperparameterChoice
    from retrieval_tip.fit.trainer import Recipe
    from retrieval_tip.index.places import Place
    from retrieval_tip.settings import (
        KeysMet,
        MetricName,
        Protocol,
        TrainedPart,
        TrainingPrecision,
        TrainingSettings,
        ValuesName,
    )


@command("fit")
@click.argument("folder", type=INDEX, metavar="INDEX")
@click.option("--val", "source", type=SOURCE, help="Labelled validation source to judge by, instead of the shots.")
@options.LETTERS
@click.option("--plot", type=FILE, help="PNG or SVG diagram of the forms that were tried (needs matplotlib).")
@options.ROOT
@options.BACKBONE
@options.ENCODING
@click.pass_context
def fit_command(
    ctx: click.Context,
    folder: Place,
    source: Path | str | None,
    metric: MetricName | None,
    values: ValuesName | None,
    plot: Path | None,
    root: Path | None,
    encoding: EncodingOptions,
) -> None:
    """Fit an index to its shots again, in closed form.

    Fits metric, values and settings as index build does, for example after you added shots. With --val, validation
    images judge the fit instead of held-out shots; a split .json gives its val part. Makes a new version of the index.
    """
    from retrieval_tip.index.fit import fit_index
    from retrieval_tip.index.places import at
    from retrieval_tip.report import plots

    if plot:
        plots.needs_matplotlib()
    if source is None:
        choice, skipped = fit_index(folder, metric=metric, values=values), []
    else:
        val = source_of(source, ReadingOptions(root=root), "val")
        with encoder_for(ctx, Origin.of(folder), [val], encoding) as encoder:
            choice = fit_index(folder, metric=metric, values=values, validation=val, encoder=encoder)
        skipped = encoder.skipped
    warn(choice.warnings)
    say_fit(choice.provenance())
    if plot and choice.trials:
        plots.write(lambda: plots.draw_choice(choice), plot, show(at(folder).name))
    elif plot:
        warn(["--plot: no diagram written, because no forms were compared"])
    finish(ctx, skipped)


_JUDGED = options.several(
    click.option(
        "--leave-one-out", is_flag=True, help="Score each shot with the keys of its image hidden; needs no images."
    ),
    click.option("--folds", type=count(least=2), help="Score each shot with the keys of its fold hidden, in N folds."),
    click.option("--val-shots", type=K("shots"),
                  help="Validation images per class, or all.  [default: min(shots, 4), as published]"),
    options.PROTOCOL,
    options.SCALES,
)  # fmt: skip


@command("search-hp")
@click.argument("folder", type=FOLDER, metavar="INDEX")
@click.option("--val", "source", type=SOURCE, help="Labelled validation source; a split .json gives its val part.")
@_JUDGED
@click.option("--surface", type=FILE, help="Parquet file for the accuracy at each k, beta and alpha.")
@click.option("--plot", type=FILE, help="PNG or SVG heat map of the same (needs matplotlib).")
@click.option(
    "--greedy",
    is_flag=True,
    help="Take the best settings found, even if the gain over the untouched ones may be chance.",
)
@click.option("--dry-run", is_flag=True, help="Print the choice without changing the index.")
@options.JSON
@options.ROOT
@options.BACKBONE
@options.ENCODING
@click.pass_context
def search_command(
    ctx: click.Context,
    folder: Path,
    source: Path | str | None,
    leave_one_out: bool,
    folds: int | None,
    val_shots: KeysMet,
    protocol: Protocol,
    scales: tuple[float, float],
    surface: Path | None,
    plot: Path | None,
    greedy: bool,
    dry_run: bool,
    as_json: bool,
    root: Path | None,
    encoding: EncodingOptions,
) -> None:
    """Choose alpha, beta and k, as in Tip-Adapter.

    Chooses on validation images (--val) or on the shots (--leave-one-out or --folds), never on test images; a split
    .json gives its val part. The choice is exact in alpha. Makes a new version of the index.
    """
    from retrieval_tip.fit import search_hp

    if sum((source is not None, leave_one_out, folds is not None)) != 1:
        raise UsageError("search-hp: give exactly one of --val SOURCE, --leave-one-out and --folds N")
    cache = checked(folder, encoding.device)
    skipped: list[Skipped] = []
    paper = protocol == "paper"
    if source is None:
        queries = search_hp.leave_one_out(cache) if folds is None else search_hp.folds(cache, folds)
    else:
        val = validation(cache, source, root, "all" if paper else val_shots)
        with encoder_for(ctx, cache, [val], encoding) as encoder:
            queries = search_hp.on_validation(cache, val, encoder)
        skipped = encoder.skipped
    if paper:
        choice = search_hp.search_paper(cache, queries, scales)
    else:
        choice = search_hp.search(cache, queries, cautious=not greedy)
    warn(choice.warnings)
    if surface:
        search_hp.write_surface(choice, surface)
    if plot:
        from retrieval_tip.report.plots import draw_surface

        draw_surface(choice.surface, plot, show(folder.name))
    if not dry_run:
        search_hp.apply(cache, choice, folder)
    _print_choice(choice, choice.k if dry_run else cache.settings.k, cache.version, as_json)
    finish(ctx, skipped)


def _print_choice(choice: HyperparameterChoice, k: int | None, version: int | None, as_json: bool) -> None:
    """Print the choice. In JSON, an unbounded interval ends with null."""
    facts = {name: value for name, value in vars(choice).items() if name not in ("surface", "warnings")}
    facts |= {"k": k or "all", "version": version}
    if as_json:
        facts["interval"] = [None if value == float("inf") else value for value in choice.interval]
        click.echo(json.dumps(facts | {"warnings": choice.warnings}))
    else:
        print_facts(facts | {"interval": list(choice.interval)}, 12)


@dataclass(frozen=True)
class TrainingOptions:
    """Parts to train, and how."""

    train: tuple[TrainedPart, ...]
    epochs: int
    batch: int
    lr: float
    eps: float
    weight_decay: float
    views_cache: int | None
    views: str | None
    products: TrainingPrecision
    settings: TrainingSettings
    alpha: float | None
    beta: float | None
    seed: int

    def recipe(self) -> Recipe:
        """Return the training recipe. Raises UsageError for conflicting view options."""
        from retrieval_tip.fit.trainer import VIEWS, Recipe

        if self.views and self.views_cache:
            raise UsageError("--views fresh and --views-cache: give only one")
        encoders = {"visual", "text"} & set(self.train)
        fresh = self.views or (encoders and not self.views_cache)
        return Recipe(
            train=tuple(dict.fromkeys(self.train)), views=None if fresh else self.views_cache or VIEWS,
            settings=self.settings, alpha=self.alpha, beta=self.beta, epochs=self.epochs, batch=self.batch, lr=self.lr,
            eps=self.eps, weight_decay=self.weight_decay, precision=self.products, seed=self.seed,
        )  # fmt: skip


_TRAINING = options.grouped(
    "training", TrainingOptions,
    click.option("--epochs", type=count("epochs"), default=20, show_default=True, help="Passes over the shots."),
    click.option("--batch", type=count("batch"), default=256, show_default=True, help="Queries per step."),
    click.option("--lr", type=POSITIVE, default=1e-3, show_default=True,
                 help="Initial learning rate, with cosine decay; encoders use a thousandth."),
    click.option("--eps", type=POSITIVE, default=1e-4, show_default=True, help="Epsilon of AdamW."),
    click.option("--weight-decay", type=NUMBER, default=0.01, show_default=True, help="Weight decay of AdamW."),
    click.option("--views-cache", type=VIEWS_COUNT, metavar="M",
                 help="Augmented views of each shot to encode once and draw from.  "
                      "[default: 16; fresh views if an encoder is trained]"),
    click.option("--views", type=click.Choice(["fresh"]), help="fresh: encode a new view of each shot in every epoch."),
    click.option("--precision", "products", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
                 show_default=True,
                 help="Type of the matrix products; auto: bfloat16 if it is measured to be faster."),
    click.option("--settings", type=click.Choice(["tried", "own"]), default="tried", show_default=True,
                 help="Alpha and beta for training; tried: with --val, the best of a few; own: the index's."),
    click.option("--alpha", type=NUMBER, help="Alpha for training.  [implies --settings own]"),
    click.option("--beta", type=NUMBER, help="Beta for training.  [implies --settings own]"),
    click.option("--seed", type=SEED, default=1, show_default=True, help="Seed for drawing batches and views."),
)  # fmt: skip


@command("finetune")
@click.argument("folder", type=FOLDER, metavar="INDEX")
@click.option("--out", type=FOLDER, required=True, help="Index folder for the result.")
@click.option("--train", multiple=True, type=click.Choice(["keys", "values", "visual", "text"]), default=["keys"],
              show_default=True, help="Part to train; repeat for more.")  # fmt: skip
@click.option("--source", type=SOURCE,
              help="Shots as images, or as a feature table of views, with one id per shot.  "
                   "[default: the source that the index was built from]")  # fmt: skip
@click.option("--val", type=SOURCE, help="Labelled validation source to choose the epoch and settings on; a "
                                         "split .json gives its val part.")  # fmt: skip
@click.option("--val-shots", type=K("shots"), help="Validation images per class, or all.  [default: min(shots, 4)]")
@_TRAINING
@click.option("--resume", is_flag=True, help="Continue an interrupted training of encoders from OUT.checkpoint.")
@click.option("--keep-last", is_flag=True, help="Write the trained index even if it is less accurate than before.")
@click.option("--plot", type=FILE, help="PNG or SVG diagram of loss and accuracy per epoch (needs matplotlib).")
@options.JSON
@options.MODEL
@options.READING
@options.ENCODING
@click.pass_context
def finetune_command(
    ctx: click.Context,
    folder: Path,
    out: Path,
    source: Path | str | None,
    val: Path | str | None,
    val_shots: KeysMet,
    training: TrainingOptions,
    resume: bool,
    keep_last: bool,
    plot: Path | None,
    as_json: bool,
    reading: ReadingOptions,
    encoding: EncodingOptions,
) -> None:
    """Fine-tune an index on its shots (Tip-Adapter-F).

    Trains the keys, or the parts in --train, with AdamW on augmented views of the shots. Held-out shots or --val
    measure the accuracy before and after, and the better index is written to --out. --val also chooses the epoch, then
    alpha, beta and k. --resume continues an interrupted training of encoders from its last epoch, with identical
    results.
    """
    from retrieval_tip.fit.finetune import checkpoint_of, finetune_into, own_shots, shots_of
    from retrieval_tip.report import plots

    if plot:
        plots.needs_matplotlib()
    recipe = training.recipe()
    cache = checked(folder, encoding.device)
    shots = shots_of(cache) if source is None else own_shots(cache, source_of(source, reading, "train"))
    unseen = None if val is None else validation(cache, val, reading.root, val_shots)
    sources = [shots] if unseen is None else [shots, unseen]
    try:
        with encoder_for(ctx, cache, sources, encoding) as encoder:
            tuned = finetune_into(
                out, cache, shots, encoder, recipe, val=unseen, parent=show(folder), resume=resume, keep_last=keep_last
            )
    except KeyboardInterrupt as error:
        if checkpoint_of(out).exists():
            error.add_note("to continue from the last checkpoint, repeat the command with --resume")
        raise
    if plot:
        plots.write(lambda: plots.draw_training(tuned.curve, tuned.epoch, "Fine-tuning"), plot, show(out.name))
    warn(tuned.choice.warnings if tuned.choice else ())
    if as_json:
        click.echo(json.dumps(tuned.facts()))
    else:
        print_facts(tuned.facts(), 12)
    finish(ctx, encoder.skipped)


@command("calibrate")
@click.argument("folder", type=FOLDER, metavar="INDEX")
@click.option("--val", "source", type=SOURCE, required=True,
              help="Labelled validation source, neither shots nor test; a split .json gives its val part.")  # fmt: skip
@options.ROOT
@options.BACKBONE
@options.ENCODING
@click.pass_context
def calibrate_command(
    ctx: click.Context, folder: Path, source: Path | str, root: Path | None, encoding: EncodingOptions
) -> None:
    """Fit the temperature of the probabilities.

    Fits it on validation images and makes a new version of the index. Predicted classes stay the same; their
    probabilities become softmax(logits / temperature). Calibrate again if keys, alpha, beta, k or tail change.
    """
    from retrieval_tip.evaluation.calibration import apply, calibrate

    cache = checked(folder, encoding.device)
    val = source_of(source, ReadingOptions(root=root), "val")
    with encoder_for(ctx, cache, [val], encoding) as encoder:
        settings, result = calibrate(cache, val, encoder)
    apply(cache, settings, result, val.name, folder)
    print_facts(vars(result) | {"version": cache.version}, 15)
    finish(ctx, encoder.skipped)
