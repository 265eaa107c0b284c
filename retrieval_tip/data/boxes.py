"""Read the boxes that a detector found in photos, from a file in MegaDetector's format."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retrieval_tip.data.images import Box
from retrieval_tip.data.sources import Source, of_images
from retrieval_tip.errors import InputError, Skipped, UsageError, show
from retrieval_tip.files import read_json

EMPTY = "empty"  # what is ``detected`` in a photo without boxes
LARGEST = 1 << 28  # largest file, in bytes
CONFIDENCE = 0.2  # smallest confidence of a box, if the file does not contain the typical threshold of its detector
SLACK = 0.01  # how far an edge may lie outside the photo, as detectors round


@dataclass(frozen=True)
class Cut:
    """Photos that were cut into boxes.

    Attributes:
        sources: the boxes, as items to encode with :class:`exif.Noting`.
        boxes: the photo and the edges of each item.
        detected: the category of each item, by its printable name.
        empty: the paths of the photos without boxes.
    """

    sources: list[Source] = field(default_factory=list)
    boxes: dict[str, tuple[str, Box]] = field(default_factory=dict)
    detected: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)


def cut_boxes(file: Path, sources: Sequence[Source]) -> Cut:
    """Replace each photo by its boxes from a file in MegaDetector's batch format.

    Boxes without an area are left out. So are boxes below the ``typical_detection_threshold`` of the detector, or
    below :data:`CONFIDENCE` if the file does not contain it. The name of the first box of ``photo.jpg`` is
    ``photo.jpg#1``. The ``file`` of an entry is the end of the path of its photo. Photos without an entry are added to
    ``failed``. Raises UsageError if a source contains features. Raises InputError if the file cannot be read, if no
    photo has an entry, if the detector failed on all, or if two photos have the same entry.
    """
    entries = _read(file)
    made = Cut()
    owners: dict[str, str] = {}
    for source in sources:
        if source.paths is None:
            raise UsageError(f"{source.name}: --boxes: features cannot be cropped; give photos")
        failed, names = list(source.failed), []
        for path in source.paths:
            entry = next((end for end in _ends(path) if end in entries), None)
            if entry is not None and owners.setdefault(entry, path) != path:
                both = f"{show(owners[entry])} and {show(path)}"
                raise InputError(f"{show(file)}: {both} both match its file {entry!r}; classify one folder")
            found = "no entry in the file of boxes" if entry is None else entries[entry]
            if isinstance(found, str):
                failed.append(Skipped(show(path), found))
                continue
            for number, (category, box) in enumerate(found, 1):
                names.append(f"{path}#{number}")
                made.boxes[names[-1]], made.detected[show(names[-1])] = (path, box), category
            if not found:
                made.empty.append(path)
        made.sources.append(of_images(names, source.name, failed=failed))
    if not owners:
        example = repr(next(iter(entries), "photo.jpg"))
        raise InputError(f"{show(file)}: no photo has an entry; its path must end with one, such as {example}")
    if not made.boxes and not made.empty:
        raise InputError(str(next(one for source in made.sources for one in source.failed)))
    return made


def _ends(path: str) -> Iterator[str]:
    """Yield the ends of a path, longest first, without a leading slash."""
    parts = (path if "://" in path else os.path.abspath(path)).replace("\\", "/").strip("/").split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _read(file: Path) -> dict[str, list[tuple[str, Box]] | str]:
    """Return the boxes and their categories in each photo of a file, or the reason why the detector failed."""
    data = read_json(file, LARGEST)
    if not isinstance(data, dict) or not isinstance(entries := data.get("images"), list):
        raise InputError(f"{show(file)}: has no list 'images'; expected boxes in MegaDetector's format")
    names = data.get("detection_categories")
    names = names if isinstance(names, dict) else {}
    least: float = CONFIDENCE
    match data.get("info"):
        case {"detector_metadata": {"typical_detection_threshold": float() | int() as own}} if 0 <= own <= 1:
            least = own
    photos: dict[str, list[tuple[str, Box]] | str] = {}
    for row, entry in enumerate(entries):
        value: list[tuple[str, Box]] | str
        match entry:
            case {"file": str() as name, "detections": list() as found}:
                boxes = [_box(one, names, f"{show(file)}: image {row}") for one in found]
                value = [(kind, box) for kind, sure, box in boxes if sure >= least and min(box[2:]) > 0]
            case {"file": str() as name, "failure": str() as why}:
                value = show(f"the detector failed: {why}")
            case _:
                raise InputError(f"{show(file)}: image {row} has no 'file' with 'detections' or 'failure'")
        key = name.replace("\\", "/").removeprefix("./").strip("/")
        if photos.setdefault(key, value) is not value:
            raise InputError(f"{show(file)}: image {row}: the file {key!r} occurs twice")
    return photos


def _box(found: object, names: dict[str, object], where: str) -> tuple[str, float, Box]:
    match found:
        case {"category": str() as category, "conf": float() | int() as confidence, "bbox": [a, b, c, d]} if (
            all(isinstance(edge, float | int) and -SLACK <= edge <= 1 + SLACK for edge in (a, b, c, d))
            and 0 <= confidence <= 1
        ):
            return show(str(names.get(category, category))), float(confidence), (float(a), float(b), float(c), float(d))
    raise InputError(f"{where}: a detection is not category, conf and bbox [left, top, width, height] from 0 to 1")
