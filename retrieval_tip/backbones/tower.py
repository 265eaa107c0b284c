"""Compile image towers for CPUs with OpenVINO, quantise them to int8 with NNCF, and store them on disk.

A tower returns the same features as the backbone, up to rounding error. It is two to three times as fast as torch (see
``benchmarks/encoding.py``), and requires neither the torch model nor its libraries.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval_tip.arrays import FloatArray
from retrieval_tip.backbones.base import Identity, Preprocess, unit, view_size
from retrieval_tip.backbones.catalogue import quiet
from retrieval_tip.errors import BackboneError, UsageError
from retrieval_tip.files import cache_folder, make_folders, sha256_of, temporary
from retrieval_tip.machine import install
from retrieval_tip.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from types import ModuleType

    import onnx
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

LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.99, "int8": 0.8}
"""Smallest accepted cosine to the float32 features, by precision. For photos, the bfloat16 features of lit-mini reach
a cosine of 0.997 in both torch and OpenVINO, and its int8 features one of 0.96."""

COMPARED = 16  # photos whose int8 features are compared with the float32 features

CONVOLUTIONS, PRODUCTS = (
    ("Convolution", "Conv"),
    ("MatMul", "Gemm"),
)  # types of layers, in OpenVINO and ONNX
FORM = 3  # version of the stored files
OPSET = 18  # version of the ONNX operators in graphs
PIXELS, FEATURES = "pixels", "features"  # names of the input and the output of a tower in ONNX
_GRAPH, _WEIGHTS, _ONNX, _FACTS = "tower.xml", "tower.bin", "tower.onnx", "digests.json"


class Tower:
    """A compiled tower, which maps shape ``[b, 3, h, w]`` to raw features of shape ``[b, d]``, both in float32."""

    def __init__(self, model: openvino.Model, precision: str, digest: str = "") -> None:
        """Compile a graph. ``digest`` is the SHA-256 of the stored file."""
        import torch

        self.digest = digest
        core = runtime().Core()
        types = {node.get_friendly_name(): node.get_type_name() for node in model.get_ordered_ops()}
        in_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        half = precision == "bfloat16" or (
            precision == "int8" and _layers(types)[1] and in_bfloat16
        )
        hint = "bf16" if half else "f32"  # in int8, the first convolution is slow in float32
        config = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._compiled = core.compile_model(model, "CPU", config)
        self._requests = threading.local()  # the model's own request would be shared by all threads

    def __call__(self, pixels: torch.Tensor) -> FloatArray:
        """Return the raw features. Raises RuntimeError if their number is wrong."""
        if not hasattr(self._requests, "own"):
            self._requests.own = self._compiled.create_infer_request()
        features: FloatArray = np.array(
            self._requests.own.infer(pixels.float().contiguous().numpy())[0]
        )
        if len(features) != len(pixels):  # this happens in bfloat16 if oneDNN does not allow it
            raise RuntimeError(
                f"OpenVINO returned {len(features)} features for {len(pixels)} images"
            )
        return features


def kept(identity: Identity, precision: str) -> Tower | None:
    """Load the stored tower of a backbone, or return ``None`` if it is missing, damaged or from another backbone."""
    import torch

    try:
        folder = folder_of(identity, precision)
        if not (folder / _FACTS).is_file():
            return None
        facts = _facts(folder, _key(identity, precision))
        if json.loads((folder / _FACTS).read_bytes()) != facts:
            raise ValueError("its files have changed")
        tower = Tower(runtime().Core().read_model(folder / _GRAPH), precision, facts[_WEIGHTS])
        if (
            precision != "float32"
        ):  # a tower that was stored in float32 is untested in another precision
            tower(torch.zeros(1, 3, *view_size(identity.preprocess)))
        return tower
    except (
        Exception
    ) as error:  # OpenVINO raises RuntimeError; reading raises OSError and ValueError
        log.info("%s: its stored tower cannot be used (%s)", identity, first_line(error))
        return None


def store_int8(
    model: Model, identity: Identity, photos: Collection[torch.Tensor], exact: Tower
) -> float:
    """Quantise the image tower of a model to int8, and store it in place of an earlier one, also as ONNX.

    The ranges of the activations are measured on ``photos``, which are views of shape ``[3, h, w]``. Return the lowest
    cosine between the features of some of them and those of the tower ``exact``. Raises BackboneError if it is below
    :data:`LEAST_COSINE`, or if the tower cannot be quantised or stored, and UsageError if NNCF is not installed.
    """
    import torch

    if any(find_spec(name) is None for name in ("nncf", "onnx", "onnxruntime")):
        raise UsageError(f"int8: NNCF is not installed; run {install('int8')}")
    try:
        quantised = _quantised(
            to_onnx(image_encoder(model), {PIXELS: (3, *view_size(identity.preprocess))}), photos
        )
        graph = runtime().Core().read_model(quantised)
        views = torch.stack(list(islice(photos, COMPARED)))
        cosine = _check_cosine(Tower(graph, "int8")(views), exact(views), "int8")
        _keep(graph, identity, "int8", quantised)
    except Exception as error:  # NNCF, ONNX and OpenVINO raise different errors
        raise BackboneError(f"{identity}: cannot be used in int8: {first_line(error)}") from None
    return cosine


def stored_onnx(identity: Identity) -> bytes:
    """Return the ONNX graph of the int8 tower of a backbone, which must be stored."""
    return (folder_of(identity, "int8") / _ONNX).read_bytes()


def to_onnx(
    module: torch.nn.Module,
    given: Mapping[str, Sequence[int]],
    outputs: Sequence[str] = (FEATURES,),
) -> onnx.ModelProto:
    """Convert a module to ONNX, for batches of any size. ``given`` has the shape of an element of each input."""
    import onnx
    import torch

    file = BytesIO()
    with torch.no_grad(), traceable(), quiet():
        torch.onnx.export(
            module,
            tuple(torch.zeros(2, *shape) for shape in given.values()),
            file,  # type: ignore[arg-type]  # accepted with dynamo=False
            input_names=list(given),
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in (*given, *outputs)},
            opset_version=OPSET,
            dynamo=False,
        )
    return onnx.load_model_from_string(file.getvalue())


def _quantised(graph: onnx.ModelProto, photos: Collection[torch.Tensor]) -> bytes:
    """Quantise an ONNX graph to int8 with NNCF, which prints and reports nothing."""
    runtime()  # disables telemetry
    types = {node.name: node.op_type for node in graph.graph.node}
    layers, convolves = _layers(types)
    with quiet(), redirect_stdout(StringIO()):  # which gets its progress bars
        import nncf

        logging.getLogger("nncf").setLevel(
            logging.ERROR
        )  # set_log_level would change handlers of others
        found = nncf.quantize(
            graph,
            nncf.Dataset(photos, lambda view: {PIXELS: view[None].float().numpy()}),
            subset_size=len(photos),
            model_type=None if convolves else nncf.ModelType.TRANSFORMER,
            fast_bias_correction=not convolves,  # the full correction helps convolutions only
            ignored_scope=nncf.IgnoredScope(
                names=layers[:1]
            ),  # without VNNI, its 7-bit weights cost most accuracy
        )
    return bytes(found.SerializeToString())


def _layers(types: dict[str, str]) -> tuple[list[str], bool]:
    """Return the names of the layers among nodes, and whether most layers are convolutions."""
    layers = {
        name: kind in CONVOLUTIONS
        for name, kind in types.items()
        if kind in CONVOLUTIONS + PRODUCTS
    }
    return list(layers), sum(layers.values()) > len(layers) / 2


def converted(
    model: Model, identity: Identity, size: tuple[int, int], precision: str
) -> Tower | None:
    """Convert and store the image tower of a model. Return ``None``, with a warning, if its features differ."""
    import torch

    try:
        openvino = runtime()
        with torch.no_grad(), traceable(), quiet():
            traced = torch.jit.trace(
                image_encoder(model), torch.zeros(2, 3, *size), check_trace=False
            )
            graph = openvino.convert_model(traced)
        graph.reshape(openvino.PartialShape([-1, 3, *size]))  # for any number of views
        tower = Tower(graph, precision)
        pixels = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0)) * 4 - 2
        with torch.no_grad():
            _check_cosine(tower(pixels), model.encode_image(pixels).float().numpy(), precision)
    except Exception as error:  # OpenVINO and torch raise different errors
        log.warning(
            "%s: images encoded by torch, which is slower: OpenVINO failed (%s)",
            identity,
            first_line(error),
        )
        return None
    try:
        _keep(graph, identity, "float32")
    except (OSError, RuntimeError) as error:
        log.info("%s: its tower cannot be stored (%s)", identity, first_line(error))
    return tower


def _check_cosine(features: FloatArray, exact: FloatArray, precision: str) -> float:
    """Return the lowest cosine to the float32 features. Raises ValueError if it is below :data:`LEAST_COSINE`."""
    cosine = float((unit(features) * unit(exact)).sum(axis=1).min())
    if not cosine >= LEAST_COSINE[precision]:
        raise ValueError(
            f"the cosine to the float32 features is {cosine:.6f}, below {LEAST_COSINE[precision]}"
        )
    return cosine


def runtime() -> ModuleType:
    """Import openvino without telemetry, also of NNCF and ONNX Runtime."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import openvino

    module: ModuleType = openvino
    return module


def image_encoder(model: Model) -> torch.nn.Module:
    """Return ``encode_image`` of a model as a module, which maps shape ``[b, 3, h, w]`` to shape ``[b, d]``."""
    import torch

    encoder: Any = torch.nn.Module()
    encoder.model = model
    encoder.forward = model.encode_image
    module: torch.nn.Module = encoder.eval()
    return module


@contextmanager
def traceable() -> Iterator[None]:
    """Turn off fused attention, which other runtimes do not support, and warnings about tracing."""
    from torch.backends import mha

    with warnings.catch_warnings(), ExitStack() as restored:
        warnings.simplefilter("ignore")
        restored.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        yield


def folder_of(identity: Identity, precision: str) -> Path:
    """Return the folder of the stored tower of a backbone. Raises OSError if the user has no home folder."""
    if (caches := cache_folder()) is None:
        raise OSError("there is no home folder to store it")
    return caches / "towers" / hashlib.sha256(_key(identity, precision).encode()).hexdigest()[:16]


def _key(identity: Identity, precision: str) -> str:
    """Return everything that a stored tower depends on. One graph serves float32 and bfloat16."""
    own = " int8" if precision == "int8" else ""
    return f"{FORM} {identity.fingerprint} {identity.weights} {version('openvino')}{own}"


def _keep(
    graph: openvino.Model, identity: Identity, precision: str, as_onnx: bytes | None = None
) -> None:
    """Store a tower in place of an earlier one. Raises OSError or RuntimeError if this fails."""
    folder = folder_of(identity, precision)
    make_folders(folder.parent)
    with temporary(folder, folder=True) as new:
        runtime().serialize(graph, new / _GRAPH, new / _WEIGHTS)
        if as_onnx is not None:
            (new / _ONNX).write_bytes(as_onnx)
        (new / _FACTS).write_text(json.dumps(_facts(new, _key(identity, precision))))
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(FileExistsError):  # another process was faster
            new.rename(folder)


def _facts(folder: Path, key: str) -> dict[str, str]:
    files = (folder / name for name in (_GRAPH, _WEIGHTS, _ONNX))
    return {"key": key} | {file.name: sha256_of(file) for file in files if file.exists()}


def view(image: Image.Image, preprocess: Preprocess) -> torch.Tensor:
    """Return the centre view, ``[3, h, w]`` in float32, bit-identical to the view of open_clip or timm."""
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
    left = round((image.width - width) / 2.0)
    top = round((image.height - height) / 2.0)
    image = image.crop((left, top, left + width, top + height)).convert("RGB")
    mean, std = (
        torch.tensor(preprocess[name], dtype=torch.float32)[:, None, None]
        for name in ("mean", "std")
    )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(mean).div_(std)


def shorter_side(preprocess: Preprocess) -> int | None:
    """Return the length of the shorter side before cropping, or ``None`` if :func:`view` does not support it."""
    with suppress(KeyError, TypeError, ValueError):
        height, width = view_size(preprocess)
        normalised = len(preprocess["mean"]) == len(preprocess["std"]) == 3
        if (
            not normalised
            or height != width
            or preprocess["interpolation"] not in ("bilinear", "bicubic")
        ):
            return None
        if preprocess.get("resize_mode") == "squash":
            return height
        if "crop_pct" in preprocess:  # settings of timm
            centre = preprocess.get("crop_mode", "center") == "center"
            return int(np.floor(height / preprocess["crop_pct"])) if centre else None
        if (
            preprocess.get("resize_mode", "shortest") == "shortest"
            and preprocess.get("mode", "RGB") == "RGB"
        ):
            return height
    return None
