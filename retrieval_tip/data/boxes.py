"""Read the boxes that a detector found in photos, from a file in MegaDetector's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retrieval_tip.data import remote
from retrieval_tip.data.images import Box
from retrieval_tip.data.sources import Source, of_images
from retrieval_tip.errors import InputError, Skipped, UsageError
from retrieval_tip.files import read_json
from retrieval_tip.wording import few, show

EMPTY = "empty"  # value of ``detected`` for a photo without boxes
LARGEST = 1 << 28  # largest file, in bytes
CONFIDENCE = 0.2  # smallest confidence of a box, if the file does not contain the typical threshold of its detector
SLACK = 0.01  # how far an edge may lie outside the photo, as detectors round

Found = dict[str, Any]
"""An image of the file, or one of its detections, with all fields."""
_Entry = tuple[Found, list[tuple[str, Box, Found]]] | str
"""An image with the category, the edges and the fields of each box, or the reason why the detector failed."""


@dataclass(frozen=True)
class PhotoBoxes:
    """Photos that were cut into boxes.

    Attributes:
        sources: the boxes to classify, as items to encode with :class:`exif.ExifRecorder`.
        boxes: the photo and the edges of each box.
        detected: the category of each box, by its printable name.
        others: the boxes of categories that are not classified.
        empty: the paths of the photos without boxes.
        file: the path of the file.
        document: the content of the file.
        found: the image of the document, and its detection, for each box and each photo without boxes, by its printable
            name.
    """

    sources: list[Source] = field(default_factory=list)
    boxes: dict[str, tuple[str, Box]] = field(default_factory=dict)
    detected: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    file: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)
    found: dict[str, tuple[Found, Found | None]] = field(default_factory=dict)


def cut_boxes(file: Path, sources: Sequence[Source], categories: Sequence[str] = ()) -> PhotoBoxes:
    """Replace each photo by its boxes from a file in MegaDetector's batch format.

    Boxes without an area are left out. So are boxes below the ``typical_detection_threshold`` of the detector, or
    below :data:`CONFIDENCE` if the file does not contain it. The name of the first box of ``photo.jpg`` is
    ``photo.jpg#1``. If ``categories`` are given, only boxes of these categories are in the sources. The ``file`` of an
    entry is the end of the path of its photo. Photos without an entry are added to ``failed``. Raises UsageError if a
    source contains features. Raises InputError if the file cannot be read, if it has no such category, if no photo has
    an entry, if the detector failed on all, or if two photos have the same entry.
    """
    document, names, entries = _read(file)
    made = PhotoBoxes(file=file, document=document)
    known = [show(str(name)) for name in names.values()]
    for category in categories:
        if category.casefold() not in map(str.casefold, known):
            choices = few(known) or "none"
            raise InputError(
                f"{show(file)}: has no category {category!r}; choose with --categories from: {choices}"
            )
    wanted = set(map(str.casefold, categories))
    for source, photos in zip(sources, _matched(file, sources, entries), strict=True):
        failed = list(source.failed)
        items = list[str]()
        for path, entry in photos:
            if isinstance(entry, str):
                failed.append(Skipped(show(path), entry))
                continue
            image, boxes = entry
            if not boxes:
                made.empty.append(path)
                made.found[show(path)] = image, None
            for number, (category, box, detection) in enumerate(boxes, 1):
                name = f"{path}#{number}"
                is_wanted = not categories or category.casefold() in wanted
                names_of_boxes = items if is_wanted else made.others
                names_of_boxes.append(name)
                made.boxes[name] = (path, box)
                made.detected[show(name)] = category
                made.found[show(name)] = image, detection
        parts = of_images(items, source.name, failed=failed)
        made.sources.append(replace(parts, load=source.load))
    if not made.boxes and not made.empty:
        raise InputError(str(next(skip for source in made.sources for skip in source.failed)))
    return made


def _matched(
    file: Path, sources: Sequence[Source], entries: dict[str, _Entry]
) -> list[list[tuple[str, _Entry]]]:
    """Return the photos of each source, each with its entry or the reason why it has no boxes."""
    owners: dict[str, str] = {}
    matched = []
    for source in sources:
        if source.paths is None:
            raise UsageError(f"{source.name}: --boxes: features cannot be cropped; give photos")
        photos = list[tuple[str, _Entry]]()
        for path in source.paths:
            key = next((end for end in _ends(path) if end in entries), None)
            if key is None:
                photos.append((path, "no entry in the file of boxes"))
                continue
            owner = owners.setdefault(key, path)
            if owner != path:
                both = f"{show(owner)} and {show(path)}"
                raise InputError(
                    f"{show(file)}: {both} both match its file {key!r}; classify one folder"
                )
            photos.append((path, entries[key]))
        matched.append(photos)
    if not owners:
        example = repr(next(iter(entries), "photo.jpg"))
        raise InputError(
            f"{show(file)}: no photo has an entry; its path must end with one, such as {example}"
        )
    return matched


def _ends(path: str) -> Iterator[str]:
    """Yield the ends of a path, longest first, without a leading slash."""
    parts = remote.absolute(path).replace("\\", "/").strip("/").split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))


def _read(file: Path) -> tuple[dict[str, Any], dict[str, object], dict[str, _Entry]]:
    """Return the content of a file, the names of its categories, and the entry of each photo."""
    data = read_json(file, LARGEST)
    if not isinstance(data, dict) or not isinstance(entries := data.get("images"), list):
        raise InputError(
            f"{show(file)}: has no list 'images'; expected boxes in MegaDetector's format"
        )
    names = data.get("detection_categories")
    names = names if isinstance(names, dict) else {}
    least: float = CONFIDENCE
    match data.get("info"):
        case {"detector_metadata": {"typical_detection_threshold": float() | int() as own}} if (
            0 <= own <= 1
        ):
            least = own
    photos: dict[str, _Entry] = {}
    for row, entry in enumerate(entries):
        value: _Entry
        match entry:
            case {"file": str() as name, "detections": list() as found}:
                boxes = [(*_box(one, names, f"{show(file)}: image {row}"), one) for one in found]
                kept = [
                    (kind, box, one)
                    for kind, sure, box, one in boxes
                    if sure >= least and min(box[2:]) > 0
                ]
                value = entry, kept
            case {"file": str() as name, "failure": str() as why}:
                value = show(f"the detector failed: {why}")
            case _:
                raise InputError(
                    f"{show(file)}: image {row} has no 'file' with 'detections' or 'failure'"
                )
        key = name.replace("\\", "/").removeprefix("./").strip("/")
        if photos.setdefault(key, value) is not value:
            raise InputError(f"{show(file)}: image {row}: the file {key!r} occurs twice")
    return data, names, photos


def _box(found: object, names: dict[str, object], where: str) -> tuple[str, float, Box]:
    match found:
        case {
            "category": str() as category,
            "conf": float() | int() as confidence,
            "bbox": [a, b, c, d],
        } if (
            all(
                isinstance(edge, float | int) and -SLACK <= edge <= 1 + SLACK
                for edge in (a, b, c, d)
            )
            and 0 <= confidence <= 1
        ):
            return (
                show(str(names.get(category, category))),
                float(confidence),
                (float(a), float(b), float(c), float(d)),
            )
    raise InputError(
        f"{where}: a detection is not category, conf and bbox [left, top, width, height] from 0 to 1"
    )
