"""Processes to kill. A server imports everything once, then forks a child for each job.

The server starts no thread before it forks, so forking is safe, and a job costs no imports. The server is a test module
run as a script that calls :func:`serve`; the tests of that module talk to it through a :class:`Server`.
"""

import errno
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import warm

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="SKIPPED: needs fork and SIGKILL")


class FullDisk:
    """A disk that is full when a file is flushed for the ``stop``-th time, if that is not 0.

    Flushes of folders do not count, because their errors are ignored.
    """

    def __init__(self, monkeypatch):
        self.stop = 0
        self.calls = 0
        self._real = os.fsync
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, handle):
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        self.calls += is_file
        if is_file and self.calls == self.stop:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._real(handle)


class Steps:
    """Counter of a job's steps by name, which kills or stops the process before step number ``at``, or fails there."""

    def __init__(self, at, how):
        self.at = at
        self.how = how
        self.names = list[str]()

    def step(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            if self.how == "EIO":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            os.kill(os.getpid(), getattr(signal, self.how))

    def before(self, owner, name):
        """Count a step before each call of a function or a method."""
        call = getattr(owner, name)

        def counted(*arguments, **more):
            self.step(name)
            return call(*arguments, **more)

        setattr(owner, name, counted)

    def events(self, *events):
        """Count a step before each of these events of :func:`sys.audit`."""

        def audit(event, _):
            if event in events:
                self.step(event)

        sys.addaudithook(audit)

    def writes(self):
        """Count a step before every change on disk.

        Reading changes nothing, so a kill before a read equals a kill before the next step.
        """
        import faiss

        def audit(event, arguments):
            if (
                event == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            ):
                self.step("open to write")

        for name in ("fsync", "posix_fallocate"):
            if hasattr(os, name):
                self.before(os, name)
        self.before(faiss, "write_index")
        sys.addaudithook(audit)
        self.events("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock")


def serve(work):
    """Run the jobs on each line of standard input at once, each in its own child."""
    import faiss
    import torch

    warm.import_now(images=False)
    gc.freeze()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        children = [_child(work, job) for job in request["jobs"]]
        begun = time.perf_counter()
        if request["after"] is not None:
            time.sleep(request["after"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        status = []
        for child in children:
            while os.WIFSTOPPED(found := os.waitpid(child, os.WUNTRACED)[1]):
                print(json.dumps({"stopped": child}), flush=True)
            status.append(os.waitstatus_to_exitcode(found))
        print(json.dumps({"status": status, "seconds": time.perf_counter() - begun}), flush=True)


def _child(work, job):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(2, 1)  # standard output is the server's
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and commands inherit that
        steps = Steps(job["step"], job["how"])
        work(job, steps)
        steps.at = None
        Path(job["steps"]).write_text(json.dumps(steps.names))
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


class Server:
    """A process, started with the interpreter on ``path``, that runs jobs in children and kills them."""

    def __init__(self, script, folder, path):
        self.counted = folder / "steps"
        self.seconds = 0.0
        pipe = subprocess.PIPE
        environment = os.environ | warm.ALONE
        self.process = subprocess.Popen(
            [warm.python(path), script], stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def start(self, *jobs, step=None, after=None, how="SIGKILL"):
        """Start jobs; kill them (or stop them, by ``how``) before step number ``step``, or ``after`` seconds."""
        common = {"step": step, "how": how, "steps": str(self.counted)}
        self.process.stdin.write(
            json.dumps({"jobs": [job | common for job in jobs], "after": after}) + "\n"
        )
        self.process.stdin.flush()

    def _reply(self):
        line = self.process.stdout.readline()
        assert line, "the server died"
        return json.loads(line)

    def stopped(self):
        """Wait until a job has stopped itself, and return its process id."""
        return int(self._reply()["stopped"])

    def wait(self):
        """Return the exit statuses of the jobs, and set ``seconds`` to their duration."""
        reply = self._reply()
        self.seconds = reply["seconds"]
        return list(reply["status"])

    def run(self, job, **when):
        self.start(job, **when)
        return self.wait()[0]

    @property
    def steps(self):
        """Steps of the last job that was not killed."""
        return list(json.loads(self.counted.read_text()))

    def close(self):
        self.process.communicate()


@contextmanager
def one_thread():
    """Use one thread for tiny computations, where threads would mostly wait for each other."""
    import torch

    from retrieval_tip.retrieval import vector_index

    threads = torch.get_num_threads()
    found = vector_index.faiss().omp_get_max_threads()
    torch.set_num_threads(1)
    vector_index.faiss().omp_set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    vector_index.faiss().omp_set_num_threads(found)
