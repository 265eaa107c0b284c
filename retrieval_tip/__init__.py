"""Few-shot image classification as retrieval: Tip-Adapter on a FAISS index with a Parquet label store.

>>> from retrieval_tip import CacheModel, load_backbone
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval_tip.backbone import Backbone, Identity, load_backbone
    from retrieval_tip.build import build_index
    from retrieval_tip.cache_model import CacheModel, verify
    from retrieval_tip.classifier import Neighbour, Prediction
    from retrieval_tip.errors import RetrievalTipError
    from retrieval_tip.estimator import TipAdapterClassifier
    from retrieval_tip.evaluate import Evaluation
    from retrieval_tip.features import Encoder, EncodingCache
    from retrieval_tip.finetune import Tuned
    from retrieval_tip.sources import Source, open_inputs, open_source
    from retrieval_tip.trainer import Recipe

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "backbone",
    "CacheModel": "cache_model",
    "Encoder": "features",
    "EncodingCache": "features",
    "Evaluation": "evaluate",
    "Identity": "backbone",
    "Neighbour": "classifier",
    "Prediction": "classifier",
    "Predictions": "classifier",
    "Recipe": "trainer",
    "RetrievalTipError": "errors",
    "Source": "sources",
    "TipAdapterClassifier": "estimator",
    "Tuned": "finetune",
    "build_index": "build",
    "load_backbone": "backbone",
    "open_inputs": "sources",
    "open_source": "sources",
    "verify": "cache_model",
}

__all__ = [
    "Backbone",
    "CacheModel",
    "Encoder",
    "EncodingCache",
    "Evaluation",
    "Identity",
    "Neighbour",
    "Prediction",
    "Predictions",
    "Recipe",
    "RetrievalTipError",
    "Source",
    "TipAdapterClassifier",
    "Tuned",
    "build_index",
    "load_backbone",
    "open_inputs",
    "open_source",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and help needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
