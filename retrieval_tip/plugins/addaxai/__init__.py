"""Export an index as a model that the camera-trap program AddaxAI runs. docs/camera-traps.md describes the way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
from PIL import Image

from retrieval_tip import __version__
from retrieval_tip.backbones.base import Backbone, Identity, unit_of, without_unused
from retrieval_tip.backbones.catalogue import licence_of
from retrieval_tip.backbones.loading import load_again
from retrieval_tip.data import images
from retrieval_tip.errors import InputError, UsageError, warn_once
from retrieval_tip.export.onnx_graph import photos_of
from retrieval_tip.files import make_folders, read_json, replacing, temporary
from retrieval_tip.hooks import flag, option
from retrieval_tip.model import Index
from retrieval_tip.plugins.addaxai import graph, ranks
from retrieval_tip.wording import counted, show

LARGEST_MANIFEST = 1 << 20
DEVELOPER = "retrieval-tip"
MAY_DIFFER = 0.01
"""Largest accepted difference of a probability. Rounding makes one of 1e-6, and a mistake one of 0.1."""


@dataclass(frozen=True)
class AddaxAI:
    """A model of AddaxAI.

    Options:
        taxonomy: Table with the columns model_class, class, order, family, genus and species, where model_class is a
            class of the index. [default: the groups of the index with these names]
        whole: Let AddaxAI classify whole photos. [default: the boxes of its detector]
    """

    taxonomy: Path | None = option(click.Path(path_type=Path, dir_okay=False))
    whole: bool = flag()

    def write(self, index: Index, folder: Path) -> str:
        """Write the files of a model into a folder, whose name identifies the model, and return what to tell the user.

        An earlier model of this index is replaced. Raises UsageError or InputError if the index cannot be exported,
        if the folder has another model, or if the model answers otherwise than this package.
        """
        identity = index.backbone
        if identity is None:
            raise UsageError(
                "index: its encoder is not known, but AddaxAI needs one to classify photos"
            )
        _check(folder)
        labels = ranks.lower_case(index.class_names)
        known_ranks = ranks.ranks_of(labels, self.taxonomy, index.groups)
        for caution in ranks.cautions(labels, known_ranks):
            warn_once(caution)
        backbone = load_again(identity, device="cpu", precision="float32", lazy=False)
        backbone = without_unused(backbone, index.shares)
        index = index.with_settings(index.settings.override(k="all"))  # a graph retrieves no keys
        contents = {
            "taxonomy.csv": ranks.csv(labels, known_ranks).encode(),
            "inference.py": files(__name__).joinpath("inference.py").read_bytes(),
            "manifest.json": json.dumps(self._manifest(index, identity, folder), indent=1).encode(),
            "model.pt": graph.traced(index, backbone, labels),
        }
        make_folders(folder.absolute().parent)
        with temporary(folder.absolute(), folder=True) as new:
            _write(new, contents)
            compared = _compared(index, backbone, new)
        make_folders(folder)
        _write(
            folder, contents
        )  # the model comes last, because the other files also fit the earlier model
        size = f"{len(contents['model.pt']) / 1e6:.1f} MB"
        return f"{counted(len(labels), 'class')}, {size}, {compared}"

    def _manifest(self, index: Index, identity: Identity, folder: Path) -> dict[str, Any]:
        name = Path(index.place or "index").name
        shots = f"{counted(index.n, 'shot')} of {counted(len(index.class_names), 'class')}"
        fit = index.provenance.get("fit") or {}
        what = [f"Index {name}, version {index.version}: {shots}.", fit.get("summary", "")]
        return {
            "model_id": folder.absolute().name,
            "friendly_name": name,
            "description": " ".join(filter(None, what)),
            "developer": DEVELOPER,
            "info_url": "",
            "env": "pytorch",
            "model_fname": "model.pt",
            "min_app_version": "7.0.1",
            "full_image_cls": self.whole,
            "license": _licences(identity),
            "owner": f"{DEVELOPER} {__version__}",
        }


def _licences(identity: Identity) -> str:
    """Return the licences of the weights of encoders. Those of a local encoder are not known."""
    models = [part.model for part in identity.parts or (identity,)]
    licences = [licence_of(model) or "not known" for model in models]
    return ", ".join(dict.fromkeys(licences))


def _check(folder: Path) -> None:
    """Raise UsageError if the name of a folder does not identify a model, or InputError if it has another model."""
    name = folder.absolute().name
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UsageError(
            f"{show(folder)}: AddaxAI only accepts letters, digits, '-', '_' and '.' in the name of the folder"
        )
    manifest = folder / "manifest.json"
    if manifest.exists():
        content = read_json(manifest, LARGEST_MANIFEST)
        if not isinstance(content, dict) or content.get("developer") != DEVELOPER:
            raise InputError(
                f"{show(folder)}: has the model of another program; choose another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{show(folder)}: is not an empty folder; choose another")


def _write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        with replacing(folder / name) as new:
            new.write_bytes(content)


def _compared(index: Index, backbone: Backbone, folder: Path) -> str:
    """Run a model without this package on photos of the index, and return how its answers compare with the package.

    Raises InputError if they differ.
    """
    photos = list(photos_of(index, images.decode))
    names = []
    for number, photo in enumerate(photos):
        name = folder / f"{number}.png"
        photo.save(name)
        names.append(str(name))
    command = [sys.executable, "-I", str(folder / "inference.py"), *names]
    done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - no shell
    if done.returncode:
        *_, last = done.stderr.decode(errors="replace").splitlines() or ["no message"]
        raise InputError(f"{show(folder)}: its model cannot be run: {last}")
    if not photos:
        return "not compared with this package, because no photo of the index could be read"
    difference = 0.0
    *lines, times = done.stdout.splitlines()
    for photo, line in zip(photos, lines, strict=True):
        answer = dict(json.loads(line) or ())
        expected = _answer(index, backbone, photo)
        if answer.keys() != expected.keys():
            raise InputError(f"{show(folder)}: its model and this package disagree about no match")
        differences = [abs(answer[label] - p) for label, p in expected.items()]
        difference = max([difference, *differences])
    if difference > MAY_DIFFER:
        raise InputError(f"{show(folder)}: its model differs from this package by {difference:.3f}")
    speed = f"{json.loads(times)['milliseconds']:.0f} ms per photo on this CPU"
    return f"{speed}, {counted(len(photos), 'photo')} answered alike within {max(difference, 1e-6):.6f}"


def _answer(index: Index, backbone: Backbone, photo: Image.Image) -> dict[str, float]:
    """Return the probability that this package gives to each class, or nothing for a photo without a match."""
    view = backbone.preprocess(photo)
    features = unit_of(backbone, backbone.encode_images(view[None]))
    every = len(index.class_names)
    (answer,) = index.classify(features, norms="keep", top=every, neighbours=0)
    if answer.no_match:
        return {}
    pairs = zip(answer.labels, answer.probabilities, strict=True)
    return {label.lower(): probability for label, probability in pairs}
