"""The command line: each command parses, makes one library call, and prints."""

from __future__ import annotations

import atexit
import functools
import gc
import json
import logging
import os
import sys
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip import __version__
from retrieval_tip.errors import RetrievalTipError, Skipped, UsageError, one_line

if TYPE_CHECKING:
    from retrieval_tip.backbone import Backbone
    from retrieval_tip.cache_model import CacheModel, Prediction
    from retrieval_tip.features import Encoder
    from retrieval_tip.sources import Source

FAILED, WRONG_USAGE, SOME_SKIPPED = 1, 2, 3

FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)

Command = Callable[..., Any]


class _K(click.ParamType[int]):
    """A number of keys, or ``all``: 0 stands for all, since click takes None as not given."""

    name = "N|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "all" or (isinstance(value, int) and value >= 0):
            return 0 if value == "all" else int(value)
        try:
            number = int(value)
        except ValueError:
            number = 0
        if number < 1:
            self.fail(f"{value!r} is neither a number of keys, 1 or more, nor 'all'", param, ctx)
        return number


class _Group(click.Group):
    """Turns the package's errors into one line on standard error and the exit status that belongs to them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(one_line(str(error)), ctx) from error
        except RetrievalTipError as error:
            raise click.ClickException(one_line(str(error))) from error
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except MemoryError:
            raise click.ClickException("out of memory; a smaller --batch-size or source may help") from None
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            raise click.ClickException(one_line(f"{name}{error.strerror or error}")) from error


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def _recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Options from a TOML file: defaults that the command line overrides."""
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise click.BadParameter(f"{path}: {error}", ctx) from None
        known = {parameter.name: parameter for parameter in ctx.command.params}
        for name, value in values.items():
            if name not in known:
                raise click.BadParameter(f"{path}: unknown setting {name!r}", ctx)
            if isinstance(value, list | dict) and not getattr(known[name], "multiple", False):
                raise click.BadParameter(f"{path}: {name} takes one value, not {value!r}", ctx)
        ctx.default_map = values
    return path


_MODEL = _options(
    click.option("--model", help="open_clip architecture, local-dir:PATH or hf-hub:ORG/REPO.  [default: RN50, openai]"),
    click.option("--pretrained", help="Tag, checkpoint file, or TAG=FILE for a local copy of a tag's weights."),
)
_BACKBONE = _options(
    _MODEL,
    click.option("--precision", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
                 show_default=True, help="Arithmetic of the backbone (auto: float32, on a GPU float16 autocast) and of "
                                         "the products with all keys (auto: the fastest that is accurate, measured)."),
)  # fmt: skip
_DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_READING = _options(
    click.option("--dataset", metavar="NAME",
                 help="SOURCE is the folder that holds this dataset's folder (names: datasets list)."),
    click.option("--split", help="Part of a split .json or dataset: train, val or test."),
    click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to."),
)  # fmt: skip
_ENCODING = _options(
    click.option("--norms", type=click.Choice(["check", "unit", "keep"]), default="check", show_default=True,
                 help="Rows of feature tables: must have norm 1, are scaled to it, or are kept as they are."),
    click.option("--batch-size", type=click.IntRange(1),
                 help="Images encoded at a time.  [default: the backbone's best, 4 on a CPU, 64 on a GPU]"),
    click.option("--workers", type=click.IntRange(1), default=min(16, os.cpu_count() or 1), show_default="cores",
                 help="Threads that read and decode images."),
    click.option("--cache", type=FOLDER,
                 help="Folder of the encoding cache.  [default: $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip]"),
    click.option("--no-cache", is_flag=True, help="Encode without a cache."),
    click.option("--reduce/--no-reduce", default=True, show_default=True,
                 help="Decode large JPEGs at a reduced size for the centre view: faster, nearly the same features."),
    click.option("--strict", is_flag=True, help="Fail on the first image that cannot be read instead of skipping it."),
    _DEVICE,
)  # fmt: skip
_VIEWS = _options(
    click.option("--views", type=click.IntRange(1), default=1, show_default=True,
                 help="1: the centre view; V > 1: mean of V augmented views, as in the paper."),
    click.option("--seed", type=int, default=1, show_default=True, help="Draws shots and views."),
)  # fmt: skip
_ANSWER = _options(
    click.option("-k", "k", type=_K(), help="Nearest keys that a query uses.  [default: the index's]"),
    click.option("--tail/--no-tail", default=None, help="Estimate the keys that were not retrieved.  [default: tail]"),
    click.option("--alpha", type=float, help="Weight of the cache beside the text.  [default: the index's]"),
    click.option("--beta", type=float, help="Sharpness of the affinity.  [default: the index's]"),
)
_ABSTAIN = click.option("--abstain", type=click.FloatRange(0, 1), metavar="P",
                        help="Withhold answers of a probability below P.")  # fmt: skip
_SCALES = click.option("--scales", type=(float, float), default=(7.0, 3.0), show_default=True,
                       help="Largest beta and alpha of the published grid.")  # fmt: skip
_FORMAT = _options(
    click.option("--format", "style", type=click.Choice(["table", "json", "csv", "parquet"]), default="table",
                 show_default=True, help="json: one object a line."),
    click.option("--output", type=FILE, help="File to write instead of standard output."),
)  # fmt: skip


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, package_name="retrieval-tip")
@click.option("-q", "--quiet", is_flag=True, help="No warnings and no progress bar.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Few-shot image classification as retrieval (Tip-Adapter on a FAISS index).

    Exit status: 0 done; 1 failed, nothing was changed; 2 wrong usage; 3 done, but some inputs could not be read.
    """
    handler = logging.StreamHandler(_Stderr())
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    logger = logging.getLogger("retrieval_tip")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.WARNING)
    logging.addLevelName(logging.WARNING, "warning")
    start_lightly()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about an image is said by us, with its name
    ctx.obj = quiet


@functools.cache  # once a process
def start_lightly() -> None:
    """Before torch is imported: what makes a command of one image slow, and no other one faster."""
    gc.set_threshold(50_000)  # imports make a million objects that stay: walking them again and again took a third
    atexit.register(_leave_lightly)
    # A thread of OpenMP that waits for another one sleeps: where other programs, or a container's limit, leave it fewer
    # cores than it counts, waiting busily took 3 s for an image of 0.05 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _leave_lightly() -> None:
    """Do not walk them once more at the end, a second, unless triton is there: it reports what is not taken down."""
    if "triton" not in sys.modules:
        gc.freeze()


class _OneLine(logging.Formatter):
    """A name in a message cannot start another line."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class _Stderr:
    """Standard error as it is when something is said, not when the program started."""

    def write(self, text: str) -> None:
        click.echo(text, err=True, nl=False)

    def flush(self) -> None:
        sys.stderr.flush()


@main.group()
def index() -> None:
    """Build, describe, check and query index folders."""


@index.command("build")
@click.argument("source", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Index folder; an index that is there gets a new version.")
@click.option("--recipe", type=FILE, is_eager=True, expose_value=False, callback=_recipe,
              help="TOML file with any of these settings; the command line goes before it.")  # fmt: skip
@_BACKBONE
@click.option("--text", type=FILE, help="Feature table of text features, labelled by class, instead of prompts.")
@click.option("--template", "template", multiple=True, help="Prompt with {} for the class; repeat for an ensemble.")
@click.option("--shots", type=click.IntRange(1), help="Draw so many a class, as published.  [default: all]")
@_VIEWS
@click.option("--index", "factory", default="Flat", show_default=True,
              help="FAISS factory string; Classes: likely classes are met whole; auto: by the numbers.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
              help="Type of the stored keys.")  # fmt: skip
@click.option("--alpha", type=float, help="Weight of the cache beside the text.  [default: from the shots]")
@click.option("--beta", type=float, help="Sharpness of the affinity.  [default: from the shots]")
@click.option("--normalize", type=click.Choice(["both", "shots", "affinity", "none"]),
              help="Units of alpha and beta; none: the paper's formula and its 1 and 5.5.  "
                   "[default: both; none where alpha or beta is given]")  # fmt: skip
@click.option(
    "-k", "k", type=_K(), help="Nearest keys that a query uses.  [default: all; with --index auto its choice]"
)
@click.option("--logit-scale", type=float, help="Factor of the text logits.  [default: the backbone's, else 100]")
@_READING
@_ENCODING
@click.pass_context
def build(ctx: click.Context, /, source: Path, out: Path, **given: Any) -> None:
    """Build an index folder from labelled images or features.

    SOURCE is a folder of class folders, a .csv, .tsv or .parquet with path and label, a feature table (.parquet with
    id, label and feature), or a split .json (its train part). With --dataset, it is the folder that holds the datasets,
    and the prompts are the dataset's own.
    """
    from retrieval_tip.build import build_index
    from retrieval_tip.datasets import facts
    from retrieval_tip.sources import show

    shots = _source(source, given, "train")
    templates = given["template"] or (facts(shots.dataset).templates if shots.dataset and not given["text"] else ())
    backbone = _backbone_of(shots, given, needed=given["text"] is None)
    with _encoder(ctx, backbone, given) as encoder:
        cache = build_index(
            shots,
            out,
            encoder,
            shots=given["shots"],
            templates=templates,
            text=given["text"],
            index=given["factory"],
            dtype=given["dtype"],
            alpha=given["alpha"],
            beta=given["beta"],
            normalize=given["normalize"],
            k="auto" if given["k"] is None else given["k"] or None,
            logit_scale=given["logit_scale"],
            device="cpu",
        )
    click.echo(
        f"{one_line(show(out))}: version {cache.version}, {cache.n} keys of {cache.d}, {len(cache.class_names)} classes"
    )
    _finish(ctx, encoder.skipped)


@index.command("info")
@click.argument("folder", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def info(folder: Path, as_json: bool) -> None:
    """Describe an index: version, backbone, classes, settings and where they come from."""
    from retrieval_tip.store import describe

    facts = describe(folder)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name.ljust(width)}  {_shown(value)}")


@index.command("verify")
@click.argument("folder", type=FOLDER)
def verify(folder: Path) -> None:
    """Check every byte of an index, and that its parts fit together."""
    from retrieval_tip.cache_model import verify as check

    cache = check(folder)
    click.echo(f"{folder}: version {cache.version} is whole ({cache.n} keys, {len(cache.class_names)} classes)")


@index.command("query")
@click.argument("folder", type=FOLDER)
@click.argument("sql")
@_FORMAT
def query(folder: Path, sql: str, style: str, output: Path | None) -> None:
    """Ask the label store: one SELECT, read-only, without access to other files.

    The table labels has key_id, class_id, label, source, shot, views, digest, added_at and the further columns of the
    table that the index was built from; the view class_counts has class_id, label and keys. A fine-tuned index has its
    loss curve as table curve.
    """
    from retrieval_tip.output import write_rows
    from retrieval_tip.store import query as ask

    table = ask(folder, sql)
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    write_rows(rows, table.column_names, style, output, table.schema)


@index.command("tune")
@click.argument("folder", type=FOLDER)
@click.option("--val", "source", type=FOLDER, required=True,
              help="Images or features to tune on, not the shots; of a split .json its val part.")  # fmt: skip
@click.option("--agreement", type=click.FloatRange(0, 1, min_open=True), default=0.999, show_default=True,
              help="Share of the answers that have to be those over all keys.")  # fmt: skip
@click.option("--index", "factories", multiple=True,
              help="FAISS factory to try, repeat for more.  [default: Classes and an inverted file]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Print, change nothing.")
@click.option("--plot", type=FILE, help="PNG file for cost and agreement (needs matplotlib).")
@click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to.")
@_FORMAT
@_BACKBONE
@_ENCODING
@click.pass_context
def tune_command(ctx: click.Context, /, folder: Path, source: Path, **given: Any) -> None:
    """Find the cheapest index and k whose answers are those over all keys, and write a new version with them.

    Prints the settings that no cheaper one equals, and what a query costs with each here, in one batch. Labels are not
    needed. The answers over all keys stay what they are: -k all gives them.
    """
    import pyarrow as pa

    from retrieval_tip import plots
    from retrieval_tip.output import write_rows
    from retrieval_tip.sources import open_items
    from retrieval_tip.tuning import tune

    if given["plot"]:
        plots.needs_matplotlib()
    cache = _checked(folder, given["device"], given["precision"])
    val = open_items(source, split="val", root=given["root"])
    with _encoder(ctx, _backbone_for(cache, [val], given), given) as encoder:
        found = tune(cache, encoder.encode(val).features, agreement=given["agreement"], factories=given["factories"])
    if given["plot"]:
        plots.draw_frontier(found, given["plot"])
    types = {"index": pa.string(), "effort": pa.int64(), "k": pa.string(), "agreement": pa.float64()}
    types |= {"microseconds": pa.float64(), "chosen": pa.bool_()}
    rows = [vars(t) | {"k": str(t.k or "all"), "chosen": t is found.chosen} for t in found.trials if t.best]
    rows = [{name: row[name] for name in types} for row in rows]
    write_rows(rows, list(types), given["style"], given["output"], pa.schema(list(types.items())))
    if not given["dry_run"]:
        cache.index, cache.k, cache.tail = found.index, found.chosen.k, True
        where = f"tuned on {val.name}, n={found.n}, agreement {found.chosen.agreement:.4g}"
        cache.provenance = cache.provenance | {"index": where, "k": where}
        cache.save_settings(folder, index=True)
        click.echo(f"{folder}: version {cache.version}, {cache.index.factory}, k {cache.k or 'all'}", err=True)
    _finish(ctx, encoder.skipped)


@main.command()
@click.argument("source", type=FOLDER)
@click.option("--out", type=FILE, required=True, help="Feature table to write (.parquet).")
@_BACKBONE
@_VIEWS
@_READING
@_ENCODING
@click.pass_context
def encode(ctx: click.Context, /, source: Path, out: Path, **given: Any) -> None:
    """Encode images once into a feature table, which serves wherever images do.

    SOURCE as for index build, or a folder of images without labels.
    """
    from retrieval_tip.features import encode_table
    from retrieval_tip.sources import show

    items = _source(source, given, "train", labelled=False)
    with _encoder(ctx, _backbone_of(items, given), given) as encoder:
        rows = encode_table(items, out, encoder)
    click.echo(f"{one_line(show(out))}: {rows} rows")
    _finish(ctx, encoder.skipped)


@main.command()
@click.argument("folder", type=FOLDER)
@click.argument("inputs", nargs=-1, required=True)
@_ANSWER
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes to report.")
@click.option("--explain", is_flag=True, help="The nearest keys, and what text and cache gave to the winner.")
@click.option("--neighbours", type=click.IntRange(1), default=5, show_default=True, help="Keys shown by --explain.")
@click.option("--logits", "with_logits", is_flag=True, help="Logits of every class, in the index's order.")
@click.option("--certify", is_flag=True,
              help="More keys where k do not settle an answer, at last all; says how many took what.")  # fmt: skip
@_ABSTAIN
@_FORMAT
@_BACKBONE
@_ENCODING
@click.pass_context
def classify(ctx: click.Context, /, folder: Path, inputs: tuple[str, ...], **given: Any) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths, feature tables, or - for paths on standard input. With
    --abstain, an answer of a lower probability has no label (null, in a table -) and keeps its probability.
    """
    from retrieval_tip.output import write_rows
    from retrieval_tip.sources import open_inputs

    cache, k, tail = _index(folder, given)
    sources = list(open_inputs(inputs, _paths_on_stdin()))
    backbone = _backbone_for(cache, sources, given)
    columns = ["input", "label", "probability"]
    columns += ["labels", "probabilities"] if given["top"] > 1 else []
    if given["with_logits"]:
        columns += ["logits"]
        cache.text_index = None  # no shortlist: every class
    columns += ["text_logit", "cache_logit", "neighbours"] if given["explain"] else []
    columns += ["keys"] if given["certify"] else []
    settled: Counter[int | None] = Counter()
    with _encoder(ctx, backbone, given) as encoder:

        def rows() -> Iterator[dict[str, Any]]:
            for source in sources:
                near = given["neighbours"] if given["explain"] else 0
                for name, found in cache.classify_source(
                    source, encoder, given["top"], k, tail, near, given["certify"]
                ):
                    settled[found.keys] += 1
                    yield _row(name, found, columns, given["abstain"])

        write_rows(rows(), columns, given["style"], given["output"], _classify_schema(columns))
    if given["certify"]:
        how = "proved" if cache.index.exact_search else "agreed with"
        by = (f"{number} by {'all' if keys == cache.n else keys} keys" for keys, number in sorted(settled.items()))
        click.echo(f"{how} the answer of all keys: {', '.join(by)}", err=True)
    _finish(ctx, encoder.skipped)


@main.command("evaluate")
@click.argument("folder", type=FOLDER)
@click.argument("source", type=FOLDER)
@_ANSWER
@_ABSTAIN
@click.option("--plot", type=FOLDER, help="Folder for diagrams (PNG): confusions, classes, calibration, affinities.")
@click.option(
    "--shots",
    type=click.IntRange(1),
    multiple=True,
    help="Draw so many a class from the index's keys, again for each seed and method; repeat for more.",
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="With --shots: seeds 1 to N.")
@click.option("--method", "methods", multiple=True,
              help="With --shots: a method, repeat for more.  [default: all but tip-adapter-f]")  # fmt: skip
@click.option("--val", type=FOLDER, help="With --shots: choose settings on this.  [default: leave-one-out]")
@click.option(
    "--protocol",
    type=click.Choice(["honest", "paper"]),
    default="honest",
    show_default=True,
    help="With --shots: how settings are chosen.",
)
@_SCALES
@click.option("--results", type=FILE, help="With --shots: Parquet file, one row a run; what is in it is not run again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --shots one a run.")
@_BACKBONE
@_READING
@_ENCODING
@click.pass_context
def evaluate_command(ctx: click.Context, /, folder: Path, source: Path, as_json: bool, **given: Any) -> None:
    """Accuracy of an index on a labelled source (a split .json: its test part): blend, zero-shot and cache alone.

    ece is the expected calibration error of the probabilities in 15 bins. With --abstain, coverage is the fraction of
    the items that are answered and selective_top1 the accuracy of these.

    With --shots, the index is a pool of labelled keys: every run draws its shots from it by the published rule, chooses
    its settings without the test source, and becomes a row of --results.
    """
    if given["shots"]:
        _sweep(ctx, folder, source, as_json, given)
        return
    from retrieval_tip import plots
    from retrieval_tip.evaluate import evaluate
    from retrieval_tip.sources import show

    if given["plot"]:
        plots.check(given["plot"])
    cache, k, tail = _index(folder, given)
    test = _source(source, given, "test")
    with _encoder(ctx, _backbone_for(cache, [test], given), given) as encoder:
        found = evaluate(
            cache, test, encoder, k=k, tail=tail, abstain=given["abstain"], affinities=given["plot"] is not None
        )
    if given["plot"]:
        files = plots.write_plots(found, given["plot"])
        click.echo(f"{one_line(show(given['plot']))}: {', '.join(file.name for file in files)}", err=True)
    result = found.to_dict()
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        per_class, confusions = result.pop("per_class"), result.pop("confusions")
        for name, value in result.items():
            click.echo(f"{name:<15}  {_shown(value)}")
        worst = sorted(per_class.items(), key=lambda pair: pair[1])[:5]
        click.echo(f"{'worst classes':<15}  {', '.join(f'{name} {_shown(value)}' for name, value in worst)}")
        click.echo(f"{'confusions':<15}  {', '.join(f'{a} as {b} ({times})' for a, b, times in confusions) or 'none'}")
    _finish(ctx, encoder.skipped)


def _sweep(ctx: click.Context, folder: Path, source: Path, as_json: bool, given: dict[str, Any]) -> None:
    """Shots x seeds x methods."""
    from retrieval_tip import sweep
    from retrieval_tip.finetune import shots_of
    from retrieval_tip.output import table_lines
    from retrieval_tip.store import read_manifest

    if given["results"] is None:
        raise UsageError("--shots needs --results FILE, where every run becomes a row")
    if given["val"] is None and given["protocol"] == "paper":
        raise UsageError("--protocol paper chooses on a validation source; give --val")
    pool = _checked(folder, given["device"])
    sources = [_source(source, given, "test")]
    if given["val"] is not None:
        sources.append(_source(given["val"], given | {"split": None}, "val"))
    methods = given["methods"] or sweep.PLAIN
    images = [shots_of(pool)] if "tip-adapter-f" in methods else []
    rows = []
    with _encoder(ctx, _backbone_for(pool, [*sources, *images], given), given) as encoder:
        test, *rest = [sweep.encode(pool, items, encoder) for items in sources]
        for row in sweep.sweep(
            pool,
            read_manifest(folder).keys_digest,
            test,
            given["results"],
            shots=given["shots"],
            seeds=range(1, given["seeds"] + 1),
            methods=methods,
            val=rest[0] if rest else None,
            protocol=given["protocol"],
            scales=given["scales"],
            views=(images[0], encoder) if images else None,
        ):
            rows.append(row)
            if as_json:
                click.echo(json.dumps(row))
    if not as_json:
        for line in table_lines(sweep.summary(rows), ["method", "shots", "seeds", "top1", "half"]):
            click.echo(line)
    _finish(ctx, encoder.skipped)


@main.command("search-hp")
@click.argument("folder", type=FOLDER)
@click.option("--val", "source", type=FOLDER, help="Labelled validation source; of a split .json its val part.")
@click.option(
    "--leave-one-out", is_flag=True, help="Score each shot with its own image's keys hidden; needs no images."
)
@click.option("--folds", type=click.IntRange(2), help="Score each shot with its fold's keys hidden.")
@click.option(
    "--val-shots", type=_K(), help="Validation images a class, or all.  [default: min(shots, 4), as published]"
)
@click.option("--protocol", type=click.Choice(["honest", "paper"]), default="honest", show_default=True,
              help="paper: the published grid over the whole validation source.")  # fmt: skip
@_SCALES
@click.option("--surface", type=FILE, help="Parquet file for the accuracy by k, beta and alpha.")
@click.option("--plot", type=FILE, help="PNG file for the same as a heat map (needs matplotlib).")
@click.option(
    "--greedy",
    is_flag=True,
    help="Take the best found even where so few images cannot tell it from the untouched settings.",
)
@click.option("--dry-run", is_flag=True, help="Report only; the index keeps its settings.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to.")
@_BACKBONE
@_ENCODING
@click.pass_context
def search_command(ctx: click.Context, /, folder: Path, source: Path | None, **given: Any) -> None:
    """Choose alpha, beta and k on validation images or on the shots themselves, and write them into the index.

    Never on test: a split .json gives its val part. The choice is exact in alpha, and makes a new version of the index.
    """
    from retrieval_tip import search_hp

    if sum((source is not None, given["leave_one_out"], given["folds"] is not None)) != 1:
        raise UsageError("give one of --val SOURCE, --leave-one-out and --folds N: settings are chosen on one of them")
    cache = _checked(folder, given["device"])
    skipped: list[Skipped] = []
    if source is None:
        queries = search_hp.leave_one_out(cache) if given["folds"] is None else search_hp.folds(cache, given["folds"])
    else:
        val = _validation(cache, source, given, every=given["protocol"] == "paper")
        with _encoder(ctx, _backbone_for(cache, [val], given), given) as encoder:
            queries = search_hp.on_validation(cache, val, encoder)
        skipped = encoder.skipped
    paper = given["protocol"] == "paper"
    choice = (
        search_hp.search_paper(cache, queries, given["scales"])
        if paper
        else search_hp.search(cache, queries, cautious=not given["greedy"])
    )
    _warn(choice.warnings)
    if given["surface"]:
        search_hp.write_surface(choice, given["surface"])
    if given["plot"]:
        from retrieval_tip.plots import draw_surface

        draw_surface(choice.surface, given["plot"])
    if not given["dry_run"]:
        search_hp.apply(cache, choice)
        cache.save_settings(folder)
    facts = {name: value for name, value in vars(choice).items() if name not in ("surface", "warnings")}
    facts |= {"k": (choice.k if given["dry_run"] else cache.k) or "all", "version": cache.version}
    if given["as_json"]:
        facts["interval"] = [None if value == float("inf") else value for value in choice.interval]
        click.echo(json.dumps(facts | {"warnings": choice.warnings}))
    else:
        for name, value in (facts | {"interval": list(choice.interval)}).items():
            click.echo(f"{name:<12}  {_shown(value)}")
    _finish(ctx, skipped)


@main.command("finetune")
@click.argument("folder", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Index folder for the result.")
@click.option("--train", multiple=True, type=click.Choice(["keys", "values", "visual", "text"]), default=["keys"],
              show_default=True, help="What is trained; repeat for more.")  # fmt: skip
@click.option("--source", type=FOLDER,
              help="The shots, as images or as a table whose rows are views (rows of one id: of one shot).  "
                   "[default: where the index was built from]")  # fmt: skip
@click.option("--val", type=FOLDER, help="Labelled validation source, which chooses epoch and settings; of a "
                                         "split .json its val part.")  # fmt: skip
@click.option("--val-shots", type=_K(), help="Validation images a class, or all.  [default: min(shots, 4)]")
@click.option("--epochs", type=click.IntRange(1), default=20, show_default=True, help="Passes over the shots.")
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True, help="Queries a step.")
@click.option("--lr", type=float, default=1e-3, show_default=True,
              help="Learning rate, falling along a cosine; of encoders a thousandth.")  # fmt: skip
@click.option("--eps", type=float, default=1e-4, show_default=True, help="AdamW's.")
@click.option("--weight-decay", type=float, default=0.01, show_default=True, help="AdamW's.")
@click.option("--views-cache", type=click.IntRange(1), metavar="M",
              help="Encode M augmented views of each shot once, and draw from them.  "
                   "[default: 16; with an encoder in training, fresh ones]")  # fmt: skip
@click.option("--views", type=click.Choice(["fresh"]), help="fresh: encode another view of each shot every epoch.")
@click.option("--train-k", type=click.IntRange(1), metavar="N",
              help="Train only the N nearest keys of each query: for caches too large for dense steps.")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Of the matrix products; auto: bfloat16 where it is measured to be worth it.")  # fmt: skip
@click.option("--settings", type=click.Choice(["tried", "own"]), default="tried", show_default=True,
              help="Alpha and beta to train with; tried: with --val, the best of a few; own: the index's.")  # fmt: skip
@click.option("--alpha", type=float, help="Train with this alpha instead.  [implies --settings own]")
@click.option("--beta", type=float, help="Train with this beta instead.  [implies --settings own]")
@click.option("--seed", type=int, default=1, show_default=True, help="Draws batches and views.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run (its state is OUT.checkpoint).")
@click.option("--plot", type=FILE, help="PNG file for loss and accuracy by epoch (needs matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_MODEL
@_READING
@_ENCODING
@click.pass_context
def finetune_command(ctx: click.Context, /, folder: Path, out: Path, source: Path | None, **given: Any) -> None:
    """Fine-tune an index on its shots (Tip-Adapter-F) into another index folder.

    Trained are its keys, or what --train says, by AdamW on augmented views of the shots. With --val the epoch is chosen
    on it, and alpha, beta and k are searched again. What was interrupted goes on with --resume, to the same result.
    """
    from retrieval_tip import plots
    from retrieval_tip.finetune import finetune, own_shots, shots_of
    from retrieval_tip.sources import show
    from retrieval_tip.trainer import VIEWS, Recipe

    if given["views"] and given["views_cache"]:
        raise UsageError("--views fresh and --views-cache: give one of them")
    if given["plot"]:
        plots.needs_matplotlib()
    encoders = {"visual", "text"} & set(given["train"])
    fresh = given["views"] or (encoders and not given["views_cache"])
    names = ("epochs", "batch", "lr", "eps", "weight_decay", "train_k", "precision", "seed")
    own = given["settings"] == "own" or given["alpha"] is not None or given["beta"] is not None
    recipe = Recipe(
        train=tuple(dict.fromkeys(given["train"])),
        views=None if fresh else given["views_cache"] or VIEWS,
        settings="own" if own else "tried",
        **{name: given[name] for name in names},
    )
    cache = _opened(folder, given | {"precision": "float32"})
    shots = shots_of(cache) if source is None else own_shots(cache, _source(source, given, "train"))
    sources = [shots]
    if given["val"] is not None:
        sources.append(_validation(cache, given["val"], given))
    checkpoint = Path(f"{out}.checkpoint")
    out.parent.mkdir(parents=True, exist_ok=True)
    backbone = _backbone_for(cache, sources, given | {"precision": "auto"})
    settings = {name: given[name] for name in given if name not in ("views", "seed")}
    with _encoder(ctx, backbone, settings) as encoder, _to_be_resumed(checkpoint):
        tuned = finetune(
            cache,
            shots,
            encoder,
            recipe,
            val=sources[1] if len(sources) > 1 else None,
            parent=show(folder),
            checkpoint=checkpoint,
            resume=given["resume"],
        )
    tuned.save(out)
    checkpoint.unlink(missing_ok=True)
    if given["plot"]:
        plots.draw_curve(tuned.curve, tuned.epoch, given["plot"])
    _warn(tuned.choice.warnings if tuned.choice else ())
    last = tuned.curve.to_pylist()[tuned.epoch]
    facts: dict[str, Any] = {"version": tuned.cache.version, "trained": list(recipe.train), "epoch": tuned.epoch}
    facts |= {name: None if last[name] != last[name] else last[name] for name in ("loss", "accuracy")}
    facts |= {"val_accuracy": tuned.choice.accuracy if tuned.choice else None}
    facts |= {"alpha": tuned.cache.alpha, "beta": tuned.cache.beta, "k": tuned.cache.k or "all"}
    facts |= {"collapsed": tuned.collapsed, "seconds": tuned.cache.provenance["finetune"]["seconds"]}
    if given["as_json"]:
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:<12}  {_shown(value)}")
    _finish(ctx, encoder.skipped)


@main.command("calibrate")
@click.argument("folder", type=FOLDER)
@click.option("--val", "source", type=FOLDER, required=True,
              help="Labelled validation source, neither shots nor test; of a split .json its val part.")  # fmt: skip
@click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to.")
@_BACKBONE
@_ENCODING
@click.pass_context
def calibrate_command(ctx: click.Context, /, folder: Path, source: Path, **given: Any) -> None:
    """Fit the temperature of an index's probabilities on validation images, and write a new version with it.

    Predictions stay; their probabilities become softmax(logits / temperature). It is fitted for the index's own keys,
    alpha, beta, k and tail: calibrate again when these change.
    """
    from retrieval_tip.evaluate import calibrate
    from retrieval_tip.sources import open_source

    cache = _checked(folder, given["device"])
    val = open_source(source, split="val", root=given["root"])
    with _encoder(ctx, _backbone_for(cache, [val], given), given) as encoder:
        result = calibrate(cache, val, encoder)
    cache.save_settings(folder)
    for name, value in (vars(result) | {"version": cache.version}).items():
        click.echo(f"{name:<15}  {_shown(value)}")
    _finish(ctx, encoder.skipped)


@main.group("datasets")
def datasets_group() -> None:
    """The datasets that --dataset knows: what they are, and whether they are there."""


@datasets_group.command("list")
@_FORMAT
def datasets_list(style: str, output: Path | None) -> None:
    """List the datasets: name, folder below the one that holds all of them, number of classes, templates."""
    import pyarrow as pa

    from retrieval_tip.datasets import facts, names
    from retrieval_tip.output import write_rows

    types = {"name": pa.string(), "folder": pa.string(), "classes": pa.int64(), "templates": pa.list_(pa.string())}
    rows = [{column: getattr(facts(name), column) for column in types} for name in names()]
    for row in rows:  # a table shows no lists
        row["templates"] = " | ".join(row["templates"]) if style == "table" else list(row["templates"])
    write_rows(rows, list(types), style, output, pa.schema(list(types.items())))


@datasets_group.command("check")
@click.argument("root", type=FOLDER)
@click.argument("names", nargs=-1)
@click.pass_context
def datasets_check(ctx: click.Context, root: Path, names: tuple[str, ...]) -> None:
    """Check that datasets lie in the folder ROOT as CoOp lays them out, and say what is missing.

    NAMES are datasets, by default all. Exit status 0 where all that are named are there, or where none is named, any.
    """
    from retrieval_tip import datasets

    rows = [datasets.facts(name) for name in names or datasets.names()]
    width = max(len(row.name) for row in rows)
    good = 0
    for row in rows:
        problems = datasets.check(row.name, root)
        good += not problems
        shown = f"missing: {'; '.join(problems)}" if problems else "ok"
        click.echo(one_line(f"{row.name:<{width}}  {shown}"))
    ctx.exit(0 if good == len(rows) or (good and not names) else FAILED)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Explain this installation: versions, devices, FAISS build. Exit status 1 where something needs repair."""
    from retrieval_tip.doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps({"facts": report.facts, "problems": report.problems}))
    else:
        width = max(map(len, report.facts))
        for name, value in report.facts.items():
            click.echo(f"{name.ljust(width)}  {value}")
        for problem in report.problems:
            click.echo(f"problem: {problem}")
        if not report.problems:
            click.echo("no problems found")
    ctx.exit(FAILED if report.problems else 0)


def _paths_on_stdin() -> Iterator[str]:
    """One path a line, or separated by NUL (``find -print0``), whatever bytes they are made of."""
    data = sys.stdin.buffer.read()
    yield from map(os.fsdecode, data.split(b"\0" if b"\0" in data else b"\n"))


def _source(path: Path, given: dict[str, Any], split: str, *, labelled: bool = True) -> Source:
    """The source of a command, with ``split`` as the part where none is given; or the dataset that it names."""
    from retrieval_tip.sources import open_items, open_source

    part = given["split"] or split
    if given["dataset"] is None:
        return (open_source if labelled else open_items)(path, split=part, root=given["root"])
    from retrieval_tip.datasets import open_dataset

    if given["root"] is not None:
        raise UsageError("--root does not go with --dataset: SOURCE is the folder that holds the dataset's folder")
    return open_dataset(given["dataset"], path, part)


@contextmanager
def _to_be_resumed(checkpoint: Path) -> Iterator[None]:
    """Say how an interrupted run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.exists():
            click.echo("interrupted; the same command with --resume goes on from the last checkpoint", err=True)
        raise


def _validation(cache: CacheModel, path: Path, given: dict[str, Any], *, every: bool = False) -> Source:
    """Validation images: ``--val-shots`` a class, as published, or every one."""
    from retrieval_tip.search_hp import validation_shots
    from retrieval_tip.sources import open_source

    val = open_source(path, split="val", root=given["root"])
    every = every or given["val_shots"] == 0
    return val if every else val.take(validation_shots(cache, val, path, given["val_shots"]))


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        logging.getLogger("retrieval_tip").warning("%s", warning)


def _checked(folder: Path, device: str, precision: str = "float32") -> CacheModel:
    """The index. Its files are hashed while torch is imported."""
    from retrieval_tip.store import Check

    check = Check(folder)
    from retrieval_tip.cache_model import CacheModel

    return CacheModel.load(folder, device=device, precision=precision, check=check)


def _opened(folder: Path, given: dict[str, Any]) -> CacheModel:
    """The index, with the alpha and beta of the command line where they are given."""
    cache = _checked(folder, given["device"], given["precision"])
    from retrieval_tip.inputs import check_settings

    cache.alpha = cache.alpha if given["alpha"] is None else given["alpha"]
    cache.beta = cache.beta if given["beta"] is None else given["beta"]
    check_settings(cache.alpha, cache.beta, cache.k, cache.logit_scale)
    return cache


def _index(folder: Path, given: dict[str, Any]) -> tuple[CacheModel, int | None, bool]:
    """The index with the settings of the command line, or its own."""
    cache = _opened(folder, given)
    k = cache.k if given["k"] is None else given["k"] or None
    return cache, k, cache.tail if given["tail"] is None else given["tail"]


def _load(
    given: dict[str, Any], model: str | None = None, pretrained: str | None = None, tuned: Path | None = None
) -> Backbone:
    from retrieval_tip.backbone import DEFAULT_MODEL, load_backbone

    model, pretrained = (given["model"], given["pretrained"]) if given["model"] else (model, pretrained)
    return load_backbone(
        model or DEFAULT_MODEL,
        given["pretrained"] or pretrained,
        device=given["device"],
        precision=given["precision"],
        tuned=tuned,
    )


def _backbone_of(source: Source, given: dict[str, Any], *, needed: bool = False) -> Backbone | None:
    """The backbone of a source: named, or the one that a feature table names where text weights need it."""
    from retrieval_tip.features import table_identity

    if source.table is None or given["model"]:
        return _load(given)
    identity = table_identity(source.table) if needed else None
    return _load(given, identity.model, identity.pretrained) if identity else None


def _backbone_for(cache: CacheModel, sources: list[Source], given: dict[str, Any]) -> Backbone | None:
    """The index's own backbone, where there are images to encode; refused if it is another by now."""
    from retrieval_tip.backbone import load_when_needed
    from retrieval_tip.features import check_backbone

    images = any(source.table is None for source in sources)
    identity = cache.backbone
    if images and identity is None and not given["model"]:
        raise UsageError(
            "the index was built from features of an unnamed backbone; name it with --model to encode images"
        )
    backbone: Backbone | None = None
    if images:
        named = given["model"] or given["pretrained"]
        if identity and not (cache.tuned or named or given["no_cache"]):  # what is in the encoding cache needs no model
            backbone = load_when_needed(identity, cache.d, device=given["device"], precision=given["precision"])
        else:
            model, pretrained = (identity.model, identity.pretrained) if identity else (None, None)
            backbone = _load(given, model, pretrained, cache.tuned)
    check_backbone(cache.backbone, cache.d, backbone, sources)
    return backbone


@contextmanager
def _encoder(ctx: click.Context, backbone: Backbone | None, given: dict[str, Any]) -> Iterator[Encoder]:
    """How the command's inputs become features; the encoding cache is closed at the end."""
    from retrieval_tip.features import Encoder, EncodingCache

    use_cache = backbone is not None and not given["no_cache"]
    cache = EncodingCache(given["cache"] or EncodingCache.default_folder()) if use_cache else None
    names = ("views", "seed", "norms", "batch_size", "workers", "reduce", "strict")
    settings = {name: given[name] for name in names if name in given}
    try:
        yield Encoder(backbone=backbone, cache=cache, progress=not ctx.obj, **settings)
    finally:
        if cache is not None:
            cache.close()


def _row(name: str, found: Prediction, columns: list[str], abstain: float | None = None) -> dict[str, Any]:
    row = {
        "input": name,
        "label": found.label if abstain is None or found.probability >= abstain else None,
        "probability": found.probability,
        "labels": found.labels,
        "probabilities": found.probabilities,
        "logits": found.logits.tolist() if "logits" in columns and found.logits is not None else None,
        "text_logit": found.text_logit,
        "cache_logit": found.cache_logit,
        "neighbours": [vars(neighbour) for neighbour in found.neighbours],
        "keys": found.keys,
    }
    return {column: row[column] for column in columns}


def _classify_schema(columns: list[str]) -> Any:
    import pyarrow as pa

    neighbour = {"key_id": pa.int64(), "source": pa.string(), "label": pa.string()}
    neighbour |= {"affinity": pa.float64(), "weight": pa.float64()}
    types = {
        "input": pa.string(),
        "label": pa.string(),
        "labels": pa.list_(pa.string()),
        "probabilities": pa.list_(pa.float64()),
        "logits": pa.list_(pa.float32()),
        "neighbours": pa.list_(pa.struct(list(neighbour.items()))),
        "keys": pa.int64(),
    }
    return pa.schema([(column, types.get(column, pa.float64())) for column in columns])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        shown = ", ".join(_shown(part) for part in value[:8])
        return shown + (f" ... ({len(value)} in all)" if len(value) > 8 else "")
    return "-" if value is None else str(value)


def _finish(ctx: click.Context, skipped: list[Skipped]) -> None:
    """Each skipped input was named when it was met; the exit status says that there were some."""
    if skipped:
        click.echo(f"{len(skipped)} inputs could not be read", err=True)
        ctx.exit(SOME_SKIPPED)
