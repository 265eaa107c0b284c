"""The methods of a classifier that answer: classify, explain, find similar shots, and suggest or sort photos."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, Unpack, overload

import numpy as np
import numpy.typing as npt
import torch

from retrieval_tip import tip
from retrieval_tip.classifier.opened import OpenIndex
from retrieval_tip.data import images
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.pictures import Picture, Pictures, features_of, is_one, pictures
from retrieval_tip.data.sources import kind_of, open_inputs, read_item
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError, counted, few
from retrieval_tip.html import markup, table
from retrieval_tip.labelling.groups import check_fitted, classify_in_groups
from retrieval_tip.labelling.groups import group_unlike as grouped
from retrieval_tip.labelling.photos import Pool, Suggestions, suggest_features, suggest_photos
from retrieval_tip.labelling.placing import Action
from retrieval_tip.labelling.sort import Sorted, sort_photos
from retrieval_tip.model import Index
from retrieval_tip.predictions import MORE_LIKELY_WRONG, Prediction, Predictions, SimilarShot
from retrieval_tip.retrieval.inputs import Features, check_unit, queries
from retrieval_tip.settings import Ask, AskOptions

THUMBNAIL = 128
"""Length of the longer side of an image in a notebook, in pixels."""


class AnsweringClassifier(OpenIndex):
    """An open index that answers for photos and features."""

    @overload
    def predict(  # type: ignore[overload-overlap] # a path is also an iterable of letters
        self,
        what: Picture,
        *,
        group_unlike: bool = False,
        norms: Literal["check", "keep"] = "check",
        **asked: Unpack[AskOptions],
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        what: Iterable[Picture] | Features,
        *,
        group_unlike: bool = False,
        norms: Literal["check", "keep"] = "check",
        **asked: Unpack[AskOptions],
    ) -> Predictions: ...
    def predict(
        self,
        what: Any,
        *,
        group_unlike: bool = False,
        norms: Literal["check", "keep"] = "check",
        **asked: Unpack[AskOptions],
    ) -> Prediction | Predictions:
        """Classify photos or features.

        Args:
            what: a photo, which can be a path, a PIL image, an array or tensor of shape ``[h, w, 3]`` or ``[3, h, w]``,
                encoded bytes, an open file, or a row of a Hugging Face dataset. For several photos, pass a list of
                these, a batch of shape ``[b, h, w, 3]`` or ``[b, 3, h, w]``, a torch dataset, a Hugging Face dataset or
                its image column, or any input of ``retrieval-tip classify``, such as a folder or a table. Pixels are
                uint8 or floats from 0 to 1 (see :mod:`pictures`). You can also pass features of shape ``[q, d]`` or
                ``[d]``. Unreadable photos in a folder or table are skipped and listed in ``encoder.skipped``.
            group_unlike: whether to group similar photos without a match (see :func:`groups.group_unlike`).
            norms: ``"check"`` to check that all features have norm 1, or ``"keep"`` to accept any norm.
            asked: the fields of :class:`settings.Ask`.

        Returns a :class:`Prediction` for a single photo or feature, and :class:`Predictions` otherwise. Raises
        InputError if a photo cannot be read, or if the norm of a feature is not 1.
        """
        index, encoder, one = self.cache, self.encoder, is_one(what)
        if (features := features_of(what)) is not None:
            one = what.ndim == 1
            answers = index.classify(features, norms, **asked)
            answers = grouped(index, features, answers) if group_unlike else answers
        elif isinstance(what, str | os.PathLike) and kind_of(what) != "image":
            given, one = [Pictures(source, read_item) for source in open_inputs([os.fspath(what)])], False
            encoder = replace(encoder, norms=norms)
            answers = _answers(index, given, encoder, Ask(**asked), group_unlike)
        else:
            given, encoder = [pictures(what)], replace(encoder, strict=True)
            answers = _answers(index, given, encoder, Ask(**asked), group_unlike)
        return answers[0] if one else answers

    __call__ = predict

    def predict_proba(
        self,
        what: Picture | Iterable[Picture] | Features,
        *,
        norms: Literal["check", "keep"] = "check",
        **asked: Unpack[AskOptions],
    ) -> npt.NDArray[np.float32]:
        """Return the probabilities of all classes, of shape ``[q, c]``, in the order of ``classes``.

        The arguments are the same as for :meth:`predict`. A single photo gives one row. Unreadable photos in a folder
        or table have no row.
        """
        asked |= {"neighbours": 0, "logits": True}
        answers: Any = self.predict(what, norms=norms, **asked)
        rows = [{"logits": answers.logits}] if isinstance(answers, Prediction) else answers.rows(["label", "logits"])
        logits = torch.tensor(np.array([row["logits"] for row in rows]), dtype=torch.float32)
        chances = tip.probabilities(logits.view(-1, len(self.classes)), self.cache.settings.temperature)
        return np.asarray(chances)

    def score(self, what: Picture | Iterable[Picture] | Features, y: Iterable[object]) -> float:
        """Return the share of photos or features whose class is right, as scikit-learn's classifiers do.

        ``what`` can be the same as for :meth:`predict`, and ``y`` lists the right classes. Unlike ``evaluate``, this
        counts shots like any other photo. Raises InputError if ``y`` has another length or no class of the index.
        """
        answers: Any = self.predict(what, neighbours=0)
        one = isinstance(answers, Prediction)
        found = [answers.label] if one else answers.to_arrow()["label"].to_pylist()
        right = [str(label) for label in y]
        if len(found) != len(right):
            raise InputError(
                f"y: got {counted(len(right), 'label')} for {counted(len(found), 'photo')}; give one per photo"
            )
        if right and not set(right) & set(self.classes):
            raise InputError(f"y: {right[0]} is not a class of this index; it has {few(self.classes)}")
        return float(np.mean(np.array(found) == np.array(right)))

    def explain(self, what: Picture, **asked: Unpack[AskOptions]) -> Explanation:
        """Classify a photo, and show it in a notebook next to the shots that contributed most to the answer.

        The arguments are the same as for :meth:`predict`. By default, ``top`` is 3.
        """
        if not is_one(what):
            raise UsageError("what: expected a single photo; call explain for each of them")
        asked.setdefault("top", 3)
        given, encoder = pictures(what), replace(self.encoder, strict=True)
        prediction = _answers(self.cache, [given], encoder, Ask(**asked))[0]
        own = given.read(given.source.paths[0]) if given.source.paths else b""
        return Explanation(prediction, own, [_file(neighbour.source) for neighbour in prediction.neighbours])

    def similar(
        self, photo: Picture | Features, n: int = 5, *, norms: Literal["check", "keep"] = "check"
    ) -> list[SimilarShot]:
        """Return the ``n`` shots that are most similar to a photo or a feature (see :meth:`Index.similar`)."""
        if (features := features_of(photo)) is None and is_one(photo):
            given = pictures(photo)
            features = replace(self.encoder, read=given.read, strict=True).encode(given.source).features
            norms = "keep"
        if features is None or len(features) != 1:
            raise UsageError("photo: expected a single photo or feature; call similar for each of them")
        return self.cache.similar(features, n, norms=norms)[0]

    def suggest(self, photos: Iterable[Picture] | Features | str | os.PathLike[str], n: int = 20) -> Suggestions:
        """Choose ``n`` unlabelled photos or features to label next, most useful first.

        ``photos`` can be the same as for :meth:`predict`. Photos that the index already contains are skipped. See
        :func:`photos.suggest_photos` for the errors.
        """
        return _suggested(self.cache, self.encoder, photos, n)

    def sort(
        self,
        photos: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        folder: str | os.PathLike[str],
        *,
        action: Action = "copy",
        min_probability: float = MORE_LIKELY_WRONG,
        dry_run: bool = False,
    ) -> Sorted:
        """Sort photos into ``folder/CLASS``. To undo it, call ``undo_sort``.

        ``photos`` are one or several paths of photos, folders, tables or tars. For the other arguments and the errors,
        see :func:`sort.sort_photos`.
        """
        paths = list(photos) if isinstance(photos, Iterable) and not isinstance(photos, str | os.PathLike) else [photos]
        names = [os.fspath(path) for path in paths if isinstance(path, str | os.PathLike)]
        if len(names) < len(paths):
            raise UsageError("photos: only files can be sorted; give the path of a photo or a folder, or several paths")
        sources, encoder = [*open_inputs(names)], replace(self.encoder, skipped=[])
        return sort_photos(
            self.cache, sources, encoder, folder, action=action, min_probability=min_probability, dry_run=dry_run
        )


@dataclass(frozen=True)
class Explanation:
    """A prediction, the photo, and the shots that contributed most to the answer. It can be shown in a notebook."""

    prediction: Prediction
    picture: bytes
    shots: list[bytes | None]

    @property
    def label(self) -> str:
        """The predicted class."""
        return self.prediction.label

    def _repr_html_(self) -> str:
        near = zip(self.prediction.neighbours, self.shots, strict=True)
        rows = [
            (_shown(shot), key.label, f"{key.contribution:.2g}", f"{key.affinity:.3f}", key.source)
            for key, shot in near
        ]
        chances = zip(self.prediction.labels, self.prediction.probabilities, strict=True)
        answer = ", ".join(f"{label} {share:.1%}" for label, share in chances)
        asked = table((), [(_shown(self.picture), answer)])
        columns = ("shot", "class", "contribution", "affinity", "source")
        return asked + table(columns, rows, "the shots behind the answer", numbers=(2, 3))


def _answers(
    index: Index, given: Sequence[Pictures], encoder: Encoder, ask: Ask, group_unlike: bool = False
) -> Predictions:
    if group_unlike:
        check_fitted(index)
        return classify_in_groups(
            index, Pool.of([part.source for part in given], replace(encoder, read=given[0].read)), ask
        )
    parts = (index.classify_source(part.source, replace(encoder, read=part.read), ask) for part in given)
    return Predictions.joined(chain.from_iterable(parts))


def _suggested(index: Index, encoder: Encoder, photos: Any, n: int) -> Suggestions:
    if (features := features_of(photos)) is not None:
        check_unit(queries(features, index.d))
        names = [str(row) for row in range(len(features))]
        return suggest_features(Pool(names, features.astype(np.float32), [None] * len(features)), n, index)
    if isinstance(photos, str | os.PathLike) and kind_of(photos) != "image":
        return suggest_photos([*open_inputs([os.fspath(photos)])], n, encoder, index)
    given = pictures(photos)
    return suggest_photos([given.source], n, replace(encoder, read=given.read, strict=True), index)


def _shown(data: bytes | None) -> Any:
    try:
        small = images.thumbnail(data or b"", THUMBNAIL)
    except RetrievalTipError:
        return "-"
    return markup(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(small).decode()}">')


def _file(path: str) -> bytes | None:
    try:
        return read_item(path)
    except InputError:
        return None
