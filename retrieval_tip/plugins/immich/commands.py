"""The commands under ``immich``. See :mod:`sync` for what they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from retrieval_tip.errors import InputError, UsageError, warn_once
from retrieval_tip.files import read_regular
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.plugins.immich.client import Immich
from retrieval_tip.plugins.immich.ledger import ACCEPTED, REJECTED, WRITTEN, Ledger, place_of
from retrieval_tip.plugins.immich.sync import Report, Sync
from retrieval_tip.plugins.immich.tagging import SUGGESTED, Tagging
from retrieval_tip.wording import counted, few, one_line, show

KEY = "IMMICH_API_KEY"
LONGEST_KEY = 4096
ONCE = "RETRIEVAL_TIP_IMMICH_ONCE"
"""The variable that tells the process of one run not to repeat it."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
INDEX = Path("indexes/immich")
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
SOME_FAILED = 3


def _seconds(_: click.Context, __: click.Parameter, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,4})([smhd])", text)
    if match is None:
        raise click.BadParameter("expected a number and s, m, h or d, such as 1h")
    return int(match[1]) * UNITS[match[2]]


def sync(
    url: str = argument(),
    classes: str = option(metavar="TAG"),
    album: Sequence[str] = option(multiple=True, metavar="NAME"),
    apply: bool = flag(),
    out: Path = option(_FOLDER, "--out", "-o", default=INDEX),
    model: str | None = option(),
    key: Path | None = option(_FILE),
    every: int = option(metavar="TIME", callback=_seconds, default="0s", show_default=False),
) -> None:
    """Suggest tags for photos, learned from your tags or albums.

    With --classes Pets, the tags Pets/Rex and Pets/Luna are classes, and Pets/none has photos of neither. Suggestions
    are the tags Suggested/Rex and Suggested/Luna. Accept one by giving the photo Pets/Rex, and reject it by taking
    Suggested/Rex off. The next run learns from both. Without --apply, nothing is written to Immich.

    Options:
        classes: Tag whose children are the classes.
        album: Album that is a class. Give one for each class.
        apply: Write the suggestions to Immich.
        out: Index folder for what was learned.
        model: Encoder to use. [default: that of the index, or else ViT-B-32]
        key: File that contains the API key. [default: the variable IMMICH_API_KEY]
        every: Repeat after this time, such as 1h. The encoder is in memory only during a run.

    Examples:
        immich sync http://photos:2283 --classes Pets
        immich sync http://photos:2283 --classes Pets --apply --every 1h
    """
    parent = (classes or "").strip("/")
    if bool(parent) == bool(album):
        raise UsageError("immich sync: give --classes TAG, or --album NAME for each class")
    if every and ONCE not in os.environ:
        _repeat(every)
    from retrieval_tip.backbones.loading import load_again, load_backbone
    from retrieval_tip.index.places import at

    store = at(out)
    with _connected(url, key, out, *(["album.read"] if album else [])) as (immich, ledger):
        identity = None
        if model is None and store.exists():
            identity = store.manifest().identity
        backbone = load_again(identity) if identity else load_backbone(model, lazy=True)
        tagging = Tagging(immich, ledger)
        report = Sync(tagging, out, backbone, parent, album).run(apply=apply)
        _print(report, apply=apply)
        _print_states(ledger)
    _end(tagging, report.unread)


def status(out: Path = argument(_FOLDER, default=INDEX)) -> None:
    """Show what was suggested, accepted and rejected.

    Examples:
        immich status
        immich status indexes/pets
    """
    with _ledger_of(out) as ledger:
        click.echo(f"{ledger.fact('url')}: {counted(len(ledger.photos()), 'photo')} seen")
        _print_states(ledger)


def undo(
    out: Path = argument(_FOLDER, default=INDEX),
    key: Path | None = option(_FILE),
) -> None:
    """Take all suggestions off the photos, and delete their tags.

    No other tag is changed, and what was accepted and rejected is kept.

    Options:
        key: File that contains the API key. [default: the variable IMMICH_API_KEY]

    Examples:
        immich undo
        immich undo indexes/pets
    """
    with _ledger_of(out) as ledger:
        url = str(ledger.fact("url"))
    with _connected(url, key, out) as (immich, ledger):
        tagging = Tagging(immich, ledger)
        number = tagging.undo()
    click.echo(f"{url}: {SUGGESTED} tags taken off {counted(number, 'photo')}")
    _end(tagging)


COMMANDS = {"sync": sync, "status": status, "undo": undo}
"""The functions of the commands, by their name."""


@contextmanager
def _connected(
    url: str, key: Path | None, out: Path, *more: str
) -> Iterator[tuple[Immich, Ledger]]:
    """Open a connection and its ledger. ``more`` are permissions that the key needs."""
    with Immich(url, _key(key)) as immich:
        immich.connect(*more)
        with Ledger(out) as ledger:
            ledger.belongs_to(immich.url, immich.owner)
            yield immich, ledger


def _ledger_of(out: Path) -> Ledger:
    if not place_of(out).is_file():
        raise InputError(
            f"{show(out)}: has no suggestions of Immich; run retrieval-tip immich sync first"
        )
    return Ledger(out)


def _key(file: Path | None) -> str:
    """Return the API key. Messages never contain it."""
    text = os.environ.get(KEY, "")
    if file is not None:
        text = read_regular(file, LONGEST_KEY).decode("ascii", "replace")
    if not re.fullmatch(r"[!-~]+", text.strip()):
        raise UsageError(f"immich: has no API key; set {KEY}, or give --key FILE")
    return text.strip()


def _repeat(seconds: int) -> None:
    """Run the same command again and again, in processes of their own, which give their memory back."""
    command = [sys.executable, "-m", "retrieval_tip", *sys.argv[1:]]
    while True:
        done = subprocess.run(command, check=False, env=os.environ | {ONCE: "1"})  # noqa: S603 - our own arguments
        if done.returncode == click.UsageError.exit_code:
            raise SystemExit(done.returncode)
        time.sleep(seconds)


def _print(report: Report, *, apply: bool) -> None:
    """Print what a run learned and suggests."""
    new = Counter(suggestion.label for suggestion in report.new)
    for label, number in sorted(report.examples.items()):
        suggestions = counted(new[label], "new suggestion")
        click.echo(f"{one_line(label)}: {counted(number, 'example')}, {suggestions}")
    click.echo(f"No suggestion for {counted(report.withheld, 'photo')}: no match, or unsure")
    if report.estimate:
        click.echo(report.estimate)
    if report.unread:
        unread = counted(report.unread, "photo")
        click.echo(f"{unread} without a preview; the next run tries again")
    if not apply:
        photos = counted(len(report.new), "photo")
        click.echo(f"Nothing was written. Add --apply to put {SUGGESTED}/CLASS on {photos}")


def _print_states(ledger: Ledger) -> None:
    """Print the number of suggestions by class and state."""
    shown = (WRITTEN, ACCEPTED, REJECTED)
    number = Counter((one.label, one.state) for one in ledger.suggestions(*shown))
    for label in sorted({label for label, _ in number}):
        states = [f"{number[label, state]:,} {state}" for state in shown]
        click.echo(f"{SUGGESTED}/{one_line(label)}: {', '.join(states)}")


def _end(tagging: Tagging, unread: int = 0) -> None:
    """Warn of what Immich refused, and end with the status for photos that could not be read or changed."""
    refused = [f"{number:,} {what}" for what, number in tagging.failed.items() if number]
    if refused:
        warn_once(f"photos that Immich refused: {few(refused)}")
    if refused or unread:
        click.get_current_context().exit(SOME_FAILED)
