"""The round engine under simulated faults: no violation, exhaustive crashes, and planted bugs that must be found."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import engine_simulation as simulation
import pytest
from engine_simulation import FOR_EVER, Scenario, World, scenario, simulate, tally

from polyfed.core import events as ev
from polyfed.core import records as rec
from polyfed.core import round as engine
from polyfed.core.errors import CorruptError
from polyfed.core.memory import ClientMemory
from polyfed.core.records import ACCEPTED, Phase
from polyfed.core.round import Rules
from polyfed.core.schedule import Buffered, Sync

# ---------------------------------------------------------------------------------------- no violation


def test_ten_thousand_faulted_rounds_when_simulated_break_no_invariant() -> None:
    found = tally(range(FOR_EVER), 10_000)
    assert not found.violations
    assert found.rounds >= 10_000
    assert found.crashes > 1_000


@pytest.mark.heavy
def test_two_hundred_thousand_faulted_rounds_when_simulated_break_no_invariant() -> None:
    script = [sys.executable, str(Path(simulation.__file__))]
    halves = [
        subprocess.Popen([*script, str(first), "100000"], stdout=subprocess.PIPE, text=True)
        for first in (10**6, 2 * 10**6)
    ]
    said = [half.communicate()[0] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], said


def test_a_step_when_repeated_is_the_same_and_the_journal_gives_its_state_every_time() -> None:
    for seed in range(30):
        simulate(seed, slow=True)


def test_a_seed_when_run_again_gives_the_same_journal() -> None:
    for seed in range(12):
        assert simulate(seed).disk.data == simulate(seed).disk.data


def test_the_scenarios_when_run_reach_everything_that_they_are_made_for() -> None:
    written: Counter[type] = Counter()
    said: Counter[str] = Counter()
    for seed in range(250):
        world = World(scenario(seed), seed)
        world.steps = []
        world.run()
        for _, actions in world.steps:
            for action in actions:
                if isinstance(action, ev.Persist):
                    written.update(type(record) for record in action.records)
                if isinstance(action, ev.Receipt):
                    said[action.verdict.split(":")[0]] += 1
    assert set(written) == set(rec._APPLY), "a record that is never written is not tested"
    assert {"accepted", "expired", "refused", "late", "stale", "lost", "left the federation"} <= set(said), said


# ---------------------------------------------------------------------------------------- every crash there is

QUIET = {
    "sync": Scenario(Rules(Sync(), 1, 1, True), clients=3, rounds=2, polls=False),
    "goal": Scenario(Rules(Sync(goal=2, deadline_seconds=30.0), 1, 0, False), clients=3, rounds=2, polls=False),
    "stages": Scenario(Rules(Sync(), 1, 2, False), clients=3, rounds=2, stages=3, polls=False),
    "buffered": Scenario(Rules(Buffered(3, 2, max_lag=2), 1, 2, True), clients=4, rounds=3, polls=False),
}
FAULTS = [
    ("full", 0.0),
    ("before", 0.0),
    *(("torn", where) for where in (0.02, 0.05, 0.1, 0.15, 0.3, 0.6, 0.9, 0.999)),
    *(("zeros", where) for where in (0.0, 0.5, 0.999)),
    ("after", 0.0),
]


@pytest.mark.parametrize("kind", QUIET)
def test_a_run_when_the_coordinator_crashes_at_any_journal_write_ends_as_without_it(kind: str) -> None:
    quiet = QUIET[kind]
    undisturbed = World(quiet).run()
    for fault in FAULTS:
        for write in range(undisturbed.disk.num_writes):
            world = World(replace(quiet, writes={write: fault})).run()
            assert world.num_crashes == (fault[0] != "full"), f"{fault} at write {write} has not come"
            if kind == "sync":
                assert world.models == undisturbed.models, f"other bits after {fault} at write {write}"


def test_a_run_when_it_crashes_at_every_single_write_ends_as_without_it() -> None:
    undisturbed = World(QUIET["sync"]).run()
    world = World(replace(QUIET["sync"], writes=dict.fromkeys(range(500), ("after", 0.0)))).run()
    assert world.num_crashes >= undisturbed.disk.num_writes
    assert world.models == undisturbed.models


# ---------------------------------------------------------------------------------------- planted bugs

Plant = Callable[[pytest.MonkeyPatch], None]
BUGS: dict[str, Plant] = {}


def bug(plant: Plant) -> Plant:
    BUGS[plant.__name__] = plant
    return plant


def _patch_apply(patch: pytest.MonkeyPatch, kind: type, change: Callable[..., dict[str, object]]) -> None:
    """What a record changes is changed once more: `change(state, record, changes)` gives fields to replace."""
    right = rec._APPLY[kind]
    patch.setitem(rec._APPLY, kind, lambda s, r: {**(c := right(s, r)), **change(s, r, c)})


def _all_phases(patch: pytest.MonkeyPatch, event: type, handler: Callable[..., None]) -> None:
    for phase in Phase:
        if engine.HANDLERS[phase, event] is not engine._ignore:
            patch.setitem(engine.HANDLERS, (phase, event), handler)


@bug
def an_accepted_task_stays_open(patch: pytest.MonkeyPatch) -> None:
    _patch_apply(patch, rec.Accepted, lambda s, r, c: {"leases": s.leases})


@bug
def a_stale_update_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "_drop_if_stale", lambda turn, receipt, lease: False)


@bug
def a_held_update_counts_though_stale(patch: pytest.MonkeyPatch) -> None:
    def take_up(turn, held):
        for receipt, digest in held:
            engine._accept(turn, receipt, digest)
        engine._close_if_due(turn)

    patch.setattr(engine, "_take_up", take_up)


@bug
def another_clients_receipt_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "_lease", lambda turn, event: turn.state.leases.get(event.receipt))


@bug
def a_late_update_counts_in_the_next_round(patch: pytest.MonkeyPatch) -> None:
    _patch_apply(patch, rec.Closed, lambda s, r, c: {"leases": s.leases})
    _patch_apply(patch, rec.TrainingOpened, lambda s, r, c: {"leases": {**s.leases, **c["leases"]}})


@bug
def a_version_is_published_before_it_is_durable(patch: pytest.MonkeyPatch) -> None:
    right = engine._Turn.actions.fget
    patch.setattr(
        engine._Turn, "actions", property(lambda t: sorted(right(t), key=lambda a: not isinstance(a, ev.Publish)))
    )


@bug
def an_update_is_acknowledged_before_it_is_durable(patch: pytest.MonkeyPatch) -> None:
    right = engine._Turn.actions.fget
    patch.setattr(
        engine._Turn, "actions", property(lambda t: sorted(right(t), key=lambda a: not isinstance(a, ev.Receipt)))
    )


@bug
def nothing_is_written_for_an_accepted_update(patch: pytest.MonkeyPatch) -> None:
    def write(self, record):
        self.state = rec.apply(self.state, record)
        if type(record) is not rec.Accepted:
            self.records.append(record)

    patch.setattr(engine._Turn, "write", write)


@bug
def verdicts_are_forgotten_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rec.State, "verdict", lambda self, client, receipt: "")


@bug
def verdicts_are_forgotten_with_their_collection(patch: pytest.MonkeyPatch) -> None:
    for kind in (rec.TrainingOpened, rec.EvaluationOpened):
        _patch_apply(patch, kind, lambda s, r, c: {"older": ()})
    patch.setattr(rec, "_settled", lambda state: {})


@bug
def the_newest_accepted_receipt_is_forgotten_in_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rec, "REMEMBERED", 1)
    patch.setattr(rec, "_settled", lambda state: {})


@bug
def a_dropped_update_is_called_accepted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "EXPIRED", ACCEPTED)


@bug
def updates_are_folded_as_they_arrive(patch: pytest.MonkeyPatch) -> None:
    def write(self, record):
        self.state = rec.apply(self.state, record)
        self.records.append(record)
        if type(record) is rec.Accepted and self.state.phase is Phase.TRAINING:
            self.effects.append(ev.Fold(self.state.collection, record.position, self.state.taken[record.position]))

    patch.setattr(engine._Turn, "write", write)


@bug
def a_position_is_passed_over(patch: pytest.MonkeyPatch) -> None:
    right = rec._folded
    patch.setattr(rec, "_folded", lambda at, taken, passed: right(at + (at == 1 and len(taken) > 2), taken, passed))


@bug
def closing_does_not_fold_what_waited(patch: pytest.MonkeyPatch) -> None:
    _patch_apply(patch, rec.Closed, lambda s, r, c: {"folded": s.folded})


@bug
def a_restart_does_not_fold_again(patch: pytest.MonkeyPatch) -> None:
    def restart(turn, event):
        right(turn, event)
        turn.effects = [effect for effect in turn.effects if not isinstance(effect, ev.Fold)]

    right = engine._restart
    _all_phases(patch, ev.Restarted, restart)


@bug
def a_restart_does_not_send_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "_is_unsent", lambda state, receipt: False)


@bug
def a_restart_does_not_compute_again(patch: pytest.MonkeyPatch) -> None:
    def restart(turn, event):
        right(turn, event)
        turn.effects = [effect for effect in turn.effects if not isinstance(effect, ev.Compute)]

    right = engine._restart
    _all_phases(patch, ev.Restarted, restart)


@bug
def the_quorum_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def after(turn):
        state = turn.state
        if state.phase is Phase.COMPUTING and len(state.taken) == turn.rules.schedule.minimum - 1:
            turn.do(ev.Compute("update", state.collection))
        else:
            right(turn)

    right = engine._after_closing
    patch.setattr(engine, "_after_closing", after)


@bug
def a_retry_has_a_new_number(patch: pytest.MonkeyPatch) -> None:
    right = engine._hand_out
    patch.setattr(
        engine, "_hand_out", lambda turn, c, position, n, attempt: right(turn, c, position, n + (attempt > 0), attempt)
    )


@bug
def a_round_that_is_tried_again_repeats_its_numbers(patch: pytest.MonkeyPatch) -> None:
    _patch_apply(patch, rec.TrainingOpened, lambda s, r, c: {"numbers": s.numbers})


@bug
def a_client_that_joins_twice_is_two(patch: pytest.MonkeyPatch) -> None:
    _all_phases(patch, ev.Joined, lambda turn, event: turn.write(rec.Enrolled(event.client)))


@bug
def an_old_computation_is_committed(patch: pytest.MonkeyPatch) -> None:
    def computed(turn, event):
        right(turn, replace(event, collection=turn.state.collection))

    right = engine._computed
    patch.setitem(engine.HANDLERS, (Phase.COMPUTING, ev.Computed), computed)


@bug
def an_old_judgement_ends_the_run(patch: pytest.MonkeyPatch) -> None:
    def judged(turn, event):
        right(turn, replace(event, version=turn.state.version))

    right = engine._judged
    patch.setitem(engine.HANDLERS, (Phase.JUDGING, ev.Judged), judged)


@bug
def a_version_is_committed_twice(patch: pytest.MonkeyPatch) -> None:
    _patch_apply(patch, rec.Committed, lambda s, r, c: {"version": s.version})


@bug
def a_lease_never_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "until", lambda at, lease: None)
    patch.setattr(rec, "until", lambda at, lease: None)


@bug
def nobody_is_woken_at_the_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "_nearest", lambda turn: None)
    patch.setitem(engine.HANDLERS, (Phase.TRAINING, ev.Ticked), engine._ignore)


@bug
def a_held_update_is_lost_when_its_client_leaves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "_is_held", lambda state, receipt: False)


@bug
def a_torn_record_is_read(patch: pytest.MonkeyPatch) -> None:
    def scan(data):
        records, end, check = right(data)
        rest = data[end + 16 :]
        return ([*records, rest] if rest else records), len(data) if rest else end, check

    right = simulation.scan
    patch.setattr(simulation, "scan", scan)


@bug
def a_client_counts_a_task_that_came_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClientMemory, "is_old", lambda self, receipt: False)


@bug
def a_client_keeps_what_was_refused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ClientMemory, "refuse", ClientMemory.accept)


@bug
def a_client_keeps_what_it_has_not_been_told_of(patch: pytest.MonkeyPatch) -> None:
    right = ClientMemory.propose

    def propose(self, receipt, memory):
        right(self, receipt, memory)
        self._committed[self.receipt] = memory

    patch.setattr(ClientMemory, "propose", propose)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_when_simulated_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name](monkeypatch)
    assert tally(range(400), stop_at=1).violations, f"{name} was not found in 400 seeds"


def test_a_torn_journal_when_its_damage_is_not_at_its_end_is_refused() -> None:
    data = simulate(4).disk.data
    for at in range(40, len(data) - 600, 97):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(CorruptError):
            simulation.scan(bytes(damaged))
