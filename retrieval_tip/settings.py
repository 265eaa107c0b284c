"""What a user can set: the settings of an index, a question, a build and a training."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, TypedDict, get_args

from retrieval_tip.errors import UsageError, check_count

KeysMet = int | Literal["all"] | None
"""Number of nearest keys to use in a call. ``None`` uses the setting of the index, and ``"all"`` uses every key."""

Verify = Literal["full", "fast"]
"""How files are checked when an index is loaded.

``full`` reads every byte. ``fast`` only compares the sizes of large files.
"""
Norms = Literal["check", "unit", "keep"]
"""How the norms of features are treated: check that they are 1, scale features to norm 1, or keep any norm."""
Precision = Literal["auto", "float32", "float16", "bfloat16", "int8"]
"""Precision of an encoder.

``auto`` is float32, except that an encoder on a GPU uses float16. ``int8`` only affects encoding images on a CPU.
"""
Dtype = Literal["float32", "float16"]
"""Dtype of the stored keys."""
FitName = Literal["auto", "none"]
MetricName = Literal["none", "within"]
ValuesName = Literal["one-hot", "solved"]
VALUES = get_args(ValuesName)
"""The values that a fit can select (see :mod:`tip`)."""
TrainedPart = Literal["keys", "values"]
TRAINED: tuple[TrainedPart, ...] = get_args(TrainedPart)
"""The parts that can be trained: the keys (as in Tip-Adapter-F), and the values."""
ClassPrior = Literal["even", "shots"]
"""The frequencies of the classes among future photos: all equal, or as in the shots."""


def check_choice(name: str, value: object, alias: object) -> None:
    """Raise UsageError if the value is not one of the options of a ``Literal`` type."""
    options: tuple[str, ...] = get_args(alias)
    if value not in options:
        raise UsageError(f"{name} {value!r}: expected one of {', '.join(options)}")


FITTED = ("gamma", "least_cache", "log_offset")
"""Settings that only a fit can set. If an index has not been fitted, they have their defaults."""


@dataclass(frozen=True)
class Settings:
    """The settings of the method, ``logits = logit_scale * f W^T + alpha * C + gamma * B`` (see :mod:`tip`).

    The defaults come from the paper.

    Args:
        alpha: the residual ratio, which is the weight of the cache relative to the text (equation 6 of the paper). It
            must be 0 or more.
        beta: the sharpness of the exponential in the cache logits ``C`` (equation 4 of the paper). It must be 0 or
            more.
        logit_scale: the factor of the text logits, which depends on the backbone and must be above 0. For OpenAI's
            CLIP, it is 100.
        k: the number of nearest keys to use per query. If it is ``None``, all keys are used, as in Tip-Adapter.
        tail: whether to estimate the contribution of the other keys, if ``k`` is set (see :func:`tip.cache_logits`).
        temperature: the divisor of the logits, which is only used for probabilities. It must be above 0.
        log_offset: the offset ``o`` of the link, which must be above 0. If it is given, ``log(1 + max(C, 0) / o)``
            replaces ``C``.
        gamma: the weight of the discriminant ``B`` (see :class:`tip.Discriminant`), which must be 0 or more.
        least_cache: a threshold for the largest cache logit of a query among the classes that have keys. Queries below
            it have no match. If it is ``None``, queries are not checked.

    Raises UsageError if a setting is invalid.
    """

    alpha: float = 1.0
    beta: float = 5.5
    logit_scale: float = 100.0
    k: int | None = None
    tail: bool = True
    temperature: float = 1.0
    least_cache: float | None = None
    log_offset: float | None = None
    gamma: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "logit_scale", "temperature"):
            value = getattr(self, name)
            above = name in ("logit_scale", "temperature")
            if not is_finite(value) or value < 0 or (above and value == 0):
                range_ = " above 0" if above else ", 0 or more"
                raise UsageError(f"{name} is {value}: expected a finite number{range_}")
            object.__setattr__(self, name, float(value))
        if self.k is not None:
            if not is_whole(self.k) or self.k < 1:
                raise UsageError(
                    f"k is {self.k}: expected a whole number of keys, at least 1, or all"
                )
            object.__setattr__(self, "k", int(self.k))
        object.__setattr__(self, "tail", bool(self.tail))
        if self.least_cache is not None and not is_finite(self.least_cache):
            raise UsageError(
                f"least_cache is {self.least_cache}: expected a finite number, or None"
            )
        if self.log_offset is not None and not (is_finite(self.log_offset) and self.log_offset > 0):
            raise UsageError(
                f"log_offset is {self.log_offset}: expected a finite number above 0, or None"
            )
        for name in FITTED:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def override(self, *, k: KeysMet = None, **settings: Any) -> Self:
        """Return a copy with the given settings. A setting that is ``None`` keeps its current value."""
        changed = {name: value for name, value in settings.items() if value is not None}
        if k is not None:
            changed["k"] = None if k == "all" else k
        return replace(self, **changed) if changed else self

    def unfitted(self) -> Self:
        """Return a copy where all settings that only a fit can set have their default."""
        return replace(self, gamma=0.0, least_cache=None, log_offset=None)

    def shown(self) -> dict[str, Any]:
        """Return the settings that a user can adjust, by name. If all keys are used, ``k`` is ``all``."""
        names = (field.name for field in fields(self) if field.name not in ("logit_scale", *FITTED))
        return {name: getattr(self, name) for name in names} | {"k": self.k or "all"}


OVERRIDES = ("alpha", "beta", "k", "tail")
"""The settings that a question can replace, and a build can choose, by name."""


class AskOptions(TypedDict, total=False):
    """The fields of :class:`Ask` as keyword arguments."""

    k: KeysMet
    tail: bool | None
    alpha: float | None
    beta: float | None
    top: int
    neighbours: int
    logits: bool
    without: Sequence[int]
    at_least: float | None
    coverage: float | None


@dataclass(frozen=True)
class Ask:
    """What to find out about queries. It is passed unchanged from every caller to :meth:`model.Index.answers`.

    Raises UsageError if ``top`` is below 1 or ``neighbours`` below 0, if ``at_least`` or ``coverage`` is not between 0
    and 1, or if both are given.

    Attributes:
        k: The number of nearest keys to use per query. [default: the setting of the index]
        tail: Whether to estimate the contribution of keys that are not retrieved. [default: the setting of the index]
        alpha: The weight of the cache relative to the text. [default: the setting of the index]
        beta: The sharpness of the affinity. [default: the setting of the index]
        top: The number of classes to report, most probable first.
        neighbours: The number of shots to report, largest contribution first (see
            :class:`retrieval.evidence.Contributors`). If ``k`` is a number, only retrieved keys are reported.
        logits: Whether to report the logits of all classes.
        without: The ids of keys to leave out, as if the index did not have them. Solved values are not solved again.
            An index of the type Classes then uses all of the other keys. Unknown ids are ignored. The keys are copied,
            so they may take at most 512 MiB.
        at_least: Answer with the class, or else the narrowest group, whose probability is at least P, or with no label
            (see :class:`Levels`). In the mean over photos like the shots, at least P of the answers are right.
        coverage: Add a set of classes to each photo with a match (see :mod:`retrieval.conformal`). In the mean over
            photos like the shots, at least the share C of sets has the right class. A single set has no guarantee.
    """

    k: KeysMet = None
    tail: bool | None = None
    alpha: float | None = None
    beta: float | None = None
    top: int = 1
    neighbours: int = 5
    logits: bool = True
    without: Sequence[int] = ()
    at_least: float | None = None
    coverage: float | None = None

    def __post_init__(self) -> None:
        check_count("top", self.top)
        check_count("neighbours", self.neighbours, 0)
        for name in ("at_least", "coverage"):
            share = getattr(self, name)
            if share is not None and not (is_finite(share) and 0 <= share <= 1):
                raise UsageError(f"{name} is {share}: give a share, 0 to 1")
        if self.at_least is not None and self.coverage is not None:
            raise UsageError("at_least and coverage: give only one")
        object.__setattr__(self, "without", tuple(self.without))

    def settings(self, defaults: Settings) -> Settings:
        """Return the settings of an index, as changed by this question."""
        return defaults.override(**{name: getattr(self, name) for name in OVERRIDES})


class BuildOptions(TypedDict, total=False):
    """The options of a build. Python functions take them as keyword arguments, and ``index build`` as options.

    Attributes:
        shots: The number of shots to draw per class, by CoOp's sampling rule (see :func:`source.few_shot`). By default,
            all photos are used.
        templates: Prompt templates for the text weights, in which {} stands for the class name. They require an
            encoder with text.
        text: A feature table of text features labelled by class, with one or more prompts per class, which is used
            instead of templates. The index uses the classes of this table, in the same order.
        index: A FAISS factory string, Classes or auto (see :func:`keys.auto_for`). Classes searches all keys of the
            likeliest classes, and auto selects an index by the number of keys. At an address, give Flat, Classes or
            auto. Defaults to Flat, and to auto at an address.
        dtype: The data type of the stored keys. Defaults to float32.
        alpha: The weight of the cache relative to the text. By default, it is fitted to the shots.
        beta: The sharpness of the affinity. By default, it is fitted to the shots.
        fit: With auto, the metric, values, alpha, beta and temperature are fitted to the shots (see
            :func:`closed_form.fit`). With none, the index is plain Tip-Adapter, and the spread of the affinities gives
            a missing alpha or beta. Defaults to auto, or to none if alpha or beta is given.
        metric: The similarity metric. With within, directions in which photos of the same class differ count less. By
            default, it is selected on the shots.
        values: The weights of the keys for each class. With solved, they are computed by ridge regression. By default,
            they are selected on the shots.
        class_prior: The frequencies of the classes among the photos to classify: even, or as in the shots. Defaults to
            even.
        prior: Other indexes of the same encoder. Their photos show how much photos of one class differ, which helps if
            there are few shots.
        k: The number of nearest keys to use per query, or all. By default, all keys are used, or the number that is
            selected with the index type auto.
        logit_scale: The factor of the text logits. Defaults to the logit scale of the encoder, or
            to 100.
        features: The columns of a feature table that hold the features of several encoders, such as feature,feature_2.
            By default, they are the columns that name their encoder, or the column feature.
        groups: A table of broader groups, such as genus and family. The first column has the classes, and each of up to
            16 further columns their groups, narrowest first.
    """

    shots: int | None
    templates: Sequence[str]
    text: str | os.PathLike[str] | None
    index: str | None
    dtype: Dtype
    alpha: float | None
    beta: float | None
    fit: FitName | None
    metric: MetricName | None
    values: ValuesName | None
    class_prior: ClassPrior | None
    prior: Sequence[str | os.PathLike[str]]
    k: KeysMet
    logit_scale: float | None
    features: Sequence[str]
    groups: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Recipe:
    """A recipe for fine-tuning, with the defaults of the paper. Raises UsageError if an option is invalid.

    Attributes:
        train: Part of the index to train.
        epochs: Number of passes over the shots.
        lr: Initial learning rate, which decays along a cosine.
        seed: Seed for drawing batches and views.
    """

    train: tuple[TrainedPart, ...] = ("keys",)
    epochs: int = 20
    lr: float = 1e-3
    seed: int = 1

    def __post_init__(self) -> None:
        if (
            not self.train
            or len(set(self.train)) < len(self.train)
            or not set(self.train) <= set(TRAINED)
        ):
            raise UsageError(
                f"train {', '.join(self.train) or '(nothing)'}: expected some of {', '.join(TRAINED)}"
            )
        for name, fewest in (("epochs", 1), ("seed", 0)):
            check_count(name, getattr(self, name), fewest)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"lr is {self.lr}: expected a finite number above 0")


def is_finite(value: object) -> bool:
    """Return whether a value from a file is a finite number."""
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False


def is_whole(value: Any) -> bool:
    """Return whether a value from a file is a whole number that 64 bits can hold."""
    try:
        return not isinstance(value, bool | str | float) and value == int(value) < 2**63
    except (TypeError, ValueError, OverflowError):
        return False
