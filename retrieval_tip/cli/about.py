"""Commands about this machine: ``models``, ``cache``, ``completion`` and ``doctor``."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import argument, command, flag, option
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import FAILED, finish, print_result, say
from retrieval_tip.cli.opening import reader_for, source_of
from retrieval_tip.cli.options import ComparedOptions, OutputOptions
from retrieval_tip.errors import UsageError, counted, show

if TYPE_CHECKING:
    from retrieval_tip.data.sources import Source
    from retrieval_tip.index.encoders import Opened


@command()
def models_command(
    word: str = argument(default=""),
    photos: Place | None = option(kinds.SOURCE, "--try"),
    calibration: Place | None = option(kinds.SOURCE, "--int8"),
    printing: OutputOptions = options.FORMAT,
    encoding: ComparedOptions = options.COMPARED,
) -> None:
    """List encoders, compare them on photos, or store one in int8.

    WORD is any part of a name, for example dinov2, ViT-B/32 or siglip. If you omit it, only a few recommended encoders
    are listed. The column licence shows the licence of the weights, if it is known, and the column words whether the
    encoder has a text tower; an encoder that has none can only compare images. The column cached shows whether its
    weights are already on this machine. The column pretrained lists the available weights, starting with the
    recommended ones.

    With --try, the encoders on this machine and each --model are fitted to labelled photos. The accuracy is estimated
    by cross-validation; low and high are the ends of its 95 % confidence interval. Pairs of the most accurate encoders
    are tried as well. The most accurate encoder or pair is recommended, unless a much faster one is not significantly
    less accurate.

    With --int8, each --model is calibrated in int8 on up to 300 of your photos and stored in the cache, where
    --precision int8 finds it (on a CPU; requires the extra int8). It is refused if its features are far from those in
    float32.

    Options:
        photos: Labelled photos on which the encoders on this machine are compared.
        calibration: Photos on which each --model is calibrated in int8. They need no labels.
    """
    if photos is not None:
        _try_encoders(word, source_of(photos, encoding, "train"), printing, encoding)
    elif calibration is not None:
        _store_int8(source_of(calibration, encoding, "train", labelled=False), encoding)
    elif encoding.models or encoding.weights:
        raise UsageError("--model: give labelled photos to compare encoders (--try), or photos to store them (--int8)")
    else:
        _list_encoders(word, printing)


def _list_encoders(word: str, printing: OutputOptions) -> None:
    from retrieval_tip.backbones.catalogue import megabytes, search

    sizes = [(one, None if one.bytes is None else megabytes(one.bytes)) for one in search(word)]
    rows = [(one.model, size, one.licence, one.words, one.cached, list(one.pretrained)) for one, size in sizes]
    types = {"model": str, "size": str, "licence": str, "words": bool, "cached": bool, "pretrained": list}
    printing.write_rows(rows, types)
    if not word:
        say("To search all encoders: retrieval-tip models WORD")
        say("For aerial photos: hf download chendelong/RemoteCLIP RemoteCLIP-ViT-B-32.pt --local-dir .")


def _try_encoders(word: str, photos: Source, printing: OutputOptions, encoding: ComparedOptions) -> None:
    from retrieval_tip.backbones.base import spelled
    from retrieval_tip.backbones.catalogue import cached
    from retrieval_tip.index.encoders import try_encoders

    here = [pair for pair in cached() if word.lower() in pair[0].lower()]
    cached_too = replace(encoding, models=[name for name, _ in here], weights=[tag or "auto" for _, tag in here])
    asked = dict(encoding.named()) | dict(cached_too.named())
    more = "to download more, give --model, for example --model clip --model dinov2"
    if not asked:
        raise UsageError(f"models: no encoder{f' named {word}' if word else ''} is on this machine; {more}")

    def joined(a: str, b: str) -> tuple[str, Opened]:
        pair = "+".join(spelled(asked[name].model, asked[name].pretrained) for name in (a, b))
        return pair, partial(reader_for, None, [], replace(asked[a], model=pair, pretrained=None))

    encoders = {name: partial(reader_for, None, [], own) for name, own in asked.items()}
    tried = try_encoders(photos, encoders, encoding.device, joined)
    types = {"encoder": str, "accuracy": float, "low": float, "high": float, "images_per_second": int}
    rows = (
        (one.name, one.accuracy, *one.interval, round(one.images_per_second), one is tried.recommended)
        for one in tried.trials
    )
    printing.write_rows(rows, types | {"recommended": bool})
    say(f"only one encoder is on this machine; {more}" if len(tried.trials) == 1 else str(tried))
    finish(tried.skipped)


def _store_int8(photos: Source, encoding: ComparedOptions) -> None:
    if not encoding.models:
        raise UsageError("--int8: name the encoder with --model")
    skipped = []
    for name, own in replace(encoding, device="cpu", precision="float32").named():
        with reader_for(None, [], own) as reader:
            lowest = reader.store_int8(photos)
        say(f"{name}: stored in int8 (lowest cosine to the features in float32: {lowest:.3f})")
        skipped += reader.skipped
    finish(skipped)


@command()
def cache_command(
    cache: Path | None = option(
        kinds.FOLDER, help="Cache folder. [default: $RETRIEVAL_TIP_CACHE or ~/.cache/retrieval-tip]"
    ),
    prune: bool = flag(help="Remove all encodings. They are computed again when they are needed."),
    max_size: int | None = option(
        kinds.size, metavar="N(MB|GB|TB)", help="New size limit, which the cache remembers. [default: 8GB]"
    ),
    as_json: bool = options.JSON,
) -> None:
    """Show, limit or clear the encoding cache.

    The cache stores the features of each image and the text weights of each class, so that nothing has to be encoded
    twice. When the cache is full, the oldest encodings are removed. Encoder weights are stored in the
    Hugging Face cache instead; run hf cache ls to list them.
    """
    from retrieval_tip.data.encoding_cache import EncodingCache, size_of

    kept = EncodingCache(cache or EncodingCache.default_folder())
    try:
        removed = kept.clear() if prune else 0
        if max_size is not None:
            kept.limit(max_size)
        number = len(kept)
    finally:
        kept.close()
    if prune:
        say(f"Removed {counted(removed, 'encoding')}")
    file, size, most = size_of(kept.path.parent)
    print_result({"file": str(file), "encodings": number, "bytes": size, "max_bytes": most}, as_json)


@command()
def completion_command(shell: str = argument(click.Choice(["bash", "zsh", "fish"]))) -> None:
    """Print a shell completion script.

    For bash, add this line to ~/.bashrc: eval "$(retrieval-tip completion bash)". For zsh, add the same line to
    ~/.zshrc, with zsh in place of bash. For fish, save the script as ~/.config/fish/completions/retrieval-tip.fish.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(
        kind(click.get_current_context().find_root().command, {}, "retrieval-tip", "_RETRIEVAL_TIP_COMPLETE").source()
    )


@command()
def doctor(as_json: bool = options.JSON) -> None:
    """Check this installation for problems.

    Prints the versions of the installed packages, the available devices and the FAISS build, followed by any problems.
    The exit status is 1 if there is a problem.
    """
    from retrieval_tip.backbones.catalogue import megabytes
    from retrieval_tip.data.encoding_cache import size_of
    from retrieval_tip.doctor import examine
    from retrieval_tip.files import cache_folder

    report, cache = examine(), "none: no home folder"
    if (folder := cache_folder()) is not None:
        file, size, most = size_of(folder)
        cache = f"{show(file)}, {megabytes(size)} of at most {megabytes(most)} (retrieval-tip cache --max-size)"
    report.facts["encoding cache"] = cache
    if as_json:
        click.echo(json.dumps({"facts": report.facts, "problems": report.problems}))
    else:
        print_result(report.facts)
        for problem in report.problems:
            click.echo(f"problem: {problem}")
        if not report.problems:
            click.echo("no problems found")
    click.get_current_context().exit(FAILED if report.problems else 0)
