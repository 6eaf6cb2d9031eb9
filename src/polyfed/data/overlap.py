"""Public rows that a client is scored on: found before the run, and refused.

What teachers say of a test row would reach the client that is tested on it; its score would say nothing. The rule:

- Compared are raw inputs, before any preprocessing, floats as float32, in all columns that the client has. A public set that
  lacks one of them is not compared: it does not hold the client's rows whole. Columns that the client lacks do not count.
- A held-out row (validation or test) counts when it equals a public row and no training row. One that equals a training row
  too repeats by the nature of its table, such as one of a few categories; `prepare` warns of those.
- Public rows that come from elsewhere are refused from the first such row on. Who knows that equal rows are different cases
  says so: ``pf.Client(..., consents="overlap")``.
- Public rows that clients set aside (``Split(public=)``) are never a client's own held-out rows, as `Parts` are disjoint. Where
  another client's are equal to them (the same patient at two hospitals), a `LeakWarning` says how many.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from polyfed.core.errors import DataError
from polyfed.core.tree import Array
from polyfed.data.split import LeakWarning, Parts
from polyfed.data.table import Raw, is_frame, row_keys, values_of


def check_public_apart(
    name: str, raw: Raw, parts: Parts, public: Raw, *, is_given: bool = True, may_overlap: bool = False
) -> None:
    """Holds a client's validation and test rows against the public ones, by the rule at the head of this file.

    Args:
        name: the client's, for the message.
        raw: all its rows, n of them.
        parts: which are which.
        public: the public rows of all clients, raw.
        is_given: whether they come from elsewhere; False where clients set them aside.
        may_overlap: the client's word that its equal rows are different cases.

    Raises:
        DataError: public rows from elsewhere hold rows that this client is scored on: says how many.
    """
    held_out = {"validation": parts.validation, "test": parts.test}
    if may_overlap or (found := _keys(raw, public)) is None:
        return
    own, theirs = found
    seen = {own[i] for i in np.concatenate([parts.train, parts.public]).tolist()}
    leaked = set(theirs) - seen
    counts = {part: sum(own[i] in leaked for i in rows.tolist()) for part, rows in held_out.items()}
    if not any(counts.values()):
        return
    many = " and ".join(f"{count} of {len(held_out[part])} {part} rows" for part, count in counts.items() if count)
    if is_given:
        raise DataError(
            f"{name}: the public rows hold {many} of this client; its score would say nothing. Leave these rows out of public=, "
            f'or, where equal rows are different cases, write pf.Client({name!r}, ..., consents="overlap")'
        )
    warnings.warn(
        f"{name}: rows that other clients set aside as public equal {many} of this client; if they are the same cases, keep "
        "them at one client",
        LeakWarning,
        stacklevel=3,
    )


def _keys(raw: Raw, public: Raw) -> tuple[list[bytes], list[bytes]] | None:
    """A key for each own row and for each public row; None where the public rows lack some column of the client's."""
    mine, theirs = _columns(raw), _columns(public)
    if any(key not in theirs or theirs[key].shape[1:] != values.shape[1:] for key, values in mine.items()):
        return None
    both = {str(key): _one_kind(values, theirs[key]) for key, values in mine.items()}
    keys = row_keys(Raw(both))
    return keys[: len(raw)], keys[len(raw) :]


def _columns(raw: Raw) -> dict[tuple[str, str], Array]:
    """(input, column) -> (n,) or (n, ...) values; an array is one column without a name."""
    found: dict[tuple[str, str], Any] = {}
    for name, value in raw.inputs.items():
        if is_frame(value):
            found |= {(name, str(c)): values_of(value.iloc[:, i]) for i, c in enumerate(value.columns)}
        else:
            found[name, ""] = value
    return found


def _one_kind(mine: Array, theirs: Array) -> Array:
    """Both one after the other, so that equal values have equal bytes."""
    kinds = {mine.dtype.kind, theirs.dtype.kind}
    dtype: Any = object
    if kinds <= set("biu"):
        dtype = mine.dtype if mine.dtype == theirs.dtype else np.int64
    elif kinds <= set("biuf"):
        dtype = np.float32
    elif kinds == {"M"}:
        dtype = "datetime64[ns]"
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([mine.astype(dtype), theirs.astype(dtype)])
