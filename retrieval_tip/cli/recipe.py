"""A recipe: a TOML file with options of a command, which the command line goes before."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from retrieval_tip.cli.parameters import K
from retrieval_tip.errors import InputError
from retrieval_tip.files import read_regular

RECIPE_BYTES, RECIPE_DOTS = 1 << 20, 1000
"""The largest recipe, and the most dots in it: a dotted key takes the parser time by the square of its parts."""


def recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Options from a TOML file: defaults that the command line overrides, each of the type that its option has."""
    if path is not None:
        values = _toml(path)
        known = {parameter.name: parameter for parameter in ctx.command.params if parameter.expose_value}
        for name, value in values.items():
            if name not in known:
                raise click.BadParameter(f"{path}: unknown setting {name!r}", ctx)
            expected, fits = _kind(known[name])
            if not fits(value):
                raise click.BadParameter(f"{path}: {name}: expected {expected}, not {_shown_toml(value)}", ctx)
        ctx.default_map = values
    return path


def _toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file, by name. Raises BadParameter naming the file."""
    try:
        raw = read_regular(path, RECIPE_BYTES)
        if raw.count(b".") > RECIPE_DOTS:
            raise InputError(f"{path}: more than {RECIPE_DOTS} dots; no setting is a dotted key")
        return tomllib.loads(raw.decode())
    except InputError as error:  # which names it
        raise click.BadParameter(str(error)) from None
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise click.BadParameter(f"{path}: {error}") from None
    except RecursionError:
        raise click.BadParameter(f"{path}: arrays or tables are nested too deeply") from None


def _kind(parameter: click.Parameter) -> tuple[str, Callable[[Any], bool]]:
    """The TOML value that an option or argument takes, in words and as a test."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "true or false", lambda value: isinstance(value, bool)
    what, fits = _single(parameter.type)
    if getattr(parameter, "multiple", False):
        return f"an array, of {what} each", lambda value: isinstance(value, list) and all(map(fits, value))
    return what, fits


def _single(kind: click.ParamType[Any]) -> tuple[str, Callable[[Any], bool]]:
    """The TOML value that a type takes, in words and as a test."""
    if isinstance(kind, K):
        return "a whole number or 'all'", lambda value: _is_whole(value) or value == "all"
    if isinstance(kind, click.types.IntParamType):
        return "a whole number", _is_whole
    if isinstance(kind, click.types.FloatParamType):
        return "a number", lambda value: _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
    return "text", lambda value: isinstance(value, str) and "\0" not in value  # no path or name has that


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number such as TOML has: it fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _shown_toml(value: Any) -> str:
    """A value of TOML as a message shows it; of what holds others, or may be without end, only the kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | float) or _is_whole(value):
        return repr(value)
    kinds = {int: "a larger one than 64 bits hold", list: "an array", dict: "a table"}
    return kinds.get(type(value), "a date or time")
