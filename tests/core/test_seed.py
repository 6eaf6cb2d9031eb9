"""The streams are part of the contract: a changed draw would change every recorded result."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core import seed

names = st.lists(st.one_of(st.integers(-100, 100), st.text("as1\x1f", max_size=4)), min_size=1, max_size=4)


@settings(derandomize=True, deadline=None)
@given(names, names)
def test_keys_of_two_paths_differ_when_the_paths_differ(one, other):
    same = [(type(n), n) for n in one] == [(type(n), n) for n in other]
    assert (seed.key(*one) == seed.key(*other)) == same


def test_keys_differ_when_only_the_cut_or_the_type_differs():
    paths = [("a", 1), ("a1",), ("a", "1"), ("a", "", 1), (1, "a"), ("a",), ("a\x1fi1",), ()]
    assert len({seed.key(*path) for path in paths}) == len(paths)


def test_key_when_pinned_keeps_its_value():
    assert seed.key(0, "cleveland", 1, "order") == 328439651084389019259768481702031256263
    assert seed.integer(0, "cleveland", 1, "order") == 922872519


def test_rng_when_pinned_keeps_its_draws():
    stream = seed.rng(0, "cleveland", 1, "order")
    assert stream.permutation(8).tolist() == [2, 3, 1, 7, 4, 5, 6, 0]
    assert float(stream.standard_normal()) == 0.8575858372883177


def test_rng_when_named_equally_repeats_and_is_independent_of_other_streams():
    first = seed.rng(3, "client").random(5)
    seed.rng(3, "other").random(1000)
    np.random.default_rng().random(1000)
    assert seed.rng(3, "client").random(5).tolist() == first.tolist()
    assert seed.rng(3, "other").random(5).tolist() != first.tolist()


@pytest.mark.parametrize("n", range(50))
def test_integer_when_drawn_fits_31_bits(n):
    assert 0 <= seed.integer("n", n) < 2**31


def test_streams_of_neighbouring_clients_are_uncorrelated():
    draws = np.stack([seed.rng(0, client, "noise").standard_normal(2000) for client in range(20)])
    correlation = np.corrcoef(draws) - np.eye(20)
    assert abs(correlation).max() < 5 / np.sqrt(2000)


def test_seed_module_when_read_uses_no_global_generator():
    source = Path(seed.__file__).read_text(encoding="utf-8")
    assert not re.search(r"np\.random\.(seed|rand|default_rng)|import random", source)
