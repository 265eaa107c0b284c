"""The names and ranks of classes as AddaxAI needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from retrieval_tip.data.tables import items_of, texts
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import csv_of
from retrieval_tip.levels import Levels
from retrieval_tip.wording import counted, few, show

RANKS = ("class", "order", "family", "genus", "species")
MOST = 100_000  # rows of a table of ranks
DELETED = {"bait", "blank", "empty", "false detection", "none", "vide"}
"""Classes whose boxes AddaxAI deletes."""
GENERAL = {"other", "unknown", "animal", "mammal", "no cv result"}
"""Classes that AddaxAI replaces by another class of the same event."""
UNREADABLE = {0x81, 0x8D, 0x8F, 0x90, 0x9D}
"""Bytes that AddaxAI cannot read in names on Windows."""

Ranks = Mapping[str, Sequence[str]]
"""The :data:`RANKS` of each class, which are empty if they are not known."""


def lower_case(class_names: Sequence[str]) -> list[str]:
    """Return the names in lower case, as AddaxAI stores them. Raises UsageError if it would confuse them."""
    labels = [name.lower() for name in class_names]
    (label, times), *_ = Counter(labels).most_common(1)
    if times > 1:
        raise UsageError(f"class {label!r}: differs from another only by capitals; rename one")
    for name in labels:
        if ";" in name:
            raise UsageError(f"class {name!r}: AddaxAI cannot read names with ;; rename it")
    return labels


def ranks_of(labels: Sequence[str], table: Path | None, groups: Levels | None) -> Ranks:
    """Return the ranks of classes from a table, or else from groups of the index whose levels are ranks.

    Raises InputError if the table lacks a column or has no class of the index.
    """
    if table is not None:
        return _from_table(labels, table)
    if groups is None:
        return {}
    ranks: dict[str, list[str]] = {}
    for name, path in groups.paths.items():
        by_level = dict(zip(map(str.lower, groups.levels[1:]), path, strict=True))
        ranks[name.lower()] = [(by_level.get(rank) or "").lower() for rank in RANKS]
    return {label: ranks[label] for label in labels if any(ranks.get(label, ()))}


def _from_table(labels: Sequence[str], table: Path) -> Ranks:
    items, _ = items_of(table, MOST)
    name = show(table)
    columns = [texts(items, name, column, needed=False) for column in ("model_class", *RANKS)]
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    ranks = {}
    for label, *path in rows:
        ranks[(label or "").strip().lower()] = [(rank or "").strip().lower() for rank in path]
    kept = {label: ranks[label] for label in labels if label in ranks}
    if not kept:
        raise InputError(f"{name}: has no class of this index ({few(labels)})")
    for path in kept.values():
        *_, genus, species = path
        path[-1] = species.removeprefix(f"{genus} ")  # the epithet alone
    return kept


def csv(labels: Sequence[str], ranks: Ranks) -> str:
    """Return the table that AddaxAI reads."""
    unknown = ("",) * len(RANKS)
    rows = [(label, *ranks.get(label, unknown)) for label in labels]
    return csv_of([("model_class", *RANKS), *rows])


def cautions(labels: Sequence[str], ranks: Ranks) -> Iterator[str]:
    """Yield what AddaxAI will do to classes that a user may not expect."""
    if deleted := [label for label in labels if label in DELETED]:
        yield f"AddaxAI deletes boxes of {few(deleted)}; rename the class if it is an animal"
    if general := [label for label in labels if label in GENERAL]:
        yield f"AddaxAI replaces {few(general)} by another class of the same event; rename the class to keep it"
    if unreadable := [label for label in labels if UNREADABLE & {*label.encode()}]:
        yield f"AddaxAI cannot read {few(unreadable)} on Windows; rename the class without accents"
    unnamed = [label for label, path in ranks.items() if any(path) and not path[-1]]
    if unnamed:
        many = counted(len(unnamed), "class", "has", "have")
        yield f"{many} ranks but no species, so AddaxAI shows the narrowest rank instead: {few(unnamed)}"
    if not ranks:
        yield "no class has ranks, so AddaxAI does not replace unsure answers by a genus or a family; give --taxonomy"
