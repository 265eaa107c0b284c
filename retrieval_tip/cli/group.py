"""What all commands have in common: their help in sections, -q and -v anywhere, errors of one line, and suggestions."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import click
import cloup

from retrieval_tip.cli.examples import EXAMPLES, SUMMARIES
from retrieval_tip.errors import RetrievalTipError, UsageError, message

SECTIONS = {
    "Backbone": ("model", "pretrained", "precision", "device", "runtime"),
    "Answers": ("k", "tail", "alpha", "beta", "where", "verify", "top", "explain", "neighbours", "with_logits",
                "certify", "abstain"),
    "Output": ("named", "output", "as_json"),
    "Reading images and tables": ("dataset", "split", "root", "norms", "batch_size", "workers", "cache", "no_cache",
                                  "reduce", "strict"),
    "Past one machine": ("engine", "actors", "shard_size", "ray_address"),
    "General": ("quiet", "verbose", "all_help"),
}  # fmt: skip
"""Headings of a command's options; what stands in none of them is the command's own, and comes first."""

FOLDED = ("Reading images and tables", "Past one machine")
"""Headings of which --help names the options, and --help-all says what they do."""

SYNONYMS = {
    "train": ("fit", "finetune"),
    "predict": ("classify",),
    "search": ("search-hp",),
    "ls": ("index list",),
    "list": ("index list",),
    "delete": ("index remove", "index gc"),
    "rm": ("index remove",),
    "version": ("--version",),
    "help": ("--help",),
}
"""What other programs call a command."""


def _quiet(ctx: click.Context, _: click.Parameter, quiet: bool) -> None:
    if quiet:
        ctx.obj = True
        logging.getLogger("retrieval_tip").setLevel(logging.ERROR)


def _verbose(_: click.Context, __: click.Parameter, times: int) -> None:
    if times:
        logging.getLogger("retrieval_tip").setLevel(logging.INFO if times == 1 else logging.DEBUG)


def _all_help(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta["folded"] = False
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _general() -> list[click.Option]:
    """The options that every command has."""
    hidden: dict[str, Any] = {"is_eager": True, "expose_value": False}
    return [
        click.Option(["-q", "--quiet"], is_flag=True, callback=_quiet, help="No warnings, no progress.", **hidden),
        click.Option(["-v", "--verbose"], count=True, callback=_verbose, help="Say more; -vv all.", **hidden),
        click.Option(["--help-all", "all_help"], is_flag=True, callback=_all_help, help="Every option.", **hidden),
    ]  # fmt: skip


class Command(cloup.Command):
    """A command whose options stand in sections, and whose errors name its own usage."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.params += _general()

    def format_params(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by their headings."""
        assert isinstance(formatter, cloup.HelpFormatter)
        by_name = {name: heading for heading, names in SECTIONS.items() for name in names}
        records: dict[str, list[tuple[str, str]]] = {"Options": [], **{heading: [] for heading in SECTIONS}}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                heading = "General" if "--help" in option.opts else by_name.get(option.name or "", "Options")
                records[heading].append(record)
        folded = FOLDED if ctx.meta.get("folded", True) else ()
        for heading, own in records.items():
            if own and heading in folded:
                with formatter.section(f"{heading} (--help-all says more)"):
                    formatter.write_text(", ".join(names.split(" ")[0].rstrip(",") for names, _ in own))
            elif own:
                with formatter.section(heading):
                    formatter.write_dl(own)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The summary of the command, which fits."""
        return SUMMARIES.get(self.name or "", super().get_short_help_str(limit))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Two examples."""
        path = ctx.command_path.partition(" ")[2]
        if path in EXAMPLES:
            with formatter.section("Examples"):
                for example in EXAMPLES[path]:
                    formatter.write(f"{'':{formatter.current_indent}}retrieval-tip {example}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click, but what is missing is named all at once, and what has a short name only is offered by that."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.MissingParameter as error:
            missing = self._missing(ctx, given)
            if len(missing) < 2:
                raise
            raise click.UsageError(f"Missing {' and '.join(missing)}.", ctx) from error
        except click.NoSuchOption as error:
            short = error.option_name[1:]
            if error.option_name.startswith("--") and any(short in option.opts for option in self.params):
                raise click.UsageError(f"No such option {error.option_name!r}. Did you mean {short}?", ctx) from None
            raise

    def _missing(self, ctx: click.Context, args: Sequence[str]) -> list[str]:
        """What is required and was not given, as it is called in the usage."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        return [
            f"argument {one.make_metavar(ctx)}" if isinstance(one, click.Argument) else f"option {one.opts[0]}"
            for one in self.get_params(ctx)
            if one.required and given.get(one.name or "") in (None, (), click.core.UNSET)  # type: ignore[attr-defined]
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """As click; what goes wrong is said with the command's own usage."""
        with in_one_line(ctx):
            return super().invoke(ctx)


class Group(cloup.Group):
    """A group of :class:`Command`, which knows what other programs call its commands."""

    command_class = Command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click; a name that is no command's is compared with all of them, here and in other groups."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            name, near = args[0], getattr(error, "possibilities", None) or []
            everywhere = [
                *SYNONYMS.get(name, ()),
                *(p for p in _paths(ctx.find_root().command) if p.split()[-1] == name),
            ]
            if not everywhere:
                raise
            shown = " or ".join(dict.fromkeys([*everywhere, *near]))
            raise click.UsageError(f"No such command {name!r}. Did you mean {shown}?", ctx) from None


command = partial(click.command, cls=Command)


def _paths(group: click.Command, prefix: str = "") -> Iterator[str]:
    """The commands of a group, and of the groups in it, by their names from here."""
    for name, own in group.commands.items() if isinstance(group, click.Group) else ():
        yield f"{prefix}{name}"
        yield from _paths(own, f"{prefix}{name} ")


@contextmanager
def in_one_line(ctx: click.Context | None = None) -> Iterator[None]:
    """Errors that are raised here, as exceptions that click shows in one line of bounded length."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # it is the help
        raise
    except click.UsageError as error:
        raise click.UsageError(message(error.format_message()), error.ctx) from error
    except click.ClickException as error:
        raise click.ClickException(message(error.format_message())) from error
    except UsageError as error:
        raise click.UsageError(message(str(error)), ctx) from error
    except RetrievalTipError as error:
        raise click.ClickException(message(str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's own for a GPU, which one of FAISS is made too
            raise click.ClickException("out of memory on the GPU; give --device cpu, or a smaller batch") from None
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's words
            raise click.ClickException("out of memory; a smaller --batch-size or source may help") from None
        raise
    except OSError as error:
        lost = _give_up_stdout()
        if isinstance(error, BrokenPipeError):  # whoever reads has seen enough
            raise click.exceptions.Exit(0) from None
        name = error.filename or ("standard output" if lost else "")
        raise click.ClickException(message(f"{name}: {error.strerror or error}".removeprefix(": "))) from error


def _give_up_stdout() -> bool:
    """Whether standard output takes no more; what it still holds is then dropped, or Python would fail at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
