"""A toy protocol of three stages keeps the engine's hook for secure aggregation honest.

    advertise   each client draws a seed and says so
    masked      each client of those left sends its value plus a mask for every pair, modulo 2 ** 32
    unmask      each client of those left tells its seeds towards those who dropped out after `advertise`

The masks of a pair cancel; those of a client that dropped out are taken off by what the others tell. The server's side is
a generator, which the engine advances by `Computed(again=...)`; it cannot be saved, so a restart abandons the round.
Nothing here is secure: seeds are in the open.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import combinations, product

import pytest

from polyfed.core import events as ev
from polyfed.core import records as rec
from polyfed.core import seed
from polyfed.core.algorithm import Task
from polyfed.core.records import Phase, State, replay
from polyfed.core.round import Rules, step
from polyfed.core.schedule import Sync

M = 1 << 32
CLIENTS = ("a", "b", "c", "d", "e")
VALUES = dict(zip(CLIENTS, (3, 1 << 31, 77, M - 5, 123456), strict=True))
Replies = Mapping[str, dict[str, int]]


def pair_mask(mine: int, theirs: int) -> int:
    return seed.key("pair", min(mine, theirs), max(mine, theirs)) % M


def signed(client: str, other: str, mask: int) -> int:
    return mask if client < other else -mask


def server() -> Generator[tuple[str, ...], Replies, int]:
    """Yields whom to ask next, is sent what they answered, returns the sum of those who sent a masked value."""
    seeds = {client: reply["seed"] for client, reply in (yield CLIENTS).items()}
    masked = {client: reply["masked"] for client, reply in (yield tuple(seeds)).items()}
    told = yield tuple(masked)
    total = sum(masked.values())
    for gone in seeds.keys() - masked.keys():
        for client in masked:
            total -= signed(client, gone, pair_mask(seeds[client], seeds[gone]))
            assert told.get(client, {gone: seeds[gone]})[gone] == seeds[gone]
    return total % M


class Federation:
    """Five clients and a server; `drops` says who is lost at which stage. Messages are kept, as blobs are."""

    def __init__(self, drops: Mapping[int, tuple[str, ...]], *, minimum: int = 2) -> None:
        self.rules = Rules(Sync(minimum=minimum, patience=1), 0, 0, test=False)
        self.drops = drops
        self.state, self.journal = State(), list[rec.Record]()
        self.tasks: list[Task] = []
        self.compute: ev.Compute | None = None
        self.finish: ev.Finish | None = None
        self.stage = server()
        next(self.stage)
        self.seeds: dict[str, int] = {}
        self.drawn: list[int] = []
        self.left: dict[int, tuple[str, ...]] = {}
        self.replies: dict[str, dict[str, int]] = {}
        self.total: int | None = None
        for client in CLIENTS:
            self.handle(ev.Joined(0.0, client))
        self.handle(ev.Begin(0.0))

    def handle(self, event: ev.Event) -> None:
        self.state, actions = step(self.rules, self.state, event)
        for action in actions:
            if isinstance(action, ev.Persist):
                self.journal += action.records
            elif isinstance(action, ev.Send):
                self.tasks.append(action.task)
            elif isinstance(action, ev.Compute):
                self.compute = action
            elif isinstance(action, ev.Finish):
                self.finish = action

    def answer(self, task: Task) -> None:
        client, stage = task.client, task.stage
        if client in self.drops.get(stage, ()):
            self.handle(ev.Failed(1.0, client, task.receipt, "dropped out"))
            return
        if stage == 0:
            self.seeds[client] = seed.integer(client, task.number, "mask")
            self.drawn.append(self.seeds[client])
            reply = {"seed": self.seeds[client]}
        elif stage == 1:
            others = [other for other in self.left[0] if other != client]
            masks = (signed(client, other, pair_mask(self.seeds[client], self.seeds[other])) for other in others)
            reply = {"masked": (VALUES[client] + sum(masks)) % M}
        else:
            gone = [other for other in self.left[0] if other not in self.left[1]]
            reply = {other: self.seeds[other] for other in gone}
        self.replies[task.receipt] = reply
        self.handle(ev.Reported(1.0, client, task.receipt, f"blob of {task.receipt}"))

    def advance(self) -> None:
        """What the coordinator does with a `Compute`: the generator gets the stage's replies, in the plan's order."""
        assert self.compute is not None
        action, self.compute = self.compute, None
        taken = [taken for _, taken in sorted(self.state.taken.items())]
        self.left[self.state.stage] = tuple(t.client for t in taken)
        try:
            again = self.stage.send({t.client: self.replies[t.receipt] for t in taken})
        except StopIteration as end:
            self.total = end.value
            self.handle(ev.Computed(2.0, action.collection, f"sum {end.value}"))
        else:
            self.handle(ev.Computed(2.0, action.collection, again=again))

    def turn(self) -> None:
        """One thing that is due."""
        if self.tasks:
            self.answer(self.tasks.pop(0))
        else:
            self.advance()

    def restart(self) -> None:
        self.state = replay([rec.decode(rec.encode(record)) for record in self.journal])
        self.tasks, self.compute, self.left = [], None, {}
        self.stage = server()
        next(self.stage)
        self.handle(ev.Restarted(1.5))

    def run(self) -> Federation:
        while self.total is None and self.finish is None:
            self.turn()
        return self


def plain(drops: Mapping[int, tuple[str, ...]]) -> int:
    left = [c for c in CLIENTS if c not in (*drops.get(0, ()), *drops.get(1, ()))]
    return sum(VALUES[client] for client in left) % M


ONE_EACH = [
    {stage: (client,) for stage, client in enumerate(chosen) if client}
    for chosen in product(("", "a"), ("", "b", "e"), ("", "c"))
]
SEVERAL = [{stage: pair} for stage in range(3) for pair in combinations(CLIENTS, 2)]


@pytest.mark.parametrize("drops", [*ONE_EACH, *SEVERAL], ids=str)
def test_the_sum_when_clients_drop_out_is_that_of_those_who_sent_a_value(drops: Mapping[int, tuple[str, ...]]) -> None:
    federation = Federation(drops).run()
    assert federation.total == plain(drops)
    assert federation.state.version == 1
    assert federation.state.digest == f"sum {federation.total}"
    assert replay(federation.journal).to_bytes() == federation.state.to_bytes()
    assert set(federation.state.left_out) == {client for gone in drops.values() for client in gone}


def test_no_masked_value_is_a_clients_own() -> None:
    federation = Federation({}).run()
    masked = [reply["masked"] for reply in federation.replies.values() if "masked" in reply]
    assert len(masked) == 5
    assert not set(masked) & set(VALUES.values())
    assert sum(masked) % M == plain({})


def test_a_protocol_when_the_coordinator_restarts_at_any_turn_begins_again_with_fresh_masks() -> None:
    drops = {1: ("b",), 2: ("d",)}
    turns = 0
    undisturbed = Federation(drops)
    while undisturbed.total is None:
        undisturbed.turn()
        turns += 1
    for at in range(turns):
        federation = Federation(drops)
        for _ in range(at):
            federation.turn()
        before, stage, phase = list(federation.drawn), federation.state.stage, federation.state.phase
        federation.restart()
        federation.run()
        assert federation.total == plain(drops), f"restarted after {at} turns"
        fresh = federation.drawn[len(before) :]
        if stage and phase in (Phase.TRAINING, Phase.COMPUTING):
            assert len(fresh) == 5
            assert not set(fresh) & set(before), "a mask that is used twice gives the difference of two values away"
        assert federation.state.abandoned == 0
        assert replay(federation.journal).to_bytes() == federation.state.to_bytes()


@pytest.mark.parametrize("stage", range(3))
def test_a_protocol_when_too_few_are_left_at_a_stage_ends_in_a_sentence(stage: int) -> None:
    federation = Federation({stage: ("a", "b", "c")}, minimum=3).run()
    assert federation.total is None
    assert federation.finish is not None
    assert federation.finish.reason == "no quorum: 1 rounds in a row had fewer than 3 updates"


def test_a_sum_when_the_masks_of_a_client_that_dropped_out_stay_is_wrong() -> None:
    """The negative control: without the third stage the sum is not that of the survivors."""
    federation = Federation({1: ("b",)}).run()
    masked = [reply["masked"] for reply in federation.replies.values() if "masked" in reply]
    assert sum(masked) % M != plain({1: ("b",)})
