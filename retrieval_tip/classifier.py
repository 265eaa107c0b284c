"""The classifier of the Python API. Its methods open the arguments, and call the functions that do the work."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeGuard, Unpack, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval_tip import settings, tip
from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Backbone
from retrieval_tip.backbones.loading import Model, given_backbone, load_again
from retrieval_tip.data import images
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.feature_table import check_backbone
from retrieval_tip.data.reader import Reader
from retrieval_tip.data.sources import (
    Source,
    check_images,
    kind_of,
    open_inputs,
    open_items,
    open_source,
    read_item,
)
from retrieval_tip.data.tables import is_frame
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.evaluation.audit import audit
from retrieval_tip.evaluation.calibration import Calibration, calibrate
from retrieval_tip.evaluation.compare import Compared, Side, compare
from retrieval_tip.evaluation.evaluate import Evaluation, evaluate
from retrieval_tip.evaluation.held_out import classify_sources
from retrieval_tip.fit.closed_form import FormChoice
from retrieval_tip.html import data_url, markup, table
from retrieval_tip.index import changes, places
from retrieval_tip.index.build import build_index
from retrieval_tip.index.items import planned
from retrieval_tip.index.places import Changed, Place
from retrieval_tip.labelling import groups
from retrieval_tip.labelling.placing import Action
from retrieval_tip.labelling.pool import Pool, Suggestions, suggest_features, suggest_photos
from retrieval_tip.labelling.sort import Sorted, sort_photos
from retrieval_tip.model import Index
from retrieval_tip.pictures import Picture, features_of, is_one, open_images
from retrieval_tip.predictions import Prediction, Predictions, SimilarShot
from retrieval_tip.retrieval.inputs import Features
from retrieval_tip.settings import (
    Ask,
    AskOptions,
    BuildOptions,
    ClassPrior,
    MetricName,
    Precision,
    ValuesName,
)
from retrieval_tip.store.address import parse
from retrieval_tip.wording import counted, few

if TYPE_CHECKING:
    from retrieval_tip.fit.finetune import Tuned

THUMBNAIL = 128
"""Length of the longer side of an image in a notebook, in pixels."""

Query: TypeAlias = "Picture | Iterable[Picture] | Features"
Checked: TypeAlias = Literal["check", "keep"]
"""Whether the norms of features must be 1, or may have any value."""


class ClassifierOptions(BuildOptions, total=False):
    """The keyword arguments of :meth:`Classifier.from_folder`."""

    out: Place | None
    device: str
    precision: Precision
    views: int
    seed: int


class PredictOptions(AskOptions, total=False):
    """The keyword arguments of :meth:`Classifier.predict`."""

    group_no_match: bool
    norms: Checked


class TemporaryIndex:
    """A place for an index, which is deleted together with this object."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="retrieval-tip-")
        self.place = Path(folder) / "index"
        self.delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


class OpenIndex:
    """An index with its encoder, which you can change. Each change writes a new version, which is used from then on.

    If a change fails, nothing changes. This is the base class of :class:`Classifier`.
    """

    _temporary: TemporaryIndex | None = None

    def __init__(self, index: Index, reader: Reader) -> None:
        self.index = index
        self.reader = replace(reader, parts=index.parts)

    @classmethod
    def load(
        cls,
        place: Place,
        model: Model = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> Self:
        """Open an index folder or a LanceDB store (``lance://``, ``s3://`` or ``gs://``), and load its encoder.

        If the encoder of the index cannot be loaded by its name, pass it as ``model``, as for ``from_folder``. If the
        index was built from features of an unnamed encoder, it can only classify features.

        Raises StoreError if the index is missing or damaged, and BackboneError if the encoder cannot be loaded or is
        not the encoder of the index.
        """
        index = places.at(_place("place", place)).load(device=device)
        given = None if model is None else given_backbone(model, device, precision)
        backbone = given or _own_backbone(index, device, precision)
        check_backbone(index.backbone, index.d, backbone, [])
        return cls(index, Reader(backbone, cache=EncodingCache.default()))

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return list(self.index.class_names)

    @property
    def classes_(self) -> npt.NDArray[np.str_]:
        """The class names as an array, as in scikit-learn."""
        return np.array(self.index.class_names)

    def __len__(self) -> int:
        """Number of keys."""
        return self.index.n

    def __repr__(self) -> str:
        backbone = (
            self.index.backbone.model if self.index.backbone else "features of an unnamed backbone"
        )
        place = self._saved_at() or "not saved"
        return (
            f"Classifier({self.index.n} photos, {len(self.classes)} classes, {backbone}, {place})"
        )

    def __copy__(self) -> Self:
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return the whole index, so that a pickle needs neither its folder nor its store."""
        return {"index": self.index.in_memory(), "reader": self.reader}

    def _saved_at(self) -> str | None:
        return None if self._temporary is not None else self.index.place

    def _written(self) -> str:
        """Return the place of the index. If it has none, write it to a temporary folder."""
        if self.index.place is None:
            self._temporary = self._temporary or TemporaryIndex()
            self.index.save(self._temporary.place)
        assert self.index.place is not None
        return self.index.place

    def _in_folder(self) -> Index:
        """Load the index from its folder. Raises UsageError if it is in another kind of store."""
        place = self._written()
        if parse(place) is not None:
            raise UsageError(f"{place}: this needs an index in a folder; copy it with save(FOLDER)")
        return Index.load(place, device=self.index.device)

    def _use(self, index: Index) -> None:
        """Use another version of the index, and the encoder that belongs to it."""
        if index.backbone != self.index.backbone:
            self.reader = replace(self.reader, backbone=_own_backbone(index, index.device))
        self.index, self.reader = index, replace(self.reader, parts=index.parts)

    def _change(self, call: Callable[..., Changed], *arguments: Any, **options: Any) -> Changed:
        """Make a change, use the version that it has written, and return its result."""
        result = call(self._written(), *arguments, base=self.index, **options)
        self._use(result.index.on(self.index.device))
        return result

    def save(self, folder: Place) -> Self:
        """Copy the index to a new folder or LanceDB store, which this classifier uses from now on."""
        self.index = changes.clone(self._written(), _place("folder", folder)).index.on(
            self.index.device
        )
        self._temporary = None
        return self

    def add(
        self,
        what: Any,
        label: str | Iterable[str] | None = None,
        *,
        text: Place | None = None,
        shots: int | None = None,
    ) -> Changed:
        """Add labelled photos, and return the ids of their keys and further facts.

        ``what`` can be photos as for ``predict``, with one ``label`` for all or a list of labels, or a labelled source.
        A label may name a new class. For the other arguments, see :func:`changes.add`.

        Raises UsageError if photos have no label.
        """
        if label is not None:
            if _is_source(what):
                what = [path for source in _photos(what) for path in source.paths or ()]
            source = open_images(what, label)
        elif isinstance(what, Source) or _is_source(what):
            source = _opened(what, "train")
        else:
            raise UsageError("label: missing; give one for all photos, or one per photo")
        reader = replace(self.reader, views=self.index.built.views, seed=self.index.built.seed)
        return self._change(changes.add, source, reader, text=text, shots=shots)

    def merge(self, other: Place | OpenIndex) -> Changed:
        """Add the shots of another classifier or index that has the same encoder (see :func:`changes.merge`)."""
        place = other._written() if isinstance(other, OpenIndex) else _place("other", other)
        return self._change(changes.merge, place)

    def remove(self, *, where: str | None = None, key_ids: Sequence[int] | None = None) -> Changed:
        """Remove shots by an SQL condition, or by the ids of their keys (see :func:`changes.remove`)."""
        return self._change(changes.remove, where=where, key_ids=key_ids)

    def relabel(
        self,
        label: str | Mapping[int, str],
        *,
        where: str | None = None,
        key_ids: Sequence[int] | None = None,
    ) -> Changed:
        """Move shots to other classes of the index (see :func:`changes.relabel`)."""
        return self._change(changes.relabel, label, where=where, key_ids=key_ids)

    def rename(self, old: str, new: str, *, encode: bool = False) -> Changed:
        """Rename a class, or merge it into the class ``new`` (see :func:`changes.rename`).

        With ``encode``, the text weight of the class is computed from its new name.
        """
        if encode and self.reader.backbone is None:
            raise UsageError("encode: the index has no encoder; rename without it")
        backbone = self.reader.backbone if encode else None
        return self._change(changes.rename, old, new, backbone)

    def history(self) -> pa.Table:
        """Return a table that has one row per version of the index, oldest first."""
        return places.at(self._written()).history()

    def rollback(self, version: int | None = None) -> Changed:
        """Restore an earlier version, by default the previous one (see :func:`changes.rollback`)."""
        done = changes.rollback(self._written(), version)
        self._use(done.index.on(self.index.device))
        return done

    def fit(
        self,
        val: Any = None,
        *,
        metric: MetricName | None = None,
        values: ValuesName | None = None,
        class_prior: ClassPrior | None = None,
        prior: Sequence[Place] = (),
    ) -> FormChoice:
        """Fit the index to its shots again, in closed form.

        ``val`` can be validation photos as for ``evaluate``, which are used instead of held-out shots to select the
        fit. For the other arguments and the errors, see :func:`changes.fit_index`.
        """
        source = None if val is None else _opened(val, "val")
        done = self._change(
            changes.fit_index,
            metric=metric,
            values=values,
            class_prior=class_prior,
            prior=prior,
            validation=source,
            reader=self.reader,
        )
        assert done.fit is not None
        return done.fit

    def calibrate(self, val: Any) -> Calibration:
        """Fit the temperature of the probabilities to validation photos (see :func:`calibration.calibrate`).

        ``val`` can be the same as for ``evaluate``. Do not use shots or test photos.
        """
        index, found = calibrate(self._in_folder(), _opened(val, "val"), self.reader)
        self._use(index.on(self.index.device))
        return found

    def finetune(
        self,
        out: Place | None = None,
        recipe: settings.Recipe | None = None,
        *,
        source: Any = None,
        val: Any = None,
    ) -> Tuned:
        """Fine-tune the index, and use the more accurate of both indexes from now on.

        The index itself does not change. The result is written to the folder ``out``. By default, it is temporary until
        you call ``save``.

        - ``source``: the photos of the shots, if they have moved. They can be the same as for
          ``evaluate``.
        - ``val``: validation photos as for ``evaluate``

        For the other arguments and the errors, see :func:`finetune.finetune_into`.
        """
        from retrieval_tip.fit.finetune import finetune_into, shots_of

        if not isinstance(recipe, settings.Recipe | None):
            raise UsageError(
                f"recipe: got an object of type {type(recipe).__name__}; give a Recipe"
            )
        index = self._in_folder()
        held_out = None if val is None else _opened(val, "val")
        given = None if source is None else _opened(source, "train")
        shots = shots_of(index, given)
        temporary, place = _new_place(out)
        tuned = finetune_into(place, index, shots, self.reader, recipe, val=held_out)
        self._use(places.at(place).load(device=self.index.device))
        if Path(place) != index.folder:
            self._temporary = temporary
        return tuned


class Classifier(OpenIndex):
    """Few-shot image classifier.

    Attributes:
        index: the index (see :class:`Index`). Use it for operations that have no method in this class.
        reader: reads new photos, and encodes them with the same preprocessing as for the index.

    Examples:
        >>> clf = Classifier.from_folder("photos")  # one folder per class
        >>> clf.predict("new/1.jpg").label
        'owl'
        >>> clf.save("indexes/things")
    """

    @classmethod
    def from_folder(
        cls,
        photos: Place | Source,
        model: Model = None,
        *,
        out: Place | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        views: int = 1,
        seed: int = 1,
        **options: Unpack[BuildOptions],
    ) -> Self:
        """Build a classifier from a folder that has one folder of photos per class, or from another labelled source.

        Args:
            photos: an open source, or the path of a folder, a table or a split file (see
                :func:`sources.open_source`).
            model: the encoder (see :data:`loading.Model`).
            out: the index folder to write. By default, the index is temporary until you call ``save``.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: the precision of the encoder (see :func:`loading.load_backbone`).
            views: 1 to encode the centre view of each photo, or the number of augmented views to average.
            seed: the random seed for ``shots`` and ``views``.
            options: see :class:`settings.BuildOptions`.

        See :func:`build.build_index` for the errors.
        """
        planned(options)  # raises an error before the encoder is loaded
        source = photos if isinstance(photos, Source) else open_source(_place("photos", photos))
        check_images([source])
        backbone = given_backbone(model, device, precision)
        reader = Reader(backbone, seed=seed, cache=EncodingCache.default())
        temporary, place = _new_place(out)
        made = cls(
            build_index(source, place, replace(reader, views=views), device=device, **options),
            reader,
        )
        made._temporary = temporary
        return made

    @classmethod
    def from_images(
        cls,
        images: Iterable[Picture],
        labels: str | Iterable[str],
        model: Model = None,
        **options: Unpack[ClassifierOptions],
    ) -> Self:
        """Build a classifier from photos in memory, such as PIL images, and the class name of each photo.

        The other arguments are the same as for :meth:`from_folder`. See :func:`pictures.open_images` for the errors.
        """
        return cls.from_folder(open_images(images, labels), model, **options)

    @overload
    def predict(self, what: Picture, **options: Unpack[PredictOptions]) -> Prediction: ...  # type: ignore[overload-overlap] # a path is also an iterable of letters
    @overload
    def predict(
        self, what: Iterable[Picture] | Features, **options: Unpack[PredictOptions]
    ) -> Predictions: ...
    def predict(
        self,
        what: Any,
        *,
        group_no_match: bool = False,
        norms: Checked = "check",
        **asked: Unpack[AskOptions],
    ) -> Prediction | Predictions:
        """Classify photos or features.

        Args:
            what: a photo, which can be a path, a PIL image, an array or tensor of shape ``[h, w, 3]`` or ``[3, h, w]``,
                encoded bytes, or an open file. For several photos, pass an iterable of these, a batch of shape
                ``[b, h, w, 3]`` or ``[b, 3, h, w]``, an open source, or any input of ``retrieval-tip classify``, such
                as a folder or a table. Pixels are uint8 or floats from 0 to 1 (see :mod:`pictures`). You can also pass
                features of shape ``[q, d]`` or ``[d]``. Unreadable photos in a folder or table are skipped, and
                ``reader.skipped`` lists them.
            group_no_match: whether to group similar photos without a match (see :func:`groups.group_no_match`).
            norms: ``"check"`` to check that all features have norm 1, or ``"keep"`` to accept any norm.
            asked: the fields of :class:`settings.Ask`.

        Returns a :class:`Prediction` for a single photo or feature, and :class:`Predictions` otherwise. Raises
        InputError if a photo cannot be read, or if the norm of a feature is not 1.
        """
        index = self.index
        ask = Ask(**asked)
        if (features := features_of(what)) is not None:
            answers = index.classify(features, norms, **vars(ask))
            answers = groups.group_no_match(index, features, answers) if group_no_match else answers
            return answers[0] if what.ndim == 1 else answers
        sources = _photos(what)
        reader = replace(self.reader, norms=norms)
        if group_no_match:
            groups.check_fitted(index)
            answers = groups.classify_in_groups(index, Pool.of(sources, reader), ask)
        else:
            answers = Predictions.joined(classify_sources(index, sources, reader, ask))
        return answers[0] if is_one(what) and not _is_source(what) else answers

    __call__ = predict

    def predict_proba(
        self, what: Query, *, norms: Checked = "check", **asked: Unpack[AskOptions]
    ) -> FloatArray:
        """Return the probabilities of all classes, of shape ``[q, c]``, in the order of ``classes``.

        The arguments are the same as for :meth:`predict`. A single photo gives one row. Unreadable photos in a folder
        or table have no row.
        """
        asked |= {"neighbours": 0, "logits": True}
        answers: Any = self.predict(what, norms=norms, **asked)
        one = isinstance(answers, Prediction)
        own = answers.logits if one else answers.to_arrow()["logits"].combine_chunks().flatten()
        logits = torch.tensor(np.asarray(own), dtype=torch.float32)
        chances = tip.probabilities(
            logits.view(-1, len(self.classes)), self.index.settings.temperature
        )
        return np.asarray(chances)

    def score(self, what: Query, y: Iterable[object]) -> float:
        """Return the share of photos or features whose class is right, as scikit-learn's classifiers do.

        ``what`` can be the same as for :meth:`predict`, and ``y`` lists the right classes. Raises InputError if ``y``
        has another length or no class of the index.
        """
        answers: Any = self.predict(what, neighbours=0)
        found = (
            [answers.label]
            if isinstance(answers, Prediction)
            else answers.to_arrow()["label"].to_pylist()
        )
        right = [str(label) for label in y]
        if len(found) != len(right):
            what_ = f"got {counted(len(right), 'label')} for {counted(len(found), 'photo')}"
            raise InputError(f"y: {what_}; give one per photo")
        if right and not set(right) & set(self.classes):
            raise InputError(
                f"y: {right[0]} is not a class of this index; it has {few(self.classes)}"
            )
        return float(np.mean(np.array(found) == np.array(right)))

    def explain(self, what: Picture, **asked: Unpack[AskOptions]) -> Explanation:
        """Classify a photo, and show it in a notebook next to the shots that contributed most to the answer.

        The arguments are the same as for :meth:`predict`. By default, ``top`` is 3.
        """
        if not is_one(what):
            raise UsageError("what: expected a single photo; call explain for each photo")
        asked.setdefault("top", 3)
        given = open_images(what)
        (prediction,) = Predictions.joined(
            classify_sources(self.index, [given], self.reader, Ask(**asked))
        )
        (path,) = given.paths or ()
        shots = [_file(neighbour.source) for neighbour in prediction.neighbours]
        return Explanation(prediction, given.load(path), shots)

    def similar(
        self, photo: Picture | Features, n: int = 5, *, norms: Checked = "check"
    ) -> list[SimilarShot]:
        """Return the ``n`` shots most similar to a photo or a feature (see :meth:`model.Index.similar`)."""
        if (features := features_of(photo)) is None and is_one(photo):
            features = self.reader.encode(open_images(photo)).features
            norms = "keep"
        if features is None or len(features) != 1:
            raise UsageError("photo: expected a single photo or feature; call similar for each one")
        return self.index.similar(features, n, norms=norms)[0]

    def suggest(self, photos: Iterable[Picture] | Features | Place, n: int = 20) -> Suggestions:
        """Choose ``n`` unlabelled photos or features to label next, most useful first.

        ``photos`` can be the same as for :meth:`predict`. Photos that the index already contains are skipped. See
        :func:`pool.suggest_photos` for the errors.
        """
        if (features := features_of(photos)) is None:
            return suggest_photos(_photos(photos), n, self.reader, self.index)
        self.index.queries(features, "check")
        names = [str(row) for row in range(len(features))]
        return suggest_features(
            Pool(names, features.astype(np.float32), [None] * len(features)), n, self.index
        )

    def sort(
        self,
        photos: Place | Iterable[Place],
        folder: Place,
        *,
        action: Action = "copy",
        min_probability: float | None = None,
        at_most_wrong: float | None = None,
        smooth: bool = False,
        dry_run: bool = False,
    ) -> Sorted:
        """Sort photos into ``folder/CLASS``. To undo it, call ``undo_sort``.

        ``photos`` are one or several paths of photos, folders or tables. For the other arguments and the errors,
        see :func:`sort.sort_photos`.
        """
        paths = (
            list(photos)
            if isinstance(photos, Iterable) and not isinstance(photos, str | os.PathLike)
            else [photos]
        )
        names = [os.fspath(path) for path in paths if isinstance(path, str | os.PathLike)]
        if len(names) < len(paths):
            raise UsageError(
                "photos: only files can be sorted; give the path of a photo or a folder, or several paths"
            )
        sources = [*open_inputs(names)]
        reader = replace(self.reader, skipped=[])
        return sort_photos(
            self.index,
            sources,
            reader,
            folder,
            action=action,
            min_probability=min_probability,
            at_most_wrong=at_most_wrong,
            smooth=smooth,
            dry_run=dry_run,
        )

    def evaluate(
        self, test: Any, *, abstain: float | None = None, **asked: Unpack[AskOptions]
    ) -> Evaluation:
        """Classify labelled test photos, and return the accuracy and other metrics.

        ``test`` is a labelled source: a path, or photos in memory opened by :func:`pictures.open_images`. If it has a
        test split, only this split is used. For the other arguments, see :func:`evaluate.evaluate`.
        """
        return evaluate(
            self.index,
            _opened(test, "test"),
            replace(self.reader, skipped=[]),
            abstain=abstain,
            **asked,
        )

    def compare(self, other: Place | Classifier, test: Any) -> Compared:
        """Compare this classifier (A) with another classifier or index (B) on the same photos.

        ``test`` can be the same as for :meth:`evaluate`. A source may also be unlabelled. See :func:`compare.compare`.
        """
        if not isinstance(other, Classifier):
            other = Classifier.load(_place("other", other), device=self.index.device)
        a, b = (
            Side(one._saved_at() or name, one.index, replace(one.reader, skipped=[]))
            for name, one in (("this classifier", self), ("the other classifier", other))
        )
        return compare(a, b, _opened(test, "test", open_items))

    def audit(self, *, borderline: bool = False) -> pa.Table:
        """List shots that look mislabelled, most suspicious first (see :func:`audit.audit`).

        To correct labels, pass a mapping from ``key_id`` to the right label to ``relabel``.
        """
        return audit(self.index.in_memory(), borderline=borderline)

    def report(self, out: Place, test: Any) -> Evaluation:
        """Write an accuracy report as a single HTML file to ``out``, and return the evaluation.

        ``test`` can be the same as for :meth:`evaluate`. See :func:`report.write_report`.
        """
        from retrieval_tip.report.report import write_report

        return write_report(
            self.index.in_memory(), _opened(test, "test"), replace(self.reader, skipped=[]), out
        )

    def as_module(self) -> torch.nn.Module:
        """Return a copy of the classifier as a torch module, which maps pixels to logits.

        The pixels are RGB values from 0 to 255, of shape ``[b, 3, h, w]``, already resized and cropped to the input
        size of the encoder. If the index has no encoder, the module takes features instead. The logits have the shape
        ``[b, c]``, in the order of ``classes``.

        Raises UsageError if ``k`` is not ``all``, or if there are too many keys for memory.
        """
        from retrieval_tip.export.onnx_graph import answering

        if (self.index.settings.k or self.index.n) < self.index.n:
            raise UsageError(
                f"as_module: k is {self.index.settings.k}, but a module uses all keys; set k to all"
            )
        module = answering(self.index.in_memory(), self.reader.backbone, alone=True)
        return copy.deepcopy(module).eval()

    def export_onnx(self, out: Place, *, features: bool = False) -> dict[str, Any]:
        """Write the classifier to an ONNX file, which computes logits from pixels, and return its metadata.

        With ``features``, the graph computes logits from features, and the image encoder is left out. See
        :func:`onnx_graph.export_onnx` for the graph and the errors.
        """
        from retrieval_tip.export.onnx_graph import export_onnx

        backbone = None if features else self.reader.backbone
        return export_onnx(self.index.in_memory(), _place("out", out), backbone)


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
        rows = [
            (_shown(shot), key.label, f"{key.contribution:.2g}", f"{key.affinity:.3f}", key.source)
            for key, shot in zip(self.prediction.neighbours, self.shots, strict=True)
        ]
        chances = zip(self.prediction.labels, self.prediction.probabilities, strict=True)
        asked = table(
            (),
            [(_shown(self.picture), ", ".join(f"{label} {share:.1%}" for label, share in chances))],
        )
        columns = ("shot", "class", "contribution", "affinity", "source")
        return asked + table(columns, rows, "the shots behind the answer", numbers=(2, 3))


def _shown(data: bytes | None) -> Any:
    try:
        small = images.thumbnail(data or b"", THUMBNAIL)
    except RetrievalTipError:
        return "-"
    return markup(f'<img alt="" src="{data_url(small)}">')


def _file(path: str) -> bytes | None:
    try:
        return read_item(path)
    except InputError:
        return None


def _opened(given: Any, part: str, opened: Callable[..., Source] = open_source) -> Source:
    """Return a labelled source. If it has several parts, ``part`` is used."""
    if isinstance(given, Source):
        return given
    return opened(given if is_frame(given) else _place("photos", given), split=part)


def _photos(what: Any) -> list[Source]:
    """Open photos that need no labels."""
    if isinstance(what, Source) or is_frame(what):
        return [_opened(what, "test", open_items)]
    return [*open_inputs([os.fspath(what)])] if _is_source(what) else [open_images(what)]


def _is_source(what: object) -> TypeGuard[Place]:
    """Return whether an object is the path of several photos, for example of a folder or a table."""
    return isinstance(what, str | os.PathLike) and kind_of(what) != "image"


def _place(name: str, given: object) -> Place:
    """Return a path or an address. Raises UsageError if an object is neither."""
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"{name}: got an object of type {type(given).__name__}; give a path")
    return given


def _new_place(out: Place | None) -> tuple[TemporaryIndex | None, Place]:
    """Return a place for a new index, which is temporary by default."""
    temporary = TemporaryIndex() if out is None else None
    return temporary, _place("out", out) if temporary is None else temporary.place


def _own_backbone(index: Index, device: str, precision: Precision = "auto") -> Backbone | None:
    if index.backbone is None:
        return None
    return load_again(index.backbone, device=device, precision=precision)
