"""Forward and gradient of the cache, compared with torch autograd on the plain formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval_tip import tip
from retrieval_tip.fit.gradient import AllKeys

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


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

    def plain(self, beta: float, values: bool) -> tuple[Tensor, list[Tensor]]:
        """Return cache logits by the formula, and the gradients of queries, keys and values by torch."""
        f, K, V = (x.clone().requires_grad_() for x in (self.f, self.K, self.V))
        cache = torch.exp(beta * (f @ K.T - 1)) @ (V if values else torch.eye(self.c, dtype=f.dtype)[self.ids])
        (cache * self.G).sum().backward()
        return cache.detach(), [x.grad for x in (f, K, V) if x.grad is not None]


cases = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    q=st.integers(1, 5),
    d=st.integers(1, 6),
)


def ours(
    case: Case, over: AllKeys, *, features: bool = True, keys: bool = True, values: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Return cache logits and the requested gradients."""
    trained = [x for x, asked in ((over.keys, keys), (over.values, values)) if asked and x is not None]
    for x in trained:
        x.grad = torch.full_like(x, torch.nan)
    cache = over.forward(case.f.to(over.keys.dtype))
    d_features = torch.zeros_like(case.f, dtype=over.keys.dtype) if features else None
    over.backward(case.G.to(over.keys.dtype), case.f.to(over.keys.dtype), d_features)
    return cache, [x for x in (d_features, *(x.grad for x in trained)) if x is not None]


@settings(max_examples=examples(150), deadline=None)
@given(cases, st.floats(0.1, 10), st.integers(1, 40), st.booleans())
def test_forward_and_gradient_match_the_plain_formula(case: Case, beta: float, block: int, values: bool) -> None:
    over = AllKeys(case.K.clone(), case.ids, case.c, beta, case.V.clone() if values else None, block=block)
    cache, gradients = ours(case, over)
    plain, expected = case.plain(beta, values)
    given_values = tip.Values(case.V) if values else None
    method = tip.cache_logits(tip.affinity(case.f, case.K), case.ids, case.c, beta, values=given_values)
    torch.testing.assert_close(cache, plain, **CLOSE)
    torch.testing.assert_close(cache, method, **CLOSE)
    torch.testing.assert_close(gradients, expected, **CLOSE)


@pytest.mark.parametrize("wanted", ["features", "keys", "values"])
def test_only_requested_tensors_get_a_gradient(wanted: str) -> None:
    case = Case(2, [3, 5], q=4, d=3)
    over = AllKeys(case.K.clone(), case.ids, case.c, 2.0, case.V.clone(), block=3)
    asked = {name: name == wanted for name in ("features", "keys", "values")}
    _, gradients = ours(case, over, **asked)
    _, expected = case.plain(2.0, values=True)
    torch.testing.assert_close(gradients, [expected[list(asked).index(wanted)]], **CLOSE)


def test_buffers_serve_batches_of_any_size() -> None:
    case = Case(3, [4, 5, 2], q=6, d=4)
    over = AllKeys(case.K, case.ids, case.c, 2.0, block=4)
    for q in (2, 6, 1, 3):
        torch.testing.assert_close(over.forward(case.f[:q]), case.plain(2.0, False)[0][:q], **CLOSE)


def test_bfloat16_products_are_close_and_results_stay_float32() -> None:
    case = Case(4, [20, 30], q=6, d=32)
    results = []
    for products in (torch.bfloat16, torch.float32):
        over = AllKeys(case.K.float(), case.ids, case.c, 2.0, products=products, block=16)
        cache, gradients = ours(case, over)
        results.append([cache, *gradients])
    for near, exact in zip(*results, strict=True):
        assert near.dtype == torch.float32
        assert not torch.equal(near, exact)  # the precision differs
        torch.testing.assert_close(near, exact, rtol=3e-2, atol=3e-2 * float(exact.abs().max()))


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for found in result if isinstance(result, tuple | list) else [result]:
            if isinstance(found, Tensor):
                self.elements = max(self.elements, found.numel())
        return result


def test_no_matrix_of_keys_by_classes_is_created() -> None:
    case = Case(5, [2] * 300, q=8, d=4)
    with _Largest() as seen:
        ours(case, AllKeys(case.K, case.ids, case.c, 1.0, block=64))
    assert case.n * 8 <= seen.elements < case.n * case.c / 10
    with _Largest() as seen:  # the counter does see such a matrix
        torch.nn.functional.one_hot(case.ids, case.c)
    assert seen.elements == case.n * case.c
