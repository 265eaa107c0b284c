"""Turn class names into prompts, and prompts into the text weights of the classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from retrieval_tip.arrays import FloatArray, slices
from retrieval_tip.backbones.base import Backbone, unit
from retrieval_tip.errors import InputError, UsageError

DEFAULT_TEMPLATES = ("a photo of a {}.",)
PROMPTS = 256
"""Number of prompts to encode at a time."""


def clean_class_name(name: str) -> str:
    """Return a class name for use in a sentence. Underscores and repeated spaces are replaced by single spaces."""
    return re.sub(r"[\s_]+", " ", name).strip()


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return the templates. Raises UsageError if the list is empty, or if one does not contain ``{}`` exactly once."""
    if not templates:
        raise UsageError("templates: none given; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise UsageError(f"template {template!r}: expected exactly one {{}} for the class name")
    return tuple(templates)


def prompts_of(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the prompts of all classes, class by class. Raises the same errors as :func:`check_templates`."""
    templates = check_templates(templates)
    return [
        template.replace("{}", clean_class_name(name))
        for name in class_names
        for template in templates
    ]


def text_weights(
    backbone: Backbone, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
) -> FloatArray:
    """Return the text weights ``W`` of the classes, as a float32 array of shape ``[c, d]``. Each row is a unit vector.

    The features of the prompts are normalised both before and after averaging over the templates, as in the paper's
    code and in CLIP. For several encoders, see :meth:`Reader.text_weights`.

    Raises UsageError if a template does not contain ``{}``. Raises InputError if the features of the prompts of a class
    cancel out or are not finite.
    """
    prompts = prompts_of(class_names, templates)
    blocks = slices(len(prompts), PROMPTS)
    features = np.concatenate([unit(backbone.encode_texts(prompts[b]), "prompt") for b in blocks])
    return mean_by_class(features.reshape(len(class_names), -1, backbone.dim), class_names)


def mean_by_class(features: FloatArray, class_names: Sequence[str]) -> FloatArray:
    """Average unit features over the ``t`` prompts of each class, and normalise the means.

    The features have shape ``[c, t, d]`` and the means have shape ``[c, d]``. Raises InputError if the features of the
    prompts of a class cancel out.
    """
    means = features.mean(axis=1)
    for row in np.flatnonzero(~(np.linalg.norm(means, axis=1) > 1e-6)).tolist():
        raise InputError(f"class {class_names[row]!r}: the features of its prompts cancel out")
    return unit(means, "text weight of a class")
