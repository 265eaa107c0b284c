"""Define the forms: the combinations of metric, values and beta from which a fit selects.

To add a metric, write a subclass of :class:`Within` with another ``fit``, and add a form that uses it to :data:`FORMS`.
To offer it in ``--metric``, add its name to ``MetricName`` in settings.py. Other values than :class:`Solved` must also
support adding and removing keys (see :mod:`retrieval.ridge`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.errors import InputError
from retrieval_tip.fit.scatter import SMALLEST_EIGENVALUE, FewScatter, Scatter
from retrieval_tip.retrieval.ridge import Ridge
from retrieval_tip.settings import ClassPrior, Fitted


@dataclass(frozen=True)
class Within:
    """Whitening of the within-class scatter, ``T T^T = ((1 - s) S + s tr(S) / d I)^-1``.

    The ``shrinkage`` ``s`` is from 0 (none) to 1 (a sphere). Another metric is a subclass with another ``fit``.
    """

    shrinkage: float
    name: ClassVar[str] = "within"

    def fit(self, scatter: Scatter | FewScatter) -> tip.Metric | None:
        """Return the metric in float32, or ``None`` if the scatter is 0."""
        return scatter.whitening(max(self.shrinkage, SMALLEST_EIGENVALUE))

    def __str__(self) -> str:
        return f"{self.name}-class metric (shrinkage {self.shrinkage:g})"


@dataclass(frozen=True)
class Solved:
    """Kernel ridge regression, ``V = (G + lambda I)^-1 Y``, with a regularisation strength ``ridge`` above 0.

    ``bonus`` favours classes that have no shots (see :class:`retrieval.ridge.Ridge`).
    """

    ridge: float
    bonus: float = field(default=0.0, compare=False)
    name: ClassVar[str] = "solved"

    def fit(self, points: Tensor, ids: Tensor, c: int, beta: float, class_prior: ClassPrior = "even") -> Tensor:
        """Return the values of keys at ``points``, of shape ``[n, c]``."""
        return Ridge(c, beta, self.ridge, "cpu", class_prior, self.bonus).values(points, ids)

    def __str__(self) -> str:
        return f"{self.name} values (ridge {self.ridge:g})"


@dataclass(frozen=True)
class Form:
    """A metric, values and beta to fit. ``None`` stands for no metric and for one-hot values."""

    metric: Within | None
    values: Solved | None
    beta: float

    @classmethod
    def of(cls, fitted: Fitted | None, beta: float) -> Form:
        """Return the form of a fitted index. Raises InputError if the metric is unknown."""
        if fitted is None:
            return cls(None, None, beta)
        metrics = {form.metric.name: type(form.metric) for form in FORMS if form.metric}
        try:
            return cls(
                None if fitted.shrinkage is None else metrics[fitted.metric](fitted.shrinkage),
                None if fitted.ridge is None else Solved(fitted.ridge, fitted.bonus),
                beta,
            )
        except KeyError as name:
            raise InputError(f"fitted: unknown form {name}; fit the index again") from None

    def fitted(self, keys: int, class_prior: ClassPrior, *, automatic: bool) -> Fitted:
        """Return the record of a fit of this form to ``keys`` keys."""
        shrinkage = None if self.metric is None else self.metric.shrinkage
        ridge = None if self.values is None else self.values.ridge
        return Fitted(self.metric_name, self.values_name, shrinkage, ridge, keys, class_prior, automatic, self.bonus)

    @property
    def bonus(self) -> float:
        """What the values of classes without shots get in addition (see :class:`retrieval.ridge.Ridge`)."""
        return 0.0 if self.values is None else self.values.bonus

    def with_bonus(self, bonus: float) -> Form:
        """Return the same form with another bonus, if it has solved values."""
        return self if self.values is None else replace(self, values=replace(self.values, bonus=bonus))

    @property
    def metric_name(self) -> str:
        """Name of the metric, or ``none``."""
        return "none" if self.metric is None else self.metric.name

    @property
    def values_name(self) -> str:
        """Name of the values, or ``one-hot``."""
        return "one-hot" if self.values is None else self.values.name

    def __str__(self) -> str:
        return f"{self.metric or 'no metric'}, {self.values or 'one-hot values'}, beta {self.beta:g}"


DEFAULT_FORM = Form(Within(0.8), Solved(0.1), 1.0)
"""The default form. On every dataset that was tried, it is close to the best form."""

ONE_SHOT, ONE_SHOT_WITH_PRIOR = Form(None, Solved(0.5), 1.0), Form(Within(0.4), Solved(0.5), 1.0)
"""The forms that are used if every class has a single photo, without and with a prior for the scatter."""

WITH_PRIOR = Form(Within(0.3), Solved(0.1), 1.0)
"""The default form if there is a prior for the scatter, which then needs less shrinkage."""

FORMS = [
    DEFAULT_FORM,
    Form(Within(0.8), Solved(0.1), 4.0),
    Form(Within(0.5), Solved(0.1), 1.0),
    Form(None, Solved(0.3), 1.0),
    Form(Within(0.8), None, 1.0),
    Form(Within(0.5), None, 1.0),
    Form(Within(0.5), None, 4.0),
    Form(None, None, 5.5),
]
"""The forms to try, starting with the default.

Forms with one-hot values are only tried if the user asks for them or if values cannot be solved.
"""


def like(fitted: Fitted) -> list[Form]:
    """Return the forms that have the same kind of metric and values."""
    return [form for form in FORMS if (form.metric_name, form.values_name) == (fitted.metric, fitted.values)]
