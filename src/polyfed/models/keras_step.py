"""What the user's model becomes: a subclass of its own class whose loss is the sum of a request's terms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyfed.core.errors import DataError, UsageError
from polyfed.core.terms import Term
from polyfed.models.keras_backend import is_jax, library

if TYPE_CHECKING:
    from polyfed.models.keras_resident import Resident


@dataclass
class Plan:
    """What the model's subclass reads while one batch is worked on; on tensorflow and jax, while it is traced.

    What differs from batch to batch or from fit to fit (columns, tensors) comes through the train step's data, or it
    would be frozen into the trace.
    """

    terms: tuple[Term, ...] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Mapping[str, Any] = field(default_factory=dict)
    captured: Any = None
    logits: Any = None
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

    def train_step(self: Any, *given: Any) -> Any:
        *state, (x, (plan.columns, plan.tensors), weight) = (
            given  # jax hands the variables' values over before the data
        )
        own = resident.encoded(plan.columns["y"]) if "y" in plan.columns else None
        return base.train_step(self, *state, (x, own, weight))  # type: ignore[attr-defined]  # a keras.Model has it

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

    def predict_step(self: Any, *given: Any) -> Any:
        made = base.predict_step(self, *given)  # type: ignore[attr-defined]  # a keras.Model has it
        outputs, *state = made if is_jax() else (made,)
        found = {"logits": resident.logits(outputs)}
        if plan.captured is not None:
            found["features"] = flat(plan.captured, resident.keras.ops)
        return (found, *state) if state else found

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


def tap(layer: Any, plan: Plan) -> None:
    """Has a last softmax or sigmoid show what goes into it: on jax, arrays cannot carry it as an attribute of theirs."""
    activation = getattr(layer, "activation", None)
    if activation is None:  # a layer that is nothing but the activation
        base = type(layer)

        def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            plan.logits = inputs
            return base.call(self, inputs, *args, **kwargs)

        become(layer, type(base.__name__, (base,), {"call": call}))
        return

    def shown(inputs: Any) -> Any:
        plan.logits = inputs
        return activation(inputs)

    layer.activation = shown


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
