"""The options that commands share. A group of them reaches a command as one value, a frozen dataclass."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from retrieval_tip.cli.group import Function, under
from retrieval_tip.cli.parameters import FOLDER, NUMBER, OUTPUT, POSITIVE, SEED, VIEWS_COUNT, K, count
from retrieval_tip.errors import UsageError, show
from retrieval_tip.settings import KeysMet, MetricName, Norms, Precision, Protocol, Runtime, ValuesName, Verify

if TYPE_CHECKING:
    from retrieval_tip.data.encoder import Encoder

Decorator = Callable[[Function], Function]


def choice(alias: object) -> click.Choice[str]:
    """Return the type of an option that takes the words of a ``Literal``."""
    return click.Choice(get_args(alias))


def several(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order that help shows them."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def grouped(name: str, kind: type[Any], *shown: Decorator) -> Decorator:
    """Options as one decorator, whose values a command gets together: as its parameter ``name``, of the type ``kind``.

    Each field of ``kind`` is the option of that name, whichever decorator of the command it comes from; a field of
    which the command has no option keeps its default.
    """

    def decorate(command: Function) -> Function:
        @functools.wraps(command)
        def collecting(*arguments: object, **values: object) -> object:
            own = {field.name: values.pop(field.name) for field in fields(kind) if field.name in values}
            return command(*arguments, **values, **{name: kind(**own)})

        return several(*shown)(collecting)

    return decorate


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """The backbone that is named, if one is; its arithmetic and that of the products with all keys; the device."""

    model: str | None
    pretrained: str | None
    device: str
    precision: Precision = "auto"
    runtime: Runtime = "auto"


@dataclass(frozen=True)
class ReadingOptions:
    """Options for reading a source: the dataset that it holds, the part of it, and where relative paths start from."""

    dataset: str | None = None
    split: str | None = None
    root: Path | None = None

    def without_split(self) -> ReadingOptions:
        """The options for another source, whose part is not that of the first one."""
        return replace(self, split=None)


@dataclass(frozen=True)
class ViewOptions:
    """Views that a key is the mean of, and the seed that draws shots and views."""

    views: int = 1
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(BackboneOptions):
    """Options for encoding: backbone, checks of feature tables, batches, threads, and the encoding cache."""

    norms: Norms
    batch_size: int | None
    workers: int
    cache: Path | None
    no_cache: bool
    reduce: bool
    strict: bool

    def encoder(self, views: ViewOptions | None = None) -> Encoder:
        """Make an encoder without a backbone and a cache; a command without options for views takes the centre one."""
        from retrieval_tip.data.encoder import Encoder

        views = views or ViewOptions()
        return Encoder(
            norms=self.norms,
            batch_size=self.batch_size,
            workers=self.workers,
            reduce=self.reduce,
            strict=self.strict,
            views=views.views,
            seed=views.seed,
        )


@dataclass(frozen=True)
class AnswerOptions:
    """Options for answering: settings, where its own are not to hold, over which keys, and how it is checked first."""

    k: KeysMet = None
    tail: bool | None = None
    alpha: float | None = None
    beta: float | None = None
    where: str | None = None
    verify: Verify | None = None


@dataclass(frozen=True)
class EngineOptions:
    """The engine that does the work: this process, or actors of a Ray cluster."""

    engine: str
    actors: int | None
    ray_address: str | None

    @property
    def is_ray(self) -> bool:
        """Whether the work runs on Ray. Raises UsageError for options of Ray without it."""
        if self.engine != "ray" and (self.actors or self.ray_address):
            raise UsageError(f"--{'actors' if self.actors else 'ray-address'} needs --engine ray")
        return self.engine == "ray"


@dataclass(frozen=True)
class OutputOptions:
    """The form in which rows are printed, and the file that they go to in place of standard output."""

    named: str | None
    output: Path | None

    @property
    def style(self) -> str:
        """The format that was named, else that of the file's suffix. Raises UsageError for one that has none."""
        suffix = Path(self.output).suffix.lower() if self.output else ""  # it may be a URL
        style = self.named or _SUFFIXES.get(suffix)
        if style is None:
            known = ", ".join(name for name in _SUFFIXES if name)
            raise UsageError(f"--output {show(str(self.output))}: {suffix} is no format; give {known}, or --format too")
        return "json" if style == "jsonl" else style


_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_SUFFIXES |= {".txt": "table", "": "table"}


BACKBONE_OPTION = under("Backbone")
READING_OPTION = under("Reading images and tables", folded=True)
ANSWER_OPTION = under("Answers")
OUTPUT_OPTION = under("Output")
ENGINE_OPTION = under("Past one machine", folded=True)

VERIFY = ANSWER_OPTION("--verify", type=choice(Verify),
                       help="Check every byte of the index first, or of large files only the size.  "
                            "[default: full; fast at an address]")  # fmt: skip
ROOT = READING_OPTION("--root", type=FOLDER, help="Folder that the paths of a table or split .json are relative to.")
NORMS = READING_OPTION("--norms", type=choice(Norms), default="check", show_default=True,
                       help="Rows of feature tables must have norm 1, are scaled to it, or are kept.")  # fmt: skip
DEVICE = BACKBONE_OPTION("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
PRECISION = BACKBONE_OPTION(
    "--precision", type=choice(Precision), default="auto", show_default=True,
    help="Arithmetic of the backbone (auto: float32, on a GPU float16 autocast) and of the products with all keys "
         "(auto: the fastest that is accurate, measured).",
)  # fmt: skip
MODEL = several(
    BACKBONE_OPTION(
        "--model",
        help="Architecture of open_clip, timm:NAME, local-dir:PATH, hf-hub:ORG/REPO or hf:ORG/REPO (see:"
        " retrieval-tip models).  [default: ViT-B-32]",
    ),
    BACKBONE_OPTION(
        "--pretrained",
        help="Tag, checkpoint file, or TAG=FILE for a local copy of a tag's weights.  [default: the recommended tag]",
    ),
)
BACKBONE = several(
    MODEL,
    PRECISION,
    BACKBONE_OPTION("--runtime", type=choice(Runtime), default="auto", show_default=True,
                    help="What encodes images on a CPU (auto: OpenVINO, where its features are torch's)."),
)  # fmt: skip
READING = grouped(
    "reading", ReadingOptions,
    READING_OPTION("--dataset", metavar="NAME",
                 help="SOURCE is the folder that holds this dataset's folder (names: datasets list)."),
    READING_OPTION("--split", help="Part of a split .json or dataset: train, val or test."),
    ROOT,
)  # fmt: skip
ENCODING = grouped(
    "encoding", EncodingOptions,
    NORMS,
    READING_OPTION("--batch-size", type=count("batch_size"),
                 help="Images encoded at a time.  [default: the backbone's best, 16 on a CPU, 256 on a GPU]"),
    READING_OPTION("--workers", type=count("workers"), default=min(16, os.cpu_count() or 1), show_default="cores",
                 help="Threads that read and decode images."),
    READING_OPTION("--cache", type=FOLDER,
                 help="Folder of the encoding cache.  [default: $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip]"),
    READING_OPTION("--no-cache", is_flag=True, help="Encode without a cache."),
    READING_OPTION("--reduce/--no-reduce", default=True, show_default=True,
                 help="Decode large JPEGs at a reduced size for the centre view: faster, nearly the same features."),
    READING_OPTION("--strict", is_flag=True, help="Fail on the first image that cannot be read."),
    DEVICE,
)  # fmt: skip
VIEWS = grouped(
    "views", ViewOptions,
    click.option("--views", type=VIEWS_COUNT, default=1, show_default=True,
                 help="1: the centre view; V > 1: mean of V augmented views, as in the paper."),
    click.option("--seed", type=SEED, default=1, show_default=True, help="Draws shots and views."),
)  # fmt: skip
LETTERS = several(
    click.option("--metric", type=choice(MetricName),
                 help="within: directions in which photographs of a class differ count little.  [default: chosen]"),
    click.option("--values", type=choice(ValuesName),
                 help="solved: by ridge regression, what each key gives to each class.  [default: chosen]"),
)  # fmt: skip
ANSWER = grouped(
    "answer",
    AnswerOptions,
    ANSWER_OPTION("-k", "k", type=K(), help="Nearest keys that a query uses.  [default: the index's]"),
    ANSWER_OPTION("--tail/--no-tail", default=None, help="Estimate the keys that were not retrieved.  [default: tail]"),
    ANSWER_OPTION("--alpha", type=NUMBER, help="Weight of the cache beside the text.  [default: the index's]"),
    ANSWER_OPTION("--beta", type=NUMBER, help="Sharpness of the affinity.  [default: the index's]"),
    ANSWER_OPTION("--where", metavar="SQL", help="Use only keys for which this condition over the label store holds."),
    VERIFY,
)
ENGINE = grouped(
    "engine", EngineOptions,
    ENGINE_OPTION("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, is_eager=True,
                  help="ray: actors here or on a cluster, into a folder of parts that a second run completes, on a "
                       "disk or in a bucket."),
    ENGINE_OPTION("--actors", type=count("actors"), metavar="N",
                  help="Most actors of Ray.  [default: one a GPU, or up to 8 a node]"),
    ENGINE_OPTION("--ray-address", metavar="HOST:PORT",
                  help="Head of a Ray cluster, or auto.  [default: a Ray that is started here]"),
)  # fmt: skip
PROTOCOL = click.option("--protocol", type=choice(Protocol), default="honest", show_default=True,
                        help="paper: the published grid over the whole validation source.")  # fmt: skip
SCALES = click.option("--scales", type=(POSITIVE, POSITIVE), metavar="X X", default=(7.0, 3.0), show_default=True,
                       help="Largest beta and alpha of the published grid.")  # fmt: skip
FORMAT = grouped(
    "printing", OutputOptions,
    OUTPUT_OPTION("--format", "named", type=click.Choice(["table", "json", "jsonl", "csv", "parquet"]),
                 help="json and jsonl: one object a line.  [default: by the suffix of --output, else table]"),
    OUTPUT_OPTION("--output", type=OUTPUT, help="File to write instead of standard output."),
)  # fmt: skip
JSON = OUTPUT_OPTION("--json", "as_json", is_flag=True, help="One JSON object.")
