"""From labelled images or features to an index."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_tip.answering import AnsweringIndex
from retrieval_tip.backbones.base import resolve_device
from retrieval_tip.backbones.prompts import DEFAULT_TEMPLATES, check_templates, text_weights
from retrieval_tip.data.encoder import Encoder
from retrieval_tip.data.feature_tables import same_backbone, table_identity
from retrieval_tip.data.sources import Source, open_source, spelled_alike
from retrieval_tip.errors import SHOWN, UsageError, few
from retrieval_tip.index import places
from retrieval_tip.index.items import Asked, Fit, Material, Words, draw_shots, identity_of, ids_in, read_text_table
from retrieval_tip.index.places import Place
from retrieval_tip.settings import Dtype, FitName, KeysMet, MetricName, Normalize, Settings, ValuesName, check_choice

log = logging.getLogger(__name__)


def build_index(
    source: Source,
    out: Place,
    encoder: Encoder,
    *,
    shots: int | None = None,
    templates: Sequence[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    index: str | None = None,
    dtype: Dtype = "float32",
    alpha: float | None = None,
    beta: float | None = None,
    normalize: Normalize | None = None,
    fit: FitName | None = None,
    metric: MetricName | None = None,
    values: ValuesName | None = None,
    k: KeysMet = None,
    logit_scale: float | None = None,
    device: str = "auto",
) -> AnsweringIndex:
    """Build an index from a labelled source, as a new version where there is one already.

    Features stream from the encoder into the store, so a feature table may be larger than memory.

    Args:
        source: labelled images or features (see :func:`sources.open_source`).
        out: the index folder, or the address of another store (:mod:`index.addresses`).
        encoder: backbone, views, seed and caching; ``encoder.skipped`` names the images that could not be read.
        shots: draw so many a class by the published rule with the encoder's seed; ``None`` takes every item.
        templates: prompts for the text weights, with ``{}`` for the class name (needs a backbone).
        text: a feature table of prompts instead, one or more a class; its classes, in its order, are the index's.
        index: FAISS factory string, ``Classes`` or ``auto`` (:func:`keys.auto_for`), by default ``Flat``; of another
            store one of its own types, by default ``auto``.
        dtype: of the stored keys.
        alpha: residual ratio.
        beta: sharpness.
        normalize: units of alpha and beta (:func:`defaults.plain_settings`), by default the paper's if one of them is
            given: the other is then 1.0 or 5.5. Else they follow from the shots' affinities (``both``).
        fit: ``auto``: :func:`closed_form.fit`; ``none``: Tip-Adapter, the default if alpha, beta or normalize is given.
        metric: ``none`` or ``within``, and
        values: ``one-hot`` or ``solved``, if the fit is not to choose.
        k: keys that a query uses by default, or ``all``; ``None`` follows ``index="auto"``, else it is all.
        logit_scale: the backbone's own by default, 100 without one.
        device: of the classifier that is returned, for which ``auto`` chooses an index.

    Raises InputError, UsageError and BackboneError, as their messages say, and StoreError if the place cannot be
    written, or another process writes it; then nothing was changed.
    """
    check_choice("dtype", dtype, Dtype)
    scale = logit_scale if logit_scale is not None or encoder.backbone is None else encoder.backbone.logit_scale
    asked = _asked(Settings().override(alpha=alpha, beta=beta, logit_scale=scale, k=k), alpha, beta, normalize, k)
    fitted = Fit(metric, values) if _fits(fit, (metric, values), (alpha, beta, normalize)) else None
    words = _text(source, encoder, templates, text)
    source, ids = _drawn(source, words.class_names, text, shots, encoder.seed)
    made = places.at(out).create(
        Material(
            source=source,
            encoder=encoder,
            ids=ids,
            words=words,
            asked=asked,
            shots=shots,
            index=index,
            dtype=dtype,
            fit=fitted,
            device=resolve_device(device),
        )
    )
    warn_of_spelling(out, words.class_names, words.class_names)
    return made


def _drawn(
    source: Source, class_names: Sequence[str], text: str | os.PathLike[str] | None, shots: int | None, seed: int
) -> tuple[Source, npt.NDArray[np.int64]]:
    """The items that become keys, and their class ids ``[m]``."""
    source = source.known_as(class_names)
    ids = ids_in(source, class_names)
    _warn_of_layout(source, class_names, text)
    if shots is None:
        return source, ids
    drawn = draw_shots(ids, class_names, shots, seed)
    return source.take(drawn), ids[drawn]


def _asked(
    settings: Settings, alpha: float | None, beta: float | None, normalize: Normalize | None, k: KeysMet
) -> Asked:
    form = normalize or ("both" if alpha is None and beta is None else "none")
    check_choice("normalize", form, Normalize)
    return Asked(settings, alpha, beta, form, k is not None)


def _fits(fit: FitName | None, letters: Sequence[str | None], settings: Sequence[float | str | None]) -> bool:
    """Whether a build fits. Raises UsageError for what does not go together."""
    if fit is not None:
        check_choice("fit", fit, FitName)
    given, wanted = any(setting is not None for setting in settings), any(letter is not None for letter in letters)
    if given and (fit == "auto" or wanted):
        raise UsageError("fit: finds alpha and beta itself; leave out alpha, beta and normalize, or the fit")
    if fit == "none" and wanted:
        raise UsageError("fit none: has neither metric nor values to choose")
    return not given and fit != "none"


def _warn_of_layout(source: Source, class_names: Sequence[str], text: str | os.PathLike[str] | None) -> None:
    """Say what a source probably should not be: of one class, of one photograph here and there, or the text."""
    counts = Counter(source.labels)
    if len(counts) == 1:
        log.warning("%s: holds one class only, %s: every answer will be that", source.name, class_names[0])
    single = [name for name, number in counts.items() if number == 1]
    if single and len(single) < len(counts):
        log.warning("%s: one photograph only of %s: nothing tells how well it is known", source.name, few(single))
    if text is not None and source.table is not None and len(single) == len(counts):
        rows = len(open_source(text))
        if rows > len(source):
            log.warning("%s has a row a class, and --text %s rows: have they been swapped?", source.name, f"{rows:,}")


def _text(
    source: Source, encoder: Encoder, templates: Sequence[str] | None, text: str | os.PathLike[str] | None
) -> Words:
    """The classes and their text weights: from a table, from prompts, or none."""
    if text is not None:
        if templates:
            raise UsageError("text and templates: give one of them; a text table already holds the prompts' features")
        class_names, weights = read_text_table(text, encoder.norms)
        theirs, ours = table_identity(Path(text)), identity_of(source, encoder)
        if theirs is not None and ours is not None:
            same_backbone(theirs, ours, str(text))
        return Words(class_names, weights, [], str(text))
    if encoder.backbone is not None and (templates or encoder.backbone.has_text):
        prompts = list(check_templates(templates or DEFAULT_TEMPLATES))
        weights = text_weights(encoder.backbone, source.class_names, prompts)
        return Words(source.class_names, weights, prompts, "templates")
    if templates:
        raise UsageError("templates: text weights from templates need a backbone; give --model")
    if encoder.backbone is not None:  # an image encoder alone was asked for
        return Words(source.class_names, None, [], None)
    log.warning("no text weights (neither --text nor --model): the classes are told apart by the cache alone")
    return Words(source.class_names, None, [], None)


def warn_of_spelling(place: Place, class_names: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Warn of ``new`` classes that are spelled almost as one before them is, and return these pairs."""
    pairs = spelled_alike(class_names)
    alike = {name: pairs[name] for name in new if name in pairs}
    for name, known in itertools.islice(alike.items(), SHOWN):
        rename = shlex.join(["retrieval-tip", "index", "rename", str(place), name, known])
        log.warning("%r is a new class beside %r; if they are one: %s", name, known, rename)
    if len(alike) > SHOWN:
        log.warning("%d more new classes are spelled almost as others are", len(alike) - SHOWN)
    return alike
