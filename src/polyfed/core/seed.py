"""One named random stream for each purpose; no global generator anywhere.

A stream is a pure function of its names, so neither the order nor the number of processes changes a draw.
A client's streams carry the client's own task number: a version can repeat under asynchrony (the same
batches would be drawn twice), a retry keeps its number (it must repeat its work exactly).
"""

from __future__ import annotations

import hashlib

import numpy as np


def key(*names: str | int) -> int:
    """A 128-bit key from a path of names; ``key("a", 1)`` and ``key("a1")`` differ."""
    # A separator within a name is doubled: the one that separates stands before a type's letter.
    text = "\x1f".join(f"{type(name).__name__[0]}{name}".replace("\x1f", "\x1f\x1f") for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def rng(*names: str | int) -> np.random.Generator:
    """The stream with these names.

    >>> float(rng(0, "cleveland", 1, "order").random()) == float(rng(0, "cleveland", 1, "order").random())
    True
    """
    return np.random.Generator(np.random.Philox(key=key(*names)))


def integer(*names: str | int) -> int:
    """A seed in [0, 2**31) for libraries that take one number."""
    return key(*names) & 0x7FFF_FFFF
