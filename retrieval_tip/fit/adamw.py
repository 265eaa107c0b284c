"""AdamW for matrices of keys: a block of rows at a time as gradients come, or only the rows that were met."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

MOMENTS = (0.9, 0.999)


class AdamW:
    """torch's AdamW over some tensors, whose learning rate is given at every step."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, eps: float, weight_decay: float) -> None:
        self._optimizer = torch.optim.AdamW(
            parameters, lr=0.0, betas=MOMENTS, eps=eps, weight_decay=weight_decay, fused=True
        )

    def step(self, lr: float) -> None:
        """Update the tensors that have a gradient, and drop the gradients."""
        self._step(lr)
        self._optimizer.zero_grad()

    def _step(self, lr: float) -> None:
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Moments and steps, by name."""
        state = self._optimizer.state_dict()["state"]
        return {f"{i}.{name}": value for i, parts in state.items() for name, value in parts.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Raises ValueError for what is none of these tensors."""
        whole = self._optimizer.state_dict()
        whole["state"] = {}
        shapes = {str(i): tensor.shape for i, tensor in enumerate(self._optimizer.param_groups[0]["params"])}
        for name, value in state.items():
            number, _, part = name.partition(".")
            expected = {"step": torch.Size(), "exp_avg": shapes.get(number), "exp_avg_sq": shapes.get(number)}
            if number not in shapes or value.shape != expected.get(part):
                raise ValueError(f"moment {name!r} is of shape {tuple(value.shape)}")
            whole["state"].setdefault(int(number), {})[part] = value
        if any(len(parts) < 3 for parts in whole["state"].values()):
            raise ValueError("a moment is missing")
        self._optimizer.load_state_dict(whole)


class BlockAdamW(AdamW):
    """AdamW over a matrix ``[n, d]``, in place, each block of rows while its gradient is in the processor's cache."""

    def __init__(self, matrix: Tensor, block: int, *, eps: float, weight_decay: float) -> None:
        self._rows = [torch.nn.Parameter(rows) for rows in matrix.split(block)]  # they share the matrix's memory
        self._block = block
        super().__init__(self._rows, eps=eps, weight_decay=weight_decay)

    def step_block(self, part: slice, gradient: Tensor, lr: float) -> None:
        """Update the rows ``part``, which is a block, by their gradient ``[m, d]``."""
        rows = self._rows[part.start // self._block]
        rows.grad = gradient
        self._step(lr)
        rows.grad = None


class RowAdamW:
    """AdamW over a matrix ``[n, d]``, in place, of which each step meets a few rows.

    The other rows and their moments rest, and each row counts its own steps: one that was met ``t`` times is where
    AdamW would have brought it in ``t`` steps.
    """

    def __init__(self, matrix: Tensor, *, eps: float, weight_decay: float) -> None:
        self._matrix = matrix
        self._first, self._second = torch.zeros_like(matrix), torch.zeros_like(matrix)
        self._steps = torch.zeros(len(matrix), dtype=torch.int64, device=matrix.device)
        self._eps, self._weight_decay = eps, weight_decay

    def step_rows(self, rows: Tensor, gradient: Tensor, lr: float) -> Tensor:
        """Update ``rows`` ``[u]``, each once, by their gradient ``[u, d]``; by how much they changed, ``[u, d]``."""
        self._steps[rows] += 1
        debias = [(1 - beta ** self._steps[rows, None].double()).to(gradient.dtype) for beta in MOMENTS]
        first = self._first[rows].lerp_(gradient, 1 - MOMENTS[0])
        second = self._second[rows].mul_(MOMENTS[1]).addcmul_(gradient, gradient, value=1 - MOMENTS[1])
        self._first[rows], self._second[rows] = first, second
        spread = (second / debias[1]).sqrt_().add_(self._eps)
        before = self._matrix[rows]
        after = (before * (1 - lr * self._weight_decay)).addcdiv_(first / debias[0], spread, value=-lr)
        self._matrix[rows] = after
        return after - before

    def state(self) -> dict[str, Tensor]:
        """Moments and steps, by name."""
        return {"first": self._first, "second": self._second, "steps": self._steps}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Raises ValueError for what is none of these tensors."""
        for name, own in self.state().items():
            if name not in state or state[name].shape != own.shape:
                raise ValueError(f"moment {name!r} is missing, or of another shape")
            own.copy_(state[name])


def cosine(step: int, steps: int, lr: float) -> float:
    """The learning rate of step ``step`` of ``steps``, from ``lr`` down to 0: ``lr (1 + cos(pi step / steps)) / 2``."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2
