"""Addresses of indexes outside folders. Only this module names the packages that keep them.

Such a package has the two functions of :class:`Plug`, and its scheme is registered in :data:`PLUGS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from retrieval_tip.index.stores import Store

PLUGS = dict.fromkeys(("lance", "s3", "gs"), "retrieval_tip.lance")
"""The package that keeps the indexes of each scheme."""
KIND, FORMS = "LanceDB store", "lance://PATH, s3://BUCKET/PATH, gs://BUCKET/PATH"
"""What help and messages call these stores, and their addresses."""
METAVAR, EXAMPLE = "DIR|lance://PATH|s3://...", "lance://indexes/things.lance"
"""How help shows a place, and an example of an address."""


class Plug(Protocol):
    """A package that keeps indexes at addresses."""

    def canonical(self, text: str) -> str:
        """Return the one spelling of an address. Raises UsageError if it is wrong."""

    def store_at(self, text: str) -> Store:
        """Return the store at an address. Raises UsageError if it is wrong, or something has to be installed."""


def plug_of(text: str) -> Plug | None:
    """Return the package that keeps the index at an address; ``None`` for the path of a folder."""
    scheme, separator, _ = text.partition("://")
    package = PLUGS.get(scheme.lower()) if separator else None
    return None if package is None else cast("Plug", importlib.import_module(package))


def parse(text: str) -> str | None:
    """Return the one spelling of an address; ``None`` for the path of a folder. Raises UsageError as the package."""
    plug = plug_of(text)
    return None if plug is None else plug.canonical(text)
