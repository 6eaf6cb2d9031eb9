"""The fold: accepted uploads become weighted sums, and the order of their arrival decides no bit.

Floating-point addition is not associative, so the order is fixed by the round's plan: positions are cut into blocks
(16 neighbours unless the plan says otherwise), a block is folded left to right over those accepted, and the block sums
left to right. Whoever holds a whole block may send its sum instead of its uploads. That takes two accumulators.

    value = round(w * x) in the accumulator's dtype, then add: two roundings; w is rounded to float32 once.

float64 accumulates in float64; float32, float16 and bfloat16 in float32. Integers and booleans are never averaged.
A tree "x#" holds factors of tree "x" (counts, masks), a number per entry or one per element: the weight of an element
is then round(w * factor). Uploads whose trees differ are summed per name, over those who sent the name.

Who divides a sum by what is the algorithm's decision: see `Aggregate`. What an upload may hold is checked first, by
`validate`; how much it may count, by `UpdatePolicy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from polyfed.core.errors import MalformedError, RefusedError, SpecError, UsageError
from polyfed.core.kernels import PIECE, Scratch, add_scaled
from polyfed.core.message import Message
from polyfed.core.tree import DTYPES, FLOATS, Array, Entry, Spec, Tree, aligned, part_of

#: dtype of an upload -> dtype in which it is summed
ACCUMULATOR: Mapping[str, str] = {
    "float64": "float64",
    "float32": "float32",
    "float16": "float32",
    "bfloat16": "float32",
}
#: neighbouring positions of the plan that make a block, unless the plan says otherwise
BLOCK = 16
FLOAT32_MAX = float(np.finfo(np.float32).max)


# ---- running sums


class _Sum:
    """One running sum: of a whole tree while all uploads agree in their spec, or of a single entry.

    Attributes:
        spec: of the uploads, in their own dtypes.
        vectors: dtype of the upload -> accumulator, as long as that dtype's buffer.
        weight: float, or (size,) float64 where a single entry has one weight per element.
    """

    __slots__ = ("spec", "vectors", "weight")

    def __init__(self, spec: Spec, vectors: dict[str, Array], weight: float | Array) -> None:
        self.spec, self.vectors, self.weight = spec, vectors, weight

    @classmethod
    def room(cls, spec: Spec) -> _Sum:
        """Uninitialised accumulators."""
        return cls(spec, {dtype: aligned(size, ACCUMULATOR[dtype]) for dtype, size in spec.sizes.items()}, 0.0)

    def begin(self, buffers: Mapping[str, Array], factor: Any, weight: float | Array) -> None:
        for dtype, vector in self.vectors.items():
            np.multiply(buffers[dtype], factor, vector)
        self.weight = weight

    def go_on(self, buffers: Mapping[str, Array], factor: Any, weight: float | Array, scratch: Scratch) -> None:
        for dtype, vector in self.vectors.items():
            add_scaled(vector, buffers[dtype], factor, scratch)
        self.weight = self.weight + weight

    def plus(self, other: _Sum) -> None:
        for dtype, vector in self.vectors.items():
            np.add(vector, other.vectors[dtype], vector)
        self.weight = self.weight + other.weight

    def copy(self) -> _Sum:
        fresh = _Sum.room(self.spec)
        for dtype, vector in fresh.vectors.items():
            vector[:] = self.vectors[dtype]
        fresh.weight = self.weight
        return fresh

    def entries(self) -> Iterator[tuple[str, _Sum]]:
        """The same sum cut into single entries; the accumulators are views, not copies."""
        for name, (dtype, start, stop, _) in self.spec.places.items():
            yield name, _Sum(Spec({name: self.spec[name]}), {dtype: self.vectors[dtype][start:stop]}, self.weight)

    def shaped_weight(self) -> Array:
        """The weight of a single entry: shape () or the entry's."""
        weight = np.asarray(self.weight, np.float64)
        return weight.reshape(next(iter(self.spec.values())).shape) if weight.ndim else weight

    @property
    def has_weight(self) -> bool:
        return bool(np.any(np.asarray(self.weight) > 0))


_WHOLE = None  # the key of a sum over a whole tree, beside names of entries
_Sums = dict[str | None, _Sum]


class _Piece(NamedTuple):
    """What one tree of an upload adds.

    Attributes:
        factor: the tree's weight.
        factors: entry -> weight times count, where the upload has counts: a scalar, or (size,).
    """

    spec: Spec
    buffers: Mapping[str, Array]
    factor: np.float32
    factors: dict[str, Any] | None


class Sums:
    """Weighted sums over some clients: mergeable along the plan's blocks, and a `Message` when they must travel.

    Attributes:
        trees: tree name -> running sums, either one of the whole tree (under None) or one per entry.
        numbers: name -> Σ n v and Σ n, n being the num_examples of those who sent it.
        clients: how many uploads were summed.
        num_examples: their total.
    """

    __slots__ = ("clients", "num_examples", "numbers", "trees")

    def __init__(self) -> None:
        self.trees: dict[str, _Sums] = {}
        self.numbers: dict[str, tuple[float, float]] = {}
        self.clients = 0
        self.num_examples = 0.0

    def add_tree(self, name: str, piece: _Piece, scratch: Scratch, free: dict[str, _Sum]) -> None:
        """Adds a tree with one factor; the first one takes its accumulators from `free` where they fit."""
        spec, buffers, factor = piece.spec, piece.buffers, piece.factor
        sums = self.trees.get(name)
        weight = float(factor)
        if sums is None:
            room = free.pop(name, None)
            if room is None or room.spec != spec:
                room = _Sum.room(spec)
            room.begin(buffers, factor, weight)
            self.trees[name] = {_WHOLE: room}
        elif (one := sums.get(_WHOLE)) is not None and (one.spec is spec or one.spec == spec):
            one.go_on(buffers, factor, weight, scratch)
        else:
            self.add_entries(name, piece, scratch)

    def add_entries(self, name: str, piece: _Piece, scratch: Scratch) -> None:
        """Adds a tree entry by entry, each with its own factor: a scalar, or one per element."""
        sums = self.trees[name] = _split(self.trees.get(name, {}))
        factors = dict.fromkeys(piece.spec, piece.factor) if piece.factors is None else piece.factors
        for entry, factor in factors.items():
            dtype, start, stop, _ = piece.spec.places[entry]
            buffers = {dtype: piece.buffers[dtype][start:stop]}
            weight = np.asarray(factor, np.float64) if np.ndim(factor) else float(factor)
            if (one := sums.get(entry)) is not None:
                one.go_on(buffers, factor, weight, scratch)
            else:
                one = sums[entry] = _Sum.room(Spec({entry: piece.spec[entry]}))
                one.begin(buffers, factor, weight)

    def add_numbers(self, numbers: Mapping[str, float]) -> None:
        """Counts one more client, with its numbers."""
        examples = float(numbers.get("num_examples", 1.0))
        for name, value in numbers.items():
            if name != "num_examples":
                total, weight = self.numbers.get(name, (0.0, 0.0))
                self.numbers[name] = (total + examples * value, weight + examples)
        self.clients += 1
        self.num_examples += examples

    def merge(self, other: Sums) -> None:
        """Adds the sums of the next block; `other` is only read.

        Raises:
            SpecError: an entry has another dtype or shape there; nothing was added then.
        """
        for name, sums in other.trees.items():
            _agree(name, sums, _entries(self.trees.get(name, {})))
        for name, sums in other.trees.items():
            if name in self.trees:
                self._merge_tree(name, sums)
            else:
                self.trees[name] = {key: one.copy() for key, one in sums.items()}
        self._merge_numbers(other)

    def take(self, other: Sums) -> dict[str, _Sum]:
        """`merge` of a block that nobody needs any more: returns those of its accumulators that are free, by tree."""
        free: dict[str, _Sum] = {}
        for name, sums in other.trees.items():
            if name not in self.trees:
                self.trees[name] = sums
                continue
            self._merge_tree(name, sums)
            if _WHOLE in sums:
                free[name] = sums[_WHOLE]
        self._merge_numbers(other)
        return free

    def _merge_tree(self, name: str, sums: _Sums) -> None:
        have, new = self.trees[name].get(_WHOLE), sums.get(_WHOLE)
        if have is not None and new is not None and have.spec == new.spec:
            have.plus(new)
            return
        mine = self.trees[name] = _split(self.trees[name])
        for entry, one in _split(sums).items():
            if entry in mine:
                mine[entry].plus(one)
            else:
                mine[entry] = one.copy()

    def _merge_numbers(self, other: Sums) -> None:
        for name, (total, weight) in other.numbers.items():
            have = self.numbers.get(name, (0.0, 0.0))
            self.numbers[name] = (have[0] + total, have[1] + weight)
        self.clients += other.clients
        self.num_examples += other.num_examples

    def to_message(self) -> Message:
        """Sum trees and weight trees ("x#"), for the codec; exact, so that the round trip changes no bit.

        The dtypes of half-precision uploads go along as text, so that their mean has them again.
        """
        trees: dict[str, Tree] = {}
        text: dict[str, tuple[str, ...]] = {}
        for name, sums in self.trees.items():
            entries = _split(sums)
            trees[name] = _tree(sums, _itself)
            trees[name + "#"] = Tree({str(entry): one.shaped_weight() for entry, one in entries.items()})
            dtypes = tuple(dtype for one in entries.values() for dtype in one.vectors)
            if any(ACCUMULATOR[dtype] != dtype for dtype in dtypes):
                text[name] = dtypes
        numbers = {"clients": float(self.clients), "num_examples": self.num_examples}
        for name, (total, weight) in self.numbers.items():
            numbers |= {f"{name}/sum": total, f"{name}/weight": weight}
        return Message(trees, numbers, text)

    @classmethod
    def from_message(cls, message: Message) -> Sums:
        """The inverse of `to_message`; arrays are viewed, not copied.

        Raises:
            MalformedError: a weight tree is missing or does not fit its sum tree, or a value is negative or not finite.
        """
        sums = cls()
        for name, tree in message.trees.items():
            if not name.endswith("#"):
                weights = message.trees.get(name + "#", Tree())
                sums.trees[name] = _received(name, tree, weights, message.text.get(name))
            elif name[:-1] not in message.trees:
                raise MalformedError(f"block sum: weight tree {name!r} has no sum tree {name[:-1]!r}")
        sums.clients = int(_number(message, "clients"))
        sums.num_examples = _number(message, "num_examples")
        for key, value in message.numbers.items():
            name, _, what = key.rpartition("/")
            if name and what == "sum":
                sums.numbers[name] = (value, _number(message, f"{name}/weight"))
        return sums


def _split(sums: _Sums) -> _Sums:
    """The same sums per entry; the accumulators are views, not copies."""
    return dict(sums[_WHOLE].entries()) if _WHOLE in sums else sums


def _entries(sums: _Sums) -> dict[str, Entry]:
    return {name: entry for one in sums.values() for name, entry in one.spec.items()}


def _agree(tree: str, sums: _Sums | Spec, known: Mapping[str, Entry]) -> None:
    """Raises `SpecError` for an entry that has another dtype or shape than the same entry had before."""
    for name, entry in (sums if isinstance(sums, Spec) else _entries(sums)).items():
        if (other := known.get(name)) is not None and other != entry:
            raise SpecError(
                f"{tree}/{name} is {entry.dtype}{list(entry.shape)} in one upload and {other.dtype}{list(other.shape)} "
                "in another; entries of one name must agree to be summed"
            )


def _number(message: Message, name: str) -> float:
    value = message.numbers.get(name, math.nan)
    if not 0 <= value < math.inf:
        raise MalformedError(f"block sum: number {name!r} is {value}; it must be finite and not negative")
    return value


def _received(name: str, tree: Tree, weights: Tree, dtypes: tuple[str, ...] | None) -> _Sums:
    """Running sums over the buffers of a received sum tree and its weight tree."""
    if set(weights) != set(tree):
        raise MalformedError(f"block sum: the entries of {name!r} and {name + '#'!r} differ")
    own = tuple(entry.dtype for entry in tree.spec.values())
    dtypes = own if dtypes is None else dtypes
    if [ACCUMULATOR.get(dtype) for dtype in dtypes] != list(own):
        raise MalformedError(f"block sum: {name!r} holds sums of {dtypes[:3]}, which do not fit its entries {own[:3]}")
    for entry, weight in weights.items():
        _check_weight(f"{name}#/{entry}", weight, tree.spec[entry].shape)
    levels = {float(weight) if weight.ndim == 0 else 0.0 for weight in weights.values()}
    if dtypes == own and len(levels) == 1 and (level := levels.pop()) > 0:
        return {_WHOLE: _Sum(tree.spec, dict(tree.buffers), level)}
    sums: _Sums = {}
    for (entry, array), dtype in zip(tree.items(), dtypes, strict=True):
        weight = weights[entry]
        spec = Spec({entry: Entry(dtype, tuple(array.shape))})
        sums[entry] = _Sum(spec, {dtype: array.ravel()}, weight.ravel() if weight.ndim else float(weight))
    return sums


def _check_weight(where: str, weight: Array, shape: tuple[int, ...]) -> None:
    if weight.dtype != np.float64 or weight.shape not in ((), shape):
        got = f"{weight.dtype}{list(weight.shape)}"
        raise MalformedError(f"block sum: {where} is {got}, expected float64[] or float64{list(shape)}")
    if not bool(np.all((weight >= 0) & (weight < np.inf))):
        raise MalformedError(f"block sum: {where} holds a weight that is negative or not finite")


# ---- the fold


class Fold:
    """Folds a round's accepted uploads along the plan's blocks; memory of two accumulators.

    Args:
        block: neighbouring positions in a block, or the block of each position (never falling).

    Guarantees: the result is a function of the plan and of which positions were accepted. A call that raises has
    changed nothing.

    >>> fold = Fold()
    >>> for position, (n, w) in enumerate([(1, 2.0), (3, 6.0)]):
    ...     update = Message({"params": Tree({"w": np.float32([w])})}, {"num_examples": n})
    ...     fold.add(position, update, lambda tree: update.numbers["num_examples"])
    >>> fold.finish().mean("params")["w"].tolist()
    [5.0]
    """

    def __init__(self, block: int | Callable[[int], int] = BLOCK) -> None:
        self._size = block if isinstance(block, int) else 0
        self._block_of = None if isinstance(block, int) else block
        if self._block_of is None and self._size < 1:
            raise UsageError(f"a block has at least one position, got {block}")
        self._total, self._open = Sums(), Sums()
        self._position, self._block = -1, -1
        self._num_blocks = 0
        self._specs: dict[str, Spec] = {}  # the last spec of each tree that was found fit
        self._known: dict[str, dict[str, Entry]] = {}  # every entry ever seen, by tree
        self._free: dict[str, _Sum] = {}
        self._scratch = Scratch()
        self._finished = False

    def add(self, position: int, message: Message, weight: Callable[[str], float]) -> None:
        """Folds one accepted upload.

        Args:
            position: place in the round's plan; rises from call to call.
            message: trees to sum, with their counts or masks.
            weight: tree name -> factor of that tree, finite and above 0.

        Raises:
            UsageError: the position does not rise, or a weight cannot be used.
            SpecError: an entry that cannot be averaged, or that disagrees with the same entry of another upload.
        """
        block = self._entered(position)
        pieces = {
            name: self._piece(name, tree, message.trees.get(name + "#"), _factor(weight(name), name, position))
            for name, tree in message.trees.items()
            if not _is_counts(name, message)
        }
        if block != self._block:
            self._close()
        self._position, self._block = position, block
        for name, piece in pieces.items():
            self._remember(name, piece.spec)
            if piece.factors is None:
                self._open.add_tree(name, piece, self._scratch, self._free)
            else:
                self._open.add_entries(name, piece, self._scratch)
        self._open.add_numbers(message.numbers)

    def add_block(self, block: int, sums: Sums) -> None:
        """Adds the sum of a whole block that was made elsewhere; `sums` is only read.

        Raises:
            UsageError: the block, or a later one, was begun already.
            SpecError: an entry disagrees with the same entry of an earlier upload.
        """
        if self._finished or block <= self._block:
            raise UsageError(f"block {block} comes after block {self._block}: blocks are added once, in rising order")
        for name, parts in sums.trees.items():
            _agree(name, parts, self._known.get(name, {}))
        self._close()
        self._block = block
        for name, parts in sums.trees.items():
            self._known.setdefault(name, {}).update(_entries(parts))
        self._total.merge(sums)
        self._num_blocks += 1

    def block_sums(self) -> Sums:
        """The sum of the one block that was folded here, for `add_block` elsewhere; ends this fold.

        Raises:
            UsageError: more than one block was folded: their sum has other bits than the plan's.
        """
        self._end()
        if self._num_blocks > 1:
            raise UsageError(f"{self._num_blocks} blocks were folded; only the sum of one block may be sent")
        return self._total

    def finish(self) -> Aggregate:
        """The aggregate of everything that was added; ends this fold."""
        self._end()
        return Aggregate(self._total)

    def _end(self) -> None:
        if self._finished:
            raise UsageError("this fold has ended; begin another one")
        self._close()
        self._finished = True
        self._free = {}

    def _entered(self, position: int) -> int:
        """The block of the next position, after checking that it may come next."""
        if self._finished:
            raise UsageError("this fold has ended; begin another one")
        block = position // self._size if self._block_of is None else self._block_of(position)
        is_taken = block == self._block and not self._open.clients
        if position <= self._position or block < self._block or is_taken:
            raise UsageError(
                f"position {position} (block {block}) comes after position {self._position} (block {self._block}); "
                "uploads are folded in the plan's order, and a block that was added as a sum is complete"
            )
        return block

    def _close(self) -> None:
        if self._open.clients:
            self._free = self._total.take(self._open)
            self._open = Sums()
            self._num_blocks += 1

    def _piece(self, name: str, tree: Tree, counts: Tree | None, factor: np.float32) -> _Piece:
        """Checks one tree of an upload; changes nothing."""
        spec = self._specs.get(name)  # one object for all that are equal: `is` then spares the comparisons
        if tree.spec is not spec and tree.spec != spec:
            spec = tree.spec
            _admit(name, spec)
            _agree(name, spec, self._known.get(name, {}))
        factors = None if counts is None else _factors(name, tree, counts, factor)
        return _Piece(spec, tree.buffers, factor, factors)

    def _remember(self, name: str, spec: Spec) -> None:
        if spec is not self._specs.get(name):
            self._specs[name] = spec
            self._known.setdefault(name, {}).update(spec)


def _is_counts(name: str, message: Message) -> bool:
    if name.endswith("#") and name[:-1] not in message.trees:
        raise SpecError(f"tree {name!r} holds counts of {name[:-1]!r}, which the upload does not hold")
    return name.endswith("#")


def _admit(name: str, spec: Spec) -> None:
    for entry, value in spec.items():
        if value.dtype not in FLOATS or part_of(entry) == "buffers":
            raise SpecError(f"{name}/{entry} ({value.dtype}) is never averaged; leave it out of the upload")


def _factor(value: float, tree: str, position: int) -> np.float32:
    """The weight, rounded to float32 once."""
    if not 0.0 < value <= FLOAT32_MAX or not (factor := np.float32(value)):
        raise UsageError(
            f"the weight of tree {tree!r} at position {position} is {value}; weights are finite and above 0"
        )
    return factor


def _factors(name: str, tree: Tree, counts: Tree, weight: np.float32) -> dict[str, Any]:
    """The factor of each entry, weight times count: a scalar, or (size,) of the accumulator's dtype.

    An entry without counts counts once.
    """
    if extra := [entry for entry in counts if entry not in tree]:
        raise SpecError(f"{name}#/{extra[0]}: tree {name!r} has no such entry")
    factors: dict[str, Any] = {}
    for entry, (dtype, *_, shape) in tree.spec.places.items():
        count = counts.get(entry)
        if count is None:
            factors[entry] = weight
            continue
        is_scalar = count.ndim == 0
        if count.shape not in ((), shape):
            raise SpecError(f"{name}#/{entry} has shape {list(count.shape)}, expected [] or {list(shape)}")
        count = count.astype(np.float64).ravel()
        if not bool(np.all((count >= 0) & (count * float(weight) <= FLOAT32_MAX))):
            raise SpecError(f"{name}#/{entry} holds a count that is negative, not finite or too large")
        factor = np.multiply(count.astype(np.float32), weight)
        factors[entry] = factor[0] if is_scalar else factor.astype(DTYPES[ACCUMULATOR[dtype]], copy=False)
    return factors


class Aggregate:
    """What a round's accepted uploads came to; the algorithm decides who divides by what.

    FedAvg takes the mean, FedBuff the sum over its K, differential privacy the sum over a fixed denominator.

    Attributes:
        clients: how many uploads were folded.
        numbers: name -> mean over the clients that sent it, weighted by their num_examples ("num_examples" itself is
            the total).
        sums: the running sums themselves.

    Guarantees: an entry that nobody sent, or that nobody gave weight, is absent from all three; nothing is NaN.
    """

    __slots__ = ("clients", "numbers", "sums")

    def __init__(self, sums: Sums | None = None) -> None:
        self.sums = sums if sums is not None else Sums()
        self.clients = self.sums.clients
        self.numbers: Mapping[str, float] = self._means()

    def _means(self) -> dict[str, float]:
        means = {name: total / weight for name, (total, weight) in self.sums.numbers.items() if weight > 0}
        return {**means, "num_examples": self.sums.num_examples} if self.clients else means

    @property
    def trees(self) -> tuple[str, ...]:
        """Names of the trees that were sent."""
        return tuple(self.sums.trees)

    def sum(self, tree: str) -> Tree:
        """Σ w x per entry, in the accumulator's dtype."""
        return self._each(tree, _itself)

    def weight(self, tree: str) -> Tree:
        """Σ w per element, with the spec of `sum`."""
        return self._each(tree, _weight)

    def mean(self, tree: str) -> Tree:
        """Σ w x / Σ w per element, in the upload's dtype; an element without weight has the value 0, no step.

        Entries stand in the order of the uploads' spec, or in order of first appearance where specs differ.
        """
        return self._each(tree, _divided, narrow=True)

    def _each(self, tree: str, function: Callable[[_Sum, Array], Array], *, narrow: bool = False) -> Tree:
        sums = {name: one for name, one in self.sums.trees.get(tree, {}).items() if one.has_weight}
        return _tree(sums, function, narrow=narrow)


def _itself(_: _Sum, vector: Array) -> Array:
    return vector


def _weight(one: _Sum, vector: Array) -> Array:
    return np.broadcast_to(one.weight, vector.shape).astype(vector.dtype)


def _divided(one: _Sum, vector: Array) -> Array:
    if isinstance(one.weight, float):
        mean: Array = np.divide(vector, vector.dtype.type(one.weight))
        return mean
    weight = one.weight.astype(vector.dtype)
    mean = np.zeros_like(vector)
    np.divide(vector, weight, out=mean, where=weight > 0)
    return mean


def _tree(sums: _Sums, function: Callable[[_Sum, Array], Array], *, narrow: bool = False) -> Tree:
    """A tree of `function` of every accumulator, in its own dtype or, narrow, in the upload's."""
    whole = sums.get(_WHOLE)
    if whole is not None and (narrow or all(ACCUMULATOR[dtype] == dtype for dtype in whole.vectors)):
        vectors = {d: function(whole, v).astype(DTYPES[d], copy=False) for d, v in whole.vectors.items()}
        return Tree.wrap(whole.spec, vectors)
    arrays: dict[str, Array] = {}
    for name, one in _split(sums).items():
        (dtype, vector), entry = next(iter(one.vectors.items())), one.spec[str(name)]
        value = function(one, vector).reshape(entry.shape)
        arrays[str(name)] = value.astype(DTYPES[dtype], copy=False) if narrow else value
    return Tree(arrays)


# ---- what is accepted


@dataclass(frozen=True)
class UpdatePolicy:
    """What the server accepts of one client.

    Attributes:
        max_num_examples: a larger claim is refused; counts ("x#") have the same limit.
        max_share: the largest part of a round's weight that one client may have; larger ones are cut, see `capped`.
            None lets every client weigh what its rows say.
        max_abs: limit of an array's values. With the defaults no sum over a million clients can overflow float32;
            models that train have values many orders below it, so lower it where the range is known.
        max_growth: limit of a parameter update's values, in units of the largest parameter that it was computed from
            (see `largest_step`): one client whose training exploded must not take the others with it. Parameters that
            are all zero, such as a linear model's before round 1, give no unit; then `max_abs` alone holds.
        max_number: limit of the numbers sent beside.
    """

    max_num_examples: float = 1e9
    max_share: float | None = None
    max_abs: float = 1e20
    max_growth: float = 1e6
    max_number: float = 1e20

    def __post_init__(self) -> None:
        for name in ("max_num_examples", "max_abs", "max_growth", "max_number"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise UsageError(f"max_share is a part of 1, got {self.max_share}")


DEFAULT_POLICY = UpdatePolicy()


def largest_step(params: Tree, policy: UpdatePolicy = DEFAULT_POLICY) -> float:
    """The largest value that an update of these parameters may have; parameters below 1e-3 count as 1e-3.

    >>> largest_step(Tree({"w": np.array([0.5, -2.0], np.float32)}))
    2000000.0
    """
    floats = [np.abs(buffer).max(initial=0.0) for dtype, buffer in params.buffers.items() if dtype in FLOATS]
    largest = max((float(value) for value in floats), default=0.0)
    return min(policy.max_abs, policy.max_growth * max(largest, 1e-3)) if largest else policy.max_abs


def validate(
    update: Message,
    expected: Mapping[str, Spec],
    client: str,
    policy: UpdatePolicy = DEFAULT_POLICY,
    *,
    limits: Mapping[str, float] = MappingProxyType({}),
) -> Message:
    """Checks an upload before anything is folded; returns it with trees and entries in the expected order.

    Args:
        update: well-formed, of any content.
        expected: exactly the trees that it must hold, counts included, with their specs.
        client: who sent it, for the refusal.
        policy: limits of values and claims.
        limits: tree -> a limit of its values in place of ``policy.max_abs``.

    Raises:
        RefusedError: names client, tree, entry and reason.
    """
    trees = update.trees
    if trees.keys() != expected.keys():
        _refuse_trees(trees, expected, client)
    _check_numbers(update.numbers, client, policy)
    moved: dict[str, Tree] = {}
    for name, spec in expected.items():
        tree = trees[name]
        if tree.spec is not spec and tree.spec != spec:
            tree = moved[name] = _reordered(name, tree, spec, client)
        if name.endswith("#"):
            _check_counts(name, tree, client, policy.max_num_examples)
            continue
        limit = limits.get(name, policy.max_abs)
        if not all(_is_within(buffer, limit) for buffer in tree.buffers.values()):
            _refuse_value(name, tree, client, limit)
    if not moved and list(trees) == list(expected):
        return update
    return Message({name: moved.get(name, trees[name]) for name in expected}, update.numbers, update.text)


def _is_within(buffer: Array, limit: float) -> bool:
    """Whether all values are finite and at most `limit` in size."""
    dtype = buffer.dtype
    if dtype.kind not in "fV":  # V: bfloat16
        return True
    for start in range(0, buffer.size, PIECE):
        piece = buffer[start : start + PIECE]
        if dtype.itemsize < 4:
            piece = piece.astype(np.float32)
        # NaN passes through both and compares false; Python floats, as a limit may lie beyond the dtype's range
        if not (float(np.maximum.reduce(piece)) <= limit and float(np.minimum.reduce(piece)) >= -limit):
            return False
    return True


def _refuse_trees(trees: Mapping[str, Tree], expected: Mapping[str, Spec], client: str) -> None:
    for name in expected:
        if name not in trees:
            raise RefusedError(client, name, f"the tree is missing; the update holds {_listed(trees)}")
    for name in trees:
        if name not in expected:
            raise RefusedError(client, name, f"the tree is not expected; wanted are {_listed(expected)}")


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:5]) or "none"


def _check_numbers(numbers: Mapping[str, float], client: str, policy: UpdatePolicy) -> None:
    for name, value in numbers.items():
        where = f"numbers/{name}"
        if not -policy.max_number <= value <= policy.max_number:
            raise RefusedError(
                client, where, f"is {value}; numbers are finite and at most {policy.max_number:g} in size"
            )
        if name == "num_examples" and not (0 < value <= policy.max_num_examples and value == math.floor(value)):
            raise RefusedError(
                client, where, f"is {value}; wanted is a whole number from 1 to {policy.max_num_examples:g}"
            )


def _reordered(name: str, tree: Tree, spec: Spec, client: str) -> Tree:
    for entry, wanted in spec.items():
        got = tree.spec.get(entry)
        if got is None:
            raise RefusedError(client, f"{name}/{entry}", f"is missing; expected {wanted.dtype}{list(wanted.shape)}")
        if got != wanted:
            said = f"is {got.dtype}{list(got.shape)}, expected {wanted.dtype}{list(wanted.shape)}"
            raise RefusedError(client, f"{name}/{entry}", said)
    for entry in tree.spec:
        if entry not in spec:
            raise RefusedError(client, f"{name}/{entry}", "is not expected; the model has no such entry")
    return tree.in_order_of(spec)


def _check_counts(name: str, tree: Tree, client: str, limit: float) -> None:
    for entry, given in tree.items():
        with np.errstate(invalid="ignore"):
            array = given.astype(np.float64)
        bad = ~((array >= 0) & (array <= limit))
        if bad.any():
            at = np.argwhere(bad)[0]
            said = f"count {_at(array, at)}; counts are from 0 to {limit:g}"
            raise RefusedError(client, f"{name}/{entry}", said)


def _refuse_value(name: str, tree: Tree, client: str, limit: float) -> None:
    for entry, array in tree.items():
        with np.errstate(invalid="ignore"):  # a signalling NaN would warn of itself
            wide = array.astype(np.float64)
        bad = np.argwhere(~(np.abs(wide) <= limit))
        if bad.size or (wide.ndim == 0 and not abs(float(wide)) <= limit):
            said = f"value {_at(wide, bad[0])}; every value is finite and at most {limit:g} in size"
            raise RefusedError(client, f"{name}/{entry}", said)


def _at(array: Array, index: Array) -> str:
    place = tuple(int(i) for i in index)
    return f"at {list(place)} is {float(array[place])}" if place else f"is {float(array[()])}"


def weights_of(message: Message, weight: Callable[[str], float], client: str) -> dict[str, float]:
    """The weight of each of the upload's trees, from an algorithm's rule over numbers that the client claims.

    Raises:
        RefusedError: the rule needs a number that was not sent, or makes a weight that is not finite and above 0.
    """
    weights: dict[str, float] = {}
    for tree in message.trees:
        if tree.endswith("#"):
            continue
        try:
            value = float(weight(tree))
        except KeyError as error:
            raise RefusedError(
                client, f"numbers/{error.args[0]}", f"is missing; the weight of {tree} needs it"
            ) from None
        if not 0.0 < value <= FLOAT32_MAX:
            raise RefusedError(client, tree, f"would weigh {value}; weights are finite and above 0")
        weights[tree] = value
    return weights


def capped(weights: Sequence[float], max_share: float | None) -> list[float]:
    """Weights of one tree, cut so that no client has more than `max_share` of their sum.

    All weights are cut at the one level at which the largest have exactly that share; where so few clients are there
    that even equal weights exceed it, all weigh the same. The weights of a whole cohort are needed, so a run with a cap
    folds when its cohort is complete.

    >>> capped([1.0, 1.0, 8.0], 0.5)
    [1.0, 1.0, 2.0]
    """
    if max_share is None or not weights:
        return list(weights)
    total, count = sum(weights), len(weights)
    if max(weights) <= max_share * total:
        return list(weights)
    if max_share * count <= 1.0:
        return [min(weights)] * count
    below = 0.0  # the sum of those that are not cut; the others stand at `level` = max_share * (below + others * level)
    for others, weight in zip(range(count, 0, -1), sorted(weights), strict=True):
        if (room := 1.0 - max_share * others) > 0 and (level := max_share * below / room) <= weight:
            return [min(w, level) for w in weights]
        below += weight
    return list(weights)


# ---- statistics


def moments_of(stats: Tree, start: Tree) -> Tree:
    """What a client uploads of its normalisation statistics: moments about the mean that everyone started from.

    M1 = mean - start mean and M2 = variance + M1², under the names of mean and variance; weighted by examples, their
    means pool exactly by the law of total variance, see `stats_of`. They are float64, since a mean far from its start
    leaves nothing of the variance in float32 (at a mean of 1e6, none at all).

    Args:
        stats: entries "stats:<layer>/mean" and "stats:<layer>/variance" of equal shape, after training.
        start: the same entries before it.

    Raises:
        SpecError: another entry, half a pair, or a `start` with another spec.
    """
    moments = _over_layers(stats, start, lambda mean, variance, start: (mean - start, variance + (mean - start) ** 2))
    return Tree(moments)


def moments_spec(stats: Spec) -> Spec:
    """What `moments_of` gives for statistics of this spec: the same names and shapes, in float64."""
    return Spec({name: Entry("float64", entry.shape) for name, entry in stats.items()})


def stats_of(moments: Tree, start: Tree) -> Tree:
    """The pooled statistics from mean moments: the inverse of `moments_of` for one client.

    mean = start mean + M1, variance = M2 - M1², not below 0: the variance of all rows about their common mean.
    The result has the dtypes of `start`.
    """
    stats = _over_layers(moments, start, lambda m1, m2, start: (start + m1, np.maximum(m2 - m1**2, 0)))
    return Tree({name: stats[name].astype(array.dtype) for name, array in start.items()})


def _over_layers(
    tree: Tree, start: Tree, function: Callable[[Array, Array, Array], tuple[Array, Array]]
) -> dict[str, Array]:
    if difference := moments_spec(tree.spec).difference(moments_spec(start.spec)):
        raise SpecError(f"statistics: {difference}")
    arrays: dict[str, Array] = {}
    for mean, variance in _pairs(tree.spec):
        wide = (a.astype(np.float64) for a in (tree[mean], tree[variance], start[mean]))
        arrays[mean], arrays[variance] = function(*wide)
    return {name: arrays[name] for name in tree}


def _pairs(spec: Spec) -> Iterator[tuple[str, str]]:
    for name, entry in spec.items():
        stem, _, kind = name.rpartition("/")
        if part_of(name) != "stats" or kind not in ("mean", "variance") or entry.dtype not in FLOATS:
            raise SpecError(
                f"{name} ({entry.dtype}) is no normalisation statistic: 'stats:<layer>/mean' or '.../variance'"
            )
        other = f"{stem}/{'variance' if kind == 'mean' else 'mean'}"
        if spec.get(other) != entry:
            raise SpecError(f"{name} needs {other} beside it, with the same dtype and shape")
        if kind == "mean":
            yield name, other
