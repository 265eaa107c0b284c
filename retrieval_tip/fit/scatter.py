"""The scatter of keys around their class means, and its prior: the scatter of other labelled photos."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retrieval_tip import tip
from retrieval_tip.arrays import DoubleArray, IntArray
from retrieval_tip.backbones.base import Part
from retrieval_tip.errors import InputError
from retrieval_tip.store.sums import Sums

PRIOR_WEIGHT = 1000
"""Number of photos that a prior counts as."""

LEAST_EIGENVALUE = 1e-6
"""Smallest eigenvalue of the scatter of few shots relative to the largest, in float32."""

SMALLEST_EIGENVALUE = 1e-7
"""Smallest eigenvalue of a scatter relative to the mean eigenvalue. Smaller eigenvalues are float32 rounding errors."""

ROUNDING = 1e-12
"""Largest scatter of equal keys relative to their squared norms. Any such scatter counts as 0."""


@dataclass(frozen=True)
class Scatter:
    """The scatter ``S`` of the shots as a float64 ``matrix`` of shape ``[d, d]``, and their mean ``m``, ``[d]``.

    If several encoders made the features, ``widths`` has the number of values of each.
    """

    mean: Tensor
    matrix: Tensor
    widths: Sequence[int] = ()

    def whitening(self, shrinkage: float) -> tip.Metric | None:
        """Return the metric with ``T T^T = ((1 - s) S / v + s I)^-1`` in float32, or ``None`` if S is 0.

        ``v`` is the mean variance of the values, or the sum over several encoders of the mean variance of each. The
        shrinkage then hardly depends on encoders that count little.
        """
        d = len(self.mean)
        scale = _mean_variance(self.matrix.diagonal(), self.widths)
        if not scale > 0:
            return None
        eye = torch.eye(d, dtype=torch.float64)
        # Every root gives the same affinities, and a Cholesky factor is faster to compute than a symmetric root.
        root = torch.linalg.cholesky((1 - shrinkage) / scale * self.matrix + shrinkage * eye)
        transform = torch.linalg.solve_triangular(root.T, eye, upper=True)
        return tip.Metric(self.mean.float(), transform.float().contiguous())

    @classmethod
    def of(
        cls, sums: Sums, prior: DoubleArray | None = None, widths: Sequence[int] = ()
    ) -> Scatter:
        """Compute the within-class scatter from sums of keys. If each class has a single key, use the total scatter.

        ``S = sum_i r_i r_i^T / n = (sum_i k_i k_i^T - sum_c n_c mu_c mu_c^T) / n``, where ``r_i`` is the difference
        between a key and its class mean. ``m`` is the mean of the class means, so that every class counts the same.

        With a ``prior``, ``S = (sum_i r_i r_i^T + w P) / (n - c + w)``, where ``P`` is the scatter of other photos and
        ``w`` is :data:`PRIOR_WEIGHT`. This is the mean of an inverse Wishart distribution.
        """
        mean, centres = _centres(sums.counts, sums.sums, total=prior is None)
        roots = centres * np.sqrt(sums.counts)[:, None]
        scatter = sums.second - roots.T @ roots
        n = sums.n
        if np.trace(scatter) <= ROUNDING * np.trace(sums.second):
            scatter = np.zeros_like(scatter)
        if prior is not None:
            scatter = scatter + PRIOR_WEIGHT * prior
            n = n - int((sums.counts > 0).sum()) + PRIOR_WEIGHT
        return cls(torch.from_numpy(mean), torch.from_numpy(scatter / n), widths)


@dataclass(frozen=True)
class FewScatter:
    """The scatter of fewer than ``d`` shots, which is 0 in most directions.

    The eigenvalues have shape ``[r]`` and the eigenvectors ``[d, r]``. Computing them from the Gram matrix of the shots
    is much faster than factorising a matrix of shape ``[d, d]``.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    widths: Sequence[int] = ()

    @classmethod
    def of(cls, keys: Tensor, ids: Tensor, c: int, widths: Sequence[int] = ()) -> FewScatter:
        """Compute the scatter of keys ``[n, d]`` from the Gram matrix of the ``r_i``."""
        sums = torch.zeros(c, keys.shape[1], dtype=torch.float64).index_add_(0, ids, keys.double())
        mean, centres = _centres(torch.bincount(ids, minlength=c).numpy(), sums.numpy())
        apart = keys - torch.from_numpy(centres.astype(np.float32)[ids.numpy()])
        decomposition = torch.linalg.eigh(
            (apart @ apart.T / len(keys)).double()
        )  # in float32, it may not converge
        values, left = (matrix.float() for matrix in decomposition)
        some = values > LEAST_EIGENVALUE * values.max()
        scaled = left[:, some] / (len(keys) * values[some]).sqrt()
        return cls(torch.from_numpy(mean), values[some], apart.T @ scaled, widths)

    @property
    def matrix(self) -> Tensor:
        """The scatter, of shape ``[d, d]``."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def whitening(self, shrinkage: float) -> tip.Metric | None:
        """See :meth:`Scatter.whitening`. The metric has a compact form, because ``T`` is ``a I`` in most directions."""
        scale = _mean_variance(self.eigenvectors.square() @ self.eigenvalues, self.widths)
        if not scale > 0:
            return None
        stretch = (
            (1 - shrinkage) * self.eigenvalues / (shrinkage * scale) + 1
        ) ** -0.5  # as a share of a
        beyond = torch.full_like(self.eigenvectors[:, :1], shrinkage**-0.5)
        factor = torch.cat([beyond, self.eigenvectors * (1 - stretch).sqrt()], dim=1).T.contiguous()
        return tip.Metric(self.mean.float(), factor=factor)


def dimensions(scatter: Scatter | FewScatter, shrinkage: float) -> float:
    """Return the effective number of dimensions in which photos of a class vary in the metric, or 0 if S is 0.

    It is ``(sum m)^2 / sum m^2``, with the eigenvalues ``m`` of ``T^T S T``. Two photos of different classes then have
    an affinity whose variance is about the inverse of this number.
    """
    scale = _mean_variance(scatter.matrix.diagonal(), scatter.widths)
    values = torch.linalg.eigvalsh(scatter.matrix / (scale or 1)).clamp_min(0)
    inside = values / ((1 - shrinkage) * values + shrinkage)
    return float(inside.sum() ** 2 / inside.square().sum()) if scale > 0 else 0.0


def _mean_variance(variances: Tensor, widths: Sequence[int]) -> float:
    return sum(float(block.mean()) for block in variances.split(list(widths) or len(variances)))


def _centres(
    counts: IntArray, sums: DoubleArray, *, total: bool = True
) -> tuple[DoubleArray, DoubleArray]:
    """Return the mean of the class means, and the class means.

    If ``total`` is true and each class has one key, the overall mean replaces the class means.
    """
    means = sums / np.maximum(counts, 1)[:, None]
    centres = (
        means
        if counts.max() > 1 or not total
        else np.broadcast_to(sums.sum(0) / counts.sum(), sums.shape)
    )
    return means[counts > 0].mean(0), centres


def pooled(sums: Sequence[Sums]) -> DoubleArray:
    """Return the within-class scatter of several sets of keys as a prior, of shape ``[d, d]``.

    ``P = sum_i r_i r_i^T / (n - c)``, where ``r_i`` is the difference between a key and its class mean. Raises
    InputError if no class has two keys, or if the keys have different lengths.
    """
    if len({key_sums.second.shape for key_sums in sums}) > 1:
        raise InputError("prior: features of different lengths; give indexes of the same encoders")
    free = sum(key_sums.n - int((key_sums.counts > 0).sum()) for key_sums in sums)
    if not free:
        raise InputError(
            "prior: no class has two photos, so their spread is unknown; give another index"
        )
    scatters = []
    for key_sums in sums:
        roots = key_sums.sums / np.sqrt(np.maximum(key_sums.counts, 1))[:, None]
        scatters.append(key_sums.second - roots.T @ roots)
    return np.asarray(sum(scatters) / free)


PRIORS = Path(__file__).parent / "priors"
"""Folder of known priors, as float16 arrays of shape ``[d, d]`` (see ``benchmarks/prior.py``)."""
PRIOR_SCALE = 1024.0
"""Factor of the stored priors, because float16 has few digits for numbers below 1e-4."""


def known_prior(part: Part) -> DoubleArray | None:
    """Return the prior that is known for the features of an encoder, of shape ``[d, d]``, or ``None``."""
    encoder = part.identity
    prior = None if encoder is None else _load_prior(f"{encoder.model}-{encoder.pretrained}.npy")
    return prior if prior is not None and len(prior) == part.width else None


@functools.cache
def _load_prior(name: str) -> DoubleArray | None:
    # The name comes from a manifest, so it is compared with the files and never opened as a path.
    path = next((path for path in PRIORS.glob("*.npy") if path.name == name), None)
    return None if path is None else np.load(path).astype(np.float64) / PRIOR_SCALE
