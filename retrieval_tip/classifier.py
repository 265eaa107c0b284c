"""The ``Classifier`` combines an index and its encoder. Its methods correspond to the commands of the same name."""

from __future__ import annotations

import base64
import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast, overload

import numpy as np
import numpy.typing as npt

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.backbones.loading import load_backbone, load_when_needed
from retrieval_tip.data import images
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.feature_tables import check_backbone
from retrieval_tip.data.pictures import Picture, Pictures, is_one, labelled_pictures, pictures
from retrieval_tip.data.sources import Source, kind_of, open_inputs, open_source, read_item
from retrieval_tip.errors import InputError, RetrievalTipError, UsageError
from retrieval_tip.evaluation.evaluate import Evaluation, evaluate
from retrieval_tip.html import markup, table
from retrieval_tip.index import changes, hub, places
from retrieval_tip.index.build import build_index
from retrieval_tip.labelling.photos import Pool, Suggestions, suggest_features, suggest_photos
from retrieval_tip.predictions import Prediction, Predictions
from retrieval_tip.retrieval.inputs import check_unit, queries
from retrieval_tip.settings import ClassPrior, KeysMet, MetricName, ValuesName

if TYPE_CHECKING:
    import torch

    from retrieval_tip.answering import AnsweringIndex
    from retrieval_tip.backbones.torch_backbone import TorchBackbone
    from retrieval_tip.report.report import WrittenReport

    Loaded = tuple[Any, Any, Any]
    """A model, its preprocessing and its tokenizer, as open_clip returns them."""

Features = npt.NDArray[np.floating[Any]]
THUMBNAIL = 128
"""Length of the longer side of an image in a notebook, in pixels."""


class Classifier:
    """Few-shot image classifier.

    Attributes:
        cache: the index (see :class:`CacheModel`). Use it for operations that have no method in this class.
        encoder: the encoder that computes the features of new photos, with the same preprocessing as for the index.

    Examples:
        >>> clf = Classifier.from_folder("photos")  # one folder per class
        >>> clf.predict("new/1.jpg").label
        'owl'
        >>> clf.save("indexes/things")
    """

    _temporary: weakref.finalize[Any, Any] | None = None

    def __init__(self, cache: AnsweringIndex, encoder: Encoder) -> None:
        self.cache, self.encoder = cache, encoder

    @classmethod
    def from_folder(
        cls,
        photos: str | os.PathLike[str] | Source | Pictures,
        model: str | Backbone | Loaded | None = None,
        *,
        pretrained: str | None = None,
        out: str | os.PathLike[str] | None = None,
        device: str = "auto",
        views: int = 1,
        seed: int = 1,
        shots: int | None = None,
        templates: Sequence[str] | None = None,
        text: str | os.PathLike[str] | None = None,
        index: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        alpha: float | None = None,
        beta: float | None = None,
        normalize: Literal["both", "shots", "affinity", "none"] | None = None,
        fit: Literal["auto", "none"] | None = None,
        metric: MetricName | None = None,
        values: ValuesName | None = None,
        class_prior: ClassPrior | None = None,
        prior: Sequence[str | os.PathLike[str]] = (),
        k: KeysMet = None,
        logit_scale: float | None = None,
        drop_suspicious: bool = False,
    ) -> Self:
        """Build a classifier from a folder that has one folder of photos per class, or from another labelled source.

        - ``photos``: an open source, or the path of a folder, a table, a tar file or a split file (see
          :func:`sources.open_source`).
        - ``model``: the encoder, which can be a name (see :func:`loading.load_backbone`), a backbone, or the model,
          preprocessing and tokenizer that open_clip returns.
        - ``pretrained``: the tag or the file of the weights, if ``model`` is a name.
        - ``out``: the index folder to write. By default, the index is temporary until you call :meth:`save`.
        - ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        - ``views``: 1 to encode the centre view of each photo, or the number of augmented views to average.
        - ``seed``: the random seed for ``shots`` and ``views``.
        - ``shots``: the number of photos to sample per class (see :mod:`data.shots`). By default, all photos are used.
        - ``templates``: the prompt templates, where ``{}`` is replaced with the class name. You can also pass a feature
          table of prompts as ``text``.
        - ``fit``: ``auto`` to fit the method to the photos, or ``none`` for Tip-Adapter with ``alpha`` and ``beta``.

        For the other arguments and the errors, see :func:`build.build_index`.
        """
        if isinstance(photos, Pictures):
            given = photos
        else:
            given = Pictures(photos if isinstance(photos, Source) else open_source(photos), read_item)
        encoder = Encoder(_backbone(model, pretrained, device), views=views, seed=seed, cache=EncodingCache.at(None))
        place = Path(tempfile.mkdtemp(prefix="retrieval-tip-")) / "index" if out is None else Path(out)
        cache = build_index(
            given.source, place, replace(encoder, read=given.read, strict=given is photos), shots=shots,
            templates=templates, text=text, index=index, dtype=dtype, alpha=alpha, beta=beta, normalize=normalize,
            fit=fit, metric=metric, values=values, class_prior=class_prior, prior=prior, k=k, logit_scale=logit_scale,
            drop_suspicious=drop_suspicious, device=device,
        )  # fmt: skip
        made = cls(cache, replace(encoder, views=1))
        if out is None:
            made._temporary = weakref.finalize(made, shutil.rmtree, place.parent, ignore_errors=True)
        return made

    @classmethod
    def from_images(
        cls,
        images: Any,
        labels: Iterable[Any] | None = None,
        model: str | Backbone | Loaded | None = None,
        *,
        pretrained: str | None = None,
        out: str | os.PathLike[str] | None = None,
        device: str = "auto",
        views: int = 1,
        seed: int = 1,
        shots: int | None = None,
        templates: Sequence[str] | None = None,
        text: str | os.PathLike[str] | None = None,
        index: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        alpha: float | None = None,
        beta: float | None = None,
        normalize: Literal["both", "shots", "affinity", "none"] | None = None,
        fit: Literal["auto", "none"] | None = None,
        metric: MetricName | None = None,
        values: ValuesName | None = None,
        class_prior: ClassPrior | None = None,
        prior: Sequence[str | os.PathLike[str]] = (),
        k: KeysMet = None,
        logit_scale: float | None = None,
        drop_suspicious: bool = False,
    ) -> Self:
        """Build a classifier from labelled photos in memory or in a dataset.

        You can pass ``images`` in three forms:

        - photos as for :meth:`predict`, and the class name of each photo in ``labels``
        - pairs ``(photo, label)``, for example a torch dataset that has no transform
        - a Hugging Face dataset that has a column of images and a column of labels

        The other arguments are the same as for :meth:`from_folder`.
        """
        return cls.from_folder(
            labelled_pictures(images, labels), model, pretrained=pretrained, out=out, device=device, views=views,
            seed=seed, shots=shots, templates=templates, text=text, index=index, dtype=dtype, alpha=alpha, beta=beta,
            normalize=normalize, fit=fit, metric=metric, values=values, class_prior=class_prior, prior=prior, k=k,
            logit_scale=logit_scale, drop_suspicious=drop_suspicious,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        place: str | os.PathLike[str],
        model: str | Backbone | Loaded | None = None,
        *,
        device: str = "auto",
    ) -> Self:
        """Open an index folder or a LanceDB store (``lance://``, ``s3://`` or ``gs://``), and load its encoder.

        If the encoder of the index cannot be loaded by its name, pass it as ``model``, as for :meth:`from_folder`. If
        the index was built from features of an unnamed encoder, it can only classify features.

        Raises:
            StoreError: if the index is missing or damaged.
            BackboneError: if the encoder cannot be loaded, or if ``model`` is not the encoder of the index.
        """
        cache = places.at(place).load(device=device)
        backbone = _own_backbone(cache, device) if model is None else _backbone(model, None, device)
        check_backbone(cache.backbone, cache.d, backbone, [])
        return cls(cache, Encoder(backbone, cache=EncodingCache.at(None)))

    @classmethod
    def from_hub(
        cls,
        repository: str,
        folder: str | os.PathLike[str] | None = None,
        model: str | Backbone | Loaded | None = None,
        *,
        device: str = "auto",
    ) -> Self:
        """Download an index from the Hugging Face hub, and open it.

        ``repository`` is the name ``ORG/NAME`` that was passed to :meth:`push_to_hub`. The index is written to
        ``folder``, which defaults to ``indexes/NAME``. ``model`` and ``device`` are the same as for :meth:`load`.
        Raises InputError if the download fails.
        """
        return cls.load(hub.download(repository, folder), model, device=device)

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return list(self.cache.class_names)

    @overload
    def predict(  # type: ignore[overload-overlap] # a path is also an iterable of letters
        self,
        what: Picture,
        top: int = 1,
        *,
        neighbours: int = 5,
        k: KeysMet = None,
        tail: bool | None = None,
        certify: bool = False,
        norms: Literal["check", "keep"] = "check",
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        what: Iterable[Picture] | Features,
        top: int = 1,
        *,
        neighbours: int = 5,
        k: KeysMet = None,
        tail: bool | None = None,
        certify: bool = False,
        norms: Literal["check", "keep"] = "check",
    ) -> Predictions: ...
    def predict(
        self,
        what: Any,
        top: int = 1,
        *,
        neighbours: int = 5,
        k: KeysMet = None,
        tail: bool | None = None,
        certify: bool = False,
        norms: Literal["check", "keep"] = "check",
    ) -> Prediction | Predictions:
        """Classify photos or features.

        Args:
            what: a photo, which can be a path, a PIL image, a uint8 array of shape ``[h, w, 3]``, encoded bytes, or a
                row of a Hugging Face dataset. For several photos, pass a list of these, a Hugging Face dataset or its
                image column, or any input of ``retrieval-tip classify``, such as a folder or a table. You can also pass
                features of shape ``[q, d]`` or ``[d]``. Unreadable photos in a folder or table are skipped and listed
                in ``encoder.skipped``.
            top: the number of classes to report, most probable first.
            neighbours: the number of shots to report, largest contribution first.
            k: the number of nearest keys to use, or ``"all"``. Defaults to the setting of the index.
            tail: whether to estimate the contribution of the other keys. Defaults to the setting of the index.
            certify: whether to use enough keys to prove the answer.
            norms: ``"check"`` to check that all features have norm 1, or ``"keep"`` to accept any norm.

        Returns a :class:`Prediction` for a single photo or feature, and :class:`Predictions` otherwise. Raises
        InputError if a photo cannot be read, or if the norm of a feature is not 1.
        """
        if isinstance(what, np.ndarray) and np.issubdtype(what.dtype, np.floating):
            answers = self.cache.classify(np.atleast_2d(what), top, k, tail, neighbours, certify, norms)
            return answers[0] if what.ndim == 1 else answers
        if isinstance(what, str | os.PathLike) and kind_of(what) != "image":
            given = [Pictures(source, read_item) for source in open_inputs([os.fspath(what)])]
            return _answers(self.cache, given, replace(self.encoder, norms=norms), top, k, tail, neighbours, certify)
        encoder = replace(self.encoder, strict=True)
        answers = _answers(self.cache, [pictures(what)], encoder, top, k, tail, neighbours, certify)
        return answers[0] if is_one(what) else answers

    __call__ = predict

    def explain(
        self,
        what: Picture,
        top: int = 3,
        *,
        neighbours: int = 5,
        k: KeysMet = None,
        tail: bool | None = None,
        certify: bool = False,
    ) -> Explanation:
        """Classify a photo, and show it in a notebook next to the shots that contributed most to the answer.

        The arguments are the same as for :meth:`predict`.
        """
        given, encoder = pictures(what), replace(self.encoder, strict=True)
        prediction = _answers(self.cache, [given], encoder, top, k, tail, neighbours, certify)[0]
        own = given.read(given.source.paths[0]) if given.source.paths else b""
        return Explanation(prediction, own, [_file(neighbour.source) for neighbour in prediction.neighbours])

    def suggest(self, photos: Iterable[Picture] | Features | str | os.PathLike[str], n: int = 20) -> Suggestions:
        """Choose ``n`` unlabelled photos or features to label next, most useful first.

        ``photos`` can be the same as for :meth:`predict`. Photos that the index already contains are skipped. See
        :func:`photos.suggest_photos` for the errors.
        """
        return _suggested(self.cache, self.encoder, photos, n)

    def add(
        self,
        what: Any,
        label: str | Sequence[str] | None = None,
        *,
        text: str | os.PathLike[str] | None = None,
        shots: int | None = None,
        skip_known: bool = False,
    ) -> list[int]:
        """Add labelled photos as a new version of the index, and return the ids of their keys.

        ``what`` can be photos as for :meth:`predict`, with one ``label`` for all or a list of labels, or a labelled
        source or dataset. A label may name a new class. For the other arguments, see :func:`changes.add`.

        Raises UsageError if photos have no label.
        """
        built = self.cache.manifest.built if self.cache.manifest is not None else None
        encoder = self.encoder if built is None else replace(self.encoder, views=built.views, seed=built.seed)
        if isinstance(what, Source):
            source = what
        elif label is None and isinstance(what, str | os.PathLike) and kind_of(what) != "image":
            source = open_source(what)
        elif label is None:
            given = labelled_pictures(what)
            source, encoder = given.source, replace(encoder, read=given.read, strict=True)
        else:
            several = isinstance(what, str | os.PathLike) and Path(what).is_dir()
            given = pictures([str(path) for path in images.find(Path(what))] if several else what).labelled(label)
            source, encoder = given.source, replace(encoder, read=given.read, strict=True)
        added = changes.add(self._place(), source, encoder, text=text, shots=shots, skip_known=skip_known)
        self.cache = self.cache.reload()
        return added.key_ids

    def save(self, folder: str | os.PathLike[str]) -> Self:
        """Copy the index to a new folder or LanceDB store, which this classifier uses from now on."""
        changes.clone(self._place(), folder)
        self.cache = places.at(folder).load(device=self.cache.device)
        if self._temporary is not None:
            self._temporary()
        self._temporary = None
        return self

    def _place(self) -> str:
        if self.cache.place is None:
            raise UsageError("index: has no folder yet; write one with cache.save(FOLDER)")
        return self.cache.place

    def evaluate(
        self,
        test: Any,
        *,
        k: KeysMet = None,
        tail: bool | None = None,
        abstain: float | None = None,
        affinities: bool = False,
    ) -> Evaluation:
        """Classify labelled test photos, and return the accuracy and other metrics.

        ``test`` is a labelled source, or a dataset as for :meth:`from_images`. If a source has a test split, only this
        split is used. For the other arguments, see :func:`evaluate.evaluate`.
        """
        encoder = replace(self.encoder, skipped=[])
        if isinstance(test, str | os.PathLike | Source):
            source = _opened(test, "test")
        else:
            given = labelled_pictures(test)
            source, encoder = given.source, replace(encoder, read=given.read)
        return evaluate(self.cache, source, encoder, k=k, tail=tail, abstain=abstain, affinities=affinities)

    def report(
        self,
        out: str | os.PathLike[str],
        test: str | os.PathLike[str] | Source,
        *,
        val: str | os.PathLike[str] | Source | None = None,
        shots: Sequence[int] | None = None,
        seeds: int = 3,
        curves: bool = True,
    ) -> WrittenReport:
        """Write an accuracy report as a single HTML file to ``out``.

        If the labelled sources ``test`` and ``val`` are split, the test split and the validation split are used. For
        the other arguments, see :func:`report.write_report`.
        """
        from retrieval_tip.report.report import write_report

        encoder, chosen_on = replace(self.encoder, skipped=[]), None if val is None else _opened(val, "val")
        cache = self.cache.in_memory()
        return write_report(
            cache, _opened(test, "test"), encoder, out, val=chosen_on, shots=shots, seeds=seeds, curves=curves
        )

    def as_module(self) -> torch.nn.Module:
        """Return a copy of the classifier as a torch module, which maps pixels to logits.

        The pixels are RGB values from 0 to 255, of shape ``[b, 3, h, w]``, already resized and cropped to the input
        size of the encoder. If the index has no encoder, the module takes features instead. The logits have the shape
        ``[b, c]``, in the order of :attr:`classes`.

        Raises UsageError if ``k`` is not ``all``, or if there are too many keys for memory.
        """
        from retrieval_tip.index.onnx_graph import Answer, Logits

        if (self.cache.settings.k or self.cache.n) < self.cache.n:
            raise UsageError(f"as_module: k is {self.cache.settings.k}, but a module uses all keys; set k to all")
        answer = Answer(self.cache.in_memory(), cast("TorchBackbone | None", self.encoder.backbone))
        return Logits(copy.deepcopy(answer)).eval()

    def push_to_hub(
        self,
        repository: str,
        *,
        test: str | os.PathLike[str] | Source | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the index and a model card to the Hugging Face hub, and return the URL.

        ``repository`` is the name ``ORG/NAME``. The upload includes the features, the labels and the paths of the
        shots, but no photos and no earlier versions. If you pass a labelled source as ``test``, the card also shows the
        accuracy on it. Raises InputError if the upload fails.
        """
        figures = None if test is None else self.evaluate(test).to_dict()
        return hub.upload(self._place(), repository, hub.card(self.cache, repository, figures), private, token)

    def __len__(self) -> int:
        """Number of keys."""
        return self.cache.n

    def __repr__(self) -> str:
        backbone = self.cache.backbone.model if self.cache.backbone else "features of an unnamed backbone"
        place = "not saved" if self._temporary is not None else self.cache.place
        return f"Classifier({self.cache.n} photos, {len(self.classes)} classes, {backbone}, {place})"

    def _repr_html_(self) -> str:
        return self.cache._repr_html_()


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
    index: AnsweringIndex,
    given: Iterable[Pictures],
    encoder: Encoder,
    top: int,
    k: KeysMet,
    tail: bool | None,
    neighbours: int,
    certify: bool,
) -> Predictions:
    answers: list[Predictions] = []
    for part in given:
        reader = replace(encoder, read=part.read)
        try:
            answers += index.classify_source(part.source, reader, top, k, tail, neighbours, certify)
        except InputError as error:
            raise InputError(str(error).partition("; leave out --strict")[0]) from None
    return Predictions.joined(answers)


def _suggested(index: AnsweringIndex, encoder: Encoder, photos: Any, n: int) -> Suggestions:
    if isinstance(photos, np.ndarray) and np.issubdtype(photos.dtype, np.floating):
        check_unit(queries(photos, index.d))
        names = [str(row) for row in range(len(photos))]
        return suggest_features(Pool(names, photos.astype(np.float32), [None] * len(photos)), n, index)
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


def _opened(source: str | os.PathLike[str] | Source, part: str) -> Source:
    return source if isinstance(source, Source) else open_source(source, split=part)


def _own_backbone(cache: AnsweringIndex, device: str) -> Backbone | None:
    identity = cache.backbone
    if identity is not None and cache.tuned is not None:
        return load_backbone(identity.model, identity.pretrained, device=device, tuned=cache.tuned)
    return None if identity is None else load_when_needed(identity, cache.d, device=device)


def _backbone(model: str | Backbone | Loaded | None, pretrained: str | None, device: str) -> Backbone:
    if model is None or isinstance(model, str):
        return load_backbone(model, pretrained, device=device, lazy=True)
    if isinstance(model, tuple):
        from retrieval_tip.backbones.open_clip import OpenClipBackbone

        return OpenClipBackbone.of(*model)
    return model
