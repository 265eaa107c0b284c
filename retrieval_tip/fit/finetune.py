"""Fine-tune an index as in Tip-Adapter-F (paper, section 3.2), or train other parts of it (paper, Table 1).

Training minimises the cross-entropy of the method's own logits on augmented views of the shots. Random numbers depend
only on the seed and the epoch, so training that is interrupted and resumed gives the same result.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from retrieval_tip.backbones.loading import write_tuned
from retrieval_tip.backbones.torch_backbone import TorchBackbone
from retrieval_tip.bounds import check_memory
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.data.encoder import Encoder, Views, view_names
from retrieval_tip.data.sources import Source, is_there, open_source
from retrieval_tip.errors import InputError, UsageError, first_line, show
from retrieval_tip.files import check_regular, make_folders, replacing
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.folds import Folds
from retrieval_tip.fit.forms import like
from retrieval_tip.fit.trainer import Recipe, Trainer, cosine, faster_precision
from retrieval_tip.retrieval.defaults import measure
from retrieval_tip.retrieval.keys import index_over
from retrieval_tip.store.folder import check_name
from retrieval_tip.store.labels import images_of

log = logging.getLogger(__name__)

Checkpoint = dict[str, Any]
"""State of a run after an epoch. It contains only tensors, numbers and text."""
STATE = ("epoch", "seconds", "curve", "kept_epoch", "kept", "collapsed")
"""Attributes of a run that are saved in a checkpoint."""
FLATTER, STRONGER = 0.1, (1, 4, 16)
"""Further settings to try. Beta is in units of the spread of affinities between classes (1 if untouched). Alpha is a
multiple of the alpha with the highest log-likelihood on the validation images."""
TRIAL = 0.25
"""Fraction of the epochs that is used to try each setting."""
COLLAPSE = 0.5
"""Training has collapsed if the accuracy falls below this fraction of the best accuracy so far."""
HELD_OUT, FOLDS = 1000, 4
"""Largest number of shots that are held out to evaluate training without validation images, and number of folds."""
CURVE = pa.schema(
    [("epoch", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")]
)
"""Columns of a loss curve, which has one row per epoch. Row 0 describes the index before training. ``loss`` and
``accuracy`` are means over the epoch. The ``val_`` columns are measured on the validation images after the epoch, and
``seconds`` is the training time so far."""


@dataclass(frozen=True)
class Comparison:
    """Accuracy ``before`` training (with the index's own fit) and ``after``, on ``n`` unseen images from ``source``."""

    before: float
    after: float
    n: int
    source: str

    @property
    def helps(self) -> bool:
        """Whether training increased the accuracy."""
        return self.after > self.before

    def __str__(self) -> str:
        figures = f"{100 * self.before:.1f} % before training, {100 * self.after:.1f} % after"
        return f"held-out accuracy: {figures} (n={self.n}, {self.source})"


@dataclass(frozen=True)
class Tuned:
    """The result of fine-tuning.

    - ``cache``: the new index, which is written to disk by :meth:`save`
    - ``epoch``: the epoch that was kept, or 0 if no epoch improved on the untrained index
    - ``curve``: a table with the columns of :data:`CURVE`
    - ``collapsed``: a description of how training collapsed, or ``None``
    - ``choice``: the result of the search for alpha, beta and k after training, or ``None`` if there are no validation
      images
    - ``backbone``: the backbone with the trained encoders
    - ``encoders``: the tensors of the trained encoders by name
    - ``record``: a description of the run
    - ``compared``: the accuracy before and after training, as measured by :func:`finetune_into`, or ``None``
    - ``as_it_was``: whether ``cache`` is a copy of the given index, because training did not help
    """

    cache: CacheModel
    epoch: int
    curve: pa.Table
    collapsed: str | None
    choice: search_hp.HyperparameterChoice | None
    backbone: TorchBackbone | None
    encoders: dict[str, Tensor]
    record: dict[str, object]
    compared: Comparison | None = None
    as_it_was: bool = False

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index folder, including any trained encoders."""
        with tempfile.TemporaryDirectory() as place:
            if self.encoders:
                self.cache.tuned = Path(place) / "encoders.safetensors"
                write_tuned(self.cache.tuned, self.encoders)
            self.cache.save(folder, "copy, since finetune did not help" if self.as_it_was else "finetune")

    def facts(self) -> dict[str, object]:
        """Return the figures that the command line prints. A figure that was not measured is ``None``."""
        compared, kept = self.compared, None if self.as_it_was else self.epoch
        facts: dict[str, object] = {"version": self.cache.version, "kept": "as it was" if kept is None else "trained"}
        facts |= {name: compared and getattr(compared, name) for name in ("before", "after", "n", "source")}
        facts |= {"trained": self.record["train"], "epoch": kept}
        for name in ("loss", "accuracy"):
            value = math.nan if kept is None else self.curve[name][kept].as_py()
            facts[f"train_{name}"] = None if math.isnan(value) else value
        shown = self.cache.settings.shown()
        facts |= {name: shown[name] for name in ("alpha", "beta", "k")}
        return facts | {"collapsed": self.collapsed, "seconds": self.record["seconds"]}


def checkpoint_of(out: str | os.PathLike[str]) -> Path:
    """Return the path of the checkpoint for a run that writes the folder ``out``."""
    return Path(f"{os.fspath(out)}.checkpoint")


def finetune_into(
    out: str | os.PathLike[str], cache: CacheModel, shots: Source, encoder: Encoder, recipe: Recipe | None = None, *,
    val: Source | search_hp.Queries | None = None, parent: str = "", resume: bool = False, keep_last: bool = False,
) -> Tuned:  # fmt: skip
    """Fine-tune an index, and write the result into the folder ``out`` if it is more accurate.

    If training does not help, a copy of the original index is written instead, unless ``keep_last`` is set. The
    accuracy is measured on ``val``, or on held-out shots if ``val`` is not given (see :func:`_compared`). If an encoder
    is trained, a checkpoint is kept beside ``out`` until the index is written.
    """
    check_name(Path(out))
    make_folders(Path(out).parent)
    recipe = recipe or Recipe()
    place = checkpoint_of(out) if recipe.encoders else None
    held = _held(place, resume)
    log.warning("the closed-form fit is usually more accurate than fine-tuning; held-out photos decide which is kept")
    plain = _untrained(cache, recipe)
    material = _Material.of(plain, shots, encoder, recipe, val)
    val, tuned, compared = material.queries, None, None
    if val is None and held is None:
        compared, tuned = _compared(cache, material, encoder, recipe)
    elif held is not None:
        compared = held["compared"] and Comparison(**held["compared"])
    if tuned is None or compared is None or compared.helps or keep_last:
        tuned = _trained(plain, material, recipe, parent, place=place, held=held, compared=compared)
    if val is not None and tuned.choice is not None:
        compared = Comparison(_right(cache, val) / len(val.ids), tuned.choice.accuracy, len(val.ids), val.name)
    if tuned.collapsed is not None:
        _warn(tuned)
    if compared is None:
        log.warning("no photo could be held out to evaluate the training, since no class has two; give --val")
    elif compared.helps or keep_last:
        tuned.record["held_out"] = asdict(compared)
    else:
        log.warning("%s; training does not help, so %s is a copy of the index", compared, show(out))
        tuned = replace(tuned, cache=copy.copy(cache), choice=None, encoders={}, as_it_was=True)
    tuned.save(out)
    if place is not None:
        place.unlink(missing_ok=True)
    return replace(tuned, compared=compared)


def finetune(
    cache: CacheModel, shots: Source, encoder: Encoder, recipe: Recipe | None = None, *,
    val: Source | search_hp.Queries | None = None, parent: str = "", checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False, on_epoch: Callable[[Mapping[str, float]], None] | None = None,
) -> Tuned:  # fmt: skip
    """Train an index by minimising the cross-entropy of ``logit_scale f W^T + alpha C`` (paper, equation 6).

    Args:
        cache: The index, which is not changed. As in the paper, training starts from plain Tip-Adapter with the keys of
            the index. Any closed-form fit is ignored.
        shots: The index's own shots (:func:`own_shots`), as images or as a feature table of views. Rows with the same
            id are views of one shot.
        encoder: The encoder that computes the features. Its backbone is copied for training, and its ``views`` and
            ``seed`` are ignored.
        recipe: The training options.
        val: Labelled validation images, or their features if no image encoder is trained. The latest epoch whose
            accuracy is within one standard error of the best is kept. If no epoch is better than the untrained index,
            the untrained index is kept. A cautious search then selects alpha, beta and k. If ``val`` is not given, the
            last epoch is kept and the settings do not change.
        parent: The name of the index, which is written to the record.
        checkpoint: The file that stores the state after each epoch if an encoder is trained. The caller removes it.
        on_epoch: A function that is called with each row of the curve, and once before training.
        resume: Whether to continue from ``checkpoint`` if it exists. The result is the same as without an interruption.
            It is bit-identical if the device and the number of threads are the same.

    Raises:
        UsageError: if the index or the backbone does not support the recipe, or if training does not fit in memory.
        UsageError: if the checkpoint belongs to another run, or if a checkpoint is given but no encoder is trained.
        InputError: if the shots or the validation images do not fit the index, or if the checkpoint is damaged.
    """
    recipe, place = recipe or Recipe(), None if checkpoint is None else Path(checkpoint)
    if place is not None and not recipe.encoders:
        raise UsageError("checkpoint: only for encoders (train visual or text); to train keys and values, start again")
    held = _held(place, resume)
    cache = _untrained(cache, recipe)
    material = _Material.of(cache, shots, encoder, recipe, val)
    tuned = _trained(cache, material, recipe, parent, place=place, held=held, on_epoch=on_epoch)
    _warn(tuned)
    return tuned


def _untrained(cache: CacheModel, recipe: Recipe) -> CacheModel:
    """Return Tip-Adapter over the same keys, with the recipe's alpha and beta."""
    plain = closed_form.unfitted(cache)
    return plain.with_settings(plain.settings.override(alpha=recipe.alpha, beta=recipe.beta))


def _trained(
    cache: CacheModel, material: _Material, recipe: Recipe, parent: str = "", *, place: Path | None = None,
    held: Checkpoint | None = None, compared: Comparison | None = None,
    on_epoch: Callable[[Mapping[str, float]], None] | None = None,
) -> Tuned:  # fmt: skip
    """Train an untrained index, or continue from the checkpoint ``held``."""
    if cache.device == "cpu":
        queries = min(recipe.batch, len(material.shots))
        check_memory(4 * queries * cache.n, f"batch {queries} x {cache.n} keys", "use a smaller batch")
    if recipe.precision == "auto":
        recipe = replace(recipe, precision=held["precision"] if held else faster_precision(cache, recipe.batch))
    told = None if place is None else _told(cache, material, recipe)
    with _repeatable(cache.device):
        alpha, beta = _settings(cache, material, recipe)
        cache = cache.with_settings(cache.settings.override(alpha=alpha, beta=beta))
        run = _Run(cache, material, recipe, told, compared, on_epoch)
        if place is not None and held is not None:
            run.restore(held, place)
        run.train(place)
    return run.result(parent)


def _warn(tuned: Tuned) -> None:
    if tuned.collapsed is not None:
        log.warning("training collapsed: %s; kept epoch %d", tuned.collapsed, tuned.epoch)
    elif tuned.epoch == 0:
        log.warning("no epoch improved the accuracy on the validation photos; the keys stay untrained")


def _compared(
    cache: CacheModel, material: _Material, encoder: Encoder, recipe: Recipe
) -> tuple[Comparison | None, Tuned | None]:
    """Compare an index before and after training on held-out shots, and return the last trained index as well.

    A quarter of each class is held out at a time, until :data:`HELD_OUT` shots have been evaluated. If an encoder is
    trained, only one quarter is held out. Both return values are ``None`` if no class has two photos.
    """
    whole = cache
    images, c = images_of(whole.labels), len(whole.class_names)
    folds = Folds.of_shots(whole.keys, whole.class_ids.cpu().numpy(), c, None, images, FOLDS, HELD_OUT)
    sources = np.array(whole.labels["source"].to_pylist(), dtype=object)
    visual = "visual" in recipe.train
    right, n, seconds, tuned = [0, 0], 0, 0.0, None
    for held in folds.held[:1] if recipe.encoders else folds.held:
        rest = whole.take(held.rows.numpy())
        own, others = material.split(set(np.delete(sources, held.rows.numpy())), rest, encoder, recipe)
        if not len(own.shots) or not len(others):
            continue
        tuned = _trained(_untrained(rest, recipe), own, recipe)
        if whole.fitted is not None and whole.curve is None:
            closed_form.fit(rest, forms=like(whole.fitted))
        queries = search_hp.unseen(whole, held.features.numpy(), held.ids.numpy(), "its own shots")
        for i, (model, encoder_) in enumerate(((rest, encoder), (tuned.cache, own.encoder))):
            if visual:
                queries = search_hp.on_validation(whole, others, replace(encoder_, views=1))
            right[i] += _right(model, queries)
        n, seconds = n + len(queries.ids), seconds + tuned.curve["seconds"][-1].as_py()
    if tuned is None:
        return None, None
    tuned.record["seconds"] = round(seconds, 3)
    return Comparison(right[0] / n, right[1] / n, n, "its own shots, held out"), tuned


def _right(cache: CacheModel, queries: search_hp.Queries) -> int:
    return int((cache.logits(queries.features).argmax(1).cpu().numpy() == queries.ids).sum())


def _held(place: Path | None, resume: bool) -> Checkpoint | None:
    """Return the state of the interrupted run to resume, if there is one."""
    if place is None:
        if resume:
            raise UsageError("resume: only for encoders (train visual or text); to train keys and values, start again")
        return None
    if not place.exists():
        return None
    if resume:
        return _read(place)
    if not place.is_file():
        raise InputError(f"{show(place)}: is not a file; move it, since the checkpoint needs this name")
    log.warning("%s: found an interrupted run, but starting over; give --resume to continue it", show(place))
    return None


def _read(place: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError if the file is not a valid checkpoint."""
    try:
        check_regular(place)
        with ZipFile(place) as archive:  # torch does not verify checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(place, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("told"), dict):
            raise ValueError("not the state of a run")
    except Exception as error:  # a wrong file can raise anything
        raise _unfit(place, error) from None
    return state


def _unfit(place: Path, error: Exception) -> InputError:
    return InputError(
        f"{show(place)}: not a checkpoint of finetune, or damaged ({first_line(error)}); start over without --resume"
    )


def shots_of(cache: CacheModel) -> Source:
    """Return the shots of an index from their original source, as image paths or as rows of the feature table.

    Raises InputError if a shot is missing.
    """
    table = cache.labels.select(["source", "label"])
    paths = table["source"].to_pylist()
    missing = next((path for path in paths if not is_there(path)), None)
    if missing is None:
        return Source("the shots of the index", table, tuple(cache.class_names), tuple(paths))
    origin = cache.built.source
    if origin is not None and origin.endswith(".parquet") and Path(origin).is_file():
        return own_shots(cache, open_source(origin))
    raise InputError(f"{missing}: no such file, though it is a shot of the index; give --source with the shots")


def own_shots(cache: CacheModel, source: Source) -> Source:
    """Return the items of a source that are shots of the index. They are matched by path or id.

    Raises InputError if no item matches.
    """
    own = set(cache.labels["source"].to_pylist())
    positions = [position for position, name in enumerate(source.sources) if name in own]
    if not positions:
        raise InputError(
            f"{source.name}: none of its {len(source)} items is a shot of the index; shots have names like "
            f"{min(own)!r}, its items like {source.sources[0]!r}"
        )
    return source.take(positions)


@dataclass
class _Material:
    """Training and validation data of a run.

    ``views`` holds the cached views of the shots, or ``None`` if every epoch encodes fresh views.
    """

    encoder: Encoder
    backbone: TorchBackbone | None
    shots: Source
    ids: npt.NDArray[np.int64]
    views: Views | None
    val: Source | None
    queries: search_hp.Queries | None

    @classmethod
    def of(
        cls, cache: CacheModel, shots: Source, encoder: Encoder, recipe: Recipe, val: Source | search_hp.Queries | None
    ) -> _Material:
        encoder, backbone = _in_training(cache, replace(encoder, views=1), recipe)
        if shots.paths is not None:  # use each image once; rows of a feature table are views
            shots = shots.take(np.sort(np.unique(shots.paths, return_index=True)[1]))
        names = view_names(recipe.seed, recipe.views) if recipe.views else []
        views = encoder.encode_views(shots, names) if names or shots.paths is None else None
        if views is not None:
            _check_length(cache, shots.name, views.features.shape[1])
        elif encoder.backbone is not None:
            _check_length(cache, shots.name, encoder.backbone.dim)
        images = val if isinstance(val, Source) else None
        queries = search_hp.on_validation(cache, val, encoder) if isinstance(val, Source) else val
        if queries is not None:
            _check_length(cache, queries.name, queries.features.shape[1])
            if images is None and "visual" in recipe.train:
                raise UsageError("val: features come from the untrained encoder; give the images")
        return cls(encoder, backbone, shots, cache.ids_of(shots), views, images, queries)

    def split(self, names: set[str], cache: CacheModel, encoder: Encoder, recipe: Recipe) -> tuple[_Material, Source]:
        """Split off the shots whose source is in ``names``. Training on the rest uses a new copy of the backbone."""
        out = np.array([name in names for name in self.shots.sources], dtype=bool)
        encoder, backbone = _in_training(cache, replace(encoder, views=1), recipe)
        views = self.views
        if views is not None:
            left, counts = ~out[views.positions], np.diff(views.starts)
            features = views.features[np.repeat(left, counts)]
            starts = np.concatenate([[0], np.cumsum(counts[left])])
            views = Views((np.cumsum(~out) - 1)[views.positions[left]], features, starts)
        shots = self.shots.take(np.flatnonzero(~out))
        own = replace(self, encoder=encoder, backbone=backbone, shots=shots, ids=self.ids[~out], views=views)
        return own, self.shots.take(np.flatnonzero(out))

    def batches(self, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of pixels or features and their class ids, with one view of each shot per epoch."""
        random = np.random.default_rng((recipe.seed, epoch))
        fresh = f"fresh/{recipe.seed}/{epoch}"
        if "visual" in recipe.train:
            order = random.permutation(len(self.shots))
            for positions, pixels in self.encoder.pixels(self.shots.take(order), fresh, recipe.batch):
                yield pixels, torch.from_numpy(self.ids[order[positions]])
            return
        views = self.views or replace(self.encoder, cache=None).encode_views(self.shots, [fresh])
        rows = views.starts[:-1] + random.integers(0, np.diff(views.starts))
        order = random.permutation(len(rows))
        for start in range(0, len(order), recipe.batch):
            batch = order[start : start + recipe.batch]
            ids = self.ids[views.positions[batch]]
            yield torch.from_numpy(views.features[rows[batch]]), torch.from_numpy(ids)

    def steps(self, recipe: Recipe) -> int:
        return math.ceil(len(self.shots if self.views is None else self.views.positions) / recipe.batch)

    def encode_queries_again(self, cache: CacheModel) -> None:
        if self.val is not None:
            self.queries = search_hp.on_validation(cache, self.val, self.encoder)


class _Run:
    """A training run. ``told`` identifies the run in a checkpoint."""

    def __init__(
        self, cache: CacheModel, material: _Material, recipe: Recipe, told: Mapping[str, object] | None = None,
        compared: Comparison | None = None, on_epoch: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.material, self.recipe = cache, material, recipe
        self.told, self.compared = dict(told or {}), compared
        self.on_epoch = on_epoch or (lambda _: None)
        self.trainer = Trainer(cache, recipe, material.backbone)
        self.epoch, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.untrained = self.trainer.trained()
        self.kept_epoch, self.kept = 0, self.untrained
        self.collapsed: str | None = None

    def train(self, checkpoint: Path | None = None) -> None:
        began = time.monotonic() - self.seconds
        if not self.curve:
            self._record(math.nan, math.nan)
            self.on_epoch(dict(self.curve[-1]))
        hidden = None if self.material.encoder.progress else True
        done = self.epoch * self.steps // self.recipe.epochs
        with tqdm(total=self.steps, initial=done, unit="step", disable=hidden, leave=False) as bar:
            while self.epoch < self.recipe.epochs and self.collapsed is None:
                self._one_epoch(bar)
                self.seconds = time.monotonic() - began
                self.curve[-1]["seconds"] = self.seconds
                self.on_epoch(dict(self.curve[-1]))
                if checkpoint is not None:
                    self._write(checkpoint)
        self._settle()

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.material.steps(self.recipe)

    def _one_epoch(self, bar: tqdm[NoReturn]) -> None:
        loss, right, seen = 0.0, 0, 0
        first = self.epoch * self.material.steps(self.recipe)
        for step, (queries, ids) in enumerate(self.material.batches(self.recipe, self.epoch), first):
            mean, hits = self.trainer.step(queries, ids, cosine(step, self.steps, self.recipe.lr))
            loss, right, seen = loss + mean * len(ids), right + hits, seen + len(ids)
            bar.update()
            bar.set_postfix(loss=f"{loss / seen:.3f}", accuracy=f"{right / seen:.3f}", epoch=self.epoch + 1)
            if not math.isfinite(mean):
                self.collapsed = f"the loss is not finite in epoch {self.epoch + 1}"
                break
        self.epoch += 1
        self.trainer.refresh()
        if self.collapsed is None and not math.isfinite(self.trainer.loss(queries, ids)):
            self.collapsed = f"the loss is not finite after epoch {self.epoch}"
        self._record(loss / max(seen, 1), right / max(seen, 1))

    def _record(self, loss: float, accuracy: float) -> None:
        row: dict[str, float] = {"epoch": self.epoch, "loss": loss, "accuracy": accuracy, "seconds": self.seconds}
        row["val_loss"], row["val_accuracy"] = self._validate() if self.collapsed is None else (math.nan, math.nan)
        self.curve.append(row)
        if self.epoch and self.material.queries is not None and not math.isfinite(row["val_loss"]):
            self.collapsed = self.collapsed or f"the validation loss is not finite after epoch {self.epoch}"
        trained = self.curve[1:]
        if self.collapsed is None and len(trained) > 1:
            most = max(earlier["accuracy"] for earlier in trained[:-1])
            if accuracy < COLLAPSE * most and loss > trained[0]["loss"]:
                self.collapsed = f"in epoch {self.epoch} accuracy on the shots fell from {most:.3f} to {accuracy:.3f}"
        if self.collapsed is None and self._is_kept():
            self.kept_epoch, self.kept = self.epoch, self.trainer.trained()

    def _is_kept(self) -> bool:
        """Return whether the latest validation accuracy is within one standard error of the best."""
        if self.material.queries is None:
            return True
        best = max(row["val_accuracy"] for row in self.curve)
        error = math.sqrt(best * (1 - best) / len(self.material.queries.ids))
        return bool(self.curve[-1]["val_accuracy"] >= best - error)

    def _settle(self) -> None:
        """Keep the untrained state if no epoch was more accurate."""
        if self.material.queries is not None:
            first, *later = [(row["val_accuracy"], -row["val_loss"]) for row in self.curve]
            if all(not other > first for other in later):
                self.kept_epoch, self.kept = 0, self.untrained

    def _validate(self) -> tuple[float, float]:
        if "visual" in self.recipe.train:
            self.material.encode_queries_again(self.cache)
        queries = self.material.queries
        if queries is None:
            return math.nan, math.nan
        features, ids = (torch.from_numpy(part).to(self.cache.device) for part in (queries.features, queries.ids))
        return self.trainer.evaluate(features, ids)

    def _write(self, place: Path) -> None:
        """Write a checkpoint. If writing fails, the previous file is kept."""
        state: Checkpoint = {name: getattr(self, name) for name in STATE}
        state |= {"now": self.trainer.trained(), "optimizer": self.trainer.optimizer.state_dict()}
        state |= {"told": self.told, "precision": self.recipe.precision}
        state |= {"compared": self.compared and asdict(self.compared)}
        with replacing(place) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # for example, a full disk
                raise InputError(f"{show(place)}: cannot be written: {first_line(error)}") from None

    def restore(self, state: Checkpoint, place: Path) -> None:
        """Continue from a checkpoint. Raises UsageError or InputError if it does not fit this run."""
        if other := [part for part, ours in self.told.items() if ours != state["told"].get(part)]:
            raise UsageError(f"{show(place)}: of a run with another {', '.join(other)}; start over without --resume")
        try:
            self.trainer.restore(state["now"])
            self.trainer.optimizer.load_state_dict(state["optimizer"])
            for name in STATE:
                setattr(self, name, state[name])
        except Exception as error:
            raise _unfit(place, error) from None

    def result(self, parent: str) -> Tuned:
        trainer, backbone = self.trainer, self.trainer.backbone
        trainer.restore(self.kept)
        keys, ids = trainer.keys.cpu().numpy().astype(self.cache.keys.dtype), self.cache.class_ids.cpu().numpy()
        encoders, record = trainer.encoders(), self._facts(parent)
        kept = {name: value for name, value in self.cache.provenance.items() if name != "temperature"}
        cache = replace(
            self.cache,
            keys=keys,
            values=trainer.values,
            text_weights=trainer.text_weights,
            index=index_over(keys, ids, len(self.cache.class_names), self.cache.index.factory, self.cache.device),
            settings=replace(self.cache.settings, temperature=1.0),
            backbone=backbone.identity if encoders and backbone is not None else self.cache.backbone,
            provenance=kept | {"alpha": "finetune", "beta": "finetune", "finetune": record},
            curve=pa.Table.from_pylist(self.curve, schema=CURVE),
            version=None,
        )
        choice = None
        if "visual" in self.recipe.train:
            self.material.encode_queries_again(self.cache)
        if self.material.queries is not None:
            settings = (cache.settings.alpha, cache.settings.beta)
            choice = search_hp.search(cache, self.material.queries, cautious=True, kept=settings)
            search_hp.apply(cache, choice)
        curve = cast(pa.Table, cache.curve)
        return Tuned(cache, self.kept_epoch, curve, self.collapsed, choice, backbone, encoders, record)

    def _facts(self, parent: str) -> dict[str, object]:
        queries = self.material.queries
        recipe = asdict(self.recipe) | {"train": list(self.recipe.train)}
        run = {"epoch": self.kept_epoch, "collapsed": self.collapsed, "seconds": round(self.seconds, 3)}
        sources = {"shots": self.material.shots.name, "val": None if queries is None else queries.name}
        settings = {"alpha": self.cache.settings.alpha, "beta": self.cache.settings.beta}
        return {"parent": parent, "parent_version": self.cache.version} | recipe | settings | run | sources


def _told(cache: CacheModel, material: _Material, recipe: Recipe) -> dict[str, object]:
    queries, views, backbone = material.queries, material.views, material.backbone
    parts = [cache.keys, cache.class_ids.cpu().numpy(), cache.text_weights.cpu().numpy(), material.ids]
    parts += [] if views is None else [views.features, views.starts]
    parts += [] if queries is None else [queries.features, queries.ids]
    parts += [] if cache.values is None else [cache.values.cpu().numpy()]
    digest = hashlib.sha256()
    for array in parts:
        digest.update(np.ascontiguousarray(array).data)
    if views is None:  # fresh views do not have features yet
        digest.update("\n".join(material.shots.sources).encode("utf-8", "surrogatepass"))
    told = asdict(recipe) | {"train": list(recipe.train), "index, shots or validation images": digest.hexdigest()}
    told |= {name: getattr(cache.settings, name) for name in ("alpha", "beta", "logit_scale")}
    return told | {"device": cache.device, "backbone": None if backbone is None else backbone.identity.fingerprint}


def _settings(cache: CacheModel, material: _Material, recipe: Recipe) -> tuple[float, float]:
    own = (cache.settings.alpha, cache.settings.beta)
    statistics = measure(cache.keys, cache.class_ids.cpu().numpy())
    given = recipe.alpha is not None or recipe.beta is not None
    if recipe.settings == "own" or given or material.queries is None or statistics is None or recipe.encoders:
        return own
    beta = FLATTER / statistics.std
    alpha = _fitting_alpha(cache.with_settings(cache.settings.override(beta=beta)), material.queries)
    trial = replace(recipe, epochs=math.ceil(recipe.epochs * TRIAL))
    results = []
    for settings in [own, *((times * alpha, beta) for times in STRONGER)]:
        run = _Run(cache.with_settings(cache.settings.override(alpha=settings[0], beta=settings[1])), material, trial)
        run.train()
        finite = [(row["val_accuracy"], -row["val_loss"]) for row in run.curve if row["val_loss"] < math.inf]
        results.append((max(finite, default=(-1.0, -math.inf)), settings))
    return max(results)[1]


def _fitting_alpha(cache: CacheModel, queries: search_hp.Queries) -> float:
    terms, settings = cache.terms(queries.features, "all"), cache.settings
    ids = torch.from_numpy(queries.ids).to(cache.device)
    alphas = [float(alpha) for alpha in np.geomspace(1e-3, 1e6, 91)]
    return min(
        alphas, key=lambda alpha: float(functional.cross_entropy(terms.logits(replace(settings, alpha=alpha)), ids))
    )


def _check_length(cache: CacheModel, name: str, d: int) -> None:
    if d != cache.d:
        raise InputError(f"{name}: features have {d} values; the index needs {cache.d}")


def _in_training(cache: CacheModel, encoder: Encoder, recipe: Recipe) -> tuple[Encoder, TorchBackbone | None]:
    """Return the encoder for the run, and the copy of its backbone that is trained, if any."""
    parts = recipe.encoders
    if not parts:
        return encoder, None
    if encoder.backbone is None:
        raise UsageError(f"train {parts[0]}: there is no encoder; give the shots as images, and give --model")
    if "text" in parts and not cache.templates:
        raise UsageError(
            "train text: the index has no templates, since its text weights come from a table; train other parts"
        )
    backbone = cast(TorchBackbone, encoder.backbone).copy_to_train()
    # encodings from an encoder in training must not be stored in the encoding cache
    return (replace(encoder, backbone=backbone, cache=None) if "visual" in parts else encoder), backbone


@contextmanager
def _repeatable(device: str) -> Iterator[None]:
    """Make sums on a GPU deterministic. Attention uses the plain kernel for the same reason."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
