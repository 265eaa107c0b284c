"""Behaviour shared by all commands.

A command is a function whose parameters have a :func:`hooks.argument`, a :func:`hooks.option`, a :func:`hooks.flag` or
a group of options (:func:`grouped`) as their default. Its docstring contains the help of the command, in the section
Options the help of each option, and in the section Examples two examples. The help is divided into sections. -q and -v
can follow any command. Errors are printed on one line, and similar names are suggested for an unknown name.
"""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial, wraps
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple

import click

from retrieval_tip import hooks
from retrieval_tip.errors import RetrievalTipError, UsageError
from retrieval_tip.wording import message

COLUMN = 24
"""Maximum width of the column of option names. The help of a longer name starts on the next line."""

HEADINGS = ("Options", "Output", "Answers", "Input", "Encoder", "General")
"""The order of the headings. Those of formats follow."""

SYNONYMS = {
    "train": ("index build", "fit", "finetune"),
    "create": ("index build",),
    "predict": ("classify",),
    "tag": ("classify",),
    "search": ("find", "search-hp"),
    "test": ("evaluate",),
    "score": ("evaluate",),
    "report": ("evaluate --report",),
    "calibrate": ("fit --calibrate",),
    "rebuild": ("index set --index",),
    "undo": ("index rollback", "sort --undo"),
    "restore": ("index rollback",),
    "check": ("index audit", "index verify", "doctor"),
    "annotate": ("label",),
    "review": ("label",),
    "onnx": ("index export --onnx",),
    "copy": ("index clone",),
    "duplicates": ("find --duplicates",),
    "ls": ("index list",),
    "list": ("index list",),
    "delete": ("index remove", "index gc"),
    "rm": ("index remove",),
    "version": ("--version",),
    "help": ("--help",),
}
"""Command names used by other programs, and the commands to suggest for them."""


def _set_level(_: click.Context, option: click.Parameter, times: int) -> None:
    if times:
        level = logging.INFO if times == 1 else logging.DEBUG
        if option is QUIET:
            level = logging.ERROR
        logging.getLogger("retrieval_tip").setLevel(level)


class Option(click.Option):
    """An option that the help lists under a heading. Of a ``rare`` one, it lists the name only."""

    def __init__(
        self, *arguments: Any, heading: str = "Options", rare: bool = False, **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self.heading = heading
        self.rare = rare


class OptionGroup(NamedTuple):
    """Options that a command takes as one parameter of the type ``kind``."""

    kind: Callable[..., object]
    params: Sequence[click.Parameter]


def grouped(
    kind: type[Any],
    options: Mapping[str, Any] | None = None,
    *,
    without: Sequence[str] = (),
    **shown: Any,
) -> Any:
    """Declare a group of options, as the default of a parameter of a command.

    The options are those that the fields of the dataclass ``kind`` declare, or the given ``options`` by field.
    """
    told = {name: text for base in kind.__mro__ for name, text in _texts(base.__doc__).items()}
    declared = options or {
        declaration.name: declaration for declaration in fields(kind) if declaration.metadata
    }
    return OptionGroup(
        kind,
        [
            _parameter(name, declaration, told, **shown)
            for name, declaration in declared.items()
            if name not in without
        ],
    )


def _texts(doc: str | None) -> dict[str, str]:
    """Return the text after each name in a docstring, without articles and cross-references."""
    _, *parts = re.split(r"^    (\w+): ", inspect.cleandoc(doc or ""), flags=re.MULTILINE)
    texts = (re.sub(r" \(see :\w+:`[^`]*`\)", "", " ".join(text.split())) for text in parts[1::2])
    return {
        name: re.sub(r"^(The|A) (\w)", lambda article: article[2].upper(), text)
        for name, text in zip(parts[::2], texts, strict=True)
    }


def _parameter(name: str, declared: Any, told: Mapping[str, str], **shown: str) -> click.Parameter:
    more = {**declared.metadata, **shown}
    if more.pop("is_argument", False):
        return click.Argument([name], **more)
    text, default, rest = (more.pop("help", None) or told[name]).partition("[default: ")
    repeated = "Can be repeated." if more.get("multiple") else ""
    names = more.pop("names") or [f"--{name.replace('_', '-')}"]
    more["help"] = f"{text.rstrip()} {repeated}".rstrip() + "  " * bool(default) + default + rest
    return Option([*names, name], **more)


_early = partial(Option, heading="General", is_eager=True, expose_value=False)
QUIET = _early(
    ["-q", "--quiet"], is_flag=True, callback=_set_level, help="Hide warnings and progress."
)
VERBOSE = _early(
    ["-v", "--verbose"],
    count=True,
    callback=_set_level,
    help="Show more messages; -vv shows all of them.",
)


class Command(click.Command):
    """A command whose options are declared by its function. Its help lists them under headings."""

    def __init__(
        self,
        *,
        callback: FunctionType,
        params: list[click.Parameter],
        help: str,  # noqa: A002 - as in click
        **more: Any,
    ) -> None:
        text, _, examples = inspect.cleandoc(help).partition("\n\nExamples:\n")
        self.examples = [example.strip() for example in examples.splitlines()]
        told = _texts(text)
        groups = {}
        names = callback.__code__.co_varnames
        defaults = callback.__defaults__ or ()
        for name, declared in zip(names, defaults, strict=False):  # inspect.signature is slower
            if isinstance(declared, OptionGroup):
                groups[name] = declared
                params += declared.params
            else:
                params.append(_parameter(name, declared, told))

        @wraps(callback)
        def collecting(**values: object) -> object:
            for name, (kind, params) in groups.items():
                values[name] = kind(
                    **{str(param.name): values.pop(str(param.name)) for param in params}
                )
            return callback(**values)

        text = text.partition("\n\nOptions:\n")[0]
        super().__init__(callback=collecting, params=params, help=text, **more)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Insert the options of a format and the general options before --help."""
        *params, shown = super().get_params(ctx)
        reads_photos = any(param.name == "workers" for param in params)
        opening = _of_openers() if reads_photos else []
        return [*params, *self.further(ctx), *opening, QUIET, VERBOSE, shown]

    def further(self, ctx: click.Context) -> Sequence[click.Parameter]:
        """Return options that depend on the command line."""
        return ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments as click does, but refuse an option given twice, because click keeps only the last."""
        if not {"-v", "-vv", "--verbose"}.isdisjoint(args):
            _set_level(ctx, VERBOSE, 1)  # also if it follows --help
        for parameter, times in Counter(self.make_parser(ctx).parse_args([*args])[2]).items():
            once = isinstance(parameter, Option) and not (
                parameter.multiple or parameter.count or ctx.resilient_parsing
            )
            if times > 1 and once:
                ctx.fail(f"{parameter.opts[0]}: is given {times} times; give it once")
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help, and the examples for the command."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}retrieval-tip {example}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options. The rare ones are only listed by name, and under their headings if -v is given."""
        verbose = logging.getLogger("retrieval_tip").level <= logging.INFO
        records: dict[str, list[tuple[str, str]]] = {heading: [] for heading in HEADINGS}
        rare = []
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if not isinstance(option, click.Option) or record is None:
                continue
            heading = option.heading if isinstance(option, Option) else "General"  # for --help
            if not verbose and (heading == "General" or getattr(option, "rare", False)):
                rare.append(max(option.opts, key=len))
            else:
                records.setdefault(heading, []).append(record)
        if not verbose:
            for heading in HEADINGS[1:]:
                records["Options"] += records.pop(heading)
        for heading, rows in records.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows, COLUMN)
        if rare:
            with formatter.section("More options (add -v to have them explained)"):
                formatter.write_text(", ".join(rare))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command. Errors show its usage."""
        with in_one_line(ctx):
            return super().invoke(ctx)


def _of_openers() -> list[click.Parameter]:
    """Return the options of our openers of files, which :data:`hooks.SETTINGS` keeps."""
    groups = (
        grouped(kind, heading="Input", expose_value=False, callback=partial(_keep, kind))
        for kind in hooks.openers()
    )
    return [param for group in groups for param in group.params]


def _keep(kind: type, ctx: click.Context, param: click.Parameter, value: object) -> None:
    settings = hooks.SETTINGS.get(kind, {}) | {str(param.name): value}
    with in_one_line(ctx):
        kind(**settings)  # raises UsageError
    hooks.SETTINGS[kind] = settings


class PluginCommand(Command):
    """A command with the options of the plugin that its arguments name. ``kind`` is the kind of its plugins."""

    kind: str

    def plugin_in(self, args: Sequence[str]) -> str | None:
        """Return the name of the plugin in arguments."""
        raise NotImplementedError

    def spelled(self, name: str) -> str:
        """Return the arguments that name a plugin."""
        raise NotImplementedError

    def params_of(self, plugin: Any, heading: str = "Options") -> list[click.Parameter]:
        """Return the options of a plugin."""
        return [*grouped(plugin, heading=heading).params]

    def use(self, ctx: click.Context, plugin: Any, options: dict[str, Any]) -> None:
        """Set the parameters of the function that depend on the plugin, which is ``None`` if there is none."""
        raise NotImplementedError

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with the options of the plugin."""
        with in_one_line(ctx):
            plugin = None
            params = []
            if (name := self.plugin_in(args)) is not None:
                plugin = hooks.find(self.kind, name)
            if plugin is not None:
                params = self.params_of(plugin, f"{self.kind[:-1].capitalize()} {name}")
                self._check(params, self.spelled(str(name)))
            ctx.meta[__name__] = params
            try:
                rest = super().parse_args(ctx, args)
            except click.NoSuchOption as error:
                self._explain(error.option_name)
                raise
            options = {str(param.name): ctx.params.pop(str(param.name)) for param in params}
            self.use(ctx, plugin, options)
        return rest

    def _check(self, params: Sequence[click.Parameter], spelled: str) -> None:
        """Raise UsageError if the command has an option of a plugin already."""
        taken = {name for param in self.params for name in param.opts}
        for param in params:
            if taken & {*param.opts}:
                raise UsageError(
                    f"{spelled}: its option {param.opts[0]} has another meaning here; report it to its author"
                )

    def _explain(self, option_name: str) -> None:
        """Raise UsageError if an option belongs to one of our plugins."""
        for name in hooks.TABLE[self.kind]:
            params = self.params_of(hooks.find(self.kind, name))
            if option_name in {param.opts[0] for param in params}:
                raise UsageError(
                    f"{option_name}: only applies to {self.spelled(name)}; leave it out"
                )

    def further(self, ctx: click.Context) -> Sequence[click.Parameter]:
        """Return the options of the plugin."""
        params: Sequence[click.Parameter] = ctx.meta.get(__name__, ())
        return params


class Group(click.Group):
    """A group that lists commands under headings, and suggests commands for names used by other programs.

    ``headings`` are the names of the commands under each heading of the help, including subcommands.
    """

    command_class = Command

    headings: Mapping[str, Sequence[str]] = MappingProxyType({})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the first sentence of its help."""
        commands = dict(commands_of(self))
        headings = self.headings or {"Commands": list(commands)}
        width = max(len(name) for paths in headings.values() for name in paths)
        for heading, paths in headings.items():
            with formatter.section(heading):
                rows = [
                    (
                        f"{name:<{width}}",
                        commands[name].get_short_help_str(formatter.width - width - 6),
                    )
                    for name in paths
                ]
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve a command as click does, but suggest commands from all groups if the name is unknown."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            name = args[0]
            paths = [path for path, _ in commands_of(ctx.find_root().command)]
            meant = list(SYNONYMS.get(name, ()))
            meant += [path for path in paths if path.split()[-1] == name]
            if not meant:
                raise
            shown = " or ".join(dict.fromkeys([*meant, *(error.possibilities or ())]))
            raise click.UsageError(
                f"No such command {name!r}. Did you mean {shown}?", ctx
            ) from None


class PluginGroup(Group):
    """The commands of a plugin, which are functions by their name. They are imported when one of them is used."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command."""
        self.list_commands(ctx)
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Import the commands, and return their names."""
        for name, function in hooks.find("commands", str(self.name)).items():
            if name not in self.commands:
                self.command(name)(function)
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the first sentence of its help."""
        self.list_commands(ctx)
        super().format_commands(ctx, formatter)


command = partial(click.command, cls=Command)


def commands_of(group: click.Command, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield the commands of a group and of its subgroups, and their names."""
    if isinstance(group, click.Group):
        for name, subcommand in group.commands.items():
            yield f"{prefix}{name}", subcommand
            yield from commands_of(subcommand, f"{prefix}{name} ")


@contextmanager
def in_one_line(ctx: click.Context | None = None) -> Iterator[None]:
    """Convert errors into exceptions that click prints on a single line of bounded length."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # prints the help
        raise
    except click.UsageError as error:
        raise click.UsageError(message(error.format_message()), error.ctx or ctx) from error
    except click.ClickException as error:
        raise click.ClickException(message(error.format_message())) from error
    except UsageError as error:
        raise click.UsageError(message(str(error)), ctx) from error
    except RetrievalTipError as error:
        raise click.ClickException(message(str(error))) from error
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # from torch, or converted from FAISS
            raise click.ClickException(
                "out of memory on the GPU; use --device cpu or a smaller --batch-size"
            ) from None
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # from torch
            raise click.ClickException(
                "out of memory; use a smaller --batch-size or source"
            ) from None
        raise
    except OSError as error:
        lost = _discard_stdout(error)
        # The reader closed the pipe, which Windows calls an invalid argument.
        if isinstance(error, BrokenPipeError) or (lost and error.errno == errno.EINVAL):
            raise click.exceptions.Exit(0) from None
        name = error.filename or ("standard output" if lost else "")
        raise click.ClickException(
            message(f"{name}: {error.strerror or error}".removeprefix(": "))
        ) from error


def _discard_stdout(error: OSError) -> bool:
    """Return whether writing to standard output fails. If it does, discard its buffer so that Python can exit."""
    try:
        if error.errno == errno.EINVAL:  # Windows forgets what it could not write
            sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
