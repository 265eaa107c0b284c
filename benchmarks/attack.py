"""Hostile inputs by the thousand, over the commands and the server: what a stranger's files, options and requests do.

\b
    python benchmarks/attack.py                         # 9 minutes at most; a table, and three lines for each failure
    python benchmarks/attack.py --list                  # the areas
    python benchmarks/attack.py --only sql --seed 7     # one of them, by other draws
    python benchmarks/attack.py --only sql:17 --seed 7  # one try again; what it said is shown, and its folder stays

A try combines values of benchmarks/hostile.toml (benchmarks/hostile.py says how), drawn by the seed, the area and its
number alone. It runs in a forked child of this process, which has imported everything and never starts a thread:
commands through the real command line, in a folder of their own with a copy of a small index and its tables; requests
against one real `retrieval-tip serve`.

\b
It fails where
- it ends in a traceback;
- its status is none of 0 to 3, or an answer is 5xx, but for 503 and 507; it ends well although its input is certainly
  bad; the index has changed although it failed; or a line of its errors is very long, or has control characters;
- it takes 20 seconds more than the limit that it has of its own, as SQL has (`index query --timeout`);
- memory peaks at more than 1 GB above the idle process or server. One that takes 2 GB is ended at once.

Exit status: 0 where none fails, else 1. Needs Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import http.client
import json
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
from hostile import AREAS, BACKBONE, BASE, ROOT, SCRATCH, SPEC, TOKEN, Area, Case, make_base

sys.path.append(str(ROOT / "tests"))

import warm

MIB = 1 << 20
HANG, SERVES, ANSWERS = 20.0, 5.0, 5
"""Seconds until a try hangs, beyond a limit of its own; that another server, of an option, has to start; that ours has
for an answer."""
MOST, KILLED = 1000 * MIB, 2000 * MIB
"""Memory above the idle process that is a failure, and that ends a try at once."""
LONGEST = 4000
"""Characters of a line of standard error: more is a failure."""
COLUMNS = ("tracebacks", "wrong exit status", "hangs", "memory")
NOT_MADE, DAMAGED = 99, 98
"""Exit status of a child that could not make the files of its case, or left an index that is damaged."""

UNHANDLED = re.compile(
    r"^(Traceback \(most|Exception ignored|Exception in thread|Fatal Python|terminate called).*", re.M
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def judged(case: Case, status: int, out: str, err: str, changed: bool) -> dict[str, str]:
    """What is wrong with how a try ended, by column. A negative status is a signal; of a request, ``out`` tells."""
    if found := UNHANDLED.search(err):
        return {"tracebacks": err[found.start() :].strip().splitlines()[-1][:200]}
    answers = [int(code) for code in re.findall(r"^answer (\d+)", out, re.M)] if case.sends is not None else []
    asked = [signal.SIGTERM] * (case.arguments[:1] == ["serve"])  # perhaps before it listens, where that takes long
    lines, interrupted = err.splitlines(), {-number for number in (*asked, *(number for _, number in case.signals))}
    interrupted |= {128 - number for number in interrupted}
    wrong = {
        f"answered {answers}": any(code >= 500 and code not in (503, 507) for code in answers),
        "the server does not answer after it": case.sends is not None and "health 200" not in out,
        "the index is damaged": status == DAMAGED,
        f"ended by signal {-status}": status < 0 and status not in interrupted,
        f"exit status {status}": status not in (0, 1, 2, 3, *interrupted) and status >= 0,
        "ends well, although its input is bad": case.bad
        and (any(c < 300 for c in answers) if case.sends else not status),
        f"exit status {status}, but the index has changed": changed and status not in (0, 3, *interrupted),
        f"a line of {max(map(len, lines), default=0):,} characters": any(len(line) > LONGEST for line in lines),
        f"{CONTROL.findall(err)[:3]} on standard error": CONTROL.search(err) is not None,
    }
    reasons = [reason for reason, holds in wrong.items() if holds]
    return {"wrong exit status": reasons[0]} if reasons else {}


# --- children


@dataclass
class Child:
    """A try that runs.

    ``peak``: bytes above idle, so far; ``ended``: why it was killed; ``void``: nothing is known of it; ``asked``: to
    end, as a server that an option started.
    """

    case: Case
    folder: Path
    pid: int
    pidfd: int
    began: float
    peak: int = 0
    ended: str = ""
    void: bool = False
    asked: bool = False

    def beside(self, suffix: str) -> Path:
        """Where its output is, and what its indexes were at first."""
        return Path(f"{self.folder}{suffix}")

    def kill(self) -> None:
        """End it with all that it started."""
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)


def start(case: Case, folder: Path) -> Child:
    """A child that makes the folder of a case, and then does what the case says, with its output beside the folder."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number, name in enumerate((os.devnull, f"{folder}.out", f"{folder}.err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
            if case.sends is None:
                prepare(case, folder)
                if "-" in case.arguments and Path("stdin").exists():
                    os.dup2(os.open("stdin", os.O_RDONLY), 0)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
                os.environ.update(case.variables)
            if case.user:
                _as_a_user()
            _become(case)
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, or it would go on as the campaign, and clear up
            os._exit(NOT_MADE)
    return Child(case, folder, pid, os.pidfd_open(pid), time.monotonic())


def _as_a_user() -> None:
    """Give up what root may beyond its own files' rights, for what it starts too."""
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    libc.capset(struct.pack("II", 0x20080522, 0), bytes(24))


def _send(signals: list[tuple[float, int]]) -> None:
    """Have this process get these, from one that it forks."""
    pid = os.getpid()
    if os.fork():
        return
    for delay, number in signals:
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    os._exit(0)


def prepare(case: Case, folder: Path) -> None:
    """The folder of a case, with all that it needs in it."""
    shutil.copytree(BASE / case.given, folder) if case.call is None else folder.mkdir()
    os.chdir(folder)
    case.prepare()
    Path(f"{folder}.before").write_text(_manifests(folder))


def _manifests(folder: Path) -> str:
    """Digests of the manifests in the folder of a try, where they are files."""
    files = [folder / name / "manifest.json" for name in ("index", "images")]
    readable = [file for file in files if file.is_file() and file.stat().st_size < 10 * MIB]
    return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in readable)


def _become(case: Case) -> NoReturn:
    """Do what a case says, and end as a program of its own would."""
    status = 1
    try:
        if case.call is not None:
            case.call()
        elif case.sends is not None:
            _ask(case)
        elif case.fresh:
            os.execv(sys.executable, [sys.executable, "-m", "retrieval_tip", *case.arguments])
        else:
            from retrieval_tip.cli import main

            sys.argv[:] = ["retrieval-tip", *case.arguments]
            _send(case.signals)
            main(prog_name="retrieval-tip")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # before the command line has begun, or after its end
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    if case.signals:
        status = _checked(case, status)
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def _checked(case: Case, status: int) -> int:
    """The status, or that an index which a command left after signals is damaged."""
    from retrieval_tip.cli import main

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(KeyboardInterrupt):  # one may be on its way
            signal.signal(number, signal.SIG_IGN)
    for place in ("index", "new"):
        if Path(place, "manifest.json").exists():
            try:
                main(["--quiet", "index", "verify", place], prog_name="retrieval-tip")
            except SystemExit as end:
                status = status if not end.code else DAMAGED
            except Exception:
                traceback.print_exc()
                status = DAMAGED
    return status


def _ask(case: Case) -> None:
    """Send a request as it is; print the status of each answer, then how the server is."""
    assert case.sends is not None
    with socket.create_connection(SERVER.address) as link:
        with contextlib.suppress(OSError):  # it may refuse before all is sent
            for part in case.sends:
                link.sendall(part)
                time.sleep(case.pause)
            if case.half:
                link.shutdown(socket.SHUT_WR)
        method, stream = case.sends[0].partition(b" ")[0].decode("latin-1"), _Stream(link)
        try:
            for _ in range(case.answers):
                answer = http.client.HTTPResponse(stream, method=method)
                answer.begin()
                print("answer", answer.status, answer.read()[:300])
        except (OSError, http.client.RemoteDisconnected, http.client.IncompleteRead) as error:
            print("closed", type(error).__name__)
    health = http.client.HTTPConnection(*SERVER.address)
    health.request("GET", "/healthz")
    print("health", health.getresponse().status)


class _Stream:
    """What comes on a connection, from which several answers are read: each would close it, or read too far."""

    def __init__(self, link: socket.socket) -> None:
        self.file = link.makefile("rb")
        self.read, self.readinto, self.readline = self.file.read, self.file.readinto, self.file.readline

    def makefile(self, _: str) -> _Stream:
        return self

    def flush(self) -> None:
        pass

    close = flush


def _resident(pid: int, name: str) -> int:
    """Memory of a process, in bytes: VmRSS, or its peak VmHWM."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
    return 0


@dataclass
class Server:
    """`retrieval-tip serve` in a process of its own, over copies of the indexes."""

    folder: Path
    address: tuple[str, int] = ("", 0)
    child: Child | None = None
    idle: int = 0
    read: int = 0

    def start(self) -> None:
        """Start it, anew where it runs, and wait until it answers."""
        self.stop()
        copies = {BASE / "given/index": "features", BASE / "pictured/images": "images"}
        copies = {made: name for made, name in copies.items() if made.exists()}

        def become() -> None:
            for made, name in copies.items():
                shutil.copytree(made, name)
            _become(Case(["serve", *copies.values(), "--port", "0", "--token", TOKEN, "--timeout", str(ANSWERS)]))

        self.child = start(Case(call=become), self.folder)
        while not (found := re.search(r" at http://([\d.]+):(\d+)", _read(self.child.beside(".err")))):
            if not self.alive() or time.monotonic() > self.child.began + 60:
                sys.exit(f"the server does not start: {_read(self.child.beside('.err'))}")
            time.sleep(0.02)
        self.address, self.read = (found[1], int(found[2])), 0
        asking = http.client.HTTPConnection(*self.address)
        asking.request("GET", "/openapi.json")
        paths = json.loads(asking.getresponse().read())["paths"]
        SPEC.update({path: {method.upper(): told for method, told in of.items()} for path, of in paths.items()})
        body = json.dumps({"features": [[0.6, 0.8, 0, 0, 0, 0, 0, 0]]})
        for _ in range(2):  # what it imports for its first answer belongs to the idle server
            asking.request("POST", "/v1/classify?index=features", body, {"Content-Type": "application/json"})
            asking.getresponse().read()
        asking.close()
        self.idle = _resident(self.child.pid, "VmRSS")
        Path(f"/proc/{self.child.pid}/clear_refs").write_text("5")  # its peak begins here

    def alive(self) -> bool:
        """Whether it runs."""
        return self.child is not None and not select.select([self.child.pidfd], [], [], 0)[0]

    def peak(self) -> int:
        """Bytes that it took above the idle server at most."""
        return _resident(self.child.pid, "VmHWM") - self.idle if self.child else 0

    def said(self) -> str:
        """What it said on standard error since it was asked last."""
        said = _read(self.child.beside(".err")) if self.child else ""
        new, self.read = said[self.read :], len(said)
        return new

    def stop(self) -> None:
        """End it at once."""
        if self.child is not None:
            self.child.kill()
            os.waitpid(self.child.pid, 0)
            os.close(self.child.pidfd)
            _clear(self.child)
        self.child = None


SERVER = Server(SCRATCH / "server")


def _read(file: Path) -> str:
    return file.read_bytes()[: 4 * MIB].decode("utf-8", "surrogateescape") if file.exists() else ""


def _clear(child: Child) -> None:
    for suffix in (".out", ".err", ".before"):
        child.beside(suffix).unlink(missing_ok=True)
    _remove(child.folder)


def _remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", folder], check=False)  # Python's own follows folders by recursion


# --- the campaign


@dataclass
class Tally:
    """What came of the tries of an area."""

    tried: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0))
    peak: int = 0
    failures: list[str] = field(default_factory=list)


class Campaign:
    """Runs the tries of one area, a few at once, and judges each."""

    def __init__(self, name: str, area: Area, seed: int, keep: bool = False) -> None:
        self.name, self.area, self.seed, self.keep = name, area, seed, keep
        self.tally, self.running, self.again = Tally(), list[Child](), deque[Case]()
        self.suspects, self.joint, self.log = list[Case](), "", ""
        (SCRATCH / "tries").mkdir(exist_ok=True)
        idle = start(Case(call=lambda: None), SCRATCH / "idle")
        self.idle = os.wait4(idle.pid, 0)[2].ru_maxrss * 1024
        _clear(idle)

    def run(self, numbers: Iterator[int], ends: float) -> Tally:
        """Try these, until it is time to end."""
        if self.area.served:
            SERVER.start()
        while True:
            while self._room() and (case := self._next(numbers, ends)) is not None:
                folder = SCRATCH / "tries" / f"{case.name}-{time.monotonic_ns()}"
                self.running.append(start(case, folder))
                self.tally.tried += not case.alone
            if not self.running:
                if found := UNHANDLED.search(self.log):
                    said = self.log[found.start() :].strip().splitlines()[-1]
                    self._fail([], {"tracebacks": f"in the server's log, of a request that is not known: {said}"})
                return self.tally
            select.select([child.pidfd for child in self.running], [], [], 0.01)
            if self.area.served:
                self._watch_server()
            self.running = [child for child in self.running if not self._ended(child)]
            if self.area.served and not self.running:
                self._settle()

    def _room(self) -> bool:
        if self.again or any(child.case.alone for child in self.running):
            return not self.running
        return len(self.running) < self.area.at_once

    def _next(self, numbers: Iterator[int], ends: float) -> Case | None:
        if self.again:
            return self.again.popleft()
        number = next(numbers, None) if time.monotonic() < ends else None
        if number is None:
            return None
        case = self.area.case(random.Random(f"{self.seed}/{self.name}/{number}"))
        case.name = f"{self.name.replace(' ', '-')}-{number}"
        return case

    def _watch_server(self) -> None:
        """Where it takes too much, or has died, it is started anew; which of several did it, each shows alone."""
        peak, dead = SERVER.peak(), not SERVER.alive()
        self.tally.peak = max(self.tally.peak, peak)
        if peak <= MOST and not dead:
            return
        several = len(self.running) > 1
        reason = "the server has died" if dead else "too much" if peak > KILLED else ""
        for child in self.running:
            child.peak, child.void, child.ended = peak, several, child.ended or reason
            child.case.alone = True
        if several:
            self.suspects = [child.case for child in self.running]
            self.again += self.suspects
            self.joint = reason if dead else f"{peak / MIB:,.0f} MiB above idle"
        if several or reason:
            for child in self.running:
                child.kill()
            SERVER.start()

    def _settle(self) -> None:
        """After a try that was alone: what it took is gone, and none of several may have failed but all of them."""
        if SERVER.peak() > MOST:
            SERVER.start()
        if self.suspects and not self.again:
            column = "wrong exit status" if "died" in self.joint else "memory"
            self._fail(self.suspects, {column: f"{self.joint}, of these together"})
            self.suspects = []

    def _ended(self, child: Child) -> bool:
        """Whether a try is over, and judged; one that takes too long or too much is ended."""
        served, seconds = child.case.sends is not None, time.monotonic() - child.began
        if not served:
            child.peak = max(child.peak, _resident(child.pid, "VmRSS") - self.idle)
        if child.case.arguments[:1] == ["serve"] and not child.asked:
            child.asked = seconds > SERVES or " at http://" in _read(child.beside(".err"))
            if child.asked:
                os.kill(child.pid, signal.SIGTERM)
        if child.peak > KILLED and not served:
            child.ended = "too much"
        elif seconds > HANG + child.case.limit:
            child.ended = child.ended or "hangs"
        if child.ended in ("too much", "hangs"):
            child.kill()
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid == 0:
            return False
        os.close(child.pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it left running
        if not served:
            child.peak = max(child.peak, usage.ru_maxrss * 1024 - self.idle)
        if not child.void:
            self._judge(child, os.waitstatus_to_exitcode(status), seconds)
        _clear(child)
        return True

    def _judge(self, child: Child, status: int, seconds: float) -> None:
        case, tally = child.case, self.tally
        out, err = _read(child.beside(".out")), _read(child.beside(".err"))
        if status == NOT_MADE:
            tally.tried -= 1
            click.echo(f"SKIPPED: {case.name}: its files could not be made: {err[-300:]}", err=True)
            return
        served, before = case.sends is not None, child.beside(".before")
        if served:
            self.log += SERVER.said()
            if re.search(r"^answer 5", out, re.M) or len(self.running) == 1:  # it is about this one
                err, self.log = err + self.log, ""
        changed = not served and before.exists() and before.read_text() != _manifests(child.folder)
        wrong = judged(case, status, out, err, changed) if not child.ended else {}
        if child.ended == "hangs":
            wrong = {"hangs": f"no end within {HANG + case.limit:g} s"}
        elif child.ended and child.ended != "too much":
            wrong = {"wrong exit status": child.ended}
        if child.peak > MOST:
            wrong["memory"] = f"{child.peak / MIB:,.0f} MiB above idle" + ", when it was ended" * (child.ended != "")
        tally.peak = max(tally.peak, child.peak)
        if self.keep:
            click.echo(f"{out}{err}status {status}, {child.peak / MIB:,.0f} MiB, {seconds:.1f} s", err=True)
        if wrong or self.keep:
            self._fail([case], wrong)

    def _fail(self, cases: list[Case], wrong: dict[str, str]) -> None:
        """Note what is wrong with cases, together where they are several, and how each is done again."""
        for column in wrong:
            self.tally.counts[column] += 1
        if wrong and any(case in self.suspects for case in cases):
            self.suspects = []
        said = CONTROL.sub("?", "; ".join(f"{column}: {reason}" for column, reason in wrong.items()))
        lines = [f"    bash {again(case)}  # {line_of(case, 160)}" for case in cases]
        self.tally.failures.append(
            "\n".join([f"{', '.join(case.name for case in cases) or self.name}: {said}", *lines])
        )


def shown(text: str, most: int = 0) -> str:
    """An argument as a shell takes it, cut short where it is longer than ``most``."""
    if most and len(text) > most:
        text = f"{text[: most // 2]} ...{len(text):,} characters... {text[-most // 4 :]}"
    if text.isprintable():
        return shlex.quote(text)
    raw = text.encode("utf-8", "surrogateescape")
    return "$'" + "".join(chr(b) if 31 < b < 127 and chr(b) not in "'\\" else f"\\x{b:02x}" for b in raw) + "'"


def line_of(case: Case, most: int = 0) -> str:
    """The command of a case, or the first line of its request."""
    if case.sends is not None:
        return shown(case.sends[0].split(b"\r\n")[0].decode("latin-1"), most)
    stdin = " < stdin" * ("-" in case.arguments)
    variables = ["env", *(f"{name}={shown(value, most)}" for name, value in case.variables.items())]
    rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] * case.user
    before = [*rights, *variables[: len(variables) * bool(case.variables)]]
    sent = "".join(f" # {delay:.3f} s: {signal.Signals(number).name}" for delay, number in case.signals)
    return " ".join([*before, "retrieval-tip", *(shown(argument, most) for argument in case.arguments)]) + stdin + sent


def again(case: Case) -> Path:
    """A script that does a case again, in a folder that stays, with its files as they were."""
    place = SCRATCH / "failed" / case.name
    place.parent.mkdir(exist_ok=True)
    _remove(place)
    if case.sends is None:
        pid = os.fork()
        if pid == 0:  # in a child, for that may take threads; what it draws is what it drew
            with contextlib.suppress(BaseException):
                prepare(case, place)
            os._exit(0)
        os.waitpid(pid, 0)
        Path(f"{place}.before").unlink(missing_ok=True)
        script = f"cd {place} && {line_of(case)}\n"
    else:
        place.mkdir()
        (place / "request").write_bytes(b"".join(case.sends))
        for name in ("given/index", "pictured/images"):
            if (BASE / name).exists():
                shutil.copytree(BASE / name, place / {"index": "features"}.get(name.partition("/")[2], "images"))
        serve = f"retrieval-tip serve {place}/[fi]*s --token {TOKEN} --port 8000 --timeout {ANSWERS}"
        script = f"{serve} & sleep 15\n(cat {place}/request; sleep {ANSWERS}) | nc 127.0.0.1 8000\nkill $!\n"
    place.mkdir(exist_ok=True)
    (place / "again.sh").write_text(script, errors="surrogateescape")
    return place / "again.sh"


def restart() -> NoReturn:
    """Start this program anew, where it reaches neither a network nor the user's home, and starts no thread."""
    folder = tempfile.mkdtemp(prefix="attack-")
    places = {"HOME": "", "XDG_CACHE_HOME": "cache", "RETRIEVAL_TIP_CACHE": "encodings", "TMPDIR": "tmp",
              "HF_HOME": "hf", "MPLCONFIGDIR": "matplotlib", "TORCH_HOME": "torch"}  # fmt: skip
    for place in places.values():
        Path(folder, "home", place).mkdir(parents=True, exist_ok=True)
    settings = {"HF_HUB_OFFLINE": "1", "AWS_EC2_METADATA_DISABLED": "true", "RES_OPTIONS": "timeout:1 attempts:1",
                "no_proxy": "127.0.0.1", "PYTHONIOENCODING": "utf-8:strict", "OMP_WAIT_POLICY": "PASSIVE",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "RETRIEVAL_TIP_ATTACK": folder}  # fmt: skip
    settings |= {name: f"{folder}/home/{place}" for name, place in places.items()} | warm.ALONE
    settings |= {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings)


def make_world(chosen: dict[str, Area]) -> None:
    """Import everything here; make what every try starts with in a child, for that may start threads."""
    with_images = any(area.images for area in chosen.values())
    warm.import_now(images=with_images)
    from retrieval_tip.cli.program import start_lightly

    start_lightly()
    child = start(Case(call=partial(make_base, with_images=with_images)), SCRATCH / "making")
    if os.waitpid(child.pid, 0)[1]:
        sys.exit(f"what the tries start with could not be made: {_read(child.beside('.err'))}")
    _clear(child)


@click.command(help=__doc__)
@click.option("--seconds", type=click.FloatRange(1), default=540.0, show_default=True, help="For all of it, at most.")
@click.option("--only", multiple=True, metavar="AREA[:N]", help="An area, or one try of it; repeat for more.")
@click.option("--seed", type=int, default=1, show_default=True, help="Draws the tries.")
@click.option("--list", "as_list", is_flag=True, help="Name the areas, and end.")
def main(seconds: float, only: tuple[str, ...], seed: int, as_list: bool) -> None:
    """See the top of this file."""
    if as_list:
        for name, area in AREAS.items():
            click.echo(f"{name:<12}{area.tries:>6}  {area.case.__doc__}{' (needs a backbone)' if area.images else ''}")
        return
    numbers = {part.partition(":")[0]: part.partition(":")[2] for part in only or AREAS}
    for name, number in numbers.items():
        if name not in AREAS or not (number or "0").isdecimal():
            raise click.UsageError(f"--only {name}: expected one of {', '.join(AREAS)}, and :N for one try of it")
    if not sys.platform.startswith("linux"):
        raise click.UsageError("needs Linux, for forks and /proc")
    if not SCRATCH.is_dir():
        restart()
    began = time.monotonic()
    chosen = {name: AREAS[name] for name in numbers if not AREAS[name].images or BACKBONE.is_dir()}
    for name in numbers.keys() - chosen.keys():
        click.echo(f"SKIPPED: {name}: no backbone at {BACKBONE}", err=True)
    tallies: dict[str, Tally] = {}
    try:
        make_world(chosen)
        for name, area in chosen.items():
            left = sum(AREAS[other].tries for other in chosen if other not in tallies)
            ends = time.monotonic() + (began + seconds - time.monotonic()) * area.tries / left
            tries = iter([int(numbers[name])]) if numbers[name] else iter(range(area.tries))
            tallies[name] = Campaign(name, area, seed, keep=numbers[name] != "").run(tries, ends)
            click.echo(f"{name}: {tallies[name].tried} tries, {time.monotonic() - began:.0f} s", err=True)
            assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread has been started: forking is unsound"
    finally:
        SERVER.stop()
        for each in SCRATCH.iterdir():
            if each.name != "failed":
                _remove(each)
    lines = report(tallies, [name for name in numbers if name not in chosen])
    tried = sum(tally.tried for tally in tallies.values())
    click.echo("\n".join([f"seed {seed}, {tried:,} tries, {time.monotonic() - began:.0f} s\n", *lines]))
    if not (SCRATCH / "failed").exists():
        SCRATCH.rmdir()
    sys.exit(int(any(any(tally.counts.values()) for tally in tallies.values())))


def report(tallies: dict[str, Tally], skipped: list[str]) -> Iterator[str]:
    """The table, then each failure."""
    yield f"| area | tried | {' | '.join(COLUMNS[:3])} | peak memory (MiB above idle) |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, tally in tallies.items():
        counts = " | ".join(str(tally.counts[column]) for column in COLUMNS[:3])
        yield f"| {name} | {tally.tried:,} | {counts} | {tally.peak / MIB:,.0f} |"
    yield from (f"| {name} | SKIPPED: no backbone | | | | |" for name in skipped)
    for tally in tallies.values():
        yield from ("", *tally.failures)


if __name__ == "__main__":
    main()
