"""Load open_clip backbones by architecture and tag, from a folder, or from the hub, or wrap a loaded model."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from retrieval_tip.backbones import catalogue
from retrieval_tip.backbones.base import Identity, digest_of, resolve_execution
from retrieval_tip.backbones.known import Files
from retrieval_tip.backbones.torch_backbone import Opened, TorchBackbone
from retrieval_tip.errors import BackboneError, UsageError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from retrieval_tip.backbones.torch_backbone import Tokenizer
    from retrieval_tip.backbones.tower import Model

log = logging.getLogger(__name__)

Config = dict[str, Any]  # an open_clip configuration, as JSON
DRAWS = {
    "normal_",
    "uniform_",
    "kaiming_uniform_",
}  # names of functions, since transformers replaces the functions


@dataclass(frozen=True)
class _Plan:
    """The arguments for open_clip, and the ``wanted`` file or folder for error messages."""

    model: str
    wanted: str
    pretrained: str | None = None
    checkpoint: str | None = None
    arguments: Config = field(default_factory=dict)
    repository: str | None = None


def _plan(model: str, pretrained: str | None) -> _Plan:
    if model.startswith("local-dir:"):
        return _plan_of_folder(model)
    if model.startswith("hf-hub:"):
        repository = model.removeprefix("hf-hub:")
        return _Plan(model, f"huggingface.co/{repository}", repository=repository)
    if not catalogue.has(model):
        raise catalogue.unknown(model)
    weights = pretrained or catalogue.recommended(model)
    if weights is None:
        raise UsageError(
            f"model {model!r}: there are no published weights; give --model {model}@FILE"
        )
    return _plan_of_weights(model, weights)


def _plan_of_folder(model: str) -> _Plan:
    import open_clip

    folder = Path(model.removeprefix("local-dir:"))
    with catalogue.opening(model, None, "", str(folder / "open_clip_config.json")):
        config: Config = dict(open_clip.get_model_config(model))
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
        raise BackboneError(
            f"{folder}: no weights in this folder; add *.safetensors, *.bin or *.pth"
        )
    arguments = {}
    text: Config = config["text_cfg"] if isinstance(config.get("text_cfg"), dict) else {}
    tower = text.get("hf_model_name")
    if tower and not Path(tower).is_dir() and (folder / "config.json").is_file():
        # the text tower is also in this folder, and not relative to the current folder
        arguments["text_cfg"] = text | {"hf_model_name": str(folder), "hf_model_pretrained": False}
    return _Plan(f"local-dir:{folder.resolve().as_posix()}", str(folder), arguments=arguments)


def _plan_of_weights(model: str, weights: str) -> _Plan:
    """Return the plan for an architecture whose weights are a tag, a checkpoint file, or ``TAG=FILE``."""
    import open_clip

    tag, _, checkpoint = weights.rpartition("=")
    facts = open_clip.get_pretrained_cfg(model, tag or weights)
    if facts and tag:
        if not Path(checkpoint).is_file():
            raise BackboneError(f"{checkpoint}: no such checkpoint for {model}/{tag}")
        return _Plan(model, checkpoint, tag, checkpoint, _tag_arguments(facts))
    if facts:
        repository, _, name = str(facts.get("hf_hub", "")).rpartition("/")
        wanted = f"{name or 'open_clip_model.safetensors'} from huggingface.co/{repository}"
        if not repository:
            wanted = facts["url"]
        arguments = _tag_arguments(facts)
        return _Plan(model, wanted, weights, None, arguments, repository or None)
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
    if Path(weights).is_file():
        log.warning(
            "%s: no tag given, so using open_clip's default preprocessing and activation; "
            "if these weights belong to a tag, give --model %s@TAG=%s (tags: %s)",
            weights,
            model,
            weights,
            tags or "none",
        )
        return _Plan(model, weights, Path(weights).resolve().as_posix(), weights)
    raise UsageError(
        f"model {model}@{weights}: neither a checkpoint file nor a tag of {model}; its tags: {tags}"
    )


def _tag_arguments(facts: Config) -> Config:
    """Return the activation and the preprocessing of a tag. If the activation is wrong, open_clip only warns."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    arguments: Config = {f"image_{key}": facts[key] for key in keys if facts.get(key) is not None}
    if facts.get("quick_gelu"):
        arguments["force_quick_gelu"] = True
    return arguments


def open_model(model: str, pretrained: str | None, device: torch.device) -> Opened:
    """Open a model by its names. Raises BackboneError if its weights cannot be read or downloaded."""
    import open_clip

    plan = _plan(model, pretrained)
    weights = plan.checkpoint or plan.pretrained
    with _opening(plan, plan.repository), _undrawn():
        files = _files(plan)
        made, _, preprocess = open_clip.create_model_and_transforms(
            plan.model, weights, device=device, **plan.arguments
        )
        config = _config_digest(plan)
    identity = Identity(
        plan.model, plan.pretrained, "", config, cast("Any", made.visual.preprocess_cfg)
    )
    return Opened(made, preprocess, identity, partial(_tokenizer, plan), files)


def _opening(plan: _Plan, repository: str | None = None) -> AbstractContextManager[None]:
    hub = plan.model.startswith("hf-hub:")
    option = f"--model {'local-dir:FOLDER' if hub else f'{plan.model}@{plan.pretrained}=FILE'}"
    file = plan.wanted if plan.checkpoint or plan.model.startswith("local-dir:") else None
    return catalogue.opening(plan.model, repository, f"{option} (a copy of {plan.wanted})", file)


def _files(plan: _Plan) -> Files | None:
    """Return the files of a model, its text tower and its tokenizer, or ``None`` if they are unknown."""
    import open_clip

    text = (open_clip.get_model_config(plan.model) or {}).get("text_cfg", {}) | plan.arguments.get(
        "text_cfg", {}
    )
    folder = plan.model.removeprefix("local-dir:") if plan.model.startswith("local-dir:") else None
    place = plan.checkpoint or folder
    own = (
        catalogue.downloaded(plan.repository) if plan.repository else [Path(place)] if place else []
    )
    names = [
        name
        for name in (text.get("hf_model_name"), folder or text.get("hf_tokenizer_name"))
        if name
    ]
    others = itertools.chain(
        *([name] if Path(name).is_dir() else catalogue.downloaded(name) for name in names)
    )
    return Files.of(*own, *others) if own else None


def _tokenizer(plan: _Plan) -> Tokenizer:
    import open_clip

    with _opening(plan):
        text = (open_clip.get_model_config(plan.model) or {}).get("text_cfg", {})
        # This overrides tokenizer_kwargs in a configuration. The tokenizers of open_clip do not accept it.
        refused = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
        tokenizer: Tokenizer = open_clip.get_tokenizer(plan.model, **refused)
    return tokenizer


def wrapped(
    model: Model,
    preprocess: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenizer | None,
) -> TorchBackbone:
    """Wrap an open_clip model that is already loaded, with its validation transform and its tokenizer.

    These are the results of ``open_clip.create_model_and_transforms`` and ``get_tokenizer``. The model stays on its
    device, in evaluation mode and without gradients. An index cannot load it again.
    """
    device = str(next(model.parameters()).device)
    return TorchBackbone(opened_of(model, preprocess, tokenizer), *resolve_execution(device))


def opened_of(
    model: Model,
    preprocess: Callable[[Image.Image], torch.Tensor],
    tokenizer: Tokenizer | None,
) -> Opened:
    """Describe a model that is already loaded. Without a tokenizer, it does not encode text.

    Beside ``encode_image``, it has the settings of the preprocessing in ``visual.preprocess_cfg``.
    """
    config = f"sha256:{hashlib.sha256(repr(model).encode()).hexdigest()}"
    identity = Identity("loaded", None, "", config, cast("Any", model.visual.preprocess_cfg))
    get_tokenizer = None if tokenizer is None else partial(_same, tokenizer)
    return Opened(model, preprocess, identity, get_tokenizer)


def _same(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer


def _undrawn() -> AbstractContextManager[object]:
    """Skip the random initialisation of weights, since open_clip requires a checkpoint to contain all of them."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Undrawn(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: object, args: Any = (), kwargs: Config | None = None
        ) -> object:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            drawn = getattr(func, "__name__", None) in DRAWS and isinstance(
                tensor, torch.nn.Parameter
            )
            return tensor if drawn else func(*args, **(kwargs or {}))

    return Undrawn()


def _config_digest(plan: _Plan) -> str:
    """Return a digest of the architecture, which does not depend on file names or hub names."""
    import open_clip

    def plain(part: Config) -> Config:
        names = (
            "hf_model_name",
            "hf_tokenizer_name",
            "hf_model_pretrained",
            "timm_model_pretrained",
        )
        kept = {key: value for key, value in part.items() if key not in names}
        return {
            key: plain(value) if isinstance(value, dict) else value for key, value in kept.items()
        }

    config = open_clip.get_model_config(plan.model)
    quick_gelu = bool(plan.arguments.get("force_quick_gelu") or config.get("quick_gelu"))
    what = plain(config) | {"quick_gelu": quick_gelu}
    return f"sha256:{digest_of(what, sort_keys=True)}"
