"""Addresses of indexes outside folders.

This is the only module that names the packages behind them. Each package has the two functions of :class:`Plug`, and
its schemes are registered in :data:`PLUGS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from retrieval_tip.index.stores import Store

PLUGS = dict.fromkeys(("lance", "s3", "gs"), "retrieval_tip.lance")
"""Package that stores the indexes of each scheme."""
KIND, FORMS = "LanceDB store", "lance://PATH, s3://BUCKET/PATH, gs://BUCKET/PATH"
"""Name and addresses of these stores in help and messages."""
METAVAR, EXAMPLE = "DIR|ADDRESS", "lance://indexes/things.lance"
"""Placeholder in help, and an example of an address."""


class Plug(Protocol):
    """A package that stores indexes at addresses."""

    def canonical(self, text: str) -> str:
        """Return the canonical spelling of an address. Raises UsageError if it is wrong."""

    def store_at(self, text: str) -> Store:
        """Return the store at an address. Raises UsageError if it is wrong, or a package is missing."""


def plug_of(text: str) -> Plug | None:
    """Return the package that stores the index at an address; ``None`` for the path of a folder."""
    scheme, separator, _ = text.partition("://")
    package = PLUGS.get(scheme.lower()) if separator else None
    return None if package is None else cast("Plug", importlib.import_module(package))


def parse(text: str) -> str | None:
    """Return the canonical spelling of an address; ``None`` for the path of a folder. Raises as :class:`Plug`."""
    plug = plug_of(text)
    return None if plug is None else plug.canonical(text)
