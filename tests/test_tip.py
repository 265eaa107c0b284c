"""tip.py against the method written out once more: dense, float64, with the one-hot product."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from conftest import examples, needs_real
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retrieval_tip import tip

Array = npt.NDArray[np.float64]
BETAS = (0.1, 1.0, 5.5, 20.0, 50.0)


@dataclass(frozen=True)
class Case:
    """Queries ``f``, keys ``K`` of classes ``y`` out of ``c``, text weights ``W``."""

    f: Array
    K: Array
    y: npt.NDArray[np.int64]
    W: Array

    @property
    def c(self) -> int:
        return len(self.W)

    @property
    def A(self) -> Array:
        return self.f @ self.K.T

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.from_numpy(self.f).to(dtype),
            torch.from_numpy(self.K).to(dtype),
            torch.from_numpy(self.y),
        )

    def totals(self, dtype: torch.dtype = torch.float64) -> tip.Totals:
        f, K, y = self.tensors(dtype)
        sums = torch.from_numpy(np.eye(self.c)[self.y].T).to(dtype) @ K
        return tip.Totals.of(f, sums, torch.bincount(y, minlength=self.c))

    def retrieved(self, k: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest keys of each query: affinities and class ids."""
        f, K, y = self.tensors(dtype)
        near, rows = tip.affinity(f, K).topk(min(k, len(y)), dim=1)
        return near, y[rows]


def dense(A: Array, y: npt.NDArray[np.int64], c: int, beta: float, keep: npt.NDArray[np.bool_] | None = None) -> Array:
    """exp(-beta (1 - A)) times the one-hot labels; where ``keep`` is given, over those keys only."""
    weights = np.exp(-beta * (1 - A))
    if keep is not None:
        weights = weights * keep
    one_hot: Array = np.eye(c)[y]
    return weights @ one_hot


def top_mask(A: Array, k: int) -> npt.NDArray[np.bool_]:
    rank = np.argsort(np.argsort(-A, axis=1, kind="stable"), axis=1)
    return rank < k


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_case(seed: int, counts: tuple[int, ...], q: int = 7, d: int = 12, off_sphere: bool = False) -> Case:
    """Classes of ``counts`` keys around a mean each, keys in random order."""
    rng = np.random.default_rng(seed)
    means = unit(rng.standard_normal((len(counts), d)))
    y = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    K = unit(means[y] + rng.standard_normal((len(y), d)) * rng.uniform(0.05, 0.5))
    if off_sphere:
        K = K * rng.uniform(0.5, 1.6, size=(len(y), 1))
    f = unit(means[rng.integers(len(counts), size=q)] + rng.standard_normal((q, d)) * 0.3)
    return Case(f, K, y, unit(means + rng.standard_normal(means.shape) * 0.3))


def food(shared: Path, shots: int) -> Case:
    def features(part: str) -> tuple[Array, list[str]]:
        table = pq.read_table(shared / "data" / "clip-food9" / f"{part}.parquet")
        return np.stack(table["feature"].to_numpy()).astype(np.float64), table["label"].to_pylist()

    W, names = features("text")
    K, labels = features("train")
    f, _ = features("test")
    y = np.array([names.index(label) for label in labels])
    chosen = np.concatenate([np.flatnonzero(y == i)[: shots - i % 3] for i in range(len(names))])  # unbalanced
    return Case(f[::5], K[chosen], y[chosen], W)


@st.composite
def cases(draw: st.DrawFn, least_d: int = 2) -> Case:
    counts = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)))
    assume(sum(counts) > 0)
    seed = draw(st.integers(0, 2**32 - 1))
    return random_case(
        seed, counts, q=draw(st.integers(1, 5)), d=draw(st.integers(least_d, 10)), off_sphere=draw(st.booleans())
    )


COUNTS = {
    "balanced": (4, 4, 4),
    "unbalanced": (1, 9, 3, 30),
    "a class without a key": (5, 0, 2),
    "one key": (0, 1, 0),
    "one class": (6,),
}
betas = st.floats(0.1, 50)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("off_sphere", [False, True], ids=["unit", "fine-tuned"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_all_keys_give_the_dense_form(counts: tuple[int, ...], off_sphere: bool, beta: float) -> None:
    case = random_case(1, counts, off_sphere=off_sphere)
    f, K, y = case.tensors()
    np.testing.assert_allclose(
        tip.cache_logits(tip.affinity(f, K), y, case.c, beta), dense(case.A, case.y, case.c, beta), rtol=1e-12
    )


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas)
def test_all_keys_give_the_dense_form_for_any_features(case: Case, beta: float) -> None:
    f, K, y = case.tensors()
    cache = tip.cache_logits(tip.affinity(f, K), y, case.c, beta)
    np.testing.assert_allclose(cache, dense(case.A, case.y, case.c, beta), rtol=1e-11)
    assert (cache[:, np.bincount(case.y, minlength=case.c) == 0] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shots", [3, 16])
def test_real_features_give_the_dense_form_in_float32(shared: Path, shots: int, beta: float) -> None:
    case = food(shared, shots)
    f, K, y = case.tensors(torch.float32)
    expected = dense(case.A, case.y, case.c, beta)
    np.testing.assert_allclose(tip.cache_logits(tip.affinity(f, K), y, case.c, beta), expected, rtol=1e-4)
    near, ids = case.retrieved(20, torch.float32)
    mask = top_mask(case.A, 20)
    np.testing.assert_allclose(
        tip.cache_logits(near, ids, case.c, beta), dense(case.A, case.y, case.c, beta, mask), rtol=1e-4
    )


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas, st.integers(1, 40))
def test_top_k_is_the_dense_form_over_the_top_k(case: Case, beta: float, k: int) -> None:
    near, ids = case.retrieved(k)  # k may exceed n
    expected = dense(case.A, case.y, case.c, beta, top_mask(case.A, k))
    np.testing.assert_allclose(tip.cache_logits(near, ids, case.c, beta), expected, rtol=1e-11)


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas, st.integers(1, 40))
def test_tail_counts_the_keys_not_retrieved_at_their_mean_affinity(case: Case, beta: float, k: int) -> None:
    near, ids = case.retrieved(k)
    left = ~top_mask(case.A, k)
    expected = dense(case.A, case.y, case.c, beta, ~left)
    for q in range(len(case.f)):
        for c in range(case.c):
            rest = case.A[q, left[q] & (case.y == c)]
            if rest.size:
                expected[q, c] += rest.size * np.exp(-beta * (1 - rest.mean()))
    np.testing.assert_allclose(tip.cache_logits(near, ids, case.c, beta, case.totals()), expected, rtol=1e-9)


@settings(max_examples=examples(150), deadline=None)
@given(cases(), betas, st.integers(1, 40))
def test_plain_is_at_most_tail_is_at_most_all(case: Case, beta: float, k: int) -> None:
    """The exponential is convex (Jensen)."""
    near, ids = case.retrieved(k)
    plain = tip.cache_logits(near, ids, case.c, beta).numpy()
    tail = tip.cache_logits(near, ids, case.c, beta, case.totals()).numpy()
    exact = dense(case.A, case.y, case.c, beta)
    assert (plain <= tail).all()
    assert (tail <= exact * (1 + 1e-10)).all()


@needs_real
def test_tail_is_nearer_to_all_than_plain_on_real_features(shared: Path) -> None:
    case = food(shared, 16)
    near, ids = case.retrieved(16)
    exact = dense(case.A, case.y, case.c, 5.5)
    plain = np.abs(tip.cache_logits(near, ids, case.c, 5.5).numpy() - exact).max()
    tail = np.abs(tip.cache_logits(near, ids, case.c, 5.5, case.totals()).numpy() - exact).max()
    assert tail < plain / 10


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tail_adds_nothing_once_every_key_is_retrieved(dtype: torch.dtype, beta: float) -> None:
    case = random_case(3, COUNTS["unbalanced"], off_sphere=True)
    near, ids = case.retrieved(len(case.y), dtype)
    with_tail = tip.cache_logits(near, ids, case.c, beta, case.totals(dtype))
    assert torch.equal(with_tail, tip.cache_logits(near, ids, case.c, beta))


@settings(max_examples=examples(100), deadline=None)
@given(cases(), betas, st.integers(1, 10), st.integers(1, 4), st.booleans())
def test_empty_slots_are_ignored(case: Case, beta: float, k: int, slots: int, tail: bool) -> None:
    near, ids = case.retrieved(k)
    totals = case.totals() if tail else None
    shape = (len(near), slots)
    padded = torch.cat([near, torch.full(shape, 0.9, dtype=near.dtype)], dim=1)  # an affinity that would count
    padded_ids = torch.cat([ids, torch.full(shape, case.c)], dim=1)
    torch.testing.assert_close(
        tip.cache_logits(padded, padded_ids, case.c, beta, totals), tip.cache_logits(near, ids, case.c, beta, totals)
    )
    logits = tip.cache_logits(near, ids, case.c, beta, totals)
    proofs = [
        tip.certificate(logits, a, i, case.totals(), 1.0, beta, tail=tail)
        for a, i in ((near, ids), (padded, padded_ids))
    ]
    assert torch.equal(*proofs)


@settings(max_examples=examples(100), deadline=None)
@given(cases(), betas, st.lists(st.integers(0, 36), max_size=4))
def test_blocks_of_keys_add_up(case: Case, beta: float, cuts: list[int]) -> None:
    f, K, y = case.tensors()
    whole = tip.cache_logits(tip.affinity(f, K), y, case.c, beta)
    edges = [0, *sorted(min(cut, len(y)) for cut in cuts), len(y)]
    parts = [
        tip.cache_logits(tip.affinity(f, K[a:b]), y[a:b], case.c, beta)
        for a, b in pairwise(edges)  # some blocks are empty
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=0)


def test_rest_is_the_number_and_mean_of_the_keys_left() -> None:
    case = Case(np.eye(2)[:1], np.array([[0.9, 0], [0.5, 0], [0.1, 0], [0.7, 0]]), np.array([0, 0, 0, 1]), np.eye(2))
    number, mean = case.totals().rest(*case.retrieved(2))  # 0.9 of class 0 and 0.7 of class 1
    assert number.tolist() == [[2, 0]]
    np.testing.assert_allclose(mean, [[0.3, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sums_keep_the_dtype_and_leave_out_the_marked(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2, 4], [8, 16, 32]], dtype=dtype)
    one = tip.sum_by_class(values, torch.tensor([1, 3, 1]), 3)
    each = tip.sum_by_class(values, torch.tensor([[1, 3, 1], [0, 0, 2]]), 3)
    assert one.dtype == each.dtype == dtype
    assert one.tolist() == [[0, 5, 0], [0, 40, 0]]
    assert each.tolist() == [[0, 5, 0], [24, 0, 32]]


@pytest.mark.parametrize("beta", BETAS)
def test_weight_of_one_key(beta: float) -> None:
    weights = tip.weight(torch.tensor([1.0, 0.5, 1.2], dtype=torch.float64), beta)
    np.testing.assert_allclose(weights, [1, np.exp(-beta / 2), np.exp(beta * 0.2)])
    assert (tip.weight(torch.rand(5), 0) == 1).all()


@settings(max_examples=examples(50), deadline=None)
@given(cases(), st.floats(0, 20), st.floats(0.5, 200), betas)
def test_blend_is_text_plus_alpha_cache(case: Case, alpha: float, scale: float, beta: float) -> None:
    f, K, y = case.tensors()
    text = tip.text_logits(f, torch.from_numpy(case.W), scale)
    logits = tip.blend(text, tip.cache_logits(tip.affinity(f, K), y, case.c, beta), alpha)
    expected = scale * (case.f @ case.W.T) + alpha * dense(case.A, case.y, case.c, beta)
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(tip.blend(text, logits, 0), text)


def proofs(
    case: Case, k: int, alpha: float, beta: float, scale: float, tail: bool, dtype: torch.dtype
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], Array]:
    """What is proved, the winners from k keys, and the exact logits over the same text logits."""
    f, _, _ = case.tensors(dtype)
    text = tip.text_logits(f, torch.from_numpy(case.W).to(dtype), scale)
    near, ids = case.retrieved(k, dtype)
    totals = case.totals(dtype)
    logits = tip.blend(text, tip.cache_logits(near, ids, case.c, beta, totals if tail else None), alpha)
    proved = tip.certificate(logits, near, ids, totals, alpha, beta, tail=tail)
    exact = text.double().numpy() + alpha * dense(case.A, case.y, case.c, beta)
    return proved.numpy(), logits.argmax(1).numpy(), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=examples(250), deadline=None)
@given(
    case=cases(least_d=1),  # on a line all affinities tie
    k=st.integers(1, 40),
    alpha=st.sampled_from([0.0, 0.1, 1.0, 20.0]),
    beta=st.one_of(st.just(0.0), betas),
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    tail=st.booleans(),
)
def test_what_is_proved_is_so(
    case: Case, k: int, alpha: float, beta: float, scale: float, tail: bool, dtype: torch.dtype
) -> None:
    if dtype == torch.float32:  # the same numbers for both sides
        f, K, _ = case.tensors(dtype)
        case = Case(f.double().numpy(), K.double().numpy(), case.y, case.W)
    proved, winners, exact = proofs(case, k, alpha, beta, scale, tail, dtype)
    assert (winners == exact.argmax(1))[proved].all()


@pytest.mark.parametrize("tail", [False, True])
def test_nothing_is_proved_by_rounding(tail: bool) -> None:
    """Large text and cache logits that cancel out: what is left of the difference is noise, though the sum is small."""
    rng = np.random.default_rng(0)
    wrong = proved_at_all = 0
    for _ in range(300):
        q, n, c = 8, 24, 4
        K = unit(rng.standard_normal((n, 8))).astype(np.float32).astype(np.float64)
        f = unit(rng.standard_normal((q, 8))).astype(np.float32).astype(np.float64)
        case = Case(f, K, np.arange(n) % c, np.zeros((c, 8)))
        beta, alpha = float(rng.choice([1.0, 20.0, 50.0])), 100.0
        cache = dense(case.A, case.y, c, beta)
        text = torch.from_numpy(-alpha * cache).float()
        near, ids = case.retrieved(n, torch.float32)
        totals = case.totals(torch.float32)
        logits = tip.blend(text, tip.cache_logits(near, ids, c, beta, totals if tail else None), alpha)
        proved = tip.certificate(logits, near, ids, totals, alpha, beta, tail=tail).numpy()
        exact = text.double().numpy() + alpha * cache
        wrong += int((proved & (logits.argmax(1).numpy() != exact.argmax(1))).sum())
        proved_at_all += int(proved.sum())
    assert wrong == 0, f"{wrong} of {proved_at_all} proofs are wrong"


@pytest.mark.parametrize("tail", [False, True])
def test_the_bound_is_nearly_reached_and_never_passed(tail: bool) -> None:
    """Nine keys of the loser lie just behind the one retrieved, a tenth far away: what they add is most they can."""
    A = np.array([0.6] + [0.6 - 1e-6] * 9 + [-1.0])
    margins, answers = np.linspace(-0.2, 2, 221), []
    for margin in margins:  # the text's, for the winner
        case = Case(
            np.eye(2)[:1], np.stack([A, 0 * A], axis=1), np.array([0] + [1] * 10), np.array([[margin, 0], [0, 0]])
        )
        proved, winners, exact = proofs(case, 1, 1.0, 5.0, 1.0, tail, torch.float64)
        assert not proved[0] or winners[0] == exact[0].argmax()
        answers.append((bool(proved[0]) and winners[0] == 0, exact[0].argmax() == 0))
    proved_from = margins[[proved for proved, _ in answers]].min()
    true_from = margins[[true for _, true in answers]].min()
    assert true_from <= proved_from <= true_from + 0.16  # one weight: the tenth key's


@pytest.mark.parametrize("tail", [False, True])
def test_a_tie_is_not_proved(tail: bool) -> None:
    K = unit(np.random.default_rng(0).standard_normal((6, 4)))
    case = Case(K[:3], np.concatenate([K, K]), np.repeat([0, 1], 6), np.zeros((2, 4)))  # two classes of the same keys
    for k in (1, 5, 12):
        proved, _, exact = proofs(case, k, 1.0, 5.5, 100.0, tail, torch.float64)
        np.testing.assert_allclose(exact[:, 0], exact[:, 1])
        assert not proved.any()


@pytest.mark.parametrize(("tail", "least"), [(False, 0.85), (True, 0.95)])
def test_most_of_well_separated_features_is_proved(tail: bool, least: float) -> None:
    case = random_case(5, (16,) * 20, q=200, d=64)
    proved, winners, exact = proofs(case, 64, 1.0, 20.0, 100.0, tail, torch.float32)
    assert proved.mean() >= least
    assert (winners == exact.argmax(1))[proved].all()


@needs_real
def test_the_tail_proves_what_plain_does_and_more_on_real_features(shared: Path) -> None:
    case = food(shared, 16)
    counts = []
    for tail in (False, True):
        proved, winners, exact = proofs(case, 48, 1.17, 5.5, 100.0, tail, torch.float32)
        assert (winners == exact.argmax(1))[proved].all()
        counts.append(proved.mean())
    assert counts[1] > counts[0]
    assert counts[1] > 0.3


@pytest.mark.parametrize("tail", [False, True])
def test_everything_is_proved_where_nothing_can_change(shared: Path, tail: bool) -> None:
    case = food(shared, 4)
    proved, _, _ = proofs(case, len(case.y), 1.17, 5.5, 100.0, tail, torch.float64)
    assert proved.all()  # all keys retrieved
    proved, _, _ = proofs(case, 1, 0.0, 5.5, 100.0, tail, torch.float64)
    assert proved.all()  # alpha 0: the text alone decides
    one = random_case(7, (30,))
    proved, _, _ = proofs(one, 1, 1.0, 5.5, 100.0, tail, torch.float64)
    assert proved.all()  # no other class


# ------------------------------------------------------------------------------------------------- classes met whole


@st.composite
def at_the_means(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """Text logits, cache logits at the mean affinities, true ones of up to ``slack`` more; alpha and slack.

    Values are of few, so that ties and bounds that are just reached are common; a class may have no keys.
    """
    q, c = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    alpha, slack = draw(st.sampled_from([0.0, 0.5, 1.0, 4.0])), draw(st.sampled_from([0.0, 0.125, 1.0, 10.0]))
    beta = draw(st.sampled_from([0.0, 1.0, 5.5]))
    numbers = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 16.0]), min_size=c, max_size=c))

    def matrix(values: st.SearchStrategy[float]) -> torch.Tensor:
        return torch.tensor(
            [draw(st.lists(values, min_size=c, max_size=c)) for _ in range(q)], dtype=torch.float64
        ).view(q, c)

    text = matrix(st.one_of(st.sampled_from([-1.0, 0.0, 0.25, 1.0, 2.0]), st.floats(-20, 20)))
    mean = matrix(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1, 1)))
    used = matrix(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))  # of the slack, by each class
    cache = tip.at_mean(torch.tensor(numbers, dtype=torch.float64), mean, beta)
    return text, cache, cache * (1 + slack * used), alpha, slack


@settings(max_examples=examples(400), deadline=None)
@given(at_the_means(), st.integers(1, 7))
def test_the_winner_of_a_settled_query_is_among_the_classes_it_met(
    given_: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float], most: int
) -> None:
    text, cache, true, alpha, slack = given_
    classes, met = tip.promising(text, cache, alpha, slack, most)
    settled = tip.settled(text, cache, alpha, slack, classes)
    lower, exact = tip.blend(text, cache, alpha), tip.blend(text, true, alpha)
    assert classes.shape == met.shape == (len(text), min(most, text.shape[1]))
    ranked = lower.gather(1, classes)
    assert (ranked[:, 0] == lower.amax(1)).all()
    assert (ranked.diff(dim=1) <= 0).all()
    assert met[:, 0].all()
    for query in range(len(text)):
        own = classes[query, met[query]]
        best = exact[query].max()
        tolerance = 1e-9 * (1 + text.abs().max() + alpha * true.max())
        if most >= text.shape[1]:
            assert settled[query]  # there is no other class
        if settled[query]:
            assert exact[query, own].max() >= best - tolerance
            known = lower[query].clone()
            known[own] = exact[query, own]
            assert exact[query, known.argmax()] >= best - tolerance  # the answer that is given


def test_a_class_that_could_win_leaves_a_query_unsettled_and_one_that_cannot_does_not() -> None:
    text, cache = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    for slack, met_of_three, settled_by_one in ((0.5, 1, True), (0.99, 1, True), (1.01, 2, False), (2.01, 3, False)):
        classes, met = tip.promising(text, cache, 1.0, slack, 3)
        assert classes.tolist() == [[0, 1, 2]]
        assert int(met.sum()) == met_of_three
        assert tip.settled(text, cache, 1.0, slack, classes[:, :1]).tolist() == [settled_by_one]


def test_a_tie_at_the_bound_is_met_and_not_settled() -> None:
    text, cache = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    classes, met = tip.promising(text, cache, 1.0, 1.0, 2)  # with all its slack the second has 3 too
    assert met.tolist() == [[True, True]]
    assert not tip.settled(text, cache, 1.0, 1.0, classes[:, :1]).any()


def test_without_alpha_the_text_alone_says_what_to_meet() -> None:
    text = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    classes, met = tip.promising(text, torch.tensor([[1e6, 1.0, 2.0, 0.0]]), 0.0, 10.0, 4)
    assert set(classes[met].tolist()) == {1, 2}
    assert not tip.settled(text, torch.ones(1, 4), 0.0, 10.0, classes[:, :1]).any()
    assert tip.settled(text, torch.ones(1, 4), 0.0, 10.0, classes[:, :2]).all()


@pytest.mark.parametrize(("alpha", "slack"), [(1e39, 1.0), (1e300, 1e9), (0.0, 1e9), (1e38, 1e9)])
def test_settings_that_overflow_still_meet_the_first_class(alpha: float, slack: float) -> None:
    text, cache = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 3.0, 1e-3]])
    classes, met = tip.promising(text, cache, alpha, slack, 2)
    assert met[:, 0].all()
    assert tip.settled(text, cache, alpha, slack, classes).shape == (1,)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.floats(0, 30))
def test_keys_at_their_mean_affinity_never_add_more_than_at_their_own(own: list[float], beta: float) -> None:
    affinity = torch.tensor(own, dtype=torch.float64)
    number, mean = torch.tensor([float(len(own))]).double(), affinity.mean()[None]
    at_mean = tip.at_mean(number, mean, beta)
    assert at_mean <= tip.weight(affinity, beta).sum() * (1 + 1e-12)
    assert at_mean == pytest.approx(len(own) * np.exp(-beta * (1 - np.mean(own))))
    into = torch.empty(1, dtype=torch.float64)
    assert tip.at_mean(number, mean, beta, out=into) is into
    assert torch.equal(into, at_mean)


def test_text_logits_can_be_written_where_they_are_wanted() -> None:
    case = random_case(8, (3, 4), q=5)
    f, W = torch.from_numpy(case.f), torch.from_numpy(case.W)
    into = torch.full((7, 2), np.nan, dtype=torch.float64)
    tip.text_logits(f, W, 50.0, out=into[1:6])
    np.testing.assert_allclose(into[1:6], 50 * case.f @ case.W.T)
    assert into[[0, 6]].isnan().all()


@given(st.integers(1, 6), st.floats(0, 10), st.floats(0, 0.5), st.integers(0, 2**32 - 1))
def test_errors_change_a_winner_only_where_it_is_close(c: int, alpha: float, error: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    text, cache = torch.from_numpy(rng.normal(size=(20, c))), torch.from_numpy(rng.gamma(1, size=(20, c)))
    other = cache * (1 + error * torch.from_numpy(rng.choice([-1.0, 1.0], (20, c))))
    changed = tip.blend(text, cache, alpha).argmax(1) != tip.blend(text, other, alpha).argmax(1)
    close = tip.close(text, cache, alpha, error)
    assert (close | ~changed).all()
    assert c > 1 or not close.any()


def test_what_is_far_apart_is_not_close() -> None:
    text, cache = torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.5]])
    assert not tip.close(text, cache, 1.0, 0.1).any()  # 6 or 5.9, against 3 or 3.2
    assert tip.close(text, cache, 1.0, 1.0).all()  # 5 against 5
