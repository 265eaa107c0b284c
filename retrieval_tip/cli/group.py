"""The command line: each command parses, makes one library call, and prints."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip import __version__
from retrieval_tip.cli.index import index
from retrieval_tip.cli.options import (
    ABSTAIN,
    ANSWER,
    BACKBONE,
    DEVICE,
    ENCODING,
    ENGINE,
    FAILED,
    FILE,
    FOLDER,
    FORMAT,
    INDEX,
    MODEL,
    NUMBER,
    PLACE,
    PLACE_OUT,
    POSITIVE,
    RAY_ADDRESS,
    READING,
    SCALES,
    SEED,
    SEEDS,
    SHOTS,
    VIEWS,
    VIEWS_COUNT,
    K,
    Number,
    asked_of,
    backbone_for,
    backbone_of,
    checked,
    count,
    encoder_of,
    encoding_for,
    encoding_of,
    finish,
    index_with,
    named,
    opened,
    ray_of,
    say,
    shards_of,
    shown,
    source_of,
    validation,
    warn,
)
from retrieval_tip.errors import (
    InputError,
    RetrievalTipError,
    Skipped,
    UsageError,
    counted,
    json_line,
    message,
    one_line,
)
from retrieval_tip.files import make_folders

if TYPE_CHECKING:
    from retrieval_tip.classifier import Classifier
    from retrieval_tip.distributed.engine import Ray
    from retrieval_tip.distributed.tasks import Made
    from retrieval_tip.lance.address import Address


PATHS_READ = 1 << 20
"""Bytes of standard input that are read at a time."""
MAX_PATHS, MAX_PATHS_BYTES = 1 << 24, 1 << 30
"""Most paths on standard input, and most bytes."""


class _Group(click.Group):
    """Turns errors, the package's and click's, into one line on standard error and the exit status that fits them."""

    def make_context(self, *given: Any, **more: Any) -> click.Context:
        try:
            _fill_closed_streams()
            with _in_one_line():
                return super().make_context(*given, **more)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(128 + signal.SIGINT) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _orderly_end(), _in_one_line(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            line = "; ".join(["interrupted", *getattr(error, "__notes__", ())])
            click.echo("\n" * sys.stderr.isatty() + line, err=True)  # after the ^C that a terminal shows
            ctx.exit(128 + next((number for number in error.args if isinstance(number, int)), signal.SIGINT))


@contextmanager
def _in_one_line(ctx: click.Context | None = None) -> Iterator[None]:
    """What is raised here, as an exception that click shows in one line of bounded length."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # it is the help
        raise
    except click.UsageError as error:
        raise click.UsageError(message(error.format_message()), error.ctx) from error
    except click.ClickException as error:
        raise click.ClickException(message(error.format_message())) from error
    except UsageError as error:
        raise click.UsageError(message(str(error)), ctx) from error
    except RetrievalTipError as error:
        raise click.ClickException(message(str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        raise click.ClickException("out of memory; a smaller --batch-size or source may help") from None
    except OSError as error:
        lost = _give_up_stdout()
        if isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            raise click.exceptions.Exit(0) from None
        name = error.filename or ("standard output" if lost else "")
        raise click.ClickException(message(f"{name}: {error.strerror or error}".removeprefix(": "))) from error


def _fill_closed_streams() -> None:
    """Nowhere in place of standard streams that are closed: files would get their numbers, and what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - to the end


def _is_of_memory(error: Exception) -> bool:
    """Whether memory is what is missing: torch says it in words, or by an error of its own."""
    own = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return own or isinstance(error, MemoryError)


def _give_up_stdout() -> bool:
    """Whether standard output takes no more; what it still holds is then dropped, or Python would fail at its end."""
    if sys.stdout is None:  # closed from the start
        return False
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl+C does: it removes what is half written, and lets another one write.

    A second one ends it at once.
    """
    ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        while frame is not None and not ended:  # torch crashes where its import is stopped: that ends at once too
            ended = frame.f_code.co_filename == "<frozen importlib._bootstrap>"
            frame = frame.f_back
        if ended:
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
        ended = True
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    unchanged = signal.SIG_DFL, signal.default_int_handler  # what else there is, who started the command wants so
    own = [number for number in numbers if before[number] in unchanged]
    if threading.current_thread() is not threading.main_thread():
        own = []  # only there can it be said
    try:
        for number in own:
            signal.signal(number, end)
        yield
    finally:
        for number in own:
            signal.signal(number, before[number])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, package_name="retrieval-tip")
@click.option("-q", "--quiet", is_flag=True, help="No warnings and no progress bar.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Few-shot image classification as retrieval (Tip-Adapter on a FAISS index).

    Exit status: 0 done; 1 failed, nothing was changed; 2 wrong usage; 3 done, but some inputs could not be read; 130
    interrupted (128 + the signal).
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
    """A name in a message cannot start another line, nor fill the screen."""

    def format(self, record: logging.LogRecord) -> str:
        return message(super().format(record))


class _Stderr:
    """Standard error as it is when something is said, not when the program started."""

    def write(self, text: str) -> None:
        click.echo(text, err=True, nl=False)

    def flush(self) -> None:
        sys.stderr.flush()


main.add_command(index)


@main.command()
@click.argument("source", type=PLACE)
@click.option("--out", type=PLACE_OUT, required=True, help="Feature table to write (.parquet).")
@ENGINE
@RAY_ADDRESS
@BACKBONE
@VIEWS
@READING
@ENCODING
@click.pass_context
def encode(ctx: click.Context, /, source: Path, out: Path, **given: Any) -> None:
    """Encode images once into a feature table, which serves wherever images do.

    SOURCE as for index build, or a folder of images without labels. With --engine ray, --out is a folder of parts,
    which serves as the table does.
    """
    from retrieval_tip.data.encoder import encode_table
    from retrieval_tip.errors import show

    ray = ray_of(given)
    if ray is not None:
        from retrieval_tip.distributed import tasks

        shards = shards_of(source, given, "train", labelled=False)
        encoding = encoding_of(given, None if all(shard.features for shard in shards) else named(given))
        made = tasks.encode(shards, out, encoding, ray, progress=not ctx.obj, say=_say)
        click.echo(f"{one_line(show(out))}: {made.rows} rows{_parts(made)}")
        finish(ctx, made.failed)
        return
    items = source_of(source, given, "train", labelled=False)
    with encoder_of(ctx, backbone_of(items, given), given) as encoder:
        rows = encode_table(items, out, encoder)
    click.echo(f"{one_line(show(out))}: {rows} rows")
    finish(ctx, encoder.skipped)


@main.command()
@click.argument("folder", type=INDEX)
@click.argument("inputs", nargs=-1, required=True)
@ANSWER
@click.option("--top", type=count(), default=1, show_default=True, help="Classes to report.")
@click.option("--explain", is_flag=True, help="The nearest keys, and what text and cache gave to the winner.")
@click.option("--neighbours", type=count(), default=5, show_default=True, help="Keys shown by --explain.")
@click.option("--logits", "with_logits", is_flag=True, help="Logits of every class, in the index's order.")
@click.option("--certify", is_flag=True,
              help="More keys where k do not settle an answer, at last all; says how many took what.")  # fmt: skip
@ABSTAIN
@ENGINE
@RAY_ADDRESS
@FORMAT
@BACKBONE
@ENCODING
@click.pass_context
def classify(ctx: click.Context, /, folder: Path | Address, inputs: tuple[str, ...], **given: Any) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths, feature tables, or - for paths on standard input. With
    --abstain, an answer of a lower probability has no label (null, in a table -) and keeps its probability. With
    --engine ray, --output is a folder of Parquet parts.
    """
    import pyarrow as pa

    from retrieval_tip.cli.output import prediction_details, write_rows
    from retrieval_tip.data.sources import open_inputs
    from retrieval_tip.predictions import PREDICTIONS, prediction_row

    ray = ray_of(given)
    loaded = index_with(folder, given)
    if ray is not None:
        _classify_on_ray(ctx, folder, inputs, loaded, given, ray)
        return
    sources = list(open_inputs(inputs, _paths_on_stdin()))
    backbone = backbone_for(loaded, sources, given)
    columns = _columns(given)
    cache = loaded.every_class() if given["with_logits"] else loaded
    schema = pa.schema([(column, PREDICTIONS[column]) for column in columns])
    settled: Counter[int | None] = Counter()
    with encoder_of(ctx, backbone, given) as encoder:

        def rows() -> Iterator[dict[str, Any]]:
            for source in sources:
                near = given["neighbours"] if given["explain"] else 0
                for name, found in cache.classify_source(
                    source, encoder, given["top"], neighbours=near, certify=given["certify"]
                ):
                    settled[found.keys] += 1
                    yield prediction_row(name, found, columns, given["abstain"])

        write_rows(rows(), columns, given["style"], given["output"], schema, prediction_details)
    if given["certify"]:
        _say_settled(cache, settled)
    finish(ctx, encoder.skipped)


def _classify_on_ray(
    ctx: click.Context,
    folder: Path | Address,
    inputs: tuple[str, ...],
    cache: Classifier,
    given: dict[str, Any],
    ray: Ray,
) -> None:
    """Classify by shards into a folder of parts."""
    from retrieval_tip.distributed import tasks
    from retrieval_tip.distributed.shards import cut_inputs
    from retrieval_tip.errors import show

    if given["style"] != "parquet" or given["output"] is None:
        raise UsageError("--engine ray writes parts: give --format parquet and --output FOLDER")
    shards = cut_inputs(inputs, _paths_on_stdin(), given["shard_size"])
    made = tasks.classify(
        folder,
        shards,
        given["output"],
        encoding_for(cache, shards, given),
        ray,
        asked=asked_of(cache, given),
        columns=_columns(given),
        top=given["top"],
        neighbours=given["neighbours"] if given["explain"] else 0,
        certify=given["certify"],
        abstain=given["abstain"],
        progress=not ctx.obj,
        say=_say,
    )
    say(f"{show(given['output'])}: {made.rows} rows{_parts(made)}")
    if given["certify"] and made.settled:
        _say_settled(cache, made.settled)
    finish(ctx, made.failed)


def _columns(given: dict[str, Any]) -> list[str]:
    """The columns that a classification asks for."""
    columns = ["input", "label", "probability"]
    columns += ["labels", "probabilities"] if given["top"] > 1 else []
    columns += ["logits"] if given["with_logits"] else []
    columns += ["text_logit", "cache_logit", "neighbours"] if given["explain"] else []
    return columns + (["keys"] if given["certify"] else [])


def _say_settled(cache: Classifier, settled: dict[int | None, int]) -> None:
    """How many answers took how many keys."""
    how = "proved" if cache.exact_search else "agreed with"
    pairs = sorted((keys or 0, number) for keys, number in settled.items())
    by = (f"{number} by {'all' if keys == cache.n else keys} keys" for keys, number in pairs)
    say(f"{how} the answer of all keys: {', '.join(by)}")


def _say(skipped: Skipped) -> None:
    """As an encoder says it."""
    warn([f"skipped {skipped}"])


def _parts(made: Made) -> str:
    """What a folder of parts consists of."""
    kept = f", {made.kept} of them kept from before" if made.kept else ""
    return f" in {counted(made.parts, 'part')}{kept}"


@main.command("evaluate")
@click.argument("folder", type=INDEX)
@click.argument("source", type=PLACE)
@ANSWER
@ABSTAIN
@click.option("--plot", type=FOLDER, help="Folder for diagrams (PNG): confusions, classes, calibration, affinities.")
@click.option(
    "--shots",
    type=SHOTS,
    multiple=True,
    help="Draw so many a class from the index's keys, again for each seed and method; repeat for more.",
)
@click.option("--seeds", type=SEEDS, default=3, show_default=True, help="With --shots: seeds 1 to N.")
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
@SCALES
@click.option("--results", type=FILE, help="With --shots: Parquet file, one row a run; what is in it is not run again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --shots one a run.")
@ENGINE
@RAY_ADDRESS
@BACKBONE
@READING
@ENCODING
@click.pass_context
def evaluate_command(ctx: click.Context, /, folder: Path | Address, source: Path, as_json: bool, **given: Any) -> None:
    """Accuracy of an index on a labelled source (a split .json: its test part): blend, zero-shot and cache alone.

    ece is the expected calibration error of the probabilities in 15 bins. With --abstain, coverage is the fraction of
    the items that are answered and selective_top1 the accuracy of these.

    With --shots, the index is a pool of labelled keys: every run draws its shots from it by the published rule, chooses
    its settings without the test source, and becomes a row of --results.
    """
    ray = ray_of(given)
    if ray is not None and (given["shots"] or given["plot"]):
        raise UsageError(f"--engine ray does not go with {'--shots' if given['shots'] else '--plot'}; leave it out")
    if given["shots"]:
        if not isinstance(folder, Path):
            raise UsageError(f"--shots draws from an index folder; copy it: retrieval-tip index clone {folder} DIR")
        _sweep(ctx, folder, source, as_json, given)
        return
    from retrieval_tip.errors import show
    from retrieval_tip.evaluation.evaluate import evaluate
    from retrieval_tip.report import plots

    if given["plot"]:
        plots.check(given["plot"])
    loaded = index_with(folder, given)
    if ray is not None:
        from retrieval_tip.distributed import tasks

        shards = shards_of(source, given, "test")
        encoding = encoding_for(loaded, shards, given)
        found, skipped = tasks.evaluate(
            loaded, folder, shards, encoding, ray,
            asked=asked_of(loaded, given), abstain=given["abstain"], progress=not ctx.obj, say=_say,
        )  # fmt: skip
    else:
        test = source_of(source, given, "test")
        with encoder_of(ctx, backbone_for(loaded, [test], given), given) as encoder:
            found = evaluate(loaded, test, encoder, abstain=given["abstain"], affinities=given["plot"] is not None)
        skipped = encoder.skipped
    if given["plot"]:
        files = plots.write_plots(found, given["plot"])
        say(f"{show(given['plot'])}: {', '.join(file.name for file in files)}")
    result = found.to_dict()
    if as_json:
        click.echo(json_line(result))
    else:
        per_class, confusions = result.pop("per_class"), result.pop("confusions")
        for name, value in result.items():
            click.echo(f"{name:<15}  {shown(value)}")
        worst = sorted(per_class.items(), key=lambda pair: pair[1])[:5]
        click.echo(one_line(f"{'worst classes':<15}  {', '.join(f'{name} {shown(value)}' for name, value in worst)}"))
        pairs = ", ".join(f"{a} as {b} ({times})" for a, b, times in confusions)
        click.echo(one_line(f"{'confusions':<15}  {pairs or 'none'}"))
    finish(ctx, skipped)


def _sweep(ctx: click.Context, folder: Path, source: Path, as_json: bool, given: dict[str, Any]) -> None:
    """Shots x seeds x methods."""
    from retrieval_tip.cli.output import table_lines
    from retrieval_tip.evaluation import sweep
    from retrieval_tip.fit.finetune import shots_of
    from retrieval_tip.store.folder import read_manifest

    if given["results"] is None:
        raise UsageError("--shots needs --results FILE, where every run becomes a row")
    if given["val"] is None and given["protocol"] == "paper":
        raise UsageError("--protocol paper chooses on a validation source; give --val")
    pool = checked(folder, given["device"])
    sources = [source_of(source, given, "test")]
    if given["val"] is not None:
        sources.append(source_of(given["val"], given | {"split": None}, "val"))
    methods = given["methods"] or sweep.PLAIN
    images = [shots_of(pool)] if "tip-adapter-f" in methods else []
    rows = []
    with encoder_of(ctx, backbone_for(pool, [*sources, *images], given), given) as encoder:
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
    finish(ctx, encoder.skipped)


@main.command("report")
@click.argument("folder", type=FOLDER)
@click.option("--test", "source", type=FOLDER, required=True,
              help="Labelled test source; of a split .json its test part.")  # fmt: skip
@click.option("--out", type=FILE, required=True, help="HTML file to write.")
@click.option("--val", type=FOLDER,
              help="Labelled validation source, for curves and surface; of a split .json its val part.  "
                   "[default: the shots, each left out]")  # fmt: skip
@click.option("--shots", type=SHOTS, multiple=True,
              help="Keys a class that are drawn for the curves; repeat for more.  [default: 1, 2, 4 ...]")  # fmt: skip
@click.option("--seeds", type=SEEDS, default=3, show_default=True, help="Draws of each number: seeds 1 to N.")
@click.option("--no-curves", is_flag=True, help="No accuracy over shots, which takes longest.")
@ANSWER
@BACKBONE
@READING
@ENCODING
@click.pass_context
def report_command(ctx: click.Context, /, folder: Path, source: Path, out: Path, **given: Any) -> None:
    """Write a report on an index as one HTML file that opens anywhere: accuracy, mistakes, settings (needs matplotlib).

    Figures are those of evaluate. Curves over shots and the surface of alpha and beta never choose on the test source.
    """
    from retrieval_tip.errors import show
    from retrieval_tip.report.report import check, write_report

    if given["shots"] and given["no_curves"]:
        raise UsageError("--shots and --no-curves: give one of them")
    check(out)
    cache = index_with(folder, given)
    test = source_of(source, given, "test")
    val = None if given["val"] is None else source_of(given["val"], given | {"split": None}, "val")
    with encoder_of(ctx, backbone_for(cache, [test, *([] if val is None else [val])], given), given) as encoder:
        written = write_report(
            cache,
            test,
            encoder,
            out,
            val=val,
            shots=given["shots"] or None,
            seeds=given["seeds"],
            curves=not given["no_curves"],
            folder=folder,
            where=given["where"],
            command=shlex.join(["retrieval-tip", *sys.argv[1:]]),
        )
    found = written.evaluation
    click.echo(one_line(f"{show(out)}: {written.bytes / 1e6:.1f} MB, top1 {shown(found.top1)} of {found.n} items"))
    finish(ctx, encoder.skipped)


@main.command("serve")
@click.argument("folders", type=INDEX, nargs=-1, required=True, metavar="DIR...")
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen at; one that others reach shows them the indexes.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: a free one.")
@click.option("--token", envvar="RETRIEVAL_TIP_TOKEN", show_envvar=True,
              help="Who sends this may add and remove shots.  [default: nobody may]")  # fmt: skip
@click.option("--uploads", type=FOLDER, help="Folder for images that are added.  [default: DIR-shots, beside each DIR]")
@click.option("--root", type=FOLDER, help="Folder that relative paths of shots' pictures start from.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME",
              help="A further name that requests may ask for; repeat for more.  "
                   "[default: this machine's own, and any where --host is another]")  # fmt: skip
@click.option("--max-bytes", type=count(), default=32 << 20, show_default=True, help="Of a request.")
@click.option("--max-pixels", type=count(), default=50_000_000, show_default=True, help="Of an image.")
@click.option("--queue", type=count("queue"), default=256, show_default=True,
              help="Images that wait at most; more are answered with 429.")  # fmt: skip
@click.option("--timeout", type=Number(0.1, 86_400), default=30.0, show_default=True, metavar="SECONDS",
              help="Until an answer.")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto",
              show_default=True, help="As for classify.")  # fmt: skip
@click.option("--verify", type=click.Choice(["full", "fast"]), default="full", show_default=True,
              help="How the files of every new version are checked.")  # fmt: skip
@DEVICE
@click.pass_context
def serve_command(ctx: click.Context, /, folders: tuple[Path | Address, ...], **given: Any) -> None:
    """Serve indexes over HTTP, with a page at / to look at them. Ends with Ctrl+C or SIGTERM, in order.

    An index that gets a new version is followed. Needs pip install 'retrieval-tip[serve]'.
    """
    try:
        import fastapi  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("serve needs FastAPI and uvicorn: pip install 'retrieval-tip[serve]'") from None
    from retrieval_tip.server.app import create_app
    from retrieval_tip.server.limits import Limits
    from retrieval_tip.server.run import LOOPBACK, address, listen, serve
    from retrieval_tip.server.served import open_all

    token = given["token"]
    if token is not None and (not token.strip() or not token.isascii() or not token.isprintable()):
        raise UsageError("--token: give a secret of printable ASCII characters, or leave it out")
    limits = Limits(
        bytes=given["max_bytes"], pixels=given["max_pixels"], queue=given["queue"], seconds=given["timeout"]
    )
    with listen(given["host"], given["port"]) as listening:
        if given["hosts"] or listening.getsockname()[0].startswith(("127.", "::1")):
            limits = dataclasses.replace(limits, hosts=LOOPBACK | {name.lower() for name in given["hosts"]})
        served = open_all(folders, given["device"], given["precision"], given["verify"])
        app = create_app(served, limits, token=token, uploads=given["uploads"], root=given["root"])
        what = ", ".join(f"{name} ({counted(one.now.cache.n, 'key')})" for name, one in served.items())
        line = f"serving {what} at {address(listening)}; Ctrl+C ends it"
        serve(app, listening, lambda: say(line), given["timeout"])


@main.command("search-hp")
@click.argument("folder", type=FOLDER)
@click.option("--val", "source", type=FOLDER, help="Labelled validation source; of a split .json its val part.")
@click.option(
    "--leave-one-out", is_flag=True, help="Score each shot with its own image's keys hidden; needs no images."
)
@click.option("--folds", type=count(least=2), help="Score each shot with its fold's keys hidden.")
@click.option(
    "--val-shots", type=K("shots"), help="Validation images a class, or all.  [default: min(shots, 4), as published]"
)
@click.option("--protocol", type=click.Choice(["honest", "paper"]), default="honest", show_default=True,
              help="paper: the published grid over the whole validation source.")  # fmt: skip
@SCALES
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
@BACKBONE
@ENCODING
@click.pass_context
def search_command(ctx: click.Context, /, folder: Path, source: Path | None, **given: Any) -> None:
    """Choose alpha, beta and k on validation images or on the shots themselves, and write them into the index.

    Never on test: a split .json gives its val part. The choice is exact in alpha, and makes a new version of the index.
    """
    from retrieval_tip.fit import search_hp

    if sum((source is not None, given["leave_one_out"], given["folds"] is not None)) != 1:
        raise UsageError("give one of --val SOURCE, --leave-one-out and --folds N: settings are chosen on one of them")
    cache = checked(folder, given["device"])
    skipped: list[Skipped] = []
    if source is None:
        queries = search_hp.leave_one_out(cache) if given["folds"] is None else search_hp.folds(cache, given["folds"])
    else:
        val = validation(cache, source, given, every=given["protocol"] == "paper")
        with encoder_of(ctx, backbone_for(cache, [val], given), given) as encoder:
            queries = search_hp.on_validation(cache, val, encoder)
        skipped = encoder.skipped
    paper = given["protocol"] == "paper"
    choice = (
        search_hp.search_paper(cache, queries, given["scales"])
        if paper
        else search_hp.search(cache, queries, cautious=not given["greedy"])
    )
    warn(choice.warnings)
    if given["surface"]:
        search_hp.write_surface(choice, given["surface"])
    if given["plot"]:
        from retrieval_tip.report.plots import draw_surface

        draw_surface(choice.surface, given["plot"])
    if not given["dry_run"]:
        search_hp.apply(cache, choice)
        cache.save_settings(folder, "search-hp")
    facts = {name: value for name, value in vars(choice).items() if name not in ("surface", "warnings")}
    facts |= {"k": (choice.k if given["dry_run"] else cache.settings.k) or "all", "version": cache.version}
    if given["as_json"]:
        facts["interval"] = [None if value == float("inf") else value for value in choice.interval]
        click.echo(json.dumps(facts | {"warnings": choice.warnings}))
    else:
        for name, value in (facts | {"interval": list(choice.interval)}).items():
            click.echo(f"{name:<12}  {shown(value)}")
    finish(ctx, skipped)


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
@click.option("--val-shots", type=K("shots"), help="Validation images a class, or all.  [default: min(shots, 4)]")
@click.option("--epochs", type=count("epochs"), default=20, show_default=True, help="Passes over the shots.")
@click.option("--batch", type=count("batch"), default=256, show_default=True, help="Queries a step.")
@click.option("--lr", type=POSITIVE, default=1e-3, show_default=True,
              help="Learning rate, falling along a cosine; of encoders a thousandth.")  # fmt: skip
@click.option("--eps", type=POSITIVE, default=1e-4, show_default=True, help="AdamW's.")
@click.option("--weight-decay", type=NUMBER, default=0.01, show_default=True, help="AdamW's.")
@click.option("--views-cache", type=VIEWS_COUNT, metavar="M",
              help="Encode M augmented views of each shot once, and draw from them.  "
                   "[default: 16; with an encoder in training, fresh ones]")  # fmt: skip
@click.option("--views", type=click.Choice(["fresh"]), help="fresh: encode another view of each shot every epoch.")
@click.option("--train-k", type=count(), metavar="N",
              help="Train only the N nearest keys of each query: for caches too large for dense steps.")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", show_default=True,
              help="Of the matrix products; auto: bfloat16 where it is measured to be worth it.")  # fmt: skip
@click.option("--settings", type=click.Choice(["tried", "own"]), default="tried", show_default=True,
              help="Alpha and beta to train with; tried: with --val, the best of a few; own: the index's.")  # fmt: skip
@click.option("--alpha", type=NUMBER, help="Train with this alpha instead.  [implies --settings own]")
@click.option("--beta", type=NUMBER, help="Train with this beta instead.  [implies --settings own]")
@click.option("--seed", type=SEED, default=1, show_default=True, help="Draws batches and views.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run (its state is OUT.checkpoint).")
@click.option("--plot", type=FILE, help="PNG file for loss and accuracy by epoch (needs matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@ENGINE
@RAY_ADDRESS
@MODEL
@READING
@ENCODING
@click.pass_context
def finetune_command(ctx: click.Context, /, folder: Path, out: Path, source: Path | None, **given: Any) -> None:
    """Fine-tune an index on its shots (Tip-Adapter-F) into another index folder.

    Trained are its keys, or what --train says, by AdamW on augmented views of the shots. With --val the epoch is chosen
    on it, and alpha, beta and k are searched again. What was interrupted goes on with --resume, to the same result.
    """
    from retrieval_tip.errors import show
    from retrieval_tip.fit.finetune import finetune, own_shots, shots_of
    from retrieval_tip.fit.trainer import VIEWS, Recipe
    from retrieval_tip.report import plots
    from retrieval_tip.store.folder import check_name

    if given["views"] and given["views_cache"]:
        raise UsageError("--views fresh and --views-cache: give one of them")
    ray = ray_of(given)
    if given["plot"]:
        plots.needs_matplotlib()
    encoders = {"visual", "text"} & set(given["train"])
    fresh = given["views"] or (encoders and not given["views_cache"])
    if ray is not None and fresh:
        raise UsageError("--engine ray encodes the views once, before the training: give --views-cache M")
    names = ("epochs", "batch", "lr", "eps", "weight_decay", "train_k", "precision", "seed")
    own = given["settings"] == "own" or given["alpha"] is not None or given["beta"] is not None
    recipe = Recipe(
        train=tuple(dict.fromkeys(given["train"])),
        views=None if fresh else given["views_cache"] or VIEWS,
        settings="own" if own else "tried",
        **{name: given[name] for name in names},
    )
    cache = opened(folder, given | {"precision": "float32"})
    shots = shots_of(cache) if source is None else own_shots(cache, source_of(source, given, "train"))
    sources = [shots]
    if given["val"] is not None:
        sources.append(validation(cache, given["val"], given))
    check_name(out)
    checkpoint = Path(f"{out}.checkpoint")
    make_folders(out.parent)
    backbone = backbone_for(cache, sources, given | {"precision": "auto"})
    settings = {name: given[name] for name in given if name not in ("views", "seed")}
    with encoder_of(ctx, backbone, settings) as encoder, _to_be_resumed(checkpoint):
        if ray is not None:
            from retrieval_tip.distributed.tasks import RayEncoder

            model, pretrained = (cache.backbone.model, cache.backbone.pretrained) if cache.backbone else (None, None)
            backbone_name = named(given | {"precision": "auto"}, model, pretrained, cache.tuned)
            encoder = RayEncoder(**vars(encoder), encoding=encoding_of(settings, backbone_name), ray=ray)
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
    warn(tuned.choice.warnings if tuned.choice else ())
    last = tuned.curve.to_pylist()[tuned.epoch]
    facts: dict[str, Any] = {"version": tuned.cache.version, "trained": list(recipe.train), "epoch": tuned.epoch}
    facts |= {name: None if last[name] != last[name] else last[name] for name in ("loss", "accuracy")}
    facts |= {"val_accuracy": tuned.choice.accuracy if tuned.choice else None}
    facts |= {name: tuned.cache.settings.shown()[name] for name in ("alpha", "beta", "k")}
    facts |= {"collapsed": tuned.collapsed, "seconds": tuned.cache.provenance["finetune"]["seconds"]}
    if given["as_json"]:
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:<12}  {shown(value)}")
    finish(ctx, encoder.skipped)


@main.command("calibrate")
@click.argument("folder", type=FOLDER)
@click.option("--val", "source", type=FOLDER, required=True,
              help="Labelled validation source, neither shots nor test; of a split .json its val part.")  # fmt: skip
@click.option("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to.")
@BACKBONE
@ENCODING
@click.pass_context
def calibrate_command(ctx: click.Context, /, folder: Path, source: Path, **given: Any) -> None:
    """Fit the temperature of an index's probabilities on validation images, and write a new version with it.

    Predictions stay; their probabilities become softmax(logits / temperature). It is fitted for the index's own keys,
    alpha, beta, k and tail: calibrate again when these change.
    """
    from retrieval_tip.data.sources import open_source
    from retrieval_tip.evaluation.evaluate import calibrate

    cache = checked(folder, given["device"])
    val = open_source(source, split="val", root=given["root"])
    with encoder_of(ctx, backbone_for(cache, [val], given), given) as encoder:
        result = calibrate(cache, val, encoder)
    cache.save_settings(folder, "calibrate")
    for name, value in (vars(result) | {"version": cache.version}).items():
        click.echo(f"{name:<15}  {shown(value)}")
    finish(ctx, encoder.skipped)


@main.group("datasets")
def datasets_group() -> None:
    """The datasets that --dataset knows: what they are, and whether they are there."""


@datasets_group.command("list")
@FORMAT
def datasets_list(style: str, output: Path | None) -> None:
    """List the datasets: name, folder below the one that holds all of them, number of classes, templates."""
    import pyarrow as pa

    from retrieval_tip.cli.output import write_rows
    from retrieval_tip.data.datasets import facts, names

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
    from retrieval_tip.data import datasets

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
    """One path a line, or separated by NUL (``find -print0``), whatever bytes they are made of.

    Raises InputError where standard input is closed, or has more than any list of images.
    """
    if sys.stdin is None:
        raise InputError("standard input is closed; it has the paths where - is given")
    rest, paths, size, separator = b"", 0, 0, b""
    while block := sys.stdin.buffer.read(PATHS_READ):
        separator = separator or (b"\0" if b"\0" in block else b"\n")
        whole, ended, last = (rest + block).rpartition(separator)
        found = re.findall(b"[^" + separator + b"]+", whole) if ended else []
        rest, paths, size = last, paths + len(found), size + len(block)
        if paths > MAX_PATHS or size > MAX_PATHS_BYTES or len(rest) > PATHS_READ:
            raise InputError(
                f"standard input: more than {MAX_PATHS:,} paths or {MAX_PATHS_BYTES:,} bytes, or no paths at all; "
                "give a table of them"
            )
        yield from map(os.fsdecode, found)
    if rest:
        yield os.fsdecode(rest)


@contextmanager
def _to_be_resumed(checkpoint: Path) -> Iterator[None]:
    """Say how an interrupted run goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        if checkpoint.exists():
            error.add_note("the same command with --resume goes on from the last checkpoint")
        raise
