"""The forms that ``data=`` takes, read into one: `polyfed.data.table.Raw`.

| form | example |
|---|---|
| arrays | ``data=(x, y)`` |
| several inputs | ``data=({"image": a, "record": b}, y)``, or ``data={"image": a, "record": b, "y": y}, target="y"`` |
| DataFrame | ``data=frame, target="disease"`` |
| torch Dataset (map-style), or a DataLoader's | ``data=dataset`` of (x, y) or of dicts |
| tf.data.Dataset | ``data=dataset`` of (x, y) or of dicts, batched or not |
| a function of no arguments that returns one of these | ``data=load``: called where the client runs |

No framework is imported: each is known by the module of its own classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from polyfed.core.errors import DataError, PolyfedError
from polyfed.core.tree import Array
from polyfed.data.split import check_labels
from polyfed.data.table import Raw, is_frame, values_of

TargetOf = str | Sequence[str] | None
FORMS = (
    "give (x, y), a dict of arrays with target=, a DataFrame with target=, a torch Dataset, a tf.data.Dataset, "
    "or a function that returns one of these"
)


def read(
    name: str, data: Any, *, target: TargetOf = None, groups: Any = None, time: Any = None, labelled: bool = True
) -> Raw:
    """One client's rows, whichever form they come in.

    Args:
        name: the client's, for messages.
        data: see the head of this file; a `Raw` is taken as it is.
        target: column (or key of a dict) that is predicted; a list of columns for several regressed targets.
        groups: column or (n,) array: whose row it is. As a column it is no input.
        time: column or (n,) array: when it was. As a column it is no input.
        labelled: whether a target is asked for; False for public rows.

    Raises:
        DataError: names the client, what was found and what to write instead.
    """
    raw = _read(name, data, target, labelled)
    raw = _with_column(name, raw, "groups", groups)
    raw = _with_column(name, raw, "time", time)
    if not len(raw):
        raise DataError(f"{name}: the data has no rows; leave this client out or give it data")
    if raw.target is None:
        if labelled:
            raise DataError(f"{name}: the data has no target; {_ask_target(raw)}")
        return raw
    check_labels(name, raw.target)
    return raw


def read_public(given: Any) -> Raw:
    """The rows of ``public=``, in any form of ``data=`` or as one array; with their labels where there are some.

    Raises:
        DataError: names ``public=``, what was found and what to write instead; also for what a function of the user raises.
    """
    if isinstance(given, str | os.PathLike):
        raise DataError(f"public={str(given)!r} is a path, not rows; give the rows, or a function that reads them")
    try:
        raw = _read("public=", given, None, labelled=False)
    except PolyfedError:
        raise
    except Exception as error:
        if not callable(given):
            raise
        raise DataError(f"public= could not be read: {type(error).__name__}: {error}") from error
    if not len(raw):
        raise DataError("public= has no rows; give some, or let clients set some aside with split=pf.Split(public=0.1)")
    return raw


def rows_for(what: str, given: Any, *, target: TargetOf = None) -> Raw:
    """Rows for a function that public rows are made with: any form of ``data=``, or one array.

    Raises:
        DataError: names `what`, the function that was called.
    """
    return _read(what, given, target, labelled=False)


def _read(name: str, data: Any, target: TargetOf, labelled: bool) -> Raw:
    if isinstance(data, Raw):
        return data if target is None else _target_out(name, data.inputs, target)
    if _is_of(data, "torch.utils.data"):
        return _torch(name, data, target)
    if _is_of(data, "tensorflow") and hasattr(data, "as_numpy_iterator"):
        return _tensorflow(name, data, target)
    if is_frame(data):
        return _target_out(name, {"x": _named_columns(data)}, target)
    if isinstance(data, Mapping):
        return _target_out(name, _arrays(name, data), target)
    if isinstance(data, tuple) and len(data) == 2:
        return _pair(name, data[0], data[1], target)
    if callable(data):
        return _read(name, data(), target, labelled)
    if not labelled and (hasattr(data, "__array__") or isinstance(data, list)):
        return Raw({"x": _array(name, "x", data)})
    if not labelled:
        raise DataError(
            f"{name}: rows of type {type(data).__name__} cannot be read; give an array, or what data= takes"
        )
    raise DataError(f"{name}: data= of type {type(data).__name__} cannot be read; {FORMS}")


def _pair(name: str, x: Any, y: Any, target: TargetOf) -> Raw:
    if target is not None:
        raise DataError(
            f"{name}: both y and target={target!r} are given; write data=(x, y), or data=frame with target="
        )
    values = _array(name, "y", values_of(y) if hasattr(y, "isna") and not is_frame(y) else y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if is_frame(x):
        inputs: Mapping[str, Any] = {"x": _named_columns(x)}
    elif isinstance(x, Mapping):
        inputs = _arrays(name, x)
    else:
        inputs = {"x": _array(name, "x", x)}
    return _whole(name, inputs, values)


def _target_out(name: str, inputs: Mapping[str, Any], target: TargetOf) -> Raw:
    """Parts the target from the inputs: a key of the mapping, or a column of a DataFrame among them."""
    if target is None:
        return _whole(name, inputs, None)
    wanted = [target] if isinstance(target, str) else list(target)
    values, left = [], dict(inputs)
    for column in wanted:
        taken, left = _take_column(name, left, column, "target")
        values.append(taken)
    if not left:
        raise DataError(f"{name}: target={target!r} leaves no inputs")
    return _whole(name, left, values[0] if isinstance(target, str) else np.stack(values, axis=1))


def _take_column(name: str, inputs: Mapping[str, Any], column: str, role: str) -> tuple[Array, dict[str, Any]]:
    if column in inputs and not is_frame(inputs[column]):
        return inputs[column], {key: value for key, value in inputs.items() if key != column}
    for key, value in inputs.items():
        if is_frame(value) and column in value.columns:
            return values_of(value[column]), {**inputs, key: value.drop(columns=column)}
    there = ", ".join(repr(c) for key, v in inputs.items() for c in (v.columns if is_frame(v) else [key]))
    raise DataError(f"{name}: there is no {role} column {column!r}; the columns are {there}")


def _with_column(name: str, raw: Raw, role: str, given: Any) -> Raw:
    if given is None:
        return raw
    inputs = dict(raw.inputs)
    if isinstance(given, str):
        values, inputs = _take_column(name, inputs, given, role)
    else:
        values = _array(name, role, given)
    if values.ndim != 1 or len(values) != len(raw):
        raise DataError(f"{name}: {role}= has shape {values.shape}, expected one value for each of the {len(raw)} rows")
    kept = {"target": raw.target, "groups": raw.groups, "time": raw.time, role: values}
    return Raw(inputs, **kept)


def _whole(name: str, inputs: Mapping[str, Any], target: Array | None) -> Raw:
    try:
        return Raw(inputs, target)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _array(name: str, what: str, value: Any) -> Array:
    """A dense array with rows, or a sentence that says what it is instead."""
    if hasattr(value, "toarray"):  # scipy's sparse matrices
        value = value.toarray()
    if hasattr(value, "detach"):  # a torch tensor, possibly on a device or with gradients
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"{name}: {what} is ragged, its rows have different lengths; pad them to one ({error})"
        ) from None
    if array.ndim == 0:
        raise DataError(f"{name}: {what} is a {type(value).__name__}, not rows; {FORMS}")
    if array.dtype.kind not in "biufOUSMm":
        raise DataError(f"{name}: {what} has dtype {array.dtype}, which no model takes; give real numbers or text")
    return array


def _arrays(name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {str(k): _named_columns(v) if is_frame(v) else _array(name, repr(k), v) for k, v in inputs.items()}


def _named_columns(frame: Any) -> Any:
    """The frame with text as column names and a fresh index."""
    fresh = frame.reset_index(drop=True)
    fresh.columns = [str(column) for column in frame.columns]
    return fresh


def _ask_target(raw: Raw) -> str:
    if any(is_frame(value) for value in raw.inputs.values()) or len(raw.inputs) > 1:
        return f"write target= with one of its columns: {', '.join(map(repr, raw.columns))}"
    return "write data=(x, y)"


def _is_of(value: Any, module: str) -> bool:
    return any(f"{kind.__module__}.".startswith(f"{module}.") for kind in type(value).__mro__)


def _torch(name: str, data: Any, target: TargetOf) -> Raw:
    if hasattr(data, "dataset") and hasattr(
        data, "batch_sampler"
    ):  # a DataLoader: batches are the model's own business
        data = data.dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(f"{name}: {type(data).__name__} is no map-style Dataset; it needs __len__ and __getitem__")
    if tensors := getattr(data, "tensors", None):  # TensorDataset
        return _from_columns(name, [_array(name, f"tensor {i}", t) for i, t in enumerate(tensors)], target)
    return _from_items(name, (data[i] for i in range(len(data))), target)


def _tensorflow(name: str, data: Any, target: TargetOf) -> Raw:
    if int(data.cardinality()) == -1:
        raise DataError(f"{name}: the tf.data.Dataset is infinite; leave out .repeat(), or add .take(n)")
    if _is_batched(data.element_spec):
        data = data.unbatch()
    return _from_items(name, data.as_numpy_iterator(), target)


def _is_batched(spec: Any) -> bool:
    """Batched, unless some component is a single value or the leading sizes differ."""
    parts = [part for item in (spec if isinstance(spec, tuple) else (spec,)) for part in _components(item)]
    shapes = [tuple(part.shape) for part in parts]
    return all(shapes) and len({shape[0] for shape in shapes}) == 1


def _components(item: Any) -> Iterable[Any]:
    return item.values() if isinstance(item, Mapping) else (item,)


def _from_items(name: str, items: Iterable[Any], target: TargetOf) -> Raw:
    """Rows one by one: (x, y), a dict, (dict, y), or x alone."""
    rows = list(items)
    if not rows:
        raise DataError(f"{name}: the data has no rows; leave this client out or give it data")
    first = rows[0]
    if isinstance(first, Mapping):
        return _target_out(name, {k: _stacked(name, str(k), (r[k] for r in rows)) for k in first}, target)
    if isinstance(first, (tuple, list)):
        if len(first) == 2 and isinstance(first[0], Mapping):
            inputs = {k: _stacked(name, str(k), (r[0][k] for r in rows)) for k in first[0]}
            return _pair(name, inputs, _stacked(name, "y", (r[1] for r in rows)), target)
        columns = [_stacked(name, f"item {i}", (r[i] for r in rows)) for i in range(len(first))]
        return _from_columns(name, columns, target)
    return _whole(name, {"x": _stacked(name, "x", rows)}, None)


def _from_columns(name: str, columns: list[Array], target: TargetOf) -> Raw:
    if len(columns) == 1:
        return _whole(name, {"x": columns[0]}, None)
    if len(columns) == 2:
        return _pair(name, columns[0], columns[1], target)
    raise DataError(f"{name}: a row has {len(columns)} items; give (x, y), or dicts of named inputs with target=")


def _stacked(name: str, what: str, values: Iterable[Any]) -> Array:
    arrays = [np.asarray(_text(value)) for value in values]
    if len(shapes := {a.shape for a in arrays}) > 1:
        raise DataError(f"{name}: {what} is ragged, its rows have shapes {sorted(shapes)[:3]}; pad them to one")
    return np.stack(arrays)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value  # TensorFlow's strings are bytes
