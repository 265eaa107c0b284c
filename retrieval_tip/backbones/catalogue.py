"""Look up backbones by name, list their tags and sizes, and check whether their weights are cached."""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from retrieval_tip import hooks
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.machine import install
from retrieval_tip.wording import amount, first_line

log = logging.getLogger(__name__)

DEFAULT = (
    "ViT-B-32"  # its recommended weights (0.6 GB) reach a zero-shot accuracy of 69 % on ImageNet
)

_RECOMMENDED = {
    "clip": ("ViT-B-32", "MIT"),
    "clip-large": ("ViT-L-14", "MIT"),
    "siglip2": ("ViT-B-16-SigLIP2", "Apache-2.0"),
    "mobileclip": ("MobileCLIP2-S0", "research only (apple-amlr)"),
    "dinov2": ("timm:vit_small_patch14_dinov2.lvd142m", None),
    "dinov3": ("timm:vit_small_patch16_dinov3.lvd1689m", None),
    "efficientnet": ("timm:tf_efficientnet_lite0.in1k", None),
    "bioclip2": ("hf-hub:imageomics/bioclip-2", "MIT"),
    "remoteclip": ("ViT-B-32@RemoteCLIP-ViT-B-32.pt", "Apache-2.0"),
}
"""Recommended backbones by their short names, with the licence of the weights if timm does not state it."""
SHORT = {short: name for short, (name, _) in _RECOMMENDED.items()}
"""Short names of recommended backbones. A weight file after ``@`` must be downloaded to the current folder."""

_HOSTED = {"hf-hub:imageomics/bioclip-2": "ViT-L-14"}
"""Architectures of recommended repositories."""

_FIRST = (
    "datacomp_xl",
    "datacomp_s34b",
    "laion2b_s34b",
    "laion2b_s32b",
    "laion2b",
    "webli",
    "openai",
)
"""Prefixes of tags in order of preference. Long training and openly licensed training data come first."""

NEAR, ALIKE = (
    8,
    0.6,
)  # largest number of similar names in a message, and their smallest similarity (see difflib)

ANSWER = 2.5  # number of seconds to wait for a response from the hub
_DEMO = "build/demo/efficientnet-lite0.pth"
DEMO = (Path(_DEMO), Path(_DEMO).relative_to("build/demo"), Path(__file__).parents[2] / _DEMO)
"""Possible paths of the encoder from ``benchmarks/demo.py``, below the current folder or the repository."""

LARGEST_LIST = (
    40  # longest list that includes sizes, because computing each size takes a quarter of a second
)

_QUIET = threading.RLock()


def expanded(model: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """Replace a short name by the names of a model and its weights."""
    short, _, file = SHORT.get(model.lower(), "").partition("@")
    return short or model, pretrained or file or None


def named(model: str, pretrained: str | None = None) -> tuple[str, str | None]:
    """Return the canonical names of a model and its weights, given any of their spellings.

    ``ViT-B/32`` and ``vit-b-32`` become ``ViT-B-32``, ``clip`` becomes ``SHORT["clip"]``, and ``timm/NAME`` becomes
    ``timm:NAME``. Unknown names do not change.
    """
    name, tag = expanded(model, pretrained)
    name = re.sub("^timm/", "timm:", name)
    if ":" not in name and not has(name):
        name = {_plain(known): known for known in _architectures()}.get(_plain(name), name)
    return name, tag


def _plain(name: str) -> str:
    return re.sub(r"[-_/@ ]+", "-", name.lower().removesuffix("px"))


@cache
def _architectures() -> tuple[str, ...]:
    import open_clip

    return tuple(open_clip.list_models())


def has(model: str) -> bool:
    """Return whether open_clip has an architecture with this name."""
    return model in _architectures()


def unknown(model: str) -> UsageError:
    """Return the error for a name that open_clip does not know."""
    import timm

    near = similar(model, _architectures())
    if timm.is_model(model.partition(".")[0]):
        near = f"; timm has this model: give timm:{model}"
    elif not near and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        near = f"; for a CLIP or SigLIP model in transformers, give hf:{model}"
    ours = "an open_clip architecture, timm:NAME, local-dir:PATH, hf-hub:ORG/REPO or hf:ORG/REPO"
    expected = ", ".join(
        [f"; expected {ours}", *(f"{name}:..." for name in hooks.names("encoders"))]
    )
    return UsageError(
        f"model {model!r}: unknown{near or expected}; search with retrieval-tip models WORD"
    )


def similar(model: str, names: Sequence[str], prefix: str = "") -> str:
    """Return a phrase that lists the names that contain every part of ``model`` or are spelled like it."""
    plain = {_plain(name): name for name in names}
    asked = _plain(model)
    whole = sorted(
        (name for name in plain if all(part in name for part in asked.split("-"))), key=len
    )
    near = [*dict.fromkeys([*whole, *difflib.get_close_matches(asked, list(plain), NEAR, ALIKE)])][
        :NEAR
    ]
    return f"; similar names: {', '.join(prefix + plain[name] for name in near)}" if near else ""


def architecture(model: str) -> str:
    """Return the architecture of a recommended repository or file, or the name itself."""
    return _HOSTED.get(model, model.partition("@")[0])


def recommended(model: str) -> str | None:
    """Return the default tag of an open_clip architecture, or ``None`` if it has no tags."""
    return next(iter(_tags(model)), None)


@dataclass(frozen=True)
class Named:
    """A row in the list of backbones."""

    model: str
    weights: list[str]  # tags, starting with the recommended one
    bytes: int | None  # size of the weights in float32
    licence: str | None  # of the recommended weights, if it is known
    words: bool  # whether the backbone has a text tower
    cached: bool  # whether the recommended weights are on this machine


def search(word: str = "") -> list[Named]:
    """List the backbones whose name or tags contain a word. Without a word, list the recommended backbones."""
    import timm

    if not word:
        return [_described(name) for name in dict.fromkeys(SHORT.values())]
    asked = _plain(word.removeprefix("timm:"))
    short = [name for key, name in SHORT.items() if key == asked]
    known = () if word.startswith("timm:") else _architectures()
    ours = [
        name
        for name in known
        if (tags := _tags(name)) and any(asked in _plain(tag) for tag in (name, *tags))
    ]
    theirs = [f"timm:{name}" for name in timm.list_pretrained() if asked in _plain(name)]
    if not (found := list(dict.fromkeys([*short, *ours, *theirs]))):
        raise UsageError(
            f"models {word!r}: no encoder has this in its name" + similar(word, _architectures())
        )
    return [_described(name, sized=len(found) <= LARGEST_LIST) for name in found]


def _tags(model: str) -> list[str]:
    import open_clip

    tags: list[str] = open_clip.list_pretrained_tags_by_model(model)
    return sorted(tags, key=lambda tag: [not tag.startswith(first) for first in _FIRST])


def _described(name: str, *, sized: bool = True) -> Named:
    words = not name.startswith("timm:")
    file = name.partition("@")[2]
    tags = [file] if file else _tags(name) if words else [name.partition(".")[2]]
    size = _bytes(architecture(name)) if sized else None
    here = Path(file).is_file() if file else has_weights(repository_of(name, None))
    return Named(name, tags, size, licence_of(name), words, here)


def licence_of(model: str) -> str | None:
    """Return the licence of the weights of a model, if it is known."""
    if model.startswith("timm:"):
        licence: str | None = getattr(_timm_config(model), "license", None)
        return licence
    return dict(_RECOMMENDED.values()).get(model)


def _bytes(name: str) -> int | None:
    """Return the bytes of a model in float32, or ``None`` if it cannot be created without a download."""
    import open_clip
    import timm
    import torch
    from huggingface_hub import try_to_load_from_cache

    described = {} if name.startswith("timm:") else open_clip.get_model_config(name)["text_cfg"]
    elsewhere = described.get("hf_model_name")
    if elsewhere and not isinstance(try_to_load_from_cache(elsewhere, "config.json"), str):
        return None
    try:
        with quiet(), torch.device("meta"):
            if name.startswith("timm:"):
                model = timm.create_model(name.removeprefix("timm:"), num_classes=0)
            else:
                model = open_clip.create_model(name, device="meta", load_weights=False)
    except Exception as error:  # the model is then listed without its size
        log.debug("%s: size unknown: %s", name, first_line(error))
        return None
    return int(4 * sum(parameter.numel() for parameter in model.parameters()))


WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Names of weight files, in the order of open_clip and timm."""


def has_weights(repository: str) -> bool:
    """Return whether the weights of a repository are on this machine."""
    files = _hub_folder(repository).glob("snapshots/*/*")
    return any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in files)


def _hub_folder(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")


def _reason_of(error: Exception) -> str:
    """Return the reason for a hub error on one line, without the hub's advice."""
    text = first_line(error).rpartition("Last error: ")[2]
    silent = (
        "locate the file on the Hub",
        "connect to 'https://huggingface.co'",
        "reach https://huggingface.co",
    )
    return "huggingface.co did not answer" if any(phrase in text for phrase in silent) else text


@contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip, transformers and the hub, and make transformers reject custom code instead of prompting."""
    ours = logging.getLogger("retrieval_tip")
    with _QUIET, warnings.catch_warnings(), ExitStack() as restored:
        warnings.simplefilter("ignore")
        levels = dict.fromkeys(
            map(logging.getLogger, (None, "huggingface_hub", "transformers")), logging.CRITICAL
        )
        for logger, level in {ours: ours.getEffectiveLevel(), **levels}.items():
            restored.callback(logger.setLevel, logger.level)
            logger.setLevel(level)
        with suppress(ImportError):
            from transformers import dynamic_module_utils as asking

            restored.callback(setattr, asking, "TIME_OUT_REMOTE_CODE", asking.TIME_OUT_REMOTE_CODE)
            asking.TIME_OUT_REMOTE_CODE = (
                0  # seconds to wait for an answer; there is no prompt if it is 0
            )
        yield


def ask_hub(repository: str) -> None:
    """Log the size of the weights in a repository before they are downloaded. Do nothing if they are cached.

    Only one request is sent, since huggingface_hub would retry for 46 s. Raises ConnectionError if the hub does not
    respond within ``ANSWER`` seconds (or ``HF_HUB_ETAG_TIMEOUT``), or if ``HF_HUB_OFFLINE`` is set.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if has_weights(repository):
        return
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ConnectionError("HF_HUB_OFFLINE is set")
    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER)
    try:
        found = HfApi().model_info(repository, files_metadata=True, timeout=limit).siblings or []
    except Exception as error:  # the errors of the hub differ between versions
        log.debug("%s: %s", repository, first_line(error))
        if isinstance(error, HfHubHTTPError | ValueError):  # the download will report this error
            return
        raise ConnectionError(f"{urlsplit(constants.ENDPOINT).netloc} did not answer") from error
    sizes = {file.rfilename: file.size for file in found}
    if size := next((sizes[file] for file in WEIGHTS if sizes.get(file)), None):
        log.info(
            "huggingface.co/%s has %s of weights, which are downloaded only once",
            repository,
            amount(size),
        )


def downloaded(repository: str) -> list[Path]:
    """Return the paths that hold the revision of a repository on this machine, which may be missing."""
    folder = _hub_folder(repository)
    ref = folder / "refs" / "main"
    revision = ref.read_text() if ref.is_file() else "missing"
    return [ref, folder / "snapshots" / revision]


@contextmanager
def opening(
    model: str, repository: str | None, way_out: str, file: str | None = None
) -> Iterator[None]:
    """Open a model from a repository, or from a ``file`` or folder, without messages of libraries.

    Raises BackboneError if it cannot be downloaded or loaded. ``way_out`` names the options for a copy of its weights.
    """
    try:
        if repository:
            ask_hub(repository)
        with quiet():
            yield
    except (
        Exception
    ) as error:  # the libraries, the hub, torch and safetensors raise different errors
        raise _load_error(model, error, way_out, file) from error


def _load_error(model: str, error: Exception, way_out: str, file: str | None) -> BackboneError:
    if "pip install transformers" in str(error):
        return BackboneError(f"{model}: its text tower requires transformers; run {install('hf')}")
    if "trust_remote_code" in str(error):
        return BackboneError(
            f"{model}: this model requires custom code, which retrieval-tip never runs; choose another encoder "
            "(see retrieval-tip models)"
        )
    if file is not None:
        return BackboneError(f"{file}: cannot be loaded as {model}: {_reason_of(error)}")
    if not isinstance(error, ConnectionError):
        return BackboneError(f"Could not load {model}: {_reason_of(error)}. Pass {way_out}.")
    size = _bytes(model) if has(model) or model.startswith("timm:") else None
    sized = f" ({amount(size)})" if size else ""
    here = next(cached(), None)
    offline = f"{shlex.quote(here)} (on this machine)" if here else "timm:NAME@FILE"
    return BackboneError(
        f"Could not download {model}{sized}: {_reason_of(error)}. Offline? Pass {way_out}, or --model {offline}."
    )


def cached() -> Iterator[str]:
    """Yield the names of the models whose weights are on this machine, with their tags. Recommended models are first.

    Models of open_clip and timm are found in the cache of the hub.
    """
    import open_clip
    import timm

    seen = set()  # several architectures can share one repository
    others = ((f"timm:{name}", None) for name in timm.list_pretrained())
    names = [*map(named, SHORT), *open_clip.list_pretrained(), *others]
    for name, tag in names:
        place = repository_of(name, tag)
        if place not in seen and has_weights(place):
            seen.add(place)
            yield f"{name}@{tag}" if tag else name
    if file := next((file for file in DEMO if file.is_file()), None):
        yield f"timm:tf_efficientnet_lite0@{file}"


def repository_of(name: str, tag: str | None) -> str:
    """Return the repository of the weights, or an empty string if they have none."""
    import open_clip

    if name.startswith("timm:"):
        return str(getattr(_timm_config(name), "hf_hub_id", None) or "")
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    found = open_clip.get_pretrained_cfg(name, tag or _tags(name)[0]).get("hf_hub", "")
    return str(found).rpartition("/")[0]


def _timm_config(name: str) -> Any:
    """Return timm's description of weights, or ``None`` if it does not know them."""
    import timm

    return timm.get_pretrained_cfg(name.removeprefix("timm:"))
