"""Who is asked and when a collection closes: the only rules that know time. All are values; time comes in with events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from polyfed.core.errors import UsageError
from polyfed.core.select import All, Select


class Standing(NamedTuple):
    """How a collection stands, as a schedule sees it.

    Attributes:
        now, opened: seconds on the driver's clock.
        asked: clients in the plan; accepted, left_out: how many of them are decided; the rest are outstanding.
    """

    now: float
    opened: float
    asked: int
    accepted: int
    left_out: int

    @property
    def outstanding(self) -> int:
        return self.asked - self.accepted - self.left_out


class Schedule(Protocol):
    """Rules of one federation.

    Attributes:
        minimum: accepted updates below which a round is abandoned.
        attempts: how often one client's task is handed out when it was lost (not when the client's own code raised).
        lease: seconds after which a silent client's task counts as lost; None waits for ever.
        block: neighbours of the plan whose updates are summed first: see the fold.
        patience: rounds abandoned in a row before the run ends.
        max_lag: versions that an update may be behind; 0 for synchronous rounds.
    """

    @property
    def minimum(self) -> int: ...
    @property
    def attempts(self) -> int: ...
    @property
    def lease(self) -> float | None: ...
    @property
    def block(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def max_lag(self) -> int: ...

    def start(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:
        """The cohort of a round, in the plan's order."""
        ...

    def refill(self, standing: Standing) -> int:
        """How many more clients to ask now, while the collection is open."""
        ...

    def closes(self, standing: Standing) -> bool:
        """Whether the collection is over; what is outstanding then is late."""
        ...

    def deadline(self, opened: float) -> float | None:
        """When `closes` must be asked again though nothing has happened."""
        ...


@dataclass(frozen=True)
class Sync:
    """Synchronous rounds after Bonawitz et al. 2019, 2.2: a goal count, a minimum and a deadline.

    A round closes when the goal is reached, when nobody is outstanding, or at the deadline; with at least `minimum`
    updates it is done, with fewer it is abandoned and tried again.

    Attributes:
        select: how the cohort is chosen.
        goal: accepted updates that close the round; None waits for the whole cohort. Over-selection is a cohort larger
            than the goal.
        deadline_seconds: time that a round has; None is no limit.
    """

    select: Select = field(default_factory=All)
    goal: int | None = None
    minimum: int = 1
    deadline_seconds: float | None = None
    attempts: int = 2
    lease: float | None = None
    block: int = 16
    patience: int = 3

    max_lag = 0

    def __post_init__(self) -> None:
        _positive(minimum=self.minimum, attempts=self.attempts, block=self.block, patience=self.patience)
        if self.goal is not None and self.goal < self.minimum:
            raise UsageError(f"goal={self.goal} would close a round below its minimum={self.minimum}")

    def start(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:
        return self.select.select(population, round_num, run_seed)

    def refill(self, standing: Standing) -> int:  # noqa: ARG002  # a synchronous cohort is asked once
        return 0

    def closes(self, standing: Standing) -> bool:
        if standing.outstanding <= 0 or standing.accepted >= (self.goal or math.inf):
            return True
        due = self.deadline(standing.opened)
        return due is not None and standing.now >= due

    def deadline(self, opened: float) -> float | None:
        return None if self.deadline_seconds is None else opened + self.deadline_seconds


@dataclass(frozen=True)
class Buffered:
    """Asynchronous rounds (FedBuff, Nguyen et al. 2022): `concurrency` clients work at any time; every `goal` accepted
    updates make a new version. Clients still at work keep their lease into the next round and arrive with a lag. What a
    lag weighs is the algorithm's to say: FedAvg does not look at it, and adds normalisation statistics to the newest start.
    """

    concurrency: int
    goal: int
    max_lag: int = 20
    attempts: int = 2
    lease: float | None = None
    block: int = 16
    patience: int = 3

    def __post_init__(self) -> None:
        _positive(concurrency=self.concurrency, goal=self.goal, attempts=self.attempts, max_lag=self.max_lag)
        _positive(block=self.block, patience=self.patience)

    @property
    def minimum(self) -> int:
        return self.goal

    def start(self, population: Sequence[str], round_num: int, run_seed: int) -> tuple[str, ...]:  # noqa: ARG002
        """Everybody who may be asked; the engine hands out `concurrency` tasks at a time, in a seeded order."""
        return tuple(population)

    def refill(self, standing: Standing) -> int:
        return self.concurrency - standing.outstanding

    def closes(self, standing: Standing) -> bool:
        return standing.accepted >= self.goal

    def deadline(self, opened: float) -> float | None:  # noqa: ARG002  # a buffer waits until it is full
        return None


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1")
