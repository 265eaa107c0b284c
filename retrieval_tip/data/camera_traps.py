"""Write answers for programs that manage photos of camera traps, in MegaDetector's format and as Camtrap DP."""

from __future__ import annotations

import logging
import mimetypes
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pyarrow as pa

from retrieval_tip.data import remote, tables
from retrieval_tip.data.boxes import EMPTY, PhotoBoxes
from retrieval_tip.data.source import Source
from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.wording import counted, few, show

log = logging.getLogger(__name__)

Row = dict[str, Any]

ANIMAL = "animal"
VERSION = "1.6"
"""The version of MegaDetector's format, in files that were not read from one."""
WHOLE_PHOTOS = {"detector": "none: each detection is a whole photo", "detector_metadata": {}}
TOP, LEAST = 5, 0.01
"""Number of classes that are listed for a detection, and the smallest probability of each."""

CAMTRAP_DP = "https://raw.githubusercontent.com/tdwg/camtrap-dp/1.0.2"
COLUMNS = {
    "deployments": "deploymentID locationID locationName latitude longitude coordinateUncertainty deploymentStart"
    " deploymentEnd setupBy cameraID cameraModel cameraDelay cameraHeight cameraDepth cameraTilt cameraHeading"
    " detectionDistance timestampIssues baitUse featureType habitat deploymentGroups deploymentTags deploymentComments",
    "media": "mediaID deploymentID captureMethod timestamp filePath filePublic fileName fileMediatype exifData favorite"
    " mediaComments",
    "observations": "observationID deploymentID mediaID eventID eventStart eventEnd observationLevel observationType"
    " cameraSetupType scientificName count lifeStage sex behavior individualID individualPositionRadius"
    " individualPositionAngle individualSpeed bboxX bboxY bboxWidth bboxHeight classificationMethod classifiedBy"
    " classificationTimestamp classificationProbability observationTags observationComments",
}
"""The columns of the tables of Camtrap DP."""
TYPES = {
    "person": "human",
    "human": "human",
    "vehicle": "vehicle",
    EMPTY: "blank",
    "blank": "blank",
    ANIMAL: ANIMAL,
}
"""The observation types of Camtrap DP, by the names of classes and of categories. Other classes are animals."""
PLACE, PERIOD = {"latitude": 90, "longitude": 180}, ("deploymentStart", "deploymentEnd")
"""The columns that a deployment needs. Coordinates have a largest absolute value."""


def root_of(inputs: Iterable[str], sources: Iterable[Source]) -> str:
    """Return the lowest folder that contains all folders among the inputs and all photos of the sources."""
    paths = (
        path for source in sources for path in source.paths or () if not remote.is_remote(path)
    )
    folders = {os.path.dirname(os.path.abspath(path)) for path in paths}
    folders |= {os.path.abspath(one) for one in inputs if os.path.isdir(one)}
    return show(os.path.commonpath(folders or {os.getcwd()}))


def within(root: str, name: str) -> str:
    """Return the path of a photo relative to the root, or the address of a remote photo."""
    return name if remote.is_remote(name) else os.path.relpath(name, root)


def clear(document: Row, file: str) -> None:
    """Remove earlier classifications from a document, with a warning."""
    lists = (
        image["detections"]
        for image in document["images"]
        if isinstance(image.get("detections"), list)
    )
    earlier = [one for found in lists for one in found if one.get("classifications")]
    if earlier:
        log.warning(
            "%s: replaced the earlier classifications of %s",
            file,
            counted(len(earlier), "detection"),
        )
    for one in earlier:
        del one["classifications"]


def megadetector(
    rows: Iterable[Row],
    cut: PhotoBoxes,
    by: str,
    root: str,
    class_names: Sequence[str],
    failed: Iterable[Skipped],
) -> Row:
    """Return the document of ``cut`` with the answers for its detections. ``by`` is the name of the index.

    Without a document, each photo is one detection. Photos without a match or a label have no classifications, and
    photos that ``failed`` have no detections. The time and the place of a photo are added if they are in the rows.
    """
    ids = {name: str(number) for number, name in enumerate(class_names, 1)}
    document = cut.document or {
        "info": WHOLE_PHOTOS,
        "detection_categories": {"1": ANIMAL},
        "images": [],
    }
    images = document["images"]
    for row in rows:
        if row["input"] not in cut.found:
            whole = {"category": "1", "conf": 1.0, "bbox": [0.0, 0.0, 1.0, 1.0]}
            images.append({"file": within(root, row["input"]), "detections": [whole]})
            cut.found[row["input"]] = images[-1], whole
        image, found = cut.found[row["input"]]
        if row.get("taken_at") is not None:
            image["datetime"] = f"{row['taken_at']:%Y:%m:%d %H:%M:%S}"
        image |= {name: row[name] for name in PLACE if row.get(name) is not None}
        if found is not None and row["label"] is not None and not row.get("no_match"):
            ranked = list(zip(row["labels"], row["probabilities"], strict=True))
            if row["label"] not in row["labels"]:  # a group of classes
                ranked = [(row["label"], row["probability"])]
            if answers := [
                [ids[label], round(chance, 4)] for label, chance in ranked if chance >= LEAST
            ]:
                found["classifications"] = answers
    if not cut.document:
        images += (
            {"file": within(root, one.source), "failure": one.reason, "detections": None}
            for one in failed
        )
    given = document.get("info")
    info = {
        "format_version": VERSION,
        **(given if isinstance(given, dict) else {}),
        "classifier": by,
        "classification_completion_time": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "classifier_metadata": {"typical_classification_threshold": 0.5},
    }
    document.pop("classification_category_descriptions", None)
    return document | {
        "info": info,
        "classification_categories": {number: name for name, number in ids.items()},
    }


def read_deployments(file: Path, zone: tzinfo | None) -> dict[str, Row]:
    """Read a table of deployments, which has columns of Camtrap DP. Times without a zone are in ``zone``.

    Raises InputError if the file cannot be read, or if a column, an id, a time or a coordinate is not valid.
    """
    items = tables.items_of(file)[0]
    known = COLUMNS["deployments"].split()
    if "deploymentID" not in items.column_names or not set(items.column_names) <= set(known):
        raise InputError(
            f"{show(file)}: expected deploymentID and other columns of Camtrap DP: {', '.join(known)}"
        )
    deployments = {
        str(row["deploymentID"]): row
        for row in items.to_pylist()
        if row["deploymentID"] is not None
    }
    if len(deployments) < len(items):
        raise InputError(f"{show(file)}: each row needs a deploymentID of its own")
    for name, row in deployments.items():
        for column in (one for one in (*PLACE, *PERIOD) if row.get(one) is not None):
            try:
                if column in PERIOD:
                    time = datetime.fromisoformat(str(row[column]))
                    row[column] = time.replace(microsecond=0, tzinfo=time.tzinfo or zone)
                elif not abs(float(row[column])) <= PLACE[column]:
                    raise ValueError
            except (TypeError, ValueError):
                raise InputError(
                    f"{show(file)}: {name}: {column} {str(row[column])!r} is not valid"
                ) from None
    return deployments


def camtrap_dp(
    rows: Iterable[Row],
    cut: PhotoBoxes,
    by: str,
    root: str,
    zone: tzinfo,
    known: Mapping[str, Row],
    skipped: list[Skipped],
) -> Row:
    """Return the files of a Camtrap DP with an observation for each row. ``by`` is the name of the index.

    ``known`` has the rows of deployments. A photo belongs to the deployment that is named like the lowest folder above
    it, or else to a deployment of its own folder. The rows need the time and the place of the photos. Photos that the
    package cannot contain are added to ``skipped``. Raises InputError if no photo has a date.
    """
    now = datetime.now(zone).replace(microsecond=0)
    boxes = {show(name): (show(path), box) for name, (path, box) in cut.boxes.items()}
    media = dict[str, Row]()
    observations = dict[str, Row]()
    bursts = dict[str, str]()
    left_out = dict[str, Skipped]()
    events = defaultdict[str, list[datetime]](list)
    deployments = defaultdict[str, list[Row]](list, {name: [] for name in known})
    for row in rows:
        photo, box = boxes.get(row["input"], (row["input"], None))
        path = within(root, photo)
        name = within(root, row["input"])
        if row["taken_at"] is None or not re.fullmatch(r"[^./~]((?!\.\.).)*", path):
            why = (
                "its date"
                if row["taken_at"] is None
                else "a path without '..', and without '.' or '~' at its start"
            )
            left_out[path] = Skipped(photo, f"Camtrap DP needs {why}")
            continue
        at = row["taken_at"].replace(tzinfo=zone)
        *folders, file = path.split("/")
        above = ["/".join(folders[:end]) for end in range(len(folders), 0, -1)] + [
            os.path.basename(root) or "photos"
        ]
        deployment = next((one for one in above if one in known), above[0])
        deployments[deployment].append(row | {"at": at})
        event = bursts.setdefault(
            path, path if row.get("burst") is None else f"burst {row['burst']}"
        )
        events[event].append(at)
        kind = mimetypes.guess_type(file)[0] or f"image/{Path(file).suffix[1:]}"
        media[path] = {
            "mediaID": path,
            "deploymentID": deployment,
            "timestamp": at,
            "filePath": path,
            "filePublic": "false",
            "fileName": file,
            "fileMediatype": kind if kind.startswith("image/") else "image/jpeg",
        }
        observations[name] = {
            "observationID": name,
            "deploymentID": deployment,
            "mediaID": path,
            "eventID": event,
            "observationLevel": "media",
            "classificationMethod": "machine",
            "classifiedBy": by,
            **_observed(row, now),
            **({} if box is None else _box(*box)),
        }
    if not media:
        raise InputError(
            f"{root}: no photo has a date, which Camtrap DP requires; was it lost when they were copied?"
        )
    for one in observations.values():
        one |= {"eventStart": min(events[one["eventID"]]), "eventEnd": max(events[one["eventID"]])}
    placed = [_deployment(name, own, known.get(name, {})) for name, own in deployments.items()]
    incomplete = [
        one["deploymentID"]
        for one in placed
        if any(one[name] is None for name in (*PLACE, *PERIOD))
    ]
    parts = {"deployments": placed, "media": media.values(), "observations": observations.values()}
    files: Row = {
        f"{name}.csv": _table(part, COLUMNS[name].split()) for name, part in parts.items()
    }
    taxa = sorted({one["scientificName"] for one in observations.values() if one["scientificName"]})
    files["datapackage.json"] = _described(placed, taxa, os.path.basename(root), now)
    skipped += left_out.values()
    if left_out:
        log.warning(
            "left out %s: %s",
            counted(len(left_out), "photo"),
            few(list(map(str, left_out.values()))),
        )
    if incomplete:
        lack = f"{counted(len(incomplete), 'deployment', 'lacks', 'lack')} coordinates or dates: {few(incomplete)}"
        log.warning(
            "%s; Camtrap DP requires them: give --deployments FILE, or fill in deployments.csv",
            lack,
        )
    return files


def _observed(row: Row, now: datetime) -> Row:
    label, sure = row["label"], row["probability"]
    if sure is None:  # only the detector saw it
        kind = TYPES.get(str(row["detected"]).casefold(), "unclassified")
        return {"observationType": kind, "scientificName": None, "classifiedBy": None}
    kind = (
        "unknown" if label is None or row.get("no_match") else TYPES.get(label.casefold(), ANIMAL)
    )
    return {
        "observationType": kind,
        "scientificName": label if kind == ANIMAL else None,
        "classificationTimestamp": now,
        "classificationProbability": None if row.get("no_match") else round(sure, 4),
    }


def _box(left: float, top: float, width: float, height: float) -> Row:
    x, y = (min(max(edge, 0.0), 1.0) for edge in (left, top))
    right = min(left + width, 1.0)
    bottom = min(top + height, 1.0)
    return {
        "bboxX": x,
        "bboxY": y,
        "bboxWidth": max(right - x, 1e-6),
        "bboxHeight": max(bottom - y, 1e-6),
    }


def _deployment(name: str, photos: Sequence[Row], known: Row) -> Row:
    """Return the row of a deployment. Values that are not known come from the metadata of its photos."""
    times = [row["at"] for row in photos]
    own = dict.fromkeys(PLACE) | dict(
        zip(PERIOD, (min(times, default=None), max(times, default=None)), strict=True)
    )
    own |= next(
        ({name: row[name] for name in PLACE} for row in photos if row["latitude"] is not None), {}
    )
    return (
        own
        | {"deploymentID": name}
        | {column: value for column, value in known.items() if value is not None}
    )


def _table(rows: Iterable[Row], columns: Sequence[str]) -> pa.Table:
    def text(value: object) -> str | None:
        return (
            _rfc_3339(value)
            if isinstance(value, datetime)
            else None
            if value is None
            else str(value)
        )

    return pa.table(
        {name: pa.array([text(row.get(name)) for row in rows], pa.string()) for name in columns}
    )


def _rfc_3339(time: datetime) -> str:
    """Format a time. Offsets have no seconds in RFC 3339, as those before standard time have."""
    return re.sub(r"([+-]\d\d:\d\d):[\d.]+$", r"\1", time.isoformat())


def _described(deployments: Sequence[Row], taxa: Sequence[str], title: str, now: datetime) -> Row:
    """Return the metadata of a package. The user has to check who contributed, and how photos were taken."""
    csv = {
        "profile": "tabular-data-resource",
        "format": "csv",
        "mediatype": "text/csv",
        "encoding": "utf-8",
    }
    dates = [
        one[name].date().isoformat()
        for one in deployments
        for name in PERIOD
        if one[name] is not None
    ]
    points = (
        [one["longitude"], one["latitude"]]
        for one in deployments
        if None not in map(one.get, PLACE)
    )
    return {
        "profile": f"{CAMTRAP_DP}/camtrap-dp-profile.json",
        "created": _rfc_3339(now),
        "resources": [
            {
                "name": name,
                "path": f"{name}.csv",
                **csv,
                "schema": f"{CAMTRAP_DP}/{name}-table-schema.json",
            }
            for name in COLUMNS
        ],
        "contributors": [{"title": "Fill in your name", "role": "contributor"}],
        "project": {
            "title": title,
            "samplingDesign": "opportunistic",
            "individualAnimals": False,
            "captureMethod": ["activityDetection"],
            "observationLevel": ["media"],
        },
        "spatial": {
            "type": "MultiPoint",
            "coordinates": [[*map(float, point)] for point in points],
        },
        "temporal": {"start": min(dates), "end": max(dates)},
        "taxonomic": [{"scientificName": name} for name in taxa],
    }
