"""Check the precision int8 on the labelled photos of a user before ``fast`` uses it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones import tower
from retrieval_tip.backbones.base import Identity
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data import remote
from retrieval_tip.data.encoder import FEWEST, Encoder
from retrieval_tip.data.shots import spread
from retrieval_tip.data.sources import Source, is_there, of_images
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.evaluation.held_out import held_out_probabilities, photo_rows
from retrieval_tip.files import read_json, replacing
from retrieval_tip.index.encoders import trial
from retrieval_tip.index.items import draw_shots, ids_in

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

CHECKED, KEPT = 512, 2048
"""Maximum number of photos that are held out for a check, and maximum number of keys that classify them."""
DIFFERENT = 0.03
"""Largest accepted share of held-out photos to which int8 gives another answer than float32."""


class PrecisionCheck(NamedTuple):
    """The accuracies of float32 and int8 queries on ``photos`` held-out photos, and the share of other answers."""

    photos: int
    float32: float
    int8: float
    different: float

    @property
    def accepts(self) -> bool:
        """Whether int8 loses at most a standard error of the accuracy, and at most ``DIFFERENT`` answers differ."""
        error = (self.float32 * (1 - self.float32) / self.photos) ** 0.5
        return self.int8 >= self.float32 - error and self.different <= DIFFERENT

    def __str__(self) -> str:
        return (
            f"{100 * self.int8:.1f} % of {self.photos} held-out photos right in int8, {100 * self.float32:.1f} % in "
            f"float32, {100 * self.different:.1f} % other answers"
        )


def settle(encoder: Encoder, index: AnsweringIndex, there: Callable[[str], bool] | None = None) -> str | None:
    """Calibrate int8 on photos of an index, and replace the precision ``fast`` of an encoder by one that suits it.

    The photos are used if they are ``there``, by default on this machine. Without them, ``fast`` becomes bfloat16 or
    float32, and int8 is calibrated on the first photos to encode. The result of a check is stored next to the
    calibrated encoder. Returns what replaces ``fast``, and why.
    """
    backbone = encoder.backbone
    if not isinstance(backbone, TorchBackbone) or not (backbone.precision == "fast" or backbone.needs_photos):
        return None
    model = index.take(index.every_row()[spread(index.n, KEPT)])
    rows = photo_rows(model, model.labels["key_id"].to_pylist())
    names = model.labels["source"].to_pylist()
    rows = np.array([row for row in rows if (there or _is_here)(names[row])], dtype=np.int64)
    rows = rows[spread(len(rows), CHECKED)]
    own = of_images([names[row] for row in rows])
    enough = len(own) >= FEWEST
    plain = replace(encoder, views=1, strict=False, skipped=[], done=Counter())
    if backbone.precision == "int8":
        if enough:
            plain.prepare(own)
        return None
    file, int8 = _file(backbone.identity, model), backbone.at("int8")
    check = None if int8.needs_photos else _stored(file)
    problem = f"fewer than {FEWEST} photos of the index are on this machine"
    if check is None and enough:
        problem, quick = "it cannot be calibrated", replace(plain, backbone=int8)
        quick.prepare(own)
        if int8.precision == "int8":
            check = _checked(model, rows, own, replace(plain, backbone=backbone.at("float32")), quick)
            _store(file, check)
    if check is not None and check.accepts:
        backbone.settle("int8", int8)
    else:
        backbone.settle(tower.fastest())
    settled = f"{backbone.precision} ({check or problem})"
    log.log(logging.INFO if backbone.precision == "int8" else logging.WARNING, "precision fast uses %s", settled)
    return settled


def settle_for_build(encoder: Encoder, source: Source, shots: int | None = None) -> Encoder:
    """Replace the precision ``fast`` of an encoder by one that suits a labelled source, before an index is built.

    Returns the encoder of the keys. If int8 is accepted for the queries, up to :data:`KEPT` keys are in float32, since
    the check needs them in float32 anyway. More keys are in int8. The check holds out photos of an index of up to
    :data:`KEPT` photos, which is then removed.
    """
    backbone = encoder.backbone
    if source.paths is None or not isinstance(backbone, TorchBackbone) or backbone.precision != "fast":
        return encoder
    if len(source) < FEWEST or "label" not in source.items.column_names or source.items["label"].null_count:
        return encoder  # encoding settles it
    if shots is not None:
        source = source.take(draw_shots(ids_in(source, source.class_names), source.class_names, shots, encoder.seed))
    exact = replace(encoder, backbone=backbone.at("float32"))
    with trial(source.take(spread(len(source), KEPT)), replace(exact, skipped=[])) as index:
        checked = settle(encoder, index, there=lambda _: True)
    is_small = backbone.precision == "int8" and len(source) <= KEPT
    return replace(exact if is_small else encoder, checked=checked)


def _is_here(path: str) -> bool:
    return not remote.is_remote(path) and is_there(path)


def _checked(model: CacheModel, rows: IntArray, photos: Source, exact: Encoder, quick: Encoder) -> PrecisionCheck:
    blocks = [encoder.encode(photos) for encoder in (exact, quick)]
    both = np.intersect1d(blocks[0].positions, blocks[1].positions)
    answers = []
    for block in blocks:
        held = held_out_probabilities(model, rows[both], block.features[np.isin(block.positions, both)])
        answers.append(held.pred_probs.argmax(1))
    right = [float((answer == held.labels).mean()) for answer in answers]
    return PrecisionCheck(len(both), right[0], right[1], float((answers[0] != answers[1]).mean()))


def _file(identity: Identity, model: CacheModel) -> Path | None:
    """Return the file next to the calibrated tower that holds the result for these photos, or ``None``."""
    folder = tower.folder_of(identity, "int8")
    photos = model.labels.select(["label", "source", "digest"]).to_pylist()
    name = hashlib.sha256(json.dumps(photos).encode()).hexdigest()[:16]
    return None if folder is None else folder / f"check-{name}.json"


def _stored(file: Path | None) -> PrecisionCheck | None:
    if file is not None:
        with suppress(TypeError, ValueError):
            photos, *shares = cast("list[float]", read_json(file, 1 << 10))
            return PrecisionCheck(max(1, int(photos)), *map(float, shares))
    return None


def _store(file: Path | None, check: PrecisionCheck) -> None:
    if file is not None:
        with suppress(OSError, RetrievalTipError), replacing(file) as new:
            new.write_text(json.dumps(check))
