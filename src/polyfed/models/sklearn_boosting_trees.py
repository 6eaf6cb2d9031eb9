"""The trees of LightGBM's text and XGBoost's JSON, checked and written anew.

Both libraries' compiled code follows the numbers in their files without a look. Here each entry that a prediction needs
is read, checked and written from what was read, so that a library never sees a character which this file did not
choose: what the two would read differently (line ends, digits with underscores, names said twice) cannot get past.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from polyfed.core.errors import CorruptError

_LOST = "a tree of this file leads to nodes that are not there"


def _whole(value: object, least: int = 0) -> int:
    """A whole number of 32 bits from its digits, or from JSON; raises `CorruptError`."""
    number = int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]{1,10}", value) else value
    if type(number) is not int or not least <= number < 2**31:
        raise CorruptError(f"{str(value)[:40]!r} stands where it needs a whole number of at least {least}")
    return number


def _number(value: object) -> float:
    """A finite number from its digits, or from JSON; raises `CorruptError`."""
    if isinstance(value, str) and re.fullmatch(r"[-+.0-9eE]{1,40}", value):
        number = float(value)
    elif type(value) in (int, float):
        number = float(value)  # type: ignore[arg-type]  # one of the two
    else:
        number = math.nan
    if not math.isfinite(number):
        raise CorruptError(f"{str(value)[:40]!r} stands where it needs a finite number")
    return number


def _check_children(left: Sequence[int], right: Sequence[int], inner: Iterable[int], nodes: int) -> None:
    """Each node but the first is the child of one before it, as both libraries write them: no circle, no way twice."""
    reached: list[int] = []
    for at in inner:
        for child in (left[at], right[at]):
            if not at < child < nodes:
                raise CorruptError(_LOST)
            reached.append(child)
    if len(set(reached)) != nodes - 1 or len(reached) != nodes - 1:
        raise CorruptError(_LOST)


def _check_features(features: Iterable[int], width: int) -> None:
    if any(not 0 <= feature < width for feature in features):
        raise CorruptError("a tree of this file asks for features that are not there")


# ---------------------------------------------------------------------------------------------- LightGBM

_OBJECTIVES = (
    *("regression", "regression_l1", "huber", "fair", "poisson", "quantile", "mape", "gamma", "tweedie"),
    *("binary", "multiclass", "multiclassova", "cross_entropy", "cross_entropy_lambda"),
)
_WHOLE_OF_NODES = ("split_feature", "decision_type", "left_child", "right_child", "internal_count")
_OF_NODES = (*_WHOLE_OF_NODES, "split_gain", "threshold", "internal_value", "internal_weight")
_OF_LEAVES = ("leaf_value", "leaf_weight", "leaf_count")


def checked_lightgbm(text: str, classes: int | None) -> tuple[str, str]:
    """The same trees, written anew from what was checked, and the objective's name.

    Offsets into the text, the training's settings and the features' own names are left out.

    Raises:
        CorruptError: trees that lead astray, or that do not fit `classes` (None for a regression).
    """
    text = text.partition("end of trees")[0]
    if not all(character == "\n" or character.isprintable() for character in text):
        raise CorruptError("it holds control characters, at some of which LightGBM ends a line")
    head, *trees = re.split("^Tree=[0-9]+$", text, flags=re.MULTILINE)
    said = _lines(head)
    width, outputs = _whole(said["max_feature_idx"]) + 1, _whole(said["num_tree_per_iteration"], 1)
    if outputs != (1 if classes in (None, 2) else classes) or _whole(said["num_class"]) != outputs:
        raise CorruptError(f"{outputs} trees a step do not fit {classes} classes")
    objective = _objective(said["objective"], outputs, classes)
    if len(trees) % outputs or any(len(said[name].split(" ")) != width for name in ("feature_names", "feature_infos")):
        raise CorruptError("its trees or its features are not those that it announces")
    lines = [
        "tree",
        "version=v4",
        f"num_class={outputs}",
        f"num_tree_per_iteration={outputs}",
        f"label_index={_whole(said['label_index'])}",
        f"max_feature_idx={width - 1}",
        f"objective={objective}",
        f"feature_names={' '.join(f'Column_{at}' for at in range(width))}",
        f"feature_infos={' '.join(['none'] * width)}",  # ranges of what was trained on, for no prediction
    ]
    if "average_output" in head.split("\n"):  # what a random forest's trees are
        lines.append("average_output")
    for at, tree in enumerate(trees):
        lines += ["", f"Tree={at}", *(f"{n}={value}" for n, value in _lightgbm_tree(_lines(tree), width).items())]
    return "\n".join([*lines, "", "end of trees", ""]), objective.partition(" ")[0]


def _objective(text: str, outputs: int, classes: int | None) -> str:
    name, *options = text.split(" ")
    kept, counts = [name], []
    for option in options:
        key, _, value = option.partition(":")
        if key == "num_class":
            counts.append(_whole(value))
            kept.append(f"num_class:{counts[-1]}")
        elif key == "sigmoid":
            kept.append(f"sigmoid:{_number(value)!r}")
        elif option == "sqrt":
            kept.append(option)
        else:
            name = ""  # an option that is not known
    if name not in _OBJECTIVES or counts != ([] if outputs == 1 else [outputs]):
        raise CorruptError(f"its objective {text[:80]!r} is unknown or does not fit {classes} classes")
    return " ".join(kept)


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
    leaves = _whole(said["num_leaves"], 1)
    if _whole(said.get("num_cat", "0")) or _whole(said.get("is_linear", "0")):
        raise CorruptError("a tree of this file splits by category or has models in its leaves, which are not read")
    numbers: dict[str, list[int] | list[float]] = {}
    for names, count in ((_OF_NODES, leaves - 1), (_OF_LEAVES, leaves)):
        for name in names if leaves > 1 else ("leaf_value",) if count else ():
            tokens = said.get(name, "").split()
            if len(tokens) != count:
                raise CorruptError("a tree of this file leads to nodes or leaves that are not there")
            is_whole = name in _WHOLE_OF_NODES or name == "leaf_count"
            numbers[name] = [_whole(t, -(2**31)) for t in tokens] if is_whole else [_number(t) for t in tokens]
    if leaves > 1:
        _check_lightgbm(numbers, leaves, width)
    written = {name: " ".join(map(repr, values)) for name, values in numbers.items()}
    return {"num_leaves": str(leaves), "num_cat": "0", **written, "shrinkage": repr(_number(said["shrinkage"]))}


def _check_lightgbm(numbers: Mapping[str, Sequence[Any]], leaves: int, width: int) -> None:
    if any(kind & 1 for kind in numbers["decision_type"]):
        raise CorruptError("a tree of this file splits by category, which is not read")
    if any(kind not in (0, 2, 4, 6, 8, 10) for kind in numbers["decision_type"]):  # default side, kind of missing value
        raise CorruptError("a tree of this file decides in a way that is unknown")
    # ~child is the number of a leaf; for the walk the leaves are numbered behind the nodes
    left, right = ([c if c >= 0 else leaves - 1 + ~c for c in numbers[name]] for name in ("left_child", "right_child"))
    for child in (*numbers["left_child"], *numbers["right_child"]):
        if child >= leaves - 1 or ~child >= leaves:
            what = "nodes" if child >= 0 else "leaves"
            raise CorruptError(f"a tree of this file leads to {what} that are not there")
    _check_children(left, right, range(leaves - 1), 2 * leaves - 1)
    _check_features(numbers["split_feature"], width)


# ---------------------------------------------------------------------------------------------- XGBoost


def checked_xgboost(text: str, classes: int | None) -> str:
    """The same model as JSON, written anew from what was checked.

    Raises:
        CorruptError: trees that lead astray, that do not fit `classes` (None for a regression), or no trees.
    """
    said = json.loads(text)
    learner = said["learner"]
    booster, common = learner["gradient_booster"], learner["learner_model_param"]
    if booster["name"] != "gbtree" or learner["feature_names"] or learner["feature_types"]:
        raise CorruptError(f"a booster {booster['name']!r}, or one of named features, is not read")
    width, outputs = _whole(common["num_feature"], 1), 1 if classes in (None, 2) else int(classes or 1)
    if _whole(common["num_class"]) != (0 if outputs == 1 else outputs) or _whole(common["num_target"]) != 1:
        raise CorruptError(f"its outputs do not fit {classes} classes")
    scores = [_number(score) for score in str(common["base_score"]).strip("[]").split(",")]
    if len(scores) not in (1, outputs):
        raise CorruptError("it starts from more scores than it has outputs")
    model, steps = _xgboost_trees(booster["model"], width, outputs)
    best = learner["attributes"].get("best_iteration")
    if best is not None and _whole(best) >= steps:
        raise CorruptError(f"its best step is {str(best)[:40]}, of {steps}")
    return json.dumps(
        {
            "learner": {
                "attributes": {} if best is None else {"best_iteration": str(_whole(best))},
                "feature_names": [],
                "feature_types": [],
                "gradient_booster": {"model": model, "name": "gbtree"},
                "learner_model_param": {
                    "base_score": f"[{','.join(map(repr, scores))}]"
                    if str(common["base_score"]).startswith("[")
                    else repr(scores[0]),
                    "boost_from_average": str(_whole(common["boost_from_average"])),
                    "num_class": str(_whole(common["num_class"])),
                    "num_feature": str(width),
                    "num_target": "1",
                },
                "objective": _xgboost_objective(learner["objective"], outputs, classes),
            },
            "version": [_whole(part) for part in said["version"]],
        },
        allow_nan=False,
    )


def _xgboost_objective(said: Mapping[str, Any], outputs: int, classes: int | None) -> dict[str, Any]:
    """Its name and its numbers, which the library checks by itself."""
    params = {name: value for name, value in said.items() if name != "name"}
    counts = [_whole(param["num_class"]) for param in params.values() if "num_class" in param]
    is_known = re.fullmatch("(binary|multi|reg|count):[a-z]+", said["name"]) is not None
    if not is_known or said["name"].startswith("multi:") != (outputs > 1) or any(n != outputs for n in counts):
        raise CorruptError(f"its objective {str(said['name'])[:80]!r} is unknown or does not fit {classes} classes")
    kept: dict[str, Any] = {"name": said["name"]}
    for name, param in params.items():
        if not all(re.fullmatch(r"\[?[-+.0-9eE,]{1,400}\]?", value) for value in param.values()):
            raise CorruptError(f"{name[:40]!r} of its objective holds no numbers")
        kept[name] = dict(param)
    return kept


def _xgboost_trees(said: Mapping[str, Any], width: int, outputs: int) -> tuple[dict[str, Any], int]:
    """The booster's trees, and in how many steps they were grown."""
    trees, groups = said["trees"], [_whole(group) for group in said["tree_info"]]
    steps = [_whole(step) for step in said["iteration_indptr"]]
    param = said["gbtree_model_param"]
    if _whole(param["num_trees"]) != len(trees) or len(groups) != len(trees):
        raise CorruptError("its trees are not those that it announces")
    if any(group >= outputs for group in groups):
        raise CorruptError("a tree of this file adds to an output that is not there")
    if not steps or steps[0] != 0 or steps[-1] != len(trees) or sorted(steps) != steps:
        raise CorruptError("its steps are not those of its trees")
    parallel = _whole(param["num_parallel_tree"], 1)
    if any(after - before != parallel * outputs for before, after in pairwise(steps)):
        raise CorruptError("its steps are not those of its trees")
    made = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": str(parallel), "num_trees": str(len(trees))},
        "iteration_indptr": steps,
        "tree_info": groups,
        "trees": [_xgboost_tree(tree, width, number) for number, tree in enumerate(trees)],
    }
    return made, len(steps) - 1


def _xgboost_tree(tree: Mapping[str, Any], width: int, number: int) -> dict[str, Any]:
    param = tree["tree_param"]
    nodes = _whole(param["num_nodes"], 1)
    if (
        _whole(param["size_leaf_vector"]) > 1
        or any(tree["split_type"])
        or tree["categories"]
        or tree["categories_nodes"]
    ):
        raise CorruptError("a tree of this file splits by category or has vectors in its leaves, which are not read")
    whole = {name: [_whole(v, -1) for v in tree[name]] for name in ("left_children", "right_children", "default_left")}
    features = [_whole(v, -(2**31)) for v in tree["split_indices"]]
    reals = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
    real = {name: [_number(v) for v in tree[name]] for name in reals}
    lists = (features, tree["split_type"], *whole.values(), *real.values())
    if _whole(param["num_deleted"]) or any(len(values) != nodes for values in lists):
        raise CorruptError(_LOST)
    if any(side not in (0, 1) for side in whole["default_left"]):
        raise CorruptError("a tree of this file sends missing values nowhere")
    left, right = whole["left_children"], whole["right_children"]
    inner = [at for at in range(nodes) if left[at] != -1]
    if any((left[at] == -1) != (right[at] == -1) for at in range(nodes)):
        raise CorruptError(_LOST)
    _check_children(left, right, inner, nodes)
    _check_features((features[at] for at in inner), width)
    parents = [2**31 - 1] * nodes  # what the library gives the root
    for at in inner:
        parents[left[at]] = parents[right[at]] = at
    return {
        **whole,
        **real,
        "split_indices": [feature if left[at] != -1 else 0 for at, feature in enumerate(features)],
        "split_type": [0] * nodes,
        "parents": parents,
        "id": number,
        **{name: [] for name in ("categories", "categories_nodes", "categories_segments", "categories_sizes")},
        "tree_param": {
            "num_deleted": "0",
            "num_feature": str(width),
            "num_nodes": str(nodes),
            "size_leaf_vector": str(_whole(param["size_leaf_vector"])),
        },
    }
