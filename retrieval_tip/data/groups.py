"""Read tables of groups, which name one or several levels above the classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pyarrow.compute as pc

from retrieval_tip.data.tables import InMemory, items_of, reading, texts
from retrieval_tip.errors import InputError, warn_once
from retrieval_tip.files import map_regular
from retrieval_tip.levels import Levels
from retrieval_tip.wording import counted, few, show

MOST_GROUPED = 100_000  # classes of a table of groups, which every manifest has
MOST_GROUPS = 1 << 24  # bytes of a table of groups
MOST_LEVELS = 16  # levels of groups above the classes


def read_groups(table: str | os.PathLike[str] | bytes, class_names: Sequence[str]) -> Levels:
    """Read the groups of classes (see :class:`settings.BuildOptions`). Warn of classes that are not ``class_names``.

    ``table`` is a file, or the bytes of a file. Raises InputError if it is invalid, or if it has no such class.
    """
    name = "groups" if isinstance(table, bytes) else show(table)
    with reading(name):
        data = table if isinstance(table, bytes) else map_regular(table)
    too_large = f"{name}: larger than {MOST_GROUPS:,} bytes; keep the classes of the index"
    if len(data) > MOST_GROUPS:
        raise InputError(too_large)
    items, _ = items_of(InMemory(name, data), MOST_GROUPED)
    if items.nbytes > MOST_GROUPS:
        raise InputError(too_large)
    levels = items.num_columns - 1
    if levels > MOST_LEVELS:
        raise InputError(f"{name}: {levels:,} levels of groups; keep at most {MOST_LEVELS}")
    columns = []
    for number, column in enumerate(items.column_names):
        values = texts(items, name, column, needed=number == 0)
        columns.append(pc.utf8_trim_whitespace(values).to_pylist())
    rows = list(zip(*columns, strict=True))
    for label, times in Counter(row[0] for row in rows).most_common(1):
        if times > 1:
            raise InputError(f"{name}: class {label!r} occurs twice; keep one row")
    groups = Levels(tuple(items.column_names), {label: path for label, *path in rows})
    others = groups.others(class_names)
    if len(others) == len(rows):
        raise InputError(f"{name}: has no class of this index ({few(class_names)})")
    if others:
        warn_once(f"{name}: {not_in_index(others)}")
    return groups


def not_in_index(class_names: Sequence[str]) -> str:
    """Return the warning for classes of a table of groups that an index does not have."""
    return f"{counted(len(class_names), 'class', 'is', 'are')} not in the index: {few(class_names)}"
