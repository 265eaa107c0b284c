"""Records of how an index was built and fitted, which later changes follow."""

from __future__ import annotations

from dataclasses import dataclass

from retrieval_tip.errors import UsageError
from retrieval_tip.settings import (
    VALUES,
    ClassPrior,
    check_choice,
    is_finite,
    is_whole,
)


@dataclass(frozen=True)
class Fitted:
    """A record of the metric and the values that were fitted to the shots of an index (see :mod:`fit.closed_form`).

    ``shrinkage`` is only set if there is a metric, and ``ridge`` only if the values were solved. ``keys`` is the number
    of keys at the time of the fit. With the ``class_prior`` ``even``, all classes had the same weight in the fit, and
    with ``shots``, all shots had. ``automatic`` is true if a fit to the shots has chosen all settings, and nobody has
    changed them since. Only then does a large change of the keys fit the index again. ``bonus`` favours classes without
    keys (see :class:`retrieval.ridge.Ridge`). If there are several encoders, ``shares`` says how much each counts. They
    sum to 1, and none means that all count equally.
    """

    metric: str
    values: str
    shrinkage: float | None
    ridge: float | None
    keys: int
    class_prior: ClassPrior = "even"
    automatic: bool = False
    bonus: float = 0.0
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        valid = all(is_finite(share) and share >= 0 for share in self.shares)
        if not valid or (self.shares and abs(sum(self.shares) - 1) > 1e-6):
            raise UsageError(f"fitted: shares {self.shares} are not positive numbers that sum to 1")
        if not is_finite(self.bonus):
            raise UsageError(f"fitted: bonus {self.bonus!r} is not a finite number")
        if type(self.automatic) is not bool:
            raise UsageError(f"fitted: automatic is {self.automatic!r}, not true or false")
        check_choice("class_prior", self.class_prior, ClassPrior)
        if type(self.metric) is not str or self.values not in VALUES:
            raise UsageError(f"fitted: metric {self.metric!r} or values {self.values!r} is unknown")
        for given, needed in ((self.shrinkage, self.metric != "none"), (self.ridge, self.solved)):
            if (given is not None) != needed or (
                given is not None and not (is_finite(given) and given >= 0)
            ):
                raise UsageError(
                    f"fitted: shrinkage {self.shrinkage} and ridge {self.ridge} do not match the metric and the values"
                )
        if self.ridge == 0 or not is_whole(self.keys) or self.keys < 1:
            raise UsageError(f"fitted: ridge {self.ridge} and keys {self.keys} must be above 0")

    @property
    def has_metric(self) -> bool:
        """Whether queries and keys are transformed, if only because encoders do not count equally."""
        return self.metric != "none" or len(set(self.shares)) > 1

    @property
    def solved(self) -> bool:
        """Whether the values were solved. Solved values are only valid for a single beta."""
        return self.values != "one-hot"


@dataclass(frozen=True)
class Built:
    """The options of the build that are also used for later changes.

    Attributes:
        source: the name of the labelled source.
        shots: the number of shots sampled per class, or ``None`` if all photos were used.
        seed: the random seed for the shots and the views.
        views: the number of views that are averaged to compute a key.
        auto_index: whether the type of the index depends on the number of keys.
    """

    source: str | None = None
    shots: int | None = None
    seed: int = 1
    views: int = 1
    auto_index: bool = False

    def __post_init__(self) -> None:
        numbers = ((self.shots, 1), (self.seed, 0), (self.views, 1))
        whole = all(
            number is None or (type(number) is int and number >= least) for number, least in numbers
        )
        if (
            not whole
            or not isinstance(self.source, str | None)
            or type(self.auto_index) is not bool
        ):
            raise UsageError(f"built: invalid values {self}")
