"""Regular files are opened and read; any other kind is reported without waiting for it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from retrieval_tip.errors import InputError
from retrieval_tip.files import (
    NotAFileError,
    common_folders,
    make_folders,
    map_regular,
    open_regular,
    read_regular,
    real,
    replacing,
)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


MAKERS = {
    "folder": (lambda path: path.mkdir(), "folder"),
    "pipe": (lambda path: os.mkfifo(path), "pipe"),
    "socket": (_socket, "socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), "device"),
}


@pytest.mark.parametrize("what", MAKERS)
def test_other_kinds_of_file_are_refused_without_waiting(tmp_path, what):
    make, word = MAKERS[what]
    path = tmp_path / "x\n.png"
    make(path)
    for read in (open_regular, map_regular, lambda path: read_regular(path, 10)):
        with pytest.raises(NotAFileError, match=word) as caught:
            read(path)
        assert str(tmp_path / r"x\n.png") in str(caught.value)
        assert word in caught.value.kind


def test_a_file_that_is_replaced_by_a_pipe_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.touch()
    opened = []
    real = os.open

    def swap(name, flags, mode):
        path.unlink()
        os.mkfifo(path)
        opened.append(real(name, flags, mode))
        return opened[0]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", swap)
        with pytest.raises(NotAFileError, match="pipe"):
            open_regular(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])  # it was closed


def test_system_errors_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with pytest.raises(ValueError, match="null"):
        open_regular("a\0b")
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(loop)


def test_files_and_links_to_files_are_read(tmp_path):
    path = tmp_path / "x"
    link = tmp_path / "link"
    path.write_bytes(b"anything")
    link.symlink_to("x")
    with open_regular(link) as file:
        assert file.read() == b"anything"
        assert not os.get_inheritable(file.fileno())
    assert read_regular(str(link), 8) == b"anything"
    with pytest.raises(InputError, match=r"x: .*8 bytes"):
        read_regular(path, 7)
    assert map_regular(link)[:] == b"anything"
    path.write_bytes(b"")
    assert map_regular(link) == b""


def test_folders_of_any_depth_are_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folders("a/b/c")
    make_folders(Path("a/b/c"))
    assert Path("a/b/c").is_dir()
    Path("a/file").touch()
    Path("dangling").symlink_to("nowhere")
    for name in (
        "a/file",
        "a/file/b",
        "dangling",
        "dangling/b",
        "/".join("a" * 3000),
        "x/" + "b" * 300,
        "/proc/x/y",
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OSError, match=r"Errno"):
            make_folders(name)
        assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, tmp_path / "x"]))
    limit = sys.getrecursionlimit()
    make_folders("d/" * (limit + 10))
    subprocess.run(["rm", "-rf", "d"], check=True)  # unlike shutil.rmtree, not limited by recursion


@pytest.mark.skipif(os.name != "nt", reason="SKIPPED: needs Windows")
def test_each_drive_has_a_common_folder():
    assert common_folders(["C:/a/b", "c:\\a\\c", "Z:/d"]) == ["C:\\a", "Z:\\d"]


def test_circular_links_are_resolved(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert real(tmp_path / "link") == real(tmp_path / "file")
    assert real(tmp_path / "loop").parent == real(tmp_path)


@pytest.mark.parametrize(
    "path", ["/proc/kmsg", "/proc/self/pagemap", "/proc/kcore", "/sys/kernel/mm/ksm/run"]
)
def test_files_of_the_kernel_are_refused(path, tmp_path):
    """They look regular, but may be endless or never answer."""
    if not Path(path).exists():
        pytest.skip(f"SKIPPED: this machine has no {path}")
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        with pytest.raises(NotAFileError, match=f"{name}: .* kernel, not a file"):
            read_regular(name, 1 << 60)
        with pytest.raises(NotAFileError):
            open_regular(name)


@pytest.mark.skipif(os.name != "posix", reason="SKIPPED: needs locks on files")
def test_the_next_writer_removes_the_files_of_a_killed_one(tmp_path):
    out = tmp_path / "x.csv"
    others = [".y.csv.0123abcd.tmp", ".x.csv.old.tmp", ".x.csv.tmp", "x.csv.0123abcd.tmp"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".x.csv.0123abcd.tmp").symlink_to(tmp_path / "elsewhere")
    there = set(tmp_path.iterdir())
    if not (child := os.fork()):
        with replacing(out) as half:
            half.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = set(tmp_path.iterdir()) - there
    with replacing(out) as slow:
        assert not left.exists()
        slow.write_text("slow")
        with replacing(out) as fast:  # a second writer at the same time
            fast.write_text("fast")
        assert (out.read_text(), slow.read_text()) == ("fast", "slow")
    assert out.read_text() == "slow"
    assert set(tmp_path.iterdir()) == {*there, out}
