"""The commands ``encode`` and ``classify``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.messages import about, finish, say, warn
from retrieval_tip.cli.opening import UNNAMED, backbone_of, encoder_for, encoder_of, index_with, name_of, source_of
from retrieval_tip.cli.options import (
    EncodingOptions,
    EngineOptions,
    OpeningOptions,
    OutputOptions,
    ReadingOptions,
    ViewOptions,
)
from retrieval_tip.cli.parameters import BURST_SECONDS, FILE, OUTPUT, SOURCE, Abstaining, Bursts, count
from retrieval_tip.cli.stdin import paths_on_stdin
from retrieval_tip.errors import InputError, Skipped, UsageError, counted, show
from retrieval_tip.settings import Ask

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval_tip.data.boxes import Cut
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.data.exif import Noting
    from retrieval_tip.data.sources import Source
    from retrieval_tip.distributed.ray_data import Piece, Question
    from retrieval_tip.index.places import Place
    from retrieval_tip.model import Index
    from retrieval_tip.predictions import Abstain


@command()
@click.argument("source", type=SOURCE)
@click.option("--out", type=OUTPUT, required=True, help="Feature table to write (.parquet).")
@options.ENGINE
@options.BACKBONE
@options.VIEWS
@options.READING
@options.ENCODING
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

    You can give the table to every command that reads images. SOURCE can be anything that index build accepts, or a
    folder of unlabelled images. With --engine ray, --out is a folder of Parquet parts, which you can use like a table.
    """
    from retrieval_tip.data.encoder import encode_table

    if engine.is_ray:
        from retrieval_tip.data import tars
        from retrieval_tip.distributed.ray_data import cut

        found = None if reading.dataset else tars.find(str(source))
        pieces = found or cut(source_of(source, reading, "train", labelled=False))
        what, skipped = _on_ray(ctx, pieces, out, engine, encoding, views=views)
        about(out, what)
        finish(ctx, skipped)
        return
    items = source_of(source, reading, "train", labelled=False)
    with encoder_of(ctx, backbone_of(items, encoding), encoding, views) as encoder:
        rows = encode_table(items, out, encoder)
    about(out, f"{rows} rows")
    finish(ctx, encoder.skipped)


DOCUMENTS = ("coco", "fiftyone", "label-studio")
"""Formats for other programs (see :data:`exchange.FORMATS`)."""


@dataclass(frozen=True)
class RowOptions:
    """A question, the columns of its answers, and the rule for withholding a label.

    ``group_by`` is the number of seconds between the photos of a burst.
    """

    ask: Ask
    explain: bool
    abstain: Abstain
    group_unlike: bool
    exif: bool
    group_by: float | None
    boxes: Path | None

    def check(self, cache: Index, engine: EngineOptions, style: str | None) -> None:
        """Raise UsageError if options exclude each other, or if the index cannot group photos."""
        of_one = {"--explain": self.explain, "--logits": self.ask.logits, "--certify": self.ask.certify,
                  "--group-unlike": self.group_unlike, "--engine ray": engine.is_ray}  # fmt: skip
        if self.group_by is not None and (options := [name for name, given in of_one.items() if given]):
            raise UsageError(f"--group-by burst: all photos of a burst get one answer; leave out {options[0]}")
        if self.boxes is not None and engine.is_ray:
            raise UsageError("--boxes: --engine ray cannot crop photos; leave one of them out")
        if self.boxes is not None and style in DOCUMENTS:
            raise UsageError(f"--format {style}: lists whole photos; leave out --boxes")
        if self.group_unlike:
            from retrieval_tip.labelling.groups import check_fitted

            check_fitted(cache, "--group-unlike")
        if self.group_unlike and engine.is_ray:
            raise UsageError("--group-unlike: compares all images, which --engine ray cannot; leave one of them out")

    def schema(self, cache: Index) -> pa.Schema:
        """Return the columns and their types."""
        import pyarrow as pa

        from retrieval_tip.data.exif import EXIF
        from retrieval_tip.predictions import PREDICTIONS

        types = {**PREDICTIONS, **EXIF, "burst": pa.int64(), "detected": pa.string()}
        columns = ["input", "label", "probability"]
        columns += ["unlike"] if cache.settings.least_cache is not None else []
        columns += ["detected"] if self.boxes is not None else []
        columns += ["group"] if self.group_unlike else []
        columns += ["burst"] if self.group_by is not None else []
        columns += list(EXIF) if self.exif else []
        columns += ["labels", "probabilities"] if self.ask.top > 1 else []
        columns += ["logits"] if self.ask.logits else []
        if self.explain:
            columns += ["text_logit", "cache_logit", *(["discriminant_logit"] if cache.settings.gamma else [])]
            columns += ["neighbours", "opposing"]
        columns += ["keys"] if self.ask.certify else []
        return pa.schema([(column, types[column]) for column in columns])

    def tables(
        self, cache: Index, sources: Sequence[Source], encoder: Encoder, cut: Cut | None = None
    ) -> Iterator[pa.Table]:
        """Classify the sources, and yield tables of the :meth:`schema`. The empty photos of ``cut`` come last."""
        import pyarrow as pa

        from retrieval_tip.data.boxes import EMPTY, Cut
        from retrieval_tip.data.exif import EXIF, Noting

        cut, schema = cut or Cut(), self.schema(cache)
        noting = Noting(encoder.read, cut.boxes)
        if self.exif or self.group_by is not None or self.boxes is not None:
            encoder = replace(encoder, read=noting)
        columns = [name for name in schema.names if name not in (*EXIF, "detected")]
        for table in self._answers(cache, sources, encoder, noting, columns):
            names = table["input"].to_pylist()
            more = noting.columns(names) | {
                "detected": pa.array([cut.detected.get(name) for name in names], pa.string())
            }
            yield pa.table([more.get(name) or table[name] for name in schema.names], schema=schema)
        if cut.empty:
            names = list(map(show, cut.empty))
            for path in cut.empty if self.exif else ():
                with suppress(InputError):
                    noting(path)
            known = noting.columns(names) | {"input": pa.array(names), "detected": pa.array([EMPTY] * len(names))}
            yield pa.table([known.get(field.name, pa.nulls(len(names), field.type)) for field in schema], schema=schema)

    def _answers(
        self, cache: Index, sources: Sequence[Source], encoder: Encoder, noting: Noting, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        ask = replace(self.ask, neighbours=self.ask.neighbours if self.explain else 0)
        if not any(map(len, sources)) or not (self.group_unlike or self.group_by is not None):
            for source in sources:
                for answers in cache.classify_source(source, encoder, ask):
                    yield answers.written(columns, self.abstain)
            return
        from retrieval_tip.predictions import ROWS

        if self.group_unlike:
            from retrieval_tip.labelling.groups import MOST, classify_in_groups
            from retrieval_tip.labelling.photos import Pool

            answers = classify_in_groups(cache, Pool.of(sources, encoder), ask)
            table = answers.written(columns, self.abstain)
            if (unlike := table["unlike"].to_pylist().count(True)) > MOST:
                drawn = f"Grouped {MOST:,} of {unlike:,} images without a match, drawn at random"
                say(f"{drawn}; the others joined these groups")
        else:
            from retrieval_tip.labelling.bursts import classify_in_bursts

            assert self.group_by is not None
            answers, bursts = classify_in_bursts(cache, sources, encoder, noting, self.group_by, ask)
            table = answers.written([name for name in columns if name != "burst"], self.abstain)
            table = table.append_column("burst", bursts)
        yield from (table.slice(start, ROWS) for start in range(0, len(table), ROWS))


_ASK = options.grouped(
    "ask", Ask, options.ASKING,
    options.ANSWER_OPTION("--top", type=count(), default=1, show_default=True, help="Number of classes to report."),
    options.ANSWER_OPTION("--neighbours", type=count(), default=5, show_default=True,
                 help="Number of shots that --explain shows."),
    options.ANSWER_OPTION("--logits", is_flag=True,
                 help="Show the logits of all classes, in the class order of the index."),
    options.ANSWER_OPTION("--certify", is_flag=True,
                 help="If k keys do not decide an answer, use more keys, or all keys if necessary. The number of keys "
                      "used is reported."),
)  # fmt: skip
_ROWS = options.grouped(
    "rows", RowOptions,
    options.ANSWER_OPTION("--explain", is_flag=True,
                 help="Show the shots that contributed most to an answer, and its text and cache logits."),
    options.ANSWER_OPTION("--abstain", type=Abstaining(),
                 help="Withhold the label if its probability is below P. With auto, the label is withheld if the "
                      "probability is below 0.5 or the image has no match."),
    options.ANSWER_OPTION("--group-unlike", is_flag=True,
                 help="Group similar images that have no match. The column group numbers the groups, largest first."),
    options.ANSWER_OPTION("--group-by", type=Bursts(),
                 help="Give all photos of a burst the mean of their probabilities. A burst consists of photos in the "
                      "same folder, each taken at most SECONDS after the one before. The default is "
                      f"{BURST_SECONDS} seconds."),
    options.READING_OPTION("--boxes", type=FILE,
                 help="Boxes of a detector, in MegaDetector's JSON format. Each box is cropped and classified, as "
                      "photo.jpg#1. The column detected contains its category, or \"empty\" if a photo has no box."),
    options.ANSWER_OPTION("--exif", is_flag=True,
                 help="Add the columns taken_at, latitude and longitude from the EXIF metadata of photos."),
)  # fmt: skip


@dataclass
class _Counts:
    """Counts of the answers: in all, without a match, and by the number of keys of certified answers."""

    total: int = 0
    unlike: int = 0
    keys: Counter[int] = field(default_factory=Counter)

    def count(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Count the rows of tables while passing them on."""
        for table in tables:
            self.total += len(table)
            if "unlike" in table.column_names:
                self.unlike += table["unlike"].to_pylist().count(True)
            if "keys" in table.column_names:
                self.keys.update(table["keys"].to_pylist())
            yield table

    def say_keys(self, cache: Index) -> None:
        """Print how many keys the certified answers used."""
        how = "proved equal to" if cache.exact_search else "in agreement with"
        used = (
            f"{number} with {'all' if keys == cache.n else keys} keys" for keys, number in sorted(self.keys.items())
        )
        say(f"Answers {how} those over all keys: {', '.join(used)}")


@command()
@options.INDEX_ARGUMENT
@click.argument("inputs", nargs=-1, required=True)
@_ASK
@options.OPENING
@_ROWS
@options.ENGINE
@options.printed_as(*DOCUMENTS)
@options.BACKBONE
@options.ENCODING
@click.pass_context
def classify(
    ctx: click.Context,
    folder: Place,
    inputs: tuple[str, ...],
    opening: OpeningOptions,
    rows: RowOptions,
    engine: EngineOptions,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths or feature tables. Use - to read paths from standard input. If
    the index is fitted, the column unlike is true for an image that resembles no shot. With --abstain, an uncertain
    answer has a probability but no label: the label is null, or - in a table. With --engine ray, --output is a folder
    of Parquet parts. The formats coco, fiftyone and label-studio are JSON files for other programs.
    """
    from retrieval_tip.cli.output import prediction_details, rounded, write_document, write_tables
    from retrieval_tip.data.boxes import Cut, cut_boxes
    from retrieval_tip.data.exchange import FORMATS, Answered
    from retrieval_tip.data.sources import open_inputs

    loaded = index_with(folder, encoding, opening, rows.ask)
    rows.check(loaded, engine, None if engine.is_ray else printing.style)
    if engine.is_ray:
        _classify_on_ray(ctx, folder, inputs, loaded, opening, rows, engine, printing, encoding)
        return
    sources, cut, counts = list(open_inputs(inputs, paths_on_stdin())), Cut(), _Counts()
    if rows.boxes is not None:
        cut = cut_boxes(rows.boxes, sources)
        sources = cut.sources
    with encoder_for(ctx, loaded, sources, encoding) as encoder:
        tables = counts.count(rows.tables(loaded, sources, encoder, cut))
        if printing.style in DOCUMENTS:
            columns_of = (table.select(["input", "label", "probability"]).to_pylist() for table in tables)
            rows_of = (Answered(*row.values()) for row in chain.from_iterable(columns_of))
            write_document(FORMATS[printing.style](rows_of, loaded.class_names), printing.output)
        else:
            tables = map(rounded, tables) if printing.style == "csv" else tables
            known = {"input": chain.from_iterable(source.sources for source in sources), "label": loaded.class_names}
            write_tables(tables, rows.schema(loaded), printing.style, printing.output, prediction_details, known)
    if printing.output is not None and not ctx.obj:
        no_match = f", {counts.unlike:,} with no match" if loaded.settings.least_cache is not None else ""
        empty = f", {len(cut.empty):,} empty" if rows.boxes is not None else ""
        answered = counted(counts.total - len(cut.empty), "input")
        say(f"{show(printing.output)}: classified {answered}{no_match}{empty}")
    if rows.ask.certify:
        counts.say_keys(loaded)
    finish(ctx, encoder.skipped)


def _classify_on_ray(
    ctx: click.Context,
    folder: Place,
    inputs: tuple[str, ...],
    loaded: Index,
    opening: OpeningOptions,
    rows: RowOptions,
    engine: EngineOptions,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    from retrieval_tip.data.tables import open_parquet, table_files
    from retrieval_tip.distributed.ray_data import Question, cut_inputs
    from retrieval_tip.index.places import at

    if printing.style != "parquet" or printing.output is None:
        raise UsageError("--engine ray: can only write Parquet parts; give --format parquet and --output FOLDER")
    pieces = cut_inputs(inputs, paths_on_stdin())
    manifest, schema = at(folder).manifest().to_bytes(), rows.schema(loaded)
    question = Question(str(folder), manifest, encoding.precision, loaded.settings, opening.where, schema, rows.tables)
    what, skipped = _on_ray(ctx, pieces, printing.output, engine, encoding, index=loaded, question=question)
    say(f"{show(printing.output)}: {what}")
    if rows.ask.certify:
        counts = _Counts()
        for _ in counts.count(open_parquet(file).read(["keys"]) for file in table_files(printing.output)):
            pass
        counts.say_keys(loaded)
    finish(ctx, skipped)


def _on_ray(
    ctx: click.Context,
    pieces: Sequence[Piece],
    out: Path | str,
    engine: EngineOptions,
    encoding: EncodingOptions,
    *,
    views: ViewOptions | None = None,
    index: Index | None = None,
    question: Question | None = None,
) -> tuple[str, list[Skipped]]:
    """Encode the pieces on Ray, or classify them if ``index`` is given. Return a summary and the skipped inputs."""
    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.data.encoding_cache import EncodingCache
    from retrieval_tip.distributed.ray_data import Work, write_parts

    identity = None if index is None else index.backbone
    backbone = None
    if encoding.model or any(isinstance(piece, str) or piece.table is None for piece in pieces):
        if index is not None and identity is None and not encoding.model:
            raise UsageError(UNNAMED)
        load = partial(load_backbone, *name_of(encoding, identity))
        backbone = partial(load, precision=encoding.precision, runtime=encoding.runtime)
    cache = None if encoding.no_cache else str(encoding.cache or EncodingCache.default_folder())
    work = Work(encoding.encoder(views), backbone, cache, question)
    rows, kept, skipped = write_parts(
        work, pieces, out, address=engine.ray_address, actors=engine.actors, device=encoding.device,
        progress=sys.stderr.isatty() and not ctx.obj,
    )  # fmt: skip
    warn(f"skipped {one}" for one in skipped)
    before = f", {kept} kept from an earlier run" if kept else ""
    return f"{rows} rows in {counted(len(pieces), 'part')}{before}", skipped
