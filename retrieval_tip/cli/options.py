"""Options shared by several commands. Each group of options is passed to a command as one parameter."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from retrieval_tip import settings
from retrieval_tip.cli import kinds
from retrieval_tip.cli.group import grouped
from retrieval_tip.cli.kinds import Place
from retrieval_tip.errors import UsageError
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.wording import show

if TYPE_CHECKING:
    import pyarrow as pa


def choice(alias: object) -> click.Choice[str]:
    """Return an option type that accepts the values of a ``Literal``."""
    return click.Choice(get_args(alias))


ENCODER = {"heading": "Encoder"}
INPUT = {"heading": "Input"}
ANSWERS = {"heading": "Answers"}
OUTPUTS = {"heading": "Output"}
"""The headings of options."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Options that select a backbone, its precision and its device.

    Options:
        model: Encoder to use: an open_clip architecture, timm:NAME, local-dir:PATH, hf-hub:ORG/REPO or hf:ORG/REPO. Run
            retrieval-tip models for a list. Write its weights after @: a tag, a checkpoint file, or TAG=FILE for a
            local copy. Several encoders are joined, as with a + in ViT-B-32@openai+timm:resnet18. [default: ViT-B-32]
        precision: Precision of the encoder. With auto, it is float32, and float16 autocast on a GPU. With int8, the
            encoder is the one that models --int8 stored.
        device: Device to use: auto, cpu, cuda or cuda:N.
    """

    model: str | None = option(
        multiple=True, callback=lambda *given: "+".join(given[-1]) or None, **ENCODER
    )
    precision: settings.Precision = option(
        choice(settings.Precision), default="auto", **ENCODER, rare=True
    )
    device: str = option(default="auto", **ENCODER, rare=True)


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(BackboneOptions):
    """Options for encoding images: the backbone, feature norms, batches, threads and the encoding cache.

    Options:
        norms: How to treat the norms of feature rows. With check, they must be 1. With unit, they are scaled to 1. With
            keep, any norm is accepted.
        batch_size: Number of images to encode at a time. [default: the best size for the encoder, 16 on a CPU, 256 on a
            GPU]
        workers: Number of threads that read and decode images.
        no_cache: Do not use the encoding cache, which is in $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip.
        strict: Fail on the first image that cannot be read.
    """

    norms: settings.Norms = option(choice(settings.Norms), default="check", **INPUT, rare=True)
    batch_size: int | None = option(kinds.count("batch_size"), **INPUT, rare=True)
    workers: int = option(
        kinds.count("workers"),
        default=min(16, os.cpu_count() or 1),
        show_default="number of cores",
        **INPUT,
        rare=True,
    )
    no_cache: bool = flag(**INPUT, rare=True)
    strict: bool = flag(**INPUT, rare=True)
    views: int = 1
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class SourceOptions(EncodingOptions):
    """Part to read from a source, the folder for relative paths, and the options for encoding images.

    Options:
        split: Part of a folder, a dataset or a split .json to use: train, val or test.
        root: Folder or bucket for the relative paths in a table or .json.
    """

    split: str | None = option(**INPUT)
    root: Place | None = option(kinds.SOURCE, **INPUT)


@dataclass(frozen=True, kw_only=True)
class ViewOptions(SourceOptions):
    """How to draw shots and views of a source, and the options for reading it.

    Options:
        views: Number of views to average per key. With 1, the centre view is used; with more, augmented views are used,
            as in the paper.
        seed: Seed for drawing shots and views.
    """

    views: int = option(kinds.VIEWS_COUNT, default=1, rare=True)
    seed: int = option(kinds.SEED, default=1, rare=True)


@dataclass(frozen=True)
class OpeningOptions:
    """A condition on the keys of an index, and how to check its files.

    Options:
        where: SQL condition on the label store. Only keys that match it are used.
        verify: How to check the index before use. With full, every byte is checked. With fast, only the size of large
            files is checked. [default: full; fast at an address]
    """

    where: str | None = option(metavar="SQL", **ANSWERS, rare=True)
    verify: settings.Verify | None = option(choice(settings.Verify), **ANSWERS, rare=True)


FORMATS = ("table", "json", "csv", "parquet")
_SUFFIXES = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "table",
    "": "table",
}


def _joined(cell: object) -> object:
    return ", ".join(cell) if isinstance(cell, list) else cell


@dataclass(frozen=True)
class OutputOptions:
    """Output format and output file. ``None`` means the default format and standard output.

    Options:
        named: Output format. With json, each line is an object. [default: given by the suffix of --out, or
            table]
        output: File to write to instead of standard output.
    """

    named: str | None = option(click.Choice(FORMATS), "--format", **OUTPUTS)
    output: Path | None = option(kinds.OUTPUT, "--out", "-o", **OUTPUTS)

    @property
    def style(self) -> str:
        """Output format, from --format or the suffix of the file. Raises UsageError if the suffix is unknown."""
        suffix = Path(self.output).suffix.lower() if self.output else ""  # it may be a URL
        style = self.named or _SUFFIXES.get(suffix)
        if style is None:
            suffixes = ", ".join(name for name in _SUFFIXES if name)
            raise UsageError(
                f"--out {show(str(self.output))}: unknown suffix {suffix}; use {suffixes} or give --format"
            )
        return style

    def write_rows(self, rows: Iterable[Sequence[object]], types: Mapping[str, type]) -> None:
        """Write rows whose columns have these types. Lists contain texts, which a table joins with commas."""
        import pyarrow as pa

        arrow_types = {
            str: pa.string(),
            int: pa.int64(),
            float: pa.float64(),
            bool: pa.bool_(),
            list: pa.list_(pa.string()),
        }
        if self.style == "table":
            arrow_types[list] = pa.string()
            rows = [[_joined(cell) for cell in row] for row in rows]
        schema = pa.schema([(name, arrow_types[kind]) for name, kind in types.items()])
        cells = [dict(zip(types, row, strict=True)) for row in rows]
        self.write_table(pa.Table.from_pylist(cells, schema))

    def write_table(self, table: pa.Table, *, predictions: bool = False) -> None:
        """Write a table, which may have ``predictions`` (see :func:`output.write_tables`)."""
        from retrieval_tip.cli.output import write_table

        write_table(table, self.style, self.output, predictions=predictions)


PHOTOS = argument(nargs=-1, required=True, metavar="PHOTOS...")
INDEX_ARGUMENT = argument(kinds.INDEX, metavar="INDEX")
"""Argument of a command that works on an index in any store."""
FOLDER_ARGUMENT = argument(kinds.FOLDER, metavar="INDEX")
"""Argument of a command that requires an index in a folder."""
BACKBONE, ENCODING, SOURCES = map(grouped, (BackboneOptions, EncodingOptions, SourceOptions))
ROOTED = grouped(SourceOptions, without=("split",))
VIEWS, OPENING, FORMAT = map(grouped, (ViewOptions, OpeningOptions, OutputOptions))
JSON = flag("--json", help="Print the result as one JSON object.", **OUTPUTS)
ASKING = {
    "k": option(kinds.KEYS, "-k", **ANSWERS, rare=True),
    "tail": option(None, "--tail/--no-tail", default=None, **ANSWERS, rare=True),
    "alpha": option(kinds.NUMBER, **ANSWERS, rare=True),
    "beta": option(kinds.NUMBER, **ANSWERS, rare=True),
}
"""The options of :class:`settings.Ask` that change the settings of an index."""
LEVELS = {
    "at_least": option(kinds.SHARE, metavar="P", **ANSWERS),
    "coverage": option(kinds.SHARE, metavar="C", **ANSWERS, rare=True),
}
"""The options of :class:`settings.Ask` that let an answer have another form than one class."""
_BUILD = {
    "shots": option(kinds.SHOTS),
    "templates": option(None, "--template", multiple=True),
    "text": option(kinds.FILE, rare=True),
    "index": option(rare=True),
    "dtype": option(choice(settings.Dtype), default="float32", show_default=False, rare=True),
    "alpha": option(kinds.NUMBER, rare=True),
    "beta": option(kinds.NUMBER, rare=True),
    "fit": option(choice(settings.FitName)),
    "metric": option(choice(settings.MetricName), rare=True),
    "values": option(choice(settings.ValuesName), rare=True),
    "class_prior": option(choice(settings.ClassPrior), rare=True),
    "prior": option(kinds.INDEX, multiple=True, rare=True),
    "k": option(kinds.KEYS, "-k", rare=True),
    "logit_scale": option(kinds.POSITIVE, rare=True),
    "features": option(multiple=True, metavar="COLUMN,...", callback=kinds.names, rare=True),
    "groups": option(kinds.FILE, metavar="TABLE", rare=True),
}


def building(*names: str) -> Any:
    """Declare some options of :class:`settings.BuildOptions`, or by default all. Its documentation is their help."""
    return grouped(settings.BuildOptions, {name: _BUILD[name] for name in names or _BUILD})
