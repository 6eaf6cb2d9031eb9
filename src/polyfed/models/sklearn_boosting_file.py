"""Fitted LightGBM and XGBoost estimators in files: their own text and JSON, inside one JSON object.

Both libraries' own formats are data. Their compiled code follows the numbers in them without a look, so that
`sklearn_boosting_trees` checks every tree and writes it anew before the library sees it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfed.core.errors import CorruptError, MissingExtraError, UsageError
from polyfed.models.sklearn_boosting import Labelled, library
from polyfed.models.sklearn_boosting_trees import checked_lightgbm, checked_xgboost

FORMAT = "polyfed.boosting"
KINDS = {
    "LGBMClassifier": "lightgbm",
    "LGBMRegressor": "lightgbm",
    "XGBClassifier": "xgboost",
    "XGBRegressor": "xgboost",
}
MOST_JOBS = 1024  # beyond what a machine can start, both libraries end the process
Estimator = Any


def is_boosted(estimator: Estimator) -> bool:
    """Whether `to_bytes` takes it."""
    return isinstance(estimator, Labelled) or KINDS.get(type(estimator).__name__, "-") == library(estimator)


def to_bytes(estimator: Estimator) -> bytes:
    """The file of a fitted estimator; raises `UsageError` for parameters or labels that are no numbers or texts."""
    inner = estimator.estimator_ if isinstance(estimator, Labelled) else estimator
    is_classifier = hasattr(estimator, "classes_")
    said = {
        "format": FORMAT,
        "kind": type(inner).__name__,
        "params": _told(inner),
        "labelled": isinstance(estimator, Labelled),
        "classes": np.asarray(estimator.classes_).tolist() if is_classifier else None,
        "model": _model_of(inner),
    }
    return json.dumps(said, allow_nan=False).encode()


def from_bytes(data: bytes) -> Estimator:
    """The estimator in a file; raises `UsageError` or `CorruptError` where it is none, or would lead its library astray."""
    said = json.loads(data)
    kind, text = said["kind"], said["model"]
    if said.get("format") != FORMAT or kind not in KINDS or not isinstance(text, str):
        raise CorruptError(f"no file of {FORMAT}, or of an unknown kind")
    classes = None if said["classes"] is None else np.asarray(said["classes"])
    if (classes is None) == kind.endswith("Classifier") or (classes is not None and classes.dtype.kind not in "iuU"):
        raise CorruptError(f"the labels of a {kind} are whole numbers or texts")
    if classes is not None and (classes.ndim != 1 or len(set(classes.tolist())) != len(classes)):
        raise CorruptError(f"the labels of a {kind} are a list of different ones")
    params = {name: value for name, value in said["params"].items() if _is_plain(value)}
    jobs = params.get("n_jobs") or 0
    if not isinstance(jobs, int) or abs(jobs) > MOST_JOBS:
        raise CorruptError(f"n_jobs={jobs!r}: at most {MOST_JOBS} threads are started for a file")
    if KINDS[kind] == "lightgbm":
        return _lightgbm(kind, params, classes, text)
    return _xgboost(kind, params, classes, text, labelled=bool(said["labelled"]))


def _told(estimator: Estimator) -> dict[str, Any]:
    """Declared parameters that differ from the defaults; what training alone reads by keyword is left out."""
    usual = type(estimator)().get_params()
    given = {n: v for n, v in estimator.get_params().items() if n in usual and repr(v) != repr(usual[n])}
    if odd := [name for name, value in given.items() if not _is_plain(value)]:
        raise UsageError(f"this {type(estimator).__name__} cannot be saved: {odd[0]} is no number or text")
    return given


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _model_of(estimator: Estimator) -> str:
    if library(estimator) == "xgboost":
        return bytes(estimator.get_booster().save_raw("json")).decode()
    return str(estimator.booster_.model_to_string())


def _made(kind: str, params: Mapping[str, Any]) -> Estimator:
    from importlib import import_module  # one of two libraries, named in `KINDS`

    try:
        maker = getattr(import_module(KINDS[kind]), kind)
    except ImportError as error:
        raise MissingExtraError(KINDS[kind], "boosting") from error
    known = maker().get_params()
    return maker(**{name: value for name, value in params.items() if name in known})


# ---------------------------------------------------------------------------------------------- the two libraries


def _lightgbm(kind: str, params: Mapping[str, Any], classes: Any, text: str) -> Estimator:
    trees, objective = checked_lightgbm(text, None if classes is None else len(classes))
    made = _made(kind, params)
    from lightgbm import Booster
    from sklearn.preprocessing import LabelEncoder

    booster = Booster(model_str=trees)
    made._Booster, made.fitted_ = booster, True  # noqa: SLF001  # LightGBM has no other way back to its estimators
    made._n_features = made._n_features_in = booster.num_feature()  # noqa: SLF001  # as above
    made._best_iteration, made._objective = -1, objective  # noqa: SLF001  # as above
    if classes is not None:
        made._classes, made._n_classes, made._le = classes, len(classes), LabelEncoder().fit(classes)  # noqa: SLF001  # as above
    return made


def _xgboost(kind: str, params: Mapping[str, Any], classes: Any, text: str, *, labelled: bool) -> Estimator:
    trees = checked_xgboost(text, None if classes is None else len(classes))
    made = _made(kind, params)
    made.load_model(bytearray(trees.encode()))
    made.set_params(**_made(kind, params).get_params())  # loading has put what training found in their place
    if not labelled:
        return made
    whole = Labelled(_made(kind, params))
    whole.estimator_, whole.classes_, whole.n_features_in_ = made, classes, made.n_features_in_
    return whole
