"""Public rows that are no patient's: drawn from statistics over all sites, with small cells suppressed.

Each site sends, per class, counts, sums and sums of squares of its numeric columns, counts of its categories, and the
inner products of its standardised columns (`public_statistics`); they are added (`merge_statistics`); rows are drawn
from the sums (`generate_public`; `polyfed.data.noise` has the baselines to set it against): a class, then numbers from a normal distribution with that class's means, deviations and
correlations, cut at 2.5 deviations, then categories and gaps independently. No row leaves a site.

What keeps a single row out of the sums (rules of statistical disclosure control):
- a cell of fewer than `min_count` rows is sent as 0, a category of fewer is not named at all;
- other counts are rounded to a multiple of `min_count` and sums scaled to them, so that differences of cells
  tell nothing about fewer rows;
- numbers are drawn in to the site's 2nd and 98th percentile before they are summed; minimum and maximum are not sent.
This is suppression, not differential privacy: it bounds what can be read from one message, not from many of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyfed.core import seed as streams
from polyfed.core.errors import DataError, MalformedError
from polyfed.core.message import Message
from polyfed.core.rows import Problem
from polyfed.core.tree import Array, Tree
from polyfed.data.problem import encode_target, problem_of
from polyfed.data.public import kind_of
from polyfed.data.sources import TargetOf, rows_for
from polyfed.data.table import Raw, is_frame, missing_in, pandas, values_of

CUT = 2.5  # in standard deviations
MOST_PRODUCTS = 100  # columns: more of them are drawn independently


def public_statistics(
    data: Any, problem: Problem | Sequence[Any], *, target: TargetOf = None, min_count: int = 5
) -> Message:
    """One site's sums, per class; of labelled rows with one DataFrame, or one (n, ...) array of numbers.

    Args:
        data: the site's training rows, a `Raw` or any form of ``data=`` of a client.
        problem: what the sites agreed on, or its classes; a regression counts as one class.
        target: as a client's.
        min_count: the smallest number of rows that may be spoken of.

    Returns:
        float64 trees; entries are called by the column's number, c is the number of classes: "total" {"rows": (c,)},
        "present" (c,) rows with a value, "sums" (2, c) sum and sum of squares, "flags" (2,) whether it has fractions and
        whether it has negative values, "categories" (c, words), "suppressed" (c,) 1 where a cell was held back, "products"
        {"sum", "count": (c, columns, columns)}. Text: columns, kinds, words of each column. Each number of an array's row, such
        as a pixel, is a column.

    Raises:
        DataError: several inputs, dates, or a column that mixes kinds.

    Guarantees: every number in it speaks of `min_count` rows or more, every word stands in as many.

    Each site makes its message; whoever merges them draws the rows and gives them as ``public=``:

    >>> x = np.arange(40.0).reshape(20, 2)
    >>> north, south = (x, np.arange(20) % 2), (x + 1, np.arange(20) // 10)
    >>> merged = merge_statistics([public_statistics(site, [0, 1]) for site in (north, south)])
    >>> public = generate_public(merged, 6)  # then FedMD(public=public)
    >>> public.x.shape
    (6, 2)
    """
    if min_count < 2:
        raise DataError(f"min_count={min_count}: a cell of one row is that row; use at least 2, better 5")
    raw = rows_for("public_statistics", data, target=target)
    if not isinstance(problem, Problem):
        problem = problem_of({"public_statistics": _labels(raw)}, classes=list(problem))
    names, columns, form = _columns(raw)
    member = _membership(raw, problem)
    kinds = [kind_of(name, column) for name, column in zip(names, columns, strict=True)]
    if "date" in kinds:
        raise DataError(f"column {names[kinds.index('date')]!r} holds dates; leave it out, or turn it into numbers")
    numbers = {str(i): c.astype(np.float64) for i, c in enumerate(columns) if kinds[i] == "number"}
    tables = {
        str(i): _categories(c, member, min_count) for i, c in enumerate(columns) if kinds[i] in ("text", "true/false")
    }
    counts = {str(i): member @ ~missing_in(c) for i, c in enumerate(columns)}
    return Message(
        trees={
            "total": Tree({"rows": _rounded(member.sum(axis=1), min_count)}),
            "present": Tree({i: _rounded(count, min_count) for i, count in counts.items()}),
            "sums": Tree({i: _sums(_drawn_in(values), member, min_count) for i, values in numbers.items()}),
            "flags": Tree({i: _flags(values, min_count) for i, values in numbers.items()}),
            "categories": Tree({i: table for i, (_, table) in tables.items()}),
            "suppressed": Tree({i: _float((c > 0) & (c < min_count)) for i, c in counts.items()}),
            "products": Tree(_products(numbers, len(names), member, min_count)),
        },
        text={"columns": names, "kinds": tuple(kinds), "form": form, **{i: words for i, (words, _) in tables.items()}},
    )


def merge_statistics(messages: Sequence[Message]) -> Message:
    """The sums over sites; categories are joined by their words, a column without values at a site adds nothing.

    Raises:
        DataError: sites differ in columns or kinds: says which.
        MalformedError: a message is none of `public_statistics`.
    """
    if not messages:
        raise DataError("there are no statistics to merge")
    for message in messages:
        _check(message)
    first = messages[0].text
    for message in messages[1:]:
        if len(message.trees["total"]["rows"]) != len(messages[0].trees["total"]["rows"]):
            raise DataError("sites differ in their number of classes; agree on them with problem_of first")
        if (message.text["columns"], message.text["form"]) != (first["columns"], first["form"]):
            raise DataError(
                f"sites differ in their columns: {', '.join(first['columns'])}; {', '.join(message.text['columns'])}"
            )
    names = first["columns"]
    kinds = tuple(_one_kind(name, {m.text["kinds"][i] for m in messages}) for i, name in enumerate(names))
    plain = ("total", "present", "sums", "flags", "suppressed", "products")
    trees = {name: _added([m.trees[name] for m in messages]) for name in plain}
    words = {i: tuple(sorted({w for m in messages for w in m.text.get(i, ())})) for i in map(str, range(len(names)))}
    joined = {i: sum(_spread(m, i, words[i]) for m in messages if i in m.trees["categories"]) for i in words}
    trees["categories"] = Tree({i: table for i, table in joined.items() if not isinstance(table, int)})
    text = {"columns": names, "kinds": kinds, "form": first["form"]}
    return Message(trees=trees, text={**text, **{i: words[i] for i in trees["categories"]}})


def generate_public(merged: Message, rows: int, *, seed: int = 0) -> Raw:
    """Unlabelled rows drawn from merged statistics, in the schema of the sites' own rows; a pure function of its arguments.

    Args:
        merged: what `merge_statistics` returned.
        rows: how many.
        seed: of these rows.

    Raises:
        DataError: every class was suppressed at every site, or rows are given where statistics are expected.
    """
    check_merged("generate_public", merged)
    total = merged.trees["total"]["rows"]
    if not total.sum():
        raise DataError("every class has fewer rows than min_count at every site; no public rows can be drawn")
    rng = streams.rng(seed, "public", "synthetic")
    of_class = rng.choice(len(total), size=rows, p=total / total.sum())
    numbers = _numbers(merged, of_class, rng)
    columns: list[Array] = []
    for i, kind in enumerate(merged.text["kinds"]):
        values = numbers.get(str(i)) if kind == "number" else _words(merged, str(i), kind, of_class, rng)
        columns.append(_with_gaps(values, merged, str(i), of_class, rng))
    return as_sites_have_it(merged, columns)


def check_merged(what: str, merged: Any) -> None:
    """Raises `DataError` for rows: their statistics are what leaves a site."""
    if not isinstance(merged, Message):
        raise DataError(
            f"{what} draws from statistics, not from a {type(merged).__name__}: "
            "give merge_statistics([public_statistics(rows, classes), ...]), one of each site"
        )


def as_sites_have_it(merged: Message, columns: Sequence[Array]) -> Raw:
    """(rows,) columns in the form of the sites' own rows: a DataFrame, or an array of their shape, float32."""
    form, input_name, *shape = merged.text["form"]
    if form == "array":
        table = np.stack(columns, axis=1).astype(np.float32)
        return Raw({input_name: table.reshape(len(table), *map(int, shape))})
    return Raw({input_name: pandas().DataFrame(dict(zip(merged.text["columns"], columns, strict=True)))})


def _columns(raw: Raw) -> tuple[tuple[str, ...], list[Array], tuple[str, ...]]:
    """Names, (n,) columns, and the form: "frame" or "array", the input's name, and the shape of an array's row."""
    rows, name = raw.x, next(iter(raw.inputs))
    if is_frame(rows):
        return (
            tuple(map(str, rows.columns)),
            [values_of(rows.iloc[:, i]) for i in range(rows.shape[1])],
            ("frame", name),
        )
    if rows.ndim < 2 or rows.dtype.kind not in "iuf":
        raise DataError(
            f"statistics need a DataFrame or an (n, columns) array of numbers, got {rows.dtype}{list(rows.shape)}"
        )
    flat = rows.reshape(len(rows), -1)
    return tuple(map(str, range(flat.shape[1]))), list(flat.T), ("array", name, *map(str, rows.shape[1:]))


def _membership(raw: Raw, problem: Problem) -> Array:
    """(classes, n) bool as float64: whose row it is."""
    labels = _labels(raw)
    if problem.classes is None:
        return np.ones((1, len(raw)))
    return _float(np.arange(problem.outputs)[:, None] == encode_target(labels, problem)[None, :])


def _labels(raw: Raw) -> Array:
    if raw.target is None:
        raise DataError("statistics per class need labelled rows: give (x, y), or a DataFrame with target=")
    return raw.target


def _float(values: Array) -> Array:
    return np.asarray(values, np.float64)


def _rounded(counts: Array, min_count: int) -> Array:
    """0 below `min_count`, else the nearest multiple of it."""
    counts = _float(counts)
    return np.where(counts < min_count, 0.0, np.floor(counts / min_count + 0.5) * min_count)


def _scaled(sums: Array, counts: Array, min_count: int) -> Array:
    """Sums over `counts` rows as if there were the rounded number of them; 0 where the cell is suppressed."""
    return sums * (_rounded(counts, min_count) / np.maximum(counts, 1))


def _drawn_in(values: Array) -> Array:
    present = values[~np.isnan(values)]
    return np.clip(values, *np.quantile(present, [0.02, 0.98])) if len(present) else values


def _sums(values: Array, member: Array, min_count: int) -> Array:
    known = _float(~np.isnan(values))
    filled = np.nan_to_num(values)
    return _scaled(np.stack([member @ filled, member @ filled**2]), member @ known, min_count)


def _flags(values: Array, min_count: int) -> Array:
    known = values[~np.isnan(values)]
    return _float(np.array([(known != np.floor(known)).sum(), (known < 0).sum()]) >= min_count)


def _categories(column: Array, member: Array, min_count: int) -> tuple[tuple[str, ...], Array]:
    """(words, (classes, words) rounded counts), of the words that some class has `min_count` times."""
    gone = missing_in(column)
    texts = np.array(["" if g else str(v) for v, g in zip(column.tolist(), gone, strict=True)], object)
    words = sorted(set(texts[~gone].tolist()))
    table = np.array([_rounded(member @ ((texts == word) & ~gone), min_count) for word in words])
    kept = [i for i, row in enumerate(table) if row.any()]
    return tuple(words[i] for i in kept), table[kept].T.reshape(len(member), len(kept))


def _products(numbers: dict[str, Array], width: int, member: Array, min_count: int) -> dict[str, Array]:
    """Σ z zᵀ per class over rows that have both values, z standardised within the class at this site."""
    classes = len(member)
    if width > MOST_PRODUCTS or not numbers:
        return {}
    out = {name: np.zeros((classes, width, width)) for name in ("sum", "count")}
    at = np.array([int(i) for i in numbers])
    values = np.stack([_drawn_in(v) for v in numbers.values()])
    for k in range(classes):
        mine = values[:, member[k] > 0]
        known = ~np.isnan(mine)
        n = np.maximum(known.sum(axis=1, keepdims=True), 1)
        centred = np.where(known, mine - np.where(known, mine, 0).sum(axis=1, keepdims=True) / n, 0.0)
        sd = np.sqrt((centred**2).sum(axis=1, keepdims=True) / n)
        z = np.divide(centred, sd, out=np.zeros_like(centred), where=sd > 0)
        both = _float(known) @ _float(known).T
        out["sum"][k][np.ix_(at, at)] = _scaled(z @ z.T, both, min_count)
        out["count"][k][np.ix_(at, at)] = _rounded(both, min_count)
    return out


def _check(message: Message) -> None:
    """Raises `MalformedError` unless every tree has the shapes that `public_statistics` gives it, and finite values."""
    try:
        text, trees = message.text, message.trees
        width, classes = len(text["columns"]), len(trees["total"]["rows"])
        shapes = {
            "total": {"rows": (classes,)},
            "present": {str(i): (classes,) for i in range(width)},
            "suppressed": {str(i): (classes,) for i in range(width)},
            "sums": dict.fromkeys(trees["sums"], (2, classes)),
            "flags": dict.fromkeys(trees["sums"], (2,)),
            "categories": {i: (classes, len(text[i])) for i in trees["categories"]},
            "products": {i: (classes, width, width) for i in ("sum", "count") if len(trees["products"])},
        }
        for name, entries in shapes.items():
            if {i: a.shape for i, a in trees[name].items()} != entries or not trees[name].is_finite():
                raise MalformedError(
                    f"public statistics: tree {name!r} has other entries, shapes or values than it must have"
                )
        fits = len(text["kinds"]) == width and set(trees["sums"]) <= set(trees["present"])
        if not fits or not _is_form(text["form"], width):
            raise MalformedError("public statistics: columns, kinds and trees do not fit together")
    except (KeyError, TypeError) as error:
        raise MalformedError(f"public statistics: {error} is missing") from None


def _is_form(form: tuple[str, ...], width: int) -> bool:
    kind, shape = form[:1], form[2:]
    if kind == ("array",) and shape and all(size.isascii() and size.isdigit() and len(size) < 10 for size in shape):
        return math.prod(map(int, shape)) == width
    return kind == ("frame",) and len(form) == 2


def _one_kind(column: str, kinds: set[str]) -> str:
    if len(known := kinds - {"empty"}) > 1:
        raise DataError(f"column {column!r} holds {' at one site, '.join(sorted(known))} at another")
    return known.pop() if known else "empty"


def _added(trees: list[Tree]) -> Tree:
    names = dict.fromkeys(name for tree in trees for name in tree)
    return Tree({name: np.sum([tree[name] for tree in trees if name in tree], axis=0) for name in names})


def _spread(message: Message, entry: str, words: tuple[str, ...]) -> Array:
    table = message.trees["categories"][entry]
    out = np.zeros((len(table), len(words)))
    out[:, [words.index(word) for word in message.text[entry]]] = table
    return out


@dataclass(frozen=True)
class _Law:
    """(classes,) mean and deviation of one column; a class without values follows all of them."""

    mean: Array
    sd: Array


def _law(merged: Message, entry: str) -> _Law | None:
    n, (total, squares) = merged.trees["present"][entry], merged.trees["sums"][entry]
    if not n.sum():
        return None
    own = n > 0
    count = np.where(own, n, n.sum())
    mean = np.where(own, total, total.sum()) / count
    return _Law(mean, np.sqrt(np.maximum(np.where(own, squares, squares.sum()) / count - mean**2, 0.0)))


def _numbers(merged: Message, of_class: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Column number -> (rows,) values; columns that were suppressed everywhere are absent."""
    entries = list(merged.trees["sums"])
    z = np.empty((len(of_class), len(entries)))
    for k in np.unique(of_class):
        mine = of_class == k
        drawn = rng.standard_normal((int(mine.sum()), len(entries)))
        z[mine] = drawn @ _root(_correlation(merged, entries, k)).T if len(merged.trees["products"]) else drawn
    out: dict[str, Array] = {}
    for j, entry in enumerate(entries):
        if (law := _law(merged, entry)) is None:
            continue
        out[entry] = as_flagged(merged, entry, law.mean[of_class] + law.sd[of_class] * np.clip(z[:, j], -CUT, CUT))
    return out


def as_flagged(merged: Message, entry: str, values: Array) -> Array:
    """Not below 0, and whole, where the sites' own values of this column are."""
    fractions, negatives = merged.trees["flags"][entry]
    values = values if negatives else np.maximum(values, 0.0)
    return values if fractions else np.asarray(np.round(values))


def _correlation(merged: Message, entries: list[str], k: int) -> Array:
    products = merged.trees["products"]
    at = np.ix_([int(i) for i in entries], [int(i) for i in entries])
    total, count = products["sum"][k][at], products["count"][k][at]
    found = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    np.fill_diagonal(found, 1.0)
    return np.asarray(np.clip(found, -1.0, 1.0))


def _root(correlation: Array) -> Array:
    """A with A Aᵀ = the nearest matrix that is a correlation (pairs with gaps need not give one)."""
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return np.asarray(root / np.linalg.norm(root, axis=1, keepdims=True))


def _words(merged: Message, entry: str, kind: str, of_class: Array, rng: np.random.Generator) -> Array | None:
    table = merged.trees["categories"].get(entry) if kind != "empty" else None
    if table is None or not table.sum():
        return None
    table = np.where(table.sum(axis=1, keepdims=True) > 0, table, table.sum(axis=0, keepdims=True))
    below = np.cumsum(table / table.sum(axis=1, keepdims=True), axis=1)[of_class]
    drawn = (rng.random(len(of_class))[:, None] > below[:, :-1]).sum(axis=1)
    return np.asarray(words_of(merged, entry, kind)[drawn])


def words_of(merged: Message, entry: str, kind: str) -> Array:
    """(words,) objects: a column's text, or True and False."""
    words = [word == "True" for word in merged.text[entry]] if kind == "true/false" else list(merged.text[entry])
    return np.array(words, object)


def _with_gaps(values: Array | None, merged: Message, entry: str, of_class: Array, rng: np.random.Generator) -> Array:
    """Gaps at the rate of all sites together, per class."""
    total, present = merged.trees["total"]["rows"], merged.trees["present"][entry]
    rate = 1 - np.divide(present, total, out=np.ones_like(total), where=total > 0)
    gone = rng.random(len(of_class)) < rate[of_class]
    if values is None:
        return np.full(len(of_class), np.nan)
    return (
        np.where(gone, np.nan, values) if values.dtype.kind == "f" else np.where(gone, np.array(np.nan, object), values)
    )
