"""Public rows on their way: raw, as they lie at the clients that set them aside, in a form that is numbers and names.

Each client pushes the same raw rows through its own preprocessing, so the schema is that of the source data: column
names, order and kinds. A column travels as one array: numbers as they are (NaN is a gap), text and true/false values
with gaps as codes into a vocabulary (-1 is a gap). Target, groups and time never travel.

What comes back is equal to what went in: values, order, dtypes. A DataFrame's index starts at 0, and None becomes NaN.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polyfed.core.errors import DataError, MalformedError
from polyfed.core.message import Message
from polyfed.core.tree import DTYPES, Array, Tree
from polyfed.data.table import Raw, is_frame, missing_in, pandas, values_of

TREE = "rows"
_PANDAS_DTYPES = re.compile(
    r"object|str|string|category|boolean|U?Int(8|16|32|64)|Float(32|64)|datetime64\[(s|ms|us|ns)\]"
)


def schema(raw: Raw) -> dict[str, str]:
    """Column (of a DataFrame) or input (an array) -> its kind, in order: all that sites must have in common.

    >>> schema(Raw({"x": np.zeros((5, 3), np.float32)}))
    {'x': 'array [3] of numbers'}
    """
    kinds: dict[str, str] = {}
    for name, value in raw.inputs.items():
        if is_frame(value):
            kinds |= {str(c): kind_of(str(c), values_of(value.iloc[:, i])) for i, c in enumerate(value.columns)}
        else:
            words = {"O": "text", "U": "text", "S": "text", "b": "true/false values"}.get(value.dtype.kind, "numbers")
            kinds[name] = f"array {list(value.shape[1:])} of {words}"
    return kinds


def kind_of(column: str, values: Array) -> str:
    """One of "number", "true/false", "text", "date"; "empty" for a column without any value, which fits each of them.

    Raises:
        DataError: a column of objects that are not all of one kind.
    """
    present = values[~missing_in(values)]
    if not len(present):
        return "empty"
    if values.dtype.kind in "biufmM":
        return {"b": "true/false", "M": "date", "m": "date"}.get(values.dtype.kind, "number")
    if all(isinstance(v, (bool, np.bool_)) for v in present):
        return "true/false"
    if all(isinstance(v, str) for v in present):
        return "text"
    if all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool) for v in present):
        return "number"
    raise DataError(
        f"column {column!r} mixes {', '.join(sorted({type(v).__name__ for v in present}))}; make it one kind"
    )


def schema_difference(mine: Mapping[str, str], theirs: Mapping[str, str], *, who: str = "the public rows") -> str:
    """What keeps `theirs` from being read as `mine`, in words; empty when nothing does.

    >>> schema_difference({"age": "number", "sex": "text"}, {"age": "text", "bmi": "number"})
    "the public rows lack column 'sex'; the public rows have column 'bmi' besides; column 'age' holds number here and text there"
    """
    said = [f"{who} lack column {c!r}" for c in mine if c not in theirs]
    said += [f"{who} have column {c!r} besides" for c in theirs if c not in mine]
    for column, kind in mine.items():
        other = theirs.get(column, kind)
        if kind != other and "empty" not in (kind, other):
            said.append(f"column {column!r} holds {kind} here and {other} there")
    if not said and list(mine) != list(theirs):
        said = ["the columns stand in another order"]
    return "; ".join(said)


def concat(raws: Sequence[Raw]) -> Raw:
    """Unlabelled rows of several sites, one after the other in the order given.

    Raises:
        DataError: nothing is given, or the schemas differ: says in which columns.
    """
    if not raws:
        raise DataError("there are no public rows to join")
    first = schema(raws[0])
    for raw in raws[1:]:
        if difference := schema_difference(first, schema(raw), who="another site's rows"):
            raise DataError(f"public rows of two sites cannot be joined: {difference}")
    names = list(raws[0].inputs)
    return Raw({name: _joined([raw.inputs[name] for raw in raws]) for name in names})


def _joined(values: list[Any]) -> Any:
    if not is_frame(values[0]):
        return np.concatenate(values)
    columns = {
        str(c): _joined_columns([values_of(frame.iloc[:, i]) for frame in values])
        for i, c in enumerate(values[0].columns)
    }
    return pandas().DataFrame(columns)


def _joined_columns(parts: list[Array]) -> Array:
    filled = [part for part in parts if not missing_in(part).all()] or parts
    if all(part.dtype.kind in "biufmM" for part in filled) and len({_family(part) for part in filled}) == 1:
        dtype = np.result_type(*filled)
        if len(filled) < len(parts) and dtype.kind in "biu":
            dtype = np.dtype(object if dtype.kind == "b" else np.float64)
        gap = np.datetime64("NaT") if dtype.kind == "M" else np.nan
        return np.concatenate(
            [p.astype(dtype) if any(p is f for f in filled) else np.full(len(p), gap, dtype) for p in parts]
        )
    return np.concatenate([part.astype(object) for part in parts])


def _family(part: Array) -> str:
    return {"b": "b", "M": "M", "m": "m"}.get(part.dtype.kind, "n")


def to_message(raw: Raw) -> Message:
    """Rows without target, groups and time, as arrays and vocabularies.

    Raises:
        DataError: a column that mixes kinds, or an array of objects.
    """
    arrays: dict[str, Array] = {}
    text: dict[str, tuple[str, ...]] = {"inputs": tuple(raw.inputs)}
    for i, (name, value) in enumerate(raw.inputs.items()):
        if is_frame(value):
            text[f"{i}.columns"] = tuple(str(c) for c in value.columns)
            text[f"{i}.dtypes"] = tuple(str(dtype) for dtype in value.dtypes)
            for j, column in enumerate(text[f"{i}.columns"]):
                arrays[f"{i}.{j}"] = _coded(column, value.iloc[:, j], text, f"{i}.{j}")
        elif value.dtype.kind in "OUS":
            text[f"{i}.dtype"] = (str(value.dtype) if value.dtype.kind != "O" else "object",)
            codes = _codes(name, value.ravel(), text, str(i))
            arrays[str(i)] = codes.reshape(value.shape)
        else:
            arrays[str(i)] = value
    return Message(trees={TREE: Tree(arrays)}, numbers={"num_examples": float(len(raw))}, text=text)


def _coded(column: str, series: Any, text: dict[str, tuple[str, ...]], key: str) -> Array:
    values = values_of(series)
    if values.dtype.kind in "mM":
        return values.astype(np.int64)
    if values.dtype.kind != "O":
        return values
    kind = kind_of(column, values)
    if kind == "number":
        return values.astype(np.float64)
    if kind == "true/false":
        return np.array([-1 if gone else int(v) for v, gone in zip(values, missing_in(values), strict=True)], np.int8)
    categories: Any = getattr(series.dtype, "categories", None)
    if categories is not None:
        if any(not isinstance(c, str) for c in categories) or series.dtype.ordered:
            raise DataError(f"column {column!r} has ordered or non-text categories; write .astype(str) first")
        text[key] = tuple(categories)
        return np.asarray(series.cat.codes, np.int32)
    return _codes(column, values, text, key)


def _codes(column: str, values: Array, text: dict[str, tuple[str, ...]], key: str) -> Array:
    gone = missing_in(values)
    if any(not isinstance(v, str) for v in values[~gone]):
        raise DataError(f"{column!r} holds {kind_of(column, values)}s as objects; give it a dtype of numbers or text")
    vocabulary = sorted(set(values[~gone].tolist()))
    text[key] = tuple(vocabulary)
    place = {word: i for i, word in enumerate(vocabulary)}
    return np.array([-1 if g else place[v] for v, g in zip(values.tolist(), gone, strict=True)], np.int32)


def from_message(message: Message) -> Raw:
    """The rows that `to_message` sent; whatever a peer sent otherwise is refused.

    Raises:
        MalformedError: entries, names, codes or lengths do not fit together.
    """
    try:
        tree, names = message.trees[TREE], message.text["inputs"]
        if len(set(names)) < len(names):
            raise MalformedError(f"public rows: an input is named twice in {names}")
        inputs = {name: _value_back(message, tree, str(i)) for i, name in enumerate(names)}
        expected = sum(len(message.text.get(f"{i}.columns", (0,))) for i in range(len(names)))
        if len(tree) != expected:
            raise MalformedError(f"public rows: {len(tree)} arrays for {expected} columns and inputs")
        return Raw(inputs)
    except KeyError as error:
        raise MalformedError(f"public rows: {error} is missing") from None
    except DataError as error:
        raise MalformedError(f"public rows: {error}") from None


def _value_back(message: Message, tree: Tree, key: str) -> Any:
    columns = message.text.get(f"{key}.columns")
    if columns is None:
        array = tree[key]
        if array.ndim == 0:
            raise MalformedError("public rows: an input is a single number, not rows")
        if f"{key}.dtype" not in message.text:
            return np.array(array)
        dtype = "".join(message.text[f"{key}.dtype"])
        if not re.fullmatch(r"object|<U\d{1,6}", dtype):
            raise MalformedError(f"public rows: unknown dtype {dtype[:40]!r}")
        words = _words(array.ravel(), message.text[key]).reshape(array.shape)
        return words if dtype == "object" else words.astype("U")
    dtypes = message.text[f"{key}.dtypes"]
    if len(dtypes) != len(columns) or len(set(columns)) < len(columns):
        raise MalformedError(f"public rows: {len(columns)} columns, some named twice or without a dtype")
    series = [_column_back(tree[f"{key}.{j}"], dtypes[j], message.text.get(f"{key}.{j}")) for j in range(len(columns))]
    if len({len(s) for s in series}) > 1:
        raise MalformedError("public rows: columns differ in length")
    pd = pandas()
    return pd.DataFrame(dict(zip(columns, series, strict=True)))


def _column_back(array: Array, dtype: str, vocabulary: tuple[str, ...] | None) -> Any:
    if array.ndim != 1:
        raise MalformedError(f"public rows: a column has shape {list(array.shape)}, expected one value a row")
    if vocabulary is None and dtype in DTYPES and array.dtype == DTYPES[dtype]:
        return np.array(array)
    if not _PANDAS_DTYPES.fullmatch(dtype):
        raise MalformedError(f"public rows: a column of {array.dtype} says that it is {dtype[:40]!r}")
    if vocabulary is not None:
        return _text_back(array, dtype, vocabulary)
    pd = pandas()
    if dtype.startswith("datetime64") and array.dtype == np.int64:
        return array.view(dtype)
    if array.dtype == np.int8 and dtype in ("object", "boolean"):
        if ((array < -1) | (array > 1)).any():
            raise MalformedError("public rows: a column of true/false values holds other codes than -1, 0, 1")
        values = np.array([np.nan, False, True], object)[array + 1]
        return pd.Series(values, dtype=object if dtype == "object" else pd.BooleanDtype())
    try:
        return pd.Series(array, dtype=dtype if dtype not in ("category", "boolean") else None)
    except (ValueError, TypeError, OverflowError):
        raise MalformedError(f"public rows: a column of {array.dtype} cannot be {dtype}") from None


def _text_back(array: Array, dtype: str, vocabulary: tuple[str, ...]) -> Any:
    pd = pandas()
    if dtype == "category":
        codes = _checked_codes(array, vocabulary)
        if len(set(vocabulary)) < len(vocabulary):
            raise MalformedError("public rows: a category is named twice")
        return pd.Series(pd.Categorical.from_codes(codes, categories=list(vocabulary)))
    if dtype not in ("object", "str", "string"):
        raise MalformedError(f"public rows: text cannot be {dtype}")
    words = _words(array, vocabulary)
    return pd.Series(words, dtype=_text_dtype(pd, dtype))


def _text_dtype(pd: Any, dtype: str) -> Any:
    """A dtype that this pandas has: before version 3, "str" is object."""
    if dtype == "str" and int(pd.__version__.split(".", maxsplit=1)[0]) < 3:
        return object
    return object if dtype == "object" else dtype


def _checked_codes(array: Array, vocabulary: tuple[str, ...]) -> Array:
    if array.dtype.kind != "i" or (len(array) and (array.min() < -1 or array.max() >= len(vocabulary))):
        raise MalformedError(f"public rows: codes lie outside their vocabulary of {len(vocabulary)} words")
    return array


def _words(array: Array, vocabulary: tuple[str, ...]) -> Array:
    words = np.array([*vocabulary, np.nan], dtype=object)
    return np.asarray(words[_checked_codes(array, vocabulary)])
