"""Drives a coordinator with an executor on one machine: the simulation's half of a run. No round logic lives here."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from polyfed.core import wire
from polyfed.core.algorithm import Task
from polyfed.core.coordinator import Coordinator
from polyfed.core.errors import ClientError, UsageError
from polyfed.core.events import (
    Action,
    Compute,
    Failed,
    Finish,
    Interrupted,
    Joined,
    Judged,
    Left,
    Receipt,
    Restarted,
    Send,
    Ticked,
)
from polyfed.core.memory import ClientMemory
from polyfed.core.message import Memory, Message
from polyfed.core.protocols import Executor, Job, Reply
from polyfed.core.records import ACCEPTED, Phase


def framed_size(message: Message) -> int:
    """Bytes that a message has on the wire; 0 for one that has no form there, which the coordinator refuses."""
    try:
        return wire.size(message)
    except UsageError:
        return 0


def _always(client: str, round_num: int) -> bool:
    """Everybody takes part in every round."""
    del client, round_num
    return True


class MemoryFiles(Protocol):
    """Where client memories outlive the process: `polyfed.storage.memories`."""

    def put(self, receipt: str, memory: Memory) -> None: ...
    def get(self, receipt: str) -> Memory: ...
    def keep(self, receipts: Collection[str]) -> None: ...


class Driver:
    """Carries out a coordinator's actions: hands tasks to an executor, replies back, and keeps the clients' memories.

    Attributes:
        memories: client -> its memory, pending and current.
        errors: client -> what its own code raised, the newest.
        finish: how the run ended; None while it goes on.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        executor: Executor,
        *,
        files: MemoryFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
        watch: Callable[[Reply], None] | None = None,
        sent: Callable[[Sequence[Task]], None] | None = None,
        begins: Mapping[str, Memory] | None = None,
        presence: Callable[[str, int], bool] = _always,
    ) -> None:
        self.coordinator, self.executor, self.files = coordinator, executor, files
        self.begins, self.presence = begins or {}, presence
        self.memories: dict[str, ClientMemory] = {}
        self.errors: dict[str, ClientError] = {}
        self.finish: Finish | None = None
        self.watch, self.sent = watch, sent
        self._clock, self._started = clock, clock()
        self._sends: list[Task] = []
        self._out: dict[str, Task] = {}
        self._compute: Compute | None = None

    @property
    def now(self) -> float:
        """Seconds since the driver started."""
        return self._clock() - self._started

    # ------------------------------------------------------------------------------------------ actions

    def begin(self, clients: Sequence[str]) -> None:
        self.memories = {name: ClientMemory(self.begins.get(name)) for name in clients}
        self.carry_out(self.coordinator.begin([name for name in clients if self.presence(name, 1)], at=self.now))

    def come_back(self, clients: Sequence[str]) -> None:
        """Goes on from a coordinator that was resumed from its journal; a start that was cut off is made again."""
        if self.coordinator.state.phase is Phase.IDLE:
            return self.begin(clients)
        for name in clients:
            receipt = self.coordinator.receipts.get(name, "")
            self.memories[name] = ClientMemory(self._memory_of(name, receipt), receipt)
        past = (self.coordinator.state.opened, *(log.seconds for log in self.coordinator.history))
        self._started -= max(past)  # the run's time goes on where it stood: deadlines and budgets are in it
        if self.coordinator.state.ending or self.coordinator.state.phase is Phase.DONE:
            self.roll_back()
        return self.carry_out(self.coordinator.handle(Restarted(self.now)))

    def _memory_of(self, name: str, receipt: str) -> Memory:
        if self.files is not None and receipt:
            return self.files.get(receipt)
        return self.begins.get(name, Message())

    def carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._sends.append(action.task)
            elif isinstance(action, Receipt):
                self._settle(action)
            elif isinstance(action, Compute):
                self._compute = action
            elif isinstance(action, Finish):
                self.finish = action

    def _settle(self, action: Receipt) -> None:
        memory = self.memories[action.client]
        if action.verdict == ACCEPTED:
            memory.accept(action.receipt)
        else:
            memory.refuse(action.receipt)

    # ------------------------------------------------------------------------------------------ steps of a round

    def jobs(self) -> list[Job]:
        """The tasks that are out, each with its message and its client's memory: what "send" hands over."""
        tasks, self._sends = self._sends, []
        self._out |= {task.receipt: task for task in tasks}
        return [self._job(task) for task in tasks]

    def _job(self, task: Task) -> Job:
        message = self.coordinator.message_for(task)
        self.coordinator.count_down(task, framed_size(message))
        memory, receipt = self.memories[task.client], self.coordinator.receipts.get(task.client, "")
        if memory.receipt != receipt:  # the round in which it was accepted has been abandoned since
            self._roll_back(task.client, memory, receipt)
        return Job(task, message, memory.current)

    def collect(self, reply: Reply) -> None:
        """Hands one reply to the coordinator and settles the client's memory by the receipt."""
        task = reply.task
        self._out.pop(task.receipt, None)
        if self.watch is not None:
            self.watch(reply)
        if reply.error is not None or reply.message is None:
            error = reply.error or ClientError(task.client, "NoAnswer", "no message and no error came back")
            self.errors[task.client] = error
            reason = f"{error.kind}: {error.message}" if error.message else error.kind
            self.carry_out(self.coordinator.handle(Failed(self.now, task.client, task.receipt, reason)))
            return
        if task.kind != "evaluate":
            if self.files is not None:
                self.files.put(task.receipt, reply.memory)
            self.memories[task.client].propose(task.receipt, reply.memory)
        size, cpu = framed_size(reply.message), reply.cpu_seconds
        self.carry_out(
            self.coordinator.upload(self.now, task.client, task.receipt, reply.message, num_bytes=size, cpu_seconds=cpu)
        )

    def work(self, jobs: Sequence[Job]) -> Iterator[Reply]:
        """Submits jobs and yields replies as they finish; tasks that come up meanwhile are submitted too."""
        self._submit(jobs)
        for reply in self.executor.replies():
            yield reply
            if self._sends:
                self._submit(self.jobs())

    def _submit(self, jobs: Sequence[Job]) -> None:
        if self.sent is not None:
            self.sent([job.task for job in jobs])
        self.executor.submit(jobs)

    def run_tasks(self) -> None:
        """Does everything that is out and hands in what comes of it; jobs that were taken and not done come first."""
        waiting, self._out = self._out, {}
        self._sends[:0] = [task for receipt, task in waiting.items() if receipt in self.coordinator.state.leases]
        while self._sends:
            for reply in self.work(self.jobs()):
                self.collect(reply)
            self.carry_out(self.coordinator.handle(Ticked(self.now)))

    def compute(self) -> bool:
        """Carries out what the coordinator wants computed, if anything; False when there is nothing."""
        if self._compute is None:
            return False
        action, self._compute = self._compute, None
        event = self.coordinator.compute(action, at=self.now)
        if isinstance(event, Judged) and not event.reason:
            self._come_and_go(self.coordinator.state.version + 1)
        self.carry_out(self.coordinator.handle(event))
        return True

    def _come_and_go(self, round_num: int) -> None:
        """Enrols who takes part from the next round on, and lets go of who does not; before the round is planned."""
        there = set(self.coordinator.state.population)
        for name in self.memories:
            if (present := self.presence(name, round_num)) != (name in there):
                change = Joined(self.now, name) if present else Left(self.now, name)
                self.carry_out(self.coordinator.handle(change))

    def run_round(self) -> None:
        """Trains, aggregates, updates, evaluates and judges, until one more round is logged or the run has ended."""
        done = len(self.coordinator.history)
        while self.finish is None and len(self.coordinator.history) == done:
            self.run_tasks()
            if not self.compute() and not self._sends and self.finish is None:
                raise RuntimeError("the engine waits for something that no one will bring")
        if self.finish is None and self.coordinator.state.ending:
            self.close_run()
        self._forget()

    def close_run(self) -> None:
        """The last step: rolls memories back where the run ends with an earlier version, and reads the test rows."""
        self.roll_back()
        while self.finish is None:
            self.run_tasks()
            if not self.compute() and not self._sends and self.finish is None:
                raise RuntimeError("the engine waits for something that no one will bring")

    def roll_back(self) -> None:
        """Sets every client's memory to that of the version which the run ends with."""
        version = self.coordinator.state.version
        newest = self.coordinator.receipts if version else {}
        receipts: Mapping[str, str] = self.coordinator.receipts_at.get(version, newest)
        for name, memory in self.memories.items():
            self._roll_back(name, memory, receipts.get(name, ""))

    def _roll_back(self, name: str, memory: ClientMemory, receipt: str) -> None:
        try:
            memory.roll_back(receipt)
        except KeyError:  # after a resume the newest alone is at hand; the others are in their files
            memory.propose(receipt, self._memory_of(name, receipt))
            memory.accept(receipt)

    def _forget(self) -> None:
        """Lets go of the memories, and of the files, to which the run cannot come back any more."""
        kept = self.coordinator.receipts_at.values()
        for name, memory in self.memories.items():
            if not memory.is_single:
                memory.keep(receipts.get(name, "") for receipts in kept)
        if self.files is not None:
            receipts = {receipt for held in (*kept, self.coordinator.receipts) for receipt in held.values()}
            self.files.keep(receipts | self.coordinator.state.leases.keys())
        if self.coordinator.blobs is not None:
            self.coordinator.blobs.keep(self.coordinator.wanted())

    def interrupt(self, reason: str = "interrupted") -> None:
        """Ends the run where it stands: the last version, and the memories that belong to it.

        A run with a journal is not over there: the same call goes on from its checkpoint.
        """
        if self.finish is not None:
            return
        if self.coordinator.journal is None:
            self.carry_out(self.coordinator.handle(Interrupted(self.now, reason)))
        else:
            self.finish = Finish(reason, self.coordinator.state.version)
        self.roll_back()
