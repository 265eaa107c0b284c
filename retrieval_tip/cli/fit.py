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
from retrieval_tip.cli.parameters import FILE, FOLDER, NUMBER, POSITIVE, SEED, SOURCE, VIEWS_COUNT, K, count
from retrieval_tip.errors import Skipped, UsageError, show

if TYPE_CHECKING:
    from retrieval_tip.fit.search_hp import HyperparameterChoice
    from retrieval_tip.fit.trainer import Recipe
    from retrieval_tip.index.places import Place
    from retrieval_tip.settings import (
        ClassPrior,
        KeysMet,
        MetricName,
        TrainedPart,
        TrainingPrecision,
        ValuesName,
    )


@command("fit")
@options.INDEX_ARGUMENT
@click.option("--val", "source", type=SOURCE,
              help="Labelled validation source, used instead of held-out shots to score the fit.")  # fmt: skip
@options.building("metric", "values", "class_prior", "prior")
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
    class_prior: ClassPrior | None,
    prior: tuple[Place, ...],
    root: Path | str | None,
    encoding: EncodingOptions,
) -> None:
    """Fit an index to its shots again, in closed form.

    Fits the metric, the values and the settings in the same way as index build. This is useful after you have added
    shots. With --val, the fit is scored on validation images instead of held-out shots, and the val part of a split
    .json is used. The result is saved as a new version of the index.
    """
    from retrieval_tip.index.fit import fit_index

    if source is None:
        choice = fit_index(folder, metric=metric, values=values, class_prior=class_prior, prior=prior)
        skipped: list[Skipped] = []
    else:
        val = source_of(source, ReadingOptions(root=root), "val")
        with encoder_for(ctx, Origin.of(folder), [val], encoding) as encoder:
            choice = fit_index(
                folder, metric=metric, values=values, class_prior=class_prior, prior=prior, validation=val,
                encoder=encoder,
            )  # fmt: skip
        skipped = encoder.skipped
    warn(choice.warnings)
    say_fit(choice.provenance())
    finish(ctx, skipped)


_JUDGED = options.several(
    click.option(
        "--leave-one-out",
        is_flag=True,
        help="Score each shot against the keys of all other images. No additional images are needed.",
    ),
    click.option("--folds", type=count(least=2),
                 help="Split the shots into N folds, and score each shot against the keys of the other folds."),
    click.option("--val-shots", type=K("shots"),
                  help="Number of validation images to use per class, or all.  "
                       "[default: min(shots, 4), as in the published code]"),
)  # fmt: skip


@command("search-hp")
@options.FOLDER_ARGUMENT
@click.option("--val", "source", type=SOURCE,
              help="Labelled validation source. The val part of a split .json is used.")  # fmt: skip
@_JUDGED
@click.option("--surface", type=FILE, help="Parquet file to write, with the accuracy for each beta and alpha.")
@click.option(
    "--greedy",
    is_flag=True,
    help="Use the best settings found, even if their gain over the default settings may be due to chance.",
)
@click.option("--dry-run", is_flag=True, help="Print the selected settings, but do not change the index.")
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
    surface: Path | None,
    greedy: bool,
    dry_run: bool,
    as_json: bool,
    root: Path | str | None,
    encoding: EncodingOptions,
) -> None:
    """Search for the best alpha and beta, as in Tip-Adapter.

    The settings are selected on validation images (--val) or on the shots (--leave-one-out or --folds), and never on
    test images. If --val is a split .json, its val part is used. The search uses all keys, and it is exact in alpha.
    The result is saved as a new version of the index. Use index tune to select k.
    """
    from retrieval_tip.fit import search_hp
    from retrieval_tip.fit.folds import Queries

    if sum((source is not None, leave_one_out, folds is not None)) != 1:
        raise UsageError("search-hp: give exactly one of --val SOURCE, --leave-one-out and --folds N")
    cache = checked(folder, encoding.device)
    skipped: list[Skipped] = []
    if source is None:
        queries = Queries.leave_one_out(cache) if folds is None else Queries.in_folds(cache, folds)
    else:
        val = validation(cache, source, root, val_shots)
        with encoder_for(ctx, cache, [val], encoding) as encoder:
            queries = search_hp.on_validation(cache, val, encoder)
        skipped = encoder.skipped
    choice = search_hp.search(cache, queries, cautious=not greedy)
    warn(choice.warnings)
    if surface:
        search_hp.write_surface(choice, surface)
    if not dry_run:
        search_hp.apply(cache, choice, folder)
    _print_choice(choice, cache.version, as_json)
    finish(ctx, skipped)


def _print_choice(choice: HyperparameterChoice, version: int | None, as_json: bool) -> None:
    """Print the selected settings. In JSON, an unbounded interval ends with null."""
    facts = {name: value for name, value in vars(choice).items() if name not in ("surface", "warnings")}
    facts["version"] = version
    if as_json:
        facts["interval"] = [None if value == float("inf") else value for value in choice.interval]
        click.echo(json.dumps(facts | {"warnings": choice.warnings}))
    else:
        print_facts(facts | {"interval": list(choice.interval)}, 12)


@dataclass(frozen=True)
class TrainingOptions:
    """Parts of the index to train, and training parameters."""

    train: tuple[TrainedPart, ...]
    epochs: int
    batch: int
    lr: float
    eps: float
    weight_decay: float
    views_cache: int | None
    views: str | None
    products: TrainingPrecision
    alpha: float | None
    beta: float | None
    seed: int

    def recipe(self) -> Recipe:
        """Return the training recipe. Raises UsageError if the view options conflict."""
        from retrieval_tip.fit.trainer import VIEWS, Recipe

        if self.views and self.views_cache:
            raise UsageError("--views fresh and --views-cache: give only one")
        return Recipe(
            train=tuple(dict.fromkeys(self.train)), views=None if self.views else self.views_cache or VIEWS,
            alpha=self.alpha, beta=self.beta, epochs=self.epochs, batch=self.batch, lr=self.lr, eps=self.eps,
            weight_decay=self.weight_decay, precision=self.products, seed=self.seed,
        )  # fmt: skip


_TRAINING = options.grouped(
    "training", TrainingOptions,
    click.option("--epochs", type=count("epochs"), default=20, show_default=True,
                 help="Number of passes over the shots."),
    click.option("--batch", type=count("batch"), default=256, show_default=True, help="Number of queries per step."),
    click.option("--lr", type=POSITIVE, default=1e-3, show_default=True,
                 help="Initial learning rate, which decays along a cosine."),
    click.option("--eps", type=POSITIVE, default=1e-4, show_default=True, help="AdamW epsilon."),
    click.option("--weight-decay", type=NUMBER, default=0.01, show_default=True, help="AdamW weight decay."),
    click.option("--views-cache", type=VIEWS_COUNT, metavar="M",
                 help="Number of augmented views of each shot that are encoded once and drawn from in each epoch.  "
                      "[default: 16]"),
    click.option("--views", type=click.Choice(["fresh"]),
                 help="With fresh, a new view of each shot is encoded in every epoch."),
    click.option("--precision", "products", type=click.Choice(["float32", "bfloat16"]), default="float32",
                 show_default=True, help="Data type of the matrix products."),
    click.option("--alpha", type=NUMBER, help="Alpha used for training.  [default: that of the unfitted index]"),
    click.option("--beta", type=NUMBER, help="Beta used for training.  [default: that of the unfitted index]"),
    click.option("--seed", type=SEED, default=1, show_default=True, help="Seed for drawing batches and views."),
)  # fmt: skip


@command("finetune")
@options.FOLDER_ARGUMENT
@click.option("--out", type=FOLDER, required=True, help="Folder to which the trained index is written.")
@click.option("--train", multiple=True, type=click.Choice(["keys", "values"]), default=["keys"],
              show_default=True, help="Part of the index to train. Can be repeated.")  # fmt: skip
@click.option("--source", type=SOURCE,
              help="Images of the shots, or a feature table of their views, with one id per shot.  "
                   "[default: the source that the index was built from]")  # fmt: skip
@click.option("--val", type=SOURCE, help="Labelled validation source on which the epoch and the settings are selected. "
                                         "The val part of a split .json is used.")  # fmt: skip
@click.option("--val-shots", type=K("shots"),
              help="Number of validation images to use per class, or all.  [default: min(shots, 4)]")  # fmt: skip
@_TRAINING
@click.option("--keep-last", is_flag=True,
              help="Write the trained index even if it is less accurate than the original index.")  # fmt: skip
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
    keep_last: bool,
    as_json: bool,
    reading: ReadingOptions,
    encoding: EncodingOptions,
) -> None:
    """Fine-tune an index on its shots (Tip-Adapter-F).

    Trains the keys, or the parts given by --train, with AdamW on augmented views of the shots. The accuracy before and
    after training is measured on held-out shots or on --val, and the better index is written to --out. If you give
    --val, it is also used to select the epoch, and then alpha and beta.
    """
    from retrieval_tip.fit.finetune import finetune_into, own_shots, shots_of

    recipe = training.recipe()
    cache = checked(folder, encoding.device)
    shots = shots_of(cache) if source is None else own_shots(cache, source_of(source, reading, "train"))
    unseen = None if val is None else validation(cache, val, reading.root, val_shots)
    sources = [shots] if unseen is None else [shots, unseen]
    with encoder_for(ctx, cache, sources, encoding) as encoder:
        tuned = finetune_into(out, cache, shots, encoder, recipe, val=unseen, parent=show(folder), keep_last=keep_last)
    warn(tuned.choice.warnings if tuned.choice else ())
    if as_json:
        click.echo(json.dumps(tuned.facts()))
    else:
        print_facts(tuned.facts(), 12)
    finish(ctx, encoder.skipped)


@command("calibrate")
@options.FOLDER_ARGUMENT
@click.option("--val", "source", type=SOURCE, required=True,
              help="Labelled validation source. Do not use shots or test images. The val part of a split .json is "
                   "used.")  # fmt: skip
@options.ROOT
@options.BACKBONE
@options.ENCODING
@click.pass_context
def calibrate_command(
    ctx: click.Context, folder: Path, source: Path | str, root: Path | str | None, encoding: EncodingOptions
) -> None:
    """Fit the temperature of the probabilities.

    The temperature is fitted on validation images and saved in a new version of the index. The predicted classes stay
    the same, and their probabilities become softmax(logits / temperature). Calibrate the index again whenever its keys,
    alpha, beta, k or tail change.
    """
    from retrieval_tip.evaluation.calibration import calibrate

    cache = checked(folder, encoding.device)
    val = source_of(source, ReadingOptions(root=root), "val")
    with encoder_for(ctx, cache, [val], encoding) as encoder:
        result = calibrate(cache, val, encoder)
    print_facts(vars(result) | {"version": cache.version}, 15)
    finish(ctx, encoder.skipped)
