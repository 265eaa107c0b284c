"""Certificates (retrieval/certify.py) compared with exact logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import examples, needs_real
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tip import Array, Case, betas, cases, dense, food, random_case, unit

from retrieval_tip import tip
from retrieval_tip.retrieval import certify
from retrieval_tip.retrieval.evidence import Nearest
from retrieval_tip.settings import Settings


def certified(
    case: Case, text: torch.Tensor, k: int, alpha: float, beta: float, tail: bool, dtype: torch.dtype
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return a mask of the proved winners from ``k`` keys, and the winners."""
    near, ids = case.retrieved(k, dtype)
    totals, own = case.totals(dtype), Settings(alpha=alpha, beta=beta, tail=tail)
    terms = tip.Terms(text, tip.cache_logits(near, ids, case.c, beta, totals if tail else None))
    proved = certify.certificate(terms, Nearest(near, ids, ids), totals, own)
    return proved.numpy(), terms.logits(own).argmax(1).numpy()


def proofs(
    case: Case, k: int, alpha: float, beta: float, scale: float, tail: bool, dtype: torch.dtype
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], Array]:
    """Return a mask of the proved winners, the winners from ``k`` keys, and the exact logits over all keys."""
    f, _, _ = case.tensors(dtype)
    text = tip.text_logits(f, torch.from_numpy(case.W).to(dtype), scale)
    exact = text.double().numpy() + alpha * dense(case.A, case.y, case.c, beta)
    return *certified(case, text, k, alpha, beta, tail, dtype), exact


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
def test_certificates_hold_for_all_keys(
    case: Case, k: int, alpha: float, beta: float, scale: float, tail: bool, dtype: torch.dtype
) -> None:
    if dtype == torch.float32:  # both sides use the same numbers
        f, K, _ = case.tensors(dtype)
        case = Case(f.double().numpy(), K.double().numpy(), case.y, case.W)
    proved, winners, exact = proofs(case, k, alpha, beta, scale, tail, dtype)
    assert (winners == exact.argmax(1))[proved].all()


@pytest.mark.parametrize("tail", [False, True])
def test_rounding_proves_nothing(tail: bool) -> None:
    """Large text and cache logits cancel out, so that only rounding errors differ."""
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
        proved, winners = certified(case, text, n, alpha, beta, tail, torch.float32)
        exact = text.double().numpy() + alpha * cache
        wrong += int((proved & (winners != exact.argmax(1))).sum())
        proved_at_all += int(proved.sum())
    assert wrong == 0, f"{wrong} of {proved_at_all} proofs are wrong"


@pytest.mark.parametrize("tail", [False, True])
def test_the_bound_is_tight(tail: bool) -> None:
    """Nine keys of the loser lie just behind the retrieved key and a tenth far away, so they nearly add the bound."""
    A = np.array([0.6] + [0.6 - 1e-6] * 9 + [-1.0])
    margins, answers = np.linspace(-0.2, 2, 221), []
    for margin in margins:  # of the text logits, for the winner
        case = Case(
            np.eye(2)[:1], np.stack([A, 0 * A], axis=1), np.array([0] + [1] * 10), np.array([[margin, 0], [0, 0]])
        )
        proved, winners, exact = proofs(case, 1, 1.0, 5.0, 1.0, tail, torch.float64)
        assert not proved[0] or winners[0] == exact[0].argmax()
        answers.append((bool(proved[0]) and winners[0] == 0, exact[0].argmax() == 0))
    proved_from = margins[[proved for proved, _ in answers]].min()
    true_from = margins[[true for _, true in answers]].min()
    assert true_from <= proved_from <= true_from + 0.16  # the weight of the tenth key


@pytest.mark.parametrize("tail", [False, True])
def test_a_tie_is_not_proved(tail: bool) -> None:
    K = unit(np.random.default_rng(0).standard_normal((6, 4)))
    case = Case(K[:3], np.concatenate([K, K]), np.repeat([0, 1], 6), np.zeros((2, 4)))  # two classes with the same keys
    for k in (1, 5, 12):
        proved, _, exact = proofs(case, k, 1.0, 5.5, 100.0, tail, torch.float64)
        np.testing.assert_allclose(exact[:, 0], exact[:, 1])
        assert not proved.any()


@pytest.mark.parametrize(("tail", "least"), [(False, 0.85), (True, 0.95)])
def test_most_answers_for_separated_features_are_proved(tail: bool, least: float) -> None:
    case = random_case(5, (16,) * 20, q=200, d=64)
    proved, winners, exact = proofs(case, 64, 1.0, 20.0, 100.0, tail, torch.float32)
    assert proved.mean() >= least
    assert (winners == exact.argmax(1))[proved].all()


@needs_real
def test_the_tail_proves_more_answers_on_real_features(shared: Path) -> None:
    case = food(shared, 16)
    counts = []
    for tail in (False, True):
        proved, winners, exact = proofs(case, 48, 1.17, 5.5, 100.0, tail, torch.float32)
        assert (winners == exact.argmax(1))[proved].all()
        counts.append(proved.mean())
    assert counts[1] > counts[0]
    assert counts[1] > 0.3


@pytest.mark.parametrize("tail", [False, True])
def test_every_answer_is_proved_if_nothing_can_change(shared: Path, tail: bool) -> None:
    case = food(shared, 4)
    proved, _, _ = proofs(case, len(case.y), 1.17, 5.5, 100.0, tail, torch.float64)
    assert proved.all()  # all keys retrieved
    proved, _, _ = proofs(case, 1, 0.0, 5.5, 100.0, tail, torch.float64)
    assert proved.all()  # alpha 0: the text alone decides
    one = random_case(7, (30,))
    proved, _, _ = proofs(one, 1, 1.0, 5.5, 100.0, tail, torch.float64)
    assert proved.all()  # no other class


@settings(max_examples=examples(100), deadline=None)
@given(cases(), betas, st.integers(1, 10), st.integers(1, 4), st.booleans())
def test_empty_slots_do_not_change_certificates(case: Case, beta: float, k: int, slots: int, tail: bool) -> None:
    near, ids = case.retrieved(k)
    shape, own = (len(near), slots), Settings(beta=beta, tail=tail)
    terms = tip.Terms(near.new_zeros(len(near), case.c), tip.cache_logits(near, ids, case.c, beta))
    padded = torch.cat(
        [near, torch.full(shape, 0.9, dtype=near.dtype)], dim=1
    )  # this affinity would count if it were not empty
    padded_ids = torch.cat([ids, torch.full(shape, case.c)], dim=1)
    met = (Nearest(near, ids, ids), Nearest(padded, padded_ids, padded_ids))
    assert torch.equal(*(certify.certificate(terms, one, case.totals(), own) for one in met))


# ------------------------------------------------------------------------------------------------- whole classes


@st.composite
def at_the_means(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]:
    """Draw text logits, cache logits at the mean affinities, true ones of up to ``slack`` more, alpha and slack.

    Few distinct values make ties and reached bounds common. A class may have no keys.
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
    used = matrix(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))  # share of the slack that each class uses
    cache = tip.at_mean(torch.tensor(numbers, dtype=torch.float64), mean, beta)
    return text, cache, cache * (1 + slack * used), alpha, slack


@settings(max_examples=examples(400), deadline=None)
@given(at_the_means(), st.integers(1, 7))
def test_a_settled_query_has_searched_its_winner(
    given_: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float], most: int
) -> None:
    text, cache, true, alpha, slack = given_
    classes, met = certify.promising(tip.Terms(text, cache), Settings(alpha=alpha), slack, most)
    settled = certify.settled(tip.Terms(text, cache), Settings(alpha=alpha), slack, classes)
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
            assert settled[query]  # no other class
        if settled[query]:
            assert exact[query, own].max() >= best - tolerance
            known = lower[query].clone()
            known[own] = exact[query, own]
            assert exact[query, known.argmax()] >= best - tolerance  # the answer that is given


def test_only_a_class_that_could_win_leaves_a_query_unsettled() -> None:
    terms, own = tip.Terms(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])), Settings(alpha=1.0)
    for slack, met_of_three, settled_by_one in ((0.5, 1, True), (0.99, 1, True), (1.01, 2, False), (2.01, 3, False)):
        classes, met = certify.promising(terms, own, slack, 3)
        assert classes.tolist() == [[0, 1, 2]]
        assert int(met.sum()) == met_of_three
        assert certify.settled(terms, own, slack, classes[:, :1]).tolist() == [settled_by_one]


def test_a_tie_at_the_bound_is_searched_and_not_settled() -> None:
    terms, own = tip.Terms(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]])), Settings(alpha=1.0)
    classes, met = certify.promising(terms, own, 1.0, 2)  # with all its slack, the second class reaches 3 too
    assert met.tolist() == [[True, True]]
    assert not certify.settled(terms, own, 1.0, classes[:, :1]).any()


def test_without_alpha_the_text_alone_selects_classes() -> None:
    text, none = torch.tensor([[0.0, 3.0, 3.0, 1.0]]), Settings(alpha=0.0)
    classes, met = certify.promising(tip.Terms(text, torch.tensor([[1e6, 1.0, 2.0, 0.0]])), none, 10.0, 4)
    assert set(classes[met].tolist()) == {1, 2}
    assert not certify.settled(tip.Terms(text, torch.ones(1, 4)), none, 10.0, classes[:, :1]).any()
    assert certify.settled(tip.Terms(text, torch.ones(1, 4)), none, 10.0, classes[:, :2]).all()


@pytest.mark.parametrize(("alpha", "slack"), [(1e39, 1.0), (1e300, 1e9), (0.0, 1e9), (1e38, 1e9)])
def test_overflowing_settings_still_search_the_first_class(alpha: float, slack: float) -> None:
    text, cache = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 3.0, 1e-3]])
    classes, met = certify.promising(tip.Terms(text, cache), Settings(alpha=alpha), slack, 2)
    assert met[:, 0].all()
    assert certify.settled(tip.Terms(text, cache), Settings(alpha=alpha), slack, classes).shape == (1,)


@given(st.integers(1, 6), st.floats(0, 10), st.floats(0, 0.5), st.integers(0, 2**32 - 1))
def test_an_error_only_changes_uncertain_winners(c: int, alpha: float, error: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    text, cache = torch.from_numpy(rng.normal(size=(20, c))), torch.from_numpy(rng.gamma(1, size=(20, c)))
    other = cache * (1 + error * torch.from_numpy(rng.choice([-1.0, 1.0], (20, c))))
    changed = tip.blend(text, cache, alpha).argmax(1) != tip.blend(text, other, alpha).argmax(1)
    close = certify.uncertain(tip.Terms(text, cache), Settings(alpha=alpha), error)
    assert (close | ~changed).all()
    assert c > 1 or not close.any()


def test_distant_logits_are_not_uncertain() -> None:
    terms, own = tip.Terms(torch.tensor([[5.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.5]])), Settings(alpha=1.0)
    assert not certify.uncertain(terms, own, 0.1).any()  # 6 or 5.9, against 3 or 3.2
    assert certify.uncertain(terms, own, 1.0).all()  # 5 against 5
