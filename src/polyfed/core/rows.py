"""Rows as a model sees them, after a client's own preprocessing, and the question that they ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from polyfed.core.errors import DataError
from polyfed.core.tree import Array


@dataclass(frozen=True)
class Problem:
    """What is predicted. Agreed by all clients before round 1.

    Attributes:
        classes: names of the classes in the order of the outputs; None for a regression.
        outputs: width of a prediction: the number of classes, or of regressed targets.
    """

    classes: tuple[str, ...] | None
    outputs: int

    @property
    def is_classification(self) -> bool:
        return self.classes is not None


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one client, or the public ones, after preprocessing.

    Attributes:
        inputs: input name -> array with the rows along axis 0. A model with one input calls it "x".
        target: (n,) int64 class numbers, or (n,) / (n, outputs) float32 values; None for unlabelled rows.
        cache: where an adapter keeps its framework's copy of these rows; never travels, never compared.
    """

    inputs: Mapping[str, Array]
    target: Array | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        lengths = {name: len(a) for name, a in self.inputs.items()}
        if self.target is not None:
            lengths["target"] = len(self.target)
        if len(set(lengths.values())) > 1:
            raise DataError(f"inputs and target differ in their number of rows: {lengths}")
        if not self.inputs:
            raise DataError("rows need at least one input")

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def x(self) -> Array:
        """The one input of a model with one input; raises `DataError` when there are several."""
        if len(self.inputs) != 1:
            raise DataError(f"this model takes one input, the rows have {len(self.inputs)}: {', '.join(self.inputs)}")
        return next(iter(self.inputs.values()))

    def take(self, index: Array) -> Rows:
        """The rows at these positions, in this order, copied."""
        target = None if self.target is None else self.target[index]
        return Rows({name: np.ascontiguousarray(a[index]) for name, a in self.inputs.items()}, target)

    def unlabelled(self) -> Rows:
        return Rows(self.inputs, None)

    def __getstate__(self) -> dict[str, Any]:
        return {"inputs": dict(self.inputs), "target": self.target, "cache": {}}
