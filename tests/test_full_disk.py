"""Changes on disks that are too small, at every size: one clear error, and nothing changes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_kill_changes as living
from conftest import SOAK, few
from sealing import one_line, snapshot

from retrieval_tip import verify
from retrieval_tip.errors import RetrievalTipError
from retrieval_tip.index import changes, manage
from retrieval_tip.store import folder as store
from retrieval_tip.store.writer import collect

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
ADDED = (300, 90, 40)

Operation = Callable[[Path, Path, str], object]
OPERATIONS: dict[str, Operation] = living.OPERATIONS | {
    "merge": lambda folder, place, _: changes.merge(folder, place / "others"),
    "set": lambda folder, *_: changes.configure(folder, alpha=3.0),
}
for _name in ("first", "fit to values", "gc", "grow", *living.WHOLE):
    del OPERATIONS[_name]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and another index, on a disk with enough room."""
    place = tmp_path_factory.mktemp("room")
    living.make_tables(place, ADDED)
    living.built(place / "others", place, "1", "Flat")
    return place


def resize(disk: Path, free: int) -> None:
    """Leave ``free`` bytes, a multiple of a page. The size stays above 0, which would mean no limit."""
    found = os.statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={max(used + free, PAGE)}", disk], check=True)


def refused_until_it_fits(disk: Path, folder: Path, change: Callable[[], object]) -> int:
    """Retry a change with one more page of room (outside a soak, five), and return the number of pages it needed.

    Each refusal must name the reason, and must change nothing.
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
def test_a_change_on_a_full_disk_changes_nothing_and_succeeds_with_more_room(
    small_disk: Callable[[int], Path], place: Path, tmp_path: Path, name: str, index: str
) -> None:
    disk = small_disk(8192)
    for folder in (disk / "index", tmp_path / "index"):
        living.make_index(folder, place, index)

    def change(folder: Path) -> Any:
        return OPERATIONS[name](folder, place, index)

    change(tmp_path / "index")
    pages = refused_until_it_fits(disk, disk / "index", lambda: change(disk / "index"))
    assert pages > 2
    assert living.answer(disk / "index") == living.answer(tmp_path / "index")
    assert verify(disk / "index").version == verify(tmp_path / "index").version == 5
    assert not list(disk.rglob("*.tmp"))


def test_a_first_build_on_a_full_disk_leaves_nothing_and_succeeds_with_more_room(
    small_disk: Callable[[int], Path], place: Path
) -> None:
    disk = small_disk(8192)
    folder = disk / "deep" / "index"
    assert refused_until_it_fits(disk, folder, lambda: living.built(folder, place, "0", "Flat")) > 7
    assert verify(folder).n == ADDED[0]


def test_a_copy_on_a_full_disk_leaves_nothing_and_succeeds_with_more_room(
    small_disk: Callable[[int], Path], place: Path
) -> None:
    disk = small_disk(8192)
    living.make_index(disk / "index", place, "Flat")
    assert refused_until_it_fits(disk, disk / "copy", lambda: manage.duplicate(disk / "index", "copy")) > 2
    assert living.answer(disk / "copy") == living.answer(disk / "index")


def test_gc_frees_space_on_a_full_disk(small_disk: Callable[[int], Path], place: Path) -> None:
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
