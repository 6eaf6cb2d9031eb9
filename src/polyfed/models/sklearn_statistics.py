"""Naive Bayes and least squares: the state is the mean over rows of sufficient statistics, so one round is exact.

The mean of the clients' states, weighted by their numbers of rows, is the statistics of all rows together. Whatever
is then computed from it equals scikit-learn's fit on the pooled rows, whichever classes a client has never seen. A fit
looks at the rows alone and not at the state it starts from. Moments are raw (only those are linear): features far
from 0 against their spread lose digits, so bring them near it.

Smoothing and penalty of scikit-learn are per data set, not per row; they need the number of rows, N, which a mean
cannot hold. So each client also sends 1/n in one of `BUCKETS` places chosen by its name: the mean over clients has 1/N
in each place where only one client fell, and N is the inverse of the smallest entry. Without any such place (beyond
some 300 clients) N is underestimated by a small factor, when the data outweigh the smoothing anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.naive_bayes import BernoulliNB

from polyfed.core import seed
from polyfed.core.algorithm import Env
from polyfed.core.errors import DataError
from polyfed.core.rows import Rows
from polyfed.core.tree import Array, Tree
from polyfed.models.sklearn_estimator import Estimator, Settings
from polyfed.models.sklearn_rows import Batch, Lesson, joined, matrix, with_own

BUCKETS = 64
ABSENT = 1e-12  # a share of rows below this is rounding of a mean, not a row

Moments = Callable[[Estimator, Batch, int], Mapping[str, Array]]
Solve = Callable[[Estimator, Tree, Array | None], Estimator]


class Statistics:
    """One family for all; what is summed, and what is computed from it, are two functions."""

    offers = frozenset({"params", "predict", "distill"})
    needs_rows = False

    def __init__(self, moments: Moments, solve: Solve) -> None:
        self.moments, self.solve = moments, solve

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree:
        """All zeros: the statistics of no rows."""
        width = matrix(rows).shape[1]
        outputs = env.problem.outputs
        y = np.zeros(1, np.int64) if env.problem.is_classification else np.zeros((1, outputs))
        state = self._state(estimator, Batch(np.zeros((1, width)), y, np.ones(1)), env)
        return state.map(np.zeros_like)

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        """Rows with soft labels join the client's own."""
        del start
        batches = with_own(lesson, env, settings.soft_copies)
        return self._state(estimator, joined(batches), env), 0

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        del env, settings
        return self.solve(clone(estimator), state, names) if num_rows(state) else None

    def _state(self, estimator: Estimator, batch: Batch, env: Env) -> Tree:
        if not np.isfinite(batch.x).all():
            raise DataError(
                f"{type(estimator).__name__} cannot sum features that are missing or infinite: impute first"
            )
        site = np.zeros(BUCKETS)
        site[seed.integer("site", env.client) % BUCKETS] = 1 / batch.weight.sum()
        return Tree({**self.moments(estimator, batch, env.problem.outputs), "site": site})


def num_rows(state: Tree) -> float:
    """N of the rows behind a mean of states, 0 for none: see the head of this file."""
    site = state["site"]
    if site.max() <= 0 or ("class" in state and state["class"].max() <= ABSENT):
        return 0.0
    return float(1 / site[site > 1e-3 * site.max()].min())  # smaller ones are rounding residues of earlier means


def _by_class(batch: Batch, outputs: int) -> Array:
    """(n, classes): a row's share of the total weight, in the column of its class."""
    share = np.zeros((len(batch), outputs))
    share[np.arange(len(batch)), batch.y] = batch.weight / batch.weight.sum()
    return share


def gaussian_moments(estimator: Estimator, batch: Batch, outputs: int) -> Mapping[str, Array]:
    del estimator
    share = _by_class(batch, outputs)
    return {"class": share.sum(axis=0), "class_x": share.T @ batch.x, "class_xx": share.T @ batch.x**2}


def gaussian(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """`GaussianNB` from class shares and the classes' first two moments."""
    seen, share = _seen(state)
    center = state["class_x"][seen] / share[:, None]
    spread = np.maximum(state["class_xx"][seen] / share[:, None] - center**2, 0)
    mean = state["class_x"].sum(axis=0)
    estimator.epsilon_ = estimator.var_smoothing * max((state["class_xx"].sum(axis=0) - mean**2).max(), 0.0)
    estimator.theta_, estimator.var_ = center, spread + estimator.epsilon_
    estimator.class_count_ = share * num_rows(state)
    priors = estimator.priors
    estimator.class_prior_ = share / share.sum() if priors is None else _among(priors, seen)
    estimator.classes_ = seen if names is None else names[seen]
    estimator.n_features_in_ = center.shape[1]
    return estimator


def counted_moments(estimator: Estimator, batch: Batch, outputs: int) -> Mapping[str, Array]:
    x = batch.x
    if isinstance(estimator, BernoulliNB):
        x = x if estimator.binarize is None else (x > estimator.binarize).astype(np.float64)
    elif (x < 0).any():
        raise DataError(f"{type(estimator).__name__} counts features: they must not be negative")
    share = _by_class(batch, outputs)
    return {"class": share.sum(axis=0), "class_x": share.T @ x}


def counted(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """`MultinomialNB`, `BernoulliNB`, `ComplementNB`: fitted on one row a class, its mean row with its number of rows."""
    seen, share = _seen(state)
    own: dict[str, Any] = {"class_prior": estimator.class_prior}
    binary = isinstance(estimator, BernoulliNB)
    if binary:
        own["binarize"] = estimator.binarize
        estimator.set_params(binarize=None)  # the mean row is between 0 and 1 already
    if estimator.class_prior is not None:
        estimator.set_params(class_prior=_among(estimator.class_prior, seen))
    mean_rows = np.clip(state["class_x"][seen] / share[:, None], 0, 1 if binary else None)
    estimator.fit(mean_rows, seen if names is None else np.arange(len(seen)), sample_weight=share * num_rows(state))
    estimator.set_params(**own)
    estimator.classes_ = seen if names is None else names[seen]
    return estimator


def _seen(state: Tree) -> tuple[Array, Array]:
    """Numbers of the classes that any client has, and their shares of the rows."""
    seen = np.flatnonzero(state["class"] > ABSENT)
    return seen, state["class"][seen]


def _among(priors: Array, seen: Array) -> Array:
    kept = np.asarray(priors, np.float64)[seen]
    return np.asarray(kept / kept.sum())


def least_squares_moments(estimator: Estimator, batch: Batch, outputs: int) -> Mapping[str, Array]:
    del estimator
    share, y = batch.weight / batch.weight.sum(), batch.y.reshape(len(batch), outputs)
    weighted = batch.x * share[:, None]
    return {"x": weighted.sum(axis=0), "y": share @ y, "xx": weighted.T @ batch.x, "xy": weighted.T @ y}


def least_squares(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """`LinearRegression` and `Ridge` from the normal equations of the mean."""
    del names
    gram, cross, x, y = state["xx"], state["xy"], state["x"], state["y"]
    if estimator.fit_intercept:
        gram, cross = gram - np.outer(x, x), cross - np.outer(x, y)
    alpha = np.broadcast_to(np.asarray(getattr(estimator, "alpha", 0.0), np.float64), y.shape) / num_rows(state)
    columns = [_solved(gram, cross[:, k], float(alpha[k])) for k in range(len(y))]
    coef = np.stack(columns)
    intercept = y - coef @ x if estimator.fit_intercept else np.zeros(len(y))
    single = len(y) == 1
    estimator.coef_ = coef[0] if single else coef
    estimator.intercept_ = float(intercept[0]) if single else intercept
    estimator.n_features_in_ = len(x)
    return estimator


def _solved(gram: Array, cross: Array, alpha: float) -> Array:
    if alpha > 0:
        return np.linalg.solve(gram + alpha * np.eye(len(gram)), cross)
    return np.linalg.lstsq(gram, cross)[0]  # the shortest solution when features are collinear, as scikit-learn's


NAIVE_BAYES = Statistics(gaussian_moments, gaussian)
COUNTED_BAYES = Statistics(counted_moments, counted)
LEAST_SQUARES = Statistics(least_squares_moments, least_squares)
