"""HTTP routes that change indexes. They require the server's token."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request

from retrieval_tip import hooks
from retrieval_tip.data.boxes import PhotoBoxes
from retrieval_tip.data.groups import not_in_index
from retrieval_tip.data.remote import absolute
from retrieval_tip.data.sources import spelled_alike
from retrieval_tip.errors import InputError
from retrieval_tip.files import common_folders
from retrieval_tip.index import added_photos
from retrieval_tip.index import changes as index_changes
from retrieval_tip.index.places import Changed, Place
from retrieval_tip.labelling.labels import NONE
from retrieval_tip.labelling.placing import Action
from retrieval_tip.labelling.pool import MOST_PHOTOS
from retrieval_tip.labelling.sort import (
    NO_MATCH,
    NOT_SURE,
    Sorted,
    check_files,
    sort_photos,
    undo_sort,
)
from retrieval_tip.model import Index
from retrieval_tip.retrieval.duplicates import describe_duplicates
from retrieval_tip.server import manage, schemas, shots
from retrieval_tip.server.access import CHANGES, Named, NotLabelled, TheLabelling, TheService
from retrieval_tip.server.guard import give_time
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.routes import Norms
from retrieval_tip.server.served import Maker, Served
from retrieval_tip.server.service import Service, backbone_of
from retrieval_tip.server.uploads import read, read_form
from retrieval_tip.wording import command_line, show
from retrieval_tip.writers import Answered, Outcome, Row

changes = APIRouter(prefix="/v1", dependencies=CHANGES)


# --- shots


@changes.post("/indexes/{name}/keys", status_code=201, openapi_extra=schemas.ADD)
async def add(
    request: Request, service: TheService, one: Named, norms: Norms = "check"
) -> schemas.ChangedIndex:
    """Add labelled images or features as shots, in a new version of the index.

    If a label is new, a new class is added for it.
    """
    sent = await read(request, service.limits, norms, one.now.index.d, labelled=True)
    added, skipped = await service.add(one, sent)
    return _answer(
        one,
        key_ids=added.key_ids,
        classes=added.classes,
        known=added.known,
        duplicates=[] if added.duplicates is None else describe_duplicates(added.duplicates),
        warnings=_of_spelling(added.alike),
        skipped=skipped,
    )


@changes.delete("/indexes/{name}/keys")
async def remove(
    service: TheService,
    one: Named,
    key_id: Annotated[list[schemas.KeyId], Query(min_length=1, max_length=1000)],
) -> schemas.ChangedIndex:
    """Remove shots, in a new version of the index."""
    return await _told(
        service, one, await service.changed(one, index_changes.remove, key_ids=key_id)
    )


@changes.post("/indexes/{name}/relabel")
async def relabel(service: TheService, one: Named, change: schemas.Relabel) -> schemas.ChangedIndex:
    """Move shots to other classes, in one new version of the index."""
    return await _told(
        service, one, await service.changed(one, index_changes.relabel, change.labels)
    )


@changes.post("/indexes/{name}/rename")
async def rename(service: TheService, one: Named, change: schemas.Rename) -> schemas.ChangedIndex:
    """Rename a class, in a new version of the index.

    If a class with the new name already exists, the two classes are merged. Otherwise, the new name is encoded if the
    server has the text encoder.
    """
    index = one.now.index
    backbone = one.now.backbone
    if (
        backbone is None
        or not backbone.has_text
        or not index.templates
        or change.label in index.class_names
    ):
        backbone = None
    done = await service.changed(one, index_changes.rename, change.of, change.label, backbone)
    return await _told(service, one, done)


@changes.post("/indexes/{name}/rollback")
async def rollback(
    service: TheService, one: Named, change: schemas.Rollback
) -> schemas.ChangedIndex:
    """Restore an earlier version, as a new version. The current version is kept."""

    def call(place: Place, *, base: Index) -> Changed:
        current = one.place.manifest().version
        kept = one.place.names()
        if change.since not in (None, current):
            now = f"it is at version {current}, not {change.since}"
            raise Problem(409, f"the index has changed: {now}; reload it and try again")
        if change.to not in kept:
            versions = ", ".join(map(str, kept))
            raise Problem(
                404, f"index {one.name!r} has no version {change.to}; its versions are {versions}"
            )
        return index_changes.rollback(place, change.to, expect=change.since)

    return await _told(service, one, await service.changed(one, call))


async def _told(service: Service, one: Served, changed: Changed) -> schemas.ChangedIndex:
    """Describe a change of shots, and name the command that sorts them into folders."""
    index = changed.index
    sources = index.labels["source"].to_pylist() if index.n <= added_photos.LISTED else []
    paths = [os.path.join(service.root, source) for source in sources]  # noqa: PTH118 - much faster
    sort = await service.find(added_photos.command, "sort", one.folder, paths, "--into", "fixed")
    return _answer(one, key_ids=changed.key_ids, sort=sort)


def _answer(one: Served, **more: Any) -> schemas.ChangedIndex:
    fit = one.now.index.provenance.get("fit", {})
    return schemas.ChangedIndex(index=one.name, version=one.now.manifest.version, fit=fit, **more)


# --- indexes


@changes.post("/indexes", status_code=201, openapi_extra=schemas.MAKE)
async def create(
    request: Request,
    service: TheService,
) -> schemas.ChangedIndex:
    """Create an index from labelled images, fit it and serve it.

    By default, it gets the encoder and the folder that the server was started with, or else those of the first index.
    """
    new, sent = await read_form(request, service.limits, schemas.NewIndex)
    (name,), maker = new.name, service.maker
    if maker is None:
        model = service.index(
            next((name for name, one in service.served.items() if one.now.backbone), None)
        )
        backbone = backbone_of(model.now)
        into = model.beside
        if into is None:
            raise InputError(
                "the index is in a bucket; to create indexes, restart the server with --out FOLDER"
            )
        maker = Maker(into, lambda: backbone, model.backbones)
    _check_free(service, name, maker.into, another=True)
    used = await service.change(maker.load)
    readable, skipped = await service.read(sent, used)
    place = maker.into / name
    backbones = maker.backbones
    one = await service.open(
        lambda: Served(place, backbones, shots.build(place, used, readable, service.uploads))
    )
    return _answer(
        one, warnings=_of_spelling(spelled_alike(one.now.index.class_names)), skipped=skipped
    )


@changes.post("/indexes/{name}/fit")
async def fit(service: TheService, one: Named) -> schemas.ChangedIndex:
    """Fit an index to its shots again, and estimate its accuracy on the examples."""
    await service.changed(one, index_changes.fit_index)
    return _answer(one)


@changes.post("/indexes/{name}/set")
async def set_groups(
    service: TheService, one: Named, table: Annotated[bytes, Body(media_type="text/csv")]
) -> schemas.ChangedIndex:
    """Set the groups of the classes, given as a table in CSV.

    The first column has the classes, and each further column their groups, narrowest first.
    """
    await service.changed(one, index_changes.configure, groups=table)
    groups = one.now.index.groups
    others = [] if groups is None else groups.others(one.now.index.class_names)
    return _answer(one, warnings=[not_in_index(others)] if others else [])


@changes.patch("/indexes/{name}")
async def rename_index(
    service: TheService, one: NotLabelled, new: schemas.IndexName
) -> schemas.ChangedIndex:
    """Rename an index and its folder."""
    _check_free(service, new.name, one.beside)
    made = await service.open(
        lambda: Served(manage.rename(one.folder, new.name), one.backbones), one
    )
    return _answer(made)


@changes.post("/indexes/{name}/duplicate", status_code=201)
async def duplicate_index(
    service: TheService, one: Named, new: schemas.IndexName
) -> schemas.ChangedIndex:
    """Copy the current version of an index to a new index next to it."""
    _check_free(service, new.name, one.beside, another=True)
    made = await service.open(lambda: Served(manage.duplicate(one.folder, new.name), one.backbones))
    return _answer(made)


@changes.delete("/indexes/{name}")
async def delete_index(service: TheService, one: NotLabelled) -> schemas.ChangedIndex:
    """Delete an index, its versions, and the images that were added to it here. This cannot be undone."""
    await service.change(manage.delete, one.folder)
    service.replace(one)
    return _answer(one)


def _check_free(service: Service, name: str, into: Path | None, *, another: bool = False) -> None:
    if name in service.served or (into is not None and (into / name).exists()):
        where = f" in {show(into)}" if into else ""
        raise Problem(409, f"index {name!r} already exists{where}; choose another name")
    if another and len(service.served) >= service.limits.indexes:
        raise Problem(
            409,
            f"the server already has {service.limits.indexes} indexes, which is the limit; delete some",
        )


def _of_spelling(alike: Mapping[str, str]) -> list[str]:
    return [
        f"{new!r} is spelled almost like {known!r}; rename one to merge them"
        for new, known in alike.items()
    ]


# --- labelling


@changes.post("/label")
async def label(labelling: TheLabelling, change: schemas.SetLabels) -> schemas.Row:
    """Set or remove labels, and return the new state. The labels are saved within seconds, as a new version."""
    await labelling.label(change)
    return labelling.status()


@changes.post("/label/encoder")
async def label_encoder(labelling: TheLabelling, change: schemas.JoinEncoder) -> schemas.Row:
    """Join the encoder that the session offers, or decline it, and return the new state. Photos are encoded meanwhile.

    A request to decline also stops the encoding.
    """
    labelling.joining.answer(change.join)
    return labelling.status()


@changes.post("/label/photos", status_code=201, openapi_extra=schemas.KEEP)
async def label_photos(
    request: Request, service: TheService, labelling: TheLabelling
) -> schemas.Row:
    """Keep images as photos of the labelling session, and return their numbers.

    Of a video, the frames are kept. An image that the session already has keeps its number.
    """
    _, sent = await read_form(request, service.limits, schemas.Images)
    reader = labelling.photos.reader
    assert reader.backbone is not None
    give_time()
    good, skipped = await service.read(sent, reader.backbone, encode=False)
    return {
        "photos": await labelling.add(zip(good.names, good.images, strict=True)),
        "skipped": skipped,
    }


@changes.post("/label/sort")
async def label_sort(
    service: TheService, labelling: TheLabelling, change: schemas.SortInto
) -> schemas.Row:
    """Sort the photos of the labelling session into folders by class, as `retrieval-tip sort` does, or undo it.

    ``undo`` is the command that undoes it. ``folder`` is the absolute path. ``aside`` counts the photos that get no
    class, because they have no match or a probability below ``least``. ``promise`` tells how ``least`` was found, and
    what follows for other photos. A dry run only considers photos that have been read.
    """
    give_time()
    version = labelling.version()
    known = labelling.photos
    reader = replace(known.reader_for(labelling.session.index), skipped=[])
    every = known.own(known.paths)
    source = known.chosen(every)
    paths = source.paths or ()
    folder = Path(os.path.expanduser(change.into)).absolute()  # noqa: PTH111 - "~nobody" may be the name of a folder
    xmp = change.action == "xmp"
    run = partial(service.run, labelling.encoding)
    sidecars = hooks.find("writers", "xmp")()
    if xmp:
        check_files([source], "xmp", "they have no sidecars")
    done = Sorted("")
    written = Outcome()
    if change.undo and xmp:
        written = await run(sidecars.undo, [source])
    elif change.undo:
        done = await run(undo_sort, folder)
    elif version is None:
        raise Problem(404, "there are no labels yet; label some photos first")
    else:
        some = known.own(labelling.session.labels()) if change.labelled else every
        if change.dry_run:
            some = [photo for photo in some if photo in known.encoded]
            if not some:
                raise InputError("photos: have not been read yet; try again later")
            reader = await run(known.remembered, some, version.index)
        action: Action = "copy" if change.action == "xmp" else change.action
        most = change.at_most_wrong
        smooth = not change.labelled and version.index.n <= service.limits.estimated
        call = partial(
            sort_photos,
            action=action,
            at_most_wrong=most,
            smooth=smooth,
            dry_run=xmp or change.dry_run,
        )
        done = await run(call, version.index, [known.chosen(some)], reader, folder)
        if xmp and not change.dry_run:
            answers = Answered(
                _keywords(done), (), version.index.groups, [source], PhotoBoxes([source])
            )
            written = await run(sidecars.write, answers, None)
    undo = command_line("sort", "--undo", "--into", folder)
    if xmp:
        inside = [known.path(photo) for photo in every if photo < MOST_PHOTOS]
        folders = [*common_folders(inside or paths), *filter(os.path.isdir, [labelling.dropped])]
        undo = command_line(
            "classify", absolute(str(labelling.place)), *folders, "--format", "xmp", "--undo"
        )
    return {
        "summary": written.said or str(done),
        "undo": undo,
        "skipped": [*done.skipped, *written.skipped],
        "folder": show(folder),
        "photos": len(done.rows),
        "aside": done.aside,
        "least": done.threshold and done.threshold.probability,
        "promise": done.threshold and f"{done.threshold}.",
    }


def _keywords(planned: Sorted) -> Iterator[Row]:
    """Yield the answers that a dry run of :func:`sort_photos` has planned. Photos that are set aside get no label."""
    without = (NO_MATCH, NOT_SURE)
    for row in planned.rows:
        is_aside = row.output.partition("/")[0] in without
        label = None if is_aside or row.label == NONE else row.label
        yield {
            "input": row.input,
            "label": label,
            "probability": row.probability,
            "no_match": False,
        }
