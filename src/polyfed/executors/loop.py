"""One client after another, in this process: the reference that every other executor must equal, and the one to debug in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from polyfed.core.algorithm import Algorithm
from polyfed.core.errors import UsageError
from polyfed.core.protocols import Job, Reply, Site
from polyfed.core.work import perform


class Loop:
    """Runs jobs in the order in which they were submitted, each when its reply is asked for."""

    def __init__(self) -> None:
        self._algorithm: Algorithm | None = None
        self._sites: Mapping[str, Site] = {}
        self._seed = 0
        self._jobs: deque[Job] = deque()

    def open(self, algorithm: Algorithm, sites: Mapping[str, Site], *, seed: int) -> None:
        """Takes the sites; whatever an earlier use left unanswered is forgotten."""
        self._algorithm, self._sites, self._seed = algorithm, dict(sites), seed
        self._jobs.clear()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs; raises `UsageError` for a client that `open` did not name."""
        check_jobs(jobs, self._algorithm is not None, self._sites)
        self._jobs.extend(jobs)

    def replies(self) -> Iterator[Reply]:
        """Does one job a step, until none is left; jobs submitted meanwhile are done too."""
        while self._jobs:
            assert self._algorithm is not None
            job = self._jobs.popleft()
            start = time.process_time()
            reply = perform(self._algorithm, self._sites[job.task.client], job, seed=self._seed)
            yield replace(reply, cpu_seconds=time.process_time() - start)

    def close(self) -> None:
        """Forgets sites and jobs; may be called again, and `open` after it."""
        self._algorithm, self._sites = None, {}
        self._jobs.clear()


def check_jobs(jobs: Sequence[Job], is_open: bool, sites: Mapping[str, Site]) -> None:
    """Raises `UsageError` when the executor is not open or a job names a client that it was not given."""
    if not is_open:
        raise UsageError("the executor is not open; call open(algorithm, sites, seed=...) before submit()")
    if unknown := sorted({job.task.client for job in jobs} - sites.keys()):
        raise UsageError(
            f"job for unknown client {unknown[0]!r}; open() was given: {', '.join(sorted(sites)) or 'none'}"
        )
