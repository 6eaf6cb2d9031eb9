"""Total += round(weight * x), the one inner loop of the fold, and which implementation runs it.

The fold is defined as two roundings: the product is rounded to the accumulator's dtype, then the sum is. A fused
multiply-add rounds once and gives other bits in a fifth of all entries, so no kernel may contract the two. numpy in
pieces of 64k elements is the reference; the numba kernel (extra "fast") must equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from polyfed.core.tree import Array

#: Elements of a piece: its product stays in the cache, and the scratch small (1 MB) whatever the model's size. No bit
#: depends on it; 2**18 measured 1.4 times as fast as 2**16 (0.85 of memcpy against 0.59, 1 MB of L2 a core).
PIECE = 1 << 18
#: Elements from which the import and compilation of numba (about a second, once a process) are worth it.
LARGE = 1 << 22

AddScaled = Callable[[Array, Array, Any], None]


def kernel_name(size: int) -> str:
    """The kernel that folds a vector of `size` elements here: "numpy" or "numba"; part of a run's fingerprint."""
    return "numba" if size >= LARGE and compiled() is not None else "numpy"


@cache
def compiled() -> AddScaled | None:
    """The numba kernel for one weight per vector; None where numba cannot be imported."""
    try:
        import numba
    except ImportError:  # not installed, or it refuses this numpy
        return None

    # No fastmath: it would allow LLVM to contract the product and the sum into one rounding.
    @numba.njit(nogil=True)
    def add_scaled(total: Array, x: Array, weight: Any) -> None:
        for i in range(total.size):
            total[i] = total[i] + weight * x[i]

    return add_scaled


class Scratch:
    """Room for the products of one piece, reused by every call; not for two threads at once."""

    __slots__ = ("_rooms",)

    def __init__(self) -> None:
        self._rooms: dict[Any, Array] = {}

    def room(self, dtype: np.dtype[Any], size: int) -> Array:
        room = self._rooms.get(dtype)
        if room is None or room.size < size:
            room = self._rooms[dtype] = np.empty(min(PIECE, 2 * size), dtype)
        return room[:size]


def add_scaled(total: Array, x: Array, weight: Any, scratch: Scratch) -> None:
    """Adds round(weight * x) to the total, in place.

    Args:
        total: (n,) float32 or float64.
        x: (n,) of a dtype that converts to the total's without loss.
        weight: a float32 scalar, or one factor per entry of the total's dtype.
        scratch: reused between calls.
    """
    if x.size >= LARGE and x.dtype == total.dtype and x.flags.c_contiguous and x.flags.aligned and not np.ndim(weight):
        fast = compiled()
        if fast is not None:
            fast(total, x, total.dtype.type(weight))
            return
    add_scaled_numpy(total, x, weight, scratch)


def add_scaled_numpy(total: Array, x: Array, weight: Any, scratch: Scratch) -> None:
    """The reference of `add_scaled`."""
    size = x.size
    if size <= PIECE:
        product = scratch.room(total.dtype, size)
        np.multiply(x, weight, product)
        np.add(total, product, total)
        return
    factors = weight if np.ndim(weight) else None
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        piece = total[start:stop]
        product = scratch.room(total.dtype, stop - start)
        np.multiply(x[start:stop], weight if factors is None else factors[start:stop], product)
        np.add(piece, product, piece)
