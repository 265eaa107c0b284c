"""The Ray, the shards and the encoding that the options of a command stand for, with ``--engine ray``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retrieval_tip.cli.opening import UNNAMED, name_of, source_of
from retrieval_tip.cli.options import (
    AnswerOptions,
    BackboneOptions,
    EncodingOptions,
    EngineOptions,
    ReadingOptions,
    ViewOptions,
)
from retrieval_tip.errors import UsageError, counted
from retrieval_tip.settings import Precision

if TYPE_CHECKING:
    from retrieval_tip.answering import AnsweringIndex
    from retrieval_tip.backbones.base import Identity
    from retrieval_tip.data.encoder import Encoder
    from retrieval_tip.distributed.engine import BackboneName, Encoding, Ray
    from retrieval_tip.distributed.shards import Shard
    from retrieval_tip.distributed.tasks import Asked, Made


def ray_of(ctx: click.Context, engine: EngineOptions, device: str) -> Ray | None:
    """The Ray that a command runs on; ``None``: it runs here. What belongs to Ray is refused then."""
    if engine.engine != "ray":
        for name, value in (("actors", engine.actors), ("shard-size", engine.shard_size)):
            if value is not None:
                raise UsageError(f"--{name} needs --engine ray")
        if engine.ray_address is not None:
            raise UsageError("--ray-address: nothing here runs on Ray; give --engine ray too")
        return None
    from retrieval_tip.distributed.cluster import needed_ray
    from retrieval_tip.distributed.engine import Ray

    needed_ray()
    return Ray(engine.ray_address, engine.actors, device, engine.shard_size, progress=not ctx.obj)


def shards_of(
    path: Path | str, reading: ReadingOptions, size: int | None, split: str, *, labelled: bool = True
) -> list[Shard]:
    """The input shards of a command's source, as :func:`source_of` takes it, of tars, or of a URL."""
    from retrieval_tip.distributed.shards import cut, cut_source

    if reading.dataset is not None:
        return cut_source(source_of(path, reading, split, labelled=labelled), size)
    return cut(path, labelled=labelled, split=reading.split or split, root=reading.root, size=size)


def encoding_of(encoding: EncodingOptions, name: BackboneName | None, views: ViewOptions | None = None) -> Encoding:
    """The encoding of the workers of a command."""
    from retrieval_tip.data.encoding_cache import EncodingCache
    from retrieval_tip.distributed.engine import Encoding

    cache = None if encoding.no_cache else os.fspath(encoding.cache or EncodingCache.default_folder())
    return Encoding(name, encoding.settings(views), cache)


def named(backbone: BackboneOptions, identity: Identity | None = None, tuned: Path | None = None) -> BackboneName:
    """The backbone that :func:`opening.load` would load, by its name."""
    from retrieval_tip.distributed.engine import BackboneName

    weights = None if tuned is None else os.fspath(tuned)
    return BackboneName(*name_of(backbone, identity), backbone.precision, weights)


def asked_of(cache: AnsweringIndex, answer: AnswerOptions, precision: Precision) -> Asked:
    """The way workers are to answer with their copy of an index, as :func:`opening.index_with` has set this one."""
    from retrieval_tip.distributed.tasks import Asked

    return Asked(cache.settings, answer.where, "float32" if precision == "auto" else precision)


def encoding_for(cache: AnsweringIndex, shards: list[Shard], encoding: EncodingOptions) -> Encoding:
    """The encoding of the workers for an index: with its own backbone, where there are images, or refused."""
    import pyarrow as pa

    from retrieval_tip.data.feature_tables import check_backbone
    from retrieval_tip.data.sources import Source

    name, known = None, None
    if not all(shard.features for shard in shards):
        if cache.backbone is None and not encoding.model:
            raise UsageError(UNNAMED)
        name = named(encoding, cache.backbone, cache.tuned)
        known = name.looked_at()
    tables = dict.fromkeys(shard.place for shard in shards if shard.features)
    check_backbone(cache.backbone, cache.d, known, [Source(t, pa.table({}), table=t) for t in tables])
    return encoding_of(encoding, name)


def encoding_views(encoder: Encoder, cache: AnsweringIndex, encoding: EncodingOptions, ray: Ray) -> Encoder:
    """An encoder as this one, which has views of images made on Ray."""
    from retrieval_tip.distributed.tasks import RayEncoder

    name = named(encoding, cache.backbone, cache.tuned)
    return RayEncoder(**vars(encoder), encoding=encoding_of(encoding, name), ray=ray)


def parts(made: Made) -> str:
    """The parts that a folder consists of, as a line ends with them."""
    kept = f", {made.kept} of them kept from before" if made.kept else ""
    return f" in {counted(made.parts, 'part')}{kept}"
