from dataclasses import replace

import numpy as np
import pytest

from polyfed.core.errors import DataError
from polyfed.data import Split, divide
from polyfed.data.datasets import Series, windows


def a_series(n=60, gaps=()):
    step = np.array([i for i in range(n) if i not in gaps]) + 1000
    return Series(np.datetime64("2020-01-06T00:00:00") + step * np.timedelta64(3600, "s"), step * 1.0, step, 168, "u")


def test_windows_hold_the_values_just_before_their_target():
    raw = windows(a_series(), lags=5, horizon=2, scale=(0.0, 1.0))
    assert raw.x.shape == (60 - 6, 5 + 4)
    assert raw.x[0, :5].tolist() == [1000, 1001, 1002, 1003, 1004]
    assert raw.target[0] == 1006 == raw.time[0]
    assert np.allclose((raw.x[:, 5:] ** 2).sum(axis=1), 2)


def test_windows_over_gaps_repeat_the_past_and_never_the_future():
    raw = windows(a_series(gaps=(20, 21, 22, 40, 41, 42, 43)), lags=5, scale=(0.0, 1.0), fill=3)
    times = raw.time.tolist()
    assert not {1020, 1021, 1022, 1040, 1041, 1042, 1043} & set(times)
    assert raw.x[times.index(1023), :5].tolist() == [1018, 1019, 1019, 1019, 1019]
    assert not set(range(1044, 1049)) & set(times)
    assert 1049 in times


def test_windows_standardise_by_the_training_part_alone():
    calm, wild = a_series(100), a_series(100)
    wild.value[70:] *= 100
    first = windows(calm, lags=3).time < 1060
    assert np.array_equal(windows(calm, lags=3).x[first], windows(wild, lags=3).x[first])


def test_windows_split_with_their_gap_share_no_value_between_parts():
    raw = windows(a_series(200), lags=6, horizon=2, scale=(0.0, 1.0))
    parts = divide("city", raw, Split(0.2, 0.2, gap=6 + 2 - 1))
    for earlier, later in ((parts.train, parts.validation), (parts.validation, parts.test)):
        assert raw.target[earlier].max() < raw.x[later, :6].min()
    loose = divide("city", raw, Split(0.2, 0.2, gap=0))
    assert raw.target[loose.train].max() >= raw.x[loose.validation, :6].min()


@pytest.mark.parametrize(
    ("asked", "words"), [({"lags": 0}, "both are at least 1"), ({"lags": 500}, "no window of 500 steps")]
)
def test_windows_that_do_not_exist_are_refused(asked, words):
    with pytest.raises(DataError, match=words):
        windows(a_series(), **asked)


def with_weather(series, *columns):
    return replace(series, weather=np.stack(columns, axis=1), weather_columns=tuple("ab"[: len(columns)]))


def test_weather_is_that_of_the_newest_value_and_never_a_later_one():
    plain = a_series(60, gaps=(20, 21))
    sunny = with_weather(plain, plain.value.copy())
    late = with_weather(plain, np.where(plain.step > 1031, 0.0, plain.value))
    rows = windows(sunny, lags=5, horizon=2, scale=(0.0, 1.0), weather=True, train=1.0)
    assert rows.x.shape[1] == 5 + 4 + 1
    mean, sd = plain.value.mean(), plain.value.std()
    np.testing.assert_allclose(rows.x[:, -1] * sd + mean, rows.x[:, 4], rtol=1e-5)  # a gap repeats the last of both
    for series in (sunny, late):
        assert np.array_equal(windows(series, lags=5).x, windows(plain, lags=5).x)
    early = rows.time <= 1033
    changed = windows(late, lags=5, horizon=2, weather=True, train=0.5)
    assert np.array_equal(changed.x[early], windows(sunny, lags=5, horizon=2, weather=True, train=0.5).x[early])
    assert not np.array_equal(changed.x, windows(sunny, lags=5, horizon=2, weather=True, train=0.5).x)


def test_weather_with_gaps_is_carried_forward_and_a_storm_is_cut():
    plain = a_series(40)
    gaps = np.where(np.arange(40) < 8, np.nan, 3.0)
    gaps[20:30] = np.nan
    storm = np.where(np.arange(40) == 39, 1e6, np.arange(40) % 2)
    seen = windows(with_weather(plain, gaps, storm), lags=3, horizon=1, weather=True).x[:, -2:]
    assert np.array_equal(seen[:, 0], np.zeros(37))  # one value only: it is the mean, before and after
    assert set(np.unique(seen[:, 1]).tolist()) == {-1.0, 1.0}
    assert windows(with_weather(plain, gaps, np.roll(storm, -1)), lags=3, weather=True).x[:, -1].max() == 5
