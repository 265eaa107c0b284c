"""Commands about encoders and this machine: ``models``, ``encode``, ``cache`` and ``doctor``."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import command
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import FAILED, about, finish, print_result, quiet, say, warn
from retrieval_tip.cli.opening import reader_for, reader_of, source_of
from retrieval_tip.cli.options import OutputOptions, SourceOptions, ViewOptions
from retrieval_tip.errors import Skipped, UsageError
from retrieval_tip.hooks import argument, flag, option
from retrieval_tip.wording import amount, counted, few, show

if TYPE_CHECKING:
    from retrieval_tip.data.sources import Source


@command()
def models_command(
    word: str = argument(default=""),
    photos: Place | None = option(kinds.SOURCE, "--try"),
    calibration: Place | None = option(kinds.SOURCE, "--int8"),
    printing: OutputOptions = options.FORMAT,
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """List encoders, compare them on photos, or store one in int8.

    WORD is any part of a name, for example dinov2, ViT-B/32 or siglip. If you omit it, only a few recommended encoders
    are listed. The column licence shows the licence of the weights, if it is known, and the column words whether the
    encoder has a text tower; an encoder that has none can only compare images. The column cached shows whether its
    weights are already on this machine. The column weights lists what can follow @ in --model, starting with the
    recommended weights.

    With --try, the encoders on this machine and those of --model are fitted to labelled photos. The accuracy is
    estimated by cross-validation; low and high are the ends of its 95 % confidence interval. Pairs of the most accurate
    encoders are tried as well. The most accurate encoder or pair is recommended, unless a much faster one is not
    significantly less accurate.

    With --int8, the encoders of --model are calibrated in int8 on up to 300 of your photos and stored in the cache,
    where --precision int8 finds them (on a CPU; requires the extra int8). An encoder is refused if its features are far
    from those in float32.

    Options:
        photos: Labelled photos on which the encoders on this machine are compared.
        calibration: Photos on which the encoders of --model are calibrated in int8. They need no labels.

    Examples:
        models siglip
        models --try photos --model clip+dinov2
    """
    if photos is not None:
        _try_encoders(word, source_of(photos, encoding, "train"), printing, encoding)
    elif calibration is not None:
        _store_int8(source_of(calibration, encoding, "train", labelled=False), encoding)
    elif encoding.model:
        raise UsageError(
            "--model: give labelled photos to compare encoders (--try), or photos to store them (--int8)"
        )
    else:
        _list_encoders(word, printing)


def _list_encoders(word: str, printing: OutputOptions) -> None:
    from retrieval_tip.backbones.catalogue import search

    rows = []
    for encoder in search(word):
        size = None if encoder.bytes is None else amount(encoder.bytes)
        facts = (encoder.licence, encoder.words, encoder.cached, list(encoder.weights))
        rows.append((encoder.model, size, *facts))
    types = {
        "model": str,
        "size": str,
        "licence": str,
        "words": bool,
        "cached": bool,
        "weights": list,
    }
    printing.write_rows(rows, types)
    if not word:
        say("To search all encoders: retrieval-tip models WORD")
        say(
            "For aerial photos: hf download chendelong/RemoteCLIP RemoteCLIP-ViT-B-32.pt --local-dir ."
        )


def _try_encoders(
    word: str, photos: Source, printing: OutputOptions, encoding: SourceOptions
) -> None:
    from retrieval_tip.backbones.catalogue import cached
    from retrieval_tip.backbones.loading import split_names
    from retrieval_tip.index.encoders import try_encoders

    here = (name for name in cached() if word.lower() in name.lower())
    chosen = split_names(encoding.model) if encoding.model else []
    names = list(dict.fromkeys([*chosen, *here]))
    more = "to download more, give --model, for example --model clip+dinov2"
    if not names:
        wanted = f"encoder named {word}" if word else "encoder"
        raise UsageError(f"models: no {wanted} is on this machine; {more}")

    tried = try_encoders(
        photos,
        names,
        lambda name: reader_for(None, [photos], replace(encoding, model=name)),
        encoding.device,
    )
    types = {
        "encoder": str,
        "accuracy": float,
        "low": float,
        "high": float,
        "images_per_second": int,
    }
    rows = (
        (
            trial.name,
            trial.accuracy,
            *trial.interval,
            round(trial.images_per_second),
            trial is tried.recommended,
        )
        for trial in tried.trials
    )
    printing.write_rows(rows, types | {"recommended": bool})
    if len(tried.trials) == 1:
        say(f"only one encoder is on this machine; {more}")
    else:
        say(str(tried))
    finish(tried.skipped)


def _store_int8(photos: Source, encoding: SourceOptions) -> None:
    from retrieval_tip.backbones.loading import split_names

    if not encoding.model:
        raise UsageError("--int8: name the encoder with --model")
    skipped = []
    for name in split_names(encoding.model):
        with reader_for(
            None, [photos], replace(encoding, model=name, device="cpu", precision="float32")
        ) as reader:
            lowest = reader.store_int8(photos)
        say(f"{name}: stored in int8 (lowest cosine to the features in float32: {lowest:.3f})")
        skipped += reader.skipped
    finish(skipped)


@command()
def encode(
    source: Place = argument(kinds.SOURCE),
    out: Place = option(kinds.OUTPUT, "--out", "-o", required=True),
    ray: str | None = option(metavar="local|auto|HOST:PORT", is_eager=True),
    encoding: ViewOptions = options.VIEWS,
) -> None:
    """Encode images into a feature table.

    You can give the table to every command that reads images. SOURCE can be anything that index build accepts, or a
    folder of unlabelled images.

    Options:
        out: Feature table to write (.parquet). With --ray, a folder of Parquet parts, which you can use like a table.
        ray: Spread the work over Ray actors on this machine (local) or a cluster (auto, or the address of its head).
            --out can then be in a bucket. If the command is interrupted, run it again to complete the folder.

    Examples:
        encode photos --out photos.parquet
        encode photos --model dinov2 --views 10 --out photos.parquet
    """
    from retrieval_tip.data.reader import encode_table

    items = source_of(source, encoding, "train", labelled=False)
    if ray is not None:
        what, skipped = _on_ray(items, out, ray, encoding)
    else:
        with reader_for(None, [items], encoding) as reader:
            what = f"{encode_table(items, out, reader)} rows"
        skipped = reader.skipped
    about(out, what)
    finish(skipped)


def _on_ray(
    items: Source, out: Place, address: str, encoding: SourceOptions
) -> tuple[str, list[Skipped]]:
    from retrieval_tip.backbones.loading import load_backbone
    from retrieval_tip.data.encoding_cache import EncodingCache
    from retrieval_tip.data.sources import check_images
    from retrieval_tip.distributed.ray_data import Work, cut, write_parts

    check_images([items])
    backbone = None
    if encoding.model or items.table is None:
        backbone = partial(load_backbone, encoding.model, precision=encoding.precision)
    cache = None if encoding.no_cache else EncodingCache(EncodingCache.default_folder())
    work = Work(replace(reader_of(encoding), cache=cache), backbone)
    pieces = cut(items)
    progress = sys.stderr.isatty() and not quiet()
    rows, kept, skipped = write_parts(
        work, pieces, out, address=address, device=encoding.device, progress=progress
    )
    warn(f"skipped {image}" for image in skipped)
    before = f", {kept} kept from an earlier run" if kept else ""
    return f"{rows} rows in {counted(len(pieces), 'part')}{before}", skipped


@command()
def cache_command(
    prune: bool = flag(),
    max_size: float | None = option(kinds.Number(0.001, 1e6), metavar="GB"),
    as_json: bool = options.JSON,
) -> None:
    """Show, limit or clear the encoding cache.

    The cache stores the features of each image and the text weights of each class, so that nothing has to be encoded
    twice. When the cache is full, the least recently used encodings are removed. It is in $RETRIEVAL_TIP_CACHE or
    ~/.cache/retrieval-tip. Encoder weights are stored in the Hugging Face cache instead; run hf cache ls to list them.

    Options:
        prune: Remove all encodings. They are computed again when they are needed.
        max_size: New size limit, which the cache remembers. [default: 8]

    Examples:
        cache --max-size 2
        cache --prune
    """
    from retrieval_tip.data.encoding_cache import EncodingCache, size_of

    kept = EncodingCache(EncodingCache.default_folder())
    try:
        removed = kept.clear() if prune else 0
        if max_size is not None:
            kept.limit(int(1e9 * max_size))
        number = len(kept)
    finally:
        kept.close()
    if prune:
        say(f"Removed {counted(removed, 'encoding')}")
    file, size, most = size_of(kept.path.parent)
    print_result(
        {"file": str(file), "encodings": number, "bytes": size, "max_bytes": most}, as_json
    )


@command()
def doctor(as_json: bool = options.JSON) -> None:
    """Check this installation for problems.

    Prints the versions of the installed packages, the available devices, the FAISS build and the encoders on this
    machine, followed by any problems. The exit status is 1 if there is a problem.

    Examples:
        doctor
        doctor --json
    """
    from retrieval_tip.backbones import catalogue
    from retrieval_tip.data.encoding_cache import size_of
    from retrieval_tip.doctor import examine
    from retrieval_tip.files import cache_folder

    report = examine()
    cache = "none: no home folder"
    if (folder := cache_folder()) is not None:
        file, size, most = size_of(folder)
        cache = f"{show(file)}, {amount(size)} of at most {amount(most)} (retrieval-tip cache --max-size GB)"
    report.facts["encoding cache"] = cache
    with suppress(ImportError):  # which is among the problems
        here = [*catalogue.cached()]
        report.facts["encoders"] = few(here) or "none on this machine"
        try:
            if not here:
                catalogue.ask_hub(catalogue.repository_of(catalogue.DEFAULT, None))
        except ConnectionError as error:
            report.problems.append(
                f"no encoder is on this machine, and none can be downloaded ({error}); connect to the internet, or "
                "copy weights here and give --model timm:NAME@FILE or local-dir:FOLDER"
            )
    if as_json:
        click.echo(json.dumps({"facts": report.facts, "problems": report.problems}))
    else:
        print_result(report.facts)
        for problem in report.problems:
            click.echo(f"problem: {problem}")
        if not report.problems:
            click.echo("no problems found")
    click.get_current_context().exit(FAILED if report.problems else 0)
