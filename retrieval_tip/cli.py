"""The command line: each command parses, makes one library call, and prints."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
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


_BACKBONE = _options(
    click.option("--model", help="open_clip architecture, local-dir:PATH or hf-hub:ORG/REPO.  [default: RN50, openai]"),
    click.option("--pretrained", help="Tag, checkpoint file, or TAG=FILE for a local copy of a tag's weights."),
    click.option("--precision", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
                 show_default=True, help="Arithmetic of the backbone; auto: float32, on a GPU float16 autocast."),
)  # fmt: skip
_DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_READING = _options(
    click.option("--split", help="Part of a split .json."),
    click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to."),
)
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
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about an image is said by us, with its name
    ctx.obj = quiet


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
@click.option("--index", "factory", default="Flat", show_default=True, help="FAISS factory string.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
              help="Type of the stored keys.")  # fmt: skip
@click.option("--alpha", type=float, help="Weight of the cache beside the text.  [default: 1]")
@click.option("--beta", type=float, help="Sharpness of the affinity.  [default: 5.5]")
@click.option("-k", "k", type=_K(), default="all", show_default=True, help="Nearest keys that a query uses.")
@click.option("--logit-scale", type=float, help="Factor of the text logits.  [default: the backbone's, else 100]")
@_READING
@_ENCODING
@click.pass_context
def build(ctx: click.Context, /, source: Path, out: Path, **given: Any) -> None:
    """Build an index folder from labelled images or features.

    SOURCE is a folder of class folders, a .csv, .tsv or .parquet with path and label, a feature table (.parquet with
    id, label and feature), or a split .json (its train part).
    """
    from retrieval_tip.build import build_index
    from retrieval_tip.sources import open_source, show

    shots = open_source(source, split=given["split"], root=given["root"])
    backbone = _backbone_of(shots, given, needed=given["text"] is None)
    with _encoder(ctx, backbone, given) as encoder:
        cache = build_index(
            shots,
            out,
            encoder,
            shots=given["shots"],
            templates=given["template"],
            text=given["text"],
            index=given["factory"],
            dtype=given["dtype"],
            alpha=given["alpha"],
            beta=given["beta"],
            k=given["k"] or None,
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
    table that the index was built from; the view class_counts has class_id, label and keys.
    """
    from retrieval_tip.output import write_rows
    from retrieval_tip.store import query as ask

    table = ask(folder, sql)
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    write_rows(rows, table.column_names, style, output, table.schema)


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
    from retrieval_tip.sources import open_items, show

    items = open_items(source, split=given["split"], root=given["root"])
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
@_FORMAT
@_BACKBONE
@_ENCODING
@click.pass_context
def classify(ctx: click.Context, /, folder: Path, inputs: tuple[str, ...], **given: Any) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths, feature tables, or - for paths on standard input.
    """
    from retrieval_tip.output import write_rows
    from retrieval_tip.sources import open_inputs

    cache, k, tail = _index(folder, given)
    sources = list(open_inputs(inputs, _paths_on_stdin()))
    backbone = _backbone_for(cache, sources, given)
    columns = ["input", "label", "probability"]
    columns += ["labels", "probabilities"] if given["top"] > 1 else []
    columns += ["logits"] if given["with_logits"] else []
    columns += ["text_logit", "cache_logit", "neighbours"] if given["explain"] else []
    with _encoder(ctx, backbone, given) as encoder:

        def rows() -> Iterator[dict[str, Any]]:
            for source in sources:
                near = given["neighbours"] if given["explain"] else 0
                for name, found in cache.classify_source(source, encoder, given["top"], k, tail, near):
                    yield _row(name, found, columns)

        write_rows(rows(), columns, given["style"], given["output"], _classify_schema(columns))
    _finish(ctx, encoder.skipped)


@main.command("evaluate")
@click.argument("folder", type=FOLDER)
@click.argument("source", type=FOLDER)
@_ANSWER
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@_BACKBONE
@_READING
@_ENCODING
@click.pass_context
def evaluate_command(ctx: click.Context, /, folder: Path, source: Path, as_json: bool, **given: Any) -> None:
    """Accuracy of an index on a labelled source (a split .json: its test part): blend, zero-shot and cache alone."""
    from retrieval_tip.evaluate import evaluate
    from retrieval_tip.sources import open_source

    cache, k, tail = _index(folder, given)
    test = open_source(source, split=given["split"] or "test", root=given["root"])
    with _encoder(ctx, _backbone_for(cache, [test], given), given) as encoder:
        result = evaluate(cache, test, encoder, k=k, tail=tail).to_dict()
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


def _index(folder: Path, given: dict[str, Any]) -> tuple[CacheModel, int | None, bool]:
    """The index with the settings of the command line, or its own."""
    from retrieval_tip.cache_model import CacheModel, check_settings

    cache = CacheModel.load(folder, device=given["device"])
    cache.alpha = cache.alpha if given["alpha"] is None else given["alpha"]
    cache.beta = cache.beta if given["beta"] is None else given["beta"]
    check_settings(cache.alpha, cache.beta, cache.k, cache.logit_scale)
    k = cache.k if given["k"] is None else given["k"] or None
    return cache, k, cache.tail if given["tail"] is None else given["tail"]


def _load(given: dict[str, Any], model: str | None = None, pretrained: str | None = None) -> Backbone:
    from retrieval_tip.backbone import DEFAULT_MODEL, load_backbone

    model, pretrained = (given["model"], given["pretrained"]) if given["model"] else (model, pretrained)
    return load_backbone(
        model or DEFAULT_MODEL,
        given["pretrained"] or pretrained,
        device=given["device"],
        precision=given["precision"],
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
    from retrieval_tip.features import check_backbone

    images = any(source.table is None for source in sources)
    identity = cache.backbone
    if images and identity is None and not given["model"]:
        raise UsageError(
            "the index was built from features of an unnamed backbone; name it with --model to encode images"
        )
    backbone = None
    if images:
        backbone = _load(given, identity.model, identity.pretrained) if identity else _load(given)
    check_backbone(cache.backbone, cache.d, backbone, sources)
    return backbone


@contextmanager
def _encoder(ctx: click.Context, backbone: Backbone | None, given: dict[str, Any]) -> Iterator[Encoder]:
    """How the command's inputs become features; the encoding cache is closed at the end."""
    from retrieval_tip.features import Encoder, EncodingCache

    use_cache = backbone is not None and not given["no_cache"]
    cache = EncodingCache(given["cache"] or EncodingCache.default_folder()) if use_cache else None
    names = ("views", "seed", "norms", "batch_size", "workers", "strict")
    settings = {name: given[name] for name in names if name in given}
    try:
        yield Encoder(backbone=backbone, cache=cache, progress=not ctx.obj, **settings)
    finally:
        if cache is not None:
            cache.close()


def _row(name: str, found: Prediction, columns: list[str]) -> dict[str, Any]:
    row = {
        "input": name,
        "label": found.label,
        "probability": found.probability,
        "labels": found.labels,
        "probabilities": found.probabilities,
        "logits": found.logits.tolist() if "logits" in columns else None,
        "text_logit": found.text_logit,
        "cache_logit": found.cache_logit,
        "neighbours": [vars(neighbour) for neighbour in found.neighbours],
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
