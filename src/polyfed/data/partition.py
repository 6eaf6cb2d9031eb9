"""One data set dealt to simulated clients: who holds which rows.

Every function returns client name -> sorted row numbers (int64), is a pure function of its arguments, and gives each row
to exactly one client. Clients are called ``"client-00"``, ``"client-01"``, ...; `by_column` calls them by their value.

>>> y = [0, 0, 0, 1, 1, 1, 2, 2, 2]
>>> {name: rows.tolist() for name, rows in pathological(y, clients=3, classes=1, seed=0).items()}
{'client-0': [6, 7, 8], 'client-1': [3, 4, 5], 'client-2': [0, 1, 2]}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyfed.core import seed as streams
from polyfed.core.errors import DataError
from polyfed.core.tree import Array

Deal = dict[str, Array]


def iid(rows: int | Sized, *, clients: int, seed: int = 0) -> Deal:
    """Equal shares of shuffled rows; sizes differ by one at most.

    Args:
        rows: how many rows there are, or anything with that length.
        clients: how many clients.
        seed: the deal's own.
    """
    n = _count(rows, clients)
    return _named(np.array_split(streams.rng(seed, "partition", "iid").permutation(n), clients))


def dirichlet(y: npt.ArrayLike, *, clients: int, alpha: float = 0.5, min_rows: int = 1, seed: int = 0) -> Deal:
    """Label skew: each class is dealt in shares drawn from a symmetric Dirichlet(α) (Yurochkin et al. 2019; Hsu et al. 2019).

    Small α: a client holds few classes; large α: as iid. A client left with fewer than `min_rows` takes rows of the
    richest clients, instead of drawing again until it fits, which for small α may never end.

    Raises:
        DataError: α is not positive, or there are fewer rows than ``clients * min_rows``.
    """
    labels = _labels(y, clients)
    if not alpha > 0:
        raise DataError(f"alpha={alpha}: the concentration of a Dirichlet distribution is above 0; try 0.1, 0.5 or 100")
    rng = streams.rng(seed, "partition", "dirichlet")
    parts: list[list[Array]] = [[] for _ in range(clients)]
    for value in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == value))
        cuts = np.round(np.cumsum(_dirichlet(rng, alpha, clients))[:-1] * len(rows)).astype(np.int64)
        for part, taken in zip(parts, np.split(rows, cuts), strict=True):
            part.append(taken)
    return _named(_topped_up([rng.permutation(np.concatenate(part)) for part in parts], min_rows))


def shards(y: npt.ArrayLike, *, clients: int, shards: int = 2, seed: int = 0) -> Deal:
    """Rows sorted by label, cut into ``clients * shards`` equal pieces, `shards` of them to each client (McMahan et al. 2017)."""
    labels = _labels(y, clients * shards)
    rng = streams.rng(seed, "partition", "shards")
    shuffled = rng.permutation(len(labels))
    pieces = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], clients * shards)
    order = rng.permutation(clients * shards).reshape(clients, shards)
    return _named([np.concatenate([pieces[i] for i in mine]) for mine in order])


def pathological(y: npt.ArrayLike, *, clients: int, classes: int = 2, seed: int = 0) -> Deal:
    """Each client holds rows of exactly `classes` classes; a class is shared equally by the clients that hold it.

    Raises:
        DataError: so few clients that a class would be nobody's, or so few rows that a client would lack one of its classes.
    """
    labels = _labels(y, clients)
    values = np.unique(labels)
    if not 1 <= classes <= len(values) or clients * classes < len(values):
        raise DataError(
            f"{clients} clients of {classes} classes each cannot hold {len(values)} classes without repeats or leftovers; "
            f"classes= must lie between {math.ceil(len(values) / clients)} and {len(values)}"
        )
    rng = streams.rng(seed, "partition", "pathological")
    holders = _holders(rng, clients, classes, len(values))
    parts: list[list[Array]] = [[] for _ in range(clients)]
    for value, held_by in zip(values, holders, strict=True):
        rows = rng.permutation(np.flatnonzero(labels == value))
        if len(rows) < len(held_by):
            raise DataError(f"class {value} has {len(rows)} rows for {len(held_by)} clients; use fewer clients")
        for client, taken in zip(held_by, np.array_split(rows, len(held_by)), strict=True):
            parts[client].append(taken)
    return _named([np.concatenate(part) for part in parts])


def quantity_skew(
    rows: int | Sized,
    *,
    clients: int,
    law: Literal["lognormal", "power"] = "lognormal",
    spread: float = 1.0,
    min_rows: int = 1,
    seed: int = 0,
) -> Deal:
    """Shuffled rows in unequal shares: the label mix is everywhere the same, the amount is not.

    Args:
        rows: how many rows there are, or anything with that length.
        clients: how many clients.
        law: "lognormal" shares exp(spread · N(0, 1)); "power" shares rank ** -spread, ranks dealt at random.
        spread: 0 gives equal shares.
        min_rows: the least that a client holds.
        seed: the deal's own.
    """
    n = _count(rows, clients * max(min_rows, 1))
    rng = streams.rng(seed, "partition", "quantity", law)
    if law == "lognormal":
        shares = np.exp(spread * rng.standard_normal(clients))
    elif law == "power":
        shares = rng.permutation(np.arange(1, clients + 1) ** -float(spread))
    else:
        raise DataError(f"law={law!r} is unknown; use 'lognormal' or 'power'")
    spare = n - clients * min_rows
    cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * spare).astype(np.int64)
    cuts += min_rows * np.arange(1, clients)
    return _named(np.split(rng.permutation(n), cuts))


def by_column(values: Iterable[Any]) -> Deal:
    """One client for each distinct value, such as a hospital's name, in sorted order; missing values are client "missing"."""
    names = np.array(["missing" if _is_missing(value) else str(value) for value in values], dtype=object)
    if not len(names):
        raise DataError("the column that names the clients is empty")
    return {name: np.flatnonzero(names == name) for name in sorted(set(names))}


def per_client(x: Any, y: npt.ArrayLike, deal: Mapping[str, Array]) -> dict[str, tuple[Any, Array]]:
    """The rows themselves: client name -> (x, y), each a form that ``pf.Client(data=...)`` takes.

    Args:
        x: an array, a mapping of arrays, or a DataFrame; rows along the first axis.
        y: (n, ...) targets.
        deal: what a function of this file returned.
    """
    target = np.asarray(y)
    return {name: (_rows(x, index), target[index]) for name, index in deal.items()}


def _rows(x: Any, index: Array) -> Any:
    if isinstance(x, Mapping):
        return {name: _rows(value, index) for name, value in x.items()}
    return x.iloc[index].reset_index(drop=True) if hasattr(x, "iloc") else np.asarray(x)[index]


def _is_missing(value: Any) -> bool:
    return value is None or bool(value != value)  # noqa: PLR0124  # NaN is the one value that differs from itself


def _count(rows: int | Sized, needed: int) -> int:
    n = rows if isinstance(rows, int) else len(rows)
    if needed < 1:
        raise DataError("clients= must be at least 1")
    if n < needed:
        raise DataError(f"{n} rows are too few: at least {needed} are needed; use fewer clients or a smaller min_rows")
    return n


def _labels(y: npt.ArrayLike, needed: int) -> Array:
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise DataError(f"labels of shape {labels.shape} cannot be dealt by class; give one label a row")
    _count(labels, needed)
    return np.unique(labels, return_inverse=True)[1]


def _named(parts: Sequence[Array]) -> Deal:
    width = len(str(len(parts) - 1))
    return {f"client-{i:0{width}}": np.sort(part).astype(np.int64) for i, part in enumerate(parts)}


def _dirichlet(rng: np.random.Generator, alpha: float, size: int) -> Array:
    """Shares that sum to 1; for a tiny α every gamma draw may underflow to 0, whose limit is all to one client."""
    draws = rng.standard_gamma(alpha, size)
    if (total := draws.sum()) > 0 and np.isfinite(total):
        return np.asarray(draws / total)
    shares = np.zeros(size)
    shares[rng.integers(size)] = 1.0
    return shares


def _topped_up(parts: list[Array], min_rows: int) -> list[Array]:
    sizes = np.array([len(part) for part in parts])
    if sizes.sum() < len(parts) * min_rows:
        raise DataError(f"{sizes.sum()} rows are too few for {len(parts)} clients of {min_rows} rows each")
    while (poorest := int(sizes.argmin())) != (richest := int(sizes.argmax())) and sizes[poorest] < min_rows:
        parts[poorest] = np.append(parts[poorest], parts[richest][-1])
        parts[richest] = parts[richest][:-1]
        sizes[poorest] += 1
        sizes[richest] -= 1
    return parts


def _holders(rng: np.random.Generator, clients: int, each: int, classes: int) -> list[list[int]]:
    """For each class, the clients that hold it: every client takes the classes least held so far, ties at random."""
    holders: list[list[int]] = [[] for _ in range(classes)]
    for client in rng.permutation(clients).tolist():
        held = np.array([len(h) for h in holders])
        for value in np.lexsort((rng.random(classes), held))[:each].tolist():
            holders[value].append(client)
    return holders
