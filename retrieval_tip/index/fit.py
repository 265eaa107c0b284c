"""Fit an index to its shots and write the result to its store as a new version."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import numpy as np

from retrieval_tip.backbones.base import Identity, same_backbone
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import Source
from retrieval_tip.fit.closed_form import Fit, FormChoice
from retrieval_tip.fit.scatter import FloatArray, pooled
from retrieval_tip.fit.search_hp import on_validation
from retrieval_tip.index import places
from retrieval_tip.index.places import Place
from retrieval_tip.settings import ClassPrior, MetricName, ValuesName
from retrieval_tip.store.sums import Sums


def fit_index(
    folder: Place,
    *,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    class_prior: ClassPrior | None = None,
    prior: Sequence[Place] = (),
    validation: Source | None = None,
    reader: Reader | None = None,
) -> FormChoice:
    """Fit the metric, values and settings of an index with :func:`closed_form.fit`, and write a new version.

    Args:
        folder: the index.
        metric: ``none`` or ``within``. If ``None``, the fit selects the metric.
        values: ``one-hot`` or ``solved``. If ``None``, the fit selects the values.
        class_prior: ``even`` if future photos are about equally often from each class, or ``shots`` if the classes
            are as frequent as in the shots. Defaults to the choice of the previous fit.
        prior: other indexes of the same encoder. The scatter of their photos around their class means helps if there
            are few shots (see :func:`scatter.pooled`). It is kept for later fits.
        validation: labelled images or features to use for the selection instead of the held-out shots. They require an
            ``reader``.
        reader: sets the backbone (the same as for the index) and the cache.

    Raises the errors of :func:`closed_form.fit`. If an error occurs, the index stays unchanged.
    """
    queries = None
    if validation is not None and reader is not None:
        queries = functools.partial(on_validation, source=validation, reader=reader)
    store = places.at(folder)
    manifest = store.manifest()
    before = "even" if manifest.fitted is None else manifest.fitted.class_prior
    asked = Fit(metric, values, class_prior or before, prior_of(prior, manifest.identity))
    return store.fit(asked, queries)


def prior_of(indexes: Place | Sequence[Place], backbone: Identity | None) -> FloatArray | None:
    """Return the scatter of the photos of other indexes, or ``None`` if there are no indexes.

    Raises BackboneError if an index has another ``backbone``. Raises InputError if no class has two photos.
    """
    found = []
    for place in [indexes] if isinstance(indexes, str | os.PathLike) else indexes:
        other = places.at(place).load(device="cpu")
        if backbone is not None and other.backbone is not None:
            same_backbone(other.backbone, backbone, f"prior {place}")
        blocks = ((keys, labels["class_id"].to_numpy().astype(np.int64)) for labels, keys in other.rows.blocks())
        found.append(Sums.of(blocks, len(other.class_names), other.d))
    return pooled(found) if found else None
