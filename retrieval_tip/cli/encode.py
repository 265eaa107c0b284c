"""The command ``encode``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli import kinds, options
from retrieval_tip.cli.group import argument, command, grouped, option
from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import about, finish, quiet, warn
from retrieval_tip.cli.opening import loader, reader_for, reader_of, source_of
from retrieval_tip.cli.options import SourceOptions, ViewOptions
from retrieval_tip.errors import Skipped, UsageError, counted

if TYPE_CHECKING:
    from retrieval_tip.data.sources import Source

RAY = {"heading": "Distributed with Ray"}


@dataclass(frozen=True)
class EngineOptions:
    """Options that run the work in this process or on the actors of a Ray cluster.

    Options:
        engine: Where to run the command. With ray, actors on this machine or a cluster write a folder of parts, which
            can be on disk or in a bucket. If the command is interrupted, run it again to complete the folder.
        actors: Maximum number of Ray actors. [default: one per GPU, or up to 8 per node]
        ray_address: Address of the head of a Ray cluster, or auto. [default: start Ray on this machine]
    """

    engine: str = option(click.Choice(["local", "ray"]), default="local", is_eager=True, **RAY)
    actors: int | None = option(kinds.count("actors"), metavar="N", **RAY)
    ray_address: str | None = option(metavar="HOST:PORT", **RAY)


@command()
def encode(
    source: Place = argument(kinds.SOURCE),
    out: Place = option(kinds.OUTPUT, "--out", "-o", required=True, help="Feature table to write (.parquet)."),
    engine: EngineOptions = grouped(EngineOptions),
    views: ViewOptions = options.VIEWS,
    encoding: SourceOptions = options.SOURCES,
) -> None:
    """Encode images into a feature table.

    You can give the table to every command that reads images. SOURCE can be anything that index build accepts, or a
    folder of unlabelled images. With --engine ray, --out is a folder of Parquet parts, which you can use like a table.
    """
    from retrieval_tip.data.reader import encode_table

    items = source_of(source, encoding, "train", labelled=False)
    if engine.engine == "ray":
        what, skipped = _on_ray(items, out, engine, encoding, views)
    elif engine.actors or engine.ray_address:
        raise UsageError(f"--{'actors' if engine.actors else 'ray-address'}: needs --engine ray")
    else:
        with reader_for(None, [items], encoding, views) as reader:
            what = f"{encode_table(items, out, reader)} rows"
        skipped = reader.skipped
    about(out, what)
    finish(skipped)


def _on_ray(
    items: Source, out: Place, engine: EngineOptions, encoding: SourceOptions, views: ViewOptions
) -> tuple[str, list[Skipped]]:
    from retrieval_tip.data.encoding_cache import EncodingCache
    from retrieval_tip.distributed.ray_data import Work, cut, write_parts

    backbone = loader(encoding) if encoding.model or items.table is None else None
    cache = None if encoding.no_cache else str(encoding.cache or EncodingCache.default_folder())
    work, pieces = Work(reader_of(encoding, views), backbone, cache), cut(items)
    progress = sys.stderr.isatty() and not quiet()
    rows, kept, skipped = write_parts(
        work, pieces, out, address=engine.ray_address, actors=engine.actors, device=encoding.device, progress=progress
    )
    warn(f"skipped {one}" for one in skipped)
    before = f", {kept} kept from an earlier run" if kept else ""
    return f"{rows} rows in {counted(len(pieces), 'part')}{before}", skipped
