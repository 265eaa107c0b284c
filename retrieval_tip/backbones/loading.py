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
        model: An open_clip architecture (``ViT-B-32``, or ``ViT-B/32`` as OpenAI spells it), ``local-dir:PATH`` (a
            folder that contains ``open_clip_config.json`` and weights), or ``hf-hub:ORG/REPO`` (a repository in the
            same format). ``hf:ORG/REPO`` and ``hf:PATH`` are CLIP or SigLIP models in the format of transformers.
            ``timm:NAME`` is an image encoder that does not encode text. You can also give a short name from
            :data:`catalogue.SHORT`. Defaults to :data:`catalogue.DEFAULT`.
        pretrained: A tag (such as ``openai`` or ``laion2b_s34b_b79k``), a checkpoint file, or ``TAG=FILE`` for a local
            copy of a tag's weights, in which case the preprocessing and the activation of the tag are used. Defaults to
            :func:`catalogue.recommended`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``float32``, or ``float16`` or ``bfloat16`` for autocast. ``auto`` uses float32 on a CPU and float16
            on a GPU.
        runtime: The runtime that encodes images on a CPU. ``auto`` uses OpenVINO if its features agree with those from
            ``torch`` (see :mod:`tower`).
        tuned: A file written by :func:`write_tuned`. Its tensors replace those of the model.

    Raises:
        UsageError: if the architecture, the tag, the device, the precision or the runtime is unknown.
        BackboneError: if the weights or ``tuned`` are missing, damaged or do not fit, or cannot be downloaded.
        BackboneError: if the model requires custom Python code, which is never executed.
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
    """Return the backbone with this ``identity``, whose features have ``dim`` values.

    If the image tower of the backbone is stored on disk, the model is not loaded until it is first used. Loading then
    raises BackboneError if the identity differs. See :func:`load_backbone` for other errors.
    """
    how = Execution(device, precision, runtime).resolved()
    is_lazy = how.runtime == "auto" and how.device == "cpu" and tower.is_kept(identity)
    return _of(identity.model, identity.pretrained, how, (identity, dim) if is_lazy else None)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause garbage collection, which took a third of the loading time."""
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
    """Write the tensors from :meth:`TorchBackbone.tuned` as a safetensors file.

    The same tensors always produce an identical file. Raises BackboneError if the file cannot be written.
    """
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
        state: dict[str, torch.Tensor] = load(file.read_bytes())  # load_file does not accept names that are not UTF-8
    except Exception as error:  # safetensors raises KeyError, its own errors or those of torch
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BackboneError(
            f"{file}: cannot be read as tuned weights: {reason}; restore it or fine-tune again"
        ) from None
    return state
