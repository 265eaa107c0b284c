"""Fit an index to its shots and write the result to its store as a new version."""

from __future__ import annotations

import functools

from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.fit.closed_form import FormChoice
from retrieval_tip.fit.search_hp import on_validation
from retrieval_tip.index import places
from retrieval_tip.index.places import Place
from retrieval_tip.settings import MetricName, ValuesName


def fit_index(
    folder: Place,
    *,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    validation: Source | None = None,
    encoder: Encoder | None = None,
) -> FormChoice:
    """Fit the metric, values and settings of an index with :func:`closed_form.fit`, and write a new version.

    Args:
        folder: the index.
        metric: ``none`` or ``within``. If ``None``, the fit selects the metric.
        values: ``one-hot`` or ``solved``. If ``None``, the fit selects the values.
        validation: labelled images or features to use for the selection instead of the held-out shots. They require an
            ``encoder``.
        encoder: sets the backbone (the same as for the index) and the cache.

    Raises the errors of :func:`closed_form.fit`. If an error occurs, the index stays unchanged.
    """
    queries = None
    if validation is not None and encoder is not None:
        queries = functools.partial(on_validation, source=validation, encoder=encoder)
    return places.at(folder).fit(metric, values, queries)
