"""Named arrays over one contiguous buffer per dtype.

A `Spec` says which names, dtypes and shapes there are and where each lies; a `Tree` is a spec and its buffers.
Clip, fold, mask and encode are then single passes over a flat vector, whatever the number of layers.
Trees are immutable: every operation returns a new one, and the arrays a tree hands out are read-only views.

Parts of a model's state are told apart by name, so that the distinction survives the wire, memory and files:

    "base.0.weight"           a trainable parameter
    "stats:bn1/mean"          normalisation statistics, "<layer>/mean" beside "<layer>/variance"
    "buffers:bn1/count"       anything else that is not trained: counters, constants; never averaged
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from polyfed.core.errors import SpecError

Array = npt.NDArray[Any]
Part = Literal["params", "stats", "buffers"]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name under which a dtype travels; raises `SpecError` for one that does not (objects, strings, complex)."""
    name = _NAMES.get(dtype.newbyteorder("<"))
    if name is None:
        raise SpecError(_refusal(dtype))
    return name


def _refusal(dtype: np.dtype[Any]) -> str:
    return f"arrays of dtype {dtype} cannot be held in a tree; use one of {', '.join(DTYPES)}"


def part_of(name: str) -> Part:
    """Which part of a model's state an entry belongs to.

    >>> part_of("stats:bn1/mean"), part_of("head.weight")
    ('stats', 'params')
    """
    if name.startswith("stats:"):
        return "stats"
    return "buffers" if name.startswith("buffers:") else "params"


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of a spec: dtype by name, shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements, in Python integers (a product of hostile sizes must not wrap)."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize


class Spec(Mapping[str, Entry]):
    """Ordered names with dtype and shape, and the place of each in the buffer of its dtype."""

    __slots__ = ("__dict__", "_entries", "places", "sizes")

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        #: name -> (dtype, start, stop, shape) in elements of the dtype's buffer
        self.places: dict[str, tuple[str, int, int, tuple[int, ...]]] = {}
        #: dtype -> elements of its buffer, in order of first appearance
        self.sizes: dict[str, int] = {}
        for name, entry in self._entries.items():
            if entry.dtype not in DTYPES:
                raise SpecError(f"{name}: unknown dtype {entry.dtype!r}")
            start = self.sizes.get(entry.dtype, 0)
            self.sizes[entry.dtype] = start + entry.size
            self.places[name] = (entry.dtype, start, start + entry.size, entry.shape)

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Spec:
        if unfit := [name for name, a in arrays.items() if a.dtype.newbyteorder("<") not in _NAMES]:
            raise SpecError(f"{unfit[0]}: {_refusal(arrays[unfit[0]].dtype)}")
        return cls({name: Entry(dtype_name(a.dtype), tuple(a.shape)) for name, a in arrays.items()})

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        """Equal means same names in the same order, same dtypes and shapes."""
        if self is other:
            return True
        return isinstance(other, Spec) and self.places == other.places and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared often, never a key: use `digest`

    def __repr__(self) -> str:
        return f"Spec({len(self)} entries, {self.num_bytes} bytes)"

    @cached_property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    @cached_property
    def digest(self) -> str:
        """Hex digest of names, order, dtypes and shapes: two machines compare it to know they mean the same model."""
        text = "\n".join(f"{name}\x1f{entry.dtype}\x1f{entry.shape}" for name, entry in self.items())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def select(self, keep: Callable[[str], bool]) -> Spec:
        return Spec({name: entry for name, entry in self._entries.items() if keep(name)})

    def difference(self, other: Spec) -> str:
        """What differs from `other`, in a sentence that names the first few entries; empty when equal."""
        if self == other:
            return ""
        missing = [name for name in other if name not in self]
        extra = [name for name in self if name not in other]
        wrong = [
            f"{name} is {self[name].dtype}{list(self[name].shape)}, expected {other[name].dtype}{list(other[name].shape)}"
            for name in self
            if name in other and self[name] != other[name]
        ]
        said = [f"missing {_some(missing)}"] * bool(missing) + [f"unexpected {_some(extra)}"] * bool(extra) + wrong[:3]
        return "; ".join(said) or "the entries stand in another order"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more


def aligned(size: int, dtype: str) -> Array:
    """An uninitialised vector whose first element lies on a 64-byte boundary (vector kernels round by alignment)."""
    item = DTYPES[dtype].itemsize
    raw = np.empty(size * item + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * item].view(DTYPES[dtype])


class Tree(Mapping[str, Array]):
    """Named arrays, all views of one buffer per dtype.

    >>> t = Tree({"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)})
    >>> float((t + t).norm()), (t * 0.5)["w"].tolist()
    (4.0, [[0.5, 0.5], [0.5, 0.5]])

    Guarantees: every array comes back with the dtype and shape it went in with; no operation broadcasts; arithmetic
    on integers and booleans is refused, because no algorithm means it.
    """

    __slots__ = ("buffers", "spec")

    def __init__(self, arrays: Mapping[str, npt.ArrayLike] | None = None) -> None:
        """Copies `arrays` into aligned buffers, in their order."""
        given = {name: np.asarray(value) for name, value in (arrays or {}).items()}
        self.spec = Spec.of(given)
        self.buffers: dict[str, Array] = {d: aligned(n, d) for d, n in self.spec.sizes.items()}
        for name, (dtype, start, stop, _) in self.spec.places.items():
            self.buffers[dtype][start:stop] = given[name].ravel()
        for buffer in self.buffers.values():
            buffer.flags.writeable = False

    @classmethod
    def wrap(cls, spec: Spec, buffers: Mapping[str, Array]) -> Tree:
        """A tree over buffers that exist already, without a copy; the caller no longer writes to them.

        Raises:
            SpecError: a buffer is missing, of another dtype or length, or not contiguous.
        """
        tree = cls.__new__(cls)
        tree.spec, tree.buffers = spec, {}
        for dtype, size in spec.sizes.items():
            buffer = buffers.get(dtype)
            if buffer is None or buffer.shape != (size,) or buffer.dtype != DTYPES[dtype]:
                got = "nothing" if buffer is None else f"{buffer.dtype}{list(buffer.shape)}"
                raise SpecError(f"the {dtype} buffer holds {got}, expected {size} elements")
            if not buffer.flags.c_contiguous:
                raise SpecError(f"the {dtype} buffer is not contiguous; pass np.ascontiguousarray of it")
            if buffer.flags.writeable:
                buffer = buffer.view()
                buffer.flags.writeable = False
            tree.buffers[dtype] = buffer
        return tree

    @classmethod
    def zeros(cls, spec: Spec) -> Tree:
        return cls.wrap(spec, {dtype: _zeroed(size, dtype) for dtype, size in spec.sizes.items()})

    def __getitem__(self, name: str) -> Array:
        dtype, start, stop, shape = self.spec.places[name]
        return self.buffers[dtype][start:stop].reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec)

    def __len__(self) -> int:
        return len(self.spec)

    def __reduce__(self) -> tuple[Callable[[Spec, Mapping[str, Array]], Tree], tuple[Spec, dict[str, Array]]]:
        """Through `wrap`, since numpy forgets "read-only" when an array is copied between processes."""
        return Tree.wrap, (self.spec, self.buffers)

    def __repr__(self) -> str:
        return f"Tree({len(self)} entries, {self.spec.num_bytes} bytes)"

    def __eq__(self, other: object) -> bool:
        """Bitwise equality: same spec, same bytes (NaN equals the same NaN, 0.0 differs from -0.0)."""
        if not isinstance(other, Tree) or self.spec != other.spec:
            return False
        return all(np.array_equal(a.view(np.uint8), other.buffers[d].view(np.uint8)) for d, a in self.buffers.items())

    __hash__ = None  # type: ignore[assignment]  # use `digest`

    def __add__(self, other: Tree) -> Tree:
        return self._combine(other, np.add)

    def __sub__(self, other: Tree) -> Tree:
        return self._combine(other, np.subtract)

    def __mul__(self, scalar: float) -> Tree:
        self._floating()
        return Tree.wrap(
            self.spec,
            {d: np.multiply(a, a.dtype.type(scalar), out=aligned(a.size, d)) for d, a in self.buffers.items()},
        )

    __rmul__ = __mul__

    def _combine(self, other: Tree, op: np.ufunc) -> Tree:
        if self.spec is not other.spec and self.spec != other.spec:
            raise SpecError(f"trees of different specs never combine: {other.spec.difference(self.spec)}")
        self._floating()
        return Tree.wrap(
            self.spec, {d: op(a, other.buffers[d], out=aligned(a.size, d)) for d, a in self.buffers.items()}
        )

    def _floating(self) -> None:
        if extra := [d for d in self.buffers if d not in FLOATS]:
            raise SpecError(f"arithmetic on {', '.join(extra)} entries has no meaning; select the others with `only`")

    def map(self, function: Callable[[Array], Array]) -> Tree:
        """`function` of each buffer, a flat vector; it must keep dtype and length. Floating trees only."""
        self._floating()
        return Tree.wrap(self.spec, {d: function(a) for d, a in self.buffers.items()})

    def dot(self, other: Tree) -> float:
        """Inner product over all entries, summed in float64; its bits do not depend on threads or alignment."""
        if self.spec != other.spec:
            raise SpecError(f"trees of different specs never combine: {other.spec.difference(self.spec)}")
        self._floating()
        return sum((_dot(a, other.buffers[d]) for d, a in self.buffers.items()), 0.0)

    def norm(self) -> float:
        """L2 norm over all entries, summed in float64."""
        return math.sqrt(self.dot(self))

    def is_finite(self) -> bool:
        """No NaN and no infinity in any floating entry."""
        return all(bool(np.isfinite(a).all()) for d, a in self.buffers.items() if d in FLOATS)

    @property
    def flat(self) -> Array:
        """The one buffer of a tree with one dtype (float32 for an empty tree); raises `SpecError` otherwise."""
        if not self.buffers:
            return np.zeros(0, np.float32)
        if len(self.buffers) > 1:
            raise SpecError(f"a tree of {', '.join(self.buffers)} is not one flat vector; take one dtype with `only`")
        return next(iter(self.buffers.values()))

    def with_flat(self, flat: Array) -> Tree:
        """The same names over another vector: the inverse of `flat`. The vector is not copied."""
        return Tree.wrap(self.spec, {dtype_name(flat.dtype): flat} if self.spec.sizes else {})

    def only(self, names: Iterable[str]) -> Tree:
        """The entries with these names, in this tree's order; itself when they are all."""
        wanted = names if isinstance(names, (set, frozenset, Mapping)) else set(names)
        if len(wanted) >= len(self) and all(name in wanted for name in self.spec):
            return self
        return Tree({name: self[name] for name in self.spec if name in wanted})

    def without(self, names: Iterable[str]) -> Tree:
        dropped = set(names)
        return self.only({name for name in self.spec if name not in dropped})

    def part(self, part: Part) -> Tree:
        """The entries of one part of a model's state: see the head of this file."""
        return self.only({name for name in self.spec if part_of(name) == part})

    def under(self, prefixes: Iterable[str]) -> Tree:
        """The entries that lie under one of the prefixes, of whichever part: see `is_under`."""
        prefixes = tuple(prefixes)
        return self.only({name for name in self.spec if is_under(name, prefixes)})

    def overlay(self, other: Tree) -> Tree:
        """This tree with the entries of `other` in place of its own; every one must exist here with dtype and shape.

        Raises:
            SpecError: names the first entries that do not fit.
        """
        if other.spec == self.spec:
            return other
        if wrong := [name for name in other.spec if self.spec.get(name) != other.spec[name]]:
            raise SpecError(other.only(wrong).spec.difference(self.only(wrong).spec))
        buffers = {dtype: _copied(buffer) for dtype, buffer in self.buffers.items()}
        for name, (dtype, start, stop, _) in other.spec.places.items():
            _, to, end, _ = self.spec.places[name]
            buffers[dtype][to:end] = other.buffers[dtype][start:stop]
        return Tree.wrap(self.spec, buffers)

    def in_order_of(self, spec: Spec) -> Tree:
        """The same entries in the order of `spec`, which must hold the same names; itself when they stand so already."""
        if self.spec == spec:
            return self
        if difference := Spec({name: self.spec[name] for name in spec if name in self.spec}).difference(spec):
            raise SpecError(difference)
        if extra := [name for name in self.spec if name not in spec]:
            raise SpecError(f"unexpected {_some(extra)}")
        return Tree({name: self[name] for name in spec})

    def like(self, spec: Spec) -> Tree:
        """The entries of `spec`, in its order; raises `SpecError` for one that is absent or of another shape or dtype."""
        return self.only(spec).in_order_of(spec)

    @property
    def digest(self) -> str:
        """Hex digest of spec and bytes."""
        total = hashlib.blake2b(self.spec.digest.encode(), digest_size=32)
        for dtype in sorted(self.buffers):
            total.update(np.ascontiguousarray(self.buffers[dtype]).view(np.uint8).data)
        return total.hexdigest()


def is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether an entry lies under one of the prefixes, whole path elements only; no prefix at all means every entry.

    A prefix after "!" takes out what lies under it: ("!head",) is everything but the head.

    >>> is_under("stats:base.1/mean", ("base",)), is_under("basement.weight", ("base",))
    (True, False)
    >>> is_under("head.weight", ("!head",)), is_under("base.0.weight", ("!head",)), is_under("head.bias", ())
    (False, True, True)
    """
    if not prefixes:
        return True
    local = name.partition(":")[2] if part_of(name) != "params" else name
    wanted = [_covers(prefix, local) for prefix in prefixes if not prefix.startswith("!")]
    dropped = any(_covers(prefix[1:], local) for prefix in prefixes if prefix.startswith("!"))
    return not dropped and (any(wanted) or not wanted)


def _covers(prefix: str, local: str) -> bool:
    """Whether a path begins with another, in whole elements; the empty one begins none."""
    if not prefix or not local.startswith(prefix):
        return False
    return len(local) == len(prefix) or prefix[-1] in "./" or local[len(prefix)] in "./"


def _dot(a: Array, b: Array) -> float:
    """In blocks that stay in the cache, need no copy of the model, and are too short for BLAS to split over threads."""
    total = 0.0
    for at in range(0, a.size, 8192):
        left = a[at : at + 8192].astype(np.float64)
        total += float(left @ (left if b is a else b[at : at + 8192].astype(np.float64)))
    return total


def _zeroed(size: int, dtype: str) -> Array:
    out = aligned(size, dtype)
    out[:] = 0
    return out


def _copied(buffer: Array) -> Array:
    out = aligned(buffer.size, dtype_name(buffer.dtype))
    out[:] = buffer
    return out
