"""Write answers as a Camtrap DP, a data package of camera traps."""

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

from retrieval_tip.data import tables
from retrieval_tip.data.boxes import EMPTY
from retrieval_tip.data.images import Box
from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.files import csv_of
from retrieval_tip.plugins.camera_traps.paths import ANIMAL, root_of, within
from retrieval_tip.wording import counted, few, json_line, show
from retrieval_tip.writers import Answered

log = logging.getLogger(__name__)

Row = dict[str, Any]

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
    answers: Answered, zone: tzinfo, known: Mapping[str, Row]
) -> tuple[dict[str, str], list[Skipped]]:
    """Return the texts of the files of a Camtrap DP, and the photos that it cannot contain.

    The package has an observation for each row. ``known`` has the rows of deployments. A photo belongs to the
    deployment that is named like the lowest folder above it, or else to a deployment of its own folder. Raises
    InputError if no photo has a date.
    """
    root = root_of(answers.inputs, answers.photos)
    package = _Package(root, answers.by, zone, known)
    boxes = {show(name): (show(path), box) for name, (path, box) in answers.boxes.boxes.items()}
    left_out = dict[str, Skipped]()
    for row in answers.rows:
        photo, box = boxes.get(row["input"], (row["input"], None))
        path = within(root, photo)
        lacking = _lacking(row, path)
        if lacking is None:
            package.add(row, path, box)
        else:
            left_out[path] = Skipped(photo, f"Camtrap DP needs {lacking}")
    if not package.media:
        raise InputError(
            f"{root}: no photo has a date, which Camtrap DP requires; was it lost when they were copied?"
        )
    if left_out:
        reasons = few(list(map(str, left_out.values())))
        log.warning("left out %s: %s", counted(len(left_out), "photo"), reasons)
    return package.files(), list(left_out.values())


def _lacking(row: Mapping[str, Any], path: str) -> str | None:
    """Return what a photo lacks to be in a package, or ``None``."""
    if row["taken_at"] is None:
        return "its date"
    if not re.fullmatch(r"[^./~]((?!\.\.).)*", path):
        return "a path without '..', and without '.' or '~' at its start"
    return None


class _Package:
    """The rows of a Camtrap DP.

    ``media`` and ``observations`` are by id, ``photos`` are the answers by deployment, and ``events`` the times of the
    photos of each event.
    """

    def __init__(self, root: str, by: str, zone: tzinfo, known: Mapping[str, Row]) -> None:
        self.root = root
        self.by = by
        self.zone = zone
        self.known = known
        self.now = datetime.now(zone).replace(microsecond=0)
        self.media = dict[str, Row]()
        self.observations = dict[str, Row]()
        self.photos = defaultdict[str, list[Row]](list, {name: [] for name in known})
        self.events = defaultdict[str, list[datetime]](list)

    def add(self, row: Mapping[str, Any], path: str, box: Box | None) -> None:
        """Add an answer to a photo or its box."""
        taken_at = row["taken_at"].replace(tzinfo=self.zone)
        deployment = self._deployment_of(path)
        self.photos[deployment].append({**row, "at": taken_at})
        event = path if row.get("burst") is None else f"burst {row['burst']}"
        if path in self.media:
            event = self.media[path]["eventID"]  # its boxes
        self.events[event].append(taken_at)
        file = path.rpartition("/")[2]
        kind = mimetypes.guess_type(file)[0] or f"image/{Path(file).suffix[1:]}"
        self.media[path] = {
            "mediaID": path,
            "deploymentID": deployment,
            "eventID": event,
            "timestamp": taken_at,
            "filePath": path,
            "filePublic": "false",
            "fileName": file,
            "fileMediatype": kind if kind.startswith("image/") else "image/jpeg",
        }
        name = within(self.root, row["input"])
        self.observations[name] = {
            "observationID": name,
            "deploymentID": deployment,
            "mediaID": path,
            "eventID": event,
            "observationLevel": "media",
            "classificationMethod": "machine",
            "classifiedBy": self.by,
            **_observed(row, self.now),
            **({} if box is None else _box(*box)),
        }

    def _deployment_of(self, path: str) -> str:
        """Return the known deployment that is named like the lowest folder, or else the folder of a photo."""
        folders = path.split("/")[:-1]
        above = ["/".join(folders[:end]) for end in range(len(folders), 0, -1)]
        above.append(os.path.basename(self.root) or "photos")
        return next((folder for folder in above if folder in self.known), above[0])

    def files(self) -> dict[str, str]:
        """Return the texts of the tables and of their description."""
        for observation in self.observations.values():
            times = self.events[observation["eventID"]]
            observation |= {"eventStart": min(times), "eventEnd": max(times)}
        deployments = [
            _deployment(name, photos, self.known.get(name, {}))
            for name, photos in self.photos.items()
        ]
        _warn_of_gaps(deployments)
        tables = {
            "deployments": deployments,
            "media": self.media.values(),
            "observations": self.observations.values(),
        }
        files = {
            f"{name}.csv": _table(rows, COLUMNS[name].split()) for name, rows in tables.items()
        }
        names = {observation["scientificName"] for observation in self.observations.values()}
        taxa = sorted(filter(None, names))
        title = os.path.basename(self.root)
        files["datapackage.json"] = json_line(_described(deployments, taxa, title, self.now)) + "\n"
        return files


def _warn_of_gaps(deployments: Sequence[Row]) -> None:
    needed = (*PLACE, *PERIOD)
    incomplete = [
        deployment["deploymentID"]
        for deployment in deployments
        if any(deployment[name] is None for name in needed)
    ]
    if incomplete:
        lack = f"{counted(len(incomplete), 'deployment', 'lacks', 'lack')} coordinates or dates: {few(incomplete)}"
        log.warning(
            "%s; Camtrap DP requires them: give --deployments FILE, or fill in deployments.csv",
            lack,
        )


def _observed(row: Mapping[str, Any], now: datetime) -> Row:
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


def _table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    cells = ([_cell(row.get(column)) for column in columns] for row in rows)
    return csv_of([columns, *cells])


def _cell(value: object) -> object:
    return _rfc_3339(value) if isinstance(value, datetime) else value


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
