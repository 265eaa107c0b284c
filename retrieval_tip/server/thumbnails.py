"""Thumbnails of photos on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from retrieval_tip.data import images
from retrieval_tip.errors import InputError
from retrieval_tip.server.batching import Kept

KEPT_BYTES, OVERHEAD = 64 << 20, 1 << 10
"""Memory for thumbnails, and the overhead of each thumbnail, in bytes."""
AT_ONCE = 256
"""Maximum number of thumbnails in progress."""


class Thumbnails:
    """Thumbnails of images that have at most ``pixels`` pixels. Relative paths are resolved against ``root``."""

    def __init__(self, root: Path | None, pixels: int, threads: int) -> None:
        self._root, self._pixels = root or Path(), pixels
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="draw")
        self._kept: Kept[Hashable, bytes] = Kept(
            self._threads, most=KEPT_BYTES, room=AT_ONCE, size=lambda data: len(data) + OVERHEAD
        )

    def path(self, source: str) -> Path | None:
        """Return the path of the image file that ``source`` names, if it exists."""
        path = self._root / source
        try:
            return path if path.suffix.lower() in images.extensions() and path.is_file() else None
        except (OSError, ValueError):  # the source is not a valid file name
            return None

    async def of_file(self, path: Path, size: int, digest: str | None) -> bytes:
        """Return a thumbnail of a file as JPEG data.

        Raises OSError or InputError if the image cannot be read, or if its bytes have another ``digest``.
        """
        seen = path.stat()

        def read() -> bytes:
            data = images.read(path)
            if digest and hashlib.sha256(data).hexdigest() != digest:
                raise InputError("the file now contains another photo")
            return data

        return await self.of((path, seen.st_mtime_ns, seen.st_size, digest), read, size)

    async def of(self, name: Hashable, read: Callable[[], bytes], size: int) -> bytes:
        """Return a thumbnail of the image that ``read`` returns as JPEG data. It is kept under its ``name``.

        Raises InputError if the image cannot be read.
        """
        return await self._kept((name, size), lambda: images.thumbnail(read(), size, most=self._pixels))

    def close(self) -> None:
        """Finish the thumbnails in progress."""
        self._threads.shutdown()
