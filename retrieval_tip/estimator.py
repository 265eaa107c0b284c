"""Tip-Adapter as a scikit-learn classifier over features: a thin layer over :class:`CacheModel`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip import tip
from retrieval_tip.backbones.base import Backbone, resolve_device, unit
from retrieval_tip.backbones.loading import load_backbone
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.pictures import Picture, pictures
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.fit import closed_form
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.retrieval.keys import index_over
from retrieval_tip.settings import MetricName, Settings, ValuesName

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
    from sklearn.utils import Tags
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"TipAdapterClassifier needs scikit-learn 1.6 or newer ({error}); pip install 'retrieval-tip[sklearn]'"
    ) from None

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]


class TipAdapterClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Tip-Adapter over features, with scikit-learn's interface: for its searches, pipelines and calibration.

    The rows of ``X`` given to :meth:`fit` become the keys of a :class:`CacheModel`, which answers every query:
    ``logits = logit_scale * f W^T + alpha * C`` (:mod:`retrieval_tip.tip`; the paper's equations 4 to 6). :meth:`fit`
    and the first :meth:`partial_fit` read the parameters; later changes take effect at the next fit.

    Args:
        text_weights: unit vectors ``W`` ``[c, d]``, one per class in sorted order (or the order of ``class_names``),
            used unchanged. ``None`` classifies by the shots alone.
        class_names: the ``c`` labels in the order of ``text_weights``. Classes missing in ``y`` are scored by their
            text alone. ``None``: the sorted labels of ``y``.
        alpha: weight of the cache relative to the text; at least 0. ``auto`` fits metric, values, alpha, beta and
            temperature to the rows in closed form, like ``retrieval-tip index build``
            (:func:`retrieval_tip.fit.closed_form.fit`). A number is Tip-Adapter as published.
        beta: sharpness of the exponential; at least 0, by default 5.5. Needs a number as ``alpha``.
        metric: with ``alpha="auto"``: ``none`` or ``within``; ``None`` lets the fit choose.
        values: with ``alpha="auto"``: ``one-hot`` or ``solved``; ``None`` lets the fit choose.
        k: number of nearest keys per query; ``None`` uses every key, Tip-Adapter exactly.
        tail: with ``k``, estimate the contribution of the other keys.
        logit_scale: factor of the text logits, the backbone's own (100 for OpenAI's CLIP).
        index: FAISS factory string: ``Flat``, ``IVF256,Flat``, ``HNSW32`` ...
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        normalize: scale each row of ``X`` to unit length. A zero row has no direction and stays zero: its affinity to
            every key is 0, so as a query it gets the class with the most keys. ``False`` uses rows unchanged, for
            fine-tuned keys, which are not unit vectors.

    Attributes:
        classes_: the sorted labels ``[c]``, in their original dtype.
        n_features_in_: ``d``, the length of a feature.
        feature_names_in_: column names ``[d]``, if ``X`` had any.
        cache_: the underlying :class:`CacheModel`, whose key ids are rows of ``X``; ``cache_.save`` writes an index.

    A fitted estimator can be pickled. The FAISS index is rebuilt from the keys, so an approximate one may retrieve
    slightly different keys. As with any pickle, only open your own.
    """

    classes_: Array
    n_features_in_: int
    cache_: CacheModel
    _letters: tuple[MetricName | None, ValuesName | None] | None

    def __init__(
        self,
        text_weights: Features | None = None,
        class_names: npt.ArrayLike | None = None,
        *,
        alpha: float | Literal["auto"] = "auto",
        beta: float | None = None,
        metric: MetricName | None = None,
        values: ValuesName | None = None,
        k: int | None = None,
        tail: bool = True,
        logit_scale: float = Settings.logit_scale,
        index: str = "Flat",
        device: str = "auto",
        normalize: bool = True,
    ) -> None:
        self.text_weights = text_weights
        self.class_names = class_names
        self.alpha = alpha
        self.beta = beta
        self.metric = metric
        self.values = values
        self.k = k
        self.tail = tail
        self.logit_scale = logit_scale
        self.index = index
        self.device = device
        self.normalize = normalize

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Use the rows of ``X`` ``[n, d]`` (real, finite) as keys, with labels ``y`` ``[n]`` of any type.

        Raises:
            ValueError: scikit-learn rejects ``X`` or ``y``.
            InputError: a label is not in ``class_names``, or ``text_weights`` are not ``[c, d]``. A ValueError too.
            UsageError: alpha, beta, k, logit_scale, index or device is invalid. A ValueError too.
        """
        return self._first(X, y, self.class_names)

    def partial_fit(self, X: npt.ArrayLike, y: npt.ArrayLike, classes: npt.ArrayLike | None = None) -> Self:
        """Add the rows of ``X`` ``[m, d]`` with labels ``y`` ``[m]`` to the keys.

        The result equals :meth:`fit` on all rows so far. Each call rebuilds the index, and fits again with
        ``alpha="auto"``, so pass many rows at once. ``classes`` lists all possible labels; the first call needs it
        unless ``class_names`` are set. Raises as :meth:`fit`; an error changes nothing.
        """
        if not hasattr(self, "cache_"):
            if classes is None and self.class_names is None:
                raise UsageError("classes: missing; list all classes in the first partial_fit, or set class_names")
            if classes is not None and self.class_names is not None:
                _same_classes(classes, _classes(self.class_names, once=True)[0])
            return self._first(X, y, classes if self.class_names is None else self.class_names)
        if classes is not None:
            _same_classes(classes, self.classes_)
        rows, labels = validate_data(self, X, y, reset=False, dtype=_dtypes(self._normalize))
        check_classification_targets(labels)
        cache = copy.copy(self.cache_)  # so that an error below changes nothing
        if self._letters is not None:
            cache.set_fitted(None, None, None)  # the new fit solves the values
        cache.add(_rows(rows, self._normalize), _ids(labels, self._names))
        if self._letters is not None:
            cache.compact()
            closed_form.fit(cache, metric=self._letters[0], values=self._letters[1])
        self.cache_ = cache
        return self

    def decision_function(self, X: npt.ArrayLike) -> FloatArray:
        """Return the logits ``logit_scale * f W^T + alpha * C`` of queries ``X`` ``[q, d]``, float32.

        The shape is ``[q, c]``, in the order of ``classes_``. For two classes it is ``[q]``: the second logit minus the
        first, as scikit-learn requires. Raises NotFittedError, ValueError for an invalid ``X``, and InputError if
        logits overflow, which can happen without ``normalize``.
        """
        logits = self._logits(X)
        scores = logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits
        array: FloatArray = scores.float().cpu().numpy()
        return array

    def predict_proba(self, X: npt.ArrayLike) -> FloatArray:
        """Return ``softmax(logits / temperature)`` of queries ``X`` ``[q, d]``: ``[q, c]`` float32.

        The temperature is 1 unless fitted. Errors as for :meth:`decision_function`.
        """
        logits = self._logits(X)
        probabilities: FloatArray = tip.probabilities(logits, self.cache_.settings.temperature).cpu().numpy()
        return probabilities

    def predict(self, X: npt.ArrayLike) -> Array:
        """Return the label with the largest logit for each query ``X`` ``[q, d]``: ``[q]``, of ``classes_``'s dtype.

        Ties go to the class that sorts first. Errors as for :meth:`decision_function`.
        """
        scores = self.decision_function(X)
        labels: Array = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
        return labels

    def kneighbors(self, X: npt.ArrayLike, n_neighbors: int = 5) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Return the nearest keys of queries ``X`` ``[q, d]``.

        Returns affinities (inner products, not distances) ``[q, m]`` float32, largest first, and the row numbers
        ``[q, m]`` int64 of the keys in the fitted ``X``, counted across calls of :meth:`partial_fit`. ``m`` is
        ``n_neighbors`` or, if smaller, the number of keys. Slots that an approximate index leaves empty have affinity
        -inf and row -1. Raises UsageError if ``n_neighbors`` is below 1, otherwise as :meth:`decision_function`.
        """
        features = self._queries(X)
        if not (isinstance(n_neighbors, int | np.integer) and n_neighbors >= 1):
            raise UsageError(f"n_neighbors is {n_neighbors}: expected a whole number, at least 1")
        queries = torch.from_numpy(features).to(self.cache_.device)
        nearest, rows = self.cache_.nearest(queries, int(n_neighbors))
        affinity = np.where(rows < 0, -np.inf, nearest.cpu().numpy()).astype(np.float32)
        order = np.argsort(-affinity, axis=1, kind="stable")  # a compressed index orders by its own affinities
        key_ids = np.where(rows < 0, -1, self.cache_.labels["key_id"].to_numpy()[rows])
        return np.take_along_axis(affinity, order, axis=1), np.take_along_axis(key_ids, order, axis=1)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        cache = state.get("cache_")
        if cache is not None:
            parts = {field.name: getattr(cache, field.name) for field in fields(cache)}
            state["cache_"] = parts | {"index": cache.index.factory, "text_weights": cache.text_weights.cpu()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = state.get("cache_")
        if parts is not None:
            device = resolve_device(state["device"])
            ids = parts["labels"]["class_id"].to_numpy().astype(np.int64)
            keys = parts["keys"] if parts["points"] is None else parts["points"]
            index = index_over(keys, ids, len(parts["class_names"]), parts["index"], device)
            state = state | {"cache_": CacheModel(**parts | {"index": index, "device": device})}
        super().__setstate__(state)

    def _first(self, X: npt.ArrayLike, y: npt.ArrayLike, labels: npt.ArrayLike | None) -> Self:
        """Fit on the first rows; ``labels`` lists all classes, ``None`` takes the labels of ``y``."""
        normalize = bool(self.normalize)
        rows, own = validate_data(self, X, y, dtype=_dtypes(normalize))
        check_classification_targets(own)
        auto = isinstance(self.alpha, str) and self.alpha == "auto"
        if not auto and (self.metric is not None or self.values is not None):
            raise UsageError('metric and values: need alpha="auto"; set it, or remove them')
        if auto and self.beta is not None:
            raise UsageError('beta: alpha="auto" fits it; give a number as alpha too, or remove beta')
        alpha = Settings.alpha if auto else cast(float, self.alpha)
        settings = Settings(
            alpha, Settings.beta if self.beta is None else self.beta, self.logit_scale, self.k, self.tail
        )
        classes, order = _classes(own if labels is None else labels, once=self.class_names is not None)
        names = classes if self.class_names is None else np.asarray(labels)
        text = self.text_weights
        if text is not None:
            text = text.detach().cpu().float().numpy() if isinstance(text, torch.Tensor) else text
            text = check_array(text, dtype=_dtypes(normalize), input_name="text_weights")
            if len(text) != len(classes):
                raise InputError(
                    f"text_weights: {len(text)} rows for {len(classes)} classes; list all classes in class_names"
                )
        cache = CacheModel.from_features(
            _rows(rows, normalize), _ids(own, names), [str(label) or repr(label) for label in names.tolist()], text,
            settings=settings, index=self.index, device=self.device,
        )  # fmt: skip
        if auto:
            closed_form.fit(cache, metric=self.metric, values=self.values)
        self._letters = (self.metric, self.values) if auto else None
        self.classes_, self.cache_, self._normalize = classes, cache, normalize
        self._names, self._order = names, None if self.class_names is None else order
        return self

    def _queries(self, X: npt.ArrayLike) -> FloatArray:
        check_is_fitted(self, "cache_")
        return _rows(validate_data(self, X, reset=False, dtype=_dtypes(self._normalize)), self._normalize)

    def _logits(self, X: npt.ArrayLike) -> torch.Tensor:
        """Return logits ``[q, c]`` of queries, in the order of ``classes_``."""
        features = self._queries(X)  # first, so that it raises if not fitted
        cache = self.cache_
        logits = cache.logits(features) if cache.values is None else cache.exact_logits(features)
        return logits if self._order is None else logits[:, self._order]


def _dtypes(normalize: bool) -> list[type] | type:
    """Return dtypes for scikit-learn's validation; unscaled rows have to fit the float32 of a key."""
    return [np.float64, np.float32] if normalize else np.float32


def _rows(X: Array, normalize: bool) -> FloatArray:
    """Return features ``[m, d]`` float32; normalising gives every nonzero row length 1, at any scale."""
    if not normalize:
        return np.require(X, np.float32, ["C", "W"])
    _, exponent = np.frexp(np.abs(X).max(axis=1, keepdims=True))
    X = np.ldexp(X.astype(np.float64), -exponent)  # exact, so that no length over- or underflows
    rows = np.zeros(X.shape, dtype=np.float32)
    some = X.any(axis=1)
    rows[some] = unit(X[some])
    return rows


def _classes(labels: npt.ArrayLike, *, once: bool) -> tuple[Array, Array]:
    """Return the sorted distinct labels, and the position of each in the given ones."""
    given = np.asarray(labels)
    try:
        classes, order = np.unique(given, return_index=True)
    except TypeError:
        raise InputError("classes: labels of different types cannot be sorted; use one type") from None
    if given.ndim != 1 or (once and len(classes) < len(given)):
        raise InputError(f"class_names: shape {given.shape}, {len(classes)} distinct labels; give each label once")
    return classes, order


def _same_classes(given: npt.ArrayLike, known: Array) -> None:
    if not np.array_equal(_classes(given, once=False)[0], known):
        raise UsageError("classes: differ from the first call's; remove them, or fit again")


def _ids(labels: Array, classes: Array) -> npt.NDArray[np.int64]:
    position = {label: i for i, label in enumerate(classes.tolist())}
    ids = np.array([position.get(label, -1) for label in labels.tolist()], dtype=np.int64)
    if (ids < 0).any():
        row = int(np.argmin(ids))
        raise InputError(f"y: row {row} is {labels[row]!r}, not one of the {len(classes)} classes")
    return ids


class ImageEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """A transformer from photos to unit features ``[n, d]`` float32, for pipelines that begin with paths.

    ``make_pipeline(ImageEncoder("ViT-B-32"), TipAdapterClassifier())``. It needs no fitting.

    Args:
        model: name of a backbone, or a backbone (:func:`load_backbone`).
        pretrained: tag or weights of a named backbone.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    def __init__(
        self, model: str | Backbone | None = None, pretrained: str | None = None, device: str = "auto"
    ) -> None:
        self.model = model
        self.pretrained = pretrained
        self.device = device

    def fit(self, X: object, y: object = None) -> Self:
        """Load the backbone. Raises as :func:`load_backbone`."""
        if self.model is None or isinstance(self.model, str):
            self.backbone_: Backbone = load_backbone(self.model, self.pretrained, device=self.device)
        else:
            self.backbone_ = self.model
        return self

    def transform(self, X: Picture | Iterable[Picture]) -> FloatArray:
        """Return features of paths, PIL images or arrays ``[n]``. Raises InputError naming unreadable ones."""
        check_is_fitted(self, "backbone_")
        given = pictures(X)
        encoder = Encoder(self.backbone_, cache=EncodingCache.at(None), read=given.read, strict=True)
        return unit(encoder.encode(given.source).features)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array, tags.requires_fit = True, False, False
        return tags
