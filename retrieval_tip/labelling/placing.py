"""Copy, link and move photos into folders without overwriting or losing a photo, and list them in a manifest.

A row of the manifest is on the disk before the photo is placed. Then an empty file reserves the name of the photo, the
bytes are written to a temporary file and flushed, and the temporary file replaces the empty one. After a kill, the
manifest therefore lists all photos that were placed, and an empty file marks an unfinished photo. Its temporary file is
named after its digest, so that undoing the manifest of somebody else deletes no other hidden file.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, get_args
from urllib.parse import unquote

from retrieval_tip import files, platforms
from retrieval_tip.data.source import read_item
from retrieval_tip.errors import InputError
from retrieval_tip.wording import show

Action = Literal["copy", "link", "move"]

MANIFEST = "sorted.csv"
MAX_MANIFEST = 1 << 30
"""Maximum size of a manifest in bytes."""
LONGEST = 200
"""Maximum length of a name in bytes, which leaves room for a number."""
EMPTY = hashlib.sha256().hexdigest()
SCRATCH = "photo"
"""Name of the temporary files of manifests and sidecars."""

_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]|%(?=[0-9A-Fa-f]{2})|^[. ]|[. ]$')
_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL
)  # on Windows
_LETTER = r"[^/\0]" if os.sep == "/" else r"[^/\0\\:]"
_OUTPUT = re.compile(rf"(?!\.\.?/){_LETTER}+/(?!\.\.?$){_LETTER}+")
_MOVED = re.compile(
    rf"([A-Za-z]:|/)?(/(?!\.\.?(/|\Z)){_LETTER}+)+"
)  # an absolute path without empty parts, . or ..
_LETTERS = re.compile("%[0-9A-F]{2}|.", re.DOTALL)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ACTIONS = {*get_args(Action), "kept"}


@dataclass(frozen=True)
class Placed:
    """A row of the manifest.

    Attributes:
        input: the absolute path of the photo, or its name if it is not a file.
        label: the most probable class.
        probability: the probability of that class.
        output: the path of the photo in the folder.
        action: ``copy``, ``link``, ``move``, or ``kept`` if the folder already contained a photo with the same name and
            the same bytes.
        digest: the SHA-256 digest of the photo.
    """

    input: str
    label: str
    probability: float
    output: str
    action: str
    digest: str


COLUMNS = [field.name for field in fields(Placed)]


def safe_name(name: str) -> str:
    """Return a name that every file system accepts. Different names stay different.

    Unsafe characters are escaped as in a URL, for example ``/`` as ``%2F``. A long name is cut, and ends with a digest.
    """
    safe = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", name) or "%00"
    safe = escaped_first(safe) if _RESERVED.fullmatch(safe) else safe
    data = safe.encode("utf-8", "surrogateescape")
    if len(data) <= LONGEST:
        return safe
    suffix = Path(safe).suffix
    end = f"~{hashlib.sha256(data).hexdigest()[:16]}{suffix if len(suffix) <= 16 else ''}"
    return (
        data[: LONGEST - len(end.encode("utf-8", "surrogateescape"))].decode("utf-8", "ignore")
        + end
    )


def escaped_first(name: str) -> str:
    """Escape the first character of a name."""
    return f"%{ord(name[0]):02X}{name[1:]}"


def distinct(name: str, others: Iterable[str]) -> str:
    """Escape as many letters of a safe name as distinguish it from ``others`` where case is ignored.

    Names that stand for the same text are not distinguished. An escaped letter keeps its case on every system.
    """
    taken = {other.casefold() for other in others if unquote(other) != unquote(name)}
    letters = _LETTERS.findall(name)
    for place, letter in enumerate(letters):
        if "".join(letters).casefold() not in taken:
            break
        if len(letter) == 1:
            letters[place] = "".join(f"%{byte:02X}" for byte in os.fsencode(letter))
    return "".join(letters)


def numbered(name: str, number: int) -> str:
    """Add a number to a file name, for example ``cat-2.jpg``, unless it is 1."""
    return name if number == 1 else f"{Path(name).stem}-{number}{Path(name).suffix}"


def read_manifest(folder: Path) -> list[Placed]:
    """Return the rows of a folder's manifest, or an empty list without one. Raises InputError if it is damaged."""
    path = folder / MANIFEST
    try:
        text = files.read_regular(path, MAX_MANIFEST).decode("utf-8", "surrogateescape")
        head, *rows = filter(None, csv.reader(io.StringIO(text, newline="")))
        placed = [Placed(row[0], row[1], float(row[2]), *row[3:]) for row in rows]
        valid = (
            _OUTPUT.fullmatch(row.output)
            and _DIGEST.fullmatch(row.digest)
            and (row.action != "move" or _is_original(row.input))
            for row in placed
        )
        if head != COLUMNS or not all(valid) or not {row.action for row in placed} <= _ACTIONS:
            raise ValueError
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, IndexError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{show(path)}: was not written by sort, or is damaged; choose another folder"
        ) from None
    return placed


def _is_original(item: str) -> bool:
    return Path(item).is_absolute() and _MOVED.fullmatch(item) is not None


def check_folders(folder: Path, rows: Iterable[Placed]) -> None:
    """Raise InputError if a class folder is a link, because undoing would then delete photos elsewhere."""
    for part in {(folder / row.output).parent for row in rows}:
        if part.is_symlink():
            raise InputError(f"{show(part)}: is a link; replace it by a folder")


def write_manifest(folder: Path, rows: Iterable[Placed]) -> None:
    """Replace the manifest of a folder, and wait until it is on the disk."""
    text = files.csv_of([COLUMNS, *map(astuple, rows)])
    path = folder / MANIFEST
    write(text.encode("utf-8", "surrogateescape"), path, partial(shutil.copymode, path))
    files.sync(folder)


def remove_scratch(folders: Iterable[Path]) -> None:
    """Remove the temporary files of killed processes in these folders."""
    for folder in set(folders):
        files.remove_leftovers(folder, SCRATCH)


def digest_at(path: Path) -> str | None:
    """Return the digest of a file, ``""`` for anything else, or ``None`` if it does not exist."""
    if not os.path.lexists(path):
        return None
    return files.sha256_of(path) if path.is_file() else ""


def digest_of(item: str) -> str | None:
    """Return the digest of an image, or ``None`` if it cannot be read."""
    if Path(item).is_file():
        return digest_at(Path(item))
    with suppress(InputError):
        return hashlib.sha256(read_item(item)).hexdigest()
    return None


def place(item: str, target: Path, action: str, digest: str) -> bool:
    """Copy, link or move a photo to ``target``, and return whether it was not there already.

    Raises InputError if the photo cannot be read or has changed, or if another file has taken its place. Raises OSError
    if the output cannot be written, or if the photo cannot be moved. Such a photo is not copied, either.
    """
    if not target.parent.exists():
        files.make_folders(target.parent)
        files.sync(target.parent.parent)
    if action == "link":
        if is_link_to(target, item):
            return False
        target.symlink_to(item)
        return True
    there = digest_at(target)
    if there is None:
        target.touch(exist_ok=False)
        there = EMPTY
    elif there == EMPTY:  # an earlier run was killed
        files.remove_leftovers(target.parent, digest)
    if target.is_symlink() or there not in (EMPTY, digest):
        raise InputError("another file was created at its output; run the command again")
    moved = there == EMPTY and _fill(item, target, digest, move=action == "move")
    try:
        deleted = action == "move" and not moved and _delete_original(item, target, digest)
    except OSError:
        if there == EMPTY:
            _delete_original(str(target), Path(item), digest)
        raise
    return there == EMPTY or deleted


def _fill(item: str, target: Path, digest: str, *, move: bool) -> bool:
    """Replace an empty file by a copy of a photo, and return whether the photo was moved instead.

    Files are only moved within one file system, where moving is atomic.
    """
    try:
        if move and not Path(item).is_symlink() and digest_at(Path(item)) == digest:
            try:
                Path(item).replace(target)
                files.sync(target.parent)
                return True
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
        is_file = Path(item).is_file()
        with files.open_regular(item) if is_file else io.BytesIO(read_item(item)) as source:
            if hashlib.file_digest(source, "sha256").hexdigest() != digest:
                raise InputError("has changed since it was classified; run the command again")
            source.seek(0)
            write(source, target, partial(shutil.copystat, item), digest)
        files.sync(target.parent)
    except BaseException:
        if digest_at(target) == EMPTY != digest:
            target.unlink()
        raise
    return False


def write(
    data: bytes | BinaryIO,
    target: Path,
    copy_attributes: Callable[[Path], object] = id,
    scratch: str = SCRATCH,
) -> None:
    """Create or replace a file, which is on the disk before it gets its name. By default, no attributes are copied."""
    with files.temporary(
        target.with_name(scratch), clean=False
    ) as new:  # on the disk of the target
        with new.open("wb") as file:
            shutil.copyfileobj(io.BytesIO(data) if isinstance(data, bytes) else data, file)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            copy_attributes(new)
        files.replace(new, target)


def is_link_to(path: Path, item: str) -> bool:
    """Return whether a path is a link to this photo."""
    if not path.is_symlink():
        return False
    target = os.readlink(path).replace(os.sep, "/")  # noqa: PTH115 - keeps the exact text
    return target.removeprefix("//?/") == item  # Windows adds this prefix


def _delete_original(item: str, copy: Path, digest: str) -> bool:
    """Delete a photo if ``copy`` is another file with the same bytes, and return whether it was deleted."""
    original = Path(item)
    if not original.is_file() or copy.is_symlink() or copy.samefile(original):
        return False
    if not digest_at(copy) == digest == digest_at(original):
        return False
    platforms.delete_file(original)
    return True
