"""Broader groups of the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from retrieval_tip.errors import InputError


@dataclass(frozen=True)
class Levels:
    """Broader groups of the classes, such as genus and family.

    ``levels`` are the names of the levels, narrowest first, beginning with the classes. ``paths`` has the group of each
    class at the other levels, or ``None`` for no group. It may have classes that the index lacks.

    Raises InputError unless each group has one level, and one group of each broader level.
    """

    levels: Sequence[str]
    paths: Mapping[str, Sequence[str | None]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "paths", {name: tuple(path) for name, path in self.paths.items()})
        names = [
            *self.levels,
            *(name for path in self.paths.values() for name in path if name is not None),
        ]
        valid = 2 <= len(set(self.levels)) == len(self.levels) and all(
            isinstance(name, str) and name for name in names
        )
        if not valid or any(len(path) != len(self.levels) - 1 for path in self.paths.values()):
            raise InputError(
                "groups: expected a column of classes and columns of broader groups with different names"
            )
        broader: dict[str, Sequence[str | None]] = {}
        for path in self.paths.values():
            for level, own in enumerate(path, 1):
                if own is not None and broader.setdefault(own, path[level:]) != path[level:]:
                    raise InputError(
                        f"groups: {own!r} has two levels or two broader groups; a group has one place"
                    )

    def at(self, level: int, label: str) -> str | None:
        """Return the group of a class at a level, which is the class itself at level 0."""
        if level == 0:
            return label
        path = self.paths.get(label)
        return None if path is None else path[level - 1]

    def of(self, class_names: Sequence[str]) -> dict[str, list[str | None]]:
        """Return the group of each class at each level."""
        return {
            level: [self.at(number, name) for name in class_names]
            for number, level in enumerate(self.levels)
        }

    def labels(self, class_names: Sequence[str]) -> list[str]:
        """Return the names of these classes, and then of their groups."""
        return list(
            dict.fromkeys(
                name for own in self.of(class_names).values() for name in own if name is not None
            )
        )

    def path(self, label: str) -> tuple[str, ...]:
        """Return the groups that contain a class or a group, broadest first, and its own name last."""
        paths = (
            (name, *path) for name, path in self.paths.items() if name == label or label in path
        )
        own = next(paths, (label,))
        return tuple(filter(None, reversed(own[own.index(label) :])))

    def others(self, class_names: Sequence[str]) -> list[str]:
        """Return the classes that have groups but are not among these classes."""
        return sorted(self.paths.keys() - set(class_names))

    def renamed(self, old: str, new: str) -> Levels:
        """Return the groups after a class was renamed. If the new name has groups, it keeps them."""
        if old not in self.paths:
            return self
        rest = {name: path for name, path in self.paths.items() if name != old}
        return replace(self, paths={new: self.paths[old], **rest})
