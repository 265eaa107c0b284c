"""Classify labelled photos of an index without their labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip import tip
from retrieval_tip.cache_model import CacheModel
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
    ids, images, settings = index.class_ids.cpu(), images_of(index.labels), index.settings
    right, chances = np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
    order = np.random.default_rng(0).permutation(len(rows))
    parts, held = [], []
    for part in np.array_split(order, min(PARTS, len(rows)) or 1):
        others = kept[~np.isin(images[kept], images[rows[part]])]
        if len(part) and len(others):  # without any other key, the answers are wrong
            own = torch.from_numpy(rows[part])
            held.append(Held(taken_keys(index.keys, own), ids[own], torch.from_numpy(others)))
            parts.append(part)
    if not held:
        return right, chances
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
    highest, answers = tip.probabilities(logits, settings.temperature).max(1)
    places = np.concatenate(parts)
    right[places], chances[places] = (answers == folds.ids_held).numpy(), highest.numpy()
    return right, chances
