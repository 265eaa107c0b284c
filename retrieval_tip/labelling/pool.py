"""Suggest which photos to label next, with or without an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Identity, same_backbone
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import clip_of
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import InputError, check_count
from retrieval_tip.evaluation.held_out import recognised
from retrieval_tip.index.items import identity_of
from retrieval_tip.labelling.smoothing import smooth
from retrieval_tip.labelling.suggest import TRUST, suggest, uncertainty_of
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.predictions import Predictions
from retrieval_tip.settings import Ask
from retrieval_tip.wording import counted

MOST_PHOTOS = 100_000
"""Number of photos that are considered. If there are more, a random sample is drawn."""
MOST_KEYS = 1 << 14
"""Number of keys whose surroundings count as labelled. If there are more, they are spaced evenly over the index."""
UNSURE = 0.5
"""Probability below which a guess is called unsure."""

SUGGESTIONS = pa.schema(
    [
        ("rank", pa.int64()),
        ("input", pa.string()),
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("covers", pa.int64()),
        ("why", pa.string()),
    ]
)
"""The columns of suggestions. ``label`` and ``probability`` are null if there is no guess."""


@dataclass(frozen=True)
class Suggestions:
    """The photos to label next, most useful first.

    Attributes:
        table: the suggestions, with the columns of ``SUGGESTIONS``. ``covers`` is the number of other photos that are
            more similar to this photo than to any labelled photo and any other suggestion.
        photos: the number of unlabelled photos that were considered.
        known: the number of photos that were skipped, because the index already contains them.
        sampled_from: the number of photos that ``photos`` were drawn from at random, if not all were considered.
    """

    table: pa.Table
    photos: int
    known: int
    sampled_from: int | None = None

    @property
    def inputs(self) -> list[str]:
        """The names of the suggested photos."""
        names: list[str] = self.table["input"].to_pylist()
        return names

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __str__(self) -> str:
        text = f"suggested {counted(len(self), 'photo')} of {self.photos:,}"
        if self.sampled_from is not None:
            text += f", drawn at random from {self.sampled_from:,}"
        return text + (
            f"; skipped {self.known:,} that the index already contains" if self.known else ""
        )


@dataclass(frozen=True)
class Pool:
    """Unlabelled photos: their names, their features of shape ``[m, d]``, and the digests of their files.

    ``clips`` has the file of each photo that is a frame of a video, and ``""`` for others. It may be empty.
    """

    names: list[str]
    features: FloatArray
    digests: list[str | None]
    clips: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, sources: Sequence[Source], reader: Reader) -> Pool:
        """Encode the photos. Raises InputError or BackboneError if the sources have features of different encoders."""
        names: list[str] = []
        digests: list[str | None] = []
        clips: list[str] = []
        features: list[FloatArray] = []
        identity: Identity | None = None
        total = sum(map(len, sources))
        for source in sources:
            own = identity_of(source, reader)
            same_backbone(own, identity, source.name)
            identity = identity or own
            for block in reader.blocks(source):
                d = block.features.shape[1]
                if not features:  # the blocks and their concatenation
                    check_memory(
                        8 * total * d, f"features of {total:,} photos", "use fewer photos at a time"
                    )
                elif d != features[0].shape[1]:
                    earlier = features[0].shape[1]
                    raise InputError(
                        f"{source.name}: its features have {d} values; earlier photos have {earlier}"
                    )
                names += source.items["source"].take(pa.array(block.positions)).to_pylist()
                digests += block.digests
                paths = source.paths
                clips += [clip_of(paths[i]) if paths else "" for i in block.positions]
                features.append(block.features)
        return cls(names, np.concatenate(features), digests, clips)

    @property
    def block(self) -> FeatureBlock:
        """The photos as a block, with their rows as positions."""
        return FeatureBlock(np.arange(len(self.names)), self.features, self.digests)

    def smoothed(self, index: Index, ask: Ask = Ask()) -> tuple[Predictions, str]:
        """Classify the photos, smooth the answers (see :func:`smoothing.smooth`), and say what smoothing changed."""
        found = smooth(index, [FeatureBlock.of(self.features)], ask, self.names)
        answers = Predictions.joined(
            block.predictions() for block in index.answers(found.blocks, ask)
        )
        named = answers.named(pa.array(self.names, pa.string())).to_arrow()
        return Predictions(named.append_column("similar", found.similar)), found.words

    def without(self, index: Index) -> Pool:
        """Return the photos that are not in the index (see :func:`held_out.recognised`)."""
        rows = np.flatnonzero(
            ~recognised(index, pa.array(self.names, pa.string()), self.block).shots
        )
        return Pool(
            [self.names[row] for row in rows],
            self.features[rows],
            [self.digests[row] for row in rows],
            [self.clips[row] for row in rows],
        )


def suggest_photos(
    sources: Sequence[Source],
    n: int,
    reader: Reader,
    index: Index | None = None,
) -> Suggestions:
    """Choose ``n`` photos to label next (see :func:`suggest.suggest`).

    Without an index, photos are compared by their features, and no label is guessed. With an index, its metric compares
    the photos, its probabilities give the uncertainty, and its shots count as labelled. Photos that the index contains
    are skipped (see :meth:`Pool.without`).

    If there are more than ``MOST_PHOTOS``, a random sample is drawn before encoding. ``reader.skipped`` lists the
    photos that cannot be read.

    Raises InputError if no photo remains, and the errors of :meth:`reader.Reader.blocks`.
    """
    check_count("n", n)
    total = sum(map(len, sources))
    if total > MOST_PHOTOS:
        drawn = np.zeros(total, dtype=bool)
        drawn[np.random.default_rng(0).choice(total, MOST_PHOTOS, replace=False)] = True
        parts = np.split(drawn, np.cumsum([len(source) for source in sources])[:-1])
        sources = [
            source.take(np.flatnonzero(part)) for source, part in zip(sources, parts, strict=True)
        ]
    pool = Pool.of(sources, reader)
    fresh = pool if index is None else pool.without(index)
    if not fresh.names:
        raise InputError(
            f"photos: the index already contains {counted(len(pool.names), 'photo')}; give other photos"
        )
    known = len(pool.names) - len(fresh.names)
    return replace(
        suggest_features(fresh, n, index),
        known=known,
        sampled_from=total if total > MOST_PHOTOS else None,
    )


def suggest_features(pool: Pool, n: int, index: Index | None = None) -> Suggestions:
    """Choose ``n`` photos of a pool (see :func:`suggest_photos`). Photos that the index contains are not skipped."""
    if index is None:
        picks = suggest(pool.features, n, files=pool.clips)
        facts = [{"covers": covers} for covers in picks.covers.tolist()]
    else:
        answers = index.classify(pool.features, "keep", neighbours=0, logits=False)
        guesses = answers.written(["label", "probability", "no_match"])
        class_ids = pc.index_in(guesses["label"], value_set=pa.array(index.class_names)).to_numpy()
        chances = guesses["probability"].to_numpy()
        counts = np.array(index.counts)
        picks = suggest(
            pool.features,
            n,
            uncertainty=uncertainty_of(chances, class_ids, counts),
            labelled=index.rows.some(MOST_KEYS)[0],
            metric=index.metric,
            files=pool.clips,
        )
        guesses = guesses.append_column("examples", pa.array(counts[class_ids]))
        facts = (
            guesses.take(pa.array(picks.rows))
            .append_column("covers", pa.array(picks.covers))
            .to_pylist()
        )
    rows = [
        {"rank": rank, "input": pool.names[row], "why": why(**one)} | one
        for rank, (row, one) in enumerate(zip(picks.rows.tolist(), facts, strict=True), 1)
    ]
    return Suggestions(pa.Table.from_pylist(rows, schema=SUGGESTIONS), len(pool.names), 0)


def why(
    covers: int,
    label: str | None = None,
    probability: float = 0.0,
    no_match: bool | None = None,
    examples: int = 0,
) -> str:
    """Explain in words why to label a photo. ``examples`` is the number of shots of the guessed class ``label``."""
    similar = (
        f"stands for {counted(covers, 'similar photo')}" if covers else "stands only for itself"
    )
    if no_match:
        return f"{similar}; may be a new class"
    if label is None:
        return similar
    if probability < UNSURE:
        return f"{similar}; the guess is unsure"
    few = (
        f"only {counted(examples, 'example')} of this class so far"
        if examples <= TRUST
        else "the guess may be wrong"
    )
    return f"{similar}; {few}"
