"""From raw rows to rows that a model sees: a client's own preprocessing, fit on its training part alone.

``preprocess=`` is an ordinary scikit-learn transformer or pipeline, unfitted; or a function of the rows (a DataFrame, an
array, or a dict of them) that returns an array and looks at each row by itself; or, for several inputs, a dict of these by
input name. Without one, numbers pass as they are. This is the one file that imports scikit-learn, inside its functions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from polyfed.core import seed as streams
from polyfed.core.errors import DataError, MissingExtraError
from polyfed.core.rows import Problem, Rows
from polyfed.core.tree import Array
from polyfed.data.problem import encode_target
from polyfed.data.public import schema_difference
from polyfed.data.split import LeakWarning, Parts, duplicates
from polyfed.data.table import Raw, is_frame, missing_in, values_of


@dataclass(frozen=True, eq=False)
class Prepared:
    """One client's rows as its model sees them, and what made them.

    Attributes:
        train, validation, test: labelled rows; None where the split has no such part.
        public: the public rows through this client's own preprocessing, unlabelled; None where there are none.
        fitted: input name -> fitted transformer, function, or None: for rows that come later (`apply`).
        preprocess: what made them, in words: equal words at two clients mean the same preprocessing, each fit on its own rows.
    """

    train: Rows
    validation: Rows | None
    test: Rows | None
    public: Rows | None
    fitted: Mapping[str, Any]
    preprocess: str

    def apply(self, name: str, raw: Raw) -> Rows:
        """Unlabelled rows that come later, such as new patients, through the same fitted preprocessing."""
        return Rows(_inputs(name, raw, self.fitted))


def prepare(
    name: str,
    raw: Raw,
    parts: Parts,
    problem: Problem,
    *,
    preprocess: Any = None,
    public: Raw | None = None,
    seed: int = 0,
) -> Prepared:
    """Fits a client's preprocessing on its training part and applies it to all parts and to the public rows.

    Args:
        name: the client's, for messages and seeds.
        raw: all rows of the client, labelled.
        parts: which rows are which; see `polyfed.data.split.divide`.
        problem: what is predicted, agreed by all clients.
        preprocess: see the head of this file.
        public: the public rows of all clients, raw, in the agreed order.
        seed: the run's; every ``random_state`` in the preprocessing is set from it.

    Returns:
        inputs float32 (int64 for whole numbers other than bytes: token numbers), C-contiguous, in the order of `parts`.

    Raises:
        DataError: text or missing values without a preprocessing, or one that fails: names client and column; public rows
            with other columns than the client's, where its preprocessing cannot read them: names these columns.

    Guarantees: a pure function of its arguments; no value outside the training part has any effect on the training rows
    or on what is fitted. Rows of the validation or test part whose inputs stand in the training part too are warned of
    (`LeakWarning`).
    """
    assert raw.target is not None
    parts.check(name, len(raw))
    _warn_duplicates(name, raw, parts)
    train = raw.take(parts.train)
    assert train.target is not None
    target = encode_target(train.target, problem, client=name)
    fitted = _fit(name, train, target, preprocess, seed)

    def part(index: Array) -> Rows | None:
        if not len(index):
            return None
        rows = raw.take(index)
        assert rows.target is not None
        return Rows(_inputs(name, rows, fitted), encode_target(rows.target, problem, client=name))

    return Prepared(
        train=Rows(_inputs(name, train, fitted), target),
        validation=part(parts.validation),
        test=part(parts.test),
        public=None if public is None or not len(public) else _public(name, raw, public, fitted),
        fitted=fitted,
        preprocess=described(preprocess),
    )


def prepare_unlabelled(name: str, raw: Raw, *, preprocess: Any = None, seed: int = 0) -> tuple[Rows, Mapping[str, Any]]:
    """Fits a preprocessing on unlabelled rows and applies it to them: how a server reads the public rows.

    Returns:
        the rows, and what was fitted, by input name.

    Raises:
        DataError: as `prepare`.
    """
    rows = raw.unlabelled()
    fitted = _fit(name, rows, None, preprocess, seed)
    return Rows(_inputs(name, rows, fitted)), fitted


def tabular(
    *,
    numbers: Literal["median", "mean", "most_frequent"] = "median",
    indicators: bool = True,
    scale: Literal["standard", "robust", "none"] = "standard",
    text: Literal["most_frequent", "missing"] = "most_frequent",
    min_frequency: int | float | None = None,
    drop: tuple[str, ...] = (),
) -> Any:
    """A scikit-learn ColumnTransformer for a DataFrame of numbers, text and true/false values with gaps.

    Args:
        numbers: what a missing number is replaced by.
        indicators: whether a column with gaps also gets a 0/1 column that says where.
        scale: zero mean and unit variance, median and quartiles, or as it is.
        text: what a missing text is replaced by: the most frequent one, or a category of its own.
        min_frequency: categories rarer than this (rows, or a fraction of them) share one column.
        drop: columns to leave out.

    Returns:
        an unfitted transformer; a category that was not seen in training becomes all zeros.
    """
    _sklearn()
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, RobustScaler, StandardScaler

    fill = SimpleImputer(strategy=numbers, add_indicator=indicators, keep_empty_features=True)
    scaler = {"standard": StandardScaler, "robust": RobustScaler, "none": lambda: "passthrough"}[scale]()
    as_text = FunctionTransformer(spelled, feature_names_out="one-to-one")
    gaps = {"strategy": "constant", "fill_value": MISSING} if text == "missing" else {"strategy": "most_frequent"}
    one_hot = OneHotEncoder(
        handle_unknown="infrequent_if_exist" if min_frequency else "ignore",
        min_frequency=min_frequency,
        sparse_output=False,
    )
    return ColumnTransformer(
        [
            ("numbers", make_pipeline(fill, scaler), _Columns(numbers=True, drop=drop)),
            ("text", make_pipeline(as_text, SimpleImputer(**gaps), one_hot), _Columns(numbers=False, drop=drop)),
        ]
    )


MISSING = "(missing)"


@dataclass(frozen=True)
class _Columns:
    """Selects a frame's columns of numbers, or all others, at fit; one without any value there tells nothing and is left out."""

    numbers: bool
    drop: tuple[str, ...]

    def __call__(self, frame: Any) -> list[str]:
        return [
            str(column)
            for column in frame.columns
            if column not in self.drop and _is_number(frame[column]) == self.numbers and not frame[column].isna().all()
        ]


def _is_number(column: Any) -> bool:
    return getattr(column.dtype, "kind", "O") in "iuf"


def spelled(frame: Any) -> Array:
    """(n, columns) objects: text as it is, everything else as its text, NaN where missing."""
    out = np.empty(frame.shape, object)
    for j in range(frame.shape[1]):
        values = values_of(frame.iloc[:, j])
        gone = missing_in(values)
        out[:, j] = [np.nan if g else str(v) for g, v in zip(gone, values.tolist(), strict=True)]
    return out


def described(preprocess: Any) -> str:
    """A preprocessing in words, without memory addresses: the same words in every process."""
    if preprocess is None:
        return "none"
    if isinstance(preprocess, Mapping):
        return "; ".join(f"{key}: {described(value)}" for key, value in preprocess.items())
    if _is_transformer(preprocess):
        text = re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", _whole(preprocess))
        return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", text))
    return str(getattr(preprocess, "__qualname__", type(preprocess).__name__))


def _whole(transformer: Any) -> str:
    """Its text uncut: scikit-learn's own shortens long pipelines, so that different ones could look equal."""
    from sklearn.base import BaseEstimator

    if isinstance(transformer, BaseEstimator):
        return str(transformer.__repr__(N_CHAR_MAX=1 << 30))
    return repr(transformer)


def _is_transformer(value: Any) -> bool:
    return hasattr(value, "fit") and hasattr(value, "transform")


def _sklearn() -> None:
    try:
        import sklearn  # noqa: F401  # only to know whether it is there
    except ImportError:
        raise MissingExtraError("scikit-learn", "sklearn") from None


def _fit(name: str, train: Raw, target: Array | None, preprocess: Any, seed: int) -> dict[str, Any]:
    """A fitted transformer, function or None for each input; "*" -> one function of all inputs."""
    if isinstance(preprocess, Mapping):
        if unknown := [key for key in preprocess if key not in train.inputs]:
            raise DataError(f"{name}: preprocess= names {unknown[0]!r}; the inputs are {', '.join(train.inputs)}")
        steps = {key: preprocess.get(key) for key in train.inputs}
    elif len(train.inputs) > 1 and preprocess is not None:
        if _is_transformer(preprocess):
            raise DataError(
                f"{name}: one transformer cannot take {len(train.inputs)} inputs; "
                f"give preprocess={{{', '.join(f'{key!r}: ...' for key in train.inputs)}}}"
            )
        return {"*": preprocess}
    else:
        steps = dict.fromkeys(train.inputs, preprocess)
    return {key: _fit_one(name, key, train.inputs[key], target, step, seed) for key, step in steps.items()}


def _fit_one(name: str, key: str, rows: Any, target: Array | None, step: Any, seed: int) -> Any:
    if step is None or not _is_transformer(step):
        if step is not None and not callable(step):
            raise DataError(
                f"{name}: preprocess= of type {type(step).__name__} is neither a transformer nor a function"
            )
        return step
    _sklearn()
    from sklearn.base import clone

    fresh = clone(step)
    states = {
        p: streams.integer(seed, name, "preprocess", key, p) for p in fresh.get_params() if p.endswith("random_state")
    }
    if states:
        fresh.set_params(**states)
    try:
        return fresh.fit(rows, target)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: preprocess={type(step).__name__} cannot be fit: {_first_line(error)}") from error


def _public(name: str, raw: Raw, public: Raw, fitted: Mapping[str, Any]) -> Rows:
    """Public rows as this client's model sees them: columns are found by name, and there is no guessing by place."""
    inputs = dict(public.inputs)
    for key, value in raw.inputs.items():
        other: Any = public.inputs.get(key)
        if not (is_frame(value) and is_frame(other)):
            continue
        own, there = list(value.columns), list(other.columns)
        if own != there and set(own) == set(there) and len(own) == len(there):
            inputs[key] = other[own]
        elif own != there and fitted.get(key, "*") is None:
            raise DataError(f"{name}: {_differing(raw, public)}; give public rows with the columns of the clients")
    try:
        return Rows(_inputs(f"{name}: in public=", Raw(inputs), fitted))
    except DataError as error:
        if said := _differing(raw, public):
            raise DataError(f"{error}; {said}") from error
        raise


def _differing(raw: Raw, public: Raw) -> str:
    """How the public rows' inputs and columns differ from the client's by name, in words; empty where they do not."""
    frames, arrays = "a DataFrame", "an array"
    said = []
    for key, value in raw.inputs.items():
        if (other := public.inputs.get(key)) is None:
            said.append(f"the public rows lack input {key!r}")
        elif is_frame(value) != is_frame(other):
            kinds = (frames, arrays) if is_frame(other) else (arrays, frames)
            said.append(f"the public rows are {kinds[0]}, its own are {kinds[1]}")
        elif is_frame(value):
            mine, theirs = ({str(column): "" for column in frame.columns} for frame in (value, other))
            said.append(schema_difference(mine, theirs))
    return "; ".join(words for words in said if words)


def _inputs(name: str, raw: Raw, fitted: Mapping[str, Any]) -> dict[str, Array]:
    if "*" in fitted:
        made = fitted["*"](dict(raw.inputs))
        if not isinstance(made, Mapping):
            raise DataError(f"{name}: preprocess= must return a dict of arrays here, as the client has several inputs")
        return {key: _dense(name, value, len(raw)) for key, value in made.items()}
    if missing := [key for key in fitted if key not in raw.inputs]:
        raise DataError(f"{name}: the rows have no input {missing[0]!r}; they have {', '.join(raw.inputs)}")
    return {key: _transformed(name, raw.inputs[key], step) for key, step in fitted.items()}


def _transformed(name: str, rows: Any, step: Any) -> Array:
    if step is None:
        return _numeric(name, rows)
    try:
        made = step.transform(rows) if _is_transformer(step) else step(rows)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{name}: preprocess={described(step)[:80]} failed: {_first_line(error)}") from error
    return _dense(name, made, len(rows))


def _dense(name: str, made: Any, rows: int) -> Array:
    """What a preprocessing returned, as an array for a model; NaN stays (a boosting may want it), infinity does not."""
    array = np.asarray(made.toarray() if hasattr(made, "toarray") else made)
    if array.ndim == 0 or len(array) != rows:
        raise DataError(f"{name}: preprocess= returned shape {array.shape} for {rows} rows; it must keep every row")
    if array.dtype.kind not in "biuf":
        array = _numbers_of(name, "the result of preprocess=", array)
    return _as_input(name, "the result of preprocess=", array)


def _numbers_of(name: str, what: str, array: Array) -> Array:
    try:
        return array.astype(np.float64)
    except (ValueError, TypeError):
        raise DataError(
            f"{name}: {what} holds text, a model needs numbers; give preprocess=, e.g. pf.tabular()"
        ) from None


def _numeric(name: str, rows: Any) -> Array:
    """Rows without any preprocessing."""
    if is_frame(rows):
        columns = [_numeric_column(name, str(c), values_of(rows.iloc[:, i])) for i, c in enumerate(rows.columns)]
        return np.ascontiguousarray(np.stack(columns, axis=1))
    if rows.dtype.kind not in "biuf":
        rows = _numbers_of(name, "the input", rows)
    array = _as_input(name, "the input", rows)
    if array.dtype.kind == "f" and np.isnan(array).any():
        gone = int(missing_in(array).sum())
        raise DataError(
            f"{name}: values are missing in {gone} of {len(array)} rows; give preprocess=, e.g. SimpleImputer()"
        )
    return array


def _numeric_column(name: str, column: str, values: Array) -> Array:
    advice = "give preprocess=, e.g. pf.tabular()"
    if gone := int(missing_in(values).sum()):
        kind = (
            "text and gaps"
            if values.dtype.kind == "O" and any(isinstance(v, str) for v in values)
            else "missing values"
        )
        raise DataError(f"{name}: column {column!r} holds {kind} ({gone} of {len(values)} missing); {advice}")
    if values.dtype.kind not in "biuf":
        raise DataError(f"{name}: column {column!r} holds {'dates' if values.dtype.kind == 'M' else 'text'}; {advice}")
    return _as_input(name, f"column {column!r}", values.astype(np.float64))


def _as_input(name: str, what: str, array: Array) -> Array:
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        return np.ascontiguousarray(array, np.int64)
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(array, np.float32)
    if np.isinf(numbers).any():
        raise DataError(f"{name}: {what} holds infinite values, or such that are too large for float32")
    return numbers


def _warn_duplicates(name: str, raw: Raw, parts: Parts) -> None:
    held_out = np.concatenate([parts.validation, parts.test])
    count = duplicates(raw, np.concatenate([parts.train, parts.public]), held_out) if len(held_out) else 0
    if count:
        warnings.warn(
            f"{name}: {count} of {len(held_out)} validation and test rows equal a training row in all inputs; if they are the "
            "same case, give groups= so that they stay on one side",
            LeakWarning,
            stacklevel=3,
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
