"""Click types for options and arguments: paths, indexes and bounded numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from retrieval_tip.data.remote import is_address, is_remote
from retrieval_tip.errors import MANY, MOST
from retrieval_tip.files import check_out
from retrieval_tip.store.address import KIND, METAVAR, parse
from retrieval_tip.wording import command_line

LARGEST = 1e30
"""Largest number that an option accepts, so that results stay within the float32 range of 3e38."""
SMALLEST = 2.0**-126
"""Smallest number above 0 that an option accepts, which is the smallest normal number of float32."""

Place = Path | str
"""A local path, or the address of an index or the URL of a source."""


class Folder(click.Path):
    """A local path. Index addresses are rejected."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if parse(str(value)) is not None:
            copy = command_line("index", "clone", value, "DIR")
            self.fail(
                f"{value}: is a {KIND}, but this command needs a folder; copy it first: {copy}"
            )
        return super().convert(value, param, ctx)


class IndexType(click.Path):
    """An index, given as a folder or an address."""

    def __init__(self) -> None:
        super().__init__(file_okay=False)
        self.name = METAVAR

    def convert(self, value: object, param: Any, ctx: Any) -> Path | str:
        address = parse(str(value))
        path = Path(str(value))
        if address is None and path.is_file():
            self.fail(
                f"{value}: is a file, not an index folder; give the index first (index list shows yours)"
            )
        return path if address is None else str(address)


FOLDER = Folder(path_type=Path)
INDEX = IndexType()
FILE = click.Path(path_type=Path, dir_okay=False)


def names(ctx: click.Context, _: click.Parameter, texts: tuple[str, ...]) -> list[str]:
    """Split names at commas."""
    listed = [name for text in texts for name in map(str.strip, text.split(",")) if name]
    if texts and not listed:
        raise click.BadParameter("give at least one name", ctx)
    return listed


class SourceType(Folder):
    """A source, given as a path, an object store URL, or ``SCHEME:REST``."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if is_address(value) else super().convert(value, param, ctx)


class Output(click.Path):
    """A file to write. With ``--ray``, it is a folder or a folder URL."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if ctx is not None and isinstance(
            ctx.params.get("ray"), str
        ):  # click stores a marker if it is not given
            return value if is_remote(value) else Path(value)
        if is_remote(value):
            self.fail(f"{value}: only encode --ray can write to object stores; give a local file")
        converted = super().convert(value, param, ctx)
        check_out(Path(value))
        return converted


SOURCE = SourceType(path_type=Path)
OUTPUT = Output(path_type=Path, dir_okay=False)


class Number(click.ParamType[float]):
    """A finite number from ``least`` to ``most``, and not between 0 and :data:`SMALLEST`."""

    name = "X"
    what = "number"
    layout = "g"
    parsed: click.ParamType[Any] = click.FLOAT

    def __init__(self, least: float = 0, most: float = LARGEST) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        number = self.parsed.convert(value, param, ctx)
        tiny = self.least <= 0 < number < SMALLEST
        if tiny or not self.least <= number <= self.most:
            zero, least = ("0, or ", SMALLEST) if tiny else ("", self.least)
            span = f"from {least:{self.layout}} to {self.most:{self.layout}}"
            self.fail(f"{number} is out of range; give {zero}a {self.what} {span}")
        return number


class Count(Number):
    """A whole number from ``least`` to ``most``."""

    name = "N"
    what = "whole number"
    layout = ","
    parsed = click.INT


class K(Count):
    """A number of keys, or ``all``."""

    name = "N|all"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "all":
            return value
        if not str(value).removeprefix("-").isdecimal():
            self.fail(f"{value!r} is neither a whole number nor 'all'")
        return super().convert(value, param, ctx)


def count(kind: str = "", least: int = 1) -> Count:
    """Return a type for whole numbers from ``least`` to the upper bound that :data:`errors.MOST` gives for ``kind``."""
    return Count(least, MOST.get(kind, MANY))


SHOTS = count("shots")
VIEWS_COUNT = count("views")
SEED = count("seed", 0)
KEYS = K(1)
NUMBER = Number()
POSITIVE = Number(SMALLEST)
SHARE = Number(0, 1)


def percent(text: str) -> float:
    """Convert a share from 0 to 1, or in percent."""
    if text.endswith("%"):
        return float(Number(0, 100).convert(text.removesuffix("%"), None, None)) / 100
    return float(SHARE.convert(text, None, None))


def abstaining(text: str) -> float | Literal["auto"]:
    """Convert a probability, or ``auto``."""
    return "auto" if text == "auto" else float(SHARE.convert(text, None, None))
