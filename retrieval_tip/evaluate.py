"""How often an index is right: top-1 and top-5, by class, and each of its two parts alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from retrieval_tip import tip
from retrieval_tip.cache_model import CacheModel
from retrieval_tip.errors import InputError
from retrieval_tip.features import Encoder
from retrieval_tip.sources import Source

CONFUSIONS = 10


@dataclass(frozen=True)
class Evaluation:
    """Accuracies as fractions of the ``n`` items that could be read.

    ``top1`` and ``top5`` of the blended logits; ``zero_shot_top1`` of the text logits alone (``None`` without text
    weights) and ``cache_top1`` of the cache logits alone; ``per_class`` top-1 by label (of classes that occur);
    ``mean_per_class`` their mean; ``confusions`` the most frequent (label, predicted, count).
    """

    top1: float
    top5: float
    zero_shot_top1: float | None
    cache_top1: float
    mean_per_class: float
    n: int
    skipped: int
    alpha: float
    beta: float
    k: int | None
    tail: bool
    per_class: dict[str, float]
    confusions: list[tuple[str, str, int]]

    def to_dict(self) -> dict[str, Any]:
        """As ``evaluate --json`` prints it; ``k`` is ``"all"`` where every key is used."""
        return asdict(self) | {"k": self.k or "all"}


def evaluate(
    cache: CacheModel, source: Source, encoder: Encoder, *, k: int | None = None, tail: bool = True
) -> Evaluation:
    """Classify a labelled source and compare. ``k`` and ``tail`` as for :meth:`CacheModel.logits`.

    Raises InputError where the source has no items, or labels that are no class of the index.
    """
    position = {name: i for i, name in enumerate(cache.class_names)}
    labels = source.labels
    if not labels:
        raise InputError(f"{source.name}: has no items to evaluate")
    unknown = sorted(set(labels) - position.keys())
    if unknown:
        raise InputError(
            f"{source.name}: {len(unknown)} labels are no class of the index: {', '.join(unknown[:5])}; "
            f"its classes are {', '.join(cache.class_names[:5])}{' ...' if len(cache.class_names) > 5 else ''}"
        )
    truth = torch.tensor([position[label] for label in labels])
    parts: list[torch.Tensor] = []
    true: list[torch.Tensor] = []
    for block in encoder.blocks(source):
        text, alone = cache.terms(block.features, k, tail)
        ranked = tip.blend(text, alone, cache.alpha).topk(min(5, len(cache.class_names)), dim=1).indices
        parts.append(torch.cat([ranked, text.argmax(1, keepdim=True), alone.argmax(1, keepdim=True)], dim=1).cpu())
        true.append(truth[torch.from_numpy(block.positions)])
    y = torch.cat(true)
    found = torch.cat(parts)
    hits = found == y[:, None]
    right = hits[:, 0].numpy()
    classes = y.numpy()
    per_class = {cache.class_names[i]: float(right[classes == i].mean()) for i in np.unique(classes)}
    wrong = Counter(zip(classes[~right].tolist(), found[:, 0].numpy()[~right].tolist(), strict=True))
    return Evaluation(
        top1=float(right.mean()),
        top5=float(hits[:, :-2].any(dim=1).double().mean()),
        zero_shot_top1=float(hits[:, -2].double().mean()) if cache.has_text else None,
        cache_top1=float(hits[:, -1].double().mean()),
        mean_per_class=float(np.mean(list(per_class.values()))),
        n=len(y),
        skipped=len(encoder.skipped),
        alpha=cache.alpha,
        beta=cache.beta,
        k=k,
        tail=tail,
        per_class=per_class,
        confusions=[
            (cache.class_names[a], cache.class_names[b], times) for (a, b), times in wrong.most_common(CONFUSIONS)
        ],
    )
