"""``Classifier``: an index and its encoder in one object. Its methods do the same as the commands of the same name."""

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
from retrieval_tip.predictions import Prediction, Predictions
from retrieval_tip.settings import KeysMet, MetricName, ValuesName

if TYPE_CHECKING:
    import torch

    from retrieval_tip.answering import AnsweringIndex
    from retrieval_tip.backbones.torch_backbone import TorchBackbone
    from retrieval_tip.report.report import WrittenReport

    Loaded = tuple[Any, Any, Any]
    """A model, its preprocessing and its tokenizer, as open_clip returns them."""

Features = npt.NDArray[np.floating[Any]]
THUMBNAIL = 128
"""Longer side of an image in a notebook, in pixels."""


class Classifier:
    """Few-shot image classifier.

    Build one with :meth:`from_folder` or :meth:`from_images`, or open one with :meth:`load` or :meth:`from_hub`.

    Attributes:
        cache: the index (:class:`CacheModel`), for everything that has no method here.
        encoder: makes features of photos, in the same way as for the index.

    Examples:
        >>> clf = Classifier.from_folder("photos")  # one folder per class
        >>> clf.predict("new/1.jpg").label
        'owl'
        >>> clf.save("indexes/things")
    """

    _temporary: weakref.finalize[Any, Any] | None = None
    """Deletes the temporary folder of an index that has not been saved."""

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
        k: KeysMet = None,
        logit_scale: float | None = None,
    ) -> Self:
        """Build a classifier from a folder that has one folder of photos per class, or from another labelled source.

        - ``photos``: path of a folder, table, tar or split file (:func:`sources.open_source`), or an open source
        - ``model``: encoder, as a name (:func:`loading.load_backbone`), a backbone, or open_clip's tuple of model,
          preprocessing and tokenizer
        - ``pretrained``: tag or file of weights, if ``model`` is a name
        - ``out``: index folder to write; without it, the index is deleted with this object unless you :meth:`save` it
        - ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``
        - ``views``: 1 for the centre view of each photo, V > 1 for the mean feature of V augmented views
        - ``seed``: random seed of ``shots`` and ``views``
        - ``shots``: draw this many photos per class, by the published rule [default: all]
        - ``templates``: prompts for class names, with ``{}`` for the name; or ``text``, a feature table of prompts
        - ``fit``: ``auto`` fits the method to the photos; ``none`` is plain Tip-Adapter with ``alpha`` and ``beta``

        :func:`build.build_index` describes the other arguments. Raises the same as :func:`sources.open_source`,
        :func:`loading.load_backbone` and :func:`build.build_index`.
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
            fit=fit, metric=metric, values=values, k=k, logit_scale=logit_scale, device=device,
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
        k: KeysMet = None,
        logit_scale: float | None = None,
    ) -> Self:
        """Build a classifier from labelled photos in memory or in a dataset.

        ``images`` are photos as for :meth:`predict`, with one class name each in ``labels``; or pairs
        ``(photo, label)``, such as a torch dataset without a transform; or a Hugging Face dataset with columns of
        images and labels. The other arguments are as for :meth:`from_folder`. Raises the same as :meth:`from_folder`
        and :func:`pictures.labelled_pictures`.
        """
        return cls.from_folder(
            labelled_pictures(images, labels), model, pretrained=pretrained, out=out, device=device, views=views,
            seed=seed, shots=shots, templates=templates, text=text, index=index, dtype=dtype, alpha=alpha, beta=beta,
            normalize=normalize, fit=fit, metric=metric, values=values, k=k, logit_scale=logit_scale,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        place: str | os.PathLike[str],
        model: str | Backbone | Loaded | None = None,
        *,
        device: str = "auto",
    ) -> Self:
        """Open an index from its folder or store address, and load its encoder.

        ``model`` is the index's encoder, as for :meth:`from_folder`, if it cannot be loaded by its name. An index of
        features from an unnamed encoder classifies features only. Raises StoreError if the index is missing or damaged;
        BackboneError if its encoder cannot be loaded, or ``model`` is a different one.
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
        """Download an index that :meth:`push_to_hub` put on the Hugging Face hub at ``ORG/NAME``, and open it.

        The index goes to ``folder``, by default ``indexes/NAME``. ``model`` and ``device`` are as for :meth:`load`.
        Raises the same as :meth:`load`, and InputError if the download fails.
        """
        return cls.load(hub.download(repository, folder), model, device=device)

    @property
    def classes(self) -> list[str]:
        """Class names, in the order of the logits."""
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
        """Classify a photo, several photos, a folder, table or tar, or features.

        Args:
            what: one photo (path, PIL image, array ``[h, w, 3]`` uint8, encoded bytes, or row of a Hugging Face
                dataset); several (a list of these, a Hugging Face dataset or its image column); any input of
                ``retrieval-tip classify`` (folder, pattern, table, tar), where ``encoder.skipped`` lists unreadable
                photos; or features ``[q, d]`` or ``[d]`` of the index's encoder, floating-point.
            top: number of classes to report, most probable first.
            neighbours: number of shots to report, largest contribution first.
            k: number of nearest keys that vote, or ``"all"``. [default: the index's setting]
            tail: estimate the contribution of the other keys. [default: the index's setting]
            certify: use as many keys as it takes to settle the answer.
            norms: ``"check"`` that features have norm 1, or ``"keep"`` them unchecked.

        Returns a :class:`Prediction` for one photo or feature ``[d]``, else :class:`Predictions`. Raises InputError
        naming the unreadable photo, or the row of features whose norm is not 1.
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
        """Classify one photo and show it in a notebook beside the shots that decided. See :meth:`predict`."""
        given, encoder = pictures(what), replace(self.encoder, strict=True)
        prediction = _answers(self.cache, [given], encoder, top, k, tail, neighbours, certify)[0]
        own = given.read(given.source.paths[0]) if given.source.paths else b""
        return Explanation(prediction, own, [_file(neighbour.source) for neighbour in prediction.neighbours])

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

        ``what`` are photos as for :meth:`predict`, with a ``label`` for all or one for each; or a labelled source or
        dataset. Labels may be new classes. The other arguments are those of :func:`changes.add`. Raises the same as
        :func:`changes.add`, and UsageError if photos have no label.
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
        """Copy the index to a new folder or store address, and use that copy. Raises as :func:`changes.clone`."""
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
        """Classify labelled test photos, and return accuracy and other figures (:func:`evaluate.evaluate`).

        ``test`` is a labelled source (its test part is used), or a dataset as for :meth:`from_images`. The other
        arguments, and the errors, are those of :func:`evaluate.evaluate`.
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
        """Write an accuracy report, one HTML file, to ``out`` (:func:`report.write_report`).

        ``test`` and ``val`` are labelled sources; their test and val parts are used. The other arguments, and the
        errors, are those of :func:`report.write_report`.
        """
        from retrieval_tip.report.report import write_report

        encoder, chosen_on = replace(self.encoder, skipped=[]), None if val is None else _opened(val, "val")
        cache = self.cache.in_memory()
        return write_report(
            cache, _opened(test, "test"), encoder, out, val=chosen_on, shots=shots, seeds=seeds, curves=curves
        )

    def as_module(self) -> torch.nn.Module:
        """Return a torch module from pixels to logits ``[b, c]``, in the order of :attr:`classes`. It is a copy.

        Pixels are ``[b, 3, h, w]``, RGB from 0 to 255, resized and cropped to the encoder's size, as in
        :func:`onnx_graph.export_onnx`. An index without an encoder takes features. Raises UsageError if ``k`` is not
        ``all``, or as :meth:`answering.AnsweringIndex.in_memory`.
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
        """Upload the index to the Hugging Face hub at ``ORG/NAME``, with a card, and return the address.

        The upload holds features, labels and the paths of the shots, but no photos and no earlier versions. ``test`` is
        a labelled source whose accuracy goes on the card. Raises InputError if the hub refuses.
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
    """A prediction with the photo and the shots that contributed most to the answer, for a notebook."""

    prediction: Prediction
    picture: bytes
    shots: list[bytes | None]

    @property
    def label(self) -> str:
        """Predicted class."""
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
        return load_backbone(model, pretrained, device=device)
    if isinstance(model, tuple):
        from retrieval_tip.backbones.open_clip import OpenClipBackbone

        return OpenClipBackbone.of(*model)
    return model
