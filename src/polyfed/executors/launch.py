"""Three ways to start a worker. Each gives a worker its end of a socket pair, and can say how it ended.

A new interpreter is started by ``python -c``, not by `multiprocessing`, which would import the user's script again: a
script without an ``if __name__ == "__main__"`` guard would run itself in every worker.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from typing import NoReturn, Protocol

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import RunError, UsageError
from polyfed.core.protocols import Site
from polyfed.executors import worker

#: A worker computes on one thread: so do its libraries, which read these when they are first imported.
ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "PJRT_NPROC",
)
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[4]); from polyfed.executors.worker import main; "
_BOOT += "main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"

#: Driver ends of all channels of this process: a forked worker closes its copies, or it would keep its siblings alive.
driver_ends: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class Launcher(Protocol):
    def launch(self, sock: socket.socket) -> int:
        """Starts a worker on its end of a socket pair; returns its process id."""
        ...

    def reap(self, pid: int) -> int:
        """The wait status of a worker whose channel is closed; ends it if need be."""
        ...

    def close(self) -> None:
        """Frees what the launcher itself holds; all workers have been reaped."""
        ...


def pair() -> tuple[socket.socket, socket.socket]:
    """The driver's end and the worker's."""
    ours, theirs = socket.socketpair()
    driver_ends.add(ours)
    return ours, theirs


def interpreter(role: str, sock: socket.socket, sites: int) -> subprocess.Popen[bytes]:
    """A new interpreter that runs `worker.main`, in a session of its own so that Ctrl-C does not reach it."""
    if not sys.executable:
        raise UsageError("this Python does not know its own executable, so it cannot start workers; use Loop()")
    arguments = [role, str(sock.fileno()), str(sites), json.dumps(sys.path)]
    return subprocess.Popen(  # noqa: S603  # our own interpreter with our own text
        [sys.executable, "-c", _BOOT, *arguments],
        pass_fds=(sock.fileno(), sites),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **dict.fromkeys(ONE_THREAD, "1")},
    )


class Spawn:
    """Each worker is a new interpreter that loads the sites itself: always safe, dearest to start."""

    def __init__(self, sites: int) -> None:
        self._sites = sites
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def launch(self, sock: socket.socket) -> int:
        process = interpreter("worker", sock, self._sites)
        self._processes[process.pid] = process
        return process.pid

    def reap(self, pid: int) -> int:
        return _wait(self._processes.pop(pid))

    def close(self) -> None:
        os.close(self._sites)


class ForkServer:
    """One new interpreter loads the sites, workers are its forks: frameworks are imported once, pages are shared."""

    def __init__(self, sites: int) -> None:
        self._sites = sites
        #: process id -> a descriptor that means this very process even when its number is given out again
        self._children: dict[int, int] = {}
        self._orphans: dict[int, int] = {}
        self._start()

    def _start(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        driver_ends.add(self._sock)
        with theirs:
            self._process = interpreter("template", theirs, self._sites)
        try:
            word, _, rest = self._hear().partition(" ")
        except RunError:
            self._stop()
            raise
        if word == "error":
            self._stop()
            raise UsageError(cannot_rebuild(rest))
        #: threads of the template; with more than one, a fork of it may find a lock held by nobody
        self.threads = int(rest)

    def launch(self, sock: socket.socket) -> int:
        try:
            pid = self._fork(sock)
        except (BrokenPipeError, RunError):  # somebody killed it
            self._stop()
            self._start()
            pid = self._fork(sock)
        self._children[pid] = os.pidfd_open(pid)
        return pid

    def _fork(self, sock: socket.socket) -> int:
        socket.send_fds(self._sock, [b"fork"], [sock.fileno()])
        return int(self._hear())

    def reap(self, pid: int) -> int:
        if pid not in self._children:
            return _end_orphan(self._orphans.pop(pid))
        child = self._children.pop(pid)
        try:
            self._sock.send(f"reap {pid}".encode())
            status = int(self._hear())
        except (BrokenPipeError, RunError):
            return _end_orphan(child)
        os.close(child)
        return status

    def close(self) -> None:
        self._stop()
        os.close(self._sites)

    def _stop(self) -> None:
        self._sock.close()
        if not worker.has_ended(self._process.pid, worker.PATIENCE_SECONDS):
            self._process.kill()
        self._process.wait()
        self._orphans |= self._children
        self._children.clear()

    def _hear(self) -> str:
        try:
            heard = self._sock.recv(2 * worker.MAX_TEXT)
        except ConnectionResetError:
            heard = b""
        if not heard:
            raise RunError("the process that worker processes are forked from has ended; its last words are on stderr")
        return heard.decode(errors="replace")


class Fork:
    """Workers are forks of the driver: quickest, nothing is sent; only for a driver without threads of any library."""

    def __init__(self, loaded: tuple[Algorithm, dict[str, Site], int]) -> None:
        self._loaded = loaded

    def launch(self, sock: socket.socket) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._work(sock)
        return pid

    def _work(self, sock: socket.socket) -> NoReturn:
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for end in list(driver_ends):
                end.close()
            worker.print_to_stderr()
            worker.serve(sock, self._loaded)
        finally:
            os._exit(1)  # never back into the driver's code

    def reap(self, pid: int) -> int:
        return worker.reap(pid)

    def close(self) -> None:
        pass


def _end_orphan(process: int) -> int:
    """Ends a worker whose parent is gone, so that nobody can tell how it ended by itself."""
    try:
        if not select.select([process], [], [], worker.PATIENCE_SECONDS)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
    finally:
        os.close(process)
    return signal.SIGKILL


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait status in the system's form, for a process that should be ending."""
    if not worker.has_ended(process.pid, worker.PATIENCE_SECONDS):
        process.terminate()
        if not worker.has_ended(process.pid, worker.PATIENCE_SECONDS):
            process.kill()
    code = process.wait()
    return -code if code < 0 else code << 8


def how_it_ended(status: int) -> str:
    """A wait status in words.

    >>> how_it_ended(9), how_it_ended(3 << 8)
    ('was killed by SIGKILL (the system does that when memory runs out)', 'exited with code 3')
    """
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with code {code}"
    hint = " (the system does that when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def cannot_rebuild(said: str) -> str:
    return (
        f"a worker process cannot rebuild the clients:\n{said}\nclasses that the models use must be importable in a new "
        "Python process or be defined in the script itself; Loop() runs without worker processes"
    )
