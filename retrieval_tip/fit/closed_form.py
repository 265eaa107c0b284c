"""Fit the metric and the values of an index to its shots in closed form, which takes seconds.

The fit fills three parts of the formula in :mod:`tip`::

    metric         phi(x) = unit((x - m) T),   T T^T = ((1 - s) S + s tr(S) / d I)^-1
    values         V = (G + lambda I)^-1 Y,    G = exp(-beta (1 - phi(K) phi(K)^T))
    discriminant   B = phi(f) M^T + b          (see :class:`tip.Discriminant`)

``S`` is the within-class scatter of the shots, of shape ``[d, d]``, so the metric gives little weight to directions
that vary within a class. Metric and discriminant are Gaussian discriminant analysis with a shared covariance (Wang et
al., GDA-CLIP, ICLR 2024). The values are computed by kernel ridge regression (Bendou et al., ProKeR, CVPR 2025).
Cross-validation on the shots selects one of the combinations in :mod:`fit.forms` and all settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import BoolArray, DoubleArray
from retrieval_tip.backbones.base import equal_shares
from retrieval_tip.data.source import spread
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit.blend import Blend, HeldTerms
from retrieval_tip.fit.confidence import is_clear, wilson
from retrieval_tip.fit.folds import LEAST_JUDGED, Folds, Held, Order, ranks_within, taken_keys
from retrieval_tip.fit.forms import (
    DEFAULT_FORM,
    FORMS,
    ONE_SHOT,
    ONE_SHOT_WITH_PRIOR,
    PLAIN,
    WITH_PRIOR,
    Form,
)
from retrieval_tip.fit.scatter import dimensions
from retrieval_tip.fit.shares import Shares, shares_of, shares_without_folds
from retrieval_tip.fit.visible import Queries
from retrieval_tip.model import Index
from retrieval_tip.retrieval.conformal import Scores
from retrieval_tip.retrieval.defaults import untouched_settings
from retrieval_tip.retrieval.ridge import MOST_SOLVED
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.retrieval.vector_index import BY_CLASS
from retrieval_tip.settings import ClassPrior, MetricName, Settings, ValuesName, check_choice
from retrieval_tip.store.labels import PICKED, RANDOM
from retrieval_tip.wording import counted, span

FOLDS, MOST_FOLDS, FEW_KEYS = 4, 8, 1024
"""Number of folds to select a form, and to evaluate the selected form if there are at most this many keys."""
CHOSEN_ON, SHARED_ON, CHOSEN_SHOTS, JUDGED = 2048, 1024, 32, 4096
"""Maximum numbers of keys to select a form and to select shares, of keys per class, and of photos to evaluate."""
SPLITS, FEW_JUDGED = 3, 256
"""Number of times that photos are split to select shares, if at most this many of them are held out."""
LEAST_SHOTS = 3
"""Minimum number of photos per class to select a form. With two photos, each fold would be fitted to only one."""
AFFINITIES = 1 << 28
"""Maximum number of affinities to evaluate the selected form if there are very many keys."""
WEAKEST = 5
"""Maximum number of classes with mistakes to list after a fit."""
OFFSETS = (0.1, 0.05)
"""Offsets of the logarithm of the cache to try with solved values, besides no logarithm.

If a fold contains only half of the shots, the logarithm is always used, because it depends less on their number.
"""
LEARNING, DRAWN = 0.4, 2.0
"""Exponent of the learning curve ``error ~ shots^-0.4`` without text, and factor of the variance of an estimate, since
other shots would give another index. With text, errors fall more slowly, and the text weight is fitted to the same
photos, so estimates are not too low (benchmarks/estimates.py, seeds 100 to 103).
"""
SURER, LESS_SURE, BISECTIONS = 2.0, 16.0, 12
"""Largest factors by which a temperature is lowered and raised, and number of steps to find it.

benchmarks/accuracy.md (The estimate of a build) says on which photos the rule was chosen.
"""
EARLY = 4.0
"""Factor of the temperature of an index of ``label`` before a photo that was drawn at random can be held out.

Most photos then belong to classes that it does not know yet.
"""
UNLIKE = 0.05
"""Fraction of the held-out shots that have no match, which sets the threshold."""
LONG, GROWN = 1.1, 5.0
"""Norm of keys above which a fit logs a warning, and largest beta (norm^2 - 1) of a form that has no metric. If it is
larger, the weights exp(beta (A - 1)) outgrow any ridge.
"""
LEAST_NORM = 1e-9
"""Minimum norm of the longest key. torch normalises shorter vectors to 0."""
NO_SCORES = np.zeros((0, 3))
"""Rows of :class:`conformal.Scores` if no photo can be held out."""
ONE_SHOT_ALPHA, ONE_SHOT_MOST, ONE_SHOT_ALONE, ONE_SHOT_DOUBT = 13.0, 50.0, 70.0, 25
"""Cache weight for one shot per class, where no shot can be held out. The constants are the weight for well-calibrated
text, the upper bound for any text, and the weight if there is no text. They were selected on CLIP features of four
datasets (where 12 to 18 work equally well) and one weak text encoder. The last constant says how many photos the
backbone's own temperature is worth.
"""
PRIOR_ALPHA, PRIOR_GAMMA = 0.4, 0.5
"""Settings for one shot per class and a prior: alpha, as a fraction of the alpha without a prior, and gamma."""
PRIOR_ALONE, PRIOR_LEAST = 0.065, 20.0
"""Alpha for one shot per class and a prior without text, as a fraction of :func:`scatter.dimensions`, and its minimum.

With 50 classes, 0.052 to 0.074 is best for four encoders, on validation photos, held-out shots, and the test photos of
Caltech101.
"""


class FitRequest(NamedTuple):
    """A request for a fit.

    Attributes:
        metric: the kind of metric. By default, it is selected on the shots.
        values: the kind of values. By default, they are solved. Because solved values need all keys, they are one-hot
            if there are more than :data:`MOST_SOLVED` keys or if a query uses only some of the keys.
        class_prior: how frequent the classes are among future photos, either ``even`` or as in the ``shots``.
        prior: the within-class scatter of other photos, of shape ``[d, d]`` (see :func:`scatter.pooled`). It is kept
            for later fits. Defaults to the prior of the previous fit, or to the known prior of the backbone.
    """

    metric: MetricName | None = None
    values: ValuesName | None = None
    class_prior: ClassPrior = "even"
    prior: DoubleArray | None = None


@dataclass(frozen=True, kw_only=True)
class FormChoice:
    """A form of an index, and its accuracy on ``n`` held-out photos. ``trials`` are the forms that a fit has tried.

    - ``photos``, ``text`` and ``both`` are the accuracies of the shots, the text and the blend. They are ``None`` if
      no photo could be held out, and ``text`` also if there is no text.
    - ``interval`` is the 95 % confidence interval of ``both``.
    - ``names_hurt`` is true if the shots alone are significantly more accurate than the blend.
    - ``weakest`` lists classes with mistakes, least accurate first, with their numbers of correct answers and of
      held-out photos.
    - ``tested`` is the number of classes of the held-out photos, out of all ``classes`` that have photos.
    - ``single`` is the number of classes that have a single photo, which cannot be held out.
    - ``without_shots`` is the number of classes that have text but no shots.
    - ``halves`` is true if folds are classified with only about half of the shots.
    - ``longest`` is the largest norm of a key, if a fit has measured it.
    - ``guessed`` is true if there are several encoders, and no photo could be held out to choose their shares.
    """

    form: Form
    judged_on: str
    n: int
    tested: int
    classes: int
    single: int
    without_shots: int
    halves: bool
    photos: float | None = None
    text: float | None = None
    both: float | None = None
    interval: tuple[float, float] | None = None
    names_hurt: bool = False
    weakest: Sequence[tuple[str, int, int]] = ()
    trials: Sequence[tuple[Form, Blend]] = ()
    longest: float | None = None
    guessed: bool = False

    @classmethod
    def of(cls, folds: Folds, form: Form) -> FormChoice:
        """Return the choice of a form, without accuracies."""
        n = folds.n if folds.can_judge else 0
        classes = len(folds.ids.unique())
        return cls(
            form=form,
            judged_on=folds.judged_on,
            n=n,
            tested=folds.tested,
            classes=classes,
            single=folds.single,
            without_shots=folds.c - classes,
            halves=folds.halves,
            guessed=n == 0 and len(folds.parts) > 1,
        )

    def __str__(self) -> str:
        without = f"{counted(self.without_shots, 'class', 'has', 'have')} a name but no photos"
        if self.photos is None or self.both is None or self.interval is None:
            reasons = [self._why_not_estimated()]
            if self.without_shots:
                reasons.append(without)
            return f"Accuracy not estimated: {'; '.join(reasons)}"
        details = [f"95 % interval {span(self.interval)}", self.judged_on]
        if self.halves:
            details.append("extrapolated from one photo per class")
        if self.without_shots:
            details.append(without)
        if self.text is not None:
            photos = f"photos alone {100 * self.photos:.1f} %"
            details.append(f"{photos}, class names alone {100 * self.text:.1f} %")
        estimate = f"Estimated accuracy: {100 * self.both:.1f} % ({'; '.join(details)})"
        if self.tested < self.classes:
            return f"{self._tested_classes().capitalize()}. {estimate}"
        return estimate

    def _why_not_estimated(self) -> str:
        if self.classes == 1:
            return "only one class has photos"
        if self.single == self.classes:
            return "each class has one photo"
        if self.tested > 1:
            return f"fewer than {LEAST_JUDGED} photos can be held out"
        return self._tested_classes()

    def _tested_classes(self) -> str:
        tested = f"only {self.tested:,} of {counted(self.classes, 'class')} could be tested"
        if not self.single:
            return tested
        have = "has" if self.single == 1 else "have"
        return f"{tested} ({self.single:,} {have} one photo)"

    @property
    def warnings(self) -> Iterator[str]:
        """Weaknesses of the fit that the user should know about."""
        if self.names_hurt and self.photos is not None and self.both is not None:
            yield (
                f"class names do not help: photos alone {100 * self.photos:.1f} %, with class names "
                f"{100 * self.both:.1f} %; the fit gives them little weight"
            )
        if self.guessed:
            yield (
                "the shares of the encoders were not judged, because too few photos can be held out: the one that is "
                "named first decides, and another counts if it finds the same classes alike; add photos"
            )
        if self.longest is not None and self.longest > LONG:
            yield (
                f"keys have norms up to {self.longest:.4g}; classify features of the same norms (norms keep), because "
                "photos and features of norm 1 get wrong answers"
            )

    def provenance(self) -> dict[str, object]:
        """Return the record for the manifest."""
        accuracies = {"photos": self.photos, "words": self.text, "both": self.both}
        interval = None
        if self.interval is not None:
            interval = [round(end, 6) for end in self.interval]
        return {
            "summary": str(self),
            "form": str(self.form),
            "tested": self.tested,
            "classes": self.classes,
            **{
                name: None if accuracy is None else round(accuracy, 6)
                for name, accuracy in accuracies.items()
            },
            "interval_95": interval,
            "weakest": [list(score) for score in self.weakest],
            "trials": [
                [str(form), round(blend.loss, 6), round(blend.accuracy, 6)]
                for form, blend in self.trials
            ],
        }


class _FitResult(NamedTuple):
    """The settings and the form that a fit has found, the rows of its :class:`conformal.Scores`, and in words, how."""

    settings: Settings
    choice: FormChoice
    rows: DoubleArray
    how: str


def fit(
    index: Index,
    asked: FitRequest | None = None,
    *,
    validation: Queries | None = None,
    factory: str | None = None,
    forms: Sequence[Form] = FORMS,
) -> tuple[Index, FormChoice]:
    """Fit the metric, the values and the settings of an index to its own shots, and return the fitted index.

    The form is selected by cross-validation on the shots (all views of a photo are in the same fold), or on
    ``validation`` images. The first form is kept unless another form is at least as accurate and lowers the
    cross-entropy by more than two standard errors of the difference. This prevents overfitting when there are few
    shots. Classes that have a single photo are used to fit but not to evaluate. If fewer than two classes have several
    photos, nothing can be evaluated, so predetermined settings are used. :class:`blend.HeldTerms` determines the
    weights of the terms and the temperature.

    Args:
        index: the index. Its current metric and values are ignored.
        asked: what to fit. By default, everything is selected on the shots.
        validation: the queries to evaluate on instead of the shots.
        factory: the type of the index over the fitted keys. Defaults to the current type.
        forms: the forms to select from.

    Raises:
        UsageError: if the metric or the values are unknown, or if this index cannot have solved values.
        InputError: if the index is fine-tuned, or if its keys are too long or too short.
    """
    asked = asked or FitRequest()
    by_class = (factory or index.index_type) == BY_CLASS
    if index.n <= MOST_SOLVED and not isinstance(index.rows, ArrayRows):
        index = index.in_memory()
        factory = BY_CLASS if by_class else None
    longest = _longest(index)
    forms = _forms(index, forms, asked.metric, asked.values, longest, by_class=by_class)
    if index.curve is not None:
        raise InputError(
            "fit: the keys of this index were fine-tuned; fit the index before fine-tuning"
        )
    if asked.prior is not None:
        index = _with_prior(index, asked.prior)
    folds = _folds_of(index, validation, asked.class_prior, equal_shares(index.parts))
    shares: tuple[float, ...] = ()
    if len(index.parts) > 1:
        shares = _shares_of(folds, forms[0])
        folds = folds.shared(shares)
    find = _found_on_folds if folds.can_judge else _found_without_folds
    result = find(index, forms, folds)
    choice = replace(result.choice, longest=longest)
    form = choice.form
    metric, values = folds.fitted(form, torch.arange(len(folds.ids)))
    # No metric can be fitted if nothing varies, as in copies of one photo.
    if metric is None:
        form = replace(form, metric=None)
    automatic = validation is None and asked.metric is None and asked.values is None
    fitted = form.fitted(index.n, asked.class_prior, shares, automatic=automatic)
    how = dict.fromkeys(("alpha", "beta", "temperature"), result.how)
    made = index.with_fit(metric, values, fitted, factory)
    made = made.altered(
        rows=made.rows.with_sums(folds.sums),
        settings=result.settings,
        provenance=index.provenance | how | {"fit": choice.provenance()},
        scores=Scores(result.rows, result.settings),
    )
    return made, choice


def _with_prior(index: Index, prior: DoubleArray) -> Index:
    d = index.keys.shape[1]
    if len(prior) != d:
        raise InputError(
            f"prior: features have {len(prior)} values instead of {d}; use the same encoders"
        )
    return index.altered(prior=prior.astype(np.float32))


def _shares_of(folds: Folds, form: Form) -> Shares:
    """Return the shares of several encoders.

    The known prior of one encoder helps folds more than the whole index, so it does not count here.
    """
    folds = replace(folds, parts=[replace(part, identity=None) for part in folds.parts])
    if folds.can_judge:
        return shares_of(_splits(folds), form)
    return shares_without_folds(folds)


def _found_on_folds(index: Index, forms: Sequence[Form], folds: Folds) -> _FitResult:
    if folds.prior is not None and forms[0] == DEFAULT_FORM:
        forms = [WITH_PRIOR, *forms]
    form, trials = _chosen(forms, folds)
    result = _settings_of(index, form, folds)
    return result._replace(choice=replace(result.choice, trials=trials))


def refit(index: Index, beta: float) -> tuple[Index, FormChoice]:
    """Set beta, refit all other fitted settings without changing the form, and solve the values again.

    If there are too few shots, the other settings stay. Raises the errors of :meth:`model.Index.solved`.
    """
    settings = replace(index.settings, beta=beta)
    provenance = index.provenance
    folds = _folds_of(index)
    choice = FormChoice.of(folds, Form.of(index.fitted, beta))
    rows = NO_SCORES
    if folds.can_judge:
        settings, choice, rows, how = _settings_of(index, choice.form, folds)
        provenance = provenance | dict.fromkeys(("alpha", "temperature"), how)
    fitted = None if index.fitted is None else replace(index.fitted, bonus=choice.form.bonus)
    made = index.altered(
        settings=settings, fitted=fitted, provenance=provenance | {"fit": choice.provenance()}
    )
    return made.solved().altered(scores=Scores(rows, settings)), choice


def estimate(index: Index) -> FormChoice:
    """Estimate the accuracy of an index on folds of its own shots. The index does not change.

    The metric and the values are refitted for each fold, but alpha, beta and the temperature are not. No accuracy is
    returned if the keys were fine-tuned, or if too few shots can be held out, or shots of a single class.
    """
    folds = _folds_of(index)
    form = Form.of(index.fitted, index.settings.beta)
    if index.curve is not None or not folds.can_judge:
        return FormChoice.of(folds, form)
    return _judged(index, form, folds, index.settings)[0]


def _judged(
    index: Index, form: Form, folds: Folds, settings: Settings
) -> tuple[FormChoice, Tensor]:
    """Return the accuracies of the whole index, as they follow from those on folds, and the logits of held-out photos.

    The whole index has ``r`` times as many shots of a class as a fold has. Without text, an error in this class counts
    as ``r^-0.4`` (see :data:`LEARNING`).
    """
    fold_terms = folds.terms(form)
    text_logits = fold_terms.text
    ids = folds.ids_held
    weights = folds.weights
    # The folds keep their terms, and log_cache works in place.
    cache = tip.log_cache(fold_terms.cache.clone(), settings.log_offset)
    text = torch.zeros_like(cache) if text_logits is None else text_logits
    terms = tip.Terms(text, cache, fold_terms.discriminant)
    logits = terms.logits(settings)
    # Other folds hold out the same photos again.
    shown = folds.held_of("shots")
    right = logits.argmax(1) == ids
    right_by_photos = terms.photos(settings).argmax(1) == ids
    left = weights * _errors_left(folds)
    both = 1 - float((left * ~right).mean())
    photos = 1 - float((left * ~right_by_photos).mean())
    # Kish's effective number of photos: unequal weights make an estimate less certain.
    number = float(weights.sum() ** 2 / (weights * weights).sum())
    choice = replace(
        FormChoice.of(folds, form),
        photos=photos,
        both=both,
        interval=wilson(both, number / DRAWN),
        weakest=_weakest(index.class_names, right[shown], ids[shown]),
    )
    if text_logits is not None:
        right_by_text = text_logits.argmax(1) == ids
        lost = weights * (right_by_photos.double() - right.double())
        choice = replace(
            choice, text=float((weights * right_by_text).mean()), names_hurt=is_clear(lost)
        )
    return choice, logits


def _errors_left(folds: Folds) -> Tensor:
    """Return the share of the errors of each held-out photo that the whole index still makes, ``[q]``."""
    return folds.growth ** (-LEARNING if folds.weighted_text is None else 0)


def unfitted(index: Index) -> Index:
    """Return a new index over the same keys that has no metric, one-hot values, and untouched alpha and beta."""
    if index.fitted is None:
        return index
    alpha, beta = untouched_settings(index.keys, index.class_ids.cpu().numpy())
    settings = replace(index.settings.unfitted(), alpha=alpha, beta=beta, temperature=1.0)
    kept = {
        name: value
        for name, value in index.provenance.items()
        if name not in ("fit", "temperature")
    }
    provenance = kept | {"alpha": "default", "beta": "default"}
    return index.with_fit(None, None, None).altered(settings=settings, provenance=provenance)


def _longest(index: Index) -> float:
    """Return the largest norm in a sample of the keys. Raises InputError if it is too small for float32."""
    # In float32, the last row would be rounded to n from 16,777,220 keys on.
    rows = torch.linspace(0, index.n - 1, min(index.n, JUDGED), dtype=torch.float64).long()
    longest = float(torch.linalg.vector_norm(taken_keys(index.keys, rows).double(), dim=1).max())
    if 0 < longest < LEAST_NORM:
        raise InputError(
            f"keys: norms of at most {longest:.4g} are too small for float32; scale them to norm 1 (norms unit)"
        )
    return longest


def _forms(
    index: Index,
    forms: Sequence[Form],
    metric: MetricName | None,
    values: ValuesName | None,
    longest: float,
    *,
    by_class: bool,
) -> list[Form]:
    """Return the possible forms. Raises InputError if the keys are too long for every form."""
    for name, choice, choices in (("metric", metric, MetricName), ("values", values, ValuesName)):
        if choice is not None:
            check_choice(name, choice, choices)
    # Solved values compensate for each other, so they would be wrong for a query that uses only some keys.
    if index.settings.k is not None or by_class or index.n > MOST_SOLVED:
        if values == "solved":
            some = f", and {BY_CLASS} searches some" if by_class else ""
            raise UsageError(
                f"values solved: need a search over all keys, at most {MOST_SOLVED:,}, but the index has {index.n:,}, "
                f"k is {index.settings.k or 'all'}{some}; give values one-hot"
            )
        values = "one-hot"
    forms = [
        form
        for form in forms
        if metric in (None, form.metric_name) and values in (None, form.values_name)
    ]
    grown = longest**2 - 1
    forms = [form for form in forms if form.metric is not None or form.beta * grown <= GROWN]
    if values is None:  # one-hot values are only needed if a query uses some of the keys
        forms = [form for form in forms if form.ridge is not None] or forms
    if not forms:
        raise InputError(
            f"metric none: keys have norms up to {longest:.4g} instead of 1; give norms unit"
        )
    return forms


def _folds_of(
    index: Index,
    validation: Queries | None = None,
    class_prior: ClassPrior | None = None,
    shares: Sequence[float] = (),
) -> Folds:
    folds = Folds.of(index, class_prior, shares)
    if validation is not None:
        held = Held(
            torch.from_numpy(validation.features),
            torch.from_numpy(validation.ids),
            torch.arange(index.n),
        )
        return replace(folds, held=[held], validation=validation.name).with_classes(JUDGED)
    number = MOST_FOLDS if index.n <= FEW_KEYS else FOLDS
    most = int(min(JUDGED, max(256, AFFINITIES / index.n)))
    return folds.with_shots(number, most).with_small(most).with_classes(most)


def _chosen(forms: Sequence[Form], folds: Folds) -> tuple[Form, list[tuple[Form, Blend]]]:
    """Return the first form, or the best form that is significantly better, and all trials.

    If there are too few shots to hold some of them out, no form is tried.
    """
    shots = folds.validation is None
    if len(forms) == 1 or (
        shots and len(np.unique(folds.images)) < LEAST_SHOTS * len(folds.ids.unique())
    ):
        return forms[0], []
    folds = _sample(folds) if shots else folds
    trials = [(form, folds.judge(form)) for form in forms]
    first = trials[0][1]
    chosen, best = trials[0]
    for form, blend in trials:
        is_better = is_clear(first.weights * (first.losses - blend.losses))
        if is_better and blend.accuracy >= first.accuracy and blend.loss < best.loss:
            chosen = form
            best = blend
    return chosen, trials


def _settings_of(index: Index, form: Form, folds: Folds) -> _FitResult:
    """Return the settings and the bonus that give the held-out photos the highest log-likelihood."""
    form, blend, offset = _best_blend(form, folds)
    settings = replace(
        blend.settings(index.settings.unfitted(), form.beta),
        least_cache=_least_cache(form, folds, offset),
        log_offset=offset,
    )
    choice, logits = _judged(index, form, folds, settings)
    drawn = None if folds.validation is not None else _drawn(index)
    counted_photos = folds.held_of("shots")
    if drawn is not None:
        held_rows = torch.cat(
            [held.query_rows for held in folds.held if held.query_rows is not None]
        )
        counted_photos = counted_photos & torch.from_numpy(drawn)[held_rows]
        like_new = counted_photos
        right = int(blend.right[counted_photos].sum())
        # The rule of succession: a few right answers must not promise an accuracy of 1.
        accuracy = (right + 1) / (int(drawn.sum()) + 2)
        most = LESS_SURE
    else:
        # Half a right and half a wrong photo are added, so that few photos without an error leave some doubt.
        accuracy = ((choice.both or 0) * folds.n + 0.5) / (folds.n + 1)
        like_new, most = _like_new(folds)
    # Classes without shots can win, too, so the accuracy on the others says little about the temperature.
    if drawn is not None or folds.covered == 1:
        weights = folds.weights[like_new]
        settings = _as_sure(settings, logits[like_new], weights, accuracy, most)
    rows = _scores(folds, logits, settings.temperature, counted_photos)
    return _FitResult(settings, choice, rows, f"fitted on {folds.judged_on}")


def _best_blend(form: Form, folds: Folds) -> tuple[Form, Blend, float | None]:
    """Return the form with its bonus, the best blend of its terms, and the offset of the logarithm, if there is one."""
    form = replace(form, bonus=0.0)
    terms = folds.terms(form)
    offsets: Sequence[float | None] = (None,)
    if form.ridge is not None and not folds.holds_classes:
        offsets = OFFSETS if folds.halves else (None, *OFFSETS)

    def held(offset: float | None) -> HeldTerms:
        return terms.held(folds.ids_held, offset)

    blends = {offset: held(offset).blend(folds.weights) for offset in offsets}
    best = min(offsets, key=lambda offset: blends[offset].loss)
    blend = held(best).robust(blends[best])
    if terms.bonus is not None:
        form = replace(form, bonus=blend.g / blend.b)
        # The bonus is part of the cache from now on, so it is not weighted again.
        blend = replace(blend, g=0.0)
    if folds.covered < 1 and not folds.holds_classes:  # too few classes to hold some out
        blend = replace(blend, a=1.0, b=blend.b / max(blend.a, 1.0) * folds.covered)
    return form, blend, best


def _least_cache(form: Form, folds: Folds, offset: float | None) -> float | None:
    """Return the threshold of photos without a match, or ``None`` if a fold has too few of the shots to find it."""
    if folds.halves:
        return None
    strongest = _strongest(folds.terms(form).cache, folds, form)
    return _quantile(tip.log_cache(strongest, offset), UNLIKE, folds.weights)


def _like_new(folds: Folds) -> tuple[Tensor, float]:
    """Return which held-out photos meet about as many shots as new ones, and the factor of :func:`_as_sure`."""
    if folds.weighted_text is None and folds.halves:
        return folds.held_of("small"), LESS_SURE
    return folds.held_of("shots"), 1.0


def _scores(folds: Folds, logits: Tensor, temperature: float, photos: Tensor) -> DoubleArray:
    """Return the rows of :class:`conformal.Scores` for some of the held-out photos."""
    ids = folds.ids_held
    chances = tip.probabilities(logits, temperature).double()
    own_chance = chances.gather(1, ids[:, None])[:, 0]
    weights = folds.weights
    lost = weights * _errors_left(folds) / weights[photos].sum()
    return torch.stack([own_chance, lost, ids.double()], 1)[photos].numpy()


def _drawn(index: Index) -> BoolArray | None:
    """Return which keys of an index of ``label`` were drawn at random, or ``None`` for another index."""
    if not isinstance(index.rows, ArrayRows) or PICKED not in index.rows.labels.column_names:
        return None
    return np.asarray(pc.equal(index.rows.labels[PICKED], RANDOM).fill_null(False))


def _as_sure(
    settings: Settings, logits: Tensor, weights: Tensor, right: float, most: float
) -> Settings:
    """Change the temperature until the mean confidence on held-out photos is the share ``right``.

    A blend is only as sure as a fold is accurate, which has fewer shots than the whole index. If folds have only half
    of the shots, the logits of small folds count, because they are as large as those of the whole index. The photos of
    ``label`` were chosen where classes meet, so only those that were drawn at random count; one whose class has no
    other photo counts as wrong, because more such classes will follow. The temperature becomes at most :data:`SURER`
    times as low, and ``most`` times as high.
    """
    if not len(logits):
        return replace(settings, temperature=EARLY * settings.temperature)
    low = settings.temperature / SURER
    high = settings.temperature * most
    for _ in range(BISECTIONS):
        # Temperatures are ratios. Twelve halvings of a factor of at most 32 leave 0.1 %.
        middle = (low * high) ** 0.5
        sure = float((weights * (logits / middle).softmax(1).amax(1)).mean() / weights.mean())
        low, high = (middle, high) if sure > right else (low, middle)
    # At the lower end, the answers may be too sure.
    return replace(settings, temperature=high)


def _strongest(cache: Tensor, folds: Folds, form: Form) -> Tensor:
    """Return the largest cache logits ``[q]`` that the held-out photos would have if no shot were held out.

    Only classes with shots count.

    One-hot values sum over ``n`` keys of a class, so ``C`` is multiplied by ``n / m`` if a fold has ``m`` of them.
    Solved values divide this sum by ``1 + lambda + (n - 1) g``, where ``g`` is the weight between two keys of the
    class. The logit of the own class then becomes ``C (n / m) / (1 + (n / m - 1) C)``, which is the Spearman-Brown
    formula for longer tests.
    """
    counts = folds.counts
    ratio = folds.growth
    places = folds.ids_held[:, None]
    shots = counts.gather(1, places)[:, 0]
    most = cache.masked_fill(counts == 0, -torch.inf).amax(1)
    if form.ridge is None:
        return most * ratio
    own_logits = cache.gather(1, places)[:, 0]
    own_logits = own_logits * ratio / (1 + (ratio - 1) * own_logits[shots > 0].mean().clamp(0, 1))
    return torch.where(shots > 0, torch.maximum(most, own_logits), most)


def _quantile(values: Tensor, share: float, weights: Tensor) -> float:
    if (weights == 1).all():
        return float(values.quantile(share))
    return float(np.quantile(values, share, weights=weights, method="inverted_cdf"))


def _weakest(class_names: Sequence[str], right: Tensor, ids: Tensor) -> list[tuple[str, int, int]]:
    """Return the classes with mistakes, least accurate first, with the numbers of correct answers and photos."""
    held, correct = (
        torch.bincount(class_ids, minlength=len(class_names)) for class_ids in (ids, ids[right])
    )
    missed = torch.nonzero(held > correct)[:, 0].tolist()
    # Among equally weak classes, the one with more photos comes first, because its figure is more certain.
    missed.sort(key=lambda c: (int(correct[c]) / int(held[c]), -int(held[c])))
    return [(class_names[c], int(correct[c]), int(held[c])) for c in missed[:WEAKEST]]


def _found_without_folds(index: Index, forms: Sequence[Form], folds: Folds) -> _FitResult:
    """Return the form and the settings for shots that cannot be held out.

    The text weights do not depend on the shots, so their temperature T can still be fitted to the shots. If the text is
    overconfident (T > 1), the cache gets T^2 times as much weight: ``softmax(text / T + 13 T^2 cache)``. This weight is
    multiplied by the fraction of classes that have shots. If there is a prior, the metric is fitted to the prior, and
    the discriminant is used as well (see :data:`PRIOR_ALPHA` and :data:`PRIOR_ALONE`).
    """
    form = _one_shot_form(forms, folds)
    prior = form.metric if form is ONE_SHOT_WITH_PRIOR else None
    temperature = 1.0
    if form.ridge is None:
        alpha, beta = untouched_settings(index.keys, index.class_ids.cpu().numpy())
        form = replace(form, beta=beta)
        alpha *= folds.covered
    elif index.has_text:
        temperature = _text_temperature(index, folds)
        photos = ONE_SHOT_ALPHA * max(1.0, temperature) ** 2
        alpha = photos * temperature * folds.covered
        temperature *= max(1.0, photos / ONE_SHOT_MOST)
        if prior is not None:
            alpha = PRIOR_ALPHA * alpha
    else:
        alpha = ONE_SHOT_ALONE
        if prior is not None:
            scatter = folds.of_known().scatter(torch.arange(index.n))
            alpha = max(PRIOR_LEAST, PRIOR_ALONE * dimensions(scatter, prior.shrinkage))
    gamma = PRIOR_GAMMA if prior is not None and folds.covered == 1 else 0.0
    if _drawn(index) is not None:
        temperature = EARLY * temperature
    settings = replace(
        index.settings.unfitted(), alpha=alpha, beta=form.beta, gamma=gamma, temperature=temperature
    )
    how = "default for shots that cannot be held out"
    return _FitResult(settings, FormChoice.of(folds, form), NO_SCORES, how)


def _one_shot_form(forms: Sequence[Form], folds: Folds) -> Form:
    """Return the form for one shot per class, or the plain form if all possible ``forms`` have one-hot values."""
    metrics = [form.metric for form in forms]
    if all(form.ridge is None for form in forms):
        return PLAIN
    if folds.prior is not None and any(metrics):
        return ONE_SHOT_WITH_PRIOR
    return ONE_SHOT if None in metrics else replace(ONE_SHOT, metric=DEFAULT_FORM.metric)


def _text_temperature(index: Index, folds: Folds) -> float:
    """Return the temperature of the text, fitted to the shots as far as their number allows."""
    text = folds.weighted_text
    if text is None or len(index.class_names) == 1:
        return 1.0
    rows = torch.from_numpy(folds.order.rows[spread(index.n, JUDGED)])
    keys = torch.nn.functional.normalize(taken_keys(index.keys, rows))
    terms = HeldTerms(None, tip.affinity(keys, text), None, index.class_ids.cpu()[rows])
    trust = len(rows) / (len(rows) + ONE_SHOT_DOUBT)
    return float(terms.blend().b ** -trust)


def _sample(folds: Folds, most: int = CHOSEN_ON) -> Folds:
    """Return folds of a sample of at most ``most`` keys, which may be all keys."""
    sample = _of_classes(folds, most) if len(folds.ids) > most else folds
    return sample.with_shots(FOLDS, len(sample.ids)).with_classes(len(sample.ids))


def _splits(folds: Folds) -> list[Folds]:
    """Return folds of a sample that select shares. If few photos are held out, they are split several times."""
    few = folds if folds.validation is not None else _sample(folds, SHARED_ON)
    if not few.can_judge:
        return [folds]
    if folds.validation is not None or few.n > FEW_JUDGED:
        return [few]
    more = (few.with_shots(FOLDS, few.n, seed).with_classes(few.n) for seed in range(1, SPLITS))
    return [few, *more]


def _of_classes(folds: Folds, most: int) -> Folds:
    """Return a sample of about ``most`` keys of some classes, as if the index held nothing else."""
    ids = folds.ids.numpy()
    draw = np.random.default_rng(0)
    ordered, order_of_classes = folds.order
    few = ordered[ranks_within(ids[ordered], draw) < CHOSEN_SHOTS]
    counts = np.bincount(ids[few], minlength=folds.c)
    drawn = draw.permutation(order_of_classes)
    # Folds of one class could not be judged.
    drawn = drawn[: max(2, int(np.searchsorted(np.cumsum(counts[drawn]), most, "right")))]
    classes = order_of_classes[np.isin(order_of_classes, drawn)]
    rows = few[np.isin(ids[few], classes)]
    places = np.zeros(folds.c, dtype=np.int64)
    places[classes] = np.arange(len(classes))
    return replace(
        folds,
        keys=np.asarray(folds.keys[rows]),
        ids=torch.from_numpy(places[ids[rows]]),
        c=len(classes),
        text=None if folds.text is None else folds.text[classes],
        images=folds.images[rows],
        sums=None,
        order=Order(np.arange(len(rows)), np.arange(len(classes))),
    )
