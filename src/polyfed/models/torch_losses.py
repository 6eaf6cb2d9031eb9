"""Torch's side of loss terms: the operations, one step, and a client's own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyfed.core.errors import UsageError
from polyfed.core.metrics import no_logits
from polyfed.core.rows import Problem

Loss = Callable[[Any, Any], Tensor]
PerRow = Callable[[Tensor, Tensor, str], Tensor]  # outputs, target, reduction


class TorchOps:
    """`polyfed.core.terms.Ops` over torch tensors."""

    def sum(self, a: Tensor, axis: int | None = None) -> Tensor:
        return a.sum() if axis is None else a.sum(axis)

    def mean(self, a: Tensor, axis: int | None = None) -> Tensor:
        return a.mean() if axis is None else a.mean(axis)

    def square(self, a: Tensor) -> Tensor:
        return a * a

    def exp(self, a: Tensor) -> Tensor:
        return torch.exp(a)

    def log(self, a: Tensor) -> Tensor:
        return torch.log(a)

    def sqrt(self, a: Tensor) -> Tensor:
        return torch.sqrt(a)

    def abs(self, a: Tensor) -> Tensor:
        return torch.abs(a)

    def maximum(self, a: Tensor, b: Tensor | float) -> Tensor:
        return torch.maximum(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))

    def where(self, condition: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
        return torch.where(condition, a, b)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def log_softmax(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits, -1)

    def logsumexp(self, logits: Tensor) -> Tensor:
        return torch.logsumexp(logits, -1)

    def take(self, a: Tensor, index: Tensor) -> Tensor:
        return a[index]

    def reshape(self, a: Tensor, shape: tuple[int, ...]) -> Tensor:
        return a.reshape(shape)

    def stop_gradient(self, a: Tensor) -> Tensor:
        return a.detach()


OPS = TorchOps()


def _cross_entropy(outputs: Tensor, target: Tensor, reduction: str) -> Tensor:
    return functional.cross_entropy(outputs, target, reduction=reduction)


def _bce(outputs: Tensor, target: Tensor, reduction: str) -> Tensor:
    margin = outputs[:, 1] - outputs[:, 0]
    return functional.binary_cross_entropy_with_logits(margin, target.to(margin.dtype), reduction=reduction)


def _mse(outputs: Tensor, target: Tensor, reduction: str) -> Tensor:
    return functional.mse_loss(outputs, target, reduction=reduction)


def _mae(outputs: Tensor, target: Tensor, reduction: str) -> Tensor:
    return functional.l1_loss(outputs, target, reduction=reduction)


def _huber(outputs: Tensor, target: Tensor, reduction: str) -> Tensor:
    return functional.huber_loss(outputs, target, reduction=reduction)


CLASS_LOSSES: Mapping[str, PerRow] = {"cross_entropy": _cross_entropy, "bce": _bce}
VALUE_LOSSES: Mapping[str, PerRow] = {"mse": _mse, "mae": _mae, "huber": _huber}


@dataclass(frozen=True)
class Head:
    """How what a module returns becomes outputs of the problem, and their loss.

    Attributes:
        problem: what is predicted.
        loss: a name, a callable (outputs, target) -> scalar, or None for the problem's usual one.
        output: which named output is the prediction; None is "shared", or else the first.
        kind: the module's type name, for messages.
    """

    problem: Problem
    loss: str | Loss | None
    output: str | None
    kind: str

    def primary(self, raw: Any) -> Tensor:
        """The output that is the prediction, as the module returned it."""
        if isinstance(raw, Tensor):
            return raw
        if not isinstance(raw, Mapping):
            raise UsageError(
                f"{self.kind} returns a {type(raw).__name__}; return one tensor, or a dict of named outputs"
            )
        if self.output is not None and self.output not in raw:
            raise UsageError(f"{self.kind} has no output {self.output!r}; it has {', '.join(map(str, raw))}")
        found: Tensor = raw[self.output or ("shared" if "shared" in raw else next(iter(raw)))]
        return found

    def shaped(self, out: Tensor) -> Tensor:
        """(batch, outputs): one logit z becomes the logits (0, z), a vector of values one column."""
        if out.ndim == 2 and out.shape[1] == self.problem.outputs:
            return out
        if out.ndim == 1:
            out = out.unsqueeze(1)
        if self.problem.is_classification and self.problem.outputs == 2 and out.shape[1:] == (1,):
            return torch.cat([torch.zeros_like(out), out], 1)
        return out

    def outputs(self, raw: Any) -> Any:
        """What terms see: every output in its shape, by name if there are several."""
        if isinstance(raw, Tensor):
            return self.shaped(raw)
        return {name: self.shaped(out) for name, out in raw.items()}

    def check(self, raw: Any) -> None:
        """Raises `UsageError` if the module's outputs are not the problem's, or no logits of a classification."""
        out = self.shaped(self.primary(raw))
        if out.ndim == 2 and out.shape[1] == self.problem.outputs:
            if self.problem.is_classification and (said := no_logits(out.detach().float().cpu().numpy())):
                raise UsageError(f"{self.kind} {said}")
            return
        what = "classes" if self.problem.is_classification else "targets"
        given = f"{out.shape[1]} outputs" if out.ndim == 2 else f"outputs of shape {tuple(out.shape[1:])} a row"
        raise UsageError(f"{self.kind} gives {given}, the problem has {self.problem.outputs} {what}")

    def own_loss(self, raw: Any, target: Tensor, weights: Tensor | None, output: str | None) -> Tensor:
        """The client's own loss of a batch: a mean over its rows, weighted by `weights` if they are given."""
        out = self.primary(raw) if output is None else raw[output]
        if callable(self.loss):
            return self._custom(self.loss, out, target, weights)
        function = self.named
        if weights is None:
            return function(self.shaped(out), target, "mean")
        per_row = function(self.shaped(out), target, "none")
        return weighted(per_row if per_row.ndim == 1 else per_row.mean(-1), weights)

    @cached_property
    def named(self) -> PerRow:
        """The loss that a name stands for; raises `UsageError` for one that does not suit the problem."""
        losses = CLASS_LOSSES if self.problem.is_classification else VALUE_LOSSES
        name = self.loss or next(iter(losses))
        if isinstance(name, str) and name in losses:
            if name == "bce" and self.problem.outputs != 2:
                raise UsageError(f'loss="bce" is for two classes, the problem has {self.problem.outputs}')
            return losses[name]
        kind = "classification" if self.problem.is_classification else "regression"
        raise UsageError(f"loss {name!r} is not one of {', '.join(losses)} (for a {kind}); or give a function")

    def _custom(self, loss: Loss, out: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        if weights is not None:
            raise UsageError(
                "a loss given as a function takes a mean that padded rows would enter; name the loss instead"
            )
        return loss(out if self.problem.is_classification else self.shaped(out), target)


def weighted(per_row: Tensor, weights: Tensor) -> Tensor:
    """Mean of a (batch,) tensor with a weight a row; 0 for a batch of padding alone."""
    return (per_row * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


class TorchStep:
    """One batch of one client, as terms see it: see `polyfed.core.terms.Step`."""

    __slots__ = ("_head", "_raw", "features", "params", "target", "targets", "tensors", "weights")

    def __init__(
        self,
        head: Head,
        raw: Any,
        target: Tensor | None,
        *,
        params: Mapping[str, Tensor],
        tensors: Mapping[str, Mapping[str, Tensor]],
        targets: Mapping[str, Tensor],
        features: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """`weights`: (batch,) 1 for a real row and 0 for padding; None when every row is real."""
        self._head, self._raw, self.target, self.features = head, raw, target, features
        self.params, self.tensors, self.targets, self.weights = params, tensors, targets, weights

    @property
    def outputs(self) -> Any:
        return self._head.outputs(self._raw)

    def loss(self, output: str | None = None) -> Tensor:
        if self.target is None:
            raise UsageError("the client's own loss needs labelled rows, these have no target")
        return self._head.own_loss(self._raw, self.target, self.weights, output)

    def mean(self, per_row: Tensor) -> Tensor:
        return per_row.mean() if self.weights is None else weighted(per_row, self.weights)
