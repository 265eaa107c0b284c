"""Load backbones by name, and read and write tuned weights."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval_tip.backbones import open_clip, timm, tower, transformers
from retrieval_tip.backbones.base import Execution, Identity
from retrieval_tip.backbones.catalogue import named
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.errors import BackboneError, UsageError, first_line
from retrieval_tip.settings import Precision, Runtime

if TYPE_CHECKING:
    import torch


def load_backbone(
    model: str | None = None,
    pretrained: str | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    runtime: Runtime = "auto",
    tuned: str | os.PathLike[str] | None = None,
) -> TorchBackbone:
    """Load a backbone by its name, in evaluation mode.

    Args:
        model: an open_clip architecture (``ViT-B-32``, or OpenAI's spelling ``ViT-B/32``); ``local-dir:PATH`` (a folder
            with ``open_clip_config.json`` and weights) or ``hf-hub:ORG/REPO`` in open_clip's format; ``hf:ORG/REPO`` or
            ``hf:PATH``, a CLIP or SigLIP in transformers' format; ``timm:NAME``, an image encoder without text
            (``timm:vit_small_patch14_dinov2.lvd142m``); or a short name in :data:`catalogue.SHORT`. ``None`` uses
            :data:`catalogue.DEFAULT`.
        pretrained: a tag (``openai``, ``laion2b_s34b_b79k``), a checkpoint file, or ``TAG=FILE``: a local copy of that
            tag's weights, used with the tag's preprocessing and activation. ``None`` uses
            :func:`catalogue.recommended`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``float32``; ``float16`` or ``bfloat16`` autocast; ``auto`` is float32 on a CPU, float16 on a GPU.
        runtime: encodes images on a CPU: ``torch``, or ``auto`` for OpenVINO if its features agree (:mod:`tower`).
        tuned: a file by :func:`write_tuned`, whose tensors replace the model's.

    Raises:
        UsageError: an unknown architecture, tag, device, precision or runtime.
        BackboneError: weights that are missing, damaged, or cannot be downloaded (the message names the file); a model
            that requires Python code of its own, which is never run; ``tuned`` is missing, damaged, or does not fit the
            model.
    """
    how = Execution(device, precision, runtime).resolved()
    state = None if tuned is None else _read_tuned(Path(tuned))
    backbone = _of(model, pretrained, how)
    if state is not None:
        try:
            backbone.adopt(state)
        except BackboneError as error:
            raise BackboneError(f"{tuned}: {error}") from None
    return backbone


def load_when_needed(
    identity: Identity, dim: int, *, device: str = "auto", precision: Precision = "auto", runtime: Runtime = "auto"
) -> TorchBackbone:
    """Return the backbone ``identity`` with features of ``dim`` values; load it lazily if its image tower is stored.

    Raises as :func:`load_backbone`. A lazily loaded backbone raises BackboneError later if it is not ``identity``.
    """
    how = Execution(device, precision, runtime).resolved()
    is_lazy = how.runtime == "auto" and how.device == "cpu" and tower.is_kept(identity)
    return _of(identity.model, identity.pretrained, how, (identity, dim) if is_lazy else None)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause garbage collection: it took a third of the time, walking the million objects that open_clip imports."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_uncollected()
def _of(
    model: str | None, pretrained: str | None, how: Execution, awaited: tuple[Identity, int] | None = None
) -> TorchBackbone:
    name, tag = (model or "", pretrained) if awaited is not None else named(model, pretrained)
    if name.startswith("timm:"):
        return TorchBackbone(partial(timm.open_model, name.removeprefix("timm:"), tag), how, awaited)
    if name.startswith("hf:"):
        if tag is not None:
            raise UsageError(f"pretrained {tag!r}: {name} has its own weights; omit --pretrained")
        return TorchBackbone(partial(transformers.open_model, name.removeprefix("hf:")), how, awaited)
    return open_clip.OpenClipBackbone(partial(open_clip.open_model, name, tag), how, awaited)


def write_tuned(path: str | os.PathLike[str], state: Mapping[str, torch.Tensor]) -> None:
    """Write :meth:`TorchBackbone.tuned` tensors as safetensors, always with the same bytes. Raises BackboneError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path}: cannot be written: {first_line(error)}") from None


def _read_tuned(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        if not file.is_file():  # reading a pipe would block
            raise FileNotFoundError("no such file")
        state: dict[str, torch.Tensor] = load(file.read_bytes())  # load_file refuses names that are not UTF-8
    except Exception as error:  # safetensors raises its own error, KeyError or torch's
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BackboneError(
            f"{file}: cannot be read as tuned weights: {reason}; restore it or fine-tune again"
        ) from None
    return state
