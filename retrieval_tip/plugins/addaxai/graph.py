"""Turn an index and its encoders into a TorchScript graph that needs neither this package nor its encoders."""

from __future__ import annotations

import copy
import json
import math
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from retrieval_tip.backbones.base import Backbone, view_size
from retrieval_tip.backbones.tower import traceable
from retrieval_tip.errors import InputError, UsageError
from retrieval_tip.export.onnx_graph import answering, inputs_of, steps_of
from retrieval_tip.model import Index
from retrieval_tip.wording import first_line

FACTS = "facts.json"  # the name of the file inside the graph that describes it


class Crops(torch.nn.Module):
    """A torch module that answers the bytes of crops ``[b, p]``, which are the views for all encoders in use.

    It returns the probabilities ``[b, c]``, which are at most 1, and ``no_match`` of shape ``[b]``.
    """

    def __init__(self, answer: torch.nn.Module, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.answer = answer
        self.shapes = [(3, *size) for size in sizes]

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answers."""
        parts = crops.float().split([math.prod(shape) for shape in self.shapes], dim=1)
        views = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
        _, probabilities, *no_match = self.answer(*views)
        if not no_match:  # the index is not fitted
            no_match = [torch.zeros_like(probabilities[:, 0], dtype=torch.bool)]
        return probabilities.clamp(max=1), no_match[0]


def traced(index: Index, backbone: Backbone, labels: list[str]) -> bytes:
    """Return the graph of an index that uses all keys. It contains the ``labels`` and how to make views of a crop.

    Raises UsageError if an encoder prepares photos in its own way, and InputError if torch cannot trace one.
    """
    inputs = inputs_of(index, backbone).values()
    views = [steps_of(preprocess) for preprocess in inputs]
    if any(view["shorter_side"] is None for view in views):
        raise UsageError(
            f"{backbone.identity}: cannot be exported, because it does not only resize and crop photos"
        )
    sizes = [view_size(preprocess) for preprocess in inputs]
    facts: dict[str, Any] = {"labels": labels, "views": [_needed(view) for view in views]}
    try:
        with traceable():
            module = copy.deepcopy(Crops(answering(index, backbone), sizes)).eval()
            example = torch.zeros(2, sum(3 * math.prod(size) for size in sizes), dtype=torch.uint8)
            _empty_unused(module, example)
            with torch.no_grad():
                graph = torch.jit.trace(module, example, check_trace=False)
            file = BytesIO()
            torch.jit.save(graph, file, _extra_files={FACTS: json.dumps(facts)})
    except RuntimeError as error:
        raise InputError(f"{backbone.identity}: cannot be traced: {first_line(error)}") from None
    return file.getvalue()


def _needed(view: dict[str, Any]) -> dict[str, Any]:
    wanted = ("size", "shorter_side", "interpolation")
    return {name: view[name] for name in wanted} | {
        "resize_mode": view.get("resize_mode", "shortest")
    }


def _empty_unused(module: torch.nn.Module, example: Tensor) -> None:
    """Empty the parameters that answers do not depend on, such as text towers, because a trace keeps them all."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    probabilities, _ = module(example)
    probabilities.square().sum().backward()
    for parameter in module.parameters():
        if parameter.grad is None:
            parameter.data = parameter.new_empty(0)
        parameter.grad = None
        parameter.requires_grad_(False)
