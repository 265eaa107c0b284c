"""Options shared by commands. A command receives each group of options as one frozen dataclass."""

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
    """Return an option type that accepts the values of a ``Literal``."""
    return click.Choice(get_args(alias))


def several(*options: Decorator) -> Decorator:
    """Combine options into one decorator, in the order that help shows them."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def grouped(name: str, kind: type[Any], *shown: Decorator) -> Decorator:
    """Combine options into one decorator that passes their values as parameter ``name``, an instance of ``kind``.

    Each field of ``kind`` takes the option of its name, from any decorator of the command, or else its default.
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
    """Backbone, arithmetic, runtime and device. ``model`` and ``pretrained`` are ``None`` for the default."""

    model: str | None
    pretrained: str | None
    device: str
    precision: Precision = "auto"
    runtime: Runtime = "auto"


@dataclass(frozen=True)
class ReadingOptions:
    """Dataset and part to read from a source, and the folder that relative paths start from."""

    dataset: str | None = None
    split: str | None = None
    root: Path | None = None

    def without_split(self) -> ReadingOptions:
        """Return the options for a second source, without the part chosen for the first."""
        return replace(self, split=None)


@dataclass(frozen=True)
class ViewOptions:
    """Number of views averaged per key, and the seed for drawing shots and views."""

    views: int = 1
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(BackboneOptions):
    """Options for encoding: backbone, feature norms, batches, threads and the encoding cache."""

    norms: Norms
    batch_size: int | None
    workers: int
    cache: Path | None
    no_cache: bool
    reduce: bool
    strict: bool

    def encoder(self, views: ViewOptions | None = None) -> Encoder:
        """Return an encoder without backbone and cache; ``None`` encodes the centre view."""
        from retrieval_tip.data.encoder import Encoder

        return Encoder(
            norms=self.norms, batch_size=self.batch_size, workers=self.workers, reduce=self.reduce, strict=self.strict,
            **vars(views or ViewOptions()),
        )  # fmt: skip


@dataclass(frozen=True)
class AnswerOptions:
    """Settings that override the index's own, a condition on the keys, and how to check the index."""

    k: KeysMet = None
    tail: bool | None = None
    alpha: float | None = None
    beta: float | None = None
    where: str | None = None
    verify: Verify | None = None


@dataclass(frozen=True)
class EngineOptions:
    """Engine that runs the work: this process or the actors of a Ray cluster."""

    engine: str
    actors: int | None
    ray_address: str | None

    @property
    def is_ray(self) -> bool:
        """Whether the work runs on Ray. Raises UsageError for Ray's options with another engine."""
        if self.engine != "ray" and (self.actors or self.ray_address):
            raise UsageError(f"--{'actors' if self.actors else 'ray-address'}: needs --engine ray")
        return self.engine == "ray"


@dataclass(frozen=True)
class OutputOptions:
    """Output format and file; ``None`` for the default format and for standard output."""

    named: str | None
    output: Path | None

    @property
    def style(self) -> str:
        """Given format, or the format of the file's suffix. Raises UsageError for an unknown suffix."""
        suffix = Path(self.output).suffix.lower() if self.output else ""  # it may be a URL
        style = self.named or _SUFFIXES.get(suffix)
        if style is None:
            known = ", ".join(name for name in _SUFFIXES if name)
            raise UsageError(
                f"--output {show(str(self.output))}: unknown suffix {suffix}; use {known} or give --format"
            )
        return "json" if style == "jsonl" else style


_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
_SUFFIXES |= {".txt": "table", "": "table"}


BACKBONE_OPTION = under("Encoder")
READING_OPTION = under("Input", folded=True)
ANSWER_OPTION = under("Answers")
OUTPUT_OPTION = under("Output")
ENGINE_OPTION = under("Distributed with Ray", folded=True)

VERIFY = ANSWER_OPTION("--verify", type=choice(Verify),
                       help="Check of the index before use; full: every byte, fast: only the size of large files.  "
                            "[default: full; fast at an address]")  # fmt: skip
ROOT = READING_OPTION("--root", type=FOLDER, help="Folder that relative paths in a table or split .json start from.")
NORMS = READING_OPTION("--norms", type=choice(Norms), default="check", show_default=True,
                       help="Norms of feature rows; check: must be 1, unit: scale to 1, keep: accept any.")  # fmt: skip
DEVICE = BACKBONE_OPTION("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:N.")
PRECISION = BACKBONE_OPTION(
    "--precision", type=choice(Precision), default="auto", show_default=True,
    help="Arithmetic of the encoder (auto: float32; on a GPU, float16 autocast) and of the products with all keys "
         "(auto: the fastest that is measured to be accurate).",
)  # fmt: skip
MODEL = several(
    BACKBONE_OPTION(
        "--model",
        help="An open_clip architecture, timm:NAME, local-dir:PATH, hf-hub:ORG/REPO or hf:ORG/REPO (see retrieval-tip"
        " models).  [default: ViT-B-32]",
    ),
    BACKBONE_OPTION(
        "--pretrained",
        help="Weights: a tag, a checkpoint file, or TAG=FILE for a local copy.  [default: the recommended tag]",
    ),
)
BACKBONE = several(
    MODEL,
    PRECISION,
    BACKBONE_OPTION("--runtime", type=choice(Runtime), default="auto", show_default=True,
                    help="Runtime for encoding images on a CPU; auto: OpenVINO if its features match torch's."),
)  # fmt: skip
READING = grouped(
    "reading", ReadingOptions,
    READING_OPTION("--dataset", metavar="NAME",
                   help="Known dataset (see datasets list); SOURCE is the folder that holds its folder."),
    READING_OPTION("--split", help="Part of a split .json or dataset: train, val or test."),
    ROOT,
)  # fmt: skip
ENCODING = grouped(
    "encoding", EncodingOptions,
    NORMS,
    READING_OPTION("--batch-size", type=count("batch_size"),
                   help="Images encoded at a time.  [default: the encoder's best, 16 on a CPU, 256 on a GPU]"),
    READING_OPTION("--workers", type=count("workers"), default=min(16, os.cpu_count() or 1), show_default="cores",
                   help="Number of threads that read and decode images."),
    READING_OPTION("--cache", type=FOLDER,
                   help="Folder of the encoding cache.  [default: $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip]"),
    READING_OPTION("--no-cache", is_flag=True, help="Do not use the encoding cache."),
    READING_OPTION("--reduce/--no-reduce", default=True, show_default=True,
                   help="Decode large JPEGs at reduced size for the centre view: faster, with nearly the same "
                        "features."),
    READING_OPTION("--strict", is_flag=True, help="Fail on the first image that cannot be read."),
    DEVICE,
)  # fmt: skip
VIEWS = grouped(
    "views", ViewOptions,
    click.option("--views", type=VIEWS_COUNT, default=1, show_default=True,
                 help="Views averaged per key; 1: the centre view, more: augmented views, as in the paper."),
    click.option("--seed", type=SEED, default=1, show_default=True, help="Seed for drawing shots and views."),
)  # fmt: skip
LETTERS = several(
    click.option("--metric", type=choice(MetricName),
                 help="Similarity; within: directions in which photos of one class differ count less.  "
                      "[default: chosen on the shots]"),
    click.option("--values", type=choice(ValuesName),
                 help="Weights of keys for classes; solved: by ridge regression.  [default: chosen on the shots]"),
)  # fmt: skip
ANSWER = grouped(
    "answer",
    AnswerOptions,
    ANSWER_OPTION("-k", "k", type=K(), help="Number of nearest keys used per query.  [default: the index's]"),
    ANSWER_OPTION("--tail/--no-tail", default=None,
                  help="Estimate the contribution of keys that are not retrieved.  [default: the index's]"),
    ANSWER_OPTION("--alpha", type=NUMBER, help="Weight of the cache relative to the text.  [default: the index's]"),
    ANSWER_OPTION("--beta", type=NUMBER, help="Sharpness of the affinity.  [default: the index's]"),
    ANSWER_OPTION("--where", metavar="SQL", help="Condition over the label store; only matching keys are used."),
    VERIFY,
)  # fmt: skip
ENGINE = grouped(
    "engine", EngineOptions,
    ENGINE_OPTION("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, is_eager=True,
                  help="Where to run; ray: actors on this machine or a cluster, which write a folder of parts, on disk "
                       "or in a bucket. Running the command again completes the folder."),
    ENGINE_OPTION("--actors", type=count("actors"), metavar="N",
                  help="Maximum number of Ray actors.  [default: one per GPU, or up to 8 per node]"),
    ENGINE_OPTION("--ray-address", metavar="HOST:PORT",
                  help="Head of a Ray cluster, or auto.  [default: start Ray on this machine]"),
)  # fmt: skip
PROTOCOL = click.option("--protocol", type=choice(Protocol), default="honest", show_default=True,
                        help="How to choose settings; paper: published grid on the whole validation "
                             "source.")  # fmt: skip
SCALES = click.option("--scales", type=(POSITIVE, POSITIVE), metavar="X X", default=(7.0, 3.0), show_default=True,
                       help="Largest beta and alpha of the published grid.")  # fmt: skip
FORMAT = grouped(
    "printing", OutputOptions,
    OUTPUT_OPTION("--format", "named", type=click.Choice(["table", "json", "jsonl", "csv", "parquet"]),
                  help="Output format; json and jsonl: one object per line.  [default: by the suffix of --output, else "
                       "table]"),
    OUTPUT_OPTION("--output", type=OUTPUT, help="File to write instead of standard output."),
)  # fmt: skip
JSON = OUTPUT_OPTION("--json", "as_json", is_flag=True, help="Print one JSON object.")
