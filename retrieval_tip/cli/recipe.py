"""Recipes, which are TOML files that set options. Options on the command line override them."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import click

from retrieval_tip.cli.kinds import Count, K, Number
from retrieval_tip.errors import InputError
from retrieval_tip.files import read_regular

RECIPE_BYTES = 1 << 20
"""Largest size of a recipe, in bytes."""


def recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """Check the types of the values in a TOML file, and use the values as defaults for options."""
    if path is not None:
        options = (parameter for parameter in ctx.command.params if parameter.expose_value)
        known = {option.opts[0].lstrip("-").replace("-", "_"): option for option in options}
        values = _toml(path)
        for name, value in values.items():
            if name not in known:
                raise click.BadParameter(f"{path}: unknown option {name!r}", ctx)
            several = getattr(known[name], "multiple", False)
            parts = value if several and isinstance(value, list) else [value]
            expected = _kind(known[name])
            if several != isinstance(value, list) or not all(_fits(part, expected) for part in parts):
                what = f"an array of {expected}" if several else expected
                raise click.BadParameter(f"{path}: {name}: expected {what}", ctx)
        ctx.default_map = {str(known[name].name): value for name, value in values.items()}
    return path


def _toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(read_regular(path, RECIPE_BYTES).decode())
    except InputError as error:  # the message already names the file
        raise click.BadParameter(str(error)) from None
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path}: {error}") from None


def _kind(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "true or false"
    if isinstance(parameter.type, K):
        return "a whole number or 'all'"
    if isinstance(parameter.type, Count):
        return "a whole number"
    return "a number" if isinstance(parameter.type, Number) else "text"


def _fits(value: object, kind: str) -> bool:
    if kind == "true or false" or isinstance(value, bool):
        return kind == "true or false" and isinstance(value, bool)
    if isinstance(value, int):
        return kind != "text" and -(2**63) <= value < 2**63  # range of TOML integers
    if isinstance(value, float):
        return kind == "a number" and math.isfinite(value)
    return isinstance(value, str) and (kind == "text" or (value == "all" and "'all'" in kind)) and "\0" not in value
