"""Join another encoder to the one of an index."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import parts_of, side_by_side
from retrieval_tip.backbones.prompts import DEFAULT_TEMPLATES
from retrieval_tip.data.reader import Reader
from retrieval_tip.errors import InputError
from retrieval_tip.fit import closed_form
from retrieval_tip.fit.closed_form import FitRequest, FormChoice
from retrieval_tip.model import Index
from retrieval_tip.retrieval import inputs
from retrieval_tip.retrieval.rows import ArrayRows

LOST = "cannot be read, so the new index would lack its label; restore the file"
"""The reason why another encoder cannot encode a photo."""


def can_join(index: Index) -> bool:
    """Return whether an index can get another encoder.

    It is in a folder, has one encoder, and a fit has chosen its settings. Its text, if any, comes from templates.
    """
    fitted = index.fitted is not None and index.fitted.automatic and index.prior is None
    has_text = index.has_text and not index.templates
    return index.folder is not None and not index.parts and fitted and not has_text


def joined_index(
    index: Index, features: Mapping[str, FloatArray], reader: Reader
) -> tuple[Index, FormChoice]:
    """Return the index with the keys of both encoders side by side, fitted again.

    ``features`` has what the other encoder makes of each photo, by digest. The backbone of ``reader`` joins both
    encoders. As in a build, class names are encoded if one of them has text. Labels and key ids stay.

    Raises InputError if a photo has no feature.
    """
    backbone = reader.backbone
    assert backbone is not None
    labels = index.labels
    rows = list(zip(labels["source"].to_pylist(), labels["digest"].to_pylist(), strict=True))
    for source, digest in rows:
        if digest not in features:
            raise InputError(f"{source}: {LOST}")
    others = np.stack([features[digest] for _, digest in rows])
    keys = side_by_side([np.asarray(index.keys), others]).astype(index.dtype)
    names = index.class_names
    templates = list(index.templates or DEFAULT_TEMPLATES) if backbone.has_text else []
    weights = reader.text_weights(names, templates) if templates else None
    facts = {"precision": {"keys": backbone.precision}}
    made = Index(
        ArrayRows(keys, labels),
        list(names),
        inputs.text_weights(weights, len(names), keys.shape[1]),
        settings=index.settings.override(logit_scale=backbone.logit_scale),
        templates=templates,
        backbone=backbone.identity,
        provenance=index.provenance | facts | ({"text": "templates"} if templates else {}),
        device=index.device,
        next_key_id=index.next_key_id,
        built=index.built,
        parts=parts_of(backbone),
        groups=index.groups,
    )
    fitted = index.fitted
    prior = "even" if fitted is None else fitted.class_prior
    return closed_form.fit(made, FitRequest(class_prior=prior), factory=index.index_type)
