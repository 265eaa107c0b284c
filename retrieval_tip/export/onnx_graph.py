"""Export an index as an ONNX graph that computes logits from pixels or features.

You can run the graph with any ONNX runtime, without this package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Buffer
from torch.nn.functional import normalize, one_hot

from retrieval_tip import __version__, tip
from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import (
    Backbone,
    Preprocess,
    encoders_of,
    unit_of,
    view_size,
    without_unused,
)
from retrieval_tip.backbones.joined import Joined
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.backbones.tower import (
    FEATURES,
    OPSET,
    PIXELS,
    runtime,
    shorter_side,
    stored_onnx,
    to_onnx,
)
from retrieval_tip.data.cached_encoder import pixels_of
from retrieval_tip.data.source import spread
from retrieval_tip.data.sources import read_item
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.files import replacing
from retrieval_tip.machine import install
from retrieval_tip.model import Index
from retrieval_tip.wording import first_line, show

if TYPE_CHECKING:
    import onnx

Answers: TypeAlias = Tensor | tuple[Tensor, ...]
Decoded = TypeVar("Decoded")

LARGEST = (1 << 31) - (1 << 20)
"""Maximum size in bytes of a graph including its weights, slightly below the protobuf limit of 2 GiB."""
COMPARED = 10
"""Maximum number of photos on which a graph is compared with the package."""


class Pixels(torch.nn.Module):
    """A torch module that turns RGB values from 0 to 255 into the input of an image tower."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.mean, self.std = (
            Buffer(255 * torch.tensor(preprocess[name]).float()[:, None, None])
            for name in ("mean", "std")
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return views."""
        return (pixels - self.mean) / self.std

    def of(self, view: Tensor) -> FloatArray:
        """Return the RGB values of a view, as a batch of one."""
        return (view[None] * self.std + self.mean).numpy()


class Answer(torch.nn.Module):
    """A torch module that computes the answers of an index from features, which are normalised if they are ``raw``.

    With ``alone``, it only returns the logits.
    """

    def __init__(self, index: Index, *, raw: bool = False, alone: bool = False) -> None:
        super().__init__()
        settings = index.settings
        metric = index.metric
        self.settings = settings
        self.n_classes = len(index.class_names)
        self.raw = raw
        self.alone = alone
        self.text = Buffer(index.retrieval.text.float().cpu())
        self.keys = Buffer(
            torch.from_numpy(np.asarray(index.rows.in_memory().vectors, dtype=np.float32))
        )
        self.ids = Buffer(index.class_ids.cpu())
        self.counts = Buffer(torch.bincount(self.ids, minlength=self.n_classes))
        values = (
            one_hot(self.ids, self.n_classes) if index.values is None else index.values
        )  # ONNX cannot sum by class
        self.values = Buffer(values.float().cpu())
        discriminant = index.retrieval.keys.discriminant if settings.gamma else None
        self.class_means = None if discriminant is None else Buffer(discriminant.means.cpu())
        self.class_offsets = None if discriminant is None else Buffer(discriminant.offsets.cpu())
        self.metric_mean = None if metric is None else Buffer(metric.mean.cpu())
        self.metric_transform = None if metric is None else Buffer(metric.transform.cpu())

    def forward(self, given: Tensor) -> Answers:
        """Return the logits and probabilities of shape ``[b, c]``, and ``no_match`` of shape ``[b]`` if it is known."""
        settings = self.settings
        features = normalize(given) if self.raw else given
        points = features
        if self.metric_mean is not None and self.metric_transform is not None:
            points = tip.Metric(self.metric_mean, self.metric_transform)(features)
        affinity = tip.affinity(points, self.keys)
        cache = tip.cache_logits(
            affinity, self.ids, self.n_classes, settings.beta, values=tip.Values(self.values)
        )
        text = tip.text_logits(features, self.text, settings.logit_scale)
        discriminant = None
        if self.class_means is not None and self.class_offsets is not None:
            discriminant = tip.Discriminant(self.class_means, self.class_offsets)(points)
        terms = tip.Terms(text, tip.log_cache(cache, settings.log_offset), discriminant)
        logits = terms.logits(settings)
        if self.alone:
            return logits
        answers = logits, (logits / settings.temperature).softmax(1)
        least = settings.least_cache
        return answers if least is None else (*answers, terms.strongest(self.counts) < least)


class Towers(torch.nn.Module):
    """A torch module that encodes pixels, with one input for each encoder in use, and joins the unit features."""

    def __init__(self, backbone: Backbone, answer: Answer) -> None:
        super().__init__()
        encoders = encoders_of(backbone)
        self.parts = [(encoder.dim, used) for encoder, used in encoders]
        self.towers = torch.nn.ModuleList(_tower(encoder) for encoder, used in encoders if used)
        self.answer = answer

    def forward(self, *pixels: Tensor) -> Answers:
        """Return the answers to pixels."""
        made = iter(
            [normalize(tower(view)) for tower, view in zip(self.towers, pixels, strict=True)]
        )
        empty = pixels[0].flatten(1)[:, :1] * 0
        features = torch.cat(
            [next(made) if used else empty.expand(-1, d) for d, used in self.parts], 1
        )
        answers: Answers = self.answer(features / len(self.parts) ** 0.5)
        return answers


def _tower(encoder: Backbone) -> torch.nn.Module:
    """Return an encoder of pixels. Raises UsageError if it is no module of torch."""
    if not isinstance(encoder, TorchBackbone):
        raise UsageError(
            f"{encoder.identity}: only encoders that are torch modules can be exported; leave it out with --features"
        )
    return torch.nn.Sequential(Pixels(encoder.identity.preprocess), encoder.image_encoder)


def answering(index: Index, backbone: Backbone | None, *, alone: bool = False) -> torch.nn.Module:
    """Return a module that computes the answers of an index from pixels, or from features without a ``backbone``.

    If the index has several encoders, the module has one input for each that has a share. With ``alone``, it only
    returns the logits.
    """
    answer = Answer(index, alone=alone)
    return answer if backbone is None else Towers(without_unused(backbone, index.shares), answer)


def inputs_of(index: Index, backbone: Backbone) -> dict[str, Preprocess]:
    """Return the names of the inputs of a graph of pixels, and the preprocessing of each."""
    encoders = enumerate(encoders_of(without_unused(backbone, index.shares)), 1)
    several = isinstance(backbone, Joined)
    return {
        f"{PIXELS}_{i}" if several else PIXELS: one.identity.preprocess
        for i, (one, used) in encoders
        if used
    }


def export_onnx(
    index: Index, out: str | os.PathLike[str], backbone: Backbone | None = None
) -> dict[str, Any]:
    """Write an index to an ONNX file, with the labels and the image preprocessing as metadata.

    If you give a ``backbone``, the input is ``pixels``, a float32 array of shape ``[b, 3, h, w]`` with RGB values from
    0 to 255. Resize and crop the images as described by ``preprocess`` in the metadata. The graph itself subtracts the
    mean and divides by the standard deviation. With several encoders, there is one input for each that has a share,
    ``pixels_1`` for the first, and ``preprocess`` describes each. If you give no backbone, the input is ``features``, a
    float32 array of shape ``[b, d]`` with rows of unit norm. The outputs are ``logits`` and ``probabilities``, both of
    shape ``[b, c]``, in the order of ``labels``. If the index is fitted, ``no_match`` is a bool array of shape ``[b]``.

    If the ``backbone`` is in int8, the graph contains its stored tower, which is several times smaller and often
    faster. Everything else stays in float32.

    The graph uses all keys, even if the index only uses ``k`` keys per query, because a graph cannot retrieve keys.

    Returns the metadata, the size of the file in ``bytes``, and the ``agreement`` with the package on ten examples (see
    :func:`_agreement`). Raises UsageError if the package onnx is not installed, or if the graph would exceed 2 GiB.
    Raises InputError if the file cannot be written, or if torch cannot convert the encoder to ONNX.
    """
    try:
        import onnx
    except ImportError:
        raise UsageError(f"the ONNX export needs the package onnx; run {install('onnx')}") from None
    asked = index
    index = index.with_settings(index.settings.override(k="all"))
    int8 = None if backbone is None or backbone.precision != "int8" else backbone
    if int8 is not None and not isinstance(int8, TorchBackbone):
        raise UsageError("precision int8: cannot be exported for several encoders; give float32")
    module = (answering(index, backbone) if int8 is None else Answer(index, raw=True)).eval()
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    if size > LARGEST:
        what = (
            "keys and values" if backbone is None else f"keys, values and {backbone.identity.model}"
        )
        raise UsageError(f"{show(Path(out))}: {what} take {size / 1e9:.1f} GB; the limit is 2 GB")
    outputs = [
        "logits",
        "probabilities",
        *([] if index.settings.least_cache is None else ["no_match"]),
    ]
    facts = _metadata(index, backbone)
    with replacing(Path(out)) as temporary:
        try:
            given: dict[str, tuple[int, ...]] = {FEATURES: (index.d,)}
            if backbone is not None:
                given = {
                    name: (3, *view_size(own)) for name, own in inputs_of(index, backbone).items()
                }
            graph = (
                to_onnx(module, given, outputs)
                if int8 is None
                else _behind_tower(module, int8, outputs)
            )
        except Exception as error:  # torch raises many types of errors
            raise InputError(
                f"{index.backbone or 'features'}: cannot be written as ONNX: {first_line(error)}"
            ) from None
        props = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
        onnx.helper.set_model_props(graph, props)
        graph.producer_name = "retrieval-tip"
        graph.producer_version = __version__
        onnx.save_model(graph, temporary)
        facts["bytes"] = temporary.stat().st_size
        facts["agreement"] = _agreement(asked, backbone, outputs, temporary)
    return facts


def _agreement(
    index: Index, backbone: Backbone | None, outputs: Sequence[str], file: Path
) -> dict[str, float] | None:
    """Run the graph on at most ``COMPARED`` photos of the index (or keys, without a ``backbone``) in OpenVINO.

    Returns the number of examples (``n``), the number with the package's label and ``no_match`` (``equal``), and the
    largest difference of a probability (``difference``). Returns ``None`` if the photos cannot be read.
    """
    examples = [
        ({FEATURES: key[None]}, key[None])
        for key in index.rows.some(COMPARED)[0].astype(np.float32)
    ]
    if backbone is not None:
        backbone = without_unused(backbone, index.shares)
        given = inputs_of(index, backbone)
        examples = []
        for view in photos_of(index, lambda data: pixels_of(data, backbone)):
            views = backbone.views(view[None]) if isinstance(backbone, Joined) else [view[None]]
            used = zip(given.items(), (one for one in views if one is not None), strict=True)
            pixels = {name: Pixels(preprocess).of(one[0]) for (name, preprocess), one in used}
            examples.append((pixels, unit_of(backbone, backbone.encode_images(view[None]))))
    if not examples:
        return None
    core = runtime().Core()
    graph = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    equal, difference = 0, 0.0
    for given, features in examples:
        results = graph(given)
        found = {name: results[name][0] for name in outputs}
        own = index.classify(features, neighbours=0, norms="keep").to_arrow().to_pylist()[0]
        label = index.class_names[int(found["logits"].argmax())]
        equal += (label, found.get("no_match")) == (own["label"], own.get("no_match"))
        chances = tip.probabilities(torch.tensor([own["logits"]]), index.settings.temperature)[
            0
        ].numpy()
        difference = max(difference, float(np.abs(found["probabilities"] - chances).max()))
    return {"n": len(examples), "equal": equal, "difference": difference}


def photos_of(index: Index, decode: Callable[[bytes], Decoded]) -> Iterator[Decoded]:
    """Decode at most ``COMPARED`` evenly spaced photos of the index, and skip those that cannot be read."""
    sources = index.rows.described(spread(index.n, COMPARED), ["source"])["source"].to_pylist()
    for path in dict.fromkeys(sources):
        with suppress(InputError):
            yield decode(read_item(path))


def _behind_tower(
    answer: torch.nn.Module, backbone: TorchBackbone, outputs: Sequence[str]
) -> onnx.ModelProto:
    """Return a graph from pixels to answers that contains the stored int8 tower of a backbone."""
    import onnx
    from onnx.compose import add_prefix, merge_models

    pixels = to_onnx(Pixels(backbone.identity.preprocess), {PIXELS: (3, *backbone.size)}, ["view"])
    parts = [
        add_prefix(pixels, "pixels/", rename_inputs=False),
        add_prefix(onnx.load_model_from_string(stored_onnx(backbone.identity)), "tower/"),
        to_onnx(answer, {"raw": (backbone.dim,)}, outputs),
    ]
    graph = parts[0]
    for part in parts[1:]:
        part.ir_version = graph.ir_version
        graph = merge_models(graph, part, [(graph.graph.output[0].name, part.graph.input[0].name)])
    return graph


def _metadata(index: Index, backbone: Backbone | None) -> dict[str, Any]:
    facts = {
        "labels": index.class_names,
        "settings": asdict(index.settings),
        "opset": OPSET,
        "index": index.place,
        "version": index.version,
    }
    if backbone is not None:
        steps = {name: steps_of(own) for name, own in inputs_of(index, backbone).items()}
        facts |= {"preprocess": steps.get(PIXELS, steps), "backbone": str(backbone.identity)}
    return facts


def steps_of(preprocess: Preprocess) -> dict[str, Any]:
    """Return how to turn a photo into an input of the graph, which subtracts the mean itself."""
    kept = {name: value for name, value in preprocess.items() if name not in ("mean", "std")}
    return kept | {"size": list(view_size(preprocess)), "shorter_side": shorter_side(preprocess)}
