"""Clients spread over worker processes of this machine: started once, one computing thread each, nothing polled.

Jobs wait in the driver, longest first, and go to the worker with the least work ahead of it; a worker has one long job
or a few milliseconds of short ones in its socket. A client's work is estimated from its rows, and from its last job once
there is one. A worker answers in the order in which it was asked, so when one dies it is known whose work killed it:
that client gets one more try in another process, then its failure is its reply. Others lose nothing but time.
"""

from __future__ import annotations

import heapq
import os
import selectors
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import ClientError, RunError, UsageError
from polyfed.core.message import Message
from polyfed.core.protocols import Job, Reply, Site
from polyfed.core.tree import Tree
from polyfed.executors import launch
from polyfed.executors.channel import Channel
from polyfed.executors.loop import check_jobs
from polyfed.executors.payload import pack
from polyfed.executors.worker import trees_of

Start = Literal["auto", "forkserver", "spawn", "fork"]
THREADED = frozenset({"tensorflow", "jax"})  # start threads as soon as they are used, and hang in a fork
TRIES = 2
AHEAD_SECONDS = 0.02
AHEAD_JOBS = 64
AHEAD_BYTES = 1 << 20  # also bounds the files on their way: a system allows about 1000 of them
SECONDS_PER_ROW = 3e-5  # of a small network, one epoch; replaced by what is measured


class Processes:
    """Runs clients in worker processes; replies come as they finish, with the bits that `Loop` would give.

    Args:
        workers: how many; None is one for each processor that this process may use. Never more than there are sites.
        start: "forkserver": a new interpreter loads the sites, workers are its forks. "spawn": each worker is a new
            interpreter. "fork": workers are forks of this process; only safe when no library has started a thread.
            "auto": forkserver where a fork is safe, else spawn.

    The user's script is never imported again, so it needs no ``if __name__ == "__main__"``. Workers end with `close`,
    with this object, or with this process, however it ends.
    """

    def __init__(self, workers: int | None = None, *, start: Start = "auto") -> None:
        if workers is not None and workers < 1:
            raise UsageError(f"workers is {workers}; it must be at least 1, or None for one per processor")
        self._workers, self._start = workers or len(os.sched_getaffinity(0)), start
        self._pool: _Pool | None = None
        self._end: Callable[[], object] = _nothing

    def open(self, algorithm: Algorithm, sites: Mapping[str, Site], *, seed: int) -> None:
        """Starts the workers and hands them the sites.

        Raises:
            UsageError: a model or rows cannot be sent to a worker, or not be rebuilt there; names the client.
        """
        self.close()
        launcher = _launcher(self._start, algorithm, sites, seed)
        self._pool = pool = _Pool(launcher, sites, min(self._workers, max(1, len(sites))))
        self._end = weakref.finalize(self, pool.close)
        try:
            pool.start()
        except BaseException:
            self.close()
            raise

    def submit(self, jobs: Sequence[Job]) -> None:
        """Hands over jobs; returns at once. Raises `UsageError` for a client that `open` did not name."""
        check_jobs(jobs, self._pool is not None, {} if self._pool is None else self._pool.sites)
        assert self._pool is not None
        self._pool.submit(jobs)

    def replies(self) -> Iterator[Reply]:
        """Replies as they finish, until all jobs are answered, those submitted meanwhile too."""
        while (pool := self._pool) is not None and (reply := pool.next()) is not None:
            yield reply

    def close(self) -> None:
        """Ends the workers, within seconds even if one hangs; may be called again, and `open` after it."""
        self._pool = None
        self._end()


def _nothing() -> None:
    pass


def _launcher(start: Start, algorithm: Algorithm, sites: Mapping[str, Site], seed: int) -> launch.Launcher:
    if start == "fork":
        return launch.Fork((algorithm, dict(sites), seed))
    packed = pack(algorithm, sites, seed)
    if start == "spawn" or (start == "auto" and not THREADED.isdisjoint(sys.modules)):
        return launch.Spawn(packed)
    try:
        server = launch.ForkServer(packed)
    except BaseException:
        os.close(packed)
        raise
    if start == "auto" and server.threads > 1:
        spawn = launch.Spawn(os.dup(packed))
        server.close()
        return spawn
    return server


@dataclass(eq=False)
class _Worker:
    """The driver's view of one worker.

    Attributes:
        asked: number, estimated seconds and bytes of each job that it has not answered, in the order in which it does them.
        seconds, num_bytes: their sums.
        holds: numbers of the trees that it keeps.
    """

    pid: int
    channel: Channel
    ready: bool = False
    asked: deque[tuple[int, float, int]] = field(default_factory=deque)
    seconds: float = 0.0
    num_bytes: int = 0
    holds: set[int] = field(default_factory=set)

    @property
    def is_free(self) -> bool:
        ahead = self.seconds < AHEAD_SECONDS and self.num_bytes < AHEAD_BYTES and len(self.asked) < AHEAD_JOBS
        return ahead or not self.asked

    def ask(self, number: int, seconds: float, num_bytes: int) -> None:
        self.asked.append((number, seconds, num_bytes))
        self.seconds += seconds
        self.num_bytes += num_bytes

    def answer(self) -> int:
        number, seconds, num_bytes = self.asked.popleft()
        self.seconds = self.seconds - seconds if self.asked else 0.0  # exactly, not the rest of a sum
        self.num_bytes -= num_bytes
        return number


class _Pool:
    """The workers, and the jobs that are not answered yet."""

    def __init__(self, launcher: launch.Launcher, sites: Mapping[str, Site], size: int) -> None:
        self.sites = dict(sites)
        self._launcher, self._size = launcher, size
        self._owner = os.getpid()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._jobs: dict[int, Job] = {}
        self._deaths: dict[int, int] = {}
        self._waiting: list[tuple[float, int]] = []
        self._answers: deque[Reply] = deque()
        self._count = 0
        self._shared = _Shared()
        self._work = _Work(self.sites)

    def start(self) -> None:
        """Starts all workers and waits until each has its sites."""
        for _ in range(self._size):
            self._add()
        for worker in self._workers:
            try:
                self._check(worker, worker.channel.receive())
            except EOFError:
                raise RunError(f"a worker process {self._ended(worker)} while it started") from None
            worker.channel.sock.setblocking(False)

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._jobs[self._count] = job
            heapq.heappush(self._waiting, (-self._work.seconds(job), self._count))
            self._count += 1
        self._shared.add(jobs)
        self._dispatch()

    def next(self) -> Reply | None:
        """The next reply, waiting for it; None when every job is answered."""
        while not self._answers:
            if not self._jobs:
                return None
            for key, _ in self._selector.select():
                self._attend(key.data)
            self._dispatch()
        return self._answers.popleft()

    def close(self) -> None:
        """Closing a channel ends its worker; the launcher sees to one that does not listen."""
        if os.getpid() != self._owner:
            return  # a fork of the driver: the workers are not its own
        for worker in self._workers:
            worker.channel.close()
        for worker in self._workers:
            self._launcher.reap(worker.pid)
        self._workers.clear()
        self._selector.close()
        self._launcher.close()

    def _add(self) -> None:
        ours, theirs = launch.pair()
        with theirs:
            worker = _Worker(self._launcher.launch(theirs), Channel(ours))
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _dispatch(self) -> None:
        """Gives waiting jobs, longest first, to those workers that are about to run out of work."""
        while self._waiting and len(self._workers) < self._size:
            self._add()
            self._workers[-1].channel.sock.setblocking(False)
        while self._waiting:
            if not (free := [worker for worker in self._workers if worker.is_free]):
                return
            _, number = heapq.heappop(self._waiting)
            self._ask(min(free, key=lambda w: w.seconds), number)

    def _ask(self, worker: _Worker, number: int) -> None:
        job = self._jobs[number]
        refs, keep = self._shared.split(job.message, worker.holds)
        forget = self._shared.stale(worker.holds)
        num_bytes = worker.channel.send((forget, job.task, job.message, job.memory), refs, keep)
        worker.holds |= set(keep.values())
        worker.ask(number, self._work.seconds(job), num_bytes)
        self._listen(worker)

    def _listen(self, worker: _Worker) -> None:
        """Waits for room in the socket too as long as something is left to be sent."""
        wanted = selectors.EVENT_READ | (0 if worker.channel.flush() else selectors.EVENT_WRITE)
        if self._selector.get_key(worker.channel.sock).events != wanted:
            self._selector.modify(worker.channel.sock, wanted, worker)

    def _attend(self, worker: _Worker) -> None:
        """Takes in what a worker has said, sends what it has room for, and sees when it is gone."""
        alive = worker.channel.fill()
        while worker.channel.has_frame:
            if worker.ready:
                self._answered(worker)
            else:
                self._check(worker, worker.channel.take())
        if alive:
            self._listen(worker)
        else:
            self._lost(worker)

    def _check(self, worker: _Worker, error: str | None) -> None:
        """A worker's first words: whether it could load the sites."""
        if error is not None:
            raise UsageError(launch.cannot_rebuild(error))
        worker.ready = True

    def _answered(self, worker: _Worker) -> None:
        number = worker.answer()
        job = self._jobs.pop(number)
        message, memory, error, seconds = worker.channel.take(dict(enumerate(trees_of(job))))
        self._work.measured(job, seconds)
        self._finish(number, job, Reply(job.task, message, memory, error, seconds))

    def _finish(self, number: int, job: Job, reply: Reply) -> None:
        self._deaths.pop(number, None)
        self._shared.remove(job)
        self._answers.append(reply)

    def _ended(self, worker: _Worker) -> str:
        """Puts a worker away; how it ended, in words."""
        self._selector.unregister(worker.channel.sock)
        self._workers.remove(worker)
        worker.channel.close()
        return launch.how_it_ended(self._launcher.reap(worker.pid))

    def _lost(self, worker: _Worker) -> None:
        """The job that a dead worker was doing has one more try, first of all; those behind it are only put back."""
        how = self._ended(worker)
        for place, (number, estimate, _) in enumerate(worker.asked):
            job = self._jobs[number]
            self._deaths[number] = self._deaths.get(number, 0) + (place == 0)
            if self._deaths[number] < TRIES:
                heapq.heappush(self._waiting, (float("-inf") if place == 0 else -estimate, number))
                continue
            said = f"its worker process {how} while doing this client's work, {TRIES} times in {TRIES} processes"
            del self._jobs[number]
            error = ClientError(job.task.client, "WorkerDied", said)
            self._finish(number, job, Reply(job.task, None, job.memory, error))


class _Work:
    """How long jobs take: a client's last job of the same kind, before that its rows."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._rows = {name: len(site.train) for name, site in sites.items()}
        self._known: dict[tuple[str, str], float] = {}
        self._total_seconds, self._total_rows = 0.0, 0

    def seconds(self, job: Job) -> float:
        known = self._known.get((job.task.client, job.task.kind))
        if known is not None:
            return known
        rate = self._total_seconds / self._total_rows if self._total_rows else SECONDS_PER_ROW
        return rate * self._rows[job.task.client]

    def measured(self, job: Job, seconds: float) -> None:
        self._known[job.task.client, job.task.kind] = seconds
        self._total_seconds += seconds
        self._total_rows += self._rows[job.task.client]


class _Shared:
    """Trees of the server's messages, numbered by identity: each worker is sent one once, however many clients get it.

    A tree is dropped when no waiting job holds it and new jobs have come without it, so that an evaluation and the next
    round's training on one state send it once.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._trees: dict[int, Tree] = {}
        self._users: dict[int, int] = {}
        self._count = 0

    def add(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for tree in job.message.trees.values():
                number = self._numbers.get(id(tree))
                if number is None:
                    number = self._numbers[id(tree)] = self._count
                    self._trees[number] = tree  # held, or another tree could get its id
                    self._count += 1
                self._users[number] = self._users.get(number, 0) + 1
        for number in [number for number, users in self._users.items() if not users]:
            del self._numbers[id(self._trees.pop(number))], self._users[number]

    def remove(self, job: Job) -> None:
        for tree in job.message.trees.values():
            self._users[self._numbers[id(tree)]] -= 1

    def split(self, message: Message, held: set[int]) -> tuple[dict[int, int], dict[int, int]]:
        """Which trees of a message a worker holds, and which it is to keep: id -> number."""
        numbers = {id(tree): self._numbers[id(tree)] for tree in message.trees.values()}
        refs = {tree: number for tree, number in numbers.items() if number in held}
        return refs, {tree: number for tree, number in numbers.items() if number not in held}

    def stale(self, held: set[int]) -> list[int]:
        """What a worker may forget; it is taken out of `held`."""
        gone = [number for number in held if number not in self._trees]
        held.difference_update(gone)
        return gone
