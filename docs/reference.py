"""Write ``docs/cli.md``, the reference for all commands, from their help.

With ``--check``, nothing is written, and the script fails if the reference is out of date.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from retrieval_tip import hooks
from retrieval_tip.cli import main
from retrieval_tip.cli.group import Option, PluginCommand

PAGE = Path(__file__).parent / "cli.md"
WIDTH, COLUMN = 100, 24
HEAD = """# Commands

Each command lists its own options. Options that several commands share are explained once,
[at the end](#common-options). `retrieval-tip COMMAND --help` prints the options that most people need, with `-v`
all of them, and two examples.
An option can be given once, unless its help says that it can be repeated. `make docs` writes this page.
"""

Record = tuple[str, str, str]
"""The heading, the names and the help of an option."""


def commands(
    group: click.Group, ctx: click.Context
) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield each command of a group and its subgroups, with its context."""
    group.list_commands(ctx)  # imports those of a plugin
    for name, command in group.commands.items():
        own = command.context_class(command, info_name=name, parent=ctx)
        if isinstance(command, click.Group):
            yield from commands(command, own)
        else:
            yield command, own


def options(command: click.Command, ctx: click.Context) -> list[Record]:
    """Return the options of a command, excluding ``--help``."""
    records = []
    for option in command.get_params(ctx):
        record = option.get_help_record(ctx)
        if isinstance(option, click.Option) and record is not None and "--help" not in option.opts:
            records.append((option.heading if isinstance(option, Option) else "Options", *record))
    return records


def name(record: Record) -> str:
    """Return the first name of an option."""
    return record[1].split(" ")[0].rstrip(",")


def shared(uses: Counter[Record]) -> list[Record]:
    """Return the options of several commands. Of options that have the same name, the most frequent one is common."""
    first: dict[str, Record] = {}
    for record, number in uses.most_common():
        if number > 1:
            first.setdefault(name(record), record)
    return [record for record in uses if record in first.values()]


def listed(own: list[Record], common: list[Record]) -> Iterator[str]:
    """Yield the names of a command's common options. If most options of a heading are used, name the heading."""
    for heading in dict.fromkeys(record[0] for record in common):
        every = [record for record in common if record[0] == heading]
        used, missing = (
            [record for record in every if (record in own) is there] for there in (True, False)
        )
        if len(used) > max(1, len(missing)):
            yield f"{heading} (without {', '.join(map(name, missing))})" if missing else heading
        else:
            yield from map(name, used)


def block(formatter: click.HelpFormatter) -> str:
    """Return the formatted text as a Markdown block."""
    return f"```text\n{formatter.getvalue().strip()}\n```\n"


def entry(command: click.Command, ctx: click.Context, own: list[Record], common: str) -> str:
    """Return the usage, the text and the options of a command. Common options are only listed by name."""
    formatter = click.HelpFormatter(width=WIDTH)
    pieces = [piece for piece in command.collect_usage_pieces(ctx) if piece != "[OPTIONS]"]
    formatter.write(" ".join([ctx.command_path, *pieces]) + "\n")
    click.Command.format_help_text(command, ctx, formatter)  # without examples
    if own:
        with formatter.section("Options"):
            formatter.write_dl([record[1:] for record in own], COLUMN)
    if common:
        with formatter.section("Common options"):
            formatter.write(
                textwrap.indent(
                    "\n".join(textwrap.wrap(common, WIDTH, break_on_hyphens=False)), "  "
                )
            )
    return f"## {ctx.command_path.partition(' ')[2]}\n\n{block(formatter)}"


def plugins(command: PluginCommand, ctx: click.Context) -> Iterator[str]:
    """Yield an entry for each of our plugins of a command that has options."""
    for name in hooks.TABLE[command.kind]:
        plugin = hooks.find(command.kind, name)
        own = command.params_of(plugin)
        if own:
            formatter = click.HelpFormatter(width=WIDTH)
            formatter.write(f"{ctx.command_path} {command.spelled(name)}\n")
            formatter.indent()
            formatter.write_text(inspect.cleandoc(plugin.__doc__).partition("\n\nOptions:")[0])
            formatter.dedent()
            with formatter.section("Options"):
                formatter.write_dl([option.get_help_record(ctx) for option in own], COLUMN)
            path = ctx.command_path.partition(" ")[2]
            yield f"### {path} {command.spelled(name)}\n\n{block(formatter)}"


def reference() -> str:
    """Return the text of the page."""
    found = [
        (*one, options(*one))
        for one in commands(main, main.context_class(main, info_name="retrieval-tip"))
    ]
    uses = Counter(record for *_, records in found for record in records)
    common = shared(uses)
    parts = [HEAD]
    for command, ctx, records in found:
        own = [record for record in records if record not in common]
        names = ", ".join(
            listed([record for record in records if uses[record] < len(found)], common)
        )
        parts.append(entry(command, ctx, own, names))
        if isinstance(command, PluginCommand):
            parts += plugins(command, ctx)
    formatter = click.HelpFormatter(width=WIDTH)
    for heading in dict.fromkeys(record[0] for record in common):
        with formatter.section(heading):
            formatter.write_dl([record[1:] for record in common if record[0] == heading], COLUMN)
    return "\n".join([*parts, "## Common options\n", block(formatter)])


if __name__ == "__main__":
    page = reference()
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE}: out of date; run python docs/reference.py")
