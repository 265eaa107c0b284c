"""Class names, templates and text weights."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from retrieval_tip.backbones import prompts
from retrieval_tip.backbones.prompts import clean_class_name, mean_by_class, text_weights
from retrieval_tip.errors import InputError, UsageError


def test_class_names_become_words():
    assert clean_class_name("yin_yang") == "yin yang"
    assert clean_class_name("  a__b\n c ") == "a b c"
    assert clean_class_name("Übergröße") == "Übergröße"


def test_text_weights_are_unit_means_of_unit_prompts(lit_mini, monkeypatch):
    """Normalise the feature of each prompt, average over templates, and normalise, for one class."""
    names = ["grand_piano", "cat"]
    templates = ["a photo of a {}.", "itap of a {}.", "{}"]
    monkeypatch.setattr(prompts, "PROMPTS", 2)
    weights = text_weights(lit_mini, names, templates)
    encoded = lit_mini.encode_texts(
        ["a photo of a grand piano.", "itap of a grand piano.", "grand piano"]
    )
    mean = (encoded / np.linalg.norm(encoded, axis=1, keepdims=True)).mean(axis=0)
    assert weights.shape == (2, 1280)
    assert weights.dtype == np.float32
    assert_allclose(weights[0], mean / np.linalg.norm(mean), atol=1e-5)
    assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("templates", [[], ["no place"], ["{} and {}"], ["a photo of a {}.", "x"]])
def test_templates_need_exactly_one_placeholder(lit_mini, templates):
    with pytest.raises(UsageError, match="template"):
        text_weights(lit_mini, ["cat"], templates)


def test_prompts_that_cancel_out_are_refused_with_the_class_name():
    features = np.array([[[1, 0], [-1, 0]]], dtype=np.float32)
    with pytest.raises(InputError, match="'cat'"):
        mean_by_class(features, ["cat"])
