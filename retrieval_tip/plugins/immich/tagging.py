"""Put suggestions on the photos of an Immich server as tags, and take them off again.

Only tags below :data:`SUGGESTED` are written, and only those that were written here are taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from retrieval_tip.plugins.immich.client import WRITTEN as AT_ONCE
from retrieval_tip.plugins.immich.client import Immich
from retrieval_tip.plugins.immich.ledger import (
    HIDDEN,
    LOST,
    SENT,
    THEIRS,
    WRITTEN,
    Ledger,
    Suggestion,
)
from retrieval_tip.wording import counted, few

SUGGESTED = "Suggested"
"""The tag whose children are suggestions."""
VISIBILITIES = ("timeline", "archive", "hidden")


@dataclass(frozen=True)
class Tagging:
    """Suggestions as tags. ``failed`` counts the photos that Immich refused, by its reason."""

    immich: Immich
    ledger: Ledger
    failed: Counter[str] = field(default_factory=Counter)

    @cached_property
    def tags(self) -> dict[str, str]:
        """The ids of all tags by their path."""
        return {tag.path: tag.id for tag in self.immich.tags()}

    def members(self, path: str, visibility: str = "timeline") -> set[str]:
        """Return the ids of the photos that have a tag."""
        if (tag := self.tags.get(path)) is None:
            return set()
        return {asset.id for asset in self.immich.assets(tag=tag, visibility=visibility)}

    def settle(self) -> None:
        """Find out what became of suggestions that were sent before a kill. None of them had its tag before."""
        sent = self.ledger.suggestions(SENT)
        for path in {suggestion.tag for suggestion in sent}:
            members = self.members(path)
            own = [suggestion for suggestion in sent if suggestion.tag == path]
            self.ledger.settle([one for one in own if one.asset in members], WRITTEN)
            self.ledger.settle([one for one in own if one.asset not in members], None)

    def without_tag(self, path: str, suggestions: Sequence[Suggestion]) -> list[Suggestion]:
        """Take a tag off photos, and return the suggestions whose photos lack it now. Count the others as failed."""
        gone = []
        for start in range(0, len(suggestions), AT_ONCE):
            some = suggestions[start : start + AT_ONCE]
            answers = {one.asset: "not_found" for one in some}
            if (tag := self.tags.get(path)) is not None:
                answers = self.immich.take_off(tag, [one.asset for one in some])
            for one in some:
                answer = answers.get(one.asset, "unknown")
                if answer in ("success", "not_found"):
                    gone.append(one)
                else:
                    self.failed[answer] += 1
        return gone

    def write(self, suggestions: Sequence[Suggestion]) -> None:
        """Put the tags of suggestions on their photos."""
        run = self.ledger.next_run()
        for path, own in by_tag(suggestions).items():
            tag = self._make_tag(path)
            before = self.members(path)
            numbered = [suggestion._replace(run=run) for suggestion in own]
            theirs = [one for one in numbered if one.asset in before]
            self.ledger.begin(theirs)
            self.ledger.settle(theirs, THEIRS)
            new = [one for one in numbered if one.asset not in before]
            for start in range(0, len(new), AT_ONCE):
                some = new[start : start + AT_ONCE]
                self.ledger.begin(some)
                answers = self.immich.put_on(tag, [one.asset for one in some])
                self._note(some, answers)
            lost = {
                one.asset for one in self.ledger.suggestions(WRITTEN, run=run) if one.tag == path
            }
            lost -= self.members(path)
            self.failed["did not keep the tag"] += len(lost)

    def _note(self, suggestions: Sequence[Suggestion], answers: Mapping[str, str]) -> None:
        """Write down the answers to suggestions."""
        states = {"success": WRITTEN, "duplicate": THEIRS}
        for suggestion in suggestions:
            answer = answers.get(suggestion.asset, "unknown")
            self.ledger.settle([suggestion], states.get(answer))
            if answer not in states:
                self.failed[answer] += 1

    def _make_tag(self, path: str) -> str:
        """Return the id of a tag, which is created with its parents if there is none."""
        names = path.split("/")
        for number in range(1, len(names) + 1):
            if (parent := "/".join(names[:number])) not in self.tags:
                self.ledger.begin_tag(parent)
        if path not in self.tags:
            self.tags[path] = self.immich.make_tag(path).id
        return self.tags[path]

    def undo(self, run: int | None) -> int:
        """Take off all suggestions that this program has written, or those of one run, and delete its unused tags.

        Returns the number of photos. ``failed`` counts those that Immich refused.
        """
        self.settle()
        count = 0
        for path, suggestions in by_tag(
            self.ledger.suggestions(WRITTEN, LOST, HIDDEN, run=run)
        ).items():
            gone = self.without_tag(path, suggestions)
            self.ledger.settle(gone, None)
            count += len(gone)
        for path in sorted(self.ledger.made_tags(), reverse=True):  # children first
            self._delete_tag(path)
        return count

    def _delete_tag(self, path: str) -> None:
        """Delete a tag that this program has created, unless a photo or another tag needs it."""
        if any(other.startswith(f"{path}/") for other in self.tags):
            return
        if any(self.members(path, visibility) for visibility in VISIBILITIES):
            return
        if path in self.tags:
            self.immich.delete_tag(self.tags.pop(path))
        self.ledger.forget_tag(path)

    def refusals(self) -> str:
        """Return what Immich refused, in words."""
        kinds = [f"{number:,} {reason}" for reason, number in self.failed.items() if number]
        total = sum(self.failed.values())
        return f"Immich refused {counted(total, 'photo')}: {few(kinds)}" if total else ""


def by_tag(suggestions: Iterable[Suggestion]) -> dict[str, list[Suggestion]]:
    """Return suggestions by the path of their tag."""
    by_tag: dict[str, list[Suggestion]] = {}
    for suggestion in suggestions:
        by_tag.setdefault(suggestion.tag, []).append(suggestion)
    return by_tag
