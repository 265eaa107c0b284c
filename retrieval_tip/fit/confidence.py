"""Say how sure a figure is that was measured on few photos."""

from __future__ import annotations

from torch import Tensor


def wilson(share: float, n: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share that was measured on ``n`` items (Wilson, 1927)."""
    # Unlike share ± z error, this interval has a width even if all items are right.
    z = 1.96
    centre = share + z * z / (2 * n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def is_clear(differences: Tensor) -> bool:
    """Return whether the mean of some differences is more than two standard errors above 0."""
    error = float(differences.std()) / len(differences) ** 0.5
    return bool(float(differences.mean()) > 2 * error)
