"""Define the forms: the combinations of metric, values and beta from which a fit selects.

To add a metric, write a subclass of :class:`Within` with another ``fit``, and add a form that uses it to :data:`FORMS`.
To offer it in ``--metric``, add its name to ``MetricName`` in settings.py. Solved values are in :mod:`retrieval.ridge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from retrieval_tip import tip
from retrieval_tip.errors import InputError
from retrieval_tip.fit.scatter import SMALLEST_EIGENVALUE, FewScatter, Scatter
from retrieval_tip.records import Fitted
from retrieval_tip.settings import ClassPrior, ValuesName


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
class Form:
    """A metric, the ``ridge`` of solved values, and beta. ``None`` stands for no metric and for one-hot values.

    ``bonus`` favours classes that have no shots (see :class:`retrieval.ridge.Ridge`).
    """

    metric: Within | None
    ridge: float | None
    beta: float
    bonus: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, fitted: Fitted | None, beta: float) -> Form:
        """Return the form of a fitted index. Raises InputError if the metric is unknown."""
        if fitted is None:
            return cls(None, None, beta)
        metrics = {form.metric.name: type(form.metric) for form in FORMS if form.metric}
        if fitted.shrinkage is not None and fitted.metric not in metrics:
            raise InputError(f"fitted: unknown form {fitted.metric!r}; fit the index again")
        metric = None if fitted.shrinkage is None else metrics[fitted.metric](fitted.shrinkage)
        return cls(metric, fitted.ridge, beta, fitted.bonus)

    def fitted(
        self, keys: int, class_prior: ClassPrior, shares: Sequence[float], *, automatic: bool
    ) -> Fitted:
        """Return the record of a fit of this form to ``keys`` keys."""
        shrinkage = None if self.metric is None else self.metric.shrinkage
        names = self.metric_name, self.values_name
        return Fitted(
            *names, shrinkage, self.ridge, keys, class_prior, automatic, self.bonus, tuple(shares)
        )

    @property
    def metric_name(self) -> str:
        """Name of the metric, or ``none``."""
        return "none" if self.metric is None else self.metric.name

    @property
    def values_name(self) -> ValuesName:
        """Name of the values."""
        return "one-hot" if self.ridge is None else "solved"

    def __str__(self) -> str:
        values = "one-hot values" if self.ridge is None else f"solved values (ridge {self.ridge:g})"
        return f"{self.metric or 'no metric'}, {values}, beta {self.beta:g}"


DEFAULT_FORM = Form(Within(0.8), 0.1, 1.0)
"""The default form. On every dataset that was tried, it is close to the best form."""

ONE_SHOT, ONE_SHOT_WITH_PRIOR = Form(None, 0.5, 1.0), Form(Within(0.4), 0.5, 1.0)
"""The forms that are used if every class has a single photo, without and with a prior for the scatter."""

WITH_PRIOR = Form(Within(0.3), 0.1, 1.0)
"""The default form if there is a prior for the scatter, which then needs less shrinkage."""

PLAIN = Form(None, None, 5.5)
"""Plain Tip-Adapter, with the beta of the paper."""

FORMS = [
    DEFAULT_FORM,
    Form(Within(0.8), 0.1, 4.0),
    Form(Within(0.5), 0.1, 1.0),
    Form(None, 0.3, 1.0),
    Form(Within(0.8), None, 1.0),
    Form(Within(0.5), None, 1.0),
    Form(Within(0.5), None, 4.0),
    PLAIN,
]
"""The forms to try, starting with the default.

Forms with one-hot values are only tried if the user asks for them or if values cannot be solved.
"""


def like(fitted: Fitted) -> list[Form]:
    """Return the forms that have the same kind of metric and values."""
    return [
        form
        for form in FORMS
        if (form.metric_name, form.values_name) == (fitted.metric, fitted.values)
    ]
