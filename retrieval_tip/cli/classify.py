"""The commands ``encode`` and ``classify``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import argument, command, flag, grouped, option
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import about, finish, note, quiet, say, warn
from retrieval_tip.cli.opening import (
    UNNAMED,
    index_with,
    inputs_of,
    loader,
    paths_on_stdin,
    reader_for,
    source_of,
    store_of,
)
from retrieval_tip.cli.options import (
    EncodingOptions,
    EngineOptions,
    OpeningOptions,
    OutputOptions,
    SourceOptions,
    ViewOptions,
)
from retrieval_tip.cli.rows import (
    CAMTRAP_DP,
    DOCUMENTS,
    MEGADETECTOR,
    RowOptions,
    SidecarOptions,
    TrapOptions,
    count_rows,
)
from retrieval_tip.errors import Skipped, UsageError, counted, show
from retrieval_tip.settings import Ask

if TYPE_CHECKING:
    from retrieval_tip.distributed.ray_data import Piece, Question
    from retrieval_tip.model import Index


@command()
def encode(
    source: Place = argument(kinds.SOURCE),
    out: Place = option(kinds.OUTPUT, "--out", "-o", required=True, help="Feature table to write (.parquet)."),
    engine: EngineOptions = options.ENGINE,
    views: ViewOptions = options.VIEWS,
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """Encode images into a feature table.

    You can give the table to every command that reads images. SOURCE can be anything that index build accepts, or a
    folder of unlabelled images. With --engine ray, --out is a folder of Parquet parts, which you can use like a table.
    """
    from retrieval_tip.data.reader import encode_table

    if engine.is_ray:
        from retrieval_tip.data import tars
        from retrieval_tip.distributed.ray_data import cut

        found = None if encoding.dataset else tars.find(str(source))
        pieces = found or cut(source_of(source, encoding, "train", labelled=False))
        what, skipped = _on_ray(pieces, out, engine, encoding, views=views)
    else:
        items = source_of(source, encoding, "train", labelled=False)
        with reader_for(None, [items], encoding, views) as reader:
            what = f"{encode_table(items, out, reader)} rows"
        skipped = reader.skipped
    about(out, what)
    finish(skipped)


_ASK = {
    "top": option(kinds.count(), default=1, help="Number of classes to report.", **options.ANSWERS),
    "neighbours": option(kinds.count(), default=5, help="Number of shots that --explain shows.", **options.ANSWERS),
    "logits": flag(help="Show the logits of all classes, in the class order of the index.", **options.ANSWERS),
}
_PRINTING = {
    "named": option(
        click.Choice([*options.FORMATS, *DOCUMENTS, MEGADETECTOR, CAMTRAP_DP]), "--format", **options.OUTPUTS
    ),
    "output": option(kinds.OUTPUT, "--out", "-o", **options.OUTPUTS),
}


@command()
def classify(
    folder: Place = options.INDEX_ARGUMENT,
    inputs: tuple[str, ...] = argument(nargs=-1, required=True),
    ask: Ask = grouped(Ask, options.ASKING | options.LEVELS | _ASK),
    opening: OpeningOptions = options.OPENING,
    rows: RowOptions = grouped(RowOptions),
    engine: EngineOptions = options.ENGINE,
    printing: OutputOptions = grouped(OutputOptions, _PRINTING),
    trap: TrapOptions = grouped(TrapOptions),
    sidecars: SidecarOptions = grouped(SidecarOptions),
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths or feature tables. Use - to read paths from standard input. If
    the index is fitted, the column no_match is true for an image that resembles no shot. With --abstain, an uncertain
    answer has a probability but no label: the label is null, or - in a table. With --engine ray, --out is a folder
    of Parquet parts. The formats coco, fiftyone, label-studio and megadetector are JSON files for other programs. The
    format camtrap-dp is a folder of tables. With --xmp, the sidecar of photo.jpg is photo.jpg.xmp, or an existing
    photo.xmp.
    """
    from retrieval_tip import __version__
    from retrieval_tip.cli.output import prediction_details, rounded, write_document, write_folder, write_tables
    from retrieval_tip.data import camera_traps
    from retrieval_tip.data.boxes import Cut, cut_boxes
    from retrieval_tip.data.exchange import FORMATS

    sidecars.check(engine)
    if sidecars.undo:
        sidecars.restore(inputs)
        return
    rows = trap.rows(replace(rows, ask=ask), printing)
    deployments = camera_traps.read_deployments(trap.deployments, trap.timezone) if trap.deployments else {}
    loaded = index_with(folder, encoding, opening, ask)
    rows.check(loaded, engine, None if engine.is_ray else printing.style)
    if engine.is_ray:
        _classify_on_ray(folder, inputs, loaded, opening, rows, engine, printing, encoding)
        return
    photos, cut, counts = inputs_of(inputs), Cut(), Counter[str]()
    sources, keywords = photos, dict[str, list[str]]()
    if rows.boxes is not None:
        cut = cut_boxes(rows.boxes, photos, rows.categories or None)
        sources = cut.sources
        if printing.named == MEGADETECTOR:
            camera_traps.clear(cut.document, show(rows.boxes), overwrite=trap.overwrite)
    with reader_for(loaded, sources, encoding) as reader:
        tables = count_rows(rows.tables(loaded, sources, reader, cut), counts)
        tables = sidecars.noted(tables, sources, cut, keywords) if sidecars.xmp else tables
        answers = chain.from_iterable(table.to_pylist() for table in tables)
        labels = rows.labels(loaded)
        by = f"{Path(loaded.place or '').name}@{loaded.version} (retrieval-tip {__version__})"
        if printing.style in DOCUMENTS:
            write_document(partial(FORMATS[printing.style], answers, labels), printing.output)
        elif printing.style == MEGADETECTOR:
            parts = (answers, cut, by, camera_traps.root_of(inputs, photos), labels, reader.skipped)
            write_document(partial(camera_traps.megadetector, *parts), printing.output)
        elif printing.style == CAMTRAP_DP and printing.output is not None and trap.timezone is not None:
            own = (answers, cut, by, camera_traps.root_of(inputs, photos), trap.timezone, deployments, reader.skipped)
            write_folder(partial(camera_traps.camtrap_dp, *own), printing.output)
        else:
            tables = map(rounded, tables) if printing.style == "csv" else tables
            known = {"input": chain.from_iterable(source.sources for source in sources), "label": labels}
            write_tables(tables, rows.schema(loaded), printing.style, printing.output, prediction_details, known)
    if printing.output is not None:
        no_match = f", {counts['no_match']:,} with no match" if loaded.settings.least_cache is not None else ""
        empty = f", {len(cut.empty):,} empty" if rows.boxes is not None else ""
        answered_inputs = counted(counts["rows"] - len(cut.empty) - len(cut.others), "input")
        note(f"{show(printing.output)}: classified {answered_inputs}{no_match}{empty}")
    written = sidecars.write(keywords, loaded) if sidecars.xmp else []
    finish([*reader.skipped, *written], "read or changed" if sidecars.xmp else "read")


def _classify_on_ray(
    folder: Place,
    inputs: tuple[str, ...],
    loaded: Index,
    opening: OpeningOptions,
    rows: RowOptions,
    engine: EngineOptions,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    from retrieval_tip.distributed.ray_data import Question, cut_inputs

    if printing.style != "parquet" or printing.output is None:
        raise UsageError("--engine ray: can only write Parquet parts; give --format parquet and --out FOLDER")
    pieces = cut_inputs(inputs, paths_on_stdin())
    manifest, schema = store_of(folder).manifest().to_bytes(), rows.schema(loaded)
    question = Question(str(folder), manifest, encoding.precision, loaded.settings, opening.where, schema, rows.tables)
    what, skipped = _on_ray(pieces, printing.output, engine, encoding, index=loaded, question=question)
    say(f"{show(printing.output)}: {what}")
    finish(skipped)


def _on_ray(
    pieces: Sequence[Piece],
    out: Place,
    engine: EngineOptions,
    encoding: EncodingOptions,
    *,
    views: ViewOptions | None = None,
    index: Index | None = None,
    question: Question | None = None,
) -> tuple[str, list[Skipped]]:
    """Encode the pieces on Ray, or classify them if ``index`` is given. Return a summary and the skipped inputs."""
    from retrieval_tip.data.encoding_cache import EncodingCache
    from retrieval_tip.distributed.ray_data import Work, write_parts

    identity = None if index is None else index.backbone
    backbone = None
    if encoding.model or any(isinstance(piece, str) or piece.table is None for piece in pieces):
        if index is not None and identity is None and not encoding.model:
            raise UsageError(UNNAMED)
        backbone = loader(encoding, identity)
    cache = None if encoding.no_cache else str(encoding.cache or EncodingCache.default_folder())
    work = Work(encoding.reader(views), backbone, cache, question)
    progress = sys.stderr.isatty() and not quiet()
    cluster: dict[str, Any] = {"address": engine.ray_address, "actors": engine.actors}
    rows, kept, skipped = write_parts(work, pieces, out, **cluster, device=encoding.device, progress=progress)
    warn(f"skipped {one}" for one in skipped)
    before = f", {kept} kept from an earlier run" if kept else ""
    return f"{rows} rows in {counted(len(pieces), 'part')}{before}", skipped
