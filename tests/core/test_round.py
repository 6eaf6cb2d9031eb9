"""The round engine, event by event: for a sequence of events the actions are compared with the list of those expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest

from polyfed.core import round as engine
from polyfed.core.algorithm import Task
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
    LATE,
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
    Phase,
    Record,
    State,
    Taken,
    TrainingOpened,
    WentOn,
    replay,
)
from polyfed.core.round import EXPIRED, NOT_YOURS, Rules, picture, step
from polyfed.core.schedule import Buffered, Schedule, Sync
from polyfed.core.select import Uniform

LOST = "lost: no answer within its lease"


class Play:
    """The engine under a sequence of events; `told` holds what the last one brought, records and effects apart."""

    seen: ClassVar[set[tuple[Phase, type]]] = set()
    written: ClassVar[set[tuple[Phase, type]]] = set()

    def __init__(
        self, schedule: Schedule | None = None, clients: str = "abc", *, evaluate: int = 0, test: bool = False
    ) -> None:
        self.rules = Rules(schedule or Sync(), 0, evaluate, test)
        self.state, self.records = State(), list[Record]()
        for client in clients:
            self(Joined(0.0, client))
        self.told = self(Begin(0.0, "m0"))

    def __call__(self, event: Event) -> list[Action]:
        Play.seen.add((self.state.phase, type(event)))
        before = self.state
        self.state, actions = step(self.rules, before, event)
        again = step(self.rules, before, event)
        assert again == (self.state, actions), "step is pure"
        self.told = list(actions)
        if self.told and isinstance(self.told[0], Persist):
            for record in self.told[0].records:
                Play.written.add((replay(self.records).phase, type(record)))
                self.records.append(record)
        assert replay(self.records).to_bytes() == self.state.to_bytes(), "the records make the state"
        return self.told

    @property
    def news(self) -> tuple[Record, ...]:
        return self.told[0].records if self.told and isinstance(self.told[0], Persist) else ()

    @property
    def effects(self) -> list[Action]:
        return [action for action in self.told if not isinstance(action, Persist)]

    def report(self, *receipts: str, at: float = 1.0) -> list[Action]:
        for receipt in receipts:
            self(Reported(at, self.state.leases[receipt].task.client, receipt, f"u{receipt}"))
        return self.told

    def compute(self, *, at: float = 2.0) -> list[Action]:
        return self(Computed(at, self.state.collection, f"m{self.state.version + 1}"))

    def judge(self, reason: str = "", *, at: float = 3.0, final: int = 0) -> list[Action]:
        return self(Judged(at, self.state.version, reason, final, "log"))

    @property
    def out(self) -> dict[str, str]:
        """receipt -> client of everything that is out."""
        return {receipt: lease.task.client for receipt, lease in self.state.leases.items()}


def train(client: str, position: int, *, collection: int = 1, round_num: int = 1, number: int = 0, **other) -> Task:
    return Task("train", client, round_num, round_num - 1, collection, 0, position, number, **other)


def taken(client: str, receipt: str, lag: int = 0) -> Taken:
    return Taken(client, receipt, f"u{receipt}", lag)


# ---------------------------------------------------------------------------------------- a round from end to end


def test_a_round_when_nothing_goes_wrong_is_this_and_nothing_else() -> None:
    play = Play(clients="ab")
    assert play.told == [
        Persist((Initial("m0"), TrainingOpened(0.0, 1, 0, ("a", "b"), 16, None))),
        Send(train("a", 0)),
        Send(train("b", 1)),
    ]
    assert play.report("1.1.0") == [
        Persist((Accepted("1.1.0", 1, "u1.1.0", 0),)),
        Receipt("b", "1.1.0", ACCEPTED),
    ]
    assert play.report("1.0.0") == [
        Persist((Accepted("1.0.0", 0, "u1.0.0", 0), Closed(()))),
        Fold(1, 0, taken("a", "1.0.0")),
        Fold(1, 1, taken("b", "1.1.0")),
        Receipt("a", "1.0.0", ACCEPTED),
        Compute("update", 1),
    ]
    assert play.compute() == [Persist((Committed(1, "m1"),)), Publish(1, "m1"), Compute("judge", 1)]
    assert play.judge() == [
        Persist((WentOn(1, "log"), TrainingOpened(3.0, 2, 0, ("a", "b"), 16, None))),
        Send(train("a", 0, collection=2, round_num=2, number=1)),
        Send(train("b", 1, collection=2, round_num=2, number=1)),
    ]
    play.report("2.0.0", "2.1.0")
    play.compute()
    assert play.judge("enough") == [
        Persist((Ended("enough", 2, "log"), Finished("enough", 2))),
        Finish("enough", 2),
    ]


def test_a_run_with_evaluation_and_test_reads_the_rows_it_should() -> None:
    play = Play(clients="ab", evaluate=2, test=True)
    play.report("1.0.0", "1.1.0")
    play.compute()
    assert play.effects == [Publish(1, "m1"), Compute("judge", 1)], "round 1 is not evaluated"
    play.judge()
    play.report("2.0.0", "2.1.0")
    assert play.compute() == [
        Persist((Committed(2, "m2"), EvaluationOpened(2.0, 2, "validation", ("a", "b"), None))),
        Publish(2, "m2"),
        Send(Task("evaluate", "a", 2, 2, 3, 0, 0, 2)),
        Send(Task("evaluate", "b", 2, 2, 3, 0, 1, 2)),
    ]
    play.report("3.0.0")
    assert play.effects == [Receipt("a", "3.0.0", ACCEPTED)], "an evaluation is not folded"
    play.report("3.1.0")
    assert play.effects == [Receipt("b", "3.1.0", ACCEPTED), Compute("judge", 3)]
    play.judge("enough")
    assert play.effects == [
        Send(Task("evaluate", "a", 2, 2, 4, 0, 0, 2, part="test")),
        Send(Task("evaluate", "b", 2, 2, 4, 0, 1, 2, part="test")),
    ]
    play.report("4.0.0", "4.1.0")
    assert play.effects == [Receipt("b", "4.1.0", ACCEPTED), Finish("enough", 2)]
    assert play.state.numbers == {"a": 2, "b": 2}, "evaluations do not count as training tasks"


def test_a_run_when_it_rolls_back_tests_and_ends_with_the_earlier_version() -> None:
    play = Play(clients="a", test=True)
    for round_num in (1, 2):
        play.report(f"{round_num}.0.0")
        play.compute()
        play.judge(*(["no improvement"] if round_num == 2 else []), final=1 if round_num == 2 else 0)
    assert play.news == (Ended("no improvement", 1, "log"), EvaluationOpened(3.0, 1, "test", ("a",), None))
    assert play.effects == [Send(Task("evaluate", "a", 2, 1, 3, 0, 0, 1, part="test"))]
    play.report("3.0.0")
    assert play.effects[-1] == Finish("no improvement", 1)


# ---------------------------------------------------------------------------------------- synchronous rounds


def test_a_round_when_its_goal_is_reached_closes_and_the_others_are_late() -> None:
    play = Play(Sync(goal=2), "abcd")
    play.report("1.3.0")
    assert play.effects == [Receipt("d", "1.3.0", ACCEPTED)], "position 3 waits for 0 to 2"
    play.report("1.1.0")
    assert play.news == (Accepted("1.1.0", 1, "u1.1.0"), Closed(("1.0.0", "1.2.0")))
    assert play.effects == [
        Receipt("b", "1.1.0", ACCEPTED),
        Fold(1, 1, taken("b", "1.1.0")),
        Fold(1, 3, taken("d", "1.3.0")),
        Compute("update", 1),
    ]
    assert play(Reported(1.5, "a", "1.0.0", "u")) == [Receipt("a", "1.0.0", LATE)]
    assert play.state.left_out == {"a": LATE, "c": LATE}


def test_a_round_when_its_deadline_comes_closes_with_its_minimum() -> None:
    play = Play(Sync(minimum=2, deadline_seconds=10.0))
    assert play.effects[-1] == WakeAt(10.0)
    play.report("1.0.0", "1.2.0")
    assert play(Ticked(9.0)) == [WakeAt(10.0)]
    play(Ticked(10.0))
    assert play.news == (Closed(("1.1.0",)),)
    assert play.effects == [Fold(1, 2, taken("c", "1.2.0")), Compute("update", 1)]


def test_the_test_rows_are_waited_for_though_a_round_has_a_deadline() -> None:
    play = Play(Sync(deadline_seconds=10.0), clients="ab", test=True)
    play.report("1.0.0", "1.1.0")
    play.compute()
    play.judge("enough")
    play.report("2.0.0")
    assert play(Ticked(1000.0)) == []
    assert play.out == {"2.1.0": "b"}
    assert play.report("2.1.0")[-1] == Finish("enough", 1)


def test_a_round_when_it_stays_below_its_minimum_is_tried_again_under_its_number() -> None:
    play = Play(Sync(minimum=2, deadline_seconds=10.0, patience=2))
    play.report("1.0.0")
    play(Ticked(10.0))
    assert play.news == (
        Closed(("1.1.0", "1.2.0")),
        Abandoned(f"round 1: 1 updates, the minimum is 2; b: {LATE}; c: {LATE}"),
        TrainingOpened(10.0, 1, 0, ("a", "b", "c"), 16, None),
    )
    assert play.effects == [
        *(Send(train(c, p, collection=2, number=1)) for p, c in enumerate("abc")),
        WakeAt(20.0),
    ], "another collection, other task numbers: no seed is used twice"
    play(Ticked(20.0))
    reason = "no quorum: 2 rounds in a row had fewer than 2 updates"
    assert play.news[-1] == Finished(reason, 0, failed=True)
    assert play.effects == [Finish(reason, 0, failed=True)]


def test_an_abandoned_round_when_its_cohort_is_drawn_is_drawn_anew() -> None:
    clients = "abcdefghij"
    play = Play(Sync(select=Uniform(4), deadline_seconds=1.0, patience=50), clients)
    cohorts = []
    for number in range(1, 12):
        cohorts.append(play.state.plan)
        play(Ticked(float(number)))
    assert play.state.abandoned == 11
    assert len(set(cohorts)) > 8
    assert Play(Sync(select=Uniform(4)), clients).state.plan == cohorts[0]


def test_a_version_when_committed_restores_patience() -> None:
    play = Play(Sync(minimum=2, deadline_seconds=10.0, patience=2))
    play(Ticked(10.0))
    play.report("2.0.0", "2.1.0", "2.2.0", at=11.0)
    play.compute(at=12.0)
    play.judge(at=13.0)
    play(Ticked(23.0))
    assert play.state.phase is Phase.TRAINING
    assert play.state.abandoned == 1


def test_a_run_when_nobody_has_joined_ends_at_once_in_a_sentence() -> None:
    play = Play(clients="")
    assert [type(record) for record in play.news] == [Initial, Abandoned, Abandoned, Abandoned, Finished]
    assert play.effects == [Finish("no quorum: 3 rounds in a row had fewer than 1 updates", 0, failed=True)]


def test_a_lost_task_is_handed_out_again_with_its_number_as_often_as_it_may_be() -> None:
    play = Play(Sync(lease=5.0, attempts=2), "ab")
    assert play.effects[-1] == WakeAt(5.0)
    play.report("1.0.0", at=3.0)
    assert play(Ticked(5.0)) == [
        Persist((HandedOut("b", 1, 0, 1, 10.0),)),
        Send(train("b", 1, attempt=1)),
        WakeAt(10.0),
    ]
    assert play(Reported(6.0, "b", "1.1.0", "u")) == [Receipt("b", "1.1.0", EXPIRED)], "the first attempt is over"
    play(Ticked(10.0))
    assert play.news == (Dropped("1.1.1", LOST), Closed(()))
    assert play.effects == [Receipt("b", "1.1.1", LOST), Compute("update", 1)]


def test_a_failure_when_the_clients_own_code_raised_is_not_tried_again() -> None:
    play = Play(Sync(attempts=3), "ab")
    play(Failed(1.0, "a", "1.0.0", "worker died", retry=True))
    assert play.effects == [Send(train("a", 0, attempt=1))]
    play(Failed(1.0, "a", "1.0.1", "ValueError: no rows"))
    assert play.effects == [Receipt("a", "1.0.1", "ValueError: no rows")]
    assert play.state.left_out == {"a": "ValueError: no rows"}
    play.report("1.1.0")
    assert play.effects[:1] == [Fold(1, 1, taken("b", "1.1.0"))], "a position that is passed over holds nobody up"


def test_a_receipt_when_it_was_lost_is_told_again_and_counts_once() -> None:
    play = Play()
    play.report("1.0.0")
    for _ in range(3):
        assert play(Reported(2.0, "a", "1.0.0", "other")) == [Receipt("a", "1.0.0", ACCEPTED)]
    assert play(Refused(2.0, "a", "1.0.0", "not finite")) == [Receipt("a", "1.0.0", ACCEPTED)]
    assert play.state.taken == {0: taken("a", "1.0.0")}


def test_an_upload_when_it_is_for_another_clients_task_is_refused_and_changes_nothing() -> None:
    play = Play()
    assert play(Reported(1.0, "b", "1.0.0", "u")) == [Receipt("b", "1.0.0", NOT_YOURS)]
    assert play(Refused(1.0, "b", "1.0.0", "bad")) == [Receipt("b", "1.0.0", NOT_YOURS)]
    assert play(Failed(1.0, "b", "1.0.0", "bad")) == []
    assert play(Reported(1.0, "stranger", "7.0.0", "u")) == [Receipt("stranger", "7.0.0", EXPIRED)]
    play.report("1.0.0")
    assert play(Reported(1.0, "b", "1.0.0", "u")) == [Receipt("b", "1.0.0", EXPIRED)], "another's verdict is not told"


def test_an_upload_when_it_was_refused_leaves_its_client_out_and_says_why() -> None:
    play = Play(clients="ab")
    play(Refused(1.0, "a", "1.0.0", "params/w: not finite"))
    assert play.told == [
        Persist((Dropped("1.0.0", "params/w: not finite"),)),
        Receipt("a", "1.0.0", "params/w: not finite"),
    ]
    assert play(Reported(1.0, "a", "1.0.0", "u")) == [Receipt("a", "1.0.0", "params/w: not finite")]


def test_a_client_when_it_leaves_is_passed_over_and_when_it_joins_waits_for_the_next_round() -> None:
    play = Play(clients="abc")
    play(Left(1.0, "b"))
    assert play.told == [
        Persist((Gone("b"), Dropped("1.1.0", "left the federation"))),
        Receipt("b", "1.1.0", "left the federation"),
    ]
    assert play(Left(1.0, "b")) == []
    assert play(Joined(1.0, "d")) == [Persist((Enrolled("d"),))]
    assert play(Joined(1.0, "d")) == []
    play.report("1.0.0", "1.2.0")
    play.compute()
    play.judge()
    assert play.state.plan == ("a", "c", "d")


def test_a_round_when_the_last_one_outstanding_leaves_closes() -> None:
    play = Play(clients="ab")
    play.report("1.0.0")
    play(Left(1.0, "b"))
    assert play.effects[-1] == Compute("update", 1)


# ---------------------------------------------------------------------------------------- computing


def test_an_answer_when_it_is_for_an_earlier_collection_or_version_is_passed_over() -> None:
    play = Play(clients="a")
    play.report("1.0.0")
    for collection in (0, 2):
        assert play(Computed(2.0, collection, "m")) == []
        assert play(ComputeFailed(2.0, collection, "no")) == []
    play.compute()
    for version in (0, 2):
        assert play(Judged(3.0, version, "over")) == []
    assert play(ComputeFailed(3.0, 7, "no")) == []
    assert play(Computed(3.0, 1, "m1")) == [], "the second of two computations"


@pytest.mark.parametrize("judging", [False, True])
def test_a_run_when_the_servers_own_code_raised_has_failed(judging: bool) -> None:
    play = Play(clients="a")
    play.report("1.0.0")
    if judging:
        play.compute()
    play(ComputeFailed(2.0, 1, "ZeroDivisionError"))
    assert play.effects == [Finish("ZeroDivisionError", int(judging), failed=True)]


def test_a_protocol_of_several_stages_asks_those_who_are_left() -> None:
    play = Play(Sync(lease=9.0), "abc")
    play(Failed(1.0, "b", "1.1.0", "died"))
    play.report("1.0.0", "1.2.0")
    assert play(Computed(2.0, 1, again=("a", "c"))) == [
        Persist((TrainingOpened(2.0, 1, 1, ("a", "c"), 16, 9.0),)),
        Send(Task("query", "a", 1, 0, 2, 1, 0, 1)),
        Send(Task("query", "c", 1, 0, 2, 1, 1, 1)),
        WakeAt(11.0),
    ]
    assert play.state.left_out == {"b": "died"}
    play.report("2.0.0", "2.1.0")
    play.compute()
    assert play.state.version == 1


def test_a_protocol_of_several_stages_when_asynchronous_ends_the_run_in_a_sentence() -> None:
    play = Play(Buffered(1, 1), "a")
    play.report("1.0.0")
    play(Computed(2.0, 1, again=("a",)))
    assert play.effects == [Finish("a protocol of several stages needs a synchronous schedule", 0, failed=True)]


# ---------------------------------------------------------------------------------------- asynchronous rounds


def test_buffered_when_it_opens_hands_out_its_concurrency_in_a_seeded_order() -> None:
    play = Play(Buffered(concurrency=2, goal=2), "abcd")
    assert len(play.out) == 2
    first, second = play.out.values()
    assert play.news[1:] == (
        TrainingOpened(0.0, 1, 0, (), 16, None),
        HandedOut(first, 0, 0, 0),
        HandedOut(second, 1, 0, 0),
    )
    assert play.effects == [Send(train(first, 0)), Send(train(second, 1))]
    orders = set()
    for run_seed in range(30):
        rules, state = replace(play.rules, seed=run_seed), replay(play.records[:4])
        orders.add(tuple(a.task.client for a in step(rules, state, Begin(0.0))[1] if isinstance(a, Send)))
    assert len(orders) > 6


def test_buffered_when_an_update_comes_keeps_its_concurrency_and_at_its_goal_closes_without_handing_out() -> None:
    play = Play(Buffered(concurrency=2, goal=2), "abc")
    first, second = play.out
    client, other = play.out[first], play.out[second]
    play.report(second)
    assert play.news[0] == Accepted(second, 0, f"u{second}"), "positions follow the order of acceptance"
    assert play.effects[:2] == [Fold(1, 0, taken(other, second)), Receipt(other, second, ACCEPTED)]
    assert len(play.out) == 2
    play.report(first)
    assert play.news == (Accepted(first, 1, f"u{first}"), Closed(()))
    assert play.effects == [Fold(1, 1, taken(client, first)), Receipt(client, first, ACCEPTED), Compute("update", 1)]
    assert len(play.out) == 1, "who works goes on; nobody starts from a version that is about to be old"


def test_buffered_when_an_update_comes_while_a_version_is_made_holds_it_for_the_next_buffer() -> None:
    play = Play(Buffered(concurrency=3, goal=1, max_lag=2), "abc")
    one, two, three = play.out
    held_client = play.out[two]
    play.report(one)
    assert play.report(two) == [Persist((Held(two, f"u{two}"),))], "nothing is told until it counts"
    for again in (Reported(2.0, held_client, two, "u"), Refused(2.0, held_client, two, "bad")):
        assert play(again) == []
    assert play(Failed(2.0, held_client, two, "died", retry=True)) == []
    play(Left(2.0, held_client))
    assert play.news == (Gone(held_client),), "what has come in counts though its client left"
    play.compute()
    play.judge()
    assert play.news[1:] == (
        TrainingOpened(3.0, 2, 0, (), 16, None),
        Accepted(two, 0, f"u{two}", 1),
        Closed(()),
    )
    assert play.effects == [
        Fold(2, 0, taken(held_client, two, 1)),
        Receipt(held_client, two, ACCEPTED),
        Compute("update", 2),
    ]
    assert three in play.out


def test_buffered_when_more_is_held_than_a_buffer_takes_holds_the_rest_again() -> None:
    play = Play(Buffered(concurrency=3, goal=1, max_lag=5), "abc")
    one, two, three = play.out
    play.report(one, two, three)
    play.compute()
    play.judge()
    assert play.news[2:] == (Accepted(two, 0, f"u{two}", 1), Closed(()), Held(three, f"u{three}"))
    play.compute()
    play.judge()
    assert play.news[2] == Accepted(three, 0, f"u{three}", 2)


def test_buffered_when_an_update_lags_too_far_drops_it() -> None:
    play = Play(Buffered(concurrency=2, goal=1, max_lag=1), "ab")
    fast, slow = play.out
    client = play.out[slow]
    play.report(fast)
    play.compute()
    play.judge()
    assert slow in play.out, "one version behind is not too far"
    play.report(*(r for r in play.out if r != slow))
    assert play.compute() == [Persist((Committed(2, "m2"),)), Publish(2, "m2"), Compute("judge", 2)]
    said = "stale: computed from a version 2 behind"
    assert play(Reported(2.0, client, slow, "u"))[1:] == [Receipt(client, slow, said)]
    assert play(Reported(2.0, client, slow, "u")) == [Receipt(client, slow, said)]


def test_buffered_when_a_silent_client_can_no_longer_count_takes_its_place_back() -> None:
    play = Play(Buffered(concurrency=2, goal=1, max_lag=1), "abc")
    silent = list(play.out)[1]
    for _ in range(2):
        play.report(next(r for r in play.out if r != silent))
        play.compute()
        play.judge()
    assert Dropped(silent, "stale: computed from a version 2 behind") in play.news
    assert len(play.out) == 2


def test_buffered_when_a_held_update_is_too_old_at_the_next_buffer_drops_it() -> None:
    play = Play(Buffered(concurrency=2, goal=1, max_lag=1), "ab")
    slow = list(play.out)[1]
    client = play.out[slow]
    for _ in range(2):
        play.report(next(r for r in play.out if r != slow))
        if play.state.version == 1:
            play.report(slow)
            assert play.news == (Held(slow, f"u{slow}"),)
        play.compute()
        play.judge()
    assert Dropped(slow, "stale: computed from a version 2 behind") in play.news
    assert Receipt(client, slow, "stale: computed from a version 2 behind") in play.effects


def test_buffered_when_clients_always_fail_does_not_ask_them_without_end() -> None:
    play = Play(Buffered(concurrency=2, goal=1, patience=2), "ab")
    asked = 0
    while play.out:
        receipt, client = next(iter(play.out.items()))
        play(Failed(1.0, client, receipt, "ValueError: no rows"))
        asked += 1
    assert asked == 4, "two clients, in each of two collections"
    assert play.effects[-1] == Finish("no quorum: 2 rounds in a row had fewer than 1 updates", 0, failed=True)


def test_buffered_when_a_client_joins_asks_it_if_there_is_a_place() -> None:
    play = Play(Buffered(concurrency=2, goal=2), "a")
    play(Joined(1.0, "b"))
    assert play.news == (Enrolled("b"), HandedOut("b", 1, 0, 0))
    assert play(Joined(1.0, "c")) == [Persist((Enrolled("c"),))]


def test_buffered_when_a_lease_ends_hands_out_again_or_asks_somebody_else() -> None:
    play = Play(Buffered(concurrency=1, goal=1, lease=5.0, attempts=2), "ab")
    client = play.out["1.0.0"]
    assert play.effects[-1] == WakeAt(5.0)
    play(Ticked(5.0))
    assert play.news == (HandedOut(client, 0, 0, 1, 10.0),)
    play(Ticked(10.0))
    other = "b" if client == "a" else "a"
    assert play.news == (Dropped("1.0.1", LOST), HandedOut(other, 1, 0, 0, 15.0))
    assert play.effects[-1] == WakeAt(15.0)


def test_buffered_when_evaluated_holds_training_updates_meanwhile() -> None:
    play = Play(Buffered(concurrency=2, goal=1, lease=50.0), "ab", evaluate=1)
    first, second = play.out
    client = play.out[second]
    play.report(first)
    play.compute()
    assert play.state.phase is Phase.EVALUATING
    play.report(second)
    assert play.news == (Held(second, f"u{second}"),)
    play(Ticked(60.0))
    assert all(record != Dropped(second, LOST) for record in play.news), "what is held is not lost"
    while play.state.phase is Phase.EVALUATING:
        play(Ticked(play.told[-1].at))
    play.judge(at=200.0)
    assert Accepted(second, 0, f"u{second}", 1) in play.news
    assert Receipt(client, second, ACCEPTED) in play.effects


# ---------------------------------------------------------------------------------------- restart and interrupt


def in_phase(phase: Phase) -> Play:
    """A run of three clients that stands in this phase."""
    if phase is Phase.IDLE:
        play = Play(clients="abc")
        play.records, play.state = play.records[:3], replay(play.records[:3])
        return play
    if phase is Phase.ENDING:
        play = in_phase(Phase.JUDGING)
        play.records.append(Ended("enough", 1))
        play.state = replay(play.records)
        return play
    play = Play(clients="abc", evaluate=int(phase is Phase.EVALUATING), test=True)
    if phase is Phase.TRAINING:
        return play
    play.report("1.0.0", "1.1.0", "1.2.0")
    if phase is not Phase.COMPUTING:
        play.compute()
    if phase in (Phase.TESTING, Phase.DONE):
        play.judge("enough")
    if phase is Phase.DONE:
        play.report("2.0.0", "2.1.0", "2.2.0")
    assert play.state.phase is phase
    return play


@pytest.mark.parametrize("phase", Phase)
def test_a_run_when_interrupted_ends_with_the_version_it_has(phase: Phase) -> None:
    play = in_phase(phase)
    version = play.state.version
    play(Interrupted(5.0))
    if phase is Phase.DONE:
        assert play.told == []
    else:
        assert play.told == [Persist((Finished("interrupted", version),)), Finish("interrupted", version)]
    assert play(Computed(6.0, play.state.collection, "m")) == []
    assert play(Judged(6.0, version)) == []


RESTARTS: dict[Phase, list[Action]] = {
    Phase.IDLE: [],
    Phase.COMPUTING: [
        *(Fold(1, p, taken(c, f"1.{p}.0")) for p, c in enumerate("abc")),
        Compute("update", 1),
    ],
    Phase.JUDGING: [Publish(1, "m1"), Compute("judge", 1)],
    Phase.EVALUATING: [Publish(1, "m1"), *(Send(Task("evaluate", c, 1, 1, 2, 0, p, 1)) for p, c in enumerate("abc"))],
    Phase.TESTING: [Send(Task("evaluate", c, 1, 1, 2, 0, p, 1, part="test")) for p, c in enumerate("abc")],
    Phase.DONE: [Finish("enough", 1)],
    Phase.TRAINING: [Send(train(c, p)) for p, c in enumerate("abc")],
    Phase.ENDING: [Send(Task("evaluate", c, 1, 1, 2, 0, p, 1, part="test")) for p, c in enumerate("abc")],
}


@pytest.mark.parametrize("phase", Phase)
def test_a_restart_asks_for_every_effect_again_and_may_happen_twice(phase: Phase) -> None:
    play = in_phase(phase)
    for _ in range(3):
        play(Restarted(5.0))
        assert play.effects == RESTARTS[play.state.phase]
        if phase is not Phase.ENDING:
            assert play.news == ()


def test_a_restart_in_the_middle_of_training_folds_what_was_folded_and_sends_what_is_out() -> None:
    play = Play(Sync(lease=10.0), "abcd")
    play.report("1.0.0", "1.2.0", at=4.0)
    play(Restarted(6.0))
    assert play.told == [
        Fold(1, 0, taken("a", "1.0.0")),
        Send(train("b", 1)),
        Send(train("d", 3)),
        WakeAt(10.0),
    ]
    play(Restarted(10.0))
    assert play.news == (HandedOut("b", 1, 0, 1, 20.0), HandedOut("d", 3, 0, 1, 20.0))
    assert play.effects == [
        Fold(1, 0, taken("a", "1.0.0")),
        Send(train("b", 1, attempt=1)),
        Send(train("d", 3, attempt=1)),
        WakeAt(20.0),
    ]


def test_a_restart_when_the_deadline_has_passed_meanwhile_closes_the_round() -> None:
    play = Play(Sync(deadline_seconds=10.0))
    play.report("1.1.0")
    play(Restarted(11.0))
    assert play.news == (Closed(("1.0.0", "1.2.0")),)
    assert play.effects == [Fold(1, 1, taken("b", "1.1.0")), Compute("update", 1)]


@pytest.mark.parametrize("computing", [False, True])
def test_a_restart_in_the_middle_of_several_stages_abandons_and_repeats_with_fresh_numbers(computing: bool) -> None:
    play = Play(clients="ab")
    play.report("1.0.0", "1.1.0")
    play(Computed(2.0, 1, again=("a", "b")))
    play.report("2.0.0", *(["2.1.0"] if computing else []))
    play(Restarted(5.0))
    assert play.news == (
        Abandoned("the coordinator restarted in the middle of a multi-stage protocol", counts=False),
        TrainingOpened(5.0, 1, 0, ("a", "b"), 16, None),
    )
    assert play.effects == [Send(train(c, p, collection=3, number=2)) for p, c in enumerate("ab")]
    assert play(Reported(5.0, "a", "2.0.0", "u")) == [Receipt("a", "2.0.0", ACCEPTED)]
    assert play(Reported(5.0, "b", "2.1.0", "u"))[0].verdict == (ACCEPTED if computing else EXPIRED)


def test_a_restart_while_an_asynchronous_version_is_made_sends_what_is_still_out() -> None:
    play = Play(Buffered(concurrency=3, goal=1), "abc")
    one, two, three = play.out
    client = play.out[one]
    play.report(one, two)
    play(Restarted(5.0))
    assert play.told == [
        Fold(1, 0, taken(client, one)),
        Compute("update", 1),
        Send(play.state.leases[three].task),
    ], "what is held is not asked for again"


def test_a_restart_while_computing_folds_carried_updates_that_no_plan_lists() -> None:
    play = Play(Buffered(concurrency=4, goal=3), "abcd")
    *first, carried = play.out
    play.report(*first)
    play.compute()
    play.judge()
    play.report(carried)
    others = [r for r in play.out if r != carried][:2]
    play.report(*others)
    assert play.state.phase is Phase.COMPUTING
    folds = [action for action in play(Restarted(5.0)) if isinstance(action, Fold)]
    assert [fold.position for fold in folds] == [0, 1, 2]


# ---------------------------------------------------------------------------------------- the tables


def test_the_picture_shows_every_phase_and_every_way_between_two() -> None:
    drawn = picture()
    for phase in Phase:
        assert f" {phase.value}" in drawn
    for (phase, record), to in NEXT.items():
        if phase is not to and record is not Finished:
            assert f"    {phase.value} --> {to.value}: {record.__name__}\n" in drawn


def every_event(play: Play) -> Sequence[Event]:
    receipt, lease = next(iter(play.state.leases.items()), ("1.0.0", None))
    client = lease.task.client if lease else "a"
    at, collection, version = 4.0, play.state.collection, play.state.version
    return (
        Joined(at, "new"),
        Left(at, client),
        Begin(at, "m0"),
        Reported(at, client, receipt, "u"),
        Refused(at, client, receipt, "bad"),
        Failed(at, client, receipt, "died", retry=True),
        Failed(at, client, receipt, "died"),
        Ticked(at),
        Computed(at, collection, "m"),
        Computed(at, collection, again=("a",)),
        ComputeFailed(at, collection, "no"),
        Judged(at, version),
        Judged(at, version, "over"),
        Interrupted(at),
        Restarted(at),
    )


def test_every_event_in_every_phase_has_a_handler_and_is_answered_and_every_way_is_taken() -> None:
    Play.seen.clear()
    Play.written.clear()
    assert set(engine.HANDLERS) == {(phase, type(event)) for phase in Phase for event in every_event(Play())}
    for phase in Phase:
        for index in range(len(every_event(in_phase(phase)))):
            play = in_phase(phase)
            play(every_event(play)[index])
    buffered_tasks_while_it_computes_and_judges()
    several_stages_that_restart()
    assert Play.seen == set(engine.HANDLERS)
    assert Play.written == set(NEXT), "ways that no test takes, or that no table lists"


def buffered_tasks_while_it_computes_and_judges() -> None:
    for evaluate in (0, 1):
        for judging in (False, True):
            for kind in ("held", "dropped"):
                play = Play(Buffered(concurrency=2, goal=1), "ab", evaluate=evaluate)
                first, second = play.out
                client = play.out[second]
                play.report(first)
                if judging:
                    play.compute()
                play(Reported(2.0, client, second, "u") if kind == "held" else Failed(2.0, client, second, "died"))
    retried = in_phase(Phase.EVALUATING)
    retried(Failed(4.0, "a", "2.0.0", "died", retry=True))
    retried.report("2.0.1", "2.1.0", "2.2.0")


def several_stages_that_restart() -> None:
    for computing in (False, True):
        play = Play(clients="a")
        play.report("1.0.0")
        play(Computed(2.0, 1, again=("a",)))
        if computing:
            play.report("2.0.0")
        play(Restarted(5.0))
    Play(clients="")
