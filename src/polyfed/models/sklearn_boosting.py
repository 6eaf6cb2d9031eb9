"""LightGBM and XGBoost through their scikit-learn interface; neither is imported here.

They take part as forests do: by predictions, and as students of soft labels by weighted copies of rows. What differs:
their threads are not those that scikit-learn's limits reach, LightGBM chooses a layout by a stopwatch unless it is told
one, and `XGBClassifier` knows no labels but 0 to k - 1 with none left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, clone

from polyfed.core.tree import Array

Estimator = Any  # scikit-learn has no types

LIBRARIES = frozenset({"lightgbm", "xgboost"})


def library(estimator: Estimator) -> str:
    """Whose estimator this is, "lightgbm" or "xgboost"; "" for all others, and for a user's subclass."""
    home = type(estimator).__module__.partition(".")[0]
    return home if home in LIBRARIES else ""


def repeatable(estimator: Estimator, prefix: str = "") -> dict[str, Any]:
    """Parameters with which an estimator of these libraries gives the same bits every time, one thread; {} for others.

    What the user has set is kept where it does not decide that.
    """
    home = library(estimator)
    if not home:
        return {}
    told: dict[str, Any] = {"n_jobs": 1}
    if home == "lightgbm":
        told |= {"deterministic": True, "force_row_wise": True}
        told |= {} if {"verbose", "verbosity"} & estimator.get_params().keys() else {"verbose": -1}
    return {prefix + name: value for name, value in told.items()}


class Labelled(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """An `XGBClassifier` of any labels.

    Attributes:
        estimator: unfitted; ``estimator_`` is its fit on the labels' numbers.
    """

    def __init__(self, estimator: Estimator) -> None:
        self.estimator = estimator

    def fit(self, x: Array, y: Array, sample_weight: Array | None = None) -> Labelled:
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self.estimator_ = clone(self.estimator).fit(x, numbers, sample_weight=sample_weight)
        self.n_features_in_ = x.shape[1]
        return self

    def predict_proba(self, x: Array) -> Array:
        return np.asarray(self.estimator_.predict_proba(x))

    def predict(self, x: Array) -> Array:
        return np.asarray(self.classes_[self.predict_proba(x).argmax(axis=1)])


def labelled(estimator: Estimator) -> Estimator:
    """`estimator`, itself or as a pipeline's last step in a `Labelled` where it needs one; changes the pipeline given."""
    steps = getattr(estimator, "steps", None)
    if steps:
        steps[-1] = (steps[-1][0], labelled(steps[-1][1]))
    return Labelled(estimator) if type(estimator).__name__ == "XGBClassifier" and library(estimator) else estimator


def plain(estimator: Estimator) -> Estimator:
    """The fitted `XGBClassifier` itself where its labels are 0 to k - 1 in any case."""
    if isinstance(estimator, Labelled) and np.array_equal(estimator.classes_, np.arange(len(estimator.classes_))):
        return estimator.estimator_
    return estimator
