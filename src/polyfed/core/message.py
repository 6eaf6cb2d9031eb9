"""The one thing that travels, that is remembered and that is journalled: named trees, numbers and short texts.

An upload, a download, a client's memory and the server's state are all a `Message`, so one codec writes them all.

Tree names are the field's own: "params" (model parameters, or their update: trained minus start), "stats"
(moments of normalisation statistics), "soft" (class probabilities on public rows), "control", "prototypes", ...
A tree "x#" holds the counts or masks of tree "x", per entry either one number (shape ()) or one per element (the
same shape); nothing is ever broadcast otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from polyfed.core.tree import Tree


@dataclass(frozen=True, slots=True)
class Message:
    """Named trees, numbers and texts.

    Attributes:
        trees: named arrays.
        numbers: scalars: ``num_examples``, ``loss``, ``steps``, metrics. Finite, float64 on the wire.
        text: bounded vocabularies, such as class names.
    """

    trees: Mapping[str, Tree] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    text: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def put(
        self,
        trees: Mapping[str, Tree] | None = None,
        numbers: Mapping[str, float] | None = None,
        text: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Message:
        """A copy with these named trees, numbers and texts added or replaced.

        >>> Message(numbers={"a": 1.0}).put(numbers={"b": 2.0}).numbers
        {'a': 1.0, 'b': 2.0}
        """
        return replace(
            self,
            trees={**self.trees, **(trees or {})},
            numbers={**self.numbers, **(numbers or {})},
            text={**self.text, **(text or {})},
        )

    def only(self, *names: str) -> Message:
        """A copy with those of these trees that there are, in this order; numbers and texts stay."""
        return replace(self, trees={name: self.trees[name] for name in names if name in self.trees})

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays alone, without framing."""
        return sum(tree.spec.num_bytes for tree in self.trees.values())

    @property
    def digest(self) -> str:
        """Hex digest of everything in it."""
        from polyfed.core.wire import digest  # wire is written over Message

        return digest(self)


#: What a client remembers between rounds (personal layers, control variates, error feedback), and what the server does.
Memory = Message
State = Message
