"""Learn classes from the tags or albums of an Immich server, and suggest them for other photos.

The classes are the user's: tags such as ``Pets/Rex``, or albums. A suggestion is a tag of its own, ``Suggested/Rex``.
The user accepts it by giving the photo the class, and rejects it by taking the suggestion off. The next run learns from
both. No tag of the user is ever changed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import of_images
from retrieval_tip.errors import UsageError
from retrieval_tip.files import make_folders, replacing
from retrieval_tip.index.build import build_index
from retrieval_tip.index.places import at
from retrieval_tip.model import Index
from retrieval_tip.plugins.immich.client import Asset, Immich, ImmichError
from retrieval_tip.plugins.immich.ledger import (
    ACCEPTED,
    HIDDEN,
    LOST,
    REJECTED,
    SENT,
    THEIRS,
    WRITTEN,
    Suggestion,
)
from retrieval_tip.plugins.immich.tagging import SUGGESTED, Tagging, by_tag
from retrieval_tip.wording import few

NONE = "none"
"""The class of photos that belong to no other class."""
LEAST = 0.5
"""Smallest probability of a suggestion, as for ``classify --abstain auto``."""
SETTLED = datetime.timedelta(minutes=10)
"""Age of photos from which tags are written. Immich first reads the tags in their files."""
DOWNLOADS = 4  # at the same time; home servers are small
BLOCK = 4096  # photos classified at a time
PREVIEWS = "previews"  # folder of the examples in the folder of an index


@dataclass(frozen=True)
class Lessons:
    """What a user teaches: a tag whose children are classes, or albums that are classes. One of them is given."""

    parent: str = ""
    albums: Sequence[str] = ()

    def places(self, immich: Immich, tags: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Return the tag or album of each class, as :meth:`Immich.assets` takes it. Raises UsageError without any."""
        if self.albums:
            albums = immich.albums()
            if missing := [name for name in self.albums if name not in albums]:
                raise UsageError(
                    f"{immich.url}: has no album {few(missing)}; name those that you own"
                )
            return {name: {"album": albums[name]} for name in self.albums}
        start = f"{self.parent}/"
        names = {
            path.removeprefix(start): tag for path, tag in tags.items() if path.startswith(start)
        }
        classes = {name: {"tag": tag} for name, tag in sorted(names.items()) if "/" not in name}
        if not classes.keys() - {NONE}:
            raise UsageError(
                f"{immich.url}: no tag below {self.parent}; tag some photos with {self.parent}/NAME in Immich"
            )
        return classes


@dataclass
class Report:
    """What a run found: for each class, the number of examples, and of suggestions by their state.

    ``withheld`` is the number of photos that got no suggestion, and ``unread`` those without a picture.
    """

    examples: Counter[str] = field(default_factory=Counter)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    withheld: int = 0
    unread: int = 0
    estimate: str = ""
    new: list[Suggestion] = field(default_factory=list)


@dataclass(frozen=True)
class Sync:
    """One run, with an open connection and an open ledger."""

    tagging: Tagging
    place: Path
    backbone: Backbone
    lessons: Lessons
    report: Report = field(default_factory=Report)
    several: set[str] = field(default_factory=set)

    @cached_property
    def labels(self) -> dict[str, str]:
        """The class of each example, without photos of several classes."""
        labels: dict[str, str] = {}
        several: set[str] = set()
        for name, place in self.lessons.places(self.tagging.immich, self.tagging.tags).items():
            for asset in self.tagging.immich.assets(**place):
                if labels.setdefault(asset.id, name) != name:
                    several.add(asset.id)
        self.several.update(several)
        return {asset: name for asset, name in labels.items() if asset not in several}

    def run(self, *, apply: bool) -> Report:
        """Learn, and find suggestions. With ``apply``, write them.

        Raises UsageError if there is nothing to learn from, and ImmichError if the server fails. What was written
        before stays in the ledger.
        """
        self._look()
        self.tagging.settle()
        self._review(apply=apply)
        index = self._learn()
        self.report.new = self._suggest(index)
        if apply and self.report.new:
            self.tagging.write(self.report.new)
        for suggestion in self.tagging.ledger.suggestions(WRITTEN, ACCEPTED, REJECTED):
            self.report.counts[suggestion.label, suggestion.state] += 1
        return self.report

    def _look(self) -> None:
        """Find photos that are new or have changed. Our own tags change photos, but not their look."""
        since = self.tagging.ledger.fact("updated")
        assets = list(self.tagging.immich.assets(updated_after=since))
        self.tagging.ledger.see(assets)
        newest = max((asset.updated for asset in assets), default=since)
        if newest is not None:
            self.tagging.ledger.remember(updated=newest)

    def _review(self, *, apply: bool) -> None:
        """Find out which suggestions the user has accepted or rejected."""
        photos = self.tagging.ledger.photos()
        written = self.tagging.ledger.suggestions(WRITTEN, HIDDEN)
        answered: list[Suggestion] = []
        for path in sorted({suggestion.tag for suggestion in written}):
            members = self.tagging.members(path)
            for suggestion in written:
                if suggestion.tag != path:
                    continue
                if suggestion.asset in self.labels or suggestion.asset in self.several:
                    answered.append(suggestion)
                elif suggestion.asset in members:
                    self.tagging.ledger.settle([suggestion], WRITTEN)
                elif suggestion.state == WRITTEN:
                    self.tagging.ledger.settle(
                        [suggestion], self._without(photos.get(suggestion.asset))
                    )
        if apply:
            self._take_off(answered)

    def _without(self, asset: Asset | None) -> str:
        """Return the state of a suggestion whose photo is not in the timeline with its tag."""
        if asset is None or not self.tagging.immich.shows(asset.id):
            return HIDDEN
        return LOST if asset.external else REJECTED

    def _take_off(self, answered: Sequence[Suggestion]) -> None:
        """Take suggestions off photos that now have a class."""
        for path, suggestions in by_tag(answered).items():
            gone = self.tagging.without_tag(path, suggestions)
            right = [one for one in gone if self.labels.get(one.asset) == one.label]
            self.tagging.ledger.settle(right, ACCEPTED)
            self.tagging.ledger.settle([one for one in gone if one not in right], REJECTED)

    def _negatives(self) -> set[str]:
        """Return the photos that are no example, and for which the user has rejected a class."""
        rejected = {suggestion.asset for suggestion in self.tagging.ledger.suggestions(REJECTED)}
        return rejected - self.labels.keys() - self.several

    def _learn(self) -> Index:
        """Return the index of the examples, which is built again if one of them has changed."""
        photos = self.tagging.ledger.photos()
        labels = self.labels | dict.fromkeys(self._negatives(), NONE)
        labels = {asset: name for asset, name in sorted(labels.items()) if asset in photos}
        self.report.examples.update(labels.values())
        if not set(labels.values()) - {NONE}:
            raise UsageError(
                f"{self.tagging.immich.url}: no example is in your timeline; tag some of your photos"
            )
        taught = [[asset, photos[asset].look, name] for asset, name in labels.items()]
        facts = json.dumps([self.backbone.identity.fingerprint, taught])
        digest = hashlib.sha256(facts.encode()).hexdigest()
        store = at(self.place)
        if self.tagging.ledger.fact("learned") != digest or not store.exists():
            self._build([photos[asset] for asset in labels], list(labels.values()))
            self.tagging.ledger.remember(learned=digest)
        index = store.load(device="cpu")
        self.report.estimate = index.provenance.get("fit", {}).get("summary", "")
        return index

    def _build(self, assets: Sequence[Asset], labels: Sequence[str]) -> None:
        """Build an ordinary index from previews, which are kept so that the page can show them."""
        folder = self.place / PREVIEWS
        make_folders(folder)
        kept: dict[str, str] = {}
        for asset, label in zip(assets, labels, strict=True):
            look = hashlib.sha256(asset.look.encode()).hexdigest()[:8]
            file = folder / f"{asset.id}-{look}.jpg"
            if not file.exists():
                try:
                    content = self.tagging.immich.preview(asset)
                except ImmichError as error:
                    if error.status != 404:
                        raise
                    continue  # Immich has not made it yet
                with replacing(file) as new:
                    new.write_bytes(content)
            kept[str(file.absolute())] = label
        source = of_images(list(kept), self.tagging.immich.url, list(kept.values()))
        cache = EncodingCache.default()
        reader = Reader(backbone=self.backbone, cache=cache)
        try:
            build_index(source, self.place, reader, device="cpu")
        finally:
            if cache is not None:
                cache.close()
        for file in set(folder.iterdir()) - set(map(Path, kept)):
            file.unlink(missing_ok=True)

    def _encode(self, encoder: str) -> None:
        """Encode the photos that this encoder has not seen. Nothing is loaded if there are none."""
        new = {asset.id: asset for asset in self.tagging.ledger.without_feature(encoder)}
        if not new:
            return
        source = of_images(list(new), self.tagging.immich.url)
        source = replace(source, load=lambda asset: self.tagging.immich.preview(new[asset]))
        reader = Reader(backbone=self.backbone, workers=DOWNLOADS, empty=True, progress=True)
        for block in reader.blocks(source):
            assets = [list(new)[position] for position in block.positions.tolist()]
            self.tagging.ledger.keep_features(
                encoder, dict(zip(assets, block.features, strict=True))
            )
        self.report.unread = len(reader.skipped)

    def _suggest(self, index: Index) -> list[Suggestion]:
        """Return new suggestions, most probable first. Photos with a class or an earlier suggestion get none."""
        encoder = f"{self.backbone.identity.fingerprint} {self.backbone.scope}"
        self._encode(encoder)
        photos = self.tagging.ledger.photos()
        states = (SENT, WRITTEN, THEIRS, ACCEPTED, LOST, HIDDEN)
        taken = {suggestion.asset for suggestion in self.tagging.ledger.suggestions(*states)}
        refused = {(one.asset, one.label) for one in self.tagging.ledger.suggestions(REJECTED)}
        taken |= self.labels.keys() | self.several
        now = datetime.datetime.now(datetime.UTC)
        found = []
        assets: list[str] = []
        features: list[FloatArray] = []
        for asset, feature in self.tagging.ledger.features(encoder, index.d):
            if asset not in taken and _age(photos[asset], now) >= SETTLED:
                assets.append(asset)
                features.append(feature)
            if len(assets) == BLOCK:
                found += self._answers(index, assets, features, refused)
                assets, features = [], []
        if assets:
            found += self._answers(index, assets, features, refused)
        if found:  # photos may have been archived since they were encoded
            seen = {asset.id for asset in self.tagging.immich.assets()}
            self.tagging.ledger.forget(photos.keys() - seen)
            found = [suggestion for suggestion in found if suggestion.asset in seen]
        return sorted(found, key=lambda suggestion: -suggestion.probability)

    def _answers(
        self,
        index: Index,
        assets: Sequence[str],
        features: Sequence[FloatArray],
        refused: set[tuple[str, str]],
    ) -> list[Suggestion]:
        answers = index.classify(np.stack(features), norms="keep", neighbours=0).to_arrow()
        is_strange = [False] * len(assets)
        if "no_match" in answers.column_names:
            is_strange = answers["no_match"].to_pylist()
        found = []
        rows = zip(
            assets,
            answers["label"].to_pylist(),
            answers["probability"].to_pylist(),
            is_strange,
            strict=True,
        )
        for asset, label, probability, no_match in rows:
            if no_match or probability < LEAST or label == NONE or (asset, label) in refused:
                self.report.withheld += 1
            else:
                path = f"{SUGGESTED}/{label}"
                version = index.version or 0
                found.append(Suggestion(asset, label, path, SENT, probability, 0, version))
        return found


def _age(asset: Asset, now: datetime.datetime) -> datetime.timedelta:
    """Return how long a photo has been on the server."""
    try:
        return now - datetime.datetime.fromisoformat(asset.created)
    except ValueError:
        return SETTLED
