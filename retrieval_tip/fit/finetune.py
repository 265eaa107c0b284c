"""Fine-tune the keys or the values of an index as in Tip-Adapter-F (paper, section 3.2).

Training minimises the cross-entropy of the method's own logits on augmented views of the shots. Random numbers depend
only on the seed and the epoch.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from retrieval_tip import tip
from retrieval_tip.arrays import FloatArray, IntArray, slices
from retrieval_tip.data.reader import Reader, view_names
from retrieval_tip.data.sources import Source, is_there, open_source
from retrieval_tip.errors import InputError
from retrieval_tip.files import make_folders
from retrieval_tip.fit import closed_form, search_hp
from retrieval_tip.fit.folds import Folds
from retrieval_tip.fit.forms import like
from retrieval_tip.fit.visible import Queries
from retrieval_tip.machine import check_memory
from retrieval_tip.model import Index
from retrieval_tip.retrieval.rows import ArrayRows
from retrieval_tip.settings import Recipe
from retrieval_tip.store.files import check_name
from retrieval_tip.wording import show

log = logging.getLogger(__name__)

BLOCK, GPU_BLOCK = 2048, 65536
"""Keys per block on a CPU, where a block should fit in the cache (benchmarks/gpu.py), and on a GPU."""
BATCH = 256
"""Number of queries per step, and per block of an evaluation."""
VIEWS = 16
"""Number of augmented views of each photo, which are encoded once. Each epoch draws one."""
EPSILON = 1e-4
"""Epsilon of AdamW, as in the paper's code."""
HELD_OUT, FOLDS = 1000, 4
"""Largest number of shots that are held out to evaluate training without validation images, and number of folds."""
CURVE = pa.schema(
    [("epoch", pa.int64())]
    + [(name, pa.float64()) for name in ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")]
)
"""Columns of a loss curve, which has one row per epoch. Row 0 describes the index before training. ``loss`` and
``accuracy`` are means over the epoch. The ``val_`` columns are measured on the validation images after the epoch, and
``seconds`` is the training time so far."""


class Trainer:
    """The trained parts of an index, together with their optimiser.

    ``keys`` is a float32 copy of the keys (shape ``[n, d]``). ``values`` is a copy of the values (shape ``[n, c]``), or
    ``None`` if they are one-hot.
    """

    def __init__(self, index: Index, recipe: Recipe) -> None:
        self.index = index
        self.keys = torch.from_numpy(np.array(index.keys, dtype=np.float32)).to(index.device)
        self.values = None if index.values is None else index.values.clone()
        if self.values is None and "values" in recipe.train:
            self.values = functional.one_hot(index.class_ids, len(index.class_names)).float()
        matrices = (("keys", self.keys), ("values", self.values))
        self._trained = {
            part: matrix.requires_grad_()
            for part, matrix in matrices
            if matrix is not None and part in recipe.train
        }
        self._block = BLOCK if index.device == "cpu" else GPU_BLOCK
        self._optimizer = torch.optim.AdamW(self._trained.values(), eps=EPSILON, fused=True)

    def step(self, features: Tensor, ids: Tensor, lr: float) -> tuple[float, int]:
        """Take one training step, and return the mean cross-entropy before the step and the number of right answers.

        ``features`` have shape ``[b, d]``, and ``ids`` are their class ids. If the cross-entropy is not finite, the
        step changes nothing.
        """
        logits = self._logits(features)
        ids = ids.to(self.index.device)
        loss = functional.cross_entropy(logits, ids)
        hits = (logits.argmax(dim=1) == ids).sum()
        value, right = torch.stack(
            [loss.detach(), hits.to(loss)]
        ).tolist()  # synchronises with the GPU only once
        if math.isfinite(value):
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.param_groups[0]["lr"] = lr
            self._optimizer.step()
        return value, int(right)

    @torch.no_grad()
    def evaluate(self, features: Tensor, ids: Tensor) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy on queries."""
        loss = 0.0
        right = 0
        ids = ids.to(self.index.device)
        for queries, labels in zip(features.split(BATCH), ids.split(BATCH), strict=True):
            logits = self._logits(queries)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
        return loss / len(ids), right / len(ids)

    def _logits(self, features: Tensor) -> Tensor:
        """Compute the logits of queries. The keys are processed in blocks, so that only the weights need ``n q``."""
        features = features.to(self.index.device)
        settings = self.index.settings
        c = len(self.index.class_names)
        cache = features.new_zeros(len(features), c)
        for block in slices(len(self.keys), self._block):
            affinity = tip.affinity(self.keys[block], features).T  # one row per key is faster
            values = None if self.values is None else tip.Values(self.values[block])
            ids = self.index.class_ids[block]
            cache = cache + tip.cache_logits(affinity, ids, c, settings.beta, values=values)
        text = tip.text_logits(features, self.index.retrieval.text, settings.logit_scale)
        return tip.Terms(text, cache).logits(settings)

    def trained(self) -> dict[str, Tensor]:
        """Return CPU copies of the trained matrices by name."""
        return {
            part: matrix.detach().to("cpu", copy=True) for part, matrix in self._trained.items()
        }


def cosine(step: int, steps: int, lr: float) -> float:
    """Return the learning rate of a step. It falls from ``lr`` to 0 as ``lr (1 + cos(pi step / steps)) / 2``."""
    return lr * (1 + math.cos(math.pi * step / steps)) / 2


class Comparison(NamedTuple):
    """Accuracy ``before`` training (with the index's own fit) and ``after``, on ``n`` unseen images from ``source``."""

    before: float
    after: float
    n: int
    source: str


@dataclass(frozen=True)
class Tuned:
    """The result of fine-tuning.

    - ``index``: the new index, which is written to disk by :meth:`save`. It is a copy of the given index if training
      did not help.
    - ``record``: a description of the run, with the ``epoch`` that was kept, or 0 if no epoch improved on the untrained
      index, and with ``collapsed``, which tells how training collapsed, or is ``None``
    - ``choice``: the result of the search for alpha and beta after training, or ``None`` if there are no validation
      images
    - ``compared``: the accuracy before and after training, as measured by :func:`finetune_into`, or ``None``
    """

    index: Index
    record: dict[str, Any]
    choice: search_hp.HyperparameterChoice | None
    compared: Comparison | None = None

    @property
    def as_it_was(self) -> bool:
        """Whether ``index`` is a copy of the given index, because training did not help."""
        return self.compared is not None and self.compared.after <= self.compared.before

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the index folder."""
        self.index.save(
            folder, "copy, since finetune did not help" if self.as_it_was else "finetune"
        )

    def facts(self) -> dict[str, object]:
        """Return the figures that the command line prints. A figure that was not measured is ``None``."""
        compared = self.compared
        settings = self.index.settings.shown()
        return {
            "version": self.index.version,
            "kept": "as it was" if self.as_it_was else "trained",
            **(dict.fromkeys(Comparison._fields) if compared is None else compared._asdict()),
            "trained": self.record["train"],
            "epoch": None if self.as_it_was else self.record["epoch"],
            **{name: settings[name] for name in ("alpha", "beta", "k")},
            **{name: self.record[name] for name in ("collapsed", "seconds")},
        }


def finetune_into(
    out: str | os.PathLike[str],
    index: Index,
    shots: Source,
    reader: Reader,
    recipe: Recipe | None = None,
    *,
    val: Source | Queries | None = None,
) -> Tuned:
    """Fine-tune an index, and write the result into the folder ``out``, or a copy of the index if that is better.

    The accuracy is measured on ``val``, or on held-out shots if ``val`` is not given (see :func:`_on_folds`).
    """
    check_name(Path(out))
    make_folders(Path(out).parent)
    recipe = recipe or Recipe()
    log.warning(
        "the closed-form fit is usually more accurate than fine-tuning; held-out photos decide which is kept"
    )
    encoded = _Shots.of(index, shots, reader, recipe, val)
    queries = encoded.queries
    tuned = _on_folds(index, encoded, recipe) if queries is None else None
    if tuned is None or not tuned.as_it_was:
        compared = None if tuned is None else tuned.compared
        tuned = replace(_trained(index, encoded, recipe), compared=compared)
    if queries is not None and tuned.choice is not None:
        before = _right(index, queries.features, queries.ids) / len(queries.ids)
        compared = Comparison(before, tuned.choice.accuracy, len(queries.ids), queries.name)
        tuned = replace(tuned, compared=compared)
    _warn(tuned)
    if (held := tuned.compared) is None:
        log.warning(
            "no photo could be held out to evaluate the training, since no class has two; give --val"
        )
    elif tuned.as_it_was:
        before, after, n, source = held
        figures = (
            f"{100 * before:.1f} % before training, {100 * after:.1f} % after (n={n}, {source})"
        )
        log.warning(
            "held-out accuracy: %s; training does not help, so %s is a copy of the index",
            figures,
            show(out),
        )
        tuned = replace(tuned, index=copy.copy(index), choice=None)
    else:
        tuned.record["held_out"] = held._asdict()
    tuned.save(out)
    return tuned


def finetune(
    index: Index,
    shots: Source,
    reader: Reader,
    recipe: Recipe | None = None,
    *,
    val: Source | Queries | None = None,
    on_epoch: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> Tuned:
    """Train an index by minimising the cross-entropy of ``logit_scale f W^T + alpha C`` (paper, equation 6).

    Args:
        index: The index, which is not changed. As in the paper, training starts from plain Tip-Adapter with the keys of
            the index. Any closed-form fit is ignored.
        shots: The index's own shots (:func:`shots_of`), as images or as a feature table of views. Rows with the same
            id are views of one shot.
        reader: The encoder that computes the features. Its ``views`` and ``seed`` are ignored.
        recipe: The training options.
        val: Labelled validation images, or their features. The latest epoch whose accuracy is within one standard error
            of the best is kept. If no epoch is better than the untrained index, the untrained index is kept. A cautious
            search then selects alpha and beta. If ``val`` is not given, the last epoch is kept and the settings do not
            change.
        on_epoch: A function that is called with each row of the curve, and once before training.

    Raises:
        UsageError: if the recipe does not fit the index, or if training does not fit in memory.
        InputError: if the shots or the validation images do not fit the index.
    """
    recipe = recipe or Recipe()
    tuned = _trained(index, _Shots.of(index, shots, reader, recipe, val), recipe, on_epoch)
    _warn(tuned)
    return tuned


def _trained(
    index: Index,
    shots: _Shots,
    recipe: Recipe,
    on_epoch: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> Tuned:
    """Train Tip-Adapter over the keys of an index, and keep the weights of one epoch (see :func:`finetune`)."""
    plain = closed_form.unfitted(index)
    queries = shots.queries
    began = time.monotonic()
    if plain.device == "cpu":
        size = min(BATCH, len(shots.ids))
        check_memory(
            4 * size * plain.n, f"steps of {size} queries x {plain.n} keys", "fine-tune fewer keys"
        )
    trainer = Trainer(plain, recipe)
    curve = list[dict[str, float]]()
    best = 0.0
    collapsed = None
    untrained = epoch, kept = 0, trainer.trained()
    for loss, accuracy, *held in _epochs(trainer, shots, recipe):
        row = {"epoch": len(curve), "loss": loss, "accuracy": accuracy}
        row["val_loss"], row["val_accuracy"] = (math.nan, math.nan) if queries is None else held
        row["seconds"] = time.monotonic() - began
        curve.append(row)
        on_epoch(dict(row))
        if not math.isfinite(held[0]):
            collapsed = f"the loss is not finite in epoch {len(curve) - 1}"
            break
        best = max(best, held[1])
        error = math.inf if queries is None else math.sqrt(best * (1 - best) / len(queries.ids))
        if held[1] >= best - error:
            epoch = len(curve) - 1
            kept = trainer.trained()
    first, *later = [(row["val_accuracy"], -row["val_loss"]) for row in curve]
    if queries is not None and not any(figures > first for figures in later):
        epoch, kept = untrained
    record: dict[str, Any] = {
        "parent": plain.place,
        "parent_version": plain.version,
        **asdict(recipe),
        "train": list(recipe.train),
        "alpha": plain.settings.alpha,
        "beta": plain.settings.beta,
        "epoch": epoch,
        "collapsed": collapsed,
        "seconds": round(curve[-1]["seconds"], 3),
        "shots": shots.source,
        "val": None if queries is None else queries.name,
    }
    keys = kept["keys"].numpy() if "keys" in kept else np.asarray(plain.keys)
    before = {name: value for name, value in plain.provenance.items() if name != "temperature"}
    made = replace(
        plain,
        rows=ArrayRows(keys.astype(plain.dtype), plain.labels, kept.get("values", plain.values)),
        factory=plain.index_type,
        settings=replace(plain.settings, temperature=1.0),
        provenance=before | {"alpha": "finetune", "beta": "finetune", "finetune": record},
        curve=pa.Table.from_pylist(curve, schema=CURVE),
    )
    choice = None if queries is None else search_hp.search(made, queries)
    if choice is not None:
        made = search_hp.apply(made, choice)
    return Tuned(made, record, choice)


def _epochs(
    trainer: Trainer, shots: _Shots, recipe: Recipe
) -> Iterator[tuple[float, float, float, float]]:
    """Train, and yield the loss and the accuracy before training, which are NaN, and of each epoch.

    Then come those after the epoch, on the validation images or on the last batch. They are NaN if a step fails.
    """
    val = shots.queries
    steps = math.ceil(len(shots.ids) / BATCH)
    held = None if val is None else (torch.from_numpy(val.features), torch.from_numpy(val.ids))
    yield math.nan, math.nan, *trainer.evaluate(*held or next(shots.batches(recipe, 0)))
    with tqdm(
        total=recipe.epochs * steps, unit="step", disable=not shots.progress or None, leave=False
    ) as bar:
        for epoch in range(recipe.epochs):
            loss = 0.0
            right = 0
            seen = 0
            for step, batch in enumerate(shots.batches(recipe, epoch), epoch * steps):
                mean, hits = trainer.step(*batch, cosine(step, recipe.epochs * steps, recipe.lr))
                loss = loss + mean * len(batch[1])
                right = right + hits
                seen = seen + len(batch[1])
                bar.update()
                bar.set_postfix(
                    loss=f"{loss / seen:.3f}", accuracy=f"{right / seen:.3f}", epoch=epoch + 1
                )
                if not math.isfinite(mean):
                    break
            after = (
                trainer.evaluate(*held or batch) if math.isfinite(mean) else (math.nan, math.nan)
            )
            yield loss / seen, right / seen, *after


def _warn(tuned: Tuned) -> None:
    epoch, collapsed = tuned.record["epoch"], tuned.record["collapsed"]
    if collapsed is not None:
        log.warning("training collapsed: %s; kept epoch %d", collapsed, epoch)
    elif epoch == 0:
        log.warning(
            "no epoch improved the accuracy on the validation photos; the keys stay untrained"
        )


def _on_folds(index: Index, shots: _Shots, recipe: Recipe) -> Tuned | None:
    """Compare an index before and after training on held-out shots, and return the last trained index.

    A quarter of each class is held out at a time, until :data:`HELD_OUT` shots have been evaluated. The result is
    ``None`` if no class has two photos.
    """
    folds = Folds.of(index).with_shots(FOLDS, HELD_OUT)
    sources = np.array(index.labels["source"].to_pylist(), dtype=object)
    right = [0, 0]
    n = 0
    seconds = 0.0
    tuned = None
    for held in folds.held:
        rest = index.take(held.rows.numpy())
        seen = shots.without(set(np.delete(sources, held.rows.numpy())))
        if not len(seen.ids):
            continue
        tuned = _trained(rest, seen, recipe)
        if index.fitted is not None and index.curve is None:
            rest, _ = closed_form.fit(rest, forms=like(index.fitted))
        for i, model in enumerate((rest, tuned.index)):
            right[i] += _right(model, held.features.numpy(), held.ids.numpy())
        n = n + len(held.ids)
        seconds = seconds + tuned.record["seconds"]
    if tuned is None:
        return None
    tuned.record["seconds"] = round(seconds, 3)
    return replace(
        tuned, compared=Comparison(right[0] / n, right[1] / n, n, "its own shots, held out")
    )


def _right(index: Index, features: FloatArray, ids: IntArray) -> int:
    return int((index.logits(features).argmax(1).cpu().numpy() == ids).sum())


def shots_of(index: Index, source: Source | None = None) -> Source:
    """Return the items of a source that are shots of the index. They are matched by path or id.

    By default, they come from the source of the index, as image paths or as rows of the feature table. Raises
    InputError if a shot is missing there, or if no item of the given source matches.
    """
    table = index.labels.select(["source", "label"])
    paths = table["source"].to_pylist()
    if source is None:
        missing = next((path for path in paths if not is_there(path)), None)
        origin = index.built.source
        if missing is None:
            return Source("the shots of the index", table, tuple(index.class_names), tuple(paths))
        if origin is None or not origin.endswith(".parquet") or not Path(origin).is_file():
            raise InputError(
                f"{missing}: no such file, though it is a shot of the index; give --source with the shots"
            )
        source = open_source(origin)
    names = set(paths)
    positions = [position for position, name in enumerate(source.sources) if name in names]
    if not positions:
        raise InputError(
            f"{source.name}: none of its {len(source)} items is a shot of the index; shots have names like "
            f"{min(names)!r}, its items like {source.sources[0]!r}"
        )
    return source.take(positions)


@dataclass(frozen=True)
class _Shots:
    """The ``views`` of each shot, ``[v, d]``, their ``names`` and class ``ids``, and the validation images.

    ``source`` is the name of the shots.
    """

    source: str
    names: Sequence[str]
    ids: IntArray
    views: Sequence[FloatArray]
    queries: Queries | None
    progress: bool

    @classmethod
    def of(
        cls,
        index: Index,
        shots: Source,
        reader: Reader,
        recipe: Recipe,
        val: Source | Queries | None,
    ) -> _Shots:
        reader = replace(reader, views=1)
        ids = index.ids_of(shots)
        views = reader.encode_views(shots, view_names(recipe.seed, VIEWS))
        first_rows = list(views)
        queries = search_hp.on_validation(index, val, reader) if isinstance(val, Source) else val
        checked = {shots.name: views[first_rows[0]]}
        if queries is not None:
            checked[queries.name] = queries.features
        for name, features in checked.items():
            if features.shape[1] != index.d:
                raise InputError(
                    f"{name}: features have {features.shape[1]} values; the index needs {index.d}"
                )
        names = shots.take(first_rows).sources
        matrices = list(views.values())
        return cls(shots.name, names, ids[first_rows], matrices, queries, reader.progress)

    def without(self, sources: set[str]) -> _Shots:
        """Return the shots without those whose source is in ``sources``."""
        left = [shot for shot, name in enumerate(self.names) if name not in sources]
        names = [self.names[shot] for shot in left]
        views = [self.views[shot] for shot in left]
        return replace(self, names=names, ids=self.ids[left], views=views)

    def batches(self, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of features and their class ids, with one view of each shot per epoch."""
        random = np.random.default_rng((recipe.seed, epoch))
        view = random.integers(0, [len(features) for features in self.views])
        order = random.permutation(len(self.ids))
        for batch in slices(len(order), BATCH):
            features = np.stack([self.views[shot][view[shot]] for shot in order[batch]])
            yield torch.from_numpy(features), torch.from_numpy(self.ids[order[batch]])
