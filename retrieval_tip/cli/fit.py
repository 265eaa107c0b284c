"""Commands that fit and train an index: ``fit``, ``search-hp`` and ``finetune``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import command, grouped
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import finish, print_result, say_fit, warn
from retrieval_tip.cli.opening import reader_for, source_of, store_of
from retrieval_tip.cli.options import SourceOptions
from retrieval_tip.errors import UsageError
from retrieval_tip.hooks import flag, option
from retrieval_tip.settings import TRAINED, Recipe


@command()
def fit_command(
    folder: Place = options.INDEX_ARGUMENT,
    val: Place | None = option(kinds.SOURCE),
    only_calibrate: bool = flag("--calibrate"),
    form: dict[str, Any] = options.building("metric", "values", "class_prior", "prior"),
    encoding: SourceOptions = options.ROOTED,
) -> None:
    """Fit an index to its shots again, in closed form.

    Fits the metric, the values and the settings in the same way as index build. This is useful after you have added
    shots. With --val, the fit is scored on validation images instead of held-out shots, and the val part of a split
    .json is used. The result is saved as a new version of the index.

    Options:
        val: Labelled validation source, used instead of held-out shots to score the fit.
        only_calibrate: Only fit the temperature of the probabilities, on --val. The predicted classes stay the same,
            and the probabilities become softmax(logits / temperature). Do this for a fine-tuned index. Do it again
            whenever its keys, alpha, beta, k or tail change.

    Examples:
        fit indexes/things
        fit indexes/things --calibrate --val validation
    """
    from retrieval_tip.index.changes import fit_index

    if only_calibrate:
        _calibrate(folder, val, form, encoding)
        return
    source = None if val is None else source_of(val, encoding, "val")
    sources = [] if source is None else [source]
    with reader_for(store_of(folder).manifest(), sources, encoding) as reader:
        choice = fit_index(folder, **form, validation=source, reader=reader).fit
    assert choice is not None
    warn(choice.warnings)
    say_fit(choice.provenance())
    finish(reader.skipped)


def _calibrate(
    folder: Place, val: Place | None, form: dict[str, Any], encoding: SourceOptions
) -> None:
    from retrieval_tip.evaluation.calibration import calibrate

    if val is None or any(form.values()):
        raise UsageError(
            "--calibrate: needs --val SOURCE, and only fits the temperature; leave out other options"
        )
    index = store_of(kinds.FOLDER.convert(folder, None, None)).load(device=encoding.device)
    source = source_of(val, encoding, "val")
    with reader_for(index, [source], encoding) as reader:
        index, result = calibrate(index, source, reader)
    print_result(vars(result) | {"version": index.version})
    finish(reader.skipped)


@command("search-hp")
def search_command(
    folder: Path = options.FOLDER_ARGUMENT,
    val: Place | None = option(kinds.SOURCE),
    dry_run: bool = flag(),
    as_json: bool = options.JSON,
    encoding: SourceOptions = options.ROOTED,
) -> None:
    """Search for the best alpha and beta, as in Tip-Adapter.

    The settings are selected on the shots, each classified without itself, or on --val, and never on test images. The
    search uses all keys, and it is exact in alpha. The result is saved as a new version of the index.

    Options:
        val: Labelled validation source, used instead of the shots. The val part of a split .json is used.
        dry_run: Print the selected settings, but do not change the index.

    Examples:
        search-hp indexes/things
        search-hp indexes/things --val validation --dry-run
    """
    from retrieval_tip.fit import search_hp
    from retrieval_tip.fit.visible import Queries

    index = store_of(folder).load(device=encoding.device)
    source = None if val is None else source_of(val, encoding, "val")
    sources = [] if source is None else [source]
    with reader_for(index, sources, encoding) as reader:
        queries = (
            Queries.leave_one_out(index)
            if source is None
            else search_hp.on_validation(index, source, reader)
        )
    choice = search_hp.search(index, queries)
    warn(choice.warnings)
    if not dry_run:
        index = search_hp.apply(index, choice).save(folder, "search-hp")
    facts = {name: value for name, value in vars(choice).items() if name != "warnings"}
    facts |= {"version": index.version, "interval": list(choice.interval)}
    if as_json:  # JSON has no infinity
        facts["interval"] = [None if value == float("inf") else value for value in choice.interval]
        facts["warnings"] = choice.warnings
    print_result(facts, as_json)
    finish(reader.skipped)


_RECIPE = {
    "train": option(
        click.Choice(TRAINED),
        multiple=True,
        default=("keys",),
        callback=lambda *values: tuple(dict.fromkeys(values[-1])),
    ),
    "epochs": option(kinds.count("epochs"), default=Recipe.epochs),
    "lr": option(kinds.POSITIVE, default=Recipe.lr),
    "seed": option(kinds.SEED, default=Recipe.seed),
}


@command()
def finetune_command(
    folder: Path = options.FOLDER_ARGUMENT,
    out: Path = option(kinds.FOLDER, "--out", "-o", required=True),
    source: Place | None = option(kinds.SOURCE),
    val: Place | None = option(kinds.SOURCE),
    recipe: Recipe = grouped(Recipe, _RECIPE),
    as_json: bool = options.JSON,
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """Fine-tune an index on its shots (Tip-Adapter-F).

    Trains the keys, or the parts given by --train, with AdamW on augmented views of the shots. The accuracy before and
    after training is measured on held-out shots or on --val, and the better index is written to --out. If you give
    --val, it is also used to select the epoch, and then alpha and beta.

    Options:
        out: Folder for the trained index.
        source: Images of the shots, or a feature table of their views, with one id per shot. [default: the source that
            the index was built from]
        val: Labelled validation source on which the epoch and the settings are selected. The val part of a split .json
            is used.

    Examples:
        finetune indexes/things --out indexes/things-f
        finetune indexes/things --val validation --train keys --train values --out indexes/things-f
    """
    from retrieval_tip.fit.finetune import finetune_into, shots_of

    index = store_of(folder).load(device=encoding.device)
    items = None if source is None else source_of(source, encoding, "train")
    shots = shots_of(index, items)
    unseen = None if val is None else source_of(val, replace(encoding, split=None), "val")
    sources = [shots] if unseen is None else [shots, unseen]
    with reader_for(index, sources, encoding) as reader:
        tuned = finetune_into(out, index, shots, reader, recipe, val=unseen)
    warn(tuned.choice.warnings if tuned.choice else ())
    print_result(tuned.facts(), as_json)
    finish(reader.skipped)
