"""Transformers from sums: `StandardScaler`, `PCA`, and `SimpleImputer` with means; they predict nothing.

What leaves a client, beside its number of rows: for each feature the share of rows that have it and their mean about
the centre; for the scaler the mean square, for PCA the (features, features) mean of products. See the head of
`sklearn_statistics` for what that tells of few rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import StandardScaler

from polyfed.core.errors import DataError, UsageError
from polyfed.core.tree import Array, Tree
from polyfed.models.sklearn_estimator import Estimator
from polyfed.models.sklearn_rows import Batch
from polyfed.models.sklearn_statistics import ABSENT, Statistics, is_constant, num_rows

OFFERS = frozenset({"params"})


def check(estimator: Estimator) -> None:
    """Raises `UsageError` for settings whose fit is not a function of sums."""
    kind = type(estimator)
    if kind is SimpleImputer and not (estimator.strategy == "mean" and _is_nan(estimator.missing_values)):
        raise UsageError(
            f"SimpleImputer(strategy={estimator.strategy!r}, missing_values={estimator.missing_values!r}) is no function "
            "of sums; write SimpleImputer(), which fills NaN with means"
        )
    if kind is PCA and estimator.n_components == "mle":
        raise UsageError("PCA(n_components='mle') is not computed here; give a number, or a share of the variance")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and bool(np.isnan(value))


def moments(estimator: Estimator, batch: Batch, outputs: int, start: Mapping[str, Array]) -> Mapping[str, Array]:
    del outputs
    share, there = batch.weight / batch.weight.sum(), ~np.isnan(batch.x)
    center = means(start) if start else np.zeros(batch.x.shape[1])
    x = np.where(there, batch.x - center, 0.0)
    found = {"seen": share @ there, "center": center, "x": share @ x}
    if isinstance(estimator, StandardScaler):
        found["xx"] = share @ x**2
    elif isinstance(estimator, PCA):
        found["xx"] = (x * share[:, None]).T @ x
    return found


def means(state: Mapping[str, Array]) -> Array:
    """(features,); 0 where no client has a value."""
    return np.asarray(state["center"] + _each(state, state["x"]))


def _each(state: Mapping[str, Array], shares: Array) -> Array:
    """Means over the rows that have a feature, of means over all rows."""
    return np.asarray(shares / np.where(state["seen"] > ABSENT, state["seen"], np.inf))


def scaler(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    del names
    mean, about = means(state), _each(state, state["xx"])
    variance = np.maximum(about - _each(state, state["x"]) ** 2, 0)
    count = np.rint(state["seen"] * num_rows(state)).astype(np.int64)
    eps = np.finfo(np.float64).eps
    flat = is_constant(variance, about, mean)
    flat |= variance <= count * eps * variance + (count * mean * eps) ** 2  # as scikit-learn judges
    mean, variance = (np.where(count > 0, values, np.nan) for values in (mean, variance))
    estimator.mean_ = mean if estimator.with_mean or estimator.with_std else None
    estimator.var_ = np.where(flat, 0.0, variance) if estimator.with_std else None
    estimator.scale_ = np.where(flat, 1.0, np.sqrt(variance)) if estimator.with_std else None
    estimator.n_samples_seen_ = count[0] if (count == count[0]).all() else count
    estimator.n_features_in_ = len(mean)
    return estimator


def imputer(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """Fitted on two rows that have the same means, and a gap wherever any row has one."""
    del names
    filled = np.where(state["seen"] > ABSENT, means(state), np.nan)
    return estimator.fit(np.stack([filled, np.where(state["seen"] > 1 - ABSENT, filled, np.nan)]))


def components(estimator: Estimator, state: Tree, names: Array | None) -> Estimator:
    """As ``svd_solver="covariance_eigh"``; whatever solver is asked for, this one is exact."""
    del names
    rows, width = round(num_rows(state)), len(state["x"])
    if rows < 2:
        raise DataError("PCA needs two rows, there is one")
    covariance = (state["xx"] - np.outer(state["x"], state["x"])) * (rows / (rows - 1))
    values, axes = np.linalg.eigh(covariance)
    values, axes = np.maximum(values[::-1], 0), axes[:, ::-1].T
    axes = axes * np.sign(axes[np.arange(width), np.abs(axes).argmax(axis=1)])[:, None]
    most = min(rows, width)
    ratio = values / values.sum()
    kept = _kept(estimator.n_components, ratio, most)
    estimator.mean_, estimator.components_ = means(state), axes[:kept].copy()
    estimator.explained_variance_, estimator.explained_variance_ratio_ = values[:kept], ratio[:kept]
    estimator.singular_values_ = np.sqrt(values[:kept] * (rows - 1))
    estimator.noise_variance_ = values[kept:most].mean() if kept < most else 0.0
    estimator.n_components_, estimator.n_samples_, estimator.n_features_in_ = kept, rows, width
    return estimator


def _kept(asked: float | None, ratio: Array, most: int) -> int:
    if asked is None:
        return most
    if 0 < asked < 1:
        return int(np.searchsorted(np.cumsum(ratio[:most]), asked, side="right")) + 1
    if asked > most:
        raise DataError(f"PCA(n_components={asked}): the federation's rows have {most} components at most")
    return int(asked)


SCALER = Statistics(moments, scaler, offers=OFFERS, gaps=True)
IMPUTER = Statistics(moments, imputer, offers=OFFERS, gaps=True)
COMPONENTS = Statistics(moments, components, offers=OFFERS)
FAMILIES = {StandardScaler: SCALER, SimpleImputer: IMPUTER, PCA: COMPONENTS}
