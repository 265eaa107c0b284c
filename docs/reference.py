"""Write ``docs/cli.md``, the reference of all commands, from their help. ``--check`` only checks it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from retrieval_tip.cli import main

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100
HEAD = """# Every command

This page is the output of `retrieval-tip COMMAND --help-all`; `--help` shortens rarely used options. `make docs`
generates it.
"""


def commands(group: click.Group, ctx: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield the commands of a group and its subgroups, each with its context."""
    for name, command in group.commands.items():
        own = click.Context(command, info_name=name, parent=ctx, terminal_width=WIDTH, max_content_width=WIDTH)
        if isinstance(command, click.Group):
            yield from commands(command, own)
        else:
            yield command, own


def reference() -> str:
    """Return the page."""
    root = main.context_class(main, info_name="retrieval-tip", terminal_width=WIDTH, max_content_width=WIDTH)
    parts = [HEAD]
    for command, ctx in commands(main, root):
        own = command.context_class(
            command, info_name=ctx.info_name, parent=ctx.parent, terminal_width=WIDTH, max_content_width=WIDTH
        )
        own.meta["folded"] = False
        name = own.command_path.partition(" ")[2]
        parts.append(f"## {name}\n\n```text\n{command.get_help(own).rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    page = reference()
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        sys.exit(f"{PAGE}: outdated; run python docs/reference.py")
