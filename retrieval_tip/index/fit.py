"""Fit an index to its shots anew, as a new version."""

from __future__ import annotations

import os
from pathlib import Path

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import Choice
from retrieval_tip.fit.search_hp import on_validation


def fit_index(
    folder: str | os.PathLike[str],
    *,
    metric: str | None = None,
    values: str | None = None,
    validation: Source | None = None,
    encoder: Encoder | None = None,
) -> Choice:
    """Fit metric, values and settings of an index folder (:func:`closed_form.fit`), and write a new version.

    Args:
        folder: the index.
        metric: ``none`` or ``within``, where it is not to be chosen.
        values: ``one-hot`` or ``solved``, where they are not to be chosen.
        validation: labelled images or features to judge by, in place of the shots; they need an ``encoder``.
        encoder: backbone and caching, as the index's.

    Raises as :func:`closed_form.fit`, and StoreError as :meth:`CacheModel.load` and :meth:`CacheModel.save`; then
    nothing was changed.
    """
    cache = CacheModel.load(folder, device="cpu")
    queries = None
    if validation is not None and encoder is not None:
        queries = on_validation(cache, validation, encoder)
    if cache.segments > 1:
        cache.compact()
    choice = closed_form.fit(cache, metric=metric, values=values, validation=queries)
    cache.save(Path(folder), "fit")
    return choice
