"""The commands ``suggest``, ``find`` and ``sort``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import about, finish, note, say
from retrieval_tip.cli.opening import index_with, inputs_of, reader_for
from retrieval_tip.cli.options import EncodingOptions, OutputOptions
from retrieval_tip.errors import UsageError
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.wording import counted, show

if TYPE_CHECKING:
    from retrieval_tip.labelling.placing import Action


@command()
def suggest(
    photos: tuple[str, ...] = options.PHOTOS,
    number: int = option(kinds.count(), "-n", default=20),
    index: Place | None = option(kinds.INDEX),
    printing: OutputOptions = options.FORMAT,
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Suggest which photos to label next, most useful first.

    PHOTOS are unlabelled images, folders, globs, tables of paths or feature tables. Use - to read paths from standard
    input. Without --index, the suggestions are typical photos of different kinds. With --index, photos whose answer is
    uncertain are preferred, and photos that the index contains are skipped. The column covers counts the other photos
    that are most similar to this suggestion.

    Options:
        number: Number of photos to suggest.
        index: Index of the photos labelled so far.

    Examples:
        suggest inbox -n 20
        suggest inbox -n 20 --index indexes/things --out next.csv
    """
    from retrieval_tip.labelling.pool import suggest_photos

    sources = inputs_of(photos, needed=True)
    loaded = None if index is None else index_with(index, encoding)
    with reader_for(loaded, sources, encoding) as reader:
        suggestions = suggest_photos(sources, number, reader, loaded)
    printing.write_table(suggestions.table, predictions=True)
    note(str(suggestions))
    finish(reader.skipped)


@command()
def find_command(
    photos: tuple[str, ...] = argument(nargs=-1, required=True, metavar="PHOTOS... QUERY"),
    number: int = option(kinds.count(), "-n", default=20),
    folder: Place | None = option(kinds.INDEX, "--index"),
    duplicates: bool = flag(),
    printing: OutputOptions = options.FORMAT,
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Find unlabelled photos by a text or by an example.

    PHOTOS are images, folders, globs, tables of paths or feature tables. Use - to read paths from standard input. The
    last argument is QUERY. If it is an image file or an item (FILE#NAME), similar photos are found. Otherwise, it is
    a text, and the encoder must have text.

    Options:
        number: Number of photos or pairs to show.
        folder: Index whose encoder, metric and prompts are used.
        duplicates: Find near-identical photos instead. There is no QUERY.

    Examples:
        find inbox "a red flower"
        find inbox photos/cat/1.jpg --index indexes/things
    """
    from retrieval_tip.labelling.find import example_of, find_duplicates, find_photos

    *names, query = (*photos, "") if duplicates else photos
    if not names:
        raise UsageError("find: needs PHOTOS and QUERY; the last argument is QUERY")
    example = None if duplicates else example_of(query)
    sources = inputs_of(names, needed=True)
    index = None if folder is None else index_with(folder, encoding)
    text = not duplicates and example is None
    encoded = sources if index is None or example is None else [*sources, example]
    with reader_for(
        index, encoded, encoding, needed=text or (index is None and example is not None)
    ) as reader:
        if duplicates:
            table, pairs = find_duplicates(sources, reader, number)
            only = (
                ""
                if pairs.compared != "digests"
                else "; compared only identical photos and features"
            )
            done = f"found {counted(pairs.total, 'pair')}, showing {len(table):,}{only}"
        else:
            table, total = find_photos(sources, reader, query, number, index)
            what = "the text" if text else "photos like"
            done = f"searched {counted(total, 'photo')} for {what} {show(query)}"
    printing.write_table(table)
    note(done)
    finish(reader.skipped)


@command()
def sort_command(
    folder: Place | None = argument(kinds.INDEX, metavar="INDEX", required=False),
    photos: tuple[str, ...] = argument(nargs=-1),
    into: Path = option(kinds.FOLDER, required=True),
    link: bool = flag(),
    move: bool = flag(),
    min_probability: float | None = option(kinds.SHARE),
    at_most_wrong: float | None = option(kinds.percent, metavar="P%"),
    smooth: bool = flag(),
    dry_run: bool = flag(),
    undo: bool = flag(),
    encoding: EncodingOptions = options.ENCODING,
) -> None:
    """Sort photos into folders by their class.

    PHOTOS are images, folders, globs, tables of paths or feature tables. Use - to read paths from standard input.
    Photos that resemble no shot go to the folder "no match", and photos with a low probability to "not sure". No file
    is overwritten. The manifest sorted.csv lists all photos, so that --undo --into FOLDER can restore the previous
    state. If the command is interrupted, run it again.

    Options:
        into: Folder to sort into, with one folder per class.
        link: Create symbolic links instead of copies.
        move: Move the photos instead of copying them.
        min_probability: Probability below which a photo goes to the folder not sure. [default: 0.5]
        at_most_wrong: Choose this probability so that at most this share of held-out shots above it is wrong, as in 2%.
        smooth: Mix in the answers to similar photos of PHOTOS.
        dry_run: Print the rows of the manifest, and change nothing.
        undo: Delete the copies and links, and move photos back.

    Examples:
        sort indexes/things inbox --into sorted
        sort --undo --into sorted
    """
    from retrieval_tip.labelling.placing import COLUMNS
    from retrieval_tip.labelling.sort import sort_photos, undo_sort

    if undo:
        if folder is not None or link or move or smooth or dry_run:
            raise UsageError("--undo: takes only --into FOLDER; leave out the rest")
        result = undo_sort(into)
    else:
        if folder is None or not photos:
            raise UsageError("sort: needs INDEX and PHOTOS, unless you give --undo")
        sources = inputs_of(photos)
        index = index_with(folder, encoding)
        with reader_for(index, sources, encoding) as reader:
            action: Action = "copy"
            if link:
                action = "link"
            elif move:
                action = "move"
            result = sort_photos(
                index,
                sources,
                reader,
                into,
                action=action,
                min_probability=min_probability,
                at_most_wrong=at_most_wrong,
                smooth=smooth,
                dry_run=dry_run,
            )
        for told in filter(None, (result.smoothing, result.threshold)):
            say(str(told))
    if dry_run:
        rows = ([show(str(getattr(row, name))) for name in COLUMNS] for row in result.rows)
        OutputOptions("csv", None).write_rows(rows, dict.fromkeys(COLUMNS, str))
    else:
        about(into, str(result))
    finish(result.skipped, "restored" if undo else "sorted")
