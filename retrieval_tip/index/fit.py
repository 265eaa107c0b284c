"""Fit an index to its shots as a new version, in any store."""

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
    """Fit metric, values and settings of an index (:func:`closed_form.fit`), and write a new version.

    Args:
        folder: the index.
        metric: ``none`` or ``within``; ``None`` lets the fit choose.
        values: ``one-hot`` or ``solved``; ``None`` lets the fit choose.
        validation: labelled images or features to choose by, instead of the held-out shots; they need an ``encoder``.
        encoder: backbone and caching, as for the index.

    Raises as :func:`closed_form.fit`, and StoreError as :meth:`Store.load` and :meth:`Store.change`. An error changes
    nothing.
    """
    queries = None
    if validation is not None and encoder is not None:
        queries = functools.partial(on_validation, source=validation, encoder=encoder)
    return places.at(folder).fit(metric, values, queries)
