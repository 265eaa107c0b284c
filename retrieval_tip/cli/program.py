"""The command-line program, with its commands, error handling, exit statuses and signal handling."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import click

from retrieval_tip import __version__, hooks
from retrieval_tip.cli.about import cache_command, doctor, encode, models_command
from retrieval_tip.cli.classify import classify
from retrieval_tip.cli.evaluate import compare_command, evaluate_command
from retrieval_tip.cli.fit import finetune_command, fit_command, search_command
from retrieval_tip.cli.group import QUIET, VERBOSE, Group, PluginGroup, in_one_line
from retrieval_tip.cli.index import index
from retrieval_tip.cli.label import find_command, sort_command, suggest
from retrieval_tip.cli.serve import label_command, serve_command
from retrieval_tip.errors import InputError
from retrieval_tip.wording import message


class _Program(Group):
    """Root group, which prints each error on one line of standard error and sets the exit status."""

    headings = MappingProxyType(
        {
            "Every day": (
                "label",
                "index build",
                "index add",
                "classify",
                "sort",
                "find",
                "index audit",
                "evaluate",
                "serve",
            ),
            "Inspect an index": (
                "index list",
                "index info",
                "index query",
                "index verify",
                "index history",
            ),
            "Change an index": (
                "index rollback",
                "index remove",
                "index relabel",
                "index rename",
                "index merge",
                "index set",
                "index gc",
            ),
            "Copy an index": ("index clone", "index export"),
            "Photos of other programs": tuple(hooks.TABLE["commands"]),
            "Choose": ("suggest", "compare", "models", "encode"),
            "Fit and train": ("fit", "search-hp", "finetune"),
            "This installation": ("cache", "doctor"),
        }
    )

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        logging.getLogger("retrieval_tip").setLevel(logging.WARNING)
        try:
            _fill_closed_streams()
            with in_one_line():
                if sys.stdout is None:
                    raise InputError(
                        "standard output: is closed; redirect it to a file or to /dev/null"
                    )
                return super().make_context(info_name, args, parent, **extra)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise click.exceptions.Exit(128 + signal.SIGINT) from None

    def invoke(self, ctx: click.Context) -> object:
        try:
            with _orderly_end(), in_one_line(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            line = "; ".join(["interrupted", *getattr(error, "__notes__", ())])
            click.echo(
                "\n" * sys.stderr.isatty() + line, err=True
            )  # a terminal has already printed ^C
            ctx.exit(
                128
                + next((number for number in error.args if isinstance(number, int)), signal.SIGINT)
            )


def _fill_closed_streams() -> None:
    """Open /dev/null in place of closed standard streams, so that other files do not get their descriptors."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until exit


@contextmanager
def _orderly_end() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end a command like Ctrl+C, which removes partial files and releases locks.

    A second signal ends the command immediately.
    """
    ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        while (
            frame is not None and not ended
        ):  # torch crashes if its import is interrupted, so end immediately
            ended = frame.f_code.co_filename == "<frozen importlib._bootstrap>"
            frame = frame.f_back
        if ended:
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
        ended = True
        raise KeyboardInterrupt(number)

    numbers = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
    before = {number: signal.getsignal(number) for number in numbers}
    unchanged = (
        signal.SIG_DFL,
        signal.default_int_handler,
    )  # keep any other handler that the caller has set
    main_thread = (
        threading.current_thread() is threading.main_thread()
    )  # handlers can only be set there
    handled = [number for number, handler in before.items() if main_thread and handler in unchanged]
    try:
        for number in handled:
            signal.signal(number, end)
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])


_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@click.group(cls=_Program, params=[QUIET, VERBOSE], context_settings=_HELP)
@click.version_option(__version__, package_name="retrieval-tip")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Label a few photos of each class, and let the others be sorted or classified.

    \b
    retrieval-tip label new --out indexes/things            # photos without labels
    retrieval-tip sort indexes/things more --into sorted
    retrieval-tip index build photos --out indexes/things   # one folder per class
    retrieval-tip classify indexes/things new/owl.png

    The exit status is 0: done; 1: failed, nothing changed; 2: wrong usage; 3: done, but some inputs could not be read;
    130 (128 plus the signal number): interrupted.
    """  # noqa: D301 - click needs the character
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("retrieval_tip")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logging.addLevelName(logging.WARNING, "warning")
    start_lightly()
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # this package reports the same problems with the image name
    if "NO_COLOR" in os.environ:
        ctx.color = False


@functools.cache  # once per process
def start_lightly() -> None:
    """Configure the process before torch is imported, so that commands for a single image start quickly."""
    # Imports create a million permanent objects, and scanning them took a third of the run time.
    gc.set_threshold(50_000)
    atexit.register(_leave_lightly)
    # Let waiting OpenMP threads sleep. Busy waiting on shared cores can make a 0.05 s image take 3 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _leave_lightly() -> None:
    """Skip the last garbage collection, which takes a second, unless triton would then report leaks."""
    if "triton" not in sys.modules:
        gc.freeze()


class _Handler(logging.Handler):
    """Log handler that writes each record to the current standard error, on one escaped and shortened line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = record.levelname
            text = message(self.format(record))
            colour = {"warning": "yellow", "ERROR": "red"}.get(level)  # on a terminal only
            if colour is not None:
                text = click.style(level, fg=colour) + text.removeprefix(level)
            click.echo(text, err=True)
        except Exception:  # as in logging's own handlers
            self.handleError(record)


for _command in (
    label_command,
    index,
    classify,
    sort_command,
    find_command,
    evaluate_command,
    serve_command,
    suggest,
    compare_command,
    models_command,
    encode,
    fit_command,
    search_command,
    finetune_command,
    cache_command,
    doctor,
):
    main.add_command(_command)
for _name in hooks.TABLE["commands"]:
    main.add_command(PluginGroup(_name, help=hooks.HELP[_name]))
