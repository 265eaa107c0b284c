"""What differs between Windows and other systems: open files, locks, limits of the process, quotes in a shell.

Windows denies deleting and renaming a file that a program has open, unless all programs have agreed to it when they
opened it. It never replaces or deletes a file that is mapped into memory (see :func:`files.replace`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

if sys.platform == "win32":
    import ctypes
    import hashlib
    import msvcrt
    import stat
    import tempfile

    _kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel.CreateFileW.restype = ctypes.c_void_p
    _READ, _WRITE = 1 << 31, 1 << 30  # rights
    _SHARE_ALL = 7  # reading, writing, deleting and renaming
    _OPEN, _OPEN_OR_CREATE = 3, 4
    _AT_ONCE, _ALONE = 1, 2  # flags of a lock
    _HELD = 33
    _FAR = (
        1 << 30
    )  # upper half of the position of a lock, far behind the end, because nobody can read locked bytes

    KERNEL_FOLDERS: tuple[str, ...] = ()

    def open_shared(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
        """Open a file that others may delete or rename meanwhile. Devices and pipes never block."""
        access = _READ | _WRITE if flags & (os.O_WRONLY | os.O_RDWR) else _READ
        how = _OPEN_OR_CREATE if flags & os.O_CREAT else _OPEN
        handle = _kernel.CreateFileW(os.fspath(path), access, _SHARE_ALL, None, how, 0, None)
        if handle in (None, ctypes.c_void_p(-1).value):
            code = ctypes.get_last_error()
            raise OSError(0, ctypes.FormatError(code).strip(), os.fspath(path), code)
        return msvcrt.open_osfhandle(handle, flags)

    def lockable(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        """Return the file to lock instead of ``path``. Windows cannot lock folders, so a file stands for each.

        Raises OSError if the path is a link.
        """
        if Path(path).is_symlink():
            raise OSError(0, "is a link", os.fspath(path))
        if not Path(path).is_dir():
            return path
        name = os.path.realpath(path).casefold().encode("utf-8", "surrogatepass")
        file = Path(tempfile.gettempdir(), f"retrieval-tip-{hashlib.sha256(name).hexdigest()[:16]}")
        file.touch()
        return file

    def lock(descriptor: int, *, alone: bool) -> None:
        """Lock an open file until it is closed. Raises BlockingIOError if another process holds the lock."""
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor))
        position = (ctypes.c_uint32 * 8)(0, 0, 0, 0, 0, _FAR)
        flags = _AT_ONCE | _ALONE * alone
        if not _kernel.LockFileEx(handle, flags, 0, 1, 0, position):
            code = ctypes.get_last_error()
            if code == _HELD:
                raise BlockingIOError
            raise OSError(0, ctypes.FormatError(code).strip(), None, code)

    def delete_file(path: Path) -> None:
        """Delete a file, also one with the attribute read-only, which Windows keeps otherwise."""
        path.chmod(stat.S_IWRITE)
        path.unlink()

    def memory_limits() -> list[int]:
        """Return upper bounds for the memory of this process, in bytes."""
        status = (ctypes.c_uint64 * 8)(64)
        _kernel.GlobalMemoryStatusEx(status)
        return [status[1]]

    def limit_files(most: int) -> None:
        """Limit the number of open files of this process, where the system supports it."""

    def is_private(path: Path, status: os.stat_result) -> bool:
        """Return whether no other user can read or write a file. Windows keeps the home folder private."""
        return path.resolve().is_relative_to(Path.home().resolve())

    def quote(text: str) -> str:
        """Quote an argument of a command for PowerShell and, unless it has special characters, for cmd."""
        if not re.fullmatch(r"[\w .:/\\=+-]+", text):
            return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'"
        return f'"{text}"' if " " in text else text

else:
    import fcntl
    import resource
    from shlex import quote as quote

    KERNEL_FOLDERS = ("/proc", "/sys")
    """Folders whose files may look regular, but are generated when they are read."""

    def open_shared(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
        """Open a file that others may delete or rename meanwhile. Devices and pipes never block."""
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)

    def lockable(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        """Return the file to lock instead of ``path``."""
        return path

    def lock(descriptor: int, *, alone: bool) -> None:
        """Lock an open file until it is closed. Raises BlockingIOError if another process holds the lock."""
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)

    def delete_file(path: Path) -> None:
        """Delete a file. Its folder must be writable."""
        path.unlink()

    def memory_limits() -> list[int]:
        """Return upper bounds for the memory of this process, in bytes."""
        limits = [
            limit
            for limit in resource.getrlimit(resource.RLIMIT_AS)
            if limit != resource.RLIM_INFINITY
        ]
        return [*limits, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]

    def limit_files(most: int) -> None:
        """Limit the number of open files of this process."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = most if soft == resource.RLIM_INFINITY else min(soft, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def is_private(path: Path, status: os.stat_result) -> bool:
        """Return whether no other user can read or write a file."""
        return status.st_uid == os.geteuid() and not status.st_mode & 0o077


NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
"""Flag that refuses to open a link. On Windows, a link cannot be locked."""


def command_line(arguments: list[str]) -> str:
    """Return a command as a user can type it into a shell."""
    return " ".join(map(quote, arguments))
