"""Classify labelled photos of an index without their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip import tip
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import UsageError
from retrieval_tip.fit.closed_form import prior_for
from retrieval_tip.fit.folds import Folds, Held, taken_keys
from retrieval_tip.fit.forms import Form
from retrieval_tip.store.labels import images_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PARTS = 8
"""Number of parts of the photos. Each part is held out once, so the fit is repeated this many times."""


def photo_rows(index: CacheModel, key_ids: Sequence[int]) -> IntArray:
    """Return the first row of each photo that has one of these key ids. Unknown ids are ignored."""
    rows = np.flatnonzero(np.isin(index.labels["key_id"].to_numpy(), np.asarray(key_ids, dtype=np.int64)))
    _, first = np.unique(images_of(index.labels)[rows], return_index=True)
    return rows[np.sort(first)]


def held_out(index: CacheModel, rows: IntArray, kept: IntArray) -> tuple[npt.NDArray[np.bool_], FloatArray]:
    """Classify the photo of each row by the ``kept`` keys, except all keys of the photos in its own part.

    The metric and the values are refitted to the other keys, while alpha, beta and the temperature stay. The index does
    not change. Without text, a class that has no other key cannot win. Returns whether the answers are right, and their
    probabilities.
    """
    right, chances = np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
    places, probabilities = _without_own_part(index, rows, kept)
    highest, answers = probabilities.max(1)
    right[places], chances[places] = (answers == index.class_ids.cpu()[rows[places]]).numpy(), highest.numpy()
    return right, chances


class HeldOut(NamedTuple):
    """Held-out probabilities ``[n, c]`` of ``n`` photos, the class ids of their labels, and the id of a key of each.

    The first two are the ``pred_probs`` and ``labels`` of cleanlab.
    """

    pred_probs: npt.NDArray[np.float32]
    labels: IntArray
    key_ids: IntArray


def held_out_probabilities(
    index: CacheModel, rows: IntArray | None = None, queries: npt.NDArray[np.float32] | None = None
) -> HeldOut:
    """Classify each photo of an index by the photos outside its own part, as in :func:`held_out`.

    ``rows`` selects photos by a row of each. ``queries`` replaces the keys of these rows as their features.

    Raises UsageError if there is only one photo.
    """
    rows = photo_rows(index, index.labels["key_id"].to_pylist()) if rows is None else rows
    if len(rows) < 2:
        raise UsageError("held-out probabilities: the index has one photo; add more")
    places, probabilities = _without_own_part(index, rows, np.arange(index.n), queries)
    labels = index.class_ids.cpu().numpy()[rows].astype(np.int64)
    return HeldOut(probabilities.numpy()[np.argsort(places)], labels, index.labels["key_id"].to_numpy()[rows])


def _without_own_part(
    index: CacheModel, rows: IntArray, kept: IntArray, queries: npt.NDArray[np.float32] | None = None
) -> tuple[IntArray, torch.Tensor]:
    """Return the positions in ``rows`` of the photos that can be classified, and their probabilities ``[m, c]``."""
    ids, images, settings = index.class_ids.cpu(), images_of(index.labels), index.settings
    order = np.random.default_rng(0).permutation(len(rows))
    parts, held = [], []
    for part in np.array_split(order, min(PARTS, len(rows)) or 1):
        others = kept[~np.isin(images[kept], images[rows[part]])]
        if len(part) and len(others):  # without any other key, the answers are wrong
            own = torch.from_numpy(rows[part])
            given = taken_keys(index.keys, own) if queries is None else torch.from_numpy(queries[part])
            held.append(Held(given, ids[own], torch.from_numpy(others)))
            parts.append(part)
    if not held:
        return np.zeros(0, np.int64), torch.zeros(0, len(index.class_names))
    text = index.text_weights.cpu() * settings.logit_scale if index.has_text else None
    prior, c = prior_for(index), len(index.class_names)
    class_prior = "even" if index.fitted is None else index.fitted.class_prior
    folds = Folds(index.keys, ids, c, text, held, index.sums, class_prior, prior=prior)
    words, cache, discriminant = folds.terms(Form.of(index.fitted, settings.beta))
    linked = tip.log_cache(cache, settings.log_offset)
    terms = tip.Terms(torch.zeros_like(linked) if words is None else words, linked, discriminant)
    logits = terms.logits(settings)
    if words is None:  # a class without keys would be unknown
        known = torch.stack([torch.bincount(ids[part.rows], minlength=c) > 0 for part in held])
        logits[~known.repeat_interleave(torch.tensor([len(part.ids) for part in held]), dim=0)] = -torch.inf
    return np.concatenate(parts), tip.probabilities(logits, settings.temperature)
