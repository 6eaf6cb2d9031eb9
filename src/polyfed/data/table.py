"""Rows of one client as they lie on its disk: before its split, before its preprocessing.

`Raw` holds what the forms of ``data=`` have in common (`polyfed.data.sources` reads them). pandas is
imported only to make a DataFrame: one that is given is known by what it offers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polyfed.core.errors import DataError, MissingExtraError
from polyfed.core.tree import Array


def pandas() -> Any:
    """The module, for whoever makes a DataFrame; raises `MissingExtraError` where it is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtraError("pandas", "sklearn") from None
    return pd


def is_frame(value: Any) -> bool:
    """Whether this is a pandas DataFrame, found without importing pandas."""
    return hasattr(value, "iloc") and hasattr(value, "columns")


@dataclass(frozen=True, eq=False)
class Raw:
    """Rows before preprocessing.

    Attributes:
        inputs: input name -> numpy array with the rows along axis 0, or a DataFrame. One input is called "x".
        target: (n,) or (n, outputs) values as they were given: numbers, booleans or text; None for unlabelled rows.
        groups: (n,) whose row it is: rows of one group never stand on both sides of a split.
        time: (n,) when it was: numbers or datetime64, for a split by time.
    """

    inputs: Mapping[str, Any]
    target: Array | None = None
    groups: Array | None = None
    time: Array | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise DataError("rows need at least one input")
        lengths = {name: len(value) for name, value in self.inputs.items()}
        for name in ("target", "groups", "time"):
            if (value := getattr(self, name)) is not None:
                lengths[name] = len(value)
        if len(set(lengths.values())) > 1:
            raise DataError(f"inputs, target, groups and time differ in their number of rows: {lengths}")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def x(self) -> Any:
        """The one input, an array or a DataFrame; raises `DataError` when there are several."""
        if len(self.inputs) != 1:
            raise DataError(f"there are {len(self.inputs)} inputs, not one: {', '.join(self.inputs)}")
        return next(iter(self.inputs.values()))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of a DataFrame's columns; names of the inputs where they are arrays."""
        return tuple(name for input_name, value in self.inputs.items() for name in columns_of(input_name, value))

    def take(self, index: Array) -> Raw:
        """The rows at these positions, in this order."""
        return Raw(
            {name: rows_of(value, index) for name, value in self.inputs.items()},
            *(None if value is None else value[index] for value in (self.target, self.groups, self.time)),
        )

    def only(self, *names: str) -> Raw:
        """The same rows with these inputs alone: a site that does not own the others; raises `DataError` for unknown names."""
        if unknown := [name for name in names if name not in self.inputs]:
            raise DataError(f"the rows have no input {unknown[0]!r}; they have {', '.join(self.inputs)}")
        return replace(self, inputs={name: self.inputs[name] for name in names})

    def unlabelled(self) -> Raw:
        """The same rows without target, groups and time: all that may leave a client."""
        return replace(self, target=None, groups=None, time=None)


def columns_of(input_name: str, value: Any) -> Iterator[str]:
    if is_frame(value):
        yield from (str(column) for column in value.columns)
    else:
        yield input_name


def rows_of(value: Any, index: Array) -> Any:
    """Rows of an array or a DataFrame at these positions; a frame's index starts again at 0."""
    return value.iloc[index].reset_index(drop=True) if is_frame(value) else value[index]


def values_of(column: Any) -> Array:
    """A DataFrame's column as numpy holds it: numbers and booleans as such, all else as objects with NaN for missing."""
    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.kind in "biufM":
        return np.asarray(column)
    if getattr(dtype, "kind", "O") in "iuf":  # pandas' own nullable numbers
        return np.asarray(column.astype("float64"))
    values = np.array(column, dtype=object)
    values[np.asarray(column.isna(), dtype=bool)] = np.nan
    return values


def missing_in(values: Array) -> Array:
    """(n,) bool: NaN, NaT or None; for rows of several numbers, any of them."""
    if values.dtype.kind in "fcmM":
        gone = np.isnan(values) if values.dtype.kind in "fc" else np.isnat(values)
    elif values.dtype.kind == "O":
        gone = np.array([v is None or v != v for v in values.ravel()], bool).reshape(values.shape)  # noqa: PLR0124  # NaN
    else:
        gone = np.zeros(values.shape, bool)
    return np.asarray(gone if gone.ndim < 2 else gone.reshape(len(gone), -1).any(axis=1))


def row_keys(raw: Raw) -> list[bytes]:
    """One key a row: equal keys mean equal inputs (all NaN are equal)."""
    parts = [_key_matrix(values) for value in raw.inputs.values() for values in _plain(value)]
    joined = np.ascontiguousarray(np.concatenate(parts, axis=1))
    width = joined.shape[1]
    data = joined.tobytes()
    return [data[i * width : (i + 1) * width] for i in range(len(joined))]


def _plain(value: Any) -> list[Array]:
    return [values_of(value.iloc[:, i]) for i in range(value.shape[1])] if is_frame(value) else [value]


def _key_matrix(values: Array) -> Array:
    """(n, bytes) uint8."""
    flat = values.reshape(len(values), -1)
    if flat.dtype.kind in "OUS":  # text by its number; exact within one call, which is all that a comparison needs
        names: dict[str, int] = {}
        codes = [names.setdefault(_spelled(v), len(names)) for v in flat.ravel()]
        flat = np.array(codes, np.int64).reshape(flat.shape)
    elif flat.dtype.kind == "f":
        flat = flat + flat.dtype.type(0)  # -0.0 becomes 0.0
        flat[np.isnan(flat)] = np.nan
    return np.ascontiguousarray(flat).view(np.uint8).reshape(len(flat), -1)


def _spelled(value: Any) -> str:
    return "missing" if value is None or value != value else f"{type(value).__name__}:{value}"  # noqa: PLR0124  # NaN
