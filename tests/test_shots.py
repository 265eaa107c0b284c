"""Sampling of shots against its rule and the published draws."""

import json
import random
from collections import Counter
from functools import cache

import pytest
from conftest import examples, needs_real
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_tip.data.source import few_shot, few_shot_split
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
    return {part: [label for _, label, _ in items] for part, items in json.loads(path.read_bytes()).items()}


@needs_real
@pytest.mark.parametrize("shots", [1, 16])
def test_published_draws_are_reproduced(shared, shots):
    splits = shared / "data" / "splits"
    assert len([*(splits / "indices").glob("*.json")]) == 2 * len(DATASETS)  # every published draw is compared
    for dataset, name in DATASETS.items():
        labels = split_labels(splits / f"split_zhou_{name}.json")
        published = json.loads((splits / "indices" / f"{dataset}_shots{shots}_seed1.json").read_bytes())
        train, val = few_shot_split(labels["train"], labels["val"], shots, seed=1)
        assert (train, val) == (published["train"], published["val"]), dataset
        assert few_shot(labels["train"], shots, seed=1) == published["train"]
        classes = len(set(labels["train"]))
        assert (len(train), len(val)) == (shots * classes, min(shots, 4) * classes)


def test_small_classes_are_drawn_with_replacement():
    labels = ["cat"] * 2 + ["dog"] * 5 + ["cat"] + ["owl"]
    generator = random.Random(7)
    expected = generator.choices([0, 1, 7], k=4) + generator.sample([2, 3, 4, 5, 6], 4) + generator.choices([8], k=4)
    assert few_shot(labels, 4, seed=7) == expected


def test_classes_are_drawn_in_order_of_first_appearance():
    drawn = few_shot([3, 1, 3, 2, 1, 2], 2, seed=1)
    assert [set(drawn[i : i + 2]) for i in (0, 2, 4)] == [{0, 2}, {1, 4}, {3, 5}]


def test_validation_continues_with_the_generator_of_training():
    train, val = ["a"] * 9 + ["b"] * 2, ["a"] * 3 + ["b"] * 8
    generator = random.Random(5)
    drawn = generator.sample(range(9), 6) + generator.choices([9, 10], k=6)
    # at most 4 per class, with replacement if a class has fewer
    held = generator.choices(range(3), k=4) + generator.sample(range(3, 11), 4)
    assert few_shot_split(train, val, 6, seed=5) == (drawn, held)


labels_ = st.lists(st.integers(0, 5), max_size=40)


@settings(max_examples=examples(200), deadline=None)
@given(labels_, st.integers(1, 8), st.integers(0, 2**32))
def test_k_items_of_each_class_are_drawn(labels, shots, seed):
    drawn = few_shot(labels, shots, seed)
    sizes = Counter(labels)
    assert Counter(labels[i] for i in drawn) == dict.fromkeys(sizes, shots)
    for label, size in sizes.items():
        own = [i for i in drawn if labels[i] == label]
        assert size < shots or len(set(own)) == shots  # repeats only in small classes
    assert drawn == few_shot(labels, shots, seed)
    assert drawn == few_shot([f"name {label}" for label in labels], shots, seed)  # names do not matter


@settings(max_examples=examples(100), deadline=None)
@given(labels_, labels_, st.integers(1, 8), st.integers(0, 2**32))
def test_a_split_draws_training_first_and_at_most_four_validation_items(train, val, shots, seed):
    drawn, held = few_shot_split(train, val, shots, seed)
    assert drawn == few_shot(train, shots, seed)
    assert Counter(val[i] for i in held) == dict.fromkeys(set(val), min(shots, 4))


def test_seeds_give_different_draws_and_the_default_seed_is_1():
    labels = [i % 3 for i in range(90)]
    assert few_shot(labels, 4) == few_shot(labels, 4, seed=1)
    assert len({tuple(few_shot(labels, 4, seed)) for seed in range(10)}) == 10


def test_the_global_random_state_is_not_used():
    labels = [i % 3 for i in range(30)]
    random.seed(123)
    before = random.getstate()
    first = few_shot(labels, 4), few_shot_split(labels, labels, 4)
    assert random.getstate() == before
    random.seed(456)
    assert (few_shot(labels, 4), few_shot_split(labels, labels, 4)) == first


@pytest.mark.parametrize("shots", [0, -3])
def test_shots_must_be_positive(shots):
    with pytest.raises(UsageError, match=rf"^shots is {shots}: "):
        few_shot(["a"], shots)
    with pytest.raises(UsageError, match=rf"^shots is {shots}: "):
        few_shot_split(["a"], ["a"], shots)
