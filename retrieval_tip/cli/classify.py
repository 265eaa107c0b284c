"""The command ``classify``, with the rows and files that it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrieval_tip import hooks
from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import Option, PluginCommand, grouped
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import finish, note, say
from retrieval_tip.cli.opening import index_with, inputs_of, reader_for
from retrieval_tip.cli.options import OutputOptions
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.settings import Ask
from retrieval_tip.wording import counted, show
from retrieval_tip.writers import Answered, FormatWriter, Outcome

if TYPE_CHECKING:
    import pyarrow as pa

    from retrieval_tip.data.boxes import PhotoBoxes
    from retrieval_tip.data.exif import ExifRecorder
    from retrieval_tip.data.reader import FeatureBlock, Reader
    from retrieval_tip.data.sources import Source
    from retrieval_tip.model import Index
    from retrieval_tip.predictions import Abstain, Predictions


@dataclass(frozen=True)
class RowOptions:
    """The columns of answers, the rules for withholding a label and for grouping photos.

    Options:
        explain: Show the shots that contributed most to an answer, and its text and cache logits.
        abstain: Withhold the label if its probability is below P. With auto, P is 0.5, and images without a match
            get no label.
        group_no_match: Group similar images that have no match. The column group numbers the groups, largest first.
        burst: Give all photos of a burst the mean of their probabilities. Each is in the same folder, and taken at most
            SECONDS after the one before, for example 10.
        boxes: Boxes of a detector, in MegaDetector's format. Each is classified as photo.jpg#1. The column detected has
            its category, or "empty" if a photo has no box.
        categories: Categories of boxes to classify, separated by commas. [default: all; animal in the formats
            megadetector and camtrap-dp]
        smooth: Mix in the answers to similar photos of INPUTS, if this helps with held-out shots.
        exif: Add the columns taken_at, latitude and longitude from the EXIF metadata of photos.
        frames: Give each frame of a video a row. [default: a row per video, with the mean of their probabilities and
            the name of the frame that matches best]
    """

    explain: bool = flag(**options.ANSWERS)
    abstain: Abstain = option(kinds.abstaining, metavar="P|AUTO", **options.ANSWERS)
    group_no_match: bool = flag(**options.ANSWERS, rare=True)
    burst: float | None = option(kinds.NUMBER, metavar="SECONDS", **options.ANSWERS)
    boxes: Path | None = option(kinds.FILE, **options.INPUT)
    categories: list[str] = option(
        multiple=True, metavar="NAME,...", callback=kinds.names, **options.INPUT, rare=True
    )
    smooth: bool = flag(**options.ANSWERS, rare=True)
    exif: bool = flag(**options.ANSWERS, rare=True)
    frames: bool = flag(**options.ANSWERS, rare=True)
    ask: Ask = Ask()
    clips: Mapping[str, str] = field(default_factory=dict)

    def asking(self, ask: Ask, writer: FormatWriter | None, name: str | None) -> RowOptions:
        """Return the options for a question and a format. Raises UsageError if boxes do not fit the format."""
        if writer is None:
            return replace(self, ask=ask)
        wants = writer.wants
        if self.boxes is not None and wants.whole_photos:
            raise UsageError(f"--format {name}: lists whole photos; leave out --boxes")
        categories = self.categories
        if not categories and self.boxes is not None:
            categories = list(wants.categories)
        if wants.top is not None:
            ask = replace(ask, top=wants.top)
        return replace(self, categories=categories, exif=self.exif or wants.exif, ask=ask)

    def joining(self, sources: Sequence[Source], inputs: Sequence[str]) -> RowOptions:
        """Return options that give each video one answer, unless ``inputs`` name its frames or options mix answers."""
        from retrieval_tip.data.source import clip_of

        if self.frames or self.group_no_match or self.smooth or self.burst or self.boxes:
            return self
        named = set(inputs)
        files = {
            show(path): show(clip_of(path))
            for source in sources
            for path in source.paths or ()
            if path not in named
        }
        return replace(self, clips={path: file for path, file in files.items() if file})

    def check(self, index: Index) -> None:
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

        added = {"burst": pa.int64(), "detected": pa.string(), "frame": pa.string()}
        types = {**PREDICTIONS, **EXIF, **added}
        shown = {
            "input": True,
            "label": True,
            "level": self.ask.at_least is not None,
            "probability": True,
            "no_match": True,
            "frame": bool(self.clips),
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
            sources = noting.over(sources)
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
        """Yield the answers to photos, mixed or grouped as the options say. ``frame`` names the frame of a video."""
        import pyarrow as pa

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
            from retrieval_tip.evaluation.held_out import classified
            from retrieval_tip.labelling.clips import one_of_each

            reader = reader.for_queries(index.parts, index.shares)

            def asked(source: Source) -> Iterator[FeatureBlock]:
                blocks = ((source, block) for block in reader.blocks(source))
                return one_of_each(index, blocks, lambda path: self.clips.get(show(path), ""), ask)

            pairs = ((source.items["source"], asked(source)) for source in sources)
            for answers in classified(index, pairs, ask):
                names = answers.inputs
                inputs = pa.array([self.clips.get(name, name) for name in names], pa.string())
                frames = [name if name in self.clips else None for name in names]
                table = answers.named(inputs).written(columns, self.abstain)
                yield table.append_column("frame", pa.array(frames, pa.string()))

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


def _by(index: Index) -> str:
    """Return the name of an index, its version, and the version of this program."""
    from retrieval_tip import __version__

    name = Path(index.place or "").name
    return f"{name}@{index.version} (retrieval-tip {__version__})"


class Format(click.Choice[str]):
    """A format of our own, or of an installed package."""

    def __init__(self) -> None:
        super().__init__([*options.FORMATS, *hooks.TABLE["writers"]])

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the name of a format, or fail with the names of all that are installed."""
        if value in self.choices or hooks.find("writers", value) is not None:
            return value
        installed = click.Choice([*options.FORMATS, *hooks.names("writers")])
        return installed.convert(value, param, ctx)


class Classify(PluginCommand):
    """The command, with the options of the format that its arguments name."""

    kind = "writers"

    def plugin_in(self, args: Sequence[str]) -> str | None:
        """Return the format that arguments name, unless it is one of rows."""
        for place, arg in enumerate(args):
            option_name, is_joined, value = arg.partition("=")
            if arg == "--":
                break
            if option_name == "--format":
                name = value if is_joined else next(iter(args[place + 1 :]), None)
                return None if name in options.FORMATS else name
        return None

    def spelled(self, name: str) -> str:
        """Return how arguments name a format."""
        return f"--format {name}"

    def params_of(self, plugin: Any, heading: str = "Options") -> list[click.Parameter]:
        """Return the options of a format."""
        params = super().params_of(plugin, heading)
        return [*params, UNDO] if hasattr(plugin, "undo") else params

    def use(self, ctx: click.Context, plugin: Any, options: dict[str, Any]) -> None:
        """Set the writer, and whether to undo what it has written."""
        ctx.params["undo"] = options.pop("undo", False)
        ctx.params["writer"] = plugin and plugin(**options)


UNDO = Option(
    ["--undo"],
    is_flag=True,
    heading="Output",
    help="Only restore what an earlier call has changed.",
)

_ASK = {
    "top": option(kinds.count(), default=1, help="Number of classes to report.", **options.ANSWERS),
    "neighbours": option(
        kinds.count(),
        default=5,
        help="Number of shots that --explain shows.",
        **options.ANSWERS,
        rare=True,
    ),
    "logits": flag(
        help="Show the logits of all classes, in the class order of the index.",
        **options.ANSWERS,
        rare=True,
    ),
}
_PRINTING = {
    "named": option(
        Format(),
        "--format",
        **options.OUTPUTS,
    ),
    "output": option(kinds.OUTPUT, "--out", "-o", **options.OUTPUTS),
}


@click.command(cls=Classify)
def classify(
    folder: Place = options.INDEX_ARGUMENT,
    inputs: tuple[str, ...] = argument(nargs=-1, required=True),
    ask: Ask = grouped(Ask, options.ASKING | options.LEVELS | _ASK),
    opening: options.OpeningOptions = options.OPENING,
    printing: OutputOptions = grouped(OutputOptions, _PRINTING),
    rows: RowOptions = grouped(RowOptions),
    encoding: options.EncodingOptions = grouped(options.EncodingOptions, rare=True),
    *,
    writer: FormatWriter | None,
    undo: bool,
) -> None:
    """Classify images or features with an index.

    INPUTS are images, folders, globs, tables of paths or feature tables. Use - to read paths from standard input. The
    column no_match is true for an image that resembles no shot. A photo that is a shot is classified without itself.
    classify --format NAME --help also explains the options of a format.

    Examples:
        classify indexes/things new/*.jpg --explain
        classify indexes/things new --top 3 --out answers.csv
    """
    from retrieval_tip.data.boxes import PhotoBoxes, cut_boxes

    if undo:
        undone: Outcome = writer.undo(inputs_of(inputs))  # type: ignore[union-attr]  # see Classify
        click.echo(undone.said.capitalize())
        finish(undone.skipped, "restored")
        return
    rows = rows.asking(ask, writer, printing.named)
    if writer is None:
        printing.style  # noqa: B018 - raises UsageError for an unknown suffix
    else:
        writer.check(printing.output)
    loaded = index_with(folder, encoding, opening, ask)
    rows.check(loaded)
    photos = inputs_of(inputs)
    boxes = PhotoBoxes(photos)
    if writer is None:
        rows = rows.joining(photos, inputs)
    if rows.boxes is not None:
        boxes = cut_boxes(rows.boxes, photos, rows.categories)
    counts = Counter[str]()
    with reader_for(loaded, photos, encoding) as reader:
        tables = count_rows(rows.tables(loaded, boxes.sources, reader, boxes), counts)
        written = Outcome()
        if writer is None:
            _write_tables(tables, rows, loaded, boxes, printing)
        else:
            answers = Answered(
                rows=chain.from_iterable(table.to_pylist() for table in tables),
                labels=rows.labels(loaded),
                groups=loaded.groups,
                photos=photos,
                boxes=boxes,
                inputs=inputs,
                by=_by(loaded),
                skipped=reader.skipped,
            )
            written = writer.write(answers, printing.output)
    if written.said:
        undoing = "; --undo restores them" if hasattr(writer, "undo") else ""
        click.echo(written.said.capitalize() + undoing)
    if printing.output is not None:
        said = counted(counts["rows"] - len(boxes.empty) - len(boxes.others), "input")
        if loaded.settings.least_cache is not None:
            said += f", {counts['no_match']:,} with no match"
        if rows.boxes is not None:
            said += f", {len(boxes.empty):,} empty"
        note(f"{show(printing.output)}: classified {said}")
    finish([*reader.skipped, *written.skipped], "read or written" if written.skipped else "read")


def _write_tables(
    tables: Iterator[pa.Table],
    rows: RowOptions,
    index: Index,
    boxes: PhotoBoxes,
    printing: OutputOptions,
) -> None:
    """Write the answers in a format of our own."""
    from retrieval_tip.cli.output import write_tables

    texts = {
        "input": chain.from_iterable(source.sources for source in boxes.sources),
        "label": rows.labels(index),
    }
    schema = rows.schema(index)
    write_tables(tables, schema, printing.style, printing.output, texts, predictions=True)
