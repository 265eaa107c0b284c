"""All photos of a labelling session: their answers, and folders by class."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

from retrieval_tip.labelling.placing import Action
from retrieval_tip.labelling.review import Guessed, guesses, unknown_groups
from retrieval_tip.labelling.sidecars import undo_sidecars, write_planned
from retrieval_tip.labelling.sort import check_files, sort_photos, undo_sort
from retrieval_tip.server import schemas
from retrieval_tip.server.labelling import Labelling
from retrieval_tip.server.problems import Problem
from retrieval_tip.server.schemas import Row


async def answers(session: Labelling) -> Row:
    """Return the labels and answers of all photos that have been read. Until there are labels, there are none.

    The result is a :class:`schemas.FolderAnswers`, without the time to check thousands of photos.
    """
    version, labels, photos = session.version(), session.labels(), session.photos
    shown = [photo for photo in sorted(photos.encoded | labels.keys()) if photo < len(photos)]
    rows = [photo for photo in shown if photo not in labels]
    found, groups = dict[int, Guessed](), list[list[int]]()
    if version is None or session.is_empty(version):
        shown = []
    elif rows:
        features = photos.rows(rows)
        guessed = await session.service.find(guesses, version.index, features)
        found = dict(zip(rows, guessed, strict=True))
        alike = await session.service.find(unknown_groups, version.index, features, guessed)
        groups = [[rows[row] for row in own] for own in alike]
    listed = []
    for photo in shown:
        one: Row = {"photo": photo, "name": photos.names[photo], "label": None, "guesses": [], "unlike": False}
        if photo in labels:
            one["label"] = labels[photo].label
        else:
            one |= {"guesses": found[photo].rows, "unlike": found[photo].unlike}
        listed.append(one)
    return {"version": version and version.manifest.version, "photos": listed, "groups": groups}


async def sort(session: Labelling, change: schemas.SortInto) -> schemas.SortedPhotos:
    """Sort photos into folders by class, or write the classes into their sidecars, or undo it.

    Raises Problem 404 without an index, and InputError or UsageError if the photos cannot be sorted like this.
    """
    version, reader = session.version(), replace(session.photos.reader, skipped=[])
    folder, paths, xmp = Path(change.into).expanduser(), session.photos.source.paths or (), change.action == "xmp"
    if xmp:
        check_files([session.photos.source], "xmp", "they have no sidecars")
    if change.undo and xmp:
        done = await session.service.run(session.encoding, undo_sidecars, paths)
    elif change.undo:
        done = await session.service.run(session.encoding, undo_sort, folder)
    elif version is None or session.is_empty(version):
        raise Problem(404, "there are no labels yet; label some photos first")
    else:
        some = sorted(session.labels()) if change.labelled else range(len(session.photos))
        photos = session.photos.source.take([photo for photo in some if photo < len(session.photos)])
        action: Action = "copy" if change.action == "xmp" else change.action
        call = partial(sort_photos, action=action, at_most_wrong=change.at_most_wrong, dry_run=xmp)
        done = await session.service.run(session.encoding, call, version.index, [photos], reader, folder)
        if xmp:
            done = await session.service.run(session.encoding, write_planned, done, version.index.groups)
    words = ["sort", "--undo", "--into", str(folder.absolute())]
    if xmp:
        words = ["classify", str(session.place), os.path.commonpath(paths), "--xmp", "--undo"]
    undo = shlex.join(["retrieval-tip", *words])
    skipped = [schemas.Unread(input=one.source, reason=one.reason) for one in done.skipped]
    summary = str(done) if done.threshold is None else f"{done}; {done.threshold}"
    return schemas.SortedPhotos(summary=summary, undo=undo, skipped=skipped)
