"""The messages of the commands, on standard error, and the exit statuses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import click

from retrieval_tip.errors import Skipped, counted, message, one_line, show

FAILED, SOME_SKIPPED = 1, 3


def say(text: str) -> None:
    """Say this on standard error, as a message."""
    click.echo(message(text), err=True)


def warn(warnings: Iterable[str]) -> None:
    """Say these on standard error, unless --quiet."""
    for warning in warnings:
        logging.getLogger("retrieval_tip").warning("%s", warning)


def say_skipped(skipped: Skipped) -> None:
    """Say this as an encoder does."""
    warn([f"skipped {skipped}"])


def say_fit(fit: Mapping[str, Any]) -> None:
    """Print the estimate of a fit (``provenance["fit"]``) and its weakest classes; with -v, the form it chose."""
    say(fit["summary"])
    if fit["weakest"]:
        classes = (f"{name} {100 * right / held:.0f} % ({right} of {held})" for name, right, held in fit["weakest"])
        say(f"Weakest classes: {', '.join(classes)}")
    logging.getLogger("retrieval_tip").info("Chosen form: %s", fit["form"])


def about(place: object, what: str) -> None:
    """Print on standard output what has become of a file, folder or address."""
    click.echo(one_line(f"{show(str(place))}: {what}"))


def shown(value: object) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{one_line(key)} {shown(part)}" for key, part in value.items())
    if isinstance(value, list):
        line = ", ".join(shown(part) for part in value[:8])
        return line + (f" ... ({len(value)} in all)" if len(value) > 8 else "")
    return "-" if value is None else one_line(str(value))


def print_facts(facts: Mapping[str, object], width: int = 0) -> None:
    """Print a line for each of these, on standard output, with the values below each other."""
    width = max(width, *map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {shown(value)}")


def finish(ctx: click.Context, skipped: list[Skipped]) -> None:
    """Each skipped input was named when it was met; the exit status says that there were some."""
    if skipped:
        say(f"{counted(len(skipped), 'input')} could not be read")
        ctx.exit(SOME_SKIPPED)
