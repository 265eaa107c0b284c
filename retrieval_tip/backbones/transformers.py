"""Load CLIP and SigLIP models with transformers. Many of these models are fine-tuned for a domain."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrieval_tip.backbones import catalogue
from retrieval_tip.backbones.base import Identity, Preprocess, digest_of
from retrieval_tip.backbones.known import Files
from retrieval_tip.backbones.torch_backbone import Opened
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.machine import install

if TYPE_CHECKING:
    import torch
    from open_clip.transform import PreprocessCfg

    from retrieval_tip.backbones.torch_backbone import Tokenizer
    from retrieval_tip.backbones.tower import Model

KINDS = ("clip", "siglip")
"""Accepted model types. SigLIP 2 models with a fixed resolution have the type ``siglip``."""
ARCHITECTURE = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")
"""Tower settings that cannot be derived from the weights."""


def open_model(place: str, device: torch.device) -> Opened:
    """Open a CLIP or SigLIP model in the format of transformers.

    ``get_image_features`` and ``get_text_features`` return the same features. The views are the same as those of the
    image processor, except that they are shifted by half a pixel if an odd number of pixels is cropped. Sentences are
    padded to the length of the text tower. Raises BackboneError if the model is not supported or cannot be read.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
        from transformers.utils import logging as bars
    except ImportError:
        raise UsageError(f"hf:{place}: it requires transformers; run {install('hf')}") from None
    from open_clip.transform import image_transform_v2

    here = Path(place).is_dir() or catalogue.has_weights(place)
    paths = [Path(place)] if Path(place).is_dir() else catalogue.downloaded(place)
    files = Files.of(*paths)

    def read(kind: Any, **options: Any) -> Any:
        asked = place if kind is AutoConfig and not here else None
        way_out = f"--model hf:FOLDER (a copy of huggingface.co/{place})"
        with catalogue.opening(f"hf:{place}", asked, way_out), ExitStack() as restored:
            if here and bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                restored.callback(bars.enable_progress_bar)
            return kind.from_pretrained(place, trust_remote_code=False, **options)

    config = read(AutoConfig)
    if config.model_type not in KINDS:
        known = " or ".join(KINDS)
        raise BackboneError(
            f"hf:{place}: unsupported model type {config.model_type!r}; expected {known}, or timm:NAME"
        )
    settings = _settings(read(AutoImageProcessor).to_dict(), place)
    model, found = read(AutoModel, output_loading_info=True)
    if found["missing_keys"]:  # transformers would initialise them at random
        raise BackboneError(f"hf:{place}: {min(found['missing_keys'])} is missing in its weights")

    def tokenizer() -> Tokenizer:
        padded = partial(
            read(AutoTokenizer),
            padding="max_length",
            max_length=config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        return lambda sentences: padded(sentences)[
            "input_ids"
        ]  # no mask: CLIP is causal, SigLIP learned with padding

    identity = Identity(f"hf:{place}", None, "", _digest(config), asdict(settings))
    dual = _dual(model.float()).to(device)
    return Opened(dual, image_transform_v2(settings, False), identity, tokenizer, files)


def _dual(model: Any) -> Model:
    import torch

    class Projected(torch.nn.Module):
        def __init__(self, encoder: torch.nn.Module, projection: torch.nn.Module | None) -> None:
            super().__init__()
            self.encoder = encoder
            self.projection = projection

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            pooled: torch.Tensor = self.encoder(given).pooler_output
            return pooled if self.projection is None else self.projection(pooled)

    dual: Any = torch.nn.Module()
    dual.visual = Projected(model.vision_model, getattr(model, "visual_projection", None))
    dual.text = Projected(model.text_model, getattr(model, "text_projection", None))
    dual.logit_scale = model.logit_scale
    dual.encode_image, dual.encode_text = dual.visual.forward, dual.text.forward
    return cast("Model", dual)


def _settings(processor: Preprocess, place: str) -> PreprocessCfg:
    from open_clip.transform import PreprocessCfg
    from PIL.Image import Resampling

    cropped = processor.get("do_center_crop")
    size = processor["size"]
    side = processor["crop_size"] if cropped else size
    interpolation = Resampling(processor["resample"]).name.lower()
    if (cropped and size.get("shortest_edge") != min(side.values())) or interpolation not in (
        "bicubic",
        "bilinear",
    ):
        raise BackboneError(
            f"hf:{place}: unsupported image preprocessing ({interpolation}, {size} to {side})"
        )
    return PreprocessCfg(
        size=(side["height"], side["width"]),
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        interpolation=interpolation,
        resize_mode="shortest" if cropped else "squash",
    )


def _digest(config: Any) -> str:
    """Return a digest of a few settings of the architecture, since new versions of transformers add more settings."""
    towers = [
        {name: getattr(part, name, None) for name in ARCHITECTURE}
        for part in (config.vision_config, config.text_config)
    ]
    return f"sha256:{digest_of({'hf': config.model_type, 'towers': towers})}"
