"""Compile image towers for CPUs with OpenVINO, quantise them to int8 with NNCF, and store them on disk.

A tower returns the same features as the backbone, up to rounding error. It is two to three times as fast as torch (see
``benchmarks/encoding.py``), and requires neither the torch model nor its libraries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import threading
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import version
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from retrieval_tip.backbones.base import FloatArray, Identity, Preprocess, unit, view_size
from retrieval_tip.backbones.catalogue import quiet
from retrieval_tip.errors import first_line, show
from retrieval_tip.files import cache_folder, make_folders, sha256_of, temporary
from retrieval_tip.settings import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from types import ModuleType

    import openvino
    import torch
    from PIL import Image

    class Model(torch.nn.Module):
        """An open_clip model or a similar module. If it has no text tower, the text parts are missing."""

        visual: torch.nn.Module
        logit_scale: torch.Tensor

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor: ...  # noqa: D102
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


log = logging.getLogger(__name__)

_Graph = TypeVar("_Graph")
_Sample = TypeVar("_Sample")

LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.99, "int8": 0.8}
"""Smallest accepted cosine to the float32 features, by precision. For photos, the bfloat16 features of lit-mini reach
a cosine of 0.997 in both torch and OpenVINO, and its int8 features one of 0.96."""

COMPARED = 16  # photos whose int8 features are compared with the float32 features

CONVOLUTIONS, PRODUCTS = ("Convolution", "Conv"), ("MatMul", "Gemm")
"""Types of the layers of a tower, in OpenVINO and ONNX."""

FORM = 3  # version of the stored files

_GRAPH, _WEIGHTS, _FACTS = "tower.xml", "tower.bin", "digests.json"


class Tower:
    """A compiled tower, which maps shape ``[b, 3, h, w]`` to raw features of shape ``[b, d]``, both in float32."""

    def __init__(self, model: openvino.Model, precision: str, digest: str = "") -> None:
        """Compile a graph. ``digest`` is that of the stored file."""
        import torch

        self.digest = digest
        rest = fastest() if precision == "int8" and _convolves(_types(model)) else precision
        hint = "bf16" if rest == "bfloat16" else "f32"  # in int8, the first convolution is slow in float32
        config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._compiled = runtime().Core().compile_model(model, "CPU", config)
        self._requests = threading.local()  # the model's own request would be shared by all threads

    def __call__(self, pixels: torch.Tensor) -> FloatArray:
        """Return the raw features. Raises RuntimeError if their number is wrong."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        features: FloatArray = np.array(self._requests.own.infer(pixels.float().contiguous().numpy())[0])
        if len(features) != len(pixels):  # this happens in bfloat16 if oneDNN does not allow it
            raise RuntimeError(f"OpenVINO returned {len(features)} features for {len(pixels)} images")
        return features

    def __deepcopy__(self, _: object) -> Tower:
        return self  # immutable


def is_kept(identity: Identity) -> bool:
    """Return whether a backbone can encode images with its stored tower and :func:`view`, without loading its model."""
    folder = folder_of(identity, "float32")
    return can_view(identity.preprocess) and folder is not None and (folder / _FACTS).is_file()


def kept(identity: Identity, precision: str) -> Tower | None:
    """Load the stored tower of a backbone, or return ``None`` if it is missing, damaged or from another backbone."""
    import torch

    key = _key(identity, precision)
    folder = _folder(key)
    if folder is None or not (folder / _FACTS).is_file():
        return None
    try:
        facts = _facts(folder, key)
        if json.loads((folder / _FACTS).read_bytes()) != facts:
            raise ValueError("its files have changed")
        tower = Tower(runtime().Core().read_model(folder / _GRAPH), precision, facts[_WEIGHTS])
        if precision != "float32":  # a tower that was stored in float32 is untested in another precision
            tower(torch.zeros(1, 3, *view_size(identity.preprocess)))
        return tower
    except Exception as error:  # OpenVINO raises RuntimeError; reading raises OSError and ValueError
        log.info("%s: cannot be used (%s); compiling it again", show(folder), first_line(error))
        shutil.rmtree(folder, ignore_errors=True)
        return None


def calibrated(identity: Identity, photos: Collection[torch.Tensor], exact: Tower) -> Tower | None:
    """Quantise the stored tower of a backbone to int8, and store the result.

    The ranges of the activations are measured on ``photos``, which are views of shape ``[3, h, w]``. If another process
    has stored a result first, that tower is returned. If the quantisation fails, or if its features miss
    :data:`LEAST_COSINE` to those of the tower ``exact``, log a warning and return ``None``.
    """
    import torch

    folder = folder_of(identity, "float32")
    try:
        if folder is None:
            raise OSError("there is no cache folder")
        graph = runtime().Core().read_model(folder / _GRAPH)
        quantised = quantise(graph, photos, lambda view: view[None].float().numpy(), _types(graph))
        tower = Tower(quantised, "int8")
        views = torch.stack(list(islice(photos, COMPARED)))
        _check_cosine(tower(views), exact(views), "int8")
        _keep(quantised, identity, "int8")
        return kept(identity, "int8") or tower
    except Exception as error:  # NNCF and OpenVINO raise different errors
        log.warning("%s: images encoded in float32, because int8 failed (%s)", identity, first_line(error))
        return None


def quantise(
    graph: _Graph, samples: Collection[_Sample], feed: Callable[[_Sample], Any], types: dict[str, str], *ignored: str
) -> _Graph:
    """Quantise an OpenVINO or ONNX graph to int8 with NNCF, which prints and reports nothing.

    ``feed`` turns a sample into the inputs of the graph. ``types`` holds the types of the nodes of the tower by name,
    in the order of computation. Its first layer is not quantised: for CPUs without VNNI, NNCF uses 7-bit weights
    there, which cost more accuracy than all other layers. Nodes that match the patterns in ``ignored`` are not
    quantised, either.
    """
    runtime()
    convolves = _convolves(types)
    with quiet(), redirect_stdout(StringIO()):  # which gets its progress bars
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)  # set_log_level would change handlers of others
        found: _Graph = nncf.quantize(
            graph, nncf.Dataset(samples, feed), subset_size=len(samples),
            model_type=None if convolves else nncf.ModelType.TRANSFORMER,
            fast_bias_correction=not convolves,  # the full correction helps convolutions only
            ignored_scope=nncf.IgnoredScope(names=list(_layers(types))[:1], patterns=list(ignored)),
        )  # fmt: skip
    return found


def _types(graph: openvino.Model) -> dict[str, str]:
    """Return the types of the nodes of a graph by name, in the order of computation."""
    return {node.get_friendly_name(): node.get_type_name() for node in graph.get_ordered_ops()}


def _layers(types: dict[str, str]) -> dict[str, str]:
    """Return the layers among nodes."""
    return {name: kind for name, kind in types.items() if kind in CONVOLUTIONS + PRODUCTS}


def _convolves(types: dict[str, str]) -> bool:
    """Return whether most layers are convolutions."""
    layers = _layers(types)
    return sum(kind in CONVOLUTIONS for kind in layers.values()) > len(layers) / 2


def converted(model: Model, identity: Identity, size: tuple[int, int], precision: str) -> Tower | None:
    """Convert the image tower of a model, and store it.

    If the conversion fails or the features miss :data:`LEAST_COSINE`, log a warning and return ``None``.
    """
    import torch

    try:
        openvino = runtime()
        with torch.no_grad(), traceable(), quiet():
            traced = torch.jit.trace(image_encoder(model), torch.zeros(2, 3, *size), check_trace=False)
            graph = openvino.convert_model(traced)
        graph.reshape(openvino.PartialShape([-1, 3, *size]))  # for any number of views
        tower = Tower(graph, precision)
        pixels = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0)) * 4 - 2
        with torch.no_grad():
            _check_cosine(tower(pixels), model.encode_image(pixels).float().numpy(), precision)
    except Exception as error:  # OpenVINO and torch raise different errors
        log.warning("%s: images encoded by torch, which is slower: OpenVINO failed (%s)", identity, first_line(error))
        return None
    _keep(graph, identity, "float32")
    return tower


def _check_cosine(features: FloatArray, exact: FloatArray, precision: str) -> None:
    cosine = float((unit(features) * unit(exact)).sum(axis=1).min())
    if not cosine >= LEAST_COSINE[precision]:
        raise ValueError(f"the cosine to the float32 features is {cosine:.6f}")


def fastest() -> Precision:
    """Return the fastest precision that needs no calibration on this CPU."""
    return "bfloat16" if "BF16" in runtime().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "float32"


def runtime() -> ModuleType:
    """Import openvino without its telemetry."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # disables telemetry, also that of NNCF
    import openvino

    module: ModuleType = openvino
    return module


def image_encoder(model: Model) -> torch.nn.Module:
    """Return ``encode_image`` of a model as a module, which maps shape ``[b, 3, h, w]`` to shape ``[b, d]``."""
    import torch

    class ImageTower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model.encode_image(pixels)

    encoder: torch.nn.Module = ImageTower().eval()
    return encoder


@contextmanager
def traceable() -> Iterator[None]:
    """Turn off fused attention, which other runtimes do not support, and warnings about tracing."""
    import warnings

    import torch

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def folder_of(identity: Identity, precision: str) -> Path | None:
    """Return the folder of the stored tower of a backbone, or ``None`` if the user has no home folder."""
    return _folder(_key(identity, precision))


def _key(identity: Identity, precision: str) -> str:
    """Return everything that a stored tower depends on. One graph serves float32 and bfloat16."""
    calibrated = f" int8 {version('nncf')}" if precision == "int8" else ""
    return f"{FORM} {identity.fingerprint} {identity.weights} {version('openvino')}{calibrated}"


def _folder(key: str) -> Path | None:
    caches = cache_folder()
    return None if caches is None else caches / "towers" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _keep(graph: openvino.Model, identity: Identity, precision: str) -> None:
    key = _key(identity, precision)
    folder = _folder(key)
    if folder is None or folder.exists():
        return
    try:
        make_folders(folder.parent)
        with temporary(folder, folder=True) as new:
            runtime().serialize(graph, new / _GRAPH, new / _WEIGHTS)
            (new / _FACTS).write_text(json.dumps(_facts(new, key)))
            new.rename(folder)
    except (OSError, RuntimeError) as error:
        if not folder.exists():  # otherwise another process was faster
            log.info("%s: cannot be stored (%s)", show(folder), first_line(error))


def _facts(folder: Path, key: str) -> dict[str, str]:
    return {"key": key} | {name: sha256_of(folder / name) for name in (_GRAPH, _WEIGHTS)}


def can_view(preprocess: Preprocess) -> bool:
    """Return whether :func:`view` supports these settings."""
    with suppress(KeyError, TypeError, ValueError):
        return shorter_side(preprocess) is not None and len(preprocess["mean"]) == len(preprocess["std"]) == 3
    return False


def view(image: Image.Image, preprocess: Preprocess) -> torch.Tensor:
    """Return the centre view of an image, as a float32 tensor of shape ``[3, h, w]``.

    The view is bit-identical to that of open_clip or timm.
    """
    import torch
    from PIL.Image import Resampling

    short = shorter_side(preprocess)
    assert short is not None
    resized = short, short
    if preprocess.get("resize_mode") != "squash":
        long = int(short * max(image.size) / min(image.size))
        resized = (short, long) if image.width <= image.height else (long, short)
    if image.size != resized:
        image = image.resize(resized, Resampling[preprocess["interpolation"].upper()])
    height, width = view_size(preprocess)
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    image = image.crop((left, top, left + width, top + height)).convert("RGB")
    mean, std = (torch.tensor(preprocess[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(mean).div_(std)


def shorter_side(preprocess: Preprocess) -> int | None:
    """Return the length of the shorter side before cropping, or ``None`` if the preprocessing is not supported."""
    size = view_size(preprocess)
    if size[0] != size[1] or preprocess.get("interpolation") not in ("bilinear", "bicubic"):
        return None
    if preprocess.get("resize_mode") == "squash":
        return size[0]
    if "crop_pct" in preprocess:  # settings of timm
        centre = preprocess.get("crop_mode", "center") == "center"
        return int(np.floor(size[0] / preprocess["crop_pct"])) if centre else None
    shortest = preprocess.get("resize_mode", "shortest") == "shortest" and preprocess.get("mode", "RGB") == "RGB"
    return size[0] if shortest else None
