"""Blend the terms of the logits, with the weights that explain held-out photos best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from retrieval_tip.arrays import slices
from retrieval_tip.settings import Settings

WRONG, REPEATS, CONVERGED = 0.2, 12, 1e-3
"""First estimate of the share of wrong labels, maximum number of estimates, and smallest difference between two."""
SMOOTHING = 0.5
"""Default smoothing of the labels, in photos (see :class:`HeldTerms`)."""
STEPS, REACH = 60, 4.0
"""Maximum number of Newton steps, and default bound on the logarithms for logits of unit spread."""
BLOCK = 1 << 16
"""Number of logits of each term to process at once, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class Blend:
    """Weights that maximise the likelihood of ``softmax(a text + b cache + g discriminant)`` on held-out photos.

    The weight of a term that does not exist is 0. ``losses`` are in nats, ``right`` marks correct answers, and
    ``weights`` are the query weights, which have mean 1. All three have shape ``[q]``.
    """

    a: float
    b: float
    g: float
    losses: Tensor
    right: Tensor
    weights: Tensor

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float((self.weights * self.losses).mean())

    @property
    def accuracy(self) -> float:
        """Fraction of correct answers."""
        return float((self.weights * self.right).mean())

    def settings(self, settings: Settings, beta: float) -> Settings:
        """Return the settings of this blend: ``alpha = b / a``, ``gamma = g / b`` and ``temperature = 1 / a``."""
        unit = self.a or 1.0
        return replace(
            settings, alpha=self.b / unit, beta=beta, gamma=self.g / self.b, temperature=1 / unit
        )


class HeldTerms:
    """The terms of held-out queries that have the class ``ids``, to be weighted as in :class:`Blend`.

    ``terms`` ``[t, q, c]`` are the terms that exist, as float64 with mean 0 and unit spread. As in Platt scaling
    (1999), the target of the correct class is ``(q + s) / (q + 2 s)`` with ``s`` = ``smoothing``, and the other classes
    share the rest. This keeps the weights of the terms finite even if all answers are right. ``reach`` bounds their
    logarithms.
    """

    def __init__(
        self,
        text: Tensor | None,
        cache: Tensor,
        discriminant: Tensor | None,
        ids: Tensor,
        *,
        smoothing: float = SMOOTHING,
        reach: float = REACH,
    ) -> None:
        optional_terms = (text, cache, discriminant)
        self.present = torch.tensor([term is not None for term in optional_terms])
        terms = torch.stack([term.double() for term in optional_terms if term is not None])
        # A constant for all classes changes no probability, but would count as spread.
        terms -= terms.mean(2, keepdim=True)
        self.scales = terms.flatten(1).std(1).clamp_min(1e-12)
        self.terms = terms.div_(self.scales[:, None, None])
        self.ids = ids
        self.correct = terms.gather(2, ids.expand(len(terms), -1)[:, :, None])[:, :, 0]
        rest = smoothing / (len(ids) + 2 * smoothing)
        self.reach = reach
        # Each term sums to 0 over the classes, so only the amount by which the target of the correct class exceeds the
        # other targets matters.
        self.sure = 1 - rest - rest / max(cache.shape[1] - 1, 1)

    def blend(self, weights: Tensor | None = None, start: Blend | None = None) -> Blend:
        """Fit the weights of the terms. ``weights`` are query weights of mean 1.

        Newton's method minimises the cross-entropy, which is convex in the weights of the terms. Its steps change their
        logarithms, so they stay positive. It starts from equal weights, or from another blend of these terms.
        """
        if weights is None:
            weights = torch.ones(len(self.ids), dtype=torch.float64)
        logs = torch.zeros(len(self.terms), dtype=torch.float64)
        if start is not None:
            factors = torch.tensor((start.a, start.b, start.g), dtype=torch.float64)
            logs = (factors[self.present] * self.scales).log().clamp(-self.reach, self.reach)
        now = self._at(logs, weights)
        for _ in range(STEPS):
            # In logarithms the loss is not convex: a negative gradient could make the curvature indefinite.
            curvature = now.curvature + torch.diag(now.gradient.clamp_min(0) + 1e-9)
            # The quadratic model only holds nearby, so a step changes a weight by a factor of at most e^2.
            step = torch.linalg.solve(curvature, now.gradient).clamp(-2, 2)
            size = 1.0
            while True:
                following = (logs - size * step).clamp(-self.reach, self.reach)
                new = self._at(following, weights)
                if new.loss <= now.loss or size < 1e-3:
                    break
                size /= 2
            # Unlike `>`, this also stops if the loss is NaN.
            if not new.loss <= now.loss:
                break
            gain = now.loss - new.loss
            logs = following
            now = new
            if gain < 1e-7:
                break
        factors = torch.zeros(3, dtype=torch.float64)
        factors[self.present] = logs.exp() / self.scales
        a, b, g = factors.tolist()
        return Blend(a, b, g, now.losses, now.right, weights)

    def robust(self, blend: Blend) -> Blend:
        """Improve a result of :meth:`blend`, if some labels of the queries may be wrong.

        A few wrong labels would make all answers uncertain. Labels are therefore assumed to be random with probability
        ``e``: ``P(y) = (1 - e) p_y + e / c``. Expectation-maximisation estimates ``e``, which becomes 0 if the labels
        are right, and gives each query the weight ``(1 - e) p_y / P(y)``. Wrong labels still count in ``losses`` and
        ``right``.
        """
        weights = blend.weights
        c = self.terms.shape[2]
        wrong = WRONG
        for _ in range(REPEATS):
            likely = (1 - wrong) * (-blend.losses).exp()
            trust = likely / (likely + wrong / c)
            trusted = weights * trust
            before = wrong
            # From 0, the estimate could never rise again.
            wrong = float((weights * (1 - trust)).mean().clamp(1e-4, 0.5))
            blend = replace(self.blend(trusted / trusted.mean(), blend), weights=weights)
            if abs(wrong - before) < CONVERGED:
                break
        return blend

    def _at(self, logs: Tensor, weights: Tensor) -> _Loss:
        """Return the loss if the logarithms of the weights are ``logs``, of shape ``[t]``."""
        q = len(self.ids)
        t = len(logs)
        factor = logs.exp()
        loss = torch.zeros((), dtype=torch.float64)
        gradient = torch.zeros(t, dtype=torch.float64)
        curvature = torch.zeros(t, t, dtype=torch.float64)
        losses = []
        right = []
        for rows in slices(q, max(1, BLOCK // self.terms.shape[2])):
            terms = self.terms[:, rows]
            w = weights[rows]
            correct = self.correct[:, rows]
            p = torch.tensordot(factor, terms, 1)
            right.append(p.argmax(1) == self.ids[rows])
            top = p.amax(1, keepdim=True)
            sums = p.sub_(top).exp_().sum(1, keepdim=True)
            total = (top + sums.log())[:, 0]
            products = p.div_(sums) * terms
            means = products.sum(2)
            losses.append(total - factor @ correct)
            loss += w @ (total - self.sure * (factor @ correct))
            gradient += (means - self.sure * correct) @ w
            squares = products.mul_(w[:, None]).flatten(1) @ terms.flatten(1).T
            curvature += squares - (w * means) @ means.T
        gradient = gradient * factor / q
        curvature *= factor[:, None] * factor / q
        return _Loss(float(loss / q), gradient, curvature, torch.cat(losses), torch.cat(right))


class _Loss(NamedTuple):
    """Mean loss, its gradient ``[t]`` and curvature ``[t, t]`` in the logarithms of the weights. See :class:`Blend`."""

    loss: float
    gradient: Tensor
    curvature: Tensor
    losses: Tensor
    right: Tensor
