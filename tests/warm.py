"""The command line in processes that need not import anything: a server has, and forks one for each command.

A command is handed its files, folder and environment, and is a process of its own; it costs its work alone, where a new
interpreter imports for seconds. No thread has been started when the server forks, so that is sound. Run as a script,
this file is the server.
"""

from __future__ import annotations

import array
import ast
import atexit
import contextlib
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

FOR_FEATURES = (
    "torch", "faiss", "duckdb", "pandas", "pyarrow.dataset", "pyarrow.parquet", "safetensors.torch",
    *(f"retrieval_tip.{name}" for name in ("cli", "cli.output", "doctor", "data.imports")),
    *(f"retrieval_tip.fit.{name}" for name in ("finetune", "search_hp")),
    *(f"retrieval_tip.evaluation.{name}" for name in ("audit", "baselines", "evaluate", "sweep")),
    *(f"retrieval_tip.index.{name}" for name in ("build", "changes", "tune")),
    *(f"retrieval_tip.report.{name}" for name in ("plots", "report")),
)  # fmt: skip
FOR_IMAGES = ("torchvision", "open_clip", "transformers.modeling_utils", "sklearn.metrics", "retrieval_tip.server.run")

ALONE = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}  # fmt: skip
"""With these, the libraries start no threads of their own when they are imported."""

PROGRAM = """#!{python} -IS
import array, os, signal, socket, sys
told = repr((sys.argv[1:], os.getcwd(), dict(os.environ))).encode("utf-8", "surrogateescape")
with socket.socket(socket.AF_UNIX) as link:
    link.connect({place!r})
    files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", range(3)))]
    link.sendmsg([len(told).to_bytes(8, "big")], files)
    link.sendall(told)
    child = int.from_bytes(link.recv(8), "big")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = int.from_bytes(link.recv(8) or sys.exit("the server has died"), "big", signed=True)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
"""Has the server run the command, passes signals on, and ends as the command did."""


def import_now(*, images: bool) -> None:
    """What commands import later, of features alone or also of images.

    Some of it they do only where it is installed: pyarrow takes pandas up, which lasts a third of a second.
    """
    for name in (*FOR_FEATURES, *(FOR_IMAGES if images else ())):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _serve(place: str) -> None:
    """Run commands, each in a child of a child, which tells how it ended."""
    import_now(images=True)
    from retrieval_tip.cli.group import main, start_lightly

    start_lightly()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen(16)
        print("ready", flush=True)
        while True:
            link, _ = server.accept()
            assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread has been started"
            if os.fork() == 0:
                break
            link.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, rights, *_ = link.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    told = link.makefile("rb").read(int.from_bytes(size, "big"))
    child = os.fork()
    if child:
        link.sendall(child.to_bytes(8, "big"))
        ended = os.pidfd_open(child)
        if ended not in select.select([ended, link], [], [])[0]:
            os.kill(child, signal.SIGKILL)  # as the program was
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        link.sendall(status.to_bytes(8, "big", signed=True))
        os._exit(0)
    link.close()
    for number, file in enumerate(array.array("i", rights[0][2])):
        os.dup2(file, number)
        os.close(file)
    arguments, folder, environment = ast.literal_eval(told.decode("utf-8", "surrogateescape"))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    try:
        main(prog_name="retrieval-tip")
    except SystemExit as end:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)  # taking down what was imported takes half a second


if __name__ == "__main__":
    _serve(sys.argv[1])


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Path]:
    """A folder to put in front of ``PATH``: its ``retrieval-tip`` has a server run the command."""
    place, program = folder / "socket", folder / "bin" / "retrieval-tip"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, place=str(place)))
    program.chmod(0o755)
    command = [sys.executable, __file__, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | ALONE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield program.parent
        finally:
            process.kill()
