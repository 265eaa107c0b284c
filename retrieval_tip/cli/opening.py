"""Functions that open the sources, backbones, encoders and indexes named by the options of a command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from retrieval_tip.cli.kinds import Place
from retrieval_tip.cli.messages import note, quiet, say
from retrieval_tip.cli.options import (
    BackboneOptions,
    EncodingOptions,
    OpeningOptions,
    SourceOptions,
)
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.settings import Ask
from retrieval_tip.wording import counted, few

if TYPE_CHECKING:
    from retrieval_tip.backbones.base import Backbone, Identity
    from retrieval_tip.data.reader import Reader
    from retrieval_tip.data.sources import Source
    from retrieval_tip.index.places import Store
    from retrieval_tip.model import Index
    from retrieval_tip.store.manifest import Manifest

LONG = 10.0
"""If encoding takes longer than this number of seconds, its speed is printed."""
UNNAMED = (
    "the index was built from features of an unknown encoder; name it with --model to encode images"
)

MAX_PATHS, MAX_PATHS_BYTES = 1 << 24, 1 << 30
"""Maximum number of paths and maximum number of bytes on standard input."""


def source_of(path: Place, reading: SourceOptions, split: str, *, labelled: bool = True) -> Source:
    """Open the source of a command. ``split`` is the part that is used by default."""
    from retrieval_tip.data.sources import open_source

    return open_source(path, split=reading.split or split, root=reading.root, labelled=labelled)


def inputs_of(names: Sequence[str], *, needed: bool = False) -> list[Source]:
    """Open images, folders, globs and tables. ``-`` stands for the paths on standard input.

    Raises InputError if an input is ``needed``, but standard input has no paths.
    """
    from retrieval_tip.data.sources import open_inputs

    sources = list(open_inputs(names, paths_on_stdin()))
    if needed and not sources:
        raise InputError("standard input: contains no paths; send the paths of photos")
    return sources


def paths_on_stdin() -> Iterator[str]:
    """Yield the paths on standard input, one per line or separated by NUL characters (as by ``find -print0``).

    Paths can contain any bytes. Raises InputError if standard input is closed, or exceeds the limits.
    """
    if sys.stdin is None:
        raise InputError(
            "standard input: is closed; send paths to it, or name the files instead of -"
        )
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


def index_with(
    folder: Place,
    backbone: BackboneOptions,
    opening: OpeningOptions = OpeningOptions(),
    ask: Ask = Ask(),
) -> Index:
    """Load an index with the settings and keys selected on the command line."""
    index = store_of(folder).load(device=backbone.device, verify=opening.verify)
    index = index.with_settings(index.settings.override(alpha=ask.alpha, beta=ask.beta))
    if opening.where is not None:
        index = _restricted(index, opening.where, fits=ask.alpha is None and ask.beta is None)
    return index.with_settings(ask.settings(index.settings))


def _restricted(index: Index, where: str, *, fits: bool) -> Index:
    """Return the index with the keys that match a condition, and print the classes that lost keys.

    If a class has lost all its keys, its chance depends on alpha, which is then fitted again if ``fits`` is true.
    """
    from retrieval_tip.fit.closed_form import refit
    from retrieval_tip.store.query import rows_where

    rows = rows_where(index.labels, where)
    if not len(rows):
        raise UsageError(f"where: none of the {index.n} shots match; change the condition")
    rest = index.take(rows)
    counts = zip(index.class_names, rest.counts, index.counts, strict=True)
    parts = [f"{name} {a}/{b}" for name, a, b in counts if a < b]
    automatic = fits and index.fitted is not None and index.fitted.automatic
    if automatic and index.has_text and rest.counts.count(0) > index.counts.count(0):
        rest, _ = refit(rest, rest.settings.beta)
    rest = rest.without_unanswerable()
    say(f"where: {rest.n} of {index.n} shots match ({few(parts)})")
    return rest


def load(backbone: BackboneOptions, identity: Identity | None = None) -> Backbone:
    """Load the backbone of the command line, or else of ``identity``, or else the default."""
    from retrieval_tip.backbones.catalogue import DEFAULT
    from retrieval_tip.backbones.loading import load_again, load_backbone

    how: Any = {"device": backbone.device, "precision": backbone.precision}
    if backbone.model is None and identity is not None:
        return load_again(identity, **how)
    model = backbone.model or DEFAULT
    if sys.stderr.isatty():  # loading takes seconds
        note(f"Loading {model} ...")
    return load_backbone(model, **how, lazy=True)


def with_joined(manifest: Manifest | None, encoding: EncodingOptions) -> EncodingOptions:
    """Return the options for a labelling session. If it has joined an encoder to the named one, both are used."""
    parts = () if manifest is None else manifest.parts
    if encoding.model is None or len(parts) < 2:
        return encoding
    named = load(encoding).identity.fingerprint
    own = [part.identity.fingerprint for part in parts if part.identity is not None]
    return replace(encoding, model=None) if named in own else encoding


def backbone_for(
    index: Index | Manifest | None,
    sources: Sequence[Source],
    backbone: BackboneOptions,
    *,
    needed: bool,
) -> Backbone | None:
    """Return the backbone of an index if it is ``needed`` or there are images to encode.

    It is loaded on first use, since the encoding cache or the stored image tower may be sufficient. Raises an error if
    it differs from the backbone that the index was built with, or if no image of a source exists. Without an index, the
    backbone is the one that the options name. If they name none, feature tables only need a backbone for text, which is
    then the one they name.
    """
    from retrieval_tip.data.feature_table import check_backbone
    from retrieval_tip.data.sources import check_images
    from retrieval_tip.model import Index

    check_images(sources)
    tables = [source.table for source in sources if source.table is not None]
    photos = len(tables) < len(sources)
    if index is None:
        if backbone.model or photos or not tables:
            return load(backbone)
        identity = tables[0].identity() if needed else None
        return load(backbone, identity) if identity else None
    identity = index.backbone if isinstance(index, Index) else index.identity
    loaded: Backbone | None = None
    if needed or photos:
        if identity is None and not backbone.model:
            raise UsageError(UNNAMED)
        loaded = load(backbone, identity)
    check_backbone(identity, index.d, loaded, list(sources), index.parts)
    return loaded


def reader_of(encoding: EncodingOptions) -> Reader:
    """Return a reader that has no backbone and no cache."""
    from retrieval_tip.data.reader import Reader

    names = ("norms", "batch_size", "workers", "strict", "views", "seed")
    return Reader(**{name: getattr(encoding, name) for name in names})


@contextmanager
def reader_for(
    index: Index | Manifest | None,
    sources: Sequence[Source],
    encoding: EncodingOptions,
    *,
    needed: bool = False,
) -> Iterator[Reader]:
    """Open a reader with the backbone of :func:`backbone_for`, and close its cache on exit."""
    from retrieval_tip.data.encoding_cache import EncodingCache

    backbone = backbone_for(index, sources, encoding, needed=needed)
    parts = () if index is None else index.parts
    cache = None if backbone is None or encoding.no_cache else EncodingCache.default()
    began = time.monotonic()
    reader = replace(
        reader_of(encoding),
        backbone=backbone,
        cache=cache,
        parts=tuple(parts),
        progress=not quiet(),
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
