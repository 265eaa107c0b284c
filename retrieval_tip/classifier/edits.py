"""The methods of a classifier that change its index. Each change writes a new version, which is used from then on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from retrieval_tip.classifier.opened import OpenIndex, TemporaryIndex, check_place
from retrieval_tip.data import images
from retrieval_tip.data.pictures import pictures
from retrieval_tip.data.sources import Source, kind_of
from retrieval_tip.errors import UsageError
from retrieval_tip.evaluation.calibration import Calibration, apply, calibrate
from retrieval_tip.fit.closed_form import FormChoice
from retrieval_tip.fit.folds import Queries
from retrieval_tip.fit.search_hp import on_validation, validation_shots
from retrieval_tip.index import changes, places
from retrieval_tip.index.changes import Added, Changed, Renamed
from retrieval_tip.index.fit import fit_index
from retrieval_tip.model import Index
from retrieval_tip.settings import ClassPrior, KeysMet, MetricName, ValuesName

if TYPE_CHECKING:
    from retrieval_tip.fit.finetune import Tuned
    from retrieval_tip.fit.trainer import Recipe


class EditableClassifier(OpenIndex):
    """An open index that you can change. If a change fails, nothing changes."""

    def add(
        self,
        what: Any,
        label: str | Sequence[str] | None = None,
        *,
        text: str | os.PathLike[str] | None = None,
        shots: int | None = None,
        skip_known: bool = False,
    ) -> Added:
        """Add labelled photos, and return the ids of their keys and further facts.

        ``what`` can be photos as for ``predict``, with one ``label`` for all or a list of labels, or a labelled source
        or dataset. A label may name a new class. For the other arguments, see :func:`changes.add`.

        Raises UsageError if photos have no label.
        """
        if label is None and (not isinstance(what, str | os.PathLike) or kind_of(what) != "image"):
            source, encoder = self._labelled(what, "train", strict=True)
        elif label is None:
            raise UsageError(f"label: missing; give the class of {os.fspath(what)}")
        else:
            several = isinstance(what, str | os.PathLike) and Path(what).is_dir()
            given = pictures([str(path) for path in images.find(Path(what))] if several else what).labelled(label)
            source, encoder = given.source, replace(self.encoder, read=given.read, strict=True)
        encoder = replace(encoder, views=self.cache.built.views, seed=self.cache.built.seed)
        added = changes.add(self._place(), source, encoder, text=text, shots=shots, skip_known=skip_known)
        self._use(self.cache.reload())
        return added

    def merge(self, other: str | os.PathLike[str] | OpenIndex) -> Added:
        """Add the shots of another classifier or index that has the same encoder (see :func:`changes.merge`)."""
        added = changes.merge(
            self._place(), other._place() if isinstance(other, OpenIndex) else check_place("other", other)
        )
        self._use(self.cache.reload())
        return added

    def remove(self, *, where: str | None = None, key_ids: Sequence[int] | None = None) -> Changed:
        """Remove shots by an SQL condition, or by the ids of their keys (see :func:`changes.remove`)."""
        changed = changes.remove(self._place(), where=where, key_ids=key_ids)
        self._use(self.cache.reload())
        return changed

    def relabel(
        self, label: str | Mapping[int, str], *, where: str | None = None, key_ids: Sequence[int] | None = None
    ) -> Changed:
        """Move shots to other classes of the index (see :func:`changes.relabel`)."""
        changed = changes.relabel(self._place(), label, where=where, key_ids=key_ids)
        self._use(self.cache.reload())
        return changed

    def rename(self, old: str, new: str, *, encode: bool = False) -> Renamed:
        """Rename a class, or merge it into the class ``new`` (see :func:`changes.rename`).

        With ``encode``, the text weight of the class is computed from its new name.
        """
        if encode and self.encoder.backbone is None:
            raise UsageError("encode: the index has no encoder; rename without it")
        renamed = changes.rename(self._place(), old, new, self.encoder.backbone if encode else None)
        self._use(self.cache.reload())
        return renamed

    def history(self) -> pa.Table:
        """Return a table that has one row per version of the index, oldest first."""
        return places.at(self._place()).history()

    def rollback(self, version: int | None = None) -> Changed:
        """Restore an earlier version, by default the previous one (see :func:`changes.rollback`)."""
        changed = changes.rollback(self._place(), version)
        self._use(self.cache.reload())
        return changed

    def fit(
        self,
        val: Any = None,
        *,
        metric: MetricName | None = None,
        values: ValuesName | None = None,
        class_prior: ClassPrior | None = None,
        prior: Sequence[str | os.PathLike[str]] = (),
    ) -> FormChoice:
        """Fit the index to its shots again, in closed form.

        ``val`` can be validation photos as for ``evaluate``, which are used instead of held-out shots to select the
        fit. For the other arguments and the errors, see :func:`fit.fit_index`.
        """
        source, encoder = (None, None) if val is None else self._labelled(val, "val")
        choice = fit_index(
            self._place(), metric=metric, values=values, class_prior=class_prior, prior=prior, validation=source,
            encoder=encoder,
        )  # fmt: skip
        self._use(self.cache.reload())
        return choice

    def calibrate(self, val: Any) -> Calibration:
        """Fit the temperature of the probabilities to validation photos (see :func:`calibration.calibrate`).

        ``val`` can be the same as for ``evaluate``. Do not use shots or test photos.
        """
        source, encoder = self._labelled(val, "val")
        cache = Index.load(self._folder(), device=self.cache.device)
        settings, result = calibrate(cache, source, encoder)
        apply(cache, settings, result, source.name, self._folder())
        self._use(self.cache.reload())
        return result

    def finetune(
        self,
        out: str | os.PathLike[str] | None = None,
        recipe: Recipe | None = None,
        *,
        source: Any = None,
        val: Any = None,
        val_shots: KeysMet = None,
        keep_last: bool = False,
    ) -> Tuned:
        """Fine-tune the index, and use the more accurate of both indexes from now on.

        The index itself does not change. The result is written to the folder ``out``. By default, it is temporary until
        you call ``save``.

        - ``source``: the photos of the shots, if they are not where they were. They can be the same as for
          ``evaluate``.
        - ``val``: validation photos as for ``evaluate``
        - ``val_shots``: the number of validation photos per class, or ``all``. Defaults to ``min(shots, 4)``.

        For the other arguments and the errors, see :func:`finetune.finetune_into`.
        """
        from retrieval_tip.fit.finetune import finetune_into, own_shots, shots_of
        from retrieval_tip.fit.trainer import Recipe

        if not isinstance(recipe, Recipe | None):
            raise UsageError(f"recipe: got an object of type {type(recipe).__name__}; give a Recipe")
        cache = Index.load(self._folder(), device=self.cache.device)
        encoder, unseen = self.encoder, None if val is None else self._validation(cache, val, val_shots)
        if source is None:
            shots = shots_of(cache)
        else:
            given, encoder = self._labelled(source, "train")
            shots = own_shots(cache, given)
        temporary = TemporaryIndex() if out is None else None
        place = temporary.place if temporary is not None else check_place("out", out)
        tuned = finetune_into(
            place, cache, shots, encoder, recipe, val=unseen, parent=self._place(), keep_last=keep_last
        )
        self._use(places.at(place).load(device=self.cache.device))
        if Path(place) != cache.folder:
            self._temporary = temporary
        return tuned

    def _validation(self, cache: Index, val: Any, number: KeysMet) -> Source | Queries:
        """Return validation photos, or their features if the photos are in memory."""
        source, encoder = self._labelled(val, "val")
        if number != "all":
            path = val if isinstance(val, str | os.PathLike) else None
            source = source.take(validation_shots(cache, source, path, number))
        return source if encoder is self.encoder else on_validation(cache, source, encoder)
