"""Fit an index to its shots, anew as a new version, wherever it lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.sources import Source
from retrieval_tip.errors import StoreError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import Choice
from retrieval_tip.fit.search_hp import Queries, on_validation
from retrieval_tip.index import places
from retrieval_tip.index.places import Place
from retrieval_tip.lance.draft import LanceDraft
from retrieval_tip.lance.key_table import CLASSES
from retrieval_tip.lance.shots import TableShots
from retrieval_tip.retrieval.ridge import MOST_SOLVED
from retrieval_tip.settings import MetricName, ValuesName

if TYPE_CHECKING:
    from retrieval_tip.index.places import Draft


def fit_index(
    folder: Place,
    *,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    validation: Source | None = None,
    encoder: Encoder | None = None,
) -> Choice:
    """Fit metric, values and settings of an index (:func:`closed_form.fit`), and write a new version.

    Args:
        folder: the index; in a LanceDB store as :func:`fit_table`.
        metric: ``none`` or ``within``, where it is not to be chosen.
        values: ``one-hot`` or ``solved``, where they are not to be chosen.
        validation: labelled images or features to judge by, in place of the shots; they need an ``encoder``.
        encoder: backbone and caching, as the index's.

    Raises as :func:`closed_form.fit`, and StoreError as :meth:`CacheModel.load` and :meth:`CacheModel.save`; then
    nothing was changed.
    """
    place = places.at(folder)
    if isinstance(place, places.LanceStore):
        model = place.load(device="cpu")
        queries = None if validation is None or encoder is None else on_validation(model, validation, encoder)
        with place.change() as change:
            assert isinstance(change.cache, LanceDraft)
            if queries is not None and change.cache.version != model.version:
                raise StoreError(f"{folder}: was changed by another process meanwhile; try again")
            choice = fit_table(change.cache, metric=metric, values=values, validation=queries)
            change.what = "fit"
        return choice
    cache = CacheModel.load(place.folder, device="cpu")
    queries = None if validation is None or encoder is None else on_validation(cache, validation, encoder)
    if cache.segments > 1:
        cache.compact()
    choice = closed_form.fit(cache, metric=metric, values=values, validation=queries)
    cache.save(place.folder, "fit")
    return choice


def refit(index: Draft, beta: float) -> Choice:
    """Fit what depends on beta for another one, in a fitted index that is to become the next version.

    That is alpha, temperature and what is unlike any shot (:func:`closed_form.refit`), and solved values. Raises
    InputError as :meth:`CacheModel.solve`.
    """
    shots: CacheModel | TableShots = index.whole or TableShots(index) if isinstance(index, LanceDraft) else index
    shots.settings = index.settings
    choice = closed_form.refit(shots, beta)
    index.settings, index.provenance = shots.settings, shots.provenance
    index.solve()
    return choice


def fit_table(
    table: LanceDraft,
    *,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    validation: Queries | None = None,
    factory: str | None = None,
) -> Choice:
    """Fit what is to become the next version of a LanceDB store, with the arguments of :func:`closed_form.fit`.

    Keys that may have solved values are in memory; of more, labels are, and keys are read in a few passes.
    """
    if table.n > MOST_SOLVED:
        shots = TableShots(table)
        choice = closed_form.fit(shots, metric=metric, values=values, validation=validation, factory=factory)
        table.settings, table.provenance = shots.settings, shots.provenance
        return choice
    whole = table.in_memory() if table.whole is None else table.whole
    whole.settings, whole.sums = table.settings, table.sums
    by_class = CLASSES if (factory or table.index_type) == CLASSES else None  # which has no solved values
    choice = closed_form.fit(whole, metric=metric, values=values, validation=validation, factory=by_class)
    table.settings, table.provenance = whole.settings, whole.provenance
    table.set_fitted(whole.metric, whole.fitted, factory, whole)
    return choice
