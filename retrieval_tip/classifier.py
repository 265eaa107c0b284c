"""Photographs in, answers out: an index with the backbone that it was made with, in one object.

It does nothing itself: each method is one call of what the commands of the same names call too.
"""

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
    """A model, its preprocessing and its tokenizer, as open_clip gives them."""

Features = npt.NDArray[np.floating[Any]]
THUMBNAIL = 128
"""Pixels of the longer side of a picture in a notebook."""


class Classifier:
    """An index of labelled photographs that answers for new ones.

    ``cache`` is the index itself (:class:`CacheModel`), with everything that it can do; ``encoder`` makes features of
    photographs, as the index was made.

    >>> clf = Classifier.from_folder("photos")            # one folder a class
    >>> clf.predict("new/1.jpg").label
    >>> clf.save("indexes/things")
    """

    _temporary: weakref.finalize[Any, Any] | None = None
    """Removes the folder of an index that lives as long as this object."""

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
        """Build an index from a folder with one folder of photos per class, or from any other labelled source.

        - ``photos``: what :func:`sources.open_source` reads, or an open source
        - ``model``: a name (:func:`loading.load_backbone`), a backbone, or open_clip's model, preprocessing, tokenizer
        - ``pretrained``: a tag or a file of weights for a ``model`` given by name
        - ``out``: index folder to write; without it the index is deleted with this object, unless :meth:`save` keeps it
        - ``device``: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``
        - ``views``: 1 for the centre view of each photo, V > 1 for the mean of V augmented views
        - ``seed``: of the draws of ``shots`` and ``views``

        The other arguments are those of :func:`build.build_index`. Raises as :func:`sources.open_source`,
        :func:`loading.load_backbone` and :func:`build.build_index`.
        """
        if isinstance(photos, Pictures):
            given = photos
        else:
            given = Pictures(photos if isinstance(photos, Source) else open_source(photos), read_item)
        encoder = Encoder(_backbone(model, pretrained, device), views=views, seed=seed, cache=EncodingCache.at(None))
        place = Path(tempfile.mkdtemp(prefix="retrieval-tip-")) / "index" if out is None else Path(out)
        cache = build_index(
            given.source,
            place,
            replace(encoder, read=given.read, strict=given is photos),
            shots=shots,
            templates=templates,
            text=text,
            index=index,
            dtype=dtype,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            fit=fit,
            metric=metric,
            values=values,
            k=k,
            logit_scale=logit_scale,
            device=device,
        )
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
        """Build an index from labelled photos in memory or in a dataset.

        ``images`` are what :meth:`predict` takes, with one of ``labels`` for each; or pairs ``(photo, label)``, as the
        items of a torch dataset without a transform are; or a Hugging Face dataset with columns of images and labels.
        The other arguments are those of :meth:`from_folder`. Raises as it does, and as
        :func:`pictures.labelled_pictures`.
        """
        return cls.from_folder(
            labelled_pictures(images, labels),
            model,
            pretrained=pretrained,
            out=out,
            device=device,
            views=views,
            seed=seed,
            shots=shots,
            templates=templates,
            text=text,
            index=index,
            dtype=dtype,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            fit=fit,
            metric=metric,
            values=values,
            k=k,
            logit_scale=logit_scale,
        )

    @classmethod
    def load(
        cls,
        place: str | os.PathLike[str],
        model: str | Backbone | Loaded | None = None,
        *,
        device: str = "auto",
    ) -> Self:
        """The index at a folder or an address, with its own backbone, by what its manifest says.

        ``model`` is one in its place, where it cannot be loaded by its name. An index of features whose backbone has no
        name answers for features only. Raises StoreError where there is no index, or it is damaged; BackboneError where
        its backbone cannot be had, or ``model`` is another one.
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
        """Download and open the index that :meth:`push_to_hub` put at ``ORG/NAME`` of the Hugging Face hub.

        It is stored in ``folder``, by default ``indexes/NAME``. ``model`` and ``device`` are those of :meth:`load`.
        Raises as it does, and InputError if the download fails.
        """
        return cls.load(hub.download(repository, folder), model, device=device)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the index's order."""
        return list(self.cache.class_names)

    @overload
    def predict(  # type: ignore[overload-overlap] # a path is an iterable of letters too
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
        """Classify one photo, several photos, everything in a folder, table or tar, or features ``[q, d]``.

        Args:
            what: one photo (a path, a PIL picture, an array ``[h, w, 3]`` uint8, encoded bytes, a row of a Hugging Face
                dataset); several (a list of these, a Hugging Face dataset or its column of images); anything that
                ``retrieval-tip classify`` takes (a folder, a pattern, a table, a tar), where ``encoder.skipped`` lists
                the photos that could not be read; or floating-point features of the index's backbone.
            top: classes to report, most probable first.
            neighbours: shots to report, those that contributed most to each answer.
            k: nearest keys that vote, or ``all``; by default the index's own setting.
            tail: whether to estimate what the other keys would add; by default the index's own setting.
            certify: whether to use as many keys as settle the answer.
            norms: of features: ``check`` that they have unit norm, or ``keep`` them as they are.

        Raises InputError naming the photo that cannot be read, or the row of features whose norm is not 1.
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
        """Classify one photo, and show it in a notebook beside its nearest shots. Arguments as for :meth:`predict`."""
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
        """Add labelled photos to the index as a new version, and return the ids of their keys.

        ``what`` are photos as for :meth:`predict`, with a ``label`` for all or one for each; or a labelled source or
        dataset. New classes come after the existing ones. The other arguments are those of :func:`changes.add`. Raises
        as it does; UsageError if photos come without a label.
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
        """Keep the index in a folder of its own, or at an address: a copy, which this object then is of.

        Raises as :func:`changes.clone`.
        """
        changes.clone(self._place(), folder)
        self.cache = places.at(folder).load(device=self.cache.device)
        if self._temporary is not None:
            self._temporary()
        self._temporary = None
        return self

    def _place(self) -> str:
        if self.cache.place is None:
            raise UsageError("the index has no folder yet; give it one with its cache.save(FOLDER)")
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
        """Classify labelled photos and compare: :func:`evaluate.evaluate`.

        ``test`` is a labelled source, of which the test part is taken, or a dataset as for :meth:`from_images`. The
        other arguments are those of :func:`evaluate.evaluate`. Raises as it does.
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
        """Write what is known about the index as one HTML file: :func:`report.write_report`.

        ``test`` and ``val`` are labelled sources, of which the parts of these names are taken. The other arguments are
        those of :func:`report.write_report`. Raises as it does.
        """
        from retrieval_tip.report.report import write_report

        encoder, chosen_on = replace(self.encoder, skipped=[]), None if val is None else _opened(val, "val")
        cache = self.cache.in_memory()
        return write_report(
            cache, _opened(test, "test"), encoder, out, val=chosen_on, shots=shots, seeds=seeds, curves=curves
        )

    def as_module(self) -> torch.nn.Module:
        """A module from pixels to logits ``[b, c]``, in the order of ``classes``, apart from this object.

        Its input is what :func:`onnx_graph.export_onnx` calls ``pixels``: ``[b, 3, h, w]``, RGB from 0 to 255, resized
        and cut to the backbone's size; ``features`` where the index has no backbone. Raises UsageError for an index
        that retrieves its keys, or as :meth:`answering.AnsweringIndex.in_memory`.
        """
        from retrieval_tip.index.onnx_graph import Answer, Logits

        if (self.cache.settings.k or self.cache.n) < self.cache.n:
            raise UsageError("as_module: takes an index whose queries meet all keys (k all)")
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
        """Put the index at ``ORG/NAME`` of the Hugging Face hub, with a card that says what it is; the address.

        ``test`` is a labelled source by which it is judged for the card. The photographs stay here: an index holds
        features, labels, and the paths of its shots. Earlier versions stay here too. Raises InputError if the hub
        refuses.
        """
        figures = None if test is None else self.evaluate(test).to_dict()
        return hub.upload(self._place(), repository, hub.card(self.cache, repository, figures), private, token)

    def __len__(self) -> int:
        """Number of keys."""
        return self.cache.n

    def __repr__(self) -> str:
        backbone = self.cache.backbone.model if self.cache.backbone else "features of an unnamed backbone"
        place = "kept for now" if self._temporary is not None else self.cache.place
        return f"Classifier({self.cache.n} photographs, {len(self.classes)} classes, {backbone}, {place})"

    def _repr_html_(self) -> str:
        """For notebooks: what the index holds."""
        return self.cache._repr_html_()


@dataclass(frozen=True)
class Explanation:
    """An answer with its photographs: the one that was given, and the shots that contributed most to the answer."""

    prediction: Prediction
    picture: bytes
    shots: list[bytes | None]

    @property
    def label(self) -> str:
        """The answer."""
        return self.prediction.label

    def _repr_html_(self) -> str:
        """Show the photograph, its classes, and the shots behind the answer, for notebooks."""
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
    """Return the backbone that an index names, ``None`` if it names none."""
    identity = cache.backbone
    if identity is not None and cache.tuned is not None:
        return load_backbone(identity.model, identity.pretrained, device=device, tuned=cache.tuned)
    return None if identity is None else load_when_needed(identity, cache.d, device=device)


def _backbone(model: str | Backbone | Loaded | None, pretrained: str | None, device: str) -> Backbone:
    """The backbone that a name, a backbone, or what open_clip has loaded stands for."""
    if model is None or isinstance(model, str):
        return load_backbone(model, pretrained, device=device)
    if isinstance(model, tuple):
        from retrieval_tip.backbones.open_clip import OpenClipBackbone

        return OpenClipBackbone.of(*model)
    return model
