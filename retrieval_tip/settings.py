"""Settings of an index, how it was fitted, and how it was built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

from retrieval_tip.errors import UsageError

KeysMet = int | Literal["all"] | None
"""Number of nearest keys to use in one call. ``None`` uses the index's setting, ``"all"`` every key."""

Verify = Literal["full", "fast"]
"""Check of files on loading: ``full`` reads every byte, ``fast`` only compares the size of large files."""
Norms = Literal["check", "unit", "keep"]
"""Treatment of feature rows: require norm 1, scale to norm 1, or keep any norm."""
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
"""Metrics and values that a fit can choose (:mod:`tip`)."""
TrainedPart = Literal["keys", "values", "visual", "text"]
TRAINED: tuple[TrainedPart, ...] = get_args(TrainedPart)
"""Trainable parts: keys (Tip-Adapter-F), values ``[n, c]``, and the two encoders."""
TrainingPrecision = Literal["auto", "float32", "bfloat16"]
TrainingSettings = Literal["tried", "own"]
Protocol = Literal["honest", "paper"]
"""Where settings are chosen: on the shots or a draw of validation images, or on the whole validation source."""


def check_choice(name: str, value: object, alias: object) -> None:
    """Raise UsageError unless a value is one of a ``Literal``."""
    words: tuple[str, ...] = get_args(alias)
    if value not in words:
        raise UsageError(f"{name} {value!r}: expected one of {', '.join(words)}")


ADDED_AFTER_FORMAT_1 = {"later": True}
"""Marks a setting added after format 1: it has its default in older manifests."""
FITTED = ("least_cache", "log_offset")
"""Settings that only a fit chooses; otherwise ``None``."""


@dataclass(frozen=True)
class Settings:
    """Settings of the method, ``logits = logit_scale * f W^T + alpha * C`` (:mod:`tip`). The defaults are the paper's.

    Args:
        alpha: residual ratio, the weight of the cache relative to the text (paper, equation 6); 0 or more.
        beta: sharpness of the exponential in the cache logits ``C`` (paper, equation 4); 0 or more.
        logit_scale: temperature factor of the backbone, 100 for OpenAI's CLIP; above 0.
        k: number of nearest keys per query, 1 or more; ``None`` for all, exactly Tip-Adapter.
        tail: with ``k``, estimate the contribution of the other keys (:func:`tip.cache_logits`).
        temperature: divisor of the logits in the probabilities only; above 0.
        log_offset: ``o > 0`` replaces ``C`` with ``log(1 + max(C, 0) / o)``; ``None`` keeps ``C``.
        least_cache: a query with a smaller largest cache logit is ``unlike``; ``None`` for no such check.

    Raises UsageError naming the invalid setting.
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
        """Return the settings with the given ones replaced; ``None`` keeps a setting."""
        known = {name: value for name, value in given.items() if value is not None}
        if k is not None:
            known["k"] = None if k == "all" else k
        return replace(self, **known) if known else self

    def unfitted(self) -> Self:
        """Return the settings without those that only a fit chooses."""
        return replace(self, least_cache=None, log_offset=None)

    def shown(self) -> dict[str, Any]:
        """Return the adjustable settings by name, without ``logit_scale`` and fitted ones; ``k`` may be ``all``."""
        names = (field.name for field in fields(self) if field.name not in ("logit_scale", *FITTED))
        return {name: getattr(self, name) for name in names} | {"k": self.k or "all"}


@dataclass(frozen=True)
class Fitted:
    """Metric and values that were fitted to the shots of an index (:mod:`fit.closed_form`).

    ``metric`` is ``none``, or a name from :mod:`fit.forms` with a ``shrinkage``. ``values`` is ``one-hot``, or
    ``solved`` with a ``ridge``. ``keys`` is the number of keys at that time.
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
                raise UsageError(
                    f"fitted: shrinkage {self.shrinkage} or ridge {self.ridge} do not match metric and values"
                )
        if self.ridge == 0 or not _is_whole(self.keys) or self.keys < 1:
            raise UsageError(f"fitted: ridge {self.ridge} or keys {self.keys}, expected above 0")

    @property
    def solved(self) -> bool:
        """Whether the values were solved, which ties them to one beta."""
        return self.values != "one-hot"


@dataclass(frozen=True)
class Built:
    """Build options that later changes follow, unlike the provenance, which is only a record.

    ``source`` is the name of the labelled source. ``shots`` were drawn per class (``None``: all), and a key is the mean
    of ``views``; ``seed`` drew both. ``auto_index``: the type of the index follows the number of keys.
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
            raise UsageError(f"built: invalid values {self}")


def _is_finite(value: object) -> bool:
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str | float) and value == int(value) < 2**63
    except (TypeError, ValueError, OverflowError):
        return False
