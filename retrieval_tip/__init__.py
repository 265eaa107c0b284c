"""Few-shot image classification by retrieval, using Tip-Adapter with a FAISS index and a Parquet label store.

>>> from retrieval_tip import Classifier
>>> clf = Classifier.from_folder("photos")  # one folder per class
>>> clf.predict("photo.jpg").label
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing it from typing would double the import time of the package
if TYPE_CHECKING:
    from retrieval_tip.backbones.base import Backbone as Backbone
    from retrieval_tip.backbones.base import Identity as Identity
    from retrieval_tip.backbones.loading import load_backbone as load_backbone
    from retrieval_tip.classifier import Classifier as Classifier
    from retrieval_tip.classifier import Explanation as Explanation
    from retrieval_tip.data.encoding_cache import EncodingCache as EncodingCache
    from retrieval_tip.data.reader import Reader as Reader
    from retrieval_tip.data.sources import Source as Source
    from retrieval_tip.data.sources import open_inputs as open_inputs
    from retrieval_tip.data.sources import open_source as open_source
    from retrieval_tip.errors import RetrievalTipError as RetrievalTipError
    from retrieval_tip.estimator import ImageEncoder as ImageEncoder
    from retrieval_tip.estimator import TipAdapterClassifier as TipAdapterClassifier
    from retrieval_tip.evaluation.calibration import Calibration as Calibration
    from retrieval_tip.evaluation.compare import Compared as Compared
    from retrieval_tip.evaluation.compare import Side as Side
    from retrieval_tip.evaluation.compare import compare as compare
    from retrieval_tip.evaluation.evaluate import Evaluation as Evaluation
    from retrieval_tip.evaluation.evaluate import Recognition as Recognition
    from retrieval_tip.fit.closed_form import FormChoice as FormChoice
    from retrieval_tip.fit.finetune import Tuned as Tuned
    from retrieval_tip.fit.trainer import Recipe as Recipe
    from retrieval_tip.index.build import build_index as build_index
    from retrieval_tip.index.changes import Added as Added
    from retrieval_tip.index.changes import Changed as Changed
    from retrieval_tip.index.changes import Renamed as Renamed
    from retrieval_tip.labelling.photos import Suggestions as Suggestions
    from retrieval_tip.labelling.photos import suggest_photos as suggest_photos
    from retrieval_tip.labelling.sort import Sorted as Sorted
    from retrieval_tip.labelling.sort import sort_photos as sort_photos
    from retrieval_tip.labelling.sort import undo_sort as undo_sort
    from retrieval_tip.model import Index as Index
    from retrieval_tip.model import verify as verify
    from retrieval_tip.predictions import Neighbour as Neighbour
    from retrieval_tip.predictions import Prediction as Prediction
    from retrieval_tip.predictions import Predictions as Predictions
    from retrieval_tip.predictions import SimilarShot as SimilarShot
    from retrieval_tip.settings import Settings as Settings

__version__ = "0.1.0"

_HOMES = {
    "Added": "index.changes",
    "Backbone": "backbones.base",
    "Calibration": "evaluation.calibration",
    "Changed": "index.changes",
    "Classifier": "classifier",
    "Compared": "evaluation.compare",
    "EncodingCache": "data.encoding_cache",
    "Evaluation": "evaluation.evaluate",
    "Explanation": "classifier",
    "FormChoice": "fit.closed_form",
    "Identity": "backbones.base",
    "ImageEncoder": "estimator",
    "Index": "model",
    "Neighbour": "predictions",
    "Prediction": "predictions",
    "Predictions": "predictions",
    "Reader": "data.reader",
    "Recipe": "fit.trainer",
    "Recognition": "evaluation.evaluate",
    "Renamed": "index.changes",
    "RetrievalTipError": "errors",
    "Settings": "settings",
    "Side": "evaluation.compare",
    "SimilarShot": "predictions",
    "Sorted": "labelling.sort",
    "Source": "data.sources",
    "Suggestions": "labelling.photos",
    "TipAdapterClassifier": "estimator",
    "Tuned": "fit.finetune",
    "build_index": "index.build",
    "compare": "evaluation.compare",
    "load_backbone": "backbones.loading",
    "open_inputs": "data.sources",
    "open_source": "data.sources",
    "sort_photos": "labelling.sort",
    "suggest_photos": "labelling.photos",
    "undo_sort": "labelling.sort",
    "verify": "model",
}

__all__ = sorted(_HOMES)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> object:
    """Import a public name when it is first used. Importing torch takes seconds, and ``--help`` does not need it."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
