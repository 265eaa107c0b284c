"""The gradient of the cache: against finite differences, torch's own of the plain formula, and the method's forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval_tip import tip
from retrieval_tip.fit import gradient
from retrieval_tip.fit.gradient import BLOCK, AllKeys, RetrievedKeys

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class _CacheLogits(torch.autograd.Function):
    """:class:`AllKeys` as a node of torch's graph."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, keys: Tensor, values: Tensor | None, *rest: Any) -> Tensor:
        class_ids, n_classes, beta, block = rest
        cache, weights = AllKeys(keys, class_ids, n_classes, beta, values, block=block).forward(features)
        ctx.save_for_backward(features, keys, values, class_ids, weights)
        ctx.rest = n_classes, beta, block
        return cache

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_cache: Tensor) -> tuple[Tensor | None, ...]:
        features, keys, values, class_ids, weights = ctx.saved_tensors
        n_classes, beta, block = ctx.rest
        over = AllKeys(keys, class_ids, n_classes, beta, values, block=block)
        d_features = torch.zeros_like(features) if ctx.needs_input_grad[0] else None
        d_keys = torch.empty_like(keys) if ctx.needs_input_grad[1] else None
        d_values = torch.empty_like(values) if ctx.needs_input_grad[2] else None
        wanted = {"keys": d_keys is not None, "values": d_values is not None}
        for found in over.backward(d_cache, features, weights, d_features=d_features, **wanted):
            for whole, block_of in ((d_keys, found.keys), (d_values, found.values)):
                if whole is not None and block_of is not None:
                    whole[found.part] = block_of
        return d_features, d_keys, d_values, None, None, None, None


def cache_logits(
    features: Tensor,
    keys: Tensor,
    class_ids: Tensor,
    n_classes: int,
    beta: float,
    values: Tensor | None = None,
    *,
    block: int = BLOCK,
) -> Tensor:
    """:func:`tip.cache_logits` over all keys as a differentiable function of queries, keys and values.

    ``features`` ``[q, d]``, ``keys`` ``[n, d]``, ``class_ids`` ``[n]`` int64, ``values`` ``[n, c]`` or ``None`` for
    one-hot rows, to ``[q, c]``.
    """
    result: Tensor = _CacheLogits.apply(features, keys, values, class_ids, n_classes, beta, block)
    return result


class Case:
    """Queries, keys grouped by class, and values, in float64; classes are of unequal size, and some have no key."""

    def __init__(self, seed: int, counts: list[int], q: int, d: int) -> None:
        rng = np.random.default_rng(seed)
        self.c, self.n = len(counts), sum(counts)
        self.ids = torch.from_numpy(np.repeat(np.arange(self.c), counts))
        self.f, self.K, self.V, self.G = (
            torch.from_numpy(rng.standard_normal(shape) / np.sqrt(shape[1]))
            for shape in ((q, d), (self.n, d), (self.n, self.c), (q, self.c))
        )

    def leaves(self, values: bool) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (self.f, self.K, *([self.V] if values else []))]

    def plain(self, f: Tensor, K: Tensor, V: Tensor | None, beta: float) -> Tensor:
        V = torch.eye(self.c, dtype=f.dtype)[self.ids] if V is None else V
        return torch.exp(beta * (f @ K.T - 1)) @ V


cases = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    q=st.integers(1, 5),
    d=st.integers(1, 6),
)
betas = st.floats(0.1, 10)


@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("values", [False, True])
def test_the_gradient_is_that_of_finite_differences(block: int, values: bool) -> None:
    case = Case(1, [4, 0, 1, 2], q=3, d=5)

    def cache(f: Tensor, K: Tensor, V: Tensor | None = None) -> Tensor:
        return cache_logits(f, K, case.ids, case.c, 3.0, V, block=block)

    assert torch.autograd.gradcheck(cache, case.leaves(values))


@settings(max_examples=examples(150), deadline=None)
@given(cases, betas, st.integers(1, 40), st.booleans())
def test_forward_and_gradient_are_those_of_the_plain_formula(case: Case, beta: float, block: int, values: bool) -> None:
    ours, theirs = case.leaves(values), case.leaves(values)
    V, their_V = (leaves[2] if values else None for leaves in (ours, theirs))
    cache = cache_logits(*ours[:2], case.ids, case.c, beta, V, block=block)
    plain = case.plain(*theirs[:2], their_V, beta)
    method = tip.cache_logits(
        tip.affinity(case.f, case.K), case.ids, case.c, beta, values=tip.Values(case.V) if values else None
    )
    torch.testing.assert_close(cache, plain, **CLOSE)
    torch.testing.assert_close(cache.detach(), method, **CLOSE)
    for logits in (cache, plain):
        (logits * case.G).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, **CLOSE)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for_gets_a_gradient(wanted: tuple[bool, bool, bool]) -> None:
    case = Case(2, [3, 5], q=4, d=3)
    leaves = [x.clone().requires_grad_(own) for x, own in zip((case.f, case.K, case.V), wanted, strict=True)]
    cache_logits(leaves[0], leaves[1], case.ids, case.c, 2.0, leaves[2], block=3).sum().backward()
    plain = case.leaves(True)
    case.plain(*plain, 2.0).sum().backward()
    for leaf, own, whole in zip(leaves, wanted, plain, strict=True):
        assert (leaf.grad is not None) == own
        if own:
            torch.testing.assert_close(leaf.grad, whole.grad, **CLOSE)


def test_a_block_may_change_while_the_gradient_of_the_next_is_made() -> None:
    case = Case(3, [4, 5, 2], q=3, d=4)
    leaves = case.leaves(True)
    (case.plain(*leaves, 2.0) * case.G).sum().backward()
    keys, values = case.K.clone(), case.V.clone()
    over = AllKeys(keys, case.ids, case.c, 2.0, values, block=4)
    _, weights = over.forward(case.f)
    d_features = torch.zeros_like(case.f)
    parts = []
    for block in over.backward(case.G, case.f, weights, values=True, d_features=d_features):
        torch.testing.assert_close(block.keys, leaves[1].grad[block.part], **CLOSE)
        torch.testing.assert_close(block.values, leaves[2].grad[block.part], **CLOSE)
        keys[block.part] = torch.nan
        values[block.part] = torch.nan
        parts.append((block.part.start, block.part.stop))
    assert parts == [(0, 4), (4, 8), (8, 11)]
    torch.testing.assert_close(d_features, leaves[0].grad, **CLOSE)


def test_products_in_bfloat16_are_near_and_leave_the_rest_in_float32() -> None:
    case = Case(4, [20, 30], q=6, d=32)
    f, keys, given_ = case.f.float(), case.K.float(), case.G.float()
    both = [AllKeys(keys, case.ids, case.c, 2.0, products=p, block=16) for p in (torch.bfloat16, torch.float32)]
    results = []
    for over in both:
        cache, weights = over.forward(f)
        d_features = torch.zeros_like(f)
        d_keys = torch.cat([b.keys.clone() for b in over.backward(given_, f, weights, d_features=d_features)])
        results.append([cache, weights, d_features, d_keys])
    for near, exact in zip(*results, strict=True):
        assert near.dtype == torch.float32
        assert not torch.equal(near, exact)  # it is another precision
        torch.testing.assert_close(near, exact, rtol=3e-2, atol=3e-2 * float(exact.abs().max()))


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, Tensor):
                self.elements = max(self.elements, found.numel())
        return result


def test_no_matrix_of_keys_by_classes_is_ever_made() -> None:
    n, c, d, q = 600, 300, 4, 8
    f, keys = torch.randn(q, d), torch.randn(n, d, requires_grad=True)
    with _Largest() as seen:
        cache_logits(f, keys, torch.arange(n) % c, c, 1.0, block=64).sum().backward()
    assert n * q <= seen.elements < n * c / 10
    with _Largest() as seen:  # the counter sees what it should
        torch.nn.functional.one_hot(torch.arange(n) % c, c)
    assert seen.elements == n * c


# --- retrieved keys


def retrieved(case: Case, beta: float) -> RetrievedKeys:
    one_hot = torch.eye(case.c, dtype=torch.float64)[case.ids]
    return RetrievedKeys(case.K, case.ids, one_hot.T @ case.K, one_hot.sum(0), beta)


def some_rows(case: Case, k: int, slots: int) -> Tensor:
    """The ``k`` nearest keys of each query, behind them empty slots."""
    nearest = (case.f @ case.K.T).topk(min(k, case.n), dim=1).indices
    return torch.cat([nearest, torch.full((len(nearest), slots), -1)], dim=1)


def of_method(case: Case, affinity: Tensor, rows: Tensor, beta: float, totals: tip.Totals) -> Tensor:
    ids = torch.where(rows < 0, case.c, case.ids[rows.clamp_min(0)])
    return tip.cache_logits(affinity, ids, case.c, beta, totals)


@pytest.mark.parametrize("gathered", [1, 1 << 24])
def test_retrieved_keys_are_those_of_the_method_with_a_tail(monkeypatch: pytest.MonkeyPatch, gathered: int) -> None:
    monkeypatch.setattr(gradient, "GATHERED", gathered)

    @settings(max_examples=examples(100), deadline=None)
    @given(cases, betas, st.integers(1, 12), st.integers(0, 2))
    def check(case: Case, beta: float, k: int, slots: int) -> None:
        over, rows = retrieved(case, beta), some_rows(case, k, slots)
        affinity = torch.einsum("qd,qkd->qk", case.f, case.K[rows.clamp_min(0)]).masked_fill(rows < 0, 0)
        totals = tip.Totals.of(case.f, over.sums, over.counts)
        cache, weights = over.forward(case.f, rows.clone())
        torch.testing.assert_close(cache, of_method(case, affinity, rows, beta, totals), **CLOSE)
        torch.testing.assert_close(weights, torch.exp(beta * (affinity - 1)).masked_fill(rows < 0, 0), **CLOSE)

    check()


@settings(max_examples=examples(100), deadline=None)
@given(cases, betas, st.integers(1, 12), st.integers(0, 2))
def test_the_gradient_of_retrieved_keys_goes_through_their_own_weights_alone(
    case: Case, beta: float, k: int, slots: int
) -> None:
    """The tail is held constant: torch sees the exponentials of the retrieved keys and nothing else."""
    over, rows = retrieved(case, beta), some_rows(case, k, slots)
    keys = case.K.clone().requires_grad_()
    affinity = torch.einsum("qd,qkd->qk", case.f, keys[rows.clamp_min(0)]).masked_fill(rows < 0, 0)
    ids = torch.where(rows < 0, case.c, case.ids[rows.clamp_min(0)])
    (tip.cache_logits(affinity, ids, case.c, beta) * case.G).sum().backward()
    _, weights = over.forward(case.f, rows)
    met, found = over.backward(case.G, case.f, rows, weights)
    assert met.tolist() == sorted(set(rows[rows >= 0].tolist()))
    torch.testing.assert_close(found, keys.grad[met], **CLOSE)


@settings(max_examples=examples(50), deadline=None)
@given(cases, betas)
def test_all_keys_retrieved_are_all_keys(case: Case, beta: float) -> None:
    rows = some_rows(case, case.n, 0)
    over, every = retrieved(case, beta), AllKeys(case.K, case.ids, case.c, beta)
    cache, weights = over.forward(case.f, rows)
    expected, whole = every.forward(case.f)
    torch.testing.assert_close(cache, expected, **CLOSE)
    met, found = over.backward(case.G, case.f, rows, weights)
    assert met.tolist() == list(range(case.n))
    (block,) = every.backward(case.G, case.f, whole)
    torch.testing.assert_close(found, block.keys, **CLOSE)


def test_a_key_that_stands_only_in_empty_slots_is_not_met() -> None:
    case = Case(5, [3, 3], q=2, d=4)
    over, rows = retrieved(case, 2.0), torch.tensor([[4, -1, -1], [4, 2, -1]])
    _, weights = over.forward(case.f, rows)
    met, found = over.backward(case.G, case.f, rows, weights)
    assert met.tolist() == [2, 4]
    assert found.shape == (2, 4)


def test_queries_that_found_nothing_train_nothing() -> None:
    case = Case(6, [3, 3], q=2, d=4)
    over, rows = retrieved(case, 2.0), torch.full((2, 3), -1)
    cache, weights = over.forward(case.f, rows)
    tail = case.f @ over.sums.T / 3
    torch.testing.assert_close(cache, 3 * torch.exp(2 * (tail - 1)), **CLOSE)
    met, found = over.backward(case.G, case.f, rows, weights)
    assert (len(met), found.shape) == (0, (0, 4))
