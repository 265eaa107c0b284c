"""Load backbones by name."""

from __future__ import annotations

import gc
import re
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from retrieval_tip.backbones import known, open_clip, timm, transformers
from retrieval_tip.backbones.base import Backbone, Identity, resolve_execution
from retrieval_tip.backbones.catalogue import DEFAULT, expanded, named
from retrieval_tip.backbones.joined import Joined
from retrieval_tip.backbones.known import Known
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.errors import UsageError
from retrieval_tip.settings import Precision

Model: TypeAlias = "str | Backbone | tuple[Any, Any, Any] | list[Model] | None"
"""The name of an encoder, a backbone, or the model, preprocessing and tokenizer that open_clip returns.

A list, or names joined by ``+``, stands for several encoders (see :mod:`joined`).
"""


def load_backbone(
    model: str | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    lazy: bool = False,
) -> TorchBackbone | Joined:
    """Load a backbone by its name, in evaluation mode.

    Args:
        model: An open_clip architecture (``ViT-B-32``, or ``ViT-B/32`` as OpenAI spells it), ``local-dir:PATH`` (a
            folder that contains ``open_clip_config.json`` and weights), or ``hf-hub:ORG/REPO`` (a repository in the
            same format). ``hf:ORG/REPO`` and ``hf:PATH`` are CLIP or SigLIP models in the format of transformers.
            ``timm:NAME`` is an image encoder that does not encode text. You can also give a short name from
            :data:`catalogue.SHORT`. Defaults to :data:`catalogue.DEFAULT`. The weights follow ``@``: a tag (such as
            ``openai``), a checkpoint file, or ``TAG=FILE`` for a local copy of a tag's weights, in which case the
            preprocessing and the activation of the tag are used. They default to :func:`catalogue.recommended`.
            Join several encoders with ``+``, as in ``ViT-B-32@openai+timm:resnet18``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``float32``, or ``float16`` or ``bfloat16`` for autocast. ``auto`` uses float32 on a CPU and float16
            on a GPU. ``int8`` uses the tower that :meth:`Reader.store_int8` has stored on this machine.
        lazy: Whether to load the model when it is first used, if it was already loaded with ``lazy`` and its files have
            not changed since (see :mod:`known`).

    Raises:
        UsageError: if the architecture, the tag, the device or the precision is unknown.
        BackboneError: if the weights are missing, damaged or do not fit, or cannot be downloaded.
        BackboneError: if the model requires custom Python code, which is never executed.
        BackboneError: if the precision is int8, but no int8 tower of this encoder is stored.
    """
    names = split_names(model or DEFAULT)
    parts = [_load(*split_weights(name), device, precision, lazy=lazy) for name in names]
    return Joined(parts) if len(parts) > 1 else parts[0]


def _load(
    model: str, weights: str | None, device: str, precision: Precision, *, lazy: bool
) -> TorchBackbone:
    given = expanded(model, weights)
    how = resolve_execution(device, precision)
    if lazy and (recalled := known.recall(*given)) is not None:
        return _of(*recalled[0], *how, recalled[1])
    names = _from_anywhere(*named(*given))
    backbone = _of(*names, *how)
    if lazy:
        for own in {
            given,
            (backbone.identity.model, backbone.identity.pretrained),
        }:  # an index has these names
            known.remember(*own, names, backbone.known)
    return backbone


def split_names(model: str) -> list[str]:
    """Split names that are joined by ``+``. An existing folder or file of weights may have a ``+`` in its name."""
    names = list[str]()
    rest = model.split("+")
    while rest:
        joined = ("+".join(rest[:end]) for end in range(len(rest), 0, -1))
        names.append(next(filter(_is_one, joined), rest[0]))
        del rest[: 1 + names[-1].count("+")]
    return names


def _is_one(model: str) -> bool:
    """Return whether an existing folder or file shows that the name is that of one encoder."""
    name, _, weights = model.partition("@")
    tag, _, file = weights.rpartition("=")
    plain = "+" not in tag and ("+" not in name or _is_there(name))
    return _is_there(model) or (plain and Path(file).is_file())


def split_weights(model: str) -> tuple[str, str | None]:
    """Split ``MODEL@WEIGHTS``. A folder may have an ``@`` in its name."""
    if _is_there(model):
        return model, None
    name, _, weights = model.partition("@")
    return name, weights or None


def _is_there(model: str) -> bool:
    return Path(re.sub(r"^[\w-]+:", "", model)).exists()


def load_again(
    identity: Identity, *, device: str = "auto", precision: Precision = "auto"
) -> TorchBackbone | Joined:
    """Load the backbone with the names of an ``identity``, as by :func:`load_backbone` with ``lazy``.

    If its weights were replaced, its identity differs.
    """
    own = identity.parts or (identity,)
    parts = [_load(one.model, one.pretrained, device, precision, lazy=True) for one in own]
    return Joined(parts) if identity.parts else parts[0]


def given_backbone(model: Model, device: str = "auto", precision: Precision = "auto") -> Backbone:
    """Return the backbone that a user names or passes. Raises UsageError if ``model`` is neither."""
    if model is None or isinstance(model, str):
        return load_backbone(model, device=device, precision=precision, lazy=True)
    if isinstance(model, list):
        if not model:
            raise UsageError("model: a list needs at least one encoder")
        parts = [given_backbone(one, device, precision) for one in model]
        return Joined(parts) if len(parts) > 1 else parts[0]
    if isinstance(model, tuple):
        if len(model) != 3:
            raise UsageError(
                f"model: got {len(model)} objects; give (model, preprocess, tokenizer), as open_clip does"
            )
        return open_clip.wrapped(*model)
    if not hasattr(model, "encode_images"):
        kind = type(model).__name__
        raise UsageError(
            f"model: got an object of type {kind}; give a name, a backbone, or a tuple from open_clip"
        )
    return model


def _of(
    name: str, tag: str | None, device: str, precision: Precision, found: Known | None = None
) -> TorchBackbone:
    if name.startswith("hf:") and tag is not None:
        raise UsageError(f"model {name}@{tag}: has its own weights; omit @{tag}")
    with ExitStack() as restored:
        if gc.isenabled():
            gc.disable()  # garbage collection took a third of the loading time
            restored.callback(gc.enable)
        open_model = partial(open_clip.open_model, name, tag)
        if name.startswith("timm:"):
            open_model = partial(timm.open_model, name.removeprefix("timm:"), tag)
        elif name.startswith("hf:"):
            open_model = partial(transformers.open_model, name.removeprefix("hf:"))
        return TorchBackbone(open_model, device, precision, found)


def _from_anywhere(model: str, weights: str | None) -> tuple[str, str | None]:
    """Make paths in the names absolute, so that a pickle with these names can be loaded in any folder."""
    scheme, _, folder = model.partition(":")
    if scheme in ("local-dir", "hf") and Path(folder).is_dir():
        model = f"{scheme}:{Path(folder).resolve()}"
    tag, sign, file = (weights or "").rpartition("=")
    if "." in file and Path(file).is_file():  # tags have no dots
        weights = f"{tag}{sign}{Path(file).absolute()}"
    return model, weights
