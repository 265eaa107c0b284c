"""Fit the metric and the values of an index to its shots in closed form, which takes seconds.

The fit replaces two parts of the formula in :mod:`tip`::

    metric     phi(x) = unit((x - m) T),   T = ((1 - s) S + s tr(S) / d I)^(-1/2)
    values     V = (G + lambda I)^-1 Y,    G = exp(-beta (1 - phi(K) phi(K)^T))

``S`` is the within-class scatter of the shots, of shape ``[d, d]``, so the metric gives little weight to directions
that vary within a class. It uses the shared covariance of Gaussian discriminant analysis (Wang et al., GDA-CLIP, ICLR
2024). The values are computed by kernel ridge regression (Bendou et al., ProKeR, CVPR 2025). Cross-validation on the
shots selects one of the combinations in :mod:`fit.forms`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import InputError, UsageError, counted
from retrieval_tip.fit.forms import DEFAULT_FORM, FORMS, ONE_SHOT, Form
from retrieval_tip.fit.scatter import FloatArray, Scatter
from retrieval_tip.fit.search_hp import Queries
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.keys import KEY_BLOCK
from retrieval_tip.retrieval.logits import slices
from retrieval_tip.retrieval.ridge import MOST_SOLVED, class_weights
from retrieval_tip.retrieval.segments import Keys, KeysInPlace
from retrieval_tip.retrieval.vector_index import inner_factory
from retrieval_tip.settings import Fitted, MetricName, Settings, ValuesName, check_choice
from retrieval_tip.store.labels import images_of
from retrieval_tip.store.sums import Sums

IntArray = npt.NDArray[np.int64]

FOLDS, MOST_FOLDS = 4, 8
"""Number of folds to select a form, and to evaluate the selected form if there are few keys."""
CHOSEN_ON, CHOSEN_SHOTS, JUDGED = 2048, 32, 4096
"""To select a form, maximum number of keys and of keys per class. To evaluate it, maximum number of photos."""
LEAST_SHOTS = 3
"""Minimum number of photos per class to select a form. With two photos, each fold would be fitted to only one."""
AFFINITIES = 1 << 28
"""Maximum number of affinities to evaluate the selected form if there are very many keys."""
LEAST_OF_A_FOLD = 0.1
"""Smallest fraction of another fold to evaluate. Below it, solving the values for the fold is not worthwhile."""
LEAST_JUDGED = 8
"""Minimum number of held-out photos to select a form."""
CLASS_FOLDS = 4
"""Number of folds of whole classes, if some classes have text but no shots."""
WEAKEST = 5
"""Maximum number of classes with mistakes to list after a fit."""
OFFSETS = (None, 0.1, 0.05)
"""Offsets of the logarithm of the cache to try with solved values. ``None`` means no logarithm."""
UNLIKE = 0.05
"""Fraction of the held-out shots that are ``unlike``, which sets the threshold."""
LONG, GROWN = 1.1, 5.0
"""Norm of keys above which a fit logs a warning, and largest beta (norm^2 - 1) of a form that has no metric. If it is
larger, the weights exp(beta (A - 1)) outgrow any ridge.
"""
LEAST_NORM = 1e-9
"""Minimum norm of the longest key. torch normalises shorter vectors to 0."""
STEPS, REACH = 60, 4.0
"""Maximum number of Newton steps, and bound on the logarithms for logits of unit spread."""
ONE_SHOT_ALPHA, ONE_SHOT_MOST, ONE_SHOT_ALONE, ONE_SHOT_DOUBT = 13.0, 50.0, 70.0, 25
"""Cache weight for one shot per class, where no shot can be held out. The constants are the weight for well-calibrated
text, the upper bound for any text, and the weight if there is no text. They were selected on CLIP features of four
datasets (where 12 to 18 work equally well) and one weak text encoder. The last constant says how many photos the
backbone's own temperature is worth.
"""


class Judged(TypedDict, total=False):
    """Accuracies of a form on held-out photos, as fields of :class:`FormChoice`."""

    photos: float | None
    words: float | None
    both: float | None
    weakest: Sequence[tuple[str, int, int]]


class Shots(Protocol):
    """Anything that can be fitted: a :class:`CacheModel`, or an index that reads its keys in place."""

    labels: pa.Table
    class_ids: Tensor
    class_names: list[str]
    text_weights: Tensor
    settings: Settings
    provenance: dict[str, Any]
    sums: Sums | None
    curve: pa.Table | None

    @property
    def fitted(self) -> Fitted | None:
        """Record of the previous fit."""

    @property
    def keys(self) -> Keys:
        """The keys as an array of shape ``[n, d]``, grouped by class."""

    @property
    def n(self) -> int:
        """Number of keys."""

    @property
    def segments(self) -> int:
        """Number of segments."""

    @property
    def index_type(self) -> str:
        """The FAISS factory string of the index."""

    @property
    def has_text(self) -> bool:
        """Whether the index has text weights."""

    def set_fitted(
        self, metric: tip.Metric | None, values: Tensor | None, fitted: Fitted | None, factory: str | None = None
    ) -> None:
        """See :meth:`cache_model.KeyEdits.set_fitted`."""


@dataclass(frozen=True)
class Blend:
    """Weights that maximise the likelihood of ``softmax(a text + b cache + g discriminant)`` on held-out photos.

    The weight of a term that does not exist is 0. ``losses`` are in nats, ``right`` marks correct answers, and
    ``weights`` are the query weights, which have mean 1. All three have shape ``[q]``.
    """

    a: float
    b: float
    g: float
    losses: Tensor
    right: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float((self.weights * self.losses).mean())

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return float((self.weights * self.right).mean())

    def settings(self, settings: Settings, beta: float) -> Settings:
        """Return the settings of this blend: ``alpha = b / a``, ``gamma = g / a`` and ``temperature = 1 / a``."""
        unit = self.a or 1.0
        return replace(settings, alpha=self.b / unit, beta=beta, gamma=self.g / unit, temperature=1 / unit)


def blend(
    text: Tensor | None, cache: Tensor, discriminant: Tensor | None, ids: Tensor, weights: Tensor | None = None
) -> Blend:
    """Fit the weights of terms of shape ``[q, c]`` to queries that have the class ``ids``.

    Newton's method minimises the cross-entropy of ``softmax(a text + b cache + g discriminant)``, which is convex in
    ``a, b, g >= 0``, in terms of their logarithms. ``weights`` are query weights of mean 1. As in Platt scaling (1999),
    the target of the correct class is ``(q + 1) / (q + 2)``, and the other classes share the rest. This keeps the
    factors finite even if all answers are right.
    """
    q, c = cache.shape
    if weights is None:
        weights = torch.ones(q, dtype=torch.float64)
    terms = (text, cache, discriminant)
    parts = torch.stack([part.double() for part in terms if part is not None])
    parts -= parts.mean(2, keepdim=True)
    scales = parts.flatten(1).std(1).clamp_min(1e-12)
    parts /= scales[:, None, None]
    smoothed = torch.full_like(parts[0], 1 / ((q + 2) * max(c - 1, 1))).scatter_(1, ids[:, None], (q + 1) / (q + 2))

    def at(logs: Tensor) -> tuple[Tensor, float]:
        chances = torch.tensordot(logs.exp(), parts, 1).log_softmax(1)
        return chances, -float((weights[:, None] * smoothed * chances).sum() / q)

    logs = torch.zeros(len(parts), dtype=torch.float64)
    chances, loss = at(logs)
    for _ in range(STEPS):
        p, factors = chances.exp(), logs.exp()
        weighted = weights[:, None] * p
        gradient = (weights[:, None] * (p - smoothed) * parts).sum((1, 2)) / q * factors
        means = (p * parts).sum(2)
        curvature = torch.einsum("iqc,jqc->ij", weighted * parts, parts) - (weights * means) @ means.T
        curvature = curvature / q * factors[:, None] * factors + torch.diag(gradient.clamp_min(0) + 1e-9)
        step, size = torch.linalg.solve(curvature, gradient).clamp(-2, 2), 1.0
        while True:
            following = (logs - size * step).clamp(-REACH, REACH)
            new_chances, new_loss = at(following)
            if new_loss <= loss or size < 1e-3:
                break
            size /= 2
        done = loss - new_loss < 1e-7
        if new_loss <= loss:
            logs, chances, loss = following, new_chances, new_loss
        if done:
            break
    found = iter((logs.exp() / scales).tolist())
    a, b, g = (0.0 if part is None else next(found) for part in terms)
    losses = -chances.gather(1, ids[:, None])[:, 0]
    return Blend(a, b, g, losses, chances.argmax(1) == ids, weights)


@dataclass(frozen=True)
class Held:
    """Held-out queries, for an index over the other ``rows``.

    The ``features`` have shape ``[q, d]`` and the class ``ids`` have shape ``[q]``. If ``of_classes`` is true, all keys
    of these classes are held out.
    """

    features: Tensor
    ids: Tensor
    rows: Tensor
    of_classes: bool = False


@dataclass
class Folds:
    """Keys and their class ``ids``, scaled ``text`` weights of shape ``[c, d]``, and held-out queries."""

    keys: Keys
    ids: Tensor
    c: int
    text: Tensor | None
    held: Sequence[Held]
    sums: Sums | None = None
    even: bool = True
    prior: FloatArray | None = None
    _scatters: dict[int | None, Scatter] = field(default_factory=dict)

    @classmethod
    def of_shots(
        cls, keys: Keys, ids: IntArray, c: int, text: Tensor | None, images: IntArray, number: int, judged: int,
        sums: Sums | None = None, prior: FloatArray | None = None,
    ) -> Folds:  # fmt: skip
        """Split the images into up to ``number`` folds, and hold out about ``judged`` of them.

        All views of a held-out image are held out.
        """
        folds, first = _folds(images, ids, number)
        held = list(_held(keys, ids, folds[first], first, images, judged))
        return cls(keys, torch.from_numpy(ids), c, text, held, sums, prior=prior)

    def with_classes(self, images: IntArray, judged: int) -> Folds:
        """Also hold out whole classes, if some classes have text but no shots.

        A held-out class resembles a class that has no shots, because it can only be recognised by its text. Its photos
        are weighted as described in :attr:`weights`.
        """
        ids = self.ids.numpy()
        own = np.unique(ids)
        if not self.held or self.covered == 1 or len(own) < CLASS_FOLDS:
            return self
        fold_of = np.zeros(self.c, dtype=np.int64)
        fold_of[np.random.default_rng(0).permutation(own)] = np.arange(len(own)) % CLASS_FOLDS
        _, first = np.unique(images, return_index=True)
        whole = _held(self.keys, ids, fold_of[ids[first]], first, fold_of[ids], judged)
        held = [*self.held, *(replace(one, of_classes=True) for one in whole)]
        return replace(self, held=held)

    @property
    def without_shots(self) -> int:
        """Number of classes that have no shots."""
        return self.c - len(self.ids.unique())

    @property
    def covered(self) -> float:
        """Fraction of the classes that have shots or queries, or 1 if there is no text."""
        ids = torch.cat([self.ids, *(held.ids for held in self.held)])
        return 1.0 if self.text is None else len(ids.unique()) / self.c

    @property
    def halves(self) -> bool:
        """Whether only about half of the shots remain in a fold. Their cache logits differ from those of all shots."""
        return any(len(held.rows) < 0.6 * len(self.ids) for held in self.held if not held.of_classes)

    @property
    def of_classes(self) -> Tensor:
        """Whether the whole class of each query is held out."""
        return torch.cat([torch.full((len(held.ids),), held.of_classes) for held in self.held])

    @property
    def weights(self) -> Tensor | None:
        """Query weights of mean 1, or ``None`` if all queries have equal weight.

        If ``even`` is true, all classes have equal weight, regardless of their number of shots. Queries of held-out
        classes are weighted by the fraction of classes that have no shots.
        """
        whole, ids = self.of_classes, torch.cat([held.ids for held in self.held])
        weights = torch.ones(len(ids), dtype=torch.float64)
        if self.even:
            weights = class_weights(torch.bincount(self.ids, minlength=self.c))[ids].double()
        if whole.any():
            shares = torch.where(whole, 1 - self.covered, self.covered)
            weights *= shares / torch.where(whole, weights[whole].sum(), weights[~whole].sum())
        return None if (weights == 1).all() else weights / weights.mean()

    @property
    def n(self) -> int:
        """Number of held-out photos, excluding held-out classes."""
        return sum(len(held.ids) for held in self.held if not held.of_classes)

    @property
    def can_judge(self) -> bool:
        """Whether there are enough held-out photos to evaluate a form."""
        return self.n >= LEAST_JUDGED and self.c > 1

    def scatter(self, rows: Tensor) -> Scatter:
        """Return the scatter of some of the keys."""
        if len(rows) < self.keys.shape[1] and self.prior is None:
            return Scatter.of_few(*self.taken(rows), self.c)
        every = np.arange(len(self.ids))
        if self.sums is None:
            self.sums = self._sums_of(every)
        others = np.delete(every, rows.numpy())
        return Scatter.of(self.sums - self._sums_of(others) if len(others) else self.sums, self.prior)

    def taken(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of the keys as float32, and their class ids."""
        return _taken(self.keys, rows), self.ids[rows]

    def _sums_of(self, rows: IntArray) -> Sums:
        ids = self.ids.numpy()
        blocks = ((keys, ids[part]) for keys, part in _blocks(self.keys, rows))
        return Sums.of(blocks, self.c, self.keys.shape[1])

    def judge(self, form: Form) -> Blend:
        """Fit a form to all shots except each fold in turn, and return the blend on these folds."""
        return blend(*self.terms(form), self.ids_held, self.weights)

    def terms(self, form: Form) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Fit a form to the other photos. Return text logits, cache logits and the discriminant of held-out photos.

        If some classes have no shots, there is no discriminant, because it cannot compare them with the other classes.
        """
        cache, discriminant = (
            torch.cat(parts)
            for parts in zip(*(self._answers(form, held, fold) for fold, held in enumerate(self.held)), strict=True)
        )
        features = torch.cat([held.features for held in self.held])
        text = None if self.text is None else tip.affinity(features, self.text)
        return text, cache, discriminant if self.covered == 1 else None

    @property
    def ids_held(self) -> Tensor:
        """Class ids of the held-out queries."""
        return torch.cat([held.ids for held in self.held])

    def fitted(self, form: Form, rows: Tensor, fold: int | None = None) -> tuple[tip.Metric | None, Tensor | None]:
        """Fit the metric and the values of a form to ``rows`` of the keys, or to all keys outside a ``fold``."""
        metric = None
        if form.metric is not None:
            if fold not in self._scatters:
                self._scatters[fold] = self.scatter(rows)
            metric = form.metric.fit(self._scatters[fold])
        if form.values is None:
            return metric, None
        keys, ids = self.taken(rows)
        return metric, form.values.fit(keys if metric is None else metric(keys), ids, self.c, form.beta)

    def _answers(self, form: Form, held: Held, fold: int) -> tuple[Tensor, Tensor]:
        """Return the cache logits and the discriminant of held-out photos, from an index over the other keys."""
        metric, values = self.fitted(form, held.rows, fold)
        queries = held.features if metric is None else metric(held.features)
        cache, sums = torch.zeros(len(queries), self.c), torch.zeros(self.c, queries.shape[1], dtype=torch.float64)
        start = 0
        for block, rows in _blocks(self.keys, held.rows.numpy()):  # very many if values are one-hot
            keys = torch.from_numpy(np.array(block, dtype=np.float32))
            points, ids = keys if metric is None else metric(keys), self.ids[torch.from_numpy(rows)]
            own = None if values is None else tip.Values(values[start : start + len(rows)])
            cache += tip.cache_logits(tip.affinity(queries, points), ids, self.c, form.beta, values=own)
            tip.add_rows(sums, ids, points.double())
            start += len(rows)
        counts = torch.bincount(self.ids[held.rows], minlength=self.c)
        return cache, tip.Discriminant.of(sums.float(), counts.float())(queries)


@dataclass(frozen=True)
class FormTrial:
    """A form that was tried, its mean cross-entropy in nats, and its accuracy."""

    form: Form
    loss: float
    accuracy: float


@dataclass(frozen=True)
class FormChoice:
    """The selected form, and its accuracy on ``n`` held-out photos.

    ``photos``, ``words`` and ``both`` are the accuracies of the cache, the text and the blend. ``words`` is ``None`` if
    there is no text. All three are ``None`` if no photo could be held out. ``weakest`` lists classes with mistakes,
    least accurate first, with their numbers of correct answers and of held-out photos. ``longest`` is the largest norm
    of a key. ``without_shots`` is the number of classes that have text but no shots.
    """

    form: Form
    trials: Sequence[FormTrial]
    judged_on: str
    n: int
    folds: int
    seconds: float
    photos: float | None = None
    words: float | None = None
    both: float | None = None
    weakest: Sequence[tuple[str, int, int]] = ()
    longest: float | None = None
    without_shots: int = 0

    def __str__(self) -> str:
        without = f"{counted(self.without_shots, 'class', 'has', 'have')} a name but no photos"
        if self.photos is None or self.both is None:
            reason = "no photo can be held out with one photo per class, or with a single class"
            return f"Accuracy not estimated: {reason}" + (f"; {without}" if self.without_shots else "")
        parts = [self.judged_on, *([without] if self.without_shots else [])]
        if self.words is not None:
            parts += [f"photos alone {100 * self.photos:.1f} %, class names alone {100 * self.words:.1f} %"]
        return f"Estimated accuracy: {100 * self.both:.1f} % ({'; '.join(parts)})"

    @property
    def warnings(self) -> Iterator[str]:
        """Weaknesses of the fit that the user should know about."""
        if self.words is not None and self.photos is not None and self.both is not None and self.photos > self.both:
            yield (
                f"class names do not help: photos alone {100 * self.photos:.1f} %, with class names "
                f"{100 * self.both:.1f} %; the fit gives them little weight"
            )
        if self.longest is not None and self.longest > LONG:
            yield (
                f"keys have norms up to {self.longest:.4g}; classify features of the same norms (norms keep), because "
                "photos and features of norm 1 get wrong answers"
            )

    def provenance(self) -> dict[str, object]:
        """Return the record for the manifest."""
        parts = {"photos": self.photos, "words": self.words, "both": self.both}
        return {
            "summary": str(self),
            "form": str(self.form),
            "judged_on": self.judged_on,
            "queries": self.n,
            "folds": self.folds,
            **{name: None if part is None else round(part, 6) for name, part in parts.items()},
            "weakest": [list(one) for one in self.weakest],
            "trials": [[str(trial.form), round(trial.loss, 6), round(trial.accuracy, 6)] for trial in self.trials],
        }


def fit(
    cache: Shots, *, metric: MetricName | None = None, values: ValuesName | None = None,
    validation: Queries | None = None, factory: str | None = None, forms: Sequence[Form] = FORMS,
) -> FormChoice:  # fmt: skip
    """Fit the metric, the values, alpha, beta and the temperature of an index to its own shots.

    The form is selected by cross-validation on the shots (all views of a photo are in the same fold), or on
    ``validation`` images. The first form is kept unless another form is at least as accurate and lowers the
    cross-entropy by more than two standard errors of the difference. This prevents overfitting when there are few
    shots. Classes that have a single photo are used to fit but not to evaluate. If every class has a single photo,
    nothing can be evaluated, so predetermined settings are used. The temperature is determined by the :func:`blend`.

    Args:
        cache: the index, which must have a single segment. Its current metric and values are ignored.
        metric: the kind of metric. By default, it is selected on the shots.
        values: the kind of values. By default, they are selected on the shots. One-hot values are used if there are
            more than :data:`MOST_SOLVED` keys, or if the index retrieves only ``k`` keys, because solved values need
            all keys.
        validation: the queries to evaluate on instead of the shots.
        factory: the type of the index over the fitted keys. Defaults to the current type.
        forms: the forms to select from.

    Raises:
        UsageError: if the metric or the values are unknown, or if this index cannot have solved values.
        InputError: if the index is fine-tuned or has several segments, or if its keys are too long or too short.
    """
    start = time.perf_counter()
    longest = _longest(cache)
    by_class = inner_factory(factory or cache.index_type) is not None
    forms = _forms(cache, forms, metric, values, longest, by_class=by_class)
    if cache.curve is not None:
        raise InputError("fit: the keys of this index were fine-tuned; fit the index before fine-tuning")
    if cache.segments > 1:
        raise InputError("fit: the index has several segments; compact it first")
    images = images_of(cache.labels)
    folds, judged_on = _judged_by(cache, validation, images)
    if folds.can_judge:
        form, trials = _chosen(cache, forms, folds, images if validation is None else None)
        settings, judged = _settled(cache.settings, form, folds, cache.class_names)
        where = f"fitted on {judged_on}"
    else:
        (form, settings), trials, judged = _unjudged(cache, forms, folds.covered), [], {}
        where = "default for shots that cannot be held out"
    fitted_metric, fitted_values = folds.fitted(form, torch.arange(len(folds.ids)))
    fitted = (form if fitted_metric is not None else replace(form, metric=None)).fitted(cache.n)
    n, seconds = folds.n if folds.can_judge else 0, time.perf_counter() - start
    choice = FormChoice(
        form, trials, judged_on, n, len(folds.held), seconds, longest=longest,
        without_shots=folds.without_shots, **judged,
    )  # fmt: skip
    provenance = dict.fromkeys(("alpha", "beta", "temperature"), where) | {"fit": choice.provenance()}
    cache.set_fitted(fitted_metric, fitted_values, fitted, factory)
    cache.sums = folds.sums
    cache.settings, cache.provenance = settings, cache.provenance | provenance
    return choice


def refit(cache: Shots, beta: float) -> FormChoice:
    """Refit alpha, the temperature and the threshold of ``unlike`` for another beta, without changing the form.

    If there are too few shots, only beta changes. The values are not solved for the new beta, so call
    :meth:`cache_model.KeyEdits.solve` next.
    """
    start, settings, form = time.perf_counter(), replace(cache.settings, beta=beta), Form.of(cache.fitted, beta)
    folds, judged_on = _judged_by(cache, None, images_of(cache.labels))
    judged: Judged = {}
    if folds.can_judge:
        settings, judged = _settled(settings, form, folds, cache.class_names)
        cache.provenance = cache.provenance | dict.fromkeys(("alpha", "temperature"), f"fitted on {judged_on}")
    choice = FormChoice(
        form, [], judged_on, folds.n, len(folds.held), time.perf_counter() - start,
        without_shots=folds.without_shots, **judged,
    )  # fmt: skip
    cache.settings = settings
    cache.provenance = cache.provenance | {"fit": choice.provenance()}
    return choice


def estimate(cache: CacheModel) -> Judged:
    """Estimate the accuracy of an index on folds of its own shots. The index does not change.

    The metric and the values are refitted for each fold, but alpha, beta and the temperature are not.

    Returns the accuracies of the cache (``photos``), the text (``words``) and the blend (``both``). ``words`` is
    ``None`` if there is no text. All are ``None`` if the keys were fine-tuned, or if too few shots can be held out.
    """
    settings, (folds, _) = cache.settings, _judged_by(cache, None, images_of(cache.labels))
    if cache.curve is not None or not folds.can_judge:
        return {"photos": None, "words": None, "both": None}
    text, photos, discriminant = folds.terms(Form.of(cache.fitted, settings.beta))
    linked = tip.log_cache(photos, settings.log_offset)
    terms = tip.Terms(torch.zeros_like(photos) if text is None else text, linked, discriminant)
    ids = folds.ids_held
    right = terms.logits(settings).argmax(1) == ids
    return _accuracies(terms.photos(settings), text, right, ids, folds.weights)


def _accuracies(photos: Tensor, words: Tensor | None, right: Tensor, ids: Tensor, weights: Tensor | None) -> Judged:
    def accuracy(right: Tensor) -> float:
        return float((right.double() if weights is None else weights * right).mean())

    return {
        "photos": accuracy(photos.argmax(1) == ids),
        "words": None if words is None else accuracy(words.argmax(1) == ids),
        "both": accuracy(right),
    }


def unfitted(cache: CacheModel) -> CacheModel:
    """Return a new index over the same keys that has no metric, one-hot values, and untouched alpha and beta."""
    if cache.fitted is None:
        return cache
    other = copy.copy(cache)
    other.set_fitted(None, None, None)
    alpha, beta = untouched_settings(other.keys, other.class_ids.cpu().numpy())
    other.settings = replace(other.settings.unfitted(), alpha=alpha, beta=beta, temperature=1.0)
    kept = {name: part for name, part in cache.provenance.items() if name not in ("fit", "temperature")}
    other.provenance = kept | {"alpha": "default, normalize both", "beta": "default, normalize both"}
    return other


def _longest(cache: Shots) -> float:
    """Return the largest norm in a sample of the keys. Raises InputError if it is too small for float32."""
    rows = torch.linspace(0, cache.n - 1, min(cache.n, JUDGED), dtype=torch.float64).long()
    longest = float(torch.linalg.vector_norm(_taken(cache.keys, rows).double(), dim=1).max())
    if 0 < longest < LEAST_NORM:
        raise InputError(
            f"keys: norms of at most {longest:.4g} are too small for float32; scale them to norm 1 (norms unit)"
        )
    return longest


def _forms(
    cache: Shots, forms: Sequence[Form], metric: MetricName | None, values: ValuesName | None, longest: float, *,
    by_class: bool,
) -> list[Form]:  # fmt: skip
    """Return the possible forms. Raises InputError if the keys are too long for every form."""
    for name, given, known in (("metric", metric, MetricName), ("values", values, ValuesName)):
        if given is not None:
            check_choice(name, given, known)
    if cache.settings.k is not None or by_class or cache.n > MOST_SOLVED:
        if values == "solved":
            raise UsageError(
                f"values solved: need a search over all keys, at most {MOST_SOLVED:,}, but the index has {cache.n:,} "
                f"and k {cache.settings.k or 'all'}; give values one-hot"
            )
        values = "one-hot"
    forms = [form for form in forms if metric in (None, form.metric_name) and values in (None, form.values_name)]
    grown = longest**2 - 1
    forms = [form for form in forms if form.metric is not None or form.beta * grown <= GROWN]
    if values is None:  # one-hot values are only needed if a query uses some of the keys
        forms = [form for form in forms if form.values is not None] or forms
    if not forms:
        raise InputError(f"metric none: keys have norms up to {longest:.4g} instead of 1; give norms unit")
    return forms


def _judged_by(cache: Shots, validation: Queries | None, images: IntArray) -> tuple[Folds, str]:
    ids, c = cache.class_ids.cpu(), len(cache.class_names)
    text = cache.text_weights.cpu() * cache.settings.logit_scale if cache.has_text else None
    if validation is not None:
        held = Held(torch.from_numpy(validation.features), torch.from_numpy(validation.ids), torch.arange(cache.n))
        folds = Folds(cache.keys, ids, c, text, [held], cache.sums, even=False).with_classes(images, JUDGED)
        return folds, f"{len(held.ids):,} photos of {validation.name}"
    number, judged = MOST_FOLDS if cache.n <= JUDGED else FOLDS, int(min(JUDGED, max(256, AFFINITIES / cache.n)))
    folds = Folds.of_shots(cache.keys, ids.numpy(), c, text, images, number, judged, cache.sums)
    folds = folds.with_classes(images, judged)
    return folds, f"{folds.n:,} photos, each held out in turn"


def _chosen(cache: Shots, forms: Sequence[Form], folds: Folds, images: IntArray | None) -> tuple[Form, list[FormTrial]]:
    """Return the selected form and the forms that were tried, if there are enough shots to select one."""
    if len(forms) == 1 or (images is not None and len(np.unique(images)) < LEAST_SHOTS * len(folds.ids.unique())):
        return forms[0], []
    if images is not None:
        folds = _sample(cache.keys, folds.ids.numpy(), folds.c, folds.text, images)
    return _choose(folds, forms)


def _settled(settings: Settings, form: Form, folds: Folds, class_names: Sequence[str]) -> tuple[Settings, Judged]:
    """Return the settings that give the held-out photos the highest log-likelihood, and their accuracies."""
    (text, cache, discriminant), ids, weights = folds.terms(form), folds.ids_held, folds.weights
    offsets = OFFSETS if form.values is not None and not folds.of_classes.any() else (None,)
    blended, offset = _linked(text, cache, discriminant, ids, offsets, weights)
    if not folds.of_classes.any() and folds.covered < 1:  # too few classes to hold some out
        blended = replace(blended, a=1.0, b=blended.b / max(blended.a, 1.0) * folds.covered)
    least: float | None = None
    if not folds.halves:
        if form.values is None:  # one-hot values sum over the keys of a class, and a fold contains fewer keys
            share = torch.cat([torch.full((len(held.ids),), len(held.rows) / len(folds.ids)) for held in folds.held])
            cache = cache / share[:, None]
        least = _quantile(tip.log_cache(cache, offset).amax(1), UNLIKE, weights)
    settings = replace(blended.settings(settings.unfitted(), form.beta), least_cache=least, log_offset=offset)
    shown = ~folds.of_classes
    judged: Judged = {"weakest": _weakest(class_names, blended.right[shown], ids[shown])}
    photos = tip.Terms(cache, tip.log_cache(cache, offset), discriminant).photos(settings)
    return settings, judged | _accuracies(photos, text, blended.right, ids, weights)


def _linked(
    text: Tensor | None, cache: Tensor, discriminant: Tensor | None, ids: Tensor, offsets: Sequence[float | None],
    weights: Tensor | None = None,
) -> tuple[Blend, float | None]:  # fmt: skip
    """Return the best blend with the cache or its logarithm, and the offset of the logarithm."""
    blends = [
        (blend(text, tip.log_cache(cache.clone(), offset), discriminant, ids, weights), offset) for offset in offsets
    ]
    return min(blends, key=lambda pair: pair[0].loss)


def _quantile(values: Tensor, share: float, weights: Tensor | None) -> float:
    if weights is None:
        return float(values.quantile(share))
    values, order = values.sort()
    return float(values[torch.searchsorted(weights[order].cumsum(0), share * len(values)).clamp_max(len(values) - 1)])


def _weakest(class_names: Sequence[str], right: Tensor, ids: Tensor) -> list[tuple[str, int, int]]:
    """Return the classes with mistakes, least accurate first, with the numbers of correct answers and photos."""
    held, correct = (torch.bincount(part, minlength=len(class_names)) for part in (ids, ids[right]))
    missed = torch.nonzero(held > correct)[:, 0].tolist()
    missed.sort(key=lambda c: (int(correct[c]) / int(held[c]), -int(held[c])))
    return [(class_names[c], int(correct[c]), int(held[c])) for c in missed[:WEAKEST]]


def _unjudged(cache: Shots, forms: Sequence[Form], covered: float) -> tuple[Form, Settings]:
    """Return the form and the settings for shots that cannot be held out.

    The text weights do not depend on the shots, so their temperature T can still be fitted to the shots. If the text is
    overconfident (T > 1), the cache gets T^2 times as much weight: ``softmax(text / T + 13 T^2 cache)``. This weight is
    multiplied by ``covered``, the fraction of classes that have shots.
    """
    if all(form.values is None for form in forms):
        alpha, beta = untouched_settings(cache.keys, cache.class_ids.cpu().numpy())
        alpha *= covered
        return Form(None, None, beta), replace(cache.settings.unfitted(), alpha=alpha, beta=beta, temperature=1.0)
    form = replace(ONE_SHOT, metric=None if any(form.metric is None for form in forms) else DEFAULT_FORM.metric)
    temperature = 1.0
    if cache.has_text and len(cache.class_names) > 1:
        rows = torch.arange(min(cache.n, JUDGED))
        keys = torch.nn.functional.normalize(_taken(cache.keys, rows))
        text = tip.text_logits(keys, cache.text_weights.cpu(), cache.settings.logit_scale)
        trusted = len(rows) / (len(rows) + ONE_SHOT_DOUBT)
        temperature = blend(None, text, None, cache.class_ids.cpu()[rows]).b ** -trusted
    photos = ONE_SHOT_ALPHA * max(1.0, temperature) ** 2 if cache.has_text else ONE_SHOT_ALONE
    alpha = photos * temperature * covered
    temperature *= max(1.0, photos / ONE_SHOT_MOST) if cache.has_text else 1.0
    return form, replace(cache.settings.unfitted(), alpha=alpha, beta=form.beta, temperature=temperature)


def _sample(keys: Keys, ids: IntArray, c: int, text: Tensor | None, images: IntArray) -> Folds:
    """Return folds of a sample of the keys."""
    if len(ids) > CHOSEN_ON:
        draw = np.random.default_rng(0)
        few = np.flatnonzero(_ranks(ids, draw) < CHOSEN_SHOTS)
        counts = np.bincount(ids[few], minlength=c)
        classes = draw.permutation(c)
        classes = np.sort(classes[: max(2, int(np.searchsorted(np.cumsum(counts[classes]), CHOSEN_ON, "right")))])
        rows = few[np.isin(ids[few], classes)]
        keys, images, text = np.asarray(keys[rows]), images[rows], None if text is None else text[classes]
        ids, c = np.searchsorted(classes, ids[rows]), len(classes)
    return Folds.of_shots(keys, ids, c, text, images, FOLDS, len(ids)).with_classes(images, len(ids))


def _choose(folds: Folds, forms: Sequence[Form]) -> tuple[Form, list[FormTrial]]:
    """Return the first form, or the best form that is significantly better, and all trials."""
    stands = folds.judge(forms[0])
    best, trials = (forms[0], stands.loss), []
    for form in forms:
        judged = stands if form is forms[0] else folds.judge(form)
        loss, more = judged.loss, stands.weights * (stands.losses - judged.losses)
        trials.append(FormTrial(form, loss, judged.accuracy))
        sure = float(more.mean()) > 2 * float(more.std()) / len(more) ** 0.5
        if sure and judged.accuracy >= stands.accuracy and loss < best[1]:
            best = form, loss
    return best[0], trials


def _ranks(ids: IntArray, draw: np.random.Generator) -> IntArray:
    """Return the rank of each item within its class, in random order."""
    order = draw.permutation(len(ids))
    order = order[np.argsort(ids[order], kind="stable")]
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[order] = np.arange(len(ids)) - np.searchsorted(ids[order], ids[order])
    return ranks


def _held(keys: Keys, ids: IntArray, folds: IntArray, first: IntArray, groups: IntArray, judged: int) -> Iterator[Held]:
    """Yield about ``judged`` held-out queries, one fold at a time. The index excludes all ``groups`` of a fold."""
    begun = False
    for fold in range(folds.max(initial=-1) + 1):
        asked = first[folds == fold]
        if judged < len(asked) * (LEAST_OF_A_FOLD if begun else 0) or judged <= 0:
            return
        if len(asked) > judged:
            asked = np.sort(np.random.default_rng(fold).choice(asked, judged, replace=False))
        rows = torch.from_numpy(np.flatnonzero(~np.isin(groups, groups[asked])))
        yield Held(_taken(keys, torch.from_numpy(asked)), torch.from_numpy(ids[asked]), rows)
        judged, begun = judged - len(asked), True


def _blocks(keys: Keys, rows: IntArray) -> Iterator[tuple[npt.NDArray[Any], IntArray]]:
    """Yield some of the keys and their rows in blocks, in order unless the keys are read in place."""
    if isinstance(keys, KeysInPlace):
        return keys.blocks(rows)
    parts = (rows[part] for part in slices(len(rows), KEY_BLOCK))
    return ((np.asarray(keys[part]), part) for part in parts)


def _taken(keys: Keys, rows: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(keys[rows.numpy()], dtype=np.float32))


def _folds(images: IntArray, ids: IntArray, number: int) -> tuple[IntArray, IntArray]:
    """Return the fold of each key, or -1 if the key is never held out, and the first key of each image."""
    _, first, image = np.unique(images, return_index=True, return_inverse=True)
    own = ids[first]
    counts = np.bincount(own)
    several = counts[own] > 1
    if not several.any():
        return np.full(len(ids), -1), first
    ranks = _ranks(own, np.random.default_rng(0))
    folds = np.where(several, ranks % min(number, int(np.median(counts[counts > 1]))), -1)
    return folds[image], first
