"""Scaler, imputer and principal components over sites equal scikit-learn's on all rows."""

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler
from sklearn_sites import VALUE, averaged, cut, diabetes, env_of, rows_of

from polyfed.core.algorithm import Predict
from polyfed.core.checks_model import MODEL_CHECKS, Case, check_model
from polyfed.core.errors import DataError, UsageError
from polyfed.models import sklearn_transformers
from polyfed.models.sklearn import sklearn

PARTS = cut(442, (1, 141, 300))


def with_gaps():
    """The diabetes rows with gaps in two columns, one of which has none at the first two sites, and a constant one."""
    x, y = diabetes()
    x = np.concatenate([x, np.full((442, 1), 7, np.float32)], 1)
    x[2:400:7, 3] = np.nan
    x[300:, 5] = np.nan
    return x, y


def together(estimator, x, y, rounds=1):
    model, theta = averaged(estimator, x, y, PARTS, VALUE, rounds)
    rows = rows_of(x[:5], y[:5])
    return model.export(theta, rows, env_of(rows, VALUE))


def gap(one, other, names):
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    assert all(np.shape(a) == np.shape(b) for a, b in pairs)
    return max(float(np.nanmax(np.abs(np.asarray(a, float) - b), initial=0.0)) for a, b in pairs if b is not None)


@pytest.mark.parametrize(
    "estimator",
    [StandardScaler(), StandardScaler(with_mean=False), StandardScaler(with_std=False)],
    ids=["both", "spread", "mean"],
)
def test_scaler_when_rows_have_gaps_then_equals_the_pooled_fit(estimator):
    x, y = with_gaps()
    pooled = type(estimator)(**estimator.get_params()).fit(x.astype(np.float64))
    made = together(estimator, x, y)
    assert gap(made, pooled, ("mean_", "var_", "scale_", "n_samples_seen_")) < 1e-10
    assert [v is None for v in vars(made).values()] == [vars(pooled)[name] is None for name in vars(made)]
    assert np.allclose(made.transform(x), pooled.transform(x.astype(np.float64)), atol=1e-10, equal_nan=True)


def test_scaler_when_nothing_is_missing_then_counts_rows_once():
    x, y = diabetes()
    made = together(StandardScaler(), x, y)
    assert made.n_samples_seen_ == 442
    assert np.ndim(made.n_samples_seen_) == 0


def test_scaler_when_features_lie_far_from_zero_then_equals_the_pooled_fit_after_three_rounds():
    x, y = with_gaps()
    x = (x + np.float32(10_000)).astype(np.float32)
    pooled = StandardScaler().fit(x.astype(np.float64))
    gaps = [gap(together(StandardScaler(), x, y, rounds), pooled, ("var_", "scale_")) for rounds in (1, 3)]
    assert gaps[0] > 1e-8
    assert gaps[1] < 1e-10


@pytest.mark.parametrize("indicators", [False, True])
def test_imputer_when_a_site_has_all_or_none_of_a_column_then_equals_the_pooled_fit(indicators):
    x, y = with_gaps()
    estimator = SimpleImputer(add_indicator=indicators)
    pooled = SimpleImputer(add_indicator=indicators).fit(x.astype(np.float64))
    made = together(estimator, x, y)
    assert gap(made, pooled, ("statistics_",)) < 1e-10
    assert np.allclose(made.transform(x), pooled.transform(x.astype(np.float64)), atol=1e-10)


@pytest.mark.parametrize("asked", [None, 3, 0.8], ids=str)
@pytest.mark.parametrize("whiten", [False, True])
def test_components_when_found_together_then_equal_the_pooled_fit(asked, whiten):
    x, y = diabetes()
    estimator = PCA(asked, whiten=whiten)
    pooled = PCA(asked, whiten=whiten).fit(x.astype(np.float64))
    made = together(estimator, x, y)
    told = ("components_", "explained_variance_", "explained_variance_ratio_", "mean_", "noise_variance_")
    assert gap(made, pooled, (*told, "singular_values_", "n_components_", "n_samples_")) < 1e-10
    assert np.allclose(made.transform(x), pooled.transform(x.astype(np.float64)), atol=1e-10)
    assert np.allclose(made.get_covariance(), pooled.get_covariance(), atol=1e-10)


def test_components_when_the_mean_is_not_taken_off_then_are_others(monkeypatch):
    """Mutant: axes of the raw second moments."""
    x, y = diabetes()
    monkeypatch.setattr(sklearn_transformers.np, "outer", lambda a, b: np.zeros((len(a), len(b))))
    pooled = PCA(2).fit(x.astype(np.float64) + 1)
    assert gap(together(PCA(2), x + np.float32(1), y), pooled, ("components_",)) > 1e-3


def test_column_when_nobody_has_a_value_then_is_as_scikit_learn_says():
    x, y = diabetes()
    x = np.concatenate([x, np.full((442, 1), np.nan, np.float32)], 1)
    made, pooled = together(StandardScaler(), x, y), StandardScaler()
    with np.errstate(all="ignore"):
        pooled.fit(x.astype(np.float64))
    assert np.isnan(made.mean_[-1]) == np.isnan(pooled.mean_[-1])
    assert gap(made, pooled, ("mean_", "scale_")) < 1e-10


@pytest.mark.parametrize("estimator", [StandardScaler(), PCA(), SimpleImputer()], ids=repr)
@pytest.mark.parametrize("check", MODEL_CHECKS)
def test_transformer_when_checked_then_keeps_the_contract(estimator, check):
    x, y = diabetes()
    rows = rows_of(x[:50], y[:50])
    MODEL_CHECKS[check](Case(sklearn(estimator), rows, env_of(rows, VALUE)))


def test_transformer_when_it_moves_a_global_generator_then_the_checks_say_so(monkeypatch):
    x, y = diabetes()
    rows = rows_of(x[:50], y[:50])
    model = sklearn(StandardScaler())
    fit = type(model).fit

    def stirring(self, *asked):
        np.random.random()  # noqa: NPY002  # the mistake that is to be noticed
        return fit(self, *asked)

    check_model(model, rows, env_of(rows, VALUE))
    monkeypatch.setattr(type(model), "fit", stirring)
    with pytest.raises(AssertionError, match=r"fit left the global generator of .*numpy.* changed"):
        check_model(model, rows, env_of(rows, VALUE))


def test_transformer_when_it_is_asked_too_much_then_says_so():
    x, y = with_gaps()
    rows = rows_of(x, y)
    model = sklearn(StandardScaler())
    assert model.offers == {"params"}
    with pytest.raises(UsageError, match=r"StandardScaler predicts nothing; fit it by pf.federated_transform"):
        model.predict(Predict(), rows, env_of(rows, VALUE))
    with pytest.raises(UsageError, match=r"strategy='median'.* is no function of sums"):
        sklearn(SimpleImputer(strategy="median"))
    with pytest.raises(UsageError, match="missing_values=-1"):
        sklearn(SimpleImputer(missing_values=-1))
    with pytest.raises(UsageError, match="mle"):
        sklearn(PCA("mle"))
    with pytest.raises(DataError, match="PCA cannot sum features that are missing"):
        together(PCA(), x, y)
    with pytest.raises(DataError, match="10 components at most"):
        together(PCA(11), *diabetes())
