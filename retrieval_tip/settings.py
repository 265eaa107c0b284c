"""The settings of an index, one value: how it answers where nothing else is said."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from retrieval_tip.errors import UsageError

KeysMet = int | Literal["all"] | None
"""Number of nearest keys to use in one call. ``None`` uses the index's setting, ``"all"`` every key."""

Verify = Literal["full", "fast"]
"""How files are checked when they are loaded: every byte, or of large files only the size."""
Norms = Literal["check", "unit", "keep"]
"""Feature rows must have norm 1, are scaled to norm 1, or are kept as they are."""
Precision = Literal["auto", "float32", "float16", "bfloat16"]
Runtime = Literal["auto", "torch"]
Dtype = Literal["float32", "float16"]
"""Type of the stored keys."""
FitName = Literal["auto", "none"]
Normalize = Literal["both", "shots", "affinity", "none"]
"""Units of alpha and beta (:mod:`retrieval.defaults`)."""
MetricName = Literal["none", "within"]
ValuesName = Literal["one-hot", "solved"]
METRICS, VALUES = get_args(MetricName), get_args(ValuesName)
"""Names of what a fit may choose for each letter of the method (:mod:`tip`)."""
TrainedPart = Literal["keys", "values", "visual", "text"]
TRAINED: tuple[TrainedPart, ...] = get_args(TrainedPart)
"""What can be trained: the keys (Tip-Adapter-F), what each gives to each class (``[n, c]``), and the two encoders."""
TrainingPrecision = Literal["auto", "float32", "bfloat16"]
TrainingSettings = Literal["tried", "own"]
Protocol = Literal["honest", "paper"]
"""How settings are chosen: on the shots or a validation draw, or as in the paper, on the whole validation source."""


def check_choice(name: str, value: object, alias: object) -> None:
    """Raise UsageError unless a value is one of the words of a ``Literal``."""
    words: tuple[str, ...] = get_args(alias)
    if value not in words:
        raise UsageError(f"{name} {value!r}: expected one of {', '.join(words)}")


ADDED_AFTER_FORMAT_1 = {"later": True}
"""Of a setting that the first format did not have: a manifest without it has its default."""
FITTED = ("least_cache", "log_offset")
"""Settings that only a fit finds; ``None`` without one."""


@dataclass(frozen=True)
class Settings:
    """Settings of the method, ``logits = logit_scale * f W^T + alpha * C`` (:mod:`tip`). The defaults are the paper's.

    Args:
        alpha: residual ratio, how much the cache counts beside the text (paper, equation 6); 0 or more.
        beta: sharpness of the exponential in the cache logits ``C`` (paper, equation 4); 0 or more.
        logit_scale: temperature factor of the backbone, OpenAI's CLIP has 100; above 0.
        k: how many of the nearest keys a query meets, 1 or more; ``None`` is all of them, Tip-Adapter exactly.
        tail: with ``k``, estimate what the keys that were not retrieved add (:func:`tip.cache_logits`).
        temperature: divides the logits where they become probabilities, and nowhere else; above 0.
        log_offset: the cache counts by its logarithm, ``log(1 + max(C, 0) / o)``; above 0, ``None``: as it is.
        least_cache: a query whose largest cache logit is smaller is unlike any shot; ``None``: nothing is.

    Raises UsageError naming the setting that cannot work.
    """

    alpha: float = 1.0
    beta: float = 5.5
    logit_scale: float = 100.0
    k: int | None = None
    tail: bool = True
    temperature: float = 1.0
    least_cache: float | None = field(default=None, metadata=ADDED_AFTER_FORMAT_1)
    log_offset: float | None = field(default=None, metadata=ADDED_AFTER_FORMAT_1)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "logit_scale", "temperature"):
            value, above = getattr(self, name), name in ("logit_scale", "temperature")
            if not _is_finite(value) or value < 0 or (above and value == 0):
                raise UsageError(f"{name} is {value}: expected a finite number{' above 0' if above else ', 0 or more'}")
            object.__setattr__(self, name, float(value))
        if self.k is not None:
            if not _is_whole(self.k) or self.k < 1:
                raise UsageError(f"k is {self.k}: expected a whole number of keys, at least 1, or None for all")
            object.__setattr__(self, "k", int(self.k))
        object.__setattr__(self, "tail", bool(self.tail))
        if self.least_cache is not None and not _is_finite(self.least_cache):
            raise UsageError(f"least_cache is {self.least_cache}: expected a finite number, or None")
        if self.log_offset is not None and not (_is_finite(self.log_offset) and self.log_offset > 0):
            raise UsageError(f"log_offset is {self.log_offset}: expected a finite number above 0, or None")
        for name in FITTED:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def override(self, *, k: KeysMet = None, **given: Any) -> Self:
        """These settings but for those that are given; ``None`` is not given, a ``k`` of ``all`` is all keys."""
        known = {name: value for name, value in given.items() if value is not None}
        if k is not None:
            known["k"] = None if k == "all" else k
        return replace(self, **known) if known else self

    def unfitted(self) -> Self:
        """These without what only a fit finds."""
        return replace(self, least_cache=None, log_offset=None)

    def shown(self) -> dict[str, Any]:
        """The settings that may be set, by name, as people and JSON read it: a ``k`` of all keys is ``all``.

        Without the ``logit_scale``, which is the backbone's, and what only a fit finds.
        """
        names = (field.name for field in fields(self) if field.name not in ("logit_scale", *FITTED))
        return {name: getattr(self, name) for name in names} | {"k": self.k or "all"}


@dataclass(frozen=True)
class Fitted:
    """The form in which metric and values of an index were fitted to its shots (:mod:`fit.closed_form`).

    ``metric`` is ``none`` or the name of one with a ``shrinkage``, ``values`` are ``one-hot``, or ``solved`` with a
    ``ridge``; ``keys`` is the number of keys at that time. Only :mod:`fit.forms` knows the metrics by name.
    """

    metric: str
    values: str
    shrinkage: float | None
    ridge: float | None
    keys: int

    def __post_init__(self) -> None:
        if type(self.metric) is not str or self.values not in VALUES:
            raise UsageError(f"fitted: metric {self.metric!r} or values {self.values!r} are unknown")
        for given, needed in ((self.shrinkage, self.metric != "none"), (self.ridge, self.solved)):
            if (given is not None) != needed or (given is not None and not (_is_finite(given) and given >= 0)):
                raise UsageError(f"fitted: shrinkage {self.shrinkage} or ridge {self.ridge} do not fit what was fitted")
        if self.ridge == 0 or not _is_whole(self.keys) or self.keys < 1:
            raise UsageError(f"fitted: ridge {self.ridge} or keys {self.keys}, expected above 0")

    @property
    def solved(self) -> bool:
        """Whether the values were solved, for one beta and from all shots."""
        return self.values != "one-hot"


@dataclass(frozen=True)
class Built:
    """The way an index was built, as far as what comes later goes by it: its provenance is a record, this decides.

    ``source`` is the name of the labelled source; so many ``shots`` a class were drawn from it (``None`` took all), and
    a key is the mean of so many ``views``, both with ``seed``. ``auto_index``: the type of the index follows
    the number of keys.
    """

    source: str | None = None
    shots: int | None = None
    seed: int = 1
    views: int = 1
    auto_index: bool = False

    def __post_init__(self) -> None:
        numbers = ((self.shots, 1), (self.seed, 0), (self.views, 1))
        whole = all(number is None or (type(number) is int and number >= least) for number, least in numbers)
        if not whole or not isinstance(self.source, str | None) or type(self.auto_index) is not bool:
            raise UsageError(f"built: {self} cannot be how an index was built")


def _is_finite(value: object) -> bool:
    """Whether this is a number that a float of 64 bits holds."""
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str | float) and value == int(value) < 2**63
    except (TypeError, ValueError, OverflowError):
        return False
