"""The round engine: a state machine without input or output, driven by simulation, server, tests and replay alike.

`step(rules, state, event)` returns the next state and the actions that follow. Time comes in with the events. A handler
decides and writes *records*; only `apply` changes the state, one record at a time; so a journal of the records is the
state, and `replay(records)` gives it back byte for byte. `Persist` is the first action of a step: its records must be
durable before any later action of that step is carried out.

Which handler answers which event in which phase is the table `HANDLERS`; which record leads from one phase to the next
is the table `NEXT` of `polyfed.core.records`, and `picture()` draws it.

The plan decides the bits. Synchronous rounds journal their cohort in order; position is place in it. Asynchronous ones
give positions in order of acceptance. Either way updates are folded in order of position (see `aggregate`): a position
is folded as soon as all before it are decided, and a client that was not accepted is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyfed.core import seed
from polyfed.core.algorithm import EvaluatedRows
from polyfed.core.events import (
    Action,
    Begin,
    Compute,
    Computed,
    ComputeFailed,
    Event,
    Failed,
    Finish,
    Fold,
    Interrupted,
    Joined,
    Judged,
    Left,
    Persist,
    Publish,
    Receipt,
    Refused,
    Reported,
    Restarted,
    Send,
    Ticked,
    WakeAt,
)
from polyfed.core.records import (
    ACCEPTED,
    NEXT,
    Abandoned,
    Accepted,
    Closed,
    Committed,
    Dropped,
    Ended,
    Enrolled,
    EvaluationOpened,
    Finished,
    Gone,
    HandedOut,
    Held,
    Initial,
    Lease,
    Phase,
    Record,
    State,
    TrainingOpened,
    WentOn,
    apply,
    until,
)
from polyfed.core.schedule import Schedule, Standing, Sync

EXPIRED = "expired: no such task is open"
NOT_YOURS = "refused: this task belongs to another client"


@dataclass(frozen=True)
class Rules:
    """What a run has agreed on; not part of the state.

    Attributes:
        evaluate_every: rounds between two evaluations; 0 never evaluates.
        test: whether the test rows are read at the end.
    """

    schedule: Schedule = field(default_factory=Sync)
    seed: int = 0
    evaluate_every: int = 1
    test: bool = True


class _Turn:
    """One step in the making: the state so far, the records that made it, and the effects to follow them."""

    __slots__ = ("at", "effects", "records", "rules", "state", "wakes")

    def __init__(self, rules: Rules, state: State, at: float) -> None:
        self.rules, self.state, self.at = rules, state, at
        self.records: list[Record] = []
        self.effects: list[Action] = []
        self.wakes = False

    def write(self, record: Record) -> None:
        """Adds a record, and the folds that it allows: a position is folded once all before it are decided."""
        before, after = self.state, apply(self.state, record)
        self.state = after
        self.records.append(record)
        if before.phase is Phase.TRAINING and before.folded < after.folded:
            taken, positions = after.taken, range(before.folded, after.folded)
            self.effects += [Fold(after.collection, p, taken[p]) for p in positions if p in taken]

    def do(self, *actions: Action) -> None:
        self.effects += actions

    def wake(self) -> None:
        """Have this step end with the nearest time at which something must happen though nothing has come in."""
        self.wakes = True

    @property
    def actions(self) -> list[Action]:
        wake = [WakeAt(at) for at in (_nearest(self),) if at is not None] if self.wakes else []
        return [*([Persist(tuple(self.records))] if self.records else []), *self.effects, *wake]

    @property
    def is_async(self) -> bool:
        return self.rules.schedule.max_lag > 0


def _nearest(turn: _Turn) -> float | None:
    """When the open collection's deadline comes or the next lease ends."""
    state = turn.state
    if state.phase not in _OPEN:
        return None
    held = dict(state.held)
    times = [lease.until for receipt, lease in state.leases.items() if lease.until is not None and receipt not in held]
    due = _due(turn)
    if due is not None and due > turn.at:
        times.append(due)
    return min(times, default=None)


def _due(turn: _Turn) -> float | None:
    """The open collection's deadline; the test rows are read once, so everybody is waited for (leases still end)."""
    if turn.state.phase is Phase.TESTING:
        return None
    return turn.rules.schedule.deadline(turn.state.opened)


def step(rules: Rules, state: State, event: Event) -> tuple[State, list[Action]]:
    """The state after an event, and what to do, in this order. Pure."""
    turn = _Turn(rules, state, event.at)
    HANDLERS[state.phase, type(event)](turn, event)
    return turn.state, turn.actions


def _ignore(turn: _Turn, event: Event) -> None:
    """Nothing to do in this phase."""


# ------------------------------------------------------------------------------------------ who takes part


def _join(turn: _Turn, event: Joined) -> None:
    if event.client in turn.state.population:
        return
    turn.write(Enrolled(event.client))
    if turn.is_async:
        _close_if_due(turn)  # asks the new client, if there is a place for it


def _leave(turn: _Turn, event: Left) -> None:
    if event.client not in turn.state.population:
        return
    turn.write(Gone(event.client))
    for receipt, lease in turn.state.leases.items():
        if lease.task.client == event.client and not _is_held(turn.state, receipt):
            _drop(turn, receipt, lease, "left the federation")
    _close_if_due(turn)


def _begin(turn: _Turn, event: Begin) -> None:
    if turn.state.collection == 0 and turn.state.abandoned == 0:
        turn.write(Initial(event.digest))
        _open_round(turn)


# ------------------------------------------------------------------------------------------ a round opens


def _open_round(turn: _Turn) -> None:
    """Open the next round, or abandon it at once if its cohort is below the minimum, as often as patience allows."""
    schedule, held = turn.rules.schedule, turn.state.held
    round_num = turn.state.version + 1  # a round that is abandoned is tried again under its own number
    least = 1 if turn.is_async else schedule.minimum
    while len(cohort := _cohort(turn, round_num)) < least:
        turn.write(Abandoned(f"round {round_num}: {len(cohort)} clients to ask, the minimum is {least}"))
        if turn.state.abandoned >= schedule.patience:
            return _give_up(turn)
    plan = () if turn.is_async else cohort
    turn.write(TrainingOpened(turn.at, round_num, 0, plan, schedule.block, schedule.lease))
    turn.wake()
    if turn.is_async:
        return _take_up(turn, held)
    return _send_all(turn)


def _cohort(turn: _Turn, round_num: int) -> tuple[str, ...]:
    """Drawn anew where the round was abandoned: the first draw has shown that it may not answer."""
    run_seed, again = turn.rules.seed, turn.state.abandoned
    return turn.rules.schedule.start(
        turn.state.population, round_num, seed.integer(run_seed, "again", again) if again else run_seed
    )


def _send_all(turn: _Turn) -> None:
    """Sends every task of the collection that has just opened."""
    state = turn.state
    turn.do(*(Send(lease.task) for lease in state.leases.values() if lease.task.collection == state.collection))


def _take_up(turn: _Turn, held: tuple[tuple[str, str], ...]) -> None:
    """An asynchronous buffer opens with what came while the version was computed, as far as it still counts."""
    for receipt, lease in turn.state.leases.items():
        _drop_if_stale(turn, receipt, lease)
    waiting = [(receipt, digest) for receipt, digest in held if receipt in turn.state.leases]
    for index, (receipt, digest) in enumerate(waiting):
        if turn.rules.schedule.closes(_standing(turn)):
            turn.write(Closed())
            for later in waiting[index:]:
                turn.write(Held(*later))
            return _after_closing(turn)
        _accept(turn, receipt, digest)
    return _close_if_due(turn)


def _drop_if_stale(turn: _Turn, receipt: str, lease: Lease) -> bool:
    lag = _lag(turn.state, lease)
    if lag <= turn.rules.schedule.max_lag:
        return False
    _drop(turn, receipt, lease, f"stale: computed from a version {lag} behind")
    return True


def _lag(state: State, lease: Lease) -> int:
    return 0 if lease.task.kind == "evaluate" else state.version - lease.task.version


def _drop(turn: _Turn, receipt: str, lease: Lease, reason: str) -> None:
    turn.write(Dropped(receipt, reason))
    turn.do(Receipt(lease.task.client, receipt, reason))


def _give_up(turn: _Turn) -> None:
    reason = f"no quorum: {turn.state.abandoned} rounds in a row had fewer than {turn.rules.schedule.minimum} updates"
    _finish(turn, reason, failed=True)


def _finish(turn: _Turn, reason: str, *, failed: bool = False) -> None:
    version = turn.state.version
    turn.write(Finished(reason, version, failed))
    turn.do(Finish(reason, version, failed))


def _refill(turn: _Turn) -> None:
    """Hands out asynchronous tasks: a seeded order over those who are not at work.

    Who has failed in this collection waits for the next one: asked again at once, it would fail without end.
    """
    state = turn.state
    count = turn.rules.schedule.refill(_standing(turn))
    if count <= 0:
        return
    busy = {lease.task.client for lease in state.leases.values()}
    free = [name for name in state.population if name not in busy and name not in state.left_out]
    dispatched = sum(state.numbers.values())
    for each in range(min(count, len(free))):
        client = free.pop(seed.key(turn.rules.seed, "dispatch", dispatched + each) % len(free))
        _hand_out(turn, client, len(turn.state.plan), turn.state.numbers.get(client, 0), 0)


def _hand_out(turn: _Turn, client: str, position: int, number: int, attempt: int) -> None:
    turn.write(HandedOut(client, position, number, attempt, until(turn.at, turn.rules.schedule.lease)))
    turn.do(Send(turn.state.leases[f"{turn.state.collection}.{position}.{attempt}"].task))
    turn.wake()


# ------------------------------------------------------------------------------------------ what clients bring


def _lease(turn: _Turn, event: Reported | Refused | Failed) -> Lease | None:
    """The open lease that an event is about; None if there is none, or it is another client's."""
    lease = turn.state.leases.get(event.receipt)
    return lease if lease is not None and lease.task.client == event.client else None


def _is_held(state: State, receipt: str) -> bool:
    return bool(state.held) and any(receipt == held for held, _ in state.held)


def _report(turn: _Turn, event: Reported) -> None:
    lease = _lease(turn, event)
    if lease is None:
        return _answer_again(turn, event)
    if _is_held(turn.state, event.receipt):
        return None
    if _drop_if_stale(turn, event.receipt, lease):
        return _close_if_due(turn)
    if turn.state.phase is not Phase.TRAINING and lease.task.kind != "evaluate":
        return turn.write(Held(event.receipt, event.digest))
    _accept(turn, event.receipt, event.digest)
    return _close_if_due(turn)


def _accept(turn: _Turn, receipt: str, digest: str) -> None:
    state = turn.state
    lease = state.leases[receipt]
    position = lease.task.position if state.is_planned else len(state.taken)
    turn.write(Accepted(receipt, position, digest, _lag(state, lease)))
    turn.do(Receipt(lease.task.client, receipt, ACCEPTED))


def _answer_again(turn: _Turn, event: Reported | Refused) -> None:
    """An upload for which no task is open: say once more what became of it. Costs nothing and changes nothing."""
    foreign = event.receipt in turn.state.leases
    said = NOT_YOURS if foreign else turn.state.verdict(event.client, event.receipt) or EXPIRED
    turn.do(Receipt(event.client, event.receipt, said))


def _refuse(turn: _Turn, event: Refused) -> None:
    lease = _lease(turn, event)
    if lease is None:
        return _answer_again(turn, event)
    if _is_held(turn.state, event.receipt):
        return None  # a valid upload came before this one
    _drop(turn, event.receipt, lease, event.reason)
    return _close_if_due(turn)


def _fail(turn: _Turn, event: Failed) -> None:
    lease = _lease(turn, event)
    if lease is None or _is_held(turn.state, event.receipt):
        return
    _lose(turn, lease, event.reason, retry=event.retry)
    _close_if_due(turn)


def _lose(turn: _Turn, lease: Lease, reason: str, *, retry: bool) -> None:
    """Hand a lost task out again if it may be, else leave its client out."""
    task = lease.task
    open_here = turn.state.phase in _OPEN and task.collection == turn.state.collection
    if retry and open_here and task.attempt + 1 < turn.rules.schedule.attempts:
        _hand_out(turn, task.client, task.position, task.number, task.attempt + 1)
    else:
        _drop(turn, task.receipt, lease, reason)


def _tick(turn: _Turn, event: Ticked | Restarted) -> None:
    if turn.state.phase not in _OPEN:
        return  # asked again when the next collection opens
    for receipt, lease in turn.state.leases.items():
        if lease.until is not None and lease.until <= event.at and not _is_held(turn.state, receipt):
            _lose(turn, lease, "lost: no answer within its lease", retry=True)
    _close_if_due(turn)
    turn.wake()


# ------------------------------------------------------------------------------------------ a collection closes


def _standing(turn: _Turn) -> Standing:
    state = turn.state
    if state.is_planned:
        return Standing(turn.at, state.opened, len(state.plan), len(state.taken), len(state.passed))
    return Standing(turn.at, state.opened, len(state.taken) + len(state.leases), len(state.taken), 0)


def _close_if_due(turn: _Turn) -> None:
    """Closes the open collection when the schedule says so, and goes on from there; else asks for more clients."""
    state = turn.state
    if state.phase not in _OPEN:
        return
    if _is_over(turn):
        mine = state.collection
        late = [r for r, lease in state.leases.items() if lease.task.collection == mine] if state.is_planned else ()
        turn.write(Closed(tuple(late)))
        _after_closing(turn)
    elif not state.is_planned:
        _refill(turn)
        if not turn.state.leases:  # nobody is at work and nobody can be asked: abandoned, for it has not its goal
            turn.write(Closed())
            _after_closing(turn)


def _is_over(turn: _Turn) -> bool:
    standing, schedule = _standing(turn), turn.rules.schedule
    if turn.state.phase is Phase.TRAINING:
        return schedule.closes(standing)
    due = _due(turn)
    return standing.outstanding <= 0 or (due is not None and turn.at >= due)


def _after_closing(turn: _Turn) -> None:
    state, needed = turn.state, turn.rules.schedule.minimum
    if state.phase is Phase.JUDGING:
        turn.do(Compute("judge", state.collection))
    elif state.phase is Phase.ENDING:
        _finish(turn, state.ending)
    elif len(state.taken) < needed:
        why = "; ".join(f"{client}: {reason}" for client, reason in list(state.left_out.items())[:3])
        turn.write(Abandoned(f"round {state.round_num}: {len(state.taken)} updates, the minimum is {needed}; {why}"))
        _try_again(turn)
    else:
        turn.do(Compute("update", state.collection))


def _try_again(turn: _Turn) -> None:
    """After an abandoned round: the same round number with a new collection."""
    if turn.state.abandoned >= turn.rules.schedule.patience:
        return _give_up(turn)
    return _open_round(turn)


# ------------------------------------------------------------------------------------------ computing and judging


def _computed(turn: _Turn, event: Computed) -> None:
    state = turn.state
    if event.collection != state.collection:
        return None
    if event.again:
        return _next_stage(turn, event.again)
    turn.write(Committed(state.version + 1, event.digest))
    turn.do(Publish(turn.state.version, event.digest))
    return _evaluate_or_judge(turn)


def _next_stage(turn: _Turn, plan: tuple[str, ...]) -> None:
    """A protocol of several stages asks those who are left once more."""
    if turn.is_async:
        return _finish(turn, "a protocol of several stages needs a synchronous schedule", failed=True)
    schedule, state = turn.rules.schedule, turn.state
    turn.write(TrainingOpened(turn.at, state.round_num, state.stage + 1, plan, schedule.block, schedule.lease))
    turn.wake()
    return _send_all(turn)


def _evaluate_or_judge(turn: _Turn) -> None:
    state, every = turn.state, turn.rules.evaluate_every
    if every and state.round_num % every == 0 and state.evaluated < state.version and state.population:
        _open_evaluation(turn, "validation")
    else:
        turn.do(Compute("judge", state.collection))


def _open_evaluation(turn: _Turn, part: EvaluatedRows) -> None:
    state = turn.state
    turn.write(EvaluationOpened(turn.at, state.version, part, state.population, turn.rules.schedule.lease))
    turn.wake()
    _send_all(turn)


def _compute_failed(turn: _Turn, event: ComputeFailed) -> None:
    if event.collection == turn.state.collection:
        _finish(turn, event.reason, failed=True)


def _judged(turn: _Turn, event: Judged) -> None:
    if event.version != turn.state.version:
        return
    if not event.reason:
        turn.write(WentOn(turn.state.version, event.log))
        _open_round(turn)
        return
    turn.write(Ended(event.reason, event.final or event.version, event.log))
    _test_or_finish(turn)


def _test_or_finish(turn: _Turn) -> None:
    if turn.rules.test and turn.state.population:
        _open_evaluation(turn, "test")
    else:
        _finish(turn, turn.state.ending)


# ------------------------------------------------------------------------------------------ ending and coming back


def _interrupt(turn: _Turn, event: Interrupted) -> None:
    _finish(turn, event.reason)


def _restart(turn: _Turn, event: Restarted) -> None:
    """Ask again for all effects that may have been lost; each of them is safe to happen twice."""
    state = turn.state
    if state.phase is Phase.IDLE:
        if state.collection or state.abandoned:
            _open_round(turn)
        return
    if state.stage and state.phase in (Phase.TRAINING, Phase.COMPUTING):
        turn.write(Abandoned("the coordinator restarted in the middle of a multi-stage protocol", counts=False))
        _open_round(turn)
        return
    if state.phase in (Phase.TRAINING, Phase.COMPUTING):
        turn.do(*(Fold(state.collection, p, state.taken[p]) for p in sorted(state.taken) if p < state.folded))
    elif state.phase in (Phase.JUDGING, Phase.EVALUATING):
        turn.do(Publish(state.version, state.digest))
    _go_on(turn, event)
    turn.do(*(Send(lease.task) for receipt, lease in state.leases.items() if _is_unsent(turn.state, receipt)))


def _is_unsent(state: State, receipt: str) -> bool:
    return receipt in state.leases and not _is_held(state, receipt)


def _go_on(turn: _Turn, event: Restarted) -> None:
    state = turn.state
    if state.phase in _OPEN:
        _tick(turn, event)
    elif state.phase is Phase.COMPUTING:
        turn.do(Compute("update", state.collection))
    elif state.phase is Phase.JUDGING:
        _evaluate_or_judge(turn)
    elif state.part == "test":
        _finish(turn, state.ending)
    else:
        _test_or_finish(turn)


def _finished_again(turn: _Turn, event: Restarted) -> None:  # noqa: ARG001  # a handler takes its event
    turn.do(Finish(turn.state.ending, turn.state.version, turn.state.failed))


_OPEN = frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.TESTING})

_ALWAYS: Mapping[type, Callable[[_Turn, Any], None]] = {
    Joined: _join,
    Left: _leave,
    Begin: _ignore,
    Reported: _report,
    Refused: _refuse,
    Failed: _fail,
    Ticked: _tick,
    Computed: _ignore,
    ComputeFailed: _ignore,
    Judged: _ignore,
    Interrupted: _interrupt,
    Restarted: _restart,
}
#: (phase, event) -> handler: complete, so that no event in any phase is an accident.
HANDLERS: Mapping[tuple[Phase, type], Callable[[_Turn, Any], None]] = {
    **{(phase, event): handler for phase in Phase for event, handler in _ALWAYS.items()},
    (Phase.IDLE, Begin): _begin,
    (Phase.COMPUTING, Computed): _computed,
    (Phase.COMPUTING, ComputeFailed): _compute_failed,
    (Phase.JUDGING, Judged): _judged,
    (Phase.JUDGING, ComputeFailed): _compute_failed,
    (Phase.DONE, Joined): _ignore,
    (Phase.DONE, Left): _ignore,
    (Phase.DONE, Ticked): _ignore,
    (Phase.DONE, Interrupted): _ignore,
    (Phase.DONE, Restarted): _finished_again,
}


def picture() -> str:
    """The transitions of `NEXT` as a Mermaid state diagram; records that change no phase are left out."""
    lines = ["stateDiagram-v2", "    [*] --> idle"]
    for (phase, record), to in NEXT.items():
        if phase is not to and record is not Finished:
            lines.append(f"    {phase.value} --> {to.value}: {record.__name__}")
    lines += ["    ending --> done: Finished", "    done --> [*]"]
    return "\n".join(lines)
