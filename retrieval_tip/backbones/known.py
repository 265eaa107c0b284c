"""Remember the properties of a model until its files change, so that unchanged models are loaded on first use."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from retrieval_tip.backbones.base import Identity, digest_of
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.files import cache_folder, make_folders, read_regular, replacing
from retrieval_tip.machine import version_of
from retrieval_tip.wording import first_line, show

log = logging.getLogger(__name__)

FORM = 3  # version of the stored records
PACKAGES = (
    "open_clip_torch",
    "timm",
    "transformers",
    "tokenizers",
)  # they determine what is read from the same files
RECORD_BYTES = 1 << 20  # largest record that is read

Names = tuple[str, str | None]
"""The names of a model and of its weights."""


@dataclass(frozen=True)
class Files:
    """The files that a model is loaded from, and all files in its folders. Create this object before loading them.

    ``digest`` is computed from the paths, sizes and times of the files, and from the versions of :data:`PACKAGES`. It
    is ``None`` if a file is missing. A program can set the time when a file was modified, but not the time when its
    status changed, which is also in the digest.
    """

    places: tuple[str, ...]
    digest: str | None

    @classmethod
    def of(cls, *places: str | Path) -> Files:
        """Look at files and folders."""
        paths = tuple(dict.fromkeys(str(Path(place).absolute()) for place in places))
        stamps: list[object] = [(name, version_of(name)) for name in PACKAGES]
        try:
            for place in map(Path, paths):
                files = [place]
                if place.is_dir():
                    files = sorted(file for file in place.iterdir() if file.is_file())
                for path in files:
                    facts = path.stat()
                    changed = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
                    stamps.append((str(path), os.path.realpath(path), *changed))
        except OSError:
            return cls(paths, None)
        return cls(paths, digest_of([stamps]))

    def are_unchanged(self) -> bool:
        """Return whether all files are still there and have not changed."""
        return self.digest is not None and Files.of(*self.places) == self


@dataclass(frozen=True)
class Known:
    """The properties of a model, and its files, if they are known."""

    identity: Identity
    dim: int
    logit_scale: float
    has_text: bool
    files: Files | None


def recall(model: str, pretrained: str | None) -> tuple[Names, Known] | None:
    """Return what was stored by :func:`remember` for these names, or ``None`` if any file of the model has changed."""
    path = _record(model, pretrained)
    if path is None:
        return None
    try:
        record = json.loads(read_regular(path, RECORD_BYTES))
        (name, tag) = record["names"]
        files = Files(tuple(record["places"]), record["digest"])
        known = Known(
            Identity.from_dict(record["identity"]),
            int(record["dim"]),
            float(record["logit_scale"]),
            bool(record["has_text"]),
            files,
        )
        return ((name, tag), known) if files.are_unchanged() else None
    except FileNotFoundError:
        return None
    except (OSError, RetrievalTipError, ValueError, TypeError, KeyError) as error:
        log.info("%s: cannot be used (%s); loading the model", show(path), first_line(error))
        return None


def remember(model: str, pretrained: str | None, names: Names, known: Known) -> None:
    """Store the properties of a model under the names that it was loaded by. ``names`` load it in any folder."""
    path = _record(model, pretrained)
    if path is None or known.files is None or not known.files.are_unchanged():
        return
    record = {
        "names": names,
        "identity": known.identity.to_dict(),
        "dim": known.dim,
        "logit_scale": known.logit_scale,
        "has_text": known.has_text,
    }
    try:
        make_folders(path.parent)
        with replacing(path) as new:
            new.write_text(json.dumps(record | vars(known.files)), encoding="utf-8")
    except (OSError, RetrievalTipError, ValueError) as error:
        log.info("%s: cannot be stored (%s)", show(path), first_line(error))


def _record(model: str, pretrained: str | None) -> Path | None:
    """Return the path of the record of a model. The meaning of relative names depends on the current folder."""
    places = (model.partition(":")[2], (pretrained or "").rpartition("=")[2])
    here = [os.path.realpath(place) for place in places if os.path.exists(place)]  # noqa: PTH110 - any name will do
    hub = [os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE")]
    caches = cache_folder()
    name = digest_of([FORM, model, pretrained, here, hub])[:16]
    return None if caches is None else caches / "backbones" / f"{name}.json"
