import warnings

import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.data import LeakWarning, Parts, Raw, check_public_apart

pd = pytest.importorskip("pandas")
PARTS = Parts(train=[0, 1, 2, 3], validation=[4], test=[5, 6, 7])


def some(seed=0, n=8):
    return Raw({"x": np.random.default_rng(seed).normal(size=(n, 3))}, np.arange(n) % 2)


def public_of(raw, *rows):
    return raw.take(np.array(rows)).unlabelled()


def test_public_rows_that_are_test_or_validation_rows_are_refused_with_their_number():
    raw = some()
    with pytest.raises(
        DataError,
        match="north: the public rows hold 1 of 1 validation rows and 2 of 3 test rows of this client; its score",
    ):
        check_public_apart("north", raw, PARTS, public_of(raw, 0, 4, 5, 7))
    with pytest.raises(DataError, match="hold 1 of 3 test rows") as caught:
        check_public_apart("north", raw, PARTS, public_of(raw, 6))
    assert "pf.Client('north', ..., consents=\"overlap\")" in str(caught.value)


def test_training_rows_and_strangers_may_be_public():
    raw = some()
    check_public_apart("north", raw, PARTS, public_of(raw, 0, 1, 2, 3))
    check_public_apart("north", raw, PARTS, some(1).unlabelled())


def test_a_table_that_repeats_by_nature_has_honest_duplicates():
    few = Raw({"x": np.array([[0], [1], [0], [1], [0], [1], [1], [2]])}, np.arange(8) % 2)
    check_public_apart("north", few, PARTS, public_of(few, 0, 1, 5, 6))
    with pytest.raises(DataError, match="hold 1 of 3 test rows"):  # 2 stands in no training row
        check_public_apart("north", few, PARTS, public_of(few, 0, 7))
    check_public_apart("north", few, PARTS, public_of(few, 0, 7), may_overlap=True)


def test_rows_that_others_set_aside_are_warned_of_and_own_ones_are_not():
    raw = some()
    with pytest.warns(LeakWarning, match="north: rows that other clients set aside as public equal 2 of 3 test rows"):
        check_public_apart("north", raw, PARTS, public_of(raw, 5, 6), is_given=False)
    aside = Parts(train=[0, 1, 2], validation=[4], test=[5, 6, 7], public=[3])
    raw.x[5] = raw.x[3]  # its own affair, of which `prepare` warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_public_apart("north", raw, aside, public_of(raw, 3), is_given=False)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (np.float64, np.float32),
        (np.int64, np.float64),
        (np.uint8, np.int64),
        (bool, np.int64),
        (np.str_, object),
    ],
)
def test_equal_values_are_found_in_another_dtype(own, other):
    values = (np.arange(16).reshape(8, 2) * 7) % 16
    values = values % 2 + 0 * values if own is bool else values / 10 if own is np.float64 else values
    text = np.array([f"w{v}" for v in values.ravel()]).reshape(values.shape) if own is np.str_ else values
    raw = Raw({"x": np.asarray(text).astype(own)}, np.arange(8) % 2)
    parts = Parts(train=[0, 1], test=[6, 7]) if own is not bool else Parts(train=[0], test=[1])
    raw = raw if own is not bool else Raw({"x": np.array([[True, False], [True, True]])}, np.arange(2))
    public = Raw({"x": raw.x[[-1]].astype(other)})
    with pytest.raises(DataError, match="test rows of this client"):
        check_public_apart("north", raw, parts, public)


def frame(seed=0, n=8):
    rng = np.random.default_rng(seed)
    table = {"age": rng.normal(60, 9, n), "sex": rng.choice(["f", "m"], n), "ill": rng.random(n) < 0.5}
    return pd.DataFrame(table | {"seen": pd.date_range("2020", periods=n)})


def test_frames_are_compared_by_the_names_of_their_columns_and_gaps_are_equal():
    table = frame()
    table.loc[7, ["age", "sex"]] = np.nan
    raw = Raw({"x": table}, np.arange(8) % 2)
    theirs = table[["seen", "ill", "sex", "age"]].assign(more=1).iloc[[7]]
    with pytest.raises(DataError, match="hold 1 of 3 test rows"):
        check_public_apart("north", raw, PARTS, Raw({"x": theirs}))


def test_public_rows_that_are_not_the_clients_whole_rows_are_not_compared():
    raw = Raw({"x": frame()}, np.arange(8) % 2)
    check_public_apart("north", raw, PARTS, Raw({"x": frame().drop(columns="age")}))
    check_public_apart("north", some(), PARTS, Raw({"x": some().x[:, :2]}))
    check_public_apart("north", some(), PARTS, Raw({"y": some().x}))


def test_a_client_with_one_of_two_inputs_is_held_against_that_one():
    rng = np.random.default_rng(0)
    both = Raw({"image": rng.random((8, 1, 2, 2)), "genes": rng.random((8, 3))}, np.arange(8) % 2)
    with pytest.raises(DataError, match="hold 1 of 3 test rows"):
        check_public_apart("lab", both.only("genes"), PARTS, public_of(both, 5))
