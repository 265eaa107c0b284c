"""HTTP routes for other programs: a Label Studio ML backend, and the labels route of PhotoPrism's Vision API.

These programs document what they send and expect, so the routes are not part of /openapi.json. The key that Label
Studio sends to ``setup`` is neither stored nor used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from functools import partial
from typing import Any, NamedTuple
from xml.etree import ElementTree

from fastapi import APIRouter
from fastapi.responses import Response

from retrieval_tip.data.exchange import choices_of
from retrieval_tip.errors import InputError, warn_once
from retrieval_tip.index import changes
from retrieval_tip.server.access import CHANGES, READS, Named, TheService
from retrieval_tip.server.annotations import COLUMN, database, done, note
from retrieval_tip.server.guard import give_time
from retrieval_tip.server.routes import json_of
from retrieval_tip.server.schemas import class_name
from retrieval_tip.server.served import Served
from retrieval_tip.server.service import Service, backbone_of
from retrieval_tip.server.uploads import Upload, of_data_url
from retrieval_tip.settings import Ask
from retrieval_tip.wording import counted, few, show

log = logging.getLogger(__name__)

PREDICT_SECONDS = 100.0
"""Time that Label Studio waits for predictions."""
AT_ONCE = 4
"""Number of photos to read and classify at once."""
LONGEST_CONFIG, MOST_TASKS = 1 << 20, 10_000
"""Maximum number of characters of a labelling interface, and of tasks to predict at once."""
NOT_LEARNT = "changes no shot; ANNOTATION_CREATED, _UPDATED, ANNOTATIONS_DELETED and TASKS_DELETED do, with a payload"
BEST = Ask(top=1, neighbours=0)
"""Asks for the best class only."""

label_studio = APIRouter(prefix="/label-studio/{name}", include_in_schema=False)
photoprism = APIRouter(prefix="/api/v1/vision", dependencies=READS, include_in_schema=False)
Json = dict[str, Any]


class Interface(NamedTuple):
    """The first ``Choices`` tag of a labelling interface whose ``toName`` is an ``Image`` tag.

    ``photo`` is the field of a task that holds the address of the photo.
    """

    from_name: str
    to_name: str
    photo: str
    choices: frozenset[str]


def interface_of(config: object) -> Interface:
    """Parse a labelling interface. Raises InputError if it is not one, or has no choices for an image."""
    if not isinstance(config, str) or len(config) > LONGEST_CONFIG or "<!DOCTYPE" in config:
        raise InputError(
            f"label_config: must be XML of at most {LONGEST_CONFIG:,} characters without a DOCTYPE"
        )
    try:
        tags = list(ElementTree.fromstring(config).iter())  # noqa: S314  # only a DOCTYPE can define entities
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"label_config: is not XML ({error})") from None
    fields = {tag.get("name"): tag.get("value", "") for tag in tags if tag.tag == "Image"}
    for tag in tags:
        name = tag.get("name", "")
        image = tag.get("toName", "")
        if (
            tag.tag == "Choices"
            and tag.get("perRegion") != "true"
            and fields.get(image, "").startswith("$")
        ):
            choices = (
                choice.get("alias", choice.get("value", "")) for choice in tag.iter("Choice")
            )
            return Interface(name, image, fields[image][1:], frozenset(choices))
    raise InputError(
        'label_config: has no Choices tag whose toName is an Image tag with a value "$..."; add one'
    )


@label_studio.get("/health", dependencies=READS)
async def health(one: Named) -> Response:
    """Tell Label Studio that the backend is running."""
    return json_of({"status": "UP", "model_version": _version_of(one)})


@label_studio.post("/setup", dependencies=CHANGES)
async def setup(one: Named, sent: Json) -> Response:
    """Check the labelling interface of a project, and name the classes that are not among its choices."""
    interface = interface_of(sent.get("schema"))
    backbone_of(one.now)
    missing = [name for name in one.now.index.class_names if name not in interface.choices]
    if missing:
        number = counted(len(missing), "class", "is", "are")
        names = few(list(map(show, missing)))
        warn_once(f"{one.name}: {number} not among the choices in Label Studio: {names}")
    return json_of({"model_version": _version_of(one), "classes_without_choice": missing})


@label_studio.post("/predict", dependencies=CHANGES)
async def predict(service: TheService, one: Named, sent: Json) -> Response:
    """Predict the choice of each task, in order.

    The result is empty if the photo cannot be read or resembles no shot, or if its class is not among the choices.
    """
    give_time(PREDICT_SECONDS)
    interface = interface_of(sent.get("label_config"))
    tasks = sent.get("tasks")
    if (
        not isinstance(tasks, list)
        or len(tasks) > MOST_TASKS
        or not all(isinstance(task, dict) for task in tasks)
    ):
        raise InputError(f"tasks: must be a list of at most {MOST_TASKS:,} objects")
    version = one.now
    name = _version_of(one)

    async def prediction(task: Json) -> tuple[Json, str]:
        found: Json = {"result": [], "score": 0.0, "model_version": name}
        try:
            photo = Upload(
                ["its photo"], images=[await service.photos.read(_address(task, interface))]
            )
            best: Json = (await service.classify(version, BEST, photo)).results[0]
        except InputError as error:
            return found, str(error)
        if not best.get("no_match") and best["label"] in interface.choices:
            names = {
                "from_name": interface.from_name,
                "to_name": interface.to_name,
                "type": "choices",
            }
            found |= {
                "result": [names | {"value": {"choices": [best["label"]]}}],
                "score": best["probability"],
            }
        return found, ""

    made: list[tuple[Json, str]] = []
    for start in range(0, len(tasks), AT_ONCE):
        made += await asyncio.gather(*map(prediction, tasks[start : start + AT_ONCE]))
    pairs = zip(tasks, made, strict=True)
    skipped = [
        {"input": show(f"task {task.get('id')}"), "reason": reason}
        for task, (_, reason) in pairs
        if reason
    ]
    if skipped:
        log.warning(
            "%s: %s without a prediction: %s",
            one.name,
            counted(len(skipped), "task"),
            skipped[0]["reason"],
        )
    return json_of({"results": [found for found, _ in made], "skipped": skipped})


@label_studio.post("/webhook", dependencies=CHANGES)
async def webhook(service: TheService, one: Named, sent: Json) -> Response:
    """Make the label of a photo what its annotations say, after some were created, updated or deleted.

    If they disagree, the photo is no shot. Repeating a request changes nothing.
    """
    give_time()
    names = _named(sent)
    key_ids = list[int]()
    async with (
        service.annotating
    ):  # the next event about an annotation may arrive before this one is done
        reasons = await _learn(service, one, names, sent, key_ids) if names else [NOT_LEARNT]
    what = f"annotation {few(names)}" if names else show(str(sent.get("action")))
    if names and reasons:  # Label Studio does not show the answer
        log.warning("%s: %s: %s", one.name, what, reasons[0])
    skipped = [{"input": what, "reason": reason} for reason in reasons]
    return json_of(
        {
            "index": one.name,
            "version": one.now.manifest.version,
            "key_ids": key_ids,
            "skipped": skipped,
        }
    )


def _named(sent: Json) -> list[str]:
    """Return the annotation that an event describes, or the annotations or tasks that were deleted."""
    of = ""
    match sent:
        case {
            "action": "ANNOTATION_CREATED" | "ANNOTATION_UPDATED",
            "project": {"label_config": str()},
            "task": {},
            "annotation": {"result": list()} as annotation,
        }:
            items = [annotation]
        case {"action": "ANNOTATIONS_DELETED", "annotations": list() as items}:
            pass
        case {"action": "TASKS_DELETED", "tasks": list() as items}:
            of = "of task "
        case _:
            return []
    project, *numbers = (
        item.get("id") if isinstance(item, dict) else None for item in [sent.get("project"), *items]
    )
    return [f"{of}{project}/{number}" for number in numbers if type(project) is type(number) is int]


async def _learn(
    service: Service, one: Served, names: list[str], sent: Json, key_ids: list[int]
) -> list[str]:
    """Note what an event says, and make the shots follow. Add the ids of changed keys, and return what is skipped."""
    said = list[Any]()
    until = "~"
    reasons = list[str]()
    if "DELETED" not in sent["action"]:
        task, annotation = sent["task"], sent["annotation"]
        until = json.dumps(annotation.get("updated_at"))
        digest = None
        address = None
        chosen = set[str]()
        try:
            interface = interface_of(sent["project"]["label_config"])
            chosen = set(
                map(class_name, choices_of({"annotations": [annotation]}, interface.from_name))
            )
            if chosen:
                address = _address(task, interface)
                digest = hashlib.sha256(await service.photos.read(address)).hexdigest()
            if len(chosen) != 1:
                number = counted(len(chosen), "choice")
                raise InputError(f"has {number}; only an annotation with one choice makes a shot")
        except InputError as error:
            reasons = [str(error)]
        of = show(f"of task {sent['project']['id']}/{task.get('id')}")
        said = [(names[0], of, until, digest, json.dumps(address), json.dumps([*chosen]))]
    path = database(one.place, service.uploads)
    for due in await service.find(
        note, path, [(name, until) for name in names], said, one.now.index
    ):
        reasons += await _follow(service, one, due, key_ids)
    await service.find(done, path)
    return reasons


async def _follow(service: Service, one: Served, due: Any, key_ids: list[int]) -> list[str]:
    """Make the shot of a photo what its annotations say, and add the ids of changed keys. Return what is skipped.

    A key that no annotation made was in the index before, and is not changed.
    """
    digest, choices, annotation, address = due
    while (
        True
    ):  # until there is nothing to change, because others may change the index after each look
        await service.find(one.follow)
        index = one.now.index
        rows = (await service.find(index.having, "digest", [digest])).to_pylist()
        before = {row["label"] for row in rows if not row.get(COLUMN)}
        labels = before.union(json.loads(choices))
        several = len(labels) > 1 and bool(labels - before)
        wanted = "" if several else "".join(labels - before)
        if wrong := [row["key_id"] for row in rows if row.get(COLUMN) and row["label"] != wanted]:
            change = (
                partial(changes.relabel, label=wanted)
                if wanted in index.class_names
                else changes.remove
            )
            key_ids += (await service.changed(one, change, key_ids=wrong)).key_ids
        elif wanted and not rows:
            try:
                data = await service.photos.read(json.loads(address))
                if hashlib.sha256(data).hexdigest() != digest:
                    raise InputError(
                        "another photo is now at its address, so it is no shot; update the annotation"
                    )
                key_ids += (
                    await service.add(one, Upload(["its photo"], [wanted], [data]), annotation)
                )[0].key_ids
            except InputError as error:
                return [str(error)]
        elif several:
            end = (
                "the index had it before, and keeps its label"
                if before
                else "it is no shot until its annotations agree"
            )
            return [f"its photo has several labels ({few(sorted(map(repr, labels)))}); {end}"]
        else:
            return []


def _address(task: Json, interface: Interface) -> object:
    data = task.get("data")
    return data.get(interface.photo) if isinstance(data, dict) else None


def _version_of(one: Served) -> str:
    return f"{one.name}@{one.now.manifest.version}"


@photoprism.post("/labels")
async def labels(service: TheService, sent: Json, index: str | None = None) -> Response:
    """Return the labels of images. An image without a match has none."""
    images = sent.get("images")
    version = service.index(index).now
    if not isinstance(images, list) or not 1 <= len(images) <= service.limits.images:
        raise InputError(f"images: must be a list of 1 to {service.limits.images} data URLs")
    names = [f"image {i}" for i in range(len(images))]
    asked = Upload(names, images=[of_data_url(str(image)) for image in images])
    best: dict[str, float] = {}
    answers: list[Json] = (await service.classify(version, BEST, asked)).results
    for found in answers:
        if not found.get("no_match"):
            best[found["label"]] = max(best.get(found["label"], 0.0), found["probability"])
    made = [
        {"name": name, "source": "image", "confidence": p, "topicality": p}
        for name, p in best.items()
    ]
    model = {"type": "labels", "name": version.name, "version": str(version.manifest.version)}
    return json_of(
        {
            "id": show(str(sent.get("id", ""))),
            "code": 200,
            "model": model,
            "result": {"labels": made},
        }
    )
