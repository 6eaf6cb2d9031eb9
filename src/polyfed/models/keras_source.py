"""The user's own model: read, rebuilt, never changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from polyfed.core.errors import DataError, UsageError
from polyfed.core.rows import Rows
from polyfed.models.keras_backend import as_numpy, config_of, library, single, tensor_of
from polyfed.models.keras_names import is_plain, walk

DEFAULT_RATE = 0.05  # as pf.torch's


def clone(model: Any) -> Any:
    """A model of the same class and configuration, with weights of its own, compiled alike."""
    kind, top = type(model).__name__, library()
    hidden = [type(layer).__name__ for _, layer in walk(model, "") if _hides_arguments(layer)]
    advice = f"give pf.keras a function that makes it instead of the model, such as pf.keras(lambda: {kind}(...))"
    if hidden:
        raise UsageError(f"{hidden[0]} does not say by get_config() what it was made with; {advice}")
    try:
        made = top.models.clone_model(model) if is_plain(model) else _rebuilt(model)
    except Exception as error:  # a user's get_config or __init__ may raise anything
        raise UsageError(
            f"{kind} cannot be rebuilt from its configuration ({type(error).__name__}); {advice}"
        ) from error
    if model.compiled:
        if type(model).compile is not top.Model.compile:
            raise UsageError(f"{kind} has a compile() of its own; give pf.keras a function that makes and compiles it")
        made.compile(**{name: copied(value) for name, value in compile_arguments(model).items()})
    return made


def _hides_arguments(layer: Any) -> bool:
    """Whether a subclassed model takes arguments and has no get_config of its own.

    Keras's automatic configuration of a Model holds the defaults of its arguments, whatever it was made with.
    """
    kind = type(layer)
    if not isinstance(layer, library().Model) or is_plain(layer):
        return False
    own = any("get_config" in vars(each) for each in kind.__mro__ if not each.__module__.startswith("keras."))
    return not own and bool(_arguments(kind) - {"name", "trainable", "dtype"})


def _arguments(kind: type) -> set[str]:
    parameters = list(inspect.signature(kind).parameters.values())
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in parameters if p.kind not in variable}


def _rebuilt(model: Any) -> Any:
    """A subclassed model from its configuration, without what Keras adds to it but the user's class does not take."""
    kind, config = type(model), config_of(model)
    if "get_config" not in vars(kind):
        taken = _arguments(kind)
        config = {name: value for name, value in config.items() if name in taken}
    return kind.from_config(config)


def compile_arguments(model: Any) -> dict[str, Any]:
    """What `compile` was given, as objects (the public form names a user's own functions but does not hold them)."""
    if not model.compiled:
        return {}
    return dict(model._compile_config.config)  # noqa: SLF001  # see above


def copied(value: Any) -> Any:
    """An optimizer or metric holds variables, so it is made anew; anything else is shared."""
    top = library()
    if isinstance(value, (top.optimizers.Optimizer, top.metrics.Metric)):
        return type(value).from_config(config_of(value))
    if isinstance(value, (list, tuple)):
        return [copied(each) for each in value]
    if isinstance(value, Mapping):
        return {name: copied(each) for name, each in value.items()}
    return value


def built_on(model: Any, rows: Rows) -> Any:
    """Runs the model once on up to 64 rows, which makes what is not built yet; returns the outputs."""
    if not len(rows):
        raise DataError("a Keras model is built from rows, and there are none")
    some = {name: tensor_of(single(np.ascontiguousarray(a[:64]))) for name, a in rows.inputs.items()}
    try:
        return _detached(model(next(iter(some.values())) if len(some) == 1 else some, training=False))
    except (ValueError, TypeError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(a.shape[1:])}" for name, a in rows.inputs.items())
        raise UsageError(f"{type(model).__name__} does not take rows of {shapes}: {error}") from error


def _detached(outputs: Any) -> Any:
    return outputs.detach() if hasattr(outputs, "detach") else outputs


def optimizer_of(model: Any, given: Any, lr: float | None) -> Any:
    """A new optimizer as the user configured it."""
    optimizers = library().optimizers
    if given is None:
        given = model.optimizer if model.compiled and model.optimizer is not None else optimizers.SGD(DEFAULT_RATE)
    made = optimizers.get(given)
    if made is given:
        made = type(given).from_config(config_of(given))
    if lr is not None:
        made.learning_rate = lr
    return made


def is_plain_sgd(optimizer: Any) -> bool:
    config = config_of(optimizer)
    odd = ("momentum", "nesterov", "weight_decay", "clipnorm", "global_clipnorm", "clipvalue", "use_ema")
    steady = not isinstance(config.get("learning_rate"), Mapping)
    return type(optimizer).__name__ == "SGD" and steady and not any(config.get(word) for word in odd)


def rate_of(optimizer: Any) -> float:
    return float(as_numpy(optimizer.learning_rate))


def last_dense(model: Any, name: str | None) -> Any:
    """The layer whose input is the representation; None when there is none."""
    layers = [layer for _, layer in walk(model, "")]
    if name is not None:
        named = [layer for path, layer in walk(model, "") if name in (layer.name, path)]
        if not named:
            raise UsageError(
                f"{type(model).__name__} has no layer named {name!r}; it has "
                f"{', '.join(layer.name for layer in layers[1:])}"
            )
        return named[0]
    dense = [layer for layer in layers if isinstance(layer, library().layers.Dense)]
    return dense[-1] if dense else None


def last_layer(model: Any) -> Any:
    """The layer that a Sequential or functional model ends in; None when it does not show."""
    top = library()
    last: Any = model
    while isinstance(last, top.Model):
        if isinstance(last, top.Sequential):
            last = last.layers[-1]
        elif hasattr(last, "output") and is_plain(last):
            last = last.output._keras_history.operation  # noqa: SLF001  # the graph has no public reader
        else:
            return None
    return last if isinstance(last, top.layers.Layer) else None


def activation_of(model: Any) -> str | None:
    """What a model's last layer gives: logits, softmax or sigmoid; None when it does not show."""
    last = last_layer(model)
    if type(last).__name__ in ("Softmax", "Sigmoid"):
        return type(last).__name__.lower()
    names = {"linear": "logits", "softmax": "softmax", "sigmoid": "sigmoid"}
    return names.get(getattr(getattr(last, "activation", None), "__name__", ""))


def from_logits(loss: Any) -> bool | None:
    config = config_of(loss) if hasattr(loss, "get_config") else {}
    if "from_logits" in config:
        return bool(config["from_logits"])
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", "")
    return False if "crossentropy" in name.lower() else None


def camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))
