"""The classifier of the Python API."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from retrieval_tip.backbones.base import Backbone
from retrieval_tip.classifier.answers import AnsweringClassifier
from retrieval_tip.classifier.edits import EditableClassifier
from retrieval_tip.classifier.evaluations import MeasuredClassifier
from retrieval_tip.classifier.opened import TemporaryIndex, check_place, given_backbone
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.encoding_cache import EncodingCache
from retrieval_tip.data.pictures import Pictures, labelled_pictures
from retrieval_tip.data.sources import Source, open_source, read_item
from retrieval_tip.errors import UsageError
from retrieval_tip.index import changes, hub, places
from retrieval_tip.index.build import build_index
from retrieval_tip.index.items import Plan
from retrieval_tip.settings import BuildOptions, KeysMet, Precision

if TYPE_CHECKING:
    import torch

    from retrieval_tip.backbones.torch_backbone import TorchBackbone
    from retrieval_tip.classifier.opened import Loaded


class ClassifierOptions(BuildOptions, total=False):
    """The keyword arguments of :meth:`Classifier.from_folder`."""

    pretrained: str | None
    out: str | os.PathLike[str] | None
    device: str
    precision: Precision
    views: int
    seed: int


class Classifier(AnsweringClassifier, MeasuredClassifier, EditableClassifier):
    """Few-shot image classifier.

    Attributes:
        cache: the index (see :class:`Index`). Use it for operations that have no method in this class.
        encoder: the encoder that computes the features of new photos, with the same preprocessing as for the index.

    Examples:
        >>> clf = Classifier.from_folder("photos")  # one folder per class
        >>> clf.predict("new/1.jpg").label
        'owl'
        >>> clf.save("indexes/things")
    """

    @classmethod
    def from_folder(
        cls,
        photos: str | os.PathLike[str] | Source | Pictures,
        model: str | Backbone | Loaded | None = None,
        *,
        pretrained: str | None = None,
        out: str | os.PathLike[str] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
        views: int = 1,
        seed: int = 1,
        **options: Unpack[BuildOptions],
    ) -> Self:
        """Build a classifier from a folder that has one folder of photos per class, or from another labelled source.

        Args:
            photos: an open source, or the path of a folder, a table, a tar file or a split file (see
                :func:`sources.open_source`).
            model: the encoder, which can be a name (see :func:`loading.load_backbone`), a backbone, or the model,
                preprocessing and tokenizer that open_clip returns.
            pretrained: the tag or the file of the weights, if ``model`` is a name.
            out: the index folder to write. By default, the index is temporary until you call :meth:`save`.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            precision: the precision of the encoder (see :func:`loading.load_backbone`).
            views: 1 to encode the centre view of each photo, or the number of augmented views to average.
            seed: the random seed for ``shots`` and ``views``.
            options: see :class:`settings.BuildOptions`.

        See :func:`build.build_index` for the errors.
        """
        Plan(**options)  # raises an error before anything is loaded
        if isinstance(photos, Pictures):
            given = photos
        else:
            source = photos if isinstance(photos, Source) else open_source(check_place("photos", photos))
            given = Pictures(source, read_item)
        encoder = Encoder(
            given_backbone(model, pretrained, device, precision), views=views, seed=seed, cache=EncodingCache.at(None)
        )
        reading = replace(encoder, read=given.read, strict=given is photos)
        temporary = TemporaryIndex() if out is None else None
        place = temporary.place if temporary is not None else check_place("out", out)
        made = cls(build_index(given.source, place, reading, device=device, **options), replace(encoder, views=1))
        made._temporary = temporary
        return made

    @classmethod
    def from_images(
        cls,
        images: Any,
        labels: Iterable[Any] | None = None,
        model: str | Backbone | Loaded | None = None,
        **options: Unpack[ClassifierOptions],
    ) -> Self:
        """Build a classifier from labelled photos in memory or in a dataset.

        You can pass ``images`` in three forms:

        - photos as for ``predict``, and the class name of each photo in ``labels``
        - pairs ``(photo, label)``, for example a torch dataset of PIL images, or of tensors of RGB values from 0 to 1
        - a Hugging Face dataset that has a column of images and a column of labels

        The other arguments are the same as for :meth:`from_folder`.
        """
        if isinstance(images, str | os.PathLike) and labels is None:
            raise UsageError(f"{os.fspath(images)}: a path has no labels; call from_folder, or give labels")
        return cls.from_folder(labelled_pictures(images, labels), model, **options)

    @classmethod
    def from_hub(
        cls,
        repository: str,
        folder: str | os.PathLike[str] | None = None,
        model: str | Backbone | Loaded | None = None,
        *,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> Self:
        """Download an index from the Hugging Face hub, and open it.

        ``repository`` is the name ``ORG/NAME`` that was passed to :meth:`push_to_hub`. The index is written to
        ``folder``, which defaults to ``indexes/NAME``. The other arguments are the same as for ``load``.
        Raises InputError if the download fails.
        """
        return cls.load(hub.download(repository, folder), model, device=device, precision=precision)

    def save(self, folder: str | os.PathLike[str]) -> Self:
        """Copy the index to a new folder or LanceDB store, which this classifier uses from now on."""
        changes.clone(self._place(), check_place("folder", folder))
        self.cache = places.at(folder).load(device=self.cache.device)
        self._temporary = None
        return self

    def as_module(self) -> torch.nn.Module:
        """Return a copy of the classifier as a torch module, which maps pixels to logits.

        The pixels are RGB values from 0 to 255, of shape ``[b, 3, h, w]``, already resized and cropped to the input
        size of the encoder. If the index has no encoder, the module takes features instead. The logits have the shape
        ``[b, c]``, in the order of ``classes``.

        Raises UsageError if ``k`` is not ``all``, or if there are too many keys for memory.
        """
        from retrieval_tip.index.onnx_graph import Logits, answering

        if (self.cache.settings.k or self.cache.n) < self.cache.n:
            raise UsageError(f"as_module: k is {self.cache.settings.k}, but a module uses all keys; set k to all")
        answer = answering(self.cache.in_memory(), cast("TorchBackbone | None", self.encoder.backbone))
        return Logits(copy.deepcopy(answer)).eval()

    def export_onnx(self, out: str | os.PathLike[str], *, features: bool = False, k: KeysMet = None) -> dict[str, Any]:
        """Write the classifier to an ONNX file, which computes logits from pixels, and return its metadata.

        With ``features``, the graph computes logits from features, and the image encoder is left out. If the index uses
        the ``k`` nearest keys, set ``k`` to ``"all"``. See :func:`onnx_graph.export_onnx` for the graph and the errors.
        """
        from retrieval_tip.index.onnx_graph import export_onnx

        cache = self.cache.in_memory()
        backbone = None if features else cast("TorchBackbone | None", self.encoder.backbone)
        return export_onnx(cache.with_settings(cache.settings.override(k=k)), check_place("out", out), backbone)

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

    push = push_to_hub
