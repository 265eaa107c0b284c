"""The command ``suggest``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.messages import finish, say
from retrieval_tip.cli.opening import backbone_of, encoder_for, encoder_of, index_with
from retrieval_tip.cli.options import AnswerOptions, EncodingOptions, OutputOptions
from retrieval_tip.cli.parameters import INDEX, SOURCE, count
from retrieval_tip.cli.stdin import paths_on_stdin
from retrieval_tip.errors import UsageError

if TYPE_CHECKING:
    from retrieval_tip.index.places import Place


@command()
@click.argument("photos", nargs=-1, required=True)
@click.option("-n", "number", type=count(), default=20, show_default=True, help="Number of photos to suggest.")
@click.option("--index", "folder", type=INDEX, help="Index of the photos labelled so far.")
@click.option("--text", type=SOURCE, help="Feature table of class names, for a first guess without an index.")
@options.FORMAT
@options.BACKBONE
@options.ENCODING
@click.pass_context
def suggest(
    ctx: click.Context,
    photos: tuple[str, ...],
    number: int,
    folder: Place | None,
    text: Place | None,
    printing: OutputOptions,
    encoding: EncodingOptions,
) -> None:
    """Suggest which photos to label next, most useful first.

    PHOTOS are unlabelled images, folders, globs, tables of paths or feature tables. Use - to read paths from standard
    input. Without --index, the suggestions are typical photos of different kinds. With --index, photos whose answer is
    uncertain are preferred, and photos that the index contains are skipped. The column covers counts the other photos
    that are most similar to this suggestion.
    """
    from retrieval_tip.cli.output import rounded, write_table
    from retrieval_tip.data.sources import open_inputs
    from retrieval_tip.labelling.photos import suggest_photos

    if folder is not None and text is not None:
        raise UsageError("--text and --index: give only one; an index has its own text")
    sources = list(open_inputs(photos, paths_on_stdin()))
    index = None if folder is None else index_with(folder, AnswerOptions(), encoding)
    images = [source for source in sources if source.table is None]
    opened = (
        encoder_of(ctx, backbone_of((images or sources)[0], encoding), encoding)
        if index is None
        else encoder_for(ctx, index, sources, encoding)
    )
    with opened as encoder:
        suggestions = suggest_photos(sources, number, encoder, index, text=text)
    table = rounded(suggestions.table) if printing.style == "csv" else suggestions.table
    write_table(table, printing.style, printing.output)
    if not ctx.obj:
        say(str(suggestions))
    finish(ctx, encoder.skipped)
