"""Training, validation, test and public rows of one client, without a leak between them.

`Split` is the wish, `divide` the deed, `Parts` the result: four lists of row numbers, disjoint. Preprocessing is fit on the
training part alone (`polyfed.data.prepare`). Public rows are set aside from what would be training rows, so a change
of `Split.public` never changes validation or test, and a model trained "alone" may have them back (`Parts.with_public`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyfed.core import seed as streams
from polyfed.core.errors import DataError
from polyfed.core.tree import Array
from polyfed.data.table import Raw, missing_in, row_keys

By = Literal["auto", "class", "random", "time", "group"]


class LeakWarning(UserWarning):
    """Rows that a score is computed on also stand in the training part."""


@dataclass(frozen=True)
class Split:
    """How one client's rows are divided; the fractions are of all its rows, the rest is for training.

    Attributes:
        validation: for stopping and selection.
        test: read once, at the end.
        public: given to all clients without labels; taken from the training rows.
        by: "class" keeps the class proportions and, where there are enough rows, every class in every part;
            "time" puts training before validation before test; "group" never parts the rows of one group;
            "random" looks at nothing; "auto" is the first of time, group, class that the data has, else random.
        gap: for "time": later parts begin more than this after the end of the part before, in units of the time
            values (numbers, or a timedelta for dates). With windows of `lags` past values it is ``lags + horizon - 1``,
            so that no input of a test row is the target of a training row.
    """

    validation: float = 0.15
    test: float = 0.2
    public: float = 0.0
    by: By = "auto"
    gap: Any = 0

    def __post_init__(self) -> None:
        fractions = {"validation": self.validation, "test": self.test, "public": self.public}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise DataError(f"Split({name}={value}): a fraction lies between 0 and 1, such as {name}=0.15")
        if sum(fractions.values()) >= 1:
            raise DataError(f"Split({fractions}) leaves no rows for training; the fractions must sum to less than 1")
        if self.by not in ("auto", "class", "random", "time", "group"):
            raise DataError(f"Split(by={self.by!r}) is unknown; use 'auto', 'class', 'time', 'group' or 'random'")


def _nothing() -> Array:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Parts:
    """Row numbers of each part; also a form of ``split=`` for those who divide their rows themselves."""

    train: Array
    validation: Array = field(default_factory=_nothing)
    test: Array = field(default_factory=_nothing)
    public: Array = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "public"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.int64))

    def with_public(self) -> Parts:
        """The public rows back among the training rows, with their labels: what a client has that shares nothing."""
        return replace(self, train=np.sort(np.concatenate([self.train, self.public])), public=_nothing())

    def check(self, name: str, rows: int) -> None:
        """Raises `DataError` unless the parts are disjoint, within ``range(rows)``, and there is something to train on."""
        together = np.concatenate([self.train, self.validation, self.test, self.public])
        if len(together) and (together.min() < 0 or together.max() >= rows):
            raise DataError(
                f"{name}: the split names row {together.max()} or below 0, the data has rows 0 to {rows - 1}"
            )
        if len(np.unique(together)) < len(together):
            raise DataError(
                f"{name}: a row stands in two parts of the split; training, validation, test and public rows are disjoint"
            )
        if not len(self.train):
            raise DataError(
                f"{name}: the split leaves no rows for training; {rows} rows are too few for these fractions"
            )


def divide(name: str, raw: Raw, wish: Split | Parts, *, seed: int = 0) -> Parts:
    """Divides one client's rows; a pure function of the rows, the wish, the client's name and the seed.

    Guarantees: the parts are disjoint and sorted; they cover all rows, except the gap of a split by time; validation and
    test do not depend on ``wish.public``; with "class", part sizes are the fractions of all rows to within one, class
    counts are proportional to within two, and each class has a training row.

    Raises:
        DataError: what the wish needs (classes, groups) is not in the data, or nothing is left for training.
    """
    if isinstance(wish, Parts):
        parts = wish
    else:
        by = _chosen(name, raw, wish)
        rng = streams.rng(seed, name, "split")
        parts = {"time": _by_time, "group": _by_group, "class": _by_class, "random": _by_class}[by](
            raw if by != "random" else raw.unlabelled(), wish, rng
        )
    parts.check(name, len(raw))
    return parts


def folds(y: npt.ArrayLike, k: int = 4, *, seed: int = 0) -> list[Array]:
    """`k` stratified test parts: every row is in exactly one, class counts and sizes differ by one at most.

    Raises:
        DataError: fewer rows than folds.
    """
    labels = np.asarray(y)
    if not 2 <= k <= len(labels):
        raise DataError(f"{len(labels)} rows cannot be cut into {k} folds; use 2 to {len(labels)}")
    order = _ordered(labels, streams.rng(seed, "folds"))
    return [np.sort(order[start::k]) for start in range(k)]


def duplicates(raw: Raw, train: Array, other: Array) -> int:
    """How many of the `other` rows have exactly the inputs of some training row."""
    keys = row_keys(raw)
    known = {keys[i] for i in train.tolist()}
    return sum(keys[i] in known for i in other.tolist())


def _chosen(name: str, raw: Raw, wish: Split) -> str:
    if wish.by == "auto":
        if raw.time is not None:
            return "time"
        if raw.groups is not None:
            return "group"
        return "class" if raw.target is not None and _has_classes(raw.target) else "random"
    if wish.by == "group" and raw.groups is None:
        raise DataError(
            f"{name}: Split(by='group') needs to know whose each row is; give groups=, a column or an array"
        )
    if wish.by == "class" and raw.target is None:
        raise DataError(f"{name}: Split(by='class') needs labels; unlabelled rows can be split by='random'")
    return wish.by


def _has_classes(target: Array) -> bool:
    """Text, booleans, or at most 20 different whole numbers."""
    if target.ndim != 1:
        return False
    if target.dtype.kind == "f" and not bool((target == np.floor(target)).all()):
        return False
    return target.dtype.kind in "bOUS" or len(np.unique(target)) <= 20


def _ordered(labels: Array | None, rng: np.random.Generator, size: int = 0) -> Array:
    """Rows shuffled, then sorted by class: every k-th of them is a stratified sample."""
    order = rng.permutation(size if labels is None else len(labels))
    if labels is None:
        return order
    codes = np.unique(labels.astype(str) if labels.dtype.kind == "O" else labels, return_inverse=True)[1]
    return order[np.argsort(codes[order], kind="stable")]


def _systematic(order: Array, fraction: float) -> Array:
    """Which positions of `order` to take, bool: round(n · fraction) of them, evenly spread."""
    wanted = round(len(order) * fraction)
    steps = np.floor((np.arange(len(order) + 1) * wanted) / max(len(order), 1) + 0.5)
    return np.asarray(np.diff(steps) > 0)


def _by_class(raw: Raw, wish: Split, rng: np.random.Generator) -> Parts:
    n, labels = len(raw), raw.target
    order = _ordered(labels, rng, n)
    where = np.zeros(n, np.int64)  # 0 train, 1 validation, 2 test, 3 public
    for code, fraction in ((2, wish.test), (1, wish.validation)):
        free = order[where[order] == 0]
        where[free[_systematic(free, fraction * n / max(len(free), 1))]] = code
    if labels is not None:
        codes = np.unique(labels.astype(str) if labels.dtype.kind == "O" else labels, return_inverse=True)[1]
        for part in (0, *([2] if wish.test else []), *([1] if wish.validation else [])):
            _represent(where, codes, part)
    return _with_public_of(where, order, labels, wish)


def _with_public_of(where: Array, order: Array, labels: Array | None, wish: Split) -> Parts:
    """Sets public rows aside from the training ones, at an even pace through the classes, each class keeping one row."""
    free = order[where[order] == 0]
    taken = free[_systematic(free, min(wish.public * len(order) / max(len(free), 1), 1.0))]
    where[taken] = 3
    if labels is not None and wish.public:
        for row in free[~np.isin(labels[free], labels[where == 0])].tolist():
            if labels[row] not in labels[where == 0]:
                where[row] = 0
    return _parts(where)


def _represent(where: Array, codes: Array, part: int) -> None:
    """Swaps rows in place so that each class stands in `part`: sizes stay, a class with one row is left to training."""
    counts = np.zeros((3, codes.max() + 1), np.int64)
    np.add.at(counts, (where, codes), 1)
    for lacking in np.flatnonzero(counts[part] == 0).tolist():
        donor, rich = int(counts[:, lacking].argmax()), int(counts[part].argmax())
        enough = counts[donor, lacking] >= (1 if part == 0 else 2)
        if not enough or (counts[part, rich] < 2 and part != 0):
            continue
        moves = [(donor, part, lacking)] + [(part, donor, rich)] * bool(counts[part, rich] >= 2)
        for source, to, code in moves:
            row = np.flatnonzero((where == source) & (codes == code))[0]
            where[row] = to
            counts[source, code] -= 1
            counts[to, code] += 1


def _by_time(raw: Raw, wish: Split, rng: np.random.Generator) -> Parts:  # noqa: ARG001  # time leaves nothing to chance
    """public, train | gap | validation | gap | test, cut between different times."""
    time = np.arange(len(raw)) if raw.time is None else raw.time
    n = len(time)
    ends = [n - round(n * (wish.test + wish.validation)), n - round(n * wish.test)]
    ordered = np.sort(time)
    where = np.zeros(n, np.int64)
    last = None
    for code, end, stop in ((1, ends[0], ends[1]), (2, ends[1], n)):
        if end == stop:
            continue
        where[time >= ordered[end]] = code
        before = time[where < code]
        last = before.max() if len(before) else last
        if wish.gap and last is not None:
            where[(where == code) & (time - last <= wish.gap)] = -1
    aside = np.argsort(time, kind="stable")
    aside = aside[where[aside] == 0][: round(n * wish.public)]
    where[aside] = 3
    return _parts(where)


def _by_group(raw: Raw, wish: Split, rng: np.random.Generator) -> Parts:
    """Groups in random order, each to the part that lacks most; public rows come from training groups."""
    assert raw.groups is not None
    names = raw.groups.astype(str) if raw.groups.dtype.kind == "O" else raw.groups
    codes = np.unique(names, return_inverse=True)[1]
    sizes = np.bincount(codes)
    n = len(codes)
    room = np.array([n * (1 - wish.validation - wish.test), n * wish.validation, n * wish.test])
    group_part = np.zeros(len(sizes), np.int64)
    shuffled = rng.permutation(len(sizes))
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist():
        part = int(room.argmax())
        group_part[group] = part
        room[part] -= sizes[group]
    return _with_public_of(group_part[codes], rng.permutation(n), None, wish)


def _parts(where: Array) -> Parts:
    return Parts(*(np.flatnonzero(where == code) for code in range(4)))


def check_labels(name: str, target: Array) -> None:
    """Raises `DataError` when a target is missing in some row."""
    if (gone := int(missing_in(target).sum())) > 0:
        raise DataError(f"{name}: the target is missing in {gone} of {len(target)} rows; drop these rows first")
