"""Export an index as an ONNX graph that computes logits from pixels or features.

You can run the graph with any ONNX runtime, without this package.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from retrieval_tip import tip
from retrieval_tip.backbones.base import view_size
from retrieval_tip.backbones.tower import shorter_side
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import InputError, UsageError, first_line, show
from retrieval_tip.files import replacing

if TYPE_CHECKING:
    from retrieval_tip.backbones.torch_backbone import TorchBackbone

OPSET = 18
LARGEST = (1 << 31) - (1 << 20)
"""Maximum size in bytes of a graph including its weights, slightly below the protobuf limit of 2 GiB."""


class Answer(torch.nn.Module):
    """A torch module that computes the answers of an index. See :func:`export_onnx` for its input and outputs."""

    mean: Tensor
    std: Tensor
    text: Tensor
    keys: Tensor
    ids: Tensor
    values: Tensor
    metric_mean: Tensor | None
    metric_transform: Tensor | None
    class_means: Tensor | None
    class_offsets: Tensor | None

    def __init__(self, cache: CacheModel, backbone: TorchBackbone | None) -> None:
        super().__init__()
        settings, metric = cache.settings, cache.metric
        self.settings, self.n_classes = settings, len(cache.class_names)
        self.tower = None if backbone is None else backbone.image_encoder
        preprocess = {"mean": [0.0], "std": [1.0]} if backbone is None else backbone.identity.preprocess
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(preprocess[name]).float()[:, None, None])
        self.register_buffer("text", cache.text_weights.float().cpu())
        self.register_buffer("keys", torch.from_numpy(np.asarray(cache.met[:], dtype=np.float32)))
        self.register_buffer("ids", cache.class_ids.cpu())
        values = one_hot(self.ids, self.n_classes) if cache.values is None else cache.values  # ONNX cannot sum by class
        self.register_buffer("values", values.float().cpu())
        discriminant = cache.retrieval.keys.discriminant if settings.gamma else None
        self.register_buffer("class_means", None if discriminant is None else discriminant.means.cpu())
        self.register_buffer("class_offsets", None if discriminant is None else discriminant.offsets.cpu())
        self.register_buffer("metric_mean", None if metric is None else metric.mean.cpu())
        self.register_buffer("metric_transform", None if metric is None else metric.transform.cpu())

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the probabilities, each of shape ``[b, c]``."""
        settings, features = self.settings, given
        if self.tower is not None:
            features = normalize(self.tower((given - self.mean) / self.std))
        points = features
        if self.metric_mean is not None and self.metric_transform is not None:
            points = tip.Metric(self.metric_mean, self.metric_transform)(features)
        affinity = tip.affinity(points, self.keys)
        cache = tip.cache_logits(affinity, self.ids, self.n_classes, settings.beta, values=tip.Values(self.values))
        text = tip.text_logits(features, self.text, settings.logit_scale)
        discriminant = None
        if self.class_means is not None and self.class_offsets is not None:
            discriminant = tip.Discriminant(self.class_means, self.class_offsets)(points)
        logits = tip.Terms(text, tip.log_cache(cache, settings.log_offset), discriminant).logits(settings)
        return logits, (logits / settings.temperature).softmax(1)


class Logits(torch.nn.Module):
    """A torch module that returns only the logits of an :class:`Answer`, of shape ``[b, c]``."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, given: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.answer(given)[0]
        return logits


def export_onnx(
    cache: CacheModel, out: str | os.PathLike[str], backbone: TorchBackbone | None = None
) -> dict[str, Any]:
    """Write an index to an ONNX file, with the labels and the image preprocessing as metadata.

    If you give a ``backbone``, the input is ``pixels``, a float32 array of shape ``[b, 3, h, w]`` with RGB values from
    0 to 255. Resize and crop the images as described by ``preprocess`` in the metadata. The graph itself subtracts the
    mean and divides by the standard deviation. If you give no backbone, the input is ``features``, a float32 array of
    shape ``[b, d]`` with rows of unit norm. The outputs are ``logits`` and ``probabilities``, both of shape ``[b, c]``,
    in the order of ``labels``.

    Returns the metadata, including the size of the file in ``bytes``. Raises UsageError if the package onnx is not
    installed, if the index only uses ``k`` keys per query (a graph cannot retrieve keys), or if the graph would exceed
    2 GiB. Raises InputError if the file cannot be written or if torch cannot convert the encoder to ONNX.
    """
    try:
        import onnx
    except ImportError:
        raise UsageError("the ONNX export needs the package onnx; run pip install 'retrieval-tip[onnx]'") from None
    if cache.settings.k is not None and cache.settings.k < cache.n:
        raise UsageError(
            f"k {cache.settings.k}: an ONNX graph always uses all keys; "
            "give --k all, or build the index again with --index Flat"
        )
    answer = Answer(cache, backbone).eval()
    size = sum(part.numel() * part.element_size() for part in answer.state_dict().values())
    if size > LARGEST:
        raise UsageError(f"{show(Path(out))}: keys, values and encoder take {size / 1e9:.1f} GB; the limit is 2 GB")
    facts = _metadata(cache, backbone)
    with replacing(Path(out)) as temporary:
        _trace(answer, cache, backbone, temporary)
        graph = onnx.load_model(temporary)
        props = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
        onnx.helper.set_model_props(graph, props)
        graph.producer_name, graph.producer_version = "retrieval-tip", version("retrieval-tip")
        onnx.save_model(graph, temporary)
        facts["bytes"] = temporary.stat().st_size
    return facts


def _trace(answer: Answer, cache: CacheModel, backbone: TorchBackbone | None, file: Path) -> None:
    from retrieval_tip.backbones.tower import traceable

    name, shape = ("features", (2, cache.d)) if backbone is None else ("pixels", (2, 3, *backbone.size))
    axes = {of: {0: "batch"} for of in (name, "logits", "probabilities")}
    logger = logging.getLogger("torch.onnx")
    try:
        with torch.no_grad(), traceable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logger.disabled = True
            torch.onnx.export(
                answer, (torch.zeros(shape),), file, input_names=[name], output_names=["logits", "probabilities"],
                dynamic_axes=axes, opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except Exception as error:  # torch raises many types of errors
        raise InputError(f"{cache.backbone or 'features'}: cannot be written as ONNX: {first_line(error)}") from None
    finally:
        logger.disabled = False


def _metadata(cache: CacheModel, backbone: TorchBackbone | None) -> dict[str, Any]:
    facts = {"labels": cache.class_names, "settings": asdict(cache.settings), "opset": OPSET}
    facts |= {"index": cache.place, "version": cache.version}
    if backbone is not None:
        preprocess = dict(backbone.identity.preprocess)
        preprocess = {name: value for name, value in preprocess.items() if name not in ("mean", "std")} | {
            "size": list(view_size(preprocess)),
            "shorter_side": shorter_side(preprocess),
        }
        facts |= {"preprocess": preprocess, "backbone": str(backbone.identity)}
    return facts
