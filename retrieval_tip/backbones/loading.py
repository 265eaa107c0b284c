"""Load backbones by name."""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from retrieval_tip import hooks
from retrieval_tip.backbones import known, open_clip, timm, transformers
from retrieval_tip.backbones.base import (
    Backbone,
    Identity,
    completed,
    digest_of,
    resolve_execution,
    unit,
)
from retrieval_tip.backbones.catalogue import DEFAULT, expanded, named
from retrieval_tip.backbones.joined import Joined
from retrieval_tip.backbones.known import Known
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.files import cache_folder
from retrieval_tip.machine import pip
from retrieval_tip.settings import Precision
from retrieval_tip.wording import first_line, show

OURS = ("timm", "hf", "hf-hub", "local-dir")
"""The schemes of our own encoders, which other packages cannot replace."""

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
) -> Backbone:
    """Load a backbone by its name, in evaluation mode.

    Args:
        model: An open_clip architecture (``ViT-B-32``, or ``ViT-B/32`` as OpenAI spells it), ``local-dir:PATH`` (a
            folder that contains ``open_clip_config.json`` and weights), or ``hf-hub:ORG/REPO`` (a repository in the
            same format). ``hf:ORG/REPO`` and ``hf:PATH`` are CLIP or SigLIP models in the format of transformers.
            ``timm:NAME`` is an image encoder that does not encode text. You can also give a short name from
            :data:`catalogue.SHORT`. ``NAME:REST`` is an encoder of another package. Defaults to
            :data:`catalogue.DEFAULT`. The weights follow ``@``: a tag (such as ``openai``), a checkpoint file, or
            ``TAG=FILE`` for a local copy of a tag's weights, in which case the preprocessing and the activation of the
            tag are used. They default to :func:`catalogue.recommended`.
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
        BackboneError: if the encoder of another package fails, or returns features that cannot be used.
    """
    names = split_names(model or DEFAULT)
    parts = [_load(*split_weights(name), device, precision, lazy=lazy) for name in names]
    return _together(parts)


def _together(parts: Sequence[Backbone]) -> Backbone:
    return Joined(parts) if len(parts) > 1 else parts[0]


def _load(
    model: str,
    weights: str | None,
    device: str,
    precision: Precision,
    *,
    lazy: bool,
    package: str | None = None,
) -> Backbone:
    """Load one backbone, which comes from a ``package`` if it is known."""
    given = expanded(model, weights)
    how = resolve_execution(device, precision)
    if lazy and (recalled := known.recall(*given)) is not None:
        return _of(*recalled[0], *how, recalled[1])
    names = _from_anywhere(*named(*given))
    scheme = names[0].partition(":")[0]
    if scheme not in (names[0], *OURS) and hooks.find("encoders", scheme) is not None:
        return _of_package(*names, *how)
    if package is not None:
        run = pip(f"install {package}")
        raise UsageError(
            f"model {names[0]!r}: needs the package {package}; if you trust it, run {run}"
        )
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
    identity: Identity, *, device: str = "auto", precision: Precision = "auto", lazy: bool = True
) -> Backbone:
    """Load the backbone with the names of an ``identity``, as by :func:`load_backbone`.

    If its weights were replaced, its identity differs. Raises UsageError if its file or its package is missing.
    """
    parts = []
    for own in identity.parts or (identity,):
        names = (own.model, own.pretrained)
        if lost := own.missing:
            raise UsageError(
                f"{lost}: this file of the encoder is not on this machine; copy it next to the index, or into "
                f"{show(cache_folder() or 'the cache')}, or name the encoder with --model"
            )
        parts.append(_load(*names, device, precision, lazy=lazy, package=own.package))
    return _together(parts)


def given_backbone(model: Model, device: str = "auto", precision: Precision = "auto") -> Backbone:
    """Return the backbone that a user names or passes. Raises UsageError if ``model`` is neither."""
    if model is None or isinstance(model, str):
        return load_backbone(model, device=device, precision=precision, lazy=True)
    if isinstance(model, list):
        if not model:
            raise UsageError("model: a list needs at least one encoder")
        parts = [given_backbone(one, device, precision) for one in model]
        return _together(parts)
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


def _of_package(name: str, weights: str | None, device: str, precision: Precision) -> Backbone:
    """Open ``SCHEME:REST`` with the function of another package (see docs/plugins.md), and try it on two images.

    The fingerprint depends on the name, so that two names never share encodings. Raises BackboneError if it fails.
    """
    scheme, _, rest = name.partition(":")
    stranger = hooks.stranger("encoders", scheme)

    def renamed(identity: Identity) -> Identity:
        config = f"sha256:{digest_of([name, identity.config])}"
        package = stranger.package
        return replace(identity, model=name, pretrained=weights, config=config, package=package)

    try:
        found = hooks.find("encoders", scheme)(rest, weights, device=device, precision=precision)
        if isinstance(found, tuple):
            opened = open_clip.opened_of(*found)
            opened = replace(opened, identity=renamed(opened.identity))
            opened.model.to(device)
            backbone: Backbone = TorchBackbone(opened, device, precision)
        else:
            backbone = completed(found)
            backbone.identity = renamed(backbone.identity)
        _try_out(backbone)
    except Exception as error:  # a package can raise anything
        reason = first_line(error) or type(error).__name__
        raise BackboneError(
            f"{stranger}: {name} cannot be used ({reason}); check the name, or update {stranger.package}"
        ) from error
    return backbone


def _try_out(backbone: Backbone) -> None:
    """Encode an image twice. Raises ValueError or InputError if the features cannot be used."""
    import torch
    from PIL import Image

    view = backbone.preprocess(Image.new("RGB", (64, 64), "navy"))
    features = unit(backbone.encode_images(torch.stack([view, view])))
    if features.shape != (2, backbone.dim):
        raise ValueError(f"two features have shape {features.shape}; expected (2, {backbone.dim})")


def _from_anywhere(model: str, weights: str | None) -> tuple[str, str | None]:
    """Make paths in the names absolute, so that a pickle with these names can be loaded in any folder."""
    scheme, _, folder = model.partition(":")
    if scheme in ("local-dir", "hf") and Path(folder).is_dir():
        model = f"{scheme}:{Path(folder).resolve().as_posix()}"
    tag, sign, file = (weights or "").rpartition("=")
    if "." in file and Path(file).is_file():  # tags have no dots
        weights = f"{tag}{sign}{Path(file).absolute().as_posix()}"
    return model, weights
