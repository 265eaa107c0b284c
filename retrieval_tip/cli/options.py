"""Options shared by several commands. Each group of options is passed to a command as a frozen dataclass."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from retrieval_tip.cli.group import Function, under
from retrieval_tip.cli.parameters import (
    FILE,
    FOLDER,
    INDEX,
    NUMBER,
    OUTPUT,
    POSITIVE,
    SEED,
    SHOTS,
    SOURCE,
    VIEWS_COUNT,
    K,
    count,
)
from retrieval_tip.errors import UsageError, show
from retrieval_tip.settings import (
    Ask,
    BuildOptions,
    ClassPrior,
    Dtype,
    FitName,
    MetricName,
    Normalize,
    Norms,
    Precision,
    Runtime,
    ValuesName,
    Verify,
)

if TYPE_CHECKING:
    from retrieval_tip.data.encoder import Encoder

Decorator = Callable[[Function], Function]


def choice(alias: object) -> click.Choice[str]:
    """Return an option type that accepts the values of a ``Literal``."""
    return click.Choice(get_args(alias))


def several(*options: Decorator) -> Decorator:
    """Combine options into one decorator."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def grouped(name: str, kind: type[Any], *shown: Decorator) -> Decorator:
    """Combine options into one decorator that passes their values to the command as one parameter.

    The parameter ``name`` is an instance of ``kind``. Each field takes the value of the option with the same name, from
    any decorator of the command. Without such an option, the field keeps its default.
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
    """Options that select a backbone, its precision, its runtime and its device."""

    model: str | None = None
    pretrained: str | None = None
    device: str
    precision: Precision = "auto"
    runtime: Runtime = "auto"


@dataclass(frozen=True)
class ReadingOptions:
    """Dataset and part to read from a source, and the folder against which relative paths are resolved."""

    dataset: str | None = None
    split: str | None = None
    root: Path | str | None = None

    def without_split(self) -> ReadingOptions:
        """Return the options for a second source, which does not use the ``split`` of the first."""
        return replace(self, split=None)


@dataclass(frozen=True)
class ViewOptions:
    """Number of views to average per key, and the seed for drawing shots and views."""

    views: int = 1
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(BackboneOptions):
    """Options for encoding images: the backbone, feature norms, batches, threads and the encoding cache."""

    norms: Norms
    batch_size: int | None
    workers: int
    cache: Path | None
    no_cache: bool
    reduce: bool
    strict: bool

    def encoder(self, views: ViewOptions | None = None) -> Encoder:
        """Return an encoder that has no backbone and no cache. By default, it uses the centre view."""
        from retrieval_tip.data.encoder import Encoder

        return Encoder(
            norms=self.norms, batch_size=self.batch_size, workers=self.workers, reduce=self.reduce, strict=self.strict,
            **vars(views or ViewOptions()),
        )  # fmt: skip


@dataclass(frozen=True)
class OpeningOptions:
    """A condition on the keys of an index, and how to check its files."""

    where: str | None = None
    verify: Verify | None = None


@dataclass(frozen=True)
class EngineOptions:
    """Options that run the work in this process or on the actors of a Ray cluster."""

    engine: str
    actors: int | None
    ray_address: str | None

    @property
    def is_ray(self) -> bool:
        """Whether the work runs on Ray. Raises UsageError if Ray options are given for another engine."""
        if self.engine != "ray" and (self.actors or self.ray_address):
            raise UsageError(f"--{'actors' if self.actors else 'ray-address'}: needs --engine ray")
        return self.engine == "ray"


@dataclass(frozen=True)
class OutputOptions:
    """Output format and output file. ``None`` means the default format and standard output."""

    named: str | None
    output: Path | None

    @property
    def style(self) -> str:
        """Output format, from --format or the suffix of the file. Raises UsageError if the suffix is unknown."""
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
                       help="How to check the index before use. With full, every byte is checked. With fast, only the "
                            "size of large files is checked.  [default: full; fast at an address]")  # fmt: skip
ROOT = READING_OPTION("--root", type=SOURCE,
                      help="Folder or bucket for the relative paths in a table or .json.")  # fmt: skip
NORMS = READING_OPTION("--norms", type=choice(Norms), default="check", show_default=True,
                       help="How to treat the norms of feature rows. With check, they must be 1. With unit, they are "
                            "scaled to 1. With keep, any norm is accepted.")  # fmt: skip
DEVICE = BACKBONE_OPTION("--device", default="auto", show_default=True,
                         help="Device to use: auto, cpu, cuda or cuda:N.")  # fmt: skip
PRECISION = BACKBONE_OPTION(
    "--precision", type=choice(Precision), default="auto", show_default=True,
    help="Precision of the encoder and of the products with all keys. With auto, both use float32, and an encoder on "
         "a GPU uses float16 autocast. With int8, the encoder is the one that models --int8 stored, and the products "
         "use float32.",
)  # fmt: skip
MODEL = several(
    BACKBONE_OPTION(
        "--model",
        help="Encoder to use: an open_clip architecture, timm:NAME, local-dir:PATH, hf-hub:ORG/REPO or hf:ORG/REPO. "
        "Run retrieval-tip models for a list.  [default: ViT-B-32]",
    ),
    BACKBONE_OPTION(
        "--pretrained",
        help="Weights to load: a tag, a checkpoint file, or TAG=FILE for a local copy.  [default: the recommended tag]",
    ),
)
MODELS = several(
    BACKBONE_OPTION(
        "--model", "models", multiple=True,
        help="Encoder to compare (see retrieval-tip models). Can be repeated.",
    ),
    BACKBONE_OPTION(
        "--pretrained", "weights", multiple=True,
        help="Weights of each --model, in the same order: a tag, a checkpoint file, or auto for the recommended tag.  "
             "[default: auto]",
    ),
)  # fmt: skip
BACKBONE = several(
    MODEL,
    PRECISION,
    BACKBONE_OPTION("--runtime", type=choice(Runtime), default="auto", show_default=True,
                    help="Runtime for encoding images on a CPU. With auto, OpenVINO is used if it gives the same "
                         "features as torch."),
)  # fmt: skip
READING = grouped(
    "reading", ReadingOptions,
    READING_OPTION("--dataset", metavar="NAME",
                   help="Name of a common dataset in CoOp's layout, such as Caltech101. SOURCE is then the folder that "
                        "contains the folder of the dataset."),
    READING_OPTION("--split", help="Part of a split .json or dataset to use: train, val or test."),
    ROOT,
)  # fmt: skip
ENCODING = grouped(
    "encoding", EncodingOptions,
    NORMS,
    READING_OPTION("--batch-size", type=count("batch_size"),
                   help="Number of images to encode at a time.  [default: the best size for the encoder, 16 on a "
                        "CPU, 256 on a GPU]"),
    READING_OPTION("--workers", type=count("workers"), default=min(16, os.cpu_count() or 1),
                   show_default="number of cores", help="Number of threads that read and decode images."),
    READING_OPTION("--cache", type=FOLDER,
                   help="Folder of the encoding cache.  [default: $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip]"),
    READING_OPTION("--no-cache", is_flag=True, help="Do not use the encoding cache."),
    READING_OPTION("--reduce/--no-reduce", default=True, show_default=True,
                   help="Whether to decode large JPEGs at a reduced size for the centre view. This is faster and gives "
                        "nearly the same features."),
    READING_OPTION("--strict", is_flag=True, help="Fail on the first image that cannot be read."),
    DEVICE,
)  # fmt: skip
VIEWS = grouped(
    "views", ViewOptions,
    click.option("--views", type=VIEWS_COUNT, default=1, show_default=True,
                 help="Number of views to average per key. With 1, the centre view is used; with more, augmented views "
                      "are used, as in the paper."),
    click.option("--seed", type=SEED, default=1, show_default=True, help="Seed for drawing shots and views."),
)  # fmt: skip
INDEX_ARGUMENT = click.argument("folder", type=INDEX, metavar="INDEX")
"""Argument of a command that works on an index in any store."""
FOLDER_ARGUMENT = click.argument("folder", type=FOLDER, metavar="INDEX")
"""Argument of a command that requires an index in a folder."""
_BUILD: dict[str, dict[str, Any]] = {
    "shots": {"type": SHOTS},
    "templates": {"multiple": True},
    "text": {"type": FILE},
    "index": {},
    "dtype": {"type": choice(Dtype), "default": "float32"},
    "alpha": {"type": NUMBER},
    "beta": {"type": NUMBER},
    "normalize": {"type": choice(Normalize)},
    "fit": {"type": choice(FitName)},
    "metric": {"type": choice(MetricName)},
    "values": {"type": choice(ValuesName)},
    "class_prior": {"type": choice(ClassPrior)},
    "prior": {"type": INDEX, "multiple": True},
    "k": {"type": K()},
    "logit_scale": {"type": POSITIVE},
    "drop_suspicious": {"is_flag": True},
}


def building(*names: str) -> Decorator:
    """Return some options of :class:`settings.BuildOptions`, or by default all. Its documentation is their help."""
    _, *parts = re.split(r"^    (\w+): ", inspect.cleandoc(BuildOptions.__doc__ or ""), flags=re.MULTILINE)
    told = dict(zip(parts[::2], parts[1::2], strict=True))
    shown = []
    for name in names or _BUILD:
        help_ = re.sub(r" \(see :\w+:`[^`]*`\)", "", " ".join(told[name].split()))
        help_ = re.sub(r"^(The|A) (\w)", lambda article: article[2].upper(), help_)
        option = {"k": "-k", "templates": "--template"}.get(name, f"--{name.replace('_', '-')}")
        repeated = " Can be repeated." if _BUILD[name].get("multiple") else ""
        shown.append(click.option(option, name, help=help_ + repeated, **_BUILD[name]))
    return several(*shown)


ASKING = several(
    ANSWER_OPTION("-k", "k", type=K(),
                  help="Number of nearest keys to use per query.  [default: the setting of the index]"),
    ANSWER_OPTION("--tail/--no-tail", default=None,
                  help="Whether to estimate the contribution of keys that are not retrieved.  "
                       "[default: the setting of the index]"),
    ANSWER_OPTION("--alpha", type=NUMBER,
                  help="Weight of the cache relative to the text.  [default: the setting of the index]"),
    ANSWER_OPTION("--beta", type=NUMBER,
                  help="Sharpness of the affinity.  [default: the setting of the index]"),
)  # fmt: skip
"""The options of :class:`settings.Ask` that change the settings of an index."""
OPENING = grouped(
    "opening", OpeningOptions,
    ANSWER_OPTION("--where", metavar="SQL",
                  help="SQL condition on the label store. Only keys that match it are used."),
    VERIFY,
)  # fmt: skip
ANSWER = several(grouped("ask", Ask, ASKING), OPENING)
ENGINE = grouped(
    "engine", EngineOptions,
    ENGINE_OPTION("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, is_eager=True,
                  help="Where to run the command. With ray, actors on this machine or a cluster write a folder of "
                       "parts, which can be on disk or in a bucket. If the command is interrupted, run it again to "
                       "complete the folder."),
    ENGINE_OPTION("--actors", type=count("actors"), metavar="N",
                  help="Maximum number of Ray actors.  [default: one per GPU, or up to 8 per node]"),
    ENGINE_OPTION("--ray-address", metavar="HOST:PORT",
                  help="Address of the head of a Ray cluster, or auto.  [default: start Ray on this machine]"),
)  # fmt: skip


def printed_as(*more: str) -> Decorator:
    """Return the options of :class:`OutputOptions`, with ``more`` formats."""
    formats = ["table", "json", "jsonl", "csv", "parquet", *more]
    return grouped(
        "printing", OutputOptions,
        OUTPUT_OPTION("--format", "named", type=click.Choice(formats),
                      help="Output format. With json and jsonl, each line is an object.  [default: given by the "
                           "suffix of --output, or table]"),
        OUTPUT_OPTION("--output", type=OUTPUT, help="File to write to instead of standard output."),
    )  # fmt: skip


FORMAT = printed_as()
JSON = OUTPUT_OPTION("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
