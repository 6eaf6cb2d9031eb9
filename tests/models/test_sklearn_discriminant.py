"""Linear discriminant analysis over sites equals scikit-learn's on all rows."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn_sites import TEN, TWO, averaged, cut, digits, env_of, pooled_gap, rows_of, trained

from polyfed.core.algorithm import Predict
from polyfed.core.errors import DataError
from polyfed.core.rows import Problem
from polyfed.models import sklearn_discriminant
from polyfed.models.sklearn import sklearn

UNEVEN = (1, 36, 3, 160, 200)


def by_class():
    """400 digits in order of their classes: sites have never seen most of them; six columns are constant, one at 7."""
    x, y = digits()
    order = np.argsort(y[:400], kind="stable")
    return np.concatenate([x[:400][order], np.full((400, 1), 7, np.float32)], 1), y[:400][order]


EXACT = [
    LinearDiscriminantAnalysis(),
    LinearDiscriminantAnalysis(priors=[0.05] * 5 + [0.15] * 5, n_components=3),
    LinearDiscriminantAnalysis("lsqr"),
    LinearDiscriminantAnalysis("lsqr", shrinkage=0.2),
    LinearDiscriminantAnalysis("eigen", shrinkage=0.3),
]


@pytest.mark.parametrize("estimator", EXACT, ids=["svd", "priors", "lsqr", "lsqr-shrunk", "eigen"])
def test_one_round_when_sites_lack_classes_then_equals_the_pooled_fit(estimator):
    x, y = by_class()
    assert pooled_gap(estimator, x[:, :64], y, cut(400, UNEVEN), TEN, rounds=1) < 1e-10


def test_discriminant_when_features_lie_far_from_zero_then_equals_the_pooled_fit_after_three_rounds():
    x, y = by_class()
    jitter = np.random.Generator(np.random.Philox(3)).normal(size=x.shape).astype(np.float32) / 10
    x = (x + jitter + 300).astype(np.float32)
    gaps = [pooled_gap(LinearDiscriminantAnalysis(), x, y, cut(400, UNEVEN), TEN, rounds) for rounds in (1, 3)]
    assert gaps[0] > 1e-9
    assert gaps[1] < 1e-10


def test_projection_when_exported_then_equals_the_pooled_one():
    x, y = by_class()
    model, theta = averaged(LinearDiscriminantAnalysis(n_components=3), x, y, cut(400, UNEVEN), TEN)
    rows = rows_of(x[:40], y[:40])
    federated = model.export(theta, rows, env_of(rows))
    pooled = LinearDiscriminantAnalysis(n_components=3).fit(x.astype(np.float64), y)
    assert np.allclose(np.abs(federated.transform(x)), np.abs(pooled.transform(x)), atol=1e-10)
    assert np.allclose(federated.explained_variance_ratio_, pooled.explained_variance_ratio_, atol=1e-12)
    assert federated.get_feature_names_out().tolist() == pooled.get_feature_names_out().tolist()


def test_two_classes_when_named_then_are_predicted_by_name():
    x, y = digits()
    kept = y[:300] < 2
    x, y = x[:300][kept], y[:300][kept]
    parts = cut(len(y), (1, 9, len(y) - 10))
    assert pooled_gap(LinearDiscriminantAnalysis(), x, y, parts, Problem(("0", "1"), 2), rounds=1) < 1e-10
    model, theta = averaged(LinearDiscriminantAnalysis(), x, y, parts, TWO)
    rows = rows_of(x, y)
    fitted = model.export(theta, rows, env_of(rows, TWO))
    assert (fitted.predict(x.astype(np.float64)) == np.array(TWO.classes)[y]).mean() > 0.98


def test_scatter_when_classes_are_not_separated_then_is_another(monkeypatch):
    """Mutant: scatter about the mean of all rows in place of the classes' means."""
    x, y = by_class()

    def total(state, seen):
        mean = state["class_x"].sum(axis=0)
        return state["xx"] - np.outer(mean, mean)

    monkeypatch.setattr(sklearn_discriminant, "_within", total)
    assert pooled_gap(LinearDiscriminantAnalysis(), x[:, :64], y, cut(400, UNEVEN), TEN, rounds=1) > 1e-3


@pytest.mark.parametrize(
    "estimator",
    [
        LinearDiscriminantAnalysis("lsqr", shrinkage="auto"),
        LinearDiscriminantAnalysis("lsqr", covariance_estimator=LedoitWolf()),
        LinearDiscriminantAnalysis("lsqr", priors=[0.1] * 10),
        LinearDiscriminantAnalysis(store_covariance=True, priors=[0.1] * 10),
    ],
    ids=["auto", "estimator", "priors", "stored"],
)
def test_estimator_when_pooled_scatter_does_not_tell_it_then_takes_part_by_predictions(estimator):
    assert sklearn(estimator).offers == {"predict", "distill"}


def test_little_data_when_fitted_then_is_still_a_model():
    x, y = digits()
    alone = rows_of(x[:1], y[:1])
    model = sklearn(LinearDiscriminantAnalysis())
    state = trained(model, alone, env_of(alone))
    assert isinstance(model.export(state, alone, env_of(alone)), DummyClassifier)
    kept = np.unique(y[:40], return_index=True)[1]
    each = rows_of(x[kept], y[kept])  # one row a class: no scatter within them at all
    outputs = model.predict(Predict((trained(model, each, env_of(each)),)), each, env_of(each))
    assert np.allclose(outputs, np.log(1 / len(kept)), atol=1e-5)
    singular = sklearn(LinearDiscriminantAnalysis("eigen"))
    with pytest.raises(DataError, match="cannot invert the scatter within classes"):
        singular.predict(Predict((trained(singular, each, env_of(each)),)), each, env_of(each))
