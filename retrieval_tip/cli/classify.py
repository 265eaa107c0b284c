"""The command ``classify``, with the rows and files that it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import argument, command, flag, grouped, option
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import finish, note, say
from retrieval_tip.cli.opening import index_with, inputs_of, reader_for
from retrieval_tip.cli.options import OutputOptions
from retrieval_tip.errors import InputError, Skipped, UsageError
from retrieval_tip.settings import Ask
from retrieval_tip.wording import counted, show

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    import pyarrow as pa

    from retrieval_tip.data.boxes import PhotoBoxes
    from retrieval_tip.data.exif import ExifRecorder
    from retrieval_tip.data.reader import Reader
    from retrieval_tip.data.sources import Source
    from retrieval_tip.model import Index
    from retrieval_tip.predictions import Abstain, Predictions

DOCUMENTS = ("coco", "fiftyone", "label-studio")
"""Formats for other programs that list whole photos (see :data:`exchange.FORMATS`)."""
MEGADETECTOR, CAMTRAP_DP = "megadetector", "camtrap-dp"
"""Formats for programs that manage photos of camera traps (see :mod:`camera_traps`)."""
XMP = "xmp"
"""Format for programs that manage photos: a sidecar beside each photo."""
OF_FORMATS = {"timezone": CAMTRAP_DP, "deployments": CAMTRAP_DP, "uncertain": XMP, "undo": XMP}
"""The options that belong to a single format."""


@dataclass(frozen=True)
class RowOptions:
    """The columns of answers, the rules for withholding a label and for grouping photos, and options of formats.

    Options:
        explain: Show the shots that contributed most to an answer, its text and cache logits, and whether it is a shot.
        abstain: Withhold the label if its probability is below P. With auto, the label is withheld if the probability
            is below 0.5 or the image has no match.
        group_no_match: Group similar images that have no match. The column group numbers the groups, largest first.
        burst: Give all photos of a burst the mean of their probabilities. A burst consists of photos in the same
            folder, each taken at most SECONDS after the one before, for example 10.
        boxes: Boxes of a detector, in MegaDetector's JSON format. Each box is cropped and classified, as photo.jpg#1.
            The column detected contains its category, or "empty" if a photo has no box.
        categories: Categories of boxes to classify, separated by commas. [default: all; animal in the formats
            megadetector and camtrap-dp]
        smooth: Mix in the answers to similar photos of INPUTS, if this helps with held-out shots.
        exif: Add the columns taken_at, latitude and longitude from the EXIF metadata of photos.
        timezone: Time zone of the cameras, such as Europe/Berlin (format camtrap-dp).
        deployments: Table of the deployments, which are named like folders of photos (format camtrap-dp). [default:
            each folder is a deployment]
        uncertain: Keyword for photos without a label or a match (format xmp). [default: none]
        undo: Only restore the previous sidecars (format xmp).
    """

    explain: bool = flag(**options.ANSWERS)
    abstain: Abstain = option(kinds.abstaining, metavar="P|AUTO", **options.ANSWERS)
    group_no_match: bool = flag(**options.ANSWERS)
    burst: float | None = option(kinds.NUMBER, metavar="SECONDS", **options.ANSWERS)
    boxes: Path | None = option(kinds.FILE, **options.INPUT)
    categories: list[str] = option(
        multiple=True, metavar="NAME,...", callback=kinds.names, **options.INPUT
    )
    smooth: bool = flag(**options.ANSWERS)
    exif: bool = flag(**options.ANSWERS)
    timezone: ZoneInfo | None = option(metavar="ZONE", callback=kinds.zone, **options.OUTPUTS)
    deployments: Path | None = option(kinds.FILE, **options.OUTPUTS)
    uncertain: str | None = option(metavar="KEYWORD", **options.OUTPUTS)
    undo: bool = flag(**options.OUTPUTS)
    ask: Ask = Ask()

    def asking(self, ask: Ask, printing: OutputOptions) -> RowOptions:
        """Return the options for a question and a format. Raises UsageError if an option does not fit the format."""
        style = printing.named
        for option_name, its_format in OF_FORMATS.items():
            if getattr(self, option_name) and style != its_format:
                raise UsageError(
                    f"--{option_name}: only applies to --format {its_format}; leave it out"
                )
        if style == CAMTRAP_DP and (self.timezone is None or printing.output is None):
            raise UsageError(
                f"--format {CAMTRAP_DP}: needs --out FOLDER and --timezone ZONE, such as Europe/Berlin"
            )
        if style == XMP and printing.output is not None:
            raise UsageError(f"--format {XMP}: writes a sidecar beside each photo; leave out --out")
        if style not in (MEGADETECTOR, CAMTRAP_DP):
            return replace(self, ask=ask)
        from retrieval_tip.data.camera_traps import ANIMAL, TOP

        categories = self.categories
        if not categories and self.boxes is not None:
            categories = [ANIMAL]
        if style == MEGADETECTOR:
            ask = replace(ask, top=TOP)
        exif = self.exif or style == CAMTRAP_DP
        return replace(self, categories=categories, exif=exif, ask=ask)

    def check(self, index: Index, style: str) -> None:
        """Raise UsageError if options exclude each other, or if the index cannot group photos or give sets."""
        if self.abstain is not None and (
            self.ask.at_least is not None or self.ask.coverage is not None
        ):
            raise UsageError("--abstain, --at-least and --coverage: give only one")
        alone = {
            "--logits": self.ask.logits,
            "--coverage": self.ask.coverage is not None,
            "--group-no-match": self.group_no_match,
        }
        if self.smooth:
            _refuse_beside("--smooth", alone)
        if self.burst is not None:
            _refuse_beside("--burst", alone | {"--explain": self.explain, "--smooth": self.smooth})
        if self.boxes is None and self.categories:
            raise UsageError("--categories: selects boxes; add --boxes FILE, or leave it out")
        if self.boxes is not None and style in DOCUMENTS:
            raise UsageError(f"--format {style}: lists whole photos; leave out --boxes")
        if self.group_no_match:
            from retrieval_tip.labelling.groups import check_fitted

            check_fitted(index, "--group-no-match")
        index.sets(self.ask)  # raises an error before photos are read

    def labels(self, index: Index) -> list[str]:
        """Return the labels that answers can have."""
        if self.ask.at_least is None or index.groups is None:
            return index.class_names
        return index.groups.labels(index.class_names)

    def schema(self, index: Index) -> pa.Schema:
        """Return the columns and their types."""
        import pyarrow as pa

        from retrieval_tip.data.exif import EXIF
        from retrieval_tip.predictions import PREDICTIONS

        types = {**PREDICTIONS, **EXIF, "burst": pa.int64(), "detected": pa.string()}
        shown = {
            "input": True,
            "label": True,
            "level": self.ask.at_least is not None,
            "probability": True,
            "no_match": True,
            "detected": self.boxes is not None,
            "group": self.group_no_match,
            "burst": self.burst is not None,
            **dict.fromkeys(EXIF, self.exif),
            "set": self.ask.coverage is not None,
            **dict.fromkeys(("labels", "probabilities"), self.ask.top > 1),
            "logits": self.ask.logits,
            **dict.fromkeys(("shot", "text_logit", "cache_logit"), self.explain),
            "discriminant_logit": self.explain and index.settings.gamma > 0,
            **dict.fromkeys(("neighbours", "opposing"), self.explain),
            "similar": self.explain and self.smooth,
        }
        return pa.schema(
            [(column, types[column]) for column, is_shown in shown.items() if is_shown]
        )

    def tables(
        self, index: Index, sources: Sequence[Source], reader: Reader, cut: PhotoBoxes
    ) -> Iterator[pa.Table]:
        """Classify the sources, and yield tables of the :meth:`schema`.

        The boxes of ``cut`` that are not classified and its empty photos come last.
        """
        import pyarrow as pa

        from retrieval_tip.data.boxes import EMPTY
        from retrieval_tip.data.exif import ExifRecorder

        schema = self.schema(index)
        noting = ExifRecorder(cut.boxes)
        detected = cut.detected | dict.fromkeys(map(show, cut.empty), EMPTY)
        if self.exif or self.burst is not None or self.boxes is not None:
            sources = [replace(source, load=noting) for source in sources]
        answers = self._answers(index, sources, reader, noting)
        for table in chain(answers, self._others(cut, noting)):
            names = table["input"].to_pylist()
            columns = dict(zip(table.column_names, table.columns, strict=True))
            columns["detected"] = pa.array(map(detected.get, names), pa.string())
            if self.exif:
                columns |= noting.columns(names)
            unknown = {field.name: pa.nulls(len(names), field.type) for field in schema}
            yield pa.table([(unknown | columns)[name] for name in schema.names], schema=schema)

    def _answers(
        self, index: Index, sources: Sequence[Source], reader: Reader, noting: ExifRecorder
    ) -> Iterator[pa.Table]:
        """Yield the answers to all photos, which are mixed or grouped as the options say."""
        from retrieval_tip.predictions import PREDICTIONS

        columns = [name for name in self.schema(index).names if name in PREDICTIONS]
        shown = self.ask.neighbours if self.explain else 0
        ask = replace(self.ask, neighbours=shown)
        if not any(map(len, sources)):  # all photos may be empty
            return
        if self.group_no_match:
            yield _in_groups(index, sources, reader, ask).written(columns, self.abstain)
        elif self.smooth:
            from retrieval_tip.labelling.pool import Pool

            answers, words = Pool.of(sources, reader).smoothed(index, ask)
            say(words)
            yield answers.written(columns, self.abstain)
        elif self.burst is not None:
            from retrieval_tip.labelling.bursts import classify_in_bursts

            answers, bursts = classify_in_bursts(index, sources, reader, noting, self.burst, ask)
            yield answers.written(columns, self.abstain).append_column("burst", bursts)
        else:
            from retrieval_tip.evaluation.held_out import classify_sources

            for answers in classify_sources(index, sources, reader, ask):
                yield answers.written(columns, self.abstain)

    def _others(self, cut: PhotoBoxes, noting: ExifRecorder) -> Iterator[pa.Table]:
        """Yield the names of unclassified inputs, after noting when and where the photos were taken."""
        import pyarrow as pa

        names = [*cut.others, *cut.empty]
        if self.exif:
            for name in names:
                with suppress(InputError):
                    noting.note(name)
        if names:
            yield pa.table({"input": list(map(show, names))})


def _refuse_beside(mixing: str, others: Mapping[str, bool]) -> None:
    """Raise UsageError if an option is given beside one that mixes the answers to several photos."""
    for name, is_given in others.items():
        if is_given:
            raise UsageError(f"{mixing}: mixes the answers to several photos; leave out {name}")


def _in_groups(index: Index, sources: Sequence[Source], reader: Reader, ask: Ask) -> Predictions:
    from retrieval_tip.labelling.groups import MOST, classify_in_groups
    from retrieval_tip.labelling.pool import Pool

    answers = classify_in_groups(index, Pool.of(sources, reader), ask)
    no_match = answers.to_arrow()["no_match"].to_pylist().count(True)
    if no_match > MOST:
        drawn = f"Grouped {MOST:,} of {no_match:,} images without a match, drawn at random"
        say(f"{drawn}; the others joined these groups")
    return answers


def count_rows(tables: Iterable[pa.Table], counts: Counter[str]) -> Iterator[pa.Table]:
    """Count the ``rows`` of tables, and those without a match, while passing the tables on."""
    for table in tables:
        counts["rows"] += len(table)
        counts["no_match"] += table["no_match"].to_pylist().count(True)
        yield table


def _restore(inputs: Sequence[str]) -> None:
    from retrieval_tip.labelling.sidecars import undo_sidecars

    undone = undo_sidecars(path for source in inputs_of(inputs) for path in source.paths or ())
    click.echo(str(undone).capitalize())
    finish(undone.skipped, "restored")


# Formats


@dataclass(frozen=True)
class Answered:
    """The answers to write, and what the formats say about them.

    Attributes:
        index: the index that has answered.
        options: the columns, and the options of formats.
        tables: the answers. They are computed while they are read, which is possible once.
        inputs: the names of the inputs on the command line.
        photos: the sources that they name.
        cut: the boxes of the photos.
        deployments: the rows of the table of deployments.
        unread: the photos that cannot be read. It grows while the answers are read.
    """

    index: Index
    options: RowOptions
    tables: Iterator[pa.Table]
    inputs: Sequence[str]
    photos: Sequence[Source]
    cut: PhotoBoxes
    deployments: Mapping[str, dict[str, Any]]
    unread: list[Skipped]

    @property
    def rows(self) -> Iterator[dict[str, Any]]:
        """The answers as dictionaries."""
        return chain.from_iterable(table.to_pylist() for table in self.tables)

    @property
    def labels(self) -> list[str]:
        """The labels that answers can have."""
        return self.options.labels(self.index)

    @property
    def by(self) -> str:
        """The name of the index, its version, and the version of this program."""
        from retrieval_tip import __version__

        name = Path(self.index.place or "").name
        return f"{name}@{self.index.version} (retrieval-tip {__version__})"


def _write_tables(answered: Answered, printing: OutputOptions) -> Sequence[Skipped]:
    from retrieval_tip.cli.output import write_tables

    sources = answered.cut.sources
    texts = {
        "input": chain.from_iterable(source.sources for source in sources),
        "label": answered.labels,
    }
    schema = answered.options.schema(answered.index)
    write_tables(answered.tables, schema, printing.style, printing.output, texts, predictions=True)
    return ()


def _write_document(answered: Answered, printing: OutputOptions) -> Sequence[Skipped]:
    from retrieval_tip.cli.output import write_document
    from retrieval_tip.data.exchange import FORMATS

    make = partial(FORMATS[printing.style], answered.rows, answered.labels)
    write_document(make, printing.output)
    return ()


def _write_megadetector(answered: Answered, printing: OutputOptions) -> Sequence[Skipped]:
    from retrieval_tip.cli.output import write_document
    from retrieval_tip.data.camera_traps import megadetector, root_of

    root = root_of(answered.inputs, answered.photos)
    known = (answered.rows, answered.cut, answered.by, root, answered.labels, answered.unread)
    write_document(partial(megadetector, *known), printing.output)
    return ()


def _write_camtrap_dp(answered: Answered, printing: OutputOptions) -> Sequence[Skipped]:
    from retrieval_tip.cli.output import write_folder
    from retrieval_tip.data.camera_traps import camtrap_dp, root_of

    zone = answered.options.timezone
    assert zone is not None
    assert printing.output is not None  # see RowOptions.asking
    root = root_of(answered.inputs, answered.photos)
    known = (answered.rows, answered.cut, answered.by, root)
    make = partial(camtrap_dp, *known, zone, answered.deployments, answered.unread)
    write_folder(make, printing.output)
    return ()


def _write_sidecars(answered: Answered, _: OutputOptions) -> Sequence[Skipped]:
    """Write the labels of each photo and its boxes as keywords, and return the sidecars that were skipped."""
    from retrieval_tip.labelling.labels import NONE
    from retrieval_tip.labelling.sidecars import write_labels
    from retrieval_tip.labelling.sort import check_files

    def keyword(row: Mapping[str, Any]) -> str | None:
        if row["probability"] is None:  # it was not classified
            return None
        label: str | None = row["label"]
        return answered.options.uncertain if label in (None, NONE) or row["no_match"] else label

    check_files(answered.photos, f"--format {XMP}", "they have no sidecars")
    paths = {show(path): path for source in answered.photos for path in source.paths or ()}
    paths |= {show(name): path for name, (path, _) in answered.cut.boxes.items()}
    keywords = ((paths[row["input"]], keyword(row)) for row in answered.rows)
    written = write_labels(keywords, answered.index.groups)
    click.echo(f"{str(written).capitalize()}; --undo restores them")
    return written.skipped


WRITERS: Mapping[str, Callable[[Answered, OutputOptions], Sequence[Skipped]]] = {
    **dict.fromkeys(DOCUMENTS, _write_document),
    MEGADETECTOR: _write_megadetector,
    CAMTRAP_DP: _write_camtrap_dp,
    XMP: _write_sidecars,
}
"""Functions that write answers in the formats for other programs, and return what they have skipped."""


_ASK = {
    "top": option(kinds.count(), default=1, help="Number of classes to report.", **options.ANSWERS),
    "neighbours": option(
        kinds.count(), default=5, help="Number of shots that --explain shows.", **options.ANSWERS
    ),
    "logits": flag(
        help="Show the logits of all classes, in the class order of the index.", **options.ANSWERS
    ),
}
_PRINTING = {
    "named": option(
        click.Choice([*options.FORMATS, *WRITERS]),
        "--format",
        **options.OUTPUTS,
    ),
    "output": option(kinds.OUTPUT, "--out", "-o", **options.OUTPUTS),
}


@command()
def classify(
    folder: Place = options.INDEX_ARGUMENT,
    inputs: tuple[str, ...] = argument(nargs=-1, required=True),
    ask: Ask = grouped(Ask, options.ASKING | options.LEVELS | _ASK),
    opening: options.OpeningOptions = options.OPENING,
    printing: OutputOptions = grouped(OutputOptions, _PRINTING),
    rows: RowOptions = grouped(RowOptions),
    encoding: options.EncodingOptions = options.ENCODING,
) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths or feature tables. Use - to read paths from standard input. The
    column no_match is true for an image that resembles no shot, and null if the index is not fitted. A photo that is a
    shot of the index is classified without itself. With --abstain, an uncertain answer has a probability but no label:
    the label is null, or - in a table. The formats coco, fiftyone, label-studio and megadetector are JSON files for
    other programs, and camtrap-dp is a folder of tables. The format xmp writes the label of each photo as a keyword
    into its XMP sidecar: photo.jpg.xmp, or an existing photo.xmp.

    Examples:
        classify indexes/things new/*.jpg --explain
        classify indexes/things new --top 3 --out answers.csv
    """
    from retrieval_tip.data import camera_traps
    from retrieval_tip.data.boxes import PhotoBoxes, cut_boxes

    rows = rows.asking(ask, printing)
    if rows.undo:
        _restore(inputs)
        return
    deployments = {}
    if rows.deployments is not None:
        deployments = camera_traps.read_deployments(rows.deployments, rows.timezone)
    loaded = index_with(folder, encoding, opening, ask)
    rows.check(loaded, printing.style)
    photos = inputs_of(inputs)
    cut = PhotoBoxes(photos)
    if rows.boxes is not None:
        cut = cut_boxes(rows.boxes, photos, rows.categories)
        if printing.named == MEGADETECTOR:
            camera_traps.clear(cut.document, show(rows.boxes))
    counts = Counter[str]()
    with reader_for(loaded, photos, encoding) as reader:
        tables = count_rows(rows.tables(loaded, cut.sources, reader, cut), counts)
        answered = Answered(loaded, rows, tables, inputs, photos, cut, deployments, reader.skipped)
        skipped = WRITERS.get(printing.style, _write_tables)(answered, printing)
    if printing.output is not None:
        said = counted(counts["rows"] - len(cut.empty) - len(cut.others), "input")
        if loaded.settings.least_cache is not None:
            said += f", {counts['no_match']:,} with no match"
        if rows.boxes is not None:
            said += f", {len(cut.empty):,} empty"
        note(f"{show(printing.output)}: classified {said}")
    finish([*reader.skipped, *skipped], "read or changed" if skipped else "read")
