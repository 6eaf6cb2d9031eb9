"""Shared linear coefficients where a site has never seen some of the classes."""

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn_sites import TEN, TWO, accuracy, averaged, cut, digits, env_of, rows_of, trained

from polyfed.core.algorithm import Fit, Predict
from polyfed.models import sklearn_parameters
from polyfed.models.sklearn import sklearn
from polyfed.models.sklearn_estimator import FLOOR


def sorted_sites(estimator, rounds):
    """Accuracy on other rows of the mean over three sites of some four classes each."""
    x, y = digits()
    order = np.argsort(y[:600], kind="stable")
    model, theta = averaged(estimator, x[:600][order], y[:600][order], cut(600, (200, 200, 200)), TEN, rounds)
    rows = rows_of(x[600:1000], y[600:1000])
    return accuracy(model.predict(Predict((theta,)), rows, env_of(rows)), y[600:1000])


def test_whole_fits_when_sites_lack_classes_then_their_mean_knows_all():
    assert sorted_sites(LogisticRegression(), 1) > 0.8


def test_absent_classes_when_they_are_pushed_down_then_the_mean_knows_few(monkeypatch):
    """Mutant: every class has a row, the absent ones the mean of all rows at a weight of 1e-3."""
    real = sklearn_parameters.joined

    def with_all(batches):
        batch = real(batches)
        absent = np.setdiff1d(np.arange(10), batch.y)
        mean = np.broadcast_to(batch.x.mean(axis=0), (len(absent), batch.x.shape[1]))
        return real([batch, sklearn_parameters.Batch(mean, absent, np.full(len(absent), 1e-3))])

    monkeypatch.setattr(sklearn_parameters, "joined", with_all)
    assert sorted_sites(LogisticRegression(), 1) < 0.4


@pytest.mark.parametrize("count", [1, 2, 3])
def test_coefficients_when_classes_are_absent_then_stay_where_they_start(count):
    x, y = digits()
    kept = y[:300] < count
    rows, model = rows_of(x[:300][kept], y[:300][kept]), sklearn(LogisticRegression())
    env = env_of(rows)
    start = model.first(rows, env).map(lambda a: np.cos(np.arange(a.size, dtype=np.float64)))
    state = model.fit(Fit((start,)), rows, env).state
    for name in ("coef", "intercept"):
        assert np.array_equal(state[name][count:], start[name][count:])
        assert np.array_equal(state[name][:count], start[name][:count]) == (count == 1)
    assert np.allclose(state["class"][:count], np.bincount(rows.target) / len(rows))
    assert (state["class"][count:] == 0).all()


def test_two_classes_of_ten_when_fitted_alone_then_equal_scikit_learn():
    x, y = digits()
    kept = np.isin(y[:300], (3, 8))
    rows, model = rows_of(x[:300][kept], y[:300][kept]), sklearn(LogisticRegression(tol=1e-8))
    fitted = model.export(trained(model, rows, env_of(rows)), rows, env_of(rows))
    plain = LogisticRegression(tol=1e-8).fit(rows.x.astype(np.float64), rows.target)
    assert fitted.classes_.tolist() == [3, 8]
    assert np.allclose(fitted.coef_, plain.coef_, atol=1e-5)
    outputs = model.predict(Predict((trained(model, rows, env_of(rows)),)), rows, env_of(rows))
    assert np.allclose(np.delete(outputs, [3, 8], axis=1), np.log(FLOOR), atol=1e-4)


@pytest.mark.parametrize("problem", [TWO, TEN], ids=["two", "ten"])
def test_sites_of_one_class_when_averaged_then_are_no_error(problem):
    x, y = digits()
    order = np.argsort(y[:60] % 2, kind="stable")
    half = int((y[:60] % 2 == 0).sum())
    parts = cut(60, (half, 60 - half))
    model, theta = averaged(LogisticRegression(), x[:60][order], (y[:60] % 2)[order], parts, problem)
    rows = rows_of(x[:5], y[:5] % 2)
    assert (theta["coef"] == 0).all()
    assert np.allclose(theta["class"][:2], [half / 60, 1 - half / 60])
    single = rows_of(x[:60][order][:half], (y[:60] % 2)[order][:half])
    alone = trained(model, single, env_of(single, problem))
    assert isinstance(model.export(alone, single, env_of(single, problem)), DummyClassifier)
    outputs = model.predict(Predict((theta,)), rows, env_of(rows, problem))
    assert np.allclose(outputs[:, :2], np.log(0.5), atol=1e-4)
