"""The command line and Python in processes without import time: a server imports once and forks for each command.

Each command gets its files, folder and environment, and runs in its own process. The server starts no thread before it
forks, so forking is safe. Each test process that needs a server starts one, which ends when the connection to the test
process closes. Run as a script, this file is the server.
"""

import array
import ast
import atexit
import contextlib
import gc
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import types
from pathlib import Path

FOR_FEATURES = (
    "torch",
    "faiss",
    "duckdb",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "safetensors.torch",
    *(f"retrieval_tip.{name}" for name in ("cli", "cli.output", "doctor")),
    *(f"retrieval_tip.fit.{name}" for name in ("finetune", "search_hp")),
    *(f"retrieval_tip.evaluation.{name}" for name in ("audit", "evaluate")),
    *(f"retrieval_tip.index.{name}" for name in ("build", "changes")),
    "retrieval_tip.report.report",
)
FOR_IMAGES = (
    "torchvision",
    "open_clip",
    "transformers.modeling_utils",
    "sklearn.metrics",
    "retrieval_tip.server.app",
)

ALONE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Keep the libraries from starting threads on import."""

READY = b"!"
PYTHON = "warm-python"

PROGRAM = """#!{python} -IS
import array, os, signal, socket, sys
request = repr(({name!r}, sys.argv[1:], os.getcwd(), dict(os.environ))).encode("utf-8", "surrogateescape")
with socket.socket(socket.AF_UNIX) as link:
    link.connect({place!r})
    files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", range(3)))]
    link.sendmsg([len(request).to_bytes(8, "big")], files)
    link.sendall(request)
    child = int.from_bytes(link.recv(8), "big")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = int.from_bytes(link.recv(8) or sys.exit("the server died"), "big", signed=True)
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
"""Shell program that has the server run the command, passes signals on, and exits with its status."""


def import_now(*, images):
    """Import everything that commands import later, for features only or also for images.

    Missing packages are skipped. The list has pandas because pyarrow imports it, which takes a third of a second.
    """
    for name in (*FOR_FEATURES, *(FOR_IMAGES if images else ())):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _serve(place, starter):
    """Run each command in a child and report its end, until the connection to the test process closes."""
    import_now(images=True)
    from retrieval_tip.cli.program import main, start_lightly

    start_lightly()
    gc.freeze()  # a collection in a child would copy the pages of all these objects, which takes half a second
    keeper = socket.socket(fileno=starter)
    running = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen(16)
        keeper.send(READY)
        while True:
            links = [
                link for _, link in running.values()
            ]  # readable only when the program was killed, too
            ready, _, _ = select.select([server, keeper, *running, *links], [], [])
            for ended, (child, link) in [*running.items()]:
                if link in ready:
                    os.kill(child, signal.SIGKILL)
                if {link, ended} & {*ready}:
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    with contextlib.suppress(OSError):
                        link.sendall(status.to_bytes(8, "big", signed=True))
                    del running[ended]
                    os.close(ended)
                    link.close()
            if keeper in ready:  # readable only when it closes
                for child, _ in running.values():
                    os.kill(child, signal.SIGKILL)
                os._exit(0)  # a regular shutdown takes half a second
            if server not in ready:
                continue
            link, _ = server.accept()
            size, rights, *_ = link.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
            request = link.makefile("rb").read(int.from_bytes(size, "big"))
            if not request:  # the program was killed before it asked
                link.close()
                continue
            files = array.array("i", rights[0][2])
            assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread has been started"
            if (child := os.fork()) == 0:
                break
            for file in files:
                os.close(file)
            running[os.pidfd_open(child)] = child, link
            with contextlib.suppress(OSError):
                link.sendall(child.to_bytes(8, "big"))
    for other in (keeper, link, *(link for _, link in running.values())):
        other.close()
    for ended in running:
        os.close(ended)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    name, arguments, folder, environment = ast.literal_eval(
        request.decode("utf-8", "surrogateescape")
    )
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    try:
        if name == PYTHON:
            _run_python(arguments)
        else:
            main(prog_name="retrieval-tip")
    except SystemExit as end:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # a regular shutdown takes half a second


def _run_python(arguments):
    """Run a script or ``-c`` code as the interpreter does."""
    own = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        code = arguments[1]
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        code = Path(arguments[0]).read_text(encoding="utf-8")
        own.__file__ = arguments[0]
    exec(compile(code, sys.argv[0], "exec"), own.__dict__)
    raise SystemExit


def python(path):
    """Return the interpreter of a warm server on this ``PATH``, else the interpreter of this process."""
    return shutil.which(PYTHON, path=path) or sys.executable


@contextlib.contextmanager
def server(folder):
    """Start a server, and yield a folder for the front of ``PATH``, whose programs have it run the command."""
    place = str(folder / "socket")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("retrieval-tip", PYTHON):
        (programs / name).write_text(PROGRAM.format(python=sys.executable, name=name, place=place))
        (programs / name).chmod(0o755)
    mine, its = socket.socketpair()
    with mine:
        with its:
            its.set_inheritable(True)
            command = [sys.executable, __file__, place, str(its.fileno())]
            output = [(os.POSIX_SPAWN_DUP2, its.fileno(), 1)]  # Python would seek in a file object
            os.posix_spawn(sys.executable, command, os.environ | ALONE, file_actions=output)
        assert mine.recv(1) == READY
        yield programs


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
