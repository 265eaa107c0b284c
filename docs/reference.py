"""Write ``docs/cli.md``, the reference of all commands, from their help; ``--check`` fails if it is out of date."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from retrieval_tip.cli import main
from retrieval_tip.cli.group import Option

PAGE = Path(__file__).parent / "cli.md"
WIDTH, COLUMN = 100, 24
COMMON = 4
"""Number of commands from which an option is explained once, at the end of the page."""
HEAD = f"""# Commands

Options of {COMMON} or more commands are listed by name, and explained [at the end](#common-options).
`retrieval-tip COMMAND --help-all` explains every option of a command. `make docs` writes this page.
"""

Record = tuple[str, str, str]
"""Heading, names and help of an option."""


def commands(group: click.Group, ctx: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield the commands of a group and of its groups, each with its context."""
    for name, command in group.commands.items():
        own = command.context_class(command, info_name=name, parent=ctx)
        if isinstance(command, click.Group):
            yield from commands(command, own)
        else:
            yield command, own


def options(command: click.Command, ctx: click.Context) -> list[Record]:
    """Return the options of a command, without ``--help``."""
    records = []
    for option in command.get_params(ctx):
        record = option.get_help_record(ctx)
        if isinstance(option, click.Option) and record is not None and "--help" not in option.opts:
            records.append((option.heading if isinstance(option, Option) else "Options", *record))
    return records


def listed(records: list[Record], common: set[Record], formatter: click.HelpFormatter) -> None:
    """Write options under their headings: the common ones by name, the others with their help."""
    for heading in dict.fromkeys(record[0] for record in records):
        own = [record for record in records if record[0] == heading]
        with formatter.section(heading):
            if full := [record[1:] for record in own if record not in common]:
                formatter.write_dl(full, COLUMN)
            if names := [record[1].split(" ")[0].rstrip(",") for record in own if record in common]:
                formatter.write_text(", ".join(names))


def block(formatter: click.HelpFormatter) -> str:
    """Return the formatted text as a Markdown block."""
    return f"```text\n{formatter.getvalue().strip()}\n```\n"


def reference() -> str:
    """Return the page."""
    found = [(*one, options(*one)) for one in commands(main, main.context_class(main, info_name="retrieval-tip"))]
    uses = Counter(record for *_, records in found for record in records)
    common = {record for record, number in uses.items() if number >= COMMON}
    everywhere = {record for record, number in uses.items() if number == len(found)}
    parts = [HEAD]
    for command, ctx, records in found:
        formatter = click.HelpFormatter(width=WIDTH)
        command.format_usage(ctx, formatter)
        command.format_help_text(ctx, formatter)
        listed([record for record in records if record not in everywhere], common, formatter)
        command.format_epilog(ctx, formatter)
        parts.append(f"## {ctx.command_path.partition(' ')[2]}\n\n{block(formatter)}")
    formatter = click.HelpFormatter(width=WIDTH)
    listed([record for record in uses if record in common], set(), formatter)
    return "\n".join([*parts, "## Common options\n", block(formatter)])


if __name__ == "__main__":
    page = reference()
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE}: out of date; run python docs/reference.py")
