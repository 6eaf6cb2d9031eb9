import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import DataError
from polyfed.data import by_column, dirichlet, iid, partition, pathological, per_client, quantity_skew, shards

fast = settings(derandomize=True, deadline=None, max_examples=60)
labels = st.lists(st.integers(0, 5), min_size=24, max_size=150).map(np.array)
clients = st.integers(1, 8)
seeds = st.integers(0, 3)


def covers_once(deal, rows):
    together = np.concatenate(list(deal.values()))
    return len(together) == rows and np.array_equal(np.sort(together), np.arange(rows))


@fast
@given(labels, clients, seeds, st.sampled_from([1e-3, 0.1, 0.5, 100.0]), st.integers(0, 3))
def test_every_partition_gives_each_row_to_exactly_one_client(y, k, seed, alpha, least):
    deals = [
        iid(y, clients=k, seed=seed),
        dirichlet(y, clients=k, alpha=alpha, min_rows=least, seed=seed),
        shards(y, clients=k, shards=2, seed=seed),
        quantity_skew(len(y), clients=k, law="lognormal", spread=2.0, min_rows=least, seed=seed),
        quantity_skew(len(y), clients=k, law="power", spread=2.0, min_rows=least, seed=seed),
        by_column(y),
    ]
    for deal in deals:
        assert covers_once(deal, len(y))
        assert all(rows.dtype == np.int64 and np.array_equal(rows, np.sort(rows)) for rows in deal.values())
    assert all(len(deal) == k for deal in deals[:-1])
    assert min(map(len, deals[1].values())) >= least
    assert min(map(len, deals[3].values())) >= least
    assert min(map(len, deals[4].values())) >= least


@fast
@given(st.integers(1, 12), st.integers(1, 6), seeds)
def test_pathological_gives_each_client_exactly_its_number_of_classes(k, each, seed):
    y = np.repeat(np.arange(6), 12)
    if k * each < 6:
        with pytest.raises(DataError, match="cannot hold 6 classes"):
            pathological(y, clients=k, classes=each, seed=seed)
        return
    deal = pathological(y, clients=k, classes=each, seed=seed)
    assert covers_once(deal, len(y))
    assert {len(np.unique(y[rows])) for rows in deal.values()} == {each}


@pytest.mark.parametrize("deal", [iid, dirichlet, shards, pathological, quantity_skew])
def test_a_partition_depends_on_its_seed_and_nothing_else(deal):
    y = np.repeat(np.arange(5), 40)

    def flat(seed):
        return [rows.tolist() for rows in deal(y, clients=7, seed=seed).values()]

    assert flat(3) == flat(3)
    assert flat(3) != flat(4)


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(map(len, iid(10, clients=3).values())) == [3, 3, 4]


def test_dirichlet_when_alpha_is_small_is_more_skewed_than_when_it_is_large():
    y = np.repeat(np.arange(10), 200)

    def skew(alpha):
        deal = dirichlet(y, clients=20, alpha=alpha, seed=1)
        return np.mean([np.bincount(y[rows], minlength=10).max() / max(len(rows), 1) for rows in deal.values()])

    assert skew(100.0) < 0.2 < 0.5 < skew(0.05)


def test_dirichlet_when_alpha_is_tiny_still_ends_and_fills_every_client():
    deal = dirichlet(np.repeat([0, 1], 100), clients=20, alpha=1e-12, min_rows=10)
    assert {len(rows) for rows in deal.values()} == {10}


def test_shards_when_labels_fill_shards_exactly_gives_at_most_as_many_labels_as_shards():
    y = np.repeat(np.arange(10), 20)
    deal = shards(y, clients=10, shards=2, seed=0)
    assert max(len(np.unique(y[rows])) for rows in deal.values()) <= 2
    assert {len(rows) for rows in deal.values()} == {20}


def test_quantity_skew_when_spread_is_zero_gives_equal_shares():
    assert {len(rows) for rows in quantity_skew(60, clients=6, spread=0.0).values()} == {10}


def test_by_column_names_clients_by_their_values_and_gaps_missing():
    deal = by_column(["b", None, "a", float("nan"), "b"])
    assert {name: rows.tolist() for name, rows in deal.items()} == {"a": [2], "b": [0, 4], "missing": [1, 3]}


def test_per_client_cuts_arrays_and_mappings_alike():
    deal = {"north": np.array([0, 2]), "south": np.array([1])}
    y = np.array([5, 6, 7])
    x = np.arange(6).reshape(3, 2)
    assert per_client(x, y, deal)["north"][0].tolist() == [[0, 1], [4, 5]]
    both, target = per_client({"a": x, "b": y}, y, deal)["south"]
    assert both["b"].tolist() == [6] == target.tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: iid(2, clients=3), "2 rows are too few"),
        (lambda: iid(2, clients=0), "clients= must be at least 1"),
        (lambda: dirichlet([0, 1], clients=1, alpha=0), "above 0"),
        (lambda: dirichlet([0, 1, 1], clients=2, min_rows=2), "too few"),
        (lambda: dirichlet([[0], [1]], clients=1), "one label a row"),
        (lambda: quantity_skew(9, clients=2, law="zipf"), "'lognormal' or 'power'"),
        (lambda: pathological([0, 1, 1, 1], clients=4, classes=1), "class 0 has 1 rows"),
        (lambda: by_column([]), "empty"),
    ],
)
def test_a_partition_when_asked_the_impossible_says_why(call, words):
    with pytest.raises(DataError, match=words):
        call()


def test_the_cover_check_when_a_row_is_dealt_twice_fails(monkeypatch):
    monkeypatch.setattr(partition.np, "array_split", lambda rows, k: [rows for _ in range(k)])
    assert not covers_once(partition.iid(10, clients=2), 10)
