"""A package that adds to retrieval-tip: the format ``lines``, and the encoder ``stages:TIMM_NAME``."""

from dataclasses import dataclass
from typing import ClassVar

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import normalize

from retrieval_tip.errors import UsageError
from retrieval_tip.files import output
from retrieval_tip.hooks import option
from retrieval_tip.writers import Outcome, Wants


@dataclass(frozen=True)
class Lines:
    """One line per photo, with its label.

    Options:
        between: Text between a photo and its label.
    """

    wants: ClassVar[Wants] = Wants()
    between: str = option(default=" ", metavar="TEXT")

    def check(self, out):
        if "\n" in self.between:
            raise UsageError("--between: contains a new line; give a text of one line")

    def write(self, answered, out):
        with output(out) as file:
            for row in answered.rows:
                file.write(f"{row['input']}{self.between}{row['label'] or '-'}\n".encode())
        return Outcome()


class Stages(torch.nn.Module):
    """The last three stages of a timm model, pooled, side by side, each of unit norm."""

    def __init__(self, name, file):
        super().__init__()
        local = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        last = {"features_only": True, "out_indices": (-3, -2, -1)}
        self.visual = timm.create_model(name, pretrained=True, **last, **local)
        settings = resolve_model_data_config(self.visual)
        self.visual.preprocess_cfg = settings | {"size": settings["input_size"][1:]}
        self.transform = create_transform(**settings)

    def encode_image(self, pixels):
        return torch.cat([normalize(stage.mean((2, 3))) for stage in self.visual(pixels)], 1)


def stages(rest, weights, *, device, precision):
    model = Stages(rest, weights)
    return model, model.transform, None
