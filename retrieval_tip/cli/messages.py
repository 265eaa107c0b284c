"""Functions that print messages and results, and the exit statuses of commands."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from retrieval_tip.errors import Skipped
from retrieval_tip.wording import counted, json_line, message, one_line, show

FAILED, SOME_SKIPPED = 1, 3


def say(text: str) -> None:
    """Print a message on standard error."""
    click.echo(message(text), err=True)


def quiet() -> bool:
    """Return whether --quiet is given."""
    return logging.getLogger("retrieval_tip").level == logging.ERROR


def note(text: str) -> None:
    """Print a message on standard error, unless --quiet is given."""
    if not quiet():
        say(text)


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on standard error, unless --quiet is given."""
    for warning in warnings:
        logging.getLogger("retrieval_tip").warning("%s", warning)


def say_fit(fit: Mapping[str, Any]) -> None:
    """Print the accuracy estimate of a fit (``provenance["fit"]``) and its weakest classes.

    With -v, also print the selected form.
    """
    say(fit["summary"])
    if fit["weakest"]:
        classes = (
            f"{name} {100 * right / held:.0f} % ({right} of {held})"
            for name, right, held in fit["weakest"]
        )
        say(f"Weakest classes: {', '.join(classes)}")
    logging.getLogger("retrieval_tip").info("Chosen form: %s", fit["form"])


def about(place: object, what: str) -> None:
    """Print a result on standard output, preceded by its file, folder or address."""
    click.echo(one_line(f"{show(str(place))}: {what}"))


def shown(value: object) -> str:
    """Format a value for printing."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{one_line(key)} {shown(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        line = ", ".join(shown(entry) for entry in value[:8])
        return line + (f" ... ({len(value)} in total)" if len(value) > 8 else "")
    return "-" if value is None else one_line(str(value))


def print_result(facts: Mapping[str, object], as_json: bool = False) -> None:
    """Print names and values as one JSON object, or on a line each, with the values aligned."""
    if as_json:
        click.echo(json_line(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {shown(value)}")


def finish(skipped: Sequence[Skipped], done: str = "read") -> None:
    """If any inputs were skipped, print how many, and exit with the status ``SOME_SKIPPED``."""
    if skipped:
        say(f"{counted(len(skipped), 'input')} could not be {done}")
        click.get_current_context().exit(SOME_SKIPPED)
