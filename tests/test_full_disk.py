"""A change on a disk that is too small, at every size: one clear error, and nothing changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_kill_changes as living
from conftest import SOAK, few
from sealing import one_line, snapshot

from retrieval_tip import verify
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.index import changes
from retrieval_tip.retrieval import labelled_keys
from retrieval_tip.store import folder as store
from retrieval_tip.store.writer import collect

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
SEGMENTS = (300, 90, 40)

Operation = Callable[[Path, Path, str], object]
OPERATIONS: dict[str, Operation] = living.OPERATIONS | {
    "merge": lambda folder, place, _: changes.merge(folder, place / "others"),
    "set": lambda folder, *_: changes.configure(folder, alpha=3.0),
}
for _name in ("first", "fit to values", "gc", "grow"):
    del OPERATIONS[_name]


@pytest.fixture(scope="module", autouse=True)
def _segments() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled_keys, "SMALL", 0)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables, and another index, on a disk with room."""
    place = tmp_path_factory.mktemp("room")
    living.make_tables(place, SEGMENTS)
    living.built(place / "others", place, "1", "Flat")
    return place


def resize(disk: Path, free: int) -> None:
    """Leave so many free bytes, a multiple of a page; but a size of 0 is no limit."""
    found = os.statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={max(used + free, PAGE)}", disk], check=True)


def refused_until_there_is_room(disk: Path, folder: Path, change: Callable[[], object]) -> int:
    """Try with a page more at a time; every refusal says why, and leaves everything as it was. How many pages it took.

    Outside a soak, with five pages more.
    """
    before = snapshot(disk)
    answer = living.answer(folder) if store.is_index(folder) else None
    for pages in range(0, 1000, 1 if SOAK else 5):
        resize(disk, pages * PAGE)
        try:
            change()
        except RetrievalTipError as error:
            one_line(error, "No space left", folder)
            assert snapshot(disk) == before
            assert answer is None or living.answer(folder) == answer
        else:
            return pages
    return pytest.fail("there is never enough room")


@pytest.mark.parametrize(
    ("name", "index"),
    few([(name, index) for index in ("Flat", "Classes") for name in OPERATIONS], 3),
)
def test_a_change_that_does_not_fit_on_the_disk_changes_nothing_and_succeeds_once_it_does(
    small_disk: Callable[[int], Path], place: Path, tmp_path: Path, name: str, index: str
) -> None:
    disk = small_disk(8192)
    for folder in (disk / "index", tmp_path / "index"):
        living.make_index(folder, place, index)

    def change(folder: Path) -> Any:
        return OPERATIONS[name](folder, place, index)

    change(tmp_path / "index")
    pages = refused_until_there_is_room(disk, disk / "index", lambda: change(disk / "index"))
    assert pages > 2
    assert living.answer(disk / "index") == living.answer(tmp_path / "index")
    assert verify(disk / "index").version == verify(tmp_path / "index").version == 5
    assert not list(disk.rglob("*.tmp"))


def test_a_first_build_that_does_not_fit_on_the_disk_leaves_nothing_and_succeeds_once_it_does(
    small_disk: Callable[[int], Path], place: Path
) -> None:
    disk = small_disk(8192)
    folder = disk / "deep" / "index"
    assert refused_until_there_is_room(disk, folder, lambda: living.built(folder, place, "0", "Flat")) > 8
    assert verify(folder).n == SEGMENTS[0]


def test_versions_are_given_up_on_a_disk_that_is_full(small_disk: Callable[[int], Path], place: Path) -> None:
    disk = small_disk(8192)
    folder = disk / "index"
    living.make_index(folder, place, "Flat")
    answer = living.answer(folder)
    resize(disk, 0)
    with pytest.raises(RetrievalTipError, match="No space left"):
        changes.rebuild(folder)
    gone, freed = collect(folder)
    assert gone == [1, 2, 3]
    assert freed > 0
    assert living.answer(folder) == answer
    assert store.history(folder)["version"].to_pylist() == [4]
