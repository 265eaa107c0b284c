"""Limits on requests, and on the work that they cause."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on requests and on the work that they cause.

    A form has at most ``images`` images. A JSON body has at most ``json_bytes`` bytes and ``rows`` rows of features. At
    most ``grouped`` features are grouped at once. The answers to several queries contain at most ``cells`` numbers (see
    :meth:`served.Version.cells`). A response must start within ``seconds``, and the client must read it within the same
    time.

    Request bodies, and responses larger than :data:`guard.PART`, can occupy ``held`` bytes. There are at most
    ``indexes`` indexes. Only requests for the host names in ``hosts`` are answered. If ``hosts`` is ``None``, all
    requests are answered.

    A map contains at most ``mapped`` key values, and accuracy is estimated only for at most ``estimated`` keys. A
    request for a slow result is answered with status 202 after ``patience`` seconds. Indexes are checked for new
    versions every ``poll`` seconds.

    Attributes:
        bytes: Maximum size of a request, in bytes.
        pixels: Maximum size of an image, in pixels.
        queue: Size of the queue, in images. A client that fills more than a quarter is refused with status 429. A large
            image counts several times, and 16 features count once.
        seconds: Time limit for a response.
    """

    bytes: int = 32 << 20
    json_bytes: int = 8 << 20
    images: int = 64
    rows: int = 1024
    grouped: int = 4096
    pixels: int = 50_000_000
    seconds: float = 30.0
    cells: int = 1 << 22
    queue: int = 256
    held: int = 256 << 20
    indexes: int = 100
    hosts: frozenset[str] | None = None
    mapped: int = 1 << 24
    estimated: int = 1 << 12
    patience: float = 10.0
    poll: float = 1.0


ROWS_PER_IMAGE = 16
"""Number of rows of features that count as one image in the queue."""
