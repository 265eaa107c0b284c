"""The interface of writers, which write the answers of an index in the format of another program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.files import output, sync, temporary
from retrieval_tip.wording import json_line, show

if TYPE_CHECKING:
    from retrieval_tip.data.boxes import PhotoBoxes
    from retrieval_tip.data.source import Source
    from retrieval_tip.levels import Levels

Row = Mapping[str, Any]
"""An answer. It has the columns that ``classify --format json`` writes."""


@dataclass(frozen=True)
class Wants:
    """What a format needs.

    Attributes:
        top: the number of classes in the columns ``labels`` and ``probabilities``. [default: as the user says]
        exif: whether rows need the columns ``taken_at``, ``latitude`` and ``longitude``.
        whole_photos: whether the format cannot contain boxes.
        categories: the categories of boxes to classify, unless the user names others.
    """

    top: int | None = None
    exif: bool = False
    whole_photos: bool = False
    categories: Sequence[str] = ()


@dataclass(frozen=True)
class Answered:
    """The answers to write, and where they come from.

    Attributes:
        rows: the answers. They are computed while they are read, which is possible once.
        labels: the labels that answers can have.
        groups: broader groups of the classes, if the index has them.
        photos: the sources that were classified.
        boxes: the boxes of the photos.
        inputs: the names of the inputs as the user gave them.
        by: the name and version of the index and of this program.
        skipped: the photos that could not be read. It grows while ``rows`` is read.
    """

    rows: Iterator[Row]
    labels: Sequence[str]
    groups: Levels | None
    photos: Sequence[Source]
    boxes: PhotoBoxes
    inputs: Sequence[str] = ()
    by: str = ""
    skipped: Sequence[Skipped] = ()


@dataclass(frozen=True)
class Outcome:
    """What a writer tells the user: a sentence, unless the output says it all, and what could not be written."""

    said: str = ""
    skipped: Sequence[Skipped] = field(default_factory=list)


class FormatWriter(Protocol):
    """A format. It is a frozen dataclass whose fields are options of ``classify`` (see :func:`hooks.option`).

    A writer may also have a method ``undo(photos: Sequence[Source]) -> Outcome``. The command then offers ``--undo``,
    which calls it with the photos and neither opens the index nor classifies.
    """

    wants: ClassVar[Wants]

    def check(self, out: Path | None) -> None:
        """Raise UsageError or InputError if options do not fit. This is called before the index is opened."""

    def write(self, answers: Answered, out: Path | None) -> Outcome:
        """Read the rows, and write them to ``out`` or to standard output."""


def write_json(make: Callable[[], object], out: Path | None) -> None:
    """Write the JSON value that ``make`` returns to standard output or to a file, after opening the file."""
    with output(out) as target:
        target.write(f"{json_line(make())}\n".encode())


def write_folder(make: Callable[[], Mapping[str, str]], folder: Path) -> None:
    """Write the texts that ``make`` returns by the names of their files into a new folder, all at once."""
    if os.path.lexists(folder):
        raise InputError(f"{show(folder)}: exists already; choose another --out")
    try:
        with temporary(folder, folder=True) as new:
            for name, text in make().items():
                with output(new / name) as target:
                    target.write(text.encode())
            new.rename(folder)
            sync(folder.parent)
    except OSError as error:
        raise InputError(f"{show(folder)}: cannot be written: {error.strerror or error}") from None
