"""Load timm backbones such as DINOv2, DINOv3 and EfficientNet. They encode images but not text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval_tip.backbones.base import Identity, digest_of
from retrieval_tip.backbones.catalogue import downloaded, opening, similar
from retrieval_tip.backbones.known import Files
from retrieval_tip.backbones.torch_backbone import Opened
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.wording import first_line

if TYPE_CHECKING:
    import torch


def open_model(name: str, pretrained: str | None, device: torch.device) -> Opened:
    """Open an image model without its classifier. Raises BackboneError if weights cannot be read or downloaded."""
    import timm
    import torch
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    architecture, tag, file = _plan(name, pretrained)
    name = f"{architecture}.{tag}" if tag else architecture
    config = timm.get_pretrained_cfg(name)
    repository = "" if file is not None or config is None else config.hf_hub_id
    with opening(f"timm:{name}", repository, f"--model timm:{name}@FILE (a copy of its weights)"):
        files = Files.of(file) if file else None
        if repository:
            files = Files.of(*downloaded(repository))
        tower = timm.create_model(name, pretrained=file is None, num_classes=0)
    if file is not None:
        _fill(tower, file, name)
    settings = resolve_model_data_config(tower)
    plain = {key: value for key, value in settings.items() if key != "input_size"}
    plain["size"] = settings["input_size"][1:]  # as open_clip names it
    weights = None if file is None else file.resolve().as_posix()
    identity = Identity(
        f"timm:{name}", weights, "", f"sha256:{digest_of({'timm': architecture})}", plain
    )
    model: Any = torch.nn.Module()
    model.visual = tower
    model.encode_image = tower.forward
    preprocess = create_transform(**settings, is_training=False)
    return Opened(model.to(device), preprocess, identity, None, files)


def _plan(name: str, pretrained: str | None) -> tuple[str, str | None, Path | None]:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = similar(name, timm.list_models(), "timm:")
        raise UsageError(f"model 'timm:{name}': timm has no such model{near}")
    file = None
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if pretrained in tags:
        tag = pretrained
    elif pretrained is not None:
        of, _, path = pretrained.rpartition("=")
        tag = of or tag
        file = Path(path)
        if not file.is_file():
            raise BackboneError(f"{path}: no such checkpoint for timm:{architecture}")
    if tag and tag not in tags:
        raise UsageError(
            f"model 'timm:{name}': unknown tag {tag!r}; its tags: {', '.join(tags) or 'none'}"
        )
    if not tag and file is None:
        if not tags:
            raise UsageError(
                f"model 'timm:{name}': there are no published weights; give --model timm:{name}@FILE"
            )
        config = timm.get_pretrained_cfg(architecture)
        tag = config.tag if config is not None and config.tag in tags else tags[0]
    return architecture, tag or None, file


def _fill(tower: torch.nn.Module, file: Path, name: str) -> None:
    """Load the tensors of a checkpoint by name, or in model order if the names differ."""
    from timm.models import load_state_dict

    try:
        state: dict[str, torch.Tensor] = load_state_dict(
            str(file), use_ema=False, weights_only=True
        )
    except Exception as error:  # torch, safetensors and pickle raise different errors
        raise BackboneError(
            f"{file}: cannot be read as weights of timm:{name}: {first_line(error)}"
        ) from None
    own = tower.state_dict()
    if not own.keys() <= state.keys():
        state = dict(zip(own, state.values(), strict=False))  # in order; the classifier comes last
    for key, tensor in own.items():
        if key not in state or state[key].shape != tensor.shape:
            found = "is missing" if key not in state else f"has shape {list(state[key].shape)}"
            raise BackboneError(
                f"{file}: not weights of timm:{name}: tensor {key!r} {found}; expected {list(tensor.shape)}"
            )
    tower.load_state_dict({key: state[key] for key in own})
