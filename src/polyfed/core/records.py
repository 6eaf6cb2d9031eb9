"""The journal's records, the state that they make, and their codec. `apply` is the only thing that changes a state.

Phases, and the records that lead from one to the next, are the table `NEXT`:

    IDLE        no collection is open: before the first round, or between two
    TRAINING    tasks are out; updates are accepted, refused, lost or late (a multi-stage protocol comes back here)
    COMPUTING   the fold is complete and the algorithm makes the next version, outside of the engine
    JUDGING     a version is published; it is evaluated, then the stopping rules are asked
    EVALUATING  evaluation tasks are out
    ENDING      a reason to end is recorded
    TESTING     the test rows are read, once
    DONE        nothing more happens
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from json.encoder import encode_basestring_ascii
from operator import attrgetter
from typing import Any, get_args

from polyfed.core.algorithm import EvaluatedRows, Kind, Task
from polyfed.core.errors import CorruptError

ACCEPTED = "accepted"
LATE = "late: the round had closed"
#: Collections for which every verdict is remembered, so that a client whose receipt was lost may ask again. Each
#: client's newest accepted receipt is remembered for good: forgotten, its memory and the server's would part.
REMEMBERED = 4


class Phase(Enum):
    """Where a run stands: see the head of this file."""

    IDLE = "idle"
    TRAINING = "training"
    COMPUTING = "computing"
    JUDGING = "judging"
    EVALUATING = "evaluating"
    ENDING = "ending"
    TESTING = "testing"
    DONE = "done"

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a slow detour through the name


@dataclass(frozen=True, slots=True)
class Lease:
    """A task that is out, and until when."""

    task: Task
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """An accepted upload: whose, by which receipt, where its bytes are staged, and how many versions it lags."""

    client: str
    receipt: str
    digest: str
    lag: int = 0


@dataclass(frozen=True, slots=True)
class Enrolled:
    client: str


@dataclass(frozen=True, slots=True)
class Gone:
    client: str


@dataclass(frozen=True, slots=True)
class Initial:
    """Version 0: where the run starts."""

    digest: str


@dataclass(frozen=True, slots=True)
class TrainingOpened:
    """A collection of updates. `plan`: the cohort in order; empty for asynchronous rounds, which hand out one by one."""

    at: float
    round_num: int
    stage: int
    plan: tuple[str, ...]
    block: int
    lease: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationOpened:
    at: float
    version: int
    part: EvaluatedRows
    plan: tuple[str, ...]
    lease: float | None = None


@dataclass(frozen=True, slots=True)
class HandedOut:
    """One task handed out while a collection is open: a retry (attempt > 0), or an asynchronous client's turn."""

    client: str
    position: int
    number: int
    attempt: int
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    receipt: str
    position: int
    digest: str
    lag: int = 0


@dataclass(frozen=True, slots=True)
class Dropped:
    receipt: str
    reason: str


@dataclass(frozen=True, slots=True)
class Held:
    """An asynchronous upload came while a version was being computed; it is the first of the next buffer."""

    receipt: str
    digest: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The collection is over; `late` are the receipts that were still out."""

    late: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Abandoned:
    reason: str
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Committed:
    """A new version exists; what it was made of is decided and will not change."""

    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class WentOn:
    """The stopping rules gave no reason; `log` is the digest of the round's entry in the history."""

    version: int
    log: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    reason: str
    version: int
    log: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    reason: str
    version: int
    failed: bool = False


Record = (
    Enrolled | Gone | Initial | TrainingOpened | EvaluationOpened | HandedOut | Accepted | Dropped | Held | Closed | Abandoned
    | Committed | WentOn | Ended | Finished
)  # fmt: skip

#: (phase, record) -> next phase. Records that are not listed for a phase cannot be written in it.
NEXT: Mapping[tuple[Phase, type], Phase] = {
    (Phase.IDLE, Initial): Phase.IDLE,
    (Phase.IDLE, TrainingOpened): Phase.TRAINING,
    (Phase.TRAINING, Closed): Phase.COMPUTING,
    (Phase.TRAINING, Abandoned): Phase.IDLE,
    (Phase.COMPUTING, TrainingOpened): Phase.TRAINING,
    (Phase.COMPUTING, Abandoned): Phase.IDLE,
    (Phase.COMPUTING, Committed): Phase.JUDGING,
    (Phase.JUDGING, EvaluationOpened): Phase.EVALUATING,
    (Phase.EVALUATING, Closed): Phase.JUDGING,
    (Phase.JUDGING, WentOn): Phase.IDLE,
    (Phase.JUDGING, Ended): Phase.ENDING,
    (Phase.ENDING, EvaluationOpened): Phase.TESTING,
    (Phase.TESTING, Closed): Phase.ENDING,
    (Phase.IDLE, Abandoned): Phase.IDLE,
    **{(phase, Finished): Phase.DONE for phase in Phase if phase is not Phase.DONE},
    **{(phase, record): phase for phase in Phase for record in (Enrolled, Gone) if phase is not Phase.DONE},
    **{
        (phase, record): phase
        for phase in (Phase.TRAINING, Phase.EVALUATING, Phase.TESTING)
        for record in (HandedOut, Accepted, Dropped)
    },
    **{(phase, Dropped): phase for phase in (Phase.COMPUTING, Phase.JUDGING)},
    **{(phase, Held): phase for phase in (Phase.COMPUTING, Phase.JUDGING, Phase.EVALUATING)},
}


@dataclass(frozen=True)
class State:
    """Everything that the engine knows; a pure function of the records so far.

    Attributes:
        version: the newest version, or the one that the run ends with; digest: of the newest.
        plan: the open collection's cohort by position; asynchronous: whom each task was handed to.
        is_planned: positions of the plan are positions of the fold; asynchronous updates take theirs when accepted.
        block: neighbours of the plan whose updates are summed first.
        folded: positions below it are folded or passed over.
        leases: receipt -> what is out; a task whose upload is held is still there.
        taken: position -> what was accepted in the open collection.
        passed: positions of the open collection that will bring nothing.
        left_out: client -> why, in the open round.
        numbers: client -> training tasks that it was given so far.
        verdicts: receipt -> (its client, what that was told), in the open collection.
        older: the same of the collections before, newest first.
        newest: client -> its newest receipt that was accepted, evaluations aside.
        held: asynchronous uploads waiting for the next buffer, as (receipt, digest).
        evaluated: the last version that was evaluated.
        abandoned: rounds abandoned in a row.
        ending: why the run ends, once it is known.
    """

    phase: Phase = Phase.IDLE
    population: tuple[str, ...] = ()
    round_num: int = 0
    version: int = 0
    digest: str = ""
    collection: int = 0
    stage: int = 0
    part: EvaluatedRows = "validation"
    plan: tuple[str, ...] = ()
    is_planned: bool = True
    block: int = 16
    opened: float = 0.0
    folded: int = 0
    leases: Mapping[str, Lease] = field(default_factory=dict)
    taken: Mapping[int, Taken] = field(default_factory=dict)
    passed: frozenset[int] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    older: tuple[Mapping[str, tuple[str, str]], ...] = ()
    newest: Mapping[str, str] = field(default_factory=dict)
    held: tuple[tuple[str, str], ...] = ()
    evaluated: int = 0
    abandoned: int = 0
    ending: str = ""
    failed: bool = False

    def verdict(self, client: str, receipt: str) -> str:
        """What this client was told of this receipt; "" where it is not remembered, or is another client's."""
        for verdicts in (self.verdicts, *self.older):
            if receipt in verdicts:
                whose, said = verdicts[receipt]
                return said if whose == client else ""
        return ACCEPTED if self.newest.get(client) == receipt else ""

    def to_bytes(self) -> bytes:
        """Canonical form: equal states have equal bytes."""
        return json.dumps(self.__dict__, default=_plain, sort_keys=True, separators=(",", ":")).encode()


def _plain(value: Any) -> Any:
    """What JSON has no form for: a phase, a set of positions, a dataclass."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, frozenset):
        return sorted(value)
    return {f.name: getattr(value, f.name) for f in fields(value)}


def apply(state: State, record: Record) -> State:
    """The state after one record. The only thing that changes a state; raises `CorruptError` for an impossible one."""
    kind = type(record)
    phase = NEXT.get((state.phase, kind))
    if phase is None:
        raise CorruptError(f"{kind.__name__} cannot follow in phase {state.phase.value}: the journal is damaged")
    try:
        changes = _APPLY[kind](state, record)
    except KeyError as error:
        raise CorruptError(f"{record} names {error}, which is not there: the journal is damaged") from error
    # dataclasses.replace takes several times as long, and this is the hot path.
    after = object.__new__(State)
    values = state.__dict__.copy()
    values.update(changes)
    values["phase"] = phase
    object.__setattr__(after, "__dict__", values)
    return after


def replay(records: Iterable[Record]) -> State:
    """The state that these records made, byte for byte."""
    state = State()
    for record in records:
        state = apply(state, record)
    return state


#: The fields of a state that a record changes, with their new values.
Changes = dict[str, Any]


def _enrolled(state: State, record: Enrolled) -> Changes:
    return {"population": (*state.population, record.client)}


def _gone(state: State, record: Gone) -> Changes:
    return {"population": tuple(name for name in state.population if name != record.client)}


def _initial(state: State, record: Initial) -> Changes:
    del state
    return {"digest": record.digest}


def _collection_opened(state: State, record: TrainingOpened | EvaluationOpened) -> Changes:
    return {
        "collection": state.collection + 1,
        "plan": record.plan,
        "opened": record.at,
        "folded": 0,
        "taken": {},
        "passed": frozenset(),
        "verdicts": {},
        "older": (state.verdicts, *state.older)[:REMEMBERED],
    }


def _training_opened(state: State, record: TrainingOpened) -> Changes:
    numbers = dict(state.numbers)
    leases = dict(state.leases) if not record.plan else {}
    collection, ends = state.collection + 1, until(record.at, record.lease)
    kind: Kind = "train" if record.stage == 0 else "query"
    for position, client in enumerate(record.plan):
        number = numbers.get(client, 0)
        numbers[client] = number + 1
        task = Task(kind, client, record.round_num, state.version, collection, record.stage, position, number)
        leases[task.receipt] = Lease(task, ends)
    return {
        **_collection_opened(state, record),
        "round_num": record.round_num,
        "stage": record.stage,
        "is_planned": bool(record.plan),
        "block": record.block,
        "leases": leases,
        "left_out": state.left_out if record.stage else {},
        "numbers": numbers,
        "held": (),
    }


def _evaluation_opened(state: State, record: EvaluationOpened) -> Changes:
    leases, version = dict(state.leases), record.version
    collection, ends = state.collection + 1, until(record.at, record.lease)
    for position, client in enumerate(record.plan):
        task = Task("evaluate", client, state.round_num, version, collection, 0, position, version, 0, part=record.part)
        leases[task.receipt] = Lease(task, ends)
    return {
        **_collection_opened(state, record),
        "part": record.part,
        "is_planned": True,
        "leases": leases,
        "left_out": {} if record.part == "test" else state.left_out,
        "evaluated": version,
    }


def _handed_out(state: State, record: HandedOut) -> Changes:
    leases, at = dict(state.leases), (state.collection, record.position, record.attempt)
    if record.attempt:
        del leases[f"{at[0]}.{at[1]}.{at[2] - 1}"]
    task = _task(state, record)
    leases[task.receipt] = Lease(task, record.until)
    if record.attempt:
        return {"leases": leases}
    return {
        "leases": leases,
        "plan": (*state.plan, record.client),
        "numbers": {**state.numbers, record.client: record.number + 1},
    }


def _task(state: State, record: HandedOut) -> Task:
    kind: Kind = "query" if state.stage else "train"
    version, stage = state.version, state.stage
    if state.phase is not Phase.TRAINING:
        kind, version, stage = "evaluate", state.evaluated, 0
    return Task(
        kind,
        record.client,
        state.round_num,
        version,
        state.collection,
        stage,
        record.position,
        record.number,
        record.attempt,
        state.part if kind == "evaluate" else "validation",
    )


def _accepted(state: State, record: Accepted) -> Changes:
    leases, position = dict(state.leases), record.position
    task = leases.pop(record.receipt).task
    if position in state.taken or task.collection > state.collection:
        raise CorruptError(f"{record}: position {position} is taken: the journal is damaged")
    taken = {**state.taken, position: Taken(task.client, record.receipt, record.digest, record.lag)}
    return {
        "leases": leases,
        "taken": taken,
        "verdicts": {**state.verdicts, record.receipt: (task.client, ACCEPTED)},
        "folded": _folded(state.folded, taken, state.passed),
    }


def _dropped(state: State, record: Dropped) -> Changes:
    leases = dict(state.leases)
    task = leases.pop(record.receipt).task
    changes: Changes = {
        "leases": leases,
        "left_out": {**state.left_out, task.client: record.reason},
        "verdicts": {**state.verdicts, record.receipt: (task.client, record.reason)},
    }
    if state.is_planned and task.collection == state.collection:
        passed = state.passed | {task.position}
        changes |= {"passed": passed, "folded": _folded(state.folded, state.taken, passed)}
    return changes


def _folded(at: int, taken: Mapping[int, Taken], passed: frozenset[int]) -> int:
    """`at` moved over every position that is decided."""
    while at in taken or at in passed:
        at += 1
    return at


def _held(state: State, record: Held) -> Changes:
    state.leases[record.receipt]  # the check
    return {"held": (*state.held, (record.receipt, record.digest))}


def _closed(state: State, record: Closed) -> Changes:
    changes: Changes = {"folded": max(state.folded, len(state.plan)), **_settled(state)}
    if not record.late:
        return changes
    leases = dict(state.leases)
    clients = {receipt: leases.pop(receipt).task.client for receipt in record.late}
    return {
        **changes,
        "leases": leases,
        "left_out": {**state.left_out, **dict.fromkeys(clients.values(), LATE)},
        "verdicts": {**state.verdicts, **{receipt: (client, LATE) for receipt, client in clients.items()}},
    }


def _settled(state: State) -> Changes:
    """What leaving a training collection makes of its accepted receipts."""
    if state.phase is not Phase.TRAINING or not state.taken:
        return {}
    return {"newest": {**state.newest, **{taken.client: taken.receipt for taken in state.taken.values()}}}


def _abandoned(state: State, record: Abandoned) -> Changes:
    return {"abandoned": state.abandoned + record.counts, "leases": {}, "held": (), **_settled(state)}


def _committed(state: State, record: Committed) -> Changes:
    if record.version != state.version + 1:
        raise CorruptError(f"{record} follows version {state.version}: the journal is damaged")
    return {"version": record.version, "digest": record.digest, "abandoned": 0}


def _went_on(state: State, record: WentOn) -> Changes:
    del state, record
    return {}


def _ended(state: State, record: Ended) -> Changes:
    del state
    return {"ending": record.reason, "version": record.version, "leases": {}, "held": ()}


def _finished(state: State, record: Finished) -> Changes:
    changes = {"ending": record.reason, "version": record.version, "failed": record.failed, "leases": {}, "held": ()}
    return {**changes, **_settled(state)}


_APPLY: Mapping[type, Callable[[State, Any], Changes]] = {
    Enrolled: _enrolled,
    Gone: _gone,
    Initial: _initial,
    TrainingOpened: _training_opened,
    EvaluationOpened: _evaluation_opened,
    HandedOut: _handed_out,
    Accepted: _accepted,
    Dropped: _dropped,
    Held: _held,
    Closed: _closed,
    Abandoned: _abandoned,
    Committed: _committed,
    WentOn: _went_on,
    Ended: _ended,
    Finished: _finished,
}


def until(at: float, lease: float | None) -> float | None:
    """When a lease given at `at` ends."""
    return None if lease is None else at + lease


class _Codec:
    """Name, field types and order of one record."""

    _JSON: Mapping[str, tuple[type, ...]] = {
        "str": (str,),
        "EvaluatedRows": (str,),
        "int": (int,),
        "bool": (bool,),
        "float": (float, int),
        "float | None": (float, int, type(None)),
        "tuple[str, ...]": (list,),
    }

    def __init__(self, kind: type) -> None:
        described = fields(kind)
        self.kind = kind
        self.types = [self._JSON[str(f.type)] for f in described]
        self.usual = [types[0] for types in self.types]
        self.tuples = [i for i, types in enumerate(self.types) if list in types]
        self.values = attrgetter(*(f.name for f in described))
        self.is_single = len(described) == 1

    def record(self, values: list[Any]) -> Record:
        if len(values) != len(self.types):
            raise ValueError(f"{self.kind.__name__} has {len(self.types)} fields, got {len(values)}")
        if list(map(type, values)) != self.usual:
            for value, types in zip(values, self.types, strict=True):
                if type(value) not in types:
                    raise ValueError(f"{self.kind.__name__} cannot hold {value!r}")
        for i in self.tuples:
            if not all(type(item) is str for item in values[i]):
                raise ValueError(f"{self.kind.__name__} lists something that is no text")
            values[i] = tuple(values[i])
        return self.kind(*values)  # type: ignore[no-any-return]  # a record, by the table


_CODECS: Mapping[str, _Codec] = {record.__name__: _Codec(record) for record in get_args(Record)}
_from_json = json.JSONDecoder().raw_decode


def _json_of(number: float) -> str:
    if not math.isfinite(number):
        raise ValueError(f"a record cannot hold {number}: JSON has no form for it")
    return float.__repr__(number)


#: The json module builds an encoder anew for every call; a record holds nothing but these.
_WRITE: Mapping[type, Callable[[Any], str]] = {
    str: encode_basestring_ascii,
    int: int.__repr__,
    float: _json_of,
    bool: lambda value: "true" if value else "false",
    type(None): lambda value: "null",  # noqa: ARG005  # one form for all of them
    tuple: lambda items: f"[{','.join(map(encode_basestring_ascii, items))}]",
}


def encode(record: Record) -> bytes:
    """One line of JSON: the record's name and its fields in order."""
    name = type(record).__name__
    codec = _CODECS[name]
    values = codec.values(record)
    written = [_WRITE[type(value)](value) for value in ((values,) if codec.is_single else values)]
    return f'["{name}",{",".join(written)}]'.encode()


def decode(line: bytes) -> Record:
    """The inverse of `encode`; raises `CorruptError` for anything else."""
    try:
        text = line.decode()
        (name, *values), end = _from_json(text)
        if end != len(text):
            raise ValueError(f"{len(text) - end} characters follow it")  # noqa: TRY301  # one way out below
        return _CODECS[name].record(values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptError(f"a journal record cannot be read: {error}") from error
