"""Invariant 60 where it is hard: features far from 0, constant ones, sites of one row, sites without a class."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.naive_bayes import BernoulliNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn_sites import TEN, VALUE, averaged, cut, diabetes, digits, pooled_gap

from polyfed.models import sklearn_statistics

UNEVEN = (1, 36, 3, 160, 200)


def by_class():
    """400 digits in order of their classes: sites have never seen most of them; six columns are constant, one at 7."""
    x, y = digits()
    order = np.argsort(y[:400], kind="stable")
    return np.concatenate([x[:400][order], np.full((400, 1), 7, np.float32)], 1), y[:400][order]


def far(x, offset):
    return (x + np.float32(offset)).astype(np.float32)


@pytest.mark.parametrize(
    "estimator", [GaussianNB(), MultinomialNB(), BernoulliNB(binarize=0.4), ComplementNB()], ids=repr
)
def test_one_round_when_features_lie_near_zero_then_equals_the_pooled_fit(estimator):
    x, y = by_class()
    x = x[:, :64] if isinstance(estimator, GaussianNB) else x
    assert pooled_gap(estimator, x, y, cut(400, UNEVEN), TEN, rounds=1) < 1e-10


def test_bayes_when_features_lie_far_from_zero_then_equals_the_pooled_fit_after_three_rounds():
    x, y = by_class()
    x = far(x, 3000)
    gaps = [pooled_gap(GaussianNB(), x, y, cut(400, UNEVEN), TEN, rounds) for rounds in (1, 3)]
    assert gaps[0] > 1e-8
    assert gaps[1] < 1e-10


@pytest.mark.parametrize("estimator", [LinearRegression(), Ridge()], ids=repr)
def test_least_squares_when_columns_are_constant_equal_and_far_then_equals_the_pooled_fit(estimator):
    x, y = diabetes()
    x = far(np.concatenate([x, x[:, :1], np.full((442, 1), 7)], 1), 1000)
    gaps = [pooled_gap(estimator, x, y, cut(442, (1, 141, 300)), VALUE, rounds) for rounds in (1, 3)]
    assert gaps[0] > 1e-9
    assert gaps[1] < 1e-10


def test_centre_when_it_is_forgotten_then_digits_are_lost(monkeypatch):
    """Mutant: moments about 0 in every round."""
    x, y = by_class()
    monkeypatch.setattr(
        sklearn_statistics,
        "class_means",
        lambda state: state["class_x"] / np.where(state["class"] > 0, state["class"], 1)[:, None],
    )
    monkeypatch.setattr(sklearn_statistics, "about_class_means", _about_zero(sklearn_statistics.about_class_means))
    assert pooled_gap(GaussianNB(), far(x, 3000), y, cut(400, UNEVEN), TEN, rounds=3) > 1e-8


def _about_zero(real):
    return lambda batch, outputs, start: real(batch, outputs, {})


def test_centre_when_all_start_from_one_state_then_is_the_mean_of_all_rows():
    x, y = diabetes()
    _, state = averaged(LinearRegression(), far(x, 50), y, cut(442, (1, 141, 300)), VALUE, rounds=2)
    assert np.allclose(state["center_x"], far(x, 50).mean(axis=0, dtype=np.float64), rtol=1e-12)
    assert np.abs(state["x"]).max() < 1e-11
