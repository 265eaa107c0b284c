"""Sampling of shots against its rule and the published draws."""

import json
import random
from functools import cache
from itertools import chain

import pytest
from conftest import needs_real, tries
from hypothesis import given
from hypothesis import strategies as st

from retrieval_tip.data.source import few_shot
from retrieval_tip.errors import UsageError

DATASETS = {
    "caltech101": "Caltech101",
    "dtd": "DescribableTextures",
    "eurosat": "EuroSAT",
    "oxford_flowers": "OxfordFlowers",
    "oxford_pets": "OxfordPets",
    "stanford_cars": "StanfordCars",
    "ucf101": "UCF101",
}


@cache
def split_labels(path):
    return {
        part: [label for _, label, _ in items]
        for part, items in json.loads(path.read_bytes()).items()
    }


@needs_real
@pytest.mark.parametrize("shots", [1, 16])
def test_published_draws_are_reproduced(shared, shots):
    splits = shared / "data" / "splits"
    assert len([*(splits / "indices").glob("*.json")]) == 2 * len(
        DATASETS
    )  # every published draw is compared
    for dataset, name in DATASETS.items():
        labels = split_labels(splits / f"split_zhou_{name}.json")
        published = json.loads(
            (splits / "indices" / f"{dataset}_shots{shots}_seed1.json").read_bytes()
        )
        generator = random.Random(1)  # the draw of validation images continues with it
        train = few_shot(labels["train"], shots, generator)
        val = few_shot(labels["val"], min(shots, 4), generator)
        assert (train, val) == (published["train"], published["val"]), dataset
        assert few_shot(labels["train"], shots, seed=1) == published["train"]
        classes = len(set(labels["train"]))
        assert (len(train), len(val)) == (shots * classes, min(shots, 4) * classes)


def by_rule(labels, shots, generator):
    """Draw from each class in order of first appearance, with replacement if the class has too few items."""
    groups = [
        [i for i, own in enumerate(labels) if own == label] for label in dict.fromkeys(labels)
    ]
    draws = (
        generator.sample(g, shots) if len(g) >= shots else generator.choices(g, k=shots)
        for g in groups
    )
    return list(chain.from_iterable(draws))


LABELS = st.lists(st.integers(0, 5), max_size=40)


@tries(200)
@given(LABELS, st.integers(1, 8), st.integers(0, 2**32))
def test_any_draw_follows_the_rule(train, shots, seed):
    state = random.getstate()
    drawn = by_rule(train, shots, random.Random(seed))
    assert few_shot([f"name {label}" for label in train], shots, seed) == drawn
    assert few_shot(train, shots) == by_rule(train, shots, random.Random(1))
    assert random.getstate() == state


@pytest.mark.parametrize("shots", [0, -3])
def test_shots_must_be_positive(shots):
    with pytest.raises(UsageError, match=rf"^shots is {shots}: "):
        few_shot(["a"], shots)
