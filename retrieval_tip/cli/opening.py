"""Functions that open the sources, backbones, encoders and indexes named by the options of a command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import note, quiet, say
from retrieval_tip.cli.options import BackboneOptions, EncodingOptions, OpeningOptions, SourceOptions, ViewOptions
from retrieval_tip.errors import InputError, UsageError, counted, few
from retrieval_tip.settings import Ask

if TYPE_CHECKING:
    from retrieval_tip.backbones.base import Backbone, Identity
    from retrieval_tip.backbones.joined import Joined
    from retrieval_tip.backbones.torch_backbone import TorchBackbone
    from retrieval_tip.data.reader import Reader
    from retrieval_tip.data.sources import Source
    from retrieval_tip.index.places import Store
    from retrieval_tip.model import Index
    from retrieval_tip.settings import KeysMet
    from retrieval_tip.store.manifest import Manifest

LONG = 10.0
"""If encoding takes longer than this number of seconds, its speed is printed."""
UNNAMED = "the index was built from features of an unknown encoder; name it with --model to encode images"

MAX_PATHS, MAX_PATHS_BYTES = 1 << 24, 1 << 30
"""Maximum number of paths and maximum number of bytes on standard input."""


def source_of(path: Place, reading: SourceOptions, split: str, *, labelled: bool = True) -> Source:
    """Open the source of a command. ``split`` is the part that is used by default."""
    from retrieval_tip.data.sources import open_items, open_source

    return (open_source if labelled else open_items)(path, split=reading.split or split, root=reading.root)


def inputs_of(names: Sequence[str]) -> list[Source]:
    """Open images, folders, globs and tables. ``-`` stands for the paths on standard input."""
    from retrieval_tip.data.sources import open_inputs

    return list(open_inputs(names, paths_on_stdin()))


def paths_on_stdin() -> Iterator[str]:
    """Yield the paths on standard input, one per line or separated by NUL characters (as by ``find -print0``).

    Paths can contain any bytes. Raises InputError if standard input is closed, or exceeds the limits.
    """
    if sys.stdin is None:
        raise InputError("standard input: is closed; send paths to it, or name the files instead of -")
    data = sys.stdin.buffer.read(MAX_PATHS_BYTES + 1)
    separator = b"\0" if b"\0" in data else b"\n"
    if len(data) > MAX_PATHS_BYTES or data.count(separator) > MAX_PATHS:
        raise InputError(
            f"standard input: contains more than {MAX_PATHS:,} paths or {MAX_PATHS_BYTES:,} bytes, or no paths; "
            "give a table of paths"
        )
    yield from (os.fsdecode(path) for path in data.split(separator) if path)


def store_of(folder: Place) -> Store:
    """Return the store at a folder or an address."""
    from retrieval_tip.index.places import at

    return at(folder)


def validation(index: Index, path: Place, reading: SourceOptions, number: KeysMet) -> Source:
    """Open ``number`` validation images per class, all images, or by default the published number."""
    from retrieval_tip.fit.search_hp import validation_shots

    val = source_of(path, replace(reading, split=None), "val")
    return val if number == "all" else val.take(validation_shots(index, val, path, number))


def index_with(
    folder: Place, backbone: BackboneOptions, opening: OpeningOptions = OpeningOptions(), ask: Ask = Ask()
) -> Index:
    """Load an index with the settings and keys selected on the command line."""
    index = store_of(folder).load(device=backbone.device, verify=opening.verify)
    index = index.with_settings(index.settings.override(alpha=ask.alpha, beta=ask.beta))
    if opening.where is not None:
        from retrieval_tip.index.items import restricted

        rest = restricted(index, opening.where, ask)
        kept = dict(zip(rest.class_names, rest.counts, strict=True))
        counts = ((name, kept.get(name, 0), n) for name, n in zip(index.class_names, index.counts, strict=True))
        parts = [f"{name} {own}/{n}" for name, own, n in counts if own < n]
        say(f"where: {rest.n} of {index.n} shots match ({few(parts)})")
        index = rest
    index.settings = ask.settings(index.settings)
    return index


def loader(backbone: BackboneOptions, identity: Identity | None = None) -> partial[TorchBackbone | Joined]:
    """Return a function that loads the backbone of the command line, of ``identity``, or by default a common one."""
    from retrieval_tip.backbones.catalogue import DEFAULT
    from retrieval_tip.backbones.loading import load_backbone

    model, pretrained = backbone.model, backbone.pretrained
    if model is None and identity is not None:
        model, pretrained = identity.model, pretrained or identity.pretrained
    return partial(load_backbone, model or DEFAULT, pretrained, precision=backbone.precision, runtime=backbone.runtime)


def load(backbone: BackboneOptions, identity: Identity | None = None) -> Backbone:
    """Load the backbone of :func:`loader`."""
    found = loader(backbone, identity)
    if sys.stderr.isatty():  # loading takes seconds
        note(f"Loading {found.args[0]} ...")
    return found(device=backbone.device, lazy=True)


def backbone_for(
    index: Index | Manifest | None, sources: Sequence[Source], backbone: BackboneOptions, *, needed: bool
) -> Backbone | None:
    """Return the backbone of an index if it is ``needed`` or there are images to encode.

    It is loaded on first use, since the encoding cache or the stored image tower may be sufficient. Raises an error if
    it differs from the backbone that the index was built with. Without an index, the backbone is the one that the
    options name. If they name none, feature tables only need a backbone for text, which is then the one they name.
    """
    from retrieval_tip.backbones.loading import load_when_needed
    from retrieval_tip.data.tables import check_backbone, table_identity
    from retrieval_tip.model import Index

    tables = [source.table for source in sources if source.table is not None]
    photos = len(tables) < len(sources)
    if index is None:
        if backbone.model or photos or not tables:
            return load(backbone)
        identity = table_identity(tables[0]) if needed else None
        return load(backbone, identity) if identity else None
    identity = index.backbone if isinstance(index, Index) else index.identity
    loaded: Backbone | None = None
    if needed or photos:
        if identity is None and not backbone.model:
            raise UsageError(UNNAMED)
        if identity and not (needed or backbone.model or backbone.pretrained):
            loaded = load_when_needed(
                identity,
                index.d,
                [part.width for part in index.parts],
                device=backbone.device,
                precision=backbone.precision,
                runtime=backbone.runtime,
            )
        else:
            loaded = load(backbone, identity)
    check_backbone(identity, index.d, loaded, list(sources), index.parts)
    return loaded


def reader_of(encoding: EncodingOptions, views: ViewOptions | None = None) -> Reader:
    """Return a reader that has no backbone and no cache. By default, it uses the centre view."""
    from retrieval_tip.data.reader import Reader

    own = {name: getattr(encoding, name) for name in ("norms", "batch_size", "workers", "reduce", "strict")}
    return Reader(**own, **vars(views or ViewOptions()))


@contextmanager
def reader_for(
    index: Index | Manifest | None,
    sources: Sequence[Source],
    encoding: EncodingOptions,
    views: ViewOptions | None = None,
    *,
    needed: bool = False,
) -> Iterator[Reader]:
    """Open a reader with the backbone of :func:`backbone_for`, and close its cache on exit."""
    from retrieval_tip.data.encoding_cache import EncodingCache

    backbone, parts = backbone_for(index, sources, encoding, needed=needed), () if index is None else index.parts
    cache = None if backbone is None or encoding.no_cache else EncodingCache.at(encoding.cache)
    began = time.monotonic()
    reader = replace(
        reader_of(encoding, views), backbone=backbone, cache=cache, parts=tuple(parts), progress=not quiet()
    )
    try:
        yield reader
        seconds = time.monotonic() - began
        made, images = reader.done["fresh"], reader.done["images"]
        if images and seconds > LONG:
            speed = f"{counted(images, 'image')} in {seconds:.0f} s ({images / seconds:.0f}/s)"
            note(f"Encoded {speed}, {max(0, images - made):,} from the cache")
    finally:
        if cache is not None:
            cache.close()
