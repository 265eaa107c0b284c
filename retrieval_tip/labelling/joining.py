"""Find out whether another encoder of this machine would help a labelling session.

Only labelled photos tell. Some of them are encoded by the other encoder, and an index of both encoders is fitted to
them. The other encoder helps if the fit gives it at least half of the shares, and if more of these photos are right
when each is classified by the others. A useless encoder gets a share of about 0.1 at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Backbone, parts_of
from retrieval_tip.backbones.joined import Joined
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import spread
from retrieval_tip.data.sources import of_images
from retrieval_tip.evaluation.held_out import held_out_probabilities, photo_rows
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import FitRequest
from retrieval_tip.index.joining import joined_index
from retrieval_tip.labelling.labels import SessionPhotos
from retrieval_tip.model import Index

LEAST, TRIED = 60, 256
"""Minimum number of labelled photos to try an encoder, and how many are encoded at most."""
SHARE = 0.5
"""Minimum share of an encoder that is offered."""


@dataclass(frozen=True)
class Offer:
    """An encoder that would help. Of ``tried`` labelled photos, ``before`` are right now, and ``after`` with it."""

    name: str
    tried: int
    before: int
    after: int


def sample_of(index: Index) -> Index:
    """Return an index of at most ``TRIED`` keys, which are spread over the classes."""
    return index.take(spread(index.n, TRIED))


def paths_in(index: Index, photos: SessionPhotos) -> dict[str, str]:
    """Return where the photos of an index are, by digest. Photos of a session may have moved."""
    columns = (index.labels[name].to_pylist() for name in ("digest", "source"))
    found = {digest: source for digest, source in zip(*columns, strict=True) if digest is not None}
    here = paths_of(photos)
    found |= {digest: here[digest] for digest in found.keys() & here.keys()}
    return found


def paths_of(photos: SessionPhotos) -> dict[str, str]:
    """Return where the encoded photos of a session are, by digest."""
    return {photos.digests[photo]: photos.paths[photo] for photo in list(photos.encoded)}


def with_both(reader: Reader, other: Backbone) -> Reader:
    """Return a reader that joins another encoder to that of ``reader``. Raises UsageError if it is the same encoder."""
    assert reader.backbone is not None
    both = Joined([reader.backbone, other])
    return replace(reader, backbone=both, parts=parts_of(both))


def encoded(paths: Mapping[str, str], reader: Reader) -> dict[str, FloatArray]:
    """Encode photos, given their paths by digest. Leave out those that cannot be read or have changed."""
    digests = list(paths)
    reader = replace(reader, skipped=[], empty=True, strict=False)
    found = dict[str, FloatArray]()
    for block in reader.blocks(of_images(list(paths.values()), "photos")):
        for position, digest, feature in zip(
            block.positions, block.digests, block.features, strict=True
        ):
            if digest == digests[position]:
                found[digests[position]] = feature
    return found


def offer_of(
    name: str, index: Index, features: Mapping[str, FloatArray], reader: Reader
) -> Offer | None:
    """Return the offer to join an encoder to an index, or ``None`` if it does not help.

    ``features`` are those of the other encoder, by digest, and the backbone of ``reader`` joins both.
    """
    known = [digest in features for digest in index.labels["digest"].to_pylist()]
    if sum(known) < LEAST:
        return None
    alone = index.take(np.flatnonzero(known))
    both, _ = joined_index(alone, features, reader)
    if both.shares[-1] < SHARE:
        return None
    prior = "even" if index.fitted is None else index.fitted.class_prior
    alone, _ = closed_form.fit(alone, FitRequest(class_prior=prior))
    rows = photo_rows(alone)
    before, after = (int(held_out_probabilities(one, rows).right.sum()) for one in (alone, both))
    return Offer(name, len(rows), before, after) if after > before else None
