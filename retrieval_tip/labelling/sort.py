"""Sort photos into folders by their predicted class, and undo it (see :mod:`placing`)."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import InitVar, dataclass, field, replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from retrieval_tip import platforms
from retrieval_tip.data import images, remote
from retrieval_tip.data.reader import FeatureBlock, Reader
from retrieval_tip.data.source import Source, read_item, whole_file
from retrieval_tip.errors import InputError, Skipped, UsageError
from retrieval_tip.evaluation.held_out import Threshold, held_out_probabilities, threshold_of
from retrieval_tip.files import locked_folder, make_folders, real, remove_leftovers, sha256_of
from retrieval_tip.labelling import placing
from retrieval_tip.labelling.clips import by_file, joint
from retrieval_tip.labelling.placing import (
    EMPTY,
    MANIFEST,
    Action,
    Placed,
    digest_at,
    digest_of,
    safe_name,
)
from retrieval_tip.labelling.smoothing import smooth as smoothed
from retrieval_tip.model import Index
from retrieval_tip.predictions import MORE_LIKELY_WRONG
from retrieval_tip.settings import Ask, check_choice
from retrieval_tip.wording import counted, one_line, show

log = logging.getLogger(__name__)

NO_MATCH, NOT_SURE = "no match", "not sure"
"""The folders of photos that match no class, and of photos whose answer has a low probability."""

_Answered = tuple[str, str, dict[str, Any]]
"""The path and the digest of a photo, and its label, probability and ``no_match``."""
_ASK = Ask(neighbours=0, logits=False)
_COLUMNS = ["label", "probability", "no_match"]
_VERBS: dict[Action, str] = {"copy": "copied", "link": "linked", "move": "moved"}


@dataclass
class Sorted:
    """The rows of the manifest for the photos of a call, in order, and the photos that were ``skipped``.

    ``done`` is the number of photos that were copied, linked, moved or restored. The others were already there.
    ``threshold`` is set if it was chosen on held-out photos, and ``smoothing`` says what similar photos changed.
    """

    verb: str
    threshold: Threshold | None = None
    smoothing: str | None = None
    rows: list[Placed] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    done: int = 0

    @property
    def aside(self) -> dict[str, int]:
        """The numbers of photos in the folders ``no match`` and ``not sure``."""
        places = Counter(row.output.partition("/")[0] for row in self.rows)
        return {name: places[name] for name in (NO_MATCH, NOT_SURE)}

    def __str__(self) -> str:
        text = f"{self.verb} {counted(self.done, 'photo')}"
        parts = [f"{number:,} {name}" for name, number in self.aside.items() if number]
        parts += (
            [f"{len(self.rows) - self.done:,} already there"] if self.done < len(self.rows) else []
        )
        return text + (f" ({', '.join(parts)})" if parts else "")


def sort_photos(
    index: Index,
    sources: Sequence[Source],
    reader: Reader,
    folder: str | os.PathLike[str],
    *,
    action: Action = "copy",
    min_probability: float | None = None,
    at_most_wrong: float | None = None,
    smooth: bool = False,
    dry_run: bool = False,
) -> Sorted:
    """Sort photos into ``folder/CLASS``, and return the rows of the manifest ``sorted.csv``.

    Photos without a match go to ``no match``, and photos whose probability is below ``min_probability``, by default
    0.5, to ``not sure``. With ``at_most_wrong``, it is the lowest probability above which at most this share of
    held-out photos of the index is wrong (see :func:`held_out.threshold_of`). With ``smooth``, each answer is mixed
    with those of similar photos (see :mod:`labelling.smoothing`). Photos that the index contains keep their label. A
    file of several photos is placed once, by the mean of their probabilities, or by the label that most of those in the
    index have. No file is overwritten: if a name is taken, a number is added. If the folder already contains a photo
    with the same name and the same bytes, it is not written again. An interrupted call can be repeated.

    ``action`` is ``copy``, ``link`` (a symbolic link) or ``move``. Only files can be linked or moved. The ids of a
    feature table are read as paths. ``reader.skipped`` lists the photos that cannot be read. A ``dry_run`` changes
    nothing.

    Raises UsageError if the action is unknown, or if some photos are not files and cannot be linked or moved. Raises
    InputError if the folder cannot be written, or if a class folder is a link. No photo is placed before all are
    classified.
    """
    check_choice("action", action, Action)
    if at_most_wrong is not None and (min_probability is not None or not 0 <= at_most_wrong < 1):
        raise UsageError(
            f"at_most_wrong {at_most_wrong}: give a share from 0 to 1, and no min_probability"
        )
    if action != "copy":
        check_files(sources, action, "copy them instead")
    reader = reader.for_queries(index.parts, index.shares)
    blocks: Iterable[tuple[Source, FeatureBlock]] = (
        (own, block) for own in sources for block in reader.blocks(own)
    )
    smoothing, threshold = None, None
    if smooth:
        own_sources, read = zip(*_joined(blocks), strict=True)
        smoothing = smoothed(index, read)
        blocks = zip(own_sources, smoothing.blocks, strict=True)
    if at_most_wrong is not None:
        held = smoothing.held if smoothing else held_out_probabilities(index.in_memory())
        threshold = threshold_of(held, at_most_wrong)
    least = MORE_LIKELY_WRONG if min_probability is None else min_probability
    least = least if threshold is None else threshold.probability
    said = smoothing and smoothing.words
    root = Path(folder)
    result = Sorted(_VERBS[action], threshold, said, skipped=reader.skipped)
    with locked(root, dry_run=dry_run):
        before = placing.read_manifest(root)
        plan = _Outputs(root, action, least, before, class_folders(before, index.class_names))
        answered = _classified(index, blocks, reader.skipped)
        rows = [plan.row(item, digest, **answer) for item, digest, answer in answered]
        placing.check_folders(root, [*before, *rows])
        if not dry_run:
            placing.remove_scratch([root])
            placing.write_manifest(root, dict.fromkeys([*before, *rows]))
        result.rows += rows if dry_run else _placed(rows, root, action, result)
    return result


def _joined(blocks: Iterable[tuple[Source, FeatureBlock]]) -> Iterator[tuple[Source, FeatureBlock]]:
    """Join the blocks of each source, because many small ones would take much longer."""
    for _, group in groupby(blocks, lambda pair: id(pair[0])):
        (source, *_), own = zip(*group, strict=True)
        yield source, FeatureBlock.joined(own)


def check_files(sources: Sequence[Source], what: str, advice: str) -> None:
    """Raise UsageError if some photos are not files."""
    for source in sources:
        if source.table is not None or any(map(remote.is_address, source.paths or ())):
            raise UsageError(f"{what}: {source.name} has photos that are not files; {advice}")


@contextmanager
def locked(folder: Path, *, dry_run: bool = False) -> Iterator[None]:
    """Create and lock the folder, unless nothing changes, and convert an OSError into one line.

    A new folder is removed if it stays empty.
    """
    try:
        if dry_run:
            yield
            return
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        make_folders(folder)
        with locked_folder(real(folder), alone=True, wait=0) as alone:
            if not alone:
                raise InputError(
                    f"{show(folder)}: another process is changing it; wait until it is done"
                )
            try:
                yield
            finally:
                for place in new:
                    with suppress(OSError):  # it contains photos
                        place.rmdir()
    except OSError as error:
        if isinstance(error, InputError):
            raise
        where = show(error.filename if isinstance(error.filename, str) else folder)
        raise InputError(
            f"{where}: {error.strerror or error}; run the command again to continue"
        ) from None


def _classified(
    index: Index, blocks: Iterable[tuple[Source, FeatureBlock]], skipped: list[Skipped]
) -> Iterator[_Answered]:
    for source, file, block in by_file(blocks, whole_file):
        if file:
            yield from _of_file(index, source, block, file, skipped)
            continue
        paths = source.paths
        for answers in index.answers([block], _ASK):
            positions = answers.block.positions
            digests = answers.block.digests
            own = source.items["source"].take(pa.array(positions)).to_pylist()
            names = own if paths is None else [paths[i] for i in positions]
            table = answers.predictions().written(_COLUMNS)
            own_labels = dict(index.known(digests))
            for name, digest, answer in zip(names, digests, table.to_pylist(), strict=True):
                if digest in own_labels:
                    answer = _certain(own_labels[digest])
                is_id = paths is None and not os.path.lexists(name)
                item = name if is_id else remote.absolute(name)
                try:
                    digest = digest or hashlib.sha256(read_item(item)).hexdigest()
                except InputError as error:
                    _skip(skipped, name, str(error))
                else:
                    yield item, digest, answer


def _of_file(
    index: Index, source: Source, block: FeatureBlock, file: str, skipped: list[Skipped]
) -> Iterator[_Answered]:
    """Yield the answer to all photos of a file, unless the file cannot be read."""
    photo = joint(index, source, block, _ASK)
    (answers,) = index.answers([photo], _ASK)
    (answer,) = answers.predictions().written(_COLUMNS).to_pylist()
    labels = Counter(label for _, label in index.known(block.digests))
    for label, _ in labels.most_common(1):
        answer = _certain(label)
    with skipping(file, "cannot be read", skipped):
        yield remote.absolute(file), sha256_of(Path(file)), answer


def _certain(label: str) -> dict[str, Any]:
    return {"label": label, "probability": 1.0, "no_match": False}


def _skip(skipped: list[Skipped], path: str | Path, reason: str) -> None:
    skipped.append(Skipped(show(path), reason))
    log.warning("skipped %s", skipped[-1])


@dataclass
class _Outputs:
    """Chooses the output of each photo. ``known`` holds the last row of each input.

    Names that differ only in case are the same name, as on Windows. ``names`` has their spelling in each folder, and
    ``digests`` what will be there.
    """

    folder: Path
    action: Action
    least: float
    before: InitVar[Iterable[Placed]]
    folders: dict[str, str]
    known: dict[str, Placed] = field(init=False)
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self, before: Iterable[Placed]) -> None:
        self.known = {row.input: row for row in before}

    def row(
        self, item: str, digest: str, label: str, probability: float, no_match: bool | None
    ) -> Placed:
        """Return the row of a photo, which may be a row of the manifest."""
        part = NOT_SURE if probability < self.least else self.folders[label]
        part = NO_MATCH if no_match else part
        old = self.known.get(item)
        if old is not None and old.digest == digest and old.output.startswith(f"{part}/"):
            there = self._digest(old.output)
            unfinished = old.action != "kept" and (
                there is None or (there == EMPTY and self.action != "link")
            )
            if unfinished or (
                there == old.digest and (old.action, self.action) == ("copy", "move")
            ):
                self.known[item] = old = replace(old, action=self.action)
            if unfinished or there == old.digest:
                self.digests[old.output] = old.digest
                return old
        path = Path(item)
        name = safe_name(path.name or item)
        if name != path.name and real(path.parent) == real(
            self.folder / part
        ):  # it was sorted by an earlier call
            name = path.name
        for number in count(1):
            output = self._spelled(part, placing.numbered(name, number))
            there = self._digest(output)
            if there in (None, digest):
                break
        action = self.action if there is None else "kept"
        row = Placed(item, label, probability, output, action, digest)
        self.known[item], self.digests[output] = row, digest
        return row

    def _spelled(self, part: str, name: str) -> str:
        """Return the output of this name, as it is spelled in the folder. An equal spelling comes first."""
        if part not in self.names:
            place = self.folder / part
            there = place.iterdir() if place.is_dir() else ()
            self.names[part] = {other.name.casefold(): other.name for other in there}
        if not os.path.lexists(self.folder / part / name):
            name = self.names[part].setdefault(name.casefold(), name)
        return f"{part}/{name}"

    def _digest(self, output: str) -> str | None:
        if output not in self.digests:
            self.digests[output] = digest_at(self.folder / output)
        return self.digests[output]


def class_folders(before: Iterable[Placed], labels: Iterable[str]) -> dict[str, str]:
    """Return the name of the folder of each class, which it keeps if it has photos in the manifest.

    The names differ from each other, and from the folders of photos without an answer, even where case is ignored.
    """
    folders = dict[str, str]()
    for row in before:
        part = row.output.partition("/")[0]
        if part not in (NO_MATCH, NOT_SURE):
            folders[row.label] = part
    for label in labels:
        if label not in folders:
            name = safe_name(label)
            if name.casefold() in (NO_MATCH, NOT_SURE, MANIFEST):
                name = placing.escaped_first(name)
            folders[label] = placing.distinct(name, folders.values())
    return folders


def _placed(
    rows: Iterable[Placed], folder: Path, action: Action, result: Sorted
) -> Iterator[Placed]:
    for row in rows:
        with skipping(row.input, f"cannot be {_VERBS[action]}", result.skipped):
            if row.action == action:  # otherwise, the photo is already there
                result.done += placing.place(row.input, folder / row.output, action, row.digest)
            elif not os.path.lexists(folder / row.output):
                raise InputError("has the same name and the same bytes as a photo that was skipped")
            yield row


@contextmanager
def skipping(path: str | Path, what: str, skipped: list[Skipped]) -> Iterator[None]:
    """Convert an error into a skipped file. Raise it again if the disk is full, which concerns all files."""
    try:
        yield
    except InputError as error:
        _skip(skipped, path, str(error).removeprefix(f"{one_line(str(path))}: "))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = "" if error.filename in (None, str(path)) else f"{show(str(error.filename))}: "
        _skip(skipped, path, f"{what}: {where}{error.strerror or error}")


def undo_sort(folder: str | os.PathLike[str]) -> Sorted:
    """Undo all calls of :func:`sort_photos` for a folder, latest first, and return the rows that were undone.

    Moved photos return to their old place. Copies are deleted if the original still has the same bytes, and links are
    deleted. A photo that has changed since, or that cannot be moved, is ``skipped`` and stays in the manifest.

    Somebody else may have written the manifest. So a file is only moved to a path that ends like an image, nothing is
    overwritten, and no last copy is deleted.

    Raises InputError if the folder has no manifest, if the manifest is damaged or a class folder is a link, or if the
    disk is full.
    """
    root = Path(folder)
    if not (root / MANIFEST).exists():
        raise InputError(f"{show(root)}: has no {MANIFEST}; give the folder that sort has written")
    result = Sorted("undid the sorting of")
    left = list[Placed]()
    with locked(root):
        rows = placing.read_manifest(root)
        placing.check_folders(root, rows)
        placing.remove_scratch([root])
        for row in reversed(rows):
            target = root / row.output
            left.append(row)
            with skipping(target, "cannot be restored", result.skipped):
                if _undone(row, target):
                    result.rows.append(row)
                left.pop()
        result.done = len(result.rows)
        for part in {(root / row.output).parent for row in rows}:
            with suppress(OSError):  # it contains other files
                part.rmdir()
        if left:
            placing.write_manifest(root, reversed(left))
        else:
            (root / MANIFEST).unlink()
    return result


def _undone(row: Placed, target: Path) -> bool:
    """Undo a row, and return whether this restores a photo. Raises InputError if it is impossible."""
    if row.action == "kept":
        return False
    if row.action == "link":
        linked = target.is_symlink()
        if linked and not placing.is_link_to(target, row.input):
            raise InputError("is another link")
        if linked:
            target.unlink()
        return linked
    original = Path(row.input)
    there = digest_at(target)
    if target.is_symlink() or there not in (None, EMPTY, row.digest):
        raise InputError("has changed")
    if there == row.digest:
        same = original.exists() and target.samefile(original)
        if digest_of(row.input) == row.digest and not same:
            platforms.delete_file(target)
        elif row.action == "copy" or digest_at(original) not in (None, EMPTY):
            raise InputError(
                f"is now the only copy, because {show(original)} is gone or has changed"
            )
        elif not images.is_photo(original):
            raise InputError(f"is not called like an image; move it to {show(original)} yourself")
        else:
            placing.place(str(target), original, "move", row.digest)
    elif row.action == "move" and digest_of(row.input) != row.digest:
        raise InputError(f"is missing, and so is {show(original)}")
    elif there == EMPTY:
        target.unlink()
        remove_leftovers(target.parent, row.digest)
    return there == row.digest
