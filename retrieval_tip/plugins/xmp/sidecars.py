"""Write keywords into the XMP sidecars of photos, and undo it.

Before a sidecar changes, its bytes and the digest of the new ones are written to a record in the user's cache folder.
After a kill, each sidecar is therefore the old one or the new one, and both can be restored.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from retrieval_tip.data.source import file_of
from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.files import cache_folder, read_regular, real
from retrieval_tip.labelling import placing
from retrieval_tip.labelling.sort import locked, skipping
from retrieval_tip.levels import Levels
from retrieval_tip.plugins.xmp import documents
from retrieval_tip.plugins.xmp.documents import Keywords
from retrieval_tip.wording import counted
from retrieval_tip.writers import Outcome


def write_sidecars(photos: Mapping[str, Keywords]) -> Outcome:
    """Merge keywords into the sidecars of photos (see :func:`documents.merged`), and return how many changed.

    The sidecar of ``a.jpg`` is ``a.jpg.xmp``, or an existing ``a.xmp`` if no other file is called ``a``. Sidecars that
    cannot be changed are ``skipped``. An interrupted call can be repeated.

    Raises InputError if the disk is full. The sidecars are then complete, either old or new.
    """
    changed = 0
    skipped = list[Skipped]()
    places = {_place(name): keywords for name, keywords in photos.items()}
    with _records(places) as records:
        others = (
            other for folder in {photo.parent for photo in places} for other in folder.iterdir()
        )
        called = Counter(
            other.with_suffix("") for other in others if other.suffix.lower() != ".xmp"
        )
        for photo, keywords in places.items():
            own, short = _sidecars(photo)
            is_shared = called[photo.with_suffix("")] > 1
            sidecar = (
                own if os.path.lexists(own) or is_shared or not os.path.lexists(short) else short
            )
            with skipping(sidecar, "cannot be changed", skipped):
                old = _bytes_of(sidecar)
                new = documents.merged(old, keywords)
                if new is not None and new != old:
                    if len(new) > documents.MOST_BYTES:
                        raise InputError(f"would have more than {documents.MOST_BYTES:,} bytes")
                    _record(_record_of(sidecar, records), old, new)
                    _replace(sidecar, old, new)
                    changed += 1
    return Outcome(f"changed the keywords of {counted(changed, 'photo')}", skipped)


def write_labels(labels: Iterable[tuple[str, str | None]], groups: Levels | None) -> Outcome:
    """Write the labels of photos as keywords (see :func:`write_sidecars`). A photo can have several labels, or none.

    If an index has groups, each keyword gets its path through them, such as ``animal|bird``. darktable ignores keywords
    without a hierarchy if others have one, so each gets one.
    """
    photos: dict[str, list[str]] = {}
    for path, label in labels:
        own = photos.setdefault(file_of(path), [])
        if label and label not in own:
            own.append(label)
    return write_sidecars(
        {
            path: Keywords(own, ["|".join(groups.path(label)) for label in own] if groups else [])
            for path, own in photos.items()
        }
    )


def undo_sidecars(photos: Iterable[str]) -> Outcome:
    """Restore the sidecars of photos to their state before :func:`write_sidecars` first changed them.

    Sidecars that have changed since are ``skipped``.
    """
    places = dict.fromkeys(_place(file_of(photo)) for photo in photos)
    restored = 0
    skipped = list[Skipped]()
    with _records(places) as records:
        for sidecar in dict.fromkeys(one for photo in places for one in _sidecars(photo)):
            record = _record_of(sidecar, records)
            with skipping(sidecar, "cannot be changed", skipped):
                if record.exists():
                    (before, after) = _read_record(record)
                    now = _bytes_of(sidecar)
                    if _digest(now) in after:
                        _replace(sidecar, now, before)
                        restored += 1
                    elif now != before:
                        raise InputError("has changed since, and is kept")
                    record.unlink()
    return Outcome(f"restored the keywords of {counted(restored, 'photo')}", skipped)


@contextmanager
def _records(photos: Iterable[Path]) -> Iterator[Path]:
    """Lock and yield the folder of the records, after removing the temporary files of killed processes."""
    if (caches := cache_folder()) is None:
        raise InputError(
            "there is no home folder to keep the old sidecars in; set RETRIEVAL_TIP_CACHE to a folder"
        )
    with locked(caches / "sidecars"):
        placing.remove_scratch([caches / "sidecars", *(photo.parent for photo in photos)])
        yield caches / "sidecars"


def _place(name: str) -> Path:
    return real(Path(name).parent) / Path(name).name


def _sidecars(photo: Path) -> tuple[Path, Path]:
    return photo.with_name(f"{photo.name}.xmp"), photo.with_name(f"{photo.stem}.xmp")


def _bytes_of(sidecar: Path) -> bytes | None:
    if sidecar.is_symlink():
        raise InputError("is a link; replace it by a file")
    return read_regular(sidecar, documents.MOST_BYTES) if os.path.lexists(sidecar) else None


def _digest(data: bytes | None) -> str:
    return "" if data is None else hashlib.sha256(data).hexdigest()


def _record_of(sidecar: Path, records: Path) -> Path:
    return records / hashlib.sha256(os.fsencode(sidecar)).hexdigest()


def _record(record: Path, old: bytes | None, new: bytes) -> None:
    """Add a change to the record of a sidecar, or begin one if somebody else has changed the sidecar since."""
    before = old
    after = list[str]()
    if record.exists() and _digest(old) in (known := _read_record(record))[1]:
        before, after = known
    head = " ".join(["absent" if before is None else "present", *after, _digest(new)])
    placing.write(f"{head}\n".encode() + (before or b""), record, partial(shutil.copymode, record))


def _read_record(record: Path) -> tuple[bytes | None, list[str]]:
    """Return the bytes of a sidecar before we first changed it, and the digests of what we wrote."""
    head, _, before = read_regular(record, 2 * documents.MOST_BYTES).partition(b"\n")
    was, _, after = head.decode("utf-8", "replace").partition(" ")
    return None if was == "absent" else before, after.split()


def _replace(sidecar: Path, old: bytes | None, new: bytes | None) -> None:
    if _bytes_of(sidecar) != old:
        raise InputError("was changed by another program at the same time; run the command again")
    if new is None:
        sidecar.unlink(missing_ok=True)
    else:
        placing.write(new, sidecar, partial(shutil.copymode, sidecar))
