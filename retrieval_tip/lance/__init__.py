"""Store indexes in LanceDB instead of in a folder. See :class:`index.addresses.Plug`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrieval_tip.index.stores import Store


def canonical(text: str) -> str:
    """Return the canonical spelling of an address. Raises UsageError if the address is invalid."""
    from retrieval_tip.lance.address import Address

    return str(Address.parse(text))


def store_at(text: str) -> Store:
    """Return the store at an address. Raises UsageError if the address is invalid or LanceDB is not installed."""
    from retrieval_tip.lance.address import Address
    from retrieval_tip.lance.lance_store import LanceStore

    return LanceStore(Address.parse(text))
