"""What runs in a worker process, and in the template process that workers are forked from.

A worker takes one frame after another and answers each with one; it holds no state between jobs but the sites and the
trees that the driver asked it to keep. It ends with its channel: also in the middle of a job, also when the driver was killed.
"""

from __future__ import annotations

import gc
import io
import os
import pathlib
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import NoReturn

from polyfed.core.algorithm import Algorithm, Task
from polyfed.core.message import Memory, Message
from polyfed.core.protocols import Job, Reply, Site
from polyfed.core.tree import Tree
from polyfed.core.work import failure, perform
from polyfed.executors.channel import Channel
from polyfed.executors.payload import load

Order = tuple[list[int], Task, Message, Memory]  # numbers of trees to forget, and a job
MAX_TEXT = 4000
PATIENCE_SECONDS = 0.5


def main(role: str, descriptor: int, sites: int) -> NoReturn:
    """Entry of a new interpreter: `descriptor` is its end of a socket pair, `sites` the packed sites."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which closes the channel
    print_to_stderr()
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    os.set_inheritable(sites, False)
    if role == "template":
        template(sock, sites)
    serve(sock, sites)


def print_to_stderr() -> None:
    """What client code prints goes to the driver's stderr, whole lines at a time: its stdout may be somebody's data."""
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def serve(sock: socket.socket, sites: int | tuple[Algorithm, Mapping[str, Site], int]) -> NoReturn:
    """A worker's life: says None or why it cannot work, then answers jobs until the channel closes."""
    threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
    channel = Channel(sock)
    try:
        algorithm, by_name, seed = load(sites) if isinstance(sites, int) else sites
    except Exception as error:  # noqa: BLE001  # rebuilding runs code of the user's own classes
        channel.send(_said(error))
        os._exit(1)
    channel.send(None)
    kept: dict[int, Tree] = {}
    while True:
        try:
            order: Order = channel.receive(kept)
        except EOFError:
            os._exit(0)
        forget, task, message, memory = order
        for number in forget:
            del kept[number]
        _answer(channel, algorithm, by_name[task.client], Job(task, message, memory), seed)


def _answer(channel: Channel, algorithm: Algorithm, site: Site, job: Job, seed: int) -> None:
    start = time.process_time()
    reply = perform(algorithm, site, job, seed=seed)
    seconds = time.process_time() - start
    refs = {id(tree): number for number, tree in enumerate(trees_of(job))}
    try:
        channel.send((reply.message, reply.memory, reply.error, seconds), refs)
    except Exception as error:  # noqa: BLE001  # an algorithm may return what cannot be pickled
        channel.send((None, job.memory, failure(site.name, error), seconds), refs)


def trees_of(job: Job | Reply) -> list[Tree]:
    """The trees of a job in an order that both sides know: a reply refers to those that it hands back as they came."""
    messages = [job.message or Message(), job.memory]
    return [tree for message in messages for tree in message.trees.values()]


def _end_with(sock: socket.socket) -> None:
    """Ends this process when the other end of the socket is gone, whatever its main thread is doing."""
    poll = select.poll()
    poll.register(sock, 0)  # hang-up is reported unasked
    while not poll.poll():
        pass
    os._exit(1)


def template(sock: socket.socket, sites: int) -> NoReturn:
    """Loads the sites once; then ``fork`` (with a socket) makes a worker of them, ``reap PID`` says how one ended."""
    try:
        loaded = load(sites)
    except Exception as error:  # noqa: BLE001  # rebuilding runs code of the user's own classes
        sock.send(b"error " + _said(error).encode()[:MAX_TEXT])
        os._exit(1)
    gc.collect()
    gc.freeze()  # the collector would write to every page and so copy it
    sock.send(f"ready {count_threads()}".encode())
    children: set[int] = set()
    while True:
        asked, descriptors, _, _ = socket.recv_fds(sock, MAX_TEXT, 1)
        if not asked:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            for pid in children:
                os.waitpid(pid, 0)
            os._exit(0)
        if descriptors:
            children.add(pid := _forked(sock, descriptors[0], loaded))
            sock.send(str(pid).encode())
        else:
            children.discard(pid := int(asked.split()[1]))
            sock.send(str(reap(pid)).encode())


def _forked(sock: socket.socket, descriptor: int, loaded: tuple[Algorithm, Mapping[str, Site], int]) -> int:
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    os.setsid()  # the system shares a busy processor out by session: two workers in one would get half (measured)
    sock.close()
    serve(socket.socket(fileno=descriptor), loaded)


def reap(pid: int) -> int:
    """Wait status of a child that is ending; kills it when it takes long over it."""
    if not has_ended(pid, PATIENCE_SECONDS):
        os.kill(pid, signal.SIGTERM)
        if not has_ended(pid, PATIENCE_SECONDS):
            os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def has_ended(pid: int, patience: float) -> bool:
    """Whether a child ends within that many seconds; it is still to be waited for."""
    if not hasattr(os, "pidfd_open"):
        return False
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], patience)[0])
    finally:
        os.close(descriptor)


def count_threads() -> int:
    """Threads of this process, those of native libraries included where the system tells."""
    try:
        return len(list(pathlib.Path("/proc/self/task").iterdir()))
    except OSError:
        return threading.active_count()


def _said(error: Exception) -> str:
    return "".join(traceback.format_exception(error)).rstrip()[-MAX_TEXT:]
