from __future__ import annotations

import pytest

from polyfed.core.errors import UsageError
from polyfed.core.schedule import Buffered, Standing, Sync
from polyfed.core.select import Uniform

NAMES = ("a", "b", "c", "d", "e")


def test_outstanding_is_who_was_asked_and_is_not_decided() -> None:
    assert Standing(0.0, 0.0, asked=5, accepted=2, left_out=1).outstanding == 2


@pytest.mark.parametrize(
    ("schedule", "standing", "closes"),
    [
        (Sync(), Standing(9.0, 0.0, 5, 4, 0), False),
        (Sync(), Standing(9.0, 0.0, 5, 5, 0), True),
        (Sync(), Standing(9.0, 0.0, 5, 3, 2), True),
        (Sync(goal=3), Standing(9.0, 0.0, 5, 2, 0), False),
        (Sync(goal=3), Standing(9.0, 0.0, 5, 3, 0), True),
        (Sync(goal=3), Standing(9.0, 0.0, 5, 2, 3), True),
        (Sync(deadline_seconds=9.0), Standing(8.9, 0.0, 5, 4, 0), False),
        (Sync(deadline_seconds=9.0), Standing(9.0, 0.0, 5, 0, 0), True),
        (Sync(deadline_seconds=9.0), Standing(9.0, 1.0, 5, 4, 0), False),
        (Buffered(3, 2), Standing(9.0, 0.0, 3, 1, 0), False),
        (Buffered(3, 2), Standing(9.0, 0.0, 3, 2, 0), True),
        (Buffered(3, 2), Standing(1e9, 0.0, 0, 0, 0), False),
    ],
)
def test_a_collection_closes_at_its_goal_its_deadline_or_when_nobody_is_outstanding(
    schedule: Sync | Buffered, standing: Standing, closes: bool
) -> None:
    assert schedule.closes(standing) is closes


def test_sync_asks_its_cohort_once() -> None:
    schedule = Sync(select=Uniform(3), deadline_seconds=5.0)
    cohort = schedule.start(NAMES, 1, 0)
    assert len(cohort) == 3
    assert cohort == schedule.start(NAMES, 1, 0)
    assert schedule.refill(Standing(0.0, 0.0, 3, 0, 3)) == 0
    assert schedule.deadline(2.0) == 7.0
    assert Sync().deadline(2.0) is None
    assert schedule.max_lag == 0


def test_buffered_keeps_its_concurrency() -> None:
    schedule = Buffered(concurrency=3, goal=2)
    assert schedule.start(NAMES, 7, 0) == NAMES
    assert [schedule.refill(Standing(0.0, 0.0, asked, 1, 0)) for asked in (1, 2, 4)] == [3, 2, 0]
    assert schedule.deadline(0.0) is None
    assert schedule.minimum == 2


@pytest.mark.parametrize("name", ["minimum", "attempts", "block", "patience"])
def test_sync_when_a_number_is_below_one_names_it(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=0"):
        Sync(**{name: 0})


@pytest.mark.parametrize("name", ["concurrency", "goal", "max_lag", "attempts", "block", "patience"])
def test_buffered_when_a_number_is_below_one_names_it(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=0"):
        Buffered(**{"concurrency": 2, "goal": 2, name: 0})


def test_sync_when_its_goal_is_below_its_minimum_is_refused() -> None:
    with pytest.raises(UsageError, match="goal=2 would close a round below its minimum=3"):
        Sync(goal=2, minimum=3)
    Sync(goal=3, minimum=3)
