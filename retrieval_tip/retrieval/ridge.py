"""Values that were solved, as keys come and go: what a key gives depends on the keys around it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from retrieval_tip import tip
from retrieval_tip.errors import InputError
from retrieval_tip.retrieval.keys import KEY_BLOCK, Keys
from retrieval_tip.retrieval.labelled_keys import LabelledKeys

IntArray = npt.NDArray[np.int64]

MOST_SOLVED = 1 << 14
"""Keys whose values are solved at once, at most: the system has n^2 numbers, and takes n^3 / 3 steps."""

SOLVED_AGAIN = 4096
"""Keys up to which a change solves all values anew, a second at most; beyond, those of the keys that it touches."""


@dataclass(frozen=True)
class Ridge:
    """The system that values solve, ``(G + lambda I) V = Y`` (:func:`tip.ridge_values`), of ``c`` classes."""

    n_classes: int
    beta: float
    ridge: float
    device: str

    def values(self, points: Tensor, ids: Tensor) -> Tensor:
        """Solve the values ``[n, c]`` float32 of keys at ``points`` ``[n, d]`` of classes ``ids`` ``[n]`` at once.

        Raises InputError if keys are so far from norm 1 that float32 cannot solve them.
        """
        return self._solve(points, self._gram(points), one_hot(ids, self.n_classes).float())

    def solved(self, labelled: LabelledKeys) -> LabelledKeys:
        """With the values of all keys solved anew, where they are few enough for that to cost little."""
        if len(labelled.keys) > SOLVED_AGAIN:
            return labelled
        ids = torch.from_numpy(labelled.class_ids).to(self.device)
        return replace(labelled, values=self.values(self._on_device(np.asarray(labelled.met)), ids))

    def added(self, keys: Keys, values: Tensor, points: npt.NDArray[np.floating], ids: IntArray) -> Tensor:
        """Values ``[m, c]`` of new keys at ``points`` ``[m, d]``, among keys that have ``values`` ``[n, c]``.

        They answer what the others leave, ``V_b = (G_bb + lambda I)^-1 (Y_b - G_ba V_a)``: one step of block
        Gauss-Seidel, a block of the new keys after the other. Where all will be :meth:`solved`, the targets.
        """
        wanted = self._wanted(ids)
        if keys.n + len(ids) <= SOLVED_AGAIN:
            return wanted
        own, parts = self._on_device(points), [values[:0]]
        for start in range(0, len(own), KEY_BLOCK):
            block = own[start : start + KEY_BLOCK]
            left = wanted[start : start + KEY_BLOCK] - keys.cache_logits(block, self.beta, values)
            left -= tip.weight(tip.affinity(block, own[:start]), self.beta) @ torch.cat(parts)
            parts.append(self._solve(block, self._gram(block), left))
        return torch.cat(parts)

    def relabelled(self, keys: Keys, labelled: LabelledKeys, rows: IntArray, class_ids: IntArray) -> LabelledKeys:
        """Solve the values of the keys at ``rows`` ``[m]`` for classes ``class_ids`` ``[m]``; the others stay."""
        assert labelled.values is not None
        if len(labelled.keys) <= SOLVED_AGAIN:
            return labelled  # all will be solved
        own = self._on_device(np.asarray(labelled.met[rows]))
        gram, values = self._gram(own), labelled.values.clone()
        others = keys.cache_logits(own, self.beta, values) - gram @ values[rows]
        values[rows] = self._solve(own, gram, self._wanted(class_ids) - others)
        return replace(labelled, values=values)

    def _solve(self, points: Tensor, gram: Tensor, targets: Tensor) -> Tensor:
        if float(gram.diagonal().max()) * torch.finfo(gram.dtype).eps < self.ridge:  # else rounding hides the ridge
            with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # torch's stubs lack it
                return tip.ridge_values(gram, targets, self.ridge)
        longest = float(torch.linalg.vector_norm(points.double(), dim=1).max())
        raise InputError(
            f"keys: no values can be solved at beta {self.beta:g} for keys of norm {longest:.4g}; "
            "scale keys to norm 1 (norms unit)"
        )

    def _on_device(self, points: npt.NDArray[np.floating]) -> Tensor:
        return torch.from_numpy(points.astype(np.float32)).to(self.device)

    def _gram(self, points: Tensor) -> Tensor:
        affinity = tip.affinity(points, points)
        return tip.weight(affinity, self.beta, out=affinity)

    def _wanted(self, ids: IntArray) -> Tensor:
        return one_hot(torch.from_numpy(ids).to(self.device), self.n_classes).float()
