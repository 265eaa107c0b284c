"""Print what is wrong in a Camtrap DP, for frictionless and for trap-schema, which knows the published tables."""

import json
import sys
import typing
from pathlib import Path

import frictionless
import geojson
from trap_schema import Dataset, DeploymentsRow, MediaRow, ObservationsRow

TYPES = {float: "number", int: "integer", bool: "boolean"}
LIMITS = {"ge": "minimum", "le": "maximum", "pattern": "pattern"}
KEYS = {"deploymentID": "deployments", "mediaID": "media", "observationID": "observations"}


def schema(table, row):
    """Return the table schema of a class of rows."""
    fields = []
    for name, field in row.model_fields.items():
        parts = [field.annotation, *typing.get_args(field.annotation)]
        values = [
            value
            for part in parts
            if typing.get_origin(part) is typing.Literal
            for value in typing.get_args(part)
        ]
        limits = {
            own: getattr(one, key)
            for one in field.metadata
            for key, own in LIMITS.items()
            if hasattr(one, key)
        }
        limits |= {"required": field.is_required(), "unique": KEYS.get(name) == table} | (
            {"enum": values} if values else {}
        )
        own = {"type": next((TYPES[part] for part in parts if part in TYPES), "string")}
        if any(getattr(part, "__name__", "") == "IsoTimestamp" for part in parts):
            own = {"type": "datetime", "format": "%Y-%m-%dT%H:%M:%S%z"}
        fields.append(
            {"name": name, "constraints": {k: v for k, v in limits.items() if v is not None}} | own
        )
    others = [name for name in row.model_fields if KEYS.get(name, table) != table]
    keys = [
        {"fields": [name], "reference": {"resource": KEYS[name], "fields": [name]}}
        for name in others
    ]
    return {"fields": fields, "foreignKeys": keys}


folder = Path(sys.argv[1])
descriptor = json.loads((folder / "datapackage.json").read_text(encoding="utf-8"))
del descriptor["profile"]  # it cannot be fetched here
for resource, row in zip(
    descriptor["resources"], (DeploymentsRow, MediaRow, ObservationsRow), strict=True
):
    resource["schema"] = schema(resource["name"], row)
report = frictionless.Package.from_descriptor(descriptor, basepath=str(folder)).validate()
for wrong in report.flatten(["rowNumber", "fieldName", "message"]):
    print(*wrong)
try:
    assert geojson.loads(json.dumps(Dataset.load(folder).datapackage.spatial.to_dict())).is_valid
except (ValueError, AssertionError) as error:
    print(repr(error))
