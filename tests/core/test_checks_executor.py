"""The contract finds every executor that breaks it: one planted fault each."""

from collections import deque
from dataclasses import replace

import pytest

from polyfed.core.checks_executor import check_executor, difference, toy_jobs, toy_sites
from polyfed.core.message import Message
from polyfed.core.protocols import Reply
from polyfed.core.work import perform


class Plain:
    """An executor that is right; the mutants below each change one thing."""

    def open(self, algorithm, sites, *, seed):
        self.algorithm, self.sites, self.seed, self.jobs = algorithm, sites, seed, deque()

    def submit(self, jobs):
        self.jobs.extend(jobs)

    def replies(self):
        while self.jobs:
            yield self.do(self.jobs.popleft())

    def do(self, job):
        return perform(self.algorithm, self.sites[job.task.client], job, seed=self.seed)

    def close(self):
        self.jobs = None


class Loses(Plain):
    def submit(self, jobs):
        super().submit([job for job in jobs if job.task.position != 3])


class Twice(Plain):
    def submit(self, jobs):
        super().submit([*jobs, *jobs[:1]])


class OneBit(Plain):
    def do(self, job):
        reply = super().do(job)
        if reply.message is None or "params" not in reply.message.trees:
            return reply
        return replace(reply, message=reply.message.put({"params": reply.message.trees["params"] * (1 + 2**-23)}))


class SwapsClients(Plain):
    def do(self, job):
        site = list(self.sites.values())[-1]
        return perform(self.algorithm, site, job, seed=self.seed)


class ForgetsMemory(Plain):
    def do(self, job):
        return super().do(replace(job, memory=Message()))


class CommitsMemoryOfFailures(Plain):
    def do(self, job):
        reply = super().do(job)
        return replace(reply, memory=Message()) if reply.error else reply


class Raises(Plain):
    def do(self, job):
        reply = super().do(job)
        if reply.error is not None:
            raise reply.error
        return reply


class OtherSeed(Plain):
    def open(self, algorithm, sites, *, seed):
        super().open(algorithm, sites, seed=seed + 1)


class TakesStock(Plain):
    def replies(self):
        jobs, self.jobs = self.jobs, deque()
        yield from map(self.do, jobs)


class ClosesOnce(Plain):
    def close(self):
        del self.jobs


class AlwaysValidation(Plain):
    def do(self, job):
        reply = super().do(replace(job, task=replace(job.task, part="validation")))
        return replace(reply, task=job.task)


class RaisesAttempt(Plain):
    def do(self, job):
        return super().do(replace(job, task=replace(job.task, attempt=1)))


class Stale(Plain):
    def close(self):
        pass

    def open(self, algorithm, sites, *, seed):
        if not hasattr(self, "jobs"):
            super().open(algorithm, sites, seed=seed)
        self.sites, self.jobs = sites, deque()


def test_an_executor_that_is_right_passes():
    check_executor(Plain)


@pytest.mark.parametrize(
    "mutant",
    [
        Loses,
        Twice,
        OneBit,
        SwapsClients,
        ForgetsMemory,
        CommitsMemoryOfFailures,
        Raises,
        OtherSeed,
        TakesStock,
        ClosesOnce,
        AlwaysValidation,
        RaisesAttempt,
        Stale,
    ],
)
def test_an_executor_with_a_fault_is_found(mutant):
    with pytest.raises(Exception, match=r"."):
        check_executor(mutant)


def test_difference_tells_what_differs():
    (job,) = toy_jobs(toy_sites(["a"]))
    reply = Reply(job.task, Message(numbers={"n": 1.0}))
    assert difference(reply, reply) == ""
    assert "task" in difference(Reply(replace(job.task, number=3)), reply)
    assert "message" in difference(Reply(job.task), reply)
    assert "'n': 2.0" in difference(Reply(job.task, Message(numbers={"n": 2.0})), reply)
