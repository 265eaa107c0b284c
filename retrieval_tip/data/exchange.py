"""Read labels in the files of CoOp, Label Studio, and programs that use COCO's format."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from retrieval_tip.data import images, remote
from retrieval_tip.data.source import Source, of_images
from retrieval_tip.errors import InputError, Skipped
from retrieval_tip.files import read_json
from retrieval_tip.wording import counted, few, show

log = logging.getLogger(__name__)

MAX_SPLIT = (
    1 << 27
)  # largest JSON file of labels, in bytes; about the size of the split file of ImageNet
LOCAL = "/data/local-files/?d="  # how Label Studio addresses files below its document root


def read(file: Path, split: str, root: str | os.PathLike[str] | None, *, labelled: bool) -> Source:
    """Read the labels in a COCO file, in Label Studio's JSON export, or in the part ``split`` of a CoOp split file.

    Paths are relative to ``root``, which defaults to the folder of the file, or to ``/`` for files that Label Studio
    serves. Photos with several different labels are added to ``failed``. If ``labelled`` is set, photos without a label
    are left out. Photos on an object store must lie below ``root``, because reading them uses the credentials of the
    user. Raises InputError if an entry is invalid, or if no photo is left.
    """
    data = read_json(file, MAX_SPLIT)
    if isinstance(data, dict) and isinstance(data.get("images"), list):
        photos = _of_coco(file, data)
    elif isinstance(data, list) and any(isinstance(task, dict) and "data" in task for task in data):
        photos = _of_label_studio(file, data)
    else:
        return _of_split_file(file, data, split, root)
    found: list[tuple[str, str | None]] = []
    failed: list[Skipped] = []
    for name, labels in photos:
        path = _path(name, file, root)
        if remote.is_remote(path) and not path.startswith(f"{os.fspath(root or '').rstrip('/')}/"):
            bucket = "/".join(path.split("/")[:3])
            raise InputError(
                f"{show(file)}: {show(path)}: lies outside the root; to read it there, give --root {show(bucket)}"
            )
        if len(labels) > 1:
            failed.append(
                Skipped(show(path), f"has several labels ({few(sorted(map(repr, labels)))})")
            )
        elif labels or not labelled:
            found.append((path, next(iter(labels), None)))
    if unlabelled := len(photos) - len(found) - len(failed):
        log.warning("%s: left out %s without a label", show(file), counted(unlabelled, "photo"))
    if not found:
        raise InputError(f"{show(file)}: has no photo with one label")
    return of_images(
        [path for path, _ in found], show(file), [label for _, label in found], failed=failed
    )


def _of_coco(file: Path, data: dict[str, list[object]]) -> list[tuple[str, set[str]]]:
    where = f"{show(file)}: COCO"
    match data:
        case {"categories": list() as categories, "annotations": list() as annotations}:
            pass
        case _:
            raise InputError(f"{where}: has no list 'categories' or no list 'annotations'")
    names: dict[int | str, str] = {}
    for row, category in enumerate(categories):
        match category:
            case {"id": int() | str() as number, "name": str() as name} if name.strip():
                if names.setdefault(number, show(name)) != show(name):
                    raise InputError(
                        f"{where}: category {row} has the id {number!r} of category {names[number]!r}"
                    )
            case _:
                raise InputError(f"{where}: category {row} has no id or no name")
    images: dict[int | str, tuple[str, set[str]]] = {}
    for row, image in enumerate(data["images"]):
        match image:
            case {"id": int() | str() as number, "file_name": str() as path} if (
                path and number not in images
            ):
                images[number] = path, set()
            case _:
                raise InputError(f"{where}: image {row} has no file_name, or no id of its own")
    for row, annotation in enumerate(annotations):
        match annotation:
            case {
                "image_id": int() | str() as number,
                "category_id": int() | str() as category,
            } if number in images and category in names:
                images[number][1].add(names[category])
            case _:
                raise InputError(f"{where}: annotation {row} names no image or no category")
    return list(images.values())


def _of_label_studio(file: Path, tasks: list[object]) -> list[tuple[str, set[str]]]:
    labelled = []
    for row, task in enumerate(tasks):
        match task:
            case {"data": {"image": str() as image}} if image:
                texts = [image]
            case {"data": dict() as values}:
                texts = [value for value in values.values() if isinstance(value, str) and value]
            case _:
                texts = []
        if len(texts) != 1 or not isinstance(task, dict):
            raise InputError(
                f"{show(file)}: Label Studio: task {row} has no photo; its data needs a text 'image'"
            )
        labelled.append((texts[0], choices_of(task)))
    return labelled


def choices_of(task: Mapping[str, object], name: str | None = None) -> set[str]:
    """Return the choices of all annotations of a Label Studio task that were not cancelled.

    If the ``name`` of a tag is given, only its choices count.
    """
    annotations = task.get("annotations")
    chosen: set[str] = set()
    for annotation in annotations if isinstance(annotations, list) else ():
        match annotation:
            case {"was_cancelled": True}:
                pass
            case {"result": list() as results}:
                for result in results:
                    match result:
                        case {"value": {"choices": list() as choices}, **more} if name in (
                            None,
                            more.get("from_name"),
                        ):
                            chosen |= {
                                show(choice)
                                for choice in choices
                                if isinstance(choice, str) and choice.strip()
                            }
    return chosen


def _path(name: str, file: Path, root: str | os.PathLike[str] | None) -> str:
    if name.startswith(LOCAL):
        return os.path.join(
            "/" if root is None or remote.is_remote(root) else root, below_document_root(name)
        )
    if name.startswith("/data/upload/"):  # relative to the media folder of Label Studio
        name = unquote(name.removeprefix("/data/"))
    return name if remote.is_remote(name) else os.path.join(root or file.parent, name)


def below_document_root(address: str) -> str:
    """Return the path of a file that Label Studio serves, relative to its document root."""
    return unquote(address.removeprefix(LOCAL)).lstrip("/")


def _of_split_file(
    file: Path, data: object, split: str, root: str | os.PathLike[str] | None
) -> Source:
    """Read a part of a CoOp split file, a list of ``[path, label, class name]``. Classes are sorted by label number."""
    name = f"{show(file)} ({split})"
    parts = data if isinstance(data, dict) else {}
    if not isinstance(part := parts.get(split), list):
        has = few(list(map(repr, parts))) or "none"
        raise InputError(
            f"{show(file)}: no part {split!r}; expected lists train, val and test, found {has}"
        )
    entries: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    for row, entry in enumerate(part):
        match entry:
            case [str() as path, int() as label, str() as class_name] if (
                type(label) is int and class_name.strip()
            ):
                entries.append((path, show(class_name)))
            case _:
                raise InputError(f"{name}: entry {row} is not [path, label, class name]")
        if names.setdefault(label, class_name) != class_name:
            raise InputError(
                f"{name}: entry {row} gives label {label} the name {class_name!r}; an earlier one {names[label]!r}"
            )
    if not entries:
        raise InputError(f"{name}: empty")
    classes = [show(names[label]) for label in sorted(names)]
    if twice := [class_name for class_name, times in Counter(classes).items() if times > 1]:
        raise InputError(f"{name}: several labels have the class name {twice[0]!r}")
    folder = root or _image_root(file, [path for path, _ in entries])
    paths = [os.path.join(folder, path) for path, _ in entries]
    return of_images(paths, name, [label for _, label in entries], classes)


def _image_root(file: Path, paths: list[str]) -> Path:
    """Return the folder (of the split file, or inside it) that contains the most images of a sample."""
    sample = paths[:: max(1, len(paths) // 16)]

    def held(folder: Path) -> int:
        return sum(os.path.isfile(folder / path) for path in sample)

    best = max(
        [file.parent, *(Path(entry.path) for entry in images.subfolders(file.parent))], key=held
    )
    if not held(best):
        raise InputError(
            f"{show(file)}: cannot find its images (such as {show(sample[0])[:200]}); give --root FOLDER"
        )
    return best
