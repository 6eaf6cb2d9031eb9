"""`LinearDiscriminantAnalysis` from class shares, class means and the scatter within classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.dummy import DummyClassifier

from polyfed.core.errors import DataError
from polyfed.core.tree import Array, Tree
from polyfed.models.sklearn_estimator import Estimator
from polyfed.models.sklearn_rows import Batch
from polyfed.models.sklearn_statistics import (
    Statistics,
    about_class_means,
    among,
    class_means,
    is_constant,
    seen_classes,
)

RANK = 1e-7  # singular values below are roots of rounding errors, whatever `tol` says


def is_exact(estimator: Estimator) -> bool:
    """Whether scikit-learn's fit is a function of pooled scatter; others need all classes' own, or the rows.

    Not so with ``shrinkage="auto"`` or a `covariance_estimator`, nor with given priors by which "lsqr" and "eigen"
    weight the classes' covariances.
    """
    if estimator.covariance_estimator is not None or isinstance(estimator.shrinkage, str):
        return False
    if estimator.solver == "svd":
        return estimator.shrinkage is None and not (estimator.store_covariance and estimator.priors is not None)
    return estimator.priors is None


def moments(estimator: Estimator, batch: Batch, outputs: int, start: Mapping[str, Array]) -> Mapping[str, Array]:
    del estimator
    x, found = about_class_means(batch, outputs, start)
    share = (batch.weight / batch.weight.sum())[:, None]
    return {**found, "xx": (share * x).T @ x}


def solve(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """As scikit-learn's solvers do, with the eigenvalues of the scatter in place of the singular values of the rows."""
    seen, share = seen_classes(state)
    classes, share = seen if names is None else names[seen], share / share.sum()
    if len(seen) == 1:
        return DummyClassifier(strategy="prior").fit(np.zeros((1, state["xx"].shape[1])), classes)
    means = class_means(state)[seen]
    estimator.means_, estimator.classes_, estimator.n_features_in_ = means, classes, means.shape[1]
    estimator.priors_ = share if estimator.priors is None else among(estimator.priors, seen)
    most = min(len(seen) - 1, means.shape[1])
    estimator._max_components = most if estimator.n_components is None else min(estimator.n_components, most)  # noqa: SLF001  # `transform` reads it
    estimator._n_features_out = estimator._max_components  # noqa: SLF001  # as above
    within = _within(state, seen)
    if estimator.solver == "svd":
        _by_scaling(estimator, within)
        if estimator.store_covariance:
            estimator.covariance_ = within
    else:
        estimator.covariance_ = _shrunk(within, estimator.shrinkage)
        _by_covariance(estimator, within + _between(means, share))
    if len(seen) == 2:
        estimator.coef_ = estimator.coef_[1:] - estimator.coef_[:1]
        estimator.intercept_ = estimator.intercept_[1:] - estimator.intercept_[:1]
    return estimator


def _within(state: Tree, seen: Array) -> Array:
    """Mean over rows of the outer products about the classes' means; exact 0 where a feature is constant in all."""
    total, first = state["class"].sum(), state["class_x"][seen]
    within = (state["xx"] - (first / state["class"][seen][:, None]).T @ first) / total
    largest = np.abs(class_means(state)[seen]).max(axis=0)
    flat = is_constant(np.diagonal(within), np.diagonal(state["xx"]), largest)
    return np.where(flat[:, None] | flat, 0.0, within)


def _between(means: Array, share: Array) -> Array:
    about = means - share @ means
    return np.asarray((about * share[:, None]).T @ about)


def _by_scaling(estimator: Estimator, within: Array) -> None:
    """Solver "svd": whiten within classes, then the directions between them."""
    std = np.sqrt(np.diagonal(within))
    std = np.where(std == 0, 1.0, std)
    size, turned = _axes(within / np.outer(std, std), max(estimator.tol, RANK))
    whiten = turned / std[:, None] / size
    estimator.xbar_ = estimator.priors_ @ estimator.means_
    about = estimator.means_ - estimator.xbar_
    _, spread, turn = np.linalg.svd((np.sqrt(estimator.priors_)[:, None] * about) @ whiten, full_matrices=False)
    kept = int((spread > estimator.tol * spread.max(initial=0.0)).sum())
    estimator.explained_variance_ratio_ = (spread**2 / max((spread**2).sum(), np.finfo(float).tiny))[
        : estimator._max_components  # noqa: SLF001  # set above
    ]
    estimator.scalings_ = whiten @ turn.T[:, :kept]
    coef = about @ estimator.scalings_
    estimator.coef_ = coef @ estimator.scalings_.T
    estimator.intercept_ = np.log(estimator.priors_) - 0.5 * (coef**2).sum(axis=1) - estimator.xbar_ @ estimator.coef_.T


def _axes(matrix: Array, tolerance: float) -> tuple[Array, Array]:
    """Singular values above the tolerance of whatever rows have this scatter, falling; and their axes as columns."""
    values, axes = np.linalg.eigh(matrix)
    values = np.sqrt(np.maximum(values[::-1], 0))
    kept = values > tolerance
    return values[kept], axes[:, ::-1][:, kept]


def _shrunk(covariance: Array, shrinkage: float | None) -> Array:
    if not shrinkage:
        return covariance
    mean = np.trace(covariance) / len(covariance)
    return np.asarray((1 - shrinkage) * covariance + shrinkage * mean * np.eye(len(covariance)))


def _by_covariance(estimator: Estimator, total: Array) -> None:
    """Solvers "lsqr" and "eigen", from the shrunk covariance within classes and the plain one of all rows."""
    means, covariance = estimator.means_, estimator.covariance_
    if estimator.solver == "lsqr":
        estimator.coef_ = np.linalg.lstsq(covariance, means.T)[0].T
    else:
        values, axes = _generalised(_shrunk(total, estimator.shrinkage) - covariance, covariance)
        estimator.explained_variance_ratio_ = (values / values.sum())[: estimator._max_components]  # noqa: SLF001  # set above
        estimator.scalings_ = axes
        estimator.coef_ = means @ axes @ axes.T
    estimator.intercept_ = np.log(estimator.priors_) - 0.5 * (means * estimator.coef_).sum(axis=1)


def _generalised(between: Array, within: Array) -> tuple[Array, Array]:
    from scipy.linalg import LinAlgError, eigh  # numpy's takes one matrix only

    try:
        values, axes = eigh(between, within)
    except LinAlgError as error:
        raise DataError(
            "LinearDiscriminantAnalysis(solver='eigen') cannot invert the scatter within classes; "
            "write solver='svd', or give shrinkage"
        ) from error
    return values[::-1], axes[:, ::-1]


LINEAR_DISCRIMINANT = Statistics(moments, solve)
