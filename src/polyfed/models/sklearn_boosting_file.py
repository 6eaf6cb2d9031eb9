"""Fitted LightGBM and XGBoost estimators in files: their own text and JSON, inside one JSON object.

Both libraries' own formats are data. Their compiled code follows the numbers in them without a look, so every tree is
checked here before the library sees it, and parts that only training reads are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfed.core.errors import CorruptError, MissingExtraError, UsageError
from polyfed.core.tree import Array
from polyfed.models.sklearn_boosting import Labelled, library

FORMAT = "polyfed.boosting"
KINDS = {
    "LGBMClassifier": "lightgbm",
    "LGBMRegressor": "lightgbm",
    "XGBClassifier": "xgboost",
    "XGBRegressor": "xgboost",
}
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
    params = {name: value for name, value in said["params"].items() if _is_plain(value)}
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


# ---------------------------------------------------------------------------------------------- LightGBM


def _lightgbm(kind: str, params: Mapping[str, Any], classes: Any, text: str) -> Estimator:
    made = _made(kind, params)
    from lightgbm import Booster
    from sklearn.preprocessing import LabelEncoder

    booster = Booster(model_str=checked_lightgbm(text, None if classes is None else len(classes)))
    made._Booster, made.fitted_ = booster, True  # noqa: SLF001  # LightGBM has no other way back to its estimators
    made._n_features = made._n_features_in = booster.num_feature()  # noqa: SLF001  # as above
    made._best_iteration, made._objective = -1, booster.dump_model()["objective"].partition(" ")[0]  # noqa: SLF001  # as above
    if classes is not None:
        made._classes, made._n_classes, made._le = classes, len(classes), LabelEncoder().fit(classes)  # noqa: SLF001  # as above
    return made


def checked_lightgbm(text: str, classes: int | None) -> str:
    """The same trees, written anew from what was checked: no offsets into the text, none of training's settings."""
    head, *trees = re.split(r"^Tree=\d+$", text.partition("end of trees")[0], flags=re.MULTILINE)
    said = _lines(head)
    width, outputs = int(said["max_feature_idx"]) + 1, int(said["num_tree_per_iteration"])
    if outputs != (1 if classes in (None, 2) else classes) or int(said["num_class"]) != outputs:
        raise CorruptError(f"{outputs} trees a step do not fit {classes} classes")
    if _counts_in(said["objective"]) != ([] if outputs == 1 else [outputs]):
        raise CorruptError(f"its objective {said['objective'][:80]!r} does not fit {classes} classes")
    if len(trees) % outputs or any(len(said[name].split(" ")) != width for name in ("feature_names", "feature_infos")):
        raise CorruptError("its trees or its features are not those that it announces")
    body = [_lightgbm_tree(_lines(tree), width) for tree in trees]
    average = ["average_output"] if "average_output" in head.split("\n") else []  # what a random forest's trees are
    lines = ["tree", *(f"{name}={said[name]}" for name in _HEAD), *average]
    for at, tree in enumerate(body):
        lines += ["", f"Tree={at}", *(f"{name}={value}" for name, value in tree.items())]
    return "\n".join([*lines, "", "end of trees", ""])


_HEAD = (
    "version",
    "num_class",
    "num_tree_per_iteration",
    "label_index",
    "max_feature_idx",
    "objective",
    "feature_names",
    "feature_infos",
)
_OF_NODES = (
    "split_feature",
    "split_gain",
    "threshold",
    "decision_type",
    "left_child",
    "right_child",
    "internal_value",
    "internal_weight",
    "internal_count",
)
_OF_LEAVES = ("leaf_value", "leaf_weight", "leaf_count")


def _counts_in(objective: str) -> list[int]:
    """The number of classes that an objective of several classes says it has."""
    return [int(count) for count in re.findall(r"num_class:(\d+)", objective)]


def _lines(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.split("\n"):
        name, equals, value = line.partition("=")
        if equals and name in found:
            raise CorruptError(f"it says {name[:40]!r} twice")
        if equals:
            found[name] = value
    return found


def _lightgbm_tree(said: Mapping[str, str], width: int) -> dict[str, str]:
    """The entries of a tree that predictions need, checked."""
    leaves = int(said["num_leaves"])
    if int(said.get("num_cat", "0")) or int(said.get("is_linear", "0")):
        raise CorruptError("a tree of this file splits by category or has models in its leaves, which are not read")
    kept = {"num_leaves": str(leaves), "num_cat": "0", "shrinkage": str(float(said["shrinkage"]))}
    numbers: dict[str, list[float]] = {}
    for names, count in ((_OF_LEAVES, leaves), (_OF_NODES, leaves - 1)):
        for name in names:
            tokens = said.get(name, "").split()
            if len(tokens) != count and (leaves > 1 or name == "leaf_value"):
                raise CorruptError("a tree of this file leads to nodes or leaves that are not there")
            kept[name], numbers[name] = " ".join(tokens), [float(token) for token in tokens]
    if leaves == 1:
        return {name: kept[name] for name in ("num_leaves", "num_cat", "leaf_value", "shrinkage")}
    if any(int(kind) & 1 for kind in numbers["decision_type"]):
        raise CorruptError("a tree of this file splits by category, which is not read")
    left, right, feature = (
        np.asarray(kept[name].split(), np.int64) for name in ("left_child", "right_child", "split_feature")
    )
    at = np.arange(leaves - 1)
    for child in (left, right):
        _check_children(at[child >= 0], child[child >= 0], leaves - 1)
        if (~child[child < 0] >= leaves).any():
            raise CorruptError("a tree of this file leads to leaves that are not there")
    _check_features(feature, width)
    return kept


def _check_children(parents: Array, children: Array, nodes: int) -> None:
    """A child stands behind its parent, as both libraries write them: inside the array, and without a circle."""
    if (children <= parents).any() or (children >= nodes).any():
        raise CorruptError("a tree of this file leads to nodes that are not there")


def _check_features(features: Array, width: int) -> None:
    if (features < 0).any() or (features >= width).any():
        raise CorruptError("a tree of this file asks for features that are not there")


# ---------------------------------------------------------------------------------------------- XGBoost


def _xgboost(kind: str, params: Mapping[str, Any], classes: Any, text: str, *, labelled: bool) -> Estimator:
    check_xgboost(json.loads(text), None if classes is None else len(classes))
    made = _made(kind, params)
    made.load_model(bytearray(text.encode()))
    made.set_params(**_made(kind, params).get_params())  # loading has put what training found in their place
    if not labelled:
        return made
    whole = Labelled(_made(kind, params))
    whole.estimator_, whole.classes_, whole.n_features_in_ = made, classes, made.n_features_in_
    return whole


def check_xgboost(said: Mapping[str, Any], classes: int | None) -> None:
    """Raises `CorruptError` for trees that lead astray; models without trees are not read."""
    learner = said["learner"]
    booster, common = learner["gradient_booster"], learner["learner_model_param"]
    if booster["name"] != "gbtree" or learner["feature_names"] or learner["feature_types"]:
        raise CorruptError(f"a booster {booster['name']!r}, or one of named features, is not read")
    model, width = booster["model"], int(common["num_feature"])
    outputs = 1 if classes in (None, 2) else int(classes or 1)
    if int(common["num_class"]) != (0 if outputs == 1 else outputs) or int(common["num_target"]) != 1:
        raise CorruptError(f"its outputs do not fit {classes} classes")
    counts = [int(p["num_class"]) for p in learner["objective"].values() if isinstance(p, dict) and "num_class" in p]
    if learner["objective"]["name"].startswith("multi:") != (outputs > 1) or any(n != outputs for n in counts):
        raise CorruptError(f"its objective does not fit {classes} classes")
    if len(np.atleast_1d(np.asarray(json.loads(common["base_score"].replace("E", "e"))))) not in (1, outputs):
        raise CorruptError("it starts from more scores than it has outputs")
    trees, groups, steps = model["trees"], model["tree_info"], model["iteration_indptr"]
    if int(model["gbtree_model_param"]["num_trees"]) != len(trees) or len(groups) != len(trees):
        raise CorruptError("its trees are not those that it announces")
    if any(group not in range(outputs) for group in groups):
        raise CorruptError("a tree of this file adds to an output that is not there")
    if steps[0] != 0 or steps[-1] != len(trees) or sorted(steps) != steps:
        raise CorruptError("its steps are not those of its trees")
    for tree in trees:
        _check_xgboost_tree(tree, width)


def _check_xgboost_tree(tree: Mapping[str, Any], width: int) -> None:
    param = tree["tree_param"]
    nodes = int(param["num_nodes"])
    if int(param["size_leaf_vector"]) > 1 or any(tree["split_type"]) or tree["categories"] or tree["categories_nodes"]:
        raise CorruptError("a tree of this file splits by category or has vectors in its leaves, which are not read")
    names = ("left_children", "right_children", "split_indices", "split_conditions", "default_left", "parents")
    if nodes < 1 or int(param["num_deleted"]) or any(len(tree[name]) != nodes for name in (*names, "split_type")):
        raise CorruptError("a tree of this file leads to nodes that are not there")
    left, right, feature = (np.asarray(tree[name], np.int64) for name in names[:3])
    at, inner = np.arange(nodes), left != -1
    if ((right == -1) != ~inner).any():
        raise CorruptError("a tree of this file leads to nodes that are not there")
    for child in (left, right):
        _check_children(at[inner], child[inner], nodes)
    _check_features(feature[inner], width)
