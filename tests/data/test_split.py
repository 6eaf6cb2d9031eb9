import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyfed.core.errors import DataError
from polyfed.data import Parts, Raw, Split, divide, duplicates, folds

fast = settings(derandomize=True, deadline=None, max_examples=80)
NAMES = ("train", "validation", "test", "public")


def raw_of(y, **extra):
    y = np.asarray(y)
    return Raw({"x": np.arange(len(y), dtype=np.float32)[:, None]}, y, **extra)


def together(parts):
    return np.sort(np.concatenate([getattr(parts, name) for name in NAMES]))


labels = st.lists(st.sampled_from("aaaabbc"), min_size=12, max_size=120).map(np.array)
wishes = st.builds(
    Split,
    validation=st.sampled_from([0.0, 0.1, 0.2]),
    test=st.sampled_from([0.0, 0.2, 0.3]),
    public=st.sampled_from([0.0, 0.1, 0.3]),
)


@fast
@given(labels, wishes, st.integers(0, 3))
def test_a_stratified_split_covers_all_rows_once_in_the_fractions_asked_for(y, wish, seed):
    parts = divide("va", raw_of(y), wish, seed=seed)
    assert np.array_equal(together(parts), np.arange(len(y)))
    assert abs(len(parts.test) - wish.test * len(y)) <= 1
    assert abs(len(parts.validation) - wish.validation * len(y)) <= 1
    assert set(y[parts.train]) == set(y)
    for value in set(y):
        n = (y == value).sum()
        assert abs((y[parts.test] == value).sum() - wish.test * n) <= 2


@fast
@given(labels, wishes, st.integers(0, 3))
def test_validation_and_test_do_not_depend_on_the_public_fraction(y, wish, seed):
    with_public = divide("va", raw_of(y), wish, seed=seed)
    without = divide("va", raw_of(y), Split(wish.validation, wish.test, 0.0), seed=seed)
    assert np.array_equal(with_public.test, without.test)
    assert np.array_equal(with_public.validation, without.validation)
    assert np.array_equal(with_public.with_public().train, without.train)


def test_a_split_depends_on_seed_and_name():
    raw = raw_of([0, 1] * 50)
    splits = {(n, s): divide(n, raw, Split(), seed=s).test.tobytes() for n in ("a", "b") for s in (0, 1)}
    assert len(set(splits.values())) == 4
    assert divide("a", raw, Split(), seed=0).test.tobytes() == splits["a", 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_split_when_a_class_has_eight_rows_puts_some_of_it_in_every_part(seed):
    y = np.array([True] * 115 + [False] * 8)
    parts = divide("switzerland", raw_of(y), Split(public=0.13), seed=seed)
    assert all((~y[getattr(parts, name)]).any() for name in ("train", "validation", "test"))
    assert (~y[parts.train]).sum() >= 3


def test_a_split_when_classes_are_tiny_fills_parts_by_swapping():
    y = np.array(["a"] * 40 + ["b"] * 3 + ["c"])
    for seed in range(10):
        parts = divide("x", raw_of(y), Split(0.1, 0.1, 0.2), seed=seed)
        assert {"a", "b"} <= set(y[parts.test])
        assert {"a", "b"} <= set(y[parts.validation])
        assert set(y[parts.train]) == {"a", "b", "c"}


def test_folds_are_stratified_and_cover_every_row_once():
    y = np.array([0] * 17 + [1] * 8 + [2] * 3)
    cut = folds(y, 4, seed=3)
    assert np.array_equal(np.sort(np.concatenate(cut)), np.arange(28))
    for value in range(3):
        counts = [(y[part] == value).sum() for part in cut]
        assert max(counts) - min(counts) <= 1
    assert {len(part) for part in cut} == {7}
    assert [p.tolist() for p in cut] != [p.tolist() for p in folds(y, 4, seed=4)]
    with pytest.raises(DataError, match="3 rows cannot be cut into 4 folds"):
        folds([0, 1, 1], 4)


@fast
@given(st.integers(20, 200), st.integers(0, 12), wishes, st.integers(0, 5))
def test_a_split_by_time_never_trains_on_what_a_later_part_sees(rows, lags, wish, seed):
    time = np.random.default_rng(seed).permutation(rows)
    wish = Split(wish.validation, wish.test, wish.public, gap=lags)
    try:
        parts = divide("city", raw_of(np.zeros(rows), time=time), wish)
    except DataError as error:
        assert "no rows for training" in str(error)
        return
    train = np.concatenate([parts.train, parts.public])
    for earlier, later in ((train, parts.validation), (np.concatenate([train, parts.validation]), parts.test)):
        if len(later):
            assert time[later].min() - time[earlier].max() > lags
    assert wish.gap or np.array_equal(together(parts), np.arange(rows))


def test_a_split_by_time_when_several_rows_share_a_time_keeps_them_together():
    time = np.repeat(np.arange("2020-01-01", "2020-01-11", dtype="datetime64[D]"), 5)
    parts = divide("x", raw_of(np.zeros(50), time=time), Split(0.3, 0.2, gap=np.timedelta64(1, "D")))
    owners = [set(time[getattr(parts, name)].tolist()) for name in NAMES[:3]]
    assert not owners[0] & owners[1]
    assert not owners[1] & owners[2]
    assert min(owners[1]) - max(owners[0]) > np.timedelta64(1, "D").item()


@fast
@given(st.lists(st.integers(0, 15), min_size=40, max_size=120).map(np.array), wishes)
def test_a_split_by_group_never_parts_a_person(groups, wish):
    parts = divide("x", raw_of(np.zeros(len(groups)), groups=groups), wish)
    assert np.array_equal(together(parts), np.arange(len(groups)))
    seen = [
        set(groups[np.concatenate([parts.train, parts.public])]),
        set(groups[parts.validation]),
        set(groups[parts.test]),
    ]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_a_split_by_group_when_it_ignored_groups_would_be_found():
    groups = np.repeat(np.arange(20), 5)
    parts = divide("x", raw_of(np.zeros(100), groups=groups), Split(by="random"))
    assert set(groups[parts.train]) & set(groups[parts.test])


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Parts([0, 1], [1]), "va: a row stands in two parts"),
        (Parts([0, 9]), "the data has rows 0 to 3"),
        (Parts([], [0]), "va: the split leaves no rows for training"),
        (Split(by="group"), "va: .*give groups="),
    ],
)
def test_a_split_when_it_cannot_be_used_names_client_and_reason(wish, words):
    with pytest.raises(DataError, match=words):
        divide("va", raw_of([0, 1, 0, 1]), wish)


def test_a_split_by_class_when_rows_are_unlabelled_says_so():
    with pytest.raises(DataError, match="needs labels"):
        divide("va", raw_of([0, 1]).unlabelled(), Split(by="class"))


@pytest.mark.parametrize("wrong", [{"test": 1.0}, {"test": -0.1}, {"test": 0.6, "public": 0.4}, {"by": "week"}])
def test_a_wish_when_it_makes_no_sense_is_refused(wrong):
    with pytest.raises(DataError, match="Split"):
        Split(**wrong)


def test_duplicates_counts_rows_that_stand_in_training_too():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": [1.0, 1.0, np.nan, np.nan, -0.0, 0.0], "b": ["u", "u", None, np.nan, "v", "v"]})
    assert duplicates(Raw({"x": frame}), np.array([0, 2, 4]), np.array([1, 3, 5])) == 3
    x = np.array([[0, 1], [0, 1], [0, 2]])
    assert duplicates(Raw({"x": x}), np.array([0]), np.array([1, 2])) == 1
    assert duplicates(Raw({"x": x, "z": np.arange(3.0)}), np.array([0]), np.array([1, 2])) == 0
