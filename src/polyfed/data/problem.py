"""What is predicted, agreed over all clients, and each client's target in those terms.

How a target is read, when nothing is said: text and booleans are classes. Whole numbers are classes if there are at most
`MOST_CLASSES` different ones over all clients. Other floats are a regression, and so are several columns at once. Where
that is not what is meant (a count of 0 to 20 visits), say ``task="regression"`` or ``task="classification"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from polyfed.core.errors import DataError
from polyfed.core.rows import Problem
from polyfed.core.tree import Array
from polyfed.data.split import check_labels

Task = Literal["classification", "regression"]
MOST_CLASSES = 100
_WORDS = {"text": "text", "bool": "true/false values", "number": "numbers"}


def problem_of(
    targets: Mapping[str, Array], *, task: Task | None = None, classes: Sequence[Any] | None = None
) -> Problem:
    """The one problem that all clients' targets fit: the classes are their sorted union.

    Args:
        targets: client name -> (n,) or (n, outputs) values as they were given.
        task: what it is, where the values leave it open.
        classes: all classes in the order of the outputs, where they are known beforehand; then none is collected.

    Raises:
        DataError: clients differ in what they hold (text here, numbers there), or only one class is there.

    >>> problem_of({"north": np.array([0, 1]), "south": np.array([2, 1])}).classes
    ('0', '1', '2')
    """
    if not targets:
        raise DataError("no client has a target; classes cannot be agreed")
    if classes is not None:
        return _classification([_name(value) for value in classes])
    kinds = {client: _kind(client, target) for client, target in targets.items()}
    if len(set(kinds.values())) > 1:
        (one, first), (other, second) = _two_that_differ(kinds)
        raise DataError(
            f"{one}'s target holds {_WORDS[first]}, {other}'s holds {_WORDS[second]}; all clients need the same kind"
        )
    widths = {client: target.shape[1] if target.ndim > 1 else 1 for client, target in targets.items()}
    if len(set(widths.values())) > 1:
        raise DataError(f"clients differ in their number of targets: {widths}")
    if task == "regression" or (task is None and _is_regression(list(targets.values()))):
        if "number" not in kinds.values():
            raise DataError(f"task='regression' needs numbers, the target holds {_WORDS[next(iter(kinds.values()))]}")
        return Problem(None, next(iter(widths.values())))
    values = {value for target in targets.values() for value in _distinct(target)}
    return _classification([_name(value) for value in sorted(values)])


def encode_target(values: Array, problem: Problem, *, client: str = "") -> Array:
    """(n,) int64 class numbers, or (n,) / (n, outputs) float32 values.

    Raises:
        DataError: a class that was not agreed, a missing value, or a number that is not finite.
    """
    check_labels(client or "target", values)
    if problem.classes is None:
        numbers = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(numbers).all():
            raise DataError(f"{client}: the target holds values that are not finite, or too large for float32")
        return numbers
    if values.ndim != 1:
        raise DataError(f"{client}: a target of shape {values.shape} names no classes; give one class a row")
    place = {name: i for i, name in enumerate(problem.classes)}
    found, inverse = np.unique(_sortable(values), return_inverse=True)
    names = [_name(value) for value in found.tolist()]
    if unknown := [name for name in names if name not in place]:
        raise DataError(
            f"{client}: class {unknown[0]!r} is not among the agreed classes {', '.join(map(repr, problem.classes[:20]))}"
        )
    return np.array([place[name] for name in names], np.int64)[inverse.reshape(-1)]


def _classification(names: list[str]) -> Problem:
    if len(set(names)) < 2:
        raise DataError(f"all targets are {names[0]!r}; a classification needs two classes" if names else "no classes")
    if len(set(names)) < len(names):
        raise DataError(f"a class is named twice in {names}")
    return Problem(tuple(names), len(names))


def _kind(client: str, target: Array) -> str:
    check_labels(client, target)
    if target.dtype.kind == "O":
        kinds = {
            "bool" if isinstance(v, (bool, np.bool_)) else "text" if isinstance(v, str) else "number" for v in target
        }
        if len(kinds) > 1:
            raise DataError(f"{client}: the target mixes {' and '.join(sorted(_WORDS[k] for k in kinds))}")
        return kinds.pop()
    return "bool" if target.dtype.kind == "b" else "text" if target.dtype.kind in "US" else "number"


def _two_that_differ(kinds: Mapping[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    first = next(iter(kinds.items()))
    return first, next(item for item in kinds.items() if item[1] != first[1])


def _is_regression(targets: list[Array]) -> bool:
    if any(target.ndim > 1 for target in targets):
        return True
    numeric = [
        t for t in targets if t.dtype.kind in "iuf" or (t.dtype.kind == "O" and not isinstance(t[0], (str, bool)))
    ]
    if not numeric:
        return False
    values = [t.astype(np.float64) for t in numeric]
    if any(bool((v != np.floor(v)).any()) for v in values):
        return True
    return len({x for v in values for x in np.unique(v).tolist()}) > MOST_CLASSES


def _sortable(values: Array) -> Array:
    return values.astype(str) if values.dtype.kind == "O" and isinstance(values[0], str) else values


def _distinct(target: Array) -> list[Any]:
    """Distinct values as Python's own; whole floats as integers, so that 1.0 here and 1 there are one class."""
    values = np.unique(_sortable(target)).tolist()
    return [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, (float, np.floating)) and float(value).is_integer() else str(value)
