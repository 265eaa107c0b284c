"""A package that adds to retrieval-tip: the encoder ``stages:TIMM_NAME``."""

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch.nn.functional import normalize


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
