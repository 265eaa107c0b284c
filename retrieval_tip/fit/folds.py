"""Hold out some of the shots, and fit a form to the others.

:class:`Folds` fits a form again without each fold. :mod:`fit.blend` weights the terms of its logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import DoubleArray, IntArray, slices
from retrieval_tip.backbones.base import Part, equal_shares
from retrieval_tip.fit.blend import Blend, HeldTerms
from retrieval_tip.fit.forms import Form
from retrieval_tip.fit.scatter import FewScatter, Scatter, known_prior
from retrieval_tip.model import Index
from retrieval_tip.retrieval.inputs import KeysInPlace, StoredKeys, scale_of
from retrieval_tip.retrieval.keys import KEY_BLOCK
from retrieval_tip.retrieval.ridge import Ridge, class_weights
from retrieval_tip.settings import ClassPrior
from retrieval_tip.store.labels import images_of
from retrieval_tip.store.sums import Sums

HeldOutKind = Literal["shots", "small", "classes"]

SMALL_FOLDS, SMALL_SHARE = 8, 0.2
"""Number of the small folds that are added if the other folds contain half of the shots, and their weight."""
CLASS_FOLDS = 4
"""Number of folds of whole classes, if some classes have text but no shots."""
LEAST_OF_A_FOLD = 0.1
"""Smallest fraction of another fold to evaluate. Below it, solving the values for the fold is not worthwhile."""
LEAST_JUDGED = 8
"""Minimum number of held-out photos to select a form."""
WIDEST = 4096
"""Maximum number of values of joined features if only some of the encoders have a known prior."""


@dataclass(frozen=True)
class Held:
    """Held-out queries, for an index over the other ``rows``.

    The ``features`` have shape ``[q, d]`` and the class ``ids`` have shape ``[q]``. ``of`` says what is held out: some
    shots, few shots at a time (see :meth:`Folds.with_small`), or whole classes. ``query_rows`` are the rows of the
    queries, if they are keys.
    """

    features: Tensor
    ids: Tensor
    rows: Tensor
    of: HeldOutKind = "shots"
    query_rows: Tensor | None = None


class FoldTerms(NamedTuple):
    """The terms of the logits of held-out photos, each of shape ``[q, c]``. A term that does not exist is ``None``.

    The ``discriminant`` cannot compare classes that have shots with classes that have none. If there are such classes,
    ``bonus`` takes its place: by how much a further bonus of 1 raises the cache logits (see
    :class:`retrieval.ridge.Ridge`), if whole classes are held out to fit it.
    """

    text: Tensor | None
    cache: Tensor
    discriminant: Tensor | None
    bonus: Tensor | None

    def held(self, ids: Tensor, offset: float | None = None) -> HeldTerms:
        """Return the terms to blend, for queries of these classes. The cache logits are linked with the ``offset``."""
        cache = tip.log_cache(self.cache.clone(), offset)
        third = self.discriminant if self.bonus is None else self.bonus
        return HeldTerms(self.text, cache, third, ids)


class Order(NamedTuple):
    """All rows and all class ids, in an order that depends on the photos and the class names only.

    Folds that are drawn in this order stay the same if the rows of an index change places. Within a class, a row is
    placed by a hash of its digest or, without a digest, of its feature. Equal features may change places.
    """

    rows: IntArray
    classes: IntArray

    @classmethod
    def of(cls, index: Index, labels: pa.Table) -> Self:
        """Return the order of an index. ``labels`` has the column ``digest``."""
        digests = labels["digest"].to_pylist()
        hashes = np.array(
            [_hash_of(digest) if digest else 0 for digest in digests], dtype=np.uint64
        )
        bare = np.flatnonzero([not digest for digest in digests])
        widths = [part.width for part in index.parts] or [index.d]
        # Each part has the same factors, so that the order of the encoders does not matter.
        factors = np.random.default_rng(0).integers(1 << 63, size=max(widths), dtype=np.uint64)
        joined = np.concatenate([factors[:width] for width in widths])
        for keys, rows in _blocks(index.keys, bare) if len(bare) else ():
            bits = np.asarray(keys, dtype=np.float32).view(np.uint32).astype(np.uint64)
            # The products wrap modulo 2^64. Integers add exactly, so the order of the sum does not matter.
            hashes[rows] = bits @ joined
        classes = np.argsort(index.class_names)
        places = np.argsort(classes)
        return cls(np.lexsort((hashes, places[index.class_ids.cpu().numpy()])), classes)


def _hash_of(digest: str) -> int:
    return int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=8).digest())


@dataclass
class Folds:
    """Keys, their class ``ids`` and ``images``, scaled ``text`` weights of shape ``[c, d]``, and held-out queries.

    Keys with the same number in ``images`` are views of one photo, which are held out together. ``validation`` is the
    name of the queries if they are not shots. They then have equal weight, as if ``class_prior`` were ``shots``.
    ``user_prior`` is a prior from the user. ``single`` classes have one photo, which is never held out. ``parts`` are
    the parts of a feature by encoder, and ``shares`` say how much each encoder counts. Photos are drawn in the
    ``order``.
    """

    keys: StoredKeys
    ids: Tensor
    c: int
    text: Tensor | None
    images: IntArray
    order: Order
    held: Sequence[Held] = ()
    sums: Sums | None = None
    class_prior: ClassPrior = "even"
    validation: str | None = None
    user_prior: DoubleArray | None = None
    single: int = 0
    parts: Sequence[Part] = ()
    shares: Sequence[float] = ()
    # Not fields of __init__: a copy by replace() has other folds or shares, so it starts without them.
    _scatters: dict[int | None, Scatter | FewScatter] = field(default_factory=dict, init=False)
    _terms: dict[Form, FoldTerms] = field(default_factory=dict, init=False)

    @classmethod
    def of(
        cls, index: Index, class_prior: ClassPrior | None = None, shares: Sequence[float] = ()
    ) -> Folds:
        """Return the keys of an index without held-out queries, by default with its own class prior and shares."""
        fitted_prior = "even" if index.fitted is None else index.fitted.class_prior
        text = index.text_weights.cpu() * index.settings.logit_scale if index.has_text else None
        parts = index.parts or (Part(index.d, "feature", index.backbone),)
        labels = index.rows.columns("digest", "source")
        return cls(
            index.keys,
            index.class_ids.cpu(),
            len(index.class_names),
            text,
            images_of(labels),
            Order.of(index, labels),
            sums=index.rows.sums,
            class_prior=class_prior or fitted_prior,
            user_prior=None if index.prior is None else index.prior.astype(np.float64),
            parts=parts,
            shares=shares or index.shares or equal_shares(parts),
        )

    def order_of(self, rows: Tensor) -> Tensor:
        """Return the positions that put some rows in order. Float32 rounds differently in another order."""
        places = np.argsort(self.order.rows)
        return torch.from_numpy(places[rows.numpy()]).argsort()

    @cached_property
    def _photos(self) -> IntArray:
        """The row of the first view of each photo, in order."""
        rows = self.order.rows
        first = np.unique(self.images[rows], return_index=True)[1]
        return rows[np.sort(first)]

    def with_shots(self, number: int, most: int, seed: int = 0) -> Folds:
        """Split the photos into up to ``number`` folds, and hold out about ``most`` of them."""
        ids = self.ids.numpy()[self._photos]
        counts = np.bincount(ids)
        folds = np.full(len(ids), -1)
        if (several := counts[ids] > 1).any():
            ranks = ranks_within(ids, np.random.default_rng(seed))
            # With more folds than photos, most classes would be missing from some fold.
            folds = np.where(several, ranks % min(number, int(np.median(counts[counts > 1]))), -1)
        return replace(self, held=list(self._held(folds, most)), single=int((counts == 1).sum()))

    def with_small(self, most: int) -> Folds:
        """Also hold out few photos at a time, if the other folds contain half of the shots.

        With half of its shots, an index separates the classes less than the whole index does, so a blend that is fitted
        to these folds would be overconfident. In a small fold, almost only the class of the query has fewer shots, so
        the blend would not be confident enough. The small folds have the weight :data:`SMALL_SHARE`.
        """
        if not self.halves or (
            self.prior is not None and self.text is not None
        ):  # the text would count less
            return self
        ids = self.ids.numpy()[self._photos]
        draw = np.random.default_rng(0)
        counts = np.bincount(ids, minlength=self.c)[ids]
        starts = np.empty(self.c, dtype=np.int64)
        ranks = ranks_within(ids, draw)
        starts[self.order.classes] = draw.permutation(self.c)
        places = ranks * np.maximum(SMALL_FOLDS // counts, 1) + starts[ids]
        small = self._held(np.where(counts > 1, places % SMALL_FOLDS, -1), most, "small")
        return replace(self, held=[*self.held, *small])

    def with_classes(self, most: int) -> Folds:
        """Also hold out whole classes, if some classes have text but no shots.

        A held-out class resembles a class that has no shots, because it can only be recognised by its text. Its photos
        are weighted as described in :attr:`weights`.
        """
        ids = self.ids.numpy()
        classes = self.order.classes
        shot_classes = classes[np.isin(classes, ids)]
        if not self.held or self.covered == 1 or len(shot_classes) < CLASS_FOLDS:
            return self
        fold_of = np.zeros(self.c, dtype=np.int64)
        fold_of[np.random.default_rng(0).permutation(shot_classes)] = (
            np.arange(len(shot_classes)) % CLASS_FOLDS
        )
        whole = self._held(fold_of[ids[self._photos]], most, "classes", fold_of[ids])
        return replace(self, held=[*self.held, *whole])

    def _held(
        self, folds: IntArray, most: int, of: HeldOutKind = "shots", groups: IntArray | None = None
    ) -> Iterator[Held]:
        """Yield about ``most`` held-out photos, one fold at a time, given the fold of each photo, or -1.

        The index lacks all keys that share a number in ``groups``, by default the images, with a photo of the fold.
        """
        ids = self.ids.numpy()
        groups = self.images if groups is None else groups
        begun = False
        for fold in range(folds.max(initial=-1) + 1):
            asked = self._photos[folds == fold]
            if most < len(asked) * (LEAST_OF_A_FOLD if begun else 0) or most <= 0:
                return
            if len(asked) > most:
                asked = np.random.default_rng(fold).choice(asked, most, replace=False)
            rows = torch.from_numpy(np.flatnonzero(~np.isin(groups, groups[asked])))
            query_rows = torch.from_numpy(asked)
            yield Held(
                taken_keys(self.keys, query_rows),
                torch.from_numpy(ids[asked]),
                rows,
                of,
                query_rows,
            )
            most = most - len(asked)
            begun = True

    @property
    def covered(self) -> float:
        """Fraction of the classes that have shots or queries, or 1 if there is no text."""
        ids = torch.cat([self.ids, *(held.ids for held in self.held)])
        return 1.0 if self.text is None else len(ids.unique()) / self.c

    @property
    def halves(self) -> bool:
        """Whether only about half of the shots remain in a fold, so that cache logits differ from the logits of all."""
        # Two folds leave about 0.5 of the shots, three about 0.67.
        return any(len(held.rows) < 0.6 * len(self.ids) for held in self.held if held.of == "shots")

    def held_of(self, what: str) -> Tensor:
        """Return for each query whether it was held out in this way."""
        return torch.cat([torch.full((len(held.ids),), held.of == what) for held in self.held])

    @property
    def holds_classes(self) -> bool:
        """Whether whole classes are held out."""
        return any(held.of == "classes" for held in self.held)

    @property
    def weights(self) -> Tensor:
        """Query weights of mean 1.

        By default, all classes have equal weight, regardless of their number of shots. Queries of held-out classes are
        weighted by the fraction of classes that have no shots.
        """
        whole = self.held_of("classes")
        small = self.held_of("small")
        ids = self.ids_held
        weights = torch.ones(len(ids), dtype=torch.float64)
        if self.validation is None and self.class_prior == "even":
            weights = class_weights(torch.bincount(self.ids, minlength=self.c))[ids].double()
        if small.any():
            others = ~small & ~whole
            weights[small] *= (
                SMALL_SHARE / (1 - SMALL_SHARE) * weights[others].sum() / weights[small].sum()
            )
        if whole.any():
            shares = torch.where(whole, 1 - self.covered, self.covered)
            weights *= shares / torch.where(whole, weights[whole].sum(), weights[~whole].sum())
        return weights / weights.mean()

    @property
    def n(self) -> int:
        """Number of held-out photos, excluding small folds and held-out classes."""
        return sum(len(held.ids) for held in self.held if held.of == "shots")

    @property
    def judged_on(self) -> str:
        """The held-out photos in words."""
        return f"{self.n:,} photos" + (
            f" of {self.validation}" if self.validation else ", each held out in turn"
        )

    @property
    def can_judge(self) -> bool:
        """Whether enough photos, of at least two classes, are held out to evaluate a form."""
        return self.n >= LEAST_JUDGED and self.tested > 1

    @property
    def tested(self) -> int:
        """Number of classes of the held-out photos, excluding small folds and held-out classes."""
        ids = [held.ids for held in self.held if held.of == "shots"]
        return len(torch.cat(ids).unique()) if ids else 0

    def scatter(self, rows: Tensor) -> Scatter | FewScatter:
        """Return the scatter of some of the keys."""
        prior = self.prior
        widths = [part.width for part, _ in self._used] or [self.keys.shape[1]]
        if len(rows) < sum(widths) and prior is None:
            return FewScatter.of(*self.taken(rows[self.order_of(rows)]), self.c, widths)
        every = np.arange(len(self.ids))
        if self.sums is None:
            self.sums = self._sums_of(every)
        others = np.delete(every, rows.numpy())
        # Subtracting reads only the keys that are held out, not those that stay.
        sums = self.sums - self._sums_of(others) if len(others) else self.sums
        means = self.scaled(torch.from_numpy(sums.sums)).numpy()
        return Scatter.of(Sums(sums.counts, means, self._scaled_square(sums.second)), prior, widths)

    @cached_property
    def prior(self) -> DoubleArray | None:
        """The prior from the user, or the known priors of all encoders that count. Otherwise ``None``.

        If no class has two keys, one known prior is enough. The other features then vary evenly, as ``I / d``.
        """
        if self.user_prior is not None:
            return self._scaled_square(self.user_prior)
        priors = [known_prior(part) for part, _ in self._used]
        unknown = sum(prior is None for prior in priors)
        has_pairs = len(self.ids.unique()) < len(self.ids)
        is_wide = sum(part.width for part, _ in self._used) > WIDEST
        if unknown == len(priors) or (unknown and (has_pairs or is_wide)):
            return None
        blocks = []
        for (part, share), prior in zip(self._used, priors, strict=True):
            if prior is None:
                prior = np.eye(part.width) / part.width
            blocks.append(torch.from_numpy(share * prior))
        return np.asarray(torch.block_diag(*blocks))

    @property
    def _used(self) -> list[tuple[Part, float]]:
        return [
            (part, share) for part, share in zip(self.parts, self.shares, strict=True) if share > 0
        ]

    def _scaled_square(self, matrix: DoubleArray) -> DoubleArray:
        return self.scaled(self.scaled(torch.from_numpy(matrix)).T).T.numpy()

    def taken(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of the keys as float32, scaled by the shares of their encoders, and their class ids."""
        return self.scaled(taken_keys(self.keys, rows)), self.ids[rows]

    def scaled(self, features: Tensor) -> Tensor:
        """Scale features by the shares of their encoders, and leave out the values of encoders without a share."""
        scale = self._scale
        if scale is None:
            return features
        used = scale > 0
        return features[:, used] * scale[used]

    @property
    def _scale(self) -> Tensor | None:
        return scale_of(self.parts, self.shares)

    def _whole(self, metric: tip.Metric | None) -> tip.Metric | None:
        """Return the metric of features that are not scaled, from the metric of scaled features."""
        scale = self._scale
        if scale is None:
            return metric
        used = scale.nonzero()[:, 0]
        mean = torch.zeros_like(scale)
        if metric is None:
            return tip.Metric(mean, factor=scale[None])
        mean[used] = metric.mean / scale[used]
        if metric.factor is not None:
            factor = torch.zeros(len(metric.factor), len(scale))
            factor[:, used] = metric.factor
            factor[0] *= scale
            return tip.Metric(mean, factor=factor)
        transform = torch.zeros(len(scale), len(scale))
        transform[used[:, None], used] = scale[used, None] * metric.transform
        return tip.Metric(mean, transform)

    @property
    def weighted_text(self) -> Tensor | None:
        """The scaled text weights in which each encoder has its share, or ``None`` if there are none."""
        text = self.text
        scale = self._scale
        text = text if text is None or scale is None else text * scale.square()
        return text if text is not None and text.any() else None

    def _sums_of(self, rows: IntArray) -> Sums:
        ids = self.ids.numpy()
        blocks = ((keys, ids[block]) for keys, block in _blocks(self.keys, rows))
        return Sums.of(blocks, self.c, self.keys.shape[1])

    def shared(self, shares: Sequence[float]) -> Folds:
        """Return the same folds with other shares of the encoders."""
        return replace(self, shares=shares)

    def of_known(self) -> Folds:
        """Return the same folds, in which only encoders with a prior count."""
        has_prior = [
            self.user_prior is not None or known_prior(part) is not None for part in self.parts
        ]
        return self.shared(
            [share * counts for share, counts in zip(self.shares, has_prior, strict=True)]
        )

    def judge(self, form: Form) -> Blend:
        """Fit a form to all shots except each fold in turn, and return the blend on these folds."""
        return self.terms(form).held(self.ids_held).blend(self.weights)

    def terms(self, form: Form) -> FoldTerms:
        """Fit a form to the other photos, and return the terms of held-out photos.

        The cache logits include the ``bonus`` of the form. Do not change the terms, because they are kept.
        """
        if form not in self._terms:
            plain = replace(form, bonus=0.0)
            answers = [self._answers(plain, held, fold) for fold, held in enumerate(self.held)]
            cache, discriminant, bonus = zip(*answers, strict=True)
            features = torch.cat([held.features for held in self.held])
            text = (
                None if self.weighted_text is None else tip.affinity(features, self.weighted_text)
            )
            self._terms[form] = FoldTerms(text, torch.cat(cache), _cat(discriminant), _cat(bonus))
        terms = self._terms[form]
        if terms.bonus is None:
            return terms
        cache_with_bonus = terms.cache + form.bonus * terms.bonus
        fitted_bonus = terms.bonus if self.holds_classes else None
        return terms._replace(cache=cache_with_bonus, bonus=fitted_bonus)

    @property
    def ids_held(self) -> Tensor:
        """Class ids of the held-out queries."""
        return torch.cat([held.ids for held in self.held])

    @property
    def counts(self) -> Tensor:
        """Number of keys of each class that a held-out query meets, ``[q, c]``."""
        fewer = [
            torch.bincount(self.ids[held.rows], minlength=self.c).expand(len(held.ids), -1)
            for held in self.held
        ]
        return torch.cat(fewer)

    @property
    def growth(self) -> Tensor:
        """How many times as many keys of its own class the whole index has for a held-out query, ``[q]``.

        It is 1 for a class that is held out whole.
        """
        ids = self.ids_held
        every = torch.bincount(self.ids, minlength=self.c)
        fewer = self.counts.gather(1, ids[:, None])[:, 0]
        return torch.where(fewer > 0, every[ids] / fewer, 1)

    def fitted(
        self, form: Form, rows: Tensor, fold: int | None = None
    ) -> tuple[tip.Metric | None, Tensor | None]:
        """Fit the metric and the values of a form to ``rows`` of the keys, or to all keys outside a ``fold``."""
        metric, values, _ = self._fitted(form, rows, fold)
        return self._whole(metric), values

    def _fitted(
        self, form: Form, rows: Tensor, fold: int | None
    ) -> tuple[tip.Metric | None, Tensor | None, Tensor | None]:
        """Return the metric, the values, and the points of the keys, unless values are one-hot."""
        metric = None
        if form.metric is not None:
            if fold not in self._scatters:
                self._scatters[fold] = self.scatter(rows)
            metric = form.metric.fit(self._scatters[fold])
        if form.ridge is None:
            return metric, None, None
        order = self.order_of(rows)
        keys, ids = self.taken(rows[order])
        points = keys if metric is None else metric(keys)
        ridge = Ridge(self.c, form.beta, form.ridge, "cpu", self.class_prior, form.bonus)
        back = order.argsort()
        return metric, ridge.values(points, ids)[back], points[back]

    def _answers(
        self, form: Form, held: Held, fold: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return cache, discriminant and bonus of held-out photos (:class:`FoldTerms`), from an index without them."""
        metric, values, points = self._fitted(form, held.rows, fold)
        features = self.scaled(held.features)
        queries = features if metric is None else metric(features)
        counts = torch.bincount(self.ids[held.rows], minlength=self.c)
        sums = torch.zeros(self.c, queries.shape[1], dtype=torch.float64)
        bonus = None
        if values is not None and points is not None:
            weights = tip.weight(tip.affinity(queries, points), form.beta)
            cache = weights @ values
            bonus = weights.mean(1, keepdim=True) * (counts == 0)
            tip.add_rows(sums, self.ids[held.rows], points.double())
        else:
            cache = torch.zeros(len(queries), self.c)
            for block, rows in _blocks(self.keys, held.rows.numpy()):  # may be very many
                keys = self.scaled(torch.from_numpy(np.array(block, dtype=np.float32)))
                points = keys if metric is None else metric(keys)
                ids = self.ids[torch.from_numpy(rows)]
                cache += tip.cache_logits(tip.affinity(queries, points), ids, self.c, form.beta)
                tip.add_rows(sums, ids, points.double())
        if self.covered < 1:
            return cache, None, bonus
        return cache, tip.Discriminant.of(sums.float(), counts.float())(queries), None


def ranks_within(ids: IntArray, draw: np.random.Generator) -> IntArray:
    """Return the rank of each item within its class, in random order."""
    order = draw.permutation(len(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[order] = np.arange(len(ids)) - np.searchsorted(ids[order], ids[order])
    return ranks


def _blocks(keys: StoredKeys, rows: IntArray) -> Iterator[tuple[npt.NDArray[Any], IntArray]]:
    """Yield some of the keys and their rows in blocks, in order unless the keys are read in place."""
    if isinstance(keys, KeysInPlace):
        return keys.blocks(rows)
    blocks = (rows[block] for block in slices(len(rows), KEY_BLOCK))
    return ((np.asarray(keys[block]), block) for block in blocks)


def _cat(terms: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate a term of all folds, which no fold or every fold has."""
    some = [term for term in terms if term is not None]
    return torch.cat(some) if some else None


def taken_keys(keys: StoredKeys, rows: Tensor) -> Tensor:
    """Return some of the keys as float32."""
    return torch.from_numpy(np.asarray(keys[rows.numpy()], dtype=np.float32))
