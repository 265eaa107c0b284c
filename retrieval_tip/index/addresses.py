"""Resolve the addresses of indexes that are not stored in a folder.

Each package that stores such indexes provides the two functions of :class:`Plug`, and its URL schemes are registered in
:data:`PLUGS`. No other module refers to these packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from retrieval_tip.index.stores import Store

PLUGS = dict.fromkeys(("lance", "s3", "gs"), "retrieval_tip.lance")
"""Mapping from each URL scheme to the package that stores such indexes."""
KIND, FORMS = "LanceDB store", "lance://PATH, s3://BUCKET/PATH, gs://BUCKET/PATH"
"""Name of these stores and the forms of their addresses, as shown in help texts and messages."""
METAVAR, EXAMPLE = "DIR|ADDRESS", "lance://indexes/things.lance"
"""Placeholder for a place in the help, and an example of an address."""


class Plug(Protocol):
    """A package that stores indexes under its own URL schemes."""

    def canonical(self, text: str) -> str:
        """Return the canonical spelling of an address. Raises UsageError if the address is invalid."""

    def store_at(self, text: str) -> Store:
        """Return the store at an address. Raises UsageError if the address is invalid or a package is not installed."""


def plug_of(text: str) -> Plug | None:
    """Return the package that stores the index at an address, or ``None`` for a folder."""
    scheme, separator, _ = text.partition("://")
    package = PLUGS.get(scheme.lower()) if separator else None
    return None if package is None else cast("Plug", importlib.import_module(package))


def parse(text: str) -> str | None:
    """Return the canonical spelling of an address, or ``None`` for a folder. Raises UsageError if it is invalid."""
    plug = plug_of(text)
    return None if plug is None else plug.canonical(text)
