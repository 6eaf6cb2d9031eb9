"""Deterministic simulation of the round engine: the production `step`, `replay`, record codec and journal framing, under faults.

One seed makes one `Scenario` and one run of it in virtual time: messages are lost, repeated, delayed and reordered in both
directions; clients crash, leave, come back and forge; the coordinator crashes before, after and inside every journal write
and between any two effects; the disk is full. `World` only carries out actions. It holds no second model of the
coordinator: what it checks, continuously, are the invariants

    I1  a version is committed and published once, with one value      I6  a version is made of at least `minimum` updates
    I2  what was published survives every crash                         I7  a client's task numbers rise by one, so no seed repeats
    I3  what was acknowledged as accepted survives every crash          I8  once faults stop, the run ends
    I4  accepted: the task's own client, once, this collection or lag   I9  the journal holds no value of an update
    I5  a version is the exact fold of what was accepted, by position   I10 the journal gives the state, byte for byte

and the promise of client memory: each accepted update is in it exactly once, in order, and nothing else is.
The same seed gives the same journal, so a seed is a bug report.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

from polyfed.core import events as ev
from polyfed.core import records as rec
from polyfed.core import round as engine
from polyfed.core.algorithm import Task
from polyfed.core.errors import StorageError
from polyfed.core.memory import ClientMemory
from polyfed.core.records import ACCEPTED, Phase
from polyfed.core.round import Rules
from polyfed.core.schedule import Buffered, Schedule, Sync
from polyfed.core.select import Uniform
from polyfed.storage.journal import MAGIC, frame, scan

PRIME = (1 << 61) - 1
#: Every value of an update contains these digits and nothing else does: the journal must not (I9).
SECRET = 987_654_321
FOR_EVER = 10**9


class Violation(AssertionError):
    """An invariant does not hold."""


class Crash(Exception):
    """The coordinator's process is gone."""


@dataclass(frozen=True)
class Faults:
    """Probabilities: of a message, of a journal write, of a step's effects, of a client's piece of work."""

    lost: float = 0.0
    repeated: float = 0.0
    delay: float = 1.0
    client_crash: float = 0.0
    write: float = 0.0
    effects: float = 0.0
    full: float = 0.0
    forged: float = 0.0
    leaves: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """What one seed stands for.

    Attributes:
        polls: clients ask for their open tasks; without it a lost task comes back by its lease alone.
        calm: time at which faults stop.
        writes: journal write -> fault, for exhaustive runs.
        slow: checks purity and I10 after every step.
        is_thorough: checks I9 and I10 at the end too, not at crashes alone.
    """

    rules: Rules
    clients: int = 5
    rounds: int = 5
    stages: int = 1
    polls: bool = True
    faults: Faults = Faults()
    calm: float = 400.0
    writes: Mapping[int, tuple[str, float]] = field(default_factory=dict)
    slow: bool = False
    rolls_back: bool = False
    interrupted: float = float("inf")
    is_thorough: bool = True


def scenario(seed: int) -> Scenario:
    """Faults from none to harsh over all kinds of schedules."""
    rng = Random(seed)
    lease = rng.choice([15.0, 40.0])
    kinds: list[Schedule] = [
        Sync(lease=lease, attempts=3, patience=FOR_EVER),
        Sync(lease=lease, attempts=2, goal=3, minimum=2, deadline_seconds=60.0, patience=FOR_EVER),
        Sync(select=Uniform(4), goal=3, minimum=2, deadline_seconds=30.0, patience=FOR_EVER, block=2),
        Sync(patience=FOR_EVER),
        Buffered(concurrency=4, goal=2, max_lag=2, lease=lease, patience=FOR_EVER),
        Buffered(concurrency=3, goal=3, max_lag=1, patience=FOR_EVER),
    ]
    schedule = rng.choice(kinds)
    faults = Faults(
        lost=rng.choice([0.0, 0.05, 0.2]),
        repeated=rng.choice([0.0, 0.1, 0.3]),
        delay=rng.choice([0.5, 2.0, 10.0]),
        client_crash=rng.choice([0.0, 0.1]),
        write=rng.choice([0.0, 0.01, 0.03]),
        effects=rng.choice([0.0, 0.006]),
        full=rng.choice([0.0, 0.0, 0.03]),
        forged=rng.choice([0.0, 0.1]),
        leaves=rng.choice([0.0, 0.0, 0.02]),
    )
    return Scenario(
        Rules(schedule, seed, rng.choice([0, 0, 1, 3]), rng.random() < 0.3),
        clients=rng.choice([4, 5, 6]),
        rounds=rng.choice([8, 12, 16]),
        stages=rng.choice([1, 1, 1, 2]) if schedule.max_lag == 0 else 1,
        polls=(schedule.lease is None and faults.lost + faults.client_crash > 0) or rng.random() < 0.5,
        faults=faults,
        rolls_back=rng.random() < 0.1,
        interrupted=rng.uniform(10, 400) if rng.random() < 0.05 else float("inf"),
        is_thorough=seed % 4 == 0,
    )


class Disk:
    """A journal's bytes, framed by the production code. A fault is "full", "before", "torn" or "after" a write."""

    def __init__(self) -> None:
        self.data = bytearray(MAGIC)
        self.check = 0
        self.num_writes = 0

    def append(self, records: list[bytes], fault: tuple[str, float]) -> None:
        self.num_writes += 1
        kind, where = fault
        if kind == "full":
            raise StorageError("no space left on the device")
        if kind == "before":
            raise Crash
        data, check = frame(records, self.check)
        if kind == "torn":
            self.data += data[: int(where * len(data))]
            raise Crash
        if kind == "zeros":
            self.data += self._unwritten(data, where)
            raise Crash
        self.data += data
        self.check = check
        if kind == "after":
            raise Crash

    def _unwritten(self, data: bytes, where: float) -> bytes:
        """The file has its new size, but one sector of the frame was not written."""
        start = len(self.data)
        stop = start + len(data)
        edges = [start, *range(start - start % 512 + 512, stop, 512), stop]
        hole = int(where * (len(edges) - 1))
        a, b = edges[hole] - start, edges[hole + 1] - start
        return data[:a] + bytes(b - a) + data[b:]

    def read(self) -> list[bytes]:
        records, end, self.check = scan(bytes(self.data))
        del self.data[end:]
        return records


class Upload(NamedTuple):
    """What a client sends. `count`: accepted tasks that were in the memory it was computed from."""

    client: str
    receipt: str
    version: int
    number: int
    count: int
    value: int


class Client:
    """A client whose memory is (tasks that counted, their sum). What it keeps survives a crash, its work does not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.memory = ClientMemory((0, 0))  # type: ignore[arg-type]  # a memory is opaque to it
        self.uploads: dict[str, Upload] = {}
        self.waiting: Task | None = None
        self.is_retrying = False

    def waits(self, task: Task) -> None:
        """First it hears what became of its last work, for the next builds on that. Of two tasks the later is wanted."""
        place = task.collection, task.position, task.attempt
        last = self.waiting
        if last is None or place > (last.collection, last.position, last.attempt):
            self.waiting = task


class World:
    """Clients, a network, a disk and a coordinator that is nothing but `step`."""

    def __init__(self, scenario: Scenario, seed: int = 0) -> None:
        self.scenario, self.rules, self.faults = scenario, scenario.rules, scenario.faults
        self.rng = Random(seed)
        self.now, self.queue, self.order = 0.0, [], itertools.count()
        self.names = [f"c{i}" for i in range(scenario.clients)]
        self.clients = {name: Client(name) for name in self.names}
        self.disk, self.state, self.life = Disk(), rec.State(), 0
        self.tried: rec.State = self.state
        self.is_down = False
        self.wakes_at = 0.0
        self.blobs: dict[str, Upload] = {}
        self.digests: dict[Upload, str] = {}
        self.models = {0: 1}
        self.fold: tuple[int, int, int] = (0, -1, 0)
        self.finish: ev.Finish | None = None
        # what the journal says, kept as it is written; checked against the journal at every crash
        self.num_records = 0
        self.ledger: dict[str, str] = {}
        self.count: dict[str, int] = dict.fromkeys(self.names, 0)
        self.total: dict[str, int] = dict.fromkeys(self.names, 0)
        self.places: dict[tuple[str, int], tuple[int, int]] = {}
        self.numbers: dict[tuple[int, int], int] = {}
        self.committed: dict[int, str] = {}
        # what the outside has seen
        self.acknowledged: set[str] = set()
        self.published: dict[int, str] = {}
        self.num_events = 0
        self.num_crashes = 0
        self.steps: list[tuple[ev.Event, list[ev.Action]]] | None = None

    # ------------------------------------------------------------------------------------------ time

    def push(self, after: float, do: Callable[..., None], *what: Any) -> None:
        heapq.heappush(self.queue, (self.now + after, next(self.order), do, what))

    def send(self, do: Callable[..., None], *what: Any) -> None:
        """Over the network: lost, repeated, late."""
        rng, faults = self.rng, self.faults
        if faults.lost and rng.random() < faults.lost:
            return
        delay = 3 * faults.delay
        heapq.heappush(self.queue, (self.now + delay * rng.random() ** 2, next(self.order), do, what))
        if faults.repeated and rng.random() < faults.repeated:
            self.push(4 * delay * rng.random() ** 2, do, *what)

    def run(self) -> World:
        """Until the run has ended and every client has been told what became of its work."""
        self.push(0.0, self.start)
        self.push(5.0, self.chance)
        self.push(self.scenario.calm, self.calm_down)
        if self.scenario.interrupted < self.scenario.calm:
            self.push(self.scenario.interrupted, self.server, ev.Interrupted(self.scenario.interrupted))
        while self.queue:
            if self.finish is not None and not any(c.memory.pending or c.waiting for c in self.clients.values()):
                break
            self.now, _, do, what = heapq.heappop(self.queue)
            self.num_events += 1
            if self.now > 20_000 or self.num_events > 100_000:
                raise Violation(f"I8: no end in sight at {self.now:.0f} in {self.state.phase} of {self.rules}")
            do(*what)
        self.check_end()
        return self

    def calm_down(self) -> None:
        self.faults = Faults()
        for name in self.names:
            self.server(ev.Joined(self.now, name))

    def chance(self) -> None:
        """Every ten seconds: polls, ticks, forgeries, departures."""
        rng, faults = self.rng, self.faults
        self.push(10.0, self.chance)
        if self.scenario.polls:
            for lease in list(self.state.leases.values()):
                if not self.is_down and rng.random() < 0.5:
                    self.send(self.gets_task, lease.task)
        if faults.forged and rng.random() < 0.5:
            self.forge()
        if faults.leaves and rng.random() < faults.leaves * 10 and len(self.state.population) > 3:
            name = rng.choice(self.names)
            self.server(ev.Left(self.now, name))
            self.push(rng.uniform(1, 40), self.comes_back, name)
        if rng.random() < 0.1:
            self.server(ev.Ticked(self.now))

    def comes_back(self, name: str) -> None:
        self.server(ev.Joined(self.now, name))

    # ------------------------------------------------------------------------------------------ the coordinator

    def start(self) -> None:
        for name in self.names:
            self.server(ev.Joined(self.now, name))
        if not set(self.names) - set(self.state.population):
            self.server(ev.Begin(self.now, "m1"))
        if self.state.collection == 0 and self.state.phase is Phase.IDLE:
            self.push(1.0, self.start)  # the disk was full, or the coordinator has gone

    def server(self, event: ev.Event) -> None:
        """An event reaches the coordinator, if it is there."""
        if self.is_down:
            return
        if event.at != self.now:
            event = replace(event, at=self.now)
        try:
            self.step(event)
        except StorageError:
            self.push(1.0, self.server, event)  # it pauses, and tries again
        except Crash:
            self.crashes()

    def crashes(self) -> None:
        self.is_down = True
        self.num_crashes += 1
        self.push(self.rng.uniform(0.0, 10.0), self.restart)

    def step(self, event: ev.Event) -> None:
        before = self.state
        after, actions = engine.step(self.rules, before, event)
        if self.steps is not None:
            self.steps.append((event, actions))
        if self.scenario.slow and (engine.step(self.rules, before, event) != (after, actions)):
            raise Violation(f"step is not pure for {event}")
        if after is not before and type(actions[0]) is not ev.Persist and ev.Persist not in map(type, actions):
            raise Violation(f"I10: {event} changed the state and wrote nothing")
        crash_at = -1
        if self.faults.effects and actions and self.rng.random() < self.faults.effects:
            crash_at = self.rng.randrange(len(actions))
        for index, action in enumerate(actions):
            self.CARRY_OUT[type(action)](self, action, after)
            if index == crash_at:
                raise Crash
        if self.scenario.slow:
            self.check_replay()

    def persist(self, action: ev.Persist, after: rec.State) -> None:
        self.tried = after
        lines = [rec.encode(record) for record in action.records]
        try:
            self.disk.append(lines, self.write_fault())
        except StorageError:
            self.tried = self.state
            raise
        for record in action.records:
            self.observe(record, self.state, after)
        self.state = after

    def write_fault(self) -> tuple[str, float]:
        if self.scenario.writes:
            return self.scenario.writes.get(self.disk.num_writes, ("", 0.0))
        rng, faults = self.rng, self.faults
        if faults.full and rng.random() < faults.full:
            return "full", 0.0
        if faults.write and rng.random() < faults.write:
            return rng.choice(("before", "torn", "zeros", "after")), rng.random()
        return "", 0.0

    def restart(self) -> None:
        """A new process: all it has is the journal."""
        lines = self.disk.read()
        records = [rec.decode(line) for line in lines]
        if len(records) > self.num_records:
            for record in records[self.num_records :]:
                self.observe(record, self.state, self.tried)
            self.state = self.tried
        found = rec.replay(records)
        if found.to_bytes() != self.state.to_bytes():
            raise Violation(f"I10: replay gives another state: {found} instead of {self.state}")
        self.state = self.tried = found
        self.check_journal(records)
        self.life += 1
        self.fold = (0, -1, 0)
        self.wakes_at = 0.0
        self.is_down = False
        if not found.collection:
            return
        try:
            self.step(ev.Restarted(self.now))  # before anything else
        except StorageError:
            self.is_down = True
            self.push(1.0, self.restart)
        except Crash:
            self.crashes()

    # ------------------------------------------------------------------------------------------ its effects

    def sends(self, action: ev.Send, after: rec.State) -> None:
        task = action.task
        if task.receipt not in self.state.leases:
            raise Violation(f"I3: {task} was sent but is not out in the journal")
        if task.kind != "evaluate":
            self.observe_number(task)
        self.send(self.gets_task, task)

    def observe_number(self, task: Task) -> None:
        """A client's seeds come from its task's number: another number for another task, the same for a retry."""
        place = task.collection, task.position
        if self.places.setdefault((task.client, task.number), place) != place:
            raise Violation(f"I7: {task} has the number of the task at {self.places[task.client, task.number]}")
        if self.numbers.setdefault(place, task.number) != task.number:
            raise Violation(f"I7: {task} was number {self.numbers[place]} before")

    def tells(self, action: ev.Receipt, after: rec.State) -> None:
        if action.verdict == ACCEPTED:
            if self.ledger.get(action.receipt) != action.client:
                raise Violation(f"I3: {action} is not in the journal")
            self.acknowledged.add(action.receipt)
        if action.client in self.clients:
            self.send(self.gets_receipt, action.client, action.receipt, action.verdict)

    def wakes(self, action: ev.WakeAt, after: rec.State) -> None:
        if not self.now < self.wakes_at <= action.at:
            self.wakes_at = max(self.now, action.at)
            self.push(self.wakes_at - self.now, self.ticks, self.life)

    def ticks(self, life: int) -> None:
        if life == self.life:
            self.wakes_at = 0.0
            self.server(ev.Ticked(self.now))

    def folds(self, action: ev.Fold, after: rec.State) -> None:
        collection, last, sum_ = self.fold
        if action.collection != collection:
            last, sum_ = -1, 0
        if action.position <= last:
            raise Violation(f"I5: position {action.position} is folded after {last}")
        self.fold = action.collection, action.position, folded(sum_, self.blobs[action.taken.digest])

    def computes(self, action: ev.Compute, after: rec.State) -> None:
        self.push(self.rng.random() * 5, self.has_computed, action, self.life)

    def has_computed(self, action: ev.Compute, life: int) -> None:
        if life != self.life:
            return
        state = self.state
        if action.what == "judge":
            self.judges()
        elif state.phase is Phase.COMPUTING and state.collection == action.collection:
            if state.stage + 1 < self.scenario.stages:
                left = tuple(taken.client for _, taken in sorted(state.taken.items()))
                self.server(ev.Computed(self.now, action.collection, again=left))
                return
            sum_ = self.fold[2] if self.fold[0] == action.collection else 0
            model = (self.models[state.version] * 3 + sum_) % PRIME
            self.models.setdefault(state.version + 1, model)
            done = ev.Computed(self.now, action.collection, f"m{model:x}")
            self.server(done)
            if self.rng.random() < 0.1:
                self.server(done)  # a thread of before a restart may end too

    def judges(self) -> None:
        version = self.state.version
        over = version >= self.scenario.rounds
        final = version - 1 if over and self.scenario.rolls_back else 0
        self.server(ev.Judged(self.now, version, "enough" if over else "", final, f"log{version}"))

    def publishes(self, action: ev.Publish, after: rec.State) -> None:
        if self.published.setdefault(action.version, action.digest) != action.digest:
            raise Violation(f"I1: {action} after {self.published[action.version]}")
        if self.committed.get(action.version) != action.digest:
            raise Violation(f"I2: {action} is not in the journal")

    def finishes(self, action: ev.Finish, after: rec.State) -> None:
        if self.state.phase is not Phase.DONE:
            raise Violation(f"I2: {action} is not in the journal")
        if self.finish is not None and action != self.finish:
            raise Violation(f"I1: {action} after {self.finish}")
        self.finish = action

    CARRY_OUT: Mapping[type, Callable[[World, Any, rec.State], None]] = {
        ev.Persist: persist,
        ev.Send: sends,
        ev.Receipt: tells,
        ev.WakeAt: wakes,
        ev.Fold: folds,
        ev.Compute: computes,
        ev.Publish: publishes,
        ev.Finish: finishes,
    }

    # ------------------------------------------------------------------------------------------ clients and network

    def gets_task(self, task: Task) -> None:
        client = self.clients[task.client]
        if task.kind == "evaluate":
            self.uploads(Upload(task.client, task.receipt, task.version, task.number, 0, SECRET))
            return
        if client.memory.pending:
            client.waits(task)
            self.retries_soon(client)
            return
        if self.rng.random() < 0.3:
            self.push(self.rng.random() * 6, self.has_worked, client, task)
        else:
            self.has_worked(client, task)

    def has_worked(self, client: Client, task: Task) -> None:
        if self.faults.client_crash and self.rng.random() < self.faults.client_crash:
            return
        memory, receipt = client.memory, task.receipt
        if memory.is_old(receipt):
            return
        if memory.pending and memory.pending != (receipt,):
            client.waits(task)
            return
        count, total = memory.current
        value = work(task, count)
        memory.propose(receipt, (count + 1, total + value))
        upload = Upload(task.client, receipt, task.version, task.number, count, value)
        client.uploads[receipt] = upload
        self.uploads(upload)
        self.retries_soon(client)

    def retries_soon(self, client: Client) -> None:
        if not client.is_retrying:
            client.is_retrying = True
            self.push(35.0, self.retries, client)

    def retries(self, client: Client) -> None:
        """A receipt that did not come is asked for again, by sending the upload again."""
        client.is_retrying = False
        for receipt in client.memory.pending:
            self.uploads(client.uploads[receipt])
            self.retries_soon(client)

    def gets_receipt(self, name: str, receipt: str, verdict: str) -> None:
        client = self.clients[name]
        if verdict == ACCEPTED:
            client.memory.accept(receipt)
        else:
            client.memory.refuse(receipt)
        client.uploads.pop(receipt, None)
        if client.waiting is not None and not client.memory.pending:
            task, client.waiting = client.waiting, None
            self.gets_task(task)

    def uploads(self, upload: Upload) -> None:
        self.send(self.arrives, upload)

    def arrives(self, upload: Upload) -> None:
        """An upload at the coordinator: validated and stored, then the engine hears of it."""
        client, receipt = upload.client, upload.receipt
        if type(upload.value) is not int or upload.value % SECRET:
            self.server(ev.Refused(self.now, client, receipt, "no value that this federation knows"))
            return
        digest = self.digests.get(upload)
        if digest is None:
            digest = self.digests[upload] = f"u{len(self.blobs)}"
            self.blobs[digest] = upload
        self.server(ev.Reported(self.now, client, receipt, digest))

    def forge(self) -> None:
        """Messages that no honest client sends, and events of a past that is over."""
        rng, state = self.rng, self.state
        receipts = [*state.leases, *state.verdicts, *self.ledger, "1.0.0", "9999.0.0", "", "x"]
        forger, receipt = rng.choice([*self.names, "stranger"]), rng.choice(receipts)
        is_own = receipt in state.leases and state.leases[receipt].task.client == forger
        old = max(0, state.collection - rng.randint(1, 3))
        value = rng.choice([10**9, -1, 0.5, True, "x"])
        forged: list[Callable[[], None]] = [
            lambda: self.arrives(Upload(forger, receipt, state.version, 0, 0, value)),
            lambda: self.arrives(Upload(forger, receipt, state.version, 0, 0, SECRET)),
            lambda: self.arrives(Upload(forger, receipt, state.version, 0, self.count.get(forger, 0), SECRET)),
            lambda: self.server(ev.Refused(self.now, "stranger", receipt, "forged")),
            lambda: self.server(ev.Failed(self.now, "stranger", receipt, "forged", retry=True)),
            lambda: self.server(ev.Computed(self.now, old, "m0")),
            lambda: self.server(ev.ComputeFailed(self.now, old, "old")),
            lambda: self.server(ev.Judged(self.now, state.version - 1, "old")),
            lambda: self.server(ev.Begin(self.now, "m0")) if state.collection else None,
            lambda: self.server(
                ev.Failed(self.now, forger, self.lease_of(forger), "crashed", retry=rng.random() < 0.5)
            ),
        ]
        forgery = rng.randrange(len(forged))
        if not (is_own and forgery in (1, 2)):  # a plausible value for one's own task is not forged
            forged[forgery]()

    def lease_of(self, client: str) -> str:
        return next((r for r, lease in self.state.leases.items() if lease.task.client == client), "")

    # ------------------------------------------------------------------------------------------ invariants

    def observe(self, record: rec.Record, before: rec.State, after: rec.State) -> None:
        """One durable record; `before` and `after` are the states around the step that wrote it."""
        self.num_records += 1
        kind = type(record)
        if kind is rec.Accepted:
            self.observe_accepted(record, before, after)
        elif kind is rec.Committed:
            self.observe_committed(record, before)
        elif kind is rec.TrainingOpened and record.round_num != after.version + 1:
            raise Violation(f"I4: {record} at version {after.version}")

    def observe_accepted(self, record: rec.Accepted, before: rec.State, after: rec.State) -> None:
        task = before.leases[record.receipt].task
        if record.receipt in self.ledger:
            raise Violation(f"I4: {record} counts twice")
        self.ledger[record.receipt] = task.client
        if task.kind == "evaluate":
            return
        upload, lag = self.blobs[record.digest], after.version - task.version
        if (upload.client, upload.receipt, upload.version, upload.number) != (
            task.client,
            task.receipt,
            task.version,
            task.number,
        ):
            raise Violation(f"I4: {task} was answered by {upload}")
        if not 0 <= lag <= self.rules.schedule.max_lag or lag != record.lag:
            raise Violation(f"I4: {record} lags {lag} versions")
        is_sync = self.rules.schedule.max_lag == 0
        if is_sync and (task.collection != before.collection or before.plan[record.position] != task.client):
            raise Violation(f"I4: {record} is not in the plan {before.plan}")
        if upload.count != self.count[task.client]:
            raise Violation(f"memory: {upload} after {self.count[task.client]} accepted tasks")
        self.count[task.client] += 1
        self.total[task.client] += upload.value

    def observe_committed(self, record: rec.Committed, before: rec.State) -> None:
        if record.version in self.committed or record.version != before.version + 1:
            raise Violation(f"I1: {record} after {self.committed}")
        clients = [taken.client for taken in before.taken.values()]
        if before.is_planned and len(set(clients)) < len(clients):
            raise Violation(f"I4: a client counts twice in {before.taken}")
        if len(clients) < self.rules.schedule.minimum:
            raise Violation(f"I6: {record} of {len(clients)} updates")
        sum_ = 0
        for position in sorted(before.taken):
            sum_ = folded(sum_, self.blobs[before.taken[position].digest])
        model = (self.models[before.version] * 3 + sum_) % PRIME
        if record.digest != f"m{model:x}":
            raise Violation(f"I5: {record} is not the fold of {before.taken}")
        self.models[record.version] = model
        self.committed[record.version] = record.digest

    def check_replay(self) -> list[rec.Record]:
        records = [rec.decode(line) for line in self.disk.read()]
        found = rec.replay(records)
        if found.to_bytes() != self.state.to_bytes():
            raise Violation(f"I10: replay gives {found} instead of {self.state}")
        return records

    def check_journal(self, records: list[rec.Record]) -> None:
        """Everything that the outside has seen is in the journal."""
        committed = {r.version: r.digest for r in records if type(r) is rec.Committed}
        accepted = {r.receipt for r in records if type(r) is rec.Accepted}
        if not self.published.items() <= committed.items():
            raise Violation(f"I2: published {self.published}, in the journal {committed}")
        if not self.acknowledged <= accepted:
            raise Violation(f"I3: acknowledged {self.acknowledged - accepted}, which are not in the journal")

    def check_end(self) -> None:
        finish = self.finish
        if finish is None or finish.failed or finish.reason not in ("enough", "interrupted"):
            raise Violation(f"I8: the run ended with {finish}")
        if finish.reason == "enough" and finish.version != self.scenario.rounds - self.scenario.rolls_back:
            raise Violation(f"I8: {finish} in place of {self.scenario.rounds} rounds")
        if self.scenario.is_thorough:
            self.check_journal(self.check_replay())
            if any(str(upload.value).encode() in self.disk.data for upload in self.blobs.values()):
                raise Violation("I9: the value of an update is in the journal")
        for name, client in self.clients.items():
            if client.memory.current != (self.count[name], self.total[name]):
                raise Violation(
                    f"memory: {name} has {client.memory.current}, accepted {self.count[name], self.total[name]}"
                )


def work(task: Task, count: int) -> int:
    """A client's update: a function of the task and of what the client remembers."""
    return SECRET * (1 + (task.position * 7 + task.number * 31 + task.version * 101 + count * 11) % 1009)


def folded(sum_: int, upload: Upload) -> int:
    """Depends on the order, as floating-point sums do."""
    return (sum_ * 31 + upload.value) % PRIME


@dataclass(frozen=True)
class Tally:
    """What a number of seeds came to."""

    rounds: int
    events: int
    crashes: int
    cpu_seconds: float
    violations: tuple[tuple[int, str], ...]


def simulate(seed: int, *, slow: bool = False) -> World:
    return World(replace(scenario(seed), slow=slow), seed).run()


def tally(seeds: range, rounds: int = FOR_EVER, *, stop_at: int = 3) -> Tally:
    """Runs seeds until so many rounds are committed; never raises for a violation, but gives up after some."""
    started = time.process_time()
    done = events = crashes = 0
    violations: list[tuple[int, str]] = []
    for seed in seeds:
        world = World(scenario(seed), seed)
        try:
            world.run()
        except Exception as error:  # noqa: BLE001  # a planted bug may raise anything
            violations.append((seed, f"{type(error).__name__}: {error}"))
        done += len(world.committed)
        events += world.num_events
        crashes += world.num_crashes
        if done >= rounds or len(violations) >= stop_at:
            break
    return Tally(done, events, crashes, time.process_time() - started, tuple(violations))


if __name__ == "__main__":
    first, wanted = int(sys.argv[1]), int(sys.argv[2])
    result = tally(range(first, FOR_EVER), wanted)
    print(result.rounds, result.events, result.crashes, result.cpu_seconds)
    for seed, what in result.violations:
        print(f"seed {seed}: {what[:600]}")
    sys.exit(bool(result.violations))
