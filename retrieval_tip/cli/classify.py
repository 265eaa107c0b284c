"""The commands that make features and answers of images: ``encode`` and ``classify``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli.group import command
from retrieval_tip.cli.messages import about, finish, say, say_skipped
from retrieval_tip.cli.on_ray import asked_of, encoding_for, encoding_of, named, parts, ray_of, shards_of
from retrieval_tip.cli.opening import backbone_of, encoder_for, encoder_of, index_with, source_of
from retrieval_tip.cli.options import (
    ANSWER,
    ANSWER_OPTION,
    BACKBONE,
    ENCODING,
    ENGINE,
    FORMAT,
    READING,
    VIEWS,
    AnswerOptions,
    EncodingOptions,
    EngineOptions,
    OutputOptions,
    ReadingOptions,
    ViewOptions,
    grouped,
)
from retrieval_tip.cli.parameters import INDEX, OUTPUT, SOURCE, Abstaining, count
from retrieval_tip.cli.stdin import paths_on_stdin
from retrieval_tip.errors import UsageError, show

if TYPE_CHECKING:
    from retrieval_tip.answering import AnsweringIndex
    from retrieval_tip.index.places import Place
    from retrieval_tip.predictions import Abstain


@command()
@click.argument("source", type=SOURCE)
@click.option("--out", type=OUTPUT, required=True, help="Feature table to write (.parquet).")
@ENGINE
@BACKBONE
@VIEWS
@READING
@ENCODING
@click.pass_context
def encode(
    ctx: click.Context,
    source: Path | str,
    out: Path | str,
    engine: EngineOptions,
    views: ViewOptions,
    reading: ReadingOptions,
    encoding: EncodingOptions,
) -> None:
    """Encode images into a feature table.

    The table serves wherever images do. SOURCE as for index build, or a folder of images without labels. With --engine
    ray, --out is a folder of parts, which serves as the table does.
    """
    from retrieval_tip.data.encoder import encode_table

    ray = ray_of(ctx, engine, encoding.device)
    if ray is not None:
        from retrieval_tip.distributed import tasks

        shards = shards_of(source, reading, ray.size, "train", labelled=False)
        name = None if all(shard.features for shard in shards) else named(encoding)
        how = encoding_of(encoding, name, views)
        made = tasks.encode(shards, out, how, ray, say=say_skipped)
        about(out, f"{made.rows} rows{parts(made)}")
        finish(ctx, made.failed)
        return
    items = source_of(source, reading, "train", labelled=False)
    with encoder_of(ctx, backbone_of(items, encoding), encoding, views) as encoder:
        rows = encode_table(items, out, encoder)
    about(out, f"{rows} rows")
    finish(ctx, encoder.skipped)


@dataclass(frozen=True)
class RowOptions:
    """The classes, reasons and logits that the row of an input has, and when its answer is withheld."""

    top: int
    explain: bool
    neighbours: int
    with_logits: bool
    certify: bool
    abstain: Abstain

    @property
    def shown_neighbours(self) -> int:
        """Neighbours that are shown."""
        return self.neighbours if self.explain else 0

    def columns(self, cache: AnsweringIndex) -> list[str]:
        """The columns of a row of an index."""
        columns = ["input", "label", "probability"]
        columns += ["unlike"] if cache.settings.least_cache is not None else []
        columns += ["labels", "probabilities"] if self.top > 1 else []
        columns += ["logits"] if self.with_logits else []
        columns += ["text_logit", "cache_logit", "neighbours", "opposing"] if self.explain else []
        return columns + (["keys"] if self.certify else [])


_ROWS = grouped(
    "rows", RowOptions,
    ANSWER_OPTION("--top", type=count(), default=1, show_default=True, help="Classes to report."),
    ANSWER_OPTION("--explain", is_flag=True, help="Shots that contributed most; text and cache logits of the answer."),
    ANSWER_OPTION("--neighbours", type=count(), default=5, show_default=True, help="Shots shown by --explain."),
    ANSWER_OPTION("--logits", "with_logits", is_flag=True, help="Logits of every class, in the index's order."),
    ANSWER_OPTION("--certify", is_flag=True,
                 help="More keys where k do not settle an answer, at last all; says how many took what."),
    ANSWER_OPTION("--abstain", type=Abstaining(),
                 help="Withhold answers of a probability below P; auto: below 0.5, or unlike any shot."),
)  # fmt: skip


@command()
@click.argument("folder", type=INDEX)
@click.argument("inputs", nargs=-1, required=True)
@ANSWER
@_ROWS
@ENGINE
@FORMAT
@BACKBONE
@ENCODING
@click.pass_context
def classify(
    ctx: click.Context,
    folder: Place,
    inputs: tuple[str, ...],
    answer: AnswerOptions,
    rows: RowOptions,
    engine: EngineOptions,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths, feature tables, or - for paths on standard input. With
    --abstain, an answer of a lower probability has no label (null, in a table -) and keeps its probability. unlike says
    that it is unlike any shot, where the index was fitted. With
    --engine ray, --output is a folder of Parquet parts.
    """
    import pyarrow as pa

    from retrieval_tip.cli.output import prediction_details, write_tables
    from retrieval_tip.data.sources import open_inputs
    from retrieval_tip.predictions import PREDICTIONS

    ray = ray_of(ctx, engine, encoding.device)
    loaded = index_with(folder, answer, encoding)
    if ray is not None:
        from retrieval_tip.distributed import tasks
        from retrieval_tip.distributed.shards import cut_inputs

        if printing.style != "parquet" or printing.output is None:
            raise UsageError("--engine ray writes parts: give --format parquet and --output FOLDER")
        shards = cut_inputs(inputs, paths_on_stdin(), ray.size)
        how = encoding_for(loaded, shards, encoding)
        asked = asked_of(loaded, answer, encoding.precision)
        shown = tasks.Rows(rows.columns(loaded), rows.top, rows.shown_neighbours, rows.certify, rows.abstain)
        made = tasks.classify(folder, shards, printing.output, how, ray, asked=asked, rows=shown, say=say_skipped)
        say(f"{show(printing.output)}: {made.rows} rows{parts(made)}")
        if made.settled:
            _say_settled(loaded, made.settled)
        finish(ctx, made.failed)
        return
    sources = list(open_inputs(inputs, paths_on_stdin()))
    columns = rows.columns(loaded)
    schema = pa.schema([(column, PREDICTIONS[column]) for column in columns])
    settled: Counter[int] = Counter()
    with encoder_for(ctx, loaded, sources, encoding) as encoder:

        def answers() -> Iterator[pa.Table]:
            for source in sources:
                for block in loaded.classify_source(
                    source, encoder, rows.top, neighbours=rows.shown_neighbours, certify=rows.certify
                ):
                    table = block.written(columns, rows.abstain)
                    settled.update(table["keys"].to_pylist() if rows.certify else ())
                    yield table

        known = {"input": chain.from_iterable(source.sources for source in sources), "label": loaded.class_names}
        write_tables(answers(), schema, printing.style, printing.output, prediction_details, known)
    if rows.certify:
        _say_settled(loaded, settled)
    finish(ctx, encoder.skipped)


def _say_settled(cache: AnsweringIndex, settled: dict[int, int]) -> None:
    """Say how many answers took how many keys."""
    how = "proved" if cache.exact_search else "agreed with"
    by = (f"{number} by {'all' if keys == cache.n else keys} keys" for keys, number in sorted(settled.items()))
    say(f"{how} the answer of all keys: {', '.join(by)}")
