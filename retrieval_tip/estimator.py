"""Tip-Adapter as a scikit-learn classifier over features. It is a thin layer over :class:`Index`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip import tip
from retrieval_tip.arrays import FloatArray, IntArray
from retrieval_tip.backbones.base import side_by_side, unit
from retrieval_tip.backbones.loading import Model, given_backbone
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import FitRequest
from retrieval_tip.machine import install
from retrieval_tip.model import Index
from retrieval_tip.pictures import Picture, open_images
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.settings import ClassPrior, MetricName, Settings, ValuesName
from retrieval_tip.store.edits import Edits, NewKeys

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
    from sklearn.utils import Tags
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"TipAdapterClassifier needs scikit-learn 1.6 or newer ({error}); run {install('sklearn')}"
    ) from None

Array = npt.NDArray[Any]

DTYPES = [np.float64, np.float32]
"""The dtypes of rows to accept without a conversion."""


@dataclass(eq=False, repr=False)
class TipAdapterClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Tip-Adapter classifier over features.

    You can use it in pipelines, parameter searches and calibration. The rows of ``X`` that are passed to :meth:`fit`
    become the keys of a :class:`Index`. Each row is scaled to unit length, and a row of zeros stays zero. Queries are
    classified by ``logits = logit_scale * f W^T + alpha * C`` (see :mod:`retrieval_tip.tip`, and equations 4 to 6 of
    the paper). If you change a parameter later, the change takes effect at the next fit.

    ``metric``, ``values``, ``class_prior`` and ``index`` are described in :class:`settings.BuildOptions`. The first
    three require ``alpha="auto"``. ``k``, ``tail`` and ``logit_scale`` are described in :class:`settings.Settings`.

    Args:
        text_weights: the text weights ``W``, as unit vectors of shape ``[c, d]``. The rows are in the order of
            ``class_names``, or in the order of the sorted labels if ``class_names`` is not given. They are not
            normalised. If ``None``, only the shots are used.
        class_names: the ``c`` labels, in the order of ``text_weights``. Classes that do not occur in ``y`` are scored
            using only their text. Defaults to the sorted labels of ``y``.
        alpha: the weight of the cache relative to the text, which must be at least 0. If it is a number, the classifier
            is the published Tip-Adapter. If it is ``auto``, the metric, the values, alpha, beta and the temperature are
            fitted to the rows in closed form (see :func:`retrieval_tip.fit.closed_form.fit`).
        beta: the sharpness of the exponential, which must be at least 0. Defaults to 5.5. You can only set it if
            ``alpha`` is a number.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        blocks: the number of values of each encoder, if a row has the features of several side by side. How much each
            encoder counts is then fitted as well.

    Attributes:
        classes_: the sorted labels, in their original dtype.
        n_features_in_: the length ``d`` of a feature.
        feature_names_in_: the column names of ``X``, if it has any.
        index_: the underlying :class:`Index`. Its key ids are the row numbers of ``X``. Use ``index_.save`` to
            write an index.

    You can pickle a fitted estimator. As with any pickle, only load files that you trust.
    """

    text_weights: Features | None = None
    class_names: npt.ArrayLike | None = None
    _: KW_ONLY
    alpha: float | Literal["auto"] = "auto"
    beta: float | None = None
    metric: MetricName | None = None
    values: ValuesName | None = None
    class_prior: ClassPrior = "even"
    k: int | None = None
    tail: bool = True
    logit_scale: float = Settings.logit_scale
    index: str = "Flat"
    device: str = "auto"
    blocks: Sequence[int] | None = None

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fit the classifier to features of shape ``[n, d]``, which become its keys, and ``n`` labels of any type.

        Raises ValueError if ``X`` or ``y`` is invalid. Two kinds of it are InputError, if a label is not in
        ``class_names`` or ``text_weights`` do not have the shape ``[c, d]``, and UsageError, if a parameter is invalid.
        """
        return self._first(X, y, self.class_names)

    def partial_fit(
        self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None
    ) -> Self:
        """Add the rows of ``X`` to the keys. The result is the same as a :meth:`fit` on all rows so far.

        Each call rebuilds the index, so it is faster to pass many rows at once. ``classes`` lists all possible labels.
        It must be passed to the first call, unless ``class_names`` is set. A call that fails changes nothing.
        """
        if not hasattr(self, "index_"):
            if classes is None and self.class_names is None:
                raise UsageError(
                    "classes: list all classes in the first call of partial_fit, or set class_names"
                )
            if classes is not None and self.class_names is not None:
                _same_classes(classes, _classes(self.class_names, once=True)[0])
            return self._first(X, y, classes if self.class_names is None else self.class_names)
        if classes is not None:
            _same_classes(classes, self.classes_)
        rows, labels = validate_data(self, X, y, reset=False, dtype=DTYPES)
        check_classification_targets(labels)
        index: Index = self.index_
        if self._fit is not None:
            index = index.with_fit(None, None, None)  # the next fit solves the values again
        index = index.edited(
            Edits(add=NewKeys(_rows(rows, self.blocks), _ids(labels, self._names)))
        )
        if self._fit is not None:
            index, _ = closed_form.fit(index, self._fit)
        self.index_: Index = index
        return self

    def decision_function(self, X: npt.ArrayLike) -> FloatArray:
        """Return the logits ``logit_scale * f W^T + alpha * (C + gamma * B)`` of the queries ``X``.

        The result is a float32 array of shape ``[q, c]``, in the order of ``classes_``. For two classes, its shape is
        ``[q]``, and it holds the second logit minus the first, as scikit-learn requires. Raises ValueError if ``X`` is
        invalid.
        """
        logits = self._logits(X)
        scores = logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits
        return scores.float().cpu().numpy()

    def predict_proba(self, X: npt.ArrayLike) -> FloatArray:
        """Return the class probabilities ``softmax(logits / temperature)``, of shape ``[q, c]``.

        The temperature is 1 unless it was fitted.
        """
        logits = self._logits(X)
        return tip.probabilities(logits, self.index_.settings.temperature).cpu().numpy()

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label that has the largest logit, for each query in ``X``.

        If two classes are tied, the class that sorts first is returned.
        """
        scores = self.decision_function(X)
        winners = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: Array = self.classes_[winners]
        return labels

    def _first(self, X: npt.ArrayLike, y: npt.ArrayLike, labels: npt.ArrayLike | None) -> Self:
        """Fit the first rows. ``labels`` defaults to the labels in ``y``."""
        rows, targets = validate_data(self, X, y, dtype=DTYPES)
        check_classification_targets(targets)
        auto = isinstance(self.alpha, str) and self.alpha == "auto"
        if not auto and (self.metric is not None or self.values is not None):
            raise UsageError(
                'metric and values: only valid with alpha="auto"; set alpha, or remove them'
            )
        if auto and self.beta is not None:
            raise UsageError(
                'beta: is fitted with alpha="auto"; set alpha to a number, or remove beta'
            )
        alpha = Settings.alpha if auto else cast(float, self.alpha)
        beta = self.beta
        if beta is None:
            beta = Settings.beta
        settings = Settings(alpha, beta, self.logit_scale, self.k, self.tail)
        classes, order = _classes(
            targets if labels is None else labels, once=self.class_names is not None
        )
        names = classes if self.class_names is None else np.asarray(labels)
        text = self.text_weights
        if text is not None:
            text = text.detach().cpu().float().numpy() if isinstance(text, torch.Tensor) else text
            text = check_array(text, dtype=DTYPES, input_name="text_weights")
            if len(text) != len(classes):
                what = f"there are {len(text)} rows for {len(classes)} classes"
                raise InputError(f"text_weights: {what}; list all classes in class_names")
        index = Index.from_features(
            _rows(rows, self.blocks),
            _ids(targets, names),
            [str(label) or repr(label) for label in names.tolist()],
            text,
            settings=settings,
            index=self.index,
            device=self.device,
            blocks=self.blocks or (),
        )
        fit = FitRequest(self.metric, self.values, self.class_prior) if auto else None
        if fit is not None:
            index, _ = closed_form.fit(index, fit)
        self.classes_: Array = classes
        self.index_ = index
        self._fit: FitRequest | None = fit
        self._names: Array = names
        self._order: Array | None = None if self.class_names is None else order
        return self

    def _queries(self, X: npt.ArrayLike) -> FloatArray:
        check_is_fitted(self, "index_")
        return _rows(validate_data(self, X, reset=False, dtype=DTYPES), self.blocks)

    def _logits(self, X: npt.ArrayLike) -> torch.Tensor:
        features = self._queries(
            X
        )  # must come first, because it raises an error if the estimator is not fitted
        queries = self.index_.queries(features)
        if (
            self.index_.values is not None
        ):  # in float32, the rounding errors of such values depend on the batch
            queries = queries.double()
        logits = self.index_.retrieval.answer(queries, self.index_.settings)[1]
        return logits if self._order is None else logits[:, self._order]


def _rows(X: Array, blocks: Sequence[int] | None = None) -> FloatArray:
    """Convert rows to float32, and scale every nonzero row, or each of its ``blocks``, to one length."""
    if blocks:
        return side_by_side([_rows(block) for block in np.split(X, np.cumsum(blocks)[:-1], axis=1)])
    _, exponent = np.frexp(np.abs(X).max(axis=1, keepdims=True))
    X = np.ldexp(
        X.astype(np.float64), -exponent
    )  # scaling by a power of 2 is exact and prevents overflow
    rows = np.zeros(X.shape, dtype=np.float32)
    some = X.any(axis=1)
    rows[some] = unit(X[some])
    return rows


def _classes(labels: npt.ArrayLike, *, once: bool) -> tuple[Array, Array]:
    array = np.asarray(labels)
    try:
        classes, order = np.unique(array, return_index=True)
    except TypeError:
        raise InputError(
            "classes: labels of different types cannot be sorted; use one type"
        ) from None
    if array.ndim != 1 or (once and len(classes) < len(array)):
        distinct = f"shape {array.shape} has {len(classes)} distinct labels"
        raise InputError(f"class_names: {distinct}; list each label exactly once")
    return classes, order


def _same_classes(labels: npt.ArrayLike, classes: Array) -> None:
    if not np.array_equal(_classes(labels, once=False)[0], classes):
        raise UsageError(
            "classes: these are not the classes of the first call; omit them, or call fit again"
        )


def _ids(labels: Array, classes: Array) -> IntArray:
    position = {label: i for i, label in enumerate(classes.tolist())}
    ids = np.array([position.get(label, -1) for label in labels.tolist()], dtype=np.int64)
    if (ids < 0).any():
        row = int(np.argmin(ids))
        raise InputError(f"y: row {row} is {labels[row]!r}, not one of the {len(classes)} classes")
    return ids


@dataclass(eq=False, repr=False)
class ImageEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Transformer that converts photos to features of unit norm.

    It can start a pipeline, for example ``make_pipeline(ImageEncoder("ViT-B-32"), TipAdapterClassifier())``.

    Args:
        model: the encoder, as for :func:`loading.given_backbone`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    model: Model = None
    device: str = "auto"

    def __sklearn_clone__(self) -> Self:
        return type(self)(self.model, self.device)  # the same backbone, since a copy may be large

    def fit(self, X: object, y: object = None) -> Self:
        """Load the backbone. If you do not call this method, the first call of :meth:`transform` does."""
        self.backbone_ = given_backbone(self.model, self.device)
        return self

    def transform(self, X: Picture | Iterable[Picture]) -> FloatArray:
        """Return the features of photos, such as paths, PIL images or arrays, as a float32 array of shape ``[n, d]``.

        Raises InputError if an image cannot be read.
        """
        if not hasattr(self, "backbone_"):
            self.fit(X)
        reader = Reader(self.backbone_, cache=EncodingCache.default())
        return unit(reader.encode(open_images(X)).features)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.requires_fit = False
        return tags
