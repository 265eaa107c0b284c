"""The command ``classify``, with the rows and files that it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from retrieval_tip.errors import InputError, Skipped, UsageError, counted, show
from retrieval_tip.settings import Ask

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    import pyarrow as pa

    from retrieval_tip.data.boxes import Cut
    from retrieval_tip.data.exif import Noting
    from retrieval_tip.data.reader import Reader
    from retrieval_tip.data.sources import Source
    from retrieval_tip.model import Index
    from retrieval_tip.predictions import Abstain
    from retrieval_tip.settings import Levels

DOCUMENTS = ("coco", "fiftyone", "label-studio")
"""Formats for other programs that list whole photos (see :data:`exchange.FORMATS`)."""
MEGADETECTOR, CAMTRAP_DP = "megadetector", "camtrap-dp"
"""Formats for programs that manage photos of camera traps (see :mod:`camera_traps`)."""
XMP = "xmp"
"""Format for programs that manage photos: a sidecar beside each photo."""


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
        for name, own in ((CAMTRAP_DP, ("timezone", "deployments")), (XMP, ("uncertain", "undo"))):
            if style != name and (given := [one for one in own if getattr(self, one)]):
                raise UsageError(f"--{given[0]}: only applies to --format {name}; leave it out")
        if style == CAMTRAP_DP and (self.timezone is None or printing.output is None):
            raise UsageError(
                f"--format {CAMTRAP_DP}: needs --out FOLDER and --timezone ZONE, such as Europe/Berlin"
            )
        if style == XMP and printing.output is not None:
            raise UsageError(f"--format {XMP}: writes a sidecar beside each photo; leave out --out")
        if style not in (MEGADETECTOR, CAMTRAP_DP):
            return replace(self, ask=ask)
        from retrieval_tip.data.camera_traps import ANIMAL, TOP

        categories = self.categories or [ANIMAL] * (self.boxes is not None)
        ask = replace(ask, top=TOP) if style == MEGADETECTOR else ask
        return replace(self, categories=categories, exif=self.exif or style == CAMTRAP_DP, ask=ask)

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
        burst = alone | {"--explain": self.explain, "--smooth": self.smooth}
        for name, mixes, others in (
            ("smooth", self.smooth, alone),
            ("burst", self.burst is not None, burst),
        ):
            if mixes and (given := [other for other, value in others.items() if value]):
                raise UsageError(
                    f"--{name}: mixes the answers to several photos; leave out {given[0]}"
                )
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
        own = index.class_names
        return (
            own if self.ask.at_least is None or index.groups is None else index.groups.labels(own)
        )

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
        self, index: Index, sources: Sequence[Source], reader: Reader, cut: Cut
    ) -> Iterator[pa.Table]:
        """Classify the sources, and yield tables of the :meth:`schema`.

        The boxes of ``cut`` that are not classified and its empty photos come last.
        """
        import pyarrow as pa

        from retrieval_tip.data.boxes import EMPTY
        from retrieval_tip.data.exif import Noting

        schema = self.schema(index)
        noting = Noting(cut.boxes)
        detected = cut.detected | dict.fromkeys(map(show, cut.empty), EMPTY)
        if self.exif or self.burst is not None or self.boxes is not None:
            sources = [replace(source, load=noting) for source in sources]
        for table in chain(
            self._answers(index, sources, reader, noting), self._others(cut, noting)
        ):
            names = table["input"].to_pylist()
            known = {
                **dict(zip(table.column_names, table.columns, strict=True)),
                "detected": pa.array(map(detected.get, names), pa.string()),
                **(noting.columns(names) if self.exif else {}),
            }
            yield pa.table(
                [known.get(one.name, pa.nulls(len(names), one.type)) for one in schema],
                schema=schema,
            )

    def _answers(
        self, index: Index, sources: Sequence[Source], reader: Reader, noting: Noting
    ) -> Iterator[pa.Table]:
        from retrieval_tip.predictions import PREDICTIONS

        columns = [name for name in self.schema(index).names if name in PREDICTIONS]
        ask = replace(self.ask, neighbours=self.ask.neighbours if self.explain else 0)
        some = any(map(len, sources))  # all photos may be empty
        if some and self.group_no_match:
            from retrieval_tip.labelling.groups import MOST, classify_in_groups
            from retrieval_tip.labelling.pool import Pool

            table = classify_in_groups(index, Pool.of(sources, reader), ask).written(
                columns, self.abstain
            )
            if (no_match := table["no_match"].to_pylist().count(True)) > MOST:
                drawn = f"Grouped {MOST:,} of {no_match:,} images without a match, drawn at random"
                say(f"{drawn}; the others joined these groups")
            yield table
        elif some and self.smooth:
            from retrieval_tip.labelling.pool import Pool

            answers, words = Pool.of(sources, reader).smoothed(index, ask)
            say(words)
            yield answers.written(columns, self.abstain)
        elif some and self.burst is not None:
            from retrieval_tip.labelling.bursts import classify_in_bursts

            answers, bursts = classify_in_bursts(index, sources, reader, noting, self.burst, ask)
            yield answers.written(columns, self.abstain).append_column("burst", bursts)
        else:
            from retrieval_tip.evaluation.held_out import classify_sources

            for answers in classify_sources(index, sources, reader, ask):
                yield answers.written(columns, self.abstain)

    def _others(self, cut: Cut, noting: Noting) -> Iterator[pa.Table]:
        """Yield the names of unclassified inputs, after noting when and where the photos were taken."""
        import pyarrow as pa

        if names := [*cut.others, *cut.empty]:
            for name in names if self.exif else ():
                with suppress(InputError):
                    noting.note(name)
            yield pa.table({"input": list(map(show, names))})


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


def _write_sidecars(
    rows: Iterable[Mapping[str, Any]],
    photos: Sequence[Source],
    cut: Cut,
    uncertain: str | None,
    groups: Levels | None,
) -> list[Skipped]:
    """Write the labels of each photo and its boxes as keywords, and return the sidecars that were skipped."""
    from retrieval_tip.labelling.labels import NONE
    from retrieval_tip.labelling.sidecars import write_labels
    from retrieval_tip.labelling.sort import check_files

    def keyword(row: Mapping[str, Any]) -> str | None:
        if row["probability"] is None:  # it was not classified
            return None
        return uncertain if row["label"] in (None, NONE) or row["no_match"] else row["label"]

    check_files(photos, f"--format {XMP}", "they have no sidecars")
    paths = {show(path): path for source in photos for path in source.paths or ()}
    paths |= {show(name): path for name, (path, _) in cut.boxes.items()}
    written = write_labels(((paths[row["input"]], keyword(row)) for row in rows), groups)
    click.echo(f"{str(written).capitalize()}; --undo restores them")
    return written.skipped


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
        click.Choice([*options.FORMATS, *DOCUMENTS, MEGADETECTOR, CAMTRAP_DP, XMP]),
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
    from retrieval_tip import __version__
    from retrieval_tip.cli.output import write_document, write_folder, write_tables
    from retrieval_tip.data import camera_traps
    from retrieval_tip.data.boxes import Cut, cut_boxes
    from retrieval_tip.data.exchange import FORMATS

    rows = rows.asking(ask, printing)
    if rows.undo:
        _restore(inputs)
        return
    zone = rows.timezone
    deployments = camera_traps.read_deployments(rows.deployments, zone) if rows.deployments else {}
    loaded = index_with(folder, encoding, opening, ask)
    rows.check(loaded, printing.style)
    photos = inputs_of(inputs)
    cut = Cut()
    counts = Counter[str]()
    skipped = list[Skipped]()
    sources = photos
    if rows.boxes is not None:
        cut = cut_boxes(rows.boxes, photos, rows.categories)
        sources = cut.sources
        if printing.named == MEGADETECTOR:
            camera_traps.clear(cut.document, show(rows.boxes))
    with reader_for(loaded, photos, encoding) as reader:
        tables = count_rows(rows.tables(loaded, sources, reader, cut), counts)
        answers = chain.from_iterable(table.to_pylist() for table in tables)
        labels = rows.labels(loaded)
        by = f"{Path(loaded.place or '').name}@{loaded.version} (retrieval-tip {__version__})"
        is_of_traps = printing.style in (MEGADETECTOR, CAMTRAP_DP)
        known = (answers, cut, by, camera_traps.root_of(inputs, photos) if is_of_traps else "")
        if printing.style in DOCUMENTS:
            write_document(partial(FORMATS[printing.style], answers, labels), printing.output)
        elif printing.style == MEGADETECTOR:
            write_document(
                partial(camera_traps.megadetector, *known, labels, reader.skipped), printing.output
            )
        elif printing.style == CAMTRAP_DP and printing.output is not None and zone is not None:
            make = partial(camera_traps.camtrap_dp, *known, zone, deployments, reader.skipped)
            write_folder(make, printing.output)
        elif printing.style == XMP:
            skipped += _write_sidecars(answers, photos, cut, rows.uncertain, loaded.groups)
        else:
            texts = {
                "input": chain.from_iterable(source.sources for source in sources),
                "label": labels,
            }
            write_tables(
                tables,
                rows.schema(loaded),
                printing.style,
                printing.output,
                texts,
                predictions=True,
            )
    if printing.output is not None:
        no_match = (
            f", {counts['no_match']:,} with no match"
            if loaded.settings.least_cache is not None
            else ""
        )
        empty = f", {len(cut.empty):,} empty" if rows.boxes is not None else ""
        answered_inputs = counted(counts["rows"] - len(cut.empty) - len(cut.others), "input")
        note(f"{show(printing.output)}: classified {answered_inputs}{no_match}{empty}")
    finish([*reader.skipped, *skipped], "read or changed" if skipped else "read")
