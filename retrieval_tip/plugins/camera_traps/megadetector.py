"""Write answers in MegaDetector's format."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from retrieval_tip.data.boxes import PhotoBoxes
from retrieval_tip.plugins.camera_traps.paths import ANIMAL, root_of, within
from retrieval_tip.wording import counted, show
from retrieval_tip.writers import Answered

log = logging.getLogger(__name__)

Row = dict[str, Any]

VERSION = "1.6"
"""The version of MegaDetector's format, in files that were not read from one."""
WHOLE_PHOTOS = {"detector": "none: each detection is a whole photo", "detector_metadata": {}}
LEAST = 0.01
"""The smallest probability of a class that is listed for a detection."""
PLACE = ("latitude", "longitude")


def clear(boxes: PhotoBoxes) -> None:
    """Remove earlier classifications from the document of boxes, with a warning."""
    lists = (
        image["detections"]
        for image in boxes.document.get("images", ())
        if isinstance(image.get("detections"), list)
    )
    earlier = [one for found in lists for one in found if one.get("classifications")]
    if earlier:
        log.warning(
            "%s: replaced the earlier classifications of %s",
            show(boxes.file or ""),
            counted(len(earlier), "detection"),
        )
    for one in earlier:
        del one["classifications"]


def megadetector(answers: Answered) -> Row:
    """Return the document of the boxes with the answers for its detections.

    Without a document, each photo is one detection. Photos without a match or a label have no classifications, and
    skipped photos have no detections. The time and the place of a photo are added if they are in the rows.
    """
    root = root_of(answers.inputs, answers.photos)
    boxes = answers.boxes
    ids = {name: str(number) for number, name in enumerate(answers.labels, 1)}
    document = boxes.document or {
        "info": WHOLE_PHOTOS,
        "detection_categories": {"1": ANIMAL},
        "images": [],
    }
    images = document["images"]
    for row in answers.rows:
        name = row["input"]
        if name not in boxes.found:
            detection = {"category": "1", "conf": 1.0, "bbox": [0.0, 0.0, 1.0, 1.0]}
            images.append({"file": within(root, name), "detections": [detection]})
            boxes.found[name] = images[-1], detection
        image, found = boxes.found[name]
        if row.get("taken_at") is not None:
            image["datetime"] = f"{row['taken_at']:%Y:%m:%d %H:%M:%S}"
        image |= {side: row[side] for side in PLACE if row.get(side) is not None}
        ranked = _ranked(row, ids)
        if found is not None and ranked:
            found["classifications"] = ranked
    if not boxes.document:
        for skipped in answers.skipped:
            file = within(root, skipped.source)
            images.append({"file": file, "failure": skipped.reason, "detections": None})
    given = document.get("info")
    info = {
        "format_version": VERSION,
        **(given if isinstance(given, dict) else {}),
        "classifier": answers.by,
        "classification_completion_time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "classifier_metadata": {"typical_classification_threshold": 0.5},
    }
    document.pop("classification_category_descriptions", None)
    return document | {
        "info": info,
        "classification_categories": {number: name for name, number in ids.items()},
    }


def _ranked(row: Mapping[str, Any], ids: Mapping[str, str]) -> list[list[object]]:
    """Return the ids and probabilities of the likeliest classes, or nothing for a photo without a match or a label."""
    if row["label"] is None or row.get("no_match"):
        return []
    ranked = zip(row["labels"], row["probabilities"], strict=True)
    if row["label"] not in row["labels"]:  # a group of classes
        ranked = zip([row["label"]], [row["probability"]], strict=True)
    return [[ids[label], round(chance, 4)] for label, chance in ranked if chance >= LEAST]
