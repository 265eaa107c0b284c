"""Remember the properties of a model by the contents of its files, so that unchanged models are loaded on first use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from retrieval_tip.backbones.base import Identity
from retrieval_tip.errors import RetrievalTipError, first_line, show, version_of
from retrieval_tip.files import cache_folder, make_folders, open_regular, read_regular, replacing, sha256_of

log = logging.getLogger(__name__)

FORM = 1  # version of the stored records
PACKAGES = ("open_clip_torch", "timm", "transformers", "tokenizers")  # they determine what is read from the same files
MOST_BYTES = 8 << 30  # larger models are loaded, because hashing them would take as long
RECORD_BYTES = 1 << 20  # largest record that is read


@dataclass(frozen=True)
class Known:
    """A model that has not been loaded: the canonical ``names`` and the ``digest`` of its files."""

    names: tuple[str, str | None]
    identity: Identity
    dim: int
    logit_scale: float | None = None
    digest: str | None = None


class Files:
    """The files that a model is loaded from, and all files in its folders. Create this object before loading them."""

    def __init__(self, *places: str | Path) -> None:
        self.places = list(dict.fromkeys(str(Path(place).absolute()) for place in places))
        self._stamps = self._stamped()

    def digest(self) -> str | None:
        """Return a digest of the contents and paths of the files, and of the versions of :data:`PACKAGES`.

        Return ``None`` if a file is missing, is not a regular file, or has changed since this object was created, or if
        the files exceed ``MOST_BYTES``.
        """
        stamps = self._stamps
        if not stamps or sum(size for _, _, size, *_ in stamps) > MOST_BYTES:
            return None
        try:
            contents = [(path, target, sha256_of(Path(path))) for path, target, *_ in stamps]
        except OSError:
            return None
        versions = [(name, version_of(name)) for name in PACKAGES]
        return None if self._stamped() != stamps else _sha256(contents, versions)

    def _stamped(self) -> list[tuple[str, str, int, int, int, int]] | None:
        stamps = []
        try:
            for place in map(Path, self.places):
                for path in sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]:
                    with open_regular(path) as file:
                        facts = os.fstat(file.fileno())
                    changed = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino
                    stamps.append((str(path), os.path.realpath(path), *changed))
        except (OSError, RetrievalTipError):
            return None
        return stamps


def recall(model: str | None, pretrained: str | None) -> Known | None:
    """Return what was stored by :func:`remember` for these names, or ``None`` if any file of the model has changed."""
    path = _record(model, pretrained)
    if path is None:
        return None
    try:
        record = json.loads(read_regular(path, RECORD_BYTES))
        name, tag = record["names"]
        identity, digest = Identity.from_dict(record["identity"]), Files(*record["places"]).digest()
        known = Known((name, tag), identity, int(record["dim"]), float(record["logit_scale"]), digest)
    except FileNotFoundError:
        return None
    except (OSError, RetrievalTipError, ValueError, TypeError, KeyError) as error:
        log.info("%s: cannot be used (%s); loading the model", show(path), first_line(error))
        return None
    return known if digest is not None and digest == record["digest"] else None


def remember(model: str | None, pretrained: str | None, known: Known, files: Files) -> None:
    """Store the properties of a model under the names that it was loaded by."""
    path = _record(model, pretrained)
    if path is None or known.digest is None:
        return
    record = vars(known) | {"identity": known.identity.to_dict(), "places": files.places}
    try:
        make_folders(path.parent)
        with replacing(path) as new:
            new.write_text(json.dumps(record), encoding="utf-8")
    except (OSError, RetrievalTipError, ValueError) as error:
        log.info("%s: cannot be stored (%s)", show(path), first_line(error))


def _record(model: str | None, pretrained: str | None) -> Path | None:
    """Return the path of the record of a model. The meaning of relative names depends on the current folder."""
    try:
        here = str(Path.cwd())
        scheme, _, folder = (model or "").partition(":")
        model = f"{scheme}:{os.path.realpath(folder)}" if scheme in ("local-dir", "hf") else model
    except OSError:  # the current folder has been removed
        return None
    hub = [os.environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE")]
    caches, name = cache_folder(), _sha256(FORM, model, pretrained, here, hub)[:16]
    return None if caches is None else caches / "backbones" / f"{name}.json"


def _sha256(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
