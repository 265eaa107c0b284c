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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.source import of_images
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import make_folders, replacing
from retrieval_tip.index.build import build_index
from retrieval_tip.index.places import at
from retrieval_tip.model import Index
from retrieval_tip.plugins.immich.client import Asset, Immich
from retrieval_tip.plugins.immich.ledger import (
    ACCEPTED,
    HIDDEN,
    LOST,
    REJECTED,
    SENT,
    STATES,
    WRITTEN,
    Ledger,
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
OVERLAP = datetime.timedelta(hours=1)
"""How far a run looks back before the newest change that it saw, because photos change while it lists them."""
SECOND = "%Y-%m-%dT%H:%M:%S"  # the begin of a time of Immich, which is sorted as a text
DOWNLOADS = 4  # at the same time; home servers are small
BLOCK = 4096  # photos classified at a time
PREVIEWS = "previews"  # folder of the examples, beside the ledger


@dataclass
class Report:
    """What a run found. ``examples`` has their number for each class, and ``new`` the suggestions.

    ``withheld`` is the number of photos that got no suggestion, and ``unread`` those without a picture.
    """

    examples: Counter[str] = field(default_factory=Counter)
    withheld: int = 0
    unread: int = 0
    estimate: str = ""
    new: list[Suggestion] = field(default_factory=list)


@dataclass(frozen=True)
class Sync:
    """One run, with an open connection and an open ledger.

    The classes are the children of the tag ``parent``, or else albums.
    """

    tagging: Tagging
    place: Path
    backbone: Backbone
    parent: str = ""
    albums: Sequence[str] = ()
    report: Report = field(default_factory=Report)

    @cached_property
    def classes(self) -> dict[str, set[str]]:
        """The classes that the user has given to photos."""
        classes: dict[str, set[str]] = {}
        for name, place in self._places().items():
            for asset in self._immich.assets(place):
                classes.setdefault(asset.id, set()).add(name)
        return classes

    def _places(self) -> dict[str, dict[str, str]]:
        """Return the tag or album of each class, as :meth:`Immich.assets` takes it. Raises InputError without any."""
        if self.albums:
            albums = self._immich.albums()
            if missing := [name for name in self.albums if name not in albums]:
                raise InputError(
                    f"{self._immich.url}: has no album {few(missing)}; create it in Immich"
                )
            return {name: {"albumIds": albums[name]} for name in self.albums}
        if f"{self.parent}/".startswith(f"{SUGGESTED}/"):
            raise UsageError(f"{self.parent}: has suggestions; name a tag of your own")
        tags = {
            path.rpartition("/")[2]: tag
            for path, tag in sorted(self.tagging.tags.items())
            if path.rpartition("/")[0] == self.parent
        }
        if not tags.keys() - {NONE}:
            raise InputError(
                f"{self._immich.url}: no tag below {self.parent}; tag some photos with {self.parent}/NAME in Immich"
            )
        return {name: {"tagIds": tag} for name, tag in tags.items()}

    @property
    def _ledger(self) -> Ledger:
        return self.tagging.ledger

    @property
    def _immich(self) -> Immich:
        return self.tagging.immich

    @property
    def _previews(self) -> Path:
        return self._ledger.path.with_name(PREVIEWS)

    def run(self, *, apply: bool) -> Report:
        """Learn, and find suggestions. With ``apply``, write them.

        Raises InputError if there is nothing to learn from, and ImmichError if the server fails. What was written
        before stays in the ledger.
        """
        self._look()
        self._review(apply=apply)
        self.report.new = self._suggest(self._learn())
        if apply:
            self.tagging.write(self.report.new)
        return self.report

    def _look(self) -> None:
        """Find photos that are new or have changed. Our own tags change photos, but not their look."""
        newest = self._ledger.fact("updated")
        since = None
        if newest is not None:
            since = f"{datetime.datetime.fromisoformat(newest) - OVERLAP:{SECOND}}.000Z"
        assets = list(self._immich.assets(updated_after=since))
        self._ledger.see(assets)
        if assets:
            self._ledger.remember(updated=max(asset.updated for asset in assets))

    def _review(self, *, apply: bool) -> None:
        """Find out which suggestions the user has accepted or rejected."""
        photos = self._ledger.photos()
        for path, suggestions in by_tag(self._ledger.suggestions(SENT, WRITTEN, HIDDEN)):
            members = self.tagging.members(path)
            present, absent, answered = [], [], []
            for suggestion in suggestions:
                if suggestion.asset in self.classes:
                    answered.append(suggestion)
                elif suggestion.asset in members:
                    present.append(suggestion)
                elif suggestion.state != HIDDEN:
                    absent.append(suggestion)
            self._ledger.settle(present, WRITTEN)
            for suggestion in absent:
                self._ledger.settle(
                    [suggestion], self._fate(suggestion, photos.get(suggestion.asset))
                )
            if apply and answered:
                gone = self.tagging.take_off(path, answered)
                right = [one for one in gone if one.label in self.classes[one.asset]]
                self._ledger.settle(gone, REJECTED)
                self._ledger.settle(right, ACCEPTED)

    def _fate(self, suggestion: Suggestion, photo: Asset | None) -> str | None:
        """Return the new state of a suggestion whose photo is not in the timeline with its tag."""
        if photo is None or not self._immich.shows(suggestion.asset):
            return HIDDEN
        if suggestion.state == SENT:
            return None  # the request never arrived
        return LOST if photo.external or suggestion.tag not in self.tagging.tags else REJECTED

    def _learn(self) -> Index:
        """Return the index of the examples, which is built again if one of them has changed."""
        photos = self._ledger.photos()
        labels = {asset: min(names) for asset, names in self.classes.items() if len(names) == 1}
        for suggestion in self._ledger.suggestions(REJECTED):
            if suggestion.asset not in self.classes:
                labels[suggestion.asset] = NONE
        labels = {asset: name for asset, name in sorted(labels.items()) if asset in photos}
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            files = list(pool.map(self._keep_preview, [photos[asset] for asset in labels]))
        kept = dict(zip(files, labels.values(), strict=True))
        self.report.unread += files.count("")
        kept.pop("", None)
        self.report.examples.update(kept.values())
        if not self.report.examples.keys() - {NONE}:
            raise InputError(
                f"{self._immich.url}: no example is in your timeline; tag some of your photos"
            )
        taught = json.dumps([self.backbone.identity.fingerprint, kept])
        store = at(self.place)
        if self._ledger.fact("learned") != taught or not store.exists():
            self._build(kept)
            self._ledger.remember(learned=taught)
        index = store.load(device="cpu")
        self.report.estimate = index.provenance.get("fit", {}).get("summary", "")
        return index

    def _keep_preview(self, asset: Asset) -> str:
        """Return the file with the preview of an example, or "" if there is none. The page shows these files."""
        look = hashlib.sha256(asset.look.encode()).hexdigest()[:8]
        file = self._previews / f"{asset.id}-{look}.jpg"
        if not file.exists():
            try:
                content = self._immich.preview(asset)
            except InputError:
                return ""
            make_folders(file.parent)
            with replacing(file) as new:
                new.write_bytes(content)
        return str(file)

    def _build(self, labels: dict[str, str]) -> None:
        """Build an ordinary index from previews, and remove those that it does not need."""
        source = of_images(list(labels), self._immich.url, list(labels.values()))
        reader = Reader(backbone=self.backbone, cache=EncodingCache.default())
        build_index(source, self.place, reader, device="cpu")
        for file in set(self._previews.iterdir()) - set(map(Path, labels)):
            file.unlink(missing_ok=True)

    def _encode(self, encoder: str) -> None:
        """Encode the photos that this encoder has not seen. Without such photos, nothing is loaded."""
        new = {asset.id: asset for asset in self._ledger.without_feature(encoder)}
        new = {asset: photo for asset, photo in new.items() if asset not in self.classes}
        if not new:
            return
        ids = list(new)
        source = of_images(ids, self._immich.url)
        source = replace(source, load=lambda asset: self._immich.preview(new[asset]))
        reader = Reader(backbone=self.backbone, workers=DOWNLOADS, empty=True, progress=True)
        for block in reader.blocks(source):
            assets = [ids[position] for position in block.positions.tolist()]
            self._ledger.keep_features(encoder, dict(zip(assets, block.features, strict=True)))
        self.report.unread += len(reader.skipped)

    def _suggest(self, index: Index) -> list[Suggestion]:
        """Return new suggestions, most probable first. Photos with a class or an earlier suggestion get none."""
        encoder = f"{self.backbone.identity.fingerprint} {self.backbone.scope}"
        self._encode(encoder)
        photos = self._ledger.photos()
        settled = f"{datetime.datetime.now(datetime.UTC) - SETTLED:{SECOND}}"
        taken = {suggestion.asset for suggestion in self._ledger.suggestions(*STATES)}
        taken |= self.classes.keys()
        features = (
            (asset, feature)
            for asset, feature in self._ledger.features(encoder)
            if asset not in taken and photos[asset].created < settled
        )
        found = list[Suggestion]()
        while block := list(islice(features, BLOCK)):
            found += self._answers(index, *zip(*block, strict=True))
        if found:  # photos may have been archived since they were encoded
            seen = {asset.id for asset in self._immich.assets()}
            self._ledger.forget(photos.keys() - seen - taken)
            found = [suggestion for suggestion in found if suggestion.asset in seen]
        return sorted(found, key=lambda suggestion: -suggestion.probability)

    def _answers(
        self, index: Index, assets: Sequence[str], features: Sequence[FloatArray]
    ) -> Iterator[Suggestion]:
        """Yield suggestions for the photos whose class has at least the probability :data:`LEAST`."""
        answers = index.classify(np.stack(features), norms="keep", neighbours=0)
        for asset, answer in zip(assets, answers.to_arrow().to_pylist(), strict=True):
            label, probability = answer["label"], answer["probability"]
            is_sure = probability >= LEAST and not answer.get("no_match")
            if is_sure and label != NONE:
                path = f"{SUGGESTED}/{label.replace('/', '-')}"
                yield Suggestion(asset, label, path, SENT, probability)
            else:
                self.report.withheld += 1
