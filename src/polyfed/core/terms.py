"""Loss terms, written once for all frameworks over the few operations of `polyfed.core.protocols.Ops`.

A term is a frozen dataclass that holds numbers only, so that two equal requests are equal values; arrays reach it
through the request: ``step.tensors[name]`` (trees that it reads) and ``step.targets[name]`` (one entry a row, already
cut to the batch). It is called as ``term(ops, step)`` and returns a scalar to be added to the loss.

The mean over rows is ``step.mean``, never an operation of its own: padded rows of a stacked batch do not count.
A term that a model without gradients can follow also offers ``soft_labels(targets)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from polyfed.core.tree import Array

Tensor = Any  # the framework's own


class Ops(Protocol):
    """What an adapter supplies: each works on its framework's tensors and keeps gradients."""

    def sum(self, a: Tensor, axis: int | None = None) -> Tensor: ...
    def mean(self, a: Tensor, axis: int | None = None) -> Tensor: ...
    def square(self, a: Tensor) -> Tensor: ...
    def exp(self, a: Tensor) -> Tensor: ...
    def log(self, a: Tensor) -> Tensor: ...
    def sqrt(self, a: Tensor) -> Tensor: ...
    def abs(self, a: Tensor) -> Tensor: ...
    def maximum(self, a: Tensor, b: Tensor) -> Tensor: ...
    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor: ...
    def matmul(self, a: Tensor, b: Tensor) -> Tensor: ...
    def log_softmax(self, logits: Tensor) -> Tensor:
        """Along the last axis, stable."""
        ...

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Along the last axis, which it removes."""
        ...

    def take(self, a: Tensor, index: Tensor) -> Tensor:
        """Rows of `a` at integer positions."""
        ...

    def reshape(self, a: Tensor, shape: tuple[int, ...]) -> Tensor: ...
    def stop_gradient(self, a: Tensor) -> Tensor: ...


class Step(Protocol):
    """What a term sees of one batch of one client.

    Attributes:
        outputs: logits (batch, classes), or predictions (batch, outputs), always of two axes; a mapping of those for a
            model with named outputs.
        features: representation before the last layer, where the model offers "features"; else None.
        target: the batch's targets; None on unlabelled rows.
        params: name -> tensor, the parameters under training, with gradients.
        tensors: the request's trees, name -> entry -> tensor, without gradients.
        targets: the request's row targets cut to this batch, without gradients.
    """

    @property
    def outputs(self) -> Tensor: ...
    @property
    def features(self) -> Tensor: ...
    @property
    def target(self) -> Tensor: ...
    @property
    def params(self) -> Mapping[str, Tensor]: ...
    @property
    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]: ...
    @property
    def targets(self) -> Mapping[str, Tensor]: ...

    def loss(self, output: str | None = None) -> Tensor:
        """The client's own loss of this batch, of one named output if the model has several."""
        ...

    def mean(self, per_row: Tensor) -> Tensor:
        """Mean over the batch's real rows of a (batch,) tensor."""
        ...


class Term(Protocol):
    def __call__(self, ops: Ops, step: Step) -> Tensor: ...


@dataclass(frozen=True)
class Own:
    """The client's own loss on its own targets, times `weight`."""

    weight: float = 1.0

    def __call__(self, ops: Ops, step: Step) -> Tensor:  # noqa: ARG002
        return step.loss() if self.weight == 1.0 else step.loss() * self.weight


@dataclass(frozen=True)
class Near:
    """μ/2 ‖w − anchor‖², summed over the entries of ``tensors["anchor"]`` (FedProx, Li et al. 2020, eq. 2)."""

    mu: float

    def __call__(self, ops: Ops, step: Step) -> Tensor:
        anchor = step.tensors["anchor"]
        total = sum(ops.sum(ops.square(step.params[name] - anchor[name])) for name in anchor if name in step.params)
        return total * (0.5 * self.mu)


@dataclass(frozen=True)
class Distill:
    """T² · KL(teacher ‖ softmax(z / T)), batch mean, times `weight`; the teacher is a constant.

    ``targets["teacher"]``: (n, classes) probabilities, already softened at T by whoever sends them. The teacher's
    entropy is left out of the value: it has no gradient. T² keeps the gradient's size when T grows (Hinton et al. 2015).
    """

    temperature: float = 1.0
    weight: float = 1.0

    def __call__(self, ops: Ops, step: Step) -> Tensor:
        log_p = ops.log_softmax(step.outputs / self.temperature)
        cross = -ops.sum(ops.stop_gradient(step.targets["teacher"]) * log_p, -1)
        return step.mean(cross) * (self.weight * self.temperature**2)

    def soft_labels(self, targets: Mapping[str, Array]) -> Array:
        """(n, classes) probabilities that a model without gradients may take as weighted labels: the softening undone.

        softmax(z / T) = teacher where softmax(z) ∝ teacher^T. Labels softened at T, softened again when they are
        predicted, would drift to the uniform distribution from round to round.
        """
        with np.errstate(divide="ignore"):  # log 0 is -inf, which stays 0
            raised = self.temperature * np.log(np.asarray(targets["teacher"], np.float64))  # in logs: p^T underflows
        sharp = np.exp(raised - raised.max(-1, keepdims=True))
        return np.asarray(sharp / sharp.sum(-1, keepdims=True))


@dataclass(frozen=True)
class Match:
    """Mean squared error to ``targets["teacher"]`` ((n,) or (n, outputs) values): distillation of a regression."""

    weight: float = 1.0

    def __call__(self, ops: Ops, step: Step) -> Tensor:
        teacher = ops.stop_gradient(step.targets["teacher"])
        if len(teacher.shape) < len(step.outputs.shape):  # (n,) beside (n, 1) would broadcast to (n, n)
            teacher = ops.reshape(teacher, (-1, 1))
        return step.mean(ops.mean(ops.square(step.outputs - teacher), -1)) * self.weight

    def soft_labels(self, targets: Mapping[str, Array]) -> Array:
        """The values themselves: a regressor without gradients takes them as targets."""
        return targets["teacher"]
