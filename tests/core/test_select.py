"""Cohorts."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import UsageError
from polyfed.core.select import All, Available, Uniform

NAMES = [f"client {i}" for i in range(30)]


def test_all_when_asked_takes_everybody_in_order():
    assert All().select(NAMES, 3, 0) == tuple(NAMES)
    assert All().note(NAMES) == ""


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 99), st.integers(0, 2**40))
def test_uniform_when_drawn_is_a_part_of_the_population_in_its_order(size, population, round_num, seed):
    names = NAMES[:population]
    cohort = Uniform(size).select(names, round_num, seed)
    assert len(cohort) == len(set(cohort)) == min(size, population)
    assert list(cohort) == [name for name in names if name in set(cohort)]
    assert cohort == Uniform(size).select(names, round_num, seed)


def test_uniform_when_round_or_seed_changes_draws_others():
    draws = {Uniform(5).select(NAMES, round_num, seed) for round_num in range(1, 20) for seed in range(5)}
    assert len(draws) == 95


def test_uniform_when_drawn_often_takes_everybody_equally():
    counts = Counter(name for round_num in range(1, 2001) for name in Uniform(6).select(NAMES, round_num, 1))
    assert set(counts) == set(NAMES)
    # 400 expected each, standard deviation 18: a bound of five of them over thirty names
    assert max(abs(n - 400) for n in counts.values()) < 90


def test_uniform_when_the_population_is_small_takes_all_and_says_so():
    assert Uniform(9).select(NAMES[:3], 1, 0) == tuple(NAMES[:3])
    assert Uniform(9).note(NAMES[:3]) == ("a cohort of 9 was asked for and there are 3 clients: all of them take part")
    assert Uniform(3).note(NAMES[:3]) == ""


def test_available_when_mapped_takes_those_of_the_round():
    select = Available(None, {1: {"client 3", "client 1", "stranger"}, 2: ["client 0"]})
    assert select.select(NAMES, 1, 0) == ("client 1", "client 3")
    assert select.select(NAMES, 2, 0) == ("client 0",)
    assert select.select(NAMES, 3, 0) == ()
    assert select.note(NAMES) == ""


def test_available_when_a_function_draws_among_those_present():
    select = Available(4, lambda round_num: NAMES[round_num : round_num + 10])
    cohorts = [select.select(NAMES, round_num, 0) for round_num in range(1, 15)]
    assert all(len(cohort) == 4 for cohort in cohorts)
    assert all(set(cohort) <= set(NAMES[r : r + 10]) for r, cohort in enumerate(cohorts, 1))
    assert Available(40, lambda _: NAMES).note(NAMES).startswith("a cohort of 40")


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"])
def test_cohort_size_when_not_a_count_is_refused(size):
    with pytest.raises(UsageError, match="cohort_size"):
        Uniform(size)
    with pytest.raises(UsageError, match="cohort_size"):
        Available(size, {})
