"""Keys in blocks, by class and by row, against dense float64; accuracy of half precision."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import tries
from dense import Case, Largest, affinity, cases, shots_like_clip
from hypothesis import given
from hypothesis import strategies as st
from made import Made
from numpy.testing import assert_allclose, assert_array_equal

from retrieval_tip.errors import InputError
from retrieval_tip.retrieval import keys as keys_module
from retrieval_tip.retrieval.keys import Keys
from retrieval_tip.retrieval.whole_classes import ClassBounds


@contextmanager
def blocks(queries, of_keys, gathered=1 << 23):
    with mock.patch.multiple(
        keys_module, QUERY_BLOCK=queries, KEY_BLOCK=of_keys, GATHERED=gathered
    ):
        yield


def keys_of(case, **options):
    ids = case.y.astype(np.int32)
    ids.flags.writeable = False  # like the arrays of Arrow
    keys = Keys(case.K, ids, case.c, **options)
    assert keys.class_ids.dtype == torch.int64
    return keys


small_cases = cases(least_d=1, least_q=0, half=st.booleans())
betas = st.floats(0, 20)
block_sizes = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("keys")


@tries(60)
@given(small_cases, betas, block_sizes, st.booleans(), st.booleans())
def test_all_keys_give_the_dense_sum_for_any_shape_and_blocks(
    folder, case, beta, sizes, valued, mapped
):
    if mapped:
        np.save(folder / "keys.npy", case.K)
        case.K = np.load(folder / "keys.npy", mmap_mode="c")
    values = case.V if valued else None
    expected = case.logits(beta, values)
    with blocks(*sizes):
        own = None if values is None else torch.from_numpy(values)
        found = keys_of(case, values=own).cache_logits(case.queries, beta)
    assert (found.dtype, tuple(found.shape)) == (torch.float32, expected.shape)
    assert_allclose(found, expected, atol=1e-4, rtol=0)


@tries(30)
@given(small_cases, block_sizes)
def test_class_sums_and_means_match_numpy(case, sizes):
    with blocks(*sizes):
        keys = keys_of(case)
        sums = keys.sums
        means = keys.means
        together = torch.cat([rows.clone() for rows, *_ in keys.blocks()])
    one_hot = np.eye(case.c)[case.y]
    expected = one_hot.T @ case.K.astype(np.float64)
    assert_allclose(sums, expected, atol=1e-6)
    assert_allclose(means, expected / np.maximum(one_hot.sum(0), 1)[:, None], atol=1e-6)
    assert_array_equal(together, case.K.astype(np.float32))
    assert keys.mean_count == pytest.approx(len(case.y) / len(set(case.y.tolist())))


@pytest.mark.parametrize("per_class", [3, 40])
def test_class_sums_do_not_accumulate_rounding_errors(per_class):
    """In float32, 1e8 + 1 is 1e8. The rows of small classes are added one by one, those of large classes in runs."""
    ids = np.repeat(np.arange(3), per_class)
    rows = np.ones((3 * per_class, 2), dtype=np.float32)
    rows[::per_class] = 1e8
    keys = Keys(rows, ids, 3)
    expected = np.float32(1e8 + per_class - 1)
    with blocks(1, 2 * per_class + 1):
        assert_array_equal(keys.sums.numpy(), np.full((3, 2), expected))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("valued", [False, True])
def test_no_tensor_exceeds_a_block_the_outputs_or_the_keys(valued, half):
    case = Case(1, [100, 0, 150, 50], q=96, d=5, half=half)
    values = torch.from_numpy(case.V) if valued else None
    with blocks(16, 24):
        keys = keys_of(case, values=values)
        with Largest() as largest:
            keys.cache_logits(case.queries, 3.0)
    outputs, all_keys = 96 * 4, 300 * 5  # far fewer than all affinities, 300 * 96
    assert largest.most <= max(outputs, 16 * 24, all_keys)


def test_keys_not_grouped_by_class_are_refused():
    rows = np.ones((3, 2), dtype=np.float32)
    for ids in ([0, 1, 0], [1, 0, 0], [0, 1]):
        with pytest.raises(InputError, match=r"^labels: keys are not grouped by class"):
            Keys(rows, np.array(ids), 2)


@pytest.fixture(scope="module")
def synthetic():
    """2000 keys, their class ids, text weights and 4096 queries."""
    return shots_like_clip(100, 20, 256, 4096)


@st.composite
def some_classes(draw):
    """Draw a case, some classes for each query, and which of them are requested."""
    case = draw(small_cases)
    p = draw(st.integers(1, case.c))
    classes = (
        np.stack([case.rng.permutation(case.c)[:p] for _ in case.f])
        if len(case.f)
        else np.empty((0, p), int)
    )
    return case, classes, case.rng.random(classes.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))


@tries(60)
@given(some_classes(), betas, block_sizes)
def test_requested_classes_get_their_dense_sum_and_others_get_0(given_, beta, sizes):
    case, classes, met = given_
    expected = np.take_along_axis(case.logits(beta), classes, axis=1) * met
    with blocks(*sizes):
        found = keys_of(case).class_logits(
            case.queries, torch.from_numpy(classes), torch.from_numpy(met), beta
        )
    assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert (found.numpy()[~met] == 0).all()


def excess_of(array, ids, c, f, own, beta):
    """Return by which factor the sum of each query's 8 nearest other classes exceeds the sum at the mean affinity."""
    A = affinity(f, array)
    one_hot = np.eye(c)[ids]
    counts = one_hot.sum(0)
    mean = A @ one_hot / counts
    excess = np.exp(-beta * (1 - A)) @ one_hot / counts / np.exp(-beta * (1 - mean)) - 1
    mean[np.arange(len(f)), own] = -np.inf
    return np.take_along_axis(excess, np.argsort(-mean, axis=1)[:, :8], axis=1)


@pytest.mark.parametrize("beta", [1.0, 5.5, 20.0])
def test_new_queries_rarely_exceed_the_slack(synthetic, beta):
    array, ids, _, queries = synthetic
    slack = ClassBounds(Keys(array, ids, 100)).slack(beta)
    excess = excess_of(
        array, ids, 100, queries[:1000], Made(c=100, d=256).classes(4096, 2)[:1000], beta
    )
    assert 0 < (excess > slack).mean() <= 0.01  # a quantile of a sample
    assert slack <= 1.5 * np.quantile(excess, 0.999)  # not an arbitrarily large value


@tries(30)
@given(small_cases, betas, st.integers(1, 5))
def test_the_slack_is_the_same_for_any_block_size(case, beta, of_keys):
    with blocks(3, of_keys):
        found = ClassBounds(keys_of(case)).slack(beta)
    assert found == pytest.approx(ClassBounds(keys_of(case)).slack(beta), rel=1e-3, abs=1e-6)


@tries(60)
@given(small_cases, st.one_of(betas, st.sampled_from([0.0, 100.0, 1e3, 1e6, 1e30])))
def test_slack_is_never_negative_or_undefined(case, beta):
    """A sum of exponentials is at least the exponential of the mean. With a negative slack, no class would be met."""
    assert ClassBounds(keys_of(case)).slack(beta) >= 0
