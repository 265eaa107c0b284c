"""Put suggestions on the photos of an Immich server as tags, and take them off again.

Only tags below :data:`SUGGESTED` are written, and only those that were written here are taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from retrieval_tip.arrays import slices
from retrieval_tip.plugins.immich.client import AT_ONCE, Immich
from retrieval_tip.plugins.immich.ledger import OURS, THEIRS, WRITTEN, Ledger, Suggestion

SUGGESTED = "Suggested"
"""The tag whose children are suggestions."""


@dataclass(frozen=True)
class Tagging:
    """Suggestions as tags. ``failed`` counts the photos that Immich refused, by its reason."""

    immich: Immich
    ledger: Ledger
    failed: Counter[str] = field(default_factory=Counter)

    @cached_property
    def tags(self) -> dict[str, str]:
        """The ids of all tags by their path."""
        return self.immich.tags()

    def members(self, path: str, *, anywhere: bool = False) -> set[str]:
        """Return the ids of the photos that have a tag."""
        if (tag := self.tags.get(path)) is None:
            return set()
        return {asset.id for asset in self.immich.assets({"tagIds": tag}, anywhere=anywhere)}

    def write(self, suggestions: Iterable[Suggestion]) -> None:
        """Put the tags of suggestions on their photos.

        If the answer to a request is lost, its suggestions stay in the state ``sent`` until the next run. As none
        of them had its tag before, those that have it then got it here.
        """
        for path, own in by_tag(suggestions):
            tag = self._make_tag(path)
            before = self.members(path)
            theirs = [suggestion for suggestion in own if suggestion.asset in before]
            self.ledger.add(suggestion._replace(state=THEIRS) for suggestion in theirs)
            new = [suggestion for suggestion in own if suggestion.asset not in before]
            for batch in slices(len(new), AT_ONCE):
                some = new[batch]
                self.ledger.add(some)
                self._settle(some, self.immich.put_on(tag, _assets_of(some)))
            left = {suggestion.asset for suggestion in new} - self.members(path)
            self.failed["without the tag"] += len(left)

    def _settle(self, suggestions: Sequence[Suggestion], answers: dict[str, str]) -> None:
        """Set the states of suggestions by the answers of Immich, which wrote nothing if it gave another one."""
        states = {"success": WRITTEN, "duplicate": THEIRS}
        for state in (WRITTEN, THEIRS, None):
            own = [one for one in suggestions if states.get(answers.get(one.asset, "")) == state]
            self.ledger.settle(own, state)

    def take_off(self, path: str, suggestions: Sequence[Suggestion]) -> list[Suggestion]:
        """Take a tag off photos, and return the suggestions whose photos lack it now. The others count as failed."""
        if (tag := self.tags.get(path)) is not None:
            for batch in slices(len(suggestions), AT_ONCE):
                self.immich.take_off(tag, _assets_of(suggestions[batch]))
        left = self.members(path, anywhere=True)
        gone = [suggestion for suggestion in suggestions if suggestion.asset not in left]
        self.failed["still with the tag"] += len(suggestions) - len(gone)
        return gone

    def _make_tag(self, path: str) -> str:
        """Return the id of a tag, and create it and its parents if they do not exist."""
        names = path.split("/")
        for number in range(1, len(names) + 1):
            if (parent := "/".join(names[:number])) not in self.tags:
                self.ledger.begin_tag(parent)
        if path not in self.tags:
            self.tags[path] = self.immich.make_tag(path)
        return self.tags[path]

    def undo(self) -> int:
        """Take off all suggestions that this program has written, and delete its unused tags.

        Returns the number of photos. ``failed`` counts those that Immich refused.
        """
        count = 0
        for path, suggestions in by_tag(self.ledger.suggestions(*OURS)):
            gone = self.take_off(path, suggestions)
            self.ledger.settle(gone, None)
            count += len(gone)
        needed = {suggestion.tag for suggestion in self.ledger.suggestions(*OURS)}
        for path in reversed(self.ledger.made_tags()):  # children first
            if any(other.startswith(f"{path}/") for other in self.tags):
                continue
            if path in needed or self.members(path, anywhere=True):
                continue
            if path in self.tags:
                self.immich.delete_tag(self.tags.pop(path))
            self.ledger.forget_tag(path)
        return count


def by_tag(suggestions: Iterable[Suggestion]) -> Iterable[tuple[str, list[Suggestion]]]:
    """Return the path of each tag with its suggestions."""
    by_tag: dict[str, list[Suggestion]] = {}
    for suggestion in suggestions:
        by_tag.setdefault(suggestion.tag, []).append(suggestion)
    return by_tag.items()


def _assets_of(suggestions: Iterable[Suggestion]) -> list[str]:
    return [suggestion.asset for suggestion in suggestions]
