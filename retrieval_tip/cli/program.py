"""The program: its errors as lines and exit statuses, its signals, and the commands that it has."""

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
from types import FrameType
from typing import Any

import click

from retrieval_tip import __version__
from retrieval_tip.cli.about import cache_command, completion_command, datasets_group, doctor, models_command
from retrieval_tip.cli.classify import classify, encode
from retrieval_tip.cli.evaluate import evaluate_command, report_command, sweep_command
from retrieval_tip.cli.fit import calibrate_command, finetune_command, fit_command, search_command
from retrieval_tip.cli.group import Group, in_one_line
from retrieval_tip.cli.index import index
from retrieval_tip.cli.serve import serve_command
from retrieval_tip.errors import InputError, message


class _Program(Group):
    """Turns errors, the package's and click's, into one line on standard error and the exit status that fits them."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            _fill_closed_streams()
            with in_one_line():
                if sys.stdout is None:
                    raise InputError("standard output: is closed; send it to a file or to /dev/null")
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
            click.echo("\n" * sys.stderr.isatty() + line, err=True)  # after the ^C that a terminal shows
            ctx.exit(128 + next((number for number in error.args if isinstance(number, int)), signal.SIGINT))


def _fill_closed_streams() -> None:
    """Nowhere in place of standard streams that are closed: files would get their numbers, and what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - to the end


@contextmanager
def _orderly_end() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl+C does: it removes what is half written, and lets another one write.

    A second one ends it at once.
    """
    ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        while frame is not None and not ended:  # torch crashes where its import is stopped: that ends at once too
            ended = frame.f_code.co_filename == "<frozen importlib._bootstrap>"
            frame = frame.f_back
        if ended:
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
        ended = True
        raise KeyboardInterrupt(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    unchanged = signal.SIG_DFL, signal.default_int_handler  # what else there is, who started the command wants so
    own = [number for number in numbers if before[number] in unchanged]
    if threading.current_thread() is not threading.main_thread():
        own = []  # only there can it be said
    try:
        for number in own:
            signal.signal(number, end)
        yield
    finally:
        for number in own:
            signal.signal(number, before[number])


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, package_name="retrieval-tip")
@click.option("-q", "--quiet", is_flag=True, help="Hide warnings and progress.")
@click.option("-v", "--verbose", count=True, help="Show more messages; -vv: all.")
@click.pass_context
def main(ctx: click.Context, quiet: bool, verbose: int) -> None:
    """Few-shot image classification as retrieval (Tip-Adapter on a FAISS index).

    Exit status: 0 success; 1 failure, nothing changed; 2 wrong usage; 3 finished, but some inputs were skipped; 130
    interrupted (128 + the signal).
    """
    handler = _Said()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("retrieval_tip")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logging.addLevelName(logging.WARNING, "warning")
    start_lightly()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about an image is said by us, with its name
    ctx.obj = quiet
    if "NO_COLOR" in os.environ:
        ctx.color = False


@functools.cache  # once a process
def start_lightly() -> None:
    """Settings of the process, before torch is imported: without them a command of one image is slow."""
    gc.set_threshold(50_000)  # imports make a million objects that stay: walking them again and again took a third
    atexit.register(_leave_lightly)
    # A thread of OpenMP that waits for another one sleeps: where other programs, or a container's limit, leave it fewer
    # cores than it counts, waiting busily took 3 s for an image of 0.05 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _leave_lightly() -> None:
    """Do not walk them once more at the end, a second, unless triton is there: it reports what is not taken down."""
    if "triton" not in sys.modules:
        gc.freeze()


class _Said(logging.Handler):
    """To standard error as it then is, where a name in a message cannot start another line, nor fill the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level, said = record.levelname, message(self.format(record))
            colour = {"warning": "yellow", "ERROR": "red"}.get(level)  # which a terminal alone gets
            click.echo(said if colour is None else click.style(level, fg=colour) + said.removeprefix(level), err=True)
        except Exception:  # as handlers do
            self.handleError(record)


main.section("Classify and evaluate", classify, evaluate_command, sweep_command, report_command, serve_command)
main.section("Indexes and features", index, encode, models_command, datasets_group)
main.section("Fit and train", fit_command, search_command, finetune_command, calibrate_command)
main.section("Setup", cache_command, completion_command, doctor)
