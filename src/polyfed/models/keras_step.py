"""What the user's model becomes: a subclass of its own class whose loss is the sum of a request's terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyfed.core.errors import DataError, UsageError
from polyfed.core.terms import Term
from polyfed.models.keras_backend import library

if TYPE_CHECKING:
    from polyfed.models.keras_resident import Resident


@dataclass
class Plan:
    """What the model's subclass reads while one batch is worked on; on tensorflow, while it is traced."""

    terms: tuple[Term, ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    captured: Any = None
    losses: int = 0


@dataclass
class Step:
    """See `polyfed.core.terms.Step`."""

    outputs: Any
    features: Any
    target: Any
    params: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]
    targets: Mapping[str, Any]
    own: Callable[[], Any]
    ops: Any

    def loss(self, output: str | None = None) -> Any:
        if output is not None:
            raise UsageError(f"this Keras model has one output; a term asked for the loss of {output!r}")
        if self.target is None:
            raise DataError("these rows have no target, and a term asked for the client's own loss")
        return self.own()

    def mean(self, per_row: Any) -> Any:
        return self.ops.mean(per_row)


def federated(base: type, resident: Resident) -> type:
    """The user's class, with a loss that sums the terms of the plan."""
    plan = resident.plan

    def train_step(self: Any, data: Any) -> Any:
        x, y, weight = data
        plan.columns = y
        own = resident.encoded(y["y"]) if "y" in y else None
        return base.train_step(self, (x, own, weight))  # type: ignore[attr-defined]  # a keras.Model has it

    def compute_loss(
        self: Any, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        def own() -> Any:
            if _takes_training(base):
                return base.compute_loss(self, x, y, y_pred, sample_weight, training=training)  # type: ignore[attr-defined]  # a keras.Model has it
            return base.compute_loss(self, x, y, y_pred, sample_weight)  # type: ignore[attr-defined]  # a keras.Model has it

        if plan.terms is None:
            return own()
        plan.losses += 1
        step = resident.step(own, y_pred)
        return sum(term(resident.ops, step) for term in plan.terms)

    def compute_metrics(self: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if y is None:
            return {"loss": self.metrics[0].result()}
        return base.compute_metrics(self, x, y, y_pred, sample_weight)  # type: ignore[attr-defined]  # a keras.Model has it

    def predict_step(self: Any, data: Any) -> Any:
        found = {"logits": resident.logits(base.predict_step(self, data))}  # type: ignore[attr-defined]  # a keras.Model has it
        if plan.captured is not None:
            found["features"] = flat(plan.captured, resident.keras.ops)
        return found

    functions = (train_step, compute_loss, compute_metrics, predict_step)
    return type(base.__name__, (base,), {f.__name__: f for f in functions})


def _takes_training(base: type) -> bool:
    return "training" in inspect.signature(base.compute_loss).parameters  # type: ignore[attr-defined]  # a keras.Model has it


def capturing(base: type, plan: Plan) -> type:
    """A layer's class that shows its input, the representation before it."""

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        plan.captured = inputs
        return base.call(self, inputs, *args, **kwargs)  # type: ignore[attr-defined]  # a keras Layer has it

    return type(base.__name__, (base,), {"call": call})


def become(thing: Any, kind: type) -> None:
    object.__setattr__(thing, "__class__", kind)  # past Keras's and torch's own attribute tracking


def flat(features: Any, ops: Any) -> Any:
    cast = ops.cast(features, "float32")
    return cast if len(cast.shape) == 2 else ops.reshape(cast, (cast.shape[0] or -1, -1))


def operations() -> Any:
    """The operations of `polyfed.core.terms.Ops`, Keras's own."""
    ops = library().ops

    class Operations:
        sum, mean, square, exp, log, sqrt, abs = ops.sum, ops.mean, ops.square, ops.exp, ops.log, ops.sqrt, ops.abs
        maximum, where, matmul = ops.maximum, ops.where, ops.matmul
        reshape, stop_gradient = ops.reshape, ops.stop_gradient

        @staticmethod
        def log_softmax(logits: Any) -> Any:
            return ops.log_softmax(logits, axis=-1)

        @staticmethod
        def logsumexp(logits: Any) -> Any:
            return ops.logsumexp(logits, axis=-1)

        @staticmethod
        def take(a: Any, index: Any) -> Any:
            return ops.take(a, index, axis=0)

    return Operations
