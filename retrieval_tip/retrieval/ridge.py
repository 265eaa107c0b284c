"""Solve the values of keys, and update them as keys are added, removed or relabelled."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from retrieval_tip import tip
from retrieval_tip.arrays import IntArray, KeyArray, slices
from retrieval_tip.errors import InputError
from retrieval_tip.retrieval.keys import KEY_BLOCK, Keys
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.settings import ClassPrior

MOST_SOLVED = 1 << 14
"""Maximum number of keys to solve at once. The system has n^2 entries, and solving it takes n^3 / 3 operations."""

GRAM_BLOCK = 1024
"""Number of rows of a Gram matrix to compute at once."""

SOLVED_AGAIN = 4096
"""If there are at most this many keys, every edit solves all values again, which takes a second."""

LEAST_HALF = 512
"""Below twice this number of keys, zeros are not skipped to solve for values."""


def ridge_values(gram: Tensor, targets: Tensor, ridge: float | Tensor) -> Tensor:
    """Solve for the values that classify the keys themselves, by kernel ridge regression.

    The values are ``V = (G + diag(lambda))^-1 Y`` (ProKeR, Bendou et al., CVPR 2025, equation 6). If the inverse is
    replaced by the identity, the result is plain Tip-Adapter.

    - ``gram`` ``[n, n]``: the matrix ``G = exp(-beta (1 - phi(K) phi(K)^T))``, which is overwritten. Only its lower
      triangle is read. It takes the least memory if it is stored by column.
    - ``targets`` ``[n, c]``: the one-hot labels ``Y``.
    - ``ridge``: the regularisation strength ``lambda``, which is a number above 0, or one such number per key.

    Raises torch.linalg.LinAlgError if the system cannot be solved in that dtype.
    """
    gram.diagonal().add_(ridge)
    # On a CPU, it is factorised in place, so that only one matrix of n^2 entries is in memory.
    root = torch.linalg.cholesky(gram, out=gram if gram.is_cpu else None)
    values: Tensor = torch.linalg.solve_triangular(root.T, _forward(root, targets), upper=True)
    return values


def _forward(root: Tensor, targets: Tensor) -> Tensor:
    """Solve ``L X = Y`` for a lower triangle ``L``, skipping the zeros of ``X`` above the first key of each class."""
    half = len(root) // 2
    solution = torch.zeros_like(targets)
    early = targets[:half].any(0)
    if half < LEAST_HALF or early.all():
        torch.linalg.solve_triangular(root, targets, upper=False, out=solution)
        return solution
    solution[:half, early] = first = _forward(root[:half, :half], targets[:half, early])
    others = targets[half:, early] - root[half:, :half] @ first
    solution[half:, early] = torch.linalg.solve_triangular(root[half:, half:], others, upper=False)
    solution[half:, ~early] = _forward(root[half:, half:], targets[half:, ~early])
    return solution


def class_weights(counts: Tensor) -> Tensor:
    """Return weights ``mean(n) / n_c`` of shape ``[c]``, which give all classes equal weight.

    The mean only includes classes that have keys.
    """
    return counts[counts > 0].float().mean() / counts.clamp_min(1)


@dataclass(frozen=True)
class Ridge:
    """The linear system of solved values for ``c`` classes (see :func:`ridge_values`).

    The system is ``(G + lambda diag(1 / omega)) V = Y``. For a key of class ``c``, which has ``n_c`` keys, ``omega_i``
    is ``mean(n) / n_c``, so a class gains nothing from having more shots than others. If ``class_prior`` is ``shots``,
    ``omega`` is 1. A class that has no keys gets the mean value of the other classes plus ``bonus / n``, so that its
    cache logit is neutral if ``bonus`` is 0.
    """

    n_classes: int
    beta: float
    ridge: float
    device: str
    class_prior: ClassPrior = "even"
    bonus: float = 0.0

    def values(self, points: Tensor, ids: Tensor) -> Tensor:
        """Solve the values of keys at ``points`` as a float32 tensor of shape ``[n, c]``.

        Raises InputError if the norms of the keys are too far from 1 for float32.
        """
        targets = one_hot(ids, self.n_classes).float()
        values = self._solve(points, self._gram(points), targets, self._ridges(ids, ids))
        return self._neutral(values, ids)

    def solved(self, labelled: ArrayRows) -> ArrayRows:
        """Solve all values again. Above :data:`SOLVED_AGAIN` keys, solve only those of classes that have no keys."""
        ids = torch.from_numpy(labelled.class_ids).to(self.device)
        if len(labelled.keys) > SOLVED_AGAIN:
            assert labelled.values is not None
            return replace(labelled, values=self._neutral(labelled.values, ids))
        points = self._on_device(np.asarray(labelled.vectors))
        return replace(labelled, values=self.values(points, ids))

    def added(self, keys: Keys, points: KeyArray, ids: IntArray) -> Tensor:
        """Return values of shape ``[m, c]`` for new keys at ``points``, given the other keys and their values.

        The new values fit the residual of the other keys, ``V_b = (G_bb + lambda I)^-1 (Y_b - G_ba V_a)``, which is one
        step of block Gauss-Seidel for each block of new keys. If :meth:`solved` will solve all keys, the targets are
        returned.
        """
        new_ids = torch.from_numpy(ids).to(self.device)
        wanted = one_hot(new_ids, self.n_classes).float()
        if keys.n + len(ids) <= SOLVED_AGAIN:
            return wanted
        new = self._on_device(points)
        parts = [wanted[:0]]
        ridges = self._ridges(new_ids, torch.cat([keys.class_ids, new_ids]))
        for rows in slices(len(new), KEY_BLOCK):
            block = new[rows]
            left = wanted[rows] - keys.cache_logits(block, self.beta)
            left -= tip.weight(tip.affinity(block, new[: rows.start]), self.beta) @ torch.cat(parts)
            parts.append(self._solve(block, self._gram(block), left, ridges[rows]))
        return torch.cat(parts)

    def relabelled(
        self, keys: Keys, labelled: ArrayRows, rows: IntArray, class_ids: IntArray
    ) -> ArrayRows:
        """Solve the values of the keys at ``rows`` for their new ``class_ids``, and keep the other values."""
        assert labelled.values is not None
        if len(labelled.keys) <= SOLVED_AGAIN:
            return labelled  # `solved` will solve all of them
        points = self._on_device(np.asarray(labelled.vectors[rows]))
        gram = self._gram(points)
        values = labelled.values.clone()
        weights = tip.weight(tip.affinity(points, points), self.beta)
        others = keys.cache_logits(points, self.beta) - weights @ values[rows]
        new_ids = torch.from_numpy(class_ids).to(self.device)
        every = keys.class_ids.clone()
        every[rows] = new_ids
        wanted = one_hot(new_ids, self.n_classes).float()
        values[rows] = self._solve(points, gram, wanted - others, self._ridges(new_ids, every))
        return replace(labelled, values=values)

    def _solve(self, points: Tensor, gram: Tensor, targets: Tensor, ridges: Tensor) -> Tensor:
        rounding = float(gram.diagonal().max()) * torch.finfo(gram.dtype).eps
        if rounding < float(ridges.min()):  # otherwise rounding errors hide the ridge
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # missing in torch's type stubs
                return ridge_values(gram, targets, ridges)
        longest = float(torch.linalg.vector_norm(points.double(), dim=1).max())
        raise InputError(
            f"keys: cannot solve values at beta {self.beta:g} for keys of norm {longest:.4g}; "
            "scale keys to norm 1 (norms unit)"
        )

    def _neutral(self, values: Tensor, ids: Tensor) -> Tensor:
        """Return the values, after setting those of each class without a key in ``ids``."""
        empty = torch.bincount(ids, minlength=self.n_classes) == 0
        if not empty.any() or empty.all():
            return values
        neutral = values[:, ~empty].mean(1, keepdim=True) + self.bonus / len(values)
        return torch.where(empty, neutral, values)

    def _on_device(self, points: KeyArray) -> Tensor:
        return torch.from_numpy(points.astype(np.float32)).to(self.device)

    def _gram(self, points: Tensor) -> Tensor:
        """Return the lower triangle of the Gram matrix in blocks of rows. The upper triangle is undefined."""
        n = len(points)
        gram = points.new_empty(n, n).T  # stored by column, so that it is factorised in place
        for rows in slices(n, GRAM_BLOCK):
            block = gram[rows, : rows.stop]
            tip.affinity(points[rows], points[: rows.stop], out=block)
            tip.weight(block, self.beta, out=block)
        return gram

    def _ridges(self, ids: Tensor, every: Tensor) -> Tensor:
        if self.class_prior == "shots":
            return torch.full((len(ids),), self.ridge, device=self.device)
        return self.ridge / class_weights(torch.bincount(every, minlength=self.n_classes))[ids]
