"""AdamW by blocks and by rows, against torch's own over the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrieval_tip.fit.adamw import MOMENTS, AdamW, BlockAdamW, RowAdamW, cosine

N, D, STEPS, LR = 11, 5, 12, 1e-3
OPTIONS = {"eps": 1e-4, "weight_decay": 0.01}
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=dtype)


def gradients(steps: int = STEPS, seed: int = 1) -> Tensor:
    """Of unlike sizes, so that eps matters to some."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.arange(-6, -1).repeat(3)[:N, None].double()
    return torch.randn(steps, N, D, generator=generator, dtype=torch.float64) * size


def rate(step: int) -> float:
    return cosine(step, STEPS, LR)


class Torch:
    """torch's AdamW with its cosine schedule, as one writes it."""

    def __init__(self, matrix: Tensor, rates: list[float] | None = None, **options: Any) -> None:
        self.matrix, self.rates, self.done = torch.nn.Parameter(matrix.clone()), rates, 0
        self.optimizer = torch.optim.AdamW([self.matrix], lr=LR, **(OPTIONS | options))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

    def step(self, gradient: Tensor) -> None:
        if self.rates is not None:
            self.optimizer.param_groups[0]["lr"] = self.rates[self.done]
        self.matrix.grad = gradient.clone()
        self.optimizer.step()
        self.done += 1
        if self.rates is None:
            self.schedule.step()


@pytest.mark.parametrize("steps", [1, 7, 300])
def test_the_cosine_is_torchs(steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        assert cosine(step, steps, 0.3) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        schedule.step()
    assert cosine(0, steps, 0.3) == 0.3
    assert cosine(steps, steps, 0.3) == 0


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(1, N + 5), st.sampled_from([(1e-4, 0.01), (1e-8, 0.0), (1e-2, 0.5)]), st.booleans())
def test_blocks_are_where_torch_brings_the_whole_matrix(
    block: int, options: tuple[float, float], backwards: bool
) -> None:
    given_ = {"eps": options[0], "weight_decay": options[1]}
    matrix, theirs = start(), Torch(start(), **given_)
    optimizer = BlockAdamW(matrix, block, **given_)
    parts = [slice(at, min(at + block, N)) for at in range(0, N, block)]
    for step, gradient in enumerate(gradients()):
        for part in reversed(parts) if backwards else parts:
            optimizer.step_block(part, gradient[part].clone(), rate(step))
        theirs.step(gradient)
    torch.testing.assert_close(matrix, theirs.matrix.data, **TIGHT)
    assert not torch.allclose(matrix, start(), atol=1e-4)


def test_a_block_without_a_gradient_rests() -> None:
    matrix = start()
    optimizer = BlockAdamW(matrix, 4, **OPTIONS)
    for step, gradient in enumerate(gradients()):
        optimizer.step_block(slice(4, 8), gradient[4:8].clone(), rate(step))
    assert torch.equal(matrix[:4], start()[:4])
    assert torch.equal(matrix[8:], start()[8:])
    assert not torch.equal(matrix[4:8], start()[4:8])


def test_several_tensors_are_where_torch_brings_them() -> None:
    ours, theirs = ([torch.nn.Parameter(start()), torch.nn.Parameter(start()[0])] for _ in range(2))
    optimizer = AdamW(ours, **OPTIONS)
    plain = torch.optim.AdamW(theirs, lr=LR, **OPTIONS)
    for gradient in gradients():
        for parameters in (ours, theirs):
            parameters[0].grad, parameters[1].grad = gradient.clone(), gradient[0].clone()
        optimizer.step(LR)
        assert all(parameter.grad is None for parameter in ours)
        plain.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.data, other.data, **TIGHT)


def test_rows_all_met_are_where_torch_brings_them() -> None:
    matrix, theirs = start(), Torch(start())
    optimizer = RowAdamW(matrix, **OPTIONS)
    for step, gradient in enumerate(gradients()):
        before = matrix.clone()
        change = optimizer.step_rows(torch.arange(N), gradient.clone(), rate(step))
        torch.testing.assert_close(change, matrix - before, **TIGHT)
        theirs.step(gradient)
    torch.testing.assert_close(matrix, theirs.matrix.data, **TIGHT)


def test_the_first_steps_in_float32_are_as_exact_as_torchs() -> None:
    """``1 - 0.999`` in float32 is off by 5e-5 of itself."""
    ours, exact = torch.zeros(N, D), Torch(torch.zeros(N, D, dtype=torch.float64), [LR])
    gradient = gradients()[0]
    RowAdamW(ours, **OPTIONS).step_rows(torch.arange(N), gradient.float(), LR)
    exact.step(gradient)
    torch.testing.assert_close(ours.double(), exact.matrix.data, rtol=1e-6, atol=0)


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.sets(st.integers(0, N - 1), min_size=0), min_size=1, max_size=STEPS))
def test_a_row_met_some_times_is_where_those_times_alone_would_have_brought_it(met: list[set[int]]) -> None:
    matrix = start()
    optimizer = RowAdamW(matrix, **OPTIONS)
    for step, (rows, gradient) in enumerate(zip(met, gradients(), strict=False)):
        chosen = torch.tensor(sorted(rows), dtype=torch.int64)
        optimizer.step_rows(chosen, gradient[chosen], rate(step))
    for row in range(N):
        times = [step for step, rows in enumerate(met) if row in rows]
        alone = Torch(start()[row], [rate(step) for step in times])
        for step in times:
            alone.step(gradients()[step, row])
        torch.testing.assert_close(matrix[row], alone.matrix.data, **TIGHT)
        assert times or torch.equal(matrix[row], start()[row])


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(kind: str) -> None:
    def made(matrix: Tensor) -> Any:
        return BlockAdamW(matrix, 4, **OPTIONS) if kind == "blocks" else RowAdamW(matrix, **OPTIONS)

    def step(optimizer: Any, number: int) -> None:
        gradient = gradients()[number].float()
        if kind == "rows":
            rows = torch.arange(number % 3, N, 2)
            optimizer.step_rows(rows, gradient[rows], rate(number))
            return
        for at in range(0, N, 4):
            optimizer.step_block(slice(at, min(at + 4, N)), gradient[at : at + 4], rate(number))

    unbroken = start(torch.float32)
    optimizer = made(unbroken)
    for number in range(5):
        step(optimizer, number)
    matrix, state = unbroken.clone(), {name: tensor.clone() for name, tensor in optimizer.state().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    another = made(matrix)
    another.restore(state)
    for number in range(5, STEPS):
        step(optimizer, number)
        step(another, number)
    assert torch.equal(matrix, unbroken)
    forgetful = made(bare := unbroken.clone())
    step(forgetful, 5)
    step(another, 5)
    assert not torch.equal(bare, matrix)  # the moments matter
    assert {name: t.dtype for name, t in another.state().items()} == {name: t.dtype for name, t in kept.items()}


def test_the_moments_are_torchs() -> None:
    assert torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults["betas"] == MOMENTS
