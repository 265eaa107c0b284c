"""Helpers that start the real server in its own process and build a small index of real photos."""

import csv
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import uvicorn
from conftest import LIT_MINI, ok
from fastapi.testclient import TestClient

from retrieval_tip import Index
from retrieval_tip.index import places
from retrieval_tip.server import run as run_module
from retrieval_tip.server.app import create_app
from retrieval_tip.server.guard import Limits
from retrieval_tip.server.served import Backbones, Maker, Served, open_all
from retrieval_tip.server.service import Service
from retrieval_tip.server.session import Labelling, paths_of

START_SECONDS = 120


def caltech_photos(shared, part, classes, each):
    """Return photos of the first classes of Caltech101, with their labels."""
    data = shared / "data" / "caltech101"
    items = json.loads((data / "split_zhou_Caltech101.json").read_text())[part]
    names = sorted({name for _, _, name in items})[:classes]
    found = []
    for name in names:
        found += [
            (data / "101_ObjectCategories" / path, name) for path, _, own in items if own == name
        ][:each]
    return found


def build(shared, out, items, *options):
    """Build an index of labelled photos with the command line."""
    table = out.with_suffix(".csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *items])
    model = LIT_MINI
    ok("index build", table, "--out", out, "--model", model, *options)
    return out


@contextmanager
def server(*arguments, token=None, path=None, command="serve", printed=None, port=0):
    """Run a server, by default on a free port, yield its address and process, then stop it.

    The server runs in a new interpreter, or as the program found on ``path``. Its exit status is checked unless the
    test has already ended the process. Its standard error is added to ``printed``.
    """
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} | (
        {"RETRIEVAL_TIP_TOKEN": token} if token else {}
    )
    program = [sys.executable, "-m", "retrieval_tip"]
    if path and os.name != "nt":  # under Wine, no command is installed
        program = [str(shutil.which("retrieval-tip", path=path))]
    program += [command, *map(str, arguments), *([] if port is None else ["--port", str(port)])]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment)
    lines = queue.Queue()
    printed = [] if printed is None else printed

    def read():
        for line in process.stderr:
            printed.append(line)
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while " at http://" not in (line := lines.get(timeout=START_SECONDS) or "ended"):
            assert line != "ended", "".join(printed)
        yield line.rpartition(" at ")[2].partition(";")[0], process
        if process.poll() is None:
            process.terminate()
            assert process.wait(30) == 0 or os.name == "nt", "".join(
                printed
            )  # Windows has no SIGTERM
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        process.stderr.close()
    assert "Traceback" not in "".join(printed), "".join(printed)


def asked(url, body=None, what=""):
    """Return a labelling session's state from the printed address, or send labels and return the new state.

    ``what`` is the rest of the path, such as ``/encoder``.
    """
    address, _, token = url.partition("/#token=")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/label{what}", data, headers)
    ) as answer:
        return json.load(answer)


def listens(address):
    """Return the process that listens at an address, not its parent."""
    port = int(address.rpartition(":")[2])
    listening = (one for one in psutil.net_connections("tcp4") if one.status == psutil.CONN_LISTEN)
    return next(psutil.Process(one.pid) for one in listening if one.laddr.port == port)


def random_index(folder, n, d, classes):
    """Write an index of random features."""
    keys = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    Index.from_features(keys, np.arange(n) % classes, [f"class {i}" for i in range(classes)]).save(
        folder
    )
    return folder


def labelling_app(place, sources, reader, classes=(), limits=None, token="t"):
    """Return an application for a labelling session that saves to ``place``."""
    backbones = Backbones("cpu", "float32", None, reader.backbone)
    served = [Served(place, backbones)] if places.at(place).exists() else []
    maker = Maker(Path(place).parent, lambda: reader.backbone, backbones)
    session = Labelling(place, paths_of(sources), reader, classes)
    service = Service({one.name: one for one in served}, limits or Limits(), maker=maker)
    return create_app(service, token=token, labelling=session)


class InProcess:
    """A client of an ``app`` in this process, which subclasses make. ``http`` sends requests inside the context."""

    def __enter__(self):
        self.http = TestClient(self.app)
        self.http.__enter__()
        return self

    def __exit__(self, *error):
        self.http.__exit__(*error)


def app_of(*folders, limits=None, root=None, **options):
    """Return an application that serves indexes on the CPU."""
    served = open_all(folders, Backbones("cpu", "float32", "fast"))
    return create_app(Service(served, limits or Limits(), root=root), **options)


@contextmanager
def running(app, proxies=(), idle=run_module.IDLE_SECONDS):
    """Run an application in a thread, as ``serve`` does, and yield its address. See :func:`run_module.configured`."""
    with run_module.listen("127.0.0.1", 0) as listening:
        config = run_module.configured(app, proxies)
        config.timeout_keep_alive = idle
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


def told(place, *said):
    """Send bytes over a new connection, and return everything the server sends back."""
    with socket.create_connection(place, timeout=30) as asking:
        try:
            for part in said:
                asking.sendall(part)
        except OSError:  # the server no longer listens
            pass
        return rest(asking)


def rest(asking):
    """Read from a connection until it closes."""
    answer = b""
    try:
        while part := asking.recv(1 << 16):
            answer += part
    except ConnectionResetError:
        pass
    return answer
