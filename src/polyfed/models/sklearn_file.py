"""Fitted estimators in files without pickle: the format of skops; for LightGBM and XGBoost their own, as JSON.

Loading builds only what a closed list allows: scikit-learn's own estimators and the few types that their fits hold. A
tree's arrays come from the file and its compiled code does not check them, so they are checked here before it runs.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from sklearn.base import BaseEstimator
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from sklearn.ensemble._forest import BaseForest
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.tree._tree import Tree

from polyfed.core.errors import CorruptError, UsageError
from polyfed.core.tree import Array
from polyfed.models import sklearn_boosting_file as boosting

FORESTS = (BaseForest, GradientBoostingClassifier, GradientBoostingRegressor)

#: What fits of scikit-learn hold beyond what skops trusts by itself: data only, nothing that acts when it is built.
ALLOWED = frozenset(
    {
        "sklearn.tree._tree.Tree",
        "sklearn.utils._bunch.Bunch",
        "polyfed.data.prepare.spelled",  # what `pf.tabular` holds: a pure function, and a choice of columns
        "polyfed.data.prepare._Columns",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.metrics._scorer._PassthroughScorer",
        "sklearn.model_selection._split.KFold",
        "sklearn.model_selection._split.StratifiedKFold",
        "numpy.dtype",
        "scipy.sparse._csr.csr_array",
        "scipy.sparse._csr.csr_matrix",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
        *(
            f"sklearn.gaussian_process.kernels.{name}"
            for name in (
                "CompoundKernel",
                "ConstantKernel",
                "DotProduct",
                "Exponentiation",
                "ExpSineSquared",
                "Matern",
                "Product",
                "RBF",
                "RationalQuadratic",
                "Sum",
                "WhiteKernel",
            )
        ),
    }
)


def to_file(estimator: Any, path: str | PathLike[str]) -> None:
    """Writes a fitted estimator, such as `SklearnModel.export` returns.

    Raises:
        UsageError: it holds types that could not be loaded again (a user's own transformer, a function).
    """
    if boosting.is_boosted(estimator):
        Path(path).write_bytes(boosting.to_bytes(estimator))
        return
    data = skops.io.dumps(estimator, compression=zipfile.ZIP_DEFLATED)
    _refuse(data, f"this {type(estimator).__name__} cannot be saved")
    Path(path).write_bytes(data)


def from_file(path: str | PathLike[str]) -> Any:
    """The estimator in a file of `to_file`, with the same predictions under the same version of scikit-learn.

    Raises:
        UsageError: the file asks for types that are not on the list.
        CorruptError: the file is damaged, or no such file at all.
    """
    data = Path(path).read_bytes()
    try:
        if data[:1] == b"{":  # a file of skops is a zip
            return boosting.from_bytes(data)
        _refuse(data, f"{path} is not loaded")
        made = skops.io.loads(data, trusted=sorted(ALLOWED))
    except UsageError:
        raise
    except CorruptError as error:
        raise CorruptError(f"{path} cannot be read as an estimator: {error}") from error
    except Exception as error:  # a damaged file fails anywhere in zip, JSON or numpy
        raise CorruptError(f"{path} cannot be read as an estimator: {type(error).__name__}: {error}") from error
    _check_trees(made, None, None, set())
    return made


def _refuse(data: bytes, what: str) -> None:
    unknown = sorted(set(skops.io.get_untrusted_types(data=data)) - ALLOWED)
    if not unknown:
        return
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    hint = '; give it algorithm="brute"' if any(name.endswith(("KDTree", "BallTree")) for name in unknown) else ""
    raise UsageError(f"{what}: it holds {', '.join(unknown[:3])}{more}, which cannot be loaded safely{hint}")


def _check_trees(value: Any, width: int | None, outer: int | None, seen: set[int]) -> None:
    """Walks through all that an estimator holds.

    `width`: features of the estimator around a tree; `outer`: of a forest around that, which hands its rows to the
    trees without asking how many features they take.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tree):
        nodes = value.__getstate__()["nodes"]
        _check(nodes, nodes["left_child"] != -1, ("left_child", "right_child", "feature"), width)
    elif isinstance(value, TreePredictor):
        _check(value.nodes, value.nodes["is_leaf"] == 0, ("left", "right", "feature_idx"), width)
        split = value.nodes["bitset_idx"][value.nodes["is_categorical"] != 0]
        if split.size and split.max() >= min(len(value.raw_left_cat_bitsets), len(value.binned_left_cat_bitsets)):
            raise CorruptError("a tree of this file asks for categories that are not there")
    else:
        inside = value.__dict__ if hasattr(value, "__dict__") else value
        if isinstance(value, BaseEstimator):
            own = inside.get("n_features_in_")
            width = min((n for n in (own, outer) if n is not None), default=None)
            outer = own if isinstance(value, FORESTS) else None
        for item in _items(inside):
            _check_trees(item, width, outer, seen)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    return value.flat if isinstance(value, np.ndarray) and value.dtype == object else ()


def _check(nodes: Array, inner: Array, names: tuple[str, str, str], width: int | None) -> None:
    """A child stands behind its parent, as scikit-learn writes them: inside the array, and without a circle."""
    at = np.flatnonzero(inner)
    left, right, feature = (nodes[name][at].astype(np.int64) for name in names)
    if not len(nodes) or any((child <= at).any() or (child >= len(nodes)).any() for child in (left, right)):
        raise CorruptError("a tree of this file leads to nodes that are not there")
    if (feature < 0).any() or (width is not None and (feature >= width).any()):
        raise CorruptError("a tree of this file asks for features that are not there")
