"""Models whose state is the mean over rows of sufficient statistics, so that one round is exact.

The mean of the clients' states, weighted by their numbers of rows, is the statistics of all rows together. Whatever
is then computed from it equals scikit-learn's fit on the pooled rows, whichever classes a client has never seen.

A moment about 0 loses digits where a feature lies far from 0 against its spread, s: of 16 digits, some
2 log10(mean / s). So moments are taken about a centre that is part of the state: 0 at first, then the means that the
last round found, which all clients start from. Beside this centre a fit looks at the rows alone. One round gives
scikit-learn's fit to 1e-10 for features within a few tens of spreads of 0. For others the second round has the right
centre, and the third no longer adds its small moments to the first one's large ones.

Smoothing and penalty of scikit-learn are per data set, not per row; they need the number of rows, N, which a mean
cannot hold. So each client also sends 1/n in one of `BUCKETS` places chosen by its name: the mean over clients has 1/N
in each place where only one client fell, and N is the inverse of the smallest entry. Without any such place (beyond
some 300 clients) N is underestimated by a small factor, when the data outweigh the smoothing anyway.

What leaves a client: its number of rows and the means of the products that a family sums. Those of one row are that
row, and a class of one row tells that row; noise is a matter of the update's own protection, not of the statistics.
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
NOISE = 64 * float(np.finfo(np.float64).eps)  # relative: what is below is rounding of sums

Moments = Callable[[Estimator, Batch, int, Mapping[str, Array]], Mapping[str, Array]]
Solve = Callable[[Estimator, Tree, Array | None], Estimator]


class Statistics:
    """One family for all; what is summed, and what is computed from it, are two functions.

    Args:
        moments: (estimator, rows, outputs, the state so far; {} for none) -> means over the rows, by name.
        solve: (clone to fill, state, class names) -> fitted estimator.
        offers: words of `polyfed.core.algorithm.Needs`.
        gaps: whether rows may have missing values.
    """

    needs_rows = False

    def __init__(
        self,
        moments: Moments,
        solve: Solve,
        *,
        offers: frozenset[str] = frozenset({"params", "predict", "distill"}),
        gaps: bool = False,
    ) -> None:
        self.moments, self.solve, self.offers, self.gaps = moments, solve, offers, gaps

    def first(self, estimator: Estimator, rows: Rows, env: Env) -> Tree:
        """All zeros: the statistics of no rows."""
        width = matrix(rows).shape[1]
        outputs = env.problem.outputs
        y = np.zeros(1, np.int64) if env.problem.is_classification else np.zeros((1, outputs))
        state = self._state(estimator, Batch(np.zeros((1, width)), y, np.ones(1)), env, {})
        return state.map(np.zeros_like)

    def fit(self, estimator: Estimator, start: Tree, lesson: Lesson, env: Env, settings: Settings) -> tuple[Tree, int]:
        """Rows with soft labels join the client's own."""
        batches = with_own(lesson, env, settings.soft_copies)
        return self._state(estimator, joined(batches), env, start), 0

    def build(
        self, estimator: Estimator, state: Tree, env: Env, settings: Settings, names: Array | None = None
    ) -> Estimator | None:
        del env, settings
        return self.solve(clone(estimator), state, names) if num_rows(state) else None

    def _state(self, estimator: Estimator, batch: Batch, env: Env, start: Mapping[str, Array]) -> Tree:
        if not (np.isfinite(batch.x) | (self.gaps & np.isnan(batch.x))).all():
            kind, what = type(estimator).__name__, "infinite" if self.gaps else "missing or infinite"
            raise DataError(f"{kind} cannot sum features that are {what}: impute first")
        site = np.zeros(BUCKETS)
        site[seed.integer("site", env.client) % BUCKETS] = 1 / batch.weight.sum()
        return Tree({**self.moments(estimator, batch, env.problem.outputs, start), "site": site})


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


def about_class_means(batch: Batch, outputs: int, start: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Rows about the means of their classes as the start has them; and the classes' shares, centres and means."""
    share = _by_class(batch, outputs)
    center = class_means(start) if start else np.zeros((outputs, batch.x.shape[1]))
    x = batch.x - center[batch.y]
    return x, {"class": share.sum(axis=0), "center": center, "class_x": share.T @ x}


def class_means(state: Mapping[str, Array]) -> Array:
    """(classes, features); 0 for a class without rows."""
    share = state["class"][:, None]
    return np.asarray(state["center"] + state["class_x"] / np.where(share > ABSENT, share, np.inf))


def is_constant(variance: Array, about: Array, mean: Array) -> Array:
    """(features,) whether a variance is rounding alone, made of second moments `about` the centre by a subtraction."""
    return np.asarray(variance <= NOISE * about + (NOISE * np.abs(mean)) ** 2)


def gaussian_moments(
    estimator: Estimator, batch: Batch, outputs: int, start: Mapping[str, Array]
) -> Mapping[str, Array]:
    del estimator
    x, found = about_class_means(batch, outputs, start)
    return {**found, "class_xx": _by_class(batch, outputs).T @ x**2}


def gaussian(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """`GaussianNB` from class shares and the classes' first two moments."""
    seen, share = seen_classes(state)
    center, part = class_means(state)[seen], (share / share.sum())[:, None]
    spread = np.maximum(state["class_xx"][seen] / share[:, None] - (state["class_x"][seen] / share[:, None]) ** 2, 0)
    between = (center - (part * center).sum(axis=0)) ** 2
    estimator.epsilon_ = estimator.var_smoothing * (part * (spread + between)).sum(axis=0).max()
    estimator.theta_, estimator.var_ = center, spread + estimator.epsilon_
    estimator.class_count_ = share * num_rows(state)
    priors = estimator.priors
    estimator.class_prior_ = share / share.sum() if priors is None else among(priors, seen)
    estimator.classes_ = seen if names is None else names[seen]
    estimator.n_features_in_ = center.shape[1]
    return estimator


def counted_moments(
    estimator: Estimator, batch: Batch, outputs: int, start: Mapping[str, Array]
) -> Mapping[str, Array]:
    del start
    x = batch.x
    if isinstance(estimator, BernoulliNB):
        x = x if estimator.binarize is None else (x > estimator.binarize).astype(np.float64)
    elif (x < 0).any():
        raise DataError(f"{type(estimator).__name__} counts features: they must not be negative")
    share = _by_class(batch, outputs)
    return {"class": share.sum(axis=0), "class_x": share.T @ x}


def counted(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """`MultinomialNB`, `BernoulliNB`, `ComplementNB`: fitted on one row a class, its mean row with its number of rows."""
    seen, share = seen_classes(state)
    own: dict[str, Any] = {"class_prior": estimator.class_prior}
    binary = isinstance(estimator, BernoulliNB)
    if binary:
        own["binarize"] = estimator.binarize
        estimator.set_params(binarize=None)  # the mean row is between 0 and 1 already
    if estimator.class_prior is not None:
        estimator.set_params(class_prior=among(estimator.class_prior, seen))
    mean_rows = np.clip(state["class_x"][seen] / share[:, None], 0, 1 if binary else None)
    estimator.fit(mean_rows, seen if names is None else np.arange(len(seen)), sample_weight=share * num_rows(state))
    estimator.set_params(**own)
    estimator.classes_ = seen if names is None else names[seen]
    return estimator


def seen_classes(state: Tree) -> tuple[Array, Array]:
    """Numbers of the classes that any client has, and their shares of the rows."""
    seen = np.flatnonzero(state["class"] > ABSENT)
    return seen, state["class"][seen]


def among(priors: Array, seen: Array) -> Array:
    kept = np.asarray(priors, np.float64)[seen]
    return np.asarray(kept / kept.sum())


def least_squares_moments(
    estimator: Estimator, batch: Batch, outputs: int, start: Mapping[str, Array]
) -> Mapping[str, Array]:
    share, x, y = batch.weight / batch.weight.sum(), batch.x, batch.y.reshape(len(batch), outputs)
    found: dict[str, Array] = {}
    if estimator.fit_intercept:  # without one, rows are about 0 and nothing else
        for name, width in (("x", x.shape[1]), ("y", outputs)):
            found[f"center_{name}"] = start[f"center_{name}"] + start[name] if start else np.zeros(width)
        x, y = x - found["center_x"], y - found["center_y"]
        found |= {"x": share @ x, "y": share @ y}
    weighted = x * share[:, None]
    return {**found, "xx": weighted.T @ x, "xy": weighted.T @ y}


def least_squares(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """`LinearRegression` and `Ridge` from the normal equations of the mean."""
    del names
    gram, cross = state["xx"], state["xy"]
    outputs, width = cross.shape[1], len(gram)
    x, y = np.zeros(width), np.zeros(outputs)
    if estimator.fit_intercept:
        x, y = state["center_x"] + state["x"], state["center_y"] + state["y"]
        flat = is_constant(np.diagonal(gram) - state["x"] ** 2, np.diagonal(gram), x)
        gram = np.where(flat[:, None] | flat, 0.0, gram - np.outer(state["x"], state["x"]))
        cross = np.where(flat[:, None], 0.0, cross - np.outer(state["x"], state["y"]))
    alpha = np.broadcast_to(np.asarray(getattr(estimator, "alpha", 0.0), np.float64), outputs) / num_rows(state)
    coef = np.stack([_solved(gram, cross[:, k], float(alpha[k])) for k in range(outputs)])
    intercept = y - coef @ x
    estimator.coef_ = coef[0] if outputs == 1 else coef
    estimator.intercept_ = float(intercept[0]) if outputs == 1 else intercept
    estimator.n_features_in_ = width
    return estimator


def _solved(gram: Array, cross: Array, alpha: float) -> Array:
    if alpha > 0:
        return np.linalg.solve(gram + alpha * np.eye(len(gram)), cross)
    return np.linalg.lstsq(gram, cross, rcond=NOISE)[0]  # the shortest of many solutions, as scikit-learn's


NAIVE_BAYES = Statistics(gaussian_moments, gaussian)
COUNTED_BAYES = Statistics(counted_moments, counted)
LEAST_SQUARES = Statistics(least_squares_moments, least_squares)
