"""What happens to the round engine and what it asks for: events come in with their time, actions go out in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polyfed.core.algorithm import Task
from polyfed.core.records import Record, Taken


@dataclass(frozen=True, slots=True)
class Joined:
    at: float
    client: str


@dataclass(frozen=True, slots=True)
class Left:
    at: float
    client: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Those who joined so far are enough: start the first round, from the state stored under `digest`."""

    at: float
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Reported:
    """A valid upload is staged under `digest`; client is the connection's, receipt the one its task carried."""

    at: float
    client: str
    receipt: str
    digest: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An upload did not pass validation."""

    at: float
    client: str
    receipt: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A task will not be answered. `retry`: it was lost (worker or link died), not the client's own code that raised."""

    at: float
    client: str
    receipt: str
    reason: str
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Ticked:
    at: float


@dataclass(frozen=True, slots=True)
class Computed:
    """The algorithm made the next version, stored under `digest`; or the protocol asks `again` for one more stage."""

    at: float
    collection: int
    digest: str = ""
    again: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ComputeFailed:
    at: float
    collection: int
    reason: str


@dataclass(frozen=True, slots=True)
class Judged:
    """The stopping rules were asked about `version`: "" goes on, a reason ends the run.

    Attributes:
        final: the version that the run ends with, an earlier one after a roll-back; 0 is `version` itself.
        log: digest of the round's entry in the history, where one is stored.
    """

    at: float
    version: int
    reason: str = ""
    final: int = 0
    log: str = ""


@dataclass(frozen=True, slots=True)
class Interrupted:
    at: float
    reason: str = "interrupted"


@dataclass(frozen=True, slots=True)
class Restarted:
    """The coordinator came back from its journal; its effects since the last record may or may not have happened.

    The first event of a new process, handed in again until its records are durable; others wait for it.
    """

    at: float


Event = (
    Joined
    | Left
    | Begin
    | Reported
    | Refused
    | Failed
    | Ticked
    | Computed
    | ComputeFailed
    | Judged
    | Interrupted
    | Restarted
)


@dataclass(frozen=True, slots=True)
class Persist:
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Send:
    task: Task


@dataclass(frozen=True, slots=True)
class Receipt:
    """Tell a client what became of its upload; `verdict` is "accepted" or why not."""

    client: str
    receipt: str
    verdict: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    at: float


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold the upload at this position; actions of one collection come in increasing order of position."""

    collection: int
    position: int
    taken: Taken


@dataclass(frozen=True, slots=True)
class Compute:
    """Make the next version ("update"), to be answered by `Computed`; or ask the stopping rules ("judge"): `Judged`."""

    what: Literal["update", "judge"]
    collection: int


@dataclass(frozen=True, slots=True)
class Publish:
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str
    version: int
    failed: bool = False


Action = Persist | Send | Receipt | WakeAt | Fold | Compute | Publish | Finish
