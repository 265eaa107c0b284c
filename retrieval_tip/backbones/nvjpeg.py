"""JPEGs decoded by a GPU's own decoder, nvJPEG, and made views there: many times as many a second as a CPU decodes.

The view is another one by a hair than that of Pillow's picture, so a backbone that decodes so is another backbone: its
identity says ``decoder``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from retrieval_tip.backbones.base import view_size
from retrieval_tip.errors import UsageError

if TYPE_CHECKING:
    import torch

DECODERS = ("pillow", "nvjpeg")

AT_A_TIME = 32
"""Pictures that are decoded at a time: of a camera's some GiB, beside those that take less."""


def decoder_of(preprocess: Mapping[str, Any]) -> str:
    """The decoder that an identity's ``preprocess`` names; Pillow's where it names none."""
    return str(preprocess.get("decoder", DECODERS[0]))


def check(decoder: str, device: torch.device, preprocess: Mapping[str, Any]) -> None:
    """Raise UsageError for a decoder that there is not, or not here, or that cannot make this model's views."""
    if decoder not in DECODERS:
        raise UsageError(f"decoder {decoder!r}: expected one of {', '.join(DECODERS)}")
    if decoder == "nvjpeg" and device.type != "cuda":
        raise UsageError("decoder nvjpeg: decodes on a GPU, and the backbone is on the CPU; give --decoder pillow")
    height, width = view_size(preprocess)
    cut = preprocess.get("resize_mode") == "shortest" and height == width
    if decoder == "nvjpeg" and not (cut and preprocess.get("interpolation") in ("bicubic", "bilinear")):
        raise UsageError("decoder nvjpeg: makes square views of a shortest side alone; give --decoder pillow")


def views(encoded: Sequence[torch.Tensor], preprocess: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Centre views ``[b, 3, h, w]`` float32, on the device, of JPEGs ``[bytes]`` uint8, as open_clip makes them.

    Raises RuntimeError where one cannot be decoded.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    side, _ = view_size(preprocess)
    mode = InterpolationMode(preprocess["interpolation"])
    made = []
    for start in range(0, len(encoded), AT_A_TIME):
        for picture in decode_jpeg(list(encoded[start : start + AT_A_TIME]), ImageReadMode.RGB, device):
            scaled = vision.resize(picture, [side], mode, antialias=True)
            made.append(vision.center_crop(scaled, [side, side]))
    pixels = torch.stack(made).float().div_(255)
    vision.normalize(pixels, preprocess["mean"], preprocess["std"], inplace=True)
    return pixels
